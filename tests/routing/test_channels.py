"""Which channel stands where, compared with what PyTorch does to a tensor of numbered channels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optfuse.routing.channels import Channels, joined, routed
from tests.harness import captured

SHAPE = (2, 12, 3, 5)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def channels_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Channels | None:
    """The channels of what the function gives, followed operator by operator."""
    graph = captured(Calls(function), torch.randn(shape)).graph_module.graph
    known: dict[object, object] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = Channels.of(np.arange(shape[1]), 1, shape)
        elif node.op == "call_function":
            known[node] = routed(node, known)  # type: ignore[arg-type]
    found = known[graph.output_node().all_input_nodes[0]]
    assert found is None or isinstance(found, Channels)
    return found


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every element another number."""
    return torch.arange(int(np.prod(shape))).reshape(shape)


MOVES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.view(2, 3, 4, 3, 5).transpose(1, 2).reshape(SHAPE),
    lambda x: x.view(2, 3, 4, 15).permute(0, 2, 1, 3).reshape(SHAPE),
    lambda x: x.view(2, 2, 3, 2, 3, 5).permute(0, 3, 1, 2, 4, 5).reshape(SHAPE),
    lambda x: x.view(2, 2, 3, 2, 15).transpose(1, 3).reshape(2, 6, 2, 3, 5).transpose(1, 2)
    .reshape(SHAPE),
    lambda x: x.view(24, 15).view(2, 4, 3, 15).transpose(1, 2).reshape(SHAPE),
    lambda x: x.permute(2, 0, 3, 1)[..., ::3].permute(1, 3, 0, 2),
    lambda x: x.permute(1, 0, 2, 3).flip(0).permute(1, 0, 2, 3),
    lambda x: x[:, 2:-1][:, ::4],
    lambda x: x.view(2, 6, 2, 3, 5)[:, 1:4, 1],
    lambda x: x.view(12, 2, 15).permute(1, 0, 2).reshape(2, 2, 6, 3, 5)[1],
    lambda x: torch.cat([x[:, 5:], x.flip(1)[:, :2], x], 1),
    lambda x: torch.cat(x.view(2, 4, 3, 3, 5).chunk(2, 1), 2).reshape(SHAPE),
    lambda x: torch.stack(x.split(4, 1), 2).flatten(1, 2),
    lambda x: torch.stack(x.unbind(1)[::-2], -3),
    lambda x: x.roll(-5, 1).unsqueeze(1).squeeze(1),
    lambda x: nn.ChannelShuffle(6)(x),
]  # fmt: skip


@pytest.mark.parametrize("function", MOVES)
def test_a_tensor_whose_channels_were_moved(function: Callable[[Tensor], Tensor]) -> None:
    found = channels_of(function, SHAPE)
    assert found is not None
    assert found.in_place
    x = numbered(SHAPE)
    assert torch.equal(function(x), x[:, torch.from_numpy(found.order.copy())])


@pytest.mark.parametrize("shape", [(1, 12, 3, 5), (2, 12, 1, 1), (1, 4, 1, 1), (2, 4)])
def test_dimensions_of_size_1_are_in_no_way(shape: tuple[int, ...]) -> None:
    def function(x: Tensor) -> Tensor:
        return x.reshape(2, -1, *x.shape[2:]).flip(0).reshape(x.shape)

    found = channels_of(function, shape)
    x = numbered(shape)
    if shape[0] == 1:
        assert found is not None
        assert found.in_place
        assert torch.equal(function(x), x[:, torch.from_numpy(found.order.copy())])
    else:
        assert found is None  # it is the batch that is flipped


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.pixel_shuffle(x, 2),
        lambda x: x.view(2, 3, 2, 2, 3, 5).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 6, 10),
        lambda x: x.reshape(2, 36, 5),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.reshape(4, 6, 3, 5).transpose(0, 1).reshape(SHAPE),
        lambda x: x.transpose(1, 2).reshape(SHAPE),
        lambda x: x.reshape(2, 12, 15).transpose(1, 2).reshape(SHAPE),
        lambda x: x.flip(2),
        lambda x: x.select(1, 3),
        lambda x: x.relu(),
        lambda x: x.repeat(1, 2, 1, 1),
    ],
)
def test_what_is_not_a_move_of_channels_alone(function: Callable[[Tensor], Tensor]) -> None:
    found = channels_of(function, SHAPE)
    assert found is None or not found.in_place


def test_tensors_of_other_sizes_are_not_joined() -> None:
    one = Channels.of(np.arange(3), 1, (2, 3, 5))
    other = Channels.of(np.arange(3, 5), 1, (2, 2, 4))
    assert joined([one, other], 1) is None
    assert joined([one, one], 2) is None
    assert joined([one, Channels.of(np.arange(4), 1, (2, 4, 5))], 1) is not None
