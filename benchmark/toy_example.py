"""The toy example of section 4.1: does mutual distillation free a policy from a spurious feature?

A coin lies left or right of the agent, on a red or a cyan background; to go to the coin pays 1. The data of
policy A tie the side to the colour (red: right, cyan: left), those of policy B do not. Alone, A learns the
colour and fails where it misleads, and B learns the coin. Together, which copies which? This draws the data
of both (figure 1) and the map of who copies, and prints it as a table.

    python benchmark/toy_example.py

Networks, losses and hyper-parameters are those of mdpo_procgen.py, apart from small channels, 512 pictures a
rollout in 4 minibatches, the mean reward as the baseline, and what the map varies. All its points are after
the same number of iterations: what lies between 0 and 1 there is on its way, or differs between seeds.
"""

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import check_ranges, fail, parse_args, replacing

from mdpo_procgen import Agent, mutual_kl, policy_loss

COLORS = {"red": (255, 0, 0), "cyan": (0, 255, 255)}
# Background, and the side of the coin, which is also the action that goes there. A sees the first two alone.
PICTURES = [("red", 1), ("cyan", 0), ("red", 0), ("cyan", 1)]
SIDES = torch.tensor([side for _, side in PICTURES])

# The rows of the map, as what differs from the paper's coefficients.
ROWS = {
    "alone": {"distill_coef": 0.0},
    "distill_coef 0.1": {"distill_coef": 0.1},
    "distill_coef 1 (the paper's)": {},
    "distill_coef 10": {"distill_coef": 10.0},
    "peer detached": {"detach_peer": True},
    "entropy coefficient 0.1": {"ent_coef": 0.1},
    "no clipping of the ratio": {"clip_coef": 1e9},
    "B 5 iterations ahead": {"head_start": 5},
}


@dataclass
class Args:
    seeds: int = 3  # trainings for each point of the map
    coin_sizes: tuple[int, ...] = (1, 3, 9)  # the columns of the map: width and height of the coin in pixels
    iterations: int = 20  # rollouts of a training, each with 12 gradient steps
    channels: tuple[int, int, int] = (4, 8, 8)  # width of the encoder's three stages
    processes: int = 0  # trainings at a time, 0 for one a core
    figure: Path = Path("figures/toy_example")  # where the figure goes, as .pdf and .png

    def __post_init__(self):
        ranges = {"seeds": (1, 1000), "coin_sizes": (1, 24), "iterations": (1, 10_000), "channels": (1, 4096)}
        check_ranges(self, ranges | {"processes": (0, 1000)})
        if self.figure.name in ("", ".."):
            raise ValueError(f"--figure must end in a file's name, not be {self.figure}")
        if self.figure.suffix in (".pdf", ".png"):
            self.figure = self.figure.with_suffix("")


def make_pictures(coin_size: int) -> torch.Tensor:
    """The four PICTURES, uint8 (4, 64, 64, 3): a white agent in the middle, a yellow coin 16 pixels away."""
    obs = np.empty((4, 64, 64, 3), np.uint8)
    for picture, (color, side) in zip(obs, PICTURES):
        picture[:] = COLORS[color]
        picture[28:36, 30:34] = 255
        top, left = 32 - coin_size // 2, (16, 48)[side] - coin_size // 2
        picture[top : top + coin_size, left : left + coin_size] = (255, 255, 0)
    return torch.from_numpy(obs)


@torch.no_grad()
def act(agents: list[Agent], obs):
    """Log-probabilities of both actions at the four pictures, float32 (2, 4, 2), and the probability of the
    right one, (2, 4); rows A, B."""
    logprobs = torch.stack([agent(obs)[0].log_softmax(-1) for agent in agents])
    return logprobs, logprobs[:, range(4), SIDES].exp()


def rollout(logprobs, num_pictures: int):
    """One step in 512 environments that show the first num_pictures of PICTURES; logprobs (4, 2). Returns the
    pictures' numbers, actions, their log-probabilities and rewards, all (512,)."""
    pictures = torch.randint(num_pictures, (512,))
    actions = logprobs[pictures].exp().multinomial(1).squeeze(-1)
    return pictures, actions, logprobs[pictures, actions], (actions == SIDES[pictures]).float()


def train(
    seed: int,
    coin_size: int,
    distill_coef: float = 1.0,
    ent_coef: float = 0.01,
    clip_coef: float = 0.2,
    detach_peer: bool = False,
    head_start: int = 0,
    iterations: int = 20,
    channels: tuple[int, int, int] = (4, 8, 8),
) -> np.ndarray:
    """Trains A and B by algorithm 1, B alone for `head_start` iterations before. Returns the mean probability
    of the right action, float32 (2, 2): rows A, B; columns where the colour tells it, where it misleads.

    There are but four pictures, so the networks see each once and a minibatch takes rows of what they say.
    Training ends early when all is right with a probability above 0.99: no term of the loss undoes that.
    """
    torch.manual_seed(seed)
    obs = make_pictures(coin_size)
    agents = [Agent(num_actions=2, channels=channels) for _ in range(2)]
    optimizer = torch.optim.Adam(nn.ModuleList(agents).parameters(), lr=5e-4, eps=1e-5, fused=True)
    for iteration in range(head_start + iterations):
        learners = [0, 1] if iteration >= head_start else [1]
        policies, right = act(agents, obs)
        if right.min() > 0.99:
            break
        batches = [rollout(logprobs, num_pictures) for logprobs, num_pictures in zip(policies, (2, 4))]
        for _ in range(3):
            for mb_inds in torch.randperm(512).split(128):
                outputs = [agent(obs)[0] for agent in agents]
                loss = 0.0
                for i in learners:
                    pictures, actions, old_logprobs, rewards = (column[mb_inds] for column in batches[i])
                    logits, peer_logits = outputs[i][pictures], outputs[1 - i][pictures]
                    logprobs = logits.log_softmax(-1)
                    ratio = (logprobs.gather(-1, actions[:, None]).squeeze(-1) - old_logprobs).exp()
                    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
                    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
                    loss = loss + (policy_loss(ratio, advantages, clip_coef) - ent_coef * entropy) / 2
                    if len(learners) == 2:
                        kl = mutual_kl(peer_logits.detach() if detach_peer else peer_logits, logits)
                        loss = loss + distill_coef * kl / 2
                optimizer.zero_grad()
                loss.backward()
                for agent in agents:
                    nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    _, right = act(agents, obs)
    return torch.stack([right[:, :2].mean(1), right[:, 2:].mean(1)], dim=1).numpy()


def make_map(args: Args) -> np.ndarray:
    """Trains at every point of the map. Returns what `train` does, (rows, columns, seeds, 2, 2)."""
    jobs = [
        partial(train, seed, size, iterations=args.iterations, channels=args.channels, **changes)
        for changes in ROWS.values()
        for size in args.coin_sizes
        for seed in range(args.seeds)
    ]
    processes = args.processes or len(os.sched_getaffinity(0))
    context = get_context("fork")  # which imports nothing anew; no thread of torch's runs yet
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(job) for job in jobs]
        progress = tqdm(futures, unit="training", disable=not sys.stderr.isatty())
        results = [future.result() for future in progress]
    return np.reshape(results, (len(ROWS), len(args.coin_sizes), args.seeds, 2, 2))


def print_table(args: Args, results: np.ndarray):
    print("probability of the right action where the colour misleads, A / B,")
    print(f"mean of {args.seeds} seeds after {args.iterations} iterations")
    width = max(map(len, ROWS))
    print(f"{'width of the coin':<{width}}" + "".join(f"{f'{size} px':>14}" for size in args.coin_sizes))
    for name, row in zip(ROWS, results[..., 1].mean(2)):
        print(f"{name:<{width}}" + "".join(f"{f'{a:.2f} / {b:.2f}':>14}" for a, b in row))
    print(f"where the colour tells the side: at least {results[..., 0].mean(2).min():.2f} at every point")


def draw(args: Args, results: np.ndarray):
    """The data of both policies, and below them the map, a panel for each policy."""
    plt.rcParams.update({"font.size": 9, "pdf.fonttype": 42})
    figure = plt.figure(figsize=(8, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    obs = make_pictures(max(args.coin_sizes)).numpy()
    titles = "data of A: red is right, cyan is left", "data of B: in two of the four the colour misleads"
    for part, title, pictures in zip(top.subfigures(1, 2, width_ratios=(2, 4)), titles, (obs[:2], obs)):
        part.suptitle(title)
        for ax, picture in zip(part.subplots(1, len(pictures)), pictures):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    panels = bottom.subplots(1, 2, sharey=True)
    for i, ax in enumerate(panels):
        values = results[..., i, 1].mean(2)
        image = ax.imshow(values, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            color = "black" if 0.2 < value < 0.8 else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        ax.set_xticks(range(len(args.coin_sizes)), args.coin_sizes)
        ax.set_yticks(range(len(ROWS)), ROWS)
        ax.set(xlabel="width of the coin (pixels)", title=f"policy {'AB'[i]}")
    label = "probability of the right action\nwhere the colour misleads"
    bottom.colorbar(image, ax=panels, label=label, ticks=(0, 0.5, 1))
    for suffix in (".pdf", ".png"):
        path = args.figure.with_name(args.figure.name + suffix)
        with replacing("--figure", path) as unfinished:
            figure.savefig(unfinished, dpi=150)
        print(f"wrote {path}")
    plt.close(figure)


def main(args: Args):
    try:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.figure.parent).close()  # that it can be written costs no training
        results = make_map(args)
        print_table(args, results)
        draw(args, results)
    except OSError as error:
        fail(f"--figure {args.figure}: {error.strerror}")


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
