"""What the engines that run a captured program in PyTorch on a GPU have in common."""

from __future__ import annotations

from optfuse.backends.given import require_here
from optfuse.backends.nvidia import gpu_count
from optfuse.backends.torch_program import ProgramBackend
from optfuse.errors import EngineError


class GpuProgramBackend(ProgramBackend):
    """An engine that moves programs to a GPU and runs them there."""

    def unavailable(self) -> str | None:
        """None where a PyTorch with CUDA is installed."""
        if (self.version() or "").endswith("+cpu"):
            return (
                "The package torch is installed without CUDA: pip install --force-reinstall torch"
            )
        return super().unavailable()

    def cannot_run(self) -> str | None:
        """None where it can run here, else why not."""
        return self.unavailable() or ("no GPU" if gpu_count() == 0 else None)

    def require(self) -> None:
        """Where it cannot run, say so before anything is moved.

        Raises:
            EngineError: it cannot run here.
        """
        import torch

        require_here(self.name, self.unavailable())
        if gpu_count() == 0 or not torch.cuda.is_available():
            raise EngineError(
                f"The engine '{self.name}' cannot run here",
                "PyTorch sees no GPU",
                "Choose from what 'optfuse engines' calls ready",
            )
