"""Records trained agents at play on test levels, in Procgen's full rendering, as a video and as a small GIF.

Any number of agents play the same levels, each in its part of the picture; who is done first waits for the
others.

    python benchmark/watch.py runs/FOLDER/agent_1/agent.pt runs/ANOTHER/agent.pt
"""

import contextlib
import importlib.util
import math
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from helpers import CountOrZero, Range, check_ranges, fail, replacing, run_tool
from PIL import Image, ImageDraw, ImageFont
from procgen import ProcgenGym3Env

from mdpo_procgen import Agent
from mdpo_procgen import Args as TrainingArgs

SIZE = 512  # height and width of Procgen's full rendering
WIDTH = SIZE + 8  # of a player's part of a frame: a gap on the right
HEIGHT = SIZE + 72  # two lines of text above
COLUMNS = 4  # players side by side; more begin another row
FRAMES_PER_SECOND = 15
GIF_BYTES = 3_000_000


class GifSize(NamedTuple):
    height: int  # of a player's part, in pixels
    seconds: int  # of the video's beginning


# The first whose file is small enough is taken.
GIF_SIZES = [
    GifSize(292, 20),
    GifSize(240, 15),
    GifSize(192, 15),
    GifSize(128, 15),
    GifSize(128, 8),
    GifSize(128, 4),
    GifSize(96, 4),
    GifSize(64, 8),
    GifSize(64, 2),
]


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """agent.pt files of one game, from any of the scripts"""
    episodes: Annotated[int, Range(1, 1000)] = 3
    """levels to play"""
    max_steps: Annotated[int, Range(1, 10_000)] = 300
    """longer episodes are cut"""
    seed: CountOrZero = 0
    """of the levels and of the actions"""
    output: Path | None = None
    """where it goes, as .mp4 and .gif; by default videos/GAME"""

    def __post_init__(self):
        check_ranges(self)
        if not 1 <= len(self.checkpoints) <= 64:
            raise ValueError(f"CHECKPOINTS must be 1 to 64 agent.pt files, not {len(self.checkpoints)}")
        if self.output is None:
            return
        if self.output.name in ("", ".."):
            raise ValueError(f"--output must end in a file's name, not be {self.output}")
        if self.output.suffix in (".mp4", ".gif"):
            self.output = self.output.with_suffix("")


class SavedAgent(NamedTuple):
    """What an agent.pt holds."""

    agent: Agent
    name: str  # for the picture
    env_id: str
    distribution_mode: str


def read_agent(path: Path) -> SavedAgent:
    """Raises Failure if there is no such file, or no agent in it that could play."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError("the file's contents have changed")
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved = content["args"]
        args = TrainingArgs(  # which checks them
            env_id=saved["env_id"],
            distribution_mode=saved["distribution_mode"],
            channels=saved["channels"],
            device="cpu",
        )
        agent = Agent(channels=args.channels)
        agent.load_state_dict(content["agent"])
        name = f"{saved['exp_name']}, seed {saved['seed']}"
    except Exception as error:  # torch has many names for a file that is cut short, or no agent
        reason = getattr(error, "strerror", None) or "it is damaged, or no agent.pt"
        fail(f"CHECKPOINTS: cannot read {path}: {reason}")
    if not all(weight.isfinite().all() for weight in agent.parameters()):
        fail(f"CHECKPOINTS: the weights in {path} are not all finite")
    folder = path.absolute().parent.name
    if folder.startswith("agent_"):  # one of several that trained together
        name += ", " + folder.replace("_", " ")
    return SavedAgent(agent, name, args.env_id, args.distribution_mode)


class Player:
    """An agent in one environment of test levels; a seed stands for a sequence of levels.

    Of the episode under way: `level`, its number; `picture`, uint8 (512, 512, 3); `steps` done; `total`, the
    sum of the raw rewards; `over`, whether it has ended.
    """

    def __init__(self, saved: SavedAgent, seed: int):
        self.agent = saved.agent
        self.name = saved.name
        self.env = ProcgenGym3Env(
            num=1,
            env_name=saved.env_id,
            distribution_mode=saved.distribution_mode,
            num_levels=0,
            rand_seed=seed,
            render_mode="rgb_array",
            num_threads=0,
        )
        self.begin()

    def begin(self):
        """A new episode, on the level that the end of the last one has brought."""
        info = self.env.get_info()[0]
        self.level = int(info["level_seed"])
        self.picture = info["rgb"]
        self.steps = 0
        self.total = 0.0
        self.over = False

    def step(self, max_steps: int):
        """A step by an action sampled from the policy, unless the episode is over. The last picture is that
        before the end, since at the end Procgen already shows the next level."""
        if self.over:
            return
        self.env.act(self.sample_action())
        reward, _, first = self.env.observe()
        self.steps += 1
        self.total += reward[0].item()
        if first[0]:
            self.over = True
            return
        self.picture = self.env.get_info()[0]["rgb"]
        if self.steps == max_steps:
            self.over = True
            self.env.act(np.array([-1], np.int32))  # on to the next level

    @torch.no_grad()
    def sample_action(self) -> np.ndarray:
        """int32 (1,)"""
        _, obs, _ = self.env.observe()
        logits, _ = self.agent(torch.from_numpy(obs["rgb"]))
        action = torch.distributions.Categorical(logits=logits).sample()
        return action.numpy().astype(np.int32)

    def draw(self) -> np.ndarray:
        """uint8 (HEIGHT, WIDTH, 3)"""
        part = Image.new("RGB", (WIDTH, HEIGHT))
        part.paste(Image.fromarray(self.picture), (0, HEIGHT - SIZE))
        score = f"return {self.total:g}"
        if self.over:
            score += ", end"
        write_line(part, 6, self.name)
        write_line(part, 38, score)
        return np.asarray(part)


def write_line(part: Image.Image, top: int, text: str):
    """In letters of 26 pixels, or smaller ones if it is long."""
    length = ImageFont.load_default(26).getlength(text)
    size = 26 * min(1, 500 / length)
    ImageDraw.Draw(part).text((6, top), text, font=ImageFont.load_default(size))


def grid_shape(num_players: int) -> tuple[int, int]:
    """Rows and columns of a frame."""
    return math.ceil(num_players / COLUMNS), min(num_players, COLUMNS)


def draw_frame(players: list[Player]) -> np.ndarray:
    """All players in a grid, row by row, uint8 (rows * HEIGHT, columns * WIDTH, 3)."""
    rows, columns = grid_shape(len(players))
    frame = np.zeros((rows * HEIGHT, columns * WIDTH, 3), np.uint8)
    for number, player in enumerate(players):
        row, column = divmod(number, columns)
        top = row * HEIGHT
        left = column * WIDTH
        frame[top : top + HEIGHT, left : left + WIDTH] = player.draw()
    return frame


def play(players: list[Player], episodes: int, max_steps: int) -> Iterator[np.ndarray]:
    """Yields frames as draw_frame makes them, and prints the returns on each level."""
    for _ in range(episodes):
        for player in players:
            player.begin()
        while not all(player.over for player in players):
            yield draw_frame(players)
            for player in players:
                player.step(max_steps)
        for _ in range(FRAMES_PER_SECOND):  # the end stays for a second
            yield draw_frame(players)
        returns = ", ".join(f"{player.total:g} in {player.steps} steps" for player in players)
        print(f"level {players[0].level}: return {returns}", flush=True)


def find_ffmpeg() -> str:
    """That of the package imageio-ffmpeg, which is not imported: that needs an older setuptools; or the
    system's."""
    programs = [shutil.which("ffmpeg")]
    package = importlib.util.find_spec("imageio_ffmpeg")
    if package:
        programs = [*Path(package.origin).parent.glob("binaries/ffmpeg-*"), *programs]
    if not programs[0]:
        fail("needs ffmpeg: install it, or imageio-ffmpeg")
    return str(programs[0])


def encode(ffmpeg: str, options: list[str], path: Path, frames: Iterable[np.ndarray] = ()):
    """Writes a file by ffmpeg, from frames if its options say `-i -`: the whole file, or none."""
    with replacing("--output", path) as unfinished:
        command = [ffmpeg, "-loglevel", "quiet", "-y", *options, str(unfinished)]
        with contextlib.suppress(BrokenPipeError), Popen(command, stdin=PIPE) as process:
            for frame in frames:
                process.stdin.write(frame.tobytes())
        if process.returncode:
            fail(f"--output: ffmpeg cannot write {path}")


def write_video(ffmpeg: str, path: Path, frames: Iterable[np.ndarray], num_players: int):
    rows, columns = grid_shape(num_players)
    options = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
    options += ["-s", f"{columns * WIDTH}x{rows * HEIGHT}"]
    options += ["-r", str(FRAMES_PER_SECOND)]
    options += ["-i", "-"]
    options += ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
    encode(ffmpeg, options, path, frames)


def write_gif(ffmpeg: str, path: Path, video: Path, num_players: int):
    """As large and as long as GIF_BYTES allow."""
    rows, _ = grid_shape(num_players)
    palette = "split[a][b];[a]palettegen=max_colors=96[p];[b][p]paletteuse=dither=none"
    for size in GIF_SIZES:
        scale = f"fps=10,scale=-2:{rows * size.height}:flags=area"
        options = ["-t", str(size.seconds), "-i", str(video)]
        options += ["-filter_complex", f"{scale},{palette}"]
        encode(ffmpeg, options, path)
        if path.stat().st_size <= GIF_BYTES:
            break


def main(args: Args):
    ffmpeg = find_ffmpeg()
    torch.manual_seed(args.seed)
    saved_agents = [read_agent(path) for path in args.checkpoints]
    games = sorted({f"{saved.env_id} {saved.distribution_mode}" for saved in saved_agents})
    if len(games) > 1:
        fail(f"CHECKPOINTS must be of one game in one distribution mode, not {', '.join(games)}")
    output = args.output or Path("videos", saved_agents[0].env_id)
    video = output.with_name(output.name + ".mp4")
    gif = output.with_name(output.name + ".gif")
    players = [Player(saved, args.seed) for saved in saved_agents]
    frames = play(players, args.episodes, args.max_steps)
    write_video(ffmpeg, video, frames, len(players))
    write_gif(ffmpeg, gif, video, len(players))
    print(f"wrote {video} and {gif}")


if __name__ == "__main__":
    run_tool(main, Args, __doc__)
