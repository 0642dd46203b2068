"""merge_branches: which sums and pairs become one convolution, that the function stays, what is
refused, and that it settles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import repvgg_a0
from optfuse.capture import capture
from optfuse.cost import flops
from optfuse.graph import attribute, kind
from optfuse.optimize import optimize, select
from optfuse.passes.merge_branches import MergeBranches
from optfuse.stages import LoadedModel, Program
from tests.harness import (
    assert_same_function,
    captured,
    counts,
    float64_distance,
    reasons,
    scramble,
    step,
)

PASS = "merge_branches"

# Merged float64 numbers in float64: a few 1e-16 for each product and sum.
FLOAT64 = 1e-12
# The merged constants are rounded once to float32, each by at most 6e-8 of itself.
FLOAT32 = 1e-6
# Likewise in float16 and bfloat16, which keep 11 and 8 bits: at most 4.9e-4 and 3.9e-3, and twice
# that where a scale is rounded too.
HALF = 1e-3
BFLOAT16 = 8e-3


class Model(nn.Module):
    """`forward` as a function of the model and its inputs, over modules and tensors by name.

    A parameter is registered as one, any other tensor as a buffer.
    """

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self._forward(self, x, *more)


class Branches(nn.Module):
    """The sum of modules on one input."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded random numbers."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def image(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two images of four channels, 8 by 6 unless told."""
    return normal(2, 4, *(size or (8, 6)), seed=11, dtype=dtype)


def conv(kernel: int | tuple[int, ...] = 3, out: int = 4, given: int = 4, **more: Any) -> nn.Module:
    return nn.Conv2d(given, out, kernel, **more)


def depthwise(kernel: int, **more: Any) -> nn.Module:
    return nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=4, **more)


def normed(convolution: nn.Module) -> nn.Sequential:
    """A convolution without a bias of its own and a batch norm."""
    convolution.bias = None
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))


def float64(forward: Callable[..., Any] | nn.Module, **parts: nn.Module | Tensor) -> nn.Module:
    """A float64 module in eval mode with statistics that are not 0 and 1."""
    module = forward if isinstance(forward, nn.Module) else Model(forward, **parts)
    return scramble(module.double())


def passed(program: Program) -> Program:
    """The program after the pass and those in front of it; none may be undone."""
    after = optimize(program, [*select("fold_constants,fold_conv_bn"), MergeBranches()])
    assert [each.undone for each in after.trace if each.undone] == []
    return after


def merged(program: Program, expected: Mapping[str, int], tolerance: float = FLOAT64) -> Program:
    """The program after the pass: these operators, the same function, no more FLOPs, settled."""
    after = passed(program)
    assert counts(after) == dict(expected)
    assert_same_function(program, after, tolerance=tolerance)
    assert flops(after) <= flops(program)
    again = passed(after)
    assert counts(again) == counts(after)
    assert [each.name for each in again.trace[len(after.trace) :] if each.matched] == []
    return after


def refused(program: Program, *expected: str) -> None:
    """The pass leaves the program as it is, for these reasons."""
    after = optimize(program, [MergeBranches()])
    assert counts(after) == counts(program)
    assert reasons(after, PASS) == list(expected)


def notes(program: Program) -> list[str]:
    return [site.note for site in step(program, PASS).sites]


def weights(program: Program) -> list[tuple[int, ...]]:
    """The shapes of the convolutions' weights, in graph order."""
    found = [n for n in program.graph_module.graph.nodes if kind(n).startswith(("conv", "linear"))]
    return [tuple(attribute(program.graph_module, n.args[1].target).shape) for n in found]


# Blocks from papers -------------------------------------------------------------------------------


def test_repvgg_has_22_convolutions_left_and_no_batch_norm_and_no_sum() -> None:
    before = captured(repvgg_a0.build(), *repvgg_a0.example_inputs())
    assert counts(before) == {
        "batch_norm": 61,
        "conv2d": 44,
        "add": 39,
        "relu": 22,
        "adaptive_avg_pool2d": 1,
        "clone": 1,
        "linear": 1,
        "view": 1,
    }
    after = optimize(before, [*select("eliminate_identity,fold_conv_bn"), MergeBranches()])
    assert counts(after) == {
        "conv2d": 22,
        "relu": 22,
        "adaptive_avg_pool2d": 1,
        "linear": 1,
        "view": 1,
    }
    assert reasons(after, PASS) == []
    # 22 convolutions behind each other, each with constants rounded to float32.
    assert_same_function(before, after, tolerance=FLOAT32)
    # The proof itself has float64 constants.
    assert step(after, PASS).relative_l2 < 1e-13


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_repvgg_block(stride: int, groups: int) -> None:
    settings = {"stride": stride, "groups": groups}
    branches = [normed(conv(3, padding=1, **settings)), normed(conv(1, **settings))]
    if stride == 1:
        branches.append(nn.BatchNorm2d(4))
    before = captured(float64(Branches(*branches)), image())
    assert counts(before) == {
        "conv2d": 2,
        "batch_norm": len(branches),
        "add": len(branches) - 1,
    }
    after = merged(before, {"conv2d": 1})
    assert weights(after) == [(4, 4 // groups, 3, 3)]
    assert notes(after) == [f"{len(branches)} branches on x into one 3x3 convolution"]


class MobileOne(nn.Module):
    """Vasu et al., "MobileOne", CVPR 2023: several convolutions of one kind, a 1x1 one where the
    kernel is larger, and a batch norm, all on one input."""

    def __init__(self, kernel: int, groups: int, branches: int = 3, stride: int = 1) -> None:
        super().__init__()
        settings = {"stride": stride, "groups": groups}
        self.convolutions = nn.ModuleList(
            normed(conv(kernel, padding=kernel // 2, **settings)) for _ in range(branches)
        )
        self.scale = normed(conv(1, **settings)) if kernel > 1 else None
        self.skip = nn.BatchNorm2d(4) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        total = 0 if self.scale is None else self.scale(x)
        total = total if self.skip is None else total + self.skip(x)
        for each in self.convolutions:
            total = total + each(x)
        return F.relu(total)


@pytest.mark.parametrize(
    ("kernel", "groups", "stride"), [(3, 4, 1), (3, 4, 2), (1, 1, 1), (1, 1, 2), (7, 4, 1)]
)
def test_mobileone_block(kernel: int, groups: int, stride: int) -> None:
    before = captured(float64(MobileOne(kernel, groups, stride=stride)), image())
    assert counts(before)["conv2d"] == 3 + (kernel > 1)
    # The first sum of a 1x1 block has a zero in it.
    after = merged(before, {"conv2d": 1, "relu": 1})
    assert weights(after) == [(4, 4 // groups, kernel, kernel)]


def test_repghost_module() -> None:
    """Chen et al., "RepGhost", 2022: a depthwise convolution and a batch norm on ghost features."""
    before = captured(
        float64(
            lambda m, x: (lambda y: F.relu(m.cheap(y) + m.fusion(y)))(F.relu(m.primary(x))),
            primary=normed(conv(1)),
            cheap=normed(depthwise(3)),
            fusion=nn.BatchNorm2d(4),
        ),
        image(),
    )
    assert counts(before) == {"conv2d": 2, "batch_norm": 3, "add": 1, "relu": 2}
    after = merged(before, {"conv2d": 2, "relu": 2})
    assert weights(after) == [(4, 4, 1, 1), (4, 1, 3, 3)]


class MobileOneMixer(MobileOne):
    """The same without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.scale(x) + self.skip(x)
        for each in self.convolutions:
            total = total + each(x)
        return total


def test_fastvit_token_mixer() -> None:
    """Vasu et al., "FastViT", ICCV 2023: x + layer_scale (mixer(x) - norm(x))."""
    before = captured(
        float64(
            lambda m, x: x + m.layer_scale * (m.mixer(x) - m.norm(x)),
            mixer=MobileOneMixer(7, 4, branches=1),
            norm=nn.BatchNorm2d(4),
            layer_scale=nn.Parameter(torch.ones(4, 1, 1)),
        ),
        image(),
    )
    assert counts(before) == {"batch_norm": 4, "add": 3, "conv2d": 2, "mul": 1, "sub": 1}
    after = merged(before, {"conv2d": 1})
    assert weights(after) == [(4, 1, 7, 7)]
    assert notes(after) == ["5 branches on x into one 7x7 convolution"]


def test_acnet_block() -> None:
    """Ding et al., "ACNet", ICCV 2019: a square, a horizontal and a vertical kernel."""
    before = captured(
        float64(
            Branches(
                normed(conv((1, 3), padding=(0, 1))),
                normed(conv(3, padding=1)),
                normed(conv((3, 1), padding=(1, 0))),
            )
        ),
        image(),
    )
    assert weights(merged(before, {"conv2d": 1})) == [(4, 4, 3, 3)]


def test_dilated_reparameterisation_block() -> None:
    """Ding et al., "UniRepLKNet", CVPR 2024: a large kernel and dilated ones within it."""
    dilated = [(5, 1), (3, 2), (3, 3)]
    before = captured(
        float64(
            Branches(
                normed(depthwise(7)),
                *(
                    normed(conv(k, padding=d * (k - 1) // 2, dilation=d, groups=4))
                    for k, d in dilated
                ),
            )
        ),
        image(),
    )
    assert weights(merged(before, {"conv2d": 1})) == [(4, 1, 7, 7)]


def test_lora() -> None:
    """Hu et al., "LoRA", 2022: W x + s B A x. B A on its own would take more FLOPs."""
    before = captured(
        float64(
            lambda m, x: m.linear(x) + m.up(m.down(x)) * 2.0,
            linear=nn.Linear(8, 6),
            down=nn.Linear(8, 2, bias=False),
            up=nn.Linear(2, 6, bias=False),
        ),
        normal(2, 5, 8),
    )
    after = merged(before, {"linear": 1})
    assert weights(after) == [(6, 8)]
    assert notes(after) == ["2 branches on x into one linear layer"]


# What a sum may hold ------------------------------------------------------------------------------


def test_the_numbers_of_a_merged_kernel_written_out() -> None:
    """2 (3x3 kernel) - (1x1 kernel) + (10, 20) x + (5, 7), one number a channel."""
    model = Model(
        lambda m, x: 2.0 * m.square(x) - m.point(x) + x * m.scale + m.shift,
        square=nn.Conv1d(2, 2, 3, padding=1, groups=2),
        point=nn.Conv1d(2, 2, 1, groups=2, bias=False),
        scale=torch.tensor([[10.0], [20.0]]),
        shift=torch.tensor([[5.0], [7.0]]),
    )
    with torch.no_grad():
        model.square.weight.copy_(torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]))
        model.square.bias.copy_(torch.tensor([0.5, 0.25]))
        model.point.weight.copy_(torch.tensor([[[100.0]], [[200.0]]]))
    after = merged(captured(model.double().eval(), normal(2, 2, 9)), {"conv1d": 1})
    (call,) = [n for n in after.graph_module.graph.nodes if kind(n) == "conv1d"]
    weight, bias = (attribute(after.graph_module, call.args[i].target).detach() for i in (1, 2))
    expected = torch.tensor([[[2.0, -86.0, 6.0]], [[8.0, -170.0, 12.0]]], dtype=torch.float64)
    # Whole numbers and quarters are exact in float64.
    assert torch.equal(weight, expected)
    assert torch.equal(bias, torch.tensor([6.0, 7.5], dtype=torch.float64))


SUMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "add": lambda m, x: m.a(x) + m.b(x),
    "add_alpha": lambda m, x: torch.add(m.a(x), m.b(x), alpha=3),
    "sub": lambda m, x: m.a(x) - m.b(x),
    "sub_alpha": lambda m, x: torch.sub(m.a(x), m.b(x), alpha=-0.7),
    "rsub": lambda m, x: torch.rsub(m.a(x), m.b(x), alpha=3),
    "in_place": lambda m, x: m.a(x).add_(m.b(x)).mul_(2.0),
    "negated": lambda m, x: m.a(x) + -m.b(x),
    "right_leaning": lambda m, x: m.a(x) + (x + (m.b(x) + x)),
    "scaled_sum": lambda m, x: (m.a(x) - m.b(x)) * m.c + x / m.c,
    "shifted_sum": lambda m, x: 1.5 - (m.a(x) - (m.b(x) + m.c)) - 0.5,
    "numbers": lambda m, x: 0.3 * (m.a(x) + 0.7 * m.b(x)) + x,
    "norm_of_the_sum": lambda m, x: m.norm(m.a(x) + m.b(x)),
    "norm_of_a_norm": lambda m, x: m.norm(m.a(x) + m.norm(x) * m.c),
    "identity_twice": lambda m, x: m.a(x) + x + m.norm(x),
    "identity_alone": lambda m, x: x - m.a(x),
    "scaled_by_zero": lambda m, x: m.a(x) + x * 0.0,
    "one_convolution_twice": lambda m, x: (lambda y: y + y)(m.a(x)),
    "one_convolution_in_two_sums": lambda m, x: (lambda y: (y + m.b(x)) * m.c + y)(m.a(x)),
}


@pytest.mark.parametrize("spelling", SUMS)
def test_every_spelling_of_a_sum(spelling: str) -> None:
    compute = SUMS[spelling]
    model = float64(
        lambda m, x: compute(m, x),
        a=conv(3, padding=1),
        b=conv(1, bias=False),
        norm=nn.BatchNorm2d(4),
        c=nn.Parameter(torch.ones(4, 1, 1)),
    )
    merged(captured(model, image()), {"conv2d": 1})


BESIDE: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, int]]] = {
    "activation": (lambda m, x: m.a(x) + F.relu(x) + m.b(x), {"relu": 1, "add": 1}),
    "subtracted": (lambda m, x: m.a(x) - (F.relu(x) - m.b(x)), {"relu": 1, "sub": 1}),
    "with_a_factor": (lambda m, x: m.a(x) + 0.3 * (F.relu(x) + m.b(x)), {"relu": 1, "add": 1}),
    "twice": (lambda m, x: (lambda y: m.a(x) + y + m.b(x) + y)(F.relu(x)), {"relu": 1, "add": 2}),
    "scaled": (
        lambda m, x: m.a(x) + m.c * (F.relu(x) + m.b(x)),
        {"relu": 1, "add": 1, "mul": 1},
    ),
    "scaled_together": (
        lambda m, x: m.a(x) + m.c * (F.relu(x) + m.b(x) - 0.5 * F.silu(x)),
        {"relu": 1, "silu": 1, "add": 2, "mul": 1},
    ),
    "scaled_within_scaled": (
        lambda m, x: m.a(x) - m.c * (F.relu(x) + m.norm(m.b(x) + F.silu(x) * 2.0)),
        {"relu": 1, "silu": 1, "add": 2, "mul": 2},
    ),
    "scaled_by_zero": (
        lambda m, x: m.a(x) + m.c * (0.0 * (F.relu(x) + F.silu(x)) + m.b(x)),
        {"relu": 1, "silu": 1, "add": 2, "mul": 1},
    ),
    "normed": (
        lambda m, x: m.a(x) + m.norm(F.relu(x) + m.b(x)),
        {"relu": 1, "add": 1, "mul": 1},
    ),
    "broadcast": (
        lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True) + m.b(x),
        {"mean": 1, "add": 1},
    ),
    "position": (lambda m, x: m.a(x) + m.position + m.b(x), {"add": 1}),
    "of_another_tensor": (
        lambda m, x: (lambda y: m.a(x) + m.a(y) + m.b(x) + m.b(y))(F.relu(x)),
        {"conv2d": 2, "relu": 1, "add": 1},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_else_is_added_stays(case: str) -> None:
    compute, left = BESIDE[case]
    model = float64(
        lambda m, x: compute(m, x),
        a=conv(3, padding=1),
        b=conv(1),
        norm=nn.BatchNorm2d(4),
        c=nn.Parameter(torch.ones(4, 1, 1)),
        position=nn.Parameter(torch.ones(1, 4, 8, 6)),
    )
    merged(captured(model, image()), {"conv2d": 1, **left})


def test_branches_that_cost_more_in_one_are_merged_apart() -> None:
    before = captured(
        float64(Branches(conv(1), depthwise(5), conv(1), depthwise(3), nn.Identity())), image()
    )
    after = merged(before, {"conv2d": 2, "add": 1})
    assert weights(after) == [(4, 1, 5, 5), (4, 4, 1, 1)]
    assert notes(after) == [
        "3 branches on x into one 5x5 convolution, 2 branches on x into one 1x1 convolution"
    ]
    # Now the 1x1 convolution in the 5x5 one would be 4 x 4 x 25 numbers.
    assert reasons(passed(after), PASS) == [
        "conv2d_4 and conv2d_5 in one would take 400 multiply-adds a position, and on their own "
        "they take 116"
    ]


@pytest.mark.parametrize("groups", [(4, 4), (4, 2), (2, 2), (4, 2, 1), (2, 4, 4)])
def test_groups_become_those_that_hold_all(groups: tuple[int, ...]) -> None:
    kernels = {4: 1, 2: 3, 1: 3} if 1 in groups or 2 in groups else {4: 3}
    layers = [conv(kernels[g], padding=kernels[g] // 2, groups=g) for g in groups]
    after = merged(captured(float64(Branches(*layers)), image()), {"conv2d": 1})
    assert weights(after) == [(4, 4 // min(groups), 3, 3)]


def test_a_depthwise_convolution_with_more_channels_than_it_is_given() -> None:
    more = {"out": 8, "groups": 4}
    before = captured(float64(Branches(conv(3, padding=1, **more), conv(1, **more))), image())
    assert weights(merged(before, {"conv2d": 1})) == [(8, 1, 3, 3)]


SHAPES: dict[str, tuple[list[Callable[[], nn.Module]], tuple[int, ...], str]] = {
    "strided": (
        [lambda: conv(3, stride=2, padding=1), lambda: conv(1, stride=2)],
        (3, 3),
        "[1, 1]",
    ),
    "dilated": (
        [lambda: conv(3, dilation=2, padding=2), lambda: conv(1, dilation=3), nn.Identity],
        (3, 3),
        "[2, 2]",
    ),
    "dilations_in_a_wide_one": (
        [
            lambda: conv(3, dilation=2, padding=2),
            lambda: conv(5, padding=2),
            lambda: conv(3, padding=1),
        ],
        (5, 5),
        "[2, 2]",
    ),
    "padded_pointwise": (
        [lambda: conv(1, padding=1), lambda: conv(3, padding=2)],
        (3, 3),
        "[2, 2]",
    ),
    "unpadded": ([lambda: conv(3), lambda: conv(3, groups=2)], (3, 3), "[0, 0]"),
    "even": ([lambda: conv(2), lambda: conv(4, padding=1)], (4, 4), "[1, 1]"),
    "even_beside_odd": (
        [lambda: conv(2, stride=2), lambda: conv(1, stride=2)],
        (2, 2),
        "[0, 0]",
    ),
    "shifted": (
        [
            lambda: conv(3, stride=5, padding=2),
            lambda: conv(3, stride=5),
            lambda: conv(5, stride=5, padding=2),
        ],
        (5, 5),
        "[2, 2]",
    ),
    "same": ([lambda: conv(3, padding="same"), lambda: conv(1, padding="valid")], (3, 3), "[1, 1]"),
    "same_even": (
        [lambda: conv(4, padding="same"), lambda: conv(2, padding="same"), nn.Identity],
        (4, 4),
        "same",
    ),
    "same_even_beside_odd": (
        [lambda: conv((4, 3), padding="same"), lambda: conv(3, padding=1)],
        (4, 3),
        "same",
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", SHAPES)
def test_kernels_meet_where_they_read(case: str) -> None:
    layers, kernel, padding = SHAPES[case]
    model = float64(Branches(*(make() for make in layers)))
    x = image(8, 8)
    if case == "same_even_beside_odd":
        x = image()
    after = merged(captured(model, x), {"conv2d": 1})
    (call,) = [n for n in after.graph_module.graph.nodes if kind(n) == "conv2d"]
    assert weights(after) == [(4, 4, *kernel)]
    assert str(call.args[4]) == padding


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_one_two_and_three_dimensions_batched_or_not(batch: tuple[int, ...], spatial: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    branches = [layer(4, 4, 3, padding=1), layer(4, 4, 1, groups=2, bias=False), nn.Identity()]
    before = captured(float64(Branches(*branches)), normal(*batch, 4, *[5] * spatial))
    assert weights(merged(before, {f"conv{spatial}d": 1})) == [(4, 4, *[3] * spatial)]


@pytest.mark.parametrize("shape", [(2, 5, 4), (7, 4), (4,)])
def test_linear_layers_of_any_rank(shape: tuple[int, ...]) -> None:
    model = float64(
        lambda m, x: m.a(x) - m.c * m.b(x) + x,
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4, bias=False),
        c=nn.Parameter(torch.ones(4)),
    )
    merged(captured(model, normal(*shape)), {"linear": 1})


TRANSPOSED: dict[str, tuple[list[Callable[[], nn.Module]], tuple[int, ...], list[int]]] = {
    "two_sizes": (
        [
            lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
            lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, groups=2, bias=False),
        ],
        (4, 3, 4, 4),
        [0, 0],
    ),
    "output_padding": (
        [
            lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
        ],
        (4, 4, 3, 3),
        [1, 1],
    ),
    "beside_pointwise": (
        [
            lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
            lambda: conv(1, groups=4),
            nn.Identity,
        ],
        (4, 2, 3, 3),
        [0, 0],
    ),
    "depthwise": (
        [
            lambda: nn.ConvTranspose2d(4, 8, 3, padding=1, groups=4),
            lambda: nn.ConvTranspose2d(4, 8, 1, groups=4),
        ],
        (4, 2, 3, 3),
        [0, 0],
    ),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions(case: str) -> None:
    layers, shape, output_padding = TRANSPOSED[case]
    before = captured(float64(Branches(*(make() for make in layers))), image())
    after = merged(before, {"conv_transpose2d": 1})
    (call,) = [n for n in after.graph_module.graph.nodes if kind(n) == "conv_transpose2d"]
    assert weights(after) == [shape]
    assert call.args[5] == output_padding
    assert notes(after)[0].endswith(f"one transposed {shape[2]}x{shape[3]} convolution")


def test_pointwise_transposed_convolutions_beside_a_convolution() -> None:
    layers = [nn.ConvTranspose2d(4, 4, 1), conv(3, padding=1), nn.ConvTranspose2d(4, 4, 1)]
    after = merged(captured(float64(Branches(*layers)), image()), {"conv2d": 1})
    assert weights(after) == [(4, 4, 3, 3)]


def test_a_bias_is_left_out_where_no_branch_has_one() -> None:
    before = captured(
        float64(Branches(conv(3, padding=1, bias=False), conv(1, bias=False))), image()
    )
    after = merged(before, {"conv2d": 1})
    assert len([n for n in after.graph_module.graph.nodes if n.op == "get_attr"]) == 1


def test_a_block_that_runs_twice_keeps_one_set_of_weights() -> None:
    block = Branches(conv(3, padding=1), conv(1), nn.BatchNorm2d(4))
    before = captured(float64(lambda m, x: m.block(F.relu(m.block(x))), block=block), image())
    after = merged(before, {"conv2d": 2, "relu": 1})
    constants = {n.target for n in after.graph_module.graph.nodes if n.op == "get_attr"}
    assert len(constants) == 2  # one weight and one bias


def test_a_block_that_runs_twice_and_the_first_time_vanishes_in_a_pair() -> None:
    model = float64(
        lambda m, x: m.block(F.relu(m.behind(m.block(x)))),
        block=Branches(conv(3, padding=1), conv(1)),
        behind=conv(1),
    )
    merged(captured(model, image()), {"conv2d": 2, "relu": 1})


def test_tied_weights_of_other_layers_stay_as_they_are() -> None:
    tied = conv(1)
    model = float64(
        lambda m, x: F.relu(m.a(x) + m.tied(x)) * m.tied(F.silu(x)), a=conv(1), tied=tied
    )
    kept = model.tied.weight.clone()
    before = captured(model, image())
    merged(before, {"conv2d": 2, "relu": 1, "silu": 1, "mul": 1})
    assert torch.equal(model.tied.weight, kept)


def test_sums_behind_each_other_and_a_sum_that_is_an_output() -> None:
    model = float64(
        lambda m, x: (lambda y: (y, m.two(y)))(m.one(x)),
        one=Branches(conv(3, padding=1), conv(1), nn.Identity()),
        two=Branches(conv(3, padding=1), nn.BatchNorm2d(4)),
    )
    after = merged(captured(model, image()), {"conv2d": 2})
    assert len(notes(after)) == 2


def test_a_sum_of_hundreds_of_terms() -> None:
    layers = [conv(1), conv(1)]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        total = m.a(x)
        for _ in range(300):
            total = total + x
        return total - m.b(x)

    before = captured(float64(forward, a=layers[0], b=layers[1]), image(2, 2))
    merged(before, {"conv2d": 1})


# Two convolutions behind each other ---------------------------------------------------------------

PAIRS: dict[str, tuple[list[Callable[[], nn.Module]], tuple[int, ...]]] = {
    "pointwise_behind": ([lambda: conv(3, padding=1), lambda: conv(1)], (4, 4, 3, 3)),
    "pointwise_strided_behind": (
        [lambda: conv(3, padding=1), lambda: conv(1, stride=2)],
        (4, 4, 3, 3),
    ),
    "strides_of_both": (
        [lambda: conv(1, stride=2), lambda: conv(1, stride=2)],
        (4, 4, 1, 1),
    ),
    "unpadded_behind_pointwise": ([lambda: conv(1), lambda: conv(3)], (4, 4, 3, 3)),
    "padded_behind_pointwise_without_bias": (
        [lambda: conv(1, bias=False), lambda: conv(3, padding=1)],
        (4, 4, 3, 3),
    ),
    "padded_behind_strided_pointwise_without_bias": (
        [lambda: conv(1, stride=2, bias=False), lambda: conv(3, padding=1)],
        (4, 4, 3, 3),
    ),
    "strided_behind_pointwise": (
        [lambda: conv(1, bias=False), lambda: conv((3, 2), stride=2, padding=1, dilation=2)],
        (4, 4, 3, 2),
    ),
    "padded_behind_fully_padded": (
        [
            lambda: conv((2, 1), 8, padding=(1, 0), bias=False),
            lambda: conv((2, 2), 4, 8, padding=(1, 0)),
        ],
        (4, 4, 3, 2),
    ),
    "dilated": (
        [lambda: conv((1, 3), dilation=2), lambda: conv((3, 1), dilation=3)],
        (4, 4, 3, 3),
    ),
    "wider_in_between": ([lambda: conv(1, 16), lambda: conv(1, 6, 16)], (6, 4, 1, 1)),
    "depthwise_behind_depthwise": (
        [lambda: conv(3, padding=1, groups=4), lambda: conv(1, groups=4)],
        (4, 1, 3, 3),
    ),
    "groups_behind_groups": (
        [lambda: conv(1, 8, groups=2), lambda: conv(3, 8, 8, groups=2)],
        (8, 2, 3, 3),
    ),
    "fewer_groups": (
        [lambda: conv(1, 8, groups=4), lambda: conv(1, 4, 8, groups=2)],
        (4, 2, 1, 1),
    ),
    "same_behind_pointwise": (
        [lambda: conv(1, bias=False), lambda: conv(2, padding="same")],
        (4, 4, 2, 2),
    ),
    "three": ([lambda: conv(1), lambda: conv(3), lambda: conv(1)], (4, 4, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", PAIRS)
def test_a_convolution_behind_a_convolution(case: str) -> None:
    layers, shape = PAIRS[case]
    before = captured(float64(nn.Sequential(*(make() for make in layers))), image(9, 8))
    after = merged(before, {"conv2d": 1})
    assert weights(after) == [shape]


def test_a_pair_says_what_it_became() -> None:
    after = merged(captured(float64(nn.Sequential(conv(3), conv(1))), image()), {"conv2d": 1})
    (site,) = step(after, PASS).sites
    assert site.site == "conv2d_1 (1)"
    assert site.note == "it and conv2d (0) into one 3x3 convolution"


@pytest.mark.parametrize("spatial", [1, 3])
def test_pairs_of_one_and_three_dimensions(spatial: int) -> None:
    layer = nn.Conv1d if spatial == 1 else nn.Conv3d
    model = float64(nn.Sequential(layer(4, 4, 3, padding=1), layer(4, 3, 1)))
    after = merged(captured(model, normal(2, 4, *[6] * spatial)), {f"conv{spatial}d": 1})
    assert weights(after) == [(3, 4, *[3] * spatial)]


def test_linear_layers_behind_each_other() -> None:
    model = float64(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=False), nn.Linear(5, 7)))
    # 6 x 8 and 8 x 5 are more than 6 x 5, and that with 5 x 7 is more than 6 x 7.
    after = merged(captured(model, normal(2, 3, 6)), {"linear": 1})
    assert weights(after) == [(7, 6)]


@pytest.mark.parametrize("bias", [True, False])
def test_pairs_with_a_transposed_convolution(bias: bool) -> None:
    up = {"stride": 2, "padding": 1, "output_padding": 1}
    behind = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias, **up), conv(1, 2, 6))
    after = merged(captured(float64(behind), image()), {"conv_transpose2d": 1})
    assert weights(after) == [(4, 2, 3, 3)]
    front = nn.Sequential(conv(1, 6, bias=False), nn.ConvTranspose2d(6, 4, 3, bias=bias, **up))
    after = merged(captured(float64(front), image()), {"conv_transpose2d": 1})
    assert weights(after) == [(4, 4, 3, 3)]


def test_a_pair_in_a_sum() -> None:
    """A bottleneck costs less than a 3x3 convolution, but not beside one."""
    model = float64(
        lambda m, x: m.wide(x) + m.up(m.down(x)) + x,
        wide=conv(3, padding=1),
        down=conv(1, 1, bias=False),
        up=conv(3, 4, 1, padding=1),
    )
    assert weights(merged(captured(model, image()), {"conv2d": 1})) == [(4, 4, 3, 3)]


# Dtypes, dynamic sizes, writes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, HALF), (torch.bfloat16, BFLOAT16), (torch.float32, FLOAT32)],
)
def test_constants_keep_the_dtype_of_the_model(dtype: torch.dtype, tolerance: float) -> None:
    block = scramble(
        Model(
            lambda m, x: m.branches(x) + m.c * (F.relu(x) - m.point(x)),
            branches=Branches(normed(conv(3, padding=1)), normed(conv(1)), nn.BatchNorm2d(4)),
            point=conv(1),
            c=nn.Parameter(torch.ones(4, 1, 1)),
        )
    )
    before = captured(block.to(dtype), image(dtype=dtype))
    after = merged(before, {"conv2d": 1, "relu": 1, "mul": 1, "add": 1}, tolerance)
    assert {p.dtype for p in after.graph_module.parameters()} == {dtype}
    assert value_dtypes(after) == {dtype}


def value_dtypes(program: Program) -> set[torch.dtype]:
    calls = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    return {n.meta["val"].dtype for n in calls}


def test_statistics_kept_in_float32_beside_a_float16_convolution() -> None:
    model = Model(
        lambda m, x: m.conv(x) + F.batch_norm(x, m.mean, m.var),
        conv=scramble(conv(3, padding=1)).half(),
        mean=normal(4, seed=1, dtype=torch.float32),
        var=normal(4, seed=2, dtype=torch.float32).abs() + 0.2,
    ).eval()
    merged(captured(model, image(dtype=torch.float16)), {"conv2d": 1}, HALF)


def test_dynamic_batch_and_image_size() -> None:
    branches = Branches(conv(3, padding=1), conv(1), nn.BatchNorm2d(4))
    model = float64(nn.Sequential(nn.ReLU(), branches, conv(1)))
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4)}
    before = capture(LoadedModel("dynamic", model, (image(),), {}, (dims,)))
    after = merged(before, {"conv2d": 1, "relu": 1})
    x = normal(5, 4, 11, 6)
    with torch.no_grad():
        # Sizes must not have been fixed by looking at them.
        torch.testing.assert_close(after.graph_module(x), model(x), rtol=0, atol=FLOAT64)


def unknown_size(model: nn.Module) -> Program:
    """The program of a model that takes images of any height and width."""
    dims = {2: torch.export.Dim("height", min=4), 3: torch.export.Dim("width", min=4)}
    return capture(LoadedModel("dynamic", model, (image(),), {}, (dims,)))


def test_a_pair_counts_what_is_certain_where_sizes_are_not_known() -> None:
    # With a stride of 2 there are nearly four positions for each of the result; one is certain.
    strided = float64(nn.Sequential(conv(1, 2), conv(1, 8, 2, stride=2)))
    costs = "it and conv2d (0) in one would take {} multiply-adds a position, and on their own "
    refused(unknown_size(strided), costs.format(32) + "they take 24")
    merged(captured(strided, image()), {"conv2d": 1})
    # A result that is larger than what it is made of may have many positions for each of that.
    padded = float64(nn.Sequential(conv(1, 2, bias=False), conv(1, 4, 2, padding=2)))
    refused(unknown_size(padded), costs.format(16) + "they take 8")


def test_an_input_that_the_model_writes_to() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        before = m.a(x)
        x.mul_(2.0)
        return before + m.a(x) + m.b(x) + x

    before = captured(float64(forward, a=conv(3, padding=1), b=conv(1)), image())
    # x after the write is another tensor: a and b on it, and a on the one before.
    merged(before, {"mul": 1, "conv2d": 2, "add": 1, "copy_": 1})


# What it refuses ----------------------------------------------------------------------------------


def two(forward: Callable[..., Any], *inputs: Tensor, **parts: nn.Module | Tensor) -> Program:
    """A model with two convolutions a and b of one size."""
    parts = {"a": conv(3, padding=1), "b": conv(1), **parts}
    return captured(float64(forward, **parts), image(), *inputs)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_refuses_a_weight_or_bias_that_is_an_input(which: str) -> None:
    shape = (4, 4, 1, 1) if which == "weight" else (4,)
    refused(
        two(
            lambda m, x, given: m.a(x) + F.conv2d(x, **{"weight": m.b.weight, which: given}),
            normal(*shape),
        ),
        f"the {which} of conv2d_1 is not a constant",
    )


def test_refuses_a_weight_that_the_model_writes_to() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        total = m.a(x) + F.conv2d(x, m.written)
        m.written.mul_(0.5)
        return total

    refused(two(forward, written=normal(4, 4, 1, 1)), "the weight of conv2d_1 is not a constant")


def test_refuses_a_convolution_that_has_another_user() -> None:
    refused(
        two(lambda m, x: (lambda y: (m.a(x) + y, F.relu(y)))(m.b(x))),
        "the result of conv2d (b) has 2 users",
    )


def test_refuses_a_convolution_that_is_an_output() -> None:
    refused(
        two(lambda m, x: (lambda y: (m.a(x) + y, y))(m.b(x))),
        "the result of conv2d (b) is also an output of the model",
    )


def test_refuses_a_partial_sum_that_has_another_user() -> None:
    refused(
        two(lambda m, x: (lambda y: (y + m.b(x), F.relu(y)))(m.a(x) + F.silu(x))),
        "the result of add has 2 users",
    )


def test_refuses_a_partial_sum_that_is_an_output() -> None:
    refused(
        two(lambda m, x: (lambda y: (y + m.b(x), y))(m.a(x) + F.silu(x))),
        "the result of add is also an output of the model",
    )


def test_refuses_other_strides() -> None:
    # On one pixel every stride gives one pixel.
    model = float64(Branches(conv(1, stride=2), conv(1), nn.Identity()))
    refused(
        captured(float64(Branches(conv(1, stride=2), conv(1))), image(1, 1)),
        "conv2d (branches.0) and conv2d_1 (branches.1) cannot be one: their strides are 2x2 and "
        "1x1",
    )
    # What is alike is merged all the same.
    assert weights(merged(captured(model, image(1, 1)), {"conv2d": 2, "add": 1})) == [
        (4, 4, 1, 1),
        (4, 4, 1, 1),
    ]


def test_refuses_a_transposed_convolution_beside_another() -> None:
    layers = [nn.ConvTranspose2d(4, 4, 3, padding=1), conv(3, padding=1)]
    refused(
        captured(float64(Branches(*layers)), image()),
        "conv_transpose2d (branches.0) and conv2d (branches.1) cannot be one: only one of them is "
        "transposed",
    )


def test_refuses_an_output_padding_that_no_convolution_can_have() -> None:
    # Taps at -2 and 1, as many rows cut off in front as the dilation allows, and one at 0.
    up = nn.ConvTranspose2d(4, 4, 2, dilation=3, padding=2, output_padding=1)
    refused(
        captured(float64(Branches(up, conv(1))), image()),
        "conv_transpose2d (branches.0) and conv2d (branches.1) cannot be one: no convolution pads "
        "the way the two do together",
    )


def test_refuses_a_dense_kernel_beside_a_depthwise_one() -> None:
    refused(
        captured(float64(Branches(conv(1), depthwise(3))), image()),
        "conv2d_1 (branches.1) and conv2d (branches.0) in one would take 144 multiply-adds a "
        "position, and on their own they take 52",
    )


def test_refuses_a_dilation_that_leaves_more_holes_than_taps() -> None:
    layers = [conv(3, padding=1), conv(3, dilation=2, padding=2)]
    refused(
        captured(float64(Branches(*layers)), image()),
        "conv2d (branches.0) and conv2d_1 (branches.1) in one would take 400 multiply-adds a "
        "position, and on their own they take 288",
    )


def test_refuses_the_input_beside_a_kernel_without_a_tap_for_it() -> None:
    refused(
        captured(float64(Branches(conv(2, dilation=2, padding=1), nn.Identity())), image()),
        "conv2d (branches.0) and x in one would take 144 multiply-adds a position, and on their "
        "own they take 64",
    )


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_refuses_numbers_that_are_not_finite_in_the_models_dtype(what: str) -> None:
    model = scramble(Branches(conv(1), conv(1))).half()
    with torch.no_grad():
        for each in model.branches:
            getattr(each, what).fill_(4e4)  # float16 ends at 65504
    refused(
        captured(model, image(dtype=torch.float16)), f"the merged {what} is not finite in float16"
    )


def test_refuses_a_scale_that_is_not_finite_in_the_models_dtype() -> None:
    model = scramble(
        Model(
            lambda m, x: m.a(x) + x + (F.relu(x) * m.c) * m.c,
            a=conv(3, padding=1),
            c=nn.Parameter(torch.ones(4, 1, 1)),
        )
    ).half()
    with torch.no_grad():
        model.c.copy_(torch.tensor([1.0, 2.0, 3.0, 300.0]).reshape(4, 1, 1))
    refused(
        captured(model, image(dtype=torch.float16)), "the merged scale is not finite in float16"
    )


def pair(*layers: nn.Module) -> Program:
    return captured(float64(nn.Sequential(*layers)), image())


def test_refuses_a_bias_in_front_of_padding() -> None:
    refused(
        pair(conv(1), conv(3, padding=1)),
        "it and conv2d (0) cannot be one: the second pads with zeros, where the first would have "
        "its bias",
    )


def test_refuses_a_kernel_in_front_of_padding() -> None:
    refused(
        pair(conv((1, 3), padding=(0, 1), bias=False), conv((1, 2), padding=(0, 1))),
        "it and conv2d (0) cannot be one: the second pads with zeros, where the first would still "
        "reach its input",
    )


def test_refuses_a_bias_in_front_of_a_transposed_convolution() -> None:
    refused(
        pair(conv(1), nn.ConvTranspose2d(4, 4, 2, stride=2)),
        "it and conv2d (0) cannot be one: a transposed one does not spread the bias of the first "
        "evenly",
    )


@pytest.mark.parametrize("second", [conv(3), conv(1, stride=2), nn.ConvTranspose2d(4, 4, 2)])
def test_refuses_a_transposed_convolution_in_a_pair_of_kernels(second: nn.Module) -> None:
    refused(
        pair(nn.ConvTranspose2d(4, 4, 2, bias=False), second),
        "it and conv_transpose2d (0) cannot be one: one of them is transposed, and the other is "
        "not 1x1 with a stride of 1",
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_refuses_a_padding_that_no_strided_convolution_has() -> None:
    refused(
        pair(conv(1, stride=2, bias=False), conv(2, padding="same")),
        "it and conv2d (0) cannot be one: no convolution pads the way the two do together",
    )


def test_refuses_a_bottleneck() -> None:
    refused(
        pair(conv(1, 1), conv(1, 4, 1)),
        "it and conv2d (0) in one would take 16 multiply-adds a position, and on their own they "
        "take 8",
    )


def test_refuses_a_pointwise_behind_a_depthwise_convolution() -> None:
    refused(
        pair(depthwise(3), conv(1)),
        "it and conv2d (0) in one would take 144 multiply-adds a position, and on their own they "
        "take 52",
    )


def test_refuses_a_first_convolution_that_has_another_user() -> None:
    refused(
        two(lambda m, x: (lambda y: m.b(y) * F.relu(y))(m.a(x))),
        "the result of conv2d (a) has 2 users",
    )


def test_refuses_a_first_convolution_that_is_an_output() -> None:
    refused(
        two(lambda m, x: (lambda y: (m.b(y), y))(m.a(x))),
        "the result of conv2d (a) is also an output of the model",
    )


def test_refuses_a_pair_with_a_computed_weight() -> None:
    weight = normal(4, 4, 1, 1)
    refused(
        two(lambda m, x, given: m.b(F.conv2d(x, given)), weight),
        "the weight of conv2d is not a constant",
    )
    refused(
        two(lambda m, x, given: F.conv2d(m.b(x), given), weight),
        "the weight of conv2d_1 is not a constant",
    )


def test_refuses_a_pair_whose_product_is_not_finite() -> None:
    model = scramble(nn.Sequential(conv(1), conv(1))).half()
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[1].weight.fill_(300.0)
    refused(
        captured(model, image(dtype=torch.float16)), "the merged weight is not finite in float16"
    )


# What it leaves alone without a word --------------------------------------------------------------

UNRELATED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "convolution": lambda m, x: m.a(x),
    "residual_around_an_activation": lambda m, x: x + m.b(F.relu(m.a(x))),
    "sum_of_activations": lambda m, x: F.relu(m.a(x)) + F.relu(m.b(x)),
    "of_two_tensors": lambda m, x: m.a(x) + m.b(F.relu(x)),
    "norm_and_identity": lambda m, x: m.norm(x) + x,
    "product": lambda m, x: m.a(x) * m.b(x),
    "norm_between": lambda m, x: m.b(m.norm(F.relu(m.a(x)))),
    "other_dimension": lambda m, x: m.a(x) + m.row * x,
    "computed_scale": lambda m, x: m.a(x) + x.mean() * x,
    "size_as_a_number": lambda m, x: m.a(x) + x * x.shape[0] / m.a(F.relu(x)),
    "squared": lambda m, x: (lambda y: y + y * y)(m.a(x)),
    "broadcast_result": lambda m, x: m.one(x) + x,
    "linear_on_the_last_dimension": lambda m, x: m.linear(m.a(x)),
    "other_statistics": lambda m, x: m.a(x) + F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("case", UNRELATED)
def test_ignores_what_is_none_of_its_business(case: str) -> None:
    compute = UNRELATED[case]
    refused(
        two(
            lambda m, x: compute(m, x),
            norm=nn.BatchNorm2d(4),
            row=nn.Parameter(torch.ones(6)),
            one=conv(1, 1),
            linear=nn.Linear(6, 6),
        )
    )


def test_ignores_numbers_that_are_not_real() -> None:
    whole = Model(
        lambda m, x: F.conv2d(x, m.one) + F.conv2d(x, m.two),
        one=torch.arange(1, 17).reshape(4, 4, 1, 1),
        two=torch.arange(5, 21).reshape(4, 4, 1, 1),
    )
    refused(captured(whole.eval(), torch.arange(1, 37).reshape(1, 4, 3, 3)))
    layers = Branches(conv(1, dtype=torch.complex64), conv(1, dtype=torch.complex64))
    refused(captured(layers.eval(), image().to(torch.complex64)))
    behind = nn.Sequential(conv(1, dtype=torch.complex64), conv(1, dtype=torch.complex64))
    refused(captured(behind.eval(), image().to(torch.complex64)))


def test_a_sum_of_another_dtype_is_no_place_of_its_own() -> None:
    model = Model(
        lambda m, x: m.a(x) + m.b(x).double(), a=scramble(conv(1)), b=scramble(conv(1))
    ).eval()
    refused(captured(model, image(dtype=torch.float32)))


# Drift --------------------------------------------------------------------------------------------


def test_float32_drift_of_a_merged_block_is_that_of_the_block() -> None:
    block = Branches(normed(conv(3, padding=1)), normed(conv(1)), nn.BatchNorm2d(4))
    before = captured(scramble(block), image(dtype=torch.float32))
    after = passed(before)
    # One rounding of each number, as the sum itself would have had.
    assert float64_distance(before, after) <= FLOAT32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_merges_on_a_gpu_where_numbers_live_on_the_cpu() -> None:
    model = float64(
        lambda m, x: m.c(0.3 * (m.a(x) + 1.7) - m.b(x) + m.norm(x) * F.relu(x).mean()),
        a=conv(3, padding=1),
        b=conv(1),
        c=conv(1),
        norm=nn.BatchNorm2d(4),
    )
    after = passed(captured(model.cuda(), image().cuda()))
    assert counts(after)["conv2d"] == 2
