"""Whole trainings with a known answer, and what each term of the loss does alone."""

import importlib
from collections import defaultdict

import pytest
import torch
from algorithm import agents_and_batches, parameters_of
from common import MUTUAL, SCRIPTS, Probe, agent_folders, read_curves, run_folder
from torch.distributions import Categorical, kl_divergence


class TinyProbe(Probe):
    """The probe in pictures of 4 x 4."""

    def observe(self):
        reward, obs, first = super().observe()
        return reward, {"rgb": obs["rgb"][:, ::16, ::16].copy()}, first


# clip_coef is wide so that 10 updates are enough: with ratios within 1.2 a probability of 1/15 would need 15
# to come near 1.
SETTINGS = {
    "total_timesteps": 2560,
    "num_envs": 16,
    "num_steps": 16,
    "num_minibatches": 4,
    "channels": (8, 8, 8),
    "clip_coef": 0.8,
    "learning_rate": 4e-3,
    "eval_interval": 0,
    "bf16": False,
    "device": "cpu",
}


# The gradient at ratio 1, where every update begins, is that of -ratio * advantage, so a wrong sign of the
# advantage, of the ratio or of the loss turns it round, and the return goes to 0. A policy that does not see
# the side, or that of the step before, gets 2 at best.
def test_learns_to_look(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_envs", lambda args, num, levels, first, seed: TinyProbe(num, seed))
    script.main(script.Args(**SETTINGS))
    for folder in agent_folders(script.__name__, run_folder(tmp_path)):
        returns = list(read_curves(folder)["charts/episodic_return"].values())
        assert returns[0] < 1.0  # random play gets 4/15
        assert max(returns[-4:]) > 0.75 * Probe.best_return


# The settings that switch each on.
TERMS = {
    "policy": {},
    "value": {"vf_coef": 1.0},
    "entropy": {"ent_coef": 1.0},
    "distillation": {"distill_coef": 1.0},
}
CASES = [(name, term) for name in SCRIPTS for term in TERMS if term != "distillation" or name in MUTUAL]


@torch.no_grad()
def measure(agents, batches) -> dict[str, float]:
    """What grows as each term of the loss shrinks: the probability of good actions, the values' nearness to
    the returns, the entropy, and the nearness of the policies."""
    found = defaultdict(float)
    for agent, batch in zip(agents, batches):
        logits, values = agent(batch.obs)
        policy = Categorical(logits=logits)
        logprobs = policy.log_prob(batch.actions)
        found["policy"] += (batch.advantages * logprobs).mean().item()
        found["value"] -= ((values - batch.returns) ** 2).mean().item()
        found["entropy"] += policy.entropy().mean().item()
        for peer in agents:
            peer_logits, _ = peer(batch.obs)
            found["distillation"] -= kl_divergence(Categorical(logits=peer_logits), policy).mean().item()
    return found


@pytest.mark.parametrize(("name", "term"), CASES)
def test_each_term_of_the_loss_alone(name, term):
    script = importlib.import_module(name)
    settings = {"num_envs": 1, "num_steps": 16, "num_minibatches": 1, "update_epochs": 5, "device": "cpu"}
    settings |= {"clip_coef": 10.0, "ent_coef": 0.0, "vf_coef": 0.0}
    if name in MUTUAL:
        settings["distill_coef"] = 0.0
    args = script.Args(**settings | TERMS[term])
    agents, batches = agents_and_batches(script)
    if term != "policy":
        batches = [batch._replace(advantages=torch.zeros(16)) for batch in batches]
    optimizer = torch.optim.Adam(parameters_of(agents), lr=1e-2)
    before = measure(agents, batches)
    script.update(script.compute_loss, agents, optimizer, batches, args)
    after = measure(agents, batches)
    assert after[term] > before[term] + 0.02
