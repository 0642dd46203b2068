"""What a search for a mixture asks for: the drift of a choice of layers, and the times of several.

Whoever knows a precision gives a callable that makes the network with some layers kept high: a
program (`floats.Lowering.program`), or an ONNX file (`int8_written`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from optfuse import backends
from optfuse.compare import drift
from optfuse.files import writing
from optfuse.float64 import run_float64
from optfuse.measure import Schedule, measure
from optfuse.precision.int8 import Ranges, quantize
from optfuse.precision.mixed import DriftOf, TimesOf
from optfuse.stages import Artifact, BuildOptions, Notify, Program, silent

Sample = Sequence[torch.Tensor]
"""One run's inputs, in the program's order."""

Made = Callable[[Collection[str]], Program]
"""Names of the layers that stay high -> the program with all others low."""

Written = Callable[[Collection[str], Path], Artifact]
"""The same, as an ONNX file at a path."""

MOST_CALIBRATING, MOST_JUDGING = 256, 64
"""How many samples serve for what. A search runs the second kind up to 150 times."""

T = TypeVar("T")


def split(samples: Sequence[T]) -> tuple[list[T], list[T]]:
    """Part samples into those to calibrate on and those to judge by, every other one each.

    More than there is need for are passed over evenly. What was calibrated on flatters: a value
    beyond the range it had there cannot occur. One sample alone has to serve for both.

    Returns:
        At most `MOST_CALIBRATING` and at most `MOST_JUDGING`, in their order.
    """
    if len(samples) < 2:
        return list(samples), list(samples)
    return _spread(samples[::2], MOST_CALIBRATING), _spread(samples[1::2], MOST_JUDGING)


def float64_outputs(program: Program, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """What the captured program gives in float64, the outputs of all samples one after the other:
    the reference of every drift here.

    Args:
        program: as captured, whose structure of inputs the samples have.
    """
    return [
        output
        for sample in samples
        for output in run_float64(program.graph_module, *_call(program, sample))
        if isinstance(output, torch.Tensor)
    ]


def program_drift(
    made: Made, samples: Sequence[Sample], reference: Sequence[torch.Tensor]
) -> DriftOf:
    """The drift of a program as PyTorch runs it here, over all samples together.

    Args:
        made: e.g. `floats.Lowering(program, "bf16").program`.
        samples: to judge by.
        reference: what `float64_outputs` gave for them.
    """

    @torch.no_grad()
    def measured(high: Collection[str]) -> float:
        program = made(high)
        outputs = [
            output
            for sample in samples
            for output in _run(program, sample)
            if isinstance(output, torch.Tensor)
        ]
        return _relative_l2(outputs, reference, "torch")

    return measured


def int8_written(artifact: Artifact, ranges: Ranges, scheme: str) -> Written:
    """Writes variants of an ONNX file in int8, see `int8.quantize`."""

    def written(high: Collection[str], path: Path) -> Artifact:
        return quantize(artifact, ranges, path, high=high, scheme=scheme)

    return written


def file_drift(
    written: Written,
    samples: Sequence[Sample],
    reference: Sequence[torch.Tensor],
    *,
    engine: str = "onnxruntime",
    threads: int = 1,
) -> DriftOf:
    """The drift of an ONNX file as an engine runs it, over all samples together.

    Args:
        written: e.g. what `int8_written` gave.
        samples: to judge by.
        reference: what `float64_outputs` gave for them.
        engine: a backend that opens ONNX files. ONNX Runtime follows the roundings of a file of
            every scheme.
        threads: of the engine.
    """

    def measured(high: Collection[str]) -> float:
        with _temporary() as folder:
            artifact = written(high, folder / "trial.onnx")
            with backends.get(engine).open(artifact, BuildOptions(threads=threads)) as session:
                outputs = []
                for sample in samples:
                    session.bind(sample)
                    session.run()
                    outputs += session.fetch()
        return _relative_l2(outputs, reference, engine)

    return measured


def file_times(
    written: Written,
    sample: Sample,
    *,
    engine: str,
    options: BuildOptions,
    schedule: Schedule | None = None,
    seed: int = 0,
    notify: Notify = silent,
) -> TimesOf:
    """Median milliseconds of several ONNX files on an engine, in one interleaved run.

    Args:
        written: e.g. what `int8_written` gave.
        sample: the inputs that all of them run on.
        engine: a backend that opens ONNX files.
        options, schedule, seed: as `measure` and `Backend.open` take them.
    """

    def timed(choices: Sequence[Collection[str]]) -> list[float]:
        with _temporary() as folder, ExitStack() as sessions:
            opened = []
            for index, high in enumerate(choices):
                artifact = written(high, folder / f"trial_{index}.onnx")
                session = sessions.enter_context(backends.get(engine).open(artifact, options))
                session.bind(sample)
                opened.append((engine, f"candidate {index}", session))
            found = measure(opened, schedule=schedule, seed=seed, notify=notify)
        return [median(each.samples_ms) for each in found]

    return timed


def program_times(
    made: Made,
    sample: Sample,
    *,
    engine: str,
    options: BuildOptions,
    schedule: Schedule | None = None,
    seed: int = 0,
    notify: Notify = silent,
) -> TimesOf:
    """Median milliseconds of several programs on an engine that runs programs, in one interleaved
    run.

    Args:
        made: e.g. `floats.Lowering(program, "bf16").program`.
        sample: the inputs that all of them run on.
        engine: a backend that opens programs.
        options, schedule, seed: as `measure` and `Backend.open` take them.
    """

    def timed(choices: Sequence[Collection[str]]) -> list[float]:
        with ExitStack() as sessions:
            opened = []
            for index, high in enumerate(choices):
                session = sessions.enter_context(backends.get(engine).open(made(high), options))
                session.bind(sample)
                opened.append((engine, f"candidate {index}", session))
            found = measure(opened, schedule=schedule, seed=seed, notify=notify)
        return [median(each.samples_ms) for each in found]

    return timed


def _spread(samples: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly."""
    count = min(most, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def _call(program: Program, sample: Sample) -> Any:
    """The arguments and keyword arguments: the program's examples with the sample's tensors."""
    examples = (tuple(program.example_args), dict(program.example_kwargs))
    leaves, structure = pytree.tree_flatten(examples)
    tensors = iter(sample)
    taken = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(taken, structure)


def _run(program: Program, sample: Sample) -> list[Any]:
    args, kwargs = _call(program, sample)
    return pytree.tree_leaves(program.graph_module(*args, **kwargs))


def _relative_l2(
    outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], engine: str
) -> float:
    found = drift(
        outputs, reference, engine=engine, variant="trial", reference_name="float64 program"
    )
    return found.relative_l2


@contextmanager
def _temporary() -> Iterator[Path]:
    room = writing("A trial's files", Path(tempfile.gettempdir()))
    with room, tempfile.TemporaryDirectory(prefix="optfuse-") as folder:
        yield Path(folder)
