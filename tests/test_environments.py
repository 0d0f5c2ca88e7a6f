"""What meets the environments: reward normaliser, rollout, sampling, episode statistics and evaluation."""

import importlib
from functools import partial

import gym
import numpy as np
import pytest
import torch
from common import SCRIPTS, make_agents, make_probes, make_runner
from gym.wrappers import NormalizeReward

CPU = torch.device("cpu")


def random_policy(obs):
    return torch.randint(15, (len(obs),)), None, None


@pytest.fixture(scope="session")
def recorded():
    """Rewards of random play in fruitbot and whether they ended an episode, both (300, 16)."""
    script = importlib.import_module(SCRIPTS[0])
    envs = script.make_envs(script.Args(env_id="fruitbot", device="cpu"), 16, 500, 0, rand_seed=1)
    torch.manual_seed(0)
    rewards, dones = [], []
    for _ in range(300):
        envs.act(torch.randint(15, (16,)).numpy().astype(np.int32))
        reward, _, done = envs.observe()
        rewards.append(reward.copy())
        dones.append(done.copy())
    envs.close()
    rewards, dones = np.array(rewards), np.array(dones)
    assert (rewards > 0).sum() > 20 and (rewards < 0).sum() > 20 and dones.sum() > 50
    return rewards, dones


class Replay(gym.Env):
    """A vector environment that plays a record back."""

    is_vector_env = True

    def __init__(self, rewards, dones):
        self.num_envs, self.record = rewards.shape[1], zip(rewards, dones)

    def step(self, action):
        reward, done = next(self.record)
        return None, reward, done, {}


@pytest.mark.parametrize("gamma", [0.999, 0.9])
def test_normalizer_is_that_of_gym(script, recorded, gamma):
    rewards, dones = recorded
    reference = NormalizeReward(Replay(rewards, dones), gamma=gamma)
    expected = np.array([reference.step(None)[1] for _ in rewards])
    normalized = script.RewardNormalizer(rewards.shape[1], gamma)(rewards, dones)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized, expected.clip(-10, 10), rtol=1e-6, atol=1e-6)


def test_normalizer_clips_at_10(script):
    """One reward among 1000 environments is some 30 standard deviations."""
    rewards = np.zeros((2, 1000), np.float32)
    rewards[0, 0], rewards[1, 1] = 5.0, -5.0
    normalized = script.RewardNormalizer(1000, 0.999)(rewards, np.zeros(rewards.shape, bool))
    assert normalized[0, 0] == 10 and normalized[1, 1] == -10


def test_normalizer_goes_on_from_rollout_to_rollout(script, recorded):
    rewards, dones = recorded
    at_once = script.RewardNormalizer(16, 0.999)(rewards, dones)
    normalizer = script.RewardNormalizer(16, 0.999)
    parts = [slice(0, 64), slice(64, 65), slice(65, 300)]
    in_parts = np.concatenate([normalizer(rewards[part], dones[part]) for part in parts])
    np.testing.assert_array_equal(in_parts, at_once)


class Clock:
    """Observations tell the time and the environment, rewards the time and the action that led there; every
    third observation begins an episode. Notes its calls."""

    def __init__(self, num: int, name: str, calls: list):
        self.num, self.name, self.calls = num, name, calls
        self.time, self.reward = 0, np.zeros(num, np.float32)

    def act(self, actions):
        assert actions.dtype == np.int32 and actions.shape == (self.num,)
        self.calls.append(f"act {self.name}")
        self.time += 1
        self.reward = (100 * self.time + actions).astype(np.float32)

    def observe(self):
        self.calls.append(f"observe {self.name}")
        obs = np.full((self.num, 64, 64, 3), 15 * self.time, np.uint8)
        obs[:, :, :, 0] = 100 * np.arange(self.num)[:, None, None]
        return self.reward, {"rgb": obs}, np.full(self.num, self.time % 3 == 0)


def empty_data(script, num_steps: int, num: int):
    zeros = partial(torch.zeros, num_steps + 1, num)
    columns = {name: zeros() for name in script.Batch._fields}
    columns |= {"obs": zeros(64, 64, 3, dtype=torch.uint8), "actions": zeros(dtype=torch.int64)}
    return script.Batch(**columns)


def empty_group(script, policy, envs, data):
    rewards, dones = (np.zeros(data.values.shape, kind) for kind in (np.float32, bool))
    return script.Group(policy, envs, data, rewards, dones)


def play(script, num_steps=7, num=2, rollouts=1):
    torch.manual_seed(0)
    (agent,) = make_agents(script, 1)
    envs, data = Clock(num, "1", []), empty_data(script, num_steps, num)
    group = empty_group(script, partial(script.act, agent), envs, data)
    for _ in range(rollouts):
        script.rollout([group])
    return agent, envs, data, group.rewards, group.dones


def test_rollout_aligns_time(script):
    """rewards[t + 1] is of actions[t]; dones[t] came with obs[t]; no step is left out."""
    _, envs, data, rewards, dones = play(script)
    assert data.obs.dtype == torch.uint8 and rewards.dtype == np.float32 and dones.dtype == bool
    assert rewards.shape == dones.shape == (8, 2)
    times = np.arange(8)
    np.testing.assert_array_equal(data.obs[:, :, 5, 5, 1], np.stack([15 * times] * 2, axis=1))
    np.testing.assert_array_equal(data.obs[:, :, 5, 5, 0], [[0, 100]] * 8)
    np.testing.assert_array_equal(dones, np.stack([times % 3 == 0] * 2, axis=1))
    np.testing.assert_array_equal(rewards[1:], 100 * times[1:, None] + data.actions[:-1].numpy())
    assert len(set(data.actions.flatten().tolist())) > 3  # so that a shift in time would show
    assert envs.time == 7


def test_rollout_stores_what_the_policy_said_at_obs(script):
    agent, _, data, _, _ = play(script)
    with torch.no_grad():
        logits, values = agent(data.obs.flatten(0, 1))
    expected = torch.distributions.Categorical(logits=logits).log_prob(data.actions.flatten())
    torch.testing.assert_close(data.logprobs.flatten(), expected)
    # The last row's too: it bootstraps.
    torch.testing.assert_close(data.values.flatten(), values, rtol=0, atol=1e-6)
    assert expected.std() > 0.01 and values.std() > 1e-4


def test_rollouts_join(script):
    """The last row only bootstraps; the next rollout begins with the same observation and acts on it."""
    _, envs, data, rewards, _ = play(script, rollouts=2)
    assert data.obs[:, 0, 5, 5, 1].tolist() == list(range(105, 225, 15)) and envs.time == 14
    np.testing.assert_array_equal(rewards[1:], 100 * np.arange(8, 15)[:, None] + data.actions[:-1].numpy())


def test_rollout_interleaves_groups(script):
    """A group steps in the background while the policy of the next one is at work."""
    calls = []

    def policy(name, obs):
        calls.append(f"policy {name}")
        return torch.full((len(obs),), int(name)), torch.zeros(len(obs)), torch.zeros(len(obs))

    groups = [
        empty_group(script, partial(policy, name), Clock(num, name, calls), empty_data(script, 2, num))
        for num, name in ((2, "1"), (3, "2"))
    ]
    script.rollout(groups)
    step = ["observe 1", "policy 1", "act 1", "observe 2", "policy 2", "act 2"]
    assert calls == 2 * step + [call for call in step if not call.startswith("act")]
    assert all((group.rewards[1:] // 100 == [[1], [2]]).all() for group in groups)
    assert [group.data.actions.unique().tolist() for group in groups] == [[1], [2]]


def test_act_samples_the_policy(script):
    num = 50_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 1.5, -50.0])
    values = torch.arange(float(num))
    torch.manual_seed(0)
    actions, logprobs, stored = script.act(lambda obs: (logits.expand(num, -1), values), None)
    probs = logits.softmax(-1)
    counts = actions.bincount(minlength=7)
    chi_square = ((counts - num * probs) ** 2 / (num * probs))[:6].sum()
    assert chi_square < 20.5  # the 0.1 % point for 5 degrees of freedom
    assert counts[6] == 0
    torch.testing.assert_close(logprobs, probs.log()[actions])
    assert torch.equal(stored, values)


def test_act_keeps_no_graph(script):
    (agent,) = make_agents(script, 1)
    results = script.act(agent, torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert not any(result.requires_grad for result in results)


def probe_runner(script, tmp_path, monkeypatch, **settings):
    monkeypatch.setattr(script, "make_envs", make_probes)
    args = script.Args(num_minibatches=1, total_timesteps=1000, channels=(4, 4, 4), device="cpu", **settings)
    return make_runner(script, args, tmp_path)


def test_every_episode_that_ends_counts(script, tmp_path, monkeypatch):
    """Also two in the same step, and those that began in the rollout before; returns are raw."""
    runner = probe_runner(script, tmp_path, monkeypatch, num_envs=2, num_steps=3)
    runner.rewards[:] = [[9, 9], [1, 2], [3, 4], [5, 6]]  # the first row is the last rollout's
    runner.dones[:] = [[1, 1], [0, 0], [1, 1], [0, 1]]
    first = runner.finish_rollout()
    runner.rewards[:] = [[5, 6], [7, 8], [1, 1], [1, 1]]
    runner.dones[:] = [[0, 1], [1, 0], [0, 0], [0, 1]]
    second = runner.finish_rollout()
    runner.close()
    assert first.tolist() == [[4, 6, 6], [2, 2, 1]]
    assert second.tolist() == [[12, 10], [2, 3]]


def test_finish_rollout_estimates_advantages(script, tmp_path, monkeypatch, recorded):
    """From normalised rewards[1:], values[:-1] with the last as bootstrap, and into the flattened batch."""
    runner = probe_runner(script, tmp_path, monkeypatch, num_envs=16, num_steps=40)
    torch.manual_seed(0)
    runner.data.values[:] = torch.randn(41, 16)
    rewards, dones = (each[:41] for each in recorded)
    runner.rewards[:], runner.dones[:] = rewards, dones
    runner.finish_rollout()
    runner.close()
    normalized = script.RewardNormalizer(16, 0.999)(rewards[1:], dones[1:])
    values, firsts = runner.data.values, torch.from_numpy(dones)
    advantages, returns = script.compute_gae(
        torch.from_numpy(normalized), values[:-1], firsts[:-1], values[-1], firsts[-1], 0.999, 0.95
    )
    torch.testing.assert_close(runner.batch.advantages, advantages.flatten())
    torch.testing.assert_close(runner.batch.returns, returns.flatten())
    torch.testing.assert_close(runner.batch.values, values[:-1].flatten())


class FixedEpisodes:
    """Environment i has episodes of lengths[i] steps. Each step pays 1, the last of an episode 100 times the
    episode's number besides. Begins within episode 0; ending an episode by force pays 100,000."""

    def __init__(self, *lengths: int):
        self.num, self.lengths = len(lengths), np.array(lengths)
        self.clock, self.number = np.ones(self.num, int), np.zeros(self.num, int)
        self.actions = []

    def act(self, actions):
        assert actions.dtype == np.int32
        self.actions.append(actions.tolist())
        self.clock += 1
        forced = actions == -1
        self.first = forced | (self.clock == self.lengths)
        self.reward = 1.0 + 100 * self.number * self.first + 100_000 * forced
        self.number += self.first
        self.clock[self.first] = 0

    def observe(self):
        obs = np.zeros((self.num, 64, 64, 3), np.uint8)
        return self.reward.astype(np.float32), {"rgb": obs}, self.first


def test_evaluate_takes_a_quota_of_each_environment(script):
    """First come, first served would take short episodes alone."""
    envs = FixedEpisodes(2, 10)
    returns = script.evaluate(random_policy, envs, 2, CPU)
    assert sorted(returns.tolist()) == [102, 110, 202, 210]  # the first two whole episodes of each
    assert script.evaluate(random_policy, FixedEpisodes(3, 3, 5), 1, CPU).tolist() == [103, 103, 105]


def test_evaluate_begins_with_new_episodes(script):
    envs = FixedEpisodes(2, 10)
    script.evaluate(random_policy, envs, 2, CPU)
    assert envs.actions[0] == [-1, -1] and not any(-1 in actions for actions in envs.actions[1:])
    # Environment 0 played episodes 1 to 10 meanwhile; number 11 and the other's number 3 are cut off.
    second = script.evaluate(random_policy, envs, 2, CPU)
    assert sorted(second.tolist()) == [410, 510, 1202, 1302]


class Recorder:
    """Notes the levels that begin and whether the first observation after the action -1 begins an episode."""

    def __init__(self, envs):
        self.envs, self.num, self.levels, self.firsts_after_end = envs, envs.num, [], []

    def act(self, actions):
        self.forced = (actions == -1).all()
        self.envs.act(actions)

    def observe(self):
        reward, obs, first = self.envs.observe()
        infos = self.envs.get_info()
        self.levels += [info["level_seed"] for info, begins in zip(infos, first) if begins]
        if self.forced:
            self.firsts_after_end.append(first.all())
        return reward, obs, first


def test_levels_go_on_from_test_to_test(script):
    args = script.Args(env_id="fruitbot", device="cpu")
    envs = script.make_envs(args, 3, 0, 0, rand_seed=5)
    recorder = Recorder(envs)
    torch.manual_seed(0)
    script.evaluate(random_policy, recorder, 1, CPU)
    first_levels = set(recorder.levels)
    recorder.levels.clear()
    script.evaluate(random_policy, recorder, 1, CPU)
    envs.close()
    assert recorder.firsts_after_end == [True, True]
    assert len(first_levels) >= 3 and len(recorder.levels) >= 3
    assert not first_levels & set(recorder.levels)


def first_levels_and_obs(script, rand_seed=5, num_levels=0, start_level=0, **settings):
    envs = script.make_envs(script.Args(device="cpu", **settings), 64, num_levels, start_level, rand_seed)
    _, obs, first = envs.observe()
    levels = [info["level_seed"] for info in envs.get_info()]
    envs.close()
    assert first.all()
    return levels, obs["rgb"]


def test_make_envs_takes_levels_and_seed(script):
    levels, obs = first_levels_and_obs(script, num_levels=3, start_level=7)
    assert set(levels) == {7, 8, 9}
    assert obs.shape == (64, 64, 64, 3) and obs.dtype == np.uint8
    everything, _ = first_levels_and_obs(script)
    assert len(set(everything)) == 64
    assert first_levels_and_obs(script)[0] == everything
    assert not set(first_levels_and_obs(script, rand_seed=6)[0]) & set(everything)


def test_make_envs_takes_game_and_mode(script):
    _, hard = first_levels_and_obs(script, num_levels=1, env_id="maze")
    _, easy = first_levels_and_obs(script, num_levels=1, env_id="maze", distribution_mode="easy")
    _, other = first_levels_and_obs(script, num_levels=1, env_id="miner")
    assert (hard != easy).any() and (hard != other).any()
