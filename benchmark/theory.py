"""The paper's theory, measured exactly: which method generalises, and is it robustness that generalises?

Trains each method on the first n of many renderings of one MDP (renderings.py), and computes by linear solves
what the theory speaks of, on all renderings: eta, zeta and their gap, R, and both sides of its bounds. Each
training is a file in the output folder; those that are there are not made again. Then it prints tables and
draws figures of all that are there. The settings below were decided by PPO alone, before any other method
was run (results/renderings_trials.md).

    python benchmark/theory.py --quick
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from helpers import Count, Failure, Range, check_folder, check_ranges, copy_script, fail, replacing, run_tool
from intervals import Interval, correlation_interval, difference_interval, markdown, mean_interval
from processes import process_pool
from renderings import World, evaluate_bounds, optimal_values, pair_distances, policies_of, visitations
from tqdm import tqdm


class Method(NamedTuple):
    """A way to train, by one of the scripts."""

    label: str
    script: str
    settings: dict  # beside SETTINGS, or in place of some
    cost: int  # of a training, in trainings of PPO


METHODS = {
    "ppo": Method("PPO", "ppo_procgen", {}, 1),
    "mdpo": Method("MDPO", "mdpo_procgen", {}, 4),
    "spo": Method("SPO", "spo_procgen", {}, 1),
    "mdspo": Method("MDSPO", "mdspo_procgen", {}, 4),
    "mdpo_detached": Method("MDPO, peer detached", "mdpo_procgen", {"detach_peer": True}, 4),
    "mdpo_three": Method("MDPO, three agents", "mdpo_procgen", {"num_agents": 3}, 9),
    "mdpo_weak": Method("MDPO, distill_coef 0.1", "mdpo_procgen", {"distill_coef": 0.1}, 4),
    "mdpo_strong": Method("MDPO, distill_coef 10", "mdpo_procgen", {"distill_coef": 10.0}, 4),
    "ppo_both": Method("PPO, data of two agents", "ppo_procgen", {"num_envs": 512}, 2),
}

# Of all methods. What is not here is the paper's. Decided by how well PPO solves its training renderings.
SETTINGS = {
    "gamma": 1.0,  # episodes end as the discount says
    "gae_lambda": 0.8,  # which averages over the chance in these ends
    "learning_rate": 1e-3,
    "ent_coef": 0.003,
    "num_envs": 256,
    "num_steps": 16,
    "channels": (8, 16, 16),
    "device": "cpu",
    "bf16": False,  # so that the policy that plays is the one that is measured
    "num_eval_envs": 1,  # of tests that nobody makes
}
BATCH_SIZE = SETTINGS["num_envs"] * SETTINGS["num_steps"]  # of an agent, if its method has no other

GAMMAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)  # at which the bounds are computed for the last update

QUICK = {  # what --quick makes of the flags
    "methods": ("ppo", "mdpo"),
    "num_train": (1, 8),
    "seeds": 2,
    "total_timesteps": 120_000,
    "num_renderings": 32,
    "measurements": 5,
}

MethodName = Literal[tuple(METHODS)]
Counts = Annotated[tuple[int, ...], Range(1, 10_000)]
Probability = Annotated[float, Range(0, 0.999)]


@dataclass
class Args:
    methods: tuple[MethodName, ...] = tuple(METHODS)
    """which ways to train, in the order of the table"""
    num_train: Counts = (2, 4, 8, 16)
    """numbers of renderings to train on"""
    seeds: Count = 10
    """trainings of each method on each number of renderings"""
    total_timesteps: Count = 400_000
    """environment steps of each agent"""
    grid_size: Annotated[int, Range(2, 6)] = 4
    """cells on a side"""
    gamma: Probability = 0.8
    """discount factor: after each step an episode goes on with this probability"""
    num_renderings: Count = 64
    """that there are, and on which zeta is measured"""
    measurements: Count = 8
    """updates of a training that are measured, the last among them"""
    processes: Annotated[int, Range(0, 1000)] = 0
    """trainings at a time, 0 for one a core"""
    quick: bool = False
    """PPO and MDPO, two seeds, 1 and 8 of 32 renderings, fewer steps: about seven minutes on two cores"""
    output: Path = Path("theory")
    """folder for the trainings, the tables and the figures"""

    def __post_init__(self):
        check_ranges(self)
        if self.quick:
            self.shorten()
        if not self.methods:
            raise ValueError(f"--methods needs one or more of {', '.join(METHODS)}")
        if max(self.num_train) > self.num_renderings:
            raise ValueError(f"--num-train must be at most --num-renderings, {self.num_renderings}")
        if self.total_timesteps < BATCH_SIZE:
            raise ValueError(f"--total-timesteps must be at least {BATCH_SIZE}, not {self.total_timesteps}")

    def shorten(self):
        """Raises ValueError if a flag of QUICK was given, too: which of the two counts?"""
        for name, value in QUICK.items():
            if getattr(self, name) != type(self).__dict__[name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"--quick has a {flag} of its own: leave out one of the two")
            setattr(self, name, value)


class Job(NamedTuple):
    """A training."""

    method: str
    num_train: int
    seed: int

    def file_name(self) -> str:
        return f"{self.method}__{self.num_train}__{self.seed}.json"


@dataclass
class Design:
    """What all trainings have in common, and what each must have to belong with the others."""

    total_timesteps: int
    grid_size: int
    gamma: float
    num_renderings: int
    measurements: int
    settings: dict = field(default_factory=SETTINGS.copy)

    def num_iterations(self) -> int:
        batch_size = self.settings["num_envs"] * self.settings["num_steps"]
        return self.total_timesteps // batch_size


def find_design(args: Args) -> Design:
    return Design(args.total_timesteps, args.grid_size, args.gamma, args.num_renderings, args.measurements)


def find_jobs(args: Args) -> list[Job]:
    """Seed after seed, so that what has been made at any time is of all methods."""
    jobs = []
    for seed in range(1, args.seeds + 1):
        for num_train in args.num_train:
            for method in args.methods:
                jobs.append(Job(method, num_train, seed))
    return list(dict.fromkeys(jobs))  # each once


class Silent:
    """In place of a script's Progress: nobody looks on."""

    share_of_step = 0.0
    share_of_minibatch = 0.0

    def advance(self, share: float):
        pass


def measured_iterations(number: int, measurements: int) -> set[int]:
    """Evenly spread over the iterations 1 ... number, the last among them."""
    spread = np.linspace(number / measurements, number, measurements)
    return {max(1, round(each)) for each in spread}


def train(job: Job, design: Design, world: World) -> dict:
    """Trains by a script's own functions. Returns what json can write: the job, the design, the eta of the
    best policy there is, and a row for each measured update."""
    method = METHODS[job.method]
    script = copy_script(method.script)
    script.make_envs = world.make_envs  # what one does by hand who copies a script
    settings = design.settings | method.settings
    args = script.Args(seed=job.seed, num_levels=job.num_train, **settings)
    with tempfile.TemporaryDirectory() as folder:
        rows = train_and_measure(script, args, design, world, Path(folder))
    best = optimal_values(world.mdp)
    return {
        "job": job._asdict(),
        "design": asdict(design),
        "optimum": float(best @ world.mdp.start),
        "rows": rows,
    }


def train_and_measure(script, args, design: Design, world: World, folder: Path) -> list[dict]:
    """The loop of a script's main, with as many updates as the design says. Returns a row for each that is
    measured."""
    device = torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # it says that there is no GPU
        script.prepare_torch(args, device)
    agents, optimizer, runners = script.set_up(args, folder, device)
    fast = script.speed_up(args, agents, optimizer, runners, device, folder)
    players, policies, gradient_step = fast
    num_iterations = design.num_iterations()
    measured = measured_iterations(num_iterations, design.measurements)
    rows = []
    for iteration in range(1, num_iterations + 1):
        if iteration in measured:
            before = policies_of_all(agents, world)
        script.rollout(policies, runners, Silent())
        for runner in runners:
            runner.finish_rollout()
        metrics = script.update(gradient_step, args, device, Silent())
        script.copy_weights(agents, players)
        if iteration in measured:
            after = policies_of_all(agents, world)
            gammas = GAMMAS if iteration == num_iterations else ()
            row = measure(world, args.num_levels, before, after, gammas)
            row["iteration"] = iteration
            row["losses"] = {name: float(values.mean()) for name, values in metrics.items()}
            rows.append(row)
    for runner in runners:
        runner.close()
    return rows


def policies_of_all(agents: list, world: World) -> list:
    """policies_of each agent, (F, S, A)."""
    return [policies_of(agent, world.pictures) for agent in agents]


def measure(world: World, num_train: int, before: list, after: list, gammas) -> dict:
    """Of an update, which has made the policies `after` of those `before`, (F, S, A) for each agent: a dict
    for each agent of what evaluate_bounds gives, of the robustness over the training renderings, and of the
    means over pairs of renderings where definition 3.6 has a maximum; and what evaluate_bounds gives with
    other discount factors."""
    gamma = world.mdp.gamma
    agents = []
    at_gamma = {str(each): [] for each in gammas}
    for old, new in zip(before, after):
        results = bounds_of(world, num_train, old, new, gamma)
        distances = pair_distances(visitations(world.mdp, old), old)
        train_distances = distances[:num_train, :num_train]
        results["train_robustness"] = float(train_distances.max())
        results["mean_robustness"] = mean_of_pairs(distances)
        results["mean_train_robustness"] = mean_of_pairs(train_distances)
        agents.append(results)
        for each in gammas:
            bounds = bounds_of(world, num_train, old, new, each)
            at_gamma[str(each)].append(bounds)
    return {"agents": agents, "at_gamma": at_gamma}


def mean_of_pairs(distances: np.ndarray) -> float:
    """Of pair_distances, (F, F), over different renderings; 0 if there is one alone."""
    number = len(distances)
    num_pairs = max(1, number * (number - 1))
    return float(distances.sum() / num_pairs)  # that of a rendering to itself is 0


def bounds_of(world: World, num_train: int, before, after, gamma: float) -> dict:
    mdp = world.mdp
    arrays = (mdp.transition, mdp.reward, mdp.start)
    return evaluate_bounds(*arrays, gamma, world.probability, num_train, before, after)


def run_jobs(jobs: list[Job], design: Design, args: Args):
    """Trains what is missing, and writes each result when it is there. After Ctrl-C none goes on."""
    if not jobs:
        return
    world = World(design.grid_size, design.gamma, design.num_renderings)
    processes = args.processes or len(os.sched_getaffinity(0))
    costs = {job: METHODS[job.method].cost for job in jobs}
    total = sum(costs.values())
    bar = tqdm(total=total, unit="PPO", disable=not sys.stderr.isatty())
    with process_pool(processes) as pool, bar:
        futures = {}
        for job in jobs:
            future = pool.submit(train, job, design, world)
            futures[future] = job
        for future in as_completed(futures):
            job = futures[future]
            text = json.dumps(future.result())
            write_text(args.output / job.file_name(), text)
            bar.update(costs[job])


def write_text(path: Path, text: str):
    with replacing("--output", path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_result(path: Path, design: Design) -> dict | None:
    """That of a training, None if there is none. Failure if it is another kind of file, or of another
    design."""
    try:
        result = json.loads(path.read_text())
        found = dict(result["design"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or another kind of file"
        raise Failure(f"--output cannot read {path}: {reason}") from error
    expected = json.loads(json.dumps(asdict(design)))
    for name, value in expected.items():
        if found.get(name) != value:
            was = f"{name} {found.get(name)}, not {value}"
            fail(f"--output: {path} is of a training with {was}; another --output would do")
    return result


def find_results(folder: Path, design: Design) -> list[dict]:
    """Of all trainings in the folder, seed after seed."""
    found = {}
    for path in folder.iterdir():
        name = re.fullmatch(r"(\w+)__(\d+)__(\d+)\.json", path.name)
        if name:
            method, num_train, seed = name.groups()
            found[int(seed), int(num_train), method] = path
    return [read_result(found[key], design) for key in sorted(found)]


MEASURES = {  # of an agent, and what the table calls them
    "eta": "eta / optimum",
    "zeta": "zeta / optimum",
    "gap": "gap / optimum",
    "robustness": "R",
    "mean_robustness": "mean R",
    "mean_train_robustness": "mean R of training",
}
ROBUSTNESS = ["robustness", "mean_robustness", "mean_train_robustness"]


def agent_values(result: dict) -> dict[str, np.ndarray]:
    """The MEASURES at the last measurement of a training, each (number of agents,): eta, zeta and the gap
    in parts of the optimum."""
    agents = result["rows"][-1]["agents"]
    values = {}
    for name in ["eta", "zeta", *ROBUSTNESS]:
        values[name] = np.array([agent[name] for agent in agents])
    values["eta"] /= result["optimum"]
    values["zeta"] /= result["optimum"]
    values["gap"] = values["eta"] - values["zeta"]
    return values


def training_values(results: list[dict], name: str) -> np.ndarray:
    """One of the MEASURES, (number of trainings,). The agents of a training are not independent: their mean
    counts."""
    return np.array([agent_values(result)[name].mean() for result in results])


def of_method(results: list[dict], method: str) -> list[dict]:
    return [result for result in results if result["job"]["method"] == method]


def of_number(results: list[dict], num_train: int) -> list[dict]:
    return [result for result in results if result["job"]["num_train"] == num_train]


def numbers_of(results: list[dict]) -> list[int]:
    """Of training renderings, sorted."""
    return sorted({result["job"]["num_train"] for result in results})


def methods_of(results: list[dict]) -> list[str]:
    """In the order of METHODS."""
    found = {result["job"]["method"] for result in results}
    return [method for method in METHODS if method in found]


def make_tables(results: list[dict]) -> str:
    """Markdown, with 95 % intervals over trainings: each method on each number of renderings, how far it is
    from PPO, and how robustness goes with the gap."""
    return (
        f"## What each method reached\n\n{method_table(results)}\n"
        f"## Difference from PPO\n\n{difference_table(results)}\n"
        f"## Rank correlation with the gap\n\n{correlation_table(results)}"
    )


def method_table(results: list[dict]) -> str:
    rows = [["method", "n", "trainings", *MEASURES.values()]]
    for method in methods_of(results):
        some = of_method(results, method)
        for num_train in numbers_of(some):
            group = of_number(some, num_train)
            row = [METHODS[method].label, str(num_train), str(len(group))]
            for name in MEASURES:
                row.append(str(mean_interval(training_values(group, name))))
            rows.append(row)
    return markdown(rows)


def difference_table(results: list[dict]) -> str:
    rows = [["method", "n", *MEASURES.values()]]
    baselines = of_method(results, "ppo")
    for method in methods_of(results):
        some = of_method(results, method)
        for num_train in numbers_of(some):
            group = of_number(some, num_train)
            baseline = of_number(baselines, num_train)
            if method == "ppo" or not baseline:
                continue
            row = [METHODS[method].label, str(num_train)]
            for name in MEASURES:
                values = training_values(group, name)
                row.append(str(difference_interval(values, training_values(baseline, name))))
            rows.append(row)
    if len(rows) == 1:
        return "Nothing to compare: no other method was trained where PPO was.\n"
    return markdown(rows)


def correlation_table(results: list[dict]) -> str:
    groups = {"all": results}
    for num_train in numbers_of(results):
        groups[str(num_train)] = of_number(results, num_train)
    rows = [["n", "trainings", *(MEASURES[name] for name in ROBUSTNESS)]]
    for label, group in groups.items():
        row = [label, str(len(group))]
        for name in ROBUSTNESS:
            row.append(str(correlation_with_gap(group, name)))
        rows.append(row)
    return markdown(rows)


def correlation_with_gap(results: list[dict], name: str) -> Interval:
    """Of one of the MEASURES, a point for each agent."""
    trainings = []
    for result in results:
        values = agent_values(result)
        trainings.append((values[name], values["gap"]))
    return correlation_interval(trainings)


def draw(args: Args, results: list[dict], design: Design):
    """performance, training, renderings, and if there is what to compare, differences, each as .pdf and
    .png."""
    plt.rcParams.update({"font.size": 9, "pdf.fonttype": 42})
    figure, panels = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
    draw_over_number(panels[0, 0], results, "zeta")
    draw_over_number(panels[0, 1], results, "gap")
    draw_against_gap(panels[1, 0], results, "robustness")
    draw_against_gap(panels[1, 1], results, "mean_robustness")
    lines = []
    for method in methods_of(results):
        lines.append(plt.Line2D([], [], color=color_of(method), marker="o", label=METHODS[method].label))
    figure.legend(handles=lines, loc="outside lower center", ncols=4)
    save(figure, args.output / "performance")
    num_methods = len(methods_of(results))
    if of_method(results, "ppo") and num_methods > 1:
        size = (10, 1.6 + 0.4 * num_methods)
        figure, panels = plt.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
        for ax, name in zip(panels, ["zeta", "gap", "mean_robustness"]):
            draw_differences(ax, results, name)
        lines, labels = panels[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(lines))
        save(figure, args.output / "differences")
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    draw_distillation(panels[0], results)
    draw_ratios(panels[1], results)
    draw_slack(panels[2], results)
    save(figure, args.output / "training")
    save(draw_renderings(design), args.output / "renderings")


def save(figure, path: Path):
    for suffix in (".pdf", ".png"):
        to = path.with_suffix(suffix)
        with replacing("--output", to) as unfinished:
            figure.savefig(unfinished, dpi=150)
    plt.close(figure)


def color_of(method: str) -> str:
    """The same in all panels."""
    return f"C{list(METHODS).index(method)}"


def draw_over_number(ax, results: list[dict], name: str):
    """A measure, with its interval, over n, of the methods that were trained on several."""
    for method in methods_of(results):
        some = of_method(results, method)
        numbers = numbers_of(some)
        if len(numbers) == 1:
            continue
        intervals = [mean_interval(training_values(of_number(some, number), name)) for number in numbers]
        middles, lows, highs = np.transpose(intervals)
        color = color_of(method)
        ax.plot(numbers, middles, "o-", color=color, markersize=3)
        ax.fill_between(numbers, lows, highs, color=color, alpha=0.2, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers_of(results), numbers_of(results))
    ax.minorticks_off()
    ax.set_ylim(-0.05, 1.05)  # however wide the band of a few trainings
    ax.set(xlabel="training renderings n", ylabel=MEASURES[name])


def draw_differences(ax, results: list[dict], name: str):
    """How far each method's mean of a measure is from PPO's, with its interval, a point for each n."""
    baselines = of_method(results, "ppo")
    methods = [method for method in methods_of(results) if method != "ppo"]
    numbers = numbers_of(baselines)
    for index, number in enumerate(numbers):
        baseline = training_values(of_number(baselines, number), name)
        color = plt.cm.viridis(index / len(numbers))
        shift = 0.6 * (index + 0.5) / len(numbers) - 0.3  # so that no point hides another
        for row, method in enumerate(methods):
            group = of_number(of_method(results, method), number)
            if not group:
                continue
            middle, low, high = difference_interval(training_values(group, name), baseline)
            ax.plot([low, high], [row + shift] * 2, "-", color=color)
            ax.plot([middle], [row + shift], "o", color=color, markersize=4)
        ax.plot([], [], "o-", color=color, markersize=4, label=f"n = {number}")
    ax.axvline(0, color="grey", linestyle=":")
    ax.set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set(xlabel=f"{MEASURES[name]}, minus PPO's")


def draw_against_gap(ax, results: list[dict], name: str):
    """The gap against a measure of robustness, a point for each agent; the more renderings it was trained
    on, the larger."""
    numbers = numbers_of(results)
    sizes = {number: 3 + 2 * index for index, number in enumerate(numbers)}
    for result in results:
        job = result["job"]
        values = agent_values(result)
        style = {"color": color_of(job["method"]), "alpha": 0.6, "markeredgewidth": 0}
        ax.plot(values[name], values["gap"], "o", markersize=sizes[job["num_train"]], **style)
    for number, size in sizes.items():
        ax.plot([], [], "o", color="grey", markersize=size, label=f"n = {number}")
    ax.set(xlabel=MEASURES[name], ylabel=MEASURES["gap"])
    ax.legend(fontsize=7)


def iterations_of(results: list[dict]) -> list[int]:
    """The updates that were measured, the same in all trainings."""
    return [row["iteration"] for row in results[0]["rows"]]


def draw_distillation(ax, results: list[dict]):
    """mutual_kl over training, the mean of all trainings of a method."""
    for method in methods_of(results):
        some = of_method(results, method)
        if "mutual_kl" in some[0]["rows"][0]["losses"]:
            curves = [[row["losses"]["mutual_kl"] for row in result["rows"]] for result in some]
            color = color_of(method)
            ax.plot(iterations_of(some), np.mean(curves, axis=0), color=color, label=METHODS[method].label)
    ax.set(xlabel="updates", ylabel="mutual_kl (nats)", title="distillation")
    if ax.lines:
        ax.legend(fontsize=7)


BOUNDS = {  # and what each bounds from below
    "theorem_3_2": "new_eta",
    "theorem_3_3": "new_zeta",
    "corollary_3_8": "new_zeta",
}


def bound_label(name: str) -> str:
    return name.replace("_", " ", 1).replace("_", ".")


def draw_ratios(ax, results: list[dict]):
    """Each bound in parts of what it bounds, over training: 1 is tight, and below 0 it says nothing, since no
    return is negative. Of theorem 3.7, an upper bound, D_test in parts of the bound."""
    pairs = [*BOUNDS.items(), ("d_test", "theorem_3_7")]
    labels = [*map(bound_label, BOUNDS), "theorem 3.7: D_test / bound"]
    for (name, to), label in zip(pairs, labels):
        curves = [[mean_ratio(row["agents"], name, to) for row in result["rows"]] for result in results]
        ax.plot(iterations_of(results), np.mean(curves, axis=0), "o-", label=label, markersize=3)
    ax.axhline(0, color="grey", linestyle=":")
    ax.axhline(1, color="grey", linestyle=":")
    ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="updates", ylabel="ratio of the sides", title="the bounds over training")
    ax.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.42))


def draw_slack(ax, results: list[dict]):
    """How far each bound on the new policy's performance is below it, over gamma, for the last update: in
    parts of r_max / (1 - gamma), the largest return that can be. At 1 and above a bound says nothing."""
    for bound, performance in BOUNDS.items():
        slacks = []
        for gamma in GAMMAS:
            at_gamma = []
            for result in results:
                at_gamma += result["rows"][-1]["at_gamma"][str(gamma)]
            slack = mean_of(at_gamma, performance) - mean_of(at_gamma, bound)
            slacks.append(slack * (1 - gamma))
        ax.plot(GAMMAS, slacks, "o-", label=bound_label(bound), markersize=3)
    ax.axhline(1, color="grey", linestyle=":")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="gamma", ylabel="slack / largest return")
    ax.set_title("the bounds, after the last update")
    ax.legend(fontsize=7)


def mean_of(agents: list[dict], name: str) -> float:
    return float(np.mean([agent[name] for agent in agents]))


def mean_ratio(agents: list[dict], name: str, to: str) -> float:
    """NaN where there is nothing to divide by."""
    ratios = [agent[name] / agent[to] if agent[to] else np.nan for agent in agents]
    return float(np.mean(ratios))


def draw_renderings(design: Design):
    """One state under the first renderings."""
    number = min(8, design.num_renderings)
    world = World(design.grid_size, design.gamma, number)
    state = len(world.mdp.start) // 3
    size = (number, 1.1)
    figure, axes = plt.subplots(1, number, figsize=size, layout="constrained", squeeze=False)
    for ax, picture in zip(axes[0], world.pictures[:, state]):
        ax.imshow(picture, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    return figure


def main(args: Args):
    check_folder("--output", args.output)
    design = find_design(args)
    jobs = find_jobs(args)
    missing = []
    for job in jobs:
        if read_result(args.output / job.file_name(), design) is None:
            missing.append(job)
    print(f"trainings: {len(jobs)}, to be made: {len(missing)}", flush=True)
    run_jobs(missing, design, args)
    results = find_results(args.output, design)
    tables = make_tables(results)
    print(tables)
    write_text(args.output / "tables.md", tables)
    draw(args, results, design)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_tool(main, Args, __doc__)
