"""Eager PyTorch, recorded once as a CUDA graph and played back: no launch waits for Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optfuse.backends.given import nothing_bound
from optfuse.backends.torch_gpu import GpuProgramBackend
from optfuse.backends.torch_program import (
    ProgramSession,
    first_line,
    moved,
    tensors_in,
)
from optfuse.errors import EngineError
from optfuse.stages import BuildOptions, Program

if TYPE_CHECKING:
    from types import TracebackType

    import torch

WARM_UP_RUNS = 3
"""Before a recording, in which nothing may be allocated or chosen; PyTorch's notes on CUDA graphs
do as many."""


class TorchCudaGraph(GpuProgramBackend):
    """PyTorch on a GPU, without a compiler and without the cost of launching each kernel."""

    name = "torch-cudagraph"

    def _session(self, program: Program, options: BuildOptions) -> ProgramSession:
        self.require()
        return TorchCudaGraphSession(self.name, moved(program, "cuda"), options.threads)


class TorchCudaGraphSession(ProgramSession):
    """A recording of the program, for one shape of its inputs at a time.

    Its inputs are copied into tensors of its own, in `bind`; a run copies nothing.
    """

    def __init__(self, engine: str, program: Program, threads: int) -> None:
        super().__init__(engine, program, threads)
        self._recording: torch.cuda.CUDAGraph | None = None
        self._feeds: list[torch.Tensor] = []
        self._recorded: list[torch.Tensor] = []

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Copy the inputs to the GPU; where their shapes are new, record the program for them.

        Raises:
            EngineError: the number, a dtype or a shape of the inputs is not what the program takes,
                or it cannot be recorded, e.g. because it reads a result on the CPU.
        """
        self._check(feeds)
        shapes = [feed.shape for feed in feeds]
        if self._recording is None or shapes != [feed.shape for feed in self._feeds]:
            self._free()
            self._feeds = [feed.detach().to(self._torch_device, copy=True) for feed in feeds]
            self._arguments = self._arguments_of(self._feeds)
            self._record()
        else:
            for place, feed in zip(self._feeds, feeds, strict=True):
                place.copy_(feed.detach())
        self._wait()

    def run(self) -> None:
        """Play the recording, and wait for the result.

        Raises:
            EngineError: nothing was bound, or the GPU failed.
        """
        if self._recording is None:
            raise nothing_bound(self._engine)
        self._run(self._play)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._free()

    def _play(self, *_args: Any, **_kwargs: Any) -> list[torch.Tensor]:
        assert self._recording is not None
        self._recording.replay()
        return self._recorded

    def _record(self) -> None:
        """Record the program on what is bound."""
        import torch

        assert self._arguments is not None
        args, kwargs = self._arguments
        cuda: Any = torch.cuda
        side = cuda.Stream(self._torch_device)
        side.wait_stream(cuda.current_stream(self._torch_device))
        with cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._run(self._graph_module)
        cuda.current_stream(self._torch_device).wait_stream(side)
        recording = cuda.CUDAGraph()
        try:
            with torch.inference_mode(), cuda.graph(recording):
                results = self._graph_module(*args, **kwargs)
        except Exception as error:  # an operator may raise anything
            raise EngineError(
                f"The engine '{self._engine}' failed to record the program",
                first_line(error),
                "Use the engine 'torch-cuda', which records nothing",
            ) from error
        self._recording, self._recorded = recording, tensors_in(results)

    def _free(self) -> None:
        # In this order: the recording holds pointers into the tensors.
        self._recording = None
        self._feeds, self._recorded, self._results = [], [], []


BACKEND = TorchCudaGraph()
