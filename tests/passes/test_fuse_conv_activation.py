from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optfuse.activations import ACTIVATIONS
from optfuse.capture import capture
from optfuse.conv_act import CONV_ACT
from optfuse.stages import LoadedModel, Program
from tests.harness import (
    assert_same_function,
    assert_settled,
    captured,
    counts,
    optimized,
    reasons,
    scramble,
    step,
)

PASS = "fuse_conv_activation"

SPELLINGS: dict[str, tuple[str, nn.Module | Callable[[torch.Tensor], torch.Tensor]]] = {
    "ReLU": ("relu", nn.ReLU()),
    "inplace ReLU": ("relu", nn.ReLU(inplace=True)),
    "clamp(min=0)": ("relu", lambda y: y.clamp(min=0)),
    "clamp_min(0)": ("relu", lambda y: torch.clamp_min(y, 0.0)),
    "ReLU6": ("hardtanh", nn.ReLU6()),
    "relu6": ("hardtanh", F.relu6),
    "Hardtanh": ("hardtanh", nn.Hardtanh(-0.5, 2.0)),
    "clamp": ("hardtanh", lambda y: y.clamp(-1, 2)),
    "clamp(0, 6)": ("hardtanh", lambda y: y.clamp(0, 6)),
    "LeakyReLU": ("leaky_relu", nn.LeakyReLU(0.2)),
    "default LeakyReLU": ("leaky_relu", nn.LeakyReLU()),
    "PReLU": ("prelu", nn.PReLU(6)),
    "PReLU of one slope": ("prelu", nn.PReLU()),
    "ELU": ("elu", nn.ELU(1.5)),
    "Sigmoid": ("sigmoid", nn.Sigmoid()),
    "Tanh": ("tanh", nn.Tanh()),
    "Softplus": ("softplus", nn.Softplus(2.0, 3.0)),
    "default Softplus": ("softplus", nn.Softplus()),
    "Softsign": ("softsign", nn.Softsign()),
    "1 + abs": ("softsign", lambda y: y / (1 + y.abs())),
    "SiLU": ("silu", nn.SiLU()),
    "y * sigmoid(y)": ("silu", lambda y: y * torch.sigmoid(y)),
    "sigmoid(y) * y": ("silu", lambda y: torch.sigmoid(y) * y),
    "Hardswish": ("hardswish", nn.Hardswish()),
    "Hardsigmoid": ("hardsigmoid", nn.Hardsigmoid()),
    "GELU": ("gelu", nn.GELU()),
    "GELU by tanh": ("gelu_tanh", nn.GELU(approximate="tanh")),
    "Mish": ("mish", nn.Mish()),
}
"""How a user writes it -> (what the operator calls it, the thing itself)."""

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv2d same": lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
    "conv2d valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "conv3d": lambda: nn.Conv3d(4, 6, 3, padding=(2, 1, 0), bias=False),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, padding=1, bias=False),
    "transposed3d": lambda: nn.ConvTranspose3d(4, 6, 2, stride=(2, 1, 1), groups=2, bias=False),
}


class Model(nn.Module):
    """Two convolutions and a function of them, as a graph with an output that hides nothing."""

    def __init__(self, forward: Callable[..., Any], **convolution: Any) -> None:
        super().__init__()
        settings = {"padding": 1, **convolution}
        self.a = nn.Conv2d(4, 4, 3, **settings)
        self.b = nn.Conv2d(4, 4, 3, **settings)
        self.linear = nn.Linear(8, 8)
        self.prelu = nn.PReLU(6)
        self.function = forward

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def example(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


def program_of(
    forward: Callable[..., Any],
    *args: torch.Tensor,
    dtype: torch.dtype = torch.float64,
    **conv: Any,
) -> Program:
    model = scramble(Model(forward, **conv)).to(dtype)
    return captured(model, *(args or (example(2, 4, 6, 8, dtype=dtype),)))


def fused(before: Program, *, tolerance: float = 1e-13) -> Program:
    """The program after the pass; by default exact up to the order of float64 sums."""
    after = optimized(before, PASS)
    assert_same_function(before, after, tolerance=tolerance)
    assert_settled(after, PASS)
    return after


def refusals(before: Program) -> list[str]:
    """Why the pass left everything as it was."""
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    return reasons(after, PASS)


def calls(program: Program) -> list[Any]:
    return [node for node in program.graph_module.graph.nodes if node.target is CONV_ACT]


class Behind(nn.Module):
    """A layer, a residual where there is one, and an activation."""

    def __init__(self, layer: nn.Module, activation: Any) -> None:
        super().__init__()
        # A copy, since some activations have parameters that are scrambled.
        self.layer, self.activation = layer, copy.deepcopy(activation)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = self.layer(x)
        return self.activation(y if residual is None else y + residual)


def test_every_activation_is_spelt_here() -> None:
    assert {name for name, _ in SPELLINGS.values()} == set(ACTIVATIONS)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_activation_goes_into_the_convolution(spelling: str, residual: bool) -> None:
    name, activation = SPELLINGS[spelling]
    model = scramble(Behind(LAYERS["conv2d"](), activation)).double()
    more = [example(2, 6, 3, 6)] if residual else []
    after = fused(captured(model, example(2, 4, 5, 8), *more))
    assert counts(after) == {"conv_act": 1}
    assert calls(after)[0].args[11] == name


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("spelling", ["Hardtanh", "PReLU", "Softsign"])
def test_every_convolution_takes_it(spelling: str, layer: str) -> None:
    model = scramble(Behind(LAYERS[layer](), SPELLINGS[spelling][1])).double()
    spatial = next(int(digit) for digit in layer if digit.isdigit())
    before = captured(model, example(2, 4, *(7, 6, 5)[:spatial]))
    assert counts(fused(before)) == {"conv_act": 1}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_convolution_takes_a_residual(layer: str) -> None:
    model = scramble(Behind(LAYERS[layer](), nn.ReLU())).double()
    spatial = next(int(digit) for digit in layer if digit.isdigit())
    x = example(2, 4, *(7, 6, 5)[:spatial])
    before = captured(model, x, example(*model.layer(x).shape))
    assert counts(fused(before)) == {"conv_act": 1}


class Block(nn.Module):
    """ResNet's basic block behind batch norm folding, with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.projection = nn.Conv2d(4, 6, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(F.relu(self.first(x)))
        return F.relu(y + self.projection(x))


def test_a_resnet_block_becomes_three_convolutions_and_nothing_else() -> None:
    after = fused(captured(scramble(Block()).double(), example(2, 4, 6, 8)))
    assert counts(after) == {"conv_act": 2, "conv2d": 1}
    # The projection is the later one; the block's second convolution is its residual.
    assert calls(after)[1].args[1].target == "projection.weight"
    assert [site.note for site in step(after, PASS).sites] == [
        "relu into conv2d (first)",
        "relu and the sum with conv2d_1 (second) into conv2d_2 (projection)",
    ]


def test_a_block_without_biases_in_float32_is_fused_exactly() -> None:
    before = program_of(
        lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), dtype=torch.float32, bias=False
    )
    # Run in float64 on the same weights, the zero biases added: the same sums.
    after = fused(before, tolerance=1e-13)
    assert counts(after) == {"conv_act": 2}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.relu(m.a(x) + x),
        lambda m, x: F.relu(x + m.a(x)),
        lambda m, x: F.relu(m.a(x) + m.linear(x)),
    ],
    ids=["behind", "in front", "a linear layer"],
)
def test_the_residual_may_be_either_operand(forward: Callable[..., Any]) -> None:
    after = fused(program_of(forward))
    assert counts(after)["conv_act"] == 1
    assert set(counts(after)) <= {"conv_act", "linear"}


def test_of_two_convolutions_the_earlier_one_serves_where_the_later_one_cannot() -> None:
    def forward(m: Model, x: torch.Tensor) -> Any:
        a, b = m.a(x), m.b(x)
        return F.relu(a + b), b * 2

    after = fused(program_of(forward))
    assert counts(after) == {"conv_act": 1, "conv2d": 1, "mul": 1}
    assert calls(after)[0].args[1].target == "a.weight"
    assert reasons(after, PASS) == []


def test_a_missing_bias_becomes_zeros_in_the_models_dtype() -> None:
    after = optimized(
        program_of(lambda m, x: torch.tanh(m.a(x)), dtype=torch.float16, bias=False), PASS
    )
    bias = calls(after)[0].args[2]
    assert bias.target == "a_bias_zero"
    held = getattr(after.graph_module, "a_bias_zero")  # noqa: B009 as the graph reads it
    assert held.dtype is torch.float16
    assert torch.equal(held, torch.zeros(4, dtype=torch.float16))


def test_convolutions_that_share_a_weight_are_fused_each() -> None:
    after = fused(program_of(lambda m, x: F.relu(m.a(torch.tanh(m.a(x)))), bias=False))
    assert counts(after) == {"conv_act": 2}
    assert {node.args[1].target for node in calls(after)} == {"a.weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    before = program_of(lambda m, x: F.silu(m.a(x) + x), dtype=dtype)
    # Run in float64 on the same weights.
    after = fused(before, tolerance=1e-13)
    assert counts(after) == {"conv_act": 1}
    x = before.example_args[0]
    assert after.graph_module(x).dtype is dtype


def test_an_input_without_a_batch_works() -> None:
    before = program_of(lambda m, x: F.elu(m.a(x) + x), example(4, 6, 8))
    assert counts(fused(before)) == {"conv_act": 1}


def test_dynamic_shapes_stay_dynamic() -> None:
    model = scramble(Model(lambda m, x: F.relu(m.b(F.silu(m.a(x))) + x))).double()
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=4)
    x = example(2, 4, 6, 8)
    before = capture(LoadedModel("test", model, (x,), {}, (({0: batch, 2: height},),)))
    after = fused(before)
    assert counts(after) == {"conv_act": 2}
    shape = calls(after)[-1].meta["val"].shape
    assert not isinstance(shape[0], int)
    assert not isinstance(shape[2], int)
    larger = example(5, 4, 9, 8)
    with torch.no_grad():
        # float64, the same operators.
        torch.testing.assert_close(
            after.graph_module(larger), model(larger), rtol=1e-12, atol=1e-12
        )


def test_a_residual_that_broadcasts_over_a_dynamic_size_is_refused() -> None:
    model = scramble(Model(lambda m, x: F.relu(m.a(x) + x.sum(dim=2, keepdim=True)))).double()
    dynamic = (({2: torch.export.Dim("height", min=4)},),)
    before = capture(LoadedModel("test", model, (example(2, 4, 6, 8),), {}, dynamic))
    (reason,) = refusals(before)
    assert reason.startswith("sum_1 has the shape (2, 4, 1, 8), and the convolution's result has")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (
            lambda m, x: (lambda y: (F.relu(y), y * 2))(m.a(x)),
            "the result of conv2d (a) has 2 users",
        ),
        (
            lambda m, x: (lambda y: (F.relu(y), y))(m.a(x)),
            "the result of conv2d (a) is also an output of the model",
        ),
        (
            lambda m, x: (lambda y: (F.relu(y + x), y * 2))(m.a(x)),
            "the result of conv2d (a) has 2 users",
        ),
        (
            lambda m, x: (lambda s: (F.relu(s), s * 2))(m.a(x) + x),
            "the result of add has 2 users",
        ),
        (
            lambda m, x: (lambda s: (F.relu(s), s))(m.a(x) + x),
            "the result of add is also an output of the model",
        ),
        (
            lambda m, x: (lambda y: F.relu(y + y))(m.a(x)),
            "the convolution's result is added to itself",
        ),
        (
            lambda m, x: F.relu(torch.add(m.a(x), x, alpha=2)),
            "the sum has a factor: its alpha is 2",
        ),
        (
            lambda m, x: F.relu(m.a(x) + x[:, :, :1]),
            "slice_1 has the shape (2, 4, 1, 8), and the convolution's result has (2, 4, 6, 8)",
        ),
        (
            lambda m, x: F.relu(m.a(x) + x[0]),
            "select has the shape (4, 6, 8), and the convolution's result has (2, 4, 6, 8)",
        ),
        (
            lambda m, x: F.relu(m.a(x) + x.float()),
            "_to_copy is float32, and the convolution's result is float64",
        ),
        (
            lambda m, x: (lambda y, d: (y / (d + 1), d))(
                *(lambda y: (y, y.abs()))(m.a(x))
            ),
            "the result of abs_1 is also an output of the model",
        ),
    ],
)  # fmt: skip
def test_what_it_refuses_and_why(forward: Callable[..., Any], reason: str) -> None:
    assert refusals(program_of(forward)) == [reason]


def test_a_gate_that_something_else_sees_refuses_the_product() -> None:
    def forward(m: Model, x: torch.Tensor) -> Any:
        y = m.a(x)
        gate = torch.sigmoid(y)
        return y * gate, gate + 1

    assert refusals(program_of(forward)) == [
        "the result of conv2d (a) has 2 users",
        "the result of sigmoid has 2 users",
    ]


def test_padding_on_one_side_is_refused() -> None:
    before = program_of(lambda m, x: F.relu(F.conv2d(x, m.a.weight[:, :, :2], padding="same")))
    assert refusals(before) == ["its padding 'same' pads one side more than the other"]


def test_a_prelu_over_another_dimension_is_refused() -> None:
    before = program_of(lambda m, x: m.prelu(m.a(x)), example(4, 6, 8))
    assert refusals(before) == [
        "the PReLU runs over dimension 1, the channels of the convolution without a batch are in "
        "dimension 0"
    ]


def test_a_prelu_of_one_slope_needs_no_batch() -> None:
    model = scramble(Behind(nn.Conv2d(4, 6, 3), nn.PReLU())).double()
    assert counts(fused(captured(model, example(4, 6, 8)))) == {"conv_act": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) + x,
        lambda m, x: F.relu(m.linear(x)),
        lambda m, x: F.relu(m.linear(x) + x),
        lambda m, x: F.relu(x + x * x),
        lambda m, x: F.relu(m.a(x) + 3.0),
        lambda m, x: F.selu(m.a(x)),
        lambda m, x: torch.ops.aten.elu.default(m.a(x), 1.5, 2.0),
        lambda m, x: m.a(x).clamp(max=2),
        lambda m, x: m.a(x).clamp(min=1),
        lambda m, x: m.a(x).clamp(2, -1),
        lambda m, x: m.a(x) / (x.abs() + 1),
        lambda m, x: (lambda y: y / (y.abs() + 2))(m.a(x)),
        lambda m, x: (lambda y: y / torch.add(y.abs(), 1, alpha=2))(m.a(x)),
        lambda m, x: (lambda y: y / (y.exp() + 1))(m.a(x)),
        lambda m, x: m.a(x) * torch.sigmoid(x),
    ],
)
def test_what_is_none_of_its_business(forward: Callable[..., Any]) -> None:
    assert refusals(program_of(forward)) == []


def test_a_squeeze_and_excite_gate_is_a_sigmoid_of_its_own() -> None:
    def forward(m: Model, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(m.a(F.silu(m.b(x.mean((2, 3), keepdim=True)))))

    after = fused(program_of(forward))
    assert counts(after) == {"conv_act": 2, "mean": 1, "mul": 1}
