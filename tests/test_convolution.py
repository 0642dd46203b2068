"""convolution_of: every spelling of a convolution read as the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optfuse.convolution import Convolution, convolution_of
from tests.harness import captured

aten = torch.ops.aten


def read(target: Callable[..., Any], *shapes: tuple[int, ...] | None, after: Any = ()) -> Any:
    """`convolution_of` one call on placeholders of these shapes (None for no operand), then `after`
    as the rest of its arguments."""
    graph = fx.Graph()
    operands: list[fx.Node | None] = []
    for index, shape in enumerate(shapes):
        node = None if shape is None else graph.placeholder(f"operand_{index}")
        if node is not None:
            node.meta["val"] = torch.empty(shape, device="meta")
        operands.append(node)
    return convolution_of(graph.call_function(target, (*operands, *after)))


def settings(found: Convolution) -> dict[str, Any]:
    """All but the operands."""
    return {
        "stride": found.stride,
        "padding": found.padding,
        "dilation": found.dilation,
        "output_padding": found.output_padding,
        "transposed": found.transposed,
        "groups": found.groups,
        "linear": found.linear,
        "spatial": found.spatial,
        "out_channels": found.out_channels,
        "channel_dim": found.channel_dim,
    }


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_convolution_with_nothing_but_a_weight(spatial: int) -> None:
    target = (aten.conv1d, aten.conv2d, aten.conv3d)[spatial - 1].default
    found = read(target, (2, 4, *[9] * spatial), (6, 4, *[3] * spatial))
    assert found.bias is None
    assert settings(found) == {
        "stride": (1,) * spatial,
        "padding": (0,) * spatial,
        "dilation": (1,) * spatial,
        "output_padding": (0,) * spatial,
        "transposed": False,
        "groups": 1,
        "linear": False,
        "spatial": spatial,
        "out_channels": 6,
        "channel_dim": -1 - spatial,
    }


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_transposed_convolution_with_nothing_but_a_weight(spatial: int) -> None:
    target = (
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    )[spatial - 1]
    found = read(target, (2, 4, *[5] * spatial), (4, 6, *[3] * spatial))
    assert found.bias is None
    assert settings(found) == {
        "stride": (1,) * spatial,
        "padding": (0,) * spatial,
        "dilation": (1,) * spatial,
        "output_padding": (0,) * spatial,
        "transposed": True,
        "groups": 1,
        "linear": False,
        "spatial": spatial,
        "out_channels": 6,
        "channel_dim": -1 - spatial,
    }


def test_operands_and_settings_of_a_full_call() -> None:
    found = read(
        aten.conv2d.default,
        (2, 4, 9, 9),
        (6, 2, 3, 5),
        (6,),
        after=([2, 3], [1, 4], [1, 2], 2),
    )
    assert found.node.args[:3] == (found.x, found.weight, found.bias)
    assert (found.stride, found.padding, found.dilation) == ((2, 3), (1, 4), (1, 2))
    assert (found.groups, found.out_channels) == (2, 6)


@pytest.mark.parametrize("setting", [2, [2], [2, 2]], ids=["number", "one", "each"])
def test_one_number_stands_for_every_dimension(setting: Any) -> None:
    found = read(
        aten.conv2d.default,
        (2, 4, 9, 9),
        (6, 4, 3, 3),
        None,
        after=(setting, setting, setting),
    )
    assert (found.stride, found.padding, found.dilation) == ((2, 2), (2, 2), (2, 2))


def test_a_transposed_convolution_orders_its_arguments_its_own_way() -> None:
    found = read(
        aten.conv_transpose2d.input,
        (2, 4, 5, 5),
        (4, 3, 3, 3),
        (6,),
        after=([3, 2], [1, 0], [2, 1], 2, [2, 3]),
    )
    assert found.bias is not None
    assert settings(found) == {
        "stride": (3, 2),
        "padding": (1, 0),
        "dilation": (2, 3),
        "output_padding": (2, 1),
        "transposed": True,
        "groups": 2,
        "linear": False,
        "spatial": 2,
        "out_channels": 6,  # three for each of two groups
        "channel_dim": -3,
    }


SAME = {
    # kernel, dilation -> padding on each side, or None where one side gets more
    "odd": ((3, 5), (1, 1), (1, 2)),
    "one": ((1, 1), (1, 1), (0, 0)),
    "even": ((4, 4), (1, 1), None),
    "even_in_one_dimension": ((3, 2), (1, 1), None),
    "even_dilated": ((2, 4), (2, 2), (1, 3)),
    "odd_dilated": ((3, 3), (2, 3), (2, 3)),
}


@pytest.mark.parametrize("case", SAME)
def test_same_padding_is_numbers_where_it_is_symmetric(case: str) -> None:
    kernel, dilation, padding = SAME[case]
    found = read(
        aten.conv2d.padding,
        (2, 4, 9, 9),
        (6, 4, *kernel),
        None,
        after=([1, 1], "same", list(dilation)),
    )
    assert found.padding == padding
    if padding is not None:
        x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
        weight = torch.randn(6, 4, *kernel, generator=torch.Generator().manual_seed(2))
        # The same kernel on the same numbers gives the same bits.
        assert torch.equal(
            F.conv2d(x, weight, padding=padding, dilation=dilation),
            F.conv2d(x, weight, padding="same", dilation=dilation),
        )


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_valid_padding_is_none_at_all(spatial: int) -> None:
    target = (aten.conv1d, aten.conv2d, aten.conv3d)[spatial - 1].padding
    # "valid" is also what is meant where the argument is left out.
    for after in ((), ([1] * spatial, "valid")):
        found = read(target, (2, 4, *[9] * spatial), (6, 4, *[4] * spatial), (6,), after=after)
        assert found.padding == (0,) * spatial


def test_a_linear_layer() -> None:
    found = read(aten.linear.default, (2, 5, 4), (6, 4), (6,))
    assert found.node.args == (found.x, found.weight, found.bias)
    assert settings(found) == {
        "stride": (),
        "padding": (),
        "dilation": (),
        "output_padding": (),
        "transposed": False,
        "groups": 1,
        "linear": True,
        "spatial": 0,
        "out_channels": 6,
        "channel_dim": -1,
    }
    assert read(aten.linear.default, (2, 5, 4), (6, 4)).bias is None


def test_a_linear_call_that_is_no_layer_is_none() -> None:
    # A vector as weight gives a result without features.
    assert read(aten.linear.default, (5, 4), (4,)) is None
    # A bias that only fits by broadcasting has not one number a feature.
    assert read(aten.linear.default, (5, 4), (6, 4), (1,)) is None
    assert read(aten.linear.default, (5, 4), (6, 4), (5, 6)) is None


def test_what_is_no_convolution_is_none() -> None:
    assert read(aten.relu.default, (2, 4, 9, 9)) is None
    assert read(aten.mm.default, (5, 4), (4, 6)) is None
    assert convolution_of(fx.Graph().placeholder("x")) is None
    assert convolution_of(None) is None
    assert convolution_of(1.5) is None


CAPTURED: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), {"stride": (2,)}),
    "conv2d": (nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9), {"dilation": (2, 2)}),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 5, 5), {"padding": (1, 1, 1)}),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9), {"padding": (1, 1)}),
    "same_even": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 9), {"padding": None}),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 9), {"padding": (0, 0)}),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 9, 9), {"channel_dim": -3}),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), {"transposed": True}),
    "transposed2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        (2, 4, 5, 5),
        {"output_padding": (1, 1), "groups": 2, "out_channels": 6},
    ),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3), {"transposed": True}),
    "linear": (nn.Linear(4, 6), (2, 3, 4), {"linear": True, "out_channels": 6}),
}


@pytest.mark.parametrize("case", CAPTURED)
def test_what_capture_gives_is_recognised(case: str) -> None:
    module, shape, expected = CAPTURED[case]
    nodes = captured(module.eval(), torch.randn(shape)).graph_module.graph.nodes
    found = [each for each in map(convolution_of, nodes) if each is not None]
    assert len(found) == 1
    assert {name: settings(found[0])[name] for name in expected} == expected
    assert (found[0].weight.target, found[0].bias.target) == ("weight", "bias")
    # The channels are where it says, whatever the rank.
    assert found[0].node.meta["val"].shape[found[0].channel_dim] == found[0].out_channels


SCALED: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed_grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed_depthwise": lambda: nn.ConvTranspose2d(4, 4, 3, groups=4),
    "transposed_depthwise_widening": lambda: nn.ConvTranspose2d(4, 12, 3, groups=4),
    "transposed_narrowing": lambda: nn.ConvTranspose2d(4, 2, 3, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
    "linear": lambda: nn.Linear(4, 6),
}


@pytest.mark.parametrize("case", SCALED)
def test_scale_weight_scales_the_output_channels(case: str) -> None:
    module = SCALED[case]().double().eval()
    dims = module.weight.dim() - 2
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    nodes = captured(module, x).graph_module.graph.nodes
    (found,) = [each for each in map(convolution_of, nodes) if each is not None]
    scale = torch.linspace(-2.0, 3.0, found.out_channels, dtype=torch.float64)
    weight = module.weight.detach()
    before = weight.clone()
    scaled = found.scale_weight(weight, scale)
    assert scaled.shape == weight.shape
    assert torch.equal(weight, before)

    def run(using: torch.Tensor) -> torch.Tensor:
        return found.node.target(x, using, None, *found.node.args[3:])

    expected = run(weight) * scale.reshape(-1, *[1] * dims)
    # Sums of at most a hundred float64 products of size one.
    assert torch.allclose(run(scaled), expected, rtol=0, atol=1e-12)


def test_with_constants_keeps_all_else() -> None:
    found = read(
        aten.conv2d.padding, (2, 4, 9, 9), (6, 2, 3, 3), None, after=([1, 1], "same", [2, 1], 2)
    )
    graph = found.node.graph
    weight, bias = graph.placeholder("weight"), graph.placeholder("bias")
    assert found.with_constants(weight, bias) == (found.x, weight, bias, [1, 1], "same", [2, 1], 2)
    assert found.with_constants(weight, None)[2] is None


def test_with_constants_where_the_call_names_no_bias() -> None:
    found = read(aten.conv2d.default, (2, 4, 9, 9), (6, 4, 3, 3))
    bias = found.node.graph.placeholder("bias")
    assert found.with_constants(found.weight, bias) == (found.x, found.weight, bias)
