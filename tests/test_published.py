"""benchmark/published.py on runs whose returns are known."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"

import pandas as pd
import pytest
import torch
import torch.nn as nn
from common import ROOT
from test_figures import write_run

sys.path.insert(0, str(ROOT / "benchmark"))
import published
from figures import TEST, TRAIN

SHORT = {240_000: 2.0, 260_000: 4.0, 300_000: 90.0, 490_000: 5.0}


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["published.py", *map(str, words)])
    published.main(published.parse_args(published.Args, ""))


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    """Means within 5 % of the steps; final tests before those on the way; what is not there stays empty."""
    curves = [{TRAIN: SHORT, TEST: {250_000: 1.5, 490_000: 7.0}}]
    write_run(tmp_path, "starpilot__ppo_procgen__1__1700000000", curves, (6.25,), 507_904, mode="easy")
    write_run(tmp_path, "starpilot__ppo_procgen__2__1700000000", [{TRAIN: {250_000: 8.0}}], mode="easy")
    write_run(tmp_path, "starpilot__spo_procgen__1__1700000000", [{TRAIN: {250_000: 70.0}}], mode="easy")
    output = tmp_path / "new" / "curves"
    run_main(monkeypatch, tmp_path, "--output", f"{output}.png")
    table = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")
    ]
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
    write_run(tmp_path, "starpilot__ppo_procgen__1__1700000000", [{TRAIN: {250_000: 8.0}}], mode="easy")
    run_main(monkeypatch, tmp_path, "--output", tmp_path / "curves")


def test_published_numbers_are_whole():
    table = pd.read_csv(published.PUBLISHED, comment="#")
    assert table.env_id.nunique() == 16 and set(table.split) == {"train", "test"}
    assert (table.return_min_run <= table.return_mean).all() and (
        table.return_mean <= table.return_max_run
    ).all()
    assert not table.duplicated(["env_id", "split", "env_steps"]).any() and len(table) == 16 * 2 * 7


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
            assert 0.95 * bound < module.weight.abs().max() <= bound and not module.bias.any()
    assert agent.actor.weight.abs().max() < 0.01  # the heads stay as they were
    args = script.Args(env_id="fruitbot", num_envs=4, num_steps=8, num_eval_envs=1, num_minibatches=2)
    runner = script.Runner(args, agent, None, 0, 2, tmp_path / "run", torch.device("cpu"))
    assert (runner.normalizer.gamma, args.gamma) == (0.99, 0.999)
    runner.close()


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
    settings = {"mode": "easy", **published.SETTINGS, **settings}
    del settings["distribution_mode"]  # write_run's mode
    write_run(tmp_path, "starpilot__ppo_procgen__1__1700000000", [{TRAIN: {1000: 1.0}}], **settings)
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path, "--output", tmp_path / "new" / "curves", *words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("published.py: error: ")
    assert [word for word in expected if word not in err] == [] and not (tmp_path / "new").exists()


def test_nowhere_to_look(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch)
    assert stop.value.code == 2 and "PATHS" in capsys.readouterr().err
