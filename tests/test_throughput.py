"""The benchmarks run, for one agent and for two, and their numbers fit together; gpu_check.sh."""

import io
import os
import re
import subprocess
import sys
import zipfile

import pytest
from common import ROOT

sys.path.insert(0, str(ROOT / "benchmark"))
import against_cleanrl

TINY = "--num-envs 4 --num-steps 16 --num-minibatches 2 --num-eval-envs 2 --channels 4 4 4".split()
TINY += ["--device", "cpu"]


def run(folder, *words, tool="throughput.py"):
    command = [sys.executable, str(ROOT / "benchmark" / tool), *words]
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


STAND_IN = """
import argparse
from torch.utils.tensorboard import SummaryWriter
names = ("env-id", "num-envs", "num-steps", "num-minibatches", "total-timesteps")
parser = argparse.ArgumentParser()
for name in names:
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
assert (args.env_id, args.num_minibatches) == ("fruitbot", "2")
batch, total = int(args.num_envs) * int(args.num_steps), int(args.total_timesteps)
seconds = 0
with SummaryWriter("runs/fruitbot") as writer:
    for number, step in enumerate(range(batch, total + 1, batch)):
        seconds += 1000 if number == 0 else number / 10
        writer.add_scalar("charts/SPS", 0, step, walltime=seconds)
"""  # its iterations take 0.1, 0.2, 0.3 seconds, the first one longer


@pytest.mark.parametrize("wheel", [True, False])
def test_against_cleanrl(wheel, tmp_path):
    path = tmp_path / ("cleanrl-1.2.0-py3-none-any.whl" if wheel else "ppo_procgen.py")
    if wheel:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("cleanrl/ppo_procgen.py", STAND_IN)
    else:
        path.write_text(STAND_IN)
    flags = "--env-id fruitbot --num-envs 4 --num-steps 6 --num-minibatches 2".split()
    result = run(tmp_path, str(path), *flags, tool="against_cleanrl.py")
    assert result.returncode == 0 and list(tmp_path.iterdir()) == [path], result.stderr
    assert "fruitbot, 4 x 6 steps, 2 minibatches" in result.stdout
    theirs, ours = re.findall(
        r"^\| (?:CleanRL|here) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", result.stdout, re.M
    )
    assert theirs == ("120", "80", "240")
    median, low, high = (float(each.replace(",", "")) for each in ours)
    assert 0 < low <= median <= high
    assert float(re.search(r"^ratio ([\d.]+)$", result.stdout, re.M)[1]) == pytest.approx(
        median / 120, abs=0.02
    )


def test_against_cleanrl_is_fair(monkeypatch, tmp_path, capsys):
    """In turn, CleanRL first; the same game and batch, and its levels, without tests, for ours."""
    runs, speeds = [], iter([10.0, 50.0, 20.0, 70.0])

    def measure(name, script, flags):
        runs.append((script.read_text(), flags))
        return [next(speeds)]

    (tmp_path / "ppo_procgen.py").write_text(STAND_IN)
    monkeypatch.setattr(against_cleanrl, "measure", measure)
    against_cleanrl.main(against_cleanrl.Args(tmp_path / "ppo_procgen.py", num_steps=64, num_minibatches=2))
    shared = (
        "--env-id=bigfish --num-envs=64 --num-steps=64 --num-minibatches=2 --total-timesteps=16384".split()
    )
    theirs = (STAND_IN, shared)
    flags = [*shared, "--distribution-mode=easy", "--num-levels=0", "--eval-interval=0"]
    ours = ((ROOT / "ppo_procgen.py").read_text(), flags)
    assert runs == [theirs, ours, theirs, ours]
    assert capsys.readouterr().out.endswith("ratio 4.00\n")


def wheel(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cleanrl/ppo_procgen.py", content)
    return file.getvalue()


damaged = bytearray(wheel(STAND_IN.encode()))
damaged[100:140] = bytes(40)


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("a.py", b"", [], "PATH: a.py has written no curve charts/SPS"),
        ("a.py", b"raise ValueError('a reason')", [], "PATH: a.py ended with status 1: ValueError: a reason"),
        ("a.py", b"import os; os.kill(os.getpid(), 9)", [], "PATH: a.py was killed by signal 9"),
        ("a.py", None, [], "PATH: a.py: No such file"),
        ("a.whl", b"text", [], "PATH: a.whl: it is damaged, or no wheel"),
        ("a.whl", bytes(damaged), [], "PATH: a.whl: it is damaged, or no wheel"),
        (
            "a.whl",
            wheel(b"").replace(b"ppo", b"ppg"),
            [],
            "PATH: there is no cleanrl/ppo_procgen.py in a.whl",
        ),
        ("a.py", b"", ["--env-id", "chess"], "--env-id"),
        ("a.py", b"", ["--num-minibatches", "3"], "--num-minibatches"),
        ("a.py", b"", ["--rounds", "0"], "--rounds"),
    ],
)
def test_against_cleanrl_bad_input(name, content, flags, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run(tmp_path, name, *flags, tool="against_cleanrl.py")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr


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
