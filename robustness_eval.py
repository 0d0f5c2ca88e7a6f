# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "gym==0.23.1", "gym-notices==0.0.8", "matplotlib==3.10.9", "numpy==1.26.4", "scikit-learn==1.7.2",
#   "setuptools==84.2.1", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
#   "procgen==0.10.7; python_version < '3.11'", "procgen-mirror==0.10.7; python_version >= '3.11'",
# ]
# ///
"""Is a policy robust to what does not matter? Section 5.3, appendix E.4 and definition 3.6 of the MDPO paper.

All checkpoints of a game see the same observations o of test levels and the same perturbed copies o':

    random-conv    o' is o under its own random 3x3 convolution, Gaussian weights (table 1, figures 4 and 14)
    color-jitter   brightness, contrast, saturation and hue of o drawn at random (figures 13 and 15)
    rendering      o' draws the state of o otherwise: another background, none, monochrome (definition 3.6)
    return         whole episodes on the full distribution, played from o' instead of o

Measured are KL( pi(.|o) || pi(.|o') ), the total variation distance, how often the greedy action changes, and
the share of the return that is kept. A policy that ignores its input scores 0, 0, 0 and 1.

    python robustness_eval.py --checkpoints runs/*ppo_procgen*/agent.pt runs/*mdpo_procgen*
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from matplotlib.figure import Figure
from matplotlib.image import imread
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from sklearn.manifold import TSNE
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MODES = {"easy": ENV_NAMES, "hard": ENV_NAMES}  # and their games: any other pair aborts inside Procgen
MODES["extreme"] = ["chaser", "dodgeball", "leaper", "starpilot"]
MODES["memory"] = ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"]
TESTS = {"random-conv": ["random-conv"], "color-jitter": ["color-jitter"]}  # and their perturbations
TESTS |= {"rendering": ["background", "no-background", "monochrome"], "return": []}
PERTURBATIONS = [name for names in TESTS.values() for name in names]
BACKGROUNDS = dict.fromkeys("climber coinrun jumper miner ninja".split(), 62)  # in Procgen's list for a game
BACKGROUNDS |= dict.fromkeys("bossfight caveflyer starpilot".split(), 13)
BACKGROUNDS |= dict.fromkeys("dodgeball fruitbot heist leaper maze".split(), 9)
BACKGROUNDS |= {"bigfish": 7, "plunder": 4, "chaser": 1}
MEASURES = {"kl": "KL(clean ‖ perturbed), nats", "tv": "total variation distance"}
MEASURES |= {"action_changes": "share of greedy actions that change"}
SHOWN_COPIES, TSNE_COPIES = 9, 100  # copies of one observation in the pictures


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ()  # agent.pt files; a folder stands for all agent.pt in it
    labels: tuple[str, ...] = ()  # one for each of --checkpoints, for tables and pictures; else the algorithm
    tests: tuple[str, ...] = tuple(TESTS)  # of random-conv, color-jitter, rendering, return
    num_states: int = 200  # observations of each game, as many from each checkpoint's play
    num_copies: int = 20  # perturbed copies of each observation
    num_episodes: int = 64  # of the return test, without and with each perturbation
    seed: int = 1  # of states, perturbations and episodes
    chunk_size: int = 64  # observations in a forward pass, which bounds the memory; more suit a GPU
    output: str = ""  # folder to make, else robustness/{unix_time}
    log_dir: str = ""  # folder for TensorBoard to get numbers and pictures too
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: CUDA where there is one
    num_env_threads: int = 0  # Procgen's threads, 0 for one a core

    def __post_init__(self):
        def check(ok: bool, name: str, needs: str):
            if not ok:
                value = getattr(self, name)
                given = " ".join(value) or "nothing" if isinstance(value, tuple) else value
                raise ValueError(f"--{name.replace('_', '-')} {needs}, not {given}")

        check(self.checkpoints, "checkpoints", "needs agent.pt files, or folders that hold some")
        count = len(self.checkpoints)
        check(len(self.labels) in (0, count), "labels", f"needs one for each of the {count} --checkpoints")
        known = self.tests and set(self.tests) <= TESTS.keys()
        check(known, "tests", f"must be some of {', '.join(TESTS)}")
        check(set(self.tests) != {"return"}, "tests", "needs another test, whose perturbations return plays")
        for names, low, high in (
            ("num_states num_episodes", 2, 2**16),  # one has no standard error
            ("num_copies chunk_size", 1, 2**16),
            ("seed", 0, 2**31 - 1),
            ("num_env_threads", 0, 2**10),
        ):
            for name in names.split():
                check(low <= getattr(self, name) <= high, name, f"must be from {low} to {high}")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        check(known, "device", "must be auto, cpu, cuda or cuda:N")
        if self.device.startswith("cuda"):
            found, index = torch.cuda.device_count(), int(self.device[5:] or 0)
            needs = f"needs CUDA device {index}, and PyTorch finds {found}: auto or cpu would do"
            check(index < found, "device", needs)


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        convs = [nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2)]
        super().__init__(nn.ReLU(), convs[0], nn.ReLU(), convs[1])

    def forward(self, x):
        return x + super().forward(x)


class Agent(nn.Module):
    """The IMPALA-CNN (Espeholt et al. 2018) with a policy and a value head. obs: uint8 (B, 64, 64, 3), or
    float in [0, 255]. Gives logits (B, num_actions) and value (B,), in units of the normalised reward."""

    def __init__(self, num_actions: int = 15, channels: tuple[int, int, int] = (16, 32, 32)):
        super().__init__()
        layers = []
        for in_channels, out_channels in zip((3, *channels), channels):
            layers += [
                nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(out_channels),
                ResidualBlock(out_channels),
            ]
        layers += [nn.Flatten(), nn.ReLU(), nn.Linear(channels[-1] * 8 * 8, 256), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        for head, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(head.weight, gain)
            nn.init.zeros_(head.bias)

    def forward(self, obs):
        hidden = self.encoder(obs.permute(0, 3, 1, 2) / 255).float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


Game = namedtuple("Game", "env_id distribution_mode")
Checkpoint = namedtuple("Checkpoint", "path label game agent")
States = namedtuple("States", "obs records")  # uint8 (num, 64, 64, 3), and Procgen's saved state of each


def fail(message: str):
    """Ends the process over something that its user can mend: one line, the last one, and exit status 2."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def read_agent(path: Path, label: str) -> Checkpoint:
    """The agent of an agent.pt, on the CPU; the end of the process if the file is anything else."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
        script, args, weights = (content[key] for key in ("script", "args", "agent"))
        game, channels = Game(args["env_id"], args["distribution_mode"]), args["channels"]
        label = label or script.removesuffix("_procgen").upper()
        known = game.env_id in MODES.get(game.distribution_mode, ())
    except Exception as error:  # torch has many names for a file that is cut short, or no agent, or code
        reason = getattr(error, "strerror", None) or "it is damaged, or no agent.pt of a training script"
        fail(f"--checkpoints: cannot read {path}: {reason}")
    if not known:
        fail(f"--checkpoints: {path} is for {' '.join(map(str, game))}, which Procgen does not have")
    try:
        agent = Agent(channels=channels)
        agent.load_state_dict(weights)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        fail(f"--checkpoints: the weights in {path} do not fit its settings: {reason}")
    if not all(weight.isfinite().all() for weight in agent.parameters()):
        fail(f"--checkpoints: the weights in {path} are not all finite")
    return Checkpoint(str(path), label, game, agent.eval())


def read_agents(args: Args) -> dict[Game, list[Checkpoint]]:
    """All agents that --checkpoints names, each once, by game, in the order of the command line."""
    found = {}
    for given, label in zip(args.checkpoints, args.labels or [""] * len(args.checkpoints)):
        paths = sorted(Path(given).rglob("agent.pt")) if Path(given).is_dir() else [Path(given)]
        if not paths:
            fail(f"--checkpoints: there is no agent.pt in the folder {given}")
        for path in paths:
            found.setdefault(path.resolve(), (path, label))
    games = {}
    for checkpoint in [read_agent(*each) for each in found.values()]:
        games.setdefault(checkpoint.game, []).append(checkpoint)
    return games


def generator(args: Args, game: Game, *purpose: int) -> np.random.Generator:
    """numpy's, so that the draws are the same on every device and for every chunk size."""
    of_game = [ENV_NAMES.index(game.env_id), list(MODES).index(game.distribution_mode)]
    return np.random.default_rng([args.seed, *of_game, *purpose])


def make_test_envs(args: Args, game: Game, num: int, rng: np.random.Generator) -> ProcgenGym3Env:
    """Environments on the full distribution of levels."""
    options = {"distribution_mode": game.distribution_mode, "num_levels": 0, "start_level": 0}
    options["num_threads"] = args.num_env_threads or len(os.sched_getaffinity(0))
    return ProcgenGym3Env(num, game.env_id, rand_seed=int(rng.integers(2**31)), **options)


def progress_bar(game: Game, what: str, total: int, unit: str) -> tqdm:
    """In a terminal; elsewhere a line that says what begins."""
    if not sys.stderr.isatty():
        print(f"{game.env_id}: {what}", file=sys.stderr, flush=True)
    return tqdm(desc=f"{game.env_id}: {what}", total=total, unit=unit, disable=None)


def draw_kernels(rng: np.random.Generator, num: int):
    """Weights of num convolutions 3 -> 3, from a standard Gaussian: float32 (num, 3, 3, 3, 3)."""
    return torch.from_numpy(rng.standard_normal((num, 3, 3, 3, 3), dtype=np.float32))


def random_conv(obs, kernels):
    """Each of obs, uint8 (B, 64, 64, 3), under its own convolution, (B, 3, 3, 3, 3), of the image in [0, 1],
    clamped to [0, 1] (section 5.3). Returns float32 (B, 64, 64, 3) in [0, 255]."""
    images = (obs.permute(0, 3, 1, 2) / 255).reshape(1, -1, 64, 64)
    images = nn.functional.conv2d(images, kernels.flatten(0, 1), padding=1, groups=len(obs))
    return 255 * images.clamp(0, 1).view(-1, 3, 64, 64).permute(0, 2, 3, 1)


def draw_jitter(rng: np.random.Generator, num: int):
    """Factors of brightness, contrast and saturation, uniform in [0.6, 1.4], and turns of the hue, in
    [-0.5, 0.5], as Laskin et al. (2020) have it for Procgen: float32 (num, 4)."""
    return torch.from_numpy(rng.uniform((0.6, 0.6, 0.6, -0.5), (1.4, 1.4, 1.4, 0.5), (num, 4))).float()


def color_jitter(obs, jitter):
    """Changes obs, uint8 (B, 64, 64, 3), by jitter (B, 4) in its order (appendix E.4). The hue turns about
    the grey axis of RGB. Returns float32 (B, 64, 64, 3) in [0, 255]; (1, 1, 1, 0) changes not a bit."""
    luma = torch.tensor([[0.299], [0.587], [0.114]], device=obs.device)
    brightness, contrast, saturation, hue = jitter.T[:, :, None, None, None]
    images = (obs / 255 * brightness).clamp(0, 1)
    images = torch.lerp((images @ luma).mean((1, 2), keepdim=True), images, contrast).clamp(0, 1)
    images = torch.lerp(images @ luma, images, saturation).clamp(0, 1)
    cos, sin = (2 * math.pi * hue[:, 0]).cos(), (2 * math.pi * hue[:, 0]).sin()
    cross = images.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    turn = cos * torch.eye(3, device=obs.device) + sin * cross + (1 - cos) / 3  # Rodrigues' formula
    return 255 * (images.flatten(1, 2) @ turn.mT).view_as(images).clamp(0, 1)


PIXELS = {"random-conv": (draw_kernels, random_conv), "color-jitter": (draw_jitter, color_jitter)}


def rewrite(record: bytes, game: Game, name: str, shift: int) -> bytes:
    """Procgen's saved state, to be drawn otherwise and to go on just the same. `background` takes the one
    that is `shift` further in Procgen's list, cyclically. ValueError for a record of another layout."""

    def read(at: int) -> int:
        return struct.unpack_from("<i", record, at)[0]

    count, options = BACKGROUNDS[game.env_id], 8 + read(4)  # after the version and the game's name
    monochrome, use_backgrounds, at = options + 8, options + 16, options + 68
    for _ in range(2):
        at += 8 + read(at + 4)  # the random generators
    at += 64  # rewards, counters, the size of the grid
    index = at + 4 + 124 * read(at) + 4  # after the entities and a flag
    # An index out of range aborts inside Procgen.
    if (read(monochrome), read(use_backgrounds)) != (0, 1) or not 0 <= read(index) < count:
        raise ValueError("Procgen's saved state is not laid out as in procgen 0.10.7")
    new = {"background": (index, (read(index) + shift) % count), "no-background": (use_backgrounds, 0)}
    field, value = (new | {"monochrome": (monochrome, 1)})[name]
    return record[:field] + struct.pack("<i", value) + record[field + 4 :]


def draw_shifts(rng: np.random.Generator, game: Game, num: int, copies: int) -> np.ndarray:
    """`shift` of `rewrite` for each copy of num states, those of a state all different: (num, copies)."""
    others = np.arange(1, max(BACKGROUNDS[game.env_id], 2))  # one that is not used where there is no other
    return rng.permuted(np.tile(others, (num, 1)), axis=1)[:, :copies]


def copies_of(name: str, game: Game, num_copies: int) -> int:
    """How many of num_copies different copies of an observation there are."""
    most = {"background": BACKGROUNDS[game.env_id] - 1, "no-background": 1, "monochrome": 1}
    return min(num_copies, most.get(name, num_copies))


def perturbed_copies(name: str, game: Game, states: States, copies: int, args: Args, device):
    """Yields the copies of all states in chunks, state after state: uint8 or float32 (B, 64, 64, 3)."""
    rng = generator(args, game, 1, PERTURBATIONS.index(name))
    rows = np.repeat(np.arange(len(states.obs)), copies)
    chunks = np.array_split(rows, -(-len(rows) // args.chunk_size))
    if name in PIXELS:
        draw, perturb = PIXELS[name]
        for chunk in chunks:
            yield perturb(states.obs[chunk].to(device), draw(rng, len(chunk)).to(device))
    else:
        envs = make_test_envs(args, game, len(chunks[0]), rng)
        shifts = iter(draw_shifts(rng, game, len(states.obs), copies).flat)
        for chunk in chunks:
            records = [rewrite(states.records[i], game, name, next(shifts)) for i in chunk]
            envs.set_state(records + records[:1] * (envs.num - len(chunk)))
            yield torch.from_numpy(envs.observe()[1]["rgb"][: len(chunk)]).to(device)
        envs.close()


@torch.no_grad()
def policy_logits(agent: Agent, obs):
    """float64 (B, num_actions), so that the divergences add no rounding of their own."""
    return agent(obs)[0].double()


def sample_actions(agent: Agent, obs, noise: np.ndarray) -> np.ndarray:
    """Samples the policy at obs, (B, 64, 64, 3), by Gumbel noise (B, num_actions): int32 (B,)."""
    return (policy_logits(agent, obs).cpu().numpy() + noise).argmax(1).astype(np.int32)


def gather_states(game: Game, agents: list[Agent], args: Args, device) -> States:
    """What the agents meet on test levels: as many states from each, at random times of the first 512 steps
    (more for many states) of up to 64 environments."""
    per_agent = -(-args.num_states // len(agents))
    num = min(per_agent, 64)
    per_env = -(-per_agent // num)
    obs, records = [], []
    bar = progress_bar(game, "states", per_agent * len(agents), "state")
    for i, agent in enumerate(agents):
        rng = generator(args, game, 0, i)
        envs = make_test_envs(args, game, num, rng)
        steps = np.tile(np.arange(max(512, 64 * per_env)), (num, 1))
        times = rng.permuted(steps, axis=1)[:, :per_env]
        times.T[np.arange(times.size).reshape(per_env, num) >= per_agent] = -1  # one too many
        for step in range(times.max() + 1):
            pictures = envs.observe()[1]["rgb"]
            due = np.flatnonzero((times == step).any(1))
            if due.size:
                saved = envs.get_state()
                obs.append(pictures[due])
                records += [saved[k] for k in due]
                bar.update(due.size)
            envs.act(sample_actions(agent, torch.from_numpy(pictures).to(device), rng.gumbel(size=(num, 15))))
        envs.close()
    bar.close()
    return States(torch.from_numpy(np.concatenate(obs)), records)


def divergences(clean_logits, logits):
    """KL(clean || perturbed) in nats, total variation distance (definition 3.6), whether the greedy action
    changes, and the entropy of the clean policy: float64 (4, B), of logits (B, num_actions)."""
    clean_logprobs, logprobs = clean_logits.log_softmax(-1), logits.log_softmax(-1)
    clean_probs, probs = clean_logprobs.exp(), logprobs.exp()
    kl = (clean_probs * (clean_logprobs - logprobs)).sum(-1)
    changes = clean_logits.argmax(-1) != logits.argmax(-1)
    entropy = -(clean_probs * clean_logprobs).sum(-1)
    return torch.stack([kl, (clean_probs - probs).abs().sum(-1) / 2, changes.double(), entropy])


def compare(name: str, game: Game, agents: list[Agent], states: States, args: Args, device) -> np.ndarray:
    """The divergences of each agent on the same copies: (number of agents, 4, number of states, copies)."""
    copies, chunks = copies_of(name, game, args.num_copies), states.obs.split(args.chunk_size)
    clean = [torch.cat([policy_logits(agent, chunk.to(device)) for chunk in chunks]) for agent in agents]
    clean = torch.stack(clean).repeat_interleave(copies, 1)
    records, row = [], 0
    bar = progress_bar(game, name, clean.shape[1], "copy")
    for obs in perturbed_copies(name, game, states, copies, args, device):
        of_agents = zip(clean[:, row : row + len(obs)], agents)
        records.append(torch.stack([divergences(c, policy_logits(agent, obs)) for c, agent in of_agents]))
        row += len(obs)
        bar.update(len(obs))
    bar.close()
    return torch.cat(records, -1).unflatten(-1, (-1, copies)).cpu().numpy()


def play_returns(name: str, game: Game, agents: list[Agent], args: Args, device) -> np.ndarray:
    """Raw returns of whole episodes, each under one perturbation drawn for all its steps: the world looks
    different, it does not flicker. `clean` has none. The levels, and the noise that samples the actions, are
    the same for every agent and perturbation. float64 (number of agents, num_episodes)."""
    num, returns = args.num_episodes, np.zeros((len(agents), args.num_episodes))
    bar = progress_bar(game, f"return, {name}", returns.size, "episode")
    for agent, agent_returns in zip(agents, returns):
        rng = generator(args, game, 2)
        envs = make_test_envs(args, game, num, rng)
        perturb, parameters = lambda obs, _: obs, torch.zeros(num)
        if name != "clean":
            draws = generator(args, game, 3, PERTURBATIONS.index(name))
            if name in PIXELS:
                draw, perturb = PIXELS[name]
                parameters = draw(draws, num)
            else:
                drawn = zip(envs.get_state(), draw_shifts(draws, game, num, 1).flat)
                envs.set_state([rewrite(record, game, name, shift) for record, shift in drawn])
        under_way, actions = np.ones(num, bool), np.zeros(num, np.int32)
        obs = envs.observe()[1]["rgb"]
        while under_way.any():
            noise = rng.gumbel(size=(num, 15))
            rows = np.flatnonzero(under_way)
            for chunk in np.array_split(rows, -(-len(rows) // args.chunk_size)):
                seen = perturb(torch.from_numpy(obs[chunk]).to(device), parameters[chunk].to(device))
                actions[chunk] = sample_actions(agent, seen, noise[chunk])
            envs.act(actions)
            reward, obs, ended = envs.observe()
            obs = obs["rgb"]
            agent_returns += reward * under_way
            bar.update(np.sum(under_way & ended))
            under_way &= ~ended
        envs.close()
    bar.close()
    return returns


def summarize(records: np.ndarray) -> dict[str, float]:
    """Of (number of agents, number of states, copies): mean and standard deviation over everything, standard
    error over states, since the copies of one are not independent, and standard deviation between agents."""
    of_states, of_agents = records.mean((0, 2)), records.mean((1, 2))
    error = of_states.std(ddof=1) / len(of_states) ** 0.5
    spread = of_agents.std(ddof=1) if len(of_agents) > 1 else None
    return {"mean": records.mean(), "std": records.std(), "standard_error": error, "spread": spread}


def return_kept(clean: np.ndarray, perturbed: np.ndarray) -> dict[str, float]:
    """Mean returns, and the share that is kept with the standard error of a ratio of means over paired
    episodes, of (number of agents, number of episodes). No share of a clean return that is not positive."""
    kept = error = None
    if clean.mean() > 0:
        kept = perturbed.mean() / clean.mean()
        error = (perturbed - kept * clean).mean(0).std(ddof=1) / clean.shape[1] ** 0.5 / clean.mean()
    returns = {"return_clean": clean.mean(), "return_perturbed": perturbed.mean()}
    return returns | {"return_kept_mean": kept, "return_kept_standard_error": error}


def score(game: Game, checkpoints: list[Checkpoint], states: States, args: Args, device) -> list[dict]:
    """For each perturbation and label a row of numbers over its checkpoints, then one for each of them."""
    agents, groups = [checkpoint.agent for checkpoint in checkpoints], {}
    for i, checkpoint in enumerate(checkpoints):
        groups.setdefault(checkpoint.label, []).append(i)
    clean = play_returns("clean", game, agents, args, device) if "return" in args.tests else None
    rows = []
    for name in [name for test in TESTS if test in args.tests for name in TESTS[test]]:
        if not copies_of(name, game, args.num_copies):
            print(f"{game.env_id} has no other background")
            continue
        records = compare(name, game, agents, states, args, device)
        returns = play_returns(name, game, agents, args, device) if "return" in args.tests else None
        for label, members in groups.items():
            for some in [members, *([i] for i in members)]:
                path = "all" if some is members else checkpoints[some[0]].path
                row = {**game._asdict(), "perturbation": name, "label": label, "checkpoint": path}
                row |= {"agents": len(some), "states": records.shape[2], "copies": records.shape[3]}
                for i, measure in enumerate((*MEASURES, "entropy")):
                    row |= {f"{measure}_{key}": x for key, x in summarize(records[some, i]).items()}
                if returns is not None:
                    row |= {"episodes": args.num_episodes, **return_kept(clean[some], returns[some])}
                rows.append({key: x.item() if isinstance(x, np.generic) else x for key, x in row.items()})
    return rows


def markdown(rows: list[dict]) -> str:
    """The table for a paper: a line for each perturbation and label. ± is one standard error."""

    def cell(row: dict, measure: str, scale: int = 1, digits: int = 4) -> str:
        if row.get(f"{measure}_mean") is None:
            return "-"
        mean, error = scale * row[f"{measure}_mean"], scale * row[f"{measure}_standard_error"]
        return f"{mean:.{digits}f} ± {error:.{digits}f}"

    lines = [
        "| game | perturbation | policy | agents | entropy | KL | its std | between agents | total variation "
    ]
    lines[0] += "| greedy action changes, % | return | kept, % |"
    lines.append("| --- | --- | --- |" + " ---: |" * 9)
    for row in [row for row in rows if row["checkpoint"] == "all"]:
        cells = [f"{row['env_id']}, {row['distribution_mode']}", row["perturbation"], row["label"]]
        cells += [f"{row['agents']}", f"{row['entropy_mean']:.2f}", cell(row, "kl"), f"{row['kl_std']:.4f}"]
        cells += ["-" if row["kl_spread"] is None else f"{row['kl_spread']:.4f}", cell(row, "tv")]
        cells += [cell(row, "action_changes", 100, 1)]
        played = "return_clean" in row
        cells += [f"{row['return_clean']:.2f} → {row['return_perturbed']:.2f}" if played else "-"]
        lines.append(f"| {' | '.join([*cells, cell(row, 'return_kept', 100, 0)])} |")
    return "\n".join(lines) + "\n"


def draw_copies(names: list[str], game: Game, state: States, args: Args) -> Figure:
    """Perturbed copies of one observation (figures 14 and 15)."""
    first_row, grid = {"observation": state.obs[0]}, {}
    for name in names:
        copies = copies_of(name, game, SHOWN_COPIES)
        images = torch.cat([*perturbed_copies(name, game, state, copies, args, torch.device("cpu"))])
        (first_row if copies == 1 else grid)[name] = images[0] if copies == 1 else images
    grid = {"": first_row.values(), **grid}
    figure = Figure(figsize=(1.1 * SHOWN_COPIES + 1.5, 1.15 * len(grid) + 0.7), dpi=80, layout="constrained")
    axes = figure.subplots(len(grid), SHOWN_COPIES, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (name, images) in zip(axes, grid.items()):
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=12)
        for axis, image in zip(row, images):
            axis.imshow(image.round().byte())
    for axis, name in zip(axes[0], first_row):
        axis.set_title(name, fontsize=10)
    figure.suptitle(f"{game.env_id}, {game.distribution_mode}: one observation and its perturbed copies")
    return figure


@torch.no_grad()
def draw_tsne(name: str, game: Game, checkpoints: list[Checkpoint], state: States, args: Args, device):
    """t-SNE of what the encoders make of one observation and its copies, in one embedding (figure 4)."""
    copies = copies_of(name, game, TSNE_COPIES)
    images = [state.obs.to(device), *perturbed_copies(name, game, state, copies, args, device)]
    images = [each.permute(0, 3, 1, 2) / 255 for each in images]
    points = torch.cat([checkpoint.agent.encoder(each) for checkpoint in checkpoints for each in images])
    tsne = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="random", random_state=args.seed)
    embedding = tsne.fit_transform(points.cpu().numpy()).reshape(len(checkpoints), 1 + copies, 2)
    figure = Figure(figsize=(7.5, 5), dpi=100, layout="constrained")
    axis, labels = figure.subplots(), [checkpoint.label for checkpoint in checkpoints]
    for i, (label, (clean, *perturbed)) in enumerate(zip(labels, embedding)):
        number, color = labels[:i].count(label), f"C{list(dict.fromkeys(labels)).index(label) % 10}"
        style = {"c": color, "marker": "os^vDP<>Xp"[number % 10], "alpha": 0.6}
        legend = f"{label} {number + 1}" if labels.count(label) > 1 else label
        axis.scatter(*np.transpose(perturbed), s=22, label=legend, **style)
        axis.scatter(*clean, s=320, c=color, marker="*", edgecolors="black", zorder=3)
    axis.scatter([], [], s=200, c="white", marker="*", edgecolors="black", label="the observation itself")
    axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    axis.set_title(f"{game.env_id}, {game.distribution_mode}: encoder output, {copies} copies by {name}")
    figure.legend(loc="outside right upper")
    return figure


def draw_scores(rows: list[dict]) -> Figure:
    """Bars of the table of one game, with one standard error (the summary of figure 13)."""
    rows = [row for row in rows if row["checkpoint"] == "all"]
    panels = dict(MEASURES)
    if any(row.get("return_kept_mean") is not None for row in rows):
        panels["return_kept"] = "share of the clean return that is kept"
    names, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("perturbation", "label"))
    figure = Figure(figsize=(11, 7.5), dpi=100, layout="constrained")
    for axis, (measure, title) in zip(figure.subplots(2, 2).flat, panels.items()):
        for i, label in enumerate(labels):
            bars = [row for row in rows if row["label"] == label]
            heights, errors = (
                [row[f"{measure}_{key}"] or 0 for row in bars] for key in ("mean", "standard_error")
            )
            at = np.arange(len(names)) + (i - (len(labels) - 1) / 2) * 0.8 / len(labels)
            axis.bar(at, heights, 0.8 / len(labels), yerr=errors, capsize=3, label=label)
        axis.set_xticks(range(len(names)), names, rotation=15)
        axis.set_title(title)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels))
    game, number = f"{rows[0]['env_id']}, {rows[0]['distribution_mode']}", rows[0]["states"]
    figure.suptitle(f"{game}: mean over {number} states, ± one standard error")
    return figure


def make_unfinished(folder: Path, log_dir: str) -> tempfile.TemporaryDirectory:
    """The temporary folder, beside `folder`, that the results go to; the end of the process if there can be
    none, or no file in log_dir, before that costs any work."""
    flag = f"--log-dir {log_dir}"
    try:
        if log_dir:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=log_dir).close()
        flag = f"--output {folder}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        fail(f"{flag}: {error.strerror}")


def write_results(unfinished: Path, folder: Path, args: Args, rows: list[dict], table: str, figures: dict):
    """Writes the whole folder or nothing, by way of the folder `unfinished`. Returns its name, to which the
    time is appended if meanwhile there is a `folder`. figures: {name: Figure}."""
    try:
        results = unfinished / "results"
        results.mkdir()
        (results / "table.md").write_text(table)
        content = {"settings": asdict(args), "results": rows}
        (results / "results.json").write_text(json.dumps(content, indent=2))
        with (results / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        for name, figure in figures.items():
            figure.savefig(results / f"{name}.png")
        if os.path.lexists(folder):
            folder = folder.with_name(f"{folder.name}-{int(time.time())}")
        return results.replace(folder)
    except OSError as error:
        fail(f"--output {folder}: {error.strerror or error}")


def write_tensorboard(log_dir: str, rows: list[dict], folder: Path):
    """The numbers of the table and the pictures in folder."""
    with SummaryWriter(log_dir) as writer:
        for row in rows:
            tag = f"{row['env_id']}_{row['distribution_mode']}/{row['perturbation']}"
            for key in [key for key, value in row.items() if isinstance(value, float)]:
                writer.add_scalar(f"{tag}/{key}/{row['label']}/{row['checkpoint']}", row[key])
        for path in sorted(folder.glob("*.png")):
            writer.add_image(path.stem, imread(path)[..., :3], dataformats="HWC")


def read_command_line() -> Args:
    """tyro's box of errors becomes a line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(Args, prog=Path(__file__).name, description=__doc__)
    except SystemExit as stop:
        if not (stop.code and box.getvalue()):
            raise
        text = re.sub("╭.*╮|│|╰.*╯", " ", box.getvalue())
        message = re.sub(" *─+ *", "; ", " ".join(text.split())).removeprefix("Error parsing Args: ")
        fail(message.split("; For full helptext")[0])


def run_tests(args: Args, games: dict[Game, list[Checkpoint]]) -> tuple[list[dict], dict[str, Figure]]:
    """Game by game. Returns the rows of all, and the pictures by name."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # float32 throughout
    device = torch.device(args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
    rows, figures = [], {}
    for game, checkpoints in games.items():
        agents = [checkpoint.agent.to(device) for checkpoint in checkpoints]
        states = gather_states(game, agents, args, device)
        scores = score(game, checkpoints, states, args, device)
        rows += scores
        names = list(dict.fromkeys(row["perturbation"] for row in scores))
        i = max(range(len(states.obs)), key=lambda i: states.obs[i].float().std().item())  # none all dark
        shown, title = States(states.obs[i : i + 1], states.records[i : i + 1]), "_".join(game)
        figures[f"copies_{title}"] = draw_copies(names, game, shown, args)
        for name in [name for name in names if copies_of(name, game, TSNE_COPIES) > 1][:1]:
            figures[f"tsne_{title}"] = draw_tsne(name, game, checkpoints, shown, args, device)
        figures[f"scores_{title}"] = draw_scores(scores)
    return rows, figures


def main(args: Args):
    """Runs the tests, prints the table and writes the folder."""
    folder = Path(args.output or f"robustness/{int(time.time())}")
    if os.path.lexists(folder):
        fail(f"--output {folder} exists: name a folder that does not")
    games = read_agents(args)
    with make_unfinished(folder, args.log_dir) as unfinished:
        rows, figures = run_tests(args, games)
        table = markdown(rows)
        print(f"\n{table}")
        folder = write_results(Path(unfinished), folder, args, rows, table, figures)
    if args.log_dir:
        try:
            write_tensorboard(args.log_dir, rows, folder)
        except OSError as error:
            fail(f"--log-dir {args.log_dir}: {error.strerror}; the results are in {folder}")
    print(f"finished: {folder}")


if __name__ == "__main__":
    # The thread that writes for TensorBoard reports a full disk by a traceback, and then to the next flush.
    threading.excepthook = lambda why: isinstance(why.exc_value, OSError) or threading.__excepthook__(why)
    try:
        main(read_command_line())
    except OSError as error:
        fail(f"{error.filename or 'cannot go on'}: {error.strerror or error}")
    except KeyboardInterrupt:  # the unfinished folder is gone
        sys.exit(130)
