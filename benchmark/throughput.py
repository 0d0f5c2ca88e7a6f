"""How fast a training script is, and where the time of an iteration goes.

Sets up a training by the script's own functions, as its `main` does, and takes the time of each. What it
measures alone, environments and network, bounds what could be won by doing both at once. Flags that are not
the benchmark's go to the script. against_cleanrl.py measures whole runs.

    python benchmark/throughput.py ppo_procgen --games bigfish starpilot --num-steps 64 --num-minibatches 2
"""

import importlib
import os
import re
import resource
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import torch
import tyro
from helpers import Count, check_ranges, clear_errors, fail
from procgen.env import ENV_NAMES

SCRIPTS = ["ppo_procgen", "spo_procgen", "mdpo_procgen", "mdspo_procgen"]
PARTS = ["environments", "inference", "copies", "GAE", "update"]


@dataclass
class Args:
    script: Annotated[str, tyro.conf.Positional] = "ppo_procgen"  # name of the training script
    games: tuple[str, ...] = ("bigfish",)  # of Procgen, a table each
    iterations: Count = 5  # measured
    warmup: Count = 2  # iterations before that: compilation, page faults
    limits: bool = True  # measure environments and network alone, too
    test: bool = True  # measure a test on the full distribution, too

    def __post_init__(self):
        check_ranges(self)
        if self.script not in SCRIPTS:
            raise ValueError(
                f"SCRIPT, the first word, must be one of {', '.join(SCRIPTS)}, not {self.script}"
            )
        if not self.games or not set(self.games) <= set(ENV_NAMES):
            given = " ".join(self.games) or "nothing"
            raise ValueError(f"--games must be some of {', '.join(ENV_NAMES)}, not {given}")


class Clock:
    """Seconds by the name of a part. A GPU is waited for before and after each part."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.seconds = defaultdict(float)

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, part: str, function, *inputs):
        start = self.now()
        result = function(*inputs)
        self.seconds[part] += self.now() - start
        return result


class TimedEnvs:
    """Environments with a clock around their calls."""

    def __init__(self, envs, clock: Clock):
        self.envs = envs
        self.clock = clock

    def act(self, actions):
        self.clock.measure("environments", self.envs.act, actions)

    def observe(self):
        return self.clock.measure("environments", self.envs.observe)


class TimedPolicy:
    """A policy with a clock around it."""

    def __init__(self, policy, clock: Clock):
        self.policy = policy
        self.clock = clock

    def __call__(self, obs):
        return self.clock.measure("inference", self.policy, obs)


class NoProgress:
    """In place of the bar of a training."""

    share_of_step = 0.0
    share_of_minibatch = 0.0

    def advance(self, share: float):
        pass


class Training:
    """A training of a script, one iteration after the other."""

    def __init__(self, script: ModuleType, args, run_dir: Path):
        self.script = script
        self.args = args
        self.device = script.find_device(args.device)
        script.prepare_torch(args, self.device)
        self.agents, self.optimizer, self.runners = script.set_up(args, run_dir, self.device)
        fast = script.speed_up(args, self.agents, self.optimizer, self.runners, self.device, run_dir)
        self.players, self.policies, self.gradient_step = fast

    def iterate(self):
        """As in the script's main."""
        script = self.script
        script.rollout(self.policies, self.runners, NoProgress())
        for runner in self.runners:
            runner.finish_rollout()
        script.update(self.gradient_step, self.args, self.device, NoProgress())
        script.copy_weights(self.agents, self.players)

    def time_iteration(self) -> float:
        """Seconds of an iteration as it is."""
        clock = Clock(self.device)
        clock.measure("iteration", self.iterate)
        return clock.seconds["iteration"]

    def time_parts(self) -> dict[str, float]:
        """Seconds by the name of a part, of an iteration in which nothing overlaps on a GPU."""
        script = self.script
        clock = Clock(self.device)
        groups = [runner.groups for runner in self.runners]
        for runner in self.runners:
            runner.groups = [group._replace(envs=TimedEnvs(group.envs, clock)) for group in runner.groups]
        policies = [TimedPolicy(policy, clock) for policy in self.policies]
        clock.measure("rollout", script.rollout, policies, self.runners, NoProgress())
        for runner, own in zip(self.runners, groups):
            runner.groups = own
            clock.measure("GAE", runner.finish_rollout)
        clock.measure("update", script.update, self.gradient_step, self.args, self.device, NoProgress())
        clock.measure("update", script.copy_weights, self.agents, self.players)
        seconds = clock.seconds
        seconds["copies"] = seconds.pop("rollout") - seconds["environments"] - seconds["inference"]
        return {part: seconds[part] for part in PARTS}

    def time_limits(self) -> dict[str, float]:
        """Seconds that the environments and the network of an iteration take when nothing else is done."""
        clock = Clock(self.device)
        clock.measure("environments alone", self.step_environments)
        clock.measure("network alone", self.run_network)
        return clock.seconds

    def step_environments(self):
        for _ in range(self.args.num_steps):
            for runner in self.runners:
                for group in runner.groups:
                    group.envs.observe()
                    group.envs.act(np.random.randint(15, size=group.envs.num, dtype=np.int32))

    def run_network(self):
        for step in range(self.args.num_steps):
            for policy, runner in zip(self.policies, self.runners):
                for group in runner.groups:
                    policy(group.data.obs[step])
        self.script.update(self.gradient_step, self.args, self.device, NoProgress())

    def time_test(self) -> float:
        """Seconds of the first agent's test of one episode in each test environment."""
        script = self.script
        policy = self.policies[0]
        envs = self.runners[0].test_envs
        obs = torch.from_numpy(envs.observe()[1]["rgb"]).to(self.device)
        policy(obs)  # to be warm
        clock = Clock(self.device)
        with script.make_bar(desc="test", total=envs.num, leave=False, disable=None) as bar:
            clock.measure("test", script.evaluate, policy, envs, 1, self.device, script.Stop(), bar)
        return clock.seconds["test"]

    def close(self):
        for runner in self.runners:
            runner.close()


def measure(args: Args, script: ModuleType, script_args):
    """Prints the numbers of one game."""
    torch._dynamo.reset()  # else the games after the fourth run into its limit of recompilations
    with tempfile.TemporaryDirectory() as folder:
        training = Training(script, script_args, Path(folder))
        for _ in range(args.warmup):
            training.iterate()
        iterations = []
        parts = []
        for _ in range(args.iterations):
            iterations.append(training.time_iteration())
            parts.append(training.time_parts())
        limits = training.time_limits() if args.limits else {}
        test_seconds = training.time_test() if args.test else None
        training.close()

    print_parts(parts)
    if test_seconds is not None:
        print(f"a test of an agent in {script_args.num_eval_envs} environments: {test_seconds:.2f} s")
    batch = script_args.batch_size
    seconds = float(np.median(iterations))
    slowest = batch / max(iterations)
    fastest = batch / min(iterations)
    agents = "" if len(training.agents) == 1 else " for each agent"
    print(f"steps a second{agents}: {batch / seconds:,.0f} (from {slowest:,.0f} to {fastest:,.0f})")
    for name, limit in limits.items():
        print(f"{name}: {batch / limit:,.0f}, of which this is {limit / seconds:.0%}")
    print(f"peak host memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if training.device.type == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated")
    sys.stdout.flush()


def print_parts(parts: list[dict[str, float]]):
    """A table of the medians over iterations."""
    seconds = {part: float(np.median([each[part] for each in parts])) for part in PARTS}
    total = sum(seconds.values())
    print("| part | ms an iteration | share |")
    print("| --- | --- | --- |")
    for part, of_part in seconds.items():
        print(f"| {part} | {1e3 * of_part:.1f} | {of_part / total:.1%} |")


def main():
    args, rest = tyro.cli(Args, prog="throughput.py", description=__doc__, return_unknown_args=True)
    with clear_errors():
        measure_games(args, rest)


def measure_games(args: Args, rest: list[str]):
    """With the flags of the script in `rest`."""
    script = importlib.import_module(args.script)
    flags = " ".join(rest) or "no flags"
    all_settings = []
    for game in args.games:
        words = ["--env-id", game, *rest]
        all_settings.append(tyro.cli(script.Args, prog=f"{args.script}.py", description="", args=words))
        if all_settings[-1].resume or all_settings[-1].pretrained_encoder:
            fail("--resume and --pretrained-encoder are not for a measurement, which needs no run")
    device = script.find_device(all_settings[0].device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{os.cpu_count()} cores, {gpu}, torch {torch.__version__}", flush=True)
    for settings in all_settings:
        batch = f"{settings.num_envs} x {settings.num_steps} steps"
        print(f"\n{args.script}, {settings.env_id}, {batch}, {flags}", flush=True)
        try:
            measure(args, script, settings)
        except script.Failure as failure:
            fail(re.sub(r"--resume \S+ ", "", str(failure)))  # the run is none
        except (RuntimeError, MemoryError) as error:
            if not script.is_out_of_memory(error):
                raise
            fail("out of memory: smaller --num-envs, --num-steps, --num-eval-envs or --channels would do")


if __name__ == "__main__":
    main()
