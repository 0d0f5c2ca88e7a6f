"""benchmark/published.py on runs whose returns are known."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn as nn
from common import ROOT, error_message
from test_figures import write_run

sys.path.insert(0, str(ROOT / "benchmark"))
import published
from figures import FINAL, TEST, TRAIN
from helpers import run_tool

SHORT = {240_000: 2.0, 260_000: 4.0, 300_000: 90.0, 490_000: 5.0}


def write_starpilot(root: Path, seed: int, curves: dict, *more, algorithm: str = "ppo_procgen", **settings):
    """A run with the published settings, but for those given."""
    settings = {
        "mode": "easy",
        "num_levels": 200,
        "start_level": 0,
        "num_envs": 64,
        "num_steps": 256,
    } | settings
    write_run(root, f"starpilot__{algorithm}__{seed}__1700000000", [curves], *more, **settings)


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["published.py", *map(str, words)])
    run_tool(published.main, published.Args, "")


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    """Means within 5 % of the steps; final tests before those on the way; what is not there stays empty."""
    curves = {TRAIN: SHORT, TEST: {250_000: 1.5, 490_000: 7.0}}
    write_starpilot(tmp_path, 1, curves, (6.25,), 507_904)
    write_starpilot(tmp_path, 2, {TRAIN: {250_000: 8.0}})
    write_starpilot(tmp_path, 1, {TRAIN: {250_000: 70.0}}, algorithm="spo_procgen")
    output = tmp_path / "new" / "curves"
    run_main(monkeypatch, tmp_path, "--output", f"{output}.png")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = [line.strip("| ").split(" | ") for line in lines]
    assert table[0] == ["game", "return", "steps", "seed 1", "seed 2", "published", "their runs"]
    rows = {(split, steps): cells for _, split, steps, *cells in table[2:]}
    assert rows == {
        ("train", "250,000"): ["3.00", "8.00", "3.15", "3.00 to 3.30"],
        ("train", "500,000"): ["5.00", "", "4.41", "4.33 to 4.48"],
        ("test", "250,000"): ["1.50", "", "2.97", "2.69 to 3.13"],
        ("test", "500,000"): ["6.25", "", "3.78", "3.37 to 4.50"],
    }
    assert {path.name for path in output.parent.iterdir()} == {"curves.png", "curves.pdf"}
    assert output.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
def test_one_published_point(tmp_path, monkeypatch):
    write_starpilot(tmp_path, 1, {TRAIN: {250_000: 8.0}})
    run_main(monkeypatch, tmp_path, "--output", tmp_path / "curves")


def test_five_percent():
    """Of the published steps, both ways; at the end the final test counts, before it the test there."""
    rows = [
        ("train", TRAIN, 949_000, 1.0),
        ("train", TRAIN, 950_000, 2.0),
        ("train", TRAIN, 1_050_000, 4.0),
        ("train", TRAIN, 1_051_000, 8.0),
        ("test", TEST, 1_000_000, 16.0),
        ("test", FINAL, 1_050_000, 32.0),
        ("test", FINAL, 2_200_000, 64.0),
        ("test", TEST, 2_000_000, 128.0),
    ]
    run = pd.DataFrame(rows, columns=["split", "tag", "step", "value"])
    assert published.return_near(run, "train", 1_000_000) == 3
    assert published.return_near(run, "test", 1_000_000) == 32
    assert published.return_near(run, "test", 2_000_000) == 128
    assert published.return_near(run, "train", 2_000_000) is None


def test_what_is_drawn():
    """Training above, test below; of the published points those that the runs have come to, from the lowest
    to the highest of the three runs."""
    points = pd.read_csv(published.PUBLISHED, comment="#")
    rows = []
    for seed in ("1", "2"):
        for step in (200_000, 480_000):
            rows.append(("maze", seed, TRAIN, step, step / 1e5 * int(seed)))
            rows.append(("maze", seed, TEST, step, 7.0))
    data = pd.DataFrame(rows, columns=["game", "seed", "tag", "step", "value"])
    figure = published.draw(data, points)
    plt.close(figure)
    above, below = figure.axes
    assert above.get_title() == "maze" and "training" in above.get_ylabel()
    assert "full distribution" in below.get_ylabel()
    for axis, split in ((above, "train"), (below, "test")):
        expected = points[(points.env_id == "maze") & (points.split == split)][:2]
        (errors,) = axis.containers
        marks, _, (bars,) = errors.lines
        assert list(marks.get_xdata()) == [0.25, 0.5]
        assert list(marks.get_ydata()) == list(expected.return_mean)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert ends == pytest.approx(expected[["return_min_run", "return_max_run"]].to_numpy())
    lines = {line.get_label(): line for line in above.lines}
    assert list(lines["here, seed 2"].get_xdata()) == [0.2, 0.48]
    assert list(lines["here, seed 2"].get_ydata()) == pytest.approx([4, 9.6])
    assert list(lines["here, seed 1"].get_ydata()) == pytest.approx([2, 4.8])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == ["here, seed 1", "here, seed 2", "published, 3 runs"]


def test_the_results_give_their_table(tmp_path, monkeypatch, capsys):
    """The README's numbers, from the curves that lie beside it."""
    run_main(monkeypatch, ROOT / "benchmark/results/curves.csv", "--output", tmp_path / "published")
    out = capsys.readouterr().out
    assert "| starpilot | train | 250,000 | 2.82 | 3.34 | 3.15 | 3.00 to 3.30 |" in out
    assert "| starpilot | test | 500,000 | 5.01 | 4.11 | 3.78 | 3.37 to 4.50 |" in out


def test_published_numbers_are_whole():
    table = pd.read_csv(published.PUBLISHED, comment="#")
    assert table.env_id.nunique() == 16 and set(table.split) == {"train", "test"}
    assert (table.return_min_run <= table.return_mean).all()
    assert (table.return_mean <= table.return_max_run).all()
    assert not table.duplicated(["env_id", "split", "env_steps"]).any()
    assert len(table) == 16 * 2 * 7


def test_published_settings(tmp_path):
    """The patch fits today's script, and changes the encoder's first weights and the rewards' scaling."""
    path = Path(shutil.copy(ROOT / "ppo_procgen.py", tmp_path))
    patch = ROOT / "benchmark" / "results" / "published_settings.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("patched", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    agent = script.Agent()
    for module in agent.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = (6 / (fan_in + fan_out)) ** 0.5  # Glorot's
            assert 0.95 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()
    assert agent.actor.weight.abs().max() < 0.01  # the heads stay as they were
    args = script.Args(env_id="fruitbot", num_envs=4, num_steps=8, num_eval_envs=1, num_minibatches=2)
    _, _, (runner,) = script.set_up(args, tmp_path / "run", torch.device("cpu"))
    runner.close()
    assert runner.normalizer.gamma == 0.99
    assert args.gamma == 0.999


BAD = [  # settings of the run, what is written on the command line, and words that the message has
    ({"mode": "hard"}, [], ["--distribution-mode hard", "--distribution-mode easy is needed"]),
    ({"num_levels": 500}, [], ["starpilot__ppo_procgen__1__", "--num-levels 500", "--num-levels 200"]),
    ({"start_level": 1}, [], ["--start-level"]),
    ({"num_envs": 6}, [], ["--num-envs"]),
    ({"num_steps": 64}, [], ["--num-steps"]),
    ({}, ["--algorithm", "dqn"], ["--algorithm:", "dqn, only of ppo_procgen"]),
    ({}, [], ["250,000"]),
    ({}, ["--nope"], ["--nope"]),
    ({}, ["--output="], ["--output", "name"]),
    ({}, ["--output", "/proc/self/status/x"], ["--output", "/proc/self/status is no folder"]),
]


@pytest.mark.parametrize(("settings", "words", "expected"), BAD)
def test_bad_input(settings, words, expected, tmp_path, monkeypatch, capsys):
    write_starpilot(tmp_path, 1, {TRAIN: {1000: 1.0}}, **settings)
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path, "--output", tmp_path / "new" / "curves", *words)
    message = error_message(stop.value.code, *capsys.readouterr())
    assert [word for word in expected if word not in message] == [] and not (tmp_path / "new").exists()


def test_nowhere_to_look(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch)
    assert "PATHS" in error_message(stop.value.code, *capsys.readouterr())
