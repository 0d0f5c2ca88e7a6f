"""The losses by hand, and the gradients that an update makes of them."""

import importlib
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from algorithm import CPU, agents_and_batches, make_small_probes, parameters_of
from common import SCRIPTS, TINY, make_batch
from torch.distributions import Categorical, kl_divergence

# (ratio, advantage, clip_coef, loss, its derivative with respect to the ratio)
POLICY_LOSS_CASES = {
    "ppo": [
        (1.1, 2.0, 0.2, -2.2, -2.0),
        (1.5, 2.0, 0.2, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, 0.2, -1.0, -2.0),  # too low for a good action: not clipped
        (1.1, -2.0, 0.2, 2.2, 2.0),
        (0.5, -2.0, 0.2, 1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, 0.2, 3.0, 2.0),  # too high for a bad action: not clipped
        (1.15, 1.0, 0.1, -1.1, 0.0),  # clipped at 1.1, by another clip_coef
    ],
    # -(r A - |A| (r - 1)^2 / (2 eps)) and -(A - |A| (r - 1) / eps)
    "spo": [
        (1.1, 2.0, 0.2, -2.15, -1.0),
        (1.2, 2.0, 0.2, -2.2, 0.0),  # the optimum
        (1.5, 2.0, 0.2, -1.75, 3.0),
        (0.5, 2.0, 0.2, 0.25, -7.0),
        (0.8, -2.0, 0.2, 1.8, 0.0),  # the optimum
        (0.5, -2.0, 0.2, 2.25, -3.0),
        (1.5, -2.0, 0.2, 4.25, 7.0),
        (1.1, 1.0, 0.1, -1.05, 0.0),  # the optimum for another clip_coef
        (0.5, -1.0, 0.2, 1.125, -1.5),
    ],
}


def policy_loss_cases(name: str):
    return POLICY_LOSS_CASES["spo" if "spo" in name else "ppo"]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in SCRIPTS for case in policy_loss_cases(name)]
)
def test_policy_loss_by_hand(name, case):
    ratio, advantage, clip_coef, expected_loss, expected_gradient = case
    policy_loss = importlib.import_module(name).policy_loss
    ratio = torch.tensor([ratio], requires_grad=True)
    loss = policy_loss(ratio, torch.tensor([advantage]), clip_coef)
    (gradient,) = torch.autograd.grad(loss, ratio)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.item() == pytest.approx(expected_gradient, rel=1e-5, abs=1e-5)


def test_policy_loss_is_the_mean(script):
    cases = [case for case in policy_loss_cases(script.__name__) if case[2] == 0.2]
    ratios, advantages, _, losses, _ = map(torch.tensor, zip(*cases))
    loss = script.policy_loss(ratios, advantages, 0.2)
    torch.testing.assert_close(loss, losses.mean())


@pytest.mark.parametrize(
    ("new_value", "old_value", "expected_loss", "expected_gradient"),
    [
        (1.1, 1.0, 0.405, -0.9),  # 0.5 (1.1 - 2)^2, within the clipping
        (1.5, 1.0, 0.32, 0.0),  # 0.5 (1.2 - 2)^2: went too far towards the return
        (2.5, 3.0, 0.32, 0.0),  # 0.5 (2.8 - 2)^2, the same from above
        (0.5, 1.0, 1.125, -1.5),  # 0.5 (0.5 - 2)^2: went away from the return, the plain error is larger
    ],
)
def test_value_loss_by_hand(script, new_value, old_value, expected_loss, expected_gradient):
    """Twice the same row, so that a sum would be another number than the mean."""
    new_values = torch.tensor([new_value, new_value], requires_grad=True)
    old_values = torch.tensor([old_value, old_value])
    loss = script.value_loss(new_values, old_values, torch.tensor([2.0, 2.0]), 0.2)
    (gradient,) = torch.autograd.grad(loss, new_values)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.sum().item() == pytest.approx(expected_gradient, rel=1e-5, abs=1e-6)


def test_rl_loss_is_made_of_its_parts(script):
    torch.manual_seed(0)
    args = script.Args(ent_coef=0.3, vf_coef=0.7)
    logits = torch.randn(32, 15)
    new_values = torch.randn(32)
    mb = make_batch(script, 32, seed=1)
    loss, metrics = script.rl_loss(logits, new_values, mb, args)

    policy = Categorical(logits=logits)
    ratio = (policy.log_prob(mb.actions) - mb.logprobs).exp()
    expected = {
        "policy_loss": script.policy_loss(ratio, mb.advantages, args.clip_coef),
        "value_loss": script.value_loss(new_values, mb.values, mb.returns, args.clip_coef),
        "entropy": policy.entropy().mean(),
        "old_approx_kl": -ratio.log().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clipfrac": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
        "ratio_deviation": (ratio - 1).abs().mean(),
    }
    torch.testing.assert_close(metrics, expected)
    total = expected["policy_loss"] + 0.7 * expected["value_loss"] - 0.3 * expected["entropy"]
    torch.testing.assert_close(loss, total)


def test_mutual_kl_is_that_of_torch_distributions(mutual):
    torch.manual_seed(0)
    peer_logits, logits = 3 * torch.randn(2, 64, 15)
    expected = kl_divergence(Categorical(logits=peer_logits), Categorical(logits=logits)).mean()
    torch.testing.assert_close(mutual.mutual_kl(peer_logits, logits), expected)


def test_mutual_kl_of_extreme_policies(mutual):
    """exp(-160) is 0 in float32, so log(p) or log(p + 1e-8) would be wrong here."""
    peer = torch.tensor([[80.0, -80.0]], requires_grad=True)
    logits = torch.tensor([[-80.0, 80.0]], requires_grad=True)
    kl = mutual.mutual_kl(peer, logits)
    kl.backward()
    assert kl.item() == 160.0
    assert logits.grad.tolist() == [[-1.0, 1.0]]
    assert peer.grad.isfinite().all()


# Updates.


def one_step_args(script, size: int = 16, **settings):
    """Of an update with one step, on the whole batch, with a gradient that no bound shortens."""
    options = {"num_envs": 1, "num_steps": size, "num_minibatches": 1, "update_epochs": 1}
    options |= {"max_grad_norm": 1e9, "device": "cpu"}
    return script.Args(**options | settings)


def gradient_of(agent) -> torch.Tensor:
    """Of all weights, one after the other."""
    return torch.cat([weight.grad.flatten() for weight in agent.parameters()])


def update_without_moving(script, args, agents, batches):
    """Returns for each step the gradients of the agents, and for each agent its metrics."""
    steps = []
    optimizer = torch.optim.SGD(parameters_of(agents), lr=0.0)
    optimizer.register_step_pre_hook(lambda *inputs: steps.append(list(map(gradient_of, agents))))
    metrics = script.update(script.compute_loss, agents, optimizer, batches, args)
    return steps, list(map(dict, metrics))


def mean_kl_of_peers(args, agents, i: int, obs):
    """KL(pi_j || pi_i), of all peers j of agent i, by torch.distributions."""
    logits, _ = agents[i](obs)
    kls = []
    for peer in agents[:i] + agents[i + 1 :]:
        peer_logits, _ = peer(obs)
        if args.detach_peer:
            peer_logits = peer_logits.detach()
        kl = kl_divergence(Categorical(logits=peer_logits), Categorical(logits=logits))
        kls.append(kl.mean())
    return sum(kls) / len(kls)


def expected_loss(script, args, agents, batches):
    """The mean of L_1 ... L_K, each network run on each minibatch by itself, and the metrics."""
    losses = []
    all_metrics = []
    for i, mb in enumerate(batches):
        # Over the whole minibatch, of which the script takes parts.
        advantages = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)
        logits, values = agents[i](mb.obs)
        loss, metrics = script.rl_loss(logits, values, mb._replace(advantages=advantages), args)
        if len(agents) > 1:
            metrics["mutual_kl"] = mean_kl_of_peers(args, agents, i, mb.obs)
            loss = loss + args.distill_coef * metrics["mutual_kl"]
        losses.append(loss)
        all_metrics.append(metrics)
    return sum(losses) / len(losses), all_metrics


def check_update(script, args, agents, batches):
    """Gradients and metrics are those of the loss."""
    loss, expected_metrics = expected_loss(script, args, agents, batches)
    expected = torch.autograd.grad(loss, parameters_of(agents))
    (gradients,), metrics = update_without_moving(script, args, agents, batches)
    expected = torch.cat([gradient.flatten() for gradient in expected])
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-3, atol=1e-5)
    for gradient, of_agent in zip(gradients, expected_metrics):
        of_agent["grad_norm"] = gradient.norm()
    torch.testing.assert_close(metrics, expected_metrics, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_the_loss(script):
    """For the mutual scripts of (L_1 + L_2) / 2, with gradient of both KL terms for both networks."""
    check_update(script, one_step_args(script), *agents_and_batches(script))


@pytest.mark.parametrize("num_agents", [2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"distill_coef": 0.3}, {"distill_coef": 0.0}, {"distill_coef": 5.0, "detach_peer": True}]
)
def test_gradients_with_other_distillation(mutual, settings, num_agents):
    """Of K agents L_i has the mean KL over the peers, and the loss is the mean of the L_i."""
    args = one_step_args(mutual, num_agents=num_agents, **settings)
    check_update(mutual, args, *agents_and_batches(mutual, num_agents))


@pytest.mark.parametrize(("size", "parts"), [(512, [256, 256]), (600, [256, 256, 88])])
def test_parts_of_a_minibatch_add_up(script, size, parts, monkeypatch):
    """On a CPU a minibatch is computed in parts of 256 rows, of which the last may be smaller: gradient and
    metrics are those of the whole."""
    compute_loss = script.compute_loss
    sizes = []

    def compute_loss_of_part(agents, mbs, args):
        sizes.append(len(mbs[0].obs))
        return compute_loss(agents, mbs, args)

    monkeypatch.setattr(script, "compute_loss", compute_loss_of_part)
    check_update(script, one_step_args(script, size), *agents_and_batches(script, size=size))
    assert sizes == parts


def test_gradient_norm_is_clipped_for_each_agent_alone(script):
    """A bound between two agents' norms shortens the longer gradient and leaves the other as it is. The
    second step's gradients are not the sum of two."""
    agents, batches = agents_and_batches(script)
    batches[0] = batches[0]._replace(returns=100 * batches[0].returns.abs())
    args = one_step_args(script, update_epochs=2)

    def norms(bound: float):
        """Of the agents in each step."""
        steps, _ = update_without_moving(script, replace(args, max_grad_norm=bound), agents, batches)
        return [[gradient.norm().item() for gradient in gradients] for gradients in steps]

    before, again = norms(1e9)
    assert again == pytest.approx(before, rel=1e-4)
    assert len(before) == 1 or before[0] > 2 * before[1]
    bound = before[0] / 1.5
    for after in norms(bound):
        assert after == pytest.approx([bound, *before[1:]], rel=1e-4)
    bound = min(before) / 10
    for after in norms(bound):
        assert after == pytest.approx([bound] * len(agents), rel=1e-4)


def test_adam_is_that_of_the_paper(script, monkeypatch):
    """With an epsilon of 1e-5, beside gradients of that size. It has every weight of every agent."""
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    agents, optimizer, _ = script.set_up(script.Args(**TINY | {"learning_rate": 0.25}), CPU)
    weights = parameters_of(agents)
    expected = deepcopy(weights)
    reference = torch.optim.Adam(expected, lr=0.25, betas=(0.9, 0.999), eps=1e-5)
    for gradient in (1e-5, 3e-5, -2e-5, 0.0):
        for weight in weights + expected:
            weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def test_update_visits_every_row_once_an_epoch(script):
    """All agents the same rows, in minibatches of which each has normalised advantages, and a step on each.
    The metrics are means over the minibatches. The batches stay as they are."""
    args = script.Args(num_envs=4, num_steps=10, num_minibatches=5, update_epochs=3, device="cpu")
    weights = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    numbers = torch.arange(40)
    batches = []
    for seed in range(2):
        batches.append(make_batch(script, 40, seed)._replace(obs=numbers, actions=numbers + seed))
    originals = deepcopy(batches)
    visited = []

    def compute_loss(agents, mbs, args):
        rows = mbs[0].obs
        visited.append(rows)
        for seed, mb in enumerate(mbs):
            assert torch.equal(mb.obs, rows)
            assert torch.equal(mb.actions, rows + seed)
            assert torch.equal(mb.returns, originals[seed].returns[rows])
            advantages = originals[seed].advantages[rows]
            expected = (advantages - advantages.mean()) / advantages.std()
            torch.testing.assert_close(mb.advantages, expected)
        number = torch.tensor(float(len(visited)))
        loss = sum(agent.weight.sum() for agent in agents)
        return loss, [{"first": number, "second": -number}, {"first": 2 * number}]

    optimizer = torch.optim.SGD(parameters_of(weights), lr=1.0)
    before = torch.cat(parameters_of(weights)).detach()
    metrics = script.update(compute_loss, weights, optimizer, batches, args)
    assert [len(rows) for rows in visited] == [8] * 15
    epochs = [torch.cat(visited[i : i + 5]).tolist() for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(40)]}) == 4  # shuffled, and anew each time
    torch.testing.assert_close(torch.cat(parameters_of(weights)).detach(), before - 15 * 0.5)
    norm = pytest.approx(1.0)  # before it is scaled down
    assert metrics[0] == {"first": pytest.approx(8.0), "second": pytest.approx(-8.0), "grad_norm": norm}
    assert metrics[1] == {"first": pytest.approx(16.0), "grad_norm": norm}
