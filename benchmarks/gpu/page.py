"""What the proof on a GPU found, as `docs/gpu.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

INTRODUCTION = """# On a GPU

Every network of `models/`, before the passes and after them, on every engine that was found.
`make gpu-proof` writes this page on a machine with an NVIDIA GPU, within 8 minutes. TF32 is off.

*passes*: how many times as fast the optimized program is as the captured one, or as the export as
it comes, on the same engine: a paired ratio from interleaved runs, with its interval at 95 %; above
1 is faster. *against eager*: the same against eager PyTorch on the GPU before the passes. *drift*:
the relative L2 distance to the captured program in float64, before the passes and after them.
"""


def page(document: Mapping[str, Any]) -> str:
    """The page of one run."""
    machine = document["environment"]
    gpu = machine["gpu"] or {}
    numbers = machine["versions"].items()
    versions = ", ".join(f"{name} {number}" for name, number in numbers if number)
    parts = [
        INTRODUCTION,
        f"{gpu.get('name', 'No GPU')}, driver {gpu.get('driver', 'unknown')}; "
        f"{machine['cpu_model']}. {versions}. It took {document['minutes']:.1f} minutes.\n",
        _summary(document["rows"]),
    ]
    engines = list(dict.fromkeys(row["engine"] for row in document["rows"]))
    parts += [_table(engine, document["rows"]) for engine in engines]
    missing = [
        *(f"{each['engine']}: {each['reason']}" for each in document["skipped"]),
        *document["left_out"],
    ]
    if missing:
        parts.append("\n".join(["## Not run\n", *(f"- {each}" for each in missing)]) + "\n")
    return "\n".join(parts)


def left_out(
    rows: Sequence[Row], networks: Sequence[str], engines: Sequence[str], why: str
) -> list[str]:
    """For each engine, the networks that it has no row of, and why."""
    found = {(row["engine"], row["network"]) for row in rows}
    sentences = []
    for engine in engines:
        missing = [network for network in networks if (engine, network) not in found]
        if missing:
            sentences.append(f"{engine}: {why} before {', '.join(missing)}")
    return sentences


def progress(row: Row) -> str:
    """A row in a line."""
    name = f"{row['network']} on {row['engine']}"
    if "failed" in row:
        return f"{name} failed: {row['failed']}"
    wrong = ", WRONG" if row["wrong"] else ""
    return (
        f"{name}: {row['before_ms']:.3f} -> {row['after_ms']:.3f} ms, {_ratio(row['ratio'])} "
        f"{row['verdict']}, drift {row['drift'][0]:.1e} -> {row['drift'][1]:.1e}{wrong}"
    )


def _summary(rows: Sequence[Row]) -> str:
    ran = [row for row in rows if "failed" not in row]
    counted = {
        verdict: sum(row["verdict"] == verdict for row in ran)
        for verdict in ("faster", "undecided", "slower")
    }
    wrong = sum(row["wrong"] for row in ran)
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in counted.items())
    failed = len(rows) - len(ran)
    return f"{len(ran)} runs: {verdicts}; {wrong} wrong, {failed} failed.\n"


def _table(engine: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["engine"] == engine]
    lines = [
        f"## {engine}\n",
        "| network | before ms | after ms | passes | verdict | noise floor | against eager | "
        "drift before | after |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in own:
        if "failed" in row:
            lines.append(f"| {row['network']} | failed: {row['failed']} | | | | | | | |")
            continue
        eager = "" if row["against_eager"] is None else _ratio(row["against_eager"])
        lines.append(
            f"| {row['network']} | {row['before_ms']:.3f} | {row['after_ms']:.3f} | "
            f"{_ratio(row['ratio'])} | {'**wrong**' if row['wrong'] else row['verdict']} | "
            f"{row['noise_floor']:.3f}x | {eager} | {row['drift'][0]:.1e} | {row['drift'][1]:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _ratio(ratio: Sequence[float]) -> str:
    middle, low, high = ratio
    return f"{middle:.2f}x [{low:.2f}, {high:.2f}]"
