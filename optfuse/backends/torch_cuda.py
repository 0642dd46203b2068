"""Eager PyTorch on a GPU: the captured program, operator by operator."""

from __future__ import annotations

from optfuse.backends.torch_gpu import GpuProgramBackend
from optfuse.backends.torch_program import ProgramSession, moved
from optfuse.stages import BuildOptions, Program


class TorchCuda(GpuProgramBackend):
    """PyTorch on a GPU without a compiler: what people run who deploy nothing else."""

    name = "torch-cuda"

    def _session(self, program: Program, options: BuildOptions) -> ProgramSession:
        self.require()
        return TorchCudaSession(self.name, moved(program, "cuda"), options.threads)


class TorchCudaSession(ProgramSession):
    """The program, called as it is; a run waits for the GPU."""


BACKEND = TorchCuda()
