"""robustness_eval.py: known numbers, Procgen's saved states, pictures, whole runs, faults of users."""

import csv
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from common import ROOT, error_message, load, make_agents, save_agent
from procgen import ProcgenGym3Env
from scipy.spatial.transform import Rotation

import robustness_eval as robust
from robustness_eval import Args, Checkpoint, Game, Setup, States

GAME = Game("starpilot", "easy")
RENDERINGS = ["background", "no-background", "monochrome"]
GATHERING_STEPS = robust.GATHERING_STEPS
SMALL = "--num-states 6 --num-copies 3 --num-episodes 3 --device cpu"

# Games with few backgrounds, many, and one alone; the others are tried among the slow tests.
FAST_GAMES = ["chaser", "coinrun", "starpilot"]
SLOW_GAMES = sorted(robust.BACKGROUNDS.keys() - set(FAST_GAMES))
GAMES = FAST_GAMES + [pytest.param(env_id, marks=pytest.mark.slow) for env_id in SLOW_GAMES]


def make_setup(game: Game = GAME, **settings) -> Setup:
    settings = {"num_states": 6, "num_copies": 3, "num_episodes": 3} | settings
    args = Args(checkpoints=(Path("-"),), **settings)
    return Setup(game, args, torch.device("cpu"))


def make_agent(seed: int):
    (agent,) = make_agents(robust, 1, seed)
    return agent


def make_checkpoints(agents: list, labels="ABC", folders="012") -> list[Checkpoint]:
    checkpoints = []
    for i, agent in enumerate(agents):
        path = Path(folders[i], "agent.pt")
        checkpoint = Checkpoint(path, "ppo_procgen", {"seed": i}, 100 * i, agent, labels[i])
        checkpoints.append(checkpoint)
    return checkpoints


def score(setup: Setup, checkpoints: list[Checkpoint], states: States) -> list[dict]:
    rows = []
    for new_rows, _ in robust.score(setup, checkpoints, states):
        rows += new_rows
    return rows


class Blind(torch.nn.Module):
    """What the test agents are: encoder and actor are methods. Keeps what it is shown, but does not look."""

    def __init__(self, logits=None):
        super().__init__()
        self.logits = torch.linspace(0, 1, 15) if logits is None else logits
        self.seen = []

    def encoder(self, images):
        self.seen.append(images.clone())
        return torch.zeros(len(images), 2)

    def actor(self, encodings):
        return self.logits.repeat(len(encodings), 1)


class Brightness(torch.nn.Module):
    """The mean of the picture, in [0, 1], is the logit of action 0; all others are 0."""

    def encoder(self, images):
        return images.double().mean((1, 2, 3))[:, None]

    def actor(self, encodings):
        return torch.nn.functional.pad(encodings, (0, 14))


def always(action: int) -> Blind:
    return Blind(1000 * torch.eye(15)[action])


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Most tests need no states of late steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "GATHERING_STEPS", 50)
        yield


@pytest.fixture(scope="module")
def states():
    return robust.gather_states(make_setup(), [always(2), always(7)])


# Numbers.


def test_divergences_by_hand():
    """Of three policies of two actions; the greedy action of equal ones is the first."""
    clean = torch.tensor([0.9, 0.1], dtype=torch.float64)
    perturbed = torch.stack([torch.full_like(clean, 0.5), clean.flip(0), clean])
    entropy, kl, tv, changes = robust.divergences(clean.log(), perturbed.log() + 5)
    first = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    last = 0.8 * math.log(9)
    assert kl.tolist() == pytest.approx([first, last, 0])
    assert tv.tolist() == pytest.approx([0.4, 0.8, 0])
    expected = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert entropy.tolist() == pytest.approx([expected] * 3)
    assert changes.tolist() == [0, 1, 0]


def test_summary_by_hand():
    """Of agents that trained as a pair, and one alone, on two states: the trainings' means are 4 and 10, the
    states' 5.5 and 8.5."""
    of_agents = np.array([0.0, 8.0, 4.0])
    of_states = np.array([[0.0, 1.0], [2.0, 5.0]])
    values = np.add.outer(of_agents, of_states)
    summary = robust.summarize(values, ["pair", "alone", "pair"])
    assert summary["mean"] == 7
    assert summary["std"] == pytest.approx(values.std())
    assert summary["between_trainings"] == pytest.approx(6 / 2**0.5)
    assert summary["standard_error"] == pytest.approx(1.5)
    assert robust.summarize(values[:2], ["pair", "pair"])["between_trainings"] is None


def test_share_of_the_return_by_hand():
    clean = np.array([[1.0, 3.0, 2.0]])
    perturbed = np.array([[1.0, 1.0, 1.0]])
    kept = robust.return_kept(clean, perturbed)
    assert kept["return_kept_mean"] == 0.5
    assert (kept["return_clean"], kept["return_perturbed"]) == (2, 1)
    residuals = np.array([0.5, -0.5, 0.0])
    assert kept["return_kept_standard_error"] == pytest.approx(residuals.std(ddof=1) / 3**0.5 / 2)
    for clean_return in (-clean, 0 * clean):
        kept = robust.return_kept(clean_return, perturbed)
        assert kept["return_kept_mean"] is kept["return_kept_standard_error"] is None
    # Trainings whose residuals cancel level by level leave no error.
    mixed = np.array([[1.0, 0.5, 1.5], [1.0, 1.5, 0.5]])
    assert robust.return_kept(np.full((2, 3), 2.0), mixed)["return_kept_standard_error"] == 0


# Perturbations.


def random_pictures(num: int):
    torch.manual_seed(5)
    return torch.randint(256, (num, 64, 64, 3), dtype=torch.uint8)


def test_random_conv_is_each_image_under_its_own_kernel():
    obs = random_pictures(5)
    kernels = robust.draw_kernels(np.random.default_rng(0), 5)
    out = robust.random_conv(obs, kernels)
    assert out.shape == obs.shape
    for image, weights, result in zip(obs, kernels, out):
        images = image.permute(2, 0, 1)[None] / 255
        (alone,) = torch.nn.functional.conv2d(images, weights, padding=1).clamp(0, 1)
        torch.testing.assert_close(result / 255, alone.permute(1, 2, 0), rtol=1e-4, atol=1e-5)


def test_draws():
    """Kernels are standard Gaussian; jitter is uniform over its ranges."""
    kernels = robust.draw_kernels(np.random.default_rng(0), 4000)
    assert abs(kernels.mean()) < 0.01
    assert abs(kernels.std() - 1) < 0.01
    assert abs((kernels**4).mean() - 3) < 0.1
    jitter = robust.draw_jitter(np.random.default_rng(0), 4000)
    for column, low, high in zip(jitter.T, (0.6, 0.6, 0.6, -0.5), (1.4, 1.4, 1.4, 0.5)):
        assert low <= column.min() < low + 0.01
        assert high - 0.01 < column.max() <= high
        assert column.mean() == pytest.approx((low + high) / 2, abs=0.03)
    assert np.corrcoef(jitter.T)[~np.eye(4, dtype=bool)].max() < 0.1


def jitter_by_hand(colors, brightness, contrast, saturation, hue):
    """Of a picture that is half the one and half the other color, (2, 3) in [0, 1]."""
    luma = np.array([0.299, 0.587, 0.114])
    colors = np.clip(colors * brightness, 0, 1)
    mean_gray = (colors @ luma).mean()
    colors = np.clip(mean_gray + contrast * (colors - mean_gray), 0, 1)
    gray = (colors @ luma)[:, None]
    colors = np.clip(gray + saturation * (colors - gray), 0, 1)
    turn = Rotation.from_rotvec(2 * np.pi * hue * np.ones(3) / 3**0.5)
    return np.clip(turn.apply(colors), 0, 1)


@pytest.mark.parametrize(
    "factors", [(1, 0.5, 1, 0), (1.4, 0.6, 1, 0.1), (0.7, 1.4, 0.6, 1 / 3), (1.4, 1.4, 1.4, -0.2)], ids=str
)
def test_jitter_of_two_colors(factors):
    """Contrast is about the grey of the whole picture, saturation about that of each pixel; every step sees
    what the one before it has clamped; the hue turns red towards green."""
    colors = np.array([[250, 120, 30], [20, 10, 70]])
    obs = torch.full((2, 64, 64, 3), 128, dtype=torch.uint8)  # the second picture is of another grey
    obs[0, :, :32] = torch.tensor(colors[0])
    obs[0, :, 32:] = torch.tensor(colors[1])
    out = robust.color_jitter(obs, torch.tensor([factors, factors]))
    expected = 255 * jitter_by_hand(colors / 255, *factors)
    assert out[0, 5, 5].numpy() == pytest.approx(expected[0], abs=1e-2)
    assert out[0, 60, 60].numpy() == pytest.approx(expected[1], abs=1e-2)


def play(envs, steps: int):
    """Rewards, ends and pictures from now on, under the same random actions for all."""
    rng = np.random.default_rng(1)
    trace = []
    for _ in range(steps):
        reward, obs, first = envs.observe()
        trace.append((reward, first, obs["rgb"]))
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
        envs.set_state(rewritten)
        new_rewards, new_ends, new_pictures = play(envs, 150)
        assert np.array_equal(new_rewards, rewards)
        assert np.array_equal(new_ends, ends)
        assert (new_pictures[0] != pictures[0]).any((1, 2, 3)).sum() >= 4
        if name == "no-background":
            assert new_pictures[0].mean() < pictures[0].mean()
    envs.set_state(saves)
    assert np.array_equal(envs.observe()[1]["rgb"], pictures[0])


def test_copies_of_each_state(states):
    """After the observation, all different; backgrounds in an order of each state's own."""
    setup = make_setup()
    most = {"random-conv": 50, "color-jitter": 50, "background": 12, "no-background": 1, "monochrome": 1}
    assert robust.count_copies(setup, 50) == most
    for name, copies in robust.count_copies(setup, 12).items():
        shown = list(robust.show_copies(name, setup, states, copies))
        assert len(shown) == 6
        for obs, seen in zip(states.obs, shown):
            assert torch.equal(seen[0], obs)
            assert len({image.numpy().tobytes() for image in seen}) == 1 + copies
    rng = np.random.default_rng(0)
    orders = [robust.rewrite(states.saves[0], GAME, "background", 12, rng) for _ in range(2)]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_a_save_of_another_layout_is_refused(states):
    save = states.saves[0]
    fields = robust.find_fields(save, GAME)
    robust.find_fields(robust.replace_int(save, fields["background"], 12), GAME)
    for name, value in (("use_backgrounds", 0), ("monochrome", 1), ("background", -1), ("background", 13)):
        other = robust.replace_int(save, fields[name], value)
        with pytest.raises(ValueError, match="laid out"):
            robust.rewrite(other, GAME, "background", 1, np.random.default_rng(0))


# States and returns.


def test_environments_are_those_of_the_full_distribution():
    """Not of the 500 training levels, and of the distribution mode: mazes are smaller where it is easy."""
    made = robust.make_test_envs(Game("maze", "easy"), 16, np.random.default_rng(0))
    seed = int(np.random.default_rng(0).integers(2**31))
    expected = ProcgenGym3Env(16, "maze", rand_seed=seed, num_levels=0, distribution_mode="easy")
    assert np.array_equal(made.observe()[1]["rgb"], expected.observe()[1]["rgb"])


def test_gathered_states_are_as_seen_and_as_many_from_each(states):
    """Three from each of two agents, each by its own play, from a level of its own."""
    envs = robust.make_test_envs(GAME, 6, np.random.default_rng(0))
    envs.set_state(states.saves)
    assert np.array_equal(envs.observe()[1]["rgb"], states.obs.numpy())
    assert len({info["level_seed"] for info in envs.get_info()}) == 6
    alike = robust.gather_states(make_setup(), [always(2), always(2)])
    assert torch.equal(alike.obs[:3], states.obs[:3])
    assert not torch.equal(alike.obs[3:], states.obs[3:])
    of_another_seed = robust.gather_states(make_setup(seed=2), [always(2)])
    assert not torch.equal(of_another_seed.obs[:3], states.obs[:3])


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
        self.place = np.zeros((self.num, 3), np.uint8)
        self.place[:, 0] = range(self.num)
        self.place[:, 1:] = divmod(self.step, 256)
        obs = np.broadcast_to(self.place[:, None, None], (self.num, 64, 64, 3))
        firsts = self.step % (np.arange(self.num) + 1) == 0
        return np.full(self.num, self.step > 0, np.float32), {"rgb": obs}, firsts

    def get_state(self):
        return [place.tobytes() for place in self.place]

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
    logits = torch.full((15,), -1000.0)
    logits[:3] = torch.tensor([0.6, 0.3, 0.1]).log()
    agent = Blind(logits)
    gathered = robust.gather_states(make_setup(num_states=79), [agent, agent])
    found = gathered.obs[:, 0, 0].numpy()
    assert [each.tobytes() for each in found] == gathered.saves
    assert found[:, 0].tolist() == [*range(40), *range(40)]
    steps = 256 * found[:, 1].astype(int) + found[:, 2]
    assert steps.min() < 30
    assert 482 < steps.max() < 512
    assert abs(np.mean(steps) - 256) < 50
    assert steps[:40].tolist() != steps[40:].tolist()
    actions = clocks[0].actions
    assert len(actions) == steps[:40].max()
    assert sum(map(len, agent.seen)) == steps.sum()
    shares = np.bincount(np.array(actions)[:20].flatten()) / 800
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.07)


def test_a_blind_policy_scores_zero_and_keeps_its_return(states):
    agent = make_agent(0)
    agent.encoder[0].weight.data.zero_()
    rows = score(make_setup(), make_checkpoints([agent]), states)
    assert len(rows) == 2 * 5
    for row in rows:
        for measure in ("kl", "tv", "action_changes", "encoding_shift"):
            for key in ("mean", "std", "standard_error"):
                assert abs(row[f"{measure}_{key}"]) < 1e-6
        assert row["return_clean"] == row["return_perturbed"] > 0
        assert (row["return_kept_mean"], row["return_kept_standard_error"]) == (1, 0)


def test_a_policy_that_reads_only_the_brightness_scores_what_a_hand_computes(monkeypatch):
    """Under half the identity kernel the logit of action 0 halves, and so does the encoding, which is the
    same number."""
    draws = []

    def draw(rng, num):
        draws.append((num, rng.integers(2**60)))
        kernel = torch.zeros(num, 3, 3, 3, 3)
        kernel[:, range(3), range(3), 1, 1] = 0.5
        return kernel

    monkeypatch.setitem(robust.PIXELS, "random-conv", (draw, robust.random_conv))
    obs = random_pictures(4)
    obs //= torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None]  # none as bright as another
    values, _ = robust.compare("random-conv", 3, make_setup(), [Brightness()], States(obs, [b""] * 4))
    assert {each.shape for each in values.values()} == {(1, 4, 3)}
    assert [num for num, _ in draws] == [3] * 4
    assert len(set(draws)) == 4
    brightness = obs.double().mean((1, 2, 3)).numpy() / 255
    distance = math.sqrt(2 * brightness.var(ddof=1))  # root mean square of all pairs
    for i, clean in enumerate(brightness):
        p = math.exp(clean) / (math.exp(clean) + 14)
        q = math.exp(clean / 2) / (math.exp(clean / 2) + 14)
        kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        entropy = -p * math.log(p) - (1 - p) * math.log((1 - p) / 14)
        assert values["kl"][0, i] == pytest.approx([kl] * 3, rel=1e-4)
        assert values["entropy"][0, i] == pytest.approx([entropy] * 3, rel=1e-6)
        assert values["encoding_shift"][0, i] == pytest.approx([clean / 2 / distance] * 3, rel=1e-4)


def test_rows_of_labels_and_agents(states):
    """Each has its agents' numbers; a label has the mean of its trainings."""
    agents = [make_agent(seed) for seed in (1, 1, 2, 3)]
    folders = ["single", "pair/agent_1", "pair/agent_2", "other"]
    checkpoints = make_checkpoints(agents, "ABBB", folders)
    setup = make_setup(tests=("random-conv", "return"), num_episodes=2)
    rows = score(setup, checkpoints, states)
    paths = [f"{folder}/agent.pt" for folder in folders]
    assert [row["checkpoint"] for row in rows] == ["all", paths[0], "all", *paths[1:]]
    assert [row["label"] for row in rows] == list("AABBBB")
    of_a, single, of_b, first, second, other = rows
    for measure in ("kl_mean", "kl_std", "kl_standard_error", "return_clean"):
        assert of_a[measure] == single[measure] == first[measure]
        assert first[measure] != second[measure]
    assert (of_a["seed"], of_a["global_step"]) == ("0", "unknown")
    assert (of_b["seed"], of_b["global_step"]) == ("1, 2, 3", "100, 200, 300")
    assert (of_b["trainings"], of_b["agents"], second["trainings"], second["agents"]) == (2, 3, 1, 1)
    assert (of_b["states"], of_b["copies"], of_b["episodes"]) == (6, 3, 2)
    assert of_b["return_clean"] != of_b["return_perturbed"]
    for measure in ("return_clean", "kl_mean"):
        pair = (first[measure] + second[measure]) / 2
        assert of_b[measure] == pytest.approx((pair + other[measure]) / 2)
    assert of_b["kl_between_trainings"] == pytest.approx(abs(pair - other["kl_mean"]) / 2**0.5)


def test_the_return_is_of_one_whole_episode_under_one_draw(clocks, monkeypatch):
    """Also when those that are still under way are not the first environments."""
    views = []

    def apply(obs, parameters):
        assert obs[:, 0, 0, 0].tolist() == parameters.tolist()
        views.append(len(parameters))
        return obs + 100

    monkeypatch.setitem(robust.PIXELS, "color-jitter", (lambda rng, num: torch.arange(num), apply))
    agent = Blind()
    setup = make_setup(num_episodes=10)
    returns = robust.play_returns("color-jitter", setup, [agent, Blind()])
    assert returns.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] * 2
    assert views == [*range(10, 0, -1)] * 2
    assert min(seen.min() for seen in agent.seen) >= 100 / 255
    one, other = clocks
    assert np.array_equal(one.actions, other.actions)
    noise = robust.generator(setup, "episodes").gumbel(size=(10, 10, 15))
    noisy = agent.logits.numpy() + noise[:, 9]
    assert [actions[9] for actions in one.actions] == noisy.argmax(axis=1).tolist()


@pytest.mark.parametrize("name", RENDERINGS)
def test_the_return_is_played_in_the_other_rendering(name):
    """From the first step to the last, on unseen levels, the same and with the same actions."""
    clean, other = Blind(), Blind()
    setup = make_setup(num_episodes=6)
    returns = robust.play_returns("clean", setup, [clean])
    assert np.array_equal(robust.play_returns(name, setup, [other]), returns)
    assert len({image.numpy().tobytes() for image in clean.seen[0]}) == 6
    for one, another in zip(clean.seen, other.seen, strict=True):
        assert not torch.equal(one, another)
    changed = (clean.seen[0] != other.seen[0]).flatten(1).any(dim=1)
    assert changed.sum() >= 4


# Table and pictures.


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
    missing = {"return_kept_mean": None, "trainings": 1, "kl_between_trainings": None}
    table = robust.make_tables([row, row | {"checkpoint": "x.pt"}, row | missing], [])
    _, _, line, other_line = table.splitlines()
    start = "| maze, easy | monochrome | a\\|b | 2 | 1000 | 0.5 ± 0.02 | 3.14e-06 ± 2e-07 | 0.52 ± 0.022 "
    assert line == start + "| 0.53 ± 0.023 | 0.54 ± 0.024 | 0.55 ± 0.025 | 0.25 | 0.125 |"
    assert other_line.endswith("| 0.54 ± 0.024 | - | 0.25 | - |")
    assert {each.replace("\\|", "").count("|") for each in table.splitlines()} == {14}
    del row["return_kept_mean"]
    assert "return" not in robust.make_tables([row], [])


def test_pairs():
    """Each two agents, and each two trainings with the mean over their agents. The same agent twice is as
    alike as can be, also on the copies; the table has means over pairs of trainings."""
    states = States(random_pictures(30), [b""] * 30)
    agents = [make_agent(seed) for seed in (1, 2, 1, 3)]
    folders = ["pair/agent_1", "pair/agent_2", "single", "other"]
    checkpoints = make_checkpoints(agents, "AABB", folders)
    ((rows, pairs),) = robust.score(make_setup(tests=("random-conv",)), checkpoints, states)
    of_agents = [row for row in pairs if row["of"] == "agents"]
    paths = [f"{folder}/agent.pt" for folder in folders]
    assert [(row["first"], row["second"]) for row in of_agents] == list(itertools.combinations(paths, 2))
    assert [row["relation"] for row in of_agents] == ["pair", *5 * ["never met"]]
    assert [row["labels"] for row in of_agents] == ["A", *4 * ["A and B"], "B"]
    assert {row["perturbation"] for row in pairs} == {"random-conv"}
    for name in robust.LIKENESS:
        values = [row[name] for row in of_agents]
        assert values[1] == pytest.approx(1)
        assert max(values[0], *values[2:]) < 0.999
        assert values[3] == pytest.approx(values[0])
    assert of_agents[0]["cka"] != of_agents[0]["cka_copies"]
    of_trainings = [row for row in pairs if row["of"] == "trainings"]
    first_agents = [(paths[i], paths[j]) for i, j in [(0, 1), (0, 2), (0, 3), (2, 3)]]
    assert [(row["first"], row["second"]) for row in of_trainings] == first_agents
    met = of_agents[1]["cka"], of_agents[3]["cka"]
    assert of_trainings[1]["cka"] == pytest.approx(sum(met) / 2)
    _, table = robust.make_tables(rows, pairs).split("\n\n")
    lines = [line.split(" | ")[2:5] for line in table.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        ["A, pair", "1"],
        ["A and B, never met", "2"],
        ["B, never met", "1"],
    ]
    mean = (of_trainings[1]["cka"] + of_trainings[2]["cka"]) / 2
    assert lines[1][2] == f"{mean:.3f}"


def test_picture_of_the_copies(states):
    """The observation and 9 copies of it, or as many as there are."""
    one = States(states.obs[:1], states.saves[:1])
    figure = robust.draw_copies(make_setup(), one)
    picture = figure.axes[0].images[0].get_array().reshape(5, 68, 10, 68, 3)
    for row, number in zip(picture, [10, 10, 10, 2, 2]):
        images = row[2:66, :, 2:66].swapaxes(0, 1)
        assert np.array_equal(images[0], one.obs[0])
        assert len({image.tobytes() for image in images[:number]}) == number
        assert (images[number:] == 255).all()


def test_picture_of_the_scores():
    """Bars as high as the means for each label; no panel for returns that nobody played."""
    rows = []
    for label, number in (("A", 0.1), ("B", 0.3)):
        for name, more in (("random-conv", 0), ("monochrome", 0.05)):
            row = make_row(label, name, number + more)
            rows += [row, row | {"checkpoint": "0.pt", "kl_mean": 9.0}]
    rows[0]["return_kept_mean"] = None
    *axes, of_return = robust.draw_scores(GAME, rows).axes
    assert np.isnan(of_return.patches[0].get_height())
    for k, axis in enumerate(axes):
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == pytest.approx([each + 0.01 * k for each in (0.1, 0.15, 0.3, 0.35)])
        segments = [segment for bars in axis.collections for segment in bars.get_segments()]
        errors = [np.ptp(segment[:, 1]) / 2 for segment in segments]
        assert errors == pytest.approx([0.02 + 0.001 * k] * 4)
    for row in rows:
        del row["return_kept_mean"]
    assert len(robust.draw_scores(GAME, rows).axes) == 5


# Whole runs.


def run_here(line: str):
    robust.main(tyro.cli(Args, args=f"{line} {SMALL}".split()))


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robust, "TSNE_COPIES", 9)
    return tmp_path


def test_run_from_the_shell(place, monkeypatch):
    """On a pair and a single agent; again in this process, the same seed gives the same numbers."""
    for i in (1, 2):
        save_agent(place / f"runs/pair/agent_{i}/agent.pt", make_agent(i), "mdpo_procgen")
    save_agent(place / "runs/single/agent.pt", make_agent(3), seed=2)
    line = f"--checkpoints runs --tests random-conv return {SMALL}"
    command = [sys.executable, str(ROOT / "robustness_eval.py"), *line.split(), "--output", "deep/out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output = place / "deep" / "out"
    pictures = [f"{kind}_fruitbot_hard.png" for kind in ("copies", "scores", "tsne")]
    files = {"results.csv", "results.json", "table.md", "pairs.csv"}
    assert {each.name for each in output.iterdir()} == {*pictures, *files}
    lines = [
        "fruitbot, hard, MDPO: runs/pair/agent_1/agent.pt, an unknown number of steps",
        "fruitbot, hard, MDPO: runs/pair/agent_2/agent.pt, an unknown number of steps",
        "fruitbot, hard, PPO: runs/single/agent.pt, an unknown number of steps",
        "fruitbot, hard, random-conv: numbers in deep/out",
        "\n" + (output / "table.md").read_text(),
        "finished: deep/out\n",
    ]
    assert result.stdout == "\n".join(lines)
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert (settings["num_states"], settings["checkpoints"]) == (6, ["runs"])
    rows = read_rows(output)
    assert [row["label"] for row in rows] == ["MDPO"] * 3 + ["PPO"] * 2
    assert [row["seed"] for row in rows] == ["1", "1", "1", "2", "2"]
    with (output / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(rows[0])
    assert [float(line["kl_mean"]) for line in lines] == [row["kl_mean"] for row in rows]
    with (output / "pairs.csv").open(newline="") as file:
        assert [line["of"] for line in csv.DictReader(file)] == 3 * ["agents"] + 2 * ["trainings"]
    monkeypatch.setattr(robust, "GATHERING_STEPS", GATHERING_STEPS)
    run_here("--checkpoints runs --tests return random-conv --output again")
    assert (place / "again/results.csv").read_bytes() == (output / "results.csv").read_bytes()


def test_every_agent_once_by_game(place):
    """Of folders and files, in the order of the command line; the same agent may have two labels."""

    def read(*paths, **settings) -> dict:
        args = Args(tuple(map(Path, paths)), **settings)
        found = {}
        for game, checkpoints in robust.read_checkpoints(args, torch.device("cpu")).items():
            found[game.distribution_mode] = [(each.label, str(each.path)) for each in checkpoints]
        return found

    for i in (2, 1):
        save_agent(place / f"run/agent_{i}/agent.pt", make_agent(i), "mdspo_procgen")
    save_agent(place / "easy.pt", make_agent(3), distribution_mode="easy", exp_name="ppo_procgen+wide")
    save_agent(place / "other.pt", make_agent(4), "spo_procgen", exp_name="mine+2")
    one, two = "run/agent_1/agent.pt", "run/agent_2/agent.pt"
    assert read("easy.pt", "run/agent_2", "run", "other.pt", place / two) == {
        "easy": [("PPO, wide", "easy.pt")],
        "hard": [("MDSPO", two), ("MDSPO", one), ("SPO", "other.pt")],
    }
    assert read("run", "run/agent_1", "easy.pt", labels=("A", "B", "A")) == {
        "hard": [("A", one), ("A", two), ("B", one)],
        "easy": [("A", "easy.pt")],
    }


def test_several_games(place):
    """In one table; each has its pictures. Of chaser there are no several copies."""
    save_agent(place / "runs/a/agent.pt", make_agent(1))
    save_agent(place / "runs/b/agent.pt", make_agent(2), env_id="chaser")
    run_here("--checkpoints runs --tests rendering")
    (output,) = (place / "robustness").iterdir()
    rows = read_rows(output)
    assert [row["env_id"] for row in rows] == ["fruitbot"] * 6 + ["chaser"] * 4
    assert "return_clean" not in rows[0]
    kinds = ["copies_chaser", "copies_fruitbot", "scores_chaser", "scores_fruitbot", "tsne_fruitbot"]
    assert sorted(each.name for each in output.glob("*.png")) == [f"{kind}_hard.png" for kind in kinds]


def test_numbers_are_written_after_each_perturbation_and_before_the_pictures(place, monkeypatch):
    save_agent(place / "agent.pt", make_agent(0))
    compare = robust.compare

    def compare_two(name, *rest):
        if name == "monochrome":
            raise MemoryError
        return compare(name, *rest)

    monkeypatch.setattr(robust, "compare", compare_two)
    with pytest.raises(MemoryError):
        run_here("--checkpoints agent.pt --tests rendering --output out")
    assert {each.name for each in (place / "out").iterdir()} == {"results.csv", "results.json", "table.md"}
    rows = read_rows(place / "out")
    assert [row["perturbation"] for row in rows[::2]] == ["background", "no-background"]
    assert (place / "out/table.md").read_text() == robust.make_tables(rows, [])


# Faults of users.


class Code:
    """What torch.load must not run."""

    def __reduce__(self):
        return print, ("run",)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A folder of files that are no agent, by what is wrong with them, and of good ones."""
    folder = tmp_path_factory.mktemp("spoiled")
    save_agent(folder / "good.pt", make_agent(0))
    content = load(folder / "good.pt")
    args = content["args"]
    nan = make_agent(0)
    nan.actor.bias.data[3] = math.nan
    wrong = {
        "code.pt": Code(),
        "list.pt": [1, 2],
        "wide.pt": content | {"args": args | {"channels": (8, 4, 4)}},
        "pong.pt": content | {"args": args | {"env_id": "pong"}},
        "nan.pt": content | {"agent": nan.state_dict()},
        "checkpoint.pt": {"script": "ppo_procgen", "args": {}, "agents": []},
    }
    for name, value in wrong.items():
        torch.save(value, folder / name)
    del content["global_step"]
    torch.save(content, folder / "old.pt")
    (folder / "cut.pt").write_bytes((folder / "good.pt").read_bytes()[:5000])
    (folder / "empty").mkdir()
    return folder


def test_an_agent_file_without_steps(spoiled):
    """As they were once written."""
    assert robust.read_agent(spoiled / "good.pt").global_step == 0
    checkpoint = robust.read_agent(spoiled / "old.pt")
    assert checkpoint[:2] == (spoiled / "old.pt", "ppo_procgen")
    assert checkpoint.global_step is None


LINES = [
    ("--seed 1", "--checkpoints needs"),
    ("--checkpoints missing.pt", "--checkpoints: cannot read missing.pt: No such file"),
    ("--checkpoints good.pt cut.pt", "cut.pt: it is damaged"),
    ("--checkpoints code.pt", "code.pt: it is damaged"),
    ("--checkpoints list.pt", "list.pt is no agent.pt"),
    ("--checkpoints checkpoint.pt", "checkpoint.pt is no agent.pt"),
    ("--checkpoints wide.pt", "size mismatch for encoder.0.weight"),
    ("--checkpoints nan.pt", "nan.pt are not all finite"),
    ("--checkpoints pong.pt", "pong.pt is for pong"),
    ("--checkpoints empty", "no agent.pt in the folder empty"),
    ("--checkpoints good.pt --num-states 1", "--num-states must be at least 2, not 1"),
    ("--checkpoints good.pt --num-copies 0", "--num-copies must be at least 1, not 0"),
    ("--checkpoints good.pt --num-episodes 1", "--num-episodes must be at least 2, not 1"),
    ("--checkpoints good.pt --seed -1", "--seed must be at least 0, not -1"),
    ("--checkpoints good.pt --tests return", "--tests needs one beside return"),
    ("--checkpoints good.pt --labels a b", "--labels needs one for each of 1 --checkpoints, not 2"),
    ("--checkpoints good.pt --device cuda", "--device cuda"),
    ("--checkpoints good.pt --output empty", "--output empty exists"),
    ("--checkpoints good.pt --output good.pt/x", "--output: "),
]


@pytest.mark.parametrize(("line", "reason"), LINES)
def test_bad_input_is_one_message(line, reason, spoiled, monkeypatch, capsys):
    monkeypatch.chdir(spoiled)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        robust.main(tyro.cli(Args, args=line.split()))
    out, err = capsys.readouterr()
    assert reason in error_message(stop.value.code, out, err)
    assert not (spoiled / "robustness").exists()
