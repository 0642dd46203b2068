"""Memory of a large model, given back to the system as soon as nothing needs it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import onnx.parser
import onnxscript.optimizer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, as malloc.h numbers them."""

_MAPPED_FROM_BYTES = 256 * 2**10
"""Small enough for nearly all of a large model's parameters, and so large that the few thousand
blocks of a model stay far below Linux's limit of 65530 mappings."""

_GLIBC_MAPS_FROM_BYTES = 32 * 2**20
"""Where glibc itself takes M_MMAP_THRESHOLD at most, in a process that frees large blocks."""

_ANOTHER_MODEL = """
<ir_version: 8, opset_import: ["": 18]> another (float[1] x) => (float[1] y) { y = Relu(x) }
"""


@contextmanager
def freed_at_once(large: bool) -> Iterator[None]:
    """With a large model: give memory back to the system the moment that it is freed.

    By itself glibc keeps freed blocks of up to 32 MiB for later ones. Once something small has
    taken a piece of one, the next large one does not fit in any more, and whether the passes took
    3.1 or 5.0 times the parameters was a matter of luck. Not while latency is measured: a mapping
    made for each activation would cost eager PyTorch time that it does not take elsewhere.
    """
    if not large:
        yield
        return
    _glibc("mallopt", _M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
    try:
        yield
    finally:
        _glibc("mallopt", _M_MMAP_THRESHOLD, _GLIBC_MAPS_FROM_BYTES)
        _glibc("mallopt", _M_TRIM_THRESHOLD, 2 * _GLIBC_MAPS_FROM_BYTES)


def give_back() -> None:
    """Free what only caches and reference cycles still hold, and tell the system so."""
    # onnxscript's rewrite rules live as long as the process and hold the graph that they looked at
    # last, whose nodes hold the program that was exported: they get another one to look at.
    onnxscript.optimizer.optimize(onnx.parser.parse_model(_ANOTHER_MODEL))
    gc.collect()  # graph modules are in reference cycles
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function that glibc has; other C libraries have no such function, nor need it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
