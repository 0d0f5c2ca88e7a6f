"""The command that measures the theory: its trainings, its tables, its files and its errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import theory
from theory import Args, Job

SMALL = {"total_timesteps": 4096, "grid_size": 2, "gamma": 0.8, "num_renderings": 3, "measurements": 2}


def train(method: str, num_train: int = 2, seed: int = 1, num_updates: int = 1) -> dict:
    """As the command does, but on a small grid and in fewer environments. At most two updates are
    measured."""
    design = theory.DESIGN | SMALL
    design["settings"] = theory.SETTINGS | {"num_envs": 32}
    design["total_timesteps"] *= num_updates
    return theory.train(Job(method, num_train, seed), design)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals of correlations are tested elsewhere."""
    monkeypatch.setattr("tables.RESAMPLES", 20)


# Trainings.


@pytest.fixture(scope="module")
def of_mdpo() -> dict:
    return train("mdpo", num_updates=2)


def test_a_training_is_measured(of_mdpo):
    """Of each agent, at both updates."""
    assert of_mdpo["job"] == {"method": "mdpo", "num_train": 2, "seed": 1}
    assert of_mdpo["optimum"] == pytest.approx(5.0)  # a coin a step
    assert [row["iteration"] for row in of_mdpo["rows"]] == [1, 2]
    for row in of_mdpo["rows"]:
        first, second = row["agents"]
        assert first["eta"] != second["eta"]
        assert row["losses"]["policy_loss"] != 0  # there are advantages
        for agent in row["agents"]:
            assert 0 < agent["eta"] < 5
            assert agent["new_zeta"] >= agent["theorem_3_3"]
            assert 0 < agent["train_robustness"] <= agent["robustness"]
            assert 0 < agent["mean_robustness"] < agent["robustness"]
            assert agent["mean_train_robustness"] != agent["mean_robustness"]


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
    """Of eta's three renderings two: with all three it is zeta. One alone deceives nobody in training. And
    these are what the agents see."""
    agent = of_mdpo["rows"][-1]["agents"][0]
    assert agent["eta"] != agent["zeta"]
    (of_three,) = train("ppo", num_train=3)["rows"][-1]["agents"]
    assert of_three["eta"] == pytest.approx(of_three["zeta"])
    assert of_three["train_robustness"] == of_three["robustness"]
    (of_one,) = train("ppo", num_train=1)["rows"][-1]["agents"]
    assert of_one["train_robustness"] == of_one["mean_train_robustness"] == 0
    assert of_one["robustness"] > 0
    assert of_one["new_zeta"] != of_three["new_zeta"]


def test_a_mean_over_pairs_leaves_out_the_distance_to_oneself():
    distances = np.array([[0.0, 0.2, 0.4], [0.6, 0.0, 0.8], [0.4, 0.6, 0.0]])
    assert theory.mean_of_pairs(distances) == pytest.approx(0.5)
    assert theory.mean_of_pairs(np.zeros((1, 1))) == 0


def test_a_seed_gives_the_same_again(tmp_path, monkeypatch, capfd):
    """Without a word or a file. And the script stays as it is: a training has a copy."""
    import ppo_procgen

    monkeypatch.chdir(tmp_path)
    first = train("ppo")
    assert train("ppo") == first
    assert train("ppo", seed=2)["rows"] != first["rows"]
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert ppo_procgen.make_envs.__module__ == ppo_procgen.Agent.__module__ == "ppo_procgen"


@pytest.mark.slow
def test_methods():
    """All train, with as many agents as they say. Mutual distillation has a loss of its own, and each gives
    other policies than each."""
    num_agents = {"mdpo_three": 3, "ppo": 1, "spo": 1, "ppo_both": 1}
    etas = set()
    for method in theory.METHODS:
        (row,) = train(method)["rows"]
        assert len(row["agents"]) == num_agents.get(method, 2)
        assert ("mutual_kl" in row["losses"]) == method.startswith("md")
        etas.add(row["agents"][0]["new_eta"])
    assert len(etas) == len(theory.METHODS)


def test_measured_iterations():
    assert theory.measured_iterations(100, 4) == [25, 50, 75, 100]
    assert theory.measured_iterations(100, 1) == [100]
    assert theory.measured_iterations(2, 5) == [1, 2]


# Tables and figures, of results that are made by hand.


def make_agent(eta: float, zeta: float, robustness: float) -> dict:
    return {
        "eta": eta,
        "zeta": zeta,
        "new_eta": eta,
        "new_zeta": zeta,
        "robustness": robustness,
        "mean_robustness": robustness / 2,
        "mean_train_robustness": robustness / 4,
        "theorem_3_2": 0.0,
        "theorem_3_3": -1.0,
        "corollary_3_8": -2.0,
        "d_test": 0.25,
        "theorem_3_7": 1.0,
    }


def make_result(method: str, num_train: int, seed: int, *agents: dict) -> dict:
    """The optimum is 5. The first of two updates has other agents than the last."""
    at_gamma = {str(gamma): agents for gamma in theory.GAMMAS}
    losses = {"entropy": 0.5 * seed}
    first = {"iteration": 1, "agents": [make_agent(1.0, 0.5, 0.9)], "at_gamma": {}, "losses": losses}
    last = {"iteration": 2, "agents": agents, "at_gamma": at_gamma, "losses": losses}
    job = {"method": method, "num_train": num_train, "seed": seed}
    return {"job": job, "optimum": 5.0, "rows": [first, last]}


def last_agents(results: list[dict]):
    agents = theory.agents_of(results)
    return agents[agents.iteration == 2]


@pytest.fixture
def results() -> list[dict]:
    """PPO on one rendering, both on two and on four, three seeds each. MDPO has two agents, and a zeta that
    is larger by 1, on four renderings by 1.1."""
    results = []
    for seed in (1, 2, 3):
        results.append(make_result("ppo", 1, seed, make_agent(4.0, seed, 0.25 * seed)))
        for num_train, more in [(2, 1.0), (4, 1.1)]:
            results.append(make_result("ppo", num_train, seed, make_agent(4.0, seed / 10, 0.5)))
            zeta = seed / 10 + more
            pair = [make_agent(4.0, zeta - 0.5, 0.5), make_agent(4.0, zeta + 0.5, 0.5)]
            results.append(make_result("mdpo", num_train, seed, *pair))
    return results


def cells(table: str) -> list[list[str]]:
    """Without the head."""
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_method_table(results):
    """The agents of a training are one sample, and two trainings have no interval. Student's t of 2 degrees
    of freedom is 4.303."""
    on_one, *_ = cells(theory.method_table(theory.groups_of(last_agents(results))))
    half = 4.303 * 0.2 / 3**0.5
    zeta = f"0.400 ({0.4 - half:.3f} to {0.4 + half:.3f})"
    gap = f"0.400 ({0.4 - half:.3f} to {0.4 + half:.3f})"
    assert on_one[:6] == ["PPO", "1", "3", "0.800 (0.800 to 0.800)", zeta, gap]
    starts = [cell.split()[0] for cell in on_one[6:]]
    assert starts == ["0.500", "0.250", "0.125", "1.000"]  # the last is the entropy
    (first, *_) = cells(theory.method_table(theory.groups_of(last_agents(results[:1]))))
    assert first[2:6] == ["1", "0.800", "0.200", "0.600"]


def test_difference_table(results):
    """The mean over n is over those n that both have. Holm's stars are over n. Welch's t of 4 degrees of
    freedom is 2.776, and of 8 2.306."""
    groups = theory.groups_of(last_agents(results))
    on_two, on_four, mean = cells(theory.difference_table(groups, "ppo"))
    half = 2.776 * 0.02 * (2 / 3) ** 0.5
    assert on_two[:2] == ["MDPO", "2"]
    assert on_four[:2] == ["MDPO", "4"]
    assert mean[:2] == ["MDPO", "mean"]
    assert on_two[3] == f"0.200 ({0.2 - half:.3f} to {0.2 + half:.3f}) *"
    assert on_four[3] == f"0.220 ({0.22 - half:.3f} to {0.22 + half:.3f}) *"
    half = 2.306 * 0.02 * (4 / 3) ** 0.5 / 2
    assert mean[3] == f"0.210 ({0.21 - half:.3f} to {0.21 + half:.3f})"
    assert cells(theory.difference_table(groups, "ppo_both")) == []


def test_correlation_table(results):
    """A point for each agent. On one rendering more robust agents have a smaller gap, here exactly; where all
    are as robust there is no correlation."""
    table = cells(theory.correlation_table(last_agents(results)))
    on_one = [row for row in table if row[0] == "1"]
    assert on_one[1] == ["1", "3", "mean R", "-1.000", "-1.000", "1.000"]
    on_two = [row for row in table if row[0] == "2"]
    assert on_two[0] == ["2", "6", "R", "nan", "nan", "nan"]
    assert table[0][:3] == ["all", "15", "R"]


def test_bound_table(results):
    """Each in parts of what it bounds: of means over agents, at each gamma."""
    rows = cells(theory.bound_table(results[:1]))
    assert [row[0] for row in rows] == [str(gamma) for gamma in theory.GAMMAS]
    assert rows[0][1:] == ["0.00", "-1.00", "-2.00", "4.00"]


def test_performance(results):
    """zeta and gap over n; the gap against R, a point for each agent."""
    figure = theory.draw_performance(last_agents(results))
    zeta, gap, robustness, _ = figure.axes
    of_ppo, of_mdpo = [line.get_xydata().tolist() for line in zeta.lines]
    assert of_ppo == [[1, pytest.approx(0.4)], [2, pytest.approx(0.04)], [4, pytest.approx(0.04)]]
    assert of_mdpo == [[2, pytest.approx(0.24)], [4, pytest.approx(0.26)]]
    assert gap.lines[1].get_xydata().tolist() == [[2, pytest.approx(0.56)], [4, pytest.approx(0.54)]]
    of_ppo, of_mdpo = robustness.collections
    assert [0.25, pytest.approx(0.6)] in of_ppo.get_offsets().tolist()
    assert len(of_ppo.get_offsets()) == 9
    assert len(of_mdpo.get_offsets()) == 12


# The command.

WORDS = "--methods ppo --num-train 2 --seeds 1 --total-timesteps 4096".split()
NAME = "ppo__2__1.json"


def run(folder, *words: str):
    theory.main(tyro.cli(Args, args=[*WORDS, "--output", str(folder), *words]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a training on a small grid, in this process."""
    folder = tmp_path_factory.mktemp("theory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory, "DESIGN", theory.DESIGN | SMALL)
        run(folder, "--processes", "1")
    return folder


@pytest.fixture
def small(monkeypatch):
    """The command is of that grid."""
    monkeypatch.setattr(theory, "DESIGN", theory.DESIGN | SMALL)


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    """From a shell. The training is as it is in this process."""
    command = [sys.executable, theory.__file__, *WORDS, "--output", "out"]
    subprocess.run([*command, "--processes", "2"], cwd=tmp_path, check=True, timeout=600)
    result = json.loads((tmp_path / "out" / NAME).read_text())
    again = theory.train(Job("ppo", 2, 1), result["design"])
    assert json.loads(json.dumps(again)) == result


def test_files(made):
    expected = {NAME, "tables.md"}
    for name in ("performance", "renderings"):
        expected |= {f"{name}.pdf", f"{name}.png"}
    assert {path.name for path in made.iterdir()} == expected
    result = json.loads((made / NAME).read_text())
    assert result["job"] == {"method": "ppo", "num_train": 2, "seed": 1}
    assert result["design"]["settings"]["num_envs"] == 256
    (row,) = result["rows"]
    assert 0 < row["agents"][0]["eta"] < result["optimum"] == pytest.approx(5.0)


def test_what_is_there_is_shown_and_not_made_again(made, small, tmp_path, capsys, monkeypatch):
    """Also what other commands trained; but no unfinished file, nor one of another name."""
    result = json.loads((made / NAME).read_text())
    for method in ("ppo", "spo"):
        result["job"]["method"] = method
        (tmp_path / f"{method}__2__1.json").write_text(json.dumps(result))
    (tmp_path / ".tmp.mdpo__2__1.json").write_text("{")
    (tmp_path / "notes.json").write_text("{}")
    monkeypatch.setattr(theory, "train", None)
    run(tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("trainings: 1, to be made: 0\n")
    tables = (tmp_path / "tables.md").read_text()
    assert tables in out
    assert tables.index("| PPO | 2 | 1 |") < tables.index("| SPO | 2 | 1 |")
    assert "| SPO | 2 | 0.000 | 0.000 |" in tables


def test_tables_of_another_update(made, small, tmp_path, capsys):
    """The folder's training has one update alone."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    last = (tmp_path / "tables.md").read_text()
    run(tmp_path, "--iteration", "1")
    assert (tmp_path / "tables.md").read_text() == last
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--iteration", "2")
    assert stop.value.code == 2
    assert "--iteration must be one of [1]" in capsys.readouterr().err


def test_each_is_written_when_it_is_made(tmp_path, monkeypatch):
    """What fails later loses none of them."""

    def train(job, design):
        if job.seed == 2:
            raise RuntimeError
        return {"job": job._asdict(), "design": design}

    monkeypatch.setattr(theory, "train", train)
    with pytest.raises(RuntimeError):
        run(tmp_path, "--seeds", "2", "--processes", "1")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_order_of_the_trainings():
    """Seed after seed, and each once."""
    args = Args(methods=("ppo", "mdpo", "ppo"), num_train=(1, 2, 2), seeds=2)
    jobs = theory.find_jobs(args)
    assert [job.seed for job in jobs] == [1] * 4 + [2] * 4
    assert len(set(jobs)) == 8
    assert Job("mdpo", 2, 1) in jobs[:4]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--methods ppo dqn", "invalid choice 'dqn'"),
        ("--methods", "--methods and --num-train need a value or more"),
        ("--num-train 1 65", "--num-train must be from 1 to 64, not 65"),
        ("--total-timesteps 4095", "--total-timesteps must be from 4096 to"),
        ("--processes -1", "--processes must be from 0 to"),
        ("--output /dev/null", "--output /dev/null: File exists"),
    ],
)
def test_bad_flags(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "train", None)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"design": 3}', "is damaged, or another kind of file"),
        ("{}", "is damaged, or another kind of file"),
        ("\0", "is damaged, or another kind of file"),
        ('{"design": {"grid_size": 5}}', "with grid_size 5, not 4; another --output would do"),
    ],
)
def test_files_that_do_not_belong(content, message, tmp_path, capsys):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert NAME in error
    assert message in error


def test_the_results_give_their_tables():
    """The differences on the page, from the trainings beside them."""
    folder = Path(theory.__file__).parent / "results/theory"
    results = theory.read_results(folder, theory.DESIGN | {"total_timesteps": 400_000})
    agents = theory.agents_of(results)
    last = theory.groups_of(agents[agents.iteration == 97])
    then = theory.groups_of(agents[(agents.iteration == 61) & (agents.num_train > 2)])
    for baseline in ("ppo", "ppo_both"):
        assert theory.difference_table(last, baseline) in (folder / "tables.md").read_text()
        assert theory.difference_table(then, baseline) in (folder / "update_61.md").read_text()
    assert theory.bound_table(results) in (folder / "tables.md").read_text()
