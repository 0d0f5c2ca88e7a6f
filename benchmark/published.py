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
import pandas as pd
import tyro
from command_line import check_folder, fail, parse_args, replacing

PUBLISHED = Path(__file__).parent / "results" / "published_ppo.csv"
SPLITS = {"train": [figures.TRAIN], "test": [figures.FINAL, figures.TEST]}  # and their tags, the better first
SETTINGS = {"distribution_mode": "easy", "num_levels": 200, "start_level": 0}  # of the published runs
SETTINGS |= {"num_envs": 64, "num_steps": 256}


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of runs, or CSV files of figures.py
    algorithm: str = "ppo_procgen"  # exp_name of the runs
    output: Path = Path("figures/published")  # the picture, without .png and .pdf

    def __post_init__(self):
        figures.Args(paths=self.paths)  # has the same to say of them
        if self.output.name in ("", ".."):
            raise ValueError(f"--output must end in a file's name, not be {self.output}")
        if self.output.suffix in (".png", ".pdf"):
            self.output = self.output.with_suffix("")


def return_near(run: pd.DataFrame, split: str, steps: int) -> float | None:
    """A run's return within 5 % of the steps, None if it has none there."""
    for tag in SPLITS[split]:
        values = run.value[(run.tag == tag) & ((run.step - steps).abs() <= 0.05 * steps)]
        if len(values):
            return values.mean()
    return None


def compare(data: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """A row for each published point that a run has reached: game, split, steps, return of each seed (nan
    where it has none there), published mean and range."""
    rows = []
    for point in published.itertuples():
        runs = data[data.game == point.env_id].groupby("seed")
        ours = {f"seed {seed}": return_near(run, point.split, point.env_steps) for seed, run in runs}
        if any(value is not None for value in ours.values()):
            between = f"{point.return_min_run:.2f} to {point.return_max_run:.2f}"
            row = {"game": point.env_id, "return": point.split, "steps": f"{point.env_steps:,}", **ours}
            rows.append(row | {"published": f"{point.return_mean:.2f}", "their runs": between})
    seeds = sorted({name for row in rows for name in row if name.startswith("seed ")})
    return pd.DataFrame(rows, columns=["game", "return", "steps", *seeds, "published", "their runs"])


def draw(data: pd.DataFrame, published: pd.DataFrame, output: Path):
    """A panel for each game and split: a line for each seed, points with ranges for the published runs."""
    games = sorted(set(data.game))
    size = (max(6, 3 * len(games)), 4.6)  # the legend needs 6
    figure, axes = plt.subplots(
        2, len(games), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for column, game in enumerate(games):
        for axis, (split, tags) in zip(axes[:, column], SPLITS.items()):
            end = data.step[data.game == game].max()
            for number, (seed, run) in enumerate(data[data.game == game].groupby("seed")):
                run = run[run.tag.isin(tags)].sort_values("step")
                axis.plot(run.step / 1e6, run.value, ".-", color=f"C{number}", label=f"here, seed {seed}")
            near = published[(published.env_id == game) & (published.split == split)]
            near = near[near.env_steps <= 1.05 * end]
            columns = ["env_steps", "return_mean", "return_min_run", "return_max_run"]
            steps, mean, *ends = near[columns].to_numpy().T
            style = {"fmt": "D", "color": "black", "capsize": 4, "markersize": 4, "zorder": 3}
            axis.errorbar(steps / 1e6, mean, abs(ends - mean), label="published, 3 runs", **style)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(game)
        axes[1, column].set_xlabel("million steps")
    axes[0, 0].set_ylabel("return, 200 training levels")
    axes[1, 0].set_ylabel("return, full distribution")
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=3, frameon=False)
    for suffix in ("png", "pdf"):
        with replacing("--output", output.with_name(f"{output.name}.{suffix}")) as path:
            figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args: Args):
    options = figures.Args(paths=args.paths, algorithms=(args.algorithm,), distribution_mode="easy")
    check_folder("--output", args.output.parent)
    data = figures.select(figures.read(options, SETTINGS), options, "--algorithm")
    published = pd.read_csv(PUBLISHED, comment="#")
    table = compare(data, published)
    if table.empty:
        fail(f"PATHS: no run has come to {published.env_steps.min():,} steps, the first published number")
    draw(data, published, args.output)
    print(f"| {' | '.join(table)} |\n|{' --- |' * len(table.columns)}")
    for row in table.itertuples(index=False):
        cells = [each if isinstance(each, str) else "" if pd.isna(each) else f"{each:.2f}" for each in row]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    plt.switch_backend("agg")  # no display is needed
    try:
        main(parse_args(Args, __doc__))
    except OSError as error:
        fail(f"{error.filename or 'PATHS'}: {error.strerror or error}")
