"""The curves of runs: their tags, one point an iteration, what their numbers can be, and the one chart."""

import math
import re

from common import agent_folders, read_events, read_points
from resumed import BATCH_SIZE
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

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


def test_tags_and_values(straight):
    """CleanRL's, and ours beside them: the same for one agent and for each of a pair, but for mutual_kl."""
    folders = agent_folders(straight.name, straight.run_dir)
    ranges = TRAINING_TAGS | TEST_TAGS | (OF_PAIRS if len(folders) == 2 else {})
    for folder in folders:
        points = read_points(folder)
        for tag, (least, most) in ranges.items():
            assert all(least <= value <= most for _, value in points[tag]), tag
        for tag in points.keys() - ranges.keys():
            assert re.fullmatch(r"losses/\w+", tag)
            assert tag not in OF_PAIRS


def test_one_point_an_iteration(straight):
    """Except for episodes, which do not end in all, and tests."""
    for folder in agent_folders(straight.name, straight.run_dir):
        for tag, points in read_points(folder).items():
            steps = [step / BATCH_SIZE for step, _ in points]
            if tag.startswith("charts/episodic_"):
                assert steps == sorted(set(steps) & set(range(1, 13))) != []
            else:
                assert steps == ([3, 6, 9, 12] if tag in TEST_TAGS else list(range(1, 13))), tag


def test_agents_have_curves_of_their_own(mdpo):
    first, second = (read_points(folder) for folder in agent_folders(mdpo.name, mdpo.run_dir))
    for tag in ("losses/value_loss", "losses/mutual_kl", "losses/explained_variance"):
        assert first[tag] != second[tag]


def test_one_chart_has_training_and_test_return(ppo, mdpo):
    """Of every agent, by the same name, so that TensorBoard draws all of them in one; and no other curve."""
    names = set()
    for folder in [ppo.run_dir, *agent_folders(mdpo.name, mdpo.run_dir)]:
        events = read_events(folder)
        text = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
        (category,) = Layout.FromString(text).category
        (chart,) = category.chart
        names.add((category.title, chart.title))
        patterns = "|".join(chart.multiline.tag)
        drawn = {tag for tag in events.Tags()["scalars"] if re.match(patterns, tag)}
        assert drawn == {"charts/episodic_return", "charts/test_episodic_return"}
    assert len(names) == 1
