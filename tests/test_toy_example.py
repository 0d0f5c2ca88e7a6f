"""The toy example: its two clearest points, its data, its files and its errors."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import toy_example

SEEDS = range(4)


def train(**settings) -> np.ndarray:
    """(seeds, 2, 2): A, B; where the colour tells the side, where it misleads."""
    return np.stack([toy_example.train(seed, **settings) for seed in SEEDS])


def test_alone_a_learns_the_color_and_b_the_coin():
    for coin_size in (1, 9):
        a, b = toy_example.train(0, coin_size, distill_coef=0.0, iterations=12)
        assert a[0] > 0.95 and a[1] < 0.1
        assert b.min() > 0.95


def test_a_visible_coin_frees_a():
    """With the paper's coefficients; but not if no gradient reaches the peer."""
    assert train(coin_size=9).min() > 0.95
    a, b = toy_example.train(0, 9, detach_peer=True)
    assert a[0] > 0.95 and a[1] < 0.1
    assert b[0] > 0.95 and b[1] < 0.8


def test_a_strong_distillation_infects_b():
    results = train(coin_size=1, distill_coef=10.0)
    assert results[..., 0].min() > 0.95
    assert results[..., 1].max() < 0.1


def test_pictures():
    """Red then cyan in each pair, A's pair with the coin right on red; the agent is the same in all."""
    obs = toy_example.make_pictures(5)
    assert obs.dtype == torch.uint8 and obs.shape == (4, 64, 64, 3)
    coin = (obs == torch.tensor([255, 255, 0])).all(-1)
    assert coin.sum((1, 2)).tolist() == [25] * 4
    assert coin[:, :, 34:].any(2).any(1).tolist() == [True, False, False, True]
    assert toy_example.SIDES.tolist() == [1, 0, 0, 1]
    assert obs[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 255]] * 2
    agent = (obs == 255).all(-1)
    assert agent[0].any() and (agent == agent[0]).all()


def test_rollout():
    logprobs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]).log()
    torch.manual_seed(0)
    for num_pictures in (2, 4):
        pictures, actions, action_logprobs, rewards = toy_example.rollout(logprobs, num_pictures)
        assert pictures.unique().tolist() == list(range(num_pictures))
        assert torch.equal(rewards == 1, actions == torch.tensor([1, 0, 0, 1])[pictures])
        assert torch.equal(action_logprobs, logprobs[pictures, actions])
        assert (actions[pictures < 2] == 0).float().mean() == pytest.approx(0.9, abs=0.06)


def run(folder, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark" / "toy_example.py"), *words]
    env = os.environ | {"MPLCONFIGDIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=120)


def test_command(tmp_path):
    result = run(tmp_path, *"--seeds 1 --coin-sizes 2 7 --iterations 1 --channels 1 1 1".split())
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "toy_example.pdf",
        "toy_example.png",
    ]
    assert (tmp_path / "figures" / "toy_example.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "figures" / "toy_example.png").read_bytes().startswith(b"\x89PNG")
    for name in toy_example.ROWS:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name + "  ")]
        assert line.count("/") == 2


def test_table(capsys):
    results = np.ones((len(toy_example.ROWS), 1, 2, 2, 2))
    results[1, 0, :, 0, 1] = 0.25, 0.35
    results[1, 0, :, 1, 1] = 0.5
    toy_example.print_table(toy_example.Args(seeds=2, coin_sizes=(4,)), results)
    assert "0.30 / 0.50" in capsys.readouterr().out.splitlines()[4]


@pytest.mark.parametrize(
    "words",
    [
        "--seeds 0",
        "--coin-sizes 25",
        "--coin-sizes",
        "--iterations x",
        "--processes -1",
        "--channels 1 2 0",
        "--sede 1",
        "--figure=",
        "--figure /",
        "--figure /proc/x",
    ],
)
def test_bad_input(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy_example.py", *words.split()])
    monkeypatch.setattr(toy_example, "make_map", None)
    with pytest.raises(SystemExit) as stop:
        toy_example.main(toy_example.parse_args(toy_example.Args, ""))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("toy_example.py: error: ") and re.match("[-a-z]+", words)[0] in err
    assert not list(tmp_path.iterdir())


def test_figure_where_no_folder_can_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy_example.py"])
    (tmp_path / "file").write_text("kept")
    args = toy_example.Args(figure=tmp_path / "file" / "figure")
    with pytest.raises(SystemExit) as stop:
        toy_example.main(args)
    assert stop.value.code == 2 and (tmp_path / "file").read_text() == "kept"
    assert capsys.readouterr().err == f"toy_example.py: error: --figure {args.figure}: File exists\n"
