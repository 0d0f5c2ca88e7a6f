"""What goes wrong around a run: full disks, bad files, two processes, numbers that are not finite. Each gives
one line and exit status 2, and the good files stay as they were."""

import errno
import fcntl
import importlib
import io
import json
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import BATCH_SIZE, ROOT, flags, run_folder, shell
from test_resume import SETTINGS, differences, iteration_of, load, same, train, train_straight


def start(name, folder, words, prepare=lambda: None) -> SimpleNamespace:
    """The script as the shell runs it, in a fork of this process, which saves the imports."""
    pipes = [os.pipe(), os.pipe()]
    process = os.fork()
    if process:
        for _, writing in pipes:
            os.close(writing)
        return SimpleNamespace(id=process, streams=[reading for reading, _ in pipes])
    status = 70
    try:
        for stream, (_, writing) in zip((1, 2), pipes):
            os.dup2(writing, stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(stream, "w")) for stream in (1, 2))
        warnings.showwarning = lambda *what: print("warning:", *what, file=sys.stderr)
        importlib.import_module(name).tqdm.set_lock(threading.RLock())  # its own is shared by processes
        os.chdir(folder)
        sys.argv = [f"{name}.py", *map(str, words)]
        prepare()
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(process) -> SimpleNamespace:
    out, err = (open(stream).read() for stream in process.streams)  # noqa: SIM115
    status = os.waitstatus_to_exitcode(os.waitpid(process.id, 0)[1])
    return SimpleNamespace(status=status, out=out, err=err)


def run(*inputs) -> SimpleNamespace:
    return finish(start(*inputs))


def snapshot(folder) -> dict:
    """All files but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def the_line(name, result) -> str:
    """Of an error before the training: nothing else is printed to stderr."""
    assert result.status == 2, (result.status, result.err)
    assert result.err.count("\n") == 1 and result.err.startswith(f"{name}.py: error: "), result.err
    return result.err


def the_last_line(name, result) -> str:
    """Of an error in the training, after the lines of progress."""
    assert result.status == 2, (result.status, result.err)
    *progress, line = result.err.splitlines()
    assert line.startswith(f"{name}.py: error: "), result.err
    assert all("step/s" in each for each in progress if each), result.err
    return line


@pytest.fixture(scope="module", params=["ppo_procgen", "mdpo_procgen"])
def straight(request, tmp_path_factory):
    return train_straight(request.param, tmp_path_factory.mktemp(request.param), SETTINGS)


@pytest.fixture
def stopped(straight, tmp_path):
    """The run as it was after 4 iterations, in a folder of this test's."""
    run_dir = tmp_path / "runs" / straight.run_dir.name
    ignore = shutil.ignore_patterns("agent.pt", "*.json")
    shutil.copytree(straight.run_dir, run_dir, ignore=ignore)
    path = Path(shutil.copy(straight.checkpoints[4], run_dir / "checkpoint.pt"))
    return SimpleNamespace(name=straight.name, run_dir=run_dir, path=path, good=path.read_bytes())


# Files that are no checkpoint of this run


def read(good: bytes) -> dict:
    return torch.load(io.BytesIO(good), weights_only=True)


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, content)
    return stream.getvalue()


def saved(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def flipped(good: bytes, part: bytes) -> bytes:
    """With one bit of that part of it the other way round."""
    at = good.index(part) + len(part) // 2
    return good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]


def weight(good: bytes) -> bytes:
    agent = read(good)["runners"][0]["agent"]
    return bytes(agent["encoder.0.weight"].untyped_storage())


def edited(good: bytes, **changes) -> bytes:
    """The checkpoint with other entries, None for none, and other settings."""
    content = read(good)
    content["args"] |= changes.pop("args", {})
    content |= changes
    return saved({key: value for key, value in content.items() if value is not None})


DAMAGED = {
    "empty": lambda good: b"",
    "1 byte": lambda good: good[:1],
    "100 bytes": lambda good: good[:100],
    "a quarter": lambda good: good[: len(good) // 4],
    "half": lambda good: good[: len(good) // 2],
    "100 bytes less": lambda good: good[:-100],
    "1 byte less": lambda good: good[:-1],
    "the first half twice": lambda good: 2 * good[: len(good) // 2],
    "zeros in the middle": lambda good: (
        good[: len(good) // 2] + bytes(len(good) // 4) + good[len(good) // 2 + len(good) // 4 :]
    ),
    "a bit in the settings": lambda good: flipped(good, b"distribution_mode"),
    "a bit in the weights": lambda good: flipped(good, weight(good)),
    "text": lambda good: b"This is not a checkpoint.\n" * 100,
    "JSON": lambda good: json.dumps({"format": 1, "script": "ppo_procgen"}).encode(),
    "a zip": lambda good: zipped("hello.txt", b"hello"),
    "a zip like torch's": lambda good: zipped("archive/data.pkl", b"hello"),
    "a pickle": lambda good: pickle.dumps({"format": 1, "script": "ppo_procgen"}),
    "a pickle that runs code": lambda good: pickle.dumps(Evil()),
    "a checkpoint that runs code": lambda good: edited(good, generators=Evil()),
    "settings that run code": lambda good: edited(good, args={"exp_name": Evil()}),
    "a tensor": lambda good: saved(torch.zeros(3)),
    "a list": lambda good: saved([1, 2, 3]),
    "weights alone": lambda good: saved(read(good)["runners"][0]["agent"]),
    "agent.pt": lambda good: edited(good, format=None, iteration=None, runners=None, generators=None),
    "no runners": lambda good: edited(good, runners=None),
    "no generators": lambda good: edited(good, generators=None),
    "no optimizer": lambda good: edited(good, optimizer=None),
    "settings that are none": lambda good: saved(read(good) | {"args": [1, 2]}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file(stopped, tmp_path, kind):
    stopped.path.write_bytes(DAMAGED[kind](stopped.good))
    before = snapshot(tmp_path)
    line = the_line(stopped.name, run(stopped.name, tmp_path, ["--resume", stopped.run_dir]))
    assert str(stopped.path) in line
    assert not list(tmp_path.rglob("executed"))
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before
    assert [path for path in after.keys() - before.keys() if "events" not in path] == []


def test_the_evil_files_do_run_code(tmp_path, monkeypatch):
    """With a loader that trusts them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").exists()


# Whole checkpoints, but not of this: what is changed in them, the flags, and what the line names.
UNFIT = {
    "another script": ({"script": "spo_procgen"}, [], ["of spo_procgen", "this is"]),
    "a later format": ({"format": 2}, [], ["format 2", "format 1"]),
    "another game": ({}, ["--env-id", "bigfish"], ["--env-id must stay fruitbot"]),
    "another width": ({}, ["--channels", "8", "8", "8"], ["--channels must stay"]),
    "other weights than its settings say": ({"args": {"channels": (8, 4, 4)}}, [], ["does not fit"]),
    "other environments than its settings say": ({"args": {"num_envs": 8}}, [], ["does not fit"]),
    "a setting from the future": ({"args": {"warmth": 3}}, [], ["warmth"]),
    "a game from the future": ({"args": {"env_id": "chess"}}, [], ["--env-id must be one of", "chess"]),
    "a setting out of range": ({"args": {"gamma": 2.0}}, [], ["--gamma", "2.0"]),
    "a setting of another type": ({"args": {"num_envs": "four"}}, [], ["settings in"]),
    "fewer agents": ({"runners": []}, [], ["does not fit"]),
    "a bad flag": ({}, ["--warmth", "3"], ["--warmth"]),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_checkpoint(stopped, tmp_path, kind):
    changes, words, names = UNFIT[kind]
    stopped.path.write_bytes(edited(stopped.good, **changes))
    before = snapshot(tmp_path)
    line = the_line(stopped.name, run(stopped.name, tmp_path, ["--resume", stopped.run_dir, *words]))
    assert [each for each in names if each not in line] == [], line
    after = snapshot(tmp_path)
    assert {path: after[path] for path in before} == before
    # TensorBoard's file is made together with the networks that the weights are to fit.
    new = [path for path in after.keys() - before.keys() if "events" not in path]
    assert new == []


@pytest.mark.parametrize("target", ["missing", "runs", "runs/missing", "long" * 100, "runs/checkpoint.pt"])
def test_nothing_to_resume(straight, tmp_path, target):
    (tmp_path / "runs").mkdir()
    if target == "runs/checkpoint.pt":
        (tmp_path / target).mkdir()
    line = the_line(straight.name, run(straight.name, tmp_path, ["--resume", target]))
    assert target in line
    assert snapshot(tmp_path) == {} and not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "words", [["--exp-name", "a**"], ["--env-id", "**x"], ["--exp-name", "../*"], ["--seed"]]
)
def test_auto_with_bad_settings(stopped, tmp_path, words):
    line = the_line(stopped.name, run(stopped.name, tmp_path, ["--resume", "auto", *words]))
    assert words[0] in line


def test_from_the_shell(stopped, tmp_path):
    """A damaged file and a real process, with what the interpreter says at its end."""
    stopped.path.write_bytes(DAMAGED["a checkpoint that runs code"](stopped.good))
    command, options = shell(stopped.name, tmp_path)
    result = subprocess.run(
        [*command, "--resume", stopped.run_dir], capture_output=True, text=True, timeout=60, **options
    )
    line = the_line(stopped.name, SimpleNamespace(status=result.returncode, err=result.stderr))
    assert "damaged" in line and not list(tmp_path.rglob("executed"))


# Two processes on one run


def test_locked_run(stopped, tmp_path):
    before = snapshot(tmp_path)
    with (stopped.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (["--resume", stopped.run_dir], ["--resume", "auto", "--env-id", "fruitbot"]):
            line = the_line(stopped.name, run(stopped.name, tmp_path, words))
            assert "another process" in line and stopped.run_dir.name in line
    after = snapshot(tmp_path)
    assert after == before


def test_two_processes(stopped, straight, tmp_path):
    """The second refuses while the first trains, which ends as if alone."""
    words = ["--resume", stopped.run_dir, "--device", "cpu"]
    time.sleep(1.01 - time.time() % 1)
    first = start(stopped.name, tmp_path, words)
    try:
        deadline = time.time() + 60
        while iteration_of(stopped.run_dir) < 6 and time.time() < deadline:
            time.sleep(0.02)
        (tmp_path / "second").mkdir()
        result = run(stopped.name, tmp_path / "second", words)
        assert os.waitpid(first.id, os.WNOHANG) == (0, 0)  # still there
    finally:
        ended = finish(first)
    assert "another process" in the_line(stopped.name, result)
    assert ended.status == 0, ended.err
    assert differences(straight.name, straight.run_dir, stopped.run_dir) == []


# Disks


def mount(folder: Path, *options) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=24m", *options]), "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture(params=["a small disk", "a limit"])
def disk(request, tmp_path):
    """Its folder, and a function that leaves room for so many bytes, to be called in the process that is to
    find it so. Without the right to mount, both are a limit to the length of its files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = request.param == "a small disk" and mount(folder)

    def fill(free: int):
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
            return
        state = os.statvfs(folder)
        with (folder / "filler").open("ab") as file:
            file.write(bytes(max(0, state.f_bavail * state.f_frsize - free)))

    def empty():
        (folder / "filler").unlink(missing_ok=True)

    yield SimpleNamespace(folder=folder, fill=fill, empty=empty, mounted=mounted)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on_disk(disk, stopped) -> Path:
    run_dir = disk.folder / stopped.run_dir.name
    shutil.copytree(stopped.run_dir, run_dir)
    return run_dir


def test_full_disk_at_a_checkpoint(disk, stopped, straight, tmp_path):
    run_dir = on_disk(disk, stopped)
    words = ["--resume", run_dir, "--device", "cpu"]
    result = run(stopped.name, tmp_path, words, lambda: disk.fill(len(stopped.good) // 2))
    line = the_last_line(stopped.name, result)
    assert str(run_dir / "checkpoint.pt") in line and ("No space" in line or "too large" in line), line
    assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good
    assert not list(run_dir.rglob("*.tmp")) and not list(run_dir.rglob("agent.pt"))
    disk.empty()
    time.sleep(1.01 - time.time() % 1)
    assert run(stopped.name, tmp_path, words).status == 0
    assert differences(straight.name, straight.run_dir, run_dir) == []


def test_full_disk_from_the_first_byte(disk, stopped, tmp_path):
    """Not even a point of a curve fits: at a start, and later in a run."""
    run_dir = on_disk(disk, stopped)
    words = ["--resume", run_dir, "--device", "cpu"]
    result = run(stopped.name, tmp_path, words, lambda: disk.fill(0))
    the_last_line(stopped.name, result)
    assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good
    disk.empty()

    def fill_in_an_iteration():
        step = torch.optim.Adam.step

        def fill_and_step(*inputs):
            disk.fill(0)
            return step(*inputs)

        torch.optim.Adam.step = fill_and_step

    result = run(stopped.name, tmp_path, words, fill_in_an_iteration)
    the_last_line(stopped.name, result)
    assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good
    assert not list(run_dir.rglob("*.tmp")) and not list(run_dir.rglob("agent.pt"))


def test_full_disk_in_a_new_run(disk, straight, tmp_path):
    """At its first checkpoint: nothing to go on from is left, and --resume auto says so by starting anew."""
    (tmp_path / "runs").symlink_to(disk.folder)
    words = ["--resume", "auto", *flags(**(SETTINGS | {"total_timesteps": BATCH_SIZE, "eval_interval": 0}))]
    line = the_last_line(straight.name, run(straight.name, tmp_path, words, lambda: disk.fill(100_000)))
    assert "checkpoint.pt" in line
    assert not list(disk.folder.rglob("*.pt")) and not list(disk.folder.rglob("*.tmp"))
    disk.empty()
    time.sleep(1.01 - time.time() % 1)
    assert run(straight.name, tmp_path, words).status == 0


def test_full_disk_at_the_end(disk, straight, stopped, tmp_path):
    """At agent.pt, then at final_test.json; what an earlier end left of both stays."""
    shutil.copytree(straight.run_dir, disk.folder / "run")
    run_dir = disk.folder / "run"
    before = snapshot(run_dir)
    words = ["--resume", run_dir, "--device", "cpu"]
    line = the_last_line(straight.name, run(straight.name, tmp_path, words, lambda: disk.fill(40_000)))
    assert "agent.pt" in line
    disk.empty()

    def fill_after_the_agents():
        sync = os.fsync

        def sync_and_fill(file):
            sync(file)
            if "agent" in os.readlink(f"/proc/self/fd/{file}"):
                calls.append(file)
            if len(calls) == (2 if straight.name == "mdpo_procgen" else 1):
                replace = Path.replace

                def replace_and_fill(path, target):
                    replace(path, target)
                    disk.fill(0)

                Path.replace = replace_and_fill

        calls = []
        os.fsync = sync_and_fill

    result = run(straight.name, tmp_path, words, fill_after_the_agents)
    line = the_last_line(straight.name, result)
    assert "final_test.json" in line and "final test" in result.out
    after = snapshot(run_dir)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after.keys() - before.keys() if "events" not in path]


def test_full_disk_from_the_shell(disk, stopped, tmp_path):
    """In a real process, with what the interpreter and TensorBoard's threads say at its end."""
    run_dir = on_disk(disk, stopped)
    command, options = shell(stopped.name, tmp_path)
    if disk.mounted:
        disk.fill(0)
    else:
        options["preexec_fn"] = lambda: disk.fill(0)
    stdout = subprocess.DEVNULL
    with subprocess.Popen(
        [*command, "--resume", run_dir, "--device", "cpu"], stdout=stdout, stderr=subprocess.PIPE, **options
    ) as process:
        err = process.communicate(timeout=60)[1].decode()
    the_last_line(stopped.name, SimpleNamespace(status=process.returncode, err=err))
    assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good


def test_no_folder_for_runs(straight, tmp_path):
    (tmp_path / "runs").write_text("a file")
    line = the_line(straight.name, run(straight.name, tmp_path, flags(**SETTINGS)))
    assert "run folder runs/" in line and (tmp_path / "runs").read_text() == "a file"


def test_run_folder_that_cannot_be_written(stopped, tmp_path):
    """A read-only disk; where mounting is not allowed, a lock that cannot be opened."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder)
    run_dir = folder / "run"
    shutil.copytree(stopped.run_dir, run_dir)
    try:
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        else:
            (run_dir / ".lock").unlink(missing_ok=True)
            (run_dir / ".lock").mkdir()
        line = the_line(stopped.name, run(stopped.name, tmp_path, ["--resume", run_dir]))
        assert f"run folder {run_dir}" in line
        assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_write_file_is_atomic(script, tmp_path, monkeypatch, capsys, where):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if where == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        else:
            monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[where], no_space)
        with pytest.raises(SystemExit) as stop:
            script.write_file(path, {"tensor": torch.zeros(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert stop.value.code == 2 and str(path) in capsys.readouterr().err
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(Exception, match="pickle"):
        script.write_file(path, {"function": lambda: 0})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    script.write_file(path, "new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# Numbers that are not finite


class Poison(torch.autograd.Function):
    """A loss as it is, with gradients that are infinite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


LAST = SETTINGS["num_minibatches"] - 1
# The function, what becomes of its loss, in which minibatch of the iteration, the metric named.
POISONS = [
    ("policy_loss", lambda loss: loss * torch.nan, 0, "policy_loss"),
    ("value_loss", lambda loss: loss + torch.inf, LAST, "value_loss"),
    ("policy_loss", Poison.apply, LAST, "grad_norm"),
    ("policy_loss", Poison.apply, 0, "grad_norm"),
]


@pytest.mark.parametrize(("where", "poison", "minibatch", "metric"), POISONS)
def test_numbers_that_are_not_finite(straight, tmp_path, capsys, where, poison, minibatch, metric):
    """In iteration 6, in the last agent."""
    script, num_agents = straight.script, 2 if straight.name == "mdpo_procgen" else 1
    play, loss = script.rollout, getattr(script, where)
    calls = []

    def counted_rollout(*inputs):
        calls.append(0)
        return play(*inputs)

    def poisoned(*inputs):
        number, calls[-1] = calls[-1], calls[-1] + 1
        wrong = len(calls) == 6 and number == minibatch * num_agents + num_agents - 1
        return poison(loss(*inputs)) if wrong else loss(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "rollout", counted_rollout)
        patch.setattr(script, where, poisoned)
        assert train(script, tmp_path, *flags(**SETTINGS)) == 2
    run_dir = run_folder(tmp_path)
    result = SimpleNamespace(status=2, err=capsys.readouterr().err)
    line = the_last_line(script.__name__, result)
    assert f"{metric} of agent {num_agents} is " in line and "in iteration 6" in line, line
    assert "iteration 4" in line and f"--resume {run_dir.relative_to(tmp_path)}" in line, line
    assert same(load(run_dir / "checkpoint.pt"), load(straight.checkpoints[4]))
    assert not list(run_dir.rglob("agent.pt")) and not (run_dir / "final_test.json").exists()
    if metric == "grad_norm" and minibatch == LAST:
        assert train(script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
        assert differences(straight.name, straight.run_dir, run_dir) == []
