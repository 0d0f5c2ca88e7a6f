"""benchmark/figures.py on curves whose mean, deviation and scores are known."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from common import ROOT
from test_runs import MDPO, PPO, line, read, run_tool, write_ppo, write_run

sys.path.insert(0, str(ROOT / "benchmark"))
import figures
from runs import FINAL_TEST, GAP, TEST, TRAIN

RESULTS = ROOT / "benchmark/results"
PUBLISHED = RESULTS / "published_ppo.csv"
LABEL = "our $\\lambd$"  # no formula


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds each of PPO and MDPO on bigfish and starpilot; steps 0 to 1000, final tests after them."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        for game in ("bigfish", "starpilot"):
            curves = {TRAIN: line(0.02 * seed), TEST: line(0.01 * seed), GAP: line(0.01 * seed)}
            write_run(root, f"{game}__{PPO}__{seed}__1", [curves], [10.0 * seed], 1000)
            pair = [{TEST: line(0.02 * seed)}, {TEST: line(0.04 * seed)}]
            write_run(root, f"{game}__{MDPO}__{seed}__1", pair, [19.0, 21.0], 1000)
    return root


def draw(data, labels: dict, smooth: int = 1, reference=None):
    """The panels of a figure of tests."""
    if reference is None:
        reference = figures.read_reference(None)
    figure = figures.draw_curves(data[data.tag == TEST], labels, smooth, reference)
    plt.close(figure)
    return figure.axes


def test_curves_of_different_length_and_steps(tmp_path):
    """A common grid; no value before a run's first and after its last, nor where one of a pair has none."""
    write_ppo(tmp_path, seed=1)
    write_ppo(tmp_path, seed=2, curve=line(3.0, start=70, end=490, step=70))
    write_run(tmp_path, f"maze__{PPO}__3__1", [{TEST: line(3.0)}, {TEST: line(1.0, end=500)}])
    steps, values = figures.common_steps(read(tmp_path), smooth=1, points=1001)
    assert values.loc["1"].to_numpy() == pytest.approx(steps)
    inside = (steps >= 70) & (steps <= 490)
    expected = np.where(inside, 3 * steps, np.nan)
    assert values.loc["2"].to_numpy() == pytest.approx(expected, nan_ok=True)
    expected = np.where(steps <= 500, 2 * steps, np.nan)
    assert values.loc["3"].to_numpy() == pytest.approx(expected, nan_ok=True)


def test_smoothing_only_if_asked(tmp_path):
    write_ppo(tmp_path, curve={step: float(step // 10 % 2 * 6) for step in range(0, 100, 10)})
    for smooth, expected in ((1, [0, 6] * 5), (3, [3, 2, 4, 2, 4, 2, 4, 2, 4, 3])):
        (panel,) = draw(read(tmp_path), {PPO: "PPO"}, smooth)
        steps = panel.lines[1].get_xdata() * 1e6
        at_points = np.interp(range(0, 100, 10), steps, panel.lines[1].get_ydata())
        assert at_points == pytest.approx(expected, abs=0.2)  # the corners are between two steps


def test_what_is_drawn(folder, tmp_path):
    """Mean and standard deviation (n - 1) over seeds: of slopes 1 and 2, 1.5 and 0.7071."""
    write_ppo(tmp_path, "starpilot", seed=3, curve=line(0.03, end=500))
    data = read(folder, tmp_path)
    bigfish, starpilot = draw(data, {PPO: "PPO", MDPO: "ours"})
    _, solid, _, of_mdpo = bigfish.lines
    steps = solid.get_xdata() * 1e6
    assert steps[-1] == 1000
    assert solid.get_ydata() == pytest.approx(0.015 * steps)
    assert of_mdpo.get_ydata() == pytest.approx(0.045 * steps)
    band = bigfish.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == 1e-3, 1]
    deviation = (0.02 - 0.01) / 2**0.5 * 1000
    assert (at_end.min(), at_end.max()) == pytest.approx((15 - deviation, 15 + deviation))

    dashed, solid, *_ = starpilot.lines  # solid as long as all three go on
    steps = solid.get_xdata() * 1e6
    assert dashed.get_ydata()[steps > 500] == pytest.approx(0.015 * steps[steps > 500])
    expected = np.where(steps <= 500, 0.02 * steps, np.nan)
    assert solid.get_ydata() == pytest.approx(expected, nan_ok=True)


def scores_of(table: dict, mode: str = "hard") -> dict[str, np.ndarray]:
    """Of {algorithm: {game: returns of seeds 1, 2, ...}}."""
    rows = []
    for algorithm, games in table.items():
        for game, values in games.items():
            rows += [(game, algorithm, seed, value) for seed, value in enumerate(values, 1)]
    tests = pd.DataFrame(rows, columns=["game", "algorithm", "seed", "test"])
    return figures.normalised_scores(tests, {name: name.upper() for name in table}, mode)


def test_normalised_scores(capsys):
    """By hand; negative below the minimum; of the games that all have, and the seeds that have these."""
    table = {
        "a": {"bigfish": [20.0, 40.0], "maze": [4.0, 1.0], "heist": [1.0, 1.0]},
        "b": {"bigfish": [0.0, 10.0, 1.0], "maze": [7.0]},
    }
    scores = scores_of(table)
    assert scores["A"] == pytest.approx(np.array([[0.5, 0.0], [1.0, -0.5]]))
    assert scores["B"] == pytest.approx(np.array([[0.0, 0.5]]))
    assert scores_of(table, "easy")["B"] == pytest.approx(np.array([[0.0, 0.4]]))
    out = capsys.readouterr().out
    assert "an algorithm has no test there: heist\n" in out and "one seed of B" in out
    assert "B, seed 2" in out and "B, seed 3" in out and "A, seed" not in out
    assert scores_of({"a": {"maze": [1.0]}, "b": {}}) == {}


BOUNDS = {  # as in the appendix of Cobbe et al. (2020)
    "hard": """
bigfish [0, 40], bossfight [0.5, 13], caveflyer [2, 13.4], chaser [0.5, 14.2], climber [1, 12.6],
coinrun [5, 10], dodgeball [1.5, 19], fruitbot [-0.5, 27.2], heist [2, 10], jumper [1, 10],
leaper [1.5, 10], maze [4, 10], miner [1.5, 20], ninja [2, 10], plunder [3, 30], starpilot [1.5, 35]
""",
    "easy": """
bigfish [0, 40], bossfight [0.5, 13], caveflyer [3.5, 12], chaser [0.5, 13], climber [2, 12.6],
coinrun [5, 10], dodgeball [1.5, 19], fruitbot [-1.5, 32.4], heist [3.5, 10], jumper [3, 10],
leaper [3, 10], maze [5, 10], miner [1.5, 13], ninja [3.5, 10], plunder [4.5, 30], starpilot [2.5, 64]
""",
}


@pytest.mark.parametrize("mode", BOUNDS)
def test_bounds(mode):
    """The minimum of each game scores 0, the maximum 1."""
    table = {}
    for game, low, high in re.findall(r"(\w+) \[(\S+), (\S+)\]", BOUNDS[mode]):
        table[game] = [float(low), float(high)]
    expected = np.array([[0.0] * 16, [1.0] * 16])
    assert scores_of({"a": table}, mode)["A"] == pytest.approx(expected)


def test_aggregate_metrics():
    """By hand: the middle half of 0, 0.2, 0.4, 2 has mean 0.3; they lack 1, 0.8, 0.6 and 0 to 1. Every score
    of b beats those of a, and with itself a is even."""
    a = np.array([[0.0, 0.2, 0.4, 2.0]] * 3)
    found = figures.estimate({"a": a, "b": a + 3, "c": a}, samples=20)
    assert (found.low == found.value).all()
    assert (found.high == found.value).all()
    expected = {"interquartile mean": {"a": 0.3, "b": 3.3, "c": 0.3}}
    expected["optimality gap"] = {"a": 0.6, "b": 0, "c": 0.6}
    expected["probability of improvement"] = {"P(b > a)": 1, "P(c > a)": 0.5, "P(c > b)": 0}
    for metric, rows in found.groupby("metric"):
        values = dict(zip(rows.of, rows.value))
        assert values == pytest.approx(expected.pop(metric))
    assert not expected


def test_intervals():
    """Contain the estimate, have a width where seeds differ, and are the same every time."""
    scores = {"a": np.random.default_rng(0).normal(0.5, 0.2, (5, 4))}
    first = figures.estimate(scores, samples=200)
    assert len(first) == 2  # and no pair
    for each in first.itertuples():
        assert each.low < each.value < each.high < each.low + 0.5
    assert figures.estimate(scores, samples=200).equals(first)


def test_aggregate_is_drawn():
    """In each panel a row for each algorithm or pair: a bar from end to end, and a mark at the estimate."""
    rows = [
        ("interquartile mean", "a", 0.3, 0.2, 0.5),
        ("interquartile mean", "b", 0.7, 0.6, 0.9),
        ("probability of improvement", "P(b > a)", 0.8, 0.7, 1.0),
    ]
    figure = figures.draw_aggregate(pd.DataFrame(rows, columns=["metric", "of", "value", "low", "high"]))
    plt.close(figure)
    drawn = []
    for axis in figure.axes:
        names = [label.get_text() for label in axis.get_yticklabels()]
        for number, name in enumerate(names):
            bar, mark = axis.lines[2 * number : 2 * number + 2]
            assert list(bar.get_ydata()) == [name, name]
            assert list(mark.get_ydata()) == [name]
            drawn.append((axis.get_title(), name, *mark.get_xdata(), *bar.get_xdata()))
    assert drawn == rows


def test_table_and_files(folder, tmp_path, monkeypatch, capsys):
    """bigfish scores (R - 0) / 40 and starpilot (R - 1.5) / 33.5, of returns 10 and 20, and 20 and 20. The
    CSV gives the same table again, compressed and plain."""
    output = tmp_path / "new/f"
    words = ["--algorithms", PPO, MDPO, "--labels", "PPO", LABEL, "--bootstrap", 50]
    run_tool("figures", monkeypatch, folder, *words, "--output", output, "--csv", output / "curves.csv.gz")
    printed = capsys.readouterr().out
    names = {"training_return", "test_return", "generalization_gap", "aggregate"}
    expected = {f"{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in output.iterdir()} == expected | {"table.md", "curves.csv.gz"}
    table = (output / "table.md").read_text()
    assert table in printed
    for text in ("not in the aggregate", "one seed of", "missing:", "short:", "left out:"):
        assert text not in printed
    ppo = [10 / 40, 20 / 40, 8.5 / 33.5, 18.5 / 33.5]
    ours = (20 / 40 + 18.5 / 33.5) / 2
    for expected in (
        f"| test return | PPO | {LABEL} |",
        "| bigfish | 15.00 ± 7.07 (2) | 20.00 ± 0.00 (2) |",
        "| starpilot | 15.00 ± 7.07 (2) | 20.00 ± 0.00 (2) |",
        "hard levels",
        f"| interquartile mean | PPO | {np.mean(sorted(ppo)[1:3]):.3f} [",
        f"| interquartile mean | {LABEL} | {ours:.3f} [{ours:.3f}, {ours:.3f}] |",
        f"| optimality gap | PPO | {1 - np.mean(ppo):.3f} [",
        f"| probability of improvement | P({LABEL} > PPO) | 0.750 [",
    ):
        assert expected in table
    text = gzip.decompress((output / "curves.csv.gz").read_bytes())
    first, *lines = text.decode().splitlines()
    assert first == "run,tag,step,value"
    assert f"bigfish__{MDPO}__2__1/agent_2,{TEST},1000,80" in lines
    (tmp_path / "curves.csv").write_bytes(text)
    words += ["--tags", TEST, "--csv", tmp_path / "again.csv", "--output", tmp_path]
    run_tool("figures", monkeypatch, tmp_path / "curves.csv", *words)
    assert (tmp_path / "table.md").read_text() == table
    assert (tmp_path / "again.csv").read_bytes() == text


def test_what_is_unfinished_or_missing(folder, tmp_path, monkeypatch, capsys):
    """Is said; an earlier final test, which a run keeps that goes on, does not count."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(0.01)}], [5.0], 1000)
    write_run(tmp_path, f"starpilot__{PPO}__3__1", [{TEST: line(0.01)}], [5.0], 500)
    words = ["--algorithms", PPO, MDPO, "--tags", GAP, "--bootstrap", 10, "--output", tmp_path / "f"]
    run_tool("figures", monkeypatch, folder, tmp_path, *words)
    out = capsys.readouterr().out
    for expected in (
        f"left out: starpilot__{PPO}__3__1, which has no final test",
        f"missing: {MDPO} on maze, seed 1",
        "no test there: maze",
        "| maze | 5.00 (1) | missing |",
        "| starpilot | 15.00 ± 7.07 (2) | 20.00 ± 0.00 (2) |",
    ):
        assert expected in out


def test_one_test_of_one_run(tmp_path, monkeypatch, capsys):
    """Nobody is there to be compared with; the levels are easy."""
    name = f"starpilot__{PPO}__1__1"
    write_run(tmp_path, name, [{TEST: {64: 7.0}}], [33.25], 64, distribution_mode="easy")
    words = ["--distribution-mode", "easy", "--tags", TRAIN, "--bootstrap", 10, "--output", tmp_path / "f"]
    run_tool("figures", monkeypatch, tmp_path, *words)
    out = capsys.readouterr().out
    for expected in (
        f"missing: {TRAIN}",
        "one seed of PPO",
        "| starpilot | 33.25 (1) |",
        "easy levels",
        "| interquartile mean | PPO | 0.500 [0.500, 0.500] |",
    ):
        assert expected in out
    assert "P(" not in out


def test_five_percent():
    """Of the published steps, both ways; at the end the final test counts, before it the test there."""
    rows = [
        (TRAIN, 949_000, 1.0),
        (TRAIN, 950_000, 2.0),
        (TRAIN, 1_050_000, 4.0),
        (TRAIN, 1_051_000, 8.0),
        (TEST, 1_000_000, 16.0),
        (FINAL_TEST, 1_050_000, 32.0),
        (FINAL_TEST, 2_200_000, 64.0),
        (TEST, 2_000_000, 128.0),
    ]
    run = pd.DataFrame(rows, columns=["tag", "step", "value"])
    assert figures.return_near(run, "train", 1_000_000) == "3.00"
    assert figures.return_near(run, "test", 1_000_000) == "32.00"
    assert figures.return_near(run, "test", 2_000_000) == "128.00"
    assert figures.return_near(run, "train", 2_000_000) == ""


def write_starpilot(root: Path, seed: int, curves: dict, *more, **settings):
    """A run with the published settings, but for those given."""
    settings = figures.PUBLISHED_SETTINGS | {"distribution_mode": "easy"} | settings
    write_run(root, f"starpilot__{PPO}__{seed}__1700000000", [curves], *more, **settings)


def run_with_reference(root: Path, monkeypatch, capsys) -> str:
    """What the tool prints."""
    words = ["--distribution-mode", "easy", "--reference", PUBLISHED, "--bootstrap", 10, "--tags", GAP]
    run_tool("figures", monkeypatch, root, *words, "--output", root / "f")
    return capsys.readouterr().out


def test_published_returns(tmp_path, monkeypatch, capsys):
    """The mean of what is near; what is not there stays empty. Picture: the points that the runs came to."""
    curves = {TRAIN: {240_000: 2.0, 260_000: 4.0, 300_000: 90.0, 490_000: 5.0}}
    curves[TEST] = {250_000: 1.5, 490_000: 7.0}
    curves[GAP] = curves[TEST]
    write_starpilot(tmp_path, 1, curves, [6.25], 507_904)
    write_starpilot(tmp_path, 2, {TEST: {250_000: 8.0}})
    out = run_with_reference(tmp_path, monkeypatch, capsys)
    assert out.partition("| game |")[2].startswith(
        """ return | steps | algorithm | seed 1 | seed 2 | published | their runs |
| --- | --- | --- | --- | --- | --- | --- | --- |
| starpilot | test | 250,000 | PPO | 1.50 | 8.00 | 2.97 | 2.69 to 3.13 |
| starpilot | test | 500,000 | PPO | 6.25 |  | 3.78 | 3.37 to 4.50 |
"""
    )
    reference = figures.read_reference(PUBLISHED)
    of_tests = reference[reference.split == "test"]
    data = read(tmp_path, distribution_mode="easy")
    (panel,) = draw(data, {PPO: "PPO"}, reference=of_tests)
    (errors,) = panel.containers
    marks, _, (bars,) = errors.lines
    assert marks.get_xydata().tolist() == [[0.25, 2.97], [0.5, 3.78]]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[2.69, 3.13], [3.37, 4.50]]))


@pytest.mark.parametrize("name", ["num_levels", "start_level", "num_envs", "num_steps"])
def test_published_returns_are_of_other_settings(name, tmp_path, monkeypatch, capsys):
    write_starpilot(tmp_path, 1, {TRAIN: {250_000: 1.0}, TEST: {250_000: 1.0}}, **{name: 7})
    with pytest.raises(SystemExit) as stop:
        run_with_reference(tmp_path, monkeypatch, capsys)
    assert stop.value.code == 2
    assert f"--{name.replace('_', '-')} 7, and " in capsys.readouterr().err


def test_too_early_for_published_returns(tmp_path, monkeypatch, capsys):
    write_starpilot(tmp_path, 1, {TEST: {1000: 1.0}})
    assert "No run has come to 250,000 steps" in run_with_reference(tmp_path, monkeypatch, capsys)


def test_the_results_give_their_numbers():
    """Those of the pages, from the curves that lie beside them."""
    data = read(RESULTS / "curves.csv", algorithms=(PPO,), distribution_mode="easy")
    table = figures.compare(data, {PPO: "PPO"}, figures.read_reference(PUBLISHED))
    assert "| starpilot | train | 250,000 | PPO | 2.82 | 3.34 | 3.15 | 3.00 to 3.30 |" in table
    assert "| starpilot | test | 500,000 | PPO | 5.01 | 4.11 | 3.78 | 3.37 to 4.50 |" in table


def test_published_numbers_are_whole():
    table = figures.read_reference(PUBLISHED)
    assert table.groupby(["env_id", "split", "env_steps"]).size().tolist() == [1] * 16 * 2 * 7
    assert (table.return_min_run <= table.return_mean).all()
    assert (table.return_mean <= table.return_max_run).all()


def test_published_settings(tmp_path):
    """The patch fits today's script, and changes the rewards' scaling."""
    path = Path(shutil.copy(ROOT / "ppo_procgen.py", tmp_path))
    patch = RESULTS / "published_settings.patch"
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    assert path.read_text().count("0.99") == (ROOT / "ppo_procgen.py").read_text().count("0.99") + 1
