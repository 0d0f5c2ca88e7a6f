"""Runs that were stopped, killed, extended: they end as one that ran straight through, to the bit."""

import importlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import (
    BATCH_SIZE,
    SCRIPTS,
    TINY,
    agent_folders,
    flags,
    load_agent,
    read_curves,
    read_events,
    run_folder,
    shell,
)

# Iterations are short, and there are enough of them to be stopped in.
SETTINGS = TINY | {"total_timesteps": 12 * BATCH_SIZE, "update_epochs": 1, "checkpoint_interval": 2}
LONG = SETTINGS | {"total_timesteps": 30 * BATCH_SIZE, "checkpoint_interval": 1}
KILLS = 24  # and the seed of their moments:
KILL_SEED = int(os.environ.get("KILL_SEED", "0"))


def new_second():
    """TensorBoard's files are read in the order of the seconds in their names. Two starts of a script are
    further apart than one, those in this process need not be."""
    time.sleep(1.01 - time.time() % 1)


def train(script, folder, *words, signals=()) -> int:
    """A run in this process as from the shell; its exit status."""
    new_second()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        try:
            script.main(script.parse_args(), signals)
        except SystemExit as stop:
            return stop.code
    return 0


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def same(one, other) -> bool:
    """Of nested containers, tensors to the bit, NaN equal to NaN."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def curves(folder) -> dict:
    """{tag: [(step, value)]}, with doubled points if there are any; of the speed, the steps alone."""
    events = read_events(folder)
    return {
        tag: [(e.step, 0 if tag == "charts/SPS" else e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def differences(name, run_dir, other) -> list[str]:
    """What two runs left that is not the same: weights and settings, curves, final test, checkpoint."""
    found = []
    for folders in zip(agent_folders(name, run_dir), agent_folders(name, other), strict=True):
        one, two = (load_agent(folder / "agent.pt") for folder in folders)
        found += [f"agent's {key}" for key in ("script", "args", "agent") if not same(one[key], two[key])]
        one, two = map(curves, folders)
        assert len(one["losses/value_loss"]) > 3
        found += [tag for tag in one.keys() | two.keys() if one.get(tag) != two.get(tag)]
    if (run_dir / "final_test.json").read_bytes() != (other / "final_test.json").read_bytes():
        found.append("final_test.json")
    pair = load(run_dir / "checkpoint.pt"), load(other / "checkpoint.pt")
    assert pair[0].keys() == pair[1].keys()
    found += [f"checkpoint {key}" for key in pair[0] if not same(pair[0][key], pair[1][key])]
    found += [str(each) for each in other.rglob("*.tmp")]
    return found


def train_straight(name, folder, settings) -> SimpleNamespace:
    """Without a stop. A copy of each checkpoint is kept: {iteration: path}."""
    script, checkpoints = importlib.import_module(name), {}
    save = script.save_checkpoint

    def save_and_copy(path, args, iteration, *state):
        save(path, args, iteration, *state)
        checkpoints[iteration] = Path(shutil.copy(path, folder / f"{iteration}.pt"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_copy)
        assert train(script, folder, *flags(**settings)) == 0
    return SimpleNamespace(
        name=name, script=script, run_dir=run_folder(folder), checkpoints=checkpoints, settings=settings
    )


@pytest.fixture(scope="module", params=SCRIPTS)
def straight(request, tmp_path_factory):
    return train_straight(request.param, tmp_path_factory.mktemp(request.param), SETTINGS)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    return train_straight("ppo_procgen", tmp_path_factory.mktemp("ppo"), SETTINGS)


@pytest.fixture(scope="module")
def long_mdpo(tmp_path_factory):
    return train_straight("mdpo_procgen", tmp_path_factory.mktemp("long"), LONG)


def copy_run(run, iteration, folder) -> Path:
    """The run, with its checkpoint of that iteration, as if killed before the next."""
    target = folder / "runs" / run.run_dir.name
    shutil.copytree(run.run_dir, target)
    shutil.copy(run.checkpoints[iteration], target / "checkpoint.pt")
    return target


def iteration_of(run_dir) -> int:
    return load(run_dir / "checkpoint.pt")["iteration"]


def test_the_straight_run_is_worth_comparing(straight):
    """All kinds of curves with several points, episodes that end, checkpoints at the interval and the end."""
    assert list(straight.checkpoints) == list(range(0, 13, 2))
    for folder in agent_folders(straight.name, straight.run_dir):
        found = read_curves(folder)
        assert len(found["losses/value_loss"]) == 12 and len(found["charts/test_episodic_return"]) == 4
        assert len(set(found["charts/episodic_return"].values())) >= 2
        one, other = (load(straight.checkpoints[i])["runners"][0] for i in (2, 12))
        assert not any(same(one[key], other[key]) for key in ("agent", "envs", "reward_statistics", "arrays"))


# Where the signal comes in, at which call of it since the (re)start, the iteration that is saved then.
STOPS = [
    ("rollout", 1, 1, signal.SIGTERM),
    ("update", 2, 3, signal.SIGINT),
    ("evaluate", 1, 6, signal.SIGTERM),
    ("save_checkpoint", 1, 8, signal.SIGTERM),
    ("update", 4, 12, signal.SIGTERM),  # in the last iteration: the final test is for the next start
]


def test_stopped_and_resumed(straight, tmp_path, capsys):
    """By signals at five moments of one run."""
    script, words = straight.script, flags(**SETTINGS)
    for where, call, iteration, signum in STOPS:
        calls, signals, function = [], [], getattr(script, where)

        def interrupted(*inputs, function=function, calls=calls, call=call, signals=signals, signum=signum):
            calls.append(0)
            if len(calls) == call:
                signals.append(signum)
            return function(*inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, where, interrupted)
            assert train(script, tmp_path, *words, signals=signals) == 128 + signum
        run_dir = run_folder(tmp_path)
        assert iteration_of(run_dir) == iteration
        assert not (run_dir / "final_test.json").exists()
        for folder in agent_folders(straight.name, run_dir):
            assert load_agent(folder / "agent.pt")["agent"]
        hint = f"--resume {run_dir.relative_to(tmp_path)}\n"
        assert capsys.readouterr().out.endswith(hint)
        words = ["--resume", run_dir.relative_to(tmp_path), "--device", "cpu"]
    assert train(script, tmp_path, *words) == 0
    assert differences(straight.name, straight.run_dir, run_folder(tmp_path)) == []


class LateSignal(list):
    """A signal that comes just after main looked for the n-th time whether there is one."""

    looks = 0

    def __init__(self, number):
        self.number = number

    def __bool__(self):
        self.looks += 1
        if self.looks == self.number:
            self.append(signal.SIGTERM)
            return False
        return len(self) > 0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_signal_at_any_moment_stops_with_a_checkpoint(tmp_path, number):
    script = importlib.import_module("ppo_procgen")
    settings = SETTINGS | {"checkpoint_interval": 50, "eval_interval": 0}
    assert train(script, tmp_path, *flags(**settings), signals=LateSignal(number)) == 143
    steps = max(read_curves(run_folder(tmp_path))["losses/value_loss"])
    assert iteration_of(run_folder(tmp_path)) == steps // BATCH_SIZE


def test_extended(straight, tmp_path):
    """A run that ended after 6 iterations goes on to 12."""
    settings = SETTINGS | {"total_timesteps": 6 * BATCH_SIZE}
    assert train(straight.script, tmp_path, *flags(**settings)) == 0
    run_dir = run_folder(tmp_path)
    assert iteration_of(run_dir) == 6 and (run_dir / "final_test.json").exists()
    longer = flags(total_timesteps=SETTINGS["total_timesteps"], device="cpu")
    assert train(straight.script, tmp_path, "--resume", run_dir, *longer) == 0
    assert differences(straight.name, straight.run_dir, run_dir) == []


@pytest.mark.parametrize("iteration", [0, 6, 12])
def test_curves_after_the_checkpoint_are_replaced(ppo, tmp_path, iteration):
    """The curves on disk go on to the end, the checkpoint does not; --resume takes the file, too."""
    run_dir = copy_run(ppo, iteration, tmp_path)
    assert train(ppo.script, tmp_path, "--resume", run_dir / "checkpoint.pt", "--device", "cpu") == 0
    assert len(list(run_dir.glob("events*"))) == 2
    assert differences(ppo.name, ppo.run_dir, run_dir) == []


def exchange(content, other, key, index):
    content[key][index] = other[key][index]


# Each puts something of the first checkpoint in place of what the run had got to. They get the checkpoint,
# the first one, and the agent's side of both.
SPOILS = {
    "training environments": lambda c, c0, side, side0: exchange(side, side0, "envs", 1),
    "the second group of them": lambda c, c0, side, side0: exchange(side, side0, "envs", 2),
    "test environments": lambda c, c0, side, side0: exchange(side, side0, "envs", 0),
    "statistics of the normaliser": lambda c, c0, side, side0: side.update(
        reward_statistics=side0["reward_statistics"]
    ),
    "returns of the normaliser": lambda c, c0, side, side0: exchange(side, side0, "arrays", 0),
    "episodes under way": lambda c, c0, side, side0: exchange(side, side0, "arrays", 1),
    "weights": lambda c, c0, side, side0: side.update(agent=side0["agent"]),
    "optimizer's moments": lambda c, c0, side, side0: [x["exp_avg"].zero_() for x in c["optimizer"].values()],
    "optimizer's steps": lambda c, c0, side, side0: [x["step"].fill_(1) for x in c["optimizer"].values()],
    "generator of torch": lambda c, c0, side, side0: exchange(c, c0, "generators", 2),
    "iteration": lambda c, c0, side, side0: c.update(iteration=3),
    "nothing": lambda c, c0, side, side0: None,
}


@pytest.mark.parametrize("what", SPOILS)
def test_every_part_of_a_checkpoint_counts(ppo, tmp_path, what):
    run_dir = copy_run(ppo, 8, tmp_path)
    content = load(run_dir / "checkpoint.pt")
    start = load(ppo.checkpoints[0])
    SPOILS[what](content, start, content["runners"][0], start["runners"][0])
    torch.save(content, run_dir / "checkpoint.pt")
    assert train(ppo.script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
    found = differences(ppo.name, ppo.run_dir, run_dir)
    assert bool(found) == (what != "nothing"), found


@pytest.mark.parametrize("name", ["ppo_procgen", "mdpo_procgen"])
def test_generators_go_on(name, tmp_path, monkeypatch):
    """Those of Python, numpy and torch, to the normal number that two of them keep for the next call."""
    script = importlib.import_module(name)
    play, draws = script.rollout, []

    def draw_and_play(*inputs):
        draws.append([random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()])
        draws[-1].append(torch.rand(()).item())
        if len(draws) in stops:
            signals.append(signal.SIGTERM)
        return play(*inputs)

    monkeypatch.setattr(script, "rollout", draw_and_play)
    drawn = []
    words = flags(**(SETTINGS | {"total_timesteps": 5 * BATCH_SIZE, "eval_interval": 0}))
    for stops in ((), (3,)):
        draws, signals, folder = [], [], tmp_path / str(len(stops))
        folder.mkdir()
        if stops:
            assert train(script, folder, *words, signals=signals) == 143
            assert train(script, folder, "--resume", run_folder(folder), "--device", "cpu") == 0
        else:
            assert train(script, folder, *words) == 0
        drawn.append(draws)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 5
    assert len({x for draw in drawn[0] for x in draw}) == 25


def test_a_checkpoint_holds_plain_data(straight):
    """It is loaded without running code, and says what it is."""
    content = load(straight.run_dir / "checkpoint.pt")
    assert (content["script"], content["iteration"]) == (straight.name, 12)
    assert len(content["runners"]) == len(agent_folders(straight.name, straight.run_dir))
    assert content["args"]["env_id"] == "fruitbot" and content["args"]["resume"] == ""


# The command line of a resumed run


def parse(script, folder, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        return script.parse_args()


MAY_CHANGE = "total_timesteps eval_interval final_eval_episodes checkpoint_interval resume".split()
MAY_CHANGE += "device num_env_threads bf16 compile cudagraphs torch_deterministic".split()
MAY_CHANGE += "track wandb_project_name wandb_entity".split()
OTHERS = {
    "exp_name": "other",
    "env_id": "bigfish",
    "distribution_mode": "easy",
    "channels": (8, 4, 4),
    "learning_rate": 1e-3,
    "num_envs": 8,
    "num_steps": 32,
    "num_minibatches": 4,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "clip_coef": 0.1,
    "ent_coef": 0.1,
    "vf_coef": 0.1,
    "max_grad_norm": 1.0,
    "distill_coef": 2.0,
}  # and 7 for the other numbers


def test_a_contradicting_flag_is_an_error(straight, tmp_path, capsys):
    script, run_dir = straight.script, straight.run_dir
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for field in fields(script.Args):
        if field.name not in MAY_CHANGE:
            flag = "--" + field.name.replace("_", "-")
            words = flags(**{field.name: OTHERS.get(field.name, 7)})
            words = [flag] if field.type in (bool, "bool") else words
            with pytest.raises(SystemExit) as stop:
                parse(script, tmp_path, "--resume", run_dir, *words)
            out, err = capsys.readouterr()
            assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
            assert f"{flag} must stay" in err and str(run_dir) in err
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_less_than_what_is_done_is_an_error(straight, tmp_path, capsys):
    done = SETTINGS["total_timesteps"]
    with pytest.raises(SystemExit) as stop:
        parse(straight.script, tmp_path, "--resume", straight.run_dir, "--total-timesteps", done - 1)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2 and err.count("\n") == 1 and f"--total-timesteps must be at least {done}" in err
    )
    parse(straight.script, tmp_path, "--resume", straight.run_dir, "--total-timesteps", done)


@pytest.mark.parametrize("which", ["folder", "file"])
def test_settings_need_not_be_given_again(straight, tmp_path, which):
    target = straight.run_dir / "checkpoint.pt" if which == "file" else straight.run_dir
    args = parse(straight.script, tmp_path, "--resume", target)
    assert args == straight.script.Args(**(SETTINGS | {"resume": args.resume}))
    assert Path(args.resume) == straight.run_dir / "checkpoint.pt"
    again = parse(straight.script, tmp_path, "--resume", target, *flags(**SETTINGS))
    assert again.num_envs == args.num_envs and again.device == "cpu"


def test_a_run_from_a_gpu_goes_on_without_one(straight, tmp_path):
    content = torch.load(straight.run_dir / "checkpoint.pt", weights_only=True)
    content["args"]["device"] = "cuda:1"
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert parse(straight.script, tmp_path, "--resume", tmp_path).device == "auto"


def test_flags_that_may_change(straight, tmp_path):
    changes = {
        "total_timesteps": 2000,
        "eval_interval": 7,
        "checkpoint_interval": 9,
        "device": "cpu",
        "num_env_threads": 1,
        "wandb_project_name": "other",
        "wandb_entity": "other",
    }
    words = [*flags(**changes), "--torch-deterministic"]
    args = parse(straight.script, tmp_path, "--resume", straight.run_dir, *words)
    assert {name: getattr(args, name) for name in changes} == changes and args.torch_deterministic


def test_changed_flags_do_not_change_the_numbers(ppo, tmp_path):
    """Threads and the interval of checkpoints have nothing to do with them."""
    run_dir = copy_run(ppo, 4, tmp_path)
    words = flags(num_env_threads=1, checkpoint_interval=5, device="cpu")
    assert train(ppo.script, tmp_path, "--resume", run_dir, *words, "--torch-deterministic") == 0
    assert set(differences(ppo.name, ppo.run_dir, run_dir)) == {
        "agent's args",
        "final_test.json",
        "checkpoint args",
    }


def test_tests_do_not_change_training(straight, tmp_path):
    """A run without tests has the same weights and training curves."""
    words = flags(**(SETTINGS | {"eval_interval": 0}))
    assert train(straight.script, tmp_path, *words) == 0
    run_dir = run_folder(tmp_path)
    for folders in zip(
        *(agent_folders(straight.name, each) for each in (straight.run_dir, run_dir)), strict=True
    ):
        one, two = (load_agent(folder / "agent.pt")["agent"] for folder in folders)
        assert same(one, two)
        one, two = map(curves, folders)
        assert one.keys() - two.keys() == {"charts/test_episodic_return", "charts/generalization_gap"}
        assert all(one[tag] == two[tag] for tag in two)


# --resume auto


def make_run(run, folder, name: str, age: int, **changes) -> Path:
    """A run folder of that name and age in seconds, with a checkpoint."""
    path = folder / "runs" / name / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    content = load(run.checkpoints[4])
    content["args"] |= changes
    torch.save(content, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_auto_takes_the_newest_run_of_the_name(ppo, tmp_path):
    words = ["--resume", "auto", *flags(**SETTINGS)]
    assert parse(ppo.script, tmp_path, *words).resume == ""  # nothing there
    (tmp_path / "runs" / "fruitbot__ppo_procgen__1__1700000005").mkdir(parents=True)
    assert parse(ppo.script, tmp_path, *words).resume == ""  # killed before its first checkpoint
    for number, changes in enumerate(({"env_id": "bigfish"}, {"exp_name": "other"}, {"seed": 2})):
        args = {"env_id": "fruitbot", "exp_name": "ppo_procgen", "seed": 1} | changes
        make_run(ppo, tmp_path, "__".join(map(str, [*args.values(), 1700000100 + number])), 10, **changes)
        assert parse(ppo.script, tmp_path, *words).resume == ""
    for number, age in ((1, 300), (3, 100), (2, 200)):
        make_run(ppo, tmp_path, f"fruitbot__ppo_procgen__1__170000000{number}", age)
    found = "runs/fruitbot__ppo_procgen__1__1700000003/checkpoint.pt"
    assert parse(ppo.script, tmp_path, *words).resume == found
    assert parse(ppo.script, tmp_path, "--env_id=fruitbot", "--resume=auto").resume == found
    assert parse(ppo.script, tmp_path, *words, "--seed", "2").resume.endswith("2__1700000102/checkpoint.pt")


@pytest.mark.parametrize("name", ["ppo_procgen__1__other", "ppo_procgen__1__2"])
def test_auto_does_not_take_a_run_whose_name_begins_the_same(ppo, tmp_path, name):
    make_run(ppo, tmp_path, f"fruitbot__{name}__1__1700000009", 10, exp_name=name)
    assert parse(ppo.script, tmp_path, "--resume", "auto", *flags(**SETTINGS)).resume == ""


def test_auto_with_a_contradicting_flag(ppo, tmp_path, capsys):
    make_run(ppo, tmp_path, "fruitbot__ppo_procgen__1__1700000003", 10)
    with pytest.raises(SystemExit) as stop:
        parse(ppo.script, tmp_path, "--resume", "auto", *flags(**(SETTINGS | {"num_envs": 8})))
    assert stop.value.code == 2 and "--num-envs must stay 4" in capsys.readouterr().err


def test_auto_leaves_other_runs_alone(ppo, tmp_path):
    run_dir = copy_run(ppo, 4, tmp_path)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    words = flags(**(SETTINGS | {"seed": 2, "total_timesteps": BATCH_SIZE, "eval_interval": 0}))
    assert train(ppo.script, tmp_path, "--resume", "auto", *words) == 0
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert len(list((tmp_path / "runs").iterdir())) == 2


# Kills


def fork_run(script, folder, words, prepare=lambda: None) -> int:
    """The process id of a run in a fork of this process, which saves the imports. Its output goes to the
    file `output`."""
    new_second()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(stream, "w")) for stream in (1, 2))
        script.tqdm.set_lock(threading.RLock())  # tqdm's own is shared by processes: it would die held
        os.chdir(folder)
        sys.argv = [f"{script.__name__}.py", *map(str, words)]
        prepare()
        script.main(script.parse_args(), script.catch_signals())
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    """Exit status, negative the signal that killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_save(moment: str, number: int, part: float):
    """Kills this process in its save of that number, at the moment given."""
    sync, replace, saves = os.fsync, Path.replace, []

    def patched_sync(file):
        saves.append(file)
        if len(saves) == number and moment == "written in part":
            os.ftruncate(file, int(part * os.fstat(file).st_size))
        if len(saves) == number and moment.startswith("written"):
            kill()
        sync(file)

    def patched_replace(path, target):
        if len(saves) == number and moment == "before the exchange":
            kill()
        replace(path, target)
        if len(saves) == number and moment == "after the exchange":
            kill()

    os.fsync, Path.replace = patched_sync, patched_replace


MOMENTS = ["written in part", "written", "before the exchange", "after the exchange"]


def test_kills(long_mdpo, tmp_path):
    """24 times: a third in the middle of a save, the rest whenever it happens to be."""
    script, rng = long_mdpo.script, random.Random(KILL_SEED)
    words = ["--resume", "auto", *flags(**LONG)]
    reached = []  # the iteration of the checkpoint after each kill
    for number in range(KILLS):
        if number % 3 == 2:
            moment = MOMENTS[number // 3 % 4], rng.choice([1, 2]), rng.random()
            process = fork_run(script, tmp_path, words, lambda moment=moment: die_in_a_save(*moment))
        else:
            reading, writing = os.pipe()

            def report(writing=writing):
                """A byte for everything that the networks look at."""
                forward = script.Agent.forward

                def reporting(*inputs):
                    os.write(writing, b".")
                    return forward(*inputs)

                script.Agent.forward = reporting

            process = fork_run(script, tmp_path, words, report)
            os.close(writing)
            for _ in range(rng.randrange(120)):  # an iteration is some 40, a test some 60 more
                os.read(reading, 1)
            time.sleep(rng.random() * 0.02)
            os.kill(process, signal.SIGKILL)
            os.close(reading)
        assert wait(process) == -signal.SIGKILL, (tmp_path / "output").read_text()
        checkpoints = list(tmp_path.glob("runs/*/checkpoint.pt"))
        assert len(checkpoints) <= 1
        reached += [iteration_of(path.parent) for path in checkpoints]
    print(f"seed {KILL_SEED}: {KILLS} kills, checkpoints after them of iterations {reached}")
    assert reached == sorted(reached) and len(reached) >= 20 and len(set(reached)) >= 6, reached
    assert reached[-1] < 30
    assert wait(fork_run(script, tmp_path, words)) == 0, (tmp_path / "output").read_text()
    assert "Traceback" not in (tmp_path / "output").read_text()
    (result,) = tmp_path.glob("runs/*/final_test.json")
    assert differences(long_mdpo.name, long_mdpo.run_dir, result.parent) == []


@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[3]])
def test_kill_in_the_final_save(ppo, tmp_path, moment):
    """Of agent.pt and of final_test.json: both are whole or not there, and the next start makes them."""
    run_dir = copy_run(ppo, 12, tmp_path)
    (run_dir / "agent.pt").unlink()
    (run_dir / "final_test.json").unlink()
    words = ["--resume", run_dir, "--device", "cpu"]
    for number, name in ((1, "agent.pt"), (2, "final_test.json")):
        process = fork_run(ppo.script, tmp_path, words, lambda n=number: die_in_a_save(moment, n, 0.5))
        assert wait(process) == -signal.SIGKILL
        assert (run_dir / name).exists() == (moment == "after the exchange")
        if (run_dir / name).exists():
            assert (run_dir / name).read_bytes() == (ppo.run_dir / name).read_bytes()
    assert wait(fork_run(ppo.script, tmp_path, words)) == 0
    assert differences(ppo.name, ppo.run_dir, run_dir) == []


def test_from_the_shell(long_mdpo, tmp_path):
    """kill -9, then the same command and SIGTERM, then --resume with the folder alone."""
    rng = random.Random(KILL_SEED)
    command, options = shell(long_mdpo.name, tmp_path)
    words, reached = ["--resume", "auto", *flags(**LONG)], [0]
    for signum in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        try:
            deadline = time.time() + 60
            while time.time() < deadline and process.poll() is None:
                checkpoints = list((tmp_path / "work").glob("runs/*/checkpoint.pt"))
                if checkpoints and iteration_of(checkpoints[0].parent) > reached[-1]:
                    break
                time.sleep(0.05)
            time.sleep(rng.random() * 0.3)
            process.send_signal(signum)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == (-9 if signum == signal.SIGKILL else 143), err
        run_dir = run_folder(tmp_path / "work")
        reached.append(iteration_of(run_dir))
        assert reached[-2] < reached[-1] < 30 and "Traceback" not in err
    hint = out.splitlines()[-1].split("--resume ")[1]
    result = subprocess.run(
        [*command, "--resume", hint, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr and "arn" not in result.stderr
    assert differences(long_mdpo.name, long_mdpo.run_dir, run_dir) == []
