"""Generalized advantage estimation by brute force."""

import torch


def sums_of_deltas(rewards, values, ends, gamma: float, gae_lambda: float):
    """Equation 16 of the paper on GAE, term by term. values has one row more; ends[t]: action t ended an
    episode."""
    num_steps, num_envs = rewards.shape
    advantages = torch.zeros_like(rewards)
    for env in range(num_envs):
        for start in range(num_steps):
            weight = 1.0
            for step in range(start, num_steps):
                following = 0.0 if ends[step, env] else values[step + 1, env]
                delta = rewards[step, env] + gamma * following - values[step, env]
                advantages[start, env] += weight * delta
                if ends[step, env]:
                    break
                weight *= gamma * gae_lambda
    return advantages


def test_is_the_discounted_sum_of_deltas(script):
    """dones[t] says that obs[t] begins an episode, so that action t - 1 ended one."""
    torch.manual_seed(0)
    rewards = torch.randn(20, 6)
    values = torch.randn(21, 6)
    dones = torch.rand(21, 6) < 0.2
    dones[-1, 0] = True
    expected = sums_of_deltas(rewards, values, dones[1:], 0.97, 0.9)
    advantages, returns = script.compute_gae(
        rewards, values[:-1], dones[:-1], values[-1], dones[-1], 0.97, 0.9
    )
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, expected + values[:-1], rtol=1e-5, atol=1e-5)
