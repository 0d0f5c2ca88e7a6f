"""benchmark/throughput.py runs, for one agent and for two, and its numbers fit together; gpu_check.sh."""

import os
import re
import subprocess
import sys
import time

import pytest
from common import ROOT, TINY, error_message, flags, make_probes

sys.path.insert(0, str(ROOT / "benchmark"))
import throughput

SETTINGS = {name: value for name, value in TINY.items() if name not in ("env_id", "total_timesteps")}


def run_here(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, words)])
    throughput.main()


def number(text: str, pattern: str) -> float:
    return float(re.search(pattern, text, re.M)[1].replace(",", ""))


@pytest.mark.parametrize(("name", "each"), [("ppo_procgen", ""), ("mdspo_procgen", " for each agent")])
def test_numbers_fit_together(name, each, tmp_path, monkeypatch, capsys):
    games = ["fruitbot", "starpilot"]
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch, name, "--games", *games, "--iterations", 2, "--warmup", 1, *flags(**SETTINGS))
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    for game, text in zip(games, out.split(f"\n{name}, ")[1:], strict=True):
        assert text.startswith(f"{game}, 4 x 16 steps, --num-envs 4 ")
        parts = dict(re.findall(r"^\| ([\w ]+) \| (-?[\d.]+) \| ", text, re.M))
        assert list(parts) == throughput.PARTS
        assert all(float(milliseconds) >= -0.1 for milliseconds in parts.values())
        speed = number(text, rf"^steps a second{each}: ([\d,]+)")
        total = sum(float(milliseconds) for milliseconds in parts.values())
        assert 0.3 < speed * total / 1000 / 64 < 3  # medians of parts, and the median of the whole
        assert number(text, r"^environments alone: ([\d,]+)") > speed
        assert "network alone" in text and "peak host memory" in text and "a test of an agent in 2" in text


def test_time_goes_to_its_part(tmp_path, monkeypatch, capsys):
    """Two groups of environments sleep for 10 ms in each of 8 steps."""
    script = throughput.importlib.import_module("ppo_procgen")

    def make_slow_probes(*inputs):
        envs = make_probes(*inputs)
        act = envs.act

        def slow_act(actions):
            time.sleep(0.01)
            act(actions)

        envs.act = slow_act
        return envs

    monkeypatch.setattr(script, "make_envs", make_slow_probes)
    settings = SETTINGS | {"num_steps": 8}
    words = ["--iterations", 1, "--warmup", 1, "--no-limits", "--no-test", *flags(**settings)]
    run_here(monkeypatch, "ppo_procgen", *words)
    text = capsys.readouterr().out
    assert 160 <= number(text, r"^\| environments \| ([\d.]+)") < 1000
    assert "alone" not in text and "a test of" not in text


BAD = {
    "dqn_procgen": "SCRIPT",
    "--device cpu": "SCRIPT",
    "ppo_procgen --iterations=0": "--iterations",
    "ppo_procgen --warmup x": "--warmup",
    "ppo_procgen --gamma 2": "--gamma",
    "ppo_procgen --games bigfish chess": "--games must be some of bigfish",
    "ppo_procgen --resume auto": "--resume",
    "ppo_procgen --pretrained-encoder agent.pt": "--pretrained-encoder",
    "ppo_procgen --games": "--games",
    "ppo_procgen --no-such-flag 1": "--no-such-flag",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *words.split())
    assert BAD[words] in error_message(stop.value.code, *capsys.readouterr())
    assert not list(tmp_path.iterdir())


def test_more_memory_than_there_is(monkeypatch, capsys):
    """Of 15 petabytes."""
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, "ppo_procgen", "--num-steps=20000000", "--total-timesteps=6000000000")
    assert stop.value.code == 2
    assert "error: out of memory: smaller --num-envs" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_shell(tmp_path):
    words = ["mdpo_procgen", "--iterations", "1", "--warmup", "1", *flags(**SETTINGS)]
    command = [sys.executable, str(ROOT / "benchmark" / "throughput.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0 and "steps a second for each agent" in result.stdout, result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.iterdir())


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
