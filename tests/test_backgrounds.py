"""benchmark/backgrounds.py: a game on few of its backgrounds, and else the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT, TINY, error_message, flags, run_folder

sys.path.insert(0, str(ROOT / "benchmark"))
import backgrounds

import ppo_procgen
from robustness_eval import Game, find_fields, read_int

GAME = Game("fruitbot", "easy")


def make_procgen(num_levels: int, number: int):
    args = ppo_procgen.Args(env_id=GAME.env_id, distribution_mode=GAME.distribution_mode)
    return backgrounds.make_envs(ppo_procgen.make_envs, number, args, 8, num_levels, 0, 5)


def backgrounds_of(envs) -> set[int]:
    return {read_int(save, find_fields(save, GAME)["background"]) for save in envs.get_state()}


def play(envs, num_steps: int):
    """Rewards, ends and pictures of random play, and the backgrounds that were met."""
    rng = np.random.default_rng(0)
    rewards = []
    ends = []
    pictures = []
    met = set()
    for _ in range(num_steps):
        reward, obs, first = envs.observe()
        rewards.append(reward.copy())
        ends.append(first.copy())
        pictures.append(obs["rgb"].copy())
        met |= backgrounds_of(envs)
        envs.act(rng.integers(15, size=envs.num).astype(np.int32))
    return np.array(rewards), np.array(ends), np.array(pictures), met


def test_only_the_first_backgrounds_are_drawn_and_all_else_is_the_same():
    """In the levels that follow, too."""
    rewards, ends, pictures, met = play(make_procgen(backgrounds.ALL_LEVELS, 2), 150)
    assert met == {0, 1}
    original = ppo_procgen.Args(env_id=GAME.env_id, distribution_mode=GAME.distribution_mode)
    envs = ppo_procgen.make_envs(original, 8, backgrounds.ALL_LEVELS, 0, 5)
    original_rewards, original_ends, original_pictures, all_met = play(envs, 150)
    assert len(all_met) > 4
    assert original_ends.sum() > 8
    assert np.array_equal(rewards, original_rewards)
    assert np.array_equal(ends, original_ends)
    assert not np.array_equal(pictures, original_pictures)


def test_a_new_level_is_drawn_on_its_background_from_its_first_picture_on():
    """As a restored state is drawn."""
    envs = make_procgen(backgrounds.ALL_LEVELS, 1)
    for _ in range(100):
        _, obs, first = envs.observe()
        if first.any():
            shown = obs["rgb"].copy()
            envs.set_state(envs.get_state())
            assert np.array_equal(envs.observe()[1]["rgb"], shown)
        envs.act(np.zeros(8, np.int32))


def test_tests_see_all_backgrounds():
    *_, met = play(make_procgen(0, 1), 100)
    assert len(met) > 2


def test_a_run_and_its_end(tmp_path):
    """Trained, tested, and the same command goes on with it."""
    settings = TINY | {"num_envs": 2, "num_eval_envs": 2, "total_timesteps": 32, "final_eval_episodes": 2}
    command = [sys.executable, str(ROOT / "benchmark/backgrounds.py"), "ppo_procgen", "--backgrounds", "2"]
    command += ["--", *flags(**settings)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    folder = run_folder(tmp_path)
    assert "ppo_procgen+2_backgrounds" in folder.name
    assert json.loads((folder / "args.json").read_text())["num_levels"] == backgrounds.ALL_LEVELS
    assert (folder / "final_test.json").exists()
    again = [*command, "--resume", "auto", "--total-timesteps", "64"]
    done = subprocess.run(again, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    assert "finished after 64 steps" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        ("--backgrounds 9 -- --env-id fruitbot", "--backgrounds must be at most 8 for fruitbot, not 9"),
        ("-- --env-id chaser", "--env-id: chaser has only one background"),
        ("-- --exp_name=mine", "--exp-name is not for the flags of the script"),
        ("-- --num-levels 0", "--num-levels must not be 0 here: leave it out for all levels"),
    ],
)
def test_what_could_not_be_told_from_the_test(words, message, tmp_path):
    command = [sys.executable, str(ROOT / "benchmark/backgrounds.py"), "ppo_procgen", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert message in error_message(done.returncode, done.stdout, done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        ("dqn", "SCRIPT must be one of ppo_procgen, spo_procgen, mdpo_procgen, mdspo_procgen, not dqn"),
        ("ppo_procgen --backgrounds 0", "--backgrounds must be from 1 to"),
    ],
)
def test_bad_flags(words, message, capsys):
    from helpers import parse_args

    with pytest.raises(SystemExit) as error:
        parse_args(backgrounds.Args, "", words.split())
    captured = capsys.readouterr()
    assert message in error_message(error.value.code, captured.out, captured.err)
