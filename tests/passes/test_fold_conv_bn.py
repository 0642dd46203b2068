"""fold_conv_bn: what it folds, that the function stays, what it refuses, and that it settles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optfuse.capture import capture
from optfuse.convolution import Convolution
from optfuse.graph import attribute, kind
from optfuse.optimize import optimize, select
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

# Folding float64 numbers in float64 moves an output by a few 1e-16 for each product and sum.
FLOAT64 = 1e-12
# The folded constants are rounded once to float32, each by at most 6e-8 of itself.
FLOAT32 = 1e-6
# Likewise in float16 and bfloat16, which keep 11 and 8 bits: at most 4.9e-4 and 3.9e-3.
HALF = 1e-3
BFLOAT16 = 4e-3

STATISTICS = "the batch norm uses the statistics of the batch it sees, not stored ones"


class Model(nn.Module):
    """`forward` as a function of the model and its inputs, over modules and tensors by name.

    A parameter is registered as one, any other tensor as a buffer.
    """

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self._forward(self, *inputs)


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Seeded random numbers."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def double(forward: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> nn.Module:
    """A float64 `Model` in eval mode with statistics that are not 0 and 1."""
    return scramble(Model(forward, **parts).double())


def conv(in_channels: int = 4, out_channels: int = 6, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, **more)


def image(*, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(batch, 4, 7, 6, seed=11, dtype=dtype)


def folded(program: Program, expected: dict[str, int], *, tolerance: float = FLOAT64) -> Program:
    """The program after the pass: these operators, no refusal, the same function, settled."""
    after = optimized(program, "fold_conv_bn")
    assert counts(after) == expected
    assert reasons(after, "fold_conv_bn") == []
    assert_same_function(program, after, tolerance=tolerance)
    assert_settled(after, "fold_conv_bn")
    return after


def refused(program: Program, reason: str) -> None:
    """The pass leaves the program as it is, for this one reason."""
    after = optimized(program, "fold_conv_bn")
    assert counts(after) == counts(program)
    assert reasons(after, "fold_conv_bn") == [reason]


def ignored(program: Program) -> None:
    """The pass leaves the program as it is and has nothing to say about it."""
    after = optimized(program, "fold_conv_bn")
    assert counts(after) == counts(program)
    assert reasons(after, "fold_conv_bn") == []


# What it folds ------------------------------------------------------------------------------------

LAYERS = {
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda bias: nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d, (2, 4, 7, 6)),
    "conv3d": (lambda bias: nn.Conv3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (2, 4, 3, 4, 5)),
    "conv_transpose1d": (
        lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias),
        nn.BatchNorm1d,
        (2, 4, 5),
    ),
    "conv_transpose2d": (
        lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=bias),
        nn.BatchNorm2d,
        (2, 4, 3, 4),
    ),
    "conv_transpose3d": (
        lambda bias: nn.ConvTranspose3d(4, 6, 2, bias=bias),
        nn.BatchNorm3d,
        (2, 4, 2, 3, 2),
    ),
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (5, 4)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("layer", LAYERS)
def test_folds_batch_norm_into_every_layer(layer: str, bias: bool, affine: bool) -> None:
    make, norm, shape = LAYERS[layer]
    model = scramble(nn.Sequential(make(bias), norm(6, affine=affine, eps=0.01)).double())
    before = captured(model, normal(*shape))
    assert counts(before) == {layer: 1, "batch_norm": 1}
    after = folded(before, {layer: 1})
    (site,) = step(after, "fold_conv_bn").sites
    assert (site.site, site.note) == (f"{layer} (0)", "batch_norm folded in")


GROUPED = {
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "depthwise_multiplied": lambda: nn.Conv2d(4, 12, 3, groups=4, bias=False),
    "grouped_transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "depthwise_transposed": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False),
    "depthwise_transposed_multiplied": lambda: nn.ConvTranspose2d(4, 12, 3, groups=4),
    "grouped_transposed_narrowing": lambda: nn.ConvTranspose2d(4, 2, 3, groups=2),
    "strided_dilated": lambda: nn.Conv2d(4, 6, 2, stride=2, dilation=2, padding=(1, 2)),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same_even_kernel": lambda: nn.Conv2d(4, 6, (4, 2), padding="same", bias=False),
    "valid": lambda: nn.Conv2d(4, 6, (4, 2), padding="valid"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("setting", GROUPED)
def test_folds_whatever_the_convolutions_settings(setting: str) -> None:
    layer = GROUPED[setting]()
    before = captured(
        scramble(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)).double()), image()
    )
    expected = {name: count for name, count in counts(before).items() if name != "batch_norm"}
    assert sum(count for name, count in expected.items() if name.startswith("conv")) == 1
    folded(before, expected)


def test_folds_sync_batch_norm() -> None:
    model = scramble(nn.Sequential(conv(), nn.SyncBatchNorm(6)).double())
    folded(captured(model, image()), {"conv2d": 1})


def test_folds_batch_norm_with_dynamic_batch_size() -> None:
    model = scramble(nn.Sequential(conv(), nn.BatchNorm2d(6)).double())
    before = capture(LoadedModel("test", model, (image(),), {}, ({0: torch.export.Dim("batch")},)))
    after = folded(before, {"conv2d": 1})
    wider = image(batch=5)
    # The batch size must not have been fixed by looking at it.
    assert torch.allclose(after.graph_module(wider), model(wider), rtol=0, atol=1e-12)


def frozen_batch_norm(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As torchvision's FrozenBatchNorm2d: statistics as buffers, worked out in `forward`."""
    scale = model.gamma * (model.var + 1e-3).rsqrt()
    return model.conv(x) * scale.reshape(1, -1, 1, 1) + (model.beta - model.mean * scale).reshape(
        1, -1, 1, 1
    )


CHANNELS = (6, 1, 1)
ARITHMETIC: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "layer_scale": lambda m, y: y * m.c,
    "constant_first": lambda m, y: m.c * y,
    "batch_one": lambda m, y: y * m.c.reshape(CHANNELS),
    "chain": lambda m, y: (y * m.c + m.d) / m.c - m.d,
    "add": lambda m, y: y + m.c,
    "add_constant_first": lambda m, y: m.c + y,
    "add_alpha": lambda m, y: torch.add(y, m.c, alpha=3),
    "add_constant_first_alpha": lambda m, y: torch.add(m.c, y, alpha=3),
    "sub": lambda m, y: y - m.c,
    "sub_constant_first": lambda m, y: m.c - y,
    "sub_alpha": lambda m, y: torch.sub(y, m.c, alpha=3),
    "sub_constant_first_alpha": lambda m, y: torch.sub(m.c, y, alpha=3),
    "rsub": lambda m, y: torch.rsub(y, m.c, alpha=3),
    "rsub_constant_first": lambda m, y: torch.rsub(m.c, y, alpha=3),
    "div": lambda m, y: y / m.c,
    "number_mul": lambda m, y: y * 0.37,
    "number_add": lambda m, y: 1.7 + y,
    "number_sub": lambda m, y: y - 1.7,
    "number_rsub": lambda m, y: 1.7 - y,
    "number_div": lambda m, y: y / 2.3,
    "integer_number": lambda m, y: 3 * y + 2,
    "negated_number": lambda m, y: y * -1,
    "integer_tensor": lambda m, y: y * m.whole + m.whole,
    "scalar_tensor": lambda m, y: y * m.single + m.single,
    "one_number_with_dimensions": lambda m, y: y * m.single.reshape(1, 1, 1),
}


@pytest.mark.parametrize("spelling", ARITHMETIC)
def test_folds_per_channel_arithmetic(spelling: str) -> None:
    compute = ARITHMETIC[spelling]
    model = double(
        lambda m, x: compute(m, m.conv(x)),
        conv=conv(),
        c=nn.Parameter(torch.ones(CHANNELS)),
        d=nn.Parameter(torch.ones(CHANNELS)),
        single=torch.tensor(1.3),
    )
    model.register_buffer("whole", torch.tensor([2, 3, -1, 5, 7, -4]).reshape(CHANNELS))
    before = captured(model, image())
    # `reshape` of a constant is fold_constants' business.
    after = optimized(before, "fold_constants,fold_conv_bn")
    assert counts(after) == {"conv2d": 1}
    assert reasons(after, "fold_conv_bn") == []
    assert_same_function(before, after, tolerance=FLOAT64)
    assert_settled(after, "fold_constants,fold_conv_bn")


def test_folds_the_single_operator_spellings_without_other_passes() -> None:
    model = double(
        lambda m, x: 2.0 - (m.conv(x) * m.scale + m.shift),
        conv=conv(bias=False),
        scale=nn.Parameter(torch.ones(1, 6, 1, 1)),
        shift=nn.Parameter(torch.ones(1, 6, 1, 1)),
    )
    before = captured(model, image())
    assert counts(before) == {"add": 1, "conv2d": 1, "mul": 1, "rsub": 1}
    after = folded(before, {"conv2d": 1})
    assert [site.note for site in step(after, "fold_conv_bn").sites] == [
        "mul folded in",
        "add folded in",
        "rsub folded in",
    ]


def test_folds_frozen_batch_norm() -> None:
    model = double(
        frozen_batch_norm,
        conv=conv(bias=False),
        gamma=normal(6, seed=1),
        beta=normal(6, seed=2),
        mean=normal(6, seed=3),
        var=normal(6, seed=4).abs() + 0.2,
    )
    before = captured(model, image())
    after = optimized(before, "fold_constants,fold_conv_bn")
    assert counts(after) == {"conv2d": 1}
    assert_same_function(before, after, tolerance=FLOAT64)
    assert_settled(after, "fold_constants,fold_conv_bn")


def test_folds_layer_scale_behind_a_linear_layer_of_any_rank() -> None:
    for shape in ((4,), (3, 4), (2, 3, 5, 4)):
        model = double(
            lambda m, x: m.linear(x) * m.gamma,
            linear=nn.Linear(4, 6),
            gamma=nn.Parameter(torch.ones(6)),
        )
        folded(captured(model, normal(*shape)), {"linear": 1})


def test_folds_into_an_unbatched_convolution() -> None:
    model = double(
        lambda m, x: m.conv(x) * m.gamma - m.gamma,
        conv=conv(),
        gamma=nn.Parameter(torch.ones(CHANNELS)),
    )
    folded(captured(model, image()[0]), {"conv2d": 1})


def test_folds_into_every_branch_of_a_concat() -> None:
    model = double(
        lambda m, x: m.norm(torch.cat([m.wide(x), m.grouped(x), m.up(x)], m.dim)),
        wide=conv(4, 5, padding=1),
        grouped=conv(4, 2, 1, groups=2, bias=False),
        up=nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1),
        norm=nn.BatchNorm2d(13),
    )
    for dim in (1, -3):
        model.dim = dim
        before = captured(model, image())
        after = folded(before, {"conv2d": 2, "conv_transpose2d": 1, "cat": 1})
        (site,) = step(after, "fold_conv_bn").sites
        assert site.note == "batch_norm folded into the 3 branches of cat"


def test_folds_into_a_concat_of_linear_layers() -> None:
    model = double(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], -1)),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 2, bias=False),
        norm=nn.BatchNorm1d(5),
    )
    folded(captured(model, normal(7, 4)), {"linear": 2, "cat": 1})


def test_folds_a_batch_norm_kept_in_float32_behind_a_float16_convolution() -> None:
    # Mixed precision keeps statistics in float32; batch norm gives its input's dtype all the same.
    model = Model(
        lambda m, x: F.batch_norm(m.conv(x), m.mean, m.var, m.gamma, m.beta),
        conv=scramble(conv()).half(),
        mean=normal(6, seed=1, dtype=torch.float32),
        var=normal(6, seed=2, dtype=torch.float32).abs() + 0.2,
        gamma=normal(6, seed=4, dtype=torch.float32),
        beta=normal(6, seed=5, dtype=torch.float32),
    ).eval()
    before = captured(model, image(dtype=torch.float16))
    after = folded(before, {"conv2d": 1}, tolerance=HALF)
    assert constant_dtypes(after) == {torch.float16}


def constant_dtypes(program: Program) -> set[torch.dtype]:
    return {
        attribute(program.graph_module, node.target).dtype
        for node in program.graph_module.graph.nodes
        if node.op == "get_attr"
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, FLOAT64),
        (torch.float32, FLOAT32),
        (torch.float16, HALF),
        (torch.bfloat16, BFLOAT16),
    ],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_constants_are_rounded_once_to_the_models_own_dtype(
    dtype: torch.dtype, tolerance: float
) -> None:
    model = scramble(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.BatchNorm2d(6)).to(dtype))
    before = captured(model, image(dtype=dtype))
    after = folded(before, {"conv2d": 1}, tolerance=tolerance)
    assert constant_dtypes(after) == {dtype}
    # Rounding once: the weight is the one that float64 arithmetic gives, to the last bit.
    exact = model[0].weight.double()
    for norm in model[1:]:
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        exact = exact * scale.reshape(-1, 1, 1, 1)
    weight = next(n for n in after.graph_module.graph.nodes if kind(n) == "conv2d").args[1]
    assert weight.target == "0_weight_folded_1"
    assert torch.equal(attribute(after.graph_module, weight.target), exact.to(dtype))


# Holes that others shipped ------------------------------------------------------------------------


def test_hole_shared_convolution_folded_on_one_path_only() -> None:
    model = double(
        lambda m, x: m.first(m.conv(x)) + m.second(m.conv(x + 1.0)),
        conv=conv(),
        first=nn.BatchNorm2d(6),
        second=nn.BatchNorm2d(6),
    )
    with torch.no_grad():
        model.second.weight.mul_(-3.0).add_(0.2)
    folded(captured(model, image()), {"conv2d": 2, "add": 2})


def test_hole_shared_convolution_with_one_path_unnormalised() -> None:
    model = double(
        lambda m, x: m.norm(m.conv(x)) + torch.relu(m.conv(x * 2.0)),
        conv=conv(),
        norm=nn.BatchNorm2d(6),
    )
    folded(captured(model, image()), {"conv2d": 2, "add": 1, "mul": 1, "relu": 1})


def test_hole_shared_weights_overwritten() -> None:
    model = double(
        lambda m, x: (m.first(m.conv(x)), m.second(m.conv(x + 1.0)), m.conv(x - 1.0), m.tied(x)),
        conv=conv(),
        tied=conv(),
        first=nn.BatchNorm2d(6),
        second=nn.BatchNorm2d(6),
    )
    model.tied.weight = model.conv.weight
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(image())
    before = captured(model, image())
    folded(before, {"conv2d": 4, "add": 1, "sub": 1})
    now = model.state_dict()
    assert list(now) == list(kept)
    # Bit for bit: the caller's model is not ours to write.
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert all(torch.equal(a, b) for a, b in zip(model(image()), expected, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(before.graph_module(image()), expected, strict=True)
    )


def test_hole_wrong_axis_for_grouped_transposed_convolution() -> None:
    # Input channel 0 belongs to group 0 and may only be scaled by that group's outputs.
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    model = scramble(nn.Sequential(layer, nn.BatchNorm2d(6, eps=0.0)).double())
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 13.0).reshape(4, 3, 1, 1))
        model[1].running_var.fill_(1.0)
        model[1].weight.copy_(torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5]))
    after = folded(captured(model, image()), {"conv_transpose2d": 1})
    weight = next(n for n in after.graph_module.graph.nodes if kind(n) == "conv_transpose2d").args[
        1
    ]
    found = attribute(after.graph_module, weight.target).reshape(4, 3)
    written_out = [
        [1.0, 20.0, 300.0],
        [4.0, 50.0, 600.0],
        [7e3, 8e4, 9e5],
        [1e4, 1.1e5, 1.2e6],
    ]
    # Every product is a whole number, exact in float64.
    assert torch.equal(found, torch.tensor(written_out, dtype=torch.float64))


def test_hole_wrong_shape_for_depthwise_transposed_convolution() -> None:
    model = scramble(
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)).double()
    )
    after = folded(captured(model, image()), {"conv_transpose2d": 1})
    node = next(n for n in after.graph_module.graph.nodes if kind(n) == "conv_transpose2d")
    assert attribute(after.graph_module, node.args[1].target).shape == (4, 1, 3, 3)


@pytest.mark.parametrize("padding", [0, 1])
def test_hole_batch_norm_before_a_zero_padded_convolution(padding: int) -> None:
    # In the padding the shift does not hold; and without padding it still is not this pass's.
    model = scramble(nn.Sequential(nn.BatchNorm2d(4), conv(padding=padding)).double())
    ignored(captured(model, image()))


def test_hole_second_batch_norm_deleted_unfolded() -> None:
    model = scramble(
        nn.Sequential(conv(), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)).double()
    )
    after = folded(captured(model, image()), {"conv2d": 1})
    assert step(after, "fold_conv_bn").matched == 2


def test_hole_float16_overflow_with_a_tiny_variance() -> None:
    model = scramble(nn.Sequential(conv(), nn.BatchNorm2d(6, eps=1e-12)).half())
    with torch.no_grad():
        model[0].weight.fill_(30.0)
        model[1].weight.fill_(1.0)
        model[1].running_var[2] = 6e-8  # the smallest float16: 30 / sqrt(6e-8) is over 65504
    refused(
        captured(model, image(dtype=torch.float16)), "the folded weight is not finite in float16"
    )


def test_hole_float16_overflow_of_the_bias() -> None:
    model = Model(lambda m, x: m.conv(x) * 300.0, conv=scramble(conv())).half()
    with torch.no_grad():
        model.conv.bias.fill_(500.0)
    refused(captured(model, image(dtype=torch.float16)), "the folded bias is not finite in float16")


def test_hole_beta_of_a_matrix_product_ignored() -> None:
    # addmm's bias counts beta times; it is no linear layer, and nothing is folded into it.
    model = double(
        lambda m, x: m.norm(torch.addmm(m.bias, x, m.weight, beta=0.5, alpha=2.0)),
        bias=nn.Parameter(torch.ones(6)),
        weight=nn.Parameter(torch.ones(4, 6)),
        norm=nn.BatchNorm1d(6),
    )
    ignored(captured(model, normal(5, 4)))


# What it refuses ----------------------------------------------------------------------------------


def test_refuses_batch_norm_without_statistics() -> None:
    model = scramble(nn.Sequential(conv(), nn.BatchNorm2d(6, track_running_stats=False)).double())
    refused(captured(model, image()), STATISTICS)


class StaysInTraining(nn.Sequential):
    """A model whose second layer never leaves training mode."""

    def train(self, mode: bool = True) -> StaysInTraining:
        super().train(mode)
        self[1].train()
        return self


def test_refuses_batch_norm_in_training_mode() -> None:
    model = scramble(StaysInTraining(conv(), nn.BatchNorm2d(6)).double())
    assert model[1].training
    refused(captured(model, image()), STATISTICS)


def test_ignores_batch_norm_in_training_mode_behind_no_convolution() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False))
    ignored(captured(scramble(model.double()), image()))


def test_refuses_a_batch_norm_over_another_dimension_of_a_linear_layer() -> None:
    # Six tokens and six features: shapes alone do not tell.
    model = scramble(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double())
    refused(
        captured(model, normal(2, 6, 4)),
        "the batch norm runs over dimension 1, the layer's channels are in dimension 2",
    )


def test_refuses_a_batch_norm_over_a_line_of_an_unbatched_convolution() -> None:
    model = scramble(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)).double())
    refused(
        captured(model, normal(4, 8)),
        "the batch norm runs over dimension 1, the layer's channels are in dimension 0",
    )


def test_refuses_a_concat_whose_branch_has_its_channels_elsewhere() -> None:
    model = double(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Linear(4, 5),
        b=nn.Linear(4, 5),
        norm=nn.BatchNorm1d(6),
    )
    refused(
        captured(model, normal(2, 3, 4)),
        "the batch norm runs over dimension 1, the layer's channels are in dimension 2",
    )


@pytest.mark.parametrize("follow", ["norm", "mul"])
def test_refuses_a_result_that_is_also_an_output(follow: str) -> None:
    model = double(
        lambda m, x: (lambda y: (y, m.norm(y) if follow == "norm" else y * 2.0))(m.conv(x)),
        conv=conv(),
        norm=nn.BatchNorm2d(6),
    )
    refused(captured(model, image()), "the result of conv2d (conv) is also an output of the model")


@pytest.mark.parametrize("follow", ["norm", "mul"])
def test_refuses_a_result_that_has_another_user(follow: str) -> None:
    model = double(
        lambda m, x: (
            lambda y: (m.norm(y) if follow == "norm" else y * 2.0) + torch.relu(y) + torch.tanh(y)
        )(m.conv(x)),
        conv=conv(),
        norm=nn.BatchNorm2d(6),
    )
    refused(captured(model, image()), "the result of conv2d (conv) has 3 users")


def branches(forward: Callable[..., Any]) -> Program:
    """A model of two convolutions a and b, a batch norm over the ten channels of both."""
    return captured(double(forward, a=conv(4, 6), b=conv(4, 4), norm=nn.BatchNorm2d(10)), image())


def test_refuses_a_concat_with_a_branch_that_is_no_convolution() -> None:
    refused(
        branches(lambda m, x: m.norm(torch.cat([m.a(x), torch.relu(m.b(x))], 1))),
        "a branch of the concat in front of it, relu, is no convolution",
    )


def test_refuses_a_concat_with_an_empty_branch() -> None:
    # torch.cat skips a one-dimensional tensor without numbers.
    refused(
        branches(lambda m, x: m.norm(torch.cat([m.a(x), x.new_empty(0), m.b(x)], 1))),
        "a branch of the concat in front of it, new_empty, is no convolution",
    )


def test_refuses_a_concat_with_a_branch_that_has_another_user() -> None:
    refused(
        branches(
            lambda m, x: (lambda a, b: (m.norm(torch.cat([a, b], 1)), torch.relu(b)))(
                m.a(x), m.b(x)
            )
        ),
        "the result of conv2d_1 (b) has 2 users",
    )


def test_refuses_a_concat_with_a_branch_that_is_an_output() -> None:
    refused(
        branches(lambda m, x: (lambda a, b: (m.norm(torch.cat([a, b], 1)), a))(m.a(x), m.b(x))),
        "the result of conv2d (a) is also an output of the model",
    )


def test_refuses_a_concat_that_has_another_user() -> None:
    refused(
        branches(lambda m, x: (lambda y: m.norm(y) + y)(torch.cat([m.a(x), m.b(x)], 1))),
        "the result of cat has 2 users",
    )


def test_refuses_a_concat_that_takes_a_convolution_twice() -> None:
    model = double(
        lambda m, x: (lambda y: m.norm(torch.cat([y, y], 1)))(m.conv(x)),
        conv=conv(4, 5),
        norm=nn.BatchNorm2d(10),
    )
    refused(
        captured(model, image()),
        "the concat in front of it takes conv2d (conv) more than once",
    )


def test_refuses_a_concat_along_another_dimension() -> None:
    model = double(
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], -2)),
        a=conv(),
        b=conv(),
        norm=nn.BatchNorm2d(6),
    )
    refused(
        captured(model, image()),
        "the concat in front of the batch norm is not along the channels",
    )


def test_ignores_a_concat_without_convolutions() -> None:
    model = double(lambda m, x: m.norm(torch.cat([x, -x], 1)), norm=nn.BatchNorm2d(8))
    ignored(captured(model, image()))


@pytest.mark.parametrize("rank", [2, 4])
def test_refuses_a_constant_with_more_than_one_number_a_channel(rank: int) -> None:
    # conv gives (2, 6, 5, 4): a (5, 4) and a (1, 6, 1, 4) constant vary along the image.
    shape = (5, 4) if rank == 2 else (1, 6, 1, 4)
    model = double(lambda m, x: m.conv(x) * m.c, conv=conv(), c=nn.Parameter(torch.ones(shape)))
    refused(captured(model, image()), "the constant of mul does not have one number a channel")


def test_refuses_a_constant_as_long_as_the_channels_along_another_dimension() -> None:
    model = double(lambda m, x: m.conv(x) + m.c, conv=conv(4, 4), c=nn.Parameter(torch.ones(4)))
    refused(captured(model, image()), "the constant of add does not have one number a channel")


def test_refuses_a_constant_that_widens_the_result() -> None:
    model = double(
        lambda m, x: m.conv(x) * m.c, conv=conv(4, 1), c=nn.Parameter(torch.ones(3, 1, 1))
    )
    refused(captured(model, image()), "the constant of mul does not have one number a channel")


def test_refuses_a_constant_that_adds_a_dimension() -> None:
    model = double(
        lambda m, x: m.conv(x) * m.c, conv=conv(), c=nn.Parameter(torch.ones(1, 1, 6, 1, 1))
    )
    refused(captured(model, image()), "the constant of mul does not have one number a channel")


def test_refuses_a_constant_divided_by_the_result() -> None:
    model = double(lambda m, x: m.c / m.conv(x), conv=conv(), c=nn.Parameter(torch.ones(CHANNELS)))
    refused(
        captured(model, image()), "a constant divided by the convolution's result is not linear"
    )


def test_ignores_a_number_divided_by_the_result() -> None:
    # Captured as reciprocal and mul: the mul is not behind the convolution.
    ignored(captured(double(lambda m, x: 2.0 / m.conv(x), conv=conv()), image()))


def test_refuses_a_promotion_of_the_dtype() -> None:
    model = Model(lambda m, x: m.conv(x) * m.c, conv=scramble(conv()), c=normal(*CHANNELS))
    refused(captured(model, image(dtype=torch.float32)), "the mul changes the dtype")


def test_a_float64_scalar_tensor_promotes_nothing_and_is_folded() -> None:
    model = Model(lambda m, x: m.conv(x) * m.c, conv=scramble(conv()), c=normal())
    folded(captured(model, image(dtype=torch.float32)), {"conv2d": 1}, tolerance=FLOAT32)


def test_refuses_a_division_by_zero() -> None:
    model = double(lambda m, x: m.conv(x) / m.c, conv=conv(), c=torch.ones(CHANNELS))
    model.c[3] = 0.0
    refused(captured(model, image()), "the folded weight is not finite in float64")


def test_refuses_an_infinite_number() -> None:
    model = double(lambda m, x: m.conv(x) + float("inf"), conv=conv())
    refused(captured(model, image()), "the folded bias is not finite in float64")


def test_refuses_a_complex_weight() -> None:
    model = Model(lambda m, x: m.conv(x) * 2.0, conv=conv(dtype=torch.complex64)).eval()
    refused(
        captured(model, image().to(torch.complex64)),
        "the weight is complex64, not real floating-point numbers",
    )


def test_refuses_an_integer_weight() -> None:
    model = Model(lambda m, x: F.linear(x, m.weight) * 2, weight=torch.arange(12).reshape(3, 4))
    refused(
        captured(model, torch.arange(8).reshape(2, 4)),
        "the weight is int64, not real floating-point numbers",
    )


def test_refuses_a_weight_that_is_an_input() -> None:
    model = Model(lambda m, x, weight: F.conv2d(x, weight) * 2.0)
    refused(captured(model, image(), normal(6, 4, 3, 3)), "the weight is not a constant")


def test_refuses_a_bias_that_is_an_input() -> None:
    model = Model(lambda m, x, bias: F.conv2d(x, m.weight, bias) * 2.0, weight=normal(6, 4, 3, 3))
    refused(captured(model, image(), normal(6)), "the bias is not a constant")


def test_refuses_a_weight_that_the_model_writes_to() -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.weight.mul_(0.5)
        return F.conv2d(x, model.weight) * 2.0

    # The write reaches the convolution as a computed weight, not as the stored one.
    program = captured(Model(forward, weight=normal(6, 4, 3, 3)), image())
    refused(program, "the weight is not a constant")


def test_refuses_statistics_that_are_inputs() -> None:
    model = double(lambda m, x, mean, var: F.batch_norm(m.conv(x), mean, var), conv=conv())
    refused(
        captured(model, image(), normal(6), normal(6).abs() + 0.5),
        "the batch norm's statistics are not constants",
    )


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_refuses_a_batch_norm_weight_or_bias_that_is_an_input(which: str) -> None:
    model = double(
        lambda m, x, given: F.batch_norm(m.conv(x), m.mean, m.var, **{which: given}),
        conv=conv(),
        mean=normal(6),
        var=normal(6).abs() + 0.5,
    )
    refused(
        captured(model, image(), normal(6)), "the batch norm's weight or bias is not a constant"
    )


# What it leaves alone without a word --------------------------------------------------------------

UNRELATED: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "relu_between": lambda m, x: m.norm(torch.relu(m.conv(x))),
    "squared": lambda m, x: (lambda y: y * y)(m.conv(x)),
    "of_two_convolutions": lambda m, x: m.conv(x) * m.conv(x + 1.0),
    "with_another_tensor": lambda m, x: m.conv(x) * x.mean(),
    "of_constants": lambda m, x: x * (m.norm.weight + 1.0).mean(),
    "truth_value": lambda m, x: m.conv(x) * m.mask,
    "rounded_division": lambda m, x: torch.div(m.conv(x), 2.0, rounding_mode="floor"),
    "weight_is_a_vector": lambda m, x: F.linear(x, m.vector) * m.vector[:1],
}


@pytest.mark.parametrize("case", UNRELATED)
def test_ignores_what_is_none_of_its_business(case: str) -> None:
    model = double(UNRELATED[case], conv=conv(), norm=nn.BatchNorm2d(6), vector=torch.ones(6))
    model.register_buffer(
        "mask", torch.tensor([True, False, True, True, False, True])[:, None, None]
    )
    ignored(captured(model, image()))


# The proof guards the pass ------------------------------------------------------------------------


def test_the_driver_undoes_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Convolution, "scale_weight", lambda self, weight, scale: weight)
    before = captured(scramble(nn.Sequential(conv(), nn.BatchNorm2d(6)).double()), image())
    after = optimize(before, select("fold_conv_bn"))
    assert counts(after) == counts(before)
    undone = step(after, "fold_conv_bn").undone
    assert undone is not None
    assert undone.startswith("in float64 its outputs moved by a relative L2 of ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_folds_on_a_gpu_where_numbers_live_on_the_cpu() -> None:
    model = double(lambda m, x: m.norm(m.conv(x) * 0.37) + 1.7, conv=conv(), norm=nn.BatchNorm2d(6))
    folded(captured(model.cuda(), image().cuda()), {"conv2d": 1})
