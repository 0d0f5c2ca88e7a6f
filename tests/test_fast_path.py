"""What makes the scripts fast changes no result: lower precision, compilation, graphs.

The fast path of a GPU runs on the CPU here, without its kernels. What only a GPU can show is in the tests at
the end, which skip without one and which benchmark/gpu_check.py runs.
"""

import importlib
import time
from contextlib import contextmanager
from types import SimpleNamespace

import common
import pytest
import torch
from algorithm import CPU, agents_and_batches, make_small_probes, parameters_of
from common import BOTH, SINGLE, TINY, agent_folders, load, make_agents, read_curves
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

# An iteration has 6 minibatches of 64, and a test after it.
SETTINGS = TINY | {"num_envs": 8, "eval_interval": 1, "total_timesteps": 256}
BATCH_SIZE = 128
ONE_ITERATION = {"total_timesteps": BATCH_SIZE, "eval_interval": 0}


@pytest.fixture(params=BOTH)
def two(request, monkeypatch):
    """The script of one agent and that of several, on the probe."""
    script = importlib.import_module(request.param)
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    return script


@pytest.fixture
def single(monkeypatch):
    """Alone, for what all scripts share."""
    script = importlib.import_module("ppo_procgen")
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    return script


@pytest.fixture(autouse=True)
def compile_anew():
    """Each test its own agents."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(script, folder, **settings):
    """A run in this process. Returns its folder."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script.main(script.Args(**SETTINGS | settings))
    return common.run_folder(folder)


def weights_of(run_dir) -> list[dict]:
    return [load(path)["agent"] for path in sorted(run_dir.glob("**/agent.pt"))]


def curves_of(script, run_dir) -> list[dict]:
    """Those of each agent, without the one that depends on the clock."""
    curves = []
    for folder in agent_folders(script.__name__, run_dir):
        curves.append(read_curves(folder))
        del curves[-1]["charts/SPS"]
    return curves


# The fast path of CUDA, in imitation


@contextmanager
def imitation_of_cuda(script, backend="aot_eager"):
    """Runs of the script compile as for a GPU, on the CPU. Where a GPU would replay a graph the next call
    overwrites the results of the last, whosever they are. No random number is used up by compiling."""
    speed_up = script.speed_up
    compile_with = torch.compile
    results = []

    def compile_here(function, mode=None, dynamic=None):
        compiled = compile_with(function, backend=backend, dynamic=dynamic, fullgraph=True)

        def replay(*inputs):
            for result in results:
                result.fill_(-1)
            results[:] = compiled(*inputs)
            return tuple(results)

        return replay if mode == "reduce-overhead" else compiled

    def speed_up_for_cuda(args, agents, runners, device):
        with torch.random.fork_rng([]):
            return speed_up(args, agents, runners, SimpleNamespace(type="cuda"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_here)
        patch.setattr(script, "speed_up", speed_up_for_cuda)
        yield


def assert_same_run(script, one, other):
    """To float32's last bits, of which the compiler may change some: a step more, a step less, or another
    order of minibatches or actions would show in the third digit."""
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=1e-4, atol=1e-5)
    curves = curves_of(script, other)
    torch.testing.assert_close(curves_of(script, one), curves, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings", "num_graphs"),  # of the loss, and of acting for each size of a group or test
    [
        ("ppo_procgen", {"num_envs": 9, "total_timesteps": 288}, 1 + 4),
        ("mdpo_procgen", {"num_eval_envs": 8}, 1 + 2),
    ],
)
def test_compilation_changes_no_result(name, settings, num_graphs, tmp_path, monkeypatch, capsys):
    """All of it happens before the first iteration, each function is one graph, the agents share theirs, and
    nothing is compiled anew later. With --no-compile nothing is compiled."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "make_envs", make_small_probes)
    rollout = script.rollout
    at_rollouts = []

    def count_graphs(*inputs):
        at_rollouts.append(counters["stats"]["unique_graphs"])
        return rollout(*inputs)

    monkeypatch.setattr(script, "rollout", count_graphs)
    with imitation_of_cuda(script):
        plain = train(script, tmp_path / "plain", compile=False, **settings)
        fast = train(script, tmp_path / "fast", **settings)
    assert "torch.compile is off" not in capsys.readouterr().out
    assert at_rollouts == [0] * 2 + [num_graphs] * 2
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert_same_run(script, fast, plain)


def test_many_agents_act_by_one_graph_for_each_size(two):
    """torch.compile gives up, in silence, after eight for one function. And nobody waits for a backward pass,
    or the results of the last call would never be overwritten."""

    def unchanged(graph, inputs):
        return graph

    def refuse(graph, inputs):
        raise RuntimeError("a forward pass with a backward pass to come")

    backend = aot_autograd(fw_compiler=refuse, bw_compiler=refuse, inference_compiler=unchanged)
    act = torch.compile(two.act, fullgraph=True, dynamic=False, backend=backend)
    agents = [two.Agent(channels=(4, 4, 4), obs_shape=(8, 8, 3)) for _ in range(16)]
    for size in (2, 3, 4):
        for agent in agents:
            act(agent, torch.zeros(size, 8, 8, 3, dtype=torch.uint8))
    assert counters["stats"]["unique_graphs"] == 3


def broken_compiler(graph, inputs):
    raise RuntimeError("there is no\ncompiler")


@pytest.mark.parametrize(
    "backend",
    [broken_compiler, aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken_compiler)],
    ids=["forward", "backward"],
)
def test_without_a_compiler_the_run_goes_on(single, backend, tmp_path, capsys):
    """One line says so, with the cause, and the weights are those of a run without."""
    with imitation_of_cuda(single, backend):
        run_dir = train(single, tmp_path / "broken", **ONE_ITERATION)
    said = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
    assert len(said) == 1
    assert said[0].startswith("torch.compile is off: ")
    assert r"there is no\ncompiler" in said[0]
    plain = train(single, tmp_path / "plain", **ONE_ITERATION)
    assert common.same(weights_of(run_dir), weights_of(plain))


def test_what_fails_with_a_graph_fails_at_the_start(single, tmp_path, monkeypatch, capsys):
    """The first call of an agent in one size only compiles, the second records a graph, and the third is what
    all others are like."""
    calls = {}

    def break_at_third(agent, obs):
        key = (id(agent), len(obs))
        calls[key] = calls.get(key, 0) + 1
        if calls[key] == 3:
            raise RuntimeError("no memory for a graph")
        return single.act(agent, obs)

    def compile_nothing(function, mode=None, dynamic=None):
        return break_at_third if mode == "reduce-overhead" else function

    with imitation_of_cuda(single):
        monkeypatch.setattr(torch, "compile", compile_nothing)
        train(single, tmp_path, **ONE_ITERATION)
    assert "torch.compile is off: RuntimeError('no memory for a graph')" in capsys.readouterr().out
    assert sum(calls.values()) >= 3


# Precision


def set_speed(script, monkeypatch, seconds, bf16_seconds):
    """Of the passes of a network, one after the other, by a clock that nothing else moves."""
    forward = script.Agent.forward
    remaining = {False: list(seconds), True: list(bf16_seconds)}
    now = [100.0]

    def timed_forward(agent, obs):
        if remaining[agent.bf16]:
            now[0] += remaining[agent.bf16].pop(0)
        return forward(agent, obs)

    monkeypatch.setattr(script.Agent, "forward", timed_forward)
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=time.time)
    monkeypatch.setattr(script, "time", clock)


@pytest.mark.parametrize(
    ("seconds", "bf16_seconds", "bf16"),
    [
        ([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5], True),
        ([1, 1, 1, 1], [1.1, 1.1, 1.1, 1.1], False),
        ([1, 1, 1, 1], [9, 0.9, 9, 0.9], True),  # a pass that was disturbed, or the first, says nothing
        ([9, 1, 1, 1], [1.1, 1.1, 1.1, 1.1], False),
    ],
)
def test_the_faster_precision_is_measured(single, seconds, bf16_seconds, bf16, monkeypatch):
    """And leaves the agent without gradients."""
    (agent,) = make_agents(single, 1)
    set_speed(single, monkeypatch, seconds, bf16_seconds)
    assert single.bf16_is_faster(agent, torch.zeros(2, 64, 64, 3, dtype=torch.uint8)) == bf16
    assert all(weight.grad is None for weight in agent.parameters())


@pytest.mark.parametrize("emulated", [True, False])
def test_a_gpu_is_asked_for_bf16(single, emulated, monkeypatch):
    """Cards before Ampere say that they have bfloat16, and mean that they emulate it."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    obs = SimpleNamespace(is_cuda=True)
    assert single.bf16_is_faster(None, obs) == (not emulated)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_resumed_run_keeps_its_precision(single, bf16, tmp_path, monkeypatch, capsys):
    """On a machine where the other is faster."""
    precision = "cpu, the encoder in bfloat16" if bf16 else "cpu, the encoder in float32"
    monkeypatch.setattr(single, "bf16_is_faster", lambda agent, obs: bf16)
    run_dir = train(single, tmp_path, bf16=None, **ONE_ITERATION)
    assert precision in capsys.readouterr().out.splitlines()
    assert load(run_dir / "checkpoint.pt")["args"]["bf16"] is bf16

    monkeypatch.setattr(single, "bf16_is_faster", lambda agent, obs: not bf16)
    words = ["--resume", run_dir, "--total-timesteps", 2 * BATCH_SIZE]
    assert common.train(single, tmp_path, *words) == 0
    assert precision in capsys.readouterr().out.splitlines()
    decided = common.parse(single, tmp_path, "--resume", run_dir, "--no-bf16" if bf16 else "--bf16")
    assert decided.bf16 is not bf16


@pytest.mark.parametrize("bf16", [True, False])
def test_flags_decide_the_precision(single, bf16, monkeypatch):
    args = single.Args(**SETTINGS | {"bf16": bf16})
    monkeypatch.setattr(single, "bf16_is_faster", lambda agent, obs: not bf16)
    agents, _, _ = single.set_up(args, CPU)
    assert [agent.bf16 for agent in agents] == [bf16] * len(agents)
    assert args.bf16 is bf16


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
ON_CUDA = pytest.param("cuda", False, marks=needs_cuda)


@pytest.mark.parametrize(("device", "bf16"), [("cpu", False), ("cpu", True), ON_CUDA])
def test_rollouts_are_of_the_newest_weights(two, device, bf16, tmp_path):
    """And of the update's precision: with one minibatch and one epoch the ratio of an update is 1, in each
    iteration, whatever the steps before, also after a resumption."""
    settings = {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 0.01, "eval_interval": 0}
    run_dir = train(two, tmp_path, total_timesteps=3 * BATCH_SIZE, device=device, bf16=bf16, **settings)
    assert common.train(two, tmp_path, "--resume", run_dir, "--total-timesteps", 6 * BATCH_SIZE) == 0
    for curves in curves_of(two, run_dir):
        deviations = list(curves["losses/ratio_deviation"].values())
        assert len(deviations) == 6
        assert max(deviations) < (0.02 if bf16 else 1e-3)
        assert curves["losses/entropy"][6 * BATCH_SIZE] < 2.6  # so the policy has moved, from ln 15 = 2.71


def direction(weights, before) -> torch.Tensor:
    """The unit vector along which all weights moved."""
    moves = [(after - old).flatten() for after, old in zip(weights, before, strict=True)]
    moved = torch.cat(moves).detach().cpu()
    return moved / moved.norm()


def assert_same_update(script, agents, batches, one, other, device=CPU):
    """Of two ways, each a loss function and whether it is in bfloat16. That keeps 8 bits, so that losses
    agree to a few hundredths. Adam's first steps are the sign of the gradient, and where that is next to
    nothing the sign is rounding: the ways agree to a cosine, not to the bit."""
    args = script.Args(num_envs=8, num_steps=16, num_minibatches=2, device=device.type)
    before = [weight.detach().clone() for weight in parameters_of(agents)]
    moves = []
    metrics = []
    for loss_function, bf16 in (one, other):
        for weight, old in zip(parameters_of(agents), before):
            weight.data.copy_(old)
        for agent in agents:
            agent.bf16 = bf16
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(parameters_of(agents), lr=5e-4, eps=1e-5, fused=True)
        metrics.append(script.update(loss_function, agents, optimizer, batches, args))
        moves.append(direction(parameters_of(agents), before))
    for ours, theirs in zip(*metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name, mean in ours.items():
            assert mean.item() == pytest.approx(theirs[name].item(), rel=0.1, abs=0.03), name
    assert moves[0] @ moves[1] > 0.9


def test_bf16_computes_the_same(two):
    agents, batches = agents_and_batches(two, size=BATCH_SIZE)
    assert_same_update(two, agents, batches, (two.compute_loss, True), (two.compute_loss, False))


# On a GPU. Each of these fails with torch.compile or its graphs switched off.


@pytest.fixture
def replays(monkeypatch):
    """One entry for each CUDA graph that has been replayed."""
    replayed = []
    replay = torch.cuda.CUDAGraph.replay

    def count_and_replay(graph):
        replayed.append(graph)
        return replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count_and_replay)
    return replayed


def kernels_of(function) -> list[str]:
    """The names of what a function runs on the GPU."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in on_gpu]


def on_cuda(script, **settings):
    """Agents whose actions are not a matter of chance, their policies and the loss function."""
    args = script.Args(**SETTINGS | {"device": "cuda"} | settings)
    device = torch.device("cuda")
    agents, _, runners = script.set_up(args, device)
    for agent in agents:
        agent.actor.weight.data *= 300
    policies, loss_function = script.speed_up(args, agents, runners, device)
    return agents, policies, loss_function


@needs_cuda
def test_cuda_replays_graphs_in_a_run(two, tmp_path, replays, capsys):
    """In each step of the rollouts and tests. The loss has compiled as one function, acting for each size."""
    settings = {"device": "cuda", "bf16": None, "num_envs": 16, "total_timesteps": 512}
    run_dir = train(two, tmp_path, **settings)
    assert "torch.compile is off" not in capsys.readouterr().out
    assert len(replays) > 2 * 2 * 17
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1 + 3
    assert (run_dir / "final_test.json").exists()


@needs_cuda
@pytest.mark.parametrize("bf16", [True, False])
def test_cuda_compiles_the_loss_and_updates_the_same(two, bf16):
    device = torch.device("cuda")
    _, _, loss_function = on_cuda(two)
    agents, batches = agents_and_batches(two, size=BATCH_SIZE)
    for agent in agents:
        agent.to(device)
    batches = [two.Batch(*(column.to(device) for column in batch)) for batch in batches]
    args = two.Args(device="cuda")
    assert any("triton" in name for name in kernels_of(lambda: loss_function(agents, batches, args)))
    assert_same_update(two, agents, batches, (loss_function, bf16), (two.compute_loss, False), device)


@needs_cuda
@pytest.mark.parametrize("bf16", [True, False])
def test_cuda_graphs_act_for_the_newest_weights(two, bf16, replays):
    """In all sizes, in turn; each call replays one graph."""
    agents, policies, _ = on_cuda(two, bf16=bf16)
    num = 0
    for change in (0.0, 0.1, 0.2):
        for size in (4 if two.__name__ in SINGLE else 8, 2, 3):
            obs = torch.randint(256, (size, 16, 16, 3), dtype=torch.uint8, device="cuda")
            for agent, policy in zip(agents, policies):
                agent.critic.bias.data += change
                replays.clear()
                actions, logprobs, values = (result.clone() for result in policy(obs))
                assert len(replays) == 1
                logits, expected = agent(obs)
                torch.testing.assert_close(values, expected, rtol=0.02, atol=0.02)
                logprobs_of_all = logits.log_softmax(-1)
                expected = logprobs_of_all.gather(-1, actions[:, None]).squeeze(-1)
                torch.testing.assert_close(logprobs, expected, rtol=0.05, atol=0.05)
                num += 1
    assert num == 9 * len(agents)


@needs_cuda
def test_cuda_graphs_sample_the_policy(two, replays):
    """Other numbers in each replay."""
    agents, policies, _ = on_cuda(two, num_eval_envs=2000)
    obs = torch.zeros(2000, 16, 16, 3, dtype=torch.uint8, device="cuda")
    for agent, policy in zip(agents, policies):
        agent.actor.weight.data.zero_()
        agent.actor.bias.data.copy_(torch.linspace(-1, 1, 15))
        replays.clear()
        samples = torch.stack([policy(obs)[0].clone() for _ in range(20)])
        assert len(replays) == 20
        assert not torch.equal(samples[0], samples[1])
        expected = agent.actor.bias.softmax(-1) * samples.numel()
        counts = samples.flatten().bincount(minlength=15)
        assert ((counts - expected) ** 2 / expected).sum() < 36.2  # the 0.1 % point, 14 degrees of freedom
