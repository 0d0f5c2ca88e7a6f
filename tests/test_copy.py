"""Copying one script into a project of one's own, as docs/copy.md tells it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from common import MUTUAL, ROOT, SINGLE, TINY, agent_folders, flags, read_curves, run_folder

SETTINGS = TINY | {"num_envs": 2, "num_steps": 64, "update_epochs": 1, "eval_interval": 1}
# The text of the others is the same, but for the algorithm.
ONE_AND_ALL = pytest.mark.parametrize(
    "name", [SINGLE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (SINGLE[1], *MUTUAL))]
)


def block_of_page(language: str) -> str:
    """The one block in that language."""
    page = (ROOT / "docs/copy.md").read_text()
    (block,) = re.findall(f"```{language}\n(.*?)```", page, re.S)
    return block


def run(script: str, folder, *words) -> str:
    """In a process that does not know the repository: -E keeps what PYTHONPATH has off the path."""
    command = [sys.executable, "-E", "-B", script, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_with_corridor(name, folder):
    """Script and environment as the page has them."""
    shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "corridor.py").write_text(block_of_page("python"))
    patch = block_of_page("diff").replace("ppo_procgen.py", f"{name}.py")
    command = ["git", "apply", "-"]
    done = subprocess.run(command, input=patch, text=True, cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr


@ONE_AND_ALL
def test_a_copy_with_another_environment(name, tmp_path):
    """Takes the lines that the page shows. It runs alone, under another name, which its run folder has, with
    tests, and goes on from there."""
    copy_with_corridor(name, tmp_path)
    (tmp_path / f"{name}.py").rename(tmp_path / "mine.py")
    assert "final test" in run("mine.py", tmp_path, *flags(**SETTINGS | {"total_timesteps": 128}))
    assert sorted(os.listdir(tmp_path)) == ["corridor.py", "mine.py", "runs"]
    run_dir = run_folder(tmp_path)
    assert run_dir.name.startswith("fruitbot__mine__1__")
    output = run("mine.py", tmp_path, *flags(resume=run_dir, device="cpu", total_timesteps=256))
    assert "finished after 256 steps" in output
    for folder in agent_folders(name, run_dir):
        curves = read_curves(folder)
        tests = curves["charts/test_episodic_return"]
        assert list(tests) == [128, 256]
        assert set(tests.values()) <= {0.0, 5.0, 10.0}  # of two episodes
        assert min(curves["charts/episodic_length"].values()) >= 3
        assert min(curves["charts/episodic_return"].values()) >= 0


@pytest.mark.slow
def test_the_corridor_is_learned_by_the_command_of_the_page(tmp_path):
    copy_with_corridor("ppo_procgen", tmp_path)
    words = block_of_page("sh").split()
    assert words[:2] == ["python", "ppo_procgen.py"]
    output = run(words[1], tmp_path, *words[2:], "--device", "cpu")
    returns = re.findall(r"^agent 1: ([\d.]+) \+-", output, re.M)
    assert len(returns) == 2
    assert min(map(float, returns)) > 9.5
