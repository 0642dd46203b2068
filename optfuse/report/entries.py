"""What several reports say of models on engines, so that like can be compared with like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optfuse import stats
from optfuse.report.table import Document

Documents = Sequence[tuple[str, Document]]
"""Reports, each with what to call it: the path it was read from."""

EXPORT = "the export as it comes"
"""What the ratio of an optimization compares with."""

COMMIT_DIGITS = 8


@dataclass(frozen=True)
class Entry:
    """What one report says of one model on one engine.

    Attributes:
        number: the report's, from 1 in the order given.
        created: UTC, ISO 8601.
        commit: of the code it was made from, shortened, or empty.
        model, inputs, engine: what ran; inputs with the sizes of open dimensions.
        device, threads, machine: where.
        against: what its ratio compares it with.
        before, after: the latency rows of both in the document, or None where not measured.
        compared: the row with `ratio`, `low`, `high`, `noise_floor` and `verdict`, or None.
        drift: times the drift of the export as it comes, or None.
    """

    number: int
    created: str
    commit: str
    model: str
    inputs: str
    engine: str
    device: str
    threads: int
    machine: str
    against: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    compared: Mapping[str, Any] | None
    drift: float | None


def entries(documents: Documents) -> list[Entry]:
    """Everything that can be compared, ordered by model, engine and time."""
    found: list[Entry] = []
    for number, (_, document) in enumerate(documents, start=1):
        environment = document["environment"]
        about = {
            "number": number,
            "created": document["created"],
            "commit": str(environment.get("commit") or "")[:COMMIT_DIGITS],
            "machine": _machine(environment),
        }
        if document["kind"] == "optimize":
            found += _of_optimize(document, about)
        elif document["kind"] == "bench":
            found += _of_bench(document, about)
    return sorted(
        found, key=lambda each: (each.model, each.inputs, each.engine, each.created, each.number)
    )


def _of_optimize(document: Document, about: Mapping[str, Any]) -> list[Entry]:
    latency = {(row["engine"], row.get("at"), row["variant"]): row for row in document["latency"]}
    drift = {
        (row["engine"], row.get("at")): row
        for row in document["drift"]
        if row["variant"] == "optimized"
    }
    compared = {
        (row["engine"], row.get("at")): row
        for row in document["speedups"]
        if (row["variant"], row["against"]) == ("optimized", "baseline")
        and row["engine"] == row["against_engine"]
    }
    asked = document["settings"].get("precision", "fp32")
    precision = "" if asked == "fp32" else f" {asked}"
    places = dict.fromkeys([*((engine, at) for engine, at, _ in latency), *drift])
    shapes = _shapes(document["program"]["inputs"])
    return [
        Entry(
            **about,
            model=document["program"]["name"],
            inputs=shapes if at is None else f"{shapes} at {at}",
            engine=f"{engine}{precision}",
            device=next((row["device"] for row in latency.values() if row["engine"] == engine), ""),
            threads=document["settings"]["threads"],
            against=EXPORT,
            before=latency.get((engine, at, "baseline")),
            after=latency.get((engine, at, "optimized")),
            compared=compared.get((engine, at)),
            drift=drift.get((engine, at), {}).get("ratio_to_baseline"),
        )
        for engine, at in places
    ]


def _of_bench(document: Document, about: Mapping[str, Any]) -> list[Entry]:
    found = []
    for run in document["runs"]:
        compared = {row["name"]: row for row in run["ratios"]}
        measured = {row["name"]: row for row in run["latency"]}
        for name, row in measured.items():
            against = compared.get(name, {}).get("against", "")
            found.append(
                Entry(
                    **about,
                    model=name,
                    inputs=_shapes(row["inputs"]),
                    engine=row["engine"],
                    device=row["device"],
                    threads=document["settings"]["threads"],
                    against=against,
                    before=measured.get(against),
                    after=row,
                    compared=compared.get(name),
                    drift=None,
                )
            )
    return found


def change(now: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[stats.Ratio, float] | None:
    """How many times as large a speed-up is as an earlier one, with its interval and noise floor.

    The two were measured independently of each other, each with an interval of its own; the
    interval of their quotient is put together from both (method of variance estimates recovery on
    a log scale: G. Y. Zou, A. Donner, Statistics in Medicine 27, 2008, pp. 1693-1702). The noise
    floors add in the same way.

    Args:
        now, before: rows with `ratio`, `low`, `high` and `noise_floor`.

    Returns:
        None where one of the two has no interval.
    """
    if not all(row[key] for row in (now, before) for key in ("ratio", "low", "high")):
        return None

    def log(row: Mapping[str, Any], key: str) -> float:
        return math.log(row[key] or 1.0)

    middle = log(now, "ratio") - log(before, "ratio")
    down = math.hypot(_to(now, "low"), _to(before, "high"))
    up = math.hypot(_to(now, "high"), _to(before, "low"))
    floor = _exp(math.hypot(log(now, "noise_floor"), log(before, "noise_floor")))
    return stats.Ratio(_exp(middle), _exp(middle - down), _exp(middle + up)), floor


def _exp(logarithm: float) -> float:
    # Numbers from a file may be anything; the largest stands for what is larger still.
    return math.exp(max(-700.0, min(logarithm, 700.0)))


def _to(row: Mapping[str, Any], end: str) -> float:
    """How far an end of an interval is from its ratio, on a log scale."""
    return math.log(row[end] / row["ratio"])


def trends_of(found: Sequence[Entry]) -> list[list[Entry]]:
    """Latencies of at least two reports that differ in nothing but when they were made."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for each in found:
        if each.after is None:
            continue
        key = (
            *(each.model, each.inputs, each.engine, each.against),
            *(each.device, each.threads, each.machine),
        )
        groups.setdefault(key, []).append(each)
    return [group for group in groups.values() if len({each.number for each in group}) > 1]


def _machine(environment: Mapping[str, Any]) -> str:
    gpu = environment.get("gpu")
    parts = (environment.get("cpu_model"), gpu.get("name") if isinstance(gpu, Mapping) else gpu)
    return ", ".join(str(part) for part in parts if part)


def _shapes(specs: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{'x'.join(map(str, spec['shape'])) or 'scalar'} {spec['dtype']}" for spec in specs
    )
