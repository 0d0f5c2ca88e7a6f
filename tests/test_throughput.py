"""The benchmark runs, for one agent and for two, and its numbers fit together."""

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


@pytest.mark.parametrize("words", [["dqn_procgen"], ["ppo_procgen", "--iterations=0"]])
def test_bad_input(words, tmp_path):
    result = run(tmp_path, *words)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert words[-1].strip("=0") in result.stderr
