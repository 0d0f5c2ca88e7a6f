"""Draws curves over games and algorithms, and the aggregate of normalised scores, from runs or from a CSV.

Which runs are read, runs.py says. Agents that learned together are one seed, its value their mean.

Curves are linearly interpolated onto common steps. The line is the mean over seeds and the band their
standard deviation (n - 1), up to the end of the shortest run; beyond it, dashed, the mean of those there are.

Scores are (R - min) / (max - min) with the bounds of Cobbe et al. (2020), not clipped. R is the final test on
the full distribution. Intervals are 95 % stratified bootstrap, by rliable (Agarwal et al. 2021).

    python benchmark/figures.py runs --algorithms ppo_procgen mdpo_procgen --csv curves.csv.gz
    python benchmark/figures.py runs --algorithms ppo_procgen --distribution-mode easy \
        --reference benchmark/results/published_ppo.csv
"""

import io
import math
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import runs
import tyro
from helpers import Count, check_limits, fail, replacing
from rliable import library, metrics
from runs import FINAL_TEST, GAP, TEST, TRAIN
from tables import find_agents, markdown

AXES = {TRAIN: "training return", TEST: "test return", GAP: "generalization gap"}
SPLITS = {  # of published returns: the tags that they are compared with, the better first
    "train": [TRAIN],
    "test": [FINAL_TEST, TEST],
}
PUBLISHED_SETTINGS = {"num_levels": 200, "start_level": 0, "num_envs": 64, "num_steps": 256}
IMPROVEMENT = "probability of improvement"
NEAR = 0.05  # of the steps: how far from a published point a value may be

# (min, max) return of each game, by distribution mode.
BOUNDS = """game hard_min hard_max easy_min easy_max
bigfish 0 40 0 40
bossfight 0.5 13 0.5 13
caveflyer 2 13.4 3.5 12
chaser 0.5 14.2 0.5 13
climber 1 12.6 2 12.6
coinrun 5 10 5 10
dodgeball 1.5 19 1.5 19
fruitbot -0.5 27.2 -1.5 32.4
heist 2 10 3.5 10
jumper 1 10 3 10
leaper 1.5 10 3 10
maze 4 10 5 10
miner 1.5 20 1.5 13
ninja 2 10 3.5 10
plunder 3 30 4.5 30
starpilot 1.5 35 2.5 64
"""


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args(runs.Choice):
    tags: tuple[str, ...] = (TRAIN, TEST, GAP)
    """curves, a figure each"""
    smooth: Count = 1
    """running mean over this many logged values, 1 for none"""
    bootstrap: Annotated[int, (10, 10**6)] = 2000
    """samples for the intervals"""
    reference: Path | None = None
    """published returns on 200 easy levels, as in results/published_ppo.csv, to draw beside the runs and to
    compare them with"""
    output: Path = Path("figures")
    """folder for PDF, PNG and table.md"""
    csv: Path | None = None
    """write the curves to this .csv or .csv.gz: run, tag, step, value"""

    def __post_init__(self):
        super().__post_init__()
        check_limits(self)
        if self.reference and self.distribution_mode != "easy":
            raise ValueError("--reference needs --distribution-mode easy")


def common_steps(rows: pd.DataFrame, smooth: int, points: int = 200) -> tuple[np.ndarray, pd.DataFrame]:
    """Interpolates the curves of one tag, game and algorithm. Returns the steps (points,) and the values
    (number of seeds, points), nan where a run has none. A seed's value is the mean over its agents."""
    first = rows.step.min()
    last = rows.step.max()
    steps = np.linspace(first, last, points)
    seeds = {}
    for seed, of_seed in rows.groupby("seed"):
        agents = []
        for _, curve in of_seed.groupby("run"):
            values = curve.groupby("step").value.last()
            smoothed = values.rolling(smooth, center=True, min_periods=1).mean()
            agent = np.interp(steps, smoothed.index, smoothed, left=np.nan, right=np.nan)
            agents.append(agent)
        seeds[seed] = np.mean(agents, axis=0)
    return steps, pd.DataFrame(seeds).T


def draw_curves(data: pd.DataFrame, labels: dict[str, str], smooth: int, reference: pd.DataFrame):
    """A figure of one tag, a panel for each game. `reference` are its published returns."""
    games = sorted(set(data.game))
    columns = min(4, len(games))
    rows = math.ceil(len(games) / columns)
    size = (1 + 2.6 * columns, 1 + 2.0 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    drawn = dict.fromkeys([*labels.values(), "published"])  # by what the legend calls it
    for game, axis in zip(games, axes.flat):
        axis.set_title(game)
        axis.grid(alpha=0.3)
        of_game = data[data.game == game]
        for number, (algorithm, label) in enumerate(labels.items()):
            curves = of_game[of_game.algorithm == algorithm]
            if len(curves) > 0:
                drawn[label] = draw_band(axis, curves, f"C{number}", smooth)
        last = (1 + NEAR) * of_game.step.max()
        reached = reference[reference.env_steps <= last]
        published = reached[reached.env_id == game]
        if len(published) > 0:
            drawn["published"] = draw_points(axis, published)
    for axis in axes.flat[len(games) :]:
        axis.remove()
    figure.supxlabel("environment steps of each agent (millions)", fontsize="medium")
    lines = {label: line for label, line in drawn.items() if line}
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_band(axis, curves: pd.DataFrame, color: str, smooth: int):
    """Mean and standard deviation over seeds, of one tag, game and algorithm. Returns the line."""
    steps, values = common_steps(curves, smooth)
    millions = steps / 1e6
    mean = values.mean()
    std = values.std()
    until_the_first_ends = mean.where(values.notna().all())
    marker = "." if len(set(steps)) == 1 else ""
    axis.plot(millions, mean, "--", linewidth=0.8, color=color, marker=marker)
    low = mean - std
    high = mean + std
    axis.fill_between(millions, low, high, color=color, alpha=0.2, linewidth=0)
    (line,) = axis.plot(millions, until_the_first_ends, linewidth=1.4, color=color, marker=marker)
    return line


def draw_points(axis, published: pd.DataFrame):
    """Published means, from the lowest to the highest of their runs."""
    mean = published.return_mean
    below = mean - published.return_min_run
    above = published.return_max_run - mean
    millions = published.env_steps / 1e6
    style = {"fmt": "D", "color": "black", "capsize": 4, "markersize": 4, "zorder": 3}
    return axis.errorbar(millions, mean, [below, above], **style)


def return_near(run: pd.DataFrame, split: str, steps: int) -> str:
    """Mean of a run's returns near the steps, nothing if it has none there."""
    near = run[(run.step - steps).abs() <= NEAR * steps]
    for tag in SPLITS[split]:
        values = near.value[near.tag == tag]
        if len(values) > 0:
            return f"{values.mean():.2f}"
    return ""


def compare(data: pd.DataFrame, labels: dict[str, str], reference: pd.DataFrame) -> str:
    """Markdown: for each published point that a run has reached, the return of each seed, and the published
    mean and range."""
    seeds = sorted(set(data.seed))
    columns = [f"seed {seed}" for seed in seeds]
    rows = [["game", "return", "steps", "algorithm", *columns, "published", "their runs"]]
    for point in reference.itertuples():
        for algorithm, label in labels.items():
            chosen = data[(data.game == point.env_id) & (data.algorithm == algorithm)]
            ours = []
            for seed in seeds:
                run = chosen[chosen.seed == seed]
                ours.append(return_near(run, point.split, point.env_steps))
            if any(ours):
                row = [point.env_id, point.split, f"{point.env_steps:,}", label, *ours]
                row.append(f"{point.return_mean:.2f}")
                row.append(f"{point.return_min_run:.2f} to {point.return_max_run:.2f}")
                rows.append(row)
    if len(rows) == 1:
        return f"No run has come to {reference.env_steps.min():,} steps, the first published number.\n"
    return markdown(rows)


def normalised_scores(tests: pd.DataFrame, labels: dict[str, str], mode: str) -> dict[str, np.ndarray]:
    """{label: scores (number of seeds, number of games)} of the games that all algorithms have, and of the
    seeds that have all of these. Prints what that leaves out. Empty if nothing is left of an algorithm."""
    table = tests.pivot(index=["algorithm", "seed"], columns="game", values="test")
    num_seeds = table.groupby("algorithm").count()
    num_seeds = num_seeds.reindex(list(labels), fill_value=0)
    for game in table.columns[num_seeds.min() == 0]:
        print(f"not in the aggregate, since an algorithm has no test there: {game}")
        table = table.drop(columns=game)
    whole = table.dropna()
    for algorithm, seed in table.index.difference(whole.index):
        print(f"not in the aggregate, since it has no test in a game: {labels[algorithm]}, seed {seed}")
    bounds = pd.read_csv(io.StringIO(BOUNDS), sep=" ", index_col="game")
    bounds = bounds.loc[table.columns]
    low = bounds[f"{mode}_min"]
    high = bounds[f"{mode}_max"]
    scores = (whole - low) / (high - low)
    by_label = {}
    for algorithm, label in labels.items():
        of_algorithm = scores.index.get_level_values("algorithm") == algorithm
        values = scores[of_algorithm].to_numpy()
        if values.size == 0:
            return {}
        if len(values) == 1:
            print(f"one seed of {label}: no spread, so its intervals mean nothing")
        by_label[label] = values
    return by_label


def estimate(scores: dict[str, np.ndarray], samples: int) -> pd.DataFrame:
    """The metrics of scores as `normalised_scores` gives them. Columns: metric, of (an algorithm or a pair),
    value, and low and high, the limits of its interval. A single algorithm has no pairs."""
    pairs = {}
    for one, other in combinations(scores, 2):
        pairs[f"P({other} > {one})"] = (scores[other], scores[one])
    rows = []
    for metric, function, of_what in [
        ("interquartile mean", metrics.aggregate_iqm, scores),
        ("optimality gap", metrics.aggregate_optimality_gap, scores),
        (IMPROVEMENT, metrics.probability_of_improvement, pairs),
    ]:
        np.random.seed(0)  # rliable draws from numpy's global generator, whatever random_state it is given
        values, intervals = library.get_interval_estimates(of_what, function, reps=samples)
        for name, value in values.items():
            low, high = intervals[name].flat
            rows.append((metric, name, float(value), low, high))
    return pd.DataFrame(rows, columns=["metric", "of", "value", "low", "high"])


def draw_aggregate(estimates: pd.DataFrame):
    """A figure with a panel for each metric: the estimates and their 95 % intervals."""
    panels = estimates.groupby("metric", sort=False)
    most = panels.size().max()
    size = (3.6 * len(panels), 1.3 + 0.35 * most)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (metric, rows) in zip(axes, panels):
        for number, each in enumerate(rows.itertuples()):
            color = "0.3" if metric == IMPROVEMENT else f"C{number}"
            bar = {"linewidth": 9, "alpha": 0.4, "solid_capstyle": "butt"}
            ends = [each.low, each.high]
            axis.plot(ends, [each.of] * 2, color=color, **bar)
            axis.plot(each.value, each.of, "|", color=color, markersize=12)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(metric)
        axis.set_xlabel("normalised test score")
        if metric == IMPROVEMENT:
            axis.set_xlabel("probability")
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
            axis.set_xlim(-0.04, 1.04)
    return figure


def make_table(tests: pd.DataFrame, labels: dict[str, str]) -> str:
    """Markdown: the test return by game and algorithm."""
    rows = [["test return", *labels.values()]]
    for game, of_game in tests.groupby("game"):
        cells = [make_cell(of_game.test[of_game.algorithm == algorithm]) for algorithm in labels]
        rows.append([game, *cells])
    text = markdown(rows)
    text += "\nMean ± standard deviation over seeds (number of seeds) of the final test on the full\n"
    text += "distribution. Agents that learned together are one seed, its return their mean.\n"
    return text


def make_cell(values: pd.Series) -> str:
    if len(values) == 0:
        return "missing"
    if len(values) == 1:
        return f"{values.mean():.2f} (1)"
    return f"{values.mean():.2f} ± {values.std():.2f} ({len(values)})"


def metric_table(estimates: pd.DataFrame, mode: str) -> str:
    """Markdown."""
    rows = [["metric", "of", "estimate"]]
    for each in estimates.itertuples():
        interval = f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"
        rows.append([each.metric, each.of, interval])
    of_what = f"Of scores that are normalised for {mode} levels"
    return f"{of_what}, with 95 % stratified bootstrap intervals:\n\n{markdown(rows)}"


def save(figure, name: str, folder: Path):
    """Writes NAME.pdf and NAME.png, and closes the figure."""
    for suffix in ("pdf", "png"):
        with replacing(folder / f"{name}.{suffix}") as path:
            figure.savefig(path, dpi=200, bbox_inches="tight")  # a wide legend makes it wider
    plt.close(figure)


def read_reference(path: Path | None) -> pd.DataFrame:
    """env_id, split, env_steps and return_mean, return_min_run, return_max_run; without a path no rows."""
    columns = ["env_id", "split", "env_steps", "return_mean", "return_min_run", "return_max_run"]
    if path is None:
        return pd.DataFrame(columns=columns)
    try:
        return pd.read_csv(path, comment="#")[columns]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        fail(f"--reference: cannot read {path}: {reason}")


def main(args: Args):
    reference = read_reference(args.reference)
    needed = PUBLISHED_SETTINGS if args.reference else {}
    tags = {*args.tags, TEST}
    data = runs.read_runs(args, sorted(tags), needed)
    labels = runs.name_algorithms(data, args)
    runs.print_missing(data)
    if args.csv:
        with replacing(args.csv) as path:
            columns = list(runs.COLUMNS)
            data[columns].to_csv(path, index=False, float_format="%.7g")

    for tag in args.tags:
        rows = data[data.tag == tag]
        if rows.empty:
            print(f"missing: {tag}, in all runs")
            continue
        splits = [split for split in SPLITS if tag in SPLITS[split]]
        published = reference[reference.split.isin(splits)]
        title = AXES.get(tag, tag)
        figure = draw_curves(rows, labels, args.smooth, published)
        figure.supylabel(title, fontsize="medium")
        save(figure, re.sub(r"\W", "_", title), args.output)
    seeds = find_agents(data).groupby(["game", "algorithm", "seed"])
    tests = seeds.test.mean().reset_index()
    table = make_table(tests, labels)
    scores = normalised_scores(tests, labels, args.distribution_mode)
    if scores:
        estimates = estimate(scores, args.bootstrap)
        save(draw_aggregate(estimates), "aggregate", args.output)
        table += f"\n{metric_table(estimates, args.distribution_mode)}"
    if args.reference:
        table += f"\n{compare(data, labels, reference)}"
    with replacing(args.output / "table.md") as path:
        path.write_text(table, encoding="utf-8")
    print(table)
    print(f"figures: {args.output}")


if __name__ == "__main__":
    plt.switch_backend("agg")  # no display is needed
    plt.style.use("petroff10")  # ten colours that the colour-blind can tell apart
    plt.rcParams["font.size"] = 9
    plt.rcParams["axes.titlesize"] = 10
    plt.rcParams["pdf.fonttype"] = 42  # text stays text in the PDF
    plt.rcParams["text.parse_math"] = False  # a $ in a label is a $
    main(tyro.cli(Args, description=__doc__))
