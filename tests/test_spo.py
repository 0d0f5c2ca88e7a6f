"""SPO's objective, next to PPO's."""

import pytest
import torch

from mdspo_procgen import policy_loss as mdspo_loss
from ppo_procgen import policy_loss as ppo_loss
from spo_procgen import policy_loss as spo_loss

EPS = 0.2
BOTH = pytest.mark.parametrize("loss", [spo_loss, mdspo_loss])


def gradient(loss, ratio: float, advantage: float) -> float:
    """How the loss of one sample changes with its ratio."""
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    loss(ratio, torch.tensor([advantage], dtype=torch.float64), EPS).backward()
    return ratio.grad.item()


@BOTH
def test_value_by_hand(loss):
    """Ratio 1.1, A 2: 1.1 * 2 - 2 * 0.01 / 0.4 = 2.15. Ratio 0.5, A -1: -0.5 - 0.25 / 0.4 = -1.125."""
    ratio = torch.tensor([1.1, 0.5])
    advantages = torch.tensor([2.0, -1.0])
    assert loss(ratio[:1], advantages[:1], EPS).item() == pytest.approx(-2.15)
    assert loss(ratio, advantages, EPS).item() == pytest.approx(-(2.15 - 1.125) / 2)


@BOTH
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_optimum_is_one_plus_sign_of_advantage_times_epsilon(loss, advantage):
    outward = 1 if advantage > 0 else -1
    optimum = 1 + outward * EPS
    assert gradient(loss, optimum, advantage) == pytest.approx(0, abs=1e-12)
    # Gradient descent goes against the gradient: outward before the optimum, back beyond it.
    assert gradient(loss, optimum - 0.1 * outward, advantage) * outward < 0
    assert gradient(loss, optimum + 0.1 * outward, advantage) * outward > 0
    assert gradient(ppo_loss, optimum + 0.1 * outward, advantage) == 0


@BOTH
def test_equals_the_formula_on_random_input(loss):
    generator = torch.Generator().manual_seed(0)
    ratio = torch.rand(1000, generator=generator, dtype=torch.float64) * 3
    advantages = torch.randn(1000, generator=generator, dtype=torch.float64)
    terms = []
    for r, a in zip(ratio.tolist(), advantages.tolist()):
        terms.append(r * a - abs(a) * (r - 1) ** 2 / (2 * EPS))
    assert loss(ratio, advantages, EPS).item() == pytest.approx(-sum(terms) / 1000, rel=1e-12)
