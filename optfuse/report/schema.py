"""The report as one versioned JSON document: put together, written as text and read back.

The document is described by `report.schema.json` beside this file, and every rendering shows that
document and nothing else. It is strict JSON: a number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from optfuse import stats
from optfuse.builder_findings import BuilderFinding
from optfuse.errors import OptfuseError
from optfuse.recommend import Recommendation
from optfuse.stages import (
    Artifact,
    Caveat,
    Dimension,
    Drift,
    EngineReport,
    InputSpec,
    LayerDrifts,
    LayerHistory,
    Measurement,
    Report,
    Site,
    Source,
    Step,
)

SCHEMA_VERSION = 2
"""Raised by one whenever a key changes its meaning, goes away, or a new one must be there; `parse`
brings older documents up to it.

1: `optimize` alone, without `kind`, `warnings`, `layers` and `ablation`.
"""

SCHEMAS = {
    "optimize": "report.schema.json",
    "bench": "bench.schema.json",
    "diff": "diff.schema.json",
}
"""A document's `kind` -> the file of its JSON Schema, beside this one."""

_LINE_LENGTH = 100


@dataclass(frozen=True)
class ProgramCounts:
    """What a program consists of.

    Attributes:
        operators_by_type: how many operators of each type it has; their sum is the operator count.
        parameters: how many numbers its parameters and constants hold.
        flops: floating-point operations of one run on the example inputs, or None if not counted.
    """

    operators_by_type: Mapping[str, int]
    parameters: int
    flops: int | None

    @property
    def operators(self) -> int:
        """How many operators it has."""
        return sum(self.operators_by_type.values())


@dataclass(frozen=True)
class Comparison:
    """One variant on one engine, compared with another: how many times as fast it is.

    Attributes:
        engine, variant: what is compared.
        against_engine, against: the engine and the variant it is compared with.
        ratio: paired, above 1 where `engine`, `variant` is the faster one.
        at: the sizes of the open dimensions, as `Point.at`; None where none is open.
    """

    engine: str
    variant: str
    against_engine: str
    against: str
    ratio: stats.Ratio
    at: str | None = None


@dataclass(frozen=True)
class NoiseFloor:
    """The A/A control of one engine: its baseline compared with itself.

    Attributes:
        engine: the backend's name.
        control: the ratio of the baseline to itself, measured like every other.
        at: the sizes of the open dimensions, as `Point.at`; None where none is open.
    """

    engine: str
    control: stats.Ratio
    at: str | None = None


@dataclass(frozen=True)
class NotMeasured:
    """A latency that is missing, and the reason, e.g. `no GPU`.

    Attributes:
        engine: the backend's name.
        variant: which program was not run, or None for all of them.
        target: e.g. `sm_89`, or None where the engine knows no targets.
        reason: why, as a user understands it.
        at: the sizes of the open dimensions, as `Point.at`; None for all of them.
    """

    engine: str
    variant: str | None
    target: str | None
    reason: str
    at: str | None = None


@dataclass(frozen=True)
class Ablated:
    """One choice of passes, measured against the export as it comes.

    Attributes:
        engine: the backend's name.
        how: `alone` (this pass and no other), `without` (all but this one) or `up_to` (this one and
            all before it).
        name: the pass.
        passes: the passes that ran.
        operators: how many the program has after them.
        same_as: but for names, the program or file is that of this other choice (`baseline`, or
            `without elide_concat`), which was measured for both; None where it was measured itself.
        measurement: raw samples, from the same interleaved run as all others.
        ratio: paired, to the export as it comes; above 1 is faster.
        noise_floor: of this engine in that run, at least 1.
        drift: of its outputs from the reference.
    """

    engine: str
    how: Literal["alone", "without", "up_to"]
    name: str
    passes: tuple[str, ...]
    operators: int
    same_as: str | None
    measurement: Measurement
    ratio: stats.Ratio
    noise_floor: float
    drift: Drift | None


def assemble(
    *,
    name: str,
    source: Source,
    command: Sequence[str],
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Sequence[InputSpec],
    before: ProgramCounts,
    after: ProgramCounts,
    steps: Sequence[Step],
    dimensions: Sequence[Dimension] = (),
    drifts: Sequence[Drift] = (),
    measurements: Sequence[Measurement] = (),
    comparisons: Sequence[Comparison] = (),
    noise_floors: Sequence[NoiseFloor] = (),
    engine_reports: Sequence[EngineReport] = (),
    artifacts: Sequence[Artifact] = (),
    not_measured: Sequence[NotMeasured] = (),
    warnings: Sequence[Caveat] = (),
    layers: LayerDrifts | None = None,
    ablation: Sequence[Ablated] = (),
    histories: Sequence[LayerHistory] = (),
    precision: Mapping[str, Any] | None = None,
    recommendation: Recommendation | None = None,
    builder_findings: Mapping[tuple[str, str], Sequence[BuilderFinding]] | None = None,
    directory: Path | None = None,
    created: datetime | None = None,
) -> Report:
    """Put everything one run found into one document.

    Args:
        name: the model's short name.
        source: where the model came from.
        command: the command line that gives this report again, one argument each.
        environment: hardware, driver and versions.
        settings: at least `passes`, `seed`, `threads` and `targets`.
        inputs: the example inputs, in the program's order.
        before, after: counts of the captured and of the optimized program.
        steps: the program's trace.
        dimensions: what the names among the sizes of the inputs stand for.
        drifts: distances to the reference, of baseline and optimized.
        measurements: raw latency samples; every statistic is derived from them here.
        comparisons: paired ratios; the verdicts are derived here.
        noise_floors: the A/A control of each engine.
        engine_reports: what the builders said.
        artifacts: files that were written.
        not_measured: latencies that are missing; what the engine reports say of that is added.
        warnings: what makes the latencies doubtful.
        layers: drift layer by layer, or None where it was not taken.
        ablation: what each pass earned, where that was measured.
        histories: what became of every convolution.
        precision: what `precision.lowered.told` says of it, or None in float32.
        recommendation: what to deploy, where that was asked for.
        builder_findings: engine and target -> what its builder does by itself.
        directory: artifact paths inside it are written relative to it, so that the folder can move.
        created: when, now by default.
    """
    floors = {(each.engine, each.at): stats.noise_floor(each.control) for each in noise_floors}
    document = {
        **header("optimize", command, created),
        "source": _source(source),
        "settings": settings,
        "environment": environment,
        "program": _program(name, inputs, dimensions, before, after),
        "steps": [step_document(step) for step in steps],
        "drift": [_drift(drift, drifts) for drift in drifts],
        "latency": [_latency(measurement) for measurement in measurements],
        "speedups": [_speedup(comparison, floors) for comparison in comparisons],
        "noise_floors": [
            {
                "engine": each.engine,
                **_where(each.at),
                **asdict(each.control),
                "floor": floors[each.engine, each.at],
            }
            for each in noise_floors
        ],
        "engines": [_engine(report) for report in engine_reports],
        "artifacts": [_artifact(artifact, directory) for artifact in artifacts],
        "not_measured": _missing(not_measured, engine_reports),
        "warnings": [asdict(caveat) for caveat in warnings],
        "layers": None if layers is None else layers_document(layers),
        "ablation": [_ablated(each) for each in ablation],
        "precision": precision,
        "recommendation": None if recommendation is None else asdict(recommendation),
        "builder_findings": [
            {"engine": engine, "target": target, **asdict(each)}
            for (engine, target), found in (builder_findings or {}).items()
            for each in found
        ],
        "convolutions": [history_document(each) for each in histories],
    }
    return Report(strict(document))


def header(kind: str, command: Sequence[str], created: datetime | None = None) -> dict[str, Any]:
    """What every document begins with.

    Args:
        kind: one of `SCHEMAS`.
        command: the command line that gives this report again, one argument each.
        created: when, now by default.
    """
    created = created or datetime.now(timezone.utc)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "created": created.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def dump(report: Report) -> str:
    """The document as JSON text: keys in the document's own order, two spaces a level.

    Whatever fits on one line stands on one line, and so does every list of numbers, so that a
    thousand latency samples don't hide the rest.
    """
    return _lines(strict(report.document), "") + "\n"


def parse(text: str) -> Report:
    """Read a document of any kind back, brought up to this version.

    Raises:
        OptfuseError: the text is not strict JSON, not a report of this or an older optfuse, or not
            what the JSON Schema of its kind asks for.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"It is not valid JSON: {error}") from None
    if not isinstance(document, dict) or type(document.get("schema_version")) is not int:
        raise OptfuseError(
            "The report cannot be read",
            "It is JSON, but it has no 'schema_version', so it is not a report of optfuse",
            "Give the report.json that 'optfuse optimize' wrote",
        )
    version = document["schema_version"]
    if version > SCHEMA_VERSION:
        raise OptfuseError(
            "The report cannot be read",
            f"Its schema version is {version}, and this optfuse reads up to {SCHEMA_VERSION}",
            "Update with 'pip install --upgrade optfuse'",
        )
    if version < 1:
        raise _unreadable(f"There never was a schema version {version}")
    document = _upgraded(document)
    if str(document.get("kind")) not in SCHEMAS:
        raise _unreadable(f"Its 'kind' is none of {', '.join(SCHEMAS)}")
    _validate(document)
    return Report(document)


def json_schema(kind: str = "optimize") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every document of that kind satisfies."""
    text = resources.files("optfuse.report").joinpath(SCHEMAS[kind]).read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def step_document(step: Step) -> dict[str, Any]:
    """One step as it stands in the document."""
    document = {
        "stage": step.stage,
        "name": step.name,
        "settings": step.settings,
        "matched": step.matched,
        "sites": [_site_document(site) for site in step.sites],
        "refused": [asdict(refused) for refused in step.refused],
        "operators_before": step.operators_before,
        "operators_after": step.operators_after,
        "seconds": step.seconds,
        "relative_l2": step.relative_l2,
        "undone": step.undone,
    }
    plain: dict[str, Any] = strict(document)
    return plain


def _site_document(site: Site) -> dict[str, Any]:
    plain = asdict(site)
    del plain["rewrite"]  # what it is made of stands in `involved`
    return plain


def history_document(history: LayerHistory) -> dict[str, Any]:
    """What became of one layer, as it stands in the document."""
    plain: dict[str, Any] = strict(asdict(history))
    return plain


def layers_document(layers: LayerDrifts) -> dict[str, Any]:
    """The drift of every layer, as it stands in the document."""
    return {**_without_at(asdict(layers)), **_where(layers.at)}


def _source(source: Source) -> dict[str, Any]:
    plain = asdict(source)
    if not source.dimensions:
        del plain["dimensions"]
    return plain


def _where(at: str | None) -> dict[str, str]:
    """What a row has that belongs to one choice of sizes; nothing where no dimension is open."""
    return {} if at is None else {"at": at}


def _without_at(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "at"}


def _program(
    name: str,
    inputs: Sequence[InputSpec],
    dimensions: Sequence[Dimension],
    before: ProgramCounts,
    after: ProgramCounts,
) -> dict[str, Any]:
    opened = {"dimensions": [asdict(each) for each in dimensions]} if dimensions else {}
    return {
        "name": name,
        "inputs": [asdict(spec) for spec in inputs],
        **opened,
        "operators_before": before.operators,
        "operators_after": after.operators,
        "flops_before": before.flops,
        "flops_after": after.flops,
        "parameters_before": before.parameters,
        "parameters_after": after.parameters,
        "operators_by_type_before": before.operators_by_type,
        "operators_by_type_after": after.operators_by_type,
    }


def _drift(drift: Drift, drifts: Sequence[Drift]) -> dict[str, Any]:
    """A drift beside the baseline's own on the same engine, against the same reference.

    Their ratio is relative_l2 / baseline relative_l2: 1.0 where the rewrite cost nothing that
    float32 had not cost already, null where the baseline's is zero or missing.
    """
    baseline = next(
        (
            other.relative_l2
            for other in drifts
            if other.variant == "baseline"
            and (other.engine, other.reference, other.at)
            == (drift.engine, drift.reference, drift.at)
        ),
        None,
    )
    return {
        **_without_at(asdict(drift)),
        **_where(drift.at),
        "baseline_relative_l2": baseline,
        "ratio_to_baseline": drift.relative_l2 / baseline if baseline else None,
    }


def _ablated(each: Ablated) -> dict[str, Any]:
    """A choice of passes with its verdict, and its drift beside its own raw samples."""
    return {
        "how": each.how,
        "pass": each.name,
        "passes": each.passes,
        "operators": each.operators,
        "same_as": each.same_as,
        **asdict(each.ratio),
        "noise_floor": each.noise_floor,
        "verdict": stats.verdict(each.ratio, each.noise_floor),
        "relative_l2": None if each.drift is None else each.drift.relative_l2,
        **_latency(each.measurement),
    }


def _latency(measurement: Measurement) -> dict[str, Any]:
    return {
        "engine": measurement.engine,
        "variant": measurement.variant,
        "device": measurement.device,
        **_where(measurement.at),
        **asdict(stats.summarise(measurement.samples_ms)),
        "blocks": [len(block) for block in measurement.blocks],
        "samples_ms": measurement.samples_ms,
    }


def _speedup(
    comparison: Comparison, floors: Mapping[tuple[str, str | None], float]
) -> dict[str, Any]:
    """A comparison with its verdict, beside the larger noise floor of the two engines.

    Without an A/A control of either, the interval alone decides.
    """
    controls = [(each, comparison.at) for each in (comparison.engine, comparison.against_engine)]
    floor = max((floors[control] for control in controls if control in floors), default=None)
    return {
        "engine": comparison.engine,
        "variant": comparison.variant,
        "against_engine": comparison.against_engine,
        "against": comparison.against,
        **_where(comparison.at),
        **asdict(comparison.ratio),
        "noise_floor": floor,
        "verdict": stats.verdict(comparison.ratio, 1.0 if floor is None else floor),
    }


def _engine(report: EngineReport) -> dict[str, Any]:
    return {
        "engine": report.engine,
        "target": report.target,
        "variant": report.variant,
        "layers": len(report.layers),
        "layers_by_type": report.layers_by_type,
        "activation_bytes": report.activation_bytes,
        "weight_bytes": report.weight_bytes,
        "size_bytes": report.size_bytes,
        "build_seconds": report.build_seconds,
        "layer_table": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "nodes": layer.nodes,
                **({} if layer.milliseconds is None else {"milliseconds": layer.milliseconds}),
            }
            for layer in report.layers
        ],
    }


def _artifact(artifact: Artifact, directory: Path | None) -> dict[str, Any]:
    path = artifact.path
    if directory is not None and path.is_relative_to(directory):
        path = path.relative_to(directory)
    return {
        "path": path.as_posix(),
        "kind": artifact.kind,
        "variant": artifact.variant,
        "sha256": artifact.sha256,
        "size_bytes": artifact.size_bytes,
        "input_names": artifact.input_names,
        "output_names": artifact.output_names,
    }


def _missing(
    stated: Sequence[NotMeasured], engine_reports: Sequence[EngineReport]
) -> list[dict[str, Any]]:
    built = [
        NotMeasured(report.engine, report.variant, report.target, report.not_measured)
        for report in engine_reports
        if report.not_measured is not None
    ]
    # The dictionary drops what is stated twice and keeps the order.
    return [
        {**_without_at(asdict(missing)), **_where(missing.at)}
        for missing in dict.fromkeys((*stated, *built))
    ]


def strict(value: Any) -> Any:
    """The value in strict JSON's own types: NaN and the infinities become null, anything that
    JSON does not know becomes its text."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [strict(item) for item in sorted(value, key=str)]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _lines(value: Any, indent: str) -> str:
    text = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or len(indent) + len(text) <= _LINE_LENGTH:
        return text
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    if all(isinstance(item, (int, float)) for item in value):
        return text
    return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"


def _upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """The document as this version would have written it, where it is older."""
    if document["schema_version"] == 1:
        new: dict[str, Any] = {"kind": "optimize", "warnings": [], "layers": None, "ablation": []}
        document = {**document, "schema_version": 2, **new}
    return document


def _validate(document: Mapping[str, Any]) -> None:
    import jsonschema

    missing = [key for key in json_schema(document["kind"])["required"] if key not in document]
    if missing:
        raise _unreadable(f"It lacks {', '.join(repr(key) for key in missing)}")
    validator = jsonschema.Draft202012Validator(json_schema(document["kind"]))
    error = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if error is not None:
        # The value itself may be a megabyte; where it stands and what is wrong with it is enough.
        short = len(error.message) <= _LINE_LENGTH
        what = error.message if short else f"it breaks the schema's '{error.validator}'"
        raise _unreadable(f"At {error.json_path}: {what}")


def _unreadable(cause: str) -> OptfuseError:
    return OptfuseError("The report cannot be read", cause, "Write it again with optfuse")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number
