"""What a long benchmark knows so far: one JSON line a row, so that it goes on where it was stopped.

A line counts for the sources and versions that it was made with, and for no others.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

Row = Mapping[str, Any]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def fingerprint(packages: Iterable[str], making: Sequence[str], root: Path = ROOT) -> str:
    """A hash of every source that a row depends on, and of the versions.

    Args:
        packages: what the figures depend on beside our own sources.
        making: files of the benchmark that make rows, under `benchmarks/`; those that schedule and
            show them do not count.
        root: of the repository.
    """
    digest = hashlib.sha256(json.dumps(versions(packages), sort_keys=True).encode())
    for path in _sources(root, making):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(root: Path, making: Sequence[str]) -> list[Path]:
    """What makes rows; the command line and the reports that optfuse renders do not."""
    package = root / "optfuse"
    shown = (package / "cli", package / "report")
    return [
        *(each for each in sorted(package.rglob("*.py")) if not set(shown) & set(each.parents)),
        *sorted((root / "models").glob("*.py")),
        *(root / "benchmarks" / name for name in making),
    ]


def keep(name: str, row: Row, made_with: str, file: Path) -> None:
    """Append a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        # A line of its own, even behind one that was cut short.
        lines.write("\n" + json.dumps({"name": name, "made_with": made_with, "row": row}) + "\n")


def known(made_with: str, file: Path) -> dict[str, Row]:
    """The rows that were made with these sources and versions, the latest of each name.

    What crashed is run again.
    """
    if not file.is_file():
        return {}
    found: dict[str, Row] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            kept = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut short, as where the run was ended while it wrote
        if kept["made_with"] == made_with and kept["row"]["outcome"] != "crashed":
            found[kept["name"]] = kept["row"]
    return found
