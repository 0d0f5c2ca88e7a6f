"""benchmark/backgrounds.py: a game on some of its backgrounds, and else the same."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import (
    ROOT,
    TINY,
    error_message,
    flags,
    get_handlers,
    load_agent,
    run_folder,
    same,
    set_handlers,
    step_of,
)

sys.path.insert(0, str(ROOT / "benchmark"))
import backgrounds
from helpers import copy_script

import ppo_procgen
from robustness_eval import Game, find_fields, read_int

GAME = Game("fruitbot", "easy")  # of 9 backgrounds
CPU = torch.device("cpu")


def make_few(number: int, seed: int):
    """The script with so many backgrounds, and its Args."""
    few = backgrounds.FewBackgroundsScript("ppo_procgen", number)
    return few, few.script.Args(env_id=GAME.env_id, distribution_mode=GAME.distribution_mode, seed=seed)


def make_envs(number: int, seed: int, num_levels: int = backgrounds.ALL_LEVELS, num: int = 8):
    few, args = make_few(number, seed)
    return few.script.make_envs(args, num, num_levels, 0, 5)


def backgrounds_of(envs) -> list[int]:
    return [read_int(save, find_fields(save, GAME)["background"]) for save in envs.get_state()]


def play(envs, num_steps: int):
    """Rewards, ends, pictures and backgrounds of random play."""
    rng = np.random.default_rng(0)
    columns = [], [], [], []
    for _ in range(num_steps):
        reward, obs, first = envs.observe()
        row = reward, first, obs["rgb"], backgrounds_of(envs)
        for column, values in zip(columns, row):
            column.append(np.array(values))
        envs.act(rng.integers(15, size=envs.num).astype(np.int32))
    return [np.array(column) for column in columns]


@pytest.mark.parametrize(("seed", "own"), [(0, {0, 1, 2}), (4, {4, 5, 6}), (16, {7, 8, 0})])
def test_a_run_sees_its_own_backgrounds_and_its_tests_the_others(seed, own):
    *_, met = play(make_envs(3, seed), 150)
    assert set(met.flat) == own
    *_, met = play(make_envs(3, seed, num=200), 1)
    assert min((met == each).mean() for each in own) > 0.2  # a third of the levels each, but for chance
    *_, met = play(make_envs(3, seed, num_levels=0, num=40), 60)
    assert set(met.flat) == set(range(9)) - own


def test_all_else_is_the_same():
    """In the levels that follow, too. A level keeps its background."""
    args = ppo_procgen.Args(env_id=GAME.env_id, distribution_mode=GAME.distribution_mode)
    original = play(ppo_procgen.make_envs(args, 8, 0, 0, 5), 150)
    assert original[1].sum() > 12
    for num_levels in (backgrounds.ALL_LEVELS, 0):
        rewards, ends, pictures, met = play(make_envs(4, 3, num_levels), 150)
        assert np.array_equal(rewards, original[0])
        assert np.array_equal(ends, original[1])
        assert not np.array_equal(pictures, original[2])
        assert np.array_equal(met[1:][~ends[1:]], met[:-1][~ends[1:]])


def test_a_new_level_is_drawn_on_its_background_from_its_first_picture_on():
    """As a restored state is drawn."""
    envs = make_envs(1, 0)
    ended = 0
    for _ in range(100):
        _, obs, first = envs.observe()
        if first.any():
            shown = obs["rgb"].copy()
            envs.set_state(envs.get_state())
            assert np.array_equal(envs.observe()[1]["rgb"], shown)
            ended += 1
        envs.act(np.zeros(8, np.int32))
    assert ended > 2


def test_own_and_others_are_tested_on_the_same_levels_with_the_same_noise():
    """Of agents that do not look all returns are the same."""
    few, args = make_few(2, 0)

    def act_blindly(obs):
        return torch.randint(15, (len(obs),)), None, None

    torch.manual_seed(0)
    policies = [act_blindly, act_blindly]
    own = few.script.evaluate(policies, args, 6, (backgrounds.ALL_LEVELS, 0), 7, CPU, ())
    torch.manual_seed(0)
    other = few.script.evaluate(policies, args, 6, (0, 0), 7, CPU, ())
    assert own.shape == (2, 6)
    assert np.ptp(own[0]) > 0
    assert np.array_equal(own[0], own[1])
    assert np.array_equal(own, other)


def run(folder, monkeypatch, number: int, *words, **settings):
    """As from the shell."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["backgrounds.py"])
    handlers = get_handlers()
    try:
        words = [*flags(**SETTINGS | settings), *words]
        backgrounds.main(backgrounds.Args("mdpo_procgen", number), words)
        assert signal.getsignal(signal.SIGINT) != handlers[signal.SIGINT]
    finally:
        set_handlers(handlers)
    return run_folder(folder)


SETTINGS = TINY | {"num_envs": 2, "eval_interval": 1, "final_eval_episodes": 2, "total_timesteps": 64}


def copy_with_a_signal(name: str):
    """A script that is told to stop in its first iteration."""
    script = copy_script(name)
    rollout = script.rollout

    def rollout_with_a_signal(*inputs):
        script.rollout = rollout
        rollout(*inputs)
        os.kill(os.getpid(), signal.SIGTERM)

    script.rollout = rollout_with_a_signal
    return script


def test_a_run_its_resumption_and_its_test(tmp_path, monkeypatch):
    straight = run(tmp_path / "straight", monkeypatch, 2)
    assert straight.name.startswith("fruitbot__mdpo_procgen+2_backgrounds__1__")
    assert json.loads((straight / "args.json").read_text())["num_levels"] == backgrounds.ALL_LEVELS
    tests = json.loads((straight / "final_test.json").read_text())
    measured = json.loads((straight / "backgrounds.json").read_text())
    assert measured["global_step"] == 64
    for agent, test in zip(measured["agents"], tests["agents"], strict=True):
        assert agent == {"own": test["training_levels"], "other": test["full_distribution"]}
        assert agent["own"]["episodes"] == 2

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(backgrounds, "copy_script", copy_with_a_signal)
        run(tmp_path / "stopped", monkeypatch, 2)
    assert step_of(run_folder(tmp_path / "stopped")) == 32
    again = run(tmp_path / "stopped", monkeypatch, 2, "--resume", "auto")
    agents = [load_agent(each / "agent_2" / "agent.pt") for each in (straight, again)]
    assert same(agents[0]["agent"], agents[1]["agent"])
    assert json.loads((again / "backgrounds.json").read_text()) == measured

    run(tmp_path / "stopped", monkeypatch, 2, "--resume", "auto", final_eval_episodes=3)
    measured = json.loads((again / "backgrounds.json").read_text())
    assert measured["agents"][1]["other"]["episodes"] == 3


def test_from_the_shell(tmp_path):
    """Nothing is trained: what stands before and after -- goes where it belongs."""
    command = [sys.executable, str(ROOT / "benchmark/backgrounds.py")]
    words = "ppo_procgen --backgrounds 9 -- --env-id fruitbot"
    done = subprocess.run([*command, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    message = "backgrounds.py: error: --backgrounds must be below 9, which is all that fruitbot has"
    assert error_message(done.returncode, done.stdout, done.stderr) == message


@pytest.mark.parametrize(
    ("number", "words", "message"),
    [
        (1, "--env-id chaser", "--backgrounds must be below 1, which is all that chaser has"),
        (1, "--exp-name=mine", "--exp-name and --num-levels are not for the flags after --"),
        (1, "--num-levels 200", "--exp-name and --num-levels are not for the flags after --"),
        (1, "--start-level 1", "--start-level must be 0"),
        (1, "--no-such-flag", "--no-such-flag"),
    ],
)
def test_what_the_script_must_not_be_told(number, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["backgrounds.py"])
    with pytest.raises(SystemExit) as stop:
        backgrounds.main(backgrounds.Args("ppo_procgen", number), words.split())
    captured = capsys.readouterr()
    assert message in error_message(stop.value.code, captured.out, captured.err)
    assert list(tmp_path.iterdir()) == []


def test_bad_number():
    with pytest.raises(ValueError, match="--backgrounds must be from 1 to"):
        backgrounds.Args("ppo_procgen", 0)
