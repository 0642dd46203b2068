"""The rows of all networks as `docs/benchmarks.md` and `docs/benchmarks.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.contenders import ALL, REFERENCE, TOO_SLOW

Rows = Mapping[str, Mapping[str, Any]]
"""`googlenet at batch 1` -> what `run.run` gave."""

INTRODUCTION = """# optfuse beside its peers

Ten networks at batch 1 and 8, each measured in one interleaved run of all contenders on one CPU
thread. Everything is a ratio to *the reference*: what `torch.onnx.export` gives as it comes, on
ONNX Runtime. Above 1 is faster than that; the interval is at 95 %, and a verdict is undecided where
the interval holds 1 or the ratio is within the noise floor, which is the reference against itself.
`make bench` writes this page; it goes on where it was stopped.

*drift* is the relative L2 distance to the captured program in float64. The weights of these
networks are random, so that their drift says what rounding does to such a network, and not what it
costs in accuracy: for that, there is the trained network further down. *ceiling* is the share of
what the machine can do, in float32: the least time that its measured matrix product and copy allow,
over the time it took. Low precision and Winograd's convolutions can go beyond 100 %.
"""


def page(rows: Rows, accuracy: Sequence[Mapping[str, Any]], setting: str) -> str:
    """The page.

    Args:
        rows: of each network at each batch.
        accuracy: of the trained network in each precision.
        setting: the machine and the versions, in a sentence.
    """
    parts = [INTRODUCTION, f"{setting}\n", _geometric_means(rows)]
    parts += [_table(name, row) for name, row in rows.items()]
    parts.append(_accuracy(accuracy))
    return "\n".join(parts)


def document(rows: Rows, accuracy: Sequence[Mapping[str, Any]], setting: str) -> str:
    """The same as JSON."""
    whole = {"setting": setting, "networks": rows, "accuracy": accuracy}
    return json.dumps(whole, indent=1) + "\n"


def progress(name: str, row: Mapping[str, Any]) -> str:
    """What one network at one batch came to, in a line."""
    if row["outcome"] != "measured":
        return f"{name}: {row['outcome']}: {row['why']}"
    ours = [each for each in _measured(row) if each["by"] == "optfuse"]
    others = [each for each in _measured(row) if each["by"] != "optfuse"]
    best = [max(group, key=lambda each: float(each["ratio"][0])) for group in (others, ours)]
    named = "; ".join(f"{_who(each)} {_ratio(each)}" for each in best)
    return f"{name}: {named}, {row['seconds']:.0f} s"


def _geometric_means(rows: Rows) -> str:
    """Over all networks and batches that have a contender; only those that are in all of them."""
    measured = [row for row in rows.values() if row["outcome"] == "measured"]
    lines = [
        "## Over all of them\n",
        "*of* says how many networks and batches a row is of: where a contender cannot run, or\n"
        f"takes more than {TOO_SLOW:.0f} times as long as the reference, it is not in the mean.\n",
        "| made by | engine | precision | times as fast, geometric mean | least | most | of |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for contender in ALL:
        ratios = [
            float(each["ratio"][0])
            for row in measured
            for each in _measured(row)
            if _who(each) == contender.name
        ]
        if contender == REFERENCE or not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"| {contender.by} | {contender.engine} | {contender.precision} | {mean:.2f}x | "
            f"{min(ratios):.2f}x | {max(ratios):.2f}x | {len(ratios)} |"
        )
    return "\n".join(lines) + "\n"


def _table(name: str, row: Mapping[str, Any]) -> str:
    if row["outcome"] != "measured":
        return f"## {name}\n\nNot measured: {row['why']}.\n"
    lines = [
        f"## {name}\n",
        f"Noise floor {row['noise_floor']:.3f}x.",
        "",
        *(f"- {caveat}" for caveat in row["caveats"]),
        *([""] if row["caveats"] else []),
        "| made by | engine | precision | median ms | times as fast | verdict | drift | top-1 | "
        "ceiling |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for each in sorted(_measured(row), key=lambda each: float(each["median_ms"])):
        top1 = "" if each["top1"] is None else f"{each['top1']:.0%}"
        share = "" if each["share"] is None else f"{each['share']:.0%}"
        lines.append(
            f"| {each['by']} | {each['engine']} | {each['precision']} | {each['median_ms']:.3g} | "
            f"{_ratio(each)} | {each['verdict']} | {each['relative_l2']:.1e} | {top1} | {share} |"
        )
    missing = [each for each in row["contenders"] if "missing" in each]
    if missing:
        reasons: dict[str, list[str]] = {}
        for each in missing:
            reasons.setdefault(each["missing"], []).append(_who(each))
        lines += ["", *(f"- {', '.join(who)}: {why}." for why, who in reasons.items())]
    return "\n".join(lines) + "\n"


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    images = rows[0]["images"] if rows else 0
    lines = [
        "## What a precision costs in accuracy\n",
        f"`models/digits.py` is trained. These are {images} images that neither its training nor "
        "its calibration saw.\n",
        "| made by | engine | precision | read correctly | as float64 reads them | drift |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['by']} | {row['engine']} | {row['precision']} | "
            f"{row['correct'] / row['images']:.2%} | {row['top1']:.2%} | {row['relative_l2']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _measured(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in row["contenders"] if "missing" not in each]


def _who(each: Mapping[str, Any]) -> str:
    return f"{each['by']} {each['engine']} {each['precision']}"


def _ratio(each: Mapping[str, Any]) -> str:
    ratio, low, high = each["ratio"]
    return f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"
