"""What is asked of a precision: as the command line has it, and whether it contradicts itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, cast, get_args

import torch

from optfuse.errors import UsageError
from optfuse.precision import floats, mixed

Precision = Literal["fp32", "fp16", "bf16", "int8", "mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

IO_PRECISIONS = ("fp32", "fp16", "bf16")
LOW_PRECISIONS = ("fp16", "bf16", "int8")

Samples = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Plan:
    """What is asked of a precision.

    Attributes:
        precision: of the layers.
        io: of the inputs and outputs that are float32 in the model.
        low: of the layers of a mixture that are low.
        max_drift: of a mixture, a relative L2 to the float64 program.
        calibration: inputs that the ranges of int8 are taken from, and that fp16's are looked at.
        judging: inputs that a mixture's drift is taken on; by default those to calibrate on.
        drawn: the inputs are random numbers.
    """

    precision: Precision = "fp32"
    io: str = "fp32"
    low: str = "int8"
    max_drift: float | None = None
    calibration: Samples = ()
    judging: Samples = ()
    drawn: bool = False

    @property
    def lowest(self) -> str:
        """The lowest precision that a layer may have."""
        return self.low if self.precision == "mixed" else self.precision

    @property
    def io_dtype(self) -> torch.dtype:
        """Of the inputs and outputs that are float32 in the model."""
        return floats.DTYPES.get(self.io, torch.float32)


def plan_of(
    precision: str, *, io: str, low: str | None, max_drift: float | None, has_data: bool
) -> Plan:
    """A plan as the command line has it.

    Args:
        precision, io, max_drift: as `Plan` has them.
        low: of a mixture; None for int8 where there is data, else fp16.
        has_data: there are inputs of the user's own.

    Raises:
        UsageError: there is no precision of a name, or a low one without a mixture.
    """
    if low is not None and precision != "mixed":
        raise UsageError(
            f"--low-precision {low} cannot be used like this",
            f"It is for the low layers of a mixture, and --precision is {precision}",
            "Leave it out, or give --precision mixed",
        )
    low = low or ("int8" if has_data else "fp16")
    for option, name, possible in (
        ("--precision", precision, PRECISIONS),
        ("--io-precision", io, IO_PRECISIONS),
        ("--low-precision", low, LOW_PRECISIONS),
    ):
        if name not in possible:
            close = get_close_matches(name, possible, n=1)
            raise UsageError(
                f"{option} {name} cannot be used",
                f"The precisions are {', '.join(possible)}",
                f"Did you mean '{close[0]}'?" if close else "Choose one of them",
            )
    return Plan(cast(Precision, precision), io=io, low=low, max_drift=max_drift)


def check(plan: Plan) -> None:
    """Refuse what contradicts itself, before any work is done.

    Raises:
        UsageError: a mixture without a limit, a limit without a mixture, or types of inputs and
            outputs that the precision does not have.
    """
    thing = f"--precision {plan.precision} cannot be used like this"
    if plan.precision == "mixed":
        if plan.max_drift is None:
            raise UsageError(
                thing,
                "A mixture needs a limit that its drift is kept below",
                "Give it with --max-drift, a relative L2 distance such as 0.01",
            )
        mixed.require_budget(plan.max_drift)
    elif plan.max_drift is not None:
        raise UsageError(
            thing,
            "--max-drift chooses which layers of a mixture are low, and this is none",
            "Give --precision mixed, or check the drift afterwards with 'optfuse check'",
        )
    possible = ("fp32", plan.lowest) if plan.lowest in IO_PRECISIONS else ("fp32",)
    if plan.io not in possible:
        raise UsageError(
            f"--io-precision {plan.io} cannot be used like this",
            f"With layers in {plan.lowest}, inputs and outputs can be "
            + " or ".join(dict.fromkeys(possible)),
            "Leave --io-precision out, or give the precision of the layers",
        )
