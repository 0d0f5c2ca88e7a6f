"""Whole trainings with a known answer, and what distillation alone does. Fast for PPO and MDPO alone."""

import importlib

import pytest
import torch
from algorithm import make_small_probes, parameters_of
from common import MUTUAL, SCRIPTS, Probe, agent_folders, make_agents, make_batch, read_curves, run_folder
from torch.distributions import Categorical, kl_divergence

FAST = ["ppo_procgen", "mdpo_procgen"]


def learners(names: list[str]):
    """Parameters `name`, of which all but the fast ones are slow."""
    params = []
    for name in names:
        marks = [] if name in FAST else [pytest.mark.slow]
        params.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("name", params)


def train_on_probe(script, num_iterations, tmp_path, monkeypatch) -> list[list[float]]:
    """The training return in each iteration, a list for each agent. clip_coef is wide so that 10 updates are
    enough: with ratios within 1.2 a probability of 1/15 would need 15 to come near 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    settings = {
        "total_timesteps": 128 * num_iterations,
        "num_envs": 8,
        "num_steps": 16,
        "num_minibatches": 8,
        "channels": (4, 4, 4),
        "clip_coef": 0.8,
        "learning_rate": 3e-3,
        "eval_interval": 0,
        "bf16": False,
        "device": "cpu",
    }
    script.main(script.Args(**settings))
    folders = agent_folders(script.__name__, run_folder(tmp_path))
    return [list(read_curves(folder)["charts/episodic_return"].values()) for folder in folders]


# The gradient at ratio 1, where every update begins, is that of -ratio * advantage, so a wrong sign of the
# advantage, of the ratio or of the loss turns it round, and the return goes to 0, as the second test shows.
# Rewards or observations one step off make the right action a matter of chance, since the side changes every
# step, and a policy that cannot see gets 2 at best: the first test asks for more.
@learners(SCRIPTS)
def test_learns_to_look(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    for returns in train_on_probe(script, 12, tmp_path, monkeypatch):
        assert returns[0] < 1.0  # random play gets 4/15
        assert max(returns[-4:]) > 0.75 * Probe.best_return


@learners(SCRIPTS)
def test_unlearns_with_the_wrong_sign(name, tmp_path, monkeypatch):
    script = importlib.import_module(name)
    policy_loss = script.policy_loss
    monkeypatch.setattr(script, "policy_loss", lambda *inputs: -policy_loss(*inputs))
    for returns in train_on_probe(script, 4, tmp_path, monkeypatch):
        assert sum(returns[-3:]) / 3 < 4 / 15


def mean_kl(agents, obs) -> float:
    """Over all ordered pairs of agents."""
    with torch.no_grad():
        policies = [Categorical(logits=agent(obs)[0]) for agent in agents]
    kls = [kl_divergence(one, other).mean() for one in policies for other in policies if one is not other]
    return (sum(kls) / len(kls)).item()


def kl_after_distillation(script, num_agents=2, detach_peer=False):
    """Mean KL between policies before and after an update in which only the KL acts."""
    agents = make_agents(script, num_agents)
    batches = []
    for seed in range(num_agents):
        batches.append(make_batch(script, 16, seed)._replace(advantages=torch.zeros(16)))
    settings = {"num_envs": 1, "num_steps": 16, "num_minibatches": 1, "update_epochs": 15, "device": "cpu"}
    settings |= {"ent_coef": 0.0, "vf_coef": 0.0}
    args = script.Args(**settings, detach_peer=detach_peer, num_agents=num_agents)
    optimizer = torch.optim.Adam(parameters_of(agents), lr=1e-3)
    obs = torch.cat([batch.obs for batch in batches])
    before = mean_kl(agents, obs)
    script.update(script.compute_loss, agents, optimizer, batches, args)
    return before, mean_kl(agents, obs)


@pytest.mark.parametrize(("num_agents", "detach_peer"), [(2, False), (2, True), (3, False)])
@learners(MUTUAL)
def test_distillation_brings_policies_together(name, num_agents, detach_peer):
    script = importlib.import_module(name)
    before, after = kl_after_distillation(script, num_agents, detach_peer)
    assert before > 0.01
    assert after < 0.5 * before


@learners(MUTUAL)
def test_distillation_with_the_wrong_sign_drives_policies_apart(name, monkeypatch):
    script = importlib.import_module(name)
    mutual_kl = script.mutual_kl
    monkeypatch.setattr(script, "mutual_kl", lambda *logits: -mutual_kl(*logits))
    before, after = kl_after_distillation(script)
    assert after > 2 * before
