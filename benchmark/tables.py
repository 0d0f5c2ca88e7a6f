"""Tables of final tests, with 95 % intervals over seeds: what each algorithm reaches on its training levels
and on the full distribution, its gap, and how far it is from the first algorithm. With --robustness, also
how robust each is, and whether robust agents are those with a small gap.

Reads run folders, and CSV files that figures.py wrote. The exp_name of a run is its algorithm. Agents that
learned together count as one seed, with their mean; in a correlation each is a point, and seeds are
resampled. Where there are too few seeds for an interval, its limits are nan.

    python benchmark/tables.py runs --algorithms ppo_procgen mdpo_procgen
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import runs
import tyro
from helpers import fail, replacing
from scipy.stats import rankdata, ttest_1samp
from scipy.stats import t as student

MEASURES = {"train": "training levels", "test": "full distribution", "gap": "gap"}
DISTANCES = {  # columns of robustness_eval.py's results.csv, of which older files lack the last
    "kl_mean": "KL",
    "kl_per_entropy": "KL / missing entropy",
    "tv_mean": "total variation",
    "encoding_shift_mean": "encoding shift",
}
RATIOS = ("kl_mean", "kl_per_entropy")  # which are skewed
NUM_ACTIONS = 15  # Procgen's
RESAMPLES = 2000  # of the bootstrap
FEWEST_OF_A_MEAN = 3  # trainings that have an interval
FEWEST_OF_A_CORRELATION = 5
NOTE = """In parentheses 95 % intervals over seeds: Student's for means and with --paired, Welch's for other
differences and the logarithms of ratios, by bootstrap for correlations; none where there are too few seeds.
A star is a difference that is significant at 5 % after Holm's correction over its algorithm's rows.
"""


class Interval(NamedTuple):
    """A number, its 95 % interval over trainings, and how likely one so far from 0 is by chance. NaN for what
    there are too few trainings to say."""

    middle: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.middle:.3f}"
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_interval(values: np.ndarray) -> Interval:
    """Student's, of the values of trainings, (number of trainings,)."""
    if len(values) < FEWEST_OF_A_MEAN:
        return Interval(values.mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all the same
        test = ttest_1samp(values, 0)
        low, high = test.confidence_interval(0.95)
    return Interval(values.mean(), low, high, test.pvalue)


def difference_interval(*pairs: tuple[np.ndarray, np.ndarray]) -> Interval:
    """Of the difference of the means of two methods, Welch's, or of its mean over several pairs. All
    trainings are independent. Each array is (number of trainings,), which may differ."""
    middle = np.mean([values.mean() - of_baseline.mean() for values, of_baseline in pairs])
    sizes = np.array([len(values) for pair in pairs for values in pair])
    if min(sizes) < FEWEST_OF_A_MEAN:
        return Interval(middle)
    variances = [values.var(ddof=1) for pair in pairs for values in pair]
    squares = np.array(variances) / sizes
    if not squares.any():
        return Interval(middle)
    error = math.sqrt(squares.sum()) / len(pairs)
    freedom = squares.sum() ** 2 / (squares**2 / (sizes - 1)).sum()
    low, high = student.interval(0.95, freedom, middle, error)
    p = 2 * student.sf(abs(middle) / error, freedom)
    return Interval(middle, low, high, p)


def ratio_interval(values: np.ndarray, of_baseline: np.ndarray) -> Interval:
    """Of the ratio of geometric means, for what is skewed: difference_interval of logarithms. NaN if a value
    is not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        *interval, p = difference_interval((np.log(values), np.log(of_baseline)))
    return Interval(*np.exp(interval), p)


def star_holm(intervals: list[Interval]) -> list[str]:
    """A star for those that differ from 0, as a ratio from 1, at 5 % after Holm's correction over all of them
    (Holm 1979)."""
    p_values = [interval.p for interval in intervals if not np.isnan(interval.p)]
    significant = 0  # how many of the smallest
    for rank, p in enumerate(sorted(p_values)):
        if p * (len(p_values) - rank) > 0.05:
            break
        significant = rank + 1
    starred = sorted(p_values)[:significant]
    return [f"{interval} *" if interval.p in starred else str(interval) for interval in intervals]


def rank_correlation(measures: np.ndarray, groups: np.ndarray) -> float:
    """Spearman's, of two measures of agents, (2, number of agents). The ranks are centred on each of the
    groups, (number of agents,), so that agents are compared within groups. NaN if a measure has one value
    only."""
    ranks = rankdata(measures, axis=1)
    sizes = np.bincount(groups)
    centred = [row - (np.bincount(groups, row) / sizes.clip(1))[groups] for row in ranks]
    if min(map(np.ptp, centred)) == 0:
        return np.nan
    return np.corrcoef(centred)[0, 1]


def correlation_interval(agents: pd.DataFrame, names: tuple[str, str], training, group=()) -> Interval:
    """Of rank_correlation of two columns, by the bootstrap: trainings, which the columns `training` tell
    apart, are resampled with all their agents, which are not independent. The columns `group` are the groups.
    Samples without a correlation are left out."""
    measures = agents[list(names)].to_numpy().T
    groups = np.zeros(len(agents), int)
    if group:
        groups = agents.groupby(list(group)).ngroup().to_numpy()
    middle = rank_correlation(measures, groups)
    members = list(agents.groupby(training).indices.values())
    if len(members) < FEWEST_OF_A_CORRELATION or np.isnan(middle):
        return Interval(middle)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[each] for each in chosen])
        samples.append(rank_correlation(measures[:, rows], groups[rows]))
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
    paired: bool = False
    """compare runs of the same seed, where a seed chooses something that all algorithms share"""
    output: Path = Path("tables.md")
    """file for the tables"""

    def __post_init__(self):
        super().__post_init__()
        if self.output.is_dir():
            raise ValueError(f"--output must be a file, and {self.output} is a folder")


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
    """A row for each perturbation of each agent: perturbation, run and the DISTANCES that the file has. An
    agent that plays nearly at random is robust whatever it sees, so one of them is KL over what its entropy
    lacks of the largest."""
    try:
        table = pd.read_csv(path)
        table = table[table.checkpoint != "all"]  # which is a mean over agents
        missing = math.log(NUM_ACTIONS) - table["entropy_mean"].astype(float)
        table = table.assign(kl_per_entropy=table.kl_mean.astype(float) / missing)
        distances = [name for name in DISTANCES if name in table]
        columns = ["perturbation", "checkpoint", *distances]
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


def in_order(agents: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """By game, and then as the labels are."""
    place = agents.algorithm.map(list(labels).index)
    return agents.assign(place=place).sort_values(["game", "place", "seed"], kind="stable", ignore_index=True)


def seed_values(agents: pd.DataFrame, name: str) -> pd.Series:
    """One column of an algorithm's agents, by seed: the mean over agents that learned together."""
    return agents.groupby("seed")[name].mean()


def compare(ours: pd.Series, theirs: pd.Series, ratio: bool, paired: bool) -> Interval:
    """Values by seed: how far ours are from theirs, or how many times as large."""
    if not paired:
        pair = ours.to_numpy(), theirs.to_numpy()
        return ratio_interval(*pair) if ratio else difference_interval(pair)
    if not ratio:
        return mean_interval((ours - theirs).dropna().to_numpy())
    *interval, p = mean_interval(np.log(ours / theirs).dropna().to_numpy())
    return Interval(*np.exp(interval), p)


def mean_table(agents: pd.DataFrame, labels: dict[str, str], titles: dict[str, str], keys: list[str]) -> str:
    """The columns of titles of each algorithm, for each value of the columns `keys`."""
    rows = [[*keys, "algorithm", "seeds", *titles.values()]]
    for key, group in agents.groupby([*keys, "algorithm"], sort=False):
        *values, algorithm = key
        intervals = [str(mean_interval(seed_values(group, name).to_numpy())) for name in titles]
        rows.append([*values, labels[algorithm], str(group.seed.nunique()), *intervals])
    return markdown(rows)


def comparison_table(
    agents: pd.DataFrame, labels: dict[str, str], titles: dict[str, str], keys: list[str], paired: bool
) -> str:
    """How far each algorithm is from the first of the labels in the columns of titles, for each value of the
    columns `keys`, over which Holm corrects."""
    first, *others = labels
    of = labels[first]
    heads = [f"{title} / {of}'s" if name in RATIOS else f"{title} - {of}'s" for name, title in titles.items()]
    rows = [["algorithm", *keys, *heads]]
    for algorithm in others:
        found = []
        columns = {name: [] for name in titles}
        for key, group in agents.groupby(keys, sort=False):
            ours = group[group.algorithm == algorithm]
            theirs = group[group.algorithm == first]
            if ours.empty or theirs.empty:
                continue
            found.append([labels[algorithm], *key])
            for name in titles:
                pair = seed_values(ours, name), seed_values(theirs, name)
                columns[name].append(compare(*pair, name in RATIOS, paired))
        starred = zip(*(star_holm(column) for column in columns.values()))
        rows += [[*head, *cells] for head, cells in zip(found, starred)]
    if len(rows) == 1:
        return f"Nothing to compare with {of}.\n"
    return markdown(rows)


def correlation_table(agents: pd.DataFrame, titles: dict[str, str]) -> str:
    """Over all agents the rank correlation of each distance with each of the MEASURES, and with the gap among
    agents of one algorithm."""
    rows = [["perturbation", "change", "agents", "seeds", *MEASURES.values(), "gap, within algorithms"]]
    training = ["algorithm", "seed"]
    for perturbation, group in agents.groupby("perturbation", sort=False):
        counts = [str(len(group)), str(group.groupby(training).ngroups)]
        for name, title in titles.items():
            intervals = [correlation_interval(group, (name, measure), training) for measure in MEASURES]
            intervals.append(correlation_interval(group, (name, "gap"), training, ["algorithm"]))
            rows.append([perturbation, title, *counts, *map(str, intervals)])
    return markdown(rows)


def robustness_tables(
    agents: pd.DataFrame, robustness: pd.DataFrame, labels: dict[str, str], paired: bool
) -> str:
    """How much the policies change, and whether that goes with the gap. Prints which agents are not in the
    table of robustness."""
    joined = agents.merge(robustness, on="run")
    for run in sorted(set(agents.run) - set(joined.run)):
        print(f"left out of what follows on robustness: {run}, which is not in --robustness")
    if joined.empty:
        return "No agent of --robustness has a final test here.\n"
    titles = {name: title for name, title in DISTANCES.items() if name in joined}
    text = "## How much policy and encoding change\n\n"
    keys = ["game", "perturbation"]
    text += f"{mean_table(joined, labels, titles, keys)}\n"
    text += f"{comparison_table(joined, labels, titles, keys, paired)}\n"
    for game, group in joined.groupby("game"):
        text += f"## Rank correlation of that change with the returns and the gap: {game}\n\n"
        changes = {name: title for name, title in titles.items() if name != "kl_per_entropy"}
        text += f"{correlation_table(group, changes)}\n"
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
    agents = in_order(agents, labels)
    tables = f"## Returns\n\n{mean_table(agents, labels, MEASURES, ['game'])}\n"
    tables += f"{comparison_table(agents, labels, MEASURES, ['game'], args.paired)}\n"
    if robustness is not None:
        tables += robustness_tables(agents, robustness, labels, args.paired)
    tables += NOTE
    with replacing(args.output) as path:
        path.write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
