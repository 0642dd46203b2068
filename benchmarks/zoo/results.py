"""The zoo's rows as far as they are known: `out/zoo/results.jsonl`, one line a network."""

from __future__ import annotations

from pathlib import Path

from benchmarks import kept
from benchmarks.kept import ROOT, Row

FILE = ROOT / "out" / "zoo" / "results.jsonl"

PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy")
"""What the figures depend on beside our own sources."""

MAKING = ("networks", "run", "figures", "refusals")
"""The files beside this one that make rows; the others schedule and show them."""


def versions() -> dict[str, str]:
    """Python's version and those of `PACKAGES`."""
    return kept.versions(PACKAGES)


def fingerprint(root: Path = ROOT) -> str:
    """A hash of every source that a row depends on, and of the versions."""
    return kept.fingerprint(PACKAGES, [f"zoo/{name}.py" for name in MAKING], root)


def keep(name: str, row: Row, made_with: str, file: Path = FILE) -> None:
    """Append the row of one network."""
    kept.keep(name, row, made_with, file)


def known(made_with: str, file: Path = FILE) -> dict[str, Row]:
    """The rows of every network that was run with these sources and versions, the latest of each.

    A network that crashed is run again.
    """
    return kept.known(made_with, file)
