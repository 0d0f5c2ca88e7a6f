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
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Annotated, Literal

import tyro
from helpers import ROOT, Range, check_folder, check_ranges, fail, run_tool, split_words
from procgen.env import ENV_NAMES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from ppo_procgen import Output

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its authors
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let everything else go first
import ray

LAUNCH = ROOT / "benchmark" / "launch.py"
PROGRESS = "charts/SPS"  # a curve that gets a point in each iteration
TEN_DIGITS = 10 * "[0-9]"  # for glob: the time in a run folder's name

# These do not change what a finished run has learned; any other flag that differs makes it another run.
INDIFFERENT = [
    "total_timesteps",
    "eval_interval",
    "final_eval_episodes",
    "checkpoint_interval",
    "resume",
    "device",
    "num_env_threads",
    "bf16",
    "compile",
    "cudagraphs",
    "torch_deterministic",
    "track",
    "wandb_project_name",
    "wandb_entity",
]
SET_HERE = ["--env-id", "--seed", "--exp-name", "--resume"]

Cores = Annotated[int, Range(1, 1000)]
Retries = Annotated[int, Range(0, 1000)]
Speed = Annotated[float, Range(1e-3, 1e9)]


@dataclass
class Args:
    algorithms: tuple[Literal["ppo", "spo", "mdpo", "mdspo"], ...] = ("ppo", "mdpo")
    """scripts to run"""
    games: tuple[str, ...] = tuple(ENV_NAMES)
    """any of the 16"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """of everything random in a run"""
    variants: tuple[str, ...] = ("",)
    """each NAME="FLAGS OF THE SCRIPT", or "" for the script as it is"""
    output: Path = Path(".")
    """folder that gets runs/, and in it the logs of the runs in runs/logs/"""
    cpus: Cores = 2
    """cores for each run"""
    gpus: Annotated[float | None, Range(0, 1000)] = None
    """GPUs for each run, may be a fraction; by default 1 if there are any"""
    address: str = "local"
    """HOST:PORT of a Ray cluster, auto for that of this machine, local for a new one"""
    retries: Retries = 3
    """how often a run goes on whose process or node died"""
    steps_per_second: tuple[Speed, Speed] = (3200.0, 800.0)
    """for the estimate, of a single agent and of each agent of a pair; the default is an assumption"""
    dry_run: bool = False
    """print the plan and stop"""

    def __post_init__(self):
        check_ranges(self)
        for name in ("algorithms", "games", "seeds", "variants"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} needs one or more different values")
        for game in self.games:
            if game not in ENV_NAMES:
                raise ValueError(f"--games must be of {', '.join(ENV_NAMES)}, not {game}")
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1 > 0:
            raise ValueError(f"--gpus must be a fraction or a whole number, not {self.gpus}")
        if not re.fullmatch(r"local|auto|[\w.-]+:\d+", self.address):
            raise ValueError(f"--address must be HOST:PORT, auto or local, not {self.address}")
        for variant in self.variants:
            if not re.fullmatch(r"|[\w.+-]+=.*", variant):
                raise ValueError(f"--variants must each be NAME=FLAGS or empty, not {variant}")
        names = [variant.partition("=")[0] for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"--variants: {name} is there twice, and each needs a name of its own")


@dataclass
class Run:
    name: str  # of its folder, without the time
    command: list[str]  # script and flags
    steps: int  # of each agent
    hours: float  # as estimated
    state: str  # new, interrupted or finished


def make_plan(args: Args, script_flags: list[str]) -> list[Run]:
    """All runs with their states. Raises Failure or SystemExit if one of them cannot be."""
    runs = []
    for variant in args.variants:
        label, _, flags = variant.partition("=")
        try:
            words = [*script_flags, *shlex.split(flags)]
        except ValueError as error:  # a quotation that has no end
            fail(f"--variants: {error} in {flags}")
        for game in args.games:
            for algorithm in args.algorithms:
                for seed in args.seeds:
                    runs.append(plan_run(args, algorithm, game, seed, label, words))
    return runs


def plan_run(args: Args, algorithm: str, game: str, seed: int, label: str, flags: list[str]) -> Run:
    """A run with its state. The flags are those of the script."""
    flags = [fill_in(word, game, seed, args.output) for word in flags]
    for word in flags:
        flag = word.split("=")[0].replace("_", "-")
        if flag in SET_HERE:
            fail(f"{flag} is not for the flags of the scripts, since the sweep sets it")
    script = f"{algorithm}_procgen"
    exp_name = f"{script}+{label}" if label else script
    words = ["--num-env-threads", str(args.cpus), *flags]
    words += ["--env-id", game, "--exp-name", exp_name, "--seed", str(seed)]
    settings, defaults = read_flags(script, words)
    if settings["eval_interval"] == 0:
        fail("--eval-interval 0 is not for a sweep, which knows finished runs by their final test")

    batch_size = settings["num_envs"] * settings["num_steps"]
    steps = settings["total_timesteps"] // batch_size * batch_size
    hours = steps / speed_of(settings, args) / 3600
    name = f"{game}__{exp_name}__{seed}"
    state = find_state(name, settings, defaults, steps, args.output)
    encoder = settings["pretrained_encoder"]
    may_come = "*" in encoder  # it fits no run yet, but perhaps one that is still to be trained
    if state == "new" and encoder and not may_come and not (args.output / encoder).is_file():
        fail(f"--pretrained-encoder: there is no {encoder}, for {name}")
    command = [str(ROOT / f"{script}.py"), *words, "--resume", "auto"]
    return Run(name, command, steps, hours, state)


def fill_in(word: str, game: str, seed: int, output: Path) -> str:
    """A script's flag, value or FLAG=VALUE without placeholders; * stays where no path fits."""
    if word.startswith("--") and "=" in word:
        flag, _, value = word.partition("=")
        return f"{flag}={fill_in(value, game, seed, output)}"
    word = word.replace("{game}", game).replace("{seed}", str(seed))
    if "*" not in word:
        return word
    fitting = glob(word, root_dir=output)
    newest = max(fitting, default=word)
    return str(output / newest)


def read_flags(script: str, words: list[str]) -> tuple[dict, dict]:
    """All settings of a script, and its defaults, as its files have them. Raises SystemExit for words that it
    does not take, of which tyro has told then."""
    module = importlib.import_module(script)
    args = tyro.cli(module.Args, prog=f"{script}.py", description=module.__doc__, args=words)
    defaults = {field.name: field.default for field in fields(module.Args)}
    return as_json(asdict(args)), as_json(defaults)


def as_json(settings: dict) -> dict:
    """As they come back from a file: tuples are lists."""
    return json.loads(json.dumps(settings))


def speed_of(settings: dict, args: Args) -> float:
    """Assumed steps a second of each agent."""
    single, of_a_pair = args.steps_per_second
    num_agents = settings.get("num_agents")
    if num_agents is None:
        return single
    return of_a_pair * 4 / num_agents**2  # each learns from the minibatches of all


def find_state(run_name: str, settings: dict, defaults: dict, steps: int, output: Path) -> str:
    """new, interrupted or finished. Raises Failure if what there is was made with other settings."""
    state = "new"
    for folder in (output / "runs").glob(f"{run_name}__{TEN_DIGITS}"):
        final_test = read_object(folder / "final_test.json")
        made_with = read_object(folder / "args.json") or final_test.get("args")
        if isinstance(made_with, dict):
            check_settings(folder, defaults | made_with, settings)
        tested_step = final_test.get("global_step")
        if isinstance(tested_step, int) and tested_step >= steps:
            state = "finished"
        elif state == "new" and (folder / "checkpoint.pt").exists():
            state = "interrupted"
    return state


def read_object(path: Path) -> dict:
    """A JSON file; empty if it is not there or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def check_settings(folder: Path, made_with: dict, settings: dict):
    """Raises Failure if a setting that matters differs."""
    indifferent = list(INDIFFERENT)
    if settings["pretrained_encoder"]:
        indifferent.append("channels")  # are the encoder's
    for name, value in settings.items():
        before = made_with.get(name, value)
        if before != value and name not in indifferent:
            flag = "--" + name.replace("_", "-")
            way_out = "take --variants NAME=FLAGS or another --output"
            fail(f"{folder} was made with {flag} {before}, not {value}: {way_out}")


def print_plan(runs: list[Run], args: Args):
    width = max(len(run.name) for run in runs)
    print(f"{'run':{width}}  {'state':11}  {'million steps':>13}  {'hours':>7}")
    for run in runs:
        print(f"{run.name:{width}}  {run.state:11}  {run.steps / 1e6:13,.2f}  {run.hours:7.2f}")
    states = [run.state for run in runs]
    counts = [f"{states.count(state)} {state}" for state in ("finished", "interrupted", "new")]
    print(", ".join(counts))
    hours = sum(run.hours for run in runs if run.state != "finished")
    cost = f"to do: at most {hours:,.1f} hours of runs, each on {args.cpus} cores"
    if args.gpus:
        cost += f" and {args.gpus:g} GPUs: {hours * args.gpus:,.1f} GPU hours"
    print(cost)
    single, pair = args.steps_per_second
    print(f"assumed: {single:,g} steps a second for a single agent, {pair:,g} for each agent of a pair,")
    print("whatever the settings; read charts/SPS of a run here and give --steps-per-second", flush=True)


def train(run: Run, output: Path, log: Path) -> tuple[int, str]:
    """A Ray task: runs the script to its end. Returns its exit status and its last line. Raises
    ChildProcessError, upon which Ray tries again, if a signal killed it."""
    with contextlib.suppress(ValueError):  # in a thread that gets no signals anyway
        # By this Ray cancels. It is ignored if a script has started the sweep in its background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("ab") as file:
        lock(file)
        file.write(f"\nstarted on {socket.gethostname()}: {shlex.join(run.command)}\n".encode())
        file.flush()
        command = [sys.executable, str(LAUNCH), str(os.getpid()), *run.command]
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


def lock(file):
    """Waits until no other process has the file locked. The script inherits the lock, so that no second one
    begins before it ends, wherever that is."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(1)  # a wait without end in the kernel could not be cancelled


def last_line(log: Path, start: int = 0) -> str:
    """The last line of a log that is not blank; nothing of what was written before the byte `start`."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - 2000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return re.split(r"[\r\n]+", text.strip())[-1].strip()


def start_ray(args: Args) -> float:
    """Joins or makes the cluster. Returns the GPUs for each run. Raises Failure if no machine has enough."""
    options = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if args.address == "local":
        options |= {"include_dashboard": False, "object_store_memory": 10**8}
    try:
        if ":" in args.address:  # Ray tries for minutes
            socket.create_connection(args.address.split(":"), timeout=5).close()
        ray.init(address=args.address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if args.address != "local" and "RAY_AUTH_MODE" not in os.environ:
            reason += "; if the cluster wants a token, set RAY_AUTH_MODE=token"
        fail(f"--address {args.address}: {reason}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_cpus = max(node.get("CPU", 0) for node in nodes)
    most_gpus = max(node.get("GPU", 0) for node in nodes)
    gpus = min(1, most_gpus) if args.gpus is None else args.gpus
    if args.cpus > most_cpus:
        fail(f"--cpus {args.cpus} is more than any machine has: at most {most_cpus:g}")
    if gpus > most_gpus:
        fail(f"--gpus {gpus:g} is more than any machine has: at most {most_gpus:g}")
    return gpus


class Stop:
    """Whether the sweep is to end: at the first SIGINT or SIGTERM. A second one kills it."""

    def __init__(self):
        self.signal_number = 0
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, signal_number: int, frame):
        self.signal_number = signal_number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        message = b"\nstopping: each run finishes its iteration; once more stops at once\n"
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(sys.stderr.fileno(), message)


class Watched:
    """A run as seen from here: the last words in its log, and how far its curves on disk go."""

    def __init__(self, run: Run, output: Path):
        self.name = run.name
        self.steps = run.steps
        self.runs_folder = output / "runs"
        self.log = self.runs_folder / "logs" / f"{run.name}.log"
        self.start = self.log.stat().st_size if self.log.exists() else 0
        self.curves_folder = None
        self.curves = None

    def last_words(self) -> str:
        """Empty before it has begun."""
        return last_line(self.log, self.start)

    def fraction_done(self) -> float:
        """Of its steps, up to some minutes ago: that is when TensorBoard's files were last written."""
        folder = self.find_curves()
        if folder is None:
            return 0.0
        if folder != self.curves_folder:
            self.curves_folder = folder
            # Where a run goes on from its checkpoint, steps go back; the last point counts.
            self.curves = EventAccumulator(
                str(folder), size_guidance={"scalars": 1}, purge_orphaned_data=False
            )
        try:
            self.curves.Reload()
            newest = self.curves.Scalars(PROGRESS)[-1]
        except Exception:  # there is none yet, or it cannot be read: no reason to end a sweep
            return 0.0
        return min(1.0, newest.step / self.steps)

    def find_curves(self) -> Path | None:
        """The newest run folder, or the first agent's in it: all agents are equally far."""
        folders = sorted(self.runs_folder.glob(f"{self.name}__{TEN_DIGITS}"))
        if not folders:
            return None
        first_agent = folders[-1] / "agent_1"
        return first_agent if first_agent.is_dir() else folders[-1]


class Display:
    """A bar for all runs and, in a terminal, a line for each run at work; elsewhere a line a minute."""

    def __init__(self, num_runs: int):
        self.num_runs = num_runs
        self.terminal = sys.stderr.isatty()
        bar_format = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
        if not self.terminal:
            bar_format += "\n"
        interval = 0.1 if self.terminal else 60
        self.bar = tqdm(total=num_runs, desc="starting", bar_format=bar_format, mininterval=interval)
        self.lines = {}  # {name of a run at work: its line}

    def say(self, text: str):
        """A line that stays."""
        if self.terminal:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def end(self, name: str, words: str):
        """Of a run that ended with these words."""
        if name in self.lines:
            self.lines.pop(name).close()
        self.say(f"{name}: {words}")

    def update(self, waiting: list[Watched], num_failed: int):
        """`waiting` are the runs that have not ended."""
        done = 0.0
        for watched in waiting:
            words = watched.last_words()
            if not words:
                continue
            if watched.name not in self.lines:
                self.lines[watched.name] = tqdm(bar_format="{desc}", leave=False, disable=not self.terminal)
                self.say(f"{watched.name}: at work")
            self.lines[watched.name].set_description_str(f"  {watched.name}: {words}")
            done += watched.fraction_done()
        running = len(self.lines)
        finished = self.num_runs - len(waiting) - num_failed
        counts = f"{finished} finished, {running} running, {len(waiting) - running} waiting"
        self.bar.set_description_str(f"{counts}, {num_failed} not finished", refresh=False)
        self.bar.update(finished + done - self.bar.n)

    def close(self):
        for line in self.lines.values():
            line.close()
        self.bar.close()


def run_all(runs: list[Run], args: Args, gpus: float, stop: Stop) -> int:
    """Trains, and shows how it goes. Returns how many did not finish."""
    (args.output / "runs" / "logs").mkdir(parents=True, exist_ok=True)
    options = {"max_retries": args.retries, "retry_exceptions": [ChildProcessError]}
    task = ray.remote(num_cpus=args.cpus, num_gpus=gpus, **options)(train)
    waiting = {}
    for run in runs:
        watched = Watched(run, args.output)
        result = task.options(name=run.name).remote(run, args.output, watched.log)
        waiting[result] = watched
    num_failed = 0
    cancelled = False
    with contextlib.closing(Display(len(runs))) as display:
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=1)
            for result in ended:
                finished, words = outcome_of(result, stop)
                if not finished:
                    num_failed += 1
                display.end(waiting.pop(result).name, words)
            display.update(list(waiting.values()), num_failed)
            if stop.signal_number and not cancelled:
                cancelled = True
                for result in waiting:
                    ray.cancel(result)
    return num_failed


def outcome_of(result, stop: Stop) -> tuple[bool, str]:
    """Whether a run has finished, and its last words or why not."""
    try:
        status, words = ray.get(result)
    except ray.exceptions.RayError as error:
        if stop.signal_number:
            return False, "stopped"
        return False, str(error).strip().splitlines()[-1]
    if status > 0:
        return False, f"exit status {status}: {words}"
    return True, words


def main(args: Args, script_flags: list[str]):
    """The script_flags go to every script."""
    args = replace(args, output=args.output.resolve())
    runs = make_plan(args, script_flags)
    todo = [run for run in runs if run.state != "finished"]
    if todo:
        check_folder("--output", args.output)
    print_plan(runs, args)
    if args.dry_run or not todo:
        return
    gpus = start_ray(args)
    stop = Stop()
    num_failed = run_all(todo, args, gpus, stop)
    ray.shutdown()

    summary = f"{len(todo) - num_failed} of {len(todo)} finished, in {args.output / 'runs'}"
    if num_failed > 0:
        summary += "; the same command goes on with the others, whose words are in logs/"
    print(summary)
    if num_failed > 0:
        sys.exit(128 + stop.signal_number if stop.signal_number else 1)


if __name__ == "__main__":
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports what resumed runs leave behind
    own_words, script_words = split_words(sys.argv[1:])
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        run_tool(partial(main, script_flags=script_words), Args, __doc__, own_words)
