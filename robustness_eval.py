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

Measured are KL( pi(.|o) || pi(.|o') ), the total variation distance, how often the greedy action changes, how
far the encoder's output moves, and the share of the return that is kept. A policy whose encoder ignores its
input scores 0, 0, 0, 0 and 1.

    python robustness_eval.py --checkpoints runs/*ppo_procgen*/agent.pt runs/*mdpo_procgen*

The defaults suit a CPU. The paper's number of copies, on a GPU:

    python robustness_eval.py --checkpoints runs --num-states 1000 --num-copies 100 --chunk-size 1024
"""

import csv
import json
import math
import os
import re
import signal
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import tyro
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.mathtext import MathTextParser
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from sklearn.manifold import TSNE
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# The games of each distribution mode: any other pair aborts inside Procgen.
MODES = {
    "easy": ENV_NAMES,
    "hard": ENV_NAMES,
    "extreme": ["chaser", "dodgeball", "leaper", "starpilot"],
    "memory": ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"],
}

# The perturbations of each test. That of the return plays those of the other tests.
TESTS = {
    "random-conv": ["random-conv"],
    "color-jitter": ["color-jitter"],
    "rendering": ["background", "no-background", "monochrome"],
    "return": [],
}
PERTURBATIONS = [name for names in TESTS.values() for name in names]

# How many backgrounds Procgen's list for a game has.
BACKGROUNDS = {
    "bigfish": 7,
    "bossfight": 13,
    "caveflyer": 13,
    "chaser": 1,
    "climber": 62,
    "coinrun": 62,
    "dodgeball": 9,
    "fruitbot": 9,
    "heist": 9,
    "jumper": 62,
    "leaper": 9,
    "maze": 9,
    "miner": 62,
    "ninja": 62,
    "plunder": 4,
    "starpilot": 13,
}

# What is measured on a copy, by its name in the results, and the title of its bars.
MEASURES = {
    "kl": "KL(clean ‖ perturbed), nats",
    "tv": "total variation distance",
    "action_changes": "share of greedy actions that change",
    "encoding_shift": "encoding shift (1: as far as another state)",
}

# What `compare` gives, in this order.
COMPARED = ["kl", "tv", "action_changes", "entropy", "encoding_shift"]

NUM_ACTIONS = 15
SHOWN_COPIES = 9  # of one observation, in the picture of the copies
TSNE_COPIES = 100  # of one observation, in t-SNE
GATHERING_ENVS = 64  # at most, in which one agent meets states
GATHERING_STEPS = 512  # in which it meets them, or more for many states

# Settings of training that agents of one label need not share: of the seed, the machine and the tests.
MAY_DIFFER = {
    "exp_name",
    "seed",
    "num_eval_envs",
    "eval_interval",
    "final_eval_episodes",
    "checkpoint_interval",
    "resume",
    "device",
    "num_env_threads",
    "bf16",
    "compile",
    "cudagraphs",
    "torch_deterministic",
    "track",
    "wandb_project_name",
    "wandb_entity",
}

# What random numbers are for: each purpose has its own stream.
FOR_STATES = 0
FOR_COPIES = 1
FOR_EPISODES = 2
FOR_PERTURBED_EPISODES = 3
FOR_ESTIMATE = 4


class Range(NamedTuple):
    """Limits of a number on the command line, both included."""

    low: float
    high: float


CountOrZero = Annotated[int, Range(0, 2**31 - 1)]
Threads = Annotated[int, Range(0, 2**10)]
Number = Annotated[int, Range(1, 2**16)]
Sample = Annotated[int, Range(2, 2**16)]  # one has no standard error


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ()  # agent.pt files; a folder stands for all agent.pt in it
    labels: tuple[str, ...] = ()  # one for each of --checkpoints; else the algorithm, and its variant
    tests: tuple[str, ...] = tuple(TESTS)  # of random-conv, color-jitter, rendering, return
    num_states: Sample = 100  # observations of each game, as many from each checkpoint's play
    num_copies: Number = 10  # perturbed copies of each observation
    num_episodes: Sample = 32  # of the return test, without and with each perturbation
    seed: CountOrZero = 1  # of states, perturbations and episodes
    chunk_size: Number = 64  # observations in a forward pass, which bounds the memory; more suit a GPU
    output: str = ""  # folder to make, else robustness/{unix_time}
    log_dir: str = ""  # folder for TensorBoard to get numbers and pictures too
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: CUDA where there is one
    num_env_threads: Threads = 0  # Procgen's threads, 0 for one a core

    def __post_init__(self):
        check_ranges(self)
        if not self.checkpoints:
            raise ValueError("--checkpoints needs agent.pt files, or folders that hold some")
        if self.labels and len(self.labels) != len(self.checkpoints):
            number = len(self.checkpoints)
            raise ValueError(
                f"--labels needs one for each of the {number} --checkpoints, not {len(self.labels)}"
            )
        if "" in self.checkpoints:
            raise ValueError("--checkpoints has an empty name in it, as of a variable that is not set")
        for label in self.labels:
            check_label(label)
        if not self.tests or not set(self.tests) <= TESTS.keys():
            given = " ".join(self.tests) or "nothing"
            raise ValueError(f"--tests must be some of {', '.join(TESTS)}, not {given}")
        if set(self.tests) == {"return"}:
            raise ValueError("--tests return needs another test, whose perturbations it plays")
        find_device(self.device)


def check_ranges(args):
    """Raises ValueError for the first field of a dataclass that lies outside the Range in its annotation."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for limits in getattr(hint, "__metadata__", ()):
            if isinstance(limits, Range) and not limits.low <= value <= limits.high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be from {limits.low} to {limits.high}, not {value}")


def check_label(label: str):
    """Raises ValueError if no picture can show it."""
    if not label.isprintable():
        raise ValueError(f"--labels must be text that can be printed, not {label!a}")
    if is_math_text(label):
        try:
            MathTextParser("path").parse(label)
        except ValueError as error:
            reason = str(error).strip().splitlines()[-1]
            message = f"--labels: {label} is no formula: {reason}; \\$ is a dollar"
            raise ValueError(message) from error


def find_device(name: str) -> torch.device:
    """The device that --device names. ValueError if there is none."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    if name == "cpu":
        return torch.device("cpu")
    number = torch.cuda.device_count()
    if number > 0 and not torch.cuda.is_available():
        reason = f"PyTorch finds {number} GPUs and cannot use them, so the driver may be too old for it"
        raise ValueError(f"--device {name}: {reason}; cpu would do")
    if name == "auto" and number == 0:
        return torch.device("cpu")
    index = int(match[1] or 0)
    if index >= number:
        found = f"needs GPU {index}, and PyTorch finds {number}"
        raise ValueError(f"--device {name} {found}: auto or cpu would do")
    return torch.device("cuda", index)


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, x):
        return x + super().forward(x)


class Agent(nn.Module):
    """The IMPALA-CNN (Espeholt et al. 2018) with a policy and a value head.

    obs: uint8 (B, *obs_shape), or float in [0, 255]; obs_shape is height, width, colors. Gives logits
    (B, num_actions) and value (B,), both float32, the value in units of the normalised reward.
    """

    def __init__(
        self,
        num_actions: int = 15,
        channels: tuple[int, int, int] = (16, 32, 32),
        obs_shape: tuple[int, int, int] = (64, 64, 3),
    ):
        super().__init__()
        height, width, in_channels = obs_shape
        layers = []
        for out_channels in channels:
            layers += [
                nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(out_channels),
                ResidualBlock(out_channels),
            ]
            in_channels = out_channels
            height = math.ceil(height / 2)
            width = math.ceil(width / 2)
        layers += [nn.Flatten(), nn.ReLU()]
        layers += [nn.Linear(in_channels * height * width, 256), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)
        nn.init.zeros_(self.actor.bias)
        nn.init.zeros_(self.critic.bias)
        self.bf16 = False  # whether the encoder computes in bfloat16

    def forward(self, obs):
        images = obs.permute(0, 3, 1, 2) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.encoder(images)
        hidden = hidden.float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class Game(NamedTuple):
    env_id: str
    distribution_mode: str


class Checkpoint(NamedTuple):
    path: str
    label: str
    game: Game
    agent: Agent
    training: dict  # its settings, script and number of steps, and whether an encoder was given


class Setup(NamedTuple):
    """What all tests of one game are run with."""

    game: Game
    args: Args
    device: torch.device


class States(NamedTuple):
    """obs: uint8 (num, 64, 64, 3). saves: Procgen's saved state of each."""

    obs: torch.Tensor
    saves: list[bytes]


class Failure(Exception):
    """What the user can mend, a file or a disk: the shell gets it as one line, with exit status 2."""


def read_torch(path: Path, flag: str, keys: set[str]) -> dict:
    """What a training script wrote, a dict with these keys, on the CPU. Failure if it is anything else."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not keys <= content.keys():
            raise ValueError
        return content
    except Exception as error:  # torch has many names for a file that is cut short, or not ours, or code
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or "it is damaged, or another kind of file"
        raise Failure(f"{flag} cannot read {path}: {reason}") from error


def read_agent(path: Path, label: str, device) -> Checkpoint:
    """The agent of an agent.pt, on the device. Failure if the file is anything else. Without a label it gets
    default_label."""
    content = read_torch(path, "--checkpoints", {"script", "args", "agent"})
    try:
        settings = content["args"]
        game = Game(settings["env_id"], settings["distribution_mode"])
        channels = settings["channels"]
        known = game.env_id in MODES.get(game.distribution_mode, [])
        label = label or default_label(content["script"], settings.get("exp_name", ""))
    except (AttributeError, KeyError, TypeError) as error:
        raise Failure(f"--checkpoints cannot read {path}: it is no agent.pt of a training script") from error
    if not known:
        level = f"{game.env_id} {game.distribution_mode}"
        raise Failure(f"--checkpoints: {path} is for {level}, which Procgen does not have")
    try:
        agent = Agent(NUM_ACTIONS, channels)
        agent.load_state_dict(content["agent"])
    except Exception as error:  # whatever stands for the channels or the weights
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = lines[-1].strip() if lines else type(error).__name__
        raise Failure(f"--checkpoints: the weights in {path} do not fit its settings: {reason}") from error
    for weight in agent.parameters():
        if not weight.isfinite().all():
            raise Failure(f"--checkpoints: the weights in {path} are not all finite")
    white = torch.full((1, 64, 64, 3), 255.0)
    if not policy_logits(agent, white).isfinite().all():
        raise Failure(f"--checkpoints: the weights in {path} are too large to compute with")
    training = settings | {"script": content["script"], "global_step": content.get("global_step")}
    training["pretrained_encoder"] = bool(settings.get("pretrained_encoder"))
    return Checkpoint(str(path), label, game, agent.to(device), training)


def default_label(script: str, exp_name: str) -> str:
    """PPO; of ppo_procgen+wide, as benchmark/sweep.py names a variant, "PPO, wide"."""
    algorithm = script.removesuffix("_procgen").upper()
    before, _, variant = exp_name.partition("+")
    return f"{algorithm}, {variant}" if before == script and variant else algorithm


def find_agents(folder: Path) -> list[Path]:
    """All agent.pt in a folder and below it, sorted. Links to folders are followed; each folder is searched
    once, so that a circle of links has an end."""
    paths = []
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()  # go no deeper
            continue
        seen.add(real)
        if "agent.pt" in files:
            paths.append(Path(parent, "agent.pt"))
    return sorted(paths)


def read_agents(args: Args, device) -> dict[Game, list[Checkpoint]]:
    """All agents that --checkpoints names, each once, by game, in the order of the command line."""
    labels = args.labels or [""] * len(args.checkpoints)
    found = {}  # the path as given and the label, by the file that it leads to
    for given, label in zip(args.checkpoints, labels):
        paths = [Path(given)]
        if Path(given).is_dir():
            paths = find_agents(Path(given))
        if not paths:
            raise Failure(f"--checkpoints: there is no agent.pt in the folder {given}")
        for path in paths:
            _, label_before = found.setdefault(os.path.realpath(path), (path, label))
            if label_before != label:
                raise Failure(f"--labels: {path} is among the --checkpoints of {label_before} and of {label}")
    games = {}
    for path, label in found.values():
        checkpoint = read_agent(path, label, device)
        games.setdefault(checkpoint.game, []).append(checkpoint)
    return games


def what_differs(checkpoints: list[Checkpoint]) -> list[str]:
    """In words, in what the trainings of agents of one label differ."""
    by_label = {}
    for checkpoint in checkpoints:
        by_label.setdefault(checkpoint.label, []).append(checkpoint.training)
    game = checkpoints[0].game.env_id
    lines = []
    for label, trainings in by_label.items():
        names = {name: None for training in trainings for name in training}  # a set that keeps their order
        for name in names:
            values = {str(training.get(name, "unknown")): None for training in trainings}
            if len(values) > 1 and name not in MAY_DIFFER:
                different = " and ".join(values)
                lines.append(
                    f"{game}, {label}: agents differ in {name}, {different}; --labels can tell them apart"
                )
    return lines


def generator(setup: Setup, *purpose: int) -> np.random.Generator:
    """numpy's, so that the draws are the same on every device and for every chunk size."""
    env_index = ENV_NAMES.index(setup.game.env_id)
    mode_index = list(MODES).index(setup.game.distribution_mode)
    return np.random.default_rng([setup.args.seed, env_index, mode_index, *purpose])


def available_cores() -> int:
    """Cores that this process may use: of its affinity, or fewer by the quota of a container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no such file, or the quota is "max"
        return cores


def make_test_envs(setup: Setup, num: int, rng: np.random.Generator) -> ProcgenGym3Env:
    """Environments on the full distribution of levels."""
    return ProcgenGym3Env(
        num,
        setup.game.env_id,
        distribution_mode=setup.game.distribution_mode,
        num_levels=0,
        start_level=0,
        rand_seed=int(rng.integers(2**31)),
        num_threads=setup.args.num_env_threads or available_cores(),
    )


def in_chunks(indices: np.ndarray, chunk_size: int) -> list[np.ndarray]:
    """Parts of nearly one size, at most chunk_size."""
    return np.array_split(indices, math.ceil(len(indices) / chunk_size))


def progress_bar(game: Game, what: str, total: int, unit: str) -> tqdm:
    """In a terminal; elsewhere a line that says what begins."""
    description = f"{game.env_id}: {what}"
    if not sys.stderr.isatty():
        print(description, file=sys.stderr, flush=True)
    return tqdm(desc=description, total=total, unit=unit, disable=None)


# Perturbations of the pixels.


def draw_kernels(rng: np.random.Generator, num: int):
    """Weights of num convolutions 3 -> 3, from a standard Gaussian: float32 (num, 3, 3, 3, 3)."""
    kernels = rng.standard_normal((num, 3, 3, 3, 3), dtype=np.float32)
    return torch.from_numpy(kernels)


def random_conv(obs, kernels):
    """Each of obs, uint8 (B, 64, 64, 3), under its own convolution, (B, 3, 3, 3, 3), of the image in [0, 1],
    clamped to [0, 1] (section 5.3). Returns float32 (B, 64, 64, 3) in [0, 255]."""
    num = len(obs)
    images = obs.permute(0, 3, 1, 2) / 255
    # One grouped convolution: each image is a group of three channels.
    images = images.reshape(1, num * 3, 64, 64)
    weight = kernels.flatten(0, 1)
    images = nn.functional.conv2d(images, weight, padding=1, groups=num)
    images = images.view(num, 3, 64, 64).clamp(0, 1)
    return 255 * images.permute(0, 2, 3, 1)


def draw_jitter(rng: np.random.Generator, num: int):
    """Factors of brightness, contrast and saturation, uniform in [0.6, 1.4], and turns of the hue, in
    [-0.5, 0.5], as Laskin et al. (2020) have it for Procgen: float32 (num, 4)."""
    lowest = [0.6, 0.6, 0.6, -0.5]
    highest = [1.4, 1.4, 1.4, 0.5]
    return torch.from_numpy(rng.uniform(lowest, highest, (num, 4))).float()


LUMA = [0.299, 0.587, 0.114]  # of red, green and blue in grey


def color_jitter(obs, jitter):
    """Changes obs, uint8 (B, 64, 64, 3), by jitter (B, 4) in its order (appendix E.4). Contrast is about the
    mean grey of a picture, saturation about each pixel's grey, and the hue turns about the grey axis of RGB.
    Returns float32 (B, 64, 64, 3) in [0, 255]; (1, 1, 1, 0) changes nothing."""
    brightness, contrast, saturation, hue = jitter.T[:, :, None, None, None]
    luma = torch.tensor(LUMA, device=obs.device)[:, None]
    images = (obs / 255 * brightness).clamp(0, 1)
    mean_gray = (images @ luma).mean((1, 2), keepdim=True)
    images = torch.lerp(mean_gray, images, contrast).clamp(0, 1)
    gray = images @ luma
    images = torch.lerp(gray, images, saturation).clamp(0, 1)
    turned = images.flatten(1, 2) @ hue_rotation(hue[:, 0]).mT
    return 255 * turned.view_as(images).clamp(0, 1)


def hue_rotation(turns):
    """Rotations of RGB about its grey axis, a third of a turn from red to green: turns (B, 1, 1), in whole
    turns; returns (B, 3, 3), by Rodrigues' formula."""
    cos = (2 * math.pi * turns).cos()
    sin = (2 * math.pi * turns).sin()
    identity = torch.eye(3, device=turns.device)
    axis = torch.ones(3, device=turns.device) / math.sqrt(3)
    cross = torch.linalg.cross(identity, axis.expand(3, 3))  # cross @ v is axis x v
    return cos * identity + sin * cross + (1 - cos) / 3


class PixelPerturbation(NamedTuple):
    """draw(rng, num) gives the parameters of num copies, apply(obs, parameters) the copies."""

    draw: Callable
    apply: Callable


PIXELS = {
    "random-conv": PixelPerturbation(draw_kernels, random_conv),
    "color-jitter": PixelPerturbation(draw_jitter, color_jitter),
}


# Perturbations of the rendering.


def read_int(save: bytes, at: int) -> int:
    return struct.unpack_from("<i", save, at)[0]


def find_fields(save: bytes, game: Game) -> dict[str, int]:
    """Where in Procgen's saved state the numbers lie that say how it is drawn. ValueError for a save of
    another layout."""
    options = 4 + 4 + read_int(save, 4)  # after the version and the game's name
    at = options + 68
    for _ in range(2):  # random generators: a flag, the length of a text, the text
        at += 8 + read_int(save, at + 4)
    at += 64  # rewards, counters, the size of the grid
    at += 4 + 124 * read_int(save, at)  # the entities
    fields = {
        "monochrome": options + 8,
        "use_backgrounds": options + 16,
        "background": at + 4,  # after a flag
    }

    # An index out of range aborts inside Procgen.
    as_played = read_int(save, fields["monochrome"]) == 0 and read_int(save, fields["use_backgrounds"]) == 1
    if not as_played or not 0 <= read_int(save, fields["background"]) < BACKGROUNDS[game.env_id]:
        raise ValueError("Procgen's saved state is not laid out as in procgen 0.10.7")
    return fields


def replace_int(save: bytes, at: int, value: int) -> bytes:
    return save[:at] + struct.pack("<i", value) + save[at + 4 :]


def rewrite(save: bytes, game: Game, name: str, shift: int) -> bytes:
    """Procgen's saved state, to be drawn otherwise and to go on just the same. `background` takes the one
    that is `shift` further in Procgen's list, cyclically. ValueError for a save of another layout."""
    fields = find_fields(save, game)
    if name == "background":
        background = read_int(save, fields["background"]) + shift
        return replace_int(save, fields["background"], background % BACKGROUNDS[game.env_id])
    if name == "no-background":
        return replace_int(save, fields["use_backgrounds"], 0)
    return replace_int(save, fields["monochrome"], 1)


def draw_shifts(rng, game: Game, num: int, copies: int) -> np.ndarray:
    """`shift` of `rewrite` for each copy of num states, those of a state all different: (num, copies)."""
    others = np.arange(1, max(BACKGROUNDS[game.env_id], 2))  # one that is not used where there is no other
    orders = rng.permuted(np.tile(others, (num, 1)), axis=1)
    return orders[:, :copies]


def count_copies(name: str, game: Game, num_copies: int) -> int:
    """How many of num_copies different copies of an observation there are."""
    if name in PIXELS:
        return num_copies
    if name == "background":
        return min(num_copies, BACKGROUNDS[game.env_id] - 1)
    return 1


# Copies of the states.


def perturbed_copies(name: str, setup: Setup, states: States, copies: int):
    """Yields the copies of all states in chunks, state after state: uint8 or float32 (B, 64, 64, 3)."""
    rng = generator(setup, FOR_COPIES, PERTURBATIONS.index(name))
    indices = np.repeat(np.arange(len(states.obs)), copies)
    chunks = in_chunks(indices, setup.args.chunk_size)
    if name in PIXELS:
        draw, apply = PIXELS[name]
        for chunk in chunks:
            parameters = draw(rng, len(chunk)).to(setup.device)
            obs = states.obs[chunk].to(setup.device)
            yield apply(obs, parameters)
    else:
        for obs in rendered_copies(name, setup, states, copies, chunks, rng):
            yield torch.from_numpy(obs).to(setup.device)


def rendered_copies(name: str, setup: Setup, states: States, copies: int, chunks, rng):
    """Yields for each of the chunks, indices of states, the pictures that Procgen draws of them, as numpy."""
    envs = make_test_envs(setup, len(chunks[0]), rng)
    shifts = draw_shifts(rng, setup.game, len(states.obs), copies).flatten()
    done = 0
    for chunk in chunks:
        saves = []
        for i, shift in zip(chunk, shifts[done:]):
            saves.append(rewrite(states.saves[i], setup.game, name, shift))
        done += len(chunk)
        unused = envs.num - len(chunk)  # a later chunk may be smaller by one
        envs.set_state(saves + saves[:1] * unused)
        _, obs, _ = envs.observe()
        yield obs["rgb"][: len(chunk)]
    envs.close()


# Playing.


@torch.no_grad()
def policy_logits(agent: Agent, obs):
    """float64 (B, 15), so that the divergences add no rounding of their own."""
    logits, _ = agent(obs)
    return logits.double()


def sample_actions(agent: Agent, obs, noise: np.ndarray) -> np.ndarray:
    """Samples the policy at obs, (B, 64, 64, 3), by Gumbel noise (B, 15): int32 (B,)."""
    logits = policy_logits(agent, obs).cpu().numpy()
    return (logits + noise).argmax(axis=1).astype(np.int32)


class Gathering(NamedTuple):
    """How one agent meets its share of the states."""

    num: int  # environments
    per_env: int  # states in each, at different times
    steps: int  # in which they are met
    surplus: int  # environments that have one state less


def plan_gathering(num_states: int, num_agents: int) -> Gathering:
    per_agent = math.ceil(num_states / num_agents)
    num = min(per_agent, GATHERING_ENVS)
    per_env = math.ceil(per_agent / num)
    steps = max(GATHERING_STEPS, 64 * per_env)
    return Gathering(num, per_env, steps, num * per_env - per_agent)


def gather_states(setup: Setup, agents: list[Agent]) -> States:
    """What the agents meet on test levels: as many states from each, at random times of the first 512 steps
    (more for many states) of up to 64 environments."""
    plan = plan_gathering(setup.args.num_states, len(agents))
    obs = []
    saves = []
    total = len(agents) * (plan.num * plan.per_env - plan.surplus)
    with progress_bar(setup.game, "states", total, "state") as bar:
        for i, agent in enumerate(agents):
            rng = generator(setup, FOR_STATES, i)
            met = meet_states(setup, agent, plan, rng, bar)
            obs.append(met.obs)
            saves += met.saves
    return States(torch.cat(obs), saves)


def meet_states(setup: Setup, agent: Agent, plan: Gathering, rng, bar) -> States:
    """The states of one agent, in the order of time."""
    envs = make_test_envs(setup, plan.num, rng)
    steps = np.tile(np.arange(plan.steps), (plan.num, 1))
    times = rng.permuted(steps, axis=1)[:, : plan.per_env]
    times[plan.num - plan.surplus :, -1] = -1  # never
    last_times = times.max(axis=1)
    actions = np.zeros(plan.num, np.int32)
    obs = []
    saves = []
    for step in range(times.max() + 1):
        pictures = envs.observe()[1]["rgb"]
        due = np.flatnonzero((times == step).any(axis=1))
        if len(due) > 0:
            saved = envs.get_state()
            obs.append(pictures[due])
            saves += [saved[i] for i in due]
            bar.update(len(due))
        playing = np.flatnonzero(last_times > step)  # the others are of no more use
        if len(playing) > 0:
            noise = rng.gumbel(size=(plan.num, NUM_ACTIONS))
            seen = torch.from_numpy(pictures[playing]).to(setup.device)
            actions[playing] = sample_actions(agent, seen, noise[playing])
            envs.act(actions)
    envs.close()
    return States(torch.from_numpy(np.concatenate(obs)), saves)


def play_returns(name: str, setup: Setup, agents: list[Agent]) -> np.ndarray:
    """Raw returns of whole episodes, each under one perturbation drawn for all its steps: the world looks
    different, it does not flicker. `clean` has none. The levels, and the noise that samples the actions, are
    the same for every agent and perturbation. float64 (number of agents, num_episodes)."""
    num = setup.args.num_episodes
    returns = np.zeros((len(agents), num))
    with progress_bar(setup.game, f"return, {name}", returns.size, "episode") as bar:
        for i, agent in enumerate(agents):
            rng = generator(setup, FOR_EPISODES)
            envs = make_test_envs(setup, num, rng)
            view = None
            if name != "clean":
                draws = generator(setup, FOR_PERTURBED_EPISODES, PERTURBATIONS.index(name))
                if name in PIXELS:
                    draw, apply = PIXELS[name]
                    view = View(apply, draw(draws, num).to(setup.device))
                else:
                    draw_otherwise(name, setup.game, envs, draws)
            returns[i] = play_episodes(setup, agent, envs, view, rng, bar)
            envs.close()
    return returns


class View(NamedTuple):
    """What an agent sees of its environments: apply(obs, parameters), with parameters (num, ...) for them."""

    apply: Callable
    parameters: torch.Tensor


def draw_otherwise(name: str, game: Game, envs: ProcgenGym3Env, rng):
    """From now on Procgen draws these environments by another rendering. Of `background` that holds until the
    level ends."""
    shifts = draw_shifts(rng, game, envs.num, copies=1).flatten()
    saves = []
    for save, shift in zip(envs.get_state(), shifts):
        saves.append(rewrite(save, game, name, shift))
    envs.set_state(saves)


def play_episodes(setup: Setup, agent: Agent, envs, view: View | None, rng, bar) -> np.ndarray:
    """The return of the first episode of each environment. Without a view the agent sees the observations."""
    returns = np.zeros(envs.num)
    actions = np.zeros(envs.num, np.int32)
    under_way = np.ones(envs.num, bool)
    obs = envs.observe()[1]["rgb"]
    while under_way.any():
        noise = rng.gumbel(size=(envs.num, NUM_ACTIONS))
        for chunk in in_chunks(np.flatnonzero(under_way), setup.args.chunk_size):
            seen = torch.from_numpy(obs[chunk]).to(setup.device)
            if view is not None:
                seen = view.apply(seen, view.parameters[chunk])
            actions[chunk] = sample_actions(agent, seen, noise[chunk])
        envs.act(actions)
        rewards, infos, ended = envs.observe()
        obs = infos["rgb"]
        returns += rewards * under_way
        bar.update(np.count_nonzero(under_way & ended))
        under_way &= ~ended
    return returns


# Numbers.


def divergences(clean_logits, logits):
    """KL(clean || perturbed) in nats, total variation distance (definition 3.6), whether the greedy action
    changes, and the entropy of the clean policy: float64 (4, B), of logits (B, num_actions)."""
    clean_logprobs = clean_logits.log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    clean_probs = clean_logprobs.exp()
    probs = logprobs.exp()
    kl = (clean_probs * (clean_logprobs - logprobs)).sum(-1)
    tv = (clean_probs - probs).abs().sum(-1) / 2
    changes = clean_logits.argmax(-1) != logits.argmax(-1)
    entropy = -(clean_probs * clean_logprobs).sum(-1)
    return torch.stack([kl, tv, changes.double(), entropy])


class Clean(NamedTuple):
    """What an agent makes of the states themselves."""

    encodings: torch.Tensor  # float32 (number of states, 256)
    logits: torch.Tensor  # float64 (number of states, 15)
    distance: torch.Tensor  # between the encodings of two states: root mean square, float64 ()


@torch.no_grad()
def encode(agent: Agent, obs):
    """The encoder's output, float32 (B, 256), at obs, (B, 64, 64, 3)."""
    images = obs.permute(0, 3, 1, 2) / 255
    return agent.encoder(images)


@torch.no_grad()
def logits_at(agent: Agent, encodings):
    """Of the policy, float64 (B, 15), as policy_logits has them."""
    return agent.actor(encodings).double()


def look_at_states(setup: Setup, agent: Agent, states: States) -> Clean:
    chunks = states.obs.split(setup.args.chunk_size)
    encodings = torch.cat([encode(agent, obs.to(setup.device)) for obs in chunks])
    variance = encodings.double().var(dim=0).sum()
    distance = (2 * variance).sqrt()
    return Clean(encodings, logits_at(agent, encodings), distance)


def measure_copies(agent: Agent, clean: Clean, indices, obs):
    """The COMPARED at copies obs of the states with these indices: float64 (5, B)."""
    encodings = encode(agent, obs)
    logits = logits_at(agent, encodings)
    moved = (encodings - clean.encodings[indices]).double().norm(dim=-1)
    shift = moved / clean.distance.clamp_min(1e-12)  # 0, not nan, if all encodings are the same
    return torch.cat([divergences(clean.logits[indices], logits), shift[None]])


def compare(name: str, setup: Setup, agents: list[Agent], states: States) -> np.ndarray:
    """The COMPARED of each agent on the same copies: (number of agents, 5, number of states, copies)."""
    num_states = len(states.obs)
    copies = count_copies(name, setup.game, setup.args.num_copies)
    clean = [look_at_states(setup, agent, states) for agent in agents]
    chunks = []
    done = 0
    with progress_bar(setup.game, name, num_states * copies, "copy") as bar:
        for obs in perturbed_copies(name, setup, states, copies):
            indices = torch.arange(done, done + len(obs)) // copies
            of_agents = []
            for agent, of_states in zip(agents, clean):
                of_agents.append(measure_copies(agent, of_states, indices, obs))
            chunks.append(torch.stack(of_agents).cpu())
            done += len(obs)
            bar.update(len(obs))
    values = torch.cat(chunks, dim=-1).numpy()
    return values.reshape(len(agents), -1, num_states, copies)


def standard_error(samples: np.ndarray) -> float:
    """Of the mean of independent samples, (num,)."""
    return samples.std(ddof=1) / math.sqrt(len(samples))


def summarize(values: np.ndarray) -> dict[str, float]:
    """Of (number of agents, number of states, copies): mean and standard deviation over everything, standard
    error over states, since the copies of one are not independent, and standard deviation between agents."""
    of_states = values.mean(axis=(0, 2))
    of_agents = values.mean(axis=(1, 2))
    spread = None
    if len(of_agents) > 1:
        spread = of_agents.std(ddof=1)
    return {
        "mean": values.mean(),
        "std": values.std(),
        "standard_error": standard_error(of_states),
        "spread": spread,
    }


def return_kept(clean: np.ndarray, perturbed: np.ndarray) -> dict[str, float]:
    """Mean returns, and the share that is kept with the standard error of a ratio of means over paired
    episodes, of (number of agents, number of episodes). The agents play the same levels, so their mean of an
    episode is one sample. No share of a clean return that is not positive."""
    kept = None
    error = None
    if clean.mean() > 0:
        kept = perturbed.mean() / clean.mean()
        residuals = (perturbed - kept * clean).mean(axis=0)
        error = standard_error(residuals) / clean.mean()
    return {
        "return_clean": clean.mean(),
        "return_perturbed": perturbed.mean(),
        "return_kept_mean": kept,
        "return_kept_standard_error": error,
    }


def score(setup: Setup, checkpoints: list[Checkpoint], states: States) -> Iterator[dict]:
    """Yields for each perturbation and label a row of numbers over its checkpoints, then one for each of
    them."""
    game, args, _ = setup
    agents = [checkpoint.agent for checkpoint in checkpoints]
    groups = {}
    for i, checkpoint in enumerate(checkpoints):
        groups.setdefault(checkpoint.label, []).append(i)
    clean_returns = None
    returns = None
    if "return" in args.tests:
        clean_returns = play_returns("clean", setup, agents)
    for name in chosen_perturbations(game, args):
        values = compare(name, setup, agents, states)
        if "return" in args.tests:
            returns = play_returns(name, setup, agents)
        for label, members in groups.items():
            parts = [("all", members)]
            parts += [(checkpoints[i].path, [i]) for i in members]
            for path, some in parts:
                row = {"env_id": game.env_id, "distribution_mode": game.distribution_mode}
                row |= {"perturbation": name, "label": label, "checkpoint": path}
                row |= summarize_measures(values[some])
                if returns is not None:
                    row["episodes"] = args.num_episodes
                    row |= return_kept(clean_returns[some], returns[some])
                yield as_plain(row)


def chosen_perturbations(game: Game, args: Args) -> list[str]:
    """Those of --tests that the game has."""
    names = []
    for test in TESTS:
        if test in args.tests:
            names += TESTS[test]
    return [name for name in names if count_copies(name, game, args.num_copies) > 0]


def summarize_measures(values: np.ndarray) -> dict:
    """Of what `compare` gives for some agents: the summary of each of the COMPARED."""
    num_agents, _, num_states, copies = values.shape
    row = {"agents": num_agents, "states": num_states, "copies": copies}
    for i, measure in enumerate(COMPARED):
        for key, value in summarize(values[:, i]).items():
            row[f"{measure}_{key}"] = value
    return row


def as_plain(row: dict) -> dict:
    """Python's numbers for numpy's, as JSON needs them."""
    plain = {}
    for key, value in row.items():
        if isinstance(value, np.generic):
            value = value.item()
        plain[key] = value
    return plain


# How long it takes.


def estimate_seconds(setup: Setup, checkpoints: list[Checkpoint]) -> float:
    """About how long the tests of a game will take: forward passes counted, and a few of them timed. How long
    episodes will be nobody knows: they count as those of random play."""
    game, args, device = setup
    plan = plan_gathering(args.num_states, len(checkpoints))
    # The last of k random times of a period comes after k / (k + 1) of it, on average.
    played = plan.num * plan.steps * plan.per_env / (plan.per_env + 1)
    compared = 0
    names = chosen_perturbations(game, args)
    for name in names:
        copies = count_copies(name, game, args.num_copies)
        compared += args.num_states * (1 + copies)
    if "return" in args.tests:
        episodes = (1 + len(names)) * args.num_episodes
        played += episodes * random_episode_length(setup)
    seconds = 0.0
    for checkpoint in checkpoints:
        seconds += played * seconds_per_observation(checkpoint.agent, 16, device)
        seconds += compared * seconds_per_observation(checkpoint.agent, args.chunk_size, device)
    return seconds


def random_episode_length(setup: Setup) -> float:
    """Mean steps of an episode under random actions, about. A thousand steps end one in most games."""
    num = 4
    steps = 1000
    rng = generator(setup, FOR_ESTIMATE)
    envs = make_test_envs(setup, num, rng)
    ends = 0
    for _ in range(steps):
        envs.act(rng.integers(NUM_ACTIONS, size=num, dtype=np.int32))
        _, _, ended = envs.observe()
        ends += np.count_nonzero(ended)
    envs.close()
    return num * steps / max(ends, num)


def seconds_per_observation(agent: Agent, size: int, device) -> float:
    """Of forward passes of `size` observations."""
    obs = torch.zeros(size, 64, 64, 3, dtype=torch.uint8, device=device)
    policy_logits(agent, obs).cpu()  # the first pass is a slow one
    start = time.perf_counter()
    for _ in range(3):
        policy_logits(agent, obs).cpu()  # waits for the device
    return (time.perf_counter() - start) / 3 / size


def describe_duration(seconds: float) -> str:
    if seconds < 45:
        return "less than a minute"
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600)} hours"


# The table.

HEADINGS = [
    "game",
    "perturbation",
    "policy",
    "agents",
    "entropy",
    "KL",
    "its std",
    "between agents",
    "total variation",
    "greedy action changes, %",
    "encoding shift",
    "return",
    "kept, %",
]


def significant(value: float | None) -> str:
    """Three digits that count: 2.29, 0.127, 3.10e-06."""
    if value is None:
        return "-"
    return f"{value:#.3g}".rstrip(".")


def mean_and_error(mean: float | None, error: float | None) -> str:
    """The error to two digits that count, the mean to the same place: 45.0 ± 2.1, 3.10e-06 ± 2.0e-07."""
    if mean is None:
        return "-"
    if error == 0:
        return f"{significant(mean)} ± 0"
    place = math.floor(math.log10(error)) - 1  # of the error's second digit, as a power of ten
    if error >= 1e-5:
        decimals = max(0, -place)
        return f"{mean:.{decimals}f} ± {error:.{decimals}f}"
    first_place = math.floor(math.log10(abs(mean) or error))
    decimals = max(0, min(first_place - place, 5))
    return f"{mean:.{decimals}e} ± {error:.1e}"


def percent(share: float | None) -> float | None:
    if share is None:
        return None
    return 100 * share


def table_cells(row: dict) -> list[str]:
    label = row["label"].replace("|", r"\|")
    cells = [f"{row['env_id']}, {row['distribution_mode']}", row["perturbation"], label]
    cells.append(str(row["agents"]))
    cells.append(significant(row["entropy_mean"]))
    cells.append(mean_and_error(row["kl_mean"], row["kl_standard_error"]))
    cells.append(significant(row["kl_std"]))
    cells.append(significant(row["kl_spread"]))
    cells.append(mean_and_error(row["tv_mean"], row["tv_standard_error"]))
    changes = percent(row["action_changes_mean"])
    cells.append(mean_and_error(changes, percent(row["action_changes_standard_error"])))
    cells.append(mean_and_error(row["encoding_shift_mean"], row["encoding_shift_standard_error"]))
    if "return_clean" not in row:
        return [*cells, "-", "-"]
    cells.append(f"{significant(row['return_clean'])} → {significant(row['return_perturbed'])}")
    kept = percent(row["return_kept_mean"])
    cells.append(mean_and_error(kept, percent(row["return_kept_standard_error"])))
    return cells


def markdown(rows: list[dict]) -> str:
    """The table for a paper: a line for each perturbation and label. ± is one standard error."""
    lines = [HEADINGS, ["---"] * 3 + ["---:"] * 10]
    for row in rows:
        if row["checkpoint"] == "all":
            lines.append(table_cells(row))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# Pictures.


def draw_copies(names: list[str], setup: Setup, state: States) -> Figure:
    """Perturbed copies of one observation (figures 14 and 15). The first row has the observation and the
    renderings of which there is only one, then comes a row for each of the other perturbations."""
    game = setup.game
    on_cpu = setup._replace(device=torch.device("cpu"))
    first_row = {"observation": state.obs[0]}
    rows = {"": first_row}
    for name in names:
        copies = count_copies(name, game, SHOWN_COPIES)
        images = torch.cat(list(perturbed_copies(name, on_cpu, state, copies)))
        if copies == 1:
            first_row[name] = images[0]
        else:
            rows[name] = dict(enumerate(images))
    size = (1.1 * SHOWN_COPIES + 1.5, 1.15 * len(rows) + 0.7)
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    axes = figure.subplots(len(rows), SHOWN_COPIES, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row_axes, (name, images) in zip(axes, rows.items()):
        left = row_axes[0]
        place = {"transform": left.transAxes, "ha": "right", "va": "center"}
        left.text(-0.1, 0.5, name, fontsize=12, **place)
        for axis, image in zip(row_axes, images.values()):
            axis.imshow(image.round().byte().numpy())
    for axis, name in zip(axes[0], first_row):
        axis.set_title(name, fontsize=10)
    figure.suptitle(f"{game.env_id}, {game.distribution_mode}: one observation and its perturbed copies")
    return figure


def embed(name: str, setup: Setup, agents: list[Agent], state: States, copies: int) -> np.ndarray:
    """t-SNE of what the encoders make of one observation and its copies, in one embedding, the observation
    first: (number of agents, 1 + copies, 2)."""
    chunks = [state.obs.to(setup.device)]
    chunks += perturbed_copies(name, setup, state, copies)
    points = []
    for agent in agents:
        for obs in chunks:
            points.append(encode(agent, obs))
    points = torch.cat(points).cpu().numpy()
    perplexity = min(30, (len(points) - 1) / 3)  # what t-SNE allows for few points
    tsne = TSNE(perplexity=perplexity, init="random", random_state=setup.args.seed)
    embedding = tsne.fit_transform(points)
    return embedding.reshape(len(agents), 1 + copies, 2)


def in_legend(label: str) -> str:
    """Matplotlib leaves out what begins with _."""
    return f" {label}" if label.startswith("_") else label


def draw_tsne(name: str, setup: Setup, checkpoints: list[Checkpoint], state: States) -> Figure:
    """The embedding of one observation and its copies for each checkpoint (figure 4): a color for each label,
    a marker for each of its checkpoints."""
    game = setup.game
    copies = count_copies(name, game, TSNE_COPIES)
    agents = [checkpoint.agent for checkpoint in checkpoints]
    embedding = embed(name, setup, agents, state, copies)
    labels = [checkpoint.label for checkpoint in checkpoints]
    different_labels = list(dict.fromkeys(labels))
    figure = Figure(figsize=(7.5, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    star = {"marker": "*", "edgecolors": "black"}
    for i, label in enumerate(labels):
        number = labels[:i].count(label)
        color = f"C{different_labels.index(label) % 10}"
        marker = "os^vDP<>Xp"[number % 10]
        legend = label
        if labels.count(label) > 1:
            legend = f"{label} {number + 1}"
        x, y = embedding[i, 1:].T
        style = {"c": color, "marker": marker, "alpha": 0.6}
        axis.scatter(x, y, s=22, label=in_legend(legend), **style)
        x, y = embedding[i, 0]
        axis.scatter(x, y, s=320, c=color, zorder=3, **star)
    axis.scatter([], [], s=200, c="white", label="the observation itself", **star)
    axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    axis.set_title(f"{game.env_id}, {game.distribution_mode}: encoder output, {copies} copies by {name}")
    figure.legend(loc="outside right upper")
    return figure


def draw_scores(rows: list[dict]) -> Figure:
    """Bars of the table of one game (the summary of figure 13)."""
    rows = [row for row in rows if row["checkpoint"] == "all"]
    panels = dict(MEASURES)
    if any(row.get("return_kept_mean") is not None for row in rows):
        panels["return_kept"] = "share of the clean return that is kept"
    names = list(dict.fromkeys(row["perturbation"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure = Figure(figsize=(14, 7.5), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (measure, title) in zip(axes, panels.items()):
        draw_bars(axis, measure, names, labels, rows)
        axis.set_title(title)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    handles, legends = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, legends, loc="outside lower center", ncols=len(labels))
    game = f"{rows[0]['env_id']}, {rows[0]['distribution_mode']}"
    samples = f"{rows[0]['states']} states"
    if "return_kept" in panels:
        samples += f" or {rows[0]['episodes']} episodes"
    figure.suptitle(f"{game}: mean ± standard error over {samples}, not over seeds")
    return figure


def or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def draw_bars(axis, measure: str, names: list, labels: list, rows: list[dict]):
    """A group of bars for each perturbation, in it one for each label. No bar where there is no number."""
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        heights = []
        errors = []
        for row in rows:
            if row["label"] == label:
                heights.append(or_nan(row[f"{measure}_mean"]))
                errors.append(or_nan(row[f"{measure}_standard_error"]))
        offset = (i - (len(labels) - 1) / 2) * width
        x = np.arange(len(names)) + offset
        axis.bar(x, heights, width, yerr=errors, capsize=3, label=in_legend(label))
    axis.set_xticks(range(len(names)), names, rotation=15)


def draw_game(setup: Setup, checkpoints: list[Checkpoint], states: States, rows: list[dict]) -> dict:
    """The pictures of one game: {name: Figure}."""
    game = setup.game
    names = list(dict.fromkeys(row["perturbation"] for row in rows))
    state = most_varied(states)
    title = f"{game.env_id}_{game.distribution_mode}"
    figures = {f"copies_{title}": draw_copies(names, setup, state)}
    with_copies = [name for name in names if count_copies(name, game, TSNE_COPIES) > 1]
    if with_copies:
        figures[f"tsne_{title}"] = draw_tsne(with_copies[0], setup, checkpoints, state)
    figures[f"scores_{title}"] = draw_scores(rows)
    return figures


def most_varied(states: States) -> States:
    """The one whose picture varies most, so that none that is all dark is shown."""
    variation = states.obs.flatten(1).float().std(dim=1)
    i = variation.argmax().item()
    return States(states.obs[i : i + 1], [states.saves[i]])


# Files, and main.


def make_unfinished(folder: Path, log_dir: str) -> tempfile.TemporaryDirectory:
    """The temporary folder, beside `folder`, that the results go to. Failure if there can be none, or no file
    in log_dir, before that costs any work."""
    log_path = Path(log_dir).absolute()
    if folder.absolute() in [log_path, *log_path.parents]:
        raise Failure(f"--log-dir {log_dir} is in --output, which is made when all is done: name another")
    flag = f"--log-dir {log_dir}"
    try:
        if log_dir:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=log_dir).close()
        flag = f"--output {folder}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        raise Failure(f"{flag}: {error.strerror}") from error


def write_numbers(results: Path, folder: Path, args: Args, rows: list[dict]) -> Path:
    """Fills the folder `results` and moves it to `folder`, so that they are there as a whole or not at all.
    Returns where they are. Failure if that cannot be."""
    content = {"settings": asdict(args), "results": rows}
    any_name = {"encoding": "utf-8", "errors": "surrogateescape"}  # of files, be they UTF-8 or not
    try:
        results.mkdir()
        (results / "table.md").write_text(markdown(rows), **any_name)
        (results / "results.json").write_text(json.dumps(content, indent=2))
        with (results / "results.csv").open("w", newline="", **any_name) as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return publish(results, folder)
    except OSError as error:
        raise Failure(f"--output {folder}: {error.strerror or error}") from error


def write_pictures(folder: Path, unfinished: Path, figures: dict[str, Figure]):
    """Into the folder of the numbers, each as a whole or not at all: it is `unfinished` before. Failure if it
    cannot be."""
    try:
        for name, figure in figures.items():
            figure.savefig(unfinished)
            unfinished.replace(folder / f"{name}.png")
    except OSError as error:
        reason = error.strerror or error
        raise Failure(f"--output {folder} has the numbers, but not all pictures: {reason}") from error


def publish(results: Path, folder: Path) -> Path:
    """Moves the finished results to `folder`, or to a name with the time if meanwhile there is a `folder`."""
    if os.path.lexists(folder):
        folder = folder.with_name(f"{folder.name}-{int(time.time())}")
    return results.replace(folder)


def write_tensorboard(log_dir: str, rows: list[dict], table: str, folder: Path):
    """The table, its means and the pictures in folder. Failure if they cannot be written. Each label is a run
    of its own, so that one card compares them all."""
    try:
        with SummaryWriter(log_dir) as writer:
            writer.add_text("table", table)
            for path in sorted(folder.glob("*.png")):
                kind, game = path.stem.split("_", 1)
                image = imread(path)[..., :3]  # without its opacity
                writer.add_image(f"{game}/{kind}", image, dataformats="HWC")
        labels = list(dict.fromkeys(row["label"] for row in rows))
        names = [re.sub(r"\W", "_", label) for label in labels]
        for i, label in enumerate(labels):
            number = names[:i].count(names[i])  # of labels before that differ in other characters alone
            name = f"{names[i]}_{number + 1}" if number > 0 else names[i]
            with SummaryWriter(Path(log_dir, name)) as writer:
                for row in rows:
                    if row["label"] == label and row["checkpoint"] == "all":
                        add_means(writer, row)
    except OSError as error:
        message = f"--log-dir {log_dir}: {error.strerror}; the results are in {folder}"
        raise Failure(message) from error


def add_means(writer: SummaryWriter, row: dict):
    """A point for each mean that the row has."""
    game = f"{row['env_id']}_{row['distribution_mode']}"
    for measure in [*MEASURES, "return_kept"]:
        mean = row.get(f"{measure}_mean")
        if mean is not None:
            writer.add_scalar(f"{game}_{measure}/{row['perturbation']}", mean)


def main(args: Args):
    """Runs the tests and writes the folder: the numbers as a whole or not at all, then the pictures. What has
    been measured is printed, however it ends."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 throughout
    device = find_device(args.device)
    folder = Path(args.output or f"robustness/{int(time.time())}")
    if os.path.lexists(folder):
        raise Failure(f"--output {folder} exists: name a folder that does not")
    games = read_agents(args, device)
    rows = []
    scored = []
    written = None  # the folder that has the numbers
    with make_unfinished(folder, args.log_dir) as unfinished:
        announce(games, args, device)
        try:
            for game, checkpoints in games.items():
                setup = Setup(game, args, device)
                states = gather_states(setup, [checkpoint.agent for checkpoint in checkpoints])
                first = len(rows)
                for row in score(setup, checkpoints, states):
                    rows.append(row)
                scored.append((setup, checkpoints, states, rows[first:]))
            written = write_numbers(Path(unfinished, "results"), folder, args, rows)
            for of_game in scored:
                write_pictures(written, Path(unfinished, "picture.png"), draw_game(*of_game))
        finally:  # nothing costs what has been measured, and no closed pipe the files
            if rows:
                print(f"\n{markdown(rows)}")
            if written:
                print(f"numbers: {written}")
    if args.log_dir:
        write_tensorboard(args.log_dir, rows, markdown(rows), written)
    print(f"finished: {written}")


def announce(games: dict[Game, list[Checkpoint]], args: Args, device):
    """Says about how long it will take, what cannot be tested, and what agents of one label do not share."""
    seconds = 0.0
    notes = []
    for game, checkpoints in games.items():
        seconds += estimate_seconds(Setup(game, args, device), checkpoints)
        if "rendering" in args.tests and BACKGROUNDS[game.env_id] == 1:
            notes.append(f"{game.env_id} has no other background")
        notes += what_differs(checkpoints)
    duration = describe_duration(seconds)
    where = "this CPU" if device.type == "cpu" else "this GPU"
    guess = ""
    if "return" in args.tests:
        guess = ", if episodes are as long as in random play"
    print(f"{duration} on {where}{guess}", *notes, sep="\n", flush=True)


def end_by_signal(signal_number: int, frame):
    """Ends the process by an exception, so that whatever is open is closed and the unfinished folder goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal_number)


def pass_over_writer_errors(why):
    """For threading.excepthook. TensorBoard's writing thread keeps its error for the next flush, which raises
    it in the main thread: a traceback here would say the same twice."""
    if getattr(why.thread, "exception", None) is not why.exc_value:
        threading.__excepthook__(why)


def is_out_of_memory(error: Exception) -> bool:
    """By its class or, on a CPU and in CUDA itself, where PyTorch has none for it, by its text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ["DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory"]
    return any(text in str(error) for text in texts)


def evaluate_from_shell():
    """What is wrong with a file, a disk or the memory is one line, with exit status 2."""
    threading.excepthook = pass_over_writer_errors
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where the shell has closed it
            stream.reconfigure(errors="backslashreplace")  # what it has no letters for is no error
    signal.signal(signal.SIGINT, end_by_signal)
    signal.signal(signal.SIGTERM, end_by_signal)
    try:
        main(tyro.cli(Args, prog=Path(__file__).name, description=__doc__))
        return
    except Failure as failure:
        message = str(failure)
    except OSError as error:
        message = f"{error.filename or 'cannot go on'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = "smaller --chunk-size, --num-states, --num-copies or --num-episodes"
        message = f"out of memory: {smaller} would do"
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    evaluate_from_shell()
