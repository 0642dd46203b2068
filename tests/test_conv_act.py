"""The operator against PyTorch's own layers, in eager, in fake tensors, and in ONNX."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optfuse import conv_act
from optfuse.activations import ACTIVATIONS
from optfuse.conv_act import CONV_ACT, ensure_bias, translation_table

SCALARS = {
    "hardtanh": [-0.5, 2.0],
    "leaky_relu": [0.2],
    "elu": [1.5],
    "softplus": [2.0, 3.0],
}

PLAIN: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "relu": lambda y, slope: F.relu(y),
    "hardtanh": lambda y, slope: F.hardtanh(y, -0.5, 2.0),
    "leaky_relu": lambda y, slope: F.leaky_relu(y, 0.2),
    "prelu": lambda y, slope: F.prelu(y, slope),
    "elu": lambda y, slope: F.elu(y, 1.5),
    "sigmoid": lambda y, slope: torch.sigmoid(y),
    "tanh": lambda y, slope: torch.tanh(y),
    "softplus": lambda y, slope: F.softplus(y, 2.0, 3.0),
    "softsign": lambda y, slope: F.softsign(y),
    "silu": lambda y, slope: F.silu(y),
    "hardswish": lambda y, slope: F.hardswish(y),
    "hardsigmoid": lambda y, slope: F.hardsigmoid(y),
    "gelu": lambda y, slope: F.gelu(y),
    "gelu_tanh": lambda y, slope: F.gelu(y, approximate="tanh"),
    "mish": lambda y, slope: F.mish(y),
}
"""Each activation as a user writes it."""

KINDS = ("conv1d", "conv2d", "conv3d", "residual", "residual3d", "transposed", "unbatched")


class Case:
    """One convolution with every setting different from its default, and its operands."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.kind = kind
        self.spatial = {"conv1d": 1, "conv3d": 3, "residual3d": 3}.get(kind, 2)
        self.transposed = kind == "transposed"
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        # Grouped: 4 channels in, 6 out, in 2 groups.
        self.x = draw(*[] if kind == "unbatched" else [2], 4, *(9, 8, 7)[: self.spatial])
        shape = (4, 3) if self.transposed else (6, 2)
        self.weight = draw(*shape, *(3, 2, 3)[: self.spatial])
        self.bias = draw(6)
        self.slope = draw(6).abs()
        self.stride = [2, 1, 2][: self.spatial]
        self.padding = [1, 0, 2][: self.spatial]
        self.dilation = [1, 2, 1][: self.spatial]
        self.output_padding = [1, 0][: self.spatial] if self.transposed else [0] * self.spatial
        plain = self.convolution()
        self.residual = draw(*plain.shape) if kind.startswith("residual") else None

    def convolution(self) -> torch.Tensor:
        """The convolution alone, by PyTorch's own function."""
        if self.transposed:
            return F.conv_transpose2d(
                self.x, self.weight, self.bias, self.stride, self.padding,
                self.output_padding, 2, self.dilation,
            )  # fmt: skip
        run = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        return run(self.x, self.weight, self.bias, self.stride, self.padding, self.dilation, 2)

    def plain(self, activation: str) -> torch.Tensor:
        """What the operator must give."""
        y = self.convolution()
        if self.residual is not None:
            y = y + self.residual
        if self.kind == "unbatched" and activation == "prelu":
            return F.prelu(y.unsqueeze(0), self.slope).squeeze(0)
        return PLAIN[activation](y, self.slope)

    def settings(self, activation: str, scalars: Sequence[float] | None = None) -> tuple[Any, ...]:
        """The operator's arguments behind its tensors."""
        return (
            self.stride, self.padding, self.dilation, self.transposed, self.output_padding, 2,
            activation, SCALARS.get(activation, []) if scalars is None else scalars,
        )  # fmt: skip

    def arguments(self, activation: str) -> tuple[Any, ...]:
        """All of the operator's arguments."""
        slope = self.slope if activation == "prelu" else None
        settings = self.settings(activation)
        return (self.x, self.weight, self.bias, self.residual, slope, *settings)


class EveryActivation(nn.Module):
    """The operator once for each activation, on one input (and a residual)."""

    def __init__(self, case: Case, activations: Sequence[str] = tuple(ACTIVATIONS)) -> None:
        super().__init__()
        self.weight = nn.Parameter(case.weight)
        self.bias = nn.Parameter(case.bias)
        self.slope = nn.Parameter(case.slope)
        self.case = case
        self.activations = activations

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [
            CONV_ACT(
                x, self.weight, self.bias, residual, self.slope if name == "prelu" else None,
                *self.case.settings(name),
            )
            for name in self.activations
        ]  # fmt: skip


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def exported(module: nn.Module, *args: torch.Tensor, **options: Any) -> Any:
    """The ONNX program of a module, exported as optfuse does it."""
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter's own deprecations.
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), args, strict=False, **options)
        return torch.onnx.export(
            program, (), dynamo=True, verbose=False, custom_translation_table=translation_table()
        )


def test_every_activation_has_a_plain_form_here() -> None:
    assert set(PLAIN) == set(ACTIVATIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_gives_what_the_layers_give(activation: str, kind: str) -> None:
    case = Case(kind)
    actual, expected = CONV_ACT(*case.arguments(activation)), case.plain(activation)
    assert actual.shape == expected.shape
    # The same operators in float64 (1.1e-16), summed in another order at most.
    assert relative_l2(actual, expected) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_kernels_are_close_to_float64(activation: str, kind: str) -> None:
    actual = CONV_ACT(*Case(kind, torch.float32).arguments(activation))
    assert actual.dtype is torch.float32
    # Sums of at most 36 products, each rounded at 6e-8, and an activation that fused kernels
    # approximate to a few units in the last place: 1e-5 leaves a factor of ten.
    assert relative_l2(actual, Case(kind).plain(activation)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_pytorch_gives(dtype: torch.dtype) -> None:
    case = Case("residual", dtype)
    # Bit for bit: the same operators on the same numbers.
    assert torch.equal(CONV_ACT(*case.arguments("silu")), case.plain("silu"))


class Recorder:
    """Stands in for the oneDNN kernel and counts its calls."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.calls: list[str] = []

    def default(self, *args: Any) -> Any:
        self.calls.append(args[7])
        return self.kernel.default(*args)

    def binary(self, *args: Any) -> Any:
        self.calls.append(f"{args[8]} {args[10]}")
        return self.kernel.binary(*args)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    if conv_act._ONEDNN is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    recorder = Recorder(conv_act._ONEDNN)
    monkeypatch.setattr(conv_act, "_ONEDNN", recorder)
    return recorder


@pytest.mark.parametrize(
    ("activation", "kind", "kernel"),
    [
        ("relu", "conv1d", "relu"),
        ("relu", "conv2d", "relu"),
        ("relu", "conv3d", "relu"),
        ("relu", "unbatched", "relu"),
        ("hardtanh", "conv2d", "hardtanh"),
        ("leaky_relu", "conv2d", "leaky_relu"),
        ("sigmoid", "conv2d", "sigmoid"),
        ("tanh", "conv2d", "tanh"),
        ("silu", "conv2d", "swish"),
        ("hardswish", "conv2d", "hardswish"),
        ("hardsigmoid", "conv2d", "hardsigmoid"),
        ("gelu", "conv2d", "gelu"),
        ("gelu_tanh", "conv2d", "gelu"),
        ("relu", "residual", "add relu"),
        ("relu", "residual3d", "add relu"),
    ],
)
def test_float32_runs_as_one_onednn_kernel(
    recorder: Recorder, activation: str, kind: str, kernel: str
) -> None:
    CONV_ACT(*Case(kind, torch.float32).arguments(activation))
    assert recorder.calls == [kernel]


@pytest.mark.parametrize(
    ("activation", "kind", "dtype"),
    [
        ("relu", "conv2d", torch.float64),
        ("relu", "conv2d", torch.bfloat16),
        ("relu", "transposed", torch.float32),
        ("silu", "residual", torch.float32),
        ("mish", "conv2d", torch.float32),
        ("prelu", "conv2d", torch.float32),
    ],
)
def test_the_rest_runs_as_plain_operators(
    recorder: Recorder, activation: str, kind: str, dtype: torch.dtype
) -> None:
    CONV_ACT(*Case(kind, dtype).arguments(activation))
    assert recorder.calls == []


def test_a_residual_of_another_shape_never_reaches_the_fused_kernel(recorder: Recorder) -> None:
    case = Case("residual", torch.float32)
    assert case.residual is not None
    case.residual = case.residual[:1, :, :1, :1]
    actual = CONV_ACT(*case.arguments("relu"))
    assert recorder.calls == []
    assert torch.equal(actual, case.plain("relu"))


def test_an_empty_batch_never_reaches_the_fused_kernel(recorder: Recorder) -> None:
    case = Case("conv2d", torch.float32)
    case.x = case.x[:0]
    assert CONV_ACT(*case.arguments("relu")).shape == (0, *case.plain("relu").shape[1:])
    assert recorder.calls == []


def test_onednn_can_be_switched_off(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    CONV_ACT(*Case("conv2d", torch.float32).arguments("relu"))
    assert recorder.calls == []


def test_a_convolution_that_pytorch_gives_to_another_kernel_stays_there(
    recorder: Recorder,
) -> None:
    case = Case("conv2d", torch.float32)
    # One small 3x3 convolution: PyTorch multiplies matrices, whatever the number of threads.
    case.x = case.x[:1, :2]
    settings = ([1, 1], [1, 0], [1, 1], False, [0, 0], 1, "relu", [])
    actual = CONV_ACT(case.x, case.weight, case.bias, None, None, *settings)
    assert recorder.calls == []
    expected = F.relu(F.conv2d(case.x, case.weight, case.bias, padding=(1, 0)))
    # Bit for bit: the same operators on the same numbers.
    assert torch.equal(actual, expected)


def test_it_works_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_act, "_ONEDNN", None)
    case = Case("residual", torch.float32)
    # Bit for bit: the same operators on the same numbers.
    assert torch.equal(CONV_ACT(*case.arguments("relu")), case.plain("relu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("activation", "kind"),
    [("relu", "residual"), ("prelu", "conv1d"), ("silu", "conv2d"), ("elu", "transposed")],
)
def test_it_keeps_pytorchs_rules_for_operators(
    activation: str, kind: str, dtype: torch.dtype
) -> None:
    torch.library.opcheck(CONV_ACT, Case(kind, dtype).arguments(activation))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_fake_result_has_the_real_ones_strides(transposed: bool) -> None:
    case = Case("transposed" if transposed else "residual", torch.float32)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(CONV_ACT, case.arguments("relu"), test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own deep copies
def test_a_graph_that_holds_it_can_be_exported_again_with_dynamic_shapes() -> None:
    case = Case("residual")
    module = EveryActivation(case, ["relu", "prelu"])
    assert case.residual is not None
    batch, height = torch.export.Dim("batch", min=2), torch.export.Dim("height", min=4)
    # The residual's height is the convolution's: (height - 1) // 2 + 1.
    dynamic = ({0: batch, 2: 2 * height}, {0: batch, 2: height})
    x = torch.randn(3, 4, 10, 8, dtype=torch.float64)
    residual = torch.randn(3, 6, 5, 6, dtype=torch.float64)
    first = torch.export.export(module, (x, residual), dynamic_shapes=dynamic, strict=False)
    graph_module = first.run_decompositions({}).module(check_guards=False)
    again = torch.export.export(
        graph_module, (x, residual), dynamic_shapes=dynamic, strict=False
    ).run_decompositions({})
    calls = [node.target for node in again.graph.nodes if node.op == "call_function"]
    assert calls.count(CONV_ACT) == 2
    assert torch.ops.aten.convolution.default not in calls
    case.x = torch.randn(5, 4, 12, 8, dtype=torch.float64)
    case.residual = torch.randn(5, 6, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        outputs = again.module()(case.x, case.residual)
    for name, output in zip(module.activations, outputs, strict=True):
        # The same operators in float64.
        assert relative_l2(output, case.plain(name)) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_its_flops_are_those_of_its_convolution(kind: str) -> None:
    case = Case(kind, torch.float32)
    with FlopCounterMode(display=False) as plain:
        case.convolution()
    with FlopCounterMode(display=False) as fused:
        CONV_ACT(*case.arguments("relu"))
    assert fused.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_gives_the_same_for_every_activation(kind: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    case = Case(kind, torch.float32)
    inputs = [each for each in (case.x, case.residual) if each is not None]
    program = exported(EveryActivation(case), *inputs)
    ensure_bias(program.model)
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    session = runtime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]
    outputs = session.run(None, {n: each.numpy() for n, each in zip(names, inputs, strict=True)})
    reference = Case(kind)
    for activation, output in zip(ACTIVATIONS, outputs, strict=True):
        expected = reference.plain(activation)
        assert tuple(output.shape) == tuple(expected.shape), activation
        # float32 sums of at most 36 products; ONNX Runtime approximates exp, tanh and erf to
        # about 1e-6.
        assert relative_l2(torch.from_numpy(output), expected) <= 1e-5, activation


def test_onnx_gets_the_operators_that_engines_fuse() -> None:
    case = Case("residual", torch.float32)
    assert case.residual is not None
    activations = [name for name in ACTIVATIONS if name != "softplus"]
    program = exported(EveryActivation(case, activations), case.x, case.residual)
    # One convolution, because torch.onnx computes equal things once; SiLU shares its Sigmoid.
    assert Counter(node.op_type for node in program.model.graph) == {
        "Conv": 1,
        "Add": 1,
        "Relu": 1,
        "Clip": 1,
        "LeakyRelu": 1,
        "PRelu": 1,
        "Elu": 1,
        "Sigmoid": 1,
        "Tanh": 1,
        "Softsign": 1,
        "Mul": 1,
        "HardSwish": 1,
        "HardSigmoid": 1,
        "Gelu": 2,
        "Mish": 1,
    }


def test_a_plain_softplus_is_one_onnx_operator() -> None:
    class Softplus(nn.Module):
        def __init__(self, case: Case) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(case.weight), nn.Parameter(case.bias)
            self.settings = case.settings("softplus", [1.0, 20.0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return CONV_ACT(x, self.weight, self.bias, None, None, *self.settings)

    case = Case("conv2d", torch.float32)
    program = exported(Softplus(case), case.x)
    assert [node.op_type for node in program.model.graph] == ["Conv", "Softplus"]


def test_half_precision_makes_a_valid_onnx_file() -> None:
    case = Case("conv2d", torch.float16)
    program = exported(EveryActivation(case), case.x)
    onnx.checker.check_model(program.model_proto, full_check=True)


class Twice(EveryActivation):
    """The operator on an input and on another one."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [*super().forward(x), *super().forward(x * x)]


def test_zero_biases_that_the_exporter_strips_come_back() -> None:
    case = Case("conv2d", torch.float32)
    case.bias = torch.zeros(6)
    program = exported(Twice(case, ["relu"]), case.x)
    assert [_bias(node) for node in _convolutions(program.model)] == [None, None]
    ensure_bias(program.model)
    first, second = [_bias(node) for node in _convolutions(program.model)]
    assert first is second
    assert np.array_equal(first.const_value.numpy(), np.zeros(6, np.float32))
    onnx.checker.check_model(program.model_proto, full_check=True)


def test_ensure_bias_counts_the_channels_of_a_grouped_transposed_convolution() -> None:
    model = _model("ConvTranspose", (4, 3, 2, 2), [onnx_ir.AttrInt64("group", 2)])
    ensure_bias(model)
    (node,) = _convolutions(model)
    assert _bias(node).const_value.shape == (6,)
    onnx.checker.check_model(onnx_ir.serde.serialize_model(model), full_check=True)


def test_ensure_bias_keeps_a_bias_and_a_name_that_are_there() -> None:
    model = _model("Conv", (6, 4, 2, 2), [])
    taken = onnx_ir.tensor(np.full(6, 7.0, np.float32), name="zero_bias_6_float")
    model.graph.register_initializer(
        onnx_ir.Value(
            name="zero_bias_6_float",
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
            shape=onnx_ir.Shape([6]),
            const_value=taken,
        )
    )
    ensure_bias(model)
    (node,) = _convolutions(model)
    first = _bias(node)
    assert first.name == "zero_bias_6_float_"
    ensure_bias(model)
    assert _bias(node) is first


def test_ensure_bias_leaves_a_weight_of_unknown_shape_alone() -> None:
    model = _model("Conv", ("out", 4, 2, 2), [])
    ensure_bias(model)
    (node,) = _convolutions(model)
    assert _bias(node) is None


def _model(op_type: str, weight: tuple[int | str, ...], attributes: list[Any]) -> onnx_ir.Model:
    """A model of one convolution without a bias, its weight an input of that shape."""
    float32 = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    inputs = [
        onnx_ir.Value(name="x", type=float32, shape=onnx_ir.Shape([1, 4, 5, 5])),
        onnx_ir.Value(name="w", type=float32, shape=onnx_ir.Shape(weight)),
    ]
    y = onnx_ir.Value(name="y", type=float32, shape=onnx_ir.Shape([1, 6, None, None]))
    node = onnx_ir.Node("", op_type, inputs, attributes, outputs=[y])
    graph = onnx_ir.Graph(
        inputs, node.outputs, nodes=[node], opset_imports={"": 20}, name="one_convolution"
    )
    return onnx_ir.Model(graph, ir_version=10)


def _convolutions(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    return [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose")]


def _bias(node: onnx_ir.Node) -> Any:
    return node.inputs[2] if len(node.inputs) > 2 else None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["conv2d", "conv3d", "residual", "residual3d", "unbatched"])
def test_cudnn_gives_the_same_on_memory_full_of_nans(kind: str) -> None:
    case, device = Case(kind, torch.float32), torch.device("cuda")
    on_device = [
        each.to(device) if isinstance(each, torch.Tensor) else each
        for each in case.arguments("relu")
    ]
    expected = Case(kind).plain("relu")
    # The allocator hands the freed block back: a kernel that reads its own result shows NaNs.
    torch.full_like(expected, float("nan"), dtype=torch.float32, device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = CONV_ACT(*on_device).cpu()
    # float32 sums of at most 36 products, as on the CPU.
    assert relative_l2(actual, expected) <= 1e-5
