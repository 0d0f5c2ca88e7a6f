"""robustness_eval.py: known numbers, Procgen's saved states, pictures, whole runs, faults of users."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from common import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from procgen import ProcgenGym3Env

import robustness_eval as robust
from robustness_eval import BACKGROUNDS, Args, Checkpoint, Game, Policy, Setup, States

CPU = torch.device("cpu")
GAME = Game("starpilot", "easy")
RENDERINGS = ["background", "no-background", "monochrome"]
GATHERING_STEPS = robust.GATHERING_STEPS
SMALL = {"num_states": 6, "num_copies": 3, "num_episodes": 3, "device": "cpu"}

# Games with few backgrounds, many, and one alone; the others are tried among the slow tests.
GAMES = [
    pytest.param(env_id, marks=[] if env_id in ("chaser", "coinrun", "starpilot") else pytest.mark.slow)
    for env_id in sorted(BACKGROUNDS)
]


def make_setup(game: Game = GAME, **settings) -> Setup:
    args = Args(**{"checkpoints": (Path("-"),), **SMALL, **settings})
    return Setup(game, args, CPU)


def make_agent(seed: int = 0):
    """A small agent whose policy differs between observations, as a trained one's does."""
    torch.manual_seed(seed)
    agent = robust.Agent(channels=(4, 4, 4))
    agent.actor.weight.data *= 3000
    return agent


def make_policies(*agents, labels: str = "ABCDEF", folders=None) -> list[Policy]:
    policies = []
    for i, agent in enumerate(agents):
        folder = folders[i] if folders else f"run_{i}"
        path = Path(folder, "agent.pt")
        policies.append(Policy(labels[i], Checkpoint(path, "ppo_procgen", {"seed": i}, 100 * i, agent)))
    return policies


def random_states(num: int = 4) -> States:
    torch.manual_seed(5)
    return States(torch.randint(256, (num, 64, 64, 3), dtype=torch.uint8), [b""] * num)


def scores(*inputs) -> list[dict]:
    return list(itertools.chain.from_iterable(robust.score(*inputs)))


def compare(name: str, agents, states: States, **settings):
    setup = make_setup(**settings)
    return robust.compare(name, robust.count_copies(setup, 3)[name], setup, agents, states)


class Policyless(torch.nn.Module):
    """What the test agents are: encoder and actor are methods. Keeps what it has seen, if told."""

    def __init__(self, keep: bool = False):
        super().__init__()
        self.seen = [] if keep else None

    def encoder(self, images):
        if self.seen is not None:
            self.seen.append(images.clone())
        return images.double().mean((1, 2, 3))[:, None]


class Blind(Policyless):
    """Prefers action 7 a little."""

    def actor(self, encodings):
        logits = torch.linspace(0, 1, 15).repeat(len(encodings), 1)
        logits[:, 7] += 1
        return logits


class BlindEncoder(Blind):
    def encoder(self, images):
        return torch.zeros_like(super().encoder(images))


class Always(Policyless):
    def __init__(self, action: int):
        super().__init__()
        self.action = action

    def actor(self, encodings):
        logits = torch.zeros(len(encodings), 15)
        logits[:, self.action] = 1000
        return logits


class Brightness(Policyless):
    """The mean of the picture, in [0, 1], is the logit of action 0; all others are 0."""

    def actor(self, encodings):
        return torch.nn.functional.pad(encodings, (0, 14))


def kernel(scale: float):
    """The identity kernel, times a scale."""
    weights = torch.zeros(3, 3, 3, 3)
    weights[range(3), range(3), 1, 1] = scale
    return weights


def fix_kernel(monkeypatch, scale: float) -> list:
    """Every copy is under this kernel. Returns a list of how many are drawn, with a number by their rng."""
    draws = []

    def draw(rng, num):
        draws.append((num, rng.integers(2**60)))
        return kernel(scale).expand(num, -1, -1, -1, -1)

    monkeypatch.setitem(robust.PIXELS, "random-conv", (draw, robust.random_conv))
    return draws


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Most tests need no states of late steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "GATHERING_STEPS", 50)
        yield


@pytest.fixture(scope="module")
def states():
    return robust.gather_states(make_setup(), [Always(2), Always(7)])


def test_divergences_by_hand():
    """Of three policies of two actions; the greedy action of equal ones is the first."""
    clean = torch.tensor([0.9, 0.1]).double()
    perturbed = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.9, 0.1]]).double()
    entropy, kl, tv, changes = torch.stack(robust.divergences(clean.log(), perturbed.log() + 5)).tolist()
    first = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert kl == pytest.approx([first, 0.8 * math.log(9), 0])
    assert first != pytest.approx(math.log(0.5 / (0.9 * 0.1) ** 0.5), rel=0.1)  # the other way round
    assert tv == pytest.approx([0.4, 0.8, 0])
    assert entropy == pytest.approx([-0.9 * math.log(0.9) - 0.1 * math.log(0.1)] * 3)
    assert changes == [0, 1, 0]


def test_summary_by_hand():
    """Two agents, two states, two copies; the states' means are 2 and 5, the agents' 2 and 5."""
    values = np.array([[[0.0, 1.0], [2.0, 5.0]], [[2.0, 5.0], [6.0, 7.0]]])
    summary = robust.summarize(values, ["a", "b"])
    assert summary["mean"] == 3.5
    assert summary["std"] == pytest.approx(math.sqrt(np.mean((values - 3.5) ** 2)))
    assert summary["standard_error"] == pytest.approx(3 / 2**0.5 / 2**0.5)
    assert summary["between_trainings"] == pytest.approx(3 / 2**0.5)
    assert robust.summarize(values[:1], ["a"])["between_trainings"] is None


def test_agents_of_one_training_are_one_sample():
    """Agents of 0 and 4 that learned together, and one of 8: the trainings' means are 2 and 8."""
    values = np.array([0.0, 8.0, 4.0])[:, None, None] + np.array([0.0, 1.0])[:, None]
    summary = robust.summarize(values, ["pair", "alone", "pair"])
    assert summary["mean"] == 5.5
    assert summary["std"] == pytest.approx(values.std())
    assert summary["between_trainings"] == pytest.approx(6 / 2**0.5)
    assert summary["standard_error"] == pytest.approx(0.5)
    assert robust.summarize(values[:2], ["pair", "pair"])["between_trainings"] is None
    assert robust.training_means(values, ["pair", "alone", "pair"])[:, 0, 0].tolist() == [2, 8]


def test_training_of_an_agent(tmp_path):
    """An agent of a mutual run shares it with its peer. Others are by themselves, whatever lies beside."""
    pair = [robust.training_of(tmp_path / f"run/agent_{i}/agent.pt") for i in (1, 2)]
    assert pair[0] == pair[1]
    alone = [robust.training_of(tmp_path / name) for name in ("run/agent.pt", "run/b.pt", "agent.pt")]
    assert len({*pair, *alone}) == 4


def test_share_of_the_return_by_hand():
    clean = np.array([[1.0, 3.0, 2.0]])
    perturbed = np.array([[1.0, 1.0, 1.0]])
    kept = robust.return_kept(clean, perturbed)
    assert kept["return_kept_mean"] == 0.5
    assert (kept["return_clean"], kept["return_perturbed"]) == (2, 1)
    residuals = np.array([0.5, -0.5, 0.0])
    assert kept["return_kept_standard_error"] == pytest.approx(residuals.std(ddof=1) / 3**0.5 / 2)
    assert robust.return_kept(clean, clean)["return_kept_standard_error"] == 0
    for none in (robust.return_kept(-clean, perturbed), robust.return_kept(0 * clean, perturbed)):
        assert none["return_kept_mean"] is none["return_kept_standard_error"] is None
    # Trainings whose residuals cancel level by level leave no error.
    mixed = np.array([[1.0, 0.5, 1.5], [1.0, 1.5, 0.5]])
    assert robust.return_kept(np.full((2, 3), 2.0), mixed)["return_kept_standard_error"] == 0


def test_random_conv_is_each_image_under_its_own_kernel():
    obs = random_states(5).obs
    kernels = robust.draw_kernels(np.random.default_rng(0), 5)
    out = robust.random_conv(obs, kernels)
    assert out.shape == obs.shape
    assert kernels.shape == (5, 3, 3, 3, 3)
    assert out.dtype == kernels.dtype == torch.float32
    for image, weights, result in zip(obs, kernels, out):
        image = image.permute(2, 0, 1)[None] / 255
        alone = torch.nn.functional.conv2d(image, weights, padding=1).clamp(0, 1)[0].permute(1, 2, 0)
        torch.testing.assert_close(result / 255, alone, rtol=1e-4, atol=1e-5)


def test_kernels_are_standard_gaussian():
    draws = robust.draw_kernels(np.random.default_rng(0), 4000)
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01
    assert abs((draws**4).mean() - 3) < 0.1


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
    [(1, 0.5, 1, 0), (1, 1, 0.5, 0), (1, 1, 1, -1), (1.4, 0.6, 1, 0), (0.7, 1.4, 0.6, 1), (1.4, 1.4, 1.4, 2)],
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
    assert draws.dtype == torch.float32
    for column, low, high in zip(draws.T, (0.6, 0.6, 0.6, -0.5), (1.4, 1.4, 1.4, 0.5)):
        assert low <= column.min() < low + 0.01
        assert high - 0.01 < column.max() <= high
        assert column.mean() == pytest.approx((low + high) / 2, abs=0.03)
    assert np.corrcoef(draws.T.numpy())[~np.eye(4, dtype=bool)].max() < 0.1


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
    rng = np.random.default_rng(0)
    envs = ProcgenGym3Env(8, env_id, distribution_mode="easy", rand_seed=3, num_threads=2)
    for _ in range(20):
        envs.act(np.full(8, 7))
        envs.observe()
    saves = envs.get_state()
    rewards, ends, pictures = play(envs, 150)
    names = robust.count_copies(make_setup(game, tests=("rendering",)), 9)
    assert list(names) == (RENDERINGS[1:] if env_id == "chaser" else RENDERINGS)
    for name in names:
        rewritten = []
        for save in saves:
            rewritten += robust.rewrite(save, game, name, 1, rng)
        assert [len(one) for one in rewritten] == [len(one) for one in saves]
        envs.set_state(rewritten)
        new_rewards, new_ends, new_pictures = play(envs, 150)
        assert np.array_equal(new_rewards, rewards)
        assert np.array_equal(new_ends, ends)
        assert (new_pictures[0] != pictures[0]).any((1, 2, 3)).sum() >= 4
        if name == "no-background":
            assert new_pictures[0].mean() < pictures[0].mean()
    envs.set_state(saves)
    assert np.array_equal(envs.observe()[1]["rgb"], pictures[0])
    envs.close()


def test_copies_are_on_every_other_background_once(states):
    """As far as there are that many, in an order of each state's own."""
    orders = []
    rng = np.random.default_rng(0)
    at = robust.find_fields(states.saves[0], GAME)["background"]
    of_state = robust.read_int(states.saves[0], at)
    for _ in range(2):
        rewritten = robust.rewrite(states.saves[0], GAME, "background", 50, rng)
        orders.append([robust.read_int(save, at) for save in rewritten])
        assert sorted(orders[-1]) == [index for index in range(13) if index != of_state]
    assert orders[0] != orders[1]
    assert len(robust.rewrite(states.saves[0], GAME, "background", 5, rng)) == 5


def test_a_save_of_another_layout_is_refused(states):
    rng = np.random.default_rng(0)
    save = states.saves[0]
    fields = robust.find_fields(save, GAME)
    spoiled = {
        "without": robust.replace_int(save, fields["use_backgrounds"], 0),
        "monochrome": robust.replace_int(save, fields["monochrome"], 1),
        "negative": robust.replace_int(save, fields["background"], -1),
        "too_large": robust.replace_int(save, fields["background"], 13),
    }
    for other in spoiled.values():
        with pytest.raises(ValueError, match="laid out"):
            robust.rewrite(other, GAME, "background", 1, rng)
    robust.find_fields(robust.replace_int(save, fields["background"], 12), GAME)


def test_number_of_copies():
    every = {"random-conv": 50, "color-jitter": 50, "background": 12, "no-background": 1, "monochrome": 1}
    assert robust.count_copies(make_setup(), 50) == every
    assert robust.count_copies(make_setup(), 5)["background"] == 5
    setup = make_setup(Game("chaser", "hard"), tests=("return", "rendering"))
    assert robust.count_copies(setup, 5) == {"no-background": 1, "monochrome": 1}


@pytest.mark.parametrize("name", ["random-conv", "color-jitter", *RENDERINGS])
def test_copies_are_shown_after_the_observation(name, states):
    """All different."""
    setup = make_setup()
    copies = robust.count_copies(setup, 12)[name]
    shown = list(robust.show_copies(name, setup, states, copies))
    assert len(shown) == 6
    for obs, seen in zip(states.obs, shown):
        assert seen.shape == (1 + copies, 64, 64, 3)
        assert torch.equal(seen[0], obs)
        assert len({image.numpy().tobytes() for image in seen}) == 1 + copies


def test_environments_are_those_of_the_full_distribution():
    """Not of the 500 training levels, and of the distribution mode: mazes are smaller where it is easy."""
    made = robust.make_test_envs(Game("maze", "easy"), 16, np.random.default_rng(0))
    seed = int(np.random.default_rng(0).integers(2**31))
    options = {"num_levels": 0, "start_level": 0, "distribution_mode": "easy"}
    expected = ProcgenGym3Env(16, "maze", rand_seed=seed, num_threads=0, **options)
    assert np.array_equal(made.observe()[1]["rgb"], expected.observe()[1]["rgb"])
    assert max(info["level_seed"] for info in made.get_info()) >= 500
    made.close()
    expected.close()


def test_streams_of_random_numbers():
    """The same for one purpose, others for another seed, game, mode or purpose."""
    streams = [
        robust.generator(make_setup(), "x"),
        robust.generator(make_setup(seed=2), "x"),
        robust.generator(make_setup(Game("starpilot", "hard")), "x"),
        robust.generator(make_setup(Game("fruitbot", "easy")), "x"),
        robust.generator(make_setup(), "y"),
    ]
    draws = [stream.integers(2**60) for stream in streams]
    assert len(set(draws)) == 5
    assert robust.generator(make_setup(), "x").integers(2**60) == draws[0]


def test_gathered_states_are_as_seen_and_as_many_from_each(states):
    """Three from each of two agents, each by its own play, from a level of its own."""
    assert states.obs.shape == (6, 64, 64, 3)
    assert states.obs.dtype == torch.uint8
    envs = robust.make_test_envs(GAME, 6, np.random.default_rng(0))
    envs.set_state(states.saves)
    assert np.array_equal(envs.observe()[1]["rgb"], states.obs.numpy())
    assert len({info["level_seed"] for info in envs.get_info()}) == 6
    envs.close()
    alike = robust.gather_states(make_setup(), [Always(2), Always(2)])
    assert torch.equal(alike.obs[:3], states.obs[:3])
    assert not torch.equal(alike.obs[3:], states.obs[3:])


class Clock:
    """Its picture and its saved state say which environment and which step it is. Environment i ends an
    episode every i + 1 steps, and each step pays 1. Keeps the actions."""

    def __init__(self, num: int):
        self.num = num
        self.step = 0
        self.actions = []

    def act(self, actions):
        self.actions.append(actions.copy())
        self.step += 1

    def observe(self):
        obs = np.zeros((self.num, 64, 64, 3), np.uint8)
        obs[:, :, :, 0] = np.arange(self.num)[:, None, None]
        obs[:, :, :, 1] = self.step % 256
        obs[:, :, :, 2] = self.step // 256
        firsts = self.step % (np.arange(self.num) + 1) == 0
        return np.full(self.num, self.step > 0, np.float32), {"rgb": obs}, firsts

    def get_state(self):
        return [bytes([i, self.step % 256, self.step // 256]) for i in range(self.num)]

    def close(self):
        pass


@pytest.fixture
def clocks(monkeypatch):
    """In place of Procgen; a list of those that are made."""
    made = []

    def make(game, num, rng):
        made.append(Clock(num))
        return made[-1]

    monkeypatch.setattr(robust, "make_test_envs", make)
    return made


def test_states_are_met_at_any_of_512_steps(clocks, monkeypatch):
    """One in each environment, played by samples of the policy, and looked at only as long as needed."""
    monkeypatch.setattr(robust, "GATHERING_STEPS", GATHERING_STEPS)
    agent = Blind(keep=True)
    gathered = robust.gather_states(make_setup(num_states=79), [agent, agent])
    found = gathered.obs[:, 0, 0].numpy()
    assert [bytes(each.tolist()) for each in found] == gathered.saves
    assert found[:, 0].tolist() == [*range(40), *range(40)]
    steps = found[:, 1] + 256 * found[:, 2].astype(int)
    assert steps.min() < 30
    assert 482 < steps.max() < 512
    assert abs(np.mean(steps) - 256) < 50
    assert steps[:40].tolist() != steps[40:].tolist()
    first, _ = clocks
    assert len(first.actions) == steps[:40].max()
    assert len(set(np.array(first.actions)[:100].flat)) == 15
    assert sum(map(len, agent.seen)) == steps.sum()


def test_actions_are_samples_of_the_policy(clocks):
    class Three(Policyless):
        def actor(self, encodings):
            logits = torch.full((15,), -1000.0)
            logits[:3] = torch.tensor([0.6, 0.3, 0.1]).log()
            return logits.repeat(len(encodings), 1)

    robust.gather_states(make_setup(num_states=100), [Three()])
    actions = np.array(clocks[0].actions)[:40].flatten()
    assert np.bincount(actions) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_a_blind_policy_scores_zero_and_keeps_its_return(states):
    real = make_agent()
    real.encoder[0].weight.data.zero_()
    for agent in (BlindEncoder(), real):
        rows = scores(make_setup(), make_policies(agent), states)
        assert len(rows) == 2 * 5
        for row in rows:
            for measure in ("kl", "tv", "action_changes", "encoding_shift"):
                for key in ("mean", "std", "standard_error"):
                    assert abs(row[f"{measure}_{key}"]) < 1e-6
            assert row["return_clean"] == row["return_perturbed"]
            if row["return_clean"] > 0:
                assert (row["return_kept_mean"], row["return_kept_standard_error"]) == (1, 0)


def test_a_policy_that_reads_only_the_brightness_scores_what_a_hand_computes(monkeypatch):
    """Under half the identity kernel the logit of action 0 halves, and so does the encoding, which is the
    same number."""
    draws = fix_kernel(monkeypatch, 0.5)
    states = random_states()
    states.obs[:] //= torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None]  # none as bright as another
    values = compare("random-conv", [Brightness()], states)
    assert {each.shape for each in values.values()} == {(1, 4, 3)}
    assert [num for num, _ in draws] == [3] * 4
    assert len(set(draws)) == 4
    brightness = states.obs.double().mean((1, 2, 3)).numpy() / 255
    squares = [(one - other) ** 2 for one, other in itertools.combinations(brightness, 2)]
    distance = math.sqrt(np.mean(squares))
    for i, clean in enumerate(brightness):
        p = math.exp(clean) / (math.exp(clean) + 14)
        q = math.exp(clean / 2) / (math.exp(clean / 2) + 14)
        expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        entropy = -p * math.log(p) - (1 - p) * math.log((1 - p) / 14)
        assert values["kl"][0, i] == pytest.approx([expected] * 3, rel=1e-4)
        assert values["tv"][0, i] == pytest.approx([p - q] * 3, rel=1e-4)
        assert values["entropy"][0, i] == pytest.approx([entropy] * 3, rel=1e-6)
        assert values["action_changes"][0, i].tolist() == [0, 0, 0]
        assert values["encoding_shift"][0, i] == pytest.approx([clean / 2 / distance] * 3, rel=1e-4)


def test_an_agent_scores_as_it_does_beside_another(states):
    """The same agent twice scores the same, to the last digit, and another does not."""
    for name in ("color-jitter", "background"):
        one, same, other = compare(name, [make_agent(1), make_agent(1), make_agent(2)], states)["kl"]
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)
        assert np.array_equal(compare(name, [make_agent(2)], states)["kl"][0], other)
        assert one.min() > 0


def test_rows_of_labels_and_agents(states):
    """Each has its agents' numbers; a label has the mean of its trainings."""
    agents = [make_agent(seed) for seed in (1, 1, 2, 3)]
    folders = ["single", "pair/agent_1", "pair/agent_2", "other"]
    policies = make_policies(*agents, labels="ABBB", folders=folders)
    setup = make_setup(tests=("random-conv", "return"), num_episodes=2)
    rows = scores(setup, policies, states)
    paths = ["all", *(f"{folder}/agent.pt" for folder in folders)]
    assert [row["checkpoint"] for row in rows] == [paths[0], paths[1], paths[0], *paths[2:]]
    assert [row["label"] for row in rows] == list("AABBBB")
    of_a, single, of_b, first, second, other = rows
    names = {"label", "checkpoint", "seed", "global_step"}
    numbers = {key: value for key, value in single.items() if key not in names}
    for same in (of_a, first):
        assert {key: value for key, value in same.items() if key not in names} == numbers
    assert (of_a["seed"], of_a["global_step"]) == ("0", "unknown")
    assert (of_b["seed"], of_b["global_step"]) == ("1, 2, 3", "100, 200, 300")
    assert (of_b["trainings"], of_b["agents"], second["trainings"], second["agents"]) == (2, 3, 1, 1)
    assert (of_b["states"], of_b["copies"], of_b["episodes"]) == (6, 3, 2)
    for measure in ("kl_mean", "return_clean"):
        pair = (first[measure] + second[measure]) / 2
        assert of_b[measure] == pytest.approx((pair + other[measure]) / 2)
    pair = (first["kl_mean"] + second["kl_mean"]) / 2
    assert of_b["kl_between_trainings"] == pytest.approx(abs(pair - other["kl_mean"]) / 2**0.5)
    assert len({row["kl_mean"] for row in rows}) == 4


def test_each_perturbation_has_its_return(states, monkeypatch):
    """Beside the clean one, and only if it is asked for."""
    returns = {"clean": 8.0, "random-conv": 4.0, "background": 6.0, "no-background": 2.0, "monochrome": 1.0}

    def play_returns(name, setup, agents):
        return np.full((len(agents), 3), returns[name])

    monkeypatch.setattr(robust, "play_returns", play_returns)
    setup = make_setup(tests=("return", "rendering", "random-conv"))
    rows = scores(setup, make_policies(Blind()), states)
    assert [row["perturbation"] for row in rows[::2]] == list(returns)[1:]
    for row in rows:
        assert row["return_clean"] == 8
        assert row["return_perturbed"] == returns[row["perturbation"]]
        assert row["episodes"] == 3
    rows = scores(make_setup(tests=("random-conv",)), make_policies(Blind()), states)
    assert "return_clean" not in rows[0]


def test_the_return_is_of_one_whole_episode_under_one_draw(clocks, monkeypatch):
    """Also when those that are still under way are not the first environments."""
    views = []

    def apply(obs, parameters):
        assert obs[:, 0, 0, 0].tolist() == parameters.tolist()
        views.append(len(parameters))
        return obs + 100

    def draw(rng, num):
        return torch.arange(num)

    monkeypatch.setitem(robust.PIXELS, "color-jitter", (draw, apply))
    agent = Blind(keep=True)
    returns = robust.play_returns("color-jitter", make_setup(num_episodes=10), [agent, Blind()])
    assert returns.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] * 2
    assert views == [*range(10, 0, -1)] * 2
    assert [len(seen) for seen in agent.seen] == [*range(10, 0, -1)]
    assert min(seen.min() for seen in agent.seen) >= 100 / 255
    one, other = clocks
    assert len({tuple(actions) for actions in one.actions}) == 10  # samples, not one greedy action
    assert np.array_equal(one.actions, other.actions)
    rng = robust.generator(make_setup(), "episodes")
    noisy = [agent.actor(torch.zeros(1, 1)).numpy() + rng.gumbel(size=(10, 15)) for _ in range(10)]
    assert [actions[9] for actions in one.actions] == [each[9].argmax() for each in noisy]
    robust.play_returns("clean", make_setup(num_episodes=10), [clean := Blind(keep=True)])
    assert min(seen.min() for seen in clean.seen) == 0


@pytest.mark.parametrize("name", RENDERINGS)
def test_the_return_is_played_in_the_other_rendering(name):
    """From the first step to the last, on unseen levels, the same and with the same actions."""
    clean = BlindEncoder(keep=True)
    other = BlindEncoder(keep=True)
    setup = make_setup(num_episodes=6)
    returns = robust.play_returns("clean", setup, [clean])
    assert np.array_equal(robust.play_returns(name, setup, [other]), returns)
    assert len(clean.seen) == len(other.seen)
    assert len({image.numpy().tobytes() for image in clean.seen[0]}) == 6
    for step in (0, 5, len(clean.seen) - 1):
        assert not torch.equal(clean.seen[step], other.seen[step])
    changed = (clean.seen[0] != other.seen[0]).flatten(1).any(dim=1)
    assert changed.sum() >= 4
    if name == "no-background":
        assert other.seen[0].mean() < clean.seen[0].mean()


def make_row(label: str, name: str, number: float, **values) -> dict:
    row = {"env_id": "maze", "distribution_mode": "easy", "perturbation": name, "label": label}
    row |= {"checkpoint": "all", "trainings": 2, "global_step": "1000", "kl_std": 0.25}
    row |= {"kl_between_trainings": 0.125}
    for k, measure in enumerate(robust.MEASURES):
        row[f"{measure}_mean"] = number + 0.01 * k
        row[f"{measure}_standard_error"] = 0.02 + 0.001 * k
    return row | values


def test_table_by_hand():
    """A line for each label, none for a single agent; what is missing."""
    row = make_row("a|b", "monochrome", 0.5, kl_mean=3.14159e-6, kl_standard_error=2.04e-7)
    kept = {"return_kept_mean": None, "return_kept_standard_error": None}
    alone = {"trainings": 1, "kl_between_trainings": None}
    rows = [row, row | {"checkpoint": "x.pt"}, row | kept | alone]
    lines = robust.markdown(rows).splitlines()
    start = "| maze, easy | monochrome | a\\|b | 2 | 1000 | 0.5 ± 0.02 | 3.14e-06 ± 2e-07 | 0.52 ± 0.022 "
    assert lines[2] == start + "| 0.53 ± 0.023 | 0.54 ± 0.024 | 0.55 ± 0.025 | 0.25 | 0.125 |"
    assert lines[3].endswith("| 0.54 ± 0.024 | - | 0.25 | - |")
    assert len(lines) == 4
    assert {len(line.replace("\\|", "").split("|")) for line in lines} == {15}
    for measure in ("return_kept_mean", "return_kept_standard_error"):
        del row[measure]
    assert "return" not in robust.markdown([row])


def render(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_picture_of_the_copies(states):
    """The observation and 9 copies of it, or as many as there are."""
    one = States(states.obs[:1], states.saves[:1])
    figure = robust.draw_copies(make_setup(), one)
    (axis,) = figure.axes
    picture = axis.images[0].get_array().reshape(5, 68, 10, 68, 3)
    assert [text.get_text() for text in axis.get_yticklabels()] == list(robust.count_copies(make_setup(), 9))
    for row, number in zip(picture, [10, 10, 10, 2, 2]):
        images = row[2:66, :, 2:66].swapaxes(0, 1)
        assert np.array_equal(images[0], one.obs[0])
        assert len({image.tobytes() for image in images[:number]}) == number
        assert (images[number:] == 255).all()
    assert (picture[:, :2] == 255).all()
    assert render(figure).std() > 10


def test_picture_of_tsne(states, monkeypatch):
    """For each agent a point for every copy and a star for the observation; a color for each label."""
    given = []

    class FirstTwo:
        def __init__(self, perplexity, init, random_state):
            given.append(perplexity)

        def fit_transform(self, points):
            given.append(points)
            return points[:, :2]

    one = States(states.obs[:1], states.saves[:1])
    agents = [make_agent(1), make_agent(2), make_agent(4)]
    policies = make_policies(*agents, labels=["A", "$", "$"])
    monkeypatch.setattr(robust, "TSNE", FirstTwo)
    figure = robust.draw_tsne("color-jitter", 7, make_setup(), policies, one)
    (shown,) = robust.show_copies("color-jitter", make_setup(), one, 7)
    expected = torch.cat([robust.look(agent, shown)[0] for agent in agents]).numpy()
    perplexity, points = given
    assert perplexity == pytest.approx(23 / 3)
    assert np.array_equal(points, expected)
    lines = figure.axes[0].lines
    for i, (copies, star) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        assert np.array_equal(star.get_xydata()[0], expected[8 * i, :2])
        assert np.array_equal(copies.get_xydata(), expected[8 * i + 1 : 8 * i + 8, :2])
        assert (copies.get_marker(), star.get_marker()) == ("o", "*")
    assert [line.get_color() for line in lines] == ["C0", "C0", "C1", "C1", "C1", "C1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "$"]
    robust.draw_tsne("color-jitter", 100, make_setup(), policies, one)
    assert given[2] == 30


def test_picture_of_the_scores():
    """Bars as high as the means for each label; no panel for returns that nobody played."""
    rows = []
    for i, label in enumerate("AB"):
        for j, name in enumerate(("random-conv", "monochrome")):
            row = make_row(label, name, 0.1 + 0.2 * i + 0.05 * j)
            rows += [row, row | {"checkpoint": "0.pt", "kl_mean": 9.0}]
    figure = robust.draw_scores(GAME, rows)
    assert len(figure.axes) == 6
    assert render(figure).std() > 10
    for k, (axis, title) in enumerate(zip(figure.axes, robust.MEASURES.values())):
        assert axis.get_title() == title
        expected = [0.1, 0.15, 0.3, 0.35]
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == pytest.approx([height + 0.01 * k for height in expected])
        middles = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches]
        assert middles == pytest.approx([-0.2, 0.8, 0.2, 1.2])
        segments = [segment for bars in axis.collections for segment in bars.get_segments()]
        errors = [np.ptp(segment[:, 1]) / 2 for segment in segments]
        assert errors == pytest.approx([0.02 + 0.001 * k] * 4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
    for row in rows:
        row["return_kept_mean"] = row["return_kept_standard_error"] = None
    assert np.isnan([bar.get_height() for bar in robust.draw_scores(GAME, rows).axes[5].patches]).all()
    for row in rows:
        del row["return_kept_mean"]
    assert len(robust.draw_scores(GAME, rows).axes) == 5


def test_pictures_of_a_game(monkeypatch):
    """Of the observation that varies most, by the first perturbation that has several copies."""
    drawn = []
    monkeypatch.setattr(robust, "draw_copies", lambda setup, state: drawn.append(state))
    monkeypatch.setattr(robust, "draw_tsne", lambda *inputs: drawn.append(inputs[:2]))
    monkeypatch.setattr(robust, "draw_scores", lambda game, rows: drawn.append(rows))
    obs = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    obs[1, :32] = 200
    obs[2] = 255
    met = States(obs, [b"0", b"1", b"2"])
    kinds = robust.draw_game(make_setup(tests=("rendering",)), [], met, ["row"])
    assert list(kinds) == ["copies_starpilot_easy", "scores_starpilot_easy", "tsne_starpilot_easy"]
    shown, rows, tsne = drawn
    assert torch.equal(shown.obs, obs[1:2])
    assert shown.saves == [b"1"]
    assert (rows, tsne) == (["row"], ("background", 12))
    robust.draw_game(make_setup(), [], met, [])
    assert drawn[-1] == ("random-conv", 100)
    kinds = robust.draw_game(make_setup(Game("chaser", "hard"), tests=("rendering",)), [], met, [])
    assert list(kinds) == ["copies_chaser_hard", "scores_chaser_hard"]


def save_agent(path: Path, agent, script="ppo_procgen", steps=500, **settings) -> Path:
    """An agent.pt as the scripts write it."""
    args = {"env_id": "fruitbot", "distribution_mode": "easy", "channels": (4, 4, 4)}
    args |= {"exp_name": script, "seed": 1} | settings
    content = {"script": script, "args": args, "global_step": steps, "agent": agent.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


WORDS = "--num-states 6 --num-copies 3 --num-episodes 3 --device cpu".split()


def run_here(line: str):
    robust.main(tyro.cli(Args, args=[*line.split(), *WORDS]))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robust, "TSNE_COPIES", 9)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the shell, on a pair and a single agent."""
    folder = tmp_path_factory.mktemp("robustness")
    for i in (1, 2):
        save_agent(folder / f"runs/pair/agent_{i}/agent.pt", make_agent(i), "mdpo_procgen")
    save_agent(folder / "runs/single/agent.pt", make_agent(3), steps=600, seed=2)
    words = ["--checkpoints", "runs", "--tests", "random-conv", "return", "--output", "deep/out", *WORDS]
    command = [sys.executable, str(ROOT / "robustness_eval.py"), *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result, folder


def test_run_from_the_shell(finished):
    result, folder = finished
    output = folder / "deep" / "out"
    pictures = [f"{kind}_fruitbot_easy.png" for kind in ("copies", "scores", "tsne")]
    assert {each.name for each in output.iterdir()} == {*pictures, "results.csv", "results.json", "table.md"}
    table = (output / "table.md").read_text()
    lines = [
        "fruitbot, easy, MDPO: runs/pair/agent_1/agent.pt, 500 steps",
        "fruitbot, easy, MDPO: runs/pair/agent_2/agent.pt, 500 steps",
        "fruitbot, easy, PPO: runs/single/agent.pt, 600 steps",
        "fruitbot, easy, random-conv: numbers in deep/out",
        f"\n{table}",
        "finished: deep/out\n",
    ]
    assert result.stdout == "\n".join(lines)
    assert "Warning" not in result.stderr
    content = json.loads((output / "results.json").read_text())
    assert content["settings"]["num_states"] == 6
    assert content["settings"]["checkpoints"] == ["runs"]
    rows = content["results"]
    assert [(row["label"], row["trainings"], row["agents"]) for row in rows] == [
        ("MDPO", 1, 2),
        ("MDPO", 1, 1),
        ("MDPO", 1, 1),
        ("PPO", 1, 1),
        ("PPO", 1, 1),
    ]
    assert [row["seed"] for row in rows] == ["1", "1", "1", "2", "2"]
    assert len({row["kl_mean"] for row in rows}) == 4
    with (output / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(rows[0])
    assert [float(line["kl_mean"]) for line in lines] == [row["kl_mean"] for row in rows]


def test_same_seed_same_numbers(finished, place, monkeypatch):
    """To the last digit, in another process."""
    _, folder = finished
    monkeypatch.setattr(robust, "GATHERING_STEPS", GATHERING_STEPS)
    os.symlink(folder / "runs", place / "runs")
    run_here("--checkpoints runs --tests return random-conv --output again")
    assert (place / "again/results.csv").read_bytes() == (folder / "deep/out/results.csv").read_bytes()


def test_every_agent_once_by_game(place):
    """Of folders and files, in the order of the command line; the same agent may have two labels."""
    for i in (2, 1):
        save_agent(place / f"run/agent_{i}/agent.pt", make_agent(i), "mdspo_procgen")
    save_agent(place / "hard.pt", make_agent(3), distribution_mode="hard", exp_name="ppo_procgen+wide")
    save_agent(place / "other.pt", make_agent(4), "spo_procgen", exp_name="mine+2")
    given = map(Path, ("hard.pt", "run/agent_2", "run", "other.pt", place / "run/agent_2/agent.pt"))
    games = robust.read_policies(Args(tuple(given)), CPU)
    found = {}
    for game, policies in games.items():
        found[game] = [(label, str(checkpoint.path)) for label, checkpoint in policies]
    assert found == {
        Game("fruitbot", "hard"): [("PPO, wide", "hard.pt")],
        Game("fruitbot", "easy"): [
            ("MDSPO", "run/agent_2/agent.pt"),
            ("MDSPO", "run/agent_1/agent.pt"),
            ("SPO", "other.pt"),
        ],
    }
    args = Args((Path("run"), Path("run/agent_1"), Path("hard.pt")), labels=("A", "B", "A"))
    by_game = robust.read_policies(args, CPU)
    labels = [[policy.label for policy in policies] for policies in by_game.values()]
    assert labels == [["A", "A", "B"], ["A"]]


def test_several_games(place):
    """In one table; the rows of one game alone are in its pictures."""
    save_agent(place / "runs/a/agent.pt", make_agent(1))
    save_agent(place / "runs/b/agent.pt", make_agent(2), env_id="chaser")
    run_here("--checkpoints runs --tests rendering")
    (output,) = (place / "robustness").iterdir()
    rows = json.loads((output / "results.json").read_text())["results"]
    games = ["fruitbot"] * 6 + ["chaser"] * 4
    assert [row["env_id"] for row in rows] == games
    names = {
        f"{kind}_{game}.png" for kind in ("copies", "scores") for game in ("fruitbot_easy", "chaser_easy")
    }
    assert {each.name for each in output.glob("*.png")} == {*names, "tsne_fruitbot_easy.png"}


def test_numbers_are_written_after_each_perturbation_and_before_the_pictures(place, monkeypatch):
    save_agent(place / "agent.pt", make_agent())
    compare = robust.compare

    def compare_two(name, *rest):
        if name == "monochrome":
            raise MemoryError
        return compare(name, *rest)

    monkeypatch.setattr(robust, "compare", compare_two)
    with pytest.raises(MemoryError):
        run_here("--checkpoints agent.pt --tests rendering --output out")
    assert {each.name for each in (place / "out").iterdir()} == {"results.csv", "results.json", "table.md"}
    rows = json.loads((place / "out/results.json").read_text())["results"]
    assert [row["perturbation"] for row in rows[::2]] == ["background", "no-background"]
    assert (place / "out/table.md").read_text() == robust.markdown(rows)


class Code:
    """What torch.load must not run."""

    def __reduce__(self):
        return print, ("run",)


def spoil(folder: Path):
    """Files that are no agent, by what is wrong with them."""
    agent = make_agent()
    good = save_agent(folder / "good.pt", agent)
    content = torch.load(good, weights_only=True)
    changed = {
        "code": Code(),
        "list": [1, 2],
        "text_args": content | {"args": "hard"},
        "no_channels": content | {"args": {}},
        "wide": content | {"args": content["args"] | {"channels": (8, 4, 4)}},
        "pong": content | {"args": content["args"] | {"env_id": "pong"}},
        "actions": content | {"agent": robust.Agent(7, (4, 4, 4)).state_dict()},
        "pictures": content | {"agent": robust.Agent(15, (4, 4, 4), (32, 32, 3)).state_dict()},
        "gray": content | {"agent": robust.Agent(15, (4, 4, 4), (64, 64, 1)).state_dict()},
    }
    nan = {name: weight.clone() for name, weight in content["agent"].items()}
    nan["actor.bias"][3] = math.nan
    changed["nan"] = content | {"agent": nan}
    for name, value in changed.items():
        torch.save(value, folder / f"{name}.pt")
    (folder / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (folder / "text.pt").write_text("not an agent")
    (folder / "empty").mkdir()
    for name in ("single", "pair", "alone"):
        (folder / name).mkdir()
        torch.save({"script": "ppo_procgen", "args": {}, "agents": []}, folder / name / "checkpoint.pt")
    save_agent(folder / "single/agent.pt", agent)
    save_agent(folder / "pair/agent_1/agent.pt", agent)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoiled")
    spoil(folder)
    return folder


FILES = [
    ("missing.pt", "No such file"),
    ("cut.pt", "damaged"),
    ("text.pt", "damaged"),
    ("code.pt", "damaged"),
    ("empty", "Is a directory"),
    ("list.pt", "is no agent.pt"),
    ("alone/checkpoint.pt", "is no agent.pt"),
    ("single/checkpoint.pt", "is no agent.pt; single/agent.pt would do"),
    ("pair/checkpoint.pt", "is no agent.pt; pair/agent_1/agent.pt would do"),
    ("text_args.pt", "does not fit"),
    ("no_channels.pt", "does not fit: 'channels'"),
    ("wide.pt", "size mismatch for encoder.0.weight"),
    ("actions.pt", "actor.weight: copying a param with shape torch.Size([7, 256])"),
    ("pictures.pt", "copying a param with shape torch.Size([256, 64])"),
    ("gray.pt", "copying a param with shape torch.Size([4, 1, 3, 3])"),
    ("nan.pt", "not all finite"),
]


@pytest.mark.parametrize(("name", "reason"), FILES)
def test_a_file_that_is_no_agent(name, reason, spoiled, monkeypatch):
    monkeypatch.chdir(spoiled)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        robust.read_agent(Path(name))
    assert name in str(error.value)
    assert reason in str(error.value)
    if "would do" not in reason:
        assert "would do" not in str(error.value)


def test_what_an_agent_file_holds(spoiled):
    """Also one that was written before the steps were."""
    checkpoint = robust.read_agent(spoiled / "good.pt")
    assert checkpoint[:2] == (spoiled / "good.pt", "ppo_procgen")
    assert (checkpoint.args["env_id"], checkpoint.global_step) == ("fruitbot", 500)
    for name, weight in make_agent().state_dict().items():
        assert torch.equal(checkpoint.agent.state_dict()[name], weight)
    content = torch.load(spoiled / "good.pt", weights_only=True)
    del content["global_step"]
    torch.save(content, spoiled / "old.pt")
    assert robust.read_agent(spoiled / "old.pt").global_step is None


LINES = [
    ("", "--checkpoints needs"),
    ("--checkpoints", "--checkpoints needs"),
    ("--checkpoints missing.pt", "--checkpoints: cannot read missing.pt"),
    ("--checkpoints good.pt pong.pt", "pong.pt is for pong"),
    ("--checkpoints empty", "no agent.pt in the folder empty"),
    ("--checkpoints good.pt --num-states 1", "--num-states must be at least 2, not 1"),
    ("--checkpoints good.pt --num-copies 0", "--num-copies must be at least 1, not 0"),
    ("--checkpoints good.pt --num-episodes 1", "--num-episodes must be at least 2, not 1"),
    ("--checkpoints good.pt --seed -1", "--seed must be at least 0, not -1"),
    ("--checkpoints good.pt --num-states many", "--num-states"),
    ("--checkpoints good.pt --tests", "--tests needs one beside return"),
    ("--checkpoints good.pt --tests return", "--tests needs one beside return"),
    ("--checkpoints good.pt --tests random_conv", "random-conv"),
    ("--checkpoints good.pt --labels a b", "--labels needs one for each of 1 --checkpoints, not 2"),
    ("--checkpoints good.pt --device gpu", "--device"),
    ("--checkpoints good.pt --device cuda", "--device cuda"),
    ("--checkpoints good.pt --output empty", "--output empty exists"),
    ("--checkpoints good.pt --output good.pt/x", "--output: "),
    ("--checkpoints good.pt --chunk-size 5", "--chunk-size"),
]


@pytest.mark.parametrize(("line", "reason"), LINES, ids=[line or "nothing" for line, _ in LINES])
def test_bad_input_is_one_message(line, reason, spoiled, monkeypatch, capsys):
    monkeypatch.chdir(spoiled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = sorted(spoiled.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        robust.main(tyro.cli(Args, args=line.split()))
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert reason in " ".join(err.replace("│", " ").split())
    assert sorted(spoiled.rglob("*")) == before
