"""What several test files use: the scripts' names, tiny settings, runs in this process, in a fork of it and
from the shell, what runs leave, and a probe."""

import importlib
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
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


def give_words(script, patch, words):
    """As its command line."""
    program = f"{script.__name__}.py"
    patch.setattr(sys, "argv", [program, *map(str, words)])


def parse(script, folder: Path, *words):
    """The Args of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        give_words(script, patch, words)
        return script.parse_args()


# Runs from the shell.


def shell(name: str, folder: Path):
    """Command-independent part of a run from the shell, which may write into folder / "work" alone."""
    for each in ("work", "home"):
        (folder / each).mkdir(exist_ok=True)
    home = str(folder / "home")
    env = os.environ | {"HOME": home, "TMPDIR": home, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / f"{name}.py")]
    options = {"cwd": folder / "work", "env": env}
    return command, options


def run_script(name: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A run to its end, its output in bytes, since text mode would turn \\r into \\n."""
    command, options = shell(name, folder)
    command += words
    return subprocess.run(command, capture_output=True, timeout=300, **options)


def start_script(name: str, folder: Path, *words) -> subprocess.Popen:
    """A run that is to be met on its way, its output in pipes, as text."""
    command, options = shell(name, folder)
    command += map(str, words)
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **options)


# Runs in this process and in forks of it, which save the imports.


def new_second(folder: Path):
    """Waits until a run in this folder has another second in its name, and its curves too, than those that
    are there: TensorBoard reads the files of a run in the order of the seconds in their names."""
    last = 0
    for path in folder.rglob("events.out.tfevents.*"):
        second = int(path.name.split(".")[3])
        last = max(last, second)
    while time.time() < last + 1:
        time.sleep(0.01)


def run_as_from_shell(script, stop=None):
    """What `python script.py` does, with the words of give_words. `stop` takes the place of the signals'."""
    if stop is None:
        stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, partial(script.handle_signal, stop))
    script.main(script.parse_args(), stop)


def train(script, folder: Path, *words, stop=None) -> int:
    """A run in this process as from the shell; its exit status."""
    new_second(folder)
    handlers = get_handlers()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        give_words(script, patch, words)
        try:
            run_as_from_shell(script, stop)
        except SystemExit as exit:
            return exit.code
        finally:
            set_handlers(handlers)
    return 0


def get_handlers() -> dict:
    """Of the signals that stop a run."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    return {number: signal.getsignal(number) for number in numbers}


def set_handlers(handlers: dict):
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Fork:
    """A run as from the shell, in a fork of this process: it can be killed, and can do what this process must
    not. `prepare` is called in it before. Its output must fit into a pipe."""

    def __init__(self, script, folder: Path, words, prepare=None):
        new_second(folder)
        out, child_out = os.pipe()
        err, child_err = os.pipe()
        self.id = os.fork()
        if self.id == 0:
            os.dup2(child_out, 1)
            os.dup2(child_err, 2)
            self.run(script, folder, words, prepare)
        os.close(child_out)
        os.close(child_err)
        self.out = open(out, newline="")  # noqa: SIM115
        self.err = open(err, newline="")  # noqa: SIM115

    def run(self, script, folder, words, prepare):
        status = 70
        try:
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"))
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"))
            warnings.showwarning = lambda *what: print("warning:", *what, file=sys.stderr)
            script.tqdm.set_lock(threading.RLock())  # its own is shared by processes: one would die with it
            os.chdir(folder)
            give_words(script, pytest.MonkeyPatch(), words)
            if prepare:
                prepare()
            run_as_from_shell(script)
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream:  # a test may have closed it
                    stream.flush()
            os._exit(status)

    def running(self) -> bool:
        return os.waitpid(self.id, os.WNOHANG) == (0, 0)

    def wait_for_line(self, start: str):
        """Until it has printed a line that begins so."""
        for line in self.out:
            if line.startswith(start):
                return
        raise AssertionError(self.err.read())

    def finish(self, most_seconds: int = 100) -> SimpleNamespace:
        """Its status, negative the signal that killed it, and the rest of its output. What does not end by
        itself is killed."""
        timer = threading.Timer(most_seconds, os.kill, (self.id, signal.SIGKILL))
        timer.start()
        out = self.out.read()
        err = self.err.read()
        timer.cancel()
        self.out.close()
        self.err.close()
        _, wait_status = os.waitpid(self.id, 0)
        status = os.waitstatus_to_exitcode(wait_status)
        return SimpleNamespace(status=status, out=out, err=err)


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


def load_agent(path: Path) -> dict:
    return load(path)


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


def differences(name: str, run_dir: Path, other: Path, num_agents: int = 2) -> list[str]:
    """What two runs left that is not the same: weights and settings, curves, final test, checkpoint."""
    found = []
    folders = agent_folders(name, run_dir, num_agents)
    other_folders = agent_folders(name, other, num_agents)
    for folder, other_folder in zip(folders, other_folders, strict=True):
        agent = load_agent(folder / "agent.pt")
        other_agent = load_agent(other_folder / "agent.pt")
        for key in ("script", "args", "global_step", "agent"):
            if not same(agent[key], other_agent[key]):
                found.append(f"agent's {key}")
        points = read_points(folder)
        other_points = read_points(other_folder)
        assert len(points["losses/value_loss"]) > 3
        for tag in points.keys() | other_points.keys():
            if points.get(tag) != other_points.get(tag):
                found.append(tag)
    for file in ("final_test.json", "args.json"):
        content = (run_dir / file).read_bytes()
        if content != (other / file).read_bytes():
            found.append(file)
    checkpoint = load(run_dir / "checkpoint.pt")
    other_checkpoint = load(other / "checkpoint.pt")
    assert checkpoint.keys() == other_checkpoint.keys()
    for key in checkpoint:
        if not same(checkpoint[key], other_checkpoint[key]):
            found.append(f"checkpoint {key}")
    return found + [str(path) for path in other.rglob("*.tmp")]


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


class SmallPictures:
    """Environments that show every fourth row and column of their pictures: a sixteenth of the work."""

    def __init__(self, envs):
        self.envs = envs
        self.num = envs.num

    def observe(self):
        reward, obs, first = self.envs.observe()
        small = obs["rgb"][:, ::4, ::4]
        return reward, {"rgb": small.copy()}, first

    def __getattr__(self, name):
        return getattr(self.envs, name)


def show_small_pictures(script, patch):
    """In all environments that the script makes, until the patch is undone."""
    make_envs = script.make_envs

    def make_small(*inputs):
        envs = make_envs(*inputs)
        return SmallPictures(envs)

    patch.setattr(script, "make_envs", make_small)


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


def make_probes(args, num: int, num_levels: int, start_level: int, rand_seed: int) -> Probe:
    """In place of a script's make_envs."""
    return Probe(num, rand_seed)
