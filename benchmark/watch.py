"""Records trained agents at play on test levels, in Procgen's full rendering, as a video and as a small GIF.

Several agents play the same levels side by side; who is done first waits for the others.

    python benchmark/watch.py runs/FOLDER/agent_1/agent.pt runs/ANOTHER/agent.pt
"""

import contextlib
import importlib.util
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from procgen import ProcgenGym3Env

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import check_ranges, fail, parse_args

import mdpo_procgen

WIDTH, HEIGHT = 512 + 8, 512 + 72  # of a player's part in a frame: a gap on its right, two lines above it
FRAMES_PER_SECOND, GIF_BYTES = 15, 3_000_000
GIF_SIZES = [(292, 20), (240, 15), (192, 15), (128, 15), (128, 8), (64, 8), (64, 2)]  # height, seconds


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # agent.pt files of one game, from any of the scripts
    episodes: int = 3  # levels to play
    max_steps: int = 300  # longer episodes are cut
    seed: int = 0  # of the levels and of the actions
    output: Path | None = None  # where it goes, as .mp4 and .gif; by default videos/GAME

    def __post_init__(self):
        if not 1 <= len(self.checkpoints) <= 8:
            raise ValueError(f"CHECKPOINTS must be 1 to 8 agent.pt files, not {len(self.checkpoints)}")
        if self.output and self.output.name in ("", ".."):
            raise ValueError(f"--output must end in a file's name, not be {self.output}")
        check_ranges(self, {"episodes": (1, 1000), "max_steps": (1, 10_000), "seed": (0, 2**31 - 1)})


class Player:
    """The agent of an agent.pt in one environment of test levels; a seed stands for a sequence of levels."""

    def __init__(self, path: Path, seed: int):
        try:
            if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
                raise ValueError
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved, names = content["args"], ("env_id", "distribution_mode", "channels")
            args = mdpo_procgen.Args(**{name: saved[name] for name in names})  # which checks them
            self.agent = mdpo_procgen.Agent(channels=args.channels)
            self.agent.load_state_dict(content["agent"])
            self.name = f"{saved['exp_name']}, seed {saved['seed']}"
        except Exception as error:  # torch has many names for a file that is cut short, or no agent
            reason = getattr(error, "strerror", None) or "it is damaged, or no agent.pt"
            fail(f"CHECKPOINTS: cannot read {path}: {reason}")
        folder = path.absolute().parent.name
        self.name += ", " + folder.replace("_", " ") if folder.startswith("agent_") else ""
        self.game = (args.env_id, args.distribution_mode)
        levels = {"distribution_mode": args.distribution_mode, "num_levels": 0, "rand_seed": seed}
        self.env = ProcgenGym3Env(1, args.env_id, render_mode="rgb_array", num_threads=0, **levels)

    def begin(self):
        """A new episode, on the level that the end of the last one has brought."""
        self.steps, self.total, self.over, info = 0, 0.0, False, self.env.get_info()[0]
        self.picture, self.level = info["rgb"], int(info["level_seed"])

    @torch.no_grad()
    def step(self, max_steps: int):
        """A step by an action sampled from the policy, unless the episode is over. The last picture is that
        before the end, since at the end Procgen already shows the next level."""
        if self.over:
            return
        logits, _ = self.agent(torch.from_numpy(self.env.observe()[1]["rgb"]))
        self.env.act(torch.distributions.Categorical(logits=logits).sample().numpy().astype(np.int32))
        reward, _, first = self.env.observe()
        self.steps, self.total, self.over = self.steps + 1, self.total + reward[0].item(), bool(first[0])
        if not self.over:
            self.picture = self.env.get_info()[0]["rgb"]
            self.over = self.steps == max_steps
            if self.over:
                self.env.act(np.full(1, -1, np.int32))  # on to the next level

    def draw(self) -> np.ndarray:
        """uint8 (HEIGHT, WIDTH, 3)"""
        part = Image.new("RGB", (WIDTH, HEIGHT))
        part.paste(Image.fromarray(self.picture), (0, HEIGHT - 512))
        for top, text in ((6, self.name), (38, f"return {self.total:g}" + ", end" * self.over)):
            size = 26 * min(1, 500 / ImageFont.load_default(26).getlength(text))
            ImageDraw.Draw(part).text((6, top), text, font=ImageFont.load_default(size))
        return np.asarray(part)


def play(args: Args, players: list[Player]):
    """Yields frames, uint8 (HEIGHT, WIDTH * len(players), 3), and prints the returns on each level."""
    for _ in range(args.episodes):
        for player in players:
            player.begin()
        frames_over = 0  # the end stays for a second
        while frames_over < FRAMES_PER_SECOND:
            yield np.concatenate([player.draw() for player in players], axis=1)
            frames_over += all(player.over for player in players)
            for player in players:
                player.step(args.max_steps)
        returns = ", ".join(f"{player.total:g} in {player.steps} steps" for player in players)
        print(f"level {players[0].level}: return {returns}", flush=True)


def encode(ffmpeg: str, options: list[str], path: Path, frames=()):
    """Writes a file by ffmpeg, from frames if its options say `-i -`: the whole file, or none."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        command = [ffmpeg, "-loglevel", "quiet", "-y", *options, str(unfinished)]
        with contextlib.suppress(BrokenPipeError), Popen(command, stdin=PIPE) as process:
            for frame in frames:
                process.stdin.write(frame.tobytes())
        if process.returncode:
            fail(f"--output: ffmpeg cannot write {path}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(args: Args):
    package = importlib.util.find_spec("imageio_ffmpeg")  # not imported: that needs an older setuptools
    brought = Path(package.origin).parent.glob("binaries/ffmpeg-*") if package else []
    ffmpeg = next(map(str, brought), None) or shutil.which("ffmpeg")
    ffmpeg = ffmpeg or fail("needs ffmpeg: install it, or imageio-ffmpeg")
    torch.manual_seed(args.seed)
    players = [Player(path, args.seed) for path in args.checkpoints]
    games = sorted({" ".join(player.game) for player in players})
    if len(games) > 1:
        fail(f"CHECKPOINTS must be of one game in one distribution mode, not {', '.join(games)}")
    output = args.output or Path("videos", players[0].game[0])
    output = output.with_suffix("") if output.suffix in (".mp4", ".gif") else output
    video, gif = (output.with_name(output.name + suffix) for suffix in (".mp4", ".gif"))
    raw = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH * len(players)}x{HEIGHT} -r {FRAMES_PER_SECOND} -i -"
    palette = "split[a][b];[a]palettegen=max_colors=96[p];[b][p]paletteuse=dither=none"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        encode(ffmpeg, f"{raw} -c:v libx264 -pix_fmt yuv420p -f mp4".split(), video, play(args, players))
        for height, seconds in GIF_SIZES:
            filters = ["-filter_complex", f"fps=10,scale=-2:{height}:flags=area,{palette}"]
            encode(ffmpeg, ["-t", str(seconds), "-i", str(video), *filters, "-f", "gif"], gif)
            if gif.stat().st_size <= GIF_BYTES:
                break
    except OSError as error:
        fail(f"--output {output}: {error.strerror or error}")
    print(f"wrote {video} and {gif}")


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except KeyboardInterrupt:  # the unfinished file is gone
        sys.exit(130)
