"""What every table of the report says: pure functions from the document to rows of text.

The terminal, Markdown and HTML draw these and decide nothing. All text that leaves here is free of
control characters, whatever a model calls its nodes, so that no name can move the cursor, break
out of a row or reorder a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optfuse.report.builder import findings
from optfuse.report.convolutions import convolutions
from optfuse.report.precision import facts, passed_over, precision
from optfuse.report.recommendation import recommendation, sentence
from optfuse.report.table import (
    NONE,
    Column,
    Document,
    Page,
    Table,
    caveats,
    count,
    decimals,
    distance,
    interval,
    megabytes,
    printable,
    significant,
    table,
    times,
)

VARIANTS = {
    "baseline": "as exported",
    "optimized": "optimized",
    "control": "as exported (again)",
}
"""A variant in the document -> its name in print."""

LAYERS = "Drift per layer"
"""The title of the table `layers`."""

REFUSED = "Refused"
"""The title of the table `refusals`."""

CHOICES = {"alone": "only {}", "without": "all but {}", "up_to": "up to {}"}
"""How a choice of passes in the document's `ablation` is called in print."""

LOW_PRECISION = 100.0
"""From this multiple of the export's own drift on, it is more than float32's rounding."""

_FIRST_SITES = 3
_WORST_LAYERS = 5
_REFUSAL_GROUPS = 5
_SHA256_DIGITS = 12


def page(document: Document, *, brief: bool = False) -> Page:
    """Everything the report of one optimization shows.

    Args:
        document: the report.
        brief: for a terminal: the most frequent refusals and the worst layers only, no table of
            operator types.
    """
    return Page(
        headline=tuple(headline(document)),
        warnings=tuple(warnings(document)),
        facts=(*program_lines(document), *facts(document)),
        tables=(
            passes(document),
            *recommendation(document),
            speedups(document),
            *ablation(document, brief=brief),
            latency(document),
            drift(document, brief=brief),
            *precision(document, brief=brief),
            *_layers(document, _WORST_LAYERS if brief else None),
            *engines(document),
            *findings(document),
            *([] if brief else [operators(document)]),
            refusals(document, limit=_REFUSAL_GROUPS if brief else None),
            *([] if brief else convolutions(document)),
            artifacts(document),
        ),
    )


def headline(document: Document) -> list[str]:
    """What happened, in a sentence for the program and one for each engine."""
    program = document["program"]
    sentences = [
        f"{program['name']}: {program['operators_before']} -> {program['operators_after']}"
        " operators"
    ]
    sentences += [_speedup_sentence(row, document["drift"]) for row in against_export(document)]
    compared = {(row["engine"], row.get("at")) for row in against_export(document)}
    sentences += [
        f"{placed(row['engine'], row)} drift {drift_words(row)}"
        for row in document["drift"]
        if row["variant"] == "optimized" and (row["engine"], row.get("at")) not in compared
    ]
    sentences += sentence(document)
    sentences += not_measured(document)
    if not document["latency"] and not document["not_measured"]:
        sentences.append("latency not measured")
    return [printable(sentence) for sentence in sentences]


def warnings(document: Document) -> list[str]:
    """What nobody may overlook: passes that were undone, outputs that are not finite."""
    undone = [
        f"{step['name']} was undone: {step['undone']}"
        for step in document["steps"]
        if step["undone"]
    ]
    nonfinite = [
        f"{placed(_who(row), row)} gives {row['nonfinite']} values that are not finite where the "
        "reference is"
        for row in document["drift"]
        if row["nonfinite"]
    ]
    return [*(printable(sentence) for sentence in (*undone, *nonfinite)), *caveats(document)]


def not_measured(document: Document) -> list[str]:
    """One line for each latency that is missing, with the reason; the variants share a line."""
    variants: dict[tuple[str, str, str, str], list[str]] = {}
    for row in document["not_measured"]:
        key = (row["engine"], row["target"] or "", row["reason"], row.get("at") or "")
        names = variants.setdefault(key, [])
        if row["variant"] is not None:
            names.append(VARIANTS[row["variant"]])
    return [
        printable(_missing_sentence(engine, target, reason, names, at))
        for (engine, target, reason, at), names in variants.items()
    ]


def program_lines(document: Document) -> list[str]:
    """The inputs, what is done to images among them, and parameters and FLOPs before and after."""
    program, normalize = document["program"], document["source"].get("normalize")
    inputs = ", ".join(
        f"{spec['name'] or 'input'} {'x'.join(str(size) for size in spec['shape']) or 'scalar'}"
        f" {spec['dtype']}"
        for spec in program["inputs"]
    )
    counts = "; ".join(
        f"{label} {count(program[f'{key}_before'])} -> {count(program[f'{key}_after'])}"
        for label, key in (("parameters", "parameters"), ("FLOPs", "flops"))
    )
    dimensions = program.get("dimensions") or []
    if dimensions:
        counts += " at " + ", ".join(f"{each['name']}={each['usual']}" for each in dimensions)
    ranges = [
        f"{each['name']} from {each['least']} to {each['most']}, usually {each['usual']}"
        for each in dimensions
    ]
    lines = [f"inputs: {inputs or 'none'}{_after('; ', '; '.join(ranges))}", counts]
    if normalize:
        mean, std = (", ".join(f"{n:g}" for n in normalize[key]) for key in ("mean", "std"))
        lines.insert(1, f"images are normalised in the file: mean {mean}; std {std}")
    return [printable(line) for line in lines]


def passes(document: Document) -> Table:
    """What every step did. A pass that is run again until nothing changes is shown again only
    where it rewrote something."""
    columns = (
        Column("pass"),
        Column("rewritten", number=True),
        Column("refused", number=True),
        Column("operators", number=True),
        Column("proof rel. L2", number=True),
        Column("time s", number=True),
    )
    seen: set[str] = set()
    rows = []
    for step in document["steps"]:
        if step["name"] in seen and not step["matched"] and not step["undone"]:
            continue
        seen.add(step["name"])
        is_pass = step["stage"] == "pass"
        rows.append(
            (
                step["name"],
                f"{step['matched']}{' undone' if step['undone'] else ''}" if is_pass else NONE,
                str(len(step["refused"])) if is_pass else NONE,
                f"{step['operators_before']} -> {step['operators_after']}",
                distance(step["relative_l2"]),
                significant(step["seconds"], 2),
            )
        )
    return table("Passes", columns, rows, empty="No pass was run.")


def speedups(document: Document) -> Table:
    """The paired ratios with their intervals, verdicts and noise floors."""
    at, cell = _at(document["speedups"])
    columns = (
        Column("optimized, on"),
        *at,
        Column("against"),
        Column("times as fast", number=True),
        Column("verdict", verdict=True),
        Column("noise floor", number=True),
    )
    rows = [
        (
            row["engine"] if row["variant"] == "optimized" else _who(row),
            *cell(row),
            _against(row),
            _ratio(row),
            row["verdict"],
            NONE if row["noise_floor"] is None else times(row["noise_floor"], decimals(row)),
        )
        for row in document["speedups"]
    ]
    note = (
        "Paired ratios of interleaved runs with their confidence intervals; above 1 is faster. "
        "The noise floor is the baseline against itself."
    )
    notes = (note, *_what_to_try(document)) if rows else ()
    return table("Speed-up", columns, rows, notes=notes)


def _what_to_try(document: Document) -> list[str]:
    """The next step where ours came out slower than the export as it comes: the one pass that is
    known to cost some engines more than it gains them, if it did anything here."""
    name = "combine_parallel_convs"
    if not any(step["name"] == name and step["matched"] for step in document["steps"]):
        return []
    return [
        f"Slower on {placed(row['engine'], row)}: some engines pay more for the split behind "
        f"combined convolutions than they gain. Try --passes all,-{name}."
        for row in against_export(document)
        if row["verdict"] == "slower"
    ]


def ablation(document: Document, *, brief: bool = False) -> list[Table]:
    """What each pass earned, one table for each engine.

    Args:
        document: the report.
        brief: each pass alone and left out, without what is of use only beside a plot.
    """
    shown = [row for row in document["ablation"] if not (brief and row["how"] == "up_to")]
    engines = dict.fromkeys(row["engine"] for row in shown)
    return [
        _ablation(engine, [row for row in shown if row["engine"] == engine], brief)
        for engine in engines
    ]


def ablation_title(engine: str) -> str:
    """The title of an engine's table in `ablation`."""
    return printable(f"What each pass earned on {engine}")


def _ablation(engine: str, choices: Sequence[Mapping[str, Any]], brief: bool) -> Table:
    columns = (
        Column("passes"),
        Column("operators", number=True),
        Column("times as fast", number=True),
        Column("verdict", verdict=True),
        Column("drift rel. L2", number=True),
        *(() if brief else (Column("median ms", number=True), Column("same program as"))),
    )
    rows = [
        (
            choice(row),
            str(row["operators"]),
            *_of_choice(row),
            distance(row["relative_l2"]),
            *(() if brief else (significant(row["median_ms"], 4),)),
            *(() if brief else (VARIANTS.get(row["same_as"], row["same_as"] or NONE),)),
        )
        for row in choices
    ]
    note = (
        "Against the export as it comes, interleaved with all others. A pass earns something where "
        "it is faster alone, or where all passes but this one are less fast than all of them."
    )
    notes = [note, *(f"All of it at {at}." for at in {row.get("at") for row in choices} if at)]
    return table(ablation_title(engine), columns, rows, notes=notes)


def _of_choice(row: Mapping[str, Any]) -> tuple[str, str]:
    """Ratio and verdict; there is neither for a choice that leaves the engine what it had."""
    return ("as exported", NONE) if row["same_as"] == "baseline" else (_ratio(row), row["verdict"])


def choice(row: Mapping[str, Any]) -> str:
    """A row of the document's `ablation` in words, e.g. `all but elide_concat`."""
    return printable(CHOICES[row["how"]].format(row["pass"]))


def latency(document: Document) -> Table:
    """The statistics of every measured variant."""
    at, cell = _at(document["latency"])
    columns = (
        Column("engine"),
        *at,
        Column("variant"),
        Column("median ms", number=True),
        Column("p90 ms", number=True),
        Column("p95 ms", number=True),
        Column("p99 ms", number=True),
        Column("runs per s", number=True),
    )
    statistics = ("median_ms", "p90_ms", "p95_ms", "p99_ms", "throughput_per_s")
    rows = [
        (
            row["engine"],
            *cell(row),
            VARIANTS[row["variant"]],
            *(significant(row[statistic], 4) for statistic in statistics),
        )
        for row in document["latency"]
    ]
    return table("Latency", columns, rows, notes=_conditions(document) if rows else ())


def drift(document: Document, *, brief: bool = False) -> Table:
    """How far every variant's outputs are from the reference.

    Args:
        document: the report.
        brief: where open dimensions take a column, the cosine gives way to it.
    """
    at, cell = _at(document["drift"])
    cosine = not (at and brief)
    columns = (
        Column("engine"),
        *at,
        Column("variant"),
        Column("relative L2", number=True),
        Column("max abs / max ref", number=True),
        *([Column("cosine", number=True)] if cosine else []),
        Column("SQNR dB", number=True),
        Column("top-1 equal", number=True),
        Column("times as exported", number=True),
    )
    rows = [
        (
            row["engine"],
            *cell(row),
            VARIANTS[row["variant"]],
            distance(row["relative_l2"]),
            distance(row["max_abs_over_max_ref"]),
            *([NONE if row["cosine"] is None else f"{row['cosine']:.6f}"] if cosine else []),
            NONE if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            NONE if row["top1_agreement"] is None else f"{100 * row['top1_agreement']:.1f}%",
            _multiple(row["ratio_to_baseline"]),
        )
        for row in document["drift"]
    ]
    references = dict.fromkeys(row["reference"] for row in document["drift"])
    notes = [f"The reference is the {reference}." for reference in references]
    judged_on = document["settings"].get("judged_on")
    if judged_on:
        settings = document["settings"]
        samples = "1 sample" if judged_on == 1 else f"{judged_on} samples"
        left_out = passed_over(judged_on, settings.get("samples"))
        notes.append(printable(f"Taken on {samples} of {settings['data']}{left_out}."))
    return table("Drift", columns, rows, empty="Drift was not measured.", notes=notes)


def layers(found: Mapping[str, Any], limit: int | None = None) -> Table:
    """The drift of every layer, in the order they run.

    Args:
        found: a document's `layers`.
        limit: how many of the worst to show, beside the suspect; the others are counted in a note.
    """
    columns = (
        Column("layer"),
        Column("operator"),
        Column("module"),
        Column("relative L2", number=True),
        Column("program's own", number=True),
        Column("adds, times usual", number=True),
    )
    worst = sorted(found["rows"], key=_badness, reverse=True)[:limit]
    names = {found["suspect"], *(row["name"] for row in worst)}
    shown = [row for row in found["rows"] if row["name"] in names]
    rows = [
        (
            row["name"] + (" (suspect)" if row["name"] == found["suspect"] else ""),
            row["kind"],
            row["module"] or NONE,
            "infinite" if row["relative_l2"] is None else distance(row["relative_l2"]),
            distance(row["own_relative_l2"]),
            NONE if row["growth"] is None else significant(row["growth"], 3),
        )
        for row in shown
    ]
    left_out = len(found["rows"]) - len(shown)
    notes = [
        layer_finding(found),
        f"On {placed(found['engine'], found)}; the reference is the {found['reference']}. A layer "
        f"that adds more than {found['limit']:g} times the usual error is suspect.",
        *([f"{left_out} layers that add less are not shown."] if left_out else []),
    ]
    return table(LAYERS, columns, rows, empty="No layer could be compared.", notes=notes)


def layer_finding(found: Mapping[str, Any]) -> str:
    """What the drift of the layers comes to, in a sentence."""
    suspect = next((row for row in found["rows"] if row["name"] == found["suspect"]), None)
    if suspect is None:
        return f"No layer adds more than {found['limit']:g} times the usual error."
    error = "an infinite error"
    if suspect["growth"] is not None:
        error = f"{significant(suspect['growth'], 3)} times the usual error"
    where = _after(" of ", suspect["module"])
    return printable(f"{suspect['name']}{where} is the first layer to drift: it adds {error}.")


def _layers(document: Document, limit: int | None) -> list[Table]:
    found = document["layers"]
    return [] if found is None else [layers(found, limit)]


def _badness(row: Mapping[str, Any]) -> float:
    """What layers are ordered by: what they add; an infinite error is worst."""
    if row["relative_l2"] is None:
        return math.inf
    return -1.0 if row["growth"] is None else float(row["growth"])


def engine_layers(document: Document) -> list[tuple[str, Table]]:
    """Every layer of every engine that was built, with the title of the engine's own table."""
    return [_layer_table(row) for row in document["engines"] if row["layer_table"]]


def _layer_table(row: Mapping[str, Any]) -> tuple[str, Table]:
    layers = row["layer_table"]
    timed = any("milliseconds" in layer for layer in layers)
    columns = (
        Column("layer"),
        Column("kind"),
        *((Column("ms", number=True),) if timed else ()),
        Column("made of the ONNX nodes"),
    )
    rows = [
        (
            layer["name"],
            layer["kind"],
            *((significant(layer.get("milliseconds"), 3),) if timed else ()),
            ", ".join(layer["nodes"]) or NONE,
        )
        for layer in layers
    ]
    title = f"All {len(layers)} layers, {VARIANTS[row['variant']]}"
    return engine_title(row["engine"], row["target"]), table(title, columns, rows)


def engine_title(engine: str, target: str) -> str:
    """The title of a table in `engines`."""
    return printable(f"{engine} {target}")


def engines(document: Document) -> list[Table]:
    """One table for each engine and target, with the variants side by side."""
    targets = dict.fromkeys((row["engine"], row["target"]) for row in document["engines"])
    return [
        _engine(
            engine_title(engine, target),
            {
                row["variant"]: row
                for row in document["engines"]
                if (row["engine"], row["target"]) == (engine, target)
            },
        )
        for engine, target in targets
    ]


def operators(document: Document) -> Table:
    """How many operators of each type there are before and after, where that changed."""
    columns = (Column("operator"), Column("before", number=True), Column("after", number=True))
    program = document["program"]
    before, after = program["operators_by_type_before"], program["operators_by_type_after"]
    kinds = sorted({*before, *after}, key=lambda kind: (-before.get(kind, 0), kind))
    rows = [
        (kind, str(before.get(kind, 0)), str(after.get(kind, 0)))
        for kind in kinds
        if before.get(kind, 0) != after.get(kind, 0)
    ]
    return table("Operators", columns, rows, empty="No operator count changed.")


def refusals(document: Document, limit: int | None = None) -> Table:
    """Why a pass left a place alone: grouped by reason, the most frequent first.

    Args:
        document: the report.
        limit: how many groups to show; the others are counted in a note.
    """
    columns = (
        Column("pass"),
        Column("reason"),
        Column("places", number=True),
        Column("first of them"),
    )
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for step in document["steps"]:
        for refused in step["refused"]:
            # A pass that is run again refuses the same place again: it counts once.
            groups.setdefault((step["name"], refused["reason"]), {})[refused["site"]] = None
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    shown = ordered[:limit]
    rows = [(name, reason, str(len(sites)), _first(sites)) for (name, reason), sites in shown]
    left_out = len(ordered) - len(shown)
    note = f"{left_out} more reasons: 'optfuse explain --by pass' shows them all."
    notes = (note.replace("reasons", "reason") if left_out == 1 else note,) if left_out else ()
    return table(REFUSED, columns, rows, empty="No pass refused a place.", notes=notes)


def artifacts(document: Document) -> Table:
    """The files that were written."""
    columns = (
        Column("file"),
        Column("kind"),
        Column("size MB", number=True),
        Column("sha256"),
    )
    rows = [
        (
            row["path"],
            row["kind"],
            megabytes(row["size_bytes"]),
            row["sha256"][:_SHA256_DIGITS],
        )
        for row in document["artifacts"]
    ]
    return table("Files", columns, rows)


def machine(document: Document) -> str:
    """What the numbers were taken on, in one line."""
    known = document["environment"]
    gpu = known.get("gpu")
    versions = _plain(known.get("versions") or {})
    parts = (
        known.get("cpu_model"),
        gpu.get("name") if isinstance(gpu, Mapping) else gpu,
        f"CPU threads: {document['settings']['threads']}",
        versions,
    )
    return printable(", ".join(str(part) for part in parts if part))


def environment(document: Document) -> list[str]:
    """One line for each thing known about the machine and the versions."""
    return [
        printable(f"{_label(key)}: {_value(key, value)}")
        for key, value in document["environment"].items()
    ]


def explanation(steps: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Every place every step rewrote or refused, as (level of indentation, line)."""
    lines: list[tuple[int, str]] = []
    for step in steps:
        if step["stage"] != "pass":
            continue
        lines.append((0, _step_sentence(step)))
        if step["undone"]:
            lines.append((1, f"undone: {step['undone']}"))
        for site in step["sites"]:
            lines.append((1, f"rewritten {site['site']}" + _after(": ", site["note"])))
        for refused in step["refused"]:
            lines.append((1, f"refused {refused['site']}: {refused['reason']}"))
    return [(level, printable(line)) for level, line in lines]


def _engine(title: str, variants: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = [variant for variant in VARIANTS if variant in variants]
    columns = (Column(""), *(Column(VARIANTS[variant], number=True) for variant in shown))
    totals: dict[str, int] = {}
    for row in variants.values():
        for kind, number in row["layers_by_type"].items():
            totals[kind] = totals.get(kind, 0) + number
    kinds = sorted(totals, key=lambda kind: (-totals[kind], kind))
    lines = [
        ("layers", [str(variants[variant]["layers"]) for variant in shown]),
        *(
            (
                f"  {kind}",
                [str(variants[variant]["layers_by_type"].get(kind, 0)) for variant in shown],
            )
            for kind in kinds
        ),
        *(
            (label, [megabytes(variants[variant][key]) for variant in shown])
            for label, key in (
                ("activations MB", "activation_bytes"),
                ("weights MB", "weight_bytes"),
                ("engine MB", "size_bytes"),
            )
        ),
        (
            "build seconds",
            [significant(variants[variant]["build_seconds"], 2) for variant in shown],
        ),
    ]
    return table(title, columns, [(label, *cells) for label, cells in lines])


def _conditions(document: Document) -> list[str]:
    devices = dict.fromkeys(f"{row['engine']} on {row['device']}" for row in document["latency"])
    runs = {len(row["samples_ms"]) for row in document["latency"]}
    return [
        f"Ran {', '.join(devices)}, {'at least ' if len(runs) > 1 else ''}{min(runs)} runs of each."
    ]


def against_export(document: Document) -> list[Mapping[str, Any]]:
    """What the optimized program gained over the export as it comes, a row for each engine."""
    return [
        row
        for row in document["speedups"]
        if (row["variant"], row["against"]) == ("optimized", "baseline")
        and row["engine"] == row["against_engine"]
    ]


def _speedup_sentence(row: Mapping[str, Any], drifts: Sequence[Mapping[str, Any]]) -> str:
    # "undecided against", but "faster than": the verdict itself stays whole either way.
    joint = "than" if row["verdict"] in ("faster", "slower") else "against"
    who = placed(row["engine"], row)
    sentence = f"{who} {_ratio(row)} {row['verdict']} {joint} the export as it comes"
    own = (
        drift
        for drift in drifts
        if (drift["engine"], drift["variant"]) == (row["engine"], "optimized")
        and drift.get("at") == row.get("at")
    )
    return sentence + "".join(f"; drift {drift_words(drift)}" for drift in own)


def placed(what: str, row: Mapping[str, Any]) -> str:
    """Something, with the sizes of the open dimensions that a row is about, where there are any."""
    return what + _after(" at ", row.get("at") or "")


def _at(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[Column], Callable[[Mapping[str, Any]], list[str]]]:
    """The column of the open dimensions' sizes, and a row's cell in it; neither where none is."""
    if not any(row.get("at") for row in rows):
        return [], lambda _row: []
    return [Column("at")], lambda row: [row.get("at") or NONE]


def drift_words(row: Mapping[str, Any]) -> str:
    """A row of the document's `drift` beside the export's own drift.

    In a lower precision that is thousands of times the export's, and the distance itself says more.
    """
    ratio = row["ratio_to_baseline"]
    if ratio is None:
        return f"{distance(row['relative_l2'])} (the export's own is zero or unknown)"
    if ratio < LOW_PRECISION:
        return f"{times(ratio)} of the export's own"
    agreed = "" if row["top1_agreement"] is None else f", top-1 equal {row['top1_agreement']:.1%}"
    return f"{distance(row['relative_l2'])} relative L2{agreed}"


def _multiple(ratio: float | None) -> str:
    """How many times the export's own drift, where that says anything."""
    return NONE if ratio is None or ratio >= LOW_PRECISION else times(ratio)


def _missing_sentence(engine: str, target: str, reason: str, names: Sequence[str], at: str) -> str:
    subject = engine + _after(" ", target)
    # Both variants missing is the usual case and needs no list.
    if len(set(names)) == 1:
        subject += f" {names[0]}"
    where = _after(" at ", at)
    return f"{subject} not measured{where}: {reason.removeprefix('not measured: ')}"


def _step_sentence(step: Mapping[str, Any]) -> str:
    done = "undone" if step["undone"] else "rewritten"
    return (
        f"{step['name']}: {step['matched']} {done}, {len(step['refused'])} refused,"
        f" {step['operators_before']} -> {step['operators_after']} operators"
        + ("" if step["relative_l2"] is None else f", proof {distance(step['relative_l2'])}")
    )


def _who(row: Mapping[str, Any]) -> str:
    return f"{row['engine']} {VARIANTS[row['variant']]}"


def _against(row: Mapping[str, Any]) -> str:
    variant = VARIANTS[row["against"]]
    same_engine = row["engine"] == row["against_engine"]
    return variant if same_engine else f"{row['against_engine']} {variant}"


def _ratio(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None:
        return NONE
    return f"{times(row['ratio'], decimals(row))} {interval(row)}"


def _first(sites: Iterable[str]) -> str:
    names = list(sites)
    shown = ", ".join(names[:_FIRST_SITES])
    return shown + (", ..." if len(names) > _FIRST_SITES else "")


def _after(joint: str, text: str) -> str:
    return f"{joint}{text}" if text else ""


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _value(key: str, value: Any) -> str:
    return f"{count(value)}B" if key.endswith("_bytes") and value is not None else _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        known = {key: item for key, item in value.items() if item is not None}
        return ", ".join(
            f"{key.removesuffix('_bytes')} {_value(key, item)}" for key, item in known.items()
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or NONE
    return NONE if value is None else str(value)
