"""Do representations converge? Encoders of agents that learned together, that never met, and of PPO.

In each of several worlds (the MDP of theory.py, with 64 renderings of its own) each method is trained twice
on the first n renderings. Two encoders see the same states, under the training renderings or under the
others, and are compared by linear CKA and by how many nearest neighbours they agree on (robustness_eval.py).
The agents of one training of MDPO are a pair; those of its two trainings have never met; those of PPO's two
trainings are the baseline. What an agent reaches on each rendering is exact, as in theory.py.

Each method, n and world is a file in the output folder; those that are there are not made again. Then it
prints tables and draws a figure of all that are there. Methods are compared within each world; intervals are
over worlds.

    python benchmark/convergence.py --methods ppo mdpo --seeds 10
"""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import theory
import torch
import tyro
from helpers import Count, CountOrZero, check_limits
from renderings import (
    World,
    bound_gap,
    optimal_values,
    pair_distances,
    policies_of,
    state_values,
    visitations,
)
from tables import correlation_interval, markdown, mean_interval, star_holm

from robustness_eval import draw_kernels, linear_cka, neighbour_agreement, random_conv

TRAININGS = 2  # of each method in each world
CONVOLUTIONS = 4  # of each training rendering
ROWS = 960  # pictures on which neighbours are looked for, as many as 4 training renderings have

RETURNS = {  # of an agent, and what tables call them
    "eta": "eta / optimum",
    "zeta": "zeta / optimum",
    "gap": "gap / optimum",
    "mean_robustness": "mean R",
    "entropy": "entropy (nats)",
}
LIKENESS = {  # of two agents
    "cka_train": "CKA, training",
    "cka_unseen": "CKA, unseen",
    "neighbours_train": "neighbours, training",
    "neighbours_unseen": "neighbours, unseen",
}
RANKS = {"rank_train": "effective rank, training", "rank_unseen": "effective rank, unseen"}
ROBUSTNESS = {
    "half_robustness": "R from training to one half of the unseen renderings",
    "conv_robustness": "R from training pictures to random convolutions of them",
}
PAIR = "pair"
NEVER_MET = "never met"

# What is compared. The first is the primary contrast, by zeta and over the mean of n = 4, 8 and 16.
METHOD_CONTRASTS = [("MDPO", "PPO"), ("MDPO", "PPO, data of two agents")]
PAIR_CONTRASTS = [
    (f"MDPO: {PAIR}", f"PPO: {NEVER_MET}"),
    (f"MDPO: {NEVER_MET}", f"PPO: {NEVER_MET}"),
    (f"MDPO: {PAIR}", f"MDPO: {NEVER_MET}"),
]


@dataclass
class Args:
    methods: tuple[theory.MethodName, ...] = ("ppo", "mdpo")
    """which ways to train"""
    num_train: Annotated[tuple[int, ...], (1, theory.DESIGN["num_renderings"] - 2)] = (4, 8, 16)
    """numbers of renderings to train on"""
    seeds: Count = 10
    """worlds, in each of which each method is trained twice"""
    total_timesteps: Annotated[int, (theory.BATCH_SIZE, 2**31 - 1)] = 250_000
    """environment steps of each agent"""
    processes: CountOrZero = 0
    """trainings at a time, 0 for one a core"""
    output: Path = Path("convergence")
    """folder for the results, the tables and the figure"""

    def __post_init__(self):
        check_limits(self)
        if not self.methods or not self.num_train:
            raise ValueError("--methods and --num-train need a value or more")


def train(job: theory.Job, design: dict) -> dict:
    """The trainings of a method in the world job.seed. Returns what json can write: the job, the design, a
    row for each agent and one for each two agents, at each measured update."""
    world = World(design["grid_size"], design["gamma"], design["num_renderings"], job.seed)
    num_updates = design["total_timesteps"] // theory.BATCH_SIZE
    measured = [0, *theory.measured_iterations(num_updates, design["measurements"])]
    seeds = range(TRAININGS * (job.seed - 1) + 1, TRAININGS * job.seed + 1)
    trainings = [train_once(job._replace(seed=seed), design, world, measured) for seed in seeds]
    result = {"job": job._asdict(), "design": design, "agents": [], "pairs": []}
    for iteration in measured:
        agents = {}  # by training and number
        for training, copies in enumerate(trainings):
            for number, agent in enumerate(copies[iteration]):
                agents[training, number] = agent
        for row in measure_agents(world, job.num_train, agents.values()):
            result["agents"].append({"iteration": iteration} | row)
        for row in measure_pairs(world, job.num_train, agents):
            result["pairs"].append({"iteration": iteration} | row)
    return result


def train_once(job: theory.Job, design: dict, world: World, measured: list[int]) -> dict[int, list]:
    """Copies of the agents after the measured updates."""
    copies = {}

    def watch(iteration: int, agents: list, metrics: list):
        if iteration in measured:
            copies[iteration] = copy.deepcopy(agents)

    theory.run_script(job, design, world, watch)
    return copies


def measure_agents(world: World, num_train: int, agents) -> list[dict]:
    """Of each agent: returns in parts of the optimum, entropy, robustness, and the effective rank of its
    encodings. `half_gap` and `half_robustness` are of different halves of the unseen renderings, and
    `conv_robustness` of random convolutions of the training pictures, so that neither distance is measured
    where the gap is."""
    mdp = world.mdp
    optimum = optimal_values(mdp) @ mdp.start
    convolved = convolve(world.pictures[:num_train])
    unseen = np.arange(num_train, len(world.pictures))
    rows = []
    for agent in agents:
        policy = policies_of(agent, world.pictures)
        returns = state_values(mdp, policy) @ mdp.start / optimum  # (F,)
        visitation = visitations(mdp, policy)
        distances = pair_distances(visitation, policy)
        bound = bound_gap(*mdp, world.probability, num_train, policy)
        entropies = -(policy * np.log(policy.clip(1e-30))).sum(-1)  # (F, S)
        of_copies = policies_of(agent, convolved).reshape(num_train, CONVOLUTIONS, *policy.shape[1:])
        changes = np.abs(of_copies - policy[:num_train, None]).sum(-1) / 2  # (num_train, CONVOLUTIONS, S)
        eta = returns[:num_train].mean()
        rows.append(
            {
                "eta": eta,
                "zeta": returns.mean(),
                "gap": eta - returns.mean(),
                "bound": bound / optimum,
                "entropy": (visitation * entropies)[:num_train].sum(-1).mean(),
                "mean_robustness": theory.mean_of_pairs(distances),
                "half_gap": eta - returns[unseen[1::2]].mean(),
                "half_robustness": distances[:num_train, unseen[::2]].mean(),
                "conv_robustness": (visitation[:num_train, None] * changes).sum(-1).mean(),
                "rank_train": effective_rank(encodings(agent, world.pictures[:num_train])),
                "rank_unseen": effective_rank(encodings(agent, world.pictures[num_train:])),
            }
        )
    return [{name: float(value) for name, value in row.items()} for row in rows]


def convolve(pictures: np.ndarray) -> np.ndarray:
    """CONVOLUTIONS random convolutions of each rendering's pictures, (n, S, height, width, 3): each with one
    kernel for all its states, float32 (n * CONVOLUTIONS, S, height, width, 3)."""
    num_renderings, num_states, *shape = pictures.shape
    kernels = draw_kernels(np.random.default_rng(0), num_renderings * CONVOLUTIONS)
    obs = torch.from_numpy(pictures).repeat_interleave(CONVOLUTIONS, dim=0)
    kernels = kernels.repeat_interleave(num_states, dim=0)
    return random_conv(obs.flatten(0, 1), kernels).reshape(-1, num_states, *shape).numpy()


@torch.no_grad()
def encodings(agent, pictures: np.ndarray) -> torch.Tensor:
    """The encoder's output on the pictures of all states, (n, S, height, width, 3): float64 (n * S, 256)."""
    images = torch.from_numpy(pictures).flatten(0, 1).permute(0, 3, 1, 2) / 255
    parts = [agent.encoder(part) for part in images.split(1024)]
    return torch.cat(parts).double()


def effective_rank(x: torch.Tensor) -> float:
    """Of encodings, (N, D), the exponential of the entropy of the singular values' shares (Roy and Vetterli
    2007): 1 if all lie on a line, D if they spread equally to all sides."""
    values = torch.linalg.svdvals(x - x.mean(0))
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def measure_pairs(world: World, num_train: int, agents: dict) -> list[dict]:
    """Of each two agents, which are given by training and number: LIKENESS."""
    rng = np.random.default_rng(0)
    pictures = {"train": world.pictures[:num_train], "unseen": world.pictures[num_train:]}
    rows = []
    for first, second in itertools.combinations(agents, 2):
        rows.append({"relation": PAIR if first[0] == second[0] else NEVER_MET})
    for name, seen in pictures.items():
        of_agents = {key: encodings(agent, seen) for key, agent in agents.items()}
        chosen = rng.permutation(seen.shape[0] * seen.shape[1])[:ROWS]
        for row, (first, second) in zip(rows, itertools.combinations(agents, 2)):
            x, y = of_agents[first], of_agents[second]
            row[f"cka_{name}"] = linear_cka(x, y)
            row[f"neighbours_{name}"] = neighbour_agreement(x[chosen], y[chosen])
    return rows


def by_world(results: list[dict], kind: str, names) -> pd.DataFrame:
    """Means over the agents or the pairs of each world, after the last update: a column for each name,
    indexed by label, n and world."""
    rows = last_rows(results, kind)
    return rows.groupby(["label", "num_train", "seed"], sort=False)[list(names)].mean()


def mean_over_n(values: pd.DataFrame) -> pd.DataFrame:
    """Of values by n and world, those of the worlds that have all n."""
    whole = values.unstack("num_train").dropna()
    return whole.T.groupby(level=0).mean().T


def last_rows(results: list[dict], kind: str) -> pd.DataFrame:
    rows = all_rows(results, kind)
    return rows[rows.iteration == rows.iteration.max()]


def all_rows(results: list[dict], kind: str) -> pd.DataFrame:
    """The agents or the pairs of all results. The label is the method, and how the two agents of a pair are
    related."""
    rows = []
    for result in results:
        method = theory.METHODS[result["job"]["method"]].label
        for row in result[kind]:
            label = f"{method}: {row['relation']}" if kind == "pairs" else method
            rows.append(result["job"] | row | {"label": label})
    return pd.DataFrame(rows)


def value_table(values: pd.DataFrame, titles: dict[str, str]) -> str:
    rows = [["", "n", "worlds", *titles.values()]]
    for (label, num_train), group in values.groupby(["label", "num_train"], sort=False):
        intervals = [str(mean_interval(group[name].to_numpy())) for name in titles]
        rows.append([label, str(num_train), str(len(group)), *intervals])
    return markdown(rows)


def difference_tables(values: pd.DataFrame, contrasts: list[tuple[str, str]], titles: dict[str, str]) -> str:
    """Within worlds: of the mean over those n that both have, and of each n. A star is Holm's, over a column
    of a table."""
    of_mean = {}
    of_each = {}
    labels = values.index.get_level_values("label")
    for first, second in contrasts:
        if {first, second} <= set(labels):
            ours, theirs = values.loc[first], values.loc[second]
            both = ours.index.intersection(theirs.index, sort=False)
            differences = ours.loc[both] - theirs.loc[both]
            means = mean_over_n(differences)
            if len(means) > 0:
                of_mean[f"{first} - {second}", "mean"] = means
            for num_train, group in differences.groupby("num_train"):
                of_each[f"{first} - {second}", str(num_train)] = group
    return f"{difference_table(of_mean, titles)}\n{difference_table(of_each, titles)}"


def difference_table(differences: dict[tuple[str, str], pd.DataFrame], titles: dict[str, str]) -> str:
    columns = []
    for name in titles:
        columns.append(star_holm([mean_interval(group[name].to_numpy()) for group in differences.values()]))
    rows = [["", "n", "worlds", *titles.values()]]
    for (contrast, num_train), group, *cells in zip(differences, differences.values(), *columns):
        rows.append([contrast, num_train, str(len(group)), *cells])
    return markdown(rows)


def correlation_table(agents: pd.DataFrame) -> str:
    """A point for each agent after the last update, its ranks centred on its method and n."""
    rows = [["", "agents", "worlds", "gap of the other half", "zeta"]]
    for name, title in ROBUSTNESS.items():
        row = [title, str(len(agents)), str(agents.seed.nunique())]
        for measure in ("half_gap", "zeta"):
            row.append(str(correlation_interval(agents, (name, measure), "seed", ["label", "num_train"])))
        rows.append(row)
    return markdown(rows)


def bound_table(agents: pd.DataFrame) -> str:
    """How far the direct bound of renderings.py is above the gap: the ratio of their means."""
    rows = [["", "n", "bound / gap"]]
    for (label, num_train), group in agents.groupby(["label", "num_train"], sort=False):
        ratio = group.bound.mean() / group.gap.abs().mean()
        rows.append([label, str(num_train), f"{ratio:.1f}"])
    return markdown(rows)


def make_tables(results: list[dict]) -> str:
    """Markdown, with 95 % intervals over worlds."""
    agents = last_rows(results, "agents")
    returns = by_world(results, "agents", [*RETURNS, *RANKS])
    likeness = by_world(results, "pairs", LIKENESS)
    text = f"## Returns\n\n{value_table(returns, RETURNS)}\n"
    text += f"## Returns: differences\n\n{difference_tables(returns, METHOD_CONTRASTS, RETURNS)}\n"
    text += f"## Likeness\n\n{value_table(likeness, LIKENESS)}\n"
    text += f"## Likeness: differences\n\n{difference_tables(likeness, PAIR_CONTRASTS, LIKENESS)}\n"
    text += f"## Effective rank\n\n{value_table(returns, RANKS)}\n"
    text += f"## Rank correlation of robustness, within methods and n\n\n{correlation_table(agents)}\n"
    return f"{text}## How loose the direct bound is\n\n{bound_table(agents)}"


def draw(results: list[dict]):
    """CKA over training, for each n and on both kinds of renderings."""
    pairs = all_rows(results, "pairs")
    numbers = sorted(pairs.num_train.unique())
    size = (2.6 * len(numbers) + 1, 5)
    layout = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(2, len(numbers), figsize=size, **layout)
    for row, (name, title) in zip(axes, [("cka_train", "training"), ("cka_unseen", "unseen")]):
        for ax, num_train in zip(row, numbers):
            for label, group in pairs[pairs.num_train == num_train].groupby("label", sort=False):
                worlds = group.groupby(["iteration", "seed"])[name].mean().unstack()
                intervals = [mean_interval(of_worlds) for of_worlds in worlds.to_numpy()]
                middles, lows, highs = np.transpose(intervals)[:3]
                ax.plot(worlds.index, middles, label=label)
                ax.fill_between(worlds.index, lows, highs, alpha=0.2, linewidth=0)
            ax.set(title=f"n = {num_train}, {title} renderings")
    figure.supxlabel("updates")
    figure.supylabel("linear CKA")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def main(args: Args):
    design = theory.DESIGN | {"total_timesteps": args.total_timesteps, "trainings": TRAININGS}
    results = theory.make_results(train, design, args)
    tables = make_tables(results)
    print(tables)
    theory.write_text(args.output / "tables.md", tables)
    theory.save(draw(results), args.output / "convergence")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
