"""A model in the precision that was asked for: its files and programs, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optfuse.precision import int8, mixed
from optfuse.precision.plan import Plan
from optfuse.stages import Artifact, Caveat, Program, Step

FEW_SAMPLES = 16
"""From so many on, ranges are worth something; onnxruntime's and TensorRT's guides speak of a
hundred or more."""


@dataclass(frozen=True)
class Searched:
    """What the search for a mixture found, as the report tells it.

    Attributes:
        max_drift: the limit.
        choice: what was found.
        timed_on: the engine that the candidates were timed on, or None.
        modules: names of layers -> the paths of the modules they came from, where known.
    """

    max_drift: float
    choice: mixed.Choice
    timed_on: str | None
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """A model in its precision.

    Attributes:
        plan: what was asked for.
        program: for engines that run programs; None in int8, which none of them has.
        artifact: the ONNX file, `model.onnx`.
        others: engines' schemes of rounding whose files differ -> their files.
        layers: how many could be low.
        searched: of a mixture.
        caveat: what makes its figures doubtful, or None.
    """

    plan: Plan
    program: Program | None
    artifact: Artifact
    others: Mapping[str, Artifact]
    layers: int = 0
    searched: Searched | None = None
    caveat: Caveat | None = None

    def file_for(self, engine: str) -> Artifact:
        """The ONNX file that an engine is given."""
        return self.others.get(int8.scheme_of(engine), self.artifact)

    def moved(self, folder: Path) -> Lowered:
        """The same with its files in another folder."""

        def there(artifact: Artifact) -> Artifact:
            return replace(artifact, path=folder / artifact.path.name)

        others = {scheme: there(artifact) for scheme, artifact in self.others.items()}
        return replace(self, artifact=there(self.artifact), others=others)

    @property
    def caveats(self) -> list[Caveat]:
        """What makes its figures doubtful."""
        found = [] if self.caveat is None else [self.caveat]
        count = len(self.plan.calibration)
        if self.plan.lowest == "int8" and not self.plan.drawn and count < FEW_SAMPLES:
            both = ", which drift is taken on as well" if count == 1 else ""
            found.append(
                Caveat(
                    kind="few-samples",
                    about="int8",
                    finding=f"Its ranges come from {_counted(count)}{both}",
                    cause="Values of other inputs may lie beyond them, and are cut off there",
                    next_step=f"Give at least {2 * FEW_SAMPLES} samples with --data: half of them "
                    "calibrate",
                )
            )
        return found

    @property
    def step(self) -> Step | None:
        """What was done to which layer; None in float32."""
        steps = [step for step in self.artifact.trace if step.stage == "precision"]
        return steps[-1] if steps else None


def told(lowered: Lowered) -> dict[str, Any] | None:
    """What the report says of the precision, as JSON has it; None in float32 alone."""
    step = lowered.step
    if step is None:
        return None
    plan, searched = lowered.plan, lowered.searched
    high = set() if searched is None else set(searched.choice.high)
    kind = " of random inputs" if plan.drawn else " of the data"
    ranges = f"ranges from {_counted(len(plan.calibration))}{kind}"
    calibrated = ranges if plan.lowest == "int8" else ""
    return {
        "asked": plan.precision,
        "low": plan.lowest,
        "io": plan.io,
        "layers": lowered.layers,
        "low_layers": len(step.sites),
        "calibration": calibrated,
        "max_drift": None if searched is None else searched.max_drift,
        "timed_on": None if searched is None else searched.timed_on,
        "reason": "" if searched is None else f"{searched.choice.reason}.",
        "curve": [] if searched is None else _curve(searched.choice),
        "sensitivities": []
        if searched is None
        else [
            {
                "layer": ", ".join(each.layers),
                "module": ", ".join(
                    dict.fromkeys(
                        module for name in each.layers if (module := searched.modules.get(name))
                    )
                ),
                "relative_l2": each.relative_l2,
                "high": not high.isdisjoint(each.layers),
            }
            for each in searched.choice.sensitivities
        ],
    }


def _counted(samples: int) -> str:
    return f"{samples} sample" + ("" if samples == 1 else "s")


def _curve(choice: mixed.Choice) -> list[dict[str, Any]]:
    none = next((each.milliseconds for each in choice.curve if each.low == 0), None)
    return [
        {
            "low": each.low,
            "share": each.share,
            "relative_l2": each.relative_l2,
            "ratio": none / each.milliseconds if none and each.milliseconds else None,
            "within": each.within,
            "chosen": each == choice.point,
        }
        for each in choice.curve
    ]
