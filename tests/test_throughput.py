"""The benchmark runs, for one agent and for two, and its numbers fit together; gpu_check.sh."""

import os
import re
import subprocess
import sys

import pytest
from common import ROOT

TINY = "--num-envs 4 --num-steps 16 --num-minibatches 2 --num-eval-envs 2 --channels 4 4 4".split()
TINY += ["--device", "cpu"]


def run(folder, *words):
    command = [sys.executable, str(ROOT / "benchmark" / "throughput.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


@pytest.mark.parametrize(("name", "each"), [("ppo_procgen", ""), ("mdspo_procgen", " for each agent")])
def test_table(name, each, tmp_path):
    games = ["fruitbot", "starpilot"]
    result = run(
        tmp_path, name, "--games", *games, "--iterations", "3", "--warmup", "1", "--reference", *TINY
    )
    assert result.returncode == 0 and not list(tmp_path.iterdir()), result.stderr
    for game, text in zip(games, result.stdout.split(f"\n{name}, ")[1:], strict=True):
        assert text.startswith(f"{game}, 4 x 16 steps, --num-envs 4 ")
        parts = dict(re.findall(r"^\| ([\w ]+) \| (-?[\d.]+) \| ", text, re.M))
        assert {"environments", "inference", "copies", "GAE", "update", "everything else"} == parts.keys()
        assert all(float(milliseconds) >= -0.1 for milliseconds in parts.values())
        speed = float(re.search(rf"^steps a second{each}: ([\d,]+)", text, re.M)[1].replace(",", ""))
        total = sum(float(value) for part, value in parts.items() if not part.startswith("test"))
        assert 0.5 < speed * total / 1000 / 64 < 2  # medians of parts, and the median of the whole
        plain, ratio = re.search(r"^plain loop: ([\d,]+) .* ratio ([\d.]+)$", text, re.M).groups()
        assert float(ratio) == pytest.approx(speed / float(plain.replace(",", "")), rel=0.05)
        assert "environments alone" in text and "network alone" in text and "peak host memory" in text


BAD = {"dqn_procgen": "SCRIPT", "--device cpu": "SCRIPT", "ppo_procgen --iterations=0": "--iterations"}
BAD |= {
    "ppo_procgen --warmup x": "--warmup",
    "ppo_procgen --gamma 2": "--gamma",
    "ppo_procgen --games bigfish chess": "--env-id",
    "ppo_procgen --games": "--games",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words, tmp_path):
    """One line that names what is wrong, and status 2."""
    result = run(tmp_path, *words.split())
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stdout == "", result.stderr
    assert BAD[words] in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("half", "pytest_ends", "benchmark_ends", "status"),
    [
        ("tests", "echo 9 passed in 1s", "exit 1", 0),
        ("tests", "echo 9 passed, 2 warnings in 1s", "exit 1", 0),
        ("tests", "echo 9 passed, 3 skipped in 1s", "exit 0", 1),
        ("tests", "echo 1 failed, 9 passed in 1s; exit 1", "exit 0", 1),
        ("tests", "exit 0", "exit 0", 1),
        ("tests", "exit 5", "exit 0", 1),
        ("tests", "echo 9 passed in 1s; kill -9 $$", "exit 0", 1),
        ("bench", "exit 1", "exit 0", 0),
        ("bench", "exit 1", "exit 1", 1),
        ("both", "echo 9 passed in 1s", "exit 0", 0),
        ("both", "exit 1", "exit 0", 1),
        ("tset", "", "", 2),
    ],
)
def test_gpu_check_fails_unless_all_went_well(half, pytest_ends, benchmark_ends, status, tmp_path):
    """With a Python that only ends as told."""
    python = tmp_path / "python3"
    cases = f"*pytest*) {pytest_ends or ':'};; *throughput*) {benchmark_ends or ':'};;"
    python.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    python.chmod(0o755)
    command = [str(ROOT / "benchmark" / "gpu_check.sh"), str(tmp_path / "log"), half]
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert result.returncode == status and ("FAILED" in result.stdout) == (status == 1), result
    assert ("| script" in result.stdout) == (half in ("bench", "both"))
    assert (tmp_path / "log").exists() == (status != 2)
