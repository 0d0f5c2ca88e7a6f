"""How fast the training scripts are, and how much faster than a plain loop.

Runs a script's own `main` for a few iterations, with clocks around its functions, and prints steps per second
and where the time of an iteration goes. Flags that are not the benchmark's go to the script.

    python benchmark/throughput.py ppo_procgen --games bigfish starpilot --reference
"""

import contextlib
import importlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import tyro
from command_line import parse_args
from gym.wrappers.normalize import RunningMeanStd
from procgen import ProcgenEnv
from torch.distributions import Categorical, kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SCRIPTS = ("ppo_procgen", "spo_procgen", "mdpo_procgen", "mdspo_procgen")
PARTS = ("environments", "inference", "copies", "GAE", "update", "everything else")


@dataclass
class Args:
    script: Annotated[str, tyro.conf.Positional] = "ppo_procgen"  # name of the training script
    games: tuple[str, ...] = ("bigfish",)  # of Procgen, one table row each
    iterations: int = 5  # measured
    warmup: int = 2  # iterations before that: compilation, page faults
    reference: bool = False  # alternate with a plain loop in the way of CleanRL
    limits: bool = True  # measure environments and network alone, too
    test: bool = True  # measure a test on the full distribution, too

    def __post_init__(self):
        if self.script not in SCRIPTS:
            raise ValueError(f"SCRIPT, the first word, must be one of {', '.join(SCRIPTS)}")
        if not self.games:
            raise ValueError("--games needs one or more games")
        if self.iterations < 1 or self.warmup < 1:
            raise ValueError("--iterations and --warmup must be at least 1")


class PlainLoop:
    """PPO, or two distilling agents, as CleanRL writes it: float32, eager, environments that step while all
    else waits, one agent after the other, four environment threads, metrics read in each minibatch, no
    cudnn.benchmark. The networks are the script's."""

    def __init__(self, script, args, device, num_agents: int):
        self.args, self.device = args, device
        self.agents = [script.Agent(channels=args.channels).to(device) for _ in range(num_agents)]
        parameters = [weight for agent in self.agents for weight in agent.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)
        levels = {"num_levels": args.num_levels, "start_level": args.start_level}
        levels["distribution_mode"] = args.distribution_mode
        self.envs = [ProcgenEnv(args.num_envs, args.env_id, **levels) for _ in self.agents]
        self.next_obs = [envs.reset()["rgb"] for envs in self.envs]
        self.next_done = [np.zeros(args.num_envs) for _ in self.agents]
        self.statistics = [RunningMeanStd(shape=()) for _ in self.agents]
        self.discounted = [np.zeros(args.num_envs) for _ in self.agents]

    def rollout(self, i: int) -> tuple[torch.Tensor, ...]:
        args, agent = self.args, self.agents[i]
        shape = (args.num_steps, args.num_envs)
        zeros = lambda *more: torch.zeros(shape + more, device=self.device)  # noqa: E731
        obs, actions, logprobs = zeros(64, 64, 3), zeros(), zeros()
        rewards, dones, values = zeros(), zeros(), zeros()
        for step in range(args.num_steps):
            next_obs = torch.tensor(self.next_obs[i], dtype=torch.float32).to(self.device)
            obs[step] = next_obs
            dones[step] = torch.tensor(self.next_done[i], dtype=torch.float32).to(self.device)
            with torch.no_grad():
                logits, value = agent(next_obs)
                policy = Categorical(logits=logits)
                action = policy.sample()
            actions[step], logprobs[step], values[step] = action, policy.log_prob(action), value
            observed, reward, done, _ = self.envs[i].step(action.cpu().numpy())
            self.next_obs[i], self.next_done[i] = observed["rgb"], done
            self.discounted[i] = self.discounted[i] * args.gamma + reward
            self.statistics[i].update(self.discounted[i])
            self.discounted[i][done] = 0
            reward = np.clip(reward / np.sqrt(self.statistics[i].var + 1e-8), -10, 10)
            rewards[step] = torch.tensor(reward, dtype=torch.float32).to(self.device)
        with torch.no_grad():
            _, next_value = agent(torch.tensor(self.next_obs[i], dtype=torch.float32).to(self.device))
        next_done = torch.tensor(self.next_done[i], dtype=torch.float32).to(self.device)
        advantages, advantage = torch.zeros_like(rewards), 0
        for step in reversed(range(args.num_steps)):
            delta = rewards[step] + args.gamma * next_value * (1 - next_done) - values[step]
            advantage = delta + args.gamma * args.gae_lambda * (1 - next_done) * advantage
            advantages[step], next_value, next_done = advantage, values[step], dones[step]
        columns = (obs, actions, logprobs, values, advantages, advantages + values)
        return tuple(column.flatten(0, 1) for column in columns)

    def iteration(self):
        args = self.args
        batches = [self.rollout(i) for i in range(len(self.agents))]
        b_inds = np.arange(args.batch_size)
        for _ in range(args.update_epochs):
            np.random.shuffle(b_inds)
            for start in range(0, args.batch_size, args.minibatch_size):
                mb_inds = b_inds[start : start + args.minibatch_size]
                loss = 0
                for i, batch in enumerate(batches):
                    obs, actions, logprobs, values, advantages, returns = (x[mb_inds] for x in batch)
                    logits, new_values = self.agents[i](obs)
                    policy = Categorical(logits=logits)
                    log_ratio = policy.log_prob(actions) - logprobs
                    ratio, entropy = log_ratio.exp(), policy.entropy().mean()
                    with torch.no_grad():
                        self.clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean().item()
                        self.approx_kl = (ratio - 1 - log_ratio).mean().item()
                    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    pg_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
                    clipped = values + (new_values - values).clamp(-args.clip_coef, args.clip_coef)
                    v_loss = 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2).mean()
                    loss = loss + pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
                    for peer in self.agents[:i] + self.agents[i + 1 :]:
                        peer_policy = Categorical(logits=peer(obs)[0])
                        loss = loss + args.distill_coef * kl_divergence(peer_policy, policy).mean()
                self.optimizer.zero_grad()
                (loss / len(batches)).backward()
                for agent in self.agents:
                    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                self.optimizer.step()
        self.losses = [loss.item(), pg_loss.item(), v_loss.item(), entropy.item()]


def serve_plain_loop(connection, name: str, args, device: str):
    """In a process of its own, since the scripts change how this one allocates memory: an iteration for
    every message, answered by its seconds."""
    script = importlib.import_module(name)
    loop = PlainLoop(script, args, torch.device(device), 2 if hasattr(script, "mutual_kl") else 1)
    while connection.recv():
        start = time.perf_counter()
        loop.iteration()
        if device != "cpu":
            torch.cuda.synchronize(device)
        connection.send(time.perf_counter() - start)


class Timed:
    """Environments or a policy with a clock around their calls."""

    def __init__(self, subject, measure, part):
        self.subject, self.measure, self.part = subject, measure, part

    def __call__(self, *inputs):
        return self.measure(self.part, self.subject, *inputs)

    def act(self, actions):
        self.measure(self.part, self.subject.act, actions)

    def observe(self):
        return self.measure(self.part, self.subject.observe)


class Measurement:
    """Runs a script's main with its functions replaced by timed ones."""

    def __init__(self, args: Args, script, script_args, flags: str):
        self.args, self.script, self.script_args, self.flags = args, script, script_args, flags
        device = script_args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        self.cuda = script_args.device != "cpu" and torch.cuda.is_available()
        self.phases = ["overall", "parts"] if self.cuda else ["parts"]  # synchronising spoils the overlap
        self.iteration, self.phase, self.start = 0, "warm-up", None
        self.times, self.parts = defaultdict(list), defaultdict(list)
        self.plain_times, self.limits, self.current = [], {}, defaultdict(float)
        self.originals = {name: getattr(script, name) for name in ("rollout", "update")}
        self.finish = script.Runner.finish_rollout

    def run(self):
        total = self.args.warmup + self.args.iterations * len(self.phases)
        self.script_args.total_timesteps = (total + 1) * self.script_args.batch_size
        self.script_args.num_iterations = total + 1
        self.script.rollout, self.script.update, self.last = self.rollout, self.update, total
        self.script.Runner.finish_rollout = lambda runner: self.measure("GAE", self.finish, runner)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        here, keep_output = Path.cwd(), contextlib.redirect_stdout(sys.stderr)
        try:
            with tempfile.TemporaryDirectory() as folder, keep_output:
                os.chdir(folder)
                self.script.main(self.script_args)
        finally:
            os.chdir(here)
            self.script.Runner.finish_rollout = self.finish
            for name, function in self.originals.items():
                setattr(self.script, name, function)

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, part, function, *inputs):
        if self.phase == "overall":
            return function(*inputs)
        self.synchronize()
        start = time.perf_counter()
        result = function(*inputs)
        self.synchronize()
        self.current[part] += time.perf_counter() - start
        return result

    def rollout(self, groups):
        """The start of an iteration: the one before ends here."""
        self.synchronize()
        now = time.perf_counter()
        if self.phase != "warm-up":
            self.times[self.phase].append(now - self.start)
            if self.phase == "parts":
                self.current["everything else"] = now - self.start - sum(self.current.values())
                for part in PARTS:
                    self.parts[part].append(self.current[part])
        if self.iteration == self.last:
            if self.args.reference:
                self.plain_loop.send("")
            self.finish_measuring(groups)
        elif self.args.reference:
            self.play_plain_loop()
        done = max(0, self.iteration - self.args.warmup)
        if self.iteration >= self.args.warmup and self.iteration < self.last:
            self.phase = self.phases[done // self.args.iterations]
        self.current, self.iteration = defaultdict(float), self.iteration + 1
        self.start = start = time.perf_counter()
        timed = [
            group._replace(
                policy=Timed(group.policy, self.measure, "inference"),
                envs=Timed(group.envs, self.measure, "environments"),
            )
            for group in groups
        ]
        self.originals["rollout"](timed if self.phase != "overall" else groups)
        if self.phase == "parts":
            self.synchronize()
            known = self.current["environments"] + self.current["inference"]
            self.current["copies"] = time.perf_counter() - start - known

    def update(self, step, args, device):
        self.step = step
        return self.measure("update", self.originals["update"], step, args, device)

    def play_plain_loop(self):
        if self.iteration == 0:
            context = multiprocessing.get_context("spawn")
            self.plain_loop, end = context.Pipe()
            inputs = (end, self.args.script, self.script_args, str(self.device))
            context.Process(target=serve_plain_loop, args=inputs, daemon=True).start()
        self.plain_loop.send("go")
        seconds = self.plain_loop.recv()
        if self.iteration:  # the first warms up
            self.plain_times.append(seconds)

    def finish_measuring(self, groups):
        """With all warm and the data in place: environments alone, network alone, a test."""
        args, self.phase = self.script_args, "limits"
        if self.args.limits:
            start = time.perf_counter()
            for _ in range(args.num_steps):
                for group in groups:
                    group.envs.observe()
                    group.envs.act(np.random.randint(15, size=group.envs.num, dtype=np.int32))
            self.limits["environments alone"] = time.perf_counter() - start
            self.synchronize()
            start = time.perf_counter()
            for step in range(args.num_steps):
                for group in groups:
                    group.policy(group.data.obs[step])
            self.originals["update"](self.step, args, self.device)
            self.limits["network alone"] = time.perf_counter() - start
        if self.args.test:
            test_envs = self.script.make_envs(args, args.num_eval_envs, 0, 0, args.seed)
            groups[0].policy(torch.from_numpy(test_envs.observe()[1]["rgb"]).to(self.device))  # to be warm
            start = time.perf_counter()
            self.script.evaluate(groups[0].policy, test_envs, 1, self.device)
            self.test_time = time.perf_counter() - start
            test_envs.close()

    def report(self):
        args, batch = self.script_args, self.script_args.batch_size
        seconds = float(np.median(self.times[self.phases[0]]))
        print(f"\n{self.args.script}, {args.env_id}, {args.num_envs} x {args.num_steps} steps, {self.flags}")
        print("| part | ms an iteration | share |\n| --- | --- | --- |")
        total = float(np.median(self.times["parts"]))
        for part in PARTS:
            each = float(np.median(self.parts[part]))
            print(f"| {part} | {1e3 * each:.1f} | {each / total:.1%} |")
        if self.args.test:
            print(f"| test of {args.num_eval_envs} episodes, every 50 | {20 * self.test_time:.1f} | |")
        agents = " for each agent" if hasattr(self.script, "mutual_kl") else ""
        spread = [batch / each for each in sorted(self.times[self.phases[0]], reverse=True)]
        print(f"steps a second{agents}: {batch / seconds:,.0f} (from {spread[0]:,.0f} to {spread[-1]:,.0f})")
        for name, limit in self.limits.items():
            print(f"{name}: {batch / limit:,.0f}, of which this is {limit / seconds:.0%}")
        if self.plain_times:
            plain = float(np.median(self.plain_times))
            print(f"plain loop: {batch / plain:,.0f} steps a second; ratio {plain / seconds:.2f}")
        print(f"peak host memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        if self.cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
            print(f"peak GPU memory: {peak / 2**30:.2f} GiB allocated")
        sys.stdout.flush()


def main():
    args, rest = parse_args(Args, __doc__, return_unknown_args=True)
    script = importlib.import_module(args.script)
    measurements = []
    for game in args.games:
        sys.argv = [f"{args.script}.py", "--env-id", game, "--eval-interval", "0", *rest]
        measurements.append(Measurement(args, script, script.parse_args(), " ".join(rest) or "no flags"))
    gpu = measurements[0].cuda and torch.cuda.get_device_name(measurements[0].device)
    print(f"{os.cpu_count()} cores, {gpu or 'no GPU'}, torch {torch.__version__}", flush=True)
    while measurements:
        measurement = measurements.pop(0)
        measurement.run()
        measurement.report()


if __name__ == "__main__":
    main()
