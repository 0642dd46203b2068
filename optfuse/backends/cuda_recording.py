"""A CUDA graph of what an engine queues on a stream, for shapes and addresses that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def recorded(queue: Callable[[Any], bool], stream: Any) -> Callable[[], None] | None:
    """Record what is queued on a stream, to play it back without waiting for the CPU.

    Args:
        queue: queues one run on the stream it is given, and says whether that worked. It has to
            have run once before on these shapes, so that nothing is allocated or chosen any more.
        stream: a `torch.cuda.Stream`.

    Returns:
        What plays it back on that stream; None where it cannot be recorded, e.g. because the
        engine waits for the CPU in the middle.
    """
    import torch

    cuda: Any = torch.cuda
    graph = cuda.CUDAGraph()
    try:
        # thread_local: what other threads do to the GPU meanwhile is none of its business.
        with cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            queued = queue(stream)
    except RuntimeError:
        return None
    if not queued:
        return None

    def replay() -> None:
        with cuda.stream(stream):
            graph.replay()

    return replay
