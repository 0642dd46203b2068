"""Which engine is recommended: of measurements with known milliseconds."""

from __future__ import annotations

import random

import pytest

from optfuse.recommend import Recommendation, recommend
from optfuse.stages import Drift, Measurement


def measured(engine: str, variant: str, milliseconds: float) -> Measurement:
    """Twenty blocks of three runs, with 1 % of noise in each block."""
    noise = random.Random(f"{engine} {variant}")
    blocks = tuple((milliseconds * noise.lognormvariate(0, 0.01),) * 3 for _ in range(20))
    return Measurement(engine, variant, "cpu", blocks)


def drift(engine: str, variant: str, relative_l2: float, nonfinite: int = 0) -> Drift:
    return Drift(engine, variant, "float64", relative_l2, relative_l2, 1.0, 100.0, nonfinite, None)


def three(engine: str, milliseconds: float, ours: float) -> list[Measurement]:
    return [
        measured(engine, "baseline", milliseconds),
        measured(engine, "control", milliseconds),
        measured(engine, "optimized", ours),
    ]


def chosen(*args: object, **options: object) -> Recommendation:
    found = recommend(*args, seed=0, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


ONE_RUN = (("torch", "onnxruntime"),)


def test_the_fastest_is_recommended_with_how_far_the_next_is_behind() -> None:
    found = chosen([*three("torch", 9.0, 8.0), *three("onnxruntime", 4.0, 2.0)], [], ONE_RUN)
    assert (found.engine, found.variant) == ("onnxruntime", "optimized")
    assert [(each.engine, each.variant) for each in found.candidates] == [
        ("onnxruntime", "optimized"),
        ("onnxruntime", "baseline"),
        ("torch", "optimized"),
        ("torch", "baseline"),
    ]
    second = found.candidates[1]
    assert second.behind is not None
    # The noise is 1 %, and the mean of twenty pairs of it far less than 5 %.
    assert second.behind.ratio == pytest.approx(2.0, rel=0.05)
    assert "as fast as the next, onnxruntime as exported" in found.reason
    assert [each.verdict for each in found.candidates] == ["fastest", "slower", "slower", "slower"]


def test_of_those_that_cannot_be_told_apart_the_one_with_less_drift_is_taken() -> None:
    found = chosen(
        three("onnxruntime", 4.0, 3.97),
        [drift("onnxruntime", "baseline", 1e-7), drift("onnxruntime", "optimized", 1e-2)],
        ONE_RUN,
    )
    assert (found.engine, found.variant) == ("onnxruntime", "baseline")
    assert "cannot be told from the fastest, onnxruntime optimized" in found.reason


def test_what_gives_infinite_outputs_is_never_recommended() -> None:
    found = chosen(
        three("onnxruntime", 4.0, 2.0),
        [drift("onnxruntime", "optimized", 1e-3, nonfinite=2)],
        ONE_RUN,
    )
    assert (found.engine, found.variant) == ("onnxruntime", "baseline")
    assert len(found.candidates) == 1


def test_runs_that_took_turns_are_compared_by_medians_and_it_is_said() -> None:
    found = chosen(
        [*three("torch", 9.0, 8.0), *three("onnxruntime", 4.0, 2.0)],
        [],
        (("torch",), ("onnxruntime",)),
    )
    verdicts = {each.engine: each.verdict for each in found.candidates}
    assert verdicts == {"onnxruntime": "slower", "torch": "unpaired"}
    assert "The engines took turns" in found.reason


def test_nothing_measured_recommends_nothing() -> None:
    assert recommend([], [], (), seed=0) is None
    assert recommend([measured("torch", "control", 1.0)], [], ONE_RUN, seed=0) is None
