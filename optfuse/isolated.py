"""A fresh process for each thing that is timed, interleaved with the others from here.

Thread pools that spin while they have nothing to do, memory that another engine has fragmented,
settings that are global to a process: none of it reaches the one that runs. While a process waits
for its turn it sleeps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optfuse import backends
from optfuse.errors import EngineError, OptfuseError
from optfuse.measure import InProcess, Schedule, no_garbage_collection
from optfuse.stages import Artifact, BuildOptions
from optfuse.subjects import Subject, program_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

GOODBYE_SECONDS = 2.0
"""How long a process may take to end by itself before it is ended."""


@dataclass(frozen=True)
class Job:
    """What one process opens and runs.

    Attributes:
        subject: what it is; its engine opens it.
        artifact: the file that the engine opens, or None for a program, which the process loads and
            captures by itself.
        batch: as in `optfuse.subjects.program_of`.
        feeds: a file with the list of inputs, as `torch.save` writes it.
        threads: of the engine.
    """

    subject: Subject
    artifact: Artifact | None
    batch: int | None
    feeds: Path
    threads: int


class Isolated:
    """A process that has opened one subject; an `optfuse.measure.Timed`.

    Args:
        job: what it opens.
        serve: for tests: what runs in the process.

    Raises:
        OptfuseError: what went wrong in the process, as it would have here.
        EngineError: the process crashed.
    """

    def __init__(self, job: Job, serve: Callable[[Connection, Job], None] | None = None) -> None:
        # Spawned and not forked: a fork would inherit the thread pools that it is to be free of.
        context = multiprocessing.get_context("spawn")
        self._name = job.subject.name
        self._connection, theirs = context.Pipe()
        if job.artifact is not None:
            job = replace(job, artifact=replace(job.artifact, trace=()))
        self._process = context.Process(target=serve or _serve, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.device: str = self._answer("opening")
        except BaseException:
            self.close()
            raise

    def warm_up(self, schedule: Schedule) -> float:
        """Run until warm; milliseconds of a run."""
        return float(self._ask("warming up", "warm_up", schedule))

    def block(self, runs: int) -> tuple[float, ...]:
        """Run once without timing, then time so many runs one by one; milliseconds of each."""
        samples_ms: tuple[float, ...] = self._ask("running", "block", runs)
        return samples_ms

    def close(self) -> None:
        """End the process."""
        # Closing the pipe is what it waits for.
        self._connection.close()
        self._process.join(GOODBYE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, doing: str, method: str, argument: Any) -> Any:
        try:
            self._connection.send((method, argument))
        except OSError:
            raise self._crashed(doing) from None
        return self._answer(doing)

    def _answer(self, doing: str) -> Any:
        try:
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise self._crashed(doing) from None
        if error is not None:
            raise error
        return result

    def _crashed(self, doing: str) -> EngineError:
        self._process.join(GOODBYE_SECONDS)
        code = self._process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {-code}, {signal.Signals(-code).name}"
        return EngineError(
            f"The process of '{self._name}' ended while {doing} it",
            f"It did not come back: {how}",
            "Run it alone with --in-process to see what it prints, or leave it out",
        )


def _serve(connection: Connection, job: Job) -> None:
    """What runs in the process: open, then warm up and run blocks until the pipe closes."""
    # An interrupt from the keyboard reaches every process; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A model may print; standard output is the report's alone.
    os.dup2(2, 1)
    try:
        _open_and_run(connection, job)
    except (EOFError, BrokenPipeError):
        return
    except OptfuseError as error:
        connection.send((None, error))
    except Exception as error:
        unexpected = EngineError(
            f"The process of '{job.subject.name}' failed",
            f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            "Run it with --in-process, and report it if that works",
        )
        connection.send((None, unexpected))


def _open_and_run(connection: Connection, job: Job) -> None:
    thing = job.artifact or program_of(job.subject, job.batch)
    feeds = torch.load(job.feeds, weights_only=True)
    options = BuildOptions(threads=job.threads)
    with backends.get(job.subject.engine).open(thing, options) as session, no_garbage_collection():
        session.bind(feeds)
        session.run()
        timed = InProcess(session)
        connection.send((session.device, None))
        while True:
            method, argument = connection.recv()
            connection.send((getattr(timed, method)(argument), None))
