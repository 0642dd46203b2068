"""OpenVINO on a CPU, in the types that the file names.

What the file has in bfloat16 runs in bfloat16 where the CPU has instructions for it, and the rest
in float32. float16 is computed in float32: asked for it, the plugin would compute everything in
float16, or in bfloat16 where the CPU has that alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optfuse.backends.given import nothing_bound, onnx_file, require_fitting, require_here
from optfuse.environment import package_version
from optfuse.errors import EngineError
from optfuse.stages import Artifact, BuildOptions, EngineReport, Program

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

ELEMENT_TYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "u8": "uint8",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}
"""OpenVINO's name of a type -> PyTorch's, of the types that it computes in or can pass on.

Not f64: it would be computed in float32 without a word. i64 is computed in int32, which `bind`
looks after.
"""

INT8_SCHEME = "optfuse.int8"
"""Key in an ONNX file's metadata under which optfuse says what its int8 was written for: SCHEME in
optfuse/precision/int8.py, which may not be imported from here."""

TELEMETRY = "openvino_telemetry"
"""What reports every import of OpenVINO to its makers, and keeps a number for it in the home
directory. OpenVINO has a stub of its own for where this package is missing."""


class OpenVino:
    """OpenVINO's CPU plugin."""

    name = "openvino"
    builds = False

    def __init__(self) -> None:
        # A protocol's attribute can be assigned to, so its type has to be the protocol's own.
        self.consumes: Literal["onnx", "program"] = "onnx"

    def unavailable(self) -> str | None:
        """None where the package is installed."""
        if find_spec("openvino") is None:
            return "The package openvino is not installed: pip install 'optfuse[openvino]'"
        return None

    def version(self) -> str | None:
        """OpenVINO's version, None where it isn't installed."""
        return package_version("openvino")

    def cannot_run(self) -> str | None:
        """None where it can run here, else why not."""
        return self.unavailable()

    def refuses(self, precision: str) -> str | None:
        """None: what it has no instructions for, it computes in float32."""
        del precision
        return None

    def widens(self, precision: str) -> str | None:
        """What it computes in float32 instead: fp16, and bf16 on a CPU that it has no kernels for.

        A test has its layers say in which precision they ran.
        """
        if precision == "fp16":
            return "OpenVINO computes fp16 in float32"
        if precision == "bf16" and self.unavailable() is None and "BF16" not in _capabilities():
            return "OpenVINO computes bf16 in float32 on this CPU"
        return None

    def check_target(self, target: str) -> None:
        """Nothing: there is no build step."""

    def check_options(self, options: BuildOptions) -> None:
        """Nothing: there is no build step."""

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Nothing: OpenVINO compiles when it opens a file."""
        del artifact, options, directory
        return []

    def open(self, program: Artifact | Program, options: BuildOptions) -> OpenVinoSession:
        """Load an ONNX file.

        Raises:
            EngineError: the package is missing, the file can't be loaded, its int8 was written for
                another engine, something else than a CPU would run it, or not in the types that
                the file names.
        """
        require_here(self.name, self.unavailable())
        path = onnx_file(self.name, program)
        return OpenVinoSession(_load(path, options.threads))


class OpenVinoSession:
    """A loaded ONNX file. Its inputs are read where they lie, in the memory of the tensors bound.

    Attributes:
        inputs, outputs: as the file names them, in its order.
        device: `cpu`.
    """

    device = "cpu"

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.inputs = tuple(each.any_name for each in compiled.inputs)
        self.outputs = tuple(each.any_name for each in compiled.outputs)
        self._input_types = _types(compiled.inputs)
        self._output_types = _types(compiled.outputs)
        self._feeds: list[torch.Tensor] = []
        self._is_bound = False

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Hand over the inputs, and run once: a new shape may choose new kernels.

        Raises:
            EngineError: the number, a dtype, a shape or a value of the inputs is not what the file
                takes.
        """
        self._check(feeds)
        openvino = _package()
        self._is_bound = False
        # OpenVINO holds a bare pointer: the tensors must live as long as it does.
        self._feeds = [feed.detach().cpu().contiguous() for feed in feeds]
        try:
            for index, feed in enumerate(self._feeds):
                element_type = self._compiled.input(index).element_type
                shape = openvino.Shape(list(feed.shape))
                tensor = openvino.Tensor(_array(feed), shape, element_type)
                self._request.set_input_tensor(index, tensor)
        except Exception as error:  # its exceptions have no public base class
            raise _failed_to_run(error) from error
        self._is_bound = True
        self.run()

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: OpenVINO refused, e.g. a shape the file wasn't exported for.
        """
        if not self._is_bound:
            raise nothing_bound("openvino")
        try:
            # Without this, it would hand out copies of the outputs.
            self._request.infer(share_outputs=True)
        except Exception as error:  # its exceptions have no public base class
            raise _failed_to_run(error) from error

    def fetch(self) -> list[torch.Tensor]:
        """Copies of the last run's outputs."""
        found = []
        for index, dtype_name in enumerate(self._output_types):
            found.append(_tensor(self._request.get_output_tensor(index).data, dtype_name))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # In this order: the request holds pointers into the tensors.
        self._request = self._compiled = None
        self._feeds, self._is_bound = [], False

    def _check(self, feeds: Sequence[torch.Tensor]) -> None:
        require_fitting("openvino", "file", self.inputs, self._input_types, feeds)
        for name, feed in zip(self.inputs, feeds, strict=True):
            if str(feed.dtype) == "torch.int64" and not _fits_int32(feed):
                raise EngineError(
                    f"The engine 'openvino' cannot bind the input '{name}'",
                    "OpenVINO computes int64 in 32 bits, and it has values that need more",
                    "Use another engine, such as 'onnxruntime'",
                )


def _package() -> Any:
    """OpenVINO, imported without its telemetry."""
    if "openvino" not in sys.modules and TELEMETRY not in sys.modules:
        modules: dict[str, Any] = sys.modules  # None is how a module is marked as missing
        modules[TELEMETRY] = None
        try:
            import openvino
        finally:
            del modules[TELEMETRY]
    import openvino

    return openvino


def _capabilities() -> list[str]:
    """What its CPU plugin says that it computes in here, e.g. `FP32`, `BF16`, `INT8`."""
    found: list[str] = _package().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return found


def _load(path: Path, threads: int) -> Any:
    """An `openvino.CompiledModel` on the CPU."""
    openvino = _package()
    if not path.is_file():
        raise EngineError(
            f"The engine 'openvino' cannot open '{path}'",
            "There is no such file",
            "Check the path, or export the model again",
        )
    model = _read(path)
    _require_own_int8(model, path)
    try:
        compiled = openvino.Core().compile_model(model, "CPU", _settings(threads))
        devices = compiled.get_property("EXECUTION_DEVICES")
    except Exception as error:  # its exceptions have no public base class
        raise _failed_to_load(path, error) from error
    if devices != ["CPU"]:
        raise EngineError(
            f"The engine 'openvino' would not run '{path}' where it was asked to",
            f"CPU was asked for and {', '.join(devices)} would run it",
            "Install the openvino package that has its CPU plugin",
        )
    return compiled


def _read(path: Path) -> Any:
    """An `openvino.Model`, its metadata beside it, and nothing compiled."""
    from openvino.frontend import FrontEndManager

    try:
        # Not Core.read_model: it tries the readers of all other formats, which print what they
        # think of the file.
        reader = FrontEndManager().load_by_framework("onnx")
        return reader.convert(reader.load(str(path)))
    except Exception as error:  # its exceptions have no public base class
        raise _failed_to_load(path, error) from error


def _require_own_int8(model: Any, path: Path) -> None:
    """Before it is compiled, which may end the process.

    Raises:
        EngineError: its int8 was written for another engine.
    """
    place = ["framework", INT8_SCHEME]
    scheme = str(model.get_rt_info(place).value) if model.has_rt_info(place) else "openvino"
    if scheme != "openvino":
        raise EngineError(
            f"The engine 'openvino' cannot open '{path}'",
            f"Its int8 was written for {scheme}, and OpenVINO crashes on some such files and "
            "computes others wrongly",
            "Give --engine openvino when optimizing, or use model.openvino.onnx where that is "
            "beside it",
        )


def _settings(threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # Its default is bfloat16 for everything where the CPU has that. With this, what the file
        # has in bfloat16 is computed in it all the same, and nothing else.
        "INFERENCE_PRECISION_HINT": "f32",
        # And nothing is quantised on the way.
        "EXECUTION_MODE_HINT": "ACCURACY",
        # No other engine is tied to a core; what is tied waits when something else runs there.
        "ENABLE_CPU_PINNING": False,
        # Compiled models are not kept between processes.
        "CACHE_DIR": "",
    }


def _types(ports: Sequence[Any]) -> list[str]:
    """PyTorch's name of the dtype of each input or output.

    Raises:
        EngineError: of one that OpenVINO would compute in another type, or PyTorch has no tensor
            for.
    """
    for port in ports:
        type_name = port.element_type.get_type_name()
        if type_name == "f64":
            raise EngineError(
                "The engine 'openvino' cannot run the file in its own precision",
                f"'{port.any_name}' is float64, which OpenVINO computes in float32",
                "Use another engine, such as 'onnxruntime', or make the model float32",
            )
        if type_name not in ELEMENT_TYPES:
            raise EngineError(
                "The engine 'openvino' cannot pass every input and output on",
                f"'{port.any_name}' has the type {type_name}, which PyTorch has no tensor for",
                "Change the model so that all its inputs and outputs are tensors of numbers",
            )
    return [ELEMENT_TYPES[port.element_type.get_type_name()] for port in ports]


def _array(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a NumPy array, which has no bfloat16."""
    import torch

    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _tensor(array: Any, dtype_name: str) -> torch.Tensor:
    """A copy of a NumPy array as a tensor of that dtype, bit for bit."""
    import torch

    copy = torch.from_numpy(array.copy())
    return copy.view(torch.bfloat16) if dtype_name == "bfloat16" else copy


def _fits_int32(tensor: torch.Tensor) -> bool:
    import torch

    if tensor.numel() == 0:
        return True
    limits = torch.iinfo(torch.int32)
    low, high = torch.aminmax(tensor)
    return limits.min <= int(low) and int(high) <= limits.max


def _failed_to_load(path: Path, error: Exception) -> EngineError:
    return EngineError(
        f"The engine 'openvino' cannot load '{path}'",
        _reason(error),
        "Export the model again, or update openvino if it is older than the file's opset",
    )


def _failed_to_run(error: Exception) -> EngineError:
    return EngineError(
        "The engine 'openvino' failed to run the file",
        _reason(error),
        "Give it inputs with the shapes it was exported for",
    )


def _reason(error: Exception) -> str:
    """What OpenVINO says, on one line and without the places in its source."""
    noise = (
        r"^Exception from \S+:\d+:",
        r"^Check '.*' failed at \S+:\d+:",
        r"^FrontEnd API failed with \w+:",
        r"^Summary:",
    )
    lines = str(error).splitlines()
    for pattern in noise:
        lines = [re.sub(pattern, "", line) for line in lines]
    said = [line.strip().removeprefix("-- ").rstrip(".") for line in lines if line.strip()]
    return ": ".join(said) or type(error).__name__


BACKEND = OpenVino()
