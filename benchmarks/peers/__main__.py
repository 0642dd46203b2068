"""Measure optfuse and its peers, and write `docs/benchmarks.md` and `docs/benchmarks.json`.

    python -m benchmarks.peers [--only PATTERN] [--fresh]

Prints a line a network and batch. Stopped and started again it goes on where it was; with other
sources or versions, or with --fresh, it begins anew. With --only the documents are left as they
are. Leave the machine alone meanwhile: it measures for an hour and a half.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import kept
from benchmarks.kept import ROOT
from benchmarks.peers import accuracy, page
from optfuse.environment import environment

NETWORKS = (
    *("googlenet", "inception_v3", "squeezenet", "densenet121", "resnet50"),
    *("mobilenet_v2", "shufflenet_v2", "efficientnet_b0", "repvgg_a0", "vit_tiny"),
)
BATCHES = (1, 8)
SECONDS = {1: 40.0, 8: 120.0}
"""How long is measured, by batch: about fifteen blocks of each contender."""

LONGEST_SECONDS = 3600
"""Of one network at one batch, torch.compile's own time included."""

FILE = ROOT / "out" / "peers" / "results.jsonl"
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "onnxsim", "onnxslim")
MAKING = ("peers/contenders.py", "peers/run.py", "peers/accuracy.py")
MARKDOWN = ROOT / "docs" / "benchmarks.md"
DOCUMENT = ROOT / "docs" / "benchmarks.json"


def main(arguments: list[str]) -> int:
    """Run what is not known yet; 1 where something crashed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="e.g. 'resnet50 1'")
    parser.add_argument("--fresh", action="store_true", help="run what is known again")
    asked = parser.parse_args(arguments)
    every = [f"{network} {batch}" for network in NETWORKS for batch in BATCHES]
    names = fnmatch.filter(every, asked.only)
    if not names:
        parser.error(f"no network and batch is called '{asked.only}'")
    try:
        rows = _run(names, fresh=asked.fresh)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.")
        return 130
    if names == every:
        told = accuracy.rows()
        titled = {name.replace(" ", ", batch "): row for name, row in rows.items()}
        setting = _setting()
        DOCUMENT.write_text(page.document(titled, told, setting), encoding="utf-8")
        MARKDOWN.write_text(page.page(titled, told, setting), encoding="utf-8")
    return int(any(row["outcome"] != "measured" for row in rows.values()))


def _run(names: list[str], *, fresh: bool) -> dict[str, Any]:
    """The row of each of these, from an earlier run or from this one."""
    made_with = kept.fingerprint(PACKAGES, MAKING)
    known = {} if fresh else kept.known(made_with, FILE)
    rows = {}
    for number, name in enumerate(names, 1):
        row = known.get(name)
        if row is None:
            row = _in_a_process(name)
            kept.keep(name, row, made_with, FILE)
        rows[name] = row
        print(f"[{number}/{len(names)}] {page.progress(name, row)}", flush=True)
    return rows


def _in_a_process(name: str) -> dict[str, Any]:
    """A row from a process of its own: what one engine leaves behind does not slow the next."""
    network, batch = name.split(" ")
    command = [sys.executable, "-m", "benchmarks.peers.run", network, batch]
    try:
        done = subprocess.run(
            [*command, str(SECONDS[int(batch)])],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LONGEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "crashed", "why": f"it took more than {LONGEST_SECONDS} seconds"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"outcome": "crashed", "why": f"exit code {done.returncode}: {last}"}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def _setting() -> str:
    versions = ", ".join(f"{name} {number}" for name, number in kept.versions(PACKAGES).items())
    return f"One thread of {environment(1)['cpu_model']}, with {versions}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
