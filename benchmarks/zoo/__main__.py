"""Run the zoo, and write `docs/zoo.md` and `docs/zoo.json`.

    python -m benchmarks.zoo [--only PATTERN] [--fresh]

Prints a line a network. Stopped and started again it goes on where it was; with other sources or
versions, or with --fresh, it begins anew. With --only the documents are left as they are.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.kept import ROOT
from benchmarks.zoo import results, table
from benchmarks.zoo.run import NETWORKS
from benchmarks.zoo.workers import Job, run_all
from optfuse.environment import environment

MARKDOWN = ROOT / "docs" / "zoo.md"
DOCUMENT = ROOT / "docs" / "zoo.json"


def main(arguments: list[str]) -> int:
    """Run what is not known yet; 1 where a network came out wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="e.g. 'resnet*'")
    parser.add_argument("--fresh", action="store_true", help="run what is known again")
    asked = parser.parse_args(arguments)
    names = fnmatch.filter(NETWORKS, asked.only)
    if not names:
        parser.error(f"no network is called '{asked.only}'")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
    try:
        rows = _run(names, fresh=asked.fresh)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.")
        return 130
    if len(names) == len(NETWORKS):
        _write(rows)
    print(f"{table.summary(rows)}; {table.minutes(rows):.0f} minutes of processor time")
    return int(any(row["outcome"] in ("wrong", "crashed") for row in rows.values()))


def _run(names: list[str], *, fresh: bool) -> dict[str, dict[str, Any]]:
    """The row of each of these networks, from an earlier run or from this one."""
    made_with = results.fingerprint()
    known = {} if fresh else results.known(made_with)
    rows = {name: dict(known[name]) for name in names if name in known}
    if rows:
        print(f"{len(rows)} of {len(names)} are known from an earlier run", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    missing = [Job(name, NETWORKS[name].parameter_bytes) for name in names if name not in rows]
    for job, row in run_all(missing):
        rows[job.name] = row
        if row["outcome"] != "left out":  # another time there may be memory for it
            results.keep(job.name, row, made_with)
        place = f"[{len(rows):{len(str(len(names)))}}/{len(names)}]"
        print(f"{place} {table.progress(job.name, row)}", flush=True)
    return {name: rows[name] for name in names}


def _write(rows: Mapping[str, Mapping[str, Any]]) -> None:
    described = {name: {**_described(name), **row} for name, row in rows.items()}
    setting = table.Setting(results.versions(), str(environment(1)["cpu_model"]))
    DOCUMENT.write_text(table.document(described), encoding="utf-8")
    MARKDOWN.write_text(table.page(described, setting), encoding="utf-8")


def _described(name: str) -> dict[str, str]:
    network = NETWORKS[name]
    return {
        "group": network.group,
        "family": network.family,
        "input": "x".join(map(str, network.shape)),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
