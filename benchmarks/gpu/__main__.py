"""Prove the passes on the GPU that is here, and write `docs/gpu.md` and `docs/gpu.json`.

    python -m benchmarks.gpu [--minutes 8] [--networks PATTERN]

It needs only what is installed, says what it skipped and why, and ends within the time. Exit code 1
where a network came out wrong, 2 where there is no GPU: then nothing is written.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import kept
from benchmarks.gpu import page
from benchmarks.gpu.run import NETWORKS, Row, prove, usable
from benchmarks.kept import ROOT
from optfuse import backends
from optfuse.environment import available_threads, environment

EAGER = "torch-cuda"
SLOW_TO_OPEN = ("torch-compile-cuda",)
SECONDS_EACH = 5.0
"""How long is measured on each network; a run takes milliseconds at most."""

CLOSING_SECONDS = 5.0
"""For writing what was found, at the end."""

MARKDOWN = ROOT / "docs" / "gpu.md"
DOCUMENT = ROOT / "docs" / "gpu.json"
PACKAGES = ("torch", "onnx", "numpy")


def main(arguments: list[str]) -> int:
    """Run everything that can be run here within the time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="when it ends at the latest")
    parser.add_argument("--networks", metavar="PATTERN", default="*", help="e.g. 'resnet*'")
    asked = parser.parse_args(arguments)
    begun = time.monotonic()
    networks = fnmatch.filter(NETWORKS, asked.networks)
    if not networks:
        parser.error(f"no network is called '{asked.networks}'")
    engines, skipped = usable(backends.ON_GPU)
    for each in skipped:
        print(f"skipped {each.engine}: {each.reason}")
    if EAGER not in engines:
        print("There is nothing to prove it on, and nothing was written.", file=sys.stderr)
        return 2
    rounds = [
        [name for name in engines if name not in SLOW_TO_OPEN],
        [name for name in engines if name in SLOW_TO_OPEN],
    ]
    rows, ended = within(
        60 * asked.minutes - (time.monotonic() - begun) - CLOSING_SECONDS,
        (networks, rounds, EAGER, SECONDS_EACH, available_threads()),
    )
    machine = environment(available_threads())
    document = {
        "environment": {**machine, "versions": {**machine["versions"], **kept.versions(PACKAGES)}},
        "rows": rows,
        "skipped": [{"engine": each.engine, "reason": each.reason} for each in skipped],
        "left_out": page.left_out(rows, networks, engines, ended),
        "minutes": (time.monotonic() - begun) / 60,
    }
    if len(networks) == len(NETWORKS):
        DOCUMENT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        MARKDOWN.write_text(page.page(document), encoding="utf-8")
    return int(any(row.get("wrong") for row in rows))


def within(seconds: float, arguments: Sequence[Any]) -> tuple[list[Row], str]:
    """The rows that come within the time, and what ended them.

    They come from a process that is ended with the time: no engine can hold this one up, whatever
    it compiles or hangs in, and none can take it along when it crashes.
    """
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    worker = context.Process(target=_send, args=(sending, arguments))
    worker.start()
    sending.close()
    rows: list[Row] = []
    ended = "the time was up"
    try:
        while receiving.poll(max(0.0, end - time.monotonic())):
            row: Row = receiving.recv()
            rows.append(row)
            print(page.progress(row), flush=True)
    except EOFError:
        worker.join()
        ended = f"the process ended with exit code {worker.exitcode}"
    finally:
        worker.terminate()
        worker.join()
    return rows, ended


def _send(sending: Connection, arguments: Sequence[Any]) -> None:
    for row in prove(*arguments):
        sending.send(row)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
