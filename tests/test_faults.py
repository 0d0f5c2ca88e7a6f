"""What goes wrong around a run: bad files, two processes, full disks, numbers that are not finite. The good
files stay as they were."""

import errno
import fcntl
import importlib
import io
import json
import os
import pickle
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import (
    BOTH,
    Fork,
    agent_folders,
    copy_run,
    flags,
    load,
    load_agent,
    run,
    run_folder,
    same,
    show_small_pictures,
    snapshot,
    step_of,
    train,
    train_straight,
)
from resumed import BATCH_SIZE, SETTINGS, differences, error_line, the_message


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


@pytest.fixture(params=["ppo", "mdpo"])
def straight(request):
    return request.getfixturevalue(request.param)


# Files that are no checkpoint of this run.


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def saved(content) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def edited(good: bytes, **changes) -> bytes:
    """The checkpoint with other entries, None for none."""
    content = torch.load(io.BytesIO(good), weights_only=True) | changes
    return saved({key: value for key, value in content.items() if value is not None})


BAD = {
    "empty": lambda good: b"",
    "half": lambda good: good[: len(good) // 2],
    "text": lambda good: b"This is not a checkpoint.\n" * 100,
    "a pickle that runs code": lambda good: pickle.dumps(Evil()),
    "a checkpoint that runs code": lambda good: edited(good, torch_rng=Evil()),
    "a tensor": lambda good: saved(torch.zeros(3)),
    "no settings": lambda good: edited(good, args=None),
    "agent.pt": lambda good: edited(good, runners=None, torch_rng=None, agents=None, agent={}),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint(ppo, tmp_path, capsys, kind):
    run_dir = copy_run(ppo, 4, tmp_path)
    path = run_dir / "checkpoint.pt"
    path.write_bytes(BAD[kind](path.read_bytes()))
    before = snapshot(tmp_path)
    line = error_line(ppo.script, tmp_path, capsys, "--resume", run_dir)
    assert line.startswith(f"--resume cannot use {path}: ")
    assert not list(tmp_path.rglob("executed"))
    assert snapshot(tmp_path) == before


def test_the_evil_files_do_run_code(tmp_path, monkeypatch):
    """With a loader that trusts them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").exists()


def test_checkpoint_of_an_older_version(ppo, tmp_path, capsys):
    """Those of earlier scripts keep their random generators under another name."""
    content = load(ppo.checkpoints[4])
    content["generators"] = content.pop("torch_rng")
    torch.save(content, tmp_path / "checkpoint.pt")
    assert "torch_rng" in error_line(ppo.script, tmp_path, capsys, "--resume", tmp_path)


@pytest.mark.parametrize("name", ["mdpo_procgen", "spo_procgen"])
def test_checkpoint_of_another_script(ppo, tmp_path, capsys, name):
    """MDPO would go on with a second agent that has learnt nothing."""
    script = importlib.import_module(name)
    before = snapshot(ppo.run_dir)
    line = error_line(script, tmp_path, capsys, "--resume", ppo.run_dir)
    assert line == f"--resume: {ppo.run_dir / 'checkpoint.pt'} is of ppo_procgen.py; this is {name}.py"
    assert snapshot(ppo.run_dir) == before


@pytest.mark.parametrize("target", ["missing", "runs", "runs/missing", "long" * 100, "runs/checkpoint.pt"])
def test_nothing_to_resume(straight, tmp_path, capsys, target):
    (tmp_path / "runs").mkdir()
    if target == "runs/checkpoint.pt":
        (tmp_path / target).mkdir()
    assert target in error_line(straight.script, tmp_path, capsys, "--resume", target)
    assert snapshot(tmp_path) == {}
    assert not (tmp_path / "missing").exists()


# Two processes.


def wait_in_iteration(script, number: int, release: Path):
    """That iteration begins when the file is there."""
    play = script.rollout
    calls = []

    def wait_and_play(*inputs):
        calls.append(number)
        if len(calls) == number:
            print("waiting", flush=True)
            while not release.exists():
                time.sleep(0.01)
        return play(*inputs)

    script.rollout = wait_and_play


@pytest.mark.parametrize("new", [True, False])
def test_a_run_at_work_is_refused(straight, tmp_path, new):
    """To a second process, by its folder and by auto. The first, which began it or resumed it, ends as if
    alone."""
    script = straight.script
    words = ["--resume", "auto", *flags(**SETTINGS)]
    if not new:
        copy_run(straight, 4, tmp_path, finished=False)
    release = tmp_path / "release"
    first = Fork(script, tmp_path, words, lambda: wait_in_iteration(script, 2, release))
    try:
        first.wait_for_line("waiting")
        run_dir = run_folder(tmp_path)
        before = snapshot(run_dir)
        for second_words in (["--resume", run_dir], words):
            second = run(script, tmp_path, second_words)
            assert second.status == 2, second
            line = the_message(script, second.err)
            assert line.startswith("--resume: another process is at work in ")
            assert line.endswith(run_dir.name)
        assert snapshot(run_dir) == before
        assert first.running()
    finally:
        release.touch()
        ended = first.finish()
    assert ended.status == 0, ended.err
    assert differences(straight, run_dir) == []


def test_an_interrupted_run_is_free(ppo, tmp_path, monkeypatch):
    """KeyboardInterrupt leaves main in a notebook, whose process lives on; so does any other error."""
    run_dir = copy_run(ppo, 4, tmp_path, finished=False)
    play = ppo.script.rollout

    def interrupt(*inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ppo.script, "rollout", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(ppo.script, tmp_path, "--resume", run_dir)
    monkeypatch.setattr(ppo.script, "rollout", play)
    ended = run(ppo.script, tmp_path, ["--resume", run_dir])
    assert ended.status == 0, ended.err
    assert caught.traceback  # kept until here, as a notebook keeps the last one
    assert differences(ppo, run_dir) == []


def test_a_file_system_without_locks(ppo, tmp_path, monkeypatch):
    """The run goes on without."""
    run_dir = copy_run(ppo, 4, tmp_path, finished=False)

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train(ppo.script, tmp_path, "--resume", run_dir) == 0
    assert differences(ppo, run_dir) == []


def slow_clock():
    """Makes the clock of this process a thousand times slower: what starts now starts in one second."""
    now = time.time
    start = now()
    time.time = lambda: 1_700_000_000 + (now() - start) / 1000


def test_runs_that_start_in_one_second(straight, tmp_path):
    """Three at once, as of a job array: each has a folder of its own, with its own settings and agents."""
    rates = [1e-3, 2e-3, 3e-3]
    settings = SETTINGS | {"total_timesteps": 2 * BATCH_SIZE, "eval_interval": 2}
    forks = []
    for rate in rates:
        words = flags(**settings, learning_rate=rate)
        forks.append(Fork(straight.script, tmp_path, words, slow_clock))
    for fork in forks:
        ended = fork.finish()
        assert ended.status == 0, ended.err
    folders = sorted((tmp_path / "runs").iterdir())
    name = f"fruitbot__{straight.name}__1__"
    assert [folder.name for folder in folders] == [f"{name}170000000{number}" for number in range(3)]
    found = []
    for folder in folders:
        rate = json.loads((folder / "args.json").read_text())["learning_rate"]
        for agent_folder in agent_folders(straight.name, folder):
            assert load_agent(agent_folder / "agent.pt")["args"]["learning_rate"] == rate
        assert load(folder / "checkpoint.pt")["args"]["learning_rate"] == rate
        assert (folder / "final_test.json").exists()
        assert len(list(folder.rglob("events*"))) == len(agent_folders(straight.name, folder))
        found.append(rate)
    assert sorted(found) == rates


def test_folders_made_at_once(ppo, tmp_path, monkeypatch):
    """By eight threads: all get different ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo.script, "time", SimpleNamespace(time=lambda: 1_700_000_000.9))
    args = ppo.script.Args(**SETTINGS)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(ppo.script.make_run_dir, [args] * 8))
    assert len(set(made)) == 8


# Disks.


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(where: str, patch):
    """From now on files cannot be longer than 100 bytes, or one step of writing them fails."""
    if where == "write":
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
    if where == "fsync":
        patch.setattr(os, "fsync", no_space)
    if where == "replace":
        patch.setattr(Path, "replace", no_space)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "final_test.json"])
def test_files_are_written_whole_or_not_at_all(ppo, tmp_path, name, where):
    path = tmp_path / name
    ppo.script.write_file(path, {"one": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        try:
            fill_disk(where, patch)
            with pytest.raises((OSError, RuntimeError)):
                ppo.script.write_file(path, {"numbers": list(range(1000))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    ppo.script.write_file(path, {"two": 2})
    content = json.loads(path.read_text()) if path.suffix == ".json" else load(path)
    assert content == {"two": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(ppo, tmp_path, monkeypatch):
    """Or a machine that loses its power would have an empty one in place of the old one."""
    path = tmp_path / "args.json"
    ppo.script.write_file(path, {"one": 1})
    events = []
    replace = Path.replace

    def synced(file):
        events.append(os.fstat(file).st_size)

    def replaced(source, target):
        events.append(target)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    ppo.script.write_file(path, {"two": 2})
    assert events == [path.stat().st_size, path]


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
# The function, what becomes of its loss, in which minibatch of the iteration.
POISONS = {
    "nan": ("policy_loss", lambda loss: loss * torch.nan, 0),
    "infinite loss of the last minibatch": ("value_loss", lambda loss: loss + torch.inf, LAST),
    "infinite gradient": ("policy_loss", Poison.apply, 0),
    "infinite gradient of the last minibatch": ("policy_loss", Poison.apply, LAST),
}


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


@pytest.mark.parametrize("kind", POISONS)
def test_numbers_that_are_not_finite(straight, tmp_path, kind):
    """In iteration 6, in the last agent: the checkpoint of iteration 4 stays, and the run goes on from it."""
    script = straight.script
    where, poison, minibatch = POISONS[kind]
    num_agents = len(agent_folders(straight.name, straight.run_dir))
    call = minibatch * num_agents + num_agents - 1
    with pytest.MonkeyPatch.context() as patch:
        poison_iteration_6(script, patch, where, poison, call)
        with pytest.raises(FloatingPointError, match="in iteration 6"):
            train(script, tmp_path, *flags(**SETTINGS))
    run_dir = run_folder(tmp_path)
    assert step_of(run_dir) == 4 * BATCH_SIZE
    assert same(load(run_dir / "checkpoint.pt")["agents"], load(straight.checkpoints[4])["agents"])
    for folder in agent_folders(straight.name, run_dir):
        assert load_agent(folder / "agent.pt")["global_step"] == 4 * BATCH_SIZE
    assert not (run_dir / "final_test.json").exists()
    assert train(script, tmp_path, "--resume", run_dir) == 0
    assert differences(straight, run_dir) == []
