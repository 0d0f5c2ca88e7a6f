"""Runs that were stopped, killed, extended: they end as one that ran straight through, to the bit."""

import importlib
import os
import random
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    BOTH,
    TINY,
    Fork,
    agent_folders,
    copy_run,
    differences,
    flags,
    iteration_of,
    load,
    load_agent,
    parse,
    read_curves,
    read_points,
    run,
    run_folder,
    run_script,
    same,
    show_small_pictures,
    snapshot,
    start_script,
    train,
    train_straight,
)

# Iterations are short, and there are enough of them to be stopped in.
BATCH_SIZE = 32
SETTINGS = TINY | {
    "total_timesteps": 12 * BATCH_SIZE,
    "num_envs": 2,
    "update_epochs": 1,
    "checkpoint_interval": 2,
    "final_eval_episodes": 2,
}
LONG = SETTINGS | {"total_timesteps": 30 * BATCH_SIZE, "checkpoint_interval": 1}
KILL_SEED = int(os.environ.get("KILL_SEED", "0"))  # of the moments of the kills


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


@pytest.fixture(scope="module")
def long_mdpo(tmp_path_factory):
    return train_straight("mdpo_procgen", tmp_path_factory.mktemp("long"), LONG)


both_but_mdpo_slow = pytest.mark.parametrize(
    "straight", ["ppo", pytest.param("mdpo", marks=pytest.mark.slow)], indirect=True
)


def number_of_agents(run) -> int:
    return len(agent_folders(run.name, run.run_dir))


def test_the_straight_run_is_worth_comparing(straight):
    """All kinds of curves with several points, episodes that end, checkpoints at the interval and the end."""
    assert list(straight.checkpoints) == list(range(0, 13, 2))
    for folder in agent_folders(straight.name, straight.run_dir):
        curves = read_curves(folder)
        assert len(curves["losses/value_loss"]) == 12
        assert len(curves["charts/test_episodic_return"]) == 4
        assert len(curves["charts/episodic_return"]) >= 2
    first = load(straight.checkpoints[2])
    last = load(straight.checkpoints[12])
    for weights, last_weights in zip(first["agents"], last["agents"], strict=True):
        assert not same(weights, last_weights)
    for key in ("envs", "reward_statistics"):
        sides = [side[key] for side in first["runners"]]
        assert not same(sides, [side[key] for side in last["runners"]]), key


def test_agents_begin_apart(mdpo):
    """With other weights: equal ones would learn little from each other."""
    first, second = load(mdpo.checkpoints[0])["agents"]
    for name, weight in first.items():
        if name.endswith("weight"):
            assert not torch.equal(weight, second[name])


# Signals.


def stop_in_a_call(script, patch, where: str, call: int, stop, signal_number: int):
    """The signal comes in that call of a function of the script; in a test, after five of its steps."""
    owner = script.Checkpoints if where == "save" else script
    function = getattr(owner, where)
    calls = []

    def interrupted(*inputs):
        calls.append(where)
        if len(calls) != call:
            return function(*inputs)
        if where != "evaluate":
            stop.signal_number = signal_number
            return function(*inputs)
        policy, *others = inputs
        steps = []

        def policy_with_signal(obs):
            steps.append(obs)
            if len(steps) == 5:
                stop.signal_number = signal_number
            assert len(steps) <= 5
            return policy(obs)

        return function(policy_with_signal, *others)

    patch.setattr(owner, where, interrupted)


def stops(num_agents: int) -> list[tuple[str, int, int]]:
    """Where a signal comes in, at which call of it since the (re)start, the iteration that is saved then."""
    last_test_of_all = 3 * num_agents  # one in the middle of the run, and two at its end
    return [
        ("rollout", 1, 1),
        ("update", 2, 3),  # the test after it is for the next start
        ("evaluate", 1, 3),  # in the test of the first agent
        ("evaluate", num_agents, 3),  # of the last
        ("save", 1, 5),  # of iteration 4, when it is too late to stop before the next
        ("update", 7, 12),  # in the last iteration: its test and the final test are for the next starts
        ("evaluate", last_test_of_all, 12),
        ("evaluate", 1, 12),  # in the final test
    ]


def test_stopped_and_resumed(straight, tmp_path, capsys):
    """By signals at eight moments of one run."""
    script = straight.script
    words = flags(**SETTINGS)
    for number, (where, call, iteration) in enumerate(stops(number_of_agents(straight))):
        stop = script.Stop()
        signal_number = [signal.SIGINT, signal.SIGTERM][number % 2]
        with pytest.MonkeyPatch.context() as patch:
            stop_in_a_call(script, patch, where, call, stop, signal_number)
            assert train(script, tmp_path, *words, stop=stop) == 128 + signal_number
        run_dir = run_folder(tmp_path)
        assert iteration_of(run_dir) == iteration, where
        assert not (run_dir / "final_test.json").exists()
        for folder in agent_folders(straight.name, run_dir):
            assert load_agent(folder / "agent.pt")["agent"]
        steps = iteration * BATCH_SIZE
        resume = run_dir.relative_to(tmp_path)
        last_line = f"stopped after {steps} steps; to go on: --resume {resume}"
        assert capsys.readouterr().out.splitlines()[-1] == last_line
        words = ["--resume", resume, "--device", "cpu"]
    assert train(script, tmp_path, *words) == 0
    assert differences(straight.name, straight.run_dir, run_folder(tmp_path)) == []


def test_signal_before_the_first_iteration(straight, tmp_path):
    """Stops at once: the checkpoint of iteration 0 is there, and the run begins with it."""
    stop = straight.script.Stop()
    stop.signal_number = signal.SIGTERM
    assert train(straight.script, tmp_path, *flags(**SETTINGS), stop=stop) == 143
    run_dir = run_folder(tmp_path)
    assert same(load(run_dir / "checkpoint.pt"), load(straight.checkpoints[0]))
    for folder in agent_folders(straight.name, run_dir):
        assert "losses/value_loss" not in read_curves(folder)
        assert load_agent(folder / "agent.pt")["agent"]


@pytest.mark.slow
def test_stopped_before_the_first_iteration_and_resumed(straight, tmp_path):
    test_signal_before_the_first_iteration(straight, tmp_path)
    run_dir = run_folder(tmp_path)
    assert train(straight.script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
    assert differences(straight.name, straight.run_dir, run_dir) == []


@both_but_mdpo_slow
def test_extended(straight, tmp_path):
    """A run that ended after 6 iterations goes on to 12."""
    settings = SETTINGS | {"total_timesteps": 6 * BATCH_SIZE}
    assert train(straight.script, tmp_path, *flags(**settings)) == 0
    run_dir = run_folder(tmp_path)
    assert iteration_of(run_dir) == 6
    assert (run_dir / "final_test.json").exists()
    longer = flags(total_timesteps=SETTINGS["total_timesteps"], device="cpu")
    assert train(straight.script, tmp_path, "--resume", run_dir, *longer) == 0
    assert differences(straight.name, straight.run_dir, run_dir) == []


def test_three_agents(tmp_path):
    """--num-agents 3: a folder for each, a line in the final test for each, and it goes on to the bit."""
    settings = SETTINGS | {"total_timesteps": 4 * BATCH_SIZE, "num_agents": 3}
    (tmp_path / "straight").mkdir()
    straight = train_straight("mdpo_procgen", tmp_path / "straight", settings)
    folders = sorted(path.name for path in straight.run_dir.iterdir() if path.is_dir())
    assert folders == ["agent_1", "agent_2", "agent_3"]
    weights = []
    for folder in agent_folders(straight.name, straight.run_dir, 3):
        assert len(read_curves(folder)["losses/mutual_kl"]) == 4
        weights.append(load_agent(folder / "agent.pt")["agent"])
    assert not same(weights[0], weights[1])
    assert not same(weights[1], weights[2])
    run_dir = copy_run(straight, 2, tmp_path, finished=False)
    assert train(straight.script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
    assert differences(straight.name, straight.run_dir, run_dir, 3) == []


@pytest.mark.parametrize("iteration", [6, 12])
def test_curves_after_the_checkpoint_are_replaced(ppo, tmp_path, iteration):
    """The curves on disk go on to the end, the checkpoint does not; --resume takes the file, too."""
    run_dir = copy_run(ppo, iteration, tmp_path)
    assert train(ppo.script, tmp_path, "--resume", run_dir / "checkpoint.pt", "--device", "cpu") == 0
    assert len(list(run_dir.glob("events*"))) == 2
    assert differences(ppo.name, ppo.run_dir, run_dir) == []


# Each puts something of the first checkpoint in place of what the run had got to, or another number.


def spoil_training_environments(content, first):
    content["runners"][0]["envs"][1] = first["runners"][0]["envs"][1]


def spoil_second_group(content, first):
    content["runners"][0]["envs"][2] = first["runners"][0]["envs"][2]


def spoil_test_environments(content, first):
    content["runners"][0]["envs"][0] = first["runners"][0]["envs"][0]


def spoil_statistics(content, first):
    content["runners"][0]["reward_statistics"]["var"] *= 4


def spoil_discounted(content, first):
    content["runners"][0]["discounted"][0] += 1


def spoil_episodes(content, first):
    content["runners"][0]["episodes"][0][0] += 1


def spoil_weights(content, first):
    content["agents"] = first["agents"]


def spoil_moments(content, first):
    for state in content["optimizer"].values():
        state["exp_avg"].zero_()


def spoil_second_moments(content, first):
    for state in content["optimizer"].values():
        state["exp_avg_sq"].mul_(2)


def spoil_adam_steps(content, first):
    for state in content["optimizer"].values():
        state["step"].fill_(1)


def spoil_generator(content, first):
    content["generators"]["torch"] = first["generators"]["torch"]


def spoil_iteration(content, first):
    content["position"]["iteration"] = 3


def spoil_nothing(content, first):
    pass


SPOILS = [
    spoil_training_environments,
    spoil_second_group,
    spoil_test_environments,
    spoil_statistics,
    spoil_discounted,
    spoil_episodes,
    spoil_weights,
    spoil_moments,
    spoil_second_moments,
    spoil_adam_steps,
    spoil_generator,
    spoil_iteration,
    spoil_nothing,
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_every_part_of_a_checkpoint_counts(ppo, tmp_path, spoil):
    run_dir = copy_run(ppo, 10, tmp_path)
    content = load(run_dir / "checkpoint.pt")
    spoil(content, load(ppo.checkpoints[0]))
    torch.save(content, run_dir / "checkpoint.pt")
    assert train(ppo.script, tmp_path, "--resume", run_dir, "--device", "cpu") == 0
    found = differences(ppo.name, ppo.run_dir, run_dir)
    if spoil is spoil_nothing:
        assert found == []
    else:
        assert found != []


@pytest.mark.parametrize("name", ["ppo_procgen", pytest.param("mdpo_procgen", marks=pytest.mark.slow)])
def test_generators_go_on(name, tmp_path, monkeypatch):
    """Those of Python, numpy and torch, to the normal number that two of them keep for the next call."""
    script = importlib.import_module(name)
    play = script.rollout
    stop = script.Stop()
    draws = []

    def draw_and_play(*inputs):
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        draws.append([*numbers, torch.rand(()).item()])
        if len(draws) == 5 + 3:
            stop.signal_number = signal.SIGTERM
        return play(*inputs)

    monkeypatch.setattr(script, "rollout", draw_and_play)
    words = flags(**(SETTINGS | {"total_timesteps": 5 * BATCH_SIZE, "eval_interval": 0}))
    for folder in ("straight", "stopped"):
        (tmp_path / folder).mkdir()
    assert train(script, tmp_path / "straight", *words) == 0
    assert train(script, tmp_path / "stopped", *words, stop=stop) == 143
    run_dir = run_folder(tmp_path / "stopped")
    assert train(script, tmp_path / "stopped", "--resume", run_dir, "--device", "cpu") == 0
    assert len(draws) == 10
    assert draws[:5] == draws[5:]
    assert len({number for draw in draws for number in draw}) == 25


def test_a_checkpoint_holds_plain_data(straight):
    """It is loaded without running code, and says what it is."""
    content = load(straight.run_dir / "checkpoint.pt")
    assert content["script"] == straight.name
    assert content["position"] == {"iteration": 12, "global_step": 12 * BATCH_SIZE, "test_due": False}
    assert len(content["runners"]) == len(content["agents"]) == number_of_agents(straight)
    assert content["args"]["env_id"] == "fruitbot"
    assert content["args"]["resume"] == ""


def test_a_restored_side_of_a_run_is_as_it_was(straight, tmp_path):
    """All that a runner saves, the last returns among it, is there again when another has loaded it."""
    script = straight.script
    args = script.Args(**SETTINGS)
    states = load(straight.checkpoints[8])["runners"]
    for index, state in enumerate(states):
        assert not np.isnan([state["train_return"], state["test_return"]]).any()
        runner = script.Runner(args, index, len(states), tmp_path, torch.device("cpu"), 0)
        runner.load_state_dict(state)
        assert same(runner.state_dict(), state)
        runner.close()


def test_the_gap_of_a_resumed_run_is_to_the_last_return(ppo, tmp_path):
    """A test right after the start has no newer episodes: the checkpoint's return counts."""
    run_dir = copy_run(ppo, 4, tmp_path, finished=False)
    content = load(run_dir / "checkpoint.pt")
    content["position"]["test_due"] = True
    content["runners"][0]["train_return"] = 1000.0
    torch.save(content, run_dir / "checkpoint.pt")
    words = flags(total_timesteps=4 * BATCH_SIZE, device="cpu")
    assert train(ppo.script, tmp_path, "--resume", run_dir, *words) == 0
    curves = read_curves(run_dir)
    test_return = curves["charts/test_episodic_return"][4 * BATCH_SIZE]
    assert curves["charts/generalization_gap"][4 * BATCH_SIZE] == pytest.approx(1000 - test_return)


def test_speed_is_that_since_the_start(ppo, tmp_path, monkeypatch):
    """Not of the iterations before: the two that follow take half a second at least."""
    run_dir = copy_run(ppo, 8, tmp_path, finished=False)
    play = ppo.script.rollout

    def play_slowly(*inputs):
        time.sleep(0.25)
        return play(*inputs)

    monkeypatch.setattr(ppo.script, "rollout", play_slowly)
    words = flags(total_timesteps=10 * BATCH_SIZE, eval_interval=0, device="cpu")
    start_time = time.time()
    assert train(ppo.script, tmp_path, "--resume", run_dir, *words) == 0
    seconds = time.time() - start_time
    speeds = read_curves(run_dir)["charts/SPS"]
    for iterations in (1, 2):
        speed = speeds[(8 + iterations) * BATCH_SIZE]
        assert iterations * BATCH_SIZE / seconds < speed < BATCH_SIZE / 0.25


# The command line of a resumed run. Other values than those of SETTINGS:

OTHERS = {
    "env_id": "bigfish",
    "exp_name": "other",
    "seed": 7,
    "total_timesteps": 2000,
    "learning_rate": 1e-3,
    "num_envs": 8,
    "num_steps": 32,
    "num_minibatches": 4,
    "update_epochs": 2,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "clip_coef": 0.1,
    "ent_coef": 0.1,
    "vf_coef": 0.1,
    "max_grad_norm": 1.0,
    "channels": (8, 4, 4),
    "pretrained_encoder": "other.pt",
    "num_levels": 7,
    "start_level": 7,
    "distribution_mode": "easy",
    "num_eval_envs": 3,
    "eval_interval": 7,
    "final_eval_episodes": 7,
    "checkpoint_interval": 9,
    "device": "auto",
    "num_env_threads": 1,
    "bf16": False,
    "compile": False,
    "cudagraphs": False,
    "torch_deterministic": True,
    "wandb_project_name": "other",
    "wandb_entity": "other",
    "distill_coef": 2.0,
    "detach_peer": True,
    "num_agents": 3,
}
MUST_STAY = {
    "env_id",
    "exp_name",
    "seed",
    "num_envs",
    "channels",
    "pretrained_encoder",
    "num_levels",
    "start_level",
    "distribution_mode",
    "num_eval_envs",
    "num_agents",
}
ELSEWHERE = ["resume", "freeze_encoder", "track"]  # these have tests of their own


def words_for(name: str) -> list[str]:
    """The flag that gives a setting its other value."""
    value = OTHERS[name]
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    if value is False:
        return [flag.replace("--", "--no-")]
    return flags(**{name: value})


def test_every_setting_stays_or_may_change(straight, tmp_path, capsys):
    """What cannot change is an error that names flag, value and file; all else is taken and printed."""
    script = straight.script
    run_dir = straight.run_dir
    path = run_dir / "checkpoint.pt"
    saved = asdict(script.Args(**SETTINGS))
    before = snapshot(run_dir)
    names = [field.name for field in fields(script.Args) if field.name not in ELSEWHERE]
    for name in names:
        words = words_for(name)
        if name in MUST_STAY:
            assert train(script, tmp_path, "--resume", run_dir, *words) == 2
            out, err = capsys.readouterr()
            value = saved[name] if saved[name] != "" else "empty"
            flag = words[0]
            message = f"{flag} must stay {value}, as in {path}: leave it out"
            assert out == f"run folder: {run_dir}\n"
            assert err == f"{straight.name}.py: error: {message}\n"
        else:
            args = parse(script, tmp_path, "--resume", run_dir, *words)
            assert asdict(args) == saved | {"resume": str(path), name: OTHERS[name]}
            script.check_changes(args, saved, path)
            flag = "--" + name.replace("_", "-")
            assert capsys.readouterr().out == f"changed: {flag} {OTHERS[name]}, was {saved[name]}\n"
    assert snapshot(run_dir) == before


def test_freezing_cannot_begin_later(ppo, tmp_path, capsys):
    content = load(ppo.checkpoints[4])
    content["args"]["pretrained_encoder"] = "other.pt"
    torch.save(content, tmp_path / "checkpoint.pt")
    assert train(ppo.script, tmp_path, "--resume", tmp_path, "--freeze-encoder") == 2
    assert "error: --freeze-encoder must stay False, as in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "learning_rate", "gamma", "num_steps", "ent_coef"])
def test_a_changed_setting_counts(ppo, tmp_path, capsys, name):
    """It is printed, and the run goes on with it; the run before keeps its curves."""
    run_dir = copy_run(ppo, 4, tmp_path, finished=False)
    words = flags(total_timesteps=8 * BATCH_SIZE, eval_interval=0, device="cpu")
    if name != "nothing":
        words += words_for(name)
    assert train(ppo.script, tmp_path, "--resume", run_dir, *words) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("changed: ")]
    assert f"--total-timesteps {8 * BATCH_SIZE}, was {12 * BATCH_SIZE}" in line
    same_weights = same(load(run_dir / "checkpoint.pt")["agents"], load(ppo.checkpoints[8])["agents"])
    assert same_weights == (name == "nothing")
    if name != "nothing":
        flag = "--" + name.replace("_", "-")
        assert f"{flag} {OTHERS[name]}, was {getattr(ppo.script.Args(**SETTINGS), name)}" in line
        assert load_agent(run_dir / "agent.pt")["args"][name] == OTHERS[name]
    curves = read_curves(run_dir)
    steps = list(curves["losses/value_loss"])
    later_rate = 1e-3 if name == "learning_rate" else 5e-4
    expected = [5e-4] * 4 + [later_rate] * (len(steps) - 4)
    assert list(curves["charts/learning_rate"].values()) == pytest.approx(expected)
    length = 2 * BATCH_SIZE if name == "num_steps" else BATCH_SIZE
    assert steps == [32, 64, 96, 128, *range(128 + length, 257, length)]


def test_settings_that_do_not_change_the_numbers(ppo, tmp_path):
    """Threads and the interval of checkpoints have nothing to do with them."""
    run_dir = copy_run(ppo, 4, tmp_path)
    words = [*flags(num_env_threads=1, checkpoint_interval=5, device="cpu"), "--torch-deterministic"]
    assert train(ppo.script, tmp_path, "--resume", run_dir, *words) == 0
    found = set(differences(ppo.name, ppo.run_dir, run_dir))
    assert found == {"agent's args", "final_test.json", "args.json", "checkpoint args"}


def test_less_than_what_is_done_is_an_error(straight, tmp_path, capsys):
    done = SETTINGS["total_timesteps"]
    words = ["--resume", straight.run_dir, "--total-timesteps", done - 1]
    before = snapshot(straight.run_dir)
    assert train(straight.script, tmp_path, *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"error: --total-timesteps must be at least {done}, where" in lines[0]
    assert snapshot(straight.run_dir) == before


def test_a_changed_batch_must_fit(ppo, tmp_path, capsys):
    """The checks of a new run hold for one that goes on."""
    assert train(ppo.script, tmp_path, "--resume", ppo.run_dir, "--num-minibatches", 5) == 2
    assert "--num-minibatches must divide" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("which", ["folder", "file"])
def test_settings_need_not_be_given_again(straight, tmp_path, capsys, which):
    script = straight.script
    path = straight.run_dir / "checkpoint.pt"
    target = path if which == "file" else straight.run_dir
    expected = asdict(script.Args(**SETTINGS)) | {"resume": str(path)}
    assert asdict(parse(script, tmp_path, "--resume", target)) == expected
    again = parse(script, tmp_path, "--resume", target, *flags(**SETTINGS))
    assert asdict(again) == expected
    script.check_changes(again, asdict(script.Args(**SETTINGS)), path)
    assert capsys.readouterr().out == ""


@pytest.fixture
def from_a_gpu(ppo, tmp_path):
    """The folder of a run with --device cuda:1, after 8 iterations."""
    content = load(ppo.checkpoints[8])
    content["args"]["device"] = "cuda:1"
    torch.save(content, tmp_path / "checkpoint.pt")
    return tmp_path


def test_a_run_from_a_gpu_goes_on_without_one(ppo, from_a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse(ppo.script, from_a_gpu, "--resume", from_a_gpu).device == "auto"
    words = flags(total_timesteps=9 * BATCH_SIZE, eval_interval=0)
    assert train(ppo.script, from_a_gpu, "--resume", from_a_gpu, *words) == 0
    assert iteration_of(from_a_gpu) == 9


def test_a_run_from_a_gpu_where_none_can_be_used(ppo, from_a_gpu, monkeypatch, capsys):
    """It goes on with --device cpu alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(ppo.script, from_a_gpu, "--resume", from_a_gpu) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device cuda:1" in line
    assert "cpu would do" in line
    assert parse(ppo.script, from_a_gpu, "--resume", from_a_gpu, "--device", "cpu").device == "cpu"


@both_but_mdpo_slow
def test_tests_do_not_change_training(straight, tmp_path):
    """A run without tests has the same weights and training curves."""
    words = flags(**(SETTINGS | {"eval_interval": 0}))
    assert train(straight.script, tmp_path, *words) == 0
    test_tags = {"charts/test_episodic_return", "charts/generalization_gap"}
    folders = agent_folders(straight.name, straight.run_dir)
    others = agent_folders(straight.name, run_folder(tmp_path))
    for folder, other in zip(folders, others, strict=True):
        assert same(load_agent(folder / "agent.pt")["agent"], load_agent(other / "agent.pt")["agent"])
        points = read_points(folder)
        other_points = read_points(other)
        assert points.keys() - other_points.keys() == test_tags
        assert [tag for tag in other_points if points[tag] != other_points[tag]] == []


# --resume auto


def make_run(run, folder, name: str, age: int, **changes) -> Path:
    """A run folder of that name and age in seconds, with a checkpoint."""
    path = folder / "runs" / name / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    content = load(run.checkpoints[4])
    content["args"] |= changes
    torch.save(content, path)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_auto_takes_the_newest_run_of_the_name(ppo, tmp_path, capsys):
    script = ppo.script
    words = ["--resume", "auto", *flags(**SETTINGS)]
    assert parse(script, tmp_path, *words).resume == ""  # nothing there
    assert "--resume auto: there is no such run yet" in capsys.readouterr().out
    (tmp_path / "runs" / "fruitbot__ppo_procgen__1__1700000005").mkdir(parents=True)
    assert parse(script, tmp_path, *words).resume == ""  # killed before its first checkpoint
    make_run(ppo, tmp_path, "bigfish__ppo_procgen__1__1700000100", 10, env_id="bigfish")
    make_run(ppo, tmp_path, "fruitbot__other__1__1700000101", 10, exp_name="other")
    make_run(ppo, tmp_path, "fruitbot__ppo_procgen__2__1700000102", 10, seed=2)
    assert parse(script, tmp_path, *words).resume == ""
    for number, age in ((1, 300), (3, 100), (2, 200)):
        make_run(ppo, tmp_path, f"fruitbot__ppo_procgen__1__170000000{number}", age)
    found = "runs/fruitbot__ppo_procgen__1__1700000003/checkpoint.pt"
    capsys.readouterr()
    assert parse(script, tmp_path, *words).resume == found
    assert capsys.readouterr().out == ""
    assert parse(script, tmp_path, "--env_id=fruitbot", "--resume=auto").resume == found
    other = parse(script, tmp_path, *words, "--seed", "2").resume
    assert other == "runs/fruitbot__ppo_procgen__2__1700000102/checkpoint.pt"
    assert parse(script, tmp_path, *words, "--seed", "02").resume == other  # as of `seq -w`


@pytest.mark.parametrize("name", ["ppo_procgen__1__other", "ppo_procgen__1__2"])
def test_auto_does_not_take_a_run_whose_name_begins_the_same(ppo, tmp_path, name):
    make_run(ppo, tmp_path, f"fruitbot__{name}__1__1700000009", 10, exp_name=name)
    assert parse(ppo.script, tmp_path, "--resume", "auto", *flags(**SETTINGS)).resume == ""


def test_auto_with_a_contradicting_flag(ppo, tmp_path, capsys):
    make_run(ppo, tmp_path, "fruitbot__ppo_procgen__1__1700000003", 10)
    words = flags(**(SETTINGS | {"num_envs": 8}))
    assert train(ppo.script, tmp_path, "--resume", "auto", *words) == 2
    assert "--num-envs must stay 2" in capsys.readouterr().err


def test_auto_leaves_other_runs_alone(ppo, tmp_path):
    run_dir = copy_run(ppo, 4, tmp_path)
    before = snapshot(run_dir)
    words = flags(**(SETTINGS | {"seed": 2, "total_timesteps": BATCH_SIZE, "eval_interval": 0}))
    assert train(ppo.script, tmp_path, "--resume", "auto", *words) == 0
    assert snapshot(run_dir) == before
    assert len(list((tmp_path / "runs").iterdir())) == 2


# Kills.


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = ["written in part", "written", "before the exchange", "after the exchange"]


def die_in_a_save(moment: str, number: int, part: float):
    """Kills this process in its save of that number, at the moment given."""
    sync = os.fsync
    replace = Path.replace
    saves = []

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

    os.fsync = patched_sync
    Path.replace = patched_replace


def kill_in_a_save(script, folder, words, moment: str, rng) -> Fork:
    number = rng.choice([1, 2])
    part = rng.random()
    return Fork(script, folder, words, lambda: die_in_a_save(moment, number, part))


def kill_at_any_time(script, folder, words, most_looks: int, rng) -> Fork:
    """After so many looks of its networks, which are a clock for which a busy machine does not matter."""
    reading, writing = os.pipe()

    def report():
        forward = script.Agent.forward

        def reporting(*inputs):
            os.write(writing, b".")
            return forward(*inputs)

        script.Agent.forward = reporting

    process = Fork(script, folder, words, report)
    os.close(writing)
    for _ in range(rng.randrange(most_looks)):
        os.read(reading, 1)
    time.sleep(rng.random() * 0.02)
    os.kill(process.id, signal.SIGKILL)
    os.close(reading)
    return process


def kill_again_and_again(straight, folder, kills: int, most_looks: int) -> list[int]:
    """A run that is killed so many times, a third of them in the middle of a save, and ends nevertheless as
    the straight one did. Returns the iteration of the checkpoint after each kill, where there was one."""
    script = straight.script
    rng = random.Random(KILL_SEED)
    words = ["--resume", "auto", *flags(**straight.settings)]
    reached = []
    for number in range(kills):
        if number % 3 == 2:
            moment = MOMENTS[number // 3 % 4]
            process = kill_in_a_save(script, folder, words, moment, rng)
        else:
            process = kill_at_any_time(script, folder, words, most_looks, rng)
        result = process.finish()
        assert result.status == -signal.SIGKILL, result
        assert "Traceback" not in result.err
        checkpoints = list(folder.glob("runs/*/checkpoint.pt"))
        assert len(checkpoints) <= 1
        reached += [iteration_of(path.parent) for path in checkpoints]
    print(f"seed {KILL_SEED}: {kills} kills, checkpoints after them of iterations {reached}")
    assert reached == sorted(reached)
    result = run(script, folder, words)
    assert result.status == 0, result
    assert "Traceback" not in result.err
    assert differences(straight.name, straight.run_dir, run_folder(folder)) == []
    return reached


def test_some_kills(ppo, tmp_path):
    reached = kill_again_and_again(ppo, tmp_path, kills=4, most_looks=200)
    assert len(reached) >= 1
    assert reached[-1] < 12


@pytest.mark.slow
def test_many_kills(long_mdpo, tmp_path):
    reached = kill_again_and_again(long_mdpo, tmp_path, kills=24, most_looks=150)
    assert len(reached) >= 20
    assert len(set(reached)) >= 6
    assert reached[-1] < 30


@pytest.mark.slow
@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[3]])
def test_kill_in_the_last_saves(ppo, tmp_path, moment):
    """Of args.json, agent.pt and final_test.json: each is whole or not there, and the next start makes it."""
    run_dir = copy_run(ppo, 12, tmp_path, finished=False)
    words = ["--resume", run_dir, "--device", "cpu"]
    for number, name in enumerate(["args.json", "agent.pt", "final_test.json"], 1):
        result = run(ppo.script, tmp_path, words, lambda number=number: die_in_a_save(moment, number, 0.5))
        assert result.status == -signal.SIGKILL
        assert (run_dir / name).exists() == (moment == "after the exchange")
        if (run_dir / name).exists():
            assert (run_dir / name).read_bytes() == (ppo.run_dir / name).read_bytes()
    assert run(ppo.script, tmp_path, words).status == 0
    assert differences(ppo.name, ppo.run_dir, run_dir) == []


def wait_for_a_later_checkpoint(process, folder, iteration: int):
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        for path in folder.glob("runs/*/checkpoint.pt"):
            if iteration_of(path.parent) > iteration:
                return
        time.sleep(0.05)


@pytest.mark.slow
def test_from_the_shell(tmp_path):
    """kill -9, then the same command and SIGTERM, then --resume with the folder alone; and once straight."""
    rng = random.Random(KILL_SEED)
    name = "mdpo_procgen"
    settings = LONG | {"eval_interval": 10}
    for folder in ("straight", "stopped"):
        (tmp_path / folder).mkdir()
    result = run_script(name, tmp_path / "straight", *flags(**settings))
    assert result.returncode == 0, result.stderr.decode()

    folder = tmp_path / "stopped"
    reached = [0]
    words = ["--resume", "auto", *flags(**settings)]
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        process = start_script(name, folder, *words)
        try:
            wait_for_a_later_checkpoint(process, folder / "work", reached[-1])
            time.sleep(rng.random() * 0.3)
            process.send_signal(signal_number)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == (-9 if signal_number == signal.SIGKILL else 143), err
        run_dir = run_folder(folder / "work")
        reached.append(iteration_of(run_dir))
        assert reached[-2] < reached[-1] < 30
        assert "Traceback" not in err
    hint = out.splitlines()[-1].split("--resume ")[1]
    process = start_script(name, folder, "--resume", hint, "--device", "cpu")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "arn" not in err
    assert differences(name, run_folder(tmp_path / "straight" / "work"), run_dir) == []
