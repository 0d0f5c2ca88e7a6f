# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#   "gym==0.23.1", "gym-notices==0.0.8", "numpy==1.26.4", "setuptools==84.2.1", "tensorboard==2.21.0",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
#   "procgen==0.10.7; python_version < '3.11'", "procgen-mirror==0.10.7; python_version >= '3.11'",
# ]
# ///
"""MDSPO on Procgen: two SPO agents that learn from each other, trained on 500 levels, tested on all.

"Representation Convergence: Mutual Distillation is Secretly a Form of Regularization" (appendix E.2). Each
agent collects its own rollouts. On agent i's minibatch, with the peer j, its loss is (equation 18)

    L_i = L_RL,i + distill_coef KL( pi_j(.|o) || pi_i(.|o) )

and one Adam minimises (L_1 + L_2) / 2 (algorithm 1). Both networks get the gradient of both KL terms.
spo_procgen.py is the same without a peer, mdpo_procgen.py differs from this file only in policy_loss.

    python mdspo_procgen.py --env-id bigfish
"""

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
from collections import namedtuple
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from gym.wrappers.normalize import RunningMeanStd
from procgen import ProcgenGym3Env
from procgen.env import ENV_NAMES
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MODES = {"easy": ENV_NAMES, "hard": ENV_NAMES}  # and their games: any other pair aborts inside Procgen
MODES["extreme"] = ["chaser", "dodgeball", "leaper", "starpilot"]
MODES["memory"] = ["caveflyer", "dodgeball", "heist", "jumper", "maze", "miner"]
RANGES = {  # of numbers, both ends included
    "num_steps num_minibatches update_epochs checkpoint_interval": (1, 2**31 - 1),
    "seed num_levels start_level eval_interval": (0, 2**31 - 1),
    "num_envs num_eval_envs": (1, 2**16),
    "num_env_threads": (0, 2**10),
    "final_eval_episodes": (2, 2**31 - 1),
    "gamma gae_lambda": (0, 1),
    "learning_rate clip_coef max_grad_norm": (1e-9, 10**9),
    "ent_coef vf_coef distill_coef": (0, 10**9),
}


@dataclass
class Args:
    env_id: str = "bigfish"  # one of the 16 games of Procgen
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, actions, minibatches and environments
    learning_rate: float = 5e-4  # of Adam
    num_envs: int = 64  # parallel environments
    num_steps: int = 256  # steps in each environment between two updates
    num_minibatches: int = 8  # minibatches in an epoch
    update_epochs: int = 3  # passes over the data of an iteration
    gamma: float = 0.999  # discount factor
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    clip_coef: float = 0.2  # epsilon of the policy loss and of the value clipping
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    distill_coef: float = 1.0  # weight of the mutual distillation
    detach_peer: bool = False  # distil into the agent alone, without gradient for its peer
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this norm
    channels: tuple[int, int, int] = (16, 32, 32)  # width of the encoder's three stages
    pretrained_encoder: str = ""  # agent.pt whose encoder, and its channels, to begin with
    freeze_encoder: bool = False  # train actor and critic alone
    num_levels: int = 500  # training levels, 0 for all there are
    start_level: int = 0  # first training level
    distribution_mode: str = "hard"  # easy or hard, for some games also extreme or memory
    num_eval_envs: int = 64  # test environments, one episode in each
    # What follows may be changed when a run goes on.
    total_timesteps: int = 50_000_000  # environment steps of each agent
    eval_interval: int = 50  # iterations between tests on the full distribution, 0 for no tests
    final_eval_episodes: int = 512  # episodes of the last test, on each kind of levels
    checkpoint_interval: int = 50  # iterations between checkpoints; every 5 minutes there is one anyway
    resume: str = ""  # run folder or checkpoint to go on from, or auto: the newest run of this name, if any
    device: str = "auto"  # cpu, cuda, cuda:N, or auto: CUDA where there is one
    num_env_threads: int = 0  # Procgen's threads, 0 for one a core
    bf16: bool = True  # encoder in bfloat16, on GPUs and processors that have it
    compile: bool = True  # torch.compile loss and acting, on CUDA
    cudagraphs: bool = True  # replay acting and minibatch steps as graphs, on CUDA
    torch_deterministic: bool = False  # only deterministic cuDNN algorithms
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "mdpo"  # project of --track
    wandb_entity: str | None = None  # team of --track

    def __post_init__(self):
        def check(ok: bool, name: str, needs: str):
            if not ok:
                value = "" if getattr(self, name) is True else f", not {getattr(self, name)}"
                raise ValueError(f"--{name.replace('_', '-')} {needs}{value}")

        check(self.env_id in ENV_NAMES, "env_id", f"must be one of {', '.join(ENV_NAMES)}")
        named = re.fullmatch(r"[\w.+=-]{1,99}", self.exp_name)
        check(named, "exp_name", "must be 1 to 99 of a-z, 0-9, _.+=-")
        if self.resume:
            return  # the rest is checked with the settings of the run that goes on
        modes = [mode for mode, games in MODES.items() if self.env_id in games]
        needs = f"must be {' or '.join(modes)} for {self.env_id}"
        check(self.distribution_mode in modes, "distribution_mode", needs)
        for names, (low, high) in RANGES.items():
            for name in names.split():
                check(low <= getattr(self, name) <= high, name, f"must be from {low} to {high}")
        low_enough = self.start_level + self.num_levels < 2**31 and (self.num_levels or not self.start_level)
        check(low_enough, "start_level", "must be 0 with --num-levels 0, and their sum below 2147483648")
        widths = len(self.channels) == 3 and all(0 < width <= 4096 for width in self.channels)
        check(widths, "channels", "must be three numbers from 1 to 4096")
        can_freeze = self.pretrained_encoder or not self.freeze_encoder
        check(can_freeze, "freeze_encoder", "needs --pretrained-encoder")
        device = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", self.device)
        check(device, "device", "must be auto, cpu, cuda or cuda:N")
        found, index = torch.cuda.device_count(), int(device[1] or 0)
        needs = f"needs CUDA device {index}, and PyTorch finds {found}: auto or cpu would do"
        check(self.device[:4] != "cuda" or index < found, "device", needs)
        has_wandb = getattr(importlib.util.find_spec("wandb"), "origin", None)  # a folder of runs has none
        check(has_wandb or not self.track, "track", "needs wandb: `pip install wandb`")

        self.batch_size = self.num_envs * self.num_steps
        self.minibatch_size = self.batch_size // self.num_minibatches
        self.num_iterations = self.total_timesteps // self.batch_size
        batch = f"the batch, --num-envs x --num-steps = {self.batch_size}"
        ok = self.batch_size % self.num_minibatches == 0 and self.minibatch_size >= 2
        check(ok, "num_minibatches", f"must divide {batch}, and be at most half of it")
        check(self.num_iterations >= 1, "total_timesteps", f"must be at least {batch}")


class ResidualBlock(nn.Sequential):
    def __init__(self, channels: int):
        convs = [nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2)]
        super().__init__(nn.ReLU(), convs[0], nn.ReLU(), convs[1])

    def forward(self, x):
        return x + super().forward(x)


class Agent(nn.Module):
    """The IMPALA-CNN (Espeholt et al. 2018) with a policy and a value head. obs: uint8 (B, 64, 64, 3), or
    float in [0, 255]. Gives logits (B, num_actions) and value (B,), in units of the normalised reward."""

    def __init__(self, num_actions: int = 15, channels: tuple[int, int, int] = (16, 32, 32)):
        super().__init__()
        layers = []
        for in_channels, out_channels in zip((3, *channels), channels):
            layers += [
                nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(out_channels),
                ResidualBlock(out_channels),
            ]
        layers += [nn.Flatten(), nn.ReLU(), nn.Linear(channels[-1] * 8 * 8, 256), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.actor = nn.Linear(256, num_actions)
        self.critic = nn.Linear(256, 1)
        for head, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(head.weight, gain)
            nn.init.zeros_(head.bias)

    def forward(self, obs):
        hidden = self.encoder(obs.permute(0, 3, 1, 2) / 255).float()
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class PinnedProcgen(ProcgenGym3Env):
    """Observes into one page-locked buffer, from which a GPU copies by itself; `act` overwrites it."""

    def _numpy_aligned(self, shape, dtype, align=64):
        num_bytes, pin = int(np.prod(shape)) * dtype.itemsize, torch.cuda.is_initialized()
        memory = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pin)
        return memory.numpy().view(dtype).reshape(shape)


def make_envs(args: Args, num: int, num_levels: int, start_level: int, rand_seed: int):
    """Procgen behind its gym3 interface: `act` starts a step in Procgen's threads, `observe` waits for it.

    For other environments return an object with `num`, `act(int32 (num,))`, `close()` and `observe()`, which
    gives (reward float32 (num,), {"rgb": uint8 (num, 64, 64, 3)}, first bool (num,)). `first` says that the
    observation begins an episode; the action -1 ends the episode under way. Checkpoints need `get_state()`,
    which gives a list of bytes, none of them empty, and `set_state` of such a list.
    """
    options = {"num_levels": num_levels, "start_level": start_level, "rand_seed": rand_seed}
    threads = args.num_env_threads or len(os.sched_getaffinity(0))
    mode = args.distribution_mode
    envs = PinnedProcgen(num, args.env_id, distribution_mode=mode, num_threads=threads, **options)
    envs._reuse_arrays = True
    return envs


class RewardNormalizer:
    """gym's NormalizeReward: divides by the running standard deviation of the discounted return."""

    def __init__(self, num_envs: int, gamma: float):
        self.gamma, self.returns, self.statistics = gamma, np.zeros(num_envs), RunningMeanStd(shape=())

    def __call__(self, rewards: np.ndarray, dones: np.ndarray) -> np.ndarray:
        """Raw rewards and whether they ended an episode, (num_steps, num_envs), to float32 in [-10, 10]."""
        returns, variances = np.empty(rewards.shape), np.empty((len(rewards), 1))
        for step, reward in enumerate(rewards):
            returns[step] = self.returns * self.gamma + reward
            self.returns = np.where(dones[step], 0, returns[step])
        for step, moments in enumerate(zip(returns.mean(1).tolist(), returns.var(1).tolist())):
            self.statistics.update_from_moments(*moments, rewards.shape[1])
            variances[step] = self.statistics.var
        return (rewards / np.sqrt(variances + 1e-8)).clip(-10, 10).astype(np.float32)


# obs are uint8 (..., 64, 64, 3), actions int64; values, advantages and returns are in units of the normalised
# reward. A rollout's leading dimensions are (num_steps + 1, num_envs); its last row only bootstraps.
Batch = namedtuple("Batch", "obs actions logprobs values advantages returns")
# Environments that step together: their policy (`act`, of obs alone) and the columns that they fill; rewards,
# raw, are float32 and dones bool (num_steps + 1, num), both as they came with obs.
Group = namedtuple("Group", "policy envs data rewards dones")


def compute_gae(rewards, values, dones, next_value, next_done, gamma: float, gae_lambda: float):
    """Generalized advantage estimation (Schulman et al. 2016). All (num_steps, num_envs), next_* (num_envs,).
    rewards[t] is for the action at obs[t], normalised; dones[t] says that obs[t] begins an episode. Returns
    advantages and returns, of the shape of values."""
    next_values = torch.cat([values[1:], next_value[None]])
    next_nonterminal = 1.0 - torch.cat([dones[1:], next_done[None]]).to(values.dtype)
    deltas = rewards + gamma * next_values * next_nonterminal - values
    decays = gamma * gae_lambda * next_nonterminal
    advantages = [torch.zeros_like(next_value)]
    for delta, decay in zip(deltas.flip(0), decays.flip(0)):
        advantages.append(delta + decay * advantages[-1])
    advantages = torch.stack(advantages[:0:-1])
    return advantages, advantages + values


def policy_loss(ratio, advantages, clip_coef: float):
    """SPO's objective, negated: a scalar to be minimised. Its optimum is at 1 + sign(A) eps. Both (B,)."""
    penalty = advantages.abs() * (ratio - 1) ** 2 / (2 * clip_coef)
    return -(ratio * advantages - penalty).mean()


def value_loss(new_values, old_values, returns, clip_coef: float):
    """Half the squared error of the value or of the clipped value, the larger of the two. All (B,)."""
    clipped_values = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped_values - returns) ** 2).mean()


def mutual_kl(peer_logits, logits):
    """Mean KL(peer || self), the distillation term of equation 18. Both (B, num_actions); a scalar."""
    peer_logprobs, logprobs = peer_logits.log_softmax(-1), logits.log_softmax(-1)
    return (peer_logprobs.exp() * (peer_logprobs - logprobs)).sum(-1).mean()


METRICS = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac ratio_deviation".split()
METRICS += "mutual_kl grad_norm".split()  # a row of what minibatch_step returns


def rl_loss(logits, new_values, mb: Batch, args: Args):
    """policy_loss + vf_coef value_loss - ent_coef entropy, and the first seven METRICS, from what the network
    now says of the minibatch: logits (B, num_actions) and new_values (B,). All scalars. The minibatch's
    advantages are normalised."""
    logprobs = logits.log_softmax(-1)
    log_ratio = logprobs.gather(-1, mb.actions[:, None]).squeeze(-1) - mb.logprobs
    ratio = log_ratio.exp()
    pg_loss = policy_loss(ratio, mb.advantages, args.clip_coef)
    v_loss = value_loss(new_values, mb.values, mb.returns, args.clip_coef)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    approx_kl, deviation = (ratio - 1 - log_ratio).mean(), (ratio - 1).abs()
    clipfrac = (deviation > args.clip_coef).float().mean()
    metrics = [pg_loss, v_loss, entropy, -log_ratio.mean(), approx_kl, clipfrac, deviation.mean()]
    return pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy, metrics


def compute_loss(agents: list[Agent], mbs: list[Batch], args: Args):
    """The loss of both agents on both minibatches, a scalar, and all METRICS but the last, a row an agent."""
    outputs = [agent(torch.cat([mb.obs for mb in mbs])) for agent in agents]  # on both minibatches
    loss, metrics = 0.0, []
    for i, mb in enumerate(mbs):
        rows = slice(i * len(mb.obs), (i + 1) * len(mb.obs))
        logits, new_values = (output[rows] for output in outputs[i])
        peer_logits = outputs[1 - i][0][rows]
        agent_loss, agent_metrics = rl_loss(logits, new_values, mb, args)
        kl = mutual_kl(peer_logits.detach() if args.detach_peer else peer_logits, logits)
        loss = loss + (agent_loss + args.distill_coef * kl) / 2
        metrics.append(torch.stack([*agent_metrics, kl]))
    return loss, torch.stack(metrics)


@torch.no_grad()
def act(agent: Agent, obs):
    """Samples the policy at obs, uint8 (B, 64, 64, 3). Returns actions, logprobs and values, all (B,)."""
    logits, values = agent(obs)
    logprobs = logits.log_softmax(-1)
    gumbel_noise = -torch.empty_like(logprobs).exponential_().log()
    actions = (logprobs + gumbel_noise).argmax(-1)
    return actions, logprobs.gather(-1, actions[:, None]).squeeze(-1), values


def rollout(groups: list[Group]):
    """Plays num_steps steps and fills the groups' columns, advantages and returns apart. One group steps in
    the background while the network acts for the next."""
    num_steps = len(groups[0].rewards) - 1
    for step in range(num_steps + 1):
        for policy, envs, data, rewards, dones in groups:
            rewards[step], obs, dones[step] = envs.observe()
            data.obs[step].copy_(torch.from_numpy(obs["rgb"]), non_blocking=True)
            data.actions[step], data.logprobs[step], data.values[step] = policy(data.obs[step])
            if step < num_steps:
                envs.act(data.actions[step].cpu().numpy().astype(np.int32))  # waits for the device


def minibatch_step(loss_function, agents: list[Agent], optimizer, batches, args: Args, part_size, mb_inds):
    """One gradient step on the rows mb_inds of each agent's batch; loss_function is compute_loss. It goes
    through them in parts, for memory's sake, and adds up. Returns METRICS, a row for each agent."""
    mbs, metrics = [Batch(*(column[mb_inds] for column in batch)) for batch in batches], 0.0
    for mb in mbs:  # copies, to mean 0 and standard deviation 1
        mb.advantages[:] = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)
    optimizer.zero_grad()
    for start in range(0, len(mb_inds), part_size):
        parts = [Batch(*(column[start : start + part_size] for column in mb)) for mb in mbs]
        part_loss, part_metrics = loss_function(agents, parts, args)
        share = len(parts[0].obs) / len(mb_inds)
        (part_loss * share).backward()
        metrics = metrics + part_metrics.detach() * share
    norms = [nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm) for agent in agents]
    optimizer.step()
    return torch.cat([metrics, torch.stack(norms)[:, None]], 1)


def update(step, args: Args, device) -> np.ndarray:
    """Passes over the batch in shuffled minibatches, `step` taking the indices of each. Returns METRICS,
    float32 (number of steps, number of agents, len(METRICS))."""
    metrics = []
    for _ in range(args.update_epochs):
        for mb_inds in torch.randperm(args.batch_size, device=device).split(args.minibatch_size):
            metrics.append(step(mb_inds).clone())  # a graph writes to the same place each time
    return torch.stack(metrics).cpu().numpy()  # waits for the device


def evaluate(policy, envs, episodes_per_env: int, device) -> np.ndarray:
    """Raw returns of each environment's first whole episodes, so that short ones do not win, of shape
    (episodes_per_env * envs.num,). The levels go on where the last test left them."""
    episodes, returns = [[] for _ in range(envs.num)], np.zeros(envs.num)
    envs.act(np.full(envs.num, -1, np.int32))  # ends what the last test left unfinished
    _, obs, _ = envs.observe()
    while min(map(len, episodes)) < episodes_per_env:
        actions, _, _ = policy(torch.from_numpy(obs["rgb"]).to(device))
        envs.act(actions.cpu().numpy().astype(np.int32))
        reward, obs, ended = envs.observe()
        returns += reward
        for i in np.flatnonzero(ended):
            episodes[i].append(returns[i])
            returns[i] = 0
    return np.concatenate([of_env[:episodes_per_env] for of_env in episodes])


class CudaGraph:
    """Replays a function of one tensor, captured once for each shape. Its outputs are overwritten by the next
    call. Capturing leaves the generator and `state`, the tensors that the function changes, as they were."""

    def __init__(self, function, state=()):
        self.function, self.state, self.captured = function, state, {}

    def __call__(self, x):
        if x.shape not in self.captured:
            self.captured[x.shape] = self.capture(x.clone())
        graph, static_x, outputs = self.captured[x.shape]
        static_x.copy_(x)
        graph.replay()
        return outputs

    @torch.no_grad()
    def capture(self, x):
        before, generator = [each.clone() for each in self.state], torch.cuda.get_rng_state()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.enable_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # compiles, chooses algorithms, allocates
                self.function(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.enable_grad(), torch.cuda.graph(graph):
            outputs = self.function(x)
        for each, value in zip(self.state, before):
            each.copy_(value)
        torch.cuda.set_rng_state(generator)
        return graph, x, outputs


class Runner:
    """One agent's side of a run: its environments, its data and its curves."""

    def __init__(self, args: Args, agent: Agent, policy, index: int, num_groups: int, folder, device, done=0):
        self.args, self.agent, self.policy, self.folder, self.device = args, agent, policy, folder, device
        seeds = np.random.default_rng([args.seed, index]).integers(2**31, size=2 + num_groups).tolist()
        levels, first_step = (args.num_levels, args.start_level), done * args.batch_size + 1
        self.train_level_test_envs = make_envs(args, args.num_eval_envs, *levels, seeds[0])
        self.test_envs = make_envs(args, args.num_eval_envs, 0, 0, seeds[1])
        zeros = partial(torch.zeros, args.num_steps + 1, args.num_envs, device=device)
        obs, actions = zeros(64, 64, 3, dtype=torch.uint8), zeros(dtype=torch.int64)
        self.data = Batch(obs, actions, logprobs=zeros(), values=zeros(), advantages=zeros(), returns=zeros())
        self.batch = Batch(*(column[:-1].flatten(0, 1) for column in self.data))  # the same memory
        self.rewards, self.dones = (np.zeros(self.data.values.shape, kind) for kind in (np.float32, bool))
        self.groups = []
        for seed, columns in zip(seeds[2:], torch.arange(args.num_envs).chunk(num_groups)):
            envs, part = make_envs(args, len(columns), *levels, seed), slice(columns[0], columns[-1] + 1)
            data = Batch(*(column[:, part] for column in self.data))
            self.groups.append(Group(policy, envs, data, self.rewards[:, part], self.dones[:, part]))
        self.normalizer = RewardNormalizer(args.num_envs, args.gamma)
        self.episodes = np.zeros((2, args.num_envs))  # raw return and length of those under way
        self.train_return = self.test_return = math.nan  # as last logged
        self.writer = SummaryWriter(folder, purge_step=first_step)  # hides what a killed process wrote later
        rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + rows, first_step)

    def finish_rollout(self) -> np.ndarray:
        """Estimates advantages and returns after a rollout. Gives the raw return and the length of all
        episodes that ended in it, (2, number of episodes)."""
        values, dones = self.data.values.cpu(), torch.from_numpy(self.dones)
        rewards = torch.from_numpy(self.normalizer(self.rewards[1:], self.dones[1:]))
        steps = (rewards, values[:-1], dones[:-1], values[-1], dones[-1])
        estimates = compute_gae(*steps, self.args.gamma, self.args.gae_lambda)
        self.data.advantages[:-1], self.data.returns[:-1] = estimates
        ended = []
        for reward, done in zip(self.rewards[1:], self.dones[1:]):
            self.episodes += [reward, np.ones_like(reward)]
            ended.append(self.episodes[:, done])
            self.episodes[:, done] = 0
        return np.concatenate(ended, axis=1)

    def log(self, metrics: np.ndarray, episodes: np.ndarray, global_step: int, sps: float, test: bool):
        """Writes an iteration's curves, return and length being means over the episodes that ended in it."""
        scalars = {f"losses/{name}": value for name, value in zip(METRICS, metrics)}
        residual = (self.batch.returns - self.batch.values).var() / self.batch.returns.var()
        scalars["losses/explained_variance"] = 1 - residual.item()
        scalars |= {"charts/learning_rate": self.args.learning_rate, "charts/SPS": sps}
        if episodes.size:
            scalars["charts/episodic_return"], scalars["charts/episodic_length"] = episodes.mean(1).tolist()
            self.train_return = scalars["charts/episodic_return"]
        if test:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # training goes on as it would without the test
                self.test_return = evaluate(self.policy, self.test_envs, 1, self.device).mean().item()
            scalars["charts/test_episodic_return"] = self.test_return
            scalars["charts/generalization_gap"] = self.train_return - self.test_return
        for tag, value in scalars.items():
            if not math.isnan(value):
                self.writer.add_scalar(tag, value, global_step)

    def final_test(self) -> dict[str, dict[str, float]]:
        """Mean raw return with its standard error on both kinds of levels, and their difference."""
        result, episodes_per_env = {}, -(-self.args.final_eval_episodes // self.args.num_eval_envs)
        levels = {"training_levels": self.train_level_test_envs, "full_distribution": self.test_envs}
        for name, envs in levels.items():
            returns = evaluate(self.policy, envs, episodes_per_env, self.device)
            error = returns.std(ddof=1) / len(returns) ** 0.5
            result[name] = {"mean": returns.mean(), "standard_error": error, "episodes": len(returns)}
        train, test = result.values()
        error = math.hypot(train["standard_error"], test["standard_error"])
        gap = {"mean": train["mean"] - test["mean"], "standard_error": error}
        return result | {"generalization_gap": gap}

    def save_agent(self):
        """Writes agent.pt: the weights, the script and its Args, for torch.load(..., weights_only=True)."""
        weights = {name: weight.cpu() for name, weight in self.agent.state_dict().items()}
        content = {"script": Path(__file__).stem, "args": asdict(self.args), "agent": weights}
        write_file(self.folder / "agent.pt", content)

    def state_dict(self) -> dict:
        """What this side of a run goes on from, in types that weights_only loads."""
        return {
            "agent": self.agent.state_dict(),
            "envs": [envs.get_state() for envs in (self.test_envs, *(group.envs for group in self.groups))],
            "reward_statistics": {name: float(x) for name, x in vars(self.normalizer.statistics).items()},
            "arrays": [self.normalizer.returns.tolist(), self.episodes.tolist()],
            "returns": [self.train_return, self.test_return],
        }

    def load_state_dict(self, state: dict):
        self.agent.load_state_dict(state["agent"])
        all_envs = (self.test_envs, *(group.envs for group in self.groups))
        for envs, env_states in zip(all_envs, state["envs"], strict=True):
            envs.set_state(env_states)
        vars(self.normalizer.statistics).update(state["reward_statistics"])
        self.normalizer.returns, self.episodes = map(np.array, state["arrays"])
        self.train_return, self.test_return = state["returns"]

    def close(self):
        self.writer.close()
        for envs in (self.train_level_test_envs, self.test_envs, *(group.envs for group in self.groups)):
            envs.close()


def fail(message: str):
    """Ends the process over something that its user can mend: one line, the last one, and exit status 2."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def write_file(path: Path, content):
    """Writes a string, or torch.save of anything else: the whole file, or what was there before stays."""
    stream = io.BytesIO()
    stream.write(content.encode()) if isinstance(content, str) else torch.save(content, stream)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(stream.getvalue())
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        fail(f"cannot write {path}{', which stays as it was' * path.exists()}: {error.strerror}")


def read_file(path, flag: str, keys: set[str]) -> dict:
    """What torch.save wrote into one of our files, a dict with these keys; anything else ends the process."""
    try:
        bad_part = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        if bad_part or not content.keys() >= keys:
            raise ValueError
        return content
    except Exception as error:  # torch has many names for a file that is cut short, or not ours, or code
        reason = getattr(error, "strerror", None) or "it is damaged, or another kind of file"
        fail(f"{flag} cannot read {path}: {reason}")


def read_checkpoint(path: Path) -> dict:
    content = read_file(path, "--resume", {"format", "script", "args", "iteration"})
    ours, theirs = (Path(__file__).stem, 1), (content["script"], content["format"])
    if theirs != ours:
        fail("--resume: {} is of {}.py, format {}; this is {}.py, format {}".format(path, *theirs, *ours))
    return content


def read_encoder(path: str) -> tuple[tuple[int, int, int], dict]:
    """Channels and weights of the encoder in an agent.pt of any of the scripts."""
    content = read_file(path, "--pretrained-encoder", {"script", "args", "agent"})
    try:
        channels = Args(channels=tuple(content["args"]["channels"])).channels
        encoder = Agent(channels=channels).encoder
        weights = {k.removeprefix("encoder."): v for k, v in content["agent"].items() if "encoder." in k}
        encoder.load_state_dict(weights)
        return channels, weights
    except Exception:  # a part is missing, or its shape is not what the file says
        fail(f"--pretrained-encoder cannot use {path}: it has no encoder of the channels that it names")


def find_checkpoint(args: Args) -> Path | None:
    """The file that --resume means, None for a new run."""
    if args.resume == "auto":
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{10 * '[0-9]'}"
        return max(Path("runs").glob(f"{name}/checkpoint.pt"), key=os.path.getmtime, default=None)
    return Path(args.resume, "checkpoint.pt" * os.path.isdir(args.resume)) if args.resume else None


def save_checkpoint(path: Path, args: Args, iteration: int, optimizer, runners: list[Runner]):
    for runner in runners:
        runner.writer.flush()  # no curve on disk ends before the checkpoint does
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    generators = [random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state(), cuda]
    content = {"format": 1, "script": Path(__file__).stem, "args": asdict(args), "iteration": iteration}
    content |= {"runners": [runner.state_dict() for runner in runners], "generators": generators}
    write_file(path, content | {"optimizer": optimizer.state_dict()["state"]})


def load_checkpoint(content: dict, optimizer, runners: list[Runner]):
    for runner, state in zip(runners, content["runners"], strict=True):
        runner.load_state_dict(state)
    for state, saved in zip(optimizer.state.values(), content["optimizer"].values(), strict=True):
        for name, moment in state.items():
            moment.copy_(saved[name])  # which keeps the layout that this device and precision need
    *generators, cuda = content["generators"]
    for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), generators):
        restore(state)
    if cuda is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda)


def open_run(args: Args) -> tuple[Path, dict, object]:
    """Makes or finds the run folder and locks it. Returns its checkpoint, path and content, and the lock."""
    found = find_checkpoint(args)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    path = found or Path("runs", name, "checkpoint.pt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        busy = "another process is at work in it"
        fail(f"run folder {path.parent}: {busy if isinstance(error, BlockingIOError) else error.strerror}")
    return path, read_checkpoint(found) if found else {}, lock


def catch_signals() -> list[int]:
    """The list that SIGINT and SIGTERM go to, for main to stop at the next good place; a second one kills."""
    signals = []

    def catch(signum, frame):
        signals.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("\nstopping after this iteration or test; once more stops at once", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return signals


def print_results(results: list[dict[str, dict[str, float]]]):
    """Prints the final test, a line for each agent: mean returns with their 95 % confidence intervals."""
    print("final test" + "".join(f"{name.replace('_', ' '):>22}" for name in results[0]))
    for number, result in enumerate(results, 1):
        cells = [f"{each['mean']:.2f} +- {1.96 * each['standard_error']:.2f}" for each in result.values()]
        print(f"agent {number:<4}" + "".join(f"{cell:>22}" for cell in cells))


def parse_args() -> Args:
    """Reads the command line, over the settings of a run to resume; tyro's box of errors becomes a line."""

    def parse(default: Args) -> Args:
        box = io.StringIO()
        try:
            with contextlib.redirect_stderr(box):
                return tyro.cli(Args, prog=Path(__file__).name, description=__doc__, default=default)
        except SystemExit as stop:
            text = re.sub("╭.*╮|│|╰.*╯", " ", box.getvalue())
            message = re.sub(" *(─+|-{5,}) *", "; ", " ".join(text.split())).split("Error parsing Args: ")[-1]
            fail(message.split("; For full helptext")[0]) if stop.code else sys.exit(0)

    args = parse(Args())
    path = find_checkpoint(args)
    checkpoint = read_checkpoint(path) if path else {"args": {}, "iteration": 0}
    saved = checkpoint["args"]
    try:
        if path:
            args = parse(Args(**saved | {"resume": str(path)}))
        if saved.get("device", "")[:4] == args.device[:4] == "cuda" and not torch.cuda.is_available():
            args.device = "auto"
        names = [field.name for field in fields(Args)]
        for name in names[: names.index("total_timesteps")]:
            if name in saved and getattr(args, name) != saved[name]:
                value = "empty" if saved[name] == "" else saved[name]
                fail(f"--{name.replace('_', '-')} must stay {value}, as in {path}: leave it out")
        args = replace(args, resume="")  # now everything is checked
        if (steps := checkpoint["iteration"] * args.batch_size) > args.total_timesteps:
            fail(f"--total-timesteps must be at least {steps}, where {path} is, not {args.total_timesteps}")
    except (AttributeError, TypeError, ValueError) as error:
        fail(f"{error}, with the settings in {path}" if path else str(error))
    args.resume = str(path or "")
    return args


def main(args: Args, signals=()):
    """Trains. Once something is in `signals`, stops after the iteration under way."""
    if args.pretrained_encoder and not args.resume:
        channels, encoder = read_encoder(args.pretrained_encoder)
        if args.channels not in (Args.channels, channels):
            fail(f"--channels must be {channels}, as in {args.pretrained_encoder}: leave it out")
        args = replace(args, channels=channels)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cudnn.benchmark = not args.torch_deterministic
    torch.backends.cudnn.allow_tf32 = args.bf16  # off, float32 is float32
    device = torch.device(args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device.index or 0)
    else:
        print("training on the CPU, which is slow: no CUDA device is used", flush=True)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: glibc is to keep big buffers, since
            ctypes.CDLL(None).mallopt(parameter, 2**30)  # to give them back takes longer than to fill them
    path, checkpoint, _lock = open_run(args)
    args, run_dir, done = replace(args, resume=""), path.parent, checkpoint.get("iteration", 0)
    print(f"run folder: {run_dir}", flush=True)
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "id": run_dir.name}
        wandb.init(**names, resume="allow", config=asdict(args), sync_tensorboard=True)

    agents = [Agent(channels=args.channels).to(device) for _ in range(2)]
    for agent in agents:
        if args.pretrained_encoder and not checkpoint:
            agent.encoder.load_state_dict(encoder)
        agent.encoder.requires_grad_(not args.freeze_encoder)
    parameters = [weight for agent in agents for weight in agent.parameters() if weight.requires_grad]
    lr = torch.tensor(args.learning_rate, device=device)
    optimizer = torch.optim.Adam(parameters, lr=lr, eps=1e-5, fused=True, capturable=cuda)
    warnings.filterwarnings("ignore", ".*capturable=True")  # that it also runs uncaptured
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # that the heads do without

    # The fast path wraps the functions above: --no-bf16 --no-compile --no-cudagraphs leaves them as they are.
    actors, loss_function = agents, compute_loss
    has_bf16 = "bf16" in Path("/proc/cpuinfo").read_text()
    if cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # older GPUs crawl with it
    if args.bf16 and has_bf16:
        actors = deepcopy(agents)  # they act, with the weights that autocast would round in every step
        for actor in actors:
            actor.encoder.bfloat16()
        for agent in agents + actors:
            agent.to(memory_format=torch.channels_last)
            agent.encoder.forward = torch.autocast(device.type, torch.bfloat16)(agent.encoder.forward)
    policies = [partial(act, actor) for actor in actors]
    if cuda and args.compile:
        torch._dynamo.config.suppress_errors = True  # without a C compiler it warns, and runs eagerly
        loss_function = torch.compile(compute_loss)
        policies = [partial(act, torch.compile(actor, dynamic=False)) for actor in actors]
    if cuda and args.cudagraphs:
        policies = [CudaGraph(policy) for policy in policies]

    runners = []
    for i, (agent, policy) in enumerate(zip(agents, policies)):
        folder = run_dir / f"agent_{i + 1}" if len(agents) > 1 else run_dir
        runners.append(Runner(args, agent, policy, i, 2 // len(agents), folder, device, done))
    batches = [runner.batch for runner in runners]
    part_size = args.minibatch_size if cuda else 256  # what a CPU's caches like
    step = partial(minibatch_step, loss_function, agents, optimizer, batches, args, part_size)
    for weight in parameters:  # as Adam does in its first step, which may be inside a graph
        zeros = [torch.zeros((), device=device), torch.zeros_like(weight), torch.zeros_like(weight)]
        optimizer.state[weight] = dict(zip(("step", "exp_avg", "exp_avg_sq"), zeros))
    if checkpoint:
        try:
            load_checkpoint(checkpoint, optimizer, runners)
        except Exception as error:  # a part is missing, or made with other settings than the file says
            reason = (str(error) or type(error).__name__).splitlines()[0]
            fail(f"--resume: {path} does not fit its settings: {reason}")
    else:
        save_checkpoint(path, args, 0, optimizer, runners)
    if cuda and args.cudagraphs:
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        step = CudaGraph(step, [*parameters, *moments])

    style = {} if sys.stderr.isatty() else {"mininterval": 60, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    saved, global_step, start_time = done, done * args.batch_size, time.time()
    saved_time, total = start_time, args.num_iterations * args.batch_size
    progress = tqdm(initial=global_step, total=total, unit="step", unit_scale=True, **style)

    def refresh_actors():
        for actor, agent in zip(actors, agents):
            actor.load_state_dict(agent.state_dict())

    def step_and_show(mb_inds):
        progress.update(args.minibatch_size // args.update_epochs)
        return step(mb_inds)

    refresh_actors()
    for iteration in range(done + 1, args.num_iterations + 1):
        global_step = iteration * args.batch_size
        rollout([group for runner in runners for group in runner.groups])
        episodes = [runner.finish_rollout() for runner in runners]
        metrics = update(step_and_show, args, device)
        refresh_actors()

        for k, i, j in np.argwhere(~np.isfinite(metrics)):
            what = f"{METRICS[j]} of agent {i + 1} is {metrics[k, i, j]} in iteration {iteration}"
            fail(f"{what}; the last good checkpoint is of iteration {saved}: --resume {run_dir}")
        sps = (iteration - done) * args.batch_size / (time.time() - start_time)
        test = args.eval_interval > 0 and iteration % args.eval_interval == 0
        for i, runner in enumerate(runners):
            runner.log(metrics.mean(0)[i], episodes[i], global_step, sps, test)
        status = "/".join(f"{runner.train_return:.2f} (test {runner.test_return:.2f})" for runner in runners)
        progress.set_postfix_str(f"return {status}", refresh=False)
        progress.update(global_step - progress.n)
        due = iteration % args.checkpoint_interval == 0 or time.time() > saved_time + 300
        if due or signals or iteration == args.num_iterations:
            save_checkpoint(path, args, iteration, optimizer, runners)
            saved, saved_time = iteration, time.time()
        if signals and saved == iteration:
            break
    progress.close()

    stopped = bool(signals)  # later ones come too late
    for runner in runners:
        runner.save_agent()
    if args.eval_interval and not stopped:
        print("final test, of", args.final_eval_episodes, "episodes on each kind of levels", flush=True)
        results = [runner.final_test() for runner in runners]
        print_results(results)
        content = {"args": asdict(args), "global_step": global_step, "agents": results}
        write_file(run_dir / "final_test.json", json.dumps(content, indent=2))
    for runner in runners:
        runner.close()
    if stopped:
        print(f"stopped after {global_step:,} steps; to go on: --resume {run_dir}", flush=True)
        sys.exit(128 + signals[0])
    print(f"finished after {global_step:,} steps: {run_dir}")


if __name__ == "__main__":
    # The thread that writes the curves reports a full disk by a traceback, and then to the next flush.
    threading.excepthook = lambda why: isinstance(why.exc_value, OSError) or threading.__excepthook__(why)
    try:
        main(parse_args(), catch_signals())
    except OSError as error:  # the checkpoint before is whole
        fail(f"{error.filename or 'cannot write the curves'}: {error.strerror}")
    except RuntimeError as error:
        if not re.search("can't allocate memory|out of memory", str(error)):
            raise
        fail("out of memory: smaller --num-envs, --num-steps, --num-eval-envs or --channels would do")
