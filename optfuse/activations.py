"""The activations that can be fused into a convolution: one table, every language in one row.

How ATen spells each one, what it computes in PyTorch's own operators, its ONNX operators, and its
name among oneDNN's post-operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from optfuse.graph import arguments, is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """What one spelling of an activation says, read off its last node.

    Attributes:
        source: what it is applied to.
        scalars: its numbers, in the order the activation takes them.
        slope: PReLU's slope, one number or one a channel.
        between: its nodes other than the last, e.g. `abs` and `add` of a softsign.
    """

    source: fx.Node
    scalars: tuple[float, ...] = ()
    slope: fx.Node | None = None
    between: tuple[fx.Node, ...] = ()


Reader = Callable[[fx.Node], "Reading | None"]


@dataclass(frozen=True)
class Activation:
    """One activation in every language that `conv_act` speaks.

    Attributes:
        spellings: the ATen operator of its last node -> how to read the rest, None where the
            node turns out to be something else.
        compute: (y, slope, scalars) -> the activation in PyTorch's own operators.
        onnx: (opset, y, slope, scalars) -> the same in ONNX operators; the slope's shape is
            (channels, 1, ...), so that it broadcasts from the right as ONNX wants.
        onednn: its post-operator and algorithm as `mkldnn::_convolution_pointwise` names them, or
            None where that has none. Its sigmoid and hardtanh give a number for a NaN, as they do
            under torch.compile.
    """

    spellings: Mapping[Any, Reader]
    compute: Callable[[torch.Tensor, torch.Tensor | None, Sequence[float]], torch.Tensor]
    onnx: Callable[[Any, Any, Any, Sequence[float]], Any]
    onednn: tuple[str, str] | None = None


def _read(*names: str, **fixed: object) -> Reader:
    """Reads the arguments `names` as scalars; no match unless the `fixed` ones are as given."""

    def read(node: fx.Node) -> Reading | None:
        bound = arguments(node)
        source = next(iter(bound.values()))
        scalars = [bound[name] for name in names]
        if any(bound[name] != wanted for name, wanted in fixed.items()):
            return None
        if not all(isinstance(scalar, (int, float)) for scalar in scalars):
            return None
        return Reading(source, tuple(float(scalar) for scalar in scalars))

    return read


def _read_range(low: str, high: str) -> Reader:
    """Reads both limits; none where one is missing, or where they are swapped: ONNX and oneDNN
    do not say what Clip gives then."""
    both = _read(low, high)

    def read(node: fx.Node) -> Reading | None:
        reading = both(node)
        return reading if reading and reading.scalars[0] <= reading.scalars[1] else None

    return read


def _read_relu6(node: fx.Node) -> Reading | None:
    return Reading(node.all_input_nodes[0], (0.0, 6.0))


def _read_prelu(node: fx.Node) -> Reading | None:
    bound = arguments(node)
    return Reading(bound["self"], slope=bound["weight"])


def _read_softsign(node: fx.Node) -> Reading | None:
    """y / (|y| + 1), which is what softsign lowers to."""
    source, divisor = node.args[:2]
    if not is_call(divisor, aten.add.Tensor, aten.add.Scalar):
        return None
    assert isinstance(divisor, fx.Node)
    bound = arguments(divisor)
    magnitude = bound["self"]
    if bound["other"] != 1 or bound["alpha"] != 1 or not is_call(magnitude, aten.abs.default):
        return None
    if not isinstance(source, fx.Node) or magnitude.args[0] is not source:
        return None
    return Reading(source, between=(magnitude, divisor))


def _read_silu_product(node: fx.Node) -> Reading | None:
    """y * sigmoid(y) in either order: swish as it was written before PyTorch had SiLU."""
    for source, gate in (node.args[:2], node.args[1::-1]):
        if (
            isinstance(source, fx.Node)
            and isinstance(gate, fx.Node)
            and is_call(gate, aten.sigmoid.default)
            and gate.args[0] is source
        ):
            return Reading(source, between=(gate,))
    return None


def _onnx_softplus(op: Any, y: Any, _slope: Any, scalars: Sequence[float]) -> Any:
    beta, threshold = scalars
    # Past 20 the exact softplus differs from y by less than 2.1e-9, below float32's rounding, so
    # that PyTorch's switch to the identity there need not be spelt out.
    if beta == 1 and threshold >= 20:
        return op.Softplus(y)
    scaled = op.Mul(y, _number(beta, y))
    softened = op.Div(op.Softplus(scaled), _number(beta, y))
    return op.Where(op.Greater(scaled, _number(threshold, y)), y, softened)


def _number(number: float, like: Any) -> Any:
    """An ONNX constant of another value's dtype."""
    import onnx_ir

    return onnx_ir.tensor(number, dtype=like.dtype)


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": Activation(
        {
            aten.relu.default: _read(),
            aten.clamp_min.default: _read(min=0),
            aten.clamp.default: _read(min=0, max=None),
        },
        compute=lambda y, _slope, _s: torch.relu(y),
        onnx=lambda op, y, _slope, _s: op.Relu(y),
        onednn=("relu", ""),
    ),
    "hardtanh": Activation(
        {
            aten.hardtanh.default: _read_range("min_val", "max_val"),
            aten.clamp.default: _read_range("min", "max"),
            aten.relu6.default: _read_relu6,
        },
        compute=lambda y, _slope, s: torch.clamp(y, s[0], s[1]),
        onnx=lambda op, y, _slope, s: op.Clip(y, _number(s[0], y), _number(s[1], y)),
        onednn=("hardtanh", ""),
    ),
    "leaky_relu": Activation(
        {aten.leaky_relu.default: _read("negative_slope")},
        compute=lambda y, _slope, s: aten.leaky_relu.default(y, s[0]),
        onnx=lambda op, y, _slope, s: op.LeakyRelu(y, alpha=s[0]),
        onednn=("leaky_relu", ""),
    ),
    "prelu": Activation(
        {aten.prelu.default: _read_prelu},
        compute=lambda y, slope, _s: aten.prelu.default(y, slope),
        onnx=lambda op, y, slope, _s: op.PRelu(y, slope),
    ),
    "elu": Activation(
        {aten.elu.default: _read("alpha", scale=1, input_scale=1)},
        compute=lambda y, _slope, s: aten.elu.default(y, s[0]),
        onnx=lambda op, y, _slope, s: op.Elu(y, alpha=s[0]),
    ),
    "sigmoid": Activation(
        {aten.sigmoid.default: _read()},
        compute=lambda y, _slope, _s: torch.sigmoid(y),
        onnx=lambda op, y, _slope, _s: op.Sigmoid(y),
        onednn=("sigmoid", ""),
    ),
    "tanh": Activation(
        {aten.tanh.default: _read()},
        compute=lambda y, _slope, _s: torch.tanh(y),
        onnx=lambda op, y, _slope, _s: op.Tanh(y),
        onednn=("tanh", ""),
    ),
    "softplus": Activation(
        {aten.softplus.default: _read("beta", "threshold")},
        compute=lambda y, _slope, s: aten.softplus.default(y, s[0], s[1]),
        onnx=_onnx_softplus,
    ),
    "softsign": Activation(
        {aten.div.Tensor: _read_softsign},
        compute=lambda y, _slope, _s: y / (y.abs() + 1),
        onnx=lambda op, y, _slope, _s: op.Softsign(y),
    ),
    "silu": Activation(
        {aten.silu.default: _read(), aten.mul.Tensor: _read_silu_product},
        compute=lambda y, _slope, _s: aten.silu.default(y),
        onnx=lambda op, y, _slope, _s: op.Mul(y, op.Sigmoid(y)),
        onednn=("swish", ""),
    ),
    "hardswish": Activation(
        {aten.hardswish.default: _read()},
        compute=lambda y, _slope, _s: aten.hardswish.default(y),
        onnx=lambda op, y, _slope, _s: op.HardSwish(y),
        onednn=("hardswish", ""),
    ),
    "hardsigmoid": Activation(
        {aten.hardsigmoid.default: _read()},
        compute=lambda y, _slope, _s: aten.hardsigmoid.default(y),
        onnx=lambda op, y, _slope, _s: op.HardSigmoid(y, alpha=1 / 6, beta=0.5),
        onednn=("hardsigmoid", ""),
    ),
    "gelu": Activation(
        {aten.gelu.default: _read(approximate="none")},
        compute=lambda y, _slope, _s: aten.gelu.default(y),
        onnx=lambda op, y, _slope, _s: op.Gelu(y, approximate="none"),
        onednn=("gelu", "none"),
    ),
    "gelu_tanh": Activation(
        {aten.gelu.default: _read(approximate="tanh")},
        compute=lambda y, _slope, _s: aten.gelu.default(y, approximate="tanh"),
        onnx=lambda op, y, _slope, _s: op.Gelu(y, approximate="tanh"),
        onednn=("gelu", "tanh"),
    ),
    "mish": Activation(
        {aten.mish.default: _read()},
        compute=lambda y, _slope, _s: aten.mish.default(y),
        onnx=lambda op, y, _slope, _s: op.Mish(y),
    ),
}
"""Name, as `conv_act` takes it -> the activation. This table is all there is to add one."""

_BY_OPERATOR: dict[Any, list[tuple[str, Reader]]] = {}
for _name, _activation in ACTIVATIONS.items():
    for _operator, _reader in _activation.spellings.items():
        _BY_OPERATOR.setdefault(_operator, []).append((_name, _reader))


def activation_of(node: fx.Node) -> tuple[str, Reading] | None:
    """The activation that ends at `node` and what it is applied to, or None."""
    if node.op != "call_function":
        return None
    for name, read in _BY_OPERATOR.get(node.target, ()):
        reading = read(node)
        if reading is not None and isinstance(reading.source, fx.Node):
            return name, reading
    return None
