"""What only the CUDA graph has: what is recorded when, and what a move to the GPU takes along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from optfuse.backends.torch_cudagraph import BACKEND, TorchCudaGraphSession
from optfuse.backends.torch_program import moved
from optfuse.errors import EngineError
from optfuse.stages import BuildOptions, Program

# torch.export copies a tree specification in a way that PyTorch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

OPTIONS = BuildOptions(threads=1)


class Model(nn.Module):
    """A parameter, a constant, a device burnt in, and a branch with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) - self.mean + torch.tensor([0.5, 0.25, 0.125])
        steps = torch.arange(3, device=x.device)
        return torch.cond(y.sum() > 0, self.up, torch.neg, (y * steps,))

    def up(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.linear.weight[:, :3]


def captured(module: nn.Module, *args: torch.Tensor, dynamic_shapes: Any = None) -> Program:
    module = module.eval().requires_grad_(False)
    exported = torch.export.export(module, args, dynamic_shapes=dynamic_shapes)
    exported = exported.run_decompositions({})
    return Program("example", exported.module(check_guards=False), exported, args)


@pytest.fixture
def linear() -> Program:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=2, max=64)
    return captured(nn.Linear(5, 3), torch.randn(2, 5), dynamic_shapes=({0: batch},))


# --- To the GPU


def tensors(program: Program) -> list[torch.Tensor]:
    modules = list(program.graph_module.modules())
    return [
        *program.graph_module.parameters(),
        *program.graph_module.buffers(),
        *(each for module in modules for each in vars(module).values() if torch.is_tensor(each)),
        *(each for each in program.example_args if torch.is_tensor(each)),
    ]


def devices_named(program: Program) -> set[str]:
    """Those burnt into the graph."""
    modules = program.graph_module.modules()
    graphs = [each.graph for each in modules if isinstance(each, torch.fx.GraphModule)]
    return {
        value.type
        for graph in graphs
        for node in graph.nodes
        for value in (*node.args, *node.kwargs.values())
        if isinstance(value, torch.device)
    }


def test_a_moved_program_has_nothing_on_the_old_device_and_leaves_its_own_there() -> None:
    torch.manual_seed(0)
    program = captured(Model(), torch.randn(2, 4))
    there = moved(program, "meta")
    assert {each.device.type for each in tensors(there)} == {"meta"}
    assert devices_named(there) == {"meta"}
    assert {each.device.type for each in tensors(program)} == {"cpu"}
    assert devices_named(program) == {"cpu"}
    assert len(tensors(there)) == len(tensors(program)) > 3


def test_a_program_moved_to_where_it_is_computes_the_same_on_the_same_memory() -> None:
    torch.manual_seed(0)
    program = captured(Model(), torch.randn(2, 4))
    here = moved(program, "cpu")
    feed = torch.randn(2, 4)
    assert torch.equal(here.graph_module(feed), program.graph_module(feed))
    assert {each.data_ptr() for each in tensors(here)} == {
        each.data_ptr() for each in tensors(program)
    }


# --- What is recorded, with a recorder in place of a GPU's


class Recording:
    """Plays the function it recorded, into the tensors that it returned then."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.replays = 0
        self.again: Callable[[], None] = lambda: None

    def replay(self) -> None:
        self.replays += 1
        self.again()


@pytest.fixture
def recorder(linear: Program, monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    """`torch.cuda` as far as a session uses it, on the CPU."""
    Recording.made = 0
    module = linear.graph_module
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))

    @contextmanager
    def graph(recording: Recording) -> Iterator[None]:
        yield
        feed, result = calls[-1]
        weight, bias = module.weight, module.bias

        def again() -> None:
            result.copy_(torch.nn.functional.linear(feed, weight, bias))

        recording.again = again

    class Stream:
        def __init__(self, _: object = None) -> None: ...

        def wait_stream(self, _: object) -> None: ...

    def stream(_: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    for name, fake in {
        "CUDAGraph": Recording,
        "graph": graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Recording


def test_a_recording_is_made_once_for_a_shape_and_played_on_every_run(
    linear: Program, recorder: type[Recording]
) -> None:
    expected = nn.functional.linear
    weight, bias = linear.graph_module.weight, linear.graph_module.bias
    with TorchCudaGraphSession("torch-cudagraph", linear, 1) as session:
        for made, size in ((1, 2), (1, 2), (2, 4), (2, 4), (3, 2)):
            feed = torch.randn(size, 5)
            session.bind([feed])
            session.run()
            assert torch.equal(session.fetch()[0], expected(feed, weight, bias))
            assert recorder.made == made
        recording = session._recording
        assert isinstance(recording, Recording)
        session.run()
        assert recording.replays == 2


def test_the_inputs_are_copied_so_that_the_callers_may_change(
    linear: Program, recorder: type[Recording]
) -> None:
    with TorchCudaGraphSession("torch-cudagraph", linear, 1) as session:
        feed = torch.randn(2, 5)
        session.bind([feed])
        session.run()
        before = session.fetch()[0]
        feed.zero_()
        session.run()
        assert torch.equal(session.fetch()[0], before)


def test_nothing_is_held_after_it(linear: Program, recorder: type[Recording]) -> None:
    with TorchCudaGraphSession("torch-cudagraph", linear, 1) as session:
        session.bind([torch.randn(2, 5)])
        session.run()
    assert session._recording is None
    assert session._feeds == session._recorded == session._results == []


def test_what_cannot_be_recorded_is_one_sentence_and_cannot_be_run(
    linear: Program, recorder: type[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def graph(_: Recording) -> Iterator[None]:
        yield
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with TorchCudaGraphSession("torch-cudagraph", linear, 1) as session:
        with pytest.raises(EngineError) as caught:
            session.bind([torch.randn(2, 5)])
        assert str(caught.value) == (
            "The engine 'torch-cudagraph' failed to record the program. CUDA error: operation not "
            "permitted when stream is capturing. Use the engine 'torch-cuda', which records "
            "nothing."
        )
        with pytest.raises(EngineError, match="No inputs were bound"):
            session.run()


def test_a_shape_that_the_program_refuses_is_not_recorded(
    linear: Program, recorder: type[Recording]
) -> None:
    with TorchCudaGraphSession("torch-cudagraph", linear, 1) as session:
        with pytest.raises(EngineError, match="to be <= 64, but got 65"):
            session.bind([torch.randn(65, 5)])
        assert recorder.made == 0


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(BACKEND.cannot_run() is not None, reason=BACKEND.cannot_run() or "it is here")
def test_a_program_on_the_cpu_is_recorded_on_the_gpu() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    program = captured(module, torch.randn(2, 3, 8, 8))
    with BACKEND.open(program, OPTIONS) as session:
        assert session.device == torch.cuda.get_device_name(0)
        for seed in (1, 2, 1):
            feed = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            session.bind([feed])
            session.run()
            # 1e-5: float32 sums of 27 products, without TF32.
            torch.testing.assert_close(session.fetch()[0], module(feed), rtol=1e-5, atol=1e-5)
