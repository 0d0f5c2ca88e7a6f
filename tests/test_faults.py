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
from common import Fork, agent_folders, copy_run, flags, load, run, run_folder, same, snapshot, step_of, train
from resumed import BATCH_SIZE, SETTINGS, differences, error_line, the_message

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
    "of an older version": lambda good: edited(good, torch_rng=None),
    "agent.pt": lambda good: edited(good, torch_rng=None, agents=None, agent={}),
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


@pytest.mark.parametrize("name", ["mdpo_procgen", "spo_procgen"])
def test_checkpoint_of_another_script(ppo, tmp_path, capsys, name):
    """MDPO would go on with a second agent that has learnt nothing."""
    script = importlib.import_module(name)
    before = snapshot(ppo.run_dir)
    line = error_line(script, tmp_path, capsys, "--resume", ppo.run_dir)
    assert line == f"--resume: {ppo.run_dir / 'checkpoint.pt'} is of ppo_procgen.py; this is {name}.py"
    assert snapshot(ppo.run_dir) == before


# Two processes.


def wait_in_iteration_2(script, folder: Path):
    """It begins when there is a file."""
    play = script.rollout
    calls = []

    def wait_and_play(*inputs):
        calls.append("rollout")
        if len(calls) == 2:
            (folder / "waiting").touch()
            while not (folder / "release").exists():
                time.sleep(0.01)
        return play(*inputs)

    script.rollout = wait_and_play


@pytest.mark.parametrize(("straight", "new"), [("ppo", False), ("mdpo", True)], indirect=["straight"])
def test_a_run_at_work_is_refused(straight, tmp_path, new):
    """To a second process, by its folder and by auto. The first, which began it or resumed it, ends as if
    alone."""
    script = straight.script
    words = ["--resume", "auto", *flags(**SETTINGS)]
    if not new:
        copy_run(straight, 4, tmp_path, finished=False)
    first = Fork(script, tmp_path, words, lambda: wait_in_iteration_2(script, tmp_path))
    try:
        while not (tmp_path / "waiting").exists():
            assert first.is_alive()
            time.sleep(0.05)
        run_dir = run_folder(tmp_path)
        before = snapshot(run_dir)
        for second_words in (["--resume", run_dir], words):
            second = run(script, tmp_path, second_words)
            assert second.status == 2, second
            line = the_message(script, second.err)
            assert line.startswith("--resume: another process is at work in ")
            assert line.endswith(run_dir.name)
        assert snapshot(run_dir) == before
        assert first.is_alive()
    finally:
        (tmp_path / "release").touch()
        ended = first.finish()
    assert ended.status == 0, ended.err
    assert differences(straight, run_dir) == []


def test_an_interrupted_run_is_free(ppo, tmp_path, monkeypatch):
    """KeyboardInterrupt leaves main in a notebook, whose process lives on; so does any other error."""
    run_dir = copy_run(ppo, 10, tmp_path, finished=False)

    def interrupt(*inputs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo.script, "rollout", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(ppo.script, tmp_path, "--resume", run_dir)
    assert train(ppo.script, tmp_path, "--resume", run_dir) == 0
    assert caught.traceback  # kept until here, as a notebook keeps the last one
    assert differences(ppo, run_dir) == []


def test_a_file_system_without_locks(ppo, tmp_path, monkeypatch):
    """The run goes on without."""

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run_dir = copy_run(ppo, 10, tmp_path, finished=False)
    assert train(ppo.script, tmp_path, "--resume", run_dir) == 0
    assert differences(ppo, run_dir) == []


def test_folders_made_at_once(tmp_path, monkeypatch):
    """By eight threads in one second, as by a job array: all get different ones."""
    script = importlib.import_module("ppo_procgen")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: 1_700_000_000.9))
    args = script.Args(**SETTINGS)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(script.make_run_dir, [args] * 8))
    expected = [f"runs/fruitbot__ppo_procgen__1__170000000{number}" for number in range(8)]
    assert sorted(map(str, made)) == expected


# Disks.


@pytest.mark.parametrize("name", ["checkpoint.pt", "final_test.json"])
def test_files_are_written_whole_or_not_at_all(tmp_path, name):
    """Where files cannot be longer than 100 bytes."""
    write_file = importlib.import_module("ppo_procgen").write_file
    path = tmp_path / name
    write_file(path, {"one": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            write_file(path, {"numbers": list(range(1000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    write_file(path, {"two": 2})
    content = json.loads(path.read_text()) if path.suffix == ".json" else load(path)
    assert content == {"two": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch):
    """Or a machine that loses its power would have an empty one in place of the old one."""
    events = []
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_size))
    monkeypatch.setattr(Path, "replace", lambda source, target: events.append(target))
    importlib.import_module("ppo_procgen").write_file(tmp_path / "args.json", {"two": 2})
    (unfinished,) = tmp_path.iterdir()
    assert events == [unfinished.stat().st_size, tmp_path / "args.json"]


# Numbers that are not finite.


class Poison(torch.autograd.Function):
    """A loss as it is, with gradients that are infinite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


# The function, what becomes of its loss, in which of the two minibatches.
POISONS = {
    "nan": ("policy_loss", lambda loss: loss * torch.nan, 0),
    "infinite loss of the last minibatch": ("value_loss", lambda loss: loss + torch.inf, 1),
    "infinite gradient": ("policy_loss", Poison.apply, 0),
    "infinite gradient of the last minibatch": ("policy_loss", Poison.apply, 1),
}


@pytest.mark.parametrize("kind", POISONS)
def test_numbers_that_are_not_finite(mdpo, tmp_path, monkeypatch, kind):
    """In iteration 6, in the second agent: the checkpoint of iteration 4 stays, and a run goes on from it."""
    where, poison, minibatch = POISONS[kind]
    loss = getattr(mdpo.script, where)
    calls = []

    def poisoned(*inputs):
        calls.append(where)
        if len(calls) == 5 * 4 + 2 * minibatch + 2:
            return poison(loss(*inputs))
        return loss(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(mdpo.script, where, poisoned)
        with pytest.raises(FloatingPointError, match="in iteration 6"):
            train(mdpo.script, tmp_path, *flags(**SETTINGS | {"eval_interval": 0}))
    run_dir = run_folder(tmp_path)
    assert same(load(run_dir / "checkpoint.pt")["agents"], load(mdpo.checkpoints[4])["agents"])
    for folder in agent_folders(mdpo.name, run_dir):
        assert load(folder / "agent.pt")["global_step"] == step_of(run_dir) == 4 * BATCH_SIZE
    words = flags(resume=run_dir, total_timesteps=6 * BATCH_SIZE)
    assert train(mdpo.script, tmp_path, *words) == 0
    assert same(load(run_dir / "checkpoint.pt")["agents"], load(mdpo.checkpoints[6])["agents"])
