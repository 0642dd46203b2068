"""TensorRT 10 and 11, of the package `tensorrt`: builds on the GPU that it will run on."""

from __future__ import annotations

from optfuse.backends import Backend
from optfuse.backends.nvinfer import NvinferBackend

BACKEND: Backend = NvinferBackend(
    name="tensorrt",
    package="tensorrt",
    extra="gpu",
    oldest=(10, 8),
    later_versions=True,
    keeps="timing",
)
