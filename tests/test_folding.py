"""Folded layers: their constants against the layer itself, and when they are refused or shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from optfuse.convolution import Affine, Convolution, convolution_of
from optfuse.folding import Folded, FoldedLayers, fold_input, fold_output, why_not_held
from optfuse.graph import Edit, constant_of, kind, prepare
from optfuse.stages import Program
from tests.harness import captured, scramble

# Float64 sums of up to 40 products of numbers of size one.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), (2, 4, 7, 6)),
    "conv2d_no_bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 1), (2, 4, 7, 6)),
    "grouped_transposed": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 7, 6)),
    "depthwise_transposed": (lambda: nn.ConvTranspose1d(4, 8, 1, groups=4), (2, 4, 7)),
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4)),
    "linear_no_bias": (lambda: nn.Linear(4, 6, bias=False), (4,)),
}


def program_of(module: nn.Module, *shape: int) -> Program:
    module = scramble(module.double())
    generator = torch.Generator().manual_seed(3)
    program = captured(module, torch.randn(shape, generator=generator, dtype=torch.float64))
    prepare(program.graph_module)
    return program


def layer_of(program: Program, index: int = 0) -> Convolution:
    found = [convolution_of(node) for node in program.graph_module.graph.nodes]
    return [each for each in found if each is not None][index]


def affine(channels: int) -> Affine:
    generator = torch.Generator().manual_seed(5)
    scale, shift = torch.randn(2, channels, generator=generator, dtype=torch.float64) + 0.5
    return Affine(scale, shift)


def with_constants(module: nn.Module, folded: Folded | str) -> nn.Module:
    """The module with the folded constants in it."""
    assert isinstance(folded, Folded)
    module.weight = nn.Parameter(folded.weight, requires_grad=False)
    module.bias = None if folded.bias is None else nn.Parameter(folded.bias, requires_grad=False)
    return module


def shaped(numbers: torch.Tensor, layer: Convolution) -> torch.Tensor:
    return numbers.reshape(-1, *[1] * layer.spatial)


@pytest.mark.parametrize("name", LAYERS)
def test_what_stands_in_front_of_a_layer(name: str) -> None:
    make, shape = LAYERS[name]
    module = make()
    program = program_of(module, *shape)
    layer, (x,) = layer_of(program), program.example_args
    assert layer.in_channels == 4
    assert layer.why_no_shift() is None
    each = affine(4)
    expected = module(x * shaped(each.scale, layer) + shaped(each.shift, layer))
    found = with_constants(module, fold_input(layer, each))(x)
    torch.testing.assert_close(found, expected, **FLOAT64)


@pytest.mark.parametrize("name", LAYERS)
def test_what_stands_behind_a_layer(name: str) -> None:
    make, shape = LAYERS[name]
    module = make()
    program = program_of(module, *shape)
    layer, (x,) = layer_of(program), program.example_args
    each = affine(layer.out_channels)
    expected = module(x) * shaped(each.scale, layer) + shaped(each.shift, layer)
    found = with_constants(module, fold_output(layer, each))(x)
    torch.testing.assert_close(found, expected, **FLOAT64)


def test_a_bias_comes_only_with_a_shift() -> None:
    layer = layer_of(program_of(nn.Conv2d(4, 6, 3, bias=False), 2, 4, 7, 6))
    for fold, channels in ((fold_input, 4), (fold_output, 6)):
        each = affine(channels)
        folded = fold(layer, Affine(each.scale, torch.zeros_like(each.shift)))
        assert isinstance(folded, Folded)
        assert folded.bias is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), "pads with zeros"),
        (nn.Conv2d(4, 6, 3, padding=(0, 1)), "pads with zeros"),
        (nn.Conv2d(4, 6, 3, padding="same"), "pads with zeros"),
        (nn.Conv2d(4, 6, 2, padding="same"), "pads with zeros"),
        (nn.Conv2d(4, 6, 1, padding=1), "pads with zeros"),
        (nn.ConvTranspose2d(4, 6, 3), "is transposed"),
        (nn.ConvTranspose2d(4, 6, 1, stride=2), "is transposed"),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), "is transposed"),
        (nn.Conv2d(4, 6, 3, padding="valid"), None),
        (nn.Conv2d(4, 6, 1, padding="same"), None),
    ],
    ids=str,
)
def test_where_a_shift_would_not_be_the_same_everywhere(
    module: nn.Module, reason: str | None
) -> None:
    layer = layer_of(program_of(module, 2, 4, 7, 6))
    found = layer.why_no_shift()
    assert found is None if reason is None else (found or "").startswith(reason)
    # And so it is: one number in front comes out as several numbers behind.
    given = torch.full((1, 4, 7, 6), 1.5, dtype=torch.float64)
    given = (module(given) - module(torch.zeros_like(given))).detach()
    spread = (given.amax((2, 3)) - given.amin((2, 3))).max()
    assert (float(spread) > 1e-3) == (reason is not None)


def test_output_padding_has_no_shift() -> None:
    # The places that it adds see nothing of the input.
    module = nn.ConvTranspose2d(4, 6, 1, stride=1, dilation=2, output_padding=1)
    found = layer_of(program_of(module, 2, 4, 7, 6)).why_no_shift()
    assert found is not None
    assert found.startswith("is transposed")


@pytest.mark.parametrize("held_in", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_a_dtype_holds_well(held_in: torch.dtype) -> None:
    numbers = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert why_not_held("weight", numbers, held_in) is None
    assert why_not_held("weight", torch.zeros(3, dtype=torch.float64), held_in) is None
    # Some that are small beside the others do not count.
    assert why_not_held("weight", torch.tensor([1.0, 3e-8]).double(), held_in) is None


@pytest.mark.parametrize(
    ("numbers", "dtype", "reason"),
    [
        (7e4, torch.float16, "the folded scale is not finite in float16"),
        (float("nan"), torch.float64, "the folded scale is not finite in float64"),
        (1.3e-7, torch.float16, "the folded scale is too small to be held in float16"),
        (1e-50, torch.bfloat16, "the folded scale is too small to be held in bfloat16"),
        (1.7e-44, torch.float32, "the folded scale is too small to be held in float32"),
    ],
)
def test_numbers_that_a_dtype_does_not_hold(
    numbers: float, dtype: torch.dtype, reason: str
) -> None:
    assert why_not_held("scale", torch.tensor([numbers], dtype=torch.float64), dtype) == reason


class Twice(nn.Module):
    """A layer that runs twice, and one that an embedding is tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.layer(self.embedding(tokens))))


def twice() -> Program:
    program = captured(scramble(Twice().double()), torch.arange(6).reshape(2, 3))
    prepare(program.graph_module)
    return program


def test_a_layer_that_runs_twice_gets_one_set_of_constants() -> None:
    program = twice()
    graph = program.graph_module.graph
    layers, edit = FoldedLayers(graph), Edit(program.graph_module)
    first, second = layer_of(program, 0), layer_of(program, 1)
    made = []
    for old in (first, second):
        folded = fold_input(old, affine(4))
        assert isinstance(folded, Folded)
        assert layers.why_held(folded) is None
        made.append(layers.call(edit, folded, folded.convolution.x, [folded.convolution.node]))
        assert made[-1].meta["origins"] == (folded.convolution.node.name,)
    assert made[0].args[1:] == made[1].args[1:]
    assert [node.target for node in made[0].args[1:]] == [
        "layer_weight_folded",
        "layer_bias_folded",
    ]
    other = fold_input(second, Affine(affine(4).scale * 2, affine(4).shift))
    assert isinstance(other, Folded)
    third = layers.call(edit, other, other.convolution.x, [other.convolution.node])
    assert third.args[1] not in made[0].args
    assert third.args[2] is made[0].args[2]


def test_a_constant_is_not_shared_with_what_runs_before_it() -> None:
    program = twice()
    graph = program.graph_module.graph
    layers, edit = FoldedLayers(graph), Edit(program.graph_module)
    first, second = layer_of(program, 0), layer_of(program, 1)
    made: list[fx.Node] = []
    for old in (second, first):
        folded = fold_input(old, affine(4))
        assert isinstance(folded, Folded)
        made.append(layers.call(edit, folded, folded.convolution.x, [folded.convolution.node]))
    assert made[0].args[1] is not made[1].args[1]
    graph.lint()  # every constant stands in front of its users


def test_a_weight_that_something_else_reads_is_not_held_twice() -> None:
    program = twice()
    folded = fold_input(layer_of(program, 2), affine(4))
    assert isinstance(folded, Folded)
    assert FoldedLayers(program.graph_module.graph).why_held(folded) == (
        "embedding (embedding) reads the same weight, which would have to be held twice"
    )


def test_the_models_own_constants_are_not_written() -> None:
    program = program_of(nn.Conv2d(4, 6, 3), 2, 4, 7, 6)
    layer = layer_of(program)
    kept = [constant_of(node).clone() for node in (layer.weight, layer.bias)]  # type: ignore[union-attr]
    fold_input(layer, affine(4))
    fold_output(layer, affine(6))
    assert kind(layer.node) == "conv2d"
    now = [constant_of(node) for node in (layer.weight, layer.bias)]
    # Bit for bit: they are the caller's.
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
