"""benchmark/figures.py on curves whose mean, deviation and scores are known."""

import gzip
import importlib.util
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
import torch.nn as nn
from common import ROOT
from test_runs import MDPO, PPO, line, read, run_tool, write_run

sys.path.insert(0, str(ROOT / "benchmark"))
import figures
from runs import FINAL_TEST, GAP, TEST, TRAIN

PUBLISHED = ROOT / "benchmark/results/published_ppo.csv"
NO_REFERENCE = figures.read_reference(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds each of PPO and MDPO on bigfish and starpilot; steps 0 to 1000, final tests after them."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        for game in ("bigfish", "starpilot"):
            curves = {TRAIN: line(0.02 * seed), TEST: line(0.01 * seed), GAP: line(0.01 * seed)}
            write_run(root, f"{game}__{PPO}__{seed}__170000000{seed}", [curves], (10.0 * seed,), 1000)
            pair = [{TEST: line(0.02 * seed)}, {TEST: line(0.04 * seed)}]
            write_run(root, f"{game}__{MDPO}__{seed}__170000000{seed}", pair, (19.0, 21.0), 1000)
    return root


def rows_of(data, tag=TEST, game="bigfish", algorithm=PPO):
    return data[(data.tag == tag) & (data.game == game) & (data.algorithm == algorithm)]


def draw(data, labels: dict, smooth: int = 1, reference=NO_REFERENCE):
    """A figure of curves of tests, and its panels."""
    figure = figures.draw_curves(data[data.tag == TEST], labels, smooth, reference)
    plt.close(figure)
    return figure, figure.axes


def test_a_pair_is_one_seed_the_mean_of_the_two(folder):
    steps, values = figures.common_steps(rows_of(read(folder), algorithm=MDPO), smooth=1)
    assert (steps[0], steps[-1], values.shape) == (0, 1000, (2, 200))
    assert values.loc["1"].to_numpy() == pytest.approx(0.03 * steps)
    assert values.loc["2"].to_numpy() == pytest.approx(0.06 * steps)


def test_curves_of_different_length_and_steps(tmp_path):
    """A common grid; no value before a run's first and after its last, nor where one of a pair has none."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    write_run(tmp_path, f"maze__{PPO}__2__1", [{TEST: line(3.0, start=70, end=490, step=70)}])
    write_run(tmp_path, f"maze__{PPO}__3__1", [{TEST: line(3.0)}, {TEST: line(1.0, end=500)}])
    steps, values = figures.common_steps(rows_of(read(tmp_path), game="maze"), smooth=1, points=1001)
    assert values.loc["1"].to_numpy() == pytest.approx(steps)
    inside = (steps >= 70) & (steps <= 490)
    assert values.loc["2"][inside].to_numpy() == pytest.approx(3 * steps[inside])
    assert values.loc["2"][~inside].isna().all()
    assert values.loc["3"][steps <= 500].to_numpy() == pytest.approx(2 * steps[steps <= 500])
    assert values.loc["3"][steps > 500].isna().all()


def test_smoothing_only_if_asked(tmp_path):
    zigzag = {step: float(step // 10 % 2 * 6) for step in range(0, 100, 10)}
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: zigzag}])
    rows = rows_of(read(tmp_path), game="maze")
    _, values = figures.common_steps(rows, smooth=1, points=10)
    assert values.loc["1"].tolist() == [0, 6] * 5
    _, values = figures.common_steps(rows, smooth=3, points=10)
    assert values.loc["1"].tolist() == pytest.approx([3, 2, 4, 2, 4, 2, 4, 2, 4, 3])


def test_what_is_drawn(folder, tmp_path):
    """Mean and standard deviation (n - 1) over seeds: of slopes 1 and 2, 1.5 and 0.7071."""
    write_run(tmp_path, f"starpilot__{PPO}__3__1", [{TEST: line(0.03, end=500)}])
    data = read(folder, tmp_path)
    figure, (bigfish, starpilot) = draw(data, {PPO: "PPO", MDPO: "ours"})
    assert (bigfish.get_title(), starpilot.get_title()) == ("bigfish", "starpilot")
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["PPO", "ours"]
    colors = [handle.get_color() for handle in legend.legend_handles]
    assert colors == [bigfish.lines[1].get_color(), bigfish.lines[3].get_color()] == ["C0", "C1"]

    dashed, solid = bigfish.lines[:2]
    steps = solid.get_xdata() * 1e6
    assert steps[-1] == 1000 and solid.get_ydata() == pytest.approx(0.015 * steps)
    assert dashed.get_linestyle() == "--" and dashed.get_ydata() == pytest.approx(0.015 * steps)
    assert bigfish.lines[3].get_ydata() == pytest.approx(0.045 * steps)  # MDPO's
    corners = bigfish.collections[0].get_paths()[0].vertices
    deviation = (0.02 - 0.01) / 2**0.5 * 1000
    assert corners[:, 1].max() == pytest.approx(15 + deviation)
    assert corners[corners[:, 0] == 1e-3, 1].min() == pytest.approx(15 - deviation)

    dashed, solid = starpilot.lines[:2]  # solid as long as all three go on
    steps = solid.get_xdata() * 1e6
    whole = steps <= 500
    assert solid.get_ydata()[whole] == pytest.approx(0.02 * steps[whole])
    assert np.isnan(solid.get_ydata()[~whole]).all()
    assert dashed.get_ydata()[~whole] == pytest.approx(0.015 * steps[~whole])

    _, (smoothed, _) = draw(data, {PPO: "PPO"}, smooth=11)
    assert smoothed.lines[1].get_ydata()[0] == pytest.approx(0.015 * 250)  # the mean of six values


def test_who_has_no_curve_keeps_its_colour(tmp_path):
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TRAIN: line(1.0)}])
    write_run(tmp_path, f"maze__{MDPO}__1__1", [{TEST: line(1.0)}] * 2)
    figure, _ = draw(read(tmp_path), {PPO: "PPO", MDPO: "MDPO"})
    (handle,) = figure.legends[0].legend_handles
    assert handle.get_color() == "C1"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MDPO"]


def test_the_legend_fits_into_the_figure(tmp_path):
    labels = {f"{PPO}+{i}": f"PPO with the data of {i} agents" for i in range(6)}
    for name in labels:
        write_run(tmp_path, f"maze__{name}__1__1", [{TEST: line(1.0)}])
    figure, _ = draw(read(tmp_path), labels)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


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


HARD = """
bigfish [0, 40], bossfight [0.5, 13], caveflyer [2, 13.4], chaser [0.5, 14.2], climber [1, 12.6],
coinrun [5, 10], dodgeball [1.5, 19], fruitbot [-0.5, 27.2], heist [2, 10], jumper [1, 10],
leaper [1.5, 10], maze [4, 10], miner [1.5, 20], ninja [2, 10], plunder [3, 30], starpilot [1.5, 35]
"""
EASY = """
bigfish [0, 40], bossfight [0.5, 13], caveflyer [3.5, 12], chaser [0.5, 13], climber [2, 12.6],
coinrun [5, 10], dodgeball [1.5, 19], fruitbot [-1.5, 32.4], heist [3.5, 10], jumper [3, 10],
leaper [3, 10], maze [5, 10], miner [1.5, 13], ninja [3.5, 10], plunder [4.5, 30], starpilot [2.5, 64]
"""


@pytest.mark.parametrize(("mode", "text"), [("hard", HARD), ("easy", EASY)])
def test_bounds(mode, text):
    """As in the appendix of Cobbe et al. (2020): their minimum scores 0, their maximum 1, in each game."""
    games = re.findall(r"(\w+) \[(\S+), (\S+)\]", text)
    assert len(games) == 16
    table = {game: [float(low), float(high)] for game, low, high in games}
    assert scores_of({"a": table}, mode)["A"] == pytest.approx(np.array([[0.0] * 16, [1.0] * 16]))


def test_aggregate_metrics():
    """By hand: the middle half of 0, 0.2, 0.4, 2 has mean 0.3; they lack 1, 0.8, 0.6 and 0 to 1. Every score
    of b beats those of a, and with itself a is even."""
    a = np.array([[0.0, 0.2, 0.4, 2.0]] * 3)
    found = {}
    for metric, name, *values in figures.estimate({"a": a, "b": a + 3, "c": a}, samples=50):
        found[metric, name] = values
    expected = {
        ("interquartile mean", "a"): 0.3,
        ("interquartile mean", "b"): 3.3,
        ("interquartile mean", "c"): 0.3,
        ("optimality gap", "a"): 0.6,
        ("optimality gap", "b"): 0,
        ("optimality gap", "c"): 0.6,
        ("probability of improvement", "P(b > a)"): 1,
        ("probability of improvement", "P(c > a)"): 0.5,
        ("probability of improvement", "P(c > b)"): 0,
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx([value] * 3)


def test_intervals():
    """Contain the estimate, have a width where seeds differ, and are the same every time."""
    scores = {"a": np.random.default_rng(0).normal(0.5, 0.2, (5, 4))}
    first = figures.estimate(scores, samples=200)
    assert len(first) == 2  # and no pair
    for each in first:
        assert each.low < each.value < each.high < each.low + 0.5
    assert figures.estimate(scores, samples=200) == first


def test_aggregate_is_drawn():
    """In each panel a row for each algorithm or pair: a bar from end to end, and a mark at the estimate."""
    panels = [
        [("interquartile mean", "a", 0.3, 0.2, 0.5), ("interquartile mean", "b", 0.7, 0.6, 0.9)],
        [("probability of improvement", "P(b > a)", 0.8, 0.7, 1.0)],
    ]
    figure = figures.draw_aggregate([figures.Estimate(*row) for rows in panels for row in rows])
    plt.close(figure)
    for axis, rows in zip(figure.axes, panels, strict=True):
        assert [label.get_text() for label in axis.get_yticklabels()] == [row[1] for row in rows]
        for number, (metric, _, value, low, high) in enumerate(rows):
            assert axis.get_title() == metric
            bar, mark = axis.lines[2 * number : 2 * number + 2]
            assert (list(bar.get_xdata()), list(bar.get_ydata())) == ([low, high], [number, number])
            assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([value], [number])
    assert [axis.get_xlabel() for axis in figure.axes] == ["normalised test score", "probability"]


def test_files_and_table(folder, tmp_path, monkeypatch, capsys):
    """bigfish scores (R - 0) / 40 and starpilot (R - 1.5) / 33.5, of returns 10 and 20, and 20 and 20."""
    plt.close("all")  # of other tests
    words = ["--algorithms", PPO, MDPO, "--labels", "PPO", "ou$r$", "--bootstrap", 50]
    run_tool("figures", monkeypatch, folder, *words, "--output", tmp_path / "new/f")
    names = {"training_return", "test_return", "generalization_gap", "aggregate"}
    expected = {f"{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in (tmp_path / "new/f").iterdir()} == expected | {"table.md"}
    for name in names:
        assert (tmp_path / f"new/f/{name}.pdf").read_bytes().startswith(b"%PDF")
        pixels = plt.imread(tmp_path / f"new/f/{name}.png")
        assert pixels.shape[1] >= 800 and pixels[..., :3].std() > 0.05
    assert not plt.get_fignums()

    table = (tmp_path / "new/f/table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| test return | PPO | ou$r$ |" in table and "hard levels" in table
    for game in ("bigfish", "starpilot"):
        assert f"| {game} | 15.00 ± 7.07 (2) | 20.00 ± 0.00 (2) |" in table
    ppo = [10 / 40, 20 / 40, 8.5 / 33.5, 18.5 / 33.5]
    assert f"| interquartile mean | PPO | {np.mean(sorted(ppo)[1:3]):.3f} [" in table
    assert f"| optimality gap | PPO | {1 - np.mean(ppo):.3f} [" in table
    score = (20 / 40 + 18.5 / 33.5) / 2
    assert f"| interquartile mean | ou$r$ | {score:.3f} [{score:.3f}, {score:.3f}] |" in table
    assert "| probability of improvement | P(ou$r$ > PPO) | 0.750 [" in table


def test_what_is_unfinished_or_missing(folder, tmp_path, monkeypatch, capsys):
    """Is said; an earlier final test, which a run keeps that goes on, does not count."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(0.01)}], (5.0,), 1000)
    write_run(tmp_path, f"starpilot__{PPO}__3__1", [{TEST: line(0.01)}], (5.0,), 500)
    words = ["--algorithms", PPO, MDPO, "--tags", TEST, "--bootstrap", 50, "--output", tmp_path / "f"]
    run_tool("figures", monkeypatch, folder, tmp_path, *words)
    out = capsys.readouterr().out
    assert f"left out: starpilot__{PPO}__3__1, which has no final test" in out
    assert "no test there: maze" in out
    assert "| maze | 5.00 (1) | missing |" in out
    assert "| starpilot | 15.00 ± 7.07 (2) | 20.00 ± 0.00 (2) |" in out


def test_one_test_of_one_run(tmp_path, monkeypatch, capsys):
    """Its point is visible, and nobody is there to be compared with; the levels are easy."""
    write_run(
        tmp_path, f"starpilot__{PPO}__1__1", [{TEST: {64: 7.0}}], (33.25,), 64, distribution_mode="easy"
    )
    _, (panel,) = draw(read(tmp_path, distribution_mode="easy"), {PPO: "PPO"})
    assert panel.lines[1].get_marker() == "." and set(panel.lines[1].get_ydata()) == {7.0}
    words = ["--distribution-mode", "easy", "--bootstrap", 50, "--output", tmp_path / "f"]
    run_tool("figures", monkeypatch, tmp_path, *words)
    out = capsys.readouterr().out
    assert f"missing: {TRAIN}" in out and "one seed of PPO" in out and "P(" not in out
    assert "| starpilot | 33.25 (1) |" in out and "easy levels" in out
    assert "| interquartile mean | PPO | 0.500 [0.500, 0.500] |" in out


@pytest.mark.parametrize("name", ["curves.csv", "curves.csv.gz"])
def test_csv_gives_the_same_figures(name, folder, tmp_path, monkeypatch):
    words = ["--tags", TEST, "--bootstrap", 50]
    run_tool("figures", monkeypatch, folder, *words, "--output", tmp_path / "a", "--csv", tmp_path / name)
    text = (tmp_path / name).read_bytes()
    if name.endswith("gz"):
        text = gzip.decompress(text)
    lines = text.decode().splitlines()
    assert lines[0] == "run,tag,step,value"
    assert f"bigfish__{MDPO}__2__1700000002/agent_2,{TEST},1000,80" in lines
    run_tool("figures", monkeypatch, tmp_path / name, *words, "--output", tmp_path / "b")
    assert (tmp_path / "a/table.md").read_text() == (tmp_path / "b/table.md").read_text()
    one, other = [plt.imread(tmp_path / folder / "test_return.png") for folder in ("a", "b")]
    assert np.abs(one - other).mean() < 1e-4  # of 1


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
    assert figures.return_near(run, "train", 1_000_000) == 3
    assert figures.return_near(run, "test", 1_000_000) == 32
    assert figures.return_near(run, "test", 2_000_000) == 128
    assert figures.return_near(run, "train", 2_000_000) is None


def write_starpilot(root: Path, seed: int, curves: dict, *more, **settings):
    """A run with the published settings, but for those given."""
    settings = figures.PUBLISHED_SETTINGS | {"distribution_mode": "easy"} | settings
    write_run(root, f"starpilot__{PPO}__{seed}__1700000000", [curves], *more, **settings)


def reference_words(root: Path) -> list:
    flags = ["--distribution-mode", "easy", "--reference", PUBLISHED, "--bootstrap", 10]
    return [root, *flags, "--output", root / "f"]


def test_published_returns(tmp_path, monkeypatch, capsys):
    """The mean of what is near; what is not there stays empty. Picture: the points that the runs came to."""
    curves = {TRAIN: {240_000: 2.0, 260_000: 4.0, 300_000: 90.0, 490_000: 5.0}}
    curves[TEST] = {250_000: 1.5, 490_000: 7.0}
    write_starpilot(tmp_path, 1, curves, (6.25,), 507_904)
    write_starpilot(tmp_path, 2, {TRAIN: {250_000: 8.0}})
    run_tool("figures", monkeypatch, *reference_words(tmp_path))
    table = capsys.readouterr().out.partition("| game |")[2].splitlines()
    assert table[0] == " return | steps | algorithm | seed 1 | seed 2 | published | their runs |"
    assert table[2:6] == [
        "| starpilot | train | 250,000 | PPO | 3.00 | 8.00 | 3.15 | 3.00 to 3.30 |",
        "| starpilot | train | 500,000 | PPO | 5.00 |  | 4.41 | 4.33 to 4.48 |",
        "| starpilot | test | 250,000 | PPO | 1.50 |  | 2.97 | 2.69 to 3.13 |",
        "| starpilot | test | 500,000 | PPO | 6.25 |  | 3.78 | 3.37 to 4.50 |",
    ]
    reference = figures.read_reference(PUBLISHED)
    published = reference[reference.split == "test"]
    figure, (panel,) = draw(read(tmp_path, distribution_mode="easy"), {PPO: "PPO"}, reference=published)
    (errors,) = panel.containers
    marks, _, (bars,) = errors.lines
    assert list(marks.get_xdata()) == [0.25, 0.5] and list(marks.get_ydata()) == [2.97, 3.78]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[2.69, 3.13], [3.37, 4.50]]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PPO", "published"]


@pytest.mark.parametrize("name", ["num_levels", "start_level", "num_envs", "num_steps"])
def test_published_returns_are_of_other_settings(name, tmp_path, monkeypatch, capsys):
    write_starpilot(tmp_path, 1, {TRAIN: {250_000: 1.0}}, **{name: 7})
    with pytest.raises(SystemExit) as stop:
        run_tool("figures", monkeypatch, *reference_words(tmp_path))
    assert stop.value.code == 2
    assert f"--{name.replace('_', '-')} 7, and " in capsys.readouterr().err


def test_too_early_for_published_returns(tmp_path, monkeypatch, capsys):
    write_starpilot(tmp_path, 1, {TRAIN: {1000: 1.0}})
    run_tool("figures", monkeypatch, *reference_words(tmp_path))
    assert "No run has come to 250,000 steps" in capsys.readouterr().out


def test_the_results_give_their_numbers(tmp_path, monkeypatch, capsys):
    """Those of the pages, from the curves that lie beside them."""
    results = ROOT / "benchmark/results"
    words = ["--algorithms", PPO, "--distribution-mode", "easy", "--bootstrap", 10, "--output", tmp_path]
    run_tool("figures", monkeypatch, results / "curves.csv", *words, "--reference", PUBLISHED)
    out = capsys.readouterr().out
    assert "| starpilot | train | 250,000 | PPO | 2.82 | 3.34 | 3.15 | 3.00 to 3.30 |" in out
    assert "| starpilot | test | 500,000 | PPO | 5.01 | 4.11 | 3.78 | 3.37 to 4.50 |" in out
    words[1:2] = [PPO, MDPO]
    run_tool("figures", monkeypatch, results / "few_levels/curves.csv", *words)
    assert "| starpilot | 3.58 ± 0.19 (4) | 3.38 ± 0.19 (4) |" in capsys.readouterr().out


def test_published_numbers_are_whole():
    table = figures.read_reference(PUBLISHED)
    assert table.env_id.nunique() == 16 and set(table.split) == {"train", "test"}
    assert (table.return_min_run <= table.return_mean).all()
    assert (table.return_mean <= table.return_max_run).all()
    assert not table.duplicated(["env_id", "split", "env_steps"]).any()
    assert len(table) == 16 * 2 * 7


def test_published_settings(tmp_path):
    """The patch fits today's script, and changes the encoder's first weights and the rewards' scaling."""
    path = Path(shutil.copy(ROOT / "ppo_procgen.py", tmp_path))
    patch = ROOT / "benchmark/results/published_settings.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    assert path.read_text().count("0.99") == (ROOT / "ppo_procgen.py").read_text().count("0.99") + 1
    spec = importlib.util.spec_from_file_location("patched", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["patched"] = script
    spec.loader.exec_module(script)
    agent = script.Agent()
    for module in agent.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = (6 / (fan_in + fan_out)) ** 0.5  # Glorot's
            assert 0.95 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()
    assert agent.actor.weight.abs().max() < 0.01  # the heads stay as they were
