"""The paper's theory, measured exactly: which method generalises, and is it robustness that generalises?

Trains each method on the first n of many renderings of one MDP (renderings.py), and computes by linear solves
what the theory speaks of, on all renderings: eta, zeta and their gap, R, and both sides of its bounds. Each
training is a file in the output folder; those that are there are not made again. Then it prints a table and
draws the figures. The settings below are a first choice by PPO alone (results/renderings_trials.md): what
they show of the methods is not measured yet.

    python benchmark/theory.py --quick
"""

import contextlib
import importlib.util
import io
import json
import os
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from helpers import ROOT, Count, Failure, Range, check_folder, check_ranges, fail, replacing, run_tool
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

# Of all methods. What is not here is the paper's. Decided by how well PPO solves four training renderings.
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

Counts = Annotated[tuple[int, ...], Range(1, 10_000)]
Probability = Annotated[float, Range(0, 0.999)]


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)
    """which ways to train, in the order of the table"""
    num_train: Counts = (1, 4, 16, 32)
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
    """PPO and MDPO with two seeds and a part of the steps, in about ten minutes on two cores"""
    output: Path = Path("theory")
    """folder for the trainings, the table and the figures"""

    def __post_init__(self):
        check_ranges(self)
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"--methods must be some of {', '.join(METHODS)}, not {' '.join(unknown)}")
        if max(self.num_train) > self.num_renderings:
            raise ValueError(f"--num-train must be at most --num-renderings, {self.num_renderings}")
        if self.total_timesteps < BATCH_SIZE:
            raise ValueError(f"--total-timesteps must be at least {BATCH_SIZE}, not {self.total_timesteps}")


def shortened(args: Args) -> Args:
    """What --quick makes of it."""
    return replace(
        args,
        methods=("ppo", "mdpo"),
        num_train=(1, 8),
        seeds=2,
        total_timesteps=120_000,
        num_renderings=32,
        measurements=5,
    )


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
    return jobs


def copy_script(name: str, world: World):
    """A module of its own from a training script, with the world in place of Procgen: what one does by hand
    who copies the file and changes make_envs."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_renderings", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look for the types of their fields
    spec.loader.exec_module(script)
    script.make_envs = world.make_envs
    return script


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
    script = copy_script(method.script, world)
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
        results["mean_robustness"] = float(distances.mean())  # all renderings are equally likely
        results["mean_train_robustness"] = float(train_distances.mean())
        agents.append(results)
        for each in gammas:
            bounds = bounds_of(world, num_train, old, new, each)
            at_gamma[str(each)].append(bounds)
    return {"agents": agents, "at_gamma": at_gamma}


def bounds_of(world: World, num_train: int, before, after, gamma: float) -> dict:
    mdp = world.mdp
    arrays = (mdp.transition, mdp.reward, mdp.start)
    return evaluate_bounds(*arrays, gamma, world.probability, num_train, before, after)


def run_jobs(jobs: list[Job], design: Design, args: Args):
    """Trains what is missing, and writes each result when it is there. After Ctrl-C none goes on."""
    if not jobs:
        return
    world = World(design.grid_size, design.gamma, design.num_renderings)
    context = get_context("fork")  # which shares the pictures; no thread of torch's runs yet
    processes = args.processes or len(os.sched_getaffinity(0))
    costs = {job: METHODS[job.method].cost for job in jobs}
    total = sum(costs.values())
    bar = tqdm(total=total, unit="PPO", disable=not sys.stderr.isatty())
    with ProcessPoolExecutor(processes, context, begin_process) as pool, bar:
        try:
            futures = {}
            for job in jobs:
                future = pool.submit(train, job, design, world)
                futures[future] = job
            for future in as_completed(futures):
                job = futures[future]
                text = json.dumps(future.result())
                write_text(args.output / job.file_name(), text)
                bar.update(costs[job])
        except BrokenProcessPool:
            fail("a training was killed: is there enough memory? fewer --processes need less")
        finally:
            pool.shutdown(cancel_futures=True)


def begin_process():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own


def write_text(path: Path, text: str):
    with replacing("--output", path) as unfinished:
        unfinished.write_text(text)


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


COLUMNS = ["eta", "zeta", "gap", "robustness", "train_robustness"]


def final_values(results: list[dict]) -> dict[str, np.ndarray]:
    """Of the last measurement, each (number of trainings,): eta, zeta and gap in parts of the optimum, R and
    R over the training renderings. The agents of a training are not independent: their mean counts."""
    columns = {name: [] for name in COLUMNS}
    for result in results:
        agents = result["rows"][-1]["agents"]
        optimum = result["optimum"]
        eta = mean_of(agents, "eta") / optimum
        zeta = mean_of(agents, "zeta") / optimum
        columns["eta"].append(eta)
        columns["zeta"].append(zeta)
        columns["gap"].append(eta - zeta)
        columns["robustness"].append(mean_of(agents, "robustness"))
        columns["train_robustness"].append(mean_of(agents, "train_robustness"))
    return {name: np.array(values) for name, values in columns.items()}


def mean_of(agents: list[dict], name: str) -> float:
    return float(np.mean([agent[name] for agent in agents]))


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


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and the 95 % interval of the bootstrap over trainings."""
    rng = np.random.default_rng(0)
    samples = rng.choice(values, size=(2000, len(values)))
    low, high = np.percentile(samples.mean(-1), [2.5, 97.5])
    return values.mean(), low, high


def ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values share the mean of theirs."""
    below = (values < values[:, None]).sum(-1)
    equal = (values == values[:, None]).sum(-1)
    return below + (equal - 1) / 2


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's; NaN if all values of one are the same."""
    middle = (len(first) - 1) / 2
    of_first = ranks(first) - middle
    of_second = ranks(second) - middle
    scale = np.linalg.norm(of_first) * np.linalg.norm(of_second)
    if scale == 0:
        return np.nan
    return float(of_first @ of_second / scale)


def correlation_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """rank_correlation and the 95 % interval of its bootstrap over trainings, NaN where there is none."""
    number = len(first)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(1000):
        rows = rng.integers(number, size=number)
        sample = rank_correlation(first[rows], second[rows])
        if np.isfinite(sample):
            samples.append(sample)
    if not samples:
        return np.nan, np.nan, np.nan
    low, high = np.percentile(samples, [2.5, 97.5])
    return rank_correlation(first, second), low, high


def make_table(results: list[dict]) -> str:
    """Markdown: a row for each method and number of renderings, with 95 % intervals over trainings."""
    header = ["method", "n", "trainings"]
    header += ["eta / optimum", "zeta / optimum", "gap / optimum", "R", "R of training"]
    rows = [header, ["---"] * len(header)]
    for method in methods_of(results):
        some = of_method(results, method)
        for num_train in numbers_of(some):
            group = of_number(some, num_train)
            values = final_values(group)
            cells = [METHODS[method].label, str(num_train), str(len(group))]
            for name in COLUMNS:
                mean, low, high = mean_interval(values[name])
                cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
            rows.append(cells)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "Rank correlation of R with the gap, with its 95 % interval:", ""]
    lines.append(correlation_line("all n", results))
    for num_train in numbers_of(results):
        group = of_number(results, num_train)
        lines.append(correlation_line(f"n = {num_train}", group))
    return "\n".join(lines) + "\n"


def correlation_line(name: str, results: list[dict]) -> str:
    values = final_values(results)
    mean, low, high = correlation_interval(values["robustness"], values["gap"])
    return f"- {name}: {mean:.2f} ({low:.2f} to {high:.2f}), {len(results)} trainings"


def draw(args: Args, results: list[dict], design: Design):
    """theory.pdf and .png, of four panels, and renderings.pdf and .png, of one state."""
    plt.rcParams.update({"font.size": 9, "pdf.fonttype": 42})
    figure, panels = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    draw_performance(panels[0, 0], results)
    draw_robustness(panels[0, 1], results)
    draw_distillation(panels[1, 0], results)
    draw_bounds(panels[1, 1], results)
    save(figure, args.output / "theory")
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


def draw_performance(ax, results: list[dict]):
    """eta, dashed, and zeta, with its interval, over n."""
    for method in methods_of(results):
        color = color_of(method)
        some = of_method(results, method)
        numbers = numbers_of(some)
        etas = []
        intervals = []
        for num_train in numbers:
            values = final_values(of_number(some, num_train))
            etas.append(values["eta"].mean())
            intervals.append(mean_interval(values["zeta"]))
        zetas, lows, highs = np.transpose(intervals)
        label = METHODS[method].label
        ax.plot(numbers, etas, "--", color=color)
        ax.plot(numbers, zetas, "o-", color=color, label=label, markersize=3)
        ax.fill_between(numbers, lows, highs, color=color, alpha=0.2)
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers_of(results), numbers_of(results))
    ax.set(xlabel="training renderings n", ylabel="part of the optimum")
    ax.set_title("zeta, and eta (dashed)")
    ax.legend(fontsize=7)


def draw_robustness(ax, results: list[dict]):
    """R against the gap, a point for each training."""
    for method in methods_of(results):
        values = final_values(of_method(results, method))
        color = color_of(method)
        ax.plot(values["robustness"], values["gap"], "o", color=color, markersize=3)
    ax.set(xlabel="R (definition 3.6)", ylabel="gap / optimum")
    ax.set_title("robustness and the gap")


def draw_distillation(ax, results: list[dict]):
    """mutual_kl over training, the mean of all trainings of a method."""
    for method in methods_of(results):
        curves = []
        for result in of_method(results, method):
            rows = result["rows"]
            iterations = [row["iteration"] for row in rows]
            curve = [row["losses"].get("mutual_kl", np.nan) for row in rows]
            curves.append(curve)
        ax.plot(iterations, np.mean(curves, axis=0), color=color_of(method))
    ax.set(xlabel="updates", ylabel="mutual_kl", title="distillation")


def draw_bounds(ax, results: list[dict]):
    """How far each bound on the new policy's performance is below it, over gamma, for the last update: in
    parts of r_max / (1 - gamma), the largest return that can be. At 1 and above a bound says nothing."""
    sides = {"theorem_3_2": "new_eta", "theorem_3_3": "new_zeta", "corollary_3_8": "new_zeta"}
    for bound, performance in sides.items():
        slacks = []
        for gamma in GAMMAS:
            at_gamma = []
            for result in results:
                at_gamma += result["rows"][-1]["at_gamma"][str(gamma)]
            slack = mean_of(at_gamma, performance) - mean_of(at_gamma, bound)
            slacks.append(slack * (1 - gamma))
        label = bound.replace("_", " ", 1).replace("_", ".")
        ax.plot(GAMMAS, slacks, "o-", label=label, markersize=3)
    ax.axhline(1, color="grey", linestyle=":")
    ax.set_yscale("symlog", linthresh=0.01)
    ax.set(xlabel="gamma", ylabel="slack / largest return")
    ax.set_title("the bounds, after the last update")
    ax.legend(fontsize=7)


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
    if args.quick:
        args = shortened(args)
    check_folder("--output", args.output)
    design = find_design(args)
    jobs = find_jobs(args)
    missing = []
    for job in jobs:
        if read_result(args.output / job.file_name(), design) is None:
            missing.append(job)
    print(f"trainings: {len(jobs)}, to be made: {len(missing)}", flush=True)
    run_jobs(missing, design, args)
    results = [read_result(args.output / job.file_name(), design) for job in jobs]
    table = make_table(results)
    print(table)
    write_text(args.output / "table.md", table)
    draw(args, results, design)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_tool(main, Args, __doc__)
