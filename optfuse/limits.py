"""What `optfuse check` holds a report against: limits that were typed, over limits in a file.

[tool.optfuse.check]            # in pyproject.toml; every key is an option of the command
max-drift-ratio = 2
max-slowdown = 1.05
baseline = "ci/report.json"     # from the folder of the file
engine = ["onnxruntime"]
strict = true
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from optfuse.errors import UsageError

DEFAULT_FILE = Path("pyproject.toml")
"""Read where it is in the current folder and no other file was named."""

SECTION = ("tool", "optfuse", "check")

_WHOLE_NUMBERS = ("max_operators", "max_engine_layers")
_RATIOS = ("min_speedup", "max_slowdown")


@dataclass(frozen=True)
class Limits:
    """The limits that were given; None for one that was not.

    Attributes:
        max_drift: the most that our outputs may be away from the reference, relative L2.
        max_drift_ratio: the same, as a multiple of the distance of the export as it comes.
        min_top1: the least share of rows with the same largest element as the reference, 0 to 1.
        min_speedup: how many times as fast as the export as it comes ours has to be.
        max_slowdown: how many times as long as in the baseline report a run may take.
        max_operators: of the optimized program.
        max_engine_layers: of every engine that was built.

    Raises:
        UsageError: one that no report could be held against.
    """

    max_drift: float | None = None
    max_drift_ratio: float | None = None
    min_top1: float | None = None
    min_speedup: float | None = None
    max_slowdown: float | None = None
    max_operators: int | None = None
    max_engine_layers: int | None = None

    def __post_init__(self) -> None:
        for name, limit in self.given().items():
            wrong = _wrong(name, limit)
            if wrong is not None:
                raise UsageError(
                    f"The limit {option(name)} {limit} makes no sense",
                    wrong,
                    "See 'optfuse check --help' for what each limit means",
                )

    def given(self) -> dict[str, Any]:
        """Those that were given, by the names of their attributes, in order."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Settings:
    """Everything a check is told beside the report.

    Attributes:
        limits: at least one.
        baseline: the report that `max_slowdown` is about, or the folder that holds it.
        engines: which engines are looked at; empty for all.
        strict: what is undecided or cannot be compared fails as well.

    Raises:
        UsageError: there is no limit, or limits and baseline do not go together.
    """

    limits: Limits
    baseline: Path | None = None
    engines: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.limits.given():
            raise UsageError(
                "There is nothing to check",
                f"No limit was given, neither as an option nor in {_table(DEFAULT_FILE)}",
                "Give one, e.g. --max-drift-ratio 2 or --min-speedup 1",
            )
        if self.limits.max_slowdown is not None and self.baseline is None:
            raise UsageError(
                "The limit --max-slowdown cannot be checked",
                "It compares with an earlier report, and none was given",
                "Name one with --baseline, or leave the limit out",
            )
        if self.limits.max_slowdown is None and self.baseline is not None:
            raise UsageError(
                f"The baseline {self.baseline} would not be used",
                "Only --max-slowdown compares with it",
                "Give that limit too, or leave --baseline out",
            )


def option(name: str) -> str:
    """What a limit is called on the command line: `max_drift` is `--max-drift`."""
    return f"--{name.replace('_', '-')}"


def settings(
    typed: Limits,
    *,
    baseline: Path | None = None,
    engines: tuple[str, ...] = (),
    strict: bool | None = None,
    file: Path | None = None,
) -> Settings:
    """What was typed, and from the file what was not.

    Args:
        typed: the limits on the command line.
        baseline, engines, strict: as in `Settings`; None or empty where they were not typed.
        file: the TOML file; None for `DEFAULT_FILE`, where there is one.

    Raises:
        UsageError: as `Limits` and `Settings` do, or the file cannot be read, has no table for
            optfuse though it was named, or says something that is not understood.
    """
    written = _written(file)
    return Settings(
        replace(written.limits, **typed.given()),
        baseline=baseline or written.baseline,
        engines=engines or written.engines,
        strict=written.strict if strict is None else strict,
    )


@dataclass(frozen=True)
class _Written:
    """What stands in a file."""

    limits: Limits = Limits()
    baseline: Path | None = None
    engines: tuple[str, ...] = ()
    strict: bool = False


def _written(file: Path | None) -> _Written:
    if file is None and not DEFAULT_FILE.is_file():
        return _Written()
    path = file or DEFAULT_FILE
    table = _read(path)
    for key in SECTION:
        table = table.get(key, {}) if isinstance(table, Mapping) else {}
    if not isinstance(table, Mapping):
        raise _unusable(path, f"'{'.'.join(SECTION)}' is no table")
    if not table and file is not None:
        raise _unusable(path, f"It has no {_table(path)}, or nothing in it")
    known = {option(each.name).removeprefix("--"): each.name for each in fields(Limits)}
    unknown = [key for key in table if key not in {*known, "baseline", "engine", "strict"}]
    if unknown:
        raise UsageError(
            f"The key '{unknown[0]}' of {_table(path)} means nothing to optfuse",
            f"There are {', '.join(known)}, baseline, engine and strict",
            "Correct it, or take it out",
        )
    baseline = _text(path, table, "baseline")
    return _Written(
        limits=Limits(**{name: table[key] for key, name in known.items() if key in table}),
        baseline=None if baseline is None else path.parent / baseline,
        engines=_names(path, table, "engine"),
        strict=_flag(path, table, "strict"),
    )


def _read(path: Path) -> Any:
    # tomllib is in the standard library from Python 3.11 on; tomli is the same for 3.10.
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unusable(path, error.strerror or type(error).__name__) from None
    except ValueError as error:  # neither text nor TOML
        raise _unusable(path, f"It is not valid TOML: {error}") from None


def _text(path: Path, table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise _unusable(path, f"'{key}' of {_table(path)} is no text")
    return value


def _names(path: Path, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _unusable(path, f"'{key}' of {_table(path)} is no list of names")
    return tuple(names)


def _flag(path: Path, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _unusable(path, f"'{key}' of {_table(path)} is neither true nor false")
    return value


def _table(path: Path) -> str:
    return f"[{'.'.join(SECTION)}] of {path.name}"


def _unusable(path: Path, cause: str) -> UsageError:
    return UsageError(
        f"The limits in {path} cannot be read", cause, "Correct it, or name another with --config"
    )


def _wrong(name: str, limit: object) -> str | None:
    """Why nothing could be held against this limit, or None."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        return "It is no number"
    # NaN is not, and neither is a whole number that no float can hold.
    if not abs(limit) <= sys.float_info.max:
        return "It is not a finite number"
    if name in _WHOLE_NUMBERS and not isinstance(limit, int):
        return "It is no whole number"
    if limit < 0:
        return "It is below 0"
    if name in _RATIOS and limit == 0:
        return "It is a ratio, and 0 leaves nothing to compare"
    if name == "min_top1" and limit > 1:
        return "It is a share, from 0 to 1"
    return None
