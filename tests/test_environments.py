"""What meets the environments: reward normaliser, rollout, sampling, episode statistics and evaluation."""

import importlib
import io
from functools import partial
from types import SimpleNamespace

import gym
import numpy as np
import pytest
import torch
from algorithm import CPU, NoProgress, make_runner, make_small_probes
from common import SCRIPTS, TINY, make_agents, read_curves
from gym.wrappers import NormalizeReward
from tqdm import tqdm


def random_policy(obs):
    return torch.randint(15, (len(obs),)), None, None


def evaluate(script, envs, episodes_per_env: int):
    """The script's own, of random play, which nobody stops."""
    with tqdm(disable=True) as bar:
        return script.evaluate(random_policy, envs, episodes_per_env, CPU, script.Stop(), bar)


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
    rewards[0, 0] = 5.0
    rewards[1, 1] = -5.0
    normalized = script.RewardNormalizer(1000, 0.999)(rewards, np.zeros(rewards.shape, bool))
    assert normalized[0, 0] == 10
    assert normalized[1, 1] == -10


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


def empty_group(script, envs, num_steps: int):
    """Columns for a rollout in these environments, all zero."""
    shape = (num_steps + 1, envs.num)
    columns = {name: torch.zeros(shape) for name in script.Batch._fields}
    columns["obs"] = torch.zeros(*shape, 64, 64, 3, dtype=torch.uint8)
    columns["actions"] = torch.zeros(shape, dtype=torch.int64)
    data = script.Batch(**columns)
    return script.EnvGroup(envs, data, np.zeros(shape, np.float32), np.zeros(shape, bool))


def runner_of(*groups):
    """As much of a runner as a rollout needs."""
    return SimpleNamespace(groups=groups, rewards=groups[0].rewards)


def play(script, num_steps=7, num=2, rollouts=1):
    torch.manual_seed(0)
    (agent,) = make_agents(script, 1)
    group = empty_group(script, Clock(num, []), num_steps)
    for _ in range(rollouts):
        script.rollout([partial(script.act, agent)], [runner_of(group)], NoProgress())
    return agent, group


def test_rollout_aligns_time(script):
    """rewards[t + 1] is of actions[t]; dones[t] came with obs[t]; no step is left out."""
    _, (envs, data, rewards, dones) = play(script)
    times = np.arange(8)
    in_both = np.stack([times, times], axis=1)
    assert data.obs.dtype == torch.uint8
    np.testing.assert_array_equal(data.obs[:, :, 5, 5, 1], 15 * in_both)
    np.testing.assert_array_equal(data.obs[:, :, 5, 5, 0], [[0, 100]] * 8)
    np.testing.assert_array_equal(dones, in_both % 3 == 0)
    np.testing.assert_array_equal(rewards[1:], 100 * in_both[1:] + data.actions[:-1].numpy())
    assert len(set(data.actions.flatten().tolist())) > 3  # so that a shift in time would show
    assert envs.time == 7


def test_rollout_stores_what_the_policy_said_at_obs(script):
    agent, (_, data, _, _) = play(script)
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
    _, (envs, data, rewards, _) = play(script, rollouts=2)
    assert data.obs[:, 0, 5, 5, 1].tolist() == list(range(105, 225, 15))
    assert envs.time == 14
    expected = 100 * np.arange(8, 15)[:, None] + data.actions[:-1].numpy()
    np.testing.assert_array_equal(rewards[1:], expected)


@pytest.mark.parametrize("num_runners", [1, 2])
def test_rollout_interleaves_groups(script, num_runners):
    """A group steps in the background while the policy acts for the next one, the same agent's or another's.
    Each agent plays in its own environments."""
    calls = []

    def policy(number, obs):
        calls.append(f"policy for {len(obs)}")
        return torch.full((len(obs),), number), torch.zeros(len(obs)), torch.zeros(len(obs))

    groups = [empty_group(script, Clock(num, calls), 2) for num in (2, 3)]
    runners = [runner_of(*groups)]
    policies = [partial(policy, 4)]
    if num_runners == 2:
        runners = [runner_of(group) for group in groups]
        policies.append(partial(policy, 5))
    script.rollout(policies, runners, NoProgress())
    observed = [["observe 2", "policy for 2"], ["observe 3", "policy for 3"]]
    step = [*observed[0], "act of 2", *observed[1], "act of 3"]
    assert calls == [*step, *step, *observed[0], *observed[1]]
    numbers = [4, 4] if num_runners == 1 else [4, 5]
    for group, number in zip(groups, numbers):
        assert group.data.actions.unique().tolist() == [number]
        assert (group.rewards[1:] == [[100 + number], [200 + number]]).all()


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
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    settings |= {"num_minibatches": 1, "total_timesteps": 1000, "num_eval_envs": 2, "device": "cpu"}
    return make_runner(script, script.Args(**settings), tmp_path)


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
    """From normalised rewards[1:], values[:-1] with the last as bootstrap, and into the flattened batch. The
    normaliser goes on in the second rollout."""
    runner = probe_runner(script, tmp_path, monkeypatch, num_envs=16, num_steps=40)
    normalizer = script.RewardNormalizer(16, 0.999)
    torch.manual_seed(0)
    for begin in (0, 40):
        rewards, dones = (each[begin : begin + 41] for each in recorded)
        runner.data.values[:] = torch.randn(41, 16)
        runner.rewards[:] = rewards
        runner.dones[:] = dones
        runner.finish_rollout()
        normalized = torch.from_numpy(normalizer(rewards[1:], dones[1:]))
        values = runner.data.values
        firsts = torch.from_numpy(dones)
        advantages, returns = script.compute_gae(
            normalized, values[:-1], firsts[:-1], values[-1], firsts[-1], 0.999, 0.95
        )
        torch.testing.assert_close(runner.batch.advantages, advantages.flatten())
        torch.testing.assert_close(runner.batch.returns, returns.flatten())
        torch.testing.assert_close(runner.batch.values, values[:-1].flatten())
    runner.close()


def test_explained_variance_is_of_the_returns(script, tmp_path, monkeypatch):
    """1 - Var(returns - values) / Var(returns): of values that are half the returns, and of twice them."""
    runner = probe_runner(script, tmp_path, monkeypatch, num_envs=4, num_steps=8)
    runner.batch.returns[:] = torch.linspace(-3, 5, 32)
    no_episodes = np.zeros((2, 0))
    for step, factor in enumerate([0.5, 2.0, 3.0]):
        runner.batch.values[:] = factor * runner.batch.returns + 7.0
        runner.log_iteration({}, no_episodes, 1.0, step)
    runner.close()
    curve = read_curves(tmp_path / "agent_1")["losses/explained_variance"]
    assert [curve[0], curve[1], curve[2]] == pytest.approx([0.75, 0.0, -3.0], abs=1e-5)


class FixedEpisodes:
    """Environment i has episodes of lengths[i] steps. Each step pays 1, the last of an episode 100 times the
    episode's number besides. Begins within episode 0; ending an episode by force pays 100,000."""

    def __init__(self, *lengths: int):
        self.num = len(lengths)
        self.lengths = np.array(lengths)
        self.clock = np.ones(self.num, int)
        self.number = np.zeros(self.num, int)
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
    returns = evaluate(script, FixedEpisodes(2, 10), 2)
    assert sorted(returns.tolist()) == [102, 110, 202, 210]  # the first two whole episodes of each
    assert evaluate(script, FixedEpisodes(3, 3, 5), 1).tolist() == [103, 103, 105]


def test_evaluate_begins_with_new_episodes(script):
    envs = FixedEpisodes(2, 10)
    evaluate(script, envs, 2)
    assert envs.actions[0] == [-1, -1]
    assert not any(-1 in actions for actions in envs.actions[1:])
    # Environment 0 played episodes 1 to 10 meanwhile; number 11 and the other's number 3 are cut off.
    second = evaluate(script, envs, 2)
    assert sorted(second.tolist()) == [410, 510, 1202, 1302]


def test_evaluate_counts_on_its_bar_and_can_be_stopped(script):
    stop = script.Stop()
    with tqdm(file=io.StringIO()) as bar:
        script.evaluate(random_policy, FixedEpisodes(2, 10, 3), 2, CPU, stop, bar)
        assert bar.n == 6
        envs = FixedEpisodes(2, 10)
        stop.signal_number = 15
        with pytest.raises(script.Stopped):
            script.evaluate(random_policy, envs, 2, CPU, stop, bar)
    assert len(envs.actions) == 1  # the one that ends the episodes under way


class Recorder:
    """Notes the levels that begin and whether the first observation after the action -1 begins an episode."""

    def __init__(self, envs):
        self.envs = envs
        self.num = envs.num
        self.levels = []
        self.firsts_after_end = []

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
    evaluate(script, recorder, 1)
    first_levels = set(recorder.levels)
    recorder.levels.clear()
    evaluate(script, recorder, 1)
    envs.close()
    assert recorder.firsts_after_end == [True, True]
    assert len(first_levels) >= 3
    assert len(recorder.levels) >= 3
    assert not first_levels & set(recorder.levels)


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
def test_each_set_of_environments_has_the_levels_of_its_purpose(script, num_agents, tmp_path):
    """The paper's protocol: training and its final test on --num-levels from --start-level, the other tests
    on all there are."""
    settings = TINY | {"num_envs": 16, "num_eval_envs": 16, "num_levels": 3, "start_level": 7}
    runner = make_runner(script, script.Args(**settings), tmp_path, num_agents=num_agents)
    training = [level for group in runner.groups for level in levels_of(group.envs)]
    assert len(training) == 16
    assert set(training) == {7, 8, 9}
    assert set(levels_of(runner.train_level_test_envs)) == {7, 8, 9}
    assert len(set(levels_of(runner.test_envs))) == 16
    runner.close()


@pytest.mark.parametrize(("num_envs", "sizes"), [(1, [1]), (2, [1, 1]), (5, [3, 2]), (8, [4, 4])])
def test_two_groups_fill_the_columns_of_one_batch(script, tmp_path, num_envs, sizes):
    """A single agent's, with seeds of their own, one reward normaliser and one list of episodes."""
    args = script.Args(**(TINY | {"num_envs": num_envs, "num_steps": 100, "total_timesteps": 1000}))
    runner = make_runner(script, args, tmp_path, num_agents=1)
    assert [group.envs.num for group in runner.groups] == sizes

    def brightness(obs):
        return obs.float().mean((1, 2, 3))

    def policy(obs):
        return torch.full((len(obs),), 5), brightness(obs), brightness(obs)

    script.rollout([policy], [runner], NoProgress())
    assert (runner.data.actions == 5).all()
    assert len(set(brightness(runner.data.obs[0]).tolist())) > num_envs // 2
    torch.testing.assert_close(runner.data.values, runner.data.obs.float().mean((2, 3, 4)))
    rewards = runner.rewards.copy()
    dones = runner.dones.copy()
    episodes = runner.finish_rollout()
    assert episodes.shape[1] == dones[1:].sum() > 0
    expected = script.RewardNormalizer(num_envs, args.gamma)
    expected(rewards[1:], dones[1:])
    assert vars(runner.normalizer.statistics) == vars(expected.statistics)
    runner.close()


def test_agents_and_purposes_have_seeds_of_their_own(script, tmp_path):
    """No two sets of environments of a run play the same levels in the same order."""
    args = script.Args(**(TINY | {"num_envs": 16, "num_eval_envs": 8, "num_levels": 0}))
    sets = []
    for index in range(2):
        runner = make_runner(script, args, tmp_path, index)
        for envs in [runner.train_level_test_envs, *runner.checkpointed_envs()]:
            sets.append(tuple(levels_of(envs)[:8]))
        runner.close()
    assert len(sets) == 6
    assert len(set(sets)) == 6
