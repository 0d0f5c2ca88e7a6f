"""Plays trained agents of one game: a video of them side by side, or their returns on chosen levels.

    python benchmark/play.py runs/FOLDER/agent_1/agent.pt runs/ANOTHER/agent.pt
    python benchmark/play.py runs/FOLDER/agent_1/agent.pt --levels 0:500 --csv returns.csv

Actions are sampled from the policy.
"""

import importlib.util
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
import tyro
from helpers import Count, CountOrZero, check_limits, fail, replacing
from PIL import Image, ImageDraw, ImageFont
from procgen import ProcgenGym3Env
from tqdm import tqdm

from ppo_procgen import Agent
from ppo_procgen import Args as TrainingArgs
from robustness_eval import Checkpoint, read_agent

TEST_LEVELS = "10000:10003"  # of a video
PARALLEL = 64  # episodes under way when returns are measured
SIZE = 512  # height and width of Procgen's full rendering
WIDTH = SIZE + 8  # of an agent's part of a frame: a gap on the right
HEIGHT = SIZE + 72  # two lines of text above
FRAMES_PER_SECOND = 15


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    checkpoints: tuple[Path, ...]  # agent.pt files of one game, from any of the scripts
    levels: str = ""  # FIRST:END: measure returns on the levels from FIRST to END - 1
    episodes_per_level: Count = 1  # of --levels, all whole
    csv: Path | None = None  # table of --levels, a row for each agent and level
    video: Path | None = None  # FILE.mp4 of --levels; else videos/GAME.mp4, of three levels from 10000 on
    max_steps: Annotated[int, (1, 10_000)] = 300  # longer episodes are cut in the video
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] | None = None  # else the agents' own
    seed: CountOrZero = 0  # of the actions

    def __post_init__(self):
        check_limits(self)
        if not self.checkpoints:
            raise ValueError("CHECKPOINTS must be one agent.pt or more")
        if self.levels:
            parse_levels(self.levels)
        elif self.csv or self.episodes_per_level > 1:
            raise ValueError("--csv and --episodes-per-level need --levels")
        if self.video and self.video.suffix != ".mp4":
            raise ValueError(f"--video must end in .mp4, not be {self.video}")


def parse_levels(text: str) -> range:
    numbers = re.fullmatch("([0-9]+):([0-9]+)", text)
    first, end = map(int, numbers.groups()) if numbers else (0, 0)
    if not first < end < 2**31:
        raise ValueError(f"--levels must be FIRST:END, with FIRST < END < 2147483648, not {text}")
    return range(first, end)


class Episode:
    """An episode in an environment of its own: those of one ProcgenGym3Env would draw from a range of levels.

    `obs`, uint8 (1, 64, 64, 3); `steps` done; `total`, the sum of the raw rewards; `over`; `picture`, uint8
    (512, 512, 3), the last before the end, if it is rendered.
    """

    def __init__(self, game: TrainingArgs, level: int, render_mode: str | None = None):
        self.env = ProcgenGym3Env(
            num=1,
            env_name=game.env_id,
            distribution_mode=game.distribution_mode,
            start_level=level,
            num_levels=1,
            rand_seed=0,  # nothing depends on it: it chooses among the levels
            num_threads=0,
            render_mode=render_mode,
        )
        self.level = level
        self.obs = self.env.observe()[1]["rgb"]
        self.picture = self.env.get_info()[0].get("rgb")
        self.steps = 0
        self.total = 0.0
        self.over = False

    def step(self, action: int):
        self.env.act(np.array([action]))
        reward, obs, first = self.env.observe()
        self.obs = obs["rgb"]
        self.steps += 1
        self.total += float(reward[0])
        self.over = bool(first[0])
        if not self.over:  # Procgen then shows the next episode
            self.picture = self.env.get_info()[0].get("rgb")


@torch.no_grad()
def sample_actions(agent: Agent, obs: np.ndarray) -> list[int]:
    """From the policy at observations uint8 (B, 64, 64, 3)."""
    device = next(agent.parameters()).device
    logits, _ = agent(torch.from_numpy(obs).to(device))
    return torch.distributions.Categorical(logits=logits).sample().tolist()


def measure(checkpoint: Checkpoint, game: TrainingArgs, levels: range, repeats: int) -> pd.DataFrame:
    """A row for each level, of `repeats` episodes. Each that begins is played to its end and counts, so the
    short ones do not count more than the long ones."""
    waiting = (level for level in levels for _ in range(repeats))
    running = []
    records = []
    bar = tqdm(desc=str(checkpoint.path), total=len(levels) * repeats, unit="episode", disable=None)
    while len(records) < bar.total:
        running += [Episode(game, level) for level in islice(waiting, PARALLEL - len(running))]
        obs = np.concatenate([episode.obs for episode in running])
        for episode, action in zip(running, sample_actions(checkpoint.agent, obs)):
            episode.step(action)
            if episode.over:
                records.append((episode.level, episode.total, episode.steps))
                bar.update()
        running = [episode for episode in running if not episode.over]
    bar.close()
    by_level = pd.DataFrame(records, columns=["level", "mean_return", "mean_length"]).groupby("level")
    table = by_level.mean().reset_index()
    return table.assign(episodes=repeats, agent=checkpoint.path, global_step=checkpoint.global_step)


def summarize(table: pd.DataFrame) -> str:
    """Means over levels."""
    words = f"return {table.mean_return.mean():.4g}"
    if len(table) > 1:
        words += f" ± {table.mean_return.sem():.2g} (standard error over {len(table)} levels)"
    return f"{words}, length {table.mean_length.mean():.4g}"


def draw_frame(titles: list[str], episodes: list[Episode]) -> Image.Image:
    """All agents side by side."""
    frame = Image.new("RGB", (len(titles) * WIDTH, HEIGHT))
    draw = ImageDraw.Draw(frame)
    for number, (title, episode) in enumerate(zip(titles, episodes)):
        left = number * WIDTH
        frame.paste(Image.fromarray(episode.picture), (left, HEIGHT - SIZE))
        end = ", end" if episode.over else ""
        text = f"{title}\nlevel {episode.level}, return {episode.total:g}{end}"
        font = ImageFont.load_default(min(26, 950 / len(title)))  # so that it fits
        draw.text((left + 6, 6), text, font=font)
    return frame


def draw_levels(checkpoints: list[Checkpoint], game: TrainingArgs, levels: range, max_steps: int):
    """Yields frames of all agents on the same levels; who is done first waits. Prints the returns."""
    titles = [describe(checkpoint) for checkpoint in checkpoints]
    for level in levels:
        episodes = [Episode(game, level, "rgb_array") for _ in checkpoints]
        while not all(episode.over for episode in episodes):
            yield draw_frame(titles, episodes)
            for checkpoint, episode in zip(checkpoints, episodes):
                if not episode.over:
                    [action] = sample_actions(checkpoint.agent, episode.obs)
                    episode.step(action)
                    episode.over |= episode.steps == max_steps
        for _ in range(FRAMES_PER_SECOND):  # the end stays for a second
            yield draw_frame(titles, episodes)
        returns = ", ".join(f"{episode.total:g} in {episode.steps} steps" for episode in episodes)
        print(f"level {level}: return {returns}", flush=True)


def find_ffmpeg() -> str:
    """That of imageio-ffmpeg. To import the version that gym3 brings would need an older setuptools."""
    package = importlib.util.find_spec("imageio_ffmpeg")
    [program] = Path(package.origin).parent.glob("binaries/ffmpeg-*")
    return str(program)


def write_video(path: Path, frames: Iterable[Image.Image]):
    """And its beginning as a GIF beside it: 20 seconds, or as many as 3 MB hold."""
    ffmpeg = [find_ffmpeg(), "-loglevel", "error", "-y"]
    with replacing(path) as unfinished:
        source = f"-f image2pipe -c:v ppm -r {FRAMES_PER_SECOND} -i -".split()
        target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", str(unfinished)]
        with subprocess.Popen(ffmpeg + source + target, stdin=subprocess.PIPE) as process:
            for frame in frames:
                frame.save(process.stdin, "ppm")
        if process.returncode:
            raise OSError(f"ffmpeg could not write {path}")
    with replacing(path.with_suffix(".gif")) as unfinished:
        size = "fps=10,scale=min(480\\,iw):-2:flags=area"
        colors = "split[a][b];[a]palettegen=max_colors=96[p];[b][p]paletteuse=dither=none"
        target = ["-filter_complex", f"{size},{colors}", "-fs", "3M", str(unfinished)]
        subprocess.run([*ffmpeg, "-t", "20", "-i", str(path), *target], check=True)


def describe(checkpoint: Checkpoint) -> str:
    words = f"{checkpoint.args['exp_name']}, seed {checkpoint.args['seed']}"
    folder = checkpoint.path.absolute().parent.name
    if folder.startswith("agent_"):  # one of several that trained together
        words += ", " + folder.replace("_", " ")
    if checkpoint.global_step is not None:
        words += f", {checkpoint.global_step:,} steps"
    return words


def find_game(checkpoints: list[Checkpoint], mode: str | None) -> TrainingArgs:
    """The game of all agents; `mode` takes the place of their own. ValueError if they differ, or if the game
    does not have that mode."""
    games = {(each.args["env_id"], mode or each.args["distribution_mode"]) for each in checkpoints}
    if len(games) > 1:
        words = ", ".join(sorted(map(" ".join, games)))
        raise ValueError(f"CHECKPOINTS must be of one game in one distribution mode, not {words}")
    [(env_id, distribution_mode)] = games
    return TrainingArgs(env_id=env_id, distribution_mode=distribution_mode, device="cpu")


def main(args: Args):
    try:
        checkpoints = [read_agent(path) for path in args.checkpoints]
        game = find_game(checkpoints, args.distribution_mode)
    except ValueError as error:
        fail(str(error))
    levels = parse_levels(args.levels or TEST_LEVELS)
    for checkpoint in checkpoints:
        checkpoint.agent.to("cuda" if torch.cuda.is_available() else "cpu")

    tables = []
    for checkpoint in checkpoints if args.levels else []:
        torch.manual_seed(args.seed)
        table = measure(checkpoint, game, levels, args.episodes_per_level)
        tables.append(table)
        print(f"{checkpoint.path} ({describe(checkpoint)}): {summarize(table)}", flush=True)
        if args.csv:
            with replacing(args.csv) as unfinished:
                pd.concat(tables).to_csv(unfinished, index=False, float_format="%.6g")

    if args.video or not args.levels:
        path = args.video or Path("videos", f"{game.env_id}.mp4")
        torch.manual_seed(args.seed)
        write_video(path, draw_levels(checkpoints, game, levels, args.max_steps))
        print(f"wrote {path} and {path.with_suffix('.gif')}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
