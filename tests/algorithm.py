"""What the tests of the algorithm use: one agent's side of a run, and a small probe."""

import torch
from common import Probe

CPU = torch.device("cpu")


class SmallProbe(Probe):
    """The probe in pictures of 16 x 16: a sixteenth of the work."""

    def observe(self):
        reward, obs, first = super().observe()
        return reward, {"rgb": obs["rgb"][:, ::4, ::4].copy()}, first


def make_small_probes(args, num: int, num_levels: int, start_level: int, rand_seed: int) -> SmallProbe:
    """In place of a script's make_envs."""
    return SmallProbe(num, rand_seed)


def make_runner(script, args, index: int = 0, num_agents: int = 2):
    """An agent's side of a run on the CPU. With two agents all its environments are in one group."""
    return script.Runner(args, index, num_agents, CPU)


def parameters_of(agents) -> list[torch.nn.Parameter]:
    return [weight for agent in agents for weight in agent.parameters()]
