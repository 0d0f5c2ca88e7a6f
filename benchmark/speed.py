"""How fast a training script is, and where the time of an iteration goes.

    python benchmark/speed.py ppo_procgen --games bigfish starpilot --num-steps 64 --num-minibatches 2

Runs the script's own `main` without tests and files, and takes the time of its parts. Flags that are not the
tool's go to the script. With --cleanrl the script and CleanRL's ppo_procgen.py run in turn, as their users
run them, with the same flags and on the same levels (easy, all there are):

    pip download cleanrl==1.2.0 --no-deps --only-binary :all: --python-version 3.9
    python benchmark/speed.py ppo_procgen --cleanrl cleanrl-1.2.0-py3-none-any.whl --num-steps 64
"""

import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from helpers import ROOT, Count, check_limits, copy_script, fail
from procgen.env import ENV_NAMES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_procgen import make_envs

PARTS = ["environments", "inference", "update"]
CLEANRL = "cleanrl/ppo_procgen.py"  # in its wheel


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    script: Literal["ppo_procgen", "spo_procgen", "mdpo_procgen", "mdspo_procgen"]
    games: tuple[Literal[tuple(ENV_NAMES)], ...] = ("bigfish",)  # a table each
    iterations: Count = 5  # measured as they are, and as many with the time of each part
    warmup: Count = 2  # iterations before that: compilation, page faults
    test: bool = True  # measure a test on the full distribution, too
    cleanrl: Path | None = None  # CleanRL's wheel, to compare with it
    rounds: Count = 2  # with --cleanrl, in each of which both scripts run

    def __post_init__(self):
        check_limits(self)


def now() -> float:
    """Once the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimedEnvs:
    """Environments with a clock around their calls."""

    def __init__(self, envs, measure):
        self.num = envs.num
        self.act = partial(measure, "environments", envs.act)
        self.observe = partial(measure, "environments", envs.observe)


class Measurement:
    """Takes the time of a script's run, whose functions it wraps. After the warm-up every second iteration is
    timed in parts, and a GPU is waited for before and after each. The others run as they are."""

    def __init__(self, script, warmup: int):
        self.original = dict(vars(script))
        self.to_warm_up = warmup
        self.in_parts = True
        self.seconds = defaultdict(float)  # by the name of a part, of the iteration under way
        self.parts = []  # those of all iterations in parts
        self.wholes = []  # seconds of the others
        for function in (self.make_envs, self.speed_up, self.rollout, self.update):
            setattr(script, function.__name__, function)
        script.save_checkpoint = lambda *state: None

    def measure(self, part: str, function, *inputs):
        if not self.in_parts:
            return function(*inputs)
        start = now()
        result = function(*inputs)
        self.seconds[part] += now() - start
        return result

    def make_envs(self, *inputs):
        envs = self.original["make_envs"](*inputs)
        return TimedEnvs(envs, self.measure)

    def speed_up(self, *inputs):
        self.policies, loss_function = self.original["speed_up"](*inputs)
        timed = [partial(self.measure, "inference", policy) for policy in self.policies]
        return timed, loss_function

    def rollout(self, *inputs):
        self.start = now()
        self.seconds.clear()
        self.original["rollout"](*inputs)

    def update(self, *inputs):
        result = self.measure("update", self.original["update"], *inputs)
        seconds = now() - self.start
        if self.to_warm_up > 0:
            self.to_warm_up -= 1
        elif self.in_parts:
            self.parts.append(self.seconds | {"whole": seconds})
        else:
            self.wholes.append(seconds)
        self.in_parts = not self.in_parts
        return result


def parse_flags(script, game: str, words: list[str]):
    """The script's Args of a command line."""
    settings = tyro.cli(script.Args, prog=f"{script.SCRIPT}.py", args=["--env-id", game, *words])
    if settings.env_id != game or settings.resume or settings.track:
        fail(
            "--env-id, --resume and --track are not for a measurement: --games says which, and no run is left"
        )
    return settings


def measure(args: Args, game: str, words: list[str]):
    """Prints the numbers of one game."""
    script = copy_script(args.script)
    settings = parse_flags(script, game, words)
    settings.total_timesteps = (args.warmup + 2 * args.iterations) * settings.batch_size
    settings.eval_interval = 0
    measurement = Measurement(script, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        script.make_run_dir = lambda settings: Path(folder)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            script.main(settings)
    for line in output.getvalue().splitlines():
        if folder not in line:
            print(line)  # precision, what compilation says
    print_parts(measurement.parts)
    each = " of each agent" if len(measurement.policies) > 1 else ""
    print(f"steps a second{each}: {describe(settings.batch_size / np.array(measurement.wholes))}")
    print(f"environments alone: {step_environments(settings):,.0f} steps a second")
    if args.test:
        num = settings.num_eval_envs
        start = now()
        script.evaluate(measurement.policies[:1], settings, num, (0, 0), 1, torch.device(settings.device), ())
        print(f"a test of an agent, {num} episodes: {now() - start:.2f} s")
    print(f"peak host memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)


def describe(speeds) -> str:
    return f"{np.median(speeds):,.0f} (from {min(speeds):,.0f} to {max(speeds):,.0f})"


def print_parts(parts: list[dict[str, float]]):
    """A table of the medians over iterations."""
    medians = {}
    for part in ["whole", *PARTS]:
        medians[part] = np.median([each[part] for each in parts])
    whole = medians.pop("whole")
    medians["everything else"] = whole - sum(medians.values())
    print("| part | ms an iteration | share |")
    print("| --- | --- | --- |")
    for part, seconds in medians.items():
        print(f"| {part} | {1e3 * seconds:.1f} | {seconds / whole:.1%} |")


def step_environments(settings, num_steps: int = 256) -> float:
    """Steps a second of the environments of a training when nothing else is done."""
    envs = make_envs(settings, settings.num_envs, settings.num_levels, settings.start_level, settings.seed)
    actions = np.random.default_rng(settings.seed).integers(15, size=(num_steps, envs.num), dtype=np.int32)
    start = time.perf_counter()
    for each in actions:
        envs.observe()
        envs.act(each)
    envs.observe()
    return num_steps * envs.num / (time.perf_counter() - start)


def run(path: Path, words: list[str]) -> list[float]:
    """Steps a second of each iteration but the first of a script in a folder of its own: from one point of
    its curve charts/SPS to the next."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, path, *words], cwd=folder, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            fail(f"{path} {' '.join(words)} ended with status {done.returncode}")
        events = next(Path(folder).rglob("events.out.tfevents.*"))  # of the first agent
        points = EventAccumulator(str(events)).Reload().Scalars("charts/SPS")
    steps = np.diff([point.step for point in points])
    seconds = np.diff([point.wall_time for point in points])
    return list(steps / seconds)


def compare(args: Args, game: str, words: list[str]):
    """Prints the speeds of CleanRL's script and of ours, which run in turn."""
    settings = parse_flags(copy_script(args.script), game, words)
    num_steps = (args.warmup + args.iterations) * settings.batch_size
    words = ["--env-id", game, *words, "--total-timesteps", str(num_steps)]
    levels = "--distribution-mode easy --num-levels 0 --eval-interval 0".split()
    speeds = {"CleanRL": [], args.script: []}
    with tempfile.TemporaryDirectory() as folder:
        try:
            theirs = Path(zipfile.ZipFile(args.cleanrl).extract(CLEANRL, folder))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            fail(f"--cleanrl cannot use {args.cleanrl}: {error!r}")
        for _ in range(args.rounds):
            speeds["CleanRL"] += run(theirs, words)[args.warmup - 1 :]
            speeds[args.script] += run(ROOT / f"{args.script}.py", words + levels)[args.warmup - 1 :]
    for name, each in speeds.items():
        print(f"{name}, steps a second: {describe(each)}")
    theirs, ours = map(np.median, speeds.values())
    print(f"ratio {ours / theirs:.2f}", flush=True)


def main(args: Args, words: list[str]):
    """With the flags of the script in `words`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{os.cpu_count()} cores, {gpu}, torch {torch.__version__}")
    for game in args.games:
        print(f"\n{args.script}, {game}, {' '.join(words) or 'no flags'}", flush=True)
        if args.cleanrl:
            compare(args, game, words)
        else:
            measure(args, game, words)


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
