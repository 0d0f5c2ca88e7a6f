"""All that only a GPU can show: that the fast path computes what the plain one does, and how fast it is.

    python benchmark/gpu_check.py

Run it with all requirements installed, those of tests/ too. Each part is a command of its own with a time
limit, so that one which fails or hangs takes no other with it. What they print goes to a log as well. The
parts of this file can be tried anywhere, with the flags of a training script:

    python benchmark/gpu_check.py --here numbers --device cpu --channels 4 8 8 --num-steps 16
"""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from helpers import ROOT, Count, check_limits, copy_script, fail
from speed import now, step_environments
from torch.profiler import profile

HERE = "benchmark/gpu_check.py --here"
SPEED = "benchmark/speed.py"
RUN = "mdpo_procgen.py --total-timesteps 163840 --eval-interval 5 --final-eval-episodes 64"
CALLS = 100  # of a policy, in the part acting
# The most seconds of each, and its words for python. Those that need a GPU have the word cuda.
PARTS = {
    "machine": (60, f"{HERE} machine"),
    "numbers": (180, f"{HERE} numbers --num-steps 64 --num-minibatches 2 --device cuda"),
    "ppo": (150, f"{SPEED} ppo_procgen --games bigfish starpilot bossfight --iterations 3 --device cuda"),
    "mdpo": (120, f"{SPEED} mdpo_procgen --iterations 3 --device cuda"),
    "no-compile": (90, f"{SPEED} ppo_procgen --iterations 2 --no-test --no-compile --device cuda"),
    "no-bf16": (90, f"{SPEED} ppo_procgen --iterations 2 --no-test --no-bf16 --device cuda"),
    "acting": (60, f"{HERE} acting --final-eval-episodes 64 --device cuda"),
    "kernels": (90, f"{HERE} kernels --num-steps 64 --num-minibatches 2 --device cuda"),
    "run": (120, f"{RUN} --device cuda"),
    "tests": (300, "-m pytest -o addopts= -q -rs -k cuda tests/test_fast_path.py"),
}


@dataclass
class Args:
    parts: tuple[Literal[tuple(PARTS)], ...] = tuple(PARTS)  # in this order
    seconds: Count = 570  # for all of them together
    log: Path = Path("gpu_check.log")  # what is printed
    here: Literal["machine", "numbers", "acting", "kernels", ""] = ""  # only this part, without limit and log

    def __post_init__(self):
        check_limits(self)


def run(command: str, seconds: float, out) -> str:
    """Says what went wrong, or nothing. What it prints goes to the file `out`."""
    words = [ROOT / word if word.endswith(".py") else word for word in command.split()]
    env = os.environ | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    options = {"env": env, "stdout": out, "stderr": out, "start_new_session": True}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, **options)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    return f"status {status}" if status != 0 else ""


def run_parts(args: Args) -> list[str]:
    """Those that failed."""
    failed = []
    end = time.time() + args.seconds
    with subprocess.Popen(["tee", args.log], stdin=subprocess.PIPE, text=True) as tee:
        say = partial(print, file=tee.stdin, flush=True)
        for name in args.parts:
            most_seconds, command = PARTS[name]
            say(f"\n## {name}: python {command}")
            start = time.time()
            seconds = min(most_seconds, end - start)
            if "cuda" in command and not torch.cuda.is_available():
                fault = "there is no GPU"
            elif seconds < 1:
                fault = "no time is left"
            else:
                fault = run(command, seconds, tee.stdin)
            if fault:
                failed.append(name)
                say(f"FAILED: {fault}")
            say(f"took {time.time() - start:.0f} s")
        say(f"\nfailed: {', '.join(failed) or 'nothing'}")
    return failed


# The parts of this file. words: flags of the training script.


def prepare(name: str, words: list[str]):
    """A script and its Args of a command line, ready for its set_up."""
    script = copy_script(name)
    args = tyro.cli(script.Args, prog=f"{name}.py", args=words)
    torch.backends.cudnn.benchmark = True
    return script, args, torch.device(args.device)


def machine(words: list[str]):
    """What it is, and how fast Procgen is on it."""
    print(f"{platform.platform()}, python {platform.python_version()}, {os.cpu_count()} cores", flush=True)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    with contextlib.suppress(FileNotFoundError):
        query = "--query-gpu=name,compute_cap,driver_version,memory.total"
        subprocess.run(["nvidia-smi", query, "--format=csv"])
    for game in ("bigfish", "starpilot", "bossfight"):
        _, args, _ = prepare("ppo_procgen", ["--env-id", game, *words])
        print(f"{game}: {step_environments(args):,.0f} steps a second of the environments alone", flush=True)


def numbers(words: list[str]):
    """How alike the ways are that MDPO's weights go in one update of the same data: the cosine of the angle
    to the way of plain float32, and their lengths to its length."""
    script, args, device = prepare("mdpo_procgen", words)
    first = None
    # Plain float32 twice: how much the order of additions does.
    for switches in ("", "", "bf16", "compile", "bf16 compile"):
        args.bf16 = "bf16" in switches
        args.compile = "compile" in switches
        torch.manual_seed(args.seed)
        agents, optimizer, runners = script.set_up(args, device)
        policies, loss_function = script.speed_up(args, agents, runners, device)
        batches = [runner.batch for runner in runners]
        if first is None:
            script.rollout(policies, runners, args)
            for runner in runners:
                runner.finish_rollout()
            data = batches
        for batch, columns in zip(batches, data):
            for column, filled in zip(batch, columns):
                column.copy_(filled)
        before = weights_of(agents)
        torch.manual_seed(args.seed)
        script.update(loss_function, agents, optimizer, batches, args)
        way = weights_of(agents) - before
        first = way if first is None else first
        cosine = (way @ first / way.norm() / first.norm()).item()
        length = (way.norm() / first.norm()).item()
        print(f"{switches or 'plain'}: cosine {cosine:.6f}, length {length:.4f}", flush=True)


def weights_of(agents) -> torch.Tensor:
    weights = [weight for agent in agents for weight in agent.parameters()]
    return nn.utils.parameters_to_vector(weights).detach().double()


def acting(words: list[str]):
    """Milliseconds of one call of PPO's policy: until it returns, and until the device is done."""
    script, args, device = prepare("ppo_procgen", words)
    agents, _, runners = script.set_up(args, device)
    for args.compile in (False, True):
        (policy,), _ = script.speed_up(args, agents, runners, device)
        for rows in (32, 64):
            obs = runners[0].data.obs.new_zeros(rows, *runners[0].obs_shape)
            seconds = []
            for _ in range(CALLS):
                start = now()
                policy(obs)
                returned = time.perf_counter()
                seconds.append([returned - start, now() - start])
            host, whole = 1000 * np.median(seconds, axis=0)
            print(f"compile {args.compile}, {rows} rows: host {host:.3f} ms, all {whole:.3f} ms", flush=True)


def kernels(words: list[str]):
    """What takes longest on the device in an update of MDPO."""
    script, args, device = prepare("mdpo_procgen", words)
    agents, optimizer, runners = script.set_up(args, device)
    _, loss_function = script.speed_up(args, agents, runners, device)
    batches = [runner.batch for runner in runners]
    script.update(loss_function, agents, optimizer, batches, args)
    with profile() as profiler:
        script.update(loss_function, agents, optimizer, batches, args)
        now()
    of_device = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    rows = []
    for event in profiler.key_averages():
        if event.device_type.name == device.type.upper():
            rows.append((getattr(event, of_device) / 1000, event.count, event.key))
    for milliseconds, count, name in sorted(rows, reverse=True)[:20]:
        print(f"{milliseconds:9.2f} ms {count:6} x {name[:90]}")


def main(args: Args, words: list[str]):
    if args.here:
        globals()[args.here](words)
        return
    if words:
        fail(f"{' '.join(words)}: flags of a training script go with --here")
    if run_parts(args):
        sys.exit(1)


if __name__ == "__main__":
    main(*tyro.cli(Args, description=__doc__, return_unknown_args=True))
