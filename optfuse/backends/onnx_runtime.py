"""ONNX Runtime: one engine for each of its execution providers (CPU, CUDA, TensorRT)."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optfuse.backends.given import nothing_bound, onnx_file, require_fitting, require_here
from optfuse.backends.nvidia import gpu_count
from optfuse.environment import package_version
from optfuse.errors import EngineError
from optfuse.stages import Artifact, BuildOptions, EngineReport, Program

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

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


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's execution providers, as an engine of its own.

    Attributes:
        name: ONNX Runtime's name of it.
        engine: the engine's name on the command line.
        packages: module and distribution of what has to be installed, and the extra that does.
        settings: (provider, options) as `InferenceSession` takes them, the one asked for first,
            then those that may run what it does not know.
        on_gpu: whether it runs on a CUDA device.
    """

    name: str
    engine: str
    packages: tuple[tuple[str, str], ...]
    extra: str
    settings: tuple[tuple[str, Mapping[str, str]], ...]
    on_gpu: bool


# TF32 is off in every engine unless asked for.
_CUDA_SETTINGS = (CUDA, {"use_tf32": "0"})

PROVIDERS = (
    Provider(
        CPU,
        engine="onnxruntime",
        packages=(("onnxruntime", "onnxruntime"),),
        extra="cpu",
        settings=((CPU, {}),),
        on_gpu=False,
    ),
    Provider(
        CUDA,
        engine="onnxruntime-cuda",
        packages=(("onnxruntime", "onnxruntime-gpu"),),
        extra="gpu",
        settings=(_CUDA_SETTINGS,),
        on_gpu=True,
    ),
    Provider(
        TENSORRT,
        engine="onnxruntime-tensorrt",
        packages=(("onnxruntime", "onnxruntime-gpu"), ("tensorrt", "tensorrt")),
        extra="gpu",
        settings=((TENSORRT, {}), _CUDA_SETTINGS),
        on_gpu=True,
    ),
)


class OnnxRuntime:
    """ONNX Runtime with every graph optimisation on, on one of its execution providers."""

    builds = False

    def __init__(self, provider: Provider) -> None:
        self.name = provider.engine
        # A protocol's attribute can be assigned to, so its type has to be the protocol's own.
        self.consumes: Literal["onnx", "program"] = "onnx"
        self._provider = provider

    def unavailable(self) -> str | None:
        """None where the packages are installed, else the one that is missing."""
        for module, distribution in self._provider.packages:
            # The CPU provider is in each of ONNX Runtime's packages; the others name their own.
            named = self._provider.on_gpu and package_version(distribution) is None
            if find_spec(module) is None or named:
                return (
                    f"The package {distribution} is not installed: "
                    f"pip install 'optfuse[{self._provider.extra}]'"
                )
        return None

    def version(self) -> str | None:
        """ONNX Runtime's version, None where it isn't installed."""
        if self._provider.on_gpu:
            return package_version("onnxruntime-gpu")
        return package_version("onnxruntime", "onnxruntime-gpu")

    def cannot_run(self) -> str | None:
        """None where it can run here, else why not."""
        if reason := self.unavailable():
            return reason
        return "no GPU" if self._provider.on_gpu and gpu_count() == 0 else None

    def refuses(self, precision: str) -> str | None:
        """None but for bf16 on a CPU.

        On a CPU, fp16 is computed in float32: Cast nodes are put around its operators, so that the
        file is smaller and nothing is faster. What has a kernel for bf16 on CUDA depends on the
        version, and `open` names what has none.
        """
        if precision == "bf16" and not self._provider.on_gpu:
            return "ONNX Runtime has no convolution and no matrix product in bf16 on a CPU"
        return None

    def widens(self, precision: str) -> str | None:
        """None but for fp16 on a CPU: see `refuses`."""
        if precision == "fp16" and not self._provider.on_gpu:
            return "ONNX Runtime computes fp16 in float32 on a CPU"
        return None

    def check_target(self, target: str) -> None:
        """Nothing: there is no build step."""

    def check_options(self, options: BuildOptions) -> None:
        """Nothing: there is no build step."""

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
        require_here(self.name, self.unavailable())
        path = onnx_file(self.name, program)
        session = _load(path, self._provider, options.threads)
        return OnnxRuntimeSession(session, self._provider)


class OnnxRuntimeSession:
    """A loaded ONNX file; inputs and outputs lie in buffers that are allocated once, in `bind`.

    The buffers are on the device that runs the file, so `run` copies nothing between host and
    device.

    Attributes:
        inputs, outputs: as the file names them, in its order.
        device: `cpu` or the CUDA device's name.
    """

    def __init__(self, session: Any, provider: Provider) -> None:
        import torch

        self._session = session
        self._memory = "cuda" if provider.on_gpu else "cpu"
        self._torch_device = (
            torch.device(self._memory, 0) if provider.on_gpu else torch.device("cpu")
        )
        self.device = torch.cuda.get_device_name(0) if provider.on_gpu else "cpu"
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
            raise nothing_bound("onnxruntime")
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
        dtypes = [dtype for dtype, _ in self._input_types]
        require_fitting("onnxruntime", "file", self.inputs, dtypes, feeds)


def _load(path: Path, provider: Provider, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` whose first provider is the one asked for."""
    onnxruntime = package()
    if not path.is_file():
        raise EngineError(
            f"The engine '{provider.engine}' cannot open '{path}'",
            "There is no such file",
            "Check the path, or export the model again",
        )
    try:
        with warnings.catch_warnings():
            # A missing provider is warned of and left out: below that is an error.
            warnings.simplefilter("ignore")
            session = onnxruntime.InferenceSession(
                str(path),
                sess_options=_session_options(threads),
                providers=[(name, dict(each)) for name, each in provider.settings],
                # Without this, a failing provider is replaced by the CPU's, with a print.
                enable_fallback=0,
            )
    except Exception as error:  # its exceptions have no public base class
        reason = _reason(error)
        raise EngineError(
            f"The engine '{provider.engine}' cannot load '{path}'",
            reason,
            "It has no kernel for that operator in its precision: open the file on another engine, "
            "e.g. with @openvino"
            if "Could not find an implementation" in reason
            else "Export the model again, or update onnxruntime if it is older than the file's "
            "opset",
        ) from error
    actual = session.get_providers()[0]
    if actual != provider.name:
        raise EngineError(
            f"The engine '{provider.engine}' would not run '{path}' where it was asked to",
            f"{provider.name} was asked for and {actual} would run it",
            "Install the onnxruntime package that has it, with the CUDA version it needs",
        )
    return session


def package() -> Any:
    """The package onnxruntime, imported without its telemetry, which would upload what is done with
    a model and keep a number of this machine in the home directory. Who wants it sets
    ORT_DISABLE_TELEMETRY=0."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _session_options(threads: int) -> Any:
    onnxruntime = package()
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


CPU_BACKEND, CUDA_BACKEND, TENSORRT_BACKEND = map(OnnxRuntime, PROVIDERS)
