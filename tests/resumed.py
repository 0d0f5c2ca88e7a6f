"""What the tests of resumed runs and of what goes wrong in them share."""

from pathlib import Path
from types import SimpleNamespace

import common
from common import TINY, load, same, train

# Iterations are short, and there are enough of them to be stopped in.
BATCH_SIZE = 32
SETTINGS = TINY | {
    "total_timesteps": 12 * BATCH_SIZE,
    "num_envs": 2,
    "update_epochs": 1,
    "checkpoint_interval": 2,
    "final_eval_episodes": 2,
}


def differences(straight: SimpleNamespace, run_dir: Path, num_agents: int = 2) -> list[str]:
    """What another run left that is not as the straight one's, the speed that a checkpoint knows apart."""
    found = common.differences(straight.name, straight.run_dir, run_dir, num_agents)
    sides = load(straight.run_dir / "checkpoint.pt")["runners"]
    other_sides = load(run_dir / "checkpoint.pt")["runners"]
    for side in sides + other_sides:
        side["scalars"].pop("charts/SPS", None)
    if same(sides, other_sides):
        found = [each for each in found if each != "checkpoint runners"]
    return found


def error_line(script, folder: Path, capsys, *words) -> str:
    """Of a start that cannot be: the one line on stderr, and exit status 2."""
    assert train(script, folder, *words) == 2
    err = capsys.readouterr().err
    return the_message(script, err)


def the_message(script, err: str) -> str:
    assert err.count("\n") == 1, err
    start = f"{script.__name__}.py: error: "
    assert err.startswith(start), err
    return err.removeprefix(start).rstrip()
