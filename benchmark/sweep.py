"""Trains {algorithms} x {games} x {seeds} x {variants} on Ray: this machine, or a cluster that Ray knows.

Each run is a training script at work in --output with --resume auto, so that its folder is the one that the
script makes by itself. What it prints is in runs/logs/. The same command goes on where it was stopped:
finished runs are skipped, interrupted ones resumed. Ctrl-C lets all runs save and stop; a second one ends
them at once.

What follows `--` goes to every script. A variant is a name and flags of the script; its --exp-name, by which
runs are told apart, is ppo_procgen+NAME in place of ppo_procgen. In the flags {game} and {seed} stand for
those of the run, and * in a path below --output for the last that fits.

    python benchmark/sweep.py --algorithms ppo mdpo --games bigfish fruitbot --seeds 1 2 3 --dry-run
    python benchmark/sweep.py --variants "" wide="--channels 32 64 64" -- --total-timesteps 25000000

On a cluster every node must see this repository, the Python environment and --output under the same paths.
"""

import glob
import importlib
import itertools
import json
import logging
import os
import re
import runpy
import shlex
import signal
import socket
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from helpers import ROOT, Count, CountOrZero, check_limits, fail
from procgen.env import ENV_NAMES
from runs import read_json

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its authors
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let everything else go first
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # `uv run`: Ray would copy all but .venv
import ray

SET_HERE = ["--env-id", "--seed", "--exp-name", "--resume"]
# Settings in which a run that is there may differ from one that is asked for.
MAY_DIFFER = "total_timesteps eval_interval final_eval_episodes checkpoint_interval resume device".split()
MAY_DIFFER += "bf16 compile torch_deterministic track".split()


@dataclass
class Args:
    algorithms: tuple[Literal["ppo", "spo", "mdpo", "mdspo"], ...] = ("ppo", "mdpo")
    """scripts to run"""
    games: tuple[Literal[tuple(ENV_NAMES)], ...] = tuple(ENV_NAMES)
    """by default all 16"""
    seeds: tuple[CountOrZero, ...] = (1, 2, 3)
    """of everything random in a run"""
    variants: tuple[str, ...] = ("",)
    """each NAME="FLAGS OF THE SCRIPT", or "" for the script as it is"""
    output: Path = Path(".")
    """folder that gets runs/"""
    cpus: Count = 2
    """cores for each run"""
    gpus: float | None = None
    """GPUs for each run, may be a fraction; by default 1 if there are any"""
    address: str = "local"
    """HOST:PORT of a Ray cluster, auto for that of this machine, local for a new one"""
    dry_run: bool = False
    """print the plan and stop"""

    def __post_init__(self):
        check_limits(self)
        self.output = self.output.resolve()
        if self.gpus is not None and not (0 <= self.gpus <= 1 or self.gpus in range(1000)):
            raise ValueError(f"--gpus must be a fraction or a whole number, not {self.gpus}")
        for variant in self.variants:
            if not re.fullmatch(r"|[\w.+-]+=.*", variant):
                raise ValueError(f"--variants must each be NAME=FLAGS or empty, not {variant}")


@dataclass
class Run:
    name: str  # of its folder, without the time
    script: str
    words: list[str]  # flags of the script
    steps: int  # of each agent
    state: str  # new, interrupted or finished


def plan_run(args: Args, algorithm: str, game: str, seed: int, variant: str, flags: list[str]) -> Run:
    """A run with its state. The flags are for every script."""
    label, _, more = variant.partition("=")
    words = [fill_in(word, game, seed, args.output) for word in [*flags, *shlex.split(more)]]
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if flag in SET_HERE:
            fail(f"{flag} is not for the flags of the scripts, since the sweep sets it")
    script = f"{algorithm}_procgen"
    exp_name = f"{script}+{label}" if label else script
    words += ["--env-id", game, "--exp-name", exp_name, "--seed", str(seed)]

    module = importlib.import_module(script)
    settings = tyro.cli(module.Args, prog=f"{script}.py", args=words)
    if settings.eval_interval == 0:
        fail("--eval-interval 0 is not for a sweep, which knows finished runs by their final test")
    batch_size = settings.num_envs * settings.num_steps
    steps = settings.total_timesteps // batch_size * batch_size
    name = f"{game}__{exp_name}__{seed}"
    state = find_state(name, settings, steps, args.output)
    return Run(name, script, [*words, "--resume", "auto"], steps, state)


def fill_in(word: str, game: str, seed: int, output: Path) -> str:
    """Without placeholders; * stays where no path fits."""
    word = word.replace("{game}", game).replace("{seed}", str(seed))
    if "*" not in word:
        return word
    fitting = glob.glob(word, root_dir=output)
    return str(output / max(fitting, default=word))


def find_state(name: str, settings, steps: int, output: Path) -> str:
    """new, interrupted or finished. Ends the process if what is there was made with other settings."""
    state = "new"
    for folder in sorted((output / "runs").glob(f"{name}__{10 * '[0-9]'}")):
        check_settings(folder, settings)
        final_test = read_json(folder / "final_test.json")
        if final_test and final_test["global_step"] >= steps:
            return "finished"
        if (folder / "checkpoint.pt").exists():
            state = "interrupted"
    return state


def check_settings(folder: Path, settings):
    """Ends the process if a setting that matters differs."""
    made_with = read_json(folder / "args.json") or {}
    asked_for = json.loads(json.dumps(asdict(settings)))  # as they come back from a file: tuples are lists
    for name, value in asked_for.items():
        before = made_with.get(name, value)
        if before != value and name not in MAY_DIFFER:
            flag = "--" + name.replace("_", "-")
            way_out = "take --variants NAME=FLAGS or another --output"
            fail(f"{folder} was made with {flag} {before}, not {value}: {way_out}")


def print_plan(runs: list[Run]):
    width = max(len(run.name) for run in runs)
    print(f"{'run':{width}}  {'state':11}  million steps")
    for run in runs:
        print(f"{run.name:{width}}  {run.state:11}  {run.steps / 1e6:13,.2f}")
    states = [run.state for run in runs]
    counts = [f"{states.count(state)} {state}" for state in ("finished", "interrupted", "new")]
    print(", ".join(counts), flush=True)


def start_ray(args: Args) -> float:
    """Joins or makes the cluster. Returns the GPUs for each run."""
    options = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if args.address == "local":
        options |= {"include_dashboard": False, "object_store_memory": 10**8}
    try:
        if ":" in args.address:  # Ray tries for minutes
            socket.create_connection(args.address.split(":"), timeout=5).close()
        ray.init(address=args.address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "; set RAY_TMPDIR to a folder with a short path" if "AF_UNIX" in str(error) else ""
        fail(f"--address {args.address}: {error}{hint}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_cpus = max(node.get("CPU", 0) for node in nodes)
    most_gpus = max(node.get("GPU", 0) for node in nodes)
    gpus = min(1, most_gpus) if args.gpus is None else args.gpus
    if args.cpus > most_cpus or gpus > most_gpus:  # Ray would wait for a machine that has them
        has = f"{most_cpus:g} cores and {most_gpus:g} GPUs"
        fail(f"--cpus {args.cpus} --gpus {gpus:g} is more than any machine has: at most {has}")
    return gpus


def train(run: Run, root: Path, output: Path, log: Path) -> str:
    """A Ray task: the script, in this very process, which ends with the sweep however that ends. Returns
    "finished", or why not. To cancel the task is to interrupt the script, which then saves and ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell script's background
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(output)
    sys.argv = [f"{run.script}.py", *run.words]
    print(f"\nstarted on {os.uname().nodename}: {shlex.join(sys.argv)}", flush=True)
    status = 0
    try:
        runpy.run_path(str(root / sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        status = end.code
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if not status:
        return "finished"
    *_, last = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    return f"exit status {status}: {last}"


def run_all(runs: list[Run], args: Args, gpus: float) -> tuple[int, bool]:
    """Trains. Returns how many runs finished, and whether Ctrl-C stopped them."""
    logs = args.output / "runs" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # A process for each run: what one leaves in it is nothing to the next.
    task = ray.remote(num_cpus=args.cpus, num_gpus=gpus, max_calls=1)(train)
    waiting = {}
    for run in runs:
        result = task.options(name=run.name).remote(run, ROOT, args.output, logs / f"{run.name}.log")
        waiting[result] = run.name
    num_finished = 0
    stopped = False
    print(f"{len(runs)} runs; what they print is in {logs}; Ctrl-C lets them save and stop", flush=True)
    while waiting:
        try:
            ended, _ = ray.wait(list(waiting), timeout=1)
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            print("stopping: each run finishes its iteration and saves; once more stops at once", flush=True)
            for result in waiting:
                ray.cancel(result)
            continue
        for result in ended:
            outcome = outcome_of(result)
            num_finished += outcome == "finished"
            print(f"{waiting.pop(result)}: {outcome}; {len(waiting)} to go", flush=True)
    return num_finished, stopped


def outcome_of(result) -> str:
    """What `train` returns, or why it has not returned."""
    try:
        return ray.get(result)
    except ray.exceptions.TaskCancelledError:
        return "stopped"
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]


def main(args: Args, flags: list[str]):
    """The flags go to every script."""
    runs = []
    for variant, game, algorithm, seed in itertools.product(
        args.variants, args.games, args.algorithms, args.seeds
    ):
        runs.append(plan_run(args, algorithm, game, seed, variant, flags))
    if not runs or len({run.name for run in runs}) < len(runs):
        fail("--algorithms, --games, --seeds and --variants need one or more different values each")
    print_plan(runs)
    todo = [run for run in runs if run.state != "finished"]
    if args.dry_run or not todo:
        return
    gpus = start_ray(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    num_finished, stopped = run_all(todo, args, gpus)
    ray.shutdown()
    print(f"{num_finished} of {len(todo)} finished; the same command goes on with the others")
    if num_finished < len(todo):
        sys.exit(130 if stopped else 1)


if __name__ == "__main__":
    own_words = list(itertools.takewhile(lambda word: word != "--", sys.argv[1:]))
    main(tyro.cli(Args, description=__doc__, args=own_words), sys.argv[len(own_words) + 2 :])
