"""Does a policy that has seen few backgrounds play on others? The theory's question, on Procgen itself.

Trains by one of the scripts on every level that there is, with only a few backgrounds of the game's list, and
tests on every level with the others: training and test differ in the rendering alone (definition 3.6). A run
sees background (seed + k) mod number for k < --backgrounds. What follows `--` goes to the script.

    python benchmark/backgrounds.py mdpo_procgen --backgrounds 1 -- --env-id fruitbot --distribution-mode easy

The final test plays the same levels with the same noise of actions on own and other backgrounds: they are
training_levels and full_distribution in final_test.json, own and other in backgrounds.json. To go on, or to
test again, add --resume auto after `--`: the script alone would train on all backgrounds.
"""

import json
import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import tyro
from helpers import Count, check_limits, copy_script, fail

from robustness_eval import BACKGROUNDS, Game, find_fields, read_int, replace_int

ALL_LEVELS = 2**31 - 1  # for training; the scripts take 0, which means the same, for tests


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    script: Literal["ppo_procgen", "spo_procgen", "mdpo_procgen", "mdspo_procgen"]
    backgrounds: Count = 1  # to train on
    variant: str = ""  # of the script, in the run's name; else the number of backgrounds

    def __post_init__(self):
        check_limits(self)


class FewBackgrounds:
    """Procgen's environments, in which every level is drawn on one of the chosen backgrounds. Nothing else
    changes: levels, rewards and ends are the same. In a test only the first episodes count, and to draw
    takes longer than to step, so only those are drawn so."""

    def __init__(self, envs, game: Game, chosen: list[int], for_a_test: bool):
        self.envs = envs
        self.game = game
        self.chosen = chosen
        self.for_a_test = for_a_test
        self.drawn = False

    def observe(self):
        reward, obs, first = self.envs.observe()
        if not first.any() or (self.for_a_test and self.drawn):
            return reward, obs, first
        self.redraw()  # a new level has chosen among all backgrounds
        self.drawn = True
        return self.envs.observe()

    def redraw(self):
        saves = []
        for save in self.envs.get_state():
            at = find_fields(save, self.game)["background"]
            background = read_int(save, at)
            if background not in self.chosen:
                background = self.chosen[background % len(self.chosen)]
            saves.append(replace_int(save, at, background))
        self.envs.set_state(saves)

    def __getattr__(self, name):
        return getattr(self.envs, name)


class FewBackgroundsScript:
    """A training script with few backgrounds in training and the others in tests. Wraps its functions."""

    def __init__(self, name: str, number: int):
        self.number = number
        self.testing = False
        self.script = copy_script(name)
        self.original = dict(vars(self.script))
        for function in (self.make_envs, self.evaluate, self.final_test):
            setattr(self.script, function.__name__, function)

    def make_envs(self, args, num, num_levels, *rest):
        envs = self.original["make_envs"](args, num, num_levels, *rest)
        total = BACKGROUNDS[args.env_id]
        backgrounds = [(args.seed + k) % total for k in range(total)]
        chosen = backgrounds[: self.number]
        if num_levels == 0:
            chosen = backgrounds[self.number :]
        return FewBackgrounds(envs, Game(args.env_id, args.distribution_mode), chosen, self.testing)

    def evaluate(self, policies, *inputs):
        """Each agent alone, so that each test of it begins with the same random numbers."""
        self.testing = True
        returns = [self.original["evaluate"]([policy], *inputs) for policy in policies]
        self.testing = False
        return np.concatenate(returns)

    def final_test(self, policies, args, device, stop, global_step, run_dir):
        self.original["final_test"](policies, args, device, stop, global_step, run_dir)
        content = json.loads((run_dir / "final_test.json").read_text())
        for test in content["agents"]:
            test["own"] = test.pop("training_levels")
            test["other"] = test.pop("full_distribution")
        self.script.write_file(run_dir / "backgrounds.json", content)


def main(args: Args, words: list[str]):
    few = FewBackgroundsScript(args.script, args.backgrounds)
    name = f"{args.script}+{args.variant or f'{args.backgrounds}_backgrounds'}"
    sys.argv[1:] = ["--exp-name", name, "--num-levels", str(ALL_LEVELS), *words]
    script_args = few.script.parse_args()
    if script_args.exp_name != name or script_args.num_levels != ALL_LEVELS:
        fail("--exp-name and --num-levels are not for the flags after --, since this tool sets them")
    total = BACKGROUNDS[script_args.env_id]
    if args.backgrounds >= total:
        fail(f"--backgrounds must be below {total}, which is all that {script_args.env_id} has")
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(few.script.handle_signal, signals))
    few.script.main(script_args, signals)


if __name__ == "__main__":
    words = [*sys.argv[1:], "--"]
    at = words.index("--")
    main(tyro.cli(Args, description=__doc__, args=words[:at]), words[at + 1 : -1])
