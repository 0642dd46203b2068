"""Outputs x outputs -> Drift: how far an engine's outputs are from a named reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optfuse.stages import Drift
from optfuse.stats import distance

if TYPE_CHECKING:
    import torch

USUAL_RTOL = 1e-5
"""The relative tolerance that numpy.allclose and Polygraphy take by default."""


@dataclass(frozen=True)
class Tolerances:
    """The smallest tolerances with which |y - ref| <= atol + rtol |ref| holds for every element.

    All are infinite where something that is not finite stands in one of the two alone. What is the
    same infinity, or NaN, in both is equal, as with `equal_nan`.

    Attributes:
        atol: with an rtol of 0.
        rtol: with an atol of 0; infinite where the reference is 0 and the other is not.
        atol_beside_rtol: with an rtol of `beside_rtol`.
        beside_rtol: that one.
    """

    atol: float
    rtol: float
    atol_beside_rtol: float
    beside_rtol: float = USUAL_RTOL


@dataclass(frozen=True)
class OutputDrift:
    """How far one output is from the reference.

    Attributes:
        name, shape, dtype: of the output, the dtype as PyTorch has it, e.g. `float32`.
        relative_l2, max_abs_over_max_ref, cosine, sqnr_db, nonfinite, top1_agreement: as in
            `Drift`, of this output alone.
        max_abs: max |y - ref|; infinite where something that is not finite stands in one alone.
        elements: how many it has.
        mismatched: how many of them differ, for integers and booleans; None for other dtypes.
        both_nonfinite: how many are the same infinity, or NaN, in both.
        reference_nonfinite: how many are NaN or infinite in the reference alone.
        tolerances: with which it would pass; None for booleans.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    relative_l2: float
    max_abs: float
    max_abs_over_max_ref: float
    cosine: float
    sqnr_db: float | None
    nonfinite: int
    top1_agreement: float | None
    elements: int
    mismatched: int | None
    both_nonfinite: int
    reference_nonfinite: int
    tolerances: Tolerances | None


def drift(
    outputs: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    *,
    engine: str,
    variant: str,
    reference_name: str,
) -> Drift:
    """How far `outputs` moved from `reference`, over all outputs together.

    The metrics are those of `optfuse.stats.distance`, in float64 whatever the tensors' own dtypes.

    Top-1 agreement is the share of rows whose largest element is one of the reference row's
    largest. An output looks like logits when the reference's is floating, two-dimensional and has
    at least two columns (batch x classes); the rows of all such outputs count together, and a row
    with a NaN where the reference has none disagrees. It is None where no output looks like that.

    Args:
        outputs: in the program's order, on any device.
        reference: the same number of tensors with the same shapes.
        engine, variant: whose outputs they are.
        reference_name: what the reference is, e.g. `float64 program`.

    Raises:
        ValueError: there is no output, or their number or a shape differs.
    """
    ours = [_as_numpy(tensor) for tensor in outputs]
    theirs = [_as_numpy(tensor) for tensor in reference]
    apart = distance(ours, theirs)
    return Drift(
        engine=engine,
        variant=variant,
        reference=reference_name,
        relative_l2=apart.relative_l2,
        max_abs_over_max_ref=apart.max_abs_over_max_ref,
        cosine=apart.cosine,
        sqnr_db=apart.sqnr_db,
        nonfinite=apart.nonfinite,
        top1_agreement=_top1_agreement(ours, theirs),
    )


def output_drifts(
    outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], names: Sequence[str]
) -> list[OutputDrift]:
    """How far each output is from its reference.

    Args:
        outputs, reference: as `drift` takes them.
        names: of the outputs.

    Raises:
        ValueError: their number or a shape differs.
    """
    return [
        _output_drift(ours, theirs, name)
        for ours, theirs, name in zip(outputs, reference, names, strict=True)
    ]


def _output_drift(output: torch.Tensor, reference: torch.Tensor, name: str) -> OutputDrift:
    ours, theirs = _as_numpy(output), _as_numpy(reference)
    apart = distance([ours], [theirs])
    counted = ours.dtype.kind in "biu" and theirs.dtype.kind in "biu"
    both = _both_nonfinite(ours, theirs)
    tolerances = least_tolerances(ours, theirs)
    return OutputDrift(
        name=name,
        shape=tuple(output.shape),
        dtype=str(output.dtype).removeprefix("torch."),
        relative_l2=apart.relative_l2,
        max_abs=tolerances.atol,
        max_abs_over_max_ref=apart.max_abs_over_max_ref,
        cosine=apart.cosine,
        sqnr_db=apart.sqnr_db,
        nonfinite=apart.nonfinite,
        top1_agreement=_top1_agreement([ours], [theirs]),
        elements=ours.size,
        mismatched=int(np.count_nonzero(ours != theirs)) if counted else None,
        both_nonfinite=int(np.count_nonzero(both)),
        reference_nonfinite=int(np.count_nonzero(~np.isfinite(theirs) & ~both)),
        tolerances=None if ours.dtype.kind == "b" else tolerances,
    )


def least_tolerances(outputs: NDArray[Any], reference: NDArray[Any]) -> Tolerances:
    """The smallest tolerances that pass, in float64 arithmetic.

    Args:
        outputs, reference: of the same shape; integers and booleans count as float64 numbers
            (integers beyond 2^53 are rounded).
    """
    wide = np.complex128 if np.iscomplexobj(outputs) or np.iscomplexobj(reference) else np.float64
    ours, theirs = outputs.astype(wide), reference.astype(wide)
    agree = (ours == theirs) | _both_nonfinite(ours, theirs)
    ours, theirs = ours[~agree], theirs[~agree]
    if not ours.size:
        return Tolerances(0.0, 0.0, 0.0)
    if not (np.isfinite(ours) & np.isfinite(theirs)).all():
        return Tolerances(math.inf, math.inf, math.inf)
    with np.errstate(over="ignore", divide="ignore"):
        error, size = np.abs(ours - theirs), np.abs(theirs)
        ratio, excess = (error / size).max(), (error - USUAL_RTOL * size).max()
    # A few units in the last place more, so that the sum and the product round up to the error.
    slack = 4 * float(np.finfo(np.float64).eps)
    return Tolerances(
        atol=float(error.max()),
        rtol=float(ratio) * (1 + slack),
        atol_beside_rtol=float(excess + slack * error.max()) if excess > 0 else 0.0,
    )


def _both_nonfinite(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    """Where both are NaN, or the same infinity."""
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    both: NDArray[np.bool_] = ~np.isfinite(theirs) & same
    return both


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    # numpy has no bfloat16 and no 8-bit floats; float64 holds every one of them exactly.
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def _top1_agreement(
    outputs: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]]
) -> float | None:
    agreements = [
        _rows_agree(ours, theirs)
        for ours, theirs in zip(outputs, reference, strict=True)
        if _looks_like_logits(theirs)
    ]
    return float(np.concatenate(agreements).mean()) if agreements else None


def _looks_like_logits(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" and array.ndim == 2 and len(array) > 0 and array.shape[1] >= 2


def _rows_agree(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    # numpy's argmax takes a NaN for the largest element. The reference at our argmax is compared
    # with its own maximum, so that a tie in the reference can be broken either way.
    chosen = np.take_along_axis(theirs, ours.argmax(axis=1)[:, None], axis=1)[:, 0]
    agree: NDArray[np.bool_] = chosen == theirs.max(axis=1)
    lost = np.isnan(ours).any(axis=1) & ~np.isnan(theirs).any(axis=1)
    agree &= ~lost
    return agree
