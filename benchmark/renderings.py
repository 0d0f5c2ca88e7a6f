"""Renderings of one finite MDP: the setting of the paper's theory, in which all that it speaks of is exact.

The first part computes sections 2 and 3 of the paper: training and generalization performance, robustness
(definition 3.6) and both sides of theorems 3.2, 3.3 and 3.7 and of corollary 3.8. Each is a linear solve and
a few sums, without sampling.

The second part is such an MDP to train on: an agent collects coins on a grid, and a rendering function draws
each state in colours and textures of its own. What an object is shows in its shape alone. World.make_envs
stands in for make_envs of the training scripts.

Shapes: F renderings, the first num_train of which are F_train, S states, A actions. A policy pi(a|o) is given
as mu_f(a|s) = pi(a|f(s)), of shape (F, S, A).
"""

import pickle
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch

TOLERANCE = 1e-6  # of a sum of probabilities: a softmax in float32 is no more exact


class MDP(NamedTuple):
    """Finite, all of it float64."""

    transition: np.ndarray  # (S, A, S): P(s'|s, a)
    reward: np.ndarray  # (S, A): r(s, a)
    start: np.ndarray  # (S,): rho(s)
    gamma: float  # discount factor, at least 0 and below 1


class Split(NamedTuple):
    """The probabilities of the renderings (assumption 3.1)."""

    train_mass: float  # M = p(F_train)
    test_mass: float  # 1 - M
    train: np.ndarray  # (F,): p_train, 0 outside F_train
    test: np.ndarray  # (F,): p_test, 0 in F_train, and 0 everywhere if test_mass is


def evaluate_bounds(
    transition: np.ndarray,
    reward: np.ndarray,
    start: np.ndarray,
    gamma: float,
    probability: np.ndarray,
    num_train: int,
    policy: np.ndarray,
    new_policy: np.ndarray,
) -> dict[str, float]:
    """The theory of a policy and of the one that an update has made of it.

    transition (S, A, S), reward (S, A), start (S,), probability (F,), policy and new_policy (F, S, A), all
    float64. ValueError if shapes do not fit, or probabilities are none.

    Gives the performances eta, zeta, new_eta and new_zeta, the surrogate L, the distances d_train and d_test
    (0 where no rendering is left for the test), robustness R and new_robustness R', and the right sides:
    new_eta is at least theorem_3_2, new_zeta at least theorem_3_3 and corollary_3_8, and d_test at most
    theorem_3_7.
    """
    mdp = MDP(transition, reward, start, gamma)
    check_problem(mdp, probability, num_train, policy, new_policy)
    split = split_renderings(probability, num_train)
    values = state_values(mdp, policy)
    new_values = state_values(mdp, new_policy)
    visitation = visitations(mdp, policy)
    advantage = action_values(mdp, values) - values[..., None]
    gain = (new_policy * advantage).sum(-1)  # g_f(s), (F, S)
    change = total_variation(new_policy, policy)  # (F, S)
    mean_gains = (visitation * gain).sum(-1)  # over d_f, (F,)
    mean_changes = (visitation * change).sum(-1)  # D_f, (F,)

    eta = performance(mdp, values, split.train)
    surrogate = eta + split.train @ mean_gains / (1 - gamma)
    d_train = split.train @ mean_changes
    d_test = split.test @ mean_changes
    robustness = pair_distances(visitation, policy).max()
    new_robustness = pair_distances(visitation, new_policy).max()
    d_test_bound = theorem_3_7(mdp, d_train, robustness, new_robustness, change[:num_train])
    theorem_3_3_at = partial(theorem_3_3, mdp, split, surrogate, gain, advantage, d_train)
    results = {
        "eta": eta,
        "zeta": performance(mdp, values, probability),
        "new_eta": performance(mdp, new_values, split.train),
        "new_zeta": performance(mdp, new_values, probability),
        "surrogate": surrogate,
        "d_train": d_train,
        "d_test": d_test,
        "robustness": robustness,
        "new_robustness": new_robustness,
        "theorem_3_2": theorem_3_2(mdp, surrogate, gain[:num_train], d_train),
        "theorem_3_3": theorem_3_3_at(d_test),
        "theorem_3_7": d_test_bound,
        "corollary_3_8": theorem_3_3_at(d_test_bound),
    }
    return {name: float(value) for name, value in results.items()}


def bound_gap(
    transition: np.ndarray,
    reward: np.ndarray,
    start: np.ndarray,
    gamma: float,
    probability: np.ndarray,
    num_train: int,
    policy: np.ndarray,
) -> float:
    """An upper bound on |eta - zeta| that is 0 where training and test renderings get the same policy, which
    is not in the paper. The arguments are those of evaluate_bounds:

        |eta - zeta| <= 2 (1 - M) A_max D / (1 - gamma),
        D = E_{f ~ p_train} E_{k ~ p_test} E_{s ~ d_f} TV(mu_f, mu_k)(s).

    Since zeta = M eta + (1 - M) E_{k ~ p_test} V_k(rho), the gap is (1 - M) times the mean of
    V_f(rho) - V_k(rho) over f ~ p_train and k ~ p_test. mu_f and mu_k are policies of one MDP, so by the
    performance difference lemma (Kakade and Langford 2002)

        V_f(rho) - V_k(rho) = E_{s ~ d_f} E_{a ~ mu_f} A_k(s, a) / (1 - gamma),

    and as mu_k has no advantage over itself, |E_{a ~ mu_f} A_k(s, a)| <= 2 TV(mu_f, mu_k)(s) A_max.
    """
    mdp = MDP(transition, reward, start, gamma)
    check_problem(mdp, probability, num_train, policy, policy)
    split = split_renderings(probability, num_train)
    values = state_values(mdp, policy)
    advantage = action_values(mdp, values) - values[..., None]
    a_max = np.abs(advantage).max()
    distances = pair_distances(visitations(mdp, policy), policy)
    mean_distance = split.train @ distances @ split.test
    return float(2 * split.test_mass * a_max / (1 - gamma) * mean_distance)


def check_problem(mdp: MDP, probability, num_train: int, policy, new_policy):
    """ValueError if shapes do not fit, probabilities are none, or the training never meets a rendering."""
    if np.ndim(mdp.reward) != 2:
        raise ValueError(f"reward must have the shape (S, A), not {np.shape(mdp.reward)}")
    if np.ndim(probability) != 1:
        raise ValueError(f"probability must have the shape (F,), not {np.shape(probability)}")
    number = len(probability)
    num_states, num_actions = mdp.reward.shape
    check_distribution("transition", mdp.transition, (num_states, num_actions, num_states))
    check_distribution("start", mdp.start, (num_states,))
    check_distribution("probability", probability, (number,))
    check_distribution("policy", policy, (number, *mdp.reward.shape))
    check_distribution("new_policy", new_policy, (number, *mdp.reward.shape))
    if not np.isfinite(mdp.reward).all():
        raise ValueError("reward must be finite")
    if not 0 <= mdp.gamma < 1:
        raise ValueError(f"gamma must be at least 0 and below 1, not {mdp.gamma}")
    if not 1 <= num_train <= number:
        raise ValueError(f"num_train must be from 1 to {number}, not {num_train}")
    if probability[:num_train].sum() <= 0:
        raise ValueError(f"probability must not be 0 for all of the first {num_train} renderings, num_train")


def check_distribution(name: str, array, shape: tuple):
    """ValueError unless it has the shape, and is a distribution along the last axis."""
    if np.shape(array) != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {np.shape(array)}")
    smallest = np.min(array)
    if not smallest >= 0:  # nor is NaN
        raise ValueError(f"{name} must hold probabilities, not {smallest}")
    sums = np.sum(array, axis=-1)
    furthest = np.abs(sums - 1).max()
    if not furthest <= TOLERANCE:
        raise ValueError(f"{name} must sum to 1 along its last axis, and is off by {furthest:.2g}")


def split_renderings(probability, num_train: int) -> Split:
    """p_train = p / M on F_train and p_test = p / (1 - M) outside, from p, (F,)."""
    train = np.array(probability, float)
    test = train.copy()
    train[num_train:] = 0
    test[:num_train] = 0
    train_mass = train.sum()
    test_mass = test.sum()
    if test_mass > 0:
        test /= test_mass
    return Split(train_mass, test_mass, train / train_mass, test)


def bellman_matrices(mdp: MDP, policy):
    """I - gamma P_f, (F, S, S), with P_f(s'|s) = sum_a mu_f(a|s) P(s'|s, a), of mu_f, (F, S, A)."""
    by_state = policy.swapaxes(0, 1) @ mdp.transition
    transitions = by_state.swapaxes(0, 1)
    return np.eye(len(mdp.start)) - mdp.gamma * transitions


def solve(matrices, vectors):
    """The x of matrix x = vector, (F, S), from (F, S, S) and (F, S)."""
    solutions = np.linalg.solve(matrices, vectors[..., None])
    return solutions[..., 0]


def state_values(mdp: MDP, policy):
    """V_f(s), (F, S), of mu_f, (F, S, A): the solution of V_f = r_f + gamma P_f V_f (equation 1)."""
    matrices = bellman_matrices(mdp, policy)
    rewards = (policy * mdp.reward).sum(-1)
    return solve(matrices, rewards)


def action_values(mdp: MDP, values):
    """Q_f(s, a) = r(s, a) + gamma sum_s' P(s'|s, a) V_f(s'), (F, S, A), of V_f, (F, S)."""
    num_states, num_actions = mdp.reward.shape
    table = mdp.transition.reshape(num_states * num_actions, num_states)
    following = values @ table.T
    following = following.reshape(-1, num_states, num_actions)
    return mdp.reward + mdp.gamma * following


def visitations(mdp: MDP, policy):
    """d_f(s) = (1 - gamma) sum_t gamma^t P(s_t = s), (F, S), of mu_f, (F, S, A): the solution of
    d_f = (1 - gamma) rho + gamma d_f P_f."""
    matrices = bellman_matrices(mdp, policy).swapaxes(1, 2)
    at_first = (1 - mdp.gamma) * mdp.start
    all_at_first = np.broadcast_to(at_first, matrices.shape[:2])
    return solve(matrices, all_at_first)


def performance(mdp: MDP, values, weights):
    """sum_f w(f) sum_s rho(s) V_f(s), a scalar: eta with the weights p_train, zeta with p (equation 4). V_f
    is (F, S), w (F,)."""
    return weights @ values @ mdp.start


def total_variation(policy, other):
    """TV(s) = sum_a |mu(a|s) - nu(a|s)| / 2, (..., S), of policies that broadcast to (..., S, A)."""
    return np.abs(policy - other).sum(-1) / 2


def pair_distances(visitation, policy):
    """E_{s ~ d_f} TV(mu_f, mu_k)(s) of all pairs of renderings f and k, (F, F), of d_f, (F, S), and mu_f,
    (F, S, A). The largest is R (definition 3.6). For R' the policy is the new one, and d_f those of the
    old."""
    rows = []
    for weights, of_rendering in zip(visitation, policy):  # all pairs at once would take too much memory
        distances = total_variation(policy, of_rendering)
        rows.append(distances @ weights)
    return np.stack(rows)


def theorem_3_2(mdp: MDP, surrogate, train_gain, d_train):
    """new_eta >= L - 2 gamma eps_train D_train / (1 - gamma)^2, with eps_train the largest |g_f(s)| of
    F_train. g_f is (num_train, S), the rest scalars."""
    eps_train = np.abs(train_gain).max()
    return surrogate - 2 * mdp.gamma * eps_train * d_train / (1 - mdp.gamma) ** 2


def theorem_3_3(mdp: MDP, split: Split, surrogate, gain, advantage, d_train, d_test):
    """new_zeta >= L - 2 (1 - M) r_max / (1 - gamma)
                     - 2 gamma eps (M D_train + (1 - M) D_test) / (1 - gamma)^2
                     - 2 (1 - M) A_max (D_train + D_test) / (1 - gamma),

    with r_max, eps and A_max the largest |r(s, a)|, |g_f(s)| and |A_f(s, a)| over F. Corollary 3.8 has the
    right side of theorem 3.7 for D_test. g_f is (F, S), A_f (F, S, A), the rest scalars."""
    r_max = np.abs(mdp.reward).max()
    eps = np.abs(gain).max()
    a_max = np.abs(advantage).max()
    horizon = 1 / (1 - mdp.gamma)
    d_all = split.train_mass * d_train + split.test_mass * d_test
    of_reward = 2 * split.test_mass * r_max * horizon
    of_visitation = 2 * mdp.gamma * eps * d_all * horizon**2
    of_advantage = 2 * split.test_mass * a_max * (d_train + d_test) * horizon
    return surrogate - of_reward - of_visitation - of_advantage


def theorem_3_7(mdp: MDP, d_train, robustness, new_robustness, train_change):
    """D_test <= D_train + R + R' + 2 gamma sigma R / (1 - gamma), with sigma the largest TV(mu'_f, mu_f)(s)
    of F_train. TV is (num_train, S), the rest scalars."""
    sigma = train_change.max()
    of_visitation = 2 * mdp.gamma * sigma * robustness / (1 - mdp.gamma)
    return d_train + robustness + new_robustness + of_visitation


def optimal_values(mdp: MDP):
    """V*(s), (S,), by policy iteration (Howard 1960): better policies until none gains more than rounding."""
    num_states, num_actions = mdp.reward.shape
    values = np.full(num_states, -np.inf)
    greedy = mdp.reward.argmax(-1)
    while True:
        policy = np.eye(num_actions)[greedy]
        (better,) = state_values(mdp, policy[None])
        rounding = 1e-10 * np.abs(better).max()
        if (better - values).max() <= rounding:
            return better
        values = better
        (of_actions,) = action_values(mdp, values[None])
        greedy = of_actions.argmax(-1)


# What follows is an MDP to train on, and its renderings.

CELL = 4  # pixels on a side
AGENT_SHAPE = ".##. #### #### .##."  # row by row, where it covers the floor
COIN_SHAPE = "#..# .##. .##. #..#"
NUM_ACTIONS = 15  # Procgen's: 3 x 3 moves, and six that do nothing


def grid_states(grid_size: int):
    """The cells of agent and coin in each state, int (S, 2), S = n (n - 1) for n cells: never the same."""
    pairs = permutations(range(grid_size**2), 2)
    return np.array(list(pairs))


def neighbours(grid_size: int):
    """The cell that each action leads to from each, int (grid_size^2, NUM_ACTIONS). As in Procgen the action
    3 i + j goes i - 1 to the right and j - 1 up, as far as there are cells; those after the ninth stay."""
    moves = np.arange(9)
    right = np.zeros(NUM_ACTIONS, int)
    up = np.zeros(NUM_ACTIONS, int)
    right[moves] = moves // 3 - 1
    up[moves] = moves % 3 - 1
    cells = np.arange(grid_size**2)
    rows, columns = np.divmod(cells[:, None], grid_size)
    last = grid_size - 1
    to_rows = (rows - up).clip(0, last)
    to_columns = (columns + right).clip(0, last)
    return to_rows * grid_size + to_columns


def make_grid(grid_size: int, gamma: float) -> MDP:
    """A coin that the agent steps on pays 1 and appears anew, in any cell but the agent's. It begins in any
    state. There is no end but that of the discount: see Envs."""
    states = grid_states(grid_size)
    agents, coins = states.T
    num_states = len(states)
    num_cells = grid_size**2
    number = np.full((num_cells, num_cells), -1)  # of the state with these cells
    number[agents, coins] = range(num_states)
    moves = neighbours(grid_size)
    transition = np.zeros((num_states, NUM_ACTIONS, num_states))
    reward = np.zeros((num_states, NUM_ACTIONS))
    for state, (agent, coin) in enumerate(states):
        for action, to_cell in enumerate(moves[agent]):
            if to_cell == coin:
                reward[state, action] = 1.0
                with_new_coin = agents == to_cell
                transition[state, action, with_new_coin] = 1 / (num_cells - 1)
            else:
                following = number[to_cell, coin]
                transition[state, action, following] = 1.0
    start = np.full(num_states, 1 / num_states)
    return MDP(transition, reward, start, gamma)


def draw_pattern(rng, size: int):
    """A texture, float (size, size) in [0, 1]."""
    rows, columns = np.indices((size, size))
    kind = rng.choice(["plain", "stripes", "checks", "noise"])
    period = rng.integers(2, 7)
    down, right = rng.integers(-1, 2, size=2)
    noise = rng.random((size, size))
    if kind == "plain":
        return np.full((size, size), 0.5)
    if kind == "stripes":
        phase = rows * down + columns * right
        return phase % period / (period - 1)
    if kind == "checks":
        return (rows // period + columns // period) % 2.0
    return noise[rows // period, columns // period]


def draw_surface(rng, size: int, color):
    """A textured square of about one colour, uint8 (size, size, 3)."""
    contrast = rng.uniform(-60, 60, size=3)  # too little to bridge the distance of draw_colors
    pattern = draw_pattern(rng, size) - 0.5
    surface = color + pattern[..., None] * contrast
    return surface.clip(0, 255).astype(np.uint8)


def draw_colors(rng):
    """Of floor, agent and coin, (3, 3). The objects stand out from the floor, though not from each other."""
    while True:
        colors = rng.uniform(0, 255, size=(3, 3))
        floor, *objects = colors
        distances = np.linalg.norm(objects - floor, axis=-1)
        if distances.min() > 120:
            return colors


def draw_rendering(rng, grid_size: int):
    """One rendering function: the picture of every state, uint8 (S, height, width, 3)."""
    agents, coins = grid_states(grid_size).T
    floor_color, agent_color, coin_color = draw_colors(rng)
    floor = draw_surface(rng, CELL * grid_size, floor_color)
    agent = draw_surface(rng, CELL, agent_color)
    coin = draw_surface(rng, CELL, coin_color)
    pictures = np.stack([floor] * len(agents))
    for picture, agent_cell, coin_cell in zip(pictures, agents, coins):
        paste(picture, agent_cell, agent, AGENT_SHAPE)
        paste(picture, coin_cell, coin, COIN_SHAPE)
    return pictures


def paste(picture, cell: int, surface, shape: str):
    """Draws an object into a cell of a picture, (height, width, 3)."""
    rows = [list(row) for row in shape.split()]
    covers = np.array(rows) == "#"
    row, column = divmod(cell, len(picture) // CELL)
    top = row * CELL
    left = column * CELL
    square = picture[top : top + CELL, left : left + CELL]  # a view
    square[covers] = surface[covers]


@dataclass
class World:
    """A grid and its renderings, which are equally likely."""

    grid_size: int = 5
    gamma: float = 0.9
    num_renderings: int = 64
    seed: int = 0  # of the renderings

    def __post_init__(self):
        self.mdp = make_grid(self.grid_size, self.gamma)
        self.probability = np.full(self.num_renderings, 1 / self.num_renderings)
        pictures = []
        for number in range(self.num_renderings):
            rng = np.random.default_rng([self.seed, number])
            pictures.append(draw_rendering(rng, self.grid_size))
        self.pictures = np.stack(pictures)  # uint8 (F, S, height, width, 3)

    def make_envs(self, args, num: int, num_levels: int, start_level: int, rand_seed: int):
        """In place of a training script's make_envs, with renderings for levels: num_levels of them from
        start_level, 0 for all. ValueError if there are not so many."""
        most = self.num_renderings
        end = start_level + num_levels if num_levels > 0 else most
        if end > most:
            raise ValueError(f"--start-level and --num-levels must have a sum of at most {most}, not {end}")
        return Envs(self.mdp, self.pictures[start_level:end], num, rand_seed)


class Envs:
    """Environments behind Procgen's gym3 interface that play an MDP, each episode in one rendering.

    After every step an episode goes on with probability gamma, whatever the state: that is the discount
    itself. So V_f(s) is the mean undiscounted return of episodes from s, d_f is how often they meet each
    state, and a training with --gamma 1, in which a `first` ends the return, maximises eta exactly.
    """

    def __init__(self, mdp: MDP, pictures, num: int, rand_seed: int):
        """pictures: uint8 (number of renderings, S, height, width, 3). All renderings are equally likely."""
        self.mdp = mdp
        self.pictures = pictures
        self.num = num
        self.rng = np.random.default_rng(rand_seed)
        sums = mdp.transition.cumsum(-1)
        self.cumulative = sums / sums[..., -1:]  # so that the last is 1
        sums = mdp.start.cumsum()
        self.cumulative_start = sums / sums[-1]
        self.reward = np.zeros(num, np.float32)
        self.first = np.ones(num, bool)
        self.state = np.zeros(num, int)
        self.rendering = np.zeros(num, int)
        self.begin_episodes()

    def begin_episodes(self):
        """Where `first` says so. All draw numbers, so that an end changes nobody else's luck."""
        draws = self.rng.random(self.num)
        states = np.searchsorted(self.cumulative_start, draws, side="right")
        renderings = self.rng.integers(len(self.pictures), size=self.num)
        self.state = np.where(self.first, states, self.state)
        self.rendering = np.where(self.first, renderings, self.rendering)

    def act(self, actions):
        """A step in each environment, int32 (num,). The action -1 ends its episode, and pays nothing."""
        by_hand = actions == -1
        actions = np.where(by_hand, 0, actions)
        rewards = self.mdp.reward[self.state, actions]
        rewards[by_hand] = 0
        self.reward = rewards.astype(np.float32)
        draws = self.rng.random((self.num, 1))
        cumulative = self.cumulative[self.state, actions]
        self.state = (cumulative <= draws).sum(-1)
        by_chance = self.rng.random(self.num) >= self.mdp.gamma
        self.first = by_hand | by_chance
        self.begin_episodes()

    def observe(self):
        """reward float32 (num,), {"rgb": uint8 (num, height, width, 3)}, first bool (num,)."""
        obs = self.pictures[self.rendering, self.state]
        return self.reward, {"rgb": obs}, self.first

    def get_state(self) -> list[bytes]:
        """Of all environments, once for each: they share their random numbers."""
        state = (self.rng, self.state, self.rendering, self.reward, self.first)
        return self.num * [pickle.dumps(state)]

    def set_state(self, states: list[bytes]):
        self.rng, self.state, self.rendering, self.reward, self.first = pickle.loads(states[0])

    def close(self):
        pass


@torch.no_grad()
def policies_of(agent, pictures):
    """mu_f(a|s), float64 (F, S, A), of an agent of the training scripts, from the pictures of all states,
    uint8 (F, S, height, width, 3)."""
    num_renderings, num_states = pictures.shape[:2]
    obs = torch.from_numpy(pictures).flatten(0, 1)
    logits = []
    for part in obs.split(1024):  # which fits into a CPU's caches
        part_logits, _ = agent(part)
        logits.append(part_logits)
    policy = torch.cat(logits).double().softmax(-1)
    return policy.reshape(num_renderings, num_states, -1).numpy()
