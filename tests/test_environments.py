"""What meets the environments: reward normaliser, rollout, sampling, episode statistics and evaluation."""

import importlib
from functools import partial
from types import SimpleNamespace

import gym
import numpy as np
import pytest
import torch
from algorithm import CPU, make_runner, make_small_probes
from common import SCRIPTS, TINY, make_agents
from gym.wrappers import NormalizeReward


@pytest.fixture(scope="session")
def recorded():
    """Rewards of random play in fruitbot and whether they ended an episode, both (300, 16)."""
    script = importlib.import_module(SCRIPTS[0])
    envs = script.make_envs(script.Args(env_id="fruitbot", device="cpu"), 16, 500, 0, rand_seed=1)
    torch.manual_seed(0)
    rewards = np.zeros((300, 16), np.float32)
    dones = np.zeros((300, 16), bool)
    for step in range(300):
        envs.act(torch.randint(15, (16,)).numpy().astype(np.int32))
        rewards[step], _, dones[step] = envs.observe()
    envs.close()
    assert (rewards > 0).sum() > 20
    assert (rewards < 0).sum() > 20
    assert dones.sum() > 50
    return rewards, dones


class Replay(gym.Env):
    """A vector environment that plays a record back."""

    is_vector_env = True

    def __init__(self, rewards, dones):
        self.num_envs = rewards.shape[1]
        self.record = zip(rewards, dones)

    def step(self, action):
        reward, done = next(self.record)
        return None, reward, done, {}


def normalize(runner, rewards, dones):
    """The rewards of a rollout as the runner normalises them: without values and with lambda 0 they are the
    advantages. rewards and dones have a row for each step."""
    runner.data.values.zero_()
    runner.rewards[1:] = rewards
    runner.dones[1:] = dones
    runner.finish_rollout()
    return runner.data.advantages[:-1].numpy()


def normalizer(script, monkeypatch, num_steps: int, num_envs: int, gamma: float = 0.999):
    return probe_runner(
        script, monkeypatch, num_steps=num_steps, num_envs=num_envs, gamma=gamma, gae_lambda=0.0
    )


@pytest.mark.parametrize("gamma", [0.999, 0.9])
def test_rewards_are_normalised_as_gym_does(script, recorded, gamma, monkeypatch):
    """From rollout to rollout, of which the first ends in the middle of episodes."""
    rewards, dones = recorded
    reference = NormalizeReward(Replay(rewards, dones), gamma=gamma)
    expected = np.array([reference.step(None)[1] for _ in rewards])
    runner = normalizer(script, monkeypatch, 150, 16, gamma)
    for rows in (slice(150), slice(150, 300)):
        normalized = normalize(runner, rewards[rows], dones[rows])
        np.testing.assert_allclose(normalized, expected[rows].clip(-10, 10), rtol=1e-6, atol=1e-6)


def test_normalised_rewards_are_clipped_at_10(script, monkeypatch):
    """One reward among 1000 environments is some 30 standard deviations."""
    rewards = np.zeros((2, 1000))
    rewards[0, 0] = 5.0
    rewards[1, 1] = -5.0
    runner = normalizer(script, monkeypatch, 2, 1000)
    normalized = normalize(runner, rewards, np.zeros(rewards.shape, bool))
    assert normalized[0, 0] == 10
    assert normalized[1, 1] == -10


class Clock:
    """Observations tell the time and the environment, rewards the time and the action that led there; every
    third observation begins an episode. Notes its calls."""

    def __init__(self, num: int, calls: list):
        self.num = num
        self.calls = calls
        self.time = 0
        self.reward = np.zeros(num, np.float32)

    def act(self, actions):
        assert actions.dtype == np.int32
        assert actions.shape == (self.num,)
        self.calls.append(f"act of {self.num}")
        self.time += 1
        self.reward = (100 * self.time + actions).astype(np.float32)

    def observe(self):
        self.calls.append(f"observe {self.num}")
        obs = np.full((self.num, 64, 64, 3), 15 * self.time, np.uint8)
        obs[:, :, :, 0] = 100 * np.arange(self.num)[:, None, None]
        return self.reward, {"rgb": obs}, np.full(self.num, self.time % 3 == 0)


def runner_of(script, num_steps: int, *groups):
    """As much of a runner as a rollout needs: these environments, and columns for them, all zero."""
    num_envs = sum(envs.num for envs in groups)
    shape = (num_steps + 1, num_envs)
    columns = {name: torch.zeros(shape) for name in script.Batch._fields}
    columns["obs"] = torch.zeros(*shape, 64, 64, 3, dtype=torch.uint8)
    columns["actions"] = torch.zeros(shape, dtype=torch.int64)
    with_columns = []
    first = 0
    for envs in groups:
        with_columns.append((envs, slice(first, first + envs.num)))
        first += envs.num
    data = script.Batch(**columns)
    rewards = np.zeros(shape)
    return SimpleNamespace(groups=with_columns, data=data, rewards=rewards, dones=np.zeros(shape, bool))


def play(script, num_steps=7, num=2, rollouts=1):
    """Returns the agent, its environments and the runner."""
    torch.manual_seed(0)
    (agent,) = make_agents(script, 1)
    envs = Clock(num, [])
    runner = runner_of(script, num_steps, envs)
    for _ in range(rollouts):
        script.rollout([partial(script.act, agent)], [runner], SimpleNamespace(num_steps=num_steps))
    return agent, envs, runner


def test_rollout_aligns_time(script):
    """rewards[t + 1] is of actions[t]; dones[t] came with obs[t]; no step is left out."""
    _, envs, runner = play(script)
    data = runner.data
    times = np.arange(8)
    in_both = np.stack([times, times], axis=1)
    assert data.obs.dtype == torch.uint8
    np.testing.assert_array_equal(data.obs[:, :, 5, 5, 1], 15 * in_both)
    np.testing.assert_array_equal(data.obs[:, :, 5, 5, 0], [[0, 100]] * 8)
    np.testing.assert_array_equal(runner.dones, in_both % 3 == 0)
    np.testing.assert_array_equal(runner.rewards[1:], 100 * in_both[1:] + data.actions[:-1].numpy())
    assert len(set(data.actions.flatten().tolist())) > 3  # so that a shift in time would show
    assert envs.time == 7


def test_rollout_stores_what_the_policy_said_at_obs(script):
    agent, _, runner = play(script)
    data = runner.data
    with torch.no_grad():
        logits, values = agent(data.obs.flatten(0, 1))
    expected = torch.distributions.Categorical(logits=logits).log_prob(data.actions.flatten())
    # float32, and another size of batch
    torch.testing.assert_close(data.logprobs.flatten(), expected, rtol=1e-4, atol=1e-5)
    # The last row's too: it bootstraps.
    torch.testing.assert_close(data.values.flatten(), values, rtol=0, atol=1e-6)
    assert expected.std() > 0.01
    assert values.std() > 1e-4


def test_rollouts_join(script):
    """The last row only bootstraps; the next rollout begins with the same observation and acts on it."""
    _, envs, runner = play(script, rollouts=2)
    assert runner.data.obs[:, 0, 5, 5, 1].tolist() == list(range(105, 225, 15))
    assert envs.time == 14
    expected = 100 * np.arange(8, 15)[:, None] + runner.data.actions[:-1].numpy()
    np.testing.assert_array_equal(runner.rewards[1:], expected)


@pytest.mark.parametrize("num_runners", [1, 2])
def test_rollout_interleaves_groups(script, num_runners):
    """A group steps in the background while the policy acts for the next one, the same agent's or another's.
    Each agent plays in its own environments."""
    calls = []

    def policy(number, obs):
        calls.append(f"policy for {len(obs)}")
        return torch.full((len(obs),), number), torch.zeros(len(obs)), torch.zeros(len(obs))

    groups = [Clock(num, calls) for num in (2, 3)]
    runners = [runner_of(script, 2, *groups)]
    policies = [partial(policy, 4)]
    if num_runners == 2:
        runners = [runner_of(script, 2, envs) for envs in groups]
        policies.append(partial(policy, 5))
    script.rollout(policies, runners, SimpleNamespace(num_steps=2))
    observed = [["observe 2", "policy for 2"], ["observe 3", "policy for 3"]]
    step = [*observed[0], "act of 2", *observed[1], "act of 3"]
    assert calls == [*step, *step, *observed[0], *observed[1]]
    for runner, number in zip(runners, [4, 5]):
        assert runner.data.actions.unique().tolist() == [number]
        for envs, columns in runner.groups:
            assert runner.rewards[1:, columns].tolist() == [
                [100.0 + number] * envs.num,
                [200.0 + number] * envs.num,
            ]


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


def probe_runner(script, monkeypatch, **settings):
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    settings |= {"num_minibatches": 1, "total_timesteps": 10_000, "device": "cpu"}
    return make_runner(script, script.Args(**settings))


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


def test_finish_rollout_estimates_advantages(script, monkeypatch, recorded):
    """From normalised rewards[1:], values[:-1] with the last as bootstrap, and into the flattened batch."""
    alone = normalizer(script, monkeypatch, 40, 16)
    runner = probe_runner(script, monkeypatch, num_envs=16, num_steps=40)
    torch.manual_seed(0)
    for begin in (0, 40):
        rewards, dones = (each[begin : begin + 41] for each in recorded)
        runner.data.values[:] = torch.randn(41, 16)
        runner.rewards[:] = rewards
        runner.dones[:] = dones
        runner.finish_rollout()
        normalized = torch.from_numpy(normalize(alone, rewards[1:], dones[1:]))
        values = runner.data.values
        firsts = torch.from_numpy(dones)
        advantages, returns = script.compute_gae(
            normalized, values[:-1], firsts[:-1], values[-1], firsts[-1], 0.999, 0.95
        )
        rows = slice(runner.args.batch_size)
        torch.testing.assert_close(runner.batch.advantages[rows], advantages.flatten())
        torch.testing.assert_close(runner.batch.returns[rows], returns.flatten())
        torch.testing.assert_close(runner.batch.values[rows], values[:-1].flatten())


def test_explained_variance_is_of_the_returns(script, monkeypatch):
    """1 - Var(returns - values) / Var(returns)."""
    runner = probe_runner(script, monkeypatch, num_envs=4, num_steps=8)
    torch.manual_seed(0)
    runner.data.values[:] = 3 * torch.randn(9, 4)
    runner.rewards[:] = np.random.default_rng(0).normal(size=(9, 4))
    runner.finish_rollout()
    returns = runner.batch.returns[:32].double()
    values = runner.batch.values[:32].double()
    expected = 1 - (returns - values).var() / returns.var()
    assert abs(expected) > 0.01
    assert runner.scalars["losses/explained_variance"] == pytest.approx(expected.item(), rel=1e-4)


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


def levels_in_tests(script, monkeypatch, levels, *steps, num_agents=1) -> list[list[int]]:
    """Those that each agent begins with in a test after so many steps."""
    found = []
    make_envs = script.make_envs

    def make_and_look(*inputs):
        envs = make_envs(*inputs)
        found.append(levels_of(envs))
        return envs

    policy = partial(torch.randint, 15)
    args = script.Args(**TINY)
    with monkeypatch.context() as patch:
        patch.setattr(script, "make_envs", make_and_look)
        for step in steps:
            policies = [lambda obs: (policy((len(obs),)), None, None)] * num_agents
            script.evaluate(policies, args, 8, levels, step, CPU, [])
    return found


def test_each_test_plays_other_levels(script, monkeypatch):
    """The agents of a run the same, so that they can be compared, and a test that is made anew its own."""
    first, peer, second, _ = levels_in_tests(script, monkeypatch, (0, 0), 64, 128, num_agents=2)
    assert len(set(first + second)) == 16
    assert peer == first
    assert levels_in_tests(script, monkeypatch, (0, 0), 128) == [second]
    (training,) = levels_in_tests(script, monkeypatch, (3, 7), 64)
    assert set(training) == {7, 8, 9}


@pytest.mark.parametrize("num_agents", [1, 2])
def test_training_is_on_the_training_levels(script, num_agents):
    settings = TINY | {"num_envs": 16, "num_levels": 3, "start_level": 7}
    runner = make_runner(script, script.Args(**settings), num_agents=num_agents)
    levels = [level for envs, _ in runner.groups for level in levels_of(envs)]
    assert len(levels) == 16
    assert set(levels) == {7, 8, 9}


@pytest.mark.parametrize(("num_envs", "sizes"), [(1, [1]), (2, [1, 1]), (5, [3, 2]), (8, [4, 4])])
def test_two_groups_fill_the_columns_of_one_batch(script, num_envs, sizes):
    """A single agent's, with seeds of their own, one reward normaliser and one list of episodes."""
    args = script.Args(**(TINY | {"num_envs": num_envs, "num_steps": 100, "total_timesteps": 1000}))
    runner = make_runner(script, args, num_agents=1)
    assert [envs.num for envs, _ in runner.groups] == sizes

    def brightness(obs):
        return obs.float().mean((1, 2, 3))

    def policy(obs):
        return torch.full((len(obs),), 5), brightness(obs), brightness(obs)

    script.rollout([policy], [runner], args)
    assert (runner.data.actions == 5).all()
    assert len(set(brightness(runner.data.obs[0]).tolist())) > num_envs // 2
    torch.testing.assert_close(runner.data.values, runner.data.obs.float().mean((2, 3, 4)))
    ends = runner.dones[1:].sum(axis=0)
    steps = [100 - np.flatnonzero([True, *done])[-1] for done in runner.dones[1:].T]
    runner.finish_rollout()
    assert ends.sum() > 0
    assert runner.scalars["charts/episodic_length"] * ends.sum() == pytest.approx(100 * num_envs - sum(steps))
    assert runner.statistics.count == pytest.approx(100 * num_envs, abs=0.01)


def test_agents_and_groups_have_seeds_of_their_own(script):
    """No two sets of environments of a run, nor of runs with other seeds, play the same levels."""
    sets = []
    for seed in (1, 2):
        args = script.Args(**(TINY | {"num_envs": 16, "num_levels": 0, "seed": seed}))
        for index in range(2):
            runner = make_runner(script, args, index)
            sets += [tuple(levels_of(envs)) for envs, _ in runner.groups]
        runner = make_runner(script, args, num_agents=1)
        sets += [tuple(levels_of(envs)) for envs, _ in runner.groups]
    first_levels = [levels[:8] for levels in sets]
    assert len(first_levels) == 8
    assert len(set(first_levels)) == 6  # the lone agent's first group has the first agent's seed
