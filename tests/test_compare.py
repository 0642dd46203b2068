"""Drift of torch tensors: the fields are filled in, every dtype works, top-1 means what it says."""

from __future__ import annotations

import math

import pytest
import torch

from optfuse.compare import drift
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
