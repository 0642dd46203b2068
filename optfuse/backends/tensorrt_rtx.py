"""TensorRT for RTX, of the package `tensorrt-rtx`: builds ahead of time, for a GPU that isn't here.

Its engines choose and compile their kernels when they are loaded, so that a build neither needs a
GPU nor times anything: the package says of its timing cache that it does nothing, and none is kept.
What is kept is what was compiled.
"""

from __future__ import annotations

from optfuse.backends.nvinfer import NvinferBackend

BACKEND = NvinferBackend(
    name="tensorrt-rtx",
    package="tensorrt_rtx",
    extra="rtx",
    oldest=(1, 1),
    targets=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    later_versions=False,  # NVIDIA's page on engine compatibility says so
    keeps="runtime",
)


def check_target(target: str) -> None:
    """Whether an engine can be built for `target`, e.g. `sm_89`. Needs no engine package.

    Raises:
        UsageError: it cannot, with the targets that can.
    """
    BACKEND.check_target(target)
