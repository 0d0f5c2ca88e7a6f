# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "gym==0.23.1", "gym-notices==0.0.8", "numpy==1.26.4", "setuptools==84.2.1", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
#   "procgen==0.10.7; python_version < '3.11'", "procgen-mirror==0.10.7; python_version >= '3.11'",
# ]
# ///
"""PPO (Schulman et al. 2017) on Procgen: one agent, trained on 500 levels, tested on the full distribution.

The baseline of "Representation Convergence: Mutual Distillation is Secretly a Form of Regularization". With
r = pi(a|o) / pi_old(a|o) and the advantage A, it maximises (equation 17 there)

    mean( min( r A, clip(r, 1 - eps, 1 + eps) A ) )

spo_procgen.py differs from this file only in policy_loss, mdpo_procgen.py only in mutual distillation.

    python ppo_procgen.py --env-id bigfish
"""

import argparse
import contextlib
import ctypes
import fcntl
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np
import torch
import torch.nn as nn
import tyro
from gym.wrappers.normalize import RunningMeanStd
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# The games of each distribution mode: any other pair aborts inside Procgen.
MODES = {
    "easy": ENV_NAMES,
    "hard": ENV_NAMES,
    "extreme": ["chaser", "dodgeball", "leaper", "starpilot"],
    "memory": ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"],
}


class Range(NamedTuple):
    """Limits of a number on the command line, both included."""

    low: float
    high: float


Count = Annotated[int, Range(1, 2**31 - 1)]
CountOrZero = Annotated[int, Range(0, 2**31 - 1)]
Environments = Annotated[int, Range(1, 2**16)]
Episodes = Annotated[int, Range(2, 2**31 - 1)]  # one has no standard error
Threads = Annotated[int, Range(0, 2**10)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(1e-9, 1e9)]
Weight = Annotated[float, Range(0, 1e9)]


@dataclass
class Args:
    env_id: str = "bigfish"  # one of the 16 games of Procgen
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: CountOrZero = 1  # of networks, actions, minibatches and environments
    total_timesteps: int = 50_000_000  # environment steps, in whole iterations
    learning_rate: Positive = 5e-4  # of Adam
    num_envs: Environments = 64  # parallel environments
    num_steps: Count = 256  # steps in each environment between two updates
    num_minibatches: Count = 8  # minibatches in an epoch
    update_epochs: Count = 3  # passes over the data of an iteration
    gamma: Share = 0.999  # discount factor
    gae_lambda: Share = 0.95  # lambda of generalized advantage estimation
    clip_coef: Positive = 0.2  # epsilon of the policy loss and of the value clipping
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    vf_coef: Weight = 0.5  # weight of the value loss
    max_grad_norm: Positive = 0.5  # longer gradients are scaled down to this norm
    channels: tuple[int, int, int] = (16, 32, 32)  # width of the encoder's three stages
    pretrained_encoder: str = ""  # agent.pt whose encoder, and its channels, to begin with
    freeze_encoder: bool = False  # train actor and critic alone
    num_levels: CountOrZero = 500  # training levels, 0 for all there are
    start_level: CountOrZero = 0  # first training level
    distribution_mode: str = "hard"  # easy or hard, for some games also extreme or memory
    num_eval_envs: Environments = 64  # test environments; a test on the way is one episode in each
    eval_interval: CountOrZero = 50  # iterations between tests on the full distribution, 0 for no tests
    final_eval_episodes: Episodes = 512  # of the last test, on each kind of levels, or a few more
    checkpoint_interval: Count = 50  # iterations between checkpoints; every 5 minutes there is one anyway
    resume: str = ""  # run folder or checkpoint to go on from, or auto: the newest of its game, name, seed
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: CUDA where there is one
    num_env_threads: Threads = 0  # Procgen's threads for a group of environments, 0 for one a core
    bf16: bool = True  # encoder in bfloat16, on GPUs and processors that have it
    compile: bool = True  # torch.compile loss and acting, on CUDA
    cudagraphs: bool = True  # replay acting and minibatch steps as graphs, on CUDA
    torch_deterministic: bool = False  # only deterministic cuDNN algorithms
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "mdpo"  # project of --track
    wandb_entity: str | None = None  # team of --track

    def __post_init__(self):
        check_ranges(self)
        if self.env_id not in ENV_NAMES:
            raise ValueError(f"--env-id must be one of {', '.join(ENV_NAMES)}, not {self.env_id}")
        modes = [mode for mode, games in MODES.items() if self.env_id in games]
        if self.distribution_mode not in modes:
            mode = self.distribution_mode
            raise ValueError(
                f"--distribution-mode must be {' or '.join(modes)} for {self.env_id}, not {mode}"
            )
        if not re.fullmatch(r"[\w.+=-]{1,99}", self.exp_name):
            raise ValueError(f"--exp-name must be 1 to 99 letters, digits or _.+=-, not {self.exp_name}")
        if self.num_levels == 0 and self.start_level > 0:
            raise ValueError(f"--start-level must be 0 with --num-levels 0, not {self.start_level}")
        if self.start_level + self.num_levels >= 2**31:
            raise ValueError("--start-level and --num-levels must have a sum below 2147483648")
        check_channels(self.channels)
        if self.freeze_encoder and not self.pretrained_encoder:
            raise ValueError("--freeze-encoder needs --pretrained-encoder")
        find_device(self.device)
        if self.track and not can_import("wandb"):
            raise ValueError("--track needs wandb: `pip install wandb`")

        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // self.num_minibatches
        batch = f"the batch, --num-envs x --num-steps = {self.batch_size}"
        if self.batch_size % self.num_minibatches > 0 or self.minibatch_size < 2:
            number = self.num_minibatches
            raise ValueError(
                f"--num-minibatches must divide {batch}, and be at most half of it, not {number}"
            )
        if self.total_timesteps < self.batch_size:
            raise ValueError(f"--total-timesteps must be at least {batch}, not {self.total_timesteps}")


def check_ranges(args):
    """Raises ValueError for the first field of a dataclass that lies outside the Range in its annotation."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for limits in getattr(hint, "__metadata__", ()):
            if isinstance(limits, Range) and not limits.low <= value <= limits.high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be from {limits.low} to {limits.high}, not {value}")


def check_channels(channels: tuple[int, ...]):
    if len(channels) != 3 or min(channels) < 1 or max(channels) > 4096:
        raise ValueError(f"--channels must be three numbers from 1 to 4096, not {channels}")


def find_device(name: str) -> torch.device:
    """The device that --device names. ValueError if there is none."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    if name == "cpu":
        return torch.device("cpu")
    number = torch.cuda.device_count()
    if number > 0 and not torch.cuda.is_available():
        reason = f"PyTorch finds {number} GPUs and cannot use them, so the driver may be too old for it"
        raise ValueError(f"--device {name}: {reason}; cpu would do")
    if name == "auto" and number == 0:
        return torch.device("cpu")
    index = int(match[1] or 0)
    if index >= number:
        found = f"needs GPU {index}, and PyTorch finds {number}"
        raise ValueError(f"--device {name} {found}: auto or cpu would do")
    return torch.device("cuda", index)


def can_import(package: str) -> bool:
    """Whether a package is installed; a mere folder of that name, as wandb/ with its runs, has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(self, x):
        return x + super().forward(x)


class Agent(nn.Module):
    """The IMPALA-CNN (Espeholt et al. 2018) with a policy and a value head.

    obs: uint8 (B, *obs_shape), or float in [0, 255]; obs_shape is height, width, colors. Gives logits
    (B, num_actions) and value (B,), both float32, the value in units of the normalised reward.
    """

    def __init__(
        self,
        num_actions: int = 15,
        channels: tuple[int, int, int] = (16, 32, 32),
        obs_shape: tuple[int, int, int] = (64, 64, 3),
    ):
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
        nn.init.orthogonal_(self.actor.weight, 0.01)
        nn.init.orthogonal_(self.critic.weight, 1.0)
        nn.init.zeros_(self.actor.bias)
        nn.init.zeros_(self.critic.bias)
        self.bf16 = False  # whether the encoder computes in bfloat16

    def forward(self, obs):
        images = obs.permute(0, 3, 1, 2) / 255
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.encoder(images)
        hidden = hidden.float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class PinnedProcgen(ProcgenGym3Env):
    """Observes into one page-locked buffer, from which a GPU copies by itself; `act` overwrites it."""

    def _numpy_aligned(self, shape, dtype, align=64):
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        memory = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        return memory.numpy().view(dtype).reshape(shape)


def make_envs(args: Args, num: int, num_levels: int, start_level: int, rand_seed: int):
    """Procgen behind its gym3 interface: `act` starts a step in Procgen's threads, `observe` waits for it.

    For other environments return an object with `num`, `act(int32 (num,))`, `close()` and `observe()`, which
    gives (reward float32 (num,), {"rgb": uint8 (num, height, width, colors)}, first bool (num,)). `first`
    says that the observation begins an episode; the action -1 ends the episode under way. Checkpoints need
    `get_state()`, which gives a list of bytes, none of them empty, and `set_state` of such a list.
    """
    envs = PinnedProcgen(
        num,
        args.env_id,
        num_levels=num_levels,
        start_level=start_level,
        distribution_mode=args.distribution_mode,
        rand_seed=rand_seed,
        num_threads=args.num_env_threads or available_cores(),
    )
    envs._reuse_arrays = True
    return envs


def available_cores() -> int:
    """Cores that this process may use: of its affinity, or fewer by the quota of a container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no such file, or the quota is "max"
        return cores


class RewardNormalizer:
    """gym's NormalizeReward: divides by the running standard deviation of the discounted return."""

    def __init__(self, num_envs: int, gamma: float):
        self.gamma = gamma
        self.discounted = np.zeros(num_envs)  # return of the episodes under way
        self.statistics = RunningMeanStd(shape=())

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """Raw rewards and whether they ended an episode, (num_steps, num_envs), to float32 in [-10, 10]."""
        discounted = np.empty(rewards.shape)
        for step, reward in enumerate(rewards):
            discounted[step] = self.discounted * self.gamma + reward
            self.discounted = np.where(dones[step], 0, discounted[step])
        means = discounted.mean(axis=1).tolist()
        variances = discounted.var(axis=1).tolist()
        scales = np.empty((len(rewards), 1))
        for step, (mean, variance) in enumerate(zip(means, variances)):
            self.statistics.update_from_moments(mean, variance, rewards.shape[1])
            scales[step] = np.sqrt(self.statistics.var + 1e-8)
        return (rewards / scales).clip(-10, 10).astype(np.float32)


class Batch(NamedTuple):
    """What an agent has seen, as columns of one shape: (num_steps + 1, num_envs) of a rollout, whose last row
    only bootstraps; (batch_size,) of an iteration; (B,) of a minibatch."""

    obs: torch.Tensor  # uint8 (..., *obs_shape)
    actions: torch.Tensor  # int64
    logprobs: torch.Tensor
    values: torch.Tensor  # in units of the normalised reward, as the next two
    advantages: torch.Tensor
    returns: torch.Tensor


def compute_gae(rewards, values, dones, next_value, next_done, gamma: float, gae_lambda: float):
    """Generalized advantage estimation (Schulman et al. 2016). All (num_steps, num_envs), next_* (num_envs,).
    rewards[t] is for the action at obs[t], normalised; dones[t] says that obs[t] begins an episode. Returns
    advantages and returns, of the shape of values."""
    next_values = torch.cat([values[1:], next_value[None]])
    next_nonterminal = 1.0 - torch.cat([dones[1:], next_done[None]]).to(values.dtype)
    deltas = rewards + gamma * next_values * next_nonterminal - values
    decays = gamma * gae_lambda * next_nonterminal
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(next_value)
    for step in reversed(range(len(values))):
        advantage = deltas[step] + decays[step] * advantage
        advantages[step] = advantage
    return advantages, advantages + values


def policy_loss(ratio, advantages, clip_coef: float):
    """PPO's clipped objective (equation 17), negated: a scalar to be minimised. Both (B,)."""
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def value_loss(new_values, old_values, returns, clip_coef: float):
    """Half the squared error of the value or of the clipped value, the larger of the two. All (B,)."""
    clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped_values - returns) ** 2).mean()


def rl_loss(logits, new_values, mb: Batch, args: Args):
    """policy_loss + vf_coef value_loss - ent_coef entropy, from what the network now says of the minibatch:
    logits (B, num_actions) and new_values (B,). The minibatch's advantages must already be normalised.
    Returns the loss and a dict of metrics, all scalars."""
    logprobs = logits.log_softmax(-1)
    log_ratio = logprobs.gather(-1, mb.actions[:, None]).squeeze(-1) - mb.logprobs
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


def compute_loss(agents: list[Agent], mbs: list[Batch], args: Args):
    """The loss of the one agent on its minibatch, a scalar, and for each agent a dict of metrics, scalars."""
    logits, new_values = agents[0](mbs[0].obs)
    loss, metrics = rl_loss(logits, new_values, mbs[0], args)
    return loss, [metrics]


@torch.no_grad()
def act(agent: Agent, obs):
    """Samples the policy at obs, uint8 (B, *obs_shape). Returns actions, logprobs and values, all (B,)."""
    logits, values = agent(obs)
    logprobs = logits.log_softmax(-1)
    gumbel_noise = -torch.empty_like(logprobs).exponential_().log()
    actions = (logprobs + gumbel_noise).argmax(-1)
    return actions, logprobs.gather(-1, actions[:, None]).squeeze(-1), values


class EnvGroup(NamedTuple):
    """Environments that step together, and their columns of the rollout."""

    envs: object
    data: Batch  # (num_steps + 1, envs.num)
    rewards: np.ndarray  # float32 (num_steps + 1, envs.num), raw; row t came with obs[t]
    dones: np.ndarray  # bool, of the same shape: obs[t] begins an episode


def rollout(policies: list, runners: list, progress):
    """Plays num_steps steps, policies[i] in the environments of runners[i], and fills all their columns but
    advantages and returns. policies[i](obs) returns what `act` returns. One group of environments steps in
    the background while the network acts for the next."""
    turns = [(policy, group) for policy, runner in zip(policies, runners) for group in runner.groups]
    num_steps = len(runners[0].rewards) - 1
    for step in range(num_steps + 1):
        for policy, group in turns:
            group.rewards[step], obs, group.dones[step] = group.envs.observe()
            group.data.obs[step].copy_(torch.from_numpy(obs["rgb"]), non_blocking=True)
            actions, logprobs, values = policy(group.data.obs[step])
            group.data.actions[step] = actions
            group.data.logprobs[step] = logprobs
            group.data.values[step] = values
            if step < num_steps:
                group.envs.act(actions.cpu().numpy().astype(np.int32))  # waits for the device
        progress.advance(progress.share_of_step)


def backward_in_parts(loss_function, part_size: int, agents: list[Agent], mbs: list[Batch], args: Args):
    """The backward pass of loss_function, which is compute_loss, on part_size rows of the minibatches at a
    time: that bounds the memory, and the gradients add up. Returns metrics by name, each (num_agents,)."""
    size = len(mbs[0].obs)
    totals = {}
    for start in range(0, size, part_size):
        parts = [Batch(*(column[start : start + part_size] for column in mb)) for mb in mbs]
        loss, metrics = loss_function(agents, parts, args)
        share = len(parts[0].obs) / size
        (loss * share).backward()
        for name in metrics[0]:
            values = torch.stack([of_agent[name] for of_agent in metrics]).detach()
            totals[name] = totals.get(name, 0.0) + values * share
    return totals


def minibatch_step(backward, agents: list[Agent], optimizer, batches: list[Batch], args: Args, mb_inds):
    """One gradient step on the rows mb_inds of each agent's batch. backward(agents, mbs, args) adds the
    gradients and returns metrics. Returns metrics by name, each (num_agents,)."""
    mbs = []
    for batch in batches:
        mb = Batch(*(column[mb_inds] for column in batch))
        centered = mb.advantages - mb.advantages.mean()
        advantages = centered / (mb.advantages.std() + 1e-8)
        mbs.append(mb._replace(advantages=advantages))
    optimizer.zero_grad()
    metrics = backward(agents, mbs, args)
    norms = [nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm) for agent in agents]
    optimizer.step()
    return metrics | {"grad_norm": torch.stack(norms)}


def update(gradient_step, args: Args, device, progress) -> dict[str, np.ndarray]:
    """Passes over the batch in shuffled minibatches; gradient_step(mb_inds) is one minibatch_step. Returns
    metrics by name, each float32 (number of steps, num_agents)."""
    steps = []
    for _ in range(args.update_epochs):
        for mb_inds in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
            steps.append(gradient_step(mb_inds))
            progress.advance(progress.share_of_minibatch)
    stacked = {name: torch.stack([metrics[name] for metrics in steps]) for name in steps[0]}
    return {name: values.cpu().numpy() for name, values in stacked.items()}  # waits for the device


def evaluate(policy, envs, episodes_per_env: int, device, stop, bar) -> np.ndarray:
    """Raw returns of each environment's first whole episodes, so that short ones do not win, of shape
    (envs.num * episodes_per_env,). The levels go on where the last test left them. `bar` counts episodes.
    Raises Stopped once `stop` is requested."""
    episodes = [[] for _ in range(envs.num)]
    under_way = np.zeros(envs.num)
    envs.act(np.full(envs.num, -1, np.int32))  # ends what the last test left unfinished
    _, obs, _ = envs.observe()
    while min(len(of_env) for of_env in episodes) < episodes_per_env:
        if stop.requested:
            raise Stopped
        actions, _, _ = policy(torch.from_numpy(obs["rgb"]).to(device))
        envs.act(actions.cpu().numpy().astype(np.int32))
        reward, obs, ended = envs.observe()
        under_way += reward
        for i in np.flatnonzero(ended):
            if len(episodes[i]) < episodes_per_env:
                episodes[i].append(under_way[i])
                bar.update()
            under_way[i] = 0
    return np.concatenate(episodes)


# What each curve is and what it should look like: TensorBoard's tab Scalars shows it at the curve's (i).
DESCRIPTIONS = {
    "charts/episodic_return": "Mean raw return of the training episodes that ended. Rises.",
    "charts/episodic_length": "Mean length of the training episodes that ended, in steps.",
    "charts/test_episodic_return": "Mean raw return of a test on the full distribution. Rises, more slowly.",
    "charts/generalization_gap": "Return in training minus return in the test. The smaller the better.",
    "charts/learning_rate": "Of Adam. Constant.",
    "charts/SPS": "Environment steps a second, of each agent, tests included. Flat.",
    "losses/policy_loss": "Minus the objective of the policy. Stays near 0.",
    "losses/value_loss": "Half the squared error of the value, in units of the normalised reward.",
    "losses/entropy": "Of the policy, in nats. Falls slowly from 2.7, that of 15 equal actions.",
    "losses/old_approx_kl": "Mean of -log(ratio), a noisy estimate of the KL of an update. Stays near 0.",
    "losses/approx_kl": "KL of an update, estimated. Small and steady; if it jumps, lower the learning rate.",
    "losses/clipfrac": "Share of ratios further from 1 than clip_coef. Small and steady.",
    "losses/ratio_deviation": "Mean distance of the ratios from 1. Small and steady.",
    "losses/grad_norm": "Length of the gradient of the mean loss, before it is scaled down to max_grad_norm.",
    "losses/explained_variance": "How much of the return the value explains. Rises towards 1.",
}
# The charts of its tab Custom Scalars, each with the curves of all runs that are chosen.
LAYOUT = {
    "returns": {
        "training and test": ["Multiline", ["charts/episodic_return", "charts/test_episodic_return"]],
        "generalization gap": ["Multiline", ["charts/generalization_gap"]],
    },
    "learning": {
        "entropy of the policy": ["Multiline", ["losses/entropy"]],
        "ratios of an update": ["Multiline", ["losses/clipfrac", "losses/ratio_deviation"]],
        "KL of an update": ["Multiline", ["losses/approx_kl"]],
        "explained variance": ["Multiline", ["losses/explained_variance"]],
        "policy loss": ["Multiline", ["losses/policy_loss"]],
        "value loss": ["Multiline", ["losses/value_loss"]],
        "gradient norm": ["Multiline", ["losses/grad_norm"]],
    },
}


class Runner:
    """One agent's side of a run: its environments, its data and its curves."""

    def __init__(self, args: Args, index: int, num_agents: int, run_dir: Path, device, global_step: int):
        self.args = args
        self.folder = run_dir if num_agents == 1 else run_dir / f"agent_{index + 1}"
        num_groups = 2 if num_agents == 1 else 1  # while one steps, a single agent acts for the other
        seed_generator = np.random.default_rng([args.seed, index])
        seeds = seed_generator.integers(2**31, size=2 + num_groups).tolist()
        levels = (args.num_levels, args.start_level)
        self.train_level_test_envs = make_envs(args, args.num_eval_envs, *levels, seeds[0])
        self.test_envs = make_envs(args, args.num_eval_envs, 0, 0, seeds[1])
        self.obs_shape = self.test_envs.observe()[1]["rgb"].shape[1:]

        shape = (args.num_steps + 1, args.num_envs)
        self.data = Batch(
            obs=torch.zeros(*shape, *self.obs_shape, dtype=torch.uint8, device=device),
            actions=torch.zeros(shape, dtype=torch.int64, device=device),
            logprobs=torch.zeros(shape, device=device),
            values=torch.zeros(shape, device=device),
            advantages=torch.zeros(shape, device=device),
            returns=torch.zeros(shape, device=device),
        )
        self.batch = Batch(*(column[:-1].flatten(0, 1) for column in self.data))  # the same memory
        self.rewards = np.zeros(shape, np.float32)
        self.dones = np.zeros(shape, bool)
        self.groups = []
        for seed, env_inds in zip(seeds[2:], torch.arange(args.num_envs).chunk(num_groups)):
            part = slice(int(env_inds[0]), int(env_inds[-1]) + 1)
            envs = make_envs(args, len(env_inds), *levels, seed)
            data = Batch(*(column[:, part] for column in self.data))
            rewards = self.rewards[:, part]
            dones = self.dones[:, part]
            self.groups.append(EnvGroup(envs, data, rewards, dones))

        self.normalizer = RewardNormalizer(args.num_envs, args.gamma)
        self.episodes = np.zeros((2, args.num_envs))  # raw return and length of those under way
        # The mean raw returns that were logged last.
        self.train_return = math.nan
        self.test_return = math.nan
        next_step = global_step + 1
        # purge_step hides what a killed process wrote later
        self.writer = SummaryWriter(self.folder, purge_step=next_step)
        self.writer.add_custom_scalars(LAYOUT)
        self.descriptions = dict(DESCRIPTIONS)  # of the curves that are not yet begun
        rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        self.writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *rows]), next_step)

    def finish_rollout(self) -> np.ndarray:
        """Estimates advantages and returns after a rollout. Gives the raw return and the length of all
        episodes that ended in it, (2, number of episodes)."""
        args = self.args
        rewards = self.normalizer(self.rewards[1:], self.dones[1:])
        rewards = torch.from_numpy(rewards)
        dones = torch.from_numpy(self.dones)
        values = self.data.values.cpu()
        next_value = values[-1]
        next_done = dones[-1]
        advantages, returns = compute_gae(
            rewards, values[:-1], dones[:-1], next_value, next_done, args.gamma, args.gae_lambda
        )
        self.data.advantages[:-1] = advantages
        self.data.returns[:-1] = returns
        ended = []
        for reward, done in zip(self.rewards[1:], self.dones[1:]):
            self.episodes += [reward, np.ones_like(reward)]
            ended.append(self.episodes[:, done])
            self.episodes[:, done] = 0
        return np.concatenate(ended, axis=1)

    def log_iteration(self, losses: dict[str, float], episodes: np.ndarray, sps: float, global_step: int):
        """Writes an iteration's curves; return and length are means over the episodes that ended in it."""
        returns = self.batch.returns
        residual = (returns - self.batch.values).var() / returns.var()
        scalars = {f"losses/{name}": value for name, value in losses.items()}
        scalars["losses/explained_variance"] = 1 - residual.item()
        scalars["charts/learning_rate"] = self.args.learning_rate
        scalars["charts/SPS"] = sps
        if episodes.size > 0:
            self.train_return, length = episodes.mean(axis=1).tolist()
            scalars["charts/episodic_return"] = self.train_return
            scalars["charts/episodic_length"] = length
        self.write_scalars(scalars, global_step)

    def log_test(self, test_return: float, global_step: int):
        """Writes the mean raw return of a test, and how far it is below that of training."""
        self.test_return = test_return
        gap = self.train_return - self.test_return
        scalars = {"charts/test_episodic_return": test_return, "charts/generalization_gap": gap}
        self.write_scalars(scalars, global_step)

    def write_scalars(self, scalars: dict[str, float], global_step: int):
        """Leaves out nan, as of a return before any episode has ended. The first point of a curve brings the
        description, which add_scalar does not take."""
        for tag, value in scalars.items():
            if math.isnan(value):
                continue
            point = Summary.Value(tag=tag, simple_value=value)
            if tag in self.descriptions:
                point.metadata.summary_description = self.descriptions.pop(tag)
                point.metadata.plugin_data.plugin_name = "scalars"
                point.metadata.data_class = DATA_CLASS_SCALAR  # else TensorBoard's fast reader drops it all
            self.writer.file_writer.add_summary(Summary(value=[point]), global_step)

    def checkpointed_envs(self) -> list:
        return [self.test_envs, *(group.envs for group in self.groups)]

    def state_dict(self) -> dict:
        """What this side of a run goes on from, in types that weights_only loads."""
        statistics = vars(self.normalizer.statistics)  # mean, var and count
        return {
            "envs": [envs.get_state() for envs in self.checkpointed_envs()],
            "reward_statistics": {name: float(value) for name, value in statistics.items()},
            "discounted": self.normalizer.discounted.tolist(),
            "episodes": self.episodes.tolist(),
            "train_return": self.train_return,
            "test_return": self.test_return,
        }

    def load_state_dict(self, state: dict):
        for envs, env_states in zip(self.checkpointed_envs(), state["envs"], strict=True):
            envs.set_state(env_states)
        vars(self.normalizer.statistics).update(state["reward_statistics"])
        self.normalizer.discounted = np.array(state["discounted"])
        self.episodes = np.array(state["episodes"])
        self.train_return = state["train_return"]
        self.test_return = state["test_return"]

    def close(self):
        self.writer.close()
        for envs in [self.train_level_test_envs, *self.checkpointed_envs()]:
            envs.close()


# What follows runs the algorithm: signals and progress, the fast path, files, and main.


class Failure(Exception):
    """What the user can mend, a file or a disk: the shell gets it as one line, with exit status 2."""


class Stopped(Exception):
    """A signal has ended a test."""


class Stop:
    """Whether a run is to end early: at the first SIGINT or SIGTERM. A second one kills the process."""

    def __init__(self):
        self.signal_number = 0
        self.progress = None  # of the training, once it has begun

    @property
    def requested(self) -> bool:
        return self.signal_number > 0

    def catch_signals(self):
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, signal_number: int, frame):
        self.signal_number = signal_number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        when = self.progress.time_left() if self.progress else ""
        message = f"\nstopping{when}; once more stops at once\n"
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(sys.stderr.fileno(), message.encode())  # print might be at work in the interrupted line


class Output:
    """Standard output or error. What reads it may end first, as `tee` does at Ctrl-C, or a disk be full: from
    then on nothing is shown, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream or io.StringIO()  # there is none where the shell has closed it

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str):
        with self.silent_after_errors():
            self.stream.write(text)

    def flush(self):
        with self.silent_after_errors():
            self.stream.flush()

    @contextlib.contextmanager
    def silent_after_errors(self):
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # where Python's last flush goes, too
            os.close(nowhere)


def make_bar(**options) -> tqdm:
    """A bar in a terminal; elsewhere a line a minute."""
    if not sys.stderr.isatty():
        options |= {"mininterval": 60, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    return tqdm(**options)


class Progress:
    """The bar of a training, in environment steps, and how much of an iteration is done."""

    def __init__(self, args: Args, num_agents: int, first_step: int, last_step: int):
        self.batch_size = args.batch_size
        # A minibatch goes forward and backward, which costs three times forward, through every agent.
        rollout_share = 1 / (1 + 3 * args.update_epochs * num_agents)
        self.share_of_step = rollout_share / (args.num_steps + 1)
        self.share_of_minibatch = (1 - rollout_share) / (args.update_epochs * args.num_minibatches)
        self.start_time = None  # of the iteration under way, if one is
        self.done = 0.0  # share of it that is done
        self.end_step = first_step  # at its end
        self.bar = make_bar(initial=first_step, total=last_step, unit="step", unit_scale=True)

    def begin_iteration(self):
        self.start_time = time.time()
        self.done = 0.0
        self.end_step += self.batch_size

    def advance(self, share: float):
        self.done += share
        reached = self.end_step - round(self.batch_size * max(0.0, 1 - self.done))
        self.bar.update(reached - self.bar.n)

    def end_iteration(self):
        self.start_time = None
        self.bar.update(self.end_step - self.bar.n)

    def show_returns(self, runners: list[Runner]):
        returns = [f"{each.train_return:.2f} (test {each.test_return:.2f})" for each in runners]
        shown = "/".join(returns).replace("nan", "-")  # before the first episode or test has ended
        self.bar.set_postfix_str(f"return {shown}", refresh=False)

    def time_left(self) -> str:
        """When the iteration under way will end, in words; none if there is none."""
        if self.start_time is None:
            return ""
        if self.done == 0:
            return " after this iteration"
        seconds = (time.time() - self.start_time) * (1 - self.done) / self.done
        if seconds < 90:
            return f" after this iteration, in about {seconds:.0f} seconds"
        return f" after this iteration, in about {seconds / 60:.0f} minutes"

    def close(self):
        self.bar.close()


def prepare_torch(args: Args, device):
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = args.bf16  # off, float32 is float32
    warnings.filterwarnings("ignore", ".*capturable=True")  # that Adam also runs uncaptured
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # that the heads do without
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        print("training on the CPU, which is slow: no CUDA device is used", flush=True)
        keep_freed_memory()


def keep_freed_memory():
    """Tells glibc to keep big buffers for the next use: to give them back takes longer than to fill them."""
    trim_threshold = -1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mmap_threshold = -3
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**30)
    libc.mallopt(mmap_threshold, 2**30)


def has_fast_bf16(device) -> bool:
    """Whether the device computes in bfloat16; one that emulates it crawls. On a CPU oneDNN is asked first,
    then the processor."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()


def can_compile(device) -> bool:
    """Whether torch.compile works here, forward and backward; if not, prints why. It needs a C compiler."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(available_cores()))  # it would start 32
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(torch.sin)(x).sum().backward()
        return True
    except Exception as error:  # of the compiler, of the driver, of the disk for its files
        print(f"torch.compile is off: {first_line(error)}", flush=True)
        return False


def first_line(error: Exception) -> str:
    """Of its message. With the second, if the first ends in a colon."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    number = 2 if lines[0].endswith(":") else 1
    return " ".join(lines[:number])


class CudaGraph:
    """Replays a function of one tensor as a CUDA graph, one for each shape. The first calls for a shape run
    the function itself, on another stream as PyTorch asks for: it compiles, chooses algorithms, allocates."""

    warmup_calls = 3

    def __init__(self, function, run_dir: Path):
        self.function = function
        self.run_dir = run_dir  # to be resumed without what fails
        self.stream = torch.cuda.Stream()
        self.num_calls = Counter()
        self.graphs = {}
        self.off = False

    def __call__(self, x):
        if self.off:
            return self.function(x)
        if x.shape not in self.graphs:
            self.num_calls[x.shape] += 1
            if self.num_calls[x.shape] <= self.warmup_calls:
                return self.warm_up(x)
            self.graphs[x.shape] = self.capture(x.clone())
        graph, static_x, outputs = self.graphs[x.shape]
        static_x.copy_(x)
        graph.replay()
        # The next replay writes to the same place.
        if isinstance(outputs, dict):
            return {name: output.clone() for name, output in outputs.items()}
        return tuple(output.clone() for output in outputs)

    def warm_up(self, x):
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                return self.function(x)
        except torch.OutOfMemoryError:
            raise
        except torch._dynamo.exc.TorchDynamoException:  # of torch.compile
            raise
        except RuntimeError as error:
            print(f"CUDA graphs are off: {first_line(error)}", flush=True)
            self.off = True
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)
        return self.function(x)

    def capture(self, static_x):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = self.function(static_x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # in the middle of a capture, which this process may not get over
            way_out = f"--resume {self.run_dir} --no-cudagraphs would do"
            raise Failure(f"no CUDA graph: {first_line(error)}; {way_out}") from error
        return graph, static_x, outputs


def set_up(args: Args, run_dir: Path, device, global_step: int = 0, encoder: dict | None = None):
    """The agents of a run, their one optimizer, and the Runner of each, whose curves begin after global_step.
    The encoders begin with the weights `encoder`, if there are any."""
    num_agents = 1
    runners = [Runner(args, i, num_agents, run_dir, device, global_step) for i in range(num_agents)]
    agents = []
    weights = []
    for runner in runners:
        agent = Agent(channels=args.channels, obs_shape=runner.obs_shape).to(device)
        if encoder:
            load_encoder(agent, encoder)
        agent.encoder.requires_grad_(not args.freeze_encoder)
        agents.append(agent)
        weights += [weight for weight in agent.parameters() if weight.requires_grad]
    lr = torch.tensor(args.learning_rate, device=device)  # which a CUDA graph can read
    cuda = device.type == "cuda"
    optimizer = torch.optim.Adam(weights, lr=lr, eps=1e-5, fused=True, capturable=cuda)
    return agents, optimizer, runners


def speed_up(args: Args, agents: list[Agent], optimizer, runners, device, run_dir: Path):
    """The fast path, which wraps the functions above: --no-bf16 --no-compile --no-cudagraphs leaves them as
    they are. Returns the agents that play, in bfloat16 copies or the agents themselves; for each of them a
    policy, which returns what `act` returns at obs; and gradient_step(mb_inds), one minibatch_step."""
    cuda = device.type == "cuda"
    bf16 = args.bf16 and has_fast_bf16(device)
    for agent in agents:
        agent.bf16 = bf16
        if bf16 or cuda:
            agent.to(memory_format=torch.channels_last)
    players = agents
    if bf16:
        players = deepcopy(agents)
        for player in players:
            player.encoder.bfloat16()  # once an update, where autocast would round in every step

    loss_function = compute_loss
    policies = [partial(act, player) for player in players]
    if cuda and args.compile and can_compile(device):
        loss_function = torch.compile(compute_loss)
        policies = [partial(act, torch.compile(player, dynamic=False)) for player in players]
    part_size = args.minibatch_size if cuda else 256  # what a CPU's caches like
    backward = partial(backward_in_parts, loss_function, part_size)
    batches = [runner.batch for runner in runners]
    gradient_step = partial(minibatch_step, backward, agents, optimizer, batches, args)
    if cuda and args.cudagraphs:
        gradient_step = CudaGraph(gradient_step, run_dir)
        policies = [CudaGraph(policy, run_dir) for policy in policies]
    return players, policies, gradient_step


def copy_weights(agents: list[Agent], players: list[Agent]):
    """Gives the players the newest weights, in their precision."""
    for agent, player in zip(agents, players):
        if player is not agent:
            player.load_state_dict(agent.state_dict())


def write_file(path: Path, content: bytes):
    """Writes the whole file, or what was there before stays."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        kept = ", which stays as it was" if path.exists() else ""
        raise Failure(f"cannot write {path}{kept}: {error.strerror}") from error


def write_torch(path: Path, content: dict):
    stream = io.BytesIO()
    torch.save(content, stream)
    write_file(path, stream.getvalue())


def write_json(path: Path, content: dict):
    write_file(path, json.dumps(content, indent=2).encode())


def read_torch(path: Path, flag: str, keys: set[str]) -> dict:
    """What a training script wrote, a dict with these keys, on the CPU. Failure if it is anything else."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not keys <= content.keys():
            raise ValueError
        return content
    except Exception as error:  # torch has many names for a file that is cut short, or not ours, or code
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or "it is damaged, or another kind of file"
        raise Failure(f"{flag} cannot read {path}: {reason}") from error


@dataclass
class Position:
    """Where a run is."""

    iteration: int = 0  # the last that is finished
    global_step: int = 0  # environment steps of each agent
    test_due: bool = False  # a test comes before the next iteration


CHECKPOINT_FORMAT = 2

# What a run that goes on cannot change: its name, what its checkpoint holds, and what only a start uses.
FIXED = [
    "env_id",
    "exp_name",
    "seed",
    "num_agents",  # of the mutual scripts
    "num_envs",
    "num_eval_envs",
    "num_levels",
    "start_level",
    "distribution_mode",
    "channels",
    "pretrained_encoder",
    "freeze_encoder",
]


def find_checkpoint(resume: str, env_id: str, exp_name: str, seed) -> Path | None:
    """The file that --resume means, None for a new run."""
    if resume == "":
        return None
    if resume == "auto":
        name = f"{env_id}__{exp_name}__{seed}"
        if not re.fullmatch(r"[\w.+=-]+", name):
            return None  # Args will say which of the three cannot be
        unix_time = "[0-9]" * 10
        runs = Path("runs").glob(f"{name}__{unix_time}/checkpoint.pt")
        return max(runs, key=os.path.getmtime, default=None)
    path = Path(resume)
    return path / "checkpoint.pt" if path.is_dir() else path


def read_checkpoint(path: Path) -> dict:
    checkpoint = read_torch(path, "--resume", {"format", "script", "args"})
    if checkpoint["script"] != Path(__file__).stem:
        raise Failure(f"--resume: {path} is of {checkpoint['script']}.py; this is {Path(__file__).name}")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        formats = f"format {checkpoint['format']}; this script writes and reads format {CHECKPOINT_FORMAT}"
        raise Failure(f"--resume: {path} has {formats}")
    missing = {"position", "agents", "optimizer", "runners", "generators"} - checkpoint.keys()
    if missing:
        raise Failure(f"--resume cannot read {path}: it is damaged, without {' and '.join(sorted(missing))}")
    return checkpoint


def read_position(args: Args, path: Path, checkpoint: dict) -> Position:
    """Where a checkpoint is. Failure if that is beyond --total-timesteps."""
    try:
        position = Position(**checkpoint["position"])
    except TypeError as error:
        raise Failure(f"--resume cannot read {path}: it is damaged: {first_line(error)}") from error
    steps = position.global_step
    if steps > args.total_timesteps:
        raise Failure(
            f"--total-timesteps must be at least {steps}, where {path} is, not {args.total_timesteps}"
        )
    if args.eval_interval == 0:
        position.test_due = False
    return position


class Checkpoints:
    """Writes the checkpoints of a run, each in place of the last, and puts back what one holds."""

    seconds_between = 300  # at most

    def __init__(self, path: Path, args: Args, agents: list[Agent], optimizer, runners: list[Runner]):
        self.path = path
        self.args = args
        self.agents = agents
        self.optimizer = optimizer
        self.runners = runners
        self.time = time.time()  # of the last
        self.last_good = ""  # in words

    def due(self, position: Position) -> bool:
        at_interval = position.iteration % self.args.checkpoint_interval == 0
        return at_interval or time.time() > self.time + self.seconds_between

    def save(self, position: Position):
        """All that a run needs to go on, in types that weights_only loads."""
        for runner in self.runners:
            runner.writer.flush()  # no curve on disk ends before the checkpoint does
        content = {
            "format": CHECKPOINT_FORMAT,
            "script": Path(__file__).stem,
            "args": asdict(self.args),
            "position": asdict(position),
            "agents": [agent.state_dict() for agent in self.agents],
            "optimizer": self.optimizer.state_dict()["state"],
            "runners": [runner.state_dict() for runner in self.runners],
            "generators": get_generators(),
        }
        write_torch(self.path, content)
        self.note(position)

    def load(self, checkpoint: dict):
        """Failure if it does not fit."""
        try:
            for agent, state in zip(self.agents, checkpoint["agents"], strict=True):
                agent.load_state_dict(state)
            for runner, state in zip(self.runners, checkpoint["runners"], strict=True):
                runner.load_state_dict(state)
            load_optimizer(self.optimizer, checkpoint["optimizer"])
            set_generators(checkpoint["generators"])
        except Exception as error:  # a part is missing, or made with other settings than the file says
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            raise Failure(f"--resume: {self.path} does not fit its settings: {reason}") from error
        self.note(Position(**checkpoint["position"]))

    def note(self, position: Position):
        self.time = time.time()
        which = f"the last good checkpoint is of iteration {position.iteration}"
        self.last_good = f"{which}: --resume {self.path.parent}"


def get_generators() -> dict:
    """States of all random generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_generators(states: dict):
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def load_optimizer(optimizer, states: dict):
    """Puts Adam's moments into the memory layout of their weights, which depends on device and precision: on
    the CPU the fused Adam does not look at strides."""
    if not states:
        return  # no step has been taken
    weights = optimizer.param_groups[0]["params"]
    for weight, state in zip(weights, states.values(), strict=True):
        optimizer.state[weight] = {
            "step": state["step"].to(weight.device),
            "exp_avg": torch.empty_like(weight).copy_(state["exp_avg"]),
            "exp_avg_sq": torch.empty_like(weight).copy_(state["exp_avg_sq"]),
        }


def saved_settings(path: Path, checkpoint: dict, device: str | None) -> Args:
    """The settings in a checkpoint, which may come from another machine: on `device`, if one is given, and
    without --track where that cannot be. Failure if this script cannot have them."""
    try:
        settings = dict(checkpoint["args"])
        settings["device"] = device or settings["device"]
        if settings["device"] != "cpu" and torch.cuda.device_count() == 0:
            settings["device"] = "auto"
        settings["track"] = settings["track"] and can_import("wandb")
        return Args(**settings)
    except Exception as error:  # anything can be in there
        raise Failure(f"--resume: {first_line(error)}, with the settings in {path}") from error


def check_changes(args: Args, saved: dict, path: Path):
    """Prints which settings are not those of the checkpoint. Failure if one of them cannot be changed."""
    changes = []
    for name, value in asdict(args).items():
        before = saved.get(name, value)
        if name == "resume" or value == before:
            continue
        flag = "--" + name.replace("_", "-")
        if name in FIXED:
            must_stay = "empty" if before == "" else before
            raise Failure(f"{flag} must stay {must_stay}, as in {path}: leave it out")
        changes.append(f"{flag} {value}, was {before}")
    if changes:
        print(f"changed: {'; '.join(changes)}", flush=True)


def read_encoder(args: Args) -> tuple[tuple[int, int, int], dict]:
    """Channels and weights of the encoder in an agent.pt of any of the scripts. Failure if --channels says
    otherwise."""
    path = args.pretrained_encoder
    if os.path.isdir(path):
        raise Failure(f"--pretrained-encoder: {path} is a folder: an agent.pt in it would do")
    content = read_torch(Path(path), "--pretrained-encoder", {"script", "args", "agent"})
    weights = {}
    try:
        channels = tuple(content["args"]["channels"])
        check_channels(channels)
        for name, weight in content["agent"].items():
            if name.startswith("encoder."):
                weights[name.removeprefix("encoder.")] = weight
        for name, expected in Agent(channels=channels).encoder.state_dict().items():
            is_kernel = expected.dim() == 4  # whose shape does not depend on the size of the pictures
            if is_kernel and weights[name].shape != expected.shape:
                raise ValueError(name)
        finite = all(weight.isfinite().all() for weight in weights.values())
    except Exception as error:  # a part is missing, or its shape is not what the file says
        if is_out_of_memory(error):
            raise
        reason = "it has no encoder of the channels that it names"
        raise Failure(f"--pretrained-encoder cannot use {path}: {reason}") from error
    if not finite:
        raise Failure(f"--pretrained-encoder: the weights in {path} are not all finite")
    if args.channels not in (Args.channels, channels):
        raise Failure(f"--channels must be {channels}, as in {path}: leave it out")
    return channels, weights


def load_encoder(agent: Agent, weights: dict):
    try:
        agent.encoder.load_state_dict(weights)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = "its encoder does not fit, and may be for pictures of another size"
        raise Failure(f"--pretrained-encoder: {reason}: {first_line(error)}") from error


def open_run(args: Args, checkpoint_path: Path | None) -> tuple[Path, object]:
    """Makes the run folder, or finds that of a checkpoint, and locks it. Returns folder and lock."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = checkpoint_path.parent if checkpoint_path else Path("runs", name)
    if checkpoint_path and not checkpoint_path.is_file():
        raise Failure(f"--resume cannot read {checkpoint_path}: there is no such file")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise Failure(f"run folder {run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Failure(f"run folder {run_dir}: another process is at work in it") from error
    except OSError as error:  # some network file systems have no locks
        print(f"run folder {run_dir} is not locked: {error.strerror}", flush=True)
    return run_dir, lock


def track(args: Args, run_dir: Path):
    """Copies the curves to Weights & Biases, of all that is written from now on."""
    import wandb

    try:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            id=run_dir.name,
            resume="allow",
            config=asdict(args),
            sync_tensorboard=True,
        )
    except Exception as error:  # no login, no network
        raise Failure(f"--track: {first_line(error)}") from error


def check_finite(metrics: dict[str, np.ndarray], runners: list[Runner], iteration: int, advice: str):
    """Raises Failure if a metric is not finite, and names the first. metrics as `update` returns them."""
    table = np.stack(list(metrics.values()), axis=-1)
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong) > 0:
        step, agent, column = wrong[0]
        name = list(metrics)[column]
        value = table[step, agent, column]
        for runner in runners:
            runner.writer.flush()  # the curves that lead there
        raise Failure(f"{name} of agent {agent + 1} is {value} in iteration {iteration}; {advice}")


def test_agents(
    policies: list, runners: list[Runner], args: Args, device, stop: Stop, global_step: int
) -> bool:
    """Logs the mean raw return of each agent, of one episode in each of its test environments. The training
    goes on as it would without the test. If `stop` cuts it short all is as before, and the answer is no."""
    cuda_devices = [device] if device.type == "cuda" else []
    before = [runner.test_envs.get_state() for runner in runners]
    test_returns = []
    try:
        for number, (policy, runner) in enumerate(zip(policies, runners), 1):
            bar = make_bar(
                desc=f"test of agent {number}", total=args.num_eval_envs, leave=False, disable=None
            )
            with torch.random.fork_rng(cuda_devices), bar:
                returns = evaluate(policy, runner.test_envs, 1, device, stop, bar)
            test_returns.append(returns.mean().item())
    except Stopped:
        for runner, state in zip(runners, before):
            runner.test_envs.set_state(state)
        return False
    for runner, test_return in zip(runners, test_returns):
        runner.log_test(test_return, global_step)
    return True


def final_test(policies, runners, args: Args, device, stop: Stop, global_step: int, run_dir: Path) -> bool:
    """Tests all agents on both kinds of levels, prints a table and writes final_test.json. If `stop` cuts it
    short there is none, and the answer is no."""
    print(f"final test, of {args.final_eval_episodes} episodes on each kind of levels", flush=True)
    results = []
    try:
        for number, (policy, runner) in enumerate(zip(policies, runners), 1):
            train = test_on(
                "training levels", number, policy, runner.train_level_test_envs, args, device, stop
            )
            test = test_on("full distribution", number, policy, runner.test_envs, args, device, stop)
            gap = {
                "mean": train["mean"] - test["mean"],
                "standard_error": math.hypot(train["standard_error"], test["standard_error"]),
            }
            results.append({"training_levels": train, "full_distribution": test, "generalization_gap": gap})
    except Stopped:
        return False
    print_results(results)
    content = {"args": asdict(args), "global_step": global_step, "agents": results}
    write_json(run_dir / "final_test.json", content)
    return True


def test_on(levels: str, number: int, policy, envs, args: Args, device, stop: Stop) -> dict:
    """The raw returns of an agent, their mean and its standard error."""
    episodes_per_env = math.ceil(args.final_eval_episodes / envs.num)
    total = episodes_per_env * envs.num
    with make_bar(desc=f"agent {number}, {levels}", total=total, unit="episode") as bar:
        returns = evaluate(policy, envs, episodes_per_env, device, stop, bar)
    return {
        "mean": returns.mean(),
        "standard_error": returns.std(ddof=1) / len(returns) ** 0.5,
        "episodes": len(returns),
        "returns": returns.tolist(),
    }


def print_results(results: list[dict]):
    """The final test, a line for each agent: mean returns with their 95 % confidence intervals."""
    print("final test" + "".join(f"{name.replace('_', ' '):>22}" for name in results[0]))
    for number, result in enumerate(results, 1):
        line = f"agent {number:<4}"
        for each in result.values():
            interval = 1.96 * each["standard_error"]
            cell = f"{each['mean']:.2f} +- {interval:.2f}"
            line += f"{cell:>22}"
        print(line)


def save_agent(folder: Path, args: Args, agent: Agent, global_step: int):
    """Writes agent.pt: the weights, how many steps made them, the script and its Args, for
    torch.load(..., weights_only=True)."""
    weights = {name: weight.cpu() for name, weight in agent.state_dict().items()}
    content = {"script": Path(__file__).stem, "args": asdict(args)}
    content |= {"global_step": global_step, "agent": weights}
    write_torch(folder / "agent.pt", content)


def parse_args() -> Args:
    """Reads the command line. With --resume the settings of that run are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", nargs="?", default="")
    parser.add_argument("--env-id", "--env_id", nargs="?", default=Args.env_id)
    parser.add_argument("--exp-name", "--exp_name", nargs="?", default=Args.exp_name)
    parser.add_argument("--seed", nargs="?", default=Args.seed)
    parser.add_argument("--device", nargs="?")
    given, _ = parser.parse_known_args()
    with contextlib.suppress(ValueError, TypeError):  # of which tyro will tell
        given.seed = int(given.seed)  # 01 is 1, as in the name of its run
    path = find_checkpoint(given.resume or "", given.env_id, given.exp_name, given.seed)
    options = {"prog": Path(__file__).name, "description": __doc__}
    if path:
        options["default"] = saved_settings(path, read_checkpoint(path), given.device)
    args = tyro.cli(Args, **options)
    if args.resume == "auto" and path is None:
        print("--resume auto: there is no such run yet, so this is a new one", flush=True)
    return replace(args, resume=str(path or ""))


def main(args: Args, stop: Stop | None = None):
    """Trains, tests and saves. Ends early once `stop` is requested: after the iteration under way, in a test
    at once."""
    stop = stop or Stop()
    device = find_device(args.device)
    found = find_checkpoint(args.resume, args.env_id, args.exp_name, args.seed)
    checkpoint = None
    encoder = None
    position = Position()
    if args.pretrained_encoder and not found:
        channels, encoder = read_encoder(args)
        args = replace(args, channels=channels)
    run_dir, _lock = open_run(args, found)  # which is held until main returns
    print(f"run folder: {run_dir}", flush=True)
    if found:
        checkpoint = read_checkpoint(found)
        check_changes(args, checkpoint["args"], found)
        position = read_position(args, found, checkpoint)
    args = replace(args, resume="")
    prepare_torch(args, device)
    if args.track:
        track(args, run_dir)

    agents, optimizer, runners = set_up(args, run_dir, device, position.global_step, encoder)
    players, policies, gradient_step = speed_up(args, agents, optimizer, runners, device, run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoint.pt", args, agents, optimizer, runners)
    if checkpoint:
        checkpoints.load(checkpoint)
    else:
        checkpoints.save(position)
    write_json(run_dir / "args.json", asdict(args))

    copy_weights(agents, players)
    first_step = position.global_step
    last_step = first_step + (args.total_timesteps - first_step) // args.batch_size * args.batch_size
    start_time = time.time()
    stopping = stop.requested
    with contextlib.closing(Progress(args, len(agents), first_step, last_step)) as progress:
        stop.progress = progress
        while not stopping and (position.test_due or position.global_step < last_step):
            if not position.test_due:
                progress.begin_iteration()
                rollout(policies, runners, progress)
                episodes = [runner.finish_rollout() for runner in runners]
                metrics = update(gradient_step, args, device, progress)
                copy_weights(agents, players)
                position.iteration += 1
                position.global_step += args.batch_size
                check_finite(metrics, runners, position.iteration, checkpoints.last_good)
                progress.end_iteration()

                sps = (position.global_step - first_step) / (time.time() - start_time)
                for i, runner in enumerate(runners):
                    losses = {name: values.mean(axis=0)[i] for name, values in metrics.items()}
                    runner.log_iteration(losses, episodes[i], sps, position.global_step)
                position.test_due = args.eval_interval > 0 and position.iteration % args.eval_interval == 0
            if position.test_due:
                tested = test_agents(policies, runners, args, device, stop, position.global_step)
                position.test_due = not tested
            progress.show_returns(runners)
            stopping = stop.requested
            if stopping or position.global_step == last_step or checkpoints.due(position):
                checkpoints.save(position)
        stop.progress = None

    for runner, agent in zip(runners, agents):
        save_agent(runner.folder, args, agent, position.global_step)
    if args.eval_interval > 0 and not stopping:
        stopping = not final_test(policies, runners, args, device, stop, position.global_step, run_dir)
    for runner in runners:
        runner.close()
    if stopping:
        print(f"stopped after {position.global_step:,} steps; to go on: --resume {run_dir}", flush=True)
        sys.exit(128 + stop.signal_number)
    print(f"finished after {position.global_step:,} steps: {run_dir}", flush=True)


def run_from_shell():
    """With output that may end before the run does."""
    threading.excepthook = pass_over_writer_errors
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        run_or_say_why()


def run_or_say_why():
    """What is wrong with a file, a disk or the memory is one line, with exit status 2."""
    stop = Stop()
    stop.catch_signals()
    try:
        main(parse_args(), stop)
        return
    except Failure as failure:
        message = str(failure)
    except UnicodeEncodeError as error:
        message = f"{error.object!a} cannot be written in {error.encoding}: another name would do"
    except OSError as error:
        message = f"{error.filename or 'cannot write'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            smaller = "smaller --num-envs, --num-steps, --num-eval-envs or --channels"
            message = f"out of memory: {smaller}, or more --num-minibatches, would do"
        elif isinstance(error, torch._dynamo.exc.TorchDynamoException):
            message = f"torch.compile failed: {first_line(error)}; --no-compile would do"
        else:
            raise
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def pass_over_writer_errors(why):
    """For threading.excepthook. TensorBoard's writing thread keeps its error for the next flush, which raises
    it in the main thread: a traceback here would say the same twice."""
    if getattr(why.thread, "exception", None) is not why.exc_value:
        threading.__excepthook__(why)


def is_out_of_memory(error: Exception) -> bool:
    """By its class or, on a CPU and in CUDA itself, where PyTorch has none for it, by its text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ["DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory"]
    return any(text in str(error) for text in texts)


if __name__ == "__main__":
    run_from_shell()
