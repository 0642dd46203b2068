"""Eager PyTorch: runs the captured program itself, operator by operator."""

from __future__ import annotations

from optfuse.backends.torch_program import ProgramBackend, ProgramSession
from optfuse.stages import BuildOptions, Program


class TorchEager(ProgramBackend):
    """PyTorch without a compiler."""

    name = "torch"

    def _session(self, program: Program, options: BuildOptions) -> ProgramSession:
        return TorchEagerSession(self.name, program, options.threads)


class TorchEagerSession(ProgramSession):
    """The program, called as it is."""


BACKEND = TorchEager()
