"""The engines: one file each, and the one visible table of them.

An engine never times anything: `optfuse.measure` times all of them the same way. Adding one takes
one file and one line in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from optfuse.stages import Artifact, BuildOptions, EngineLayer, EngineReport, Program

BACKENDS = {
    "torch": "optfuse.backends.torch_eager:BACKEND",
    "torch-cuda": "optfuse.backends.torch_cuda:BACKEND",
    "torch-compile": "optfuse.backends.torch_compile:CPU_BACKEND",
    "torch-compile-cuda": "optfuse.backends.torch_compile:CUDA_BACKEND",
    "torch-cudagraph": "optfuse.backends.torch_cudagraph:BACKEND",
    "onnxruntime": "optfuse.backends.onnx_runtime:CPU_BACKEND",
    "onnxruntime-cuda": "optfuse.backends.onnx_runtime:CUDA_BACKEND",
    "onnxruntime-tensorrt": "optfuse.backends.onnx_runtime:TENSORRT_BACKEND",
    "openvino": "optfuse.backends.openvino:BACKEND",
    "tensorrt": "optfuse.backends.tensorrt:BACKEND",
    "tensorrt-rtx": "optfuse.backends.tensorrt_rtx:BACKEND",
}
"""Name on the command line -> where its backend stands, `module:attribute`. A module is imported
only when its engine is asked for, and imports its own package only inside functions."""


ON_GPU = (
    *("torch-cuda", "torch-compile-cuda", "torch-cudagraph"),
    *("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx"),
)
"""The engines whose name asks for a GPU."""


ONLY_BY_NAME = ("torch-compile", "torch-compile-cuda")
"""The engines that run only where they are asked for: these compile for a minute or more."""


class Session(Protocol):
    """A program that is loaded and ready to run: a context manager that frees what it holds.

    Tensors cross this border as CPU torch tensors, in the program's order of inputs and outputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: str
    """What really runs it; a silent fall-back is an EngineError in `open`."""

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Hand over the inputs, outside the timed region."""

    def run(self) -> None:
        """Run once on the bound inputs and wait until the result is there."""

    def fetch(self) -> list[torch.Tensor]:
        """The outputs of the last run, on the CPU."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class TellsLayers(Protocol):
    """A session whose engine tells of its layers and how long each takes."""

    def layers(self) -> tuple[EngineLayer, ...]:
        """Every layer, in the engine's order."""


class Backend(Protocol):
    """An engine that can build and run a program."""

    name: str
    consumes: Literal["onnx", "program"]
    builds: bool
    """Whether `build` makes a file of its own."""

    def unavailable(self) -> str | None:
        """None where `open` and `build` can work here, else one or two sentences that name the
        missing thing and the exact line that installs it. Imports no heavy package."""

    def version(self) -> str | None:
        """The engine package's version, None where it isn't installed."""

    def cannot_run(self) -> str | None:
        """None where `open` can work here, else why not, e.g. `no GPU`: an engine may build where
        it cannot run."""

    def refuses(self, precision: str) -> str | None:
        """None where it runs what is in that precision here, else the reason in one sentence.

        It may compute more exactly than what it is given says, e.g. in float32 where the processor
        has no arithmetic for fp16, and never less.

        Args:
            precision: `fp32`, `fp16`, `bf16` or `int8`.
        """

    def widens(self, precision: str) -> str | None:
        """None where it computes here in that precision, or refuses it; else what it does instead,
        one sentence without a full stop.

        Args:
            precision: as for `refuses`.
        """

    def check_target(self, target: str) -> None:
        """Called for an engine that builds, before any work is done.

        Raises:
            UsageError: it cannot build for `target`, e.g. `sm_90`.
        """

    def check_options(self, options: BuildOptions) -> None:
        """Called before any work is done; an engine that builds nothing has nothing to say.

        Raises:
            UsageError: it cannot build here as these options ask for; of targets, see
                `check_target`.
        """

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Build one engine a target into `directory`; empty where the engine has no build step.

        Raises:
            EngineError: with the builder's own reason in one sentence.
            OutputError: the engine cannot be written.
        """

    def open(self, program: Artifact | Program, options: BuildOptions) -> Session:
        """Load an artifact (or, for an engine that consumes programs, a Program).

        Raises:
            EngineError: when it cannot be loaded, or another device than asked would run it.
        """


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: there is none.
    """
    from optfuse.errors import UsageError

    if name not in BACKENDS:
        raise UsageError(
            f"There is no engine '{name}'",
            f"The engines are {', '.join(BACKENDS)}",
            "Choose one of them, or run 'optfuse engines' to see which work here",
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)
    return backend
