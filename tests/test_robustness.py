"""robustness_eval.py: known numbers, Procgen's saved states, pictures, whole runs, faults of users."""

import csv
import json
import math
import re
import runpy
import shutil
import sys
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
from common import TINY, Probe, flags, read_events, run_folder, run_script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from procgen import ProcgenGym3Env

import robustness_eval as robust
from robustness_eval import BACKGROUNDS, Args, Checkpoint, Game, States

CPU = torch.device("cpu")
GAME = Game("starpilot", "easy")
TINY_ARGS = {"num_states": 6, "num_copies": 3, "num_episodes": 3, "device": "cpu", "num_env_threads": 2}


def make_args(**settings) -> Args:
    return Args(**{"checkpoints": ("-",), **TINY_ARGS, **settings})


def make_agent(seed: int = 0, channels=(4, 4, 4), gain: float = 300.0):
    """A small agent whose policy differs between observations, as a trained one's does."""
    torch.manual_seed(seed)
    agent = robust.Agent(channels=channels)
    agent.actor.weight.data *= gain
    return agent


def save_agent(path, agent, script="ppo_procgen", env_id="starpilot", mode="easy", channels=(4, 4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    args = {"env_id": env_id, "distribution_mode": mode, "channels": channels}
    torch.save({"script": script, "args": args, "agent": agent.state_dict()}, path)
    return str(path)


def checkpoints(*agents, labels=None):
    labels = labels or "ABCDEF"[: len(agents)]
    return [Checkpoint(f"{i}.pt", label, GAME, agent) for i, (label, agent) in enumerate(zip(labels, agents))]


def random_states(num: int = 4) -> States:
    torch.manual_seed(5)
    return States(torch.randint(256, (num, 64, 64, 3), dtype=torch.uint8), [b""] * num)


@pytest.fixture(scope="module")
def states():
    return robust.gather_states(GAME, [make_agent(1), make_agent(2)], make_args(), CPU)


class Constant(torch.nn.Module):
    """Ignores its input and prefers action 7."""

    encoder = torch.nn.Flatten()

    def forward(self, obs):
        logits = torch.linspace(0, 1, 15).repeat(len(obs), 1)
        logits[:, 7] += 1
        return logits, torch.zeros(len(obs))


class Brightness(torch.nn.Module):
    """The mean of the picture, in [0, 1], is the logit of action 0; all others are 0."""

    def forward(self, obs):
        brightness = obs.double().mean((1, 2, 3)) / 255
        return torch.nn.functional.pad(brightness[:, None], (0, 14)), torch.zeros(len(obs))


def kernel(scale: float):
    """The identity kernel, times a scale."""
    weights = torch.zeros(3, 3, 3, 3)
    weights[range(3), range(3), 1, 1] = scale
    return weights


# Divergences and statistics


def test_divergences_by_hand():
    clean, perturbed = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).double(), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    kl, tv, changes, entropy = robust.divergences(clean.log(), perturbed.double().log()).numpy()
    one_way, other_way = 0.9 * math.log(1.8) + 0.1 * math.log(0.2), math.log(0.5 / (0.9 * 0.1) ** 0.5)
    assert kl == pytest.approx([one_way, other_way], rel=1e-6) and one_way != pytest.approx(
        other_way, rel=0.1
    )
    assert tv == pytest.approx([0.4, 0.4])
    assert entropy == pytest.approx([-0.9 * math.log(0.9) - 0.1 * math.log(0.1), math.log(2)])
    same_first = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[5.0, 1.0, 3.0]])
    assert robust.divergences(*same_first)[2].tolist() == [0] and changes.tolist() == [0, 0]
    assert robust.divergences(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))[2].tolist() == [1]


def test_summary_by_hand():
    """Two agents, two states, two copies; the states' means are 2 and 5, the agents' 2 and 5."""
    records = np.array([[[0.0, 1.0], [2.0, 5.0]], [[2.0, 5.0], [6.0, 7.0]]])
    summary = robust.summarize(records)
    assert summary["mean"] == 3.5 and summary["std"] == pytest.approx(records.std())
    assert summary["standard_error"] == pytest.approx(3 / 2**0.5 / 2**0.5)
    assert summary["spread"] == pytest.approx(3 / 2**0.5)
    assert robust.summarize(records[:1])["spread"] is None


def test_share_of_the_return_by_hand():
    clean, perturbed = np.array([[1.0, 3.0, 2.0]]), np.array([[1.0, 1.0, 1.0]])
    kept = robust.return_kept(clean, perturbed)
    assert kept["return_kept_mean"] == 0.5 and (kept["return_clean"], kept["return_perturbed"]) == (2, 1)
    residuals = np.array([0.5, -0.5, 0.0])
    assert kept["return_kept_standard_error"] == pytest.approx(residuals.std(ddof=1) / 3**0.5 / 2)
    assert robust.return_kept(clean, clean)["return_kept_standard_error"] == 0
    assert robust.return_kept(-clean, perturbed)["return_kept_mean"] is None


# Perturbations of the pixels


def test_random_conv_is_each_image_under_its_own_kernel():
    obs, kernels = random_states(5).obs, robust.draw_kernels(np.random.default_rng(0), 5)
    out = robust.random_conv(obs, kernels)
    assert out.shape == obs.shape and kernels.shape == (5, 3, 3, 3, 3)
    for image, weights, result in zip(obs, kernels, out):
        image = image.permute(2, 0, 1)[None] / 255
        alone = torch.nn.functional.conv2d(image, weights, padding=1).clamp(0, 1)[0].permute(1, 2, 0)
        torch.testing.assert_close(result / 255, alone)
    draws = robust.draw_kernels(np.random.default_rng(0), 4000)
    assert abs(draws.mean()) < 0.01 and abs(draws.std() - 1) < 0.01


def test_identity_kernel_changes_nothing():
    obs = random_states().obs
    assert torch.equal(robust.random_conv(obs, kernel(1).expand(4, -1, -1, -1, -1)), obs.float())


def test_neutral_jitter_changes_nothing():
    obs = random_states().obs
    out = robust.color_jitter(obs, torch.tensor([1.0, 1, 1, 0]).expand(4, 4))
    torch.testing.assert_close(out, obs.float(), rtol=0, atol=1e-4)
    agent = make_agent()
    scores = robust.divergences(robust.policy_logits(agent, obs), robust.policy_logits(agent, out))
    assert scores[:3].abs().max() < 1e-8


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
        (2, 1, 1, 0): [255, 200, 120],
    }.items():
        out = robust.color_jitter(obs, torch.tensor([jitter], dtype=torch.float32))
        assert out.shape == (1, 64, 64, 3) and out[0, 9, 9].tolist() == pytest.approx(expected, abs=1e-2)


def test_jitter_is_drawn_over_its_ranges():
    draws = robust.draw_jitter(np.random.default_rng(0), 4000)
    for column, low, high in zip(draws.T, (0.6, 0.6, 0.6, -0.5), (1.4, 1.4, 1.4, 0.5)):
        assert low <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high


@pytest.mark.parametrize("name", robust.PIXELS)
def test_chunks_do_not_change_the_draws(name):
    copies = [
        torch.cat([*robust.perturbed_copies(name, GAME, random_states(), 3, make_args(chunk_size=size), CPU)])
        for size in (5, 64)
    ]
    assert torch.equal(*copies) and len(copies[0]) == 12
    assert len({image.numpy().tobytes() for image in copies[0]}) == 12
    sizes = [
        len(each)
        for each in robust.perturbed_copies(name, GAME, random_states(), 3, make_args(chunk_size=5), CPU)
    ]
    assert sum(sizes) == 12 and max(sizes) <= 5


# Procgen's saved state


def play(envs, steps: int):
    """Rewards, ends and pictures from now on, under the same random actions for all."""
    rng, trace = np.random.default_rng(1), []
    for _ in range(steps):
        reward, obs, first = envs.observe()
        trace.append((reward.copy(), first.copy(), obs["rgb"].copy()))
        envs.act(rng.integers(15, size=envs.num))
    return [np.array(column) for column in zip(*trace)]


@pytest.mark.parametrize("env_id", sorted(BACKGROUNDS))
def test_only_pixels_change(env_id):
    """After a re-rendering the same actions lead to the same rewards and ends, also in the levels that
    follow; a state put back as it was is drawn as it was."""
    game = Game(env_id, "easy")
    envs = ProcgenGym3Env(8, env_id, distribution_mode="easy", rand_seed=3, num_threads=2)
    for _ in range(20):
        envs.act(np.full(8, 7))
        envs.observe()
    records = envs.get_state()
    rewards, ends, pictures = play(envs, 150)
    envs.set_state(records)
    assert np.array_equal(envs.observe()[1]["rgb"], pictures[0])
    for name in ("background", "no-background", "monochrome"):
        if not robust.copies_of(name, game, 9):
            assert env_id == "chaser" and name == "background"
            continue
        rewritten = [robust.rewrite(record, game, name, 1) for record in records]
        assert [len(one) for one in rewritten] == [len(one) for one in records]
        envs.set_state(rewritten)
        new_rewards, new_ends, new_pictures = play(envs, 150)
        assert np.array_equal(new_rewards, rewards) and np.array_equal(new_ends, ends)
        assert (new_pictures[0] != pictures[0]).any((1, 2, 3)).sum() >= 4
    envs.close()


@pytest.mark.parametrize("env_id", sorted(BACKGROUNDS))
def test_every_background_can_be_drawn(env_id):
    """And none that Procgen itself draws from is beyond the table: that would be found as another layout."""
    game = Game(env_id, "hard")
    envs = ProcgenGym3Env(400, env_id, distribution_mode="hard", rand_seed=4, num_threads=2)
    records = envs.get_state()
    shifts = robust.draw_shifts(np.random.default_rng(0), game, 400, 99)
    assert shifts.shape == (400, max(BACKGROUNDS[env_id] - 1, 1))
    assert np.array_equal(np.sort(shifts, 1)[7], np.arange(1, max(BACKGROUNDS[env_id], 2)))
    rewritten = {robust.rewrite(record, game, "background", 0) for record in records}
    assert rewritten == set(records)
    envs.close()
    envs = ProcgenGym3Env(1, env_id, distribution_mode="hard", rand_seed=4, num_threads=0)
    for shift in range(BACKGROUNDS[env_id]):
        envs.set_state([robust.rewrite(records[0], game, "background", shift)])
        envs.observe()
    envs.close()


def test_a_record_of_another_layout_is_refused(states):
    without = robust.rewrite(states.records[0], GAME, "no-background", 0)
    for record, game in ((without, GAME), (states.records[0][4:] + b"\0" * 4, GAME)):
        with pytest.raises(Exception, match=r"laid out|buffer"):
            robust.rewrite(record, game, "background", 1)


def test_chunks_do_not_change_the_renderings(states):
    one, other = (
        torch.cat([*robust.perturbed_copies("background", GAME, states, 12, make_args(chunk_size=n), CPU)])
        for n in (5, 64)
    )
    assert torch.equal(one, other) and one.shape == (72, 64, 64, 3)
    for obs, copies in zip(states.obs, one.view(6, 12, 64, 64, 3)):
        assert len({image.numpy().tobytes() for image in (obs, *copies)}) == 13  # each of the 13 once


# States


def test_gathered_states_are_as_seen_and_as_many_from_each(states):
    """Three from each of two agents, each from a level of its own; another seed gives others."""
    assert states.obs.shape == (6, 64, 64, 3) and states.obs.dtype == torch.uint8 and len(states.records) == 6
    envs = robust.make_test_envs(make_args(), GAME, 6, np.random.default_rng(0))
    envs.set_state(states.records)
    assert np.array_equal(envs.observe()[1]["rgb"], states.obs.numpy())
    assert len({info["level_seed"] for info in envs.get_info()}) == 6
    envs.close()
    alone = robust.gather_states(GAME, [make_agent(1)], make_args(num_states=3), CPU)
    assert torch.equal(alone.obs, states.obs[:3])
    other = robust.gather_states(GAME, [make_agent(1)], make_args(num_states=3, seed=2), CPU)
    assert not torch.equal(other.obs, alone.obs)


@pytest.mark.parametrize("num_states", [64, 65, 150])
def test_number_of_states(num_states, monkeypatch):
    monkeypatch.setattr(robust, "make_test_envs", lambda args, game, num, rng: Probe(num, 0))
    gathered = robust.gather_states(GAME, [Constant()] * 3, make_args(num_states=num_states), CPU)
    assert len(gathered.obs) == len(gathered.records) == 3 * math.ceil(num_states / 3)


# Scores


def test_a_policy_that_ignores_its_input_scores_zero(states):
    rows = robust.score(GAME, checkpoints(Constant()), states, make_args(), CPU)
    assert {row["perturbation"] for row in rows} == set(robust.PERTURBATIONS)
    for row in rows:
        for measure in robust.MEASURES:
            assert row[f"{measure}_mean"] == row[f"{measure}_std"] == row[f"{measure}_standard_error"] == 0
        assert row["return_clean"] == row["return_perturbed"] > 0
        assert (row["return_kept_mean"], row["return_kept_standard_error"]) == (1, 0)


def test_a_policy_that_reads_only_the_brightness_scores_what_a_hand_computes(monkeypatch):
    """Under half the identity kernel the logit of action 0 halves."""
    monkeypatch.setitem(
        robust.PIXELS,
        "random-conv",
        (lambda rng, num: kernel(0.5).expand(num, -1, -1, -1, -1), robust.random_conv),
    )
    states = random_states()
    records = robust.compare("random-conv", GAME, [Brightness()], states, make_args(), CPU)
    assert records.shape == (1, 4, 4, 3)
    for obs, kl, tv, changes in zip(states.obs, *records[0, :3]):
        clean = obs.double().mean().item() / 255
        p, q = (math.exp(x) / (math.exp(x) + 14) for x in (clean, clean / 2))
        assert kl == pytest.approx(
            [p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))] * 3, rel=1e-5
        )
        assert tv == pytest.approx([p - q] * 3, rel=1e-5) and changes.tolist() == [0, 0, 0]


def test_identity_kernel_scores_zero(monkeypatch):
    draw = lambda rng, num: kernel(1).expand(num, -1, -1, -1, -1)  # noqa: E731
    monkeypatch.setitem(robust.PIXELS, "random-conv", (draw, robust.random_conv))
    records = robust.compare("random-conv", GAME, [make_agent()], random_states(), make_args(), CPU)
    assert np.abs(records[:, :3]).max() < 1e-9


def test_identical_checkpoints_score_identically(states):
    """And others do not; the label's row is over its checkpoints."""
    many = checkpoints(make_agent(1), make_agent(1), make_agent(2), labels="ABB")
    rows = robust.score(GAME, many, states, make_args(), CPU)
    numbers = {}
    for row in rows:
        numbers.setdefault((row["label"], row["checkpoint"]), []).append(
            {key: x for key, x in row.items() if key not in ("label", "checkpoint")}
        )
    assert numbers["A", "0.pt"] == numbers["B", "1.pt"] != numbers["B", "2.pt"]
    assert numbers["A", "all"] == numbers["A", "0.pt"]
    for group, one, other in zip(numbers["B", "all"], numbers["B", "1.pt"], numbers["B", "2.pt"]):
        assert group["agents"] == 2 and group["states"] == 6
        assert group["kl_mean"] == pytest.approx((one["kl_mean"] + other["kl_mean"]) / 2)
        assert group["kl_spread"] == pytest.approx(abs(one["kl_mean"] - other["kl_mean"]) / 2**0.5)
        assert group["return_clean"] == pytest.approx((one["return_clean"] + other["return_clean"]) / 2)
        assert one["kl_mean"] > 0


class ReadsTheSide(torch.nn.Module):
    """Plays the Probe without a fault, and on a dark picture the action for the left side."""

    def forward(self, obs):
        right = obs[:, :, 32:].float().mean((1, 2, 3)) > obs[:, :, :32].float().mean((1, 2, 3))
        actions = torch.tensor(Probe.right_actions)[right.long()]
        return 1000 * torch.nn.functional.one_hot(actions, 15).float(), torch.zeros(len(obs))


def test_return_is_of_one_whole_episode_under_one_draw(monkeypatch):
    made, draws = [], []

    def make(args, game, num, rng):
        made.append(Probe(num, int(rng.integers(2**31))))
        return made[-1]

    def blind(rng, num):
        draws.append(num)
        return kernel(-1).expand(num, -1, -1, -1, -1)

    monkeypatch.setattr(robust, "make_test_envs", make)
    monkeypatch.setitem(robust.PIXELS, "random-conv", (blind, robust.random_conv))
    args = make_args(num_episodes=40, chunk_size=7)
    assert robust.play_returns("clean", GAME, [ReadsTheSide()] * 2, args, CPU).tolist() == [[4.0] * 40] * 2
    assert draws == []
    (blinded,) = robust.play_returns("random-conv", GAME, [ReadsTheSide()], args, CPU)
    assert draws == [40] and 1 < blinded.mean() < 3  # the right action is the left side's half of the time


# Pictures


def render(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_picture_of_the_copies(states):
    one = States(states.obs[:1], states.records[:1])
    figure = robust.draw_copies(robust.PERTURBATIONS, GAME, one, make_args())
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == 3 + 3 * 9  # the observation and two renderings, then nine copies of each
    assert np.array_equal(images[0], one.obs[0]) and all(not np.array_equal(x, images[0]) for x in images[1:])
    assert render(figure).std() > 10


def test_picture_of_tsne(states):
    """For each checkpoint a point for every copy and a star for the observation, also if all are one."""
    one = States(states.obs[:1], states.records[:1])
    constant = make_agent(3)
    for parameter in constant.encoder[0].parameters():
        parameter.data.zero_()
    for agents in ([make_agent(1), make_agent(2, (8, 4, 4)), make_agent(4)], [constant]):
        many = checkpoints(*agents, labels="ABB"[: len(agents)])
        figure = robust.draw_tsne("random-conv", GAME, many, one, make_args(), CPU)
        points = [np.asarray(each.get_offsets()) for each in figure.axes[0].collections]
        assert [len(each) for each in points] == [100, 1] * len(agents) + [0]
        assert all(np.isfinite(each).all() for each in points) and render(figure).std() > 10
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names[:-1] == (["A", "B 1", "B 2"] if len(agents) == 3 else ["A"])


def test_picture_of_the_scores(states):
    many = checkpoints(make_agent(1), make_agent(2))
    for tests, panels in ((("random-conv", "rendering", "return"), 4), (("random-conv", "rendering"), 3)):
        rows = robust.score(GAME, many, states, make_args(tests=tests), CPU)
        figure = robust.draw_scores(rows)
        assert len(figure.axes) == panels and render(figure).std() > 10
        heights = sorted(bar.get_height() for bar in figure.axes[0].patches)
        assert heights == pytest.approx(sorted(row["kl_mean"] for row in rows if row["checkpoint"] == "all"))


# Whole runs


def run_here(monkeypatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["robustness_eval.py", *words])
    robust.main(robust.read_command_line())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from the shell on the two agents of an MDPO run, trained here."""
    folder = tmp_path_factory.mktemp("robustness")
    tiny = {"env_id": "starpilot", "distribution_mode": "easy", "total_timesteps": 64, "eval_interval": 0}
    for name in ("train", "eval"):
        (folder / name).mkdir()
    result = run_script("mdpo_procgen", folder / "train", *flags(**TINY | tiny))
    assert result.returncode == 0, result.stderr.decode()
    words = ["--checkpoints", str(run_folder(folder / "train" / "work"))]
    words += flags(**TINY_ARGS, output="out", log_dir="tb")
    result = run_script("robustness_eval", folder / "eval", *words)
    assert result.returncode == 0, result.stderr.decode()
    return result, words, folder / "eval" / "work"


def test_run_from_the_shell(finished):
    result, words, work = finished
    assert sorted(each.name for each in work.iterdir()) == ["out", "tb"]
    pictures = [f"{kind}_starpilot_easy.png" for kind in ("copies", "scores", "tsne")]
    files = {each.name for each in (work / "out").iterdir()}
    assert files == {*pictures, "results.csv", "results.json", "table.md"}
    out, err = result.stdout.decode(), result.stderr.decode()
    table = (work / "out" / "table.md").read_text()
    assert out == f"\n{table}\nfinished: out\n" and "Warning" not in err
    assert len(table.splitlines()) == 2 + 5 and len({line.count("|") for line in table.splitlines()}) == 1
    content = json.loads((work / "out" / "results.json").read_text())
    assert content["settings"]["num_states"] == 6 and content["settings"]["checkpoints"] == words[1:2]
    rows = [row for row in content["results"] if row["perturbation"] == "random-conv"]
    assert [(row["label"], row["agents"]) for row in rows] == [("MDPO", 2), ("MDPO", 1), ("MDPO", 1)]
    assert rows[1]["kl_mean"] != rows[2]["kl_mean"]
    assert all(row["states"] == 6 and row["kl_mean"] > 0 for row in rows)
    with (work / "out" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["kl_mean"]) for line in lines] == [row["kl_mean"] for row in content["results"]]


def test_tensorboard_has_the_numbers_and_the_pictures(finished):
    _, _, work = finished
    events = read_events(work / "tb")
    rows = json.loads((work / "out" / "results.json").read_text())["results"]
    for row in rows:
        tag = f"starpilot_easy/{row['perturbation']}/kl_mean/{row['label']}/{row['checkpoint']}"
        (event,) = events.Scalars(tag)
        assert event.value == pytest.approx(row["kl_mean"])
    assert set(events.Tags()["images"]) == {f"{kind}_starpilot_easy" for kind in ("copies", "scores", "tsne")}


def test_same_seed_same_numbers(finished, tmp_path, monkeypatch):
    """To the last digit, in another process and with another chunk size."""
    _, words, work = finished
    monkeypatch.chdir(tmp_path)
    run_here(monkeypatch, *words[:2], *flags(**TINY_ARGS, output="again", chunk_size=11))
    assert (tmp_path / "again" / "results.csv").read_bytes() == (work / "out" / "results.csv").read_bytes()
    run_here(monkeypatch, *words[:2], *flags(**TINY_ARGS, output="other", seed=2, tests="random-conv"))
    one, other = (
        json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("again", "other")
    )
    assert one[0]["kl_mean"] != other[0]["kl_mean"]


def test_games_widths_modes_and_labels_in_one_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [
        save_agent(tmp_path / "a" / "agent.pt", make_agent(1)),
        save_agent(
            tmp_path / "b" / "agent.pt", make_agent(2, (8, 4, 6)), "mdspo_procgen", channels=(8, 4, 6)
        ),
        save_agent(tmp_path / "c" / "agent.pt", make_agent(3), env_id="chaser"),
        save_agent(tmp_path / "d" / "agent.pt", make_agent(3), mode="hard"),
    ]
    common = [*flags(**TINY_ARGS), "--tests", "color-jitter", "rendering"]
    run_here(monkeypatch, "--checkpoints", *paths, paths[0], "--output", "out/deep", *common)
    rows = json.loads((tmp_path / "out" / "deep" / "results.json").read_text())["results"]
    found = [
        (row["env_id"], row["distribution_mode"], row["label"])
        for row in rows
        if row["perturbation"] == "monochrome"
    ]
    one, other = ("starpilot", "easy", "PPO"), ("starpilot", "easy", "MDSPO")
    assert found == [
        one,
        one,
        other,
        other,
        *[("chaser", "easy", "PPO")] * 2,
        *[("starpilot", "hard", "PPO")] * 2,
    ]
    assert {row["perturbation"] for row in rows if row["env_id"] == "chaser"} == {
        "color-jitter",
        "no-background",
        "monochrome",
    }
    assert "chaser has no other background" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "deep").glob("*.png"))) == 9
    run_here(monkeypatch, "--checkpoints", "a", "b", "--labels", "mine", "mine", "--output", "out/2", *common)
    rows = json.loads((tmp_path / "out" / "2" / "results.json").read_text())["results"]
    assert {row["label"] for row in rows} == {"mine"} and rows[0]["agents"] == 2


def test_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, "--help")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert [each.name for each in fields(Args) if f"--{each.name.replace('_', '-')}" not in out] == []


# Bad input


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def spoil(tmp_path):
    """Files that are no agent, by what is wrong with them."""
    good = save_agent(tmp_path / "good.pt", make_agent())
    content = torch.load(good, weights_only=True)
    save = {"code": Code(), "list": [1, 2], "checkpoint": {"script": "ppo_procgen", "format": 1, "args": {}}}
    for key, value in {"env_id": "pong", "distribution_mode": "memory", "channels": (8, 4, 4)}.items():
        save[key] = content | {"args": content["args"] | {key: value}}
    save["text_channels"] = content | {"args": content["args"] | {"channels": "wide"}}
    nan = {name: weight.clone() for name, weight in content["agent"].items()}
    nan["actor.bias"][3] = math.nan
    save["nan"] = content | {"agent": nan}
    for name, value in save.items():
        torch.save(value, tmp_path / f"{name}.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (tmp_path / "flipped.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    (tmp_path / "text.pt").write_text("not an agent")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()


CASES = [
    ("", ["--checkpoints"]),
    ("--checkpoints", ["--checkpoints"]),
    ("--checkpoints missing.pt", ["missing.pt", "No such file"]),
    ("--checkpoints folder", ["folder", "no agent.pt"]),
    *(
        (f"--checkpoints good.pt {name}.pt", [f"{name}.pt", "damaged"])
        for name in ("cut", "flipped", "text", "empty")
    ),
    *((f"--checkpoints {name}.pt", [f"{name}.pt", "no agent.pt"]) for name in ("code", "list", "checkpoint")),
    ("--checkpoints env_id.pt", ["env_id.pt", "pong"]),
    ("--checkpoints distribution_mode.pt", ["distribution_mode.pt", "memory"]),
    ("--checkpoints channels.pt", ["channels.pt", "fit"]),
    ("--checkpoints text_channels.pt", ["text_channels.pt", "fit"]),
    ("--checkpoints nan.pt", ["nan.pt", "finite"]),
    ("--checkpoints good.pt --num-states 0", ["--num-states"]),
    ("--checkpoints good.pt --num-copies 0", ["--num-copies"]),
    ("--checkpoints good.pt --num-copies -1", ["--num-copies"]),
    ("--checkpoints good.pt --num-episodes 1", ["--num-episodes"]),
    ("--checkpoints good.pt --chunk-size 0", ["--chunk-size"]),
    ("--checkpoints good.pt --num-states many", ["--num-states", "many"]),
    ("--checkpoints good.pt --tests", ["--tests", "random-conv"]),
    ("--checkpoints good.pt --tests random_conv", ["--tests", "random-conv", "color-jitter"]),
    ("--checkpoints good.pt --tests return", ["--tests", "return"]),
    ("--checkpoints good.pt --labels a b", ["--labels", "1"]),
    ("--checkpoints good.pt --device gpu", ["--device", "gpu", "cpu"]),
    ("--checkpoints good.pt --device cuda:99", ["--device", "99"]),
    ("--checkpoints good.pt --output folder", ["--output", "folder"]),
    ("--checkpoints good.pt --output good.pt/x", ["--output good.pt/x: "]),
    ("--checkpoints good.pt --output /proc/x", ["--output /proc/x: "]),
    ("--checkpoints good.pt --log-dir good.pt/x", ["--log-dir good.pt/x: "]),
    ("--checkpoints good.pt --log-dir /proc", ["--log-dir /proc: "]),
    ("--checkpoints good.pt --seed -1", ["--seed"]),
    ("--no-such-flag 1", ["--no-such-flag"]),
]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoiled")
    spoil(folder)
    return folder


def run_as_main(monkeypatch, *words: str) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["robustness_eval.py", *words])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # to be put back
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(robust.__file__, run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line or "nothing" for line, _ in CASES])
def test_bad_input_is_one_line(line, words, spoiled, tmp_path, monkeypatch, capfd):
    shutil.copytree(spoiled, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(tmp_path.rglob("*"))
    assert run_as_main(monkeypatch, *line.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"robustness_eval\.py: error: [^\n]+\n", err)
    assert [word for word in words if word not in err] == []
    assert sorted(tmp_path.rglob("*")) == before


SHORT = ["--checkpoints", "good.pt", *flags(**TINY_ARGS), "--tests", "color-jitter"]


@pytest.fixture
def good(spoiled, tmp_path, monkeypatch):
    """A folder to work in, with one agent."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(spoiled / "good.pt", tmp_path)
    return tmp_path


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


def test_a_run_that_fails_leaves_no_folder(good, monkeypatch, capsys):
    """Here while the pictures are written."""
    monkeypatch.setattr(robust.Figure, "savefig", raising(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *SHORT, "--output", "out")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "error: --output out: No space left on device\n" in err
    assert [each.name for each in good.iterdir()] == ["good.pt"]


def test_results_are_kept_if_another_has_taken_the_name(good, monkeypatch, capsys):
    run_tests = robust.run_tests
    monkeypatch.setattr(robust, "run_tests", lambda *inputs: (good / "out").mkdir() or run_tests(*inputs))
    run_here(monkeypatch, *SHORT, "--output", "out")
    (folder,) = good.glob("out-*")
    assert (folder / "results.csv").exists() and not list((good / "out").iterdir())
    assert capsys.readouterr().out.endswith(f"finished: {folder.name}\n")


def test_results_are_kept_if_the_curves_cannot_be_written(good, monkeypatch, capsys):
    monkeypatch.setattr(robust, "write_tensorboard", raising(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *SHORT, "--output", "out", "--log-dir", "tb")
    assert stop.value.code == 2 and (good / "out" / "table.md").exists()
    assert "error: --log-dir tb: No space left on device; the results are in out\n" in capsys.readouterr().err


def test_interrupt(good, monkeypatch, capfd):
    monkeypatch.setattr("procgen.ProcgenGym3Env", raising(KeyboardInterrupt()))
    assert run_as_main(monkeypatch, *SHORT, "--output", "out") == 130
    assert capfd.readouterr().err == "starpilot: states\n"
    assert [each.name for each in good.iterdir()] == ["good.pt"]
