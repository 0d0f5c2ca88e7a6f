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
from helpers import ROOT, Range, check_ranges, fail, run_tool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_procgen import Args as TrainingArgs

CURVE = "charts/SPS"
Repeats = Annotated[int, Range(1, 10**6)]


@dataclass
class Args:
    cleanrl: Annotated[Path, tyro.conf.Positional]
    """CleanRL's wheel, or its ppo_procgen.py"""
    env_id: str = "bigfish"
    """one of the 16 games of Procgen"""
    num_envs: int = 64
    """parallel environments"""
    num_steps: int = 256
    """steps in each environment between two updates"""
    num_minibatches: int = 8
    """minibatches in an epoch"""
    iterations: Repeats = 3
    """measured in each round, after one that is not"""
    rounds: Repeats = 2
    """in each of which both scripts run"""

    def __post_init__(self):
        check_ranges(self)
        TrainingArgs(**self.settings())  # which checks them

    def settings(self) -> dict:
        """What both scripts are told."""
        return {
            "env_id": self.env_id,
            "num_envs": self.num_envs,
            "num_steps": self.num_steps,
            "num_minibatches": self.num_minibatches,
            "total_timesteps": (self.iterations + 1) * self.num_envs * self.num_steps,
        }


def read_cleanrl(path: Path) -> bytes:
    """The script's text. Raises Failure where there is none."""
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
    """Steps a second of each iteration but the first. The name is for messages: raises Failure where the
    script fails, or writes no curve."""
    with tempfile.TemporaryDirectory() as folder:
        run(name, [sys.executable, str(script), *flags], folder)
        points = read_curve(Path(folder))
    if len(points) < 2:
        fail(f"{name} has written no curve {CURVE} of two points")
    speeds = []
    for before, after in pairwise(points):
        steps = after.step - before.step
        seconds = after.wall_time - before.wall_time
        speeds.append(steps / seconds)
    return speeds


def run(name: str, command: list[str], folder: str):
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if result.returncode < 0:
        fail(f"{name} was killed by signal {-result.returncode}: is there enough memory?")
    if result.returncode > 0:
        message = result.stderr.strip() or "no message"
        last_line = message.splitlines()[-1]
        fail(f"{name} ended with status {result.returncode}: {last_line}")


def read_curve(folder: Path) -> list:
    """Its points, which have a step and a wall_time in seconds, of the run that is in the folder."""
    points = []
    for run_dir in folder.glob("runs/*"):
        events = EventAccumulator(str(run_dir)).Reload()
        if CURVE in events.Tags()["scalars"]:
            points += events.Scalars(CURVE)
    return points


def print_table(theirs: list[float], ours: list[float]):
    print("| ppo_procgen.py | steps a second, median | from | to |")
    print("| --- | --- | --- | --- |")
    print_row("CleanRL", theirs)
    print_row("here", ours)
    print(f"ratio {np.median(ours) / np.median(theirs):.2f}")


def print_row(name: str, speeds: list[float]):
    print(f"| {name} | {np.median(speeds):,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f} |")


def main(args: Args):
    content = read_cleanrl(args.cleanrl)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{os.cpu_count()} cores, {gpu}, torch {torch.__version__}")
    batch = f"{args.num_envs} x {args.num_steps} steps, {args.num_minibatches} minibatches"
    print(f"{args.env_id}, {batch}", flush=True)

    their_flags = []
    for name, value in args.settings().items():
        flag = "--" + name.replace("_", "-")
        their_flags.append(f"{flag}={value}")
    our_flags = [*their_flags, "--distribution-mode=easy", "--num-levels=0", "--eval-interval=0"]
    theirs = []
    ours = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "ppo_procgen.py")
        script.write_bytes(content)
        for _ in range(args.rounds):
            theirs += measure(f"PATH: {args.cleanrl}", script, their_flags)
            ours += measure("ppo_procgen.py here", ROOT / "ppo_procgen.py", our_flags)
    print_table(theirs, ours)


if __name__ == "__main__":
    run_tool(main, Args, __doc__)
