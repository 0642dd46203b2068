"""An engine of the TensorRT family on a GPU: inputs in, run, outputs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from optfuse.backends.nvinfer_log import errors_of, sentence_of
from optfuse.errors import EngineError
from optfuse.stages import Artifact

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

STATIC_SHAPES = "Export it with static shapes: engines are built for fixed ones"


class NvinferSession:
    """An engine on a GPU. Device memory is held in torch tensors; inputs are copied in by `bind`.

    Args:
        engine: an `ICudaEngine`.
        program: the artifact that it was loaded from, for the order of inputs and outputs.
        log: the logger that the engine reports to.
        device: where its tensors lie.
        stream: a `torch.cuda.Stream` of its own: on the default stream the engine would wait for
            the whole device around every run.
        device_name: what it runs on.

    Raises:
        EngineError: the engine has other inputs or outputs than the program, or shapes that are
            known only when it runs.
    """

    def __init__(
        self,
        engine: Any,
        program: Artifact,
        log: Any,
        device: torch.device,
        stream: Any,
        device_name: str,
    ) -> None:
        self.device = device_name
        self._file = program.path.name
        self._log = log
        self._stream = stream
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        outputs = [name for name in names if name not in inputs]
        self.inputs = self._ordered("inputs", inputs, program.input_names)
        self.outputs = self._ordered("outputs", outputs, program.output_names)
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            self._fail(self._last_error(), "Free GPU memory, or use another GPU")
        self._bound = False
        self._memory = {name: self._allocate(name, device) for name in names}
        for name, tensor in self._memory.items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                self._fail(self._last_error(), "Build the engine again")

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Copy the inputs to the device, in the order of `inputs`.

        Raises:
            EngineError: another number, shape or dtype than the engine was built for.
        """
        if len(feeds) != len(self.inputs):
            self._fail(
                f"It has {len(self.inputs)} inputs and was given {len(feeds)}",
                f"Pass {', '.join(self.inputs)}",
            )
        for name, feed in zip(self.inputs, feeds, strict=True):
            wanted = self._memory[name]
            # copy_ would broadcast and convert without a word.
            if feed.shape != wanted.shape or feed.dtype != wanted.dtype:
                self._fail(
                    f"Its input '{name}' is {_described(wanted)} and was given {_described(feed)}",
                    "Export the model with inputs like the ones that it will be run on",
                )
            wanted.copy_(feed)
        self._bound = True

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: the GPU refused, or there are no inputs to run on.
        """
        if not self._bound:
            self._fail("No inputs were bound", "Call bind() first")
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            self._fail(self._last_error(), "Build it again, with this version")
        try:
            self._stream.synchronize()
        except RuntimeError as error:  # what a kernel did wrong shows only here
            self._fail(sentence_of([str(error)]), "Build it again, with this version")

    def fetch(self) -> list[torch.Tensor]:
        """The outputs of the last run, on the CPU, in the order of `outputs`."""
        return [self._memory[name].to("cpu", copy=True) for name in self.outputs]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # In this order: a context has to be gone before its engine, and both before the memory.
        self._context = None
        self._engine = None
        self._memory = {}

    def _ordered(
        self, what: str, of_engine: list[str], of_program: tuple[str, ...]
    ) -> tuple[str, ...]:
        if of_program and set(of_program) != set(of_engine):
            self._fail(
                f"Its {what} are {', '.join(of_engine)}, and the program's {', '.join(of_program)}",
                "Build the engine again from this program",
            )
        return of_program or tuple(of_engine)

    def _allocate(self, name: str, device: torch.device) -> torch.Tensor:
        import torch

        shape = tuple(self._engine.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            self._fail(f"The shape of '{name}' is known only when it runs", STATIC_SHAPES)
        dtype = TORCH_DTYPES.get(self._engine.get_tensor_dtype(name).name)
        if dtype is None:
            self._fail(f"PyTorch has no data type for its '{name}'", "Export another data type")
        # Values that the engine needs on the host, e.g. the shape for a reshape, lie there.
        on_host = self._engine.get_tensor_location(name).name == "HOST"
        return torch.zeros(
            shape, dtype=getattr(torch, str(dtype)), device="cpu" if on_host else device
        )

    def _last_error(self) -> str:
        return sentence_of(errors_of(self._log.messages)[-1:])

    def _fail(self, cause: str, next_step: str) -> NoReturn:
        raise EngineError(f"The engine {self._file} cannot run", cause, next_step)


def _described(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
