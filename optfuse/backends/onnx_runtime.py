"""ONNX Runtime, on the GPU where there is one for it and on the CPU otherwise."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
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

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

ELEMENT_TYPES = {
    "tensor(float)": ("float32", 1),
    "tensor(uint8)": ("uint8", 2),
    "tensor(int8)": ("int8", 3),
    "tensor(int16)": ("int16", 5),
    "tensor(int32)": ("int32", 6),
    "tensor(int64)": ("int64", 7),
    "tensor(bool)": ("bool", 9),
    "tensor(float16)": ("float16", 10),
    "tensor(double)": ("float64", 11),
    "tensor(bfloat16)": ("bfloat16", 16),
}
"""ONNX Runtime's name of a type -> PyTorch's name, and the number in onnx.TensorProto.DataType."""

LOG_FATAL_ONLY = 4
"""Everything less severe either changes nothing for the user or comes as an exception too."""


class OnnxRuntime:
    """ONNX Runtime with every graph optimisation on.

    Args:
        provider: the execution provider to ask for; None takes the CUDA one where both PyTorch and
            ONNX Runtime can use a GPU, and the CPU's otherwise.
    """

    name = "onnxruntime"
    consumes: Literal["onnx", "program"] = "onnx"
    builds = False

    def __init__(self, provider: str | None = None) -> None:
        self._provider = provider

    def unavailable(self) -> str | None:
        if find_spec("onnxruntime") is None:
            return "The package onnxruntime is not installed: pip install 'optfuse[cpu]'"
        return None

    def version(self) -> str | None:
        return package_version("onnxruntime", "onnxruntime-gpu")

    def cannot_run(self) -> str | None:
        return self.unavailable()

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Nothing: ONNX Runtime optimises when it opens a file."""
        del artifact, options, directory
        return []

    def open(self, program: Artifact | Program, options: BuildOptions) -> OnnxRuntimeSession:
        """Load an ONNX file.

        Raises:
            EngineError: the package is missing, the file can't be loaded, or another provider than
                the one asked for would run it.
        """
        if reason := self.unavailable():
            cause, _, command = reason.partition(": ")
            raise EngineError("The engine 'onnxruntime' is not here", cause, f"Run: {command}")
        if isinstance(program, Program) or program.kind != "onnx":
            what = "a captured program" if isinstance(program, Program) else f"'{program.path}'"
            raise EngineError(
                f"The engine 'onnxruntime' cannot open {what}",
                "It reads ONNX files only",
                "Export the program to ONNX first",
            )
        provider = self._provider or _best_provider()
        return OnnxRuntimeSession(_load(program.path, provider, options.threads), provider)


class OnnxRuntimeSession:
    """A loaded ONNX file; inputs and outputs lie in buffers that are allocated once, in `bind`.

    The buffers are on the device that runs the file, so `run` copies nothing between host and
    device.

    Attributes:
        inputs, outputs: as the file names them, in its order.
        device: `cpu` or the CUDA device's name.
    """

    def __init__(self, session: Any, provider: str) -> None:
        import torch

        self._session = session
        self._memory = "cuda" if provider == CUDA else "cpu"
        self._torch_device = torch.device("cuda", 0) if provider == CUDA else torch.device("cpu")
        self.device = torch.cuda.get_device_name(0) if provider == CUDA else "cpu"
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())
        self._input_types = [
            _element_type(value.name, value.type) for value in session.get_inputs()
        ]
        for value in session.get_outputs():
            _element_type(value.name, value.type)
        self._binding: Any = None
        self._feeds: list[torch.Tensor] = []
        self._results: list[torch.Tensor] = []

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Hand over the inputs, and run once to learn the shapes of the outputs.

        Raises:
            EngineError: the number, a dtype or a shape of the inputs is not what the file takes.
        """
        import torch

        self._check(feeds)
        # The binding holds bare pointers, so these tensors must live as long as it does.
        self._feeds = [feed.detach().to(self._torch_device).contiguous() for feed in feeds]
        binding = self._session.io_binding()
        for name, (_, number), feed in zip(
            self.inputs, self._input_types, self._feeds, strict=True
        ):
            binding.bind_input(name, self._memory, 0, number, list(feed.shape), feed.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        if self._memory == "cuda":
            torch.cuda.synchronize()  # the copies above, which ONNX Runtime's stream doesn't await
        self._binding = binding
        self.run()
        self._allocate_results()
        self.run()

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: nothing is bound, or ONNX Runtime refused.
        """
        if self._binding is None:
            raise EngineError(
                "The engine 'onnxruntime' cannot run",
                "No inputs were bound",
                "Call bind() before run()",
            )
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # its exceptions have no public base class
            raise EngineError(
                "The engine 'onnxruntime' failed to run the file",
                _reason(error),
                "Give it inputs with the shapes it was exported for",
            ) from error

    def fetch(self) -> list[torch.Tensor]:
        """Copies of the last run's outputs, on the CPU."""
        return [result.cpu().clone() for result in self._results]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # In this order: the binding holds pointers into the tensors.
        self._binding = None
        self._session = None
        self._feeds, self._results = [], []

    def _allocate_results(self) -> None:
        """Give every output of the last run a buffer of its own that later runs write into."""
        import torch

        # Read before the outputs are unbound: the values belong to the binding.
        found = [(value.data_type(), value.shape()) for value in self._binding.get_outputs()]
        self._binding.clear_binding_outputs()
        self._results = []
        for name, (type_name, shape) in zip(self.outputs, found, strict=True):
            dtype_name, number = _element_type(name, type_name)
            result = torch.empty(shape, dtype=getattr(torch, dtype_name), device=self._torch_device)
            self._results.append(result)
            if result.numel():
                pointer = result.data_ptr()
                self._binding.bind_output(name, self._memory, 0, number, shape, pointer)
            else:  # there is no memory to point at, and nothing to write
                self._binding.bind_output(name, self._memory)

    def _check(self, feeds: Sequence[torch.Tensor]) -> None:
        if len(feeds) != len(self.inputs):
            raise EngineError(
                "The engine 'onnxruntime' cannot bind its inputs",
                f"The file takes {len(self.inputs)} tensors and got {len(feeds)}",
                "Give one tensor for each input",
            )
        for name, (expected, _), feed in zip(self.inputs, self._input_types, feeds, strict=True):
            given = str(feed.dtype).removeprefix("torch.")
            # The binding passes a bare pointer on: a wrong dtype would be read as garbage.
            if given != expected:
                raise EngineError(
                    f"The engine 'onnxruntime' cannot bind the input '{name}'",
                    f"It takes {expected} and got {given}",
                    "Convert the tensor to that dtype",
                )


def _best_provider() -> str:
    import onnxruntime
    import torch

    on_gpu = torch.cuda.is_available() and CUDA in onnxruntime.get_available_providers()
    return CUDA if on_gpu else CPU


def _load(path: Path, provider: str, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` whose first provider is the one asked for."""
    import onnxruntime

    if not path.is_file():
        raise EngineError(
            f"The engine 'onnxruntime' cannot open '{path}'",
            "There is no such file",
            "Check the path, or export the model again",
        )
    # TF32 is off in every engine unless asked for; only the CUDA provider knows the option.
    settings = {"use_tf32": "0"} if provider == CUDA else {}
    try:
        with warnings.catch_warnings():
            # A missing provider is warned of and left out: below that is an error.
            warnings.simplefilter("ignore")
            session = onnxruntime.InferenceSession(
                str(path),
                sess_options=_session_options(threads),
                providers=[(provider, settings)],
                # Without this, a failing provider is replaced by the CPU's, with a print.
                enable_fallback=0,
            )
    except Exception as error:  # its exceptions have no public base class
        raise EngineError(
            f"The engine 'onnxruntime' cannot load '{path}'",
            _reason(error),
            "Export the model again, or update onnxruntime if it is older than the file's opset",
        ) from error
    actual = session.get_providers()[0]
    if actual != provider:
        raise EngineError(
            f"The engine 'onnxruntime' would not run '{path}' where it was asked to",
            f"{provider} was asked for and {actual} would run it",
            "Install the onnxruntime package that has it, with the CUDA version it needs",
        )
    return session


def _session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL_ONLY
    # A thread pool that spins while it has nothing to do takes a core from what runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _element_type(name: str, text: str) -> tuple[str, int]:
    if text not in ELEMENT_TYPES:
        raise EngineError(
            "The engine 'onnxruntime' cannot pass every input and output on",
            f"'{name}' has the type {text}, which PyTorch has no tensor for",
            "Change the model so that all its inputs and outputs are tensors of numbers",
        )
    return ELEMENT_TYPES[text]


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, on one line and without `[ONNXRuntimeError] : 1 : FAIL : `."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)


BACKEND = OnnxRuntime()
