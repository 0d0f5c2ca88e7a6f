"""What the tests of resumed runs and of what goes wrong in them share."""

from pathlib import Path
from types import SimpleNamespace

from common import TINY, agent_folders, load, read_points, same, train

# Iterations are short, and there are enough of them to be stopped in.
BATCH_SIZE = 32
SETTINGS = TINY | {
    "total_timesteps": 12 * BATCH_SIZE,
    "num_envs": 2,
    "update_epochs": 1,
    "checkpoint_interval": 2,
    "final_eval_episodes": 2,
}


def differences(straight: SimpleNamespace, run_dir: Path) -> list[str]:
    """What another run left that is not as the straight one's, the speed aside."""
    found = [str(path) for path in run_dir.rglob("*.tmp")]
    checkpoints = []
    for each in (straight.run_dir, run_dir):
        checkpoint = load(each / "checkpoint.pt")
        for runner in checkpoint["runners"]:
            runner["scalars"].pop("charts/SPS", None)
        checkpoints.append(checkpoint)
    one, other = checkpoints
    found += [
        f"checkpoint {key}" for key in one.keys() | other.keys() if not same(one.get(key), other.get(key))
    ]
    for file in ("final_test.json", "args.json"):
        if (run_dir / file).read_bytes() != (straight.run_dir / file).read_bytes():
            found.append(file)
    num_agents = len(one["agents"])
    folders = agent_folders(straight.name, straight.run_dir, num_agents)
    for folder, other_folder in zip(folders, agent_folders(straight.name, run_dir, num_agents)):
        if not same(load(folder / "agent.pt"), load(other_folder / "agent.pt")):
            found.append(f"{other_folder}/agent.pt")
        points = read_points(folder)
        other_points = read_points(other_folder)
        assert len(points["losses/value_loss"]) > 3
        found += [
            tag for tag in points.keys() | other_points.keys() if points.get(tag) != other_points.get(tag)
        ]
    return found


def error_line(script, folder: Path, capsys, *words) -> str:
    """Of a start that cannot be: the one line on stderr, and exit status 2."""
    assert train(script, folder, *words) == 2
    return the_message(script, capsys.readouterr().err)


def the_message(script, err: str) -> str:
    assert err.count("\n") == 1, err
    start = f"{script.__name__}.py: error: "
    assert err.startswith(start), err
    return err.removeprefix(start).rstrip()
