"""Drift layer by layer: where two programs compute the same, how far apart they are there, and
which layer is the first to blame.

Each layer is looked at twice. Once as the program ran: its distance to the reference holds all
that went wrong before it too. And once fed with the reference's own values, so that nothing is
inherited: what is left is the error that this layer adds. That error over the one the unchanged
program adds at the same place is the layer's growth, and the first one with a growth above `LIMIT`
is the suspect. Rounding is no growth: a layer may add as much as the coarsest type rounds by that
it computes in, reads or gives, however fine its own operators are.
"""

from __future__ import annotations

from optfuse.layers.drifts import LIMIT
from optfuse.layers.onnx_file import compare_file, compare_files, compare_with_float64
from optfuse.layers.programs import compare_layers

__all__ = ["LIMIT", "compare_file", "compare_files", "compare_layers", "compare_with_float64"]
