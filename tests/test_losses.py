"""The losses by hand, and the gradients that a minibatch step makes of them."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from common import MUTUAL, SCRIPTS, make_agents, make_batch, make_probes, make_runner, minibatch_step
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
    ],
}


def policy_loss_cases(name: str):
    return POLICY_LOSS_CASES["spo" if "spo" in name else "ppo"]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in SCRIPTS for case in policy_loss_cases(name)]
)
def test_policy_loss_by_hand(name, case):
    ratio, advantage, clip_coef, expected_loss, expected_gradient = case
    ratio = torch.tensor([ratio], requires_grad=True)
    loss = importlib.import_module(name).policy_loss(ratio, torch.tensor([advantage]), clip_coef)
    (gradient,) = torch.autograd.grad(loss, ratio)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.item() == pytest.approx(expected_gradient, rel=1e-5, abs=1e-5)


def test_policy_loss_is_the_mean(script):
    cases = [case for case in policy_loss_cases(script.__name__) if case[2] == 0.2]
    ratios, advantages, _, losses, _ = map(torch.tensor, zip(*cases))
    loss = script.policy_loss(ratios, advantages, 0.2)
    assert loss.shape == () and loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)


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
    new_values = torch.tensor([new_value, new_value], requires_grad=True)
    loss = script.value_loss(new_values, torch.tensor([old_value] * 2), torch.tensor([2.0] * 2), 0.2)
    (gradient,) = torch.autograd.grad(loss, new_values)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.sum().item() == pytest.approx(expected_gradient, rel=1e-5, abs=1e-6)


def test_rl_loss_is_made_of_its_parts(script):
    torch.manual_seed(0)
    args = script.Args(ent_coef=0.3, vf_coef=0.7)
    logits, new_values, mb = torch.randn(32, 15), torch.randn(32), make_batch(script, 32, seed=1)
    advantages = torch.randn(32)
    mb = mb._replace(advantages=advantages)
    loss, metrics = script.rl_loss(logits, new_values, mb, args)
    metrics = dict(zip(script.METRICS, metrics))

    policy = Categorical(logits=logits)
    ratio = (policy.log_prob(mb.actions) - mb.logprobs).exp()
    expected = {
        "policy_loss": script.policy_loss(ratio, advantages, args.clip_coef),
        "value_loss": script.value_loss(new_values, mb.values, mb.returns, args.clip_coef),
        "entropy": policy.entropy().mean(),
        "old_approx_kl": -ratio.log().mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clipfrac": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
        "ratio_deviation": (ratio - 1).abs().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(
        loss, expected["policy_loss"] + 0.7 * expected["value_loss"] - 0.3 * expected["entropy"]
    )


def test_the_ratio_is_one_right_after_a_rollout(script, tmp_path, monkeypatch):
    """Actions, observations and log-probabilities keep their places from the rollout into the minibatch."""
    monkeypatch.setattr(script, "make_envs", make_probes)
    args = script.Args(num_envs=4, num_steps=8, num_minibatches=2, total_timesteps=32, device="cpu")
    runner = make_runner(script, args, tmp_path)
    runner.agent.actor.weight.data *= 300
    script.rollout(runner.groups)
    runner.finish_rollout()
    runner.close()
    logits, values = runner.agent(runner.batch.obs)
    _, metrics = script.rl_loss(logits, values, runner.batch, args)
    metrics = dict(zip(script.METRICS, metrics))
    assert len(runner.batch.obs) == args.batch_size
    assert metrics["ratio_deviation"] < 1e-5 and metrics["clipfrac"] == 0
    torch.testing.assert_close(values, runner.batch.values)


def test_mutual_kl_is_that_of_torch_distributions(mutual):
    torch.manual_seed(0)
    peer_logits, logits = 3 * torch.randn(2, 64, 15)
    expected = kl_divergence(Categorical(logits=peer_logits), Categorical(logits=logits)).mean()
    torch.testing.assert_close(mutual.mutual_kl(peer_logits, logits), expected)


def test_mutual_kl_direction(mutual):
    peer, self = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75); the other direction is 0.25 ln 0.5 + 0.75 ln 1.5 = 0.1308
    assert mutual.mutual_kl(peer, self).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)
    assert mutual.mutual_kl(self, peer).item() == pytest.approx(0.130812, rel=1e-5)


def test_mutual_kl_of_equal_policies_is_zero(mutual):
    logits = torch.randn(8, 15)
    assert mutual.mutual_kl(logits, logits + 5.0).item() == pytest.approx(0, abs=1e-6)


def test_mutual_kl_of_extreme_policies(mutual):
    """exp(-160) is 0 in float32, so log(p) or log(p + 1e-8) would be wrong here."""
    peer = torch.tensor([[80.0, -80.0]], requires_grad=True)
    logits = torch.tensor([[-80.0, 80.0]], requires_grad=True)
    kl = mutual.mutual_kl(peer, logits)
    kl.backward()
    assert kl.item() == 160.0
    assert logits.grad.tolist() == [[-1.0, 1.0]] and peer.grad.isfinite().all()

    torch.manual_seed(0)
    peer, logits = 80 * torch.randn(2, 64, 15)
    exact = mutual.mutual_kl(peer.double(), logits.double()).item()
    assert mutual.mutual_kl(peer, logits).item() == pytest.approx(exact, rel=1e-6)


SIZE = 16
MB_INDS = torch.tensor([9, 2, 15, 4, 0, 11])


def gradients(agents):
    return [[parameter.grad.clone() for parameter in agent.parameters()] for agent in agents]


def norms(agents):
    return [torch.cat([grad.flatten() for grad in grads]).norm().item() for grads in gradients(agents)]


def step_without_moving(script, args, agents, batches, **options):
    """A minibatch step that leaves the gradients, and the weights as they were. Returns the metrics' rows."""
    optimizer = torch.optim.SGD([p for agent in agents for p in agent.parameters()], lr=0.0)
    rows = minibatch_step(script, agents, optimizer, batches, args, MB_INDS, **options)
    return [dict(zip(script.METRICS, row.tolist(), strict=True)) for row in rows]


def agents_and_batches(script):
    num = 2 if script.__name__ in MUTUAL else 1
    return make_agents(script, num), [make_batch(script, SIZE, seed) for seed in range(num)]


def expected_loss(script, args, agents, batches):
    """Section 2 of the specification, each network run on each minibatch by itself."""
    mbs = [script.Batch(*(column[MB_INDS] for column in batch)) for batch in batches]
    for mb in mbs:  # over the whole minibatch, of which the script takes parts
        mb.advantages[:] = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)
    losses = []
    for i, mb in enumerate(mbs):
        logits, values = agents[i](mb.obs)
        loss, _ = script.rl_loss(logits, values, mb, args)
        if len(agents) == 2:
            peer_logits, _ = agents[1 - i](mb.obs)
            peer_logits = peer_logits.detach() if args.detach_peer else peer_logits
            kl = kl_divergence(Categorical(logits=peer_logits), Categorical(logits=logits)).mean()
            loss = loss + args.distill_coef * kl
        losses.append(loss)
    return sum(losses) / len(losses)


def assert_gradients_are_those_of_the_loss(script, args):
    agents, batches = agents_and_batches(script)
    loss = expected_loss(script, args, agents, batches)
    parameters = [parameter for agent in agents for parameter in agent.parameters()]
    expected = torch.autograd.grad(loss, parameters)
    step_without_moving(script, args, agents, batches)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_the_loss(script):
    """For the mutual scripts of (L_1 + L_2) / 2, with gradient of both KL terms for both networks."""
    assert_gradients_are_those_of_the_loss(script, script.Args(device="cpu", max_grad_norm=1e9))


@pytest.mark.parametrize(
    "settings", [{"distill_coef": 0.3}, {"distill_coef": 0.0}, {"detach_peer": True, "distill_coef": 5.0}]
)
def test_gradients_with_other_distillation(mutual, settings):
    args = mutual.Args(device="cpu", max_grad_norm=1e9, **settings)
    assert_gradients_are_those_of_the_loss(mutual, args)


@pytest.mark.parametrize("detach_peer", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_who_gets_gradient_of_one_kl(mutual, monkeypatch, detach_peer, index):
    """Only the KL of agent `index` is left in the loss: the peer learns from it unless it is detached."""
    kl_of = mutual.mutual_kl
    kls = []

    def only_one(peer_logits, logits):
        kls.append(kl_of(peer_logits, logits))
        return kls[-1] if len(kls) - 1 == index else 0 * kls[-1]

    monkeypatch.setattr(mutual, "mutual_kl", only_one)
    args = mutual.Args(device="cpu", ent_coef=0.0, vf_coef=0.0, detach_peer=detach_peer)
    agents, batches = agents_and_batches(mutual)
    batches = [batch._replace(advantages=torch.zeros(SIZE)) for batch in batches]
    step_without_moving(mutual, args, agents, batches, part_size=SIZE)
    assert len(kls) == 2
    own, peers = norms(agents)[index], norms(agents)[1 - index]
    assert own > 1e-4
    assert peers == 0 if detach_peer else peers > 1e-4


def test_gradient_norm_is_clipped_for_each_agent_alone(script):
    """A bound between two agents' norms shortens the longer gradient and leaves the other as it is."""
    agents, batches = agents_and_batches(script)
    batches[0] = batches[0]._replace(returns=100 * batches[0].returns)
    args = script.Args(device="cpu", max_grad_norm=1e9)
    before = [row["grad_norm"] for row in step_without_moving(script, args, agents, batches)]
    assert norms(agents) == pytest.approx(before, rel=1e-5)
    assert len(before) == 1 or before[0] > 2 * before[1]

    bound = before[0] / 1.5
    reported = [
        row["grad_norm"]
        for row in step_without_moving(script, replace(args, max_grad_norm=bound), agents, batches)
    ]
    assert reported == pytest.approx(before, rel=1e-5)  # the norms before clipping
    assert norms(agents) == pytest.approx([bound, *before[1:]], rel=1e-4)

    bound = min(before) / 10
    step_without_moving(script, replace(args, max_grad_norm=bound), agents, batches)
    assert norms(agents) == pytest.approx([bound] * len(agents), rel=1e-4)


def test_parts_add_up(script):
    """Metrics and gradients of a minibatch do not depend on the size of its parts."""
    agents, batches = agents_and_batches(script)
    results = []
    for part_size in (6, 4, 3, 1):
        args = script.Args(device="cpu", max_grad_norm=1e9)
        rows = step_without_moving(script, args, agents, batches, part_size=part_size)
        results.append((rows, gradients(agents)))
    for rows, grads in results[1:]:
        torch.testing.assert_close((rows, grads), results[0], rtol=1e-3, atol=1e-5)


def test_minibatch_is_the_rows_of_the_index(script, monkeypatch):
    """For both agents the same rows, in the same order."""
    agents, batches = agents_and_batches(script)
    batches = [batch._replace(returns=torch.arange(SIZE) + 100.0 * i) for i, batch in enumerate(batches)]
    rows, rl_loss = [], script.rl_loss

    def recording(logits, new_values, mb, args):
        rows.append(mb.returns)
        return rl_loss(logits, new_values, mb, args)

    monkeypatch.setattr(script, "rl_loss", recording)
    step_without_moving(script, script.Args(device="cpu"), agents, batches, part_size=SIZE)
    assert [each.tolist() for each in rows] == [(MB_INDS + 100.0 * i).tolist() for i in range(len(agents))]


def test_optimizer_moves_every_weight(script):
    """And old gradients do not linger: a second step's gradients are not the sum of two."""
    agents, batches = agents_and_batches(script)
    args = script.Args(device="cpu", max_grad_norm=1e9)
    step_without_moving(script, args, agents, batches)
    once = norms(agents)
    step_without_moving(script, args, agents, batches)
    assert norms(agents) == pytest.approx(once, rel=1e-5)

    before = [parameter.detach().clone() for agent in agents for parameter in agent.parameters()]
    parameters = [parameter for agent in agents for parameter in agent.parameters()]
    minibatch_step(script, agents, torch.optim.Adam(parameters, lr=1e-3), batches, args, MB_INDS)
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def test_update_visits_every_row_once_an_epoch(script):
    args = script.Args(num_envs=4, num_steps=10, num_minibatches=5, update_epochs=3, device="cpu")
    calls = []

    def step(mb_inds):
        calls.append(mb_inds)
        return torch.full((2, 3), float(len(calls)))

    metrics = script.update(step, args, torch.device("cpu"))
    assert [len(mb_inds) for mb_inds in calls] == [8] * 15
    epochs = [torch.cat(calls[i : i + 5]).tolist() for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(40)]}) == 4  # shuffled, and anew each time
    assert metrics.shape == (15, 2, 3) and (metrics.mean(0) == 8).all()  # the means of 1 to 15
