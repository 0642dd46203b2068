"""What only torch.compile has: when it compiles, with what, where to, and what it needs."""

from __future__ import annotations

import gc
import os
import sysconfig
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optfuse.backends import torch_compile
from optfuse.backends.torch_compile import CPU_BACKEND as BACKEND
from optfuse.conv_act import CONV_ACT
from optfuse.errors import EngineError
from optfuse.graph import operators
from optfuse.stages import BuildOptions, Program
from tests import harness

pytestmark = [
    # torch.export copies a tree specification in a way that PyTorch itself warns of.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.skipif(
        BACKEND.unavailable() is not None, reason=BACKEND.unavailable() or "it is here"
    ),
]

OPTIONS = BuildOptions(threads=1)


class Fused(nn.Module):
    """Our own operator at the top and in a branch of control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fused(x) + 0.5
        return torch.cond(y.sum() > 0, self.fused, torch.neg, (y[:, :3],)).contiguous()

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.convolution.weight, self.convolution.bias
        # What a convolution takes, up to its groups, then the activation and its numbers.
        settings = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, "relu", [])
        y: torch.Tensor = CONV_ACT(x, weight, bias, None, None, *settings)
        return y[:, :3] * 1.0


def captured(module: nn.Module, *args: torch.Tensor, dynamic_shapes: Any = None) -> Program:
    exported = torch.export.export(
        module.eval().requires_grad_(False), args, dynamic_shapes=dynamic_shapes
    )
    exported = exported.run_decompositions({})
    module = exported.module(check_guards=False)
    return Program("example", module, exported, args, dynamic_shapes=dynamic_shapes)


def calls(module: torch.fx.GraphModule) -> int:
    graphs = [each.graph for each in module.modules() if isinstance(each, torch.fx.GraphModule)]
    return sum(len(graph.find_nodes(op="call_function", target=CONV_ACT)) for graph in graphs)


@pytest.fixture(scope="module")
def linear() -> Program:
    """Nothing in it needs the C++ compiler: it is compiled in a moment."""
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=2, max=64)
    return captured(nn.Linear(5, 3, bias=False), torch.randn(2, 5), dynamic_shapes=({0: batch},))


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


# --- When it compiles


def test_nothing_is_compiled_in_a_run(linear: Program) -> None:
    with BACKEND.open(linear, OPTIONS) as session:
        for size in (2, 7, 2, 7):
            session.bind([torch.randn(size, 5)])
            with torch.compiler.set_stance("fail_on_recompile"):
                session.run()
                session.run()
            assert session.fetch()[0].shape == (size, 3)


def test_the_example_inputs_are_compiled_for_when_it_is_opened(linear: Program) -> None:
    with BACKEND.open(linear, OPTIONS) as session:
        with torch.compiler.set_stance("fail_on_recompile"):
            session.bind([torch.randn(2, 5)])
            session.run()
        assert session.fetch()[0].shape == (2, 3)


def test_more_shapes_than_dynamo_keeps_by_itself(linear: Program) -> None:
    module = linear.graph_module
    with BACKEND.open(linear, OPTIONS) as session:
        for size in range(2, 13):
            feed = torch.randn(size, 5)
            session.bind([feed])
            session.run()
            # 1e-6: float32 dot products of five terms.
            torch.testing.assert_close(
                session.fetch()[0], module(feed).detach(), rtol=1e-6, atol=1e-6
            )


def test_what_was_compiled_goes_with_the_session(linear: Program) -> None:
    with BACKEND.open(linear, OPTIONS) as session:
        module = weakref.ref(session._graph_module)
        assert module() is not linear.graph_module
    del session
    gc.collect()
    assert module() is None


# --- What it compiles


def test_our_own_operator_is_compiled_as_plain_operators() -> None:
    torch.manual_seed(0)
    program = captured(Fused(), torch.randn(1, 3, 6, 6))
    before = calls(program.graph_module)
    with BACKEND.open(program, OPTIONS) as session:
        assert calls(session._graph_module) == 0
        feed = torch.randn(1, 3, 6, 6)
        session.bind([feed])
        session.run()
        (output,) = session.fetch()
    assert before == calls(program.graph_module) == 2
    # 1e-5: two float32 sums of 27 products, one after the other.
    torch.testing.assert_close(output, program.graph_module(feed).detach(), rtol=1e-5, atol=1e-5)


def test_it_compiles_the_program_as_it_is_after_the_passes() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = harness.captured(harness.scramble(layers), torch.randn(1, 3, 6, 6))
    program = harness.optimized(before, "all")
    assert calls(program.graph_module) == 1
    with BACKEND.open(program, OPTIONS) as session:
        # One convolution and no batch norm: what was captured has both.
        kinds = operators(session._graph_module)
        assert kinds == {"convolution": 1, "relu": 1}
        assert operators(before.graph_module)["batch_norm"] == 1
        session.bind(before.example_args)
        session.run()
        (output,) = session.fetch()
    expected = before.graph_module(*before.example_args)
    # 1e-5: two float32 sums of 27 products, one with the batch norm folded into its weights.
    torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)


def test_weights_are_frozen_on_a_cpu_and_launches_recorded_on_a_gpu() -> None:
    on_cpu, on_gpu = torch_compile._options("cpu", 3), torch_compile._options("cuda", 3)
    assert on_cpu == {"cpp.threads": 3, "compile_threads": 1, "freezing": True}
    assert on_gpu["triton.cudagraphs"] is on_gpu["triton.cudagraph_or_error"] is True
    assert "freezing" not in on_gpu
    known = torch._inductor.list_options()
    assert {*on_cpu, *on_gpu} <= set(known)


def test_the_thread_count_holds_while_it_compiles_and_is_put_back(
    linear: Program, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def compiled(module: Any, *, options: dict[str, int], **_: object) -> Any:
        seen.append((torch.get_num_threads(), options["cpp.threads"]))
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    torch.set_num_threads(2)
    with BACKEND.open(linear, BuildOptions(threads=3)):
        assert torch.get_num_threads() == 3
    assert seen == [(3, 3)]
    assert torch.get_num_threads() == 2


# --- Where to


def test_its_files_lie_in_the_cache_folder_and_nowhere_else(
    linear: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with BACKEND.open(linear, BuildOptions(threads=1, cache=tmp_path / "cache")):
        pass
    assert any(path.is_file() for path in (tmp_path / "cache" / "inductor").rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/else"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_cache_folder_that_cannot_be_written_is_done_without(
    linear: Program, tmp_path: Path
) -> None:
    (tmp_path / "inductor").write_text("a file stands where the folder should be")
    assert torch_compile._folder(tmp_path) == torch_compile._folder(None)
    with BACKEND.open(linear, BuildOptions(threads=1, cache=tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["inductor"]


def test_without_a_cache_folder_they_lie_in_one_that_goes_with_the_process(
    linear: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with BACKEND.open(linear, OPTIONS):
        folder = torch_compile._folder(None)
    assert any(path.is_file() for path in folder.rglob("*"))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


# --- Refusals


def test_a_missing_compiler_is_named(linear: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "There is no C++ compiler 'no-such-compiler': apt-get install g++"
    assert BACKEND.unavailable() == BACKEND.cannot_run() == reason
    with pytest.raises(EngineError) as caught:
        BACKEND.open(linear, OPTIONS)
    assert str(caught.value) == (
        "The engine 'torch-compile' is not here. There is no C++ compiler 'no-such-compiler'. "
        "Run: apt-get install g++."
    )


def test_missing_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    reason = "The headers of Python are not installed: apt-get install python3-dev"
    assert BACKEND.unavailable() == reason


def test_a_shape_that_the_program_refuses_is_not_compiled(linear: Program) -> None:
    with BACKEND.open(linear, OPTIONS) as session:
        with pytest.raises(EngineError, match="to be <= 64, but got 65") as caught:
            session.bind([torch.randn(65, 5)])
        assert caught.value.thing == "The engine 'torch-compile' failed to run the program"
        with pytest.raises(EngineError, match="No inputs were bound"):
            session.run()


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("no disk\nat line 7", "no disk"),
        (
            "C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nIn x:\nx.h:1: fatal error: y\n",
            "C++ compile error: x.h:1: fatal error: y",
        ),
    ],
)
def test_a_failing_compiler_is_one_sentence(
    linear: Program, said: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(_: Any, **__: object) -> Any:
        def fails(*_: object) -> None:
            try:
                raise OSError(said)
            except OSError as error:
                raise RuntimeError("backend='inductor' raised:\npages of it") from error

        return fails

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(EngineError) as caught:
        BACKEND.open(linear, OPTIONS)
    assert str(caught.value) == (
        f"The engine 'torch-compile' failed to compile the program. {cause}. "
        "Use the engine 'torch', which compiles nothing."
    )


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_on_a_gpu_its_recording_gives_new_outputs_for_new_inputs() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.ReLU()).eval().cuda()
    program = captured(module, torch.randn(2, 5).cuda())
    with BACKEND.open(program, OPTIONS) as session:
        assert session.device == torch.cuda.get_device_name(0)
        for seed in (1, 2, 1):
            feed = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
            session.bind([feed])
            session.run()
            session.run()
            expected = module(feed.cuda()).detach().cpu()
            # 1e-5: float32 dot products of five terms, without TF32.
            torch.testing.assert_close(session.fetch()[0], expected, rtol=1e-5, atol=1e-5)
