"""An engine of the TensorRT family on a GPU: inputs in, run, outputs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from optfuse.backends.cuda_recording import recorded
from optfuse.backends.inspector import inspected, time_layers
from optfuse.backends.nvinfer_log import errors_of, sentence_of
from optfuse.backends.nvinfer_runtime import Running
from optfuse.backends.profiles import written
from optfuse.errors import EngineError
from optfuse.stages import Artifact, EngineLayer

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

TORCH_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""The engine's name of a data type -> torch's."""

PROFILED_RUNS = 20
"""In which each layer is timed; the median counts."""


class NvinferSession:
    """An engine on a GPU. Device memory is held in torch tensors; inputs are copied in by `bind`.

    Runs play back a CUDA graph where one can be made. It belongs to the shapes that were bound, and
    is recorded again for others.

    Args:
        trt: the package.
        engine: an `ICudaEngine`.
        running: what runs it.
        program: the artifact that it was loaded from, for the order of inputs and outputs.
        log: the logger that the engine reports to.
        device: where its tensors lie.
        stream: a `torch.cuda.Stream` of its own: on the default stream the engine would wait for
            the whole device around every run.
        device_name: what it runs on.

    Raises:
        EngineError: the engine has other inputs or outputs than the program, or of data types that
            PyTorch doesn't have.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        running: Running,
        program: Artifact,
        log: Any,
        device: torch.device,
        stream: Any,
        device_name: str,
    ) -> None:
        self.device = device_name
        self._trt = trt
        self._file = program.path.name
        self._log = log
        self._torch_device = device
        self._stream = stream
        self._at_the_end = running.at_the_end
        self._to_profile: Callable[[], Any] | None = running.to_profile
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        outputs = [name for name in names if name not in inputs]
        self.inputs = self._ordered("inputs", inputs, program.input_names)
        self.outputs = self._ordered("outputs", outputs, program.output_names)
        self._engine = engine
        self._context = running.context
        if self._context is None:
            self._fail(self._last_error(), "Free GPU memory, or use another GPU")
        self._dtypes = {name: self._dtype(name) for name in names}
        # Values that the engine needs on the host, e.g. the shape for a reshape. A recording would
        # keep those that it was made with.
        self._on_host = {n for n in names if engine.get_tensor_location(n).name == "HOST"}
        self._records = running.records and not self._on_host & set(inputs)
        self._memory: dict[str, torch.Tensor] = {}
        self._play: Callable[[], None] | None = None

    @property
    def plays_back(self) -> bool:
        """Whether runs play back a CUDA graph that was recorded here."""
        return self._play is not None

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Copy the inputs to the device, in the order of `inputs`; where their shapes are new, make
        room for them and record the engine for them.

        Raises:
            EngineError: another number, shape or dtype than the engine was built for.
        """
        if len(feeds) != len(self.inputs):
            self._fail(
                f"It has {len(self.inputs)} inputs and was given {len(feeds)}",
                f"Pass {', '.join(self.inputs)}",
            )
        # All of them first: a session that refuses keeps what it had.
        for name, feed in zip(self.inputs, feeds, strict=True):
            self._check(name, feed)
        known = bool(self._memory) and all(
            self._memory[name].shape == feed.shape and name not in self._on_host
            for name, feed in zip(self.inputs, feeds, strict=True)
        )
        if known:
            for name, feed in zip(self.inputs, feeds, strict=True):
                self._memory[name].copy_(feed)
        else:
            self._reshape(feeds)

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: the GPU refused, or there are no inputs to run on.
        """
        if not self._memory:
            self._fail("No inputs were bound", "Call bind() first")
        if self._play is None:
            self._run_unrecorded(self._context)
        else:
            self._wait_for(self._play)

    def fetch(self) -> list[torch.Tensor]:
        """The outputs of the last run, on the CPU, in the order of `outputs`."""
        return [self._memory[name].to("cpu", copy=True) for name in self.outputs]

    def layers(self) -> tuple[EngineLayer, ...]:
        """Every layer as it runs here, with its kernel and its time, on the bound inputs.

        Takes a second context, and so the engine's activation memory a second time; no latency
        should be taken meanwhile. The outputs of the last run are computed anew.

        Raises:
            EngineError: the GPU refused, or there are no inputs to run on.
        """
        if not self._memory:
            self._fail("No inputs were bound", "Call bind() first")
        assert self._to_profile is not None
        context = self._to_profile()
        if context is None:
            self._fail(self._last_error(), "Free GPU memory, or use another GPU")
        self._tell_inputs(context)
        self._tell_outputs(context)
        found = inspected(self._trt, self._engine, context)
        run = partial(self._run_unrecorded, context)
        return time_layers(self._trt, context, run, found, PROFILED_RUNS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._at_the_end is not None:
            self._at_the_end()
        # In this order: a recording holds addresses, a context has to be gone before its engine,
        # and both before the memory.
        self._at_the_end = None
        self._to_profile = None
        self._play = None
        self._context = None
        self._engine = None
        self._memory = {}

    def _check(self, name: str, feed: torch.Tensor) -> None:
        """copy_ would broadcast and convert without a word."""
        takes = tuple(self._engine.get_tensor_shape(name))
        fits = len(takes) == feed.ndim and all(
            size in (-1, given) for size, given in zip(takes, feed.shape, strict=True)
        )
        if not fits or feed.dtype != self._dtypes[name]:
            self._fail(
                f"Its input '{name}' is {_described(takes, self._dtypes[name])} and was given "
                f"{_described(feed.shape, feed.dtype)}",
                "Export the model with inputs like the ones that it will be run on",
            )
        if -1 not in takes:
            return
        least, _, most = (tuple(each) for each in self._engine.get_tensor_profile_shape(name, 0))
        if any(not a <= size <= b for a, size, b in zip(least, feed.shape, most, strict=True)):
            self._fail(
                f"Its input '{name}' was given {written(feed.shape)}, and it was built for "
                f"{written(least)} to {written(most)}",
                "Build it for a wider range with --dim",
            )

    def _reshape(self, feeds: Sequence[torch.Tensor]) -> None:
        """Set the context up for inputs of other shapes than before."""
        self._play = None  # it plays on the memory that goes now
        self._memory = {}
        self._memory = {
            name: self._room(name, feed.shape)
            for name, feed in zip(self.inputs, feeds, strict=True)
        }
        for name, feed in zip(self.inputs, feeds, strict=True):
            self._memory[name].copy_(feed)
        try:
            self._tell_inputs(self._context)
            for name in self.outputs:
                self._memory[name] = self._room(name, self._output_shape(name))
            self._tell_outputs(self._context)
            if self._records:
                self._record()
        except EngineError:
            self._memory = {}
            self._play = None
            raise

    def _tell_inputs(self, context: Any) -> None:
        for name in self.inputs:
            tensor = self._memory[name]
            if not context.set_input_shape(name, tuple(tensor.shape)):
                self._fail(self._last_error(), "Build it for these shapes")
            self._tell_address(context, name)

    def _tell_outputs(self, context: Any) -> None:
        for name in self.outputs:
            self._tell_address(context, name)

    def _tell_address(self, context: Any, name: str) -> None:
        if not context.set_tensor_address(name, self._memory[name].data_ptr()):
            self._fail(self._last_error(), "Build the engine again")

    def _output_shape(self, name: str) -> Sequence[int]:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            self._fail(
                f"The shape of '{name}' is known only when it has run",
                "Use the engine onnxruntime, which takes such models",
            )
        return shape

    def _room(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        import torch

        device = torch.device("cpu") if name in self._on_host else self._torch_device
        # Not zeros: those would be filled on another stream, maybe after the engine wrote.
        return torch.empty(tuple(shape), dtype=self._dtypes[name], device=device)

    def _record(self) -> None:
        # Unrecorded first: kernels are loaded, and memory set aside, in the first run.
        self._run_unrecorded(self._context)
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is None or capturable(self._stream.cuda_stream):
            self._play = recorded(
                lambda stream: bool(self._context.execute_async_v3(stream.cuda_stream)),
                self._stream,
            )

    def _run_unrecorded(self, context: Any) -> None:
        def queue() -> None:
            if not context.execute_async_v3(self._stream.cuda_stream):
                self._fail(self._last_error(), "Build it again, with this version")

        self._wait_for(queue)

    def _wait_for(self, queue: Callable[[], None]) -> None:
        try:
            queue()
            self._stream.synchronize()
        except RuntimeError as error:  # what a kernel did wrong shows only here
            self._fail(sentence_of([str(error)]), "Build it again, with this version")

    def _ordered(
        self, what: str, of_engine: list[str], of_program: tuple[str, ...]
    ) -> tuple[str, ...]:
        if of_program and set(of_program) != set(of_engine):
            self._fail(
                f"Its {what} are {', '.join(of_engine)}, and the program's {', '.join(of_program)}",
                "Build the engine again from this program",
            )
        return of_program or tuple(of_engine)

    def _dtype(self, name: str) -> torch.dtype:
        import torch

        dtype = TORCH_DTYPES.get(self._engine.get_tensor_dtype(name).name)
        if dtype is None:
            self._fail(f"PyTorch has no data type for its '{name}'", "Export another data type")
        found: torch.dtype = getattr(torch, str(dtype))
        return found

    def _last_error(self) -> str:
        return sentence_of(errors_of(self._log.messages)[-1:])

    def _fail(self, cause: str, next_step: str) -> NoReturn:
        raise EngineError(f"The engine {self._file} cannot run", cause, next_step)


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{written(tuple(shape))} {str(dtype).removeprefix('torch.')}"
