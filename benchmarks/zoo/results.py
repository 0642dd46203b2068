"""What is known so far: one JSON line a network in `out/zoo/results.jsonl`, so that runs resume.

A line counts for the sources and versions that it was made with, and for no others.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = ROOT / "out" / "zoo" / "results.jsonl"

PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy")
"""What the figures depend on beside our own sources."""

MAKING = ("networks", "run", "figures", "refusals")
"""The files beside this one that make rows; the others schedule and show them."""

Row = Mapping[str, Any]


def versions() -> dict[str, str]:
    """Python's version and those of `PACKAGES`."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def fingerprint(root: Path = ROOT) -> str:
    """A hash of every source that a row depends on, and of the versions."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for path in _sources(root):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(root: Path) -> list[Path]:
    """What makes rows; the command line and the reports that optfuse renders do not."""
    package = root / "optfuse"
    shown = (package / "cli", package / "report")
    return [
        *(each for each in sorted(package.rglob("*.py")) if not set(shown) & set(each.parents)),
        *sorted((root / "models").glob("*.py")),
        *(root / "benchmarks" / "zoo" / f"{name}.py" for name in MAKING),
    ]


def keep(name: str, row: Row, made_with: str, file: Path = FILE) -> None:
    """Append the row of one network."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        # A line of its own, even behind one that was cut short.
        lines.write("\n" + json.dumps({"name": name, "made_with": made_with, "row": row}) + "\n")


def known(made_with: str, file: Path = FILE) -> dict[str, Row]:
    """The rows of every network that was run with these sources and versions, the latest of each.

    A network that crashed is run again.
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
