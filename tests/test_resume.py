"""Runs that were stopped, killed, extended: they end as one that ran straight through, to the bit."""

import json
import os
import random
import signal
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import (
    Fork,
    agent_folders,
    copy_run,
    flags,
    load,
    parse,
    read_curves,
    run,
    run_folder,
    same,
    snapshot,
    step_of,
    train,
    train_straight,
    without_boxes,
)
from resumed import BATCH_SIZE, SETTINGS, differences, error_line

# After these iterations there is a checkpoint: at the interval, before a test, at the end.
SAVED = [0, 2, 3, 4, 6, 8, 9, 10, 12]


def assert_agents_are_of_the_checkpoint(name: str, run_dir: Path):
    """Each agent's file has the weights, the settings and the steps of the run's."""
    checkpoint = load(run_dir / "checkpoint.pt")
    for weights, folder in zip(checkpoint["agents"], agent_folders(name, run_dir), strict=True):
        content = load(folder / "agent.pt")
        assert same(content["agent"], weights)
        for key in ("script", "args", "global_step"):
            assert same(content[key], checkpoint[key])


def test_the_straight_run(straight):
    """Checkpoints at the interval, before tests and at the end, which say what they are; everything in them
    changes in a run, and agents begin with weights of their own."""
    assert list(straight.checkpoints) == SAVED
    first = load(straight.checkpoints[0])
    last = load(straight.checkpoints[12])
    assert last["script"] == straight.name
    assert last["global_step"] == 12 * BATCH_SIZE
    assert last["args"] == asdict(straight.script.Args(**SETTINGS))
    assert len(last["runners"]) == len(agent_folders(straight.name, straight.run_dir))
    assert_agents_are_of_the_checkpoint(straight.name, straight.run_dir)
    for key in ("envs", "statistics"):
        for runner, last_runner in zip(first["runners"], last["runners"]):
            assert not same(runner[key], last_runner[key]), key
    for weights, last_weights in zip(first["agents"], last["agents"]):
        assert not same(weights, last_weights)
    for weights, peer_weights in pairwise(first["agents"]):
        assert not same(weights, peer_weights)


# Signals.


def stop_in_a_call(script, patch, where: str, call: int, stop: list, signal_number: int):
    """The signal comes in that call of a function of the script."""
    function = getattr(script, where)
    calls = []

    def interrupted(*inputs):
        calls.append(where)
        if len(calls) == call:
            stop.append(signal_number)
        return function(*inputs)

    patch.setattr(script, where, interrupted)


# Where a signal comes in, at which call of it since the (re)start, and the iteration that is saved then.
STOPS = [
    ("set_up", 1, 0),  # before the first iteration
    ("rollout", 1, 1),
    ("update", 2, 3),  # the test after it is for the next start
    ("evaluate", 1, 3),
    ("save_checkpoint", 1, 5),  # of iteration 4, when it is too late to stop before the next
    ("update", 7, 12),  # in the last iteration: its test and the final test are for the next starts
    ("evaluate", 2, 12),  # in the final test
    ("evaluate", 1, 12),  # in the test of the last iteration, which is made anew
]


def test_stopped_and_resumed(mdpo, tmp_path):
    """By signals at eight moments of one run."""
    script = mdpo.script
    words = flags(**SETTINGS)
    for number, (where, call, iteration) in enumerate(STOPS):
        stop = []
        signal_number = [signal.SIGINT, signal.SIGTERM][number % 2]
        with pytest.MonkeyPatch.context() as patch:
            stop_in_a_call(script, patch, where, call, stop, signal_number)
            assert train(script, tmp_path, *words, stop=stop) == 128 + signal_number
        run_dir = run_folder(tmp_path)
        assert step_of(run_dir) == iteration * BATCH_SIZE, where
        assert not (run_dir / "final_test.json").exists()
        assert_agents_are_of_the_checkpoint(mdpo.name, run_dir)
        words = ["--resume", run_dir.relative_to(tmp_path)]
    assert train(script, tmp_path, *words) == 0
    assert differences(mdpo, run_folder(tmp_path)) == []


# Where a resumed run goes on.


def test_extended(ppo, tmp_path):
    """A run that ended after 5 iterations, where nothing else is due, goes on to 12."""
    settings = SETTINGS | {"total_timesteps": 5 * BATCH_SIZE}
    assert train(ppo.script, tmp_path, *flags(**settings)) == 0
    run_dir = run_folder(tmp_path)
    assert step_of(run_dir) == 5 * BATCH_SIZE
    assert (run_dir / "final_test.json").exists()
    longer = flags(total_timesteps=SETTINGS["total_timesteps"])
    assert train(ppo.script, tmp_path, "--resume", run_dir, *longer) == 0
    assert differences(ppo, run_dir) == []


def test_three_agents(small_pictures, tmp_path):
    """--num-agents 3: a folder for each, which learn differently, and the run goes on to the bit."""
    settings = SETTINGS | {"total_timesteps": 4 * BATCH_SIZE, "eval_interval": 4, "num_agents": 3}
    (tmp_path / "straight").mkdir()
    straight = train_straight("mdpo_procgen", tmp_path / "straight", settings)
    folders = sorted(path.name for path in straight.run_dir.iterdir() if path.is_dir())
    assert folders == ["agent_1", "agent_2", "agent_3"]
    first, second, third = (load(straight.run_dir / each / "agent.pt")["agent"] for each in folders)
    assert not same(first, second)
    assert not same(second, third)
    run_dir = copy_run(straight, 2, tmp_path, finished=False)
    assert train(straight.script, tmp_path, "--resume", run_dir) == 0
    assert differences(straight, run_dir) == []


def test_a_finished_run_stays_as_it_is(ppo, tmp_path):
    """--resume with another learning rate has nothing to train: it tests, and no file says otherwise."""
    run_dir = copy_run(ppo, 12, tmp_path)
    before = snapshot(run_dir)
    assert train(ppo.script, tmp_path, "--resume", run_dir, "--learning-rate", "1e-3") == 0
    after = snapshot(run_dir)
    assert {path: after[path] for path in before} == before
    assert all("events" in path for path in after.keys() - before.keys())
    assert differences(ppo, run_dir) == []


# What is put in the place of an entry of a checkpoint; None stands for what the first checkpoint has there.
SPOILS = {
    ("nothing",): None,
    ("runners", 0, "envs", 0): None,
    ("runners", 0, "envs", 1): None,
    ("runners", 0, "statistics", "var"): 4.0,
    ("runners", 0, "episodes", 0, 0): 99.0,
    ("runners", 0, "episodes", 1, 0): 99.0,
    ("runners", 0, "episodes", 2, 0): 99.0,
    ("runners", 0, "train_return"): 99.0,
    ("runners", 0, "scalars", "losses/entropy"): 0.5,
    ("agents",): None,
    ("optimizer", 0, "exp_avg"): torch.ones(4, 3, 3, 3),
    ("optimizer", 0, "exp_avg_sq"): torch.ones(4, 3, 3, 3),
    ("optimizer", 0, "step"): torch.tensor(1.0),
    ("torch_rng",): None,
    ("global_step",): 3 * BATCH_SIZE,
}


def spoil(content: dict, first: dict, path: tuple):
    *way, last = path
    value = SPOILS[path]
    if value is None:
        for key in way:
            first = first[key]
        value = first[last]
    for key in way:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize("path", SPOILS, ids=str)
def test_every_part_of_a_checkpoint_counts(ppo, tmp_path, path):
    """The checkpoint is one before a test, after which the curves go on to the end: those are replaced."""
    run_dir = copy_run(ppo, 9, tmp_path)
    content = load(run_dir / "checkpoint.pt") | {"nothing": 0}
    spoil(content, load(ppo.checkpoints[0]) | {"nothing": 0}, path)
    torch.save(content, run_dir / "checkpoint.pt")
    assert train(ppo.script, tmp_path, "--resume", run_dir / "checkpoint.pt") == 0
    found = differences(ppo, run_dir)
    assert (found == []) == (path == ("nothing",)), found


def test_speed_and_five_minutes(ppo, tmp_path, monkeypatch):
    """Each iteration takes 128 seconds: every third has a checkpoint beside those of the interval, and the
    speed is that since the start, not of the iterations before."""
    run_dir = copy_run(ppo, 4, tmp_path, finished=False)
    script = ppo.script
    play = script.rollout
    save = script.save_checkpoint
    clock = [time.time()]
    saved = []

    def play_slowly(*inputs):
        clock[0] += 128
        return play(*inputs)

    def note_and_save(*inputs):
        saved.append(inputs[-1] // BATCH_SIZE)
        return save(*inputs)

    monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: clock[0]))
    monkeypatch.setattr(script, "rollout", play_slowly)
    monkeypatch.setattr(script, "save_checkpoint", note_and_save)
    words = flags(total_timesteps=14 * BATCH_SIZE, eval_interval=0, checkpoint_interval=8)
    assert train(script, tmp_path, "--resume", run_dir, *words) == 0
    assert saved == [7, 8, 11, 14]
    speeds = read_curves(run_dir)["charts/SPS"]
    assert [speeds[step * BATCH_SIZE] for step in range(5, 15)] == [0.25] * 10


# The command line of a resumed run.

MUST_STAY = {
    "env_id": "bigfish",
    "exp_name": "other",
    "seed": 7,
    "num_envs": 8,
    "num_steps": 32,
    "channels": (8, 4, 4),
    "pretrained_encoder": "other.pt",
    "num_levels": 7,
    "start_level": 7,
    "distribution_mode": "easy",
    "num_agents": 3,
}
MAY_CHANGE = {"total_timesteps": 2000, "learning_rate": 1e-3, "num_minibatches": 4, "update_epochs": 2}
MAY_CHANGE |= {"gamma": 0.9, "ent_coef": 0.1, "num_eval_envs": 3, "eval_interval": 7, "bf16": True}


def test_what_must_stay_and_what_may_change(mdpo, tmp_path, capsys):
    """The former is an error that names flag, value and file; the latter is taken; all may be left out."""
    script = mdpo.script
    path = mdpo.run_dir / "checkpoint.pt"
    saved = asdict(script.Args(**SETTINGS)) | {"resume": str(path)}
    before = snapshot(mdpo.run_dir)
    for name, value in MUST_STAY.items():
        flag, *values = flags(**{name: value})
        line = error_line(script, tmp_path, capsys, "--resume", path, flag, *values)
        assert line == f"{flag} must stay {saved[name]!r}, as in {path}: leave it out"
    done = SETTINGS["total_timesteps"]
    line = error_line(script, tmp_path, capsys, "--resume", path, "--total-timesteps", done - 1)
    assert line.startswith(f"--total-timesteps must be at least {done}, the steps of")
    for words in [("--num-minibatches", 5), ("--warmth", 3), ("--gamma", 2)]:  # as of a new run
        assert train(script, tmp_path, "--resume", path, *words) == 2
        assert words[0] in without_boxes(capsys.readouterr().err)
    assert asdict(parse(script, tmp_path, "--resume", path, *flags(**MAY_CHANGE))) == saved | MAY_CHANGE
    assert asdict(parse(script, tmp_path, "--resume", mdpo.run_dir)) == saved
    assert asdict(parse(script, tmp_path, f"--resume={path}", *flags(**SETTINGS))) == saved
    assert snapshot(mdpo.run_dir) == before


@pytest.mark.parametrize("name", ["learning_rate", "gamma"])
def test_a_changed_setting_counts(ppo, tmp_path, name):
    """The run goes on with it; the run before keeps its curves."""
    run_dir = copy_run(ppo, 4, tmp_path, finished=False)
    words = flags(total_timesteps=8 * BATCH_SIZE, eval_interval=0, **{name: MAY_CHANGE[name]})
    assert train(ppo.script, tmp_path, "--resume", run_dir, *words) == 0
    agents = load(run_dir / "checkpoint.pt")["agents"]
    assert not same(agents, load(ppo.checkpoints[8])["agents"])
    assert load(run_dir / "agent.pt")["args"][name] == MAY_CHANGE[name]
    rates = read_curves(run_dir)["charts/learning_rate"]
    later_rate = 1e-3 if name == "learning_rate" else 5e-4
    assert list(rates.values()) == pytest.approx([5e-4] * 4 + [later_rate] * 4)
    assert list(rates) == list(range(32, 257, 32))


def test_a_run_from_a_gpu_goes_on_without_one(ppo, tmp_path):
    """With --device cpu: the state of a GPU's generator is left alone."""
    run_dir = copy_run(ppo, 8, tmp_path, finished=False)
    content = load(ppo.checkpoints[8])
    content["args"]["device"] = "cuda"
    content["cuda_rng"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(content, run_dir / "checkpoint.pt")
    assert train(ppo.script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
    assert differences(ppo, run_dir) == []


# --resume auto


def test_auto_takes_the_newest_run_of_the_name(ppo, tmp_path, capsys):
    """The one that was started last and has a checkpoint, with its settings."""
    content = load(ppo.checkpoints[4])
    script = ppo.script
    words = ["--resume", "auto", *flags(**SETTINGS)]

    def make_run(name: str, **changes) -> str:
        path = f"runs/fruitbot__{name}/checkpoint.pt"
        (tmp_path / path).parent.mkdir(parents=True)
        torch.save(content | {"args": content["args"] | changes}, tmp_path / path)
        return path

    assert parse(script, tmp_path, *words).resume == ""  # nothing there
    (tmp_path / "runs" / "fruitbot__ppo_procgen__1__1700000005").mkdir(parents=True)
    make_run("other__1__1700000101", exp_name="other")
    make_run("ppo_procgen__1__other__1__1700000103", exp_name="ppo_procgen__1__other")
    make_run("ppo_procgen__1__2__1__1700000104", exp_name="ppo_procgen__1__2")
    other = make_run("ppo_procgen__2__1700000102", seed=2)
    assert parse(script, tmp_path, *words).resume == ""
    for number in (1, 3, 2):
        make_run(f"ppo_procgen__1__170000000{number}")
    found = "runs/fruitbot__ppo_procgen__1__1700000003/checkpoint.pt"
    args = parse(script, tmp_path, *words, "--gamma", "0.9")
    assert asdict(args) == asdict(script.Args(**SETTINGS)) | {"resume": found, "gamma": 0.9}
    assert parse(script, tmp_path, "--env_id=fruitbot", "--resume=auto").resume == found
    assert parse(script, tmp_path, "--env_id=bigfish", "--resume=auto").resume == ""
    assert parse(script, tmp_path, *words, "--seed", "2").resume == other
    line = error_line(script, tmp_path, capsys, *words, "--num-envs", 8)
    assert line.startswith("--num-envs must stay 2, as in")


# Kills.


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = ["written in part", "before the exchange", "after the exchange"]


def die_in_a_write(moment: str, number: int):
    """Kills this process when it writes its file of that number, at the moment given."""
    sync = os.fsync
    replace = Path.replace
    writes = []

    def patched_sync(file):
        writes.append(file)
        if len(writes) == number and moment == "written in part":
            os.ftruncate(file, os.fstat(file).st_size // 2)
            kill()
        sync(file)

    def patched_replace(path, target):
        if len(writes) == number and moment == "before the exchange":
            kill()
        replace(path, target)
        if len(writes) == number and moment == "after the exchange":
            kill()

    os.fsync = patched_sync
    Path.replace = patched_replace


def test_killed_in_every_write(mdpo, tmp_path):
    """Of a checkpoint, at three moments each, with the same command each time: no file is cut short, and the
    run ends as the mdpo one did."""
    words = ["--resume", "auto", *flags(**SETTINGS)]
    run_dir = copy_run(mdpo, 2, tmp_path, finished=False)
    folders = agent_folders(mdpo.name, run_dir)
    files = [*[folder / "agent.pt" for folder in folders], run_dir / "checkpoint.pt", run_dir / "args.json"]
    for number in range(1, len(files) + 1):
        for moment in MOMENTS:
            before = step_of(run_dir) // BATCH_SIZE
            following = SAVED[SAVED.index(before) + 1]
            result = run(mdpo.script, tmp_path, words, partial(die_in_a_write, moment, number))
            assert result.status == -signal.SIGKILL, result
            exchanged = number if moment == "after the exchange" else number - 1
            for path in files[:exchanged]:
                assert path == run_dir / "args.json" or load(path)["global_step"] == following * BATCH_SIZE
            reached = following if run_dir / "checkpoint.pt" in files[:exchanged] else before
            assert step_of(run_dir) == reached * BATCH_SIZE
    assert following == 8
    assert train(mdpo.script, tmp_path, *words) == 0
    assert differences(mdpo, run_dir) == []


def test_killed_in_the_first_checkpoint(ppo, tmp_path):
    """There is an agent to look at, and nothing to go on from: the same command begins anew."""
    words = ["--resume", "auto", *flags(**SETTINGS)]
    result = run(ppo.script, tmp_path, words, partial(die_in_a_write, "before the exchange", 2))
    assert result.status == -signal.SIGKILL, result
    killed = run_folder(tmp_path)
    assert load(killed / "agent.pt")["global_step"] == 0
    assert not (killed / "checkpoint.pt").exists()
    before = snapshot(killed)
    assert train(ppo.script, tmp_path, *words) == 0
    assert snapshot(killed) == before
    _, run_dir = sorted((tmp_path / "runs").iterdir())
    assert differences(ppo, run_dir) == []


def test_killed_before_the_final_test_is_written(ppo, tmp_path):
    """It is whole or not there, and the next start makes it."""
    run_dir = copy_run(ppo, 12, tmp_path, finished=False)
    words = ["--resume", run_dir]
    for moment in (MOMENTS[0], MOMENTS[2]):
        result = run(ppo.script, tmp_path, words, partial(die_in_a_write, moment, 1))
        assert result.status == -signal.SIGKILL, result
        assert (run_dir / "final_test.json").exists() == (moment == "after the exchange")
    assert (run_dir / "final_test.json").read_bytes() == (ppo.run_dir / "final_test.json").read_bytes()


def kill_at_any_time(script, folder, words, looks: int) -> SimpleNamespace:
    """After so many looks of its networks, which are a clock for which a busy machine does not matter; or it
    has ended before."""
    reading, writing = os.pipe()

    def report():
        forward = script.Agent.forward

        def reporting(*inputs):
            os.write(writing, b".")
            return forward(*inputs)

        script.Agent.forward = reporting

    process = Fork(script, folder, words, report)
    os.close(writing)
    for _ in range(looks):
        os.read(reading, 1)
    process.kill()
    os.close(reading)
    return process.finish()


SLOW = [pytest.param(run, seed, marks=pytest.mark.slow) for run in ("ppo", "mdpo") for seed in (1, 2)]


@pytest.mark.parametrize(("straight", "seed"), [("mdpo", 0), *SLOW], indirect=["straight"])
def test_killed_again_and_again(straight, tmp_path, seed):
    """Until it has ended before the next kill, as the straight one did."""
    rng = random.Random(seed)
    words = ["--resume", "auto", *flags(**SETTINGS)]
    run_dir = copy_run(straight, 0, tmp_path, finished=False)
    most_looks = 250 * len(
        agent_folders(straight.name, run_dir)
    )  # what is after the last checkpoint has fewer
    reached = []  # by the checkpoint after each kill
    while not (run_dir / "final_test.json").exists():
        result = kill_at_any_time(straight.script, tmp_path, words, rng.randrange(most_looks))
        assert result.status in (0, -signal.SIGKILL), result
        for path in tmp_path.rglob("*.pt"):
            load(path)
        for path in tmp_path.rglob("*.json"):
            json.loads(path.read_text())
        reached.append(step_of(run_dir))
        assert len(reached) < 50
    print(f"checkpoints after the kills: {reached}")
    assert reached == sorted(reached)
    assert len(set(reached)) >= 3
    assert differences(straight, run_dir) == []
