"""Copying one script into a project of one's own, as the README tells it."""

import re
import shutil
import subprocess
import sys

import pytest
from common import MUTUAL, ROOT, SCRIPTS, TINY, flags, read_curves, run_folder

NO_TESTS = flags(**TINY | {"eval_interval": 0, "total_timesteps": 128})


def readme_block(language: str) -> str:
    """The one block of the section "Copy a script" in that language."""
    section = (ROOT / "README.md").read_text().split("## Copy a script\n")[1].split("\n## ")[0]
    (block,) = re.findall(f"```{language}\n(.*?)```", section, re.S)
    return block


def run(*command, cwd) -> str:
    done = subprocess.run(
        [sys.executable, "-I", *command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_runs_alone(name, tmp_path):
    """-I keeps the repository and its scripts off the path."""
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")
    run("mine.py", *NO_TESTS, cwd=tmp_path)
    assert run_folder(tmp_path).name.startswith("fruitbot__mine__1__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_can_be_imported_without_side_effects(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")
    program = (
        "import sys; sys.path.insert(0, '.'); sys.dont_write_bytecode = True\n"
        "import torch; before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()\n"
        "from mine import Agent, policy_loss\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1:] == (torch.get_default_dtype(), torch.get_num_threads())\n"
        "logits, values = Agent(num_actions=4)(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))\n"
        "print(tuple(logits.shape), tuple(values.shape))\n"
        "print(policy_loss(torch.ones(2), torch.ones(2), 0.2).item())\n"
    )
    assert run("-c", program, cwd=tmp_path) == "(2, 4) (2,)\n-1.0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_environment_takes_the_lines_that_the_readme_shows(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "corridor.py").write_text(readme_block("python"))
    diff = readme_block("diff").replace("ppo_procgen.py", f"{name}.py")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path.insert(0, '.')\nimport {name} as m; m.main(m.parse_args())"
    )
    tiny = TINY | {"eval_interval": 1, "total_timesteps": 256, "num_steps": 64}
    assert "final test" in run("run.py", *flags(**tiny), cwd=tmp_path)
    again = ["--resume", "auto", "--env-id", "fruitbot", "--total-timesteps", "512"]
    assert "finished after 512 steps" in run("run.py", *again, cwd=tmp_path)
    for folder in [run_folder(tmp_path)] if name not in MUTUAL else run_folder(tmp_path).glob("agent_*"):
        curves = read_curves(folder)
        assert set(curves["charts/test_episodic_return"].values()) == {10.0}  # the coin of every episode
