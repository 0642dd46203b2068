"""The report of `optfuse bench`: its document, and what it shows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from csv import writer as writer_of
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from optfuse import stats
from optfuse.report.schema import header, strict
from optfuse.report.table import (
    NONE,
    Column,
    Document,
    Page,
    Table,
    caveats,
    decimals,
    interval,
    printable,
    significant,
    table,
    times,
)
from optfuse.stages import Caveat, InputSpec, Measurement, Report


@dataclass(frozen=True)
class Contender:
    """One of the things that were measured.

    Attributes:
        name: what it is called in every row.
        text: as the user typed it.
        kind: `source`, `onnx` or `engine`.
        engine: what runs it.
        version: of the engine's package, or None.
        sha256: of its file, or None for a source.
    """

    name: str
    text: str
    kind: str
    engine: str
    version: str | None
    sha256: str | None


@dataclass(frozen=True)
class Work:
    """What one run of a contender takes, and how near it came to what the machine can do.

    Attributes:
        flops: floating-point operations of a run, a multiply-add counted as two; None if unknown.
        bytes: weights, inputs and outputs, each moved once; None if unknown.
        gflops_per_s, gbytes_per_s: what the median run achieved of them.
        share: the least time that the machine's ceilings allow over the median time.
    """

    flops: int | None = None
    bytes: int | None = None
    gflops_per_s: float | None = None
    gbytes_per_s: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Versus:
    """One contender against the first one: above 1 it takes less time."""

    name: str
    against: str
    ratio: stats.Ratio


@dataclass(frozen=True)
class NotRun:
    """A contender that was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class BatchRun:
    """One interleaved run of all contenders.

    Attributes:
        batch: the size of the inputs' first dimension where it was asked for, else None.
        inputs: of each contender that was measured, by its name.
        measurements: raw samples; `variant` is the contender's name.
        work: of each contender, by its name.
        versus: every other contender against the first one.
        control: the first one against itself (A/A), or None where nothing was measured.
        warnings: what makes the samples doubtful.
        not_run: what is missing.
    """

    batch: int | None
    inputs: Mapping[str, Sequence[InputSpec]]
    measurements: Sequence[Measurement] = ()
    work: Mapping[str, Work] = field(default_factory=dict)
    versus: Sequence[Versus] = ()
    control: stats.Ratio | None = None
    warnings: Sequence[Caveat] = ()
    not_run: Sequence[NotRun] = ()


def assemble(
    *,
    contenders: Sequence[Contender],
    runs: Sequence[BatchRun],
    ceilings: Mapping[str, Any] | None,
    command: Sequence[str],
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    created: datetime | None = None,
) -> Report:
    """Put everything one bench found into one document.

    Args:
        contenders: in the order given; the others are compared with the first.
        runs: one for each batch.
        ceilings: what the machine can do at most (`gflops_per_s`, `gbytes_per_s`), or None.
        command: the command line that gives this report again, one argument each.
        environment: hardware, driver and versions.
        settings: how it was measured.
        created: when, now by default.
    """
    document = {
        **header("bench", command, created),
        "settings": settings,
        "environment": environment,
        "contenders": [asdict(each) for each in contenders],
        "runs": [_run(run) for run in runs],
        "ceilings": ceilings,
        "warnings": [asdict(each) for run in runs for each in run.warnings],
    }
    return Report(strict(document))


def _run(run: BatchRun) -> dict[str, Any]:
    floor = 1.0 if run.control is None else stats.noise_floor(run.control)
    return {
        "batch": run.batch,
        "latency": [_latency(each, run) for each in run.measurements],
        "ratios": [
            {
                "name": each.name,
                "against": each.against,
                **asdict(each.ratio),
                "noise_floor": floor,
                "verdict": stats.verdict(each.ratio, floor),
            }
            for each in run.versus
        ],
        "control": None if run.control is None else {**asdict(run.control), "floor": floor},
        "not_run": [asdict(each) for each in run.not_run],
    }


def _latency(measurement: Measurement, run: BatchRun) -> dict[str, Any]:
    summary = stats.summarise(measurement.samples_ms)
    work = run.work.get(measurement.variant, Work())
    return {
        "name": measurement.variant,
        "engine": measurement.engine,
        "device": measurement.device,
        "inputs": [asdict(spec) for spec in run.inputs.get(measurement.variant, ())],
        **asdict(summary),
        "items_per_s": None if run.batch is None else run.batch * summary.throughput_per_s,
        **asdict(work),
        "blocks": [len(block) for block in measurement.blocks],
        "samples_ms": measurement.samples_ms,
    }


def csv(report: Report) -> str:
    """The statistics as comma-separated values, a line for each contender and batch."""
    statistics = (
        *("median_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "std_ms", "min_ms", "max_ms"),
        *("throughput_per_s", "items_per_s"),
    )
    comparison = ("against", "ratio", "low", "high", "noise_floor", "verdict")
    text = io.StringIO()
    writer = writer_of(text, lineterminator="\n")
    writer.writerow(["batch", "name", "engine", "device", "samples", *statistics, *comparison])
    for run in report.document["runs"]:
        ratios = {row["name"]: row for row in run["ratios"]}
        for row in run["latency"]:
            versus = ratios.get(row["name"], {})
            names = [printable(row[key]) for key in ("name", "engine", "device")]
            samples = len(row["samples_ms"])
            figures = [row[key] for key in statistics]
            compared = [versus.get(key) for key in comparison]
            writer.writerow([run["batch"], *names, samples, *figures, *compared])
    return text.getvalue()


def page(document: Document, *, brief: bool = False) -> Page:
    """Everything a bench shows, the same in a terminal and in a file."""
    del brief
    runs = document["runs"]
    tables = [each for run in runs for each in _tables(run, len(runs) > 1)]
    return Page(
        headline=tuple(_headline(document)),
        warnings=tuple(caveats(document)),
        facts=tuple(_facts(document)),
        tables=(*([_sweep(runs)] if len(runs) > 1 else []), *tables, *_roofline(document)),
    )


def _headline(document: Document) -> list[str]:
    sentences = [
        _of_batch(run, _versus_sentence(row)) for run in document["runs"] for row in run["ratios"]
    ]
    sentences += [
        _of_batch(run, f"{row['name']}: {significant(row['median_ms'], 4)} ms")
        for run in document["runs"]
        if not run["ratios"]
        for row in run["latency"][:1]
    ]
    sentences += [
        _of_batch(run, f"{row['name']} not measured: {row['reason']}")
        for run in document["runs"]
        for row in run["not_run"]
    ]
    return [printable(sentence) for sentence in sentences]


def _versus_sentence(row: Mapping[str, Any]) -> str:
    joint = "than" if row["verdict"] in ("faster", "slower") else "against"
    return f"{row['name']} {_ratio(row)} {row['verdict']} {joint} {row['against']}"


def _of_batch(run: Mapping[str, Any], sentence: str) -> str:
    return sentence if run["batch"] is None else f"batch {run['batch']}: {sentence}"


def _facts(document: Document) -> list[str]:
    """The inputs, once where all contenders take the same ones, and how it was measured."""
    settings = document["settings"]
    mode = "a process for each" if settings["isolated"] else "in one process"
    lines = []
    for run in document["runs"]:
        shapes: dict[str, list[str]] = {}
        for row in run["latency"]:
            shapes.setdefault(_inputs(row["inputs"]), []).append(row["name"])
        for shape, names in shapes.items():
            of = "" if len(shapes) == 1 else f" of {', '.join(names)}"
            lines.append(_of_batch(run, f"inputs{of}: {shape}"))
    lines.append(f"{settings['threads']} CPU threads, {mode}, randomised interleaved blocks")
    return [printable(line.replace("1 CPU threads", "1 CPU thread")) for line in lines]


def _inputs(specs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{'x'.join(str(size) for size in spec['shape']) or 'scalar'} {spec['dtype']}"
        for spec in specs
    )


def _tables(run: Mapping[str, Any], several: bool) -> list[Table]:
    if not run["latency"]:
        return []
    title = f"Latency, batch {run['batch']}" if several else "Latency"
    latency = table(
        title,
        (
            Column("what, on which engine"),
            Column("median ms", number=True),
            Column("p90 ms", number=True),
            Column("p95 ms", number=True),
            Column("p99 ms", number=True),
            Column("items per s" if run["batch"] else "runs per s", number=True),
        ),
        [_latency_cells(row) for row in run["latency"]],
        notes=[_conditions(run)],
    )
    title = f"Speed-up, batch {run['batch']}" if several else "Speed-up"
    ratios = table(
        title,
        (
            Column("what, on which engine"),
            Column("times as fast", number=True),
            Column("verdict", verdict=True),
            Column("noise floor", number=True),
        ),
        [
            (row["name"], _ratio(row), row["verdict"], times(row["noise_floor"], decimals(row)))
            for row in run["ratios"]
        ],
        notes=[_against(run)] if run["ratios"] else [],
    )
    return [latency, ratios]


def _latency_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    statistics = ("median_ms", "p90_ms", "p95_ms", "p99_ms")
    rate = row["throughput_per_s"] if row["items_per_s"] is None else row["items_per_s"]
    return (
        row["name"],
        *(significant(row[statistic], 4) for statistic in statistics),
        significant(rate, 4),
    )


def _conditions(run: Mapping[str, Any]) -> str:
    devices = dict.fromkeys(f"{row['engine']} on {row['device']}" for row in run["latency"])
    counts = {len(row["samples_ms"]) for row in run["latency"]}
    least = f"{'at least ' if len(counts) > 1 else ''}{min(counts)}"
    return f"Ran {', '.join(devices)}, {least} timed runs of each."


def _against(run: Mapping[str, Any]) -> str:
    return (
        f"Paired ratios to {run['ratios'][0]['against']} with their confidence intervals; above 1 "
        "is faster. The noise floor is that one against itself."
    )


def _sweep(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Median latency and throughput over the batch."""
    columns = [Column("what, on which engine")]
    for run in runs:
        columns.append(Column(f"batch {run['batch']} ms", number=True))
    columns += [Column(f"batch {run['batch']} items per s", number=True) for run in runs]
    names = dict.fromkeys(row["name"] for run in runs for row in run["latency"])
    found = {(row["name"], run["batch"]): row for run in runs for row in run["latency"]}
    lines = []
    for name in names:
        of = [found.get((name, run["batch"])) for run in runs]
        medians = [NONE if row is None else significant(row["median_ms"], 4) for row in of]
        rates = [NONE if row is None else significant(row["items_per_s"], 4) for row in of]
        lines.append((name, *medians, *rates))
    return table("Latency and throughput by batch", tuple(columns), lines)


def _roofline(document: Document) -> list[Table]:
    ceilings = document["ceilings"]
    rows = [
        (
            _of_batch(run, row["name"]),
            NONE if row["gflops_per_s"] is None else significant(row["gflops_per_s"], 3),
            NONE if row["gbytes_per_s"] is None else significant(row["gbytes_per_s"], 3),
            NONE if row["share"] is None else f"{100 * row['share']:.0f}%",
        )
        for run in document["runs"]
        for row in run["latency"]
        if row["flops"] is not None
    ]
    if not rows or ceilings is None:
        return []
    columns = (
        Column("what, on which engine"),
        Column("GFLOP/s", number=True),
        Column("GB/s", number=True),
        Column("of the ceiling", number=True),
    )
    note = (
        f"This machine's ceilings, measured on {ceilings['device']}: "
        f"{significant(ceilings['gflops_per_s'], 3)} GFLOP/s in a matrix product, "
        f"{significant(ceilings['gbytes_per_s'], 3)} GB/s in a copy. GB/s counts weights, inputs "
        "and outputs once. The share is the least time both ceilings allow over the median time: "
        "near 100% there is nothing left to gain but by doing less work."
    )
    return [table("Roofline", columns, rows, notes=[note])]


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{times(row['ratio'], decimals(row))} {interval(row)}"
