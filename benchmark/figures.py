"""Draws curves over games and algorithms, and the aggregate of normalised scores, from runs or from a CSV.

Reads TensorBoard's files and final_test.json in run folders {env_id}__{exp_name}__{seed}__{unix_time}, at any
depth below the given ones, and CSV files that --csv wrote. exp_name is the algorithm. Of several runs of one
game, algorithm and seed the newest counts. A pair of agents is one seed, its value the mean of the two.

Curves are linearly interpolated onto common steps. The line is the mean over seeds and the band their
standard deviation (n - 1), up to the end of the shortest run; beyond it, dashed, the mean of those there are.

Scores are (R - min) / (max - min) with the bounds of Cobbe et al. (2020), not clipped. R is the final test on
the full distribution; where a run of a game and algorithm has none yet, the last test that all of them have
reached. Intervals are 95 % stratified bootstrap, by rliable (Agarwal et al. 2021).

    python benchmark/figures.py runs --algorithms ppo_procgen mdpo_procgen --csv curves.csv.gz
"""

import contextlib
import json
import logging
import re
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from command_line import check_folder, fail, parse_args, replacing
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

TRAIN, TEST = "charts/episodic_return", "charts/test_episodic_return"
GAP, FINAL = "charts/generalization_gap", "final_test/full_distribution"
RUN = r"(?P<game>.+?)__(?P<algorithm>.+)__(?P<seed>\d+)__(?P<time>\d+)"  # name of a run folder
COLUMNS = {"run": str, "tag": str, "step": "int64", "value": "float64"}
AXES = {TRAIN: "training return", TEST: "test return", GAP: "generalization gap"}
# fmt: off
BOUNDS = {  # (min, max) return of each game, on hard and on easy levels
    "bigfish": ((0, 40), (0, 40)),          "bossfight": ((0.5, 13), (0.5, 13)),
    "caveflyer": ((2, 13.4), (3.5, 12)),    "chaser": ((0.5, 14.2), (0.5, 13)),
    "climber": ((1, 12.6), (2, 12.6)),      "coinrun": ((5, 10), (5, 10)),
    "dodgeball": ((1.5, 19), (1.5, 19)),    "fruitbot": ((-0.5, 27.2), (-1.5, 32.4)),
    "heist": ((2, 10), (3.5, 10)),          "jumper": ((1, 10), (3, 10)),
    "leaper": ((1.5, 10), (3, 10)),         "maze": ((4, 10), (5, 10)),
    "miner": ((1.5, 20), (1.5, 13)),        "ninja": ((2, 10), (3.5, 10)),
    "plunder": ((3, 30), (4.5, 30)),        "starpilot": ((1.5, 35), (2.5, 64)),
}
# fmt: on


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders with runs below them, or CSV files
    algorithms: tuple[str, ...] = ()  # exp_names in the order of the legend; by default all, sorted
    labels: tuple[str, ...] = ()  # their names in the figures, as many
    games: tuple[str, ...] = ()  # by default all that there are
    tags: tuple[str, ...] = (TRAIN, TEST, GAP)  # curves, a figure each
    smooth: int = 1  # running mean over this many logged values, 1 for none
    distribution_mode: Literal["hard", "easy"] = "hard"  # whose score bounds to use
    bootstrap: int = 2000  # samples for the intervals
    output: Path = Path("figures")  # folder for PDF, PNG and table.md
    csv: Path | None = None  # write what was read to this .csv or .csv.gz: run, tag, step, value

    def __post_init__(self):
        if not self.paths:
            raise ValueError("PATHS needs one or more folders with runs, or CSV files")
        if missing := [str(path) for path in self.paths if not path.exists()]:
            raise ValueError(f"PATHS: there is no {', '.join(missing)}")
        if self.labels and len(self.labels) != len(self.algorithms):
            raise ValueError("--labels must be as many as --algorithms")
        if self.csv and self.csv.name in ("", ".."):
            raise ValueError(f"--csv must end in a file's name, not be {self.csv}")
        for name, low in (("smooth", 1), ("bootstrap", 10)):
            if not low <= getattr(self, name) <= 10**6:
                raise ValueError(f"--{name} must be from {low} to 1000000, not {getattr(self, name)}")


def read_folder(path: Path, args: Args, settings: dict) -> pd.DataFrame:
    """The curves and final tests of all runs below path, which must have these settings. A file of events
    that is cut short ends earlier. Runs of games and algorithms that are not asked for get an empty row."""
    folders = sorted({file.parent for file in path.resolve().rglob("events.out.tfevents.*")})
    runs = [(each, each.parent if each.name.startswith("agent_") else each) for each in folders]
    runs = [(each, run, found) for each, run in runs if (found := re.fullmatch(RUN, run.name))]
    rows = []
    for folder, run, found in tqdm(runs, desc=f"reading {path}", disable=None):
        name = str(folder.relative_to(run.parent))
        chosen = ("game", args.games), ("algorithm", args.algorithms)
        if any(names and found[column] not in names for column, names in chosen):
            rows.append((name, "", 0, np.nan))
            continue
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1}).Reload()
        if "hyperparameters/text_summary" in events.Tags()["tensors"]:
            (event,) = events.Tensors("hyperparameters/text_summary")
            text = event.tensor_proto.string_val[0].decode()
            for key, needed in settings.items():
                made = re.search(rf"\|{key}\|(.*)\|", text)
                if made and made[1] != str(needed):
                    flag = f"--{key.replace('_', '-')}"
                    fail(f"PATHS: {folder} was made with {flag} {made[1]}, and {flag} {needed} is needed")
        for tag in sorted({*args.tags, TEST} & {*events.Tags()["scalars"]}):
            rows += [(name, tag, event.step, event.value) for event in events.Scalars(tag)]
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            test = json.loads((run / "final_test.json").read_text())
            for kind, each in test["agents"][int(folder.name[6:]) - 1 if folder != run else 0].items():
                rows.append((name, f"final_test/{kind}", test["global_step"], each["mean"]))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def read(args: Args, settings: dict) -> pd.DataFrame:
    """All that is to be drawn, in long form: run, tag, step, value. Run folders must have these settings."""
    frames = []
    for path in args.paths:
        if path.is_dir():
            frames.append(read_folder(path, args, settings))
            continue
        try:
            frames.append(pd.read_csv(path)[list(COLUMNS)].astype(COLUMNS))
        except Exception as error:  # pandas has many names for a file that is no such CSV
            fail(f"{path} is not a CSV with the columns run, tag, step, value: {str(error).splitlines()[0]}")
    return pd.concat(frames, ignore_index=True).drop_duplicates()


def select(data: pd.DataFrame, args: Args, of_algorithms: str = "--algorithms") -> pd.DataFrame:
    """The newest runs of the chosen games and algorithms, with the columns game, algorithm and seed.
    `of_algorithms` is the flag of the command that chose these."""
    pattern = rf"^{RUN}(?:/agent_\d+)?$"
    data = data.join(data.run.str.extract(pattern).astype({"time": "float64"}))
    data = data[data.game.isin(BOUNDS)]
    chosen_by = ("--games", "game", args.games), (of_algorithms, "algorithm", args.algorithms)
    for flag, column, chosen in chosen_by:
        found = sorted(set(data[column]))
        if unknown := set(chosen) - set(found):
            names = ", ".join(found) or "none"
            fail(f"{flag}: there are no runs of {', '.join(sorted(unknown))}, only of {names}")
        data = data[data[column].isin(chosen or found)]
    data = data.dropna()
    if data.empty:
        fail(f"PATHS: no runs with curves in {', '.join(map(str, args.paths))}")
    newest = data.groupby(["game", "algorithm", "seed"]).time.transform("max")
    for run in sorted(set(data.run[data.time < newest].str.split("/").str[0])):
        print(f"left out: {run}, since there is a newer run of this game, algorithm and seed")
    return data[data.time == newest]


def print_missing(data: pd.DataFrame):
    """What an algorithm lacks that others have, and which of its runs are behind its longest."""
    last = data.groupby(["algorithm", "game", "seed"]).step.max()
    for algorithm, game, seed in product(*(sorted(set(level)) for level in zip(*last.index))):
        step, longest = last.get((algorithm, game, seed)), last[algorithm].max()
        if step is None:
            print(f"missing: {algorithm} on {game}, seed {seed}")
        elif step < longest:
            print(f"short: {algorithm} on {game}, seed {seed}, is at {step:,} of {longest:,} steps")


def label_of(exp_name: str) -> str:
    """ppo_procgen+wide, as benchmark/sweep.py names a variant, is "PPO, wide"; other names stay."""
    known = re.fullmatch(r"(\w+)_procgen(?:\+(.+))?", exp_name)
    return ", ".join([known[1].upper(), *filter(None, [known[2]])]) if known else exp_name


def common_steps(rows: pd.DataFrame, smooth: int, points: int = 200) -> tuple[np.ndarray, pd.DataFrame]:
    """Interpolates the curves of one tag, game and algorithm. Returns the steps (points,) and the values
    (number of seeds, points), nan where a run has none. A seed's value is the mean over its agents."""
    steps = np.linspace(rows.step.min(), rows.step.max(), points)
    seeds = {}
    for (seed, _), curve in rows.groupby(["seed", "run"]):
        curve = curve.groupby("step").value.last().rolling(smooth, center=True, min_periods=1).mean()
        seeds.setdefault(seed, []).append(np.interp(steps, curve.index, curve, left=np.nan, right=np.nan))
    return steps, pd.DataFrame({seed: np.mean(agents, axis=0) for seed, agents in seeds.items()}).T


def draw_curves(data: pd.DataFrame, tag: str, labels: dict[str, str], args: Args):
    """A panel for each game, a colour for each algorithm."""
    games, handles = sorted(set(data.game)), {}
    columns, num_rows = min(4, len(games)), -(-len(games) // 4)
    size = (max(4.5, 2.6 * columns), 2.0 * num_rows + 1)
    figure, axes = plt.subplots(num_rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, game in zip(axes.flat, games):
        for number, (algorithm, label) in enumerate(labels.items()):
            rows = data[(data.game == game) & (data.algorithm == algorithm)]
            if rows.empty:
                continue
            steps, values = common_steps(rows, args.smooth)
            mean, std, whole = values.mean(), values.std(), values.notna().all()
            style = {"color": f"C{number}", "marker": "." if len(set(steps)) == 1 else ""}
            axis.plot(steps / 1e6, mean, "--", linewidth=0.8, **style)
            mean = mean.where(whole)
            handles[label] = axis.plot(steps / 1e6, mean, linewidth=1.4, **style)[0]
            axis.fill_between(steps / 1e6, mean - std, mean + std, color=f"C{number}", alpha=0.2, linewidth=0)
        axis.set_title(game)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(games) :]:
        axis.remove()
    figure.supxlabel("environment steps of each agent (millions)", fontsize="medium")
    figure.supylabel(AXES.get(tag, tag), fontsize="medium")
    handles = {label: handles[label] for label in labels.values() if label in handles}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    save(figure, AXES.get(tag, tag).replace(" ", "_").replace("/", "_"), args)


def returns_of(data: pd.DataFrame, labels: dict[str, str]) -> tuple[dict, set]:
    """{label: {game: test returns (number of seeds,)}}, and the (label, game) not all of whose runs have a
    final test."""
    table, unfinished = {label: {} for label in labels.values()}, set()
    for (algorithm, game), rows in data.groupby(["algorithm", "game"]):
        end = rows.groupby("run").step.transform("max")  # a test before that is of an earlier end
        tests = rows[(rows.tag == FINAL) & (rows.step == end)]
        if tests.run.nunique() < rows.run.nunique():
            unfinished.add((labels[algorithm], game))
            tests = rows[rows.tag == TEST].sort_values("step")
            reached = tests.groupby("run").step.max().min()
            tests = tests[tests.step <= reached].groupby("run").tail(1)
        if len(tests):
            table[labels[algorithm]][game] = tests.groupby("seed").value.mean().to_numpy()
    return table, unfinished


def normalised_scores(returns: dict[str, dict[str, np.ndarray]], mode: str) -> dict[str, np.ndarray]:
    """{label: scores (number of seeds, number of games)} of the games that all have, and of as many seeds as
    the game with the fewest has."""
    games = sorted(set.intersection(*map(set, returns.values())))
    if left_out := sorted(set().union(*returns.values()) - set(games)):
        print(f"not in the aggregate, since an algorithm has no test there: {', '.join(left_out)}")
    scores = {}
    for label, table in returns.items() if games else ():
        num_seeds = min(len(table[game]) for game in games)
        if dropped := sum(len(table[game]) - num_seeds for game in games):
            print(f"not in the aggregate, since a game has but {num_seeds} seeds: {dropped} runs of {label}")
        if num_seeds == 1:
            print(f"one seed of {label}: no spread, so its intervals mean nothing")
        low, high = np.array([BOUNDS[game][mode == "easy"] for game in games]).T
        scores[label] = (np.stack([table[game][:num_seeds] for game in games], axis=1) - low) / (high - low)
    return scores


def estimate(scores: dict[str, np.ndarray], samples: int) -> list[tuple[str, dict]]:
    """For each metric its name and {label or pair: (estimate, low, high)}."""
    pairs = {f"P({y} > {x})": (scores[y], scores[x]) for x, y in combinations(scores, 2)}
    results = []
    for name, function, values in (
        ("interquartile mean", metrics.aggregate_iqm, scores),
        ("optimality gap", metrics.aggregate_optimality_gap, scores),
        ("probability of improvement", metrics.probability_of_improvement, pairs),
    ):
        np.random.seed(0)  # rliable draws from numpy's global generator, whatever random_state it is given
        points, intervals = library.get_interval_estimates(values, function, reps=samples)
        results.append((name, {key: (float(points[key]), *intervals[key][:, 0]) for key in values}))
    return [each for each in results if each[1]]  # a single algorithm has no pairs


def draw_aggregate(estimates: list[tuple[str, dict]], args: Args):
    """A panel for each metric: the estimate and its 95 % interval."""
    size = (3.6 * len(estimates), 1.3 + 0.35 * max(len(values) for _, values in estimates))
    figure, axes = plt.subplots(1, len(estimates), figsize=size, layout="constrained")
    for axis, (metric, values) in zip(axes, estimates):
        of_pairs = metric == "probability of improvement"
        for row, (point, low, high) in enumerate(values.values()):
            color = "0.3" if of_pairs else f"C{row}"
            axis.plot([low, high], [row, row], color=color, linewidth=9, alpha=0.4, solid_capstyle="butt")
            axis.plot(point, row, "|", color=color, markersize=12, markeredgewidth=2)
        axis.set_yticks(range(len(values)), values)
        axis.set_ylim(len(values) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(metric)
        axis.set_xlabel("probability" if of_pairs else "normalised test score")
        if of_pairs:
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
            axis.set_xlim(-0.04, 1.04)
    save(figure, "aggregate", args)


def save(figure, name: str, args: Args):
    for suffix in ("pdf", "png"):
        with replacing("--output", args.output / f"{name}.{suffix}") as path:
            figure.savefig(path, dpi=200)
    plt.close(figure)


def make_table(returns: dict, unfinished: set, estimates: list[tuple[str, dict]], mode: str) -> str:
    """Markdown: the test return by game and algorithm, and the metrics of the normalised scores."""
    rows = [["test return", *returns], ["---"] * (len(returns) + 1)]
    for game in sorted(set().union(*returns.values())):
        rows.append([game])
        for label, table in returns.items():
            values, mark = table.get(game, ()), " †" * ((label, game) in unfinished)
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            rows[-1] += [f"{values.mean():.2f}{spread} ({len(values)}){mark}" if len(values) else "missing"]
    for metric, values in estimates[:2]:
        rows.append([metric, *("{:.3f} [{:.3f}, {:.3f}]".format(*each) for each in values.values())])
    lines = [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += ["Mean ± standard deviation over seeds (number of seeds) of the final test on the full"]
    lines += ["distribution. A pair of agents is one seed, its return the mean of the two."]
    if unfinished:
        lines += ["†: not all have a final test; this is the last test that all of them have reached."]
    if estimates:
        lines += [f"Scores: normalised for {mode} levels; in brackets 95 % stratified bootstrap intervals."]
    for _, pairs in estimates[2:]:
        for name, each in pairs.items():
            lines += ["", "{} = {:.2f} [{:.2f}, {:.2f}]".format(name, *each)]
    return "\n".join(lines) + "\n"


def main(args: Args):
    check_folder("--output", args.output)
    if args.csv:
        check_folder("--csv", args.csv.parent)
    everything = read(args, {"distribution_mode": args.distribution_mode})
    data = select(everything, args)
    names = args.algorithms or sorted(set(data.algorithm))
    if len(names) > 10:
        fail(f"--algorithms: ten at most can be told apart, not {', '.join(names)}")
    labels = dict(zip(names, args.labels or map(label_of, names)))
    if len(set(labels.values())) < len(names):
        fail(f"--labels must differ from each other, not be {', '.join(labels.values())}")
    print_missing(data)
    if args.csv:
        with replacing("--csv", args.csv) as path:
            everything.dropna().to_csv(path, index=False, float_format="%.7g")
    for tag in args.tags:
        if (data.tag == tag).any():
            draw_curves(data[data.tag == tag], tag, labels, args)
        else:
            print(f"missing: {tag}, in all runs")
    returns, unfinished = returns_of(data, labels)
    estimates = estimate(normalised_scores(returns, args.distribution_mode), args.bootstrap)
    if estimates:
        draw_aggregate(estimates, args)
    table = make_table(returns, unfinished, estimates, args.distribution_mode)
    with replacing("--output", args.output / "table.md") as path:
        path.write_text(table)
    print(table, f"figures: {args.output}", sep="\n")


if __name__ == "__main__":
    plt.switch_backend("agg")  # no display is needed
    plt.style.use("petroff10")  # ten colours that the colour-blind can tell apart
    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 10, "pdf.fonttype": 42}
    )  # text stays text in the PDF
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what resumed runs leave behind
    try:
        main(parse_args(Args, __doc__))
    except OSError as error:
        fail(f"{error.filename or 'PATHS'}: {error.strerror or error}")
