"""One layer's drift, how it grew, and who is the suspect: whatever ran the layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from optfuse.float64 import distance, widened
from optfuse.stages import LayerDrift, LayerDrifts

LIMIT = 8.0
"""The growth from which a layer is a suspect.

The networks of `models/` grew by at most 1.4 after all passes on eager PyTorch (three inputs each),
and by at most 1.9 as exported on ONNX Runtime (two inputs each), whose kernels sum in another
order. Kernels that compute more cleverly (Winograd's) lose a few times more, and shall not be
suspects. In ResNet-50 a weight tensor in the middle scaled by 1.01 grows by more than 10,000; of 40
single weights drawn at random, each scaled by 1.01, 37 were named, and no other layer in their
place.
"""

ROUNDING = 16
"""Units of rounding that an error is compared with at least, where the unchanged program has none
of its own to compare with: a sum of some thousand terms comes to about as many."""


@dataclass(frozen=True)
class Place:
    """A result of the program that is looked at, which the reference computes too.

    Attributes:
        name, kind, module, equals, origins: as in `LayerDrift`.
        target: the name of the reference's result that it is compared with.
    """

    name: str
    kind: str
    module: str
    equals: tuple[str, ...]
    origins: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Exact:
    """What a place should give.

    Attributes:
        value: the reference's.
        own: distance of the unchanged program's own result; None where there is none.
        own_alone: the same where each of its layers was fed with the reference's values.
    """

    value: torch.Tensor
    own: float | None = None
    own_alone: float | None = None


class Reference(Protocol):
    """What the layers are compared with, kept only as long as somebody needs it."""

    name: str

    def hold(self, targets: Sequence[str]) -> None:
        """Have these ready; they stay until each is released."""

    def exact(self, target: str) -> Exact:
        """What that one should be; it is held."""

    def release(self, target: str) -> None:
        """It is not needed any more."""


def row(
    place: Place,
    exact: Exact,
    value: torch.Tensor,
    alone: torch.Tensor,
    types: Collection[torch.dtype],
) -> LayerDrift:
    """How far a place is from where it should be.

    Args:
        place: which one.
        exact: what it should give.
        value: what it gave.
        alone: what it gave when fed with the reference's values.
        types: as `growth` takes them.
    """
    return LayerDrift(
        name=place.name,
        kind=place.kind,
        module=place.module,
        equals=place.equals,
        origins=place.origins,
        shape=tuple(value.shape),
        relative_l2=apart(exact.value, value),
        own_relative_l2=exact.own,
        growth=growth(apart(exact.value, alone), exact.own_alone, value, types),
    )


def apart(exact: torch.Tensor, value: torch.Tensor) -> float:
    """The relative L2 distance, infinite where shapes, integers, booleans or what is not finite
    differ."""
    return distance([exact], [value.to(exact.device, widened(value.dtype))])


def growth(
    error: float, own: float | None, value: torch.Tensor, types: Collection[torch.dtype] = ()
) -> float | None:
    """How many times as much error a layer adds as the unchanged program's, or as rounding.

    Args:
        error: what the layer adds, relative.
        own: what the unchanged program's adds at the same place; None where that is not known.
        value: the layer's result, for its dtype and the number of its elements.
        types: of what is read in the layer, from where it is fed to its result. An operator in
            float32 that reads float16 is fed with the reference's values rounded to float16, and
            adds that rounding; so the coarsest of these and the result's own counts. What is cast
            on as soon as it was cast is left out: nothing computes in that type, and so nothing
            has reason to be rounded to it.

    Returns:
        None for integers and booleans, which are right or wrong, and where the unchanged program's
        own error is infinite.
    """
    if not (value.is_floating_point() or value.is_complex()) or own == math.inf:
        return None
    # Where the unchanged program has no error of its own it does not tell how much rounding is
    # usual here, and the error of a few elements may be small by luck.
    units = ROUNDING if not own else max(1.0, ROUNDING / math.sqrt(max(1, value.numel())))
    floats = [each for each in types if each.is_floating_point or each.is_complex]
    coarsest = max(torch.finfo(each).eps for each in (value.dtype, *floats))
    return error / max(own or 0.0, units * coarsest / 2)


def drifts(rows: Iterable[LayerDrift], engine: str, reference: str, limit: float) -> LayerDrifts:
    """All rows together, with the first one that grew by more than the limit as the suspect."""
    found = tuple(rows)
    suspect = next((each.name for each in found if (each.growth or 0.0) > limit), None)
    return LayerDrifts(engine, reference, found, suspect, limit)
