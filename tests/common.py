"""What several test files use: the scripts' names, tiny settings, runs in this process and in a fork of it,
what runs leave, and a probe."""

import importlib
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from procgen import ProcgenGym3Env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
SINGLE = ["ppo_procgen", "spo_procgen"]
MUTUAL = ["mdpo_procgen", "mdspo_procgen"]
SCRIPTS = SINGLE + MUTUAL
BOTH = ["ppo_procgen", "mdpo_procgen"]  # enough where the policy loss is not the subject: the rest is shared

# Episodes of random play in fruitbot end within 100 steps or so: the tests inside a run are short.
TINY = {
    "env_id": "fruitbot",
    "total_timesteps": 500,
    "num_envs": 4,
    "num_steps": 16,
    "num_minibatches": 2,
    "channels": (4, 4, 4),
    "eval_interval": 3,
    "num_eval_envs": 2,
    "final_eval_episodes": 3,
    "device": "cpu",
    "bf16": False,
}
BATCH_SIZE = 64  # of TINY, so that 500 steps are 7 iterations and 448 steps


# Command lines.


def flags(**settings) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if value is False:
            words.append("--no-" + flag)
            continue
        words.append("--" + flag)
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return words


def error_message(status: int, out: str, err: str) -> str:
    """Of a command line that cannot work, on one line and without the box that tyro draws: nothing else is
    printed, and the exit status is 2."""
    assert status == 2, err
    assert out == ""
    assert err
    assert "Traceback" not in err, err
    return without_boxes(err)


def without_boxes(text: str) -> str:
    """On one line, with one space between words."""
    words = re.sub("[\u2500-\u257f]", " ", text).split()
    return " ".join(words)


@contextmanager
def command_line(script, folder: Path, words):
    """In that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        yield


def parse(script, folder: Path, *words):
    """The Args of a command line."""
    with command_line(script, folder, words):
        return script.parse_args()


# Runs.


def new_second(folder: Path):
    """Waits until a run in this folder has another second in its name, and its curves too, than those that
    are there: TensorBoard reads the files of a run in the order of the seconds in their names."""
    last = 0
    for path in folder.rglob("events.out.tfevents.*"):
        second = int(path.name.split(".")[3])
        last = max(last, second)
    while time.time() < last + 1:
        time.sleep(0.01)


def train(script, folder: Path, *words, stop=()) -> int:
    """A run in this process; its exit status. A signal is a number in `stop`."""
    new_second(folder)
    with command_line(script, folder, words):
        try:
            script.main(script.parse_args(), stop)
        except SystemExit as exit:
            return exit.code
    return 0


def get_handlers() -> dict:
    """Of the signals that stop a run."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    return {number: signal.getsignal(number) for number in numbers}


def set_handlers(handlers: dict):
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Fork(ForkProcess):
    """A run as from the shell, in a fork of this process, which saves the imports: it can be killed, and can
    do what this process must not. `prepare` is called in it before."""

    def __init__(self, script, folder: Path, words, prepare=None):
        super().__init__()
        new_second(folder)
        self.script = script
        self.command_line = command_line(script, folder, words)
        self.prepare = prepare
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        self.start()

    def run(self):
        for number, file in enumerate(self.files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w")  # noqa: SIM115
        sys.stderr = open(2, "w")  # noqa: SIM115
        self.script.tqdm.set_lock(threading.RLock())  # its own is shared by processes: one would die with it
        _, last_lines = Path(self.script.__file__).read_text().split('if __name__ == "__main__":\n')
        with self.command_line:
            if self.prepare:
                self.prepare()
            exec(textwrap.dedent(last_lines), vars(self.script))

    def finish(self, most_seconds: int = 100) -> SimpleNamespace:
        """Its status, negative the signal that killed it, and its output. What does not end by itself is
        killed."""
        self.join(most_seconds)
        self.kill()
        self.join()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return SimpleNamespace(status=self.exitcode, out=texts[0], err=texts[1])


def run(script, folder: Path, words, prepare=None) -> SimpleNamespace:
    """In a fork, to its end."""
    return Fork(script, folder, words, prepare).finish()


def train_straight(name: str, folder: Path, settings: dict) -> SimpleNamespace:
    """A run in this process without a stop. A copy of each checkpoint is kept: {iteration: path}."""
    script = importlib.import_module(name)
    checkpoints = {}
    save_checkpoint = script.save_checkpoint

    def save_and_copy(run_dir, args, *state):
        save_checkpoint(run_dir, args, *state)
        iteration = state[-1] // args.batch_size
        checkpoints[iteration] = shutil.copy(run_dir / "checkpoint.pt", folder / f"{iteration}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_copy)
        assert train(script, folder, *flags(**settings)) == 0
    run = SimpleNamespace(name=name, script=script, settings=settings)
    run.run_dir = run_folder(folder)
    run.checkpoints = checkpoints
    return run


def copy_run(straight: SimpleNamespace, iteration: int, folder: Path, finished: bool = True) -> Path:
    """The run, with its checkpoint of that iteration, as if killed before the next; without what only its end
    writes, if it is not finished."""
    target = folder / "runs" / straight.run_dir.name
    shutil.copytree(straight.run_dir, target)
    if not finished:
        for file in [*target.rglob("agent.pt"), *target.rglob("*.json")]:
            file.unlink()
    shutil.copy(straight.checkpoints[iteration], target / "checkpoint.pt")
    return target


# What runs leave.


def run_folder(folder: Path) -> Path:
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def agent_folders(name: str, run_dir: Path, num_agents: int = 2) -> list[Path]:
    if name in SINGLE:
        return [run_dir]
    return [run_dir / f"agent_{number + 1}" for number in range(num_agents)]


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but the locks."""
    content = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            name = str(path.relative_to(folder))
            content[name] = path.read_bytes()
    return content


def load(path) -> dict:
    return torch.load(path, weights_only=True)


load_agent = load


def save_agent(path: Path, agent, script="ppo_procgen", **settings) -> Path:
    """An agent.pt as the scripts write it, for the game fruitbot and an agent of 4 channels unless told."""
    args = {"env_id": "fruitbot", "distribution_mode": "hard", "channels": (4, 4, 4)}
    args |= {"exp_name": script, "seed": 1}
    args |= settings
    content = {"script": script, "args": args, "global_step": 0, "agent": agent.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def step_of(run_dir: Path) -> int:
    return load(run_dir / "checkpoint.pt")["global_step"]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def read_points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]}, with doubled points if there are any; of the speed, the steps alone."""
    events = read_events(folder)
    points = {}
    for tag in events.Tags()["scalars"]:
        points[tag] = []
        for event in events.Scalars(tag):
            value = 0.0 if tag == "charts/SPS" else event.value
            points[tag].append((event.step, value))
    return points


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}}"""
    events = read_events(folder)
    curves = {}
    for tag in events.Tags()["scalars"]:
        curves[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return curves


def same(one, other) -> bool:
    """Of nested containers, tensors to the bit, NaN equal to NaN."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return False
        return all(map(same, one, other))
    both_nan = one != one and other != other
    return both_nan or one == other


# Small agents and batches, and an environment with a known answer.


def make_agents(script, num: int, seed: int = 0) -> list:
    """Small agents whose policies differ between observations and between agents, as a trained one's do."""
    torch.manual_seed(seed)
    agents = []
    for _ in range(num):
        agent = script.Agent(channels=(4, 4, 4))
        agent.actor.weight.data *= 300
        agents.append(agent)
    return agents


def make_batch(script, size: int, seed: int):
    """A batch of random numbers; old log-probabilities near those of a uniform policy."""
    torch.manual_seed(seed)
    return script.Batch(
        obs=torch.randint(256, (size, 64, 64, 3), dtype=torch.uint8),
        actions=torch.randint(15, (size,)),
        logprobs=0.1 * torch.randn(size) - 2.7,
        values=torch.randn(size),
        advantages=torch.randn(size),
        returns=torch.randn(size),
    )


class SmallPictures(ProcgenGym3Env):
    """Every fourth row and column of the pictures: a sixteenth of the work."""

    def observe(self):
        reward, obs, first = super().observe()
        return reward, {"rgb": obs["rgb"][:, ::4, ::4].copy()}, first


class Probe:
    """The bright half of the picture says which action is right, and that pays 1. Episodes last 4 steps,
    so the best return is 4 and that of random play 4/15."""

    right_actions = np.array([3, 11])
    best_return = 4.0

    def __init__(self, num: int, rand_seed: int):
        self.num = num
        self.rng = np.random.default_rng(rand_seed)
        self.clock = np.zeros(num, int)
        self.reward = np.zeros(num, np.float32)
        self.side = self.rng.integers(2, size=num)

    def act(self, actions):
        right = actions == self.right_actions[self.side]
        self.reward = right.astype(np.float32)
        self.clock = np.where(actions == -1, 0, (self.clock + 1) % 4)
        self.side = self.rng.integers(2, size=self.num)

    def observe(self):
        obs = np.zeros((self.num, 64, 64, 3), np.uint8)
        obs[self.side == 0, :, :32] = 255
        obs[self.side == 1, :, 32:] = 255
        return self.reward, {"rgb": obs}, self.clock == 0

    def get_state(self):
        state = (self.rng, self.clock, self.reward, self.side)
        return self.num * [pickle.dumps(state)]

    def set_state(self, states):
        self.rng, self.clock, self.reward, self.side = pickle.loads(states[0])

    def close(self):
        pass
