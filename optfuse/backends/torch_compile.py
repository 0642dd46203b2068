"""torch.compile: inductor with frozen weights on a CPU, with CUDA graphs on a GPU.

Everything is compiled when a program is opened, or when inputs of another shape are bound: never in
a run. What inductor writes lies in the cache folder of the options, or in a temporary one that goes
with the process.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optfuse.backends.given import nothing_bound, require_here
from optfuse.backends.torch_gpu import GpuProgramBackend
from optfuse.backends.torch_program import ProgramBackend, ProgramSession, first_line, moved
from optfuse.errors import EngineError
from optfuse.stages import BuildOptions, Program

if TYPE_CHECKING:
    from types import TracebackType

    import torch

RUNS_TO_COMPILE = {"cpu": 1, "cuda": 3}
"""The first run compiles; with CUDA graphs the second one records, and from the third on the
recording is played."""

SHAPES_AT_ONCE = 256
"""How many shapes of its inputs one session may be given; Dynamo's own limit is 8."""


class TorchCompile(ProgramBackend):
    """PyTorch's own compiler, on a CPU."""

    name = "torch-compile"

    def unavailable(self) -> str | None:
        """None where PyTorch is installed, with a C++ compiler and the headers it needs."""
        if reason := super().unavailable():
            return reason
        compiler = _compiler()
        if shutil.which(compiler) is None:
            return f"There is no C++ compiler '{compiler}': apt-get install g++"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "The headers of Python are not installed: apt-get install python3-dev"
        return None

    def _session(self, program: Program, options: BuildOptions) -> ProgramSession:
        require_here(self.name, self.unavailable())
        return TorchCompileSession(self.name, _in_plain_operators(program), options)


class TorchCompileCuda(GpuProgramBackend):
    """PyTorch's own compiler on a GPU, with CUDA graphs."""

    name = "torch-compile-cuda"

    def unavailable(self) -> str | None:
        """None where a PyTorch with CUDA is installed, with a C compiler and the headers that
        Triton's launchers need."""
        return super().unavailable() or CPU_BACKEND.unavailable()

    def _session(self, program: Program, options: BuildOptions) -> ProgramSession:
        self.require()
        return TorchCompileSession(self.name, moved(_in_plain_operators(program), "cuda"), options)


class TorchCompileSession(ProgramSession):
    """A compiled program, and one compilation for every shape of its inputs that was bound.

    A run copies nothing between host and device. It does check that the inputs are of a shape that
    was compiled, as whoever deploys torch.compile pays for too.
    """

    def __init__(self, engine: str, program: Program, options: BuildOptions) -> None:
        import torch

        super().__init__(engine, program, options.threads)
        self._cache = options.cache
        with self._settings(), _compiling(_folder(options.cache)):
            self._compiled: Any = torch.compile(
                self._graph_module,
                fullgraph=True,
                dynamic=False,
                options=_options(self._torch_device.type, options.threads),
            )
            self.bind(self._examples())
        self._arguments, self._results = None, []

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Hand over the inputs, compile the program for their shapes, and run once.

        Raises:
            EngineError: the number or a dtype of the inputs is not what the program takes, or it
                cannot be compiled.
        """
        super().bind(feeds)
        try:
            # What the program itself refuses, it says better than a compiler.
            self._run(self._graph_module)
        except EngineError:
            self._arguments = None
            raise
        try:
            with _compiling(_folder(self._cache)):
                for _ in range(RUNS_TO_COMPILE[self._torch_device.type]):
                    self.run()
        except EngineError as error:
            self._arguments = None
            raise EngineError(
                f"The engine '{self._engine}' failed to compile the program",
                _innermost(error),
                "Use the engine 'torch', which compiles nothing",
            ) from error

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: PyTorch refused.
        """
        import torch

        if self._arguments is None:
            raise nothing_bound(self._engine)
        if self._torch_device.type == "cuda":
            # The results of the last run lie in the memory that this one writes to.
            self._results = []
            compiler: Any = torch.compiler
            compiler.cudagraph_mark_step_begin()
        self._run(self._compiled)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._compiled = None


def _compiler() -> str:
    """The C++ compiler that inductor calls."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX", default)


def _options(device_type: str, threads: int) -> dict[str, Any]:
    """What inductor is asked for; the rest is as PyTorch has it."""
    options = {
        # It is written into the code: as an option, it is part of a kept file's key.
        "cpp.threads": threads,
        # Workers would stay, and take time from what is measured.
        "compile_threads": 1,
    }
    if device_type == "cpu":
        return {**options, "freezing": True}
    # Without its graphs it would be another engine than the one asked for: that is an error.
    return {**options, "triton.cudagraphs": True, "triton.cudagraph_or_error": True}


def _in_plain_operators(program: Program) -> Program:
    """A copy of the program that shares its parameters: what is compiled for it goes with it.

    It has no operator of ours but what that is short for: inductor fuses that by itself, and would
    have to call ours as it is.

    Raises:
        EngineError: torch.export does not take it.
    """
    from optfuse.graph import export_again

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about PyTorch's own code
            return _spelled_out(program, export_again(program))
    except Exception as error:  # it raises whatever it likes
        raise EngineError(
            f"'{program.name}' cannot be compiled",
            first_line(error),
            "Use the engine 'torch', which compiles nothing",
        ) from error


def _spelled_out(program: Program, exported: torch.export.ExportedProgram) -> Program:
    """The exported program with our operator as what it is short for."""
    import torch

    from optfuse.conv_act import CONV_ACT, composite

    modules = exported.graph_module.modules()
    graphs = [each.graph for each in modules if isinstance(each, torch.fx.GraphModule)]
    if any(graph.find_nodes(op="call_function", target=CONV_ACT) for graph in graphs):
        exported = exported.run_decompositions({CONV_ACT: composite})
    return replace(program, exported=exported, graph_module=exported.module(check_guards=False))


@contextmanager
def _compiling(folder: Path) -> Iterator[None]:
    """PyTorch as it is set while it compiles, with its files in that folder."""
    with ExitStack() as restore:
        # Triton's own default lies in the home directory.
        for name, place in (("TORCHINDUCTOR", folder), ("TRITON", folder / "triton")):
            restore.enter_context(_variable(f"{name}_CACHE_DIR", str(place)))
        # Only now: importing it fills in a folder where none is named.
        import torch._dynamo

        settings: Any = torch._dynamo.config
        restore.enter_context(settings.patch(recompile_limit=SHAPES_AT_ONCE))
        restore.enter_context(warnings.catch_warnings())
        # They are about PyTorch's own code.
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """The environment with this variable in it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _folder(cache_folder: Path | None) -> Path:
    """Where inductor's files go. A cache that can't be kept costs time, and never a result."""
    if cache_folder is not None:
        folder = cache_folder / "inductor"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    return Path(_temporary().name)


@cache
def _temporary() -> TemporaryDirectory[str]:
    """One for the whole process: inductor remembers its files from one compilation to the next."""
    return TemporaryDirectory(prefix="optfuse-inductor-", ignore_cleanup_errors=True)


def _innermost(error: BaseException) -> str:
    """What the exception says that the others were raised for, with what the C++ compiler said."""
    while error.__cause__ is not None:
        error = error.__cause__
    _, _, output = str(error).partition("\nOutput:\n")
    from_compiler = [line.strip() for line in output.splitlines() if "error" in line]
    return ": ".join([first_line(error), *from_compiler[:1]])


CPU_BACKEND = TorchCompile()
CUDA_BACKEND = TorchCompileCuda()
