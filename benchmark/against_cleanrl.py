"""How many times as fast ppo_procgen.py is as CleanRL's ppo_procgen.py, on this machine.

    pip download cleanrl==1.2.0 --no-deps --only-binary :all: --python-version 3.9
    python benchmark/against_cleanrl.py cleanrl-1.2.0-py3-none-any.whl

Runs both in turn, as their users do, in a folder that is deleted afterwards: the same game and batch, the
levels that CleanRL takes (easy, all there are), no tests. Both write charts/SPS at the end of an iteration.
The time from one such point to the next counts, so that the start and the first iteration do not.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from command_line import check_ranges, fail, parse_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_procgen  # noqa: E402


@dataclass
class Args:
    cleanrl: Annotated[Path, tyro.conf.Positional]  # CleanRL's wheel, or its ppo_procgen.py
    env_id: str = "bigfish"  # one of the 16 games of Procgen
    num_envs: int = 64  # parallel environments
    num_steps: int = 256  # steps in each environment between two updates
    num_minibatches: int = 8  # minibatches in an epoch
    iterations: int = 3  # measured in each round, after one that is not
    rounds: int = 2  # in each of which both scripts run

    def __post_init__(self):
        check_ranges(self, {"iterations": (1, 10**6), "rounds": (1, 10**6)})
        ppo_procgen.Args(**self.settings())

    def settings(self) -> dict:
        """What both scripts are told."""
        names = ("env_id", "num_envs", "num_steps", "num_minibatches")
        total = (self.iterations + 1) * self.num_envs * self.num_steps
        return {name: getattr(self, name) for name in names} | {"total_timesteps": total}


def read_cleanrl(path: Path) -> bytes:
    try:
        if path.suffix == ".py":
            return path.read_bytes()
        return zipfile.ZipFile(path).read("cleanrl/ppo_procgen.py")
    except KeyError:
        fail(f"PATH: there is no cleanrl/ppo_procgen.py in {path}")
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or no wheel"
        fail(f"PATH: {path}: {reason}")


def measure(name: str, script: Path, flags: list[str]) -> list[float]:
    """Steps a second of each iteration but the first. The name is for messages."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), *flags]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if result.returncode < 0:
            fail(f"{name} was killed by signal {-result.returncode}: is there enough memory?")
        if result.returncode:
            last = (result.stderr.strip() or "no message").splitlines()[-1]
            fail(f"{name} ended with status {result.returncode}: {last}")
        points = []
        for run in Path(folder).glob("runs/*"):
            events = EventAccumulator(str(run)).Reload()
            points += events.Scalars("charts/SPS") if "charts/SPS" in events.Tags()["scalars"] else []
    if len(points) < 2:
        fail(f"{name} has written no curve charts/SPS of two points")
    pairs = pairwise(points)
    return [(after.step - before.step) / (after.wall_time - before.wall_time) for before, after in pairs]


def main(args: Args):
    content = read_cleanrl(args.cleanrl)
    shared = [f"--{name.replace('_', '-')}={value}" for name, value in args.settings().items()]
    ours = [*shared, "--distribution-mode=easy", "--num-levels=0", "--eval-interval=0"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{os.cpu_count()} cores, {gpu}, torch {torch.__version__}")
    print(
        f"{args.env_id}, {args.num_envs} x {args.num_steps} steps, {args.num_minibatches} minibatches",
        flush=True,
    )
    speeds = {"CleanRL": [], "here": []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "ppo_procgen.py")
        script.write_bytes(content)
        for _ in range(args.rounds):
            speeds["CleanRL"] += measure(f"PATH: {args.cleanrl}", script, shared)
            speeds["here"] += measure("ppo_procgen.py here", ROOT / "ppo_procgen.py", ours)
    print("| ppo_procgen.py | steps a second, median | from | to |\n| --- | --- | --- | --- |")
    for name, each in speeds.items():
        print(f"| {name} | {np.median(each):,.0f} | {min(each):,.0f} | {max(each):,.0f} |")
    print(f"ratio {np.median(speeds['here']) / np.median(speeds['CleanRL']):.2f}")


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
