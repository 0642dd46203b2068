"""Drift of torch tensors: the fields are filled in, every dtype works, top-1 means what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optfuse.compare import USUAL_RTOL, OutputDrift, drift, least_tolerances, output_drifts
from optfuse.stages import Drift


def compared(outputs: list[torch.Tensor], reference: list[torch.Tensor]) -> Drift:
    return drift(
        outputs,
        reference,
        engine="onnxruntime",
        variant="optimized",
        reference_name="float64 program",
    )


def test_drift_says_whose_outputs_moved_and_from_what() -> None:
    result = compared([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0]).double()])
    assert (result.engine, result.variant, result.reference) == (
        "onnxruntime",
        "optimized",
        "float64 program",
    )
    # 1e-12: 3, 4 and 4.5 are exact in float32, so only float64 roundings remain.
    assert result.relative_l2 == pytest.approx(0.1, rel=1e-12)
    assert result.max_abs_over_max_ref == pytest.approx(0.125, rel=1e-12)
    assert result.cosine == pytest.approx(27 / (5 * math.sqrt(29.25)), rel=1e-12)
    assert result.sqnr_db == pytest.approx(20.0, rel=1e-12)
    assert result.nonfinite == 0
    assert result.top1_agreement is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_small_floats_are_compared_in_float64(dtype: torch.dtype) -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    # 1e-12: 3 and 4.5 are exact in all of these dtypes; in bfloat16 the sums would be off by 1e-3.
    result = compared([torch.tensor([3.0, 4.5]).to(dtype)], [reference])
    assert result.relative_l2 == pytest.approx(0.1, rel=1e-12)


def test_integers_booleans_and_complex_tensors_are_compared_too() -> None:
    result = compared(
        [torch.tensor([3, 5]), torch.tensor([True, False]), torch.tensor([2 + 3j]).conj()],
        [torch.tensor([3, 4]), torch.tensor([True, True]), torch.tensor([2 - 1j])],
    )
    # 1e-12: a few roundings. Differences 1, 1 and 2j; reference 9 + 16 + 1 + 1 + 4 + 1.
    assert result.relative_l2 == pytest.approx(math.sqrt(6 / 32), rel=1e-12)


def test_tensors_that_need_a_gradient_are_read_all_the_same() -> None:
    assert compared([torch.ones(2, requires_grad=True)], [torch.ones(2)]).sqnr_db is None


LOGITS = torch.tensor([[0.1, 2.0, 0.3], [5.0, 1.0, 4.9], [1.0, 1.0, 0.5], [-3.0, -2.0, -1.0]])


def test_top1_agreement_is_the_share_of_rows_with_the_same_winner() -> None:
    moved = LOGITS.clone()
    moved[1] = torch.tensor([4.9, 1.0, 5.0])
    assert compared([LOGITS], [LOGITS]).top1_agreement == 1.0
    assert compared([moved], [LOGITS]).top1_agreement == 0.75


def test_a_tie_in_the_reference_can_be_broken_either_way() -> None:
    moved = LOGITS.clone()
    moved[2] = torch.tensor([0.99, 1.0, 0.5])
    assert compared([moved], [LOGITS]).top1_agreement == 1.0


def test_a_row_with_a_nan_disagrees() -> None:
    moved = LOGITS.clone()
    moved[0, 1] = math.nan  # numpy takes it for the largest, which would look like agreement
    result = compared([moved], [LOGITS])
    assert result.top1_agreement == 0.75
    assert result.nonfinite == 1


def test_rows_of_several_logits_count_together() -> None:
    one_row = torch.tensor([[1.0, 2.0]])
    result = compared([LOGITS, one_row.flip(1)], [LOGITS, one_row])
    assert result.top1_agreement == 0.8


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[1, 2], [3, 4]]),
        torch.full((2, 3, 4), 1.5),
        torch.empty(0, 5),
        torch.tensor([[1 + 2j, 3 - 1j]]),
    ],
    ids=["vector", "one column", "integers", "three dimensions", "no rows", "complex"],
)
def test_what_does_not_look_like_logits_has_no_top1(output: torch.Tensor) -> None:
    assert compared([output], [output]).top1_agreement is None


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match=r"output 0 has the shape \(2,\), the reference \(3,\)"):
        compared([torch.ones(2)], [torch.ones(3)])


# Each output by itself


def one(output: torch.Tensor, reference: torch.Tensor) -> OutputDrift:
    (found,) = output_drifts([output], [reference], ["y"])
    return found


def test_each_output_is_compared_by_itself() -> None:
    reference = [torch.tensor([3.0, 4.0]).double(), torch.tensor([1000.0]).double()]
    first, second = output_drifts(
        [torch.tensor([3.0, 4.5]), torch.tensor([1000.0])], reference, ["y", "size"]
    )
    assert (first.name, first.shape, first.dtype, first.elements) == ("y", (2,), "float32", 2)
    # 1e-12: 3, 4 and 4.5 are exact in float32, so only float64 roundings remain.
    assert first.relative_l2 == pytest.approx(0.1, rel=1e-12)
    assert first.max_abs == 0.5
    assert first.max_abs_over_max_ref == pytest.approx(0.125, rel=1e-12)
    assert (first.mismatched, first.top1_agreement) == (None, None)
    assert (second.name, second.relative_l2, second.sqnr_db) == ("size", 0.0, None)
    assert second.cosine == 1.0


def test_integers_and_booleans_are_counted() -> None:
    found = one(torch.tensor([[1, 5], [7, -4]]), torch.tensor([[1, 2], [7, 3]]))
    assert (found.dtype, found.mismatched, found.elements, found.max_abs) == ("int64", 2, 4, 7.0)
    assert found.tolerances is not None
    assert found.tolerances.atol == 7.0
    found = one(torch.tensor([True, False, True]), torch.tensor([True, True, True]))
    assert (found.dtype, found.mismatched, found.tolerances) == ("bool", 1, None)
    assert one(torch.tensor([4, 5]), torch.tensor([4, 5])).mismatched == 0


def test_an_integer_beside_a_float_is_a_number_like_any_other() -> None:
    assert one(torch.tensor([3, 4]), torch.tensor([3.0, 5.0])).mismatched is None


def test_what_is_not_finite_is_counted_by_whose_it_is() -> None:
    inf, nan = math.inf, math.nan
    reference = torch.tensor([1.0, 2.0, inf, -inf, nan, 3.0, inf])
    output = torch.tensor([nan, 2.0, inf, inf, nan, inf, 4.0])
    found = one(output, reference)
    # NaN for 1 and inf for 3; inf and NaN in both; inf for -inf and 4 for inf.
    assert (found.nonfinite, found.both_nonfinite, found.reference_nonfinite) == (2, 2, 2)
    assert found.tolerances is not None
    assert found.tolerances.atol == found.tolerances.rtol == math.inf
    assert found.max_abs == math.inf


def test_the_same_infinity_in_both_is_left_out() -> None:
    found = one(torch.tensor([1.5, math.inf]), torch.tensor([1.0, math.inf]).double())
    assert (found.nonfinite, found.both_nonfinite, found.max_abs) == (0, 1, 0.5)


def test_outputs_and_names_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        output_drifts([torch.ones(1)], [torch.ones(1)], [])


# Tolerances


def passes(outputs: np.ndarray, reference: np.ndarray, *, atol: float, rtol: float) -> bool:
    """What numpy.allclose asks for, without its own defaults."""
    with np.errstate(over="ignore"):  # a huge rtol beside a large reference
        return bool((np.abs(outputs - reference) <= atol + rtol * np.abs(reference)).all())


def test_tolerances_of_a_case_worked_out_by_hand() -> None:
    found = least_tolerances(np.array([1.5, 100.0, -2.0]), np.array([1.0, 101.0, -2.0]))
    assert found.atol == 1.0
    # 1e-12: a few units in the last place are added so that the product rounds up.
    assert found.rtol == pytest.approx(0.5, rel=1e-12)
    assert found.atol_beside_rtol == pytest.approx(1.0 - 101.0 * USUAL_RTOL, rel=1e-12)
    assert found.beside_rtol == 1e-5


def test_equal_outputs_need_no_tolerance() -> None:
    found = least_tolerances(np.array([1.0, 0.0, math.nan]), np.array([1.0, 0.0, math.nan]))
    assert (found.atol, found.rtol, found.atol_beside_rtol) == (0.0, 0.0, 0.0)


def test_no_relative_tolerance_passes_where_the_reference_is_zero() -> None:
    found = least_tolerances(np.array([1e-9, 2.0]), np.array([0.0, 2.0]))
    assert (found.atol, found.rtol) == (1e-9, math.inf)
    # 1e-12: a few units in the last place are added so that the sum rounds up.
    assert found.atol_beside_rtol == pytest.approx(1e-9, rel=1e-12)


def test_a_relative_tolerance_that_is_enough_needs_no_absolute_one() -> None:
    found = least_tolerances(np.array([1000.005]), np.array([1000.0]))
    assert found.atol_beside_rtol == 0.0


numbers = st.lists(
    st.tuples(
        st.floats(-1e6, 1e6, allow_subnormal=False), st.floats(-1e6, 1e6, allow_subnormal=False)
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(numbers)
def test_the_smallest_tolerances_pass_and_smaller_ones_do_not(pairs: list[list[float]]) -> None:
    outputs, reference = np.array(pairs).T
    found = least_tolerances(outputs, reference)
    beside = found.beside_rtol
    assert passes(outputs, reference, atol=found.atol, rtol=0)
    assert passes(outputs, reference, atol=found.atol_beside_rtol, rtol=beside)
    if found.atol:
        # A millionth less: far more than the few units in the last place that were added.
        assert not passes(outputs, reference, atol=found.atol * (1 - 1e-6), rtol=0)
    if math.isfinite(found.rtol):
        assert passes(outputs, reference, atol=0, rtol=found.rtol)
        if found.rtol:
            assert not passes(outputs, reference, atol=0, rtol=found.rtol * (1 - 1e-6))
