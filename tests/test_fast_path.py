"""What makes the scripts fast changes no result: lower precision, compilation, graphs, buffers.

The fast path of a GPU runs on an imitation of torch.cuda. What only a GPU can show is in the tests at the
end, which skip without one and which benchmark/gpu_check.sh runs.
"""

import gc
import importlib
import os
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import imitation
import numpy as np
import pytest
import torch
from algorithm import CPU, make_small_probes, minibatch_step, parameters_of
from common import (
    MUTUAL,
    ROOT,
    SINGLE,
    TINY,
    get_handlers,
    load_agent,
    make_agents,
    make_batch,
    make_probes,
    read_curves,
    run_folder,
    set_handlers,
)
from procgen import ProcgenGym3Env
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchDynamoException

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
TWO_SCRIPTS = [SINGLE[0], MUTUAL[0]]
OFF = {"bf16": False, "compile": False, "cudagraphs": False}
# One iteration has 6 minibatches of 64 and a test: the first three warm up, the others replay a graph.
SETTINGS = TINY | {"num_envs": 8, "eval_interval": 1, "total_timesteps": 256}
BATCH_SIZE = 128


@pytest.fixture
def name():
    return TWO_SCRIPTS[0]


@pytest.fixture
def two(name):
    """The single-agent and the mutual script, where a test asks for both, otherwise the first."""
    return importlib.import_module(name)


both = pytest.mark.parametrize("name", TWO_SCRIPTS)


@pytest.fixture(autouse=True)
def compile_anew():
    """torch.compile stops at eight kinds of agents for one function, over all tests."""
    yield
    torch._dynamo.reset()


def train(script, folder, make_envs=make_small_probes, **settings):
    """A run on the probe, in this process. Returns its folder."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "make_envs", make_envs)
        script.main(script.Args(**SETTINGS | settings))
    return run_folder(folder)


def agent_files(run_dir) -> list:
    return sorted(run_dir.glob("**/agent.pt"))


def weights_of(run_dir) -> list[dict]:
    return [load_agent(path)["agent"] for path in agent_files(run_dir)]


def curves_of(run_dir) -> list[dict]:
    """Those of each agent, without the one that depends on the clock."""
    curves = []
    for path in agent_files(run_dir):
        of_agent = read_curves(path.parent)
        del of_agent["charts/SPS"]
        curves.append(of_agent)
    return curves


def assert_same_run(one, other):
    """To float32's last bits, of which the compiler may change some: a step more, a step less, or another
    order of minibatches or actions would show in the third digit."""
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves_of(one), curves_of(other), rtol=1e-3, atol=1e-4)


# The fast path of CUDA, in imitation


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    """Run folders without the fast path, by script and settings."""
    made = {}

    def plain_run(script, **settings):
        key = (script.__name__, *settings.items())
        if key not in made:
            made[key] = train(script, tmp_path_factory.mktemp("plain"), **OFF | settings)
        return made[key]

    return plain_run


@pytest.mark.parametrize(
    ("name", "settings", "num_graphs"),  # of the step; and of each policy, for a rollout and for a test
    [
        (SINGLE[0], {}, 3),
        (SINGLE[0], {"compile": False}, 3),
        (MUTUAL[0], {"compile": False}, 5),
        (MUTUAL[0], {"compile": False, "num_agents": 3}, 7),
        pytest.param(MUTUAL[0], {}, 5, marks=pytest.mark.slow),
        pytest.param(SINGLE[0], {"cudagraphs": False}, 0, marks=pytest.mark.slow),
        pytest.param(MUTUAL[0], {"cudagraphs": False}, 0, marks=pytest.mark.slow),
    ],
)
def test_graphs_and_compilation_change_no_result(two, settings, num_graphs, plain_runs, tmp_path):
    """With tests in the middle of the run, which have graphs of their own."""
    with imitation.fast_path_of_cuda(two):
        fast = train(two, tmp_path, **settings)
    assert imitation.Graph.made == num_graphs
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled == settings.get("compile", True)
    reference = {name: value for name, value in settings.items() if name == "num_agents"}
    assert_same_run(fast, plain_runs(two, **reference))


@both
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_with_graphs_stops_and_goes_on(two, compile, plain_runs, tmp_path):
    """They are captured anew, and Adam's moments come back into the weights' memory layout."""
    with imitation.fast_path_of_cuda(two):
        half = train(two, tmp_path, compile=compile, total_timesteps=BATCH_SIZE)
    with imitation.fast_path_of_cuda(two):
        train(two, tmp_path, compile=compile, resume=str(half))
    assert imitation.Graph.made > 0
    assert_same_run(half, plain_runs(two))


@both
@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_channels_last_on_cuda(two, bf16, tmp_path, monkeypatch):
    """As the observations are: otherwise cuDNN would convert one or the other in every step."""
    monkeypatch.setattr(two, "make_envs", make_small_probes)
    args = two.Args(**SETTINGS)
    agents, optimizer, runners = two.set_up(args, tmp_path, CPU)
    with imitation.fast_path_of_cuda(two, bf16=bf16):
        players, _, _ = two.speed_up(args, agents, optimizer, runners, CPU, tmp_path)
    for runner in runners:
        runner.close()
    kernels = [weight for weight in parameters_of([*agents, *players]) if weight.dim() == 4]
    assert len(kernels) >= 15
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert all(agent.bf16 == bf16 for agent in agents)


def test_an_error_before_the_capture_switches_graphs_off(two, plain_runs, tmp_path, monkeypatch, capsys):
    """One line says so, and the run goes on to the same end."""

    def no_stream(stream):
        raise RuntimeError("no stream is left\nand more that nobody reads")

    with imitation.fast_path_of_cuda(two):
        monkeypatch.setattr(torch.cuda, "stream", no_stream)
        run_dir = train(two, tmp_path, compile=False)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "CUDA graphs" in line]
    assert set(said) == {"CUDA graphs are off: no stream is left"}
    assert imitation.Graph.made == 0
    assert_same_run(run_dir, plain_runs(two))


def test_an_error_in_a_capture_ends_the_run(two, plain_runs, tmp_path, monkeypatch):
    """The process may not get over it: the failure says how to go on, and that works."""
    rl_loss = two.rl_loss

    def reading_its_result(*inputs):
        loss, metrics = rl_loss(*inputs)
        assert loss.item() < 100
        return loss, metrics

    monkeypatch.setattr(two, "rl_loss", reading_its_result)
    message = ""
    with imitation.fast_path_of_cuda(two):
        try:
            train(two, tmp_path, compile=False)
        except two.Failure as failure:
            message = str(failure)
    gc.collect()  # what it ended in the middle of, and with that the lock of the run folder
    run_dir = run_folder(tmp_path)
    assert "not permitted when stream is capturing" in message
    assert message.endswith(f"; --resume {run_dir.relative_to(tmp_path)} --no-cudagraphs would do")
    with imitation.fast_path_of_cuda(two):
        train(two, tmp_path, resume=str(run_dir), compile=False, cudagraphs=False)
    assert_same_run(run_dir, plain_runs(two))


class Counting:
    """Counts its calls in memory that is there before, and draws a number."""

    def __init__(self):
        self.state = torch.zeros(3)

    def __call__(self, x):
        self.state += 1
        result = x + self.state[0] + torch.rand(())
        return result, result.sum()


def test_a_graph_is_captured_without_traces(two, tmp_path):
    """What the function changes and the generator are as if it had run only when called, for each shape; and
    the results are copies, which the next call leaves alone."""
    sizes = [4, 4, 2, 4, 2, 4, 4, 2, 2, 2]
    inputs = [torch.full((size,), float(value)) for value, size in enumerate(sizes)]
    plain = Counting()
    torch.manual_seed(0)
    expected = [plain(x) for x in inputs]
    graphed = Counting()
    torch.manual_seed(0)
    with imitation.fast_path_of_cuda(two):
        graph = two.CudaGraph(graphed, tmp_path)
        results = [graph(x) for x in inputs]
    assert imitation.Graph.made == 2
    assert torch.equal(graphed.state, plain.state)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def assert_a_graph_sees_another_learning_rate(script, num: int, device):
    agents = [agent.to(device) for agent in make_agents(script, num)]
    batches = []
    for seed in range(num):
        batches.append(script.Batch(*(column.to(device) for column in make_batch(script, 32, seed))))
    lr = torch.tensor(1e-3, device=device)
    capturable = device.type == "cuda"
    optimizer = torch.optim.Adam(parameters_of(agents), lr=lr, fused=True, capturable=capturable)

    def step(mb_inds):
        return minibatch_step(script, agents, optimizer, batches, script.Args(), mb_inds)

    graph = script.CudaGraph(step, ROOT)
    moved = []
    for rate in (1e-3, 1e-3, 1e-3, 1e-3, 0.0, 1e-3):  # the first three warm up
        lr.fill_(rate)
        before = [weight.detach().clone() for weight in parameters_of(agents)]
        graph(torch.randperm(32, device=device)[:16])
        moved.append(any(not torch.equal(*pair) for pair in zip(before, parameters_of(agents))))
    assert moved == [True, True, True, True, False, True]


@both
def test_a_graph_sees_another_learning_rate(two):
    num = 1 if two.__name__ in SINGLE else 2
    with imitation.fast_path_of_cuda(two):
        assert_a_graph_sees_another_learning_rate(two, num, CPU)
    assert imitation.Graph.made == 1


@pytest.mark.parametrize("method", ["item", "cpu", "numpy", "nonzero", "__bool__"])
def test_the_imitation_refuses_what_cuda_refuses(two, method, tmp_path):
    """Reading numbers in a capture: after the warm-up calls, which may do so."""

    def reading(x):
        getattr(x, method)()
        return (x,)

    with imitation.fast_path_of_cuda(two):
        graph = two.CudaGraph(reading, tmp_path)
        for _ in range(3):
            graph(torch.ones(1))
        with pytest.raises(two.Failure, match="not permitted"):
            graph(torch.ones(1))


# torch.compile


def broken_compiler(graph, inputs):
    raise RuntimeError("there is no compiler")


def unchanged(graph, inputs):
    return graph


@pytest.mark.parametrize(
    "backend",
    [broken_compiler, aot_autograd(fw_compiler=unchanged, bw_compiler=broken_compiler)],
    ids=["forward", "backward"],
)
def test_without_a_compiler_the_run_goes_on(two, backend, plain_runs, tmp_path, capsys):
    with imitation.fast_path_of_cuda(two, backend):
        run_dir = train(two, tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line]
    assert len(said) == 1
    assert said[0].startswith("torch.compile is off: ")
    assert "there is no compiler" in said[0]
    assert_same_run(run_dir, plain_runs(two))


def test_a_loss_that_does_not_compile_ends_the_run(two, tmp_path):
    """Where a small function has compiled: it is no reason to go on without graphs."""

    def compile_small_graphs(graph, inputs):
        if len(graph.graph.nodes) > 10:
            raise RuntimeError("too large\nand more that nobody reads")
        return graph

    with imitation.fast_path_of_cuda(two, compile_small_graphs), pytest.raises(TorchDynamoException):
        train(two, tmp_path)


def test_what_does_not_compile_is_said(two, monkeypatch, capsys):
    def fail(*inputs):
        raise TorchDynamoException("backend='inductor' raised:\nno such kernel\nand more that nobody reads")

    monkeypatch.setattr(two, "parse_args", lambda: None)
    monkeypatch.setattr(two, "main", fail)
    handlers = get_handlers()
    with pytest.raises(SystemExit) as stop:
        two.run_or_say_why()
    set_handlers(handlers)
    assert stop.value.code == 2
    line = "error: torch.compile failed: backend='inductor' raised: no such kernel; --no-compile would do\n"
    assert capsys.readouterr().err == f"{two.__name__}.py: {line}"


@pytest.mark.parametrize("calls", [0, 3], ids=["warm-up", "capture"])
def test_out_of_memory_in_a_graph(two, calls, tmp_path):
    """It is no reason to go on without graphs."""
    results = [(torch.ones(1),)] * calls

    def step(x):
        if not results:
            raise torch.OutOfMemoryError("there is no more")
        return results.pop()

    with imitation.fast_path_of_cuda(two):
        graph = two.CudaGraph(step, tmp_path)
        for _ in range(calls):
            graph(torch.ones(1))
        with pytest.raises(torch.OutOfMemoryError):
            graph(torch.ones(1))


@pytest.mark.parametrize("threads", [None, "7"])
def test_inductor_starts_as_many_workers_as_there_are_cores(two, threads, monkeypatch):
    """Unless the user says how many."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    monkeypatch.setenv(name, "7")  # so that it is as before in the end
    if threads is None:
        monkeypatch.delenv(name)
    with imitation.fast_path_of_cuda(two):
        assert two.can_compile(CPU)
    assert os.environ[name] == (threads or str(two.available_cores()))


@both
def test_the_loss_compiles_as_one_graph(two):
    """With bfloat16 inside, and no break."""
    num = 1 if two.__name__ in SINGLE else 2
    agents = make_agents(two, num)
    mbs = [make_batch(two, 8, seed) for seed in range(num)]
    for agent in agents:
        agent.bf16 = True
    compiled = torch.compile(two.compute_loss, fullgraph=True, backend="eager")
    args = two.Args()
    result = compiled(agents, mbs, args)
    torch.testing.assert_close(result, two.compute_loss(agents, mbs, args), rtol=0.02, atol=0.01)


# Precision


@pytest.fixture
def fast_bf16(two, monkeypatch):
    """On any processor, be it emulated."""
    monkeypatch.setattr(two, "has_fast_bf16", lambda device: True)


@both
@pytest.mark.parametrize("bf16", [True, False])
def test_rollouts_are_of_the_newest_weights(two, bf16, fast_bf16, tmp_path):
    """With one minibatch and one epoch the ratio of an update is 1, in each iteration, whatever the steps
    before."""
    settings = {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 0.01, "bf16": bf16}
    run_dir = train(two, tmp_path, total_timesteps=6 * BATCH_SIZE, eval_interval=0, **settings)
    for curves in curves_of(run_dir):
        deviations = list(curves["losses/ratio_deviation"].values())
        assert len(deviations) == 6
        assert max(deviations) < (0.02 if bf16 else 1e-5)
        assert curves["losses/entropy"][6 * BATCH_SIZE] < 2.6  # so the policy has moved, from ln 15 = 2.71


def first_weights(script):
    args = script.Args(**SETTINGS)
    torch.manual_seed(args.seed)
    num = 1 if script.__name__ in SINGLE else 2
    agents = [script.Agent(channels=args.channels, obs_shape=(16, 16, 3)) for _ in range(num)]
    return [agent.state_dict() for agent in agents]


def direction(weights, before) -> torch.Tensor:
    """The unit vector along which all weights moved."""
    moves = [after[name] - each[name] for after, each in zip(weights, before) for name in each]
    moved = torch.cat([move.flatten() for move in moves])
    return moved / moved.norm()


def assert_same_update(fast, reference, before):
    """The losses of the first update, and the way that the weights went. bfloat16 keeps 8 bits, so that
    losses agree to a few hundredths. Adam's first steps are the sign of the gradient, and where that is next
    to nothing the sign is rounding: the ways agree to a cosine, not to the bit."""
    for ours, theirs in zip(curves_of(fast), curves_of(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for tag in ours:
            if tag.startswith("losses/"):
                first = min(ours[tag])
                assert ours[tag][first] == pytest.approx(theirs[tag][first], rel=0.1, abs=0.03), tag
    cosine = direction(weights_of(fast), before) @ direction(weights_of(reference), before)
    assert cosine > 0.95


ONE_ITERATION = {"total_timesteps": BATCH_SIZE, "eval_interval": 0}


@pytest.mark.parametrize(
    "name", [*TWO_SCRIPTS, *(pytest.param(name, marks=pytest.mark.slow) for name in (SINGLE[1], MUTUAL[1]))]
)
def test_bf16_computes_the_same(two, fast_bf16, tmp_path):
    fast = train(two, tmp_path / "fast", **ONE_ITERATION)
    reference = train(two, tmp_path / "reference", **ONE_ITERATION | OFF)
    assert_same_update(fast, reference, first_weights(two))
    assert curves_of(fast) != curves_of(reference)


@both
def test_where_bf16_is_not_fast_there_is_none(two, tmp_path, monkeypatch):
    """The very same computation as without."""
    monkeypatch.setattr(two, "has_fast_bf16", lambda device: False)
    asked = train(two, tmp_path / "asked", **ONE_ITERATION)
    reference = train(two, tmp_path / "reference", **ONE_ITERATION | OFF)
    assert curves_of(asked) == curves_of(reference)


@pytest.mark.parametrize("emulated", [True, False])
def test_emulated_bf16_of_a_card_is_not_fast(two, emulated, monkeypatch):
    """Cards before Ampere say that they have bfloat16, and mean that they emulate it."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert two.has_fast_bf16(SimpleNamespace(type="cuda")) == (not emulated)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ONEDNN_MAX_CPU_ISA", "SSE41")])
def test_onednn_says_whether_bf16_is_fast(setting):
    """Whatever the processor has, if oneDNN may not use it."""
    program = "import torch, ppo_procgen as p; print(p.has_fast_bf16(torch.device('cpu')))"
    environment = os.environ | dict([setting])
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout == "False\n"


@both
def test_precision_may_change_when_a_run_goes_on(two, fast_bf16, tmp_path, capsys):
    straight = train(two, tmp_path / "straight", bf16=False)
    run_dir = train(two, tmp_path / "changing", bf16=False, total_timesteps=BATCH_SIZE)
    capsys.readouterr()
    train(two, tmp_path / "changing", bf16=True, resume=str(run_dir))
    assert "--bf16 True, was False" in capsys.readouterr().out
    cosine = direction(weights_of(run_dir), first_weights(two)) @ direction(
        weights_of(straight), first_weights(two)
    )
    assert 0.95 < cosine < 1


@both
def test_moments_come_back_into_the_layout_of_their_weights(two):
    """The fused Adam does not look at strides on the CPU: a step after a checkpoint is that of a run that
    went on, for weights in channels_last, too."""
    gradients = [torch.randn(weight.shape) for weight in two.Agent(channels=(4, 4, 4)).parameters()]

    def step(agent, optimizer):
        for weight, gradient in zip(agent.parameters(), gradients):
            weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()

    agents = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        (agent,) = make_agents(two, 1)
        agents.append(agent.to(memory_format=memory_format))
    straight, resumed = (torch.optim.Adam(agent.parameters(), lr=0.01, fused=True) for agent in agents)
    step(agents[0], straight)
    agents[1].load_state_dict(agents[0].state_dict())
    two.load_optimizer(resumed, deepcopy(straight.state_dict()["state"]))
    gradients = [-2 * gradient for gradient in gradients]
    step(agents[0], straight)
    step(agents[1], resumed)
    for one, other in zip(*(agent.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(one, other)


# Devices and environments


@pytest.mark.parametrize(("given", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_device_is_chosen_by_its_number(two, monkeypatch, given, index):
    """torch.cuda.set_device takes no device without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert two.find_device(given) == torch.device("cuda", index)
    assert two.find_device("cpu") == CPU


def test_buffers_change_no_observation(two):
    args = two.Args(env_id="starpilot", device="cpu")
    options = {"num_levels": 3, "start_level": 0, "rand_seed": 7, "distribution_mode": "hard"}
    ours = two.make_envs(args, 4, 3, 0, 7)
    plain = ProcgenGym3Env(4, "starpilot", **options)
    generator = np.random.default_rng(0)
    buffers = set()
    for _ in range(30):
        reward, obs, first = ours.observe()
        expected_reward, expected_obs, expected_first = plain.observe()
        np.testing.assert_array_equal(reward, expected_reward)
        np.testing.assert_array_equal(first, expected_first)
        np.testing.assert_array_equal(obs["rgb"], expected_obs["rgb"])
        buffers.add(obs["rgb"].ctypes.data)
        actions = generator.integers(15, size=4, dtype=np.int32)
        ours.act(actions)
        plain.act(actions)
    assert len(buffers) == 1
    ours.close()
    plain.close()


# On a GPU


@needs_cuda
@both
@pytest.mark.parametrize("switches", [{}, {"compile": False}, {"cudagraphs": False}, {"bf16": False}])
def test_cuda_computes_the_same(two, tmp_path, switches):
    """With everything on, and with each switch alone off."""
    settings = ONE_ITERATION | {"device": "cuda", "num_envs": 16, "total_timesteps": 256}
    fast = train(two, tmp_path / "fast", **settings | switches)
    reference = train(two, tmp_path / "reference", **settings | OFF)
    assert_same_update(fast, reference, first_weights(two))


@needs_cuda
@both
def test_cuda_stops_and_goes_on(two, tmp_path):
    """Graphs are captured anew after a stop, and tests in the middle leave them as they are."""
    settings = {"device": "cuda", "torch_deterministic": True, "num_envs": 16}
    straight = train(two, tmp_path / "straight", total_timesteps=1024, **settings)
    half = train(two, tmp_path / "half", total_timesteps=512, **settings)
    train(two, tmp_path / "half", total_timesteps=1024, resume=str(half), **settings)
    for ours, theirs in zip(curves_of(half), curves_of(straight), strict=True):
        for tag in theirs:
            if tag.startswith("losses/"):
                assert ours[tag] == pytest.approx(theirs[tag], rel=0.1, abs=0.03), tag


@needs_cuda
@both
def test_cuda_graphs_see_another_learning_rate(two):
    num = 1 if two.__name__ in SINGLE else 2
    assert_a_graph_sees_another_learning_rate(two, num, torch.device("cuda"))


@needs_cuda
def test_cuda_with_pictures_of_procgen_size(two, tmp_path):
    run_dir = train(two, tmp_path, make_probes, device="cuda", num_envs=16)
    assert (run_dir / "final_test.json").exists()
