"""benchmark/backgrounds.py: a game on some of its backgrounds, and else the same."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import tyro
from common import ROOT, TINY, error_message, flags, get_handlers, load, run_folder, same, set_handlers

sys.path.insert(0, str(ROOT / "benchmark"))
import backgrounds
from backgrounds import ALL_LEVELS
from helpers import copy_script

from robustness_eval import Game, find_fields, read_int

GAME = Game("fruitbot", "easy")  # of 9 backgrounds
SETTINGS = TINY | {"num_envs": 2, "eval_interval": 2, "final_eval_episodes": 2, "total_timesteps": 64}
SHORT = "--num-envs 2 --num-steps 8 --num-minibatches 1 --total-timesteps 16 --final-eval-episodes 2"


def make_few(number: int, seed: int):
    """The script with so many backgrounds, and its Args."""
    few = backgrounds.FewBackgroundsScript("ppo_procgen", number)
    return few, few.script.Args(**GAME._asdict(), seed=seed)


def play(envs, num_steps: int):
    """Rewards, ends, pictures and backgrounds of random play. What begins is drawn as a restored state is."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(num_steps):
        reward, obs, first = envs.observe()
        picture = obs["rgb"].copy()
        saves = envs.get_state()
        places = [find_fields(save, GAME)["background"] for save in saves]
        met = list(map(read_int, saves, places))
        steps.append((reward, first, picture, met))
        if first.any():
            envs.set_state(saves)
            assert np.array_equal(envs.observe()[1]["rgb"], picture)
        envs.act(rng.integers(15, size=envs.num).astype(np.int32))
    return [np.array(column) for column in zip(*steps)]


@pytest.mark.parametrize(
    ("seed", "num_levels", "expected"),
    [(0, ALL_LEVELS, {0, 1, 2}), (16, ALL_LEVELS, {7, 8, 0}), (16, 0, {1, 2, 3, 4, 5, 6})],
    ids=str,
)
def test_a_run_sees_its_own_backgrounds_and_its_tests_the_others(seed, num_levels, expected):
    """All else is the same, also in the levels that follow. A level keeps its background."""
    few, args = make_few(3, seed)
    original = few.original["make_envs"](args, 40, 0, 0, 5)
    rewards, ends, pictures, _ = play(original, 80)
    envs = few.script.make_envs(args, 40, num_levels, 0, 5)
    new_rewards, new_ends, new_pictures, met = play(envs, 80)
    assert np.array_equal(new_rewards, rewards)
    assert np.array_equal(new_ends, ends)
    assert not np.array_equal(new_pictures, pictures)
    changed = met[1:] != met[:-1]
    assert not changed[~ends[1:]].any()
    indices, counts = np.unique(met, return_counts=True)
    assert set(indices) == expected
    assert counts.min() > 0.4 * counts.mean()  # a third, or a sixth to a third of the others, but for chance


def test_a_test_draws_its_first_episodes(monkeypatch):
    """Which are all that count. Later ones have any background."""
    few, args = make_few(1, 0)
    made = []

    def evaluate(policies, args, levels):
        made.append(few.script.make_envs(args, 40, levels, 0, 5))
        return np.zeros((len(policies), 1))

    monkeypatch.setitem(few.original, "evaluate", evaluate)
    few.script.evaluate([None], args, ALL_LEVELS)
    _, ends, _, met = play(made[0], 80)
    ended = ends[1:].cumsum(axis=0) > 0
    assert set(met[1:][~ended]) == {0}
    assert len(set(met[1:][ended])) > 1


def test_own_and_others_are_tested_on_the_same_levels_with_the_same_noise():
    """Of agents that do not look all returns are the same."""
    few, args = make_few(2, 0)

    def act_blindly(obs):
        return torch.randint(15, (len(obs),)), None, None

    returns = []
    for num_levels in (ALL_LEVELS, 0):
        torch.manual_seed(0)
        policies = [act_blindly, act_blindly]
        device = torch.device("cpu")
        returns += [*few.script.evaluate(policies, args, 6, (num_levels, 0), 7, device, ())]
    assert np.ptp(returns[0]) > 0
    assert len(returns) == 4
    assert np.ptp(returns, axis=0).max() == 0


def run(folder, monkeypatch, *words, variant="", **settings):
    """As from the shell. Returns its folder and what it has measured."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["backgrounds.py"])
    handlers = get_handlers()
    try:
        args = backgrounds.Args("mdpo_procgen", 2, variant)
        backgrounds.main(args, [*flags(**SETTINGS | settings), *words])
    finally:
        set_handlers(handlers)
    run_dir = run_folder(folder)
    return run_dir, json.loads((run_dir / "backgrounds.json").read_text())


def copy_with_a_signal(name: str):
    """A script that is told to stop in its first iteration."""
    script = copy_script(name)
    rollout = script.rollout

    def rollout_with_a_signal(*inputs):
        rollout(*inputs)
        os.kill(os.getpid(), signal.SIGTERM)

    script.rollout = rollout_with_a_signal
    return script


def test_a_run_its_resumption_and_its_test(tmp_path, monkeypatch):
    straight, measured = run(tmp_path / "straight", monkeypatch, variant="both")
    assert straight.name.startswith("fruitbot__mdpo_procgen+both__1__")
    assert measured["global_step"] == 64
    tests = json.loads((straight / "final_test.json").read_text())
    for agent, test in zip(measured["agents"], tests["agents"], strict=True):
        assert agent == {"own": test["training_levels"], "other": test["full_distribution"]}

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(backgrounds, "copy_script", copy_with_a_signal)
        run(tmp_path / "stopped", monkeypatch)
    stopped = run_folder(tmp_path / "stopped")
    assert stopped.name.startswith("fruitbot__mdpo_procgen+2_backgrounds__1__")
    assert load(stopped / "checkpoint.pt")["global_step"] == 32
    again, measured_again = run(tmp_path / "stopped", monkeypatch, "--resume", "auto")
    weights = [load(each / "agent_2" / "agent.pt")["agent"] for each in (straight, again)]
    assert same(*weights)
    assert measured_again == measured

    _, measured = run(tmp_path / "stopped", monkeypatch, "--resume", "auto", final_eval_episodes=3)
    assert measured["agents"][1]["other"]["episodes"] == 3


def test_from_the_shell(tmp_path):
    """Nothing is trained: what stands before and after -- goes where it belongs."""
    words = f"ppo_procgen --backgrounds 9 -- --env-id fruitbot {SHORT}".split()
    command = [sys.executable, str(ROOT / "benchmark/backgrounds.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = error_message(done.returncode, done.stdout, done.stderr)
    assert message == "backgrounds.py: error: --backgrounds must be below 9, which is all that fruitbot has"


@pytest.mark.parametrize(
    ("number", "words", "message"),
    [
        ("0", "", "--backgrounds must be from 1 to"),
        ("1", "--env-id chaser", "--backgrounds must be below 1, which is all that chaser has"),
        ("1", "--exp-name=mine", "--exp-name and --num-levels are not for the flags after --"),
        ("1", "--num-levels 200", "--exp-name and --num-levels are not for the flags after --"),
        ("1", "--start-level 1", "--start-level must be 0"),
    ],
)
def test_bad_input(number, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        args = tyro.cli(backgrounds.Args, args=["ppo_procgen", "--backgrounds", number])
        backgrounds.main(args, [*words.split(), *SHORT.split()])
    assert message in error_message(stop.value.code, *capsys.readouterr())
    assert list(tmp_path.iterdir()) == []
