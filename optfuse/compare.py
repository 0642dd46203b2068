"""Outputs x outputs -> Drift: how far an engine's outputs are from a named reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optfuse.stages import Drift
from optfuse.stats import distance

if TYPE_CHECKING:
    import torch


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
