"""Lanes: which channel each element belongs to, against torch moving the channels' numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optfuse.capture import capture
from optfuse.graph import placeholders, value
from optfuse.lanes import channels_along, channels_in, followed, lanes_along, passage, per_channel
from optfuse.stages import LoadedModel
from tests.harness import captured

CHANNELS = 24


class Function(nn.Module):
    """A function of one tensor."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self._function(x)


def walk(function: Callable[[torch.Tensor], Any], x: torch.Tensor, dim: int) -> dict[fx.Node, Any]:
    """The lanes of every node of the captured function that has some, its input's along `dim`."""
    graph = captured(Function(function), x).graph_module.graph
    (start,) = placeholders(graph)
    known: dict[fx.Node, Any] = {start: lanes_along(value(start), dim)}
    for node in graph.nodes:
        if node.args and node.args[0] in known:
            found = followed(node, known[node.args[0]])
            if found is not None:
                known[node] = found
    return known


def written_out(lanes: torch.Tensor) -> torch.Tensor:
    """The channel of every element."""
    numbers = torch.full(lanes.shape, int(lanes.storage_offset()))
    for dim, (size, stride) in enumerate(zip(lanes.shape, lanes.stride(), strict=True)):
        shape = [-1 if each == dim else 1 for each in range(lanes.dim())]
        numbers = numbers + (torch.arange(size) * stride).reshape(shape)
    return numbers


MOVES: dict[str, tuple[int, Callable[[torch.Tensor], Any]]] = {
    "cut_into_factors": (-1, lambda x: x.view(2, 5, 3, 2, 4)),
    "query_of_three": (-1, lambda x: x.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[0]),
    "value_of_three": (-1, lambda x: x.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)[2]),
    "chunk": (-1, lambda x: x.chunk(3, -1)[1]),
    "split": (-1, lambda x: x.split([4, 20], -1)[1]),
    "slice": (-1, lambda x: x[..., 3:17:2]),
    "select": (-1, lambda x: x[:, :, 7]),
    "token": (-1, lambda x: x[:, 0]),
    "heads_joined_again": (
        -1,
        lambda x: x.view(2, 5, 4, 6).transpose(1, 2).transpose(1, 2).reshape(2, 5, 24),
    ),
    "copied_in_another_order": (-1, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "one_more_and_one_less": (-1, lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1)),
    "expanded": (-1, lambda x: x.unsqueeze(0).expand(7, -1, -1, -1)),
    "other_dimensions_joined": (-1, lambda x: x.view(10, 24).t()),
    "windows": (-1, lambda x: x.view(2, 5, 1, 24).permute(0, 2, 1, 3).reshape(-1, 24)),
    "rolled_and_flipped": (-1, lambda x: x.roll(2, 1).flip(0)),
    "first_dimension": (0, lambda x: x.unsqueeze(-1).expand(24, 3, 2).permute(2, 0, 1)),
}


@pytest.mark.parametrize("case", MOVES)
def test_what_moves_channels_is_followed(case: str) -> None:
    dim, function = MOVES[case]
    shape = (2, 5, CHANNELS) if dim == -1 else (CHANNELS, 3)
    numbers = torch.arange(CHANNELS)
    elements = (numbers if dim == -1 else numbers[:, None]).expand(shape).contiguous()
    known = walk(function, elements, dim)
    node, found = list(known.items())[-1]
    assert node in node.graph.output_node().all_input_nodes
    assert passage(node) == "moves"
    assert torch.equal(written_out(found), function(elements))


LOST: dict[str, tuple[int, Callable[[torch.Tensor], Any]]] = {
    "joined_with_places": (-1, lambda x: x.transpose(1, 2).reshape(2, 120)),
    "batch_joined_with_heads": (-1, lambda x: x.view(2, 5, 4, 6).transpose(1, 2).reshape(8, 5, 6)),
    "rolled_along_the_channels": (-1, lambda x: x.roll(1, -1)),
    "flipped_along_the_channels": (-1, lambda x: x.flip(-1)),
    "rolled_over_everything": (-1, lambda x: x.roll(1)),
    "mean_of_the_channels": (-1, lambda x: x.double().mean(-1)),
    "pooled_along_the_channels": (-1, lambda x: F.avg_pool1d(x.double(), 2)),
    "padded_along_the_channels": (-1, lambda x: F.pad(x, (1, 1))),
    "picked": (-1, lambda x: x[..., torch.tensor([3, 1])]),
    "added": (-1, lambda x: x + x),
}


@pytest.mark.parametrize(
    ("shape", "joined"), [((CHANNELS, 1, 5), (-1,)), ((2, CHANNELS, 1, 1, 5), (2, -1))]
)
def test_channels_are_not_joined_with_places_over_a_dimension_of_size_one(
    shape: tuple[int, ...], joined: tuple[int, ...]
) -> None:
    """torch's fake view takes both sides of such a dimension for one piece, whatever their strides:
    one number for all elements then went into the first channel alone."""
    x = torch.zeros(shape)
    dim = shape.index(CHANNELS)
    assert [node.op for node in walk(lambda x: x.view(joined), x, dim)] == ["placeholder"]
    # Where the other dimensions are of size one as well, there is nothing to join them with.
    x = torch.arange(CHANNELS).reshape(1, CHANNELS, 1, 1)
    *_, found = walk(lambda x: x.view(-1), x, 1).values()
    assert torch.equal(written_out(found), x.view(-1))


@pytest.mark.parametrize("case", LOST)
def test_what_mixes_channels_is_not_followed(case: str) -> None:
    dim, function = LOST[case]
    known = walk(function, torch.arange(CHANNELS).expand(2, 5, CHANNELS).contiguous(), dim)
    assert not any(node.graph.output_node() in node.users for node in known)


PASSED: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "avg_pool2d": ("averages", lambda x: F.avg_pool2d(x, 2)),
    "avg_pool2d_ceil": ("averages", lambda x: F.avg_pool2d(x, 2, ceil_mode=True)),
    "avg_pool2d_padded": ("scales", lambda x: F.avg_pool2d(x, 3, padding=1)),
    "avg_pool2d_divided": ("scales", lambda x: F.avg_pool2d(x, 2, divisor_override=3)),
    "adaptive_avg_pool2d": ("averages", lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    "mean": ("averages", lambda x: x.mean((2, 3))),
    "mean_kept": ("averages", lambda x: x.mean(-1, keepdim=True)),
    "mean_of_the_batch": ("averages", lambda x: x.mean(0)),
    "sum": ("scales", lambda x: x.sum((2, 3))),
    "nearest": ("averages", lambda x: F.interpolate(x, scale_factor=2)),
    "nearest_exact": (
        "averages",
        lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
    ),
    "bilinear": ("averages", lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear")),
    "bilinear_corners": (
        "averages",
        lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
    ),
    "bicubic": ("averages", lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
    "zeros": ("scales", lambda x: F.pad(x, (0, 1, 2, 0))),
    "constant_pad_nd": ("scales", lambda x: torch.constant_pad_nd(x, (1, 1))),
    "reflected": ("moves", lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect")),
    "replicated": ("moves", lambda x: F.pad(x, (1, 1, 2, 2), mode="replicate")),
    "circular": ("moves", lambda x: F.pad(x, (1, 1, 2, 2), mode="circular")),
}


@pytest.mark.parametrize("case", PASSED)
def test_what_calculates_each_channel_by_itself_passes_on_scales_and_shifts(case: str) -> None:
    expected, function = PASSED[case]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 6, 7, generator=generator, dtype=torch.float64)
    known = walk(function, x, 1)
    node, found = list(known.items())[-1]
    assert passage(node) == expected
    scale = torch.randn(4, generator=generator, dtype=torch.float64)
    shift = torch.randn(4, generator=generator, dtype=torch.float64) + 2.0
    numbers = written_out(found)
    assert numbers.shape == function(x).shape
    # What happens in front of it comes out behind it, channel by channel, but for float64
    # rounding: the shift only where the operator says so.
    before = function(x * scale.reshape(4, 1, 1))
    torch.testing.assert_close(before, function(x) * scale[numbers], rtol=1e-12, atol=1e-12)
    before = function(x + shift.reshape(4, 1, 1))
    kept = torch.allclose(before, function(x) + shift[numbers], rtol=1e-12, atol=1e-12)
    assert kept == (expected != "scales")


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: F.pad(x, (1, 1), value=0.5),
        lambda x: x.mean(-1, dtype=torch.float32),
        lambda x: F.max_pool2d(x, 2),
        lambda x: x.sort(-1)[0],
    ],
)
def test_what_passes_on_neither(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = captured(Function(function), torch.ones(1, 4, 6, 6).double()).graph_module.graph
    assert [passage(node) for node in graph.nodes if node.op == "call_function"][-1] is None


def test_sizes_that_are_known_only_when_it_runs() -> None:
    def query(x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[1]

    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    model = LoadedModel("test", Function(query), (torch.ones(2, 5, 24),), {}, (dims,))
    graph = capture(model).graph_module.graph
    (start,) = placeholders(graph)
    known: dict[fx.Node, Any] = {start: lanes_along(value(start), -1)}
    for node in graph.nodes:
        if node.args and node.args[0] in known and passage(node) is not None:
            known[node] = followed(node, known[node.args[0]])
    last = list(known.values())[-1]
    assert last.stride() == (0, 4, 0, 1)
    assert last.storage_offset() == 8
    assert torch.equal(channels_in(last, 24), (torch.arange(24) // 8) == 1)


def test_a_channel_that_is_known_only_when_it_runs_is_not_followed() -> None:
    class Chosen(nn.Module):
        def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
            return x.select(1, which)

    dynamic = (None, torch.export.Dim.DYNAMIC)
    model = LoadedModel("test", Chosen(), (torch.ones(3, 24), 7), {}, dynamic)
    graph = capture(model).graph_module.graph
    (chosen,) = [node for node in graph.nodes if node.name.startswith("select")]
    assert followed(chosen, lanes_along(value(placeholders(graph)[0]), -1)) is None


def lanes_of(function: Callable[[torch.Tensor], torch.Tensor], dim: int = -1) -> torch.Tensor:
    """The lanes of the function's result; its input is (2, 5, 24)."""
    found = list(walk(function, torch.ones(2, 5, CHANNELS), dim).values())[-1]
    assert isinstance(found, torch.Tensor)
    return found


def test_a_constant_as_one_number_a_channel() -> None:
    lanes = lanes_of(lambda x: x.view(2, 5, 3, 2, 4)[:, :, 1])
    heads = torch.tensor([[2.0], [3.0]])
    found = per_channel(lanes, heads, CHANNELS, otherwise=1.0)
    assert found is not None
    assert found.tolist() == [1.0] * 8 + [2.0] * 4 + [3.0] * 4 + [1.0] * 8
    each = torch.arange(8.0).reshape(2, 4)
    found = per_channel(lanes, each, CHANNELS, otherwise=0.0)
    assert found is not None
    assert found.tolist() == [0.0] * 8 + list(range(8)) + [0.0] * 8


def test_a_constant_with_several_numbers_a_channel_is_none() -> None:
    lanes = lanes_of(lambda x: x.view(2, 5, 3, 2, 4)[:, :, 1])
    assert per_channel(lanes, torch.ones(5, 1, 1), CHANNELS, otherwise=1.0) is None
    assert per_channel(lanes, torch.ones(2, 1, 1, 1), CHANNELS, otherwise=1.0) is None


def test_channels_along_a_dimension() -> None:
    lanes = lanes_of(lambda x: x[..., 2:20:3])
    found = channels_along(lanes, -1)
    assert found is not None
    assert found.tolist() == [2, 5, 8, 11, 14, 17]
    assert channels_along(lanes, 1) is None
    one = channels_along(lanes_of(lambda x: x[..., 7]), -1)
    assert one is not None
    assert one.tolist() == [7] * 5
