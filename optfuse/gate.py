"""A report, held against limits and against an earlier report: the gate of `optfuse check`.

Pure: documents in, a `Gate` out. Four rules hold throughout.

- Like with like. A baseline report has to be about the same model, inputs, engine, device and
  number of threads; where it is not, the criterion is "not compared" and says why. Versions may
  differ, since a regression after an upgrade is one too; they are named.
- A limit holds for every choice of sizes that the report has of a model with open dimensions, and
  each is compared with the same sizes of the baseline.
- A latency counts only where its whole interval is beyond the limit, and fails only where its ratio
  is beyond the noise floor as well. Else it is "undecided".
- A limit that nothing in the report can be held against is an error, and never passes by silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from optfuse import stats
from optfuse.errors import OptfuseError, UsageError
from optfuse.limits import Limits, option
from optfuse.report.table import NONE, Document, caveats, printable, significant
from optfuse.report.verdicts import Criterion, Gate, Outcome
from optfuse.stages import Report
from optfuse.stats import Ratio

_MOST_DIGITS = 17
"""Enough to tell any float64 from every other."""

_COMMIT_DIGITS = 8

_UNKNOWN = "unknown"

_INFINITE = "infinity"
"""Python reads it back as a number."""


@dataclass(frozen=True)
class _Rule:
    """How one limit is written, and what to do about it.

    Attributes:
        name: what is limited.
        sign: which way round.
        unit: behind the limit.
        exceeded: the next step where it does not hold.
        unchecked: the next step where nothing can be held against it.
    """

    name: str
    sign: Literal["<=", ">="]
    unit: str
    exceeded: str
    unchecked: str


_FIND_THE_LAYER = "Find the layer it comes from with 'optfuse diff --per-layer', or raise the limit"
_RUN_IT = "Choose engines that run here with --engine, or leave the limit out"

_RULES = {
    "max_drift": _Rule("drift", "<=", "", _FIND_THE_LAYER, _RUN_IT),
    "max_drift_ratio": _Rule("drift ratio", "<=", "x", _FIND_THE_LAYER, _RUN_IT),
    "min_top1": _Rule(
        *("top-1 equal", ">=", ""),
        "Find the layer it comes from with 'optfuse diff --per-layer', or lower the limit",
        "Use --max-drift, which any output can be held against",
    ),
    "min_speedup": _Rule(
        *("speed-up", ">=", "x"),
        "Find the pass that costs more than it gains with 'optfuse optimize --ablate'",
        "Measure on an engine that runs here, with a --duration above 0, or leave the limit out",
    ),
    "max_slowdown": _Rule(
        *("slowdown", "<=", "x"),
        "Look at both reports side by side with 'optfuse report'",
        "Measure the baseline again under the conditions of this report, or leave the limit out",
    ),
    "max_operators": _Rule(
        *("operators", "<=", ""),
        "See which places the passes refused, and why, with 'optfuse explain'",
        "Write the report again with 'optfuse optimize'",
    ),
    "max_engine_layers": _Rule(
        *("engine layers", "<=", ""),
        "See which places the passes refused, and why, with 'optfuse explain'",
        "Build an engine, e.g. with --engine tensorrt-rtx --target sm_89, or leave the limit out",
    ),
}


@dataclass(frozen=True)
class _Place:
    """An engine and, with open dimensions, the sizes it ran at: what a limit is held against."""

    engine: str
    at: str | None = None

    def __str__(self) -> str:
        return self.engine if self.at is None else f"{self.engine} at {self.at}"

    def is_of(self, row: Mapping[str, Any]) -> bool:
        return (row["engine"], row.get("at")) == (self.engine, self.at)


@dataclass(frozen=True)
class _Case:
    """What the limits are held against.

    Attributes:
        now: the report.
        then: the baseline report, or None.
        engines: what is looked at.
        places: the same with the sizes that each ran at.
        gone: places that only the baseline report has, with a latency.
    """

    now: Document
    then: Document | None
    engines: tuple[str, ...]
    places: tuple[_Place, ...]
    gone: tuple[_Place, ...] = ()


def check(
    report: Report,
    limits: Limits,
    *,
    baseline: Report | None = None,
    engines: Sequence[str] = (),
    strict: bool = False,
) -> Gate:
    """Hold a report against limits.

    Args:
        report: of `optfuse optimize`.
        limits: what is checked.
        baseline: an earlier report; `max_slowdown` takes one.
        engines: which engines are looked at; empty for all.
        strict: what is undecided or not compared fails as well.

    Raises:
        UsageError: a report is of another kind, the two are the same one, or the report knows
            nothing of an engine.
    """
    now, then = report.document, None if baseline is None else baseline.document
    _refuse_other_kinds(now)
    if then is not None:
        _refuse_other_kinds(then)
        _refuse_itself(now, then)
    case = _case(now, then, tuple(engines))
    return Gate(
        name=now["program"]["name"],
        criteria=tuple(
            criterion
            for name, limit in limits.given().items()
            for criterion in _JUDGES[name](case, limit)
        ),
        strict=strict,
        warnings=tuple(caveats(now)),
        facts=() if then is None else tuple(_about_baseline(now, then)),
    )


def failures(gate: Gate) -> list[OptfuseError]:
    """What a gate that did not pass ends with: limits that do not hold, then those that nothing
    could be held against."""
    exceeded = [
        OptfuseError(f"The limit {each.title} does not hold", each.sentence, each.next_step)
        for each in gate.failed
    ]
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for each in gate.unchecked:
        reasons.setdefault((each.option, each.next_step), {})[each.sentence] = None
    unchecked = [
        UsageError(f"The limit {name} cannot be checked", "; ".join(sentences), next_step)
        for (name, next_step), sentences in reasons.items()
    ]
    return [*exceeded, *unchecked]


def quotient(over: Ratio, under: Ratio) -> Ratio:
    """The quotient of two ratios that were measured independently of each other.

    Its interval combines theirs by the method of variance estimates recovery, on logarithms: each
    end is as far away as the root of the sum of squares of the two distances that push it there
    (G. Zou and A. Donner, Construction of confidence limits about effect measures, Statistics in
    Medicine 27, 2008, section 2).
    """
    middle = math.log(over.ratio / under.ratio)
    down = math.hypot(math.log(over.ratio / over.low), math.log(under.high / under.ratio))
    up = math.hypot(math.log(over.high / over.ratio), math.log(under.ratio / under.low))
    return Ratio(math.exp(middle), math.exp(middle - down), math.exp(middle + up))


# --- One judge a limit


def _drift(case: _Case, place: _Place, limit: float) -> Criterion:
    row = _row(case.now["drift"], place)
    if row is None:
        return _not_compared("max_drift", place, limit, _lacks(case.now, "drift", place))
    found = _finite_or_infinity(row["relative_l2"])
    [text] = _written([found], limit, _exponent, 1)
    return _held("max_drift", place, limit, found, text, _distance_sentence(place, row, text))


def _drift_ratio(case: _Case, place: _Place, limit: float) -> Criterion:
    name = "max_drift_ratio"
    ours, export = (_row(case.now["drift"], place, each) for each in ("optimized", "baseline"))
    if ours is None or export is None:
        return _not_compared(name, place, limit, _lacks(case.now, "drift", place))
    distance = _finite_or_infinity(ours["relative_l2"])
    own = _finite_or_infinity(export["relative_l2"])
    if math.isinf(own) and not math.isinf(distance):
        reason = f"{place}: the outputs of the export as it comes are infinitely far away"
        return _not_compared(name, place, limit, reason)
    # Where the export is exact, ours has to be: there is nothing to multiply.
    found = 0.0 if distance == 0 else math.inf if own in (0, math.inf) else distance / own
    [text] = _written([found], limit, _fixed, 2)
    said = f"{_distance_sentence(place, ours, _exponent(distance, 1))}"
    said += f", and that of the export as it comes is {_exponent(own, 1)}"
    return _held(name, place, limit, found, f"{text}x", said)


def _top1(case: _Case, place: _Place, limit: float) -> Criterion:
    row = _row(case.now["drift"], place)
    if row is None:
        return _not_compared("min_top1", place, limit, _lacks(case.now, "drift", place))
    found = row["top1_agreement"]
    if found is None:
        reason = f"{place}: no output looks like logits, so there is no top-1 agreement"
        return _not_compared("min_top1", place, limit, reason)
    [text] = _written([found], limit, _fixed, 3)
    said = f"{place}: the largest element is the reference's in a share of {text} of the rows"
    return _held("min_top1", place, limit, found, text, said)


def _speedup(case: _Case, place: _Place, limit: float) -> Criterion:
    measured = _measured_speedup(case.now, place)
    if measured is None:
        return _not_compared("min_speedup", place, limit, _lacks(case.now, "speed-up", place))
    ratio, floor = measured
    return _judged(
        *("min_speedup", place, limit, ratio, floor),
        lambda text: f"{place}: the optimized model is {text} as fast as the export as it comes",
    )


def _slowdown(case: _Case, place: _Place, limit: float) -> Criterion:
    assert case.then is not None  # `_slowdowns` sees to it
    compared = _compared(case.now, case.then, place)
    if isinstance(compared, str):
        return _not_compared("max_slowdown", place, limit, f"{place}: {compared}")
    ratio, floor, how = compared
    return _judged(
        *("max_slowdown", place, limit, ratio, floor),
        lambda text: f"{place}: a run takes {text} as long as in the baseline report ({how})",
    )


def _slowdowns(case: _Case, limit: float) -> list[Criterion]:
    if case.then is None:
        reason = "There is no baseline report to compare with"
    else:
        unlike = _differing(_conditions(case.now), _conditions(case.then))
        if not unlike:
            everything = replace(case, places=(*case.places, *case.gone))
            return _on_each_engine("max_slowdown", _slowdown)(everything, limit)
        reason = f"The baseline report cannot be compared with: {', '.join(unlike)}"
    return [_not_compared("max_slowdown", "", limit, reason)]


def _operators(case: _Case, limit: float) -> list[Criterion]:
    found = case.now["program"]["operators_after"]
    said = f"The optimized program has {found} operators"
    return [_held("max_operators", "", limit, found, str(found), said)]


def _engine_layers(case: _Case, limit: float) -> list[Criterion]:
    name = "max_engine_layers"
    criteria = []
    for row in case.now["engines"]:
        if row["variant"] != "optimized" or row["engine"] not in case.engines:
            continue
        on, found = f"{row['engine']} {row['target']}", row["layers"]
        if found == 0:  # an engine has at least one: the builder's log told of none
            reason = f"{on}: its builder did not tell which layers it has"
            criteria.append(_not_compared(name, on, limit, reason))
        else:
            said = f"{on}: the optimized engine has {found} layers"
            criteria.append(_held(name, on, limit, found, str(found), said))
    return criteria or [_not_compared(name, "", limit, "The report has no engine that was built")]


_Judge = Callable[[_Case, float], list[Criterion]]


def _on_each_engine(name: str, judge: Callable[[_Case, _Place, float], Criterion]) -> _Judge:
    def judged(case: _Case, limit: float) -> list[Criterion]:
        found = [judge(case, place, limit) for place in case.places]
        return found or [_not_compared(name, "", limit, "The report has no engine")]

    return judged


_JUDGES: Mapping[str, _Judge] = {
    "max_drift": _on_each_engine("max_drift", _drift),
    "max_drift_ratio": _on_each_engine("max_drift_ratio", _drift_ratio),
    "min_top1": _on_each_engine("min_top1", _top1),
    "min_speedup": _on_each_engine("min_speedup", _speedup),
    "max_slowdown": _slowdowns,
    "max_operators": _operators,
    "max_engine_layers": _engine_layers,
}


# --- Like with like


def _compared(now: Document, then: Document, place: _Place) -> tuple[Ratio, float, str] | str:
    """How many times as long a run takes as it did, the noise floor, and how that was taken; or why
    it cannot be said.

    Runs at different times are not paired, and no machine is just as fast twice. But each report
    has the export as it comes, measured beside ours. Where that is the same program on the same
    versions, only the machine can have changed its latency, and both sides are taken relative to
    it. Where it is not, the latencies themselves are compared: an engine that got slower for
    everything has made ours slower too.
    """
    after, before = _row(now["latency"], place), _row(then["latency"], place)
    if after is None:
        return _missing(now, "latency", place)
    if before is None:
        return "the baseline report has no latency of it"
    unlike = _differing(_device(now, after), _device(then, before))
    if unlike:
        return f"the baseline report cannot be compared with: {', '.join(unlike)}"
    medians = f"{significant(before['median_ms'], 4)} -> {significant(after['median_ms'], 4)} ms"
    speedup, earlier = _measured_speedup(now, place), _measured_speedup(then, place)
    latency, previous = _latency(after), _latency(before)
    if speedup is None or earlier is None or latency is None or previous is None:
        return "too little of it was measured for an interval"
    floor = max(speedup[1], earlier[1])
    if _same_export(now, then):
        how = f"{medians}, each relative to the same export as it comes beside it"
        return quotient(earlier[0], speedup[0]), floor, how
    return quotient(latency, previous), floor, f"{medians}, with whatever changed on the machine"


def _conditions(document: Document) -> dict[str, str]:
    """What two reports must have in common."""
    program = document["program"]
    return {
        "the model": program["name"],
        "the inputs": ", ".join(
            f"{'x'.join(map(str, spec['shape'])) or 'scalar'} {spec['dtype']}"
            for spec in program["inputs"]
        ),
        "the number of CPU threads": str(document["settings"]["threads"]),
    }


def _device(document: Document, row: Mapping[str, Any]) -> dict[str, str]:
    """What ran the engine: beside a GPU, the processor matters too little to refuse."""
    if row["device"] != "cpu":
        return {"the device": row["device"]}
    model = document["environment"].get("cpu_model")
    return {"the device": "cpu", "the processor": str(model or _UNKNOWN)}


def _same_export(now: Document, then: Document) -> bool:
    """Whether the exports as they come do the same work with the same software."""
    keys = ("operators_by_type_before", "parameters_before", "flops_before")
    same_work = all(now["program"][key] == then["program"][key] for key in keys)
    versions = [_versions(each) for each in (now, then)]
    for each in versions:
        each.pop("optfuse", None)  # it has no part in the export as it comes
    return same_work and versions[0] == versions[1]


def _versions(document: Document) -> dict[str, str]:
    """Every version that latency may depend on, as far as the report knows it."""
    known = document["environment"]
    packages, gpu = known.get("versions"), known.get("gpu")
    found = dict(packages) if isinstance(packages, Mapping) else {}
    found["python"] = known.get("python")
    found["driver"] = gpu.get("driver") if isinstance(gpu, Mapping) else None
    return {name: str(version) for name, version in found.items() if version is not None}


def _differing(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """What is not the same in both, or not known, as words."""
    return [
        f"{name} was {then.get(name, NONE)} and is {now.get(name, NONE)}"
        for name in dict.fromkeys((*now, *then))
        if now.get(name) != then.get(name) or now.get(name) == _UNKNOWN
    ]


def _about_baseline(now: Document, then: Document) -> Iterator[str]:
    commit = str(then["environment"].get("commit") or "")[:_COMMIT_DIGITS]
    yield f"baseline report: written {then['created']}" + (f", commit {commit}" if commit else "")
    changed = _differing(_versions(now), _versions(then))
    if changed:
        yield f"versions: {', '.join(changed)}"


# --- What stands in a report


def _case(now: Document, then: Document | None, asked: tuple[str, ...]) -> _Case:
    here = _engines(now)
    for engine in asked:
        if engine not in here:
            raise UsageError(
                f"The report has no engine '{engine}'",
                f"It has {', '.join(here) or 'none at all'}",
                "Choose from those with --engine",
            )
    engines = asked or here
    places = tuple(place for engine in engines for place in _places(now, engine))
    rows = [] if then is None else then["latency"]
    before = dict.fromkeys(_Place(row["engine"], row.get("at")) for row in rows)
    gone = (each for each in before if each not in places)
    return _Case(
        now,
        then,
        engines,
        places,
        tuple(each for each in gone if not asked or each.engine in asked),
    )


def _places(document: Document, engine: str) -> list[_Place]:
    """An engine at all sizes that the report says anything about; without any, the engine alone."""
    tables = ("drift", "latency", "not_measured")
    found = dict.fromkeys(
        row.get("at") for name in tables for row in document[name] if row["engine"] == engine
    )
    return [_Place(engine, at) for at in found if at is not None] or [_Place(engine)]


def _engines(document: Document) -> tuple[str, ...]:
    """Every engine that the report says anything about, in its own order."""
    tables = ("drift", "latency", "engines", "not_measured")
    return tuple(dict.fromkeys(row["engine"] for name in tables for row in document[name]))


def _row(
    rows: Sequence[Mapping[str, Any]], place: _Place, variant: str = "optimized"
) -> Mapping[str, Any] | None:
    found = (row for row in rows if place.is_of(row) and row["variant"] == variant)
    return next(found, None)


def _measured_speedup(document: Document, place: _Place) -> tuple[Ratio, float] | None:
    """Ours against the export as it comes on the same engine, and the noise floor."""
    for row in document["speedups"]:
        if (row["variant"], row["against"]) == ("optimized", "baseline") and (
            place.is_of(row) and row["against_engine"] == place.engine
        ):
            low, ratio, high = row["low"] or 0, row["ratio"] or 0, row["high"] or 0
            if 0 < low <= ratio <= high:  # null and 0 are no ends of an interval
                return Ratio(ratio, low, high), row["noise_floor"] or 1.0
    return None


def _latency(row: Mapping[str, Any]) -> Ratio | None:
    """The latency itself in milliseconds, with an interval: the ratio to what always takes 1 ms."""
    samples = iter(row["samples_ms"])
    blocks = [list(islice(samples, size)) for size in row["blocks"]]
    try:
        return stats.paired_ratio(blocks, [[1.0]] * len(blocks), seed=0)
    except ValueError:
        return None


def _lacks(document: Document, what: str, place: _Place) -> str:
    return f"{place}: {_missing(document, what, place)}"


def _missing(document: Document, what: str, place: _Place) -> str:
    rows = [row for row in document["not_measured"] if row["engine"] == place.engine]
    # What has no sizes is about all of them.
    reasons = dict.fromkeys(row["reason"] for row in rows if row.get("at") in (None, place.at))
    return f"the report has no {what} of it" + (f", {'; '.join(reasons)}" if reasons else "")


def _finite_or_infinity(number: float | None) -> float:
    return math.inf if number is None else number  # JSON knows no infinity


def _distance_sentence(place: _Place, row: Mapping[str, Any], text: str) -> str:
    if row["nonfinite"]:
        wrong = f"{row['nonfinite']} values are not finite where those of the reference are"
        return f"{place}: {wrong}, which makes the drift infinite"
    return f"{place}: the drift from the {row['reference']} is {text} (relative L2)"


def _refuse_other_kinds(document: Document) -> None:
    if document["kind"] != "optimize":
        raise UsageError(
            f"A report of the kind '{document['kind']}' cannot be checked",
            "Limits are about what 'optfuse optimize' reports",
            "Give such a report; 'optfuse report' shows this one",
        )


def _refuse_itself(now: Document, then: Document) -> None:
    if now == then:
        raise UsageError(
            "The report cannot be compared with itself",
            "The baseline is the very same report",
            "Name an earlier one with --baseline",
        )


# --- Verdicts and words


def _held(
    name: str, on: _Place | str, limit: float, found: float, text: str, said: str
) -> Criterion:
    """A number without uncertainty against its limit."""
    holds = found <= limit if _RULES[name].sign == "<=" else found >= limit
    sentence = f"{said}; {_asked(name, limit)}"
    return _criterion(name, on, limit, found, text, "passed" if holds else "failed", sentence)


def _judged(
    name: str,
    on: _Place | str,
    limit: float,
    ratio: Ratio,
    floor: float,
    said: Callable[[str], str],
) -> Criterion:
    """A ratio with its interval against its limit.

    Args:
        name, on, limit: of the criterion.
        ratio: what was found.
        floor: how far from 1 a ratio can be where nothing was changed.
        said: the sentence around the ratio as text.
    """
    outcome, why = _outcome(ratio, limit, floor, _RULES[name].sign)
    digits = 3 if ratio.high - ratio.low < 0.02 else 2
    middle, low, high = _written([ratio.ratio, ratio.low, ratio.high], limit, _fixed, digits)
    text = f"{middle}x [{low}, {high}]"
    sentence = f"{said(text)}; {_asked(name, limit)}{why}"
    return _criterion(name, on, limit, ratio.ratio, text, outcome, sentence)


def _outcome(ratio: Ratio, limit: float, floor: float, sign: str) -> tuple[Outcome, str]:
    """The outcome, and what makes it undecided."""
    good, middle, bad = ratio.low / limit, ratio.ratio / limit, ratio.high / limit
    if sign == "<=":  # everything the other way round
        good, middle, bad = 1 / bad, 1 / middle, 1 / good
    if good >= 1:
        return "passed", ""
    if bad >= 1:
        return "undecided", ", and the interval reaches both sides of it"
    if middle * floor >= 1:
        return "undecided", f", and the noise floor of {_fixed(floor, 3)}x reaches it"
    return "failed", ""


def _not_compared(name: str, on: _Place | str, limit: float, reason: str) -> Criterion:
    return _criterion(name, on, limit, None, NONE, "not compared", reason)


def _criterion(
    name: str,
    on: _Place | str,
    limit: float,
    value: float | None,
    found: str,
    outcome: Outcome,
    sentence: str,
) -> Criterion:
    rule = _RULES[name]
    return Criterion(
        option=option(name),
        name=rule.name,
        on=printable(str(on)),
        limit=limit,
        allowed=f"{rule.sign} {_limit(name, limit)}",
        value=value,
        found=found,
        outcome=outcome,
        sentence=printable(sentence),
        next_step=_next_step(rule, outcome),
    )


def _next_step(rule: _Rule, outcome: Outcome) -> str:
    if outcome == "not compared":
        return rule.unchecked
    if outcome == "undecided":
        return "Measure for longer with --duration, or on a machine that does nothing else"
    return rule.exceeded


def _asked(name: str, limit: float) -> str:
    end = "at most" if _RULES[name].sign == "<=" else "at least"
    return f"the limit is {_limit(name, limit)} {end}"


def _limit(name: str, limit: float) -> str:
    """The limit with all its digits, as it was typed."""
    return repr(limit).removesuffix(".0") + _RULES[name].unit


def _written(
    values: Sequence[float], limit: float, spell: Callable[[float, int], str], digits: int
) -> list[str]:
    """Numbers as text, with as many digits as it takes to see on which side of the limit each one
    is: `1.0002` and not `1.00` beside a limit of 1."""

    def sides(numbers: Sequence[float]) -> list[tuple[bool, bool]]:
        return [(number < limit, number > limit) for number in numbers]

    for more in range(digits, _MOST_DIGITS + 1):
        texts = [spell(value, more) for value in values]
        if sides([float(text) for text in texts]) == sides(values):
            break
    return texts


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _INFINITE


def _exponent(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    return f"{value:.{digits}e}" if math.isfinite(value) else _INFINITE
