"""The theory on finite MDPs against brute force, and the environment whose renderings it measures."""

import importlib
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import renderings
from renderings import MDP, World, evaluate_bounds

# The theory. `brute_force` follows the definitions one by one: it iterates the Bellman equation, sums the
# series of visitations, and loops over renderings, pairs, states and actions.


def random_distributions(rng, *shape: int, sharpness: float = 1.0):
    """Along the last axis; a large sharpness makes one entry near 1."""
    logits = sharpness * rng.normal(size=shape)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def random_problem(rng, gamma=None, num_states=3, num_actions=2, num_renderings=3, num_train=None):
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
    return {
        "transition": random_distributions(rng, num_states, num_actions, num_states, sharpness=3.0),
        "reward": rng.normal(size=(num_states, num_actions)),
        "start": random_distributions(rng, num_states, sharpness=2.0),
        "gamma": float(gamma),
        "probability": random_distributions(rng, num_renderings),
        "num_train": num_train,
        "policy": policy,
        "new_policy": (1 - step) * policy + step * other,
    }


def expectation(probabilities, values) -> float:
    return sum(p * value for p, value in zip(probabilities, values))


def distance(one, other) -> float:
    """TV."""
    return sum(abs(p - q) for p, q in zip(one, other)) / 2


def iterate_values(problem: dict, policy) -> list[float]:
    """V of one underlying policy, (S, A), by iterating the Bellman equation."""
    transition = problem["transition"]
    reward = problem["reward"]
    num_states, num_actions = reward.shape
    values = [0.0] * num_states
    for _ in range(400):
        following = []
        for s in range(num_states):
            value = 0.0
            for a in range(num_actions):
                later = expectation(transition[s, a], values)
                value += policy[s, a] * (reward[s, a] + problem["gamma"] * later)
            following.append(value)
        values = following
    return values


def sum_visitation(problem: dict, policy) -> list[float]:
    """d of one underlying policy, by summing its series."""
    transition = problem["transition"]
    gamma = problem["gamma"]
    num_states, num_actions = problem["reward"].shape
    states = list(problem["start"])
    total = [0.0] * num_states
    for t in range(400):
        following = [0.0] * num_states
        for s in range(num_states):
            total[s] += (1 - gamma) * gamma**t * states[s]
            for a in range(num_actions):
                for to in range(num_states):
                    following[to] += states[s] * policy[s, a] * transition[s, a, to]
        states = following
    return total


def advantage_tables(problem: dict, all_values: list) -> list:
    """A_f(s, a) of each rendering."""
    transition = problem["transition"]
    reward = problem["reward"]
    num_states, num_actions = reward.shape
    tables = []
    for values in all_values:
        table = np.empty((num_states, num_actions))
        for s in range(num_states):
            for a in range(num_actions):
                later = expectation(transition[s, a], values)
                table[s, a] = reward[s, a] + problem["gamma"] * later - values[s]
        tables.append(table)
    return tables


def brute_robustness(problem: dict, visitation: list, policy) -> float:
    found = []
    for f, one in enumerate(policy):
        for other in policy:
            distances = [distance(p, q) for p, q in zip(one, other)]
            found.append(expectation(visitation[f], distances))
    return max(found)


def brute_force(problem: dict) -> dict[str, float]:
    """What evaluate_bounds gives."""
    gamma = problem["gamma"]
    p = problem["probability"]
    old = problem["policy"]
    new = problem["new_policy"]
    states = range(len(problem["start"]))
    every = range(len(p))
    train = range(problem["num_train"])
    test = range(problem["num_train"], len(p))
    mass = sum(p[f] for f in train)

    values = [iterate_values(problem, old[f]) for f in every]
    new_values = [iterate_values(problem, new[f]) for f in every]
    visitation = [sum_visitation(problem, old[f]) for f in every]
    advantage = advantage_tables(problem, values)
    gain = []
    change = []
    for f in every:
        gain.append([float(new[f, s] @ advantage[f][s]) for s in states])
        change.append([distance(new[f, s], old[f, s]) for s in states])

    performance = [expectation(problem["start"], values[f]) for f in every]
    new_performance = [expectation(problem["start"], new_values[f]) for f in every]
    mean_gain = [expectation(visitation[f], gain[f]) for f in every]
    mean_change = [expectation(visitation[f], change[f]) for f in every]

    eta = sum(p[f] / mass * performance[f] for f in train)
    surrogate = eta
    for f in train:
        surrogate += p[f] / mass * mean_gain[f] / (1 - gamma)
    d_train = sum(p[f] / mass * mean_change[f] for f in train)
    d_test = sum(p[f] / (1 - mass) * mean_change[f] for f in test)
    r_max = max(abs(r) for r in problem["reward"].flat)
    a_max = max(abs(a) for table in advantage for a in table.flat)
    eps = max(abs(gain[f][s]) for f in every for s in states)
    eps_train = max(abs(gain[f][s]) for f in train for s in states)
    sigma = max(change[f][s] for f in train for s in states)
    first = brute_robustness(problem, visitation, old)
    second = brute_robustness(problem, visitation, new)
    d_test_bound = d_train + first + second + 2 * gamma * sigma * first / (1 - gamma)

    def theorem_3_3(distance_in_test: float) -> float:
        unseen = 2 * (1 - mass) * r_max / (1 - gamma)
        distances = mass * d_train + (1 - mass) * distance_in_test
        of_gain = 2 * gamma * eps * distances / (1 - gamma) ** 2
        of_advantage = 2 * (1 - mass) * a_max * (d_train + distance_in_test) / (1 - gamma)
        return surrogate - unseen - of_gain - of_advantage

    return {
        "eta": eta,
        "zeta": expectation(p, performance),
        "new_eta": sum(p[f] / mass * new_performance[f] for f in train),
        "new_zeta": expectation(p, new_performance),
        "surrogate": surrogate,
        "d_train": d_train,
        "d_test": d_test,
        "robustness": first,
        "new_robustness": second,
        "theorem_3_2": surrogate - 2 * gamma * eps_train * d_train / (1 - gamma) ** 2,
        "theorem_3_3": theorem_3_3(d_test),
        "theorem_3_7": d_test_bound,
        "corollary_3_8": theorem_3_3(d_test_bound),
    }


CASES = {
    "any": {},
    "gamma 0": {"gamma": 0.0},
    "gamma 0.9": {"gamma": 0.9, "num_train": 1},
    "one rendering": {"num_renderings": 1},
    "no test": {"num_train": 3},
    "more actions than states": {"num_states": 2, "num_actions": 5, "num_train": 2},
    "one state": {"num_states": 1, "num_train": 2},
}


def check(problem: dict):
    """Plain numbers, which json writes, and those of brute force."""
    found = evaluate_bounds(**problem)
    assert {type(value) for value in found.values()} == {float}
    assert found == pytest.approx(brute_force(problem), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_bounds_are_those_of_brute_force(case):
    problem = random_problem(np.random.default_rng(0), **CASES[case])
    check(problem)


def test_bounds_of_deterministic_policies():
    """The likeliest action of each state, with probability 1."""
    problem = random_problem(np.random.default_rng(10), gamma=0.5, num_train=2)
    problem["policy"] = np.eye(2)[problem["policy"].argmax(-1)]
    problem["new_policy"] = problem["policy"][::-1].copy()
    check(problem)


def test_a_thousand_random_mdps_violate_nothing():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        num_states, num_actions, num_renderings = rng.integers(1, 6, size=3)
        problem = random_problem(
            rng, num_states=num_states, num_actions=num_actions, num_renderings=num_renderings
        )
        found = evaluate_bounds(**problem)
        rounding = 1e-9
        assert found["new_eta"] >= found["theorem_3_2"] - rounding
        assert found["new_zeta"] >= found["theorem_3_3"] - rounding
        assert found["d_test"] <= found["theorem_3_7"] + rounding
        assert found["new_zeta"] >= found["corollary_3_8"] - rounding
        assert found["corollary_3_8"] <= found["theorem_3_3"] + rounding


@pytest.mark.parametrize("seed", range(5))
def test_a_policy_that_stays_as_it_is(seed):
    problem = random_problem(np.random.default_rng(seed))
    problem["new_policy"] = problem["policy"]
    found = evaluate_bounds(**problem)
    for name in ("surrogate", "new_eta", "theorem_3_2"):
        assert found[name] == pytest.approx(found["eta"])
    assert found["d_train"] == found["d_test"] == 0
    assert found["new_zeta"] == found["zeta"]
    assert found["new_robustness"] == found["robustness"]
    unseen = problem["probability"][problem["num_train"] :].sum()
    r_max = np.abs(problem["reward"]).max()
    loss = 2 * unseen * r_max / (1 - problem["gamma"])
    assert found["theorem_3_3"] == pytest.approx(found["eta"] - loss)


@pytest.mark.parametrize("seed", range(5))
def test_policies_that_no_rendering_deceives(seed):
    """They are robust, lose nothing on the test, and theorem 3.7 is an equality."""
    problem = random_problem(np.random.default_rng(seed), num_train=2)
    for name in ("policy", "new_policy"):
        problem[name] = np.repeat(problem[name][:1], 3, axis=0)
    found = evaluate_bounds(**problem)
    assert found["robustness"] == found["new_robustness"] == 0
    assert found["zeta"] == pytest.approx(found["eta"])
    assert found["new_zeta"] == pytest.approx(found["new_eta"])
    assert found["theorem_3_7"] == pytest.approx(found["d_test"])


def test_a_single_step_is_its_own_first_order():
    """With gamma 0 the surrogate is exact, and theorem 3.2 an equality."""
    found = evaluate_bounds(**random_problem(np.random.default_rng(1), gamma=0.0))
    assert found["surrogate"] == pytest.approx(found["new_eta"])
    assert found["theorem_3_2"] == pytest.approx(found["new_eta"])


# The direct bound on the gap.


def arguments_of_bound_gap(problem: dict) -> dict:
    return {name: value for name, value in problem.items() if name != "new_policy"}


def brute_bound_gap(problem: dict) -> float:
    p = problem["probability"]
    policy = problem["policy"]
    train = range(problem["num_train"])
    test = range(problem["num_train"], len(p))
    mass = sum(p[f] for f in train)
    values = [iterate_values(problem, each) for each in policy]
    a_max = max(abs(a) for table in advantage_tables(problem, values) for a in table.flat)
    mean_distance = 0.0
    for f in train:
        visitation = sum_visitation(problem, policy[f])
        for k in test:
            distances = [distance(one, other) for one, other in zip(policy[f], policy[k])]
            mean_distance += p[f] / mass * p[k] / (1 - mass) * expectation(visitation, distances)
    return 2 * (1 - mass) * a_max * mean_distance / (1 - problem["gamma"])


@pytest.mark.parametrize("case", CASES)
def test_bound_on_the_gap_is_that_of_brute_force(case):
    problem = random_problem(np.random.default_rng(0), **CASES[case])
    found = renderings.bound_gap(**arguments_of_bound_gap(problem))
    assert type(found) is float
    assert found == pytest.approx(brute_bound_gap(problem), rel=1e-9, abs=1e-12)


def test_a_thousand_random_mdps_have_no_larger_gap():
    """In either direction. For some of them the bound is less than twice the gap."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(1000):
        num_states, num_actions, num_renderings = rng.integers(1, 6, size=3)
        problem = random_problem(
            rng, num_states=num_states, num_actions=num_actions, num_renderings=num_renderings
        )
        found = evaluate_bounds(**problem)
        gap = abs(found["eta"] - found["zeta"])
        bound = renderings.bound_gap(**arguments_of_bound_gap(problem))
        assert gap <= bound + 1e-9
        shares.append(gap / max(bound, 1e-9))
    assert max(shares) > 0.5


def test_the_bound_on_the_gap_vanishes_with_the_distance():
    """Of policies that no rendering deceives, whatever the mass of the test renderings; by corollary 3.8 they
    may lose all."""
    problem = random_problem(np.random.default_rng(3), num_train=1)
    problem["policy"] = np.repeat(problem["policy"][:1], 3, axis=0)
    problem["new_policy"] = problem["policy"]
    assert renderings.bound_gap(**arguments_of_bound_gap(problem)) == 0
    found = evaluate_bounds(**problem)
    assert found["corollary_3_8"] < found["new_zeta"]


# Examples by hand, with two actions: "stay" in state 0, or "go" to state 1, which nothing leaves.

STAY = [1.0, 0.0]
GO = [0.0, 1.0]
EITHER = [0.5, 0.5]


def two_states(policy, new_policy, num_train: int, probability=None) -> dict:
    """What evaluate_bounds gives, when one starts in state 0, to go from it pays 1, and gamma is 1/2. The
    policies are a list for each rendering of what they do in both states."""
    number = len(policy)
    transition = np.zeros((2, 2, 2))
    transition[0, 0, 0] = 1.0
    transition[0, 1, 1] = 1.0
    transition[1, :, 1] = 1.0
    reward = np.array([[0.0, 1.0], [0.0, 0.0]])
    if probability is None:
        probability = [1 / number] * number
    start = np.array([1.0, 0.0])
    probability = np.array(probability)
    policies = (np.array(policy), np.array(new_policy))
    return evaluate_bounds(transition, reward, start, 0.5, probability, num_train, *policies)


def test_training_renderings_share_all_the_weight():
    """Of the renderings 1, 2 and 3 with the probabilities 0.1, 0.3 and 0.6 the first two are trained on. In 1
    and 3 the policy goes at once, which pays 1; in 2 never. The new one goes in 2 and stays in 3."""
    policy = [[GO, STAY], [STAY, STAY], [GO, STAY]]
    new_policy = [[GO, STAY], [GO, STAY], [STAY, STAY]]
    found = two_states(policy, new_policy, num_train=2, probability=[0.1, 0.3, 0.6])
    assert found["eta"] == pytest.approx(0.25)
    assert found["zeta"] == pytest.approx(0.7)
    assert found["new_eta"] == pytest.approx(1.0)
    assert found["new_zeta"] == pytest.approx(0.4)
    assert found["d_train"] == pytest.approx(0.75)  # d_f is all in state 0 where it stays
    assert found["d_test"] == pytest.approx(0.5)  # half of it is where it goes


def test_robustness():
    """It takes the worst order of a pair. These differ in state 0 alone, where the first policy always is,
    and the second half of the time."""
    policy = [[STAY, STAY], [GO, STAY]]
    for order in (policy, policy[::-1]):
        found = two_states(order, order, num_train=1)
        assert found["robustness"] == pytest.approx(1.0)


def test_robustness_is_over_all_renderings():
    """Also those that are not trained on, and those that are never met. That of the new policy is in the
    states that the old one meets, which here never leaves state 0."""
    policy = [[STAY, STAY], [STAY, STAY], [EITHER, STAY]]
    found = two_states(policy, policy, num_train=2, probability=[0.5, 0.5, 0.0])
    assert found["robustness"] == pytest.approx(0.5)
    policy = [[STAY, STAY], [STAY, STAY]]
    new_policy = [[GO, STAY], [GO, GO]]
    found = two_states(policy, new_policy, num_train=1)
    assert found["new_robustness"] == 0.0
    assert found["d_train"] == 1.0


BAD_ARGUMENTS = [
    ("reward", np.zeros(3), "reward must have the shape (S, A), not (3,)"),
    ("reward", np.full((3, 2), np.nan), "reward must be finite"),
    ("transition", np.full((3, 2, 2), 0.5), "transition must have the shape (3, 2, 3), not (3, 2, 2)"),
    ("transition", np.full((3, 2, 3), 0.3), "transition must sum to 1 along its last axis"),
    ("start", np.array([1.5, -0.5, 0.0]), "start must hold probabilities, not -0.5"),
    ("start", np.array([1.0, np.nan, 0.0]), "start must hold probabilities, not nan"),
    ("gamma", 1.0, "gamma must be at least 0 and below 1, not 1.0"),
    ("gamma", np.nan, "gamma must be at least 0 and below 1, not nan"),
    ("probability", np.array(1.0), "probability must have the shape (F,), not ()"),
    ("probability", np.array([0.2, 0.2, 0.2]), "probability must sum to 1 along its last axis"),
    ("probability", np.array([0.0, 0.0, 1.0]), "probability must not be 0 for all of the first 2 renderings"),
    ("num_train", 0, "num_train must be from 1 to 3, not 0"),
    ("num_train", 4, "num_train must be from 1 to 3, not 4"),
    ("policy", np.full((2, 3, 2), 0.5), "policy must have the shape (3, 3, 2), not (2, 3, 2)"),
    ("new_policy", np.full((3, 3, 2), 0.6), "new_policy must sum to 1 along its last axis"),
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


@pytest.fixture(scope="module")
def world() -> World:
    """Small: nine cells, 72 states, pictures of 12 pixels."""
    return World(grid_size=3, gamma=0.8, num_renderings=5)


@cache
def places(grid_size: int, num_renderings: int) -> dict:
    """Rendering and state of each picture of a world, by its bytes."""
    found = {}
    world = World(grid_size=grid_size, num_renderings=num_renderings)
    for f, pictures in enumerate(world.pictures):
        for s, picture in enumerate(pictures):
            found[picture.tobytes()] = (f, s)
    return found


def observe_states(world: World, envs):
    """reward, rendering and state, first: all (num,)."""
    reward, obs, first = envs.observe()
    found = places(world.grid_size, world.num_renderings)
    pairs = [found[picture.tobytes()] for picture in obs["rgb"]]
    rendering, state = np.array(pairs).T
    return reward, rendering, state, first


@pytest.mark.parametrize("grid_size", [3, 5])
def test_all_pictures_differ(grid_size):
    """Each rendering is a bijection, and no picture is in two of them."""
    world = World(grid_size=grid_size)
    num_states = grid_size**2 * (grid_size**2 - 1)
    side = 4 * grid_size
    assert world.pictures.shape == (64, num_states, side, side, 3)
    assert world.pictures.dtype == np.uint8
    pictures = world.pictures.reshape(64 * num_states, -1)
    different = {picture.tobytes() for picture in pictures}
    assert len(different) == len(pictures)


def test_what_an_object_is_shows_in_its_shape():
    """In all renderings, whatever the colours, and it stands out. The floor is what most states show at a
    pixel."""
    world = World(grid_size=4)
    cells = renderings.grid_states(4)
    agent = np.ones((4, 4), int)
    agent[[0, 0, 3, 3], [0, 3, 0, 3]] = 0  # without its corners
    coin = np.eye(4, dtype=int)
    coin += coin[::-1]  # both diagonals
    expected = np.zeros((len(cells), 4, 4, 4, 4), int)  # state, row of cells, row of pixels, column, column
    for state, (agent_cell, coin_cell) in enumerate(cells):
        expected[state, agent_cell // 4, :, agent_cell % 4] = agent
        expected[state, coin_cell // 4, :, coin_cell % 4] = coin
    expected = expected.reshape(len(cells), 16, 16)
    for pictures in world.pictures:
        floor = np.median(pictures, axis=0)
        covered = (pictures != floor).any(-1)
        assert (covered == expected).all()
        assert np.linalg.norm(pictures - floor, axis=-1)[covered].min() > 100
    assert world.pictures.mean() == pytest.approx(126.7809, abs=1e-3)  # else the results are of others


def test_colors_tell_nothing():
    """What is the agent's colour in one rendering may be the coin's in another: the nearest neighbour of an
    agent's colour is as often a coin's as an agent's."""
    world = World(grid_size=3, num_renderings=64)
    cells = renderings.grid_states(3)
    (state,) = np.flatnonzero((cells == [0, 8]).all(-1))
    agents = world.pictures[:, state, 1, 1].astype(float)
    coins = world.pictures[:, state, 9, 9].astype(float)
    between = np.linalg.norm(agents[:, None] - agents, axis=-1)
    between[range(64), range(64)] = np.inf
    to_coins = np.linalg.norm(agents[:, None] - coins, axis=-1)
    nearer = (to_coins.min(1) < between.min(1)).mean()
    assert 0.3 < nearer < 0.7


def test_renderings_come_from_their_seed():
    two = World(grid_size=3, num_renderings=2, seed=7).pictures
    more = World(grid_size=3, num_renderings=3, seed=7).pictures
    others = World(grid_size=3, num_renderings=2, seed=8).pictures
    assert (more[:2] == two).all()
    for one, other in zip(two, others):
        assert (one != other).any()


def follow(grid_size: int, agent: int, coin: int, action: int):
    """What the action does in the state with these cells: the next cell of the agent, those where the coin
    may be, and the reward."""
    mdp = renderings.make_grid(grid_size, gamma=0.5)
    cells = renderings.grid_states(grid_size)
    (state,) = np.flatnonzero((cells == [agent, coin]).all(-1))
    following = np.flatnonzero(mdp.transition[state, action])
    assert mdp.transition[state, action, following] == pytest.approx(1 / len(following))
    (to_cell,) = set(cells[following, 0])
    return to_cell, cells[following, 1].tolist(), mdp.reward[state, action]


def test_actions_are_procgens():
    """From the middle of nine cells, with the coin in the first, upper left corner. A coin that is stepped on
    pays, and appears in any other cell."""
    left_column = [6, 3, 0]  # down, straight, up
    middle_column = [7, 4, 1]
    right_column = [8, 5, 2]
    for action, cell in enumerate([*left_column, *middle_column, *right_column, 4, 4, 4, 4, 4, 4]):
        expected = (cell, [0], 0.0)
        if cell == 0:
            expected = (0, [1, 2, 3, 4, 5, 6, 7, 8], 1.0)
        assert follow(3, 4, 0, action) == expected


def test_walls_stop_the_agent():
    down_left, up_left, up_right = 0, 2, 8
    for action, cell in [(down_left, 3), (up_left, 0), (up_right, 1)]:
        assert follow(3, 0, 8, action) == (cell, [8], 0.0)


def test_the_optimum_of_a_grid_with_two_cells_in_a_row():
    """On 2 x 2 cells every coin is one move away: each step pays 1."""
    mdp = renderings.make_grid(2, gamma=0.75)
    assert renderings.optimal_values(mdp) == pytest.approx(4.0)


def play_at_random(world: World, envs, num_steps: int):
    """Uniform actions. All (num_steps, num): state and action, then reward, rendering, state and first."""
    rng = np.random.default_rng(1)
    _, _, state, _ = observe_states(world, envs)
    rows = []
    for _ in range(num_steps):
        actions = rng.integers(15, size=envs.num).astype(np.int32)
        envs.act(actions)
        reward, rendering, following, first = observe_states(world, envs)
        rows.append([state, actions, reward, rendering, following, first])
        state = following
    return np.array(rows).swapaxes(0, 1)


@pytest.fixture(scope="module")
def played(world):
    envs = world.make_envs(None, 500, 0, 0, rand_seed=3)
    columns = play_at_random(world, envs, 800)
    return [column.ravel().astype(int) for column in columns]


def assert_binomial(counts, number, probability):
    """Counts of outcomes in `number` trials each, all within 6 standard deviations. What cannot be is not."""
    expected = number * probability
    deviation = np.sqrt(expected * (1 - probability))
    assert (np.abs(counts - expected) <= 6 * deviation + 1e-9).all()


def test_play_is_that_of_the_mdp(world, played):
    """Transitions, rewards, also the last of an episode, and ends, whatever happens, with the probability
    1 - gamma."""
    state, action, reward, _, following, first = played
    assert (reward == world.mdp.reward[state, action]).all()
    for some in (first, first[reward == 1]):
        assert_binomial(some.sum(), len(some), 0.2)
    goes_on = first == 0
    counts = np.zeros_like(world.mdp.transition)
    triples = (state[goes_on], action[goes_on], following[goes_on])
    np.add.at(counts, triples, 1)
    number = counts.sum(-1, keepdims=True)
    assert number.min() > 100
    assert_binomial(counts, number, world.mdp.transition)


def test_episodes_begin_anywhere_in_any_rendering(world, played):
    _, _, _, rendering, following, first = played
    begun = first == 1
    counts = np.zeros((5, 72))
    np.add.at(counts, (rendering[begun], following[begun]), 1)
    assert_binomial(counts, begun.sum(), np.full((5, 72), 1 / 360))


def test_a_rendering_lasts_for_an_episode(world):
    envs = world.make_envs(None, 50, 0, 0, rand_seed=3)
    _, before, _, _ = observe_states(world, envs)
    _, _, _, rendering, _, first = play_at_random(world, envs, 100)
    previous = np.concatenate([before[None], rendering[:-1]])
    changed = rendering != previous
    assert changed[first == 1].any()
    assert not changed[first == 0].any()


@pytest.fixture(scope="module")
def agent(world):
    """It acts differently in each picture: the logits of each action have the mean 0 and the deviation 3."""
    script = importlib.import_module("ppo_procgen")
    torch.manual_seed(0)
    agent = script.Agent(channels=(4, 4, 4), obs_shape=(12, 12, 3))
    obs = torch.from_numpy(world.pictures).flatten(0, 1)
    with torch.no_grad():
        logits, _ = agent(obs)
        scale = 3 / logits.std(0)
        agent.actor.weight *= scale[:, None]
        agent.actor.bias -= logits.mean(0) * scale
    return agent


def test_policies_are_what_the_agent_says_of_each_picture(world, agent):
    """float32, in batches of other sizes."""
    policy = renderings.policies_of(agent, world.pictures)
    assert policy.shape == (5, 72, 15)
    assert policy.sum(-1) == pytest.approx(1.0, abs=1e-12)  # as float64 has it
    for f, s in [(0, 0), (1, 71), (4, 30)]:
        picture = torch.from_numpy(world.pictures[f, s])
        logits, _ = agent(picture[None])
        expected = logits[0].detach().double().softmax(-1)
        assert policy[f, s] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)
    assert renderings.total_variation(policy[0], policy[1]).mean() > 0.1


def test_returns_and_visits_are_those_of_the_linear_solve(world, agent):
    """In the training renderings: eta is the mean return of an episode, and d_f how often states are met."""
    policy = renderings.policies_of(agent, world.pictures)
    envs = world.make_envs(None, 500, 2, 0, rand_seed=1)
    rng = np.random.default_rng(1)
    counts = np.zeros((5, 72))
    total = 0.0
    episodes = 0
    for _ in range(800):
        _, rendering, state, _ = observe_states(world, envs)
        np.add.at(counts, (rendering, state), 1)
        cumulative = policy[rendering, state].cumsum(-1)
        actions = (cumulative < rng.random((500, 1))).sum(-1).clip(max=14)
        envs.act(actions.astype(np.int32))
        reward, _, first = envs.observe()
        total += reward.sum()
        episodes += first.sum()
    values = renderings.state_values(world.mdp, policy)
    weights = np.array([0.5, 0.5, 0, 0, 0])
    eta = renderings.performance(world.mdp, values, weights)
    assert total / episodes == pytest.approx(eta, rel=0.03)
    expected = renderings.visitations(world.mdp, policy)
    assert counts[2:].sum() == 0
    for f in range(2):
        shares = counts[f] / counts[f].sum()
        assert renderings.total_variation(shares, expected[f]) < 0.03
    assert renderings.total_variation(expected[0], expected[1]) > 0.1
    assert renderings.total_variation(expected[0], world.mdp.start) > 0.1


@pytest.mark.parametrize("num_levels, start_level, expected", [(2, 1, [1, 2]), (1, 4, [4]), (0, 0, range(5))])
def test_levels_are_renderings(world, num_levels, start_level, expected):
    envs = world.make_envs(None, 200, num_levels, start_level, rand_seed=0)
    _, rendering, _, _ = observe_states(world, envs)
    assert set(rendering) == set(expected)


def test_levels_that_there_are_not(world):
    message = "--start-level and --num-levels must have a sum of at most 5, not 6"
    with pytest.raises(ValueError, match=message):
        world.make_envs(None, 2, num_levels=2, start_level=4, rand_seed=0)


def test_types_are_procgens(world):
    """Episodes begin at once."""
    envs = world.make_envs(None, 3, 0, 0, rand_seed=0)
    reward, _, first = envs.observe()
    assert first.all()
    assert not reward.any()
    for _ in range(2):
        reward, obs, first = envs.observe()
        rgb = obs["rgb"]
        assert (reward.dtype, rgb.dtype, first.dtype) == (np.float32, np.uint8, bool)
        assert reward.shape == first.shape == (3,)
        assert rgb.shape == (3, 12, 12, 3)
        envs.act(np.full(3, 4, np.int32))


def test_an_episode_can_be_ended(world):
    """Of some environments, with the action -1, which pays nothing. The others play on as they would."""
    envs = world.make_envs(None, 400, 0, 0, rand_seed=0)
    others = world.make_envs(None, 400, 0, 0, rand_seed=0)
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


def test_a_state_goes_on_as_it_would(world):
    """In environments of another seed, which else play otherwise, and in the very same."""
    envs = world.make_envs(None, 20, 0, 0, rand_seed=1)
    others = world.make_envs(None, 20, 0, 0, rand_seed=2)
    assert (play_at_random(world, envs, 3) != play_at_random(world, others, 3)).any()
    states = envs.get_state()
    assert len(states) == 20
    assert all(isinstance(state, bytes) and state for state in states)
    now = observe_states(world, envs)
    expected = play_at_random(world, envs, 20)
    for each in (others, envs):
        each.set_state(states)
        for one, other in zip(observe_states(world, each), now):
            assert (one == other).all()
        assert (play_at_random(world, each, 20) == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_procgen", "mdspo_procgen"])
def test_a_script_trains_on_it(name, tmp_path, monkeypatch):
    """From its start to its final test. On 2 x 2 cells the coin is always one move away: the optimum is 5."""
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)
    world = World(grid_size=2, gamma=0.8, num_renderings=3)
    monkeypatch.setattr(script, "make_envs", world.make_envs)
    settings = {
        "gamma": 1.0,
        "total_timesteps": 10_000,
        "num_envs": 32,
        "num_steps": 16,
        "num_levels": 1,
        "channels": (8, 8, 8),
        "learning_rate": 3e-3,
        "clip_coef": 0.8,
        "eval_interval": 10,
        "device": "cpu",
    }
    script.main(script.Args(**settings))
    (path,) = tmp_path.glob("runs/*/final_test.json")
    result = json.loads(path.read_text())
    for of_agent in result["agents"]:
        assert of_agent["training_levels"]["mean"] > 3.0
