"""Trains {algorithms} x {games} x {seeds} x {variants} on Ray: this machine, or a cluster that Ray knows.

Each run is a process of a training script, started in --output with --resume auto, so that its folder is the
one that the script makes by itself. The same command goes on where it was stopped: finished runs are skipped,
interrupted ones resumed. What follows `--` goes to every script. A variant is a name and flags of the script;
its --exp-name, by which runs are told apart, is ppo_procgen+NAME in place of ppo_procgen. In the flags {game}
and {seed} stand for those of the run, and * in a path below --output for the last that fits.

    python benchmark/sweep.py --algorithms ppo mdpo --games bigfish fruitbot --seeds 1 2 3 --dry-run
    python benchmark/sweep.py --variants "" wide="--channels 32 64 64" -- --total-timesteps 25000000

On a cluster every node must see this repository, the Python environment and --output under the same paths.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from glob import glob
from itertools import product
from pathlib import Path
from typing import Literal

from command_line import check_folder, fail, parse_args
from procgen.env import ENV_NAMES
from tqdm import tqdm

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its authors
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let everything else go first
import ray

ROOT = Path(__file__).resolve().parents[1]
# These do not change what a finished run has learned; any other flag that differs makes it another run.
INDIFFERENT = "total_timesteps eval_interval final_eval_episodes checkpoint_interval resume device".split()
INDIFFERENT += "num_env_threads bf16 compile cudagraphs torch_deterministic".split()
INDIFFERENT += "track wandb_project_name wandb_entity".split()
SET_HERE = {"--env-id", "--seed", "--exp-name", "--resume"}
# A process that asks the kernel to be killed with its parent, and then becomes Python with other arguments.
LAUNCH = "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # PR_SET_PDEATHSIG
LAUNCH += "os.getppid() == int(sys.argv[1]) or sys.exit('its parent has ended')\n"
LAUNCH += "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


@dataclass
class Args:
    algorithms: tuple[Literal["ppo", "spo", "mdpo", "mdspo"], ...] = ("ppo", "mdpo")  # scripts to run
    games: tuple[str, ...] = tuple(ENV_NAMES)  # any of the 16
    seeds: tuple[int, ...] = (1, 2, 3)  # of everything random in a run
    variants: tuple[str, ...] = ("",)  # each NAME="FLAGS OF THE SCRIPT", or "" for the script as it is
    output: Path = Path(".")  # folder that gets runs/, and in it the logs of the runs in runs/logs/
    cpus: int = 2  # cores for each run
    gpus: float | None = None  # GPUs for each run, may be a fraction; by default 1 if there are any
    address: str = "local"  # HOST:PORT of a Ray cluster, auto for that of this machine, local for a new one
    retries: int = 3  # how often a run goes on whose process or node died
    steps_per_second: tuple[float, float] = (3200.0, 800.0)
    """for the estimate, of a single agent and of each agent of a pair; the default is an assumption"""
    dry_run: bool = False  # print the plan and stop

    def __post_init__(self):
        for name in ("algorithms", "games", "seeds", "variants"):
            if not 0 < len(getattr(self, name)) == len(set(getattr(self, name))):
                raise ValueError(f"--{name} needs one or more different values")
        for name, low in (("cpus", 1), ("retries", 0)):
            if not low <= getattr(self, name) <= 1000:
                raise ValueError(f"--{name} must be from {low} to 1000, not {getattr(self, name)}")
        if not (0 <= (self.gpus or 0) <= 1 or self.gpus in range(1000)):
            raise ValueError(f"--gpus must be a fraction or a whole number, not {self.gpus}")
        if not re.fullmatch(r"local|auto|[\w.-]+:\d+", self.address):
            raise ValueError(f"--address must be HOST:PORT, auto or local, not {self.address}")
        if not all(0 < speed < float("inf") for speed in self.steps_per_second):
            raise ValueError("--steps-per-second must be two numbers above 0")
        if wrong := [each for each in self.variants if not re.fullmatch(r"|[\w.+-]+=.*", each)]:
            raise ValueError(f"--variants must each be NAME=FLAGS or empty, not {wrong[0]}")


@dataclass
class Run:
    name: str  # of its folder, without the time
    command: list[str]  # script and flags
    steps: int  # of each agent
    hours: float  # as estimated
    state: str  # new, interrupted or finished


def make_plan(args: Args, extra: list[str]) -> list[Run]:
    """All runs with their states. `extra` are flags for every script."""
    runs = []
    sys.path.insert(0, str(ROOT))
    for variant, game, algorithm, seed in product(args.variants, args.games, args.algorithms, args.seeds):
        label, _, flags = variant.partition("=")
        flags = " ".join([*extra, flags]).replace("{game}", game).replace("{seed}", str(seed))
        for path in [word for word in flags.split() if "*" in word]:
            newest = max(glob(path, root_dir=args.output), default=path)
            flags = flags.replace(path, str(args.output / newest))
        words = ["--num-env-threads", str(args.cpus), *flags.split()]
        if own := SET_HERE & {re.split("[= ]", word)[0].replace("_", "-") for word in words}:
            fail(f"{min(own)} is not for the flags of the scripts, since the sweep sets it")
        script = f"{algorithm}_procgen"
        exp_name = f"{script}+{label}" if label else script
        words += ["--env-id", game, "--exp-name", exp_name, "--seed", str(seed)]
        args_class = importlib.import_module(script).Args
        settings = asdict(parse_args(args_class, __doc__, words, f"{script}.py: "))
        settings = json.loads(json.dumps(settings))  # as final_test.json has them
        if not settings["eval_interval"]:
            fail("--eval-interval 0 is not for a sweep, which knows finished runs by their final test")
        steps = settings["total_timesteps"]
        steps -= steps % (settings["num_envs"] * settings["num_steps"])
        hours = steps / args.steps_per_second[algorithm.startswith("md")] / 3600
        command = [str(ROOT / f"{script}.py"), *words, "--resume", "auto"]
        name = f"{game}__{exp_name}__{seed}"
        state, encoder = find_state(name, settings, steps, args.output), settings["pretrained_encoder"]
        # What is left of * may fit a run that is still to come.
        if encoder and state == "new" and "*" not in encoder and not (args.output / encoder).is_file():
            fail(f"--pretrained-encoder: there is no {encoder}, for {name}")
        runs.append(Run(name, command, steps, hours, state))
    return runs


def find_state(run_name: str, settings: dict, steps: int, output: Path) -> str:
    """new, interrupted or finished; the end of the process if what is finished had other settings."""
    states, indifferent = {"new"}, [*INDIFFERENT, *["channels"] * bool(settings["pretrained_encoder"])]
    for folder in (output / "runs").glob(f"{run_name}__{'[0-9]' * 10}"):
        if (folder / "checkpoint.pt").exists():
            states.add("interrupted")
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            content = json.loads((folder / "final_test.json").read_text())
            for name, value in content["args"].items():
                if name not in indifferent and settings.get(name, value) != value:
                    made = f"{folder} was made with --{name.replace('_', '-')} {value}"
                    fail(f"{made}, not {settings[name]}: take --variants NAME=FLAGS or another --output")
            if content["global_step"] >= steps:
                states.add("finished")
    return min(states, key="finished interrupted new".split().index)


def print_plan(runs: list[Run], todo: list[Run], args: Args):
    width = max(len(run.name) for run in runs)
    print(f"{'run':{width}}  {'state':11}  {'million steps':>13}  {'hours':>7}")
    for run in runs:
        print(f"{run.name:{width}}  {run.state:11}  {run.steps / 1e6:13,.2f}  {run.hours:7.2f}")
    states = [run.state for run in runs]
    hours, single, pair = sum(run.hours for run in todo), *args.steps_per_second
    print(", ".join(f"{states.count(state)} {state}" for state in ("finished", "interrupted", "new")))
    gpus = f" and {args.gpus:g} GPUs: {hours * args.gpus:,.1f} GPU hours" if args.gpus else ""
    print(f"to do: at most {hours:,.1f} hours of runs, each on {args.cpus} cores{gpus}")
    print(f"assumed: {single:,g} steps a second for a single agent, {pair:,g} for each agent of a pair,")
    print("whatever the settings; read charts/SPS of a run here and give --steps-per-second", flush=True)


def last_line(log: Path, start: int = 0) -> str:
    """The last line of a log that is not blank; nothing of what was written before the byte `start`."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 2000))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())[-1].strip()
    return ""


def train(run: Run, output: Path, log: Path) -> tuple[int, str]:
    """A Ray task: runs the script to its end. Returns its exit status and its last line. Raises
    ChildProcessError, upon which Ray tries again, if a signal killed it."""
    with log.open("ab") as file:
        # The process inherits the lock, so that no second one begins before it ends, wherever that is.
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(1)
        file.write(f"\nstarted on {socket.gethostname()}: {shlex.join(run.command)}\n".encode())
        file.flush()
        command = [sys.executable, "-c", LAUNCH, str(os.getpid()), *run.command]
        process = subprocess.Popen(command, cwd=output, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        while process.poll() is None:
            time.sleep(0.2)  # Ray cancels between two instructions of Python: process.wait() would not notice
    except KeyboardInterrupt:
        process.terminate()  # the script finishes its iteration and saves
        process.wait()
        raise
    if process.returncode < 0:
        raise ChildProcessError(f"killed by {signal.Signals(-process.returncode).name}")
    return process.returncode, last_line(log)


def start_ray(args: Args) -> float:
    """Joins or makes the cluster. Returns the GPUs for each run."""
    local = {"include_dashboard": False, "object_store_memory": 10**8} if args.address == "local" else {}
    try:
        if ":" in args.address:  # Ray tries for minutes
            socket.create_connection(args.address.split(":"), timeout=5).close()
        ray.init(address=args.address, log_to_driver=False, logging_level=logging.CRITICAL, **local)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--address {args.address}: {' '.join(str(error).split())}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: max(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    gpus = min(1, most["GPU"]) if args.gpus is None else args.gpus
    for flag, asked, found in (("--cpus", args.cpus, most["CPU"]), ("--gpus", gpus, most["GPU"])):
        if asked > found:
            fail(f"{flag} {asked:g} is more than any machine has: at most {found:g}")
    return gpus


def run_all(runs: list[Run], args: Args, gpus: float, signals: list[int]) -> dict[str, str]:
    """Trains, with a line for each run at work and a bar for all. Returns {run: why it did not finish}."""
    paths = {run.name: args.output / "runs" / "logs" / f"{run.name}.log" for run in runs}
    paths[runs[0].name].parent.mkdir(parents=True, exist_ok=True)
    options = {"max_retries": args.retries, "retry_exceptions": [ChildProcessError]}
    task = ray.remote(num_cpus=args.cpus, num_gpus=gpus, **options)(train)
    starts = {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}
    waiting = {task.options(name=run.name).remote(run, args.output, paths[run.name]): run for run in runs}
    lines, failed, cancelled, tty = {}, {}, False, sys.stderr.isatty()
    bar_format = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]" + "\n" * (not tty)
    bar = tqdm(total=len(runs), desc="starting", bar_format=bar_format, mininterval=0.1 if tty else 60)
    say = bar.write if tty else print
    while waiting:
        for ref in ray.wait(list(waiting), num_returns=len(waiting), timeout=1)[0]:
            run = waiting.pop(ref)
            try:
                status, message = ray.get(ref)
                reason = f"exit status {status}: {message}" if status else ""
            except ray.exceptions.RayError as error:
                reason = "stopped" if signals else str(error).strip().splitlines()[-1]
            failed |= {run.name: reason} if reason else {}
            if run.name in lines:
                lines.pop(run.name).close()
            say(f"{run.name}: {reason or message}", file=sys.stderr)
        for run in waiting.values():
            text = last_line(paths[run.name], starts[run.name])
            if text and run.name not in lines:
                lines[run.name] = tqdm(bar_format="{desc}", leave=False, disable=not tty)
                say(f"{run.name}: {text.partition(': ')[0]}", file=sys.stderr)
            if text:
                lines[run.name].set_description_str(f"  {run.name}: {text}")
                lines[run.name].fraction = int((re.findall(r"(\d+)%", text) or ["0"])[-1]) / 100
        finished = len(runs) - len(waiting) - len(failed)
        counts = f"{finished} finished, {len(lines)} running, {len(waiting) - len(lines)} waiting"
        bar.set_description_str(f"{counts}, {len(failed)} not finished", refresh=False)
        bar.update(finished + sum(line.fraction for line in lines.values()) - bar.n)
        if signals and not cancelled:
            cancelled = [ray.cancel(ref) for ref in waiting]
    bar.close()
    return failed


def main(args: Args, extra: list[str]):
    args.output = args.output.resolve()
    runs = make_plan(args, extra)
    todo = [run for run in runs if run.state != "finished"]
    if todo:
        check_folder("--output", args.output)
    print_plan(runs, todo, args)
    if args.dry_run or not todo:
        return
    gpus = start_ray(args)
    signals = []

    def catch(signum, frame):
        signals.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping: each run finishes its iteration; once more stops at once", file=sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, catch)
    failed = run_all(todo, args, gpus, signals)
    ray.shutdown()
    hint = "; the same command goes on with the others, whose words are in logs/" if failed else ""
    print(f"{len(todo) - len(failed)} of {len(todo)} finished, in {args.output / 'runs'}{hint}")
    sys.exit(128 + signals[0] if failed and signals else len(failed) > 0)


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        main(parse_args(Args, __doc__, sys.argv[1:end]), sys.argv[end + 1 :])
    except OSError as error:
        fail(f"{error.filename or '--output'}: {error.strerror or error}")
