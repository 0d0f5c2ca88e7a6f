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
"""

import json
import logging
import math
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from helpers import Range, check_folder, check_ranges, fail, replacing, run_tool
from rliable import library, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from robustness_eval import check_label

TRAIN = "charts/episodic_return"
TEST = "charts/test_episodic_return"
GAP = "charts/generalization_gap"
FINAL = "final_test/full_distribution"
AXES = {TRAIN: "training return", TEST: "test return", GAP: "generalization gap"}

RUN = r"(?P<game>.+?)__(?P<algorithm>.+)__(?P<seed>\d+)__(?P<time>\d+)"  # name of a run folder
AGENT = r"agent_(?P<number>\d+)"  # name of a folder in it, where several agents learn together
COLUMNS = {"run": str, "tag": str, "step": "int64", "value": "float64"}
MOST_ALGORITHMS = 10  # whose colours can be told apart

BOUNDS = {  # (min, max) return of each game, by distribution mode
    "hard": {
        "bigfish": (0, 40),
        "bossfight": (0.5, 13),
        "caveflyer": (2, 13.4),
        "chaser": (0.5, 14.2),
        "climber": (1, 12.6),
        "coinrun": (5, 10),
        "dodgeball": (1.5, 19),
        "fruitbot": (-0.5, 27.2),
        "heist": (2, 10),
        "jumper": (1, 10),
        "leaper": (1.5, 10),
        "maze": (4, 10),
        "miner": (1.5, 20),
        "ninja": (2, 10),
        "plunder": (3, 30),
        "starpilot": (1.5, 35),
    },
    "easy": {
        "bigfish": (0, 40),
        "bossfight": (0.5, 13),
        "caveflyer": (3.5, 12),
        "chaser": (0.5, 13),
        "climber": (2, 12.6),
        "coinrun": (5, 10),
        "dodgeball": (1.5, 19),
        "fruitbot": (-1.5, 32.4),
        "heist": (3.5, 10),
        "jumper": (3, 10),
        "leaper": (3, 10),
        "maze": (5, 10),
        "miner": (1.5, 13),
        "ninja": (3.5, 10),
        "plunder": (4.5, 30),
        "starpilot": (2.5, 64),
    },
}


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders with runs below them, or CSV files"""
    algorithms: tuple[str, ...] = ()
    """exp_names in the order of the legend; by default all, sorted"""
    labels: tuple[str, ...] = ()
    """their names in the figures, as many"""
    games: tuple[str, ...] = ()
    """by default all that there are"""
    tags: tuple[str, ...] = (TRAIN, TEST, GAP)
    """curves, a figure each"""
    smooth: Annotated[int, Range(1, 10**6)] = 1
    """running mean over this many logged values, 1 for none"""
    distribution_mode: Literal["hard", "easy"] = "hard"
    """of the runs, and whose score bounds to use"""
    bootstrap: Annotated[int, Range(10, 10**6)] = 2000
    """samples for the intervals"""
    output: Path = Path("figures")
    """folder for PDF, PNG and table.md"""
    csv: Path | None = None
    """write what was read to this .csv or .csv.gz: run, tag, step, value"""

    def __post_init__(self):
        check_ranges(self)
        check_paths(self.paths)
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError("--algorithms must differ from each other")
        if self.labels and len(self.labels) != len(self.algorithms):
            raise ValueError("--labels must be as many as --algorithms")
        for label in self.labels:
            check_label(label)
        if self.csv and self.csv.name in ("", ".."):
            raise ValueError(f"--csv must end in a file's name, not be {self.csv}")


def check_paths(paths: tuple[Path, ...]):
    """Raises ValueError if there are none, or one of them is not there."""
    if not paths:
        raise ValueError("PATHS needs one or more folders with runs, or CSV files")
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"PATHS: there is no {', '.join(missing)}")


@dataclass
class Curves:
    """A folder with TensorBoard's files: that of a run, or of one of its agents."""

    folder: Path
    run: Path  # folder, or the one that it lies in
    name: str  # of the run; of one of several agents NAME/agent_1
    game: str
    algorithm: str
    agent: int  # its place in final_test.json, from 0


def find_curves(path: Path) -> list[Curves]:
    """All below path that belong to runs, sorted."""
    found = []
    for folder in find_event_folders(path):
        agent = re.fullmatch(AGENT, folder.name)
        run = folder.parent if agent else folder
        # A link may have another name than its run, and "." has none.
        match = re.fullmatch(RUN, run.name) or re.fullmatch(RUN, run.resolve().name)
        if match is None:
            continue
        name = match[0]
        number = 1
        if agent:
            name += f"/{folder.name}"
            number = int(agent["number"])
        found.append(Curves(folder, run, name, match["game"], match["algorithm"], number - 1))
    return found


def find_event_folders(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Those that have TensorBoard's files, at any depth. `above` are the folders on the way there, to which a
    link may lead back."""
    here = folder.resolve()
    if here in above:
        return []
    try:
        content = sorted(folder.iterdir())
    except PermissionError:  # what is not the user's has none of the runs
        return []
    found = []
    if any(each.name.startswith("events.out.tfevents.") for each in content):
        found.append(folder)
    for each in content:
        if each.is_dir():
            found += find_event_folders(each, (*above, here))
    return found


def read(args: Args, needed: dict) -> pd.DataFrame:
    """All that is to be drawn, in long form: run, tag, step, value. Raises Failure for a run that was not
    made with the needed settings, and for what is no such CSV."""
    frames = []
    for path in args.paths:
        frame = read_folder(path, args, needed) if path.is_dir() else read_csv(path)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True).drop_duplicates()


def read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)[list(COLUMNS)].astype(COLUMNS)
    except Exception as error:  # pandas has many names for a file that is no such CSV
        reason = str(error).splitlines()[0]
        fail(f"PATHS: {path} is not a CSV with the columns run, tag, step, value: {reason}")


def read_folder(path: Path, args: Args, needed: dict) -> pd.DataFrame:
    """The curves and final tests of all runs below path. A run that is not asked for gets one row without a
    value, which tells `select` that it is there."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what resumed runs leave behind
    rows = []
    for curves in tqdm(find_curves(path), desc=f"reading {path}", disable=None):
        other_game = args.games and curves.game not in args.games
        other_algorithm = args.algorithms and curves.algorithm not in args.algorithms
        if other_game or other_algorithm:
            rows.append((curves.name, "", 0, np.nan))
            continue
        points = read_events(curves, {*args.tags, TEST})
        if points:
            check_settings(curves, needed)
        rows += points
        rows += read_final_test(curves)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def read_events(curves: Curves, tags: set[str]) -> list[tuple]:
    """Rows of the tags. A file that is cut short ends earlier."""
    rows = []
    events = EventAccumulator(str(curves.folder), size_guidance={"scalars": 0}).Reload()
    for tag in sorted(tags & set(events.Tags()["scalars"])):
        for event in events.Scalars(tag):
            rows.append((curves.name, tag, event.step, event.value))
    return rows


def read_final_test(curves: Curves) -> list[tuple]:
    """Rows of the means in final_test.json; none if it is not there or damaged."""
    rows = []
    try:
        content = json.loads((curves.run / "final_test.json").read_text())
        step = int(content["global_step"])
        for kind, result in content["agents"][curves.agent].items():
            rows.append((curves.name, f"final_test/{kind}", step, float(result["mean"])))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return rows


def check_settings(curves: Curves, needed: dict):
    """Raises Failure if the run was made with others."""
    settings = read_settings(curves)
    for name, value in needed.items():
        made_with = settings.get(name, value)
        if made_with != value:
            flag = "--" + name.replace("_", "-")
            fail(f"PATHS: {curves.folder} was made with {flag} {made_with}, and {flag} {value} is needed")


def read_settings(curves: Curves) -> dict:
    """The scripts' flags. Runs of older versions have them with the agent or the checkpoint alone."""
    places = [curves.run / "args.json", curves.folder / "agent.pt", curves.run / "checkpoint.pt"]
    for path in places:
        if path.exists():
            return read_settings_file(path)
    fail(f"PATHS: {curves.run} has no args.json, so its settings cannot be known: move it elsewhere")


def read_settings_file(path: Path) -> dict:
    try:
        if path.suffix == ".json":
            settings = json.loads(path.read_text())
        else:
            import torch  # takes seconds, and few need it

            settings = torch.load(path, map_location="cpu", weights_only=True)["args"]
        return dict(settings)
    except Exception as error:  # torch has many names for a file that is no such file
        reason = str(error).splitlines() or [type(error).__name__]
        fail(f"PATHS: cannot read {path}: {reason[0]}")


def select(data: pd.DataFrame, args: Args, of_algorithms: str = "--algorithms") -> pd.DataFrame:
    """The newest runs of the chosen games and algorithms, with the columns game, algorithm and seed.
    `of_algorithms` is the flag of the command that chose these. Raises Failure if there are none."""
    parts = data.run.str.extract(rf"^{RUN}(?:/{AGENT})?$")
    data = data.join(parts.drop(columns="number").astype({"time": "float64"}))
    data = data[data.game.isin(BOUNDS["hard"])]
    data = choose(data, "game", args.games, "--games")
    data = choose(data, "algorithm", args.algorithms, of_algorithms)
    data = data.dropna()
    if data.empty:
        fail(f"PATHS: no runs with curves in {', '.join(map(str, args.paths))}")
    newest = data.groupby(["game", "algorithm", "seed"]).time.transform("max")
    older = data.run[data.time < newest].str.split("/").str[0]
    for run in sorted(set(older)):
        print(f"left out: {run}, since there is a newer run of this game, algorithm and seed")
    return data[data.time == newest]


def choose(data: pd.DataFrame, column: str, chosen: tuple[str, ...], flag: str) -> pd.DataFrame:
    """The rows that have one of the chosen in the column; all rows where none is chosen."""
    found = sorted(set(data[column]))
    unknown = sorted(set(chosen) - set(found))
    if unknown:
        names = ", ".join(found) or "none"
        fail(f"{flag}: there are no runs of {', '.join(unknown)}, only of {names}")
    if not chosen:
        return data
    return data[data[column].isin(chosen)]


def print_missing(data: pd.DataFrame):
    """What an algorithm lacks that others have, and which of its runs are behind its longest."""
    last = data.groupby(["algorithm", "game", "seed"]).step.max()
    games = sorted(set(data.game))
    seeds = sorted(set(data.seed))
    for algorithm in sorted(set(data.algorithm)):
        longest = last[algorithm].max()
        for game in games:
            for seed in seeds:
                step = last.get((algorithm, game, seed))
                if step is None:
                    print(f"missing: {algorithm} on {game}, seed {seed}")
                elif step < longest:
                    reached = f"{step:,} of {longest:,} steps"
                    print(f"short: {algorithm} on {game}, seed {seed}, is at {reached}")


def label_of(exp_name: str) -> str:
    """ppo_procgen+wide, as benchmark/sweep.py names a variant, is "PPO, wide"; other names stay."""
    known = re.fullmatch(r"(\w+)_procgen(?:\+(.+))?", exp_name)
    if known is None:
        return exp_name
    label = known[1].upper()
    if known[2]:
        label += f", {known[2]}"
    return label


def name_algorithms(data: pd.DataFrame, args: Args) -> dict[str, str]:
    """{exp_name: label} in the order of the legend. Raises Failure if they could not be told apart."""
    names = args.algorithms or sorted(set(data.algorithm))
    if len(names) > MOST_ALGORITHMS:
        listed = ", ".join(names)
        fail(f"--algorithms: at most {MOST_ALGORITHMS} can be told apart, not {listed}")
    labels = args.labels or [label_of(name) for name in names]
    labels = [f" {label}" if label.startswith("_") else label for label in labels]  # else no legend has it
    if len(set(labels)) < len(names):
        fail(f"--labels must differ from each other, not be {', '.join(labels)}")
    return dict(zip(names, labels))


def common_steps(rows: pd.DataFrame, smooth: int, points: int = 200) -> tuple[np.ndarray, pd.DataFrame]:
    """Interpolates the curves of one tag, game and algorithm. Returns the steps (points,) and the values
    (number of seeds, points), nan where a run has none. A seed's value is the mean over its agents."""
    steps = np.linspace(rows.step.min(), rows.step.max(), points)
    seeds = {}
    for (seed, _), curve in rows.groupby(["seed", "run"]):
        values = curve.groupby("step").value.last()
        smoothed = values.rolling(smooth, center=True, min_periods=1).mean()
        agent = np.interp(steps, smoothed.index, smoothed, left=np.nan, right=np.nan)
        seeds.setdefault(seed, []).append(agent)
    means = {seed: np.mean(agents, axis=0) for seed, agents in seeds.items()}
    return steps, pd.DataFrame(means).T


def draw_curves(data: pd.DataFrame, tag: str, labels: dict[str, str], args: Args):
    """A figure of one tag, a panel for each game."""
    rows_of_tag = data[data.tag == tag]
    games = sorted(set(rows_of_tag.game))
    columns = min(4, len(games))
    rows = math.ceil(len(games) / columns)
    size = (max(4.5, 2.6 * columns), 1 + 2.0 * rows)  # the legend needs 4.5
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for game, axis in zip(games, axes.flat):
        axis.set_title(game)
        axis.grid(alpha=0.3)
        of_game = rows_of_tag[rows_of_tag.game == game]
        for number, algorithm in enumerate(labels):
            curves = of_game[of_game.algorithm == algorithm]
            if len(curves) > 0:
                draw_band(axis, curves, f"C{number}", labels[algorithm], args.smooth)
    for axis in axes.flat[len(games) :]:
        axis.remove()
    figure.supxlabel("environment steps of each agent (millions)", fontsize="medium")
    figure.supylabel(AXES.get(tag, tag), fontsize="medium")
    add_legend(figure, list(labels.values()))
    return figure


def draw_band(axis, curves: pd.DataFrame, color: str, label: str, smooth: int):
    """Mean and standard deviation over seeds, of one tag, game and algorithm."""
    steps, values = common_steps(curves, smooth)
    millions = steps / 1e6
    mean = values.mean()
    std = values.std()
    until_the_first_ends = mean.where(values.notna().all())
    marker = "." if len(set(steps)) == 1 else ""
    axis.plot(millions, mean, "--", linewidth=0.8, color=color, marker=marker)
    axis.plot(millions, until_the_first_ends, linewidth=1.4, color=color, marker=marker, label=label)
    axis.fill_between(millions, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)


def add_legend(figure, labels: list[str]):
    """One for all panels, in the order of the labels, of those that are drawn in any."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles[label] = handle
    drawn = [label for label in labels if label in handles]
    lines = [handles[label] for label in drawn]
    longest = max(map(len, drawn), default=0)
    inches = 0.5 + 0.075 * longest  # about, with its line
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.legend(lines, drawn, loc="outside upper center", ncols=columns, frameon=False)


def returns_of(data: pd.DataFrame, labels: dict[str, str]) -> tuple[dict, set]:
    """{label: {game: test returns (number of seeds,)}}, and the (label, game) not all of whose runs have a
    final test."""
    table = {label: {} for label in labels.values()}
    unfinished = set()
    for (algorithm, game), rows in data.groupby(["algorithm", "game"]):
        label = labels[algorithm]
        end = rows.groupby("run").step.transform("max")  # a test before that is of an earlier end
        tests = rows[(rows.tag == FINAL) & (rows.step == end)]
        if tests.run.nunique() < rows.run.nunique():
            unfinished.add((label, game))
            tests = last_common_tests(rows)
        if len(tests) > 0:
            table[label][game] = tests.groupby("seed").value.mean().to_numpy()
    return table, unfinished


def last_common_tests(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run's last test on the way that is not beyond what all runs have reached."""
    tests = rows[rows.tag == TEST].sort_values("step")
    reached = tests.groupby("run").step.max().min()
    return tests[tests.step <= reached].groupby("run").tail(1)


def normalised_scores(returns: dict, unfinished: set, mode: str) -> dict[str, np.ndarray]:
    """{label: scores (number of seeds, number of games)} of the games that all have, and of as many seeds as
    the game with the fewest has. Empty if no game is common to all. returns and unfinished as `returns_of`
    gives them; a label with one of the unfinished games gets a †."""
    tested = [set(table) for table in returns.values()]
    games = sorted(set.intersection(*tested))
    left_out = sorted(set.union(*tested) - set(games))
    if left_out:
        print(f"not in the aggregate, since an algorithm has no test there: {', '.join(left_out)}")
    if not games:
        return {}
    bounds = np.array([BOUNDS[mode][game] for game in games])
    low = bounds[:, 0]
    high = bounds[:, 1]
    scores = {}
    for label, table in returns.items():
        num_seeds = min(len(table[game]) for game in games)
        dropped = sum(len(table[game]) - num_seeds for game in games)
        if dropped > 0:
            print(f"not in the aggregate, since a game has but {num_seeds} seeds: {dropped} runs of {label}")
        if num_seeds == 1:
            print(f"one seed of {label}: no spread, so its intervals mean nothing")
        values = np.stack([table[game][:num_seeds] for game in games], axis=1)
        marked = any((label, game) in unfinished for game in games)
        name = f"{label} †" if marked else label
        scores[name] = (values - low) / (high - low)
    return scores


@dataclass
class Estimates:
    """Of one metric: {label, or pair of labels: (estimate, low and high end of its 95 % interval)}."""

    metric: str
    values: dict[str, tuple[float, float, float]]
    of_pairs: bool = False


def estimate(scores: dict[str, np.ndarray], samples: int) -> list[Estimates]:
    """The metrics of scores as `normalised_scores` gives them. A single algorithm has no pairs."""
    if not scores:
        return []
    pairs = {}
    for one, other in combinations(scores, 2):
        pairs[f"P({other} > {one})"] = (scores[other], scores[one])
    iqm = bootstrap(metrics.aggregate_iqm, scores, samples)
    gap = bootstrap(metrics.aggregate_optimality_gap, scores, samples)
    results = [Estimates("interquartile mean", iqm), Estimates("optimality gap", gap)]
    if pairs:
        improvement = bootstrap(metrics.probability_of_improvement, pairs, samples)
        results.append(Estimates("probability of improvement", improvement, of_pairs=True))
    return results


def bootstrap(metric, scores: dict, samples: int) -> dict[str, tuple[float, float, float]]:
    """The values of Estimates."""
    np.random.seed(0)  # rliable draws from numpy's global generator, whatever random_state it is given
    points, intervals = library.get_interval_estimates(scores, metric, reps=samples)
    values = {}
    for key, point in points.items():
        low, high = intervals[key][:, 0]
        values[key] = (float(point), low, high)
    return values


def draw_aggregate(estimates: list[Estimates]):
    """A figure with a panel for each metric: the estimates and their 95 % intervals."""
    most = max(len(each.values) for each in estimates)
    size = (3.6 * len(estimates), 1.3 + 0.35 * most)
    figure, axes = plt.subplots(1, len(estimates), figsize=size, layout="constrained")
    for axis, each in zip(axes, estimates):
        for row, (point, low, high) in enumerate(each.values.values()):
            color = "0.3" if each.of_pairs else f"C{row}"
            axis.plot([low, high], [row, row], color=color, linewidth=9, alpha=0.4, solid_capstyle="butt")
            axis.plot(point, row, "|", color=color, markersize=12, markeredgewidth=2)
        axis.set_yticks(range(len(each.values)), each.values)
        axis.set_ylim(len(each.values) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(each.metric)
        axis.set_xlabel("normalised test score")
        if each.of_pairs:
            axis.set_xlabel("probability")
            axis.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
            axis.set_xlim(-0.04, 1.04)
    return figure


def save(figure, name: str, args: Args):
    """Writes NAME.pdf and NAME.png to --output, and closes the figure."""
    for suffix in ("pdf", "png"):
        with replacing("--output", args.output / f"{name}.{suffix}") as path:
            figure.savefig(path, dpi=200)
    plt.close(figure)


def make_table(returns: dict, unfinished: set, estimates: list[Estimates], mode: str) -> str:
    """Markdown: the test return by game and algorithm, and the metrics of the normalised scores."""
    rows = [["test return", *returns], ["---"] * (len(returns) + 1)]
    for game in sorted(set().union(*returns.values())):
        row = [game]
        for label, table in returns.items():
            cell = make_cell(table[game]) if game in table else "missing"
            if (label, game) in unfinished and game in table:
                cell += " †"
            row.append(cell)
        rows.append(row)
    pairs = []
    for each in estimates:
        if each.of_pairs:
            pairs.append(each)
        else:
            row = [each.metric]
            for name, values in each.values.items():
                mark = " †" if name.endswith("†") else ""
                row.append("{:.3f} [{:.3f}, {:.3f}]".format(*values) + mark)
            rows.append(row)

    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.append("")
    lines.append("Mean ± standard deviation over seeds (number of seeds) of the final test on the full")
    lines.append("distribution. Agents that learned together are one seed, its return their mean.")
    if unfinished:
        lines.append("†: not all have a final test; this is the last test that all of them have reached, and")
        lines.append("to compare it with a final test, or with another step, says nothing.")
    if estimates:
        intervals = "in brackets 95 % stratified bootstrap intervals"
        lines.append(f"Scores: normalised for {mode} levels; {intervals}.")
    for each in pairs:
        for name, values in each.values.items():
            lines.append("")
            lines.append("{} = {:.2f} [{:.2f}, {:.2f}]".format(name, *values))
    return "\n".join(lines) + "\n"


def make_cell(values: np.ndarray) -> str:
    cell = f"{values.mean():.2f}"
    if len(values) > 1:
        cell += f" ± {values.std(ddof=1):.2f}"
    return f"{cell} ({len(values)})"


def main(args: Args):
    check_folder("--output", args.output)
    if args.csv:
        check_folder("--csv", args.csv.parent)
    everything = read(args, {"distribution_mode": args.distribution_mode})
    data = select(everything, args)
    labels = name_algorithms(data, args)
    print_missing(data)
    if args.csv:
        with replacing("--csv", args.csv) as path:
            everything.dropna().to_csv(path, index=False, float_format="%.7g")

    for tag in args.tags:
        if (data.tag == tag).any():
            name = AXES.get(tag, tag).replace(" ", "_").replace("/", "_")
            save(draw_curves(data, tag, labels, args), name, args)
        else:
            print(f"missing: {tag}, in all runs")
    returns, unfinished = returns_of(data, labels)
    scores = normalised_scores(returns, unfinished, args.distribution_mode)
    estimates = estimate(scores, args.bootstrap)
    if estimates:
        save(draw_aggregate(estimates), "aggregate", args)

    table = make_table(returns, unfinished, estimates, args.distribution_mode)
    with replacing("--output", args.output / "table.md") as path:
        path.write_text(table, encoding="utf-8")
    print(table)
    print(f"figures: {args.output}")


def set_style():
    plt.switch_backend("agg")  # no display is needed
    plt.style.use("petroff10")  # ten colours that the colour-blind can tell apart
    plt.rcParams["font.size"] = 9
    plt.rcParams["axes.titlesize"] = 10
    plt.rcParams["pdf.fonttype"] = 42  # text stays text in the PDF


if __name__ == "__main__":
    set_style()
    run_tool(main, Args, __doc__)
