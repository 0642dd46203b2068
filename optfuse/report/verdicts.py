"""The outcome of `optfuse check`: one criterion for each limit and engine, and the page of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from optfuse.report.table import NONE, Column, Page, printable, table

Outcome = Literal["passed", "failed", "undecided", "not compared"]
"""Of one criterion: held; not held; the interval does not tell; nothing to hold the limit against.
"""


@dataclass(frozen=True)
class Criterion:
    """One limit on one engine.

    Attributes:
        option: the limit's option, e.g. `--max-drift`.
        name: what is limited, e.g. `drift`.
        on: the engine, with its target where it has one; empty where it is about the program.
        limit: the limit itself.
        allowed: the limit as text, e.g. `<= 1e-05`.
        value: what was found; None where nothing was, infinity where outputs are not finite.
        found: the same as text, with its interval.
        outcome: whether the limit holds.
        sentence: what was found and what is allowed, or why that cannot be said.
        next_step: what to do where it does not hold.
    """

    option: str
    name: str
    on: str
    limit: float
    allowed: str
    value: float | None
    found: str
    outcome: Outcome
    sentence: str
    next_step: str

    @property
    def title(self) -> str:
        """The limit and the engine it is about."""
        return f"{self.option} on {self.on}" if self.on else self.option


@dataclass(frozen=True)
class Gate:
    """Whether a report keeps all limits.

    Attributes:
        name: of the model.
        criteria: in the order of the limits.
        strict: what is undecided or not compared fails as well.
        warnings: what makes the report's latencies doubtful.
        facts: what else a reader should know of the comparison.
    """

    name: str
    criteria: tuple[Criterion, ...]
    strict: bool = False
    warnings: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    @property
    def unchecked(self) -> tuple[Criterion, ...]:
        """Those of every limit that nothing at all could be held against."""
        looked_at = {each.option for each in self.criteria if each.outcome != "not compared"}
        return tuple(each for each in self.criteria if each.option not in looked_at)

    @property
    def failed(self) -> tuple[Criterion, ...]:
        """Those that fail the gate; a limit that could not be checked at all is not among them."""
        failing = ("failed", "undecided", "not compared") if self.strict else ("failed",)
        unchecked = self.unchecked
        return tuple(
            each for each in self.criteria if each.outcome in failing and each not in unchecked
        )

    @property
    def passed(self) -> bool:
        """Whether every limit was checked and none fails."""
        return not self.failed and not self.unchecked


def page(gate: Gate, *, brief: bool = False) -> Page:
    """What the gate shows.

    Args:
        gate: the outcome.
        brief: without the sentences of what fails the gate, where they are said elsewhere.
    """
    columns = (
        Column("limit on"),
        Column("engine"),
        Column("allowed", number=True),
        Column("found", number=True),
        Column("verdict", verdict=True),
    )
    rows = [
        (each.name, each.on or NONE, each.allowed, each.found, each.outcome)
        for each in gate.criteria
    ]
    left_out = {*gate.failed, *gate.unchecked} if brief else set[Criterion]()
    notes = [
        f"{each.sentence}."
        for each in gate.criteria
        if each.outcome != "passed" and each not in left_out
    ]
    return Page(
        headline=(_headline(gate),),
        warnings=tuple(map(printable, gate.warnings)),
        facts=tuple(map(printable, gate.facts)),
        # Several engines may share a reason.
        tables=(table("Limits", columns, rows, notes=tuple(dict.fromkeys(notes))),),
    )


def _headline(gate: Gate) -> str:
    counts = Counter(each.outcome for each in gate.criteria)
    order: tuple[Outcome, ...] = ("failed", "not compared", "undecided", "passed")
    numbers = ", ".join(f"{counts[outcome]} {outcome}" for outcome in order if counts[outcome])
    verdict = "passed" if gate.passed else "failed" if gate.failed else "not checked"
    return printable(f"{gate.name}: {verdict} ({numbers}{', strict' if gate.strict else ''})")
