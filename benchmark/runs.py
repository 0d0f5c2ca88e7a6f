"""All reading of runs: their curves, settings and final tests, from their folders or from CSV files.

A run is a folder {env_id}__{exp_name}__{seed}__{unix_time}, at any depth below a given one and through links.
exp_name is its algorithm. Of several runs of one game, algorithm and seed the newest counts. Agents that
learned together have a folder each in it, agent_1 and so on, and are one seed.
"""

import glob
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from helpers import fail
from procgen.env import ENV_NAMES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

TRAIN = "charts/episodic_return"
TEST = "charts/test_episodic_return"
GAP = "charts/generalization_gap"
FINAL_TRAIN = "final_test/training_levels"
FINAL_TEST = "final_test/full_distribution"

NAME = r"(?P<game>[a-z]+)__(?P<algorithm>.+)__(?P<seed>\d+)__(?P<time>\d+)(?:/agent_\d+)?"
COLUMNS = {"run": str, "tag": str, "step": "int64", "value": "float64"}


@dataclass
class Choice:
    """The flags that say which runs are read, and what they are called."""

    paths: tuple[Path, ...]
    """folders with runs below them, or CSV files that figures.py wrote"""
    algorithms: tuple[str, ...] = ()
    """exp_names in the order to show them, by default all, sorted; others are compared with the first"""
    labels: tuple[str, ...] = ()
    """what to call them, as many"""
    games: tuple[str, ...] = ()
    """by default all that there are"""
    distribution_mode: Literal["hard", "easy"] = "hard"
    """of the runs"""

    def __post_init__(self):
        if not self.paths:
            raise ValueError("PATHS needs one or more folders with runs, or CSV files")
        for path in self.paths:
            if not path.exists():
                raise ValueError(f"PATHS: there is no {path}")
        if self.labels and len(self.labels) != len(self.algorithms):
            raise ValueError("--labels must be as many as --algorithms")
        for flag, names in (("--algorithms", self.algorithms), ("--labels", self.labels)):
            if len(set(names)) < len(names):
                raise ValueError(f"{flag} must differ from each other")


def find_curves(path: Path) -> list[Path]:
    """Folders with TensorBoard's files, of runs or of their agents, at any depth below path."""
    files = glob.glob("**/events.out.tfevents.*", root_dir=path, recursive=True)
    folders = {(path / file).parent.resolve() for file in files}
    return sorted(folder for folder in folders if re.fullmatch(NAME, name_of(folder)))


def name_of(folder: Path) -> str:
    """That of the run; of one of several agents RUN/agent_1."""
    if folder.name.startswith("agent_"):
        return f"{folder.parent.name}/{folder.name}"
    return folder.name


def read_json(path: Path) -> dict | None:
    """None if there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        fail(f"cannot read {path}: {error}")


def read_points(folder: Path, tags: list[str], needed: dict) -> list[tuple]:
    """Rows (run, tag, step, value), of the final test too. A file that is cut short ends earlier."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what resumed runs leave behind
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    name = name_of(folder)
    rows = []
    for tag in tags:
        if tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                rows.append((name, tag, event.step, event.value))
    _, _, number = name.partition("/agent_")
    run = folder.parent if number else folder
    final_test = read_json(run / "final_test.json")
    if final_test:
        agent = final_test["agents"][int(number or 1) - 1]
        for kind, result in agent.items():
            rows.append((name, f"final_test/{kind}", final_test["global_step"], result["mean"]))
    if rows:
        check_settings(run, needed)
    return rows


def check_settings(run: Path, needed: dict):
    """Ends the process if a run was made with other settings than those needed."""
    settings = read_json(run / "args.json")
    if settings is None:
        fail(f"{run} has no args.json, so its settings cannot be known: move it elsewhere")
    for name, value in needed.items():
        if settings.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            fail(f"{run} was made with {flag} {settings[name]}, and {flag} {value} is needed")


def read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)[list(COLUMNS)].astype(COLUMNS)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        fail(f"{path} is not a CSV with the columns run, tag, step, value: {reason}")


def read_runs(choice: Choice, tags: list[str], needed: dict) -> pd.DataFrame:
    """The chosen runs in long form: run, tag, step, value, and game, algorithm, seed. `needed` are settings
    that they must have beside the distribution mode; those of a CSV file cannot be checked."""
    needed = {"distribution_mode": choice.distribution_mode, **needed}
    frames = [read_csv(path) for path in choice.paths if not path.is_dir()]
    folders = []
    for path in choice.paths:
        folders += find_curves(path)
    names = set(map(name_of, folders)).union(*[frame.run for frame in frames])
    chosen = choose(sorted(names), choice)
    rows = []
    for folder in tqdm(folders, desc="reading", disable=None):
        if name_of(folder) in chosen.index:
            rows += read_points(folder, tags, needed)
    frames.append(pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS))
    data = pd.concat(frames, ignore_index=True).drop_duplicates()
    data = data.join(chosen, on="run", how="inner")
    if data.empty:
        fail(f"no runs with curves in {', '.join(map(str, choice.paths))}")
    return newest(data)


def choose(names: list[str], choice: Choice) -> pd.DataFrame:
    """Game, algorithm, seed and time of the runs that are asked for, by their names."""
    parts = pd.Series(names, pd.Index(names, name="run"), dtype=str).str.extract(f"^{NAME}$")
    parts = parts[parts.game.isin(ENV_NAMES)].astype({"time": "int64"})
    for column, wanted in (("game", choice.games), ("algorithm", choice.algorithms)):
        found = set(parts[column])
        unknown = sorted(set(wanted) - found)
        if unknown:
            there = ", ".join(sorted(found)) or "none"
            fail(f"--{column}s: there are no runs of {', '.join(unknown)}, only of {there}")
        if wanted:
            parts = parts[parts[column].isin(wanted)]
    return parts


def newest(data: pd.DataFrame) -> pd.DataFrame:
    """Without the older runs of a game, algorithm and seed, which it names."""
    time = data.groupby(["game", "algorithm", "seed"]).time.transform("max")
    older = data.run[data.time < time].str.split("/").str[0]
    for run in sorted(set(older)):
        print(f"left out: {run}, since there is a newer run of this game, algorithm and seed")
    return data[data.time == time].drop(columns="time")


def print_missing(data: pd.DataFrame):
    """What an algorithm lacks that others have, and which of its runs are behind its longest."""
    last = data.groupby(["algorithm", "game", "seed"]).step.max()
    everything = pd.MultiIndex.from_product([sorted(set(data[name])) for name in last.index.names])
    for algorithm, game, seed in everything.difference(last.index):
        print(f"missing: {algorithm} on {game}, seed {seed}")
    longest = last.groupby("algorithm").transform("max")
    for (algorithm, game, seed), step in last[last < longest].items():
        print(f"short: {algorithm} on {game}, seed {seed}: {step:,} of {longest[algorithm].max():,} steps")


def name_algorithms(data: pd.DataFrame, choice: Choice) -> dict[str, str]:
    """{exp_name: label} in the order to show them."""
    names = choice.algorithms or sorted(set(data.algorithm))
    if len(names) > 10:
        fail(f"--algorithms: the colours of at most 10 can be told apart, not of {', '.join(names)}")
    return dict(zip(names, choice.labels or map(label_of, names)))


def label_of(exp_name: str) -> str:
    """ppo_procgen+wide, as sweep.py names a variant, is "PPO, wide"; other names stay."""
    match = re.fullmatch(r"([a-z]+)_procgen(?:\+(.+))?", exp_name)
    if match is None:
        return exp_name
    label = match[1].upper()
    return f"{label}, {match[2]}" if match[2] else label
