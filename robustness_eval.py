# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "gym==0.23.1", "gym-notices==0.0.8", "matplotlib==3.10.9", "numpy==1.26.4", "scikit-learn==1.7.2",
#   "setuptools==84.2.1", "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
#   "procgen==0.10.7; python_version < '3.11'", "procgen-mirror==0.10.7; python_version >= '3.11'",
# ]
# ///
"""Is a policy robust to what does not matter? Section 5.3, appendix E.4 and definition 3.6 of the MDPO paper.

All agents of a game see the same observations o of test levels and the same perturbed copies o':

    random-conv    o' is o under its own random 3x3 convolution, Gaussian weights (table 1, figures 4 and 14)
    color-jitter   brightness, contrast, saturation and hue of o drawn at random (figures 13 and 15)
    rendering      o' draws the state of o otherwise: another background, none, monochrome (definition 3.6)
    return         whole episodes on the full distribution, played from o' instead of o

Measured are KL( pi(.|o) || pi(.|o') ), the total variation distance, how often the greedy action changes, how
far the encoder's output moves, and the share of the return that is kept. A policy that ignores its input
scores 0, 0, 0, 0 and 1. And how alike the encoders of each two agents are.

    python robustness_eval.py --checkpoints runs/*__ppo_procgen__* runs/*__mdpo_procgen__*

The paper's number of copies, on a GPU:

    python robustness_eval.py --checkpoints runs --num-states 1000 --num-copies 100
"""

import csv
import io
import itertools
import json
import math
import os
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import tyro
from matplotlib.figure import Figure
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from sklearn.manifold import TSNE
from tqdm import tqdm

from ppo_procgen import Agent

# The perturbations of each test. That of the return plays those of the other tests.
TESTS = {
    "random-conv": ["random-conv"],
    "color-jitter": ["color-jitter"],
    "rendering": ["background", "no-background", "monochrome"],
    "return": [],
}

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

# What is measured, by its name in the results, and what tables and pictures call it.
MEASURES = {
    "entropy": "entropy, nats",
    "kl": "KL(clean ‖ perturbed), nats",
    "tv": "total variation distance",
    "action_changes": "greedy actions that change",
    "encoding_shift": "encoding shift",
    "return_kept": "return that is kept",
}

# Of two agents: on the observations, and on a copy of each.
LIKENESS = {
    "cka": "CKA",
    "neighbours": "neighbours",
    "cka_copies": "CKA, copies",
    "neighbours_copies": "neighbours, copies",
}

NUM_ACTIONS = 15
SHOWN_COPIES = 9  # of one observation, in the picture of the copies
TSNE_COPIES = 100  # of one observation, in t-SNE
GATHERING_STEPS = 512  # in which states are met


@dataclass
class Args:
    checkpoints: tuple[Path, ...] = ()  # agent.pt files; a folder stands for all agent.pt in it
    labels: tuple[str, ...] = ()  # one for each of --checkpoints; else the algorithm, and its variant
    tests: tuple[Literal[tuple(TESTS)], ...] = tuple(TESTS)
    num_states: int = 100  # observations of each game, as many from each agent's play
    num_copies: int = 10  # perturbed copies of each observation
    num_episodes: int = 32  # of the return test, without and with each perturbation
    seed: int = 1  # of states, perturbations and episodes
    output: Path | None = None  # folder to make, else robustness/{unix_time}-{process}
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one

    def __post_init__(self):
        least = {"num_states": 2, "num_copies": 1, "num_episodes": 2, "seed": 0}
        for name, number in least.items():
            value = getattr(self, name)
            if value < number:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least {number}, not {value}")
        number = len(self.checkpoints)
        if number == 0:
            raise ValueError("--checkpoints needs agent.pt files, or folders that hold some")
        if self.labels and len(self.labels) != number:
            raise ValueError(f"--labels needs one for each of {number} --checkpoints, not {len(self.labels)}")
        if self.output and self.output.exists():
            raise ValueError(f"--output {self.output} exists: name a new folder")
        if set(self.tests) <= {"return"}:
            raise ValueError("--tests needs one beside return, which plays the perturbations of the others")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU that it can use; auto or cpu would do")


class Game(NamedTuple):
    env_id: str
    distribution_mode: str

    def __str__(self):
        return f"{self.env_id}, {self.distribution_mode}"


class Checkpoint(NamedTuple):
    """What an agent.pt holds. args: of the training script. global_step: environment steps that made the
    agent, None where the file does not say. label: of its row in tables."""

    path: Path
    script: str
    args: dict
    global_step: int | None
    agent: Agent
    label: str = ""


class Setup(NamedTuple):
    """What all tests of one game are run with."""

    game: Game
    args: Args
    device: torch.device


class States(NamedTuple):
    """obs: uint8 (num, 64, 64, 3). saves: Procgen's saved state of each."""

    obs: torch.Tensor
    saves: list[bytes]


def read_agent(path: Path) -> Checkpoint:
    """The agent of an agent.pt, on the CPU. ValueError, a line that names the file, if it is anything else or
    of another number of actions, or other pictures."""
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many names for a file that is cut short, or not ours, or code
        raise ValueError(f"cannot read {path}: it is damaged, or another kind of file") from error
    needed = {"script", "args", "agent"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise ValueError(f"{path} is no agent.pt, which a run has beside checkpoint.pt or in agent_1")
    args = content["args"]
    try:
        agent = Agent(NUM_ACTIONS, args["channels"])
        agent.load_state_dict(content["agent"])
    except Exception as error:  # whatever stands for the settings or the weights
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit: {reason}") from error
    weights = nn.utils.parameters_to_vector(agent.parameters())
    if not weights.isfinite().all():
        raise ValueError(f"the weights in {path} are not all finite")
    steps = content.get("global_step")
    return Checkpoint(path, content["script"], args, steps, agent)


def default_label(checkpoint: Checkpoint) -> str:
    """PPO; of ppo_procgen+wide, as benchmark/sweep.py names a variant, "PPO, wide"."""
    algorithm = checkpoint.script.removesuffix("_procgen").upper()
    before, _, variant = checkpoint.args.get("exp_name", "").partition("+")
    return f"{algorithm}, {variant}" if before == checkpoint.script and variant else algorithm


def training_of(path: Path) -> Path:
    """The same for all agents of one mutual run: its folder. Else the agent's own file."""
    folder = path.resolve().parent
    return folder.parent if folder.name.startswith("agent_") else path.resolve()


def read_checkpoints(args: Args, device) -> dict[Game, list[Checkpoint]]:
    """All agents that --checkpoints names, by game, in the order of the command line. One that is found twice
    under one label counts once. ValueError for a file that does not fit."""
    labels = args.labels or [""] * len(args.checkpoints)
    found = {}
    for given, label in zip(args.checkpoints, labels):
        paths = sorted(given.rglob("agent.pt")) if given.is_dir() else [given]
        if not paths:
            raise ValueError(f"there is no agent.pt in the folder {given}")
        for path in paths:
            found.setdefault((path.resolve(), label), path)
    games = {}
    for (_, label), path in found.items():
        checkpoint = read_agent(path)
        checkpoint.agent.to(device)
        game = Game(checkpoint.args["env_id"], checkpoint.args["distribution_mode"])
        if game.env_id not in ENV_NAMES:
            raise ValueError(f"{path} is for {game.env_id}, which is no game of Procgen")
        label = label or default_label(checkpoint)
        games.setdefault(game, []).append(checkpoint._replace(label=label))
    return games


def generator(setup: Setup, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose. numpy's, so that the draws are the same on every device."""
    text = f"{setup.game}, {purpose}"
    return np.random.default_rng([setup.args.seed, *text.encode()])


def make_test_envs(game: Game, num: int, rng) -> ProcgenGym3Env:
    """Environments on the full distribution of levels."""
    return ProcgenGym3Env(
        num,
        game.env_id,
        distribution_mode=game.distribution_mode,
        num_levels=0,
        start_level=0,
        rand_seed=int(rng.integers(2**31)),
        num_threads=len(os.sched_getaffinity(0)),
    )


# Perturbations of the pixels.


def draw_kernels(rng, num: int):
    """Weights of num convolutions 3 -> 3, from a standard Gaussian: float32 (num, 3, 3, 3, 3)."""
    kernels = rng.standard_normal((num, 3, 3, 3, 3))
    return torch.from_numpy(kernels).float()


def random_conv(obs, kernels):
    """Each of obs, uint8 (B, height, width, 3), under its own convolution, (B, 3, 3, 3, 3), of the image in
    [0, 1], clamped to [0, 1] (section 5.3). Returns float32 (B, height, width, 3) in [0, 255]."""
    images = obs.permute(0, 3, 1, 2) / 255
    # One grouped convolution: each image is a group of three channels.
    groups = images.flatten(0, 1)[None]
    weight = kernels.flatten(0, 1)
    groups = nn.functional.conv2d(groups, weight, padding=1, groups=len(obs))
    images = groups.view(images.shape).clamp(0, 1)
    return 255 * images.permute(0, 2, 3, 1)


def draw_jitter(rng, num: int):
    """Factors of brightness, contrast and saturation, uniform in [0.6, 1.4], and turns of the hue, in
    [-0.5, 0.5], as Laskin et al. (2020) have it for Procgen: float32 (num, 4)."""
    lowest = [0.6, 0.6, 0.6, -0.5]
    highest = [1.4, 1.4, 1.4, 0.5]
    jitter = rng.uniform(lowest, highest, (num, 4))
    return torch.from_numpy(jitter).float()


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
    turns; returns (B, 3, 3)."""
    gray = torch.ones(3, 3, device=turns.device)
    cross = torch.linalg.cross(torch.eye(3, device=turns.device), gray)
    angles = 2 * math.pi * turns
    return torch.matrix_exp(angles * cross / math.sqrt(3))


# Of each, draw(rng, num) gives the parameters of num copies, apply(obs, parameters) the copies. Another
# perturbation of the pixels goes here, and its name into TESTS.
PIXELS = {"random-conv": (draw_kernels, random_conv), "color-jitter": (draw_jitter, color_jitter)}


# Perturbations of the rendering.


def read_int(save: bytes, at: int) -> int:
    return struct.unpack_from("<i", save, at)[0]


def replace_int(save: bytes, at: int, value: int) -> bytes:
    changed = bytearray(save)
    struct.pack_into("<i", changed, at, value)
    return bytes(changed)


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
    monochrome, use_backgrounds, background = [read_int(save, at) for at in fields.values()]
    as_played = monochrome == 0 and use_backgrounds == 1
    if not as_played or not 0 <= background < BACKGROUNDS[game.env_id]:
        raise ValueError("Procgen's saved state is not laid out as in procgen 0.10.7")
    return fields


def rewrite(save: bytes, game: Game, name: str, copies: int, rng):
    """A list of saved states that Procgen draws otherwise and that go on just the same, of `background` all
    different. ValueError for a save of another layout."""
    fields = find_fields(save, game)
    if name == "no-background":
        return [replace_int(save, fields["use_backgrounds"], 0)]
    if name == "monochrome":
        return [replace_int(save, fields["monochrome"], 1)]
    at = fields["background"]
    others = list(range(BACKGROUNDS[game.env_id]))
    others.remove(read_int(save, at))
    chosen = rng.permutation(others)[:copies]
    return [replace_int(save, at, background) for background in chosen]


def count_copies(setup: Setup, most: int) -> dict[str, int]:
    """The perturbations of --tests, and how many different copies of an observation by each there are, at
    most `most`. None of which the game has no copy."""
    rendered = {
        "background": min(most, BACKGROUNDS[setup.game.env_id] - 1),
        "no-background": 1,
        "monochrome": 1,
    }
    numbers = {}
    for test, names in TESTS.items():
        for name in names:
            number = rendered.get(name, most)
            if test in setup.args.tests and number > 0:
                numbers[name] = number
    return numbers


def show_copies(name: str, setup: Setup, states: States, copies: int):
    """Yields for each state its observation and then its copies, uint8 or float32 (1 + copies, 64, 64, 3)."""
    rng = generator(setup, f"copies by {name}")
    if name in PIXELS:
        draw, apply = PIXELS[name]
        for obs in states.obs.to(setup.device):
            parameters = draw(rng, copies).to(setup.device)
            same = obs.expand(copies, 64, 64, 3)
            yield torch.cat([obs[None], apply(same, parameters)])
        return
    envs = make_test_envs(setup.game, 1 + copies, rng)
    for save in states.saves:
        rewritten = rewrite(save, setup.game, name, copies, rng)
        envs.set_state([save, *rewritten])
        _, obs, _ = envs.observe()
        yield torch.from_numpy(obs["rgb"]).to(setup.device)
    envs.close()


@torch.no_grad()
def look(agent: Agent, obs):
    """What an agent makes of obs, (B, 64, 64, 3) in [0, 255]: the encoder's output, float32 (B, 256), and the
    policy's logits, float64 (B, 15), so that the divergences add no rounding of their own."""
    encodings = agent.encoder(obs.permute(0, 3, 1, 2) / 255)
    return encodings, agent.actor(encodings).double()


def play(setup: Setup, agent: Agent, envs, active, view, rng):
    """Yields rewards, pictures and firsts of the environments after each step, as long as any is active. In
    those that are not, bool (num,), which the caller changes, the last action is repeated. The agent sees the
    pictures or, with a view (apply, parameters), copies by it, and its actions are samples."""
    actions = np.zeros(envs.num, np.int32)
    while True:
        rewards, obs, firsts = envs.observe()
        yield rewards, obs["rgb"], firsts
        if not active.any():
            return
        noise = rng.gumbel(size=(envs.num, NUM_ACTIONS))
        seen = torch.from_numpy(obs["rgb"][active]).to(setup.device)
        if view:
            apply, parameters = view
            seen = apply(seen, parameters[active])
        _, logits = look(agent, seen)
        noisy = logits.cpu().numpy() + noise[active]
        actions[active] = noisy.argmax(axis=1)
        envs.act(actions)


def gather_states(setup: Setup, agents: list[Agent]) -> States:
    """What the agents meet on test levels, as many states from each: one in each of its environments, at a
    random one of the first steps."""
    num = math.ceil(setup.args.num_states / len(agents))
    gathered = np.zeros((len(agents), num, 64, 64, 3), np.uint8)
    saves = []
    for i, agent in enumerate(tqdm(agents, "states", disable=None)):
        rng = generator(setup, f"states of agent {i}")
        envs = make_test_envs(setup.game, num, rng)
        times = rng.integers(GATHERING_STEPS, size=num)
        active = np.ones(num, bool)
        of_agent = [b""] * num
        steps = play(setup, agent, envs, active, None, rng)
        for step, (_, obs, _) in enumerate(steps):
            due = np.flatnonzero(times == step)
            if len(due) > 0:
                gathered[i, due] = obs[due]
                saved = envs.get_state()
                for j in due:
                    of_agent[j] = saved[j]
                active[due] = False
        envs.close()
        saves += of_agent
    obs = torch.from_numpy(gathered).flatten(0, 1)
    return States(obs, saves)


def play_returns(name: str, setup: Setup, agents: list[Agent]) -> np.ndarray:
    """Raw returns of whole episodes, each under one perturbation drawn for all its steps: the world looks
    different, it does not flicker. `clean` has none. The levels, and the noise that samples the actions, are
    the same for every agent and perturbation. float64 (number of agents, num_episodes)."""
    num = setup.args.num_episodes
    returns = np.zeros((len(agents), num))
    for i, agent in enumerate(tqdm(agents, f"return, {name}", disable=None)):
        rng = generator(setup, "episodes")
        envs = make_test_envs(setup.game, num, rng)
        view = None
        if name != "clean":
            draws = generator(setup, f"episodes by {name}")
            view = perturb_episodes(name, setup, envs, draws)
        active = np.ones(num, bool)
        steps = play(setup, agent, envs, active, view, rng)
        next(steps)  # what the episodes begin with
        for rewards, _, firsts in steps:
            returns[i] += rewards * active
            active &= ~firsts
        envs.close()
    return returns


def perturb_episodes(name: str, setup: Setup, envs, rng):
    """From now on Procgen draws the environments otherwise, of `background` until the level ends. Of the
    pixels returns the view to play them by."""
    if name in PIXELS:
        draw, apply = PIXELS[name]
        parameters = draw(rng, envs.num)
        return apply, parameters.to(setup.device)
    saves = []
    for save in envs.get_state():
        saves += rewrite(save, setup.game, name, 1, rng)
    envs.set_state(saves)
    return None


def divergences(clean_logits, logits) -> list[torch.Tensor]:
    """Of a clean policy, logits (num_actions,), and that of its copies, (B, num_actions): its entropy,
    KL(clean || perturbed) in nats, total variation distance (definition 3.6) and whether the greedy action
    changes, each float64 (B,)."""
    clean_logprobs = clean_logits.log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    clean_probs = clean_logprobs.exp()
    probs = logprobs.exp()
    entropy = -(clean_probs * clean_logprobs).sum()
    kl = (clean_probs * (clean_logprobs - logprobs)).sum(-1)
    tv = (clean_probs - probs).abs().sum(-1) / 2
    changes = logits.argmax(-1) != clean_logits.argmax()
    return [entropy.expand(len(logits)), kl, tv, changes.double()]


def linear_cka(x, y, debiased: bool = False) -> float:
    """How alike two encodings of the same N observations are, (N, D) and (N, E), float64: 1 if one is the
    other rotated and scaled (Kornblith et al. 2019). Of encodings that have nothing in common it is near 0
    for N far above D, and `debiased` for any N (the unbiased estimator of Song et al. 2012). NaN if one is
    constant."""

    def similarity(a, b):
        dot = (a.T @ b).norm() ** 2
        if debiased:
            n = len(a)
            of_a = a.square().sum(1)
            of_b = b.square().sum(1)
            dot = dot - n / (n - 2) * (of_a @ of_b) + of_a.sum() * of_b.sum() / ((n - 1) * (n - 2))
        return dot

    x = x - x.mean(0)
    y = y - y.mean(0)
    return (similarity(x, y) / (similarity(x, x) * similarity(y, y)).sqrt()).item()


def neighbour_agreement(x, y, k: int = 10) -> float:
    """The share of the k nearest neighbours, by cosine, that an observation has in both of two encodings,
    (N, D) and (N, E), float64, on average (Huh et al. 2024). By chance it is k / (N - 1). NaN if one is
    constant."""
    k = min(k, len(x) - 1)
    near = []
    for encodings in (x, y):
        if (encodings == encodings[0]).all():
            return math.nan
        directions = nn.functional.normalize(encodings)
        similarity = (directions @ directions.T).fill_diagonal_(-math.inf)
        nearest = similarity.topk(k).indices
        near.append(torch.zeros_like(similarity).scatter_(1, nearest, 1.0))
    return ((near[0] * near[1]).sum() / near[0].sum()).item()


def compare(name: str, copies: int, setup: Setup, agents: list[Agent], states: States):
    """The measures of each agent on the same copies: {name: (number of agents, number of states, copies)},
    and for each agent its encodings of each state and of the first copy, float64 (states, 2, 256)."""
    shown = show_copies(name, setup, states, copies)
    measured = [[] for _ in agents]
    kept = [[] for _ in agents]
    for seen in tqdm(shown, name, len(states.obs), disable=None):
        for i, agent in enumerate(agents):
            encodings, logits = look(agent, seen)
            moved = encodings[1:] - encodings[0]
            shift = moved.double().norm(dim=-1)
            of_state = [*divergences(logits[0], logits[1:]), shift]
            measured[i].append(torch.stack(of_state))
            kept[i].append(encodings[:2].double())
    values = []
    of_states = [torch.stack(encodings) for encodings in kept]
    for of_agent, encodings in zip(measured, of_states):
        of_measures = torch.stack(of_agent, dim=1)
        variances = encodings[:, 0].var(dim=0)
        distance = (2 * variances.sum()).sqrt()  # root mean square, between the encodings of two states
        of_measures[-1] /= distance.clamp_min(1e-12)  # 0, not nan, if all encodings are the same
        values.append(of_measures.cpu().numpy())
    names = ["entropy", "kl", "tv", "action_changes", "encoding_shift"]
    return dict(zip(names, np.stack(values, axis=1))), of_states


def compare_pairs(checkpoints: list[Checkpoint], encodings: list[torch.Tensor]) -> list[dict]:
    """Of the encodings that `compare` gives: a row for each two agents, then for each two trainings the mean
    over their agents, of which it names the first. Agents of one training are a pair, others never met."""
    rows = []
    for i, j in itertools.combinations(range(len(checkpoints)), 2):
        two = checkpoints[i], checkpoints[j]
        trainings = [training_of(checkpoint.path) for checkpoint in two]
        row = {
            "of": "agents",
            "labels": " and ".join(sorted({checkpoint.label for checkpoint in two})),
            "relation": "pair" if trainings[0] == trainings[1] else "never met",
            "first": str(two[0].path),
            "second": str(two[1].path),
            "trainings": frozenset(trainings),
        }
        for number, suffix in enumerate(["", "_copies"]):
            x, y = encodings[i][:, number], encodings[j][:, number]
            row[f"cka{suffix}"] = linear_cka(x, y, debiased=True)
            row[f"neighbours{suffix}"] = neighbour_agreement(x, y)
        rows.append(row)
    by_trainings = {}
    for row in rows:
        by_trainings.setdefault(row.pop("trainings"), []).append(row)
    for members in by_trainings.values():
        means = {name: np.mean([row[name] for row in members]) for name in LIKENESS}
        rows.append(members[0] | {"of": "trainings"} | means)
    return rows


def training_means(values: np.ndarray, trainings: list[Path]) -> np.ndarray:
    """Of (number of agents, ...) the mean over the agents of each training, (number of trainings, ...)."""
    means = []
    for training in dict.fromkeys(trainings):
        members = [each == training for each in trainings]
        means.append(values[members].mean(axis=0))
    return np.array(means)


def standard_error(samples: np.ndarray) -> float:
    """Of the mean of independent samples, (num,)."""
    return samples.std(ddof=1) / math.sqrt(len(samples))


def summarize(values: np.ndarray, trainings: list[Path]) -> dict:
    """Of (number of agents, number of states, copies): the mean, where each training counts once, the
    standard deviation over everything, the standard error over states, since the copies of one are not
    independent, and the standard deviation between trainings."""
    of_trainings = training_means(values, trainings)
    means = of_trainings.mean(axis=(1, 2))
    between_trainings = None
    if len(means) > 1:
        between_trainings = means.std(ddof=1)
    return {
        "mean": means.mean(),
        "std": values.std(),
        "standard_error": standard_error(of_trainings.mean(axis=(0, 2))),
        "between_trainings": between_trainings,
    }


def return_kept(clean: np.ndarray, perturbed: np.ndarray) -> dict:
    """Mean returns, and the share that is kept with the standard error of a ratio of means over paired
    episodes, of (number of trainings, number of episodes). They play the same levels, so their mean of an
    episode is one sample. No share of a clean return that is not positive."""
    row = {
        "return_clean": clean.mean(),
        "return_perturbed": perturbed.mean(),
        "return_kept_mean": None,
        "return_kept_standard_error": None,
    }
    if clean.mean() > 0:
        kept = perturbed.mean() / clean.mean()
        residuals = (perturbed - kept * clean).mean(axis=0)
        row["return_kept_mean"] = kept
        row["return_kept_standard_error"] = standard_error(residuals) / clean.mean()
    return row


def distinct(values: list) -> str:
    """Each once: "1, 2"."""
    return ", ".join(dict.fromkeys(map(str, values)))


def members_of(checkpoints: list[Checkpoint]) -> dict[str, list[int]]:
    """For each label the indices of its agents."""
    members = {}
    for i, checkpoint in enumerate(checkpoints):
        members.setdefault(checkpoint.label, []).append(i)
    return members


def score(setup: Setup, checkpoints: list[Checkpoint], states: States):
    """Yields for each perturbation its rows of numbers: for each label a row over its agents, then one for
    each of them. And those of compare_pairs."""
    agents = [checkpoint.agent for checkpoint in checkpoints]
    returns = {}
    if "return" in setup.args.tests:
        returns["clean"] = play_returns("clean", setup, agents)
    for name, copies in count_copies(setup, setup.args.num_copies).items():
        values, encodings = compare(name, copies, setup, agents, states)
        if returns:
            returns["perturbed"] = play_returns(name, setup, agents)
        rows = []
        for label, members in members_of(checkpoints).items():
            of_rows = {"all": members}
            of_rows |= {str(checkpoints[i].path): [i] for i in members}
            for checkpoint, indices in of_rows.items():
                row = {"perturbation": name, "label": label, "checkpoint": checkpoint}
                numbers = summarize_all(checkpoints, indices, values, returns)
                rows.append(setup.game._asdict() | row | numbers)
        key = setup.game._asdict() | {"perturbation": name}
        yield rows, [key | row for row in compare_pairs(checkpoints, encodings)]


def summarize_all(checkpoints: list[Checkpoint], members: list[int], values: dict, returns: dict) -> dict:
    """Of those of the checkpoints with these indices: whose numbers they are, and the numbers."""
    chosen = [checkpoints[i] for i in members]
    trainings = [training_of(checkpoint.path) for checkpoint in chosen]
    _, num_states, copies = values["kl"].shape
    row = {
        "trainings": len(set(trainings)),
        "agents": len(members),
        "seed": distinct([checkpoint.args.get("seed", "unknown") for checkpoint in chosen]),
        "global_step": distinct([checkpoint.global_step or "unknown" for checkpoint in chosen]),
        "states": num_states,
        "copies": copies,
    }
    for measure, of_agents in values.items():
        summary = summarize(of_agents[members], trainings)
        for key, value in summary.items():
            row[f"{measure}_{key}"] = value
    if returns:
        clean = training_means(returns["clean"][members], trainings)
        perturbed = training_means(returns["perturbed"][members], trainings)
        row["episodes"] = clean.shape[1]
        row |= return_kept(clean, perturbed)
    return row


def measures_of(row: dict) -> list[str]:
    """Without the return test there is no return."""
    return [measure for measure in MEASURES if f"{measure}_mean" in row]


def table_cells(row: dict) -> dict[str, str]:
    """The text of a row under each heading."""
    cells = {
        "game": str(Game(row["env_id"], row["distribution_mode"])),
        "perturbation": row["perturbation"],
        "policy": row["label"].replace("|", r"\|"),
        "trainings": str(row["trainings"]),
        "steps": row["global_step"],
    }
    for measure in measures_of(row):
        mean = row[f"{measure}_mean"]
        error = row[f"{measure}_standard_error"]
        cells[MEASURES[measure]] = "-" if mean is None else f"{mean:.3g} ± {error:.2g}"
    cells["std of KL"] = f"{row['kl_std']:.3g}"
    cells["KL between trainings"] = "-"
    if row["trainings"] > 1:
        cells["KL between trainings"] = f"{row['kl_between_trainings']:.3g}"
    return cells


def make_tables(rows: list[dict], pairs: list[dict]) -> str:
    """For a paper: a line for each perturbation and label, in which ± is one standard error, and a line for
    each perturbation and kind of pair, with the mean over pairs of trainings."""
    text = markdown([table_cells(row) for row in rows if row["checkpoint"] == "all"])
    kinds = {}
    for row in pairs:
        if row["of"] == "trainings":
            game = str(Game(row["env_id"], row["distribution_mode"]))
            kind = game, row["perturbation"], f"{row['labels']}, {row['relation']}".replace("|", r"\|")
            kinds.setdefault(kind, []).append(row)
    cells = []
    for kind, members in kinds.items():
        line = dict(zip(["game", "perturbation", "agents"], kind)) | {"pairs": str(len(members))}
        for name, title in LIKENESS.items():
            line[title] = f"{np.mean([row[name] for row in members]):.3f}"
        cells.append(line)
    return f"{text}\n{markdown(cells)}" if cells else text


def markdown(cells: list[dict[str, str]]) -> str:
    """Of the cells of each line by their headings."""
    headings = list(cells[0])
    rule = ["---"] * 3 + ["---:"] * (len(headings) - 3)
    lines = [headings, rule]
    lines += [each.values() for each in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Pictures.


def draw_copies(setup: Setup, state: States) -> Figure:
    """Perturbed copies of one observation, a row for each perturbation, in it the observation first (figures
    14 and 15)."""
    numbers = count_copies(setup, SHOWN_COPIES)
    rows = []
    for name, copies in numbers.items():
        (seen,) = show_copies(name, setup, state, copies)
        images = seen.round().byte().cpu().numpy()
        missing = SHOWN_COPIES - copies
        margins = [(0, missing), (2, 2), (2, 2), (0, 0)]
        framed = np.pad(images, margins, constant_values=255)
        rows.append(np.hstack(framed))
    height = 1.1 * len(rows) + 0.4
    figure = Figure(figsize=(12, height), dpi=80, layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.vstack(rows))
    middles = 68 * np.arange(len(rows)) + 34
    axis.set_yticks(middles, numbers, fontsize=12)
    axis.set(xticks=[], frame_on=False)
    axis.set_title(f"{setup.game}: one observation and its perturbed copies")
    return figure


def draw_tsne(name: str, copies: int, setup: Setup, checkpoints: list[Checkpoint], state: States):
    """t-SNE of what all encoders make of one observation and its copies, in one embedding (figure 4): a color
    for each label, a star for the observation."""
    (seen,) = show_copies(name, setup, state, copies)
    encodings = [look(checkpoint.agent, seen)[0] for checkpoint in checkpoints]
    encodings = torch.cat(encodings).cpu().numpy()
    perplexity = min(30, (len(encodings) - 1) / 3)  # what t-SNE allows for few points
    tsne = TSNE(perplexity=perplexity, init="random", random_state=setup.args.seed)
    embedding = tsne.fit_transform(encodings).reshape(len(checkpoints), 1 + copies, 2)
    figure = Figure(figsize=(7.5, 5), dpi=100, layout="constrained")
    axis = figure.subplots()
    for label, members in members_of(checkpoints).items():
        points = embedding[members]
        x, y = points[:, 1:].reshape(-1, 2).T
        (drawn,) = axis.plot(x, y, "o", alpha=0.5, label=label)
        color = drawn.get_color()
        x, y = points[:, 0].T
        axis.plot(x, y, "*", color=color, markersize=18, markeredgecolor="black")
    figure.legend(loc="outside right upper")
    axis.set_title(f"{setup.game}: encodings of one observation and {copies} copies", fontsize=10)
    axis.set(xlabel=f"t-SNE 1, {name}", ylabel="t-SNE 2", xticks=[], yticks=[])
    return figure


def draw_scores(game: Game, rows: list[dict]) -> Figure:
    """Bars of the table of one game (the summary of figure 13): in each group one for each label."""
    rows = [row for row in rows if row["checkpoint"] == "all"]
    names = list(dict.fromkeys(row["perturbation"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = 0.8 / len(labels)
    figure = Figure(figsize=(14, 7.5), dpi=100, layout="constrained")
    for number, measure in enumerate(measures_of(rows[0]), 1):
        axis = figure.add_subplot(2, 3, number)
        for i, label in enumerate(labels):
            of_label = [row for row in rows if row["label"] == label]
            heights = np.array([row[f"{measure}_mean"] for row in of_label], float)  # None becomes nan
            errors = np.array([row[f"{measure}_standard_error"] for row in of_label], float)
            offset = (i - (len(labels) - 1) / 2) * width
            x = np.arange(len(names)) + offset
            axis.bar(x, heights, width, yerr=errors, capsize=3, label=label)
        axis.set_xticks(range(len(names)), names, rotation=15)
        axis.set_title(MEASURES[measure])
    handles, _ = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(f"{game}: mean ± standard error over states or episodes, not over seeds")
    return figure


def draw_game(setup: Setup, checkpoints: list[Checkpoint], states: States, rows: list[dict]):
    """The pictures of one game, {name: Figure}, those of one observation of the one that varies most, so that
    it is not all dark."""
    variation = states.obs.flatten(1).float().std(dim=1)
    i = variation.argmax().item()
    state = States(states.obs[[i]], [states.saves[i]])
    game = "_".join(setup.game)
    figures = {f"copies_{game}": draw_copies(setup, state), f"scores_{game}": draw_scores(setup.game, rows)}
    for name, copies in count_copies(setup, TSNE_COPIES).items():
        if copies > 1:
            figures[f"tsne_{game}"] = draw_tsne(name, copies, setup, checkpoints, state)
            break
    return figures


def to_csv(rows: list[dict]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def write_results(folder: Path, args: Args, rows: list[dict], pairs: list[dict]):
    """What there is so far in three forms. Each file replaces the one before it when it is whole."""
    content = {"settings": asdict(args), "results": rows, "pairs": pairs}
    texts = {
        "results.csv": to_csv(rows),
        "results.json": json.dumps(content, indent=2, default=str),
        "table.md": make_tables(rows, pairs),
    }
    if pairs:
        texts["pairs.csv"] = to_csv(pairs)
    unfinished = folder / "unfinished"
    for name, text in texts.items():
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)


def main(args: Args):
    """Runs the tests and fills the folder: with the numbers after each perturbation, with the pictures at the
    end. What is wrong with --checkpoints or --output is one line, with exit status 2."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 throughout
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a label is a dollar
    device = torch.device("cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")
    folder = args.output or Path(f"robustness/{int(time.time())}-{os.getpid()}")
    flag = "--checkpoints"
    try:
        games = read_checkpoints(args, device)
        flag = "--output"
        folder.mkdir(parents=True)
    except (OSError, ValueError) as error:
        print(f"robustness_eval.py: error: {flag}: {error}", file=sys.stderr)
        sys.exit(2)
    rows = []
    pairs = []
    to_draw = []
    for game, checkpoints in games.items():
        for checkpoint in checkpoints:
            steps = checkpoint.global_step or "an unknown number of"
            print(f"{game}, {checkpoint.label}: {checkpoint.path}, {steps} steps")
        setup = Setup(game, args, device)
        states = gather_states(setup, [checkpoint.agent for checkpoint in checkpoints])
        of_game = []
        for new_rows, new_pairs in score(setup, checkpoints, states):
            of_game += new_rows
            pairs += new_pairs
            write_results(folder, args, rows + of_game, pairs)
            print(f"{game}, {new_rows[0]['perturbation']}: numbers in {folder}", flush=True)
        rows += of_game
        to_draw.append((setup, checkpoints, states, of_game))
    print(f"\n{make_tables(rows, pairs)}")
    for of_game in to_draw:
        for name, figure in draw_game(*of_game).items():
            figure.savefig(folder / f"{name}.png")
    print(f"finished: {folder}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
