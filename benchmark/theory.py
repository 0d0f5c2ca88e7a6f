"""The paper's theory, measured exactly: which method generalises, and is it robustness that generalises?

Trains each method on the first n of many renderings of one MDP (renderings.py), and computes by linear solves
what the theory speaks of, on all renderings: eta, zeta and their gap, R, and both sides of its bounds. Each
training is a file in the output folder; those that are there are not made again. Then it prints tables and
draws figures of all that are there. The design below was decided by PPO alone, before any other method was
run (results/renderings_trials.md).

    python benchmark/theory.py --methods ppo mdpo --seeds 2
"""

import contextlib
import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from helpers import Count, CountOrZero, check_limits, copy_script, fail, replacing
from joblib import Parallel, delayed
from renderings import World, evaluate_bounds, optimal_values, pair_distances, policies_of, visitations
from tables import Interval, correlation_interval, difference_interval, markdown, mean_interval, star_holm
from threadpoolctl import threadpool_limits
from tqdm import tqdm


class Method(NamedTuple):
    """A way to train, by one of the scripts."""

    label: str
    script: str
    settings: dict  # beside SETTINGS, or in place of some


METHODS = {
    "ppo": Method("PPO", "ppo_procgen", {}),
    "mdpo": Method("MDPO", "mdpo_procgen", {}),
    "spo": Method("SPO", "spo_procgen", {}),
    "mdspo": Method("MDSPO", "mdspo_procgen", {}),
    "mdpo_detached": Method("MDPO, peer detached", "mdpo_procgen", {"detach_peer": True}),
    "mdpo_three": Method("MDPO, three agents", "mdpo_procgen", {"num_agents": 3}),
    "mdpo_weak": Method("MDPO, distill_coef 0.1", "mdpo_procgen", {"distill_coef": 0.1}),
    "mdpo_strong": Method("MDPO, distill_coef 10", "mdpo_procgen", {"distill_coef": 10.0}),
    "ppo_both": Method("PPO, data of two agents", "ppo_procgen", {"num_envs": 512}),
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

DESIGN = {  # what all trainings in a folder have in common, beside the number of steps
    "grid_size": 4,  # cells on a side
    "gamma": 0.8,  # after each step an episode goes on with this probability
    "num_renderings": 64,  # that there are, and on which zeta is measured
    "measurements": 8,  # updates of a training that are measured, the last among them
    "settings": SETTINGS,
}
GAMMAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)  # at which the bounds are computed for the last update

JOB = ["seed", "num_train", "method"]  # what tells a training from the others

MEASURES = {  # of an agent, and what tables and figures call them
    "eta": "eta / optimum",
    "zeta": "zeta / optimum",
    "gap": "gap / optimum",
    "robustness": "R",
    "mean_robustness": "mean R",
    "mean_train_robustness": "mean R of training",
    "entropy": "entropy (nats)",
}
ROBUSTNESS = ["robustness", "mean_robustness", "mean_train_robustness"]

BOUNDS = {  # and what each bounds
    "theorem_3_2": "new_eta",
    "theorem_3_3": "new_zeta",
    "corollary_3_8": "new_zeta",
    "theorem_3_7": "d_test",
}

MethodName = Literal[tuple(METHODS)]
Renderings = Annotated[tuple[int, ...], (1, DESIGN["num_renderings"])]


@dataclass
class Args:
    methods: tuple[MethodName, ...] = tuple(METHODS)
    """which ways to train"""
    num_train: Renderings = (2, 4, 8, 16)
    """numbers of renderings to train on, and of the tables"""
    seeds: Count = 10
    """trainings of each method on each number of renderings"""
    total_timesteps: Annotated[int, (BATCH_SIZE, 2**31 - 1)] = 400_000
    """environment steps of each agent"""
    processes: CountOrZero = 0
    """trainings at a time, 0 for one a core"""
    iteration: CountOrZero = 0
    """update before which the tables and figures show the policies, 0 for the last"""
    output: Path = Path("theory")
    """folder for the trainings, the tables and the figures"""

    def __post_init__(self):
        check_limits(self)
        if not self.methods or not self.num_train:
            raise ValueError("--methods and --num-train need a value or more")


class Job(NamedTuple):
    """A training."""

    method: str
    num_train: int
    seed: int


def find_jobs(args: Args) -> list[Job]:
    """Seed after seed, so that what has been made at any time is of all methods."""
    jobs = []
    for seed in range(1, args.seeds + 1):
        for num_train in args.num_train:
            jobs += [Job(method, num_train, seed) for method in args.methods]
    return list(dict.fromkeys(jobs))  # each once


def train(job: Job, design: dict) -> dict:
    """Returns what json can write: the job, the design, the eta of the best policy there is, and a row for
    each measured update."""
    world = World(design["grid_size"], design["gamma"], design["num_renderings"])
    num_updates = design["total_timesteps"] // BATCH_SIZE
    measured = measured_iterations(num_updates, design["measurements"])
    rows = []
    before = []

    def watch(iteration: int, agents: list, metrics: list):
        nonlocal before
        policies = []
        if iteration in measured or iteration + 1 in measured:
            policies = [policies_of(agent, world.pictures) for agent in agents]
        if iteration in measured:
            gammas = GAMMAS if iteration == num_updates else ()
            row = measure(world, job.num_train, before, policies, gammas)
            row["iteration"] = iteration
            row["losses"] = {}
            for name in metrics[0]:
                of_agents = [float(means[name]) for means in metrics]
                row["losses"][name] = sum(of_agents) / len(of_agents)
            rows.append(row)
        before = policies

    run_script(job, design, world, watch)
    best = optimal_values(world.mdp)
    optimum = float(best @ world.mdp.start)
    return {"job": job._asdict(), "design": design, "optimum": optimum, "rows": rows}


def run_script(job: Job, design: dict, world: World, watch):
    """Trains by a script's own main. watch(iteration, agents, metrics) sees the agents before the first
    update, as iteration 0 with no metrics, and after each update."""
    torch.set_num_threads(1)  # these networks are too small for more
    threadpool_limits(1)  # and so are numpy's matrices
    method = METHODS[job.method]
    settings = design["settings"] | method.settings
    batch_size = settings["num_envs"] * settings["num_steps"]
    num_updates = design["total_timesteps"] // BATCH_SIZE  # as many where the batch is larger
    script = copy_script(method.script)
    args = script.Args(
        seed=job.seed,
        num_levels=job.num_train,
        total_timesteps=num_updates * batch_size,
        eval_interval=0,
        **settings,
    )
    update = script.update
    iteration = 0

    def watched_update(loss_function, agents, *rest):
        nonlocal iteration
        if iteration == 0:
            watch(0, agents, [])
        metrics = update(loss_function, agents, *rest)
        iteration += 1
        watch(iteration, agents, metrics)
        return metrics

    script.make_envs = world.make_envs  # what one does by hand who copies a script
    script.update = watched_update
    with in_silence():
        script.main(args)


@contextlib.contextmanager
def in_silence():
    """In a folder that goes, and without a word: nobody looks on."""
    before = os.getcwd()
    nowhere = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            os.chdir(before)


def measured_iterations(number: int, measurements: int) -> list[int]:
    """Evenly spread over the iterations 1 ... number, the last among them."""
    spread = np.linspace(number / measurements, number, measurements)
    return sorted({max(1, round(each)) for each in spread})


def measure(world: World, num_train: int, before: list, after: list, gammas) -> dict:
    """Of an update, which has made the policies `after` of those `before`, (F, S, A) for each agent: a dict
    for each agent of what evaluate_bounds gives, of the robustness over the training renderings, and of the
    means over pairs of renderings where definition 3.6 has a maximum; and what evaluate_bounds gives with
    other discount factors."""
    mdp = world.mdp

    def bounds_at(gamma: float) -> list[dict]:
        problem = (mdp.transition, mdp.reward, mdp.start, gamma, world.probability, num_train)
        return [evaluate_bounds(*problem, old, new) for old, new in zip(before, after)]

    agents = bounds_at(mdp.gamma)
    for results, old in zip(agents, before):
        distances = pair_distances(visitations(mdp, old), old)
        train_distances = distances[:num_train, :num_train]
        results["train_robustness"] = float(train_distances.max())
        results["mean_robustness"] = mean_of_pairs(distances)
        results["mean_train_robustness"] = mean_of_pairs(train_distances)
    return {"agents": agents, "at_gamma": {str(gamma): bounds_at(gamma) for gamma in gammas}}


def mean_of_pairs(distances: np.ndarray) -> float:
    """Of pair_distances, (F, F), over different renderings; 0 if there is one alone."""
    number = len(distances)
    num_pairs = max(1, number * (number - 1))
    return float(distances.sum() / num_pairs)  # that of a rendering to itself is 0


def make_results(train, design: dict, args: Args) -> list[dict]:
    """Makes those of args that are missing, each in a process, and writes each when it is there. Returns all
    that are in the folder."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {args.output}: {error.strerror}")
    jobs = find_jobs(args)
    made = [Job(**result["job"]) for result in read_results(args.output, design)]
    missing = [job for job in jobs if job not in made]
    print(f"trainings: {len(jobs)}, to be made: {len(missing)}", flush=True)
    pool = Parallel(args.processes or -1, return_as="generator_unordered")
    results = pool(delayed(train)(job, design) for job in missing)
    for result in tqdm(results, total=len(missing), unit="training", disable=None):
        name = "{method}__{num_train}__{seed}.json".format(**result["job"])
        write_text(args.output / name, json.dumps(result))
    return read_results(args.output, design)


def write_text(path: Path, text: str):
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_results(folder: Path, design: dict) -> list[dict]:
    """Of all trainings in the folder, in the order of METHODS."""
    results = [read_result(path, design) for path in folder.glob("[!.]*__*__*.json")]
    return sorted(results, key=place_of)


def place_of(result: dict) -> tuple:
    """For sorting."""
    method, num_train, seed = Job(**result["job"])
    return list(METHODS).index(method), num_train, seed


def read_result(path: Path, design: dict) -> dict:
    """That of a training. Ends the process if it is another kind of file, or of another design."""
    try:
        result = json.loads(path.read_text())
        found = dict(result["design"])
    except (ValueError, KeyError, TypeError):
        fail(f"--output: {path} is damaged, or another kind of file")
    wanted = json.loads(json.dumps(design))
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            was = f"{name} {found.get(name)}, not {wanted.get(name)}"
            fail(f"--output: {path} is of a training with {was}; another --output would do")
    return result


def agents_of(results: list[dict]) -> pd.DataFrame:
    """A row for each agent before each update that was measured: what `measure` gives, with eta, zeta and
    their gap in parts of the optimum, and the mean entropy of its training's policies in the update."""
    rows = []
    for result in results:
        for row in result["rows"]:
            of_all = result["job"] | {"optimum": result["optimum"], "iteration": row["iteration"]}
            of_all["entropy"] = row["losses"]["entropy"]
            rows += [of_all | agent for agent in row["agents"]]
    agents = pd.DataFrame(rows)
    agents["eta"] /= agents["optimum"]
    agents["zeta"] /= agents["optimum"]
    agents["gap"] = agents["eta"] - agents["zeta"]
    return agents


def make_tables(agents: pd.DataFrame, results: list[dict]) -> str:
    """Markdown, with 95 % intervals over trainings: each method on each number of renderings, how far it is
    from PPO, and how robustness goes with the gap. `agents` are those of one update."""
    groups = groups_of(agents)
    text = f"## What each method reached\n\n{method_table(groups)}\n"
    for baseline in ("ppo", "ppo_both"):
        text += f"## Difference from {METHODS[baseline].label}\n\n{difference_table(groups, baseline)}\n"
    text += f"## Rank correlation\n\n{correlation_table(agents)}\n"
    return f"{text}## The bounds after the last update\n\n{bound_table(results)}"


def groups_of(agents: pd.DataFrame) -> dict:
    """{(method, n): a row for each training}, with the MEASURES as columns. The agents of a training are not
    independent: their mean counts."""
    groups = {}
    for method, rows in agents.groupby("method", sort=False):
        trainings = rows.groupby(["num_train", "seed"])[list(MEASURES)].mean()
        for num_train, group in trainings.groupby("num_train"):
            groups[method, num_train] = group.droplevel("num_train")
    return groups


def method_table(groups: dict) -> str:
    rows = [["method", "n", "trainings", *MEASURES.values()]]
    for (method, num_train), trainings in groups.items():
        row = [METHODS[method].label, str(num_train), str(len(trainings))]
        row += [str(mean_interval(trainings[name].to_numpy())) for name in MEASURES]
        rows.append(row)
    return markdown(rows)


def difference_table(groups: dict, baseline: str) -> str:
    """Of each method, on each n and of the mean over those n that the baseline has, too. Holm corrects over
    the n of a method."""
    rows = [["method", "n", *MEASURES.values()]]
    for method in dict.fromkeys(method for method, _ in groups):
        numbers = [number for each, number in groups if each == method and (baseline, number) in groups]
        if method == baseline or not numbers:
            continue
        pairs = [(groups[method, number], groups[baseline, number]) for number in numbers]
        by_number = {name: [difference(name, pair) for pair in pairs] for name in MEASURES}
        starred = zip(*(star_holm(intervals) for intervals in by_number.values()))
        label = METHODS[method].label
        rows += [[label, str(number), *cells] for number, cells in zip(numbers, starred)]
        if len(numbers) > 1:
            rows.append([label, "mean", *(str(difference(name, *pairs)) for name in MEASURES)])
    return markdown(rows)


def difference(name: str, *pairs: tuple[pd.DataFrame, pd.DataFrame]) -> Interval:
    """Of a measure, on one n or of the mean over several."""
    return difference_interval(*((ours[name].to_numpy(), theirs[name].to_numpy()) for ours, theirs in pairs))


def correlation_table(agents: pd.DataFrame) -> str:
    """A point for each agent."""
    groups = {"all": agents} | dict(list(agents.groupby("num_train")))
    rows = [["n", "trainings", "", "gap", "gap, within methods", "zeta"]]
    for label, group in groups.items():
        group = group.sort_values(JOB, kind="stable", ignore_index=True)  # the bootstrap's order
        for name in ROBUSTNESS:
            intervals = [
                correlation_interval(group, (name, "gap"), JOB),
                correlation_interval(group, (name, "gap"), JOB, ["method", "num_train"]),
                correlation_interval(group, (name, "zeta"), JOB),
            ]
            number = str(group.groupby(JOB).ngroups)
            rows.append([str(label), number, MEASURES[name], *map(str, intervals)])
    return markdown(rows)


def bound_table(results: list[dict]) -> str:
    """Each bound in parts of what it bounds, of the means over all agents after the last update: 1 is tight,
    and below 0 it says nothing, since no return is negative. Theorem 3.7 is an upper bound of D_test."""
    agents = []
    for result in results:
        for gamma, of_gamma in result["rows"][-1]["at_gamma"].items():
            agents += [agent | {"gamma": float(gamma)} for agent in of_gamma]
    means = pd.DataFrame(agents).groupby("gamma").mean()
    rows = [["gamma", *(name.replace("_", " ", 1).replace("_", ".") for name in BOUNDS)]]
    for gamma, mean in means.iterrows():
        rows.append([str(gamma), *(f"{mean[name] / mean[bounded]:.2f}" for name, bounded in BOUNDS.items())])
    return markdown(rows)


def draw(folder: Path, agents: pd.DataFrame, design: dict):
    """performance and renderings, each as .pdf and .png."""
    plt.rcParams.update({"font.size": 9, "pdf.fonttype": 42})
    save(draw_performance(agents), folder / "performance")
    save(draw_renderings(design), folder / "renderings")


def save(figure, path: Path):
    for suffix in (".pdf", ".png"):
        with replacing(path.with_suffix(suffix)) as unfinished:
            figure.savefig(unfinished, dpi=150)
    plt.close(figure)


def style_of(method: str) -> dict:
    """The same in all panels."""
    return {"color": f"C{list(METHODS).index(method)}", "label": METHODS[method].label}


def draw_performance(agents: pd.DataFrame):
    """zeta and gap over n, and the gap against R and mean R."""
    figure, panels = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
    for ax, name in zip(panels[0], ["zeta", "gap"]):
        draw_over_number(ax, groups_of(agents), name)
    for ax, name in zip(panels[1], ["robustness", "mean_robustness"]):
        draw_against_gap(ax, agents, name)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_over_number(ax, groups: dict, name: str):
    """A measure, with its interval, over n, of the methods that were trained on several."""
    for method in dict.fromkeys(method for method, _ in groups):
        numbers = [number for each, number in groups if each == method]
        if len(numbers) > 1:
            intervals = [mean_interval(groups[method, number][name].to_numpy()) for number in numbers]
            middles, lows, highs, _ = zip(*intervals)
            style = style_of(method)
            ax.plot(numbers, middles, "o-", markersize=3, **style)
            ax.fill_between(numbers, lows, highs, alpha=0.2, linewidth=0, **style)
    numbers = sorted({number for _, number in groups})
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers, numbers)
    ax.minorticks_off()
    ax.set_ylim(-0.05, 1.05)  # however wide the band of a few trainings
    ax.set(xlabel="training renderings n", ylabel=MEASURES[name])


def draw_against_gap(ax, agents: pd.DataFrame, name: str):
    """The gap against a measure of robustness, a point for each agent; the more renderings it was trained
    on, the larger."""
    for method, group in agents.groupby("method", sort=False):
        sizes = 5 * group["num_train"]  # areas
        style = style_of(method)
        ax.scatter(group[name], group["gap"], sizes, alpha=0.6, linewidths=0, **style)
    ax.set(xlabel=MEASURES[name], ylabel=MEASURES["gap"])


def draw_renderings(design: dict):
    """One state under the first renderings."""
    world = World(design["grid_size"], design["gamma"], num_renderings=8)
    state = len(world.mdp.start) // 3
    figure, axes = plt.subplots(1, 8, figsize=(8, 1.1), layout="constrained")
    for ax, pictures in zip(axes, world.pictures):
        ax.imshow(pictures[state], interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    return figure


def main(args: Args):
    design = DESIGN | {"total_timesteps": args.total_timesteps}
    measured = measured_iterations(args.total_timesteps // BATCH_SIZE, design["measurements"])
    iteration = args.iteration or measured[-1]
    if iteration not in measured:
        fail(f"--iteration must be one of {measured}")
    results = make_results(train, design, args)
    agents = agents_of(results)
    last = agents[(agents.iteration == iteration) & agents.num_train.isin(args.num_train)]
    tables = make_tables(last, results)
    print(tables)
    write_text(args.output / "tables.md", tables)
    draw(args.output, last, design)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
