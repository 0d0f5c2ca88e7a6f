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

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import tyro
from helpers import check_limits, fail, replacing
from joblib import Parallel, delayed
from tables import markdown
from tqdm import tqdm

from mdpo_procgen import Agent, mutual_kl, policy_loss

RED = (255, 0, 0)
CYAN = (0, 255, 255)
WHITE = (255, 255, 255)
YELLOW = (255, 255, 0)
LEFT = 0  # sides of the coin, and the actions that go there
RIGHT = 1

PICTURES = [  # background, and side of the coin
    (RED, RIGHT),  # in the first two the colour tells the side
    (CYAN, LEFT),
    (RED, LEFT),  # in the others it misleads
    (CYAN, RIGHT),
]
SIDES = torch.tensor([side for _, side in PICTURES])
PICTURES_OF_A = 2  # so many of them are in the data of A: the first ones
PICTURES_OF_B = 4

NUM_ENVS = 512  # of each policy, for a single step in each rollout
MINIBATCH_SIZE = 128
UPDATE_EPOCHS = 3
CHANNELS = (4, 8, 8)  # of the encoder


@dataclass(frozen=True)
class Settings:
    """Of a training: what the map varies. The defaults are the paper's."""

    distill_coef: float = 1.0  # weight of the distillation
    ent_coef: float = 0.01  # weight of the entropy bonus
    clip_coef: float = 0.2  # epsilon of the policy loss
    detach_peer: bool = False  # no gradient of the distillation reaches the policy that is copied
    head_start: int = 0  # iterations that B trains alone, before the two train together


ROWS = {  # of the map
    "alone": Settings(distill_coef=0.0),
    "distill_coef 0.1": Settings(distill_coef=0.1),
    "distill_coef 1 (the paper's)": Settings(),
    "distill_coef 10": Settings(distill_coef=10.0),
    "peer detached": Settings(detach_peer=True),
    "entropy coefficient 0.1": Settings(ent_coef=0.1),
    "no clipping of the ratio": Settings(clip_coef=1e9),
    "B 5 iterations ahead": Settings(head_start=5),
}


@dataclass
class Args:
    seeds: Annotated[int, (1, 1000)] = 3
    """trainings for each point of the map"""
    coin_sizes: Annotated[tuple[int, ...], (1, 24)] = (1, 3, 9)
    """the columns of the map: width and height of the coin in pixels"""
    iterations: Annotated[int, (1, 10_000)] = 20
    """rollouts of a training, each with 12 gradient steps"""
    figure: Path = Path("figures/toy_example")
    """where the figure goes, as .pdf and .png"""

    def __post_init__(self):
        check_limits(self)
        if not self.coin_sizes:
            raise ValueError("--coin-sizes must be one number or more")
        if not self.figure.name:
            raise ValueError(f"--figure must be a file's name, not {self.figure}")


def make_pictures(coin_size: int) -> torch.Tensor:
    """The four PICTURES, uint8 (4, 64, 64, 3): a white agent in the middle, a yellow coin 16 pixels away."""
    obs = np.empty((4, 64, 64, 3), np.uint8)
    for picture, (color, side) in zip(obs, PICTURES):
        picture[:] = color
        picture[28:36, 30:34] = WHITE
        center = 48 if side == RIGHT else 16
        top = 32 - coin_size // 2
        left = center - coin_size // 2
        picture[top : top + coin_size, left : left + coin_size] = YELLOW
    return torch.from_numpy(obs)


@torch.no_grad()
def act(agents: list[Agent], obs) -> torch.Tensor:
    """Log-probabilities of both actions at the four pictures, float32 (2, 4, 2): rows A, B."""
    logits = [agent(obs)[0] for agent in agents]
    return torch.stack(logits).log_softmax(-1)


def coin_probabilities(logprobs) -> torch.Tensor:
    """Of going to the coin, (2, 4), from logprobs (2, 4, 2)."""
    return logprobs[:, range(4), SIDES].exp()


class Batch(NamedTuple):
    """What one policy saw, did and got, all (B,)."""

    pictures: torch.Tensor  # their numbers in PICTURES, int64
    actions: torch.Tensor  # int64
    logprobs: torch.Tensor  # of these actions, float32
    rewards: torch.Tensor  # 0 or 1, float32

    def take(self, inds):
        return Batch(*[column[inds] for column in self])


def rollout(logprobs, num_pictures: int) -> Batch:
    """One step of a policy, logprobs (4, 2), in environments that show the first num_pictures of PICTURES."""
    pictures = torch.randint(num_pictures, (NUM_ENVS,))
    probabilities = logprobs[pictures].exp()
    actions = probabilities.multinomial(1).squeeze(-1)
    rewards = (actions == SIDES[pictures]).float()
    return Batch(pictures, actions, logprobs[pictures, actions], rewards)


def rl_loss(logits, mb: Batch, settings: Settings):
    """PPO's loss with its entropy bonus, a scalar. logits: what it now says of the pictures, (B, 2)."""
    logprobs = logits.log_softmax(-1)
    new_logprobs = logprobs.gather(-1, mb.actions[:, None]).squeeze(-1)
    ratio = (new_logprobs - mb.logprobs).exp()
    advantages = mb.rewards - mb.rewards.mean()
    advantages = advantages / (mb.rewards.std() + 1e-8)
    pg_loss = policy_loss(ratio, advantages, settings.clip_coef)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    return pg_loss - settings.ent_coef * entropy


def mutual_loss(logits, peer_logits, mb: Batch, settings: Settings):
    """rl_loss, and the distillation from the peer (equation 18), a scalar. Both logits are of the four
    pictures, (4, 2), of which a minibatch takes rows."""
    if settings.detach_peer:
        peer_logits = peer_logits.detach()
    logits = logits[mb.pictures]
    kl = mutual_kl(peer_logits[mb.pictures], logits)
    return rl_loss(logits, mb, settings) + settings.distill_coef * kl


def minibatch_loss(logits, mbs: list[Batch], settings: Settings, b_alone: bool):
    """Algorithm 1: the mean of both policies' losses, a scalar; while B is alone, its part of it.

    logits: what A and B now say of the four pictures, (4, 2) each.
    """
    logits_a, logits_b = logits
    mb_a, mb_b = mbs
    if b_alone:
        return rl_loss(logits_b[mb_b.pictures], mb_b, settings) / 2
    loss_a = mutual_loss(logits_a, logits_b, mb_a, settings)
    loss_b = mutual_loss(logits_b, logits_a, mb_b, settings)
    return (loss_a + loss_b) / 2


def update(agents: list[Agent], optimizer, obs, batches: list[Batch], settings: Settings, b_alone: bool):
    """The gradient steps of an iteration. Both policies draw their minibatches with the same index."""
    for _ in range(UPDATE_EPOCHS):
        for mb_inds in torch.randperm(NUM_ENVS).split(MINIBATCH_SIZE):
            mbs = [batch.take(mb_inds) for batch in batches]
            logits = [agent(obs)[0] for agent in agents]
            loss = minibatch_loss(logits, mbs, settings, b_alone)
            optimizer.zero_grad()
            loss.backward()
            for agent in agents:
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def train(seed: int, coin_size: int, settings: Settings, iterations: int) -> np.ndarray:
    """Trains A and B by algorithm 1. Returns the mean probability of going to the coin, float32 (2, 2): rows
    A, B; columns where the colour tells its side, where it misleads.

    Training ends early when all probabilities are above 0.99: no term of the loss undoes that.
    """
    torch.set_num_threads(1)  # these networks are too small for more
    torch.manual_seed(seed)
    obs = make_pictures(coin_size)
    agents = [Agent(num_actions=2, channels=CHANNELS) for _ in range(2)]
    parameters = nn.ModuleList(agents).parameters()
    optimizer = torch.optim.Adam(parameters, lr=5e-4, eps=1e-5, fused=True)
    for iteration in range(settings.head_start + iterations):
        logprobs = act(agents, obs)
        if coin_probabilities(logprobs).min() > 0.99:
            break
        batch_a = rollout(logprobs[0], PICTURES_OF_A)
        batch_b = rollout(logprobs[1], PICTURES_OF_B)
        b_alone = iteration < settings.head_start
        update(agents, optimizer, obs, [batch_a, batch_b], settings, b_alone)
    probabilities = coin_probabilities(act(agents, obs))
    where_it_tells, where_it_misleads = probabilities.split(2, dim=1)
    means = [where_it_tells.mean(1), where_it_misleads.mean(1)]
    return torch.stack(means, dim=1).numpy()


def make_map(args: Args) -> np.ndarray:
    """Trains at every point of the map. Returns what `train` does, (rows, columns, seeds, 2, 2)."""
    jobs = []
    for settings in ROWS.values():
        for coin_size in args.coin_sizes:
            for seed in range(args.seeds):
                job = delayed(train)(seed, coin_size, settings, args.iterations)
                jobs.append(job)
    pool = Parallel(n_jobs=-1, return_as="generator")  # a process for each core
    results = list(tqdm(pool(jobs), total=len(jobs), unit="training", disable=None))
    shape = (len(ROWS), len(args.coin_sizes), args.seeds)
    return np.reshape(results, (*shape, 2, 2))


def print_table(args: Args, results: np.ndarray):
    means = results.mean(2)  # over seeds
    rows = [["width of the coin in pixels", *map(str, args.coin_sizes)]]
    for name, row in zip(ROWS, means[..., 1]):
        cells = [f"{a:.2f} / {b:.2f}" for a, b in row]
        rows.append([name, *cells])
    print("Probability of the right action where the colour misleads, A / B,")
    print(f"mean of {args.seeds} seeds after {args.iterations} iterations:\n")
    print(markdown(rows))
    print(f"Where the colour tells the side: at least {means[..., 0].min():.2f} at every point.")


def draw(args: Args, results: np.ndarray):
    """The data of both policies, and below them the map, a panel for each policy."""
    plt.rcParams.update({"font.size": 9, "pdf.fonttype": 42})
    figure = plt.figure(figsize=(8, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    of_a, of_b = top.subfigures(1, 2, width_ratios=(PICTURES_OF_A, PICTURES_OF_B))
    pictures = make_pictures(max(args.coin_sizes)).numpy()
    draw_pictures(of_a, pictures[:PICTURES_OF_A], "data of A: red is right, cyan is left")
    draw_pictures(of_b, pictures[:PICTURES_OF_B], "data of B: in two of the four the colour misleads")
    draw_map(bottom, args.coin_sizes, results[..., 1].mean(2))
    for suffix in (".pdf", ".png"):
        path = args.figure.with_suffix(suffix)
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=150)
        print(f"wrote {path}")
    plt.close(figure)


def draw_pictures(figure, pictures: np.ndarray, title: str):
    figure.suptitle(title)
    axes = figure.subplots(1, len(pictures))
    for ax, picture in zip(axes, pictures):
        ax.imshow(picture, interpolation="nearest")
        ax.set(xticks=[], yticks=[])


def draw_map(figure, coin_sizes: tuple[int, ...], probabilities: np.ndarray):
    """probabilities: (rows, columns, 2), the last for A and B."""
    panels = figure.subplots(1, 2, sharey=True)
    for i, ax in enumerate(panels):
        values = probabilities[..., i]
        image = ax.imshow(values, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            color = "black" if 0.2 < value < 0.8 else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
        ax.set_xticks(range(len(coin_sizes)), coin_sizes)
        ax.set_yticks(range(len(ROWS)), ROWS)
        ax.set(xlabel="width of the coin (pixels)", title=f"policy {'AB'[i]}")
    label = "probability of the right action\nwhere the colour misleads"
    figure.colorbar(image, ax=panels, label=label, ticks=(0, 0.5, 1))


def main(args: Args):
    try:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--figure {args.figure}: {error.strerror}")
    results = make_map(args)
    print_table(args, results)
    draw(args, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
