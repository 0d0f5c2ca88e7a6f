"""What several test files use: the scripts' names, tiny settings, shell runs, curves, a probe."""

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
SINGLE = ["ppo_procgen", "spo_procgen"]
MUTUAL = ["mdpo_procgen", "mdspo_procgen"]
SCRIPTS = SINGLE + MUTUAL

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
}
BATCH_SIZE = 64  # of TINY, so that 500 steps are 7 iterations and 448 steps


def flags(**settings) -> list[str]:
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def shell(name: str, folder: Path):
    """Command-independent part of a run from the shell, which may write into folder / "work" alone."""
    for each in ("work", "home"):
        (folder / each).mkdir()
    home = str(folder / "home")
    env = os.environ | {"HOME": home, "TMPDIR": home, "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, str(ROOT / f"{name}.py")], {"cwd": folder / "work", "env": env}


def run_script(name: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A run to its end, its output in bytes, since text mode would turn \\r into \\n."""
    command, options = shell(name, folder)
    return subprocess.run([*command, *words], capture_output=True, timeout=120, **options)


def run_folder(folder: Path) -> Path:
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def agent_folders(name: str, run_dir: Path) -> list[Path]:
    return [run_dir / "agent_1", run_dir / "agent_2"] if name in MUTUAL else [run_dir]


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}}"""
    events = read_events(folder)
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def load_agent(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def make_agents(script, num: int, seed: int = 0) -> list:
    """Small agents whose policies differ between observations and between agents, as a trained one's do."""
    torch.manual_seed(seed)
    agents = [script.Agent(channels=(4, 4, 4)) for _ in range(num)]
    for agent in agents:
        agent.actor.weight.data *= 300
    return agents


def make_runner(script, args, folder):
    """The first agent's, on the CPU, all environments in one group."""
    agent = script.Agent(channels=args.channels)
    policy, device = partial(script.act, agent), torch.device("cpu")
    return script.Runner(args, agent, policy, index=0, num_groups=1, folder=folder, device=device)


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


def minibatch_step(script, agents, optimizer, batches, args, mb_inds, part_size=4):
    """The script's own, of its own loss, in parts of which the last may be smaller."""
    return script.minibatch_step(script.compute_loss, agents, optimizer, batches, args, part_size, mb_inds)


class Probe:
    """The bright half of the picture says which action is right, and that pays 1. Episodes last 4 steps,
    so the best return is 4 and that of random play 4/15."""

    right_actions = np.array([3, 11])
    best_return = 4.0

    def __init__(self, num: int, rand_seed: int):
        self.num, self.rng = num, np.random.default_rng(rand_seed)
        self.clock, self.reward = np.zeros(num, int), np.zeros(num, np.float32)
        self.side = self.rng.integers(2, size=num)

    def act(self, actions):
        self.reward = (actions == self.right_actions[self.side]).astype(np.float32)
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
