"""What the engines in PyTorch on a GPU share: refusals without one, and the same answers on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfuse import backends
from optfuse.backends import torch_compile
from optfuse.backends.torch_gpu import GpuProgramBackend
from optfuse.errors import EngineError
from optfuse.stages import BuildOptions, Program
from tests.harness import captured, scramble

OPTIONS = BuildOptions(threads=1)
NAMES = ("torch-cuda", "torch-compile-cuda", "torch-cudagraph")

each_engine = pytest.mark.parametrize("name", NAMES)


class Model(nn.Module):
    """Two outputs, and a batch norm whose statistics are not the initial ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.layers(x)
        return y, y.mean((2, 3))


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return captured(scramble(Model().eval()), torch.randn(2, 3, 8, 8))


def has_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile.CPU_BACKEND, "unavailable", lambda: None)


@each_engine
def test_a_pytorch_without_cuda_is_named(
    name: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends.get(name)
    monkeypatch.setattr("optfuse.backends.torch_program.package_version", lambda _: "2.13.0+cpu")
    reason = "The package torch is installed without CUDA: pip install --force-reinstall torch"
    assert backend.unavailable() == backend.cannot_run() == reason
    with pytest.raises(EngineError) as caught:
        backend.open(program, OPTIONS)
    assert str(caught.value) == (
        f"The engine '{name}' is not here. The package torch is installed without CUDA. "
        "Run: pip install --force-reinstall torch."
    )


@each_engine
def test_a_machine_without_a_gpu_is_refused(
    name: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_a_compiler(monkeypatch)
    backend = backends.get(name)
    monkeypatch.setattr("optfuse.backends.torch_program.package_version", lambda _: "2.13.0")
    monkeypatch.setattr("optfuse.backends.torch_gpu.gpu_count", lambda: 0)
    assert backend.unavailable() is None
    assert backend.cannot_run() == "no GPU"
    with pytest.raises(EngineError, match="PyTorch sees no GPU") as caught:
        backend.open(program, OPTIONS)
    assert caught.value.next_step == "Choose from what 'optfuse engines' calls ready"


@pytest.mark.parametrize("name", ["torch-cuda", "torch-compile-cuda"])
def test_the_program_is_moved_before_it_is_run(
    name: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on a device of PyTorch's own that holds no numbers, in the GPU's place."""
    has_a_compiler(monkeypatch)
    backend = backends.get(name)
    module = __import__(type(backend).__module__, fromlist=["moved"])
    really, asked = module.moved, []

    def moved(given: Program, device: str) -> Program:
        asked.append(device)
        return really(given, "meta")

    class Session:
        def __init__(self, engine: str, given: Program, *_: Any) -> None:
            self.engine = engine
            self.devices = {each.device.type for each in given.graph_module.parameters()}

    monkeypatch.setattr(GpuProgramBackend, "require", lambda _: None)
    monkeypatch.setattr(module, "moved", moved)
    for session in ("TorchCudaSession", "TorchCompileSession"):
        monkeypatch.setattr(module, session, Session, raising=False)
    opened: Any = backend.open(program, OPTIONS)
    assert (opened.engine, asked, opened.devices) == (name, ["cuda"], {"meta"})
    assert {each.device.type for each in program.graph_module.parameters()} == {"cpu"}


@pytest.mark.gpu
@each_engine
def test_it_gives_what_float64_gives(name: str, program: Program) -> None:
    backend = backends.get(name)
    if reason := backend.cannot_run():
        pytest.skip(reason)
    (x,) = program.example_args
    expected = program.graph_module.double()(x.double())
    program.graph_module.float()
    with backend.open(program, OPTIONS) as session:
        session.bind([x])
        session.run()
        found = session.fetch()
        assert "NVIDIA" in session.device
    for ours, exact in zip(found, expected, strict=True):
        # Sums of 27 products in float32, without TF32: a few times 6e-8 of the largest.
        assert (ours.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
