"""Videos of agents at play: the same levels side by side, the episodes' ends, the files, the errors."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, SCRIPTS, error_message, make_agents, save_agent
from PIL import Image
from procgen import ProcgenGym3Env

import mdpo_procgen

sys.path.insert(0, str(ROOT / "benchmark"))
import watch
from helpers import Failure, run_tool


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of two agents that play differently."""
    folder = tmp_path_factory.mktemp("runs")
    one, other = make_agents(mdpo_procgen, 2)
    return [
        save_agent(folder / "one" / "agent_2" / "agent.pt", one, "mdpo_procgen"),
        save_agent(folder / "other" / "agent.pt", other, "ppo_procgen", seed=2),
    ]


def make_player(path: Path, seed: int = 0) -> watch.Player:
    return watch.Player(watch.read_agent(path), seed)


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What it shows.


def test_same_levels(checkpoints, monkeypatch, capsys):
    """Whatever the agents do, and however long they take; the first frame of a level is the same for all."""
    monkeypatch.setattr(watch, "FRAMES_PER_SECOND", 1)
    players = [make_player(path, seed=3) for path in checkpoints]
    levels = []
    for frame in watch.play(players, episodes=3, max_steps=40):
        assert frame.shape == (watch.HEIGHT, 2 * watch.WIDTH, 3) and frame.dtype == np.uint8
        level, other_level = (player.level for player in players)
        assert level == other_level
        if level not in levels:
            levels.append(level)
            one = frame[-512:, :512]
            other = frame[-512:, watch.WIDTH :][:, :512]
            assert np.array_equal(one, other)
    assert len(levels) == 3
    assert capsys.readouterr().out.count("level ") == 3
    assert make_player(checkpoints[0], seed=4).level != levels[0]


def test_levels_of_the_full_distribution(checkpoints):
    """A level's number is any of 2^31, not one of a few training levels."""
    levels = [make_player(checkpoints[0], seed).level for seed in range(4)]
    assert len(set(levels)) == 4 and min(levels) > 500


def test_episode(checkpoints):
    """The return is the sum of the rewards; after the end nothing moves; the last picture is of the level."""
    player = make_player(checkpoints[0])
    returns = []
    while not any(returns):  # most episodes bring some reward
        assert len(returns) < 20
        player.begin()
        rewards = []
        while not player.over:
            before = player.picture
            player.step(1000)
            rewards.append(player.env.observe()[0].item())
        returns.append(player.total)
        assert player.total == pytest.approx(sum(rewards))
        assert player.steps == len(rewards)
        assert np.array_equal(player.picture, before)
        assert player.env.get_info()[0]["level_seed"] != player.level
        player.step(1000)
        assert player.steps == len(rewards)
    player.begin()
    assert player.total == 0


@pytest.mark.parametrize("mode", ["easy", "hard"])
def test_game_and_mode(mode, tmp_path):
    """Are the agent's own."""
    (agent,) = make_agents(mdpo_procgen, 1)
    path = save_agent(tmp_path / "agent.pt", agent, env_id="maze", distribution_mode=mode)
    player = make_player(path, seed=3)
    for other_mode in ("easy", "hard"):
        env = ProcgenGym3Env(1, "maze", distribution_mode=other_mode, num_levels=0, rand_seed=3)
        same = np.array_equal(player.env.observe()[1]["rgb"], env.observe()[1]["rgb"])
        assert same == (mode == other_mode)


def test_each_step_shows_the_state_that_it_led_to(checkpoints):
    player = make_player(checkpoints[0])
    for _ in range(3):
        before = player.picture
        player.step(1000)
        assert not np.array_equal(player.picture, before)
        assert np.array_equal(player.picture, player.env.get_info()[0]["rgb"])


def test_cut_episode(checkpoints):
    """It ends after max_steps, its last picture is of its level, and the next one begins another level."""
    player = make_player(checkpoints[0])
    level = player.level
    for _ in range(3):
        player.step(max_steps=2)
    assert player.over and player.steps == 2
    player.begin()
    assert player.level != level
    assert (player.steps, player.total, player.over) == (0, 0.0, False)


def test_who_is_done_waits(checkpoints, monkeypatch, capsys):
    """On each level a frame for each step of the longest episode, then a second of the end."""
    monkeypatch.setattr(watch, "FRAMES_PER_SECOND", 5)
    torch.manual_seed(0)
    players = [make_player(path, seed=1) for path in checkpoints]
    frames = {}
    steps = {}
    while not any(min(each) < max(each) for each in steps.values()):
        assert len(steps) < 20
        for _ in watch.play(players, episodes=1, max_steps=150):
            level = players[0].level
            frames[level] = frames.get(level, 0) + 1
        steps[level] = [player.steps for player in players]
        assert frames[level] == max(steps[level]) + 5
        scores = [f"{player.total:g} in {player.steps} steps" for player in players]
        assert capsys.readouterr().out == f"level {level}: return {', '.join(scores)}\n"


def test_actions_are_sampled(checkpoints):
    """From the agent's policy: as often as it says, at the picture that it sees."""
    player = make_player(checkpoints[0])
    with torch.no_grad():
        player.agent.actor.weight.zero_()
        player.agent.actor.bias[:] = torch.tensor([0.7, 0.3] + 13 * [1e-9]).log()
    torch.manual_seed(0)
    actions = np.concatenate([player.sample_action() for _ in range(300)])
    assert actions.dtype == np.int32 and set(actions) == {0, 1}
    assert actions.mean() == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_agent_of_any_script(script, tmp_path):
    (agent,) = make_agents(mdpo_procgen, 1, seed=5)
    path = save_agent(tmp_path / "agent_13" / "agent.pt", agent, script, seed=5, distribution_mode="easy")
    saved = watch.read_agent(path)
    assert saved.name == f"{script}, seed 5, agent 13"
    assert (saved.env_id, saved.distribution_mode) == ("fruitbot", "easy")
    for ours, theirs in zip(saved.agent.parameters(), agent.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_agent_alone_has_no_number(tmp_path):
    path = save_agent(tmp_path / "run" / "agent.pt", make_agents(mdpo_procgen, 1)[0])
    assert watch.read_agent(path).name == "ppo_procgen, seed 1"


@pytest.mark.parametrize(("num", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (6, 2, 4)])
def test_any_number_of_players(num, rows, columns):
    """In a grid, row by row."""

    class Card:
        def __init__(self, number: int):
            self.number = number

        def draw(self):
            return np.full((watch.HEIGHT, watch.WIDTH, 3), self.number, np.uint8)

    frame = watch.draw_frame([Card(number) for number in range(1, num + 1)])
    assert frame.shape == (rows * watch.HEIGHT, columns * watch.WIDTH, 3)
    parts = frame.reshape(rows, watch.HEIGHT, columns, watch.WIDTH, 3)
    assert (parts == parts[:, :1, :, :1]).all()
    numbers = parts[:, 0, :, 0, 0].flatten().tolist()
    assert numbers == [*range(1, num + 1)] + (rows * columns - num) * [0]


def test_part_of_a_frame(checkpoints):
    """The picture below, and in the lines above the name, the return, and that it is the end."""
    player = make_player(checkpoints[0])
    at_first = player.draw()
    assert np.array_equal(at_first[-512:, :512], player.picture)
    assert not at_first[:, 512:].any()

    def changed_lines(**changes) -> list[bool]:
        """Of the two lines, which look different."""
        for name, value in changes.items():
            setattr(player, name, value)
        changed = player.draw() != at_first
        return [bool(changed[:38].any()), bool(changed[38:72].any())]

    assert changed_lines() == [False, False]
    assert changed_lines(total=3.0) == [False, True]
    assert changed_lines(total=0.0, over=True) == [False, True]
    assert changed_lines(over=False, name="long " * 50) == [True, False]


# The files.


def run(folder: Path, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark" / "watch.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ, timeout=300)


@pytest.mark.slow
def test_command(checkpoints, tmp_path):
    result = run(tmp_path, *checkpoints, "--episodes", "2", "--max-steps", "12", "--output", "deep/down/film")
    assert (result.returncode, result.stderr) == (0, "")
    *levels, last = result.stdout.splitlines()
    assert len(levels) == 2 and levels[0].split(":")[0] != levels[1].split(":")[0]
    assert last == "wrote deep/down/film.mp4 and deep/down/film.gif"
    folder = tmp_path / "deep" / "down"
    assert sorted(each.name for each in folder.iterdir()) == ["film.gif", "film.mp4"]
    assert (folder / "film.mp4").read_bytes()[4:8] == b"ftyp"
    assert (folder / "film.gif").stat().st_size <= 3_000_000
    gif = Image.open(folder / "film.gif")
    frames = 2 * (12 + 15)  # each episode, and a second of its end, at 15 a second
    assert abs(gif.n_frames - frames * 10 / 15) <= 2
    assert gif.size[0] / gif.size[1] == pytest.approx(2 * watch.WIDTH / watch.HEIGHT, abs=0.03)


def test_files(checkpoints, tmp_path, monkeypatch, capsys):
    """Of five agents, in two rows; in videos/GAME unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(watch, "FRAMES_PER_SECOND", 2)
    watch.main(watch.Args((*checkpoints, *checkpoints, checkpoints[0]), episodes=1, max_steps=2))
    assert capsys.readouterr().out.endswith("wrote videos/fruitbot.mp4 and videos/fruitbot.gif\n")
    assert sorted(each.name for each in (tmp_path / "videos").iterdir()) == ["fruitbot.gif", "fruitbot.mp4"]
    gif = Image.open("videos/fruitbot.gif")
    shape = (4 * watch.WIDTH) / (2 * watch.HEIGHT)
    assert gif.size[0] / gif.size[1] == pytest.approx(shape, abs=0.03)
    assert gif.size[1] == 2 * watch.GIF_SIZES[0].height
    assert abs(gif.n_frames - 10 * 4 / 2) <= 2  # four frames at two a second, ten of the GIF's a second
    red, green, blue = np.asarray(gif.convert("RGB")).mean((0, 1))
    assert min(red, green, blue) > 10  # pictures, not black


def test_gif_is_made_smaller(checkpoints, tmp_path, monkeypatch):
    output = tmp_path / "film.gif"
    sizes = []
    for limit in (3_000_000, 60_000):
        monkeypatch.setattr(watch, "GIF_BYTES", limit)
        watch.main(watch.Args((checkpoints[0],), episodes=1, max_steps=5, output=tmp_path / "film.mp4"))
        assert output.stat().st_size <= limit
        sizes.append(Image.open(output).size)
    assert sizes[1] < sizes[0]


def test_gif_is_made_shorter(checkpoints, tmp_path, monkeypatch):
    """Four frames at two a second are two seconds, of which it shows one, ten frames a second."""
    monkeypatch.setattr(watch, "FRAMES_PER_SECOND", 2)
    monkeypatch.setattr(watch, "GIF_SIZES", [watch.GifSize(height=64, seconds=1)])
    watch.main(watch.Args((checkpoints[0],), episodes=1, max_steps=2, output=tmp_path / "film"))
    gif = Image.open(tmp_path / "film.gif")
    assert gif.size[1] == 64 and abs(gif.n_frames - 10) <= 1


def test_seed_and_episodes(checkpoints, monkeypatch, capsys):
    """The same levels and the same actions with the same seed, as many levels as told."""
    monkeypatch.setattr(watch, "FRAMES_PER_SECOND", 1)
    monkeypatch.setattr(watch, "write_gif", lambda *_: None)

    def film(seed: int, episodes: int) -> list[np.ndarray]:
        films = []
        monkeypatch.setattr(watch, "write_video", lambda ffmpeg, path, frames, num: films.extend(frames))
        watch.main(watch.Args((checkpoints[0],), episodes=episodes, max_steps=6, seed=seed))
        return films

    first = film(seed=7, episodes=2)
    levels = re.findall("^level ([0-9]+): ", capsys.readouterr().out, re.M)
    assert len(first) == 2 * (6 + 1) and len(set(levels)) == 2
    assert np.array_equal(first, film(seed=7, episodes=2))
    others = film(seed=8, episodes=1)
    assert len(others) == 6 + 1 and not np.array_equal(first[0], others[0])
    assert levels[0] not in capsys.readouterr().out.splitlines()[-2]


def test_ffmpeg_that_fails(tmp_path):
    """The file of before stays, and nothing else."""
    (tmp_path / "film.mp4").write_bytes(b"before")
    with pytest.raises(Failure, match="ffmpeg cannot write"):
        watch.encode(sys.executable, [], tmp_path / "film.mp4", [np.zeros(2**20, np.uint8)] * 9)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("film.mp4", b"before")]


# The errors.


@pytest.fixture
def rejection(tmp_path, monkeypatch, capfd):
    """A function of the words of a command line that cannot work: its message. Nothing is written."""

    def reject(*words) -> str:
        before = files_in(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_tool(watch.main, watch.Args, watch.__doc__)
        assert files_in(tmp_path) == before
        return error_message(stop.value.code, *capfd.readouterr())

    return reject


BAD = {"--episodes": "0", "--max-steps": "0", "--seed": "-1", "--outptu": "x", "--output": ""}


@pytest.mark.parametrize("flag", BAD)
def test_bad_flag(flag, checkpoints, rejection):
    assert flag in rejection(checkpoints[0], f"{flag}={BAD[flag]}")


def test_bad_values_of_other_kinds(checkpoints, rejection):
    assert "--seed" in rejection(checkpoints[0], "--seed", "x")
    assert "--output" in rejection(checkpoints[0], "--output", "/")
    assert "--output" in rejection(checkpoints[0], "--output", "..")


def test_number_of_files(checkpoints, rejection):
    assert "CHECKPOINTS" in rejection()
    assert "CHECKPOINTS must be 1 to 64 agent.pt files, not 65" in rejection(*(65 * [checkpoints[0]]))


def test_bad_files(checkpoints, tmp_path, rejection):
    whole = checkpoints[0].read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "shorter.pt").write_bytes(whole[:-1000])
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    (tmp_path / "changed.pt").write_bytes(changed)
    (tmp_path / "text.pt").write_text("no agent")
    torch.save({"format": 1, "runners": []}, tmp_path / "checkpoint.pt")
    (agent,) = make_agents(mdpo_procgen, 1)
    save_agent(tmp_path / "wide.pt", agent, channels=(8, 4, 4))
    save_agent(tmp_path / "game.pt", agent, env_id="tetris")
    save_agent(tmp_path / "mode.pt", agent, distribution_mode="extreme")
    for path in sorted(tmp_path.iterdir()):
        message = rejection(checkpoints[1], path.name)
        expected = f"CHECKPOINTS: cannot read {path.name}: it is damaged, or no agent.pt"
        assert message == f"watch.py: error: {expected}"
    assert "cannot read missing.pt: No such file or directory" in rejection("missing.pt")
    assert "cannot read .: Is a directory" in rejection(".")


def test_weights_that_are_not_finite(tmp_path, rejection):
    (agent,) = make_agents(mdpo_procgen, 1)
    agent.critic.bias.data[0] = float("nan")
    save_agent(tmp_path / "nan.pt", agent)
    assert rejection("nan.pt") == "watch.py: error: CHECKPOINTS: the weights in nan.pt are not all finite"


def test_two_games(checkpoints, tmp_path, rejection):
    (agent,) = make_agents(mdpo_procgen, 1)
    save_agent(tmp_path / "maze.pt", agent, env_id="maze")
    save_agent(tmp_path / "easy.pt", agent, distribution_mode="easy")
    assert "not fruitbot hard, maze hard" in rejection(checkpoints[0], "maze.pt")
    assert "not fruitbot easy, fruitbot hard" in rejection(checkpoints[0], "easy.pt")


def test_no_ffmpeg(checkpoints, monkeypatch, rejection):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(watch.shutil, "which", lambda name: None)
    assert "ffmpeg" in rejection(checkpoints[0])


def test_ffmpeg_of_the_system(monkeypatch):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(watch.shutil, "which", lambda name: f"/bin/{name}")
    assert watch.find_ffmpeg() == "/bin/ffmpeg"


def test_output_that_cannot_be(checkpoints, tmp_path, rejection):
    (tmp_path / "file").write_text("kept")
    message = rejection(checkpoints[0], "--output", "file/film")
    assert message == "watch.py: error: --output file/film.mp4: File exists"
    (tmp_path / "film.mp4").mkdir()  # a folder where the video belongs
    with pytest.raises(Failure, match="Is a directory"):
        watch.main(watch.Args((checkpoints[0],), episodes=1, max_steps=1, output=tmp_path / "film"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "film.mp4"]


def test_interrupt(checkpoints, tmp_path, monkeypatch, capfd):
    """Here while the first frame is drawn. No word and no file."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageDraw.Draw", interrupt)
    monkeypatch.setattr(sys, "argv", ["watch.py", str(checkpoints[0]), "--output", f"{tmp_path}/film"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(watch.__file__, run_name="__main__")
    assert stop.value.code == 130
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
