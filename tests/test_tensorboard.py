"""The curves of runs: their tags, one point an iteration, what their numbers can be, and the one chart."""

import math
import re
from types import SimpleNamespace

import pytest
from common import TINY, agent_folders, copy_run, flags, read_events, read_points, train, train_straight
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

# 4 iterations, with a checkpoint and a test after the second and the fourth.
STEPS = [128, 256, 384, 512]
SETTINGS = TINY | {
    "num_steps": 32,
    "total_timesteps": 600,
    "checkpoint_interval": 2,
    "eval_interval": 2,
    "final_eval_episodes": 2,
}
# Tag, and the range of its values.
TRAINING_TAGS = {
    "charts/episodic_return": (-1e3, 1e3),
    "charts/episodic_length": (1, 1e3),
    "charts/SPS": (0, 1e9),
    "charts/learning_rate": (4.999e-4, 5.001e-4),
    "losses/policy_loss": (-1e3, 1e3),
    "losses/value_loss": (0, 1e3),
    "losses/entropy": (1, math.log(15) + 1e-5),
    "losses/old_approx_kl": (-1e3, 1e3),
    "losses/approx_kl": (-1e-6, 1e3),
    "losses/clipfrac": (0, 1),
    "losses/explained_variance": (-1e9, 1),
}
TEST_TAGS = {"charts/test_episodic_return": (-1e3, 1e3), "charts/generalization_gap": (-1e3, 1e3)}
OF_PAIRS = {"losses/mutual_kl": (0, 1e3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one agent, the same killed after its second iteration and resumed, and a pair."""
    folder = tmp_path_factory.mktemp("logs")
    for each in ("one", "pair", "resumed"):
        (folder / each).mkdir()
    one = train_straight("spo_procgen", folder / "one", SETTINGS)
    pair = train_straight("mdpo_procgen", folder / "pair", SETTINGS)
    resumed = copy_run(one, 2, folder / "resumed", finished=False)
    assert train(one.script, folder / "resumed", "--resume", resumed, *flags(device="cpu")) == 0
    pair = agent_folders("mdpo_procgen", pair.run_dir)
    return SimpleNamespace(folders=[one.run_dir, resumed, *pair], pair=pair)


def test_tags_and_values(runs):
    """CleanRL's, and ours beside them: the same for one agent and for each of a pair, but for mutual_kl."""
    for folder in runs.folders:
        points = read_points(folder)
        ranges = TRAINING_TAGS | TEST_TAGS | (OF_PAIRS if folder in runs.pair else {})
        for tag, (least, most) in ranges.items():
            assert all(least <= value <= most for _, value in points[tag]), tag
        for tag in points.keys() - ranges.keys():
            assert re.fullmatch(r"losses/\w+", tag)
            assert tag not in OF_PAIRS


def test_one_point_an_iteration(runs):
    """Except for episodes, which do not end in all, and tests. The resumed run has no point twice."""
    for folder in runs.folders:
        for tag, points in read_points(folder).items():
            steps = [step for step, _ in points]
            if tag.startswith("charts/episodic_"):
                assert steps == [step for step in STEPS if step in steps] != []
            else:
                assert steps == (STEPS[1::2] if tag in TEST_TAGS else STEPS), tag


def test_agents_have_curves_of_their_own(runs):
    first, second = (read_points(folder) for folder in runs.pair)
    for tag in ("losses/value_loss", "losses/mutual_kl", "losses/explained_variance"):
        assert first[tag] != second[tag]


def test_one_chart_has_training_and_test_return(runs):
    """Of every agent, by the same name, so that TensorBoard draws all of them in one; and no other curve."""
    names = set()
    for folder in runs.folders:
        events = read_events(folder)
        text = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
        (category,) = Layout.FromString(text).category
        (chart,) = category.chart
        names.add((category.title, chart.title))
        drawn = {
            tag for tag in events.Tags()["scalars"] for each in chart.multiline.tag if re.match(each, tag)
        }
        assert drawn == {"charts/episodic_return", "charts/test_episodic_return"}
    assert len(names) == 1
