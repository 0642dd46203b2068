"""What makes the tests faster: what PyTorch works out anew for every network is worked out once for
all of them, and rounds of measuring can be short.

Most tests capture a network of a few layers, and many export it. Far more than half of what that
takes depends on no network, and comes out the same every time.
"""

from __future__ import annotations

import functools
import gc
import typing
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch


def pytest_collection_finish(session: pytest.Session) -> None:
    for work in (
        _annotate_cheaply,
        _materialize_composite_operators_once,
        _read_the_onnx_operators_once,
    ):
        # All of it is private to PyTorch. Where a release has it elsewhere, tests take longer.
        with suppress(ImportError, AttributeError):
            work()
    _leave_the_imports_out_of_every_collection()


def _leave_the_imports_out_of_every_collection() -> None:
    """They made a million objects, which stay. And collect more seldom: a capture makes tens of
    thousands of objects, and nearly all of them die by themselves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _annotate_cheaply() -> None:
    """`run_decompositions` registers thousands of kernels with a decorator whose annotations are
    evaluated each time. typing keeps a `Callable[...]` that it has made; collections.abc does not.
    """
    torch._ops.Callable = typing.Callable


def _materialize_composite_operators_once() -> None:
    """`run_decompositions` looks up each composite operator, once for every namespace."""
    from torch._export import utils

    materialize = utils._materialize_cpp_cia_ops
    known: list[str] = []

    def materialize_if_there_are_others() -> None:
        registered = torch._C._dispatch_get_registrations_for_dispatch_key(
            "CompositeImplicitAutograd"
        )
        if registered != known:
            materialize()
            known[:] = registered

    utils._materialize_cpp_cia_ops = materialize_if_there_are_others


def _read_the_onnx_operators_once() -> None:
    """`torch.onnx.export` parses the source of 500 functions of onnxscript. Each export still gets
    a registry of its own, since it adds to it what the operators of our own become."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    @staticmethod
    def from_torchlib(*args: int, **kwargs: int) -> ONNXRegistry:
        kept = read(*args, **kwargs)
        registry = ONNXRegistry()
        registry._opset_version = kept.opset_version
        registry.functions = {target: list(metas) for target, metas in kept.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = from_torchlib


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rounds as ever, a millisecond each: for what does not look at the times."""

    def quickly(sessions: Any, *, schedule: Any, **options: Any) -> Any:
        short = replace(schedule, block_ms=1.0, warmup_ms=1.0)
        return measure(sessions, schedule=short, **options)

    measure = import_module("optfuse.measure").measure
    for name in ("optfuse.trial", "optfuse.ablate", "optfuse.precision.trials"):
        monkeypatch.setattr(import_module(name), "measure", quickly)
