"""The toy example: who copies whom, its losses, data and trainings, its files and its errors."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import ROOT, error_message
from torch.distributions import Categorical, kl_divergence

import mdpo_procgen

sys.path.insert(0, str(ROOT / "benchmark"))
import toy_example
from helpers import Failure, run_tool
from processes import begin_process
from toy_example import Batch, Settings

# Who copies whom.


def test_alone_a_learns_the_color_and_b_the_coin():
    a, b = toy_example.train(0, 9, Settings(distill_coef=0.0), iterations=8)
    assert a[0] > 0.95 and a[1] < 0.1
    assert b.min() > 0.95


def test_a_visible_coin_frees_a():
    """With the paper's coefficients."""
    assert toy_example.train(0, 9, Settings()).min() > 0.95


def test_a_strong_distillation_infects_b():
    results = toy_example.train(0, 1, Settings(distill_coef=10.0), iterations=8)
    assert results[:, 0].min() > 0.95
    assert results[:, 1].max() < 0.1


@pytest.mark.slow
def test_again_with_another_seed():
    a, b = toy_example.train(1, 1, Settings(distill_coef=0.0), iterations=12)
    assert a[0] > 0.95 and a[1] < 0.1
    assert b.min() > 0.95
    assert toy_example.train(1, 9, Settings()).min() > 0.95
    results = toy_example.train(1, 1, Settings(distill_coef=10.0))
    assert results[:, 0].min() > 0.95
    assert results[:, 1].max() < 0.1


@pytest.mark.slow
def test_a_detached_peer_does_not_free_a():
    a, b = toy_example.train(0, 9, Settings(detach_peer=True))
    assert a[0] > 0.95 and a[1] < 0.1
    assert b[0] > 0.95 and b[1] < 0.8


# The losses, on minibatches of a few pictures. Tolerances are those of float32.


def make_logits() -> list[torch.Tensor]:
    """Of A and B, at the four pictures, as a network would give them."""
    torch.manual_seed(3)
    return [torch.randn(4, 2).requires_grad_() for _ in "AB"]


def make_minibatch(pictures: list[int], actions: list[int], seed: int) -> Batch:
    """Rewards are right, old probabilities those of another policy."""
    torch.manual_seed(seed)
    pictures = torch.tensor(pictures)
    actions = torch.tensor(actions)
    logprobs = torch.randn(4, 2).log_softmax(-1)[pictures, actions]
    rewards = (actions == toy_example.SIDES[pictures]).float()
    return Batch(pictures, actions, logprobs, rewards)


def make_minibatches() -> list[Batch]:
    """A's shows the first two pictures, B's all four."""
    mb_a = make_minibatch([0, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0], seed=4)
    mb_b = make_minibatch([3, 0, 1, 2, 2, 3], [1, 1, 0, 1, 0, 0], seed=5)
    return [mb_a, mb_b]


def expected_rl_loss(logits, mb: Batch, clip_coef: float = 0.2, ent_coef: float = 0.01) -> float:
    """One sample after another: equation 17, with the entropy bonus."""
    mean = sum(mb.rewards.tolist()) / len(mb.rewards)
    variance = sum((reward - mean) ** 2 for reward in mb.rewards.tolist()) / (len(mb.rewards) - 1)
    total = 0.0
    for picture, action, old_logprob, reward in zip(*(column.tolist() for column in mb)):
        policy = Categorical(logits=logits[picture].detach())
        ratio = policy.probs[action].item() / math.exp(old_logprob)
        clipped = min(max(ratio, 1 - clip_coef), 1 + clip_coef)
        advantage = (reward - mean) / (variance**0.5 + 1e-8)
        objective = min(ratio * advantage, clipped * advantage)
        total -= objective + ent_coef * policy.entropy().item()
    return total / len(mb.rewards)


def expected_kl(peer_logits, logits, mb: Batch) -> float:
    """KL(peer || self), mean over the minibatch."""
    peer = Categorical(logits=peer_logits.detach()[mb.pictures])
    own = Categorical(logits=logits.detach()[mb.pictures])
    return kl_divergence(peer, own).mean().item()


@pytest.mark.parametrize("changes", [{}, {"clip_coef": 0.7}, {"clip_coef": 1e9}, {"ent_coef": 0.5}])
def test_rl_loss(changes):
    for logits, mb in zip(make_logits(), make_minibatches()):
        loss = toy_example.rl_loss(logits[mb.pictures], mb, Settings(**changes))
        assert loss.item() == pytest.approx(expected_rl_loss(logits, mb, **changes), rel=1e-5)


def test_entropy_is_a_bonus():
    """Where all rewards are the same, nothing else is in the loss: it makes the policy more uniform."""
    logits = torch.tensor([[2.0, 0.0]]).repeat(6, 1).requires_grad_()
    mb = Batch(torch.zeros(6).long(), torch.ones(6).long(), torch.full((6,), -2.1), torch.ones(6))
    toy_example.rl_loss(logits, mb, Settings()).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_clipping_stops_the_gradient():
    """The right action is already twice as likely as it was: nothing more is gained, unless unclipped."""
    logits = torch.zeros(2, 2, requires_grad=True)
    old_logprobs = torch.tensor([0.25, 0.25]).log()
    mb = Batch(torch.tensor([0, 0]), torch.tensor([1, 0]), old_logprobs, torch.tensor([1.0, 0.0]))

    def gradient(clip_coef: float) -> list[float]:
        """Of the loss with respect to the logits of the rewarded action's sample."""
        logits.grad = None
        toy_example.rl_loss(logits, mb, Settings(clip_coef=clip_coef, ent_coef=0.0)).backward()
        return logits.grad[0].tolist()

    assert gradient(0.2) == [0.0, 0.0]
    left, right = gradient(1e9)
    assert left > 0.1 and right < -0.1


@pytest.mark.parametrize("changes", [{}, {"distill_coef": 0.3}, {"detach_peer": True}, {"clip_coef": 0.7}])
def test_mutual_loss_is_the_mean_of_both(changes):
    """Of each policy on its own minibatch: rl_loss + distill_coef KL(peer || self)."""
    logits = make_logits()
    mbs = make_minibatches()
    settings = Settings(**changes)
    loss_a = expected_rl_loss(logits[0], mbs[0], settings.clip_coef)
    loss_a += settings.distill_coef * expected_kl(logits[1], logits[0], mbs[0])
    loss_b = expected_rl_loss(logits[1], mbs[1], settings.clip_coef)
    loss_b += settings.distill_coef * expected_kl(logits[0], logits[1], mbs[1])
    loss = toy_example.minibatch_loss(logits, mbs, settings, b_alone=False)
    assert loss.item() == pytest.approx((loss_a + loss_b) / 2, rel=1e-5)


def gradients(settings: Settings, b_alone: bool = False) -> list[torch.Tensor]:
    """Of the loss with respect to what A and B say of the pictures, (4, 2) each; zeros where none comes."""
    logits = make_logits()
    loss = toy_example.minibatch_loss(logits, make_minibatches(), settings, b_alone)
    grads = torch.autograd.grad(loss, logits, allow_unused=True)
    return [torch.zeros(4, 2) if grad is None else grad for grad in grads]


def test_a_learns_of_its_own_pictures_alone_without_distillation():
    grad_a, grad_b = gradients(Settings(distill_coef=0.0))
    assert grad_a[:2].abs().min() > 0 and not grad_a[2:].any()
    assert grad_b.abs().min() > 0


def test_gradients_reach_the_peer_unless_detached():
    """So A hears of the pictures in B's data where the colour misleads."""
    grad_a, _ = gradients(Settings())
    assert grad_a[2:].abs().min() > 0
    grad_a, _ = gradients(Settings(detach_peer=True))
    assert grad_a[:2].abs().min() > 0 and not grad_a[2:].any()


def test_detached_gradients():
    """Each policy's is then that of its own loss alone, with the peer as it is."""
    grad_a, grad_b = gradients(Settings(detach_peer=True))
    logits_a, logits_b = make_logits()
    mb_a, mb_b = make_minibatches()
    for logits, peer_logits, mb, grad in (
        (logits_a, logits_b, mb_a, grad_a),
        (logits_b, logits_a, mb_b, grad_b),
    ):
        peer_logits = peer_logits.detach()
        loss = toy_example.mutual_loss(logits[mb.pictures], peer_logits[mb.pictures], mb, Settings())
        (expected,) = torch.autograd.grad(loss / 2, logits)
        torch.testing.assert_close(grad, expected)


def test_b_alone():
    """Its part of the loss, and no gradient for A."""
    logits = make_logits()
    mbs = make_minibatches()
    loss = toy_example.minibatch_loss(logits, mbs, Settings(), b_alone=True)
    assert loss.item() == pytest.approx(expected_rl_loss(logits[1], mbs[1]) / 2, rel=1e-5)
    grad_a, grad_b = gradients(Settings(), b_alone=True)
    assert not grad_a.any() and grad_b.abs().min() > 0


# The data.


def test_pictures():
    """Red then cyan in each pair, A's pair with the coin right on red; the agent is the same in all."""
    obs = toy_example.make_pictures(5)
    assert obs.dtype == torch.uint8 and obs.shape == (4, 64, 64, 3)
    coin = (obs == torch.tensor([255, 255, 0])).all(-1)
    assert coin.sum((1, 2)).tolist() == [25] * 4
    assert coin[:, :, 34:].any(2).any(1).tolist() == [True, False, False, True]
    assert toy_example.SIDES.tolist() == [1, 0, 0, 1]
    assert obs[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 255]] * 2
    agent = (obs == 255).all(-1)
    assert agent[0].any() and (agent == agent[0]).all()
    for picture, center in zip(coin, (48, 16, 16, 48)):
        rows, columns = picture.nonzero().float().mean(0).tolist()
        assert (rows, columns) == (32, center)


def test_rollout():
    logprobs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]).log()
    torch.manual_seed(0)
    for num_pictures in (2, 4):
        pictures, actions, action_logprobs, rewards = toy_example.rollout(logprobs, num_pictures)
        assert pictures.shape == (512,) and pictures.unique().tolist() == list(range(num_pictures))
        assert torch.equal(rewards == 1, actions == torch.tensor([1, 0, 0, 1])[pictures])
        assert torch.equal(rewards == 0, actions != torch.tensor([1, 0, 0, 1])[pictures])
        assert torch.equal(action_logprobs, logprobs[pictures, actions])
        assert (actions[pictures < 2] == 0).float().mean() == pytest.approx(0.9, abs=0.06)


def test_act():
    """Log-probabilities of A, then B, and from them those of going to the coin."""
    torch.manual_seed(0)
    agents = [mdpo_procgen.Agent(num_actions=2, channels=(1, 1, 1)) for _ in "AB"]
    for agent in agents:
        agent.actor.weight.data *= 300
    obs = toy_example.make_pictures(9)
    logprobs = toy_example.act(agents, obs)
    for agent, each in zip(agents, logprobs, strict=True):
        torch.testing.assert_close(each.exp(), agent(obs)[0].detach().softmax(-1))
    assert not torch.equal(logprobs[0], logprobs[1])
    probabilities = toy_example.coin_probabilities(logprobs)
    for policy, each in zip(logprobs.exp(), probabilities, strict=True):
        assert each.tolist() == [policy[0, 1], policy[1, 0], policy[2, 0], policy[3, 1]]


# The training.


def test_update():
    """Three passes in four minibatches, each gradient clipped on its own."""
    torch.manual_seed(0)
    obs = toy_example.make_pictures(9)
    agents = [mdpo_procgen.Agent(num_actions=2, channels=(1, 1, 1)) for _ in "AB"]
    for agent in agents:
        agent.actor.weight.data *= 300
    logprobs = toy_example.act(agents, obs)
    batches = [toy_example.rollout(logprobs[0], 2), toy_example.rollout(logprobs[1], 4)]
    optimizer = StepLengths(agents)
    toy_example.update(agents, optimizer, obs, batches, Settings(distill_coef=1e4), b_alone=False)
    assert len(optimizer.lengths) == 12
    for lengths in optimizer.lengths:
        assert lengths == pytest.approx([0.5, 0.5], rel=1e-4)


def test_each_step_has_its_own_gradient():
    """Where all samples are the same and the weights stay, so does the gradient; it is too short to clip."""
    torch.manual_seed(0)
    agents = [mdpo_procgen.Agent(num_actions=2, channels=(1, 1, 1)) for _ in "AB"]
    for agent in agents:
        agent.actor.weight.data *= 10
    one = torch.ones(512)
    batch = Batch(pictures=0 * one.long(), actions=one.long(), logprobs=-one, rewards=one)
    optimizer = StepLengths(agents)
    toy_example.update(agents, optimizer, toy_example.make_pictures(9), [batch, batch], Settings(), False)
    first, *others = optimizer.lengths
    assert min(first) > 0 and max(first) < 0.5
    for lengths in others:
        assert lengths == pytest.approx(first, rel=1e-4)


class StepLengths(torch.optim.SGD):
    """Goes nowhere, and notes how long the gradients of each agent are."""

    def __init__(self, agents: list[mdpo_procgen.Agent]):
        super().__init__(torch.nn.ModuleList(agents).parameters(), lr=0.0)
        self.agents = agents
        self.lengths = []

    def step(self):
        lengths = []
        for agent in self.agents:
            grads = [weight.grad.flatten() for weight in agent.parameters() if weight.grad is not None]
            lengths.append(torch.cat(grads).norm().item())
        self.lengths.append(lengths)
        super().step()


def test_each_picture_counts_once_a_pass(monkeypatch):
    """In minibatches of 128, the same rows of both batches."""
    seen = []

    def note(logits, mbs, settings, b_alone):
        seen.append([mb.rewards for mb in mbs])
        return logits[0].sum()

    monkeypatch.setattr(toy_example, "minibatch_loss", note)
    agents = [mdpo_procgen.Agent(num_actions=2, channels=(1, 1, 1)) for _ in "AB"]
    optimizer = torch.optim.SGD(agents[0].parameters(), lr=0.0)
    numbers = torch.arange(512)
    batch = Batch(numbers, numbers, numbers, numbers)
    toy_example.update(agents, optimizer, toy_example.make_pictures(1), [batch, batch], Settings(), False)
    assert len(seen) == 12
    for epoch in (seen[:4], seen[4:8], seen[8:]):
        for of_a, of_b in epoch:
            assert torch.equal(of_a, of_b) and len(of_a) == 128
        rows = torch.cat([of_a for of_a, _ in epoch])
        assert torch.equal(rows.sort()[0], numbers)
        assert not torch.equal(rows, numbers)


@pytest.fixture
def updates(monkeypatch):
    """What `train` gives to `update`, by names, instead of the update."""
    calls = []

    def note(agents, optimizer, obs, batches, settings, b_alone):
        calls.append({"agents": agents, "optimizer": optimizer, "obs": obs, "batches": batches})
        calls[-1] |= {"settings": settings, "b_alone": b_alone}

    monkeypatch.setattr(toy_example, "update", note)
    return calls


def test_train_updates_with_the_data_of_each(updates):
    settings = Settings(ent_coef=0.3)
    toy_example.train(0, 5, settings, iterations=2, channels=(1, 2, 3))
    assert len(updates) == 2
    for call in updates:
        assert call["settings"] == settings and call["b_alone"] is False
        assert torch.equal(call["obs"], toy_example.make_pictures(5))
        logprobs = toy_example.act(call["agents"], call["obs"])
        for batch, policy, num_pictures in zip(call["batches"], logprobs, (2, 4), strict=True):
            assert batch.pictures.unique().tolist() == list(range(num_pictures))
            assert torch.equal(batch.logprobs, policy[batch.pictures, batch.actions])
    agent, peer = updates[0]["agents"]
    assert [layer.out_channels for layer in agent.encoder if hasattr(layer, "out_channels")] == [1, 2, 3]
    assert not torch.equal(agent.encoder[0].weight, peer.encoder[0].weight)


def test_train_with_the_settings_of_the_paper(updates):
    """Those of mdpo_procgen.py: Adam's of both agents, and the losses'."""
    toy_example.train(0, 5, Settings(), iterations=1, channels=(1, 1, 1))
    paper = mdpo_procgen.Args()
    optimizer = updates[0]["optimizer"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == paper.learning_rate
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-5, (0.9, 0.999))
    expected = [id(parameter) for agent in updates[0]["agents"] for parameter in agent.parameters()]
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == expected
    assert Settings().distill_coef == paper.distill_coef
    assert Settings().ent_coef == paper.ent_coef
    assert Settings().clip_coef == paper.clip_coef
    assert Settings().detach_peer == paper.detach_peer is False


def test_head_start_comes_before_the_iterations(updates):
    toy_example.train(0, 5, Settings(head_start=2), iterations=3, channels=(1, 1, 1))
    assert [call["b_alone"] for call in updates] == [True, True, False, False, False]


def test_head_start_is_that_of_b():
    """After it B has changed, and A has not."""
    at_first = toy_example.train(0, 9, Settings(), iterations=0, channels=(1, 1, 1))
    ahead = toy_example.train(0, 9, Settings(head_start=1), iterations=0, channels=(1, 1, 1))
    assert np.array_equal(ahead[0], at_first[0])
    assert (ahead[1] != at_first[1]).all()
    assert ahead[1].mean() > at_first[1].mean()


def test_seed():
    def train(seed: int) -> np.ndarray:
        return toy_example.train(seed, 9, Settings(), iterations=0, channels=(1, 1, 1))

    assert np.array_equal(train(1), train(1))
    assert not np.array_equal(train(1), train(2))


def test_train_returns_means_of_each_pair(monkeypatch, updates):
    """Of the pictures where the colour tells the side, and where it misleads."""
    probabilities = torch.tensor([[0.1, 0.3, 0.5, 0.9], [0.2, 0.4, 0.6, 0.6]])
    monkeypatch.setattr(toy_example, "coin_probabilities", lambda logprobs: probabilities)
    results = toy_example.train(0, 5, Settings(), iterations=1, channels=(1, 1, 1))
    assert results == pytest.approx(np.array([[0.2, 0.7], [0.3, 0.6]]))
    assert results.dtype == np.float32


@pytest.mark.parametrize(("smallest", "num_updates"), [(0.98, 3), (0.995, 0)])
def test_train_ends_when_all_is_learned(smallest, num_updates, monkeypatch, updates):
    probabilities = torch.full((2, 4), 0.999)
    probabilities[0, 2] = smallest
    monkeypatch.setattr(toy_example, "coin_probabilities", lambda logprobs: probabilities)
    toy_example.train(0, 5, Settings(), iterations=3, channels=(1, 1, 1))
    assert len(updates) == num_updates


# The map.


def test_rows():
    """Each is what its name says, and otherwise the paper's."""
    paper = {"distill_coef": 1.0, "ent_coef": 0.01, "clip_coef": 0.2, "detach_peer": False, "head_start": 0}
    changes = {}
    for name, settings in toy_example.ROWS.items():
        changes[name] = dict(asdict(settings).items() - paper.items())
    unclipped = changes.pop("no clipping of the ratio")
    assert unclipped.keys() == {"clip_coef"} and unclipped["clip_coef"] > 1e6
    assert changes == {
        "alone": {"distill_coef": 0.0},
        "distill_coef 0.1": {"distill_coef": 0.1},
        "distill_coef 1 (the paper's)": {},
        "distill_coef 10": {"distill_coef": 10.0},
        "peer detached": {"detach_peer": True},
        "entropy coefficient 0.1": {"ent_coef": 0.1},
        "B 5 iterations ahead": {"head_start": 5},
    }


def train_at_once(seed, coin_size, settings, iterations, channels) -> np.ndarray:
    """In place of `train`: what it is told, as numbers."""
    return np.array([[seed, coin_size], [settings.distill_coef, iterations * channels[1]]])


def test_map(monkeypatch):
    """Each training stands where its row, column and seed are."""
    monkeypatch.setattr(toy_example, "train", train_at_once)
    args = toy_example.Args(seeds=2, coin_sizes=(3, 20, 9), iterations=5, channels=(1, 7, 1))
    results = toy_example.make_map(args)
    assert results.shape == (8, 3, 2, 2, 2)
    for row, settings in enumerate(toy_example.ROWS.values()):
        for column, coin_size in enumerate((3, 20, 9)):
            for seed in range(2):
                expected = [[seed, coin_size], [settings.distill_coef, 5 * 7]]
                assert results[row, column, seed].tolist() == expected


def make_results(num_columns: int = 1) -> np.ndarray:
    """For the table and the figure, of two seeds."""
    return np.ones((len(toy_example.ROWS), num_columns, 2, 2, 2))


def test_table(capsys):
    results = make_results()
    results[1, 0, :, 0, 1] = 0.25, 0.35
    results[1, 0, :, 1, 1] = 0.5
    results[2, 0, :, 0, 0] = 0.7, 0.9
    toy_example.print_table(toy_example.Args(seeds=2, coin_sizes=(4,), iterations=7), results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "mean of 2 seeds after 7 iterations"
    assert lines[2].startswith("width of the coin ") and lines[2].endswith(" 4 px")
    rows = [re.split(" {2,}", line) for line in lines[3:-1]]
    assert [name for name, _ in rows] == list(toy_example.ROWS)
    numbers = [number for _, number in rows]
    assert numbers[1] == "0.30 / 0.50" and set(numbers[:1] + numbers[2:]) == {"1.00 / 1.00"}
    assert lines[-1] == "where the colour tells the side: at least 0.80 at every point"


def test_map_in_the_figure():
    """A panel for each policy, rows and columns as in the table."""
    probabilities = np.random.default_rng(0).random((len(toy_example.ROWS), 2, 2))
    figure = plt.figure()
    toy_example.draw_map(figure, (4, 7), probabilities)
    figure.canvas.draw()
    for i, ax in enumerate(figure.axes[:2]):
        assert ax.get_title() == ["policy A", "policy B"][i]
        shown = {text.get_position(): text.get_text() for text in ax.texts}
        for row in range(len(toy_example.ROWS)):
            for column in range(2):
                assert shown[column, row] == f"{probabilities[row, column, i]:.2f}"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "7"]
        assert np.array_equal(ax.images[0].get_array(), probabilities[..., i])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(toy_example.ROWS)
    plt.close(figure)


def test_data_in_the_figure():
    figure = plt.figure()
    toy_example.draw_data(figure, 9)
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    pictures = toy_example.make_pictures(9).numpy()
    assert np.array_equal(shown, [*pictures[:2], *pictures])
    plt.close(figure)


# The files.


def check_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["toy_example.pdf", "toy_example.png"]
    assert (folder / "toy_example.pdf").read_bytes().startswith(b"%PDF")
    assert (folder / "toy_example.png").read_bytes().startswith(b"\x89PNG")


def test_files(tmp_path, monkeypatch, capsys):
    """Nothing else is left, and each is announced. The map shows the means where the colour misleads."""
    results = make_results(3)
    results[..., 0, 0, 1] = 0.3
    results[..., 1, 0, 1] = 0.1
    figures = []
    monkeypatch.setattr(toy_example, "make_map", lambda args: results)
    monkeypatch.setattr(plt, "close", figures.append)
    folder = tmp_path / "deep" / "down"
    toy_example.main(toy_example.Args(figure=folder / "toy_example.png"))
    check_files(folder)
    monkeypatch.undo()
    (figure,) = figures
    of_a, of_b, _ = [ax for ax in figure.axes if ax.get_title() or ax.get_ylabel()]
    assert {text.get_text() for text in of_a.texts} == {"0.20"}
    assert {text.get_text() for text in of_b.texts} == {"1.00"}
    plt.close(figure)
    *_, pdf, png = capsys.readouterr().out.splitlines()
    assert pdf == f"wrote {folder}/toy_example.pdf"
    assert png == f"wrote {folder}/toy_example.png"


@pytest.mark.parametrize("given", ["some/figure", "some/figure.pdf", "some/figure.png"])
def test_name_of_the_figure(given):
    """A suffix that it gets anyway is left out."""
    assert toy_example.Args(figure=Path(given)).figure == Path("some/figure")


@pytest.mark.slow
def test_command(tmp_path):
    command = [sys.executable, str(ROOT / "benchmark" / "toy_example.py")]
    command += ["--seeds", "1", "--coin-sizes", "2", "7", "--iterations", "1", "--channels", "1", "1", "1"]
    env = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    check_files(tmp_path / "figures")
    for name in toy_example.ROWS:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name + "  ")]
        assert line.count("/") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_tool(number, tmp_path):
    """Nor does the one that is stopped say a word."""
    command = [sys.executable, str(ROOT / "benchmark" / "toy_example.py"), "--processes", "2"]
    env = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # also in a background
    with subprocess.Popen(command, cwd=tmp_path, env=env, **options) as tool:
        children = Path(f"/proc/{tool.pid}/task/{tool.pid}/children")
        while len(children.read_text().split()) < 2:
            assert tool.poll() is None
            time.sleep(0.1)
        processes = [Path("/proc", process) for process in children.read_text().split()]
        if number == signal.SIGINT:
            os.killpg(tool.pid, number)  # as a terminal does
        else:
            tool.send_signal(number)
        assert tool.communicate(timeout=60) == (b"", b"")
    assert tool.returncode == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 60
    while any(process.exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_process_whose_parent_has_ended_ends():
    """Also if that was before it could ask to be told."""
    for parent, expected in [(os.getpid(), 0), (os.getppid(), 1)]:
        process = get_context("fork").Process(target=begin_process, args=[parent])
        process.start()
        process.join(60)
        assert process.exitcode == expected


# The errors.

BAD = [
    ["--seeds", "0"],
    ["--coin-sizes", "25"],
    ["--coin-sizes", "3", "0"],
    ["--coin-sizes"],
    ["--iterations", "x"],
    ["--iterations", "0"],
    ["--processes", "-1"],
    ["--channels", "1", "2", "0"],
    ["--channels", "1", "2"],
    ["--sede", "1"],
    ["--figure="],
    ["--figure", "/"],
    ["--figure", "/proc/x"],
]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input(words, tmp_path, monkeypatch, capfd):
    """Found before the first training, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy_example.py", *words])
    monkeypatch.setattr(toy_example, "make_map", None)
    with pytest.raises(SystemExit) as stop:
        run_tool(toy_example.main, toy_example.Args, toy_example.__doc__)
    flag = words[0].removesuffix("=")
    assert flag in error_message(stop.value.code, *capfd.readouterr())
    assert not list(tmp_path.iterdir())


def test_figure_where_no_folder_can_be(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_example, "make_map", None)
    (tmp_path / "file").write_text("kept")
    args = toy_example.Args(figure=tmp_path / "file" / "figure")
    with pytest.raises(Failure) as failure:
        toy_example.main(args)
    assert str(failure.value) == f"--figure {args.figure}: File exists"
    assert (tmp_path / "file").read_text() == "kept"


def end_like_a_killed_process():
    os._exit(9)


def test_a_training_that_is_killed():
    with pytest.raises(Failure, match="a training was killed: is there enough memory"):
        toy_example.run_jobs([end_like_a_killed_process], processes=1)
