"""Agents at play: the level is the one asked for, returns on levels, videos, wrong command lines."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from common import ROOT, error_message, make_agents, save_agent
from PIL import Image
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES

import ppo_procgen

sys.path.insert(0, str(ROOT / "benchmark"))
import play


def make_agent(seed: int):
    (agent,) = make_agents(ppo_procgen, 1, seed)
    return agent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """With one/agent.pt and other/agent_2/agent.pt."""
    monkeypatch.chdir(tmp_path)
    save_agent(Path("one/agent.pt"), make_agent(1), exp_name="mine")
    save_agent(Path("other/agent_2/agent.pt"), make_agent(2), exp_name="mine", seed=2)


def run(line: str):
    play.main(tyro.cli(play.Args, args=line.split()))


def make_game(env_id: str, mode: str):
    return ppo_procgen.Args(env_id=env_id, distribution_mode=mode, device="cpu")


# Levels.


def play_both(env_id: str, mode: str, level: int, num_steps: int):
    """An episode beside Procgen's own level, with the same random actions."""
    episode = play.Episode(make_game(env_id, mode), level, "rgb_array")
    options = {"distribution_mode": mode, "start_level": level, "num_levels": 1, "rand_seed": level}
    envs = ProcgenGym3Env(1, env_id, render_mode="rgb_array", **options)
    assert envs.get_info()[0]["level_seed"] == level
    rng = np.random.default_rng(level)
    total = 0.0
    for steps in range(num_steps):
        picture = envs.get_info()[0]["rgb"]
        assert np.array_equal(episode.picture, picture)
        assert np.array_equal(episode.obs, envs.observe()[1]["rgb"])
        action = rng.integers(15)
        episode.step(action)
        envs.act(np.array([action]))
        reward, _, first = envs.observe()
        total += reward[0]
        assert episode.total == pytest.approx(total)
        assert (episode.over, episode.steps) == (first[0], steps + 1)
        if episode.over:
            break
    return episode, picture


@pytest.mark.parametrize("env_id", ENV_NAMES)
def test_level_is_the_one_asked_for(env_id):
    for level in (499, 2**31 - 2):
        play_both(env_id, "hard", level, num_steps=3)


def test_whole_episode():
    """Its return is not 0, and its last picture is the one before the end."""
    episode, last_picture = play_both("chaser", "easy", 7, num_steps=10_000)
    assert episode.over
    assert episode.total > 0
    assert np.array_equal(episode.picture, last_picture)


def test_actions_are_sampled_from_the_policy():
    agent = ppo_procgen.Agent(channels=(4, 4, 4))
    agent.actor.weight.data.zero_()
    agent.actor.bias.data[:] = torch.tensor([0.7, 0.3] + 13 * [1e-9]).log()
    torch.manual_seed(0)
    actions = play.sample_actions(agent, np.zeros((500, 64, 64, 3), np.uint8))
    assert set(actions) == {0, 1}
    assert np.mean(actions) == pytest.approx(0.3, abs=0.07)


class Countdown:
    """In place of an Episode: shows its level, wants it as the action, and pays it. It lasts 1, 2 or 3 steps,
    and every fifth 10 more."""

    number = 0

    def __init__(self, game, level: int, render_mode=None):
        self.level = level
        self.obs = np.full((1, 64, 64, 3), level, np.uint8)
        self.steps = 0
        self.total = 0.0
        self.over = False
        self.length = level % 3 + 1
        if Countdown.number % 5 == 0:
            self.length += 10
        Countdown.number += 1

    def step(self, action: int):
        assert action == self.level
        assert not self.over
        self.steps += 1
        self.total += self.level
        self.over = self.steps == self.length


@pytest.fixture
def played(monkeypatch) -> Counter:
    """Countdowns instead of Procgen, with the right actions; how many each agent has taken."""
    played = Counter()

    def sample_actions(agent, obs) -> list[int]:
        played[agent] += len(obs)
        return obs[:, 0, 0, 0].tolist()

    monkeypatch.setattr(Countdown, "number", 0)
    monkeypatch.setattr(play, "Episode", Countdown)
    monkeypatch.setattr(play, "sample_actions", sample_actions)
    return played


def make_checkpoint(agent: str) -> play.Checkpoint:
    return play.Checkpoint(Path(agent), "ppo_procgen", {"exp_name": agent, "seed": 1}, None, agent)


def test_every_episode_counts_once(played, monkeypatch):
    """However short it is. Here five on each level, one of them long."""
    monkeypatch.setattr(play, "PARALLEL", 4)
    table = play.measure(make_checkpoint("A"), None, range(3, 10), 5)
    assert table.level.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert table.mean_length.tolist() == [3, 4, 5, 3, 4, 5, 3]
    assert table.mean_return.tolist() == [9, 16, 25, 18, 28, 40, 27]
    assert set(table.episodes) == {5}


def test_frames_of_levels(played, monkeypatch, capsys):
    """A frame for each step of the longest episode, which is cut, then a second of the end. Who is done first
    waits."""

    def draw_frame(titles, episodes) -> list:
        assert titles == ["A, seed 1", "B, seed 1"]
        return [(each.level, each.steps, each.over) for each in episodes]

    monkeypatch.setattr(play, "draw_frame", draw_frame)
    checkpoints = [make_checkpoint("A"), make_checkpoint("B")]
    frames = play.draw_levels(checkpoints, None, range(4, 6), max_steps=8)
    expected = [[(4, step, False), (4, min(step, 2), step >= 2)] for step in range(8)]
    expected += 15 * [[(4, 8, True), (4, 2, True)]]
    expected += [2 * [(5, step, False)] for step in range(3)]
    expected += 15 * [2 * [(5, 3, True)]]
    assert list(frames) == expected
    assert played == {"A": 11, "B": 5}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "level 4: return 32 in 8 steps, 8 in 2 steps"
    assert lines[1] == "level 5: return 15 in 3 steps, 15 in 3 steps"


# What comes out.


def test_returns(place, capsys):
    """A row for each agent and level, a line for each agent."""
    run("one/agent.pt other/agent_2/agent.pt --levels 5:9 --episodes-per-level 2 --csv deep/returns.csv")
    table = pd.read_csv("deep/returns.csv")
    assert table.columns.tolist() == "level mean_return mean_length episodes agent global_step".split()
    assert table.level.tolist() == 2 * [5, 6, 7, 8]
    assert table.agent.tolist() == 4 * ["one/agent.pt"] + 4 * ["other/agent_2/agent.pt"]
    assert set(table.episodes) == {2}
    assert set(table.global_step) == {0}
    line, other_line = capsys.readouterr().out.splitlines()
    assert line.startswith("one/agent.pt (mine, seed 1, 0 steps): return ")
    assert other_line.startswith("other/agent_2/agent.pt (mine, seed 2, agent 2, 0 steps): return ")
    pattern = r"return (\S+) ± (\S+) \(standard error over 4 levels\), length (\S+)"
    mean, error, length = map(float, re.search(pattern, line).groups())
    returns = table.mean_return[:4]
    assert mean == pytest.approx(returns.mean(), rel=0.001)
    assert error == pytest.approx(returns.std(ddof=1) / 2, rel=0.06)
    assert length == pytest.approx(table.mean_length[:4].mean(), rel=0.001)


def test_seed_and_mode(place, capsys):
    """The same agent with the same seed plays the same, whoever has played before. The mode is that of the
    training, but for one that is told."""
    other = "other/agent_2/agent.pt"
    lines = []
    for words in ("", "--distribution-mode hard", "--seed 1", "--distribution-mode easy"):
        run(f"{other} --levels 5:9 {words}")
        lines += capsys.readouterr().out.splitlines()
    run(f"one/agent.pt {other} --levels 5:9")
    lines += capsys.readouterr().out.splitlines()
    told_by_default, hard, seed, easy, _, after_another = lines
    assert told_by_default == hard == after_another
    assert hard not in (seed, easy)
    run(f"{other} --levels 5:6")
    assert re.search(r"return \S+, length \S+\n$", capsys.readouterr().out)  # of one level no standard error


def test_a_frame():
    """Pictures side by side; the texts above them tell the return and the end."""
    episodes = [play.Episode(make_game("maze", "easy"), 7, "rgb_array") for _ in range(3)]
    episodes[1].total = episodes[2].total = 3
    episodes[2].over = True
    frame = play.draw_frame(3 * ["mine, seed 1"], episodes)
    parts = np.split(np.asarray(frame), 3, axis=1)
    for part in parts:
        assert np.array_equal(part[72:, :512], episodes[0].picture)
    assert len({part[:72].tobytes() for part in parts}) == 3


def test_files(place, capsys):
    run("one/agent.pt other/agent_2/agent.pt --max-steps 3")
    *levels, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in levels] == ["level 10000", "level 10001", "level 10002"]
    assert last == "wrote videos/fruitbot.mp4 and videos/fruitbot.gif"
    assert sorted(path.name for path in Path("videos").iterdir()) == ["fruitbot.gif", "fruitbot.mp4"]
    gif = Image.open("videos/fruitbot.gif")
    assert gif.size == (480, 270)
    assert gif.n_frames == pytest.approx(3 * (3 + 15) / 15 * 10, abs=2)
    assert min(gif.convert("RGB").resize((1, 1)).getpixel((0, 0))) > 10  # pictures, not black


def test_video_of_chosen_levels(place, capsys, monkeypatch):
    """Its seed is that of the actions."""
    films = []
    monkeypatch.setattr(play, "write_video", lambda path, frames: films.append([*map(np.asarray, frames)]))
    for seed in (3, 3, 4):
        run(f"one/agent.pt --levels 7:8 --video film.mp4 --max-steps 5 --seed {seed}")
    assert np.array_equal(films[0], films[1])
    assert not np.array_equal(films[0], films[2])
    _, level, last = capsys.readouterr().out.splitlines()[:3]
    assert level.startswith("level 7: return ")
    assert last == "wrote film.mp4 and film.gif"


@pytest.mark.parametrize(("size", "num", "least"), [(320, 45, 10), (16, 400, 190)])
def test_gif_is_small(size, num, least, tmp_path):
    """3 MB of large noisy frames; of small ones 20 seconds."""
    rng = np.random.default_rng(0)
    noise = 255 * rng.integers(2, size=(num, size, size), dtype=np.uint8)
    play.write_video(tmp_path / "film.mp4", [Image.fromarray(frame).convert("RGB") for frame in noise])
    gif = tmp_path / "film.gif"
    assert gif.stat().st_size < 4_000_000
    assert least <= Image.open(gif).n_frames <= 200


def test_failed_video_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(play, "find_ffmpeg", lambda: "false")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"before")
    with pytest.raises(OSError, match="ffmpeg could not write"):
        play.write_video(film, [])
    assert film.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [film]


WRONG = [
    ("", "CHECKPOINTS"),
    ("one/agent.pt --levels 5", "--levels must be FIRST:END"),
    ("one/agent.pt --levels 0:2147483648", "--levels must be FIRST:END"),
    ("one/agent.pt --levels 0:5 --episodes-per-level 0", "--episodes-per-level must be from 1"),
    ("one/agent.pt --episodes-per-level 2", "need --levels"),
    ("one/agent.pt --video film.gif", "--video must end in .mp4"),
    ("one/agent.pt --max-steps 0", "--max-steps must be from 1"),
    ("one/agent.pt --distribution-mode memory", "--distribution-mode must be"),
    ("one/agent.pt maze.pt", "not fruitbot hard, maze hard"),
    ("one/agent.pt missing.pt", "missing.pt"),
]


@pytest.mark.parametrize(("line", "expected"), WRONG)
def test_wrong_command_line(line, expected, place, capfd):
    save_agent(Path("maze.pt"), make_agent(1), env_id="maze")
    files = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(line)
    assert expected in error_message(stop.value.code, *capfd.readouterr())
    assert sorted(Path().rglob("*")) == files
