"""Eager PyTorch: runs the captured program itself, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optfuse.environment import package_version
from optfuse.errors import EngineError
from optfuse.stages import Artifact, BuildOptions, EngineReport, Program

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self


class TorchEager:
    """PyTorch without a compiler, on the device the program's parameters are on."""

    name = "torch"
    consumes: Literal["onnx", "program"] = "program"
    builds = False

    def unavailable(self) -> str | None:
        if find_spec("torch") is None:
            return "The package torch is not installed: pip install torch"
        return None

    def version(self) -> str | None:
        return package_version("torch")

    def cannot_run(self) -> str | None:
        return self.unavailable()

    def check_target(self, target: str) -> None:
        """Nothing: there is no build step."""

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Nothing: there is no build step."""
        del artifact, options, directory
        return []

    def open(self, program: Artifact | Program, options: BuildOptions) -> TorchEagerSession:
        """A session on the program.

        Raises:
            EngineError: it was given a file.
        """
        if not isinstance(program, Program):
            raise EngineError(
                "The engine 'torch' cannot open a file",
                f"It runs a captured program, and '{program.path}' is an {program.kind} file",
                "Open the file with the engine 'onnxruntime'",
            )
        return TorchEagerSession(program, options.threads)


class TorchEagerSession:
    """A program with its example inputs' tensors replaced by the ones bound.

    What else is among the example inputs (numbers, flags, None) stays as it is: torch.export has
    burnt it into the program. While the session is entered, PyTorch's thread count is the one
    asked for and, on a CUDA device, TF32 is off; both are put back on exit.

    Attributes:
        inputs: the program's placeholders that take a tensor, e.g. `x` or `batch_mask`.
        outputs: `output_0`, `output_1` ...; outputs that aren't tensors are left out.
        device: `cpu` or the CUDA device's name.
    """

    def __init__(self, program: Program, threads: int) -> None:
        import torch
        from torch.utils import _pytree

        self._graph_module = program.graph_module
        self._threads = threads
        self._restore = ExitStack()
        self._leaves, self._structure = _pytree.tree_flatten(
            (program.example_args, dict(program.example_kwargs))
        )
        self._tensor_positions = [
            index for index, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)
        ]
        self._torch_device = _device_of(program)
        self.device = (
            torch.cuda.get_device_name(self._torch_device)
            if self._torch_device.type == "cuda"
            else self._torch_device.type
        )
        self.inputs = self._input_names()
        self.outputs = self._output_names()
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._results: list[torch.Tensor] = []

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Hand over the inputs.

        Raises:
            EngineError: their number or a dtype is not what the program takes.
        """
        from torch.utils import _pytree

        self._check(feeds)
        leaves = list(self._leaves)
        for position, feed in zip(self._tensor_positions, feeds, strict=True):
            leaves[position] = feed.detach().to(self._torch_device)
        self._arguments = _pytree.tree_unflatten(leaves, self._structure)

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: PyTorch refused, e.g. a shape the program wasn't captured for.
        """
        import torch
        from torch.utils import _pytree

        if self._arguments is None:
            raise EngineError(
                "The engine 'torch' cannot run", "No inputs were bound", "Call bind() before run()"
            )
        args, kwargs = self._arguments
        try:
            with torch.inference_mode():
                results = self._graph_module(*args, **kwargs)
            if self._torch_device.type == "cuda":
                torch.cuda.synchronize(self._torch_device)
        except Exception as error:  # an operator may raise anything
            raise EngineError(
                "The engine 'torch' failed to run the program",
                _first_line(error),
                "Give it inputs with the shapes it was captured for",
            ) from error
        self._results = [
            leaf for leaf in _pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)
        ]

    def fetch(self) -> list[torch.Tensor]:
        """Copies of the last run's outputs, on the CPU."""
        return [result.detach().cpu().clone() for result in self._results]

    def __enter__(self) -> Self:
        import torch

        self._restore.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(self._threads)
        if self._torch_device.type == "cuda":
            backends: Any = torch.backends
            # Not the older `allow_tf32` flags: only these can be put back exactly.
            for flags in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                self._restore.callback(setattr, flags, "fp32_precision", flags.fp32_precision)
                flags.fp32_precision = "ieee"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore.close()
        self._arguments = None
        self._results = []

    def _check(self, feeds: Sequence[torch.Tensor]) -> None:
        if len(feeds) != len(self._tensor_positions):
            raise EngineError(
                "The engine 'torch' cannot bind its inputs",
                f"The program takes {len(self._tensor_positions)} tensors and got {len(feeds)}",
                "Give one tensor for each input",
            )
        for name, position, feed in zip(self.inputs, self._tensor_positions, feeds, strict=True):
            expected = self._leaves[position].dtype
            if feed.dtype != expected:
                raise EngineError(
                    f"The engine 'torch' cannot bind the input '{name}'",
                    f"It takes {_short(expected)} and got {_short(feed.dtype)}",
                    "Convert the tensor to that dtype",
                )

    def _input_names(self) -> tuple[str, ...]:
        placeholders = self._graph_module.graph.find_nodes(op="placeholder")
        return tuple(str(placeholders[position].target) for position in self._tensor_positions)

    def _output_names(self) -> tuple[str, ...]:
        import torch

        (returned,) = self._graph_module.graph.output_node().args
        values = returned if isinstance(returned, (tuple, list)) else (returned,)
        count = sum(isinstance(value, torch.fx.Node) for value in values)
        return tuple(f"output_{index}" for index in range(count))


def _device_of(program: Program) -> torch.device:
    """Where the parameters are, or the example inputs of a program without any; else the CPU."""
    import torch
    from torch.utils import _pytree

    module = program.graph_module
    examples = _pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    for tensor in (*module.parameters(), *module.buffers(), *examples):
        if isinstance(tensor, torch.Tensor):
            return tensor.device
    return torch.device("cpu")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


BACKEND = TorchEager()
