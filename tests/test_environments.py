"""What meets the environments: rollout, sampling, reward normaliser, episode statistics and evaluation."""

from functools import partial

import gym
import numpy as np
import pytest
import torch
from algorithm import CPU, make_runner, make_small_probes
from common import TINY, make_agents
from gym.wrappers import NormalizeReward
from torch.distributions import Categorical


class Clock:
    """Observations tell the environment and the time, rewards the time and the action that led there; every
    third observation begins an episode. Notes its calls, with the first of its environments."""

    def __init__(self, environments, calls: list):
        self.environments = environments
        self.num = len(environments)
        self.calls = calls
        self.time = 0
        self.reward = np.zeros(self.num, np.float32)

    def act(self, actions):
        assert actions.dtype == np.int32
        assert actions.shape == (self.num,)
        self.calls.append(f"act {self.environments[0]}")
        self.time += 1
        self.reward = (100 * self.time + actions).astype(np.float32)

    def observe(self):
        self.calls.append(f"observe {self.environments[0]}")
        obs = np.full((self.num, 64, 64, 3), 15 * self.time, np.uint8)
        obs[..., 0] = self.environments[:, None, None]
        return self.reward, {"rgb": obs}, np.full(self.num, self.time % 3 == 0)


def runners_of_clocks(script, monkeypatch, num_agents: int, num_envs: int, num_steps: int):
    """Args, the runner of each agent, and the list of calls."""
    calls = []
    made = []

    def make_envs(args, num, *inputs):
        environments = len(made) + np.arange(num)
        made.extend(environments)
        return Clock(environments, calls)

    monkeypatch.setattr(script, "make_envs", make_envs)
    args = script.Args(num_envs=num_envs, num_steps=num_steps, num_minibatches=1, device="cpu")
    runners = [make_runner(script, args, index, num_agents) for index in range(num_agents)]
    calls.clear()
    return args, runners, calls


def test_rollout_aligns_time(script, monkeypatch):
    """rewards[t + 1] is of actions[t]; dones[t] came with obs[t]; no step is left out. The last row only
    bootstraps; the next rollout begins with the same observation and acts on it."""
    args, (runner,), _ = runners_of_clocks(script, monkeypatch, num_agents=1, num_envs=4, num_steps=7)
    (agent,) = make_agents(script, 1)
    data = runner.data
    for start in (0, 7):
        script.rollout([partial(script.act, agent)], [runner], args)
        times = np.arange(start, start + 8)
        in_all = np.stack([times] * 4, axis=1)
        np.testing.assert_array_equal(data.obs[:, :, 5, 5, 1], 15 * in_all)
        np.testing.assert_array_equal(data.obs[:, :, 5, 5, 0], [[0, 1, 2, 3]] * 8)
        np.testing.assert_array_equal(runner.dones, in_all % 3 == 0)
        np.testing.assert_array_equal(runner.rewards[1:], 100 * in_all[1:] + data.actions[:-1].numpy())
        assert len(set(data.actions.flatten().tolist())) > 3  # so that a shift in time would show

        logits, values = agent(data.obs.flatten(0, 1))
        logprobs = Categorical(logits=logits).log_prob(data.actions.flatten())
        # float32, and another size of batch
        torch.testing.assert_close(data.logprobs.flatten(), logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(data.values.flatten(), values, rtol=0, atol=1e-6)
        assert logprobs.std() > 0.01
        assert values.std() > 1e-4


@pytest.mark.parametrize(("num_agents", "num_envs", "sizes"), [(1, 5, [3, 2]), (2, 3, [3, 3])])
def test_rollout_interleaves_groups(script, num_agents, num_envs, sizes, monkeypatch):
    """A group steps in the background while the policy acts for the next one, the same agent's or another's.
    Each agent plays in its own environments."""
    args, runners, calls = runners_of_clocks(script, monkeypatch, num_agents, num_envs, num_steps=2)
    groups = [group for runner in runners for group, _ in runner.groups]
    assert [group.num for group in groups] == sizes

    def policy(number, obs):
        calls.append(f"policy {obs[0, 0, 0, 0]}")
        return torch.full((len(obs),), number), torch.zeros(len(obs)), torch.zeros(len(obs))

    policies = [partial(policy, number) for number in (4, 5)[:num_agents]]
    script.rollout(policies, runners, args)
    observed = [["observe 0", "policy 0"], ["observe 3", "policy 3"]]
    step = [*observed[0], "act 0", *observed[1], "act 3"]
    assert calls == [*step, *step, *observed[0], *observed[1]]
    for runner, number in zip(runners, (4, 5)):
        assert runner.data.actions.unique().tolist() == [number]
        assert (runner.rewards[1] == 100 + number).all()
        assert (runner.rewards[2] == 200 + number).all()


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


def probe_runner(script, monkeypatch, num_agents: int = 2, **settings):
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    args = script.Args(num_minibatches=1, device="cpu", **settings)
    return make_runner(script, args, num_agents=num_agents)


def test_every_episode_that_ends_counts(script, monkeypatch):
    """Also two in the same step, and those that began in the rollout before; returns are raw."""
    runner = probe_runner(script, monkeypatch, num_envs=2, num_steps=3)
    runner.rewards[:] = [[9, 9], [1, 2], [3, 4], [5, 6]]  # the first row is the last rollout's
    runner.dones[:] = [[1, 1], [0, 0], [1, 1], [0, 1]]
    runner.finish_rollout()
    assert runner.train_return == pytest.approx((4 + 6 + 6) / 3)
    assert runner.scalars["charts/episodic_return"] == runner.train_return
    assert runner.scalars["charts/episodic_length"] == pytest.approx((2 + 2 + 1) / 3)
    runner.rewards[:] = [[5, 6], [7, 8], [1, 1], [1, 1]]
    runner.dones[:] = [[0, 1], [1, 0], [0, 0], [0, 1]]
    runner.finish_rollout()
    assert runner.scalars["charts/episodic_return"] == pytest.approx((12 + 10) / 2)
    assert runner.scalars["charts/episodic_length"] == pytest.approx((2 + 3) / 2)


def test_without_an_episode_there_is_no_point(script, monkeypatch):
    """The last return stays known, for the gap to the test."""
    runner = probe_runner(script, monkeypatch, num_envs=2, num_steps=3)
    runner.rewards[:] = 2.0
    runner.dones[:] = False
    runner.finish_rollout()
    assert np.isnan(runner.train_return)
    runner.dones[3] = True
    runner.finish_rollout()
    runner.dones[:] = False
    runner.finish_rollout()
    assert runner.train_return == 12.0
    assert runner.scalars.keys() == {"losses/explained_variance"}


class Replay(gym.Env):
    """A vector environment that plays a record back."""

    is_vector_env = True

    def __init__(self, rewards, dones):
        self.num_envs = rewards.shape[1]
        self.record = zip(rewards, dones)

    def step(self, action):
        reward, done = next(self.record)
        return None, reward, done, {}


def test_finish_rollout_estimates_advantages(script, monkeypatch):
    """From rewards[1:], normalised as gym does and clipped at 10, and values[:-1] with the last as bootstrap,
    into the flattened batch. The first rollout ends in the middle of episodes."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(80, 16)) * (rng.random((80, 16)) < 0.2)
    rewards[70, :2] = [100, -100]
    dones = rng.random((80, 16)) < 0.1
    reference = NormalizeReward(Replay(rewards, dones), gamma=0.9)
    normalized = np.array([reference.step(None)[1] for _ in rewards])
    assert (np.abs(normalized) > 11).sum() == 2
    normalized = torch.from_numpy(normalized).float().clamp(-10, 10)
    settings = {"num_envs": 16, "num_steps": 40, "gamma": 0.9, "gae_lambda": 0.8}
    runner = probe_runner(script, monkeypatch, **settings)
    torch.manual_seed(0)
    for rows in (slice(40), slice(40, 80)):
        values = torch.randn(41, 16)
        runner.data.values[:] = values
        runner.rewards[1:] = rewards[rows]
        runner.dones[1:] = dones[rows]
        runner.finish_rollout()
        firsts = torch.from_numpy(runner.dones)
        advantages, returns = script.compute_gae(
            normalized[rows], values[:-1], firsts[:-1], values[-1], firsts[-1], 0.9, 0.8
        )
        found = runner.batch.rows(slice(40 * 16))
        torch.testing.assert_close(found.advantages, advantages.flatten())
        torch.testing.assert_close(found.returns, returns.flatten())
        torch.testing.assert_close(found.values, values[:-1].flatten())
        explained = 1 - (returns - values[:-1]).var() / returns.var()
        assert runner.scalars["losses/explained_variance"] == pytest.approx(explained.item(), rel=1e-4)


class FixedEpisodes:
    """Environment i has episodes of lengths[i] steps. Each step pays 1, the last of an episode 100 times the
    episode's number besides, and the observation that begins it came with 1000."""

    def __init__(self, *lengths: int):
        self.num = len(lengths)
        self.lengths = np.array(lengths)
        self.clock = np.zeros(self.num, int)
        self.number = np.zeros(self.num, int)
        self.reward = np.full(self.num, 1000.0)
        self.first = np.ones(self.num, bool)
        self.steps = 0

    def act(self, actions):
        assert actions.dtype == np.int32
        assert actions.tolist() == [4] * self.num
        self.steps += 1
        self.clock += 1
        self.first = self.clock == self.lengths
        self.reward = 1.0 + 100 * self.number * self.first
        self.number += self.first
        self.clock[self.first] = 0

    def observe(self):
        obs = np.zeros((self.num, 64, 64, 3), np.uint8)
        return self.reward.astype(np.float32), {"rgb": obs}, self.first


def always_4(obs):
    return torch.full((len(obs),), 4), None, None


def test_evaluate_plays_one_whole_episode_in_each_environment(script, monkeypatch):
    """First come, first served would take short episodes alone. Each agent plays by itself."""
    made = []

    def make_envs(*inputs):
        made.append((inputs, FixedEpisodes(2, 10, 3)))
        return made[-1][1]

    monkeypatch.setattr(script, "make_envs", make_envs)
    args = script.Args(seed=7, device="cpu")
    returns = script.evaluate([always_4, always_4], args, 3, (5, 6), 2**31 - 4, CPU, [])
    assert returns.tolist() == [[2, 10, 3]] * 2
    assert [envs.steps for _, envs in made] == [10, 10]
    # The number of environments, of levels, the first of them, and a seed that Procgen takes.
    assert [inputs for inputs, _ in made] == [(args, 3, 5, 6, 3)] * 2


@pytest.mark.parametrize("signal_number", [2, 15])
def test_evaluate_stops_at_once(script, monkeypatch, signal_number):
    envs = FixedEpisodes(2, 10)
    stop = []

    def policy(obs):
        if envs.steps == 1:
            stop.append(signal_number)
        return always_4(obs)

    monkeypatch.setattr(script, "make_envs", lambda *inputs: envs)
    with pytest.raises(SystemExit) as end:
        script.evaluate([policy], script.Args(device="cpu"), 2, (0, 0), 0, CPU, stop)
    assert end.value.code == 128 + signal_number
    assert envs.steps == 2


def test_evaluate_draws_nothing_from_the_training(script, monkeypatch):
    """A run with tests trains as one without."""

    def policy(obs):
        torch.randn(3)
        return always_4(obs)

    monkeypatch.setattr(script, "make_envs", lambda *inputs: FixedEpisodes(2, 10))
    before = torch.get_rng_state()
    script.evaluate([policy], script.Args(device="cpu"), 2, (0, 0), 0, CPU, [])
    assert torch.equal(torch.get_rng_state(), before)


def levels_of(envs) -> list[int]:
    return [info["level_seed"] for info in envs.get_info()]


def first_levels_and_obs(script, rand_seed=5, num_levels=0, start_level=0, **settings):
    envs = script.make_envs(script.Args(device="cpu", **settings), 64, num_levels, start_level, rand_seed)
    _, obs, first = envs.observe()
    levels = levels_of(envs)
    envs.close()
    assert first.all()
    return levels, obs["rgb"]


def test_make_envs_takes_levels_and_seed(script):
    levels, obs = first_levels_and_obs(script, num_levels=3, start_level=7)
    assert set(levels) == {7, 8, 9}
    assert obs.shape == (64, 64, 64, 3)
    assert obs.dtype == np.uint8
    everything, _ = first_levels_and_obs(script)
    assert len(set(everything)) == 64
    assert first_levels_and_obs(script)[0] == everything
    assert not set(first_levels_and_obs(script, rand_seed=6)[0]) & set(everything)


def test_make_envs_takes_game_and_mode(script):
    _, hard = first_levels_and_obs(script, num_levels=1, env_id="maze")
    _, easy = first_levels_and_obs(script, num_levels=1, env_id="maze", distribution_mode="easy")
    _, other = first_levels_and_obs(script, num_levels=1, env_id="miner")
    assert (hard != easy).any()
    assert (hard != other).any()


@pytest.mark.parametrize("num_agents", [1, 2])
def test_training_is_on_the_training_levels(script, num_agents):
    settings = TINY | {"num_envs": 16, "num_levels": 3, "start_level": 7}
    runner = make_runner(script, script.Args(**settings), num_agents=num_agents)
    levels = [level for envs, _ in runner.groups for level in levels_of(envs)]
    assert len(levels) == 16
    assert set(levels) == {7, 8, 9}


@pytest.mark.parametrize(("num_envs", "sizes"), [(1, [1]), (2, [1, 1]), (8, [4, 4])])
def test_a_single_agent_has_two_groups(script, num_envs, sizes, monkeypatch):
    """If there are two environments."""
    runner = probe_runner(script, monkeypatch, num_agents=1, num_envs=num_envs)
    assert [envs.num for envs, _ in runner.groups] == sizes


def test_agents_and_groups_have_seeds_of_their_own(script):
    """No two sets of environments of a run, nor of runs with other seeds, play the same levels."""
    sets = []
    for seed in (1, 2):
        args = script.Args(**(TINY | {"num_envs": 16, "num_levels": 0, "seed": seed}))
        runners = [make_runner(script, args, index) for index in range(2)]
        runners.append(make_runner(script, args, num_agents=1))
        for runner in runners:
            sets += [tuple(levels_of(envs)[:8]) for envs, _ in runner.groups]
    assert len(sets) == 8
    assert len(set(sets)) == 6  # the lone agent's first group has the first agent's seed
