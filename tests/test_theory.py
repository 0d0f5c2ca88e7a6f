"""The command that measures the theory: its trainings, its statistics, its files and its errors."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import ROOT, error_message

sys.path.insert(0, str(ROOT / "benchmark"))
import theory
from helpers import Failure, run_tool
from renderings import World
from theory import Args, Design, Job

TINY = {
    "methods": ("ppo",),
    "num_train": (2,),
    "seeds": 1,
    "total_timesteps": 4096,
    "grid_size": 2,
    "num_renderings": 3,
    "measurements": 1,
    "processes": 1,
}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the tool: these networks are too small for more."""
    torch.set_num_threads(1)


def tiny_args(folder, **changes) -> Args:
    return Args(**TINY | changes, output=folder)


def train(method: str, num_train: int = 2, seed: int = 1, num_updates: int = 1) -> dict:
    """As the command does, but in fewer environments, and all updates are measured."""
    settings = theory.SETTINGS | {"num_envs": 32}
    design = Design(
        total_timesteps=512 * num_updates,
        grid_size=2,
        gamma=0.8,
        num_renderings=3,
        measurements=num_updates,
        settings=settings,
    )
    world = World(design.grid_size, design.gamma, design.num_renderings)
    return theory.train(Job(method, num_train, seed), design, world)


# Trainings.


@pytest.fixture(scope="module")
def of_mdpo() -> dict:
    return train("mdpo", num_updates=2)


def test_a_training_is_measured(of_mdpo):
    """Of each agent, at both updates."""
    assert [row["iteration"] for row in of_mdpo["rows"]] == [1, 2]
    for row in of_mdpo["rows"]:
        first, second = row["agents"]
        assert first["eta"] != second["eta"]
        assert row["losses"]["policy_loss"] != 0  # there are advantages
        for agent in row["agents"]:
            assert 0 < agent["eta"] < of_mdpo["optimum"]
            assert agent["new_zeta"] >= agent["theorem_3_3"]
            assert agent["train_robustness"] <= agent["robustness"]
    assert of_mdpo["optimum"] == pytest.approx(5.0)  # a coin a step


def test_what_comes_before_and_after_an_update(of_mdpo):
    """The policy after the first is that before the second, and the update has changed it."""
    first, second = (row["agents"][0] for row in of_mdpo["rows"])
    for name in ("eta", "zeta"):
        assert second[name] == pytest.approx(first[f"new_{name}"], rel=1e-9)
    assert first["d_train"] > 0


def test_the_last_update_is_measured_at_all_gammas(of_mdpo):
    """The first of them is the sum of all rewards of one step; that of the training is among them."""
    first, last = of_mdpo["rows"]
    assert first["at_gamma"] == {}
    assert list(last["at_gamma"]) == [str(gamma) for gamma in theory.GAMMAS]
    for agent, there in zip(last["agents"], last["at_gamma"]["0.8"]):
        assert there["theorem_3_3"] == pytest.approx(agent["theorem_3_3"])
    assert last["at_gamma"]["0.5"][0]["eta"] < last["agents"][0]["eta"]


def test_training_renderings_are_the_first(of_mdpo):
    """Of eta's three renderings two: with all three it is zeta."""
    agent = of_mdpo["rows"][-1]["agents"][0]
    assert agent["eta"] != agent["zeta"]
    agent = train("ppo", num_train=3)["rows"][-1]["agents"][0]
    assert agent["eta"] == pytest.approx(agent["zeta"])
    assert agent["train_robustness"] == agent["robustness"]


def test_one_rendering_deceives_nobody():
    """There is none to differ from, but in the test."""
    agent = train("ppo", num_train=1)["rows"][-1]["agents"][0]
    assert agent["train_robustness"] == 0
    assert agent["robustness"] > 0


def test_a_seed_gives_the_same_again():
    first = train("ppo")
    assert train("ppo") == first
    assert train("ppo", seed=2)["rows"] != first["rows"]


@pytest.mark.slow
def test_ppo_learns():
    """Uniform play has an eighth of the optimum."""
    result = train("ppo", num_train=1, num_updates=60)
    assert result["rows"][-1]["agents"][0]["new_eta"] > 0.5 * result["optimum"]


@pytest.mark.slow
def test_methods():
    """All train, with as many agents as they say. Mutual distillation has a loss of its own, and each gives
    other policies than each."""
    num_agents = {"mdpo_three": 3, "ppo": 1, "spo": 1, "ppo_both": 1}
    etas = set()
    for method in theory.METHODS:
        result = train(method)
        assert result["job"]["method"] == method
        (row,) = result["rows"]
        assert len(row["agents"]) == num_agents.get(method, 2)
        assert ("mutual_kl" in row["losses"]) == method.startswith("md")
        etas.add(row["agents"][0]["new_eta"])
    assert len(etas) == len(theory.METHODS)


def test_the_scripts_stay_as_they_are():
    """A training has a copy of its script."""
    import ppo_procgen

    train("ppo")
    assert ppo_procgen.make_envs.__module__ == "ppo_procgen"


def test_measured_iterations():
    assert theory.measured_iterations(100, 4) == {25, 50, 75, 100}
    assert theory.measured_iterations(100, 1) == {100}
    assert theory.measured_iterations(2, 5) == {1, 2}


# Statistics, of results that are made by hand.


def make_result(method="ppo", num_train=1, seed=1, agents=((4.0, 1.0, 0.5),), mutual_kl=None) -> dict:
    """agents: eta, zeta and R of each. The optimum is 5."""
    measured = []
    for eta, zeta, robustness in agents:
        agent = {"eta": eta, "zeta": zeta, "robustness": robustness, "train_robustness": robustness / 2}
        agent |= {"new_eta": eta, "new_zeta": zeta}
        agent |= {"theorem_3_2": 0.0, "theorem_3_3": -1.0, "corollary_3_8": -2.0}
        measured.append(agent)
    losses = {} if mutual_kl is None else {"mutual_kl": mutual_kl}
    at_gamma = {str(gamma): measured for gamma in theory.GAMMAS}
    row = {"iteration": 1, "agents": measured, "at_gamma": at_gamma, "losses": losses}
    job = {"method": method, "num_train": num_train, "seed": seed}
    return {"job": job, "optimum": 5.0, "rows": [row]}


def test_final_values_are_means_over_agents():
    result = make_result(agents=[(4.0, 1.0, 0.5), (3.0, 2.0, 0.7)])
    values = theory.final_values([result, make_result()])
    assert values["eta"] == pytest.approx([0.7, 0.8])
    assert values["zeta"] == pytest.approx([0.3, 0.2])
    assert values["gap"] == pytest.approx([0.4, 0.6])
    assert values["robustness"] == pytest.approx([0.6, 0.5])
    assert values["train_robustness"] == pytest.approx([0.3, 0.25])


def test_final_values_are_of_the_last_row():
    result = make_result(agents=[(1.0, 1.0, 0.0)])
    result["rows"] += make_result()["rows"]
    assert theory.final_values([result])["eta"] == pytest.approx([0.8])


def test_interval_of_the_mean():
    """That of the normal distribution, of many values."""
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    mean, low, high = theory.mean_interval(values)
    assert mean == values.mean()
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_ranks():
    assert theory.ranks(np.array([3.0, 1.0, 2.0, 1.0])).tolist() == [3.0, 0.5, 2.0, 0.5]


def test_rank_correlation():
    """By hand: 1 - 6 sum d^2 / (n (n^2 - 1)) where no values are equal."""
    first = np.array([1.0, 2.0, 3.0, 4.0, 50.0])
    second = np.array([2.0, 1.0, 30.0, 5.0, 4.0])
    differences = np.array([0, 1, 2, 3, 4]) - np.array([1, 0, 4, 3, 2])
    expected = 1 - 6 * (differences**2).sum() / (5 * 24)
    assert theory.rank_correlation(first, second) == pytest.approx(expected)
    assert theory.rank_correlation(first, -(first**3)) == pytest.approx(-1.0)
    assert np.isnan(theory.rank_correlation(first, np.ones(5)))


def test_interval_of_a_correlation():
    rng = np.random.default_rng(0)
    first = rng.normal(size=100)
    middle, low, high = theory.correlation_interval(first, first + rng.normal(size=100))
    assert low < middle < high
    assert 0.5 < middle < 0.8
    assert 0.1 < high - low < 0.4
    assert np.isnan(theory.correlation_interval(np.ones(3), np.arange(3.0))).all()


def test_table():
    results = []
    for seed, zeta in [(1, 1.0), (2, 2.0)]:
        results.append(make_result("mdpo", 4, seed, agents=[(4.0, zeta, 0.5)]))
        results.append(make_result("ppo", 1, seed, agents=[(4.0, zeta, 0.25 * zeta)]))
    lines = theory.make_table(results).splitlines()
    ppo, mdpo = lines[2:4]
    assert ppo.startswith("| PPO | 1 | 2 | 0.800 (0.800 to 0.800) | 0.300 (0.200 to 0.400) |")
    assert mdpo.startswith("| MDPO | 4 | 2 | 0.800 (0.800 to 0.800) | 0.300 (0.200 to 0.400) |")
    assert ppo.endswith("| 0.500 (0.400 to 0.600) | 0.375 (0.250 to 0.500) | 0.188 (0.125 to 0.250) |")
    assert lines[-3].startswith("- all n: -") and lines[-3].endswith("4 trainings")
    assert lines[-2] == "- n = 1: -1.00 (-1.00 to -1.00), 2 trainings"
    assert lines[-1] == "- n = 4: nan (nan to nan), 2 trainings"


def test_what_is_drawn():
    """zeta over n, R against the gap, mutual_kl, and the slack of the bounds in parts of 1 / (1 - gamma)."""
    results = [make_result("ppo", n) for n in (1, 4)]
    results.append(make_result("mdpo", 4, agents=[(4.0, 2.0, 0.3)], mutual_kl=0.125))
    figure, axes = plt.subplots(1, 4)
    theory.draw_performance(axes[0], results)
    theory.draw_robustness(axes[1], results)
    theory.draw_distillation(axes[2], results)
    theory.draw_bounds(axes[3], results)
    lines = [[line.get_xydata().tolist() for line in ax.lines] for ax in axes]
    plt.close(figure)
    eta, zeta, _, zeta_of_mdpo = lines[0]
    assert eta == pytest.approx(np.array([[1, 0.8], [4, 0.8]]))
    assert zeta == pytest.approx(np.array([[1, 0.2], [4, 0.2]]))
    assert zeta_of_mdpo == pytest.approx(np.array([[4, 0.4]]))
    assert lines[1][1] == pytest.approx(np.array([[0.3, 0.4]]))
    assert lines[2][1] == [[1, 0.125]]
    theorem_3_2, theorem_3_3, corollary, _ = lines[3]
    assert theorem_3_2[0] == pytest.approx([0.0, 4.0])
    assert theorem_3_3[0] == pytest.approx([0.0, 4 / 3 + 1])
    assert corollary[3] == pytest.approx([0.5, (4 / 3 + 2) / 2])


# The command.


def run(*words: str):
    run_tool(theory.main, Args, theory.__doc__, list(words))


def words_of(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the training of TINY, from a shell."""
    folder = tmp_path_factory.mktemp("theory")
    command = [sys.executable, str(ROOT / "benchmark/theory.py"), *words_of(TINY), "--output", "out"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return folder / "out"


def test_files(made):
    figures = ["theory.pdf", "theory.png", "renderings.pdf", "renderings.png"]
    assert {path.name for path in made.iterdir()} == {"ppo__2__1.json", *figures, "table.md"}
    result = json.loads((made / "ppo__2__1.json").read_text())
    assert result["job"] == {"method": "ppo", "num_train": 2, "seed": 1}
    assert result["design"]["settings"]["num_envs"] == 256
    (row,) = result["rows"]
    assert 0 < row["agents"][0]["eta"] < result["optimum"] == pytest.approx(5.0)


def test_what_is_there_is_not_made_again(made, capsys, monkeypatch):
    monkeypatch.setattr(theory, "train", None)
    run(*words_of(TINY), "--output", str(made))
    assert "trainings: 1, to be made: 0" in capsys.readouterr().out


def test_order_of_the_trainings():
    """Seed after seed."""
    args = tiny_args(None, methods=("ppo", "mdpo"), num_train=(1, 2), seeds=2)
    jobs = theory.find_jobs(args)
    assert [job.seed for job in jobs] == [1] * 4 + [2] * 4
    assert len(set(jobs)) == 8
    assert {job.method for job in jobs[:4]} == {"ppo", "mdpo"}


def test_the_table_is_printed(made, capsys):
    run(*words_of(TINY), "--output", str(made))
    table = (made / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n| PPO |") == 1


def test_quick(tmp_path, capsys, monkeypatch):
    """Is of PPO and MDPO, on two numbers of renderings with two seeds, whatever else was asked for."""

    def stop(jobs, design, args):
        raise Failure(" ".join(job.method for job in jobs))

    monkeypatch.setattr(theory, "run_jobs", stop)
    with pytest.raises(SystemExit):
        run("--quick", "--methods", "spo", "--output", str(tmp_path))
    captured = capsys.readouterr()
    assert captured.out == "trainings: 8, to be made: 8\n"
    assert captured.err.endswith(4 * " ppo mdpo" + "\n")


def rejection(capsys, *words: str) -> str:
    """Of a command line that cannot work."""
    with pytest.raises(SystemExit) as error:
        run(*words)
    captured = capsys.readouterr()
    return error_message(error.value.code, captured.out, captured.err)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods ppo dqn", "--methods must be some of ppo, mdpo, spo, mdspo"),
        ("--num-train 1 65", "--num-train must be at most --num-renderings, 64"),
        ("--num-train 0", "--num-train must be from 1 to 10000, not 0"),
        ("--gamma 1", "--gamma must be from 0 to 0.999, not 1.0"),
        ("--grid-size 7", "--grid-size must be from 2 to 6, not 7"),
        ("--total-timesteps 4095", "--total-timesteps must be at least 4096, not 4095"),
        ("--seeds 0", "--seeds must be from 1 to"),
        ("--output /dev/null", "--output: /dev/null is no folder that can be written to"),
    ],
)
def test_bad_flags(words, message, capsys):
    assert message in rejection(capsys, *words.split())


def test_a_training_of_another_design(made, capsys):
    words = words_of(TINY | {"gamma": 0.7})
    message = rejection(capsys, *words, "--output", str(made))
    assert "is of a training with gamma 0.8, not 0.7; another --output would do" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"design": 3}', "\0"])
def test_a_damaged_training(content, tmp_path, capsys):
    (tmp_path / "ppo__2__1.json").write_text(content)
    message = rejection(capsys, *words_of(TINY), "--output", str(tmp_path))
    assert f"--output cannot read {tmp_path / 'ppo__2__1.json'}: it is damaged" in message
