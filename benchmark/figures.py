"""Draws curves over games and algorithms, and the aggregate of normalised scores, from runs or from a CSV.

Reads TensorBoard's files, args.json and final_test.json in run folders
{env_id}__{exp_name}__{seed}__{unix_time}, at any depth below the given ones and through links, and CSV files
that --csv wrote. exp_name is the algorithm. Of several runs of one game, algorithm and seed the newest
counts. Agents that learned together are one seed, its value their mean.

Curves are linearly interpolated onto common steps. The line is the mean over seeds and the band their
standard deviation (n - 1), up to the end of the shortest run; beyond it, dashed, the mean of those there are.

Scores are (R - min) / (max - min) with the bounds of Cobbe et al. (2020), not clipped. R is the final test on
the full distribution; where a run of a game and algorithm has none yet, the last test that all of them have
reached. Intervals are 95 % stratified bootstrap, by rliable (Agarwal et al. 2021).

    python benchmark/figures.py runs --algorithms ppo_procgen mdpo_procgen --csv curves.csv.gz
    python benchmark/figures.py runs --algorithms ppo_procgen --distribution-mode easy \
        --reference benchmark/results/published_ppo.csv
"""

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import runs
import tyro
from helpers import Count, check_limits, fail, replacing
from rliable import library, metrics
from runs import FINAL_TEST, GAP, TEST, TRAIN
from tables import markdown

AXES = {TRAIN: "training return", TEST: "test return", GAP: "generalization gap"}
SPLITS = {  # of published returns: the tags that they are compared with, the better first
    "train": [TRAIN],
    "test": [FINAL_TEST, TEST],
}
PUBLISHED_SETTINGS = {"num_levels": 200, "start_level": 0, "num_envs": 64, "num_steps": 256}
NEAR = 0.05  # of the steps: how far from a published point a value may be

BOUNDS = {  # (min, max) return of each game, by distribution mode
    "bigfish": {"hard": (0, 40), "easy": (0, 40)},
    "bossfight": {"hard": (0.5, 13), "easy": (0.5, 13)},
    "caveflyer": {"hard": (2, 13.4), "easy": (3.5, 12)},
    "chaser": {"hard": (0.5, 14.2), "easy": (0.5, 13)},
    "climber": {"hard": (1, 12.6), "easy": (2, 12.6)},
    "coinrun": {"hard": (5, 10), "easy": (5, 10)},
    "dodgeball": {"hard": (1.5, 19), "easy": (1.5, 19)},
    "fruitbot": {"hard": (-0.5, 27.2), "easy": (-1.5, 32.4)},
    "heist": {"hard": (2, 10), "easy": (3.5, 10)},
    "jumper": {"hard": (1, 10), "easy": (3, 10)},
    "leaper": {"hard": (1.5, 10), "easy": (3, 10)},
    "maze": {"hard": (4, 10), "easy": (5, 10)},
    "miner": {"hard": (1.5, 20), "easy": (1.5, 13)},
    "ninja": {"hard": (2, 10), "easy": (3.5, 10)},
    "plunder": {"hard": (3, 30), "easy": (4.5, 30)},
    "starpilot": {"hard": (1.5, 35), "easy": (2.5, 64)},
}


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
    steps = np.linspace(rows.step.min(), rows.step.max(), points)
    agents = {}
    for key, curve in rows.groupby(["seed", "run"]):
        values = curve.groupby("step").value.last()
        smoothed = values.rolling(smooth, center=True, min_periods=1).mean()
        agents[key] = np.interp(steps, smoothed.index, smoothed, left=np.nan, right=np.nan)
    table = pd.DataFrame(agents).T
    return steps, table.groupby(level=0).agg(lambda values: values.mean(skipna=False))


def draw_curves(data: pd.DataFrame, tag: str, labels: dict[str, str], smooth: int, reference: pd.DataFrame):
    """A figure of one tag, a panel for each game. `reference` are the published returns of that tag."""
    rows_of_tag = data[data.tag == tag]
    games = sorted(set(rows_of_tag.game))
    columns = min(4, len(games))
    rows = math.ceil(len(games) / columns)
    size = (max(4.5, 2.6 * columns), 1 + 2.0 * rows)  # the legend needs 4.5
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    drawn = {}
    for game, axis in zip(games, axes.flat):
        axis.set_title(game)
        axis.grid(alpha=0.3)
        of_game = rows_of_tag[rows_of_tag.game == game]
        for number, (algorithm, label) in enumerate(labels.items()):
            curves = of_game[of_game.algorithm == algorithm]
            if len(curves) > 0:
                drawn[number, label] = draw_band(axis, curves, f"C{number}", smooth)
        near = reference.env_steps <= (1 + NEAR) * of_game.step.max()
        points = reference[near & (reference.env_id == game)]
        if len(points) > 0:
            drawn[len(labels), "published"] = draw_points(axis, points)
    for axis in axes.flat[len(games) :]:
        axis.remove()
    figure.supxlabel("environment steps of each agent (millions)", fontsize="medium")
    figure.supylabel(AXES.get(tag, tag), fontsize="medium")
    names = [label for _, label in sorted(drawn)]
    handles = [drawn[key] for key in sorted(drawn)]
    inches = 0.5 + 0.075 * max(map(len, names))  # about, of an entry with its line
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
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
    axis.fill_between(millions, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    return axis.plot(millions, until_the_first_ends, linewidth=1.4, color=color, marker=marker)[0]


def draw_points(axis, points: pd.DataFrame):
    """Published means, from the lowest to the highest of their runs."""
    mean = points.return_mean
    ends = [mean - points.return_min_run, points.return_max_run - mean]
    return axis.errorbar(points.env_steps / 1e6, mean, ends, fmt="D", color="black", capsize=4, markersize=4)


def return_near(run: pd.DataFrame, split: str, steps: int) -> float | None:
    """Mean of a run's returns near the steps, None if it has none there."""
    near = run[(run.step - steps).abs() <= NEAR * steps]
    for tag in SPLITS[split]:
        values = near.value[near.tag == tag]
        if len(values) > 0:
            return values.mean()
    return None


def compare(data: pd.DataFrame, labels: dict[str, str], reference: pd.DataFrame) -> str:
    """Markdown: for each published point that a run has reached, the return of each seed (empty where it has
    none there), and the published mean and range."""
    seeds = sorted(set(data.seed))
    head = ["game", "return", "steps", "algorithm", *(f"seed {seed}" for seed in seeds)]
    rows = [[*head, "published", "their runs"]]
    for point in reference.itertuples():
        for algorithm, label in labels.items():
            chosen = data[(data.game == point.env_id) & (data.algorithm == algorithm)]
            ours = [return_near(chosen[chosen.seed == seed], point.split, point.env_steps) for seed in seeds]
            if all(value is None for value in ours):
                continue
            row = [point.env_id, point.split, f"{point.env_steps:,}", label]
            row += ["" if value is None else f"{value:.2f}" for value in ours]
            row += [f"{point.return_mean:.2f}", f"{point.return_min_run:.2f} to {point.return_max_run:.2f}"]
            rows.append(row)
    if len(rows) == 1:
        return f"No run has come to {reference.env_steps.min():,} steps, the first published number.\n"
    return markdown(rows)


def find_tests(data: pd.DataFrame) -> tuple[pd.DataFrame, set]:
    """The test return of each seed (columns game, algorithm, seed, value), and the (game, algorithm) whose
    tests are earlier ones, since not all of its runs have a final test."""
    parts = []
    unfinished = set()
    for key, rows in data.groupby(["game", "algorithm"]):
        end = rows.groupby("run").step.transform("max")  # a test before that is of an earlier end
        tests = rows[(rows.tag == FINAL_TEST) & (rows.step == end)]
        if tests.run.nunique() < rows.run.nunique():
            unfinished.add(key)
            tests = last_common_tests(rows)
        parts.append(tests)
    tests = pd.concat(parts)
    return tests.groupby(["game", "algorithm", "seed"]).value.mean().reset_index(), unfinished


def last_common_tests(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run's last test on the way that is not beyond what all runs have reached."""
    tests = rows[rows.tag == TEST].sort_values("step")
    reached = tests.groupby("run").step.max().min()
    return tests[tests.step <= reached].groupby("run").tail(1)


def normalised_scores(tests: pd.DataFrame, names: dict[str, str], mode: str) -> dict[str, np.ndarray]:
    """{name: scores (number of seeds, number of games)} of the games that all algorithms have, and of the
    seeds that have all of these. Prints what that leaves out. Empty if nothing is left of an algorithm."""
    tables = {}
    for algorithm, rows in tests.groupby("algorithm"):
        tables[algorithm] = rows.pivot(index="seed", columns="game", values="value")
    games = sorted(set.intersection(*(set(table) for table in tables.values())))
    left_out = sorted(set(tests.game) - set(games))
    if left_out:
        print(f"not in the aggregate, since an algorithm has no test there: {', '.join(left_out)}")
    bounds = np.array([BOUNDS[game][mode] for game in games]).reshape(-1, 2)
    low, high = bounds.T
    scores = {}
    for algorithm, name in names.items():
        values = tables[algorithm][games] if algorithm in tables else pd.DataFrame()
        whole = values.dropna()
        for seed in values.index.difference(whole.index):
            print(f"not in the aggregate, since a game lacks it: {name}, seed {seed}")
        if whole.size == 0:
            return {}
        if len(whole) == 1:
            print(f"one seed of {name}: no spread, so its intervals mean nothing")
        scores[name] = (whole.to_numpy() - low) / (high - low)
    return scores


class Estimate(NamedTuple):
    """With its 95 % interval."""

    metric: str
    name: str  # of an algorithm, or a pair of them
    value: float
    low: float
    high: float


def estimate(scores: dict[str, np.ndarray], samples: int) -> list[Estimate]:
    """The metrics of scores as `normalised_scores` gives them. A single algorithm has no pairs."""
    pairs = {}
    for one, other in combinations(scores, 2):
        pairs[f"P({other} > {one})"] = (scores[other], scores[one])
    found = []
    for metric, function, inputs in (
        ("interquartile mean", metrics.aggregate_iqm, scores),
        ("optimality gap", metrics.aggregate_optimality_gap, scores),
        ("probability of improvement", metrics.probability_of_improvement, pairs),
    ):
        if inputs:
            np.random.seed(0)  # rliable draws from numpy's global generator
            values, intervals = library.get_interval_estimates(inputs, function, reps=samples)
            for name, (low, high) in intervals.items():
                found.append(Estimate(metric, name, float(values[name]), *low, *high))
    return found


def draw_aggregate(estimates: list[Estimate]):
    """A figure with a panel for each metric: the estimates and their 95 % intervals."""
    panels = {}
    for each in estimates:
        panels.setdefault(each.metric, []).append(each)
    most = max(map(len, panels.values()))
    size = (3.6 * len(panels), 1.3 + 0.35 * most)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (metric, rows) in zip(axes, panels.items()):
        of_pairs = metric == "probability of improvement"
        for row, each in enumerate(rows):
            color = "0.3" if of_pairs else f"C{row}"
            ends = [each.low, each.high]
            axis.plot(ends, [row, row], color=color, linewidth=9, alpha=0.4, solid_capstyle="butt")
            axis.plot(each.value, row, "|", color=color, markersize=12, markeredgewidth=2)
        axis.set_yticks(range(len(rows)), [each.name for each in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(metric)
        axis.set_xlabel("probability" if of_pairs else "normalised test score")
        if of_pairs:
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
            axis.set_xlim(-0.04, 1.04)
    return figure


def make_table(tests: pd.DataFrame, unfinished: set, labels: dict[str, str]) -> str:
    """Markdown: the test return by game and algorithm."""
    rows = [["test return", *labels.values()]]
    for game in sorted(set(tests.game)):
        row = [game]
        for algorithm in labels:
            values = tests.value[(tests.game == game) & (tests.algorithm == algorithm)]
            row.append(make_cell(values) + " †" * ((game, algorithm) in unfinished))
        rows.append(row)
    text = markdown(rows)
    text += "\nMean ± standard deviation over seeds (number of seeds) of the final test on the full\n"
    text += "distribution. Agents that learned together are one seed, its return their mean.\n"
    if unfinished:
        text += "†: not all have a final test; this is the last test that all of them have reached, and\n"
        text += "to compare it with a final test, or with another step, says nothing.\n"
    return text


def make_cell(values: pd.Series) -> str:
    if len(values) == 0:
        return "missing"
    if len(values) == 1:
        return f"{values.mean():.2f} (1)"
    return f"{values.mean():.2f} ± {values.std():.2f} ({len(values)})"


def metric_table(estimates: list[Estimate], mode: str) -> str:
    """Markdown."""
    rows = [["metric", "of", "estimate"]]
    for each in estimates:
        rows.append([each.metric, each.name, f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"])
    of_what = f"Of scores that are normalised for {mode} levels"
    return f"{of_what}, with 95 % stratified bootstrap intervals:\n\n{markdown(rows)}"


def save(figure, name: str, folder: Path):
    """Writes NAME.pdf and NAME.png, and closes the figure."""
    for suffix in ("pdf", "png"):
        with replacing(folder / f"{name}.{suffix}") as path:
            figure.savefig(path, dpi=200)
    plt.close(figure)


def read_reference(path: Path | None) -> pd.DataFrame:
    """env_id, split, env_steps and return_mean, return_min_run, return_max_run; without a path no rows."""
    columns = ["env_id", "split", "env_steps", "return_mean", "return_min_run", "return_max_run"]
    if path is None:
        return pd.DataFrame(columns=columns)
    try:
        return pd.read_csv(path, comment="#")[columns]
    except (OSError, ValueError, KeyError) as error:
        fail(f"--reference: cannot read {path}: {str(error).splitlines()[0]}")


def main(args: Args):
    reference = read_reference(args.reference)
    needed = PUBLISHED_SETTINGS if args.reference else {}
    data = runs.read_runs(args, sorted({*args.tags, TEST}), needed)
    labels = runs.name_algorithms(data, args)
    runs.print_missing(data)
    if args.csv:
        with replacing(args.csv) as path:
            data[list(runs.COLUMNS)].to_csv(path, index=False, float_format="%.7g")

    for tag in args.tags:
        if (data.tag == tag).any():
            splits = [split for split, tags in SPLITS.items() if tag in tags]
            points = reference[reference.split.isin(splits)]
            name = AXES.get(tag, tag).replace(" ", "_").replace("/", "_")
            save(draw_curves(data, tag, labels, args.smooth, points), name, args.output)
        else:
            print(f"missing: {tag}, in all runs")
    tests, unfinished = find_tests(data)
    names = {}
    for algorithm, label in labels.items():
        marked = any(algorithm == key for _, key in unfinished)
        names[algorithm] = f"{label} †" if marked else label
    scores = normalised_scores(tests, names, args.distribution_mode)
    estimates = estimate(scores, args.bootstrap)
    table = make_table(tests, unfinished, labels)
    if estimates:
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
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,)))
