"""benchmark/figures.py on curves whose mean, deviation and scores are known."""

import gzip
import json
import os
import re
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from common import ROOT, error_message
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import figures
from figures import GAP, TEST, TRAIN
from helpers import Failure, run_tool

PPO = "ppo_procgen"
MDPO = "mdpo_procgen"


def write_run(
    root: Path,
    name: str,
    curves: list[dict],
    finals: tuple = (),
    end: int = 0,
    mode: str = "hard",
    **settings,
) -> Path:
    """A run folder as the scripts leave it. curves: {tag: {step: value}} of each agent; finals: the final
    return on the full distribution of each agent."""
    run = root / name
    for number, tags in enumerate(curves, 1):
        writer = SummaryWriter(run / f"agent_{number}" if len(curves) > 1 else run)
        for tag, curve in tags.items():
            for step, value in curve.items():
                writer.add_scalar(tag, value, step)
        writer.close()
    (run / "args.json").write_text(json.dumps({"distribution_mode": mode, **settings}))
    if finals:
        agents = [
            {
                "training_levels": {"mean": mean + 1, "returns": [mean, mean + 2]},
                "full_distribution": {"mean": mean, "returns": [mean, mean]},
                "generalization_gap": {"mean": 1.0},
            }
            for mean in finals
        ]
        content = {"args": {}, "global_step": end, "agents": agents}
        (run / "final_test.json").write_text(json.dumps(content))
    return run


def line(slope: float, start: int = 0, end: int = 1000, step: int = 100) -> dict[int, float]:
    return {x: slope * x for x in range(start, end + 1, step)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds each of PPO and MDPO on bigfish and starpilot; steps 0 to 1000, final tests after them."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        for game in ("bigfish", "starpilot"):
            curves = {TRAIN: line(0.02 * seed), TEST: line(0.01 * seed), GAP: line(0.01 * seed)}
            write_run(root, f"{game}__{PPO}__{seed}__170000000{seed}", [curves], (10.0 * seed,), 1000)
            pair = [
                {TRAIN: line(0.05), TEST: line(0.02 * seed)},
                {TRAIN: line(0.05), TEST: line(0.04 * seed)},
            ]
            write_run(root, f"{game}__{MDPO}__{seed}__170000000{seed}", pair, (19.0, 21.0), 1000)
    return root


def make_args(*paths: Path, **options) -> figures.Args:
    return figures.Args(paths=paths, **options)


def load(*paths: Path, **options):
    args = make_args(*paths, **options)
    return figures.select(figures.read(args, {"distribution_mode": "hard"}), args)


def rows_of(data, tag, game="bigfish", algorithm=PPO):
    return data[(data.tag == tag) & (data.game == game) & (data.algorithm == algorithm)]


def run_main(monkeypatch, *words):
    """figures.py from its command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
    run_tool(figures.main, figures.Args, "")


def draw(data, tag: str, **options):
    """The panels of a figure of curves, and the figure."""
    args = make_args(ROOT, **options)
    figure = figures.draw_curves(data, tag, figures.name_algorithms(data, args), args)
    plt.close(figure)
    return figure.axes, figure


def test_a_pair_is_one_seed_the_mean_of_the_two(runs):
    steps, values = figures.common_steps(rows_of(load(runs), TEST, algorithm=MDPO), smooth=1)
    assert (steps[0], steps[-1], values.shape) == (0, 1000, (2, 200))
    assert values.loc["1"].to_numpy() == pytest.approx(0.03 * steps)
    assert values.loc["2"].to_numpy() == pytest.approx(0.06 * steps)


def test_any_number_of_agents_is_one_seed(tmp_path):
    """Of twelve agents the tenth is no other than the second: its number has two digits. Where one of them
    has no value there is none."""
    slopes = range(1, 13)
    curves = [{TEST: line(slope)} for slope in slopes]
    curves[-1] = {TEST: line(12, end=500)}
    finals = tuple(float(slope**2) for slope in slopes)
    write_run(tmp_path, f"maze__{MDPO}__1__1", curves, finals, 1000)
    data = load(tmp_path)
    steps, values = figures.common_steps(rows_of(data, TEST, "maze", MDPO), smooth=1)
    assert values.loc["1"][steps <= 500].to_numpy() == pytest.approx(6.5 * steps[steps <= 500])
    assert values.loc["1"][steps > 500].isna().all()
    of_agent_10 = data[data.run.str.endswith("/agent_10")]
    assert (of_agent_10.value[of_agent_10.tag == TEST] == 10 * of_agent_10.step[data.tag == TEST]).all()
    assert of_agent_10.value[of_agent_10.tag == figures.FINAL].tolist() == [100]


def test_curves_of_different_length_and_steps(tmp_path):
    """A common grid; no value before a run's first and after its last."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    write_run(tmp_path, f"maze__{PPO}__2__1", [{TEST: line(3.0, start=70, end=490, step=70)}])
    steps, values = figures.common_steps(rows_of(load(tmp_path), TEST, "maze"), smooth=1, points=1001)
    assert values.loc["1"].to_numpy() == pytest.approx(steps)
    inside = (steps >= 70) & (steps <= 490)
    assert values.loc["2"][inside].to_numpy() == pytest.approx(3 * steps[inside])
    assert values.loc["2"][~inside].isna().all()


def test_smoothing_only_if_asked(tmp_path):
    zigzag = {step: float(step // 10 % 2 * 6) for step in range(0, 100, 10)}
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: zigzag}])
    rows = rows_of(load(tmp_path), TEST, "maze")
    _, values = figures.common_steps(rows, smooth=1, points=10)
    assert values.loc["1"].tolist() == [0, 6] * 5
    _, values = figures.common_steps(rows, smooth=3, points=10)
    assert values.loc["1"].tolist() == pytest.approx([3, 2, 4, 2, 4, 2, 4, 2, 4, 3])


def test_what_is_drawn(runs, tmp_path):
    """Mean and standard deviation (n - 1) over seeds: of slopes 1 and 2, 1.5 and 0.7071."""
    write_run(tmp_path, f"starpilot__{PPO}__3__1", [{TEST: line(0.03, end=500)}])
    data = load(runs, tmp_path)
    options = {"algorithms": (PPO, MDPO), "labels": ("PPO", "ours")}
    (bigfish, starpilot), figure = draw(data, TEST, **options)
    assert (bigfish.get_title(), starpilot.get_title()) == ("bigfish", "starpilot")
    assert figure.get_supylabel() == "test return"
    assert "million" in figure.get_supxlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PPO", "ours"]
    colors = [handle.get_color() for handle in figure.legends[0].legend_handles]
    assert colors == [bigfish.lines[1].get_color(), bigfish.lines[3].get_color()] and len(set(colors)) == 2

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

    smoothed, _ = draw(data, TEST, **options, smooth=11)
    assert smoothed[0].lines[1].get_ydata()[0] == pytest.approx(0.015 * 250)  # the mean of six values


def test_only_what_is_there_is_in_the_legend(tmp_path):
    """Under the colour that it has in the other figures."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TRAIN: line(1.0)}])
    write_run(tmp_path, f"maze__{MDPO}__1__1", [{TEST: line(1.0)}] * 2)
    _, figure = draw(load(tmp_path), TEST, algorithms=(PPO, MDPO))
    (handle,) = figure.legends[0].legend_handles
    assert (handle.get_label(), handle.get_color()) == ("MDPO", "C1")
    write_run(tmp_path, f"ninja__{PPO}__1__1", [{TEST: line(1.0)}])  # in a later panel
    _, figure = draw(load(tmp_path), TEST, algorithms=(PPO, MDPO))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PPO", "MDPO"]


@pytest.mark.parametrize("names", [("a", "b"), [f"{PPO}+of_the_data_of_{i}_agents" for i in range(6)]])
def test_the_legend_fits_into_the_figure(names, tmp_path):
    for name in names:
        write_run(tmp_path, f"maze__{name}__1__1", [{TEST: line(1.0)}])
    _, figure = draw(load(tmp_path), TEST, algorithms=tuple(names))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_files(runs, tmp_path, monkeypatch):
    run_main(monkeypatch, runs, "--output", tmp_path / "new/f", "--bootstrap", 50)
    names = {"training_return", "test_return", "generalization_gap", "aggregate"}
    expected = {f"{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    assert {path.name for path in (tmp_path / "new/f").iterdir()} == expected | {"table.md"}
    for name in names:
        assert (tmp_path / f"new/f/{name}.pdf").read_bytes().startswith(b"%PDF")
        pixels = plt.imread(tmp_path / f"new/f/{name}.png")
        assert pixels.shape[1] >= 800 and pixels[..., :3].std() > 0.05
    assert not plt.get_fignums()


def test_one_panel_of_one_test(tmp_path, monkeypatch, capsys):
    """A point is visible; one algorithm has nobody to be compared with."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: {64: 7.0}}], (7.0,), 64)
    (panel,), _ = draw(load(tmp_path), TEST)
    assert panel.lines[1].get_marker() == "." and set(panel.lines[1].get_ydata()) == {7.0}
    capsys.readouterr()
    run_main(monkeypatch, tmp_path, "--output", tmp_path, "--bootstrap", 50)
    out = capsys.readouterr().out
    assert f"missing: {TRAIN}" in out and "one seed of PPO" in out and "P(" not in out
    assert "| maze | 7.00 (1) |" in out and "| interquartile mean | 0.500 [0.500, 0.500] |" in out


def test_what_is_missing_is_said(runs, tmp_path, capsys):
    write_run(tmp_path, f"maze__{PPO}__3__1", [{TEST: line(1.0, end=500)}])
    figures.print_missing(load(runs, tmp_path, games=("bigfish", "maze"), algorithms=(PPO,)))
    assert capsys.readouterr().out.splitlines() == [
        "missing: ppo_procgen on bigfish, seed 3",
        "missing: ppo_procgen on maze, seed 1",
        "missing: ppo_procgen on maze, seed 2",
        "short: ppo_procgen on maze, seed 3, is at 500 of 1,000 steps",
    ]


def test_the_newest_run_counts(runs, tmp_path, capsys):
    newer = f"bigfish__{PPO}__2__1800000000"
    write_run(tmp_path, newer, [{TEST: line(5.0)}])
    (tmp_path / f"bigfish__{PPO}__1__1900000000").mkdir()  # and one that was killed before it wrote anything
    rows = rows_of(load(runs, tmp_path), TEST)
    assert set(rows.run) == {newer, f"bigfish__{PPO}__1__1700000001"}
    assert capsys.readouterr().out.count("left out") == 1


def test_returns(runs, tmp_path):
    """The final test; where one lacks it, the last test that all have reached, as of step 500 here."""
    labels = {PPO: "a", MDPO: "b"}
    returns, unfinished = figures.returns_of(load(runs), labels)
    assert unfinished == set() and returns.keys() == {"a", "b"}
    for game in ("bigfish", "starpilot"):
        assert returns["a"][game].tolist() == [10, 20] and returns["b"][game].tolist() == [20, 20]
    write_run(tmp_path, f"bigfish__{PPO}__3__1", [{TEST: line(0.03, end=570)}])
    returns, unfinished = figures.returns_of(load(runs, tmp_path), labels)
    assert unfinished == {("a", "bigfish")} and returns["a"]["bigfish"] == pytest.approx([5, 10, 15])
    assert returns["a"]["starpilot"].tolist() == [10, 20]


def test_returns_of_a_run_that_went_on(tmp_path):
    """Its earlier final test, which its folder keeps until the next one, or an older CSV, does not count."""
    labels, name = {PPO: "a"}, f"bigfish__{PPO}__1__1"
    write_run(tmp_path / "early", name, [{TEST: line(0.01, end=500)}], (4.0,), 500)
    write_run(tmp_path / "on", name, [{TEST: line(0.01, end=800)}], (4.0,), 500)
    write_run(tmp_path / "late", name, [{TEST: line(0.01)}], (9.0,), 1000)
    for folders, expected, going_on in (
        (["early"], 4.0, set()),
        (["on"], 8.0, {("a", "bigfish")}),
        (["early", "late"], 9.0, set()),
        (["late", "early"], 9.0, set()),
    ):
        returns, unfinished = figures.returns_of(load(*(tmp_path / each for each in folders)), labels)
        assert unfinished == going_on and returns["a"]["bigfish"] == pytest.approx([expected])


def test_normalised_scores(capsys):
    """By hand; negative below the minimum; as many seeds as all games have."""
    returns = {"a": {"bigfish": np.array([20.0, 40.0]), "maze": np.array([4.0, 1.0]), "heist": np.ones(2)}}
    returns["b"] = {"bigfish": np.array([0.0, 10.0, 1.0]), "maze": np.array([7.0])}
    scores = figures.normalised_scores(returns, set(), "hard")
    assert scores["a"] == pytest.approx(np.array([[0.5, 0.0], [1.0, -0.5]]))
    assert scores["b"] == pytest.approx(np.array([[0.0, 0.5]]))
    assert figures.normalised_scores(returns, set(), "easy")["b"] == pytest.approx(np.array([[0.0, 0.4]]))
    out = capsys.readouterr().out
    assert "no test there: heist" in out and "2 runs of b" in out and "one seed of b" in out
    assert figures.normalised_scores({"a": {"maze": np.ones(1)}, "b": {}}, set(), "hard") == {}


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
    table = {game: np.array([float(low), float(high)]) for game, low, high in games}
    scores = figures.normalised_scores({"a": table}, set(), mode)["a"]
    assert scores == pytest.approx(np.array([[0.0] * 16, [1.0] * 16]))
    assert set(figures.BOUNDS[mode]) == set(table)


def test_aggregate_metrics():
    """By hand: the middle half of 0, 0.2, 0.4, 2 has mean 0.3; they lack 1, 0.8, 0.6 and 0 to 1. Every score
    of b beats those of a, and with itself a is even."""
    a = np.array([[0.0, 0.2, 0.4, 2.0]] * 3)
    estimates = figures.estimate({"a": a, "b": a + 3, "c": a}, samples=50)
    iqm, gap, improvement = [each.values for each in estimates]
    assert [each.metric for each in estimates] == [
        "interquartile mean",
        "optimality gap",
        "probability of improvement",
    ]
    assert iqm["a"] == pytest.approx((0.3, 0.3, 0.3)) and iqm["b"] == pytest.approx((3.3, 3.3, 3.3))
    assert gap["a"] == pytest.approx((0.6, 0.6, 0.6)) and gap["b"] == pytest.approx((0, 0, 0))
    assert improvement == {"P(b > a)": (1, 1, 1), "P(c > a)": (0.5, 0.5, 0.5), "P(c > b)": (0, 0, 0)}


def test_intervals():
    """Contain the estimate, have a width where seeds differ, and are the same every time."""
    scores = {"a": np.random.default_rng(0).normal(0.5, 0.2, (5, 4))}
    first = figures.estimate(scores, samples=200)
    assert len(first) == 2  # and no pair
    for each in first:
        point, low, high = each.values["a"]
        assert low < point < high < low + 0.5
    assert figures.estimate(scores, samples=200) == first


def test_aggregate_is_drawn():
    """In each panel a row for each algorithm or pair: a bar from end to end, and a mark at the estimate."""
    values = {"a": (0.3, 0.2, 0.5), "b": (0.7, 0.6, 0.9)}
    pairs = {"P(b > a)": (0.8, 0.7, 1.0)}
    estimates = [
        figures.Estimates("interquartile mean", values),
        figures.Estimates("probability of improvement", pairs, of_pairs=True),
    ]
    figure = figures.draw_aggregate(estimates)
    plt.close(figure)
    for axis, each in zip(figure.axes, estimates, strict=True):
        assert axis.get_title() == each.metric
        assert [label.get_text() for label in axis.get_yticklabels()] == list(each.values)
        for row, (point, low, high) in enumerate(each.values.values()):
            bar, mark = axis.lines[2 * row : 2 * row + 2]
            assert (list(bar.get_xdata()), list(bar.get_ydata())) == ([low, high], [row, row])
            assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([point], [row])
    assert [axis.get_xlabel() for axis in figure.axes] == ["normalised test score", "probability"]


def test_table(runs, tmp_path, monkeypatch, capsys):
    """bigfish scores (R - 0) / 40 and starpilot (R - 1.5) / 33.5, of returns 10 and 20, and 20 and 20."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(0.01, end=500)}])
    words = ["--algorithms", PPO, MDPO, "--tags", TEST, "--bootstrap", 50]
    run_main(monkeypatch, runs, tmp_path, *words, "--output", tmp_path / "figures")
    table = (tmp_path / "figures/table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n\n")[0].splitlines()
    ]
    assert rows[:2] == [["test return", "PPO", "MDPO"], ["---"] * 3]
    assert rows[2:5] == [
        ["bigfish", "15.00 ± 7.07 (2)", "20.00 ± 0.00 (2)"],
        ["maze", "5.00 (1) †", "missing"],
        ["starpilot", "15.00 ± 7.07 (2)", "20.00 ± 0.00 (2)"],
    ]
    ppo = [10 / 40, 20 / 40, 8.5 / 33.5, 18.5 / 33.5]
    assert rows[5][1].startswith(f"{np.mean(sorted(ppo)[1:3]):.3f} [")
    assert rows[6][1].startswith(f"{1 - np.mean(ppo):.3f} [")
    score = (20 / 40 + 18.5 / 33.5) / 2
    assert rows[5][2] == f"{score:.3f} [{score:.3f}, {score:.3f}]"
    assert "P(MDPO > PPO) = 0.75 [" in table and "hard levels" in table and "†:" in table


def test_scores_of_unfinished_runs_are_marked(runs, tmp_path, monkeypatch):
    """They are of an earlier step than the final tests that they stand beside."""
    write_run(tmp_path, f"starpilot__{PPO}__3__1", [{TEST: line(0.01, end=500)}])
    words = ["--algorithms", PPO, MDPO, "--tags", TEST, "--bootstrap", 50]
    run_main(monkeypatch, runs, tmp_path, *words, "--output", tmp_path / "figures")
    table = (tmp_path / "figures/table.md").read_text()
    metrics = [row for row in table.splitlines() if row.startswith(("| interquartile", "| optimality"))]
    assert len(metrics) == 2
    for row in metrics:
        ppo, mdpo = row.strip("| ").split(" | ")[1:]
        assert ppo.endswith("†") and not mdpo.endswith("†")
    assert "P(MDPO > PPO †) = " in table


def test_scores_of_easy_levels(tmp_path, monkeypatch):
    write_run(tmp_path, f"starpilot__{PPO}__1__1", [{TEST: line(1.0)}], (33.25,), 1000, mode="easy")
    words = ["--distribution-mode", "easy", "--tags", TEST, "--bootstrap", 50]
    run_main(monkeypatch, tmp_path, *words, "--output", tmp_path / "figures")
    table = (tmp_path / "figures/table.md").read_text()
    assert "| interquartile mean | 0.500 [0.500, 0.500] |" in table and "easy levels" in table


@pytest.mark.parametrize("name", ["curves.csv", "curves.csv.gz"])
def test_csv_gives_the_same_figures(name, runs, tmp_path, monkeypatch):
    words = ["--tags", TEST, "--bootstrap", 50]
    run_main(monkeypatch, runs, *words, "--output", tmp_path / "a", "--csv", tmp_path / name)
    text = (tmp_path / name).read_bytes()
    if name.endswith("gz"):
        text = gzip.decompress(text)
    lines = text.decode().splitlines()
    assert lines[0] == "run,tag,step,value"
    assert f"bigfish__{MDPO}__2__1700000002/agent_2,{TEST},1000,80" in lines
    run_main(monkeypatch, tmp_path / name, *words, "--output", tmp_path / "b")
    assert (tmp_path / "a/table.md").read_text() == (tmp_path / "b/table.md").read_text()
    one, other = [plt.imread(tmp_path / folder / "test_return.png") for folder in ("a", "b")]
    assert np.abs(one - other).mean() < 1e-4  # of 1


def test_the_curves_of_the_results_are_read():
    """As they were written by the version that made them: also agents of a pair, variants, final tests."""
    path = ROOT / "benchmark/results/curves.csv"
    data = load(path, distribution_mode="easy")
    assert {"ppo_procgen", "mdpo_procgen", "ppo_procgen+on_mdpo"} <= set(data.algorithm)
    labels = {name: name for name in set(data.algorithm)}
    returns, unfinished = figures.returns_of(data, labels)
    seeds_of_mdpo = [(4.21 + 4.18) / 2, (4.49 + 4.54) / 2]
    assert returns["mdpo_procgen"]["starpilot"] == pytest.approx(seeds_of_mdpo, abs=0.01)
    assert returns["ppo_procgen"]["fruitbot"] == pytest.approx([-0.25, 0.20], abs=0.01)
    assert unfinished == set()


def test_links_are_followed(tmp_path):
    """Of a run, of a folder of runs, and under a run's name to a folder of another; a circle has an end."""
    first = write_run(tmp_path / "far", f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    second = write_run(tmp_path / "far", f"maze__{PPO}__2__1", [{TEST: line(2.0)}] * 2)
    here = tmp_path / "here"
    here.mkdir()
    (here / "first").symlink_to(first)
    (here / second.name).symlink_to(second)
    (here / "maze__other__1__1").symlink_to(first)
    (here / "deeper").symlink_to(tmp_path / "deeper")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "back").symlink_to(here)
    names = {first.name, f"{second.name}/agent_1", f"{second.name}/agent_2", "maze__other__1__1"}
    data = load(here)
    assert set(data.run) == names and len(data) == len(names) * 11
    assert len(figures.find_curves(here)) == len(names)
    assert set(load(here / "first").run) == {first.name}


def test_damaged_files_are_read_as_far_as_they_go(runs, tmp_path):
    name = f"maze__{PPO}__1__1"
    write_run(tmp_path, name, [{TEST: line(1.0, step=1)}], (5.0,), 1000)
    (events,) = (tmp_path / name).glob("events*")
    events.write_bytes(events.read_bytes()[: events.stat().st_size // 2])
    (tmp_path / name / "final_test.json").write_text('{"agents": [')
    empty = tmp_path / f"maze__{PPO}__2__1"  # and has no settings
    empty.mkdir()
    (empty / "events.out.tfevents.1").touch()
    stray = tmp_path / "not a run"
    write_run(tmp_path, stray.name, [{TEST: line(1.0)}])
    data = load(tmp_path)
    assert set(data.run) == {name} and set(data.tag) == {TEST}
    assert 300 < data.step.max() < 700 and (data.value == data.step).all()


def test_labels():
    assert figures.label_of("ppo_procgen") == "PPO"
    assert figures.label_of("mdspo_procgen+wide") == "MDSPO, wide"
    assert figures.label_of("my_own") == "my_own"
    data = pd.DataFrame({"algorithm": ["_mine"]})
    labels = figures.name_algorithms(data, figures.Args(paths=(ROOT,)))
    assert not labels["_mine"].startswith("_")  # matplotlib's legends leave such out


@pytest.mark.parametrize("options", [{"games": ("maze",)}, {"algorithms": (PPO,)}])
def test_what_is_not_asked_for_may_be_of_another_mode(options, tmp_path, monkeypatch):
    """And is not in the CSV."""
    write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    write_run(tmp_path, f"heist__{MDPO}__1__1", [{TEST: line(1.0)}] * 2, mode="easy")
    assert set(load(tmp_path, **options).run) == {f"maze__{PPO}__1__1"}
    words = [word for name, (value,) in options.items() for word in (f"--{name}", value)]
    run_main(monkeypatch, tmp_path, "--output", tmp_path, "--csv", tmp_path / "new/c.csv", *words)
    rows = (tmp_path / "new/c.csv").read_text().splitlines()
    assert len(rows) == 12 and all(row.startswith(f"maze__{PPO}__1__1,") for row in rows[1:])


def test_runs_without_args_json(tmp_path):
    """Older ones: their settings are in agent.pt, or in the checkpoint if they have not come that far."""
    run = write_run(tmp_path, f"maze__{MDPO}__1__1", [{TEST: line(1.0)}] * 2)
    (run / "args.json").unlink()
    with pytest.raises(Failure, match=rf"{run} has no args\.json"):
        load(tmp_path)
    torch.save({"args": {"distribution_mode": "easy", "channels": (4, 4, 4)}}, run / "checkpoint.pt")
    with pytest.raises(Failure, match=rf"{run}/agent_1 was made with --distribution-mode easy"):
        load(tmp_path)
    for agent in ("agent_1", "agent_2"):
        torch.save({"args": {"distribution_mode": "hard"}}, run / agent / "agent.pt")
    assert len(load(tmp_path)) == 22
    (run / "agent_2" / "agent.pt").write_bytes(b"no such file")
    with pytest.raises(Failure, match=rf"cannot read {run}/agent_2/agent\.pt"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "3"])
def test_args_json_that_is_damaged(text, tmp_path):
    run = write_run(tmp_path, f"maze__{PPO}__1__1", [{TEST: line(1.0)}])
    (run / "args.json").write_text(text)
    with pytest.raises(Failure, match=rf"cannot read {run}/args\.json"):
        load(tmp_path)


BAD = [  # what is written on the command line beside the runs, and words that the message has
    ("", ["PATHS", "one or more"]),
    ("RUNS nowhere", ["nowhere"]),
    ("RUNS --games pong", ["--games", "pong", "bigfish, starpilot"]),
    ("RUNS --algorithms a2c", ["--algorithms", "a2c", MDPO]),
    ("RUNS --labels A", ["--labels", "--algorithms"]),
    (f"RUNS --algorithms {PPO} --labels $\\lambd$", ["--labels", "lambd", "no formula"]),
    (f"RUNS --algorithms {PPO} --labels a\x07", ["--labels", "printed"]),
    (f"RUNS --algorithms {PPO} {MDPO} --labels A A", ["--labels", "differ"]),
    ("RUNS --distribution-mode easy", ["--distribution-mode", "easy", "hard"]),
    ("RUNS --distribution-mode medium", ["--distribution-mode", "medium"]),
    ("RUNS --smooth 0", ["--smooth", "1"]),
    ("RUNS --bootstrap 1", ["--bootstrap", "10"]),
    ("RUNS --no-such-flag", ["--no-such-flag"]),
    ("RUNS --csv bad.csv/x.csv", ["--csv: ", "bad.csv is no folder"]),
    ("RUNS --csv=", ["--csv", "name"]),
    ("RUNS --output bad.csv", ["--output: ", "bad.csv is no folder"]),
    ("EMPTY", ["no runs"]),
    ("EMPTY --games maze", ["--games", "none"]),
    ("CSV", ["bad.csv", "run, tag, step, value"]),
    ("BINARY", ["bad.bin", "run, tag, step, value"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[words for words, _ in BAD])
def test_bad_input(words, expected, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("run,tag,value\na,b,1\n")
    (tmp_path / "bad.bin").write_bytes(bytes(range(256)))
    places = {"RUNS": runs, "EMPTY": "empty", "CSV": "bad.csv", "BINARY": "bad.bin"}
    words = [places.get(word, word) for word in words.split()]
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *words)
    message = error_message(stop.value.code, *capsys.readouterr())
    assert [word for word in expected if word not in message] == []
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "bad.csv", "bad.bin"}
