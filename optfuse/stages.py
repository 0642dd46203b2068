"""The nouns of the pipeline: one frozen dataclass for what stands between two of its arrows.

    Source -> LoadedModel -> Program -> Program' -> Artifact -> Measurement + Drift -> Report

Nothing here computes anything beyond what its own fields say, and nothing here imports torch, so
that the command line answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Variant = Literal["baseline", "optimized", "control"]
"""Which file a number is about: the export as it comes, ours, or the A/A control (the export as it
comes, run a second time)."""

Notify = Callable[[str, float | None], None]
"""Told what is going on: a description, and the fraction done where it is known."""


def silent(_description: str, _fraction: float | None = None) -> None:
    """A `Notify` that says nothing."""


@dataclass(frozen=True)
class InputSpec:
    """One `--input [NAME=]SHAPE[:DTYPE]`: an input's name (if given), shape and dtype name.

    A size in the shape is a number or the name of a `Dimension`.
    """

    name: str | None
    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Dimension:
    """One `--dim NAME=MIN:OPT:MAX`: a size that stays open from the least to the most, and is
    usually the one in between. Where least and most are the same, the name stands for a number."""

    name: str
    least: int
    usual: int
    most: int


@dataclass(frozen=True)
class Point:
    """Inputs of one choice of sizes for the open dimensions.

    Attributes:
        at: the sizes as text, e.g. `N=8` or `N=8, H=224`.
        args, kwargs: positional and keyword inputs of `forward`.
    """

    at: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenSizes:
    """Which sizes of a model's inputs are open, and inputs to try them on.

    Attributes:
        dimensions: each with a least and a most that differ.
        inputs: the model's inputs, with the dimensions' names among their sizes.
        points: inputs with all dimensions at their least, their usual and their most; where two of
            these are the same sizes, once.
        captures: inputs to capture the model on, the first that does.
    """

    dimensions: tuple[Dimension, ...]
    inputs: tuple[InputSpec, ...]
    points: tuple[Point, ...]
    captures: tuple[Point, ...]

    @property
    def arranged(self) -> tuple[tuple[InputSpec, ...], dict[str, InputSpec]]:
        """The inputs as `forward` takes them: positional and keyword."""
        positional = tuple(spec for spec in self.inputs if spec.name is None)
        return positional, {spec.name: spec for spec in self.inputs if spec.name is not None}

    @property
    def usual(self) -> Point:
        """The inputs of the sizes to be fastest at."""
        at = ", ".join(f"{each.name}={each.usual}" for each in self.dimensions)
        return next(point for point in self.points if point.at == at)


@dataclass(frozen=True)
class Normalization:
    """What `--normalize` says: one number, or one a channel, in the units of the raw pixels.

    Attributes:
        mean: what is taken off; (0.0,) where it is left out.
        std: what the rest is divided by; (1.0,) where it is left out.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Source:
    """Where a model comes from, as the user typed it.

    Attributes:
        text: the SOURCE argument, e.g. `models/googlenet.py:build` or `timm:resnet18`.
        weights: a `.safetensors`, `.pt` or `.pth` file, or None for the model's own weights.
        inputs: example inputs, or empty to use the source's `example_inputs()`.
        seed: seeds every random choice made while loading.
        trust: the user accepts that unpickling the weights file can run code.
        normalize: what is done to the model's images in front of it, or None for nothing.
        dimensions: what the names among the sizes of `inputs` stand for.
    """

    text: str
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()
    seed: int = 0
    trust: bool = False
    normalize: Normalization | None = None
    dimensions: tuple[Dimension, ...] = ()


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, with inputs that fit it.

    Attributes:
        name: a short name for reports, e.g. `googlenet`.
        module: the model itself; its parameters are the user's own and are never written.
        example_args: positional inputs of `forward`.
        example_kwargs: keyword inputs of `forward`.
        dynamic_shapes: as torch.export takes them, or None for static shapes.
        sizes: the dimensions that the user left open, or None where there are none.
    """

    name: str
    module: torch.nn.Module
    example_args: tuple[Any, ...]
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    sizes: OpenSizes | None = None


@dataclass(frozen=True)
class Involved:
    """Which nodes of the captured program a place in the graph has to do with.

    Attributes:
        operator: at the place, e.g. `batch_norm`.
        module: the path of the module it came from; empty where that is unknown.
        origins: what went into the operators that were replaced, or into the one that was refused.
        about: what else it is about: of a site, what took the place of these operators and had
            been there before; of a refusal, what the pass would have changed besides.
    """

    operator: str
    module: str
    origins: tuple[str, ...]
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rewrite:
    """What tells one rewrite from every other, whatever other rewrites come before it.

    Attributes:
        name: of the pass.
        options: those of the pass without which it would not be.
        origins: the nodes of the captured program that went into the operators it replaces.
    """

    name: str
    options: frozenset[str]
    origins: frozenset[str]


@dataclass(frozen=True)
class Site:
    """A place in the graph where a pass matched: the node's name and what was done there."""

    site: str
    note: str = ""
    involved: Involved | None = None
    rewrite: Rewrite | None = None


@dataclass(frozen=True)
class Refused:
    """A place in the graph that a pass left alone, and the reason as a user understands it."""

    site: str
    reason: str
    involved: Involved | None = None


@dataclass(frozen=True)
class Step:
    """One thing that was done to a program.

    Attributes:
        stage: `capture`, `pass`, `round` or `export`.
        name: of the pass, or of what was done.
        settings: the options it ran with.
        seconds: wall time, the proof included.
        operators_before, operators_after: operator counts around it.
        sites: every place it matched.
        refused: every place it left alone, with the reason.
        relative_l2: distance in float64 between the program before and after, the proof; None
            where nothing was rewritten.
        undone: why the step was taken back, or None where it stands.
    """

    stage: str
    name: str
    seconds: float
    operators_before: int
    operators_after: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    refused: tuple[Refused, ...] = ()
    relative_l2: float | None = None
    undone: str | None = None

    @property
    def matched(self) -> int:
        """How many places were rewritten."""
        return len(self.sites)


@dataclass(frozen=True)
class Program:
    """A captured model: functional ATen, parameters as `get_attr`.

    Attributes:
        name: a short name for reports.
        graph_module: what every pass reads and rewrites.
        exported: the same program as torch.export gives it, what ONNX is exported from.
        example_args, example_kwargs: inputs it runs on.
        dynamic_shapes: as torch.export takes them, or None.
        trace: everything that was done to it so far.
        sizes: the dimensions that the user left open, or None where there are none.
    """

    name: str
    graph_module: torch.fx.GraphModule
    exported: torch.export.ExportedProgram
    example_args: tuple[Any, ...]
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    trace: tuple[Step, ...] = ()
    sizes: OpenSizes | None = None

    def with_step(self, step: Step) -> Program:
        """The same program with one more step in its trace."""
        return replace(self, trace=(*self.trace, step))


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: as the engine names it.
        kind: its type, e.g. `correlation`.
        nodes: the ONNX nodes that went into it.
        details: anything else the builder says of it, as text.
        milliseconds: how long the layer alone takes on a GPU, as the engine's own profiler says;
            None where it was not run.
    """

    name: str
    kind: str
    nodes: tuple[str, ...] = ()
    details: str = ""
    milliseconds: float | None = None


@dataclass(frozen=True)
class EngineReport:
    """What an engine's builder said of the engine it built.

    Attributes:
        engine: the backend's name.
        target: e.g. `sm_89`, or the name of the device it was built on.
        variant: which ONNX file it was built from.
        layers: every layer, in the builder's order.
        activation_bytes, weight_bytes: memory as the builder reports it, or None.
        size_bytes: of the engine file.
        build_seconds: wall time of the build.
        not_measured: why there is no latency of it, or None.
    """

    engine: str
    target: str
    variant: Variant
    layers: tuple[EngineLayer, ...]
    activation_bytes: int | None
    weight_bytes: int | None
    size_bytes: int
    build_seconds: float
    not_measured: str | None = None

    @property
    def layers_by_type(self) -> dict[str, int]:
        """How many layers there are of each kind, the most frequent first."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.kind] = counts.get(layer.kind, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Artifact:
    """A file on disk.

    Attributes:
        path: where it is.
        kind: `onnx`, `weights` (the second file of a large ONNX file) or `engine`.
        sha256: of the file's bytes (of the main file, where weights lie in a second one).
        size_bytes: with its external data.
        variant: which program it holds.
        input_names, output_names: in the program's order; empty where it has none.
        trace: everything that was done to the program in it.
    """

    path: Path
    kind: Literal["onnx", "weights", "engine"]
    sha256: str
    size_bytes: int
    variant: Variant = "optimized"
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    trace: tuple[Step, ...] = ()


@dataclass(frozen=True)
class InputShapes:
    """The shapes that one input with open dimensions may have.

    Attributes:
        name: of the input, as the ONNX file has it.
        least, usual, most: its smallest shape, the one to be fastest at, and its largest.
    """

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built and run.

    Attributes:
        targets: compute capabilities to build ahead of time for, e.g. `("sm_89",)`; empty builds
            for the device that is here.
        threads: of a CPU engine, the same for every engine.
        cache: a folder that keeps timing caches between builds, or None for none.
        shapes: of each input with open dimensions, what an engine is built for.
        version_compatible: later versions of the engine's package can load the engine too.
        hardware_compatible: GPUs of later architectures can run the engine too.
    """

    targets: tuple[str, ...] = ()
    threads: int = 1
    cache: Path | None = None
    shapes: tuple[InputShapes, ...] = ()
    version_compatible: bool = False
    hardware_compatible: bool = False


@dataclass(frozen=True)
class Measurement:
    """Raw latency samples of one variant on one engine, warm-up excluded.

    Attributes:
        engine: the backend's name.
        variant: which program ran: a `Variant`, or whatever name tells it from the others.
        device: what really ran it, e.g. `cpu` or `NVIDIA H200`.
        blocks: milliseconds of every run, grouped by the interleaved block it ran in. Block i of
            one measurement was run next to block i of every other of the same call, so that they
            can be paired.
        at: the sizes of the open dimensions that it ran with, as `Point.at`; None where none is
            open.
    """

    engine: str
    variant: str
    device: str
    blocks: tuple[tuple[float, ...], ...]
    at: str | None = None

    @property
    def samples_ms(self) -> tuple[float, ...]:
        """All samples in the order they were taken, milliseconds."""
        return tuple(sample for block in self.blocks for sample in block)

    def __iter__(self) -> Iterator[float]:
        return iter(self.samples_ms)


@dataclass(frozen=True)
class Caveat:
    """Something that makes measured latencies doubtful; one sentence each, without a full stop.

    Attributes:
        kind: a short name to tell it from others, e.g. `bimodal` or `throttled`.
        about: what it concerns, e.g. `onnxruntime baseline` or `this machine`.
        finding: what was seen.
        cause: what is likely behind it.
        next_step: what to do about it.
    """

    kind: str
    about: str
    finding: str
    cause: str
    next_step: str


@dataclass(frozen=True)
class Drift:
    """The distance of one engine's outputs to a named reference, over all outputs together.

    Attributes:
        engine, variant: whose outputs.
        reference: what they were compared with, e.g. `float64 program`.
        relative_l2: ||y - ref|| / ||ref||.
        max_abs_over_max_ref: max |y - ref| / max |ref|.
        cosine: of the angle between y and ref.
        sqnr_db: signal to quantisation noise, 20 log10(||ref|| / ||y - ref||); None when exact.
        nonfinite: how many elements are NaN or infinite where the reference is finite.
        top1_agreement: share of rows with the same argmax, where an output looks like logits.
        at: the sizes of the open dimensions, as `Point.at`; None where none is open.
    """

    engine: str
    variant: str
    reference: str
    relative_l2: float
    max_abs_over_max_ref: float
    cosine: float
    sqnr_db: float | None
    nonfinite: int
    top1_agreement: float | None
    at: str | None = None


@dataclass(frozen=True)
class LayerDrift:
    """How far one layer's result is from the reference, at a place that both programs compute.

    Attributes:
        name: the node in the program that is looked at.
        kind: its operator, e.g. `conv2d`.
        module: the path of the module it came from, e.g. `inception3a.branch1`; empty if unknown.
        equals: the nodes of the reference program whose value it computes.
        origins: every node of the reference program that went into it.
        shape: of its result.
        relative_l2: its distance to the reference.
        own_relative_l2: the distance of the unchanged program's result, in the model's own
            precision, to the same reference; None where there is none to compare with.
        growth: how many times the usual error it adds: its own error when it is fed with the
            reference's values, over that of the unchanged program's layer fed alike; None where
            there is nothing to divide by.
    """

    name: str
    kind: str
    module: str
    equals: tuple[str, ...]
    origins: tuple[str, ...]
    shape: tuple[int, ...]
    relative_l2: float
    own_relative_l2: float | None
    growth: float | None


@dataclass(frozen=True)
class LayerDrifts:
    """The drift of every layer, in the order they run.

    Attributes:
        engine: what ran the program that is looked at.
        reference: what the layers were compared with.
        rows: every layer that could be compared.
        suspect: the name of the first row whose error grows out of proportion, or None.
        limit: the growth from which a layer is a suspect.
        at: the sizes of the open dimensions, as `Point.at`; None where none is open.
    """

    engine: str
    reference: str
    rows: tuple[LayerDrift, ...]
    suspect: str | None
    limit: float
    at: str | None = None


@dataclass(frozen=True)
class LayerEvent:
    """What one pass did to a layer, or why it did not.

    Attributes:
        name: of the pass.
        what: `rewritten`, `refused`, or `undone` where it was taken back.
        text: what was done, or the reason, as the pass says it.
        at: the places, e.g. `batch_norm (features.norm)`, where they are not the layer itself.
        took_in: modules or operators that first became one with the layer here.
        together: other layers that had to do with it here for the first time, the first 50.
    """

    name: str
    what: Literal["rewritten", "refused", "undone"]
    text: str
    at: tuple[str, ...] = ()
    took_in: tuple[str, ...] = ()
    together: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerHistory:
    """What became of one convolution or linear layer of the captured program.

    Attributes:
        label: what to call it; no two layers are called the same.
        name: of its node in the captured program.
        module: the path of the module it came from; empty for the model itself or if unknown.
        call, calls: the number of this call of that module, from 1, and how many there are.
        operator: e.g. `conv2d`.
        settings: e.g. `3x3 32->64, stride 2`.
        source: file and line of the code that called it, e.g. `net.py:31`; empty if unknown.
        within: the operator it is inside of, where that is one that no pass looks into; else empty.
        events: what the passes did, in the order they did it, and then what they refused.
        became: the operators of the optimized program that it is part of.
        one_with: the other layers of the captured program that are part of these operators, the
            first 50.
        gone: why it is no operator any more, or None where it is one.
    """

    label: str
    name: str
    module: str
    call: int
    calls: int
    operator: str
    settings: str
    source: str
    within: str
    events: tuple[LayerEvent, ...]
    became: tuple[str, ...]
    one_with: tuple[str, ...] = ()
    gone: str | None = None


@dataclass(frozen=True)
class Report:
    """One run as one versioned JSON document; every rendering shows this and nothing else."""

    document: Mapping[str, Any]
