"""docs/draw_pictures.py: what it reads and measures, and the pictures that need less than a minute."""

import os
import sys

os.environ["MPLBACKEND"] = "agg"

import numpy as np
import pytest
import torch
from common import ROOT, error_message, read_points
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmark"))
sys.path.insert(0, str(ROOT / "docs"))
import draw_pictures
from helpers import Failure, run_tool

PAGE = (ROOT / "docs" / "copy.md").read_text()


class Clockwork:
    """Environments whose episodes have known lengths, and pay 1 a step."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.num = len(lengths)
        self.age = np.zeros(self.num, int)

    def act(self, actions):
        assert actions.shape == (self.num,)
        self.age += 1
        self.age[actions == -1] = 0

    def observe(self):
        ended = self.age == self.lengths
        self.age[ended] = 0
        obs = np.zeros((self.num, 1, 1, 3), np.uint8)
        return np.ones(self.num), {"rgb": obs}, ended

    def close(self):
        pass


def stand_still(obs):
    return torch.full((len(obs),), 4), None, None


def test_the_first_to_end_are_counted_in_each_group():
    """Ends: in the first group after 2, 3, 4 and twice after 6 steps; in the second after each step, and
    twice after 5."""
    envs = Clockwork([2, 3, 90, 90, 1, 5, 90, 90])
    returns = draw_pictures.first_to_end(stand_still, envs, num_envs=4, num_episodes=5)
    assert returns.tolist() == [[2, 3, 2, 2, 3], [1, 1, 1, 1, 1]]


def test_our_tests_count_whole_episodes_of_every_environment(monkeypatch):
    monkeypatch.setattr(draw_pictures, "make_envs", lambda num, rand_seed: Clockwork([1, 2, 30]))
    returns = draw_pictures.whole_episodes(num_envs=3, episodes_per_env=2, rand_seed=1)
    assert returns.tolist() == [[1, 1], [2, 2], [30, 30]]


def test_each_of_the_authors_tests_is_as_in_environments_that_are_built_anew(monkeypatch):
    monkeypatch.setattr(draw_pictures, "play_at_random", stand_still)
    envs = draw_pictures.make_envs(4, rand_seed=3)
    expected = draw_pictures.first_to_end(stand_still, envs, 4, 10).mean()
    envs.close()
    tests = draw_pictures.authors_tests(rand_seed=3, repetitions=2)
    assert tests.tolist() == [expected, expected]
    other_tests = draw_pictures.authors_tests(rand_seed=4, repetitions=1)
    assert other_tests.tolist() != [expected]


ROBUSTNESS = """perturbation,label,checkpoint,kl_mean,kl_standard_error
random-conv,MDPO,all,0.1,0.01
random-conv,MDPO,runs/x/agent_1/agent.pt,7,8
random-conv,PPO,all,0.2,0.02
background,MDPO,all,0.3,0.03
background,PPO,all,0.4,0.04
background,PPO,runs/y/agent.pt,7,8
color-jitter,MDPO,all,0.5,0.05
color-jitter,PPO,all,0.6,0.06
monochrome,MDPO,all,0.7,0.07
monochrome,PPO,all,0.8,0.08
"""


def test_robustness_is_that_of_all_agents(tmp_path):
    path = tmp_path / "robustness.csv"
    path.write_text(ROBUSTNESS)
    table = draw_pictures.read_robustness(path)
    assert list(table.index) == ["random-conv", "color-jitter", "background"]
    means = table["kl_mean"]
    errors = table["kl_standard_error"]
    assert means.PPO.tolist() == [0.2, 0.6, 0.4]
    assert means.MDPO.tolist() == [0.1, 0.5, 0.3]
    assert errors.PPO.tolist() == [0.02, 0.06, 0.04]
    assert errors.MDPO.tolist() == [0.01, 0.05, 0.03]


LOG = """# a machine, 2026-05-06
$ python benchmark/throughput.py ppo_procgen --iterations 3
| part | ms an iteration | share |
| --- | --- | --- |
| environments | 95.0 | 0.9% |
| inference | 1300.3 | 12.9% |
| update | 8692.1 | 86.0% |
steps a second: 1,398 (from 1,346 to 1,402)

# earlier, 2026-03-04
$ python benchmark/throughput.py ppo_procgen
| inference | 1.0 | 99.0% |
steps a second: 7 (from 6 to 8)

$ python benchmark/throughput.py mdpo_procgen
| inference | 1.0 | 5.5% |
| update | 1.0 | 94.0% |
| environments | 1.0 | 0.5% |
steps a second for each agent: 115 (from 113 to 116)

$ python benchmark/against_cleanrl.py a.whl
| CleanRL | 150 | 104 | 161 |
| here | 1,596 | 1,570 | 1,603 |
"""


def test_the_newest_speeds_are_read():
    ppo = draw_pictures.find_throughput(LOG, "ppo_procgen")
    assert ppo.steps_per_second == 1398
    assert ppo.shares == {"inference": 12.9, "update": 86.0, "environments": 0.9}
    mdpo = draw_pictures.find_throughput(LOG, "mdpo_procgen")
    assert mdpo.steps_per_second == 115
    assert mdpo.shares == {"inference": 5.5, "update": 94.0, "environments": 0.5}
    assert draw_pictures.find_speeds(LOG) == [(150, 104, 161), (1596, 1570, 1603)]
    assert draw_pictures.find_day(LOG, "throughput.py") == "2026-05-06"
    assert draw_pictures.find_day(LOG, "against_cleanrl.py") == "2026-03-04"


@pytest.mark.parametrize("missing", ["update", "steps a second", "python benchmark/throughput.py ppo"])
def test_a_log_without_a_number_is_one_line(missing):
    log = LOG.split("# earlier")[0].replace(missing, "x")
    with pytest.raises(Failure, match="has no") as error:
        draw_pictures.find_throughput(log, "ppo_procgen")
    assert "\n" not in str(error.value)


def test_the_copy_is_that_of_the_page(tmp_path):
    words = draw_pictures.make_copy(PAGE, tmp_path)
    copy = (tmp_path / "ppo_procgen.py").read_text()
    assert "from corridor import Corridor" in copy
    assert copy != (ROOT / "ppo_procgen.py").read_text()
    assert f"\npython ppo_procgen.py {' '.join(words)}\n" in PAGE
    episode = draw_pictures.play_corridor(tmp_path / "corridor.py")
    assert episode.rewards == [0, 0, 10]
    walkers = []
    for picture in episode.pictures:
        white = (picture == 255).all(axis=-1)
        walkers.append(np.argwhere(white).tolist())
    assert walkers == [[[4, 4]], [[4, 5]], [[4, 6]], [[4, 4]]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("```diff", "```text", "docs/copy.md has no block of diff"),
        ("python ppo_procgen.py --", "python x.py --", "docs/copy.md has no block of sh"),
        (
            " import tyro\n",
            " import nothing\n",
            "the patch in docs/copy.md does not fit ppo_procgen.py: error:",
        ),
    ],
)
def test_a_page_that_does_not_fit_is_one_line(tmp_path, old, new, message):
    assert old in PAGE
    with pytest.raises(Failure, match=message):
        draw_pictures.make_copy(PAGE.replace(old, new), tmp_path)


def test_a_script_that_fails_is_told_by_its_last_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('first'); sys.exit(sys.argv[1])")
    with pytest.raises(Failure) as error:
        draw_pictures.run_script(script, "no space", folder=tmp_path)
    assert str(error.value) == "script.py ended with exit status 1: no space"
    process = draw_pictures.start_script(script, "0", folder=tmp_path)
    with pytest.raises(Failure, match=r"script.py ended with exit status 1: 0"):
        draw_pictures.wait_for_checkpoint(process, script, tmp_path, 3)


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["draw_pictures.py", *map(str, words)])
    run_tool(draw_pictures.main, draw_pictures.Args, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed", "sped"], "sped"),
        (["speed", "--output", "file/pictures"], "error: --output: file is no folder that can be written to"),
    ],
)
def test_bad_input(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, *words)
    out, err = capsys.readouterr()
    shown = error_message(error.value.code, out, err)
    assert message in shown.replace(f"{tmp_path}/", "")
    assert os.listdir() == ["file"]


def check_picture(path):
    """It loads fast and fits a page, and its background is white."""
    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        assert picture.width <= 1200
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("name", draw_pictures.ALL)
def test_each_picture_is_there(name):
    check_picture(ROOT / "docs" / "pictures" / f"{name}.png")


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path, monkeypatch, capsys):
    names = ["method", "speed", "copy"]
    folder = tmp_path / "new"
    run_main(monkeypatch, *names, "--output", folder)
    output = capsys.readouterr().out
    for name in names:
        path = folder / f"{name}.png"
        assert f"wrote {path}\n" in output
        check_picture(path)
    assert len(os.listdir(folder)) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_if_it_were_not(tmp_path, monkeypatch):
    """At the first checkpoint from iteration 2 on, and again."""
    monkeypatch.setattr(draw_pictures, "KILLS", [2, 4])
    script = ROOT / "ppo_procgen.py"
    words = draw_pictures.RESUME_FLAGS.replace("12288", "2048").split()
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    draw_pictures.run_script(script, *words, folder=straight)
    steps = draw_pictures.run_with_kills(script, *words, folder=killed)
    assert len(steps) == 2
    assert steps[0] >= 2 * 256
    assert max(steps) < 2048
    without_kills = read_points(draw_pictures.find_run(straight))
    with_kills = read_points(draw_pictures.find_run(killed))
    assert with_kills == without_kills
    assert len(with_kills["losses/value_loss"]) == 8
