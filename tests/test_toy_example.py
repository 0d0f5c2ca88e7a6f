"""The toy example: who copies whom, its losses, data and trainings, its files and its errors."""

import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import tyro
from joblib import parallel_config
from torch.distributions import Categorical, kl_divergence

import mdpo_procgen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import toy_example
from toy_example import ROWS, SIDES, Args, Batch, Settings, make_pictures, minibatch_loss

# Who copies whom.


def test_alone_a_learns_the_color_and_b_the_coin():
    a, b = toy_example.train(0, 9, Settings(distill_coef=0.0), iterations=8)
    assert a[0] > 0.95
    assert a[1] < 0.1
    assert b.min() > 0.95


@pytest.mark.slow
def test_a_visible_coin_frees_a():
    """With the paper's coefficients; not with a detached peer."""
    assert toy_example.train(0, 9, Settings(), iterations=20).min() > 0.95
    a, b = toy_example.train(0, 9, Settings(detach_peer=True), iterations=20)
    assert a[0] > 0.95
    assert a[1] < 0.1
    assert b[1] < 0.8


def test_a_strong_distillation_infects_b():
    results = toy_example.train(0, 1, Settings(distill_coef=10.0), iterations=8)
    assert results[:, 0].min() > 0.95
    assert results[:, 1].max() < 0.1


# The losses, on minibatches of a few pictures. Tolerances are those of float32.


def make_logits() -> list[torch.Tensor]:
    """Of A and B, at the four pictures, as a network would give them."""
    torch.manual_seed(3)
    return [torch.randn(4, 2).requires_grad_() for _ in "AB"]


def make_minibatches() -> list[Batch]:
    """A's shows the first two pictures, B's all four. Rewards are right, old probabilities those of another
    policy."""
    torch.manual_seed(4)
    mbs = []
    for pictures in ([0, 1, 1, 0, 1, 0], [3, 0, 1, 2, 2, 3]):
        pictures = torch.tensor(pictures)
        actions = torch.tensor([1, 0, 1, 0, 0, 0])
        logprobs = torch.randn(4, 2).log_softmax(-1)[pictures, actions]
        rewards = (actions == SIDES[pictures]).float()
        mbs.append(Batch(pictures, actions, logprobs, rewards))
    return mbs


def expected_loss(logits, peer_logits, mb: Batch, settings: Settings, b_alone: bool):
    """Equation 17 with the entropy bonus; unless B is alone, with the mean KL(peer || self)."""
    policy = Categorical(logits=logits[mb.pictures])
    peer = Categorical(logits=peer_logits[mb.pictures])
    ratio = (policy.log_prob(mb.actions) - mb.logprobs).exp()
    advantages = (mb.rewards - mb.rewards.mean()) / mb.rewards.std()
    loss = mdpo_procgen.policy_loss(ratio, advantages, settings.clip_coef)
    loss -= settings.ent_coef * policy.entropy().mean()
    if not b_alone:
        loss += settings.distill_coef * kl_divergence(peer, policy).mean()
    return loss


CHANGES = [{}, {"clip_coef": 1e9}, {"ent_coef": 0.5}, {"distill_coef": 0.3}, {"detach_peer": True}]


@pytest.mark.parametrize("changes", CHANGES)
def test_loss_is_the_mean_of_both(changes):
    """Of each policy on its own minibatch. While B is alone it is B's part, without distillation."""
    logits_a, logits_b = make_logits()
    mb_a, mb_b = make_minibatches()
    settings = Settings(**changes)
    for b_alone in (False, True):
        loss = minibatch_loss([logits_a, logits_b], [mb_a, mb_b], settings, b_alone)
        expected = expected_loss(logits_b, logits_a, mb_b, settings, b_alone)
        if not b_alone:
            expected += expected_loss(logits_a, logits_b, mb_a, settings, b_alone)
        assert loss.item() == pytest.approx(expected.item() / 2, rel=1e-5)


def gradients(settings: Settings, b_alone: bool = False) -> list[torch.Tensor]:
    """Of the loss with respect to what A and B say of the pictures, (4, 2) each; zeros where none comes."""
    logits = make_logits()
    loss = minibatch_loss(logits, make_minibatches(), settings, b_alone)
    grads = torch.autograd.grad(loss, logits, allow_unused=True)
    return [torch.zeros(4, 2) if grad is None else grad for grad in grads]


def test_gradients_reach_the_peer_unless_detached():
    """So A hears of the pictures in B's data where the colour misleads."""
    grad_a, _ = gradients(Settings())
    assert grad_a[2:].abs().min() > 0
    for settings in (Settings(detach_peer=True), Settings(distill_coef=0.0)):
        grad_a, grad_b = gradients(settings)
        assert grad_a[:2].abs().min() > 0
        assert not grad_a[2:].any()
        assert grad_b.abs().min() > 0
    grad_a, grad_b = gradients(Settings(), b_alone=True)
    assert not grad_a.any()
    assert grad_b.abs().min() > 0


# The data.


def test_pictures():
    """Red then cyan in each pair, A's pair with the coin right on red; the agent is the same in all."""
    obs = make_pictures(5)
    assert (obs.dtype, obs.shape) == (torch.uint8, (4, 64, 64, 3))
    assert obs[:, 0, 0].tolist() == [[255, 0, 0], [0, 255, 255]] * 2
    assert SIDES.tolist() == [1, 0, 0, 1]
    coin = (obs == torch.tensor([255, 255, 0])).all(-1)
    assert coin.sum((1, 2)).tolist() == [25] * 4
    for picture, column in zip(coin, (48, 16, 16, 48)):
        assert picture.nonzero().float().mean(0).tolist() == [32, column]
    agent = (obs == 255).all(-1)
    assert agent.sum((1, 2)).tolist() == [32] * 4
    assert (agent == agent[0]).all()


def test_rollout():
    logprobs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]).log()
    right = torch.tensor([1, 0, 0, 1])
    torch.manual_seed(0)
    for num_pictures in (2, 4):
        batch = toy_example.rollout(logprobs, num_pictures)
        assert batch.pictures.shape == (512,)
        assert batch.pictures.unique().tolist() == list(range(num_pictures))
        assert torch.equal(batch.rewards, (batch.actions == right[batch.pictures]).float())
        assert torch.equal(batch.logprobs, logprobs[batch.pictures, batch.actions])
        actions = batch.actions[batch.pictures < 2]
        assert (actions == 0).float().mean() == pytest.approx(0.9, abs=0.06)


@pytest.fixture
def agents() -> list:
    """Two small ones whose policies differ between pictures."""
    torch.manual_seed(0)
    agents = [mdpo_procgen.Agent(num_actions=2, channels=(1, 1, 1)) for _ in "AB"]
    for agent in agents:
        agent.actor.weight.data *= 300
    return agents


def test_act(agents):
    """Log-probabilities of A, then B, and from them those of going to the coin."""
    obs = make_pictures(9)
    logprobs = toy_example.act(agents, obs)
    probabilities = toy_example.coin_probabilities(logprobs)
    for agent, each, to_coin in zip(agents, logprobs.exp(), probabilities, strict=True):
        torch.testing.assert_close(each, agent(obs)[0].detach().softmax(-1))
        assert to_coin.tolist() == [each[0, 1], each[1, 0], each[2, 0], each[3, 1]]
    assert not torch.equal(logprobs[0], logprobs[1])


# The training.


class StepLengths(torch.optim.SGD):
    """Goes nowhere, and notes how long the gradients of each agent are."""

    def __init__(self, agents: list):
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


def test_update(agents):
    """Three passes in four minibatches; each step has its own gradient, each agent's clipped on its own."""
    obs = make_pictures(9)
    logprobs = toy_example.act(agents, obs)
    batches = [toy_example.rollout(logprobs[0], 2), toy_example.rollout(logprobs[1], 4)]
    optimizer = StepLengths(agents)
    toy_example.update(agents, optimizer, obs, batches, Settings(distill_coef=1e4), b_alone=False)
    assert len(optimizer.lengths) == 12
    for lengths in optimizer.lengths:
        assert lengths == pytest.approx([0.5, 0.5], rel=1e-4)

    one = torch.ones(512)  # samples that are all the same have the same gradient, too short to clip
    batch = Batch(pictures=0 * one.long(), actions=one.long(), logprobs=-one, rewards=one)
    for agent in agents:
        agent.zero_grad()
        agent.actor.weight.data /= 30
    optimizer = StepLengths(agents)
    toy_example.update(agents, optimizer, obs, [batch, batch], Settings(), b_alone=False)
    first, *others = optimizer.lengths
    assert min(first) > 0
    assert max(first) < 0.5
    for lengths in others:
        assert lengths == pytest.approx(first, rel=1e-4)


def test_each_picture_counts_once_a_pass(monkeypatch, agents):
    """In minibatches of 128, the same rows of both batches."""
    seen = []

    def note(logits, mbs, settings, b_alone):
        seen.append([mb.rewards for mb in mbs])
        return logits[0].sum()

    monkeypatch.setattr(toy_example, "minibatch_loss", note)
    optimizer = torch.optim.SGD(agents[0].parameters(), lr=0.0)
    numbers = torch.arange(512)
    batch = Batch(numbers, numbers, numbers, numbers)
    toy_example.update(agents, optimizer, make_pictures(1), [batch, batch], Settings(), False)
    for of_a, of_b in seen:
        assert torch.equal(of_a, of_b)
    rows = torch.stack([of_a for of_a, _ in seen]).reshape(3, 512)
    for epoch in rows:
        assert torch.equal(epoch.sort()[0], numbers)
        assert not torch.equal(epoch, numbers)


@pytest.fixture
def updates(monkeypatch):
    """What `train` gives to `update`, by names, instead of the update."""
    calls = []

    def note(agents, optimizer, obs, batches, settings, b_alone):
        calls.append(locals() | {"calls": None})

    monkeypatch.setattr(toy_example, "update", note)
    return calls


def test_train_updates_with_the_data_of_each(updates):
    settings = Settings(ent_coef=0.3, head_start=1)
    toy_example.train(0, 5, settings, iterations=2)
    assert [call["b_alone"] for call in updates] == [True, False, False]
    for call in updates:
        assert call["settings"] == settings
        assert torch.equal(call["obs"], make_pictures(5))
        logprobs = toy_example.act(call["agents"], call["obs"])
        for batch, policy, num_pictures in zip(call["batches"], logprobs, (2, 4), strict=True):
            assert batch.pictures.unique().tolist() == list(range(num_pictures))
            assert torch.equal(batch.logprobs, policy[batch.pictures, batch.actions])
    agent, peer = updates[0]["agents"]
    assert not torch.equal(agent.encoder[0].weight, peer.encoder[0].weight)


def test_train_with_the_settings_of_the_paper(updates):
    """Those of mdpo_procgen.py: Adam's of both agents, and the losses'."""
    toy_example.train(0, 5, Settings(), iterations=1)
    paper = mdpo_procgen.Args()
    optimizer = updates[0]["optimizer"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == paper.learning_rate
    assert optimizer.defaults["eps"] == 1e-5
    expected = [id(weight) for agent in updates[0]["agents"] for weight in agent.parameters()]
    (group,) = optimizer.param_groups
    assert [id(weight) for weight in group["params"]] == expected
    for name in ("distill_coef", "ent_coef", "clip_coef", "detach_peer"):
        assert getattr(Settings(), name) == getattr(paper, name)


def test_seed(updates):
    first, again, other = [toy_example.train(seed, 9, Settings(), iterations=0) for seed in (1, 1, 2)]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("smallest", "num_updates"), [(0.98, 3), (0.995, 0)])
def test_train_ends_when_all_is_learned(smallest, num_updates, monkeypatch, updates):
    """It returns means over the pictures where the colour tells the side, and where it misleads."""
    probabilities = torch.tensor([[0.999, 1.0, smallest, 1.0], [0.995, 1.0, 1.0, 1.0]])
    monkeypatch.setattr(toy_example, "coin_probabilities", lambda logprobs: probabilities)
    results = toy_example.train(0, 5, Settings(), iterations=3)
    assert len(updates) == num_updates
    assert results == pytest.approx(np.array([[0.9995, (smallest + 1) / 2], [0.9975, 1.0]]))
    assert results.dtype == np.float32


# The map.


def test_rows():
    """Each is what its name says, and otherwise the paper's."""
    paper = asdict(Settings())
    changes = [dict(asdict(settings).items() - paper.items()) for settings in ROWS.values()]
    assert dict(zip(ROWS, changes)) == {
        "alone": {"distill_coef": 0.0},
        "distill_coef 0.1": {"distill_coef": 0.1},
        "distill_coef 1 (the paper's)": {},
        "distill_coef 10": {"distill_coef": 10.0},
        "peer detached": {"detach_peer": True},
        "entropy coefficient 0.1": {"ent_coef": 0.1},
        "no clipping of the ratio": {"clip_coef": 1e9},
        "B 5 iterations ahead": {"head_start": 5},
    }


def train_at_once(seed, coin_size, settings, iterations) -> np.ndarray:
    """In place of `train`: what it is told, as numbers."""
    return np.array([[seed, coin_size], [settings.distill_coef, iterations]])


def test_map(monkeypatch):
    """Each training stands where its row, column and seed are."""
    monkeypatch.setattr(toy_example, "train", train_at_once)
    args = Args(seeds=2, coin_sizes=(3, 20, 9), iterations=5)
    with parallel_config("sequential"):
        results = toy_example.make_map(args)
    assert results.shape == (8, 3, 2, 2, 2)
    for row, settings in enumerate(ROWS.values()):
        for column, coin_size in enumerate((3, 20, 9)):
            for seed in range(2):
                expected = train_at_once(seed, coin_size, settings, 5)
                assert (results[row, column, seed] == expected).all()


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    """Both show means over seeds where the colour misleads. The files are there, and nothing else."""
    results = np.ones((8, 2, 2, 2, 2))
    results[1, 0, :, 0, 1] = 0.25, 0.35
    results[1, 0, :, 1, 1] = 0.5
    results[2, 0, :, 0, 0] = 0.7, 0.9
    figures = []
    monkeypatch.setattr(toy_example, "make_map", lambda args: results)
    monkeypatch.setattr(plt, "close", figures.append)
    path = tmp_path / "deep" / "toy_example.png"
    toy_example.main(Args(seeds=2, coin_sizes=(4, 7), iterations=7, figure=path))
    lines = capsys.readouterr().out.splitlines()
    assert "mean of 2 seeds after 7 iterations:" in lines
    assert lines[-3] == "Where the colour tells the side: at least 0.80 at every point."
    assert lines[-2:] == [f"wrote {path.with_suffix('.pdf')}", f"wrote {path}"]
    assert "| width of the coin in pixels | 4 | 7 |" in lines
    assert "| distill_coef 0.1 | 0.30 / 0.50 | 1.00 / 1.00 |" in lines
    assert sum("| 1.00 / 1.00 | 1.00 / 1.00 |" in line for line in lines) == 7
    assert {each.name for each in path.parent.iterdir()} == {"toy_example.pdf", "toy_example.png"}

    (figure,) = figures
    panels = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    for title, mean in (("policy A", "0.30"), ("policy B", "0.50")):
        shown = {text.get_position(): text.get_text() for text in panels[title].texts}
        assert shown.pop((0, 1)) == mean
        assert set(shown.values()) == {"1.00"}


# The command.


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seeds 0", "--seeds must be from 1 to 1000, not 0"),
        ("--coin-sizes 3 25", "--coin-sizes must be from 1 to 24, not 25"),
        ("--coin-sizes", "--coin-sizes must be one number or more"),
        ("--figure /", "--figure must be a file's name, not /"),
        ("--figure /dev/null/x", "--figure /dev/null/x: File exists"),
    ],
)
def test_bad_input(words, message, monkeypatch, capfd):
    """Found before the first training."""
    monkeypatch.setattr(toy_example, "make_map", None)
    with pytest.raises(SystemExit) as stop:
        toy_example.main(tyro.cli(Args, args=words.split()))
    assert stop.value.code == 2
    assert message in capfd.readouterr().err
