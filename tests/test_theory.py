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


def test_a_mean_over_pairs_leaves_out_the_distance_to_oneself():
    distances = np.array([[0.0, 0.2, 0.4], [0.6, 0.0, 0.8], [0.4, 0.6, 0.0]])
    assert theory.mean_of_pairs(distances) == pytest.approx(0.5)
    assert theory.mean_of_pairs(np.zeros((1, 1))) == 0


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
        agent = {"eta": eta, "zeta": zeta, "new_eta": eta, "new_zeta": zeta}
        agent["robustness"] = robustness
        agent["mean_robustness"] = robustness / 2
        agent["mean_train_robustness"] = robustness / 4
        agent["theorem_3_2"] = 0.0
        agent["theorem_3_3"] = -1.0
        agent["corollary_3_8"] = -2.0
        agent["d_test"] = 0.25
        agent["theorem_3_7"] = 1.0
        measured.append(agent)
    losses = {}
    if mutual_kl is not None:
        losses["mutual_kl"] = mutual_kl
    at_gamma = {str(gamma): measured for gamma in theory.GAMMAS}
    row = {"iteration": 1, "agents": measured, "at_gamma": at_gamma, "losses": losses}
    job = {"method": method, "num_train": num_train, "seed": seed}
    return {"job": job, "optimum": 5.0, "rows": [row]}


def test_values_of_agents():
    values = theory.agent_values(make_result(agents=[(4.0, 1.0, 0.5), (3.0, 2.0, 0.7)]))
    assert values["eta"] == pytest.approx([0.8, 0.6])
    assert values["zeta"] == pytest.approx([0.2, 0.4])
    assert values["gap"] == pytest.approx([0.6, 0.2])
    assert values["robustness"] == pytest.approx([0.5, 0.7])
    assert values["mean_robustness"] == pytest.approx([0.25, 0.35])
    assert values["mean_train_robustness"] == pytest.approx([0.125, 0.175])


def test_values_of_trainings_are_means_over_agents():
    result = make_result(agents=[(4.0, 1.0, 0.5), (3.0, 2.0, 0.7)])
    values = theory.training_values([result, make_result()], "zeta")
    assert values == pytest.approx([0.3, 0.2])


def test_values_are_of_the_last_row():
    result = make_result(agents=[(1.0, 1.0, 0.0)])
    result["rows"] += make_result()["rows"]
    assert theory.agent_values(result)["eta"] == pytest.approx([0.8])


def test_each_agent_is_a_point_of_the_correlation():
    """The means of these trainings would give 1."""
    first = make_result(agents=[(5.0, 4.0, 0.4), (5.0, 2.0, 0.1)])
    second = make_result(agents=[(5.0, 1.0, 0.3), (5.0, 1.5, 0.3)])
    of_agents = theory.correlation_with_gap([first, second], "robustness")
    assert of_agents.middle < 0
    assert theory.correlation_with_gap([first, second], "mean_robustness").middle == of_agents.middle


def cells(table: str) -> list[list[str]]:
    """Of the rows below the head."""
    rows = []
    for line in table.splitlines()[2:]:
        rows.append(line.strip("| ").split(" | "))
    return rows


@pytest.fixture(scope="module")
def two_methods() -> list[dict]:
    """PPO on one rendering, both on four, two seeds each."""
    results = []
    for seed, zeta in [(1, 1.0), (2, 2.0)]:
        results.append(make_result("mdpo", 4, seed, agents=[(4.0, zeta + 1, 0.5)]))
        results.append(make_result("ppo", 4, seed, agents=[(4.0, zeta, 0.5)]))
        results.append(make_result("ppo", 1, seed, agents=[(4.0, zeta, 0.25 * zeta)]))
    return results


def test_table_of_methods(two_methods):
    on_one, on_four, of_mdpo = cells(theory.method_table(two_methods))
    assert on_one[:5] == ["PPO", "1", "2", "0.800 (0.800 to 0.800)", "0.300 (-0.971 to 1.571)"]
    assert [cell.split()[0] for cell in on_one[5:]] == ["0.500", "0.375", "0.188", "0.094"]
    assert on_four[:3] == ["PPO", "4", "2"]
    assert of_mdpo[:5] == ["MDPO", "4", "2", "0.800 (0.800 to 0.800)", "0.500 (-0.771 to 1.771)"]


def test_table_of_differences(two_methods):
    (row,) = cells(theory.difference_table(two_methods))
    assert row[:2] == ["MDPO", "4"]
    assert row[3:5] == ["0.200 (-0.408 to 0.808)", "-0.200 (-0.808 to 0.408)"]


def test_table_of_correlations(two_methods):
    of_all, on_one, on_four = cells(theory.correlation_table(two_methods))
    assert of_all[:2] == ["all", "6"]
    assert on_one == ["1", "2", *3 * ["-1.000 (nan to nan)"]]
    assert on_four == ["4", "4", *3 * ["nan (nan to nan)"]]


def points(ax) -> list[list]:
    return [line.get_xydata().tolist() for line in ax.lines]


@pytest.fixture
def axes():
    figure, panels = plt.subplots(1, 2)
    yield panels
    plt.close(figure)


def test_a_measure_over_the_number_of_renderings(axes, two_methods):
    theory.draw_over_number(axes[0], two_methods, "zeta")
    (of_ppo,) = points(axes[0])
    assert of_ppo == pytest.approx(np.array([[1, 0.3], [4, 0.3]]))


def test_differences_from_ppo(axes, two_methods):
    theory.draw_differences(axes[0], two_methods, "zeta")
    lines = points(axes[0])
    interval, middle = lines[1:3]  # after the legend's of n = 1, on which there is no other method
    assert np.array(interval)[:, 0] == pytest.approx([-0.408, 0.808], abs=0.001)
    assert middle[0][0] == pytest.approx(0.2)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["MDPO"]


def test_a_point_for_each_agent(axes):
    results = [make_result(agents=[(4.0, 1.0, 0.5), (4.0, 2.0, 0.25)])]
    theory.draw_against_gap(axes[0], results, "robustness")
    theory.draw_against_gap(axes[1], results, "mean_robustness")
    assert points(axes[0])[0] == pytest.approx(np.array([[0.5, 0.6], [0.25, 0.4]]))
    assert points(axes[1])[0] == pytest.approx(np.array([[0.25, 0.6], [0.125, 0.4]]))


def test_distillation_is_of_mutual_methods(axes):
    results = [make_result("ppo"), make_result("mdpo", mutual_kl=0.125), make_result("mdpo", mutual_kl=0.25)]
    theory.draw_distillation(axes[0], results)
    assert points(axes[0]) == [[[1, 0.1875]]]
    theory.draw_distillation(axes[1], results[:1])
    assert points(axes[1]) == []


def test_the_sides_of_the_bounds(axes):
    """Their ratios, and the slack in parts of 1 / (1 - gamma)."""
    results = [make_result(agents=[(4.0, 1.0, 0.5), (4.0, 2.0, 0.3)])]
    theory.draw_ratios(axes[0], results)
    ratios = [line[0] for line in points(axes[0])[:4]]
    assert ratios == [[1, 0.0], [1, -0.75], [1, -1.5], [1, 0.25]]
    theory.draw_slack(axes[1], results)
    theorem_3_2, theorem_3_3, corollary, _ = points(axes[1])
    assert theorem_3_2[0] == pytest.approx([0.0, 4.0])
    assert theorem_3_3[0] == pytest.approx([0.0, 1.5 + 1])
    assert corollary[3] == pytest.approx([0.5, (1.5 + 2) / 2])


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
    expected = {"ppo__2__1.json", "tables.md"}
    for name in ("performance", "training", "renderings"):
        expected |= {f"{name}.pdf", f"{name}.png"}
    assert {path.name for path in made.iterdir()} == expected
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
    twice = tiny_args(None, methods=("ppo", "ppo"), num_train=(2, 2))
    assert theory.find_jobs(twice) == [Job("ppo", 2, 1)]


def test_the_tables_are_printed(made, capsys):
    run(*words_of(TINY), "--output", str(made))
    tables = (made / "tables.md").read_text()
    assert tables in capsys.readouterr().out
    assert tables.count("\n| PPO |") == 1
    assert "Nothing to compare" in tables


def test_what_other_commands_trained_is_shown(made, tmp_path, capsys):
    """But no unfinished file, nor one of another name."""
    result = json.loads((made / "ppo__2__1.json").read_text())
    for method in ("ppo", "spo"):
        result["job"]["method"] = method
        (tmp_path / f"{method}__2__1.json").write_text(json.dumps(result))
    (tmp_path / ".tmp.mdpo__2__1.json").write_text("{")
    (tmp_path / "notes.json").write_text("{}")
    run(*words_of(TINY), "--output", str(tmp_path))
    tables = capsys.readouterr().out
    assert "| PPO | 2 | 1 |" in tables
    assert "| SPO | 2 | 1 |" in tables
    assert "| SPO | 2 | 0.000 (nan to nan) |" in tables
    assert (tmp_path / "differences.png").exists()


def test_quick(tmp_path, capsys, monkeypatch):
    """Is of PPO and MDPO, on two numbers of renderings with two seeds."""

    def stop(jobs, design, args):
        raise Failure(" ".join(job.method for job in jobs))

    monkeypatch.setattr(theory, "run_jobs", stop)
    with pytest.raises(SystemExit):
        run("--quick", "--output", str(tmp_path))
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
        ("--methods ppo dqn", "invalid choice 'dqn'"),
        ("--methods", "--methods needs one or more of ppo, mdpo, spo, mdspo"),
        ("--quick --seeds 3", "--quick has a --seeds of its own: leave out one of the two"),
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
