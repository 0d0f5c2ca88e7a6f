"""What makes the scripts fast changes no result: lower precision, graphs, groups of environments,
buffers. What only a GPU can show is in the tests at the end, which skip without one and which
benchmark/gpu_check.sh runs."""

import importlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from common import (
    MUTUAL,
    SINGLE,
    TINY,
    agent_folders,
    load_agent,
    make_agents,
    make_batch,
    make_probes,
    minibatch_step,
    run_folder,
)
from procgen import ProcgenGym3Env

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
OFF = {"bf16": False, "compile": False, "cudagraphs": False}


@pytest.fixture(autouse=True)
def compile_anew():
    """torch.compile stops at eight kinds of agents for one function, over all tests."""
    yield
    torch._dynamo.reset()


def train(script, folder, **settings):
    """A run on the probe, in this process. Returns the metrics of its updates, each (steps, agents, METRICS),
    and the weights of its agents."""
    metrics, update = [], script.update
    folder.mkdir()

    def noting(*inputs):
        metrics.append(update(*inputs))
        return metrics[-1]

    settings = TINY | {"num_envs": 16, "eval_interval": 0, "total_timesteps": 256} | settings
    torch._dynamo.reset()  # each run is to compile its own agents
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "make_envs", make_probes)
        patch.setattr(script, "update", noting)
        script.main(script.Args(**settings))
    folders = agent_folders(script.__name__, run_folder(folder))
    weights = [load_agent(each / "agent.pt")["agent"] for each in folders]
    return metrics, weights


def first_weights(script, **settings):
    args = script.Args(**(TINY | settings))
    torch.manual_seed(args.seed)
    num = 1 if script.__name__ in SINGLE else 2
    return [script.Agent(channels=args.channels).state_dict() for _ in range(num)]


@pytest.mark.parametrize("bf16", [True, False])
def test_rollouts_are_of_the_newest_weights(script, bf16, tmp_path):
    """With one minibatch an update's first ratio is 1, in each iteration, whatever the steps before. On
    processors without bfloat16 both are the same."""
    settings = {"num_minibatches": 1, "update_epochs": 2, "learning_rate": 0.01, "bf16": bf16}
    metrics, _ = train(script, tmp_path / "run", total_timesteps=5 * 256, **settings)
    deviation = np.stack(metrics)[..., script.METRICS.index("ratio_deviation")]
    assert deviation.shape[:2] == (5, 2)
    assert deviation[:, 0].max() < 0.02 and deviation[:, 1].max() > 0.1


def direction(weights, before) -> torch.Tensor:
    """The unit vector along which all weights moved."""
    moves = [after[name] - each[name] for after, each in zip(weights, before) for name in each]
    moved = torch.cat([move.flatten() for move in moves])
    return moved / moved.norm()


def assert_same_update(fast, reference, before):
    """The losses of one update and the way that the weights went. bfloat16 keeps 8 bits, so that losses agree
    to a few hundredths. Adam's first steps are the sign of the gradient, and where that is next to nothing
    the sign is rounding: the ways agree to a cosine, not to the bit."""
    np.testing.assert_allclose(fast[0][0], reference[0][0], rtol=0.1, atol=0.03)
    assert direction(fast[1], before) @ direction(reference[1], before) > 0.95


def pretend_processor(monkeypatch, flags: str):
    read_text = Path.read_text

    def read(path, **options):
        return f"flags: {flags}" if str(path) == "/proc/cpuinfo" else read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", read)


def test_bf16_computes_the_same(script, tmp_path, monkeypatch):
    pretend_processor(monkeypatch, "avx512_bf16")  # that this one has it or not makes it faster or slower
    fast, reference = train(script, tmp_path / "fast"), train(script, tmp_path / "reference", **OFF)
    assert_same_update(fast, reference, first_weights(script))
    assert (fast[0][0] != reference[0][0]).any()


def test_without_bf16_in_the_processor_there_is_none(script, tmp_path, monkeypatch):
    pretend_processor(monkeypatch, "avx2")
    plain, reference = train(script, tmp_path / "plain"), train(script, tmp_path / "reference", **OFF)
    np.testing.assert_array_equal(plain[0][0], reference[0][0])


def test_bf16_stays_within_the_encoder(script):
    (agent,) = make_agents(script, 1)
    agent.encoder.forward = torch.autocast("cpu", torch.bfloat16)(agent.encoder.forward)
    obs = torch.randint(256, (8, 64, 64, 3), dtype=torch.uint8)
    assert agent.encoder(obs.permute(0, 3, 1, 2) / 255).dtype == torch.bfloat16
    assert [each.dtype for each in agent(obs)] == [torch.float32] * 2


def test_the_loss_compiles_as_one_graph(script):
    """With bfloat16 inside, and no break."""
    num = 1 if script.__name__ in SINGLE else 2
    agents, mbs = make_agents(script, num), [make_batch(script, 8, seed) for seed in range(num)]
    for agent in agents:
        agent.encoder.forward = torch.autocast("cpu", torch.bfloat16)(agent.encoder.forward)
    compiled = torch.compile(script.compute_loss, fullgraph=True, backend="aot_eager")
    args = script.Args()
    loss, metrics = compiled(agents, mbs, args)
    torch.testing.assert_close((loss, metrics), script.compute_loss(agents, mbs, args))


def test_adam_starts_from_zero_with_untouched_weights(script, tmp_path, monkeypatch):
    """Its moments are made by a step of nothing."""
    saved = []
    monkeypatch.setattr(script, "save_checkpoint", lambda *inputs: saved.append(inputs[3].state_dict()))

    def stop(groups):
        [runner.close() for runner in runners]
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "rollout", stop)
    runners = []
    make_runner = script.Runner
    monkeypatch.setattr(script, "Runner", lambda *inputs: runners.append(make_runner(*inputs)) or runners[-1])
    with pytest.raises(KeyboardInterrupt):
        train(script, tmp_path / "run")
    for state in saved[0]["state"].values():
        assert [state[name].abs().sum() for name in ("step", "exp_avg", "exp_avg_sq")] == [0, 0, 0]
    for runner, weights in zip(runners, first_weights(script), strict=True):
        assert all(torch.equal(runner.agent.state_dict()[name], weights[name]) for name in weights)


def test_precision_may_change_when_a_run_goes_on(script, tmp_path, monkeypatch):
    """Adam's moments come back as saved, in the memory layout of the weights that they are now for: the fused
    Adam does not look at strides on the CPU."""
    pretend_processor(monkeypatch, "avx512_bf16")
    load, loaded = script.load_checkpoint, []

    def noting(content, optimizer, runners):
        load(content, optimizer, runners)
        loaded.append(optimizer.state)
        for state, saved in zip(optimizer.state.values(), content["optimizer"].values(), strict=True):
            assert all(torch.equal(state[name], saved[name]) and state[name].any() for name in saved)

    monkeypatch.setattr(script, "load_checkpoint", noting)
    train(script, tmp_path / "run", bf16=False)
    run_dir = run_folder(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "run")
        patch.setattr(script, "make_envs", make_probes)
        settings = TINY | {"num_envs": 16, "eval_interval": 0, "total_timesteps": 512}
        script.main(script.Args(**settings, resume=str(run_dir)))
    for weight, state in loaded[0].items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == weight.stride()
    kernels = [weight for weight in loaded[0] if weight.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_device_is_chosen_by_its_number(script, tmp_path, monkeypatch, name, number):
    """torch.cuda.set_device takes no device without one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(script, "open_run", lambda args: exit(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(script.Args(**TINY | {"device": name}))
    assert stop.value.code == 3 and chosen == [number]


# Environments


def test_buffers_change_no_observation(script):
    args = script.Args(env_id="starpilot", device="cpu")
    options = {"num_levels": 3, "start_level": 0, "rand_seed": 7, "distribution_mode": "hard"}
    ours, plain = script.make_envs(args, 4, 3, 0, 7), ProcgenGym3Env(4, "starpilot", **options)
    generator, buffers = np.random.default_rng(0), set()
    for _ in range(30):
        (reward, obs, first), (reward2, obs2, first2) = ours.observe(), plain.observe()
        buffers.add(obs["rgb"].ctypes.data)
        assert (reward == reward2).all() and (first == first2).all() and (obs["rgb"] == obs2["rgb"]).all()
        actions = generator.integers(15, size=4, dtype=np.int32)
        ours.act(actions)
        plain.act(actions)
    assert len(buffers) == 1 and next(iter(buffers)) % 64 == 0
    ours.close()
    plain.close()


@pytest.mark.parametrize(("num_envs", "sizes"), [(1, [1]), (2, [1, 1]), (5, [3, 2]), (8, [4, 4])])
def test_two_groups_fill_the_columns_of_one_batch(script, tmp_path, num_envs, sizes):
    """With seeds of their own, one reward normaliser and one list of episodes."""
    args = script.Args(**(TINY | {"num_envs": num_envs, "num_steps": 100, "total_timesteps": 1000}))
    agent = script.Agent(channels=args.channels)
    policy = lambda obs: [torch.full((len(obs),), 5.0), *2 * [obs.float().mean((1, 2, 3))]]  # noqa: E731
    runner = script.Runner(args, agent, policy, 0, 2, tmp_path, torch.device("cpu"))
    assert [group.envs.num for group in runner.groups] == sizes
    script.rollout(runner.groups)
    first = runner.data.obs[0].float().mean((1, 2, 3))
    assert (runner.data.actions == 5).all() and len(set(first.tolist())) > num_envs // 2
    torch.testing.assert_close(runner.data.values, runner.data.obs.float().mean((2, 3, 4)))
    rewards, dones = runner.rewards.copy(), runner.dones.copy()
    episodes = runner.finish_rollout()
    assert episodes.shape[1] == dones[1:].sum() > 0
    expected = script.RewardNormalizer(num_envs, args.gamma)
    expected(rewards[1:], dones[1:])
    assert vars(runner.normalizer.statistics) == vars(expected.statistics)
    runner.close()


# CUDA graphs, without CUDA: a graph that runs its function again


class Replayed:
    """Counts its calls in `state`, draws a number, and writes to one place, as a captured function does."""

    def __init__(self):
        self.state, self.outputs, self.num_calls = torch.zeros(3), {}, 0

    def __call__(self, x):
        self.num_calls += 1
        self.state += 1
        output = self.outputs.setdefault(x.shape, torch.zeros(x.shape))
        output.copy_(x + self.state[0] + torch.rand(()))
        if FakeGraph.recording:
            FakeGraph.recording.replay = lambda: self(x)
        return output


class FakeGraph:
    recording = None


class FakeStream:
    def wait_stream(self, other):
        pass


@contextmanager
def nothing(*_):
    yield


@contextmanager
def recording(graph):
    FakeGraph.recording = graph
    yield
    FakeGraph.recording = None


@pytest.fixture
def fake_cuda(monkeypatch):
    fakes = {"CUDAGraph": FakeGraph, "Stream": FakeStream, "current_stream": FakeStream, "stream": nothing}
    fakes |= {"graph": recording, "get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_a_graph_is_captured_without_traces(script, fake_cuda):
    """The state that the function changes and the generator are as if it had run only when called."""
    function, plain = Replayed(), Replayed()
    graph = script.CudaGraph(function, [function.state])
    inputs = [torch.full((size,), float(value)) for value, size in enumerate((4, 4, 2, 4, 2))]
    torch.manual_seed(0)
    expected = [plain(x).clone() for x in inputs]
    torch.manual_seed(0)
    outputs = [graph(x).clone() for x in inputs]
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert torch.equal(function.state, plain.state) and set(graph.captured) == {(4,), (2,)}
    assert function.num_calls == len(inputs) + 2 * 4  # each shape is run three times and captured once


# On a GPU


@needs_cuda
@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
@pytest.mark.parametrize("switches", [{}, {"compile": False}, {"cudagraphs": False}, {"bf16": False}])
def test_cuda_computes_the_same(name, tmp_path, switches):
    """With everything on, and with each switch alone off."""
    script = importlib.import_module(name)
    fast = train(script, tmp_path / "fast", device="cuda", **switches)
    reference = train(script, tmp_path / "reference", device="cuda", **OFF)
    assert_same_update(fast, reference, first_weights(script))


@needs_cuda
@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
def test_cuda_without_bf16_in_the_hardware_has_none(name, tmp_path, monkeypatch):
    """Cards before Ampere say that they have bfloat16, and mean that they emulate it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args: asked.append(args) or (lambda function: function))
    train(importlib.import_module(name), tmp_path / "run", device="cuda", compile=False)
    assert not asked


@needs_cuda
@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
def test_cuda_stops_and_goes_on(name, tmp_path):
    """Graphs are captured anew after a stop, and tests in the middle leave them as they are."""
    script = importlib.import_module(name)
    settings = {"device": "cuda", "total_timesteps": 1024, "eval_interval": 1, "torch_deterministic": True}
    straight, _ = train(script, tmp_path / "straight", **settings)
    train(script, tmp_path / "half", **settings | {"total_timesteps": 512})
    half = run_folder(tmp_path / "half")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "half")
        patch.setattr(script, "make_envs", make_probes)
        patch.setattr(script, "update", noting := Noting(script.update))
        script.main(script.Args(**(TINY | {"num_envs": 16} | settings | {"resume": str(half)})))
    np.testing.assert_allclose(np.stack(noting.metrics), np.stack(straight[2:]), rtol=0.1, atol=0.03)


class Noting:
    def __init__(self, function):
        self.function, self.metrics = function, []

    def __call__(self, *inputs):
        self.metrics.append(self.function(*inputs))
        return self.metrics[-1]


@needs_cuda
@pytest.mark.parametrize("name", [SINGLE[0], MUTUAL[0]])
def test_a_graph_sees_another_learning_rate(name):
    script, device = importlib.import_module(name), torch.device("cuda")
    num = 1 if name in SINGLE else 2
    agents = [agent.to(device) for agent in make_agents(script, num)]
    batches = [script.Batch(*(x.to(device) for x in make_batch(script, 32, seed))) for seed in range(num)]
    parameters = [weight for agent in agents for weight in agent.parameters()]
    lr = torch.tensor(1e-3, device=device)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True, capturable=True)

    def step(mb_inds):
        return minibatch_step(script, agents, optimizer, batches, script.Args(), mb_inds)

    step(torch.arange(16, device=device))
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    graph = script.CudaGraph(step, [*parameters, *moments])
    moved = []
    for rate in (1e-3, 0.0, 1e-3):
        lr.fill_(rate)
        before = [weight.detach().clone() for weight in parameters]
        graph(torch.randperm(32, device=device)[:16])
        moved.append(any(not torch.equal(*pair) for pair in zip(before, parameters)))
    assert moved == [True, False, True]
