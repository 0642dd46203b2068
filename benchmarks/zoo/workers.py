"""Runs networks side by side, each in a process of its own with one thread.

A process gives all its memory back when it ends, and one that crashes or takes too long costs its
own row and no other. They are forked from one that has imported everything and run nothing, because
the imports take as long as a small network.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.zoo import run

WORKERS = 2
LIMIT_SECONDS = 1800.0
"""Of one network: several times what the slowest takes on one core."""

BASE_BYTES = 1.5 * 2**30
"""What Python, the libraries, the activations and a small network's graphs take."""
TIMES_PARAMETERS = 5.0
"""What the rest takes, as a multiple of the parameters: the model, its constants in float64 while
passes run, and the copies that torch.onnx makes while it writes; 4.3 was the most seen."""

POLL_SECONDS = 0.2

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One network to run, and the bytes of its parameters."""

    name: str
    parameter_bytes: int

    @property
    def needed_bytes(self) -> float:
        """An upper bound of the memory that its process takes."""
        return BASE_BYTES + TIMES_PARAMETERS * self.parameter_bytes


@dataclass
class Worker:
    """A process that runs one network."""

    job: Job
    folder: tempfile.TemporaryDirectory[str]
    process: BaseProcess
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, job: Job) -> Worker:
        """Start it; what it finds and prints goes to files."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.zoo.run"])
        folder = tempfile.TemporaryDirectory(prefix="optfuse-zoo-")
        process = context.Process(target=run.into, args=(folder.name, job.name), daemon=True)
        process.start()
        return cls(job, folder, process)

    def row(self, limit_seconds: float = LIMIT_SECONDS) -> Row | None:
        """What came out, or None while it runs."""
        code = self.process.exitcode
        if code is None and time.monotonic() - self.started < limit_seconds:
            return None
        if code is None:
            self.process.kill()
            return _crashed(f"it took more than {limit_seconds:.0f} seconds")
        if code == 0:
            row: Row = json.loads((Path(self.folder.name) / "row.json").read_text("utf-8"))
            return row
        log = Path(self.folder.name) / "log"
        lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _crashed(f"{how}: {last}")

    def close(self) -> None:
        """End the process if it still runs, and remove its files."""
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


def run_all(
    jobs: Sequence[Job],
    *,
    available: Callable[[], float] | None = None,
) -> Iterator[tuple[Job, Row]]:
    """Run every job and give each with its row, in the order they end.

    The largest start first, so that none of them is alone at the end. One that does not fit into
    memory beside the others waits, and one that does not fit by itself is left out.

    Args:
        jobs: what to run.
        available: bytes of memory that are free now; by default what the system says.
    """
    free = available or available_bytes
    waiting = sorted(jobs, key=lambda job: -job.parameter_bytes)
    running: list[Worker] = []
    try:
        while waiting or running:
            spare = free() - sum(_still_to_come(worker) for worker in running)
            fitting = next((job for job in waiting if job.needed_bytes <= spare), None)
            if len(running) < WORKERS and fitting is not None:
                waiting.remove(fitting)
                running.append(Worker.start(fitting))
                continue
            if not running:
                job = waiting.pop(0)
                yield job, _left_out(job, spare)
                continue
            time.sleep(POLL_SECONDS)
            for worker in list(running):
                row = worker.row()
                if row is not None:
                    running.remove(worker)
                    worker.close()
                    yield worker.job, row
    finally:
        for worker in running:
            worker.close()


def available_bytes() -> float:
    """Memory that can be had without swapping, as Linux reports it; infinite elsewhere."""
    found = _field(Path("/proc/meminfo"), "MemAvailable")
    return float("inf") if found is None else found


def _still_to_come(worker: Worker) -> float:
    """What a process may take beyond what it has, which no longer counts as available."""
    has = _field(Path(f"/proc/{worker.process.pid}/status"), "VmRSS") or 0
    return max(0.0, worker.job.needed_bytes - has)


def _field(path: Path, name: str) -> float | None:
    """A size in bytes from one of Linux's tables, or None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    found = next(sizes, None)
    return None if found is None else float(found) * 2**10


def _left_out(job: Job, spare: float) -> Row:
    needed, had = job.needed_bytes / 2**30, spare / 2**30
    return {
        "outcome": "left out",
        "why": f"it needs up to {needed:.0f} GiB of memory, and {had:.0f} GiB were free",
    }


def _crashed(why: str) -> Row:
    return {"outcome": "crashed", "why": why}
