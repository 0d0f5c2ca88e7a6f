"""What the tests of the algorithm use: one agent's side of a run, a minibatch step, and a small probe."""

from functools import partial

import torch
from common import Probe

CPU = torch.device("cpu")


class NoProgress:
    """A run's progress that nobody watches."""

    share_of_step = 0.0
    share_of_minibatch = 0.0

    def advance(self, share: float):
        pass


class SmallProbe(Probe):
    """The probe in pictures of 16 x 16: a sixteenth of the work."""

    def observe(self):
        reward, obs, first = super().observe()
        return reward, {"rgb": obs["rgb"][:, ::4, ::4].copy()}, first


def make_small_probes(args, num: int, num_levels: int, start_level: int, rand_seed: int) -> SmallProbe:
    """In place of a script's make_envs."""
    return SmallProbe(num, rand_seed)


def make_runner(script, args, run_dir, index: int = 0, num_agents: int = 2):
    """An agent's side of a run on the CPU. With two agents all its environments are in one group."""
    return script.Runner(args, index, num_agents, run_dir, CPU, 0)


def minibatch_step(script, agents, optimizer, batches, args, mb_inds, part_size: int = 4):
    """The script's own, of its own loss, in parts of which the last may be smaller."""
    backward = partial(script.backward_in_parts, script.compute_loss, part_size)
    return script.minibatch_step(backward, agents, optimizer, batches, args, mb_inds)


def parameters_of(agents) -> list[torch.nn.Parameter]:
    return [weight for agent in agents for weight in agent.parameters()]
