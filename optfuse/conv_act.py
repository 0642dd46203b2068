"""One operator for convolution [+ residual] + activation: `optfuse::conv_act`.

    y = activation(convolution(x, weight, bias) + residual)

Eager PyTorch runs it as one fused kernel where there is one (oneDNN on a CPU, cuDNN on CUDA) and as
the composite of plain operators otherwise, always in float64. In ONNX it becomes standard operators
(Conv or ConvTranspose, Add, the activation) that every engine fuses by itself.

Importing this module registers the operator; programs that hold it need the module to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from optfuse.graph import arguments, is_call

if TYPE_CHECKING:
    import onnx_ir

aten = torch.ops.aten
_backends: Any = torch.backends
_torch_c: Any = torch._C


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


@dataclass(frozen=True)
class _Call:
    """One call's tensors and settings, the batch dimension always there."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    residual: torch.Tensor | None
    slope: torch.Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int
    activation: str
    scalars: Sequence[float]

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """What the convolution and the sum read."""
        tensors = (self.x, self.weight, self.bias)
        return tensors if self.residual is None else (*tensors, self.residual)

    def all_are(self, device: str, *dtypes: torch.dtype) -> bool:
        """Whether all operands lie on that kind of device and have one of these dtypes."""
        dtype = self.x.dtype
        return dtype in dtypes and all(
            each.device.type == device and each.dtype is dtype for each in self.operands
        )

    def residual_fits(self) -> bool:
        """Whether the residual has exactly the result's shape: fused kernels do not check it.

        Each spatial size of a convolution is (n + 2p - d (k - 1) - 1) // s + 1, as torch.nn.Conv2d
        documents it.
        """
        if self.residual is None:
            return True
        sizes = zip(
            self.x.shape[2:],
            self.weight.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        return list(self.residual.shape) == [self.x.shape[0], self.weight.shape[0], *spatial]


_Kernel = Callable[[_Call], torch.Tensor]


def _composite(call: _Call) -> torch.Tensor:
    y = aten.convolution.default(
        call.x,
        call.weight,
        call.bias,
        call.stride,
        call.padding,
        call.dilation,
        call.transposed,
        call.output_padding,
        call.groups,
    )
    if call.residual is not None:
        y = y + call.residual
    return ACTIVATIONS[call.activation].compute(y, call.slope, call.scalars)


_ONEDNN: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
"""The fused oneDNN kernel, None in a PyTorch built without it."""


def _on_cpu(call: _Call) -> torch.Tensor:
    return _onednn(call) if _onednn_has(call) else _composite(call)


def _onednn_has(call: _Call) -> bool:
    if _ONEDNN is None or not call.all_are("cpu", torch.float32):
        return False
    if call.residual is None:
        covered = ACTIVATIONS[call.activation].onednn is not None
    else:
        # Its sum takes no post-operator but ReLU, and no one-dimensional convolution.
        covered = call.activation == "relu" and call.x.dim() > 3 and call.residual_fits()
    return covered and _pytorch_takes_onednn(call)


def _pytorch_takes_onednn(call: _Call) -> bool:
    """Whether PyTorch itself would run the convolution by oneDNN.

    It does not where another kernel is faster: oneDNN needs about 80 microseconds for a call, and
    a matrix product beats it at 1x1 on one thread. What a fused kernel saves behind a convolution
    is less than what it then loses in it.
    """
    chosen = _torch_c._select_conv_backend(
        call.x,
        call.weight,
        call.bias,
        list(call.stride),
        list(call.padding),
        list(call.dilation),
        call.transposed,
        list(call.output_padding),
        call.groups,
    )
    return bool(chosen == _torch_c._ConvBackend.Mkldnn)


def _onednn(call: _Call) -> torch.Tensor:
    # Padding stands before stride here, unlike in every other convolution.
    settings = (call.padding, call.stride, call.dilation, call.groups)
    y: torch.Tensor
    if call.residual is not None:
        y = _ONEDNN.binary(
            call.x, call.residual, call.weight, call.bias, *settings, "add", 1.0, "relu", [], ""
        )
        return y
    post_operator = ACTIVATIONS[call.activation].onednn
    assert post_operator is not None
    attribute, algorithm = post_operator
    y = _ONEDNN.default(
        call.x, call.weight, call.bias, *settings, attribute, call.scalars, algorithm
    )
    return y


def _on_cuda(call: _Call) -> torch.Tensor:
    return _cudnn(call) if _cudnn_has(call) else _composite(call)


def _cudnn_has(call: _Call) -> bool:
    if not _backends.cudnn.is_available() or not _backends.cudnn.enabled:
        return False
    if torch.version.hip is not None or call.transposed or call.x.numel() == 0:
        return False
    # It has no one-dimensional convolution, and no post-operator but ReLU.
    if call.activation != "relu" or call.x.dim() < 4:
        return False
    return call.all_are("cuda", torch.float32, torch.float16) and call.residual_fits()


def _cudnn(call: _Call) -> torch.Tensor:
    settings = (call.bias, call.stride, call.padding, call.dilation, call.groups)
    y: torch.Tensor
    if call.residual is None:
        y = aten.cudnn_convolution_relu.default(call.x, call.weight, *settings)
    else:
        y = aten.cudnn_convolution_add_relu.default(
            call.x, call.weight, call.residual, 1.0, *settings
        )
    return y


def _implementation(kernel: _Kernel) -> Callable[..., torch.Tensor]:
    """The operator on one kind of device: an unbatched input gets a batch dimension of 1."""

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor | None,
        slope: torch.Tensor | None,
        *settings: Any,
    ) -> torch.Tensor:
        if x.dim() == weight.dim():
            return kernel(_Call(x, weight, bias, residual, slope, *settings))
        batched = None if residual is None else residual.unsqueeze(0)
        call = _Call(x.unsqueeze(0), weight, bias, batched, slope, *settings)
        return kernel(call).squeeze(0)

    return run


_NAME = "optfuse::conv_act"
torch.library.define(
    _NAME,
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? slope, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, "
    "SymInt groups, str activation, float[] scalars) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(_NAME, "default")(_implementation(_composite))
torch.library.impl(_NAME, "cpu")(_implementation(_on_cpu))
torch.library.impl(_NAME, "cuda")(_implementation(_on_cuda))
torch.library.register_fake(_NAME)(_implementation(_composite))

CONV_ACT = torch.ops.optfuse.conv_act.default
"""activation(convolution(x, weight, bias) + residual).

Args:
    x: (N, C, *spatial) or (C, *spatial), one to three spatial dimensions.
    weight, stride, padding, dilation, transposed, output_padding, groups: as
        `torch.ops.aten.convolution` takes them.
    bias: (out_channels,), always there.
    residual: None, or a tensor of exactly the result's shape.
    slope: PReLU's, shape (1,) or (out_channels,); None for every other activation.
    activation, scalars: a name in `ACTIVATIONS` and its numbers.
"""


@register_flop_formula(torch.ops.optfuse.conv_act)
def _flops(
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Sequence[int],
    _residual: Sequence[int] | None,
    _slope: Sequence[int] | None,
    _stride: Sequence[int],
    _padding: Sequence[int],
    _dilation: Sequence[int],
    transposed: bool,
    *_args: object,
    out_shape: Sequence[int],
    **_kwargs: object,
) -> int:
    """Those of its convolution, as PyTorch counts them."""
    if len(x) < len(weight):
        x, out_shape = (1, *x), (1, *out_shape)
    return int(conv_flop_count(list(x), list(weight), list(out_shape), transposed=transposed))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How `torch.onnx.export(..., dynamo=True, custom_translation_table=...)` translates it.

    The operators are those of opset 20, torch.onnx's default: do not ask for a lower one.
    """
    return {CONV_ACT: _to_onnx}


def _to_onnx(
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    slope: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str,
    scalars: Sequence[float],
) -> Any:
    from onnxscript import opset20

    op: Any = opset20
    spatial, dtype = len(weight.shape) - 2, x.dtype
    unbatched = len(x.shape) == spatial + 1
    if unbatched:
        x = op.Unsqueeze(x, [0])
        residual = None if residual is None else op.Unsqueeze(residual, [0])
    settings = {
        "strides": list(stride),
        # ONNX lists the padding at the beginnings, then the padding at the ends.
        "pads": [*padding, *padding],
        "dilations": list(dilation),
        "group": groups,
    }
    if transposed:
        y = op.ConvTranspose(x, weight, bias, output_padding=list(output_padding), **settings)
    else:
        y = op.Conv(x, weight, bias, **settings)
    if residual is not None:
        y = op.Add(y, residual)
    if slope is not None:
        slope = op.Reshape(slope, [-1, *[1] * spatial])
    # The exporter infers dtypes later, and the activations' constants need it now.
    y.dtype = dtype
    y = ACTIVATIONS[activation].onnx(op, y, slope, scalars)
    return op.Squeeze(y, [0]) if unbatched else y


def ensure_bias(model: onnx_ir.Model) -> None:
    """Give every convolution of an ONNX model a bias again, in place.

    torch.onnx strips biases that are all zero, but engines match their fused kernels on the form
    with a bias. Convolutions with as many channels share one initializer of zeros.

    Args:
        model: `onnx_program.model`. Convolutions whose weight has no known shape or dtype are
            left as they are.
    """
    zeros: dict[tuple[int, onnx_ir.DataType], onnx_ir.Value] = {}
    for node in model.graph.all_nodes():
        if node.domain != "" or node.op_type not in ("Conv", "ConvTranspose"):
            continue
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            continue
        weight = node.inputs[1]
        if weight is None or weight.shape is None or weight.dtype is None:
            continue
        axis, factor = 0, 1
        if node.op_type == "ConvTranspose":
            axis, factor = 1, node.attributes.get_int("group", 1)
        channels = weight.shape[axis]
        if not isinstance(channels, int):
            continue
        key = (channels * factor, weight.dtype)
        if key not in zeros:
            zeros[key] = _zero_initializer(model.graph, *key)
        node.resize_inputs(3)
        node.replace_input_with(2, zeros[key])


def _zero_initializer(graph: onnx_ir.Graph, channels: int, dtype: Any) -> onnx_ir.Value:
    import numpy as np
    import onnx_ir

    name = f"zero_bias_{channels}_{dtype.name.lower()}"
    while name in graph.initializers:
        name += "_"
    tensor = onnx_ir.tensor(np.zeros(channels, dtype=dtype.numpy()), dtype=dtype, name=name)
    value = onnx_ir.Value(
        name=name,
        type=onnx_ir.TensorType(dtype),
        shape=onnx_ir.Shape([channels]),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
