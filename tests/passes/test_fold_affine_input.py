"""fold_affine_input: what it folds, that the function stays, what it refuses, that it settles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import mobilenet_v2, vit_tiny
from optfuse.capture import capture
from optfuse.convolution import Convolution
from optfuse.graph import attribute, kind
from optfuse.normalize import normalized
from optfuse.optimize import optimize, select
from optfuse.passes.fold_affine_input import FoldAffineInput
from optfuse.stages import LoadedModel, Normalization, Program
from tests.harness import assert_same_function, captured, counts, reasons, scramble, step
from tests.passes.parts import Model, TwoInputs, normal

PASS = "fold_affine_input"

# Folding float64 numbers in float64 moves an output by a few 1e-16 for each product and sum.
FLOAT64 = 1e-12
# The folded constants are rounded once to float32, each by at most 6e-8 of itself.
FLOAT32 = 1e-6
# Likewise in float16 and bfloat16, which keep 11 and 8 bits: at most 4.9e-4 and 3.9e-3. The bias
# takes in the shift, which cancels against the rest, so that a little more is seen.
HALF = 3e-3
BFLOAT16 = 2e-2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADS = "pads with zeros, where a folded shift would be missing"


def per_channel(*shape: int, seed: int = 5) -> torch.Tensor:
    """Seeded numbers that can be divided by, of both signs."""
    drawn = normal(*shape, seed=seed)
    return drawn.sign() * (drawn.abs() + 0.4)


def image(*, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(2, 4, 7, 6, seed=11, dtype=dtype)


def double(forward: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> nn.Module:
    """A float64 `Model` in eval mode; buffers keep their numbers."""
    return scramble(Model(forward, **parts).double())


def conv(in_channels: int = 4, out_channels: int = 6, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, **more)


def run(program: Program, also: str = "none") -> Program:
    """The program after the passes named and this one, undone by nothing."""
    after = optimize(program, [*select(also), FoldAffineInput()])
    assert [each.undone for each in after.trace if each.undone] == []
    return after


def folded(
    program: Program, expected: dict[str, int], *, tolerance: float = FLOAT64, also: str = "none"
) -> Program:
    """The program after the pass: these operators, no refusal, the same function, settled."""
    after = run(program, also)
    assert counts(after) == expected
    assert reasons(after, PASS) == []
    assert_same_function(program, after, tolerance=tolerance)
    again = run(after, also)
    assert counts(again) == expected
    assert [each.name for each in again.trace[len(after.trace) :] if each.matched] == []
    return after


def refused(program: Program, reason: str, also: str = "none") -> None:
    """The pass leaves the program as it is, for this one reason."""
    after = run(program, also)
    assert step(after, PASS).sites == ()
    assert reasons(after, PASS) == [reason]


def ignored(program: Program, also: str = "none") -> None:
    """The pass leaves the program as it is and has nothing to say about it."""
    after = run(program, also)
    assert step(after, PASS).sites == ()
    assert reasons(after, PASS) == []


# What it folds: scales and shifts -----------------------------------------------------------------


def test_preprocessing_goes_into_the_first_convolution() -> None:
    model = double(
        lambda m, x: m.conv((x - m.mean) / m.std),
        conv=conv(bias=False),
        mean=per_channel(4, 1, 1),
        std=per_channel(4, 1, 1, seed=6),
    )
    before = captured(model, image())
    assert counts(before) == {"sub": 1, "div": 1, "conv2d": 1}
    after = folded(before, {"conv2d": 1})
    (site,) = step(after, PASS).sites
    assert (site.site, site.note) == ("div", "sub and div folded into conv2d (conv)")


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (conv, (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 5)),
    "conv2d_unbatched": (conv, (4, 7, 6)),
    "conv2d_grouped": (lambda: conv(groups=2), (2, 4, 7, 6)),
    "conv2d_depthwise": (lambda: conv(4, 8, groups=4, bias=False), (2, 4, 7, 6)),
    "conv2d_strided": (lambda: conv(4, 6, 2, stride=2, dilation=2), (2, 4, 7, 6)),
    "conv2d_valid": (lambda: conv(4, 6, 2, padding="valid"), (2, 4, 7, 6)),
    "conv2d_same_1x1": (lambda: conv(4, 6, 1, padding="same"), (2, 4, 7, 6)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 1), (2, 4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2, padding=1), (2, 4, 7, 6)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 8, 1, groups=4), (2, 4, 3, 2, 2)),
    "linear": (lambda: nn.Linear(4, 6), (3, 5, 4)),
    "linear_no_bias": (lambda: nn.Linear(4, 6, bias=False), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folds_scale_and_shift_into_every_layer(name: str) -> None:
    make, shape = LAYERS[name]
    spatial = 0 if name.startswith("linear") else int(name.partition("d")[0][-1])
    model = double(
        lambda m, x: m.layer(x * m.c + m.d),
        layer=make(),
        c=per_channel(4, *[1] * spatial),
        d=per_channel(4, *[1] * spatial, seed=9),
    )
    before = captured(model, normal(*shape))
    layer = next(iter(counts(before).keys() - {"mul", "add"}))
    folded(before, {layer: 1})


SCALED: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: conv(padding=1),
    "same": lambda: conv(padding="same"),
    "same_even_kernel": lambda: conv(4, 6, (4, 2), padding="same", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "grouped_transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1),
    "depthwise_transposed": lambda: nn.ConvTranspose2d(4, 8, 2, groups=4, bias=False),
    "grouped_transposed_narrowing": lambda: nn.ConvTranspose2d(4, 2, 3, groups=2),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("operation", ["mul", "div"])
def test_a_scale_alone_goes_through_padding_and_into_transposed_kernels(
    name: str, operation: str
) -> None:
    model = double(
        lambda m, x: m.layer(getattr(torch, operation)(x, m.c)),
        layer=SCALED[name](),
        c=per_channel(4, 1, 1),
    )
    layer = "conv_transpose2d" if "transposed" in name else "conv2d"
    folded(captured(model, image()), {layer: 1})


def test_input_channels_of_a_grouped_transposed_convolution_written_out() -> None:
    # Input channels 0 and 1 belong to group 0: the weight is (in, out/groups, 1, 1).
    layer = nn.ConvTranspose2d(4, 4, 1, groups=2)
    model = double(
        lambda m, x: m.layer(x * m.c + m.d),
        layer=layer,
        c=torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(4, 1, 1),
        d=torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1),
    )
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9.0).reshape(4, 2, 1, 1))
        layer.bias.fill_(0.5)
    after = folded(captured(model, image()), {"conv_transpose2d": 1})
    node = next(n for n in after.graph_module.graph.nodes if kind(n) == "conv_transpose2d")
    weight, bias = (attribute(after.graph_module, each.target) for each in node.args[1:3])
    assert weight.reshape(4, 2).tolist() == [[1, 2], [30, 40], [500, 600], [7000, 8000]]
    # Group 0: 1*1 + 2*3 and 1*2 + 2*4; group 1: 3*5 + 4*7 and 3*6 + 4*8.
    assert bias.tolist() == [7.5, 10.5, 43.5, 50.5]


ARITHMETIC: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "constant_first": lambda m, x: m.c * x,
    "batch_one": lambda m, x: x * m.c.reshape(1, 4, 1, 1),
    "long_chain": lambda m, x: ((x * m.c + m.d) / m.c - m.d) * 0.3,
    "add_alpha": lambda m, x: torch.add(x, m.c, alpha=3),
    "add_constant_first_alpha": lambda m, x: torch.add(m.c, x, alpha=3),
    "sub_constant_first": lambda m, x: m.c - x,
    "sub_alpha": lambda m, x: torch.sub(x, m.c, alpha=3),
    "rsub": lambda m, x: torch.rsub(x, m.c, alpha=3),
    "numbers": lambda m, x: 1.7 - (x / 2.3 + 1) * 3,
    "integer_tensor": lambda m, x: x * m.whole + m.whole,
    "scalar_tensor": lambda m, x: x * m.single - m.single,
}


@pytest.mark.parametrize("spelling", ARITHMETIC)
def test_folds_every_spelling(spelling: str) -> None:
    compute = ARITHMETIC[spelling]
    model = double(
        lambda m, x: m.conv(compute(m, x)),
        conv=conv(),
        c=per_channel(4, 1, 1),
        d=per_channel(4, 1, 1, seed=9),
        single=torch.tensor(1.3),
    )
    model.register_buffer("whole", torch.tensor([2, 3, -1, 5]).reshape(4, 1, 1))
    # `reshape` of a constant is fold_constants' business.
    folded(captured(model, image()), {"conv2d": 1}, also="fold_constants")


def test_folds_batch_norm_in_front_of_a_convolution() -> None:
    model = scramble(nn.Sequential(nn.BatchNorm2d(4, eps=0.1), conv()).double())
    after = folded(captured(model, image()), {"conv2d": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "batch_norm folded into conv2d (1)"
    assert site.site.endswith("(0)")


def test_folds_batch_norm_in_front_of_a_linear_layer_and_what_stands_before_it() -> None:
    model = double(
        lambda m, x: m.linear(m.norm(2 - x)), norm=nn.BatchNorm1d(4), linear=nn.Linear(4, 6)
    )
    folded(captured(model, normal(5, 4)), {"linear": 1})


def test_folds_what_fold_conv_bn_cannot() -> None:
    # The first convolution's result is read twice; the second one can take the batch norm in.
    model = double(
        lambda m, x: (lambda y: m.second(m.norm(y)) + y)(m.first(x)),
        first=conv(4, 4, 1),
        norm=nn.BatchNorm2d(4),
        second=conv(4, 4, 1),
    )
    folded(captured(model, image()), {"conv2d": 2, "add": 1}, also="fold_conv_bn")


def test_folds_into_all_layers_that_read_it() -> None:
    model = double(
        lambda m, x: (lambda y: (m.one(y), m.two(y), m.one(y)))(x * m.c + 1.5),
        one=conv(4, 3, 1),
        two=conv(4, 2, 3, groups=2, bias=False),
        c=per_channel(4, 1, 1),
    )
    after = folded(captured(model, image()), {"conv2d": 3})
    (site,) = step(after, PASS).sites
    assert site.note == ("mul and add folded into conv2d (one), conv2d_1 (two) and conv2d_2 (one)")
    # The layer that runs twice keeps one weight and one bias, and the other has got a bias.
    constants = {n.target for n in after.graph_module.graph.nodes if n.op == "get_attr"}
    assert len(constants) == 4


def test_a_layer_on_two_images_keeps_one_set_of_weights() -> None:
    model = scramble(
        TwoInputs(
            lambda m, x, y: (m.conv((x - 0.4) / m.std), m.conv((y - 0.4) / m.std)),
            conv=conv(),
            std=per_channel(4, 1, 1),
        ).double()
    )
    before = captured(model, image(), image() * 2)
    assert counts(before) == {"sub": 2, "div": 2, "conv2d": 2}
    after = folded(before, {"conv2d": 2})
    assert len({n.target for n in after.graph_module.graph.nodes if n.op == "get_attr"}) == 2


def test_the_models_own_weights_stay_as_they_are() -> None:
    model = double(
        lambda m, x: (m.conv(x * 0.3 + 2.0), m.tied(x), m.conv(x)), conv=conv(), tied=conv()
    )
    model.tied.weight = model.conv.weight
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded(captured(model, image()), {"conv2d": 3})
    now = model.state_dict()
    # Bit for bit: the caller's model is not ours to write.
    assert all(torch.equal(now[name], kept[name]) for name in kept)


def test_dynamic_batch_and_image_size() -> None:
    model = double(
        lambda m, x: m.conv(F.pad((x - m.c) / 3.0, (1, 1, 1, 1))),
        conv=conv(),
        c=per_channel(4, 1, 1),
    )
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height")}
    before = capture(LoadedModel("dynamic", model, (image(),), {}, dynamic_shapes=(dims,)))
    after = run(before)
    assert counts(after) == {"sub": 1, "conv2d": 1}
    assert_same_function(before, after, tolerance=FLOAT64)
    other = normal(5, 4, 9, 6)
    # A few units of 1e-16 for each of the 36 products.
    torch.testing.assert_close(after.graph_module(other), model(other), rtol=1e-12, atol=1e-12)


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
    model = scramble(Model(lambda m, x: m.conv((x - m.c) / m.d), conv=conv()).to(dtype))
    model.register_buffer("c", per_channel(4, 1, 1).to(dtype))
    model.register_buffer("d", per_channel(4, 1, 1, seed=9).to(dtype))
    before = captured(model, image(dtype=dtype))
    after = folded(before, {"conv2d": 1}, tolerance=tolerance)
    assert {p.dtype for p in after.graph_module.parameters()} == {dtype}
    # Rounding once: the weight is the one that float64 arithmetic gives, to the last bit.
    exact = model.conv.weight.double() * (1.0 / model.d.double()).reshape(1, 4, 1, 1)
    weight = next(n for n in after.graph_module.graph.nodes if kind(n) == "conv2d").args[1]
    assert weight.target == "conv_weight_folded"
    assert torch.equal(attribute(after.graph_module, weight.target), exact.to(dtype))


# What it folds: in front of padding with zeros ----------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "left"),
    [
        (lambda m, x: (x - m.c) / m.d, "sub"),
        (lambda m, x: x * m.c + m.d, "add"),
        (lambda m, x: (m.c - x) * m.d, "add"),
        (lambda m, x: x + m.c + m.d, "add"),
        (lambda m, x: 1 - m.norm(x) * 2, "add"),
    ],
    ids=["normalisation", "scale_and_shift", "negated", "two_shifts", "batch_norm"],
)
@pytest.mark.parametrize(
    "layer",
    [conv(padding=1), conv(padding="same"), conv(4, 6, 2, padding="same")],
    ids=["padding", "same", "same_even_kernel"],
)
def test_one_operator_is_left_in_front_of_padding(
    spelling: Callable[..., torch.Tensor], left: str, layer: nn.Module
) -> None:
    model = double(
        lambda m, x: m.layer(spelling(m, x)),
        layer=layer,
        norm=nn.BatchNorm2d(4),
        c=per_channel(4, 1, 1),
        d=per_channel(4, 1, 1, seed=9),
    )
    before = captured(model, image())
    after = run(before)
    assert counts(after) == {left: 1, "conv2d": 1}
    assert_same_function(before, after, tolerance=FLOAT64)
    (site,) = step(after, PASS).sites
    assert site.note.endswith(f", but for its shift, which stays as one {left}")
    # And what is left says why it stays, now and when the pass runs again.
    assert reasons(after, PASS) == [f"conv2d_1 (layer) {PADS}"]
    again = run(after).trace[len(after.trace) :]
    assert [each.matched for each in again] == [0]
    assert [each.reason for each in again[0].refused] == [f"conv2d_1 (layer) {PADS}"]


def test_the_mean_that_is_left_is_the_mean() -> None:
    mean = per_channel(4, 1, 1)
    model = double(
        lambda m, x: m.conv((x - m.mean) / m.std),
        conv=conv(padding=1),
        mean=mean,
        std=per_channel(4, 1, 1, seed=9),
    )
    after = run(captured(model, image()))
    sub = next(n for n in after.graph_module.graph.nodes if kind(n) == "sub")
    # (mean / std) * std: two roundings in float64.
    torch.testing.assert_close(
        attribute(after.graph_module, sub.args[1].target), mean, rtol=1e-15, atol=0.0
    )


def test_one_of_several_layers_that_pads_keeps_the_shift_for_all() -> None:
    model = double(
        lambda m, x: (lambda y: (m.one(y), m.two(y)))(x * 0.3 + 1.5),
        one=conv(4, 3, 1),
        two=conv(padding=1),
    )
    before = captured(model, image())
    after = run(before)
    assert counts(after) == {"add": 1, "conv2d": 2}
    assert_same_function(before, after, tolerance=FLOAT64)
    assert reasons(after, PASS) == [f"conv2d_3 (two) {PADS}"]


# What it folds: padding ---------------------------------------------------------------------------

PADDED: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 2), (2, 4, 5)),
    "conv2d": (conv(), (2, 2, 1, 1), (2, 4, 7, 6)),
    "conv3d": (nn.Conv3d(4, 6, 2), (1, 1, 0, 0, 2, 2), (2, 4, 3, 4, 5)),
    "last_dimension_alone": (conv(), (1, 1), (2, 4, 7, 6)),
    "no_channels": (conv(), (1, 1, 1, 1, 0, 0), (2, 4, 7, 6)),
    "unbatched": (conv(), (1, 1, 1, 1), (4, 7, 6)),
    "on_top_of_its_own": (conv(padding=(2, 1), stride=2, dilation=2), (1, 1, 2, 2), (2, 4, 7, 6)),
    "same": (conv(4, 6, 3, padding="same"), (1, 1, 1, 1), (2, 4, 7, 6)),
    "valid": (conv(4, 6, 2, padding="valid"), (1, 1, 1, 1), (2, 4, 7, 6)),
    "depthwise": (conv(4, 8, 3, groups=4, bias=False), (1, 1, 1, 1), (2, 4, 7, 6)),
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_goes_into_the_convolution(case: str) -> None:
    layer, amounts, shape = PADDED[case]
    model = double(lambda m, x: m.layer(F.pad(x, amounts)), layer=layer)
    before = captured(model, normal(*shape))
    (name,) = counts(before).keys() - {"pad"}
    after = folded(before, {name: 1})
    (site,) = step(after, PASS).sites
    assert (site.site, site.note) == ("pad", f"pad folded into {name} (layer)")


def test_padding_of_a_computed_weight_and_in_another_spelling() -> None:
    model = TwoInputs(lambda m, x, w: F.conv2d(torch.constant_pad_nd(x, (1, 1, 2, 2)), w))
    folded(captured(model.eval(), image(), normal(6, 4, 3, 3)), {"conv2d": 1})


def test_padding_goes_into_all_convolutions_that_read_it() -> None:
    model = double(
        lambda m, x: (lambda y: (m.one(y), m.two(y)))(nn.ZeroPad2d(1)(x)),
        one=conv(),
        two=conv(4, 2, 3, padding=1, bias=False),
    )
    folded(captured(model, image()), {"conv2d": 2})


def test_padding_behind_a_scale_and_in_front_of_one() -> None:
    # The scale behind the pad goes in first, then the pad, then the scale in front of it; the
    # shift behind the pad reaches the padding too, so that it can go in.
    model = double(
        lambda m, x: m.conv(F.pad(x * m.c, (1, 1, 1, 1)) * 0.3 + 1.5),
        conv=conv(),
        c=per_channel(4, 1, 1),
    )
    folded(captured(model, image()), {"conv2d": 1})


# What it refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", ["add", "batch_norm"])
def test_refuses_a_shift_in_front_of_padding(shift: str) -> None:
    model = double(
        lambda m, x: m.conv(m.norm(x) if shift == "batch_norm" else x + 1.5),
        conv=conv(padding=1),
        norm=nn.BatchNorm2d(4),
    )
    refused(captured(model, image()), f"conv2d (conv) {PADS}")


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 1, stride=2),
    ],
    ids=["borders", "stride", "places_between"],
)
def test_refuses_a_shift_in_front_of_a_transposed_convolution(layer: nn.Module) -> None:
    model = double(lambda m, x: m.layer(x - 1.5), layer=layer)
    refused(
        captured(model, image()),
        "conv_transpose2d (layer) is transposed, and a shift in front of it comes out differently "
        "at each place",
    )


def test_refuses_a_scale_of_zero_in_front_of_padding() -> None:
    model = double(lambda m, x: m.conv(x * 0.0 + 1.5), conv=conv(padding=1))
    refused(captured(model, image()), "the folded shift is not finite in float64")


def test_refuses_what_something_else_reads_too() -> None:
    model = double(
        lambda m, x: (lambda y: (m.conv(y), torch.relu(y)))(x * 0.3), conv=conv(padding=1)
    )
    refused(captured(model, image()), "relu also reads the result of mul")


def test_refuses_what_is_an_output_too() -> None:
    model = double(lambda m, x: (lambda y: (m.conv(y), y))(x * 0.3), conv=conv())
    refused(captured(model, image()), "the result of mul is also an output of the model")


def test_refuses_what_is_a_weight_too() -> None:
    model = scramble(
        TwoInputs(lambda m, x, w: (lambda y: (m.conv(y), F.conv2d(x, y)))(w * 0.3), conv=conv())
    )
    before = captured(model.double(), image(), normal(6, 4, 3, 3))
    refused(before, "conv2d_1 also reads the result of mul")


def test_refuses_layers_with_their_channels_in_different_dimensions() -> None:
    model = double(
        lambda m, x: (lambda y: (m.conv(y), m.linear(y)))(x * 0.3),
        conv=conv(),
        linear=nn.Linear(4, 3),
    )
    refused(
        captured(model, normal(2, 4, 5, 4)),
        "the layers behind it have their channels in different dimensions",
    )


def test_refuses_a_batch_norm_over_another_dimension_of_a_linear_layer() -> None:
    model = scramble(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double())
    refused(
        captured(model, normal(2, 6, 6)),
        "the batch norm runs over dimension 1, the layer's channels are in dimension 2",
    )


@pytest.mark.parametrize("operand", ["mean", "variance"])
def test_refuses_statistics_that_are_inputs(operand: str) -> None:
    model = scramble(
        TwoInputs(
            lambda m, x, given: m.conv(
                F.batch_norm(x, given, m.v) if operand == "mean" else F.batch_norm(x, m.v, given)
            ),
            conv=conv(),
            v=torch.ones(4),
        ).double()
    )
    before = captured(model, image(), normal(4).abs() + 0.5)
    refused(before, "the batch norm's statistics are not constants")


@pytest.mark.parametrize("shape", [(6,), (7, 6), (1, 4, 1, 6)])
def test_refuses_a_constant_with_more_than_one_number_a_channel(shape: tuple[int, ...]) -> None:
    model = double(lambda m, x: m.conv(x * m.c), conv=conv(), c=per_channel(*shape))
    refused(captured(model, image()), "the constant of mul does not have one number a channel")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((3, 1, 1), "the constant of sub makes the result larger"),
        ((2, 1, 1, 1), "the constant of sub does not have one number a channel"),
    ],
    ids=["channels", "batch"],
)
def test_refuses_a_constant_that_widens_its_operand(shape: tuple[int, ...], reason: str) -> None:
    channels = 3 if len(shape) == 3 else 1
    model = double(lambda m, x: m.conv(x - m.c), conv=conv(channels), c=per_channel(*shape))
    refused(captured(model, normal(1, 1, 7, 6)), reason)


def test_refuses_a_promotion_of_the_dtype() -> None:
    model = scramble(Model(lambda m, x: m.conv(x / 255.0), conv=conv()))
    pixels = torch.arange(2 * 4 * 7 * 6, dtype=torch.uint8).reshape(2, 4, 7, 6)
    refused(captured(model, pixels), "the div changes the dtype")


def test_folds_preprocessing_behind_a_cast() -> None:
    model = scramble(Model(lambda m, x: m.conv(x.to(torch.float32) / 255.0), conv=conv()))
    pixels = torch.arange(2 * 4 * 7 * 6, dtype=torch.uint8).reshape(2, 4, 7, 6)
    folded(captured(model, pixels), {"conv2d": 1, "_to_copy": 1}, tolerance=FLOAT32)


def test_refuses_a_weight_that_is_an_input() -> None:
    model = TwoInputs(lambda m, x, weight: F.conv2d(x * 2.0, weight)).eval()
    refused(captured(model, image(), normal(6, 4, 3, 3)), "the weight is not a constant")


def test_refuses_a_bias_that_is_an_input() -> None:
    model = TwoInputs(lambda m, x, bias: F.conv2d(x * 2.0, m.w, bias), w=normal(6, 4, 3, 3)).eval()
    refused(captured(model, image(), normal(6)), "the bias is not a constant")


def test_refuses_a_weight_that_the_model_writes_to() -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model.w.mul_(0.5)
        return F.conv2d(x * 2.0, model.w)

    # The write reaches the convolution as a computed weight, not as the stored one.
    refused(captured(Model(forward, w=normal(6, 4, 3, 3)), image()), "the weight is not a constant")


@pytest.mark.parametrize("operation", ["mul", "pad"])
def test_refuses_an_input_that_the_model_writes_to(operation: str) -> None:
    def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result = model.conv(x * 2.0 if operation == "mul" else F.pad(x, (1, 1)))
        x.add_(1.0)
        return result

    refused(
        captured(double(forward, conv=conv()), image()),
        "the model writes to the memory of its input",
    )


def test_refuses_integers() -> None:
    model = Model(lambda m, x: F.linear(x * 3, m.w), w=torch.arange(12).reshape(3, 4)).eval()
    refused(captured(model, torch.arange(8).reshape(2, 4)), "the weight is int64, not real numbers")


def test_refuses_an_infinite_weight() -> None:
    model = double(lambda m, x: m.conv(x / m.c), conv=conv(), c=torch.tensor(0.0))
    refused(captured(model, image()), "the folded weight is not finite in float64")


def test_refuses_a_bias_that_overflows() -> None:
    model = scramble(Model(lambda m, x: m.conv(x + 6e4), conv=conv())).half()
    refused(captured(model, image(dtype=torch.float16)), "the folded bias is not finite in float16")


def test_refuses_a_weight_that_float16_could_not_hold_well() -> None:
    # 1e-6 times numbers around 0.5: the steps between float16 numbers are 6e-8 there.
    model = scramble(Model(lambda m, x: m.conv(x * 1e-6), conv=conv())).half()
    refused(
        captured(model, image(dtype=torch.float16)),
        "the folded weight is too small to be held in float16",
    )


def test_refuses_a_weight_that_an_embedding_is_tied_to() -> None:
    def forward(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return model.head(torch.relu(model.embedding(tokens)) * 0.5)

    model = double(forward, embedding=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False))
    model.head.weight = model.embedding.weight
    refused(
        captured(model, torch.arange(6).reshape(2, 3)),
        "embedding (embedding) reads the same weight, which would have to be held twice",
    )


@pytest.mark.parametrize(
    ("amounts", "reason"),
    [
        (
            (0, 1, 0, 1),
            "it pads dimension 3 by 0 before and 1 behind, and a convolution pads both sides alike",
        ),
        (
            (1, 1, 2, 1),
            "it pads dimension 2 by 2 before and 1 behind, and a convolution pads both sides alike",
        ),
        ((1, 1, -1, -1), "it pads by -1, which cuts off"),
        ((1, 1, 1, 1, 1, 1), "it pads more dimensions than the convolution does"),
        ((0, 0, 0, 0, 0, 0, 1, 1), "it pads more dimensions than the convolution does"),
    ],
    ids=["one_side", "more_on_one_side", "negative", "channels", "batch"],
)
def test_refuses_padding_that_a_convolution_cannot_do(
    amounts: tuple[int, ...], reason: str
) -> None:
    channels = 6 if len(amounts) == 6 else 4
    model = double(lambda m, x: m.conv(F.pad(x, amounts)), conv=conv(channels))
    refused(captured(model, image()), reason)


def test_refuses_padding_with_another_number() -> None:
    model = double(lambda m, x: m.conv(F.pad(x, (1, 1), value=0.5)), conv=conv())
    refused(captured(model, image()), "it pads with 0.5, and a convolution pads with zeros")


def test_refuses_padding_that_is_known_only_when_it_runs() -> None:
    model = double(lambda m, x: m.conv(F.pad(x, (x.shape[0], x.shape[0]))), conv=conv())
    before = capture(LoadedModel("test", model, (image(),), {}, ({0: torch.export.Dim("batch")},)))
    refused(before, "how much it pads is known only when it runs")


def test_refuses_padding_in_front_of_a_transposed_convolution() -> None:
    model = double(lambda m, x: m.up(F.pad(x, (1, 1))), up=nn.ConvTranspose2d(4, 6, 3, padding=1))
    refused(
        captured(model, image()),
        "the padding of conv_transpose2d (up), which is transposed, takes away",
    )


def test_refuses_padding_in_front_of_one_that_pads_unevenly() -> None:
    model = double(lambda m, x: m.conv(F.pad(x, (1, 1))), conv=conv(4, 6, 2, padding="same"))
    refused(captured(model, image()), "conv2d (conv) itself pads one side more than the other")


def test_refuses_padding_that_something_else_reads_too() -> None:
    model = double(
        lambda m, x: (lambda y: (m.conv(y), F.avg_pool2d(y, 2)))(F.pad(x, (1, 1))), conv=conv()
    )
    refused(captured(model, image()), "avg_pool2d also reads the result of pad")


# What it leaves alone without a word --------------------------------------------------------------

UNRELATED: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "relu_between": lambda m, x: m.conv(torch.relu(m.norm(x))),
    "squared": lambda m, x: m.conv(x * x),
    "computed_scale": lambda m, x: m.conv(x * x.mean()),
    "constant_divided": lambda m, x: m.conv(m.c / (x.abs() + 1.0).sqrt()),
    "truth_value": lambda m, x: m.conv(x * m.mask),
    "behind_it": lambda m, x: m.conv(x) * 2.0,
    "weight_scaled": lambda m, x: F.conv2d(x, x[:, :, :3, :3] * 2.0),
    "average_pooling": lambda m, x: F.avg_pool2d(F.pad(x, (1, 1)), 2),
    "reflected": lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "linear_padded": lambda m, x: F.linear(
        F.pad(x, (1, 1)), m.conv.weight[:, 0, 0].repeat(1, 3)[:, :8]
    ),
}


@pytest.mark.parametrize("case", UNRELATED)
def test_ignores_what_is_none_of_its_business(case: str) -> None:
    model = double(UNRELATED[case], conv=conv(), norm=nn.BatchNorm2d(4), c=per_channel(4, 1, 1))
    model.register_buffer("mask", torch.tensor([True, False, True, True])[:, None, None])
    ignored(captured(model, image()))


# Whole networks -----------------------------------------------------------------------------------


def test_preprocessing_of_a_vision_transformer_vanishes() -> None:
    network = vit_tiny
    model = LoadedModel("vit_tiny", network.build(), network.example_inputs())
    plain, before = capture(model), capture(normalized(model, Normalization(MEAN, STD)))
    after = run(before)
    assert counts(after) == counts(plain)
    # Twelve layers amplify the rounding of one float32 convolution.
    assert_same_function(before, after, tolerance=1e-5)


def test_of_preprocessing_in_front_of_padding_the_mean_stays() -> None:
    network = mobilenet_v2
    model = LoadedModel("mobilenet_v2", network.build(), network.example_inputs())
    plain, before = capture(model), capture(normalized(model, Normalization(MEAN, STD)))
    after = run(before, "fold_conv_bn")
    assert counts(after) == {**counts(run(plain, "fold_conv_bn")), "sub": 1}
    (reason,) = reasons(after, PASS)
    assert reason.endswith(PADS)
    # 52 folded layers amplify the rounding of their constants to float32, 6e-8 each.
    assert_same_function(before, after, tolerance=1e-5)


# The proof guards the pass ------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["scale_inputs", "response"])
def test_the_driver_undoes_a_wrong_fold(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    if forgotten == "scale_inputs":
        monkeypatch.setattr(Convolution, forgotten, lambda self, weight, scale: weight)
    else:
        monkeypatch.setattr(Convolution, forgotten, lambda self, weight, shift: 0 * shift[:1])
    before = captured(double(lambda m, x: m.conv(x * 0.3 + 1.5), conv=conv()), image())
    after = optimize(before, [FoldAffineInput()])
    assert counts(after) == counts(before)
    undone = step(after, PASS).undone
    assert undone is not None
    assert undone.startswith("in float64 its outputs moved by a relative L2 of ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_folds_on_a_gpu_where_numbers_live_on_the_cpu() -> None:
    model = double(lambda m, x: m.conv((x * 0.37 - m.c) / 1.7), conv=conv(), c=per_channel(4, 1, 1))
    folded(captured(model.cuda(), image().cuda()), {"conv2d": 1})
