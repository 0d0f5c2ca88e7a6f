"""Agents at play: the level is the one asked for, returns on levels, videos, wrong command lines."""

import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from common import ROOT, error_message
from PIL import Image
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES

from ppo_procgen import Agent
from ppo_procgen import Args as TrainingArgs

sys.path.insert(0, str(ROOT / "benchmark"))
import play


def save_agent(path: Path, seed: int = 1, **settings) -> Path:
    """Small, with a policy that differs between observations and between seeds."""
    torch.manual_seed(seed)
    agent = Agent(channels=(4, 4, 4))
    agent.actor.weight.data *= 300
    args = {"env_id": "fruitbot", "distribution_mode": "hard", "channels": (4, 4, 4)}
    args |= {"exp_name": "mine", "seed": seed}
    args |= settings
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"script": "ppo_procgen", "args": args, "agent": agent.state_dict(), "global_step": 1000}
    torch.save(content, path)
    return path


@pytest.fixture
def agents(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    one = save_agent(Path("one/agent.pt"))
    other = save_agent(Path("other/agent_2/agent.pt"), seed=2)
    return [one, other]


def make_game(env_id: str = "fruitbot", mode: str = "easy") -> TrainingArgs:
    return TrainingArgs(env_id=env_id, distribution_mode=mode, device="cpu")


def run(*words):
    args = tyro.cli(play.Args, args=[str(word) for word in words])
    play.main(args)


# Levels.


def play_both(env_id: str, mode: str, level: int, num_steps: int):
    """An episode beside Procgen's own level, with the same random actions."""
    episode = play.Episode(make_game(env_id, mode), level, "rgb_array")
    envs = ProcgenGym3Env(
        num=1,
        env_name=env_id,
        distribution_mode=mode,
        start_level=level,
        num_levels=1,
        rand_seed=level,
        render_mode="rgb_array",
    )
    assert episode.level == envs.get_info()[0]["level_seed"] == level
    rng = np.random.default_rng(level)
    total = 0.0
    while not episode.over and episode.steps < num_steps:
        picture = envs.get_info()[0]["rgb"]
        assert np.array_equal(episode.picture, picture)
        assert np.array_equal(episode.obs, envs.observe()[1]["rgb"])
        assert episode.total == pytest.approx(total)
        steps = episode.steps
        action = int(rng.integers(15))
        episode.step(action)
        envs.act(np.array([action]))
        reward, _, first = envs.observe()
        total += reward[0]
        assert episode.over == first[0]
        assert episode.steps == steps + 1
    assert episode.total == pytest.approx(total)
    return episode, picture


@pytest.mark.parametrize("env_id", ENV_NAMES)
def test_level_is_the_one_asked_for(env_id):
    for mode in ("easy", "hard"):
        first_pictures = set()
        for level in (0, 499, 10_000, 2**31 - 2):
            play_both(env_id, mode, level, num_steps=3)
            first_pictures.add(play.Episode(make_game(env_id, mode), level).obs.tobytes())
        assert len(first_pictures) == 4


def test_whole_episode():
    """Its return is not 0, and its last picture is the one before the end."""
    episode, last_picture = play_both("chaser", "easy", 7, num_steps=10_000)
    assert episode.over
    assert episode.total > 0
    assert np.array_equal(episode.picture, last_picture)


def test_actions_are_sampled_from_the_policy():
    agent = Agent(channels=(4, 4, 4))
    agent.actor.weight.data.zero_()
    agent.actor.bias.data[:] = torch.tensor([0.7, 0.3] + 13 * [1e-9]).log()
    torch.manual_seed(0)
    actions = play.sample_actions(agent, np.zeros((1000, 64, 64, 3), np.uint8))
    assert set(actions) == {0, 1}
    assert np.mean(actions) == pytest.approx(0.3, abs=0.05)


# Returns on levels.


class Countdown:
    """In place of an Episode: shows its level, wants it as the action, and pays it. It lasts 1, 2 or 3 steps,
    and every fifth 10 more."""

    number = 0
    running = 0
    most_running = 0

    def __init__(self, game: TrainingArgs, level: int):
        self.level = level
        self.obs = np.full((1, 64, 64, 3), level, np.uint8)
        self.steps = 0
        self.total = 0.0
        self.over = False
        self.length = level % 3 + 1
        if Countdown.number % 5 == 0:
            self.length += 10
        Countdown.number += 1
        Countdown.running += 1
        Countdown.most_running = max(Countdown.most_running, Countdown.running)

    def step(self, action: int):
        assert action == self.level
        assert not self.over
        self.steps += 1
        self.total += self.level
        self.over = self.steps == self.length
        Countdown.running -= self.over


def test_every_episode_counts_once(monkeypatch):
    """However short it is. Here five on each level, one of them long."""
    monkeypatch.setattr(play, "Episode", Countdown)
    monkeypatch.setattr(play, "PARALLEL", 4)
    monkeypatch.setattr(play, "sample_actions", lambda agent, obs: obs[:, 0, 0, 0].tolist())
    checkpoint = play.Checkpoint(Path("agent.pt"), "ppo_procgen", {}, 5, None)
    table = play.measure(checkpoint, make_game(), range(3, 10), 5)
    assert table.level.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert table.mean_length.tolist() == [3, 4, 5, 3, 4, 5, 3]
    assert table.mean_return.tolist() == [9, 16, 25, 18, 28, 40, 27]
    assert set(table.episodes) == {5}
    assert (Countdown.running, Countdown.most_running) == (0, 4)


def test_returns(agents, capsys):
    """A row for each agent and level, a line for each agent."""
    run(*agents, "--levels", "5:9", "--episodes-per-level", "2", "--csv", "deep/returns.csv")
    table = pd.read_csv("deep/returns.csv")
    assert table.columns.tolist() == "level mean_return mean_length episodes agent global_step".split()
    assert table.level.tolist() == 2 * [5, 6, 7, 8]
    assert table.agent.tolist() == 4 * ["one/agent.pt"] + 4 * ["other/agent_2/agent.pt"]
    assert set(table.episodes) == {2}
    assert set(table.global_step) == {1000}
    line, other_line = capsys.readouterr().out.splitlines()
    assert line.startswith("one/agent.pt (mine, seed 1, 1,000 steps): return ")
    assert other_line.startswith("other/agent_2/agent.pt (mine, seed 2, agent 2, 1,000 steps): return ")
    pattern = r"return (\S+) ± (\S+) \(standard error over 4 levels\), length (\S+)"
    mean, error, length = map(float, re.search(pattern, line).groups())
    returns = table.mean_return[:4]
    assert mean == pytest.approx(returns.mean(), rel=0.001)
    assert error == pytest.approx(returns.std(ddof=1) / 2, rel=0.06)
    assert length == pytest.approx(table.mean_length[:4].mean(), rel=0.001)
    run(agents[0], "--levels", "5:6")
    assert re.search(r"return \S+, length \S+\n$", capsys.readouterr().out)  # of one level no standard error


def test_seed_and_mode(agents):
    """The same agent with the same seed plays the same, whoever has played before. The game and its mode are
    those of the training, but for a mode that is told."""

    def measure(*words) -> pd.DataFrame:
        run(*words, "--levels", "5:9", "--csv", "returns.csv")
        return pd.read_csv("returns.csv")[-4:].reset_index(drop=True)

    first = measure(*agents)
    assert measure(agents[1]).equals(first)
    assert measure(agents[1], "--distribution-mode", "hard").equals(first)
    assert not measure(agents[1], "--seed", "1").equals(first)
    assert not measure(agents[1], "--distribution-mode", "easy").equals(first)


# Videos.


def test_frames(agents, monkeypatch, capsys):
    """On each level a frame for each step of the longest episode, then a second of the end. All agents begin
    at the same picture, and who is done first waits."""

    def draw_frame(titles: list[str], episodes: list[play.Episode]) -> list[tuple]:
        assert titles == ["mine, seed 1, 1,000 steps", "mine, seed 2, agent 2, 1,000 steps"]
        return [(each.level, each.steps, each.over, each.picture.tobytes()) for each in episodes]

    def sample_actions(agent: Agent, obs: np.ndarray) -> list[int]:
        played[agent] += 1
        return sampled(agent, obs)

    sampled = play.sample_actions
    played = Counter()
    monkeypatch.setattr(play, "sample_actions", sample_actions)
    monkeypatch.setattr(play, "draw_frame", draw_frame)
    checkpoints = [play.read_agent(path) for path in agents]
    torch.manual_seed(0)
    frames = list(play.draw_levels(checkpoints, make_game(), range(20, 23), max_steps=45))
    lines = capsys.readouterr().out.splitlines()
    all_steps = []
    for level, line in zip(range(20, 23), lines, strict=True):
        of_level = [frame for frame in frames if frame[0][0] == frame[1][0] == level]
        assert of_level[0][0] == of_level[0][1]
        steps = [steps for _, steps, _, _ in of_level[-1]]
        assert len(of_level) == max(steps) + play.FRAMES_PER_SECOND
        for time, frame in enumerate(of_level):
            assert [each[1] for each in frame] == [min(time, most) for most in steps]
            assert [each[2] for each in frame] == [time >= most for most in steps]
        numbers = re.fullmatch(rf"level {level}: return \S+ in (\d+) steps, \S+ in (\d+) steps", line)
        assert [int(number) for number in numbers.groups()] == steps
        all_steps += steps
    assert [played[each.agent] for each in checkpoints] == [sum(all_steps[::2]), sum(all_steps[1::2])]
    assert max(all_steps) == 45
    assert min(all_steps) < 45


@pytest.mark.parametrize(("num", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (6, 2, 4)])
def test_frame(num, rows, columns):
    """A grid, row by row, with text above the pictures that ends where they end."""
    episodes = [play.Episode(make_game("maze"), level, "rgb_array") for level in range(num)]
    title = "a very long name of an experiment, seed 12345, agent 2, 1,000 steps"
    frame = np.asarray(play.draw_frame(num * [title], episodes))
    assert frame.shape == (rows * play.HEIGHT, columns * play.WIDTH, 3)
    parts = frame.reshape(rows, play.HEIGHT, columns, play.WIDTH, 3).swapaxes(1, 2)
    parts = parts.reshape(rows * columns, play.HEIGHT, play.WIDTH, 3)
    for episode, part in zip(episodes, parts):
        assert np.array_equal(part[72:, :512], episode.picture)
        assert part[:72].any()
        assert not part[:, 512:].any()
    assert not parts[num:].any()


def test_text_tells_return_and_end():
    episode = play.Episode(make_game("maze"), 1, "rgb_array")
    frames = []
    for total, over in [(0, False), (3, False), (3, True)]:
        episode.total = total
        episode.over = over
        frames.append(np.asarray(play.draw_frame(["a title"], [episode])))
    for frame, later in pairwise(frames):
        changed = frame != later
        assert changed[36:72].any()
        assert not changed[:36].any()
        assert not changed[72:].any()
    widths = [frame[36:72].any(axis=(0, 2)).nonzero()[0].max() for frame in frames]
    assert widths[2] > widths[1] + 20


def test_files(agents, capsys):
    run(*agents, "--max-steps", "3")
    *levels, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in levels] == ["level 10000", "level 10001", "level 10002"]
    assert last == "wrote videos/fruitbot.mp4 and videos/fruitbot.gif"
    assert sorted(path.name for path in Path("videos").iterdir()) == ["fruitbot.gif", "fruitbot.mp4"]
    gif = Image.open("videos/fruitbot.gif")
    assert gif.size == (480, 270)
    assert gif.n_frames == pytest.approx(3 * (3 + 15) / 15 * 10, abs=2)
    assert min(gif.convert("RGB").resize((1, 1)).getpixel((0, 0))) > 10  # pictures, not black


def test_video_of_chosen_levels(agents, capsys):
    run(agents[0], "--levels", "7:8", "--video", "film.mp4", "--max-steps", "2")
    _, level, last = capsys.readouterr().out.splitlines()
    assert level.startswith("level 7: return ")
    assert last == "wrote film.mp4 and film.gif"


def test_seed_of_a_video(agents, monkeypatch):
    films = []
    monkeypatch.setattr(play, "write_video", lambda path, frames: films.append([*map(np.asarray, frames)]))
    for seed in (3, 3, 4):
        run(agents[0], "--max-steps", "5", "--seed", seed)
    assert np.array_equal(films[0], films[1])
    assert not np.array_equal(films[0], films[2])


@pytest.mark.parametrize(("size", "num", "least"), [(480, 40, 10), (16, 400, 190)])
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
    (tmp_path / "film.mp4").write_bytes(b"before")
    with pytest.raises(OSError, match="ffmpeg could not write"):
        play.write_video(tmp_path / "film.mp4", [])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("film.mp4", b"before")]


# The command line.

WRONG = [
    ("", "CHECKPOINTS"),
    ("one/agent.pt --levels 5", "--levels must be FIRST:END"),
    ("one/agent.pt --levels 5:5", "--levels"),
    ("one/agent.pt --levels=-1:5", "--levels"),
    ("one/agent.pt --levels 0:2147483648", "--levels"),
    ("one/agent.pt --levels 0:5 --episodes-per-level 0", "--episodes-per-level"),
    ("one/agent.pt --episodes-per-level 2", "need --levels"),
    ("one/agent.pt --csv a.csv", "need --levels"),
    ("one/agent.pt --video film.gif", "--video must end in .mp4"),
    ("one/agent.pt --max-steps 0", "--max-steps"),
    ("one/agent.pt --seed -1", "--seed"),
    ("one/agent.pt --distribution-mode wild", "--distribution-mode"),
    ("one/agent.pt --distribution-mode memory", "--distribution-mode must be"),
    ("one/agent.pt maze.pt", "not fruitbot hard, maze hard"),
    ("one/agent.pt missing.pt", "missing.pt"),
]


@pytest.mark.parametrize(("words", "expected"), WRONG)
def test_wrong_command_line(words, expected, agents, capfd):
    save_agent(Path("maze.pt"), env_id="maze")
    files = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(*words.split())
    assert expected in error_message(stop.value.code, *capfd.readouterr())
    assert sorted(Path().rglob("*")) == files


def test_from_the_shell(agents):
    command = [sys.executable, str(ROOT / "benchmark" / "play.py"), str(agents[0]), "--levels", "3:5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("one/agent.pt (mine, seed 1, 1,000 steps): return ")
