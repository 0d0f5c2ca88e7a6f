"""Copying one script into a project of one's own, as docs/copy.md tells it."""

import re
import shutil
import subprocess
import sys

import pytest
from common import MUTUAL, ROOT, SINGLE, TINY, flags, read_curves, run_folder

SHORT = TINY | {"num_envs": 2, "num_eval_envs": 2, "total_timesteps": 32, "update_epochs": 1}
# The text of the others is the same, but for the algorithm.
FAST_AND_SLOW = pytest.mark.parametrize(
    "name", [SINGLE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (SINGLE[1], *MUTUAL))]
)


def block_of_page(language: str) -> str:
    """The one block in that language."""
    page = (ROOT / "docs/copy.md").read_text()
    (block,) = re.findall(f"```{language}\n(.*?)```", page, re.S)
    return block


def run(*command, cwd) -> str:
    """In a process that does not know the repository: -I keeps its scripts off the path."""
    command = [sys.executable, "-I", *command]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@FAST_AND_SLOW
def test_a_copy_runs_alone(name, tmp_path):
    """And its import has no side effects."""
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")
    (tmp_path / "run.py").write_text(
        """
import sys

sys.path.insert(0, ".")
sys.dont_write_bytecode = True
import pathlib

import torch

before = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads())
import mine

assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (torch.get_default_dtype(), torch.get_num_threads())
assert {path.name for path in pathlib.Path().iterdir()} == {"mine.py", "run.py"}
logits, values = mine.Agent(num_actions=4)(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
assert logits.shape == (2, 4)
assert values.shape == (2,)
assert mine.policy_loss(torch.ones(2), torch.ones(2), 0.2) == -1
mine.main(mine.parse_args())
"""
    )
    output = run("run.py", *flags(**SHORT | {"eval_interval": 0}), cwd=tmp_path)
    assert "finished after 32 steps" in output
    assert run_folder(tmp_path).name.startswith("fruitbot__mine__1__")


def copy_with_corridor(name, folder):
    """Script and environment as the page has them."""
    shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "corridor.py").write_text(block_of_page("python"))
    diff = block_of_page("diff").replace("ppo_procgen.py", f"{name}.py")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    (folder / "run.py").write_text(
        f"import sys; sys.path.insert(0, '.')\nimport {name} as copy; copy.run_from_shell()"
    )


@FAST_AND_SLOW
def test_another_environment_takes_the_lines_that_the_page_shows(name, tmp_path):
    """With tests, and exact enough to go on."""
    copy_with_corridor(name, tmp_path)
    settings = SHORT | {"eval_interval": 1, "num_steps": 64, "total_timesteps": 128}
    assert "final test" in run("run.py", *flags(**settings), cwd=tmp_path)
    again = ["--resume", "auto", "--env-id", "fruitbot", "--total-timesteps", "256"]
    assert "finished after 256 steps" in run("run.py", *again, cwd=tmp_path)
    curve_files = sorted(run_folder(tmp_path).glob("**/agent.pt"))
    assert len(curve_files) == (2 if name in MUTUAL else 1)
    for path in curve_files:
        curve = read_curves(path.parent)["charts/test_episodic_return"]
        assert list(curve) == [128, 256]
        assert set(curve.values()) <= {0.0, 5.0, 10.0}  # of two episodes


@pytest.mark.slow
def test_the_corridor_is_learned_by_the_command_of_the_page(tmp_path):
    copy_with_corridor("ppo_procgen", tmp_path)
    words = block_of_page("sh").split()
    assert words[:2] == ["python", "ppo_procgen.py"]
    output = run("run.py", *words[2:], "--device", "cpu", cwd=tmp_path)
    returns = re.search(r"agent 1 +([\d.]+) \+- [\d.]+ +([\d.]+) \+-", output)
    assert min(float(each) for each in returns.groups()) > 9.5
