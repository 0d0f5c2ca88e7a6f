"""The theory on finite MDPs against brute force, and the environment whose renderings it measures."""

import sys

import numpy as np
import pytest
import torch
from common import ROOT

import ppo_procgen

sys.path.insert(0, str(ROOT / "benchmark"))
import renderings
from renderings import MDP, World, evaluate_bounds

# The theory. `brute_force` follows the definitions one by one, for one rendering at a time: it iterates the
# Bellman equation and sums the series of visitations.


def random_distributions(rng, *shape: int, sharpness: float = 1.0):
    """Along the last axis; a large sharpness makes one entry near 1."""
    logits = sharpness * rng.normal(size=shape)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_problem(rng, gamma=None, num_states=3, num_actions=2, num_renderings=3, num_train=None, **given):
    """Arguments of evaluate_bounds. Both policies are anything from uniform to nearly deterministic, and the
    new one anything from near the old to unlike it."""
    if gamma is None:
        gamma = rng.choice([0.0, 0.1, 0.5, 0.9])
    if num_train is None:
        num_train = int(rng.integers(1, num_renderings + 1))
    shape = (num_renderings, num_states, num_actions)
    sharpness = rng.choice([0.1, 1.0, 10.0])
    policy = random_distributions(rng, *shape, sharpness=sharpness)
    other = random_distributions(rng, *shape, sharpness=sharpness)
    step = rng.choice([0.01, 0.1, 1.0])
    problem = {
        "transition": random_distributions(rng, num_states, num_actions, num_states, sharpness=3.0),
        "reward": rng.normal(size=(num_states, num_actions)),
        "start": random_distributions(rng, num_states, sharpness=2.0),
        "gamma": float(gamma),
        "probability": random_distributions(rng, num_renderings),
        "num_train": num_train,
        "policy": policy,
        "new_policy": (1 - step) * policy + step * other,
    }
    return problem | given


def iterate_values(problem: dict, policy):
    """V, (S,), of one underlying policy, (S, A), by iterating the Bellman equation."""
    values = np.zeros(len(policy))
    for _ in range(400):
        of_actions = problem["reward"] + problem["gamma"] * problem["transition"] @ values
        values = (policy * of_actions).sum(-1)
    return values


def sum_visitation(problem: dict, policy):
    """d, (S,), of one underlying policy, by summing its series."""
    gamma = problem["gamma"]
    step = np.einsum("sa,sat->st", policy, problem["transition"])
    states = problem["start"]
    total = np.zeros(len(policy))
    for t in range(400):
        total += (1 - gamma) * gamma**t * states
        states = states @ step
    return total


def distance(one, other):
    """TV in each state, (S,), of two underlying policies."""
    return np.abs(one - other).sum(-1) / 2


def worst_pair(visitation: list, policy) -> float:
    """R, or with the new policy R'."""
    every = range(len(policy))
    return max(visitation[f] @ distance(policy[f], policy[k]) for f in every for k in every)


def brute_force(problem: dict) -> dict[str, float]:
    """What evaluate_bounds gives, and the bound on the gap."""
    gamma = problem["gamma"]
    p = problem["probability"]
    old = problem["policy"]
    new = problem["new_policy"]
    start = problem["start"]
    every = range(len(p))
    train = range(problem["num_train"])
    test = range(problem["num_train"], len(p))
    mass = sum(p[f] for f in train)

    values = [iterate_values(problem, old[f]) for f in every]
    new_values = [iterate_values(problem, new[f]) for f in every]
    visitation = [sum_visitation(problem, old[f]) for f in every]
    advantage = []
    for f in every:
        of_actions = problem["reward"] + gamma * problem["transition"] @ values[f]
        advantage.append(of_actions - values[f][:, None])
    gain = [(new[f] * advantage[f]).sum(-1) for f in every]
    change = [distance(new[f], old[f]) for f in every]

    eta = sum(p[f] / mass * start @ values[f] for f in train)
    surrogate = eta
    for f in train:
        surrogate += p[f] / mass * visitation[f] @ gain[f] / (1 - gamma)
    d_train = sum(p[f] / mass * visitation[f] @ change[f] for f in train)
    d_test = sum(p[f] / (1 - mass) * visitation[f] @ change[f] for f in test)
    r_max = np.abs(problem["reward"]).max()
    a_max = np.abs(advantage).max()
    eps = np.abs(gain).max()
    eps_train = max(np.abs(gain[f]).max() for f in train)
    sigma = max(change[f].max() for f in train)
    first = worst_pair(visitation, old)
    second = worst_pair(visitation, new)
    d_test_bound = d_train + first + second + 2 * gamma * sigma * first / (1 - gamma)
    mean_distance = 0.0
    for f in train:
        for k in test:
            of_pair = visitation[f] @ distance(old[f], old[k])
            mean_distance += p[f] / mass * p[k] / (1 - mass) * of_pair

    def theorem_3_3(distance_in_test: float) -> float:
        unseen = 2 * (1 - mass) * r_max / (1 - gamma)
        distances = mass * d_train + (1 - mass) * distance_in_test
        of_gain = 2 * gamma * eps * distances / (1 - gamma) ** 2
        of_advantage = 2 * (1 - mass) * a_max * (d_train + distance_in_test) / (1 - gamma)
        return surrogate - unseen - of_gain - of_advantage

    return {
        "eta": eta,
        "zeta": sum(p[f] * start @ values[f] for f in every),
        "new_eta": sum(p[f] / mass * start @ new_values[f] for f in train),
        "new_zeta": sum(p[f] * start @ new_values[f] for f in every),
        "surrogate": surrogate,
        "d_train": d_train,
        "d_test": d_test,
        "robustness": first,
        "new_robustness": second,
        "theorem_3_2": surrogate - 2 * gamma * eps_train * d_train / (1 - gamma) ** 2,
        "theorem_3_3": theorem_3_3(d_test),
        "theorem_3_7": d_test_bound,
        "corollary_3_8": theorem_3_3(d_test_bound),
        "gap_bound": 2 * (1 - mass) * a_max * mean_distance / (1 - gamma),
    }


def all_bounds(problem: dict) -> dict[str, float]:
    """Those of the paper and that on the gap."""
    arguments = {name: value for name, value in problem.items() if name != "new_policy"}
    return evaluate_bounds(**problem) | {"gap_bound": renderings.bound_gap(**arguments)}


CASES = {
    "any": {},
    "gamma 0": {"gamma": 0.0},
    "gamma 0.9": {"gamma": 0.9, "num_train": 1},
    "one rendering": {"num_renderings": 1},
    "no test": {"num_train": 3},
    "more actions than states": {"num_states": 2, "num_actions": 5, "num_train": 2},
    "one state": {"num_states": 1, "num_train": 2},
    "one is never met": {"num_train": 1, "probability": np.array([0.4, 0.6, 0.0])},
}


@pytest.mark.parametrize("case", CASES)
def test_bounds_are_those_of_brute_force(case):
    """As plain numbers, which json writes."""
    problem = random_problem(np.random.default_rng(0), **CASES[case])
    found = all_bounds(problem)
    assert {type(value) for value in found.values()} == {float}
    assert found == pytest.approx(brute_force(problem), rel=1e-9, abs=1e-12)


def test_a_thousand_random_mdps_violate_nothing():
    """For some of them the bound on the gap is less than twice the gap."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(1000):
        num_states, num_actions, num_renderings = rng.integers(1, 6, size=3)
        problem = random_problem(
            rng, num_states=num_states, num_actions=num_actions, num_renderings=num_renderings
        )
        found = all_bounds(problem)
        rounding = 1e-9
        assert found["new_eta"] >= found["theorem_3_2"] - rounding
        assert found["new_zeta"] >= found["theorem_3_3"] - rounding
        assert found["d_test"] <= found["theorem_3_7"] + rounding
        assert found["new_zeta"] >= found["corollary_3_8"] - rounding
        gap = abs(found["eta"] - found["zeta"])
        assert gap <= found["gap_bound"] + rounding
        shares.append(gap / max(found["gap_bound"], rounding))
    assert max(shares) > 0.5


BAD_ARGUMENTS = [
    ("reward", np.zeros(3), "reward must have the shape (S, A), not (3,)"),
    ("reward", np.full((3, 2), np.nan), "reward must be finite"),
    ("transition", np.full((3, 2, 2), 0.5), "transition must have the shape (3, 2, 3), not (3, 2, 2)"),
    ("transition", np.full((3, 2, 3), 0.3), "transition must sum to 1 along its last axis"),
    ("start", np.array([1.5, -0.5, 0.0]), "start must hold probabilities, not -0.5"),
    ("gamma", 1.0, "gamma must be at least 0 and below 1, not 1.0"),
    ("probability", np.array([0.0, 0.0, 1.0]), "probability must not be 0 for all of the first 2 renderings"),
    ("num_train", 0, "num_train must be from 1 to 3, not 0"),
    ("num_train", 4, "num_train must be from 1 to 3, not 4"),
    ("policy", np.full((2, 3, 2), 0.5), "policy must have the shape (3, 3, 2), not (2, 3, 2)"),
]


@pytest.mark.parametrize("name, value, message", BAD_ARGUMENTS)
def test_bad_arguments(name, value, message):
    """Where a softmax in float32 will do."""
    problem = random_problem(np.random.default_rng(0), num_train=2)
    problem["policy"] = problem["policy"].astype(np.float32).astype(float)
    evaluate_bounds(**problem)
    problem[name] = value
    with pytest.raises(ValueError) as error:
        evaluate_bounds(**problem)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_optimal_values(offset):
    """They are the fixed point of value iteration, and no policy does better. Also where all rewards are
    positive, or none."""
    rng = np.random.default_rng(2)
    problem = random_problem(rng, gamma=0.9, num_states=20, num_actions=5)
    problem["reward"] += offset
    mdp = MDP(*[problem[name] for name in MDP._fields])
    values = np.zeros(20)
    for _ in range(400):
        values = (mdp.reward + 0.9 * mdp.transition @ values).max(-1)
    optimal = renderings.optimal_values(mdp)
    assert optimal == pytest.approx(values, abs=1e-9)
    others = random_distributions(rng, 50, 20, 5, sharpness=10.0)
    assert (renderings.state_values(mdp, others) <= optimal + 1e-9).all()


# The environment.

# Small: nine cells, 72 states, pictures of 12 pixels.
WORLD = World(grid_size=3, gamma=0.8, num_renderings=5)
# Rendering and state of each of its pictures.
PLACES = {WORLD.pictures[f, s].tobytes(): (f, s) for f in range(5) for s in range(72)}


def make_envs(num: int, rand_seed: int = 0, num_levels: int = 0, start_level: int = 0):
    return WORLD.make_envs(None, num, num_levels, start_level, rand_seed)


def observe_states(envs):
    """reward, rendering and state, first: all (num,)."""
    reward, obs, first = envs.observe()
    pairs = [PLACES[picture.tobytes()] for picture in obs["rgb"]]
    rendering, state = np.array(pairs).T
    return reward, rendering, state, first


def test_all_pictures_differ():
    """Each rendering is a bijection, and no picture is in two of them."""
    pictures = World().pictures
    assert pictures.shape == (64, 25 * 24, 20, 20, 3)
    assert pictures.dtype == np.uint8
    pictures = pictures.reshape(64 * 600, -1)
    different = {picture.tobytes() for picture in pictures}
    assert len(different) == len(pictures)
    assert World(grid_size=4).pictures.mean() == pytest.approx(
        126.7809, abs=1e-3
    )  # else results are of others


def test_renderings_come_from_their_seed():
    two = World(grid_size=3, num_renderings=2, seed=7).pictures
    more = World(grid_size=3, num_renderings=3, seed=7).pictures
    others = World(grid_size=3, num_renderings=2, seed=8).pictures
    assert (more[:2] == two).all()
    for one, other in zip(two, others):
        assert (one != other).any()


# From the middle of nine cells, where 0 is the upper left corner, and from that corner: to the left, straight
# and to the right, each down, straight and up, and six that do nothing.
ACTIONS = [(4, 8, [6, 3, 0, 7, 4, 1, 8, 5, 2, 4, 4, 4, 4, 4, 4])]
ACTIONS += [(0, 8, [3, 0, 0, 3, 0, 0, 4, 1, 1, 0, 0, 0, 0, 0, 0])]


@pytest.mark.parametrize(("agent", "coin", "to_cells"), ACTIONS)
def test_actions_are_procgens(agent, coin, to_cells):
    """Walls stop the agent. A coin that is stepped on pays, and appears in any other cell."""
    mdp = WORLD.mdp
    cells = renderings.grid_states(3)
    (state,) = np.flatnonzero((cells == [agent, coin]).all(-1))
    for action, to_cell in enumerate(to_cells):
        following = np.flatnonzero(mdp.transition[state, action])
        stepped_on = to_cell == coin
        coins = list(range(8)) if stepped_on else [coin]
        assert mdp.transition[state, action, following] == pytest.approx(1 / len(following))
        assert cells[following].tolist() == [[to_cell, each] for each in coins]
        assert mdp.reward[state, action] == stepped_on


def play_at_random(envs, num_steps: int):
    """Uniform actions. All (num_steps, num): state and action, then reward, rendering, state and first."""
    rng = np.random.default_rng(1)
    _, _, state, _ = observe_states(envs)
    rows = []
    for _ in range(num_steps):
        actions = rng.integers(15, size=envs.num).astype(np.int32)
        envs.act(actions)
        reward, rendering, following, first = observe_states(envs)
        rows.append([state, actions, reward, rendering, following, first])
        state = following
    return np.array(rows).swapaxes(0, 1)


@pytest.fixture(scope="module")
def played():
    columns = play_at_random(make_envs(500, rand_seed=3), 800)
    return [column.astype(int) for column in columns]


def assert_binomial(counts, number, probability):
    """Counts of outcomes in `number` trials each, all within 6 standard deviations. What cannot be is not."""
    expected = number * probability
    deviation = np.sqrt(expected * (1 - probability))
    assert (np.abs(counts - expected) <= 6 * deviation + 1e-9).all()


def test_play_is_that_of_the_mdp(played):
    """Transitions, rewards, also the last of an episode, and ends, whatever happens, with the probability
    1 - gamma."""
    state, action, reward, _, following, first = played
    assert (reward == WORLD.mdp.reward[state, action]).all()
    for some in (first, first[reward == 1]):
        assert_binomial(some.sum(), some.size, 0.2)
    goes_on = first == 0
    counts = np.zeros_like(WORLD.mdp.transition)
    triples = (state[goes_on], action[goes_on], following[goes_on])
    np.add.at(counts, triples, 1)
    number = counts.sum(-1, keepdims=True)
    assert number.min() > 100
    assert_binomial(counts, number, WORLD.mdp.transition)


def test_episodes_begin_anywhere_and_keep_their_rendering(played):
    _, _, _, rendering, following, first = played
    begun = first == 1
    counts = np.zeros((5, 72))
    np.add.at(counts, (rendering[begun], following[begun]), 1)
    assert_binomial(counts, begun.sum(), np.full((5, 72), 1 / 360))
    changed = rendering[1:] != rendering[:-1]
    assert not changed[~begun[1:]].any()


def test_policies_are_what_the_agent_says_of_each_picture():
    """float32, in batches of other sizes."""
    torch.manual_seed(0)
    agent = ppo_procgen.Agent(channels=(4, 4, 4), obs_shape=(12, 12, 3))
    agent.actor.weight.data *= 300
    policy = renderings.policies_of(agent, WORLD.pictures)
    assert policy.shape == (5, 72, 15)
    assert policy.sum(-1) == pytest.approx(1.0, abs=1e-12)  # as float64 has it
    for f, s in [(0, 0), (1, 71), (4, 30)]:
        picture = torch.from_numpy(WORLD.pictures[f, s])
        logits, _ = agent(picture[None])
        expected = logits[0].detach().double().softmax(-1)
        assert policy[f, s] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)
    assert distance(policy[0], policy[1]).mean() > 1e-3


@pytest.mark.parametrize("num_levels, start_level, expected", [(2, 1, [1, 2]), (1, 4, [4]), (0, 0, range(5))])
def test_levels_are_renderings(num_levels, start_level, expected):
    _, rendering, _, _ = observe_states(make_envs(200, 0, num_levels, start_level))
    assert set(rendering) == set(expected)


def test_levels_that_there_are_not():
    message = "--start-level and --num-levels must have a sum of at most 5, not 6"
    with pytest.raises(ValueError, match=message):
        make_envs(2, num_levels=2, start_level=4)


def test_types_are_procgens():
    """Episodes begin at once."""
    envs = make_envs(3)
    reward, _, first = envs.observe()
    assert first.all()
    assert not reward.any()
    envs.act(np.full(3, 4, np.int32))
    reward, obs, first = envs.observe()
    rgb = obs["rgb"]
    assert (reward.dtype, rgb.dtype, first.dtype) == (np.float32, np.uint8, bool)
    assert (reward.shape, rgb.shape, first.shape) == ((3,), (3, 12, 12, 3), (3,))


def test_an_episode_can_be_ended():
    """Of some environments, with the action -1, which pays nothing. The others play on as they would."""
    envs = make_envs(400)
    others = make_envs(400)
    actions = np.full(400, 5, np.int32)
    others.act(actions)
    actions[:200] = -1
    envs.act(actions)
    reward, obs, first = envs.observe()
    assert first[:200].all()
    assert not reward[:200].any()
    other_reward, other_obs, other_first = others.observe()
    assert (first[200:] == other_first[200:]).all()
    assert (reward[200:] == other_reward[200:]).all()
    assert (obs["rgb"][200:] == other_obs["rgb"][200:]).all()
    assert other_reward[:200].any()


def test_a_state_goes_on_as_it_would():
    """In environments of another seed, which else play otherwise, and in the very same."""
    envs = make_envs(20, rand_seed=1)
    others = make_envs(20, rand_seed=2)
    assert (play_at_random(envs, 3) != play_at_random(others, 3)).any()
    states = envs.get_state()
    now = observe_states(envs)
    expected = play_at_random(envs, 20)
    for each in (others, envs):
        each.set_state(states)
        np.testing.assert_equal(observe_states(each), now)
        assert (play_at_random(each, 20) == expected).all()
