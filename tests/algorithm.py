"""What the tests of the algorithm use: one agent's side of a run, small agents, and a small probe."""

import torch
from common import SINGLE, Probe, make_batch

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


def agents_and_batches(script, num: int = 0, size: int = 16):
    """As many as the script has by default, unless told, with pictures of 8 x 8. The agents' policies differ
    between observations, as a trained one's do."""
    if num == 0:
        num = 1 if script.__name__ in SINGLE else 2
    torch.manual_seed(0)
    agents = [script.Agent(channels=(4, 4, 4), obs_shape=(8, 8, 3)) for _ in range(num)]
    batches = []
    for seed, agent in enumerate(agents):
        agent.actor.weight.data *= 300
        batch = make_batch(script, size, seed)
        batches.append(batch._replace(obs=batch.obs[:, :8, :8]))
    return agents, batches


def parameters_of(agents) -> list[torch.nn.Parameter]:
    return [weight for agent in agents for weight in agent.parameters()]
