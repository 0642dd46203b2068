"""Rows -> `docs/zoo.md` and `docs/zoo.json`; nothing here runs anything.

The JSON file holds what is counted and nothing that depends on the machine, one line a network, so
that a refactor of the passes shows an empty diff.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.zoo.networks import GROUPS, LEFT_OUT
from benchmarks.zoo.refusals import what_would_lift

Row = Mapping[str, Any]
"""What `benchmarks.zoo.run` prints of a network, with its `group`, `family` and `input`."""

COUNTED = (
    *("group", "family", "input", "outcome", "why"),
    *("operators", "onnx_operators", "batch_norms", "behind_convolutions"),
    *("kinds", "passes", "refused"),
)
"""The keys of a row that the JSON file holds."""

SHORT = {
    "eliminate_identity": "identity",
    "fold_constants": "constants",
    "eliminate_common_subexpressions": "duplicates",
    "fold_conv_bn": "conv bn",
    "fold_affine_input": "affine input",
    "fold_linear_chain": "linear chain",
    "merge_branches": "branches",
    "combine_parallel_convs": "parallel convs",
    "elide_concat": "concat",
    "route_channels": "channels",
    "fuse_conv_activation": "activation",
}
"""A pass -> the head of its column."""

INTRODUCTION = """\
# The zoo

Every network of `torchvision.models`, the backbones of its detectors, its segmentation and video
networks, and the demonstration networks of this repository, taken through all passes. `make zoo`
writes this page; it goes on where it was stopped.

Weights are random and seeded, and no batch norm is an identity. Each network is captured,
optimised with all passes, and exported twice: as `torch.onnx.export` has it, and as ours. Both
files run under ONNX Runtime on the CPU and are compared with the captured program in float64.

A network is *wrong* where a pass had to be undone, or where our file is more than 1e-4 (relative
L2) and more than ten times as far from float64 as the export as it comes. It is *crashed* where any
stage gave up, and *left out* where it does not fit into memory.
"""

COLUMNS = """\
*operators*: of the captured graph, and after all passes. Then how many of them each pass took away
(`+` where it added some); a pass without a column did nothing in these networks. *onnx*: operators
of the export as it comes, and of ours. *drift*: how far our file is from float64, as a multiple of
how far the export as it comes is; of one input, and from input to input both vary several times.
*refused*: places that a pass left alone.
"""


@dataclass(frozen=True)
class Setting:
    """What the head of the page says of the run.

    Attributes:
        versions: of Python and the packages.
        machine: the processor's name.
    """

    versions: Mapping[str, str]
    machine: str


@dataclass(frozen=True)
class Refused:
    """One reason of one pass, over all networks."""

    name: str
    reason: str
    places: int
    networks: int


def progress(name: str, row: Row) -> str:
    """One network in one line, for the terminal."""
    if "operators" not in row:
        return f"{name}: {row['outcome']}: {row['why']}"
    before, after = row["operators"]
    line = f"{name}: {before} -> {after} operators, drift {drift_ratio(row)}"
    refused = _refusals(row)
    line += f", {refused} refused" if refused else ""
    line += f", {sum(row['seconds'].values()):.0f} s"
    return line if row["outcome"] == "right" else f"{line}, {row['outcome'].upper()}: {row['why']}"


def summary(rows: Mapping[str, Row]) -> str:
    """All networks in one sentence."""
    counts = ", ".join(f"{_count(rows, outcome)} {outcome}" for outcome in _OUTCOMES)
    return f"{len(rows)} networks: {counts}; {_behind(rows)} batch norms behind convolutions left"


def document(rows: Mapping[str, Row]) -> str:
    """The JSON file."""
    lines = [
        f"{json.dumps(name)}: {json.dumps({key: row[key] for key in COUNTED if key in row})}"
        for name, row in rows.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def page(rows: Mapping[str, Row], setting: Setting) -> str:
    """The Markdown file."""
    parts = [INTRODUCTION, _head(rows, setting), _notes(rows), COLUMNS]
    for group, heading in GROUPS.items():
        for family, members in _families(rows, group).items():
            parts.append(f"## {heading}{': ' + family if family else ''}\n\n{_table(members)}")
    parts += [_refusal_table(rows), _left_out_table()]
    return "\n".join(part for part in parts if part)


def drift_ratio(row: Row) -> str:
    """How far ours is from float64 over how far the export as it comes is."""
    baseline, ours = row["drift"]
    if baseline == 0:
        return "exact" if ours == 0 else f"{ours:.0e} against 0"
    return f"{ours / baseline:.2f}x"


def minutes(rows: Mapping[str, Row]) -> float:
    """Processor time of all networks together, which no other load and no pause changes."""
    seconds: list[float] = [row.get("cpu_seconds", 0.0) for row in rows.values()]
    return sum(seconds) / 60


def refusals(rows: Mapping[str, Row]) -> list[Refused]:
    """Every reason of every pass, the most frequent first."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows.values():
        for name, reasons in row.get("refused", {}).items():
            for reason, places in reasons.items():
                found.setdefault((name, reason), []).append(places)
    ordered = sorted(found.items(), key=lambda item: (-sum(item[1]), item[0]))
    return [Refused(*key, sum(places), len(places)) for key, places in ordered]


_OUTCOMES = ("right", "wrong", "crashed", "left out")


def _head(rows: Mapping[str, Row], setting: Setting) -> str:
    batch_norms = [row["batch_norms"] for row in rows.values() if "batch_norms" in row]
    before, after = (sum(each[i] for each in batch_norms) for i in range(2))
    outcomes = [_count(rows, outcome) for outcome in _OUTCOMES]
    cells = [len(rows), *outcomes, before, after, _behind(rows)]
    heads = ["networks", *_OUTCOMES, "batch norms", "left", "of them behind a convolution"]
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    return (
        _markdown(heads, [list(map(str, cells))], numbers=range(len(heads)))
        + f"\nThis took {minutes(rows):.0f} minutes of one core of {setting.machine}, with "
        f"{versions}.\n\n"
        "The last column counts batch norms that alone read what one convolution or linear layer "
        "gives.\nThe others stand behind concats, sums, poolings and activations.\n"
    )


def _notes(rows: Mapping[str, Row]) -> str:
    """What did not come out right, a line each."""
    return "".join(
        f"- **{name}** {row['outcome']}: {_cell(row['why'])}\n"
        for name, row in rows.items()
        if row["outcome"] != "right"
    )


def _families(rows: Mapping[str, Row], group: str) -> dict[str, dict[str, Row]]:
    """The tables of a group: one a family where families are large, the small ones in one."""
    found: dict[str, dict[str, Row]] = {}
    for name, row in rows.items():
        if row["group"] == group:
            found.setdefault(row["family"], {})[name] = row
    if group != "classification":
        together = {name: row for members in found.values() for name, row in members.items()}
        return {"": together} if together else {}
    large = {family: members for family, members in found.items() if len(members) > 1}
    small = {k: v for members in found.values() if len(members) == 1 for k, v in members.items()}
    return {**large, **({"others": small} if small else {})}


def _table(rows: Mapping[str, Row]) -> str:
    """The networks of one table; a column for each pass that took or added operators in any."""
    whole = {name: row for name, row in rows.items() if "operators" in row}
    active = [
        name for name in SHORT if any(row["passes"].get(name, (0, 0))[1] for row in whole.values())
    ]
    heads = ["network", "operators", *(SHORT[name] for name in active)]
    heads += ["batch norms", "onnx", "drift", "refused"]
    lines = []
    for name, row in rows.items():
        if name not in whole:
            lines.append([name, row["outcome"], *[""] * (len(heads) - 2)])
            continue
        taken = [row["passes"].get(each, (0, 0))[1] for each in active]
        lines.append(
            [
                name,
                _before_after(row["operators"]),
                *("" if each == 0 else f"+{-each}" if each < 0 else str(each) for each in taken),
                _before_after(row["batch_norms"]),
                _before_after(row["onnx_operators"]),
                drift_ratio(row),
                str(_refusals(row) or ""),
            ]
        )
    return _markdown(heads, lines)


def _refusal_table(rows: Mapping[str, Row]) -> str:
    lines = [
        [
            each.name,
            each.reason,
            str(each.places),
            str(each.networks),
            what_would_lift(each.name, each.reason) or "?",
        ]
        for each in refusals(rows)
    ]
    heads = ["pass", "reason", "places", "networks", "what would lift it"]
    return (
        "## Refusals\n\nWhat a pass left alone although it looked like a match; `…` stands for "
        "the names and numbers of one place.\n\n" + _markdown(heads, lines, numbers=(2, 3))
    )


def _left_out_table() -> str:
    lines = [[what, why] for what, why in LEFT_OUT.items()]
    return "## Not in the zoo\n\n" + _markdown(["what", "why"], lines, numbers=())


def _markdown(
    heads: Sequence[str], lines: Iterable[Sequence[str]], numbers: Sequence[int] | None = None
) -> str:
    """A table, aligned as plain text too; every column but the first holds numbers by default."""
    right = set(range(1, len(heads))) if numbers is None else set(numbers)
    cells = [list(heads), *([_cell(each) for each in line] for line in lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(heads))]
    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(widths)]
    return "".join(
        "| "
        + " | ".join(
            each.rjust(width) if i in right else each.ljust(width)
            for i, (each, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |\n"
        for line in (cells[0], rule, *cells[1:])
    )


def _cell(text: str) -> str:
    """Text that does not end its cell or line."""
    return " ".join(text.replace("|", "\\|").split())


def _before_after(pair: Sequence[int]) -> str:
    before, after = pair
    return f"{before} → {after}" if before != after else str(before)


def _refusals(row: Row) -> int:
    return sum(sum(reasons.values()) for reasons in row["refused"].values())


def _count(rows: Mapping[str, Row], outcome: str) -> int:
    return sum(row["outcome"] == outcome for row in rows.values())


def _behind(rows: Mapping[str, Row]) -> int:
    return sum(row.get("behind_convolutions", 0) for row in rows.values())
