"""Videos of agents at play: the same levels side by side, the episodes' ends, the files, the errors."""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, SCRIPTS
from PIL import Image

import mdpo_procgen

sys.path.insert(0, str(ROOT / "benchmark"))
import watch
from command_line import parse_args


def save_agent(path: Path, script: str = "ppo_procgen", seed: int = 1, **settings) -> Path:
    """An agent.pt as the scripts write it, of an untrained agent that is not like another seed's."""
    torch.manual_seed(seed)
    args = mdpo_procgen.Args(env_id="fruitbot", channels=(4, 4, 4), exp_name=script, seed=seed)
    agent = mdpo_procgen.Agent(channels=args.channels)
    agent.actor.weight.data *= 300
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"script": script, "args": asdict(args) | settings, "agent": agent.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        save_agent(folder / "one" / "agent_2" / "agent.pt", "mdpo_procgen"),
        save_agent(folder / "other" / "agent.pt", "ppo_procgen", 2),
    ]


def run(folder: Path, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark" / "watch.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ, timeout=120)


def test_command(checkpoints, tmp_path):
    result = run(tmp_path, *checkpoints, *"--episodes 2 --max-steps 12 --output deep/down/film".split())
    assert (result.returncode, result.stderr) == (0, "")
    *levels, last = result.stdout.splitlines()
    assert len(levels) == 2 and levels[0].split(":")[0] != levels[1].split(":")[0]
    assert last == "wrote deep/down/film.mp4 and deep/down/film.gif"
    assert sorted(each.name for each in (tmp_path / "deep" / "down").iterdir()) == ["film.gif", "film.mp4"]
    assert (tmp_path / "deep" / "down" / "film.mp4").read_bytes()[4:8] == b"ftyp"
    gif = Image.open(tmp_path / "deep" / "down" / "film.gif")
    steps = [12 + 15, 12 + 15]  # each episode, and a second of its end, at 15 steps a second
    assert abs(gif.n_frames - sum(steps) * 10 / 15) <= 2
    assert (tmp_path / "deep" / "down" / "film.gif").stat().st_size <= 3_000_000
    assert gif.size[0] / gif.size[1] == pytest.approx(2 * watch.WIDTH / watch.HEIGHT, abs=0.03)


def test_same_levels(checkpoints, monkeypatch, capsys):
    """Whatever the agents do, and however long they take; the first frame of a level is the same for all."""
    monkeypatch.setattr(watch, "FRAMES_PER_SECOND", 1)
    players = [watch.Player(path, seed=3) for path in checkpoints]
    args, levels, begun = watch.Args(tuple(checkpoints), episodes=3), [], set()
    for frame in watch.play(args, players):
        assert frame.shape == (watch.HEIGHT, 2 * watch.WIDTH, 3) and frame.dtype == np.uint8
        one, other = frame[-512:, :512], frame[-512:, watch.WIDTH :][:, :512]
        level, other_level = (player.level for player in players)
        assert level == other_level
        if level not in begun:
            assert np.array_equal(one, other)
            levels.append(level)
        begun.add(level)
    assert len(levels) == len(set(levels)) == 3
    assert capsys.readouterr().out.count("level ") == 3
    assert watch.Player(checkpoints[0], seed=4).env.get_info()[0]["level_seed"] != levels[0]


def test_episode(checkpoints):
    """The return is the sum of the rewards; after the end nothing moves; the last picture is of the level."""
    player = watch.Player(checkpoints[0], seed=0)
    player.begin()
    rewards, observe = [], player.env.observe

    def note():
        reward, obs, first = observe()
        rewards.append(reward[0])
        return reward, obs, first

    player.env.observe = note
    while not player.over:
        before = player.picture
        player.step(1000)
    assert player.total == pytest.approx(sum(rewards[1::2])) and len(rewards) == 2 * player.steps
    assert np.array_equal(player.picture, before)
    assert player.env.get_info()[0]["level_seed"] != player.level
    player.step(1000)
    assert len(rewards) == 2 * player.steps


@pytest.mark.parametrize("script", SCRIPTS)
def test_agent_of_any_script(script, tmp_path):
    player = watch.Player(save_agent(tmp_path / "agent_1" / "agent.pt", script, seed=5), seed=0)
    assert player.name == f"{script}, seed 5, agent 1"
    torch.manual_seed(5)
    agent = mdpo_procgen.Agent(channels=(4, 4, 4))
    assert torch.equal(player.agent.encoder[0].weight, agent.encoder[0].weight)


def test_gif_is_made_smaller(checkpoints, tmp_path, monkeypatch):
    sizes = []
    for limit in (3_000_000, 60_000):
        monkeypatch.setattr(watch, "GIF_BYTES", limit)
        output = tmp_path / "film"
        watch.main(watch.Args((checkpoints[0],), episodes=1, max_steps=10, output=tmp_path / "film.mp4"))
        assert output.with_suffix(".gif").stat().st_size <= limit
        sizes.append(Image.open(output.with_suffix(".gif")).size)
    assert sizes[1] < sizes[0]


def check_error(words, folder: Path, monkeypatch, capsys) -> str:
    """One line, exit status 2, and nothing written. Gives the line."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        watch.main(parse_args(watch.Args, watch.__doc__))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("watch.py: error: ")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return err


BAD = ["--episodes 0", "--max-steps 0", "--seed -1", "--seed x", "--outptu x", "--output=", "--output /"]


@pytest.mark.parametrize("flag", BAD)
def test_bad_flag(flag, checkpoints, tmp_path, monkeypatch, capsys):
    assert re.match("[-a-z]+", flag)[0] in check_error(
        [checkpoints[0], *flag.split()], tmp_path, monkeypatch, capsys
    )


def test_bad_files(checkpoints, tmp_path, monkeypatch, capsys):
    whole = checkpoints[0].read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "shorter.pt").write_bytes(whole[:-1000])
    (tmp_path / "text.pt").write_text("no agent")
    torch.save({"format": 1, "runners": []}, tmp_path / "checkpoint.pt")
    save_agent(tmp_path / "wide.pt", channels=(8, 4, 4))
    save_agent(tmp_path / "game.pt", env_id="tetris")
    save_agent(tmp_path / "mode.pt", distribution_mode="extreme")
    damaged = ("short.pt", "shorter.pt", "text.pt", "checkpoint.pt", "wide.pt", "game.pt", "mode.pt")
    for name in ("missing.pt", ".", *damaged):
        err = check_error([checkpoints[1], name], tmp_path, monkeypatch, capsys)
        assert err.startswith(f"watch.py: error: CHECKPOINTS: cannot read {name}: ")
        assert ("it is damaged" in err) == (name in damaged)


def test_no_files(tmp_path, monkeypatch, capsys):
    assert "CHECKPOINTS" in check_error([], tmp_path, monkeypatch, capsys)


def test_two_games(checkpoints, tmp_path, monkeypatch, capsys):
    save_agent(tmp_path / "other.pt", env_id="maze")
    err = check_error([checkpoints[0], "other.pt"], tmp_path, monkeypatch, capsys)
    assert "fruitbot hard, maze hard" in err


def test_no_ffmpeg(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(watch.shutil, "which", lambda name: None)
    assert "ffmpeg" in check_error([checkpoints[0]], tmp_path, monkeypatch, capsys)


def test_output_that_cannot_be(checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("kept")
    err = check_error([checkpoints[0], "--output", "file/film"], tmp_path, monkeypatch, capsys)
    assert err == "watch.py: error: --output file/film: File exists\n"
    (tmp_path / "film.mp4").mkdir()  # a folder where the video belongs
    with pytest.raises(SystemExit) as stop:
        watch.main(watch.Args((checkpoints[0],), episodes=1, max_steps=1, output=tmp_path / "film"))
    assert stop.value.code == 2 and capsys.readouterr().err.endswith("film: Is a directory\n")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "film.mp4"]


def test_interrupt(checkpoints, tmp_path, monkeypatch, capfd):
    """Here while the first frame is drawn. No word and no file."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageDraw.Draw", interrupt)
    monkeypatch.setattr(sys, "argv", ["watch.py", str(checkpoints[0]), "--output", f"{tmp_path}/film"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(watch.__file__, run_name="__main__")
    assert stop.value.code == 130 and capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_ffmpeg_that_fails(checkpoints, tmp_path):
    """The file of before stays, and nothing else."""
    (tmp_path / "film.mp4").write_bytes(b"before")
    with pytest.raises(SystemExit) as stop:
        watch.encode(sys.executable, [], tmp_path / "film.mp4", [np.zeros(2**20, np.uint8)] * 9)
    assert stop.value.code == 2
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("film.mp4", b"before")]
