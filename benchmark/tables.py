"""Tables of final tests, with 95 % intervals over seeds: what each algorithm reaches on its training levels
and on the full distribution, its gap, and how far it is from the first algorithm. With --robustness, also
how robust each is, and whether robust agents are those with a small gap.

Reads run folders, and CSV files that figures.py wrote. The exp_name of a run is its algorithm. Agents that
learned together count as one seed, with their mean; in a correlation each is a point, and seeds are
resampled. Where there are too few seeds for an interval, its limits are nan.

    python benchmark/tables.py runs --algorithms ppo_procgen mdpo_procgen
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import runs
import tyro
from helpers import fail, replacing
from scipy.stats import rankdata, ttest_1samp, ttest_ind

MEASURES = {"train": "training levels", "test": "full distribution", "gap": "gap"}
DISTANCES = {  # columns of robustness_eval.py's results.csv, of which older files lack the last
    "kl_mean": "KL",
    "tv_mean": "total variation",
    "encoding_shift_mean": "encoding shift",
}
RESAMPLES = 2000  # of the bootstrap
FEWEST = 5  # trainings from which the bootstrap says something


class Interval(NamedTuple):
    """A number and its 95 % interval over trainings."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(values: np.ndarray) -> Interval:
    """Student's, of the values of trainings, (number of trainings,). NaN for the limits of one value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one value, or of values that are all the same
        low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return Interval(values.mean(), low, high)


def difference_interval(values: np.ndarray, of_baseline: np.ndarray) -> Interval:
    """Of the difference of the means of two methods, Welch's: their seeds have nothing in common. Both are
    (number of trainings,), which may differ. NaN for the limits if either is one value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        low, high = ttest_ind(values, of_baseline, equal_var=False).confidence_interval(0.95)
    return Interval(values.mean() - of_baseline.mean(), low, high)


def rank_correlation(trainings: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Spearman's, of two measures of the agents of each training, both (number of agents,). NaN if either has
    one value only."""
    measures = np.concatenate(trainings, axis=1)
    if np.ptp(measures, axis=1).min() == 0:
        return np.nan
    ranks = rankdata(measures, axis=1)
    return np.corrcoef(ranks)[0, 1]


def correlation_interval(trainings: list[tuple[np.ndarray, np.ndarray]]) -> Interval:
    """Of rank_correlation, by the bootstrap: trainings are resampled, with all their agents, which are not
    independent. NaN for the limits of fewer than FEWEST trainings, and where there is no correlation. Samples
    that have none are left out."""
    middle = rank_correlation(trainings)
    if len(trainings) < FEWEST or np.isnan(middle):
        return Interval(middle, np.nan, np.nan)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(RESAMPLES):
        rows = rng.integers(len(trainings), size=len(trainings))
        samples.append(rank_correlation([trainings[row] for row in rows]))
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return Interval(middle, low, high)


def markdown(rows: list[list[str]]) -> str:
    """A table, of which the first row is the head."""
    head, *body = rows
    rule = ["---"] * len(head)
    text = ""
    for row in [head, rule, *body]:
        text += f"| {' | '.join(row)} |\n"
    return text


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args(runs.Choice):
    robustness: Path | None = None
    """results.csv of robustness_eval.py, of the same runs"""
    output: Path = Path("tables.md")
    """file for the tables"""


def find_agents(data: pd.DataFrame) -> pd.DataFrame:
    """A row for each agent with a final test at the end of its run: game, algorithm, seed, run and the
    MEASURES. Prints which agents have none."""
    end = data.groupby("run").step.transform("max")  # a test before that is of an earlier end
    columns = {runs.FINAL_TRAIN: "train", runs.FINAL_TEST: "test"}
    tests = data[data.step == end]
    keys = ["game", "algorithm", "seed", "run"]
    agents = tests.pivot_table(index=keys, columns="tag", values="value")
    agents = agents.reindex(columns=columns).dropna()
    agents = agents.rename(columns=columns).reset_index()
    for run in sorted(set(data.run) - set(agents.run)):
        print(f"left out: {run}, which has no final test")
    return agents.assign(gap=agents.train - agents.test)


def read_robustness(path: Path) -> pd.DataFrame:
    """A row for each perturbation of each agent: perturbation, run and the DISTANCES that the file has."""
    try:
        table = pd.read_csv(path)
        table = table[table.checkpoint != "all"]  # which is a mean over agents
        distances = [name for name in DISTANCES if name in table]
        columns = ["perturbation", "checkpoint", "kl_mean", *distances[1:]]
        table = table[columns].astype(dict.fromkeys(distances, float))
    except (OSError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        fail(f"--robustness: {path} is not a table of robustness_eval.py: {reason}")
    table["run"] = [run_of(Path(checkpoint)) for checkpoint in table.checkpoint]
    twice = table[table.duplicated(["perturbation", "run"])]
    if len(twice) > 0:
        fail(f"--robustness: {path} has {twice.run.iloc[0]} twice")
    return table


def run_of(checkpoint: Path) -> str:
    """As runs.py names the run that an agent.pt lies in."""
    folder = checkpoint.parent
    if folder.name.startswith("agent_"):
        return f"{folder.parent.name}/{folder.name}"
    return folder.name


def seed_values(agents: pd.DataFrame, algorithm: str, name: str) -> np.ndarray:
    """One column of an algorithm's agents, (number of seeds,): the mean over agents that learned together."""
    rows = agents[agents.algorithm == algorithm]
    return rows.groupby("seed")[name].mean().to_numpy()


class Row(NamedTuple):
    """Of an algorithm."""

    label: str
    seeds: str
    means: list[str]
    differences: list[
        str
    ]  # from the first of the labels; empty strings in its own row, or if it is not there


def make_rows(agents: pd.DataFrame, labels: dict[str, str], names: list[str]) -> list[Row]:
    """Intervals of the named columns, for each algorithm that has agents."""
    first = next(iter(labels))
    tested = set(agents.algorithm)
    rows = []
    for algorithm, label in labels.items():
        if algorithm not in tested:
            continue
        means = []
        differences = []
        for name in names:
            values = seed_values(agents, algorithm, name)
            means.append(str(mean_interval(values)))
            difference = ""
            if algorithm != first and first in tested:
                baseline = seed_values(agents, first, name)
                difference = str(difference_interval(values, baseline))
            differences.append(difference)
        rows.append(Row(label, str(len(values)), means, differences))
    return rows


def return_tables(agents: pd.DataFrame, labels: dict[str, str]) -> str:
    """Of one game: returns and gap, and how far they are from those of the first of the labels."""
    returns = [["algorithm", "seeds", *MEASURES.values()]]
    differences = [["algorithm", *MEASURES.values()]]
    first, baseline = next(iter(labels.items()))
    for row in make_rows(agents, labels, list(MEASURES)):
        returns.append([row.label, row.seeds, *row.means])
        if row.label != baseline:
            differences.append([row.label, *row.differences])
    comparison = markdown(differences)
    if first not in set(agents.algorithm):
        comparison = f"{baseline} has no final test here.\n"
    elif len(differences) == 1:
        comparison = "Nothing to compare.\n"
    return f"{markdown(returns)}\nDifference from {baseline}:\n\n{comparison}"


def robustness_tables(agents: pd.DataFrame, robustness: pd.DataFrame, labels: dict[str, str]) -> str:
    """Of one game: how much each algorithm's policy changes, how far that is from the first of the labels,
    and over all agents the rank correlation of each distance with each of the MEASURES. Prints which agents
    are not in the table of robustness."""
    joined = agents.merge(robustness, on="run")
    if joined.empty:
        return "No agent of --robustness has a final test here.\n"
    for run in sorted(set(agents.run) - set(joined.run)):
        print(f"left out of what follows on robustness: {run}, which is not in --robustness")
    first, baseline = next(iter(labels.items()))
    names = [name for name in DISTANCES if name in robustness]
    titles = [DISTANCES[name] for name in names]
    differences = [f"{title} - {baseline}'s" for title in titles]
    changes = [["perturbation", "algorithm", "seeds", *titles, *differences]]
    correlations = [["perturbation", "change", "agents", "seeds", *MEASURES.values()]]
    for perturbation, group in joined.groupby("perturbation", sort=False):
        for row in make_rows(group, labels, names):
            changes.append([perturbation, row.label, row.seeds, *row.means, *row.differences])
        trainings = [training for _, training in group.groupby(["algorithm", "seed"])]
        counts = [str(len(group)), str(len(trainings))]
        for name, title in zip(names, titles):
            intervals = []
            for measure in MEASURES:
                columns = [training[[name, measure]].to_numpy().T for training in trainings]
                intervals.append(str(correlation_interval(columns)))
            correlations.append([perturbation, title, *counts, *intervals])
    text = f"How much policy and encoding change:\n\n{markdown(changes)}\n"
    if first not in set(joined.algorithm):
        text += f"{baseline}, to compare with, has no final test here that is in --robustness.\n\n"
    text += f"Rank correlation of that change with the returns and the gap:\n\n{markdown(correlations)}"
    return text


def main(args: Args):
    robustness = read_robustness(args.robustness) if args.robustness else None
    tags = [runs.TRAIN, runs.TEST]  # they say where a run ends
    data = runs.read_runs(args, tags, needed={})
    agents = find_agents(data)
    if agents.empty:
        fail("no run has a final test at its end")
    labels = runs.name_algorithms(data if args.algorithms else agents, args)
    runs.print_missing(data)
    parts = []
    for game, of_game in agents.groupby("game"):
        parts.append(f"## {game}\n\n{return_tables(of_game, labels)}")
        if robustness is not None:
            parts.append(robustness_tables(of_game, robustness, labels))
    intervals = "Student's for means, Welch's for differences, by bootstrap for correlations"
    parts.append(f"In parentheses 95 % intervals over seeds: {intervals}.\n")
    tables = "\n".join(parts)
    with replacing(args.output) as path:
        path.write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
