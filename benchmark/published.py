"""PPO's returns beside those that the authors of Procgen published: does ppo_procgen.py reproduce them?

    python ppo_procgen.py --env-id fruitbot --distribution-mode easy --num-levels 200
    python benchmark/published.py runs

Reads what figures.py reads, and takes the runs of --algorithm. They must have been made with the settings of
that command, for any number of steps, which is checked but for CSV files. At each published number of steps a
run's return is the mean of what it logged within 5 % of it, and its test return that of its final test if it
ended there. Prints a table, and draws the curves with the published points to OUTPUT.png and OUTPUT.pdf.
"""

from dataclasses import dataclass
from pathlib import Path

import figures
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from helpers import check_folder, fail, replacing, run_tool

PUBLISHED = Path(__file__).parent / "results" / "published_ppo.csv"
SPLITS = {  # and their tags, the better first
    "train": [figures.TRAIN],
    "test": [figures.FINAL, figures.TEST],
}
SETTINGS = {  # of the published runs
    "distribution_mode": "easy",
    "num_levels": 200,
    "start_level": 0,
    "num_envs": 64,
    "num_steps": 256,
}
NEAR = 0.05  # of the steps: how far from a published point a value may be


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs, or CSV files of figures.py"""
    algorithm: str = "ppo_procgen"
    """exp_name of the runs"""
    output: Path = Path("figures/published")
    """the picture, without .png and .pdf"""

    def __post_init__(self):
        figures.check_paths(self.paths)
        if self.output.name in ("", ".."):
            raise ValueError(f"--output must end in a file's name, not be {self.output}")
        if self.output.suffix in (".png", ".pdf"):
            self.output = self.output.with_suffix("")


def return_near(run: pd.DataFrame, split: str, steps: int) -> float | None:
    """A run's return near the steps, None if it has none there."""
    near = run[(run.step - steps).abs() <= NEAR * steps]
    for tag in SPLITS[split]:
        values = near.value[near.tag == tag]
        if len(values) > 0:
            return values.mean()
    return None


def compare(data: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """A row of text for each published point that a run has reached: game, split, steps, the return of each
    seed (empty where it has none there), published mean and range."""
    seeds = sorted(set(data.seed))
    rows = []
    for point in published.itertuples():
        runs = data[data.game == point.env_id]
        ours = [return_near(runs[runs.seed == seed], point.split, point.env_steps) for seed in seeds]
        if all(value is None for value in ours):
            continue
        row = {"game": point.env_id, "return": point.split, "steps": f"{point.env_steps:,}"}
        for seed, value in zip(seeds, ours):
            row[f"seed {seed}"] = "" if value is None else f"{value:.2f}"
        row["published"] = f"{point.return_mean:.2f}"
        row["their runs"] = f"{point.return_min_run:.2f} to {point.return_max_run:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def print_table(table: pd.DataFrame):
    """As Markdown."""
    print(f"| {' | '.join(table)} |")
    print(f"|{' --- |' * len(table.columns)}")
    for row in table.itertuples(index=False):
        print(f"| {' | '.join(row)} |")


def draw(data: pd.DataFrame, published: pd.DataFrame):
    """A figure with a panel for each game and split."""
    games = sorted(set(data.game))
    size = (max(6, 3 * len(games)), 4.6)  # the legend needs 6
    figure, axes = plt.subplots(
        2, len(games), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for column, game in enumerate(games):
        runs = data[data.game == game]
        points = published[published.env_id == game]
        for axis, split in zip(axes[:, column], SPLITS):
            draw_panel(axis, split, runs, points[points.split == split])
        axes[0, column].set_title(game)
        axes[1, column].set_xlabel("million steps")
    axes[0, 0].set_ylabel("return, 200 training levels")
    axes[1, 0].set_ylabel("return, full distribution")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_panel(axis, split: str, runs: pd.DataFrame, points: pd.DataFrame):
    """A line for each seed of a game, and the published points with their ranges, as far as the runs go."""
    for number, (seed, run) in enumerate(runs.groupby("seed")):
        run = run[run.tag.isin(SPLITS[split])].sort_values("step")
        axis.plot(run.step / 1e6, run.value, ".-", color=f"C{number}", label=f"here, seed {seed}")
    points = points[points.env_steps <= (1 + NEAR) * runs.step.max()]
    mean = points.return_mean.to_numpy()
    below = mean - points.return_min_run.to_numpy()
    above = points.return_max_run.to_numpy() - mean
    axis.errorbar(
        points.env_steps.to_numpy() / 1e6,
        mean,
        np.stack([below, above]),
        fmt="D",
        color="black",
        capsize=4,
        markersize=4,
        zorder=3,
        label="published, 3 runs",
    )
    axis.grid(alpha=0.3)


def save(figure, output: Path):
    """Writes OUTPUT.png and OUTPUT.pdf, and closes the figure."""
    for suffix in ("png", "pdf"):
        with replacing("--output", output.with_name(f"{output.name}.{suffix}")) as path:
            figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args):
    options = figures.Args(paths=args.paths, algorithms=(args.algorithm,), distribution_mode="easy")
    check_folder("--output", args.output.parent)
    everything = figures.read(options, SETTINGS)
    data = figures.select(everything, options, "--algorithm")
    published = pd.read_csv(PUBLISHED, comment="#")
    table = compare(data, published)
    if table.empty:
        fail(f"PATHS: no run has come to {published.env_steps.min():,} steps, the first published number")
    save(draw(data, published), args.output)
    print_table(table)


if __name__ == "__main__":
    plt.switch_backend("agg")  # no display is needed
    run_tool(main, Args, __doc__)
