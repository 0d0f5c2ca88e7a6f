"""Does a policy that has seen few backgrounds play on all of them? The theory's question, on Procgen itself.

Trains by one of the scripts on every level that there is, but with only the first few backgrounds of the
game's list, and tests on every level with all backgrounds: training and test differ in the rendering alone
(definition 3.6), and the gap is what the new backgrounds cost. What follows `--` goes to the script. To go on
give the same command with --resume after `--`: the script alone would train on all backgrounds.

    python benchmark/backgrounds.py mdpo_procgen --backgrounds 1 -- --env-id fruitbot --distribution-mode easy
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro
from helpers import Count, check_ranges, copy_script, end_with, parse_args, split_words

from robustness_eval import BACKGROUNDS, Game, find_fields, read_int, replace_int

SCRIPTS = ["ppo_procgen", "spo_procgen", "mdpo_procgen", "mdspo_procgen"]
ALL_LEVELS = 2**31 - 1  # for training; the scripts take 0, which means the same, for tests


@dataclass
class Args:
    script: Annotated[str, tyro.conf.Positional] = "mdpo_procgen"  # name of the training script
    backgrounds: Count = 1  # to train on, the first of the game's list

    def __post_init__(self):
        check_ranges(self)
        if self.script not in SCRIPTS:
            raise ValueError(f"SCRIPT must be one of {', '.join(SCRIPTS)}, not {self.script}")


class FewBackgrounds:
    """Procgen's environments, in which every level is drawn on one of the first backgrounds of the list. Else
    nothing is otherwise: levels, rewards and ends are the same."""

    def __init__(self, envs, game: Game, number: int):
        self.envs = envs
        self.num = envs.num
        self.game = game
        self.number = number
        self.redraw()

    def act(self, actions):
        self.envs.act(actions)

    def observe(self):
        reward, obs, first = self.envs.observe()
        if first.any():  # a new level chooses among all backgrounds
            self.redraw()
            reward, obs, first = self.envs.observe()
        return reward, obs, first

    def redraw(self):
        saves = []
        for save in self.envs.get_state():
            at = find_fields(save, self.game)["background"]
            background = read_int(save, at) % self.number
            saves.append(replace_int(save, at, background))
        self.envs.set_state(saves)

    def get_state(self) -> list[bytes]:
        return self.envs.get_state()

    def set_state(self, states: list[bytes]):
        self.envs.set_state(states)

    def close(self):
        self.envs.close()


def make_envs(make_procgen, number: int, args, num: int, num_levels: int, start_level: int, rand_seed: int):
    """In place of a script's make_envs, which is make_procgen: tests see all backgrounds."""
    envs = make_procgen(args, num, num_levels, start_level, rand_seed)
    if num_levels == 0:
        return envs
    game = Game(args.env_id, args.distribution_mode)
    return FewBackgrounds(envs, game, number)


def parse_script_args(script, parse_original, number: int):
    """In place of a script's parse_args, which is parse_original: a Failure of the script's if the game has
    no more backgrounds, or the levels are not told from those of the tests."""
    args = parse_original()
    most = BACKGROUNDS[args.env_id] - 1
    if most == 0:
        raise script.Failure(f"--env-id: {args.env_id} has only one background")
    if number > most:
        raise script.Failure(f"--backgrounds must be at most {most} for {args.env_id}, not {number}")
    if args.num_levels == 0:
        raise script.Failure("--num-levels must not be 0 here: leave it out for all levels")
    return args


def main(args: Args, script_flags: list[str]):
    for word in script_flags:
        if word.split("=")[0].replace("_", "-") == "--exp-name":
            end_with("--exp-name is not for the flags of the script, since --backgrounds sets it")
    script = copy_script(args.script)
    script.make_envs = partial(make_envs, script.make_envs, args.backgrounds)
    script.parse_args = partial(parse_script_args, script, script.parse_args, args.backgrounds)
    name = f"{args.script}+{args.backgrounds}_backgrounds"
    sys.argv = [f"{args.script}.py", "--exp-name", name, "--num-levels", str(ALL_LEVELS), *script_flags]
    script.run_from_shell()


if __name__ == "__main__":
    own_words, script_words = split_words(sys.argv[1:])
    main(parse_args(Args, __doc__, own_words), script_words)
