"""Draws the pictures of the documentation, from measurements that it makes or reads.

    python docs/draw_pictures.py
    python docs/draw_pictures.py method speed

method and speed read benchmark/results and take seconds. resume trains twice, copy trains in the corridor of
docs/copy.md, differences plays bigfish at random, and toy_example runs benchmark/toy_example.py: one or two
minutes each. It needs benchmark/requirements.txt.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from procgen import ProcgenGym3Env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
from helpers import ROOT, check_folder, fail, replacing, run_tool

import ppo_procgen

BENCHMARK = ROOT / "benchmark"
RESULTS = BENCHMARK / "results"

# Ours is blue, and what it is compared with orange.
BLUE = "tab:blue"
ORANGE = "tab:orange"
GREEN = "tab:green"
GREY = "0.45"
WIDTH = 8  # of a picture, in inches of 150 pixels
STYLE = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "errorbar.capsize": 3,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "grid.alpha": 0.3,
    "legend.fancybox": False,
    "legend.fontsize": 9,
    "legend.edgecolor": "white",
    "legend.framealpha": 1,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "mathtext.fontset": "cm",
    "lines.linewidth": 1.3,
    "savefig.dpi": 150,
}
THOUSANDS = "{x:,.0f}"  # how steps are written

Name = Literal["method", "resume", "copy", "differences", "speed", "toy_example"]
ALL = get_args(Name)


@dataclass
class Args:
    names: tyro.conf.Positional[tuple[Name, ...]] = ALL
    """the pictures to draw"""
    output: Path = ROOT / "docs" / "pictures"
    """the folder that they go to, as NAME.png"""


# What several pictures need.


class Curve(NamedTuple):
    steps: list[int]
    values: list[float]


def read_curve(run_dir: Path, tag: str) -> Curve:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    scalars = events.Reload().Scalars(tag)
    steps = [scalar.step for scalar in scalars]
    values = [scalar.value for scalar in scalars]
    return Curve(steps, values)


def start_script(script: Path, *words: str, folder: Path) -> subprocess.Popen:
    """Runs a script in a folder, on the CPU and on one thread, which is enough for small networks. It ends
    with this process at the latest."""
    parent = str(os.getpid())
    command = [sys.executable, str(BENCHMARK / "launch.py"), parent, str(script)]
    command += words
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)


def run_script(script: Path, *words: str, folder: Path):
    """To its end."""
    process = start_script(script, *words, folder=folder)
    process.wait()
    check_status(process, script, folder)


def check_status(process: subprocess.Popen, script: Path, folder: Path):
    """Raises Failure, with the last line that an ended script printed, if it did not succeed."""
    if process.returncode == 0:
        return
    output = (folder / "output.txt").read_text().strip()
    last_line = output.split("\n")[-1]
    fail(f"{script.name} ended with exit status {process.returncode}: {last_line}")


def find_run(folder: Path) -> Path:
    """The one run in a folder."""
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def write(axis, x: float, y: float, text: str, **style):
    """Around a point."""
    axis.text(x, y, text, ha="center", va="center", **style)


def leave_room_above(axis, share: float):
    """For a legend: a share of the height of what is drawn."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + share * (high - low))


# Mutual distillation at work.

LEVELS = [11, 17]  # of bigfish: two that look different


def draw_method():
    """The method as a diagram, and what it does to a policy's robustness."""
    figure = plt.figure(figsize=(WIDTH, 3.7))
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    diagram = left.add_axes((0, 0, 1, 1))
    draw_diagram(diagram, bigfish_pictures())
    table = read_robustness(RESULTS / "robustness.csv")
    draw_robustness(right.subplots(), table)
    return figure


def bigfish_pictures() -> list[np.ndarray]:
    """A moment of random play on each of LEVELS, uint8 (171, 171, 3)."""
    num = max(LEVELS) + 1
    envs = ProcgenGym3Env(num, "bigfish", rand_seed=7, render_mode="rgb_array", num_threads=0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        envs.act(rng.integers(15, size=num, dtype=np.int32))
        envs.observe()
    infos = envs.get_info()
    envs.close()
    pictures = [infos[level]["rgb"] for level in LEVELS]
    return [picture[::3, ::3] for picture in pictures]


def draw_diagram(axis, pictures: list[np.ndarray]):
    """Two agents, each below its environments, and the two divergences between them."""
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 8.2)
    axis.set_aspect("equal")
    axis.axis("off")
    draw_agent(axis, 1.9, pictures[0], number=1, peer=2)
    draw_agent(axis, 8.1, pictures[1], number=2, peer=1)
    draw_arrow(axis, (6.5, 2.8), (3.5, 2.8), ORANGE)
    draw_arrow(axis, (3.5, 2.0), (6.5, 2.0), ORANGE)
    write(axis, 5, 3.2, divergence(2, 1), fontsize=11, color=ORANGE)
    write(axis, 5, 1.6, divergence(1, 2), fontsize=11, color=ORANGE)


def draw_agent(axis, center: float, picture: np.ndarray, number: int, peer: int):
    """A column of the diagram: levels, agent and loss."""
    left = center - 0.3
    right = center + 0.3
    write(axis, center, 7.85, f"levels of agent {number}")
    axis.imshow(picture, extent=(center - 1.5, center + 1.5, 4.5, 7.5))
    draw_arrow(axis, (left, 4.35), (left, 3.3), GREY)
    draw_arrow(axis, (right, 3.3), (right, 4.35), GREY)
    write(axis, center - 0.9, 3.82, "sees", color=GREY)
    write(axis, center + 0.9, 3.82, "acts", color=GREY)
    box = FancyBboxPatch((center - 1.4, 1.7), 2.8, 1.4, "round, pad=0.1")
    box.set(facecolor="white", edgecolor=ORANGE, linewidth=2)
    axis.add_patch(box)
    write(axis, center, 2.4, f"agent {number}\npolicy $\\pi_{number}$")
    write(axis, center, 0.95, "minimises")
    write(axis, center, 0.35, f"$L_{{RL}} +$ {divergence(peer, number)}", fontsize=11)


def divergence(one: int, other: int) -> str:
    """Of the policies with these numbers, as a formula."""
    return f"$KL(\\pi_{one} \\,\\Vert\\, \\pi_{other})$"


def draw_arrow(axis, start: tuple, end: tuple, color: str):
    """From point to point."""
    arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13)
    arrow.set(color=color, linewidth=1.8)
    axis.add_patch(arrow)


def read_robustness(path: Path) -> pd.DataFrame:
    """The KL of all agents of a policy together, from what robustness_eval.py wrote of one game: a row for
    each perturbation, columns (kl_mean or kl_standard_error, PPO or MDPO)."""
    data = pd.read_csv(path)
    data = data[data.checkpoint == "all"]
    columns = ["kl_mean", "kl_standard_error"]
    table = data.pivot(index="perturbation", columns="label", values=columns)
    return table.loc[["random-conv", "color-jitter", "background"]]


def draw_robustness(axis, table: pd.DataFrame):
    positions = np.arange(len(table))
    means = table["kl_mean"]
    errors = table["kl_standard_error"]
    left = positions - 0.2
    right = positions + 0.2
    axis.bar(left, means.PPO, 0.38, color=BLUE, label="PPO")
    axis.bar(right, means.MDPO, 0.38, color=ORANGE, label="MDPO")
    axis.errorbar(left, means.PPO, errors.PPO, fmt="none", color="black")
    axis.errorbar(right, means.MDPO, errors.MDPO, fmt="none", color="black")
    names = ["random\nconvolution", "colour\njitter", "another\nbackground"]
    axis.set_xticks(positions, names)
    axis.set_yticks([0, 0.05, 0.1, 0.15])
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("KL (nats), less is better")
    axis.set_title("how far a policy changes\nwhen only the picture changes")
    axis.grid(axis="y")
    axis.set_axisbelow(True)
    title = "starpilot, 507,904 steps,\n2 runs each, ± std. error"
    axis.legend(title=title, alignment="left")


# A training that was killed and resumed.

KILLS = [6, 14, 22, 30, 40]  # iterations of 48: the run is killed once a checkpoint has come so far
RESUME_FLAGS = """
    --env-id fruitbot --distribution-mode easy --device cpu
    --channels 4 8 8 --num-envs 16 --num-steps 16 --total-timesteps 12288
    --checkpoint-interval 2 --eval-interval 4 --num-eval-envs 4 --final-eval-episodes 8
"""


def draw_resume():
    """Curves of a run that was killed several times, over those of one that was not."""
    script = ROOT / "ppo_procgen.py"
    words = RESUME_FLAGS.split()
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder, "straight")
        killed = Path(folder, "killed")
        straight.mkdir()
        killed.mkdir()
        run_script(script, *words, folder=straight)
        steps = run_with_kills(script, *words, folder=killed)
        return draw_both_runs(find_run(straight), find_run(killed), steps)


def run_with_kills(script: Path, *words: str, folder: Path) -> list[int]:
    """Trains to the end, with a SIGKILL at each of KILLS. Returns the steps of the checkpoints from which
    the run went on."""
    steps = []
    for iteration in KILLS:
        process = start_script(script, *words, folder=folder)
        wait_for_checkpoint(process, script, folder, iteration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        run_dir = find_run(folder)
        position = read_position(run_dir)
        steps.append(position["global_step"])
        words = ("--resume", str(run_dir))
    run_script(script, *words, folder=folder)
    return steps


def wait_for_checkpoint(process: subprocess.Popen, script: Path, folder: Path, iteration: int):
    """Until a script that runs has written one of this iteration or of a later one. Raises Failure if it ends
    before."""
    reached = -1
    while reached < iteration:
        if process.poll() is not None:
            check_status(process, script, folder)
            fail(f"{script.name} ended before iteration {iteration}")
        time.sleep(0.1)
        for checkpoint in folder.glob("runs/*/checkpoint.pt"):
            reached = read_position(checkpoint.parent)["iteration"]


def read_position(run_dir: Path) -> dict:
    """Where the checkpoint of a run is."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return checkpoint["position"]


def draw_both_runs(straight: Path, killed: Path, steps: list[int]):
    """Two panels; steps: where the second run went on after a kill."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharex=True)
    titles = {
        "charts/episodic_return": "return on the training levels",
        "losses/value_loss": "value loss, on a logarithmic scale",
    }
    for axis, (tag, title) in zip(axes, titles.items()):
        for step in steps:
            mark = axis.axvline(step, color=GREY, linestyle=":")
        mark.set_label(f"SIGKILL, then --resume ({len(steps)} times)")
        without_kills = read_curve(straight, tag)
        with_kills = read_curve(killed, tag)
        axis.plot(*without_kills, color=ORANGE, alpha=0.4, linewidth=6, label="never stopped")
        axis.plot(*with_kills, color=BLUE, label="killed and resumed")
        axis.set_title(title)
        axis.set_xlabel("steps")
        axis.xaxis.set_major_formatter(THOUSANDS)
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


# A copied script, in an environment of one's own.


class Episode(NamedTuple):
    """In the corridor."""

    pictures: list[np.ndarray]  # uint8 (8, 8, 3) each; the last is the first of the next episode
    actions: list[int]  # from each picture to the next
    rewards: list[float]


def draw_copy():
    """The corridor, and how the copied script learns it."""
    page = ROOT / "docs" / "copy.md"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = make_copy(page.read_text(), folder)
        episode = play_corridor(folder / "corridor.py")
        run_script(folder / "ppo_procgen.py", *words, "--device", "cpu", folder=folder)
        run_dir = find_run(folder)
        training = read_curve(run_dir, "charts/episodic_return")
        tests = read_curve(run_dir, "charts/test_episodic_return")
    figure = plt.figure(figsize=(WIDTH, 4.3))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    draw_episode(top, episode)
    draw_learning(bottom.subplots(), training, tests)
    return figure


def find_block(page: str, language: str, start: str = "") -> str:
    """The first block of code in that language that begins so."""
    blocks = re.findall(f"```{language}\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        if block.startswith(start):
            return block
    fail(f"docs/copy.md has no block of {language} that begins with {start!r}")


def make_copy(page: str, folder: Path) -> list[str]:
    """Writes what the page tells of: corridor.py, and ppo_procgen.py with the patch. Returns the flags of its
    command."""
    shutil.copy(ROOT / "ppo_procgen.py", folder)
    (folder / "corridor.py").write_text(find_block(page, "python"))
    patch = find_block(page, "diff").encode()
    done = subprocess.run(["git", "apply", "-"], input=patch, cwd=folder, capture_output=True)
    if done.returncode != 0:
        fail(f"the patch in docs/copy.md does not fit ppo_procgen.py: {done.stderr.decode().strip()}")
    program = "python ppo_procgen.py"
    command = find_block(page, "sh", program)
    return command.removeprefix(program).split()


def play_corridor(path: Path) -> Episode:
    """One that finds a coin on the right."""
    spec = importlib.util.spec_from_file_location("corridor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    envs = module.Corridor(1, rand_seed=0)
    while envs.coin[0] != 7:
        envs.act(np.array([-1]))  # the next episode
    _, obs, _ = envs.observe()
    episode = Episode([obs["rgb"][0]], [], [])
    for action in [1, 1, 1]:
        envs.act(np.array([action]))
        reward, obs, _ = envs.observe()
        episode.pictures.append(obs["rgb"][0])
        episode.actions.append(action)
        episode.rewards.append(reward[0])
    return episode


def draw_episode(figure, episode: Episode):
    """Its pictures in a row, with an arrow, the action and the reward from each to the next."""
    widths = [2] + [1.1, 2] * len(episode.actions)
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    for axis, picture in zip(axes[::2], episode.pictures):
        axis.imshow(picture, interpolation="nearest")
        axis.spines[:].set_visible(False)
        between_cells = np.arange(0.5, 7)
        axis.set_xticks(between_cells, [])
        axis.set_yticks(between_cells, [])
        axis.tick_params(length=0)
        axis.grid(color="0.35", alpha=1, linewidth=0.5)
    for axis, action, reward in zip(axes[1::2], episode.actions, episode.rewards):
        axis.axis("off")
        draw_arrow(axis, (0, 0.5), (1, 0.5), BLUE)
        write(axis, 0.5, 0.64, f"action {action}")
        write(axis, 0.5, 0.36, f"reward {reward:g}", color=GREY)
    axes[0].set_title("an episode begins")
    axes[-1].set_title("the next begins")


def draw_learning(axis, training: Curve, tests: Curve):
    axis.plot(*training, color=BLUE, linewidth=1.8, label="while it trains")
    axis.plot(*tests, "o", color=ORANGE, markersize=6, label="in the tests")
    axis.axhline(5, color=GREY, linestyle=":", label="play at random")
    axis.set_xlabel("steps")
    axis.set_ylabel("mean return")
    axis.set_ylim(4, 10.4)
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.grid(axis="y")
    axis.legend(loc="center right")


# Why the tests differ from the authors'.

GAME = "bigfish"
AUTHORS_ENVS = 4
AUTHORS_EPISODES = 10
OUR_ENVS = 64
SEEDS = range(1, 21)  # of the authors' environments
TESTS_OF_A_SEED = 10
OUR_TESTS = 200


class Tests(NamedTuple):
    """Mean returns of one policy."""

    authors: np.ndarray  # in each of the authors' tests, (len(SEEDS), TESTS_OF_A_SEED)
    ours: np.ndarray  # in each of ours, (OUR_TESTS,)
    long_run: float  # over 15,360 whole episodes


def draw_differences():
    """The returns of play at random, as the authors test it and as the scripts do."""
    torch.manual_seed(1)
    authors = [authors_tests(seed, TESTS_OF_A_SEED) for seed in SEEDS]
    authors = np.stack(authors)
    ours = whole_episodes(OUR_ENVS, OUR_TESTS, rand_seed=1)
    ours = ours.mean(axis=0)
    many = whole_episodes(256, 60, rand_seed=2)
    tests = Tests(authors, ours, many.mean())
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3))
    draw_tests(left, tests)
    draw_seeds(right, tests)
    return figure


def play_at_random(obs: torch.Tensor):
    """A policy as ppo_procgen.evaluate takes it."""
    actions = torch.randint(15, (len(obs),))
    return actions, None, None


def make_envs(num: int, rand_seed: int):
    """On the full distribution of easy levels."""
    args = ppo_procgen.Args(env_id=GAME, distribution_mode="easy")
    return ppo_procgen.make_envs(args, num, num_levels=0, start_level=0, rand_seed=rand_seed)


def whole_episodes(num_envs: int, episodes_per_env: int, rand_seed: int) -> np.ndarray:
    """Raw returns of whole episodes, (num_envs, episodes_per_env). A column is one of our tests: between two
    of them the scripts skip the rest of a level, which changes nothing where levels are random."""
    envs = make_envs(num_envs, rand_seed)
    stop = ppo_procgen.Stop()
    bar = tqdm(disable=True)
    returns = ppo_procgen.evaluate(play_at_random, envs, episodes_per_env, "cpu", stop, bar)
    envs.close()
    return returns.reshape(num_envs, episodes_per_env)


def authors_tests(rand_seed: int, repetitions: int) -> np.ndarray:
    """Mean return of each of the authors' tests, (repetitions,), in environments that begin in the state of
    those of one seed, as if they were built anew for each test; only the actions differ."""
    new = make_envs(AUTHORS_ENVS, rand_seed)
    states = new.get_state()
    new.close()
    envs = make_envs(AUTHORS_ENVS * repetitions, rand_seed)
    envs.set_state(states * repetitions)
    returns = first_to_end(play_at_random, envs, AUTHORS_ENVS, AUTHORS_EPISODES)
    envs.close()
    return returns.mean(axis=1)


def first_to_end(policy, envs, num_envs: int, num_episodes: int) -> np.ndarray:
    """Raw returns of the first episodes that end in each group of num_envs neighbouring environments,
    (groups, num_episodes). Of those that end at once the one in the earlier environment comes first."""
    groups = [[] for _ in range(envs.num // num_envs)]
    under_way = np.zeros(envs.num)
    _, obs, _ = envs.observe()
    while min(map(len, groups)) < num_episodes:
        actions, _, _ = policy(torch.from_numpy(obs["rgb"]))
        envs.act(actions.numpy().astype(np.int32))
        reward, obs, ended = envs.observe()
        under_way += reward
        for i in np.flatnonzero(ended):
            groups[i // num_envs].append(under_way[i])
            under_way[i] = 0
    return np.array([returns[:num_episodes] for returns in groups])


def draw_tests(axis, tests: Tests):
    """How the tests of both kinds come out."""
    highest = max(tests.authors.max(), tests.ours.max())
    edges = np.arange(-0.05, highest + 0.1, 0.1)
    authors = f"the authors' way (mean {tests.authors.mean():.2f})"
    ours = f"here (mean {tests.ours.mean():.2f})"
    axis.hist(tests.authors.ravel(), edges, color=ORANGE, alpha=0.75, label=authors)
    axis.hist(tests.ours, edges, color=BLUE, alpha=0.75, label=ours)
    mark_long_run(axis.axvline, tests)
    axis.set_xlabel("mean return of a test")
    axis.set_ylabel("number of tests")
    axis.set_title(f"{OUR_TESTS} tests of one policy in each way")
    leave_room_above(axis, 0.3)
    axis.legend(loc="upper right", frameon=True, borderaxespad=0)  # over the line


def mark_long_run(draw_line: Callable, tests: Tests):
    label = f"all episodes (mean {tests.long_run:.2f})"
    draw_line(tests.long_run, color="black", linestyle="--", label=label)


def draw_seeds(axis, tests: Tests):
    """The mean result of the authors' test with each seed of the environments, ± one standard error."""
    means = tests.authors.mean(axis=1)
    errors = tests.authors.std(axis=1, ddof=1) / TESTS_OF_A_SEED**0.5
    dots = axis.errorbar(SEEDS, means, errors, fmt="o", color=ORANGE)
    dots.set_label(f"mean of {TESTS_OF_A_SEED} tests with this seed")
    label = f"with all seeds (mean {means.mean():.2f})"
    axis.axhline(means.mean(), color=ORANGE, label=label)
    mark_long_run(axis.axhline, tests)
    axis.set_xlabel("seed of the environments")
    axis.set_ylabel("mean return")
    axis.set_xticks([1, 5, 10, 15, 20])
    axis.set_title("the authors' way, by seed")
    axis.set_ylim(bottom=0)
    leave_room_above(axis, 0.4)
    axis.legend(loc="upper left")


# Where the time goes.

PARTS = {"inference": GREEN, "update": BLUE, "environments": ORANGE}  # of an iteration, with their colours


class Throughput(NamedTuple):
    """What benchmark/throughput.py printed."""

    steps_per_second: int
    shares: dict[str, float]  # of an iteration, in percent, for each of PARTS


class Speed(NamedTuple):
    """Steps a second, of a row of what benchmark/against_cleanrl.py printed."""

    median: int
    lowest: int
    highest: int


def draw_speed():
    log = (RESULTS / "throughput_cpu.txt").read_text()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.9), width_ratios=(1.7, 1))
    draw_shares(left, find_throughput(log, "ppo_procgen"), find_throughput(log, "mdpo_procgen"))
    draw_speeds(right, find_speeds(log))
    left.set_title(f"where the time goes ({find_day(log, 'throughput.py')})")
    right.set_title(f"against CleanRL ({find_day(log, 'against_cleanrl.py')})")
    return figure


def split_log(log: str, command: str) -> tuple[str, str]:
    """What stands in a log before the first command of benchmark/ that begins so, and what that printed. The
    newest is the first."""
    before, found, after = log.partition(f"\n$ python benchmark/{command}")
    if not found:
        fail(f"throughput_cpu.txt has no output of benchmark/{command}")
    return before, after.split("\n$ ")[0]


def find_day(log: str, command: str) -> str:
    """When the command ran: the last day that is named before it."""
    before, _ = split_log(log, command)
    return re.findall(r"\d{4}-\d\d-\d\d", before)[-1]


def find_throughput(log: str, script: str) -> Throughput:
    _, output = split_log(log, f"throughput.py {script}")
    steps_per_second = re.search(r"^steps a second.*?: ([\d,]+)", output, re.MULTILINE)
    if not steps_per_second:
        fail(f"throughput_cpu.txt has no steps a second of {script}")
    shares = {}
    for part in PARTS:
        row = re.search(rf"^\| {part} \|.*\| ([\d.]+)% \|$", output, re.MULTILINE)
        if not row:
            fail(f"throughput_cpu.txt has no row {part} of {script}")
        shares[part] = float(row[1])
    return Throughput(read_count(steps_per_second[1]), shares)


def find_speeds(log: str) -> list[Speed]:
    """Of CleanRL's script and of ours."""
    _, output = split_log(log, "against_cleanrl.py")
    speeds = []
    for name in ("CleanRL", "here"):
        row = re.search(rf"^\| {name} \| (.*) \| (.*) \| (.*) \|$", output, re.MULTILINE)
        if not row:
            fail(f"throughput_cpu.txt has no row {name} of against_cleanrl.py")
        numbers = [read_count(cell) for cell in row.groups()]
        speeds.append(Speed(*numbers))
    return speeds


def read_count(text: str) -> int:
    return int(text.replace(",", ""))


def draw_shares(axis, ppo: Throughput, mdpo: Throughput):
    """A bar for each method, in percent of an iteration."""
    rows = [0, 1]
    left = np.zeros(2)
    for part, color in PARTS.items():
        shares = np.array([ppo.shares[part], mdpo.shares[part]])
        bars = axis.barh(rows, shares, 0.55, left, color=color, label=part)
        if shares.min() > 5:
            axis.bar_label(bars, fmt="%.0f", label_type="center", color="white")
        left += shares
    labels = [f"PPO\n{ppo.steps_per_second} steps/s", f"MDPO\n{mdpo.steps_per_second} steps/s"]
    axis.set_yticks(rows, labels)
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 100)
    axis.set_ylim(1.9, -0.5)
    axis.set_xlabel("% of an iteration")
    axis.legend(loc="lower left", ncols=3)


def draw_speeds(axis, speeds: list[Speed]):
    """Medians, with their range."""
    colors = [ORANGE, BLUE]
    for position, speed in enumerate(speeds):
        axis.bar(position, speed.median, 0.6, color=colors[position])
        axis.vlines(position, speed.lowest, speed.highest, color="black", linewidth=2)
        write(axis, position, speed.highest + 35, str(speed.median))
    axis.set_xticks([0, 1], ["CleanRL's\nPPO", "PPO\nhere"])
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("steps a second")
    leave_room_above(axis, 0.1)


# All of them.


def draw_toy_example(path: Path):
    """benchmark/toy_example.py draws its picture by itself."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = folder / "picture.png"
        run_script(BENCHMARK / "toy_example.py", "--figure", str(picture), folder=folder)
        with replacing("--output", path) as unfinished:
            shutil.copy(picture, unfinished)


def save(figure, path: Path):
    """Writes the picture, and closes the figure."""
    with replacing("--output", path) as unfinished:
        figure.savefig(unfinished, pil_kwargs={"optimize": True})
    plt.close(figure)


FIGURES = {
    "method": draw_method,
    "resume": draw_resume,
    "copy": draw_copy,
    "differences": draw_differences,
    "speed": draw_speed,
}


def main(args: Args):
    check_folder("--output", args.output)
    plt.rcParams.update(STYLE)
    for name in args.names:
        path = args.output / f"{name}.png"
        if name == "toy_example":
            draw_toy_example(path)
        else:
            save(FIGURES[name](), path)
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    plt.switch_backend("agg")  # no display is needed
    run_tool(main, Args, __doc__)
