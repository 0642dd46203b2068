"""Recordings of CUDA graphs, with fakes for what only a GPU has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from optfuse.backends.cuda_recording import recorded


class Graph:
    def __init__(self) -> None:
        self.replays: list[Any] = []

    def replay(self) -> None:
        self.replays.append(CURRENT[-1])


CURRENT: list[Any] = [None]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Those that are made, on a GPU whose capture fails for the stream `stuck`."""
    made: list[Graph] = []

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    @contextmanager
    def capture(graph: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        yield
        if stream == "stuck":
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        CURRENT.append(stream)
        yield
        CURRENT.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return made


def test_what_is_queued_is_recorded_once_and_played_back_on_its_stream(graphs: list[Graph]) -> None:
    queued: list[Any] = []
    play = recorded(lambda stream: queued.append(stream) is None, "its own")
    assert play is not None
    play()
    play()
    assert queued == ["its own"]
    assert [graph.replays for graph in graphs] == [["its own", "its own"]]


def test_what_cannot_be_recorded_is_none(graphs: list[Graph]) -> None:
    assert recorded(lambda stream: True, "stuck") is None
    assert recorded(lambda stream: False, "its own") is None
