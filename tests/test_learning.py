"""Whole trainings with a known answer, and what distillation alone does."""

import pytest
import torch
from common import (
    Probe,
    agent_folders,
    make_agents,
    make_batch,
    make_probes,
    minibatch_step,
    read_curves,
    run_folder,
)
from torch.distributions import Categorical, kl_divergence


def train_on_probe(script, num_iterations, tmp_path, monkeypatch) -> list[list[float]]:
    """The training return in each iteration, a list for each agent. clip_coef is wide so that 10 updates are
    enough: with ratios within 1.2 a probability of 1/15 would need 15 to come near 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_envs", make_probes)
    settings = {"num_envs": 8, "num_steps": 16, "num_minibatches": 8, "channels": (4, 4, 4), "clip_coef": 0.8}
    settings |= {"learning_rate": 3e-3, "eval_interval": 0, "device": "cpu"}
    script.main(script.Args(total_timesteps=128 * num_iterations, **settings))
    folders = agent_folders(script.__name__, run_folder(tmp_path))
    return [list(read_curves(folder)["charts/episodic_return"].values()) for folder in folders]


# The gradient at ratio 1, where every update begins, is that of -ratio * advantage, so a wrong sign of the
# advantage, of the ratio or of the loss turns it round, and the return goes to 0, as the second test shows.
# Rewards or observations one step off make the right action a matter of chance, since the side changes every
# step, and a policy that cannot see gets 2 at best: the first test asks for more.
def test_learns_to_look(script, tmp_path, monkeypatch):
    for returns in train_on_probe(script, 10, tmp_path, monkeypatch):
        assert returns[0] < 1.0  # random play gets 4/15
        assert max(returns[-4:]) > 0.75 * Probe.best_return


def test_unlearns_with_the_wrong_sign(script, tmp_path, monkeypatch):
    policy_loss = script.policy_loss
    monkeypatch.setattr(script, "policy_loss", lambda *inputs: -policy_loss(*inputs))
    for returns in train_on_probe(script, 4, tmp_path, monkeypatch):
        assert sum(returns[-3:]) / 3 < 4 / 15


def kl_after_distillation(script, detach_peer=False):
    """Mean KL between two policies, both ways, before and after minibatch steps in which only the KL acts."""
    agents, batches = make_agents(script, 2), [make_batch(script, 32, seed) for seed in range(2)]
    batches = [batch._replace(advantages=torch.zeros(32)) for batch in batches]
    args = script.Args(ent_coef=0.0, vf_coef=0.0, detach_peer=detach_peer, device="cpu")
    optimizer = torch.optim.Adam([p for agent in agents for p in agent.parameters()], lr=1e-3)

    def kl():
        with torch.no_grad():
            policies = [Categorical(logits=agent(torch.cat([b.obs for b in batches]))[0]) for agent in agents]
        return (kl_divergence(*policies) + kl_divergence(*policies[::-1])).mean().item() / 2

    before = kl()
    for _ in range(15):
        minibatch_step(script, agents, optimizer, batches, args, torch.arange(32))
    return before, kl()


@pytest.mark.parametrize("detach_peer", [False, True])
def test_distillation_brings_policies_together(mutual, detach_peer):
    before, after = kl_after_distillation(mutual, detach_peer)
    assert before > 0.01 and after < 0.5 * before


def test_distillation_with_the_wrong_sign_drives_policies_apart(mutual, monkeypatch):
    mutual_kl = mutual.mutual_kl
    monkeypatch.setattr(mutual, "mutual_kl", lambda *logits: -mutual_kl(*logits))
    before, after = kl_after_distillation(mutual)
    assert after > 2 * before
