"""An imitation of torch.cuda on the CPU: CUDA graphs, streams, and a fast path that takes it for a GPU.

A graph records every operator during its capture, with the tensors that it read and wrote, and a replay runs
them again into the same memory. As on CUDA a capture computes nothing: what it wrote to is put back, the
generator too, and what it allocated holds no numbers until the first replay. To read a tensor's numbers in a
capture, or to make a tensor from the host's, is an error, as it is there. What it does not show is the order
of streams, and what kernels round.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOT_PERMITTED = "operation not permitted when stream is capturing"
aten = torch.ops.aten
# Operators whose result, or its size, depends on numbers that the host would have to read.
READ_BY_HOST = [
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
]
HOST_METHODS = ["cpu", "numpy", "tolist", "item", "__array__"]
HOST_FUNCTIONS = ["from_numpy", "tensor", "as_tensor"]


def tensors_in(nested) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def written_by(operator, args, kwargs) -> list[torch.Tensor]:
    """The arguments that an operator writes to."""
    written = []
    for index, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        written += tensors_in(value)
    return written


class Capture(TorchDispatchMode):
    """Notes the operators that run in it."""

    def __init__(self):
        super().__init__()
        self.operators = []  # (operator, args, kwargs, results in memory of their own)
        self.allocated = {}  # address: a view of all its bytes, which keeps the memory
        self.before = {}  # address: a view and a copy of memory that is older than the capture

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads_mask = operator is aten.index.Tensor and any(
            each.dtype == torch.bool for each in tensors_in(args[1])
        )
        if operator in READ_BY_HOST or reads_mask:
            raise RuntimeError(f"{operator}: {NOT_PERMITTED}")
        for tensor in written_by(operator, args, kwargs):
            if address(tensor) not in self.allocated and address(tensor) not in self.before:
                memory = bytes_of(tensor)
                self.before[address(tensor)] = (memory, memory.clone())
        results = operator(*args, **kwargs)
        inputs = {address(tensor) for tensor in tensors_in((args, kwargs))}
        new = [tensor for tensor in tensors_in(results) if address(tensor) not in inputs]
        for tensor in new:
            self.allocated[address(tensor)] = bytes_of(tensor)
        self.operators.append((operator, args, kwargs, results if new else None))
        return results

    def undo(self):
        for memory, content in self.before.values():
            memory.copy_(content)
        for memory in self.allocated.values():
            memory.fill_(255)  # NaN, or -1


class Graph:
    """torch.cuda.CUDAGraph."""

    made = 0  # since the imitation began

    def __init__(self):
        Graph.made += 1
        self.operators = None

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, results in self.operators:
            again = operator(*args, **kwargs)
            if results is None:  # in place, or a view
                continue
            inputs = {address(tensor) for tensor in tensors_in((args, kwargs))}
            for old, new in zip(tensors_in(results), tensors_in(again), strict=True):
                if address(old) not in inputs:
                    old.copy_(new)


def refuse(*args, **kwargs):
    raise RuntimeError(NOT_PERMITTED)


@contextmanager
def graph(graph: Graph, stream=None):
    """torch.cuda.graph: a capture."""
    generator = torch.get_rng_state()
    capture = Capture()
    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_METHODS:
            patch.setattr(torch.Tensor, name, refuse)
        for name in HOST_FUNCTIONS:
            patch.setattr(torch, name, refuse)
        with capture:
            yield
    capture.undo()
    torch.set_rng_state(generator)
    graph.operators = capture.operators
    graph.memory = capture.allocated


class Stream:
    def wait_stream(self, other):
        pass


@contextmanager
def stream(stream: Stream):
    yield


@contextmanager
def fast_path_of_cuda(script, backend: str = "aot_eager", bf16: bool = False):
    """Runs of the script in here take the fast path for a GPU, on the CPU: all else of it sees a CPU. The
    compiler stops before it would make kernels."""
    cpu = torch.device("cpu")
    speed_up = script.speed_up
    can_compile = script.can_compile
    compile_with = torch.compile

    def speed_up_on_cuda(args, agents, optimizer, runners, device, run_dir):
        device = SimpleNamespace(type="cuda")
        return speed_up(args, agents, optimizer, runners, device, run_dir)

    def compile_without_kernels(function, **options):
        return compile_with(function, backend=backend, **options)

    Graph.made = 0
    torch._dynamo.reset()  # each run is to compile its own agents
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch, "compile", compile_without_kernels)
        patch.setattr(script, "speed_up", speed_up_on_cuda)
        patch.setattr(script, "can_compile", lambda device: can_compile(cpu))
        patch.setattr(script, "has_fast_bf16", lambda device: bf16)
        yield
    torch._dynamo.reset()
