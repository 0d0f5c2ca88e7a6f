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
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import (
    BOTH,
    TINY,
    Fork,
    copy_run,
    differences,
    flags,
    load,
    run,
    run_folder,
    run_script,
    same,
    shell,
    show_small_pictures,
    snapshot,
    start_script,
    train,
    train_straight,
)

# Iterations are short, and there are enough of them to be stopped in.
BATCH_SIZE = 32
SETTINGS = TINY | {
    "total_timesteps": 8 * BATCH_SIZE,
    "num_envs": 2,
    "update_epochs": 1,
    "checkpoint_interval": 2,
    "final_eval_episodes": 2,
}


def the_line(name: str, result) -> str:
    """Of an error before the training: nothing else is printed to stderr."""
    assert result.status == 2, (result.status, result.err)
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith(f"{name}.py: error: "), result.err
    return result.err


def the_last_line(name: str, result) -> str:
    """Of an error in the training or in the final test, after the lines of progress."""
    assert result.status == 2, (result.status, result.err)
    *progress, line = result.err.splitlines()
    assert line.startswith(f"{name}.py: error: "), result.err
    assert all("step/s" in each or "episode/s" in each for each in progress if each), result.err
    return line


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        for name in BOTH:
            show_small_pictures(importlib.import_module(name), patch)
        yield


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    return train_straight("ppo_procgen", tmp_path_factory.mktemp("ppo"), SETTINGS)


@pytest.fixture(scope="module")
def mdpo(tmp_path_factory):
    return train_straight("mdpo_procgen", tmp_path_factory.mktemp("mdpo"), SETTINGS)


@pytest.fixture(params=["mdpo"])
def straight(request):
    return request.getfixturevalue(request.param)


both = pytest.mark.parametrize("straight", ["ppo", "mdpo"], indirect=True)
both_but_ppo_slow = pytest.mark.parametrize(
    "straight", [pytest.param("ppo", marks=pytest.mark.slow), "mdpo"], indirect=True
)


@pytest.fixture
def stopped(straight, tmp_path):
    """The run as it was after 4 iterations, in a folder of this test's."""
    run_dir = copy_run(straight, 4, tmp_path, finished=False)
    path = run_dir / "checkpoint.pt"
    good = path.read_bytes()
    return SimpleNamespace(name=straight.name, script=straight.script, run_dir=run_dir, path=path, good=good)


# Files that are no checkpoint of this run.


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
    agent = read(good)["agents"][0]
    return bytes(agent["encoder.0.weight"].untyped_storage())


def with_zeros(good: bytes) -> bytes:
    half = len(good) // 2
    quarter = len(good) // 4
    return good[:half] + bytes(quarter) + good[half + quarter :]


def edited(good: bytes, **changes) -> bytes:
    """The checkpoint with other entries, None for none, and other settings."""
    content = read(good)
    content["args"] |= changes.pop("args", {})
    content |= changes
    return saved({key: value for key, value in content.items() if value is not None})


NONE_BUT_ARGS = {"format": None, "position": None, "agents": None, "runners": None, "generators": None}
DAMAGED = {
    "empty": lambda good: b"",
    "1 byte": lambda good: good[:1],
    "100 bytes": lambda good: good[:100],
    "a quarter": lambda good: good[: len(good) // 4],
    "half": lambda good: good[: len(good) // 2],
    "100 bytes less": lambda good: good[:-100],
    "1 byte less": lambda good: good[:-1],
    "the first half twice": lambda good: 2 * good[: len(good) // 2],
    "zeros in the middle": with_zeros,
    "a bit in the settings": lambda good: flipped(good, b"distribution_mode"),
    "a bit in the weights": lambda good: flipped(good, weight(good)),
    "text": lambda good: b"This is not a checkpoint.\n" * 100,
    "JSON": lambda good: json.dumps({"format": 2, "script": "mdpo_procgen"}).encode(),
    "a zip": lambda good: zipped("hello.txt", b"hello"),
    "a zip like torch's": lambda good: zipped("archive/data.pkl", b"hello"),
    "a pickle": lambda good: pickle.dumps({"format": 2, "script": "mdpo_procgen"}),
    "a pickle that runs code": lambda good: pickle.dumps(Evil()),
    "a checkpoint that runs code": lambda good: edited(good, generators=Evil()),
    "settings that run code": lambda good: edited(good, args={"exp_name": Evil()}),
    "a tensor": lambda good: saved(torch.zeros(3)),
    "a list": lambda good: saved([1, 2, 3]),
    "weights alone": lambda good: saved(read(good)["agents"][0]),
    "agent.pt": lambda good: edited(good, **NONE_BUT_ARGS),
    "no position": lambda good: edited(good, position=None),
    "another position": lambda good: edited(good, position={"iterations": 4}),
    "no agents": lambda good: edited(good, agents=None),
    "no runners": lambda good: edited(good, runners=None),
    "no generators": lambda good: edited(good, generators=None),
    "no optimizer": lambda good: edited(good, optimizer=None),
    "settings that are none": lambda good: saved(read(good) | {"args": [1, 2]}),
}


def assert_untouched(folder: Path, before: dict[str, bytes]):
    """All files are as before. TensorBoard's are new where the networks were made that weights are to fit."""
    after = snapshot(folder)
    assert {path: after[path] for path in before} == before
    assert [path for path in after.keys() - before.keys() if "events" not in path] == []


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file(stopped, tmp_path, kind):
    stopped.path.write_bytes(DAMAGED[kind](stopped.good))
    before = snapshot(tmp_path)
    line = the_line(stopped.name, run(stopped.script, tmp_path, ["--resume", stopped.run_dir]))
    assert str(stopped.path) in line
    assert not list(tmp_path.rglob("executed"))
    assert_untouched(tmp_path, before)


@pytest.mark.parametrize("function", ["torch.load", "numpy.random.set_state"])
def test_a_file_is_not_called_damaged_where_memory_is_short(stopped, tmp_path, monkeypatch, function):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(function, fail)
    before = snapshot(tmp_path)
    line = the_line(stopped.name, run(stopped.script, tmp_path, ["--resume", stopped.run_dir]))
    assert "out of memory" in line
    assert_untouched(tmp_path, before)


def test_the_evil_files_do_run_code(tmp_path, monkeypatch):
    """With a loader that trusts them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").exists()


# Whole checkpoints, but not of this: what is changed in them, the flags, and what the line names.
UNFIT = {
    "another script": ({"script": "spo_procgen"}, [], ["of spo_procgen", "this is"]),
    "a later format": ({"format": 3}, [], ["format 3", "format 2"]),
    "the format before": ({"format": 1}, [], ["format 1", "format 2"]),
    "another game": ({}, ["--env-id", "bigfish"], ["--env-id must stay fruitbot"]),
    "another width": ({}, ["--channels", "8", "8", "8"], ["--channels must stay"]),
    "other weights than its settings say": ({"args": {"channels": (8, 4, 4)}}, [], ["does not fit"]),
    "other environments than its settings say": ({"args": {"num_envs": 8}}, [], ["does not fit"]),
    "more agents than its settings say": ({"args": {"num_agents": 3}}, [], ["does not fit"]),
    "a setting from the future": ({"args": {"warmth": 3}}, [], ["warmth"]),
    "a game from the future": ({"args": {"env_id": "chess"}}, [], ["--env-id must be one of", "chess"]),
    "a setting out of range": ({"args": {"gamma": 2.0}}, [], ["--gamma", "2.0"]),
    "a setting of another type": ({"args": {"num_envs": "four"}}, [], ["settings in"]),
    "no sides of agents": ({"runners": []}, [], ["does not fit"]),
    "an optimizer of fewer weights": ({"optimizer": {0: {}}}, [], ["does not fit"]),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_checkpoint(stopped, tmp_path, kind):
    changes, words, names = UNFIT[kind]
    stopped.path.write_bytes(edited(stopped.good, **changes))
    before = snapshot(tmp_path)
    line = the_line(stopped.name, run(stopped.script, tmp_path, ["--resume", stopped.run_dir, *words]))
    assert [each for each in names if each not in line] == [], line
    assert str(stopped.path) in line
    assert_untouched(tmp_path, before)


def test_a_bad_flag_beside_a_checkpoint(stopped, tmp_path):
    """Is tyro's to name."""
    before = snapshot(tmp_path)
    result = run(stopped.script, tmp_path, ["--resume", stopped.run_dir, "--warmth", "3"])
    assert result.status == 2
    assert "--warmth" in result.err
    assert "Traceback" not in result.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["missing", "runs", "runs/missing", "long" * 100, "runs/checkpoint.pt"])
def test_nothing_to_resume(straight, tmp_path, target):
    (tmp_path / "runs").mkdir()
    if target == "runs/checkpoint.pt":
        (tmp_path / target).mkdir()
    line = the_line(straight.name, run(straight.script, tmp_path, ["--resume", target]))
    assert target in line
    assert snapshot(tmp_path) == {}
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "words", [["--exp-name", "a**"], ["--env-id", "**x"], ["--exp-name", "../*"], ["--seed"]]
)
def test_auto_with_bad_settings(stopped, tmp_path, words):
    before = snapshot(tmp_path)
    result = run(stopped.script, tmp_path, ["--resume", "auto", *words])
    assert result.status == 2
    assert words[0] in result.err
    assert "Traceback" not in result.err
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@both
def test_damaged_file_from_the_shell(stopped, tmp_path):
    """In a real process, with what the interpreter says at its end."""
    stopped.path.write_bytes(DAMAGED["a checkpoint that runs code"](stopped.good))
    process = start_script(stopped.name, tmp_path, "--resume", stopped.run_dir)
    _, err = process.communicate(timeout=60)
    line = the_line(stopped.name, SimpleNamespace(status=process.returncode, err=err))
    assert "damaged" in line
    assert not list(tmp_path.rglob("executed"))


# Two processes on one run.


@both
def test_locked_run(stopped, tmp_path):
    before = snapshot(tmp_path)
    with (stopped.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (["--resume", stopped.run_dir], ["--resume", "auto", "--env-id", "fruitbot"]):
            line = the_line(stopped.name, run(stopped.script, tmp_path, words))
            assert "another process" in line
            assert stopped.run_dir.name in line
    assert snapshot(tmp_path) == before


@both_but_ppo_slow
def test_two_processes(stopped, straight, tmp_path):
    """The second refuses while the first trains, which ends as if alone."""
    words = ["--resume", stopped.run_dir, "--device", "cpu"]

    def train_slowly():
        play = stopped.script.rollout

        def play_slowly(*inputs):
            time.sleep(0.3)
            return play(*inputs)

        stopped.script.rollout = play_slowly

    first = Fork(stopped.script, tmp_path, words, train_slowly)
    try:
        first.wait_for_line("run folder: ")
        (tmp_path / "second").mkdir()
        result = run(stopped.script, tmp_path / "second", words)
        assert first.running()
    finally:
        ended = first.finish()
    assert "another process" in the_line(stopped.name, result)
    assert ended.status == 0, ended.err
    assert differences(straight.name, straight.run_dir, stopped.run_dir) == []


@both_but_ppo_slow
def test_a_file_system_without_locks(stopped, straight, tmp_path):
    """The run goes on, and a line says that nothing guards it."""

    def refuse_locks():
        def refuse(file, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        stopped.script.fcntl = SimpleNamespace(flock=refuse, LOCK_EX=0, LOCK_NB=0)

    words = ["--resume", stopped.run_dir, "--device", "cpu"]
    ended = run(stopped.script, tmp_path, words, refuse_locks)
    assert ended.status == 0, ended.err
    assert f"run folder {stopped.run_dir} is not locked: No locks available" in ended.out
    assert differences(straight.name, straight.run_dir, stopped.run_dir) == []


# Disks.


def mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


class Disk:
    """A disk that can be full, or else a limit to the length of all files of a process."""

    def __init__(self, folder: Path, mounted: bool):
        self.folder = folder
        self.mounted = mounted

    def fill(self, free: int):
        """Leaves room for so many bytes: to be called in the process that is to find it so."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
            return
        state = os.statvfs(self.folder)
        with (self.folder / "filler").open("ab") as file:
            file.write(bytes(max(0, state.f_bavail * state.f_frsize - free)))

    def empty(self):
        (self.folder / "filler").unlink(missing_ok=True)


# Without the right to mount both are limits.
DISKS = ["a small disk", pytest.param("a limit", marks=pytest.mark.slow)]


@pytest.fixture(params=DISKS)
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = request.param == "a small disk" and mount(folder)
    yield Disk(folder, mounted)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on_disk(disk: Disk, stopped) -> Path:
    run_dir = disk.folder / stopped.run_dir.name
    shutil.copytree(stopped.run_dir, run_dir)
    return run_dir


def assert_stopped_by_a_full_disk(stopped, run_dir: Path):
    assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good
    assert not list(run_dir.rglob("*.tmp"))
    assert not list(run_dir.rglob("agent.pt"))


@both_but_ppo_slow
def test_full_disk_at_a_checkpoint(disk, stopped, straight, tmp_path):
    run_dir = on_disk(disk, stopped)
    words = ["--resume", run_dir, "--device", "cpu"]
    result = run(stopped.script, tmp_path, words, lambda: disk.fill(len(stopped.good) // 2))
    line = the_last_line(stopped.name, result)
    assert f"cannot write {run_dir / 'checkpoint.pt'}, which stays as it was" in line
    assert "No space" in line or "too large" in line
    assert_stopped_by_a_full_disk(stopped, run_dir)
    disk.empty()
    assert run(stopped.script, tmp_path, words).status == 0
    assert differences(straight.name, straight.run_dir, run_dir) == []


@both_but_ppo_slow
def test_full_disk_from_the_first_byte(disk, stopped, tmp_path):
    """Not even a point of a curve fits: at a start, and later in a run."""
    run_dir = on_disk(disk, stopped)
    words = ["--resume", run_dir, "--device", "cpu"]
    the_last_line(stopped.name, run(stopped.script, tmp_path, words, lambda: disk.fill(0)))
    assert_stopped_by_a_full_disk(stopped, run_dir)
    disk.empty()

    def fill_in_an_iteration():
        step = torch.optim.Adam.step

        def fill_and_step(*inputs):
            disk.fill(0)
            return step(*inputs)

        torch.optim.Adam.step = fill_and_step

    the_last_line(stopped.name, run(stopped.script, tmp_path, words, fill_in_an_iteration))
    assert_stopped_by_a_full_disk(stopped, run_dir)


@both_but_ppo_slow
def test_full_disk_in_a_new_run(disk, straight, tmp_path):
    """At its first checkpoint: nothing to go on from is left, and --resume auto says so by starting anew."""
    (tmp_path / "runs").symlink_to(disk.folder)
    words = ["--resume", "auto", *flags(**(SETTINGS | {"total_timesteps": BATCH_SIZE, "eval_interval": 0}))]
    result = run(straight.script, tmp_path, words, lambda: disk.fill(30_000))
    assert "checkpoint.pt: " in the_last_line(straight.name, result)
    assert not list(disk.folder.rglob("*.pt"))
    assert not list(disk.folder.rglob("*.tmp"))
    disk.empty()
    assert run(straight.script, tmp_path, words).status == 0


def fill_before_final_test(disk: Disk, script):
    final_test = script.final_test

    def fill_and_test(*inputs):
        disk.fill(0)
        return final_test(*inputs)

    script.final_test = fill_and_test


def fill_before_the_agents(disk: Disk, script):
    save_agent = script.save_agent

    def fill_and_save(*inputs):
        disk.fill(0)
        return save_agent(*inputs)

    script.save_agent = fill_and_save


@both_but_ppo_slow
@pytest.mark.parametrize(
    ("fill", "file"), [(fill_before_the_agents, "agent.pt"), (fill_before_final_test, "final_test.json")]
)
def test_full_disk_at_the_end(disk, straight, tmp_path, fill, file):
    """What an earlier end left of the file stays."""
    run_dir = disk.folder / "run"
    shutil.copytree(straight.run_dir, run_dir)
    before = snapshot(run_dir)
    words = ["--resume", run_dir, "--device", "cpu"]
    result = run(straight.script, tmp_path, words, lambda: fill(disk, straight.script))
    line = the_last_line(straight.name, result)
    assert file in line
    assert "which stays as it was" in line
    assert_untouched(run_dir, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_full_disk_from_the_shell(disk, name, tmp_path):
    """In real processes, with what the interpreter and TensorBoard's threads say at the end."""
    words = flags(**(SETTINGS | {"total_timesteps": BATCH_SIZE, "eval_interval": 0}))
    assert run_script(name, tmp_path, *words).returncode == 0
    run_dir = disk.folder / "run"
    shutil.copytree(run_folder(tmp_path / "work"), run_dir)
    good = (run_dir / "checkpoint.pt").read_bytes()

    command, options = shell(name, tmp_path)
    if disk.mounted:
        disk.fill(0)
    else:
        options["preexec_fn"] = lambda: disk.fill(0)
    command += ["--resume", run_dir, "--total-timesteps", str(9 * BATCH_SIZE), "--checkpoint-interval", "1"]
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options)
    _, err = process.communicate(timeout=120)
    line = the_last_line(name, SimpleNamespace(status=process.returncode, err=err.decode()))
    assert "No space" in line or "too large" in line
    assert (run_dir / "checkpoint.pt").read_bytes() == good


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
        line = the_line(stopped.name, run(stopped.script, tmp_path, ["--resume", run_dir]))
        assert f"run folder {run_dir}" in line
        assert (run_dir / "checkpoint.pt").read_bytes() == stopped.good
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_full(where: str, patch):
    """From now on files cannot be longer than 100 bytes, or one step of writing them fails."""
    if where == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    if where == "fsync":
        patch.setattr(os, "fsync", no_space)
    if where == "replace":
        patch.setattr(Path, "replace", no_space)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch, where):
    script = importlib.import_module("ppo_procgen")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        make_full(where, monkeypatch)
        with pytest.raises(script.Failure, match="stays as it was") as failure:
            script.write_torch(path, {"tensor": torch.zeros(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert str(path) in str(failure.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_after_all_of_it_is_known(tmp_path):
    script = importlib.import_module("ppo_procgen")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with pytest.raises(Exception, match="pickle"):
        script.write_torch(path, {"function": lambda: 0})
    with pytest.raises(TypeError):
        script.write_json(path, {"function": lambda: 0})
    assert path.read_bytes() == b"old"
    script.write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_the_writing_thread(monkeypatch):
    """TensorBoard's thread keeps its error for the main thread: that one is passed over, others are not."""
    script = importlib.import_module("ppo_procgen")
    shown = []
    monkeypatch.setattr(threading, "__excepthook__", shown.append)
    error = OSError(errno.ENOSPC, "No space left on device")
    keeps_it = SimpleNamespace(thread=SimpleNamespace(exception=error), exc_value=error)
    keeps_another = SimpleNamespace(thread=SimpleNamespace(exception=error), exc_value=ValueError())
    keeps_none = SimpleNamespace(thread=threading.Thread(), exc_value=error)
    for why in (keeps_it, keeps_another, keeps_none):
        script.pass_over_writer_errors(why)
    assert shown == [keeps_another, keeps_none]


# Numbers that are not finite.


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


def poison_iteration_6(script, patch, where: str, poison, call: int):
    """That call of the loss in iteration 6."""
    play = script.rollout
    loss = getattr(script, where)
    calls = []  # in each iteration so far

    def counted_rollout(*inputs):
        calls.append(0)
        return play(*inputs)

    def poisoned(*inputs):
        number = calls[-1]
        calls[-1] += 1
        if len(calls) == 6 and number == call:
            return poison(loss(*inputs))
        return loss(*inputs)

    patch.setattr(script, "rollout", counted_rollout)
    patch.setattr(script, where, poisoned)


@pytest.mark.parametrize(("where", "poison", "minibatch", "metric"), POISONS)
@both_but_ppo_slow
def test_numbers_that_are_not_finite(straight, tmp_path, capsys, where, poison, minibatch, metric):
    """In iteration 6, in the last agent."""
    script = straight.script
    num_agents = 2 if straight.name == "mdpo_procgen" else 1
    call = minibatch * num_agents + num_agents - 1
    with pytest.MonkeyPatch.context() as patch:
        poison_iteration_6(script, patch, where, poison, call)
        status = train(script, tmp_path, *flags(**SETTINGS))
    run_dir = run_folder(tmp_path)
    line = the_last_line(straight.name, SimpleNamespace(status=status, err=capsys.readouterr().err))
    assert f"{metric} of agent {num_agents} is " in line
    assert "in iteration 6; the last good checkpoint is of iteration 4" in line
    assert f"--resume {run_dir.relative_to(tmp_path)}" in line
    assert same(load(run_dir / "checkpoint.pt"), load(straight.checkpoints[4]))
    assert not list(run_dir.rglob("agent.pt"))
    assert not (run_dir / "final_test.json").exists()
    if metric == "grad_norm" and minibatch == LAST:
        assert train(script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
        assert differences(straight.name, straight.run_dir, run_dir) == []
