"""Tables of final tests, with 95 % intervals over seeds: what each algorithm reaches on its training levels
and on the full distribution, its gap, and how far it is from the first algorithm. With --robustness, also
how robust each is, and whether robust agents are those with a small gap.

Reads run folders, and CSV files that figures.py wrote. The exp_name of a run is its algorithm. Agents that
learned together count as one seed, with their mean; in a correlation each is a point, and seeds are
resampled. Where there are too few seeds for an interval, its limits are nan.

    python benchmark/final_tests.py runs --algorithms ppo_procgen mdpo_procgen
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import figures
import numpy as np
import pandas as pd
import tyro
from helpers import check_folder, fail, replacing, run_tool
from intervals import correlation_interval, difference_interval, markdown, mean_interval

TAGS = {"final_test/training_levels": "train", "final_test/full_distribution": "test"}
MEASURES = {  # columns of find_agents, and what the tables call them
    "train": "training levels",
    "test": "full distribution",
    "gap": "gap",
}
DISTANCES = {  # columns of robustness_eval.py's results.csv
    "kl_mean": "KL",
    "tv_mean": "total variation",
    "encoding_shift_mean": "encoding shift",
}
NEW_DISTANCES = ["encoding_shift_mean"]  # which older tables lack


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders with runs below them, or CSV files"""
    algorithms: tuple[str, ...] = ()
    """exp_names, of which the first is what the others are compared with; by default all with a final test,
    sorted"""
    labels: tuple[str, ...] = ()
    """their names in the tables, as many"""
    games: tuple[str, ...] = ()
    """by default all that there are"""
    distribution_mode: Literal["hard", "easy"] = "hard"
    """of the runs"""
    robustness: Path | None = None
    """results.csv of robustness_eval.py, of the same runs"""
    output: Path = Path("final_tests.md")
    """file for the tables"""

    def __post_init__(self):
        self.for_figures()
        if self.output.name in ("", "..") or self.output.is_dir():
            raise ValueError(f"--output must be a file, not {self.output}")

    def for_figures(self) -> figures.Args:
        """What figures.py reads the same runs by. Raises ValueError for flags that do not fit."""
        return figures.Args(
            paths=self.paths,
            algorithms=self.algorithms,
            labels=self.labels,
            games=self.games,
            tags=(figures.TRAIN,),  # which says where a run ends
        )


def find_agents(data: pd.DataFrame) -> pd.DataFrame:
    """A row for each agent with a final test at the end of its run: game, algorithm, seed, run and the
    MEASURES. Prints which agents have none. Failure if all have none."""
    end = data.groupby("run").step.transform("max")  # a test before that is of an earlier end
    finals = data[(data.step == end) & data.tag.isin(TAGS)]
    keys = ["game", "algorithm", "seed", "run"]
    agents = finals.pivot_table(index=keys, columns="tag", values="value").reindex(columns=TAGS).dropna()
    agents = agents.rename(columns=TAGS).reset_index()
    if agents.empty:
        fail("PATHS: no run has a final test at its end")
    for run in sorted(set(data.run) - set(agents.run)):
        print(f"left out: {run}, which has no final test")
    agents["gap"] = agents.train - agents.test
    return agents


def seed_values(agents: pd.DataFrame, algorithm: str, name: str) -> np.ndarray:
    """One of the MEASURES of an algorithm, (number of seeds,): the mean over agents that learned together."""
    rows = agents[agents.algorithm == algorithm]
    return rows.groupby("seed")[name].mean().to_numpy()


def return_table(agents: pd.DataFrame, labels: dict[str, str]) -> str:
    """Of one game."""
    rows = [["algorithm", "seeds", *MEASURES.values()]]
    for algorithm, label in labels.items():
        number = agents.seed[agents.algorithm == algorithm].nunique()
        if number == 0:
            continue
        row = [label, str(number)]
        for name in MEASURES:
            row.append(str(mean_interval(seed_values(agents, algorithm, name))))
        rows.append(row)
    return markdown(rows)


def difference_table(agents: pd.DataFrame, labels: dict[str, str]) -> str:
    """Of one game, from the first of the labels."""
    rows = [["algorithm", *MEASURES.values()]]
    first, *others = labels
    tested = set(agents.algorithm)
    if first not in tested:
        return f"{labels[first]} has no final test here.\n"
    for algorithm in others:
        if algorithm not in tested:
            continue
        row = [labels[algorithm]]
        for name in MEASURES:
            values = seed_values(agents, algorithm, name)
            baseline = seed_values(agents, first, name)
            row.append(str(difference_interval(values, baseline)))
        rows.append(row)
    if len(rows) == 1:
        return "Nothing to compare.\n"
    return markdown(rows)


def read_robustness(path: Path) -> pd.DataFrame:
    """A row for each perturbation of each agent: perturbation, run, and those of the DISTANCES that it has.
    Failure if it is no table of robustness_eval.py, or has an agent twice."""
    types = {"perturbation": str, "checkpoint": str} | dict.fromkeys(DISTANCES, float)
    try:
        table = pd.read_csv(path, keep_default_na=False)
        for name in NEW_DISTANCES:
            if name not in table:
                del types[name]
        table = table[list(types)].astype(types)
    except Exception as error:  # pandas has many names for a file that is no such CSV
        reason = str(error).splitlines()[0]
        fail(f"--robustness: {path} is not a table of robustness_eval.py: {reason}")
    table = table[table.checkpoint != "all"]  # which is a mean over agents
    runs = [run_of(Path(checkpoint)) for checkpoint in table.checkpoint]
    table = table.assign(run=runs)
    twice = table[table.duplicated(["perturbation", "run"])]
    if len(twice) > 0:
        fail(f"--robustness: {path} has {twice.run.iloc[0]} twice")
    return table


def distances_in(robustness: pd.DataFrame) -> dict[str, str]:
    """Those of the DISTANCES that the table has."""
    return {name: title for name, title in DISTANCES.items() if name in robustness}


def run_of(checkpoint: Path) -> str:
    """As figures.py names the run that an agent.pt lies in."""
    folder = checkpoint.parent
    if folder.name.startswith("agent_"):
        return f"{folder.parent.name}/{folder.name}"
    return folder.name


def correlation_table(agents: pd.DataFrame, robustness: pd.DataFrame) -> str:
    """Of one game: rank correlation of each distance with each of the MEASURES, over the agents of all
    algorithms. Prints which agents are not in the table of robustness."""
    joined = agents.merge(robustness, on="run")
    if joined.empty:
        return "No agent of --robustness has a final test here.\n"
    for run in sorted(set(agents.run) - set(joined.run)):
        print(f"left out of what follows on robustness: {run}, which is not in --robustness")
    rows = [["perturbation", "change", "agents", "seeds", *MEASURES.values()]]
    for perturbation, group in joined.groupby("perturbation", sort=False):
        trainings = [training for _, training in group.groupby(["algorithm", "seed"])]
        for distance, title in distances_in(robustness).items():
            row = [perturbation, title, str(len(group)), str(len(trainings))]
            for measure in MEASURES:
                columns = [training[[distance, measure]].to_numpy().T for training in trainings]
                row.append(str(correlation_interval(columns)))
            rows.append(row)
    return markdown(rows)


def distance_table(agents: pd.DataFrame, robustness: pd.DataFrame, labels: dict[str, str]) -> str:
    """Of one game: how much each algorithm's policy changes, and how far that is from the first of the
    labels."""
    joined = agents.merge(robustness, on="run")
    if joined.empty:
        return "No agent of --robustness has a final test here.\n"
    first = next(iter(labels))
    distances = distances_in(robustness)
    differences = [f"{title} - {labels[first]}'s" for title in distances.values()]
    rows = [["perturbation", "algorithm", "seeds", *distances.values(), *differences]]
    for perturbation, group in joined.groupby("perturbation", sort=False):
        tested = set(group.algorithm)
        for algorithm, label in labels.items():
            if algorithm not in tested:
                continue
            number = group.seed[group.algorithm == algorithm].nunique()
            row = [perturbation, label, str(number)]
            for name in distances:
                row.append(str(mean_interval(seed_values(group, algorithm, name))))
            for name in distances:
                if algorithm == first or first not in tested:
                    row.append("")
                    continue
                values = seed_values(group, algorithm, name)
                baseline = seed_values(group, first, name)
                row.append(str(difference_interval(values, baseline)))
            rows.append(row)
    table = markdown(rows)
    if first not in set(joined.algorithm):
        table += f"\n{labels[first]}, to compare with, has no final test here that is in --robustness.\n"
    return table


def make_tables(agents: pd.DataFrame, labels: dict[str, str], robustness: pd.DataFrame | None) -> str:
    """Markdown, game after game."""
    baseline = next(iter(labels.values()))
    parts = []
    for game, of_game in agents.groupby("game"):
        parts.append(f"## {game}\n\n{return_table(of_game, labels)}")
        parts.append(f"Difference from {baseline}:\n\n{difference_table(of_game, labels)}")
        if robustness is not None:
            distances = distance_table(of_game, robustness, labels)
            parts.append(f"How much policy and encoding change:\n\n{distances}")
            correlations = correlation_table(of_game, robustness)
            title = "Rank correlation of that change with the returns and the gap"
            parts.append(f"{title}:\n\n{correlations}")
    intervals = "Student's for means, Welch's for differences, by bootstrap for correlations"
    parts.append(f"In parentheses 95 % intervals over seeds: {intervals}.\n")
    return "\n".join(parts)


def main(args: Args):
    check_folder("--output", args.output.parent)
    robustness = read_robustness(args.robustness) if args.robustness else None
    options = args.for_figures()
    data = figures.select(figures.read(options, {"distribution_mode": args.distribution_mode}), options)
    labels = figures.name_algorithms(data, options)
    agents = find_agents(data)
    if not args.algorithms:
        tested = set(agents.algorithm)
        labels = {algorithm: label for algorithm, label in labels.items() if algorithm in tested}
    figures.print_missing(data)
    tables = make_tables(agents, labels, robustness)
    with replacing("--output", args.output) as path:
        path.write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    run_tool(main, Args, __doc__)
