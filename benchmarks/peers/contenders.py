"""Who is compared: what made the file or the program, what runs it, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
ENGINES = ("onnxruntime", "openvino", "torch", "torch-compile")


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
        by: what made it: PyTorch itself, `torch.onnx.export` as it comes, a simplifier of its
            file, or optfuse.
        engine: what runs it, as optfuse calls it.
        precision: as `--precision` has it.
    """

    by: str
    engine: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """Tells it from every other, e.g. `optfuse openvino bf16`."""
        return f"{self.by} {self.engine} {self.precision}"


REFERENCE = Contender("export as it comes", "onnxruntime")
"""What every other one is compared with: the export as it comes, on the engine that most take."""

TOO_SLOW = 10.0
"""Times as long as the reference: what takes longer is left out, because it would take most of the
time that all have together (PyTorch's float16 on a CPU takes up to 55 times as long in
docs/benchmarks.md), and no interval is needed to tell."""

OTHERS = (
    Contender("eager", "torch"),
    Contender("as captured", "torch-compile"),
    REFERENCE,
    Contender("onnxsim", "onnxruntime"),
    Contender("onnxslim", "onnxruntime"),
    Contender("export as it comes", "openvino"),
)
"""What people deploy otherwise."""

OURS = tuple(
    Contender("optfuse", engine, precision) for engine in ENGINES for precision in PRECISIONS
)

ALL = (*OTHERS, *OURS)
