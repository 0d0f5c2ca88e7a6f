"""Whether representations converge: what compares encoders, and the command that does on a finite MDP."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import convergence
import theory
from renderings import World, evaluate_bounds, policies_of

from robustness_eval import linear_cka, neighbour_agreement


@pytest.fixture
def encodings() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, 1, 6, dtype=torch.float64)
    return 3 + spread * torch.randn(400, 6, dtype=torch.float64, generator=generator)


def rotation(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def test_cka_does_not_see_rotation_scale_and_shift(encodings):
    assert linear_cka(encodings, encodings) == pytest.approx(1)
    assert linear_cka(encodings, 5 * encodings @ rotation(6) - 7) == pytest.approx(1)


def test_cka_of_what_has_little_in_common(encodings):
    """Of independent encodings near 0, more so with more observations; and it sees that axes were scaled. By
    hand: of x and its first column a with variance a of several, a / sqrt(sum of squared variances)."""
    other = encodings[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    assert linear_cka(encodings, other) < 0.1
    assert linear_cka(encodings, encodings / encodings.std(0)) < 0.9
    x = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    assert linear_cka(x, x[:, :1]) == pytest.approx(4 / 17**0.5)
    assert linear_cka(x, x[:, 1:]) == pytest.approx(1 / 17**0.5)


def test_debiased_cka(encodings):
    """Of independent encodings of few observations 0 on average, where the plain one is far from it. As good
    as the plain one where there are many, and 1 of the same."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(50):
        x, y = (torch.randn(20, 30, dtype=torch.float64, generator=generator) for _ in range(2))
        found.append([linear_cka(x, y), linear_cka(x, y, debiased=True)])
    plain, debiased = np.mean(found, axis=0)
    assert plain > 0.5
    assert abs(debiased) < 0.03
    assert linear_cka(x, 2 * x @ rotation(30), debiased=True) == pytest.approx(1)
    part = encodings[:, :2]
    assert linear_cka(encodings, part, debiased=True) == pytest.approx(linear_cka(encodings, part), abs=0.01)


def test_constant_encodings_are_like_nothing(encodings):
    constant = torch.ones_like(encodings)
    for compare in (linear_cka, neighbour_agreement):
        assert np.isnan(compare(encodings, constant)) and np.isnan(compare(constant, constant))


def test_neighbours(encodings):
    """The same under rotation and scale; by chance k / (N - 1)."""
    assert neighbour_agreement(encodings, 2 * encodings @ rotation(6)) == pytest.approx(1)
    generator = torch.Generator().manual_seed(3)
    others = [torch.randn(400, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    assert neighbour_agreement(*others, k=40) == pytest.approx(40 / 399, abs=0.02)
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0, 1.2], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    y = x[[1, 0, 2, 3, 4]] * torch.tensor(
        [[1.0], [9.0], [1.0], [1.0], [1.0]]
    )  # directions count, not lengths
    # The nearest are 1, 0, 1, 4, 3 of x, and 1, 0, 0, 4, 3 of y.
    assert neighbour_agreement(x, y, k=1) == pytest.approx(4 / 5)


def test_effective_rank():
    x = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    assert convergence.effective_rank(x) == pytest.approx(3)  # of four corners around their mean
    assert convergence.effective_rank(x[:, :1] + 1) == pytest.approx(1)
    two = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert convergence.effective_rank(two) == pytest.approx(np.exp(entropy))


DESIGN = theory.DESIGN | {
    "grid_size": 2,
    "num_renderings": 6,
    "measurements": 1,
    "total_timesteps": 4096,
    "settings": theory.SETTINGS | {"num_envs": 32},
}


def train(method: str) -> dict:
    return convergence.train(theory.Job(method, 2, seed=3), DESIGN)


@pytest.fixture(scope="module")
def of_mdpo() -> dict:
    return train("mdpo")


def test_two_trainings_are_measured_before_and_after(of_mdpo):
    """Two agents each: two pairs of one training, and four that never met."""
    assert of_mdpo["job"] == {"method": "mdpo", "num_train": 2, "seed": 3}
    assert [row["iteration"] for row in of_mdpo["agents"]] == 4 * [0] + 4 * [1]
    assert len({row["eta"] for row in of_mdpo["agents"]}) == 8
    relations = [row["relation"] for row in of_mdpo["pairs"]]
    assert relations == 2 * ["pair", *4 * ["never met"], "pair"]
    for row in of_mdpo["pairs"]:
        assert all(0 < row[name] < 1 for name in convergence.LIKENESS)
    assert [row["relation"] for row in train("ppo")["pairs"]] == 2 * ["never met"]


def test_a_world_gives_the_same_again_and_another_does_not(of_mdpo):
    assert train("mdpo") == of_mdpo
    other = convergence.train(theory.Job("mdpo", 2, seed=4), DESIGN)
    assert other["agents"][0]["zeta"] != of_mdpo["agents"][0]["zeta"]


def test_measures_of_an_agent():
    """What theory.py measures is the same. The halves of the unseen renderings 2 to 5 are 2 and 4, 3 and 5.
    An agent that is blind to its input is as robust as can be, and has no gap."""
    world = World(2, 0.8, 6, seed=5)
    torch.manual_seed(0)
    agent = theory.copy_script("ppo_procgen").Agent(channels=(8, 16, 16), obs_shape=(8, 8, 3))
    agent.actor.weight.data *= 500
    policy = policies_of(agent, world.pictures)
    (row,) = convergence.measure_agents(world, 2, [agent])
    exact = evaluate_bounds(*world.mdp, world.probability, 2, policy, policy)
    assert [row["eta"], row["zeta"]] == pytest.approx([exact["eta"] / 5, exact["zeta"] / 5])
    assert row["gap"] == pytest.approx(row["eta"] - row["zeta"])
    half = World(2, 0.8, 6, seed=5)
    chosen = policy[[0, 1, 3, 5]]
    weights = np.full(4, 0.25)
    exact_half = evaluate_bounds(*half.mdp, weights, 2, chosen, chosen)
    rest = 2 * exact_half["zeta"] - exact_half["eta"]  # on 3 and 5 alone
    assert row["half_gap"] == pytest.approx((exact["eta"] - rest) / 5)
    d = theory.pair_distances(theory.visitations(world.mdp, policy), policy)
    assert row["half_robustness"] == pytest.approx(d[[0, 0, 1, 1], [2, 4, 2, 4]].mean())
    assert 0 < row["conv_robustness"] < 1
    assert abs(row["gap"]) <= row["bound"]
    assert 0 < row["entropy"] < np.log(15)
    agent.actor.weight.data *= 0
    (blind,) = convergence.measure_agents(world, 2, [agent])
    for name in ("gap", "half_gap", "half_robustness", "conv_robustness", "mean_robustness", "bound"):
        assert blind[name] == pytest.approx(0, abs=1e-9)
    assert blind["entropy"] == pytest.approx(np.log(15))


def make_result(method: str, num_train: int, world: int, value: float) -> dict:
    """Two agents of two trainings before and after; all that is measured after is `value`."""
    agents = []
    pairs = []
    for iteration, measured in [(0, 0.0), (61, value)]:
        names = [*convergence.RETURNS, *convergence.RANKS, *convergence.ROBUSTNESS, "half_gap", "bound"]
        for shift in (-0.1, 0.1):
            agents.append(dict.fromkeys(names, measured + shift) | {"iteration": iteration})
        likeness = dict.fromkeys(convergence.LIKENESS, measured)
        pairs.append(likeness | {"iteration": iteration, "relation": "never met"})
        if method == "mdpo":
            likeness = dict.fromkeys(convergence.LIKENESS, measured + 0.25)
            pairs.append(likeness | {"iteration": iteration, "relation": "pair"})
    job = {"method": method, "num_train": num_train, "seed": world}
    return {"job": job, "agents": agents, "pairs": pairs}


@pytest.fixture
def results() -> list[dict]:
    """In world w PPO has w / 10, MDPO 0.5 more, and w / 100 more yet on 8 renderings."""
    results = []
    for world in (1, 2, 3):
        for num_train in (4, 8):
            of_ppo = world / 10
            results.append(make_result("ppo", num_train, world, of_ppo))
            of_mdpo = of_ppo + 0.5 + (num_train == 8) * world / 100
            results.append(make_result("mdpo", num_train, world, of_mdpo))
    return results


def cells(table: str, start: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [row for row in rows if row[0] == start]


def test_differences_are_within_worlds(results):
    """Half as wide as those of worlds are apart. Student's t of 2 degrees of freedom is 4.303."""
    text = convergence.make_tables(results)
    mean, four, eight = cells(text, "MDPO - PPO")
    assert [mean[1], four[1], eight[1]] == ["mean", "4", "8"]
    assert mean[2] == "3"
    half = 4.303 * 0.005 / 3**0.5
    assert mean[3] == f"0.510 ({0.51 - half:.3f} to {0.51 + half:.3f}) *"
    assert eight[3].startswith("0.520 (")
    mean, *_ = cells(text, "MDPO: pair - MDPO: never met")
    assert mean[3].startswith("0.250 (")
    mean, *_ = cells(text, "MDPO: never met - PPO: never met")
    assert mean[3].startswith("0.510 (")


def test_a_world_that_lacks_an_n_has_no_mean(results):
    """But its other n count."""
    del results[-1]  # MDPO on 8 renderings of the third world
    text = convergence.make_tables(results)
    mean, four, eight = cells(text, "MDPO - PPO")
    assert [mean[2], four[2], eight[2]] == ["2", "3", "2"]
    assert mean[3] == "0.508"


def test_a_mean_is_over_the_n_that_both_have(results):
    """PPO alone was trained on 16."""
    results += [make_result("ppo", 16, world, 9.0) for world in (1, 2, 3)]
    mean, *_ = cells(convergence.make_tables(results), "MDPO - PPO")
    assert mean[1:3] == ["mean", "3"] and mean[3].startswith("0.510 (")


@pytest.mark.parametrize("words", ["--num-train 63", "--num-train 0", "--methods dqn", "--seeds 0"])
def test_bad_flags(words, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(convergence.Args, args=words.split())
    assert stop.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_values_correlations_and_bound(results):
    text = convergence.make_tables(results)
    of_ppo = cells(text, "PPO")
    assert of_ppo[0][1:3] == ["4", "3"] and of_ppo[0][3].startswith("0.200 (")
    assert of_ppo[-1][1:] == ["8", "1.0"]  # the bound
    for title in convergence.ROBUSTNESS.values():
        (row,) = cells(text, title)
        assert row[1:] == ["24", "3", "1.000", "1.000"]


def test_figure(results):
    """Before and after, of each kind of pair."""
    figure = convergence.draw(results)
    assert len(figure.axes) == 4
    curves = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert curves["PPO: never met"] == pytest.approx(np.array([[0, 0], [61, 0.2]]))
    assert curves["MDPO: pair"] == pytest.approx(np.array([[0, 0.25], [61, 0.95]]))
