"""One operator for convolution [+ residual] + activation: `optfuse::conv_act`.

    y = activation(convolution(x, weight, bias) + residual)

Eager PyTorch runs it as one fused kernel where there is one (oneDNN on a CPU, cuDNN on CUDA) and as
the composite of plain operators otherwise, always in float64. In ONNX it becomes standard operators
(Conv or ConvTranspose, Add, the activation) that every engine fuses by itself.

Importing this module registers the operator; programs that hold it need the module to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from optfuse.activations import ACTIVATIONS
from optfuse.convolution import Convolution
from optfuse.graph import arguments, is_call

if TYPE_CHECKING:
    import onnx_ir

aten = torch.ops.aten
_backends: Any = torch.backends
_torch_c: Any = torch._C


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
composite = _implementation(_composite)
"""What the operator is short for, in plain operators: for a compiler that fuses them itself."""

torch.library.impl(_NAME, "default")(composite)
torch.library.impl(_NAME, "cpu")(_implementation(_on_cpu))
torch.library.impl(_NAME, "cuda")(_implementation(_on_cuda))
torch.library.register_fake(_NAME)(composite)

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


def convolution_within(node: fx.Node) -> Convolution | None:
    """The convolution that a call of `CONV_ACT` holds, None for any other node."""
    if not is_call(node, CONV_ACT):
        return None
    bound = arguments(node)
    return Convolution(
        node,
        bound["x"],
        bound["weight"],
        bound["bias"],
        stride=tuple(bound["stride"]),
        padding=tuple(bound["padding"]),
        dilation=tuple(bound["dilation"]),
        output_padding=tuple(bound["output_padding"]),
        transposed=bound["transposed"],
        groups=bound["groups"],
    )


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
