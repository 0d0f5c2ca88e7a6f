"""Generalized advantage estimation, by hand and by brute force."""

import torch


def test_by_hand_with_episode_ends(script):
    # Environment 0: obs[1] begins an episode, so action 0 ended one. Environment 1: the last action ended
    # one, and that obs[0] began one changes nothing. gamma lambda = 0.25.
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    values = torch.tensor([[0.5, 0.5], [1.0, 1.0], [2.0, 2.0]])
    dones = torch.tensor([[False, True], [True, False], [False, False]])
    next_value = torch.tensor([4.0, 4.0])
    next_done = torch.tensor([False, True])
    advantages, returns = script.compute_gae(rewards, values, dones, next_value, next_done, 0.5, 0.5)
    # 0: 3 + 0.5 * 4 - 2 = 3;  2 + 0.5 * 2 - 1 + 0.25 * 3 = 2.75;  1 - 0.5 = 0.5
    # 1: 3 - 2 = 1;  2 + 0.5 * 2 - 1 + 0.25 * 1 = 2.25;  1 + 0.5 * 1 - 0.5 + 0.25 * 2.25 = 1.5625
    expected = torch.tensor([[0.5, 1.5625], [2.75, 2.25], [3.0, 1.0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


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
    torch.manual_seed(0)
    rewards = torch.randn(20, 6, dtype=torch.float64)
    values = torch.randn(21, 6, dtype=torch.float64)
    dones = torch.rand(21, 6) < 0.2
    expected = sums_of_deltas(rewards, values, dones[1:], 0.97, 0.9)
    advantages, returns = script.compute_gae(
        rewards, values[:-1], dones[:-1], values[-1], dones[-1], 0.97, 0.9
    )
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(returns, expected + values[:-1], rtol=1e-5, atol=1e-6)
