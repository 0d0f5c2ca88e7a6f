"""The comparison with CleanRL's script, here with a stand-in for that: speeds, fairness, errors."""

import io
import re
import sys
import zipfile
from pathlib import Path

import pytest
from common import ROOT, error_message

sys.path.insert(0, str(ROOT / "benchmark"))
import against_cleanrl
from helpers import Failure, run_tool

# Its iterations take 0.1, 0.2, 0.3 seconds, the first one longer.
STAND_IN = """
import argparse
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

parser = argparse.ArgumentParser()
for name in ("env-id", "num-envs", "num-steps", "num-minibatches", "total-timesteps"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
assert (args.env_id, args.num_minibatches) == ("fruitbot", "2")
batch_size = int(args.num_envs) * int(args.num_steps)
num_iterations = int(args.total_timesteps) // batch_size
writer = EventFileWriter("runs/fruitbot")
seconds = 0
for iteration in range(num_iterations):
    seconds += 1000 if iteration == 0 else iteration / 10
    for tag in ("charts/SPS", "charts/learning_rate"):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=0)])
        writer.add_event(Event(wall_time=seconds, step=(iteration + 1) * batch_size, summary=summary))
writer.close()
"""


def make_wheel(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cleanrl/ppo_procgen.py", content)
    return file.getvalue()


def main(monkeypatch, *words):
    """As from the shell."""
    monkeypatch.setattr(sys, "argv", ["against_cleanrl.py", *map(str, words)])
    run_tool(against_cleanrl.main, against_cleanrl.Args, against_cleanrl.__doc__)


def test_speeds(tmp_path, monkeypatch, capsys):
    """Of a wheel's script, and of the real one here; a folder keeps nothing."""
    monkeypatch.chdir(tmp_path)
    Path("cleanrl-1.2.0-py3-none-any.whl").write_bytes(make_wheel(STAND_IN.encode()))
    words = ["--env-id", "fruitbot", "--num-envs", "4", "--num-steps", "6", "--num-minibatches", "2"]
    main(monkeypatch, "cleanrl-1.2.0-py3-none-any.whl", "--rounds", "1", *words)
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cleanrl-1.2.0-py3-none-any.whl"]
    assert "fruitbot, 4 x 6 steps, 2 minibatches" in out
    rows = re.findall(r"^\| (CleanRL|here) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", out, re.M)
    assert rows[0] == ("CleanRL", "120", "80", "240")
    name, *speeds = rows[1]
    median, low, high = [float(speed.replace(",", "")) for speed in speeds]
    assert name == "here" and 0 < low <= median <= high
    ratio = float(re.search(r"^ratio ([\d.]+)$", out, re.M)[1])
    assert ratio == pytest.approx(median / 120, abs=0.02)


def test_it_is_fair(tmp_path, monkeypatch, capsys):
    """In turn, CleanRL first; the same game and batch, and its levels, without tests, for ours."""
    runs = []
    speeds = iter([[10.0, 30.0, 11.0], [50.0], [8.0, 7.0], [70.0, 52.0]])

    def measure(name, script, flags):
        runs.append((script.name, script.read_text(), flags))
        return next(speeds)

    monkeypatch.setattr(against_cleanrl, "measure", measure)
    path = tmp_path / "copy.py"
    path.write_text(STAND_IN)
    main(monkeypatch, path, "--num-steps", "64", "--num-minibatches", "2")
    shared = ["--env-id=bigfish", "--num-envs=64", "--num-steps=64", "--num-minibatches=2"]
    shared += ["--total-timesteps=16384"]
    flags = [*shared, "--distribution-mode=easy", "--num-levels=0", "--eval-interval=0"]
    theirs = ("ppo_procgen.py", STAND_IN, shared)
    ours = ("ppo_procgen.py", (ROOT / "ppo_procgen.py").read_text(), flags)
    assert runs == [theirs, ours, theirs, ours]
    *_, their_row, our_row, ratio = capsys.readouterr().out.splitlines()
    assert their_row == "| CleanRL | 10 | 7 | 30 |"
    assert our_row == "| here | 52 | 50 | 70 |"
    assert ratio == "ratio 5.20"


@pytest.mark.parametrize("rounds", [1, 3])
def test_flags_that_count(rounds, tmp_path, monkeypatch, capsys):
    """Iterations, after one that is not measured, and rounds."""
    runs = []

    def measure(name, script, flags):
        runs.append(flags)
        return [1.0]

    monkeypatch.setattr(against_cleanrl, "measure", measure)
    (tmp_path / "a.py").write_text("")
    main(monkeypatch, tmp_path / "a.py", "--rounds", rounds, "--iterations", "9", "--num-envs", "2")
    assert len(runs) == 2 * rounds
    for flags in runs:
        assert "--total-timesteps=5120" in flags and "--num-envs=2" in flags


def rejection(monkeypatch, capfd, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *words)
    return error_message(stop.value.code, *capfd.readouterr())


BAD_FLAGS = {
    "--env-id": "chess",
    "--num-envs": "0",
    "--num-steps": "x",
    "--num-minibatches": "3",
    "--iterations": "0",
    "--rounds": "0",
    "--round": "2",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flag(flag, tmp_path, monkeypatch, capfd):
    (tmp_path / "a.py").write_text("")
    assert flag in rejection(monkeypatch, capfd, tmp_path / "a.py", flag, BAD_FLAGS[flag])


def make_damaged_wheel() -> bytes:
    """With other bytes in the middle of what is compressed."""
    content = bytearray(make_wheel(STAND_IN.encode()))
    content[100:140] = bytes(40)
    return bytes(content)


BAD_FILES = {
    "missing.py": (None, "No such file or directory"),
    "text.whl": (b"text", "it is damaged, or no wheel"),
    "damaged.whl": (make_damaged_wheel(), "it is damaged, or no wheel"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, tmp_path, monkeypatch, capfd):
    content, reason = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = rejection(monkeypatch, capfd, tmp_path / name)
    assert message == f"against_cleanrl.py: error: PATH: {tmp_path / name}: {reason}"


def test_wheel_of_something_else(tmp_path, monkeypatch, capfd):
    (tmp_path / "a.whl").write_bytes(make_wheel(b"").replace(b"ppo", b"ppg"))
    message = rejection(monkeypatch, capfd, tmp_path / "a.whl")
    assert message.endswith(f"PATH: there is no cleanrl/ppo_procgen.py in {tmp_path / 'a.whl'}")


BAD_SCRIPTS = {
    "": "has written no curve charts/SPS of two points",
    "raise ValueError('a reason')": "ended with status 1: ValueError: a reason",
    "import sys; sys.exit(3)": "ended with status 3: no message",
    "import os; os.kill(os.getpid(), 9)": "was killed by signal 9: is there enough memory?",
}


@pytest.mark.parametrize("text", BAD_SCRIPTS)
def test_script_that_fails(text, tmp_path):
    script = tmp_path / "a.py"
    script.write_text(text)
    with pytest.raises(Failure) as failure:
        against_cleanrl.measure("PATH: a.py", script, [])
    assert str(failure.value) == f"PATH: a.py {BAD_SCRIPTS[text]}"


def test_script_that_fails_from_the_shell(tmp_path, monkeypatch, capfd):
    """One line, below what the measurement has said so far."""
    (tmp_path / "a.py").write_text("raise ValueError('a reason')")
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path / "a.py")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and len(out.splitlines()) == 2
    expected = f"PATH: {tmp_path / 'a.py'} ended with status 1: ValueError: a reason"
    assert err == f"against_cleanrl.py: error: {expected}\n"


def test_curve_of_a_single_point(tmp_path):
    """Would be no speed."""
    script = tmp_path / "a.py"
    script.write_text(STAND_IN)
    flags = ["--env-id=fruitbot", "--num-envs=1", "--num-steps=4", "--num-minibatches=2"]
    with pytest.raises(Failure, match="no curve charts/SPS of two points"):
        against_cleanrl.measure("it", script, [*flags, "--total-timesteps=4"])


def test_nothing_runs_before_the_script_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(against_cleanrl, "measure", None)
    with pytest.raises(Failure):
        against_cleanrl.main(against_cleanrl.Args(tmp_path / "missing.py"))
