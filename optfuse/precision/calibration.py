"""ONNX file x samples -> Ranges: between which numbers each of its values lay, taken once.

Smallest and largest, and not a percentile or the least entropy: on the trained network in
`models/`, calibrated on 256 real images, they leave a drift of 0.026 (ONNX Runtime's scheme), the
99.999 % percentile 0.025, the 99.99 % one 0.033, the 99.9 % one 0.088, a moving average 0.094, and
the least entropy 0.17 (2048 bins). The first percentile is hardly better, and has to keep every
number of every sample.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from optfuse.backends.onnx_runtime import package
from optfuse.errors import EngineError, UsageError
from optfuse.export import EMBED_LIMIT_BYTES
from optfuse.files import writing
from optfuse.float64 import random_inputs
from optfuse.graph import flat_inputs
from optfuse.stages import Artifact, Caveat, Notify, Program, silent

if TYPE_CHECKING:
    from onnxruntime.quantization import MinMaxCalibrater

METHOD = "smallest and largest"

INFERRED = "onnx.infer"
"""Key of what onnxruntime.quantization writes into a file's metadata for its own use."""

DRAWN = Caveat(
    kind="random-calibration",
    about="int8",
    finding="The ranges of all values were taken from random inputs",
    cause="No data was given, and random calibration was asked for",
    next_step="Calibrate on real inputs with --data before trusting the drift or the outputs",
)
"""What goes with every number about a network that was calibrated on random inputs."""


@dataclass(frozen=True)
class Ranges:
    """Between which numbers the values of one ONNX file lay while it ran on some samples.

    Attributes:
        sha256: of the file.
        spans: (smallest, largest) of every float32 value; NaN where it was not finite once.
        samples: how many there were.
        caveat: `DRAWN` where the samples were random.
        model: the file with the shapes of all its values, parameters included; never written to.
    """

    sha256: str
    spans: Mapping[str, tuple[float, float]]
    samples: int
    caveat: Caveat | None
    model: onnx.ModelProto = field(repr=False, compare=False)


def calibrate(
    artifact: Artifact,
    samples: Sequence[Sequence[torch.Tensor]],
    *,
    drawn: bool = False,
    threads: int = 1,
    notify: Notify = silent,
) -> Ranges:
    """Run an ONNX file on samples and note the range of every value in it.

    Args:
        artifact: what `export` wrote.
        samples: for each run, one tensor an input, as `read_samples` and `random_samples` give.
        drawn: they are random; the result then carries a caveat.
        threads: of ONNX Runtime.

    Raises:
        UsageError: there is no sample, they are all equal, all numbers of the inputs are equal, or
            one is NaN or infinite.
        EngineError: onnxruntime is missing, or cannot run the file on them.
        OutputError: there is no room for temporary files.
    """
    require_onnxruntime()
    _check(samples, artifact.input_names)
    room = writing("The calibration's files", Path(tempfile.gettempdir()))
    with room, quiet(), tempfile.TemporaryDirectory(prefix="optfuse-") as folder:
        calibrater, model = _calibrater(artifact.path, Path(folder), threads)
        watched = _Watched(calibrater.infer_session)
        calibrater.infer_session = watched
        try:
            calibrater.collect_data(_Reader(artifact.input_names, samples, notify))
        except Exception as error:  # its exceptions have no public base class
            raise _failed(artifact.path, error) from error
        found = calibrater.compute_data()
    spans = {name: (data.lowest.item(), data.highest.item()) for name, data in found.items()}
    spans.update(dict.fromkeys(watched.not_finite & spans.keys(), (np.nan, np.nan)))
    return Ranges(artifact.sha256, spans, len(samples), DRAWN if drawn else None, model)


def random_samples(program: Program, seed: int, count: int = 16) -> list[list[torch.Tensor]]:
    """Seeded random inputs like a program's examples, to calibrate on where there is nothing else.

    Args:
        program: whose inputs they are.
        seed: of the first sample; the next ones count on.
        count: how many.
    """
    drawn = [
        random_inputs(program.example_args, program.example_kwargs, seed + index)
        for index in range(count)
    ]
    return [
        [each for each in flat_inputs(program.graph_module, *one) if isinstance(each, torch.Tensor)]
        for one in drawn
    ]


def require_onnxruntime() -> None:
    """What rounds to int8 is part of ONNX Runtime.

    Raises:
        EngineError: it is not installed.
    """
    if find_spec("onnxruntime") is None:
        raise EngineError(
            "Nothing can be written in int8 here",
            "The package onnxruntime is not installed",
            "Run: pip install 'optfuse[cpu]'",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what onnxruntime.quantization logs and prints off the terminal.

    It logs with the root logger, which would get a handler of its own if it had none.
    """
    root, nowhere = logging.getLogger(), logging.NullHandler()
    level = root.level
    root.addHandler(nowhere)
    root.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(nowhere)


def _check(samples: Sequence[Sequence[torch.Tensor]], names: Sequence[str]) -> None:
    if not samples:
        raise _refused(
            "There is no data to take them from",
            "Give real inputs with --data, or ask for random calibration",
        )
    for number, sample in enumerate(samples):
        for name, tensor in zip(names, sample, strict=True):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise _refused(
                    f"Sample {number} of the input '{name}' has NaN or infinity in it",
                    "Save the data again without it",
                )
    first = samples[0]
    same = all(all(map(torch.equal, first, other)) for other in samples[1:])
    if len(samples) > 1 and same:
        raise _refused(
            f"All {len(samples)} samples are equal",
            "Give different inputs, of the kind that the model is made for",
        )
    floats = [tensor for tensor in first if tensor.is_floating_point() and tensor.numel() > 1]
    # Where others vary, one that does not can be a mask that keeps everything.
    if floats and all(
        _constant([sample[index] for sample in samples])
        for index, tensor in enumerate(first)
        if any(tensor is each for each in floats)
    ):
        raise _refused(
            f"Every number in it is {floats[0].flatten()[0].item():g}",
            "Give real inputs, of the kind that the model is made for",
        )


def _constant(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all numbers in all of them are the same."""
    first = tensors[0].flatten()[0]
    return all(bool((tensor == first).all()) for tensor in tensors)


def _refused(cause: str, next_step: str) -> UsageError:
    return UsageError("The ranges for int8 cannot be taken from the data", cause, next_step)


def _calibrater(path: Path, folder: Path, threads: int) -> tuple[MinMaxCalibrater, onnx.ModelProto]:
    """The library's, ready to run in a session of ours, and the file with all its shapes.

    The library writes beside the file it is given, so it is given a copy.
    """
    onnxruntime = package()
    from onnxruntime.quantization import MinMaxCalibrater

    copied, augmented = folder / "model.onnx", folder / "augmented.onnx"
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's, and those of a missing file
        raise _failed(path, error) from error
    beside = model.ByteSize() > EMBED_LIMIT_BYTES
    onnx.save(model, copied, save_as_external_data=beside)
    calibrater = MinMaxCalibrater(
        copied, augmented_model_path=str(augmented), use_external_data_format=beside
    )
    model = onnx.ModelProto()
    model.CopyFrom(calibrater.model)
    calibrater.augment_graph()
    options = onnxruntime.SessionOptions()
    # Every value of the file is there to be looked at, unfused.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    calibrater.infer_session = onnxruntime.InferenceSession(
        str(augmented), sess_options=options, providers=["CPUExecutionProvider"]
    )
    return calibrater, model


def _failed(path: Path, error: Exception) -> EngineError:
    return EngineError(
        f"The ranges for int8 cannot be taken: '{path.name}' does not run on the data",
        " ".join(str(error).split()) or type(error).__name__,
        "Check the values in the data, such as indices beyond a table, and its shapes",
    )


class _Reader:
    """Hands the samples over as onnxruntime.quantization asks for them."""

    def __init__(
        self, names: Sequence[str], samples: Sequence[Sequence[torch.Tensor]], notify: Notify
    ) -> None:
        self._names, self._samples, self._notify = names, samples, notify
        self._next = 0

    def get_next(self) -> dict[str, Any] | None:
        """The next sample's arrays by their names; None after the last."""
        if self._next == len(self._samples):
            return None
        self._notify("Calibrating", self._next / len(self._samples))
        sample = self._samples[self._next]
        self._next += 1
        return {name: each.cpu().numpy() for name, each in zip(self._names, sample, strict=True)}


class _Watched:
    """A session that remembers whose smallest or largest was NaN or infinite in any run: merging
    the runs, the library passes NaN over."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.not_finite: set[str] = set()

    def get_outputs(self) -> Any:
        """Of the session."""
        return self._session.get_outputs()

    def run(self, names: Any, feeds: Any) -> Any:
        """Run the session."""
        values = self._session.run(names, feeds)
        for output, value in zip(self._session.get_outputs(), values, strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                self.not_finite.add(output.name.rpartition("_Reduce")[0])
        return values
