"""robustness_eval.py: known numbers, Procgen's saved states, pictures, whole runs, faults of users."""

import csv
import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from common import Probe, error_message, flags, read_events, run_script, save_agent, shell
from matplotlib.backends.backend_agg import FigureCanvasAgg
from procgen import ProcgenGym3Env

import robustness_eval as robust
from robustness_eval import BACKGROUNDS, Args, Checkpoint, Game, PixelPerturbation, Setup, States

CPU = torch.device("cpu")
GAME = Game("starpilot", "easy")
TINY_ARGS = {"num_states": 6, "num_copies": 3, "num_episodes": 3, "device": "cpu", "num_env_threads": 2}
STARPILOT = {"env_id": "starpilot", "distribution_mode": "easy"}  # settings of a saved agent

# Games with few backgrounds, many, and one alone; the others are tried among the slow tests.
FEW_GAMES = ["chaser", "coinrun", "starpilot"]
GAMES = [
    pytest.param(env_id, marks=[] if env_id in FEW_GAMES else pytest.mark.slow)
    for env_id in sorted(BACKGROUNDS)
]


def make_args(**settings) -> Args:
    return Args(**{"checkpoints": ("-",), **TINY_ARGS, **settings})


def make_setup(game: Game = GAME, **settings) -> Setup:
    return Setup(game, make_args(**settings), CPU)


def make_agent(seed: int = 0, channels=(4, 4, 4)):
    """A small agent whose policy differs between observations, as a trained one's does."""
    torch.manual_seed(seed)
    agent = robust.Agent(channels=channels)
    agent.actor.weight.data *= 300
    return agent


def checkpoints(*agents, labels=None):
    labels = labels or "ABCDEF"[: len(agents)]
    made = []
    for i, (label, agent) in enumerate(zip(labels, agents)):
        made.append(Checkpoint(f"{i}.pt", label, GAME, agent, {}))
    return made


def random_states(num: int = 4) -> States:
    torch.manual_seed(5)
    return States(torch.randint(256, (num, 64, 64, 3), dtype=torch.uint8), [b""] * num)


def scores(*inputs) -> list[dict]:
    return list(robust.score(*inputs))


def all_copies(name: str, setup: Setup, states: States, copies: int):
    return torch.cat(list(robust.perturbed_copies(name, setup, states, copies)))


@pytest.fixture(scope="module")
def states():
    return robust.gather_states(make_setup(), [Always(2), Always(7)])


class Constant(torch.nn.Module):
    """Ignores its input and prefers action 7 a little. Keeps what it has seen, if told."""

    def __init__(self, keep: bool = False):
        super().__init__()
        self.keep = keep
        self.num_seen = 0
        self.seen = []

    def encoder(self, images):
        self.num_seen += len(images)
        return torch.zeros(len(images), 2)

    def actor(self, encodings):
        logits = torch.linspace(0, 1, 15).repeat(len(encodings), 1)
        logits[:, 7] += 1
        return logits

    def forward(self, obs):
        if self.keep:
            self.seen.append(obs.clone())
        return self.actor(self.encoder(obs)), torch.zeros(len(obs))


class Always(torch.nn.Module):
    """Plays one action."""

    def __init__(self, action: int):
        super().__init__()
        self.logits = torch.zeros(15)
        self.logits[action] = 1000

    def forward(self, obs):
        return self.logits.repeat(len(obs), 1), torch.zeros(len(obs))


class Brightness(torch.nn.Module):
    """The mean of the picture, in [0, 1], is the logit of action 0; all others are 0."""

    def encoder(self, images):
        return images.double().mean((1, 2, 3))[:, None]

    def actor(self, encodings):
        return torch.nn.functional.pad(encodings, (0, 14))


def kernel(scale: float):
    """The identity kernel, times a scale."""
    weights = torch.zeros(3, 3, 3, 3)
    weights[range(3), range(3), 1, 1] = scale
    return weights


def fix_kernel(monkeypatch, scale: float):
    """Every copy is under this kernel. Returns the list of the numbers of kernels that are drawn."""
    draws = []

    def draw(rng, num):
        draws.append(num)
        return kernel(scale).expand(num, -1, -1, -1, -1)

    fixed = PixelPerturbation(draw, robust.random_conv)
    monkeypatch.setitem(robust.PIXELS, "random-conv", fixed)
    return draws


# Divergences and statistics


def test_divergences_by_hand():
    clean = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).double()
    perturbed = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double()
    kl, tv, changes, entropy = robust.divergences(clean.log(), perturbed.log()).numpy()
    one_way = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    other_way = math.log(0.5 / (0.9 * 0.1) ** 0.5)
    assert one_way != pytest.approx(other_way, rel=0.1)
    assert kl == pytest.approx([one_way, other_way], rel=1e-6)
    assert tv == pytest.approx([0.4, 0.4])
    assert entropy == pytest.approx([-0.9 * math.log(0.9) - 0.1 * math.log(0.1), math.log(2)])
    assert changes.tolist() == [0, 0]
    same_first = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[5.0, 1.0, 3.0]])
    assert robust.divergences(*same_first)[2].tolist() == [0]
    assert robust.divergences(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))[2].tolist() == [1]


def test_summary_by_hand():
    """Two agents, two states, two copies; the states' means are 2 and 5, the agents' 2 and 5."""
    values = np.array([[[0.0, 1.0], [2.0, 5.0]], [[2.0, 5.0], [6.0, 7.0]]])
    summary = robust.summarize(values)
    assert summary["mean"] == 3.5
    assert summary["std"] == pytest.approx(math.sqrt(np.mean((values - 3.5) ** 2)))
    assert summary["standard_error"] == pytest.approx(3 / 2**0.5 / 2**0.5)
    assert summary["spread"] == pytest.approx(3 / 2**0.5)
    assert robust.summarize(values[:1])["spread"] is None


def test_each_measure_has_its_name(states):
    """Two policies of two actions, one copy."""
    clean = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    perturbed = torch.tensor([[0.1, 0.9], [0.1, 0.9]]).log()
    of_policies = robust.divergences(clean, perturbed).numpy()
    values = np.concatenate([of_policies, [[0.25, 0.75]]])[None, :, :, None]
    row = robust.summarize_measures(values)
    assert (row["agents"], row["states"], row["copies"]) == (1, 2, 1)
    assert row["kl_mean"] == pytest.approx(0.8 * math.log(9), rel=1e-5)
    assert row["tv_mean"] == pytest.approx(0.8, rel=1e-5)
    assert row["action_changes_mean"] == 1
    assert row["entropy_mean"] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-5)
    assert row["encoding_shift_mean"] == 0.5


def test_share_of_the_return_by_hand():
    clean = np.array([[1.0, 3.0, 2.0]])
    perturbed = np.array([[1.0, 1.0, 1.0]])
    kept = robust.return_kept(clean, perturbed)
    assert kept["return_kept_mean"] == 0.5
    assert (kept["return_clean"], kept["return_perturbed"]) == (2, 1)
    residuals = np.array([0.5, -0.5, 0.0])
    assert kept["return_kept_standard_error"] == pytest.approx(residuals.std(ddof=1) / 3**0.5 / 2)
    assert robust.return_kept(clean, clean)["return_kept_standard_error"] == 0
    assert robust.return_kept(-clean, perturbed)["return_kept_mean"] is None


def test_agents_on_one_level_are_one_sample():
    """Two agents that play alike know no more than one."""
    clean = np.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    perturbed = np.array([[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]])
    one = robust.return_kept(clean[:1], perturbed[:1])
    assert robust.return_kept(clean, perturbed) == pytest.approx(one)
    # Agents whose residuals cancel level by level leave no error.
    opposite = np.array([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    mixed = np.array([[1.0, 0.5, 1.5], [1.0, 1.5, 0.5]])
    assert robust.return_kept(opposite, mixed)["return_kept_standard_error"] == 0


# Perturbations of the pixels


def test_random_conv_is_each_image_under_its_own_kernel():
    obs = random_states(5).obs
    kernels = robust.draw_kernels(np.random.default_rng(0), 5)
    out = robust.random_conv(obs, kernels)
    assert out.shape == obs.shape
    assert kernels.shape == (5, 3, 3, 3, 3)
    for image, weights, result in zip(obs, kernels, out):
        image = image.permute(2, 0, 1)[None] / 255
        alone = torch.nn.functional.conv2d(image, weights, padding=1).clamp(0, 1)[0].permute(1, 2, 0)
        torch.testing.assert_close(result / 255, alone, rtol=1e-4, atol=1e-5)


def test_kernels_are_standard_gaussian():
    draws = robust.draw_kernels(np.random.default_rng(0), 4000)
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01
    assert abs((draws**4).mean() - 3) < 0.1


def test_identity_kernel_changes_nothing():
    obs = random_states().obs
    out = robust.random_conv(obs, kernel(1).expand(4, -1, -1, -1, -1))
    torch.testing.assert_close(out, obs.float(), rtol=0, atol=1e-3)


def test_neutral_jitter_changes_nothing():
    """Of a policy as much as float32 tells apart."""
    obs = random_states().obs
    out = robust.color_jitter(obs, torch.tensor([1.0, 1, 1, 0]).expand(4, 4))
    torch.testing.assert_close(out, obs.float(), rtol=0, atol=1e-3)
    agent = make_agent()
    kl, tv, changes, _ = robust.divergences(
        robust.policy_logits(agent, obs), robust.policy_logits(agent, out)
    )
    assert kl.abs().max() < 1e-6
    assert tv.max() < 1e-4
    assert changes.sum() == 0


def test_jitter_by_hand():
    """Of a single colour: half as bright; no contrast and no saturation leave the grey; a third of a turn
    takes red to green."""
    obs = torch.tensor([200, 100, 60], dtype=torch.uint8).expand(1, 64, 64, 3)
    gray = 0.299 * 200 + 0.587 * 100 + 0.114 * 60
    for jitter, expected in {
        (0.5, 1, 1, 0): [100, 50, 30],
        (1, 0, 1, 0): [gray] * 3,
        (1, 1, 0, 0): [gray] * 3,
        (1, 1, 1, 1 / 3): [60, 200, 100],
        (1, 1, 1, -1 / 3): [100, 60, 200],
        (2, 1, 1, 0): [255, 200, 120],
    }.items():
        out = robust.color_jitter(obs, torch.tensor([jitter], dtype=torch.float32))
        assert out.shape == (1, 64, 64, 3)
        assert out[0, 9, 9].tolist() == pytest.approx(expected, abs=1e-2)


def jitter_of_two_colors(colors: np.ndarray, brightness, contrast, saturation, thirds: int) -> np.ndarray:
    """Of a picture that is half the one and half the other, (2, 3) in [0, 1]; the hue turns by thirds."""
    luma = np.array([0.299, 0.587, 0.114])
    colors = np.clip(colors * brightness, 0, 1)
    mean_gray = (colors @ luma).mean()
    colors = np.clip(mean_gray + contrast * (colors - mean_gray), 0, 1)
    gray = (colors @ luma)[:, None]
    colors = np.clip(gray + saturation * (colors - gray), 0, 1)
    return np.roll(colors, thirds, axis=1)


@pytest.mark.parametrize(
    "factors",
    [
        (1, 0.5, 1, 0),
        (1, 0, 1, 0),
        (1, 1, 0.5, 0),
        (1, 1, 0, 0),
        (1.4, 0.6, 1, 0),
        (0.7, 1.4, 0.6, 1),
        (1.4, 1.4, 1.4, 2),
        (0.6, 1.4, 1.4, 1),
    ],
    ids=str,
)
def test_jitter_of_two_colors(factors):
    """Contrast is about the grey of the whole picture, saturation about that of each pixel; every step sees
    what the one before it has clamped."""
    brightness, contrast, saturation, thirds = factors
    colors = np.array([[250, 120, 30], [20, 10, 70]])
    obs = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    obs[0, :, :32] = torch.tensor(colors[0])
    obs[0, :, 32:] = torch.tensor(colors[1])
    obs[1] = 128  # a second picture, whose grey is another
    jitter = torch.tensor([brightness, contrast, saturation, thirds / 3]).expand(2, 4)
    out = robust.color_jitter(obs, jitter)
    expected = 255 * jitter_of_two_colors(colors / 255, brightness, contrast, saturation, thirds)
    assert out[0, 5, 5].numpy() == pytest.approx(expected[0], abs=1e-2)
    assert out[0, 60, 60].numpy() == pytest.approx(expected[1], abs=1e-2)


def test_the_hue_turns_what_saturation_has_clamped():
    """As two pictures, one after the other, but for rounding."""
    obs = torch.tensor([255, 40, 0], dtype=torch.uint8).expand(1, 64, 64, 3)
    saturated = robust.color_jitter(obs, torch.tensor([[1, 1, 1.4, 0]])).round().byte()
    two_steps = robust.color_jitter(saturated, torch.tensor([[1, 1, 1, 0.2]]))
    one_step = robust.color_jitter(obs, torch.tensor([[1, 1, 1.4, 0.2]]))
    torch.testing.assert_close(one_step, two_steps, rtol=0, atol=1.5)


def test_jitter_is_drawn_over_its_ranges():
    draws = robust.draw_jitter(np.random.default_rng(0), 4000)
    for column, low, high in zip(draws.T, (0.6, 0.6, 0.6, -0.5), (1.4, 1.4, 1.4, 0.5)):
        assert low <= column.min() < low + 0.01
        assert high - 0.01 < column.max() <= high
        assert column.mean() == pytest.approx((low + high) / 2, abs=0.03)
    assert np.corrcoef(draws.T.numpy())[~np.eye(4, dtype=bool)].max() < 0.1


@pytest.mark.parametrize("name", robust.PIXELS)
def test_chunks_do_not_change_the_draws(name):
    """In float32, 255 being the largest value."""
    small = make_setup(chunk_size=5)
    copies = all_copies(name, small, random_states(), 3)
    torch.testing.assert_close(copies, all_copies(name, make_setup(), random_states(), 3), rtol=0, atol=1e-2)
    assert len(copies) == 12
    assert len({image.numpy().tobytes() for image in copies}) == 12
    sizes = [len(chunk) for chunk in robust.perturbed_copies(name, small, random_states(), 3)]
    assert sum(sizes) == 12
    assert max(sizes) <= 5


# Procgen's saved state


def play(envs, steps: int):
    """Rewards, ends and pictures from now on, under the same random actions for all."""
    rng = np.random.default_rng(1)
    trace = []
    for _ in range(steps):
        reward, obs, first = envs.observe()
        trace.append((reward.copy(), first.copy(), obs["rgb"].copy()))
        envs.act(rng.integers(15, size=envs.num))
    return [np.array(column) for column in zip(*trace)]


@pytest.mark.parametrize("env_id", GAMES)
def test_only_pixels_change(env_id):
    """After a re-rendering the same actions lead to the same rewards and ends, also in the levels that
    follow; a state put back as it was is drawn as it was."""
    game = Game(env_id, "easy")
    envs = ProcgenGym3Env(8, env_id, distribution_mode="easy", rand_seed=3, num_threads=2)
    for _ in range(20):
        envs.act(np.full(8, 7))
        envs.observe()
    saves = envs.get_state()
    rewards, ends, pictures = play(envs, 150)
    envs.set_state(saves)
    assert np.array_equal(envs.observe()[1]["rgb"], pictures[0])
    for name in ("background", "no-background", "monochrome"):
        if not robust.count_copies(name, game, 9):
            assert (env_id, name) == ("chaser", "background")
            continue
        rewritten = [robust.rewrite(save, game, name, 1) for save in saves]
        assert [len(one) for one in rewritten] == [len(one) for one in saves]
        envs.set_state(rewritten)
        new_rewards, new_ends, new_pictures = play(envs, 150)
        assert np.array_equal(new_rewards, rewards)
        assert np.array_equal(new_ends, ends)
        assert (new_pictures[0] != pictures[0]).any((1, 2, 3)).sum() >= 4
    envs.close()


@pytest.mark.parametrize("env_id", sorted(BACKGROUNDS))
def test_every_background_can_be_drawn(env_id):
    """And none that Procgen itself draws from is beyond the table: that would be found as another layout."""
    game = Game(env_id, "hard")
    most = BACKGROUNDS[env_id]
    envs = ProcgenGym3Env(6 * most, env_id, distribution_mode="hard", rand_seed=4, num_threads=2)
    saves = envs.get_state()
    rewritten = [robust.rewrite(save, game, "background", 0) for save in saves]
    assert rewritten == saves
    envs.close()
    envs = ProcgenGym3Env(1, env_id, distribution_mode="hard", rand_seed=4, num_threads=0)
    for shift in range(most):
        envs.set_state([robust.rewrite(saves[0], game, "background", shift)])
        envs.observe()
    envs.close()


@pytest.mark.parametrize(("env_id", "others"), [("starpilot", 12), ("plunder", 3), ("chaser", 1)])
def test_shifts_of_a_state_are_all_different(env_id, others):
    shifts = robust.draw_shifts(np.random.default_rng(0), Game(env_id, "hard"), 400, 99)
    assert shifts.shape == (400, others)
    assert np.array_equal(np.sort(shifts, axis=1), np.tile(np.arange(1, others + 1), (400, 1)))
    if others > 1:
        assert not (shifts == shifts[0]).all()  # each state has an order of its own


def test_number_of_copies():
    chaser = Game("chaser", "hard")
    assert robust.count_copies("background", GAME, 5) == 5
    assert robust.count_copies("background", GAME, 50) == 12
    assert robust.count_copies("background", chaser, 5) == 0
    assert robust.count_copies("no-background", chaser, 5) == 1
    assert robust.count_copies("monochrome", GAME, 5) == 1
    assert robust.count_copies("random-conv", GAME, 50) == 50


def test_a_save_of_another_layout_is_refused(states):
    without = robust.rewrite(states.saves[0], GAME, "no-background", 0)
    shifted = states.saves[0][4:] + b"\0" * 4
    with pytest.raises(ValueError, match="laid out"):
        robust.rewrite(without, GAME, "background", 1)
    with pytest.raises(Exception, match=r"laid out|buffer"):
        robust.rewrite(shifted, GAME, "background", 1)


def test_chunks_do_not_change_the_renderings(states):
    copies = all_copies("background", make_setup(chunk_size=5), states, 12)
    assert torch.equal(copies, all_copies("background", make_setup(), states, 12))
    assert copies.shape == (72, 64, 64, 3)
    for obs, of_state in zip(states.obs, copies.view(6, 12, 64, 64, 3)):
        different = {image.numpy().tobytes() for image in (obs, *of_state)}
        assert len(different) == 13  # each of the 13 backgrounds once


# States


def test_environments_are_those_of_the_full_distribution():
    """Not of the 500 training levels, and of the distribution mode: mazes are smaller where it is easy."""
    setup = make_setup(Game("maze", "easy"))
    made = robust.make_test_envs(setup, 16, np.random.default_rng(0))
    seed = int(np.random.default_rng(0).integers(2**31))
    options = {"num_levels": 0, "start_level": 0, "distribution_mode": "easy"}
    expected = ProcgenGym3Env(16, "maze", rand_seed=seed, num_threads=0, **options)
    assert np.array_equal(made.observe()[1]["rgb"], expected.observe()[1]["rgb"])
    assert max(info["level_seed"] for info in made.get_info()) >= 500
    made.close()
    expected.close()


def test_all_is_played_on_the_full_distribution(monkeypatch):
    """States and returns alike: hardly a level is below 500."""
    levels = []

    class Watched(ProcgenGym3Env):
        def act(self, actions):
            levels.append([info["level_seed"] for info in self.get_info()])
            super().act(actions)

    monkeypatch.setattr(robust, "ProcgenGym3Env", Watched)
    robust.gather_states(make_setup(), [Constant()])
    after_gathering = len(levels)
    robust.play_returns("clean", make_setup(), [Constant()])
    assert 0 < after_gathering < len(levels)
    for met in levels:
        assert min(met) >= 500


def test_gathered_states_are_as_seen_and_as_many_from_each(states):
    """Three from each of two agents, each from a level of its own; another seed gives others."""
    assert states.obs.shape == (6, 64, 64, 3)
    assert states.obs.dtype == torch.uint8
    assert len(states.saves) == 6
    envs = robust.make_test_envs(make_setup(), 6, np.random.default_rng(0))
    envs.set_state(states.saves)
    assert np.array_equal(envs.observe()[1]["rgb"], states.obs.numpy())
    assert len({info["level_seed"] for info in envs.get_info()}) == 6
    envs.close()
    alone = robust.gather_states(make_setup(num_states=3), [Always(2)])
    assert torch.equal(alone.obs, states.obs[:3])
    other = robust.gather_states(make_setup(num_states=3, seed=2), [Always(2)])
    assert not torch.equal(other.obs, alone.obs)


def test_each_agent_meets_states_by_its_own_play():
    """In its own environments."""
    alike = robust.gather_states(make_setup(num_states=4), [Always(2), Always(2)])
    different = robust.gather_states(make_setup(num_states=4), [Always(2), Always(7)])
    assert torch.equal(alike.obs[:2], different.obs[:2])
    assert not torch.equal(alike.obs[2:], different.obs[2:])
    assert not torch.equal(alike.obs[:2], alike.obs[2:])


class Clock:
    """Its picture and its saved state say which environment and which step it is. Keeps the actions."""

    def __init__(self, num: int):
        self.num = num
        self.step = 0
        self.actions = []

    def act(self, actions):
        self.actions.append(actions.copy())
        self.step += 1

    def observe(self):
        obs = np.zeros((self.num, 64, 64, 3), np.uint8)
        obs[:, 0, 0, 0] = np.arange(self.num)
        obs[:, 0, 0, 1] = self.step % 256
        obs[:, 0, 0, 2] = self.step // 256
        return np.zeros(self.num), {"rgb": obs}, np.zeros(self.num, bool)

    def get_state(self):
        return [bytes([i, self.step % 256, self.step // 256]) for i in range(self.num)]

    def close(self):
        pass


def test_states_are_met_at_any_of_512_steps(monkeypatch):
    """Each at a step of its own in its environment, and played by samples of the policy."""
    made = []

    def make(setup, num, rng):
        made.append(Clock(num))
        return made[-1]

    monkeypatch.setattr(robust, "make_test_envs", make)
    gathered = robust.gather_states(make_setup(num_states=150), [Constant()])
    found = gathered.obs[:, 0, 0].numpy()
    assert [bytes(each.tolist()) for each in found] == gathered.saves
    assert len(set(gathered.saves)) == 150
    steps = found[:, 1] + 256 * found[:, 2].astype(int)
    assert np.all(np.diff(steps) >= 0)
    assert steps.min() < 30
    assert 480 < steps.max() < 512
    assert abs(np.median(steps) - 256) < 60
    (envs,) = made
    assert envs.num == 64
    counts = np.bincount(found[:, 0], minlength=64)
    assert set(counts) == {2, 3}
    assert len(envs.actions) == steps.max()  # no step after the last state
    assert len(set(np.array(envs.actions)[:100].flat)) == 15


@pytest.mark.parametrize("num_states", [64, 65, 150])
def test_number_of_states(num_states, monkeypatch):
    monkeypatch.setattr(robust, "make_test_envs", lambda setup, num, rng: Clock(num))
    gathered = robust.gather_states(make_setup(num_states=num_states), [Constant()] * 3)
    assert len(gathered.obs) == len(gathered.saves) == 3 * math.ceil(num_states / 3)


# Scores


def test_actions_are_samples_of_the_policy():
    class Three(torch.nn.Module):
        def forward(self, obs):
            logits = torch.tensor([0.6, 0.3, 0.1]).log().repeat(len(obs), 1)
            return logits, torch.zeros(len(obs))

    noise = np.random.default_rng(0).gumbel(size=(4000, 3))
    actions = robust.sample_actions(Three(), torch.zeros(4000, 1), noise)
    assert actions.dtype == np.int32
    assert np.bincount(actions) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_a_policy_that_ignores_its_input_scores_zero(states):
    rows = scores(make_setup(), checkpoints(Constant()), states)
    assert {row["perturbation"] for row in rows} == set(robust.PERTURBATIONS)
    for row in rows:
        for measure in robust.MEASURES:
            for key in ("mean", "std", "standard_error"):
                assert abs(row[f"{measure}_{key}"]) < 1e-12
        assert row["return_clean"] == row["return_perturbed"] > 0
        assert (row["return_kept_mean"], row["return_kept_standard_error"]) == (1, 0)


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_a_policy_that_reads_only_the_brightness_scores_what_a_hand_computes(chunk_size, monkeypatch):
    """Under half the identity kernel the logit of action 0 halves, and so does the encoding, which is the
    same number. Also where a chunk ends amid a state's copies."""
    fix_kernel(monkeypatch, 0.5)
    states = random_states()
    states.obs[:] //= torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None]  # none as bright as another
    values = robust.compare("random-conv", make_setup(chunk_size=chunk_size), [Brightness()], states)
    assert values.shape == (1, 5, 4, 3)
    brightness = states.obs.double().mean((1, 2, 3)).numpy() / 255
    squares = [(one - other) ** 2 for one, other in itertools.combinations(brightness, 2)]
    distance = math.sqrt(np.mean(squares))
    for clean, kl, tv, changes, _, shift in zip(brightness, *values[0]):
        p = math.exp(clean) / (math.exp(clean) + 14)
        q = math.exp(clean / 2) / (math.exp(clean / 2) + 14)
        expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert kl == pytest.approx([expected] * 3, rel=1e-4)
        assert tv == pytest.approx([p - q] * 3, rel=1e-4)
        assert changes.tolist() == [0, 0, 0]
        assert shift == pytest.approx([clean / 2 / distance] * 3, rel=1e-4)


def test_identity_kernel_scores_zero(monkeypatch):
    """The clean policy is computed in other batches, so float32 tells them apart."""
    fix_kernel(monkeypatch, 1)
    values = robust.compare("random-conv", make_setup(), [make_agent()], random_states())
    kl, tv, changes, _, shift = values[0]
    assert np.abs(kl).max() < 1e-6
    assert tv.max() < 1e-4
    assert shift.max() < 1e-3
    assert changes.sum() == 0


def test_identical_checkpoints_score_identically(states):
    """And others do not; the label's row is over its checkpoints."""
    many = checkpoints(make_agent(1), make_agent(1), make_agent(2), labels="ABB")
    setup = make_setup(tests=("random-conv", "return"), num_episodes=2)
    rows = scores(setup, many, states)
    numbers = {}
    for row in rows:
        label = row.pop("label")
        checkpoint = row.pop("checkpoint")
        numbers.setdefault((label, checkpoint), []).append(row)
    assert numbers["A", "0.pt"] == numbers["B", "1.pt"]
    assert numbers["A", "0.pt"] != numbers["B", "2.pt"]
    assert numbers["A", "all"] == numbers["A", "0.pt"]
    for group, one, other in zip(numbers["B", "all"], numbers["B", "1.pt"], numbers["B", "2.pt"]):
        assert (group["agents"], group["states"]) == (2, 6)
        assert group["kl_mean"] == pytest.approx((one["kl_mean"] + other["kl_mean"]) / 2)
        assert group["kl_spread"] == pytest.approx(abs(one["kl_mean"] - other["kl_mean"]) / 2**0.5)
        assert group["return_clean"] == pytest.approx((one["return_clean"] + other["return_clean"]) / 2)
        assert one["kl_mean"] > 0


def test_each_perturbation_has_its_return(states, monkeypatch):
    """Beside the clean one, and only if it is asked for."""
    returns = {"clean": 8.0, "random-conv": 4.0, "background": 6.0, "no-background": 2.0, "monochrome": 1.0}

    def play_returns(name, setup, agents):
        return np.full((len(agents), 3), returns[name])

    monkeypatch.setattr(robust, "play_returns", play_returns)
    setup = make_setup(tests=("return", "rendering", "random-conv"))
    rows = scores(setup, checkpoints(Constant()), states)
    assert [row["perturbation"] for row in rows[::2]] == list(returns)[1:]
    for row in rows:
        assert row["return_clean"] == 8
        assert row["return_perturbed"] == returns[row["perturbation"]]
        assert row["return_kept_mean"] == returns[row["perturbation"]] / 8
        assert row["episodes"] == 3
    rows = scores(make_setup(tests=("random-conv",)), checkpoints(Constant()), states)
    assert "return_clean" not in rows[0]


# Returns


class ReadsTheSide(torch.nn.Module):
    """Plays the Probe without a fault, and on a dark picture the action for the left side."""

    def forward(self, obs):
        right = obs[:, :, 32:].float().mean((1, 2, 3)) > obs[:, :, :32].float().mean((1, 2, 3))
        actions = torch.tensor(Probe.right_actions)[right.long()]
        return 1000 * torch.nn.functional.one_hot(actions, 15).float(), torch.zeros(len(obs))


def test_return_is_of_one_whole_episode_under_one_draw(monkeypatch):
    def make(setup, num, rng):
        return Probe(num, int(rng.integers(2**31)))

    monkeypatch.setattr(robust, "make_test_envs", make)
    draws = fix_kernel(monkeypatch, -1)
    setup = make_setup(num_episodes=40, chunk_size=7)
    clean = robust.play_returns("clean", setup, [ReadsTheSide(), ReadsTheSide()])
    assert clean.tolist() == [[4.0] * 40] * 2
    assert draws == []
    (blinded,) = robust.play_returns("random-conv", setup, [ReadsTheSide()])
    assert draws == [40]
    assert 1 < blinded.mean() < 3  # the right action is the left side's half of the time


class Staggered:
    """Environment i ends an episode every i + 1 steps, and each step pays 1. The picture says which it is."""

    def __init__(self, num: int):
        self.num = num
        self.step = 0
        self.actions = []

    def act(self, actions):
        self.actions.append(actions.copy())
        self.step += 1

    def observe(self):
        obs = np.zeros((self.num, 64, 64, 3), np.uint8)
        obs[:] = np.arange(self.num)[:, None, None, None]
        ended = self.step % (np.arange(self.num) + 1) == 0
        return np.full(self.num, self.step > 0, np.float32), {"rgb": obs}, ended

    def close(self):
        pass


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_only_first_episodes_count_and_each_sees_its_own_draw(chunk_size, monkeypatch):
    """Also when those that are still under way make up a chunk that is not the first environments."""
    made = []
    seen = []

    def make(setup, num, rng):
        made.append(Staggered(num))
        return made[-1]

    def draw(rng, num):
        return torch.arange(num)

    def apply(obs, parameters):
        assert obs[:, 0, 0, 0].tolist() == parameters.tolist()
        seen.extend(parameters.tolist())
        return obs + 100

    monkeypatch.setattr(robust, "make_test_envs", make)
    monkeypatch.setitem(robust.PIXELS, "color-jitter", PixelPerturbation(draw, apply))
    agent = Constant(keep=True)
    setup = make_setup(num_episodes=10, chunk_size=chunk_size)
    returns = robust.play_returns("color-jitter", setup, [agent])
    assert returns.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert agent.num_seen == 55
    assert sorted(seen) == sorted(i for i in range(10) for _ in range(i + 1))
    assert torch.cat(agent.seen).min() == 100
    (envs,) = made
    assert len({tuple(actions) for actions in envs.actions}) == 10  # samples, not one greedy action
    assert max(map(len, agent.seen)) <= chunk_size


@pytest.mark.parametrize("name", ["background", "no-background", "monochrome"])
def test_the_return_is_played_in_the_other_rendering(name):
    """From the first step to the last, in the same levels and with the same actions."""
    clean = Constant(keep=True)
    other = Constant(keep=True)
    setup = make_setup(num_episodes=6)
    returns = robust.play_returns("clean", setup, [clean])
    assert np.array_equal(robust.play_returns(name, setup, [other]), returns)
    assert len(clean.seen) == len(other.seen)
    for step in (0, 5, len(clean.seen) - 1):
        assert not torch.equal(clean.seen[step], other.seen[step])
    changed = (clean.seen[0] != other.seen[0]).flatten(1).any(dim=1)
    assert changed.sum() >= 4
    if name == "no-background":
        assert other.seen[0].float().mean() < clean.seen[0].float().mean()


def test_episodes_are_of_different_levels():
    agent = Constant(keep=True)
    robust.play_returns("clean", make_setup(), [agent])
    assert len({image.numpy().tobytes() for image in agent.seen[0]}) == 3


# The table, and how long it takes


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.09321, 0.00561, "0.0932 ± 0.0056"),
        (3.12e-6, 2.04e-7, "3.12e-06 ± 2.0e-07"),
        (1e-7, 2e-6, "1e-07 ± 2.0e-06"),
        (45.04, 2.14, "45.0 ± 2.1"),
        (104.2, 12.3, "104 ± 12"),
        (1234.5, 150.2, "1234 ± 150"),
        (100.0, 0.0, "100 ± 0"),
        (0.0, 0.0, "0.00 ± 0"),
        (0.5, 1.2e-17, "5.00000e-01 ± 1.2e-17"),
        (-0.02, 0.03, "-0.020 ± 0.030"),
        (None, None, "-"),
    ],
)
def test_a_mean_and_its_error(mean, error, text):
    assert robust.mean_and_error(mean, error) == text


def test_digits_that_count():
    assert robust.significant(2.294) == "2.29"
    assert robust.significant(2.7) == "2.70"
    assert robust.significant(3.1e-6) == "3.10e-06"
    assert robust.significant(104.3) == "104"
    assert robust.significant(None) == "-"


def test_table_by_hand():
    """A line for each label, none for a single checkpoint; percents, and what is missing."""
    row = {"env_id": "maze", "distribution_mode": "easy", "perturbation": "monochrome", "label": "PPO"}
    row |= {"checkpoint": "all", "agents": 1, "states": 6, "copies": 1, "entropy_mean": 2.5}
    row |= {"kl_mean": 3e-6, "kl_standard_error": 2e-7, "kl_std": 0.25, "kl_spread": None}
    row |= {"tv_mean": 0.125, "tv_standard_error": 0.011}
    row |= {"action_changes_mean": 0.5, "action_changes_standard_error": 0.021}
    row |= {"encoding_shift_mean": 0.25, "encoding_shift_standard_error": 0.012}
    played = {"return_clean": 4.0, "return_perturbed": 3.0}
    played |= {"return_kept_mean": 0.75, "return_kept_standard_error": 0.05}
    lines = robust.markdown([row | played, row | {"checkpoint": "x.pt"}, row]).splitlines()
    start = "| maze, easy | monochrome | PPO | 1 | 2.50 | 3.00e-06 ± 2.0e-07 | 0.250 | - | 0.125 ± 0.011 "
    assert lines[2] == start + "| 50.0 ± 2.1 | 0.250 ± 0.012 | 4.00 → 3.00 | 75.0 ± 5.0 |"
    assert lines[3] == start + "| 50.0 ± 2.1 | 0.250 ± 0.012 | - | - |"
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {14}


def test_the_estimate_counts_the_forward_passes(states, monkeypatch):
    """Of a policy that plays about at random."""
    monkeypatch.setattr(robust, "seconds_per_observation", lambda agent, size, device: 1.0)
    returns = {"tests": ("random-conv", "return"), "num_episodes": 16}
    copies = {"tests": ("random-conv",), "num_copies": 100}
    for settings in (returns, copies):
        setup = make_setup(num_states=12, **settings)
        agents = [Constant(), Constant()]
        expected = robust.estimate_seconds(setup, checkpoints(*agents))
        assert agents[0].num_seen == 0
        met = robust.gather_states(setup, agents)
        scores(setup, checkpoints(*agents), met)
        counted = agents[0].num_seen + agents[1].num_seen
        assert counted / 1.6 < expected < counted * 1.6


def test_a_forward_pass_is_timed():
    class Slow(Constant):
        def forward(self, obs):
            time.sleep(0.02)
            return super().forward(obs)

    agent = Slow()
    assert 0.02 / 4 < robust.seconds_per_observation(agent, 4, CPU) < 0.2 / 4
    assert agent.num_seen <= 16


def test_durations():
    assert robust.describe_duration(3) == "less than a minute"
    assert robust.describe_duration(61) == "about a minute"
    assert robust.describe_duration(240) == "about 4 minutes"
    assert robust.describe_duration(7000) == "about 2 hours"


# Pictures


def render(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_picture_of_the_copies(states):
    one = States(states.obs[:1], states.saves[:1])
    figure = robust.draw_copies(robust.PERTURBATIONS, make_setup(), one)
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == 3 + 3 * 9  # the observation and two renderings, then nine copies of each
    assert np.array_equal(images[0], one.obs[0])
    for image in images[1:]:
        assert not np.array_equal(image, images[0])
    assert render(figure).std() > 10


def test_a_picture_that_is_not_dark_is_shown():
    obs = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    obs[1, :32] = 200
    obs[2] = 255
    shown = robust.most_varied(States(obs, [b"0", b"1", b"2"]))
    assert torch.equal(shown.obs, obs[1:2])
    assert shown.saves == [b"1"]


def test_picture_of_tsne(states, monkeypatch):
    """For each checkpoint a point for every copy and a star for the observation, also if all are one."""
    monkeypatch.setattr(robust, "TSNE_COPIES", 20)
    one = States(states.obs[:1], states.saves[:1])
    constant = make_agent(3)
    for parameter in constant.encoder[0].parameters():
        parameter.data.zero_()
    for agents in ([make_agent(1), make_agent(2, (8, 4, 4)), make_agent(4)], [constant]):
        many = checkpoints(*agents, labels="ABB"[: len(agents)])
        figure = robust.draw_tsne("random-conv", make_setup(), many, one)
        points = [np.asarray(each.get_offsets()) for each in figure.axes[0].collections]
        assert [len(each) for each in points] == [20, 1] * len(agents) + [0]
        for each in points:
            assert np.isfinite(each).all()
        assert render(figure).std() > 10
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names[:-1] == (["A", "B 1", "B 2"] if len(agents) == 3 else ["A"])


def test_embedding_of_one_observation_and_its_copies(states, monkeypatch):
    """What t-SNE is given: for each agent the observation, then its copies."""
    given = []

    class Identity:
        def __init__(self, **options):
            pass

        def fit_transform(self, points):
            given.append(points)
            return points[:, :2]

    monkeypatch.setattr(robust, "TSNE", Identity)
    one = States(states.obs[:1], states.saves[:1])
    agents = [make_agent(1), make_agent(2)]
    embedding = robust.embed("color-jitter", make_setup(), agents, one, 5)
    assert embedding.shape == (2, 6, 2)
    (points,) = given
    copies = all_copies("color-jitter", make_setup(), one, 5)
    for i, agent in enumerate(agents):
        for obs, rows in ((one.obs, points[6 * i : 6 * i + 1]), (copies, points[6 * i + 1 : 6 * i + 6])):
            with torch.no_grad():
                expected = agent.encoder(obs.permute(0, 3, 1, 2) / 255).numpy()
            assert rows == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_picture_of_the_scores():
    """Bars as high as the means for each label; no panel for returns that nobody played."""
    rows = []
    for i, label in enumerate("AB"):
        for j, name in enumerate(("random-conv", "monochrome")):
            row = {"env_id": "maze", "distribution_mode": "easy", "perturbation": name, "label": label}
            row |= {"checkpoint": "all", "states": 6, "episodes": 3}
            for k, measure in enumerate((*robust.MEASURES, "return_kept")):
                row[f"{measure}_mean"] = 0.1 + 0.2 * i + 0.05 * j + 0.01 * k
                row[f"{measure}_standard_error"] = 0.02 + 0.001 * k
            rows += [row, row | {"checkpoint": "0.pt", "kl_mean": 9.0}]
    figure = robust.draw_scores(rows)
    assert len(figure.axes) == 5
    assert render(figure).std() > 10
    for k, axis in enumerate(figure.axes):
        heights = [bar.get_height() for bar in axis.patches]
        expected = [0.1, 0.15, 0.3, 0.35]
        assert heights == pytest.approx([height + 0.01 * k for height in expected])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
    of_b = [row for row in rows if row["label"] == "B"]
    for row in of_b:
        row["return_kept_mean"] = row["return_kept_standard_error"] = None
    heights = [bar.get_height() for bar in robust.draw_scores(rows).axes[-1].patches]
    assert heights == pytest.approx([0.14, 0.19, math.nan, math.nan], nan_ok=True)
    for row in rows:
        row["return_kept_mean"] = None
        row["label"] = f"_{row['label']}"
    figure = robust.draw_scores(rows)
    assert len(figure.axes) == 4
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_A", "_B"]


# Whole runs


def run_here(*words: str):
    robust.main(robust.tyro.cli(Args, args=words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the shell on the three agents of one run, to whose folder there is only a link."""
    folder = tmp_path_factory.mktemp("robustness")
    for i in (1, 2, 3):
        save_agent(folder / "disk" / f"agent_{i}" / "agent.pt", make_agent(i), "mdpo_procgen", **STARPILOT)
    (folder / "runs").mkdir()
    (folder / "runs" / "newest").symlink_to(folder / "disk")
    (folder / "runs" / "circle").symlink_to(folder / "runs")
    (folder / "eval").mkdir()
    words = ["--checkpoints", str(folder / "runs"), *flags(**TINY_ARGS), "--tests", "random-conv", "return"]
    words += flags(output="out", log_dir="tb")
    result = run_script("robustness_eval", folder / "eval", *words)
    assert result.returncode == 0, result.stderr.decode()
    return result, words, folder / "eval" / "work"


def test_run_from_the_shell(finished):
    result, words, work = finished
    assert sorted(each.name for each in work.iterdir()) == ["out", "tb"]
    pictures = [f"{kind}_starpilot_easy.png" for kind in ("copies", "scores", "tsne")]
    files = {each.name for each in (work / "out").iterdir()}
    assert files == {*pictures, "results.csv", "results.json", "table.md"}
    out = result.stdout.decode()
    table = (work / "out" / "table.md").read_text()
    estimate = "less than a minute on this CPU, if episodes are as long as in random play"
    assert out == f"{estimate}\n\n{table}\nnumbers: out\nfinished: out\n"
    assert "Warning" not in result.stderr.decode()
    assert len(table.splitlines()) == 2 + 1
    assert len({line.count("|") for line in table.splitlines()}) == 1
    content = json.loads((work / "out" / "results.json").read_text())
    assert content["settings"]["num_states"] == 6
    assert content["settings"]["checkpoints"] == words[1:2]
    rows = [row for row in content["results"] if row["perturbation"] == "random-conv"]
    assert [(row["label"], row["agents"]) for row in rows] == [("MDPO", 3), *[("MDPO", 1)] * 3]
    folders = [row["checkpoint"].split("/")[-3:-1] for row in rows[1:]]
    assert folders == [["newest", "agent_1"], ["newest", "agent_2"], ["newest", "agent_3"]]
    assert len({row["kl_mean"] for row in rows}) == 4
    for row in rows:
        assert row["states"] == 6
        assert row["kl_mean"] > 0
    with (work / "out" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["kl_mean"]) for line in lines] == [row["kl_mean"] for row in content["results"]]


def test_tensorboard_has_the_table_and_the_pictures(finished):
    _, _, work = finished
    events = read_events(work / "tb")
    assert events.Tags()["scalars"] == []
    assert events.Tags()["images"] == [f"starpilot_easy/{kind}" for kind in ("copies", "scores", "tsne")]
    (event,) = events.Tensors("table/text_summary")
    assert event.tensor_proto.string_val[0].decode() == (work / "out" / "table.md").read_text()


def check_means(folder, rows: list[dict]):
    """A point for each measure and perturbation."""
    events = read_events(folder)
    expected = {}
    for row in rows:
        for measure in ("kl", "tv", "action_changes", "encoding_shift", "return_kept"):
            mean = row.get(f"{measure}_mean")
            if mean is not None:
                expected[f"starpilot_easy_{measure}/{row['perturbation']}"] = mean
    assert set(events.Tags()["scalars"]) == expected.keys()
    for tag, mean in expected.items():
        (event,) = events.Scalars(tag)
        assert event.value == pytest.approx(mean)


def test_tensorboard_has_the_means_over_agents(finished):
    _, _, work = finished
    rows = results_of(work / "out")
    rows = [row for row in rows if row["checkpoint"] == "all"]
    assert rows
    check_means(work / "tb" / "MDPO", rows)


def test_tensorboard_has_a_run_for_each_label(good):
    """Which leads out of the folder never."""
    save_agent(good / "other.pt", make_agent(2), **STARPILOT)
    save_agent(good / "third.pt", make_agent(3), **STARPILOT)
    words = [*SHORT[:2], "other.pt", "third.pt", *SHORT[2:]]
    run_here(*words, "--labels", "../PPO, wide", "other", "../PPO; wide", "--log-dir", "tb/here")
    assert names_in(good / "tb") == ["here"]
    folders = {"../PPO, wide": "___PPO__wide", "other": "other", "../PPO; wide": "___PPO__wide_2"}
    for label, folder in folders.items():
        rows = [row for row in results_of(good / "out") if row["label"] == label]
        assert rows
        check_means(good / "tb" / "here" / folder, rows)


def results_of(folder) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["results"]


def test_same_seed_same_numbers(finished, tmp_path, monkeypatch):
    """To the last digit, in another process."""
    _, words, work = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robust, "TSNE_COPIES", 9)
    run_here(*words[:2], *flags(**TINY_ARGS, output="again"), "--tests", "random-conv", "return")
    assert (tmp_path / "again" / "results.csv").read_bytes() == (work / "out" / "results.csv").read_bytes()


@pytest.mark.parametrize("name", robust.PERTURBATIONS)
def test_another_chunk_size_same_numbers(name, states):
    """But for what float32 leaves."""
    agents = [make_agent(1), make_agent(2)]
    for agent in agents:
        agent.actor.weight.data *= 30
    one = robust.compare(name, make_setup(), agents, states)
    other = robust.compare(name, make_setup(chunk_size=4), agents, states)
    assert other[:, :2] == pytest.approx(one[:, :2], rel=0.01, abs=1e-4)  # KL and total variation
    assert one[:, 0].mean() > 1e-3


@pytest.mark.parametrize("name", ["random-conv", "color-jitter", "background"])
def test_another_seed_other_copies(name, states):
    one = all_copies(name, make_setup(), states, 3)
    other = all_copies(name, make_setup(seed=2), states, 3)
    assert not torch.equal(one, other)


def test_every_agent_once_by_game(tmp_path, monkeypatch):
    """Of folders, links and files, in the order of the command line; a label is of all below a folder."""
    monkeypatch.chdir(tmp_path)
    for i in (2, 1):
        save_agent(tmp_path / "run" / f"agent_{i}" / "agent.pt", make_agent(i), "mdspo_procgen", **STARPILOT)
    save_agent(tmp_path / "hard.pt", make_agent(3), env_id="starpilot")
    save_agent(tmp_path / "wide.pt", make_agent(4, (8, 4, 6)), "spo_procgen", channels=(8, 4, 6), **STARPILOT)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "newest").symlink_to(tmp_path / "run")
    (tmp_path / "links" / "circle").symlink_to(tmp_path / "links")
    given = ("hard.pt", "wide.pt", "links", "run", "run/agent_1/agent.pt")
    games = robust.read_agents(make_args(checkpoints=given), CPU)
    assert list(games) == [Game("starpilot", "hard"), GAME]
    easy = [(checkpoint.path, checkpoint.label) for checkpoint in games[GAME]]
    assert easy == [
        ("wide.pt", "SPO"),
        ("links/newest/agent_1/agent.pt", "MDSPO"),
        ("links/newest/agent_2/agent.pt", "MDSPO"),
    ]
    (hard,) = games[Game("starpilot", "hard")]
    assert (hard.path, hard.label) == ("hard.pt", "PPO")
    obs = random_states().obs
    assert torch.equal(hard.agent(obs)[0], make_agent(3)(obs)[0])
    games = robust.read_agents(make_args(checkpoints=("hard.pt", "run"), labels=("a", "b")), CPU)
    assert [checkpoint.label for checkpoint in games[GAME]] == ["b", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exp_name", "label"),
    [
        ("mdpo_procgen", "MDPO"),
        ("mdpo_procgen+wide", "MDPO, wide"),
        ("a+b", "MDPO"),
        ("mdpo_procgen+", "MDPO"),
    ],
)
def test_variants_of_a_sweep_are_told_apart(exp_name, label, tmp_path):
    path = save_agent(tmp_path / "agent.pt", make_agent(), "mdpo_procgen", exp_name=exp_name, **STARPILOT)
    assert robust.read_agent(path, "", CPU).label == label
    assert robust.read_agent(path, "mine", CPU).label == "mine"


def test_games_widths_modes_and_labels_in_one_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wide = make_agent(2, (8, 4, 6))
    a = save_agent(tmp_path / "a" / "agent.pt", make_agent(1), **STARPILOT)
    b = save_agent(tmp_path / "b" / "agent.pt", wide, "mdspo_procgen", channels=(8, 4, 6), **STARPILOT)
    c = save_agent(tmp_path / "c" / "agent.pt", make_agent(3), env_id="chaser", distribution_mode="easy")
    d = save_agent(tmp_path / "d" / "agent.pt", make_agent(3), env_id="starpilot")
    paths = [str(path) for path in (a, b, c, d, a)]
    common = [*flags(**TINY_ARGS), "--tests", "color-jitter", "rendering"]
    run_here("--checkpoints", *paths, "--output", "out/deep", *common)
    rows = results_of(tmp_path / "out" / "deep")
    found = []
    for row in rows:
        if row["perturbation"] == "monochrome":
            found.append((row["env_id"], row["distribution_mode"], row["label"]))
    assert found == [
        *[("starpilot", "easy", "PPO")] * 2,
        *[("starpilot", "easy", "MDSPO")] * 2,
        *[("chaser", "easy", "PPO")] * 2,
        *[("starpilot", "hard", "PPO")] * 2,
    ]
    of_chaser = {row["perturbation"] for row in rows if row["env_id"] == "chaser"}
    assert of_chaser == {"color-jitter", "no-background", "monochrome"}
    assert "chaser has no other background" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "deep").glob("*.png"))) == 9
    run_here("--checkpoints", "a", "b", "--labels", "mine", "mine", "--output", "out/2", *common)
    rows = results_of(tmp_path / "out" / "2")
    assert {row["label"] for row in rows} == {"mine"}
    assert rows[0]["agents"] == 2


def test_a_game_without_another_background(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_agent(tmp_path / "agent.pt", make_agent(3), env_id="chaser")
    few = flags(**TINY_ARGS | {"num_states": 2}, tests="rendering")
    run_here("--checkpoints", "agent.pt", "--output", "out", *few)
    assert [row["perturbation"] for row in results_of(tmp_path / "out")[::2]] == [
        "no-background",
        "monochrome",
    ]
    assert "chaser has no other background" in capsys.readouterr().out


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run_here("--help")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert [each.name for each in fields(Args) if f"--{each.name.replace('_', '-')}" not in out] == []


# Bad input


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def spoil(tmp_path):
    """Files that are no agent, by what is wrong with them."""
    (tmp_path / "circle.pt").symlink_to("circle.pt")
    good = save_agent(tmp_path / "good.pt", make_agent(), **STARPILOT)
    content = torch.load(good, weights_only=True)
    save = {
        "code": Code(),
        "list": [1, 2],
        "checkpoint": {"script": "ppo_procgen", "format": 1, "args": {}},
        "no_game": content | {"args": {}},
        "text_args": content | {"args": "hard"},
        "number": content | {"script": 3},
    }
    changes = {"env_id": "pong", "distribution_mode": "memory", "channels": (8, 4, 4)}
    for key, value in changes.items():
        save[key] = content | {"args": content["args"] | {key: value}}
    save["text_channels"] = content | {"args": content["args"] | {"channels": "wide"}}
    nan = {name: weight.clone() for name, weight in content["agent"].items()}
    nan["actor.bias"][3] = math.nan
    save["nan"] = content | {"agent": nan}
    huge = {name: 1e30 * weight for name, weight in content["agent"].items()}
    save["huge"] = content | {"agent": huge}
    for name, value in save.items():
        torch.save(value, tmp_path / f"{name}.pt")
    whole = good.read_bytes()
    middle = len(whole) // 2
    (tmp_path / "cut.pt").write_bytes(whole[:middle])
    (tmp_path / "flipped.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (tmp_path / "text.pt").write_text("not an agent")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()


CASES = [
    ("", ["--checkpoints"]),
    ("--checkpoints", ["--checkpoints"]),
    ("--checkpoints missing.pt", ["missing.pt", "No such file"]),
    ("--checkpoints folder", ["folder", "no agent.pt"]),
    ("--checkpoints good.pt cut.pt", ["cut.pt", "damaged"]),
    ("--checkpoints good.pt flipped.pt", ["flipped.pt", "damaged"]),
    ("--checkpoints good.pt text.pt", ["text.pt", "damaged"]),
    ("--checkpoints good.pt empty.pt", ["empty.pt", "damaged"]),
    ("--checkpoints code.pt", ["code.pt", "another kind of file"]),
    ("--checkpoints list.pt", ["list.pt", "another kind of file"]),
    ("--checkpoints checkpoint.pt", ["checkpoint.pt", "another kind of file"]),
    ("--checkpoints no_game.pt", ["no_game.pt", "no agent.pt"]),
    ("--checkpoints text_args.pt", ["text_args.pt", "no agent.pt"]),
    ("--checkpoints number.pt", ["number.pt", "no agent.pt"]),
    ("--checkpoints env_id.pt", ["env_id.pt", "pong"]),
    ("--checkpoints distribution_mode.pt", ["distribution_mode.pt", "memory"]),
    ("--checkpoints channels.pt", ["channels.pt", "fit"]),
    ("--checkpoints text_channels.pt", ["text_channels.pt", "fit"]),
    ("--checkpoints nan.pt", ["nan.pt", "finite"]),
    ("--checkpoints good.pt --num-states 1", ["--num-states", "from 2 to"]),
    ("--checkpoints good.pt --num-copies 0", ["--num-copies", "from 1 to"]),
    ("--checkpoints good.pt --num-copies -1", ["--num-copies"]),
    ("--checkpoints good.pt --num-episodes 1", ["--num-episodes", "from 2 to"]),
    ("--checkpoints good.pt --num-episodes 65537", ["--num-episodes", "65536"]),
    ("--checkpoints good.pt --chunk-size 0", ["--chunk-size", "from 1 to"]),
    ("--checkpoints good.pt --num-env-threads -1", ["--num-env-threads", "from 0 to"]),
    ("--checkpoints good.pt --num-states many", ["--num-states", "many"]),
    ("--checkpoints good.pt --tests", ["--tests", "random-conv"]),
    ("--checkpoints good.pt --tests random_conv", ["--tests", "random-conv", "color-jitter"]),
    ("--checkpoints good.pt --tests return", ["--tests", "return"]),
    ("--checkpoints good.pt --labels a b", ["--labels", "1"]),
    (r"--checkpoints good.pt --labels $\lambd=1$", ["--labels", "lambd", r"\$"]),
    ("--checkpoints good.pt --labels a\x07", ["--labels", "printed"]),
    ("--checkpoints good.pt good.pt --labels a b", ["--labels", "good.pt", "of a and of b"]),
    ("--checkpoints huge.pt", ["huge.pt", "too large"]),
    ("--checkpoints good.pt --device gpu", ["--device", "gpu", "cpu"]),
    ("--checkpoints good.pt --device cuda:99", ["--device", "99"]),
    ("--checkpoints good.pt --output folder", ["--output", "folder"]),
    ("--checkpoints good.pt --output good.pt/x", ["--output good.pt/x: "]),
    ("--checkpoints good.pt --output /proc/x", ["--output /proc/x: "]),
    ("--checkpoints good.pt --log-dir good.pt/x", ["--log-dir good.pt/x: "]),
    ("--checkpoints good.pt --log-dir /proc", ["--log-dir /proc: "]),
    ("--checkpoints good.pt --output out --log-dir out/tb", ["--log-dir out/tb is in --output"]),
    ("--checkpoints circle.pt", ["circle.pt", "symbolic links"]),
    ("--checkpoints good.pt --seed -1", ["--seed", "from 0 to"]),
    ("--no-such-flag 1", ["--no-such-flag"]),
]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoiled")
    spoil(folder)
    return folder


@pytest.fixture
def handlers(monkeypatch):
    """Puts back what a run changes for its whole process."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    saved = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


def run_as_main(monkeypatch, *words: str) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["robustness_eval.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(robust.__file__, run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line or "nothing" for line, _ in CASES])
def test_bad_input_is_one_message(line, words, spoiled, handlers, monkeypatch, capfd):
    monkeypatch.chdir(spoiled)
    before = sorted(spoiled.rglob("*"))
    status = run_as_main(monkeypatch, *line.split())
    message = error_message(status, *capfd.readouterr())
    assert [word for word in words if word not in message] == []
    assert sorted(spoiled.rglob("*")) == before


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_driver_that_is_too_old_is_said(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device.*driver.*cpu would do"):
        make_args(device=device)
    make_args(device="cpu")


SHORT = ["--checkpoints", "good.pt", *flags(**TINY_ARGS | {"num_states": 2}), "--tests", "rendering"]
SHORT += ["--output", "out"]


@pytest.fixture
def good(tmp_path, handlers, monkeypatch):
    """A folder to work in, with one agent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robust, "TSNE_COPIES", 9)
    save_agent(tmp_path / "good.pt", make_agent(), **STARPILOT)
    return tmp_path


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


def names_in(folder) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_no_picture_costs_the_numbers(good, monkeypatch, capfd):
    """A full disk does not, nor does an error that nobody has thought of."""
    files = ["results.csv", "results.json", "table.md"]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", raising(OSError(28, "No space left on device")))
    assert run_as_main(monkeypatch, *SHORT) == 2
    out, err = capfd.readouterr()
    reason = "has the numbers, but not all pictures: No space left on device"
    assert err.endswith(f"\nrobustness_eval.py: error: --output out {reason}\n")
    assert "| starpilot, easy | background | PPO |" in out
    assert out.endswith("\nnumbers: out\n")
    assert names_in(good / "out") == files
    monkeypatch.undo()
    monkeypatch.chdir(good)
    monkeypatch.setattr(robust, "draw_game", raising(KeyError("episodes")))
    with pytest.raises(KeyError):
        run_here(*SHORT[:-1], "again")
    assert capfd.readouterr().out.endswith("\nnumbers: again\n")
    assert names_in(good) == ["again", "good.pt", "out"]
    assert names_in(good / "again") == files


def test_what_agents_of_one_label_do_not_share(good, capsys):
    settings = {"num_levels": 20, "seed": 1, "device": "cpu"}
    save_agent(good / "a" / "agent.pt", make_agent(), **STARPILOT | settings)
    settings = {"num_levels": 200, "seed": 2, "device": "auto"}
    save_agent(good / "b" / "agent.pt", make_agent(), **STARPILOT | settings)
    words = ["--checkpoints", "a", "b", *SHORT[2:-1]]
    run_here(*words, "1")
    note = "starpilot, PPO: agents differ in num_levels, 20 and 200; --labels can tell them apart"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "less than a minute on this CPU"
    assert lines[1:3] == [note, ""]
    run_here(*words, "2", "--labels", "A", "B")
    assert "differ in" not in capsys.readouterr().out
    content = torch.load("b/agent.pt", weights_only=True)
    torch.save(content | {"global_step": 500}, "b/agent.pt")
    run_here(*words, "3")
    note = "starpilot, PPO: agents differ in global_step, None and 500; --labels can tell them apart"
    assert note in capsys.readouterr().out.splitlines()


def test_every_difference_of_a_training_is_told():
    """In whichever order the agents come. The encoders may be of different seeds."""
    one = {"script": "ppo_procgen", "pretrained_encoder": True, "seed": 1}
    other = {"script": "mdpo_procgen", "pretrained_encoder": False, "seed": 2, "distill_coef": 1.0}
    for trainings in ([one, other], [other, one]):
        agents = [Checkpoint("", "A", GAME, None, training) for training in trainings]
        names = [re.search(r"differ in (\w+)", line)[1] for line in robust.what_differs(agents)]
        assert sorted(names) == ["distill_coef", "pretrained_encoder", "script"]


def test_what_has_been_measured_is_printed(good, monkeypatch, capsys):
    """Of the perturbations before that which comes to a bad end."""
    compare = robust.compare

    def compare_two(name, *rest):
        if name == "monochrome":
            raise MemoryError
        return compare(name, *rest)

    monkeypatch.setattr(robust, "compare", compare_two)
    with pytest.raises(MemoryError):
        run_here(*SHORT)
    out = capsys.readouterr().out
    assert "| starpilot, easy | background | PPO |" in out
    assert "| starpilot, easy | no-background | PPO |" in out
    assert "monochrome" not in out
    assert names_in(good) == ["good.pt"]


def test_a_run_that_fails_leaves_no_folder(good, monkeypatch, capfd):
    """The table is printed all the same."""
    monkeypatch.setattr("csv.DictWriter", raising(OSError(28, "No space left on device")))
    assert run_as_main(monkeypatch, *SHORT) == 2
    out, err = capfd.readouterr()
    assert err.endswith("\nrobustness_eval.py: error: --output out: No space left on device\n")
    assert "Traceback" not in err
    assert "| starpilot, easy | background | PPO |" in out
    assert names_in(good) == ["good.pt"]


def test_results_are_kept_if_another_has_taken_the_name(good, monkeypatch, capsys):
    gather_states = robust.gather_states

    def gather_and_take_the_name(*inputs):
        (good / "out").mkdir()
        return gather_states(*inputs)

    monkeypatch.setattr(robust, "gather_states", gather_and_take_the_name)
    run_here(*SHORT)
    (folder,) = good.glob("out-*")
    assert (folder / "results.csv").exists()
    assert names_in(good / "out") == []
    assert capsys.readouterr().out.endswith(f"finished: {folder.name}\n")


def test_results_are_kept_if_the_curves_cannot_be_written(good, monkeypatch, capfd):
    full = raising(OSError(28, "No space left on device"))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", full)
    assert run_as_main(monkeypatch, *SHORT, "--log-dir", "tb") == 2
    assert (good / "out" / "table.md").exists()
    message = "error: --log-dir tb: No space left on device; the results are in out\n"
    assert capfd.readouterr().err.endswith(message)


def test_memory_that_does_not_suffice_is_one_line(good, monkeypatch, capfd):
    monkeypatch.setattr("procgen.ProcgenGym3Env", raising(MemoryError()))
    status = run_as_main(monkeypatch, *SHORT)
    _, err = capfd.readouterr()
    assert "--chunk-size" in error_message(status, "", err)
    assert names_in(good) == ["good.pt"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(number, status, good, monkeypatch, capfd):
    """Here while the states are gathered, and again while it tidies up: nothing stays behind."""

    tidy_up = tempfile.TemporaryDirectory.cleanup

    def interrupted(*_, **__):
        assert names_in(good) != ["good.pt"]  # the unfinished folder is there
        signal.raise_signal(number)

    def interrupted_again(folder):
        signal.raise_signal(number)
        tidy_up(folder)

    monkeypatch.setattr("procgen.ProcgenGym3Env", interrupted)
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", interrupted_again)
    assert run_as_main(monkeypatch, *SHORT) == status
    assert capfd.readouterr().err == "starpilot: states\n"
    assert names_in(good) == ["good.pt"]


@pytest.mark.slow
def test_names_that_are_not_utf8(tmp_path):
    """In a locale without the letters of the table, too."""
    path = os.fsencode(tmp_path) + b"/run\xe9.pt"
    os.rename(save_agent(tmp_path / "good.pt", make_agent(), **STARPILOT), path)
    command, options = shell("robustness_eval", tmp_path)
    words = flags(**TINY_ARGS, output="out")
    options["env"] |= {
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }
    result = subprocess.run([*command, "--checkpoints", path, *words], capture_output=True, **options)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "work" / "out"
    assert path in (folder / "results.csv").read_bytes()
    assert results_of(folder)[1]["checkpoint"] == os.fsdecode(path)
    assert " → " in (folder / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_from_the_shell(number, status, tmp_path):
    """In the middle of a long run."""
    path = save_agent(tmp_path / "good.pt", make_agent(), **STARPILOT)
    command, options = shell("robustness_eval", tmp_path)
    words = ["--checkpoints", str(path), "--num-states", "5000", "--device", "cpu", "--output", "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *words], **pipes, **options) as process:
        assert process.stdout.readline().startswith(("about", "less"))
        assert process.stderr.readline() == "starpilot: states\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, "")
    assert names_in(tmp_path / "work") == []
