"""The losses by hand, and the gradients that an update makes of them."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from algorithm import CPU, make_runner, make_small_probes, parameters_of
from common import MUTUAL, SCRIPTS, TINY, make_agents, make_batch
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
    logits = torch.randn(32, 15)
    new_values = torch.randn(32)
    advantages = torch.randn(32)
    mb = make_batch(script, 32, seed=1)._replace(advantages=advantages)
    loss, metrics = script.rl_loss(logits, new_values, mb, args)

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
    torch.testing.assert_close(metrics, expected)
    total = expected["policy_loss"] + 0.7 * expected["value_loss"] - 0.3 * expected["entropy"]
    torch.testing.assert_close(loss, total)


def test_the_ratio_is_one_right_after_a_rollout(script, monkeypatch):
    """Actions, observations and log-probabilities keep their places from the rollout into the minibatch."""
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    settings = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 32}
    args = script.Args(device="cpu", **settings)
    runner = make_runner(script, args)
    torch.manual_seed(0)
    agent = script.Agent(channels=(4, 4, 4), obs_shape=runner.obs_shape)
    agent.actor.weight.data *= 300
    script.rollout([lambda obs: script.act(agent, obs)], [runner], args)
    runner.finish_rollout()
    batch = runner.batch.rows(torch.randperm(args.batch_size))
    logits, values = agent(batch.obs)
    _, metrics = script.rl_loss(logits, values, batch, args)
    assert metrics["ratio_deviation"] < 1e-5
    assert metrics["clipfrac"] == 0
    torch.testing.assert_close(values, batch.values, rtol=1e-5, atol=1e-6)


def test_mutual_kl_is_that_of_torch_distributions(mutual):
    torch.manual_seed(0)
    peer_logits, logits = 3 * torch.randn(2, 64, 15)
    expected = kl_divergence(Categorical(logits=peer_logits), Categorical(logits=logits)).mean()
    torch.testing.assert_close(mutual.mutual_kl(peer_logits, logits), expected)


def test_mutual_kl_direction(mutual):
    peer = torch.tensor([[0.5, 0.5]]).log()
    self = torch.tensor([[0.25, 0.75]]).log()
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
    assert logits.grad.tolist() == [[-1.0, 1.0]]
    assert peer.grad.isfinite().all()

    torch.manual_seed(0)
    peer, logits = 80 * torch.randn(2, 64, 15)
    exact = mutual.mutual_kl(peer.double(), logits.double()).item()
    assert mutual.mutual_kl(peer, logits).item() == pytest.approx(exact, rel=1e-5)


SIZE = 16
UNCLIPPED = 1e9  # a bound that no gradient reaches


def one_step_args(script, size: int = SIZE, **settings):
    """Of an update with one step, on the whole batch."""
    options = {"num_envs": 1, "num_steps": size, "num_minibatches": 1, "update_epochs": 1, "device": "cpu"}
    return script.Args(**options | {"max_grad_norm": UNCLIPPED} | settings)


def gradients(agents):
    return [[weight.grad.clone() for weight in agent.parameters()] for agent in agents]


def norms(agents) -> list[float]:
    return [torch.cat([grad.flatten() for grad in grads]).norm().item() for grads in gradients(agents)]


def update_without_moving(script, args, agents, batches) -> dict[str, list[float]]:
    """Leaves the gradients of the last step, and the weights as they were. Returns for each metric the
    numbers of the agents."""
    optimizer = torch.optim.SGD(parameters_of(agents), lr=0.0)
    metrics = script.update(script.compute_loss, agents, optimizer, batches, args)
    assert len(metrics) == len(agents)
    return {name: [means[name].item() for means in metrics] for name in metrics[0]}


def agents_and_batches(script, num: int = 0):
    """As many as the script has by default, unless told."""
    if num == 0:
        num = 2 if script.__name__ in MUTUAL else 1
    return make_agents(script, num), [make_batch(script, SIZE, seed) for seed in range(num)]


def mean_kl_of_peers(args, agents, i: int, obs):
    """KL(pi_j || pi_i), of all peers j of agent i, by torch.distributions."""
    logits, _ = agents[i](obs)
    kls = []
    for j, peer in enumerate(agents):
        if j == i:
            continue
        peer_logits, _ = peer(obs)
        if args.detach_peer:
            peer_logits = peer_logits.detach()
        kl = kl_divergence(Categorical(logits=peer_logits), Categorical(logits=logits))
        kls.append(kl.mean())
    return sum(kls) / len(kls)


def expected_loss(script, args, agents, batches):
    """The mean of L_1 ... L_K, each network run on each minibatch by itself, and the distillation terms."""
    losses = []
    kls = []
    for i, mb in enumerate(batches):
        # Over the whole minibatch, of which the script takes parts.
        advantages = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)
        logits, values = agents[i](mb.obs)
        loss, _ = script.rl_loss(logits, values, mb._replace(advantages=advantages), args)
        if len(agents) > 1:
            kls.append(mean_kl_of_peers(args, agents, i, mb.obs))
            loss = loss + args.distill_coef * kls[i]
        losses.append(loss)
    return sum(losses) / len(losses), kls


def assert_gradients_are_those_of_the_loss(script, args, agents, batches):
    loss, kls = expected_loss(script, args, agents, batches)
    expected = torch.autograd.grad(loss, parameters_of(agents))
    metrics = update_without_moving(script, args, agents, batches)
    for weight, gradient in zip(parameters_of(agents), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)
    if kls:
        assert metrics["mutual_kl"] == pytest.approx([kl.item() for kl in kls], rel=1e-4)


def test_gradients_are_those_of_the_loss(script):
    """For the mutual scripts of (L_1 + L_2) / 2, with gradient of both KL terms for both networks."""
    assert_gradients_are_those_of_the_loss(script, one_step_args(script), *agents_and_batches(script))


@pytest.mark.parametrize("num_agents", [2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"distill_coef": 0.3}, {"distill_coef": 0.0}, {"distill_coef": 5.0, "detach_peer": True}]
)
def test_gradients_with_other_distillation(mutual, settings, num_agents):
    """Of K agents L_i has the mean KL over the peers, and the loss is the mean of the L_i."""
    args = one_step_args(mutual, num_agents=num_agents, **settings)
    assert_gradients_are_those_of_the_loss(mutual, args, *agents_and_batches(mutual, num_agents))


@pytest.mark.parametrize("size", [512, 600])
def test_parts_of_a_minibatch_add_up(script, size, monkeypatch):
    """On a CPU a minibatch is computed in parts of 256 rows, of which the last may be smaller: gradient and
    metrics are those of the whole."""
    compute_loss = script.compute_loss
    sizes = []

    def compute_loss_of_part(agents, mbs, args):
        sizes.append(len(mbs[0].obs))
        return compute_loss(agents, mbs, args)

    monkeypatch.setattr(script, "compute_loss", compute_loss_of_part)
    torch.manual_seed(0)
    num = 2 if script.__name__ in MUTUAL else 1
    agents = [script.Agent(channels=(4, 4, 4), obs_shape=(8, 8, 3)) for _ in range(num)]
    for agent in agents:
        agent.actor.weight.data *= 300
    batches = []
    for seed in range(num):
        batch = make_batch(script, size, seed)
        batches.append(batch._replace(obs=batch.obs[:, :8, :8].contiguous()))
    args = one_step_args(script, size)
    assert_gradients_are_those_of_the_loss(script, args, agents, batches)
    sizes.clear()
    reported = update_without_moving(script, args, agents, batches)
    assert sizes == [256, 256, 88][: len(sizes)]
    assert sum(sizes) == size
    normalised = []
    for batch in batches:
        advantages = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
        normalised.append(batch._replace(advantages=advantages))
    _, metrics = script.compute_loss(agents, normalised, args)
    for name in metrics[0]:
        expected = [whole[name].item() for whole in metrics]
        assert reported[name] == pytest.approx(expected, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("detach_peer", [False, True])
@pytest.mark.parametrize("num_agents", [2, 3])
def test_who_gets_gradient_of_one_kl(mutual, detach_peer, num_agents):
    """Every agent learns from the distillation term of each, unless the peers are detached."""
    args = mutual.Args(device="cpu", detach_peer=detach_peer, num_agents=num_agents)
    agents, batches = agents_and_batches(mutual, num_agents)
    _, metrics = mutual.compute_loss(agents, batches, args)
    for i in range(num_agents):
        for agent in agents:
            agent.zero_grad(set_to_none=False)
            for weight in agent.parameters():
                weight.grad = torch.zeros_like(weight)
        metrics[i]["mutual_kl"].backward(retain_graph=True)
        for j, norm in enumerate(norms(agents)):
            learns = i == j or not detach_peer
            assert norm > 1e-4 if learns else norm == 0


def test_a_permutation_of_three_agents_permutes_the_result(mutual):
    order = [2, 0, 1]
    args = one_step_args(mutual, num_agents=3)
    agents, batches = agents_and_batches(mutual, 3)
    metrics = update_without_moving(mutual, args, agents, batches)
    expected_metrics = {name: [values[i] for i in order] for name, values in metrics.items()}
    expected_gradients = [gradients(agents)[i] for i in order]
    assert len(set(metrics["mutual_kl"])) == 3

    agents = [agents[i] for i in order]
    batches = [batches[i] for i in order]
    permuted = update_without_moving(mutual, args, agents, batches)
    torch.testing.assert_close(permuted, expected_metrics, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients(agents), expected_gradients, rtol=1e-3, atol=1e-5)


def test_gradient_norm_is_clipped_for_each_agent_alone(script):
    """A bound between two agents' norms shortens the longer gradient and leaves the other as it is."""
    agents, batches = agents_and_batches(script)
    batches[0] = batches[0]._replace(returns=100 * batches[0].returns.abs())
    args = one_step_args(script)
    update_without_moving(script, args, agents, batches)
    before = norms(agents)
    assert len(before) == 1 or before[0] > 2 * before[1]

    bound = before[0] / 1.5
    update_without_moving(script, replace(args, max_grad_norm=bound), agents, batches)
    assert norms(agents) == pytest.approx([bound, *before[1:]], rel=1e-4)

    bound = min(before) / 10
    update_without_moving(script, replace(args, max_grad_norm=bound), agents, batches)
    assert norms(agents) == pytest.approx([bound] * len(agents), rel=1e-4)


def test_the_optimizer_steps_along_the_clipped_gradient(script):
    """Plain gradient descent of rate 1 moves each agent as far as its gradient is long."""
    agents, batches = agents_and_batches(script)
    before = [weight.detach().clone() for weight in parameters_of(agents)]
    optimizer = torch.optim.SGD(parameters_of(agents), lr=1.0)
    args = one_step_args(script, max_grad_norm=0.01)
    script.update(script.compute_loss, agents, optimizer, batches, args)
    moves = [after - old for after, old in zip(parameters_of(agents), before)]
    distance = sum((move**2).sum() for move in moves).sqrt().item()
    assert distance == pytest.approx(0.01 * len(agents) ** 0.5, rel=1e-3)


def test_an_update_changes_no_batch(script):
    """Advantages are normalised in each minibatch, not in the batch: the next epoch would do it again."""
    agents, batches = agents_and_batches(script)
    before = [script.Batch(*(column.clone() for column in batch)) for batch in batches]
    update_without_moving(script, one_step_args(script, num_minibatches=2), agents, batches)
    for batch, old in zip(batches, before):
        assert all(torch.equal(*columns) for columns in zip(batch, old))


def test_every_weight_moves(script):
    """And old gradients do not linger: those of a second step are not the sum of two."""
    agents, batches = agents_and_batches(script)
    args = one_step_args(script)
    update_without_moving(script, args, agents, batches)
    once = norms(agents)
    update_without_moving(script, replace(args, update_epochs=2), agents, batches)
    assert norms(agents) == pytest.approx(once, rel=1e-4)

    before = [weight.detach().clone() for weight in parameters_of(agents)]
    optimizer = torch.optim.Adam(parameters_of(agents), lr=1e-3)
    script.update(script.compute_loss, agents, optimizer, batches, args)
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters_of(agents), strict=True))


def test_adam_is_that_of_the_paper(script, monkeypatch):
    """By hand: betas of 0.9 and 0.999, and an epsilon of 1e-5, beside gradients of that size. It has every
    weight of every agent."""
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    args = script.Args(**TINY | {"learning_rate": 0.25})
    agents, optimizer, _ = script.set_up(args, CPU)
    before = [weight.detach().clone() for weight in parameters_of(agents)]
    expected = 0.0
    mean = 0.0
    mean_square = 0.0
    for step, gradient in enumerate([1e-5, 3e-5, -2e-5, 0.0], 1):
        mean = 0.9 * mean + 0.1 * gradient
        mean_square = 0.999 * mean_square + 0.001 * gradient**2
        deviation = math.sqrt(mean_square / (1 - 0.999**step))
        expected -= 0.25 * mean / (1 - 0.9**step) / (deviation + 1e-5)
        for weight in parameters_of(agents):
            weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        for weight, old in zip(parameters_of(agents), before):
            torch.testing.assert_close(weight, old + expected, rtol=1e-4, atol=1e-6)


def test_update_visits_every_row_once_an_epoch(script):
    """All agents the same rows, in minibatches of which each has normalised advantages, and a step on each.
    The metrics are means over the minibatches."""
    args = script.Args(num_envs=4, num_steps=10, num_minibatches=5, update_epochs=3, device="cpu")
    weights = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    numbers = torch.arange(40)
    batches = []
    for seed in range(2):
        batches.append(make_batch(script, 40, seed)._replace(obs=numbers, actions=numbers + seed))
    visited = []

    def compute_loss(agents, mbs, args):
        rows = mbs[0].obs
        visited.append(rows)
        for seed, mb in enumerate(mbs):
            assert torch.equal(mb.obs, rows)
            assert torch.equal(mb.actions, rows + seed)
            assert torch.equal(mb.returns, batches[seed].returns[rows])
            advantages = batches[seed].advantages[rows]
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
