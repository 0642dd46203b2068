"""Weights for channels in another order."""

import pytest
import torch
from torch import Tensor, nn

from optfuse.convolution import convolution_of
from optfuse.routing.absorbers import reordered_weight
from tests.harness import captured, scramble

# Sums are taken in another order: a few units of 1e-16 in float64.
SUMMED_OTHERWISE = 1e-14


def together(groups: int, size: int, places: list[int], seed: int) -> Tensor:
    """A random order of channels that leaves each group a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    each = size // groups
    return torch.cat([place * each + torch.randperm(each, generator=generator) for place in places])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_reordered_weight_gives_reordered_results(
    rank: int, groups: int, transposed: bool
) -> None:
    plain = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    back = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
    layer = (back if transposed else plain)(6, 12, 2, groups=groups, bias=False)
    x = torch.randn(2, 6, *[3] * rank, generator=torch.Generator().manual_seed(1)).double()
    program = captured(scramble(layer).double(), x)
    (convolution,) = filter(None, map(convolution_of, program.graph_module.graph.nodes))
    places = torch.randperm(groups, generator=torch.Generator().manual_seed(2)).tolist()
    inputs, outputs = together(groups, 6, places, 3), together(groups, 12, places, 4)
    with torch.no_grad():
        expected = layer(x)[:, outputs]
        layer.weight.copy_(
            reordered_weight(convolution, layer.weight.detach().clone(), inputs, outputs)
        )
        moved = torch.linalg.vector_norm(layer(x[:, inputs]) - expected)
    assert moved <= SUMMED_OTHERWISE * torch.linalg.vector_norm(expected)


def test_a_linear_layer() -> None:
    layer = scramble(nn.Linear(3, 4, bias=False)).double()
    program = captured(layer, torch.randn(2, 3).double())
    (convolution,) = filter(None, map(convolution_of, program.graph_module.graph.nodes))
    weight = layer.weight.detach()
    moved = reordered_weight(
        convolution, weight, torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    )
    assert torch.equal(moved, weight[[3, 1, 0, 2]][:, [2, 0, 1]])
