"""Low precision, written into a program's graph or its ONNX file.

`floats` has fp16 and bf16: low weights and explicit casts, what must stay in float32 (`rules`,
`ranges`), attention in plain operators (`attention`), and where casts stand (`casts`).
"""

from __future__ import annotations

from optfuse.precision.floats import Lowering, layers, lower

__all__ = ["Lowering", "layers", "lower"]
