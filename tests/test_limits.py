"""Limits: which ones make sense, and what is read of them from a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from optfuse.errors import UsageError
from optfuse.limits import Limits, Settings, option, settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, outside every other project."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "pyproject.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


EVERY_LIMIT = Limits(1e-5, 2.0, 0.99, 1.1, 1.05, 100, 40)


@pytest.mark.parametrize(
    ("name", "limit", "sentence"),
    [
        ("max_drift", -1e-9, "It is below 0"),
        ("max_drift", math.nan, "It is not a finite number"),
        ("max_drift", math.inf, "It is not a finite number"),
        ("max_drift", 10**400, "It is not a finite number"),
        ("max_drift", True, "It is no number"),
        ("max_drift", "1e-5", "It is no number"),
        ("max_drift_ratio", -2.0, "It is below 0"),
        ("min_top1", 99.9, "It is a share, from 0 to 1"),
        ("min_speedup", 0.0, "It is a ratio, and 0 leaves nothing to compare"),
        ("max_slowdown", 0, "It is a ratio, and 0 leaves nothing to compare"),
        ("max_operators", 1.5, "It is no whole number"),
        ("max_operators", -1, "It is below 0"),
        ("max_engine_layers", 40.0, "It is no whole number"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(name: str, limit: object, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        Limits(**{name: limit})  # type: ignore[arg-type]
    assert f"The limit {option(name)} " in refused.value.thing
    assert refused.value.cause == sentence


def test_the_edges_are_allowed() -> None:
    edges = Limits(max_drift=0.0, max_drift_ratio=0, min_top1=1, max_operators=0)
    assert edges.given() == {
        "max_drift": 0.0,
        "max_drift_ratio": 0,
        "min_top1": 1,
        "max_operators": 0,
    }


def test_options_are_spelled_as_on_the_command_line() -> None:
    assert list(map(option, EVERY_LIMIT.given())) == [
        "--max-drift",
        "--max-drift-ratio",
        "--min-top1",
        "--min-speedup",
        "--max-slowdown",
        "--max-operators",
        "--max-engine-layers",
    ]


@pytest.mark.parametrize(
    ("limits", "baseline", "cause"),
    [
        (Limits(), None, "No limit was given, neither as an option nor in [tool.optfuse.check]"),
        (Limits(max_slowdown=1.1), None, "It compares with an earlier report, and none was given"),
        (Limits(max_drift=1.0), Path("a"), "Only --max-slowdown compares with it"),
    ],
)
def test_limits_and_baseline_have_to_go_together(
    limits: Limits, baseline: Path | None, cause: str
) -> None:
    with pytest.raises(UsageError) as refused:
        Settings(limits, baseline=baseline)
    assert cause in refused.value.cause


def test_without_a_file_what_was_typed_is_all(folder: Path) -> None:
    assert settings(Limits(max_drift=0.5)) == Settings(Limits(max_drift=0.5))


def test_every_key_of_a_file_is_read(folder: Path) -> None:
    write(
        folder,
        "[tool.optfuse.check]\n"
        "max-drift = 1e-5\nmax-drift-ratio = 2.0\nmin-top1 = 0.99\nmin-speedup = 1.1\n"
        "max-slowdown = 1.05\nmax-operators = 100\nmax-engine-layers = 40\n"
        'baseline = "ci/report.json"\nengine = ["torch", "onnxruntime"]\nstrict = true\n',
    )
    assert settings(Limits()) == Settings(
        EVERY_LIMIT,
        baseline=Path("ci/report.json"),
        engines=("torch", "onnxruntime"),
        strict=True,
    )


def test_what_was_typed_wins_over_the_file(folder: Path) -> None:
    write(
        folder,
        "[tool.optfuse.check]\nmax-drift = 1e-5\nmax-operators = 100\nmax-slowdown = 1.5\n"
        'baseline = "then"\nengine = "torch"\nstrict = true\n',
    )
    found = settings(
        Limits(max_drift=0.5, max_slowdown=1.1),
        baseline=Path("now"),
        engines=("onnxruntime",),
        strict=False,
    )
    limits = Limits(max_drift=0.5, max_slowdown=1.1, max_operators=100)
    assert found == Settings(limits, baseline=Path("now"), engines=("onnxruntime",), strict=False)


def test_a_baseline_in_a_file_is_found_from_the_folder_of_that_file(folder: Path) -> None:
    (folder / "ci").mkdir()
    path = write(
        folder, '[tool.optfuse.check]\nmax-slowdown = 1.1\nbaseline = "then"\n', "ci/gate.toml"
    )
    assert settings(Limits(), file=path).baseline == folder / "ci" / "then"


def test_a_pyproject_of_other_tools_has_no_limits(folder: Path) -> None:
    write(folder, '[tool.ruff]\nline-length = 100\n[project]\nname = "net"\n')
    assert settings(Limits(max_drift=0.5)) == Settings(Limits(max_drift=0.5))


def test_a_limit_of_0_in_a_file_is_a_limit(folder: Path) -> None:
    write(folder, "[tool.optfuse.check]\nmax-drift = 0\n")
    assert settings(Limits()).limits == Limits(max_drift=0)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[tool.optfuse.check\n", "It is not valid TOML: "),
        ("[tool.ruff]\n", "It has no [tool.optfuse.check] of gate.toml"),
        ("tool = 3\n", "It has no [tool.optfuse.check] of gate.toml"),
        ("[tool]\noptfuse = 'check'\n", "It has no [tool.optfuse.check] of gate.toml"),
        ("[tool.optfuse]\ncheck = 3\n", "'tool.optfuse.check' is no table"),
        ("[tool.optfuse.check]\nmax-drift = 'small'\n", "It is no number"),
        ("[tool.optfuse.check]\nmax-drift = nan\n", "It is not a finite number"),
        ("[tool.optfuse.check]\nbaseline = 3\n", "'baseline' of [tool.optfuse.check] of"),
        ("[tool.optfuse.check]\nengine = [3]\n", "'engine' of [tool.optfuse.check] of"),
        ("[tool.optfuse.check]\nstrict = 1\n", "'strict' of [tool.optfuse.check] of"),
        (
            "[tool.optfuse.check]\nmax_drift = 1e-5\n",
            "There are max-drift, max-drift-ratio, min-top1, min-speedup, max-slowdown, "
            "max-operators, max-engine-layers, baseline, engine and strict",
        ),
    ],
)
def test_a_file_that_is_not_understood_is_refused(folder: Path, text: str, cause: str) -> None:
    with pytest.raises(UsageError) as refused:
        settings(Limits(max_operators=3), file=write(folder, text, "gate.toml"))
    assert cause in refused.value.cause


def test_a_file_that_is_not_there_or_no_text_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        settings(Limits(max_drift=1.0), file=folder / "gone.toml")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="It is not valid TOML"):
        settings(Limits(max_drift=1.0), file=folder / "binary.toml")
