"""The report of `optfuse diff`: its document, and what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from optfuse.report.schema import header, layers_document, strict
from optfuse.report.table import (
    NONE,
    Column,
    Document,
    Page,
    Table,
    caveats,
    count,
    distance,
    printable,
    significant,
    table,
    times,
)
from optfuse.stages import Drift, InputSpec, LayerDrifts, Report

_WORST_LAYERS = 5
_BEFORE_SUSPECT, _AFTER_SUSPECT = 2, 3


@dataclass(frozen=True)
class Compared:
    """One of the things that were compared with the reference.

    Attributes:
        name: what it is called in every row.
        text: as the user typed it.
        kind: `source`, `onnx` or `engine`.
        engine, version: what ran it, and the version of the engine's package, or None.
        device: what really ran it.
        sha256: of its file, or None for a source.
        samples: its distance in every run; `variant` is its name.
        worst: the index of the run with the largest distance.
        outputs: how far each output was off in the worst run, with the keys of
            `optfuse.compare.OutputDrift`.
        layers: how far each layer was off in it, or None where that was not looked at.
        no_layers: why the layers could not be compared, or None.
    """

    name: str
    text: str
    kind: str
    engine: str
    version: str | None
    device: str
    sha256: str | None
    samples: Sequence[Drift]
    worst: int
    outputs: Sequence[Mapping[str, Any]]
    layers: LayerDrifts | None = None
    no_layers: str | None = None


def assemble(
    *,
    reference: str,
    compared: Sequence[Compared],
    with_own: bool,
    inputs: Sequence[InputSpec],
    command: Sequence[str],
    environment: Mapping[str, Any],
    settings: Mapping[str, Any],
    created: datetime | None = None,
) -> Report:
    """Put everything one diff found into one document.

    Args:
        reference: what everything was compared with.
        compared: in the order given.
        with_own: the first of them is the program that the reference is the float64 of, so that
            the others' distances are given as multiples of its.
        inputs: of one run.
        command: the command line that gives this report again, one argument each.
        environment: hardware, driver and versions.
        settings: how it was compared.
        created: when, now by default.
    """
    own = compared[0].samples if with_own else None
    document = {
        **header("diff", command, created),
        "settings": settings,
        "environment": environment,
        "reference": reference,
        "inputs": [asdict(spec) for spec in inputs],
        "compared": [_compared(each, own) for each in compared],
        "warnings": [],
    }
    return Report(strict(document))


def _compared(each: Compared, own: Sequence[Drift] | None) -> dict[str, Any]:
    return {
        "name": each.name,
        "text": each.text,
        "kind": each.kind,
        "engine": each.engine,
        "version": each.version,
        "device": each.device,
        "sha256": each.sha256,
        "samples": [
            _sample(drift, None if own is None else own[index].relative_l2)
            for index, drift in enumerate(each.samples)
        ],
        "worst_sample": each.worst,
        "outputs": each.outputs,
        "layers": None if each.layers is None else layers_document(each.layers),
        "no_layers": each.no_layers,
    }


def _sample(drift: Drift, own: float | None) -> dict[str, Any]:
    """A distance beside that of the program itself on the same inputs, and the ratio of the two."""
    plain = asdict(drift)
    for key in ("engine", "variant", "reference", "at"):
        del plain[key]
    usable = own is not None and 0 < own < math.inf
    return {
        **plain,
        "own_relative_l2": own,
        "ratio_to_own": drift.relative_l2 / own if own and usable else None,
    }


def page(document: Document, *, brief: bool = False) -> Page:
    """Everything a diff shows.

    Args:
        document: the report.
        brief: for a terminal: of the layers the suspect's neighbours and the worst ones only, and
            not every sample.
    """
    with_layers = [row for row in document["compared"] if row["layers"] is not None]
    return Page(
        headline=tuple(_headline(document)),
        warnings=(*_remarks(document, _doubtful), *caveats(document)),
        facts=(_inputs(document), *_remarks(document, _harmless)),
        tables=(
            _distances(document),
            *([] if brief else _samples(document)),
            *_outputs(document),
            _tolerances(document),
            *(_layers(row, brief, row is with_layers[-1]) for row in with_layers),
        ),
    )


def _headline(document: Document) -> Iterator[str]:
    for row in document["compared"]:
        worst = row["samples"][row["worst_sample"]]
        ratio = worst["ratio_to_own"]
        own = (
            ""
            if ratio is None or row is document["compared"][0]
            else (f", {times(ratio)} of {document['compared'][0]['name']}'s own")
        )
        yield printable(
            f"{row['name']}: relative L2 {_infinite(worst['relative_l2'])} from the "
            f"{document['reference']}{own}"
        )
        if row["layers"] is not None:
            yield printable(f"{row['name']}: {_finding(row['layers'])}")
        elif row["no_layers"] is not None:
            yield printable(f"{row['name']}: layers not compared: {row['no_layers']}")


def _finding(layers: Mapping[str, Any]) -> str:
    """Which layer is to blame, if one is."""
    rows = layers["rows"]
    if not rows:
        return "none of its layers has a counterpart in the reference"
    suspect = next((row for row in rows if row["name"] == layers["suspect"]), None)
    if suspect is None:
        most = max(row["growth"] or 0.0 for row in rows)
        return f"no layer is to blame: none adds more than {times(most)} the usual error"
    where = f" ({suspect['module']})" if suspect["module"] else ""
    stands_for = suspect["equals"][0]
    computes = "" if stands_for == suspect["name"] else f", which computes {stands_for}"
    return (
        f"the first layer to drift is {suspect['name']}{where}{computes}: it adds {_grown(suspect)}"
    )


def _grown(row: Mapping[str, Any]) -> str:
    if row["growth"] is None:  # the only growth of a suspect that JSON cannot write
        return "an infinite error"
    return f"{significant(row['growth'], 3)} times the usual error"


def _remarks(
    document: Document, about: Callable[[Mapping[str, Any]], Iterator[str]]
) -> Iterator[str]:
    """What is to be said of the outputs in the worst samples, each with whose output it is."""
    for row in document["compared"]:
        for output in row["outputs"]:
            whose = f"{row['name']}, output {output['name']}"
            yield from (printable(f"{whose}: {sentence}") for sentence in about(output))


def _doubtful(output: Mapping[str, Any]) -> Iterator[str]:
    """Integers and booleans that differ, and what is not finite in one of the two alone."""
    elements = f"{output['elements']:,}"
    if output["mismatched"]:
        largest = significant(output["max_abs"], 3)
        by = "" if output["dtype"] == "bool" else f", by at most {largest}"
        yield f"{output['mismatched']:,} of {elements} {output['dtype']} elements differ{by}"
    if output["nonfinite"]:
        yield (
            f"{output['nonfinite']:,} of {elements} elements are NaN or infinite where the "
            "reference is finite, so no tolerance passes"
        )
    if output["reference_nonfinite"]:
        yield (
            f"{output['reference_nonfinite']:,} of {elements} elements are NaN or infinite in the "
            "reference and something else here, so no tolerance passes"
        )


def _harmless(output: Mapping[str, Any]) -> Iterator[str]:
    """Integers and booleans that are equal, and what is not finite in both alike."""
    elements = f"{output['elements']:,}"
    if output["mismatched"] == 0:
        yield f"all {elements} {output['dtype']} elements are equal"
    if output["both_nonfinite"]:
        yield (
            f"{output['both_nonfinite']:,} of {elements} elements are the same infinity, or NaN, "
            "in both and count as equal; other tools want equal_nan=True for that"
        )


def _inputs(document: Document) -> str:
    settings = document["settings"]
    specs = ", ".join(
        f"{spec['name'] or 'input'} {'x'.join(map(str, spec['shape'])) or 'scalar'} {spec['dtype']}"
        for spec in document["inputs"]
    )
    number = settings["samples"]
    where = {
        "examples": "the examples",
        "random": f"random, seed {settings['seed']}",
        "file": f"from {settings['data']}",
    }[settings["inputs"]]
    several = f", {number} samples; the worst is shown" if number > 1 else ""
    return printable(f"inputs: {specs or 'none'} ({where}{several})")


def _distances(document: Document) -> Table:
    columns = (
        Column("what, on which engine"),
        Column("relative L2", number=True),
        Column("max abs / max ref", number=True),
        Column("cosine", number=True),
        Column("SQNR dB", number=True),
        Column("top-1 equal", number=True),
        Column("times its own", number=True),
    )
    rows = []
    for row in document["compared"]:
        worst = row["samples"][row["worst_sample"]]
        rows.append(
            (
                row["name"],
                _infinite(worst["relative_l2"]),
                _infinite(worst["max_abs_over_max_ref"]),
                f"{worst['cosine']:.6f}",
                NONE if worst["sqnr_db"] is None else f"{worst['sqnr_db']:.1f}",
                NONE
                if worst["top1_agreement"] is None
                else f"{100 * worst['top1_agreement']:.1f}%",
                NONE if worst["ratio_to_own"] is None else times(worst["ratio_to_own"]),
            )
        )
    notes = [f"The reference is the {document['reference']}."]
    first = document["compared"][0]
    if first["samples"][0]["own_relative_l2"] is not None:
        notes.append(f"Times its own: over the distance of {first['name']} on the same inputs.")
    return table("Distance", columns, rows, notes=notes)


def _samples(document: Document) -> list[Table]:
    """Every sample's distance, where there are several."""
    compared = document["compared"]
    if len(compared[0]["samples"]) < 2:
        return []
    columns = (
        Column("sample", number=True),
        *(Column(row["name"], number=True) for row in compared),
    )
    rows = [
        (str(index), *(_infinite(row["samples"][index]["relative_l2"]) for row in compared))
        for index in range(len(compared[0]["samples"]))
    ]
    return [table("Relative L2 of every sample", columns, rows)]


def _outputs(document: Document) -> list[Table]:
    """Each output by itself, where there are several."""
    if all(len(row["outputs"]) < 2 for row in document["compared"]):
        return []
    columns = (
        Column("what, on which engine"),
        Column("output"),
        Column("shape"),
        Column("dtype"),
        Column("relative L2", number=True),
        Column("SQNR dB", number=True),
        Column("differing", number=True),
    )
    rows = [
        (
            row["name"],
            output["name"],
            "x".join(map(str, output["shape"])) or "scalar",
            output["dtype"],
            _infinite(output["relative_l2"]),
            NONE if output["sqnr_db"] is None else f"{output['sqnr_db']:.1f}",
            NONE if output["mismatched"] is None else count(output["mismatched"]),
        )
        for row in document["compared"]
        for output in row["outputs"]
    ]
    return [table("Outputs", columns, rows)]


def _tolerances(document: Document) -> Table:
    columns = (
        Column("what, on which engine"),
        Column("output"),
        Column("abs alone", number=True),
        Column("rel alone", number=True),
        Column("abs with rel", number=True),
    )
    rows = []
    for row in document["compared"]:
        for output in row["outputs"]:
            found = output["tolerances"]
            cells = (NONE, NONE, NONE)
            if found is not None:
                beside = at_least(found["atol_beside_rtol"])
                cells = (
                    at_least(found["atol"]),
                    at_least(found["rtol"]),
                    beside if beside == "none" else f"{beside} with {found['beside_rtol']:.0e}",
                )
            rows.append((row["name"], output["name"], *cells))
    note = (
        "The smallest that pass |y - ref| <= abs + rel |ref| for every element, rounded up; any "
        "one of the three does. A relative one alone says little where the reference is near zero."
    )
    return table("Tolerances that would pass", columns, rows, notes=[note])


def at_least(number: float | None) -> str:
    """A tolerance with two digits, rounded up so that it passes; `none` where none does."""
    if number is None:
        return "none"
    if number == 0:
        return "0"
    nearest = f"{number:.1e}"
    if float(nearest) >= number:
        return nearest
    # In decimal, where it is exact: a product of floats may fall below what it stands for.
    above = Context(prec=2, rounding=ROUND_CEILING).create_decimal(Decimal(number))
    return f"{float(above):.1e}"


def _layers(row: Mapping[str, Any], brief: bool, last: bool) -> Table:
    layers = row["layers"]
    # Layers of the captured program itself, or of a file with the same names, stand for themselves.
    mapped = any(each["equals"] != [each["name"]] for each in layers["rows"])
    columns = (
        Column("layer"),
        *([] if brief else [Column("operator")]),
        *([Column("computes")] if mapped else []),
        *([Column("made of")] if mapped and not brief else []),
        Column("module"),
        Column("relative L2", number=True),
        Column("program's own", number=True),
        Column("adds, times usual", number=True),
    )
    shown = _shown(layers) if brief else layers["rows"]
    lines = [
        (
            each["name"] + (" (suspect)" if each["name"] == layers["suspect"] else ""),
            *([] if brief else [each["kind"]]),
            *([", ".join(each["equals"])] if mapped else []),
            *([", ".join(each["origins"])] if mapped and not brief else []),
            each["module"] or NONE,
            _infinite(each["relative_l2"]),
            distance(each["own_relative_l2"]),
            NONE if each["growth"] is None else significant(each["growth"], 3),
        )
        for each in shown
    ]
    left_out = len(layers["rows"]) - len(shown)
    notes = [f"{left_out} more layers are in the report: --export-json."] if left_out else []
    if last:
        notes.append(
            "What a layer adds by itself is measured by feeding it with the reference's values, "
            "and set against what the original adds there, or against rounding; above "
            f"{layers['limit']:g} it is suspect."
        )
        if layers["engine"] != "torch":
            notes.append(
                f"To look inside, every value is made an output, which keeps {layers['engine']} "
                "from fusing across it."
            )
    return table(
        f"Layers of {row['name']}",
        columns,
        lines,
        empty=f"No layer of {row['name']} has a counterpart in the reference.",
        notes=notes,
    )


def _shown(layers: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The suspect with what stands around it, and the worst ones, in the order they run."""
    rows = layers["rows"]
    by_growth = sorted(range(len(rows)), key=lambda index: -_badness(rows[index]))
    kept = set(by_growth[:_WORST_LAYERS])
    for index, row in enumerate(rows):
        if row["name"] == layers["suspect"]:
            kept |= set(range(index - _BEFORE_SUSPECT, index + _AFTER_SUSPECT + 1))
    return [row for index, row in enumerate(rows) if index in kept]


def _badness(row: Mapping[str, Any]) -> float:
    """What layers are ordered by: what they add; an infinite error is worst."""
    if row["relative_l2"] is None:
        return math.inf
    return row["growth"] or 0.0


def _infinite(number: float | None) -> str:
    return "infinite" if number is None else distance(number)
