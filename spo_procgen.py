# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "gym==0.23.1", "gym-notices==0.0.8", "numpy==1.26.4", "setuptools==84.2.1", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
#   "procgen==0.10.7; python_version < '3.11'", "procgen-mirror==0.10.7; python_version >= '3.11'",
# ]
# ///
"""SPO (Xie et al. 2024) on Procgen: one agent, trained on 500 levels, tested on the full distribution.

The second baseline of "Representation Convergence: Mutual Distillation is Secretly a Form of Regularization"
(appendix E.2). With r = pi(a|o) / pi_old(a|o) and the advantage A, it maximises

    mean( r A - |A| (r - 1)^2 / (2 eps) )

ppo_procgen.py differs only in policy_loss, mdspo_procgen.py in mutual distillation. `--help` lists the flags.
"""

import argparse
import ctypes
import fcntl
import glob
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # else two trainings on one CPU wait for each other

import numpy as np
import torch
import torch.nn as nn
import tyro
from gym.wrappers.normalize import RunningMeanStd
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
# The games of each distribution mode: any other pair aborts inside Procgen.
MODES = {
    "easy": ENV_NAMES,
    "hard": ENV_NAMES,
    "extreme": ["chaser", "dodgeball", "leaper", "starpilot"],
    "memory": ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"],
}

RETURNS = ["charts/episodic_return", "charts/test_episodic_return"]  # one chart in TensorBoard
# The least and the most that a number on the command line may be.
Count = Annotated[int, (1, 2**31 - 1)]
CountOrZero = Annotated[int, (0, 2**31 - 1)]
Share = Annotated[float, (0, 1)]
Positive = Annotated[float, (1e-9, 1e9)]
Weight = Annotated[float, (0, 1e9)]


@dataclass
class Args:
    env_id: Literal[tuple(ENV_NAMES)] = "bigfish"  # game
    exp_name: str = SCRIPT  # part of the run folder's name
    seed: CountOrZero = 1  # of networks, actions, minibatches and environments
    total_timesteps: Count = 50_000_000  # environment steps, in whole iterations
    learning_rate: Positive = 5e-4  # of Adam
    num_envs: Count = 64  # parallel environments
    num_steps: Count = 256  # steps in each environment between two updates
    num_minibatches: Count = 8  # minibatches in an epoch
    update_epochs: Count = 3  # passes over the data of an iteration
    gamma: Share = 0.999  # discount factor
    gae_lambda: Share = 0.95  # lambda of generalized advantage estimation
    clip_coef: Positive = 0.2  # epsilon of the policy loss and of the value clipping
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    vf_coef: Weight = 0.5  # weight of the value loss
    max_grad_norm: Positive = 0.5  # longer gradients are scaled down to this norm
    channels: Annotated[tyro.conf.DisallowNone[tuple[int, int, int] | None], (1, 4096)] = None
    """width of the encoder's three stages; 16 32 32, or those of --pretrained-encoder"""
    pretrained_encoder: str = ""  # agent.pt whose encoder to begin with
    freeze_encoder: bool = False  # train actor and critic alone
    num_levels: CountOrZero = 500  # training levels, 0 for all there are
    start_level: CountOrZero = 0  # first training level
    distribution_mode: Literal[tuple(MODES)] = "hard"  # extreme and memory are for some games
    num_eval_envs: Count = 64  # test environments; a test on the way is one episode in each
    eval_interval: CountOrZero = 50  # iterations between tests on the full distribution, 0 for no tests
    final_eval_episodes: Annotated[int, (2, 2**16)] = 512  # of the last test, on each kind of levels
    checkpoint_interval: Count = 50  # iterations between checkpoints; every 5 minutes there is one anyway
    resume: str = ""  # run folder or checkpoint to go on from, or auto: the newest of its game, name, seed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    bf16: tyro.conf.DisallowNone[bool | None] = None  # encoder in bfloat16; by default where that is faster
    compile: bool = True  # torch.compile loss and acting, on CUDA
    torch_deterministic: bool = False  # only deterministic cuDNN algorithms
    track: bool = False  # log to Weights & Biases too

    def __post_init__(self):
        self.encoder = {}  # weights to begin with, by name
        if self.pretrained_encoder and self.resume in ("", "auto"):
            pretrained = read_torch(self.pretrained_encoder, "--pretrained-encoder", "agent")
            for name, weight in pretrained["agent"].items():
                if name.startswith("encoder."):
                    self.encoder[name.removeprefix("encoder.")] = weight
            channels = pretrained["args"]["channels"]
            if self.channels not in (None, channels):
                raise ValueError(f"--channels must be {channels}, as in {self.pretrained_encoder}")
            self.channels = channels
        self.channels = tuple(self.channels or (16, 32, 32))
        for name, hint in get_type_hints(Args, include_extras=True).items():
            value = getattr(self, name)
            limits = getattr(hint, "__metadata__", [None])[-1]
            for number in value if isinstance(value, tuple) else [value]:
                if isinstance(limits, tuple) and not limits[0] <= number <= limits[1]:
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} must be from {limits[0]} to {limits[1]}, not {value}")
        modes = [mode for mode, games in MODES.items() if self.env_id in games]
        if self.distribution_mode not in modes:
            raise ValueError(f"--distribution-mode must be one of {modes} for --env-id {self.env_id}")
        if not re.fullmatch(r"[A-Za-z0-9_.+=-]{1,99}", self.exp_name):
            raise ValueError(f"--exp-name must be 1 to 99 letters, digits or _.+=-, not {self.exp_name}")
        if self.start_level + (self.num_levels or 2**31 - 1) >= 2**31:
            raise ValueError("--start-level must be 0 with --num-levels 0, and their sum below 2147483648")
        if self.freeze_encoder and not self.pretrained_encoder:
            raise ValueError("--freeze-encoder needs --pretrained-encoder")
        if self.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:
            raise ValueError("--track needs wandb: `pip install wandb`")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.device_count() else "cpu"
        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // self.num_minibatches
        batch = f"the batch, --num-envs x --num-steps = {self.batch_size}"
        if self.batch_size % self.num_minibatches or self.minibatch_size < 2:
            raise ValueError(f"--num-minibatches must divide {batch}, into 2 rows or more")
        if self.total_timesteps < self.batch_size:
            raise ValueError(f"--total-timesteps must be at least {batch}")


class ResidualBlock(nn.Sequential):
    def __init__(self, channels):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, x):
        return x + super().forward(x)


class Agent(nn.Module):
    """The IMPALA-CNN (Espeholt et al. 2018) with a policy and a value head. obs: uint8 (B, *obs_shape), or
    float in [0, 255]; obs_shape is height, width, colors. Gives logits (B, num_actions) and value (B,), both
    float32, the value in units of the normalised reward."""

    def __init__(self, num_actions=15, channels=(16, 32, 32), obs_shape=(64, 64, 3)):
        super().__init__()
        height, width, in_channels = obs_shape
        layers = []
        for out_channels in channels:
            layers += [
                nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(out_channels),
                ResidualBlock(out_channels),
            ]
            in_channels = out_channels
            height = math.ceil(height / 2)
            width = math.ceil(width / 2)
        layers += [nn.Flatten(), nn.ReLU()]
        layers += [nn.Linear(in_channels * height * width, 256), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        for head, gain in [(self.actor, 0.01), (self.critic, 1.0)]:
            nn.init.orthogonal_(head.weight, gain)
            nn.init.zeros_(head.bias)
        self.bf16 = False  # whether the encoder computes in bfloat16

    def forward(self, obs):
        images = obs.permute(0, 3, 1, 2) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.encoder(images)
        hidden = hidden.float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def make_envs(args, num, num_levels, start_level, rand_seed):
    """Procgen behind its gym3 interface: `act` starts a step in Procgen's threads, `observe` waits for it.
    For other environments return an object with `num`, `act(int32 (num,))` and `observe()`, which gives
    (reward float32 (num,), {"rgb": uint8 (num, height, width, colors)}, first bool (num,)); `first` says that
    the observation begins an episode. Checkpoints need `get_state()`, a list of bytes, and `set_state`."""
    return ProcgenGym3Env(
        num,
        args.env_id,
        num_levels=num_levels,
        start_level=start_level,
        distribution_mode=args.distribution_mode,
        rand_seed=rand_seed,
        num_threads=len(os.sched_getaffinity(0)),
    )


class Batch(NamedTuple):
    """Columns of one shape: (num_steps + 1, num_envs) of a rollout, whose last row bootstraps, or (B,)."""

    obs: torch.Tensor  # uint8 (..., *obs_shape)
    actions: torch.Tensor  # int64
    logprobs: torch.Tensor
    values: torch.Tensor  # in units of the normalised reward, as the next two
    advantages: torch.Tensor
    returns: torch.Tensor

    def rows(self, index):
        return Batch(*(column[index] for column in self))


def compute_gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016). All (num_steps, num_envs), next_* (num_envs,).
    rewards[t] is for the action at obs[t], normalised; dones[t] says that obs[t] begins an episode. Returns
    advantages and returns, of the shape of values."""
    next_values = torch.cat([values[1:], next_value[None]])
    next_nonterminal = 1.0 - torch.cat([dones[1:], next_done[None]]).float()
    deltas = rewards + gamma * next_values * next_nonterminal - values
    decays = gamma * gae_lambda * next_nonterminal
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(next_value)
    for step in reversed(range(len(values))):
        advantage = deltas[step] + decays[step] * advantage
        advantages[step] = advantage
    return advantages, advantages + values


def policy_loss(ratio, advantages, clip_coef):
    """SPO's objective, negated: a scalar to be minimised. Its optimum is at 1 + sign(A) eps. Both (B,)."""
    penalty = advantages.abs() * (ratio - 1) ** 2 / (2 * clip_coef)
    return -(ratio * advantages - penalty).mean()


def value_loss(new_values, old_values, returns, clip_coef):
    """Half the squared error of the value or of the clipped value, the larger of the two. All (B,)."""
    clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
    error = (new_values - returns) ** 2
    clipped_error = (clipped_values - returns) ** 2
    return 0.5 * torch.max(error, clipped_error).mean()


def rl_loss(logits, new_values, mb, args):
    """policy_loss + vf_coef value_loss - ent_coef entropy, of the network's logits (B, num_actions) and
    new_values (B,). The minibatch's advantages must already be normalised. Returns the loss and a dict of
    metrics, all scalars: each is a curve losses/NAME."""
    logprobs = logits.log_softmax(-1)
    new_logprobs = logprobs.gather(-1, mb.actions[:, None]).squeeze(-1)
    log_ratio = new_logprobs - mb.logprobs
    ratio = log_ratio.exp()
    pg_loss = policy_loss(ratio, mb.advantages, args.clip_coef)
    v_loss = value_loss(new_values, mb.values, mb.returns, args.clip_coef)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    deviation = (ratio - 1).abs()
    metrics = {
        "policy_loss": pg_loss,
        "value_loss": v_loss,
        "entropy": entropy,
        "old_approx_kl": -log_ratio.mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": (deviation > args.clip_coef).float().mean(),
        "ratio_deviation": deviation.mean(),
    }
    return pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy, metrics


def compute_loss(agents, mbs, args):
    """The loss of the one agent on its minibatch, a scalar, and for each agent a dict of metrics, scalars."""
    logits, new_values = agents[0](mbs[0].obs)
    loss, metrics = rl_loss(logits, new_values, mbs[0], args)
    return loss, [metrics]


@torch.no_grad()
def act(agent, obs):
    """Samples the policy at obs, uint8 (B, *obs_shape). Returns actions, logprobs and values, all (B,)."""
    logits, values = agent(obs)
    logprobs = logits.log_softmax(-1)
    gumbel_noise = -torch.empty_like(logprobs).exponential_().log()
    actions = (logprobs + gumbel_noise).argmax(-1)
    logprobs = logprobs.gather(-1, actions[:, None]).squeeze(-1)
    return actions, logprobs, values


def rollout(policies, runners, args):
    """Plays num_steps steps, policies[i] in the environments of runners[i], and fills their data, but for
    advantages and returns. policies[i](obs) is as `act`. While a group steps the network acts for another."""
    for step in range(args.num_steps + 1):  # the last row only gives the values to bootstrap from
        for policy, runner in zip(policies, runners):
            for envs, columns in runner.groups:
                data = runner.data
                reward, obs, first = envs.observe()
                runner.rewards[step, columns] = reward
                runner.dones[step, columns] = first
                data.obs[step, columns] = torch.from_numpy(obs["rgb"])
                actions, logprobs, values = policy(data.obs[step, columns])
                data.actions[step, columns] = actions
                data.logprobs[step, columns] = logprobs
                data.values[step, columns] = values
                if step < args.num_steps:
                    envs.act(actions.cpu().numpy().astype(np.int32))  # waits for the device


def update(loss_function, agents, optimizer, batches, args):
    """Passes over the batches in shuffled minibatches, with a gradient step on each. loss_function is
    compute_loss. Returns for each agent a dict of metrics, scalars, means over all steps."""
    device = batches[0].obs.device
    part_size = 256 if device.type == "cpu" else args.minibatch_size  # bounds the memory: gradients add up
    num_updates = args.update_epochs * args.num_minibatches
    means = [defaultdict(float) for _ in agents]
    for _ in range(args.update_epochs):
        for mb_inds in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
            mbs = []
            for batch in batches:
                mb = batch.rows(mb_inds)
                centered = mb.advantages - mb.advantages.mean()
                advantages = centered / (mb.advantages.std() + 1e-8)
                mbs.append(mb._replace(advantages=advantages))
            optimizer.zero_grad()
            for start in range(0, args.minibatch_size, part_size):
                parts = [mb.rows(slice(start, start + part_size)) for mb in mbs]
                share = len(parts[0].obs) / args.minibatch_size
                loss, metrics = loss_function(agents, parts, args)
                (loss * share).backward()
                for mean, values in zip(means, metrics):
                    for name, value in values.items():
                        mean[name] += value.detach() * share / num_updates
            for mean, agent in zip(means, agents):
                norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                mean["grad_norm"] += norm / num_updates
            optimizer.step()
    return means


def evaluate(policies, args, num, levels, seed, device, stop):
    """Raw returns of each agent in one whole episode in each of num new environments, (num_agents, num): so
    short episodes do not count more. `levels`: number, 0 for all, and first. Exits at a signal in `stop`."""
    returns = np.zeros((len(policies), num))
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda_devices):
        for i, policy in enumerate(policies):
            envs = make_envs(args, num, *levels, (args.seed + seed) % 2**31)
            playing = np.ones(num, bool)
            _, obs, _ = envs.observe()
            while playing.any():
                if stop:
                    sys.exit(128 + stop[0])
                actions, _, _ = policy(torch.from_numpy(obs["rgb"]).to(device))
                envs.act(actions.cpu().numpy().astype(np.int32))
                reward, obs, first = envs.observe()
                returns[i] += reward * playing
                playing &= ~first
    return returns


class Runner:
    """One agent's side of a run: its environments, its data and its curves."""

    def __init__(self, args, index, num_agents, device):
        self.args = args
        num_groups = 2 if num_agents == 1 else 1  # while one steps, a single agent acts for the other
        generator = np.random.default_rng([args.seed, index])
        seeds = generator.integers(2**31, size=2 + num_groups)  # two are unused: runs stay as they were
        self.groups = []  # environments that step together, and their columns of the data
        env_groups = torch.arange(args.num_envs).chunk(num_groups)
        for seed, env_inds in zip(seeds[2:].tolist(), env_groups):
            envs = make_envs(args, len(env_inds), args.num_levels, args.start_level, seed)
            columns = slice(env_inds[0], env_inds[-1] + 1)
            self.groups.append((envs, columns))
        self.obs_shape = envs.observe()[1]["rgb"].shape[1:]
        shape = (args.num_steps + 1, args.num_envs)
        obs = torch.zeros(*shape, *self.obs_shape, dtype=torch.uint8, device=device)
        actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.data = Batch(obs, actions, *torch.zeros(4, *shape, device=device))  # logprobs to returns
        self.batch = Batch(*(column.flatten(0, 1) for column in self.data))  # the same memory
        self.rewards = np.zeros(shape)  # raw; row t came with obs[t]
        self.dones = np.zeros(shape, bool)  # obs[t] begins an episode
        self.episodes = np.zeros((3, args.num_envs))  # under way: raw return, length and discounted return
        self.statistics = RunningMeanStd(shape=())  # of the discounted return
        self.train_return = math.nan  # mean raw return of the last training episodes
        self.scalars = {}  # points of the curves, of the last iteration

    def finish_rollout(self):
        """Normalises the rewards as gym's NormalizeReward does, and estimates advantages and returns."""
        args = self.args
        rewards = []
        ended = []
        for reward, done in zip(self.rewards[1:], self.dones[1:]):
            self.episodes[2] *= args.gamma
            self.episodes += [reward, np.ones_like(reward), reward]
            self.statistics.update(self.episodes[2])
            scaled_reward = reward / np.sqrt(self.statistics.var + 1e-8)
            rewards.append(scaled_reward.clip(-10, 10))
            ended.extend(self.episodes[:2, done].T)
            self.episodes[:, done] = 0
        rewards = torch.tensor(np.array(rewards)).float()
        values = self.data.values.cpu()
        dones = torch.from_numpy(self.dones)
        advantages, returns = compute_gae(
            rewards, values[:-1], dones[:-1], values[-1], dones[-1], args.gamma, args.gae_lambda
        )
        self.data.advantages[:-1] = advantages
        self.data.returns[:-1] = returns
        errors = returns - values[:-1]
        explained_variance = 1 - errors.var() / returns.var()
        self.scalars = {"losses/explained_variance": explained_variance.item()}
        if ended:
            self.train_return, length = np.mean(ended, axis=0).tolist()
            self.scalars["charts/episodic_return"] = self.train_return
            self.scalars["charts/episodic_length"] = length

    def state_dict(self):
        """What this side of a run goes on from, in types that weights_only loads."""
        return {
            "envs": [envs.get_state() for envs, _ in self.groups],
            "statistics": {name: float(value) for name, value in vars(self.statistics).items()},
            "episodes": self.episodes.tolist(),
            "train_return": self.train_return,
            "scalars": self.scalars,
        }

    def load_state_dict(self, state):
        for (envs, _), env_states in zip(self.groups, state["envs"]):
            envs.set_state(env_states)
        vars(self.statistics).update(state["statistics"])
        self.episodes = np.array(state["episodes"])
        self.train_return = state["train_return"]
        self.scalars = state["scalars"]


def bf16_is_faster(agent, obs):
    """On a CPU measured, not asked: of two that have bfloat16 one may be slower with it."""
    if obs.is_cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {False: [], True: []}
    for bf16 in [False, True] * 4:  # in turn, since the machine may do other work
        agent.bf16 = bf16
        start = time.perf_counter()
        agent(obs)[0].sum().backward()
        seconds[bf16].append(time.perf_counter() - start)
    agent.zero_grad()
    return min(seconds[True]) < min(seconds[False])


def set_up(args, device):
    """The agents of a run, their one optimizer, and the Runner of each. Chooses --bf16 if it is not given."""
    num_agents = 1
    runners = [Runner(args, i, num_agents, device) for i in range(num_agents)]
    agents = [Agent(15, args.channels, runner.obs_shape).to(device) for runner in runners]
    if args.bf16 is None:
        args.bf16 = bf16_is_faster(agents[0], runners[0].batch.obs[:32])
    print(f"{device.type}, the encoder in {'bfloat16' if args.bf16 else 'float32'}")
    torch.backends.cudnn.allow_tf32 = args.bf16  # off, float32 is float32
    weights = []
    for agent in agents:
        try:
            if args.pretrained_encoder and not args.resume:
                agent.encoder.load_state_dict(args.encoder)
        except RuntimeError as error:
            fail(f"--pretrained-encoder: {args.pretrained_encoder} does not fit: {error!r:.300}")
        agent.bf16 = args.bf16
        agent.encoder.requires_grad_(not args.freeze_encoder)
        weights += agent.parameters()
    lr = torch.tensor(args.learning_rate).item()  # in float32: runs stay what they were, to the bit
    return agents, torch.optim.Adam(weights, lr=lr, eps=1e-5, fused=True), runners


def speed_up(args, agents, runners, device):
    """For each agent a policy, which returns what `act` returns at obs, and the loss function: compiled, if
    that works. Both run once for each shape, so that what fails fails in the first minute."""
    policies = [partial(act, agent) for agent in agents]
    if device.type == "cpu" or not args.compile:
        return policies, compute_loss
    fast_loss = torch.compile(compute_loss, dynamic=False)
    fast_act = torch.compile(act, mode="reduce-overhead", dynamic=False)  # replays a CUDA graph
    try:
        mbs = [runner.batch.rows(slice(args.minibatch_size)) for runner in runners]
        loss, _ = fast_loss(agents, mbs, args)
        loss.backward()
        sizes = {envs.num for envs, _ in runners[0].groups}
        for size in sizes | {args.num_eval_envs, args.final_eval_episodes}:
            obs = runners[0].data.obs.new_zeros(size, *runners[0].obs_shape)
            for agent in agents * 3:  # compiles, records, replays
                fast_act(agent, obs)
    except Exception as error:  # no C compiler, a driver that does not fit, a bug of the compiler
        print(f"torch.compile is off: {error.__context__ or error!r:.300}", flush=True)
        return policies, compute_loss
    return [partial(fast_act, agent) for agent in agents], fast_loss


def final_test(policies, args, device, stop, global_step, run_dir):
    """Tests all agents on both kinds of levels, prints the means and writes final_test.json."""
    results = [{} for _ in policies]
    kinds = {"training_levels": (args.num_levels, args.start_level), "full_distribution": (0, 0)}
    for kind, levels in kinds.items():
        print(f"final test on {kind}, {args.final_eval_episodes} episodes")
        tests = evaluate(policies, args, args.final_eval_episodes, levels, global_step, device, stop)
        for i, returns in enumerate(tests):
            error = returns.std(ddof=1) / len(returns) ** 0.5
            results[i][kind] = {
                "mean": returns.mean(),
                "standard_error": error,
                "episodes": len(returns),
                "returns": returns.tolist(),
            }
            print(f"agent {i + 1}: {returns.mean():.2f} +- {1.96 * error:.2f}")
    write_file(run_dir / "final_test.json", {"global_step": global_step, "agents": results})


def fail(message):
    """Ends the process over a file or a GPU that a flag names and that cannot be used."""
    print(f"{SCRIPT}.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def make_run_dir(args):
    os.makedirs("runs", exist_ok=True)
    unix_time = int(time.time())
    while True:  # of runs that start in the same second each gets a folder of its own
        run_dir = Path("runs", f"{args.env_id}__{args.exp_name}__{args.seed}__{unix_time}")
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            unix_time += 1


def write_file(path: Path, content: dict):
    """Writes the whole file, or what was there before stays."""
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as file:
        if path.suffix == ".json":
            file.write(json.dumps(content, indent=2).encode())
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_torch(path, flag, key):
    """What a training script wrote, a dict with the keys args and `key`, on the CPU."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content | {name: content[name] for name in ("args", key)}
    except Exception as error:  # torch has many names for a file that is cut short, or not ours, or code
        fail(f"{flag} cannot use {path}: {error!r:.300}")


def save_checkpoint(run_dir, args, agents, optimizer, runners, global_step):
    """checkpoint.pt has all that a run needs to go on, agent.pt an agent, for whoever wants to look at it."""
    header = {"script": SCRIPT, "args": asdict(args), "global_step": global_step}
    for runner, agent in zip(runners, agents):
        write_file(runner.folder / "agent.pt", header | {"agent": agent.state_dict()})
    state = {
        "agents": [agent.state_dict() for agent in agents],
        "optimizer": optimizer.state_dict()["state"],
        "runners": [runner.state_dict() for runner in runners],
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }
    write_file(run_dir / "checkpoint.pt", header | state)
    write_file(run_dir / "args.json", asdict(args))


def load_checkpoint(checkpoint, agents, optimizer, runners):
    for i, agent in enumerate(agents):
        agent.load_state_dict(checkpoint["agents"][i])
        runners[i].load_state_dict(checkpoint["runners"][i])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]})
    torch.set_rng_state(checkpoint["torch_rng"])
    if checkpoint["cuda_rng"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])


def parse_args() -> Args:
    """Reads the command line. With --resume the settings of that run are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("resume", "env_id", "exp_name", "seed"):
        flag = name.replace("_", "-")
        parser.add_argument(f"--{flag}", f"--{name}", nargs="?", default=getattr(Args, name))
    given, _ = parser.parse_known_args()
    path = given.resume or ""
    options = {"description": __doc__}
    if path == "auto":
        name = glob.escape(f"{given.env_id}__{given.exp_name}__{given.seed}__") + "[0-9]" * 10
        path = max(glob.glob(f"runs/{name}/checkpoint.pt"), default="")
    elif os.path.isdir(path):
        path = os.path.join(path, "checkpoint.pt")
    if path:
        checkpoint = read_torch(path, "--resume", "torch_rng")
        if checkpoint["script"] != SCRIPT:
            fail(f"--resume: {path} is of {checkpoint['script']}.py; this is {SCRIPT}.py")
        options["default"] = Args(**checkpoint["args"] | {"resume": path})
    args = tyro.cli(Args, **options)
    args.resume = path
    if path:
        fixed = "env_id exp_name seed num_agents num_envs num_steps num_levels start_level distribution_mode"
        for name in f"{fixed} channels pretrained_encoder freeze_encoder".split():
            before = checkpoint["args"].get(name)
            if getattr(args, name, None) != before:
                fail(f"--{name.replace('_', '-')} must stay {before!r}, as in {path}: leave it out")
        if args.total_timesteps < checkpoint["global_step"]:
            fail(f"--total-timesteps must be at least {checkpoint['global_step']}, the steps of {path}")
    return args


def handle_signal(stop, signal_number, frame):
    stop.append(signal_number)
    signal.signal(signal_number, signal.SIG_DFL)  # a second one kills the process
    os.write(2, b"\nstopping after this iteration or in this test; once more kills\n")


def main(args: Args, stop=()):
    """Trains, tests and saves. args.resume is the checkpoint to go on from, if there is one. Exits early once
    there is a signal in `stop`: after the iteration under way, in a test at once."""
    device = torch.device(args.device)
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # no GPU, an old one, an old driver
        remedy = "`uv pip install --torch-backend=auto torch` or --device cpu may do"
        fail(f"--device: this PyTorch cannot use a GPU here ({error!r:.300}); {remedy}")
    if device.type == "cpu":
        libc = ctypes.CDLL(None)  # keeps big buffers: to give them back takes longer than to fill them
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(threshold, 2**30)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    agents, optimizer, runners = set_up(args, device)
    batches = [runner.batch for runner in runners]
    policies, loss_function = speed_up(args, agents, runners, device)
    run_dir = Path(args.resume).parent if args.resume else make_run_dir(args)
    first_step = 0
    if args.resume:
        checkpoint = read_torch(args.resume, "--resume", "torch_rng")
        load_checkpoint(checkpoint, agents, optimizer, runners)
        first_step = checkpoint["global_step"]
    args.resume = ""
    print(f"run folder: {run_dir}; Ctrl-C stops after an iteration, --resume {run_dir} goes on", flush=True)
    with open(run_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--resume: another process is at work in {run_dir}")
        except OSError:
            pass  # a file system without locks
        if args.track:
            wandb = importlib.import_module("wandb")  # WANDB_PROJECT and WANDB_ENTITY say where to
            wandb.init(id=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
        for number, runner in enumerate(runners, 1):
            runner.folder = run_dir
            if len(runners) > 1:
                runner.folder = run_dir / f"agent_{number}"
            runner.writer = SummaryWriter(runner.folder, purge_step=first_step)  # hides what a kill left over
            runner.writer.add_custom_scalars_multilinechart(RETURNS, "returns", "training and test")
        first_iteration = first_step // args.batch_size
        last_iteration = args.total_timesteps // args.batch_size
        bar = tqdm(initial=first_iteration, total=last_iteration, unit="step", unit_scale=args.batch_size)
        start_time = time.time()
        save_time = start_time
        for iteration in range(first_iteration, last_iteration + 1):
            global_step = iteration * args.batch_size
            if global_step > first_step:  # else there is a checkpoint to make, or a test and curves
                rollout(policies, runners, args)
                for runner in runners:
                    runner.finish_rollout()
                metrics = update(loss_function, agents, optimizer, batches, args)
                speed = (global_step - first_step) / (time.time() - start_time)
                for runner, means in zip(runners, metrics):
                    runner.scalars |= {"charts/learning_rate": args.learning_rate, "charts/SPS": speed}
                    for name, mean in means.items():
                        runner.scalars[f"losses/{name}"] = mean.item()  # waits for the device
                        if not mean.isfinite():  # the last checkpoint is still good
                            raise FloatingPointError(f"losses/{name} is {mean} in iteration {iteration}")
                bar.set_postfix(returns=[round(each.train_return, 2) for each in runners])
                bar.update()
            # A checkpoint is older than the test and curves of its iteration: a resumed run makes them anew.
            stopping = bool(stop)
            test_due = iteration and args.eval_interval and iteration % args.eval_interval == 0
            save_due = iteration % args.checkpoint_interval == 0 or time.time() > save_time + 300
            save_due |= test_due or stopping or iteration == last_iteration
            if save_due and (global_step > first_step or not iteration):
                save_checkpoint(run_dir, args, agents, optimizer, runners, global_step)
                save_time = time.time()
            if stopping:
                sys.exit(128 + stop[0])
            if test_due:
                tests = evaluate(policies, args, args.num_eval_envs, (0, 0), global_step, device, stop)
                for runner, returns in zip(runners, tests):
                    gap = runner.train_return - returns.mean()
                    runner.scalars["charts/test_episodic_return"] = returns.mean()
                    runner.scalars["charts/generalization_gap"] = gap
            for runner in runners:
                for tag, value in runner.scalars.items():
                    if not math.isnan(value):  # as of a return before any episode has ended
                        runner.writer.add_scalar(tag, value, global_step)
                runner.writer.flush()
        bar.close()
        if args.eval_interval:
            final_test(policies, args, device, stop, global_step, run_dir)
    print(f"finished after {global_step:,} steps: {run_dir}")


if __name__ == "__main__":
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(handle_signal, signals))
    main(parse_args(), signals)
