"""Parallel convolutions and linear layers become one of each and a split."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import googlenet
from optfuse.capture import capture
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

PASS = "combine_parallel_convs"
ANY_KERNEL = "combine_parallel_convs.any_kernel"

# The weights are stacked, not changed; what moves is the order in which a convolution sums.
SUMMED_OTHERWISE = 1e-14


class Parallel(nn.Module):
    """Layers on one input, each with its own activation; gives all results."""

    def __init__(
        self,
        *layers: nn.Module,
        activations: Sequence[Callable[[Tensor], Tensor] | None] = (),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations = activations or [None] * len(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        results = [layer(x) for layer in self.layers]
        return [
            y if activate is None else activate(y)
            for y, activate in zip(results, self.activations, strict=True)
        ]


def parallel(
    *layers: nn.Module,
    x: Tensor | None = None,
    activations: Sequence[Callable[[Tensor], Tensor] | None] = (),
    seed: int = 0,
) -> Program:
    module = scramble(Parallel(*layers, activations=activations), seed).double()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3)) if x is None else x
    return captured(module, x.double())


def pointwise(out_channels: int, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(4, out_channels, 1, **settings)  # type: ignore[arg-type]


def check(before: Program, expected: dict[str, int], passes: str = PASS) -> Program:
    after = optimized(before, passes)
    assert counts(after) == expected
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)
    assert_settled(after, passes)
    return after


def test_three_convolutions_become_one_and_a_split() -> None:
    before = parallel(pointwise(3), pointwise(5), pointwise(1))
    assert counts(before) == {"conv2d": 3}
    after = check(before, {"conv2d": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "3 convolutions into one of 9 channels"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda y: y.clamp(-0.2, 0.7),
    "clamp_min": lambda y: y.clamp_min(-0.2),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "elu": lambda y: F.elu(y, 0.7),
    "celu": lambda y: F.celu(y, 0.7),
    "selu": F.selu,
    "gelu": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": lambda y: F.softplus(y, beta=2.0, threshold=3.0),
    "tanh": torch.tanh,
}


def test_every_equal_activation_moves_in_front_of_the_split() -> None:
    class EachActivation(nn.Module):
        """Two convolutions and an activation behind both, for every activation."""

        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.ModuleList(
                Parallel(pointwise(3), pointwise(5), activations=[activate, activate])
                for activate in ACTIVATIONS.values()
            )

        def forward(self, *images: Tensor) -> list[list[Tensor]]:
            return [pair(x) for pair, x in zip(self.pairs, images, strict=True)]

    images = [torch.randn(1, 4, 3, 3).double() for _ in ACTIVATIONS]
    before = captured(scramble(EachActivation()).double(), *images)
    pairs = len(ACTIVATIONS)
    assert counts(before) == {"conv2d": 2 * pairs, **dict.fromkeys(ACTIVATIONS, 2)}
    after = check(
        before, {"conv2d": pairs, "split_with_sizes": pairs, **dict.fromkeys(ACTIVATIONS, 1)}
    )
    assert [site.note for site in step(after, PASS).sites] == [
        f"2 convolutions into one of 8 channels, and the {name} behind them" for name in ACTIVATIONS
    ]


def test_the_activation_stands_between_the_convolution_and_the_split() -> None:
    after = optimized(parallel(pointwise(3), pointwise(5), activations=[F.relu, F.relu]), PASS)
    order = [n.name for n in after.graph_module.graph.nodes if n.op == "call_function"]
    assert order == ["conv2d_2", "relu_2", "split_with_sizes", "getitem", "getitem_1"]


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ([F.relu, None], {"relu": 1}),
        ([F.relu, F.silu], {"relu": 1, "silu": 1}),
        ([F.leaky_relu, lambda y: F.leaky_relu(y, 0.2)], {"leaky_relu": 2}),
        ([lambda y: F.relu(y) + y, lambda y: F.relu(y)], {"relu": 2, "add": 1}),
        ([lambda y: torch.clamp(y, max=y.mean())] * 2, {"clamp": 2, "mean": 2}),
    ],
)
def test_other_activations_stay_behind_the_split(
    activations: list[Callable[[Tensor], Tensor] | None], expected: dict[str, int]
) -> None:
    before = parallel(pointwise(3), pointwise(5), activations=activations)
    check(before, {"conv2d": 1, "split_with_sizes": 1, **expected})


def test_an_activation_with_a_computed_limit_stays_behind_it() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = pointwise(3), pointwise(5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one = self.one(x)
            limit = x.abs().max().item()  # known only behind the first convolution
            return one.clamp(max=limit), self.two(x).clamp(max=limit)

    before = captured(scramble(Limited()).double(), torch.randn(1, 4, 3, 3).double())
    after = optimized(before, PASS)
    assert counts(after)["conv2d"] == 1
    assert counts(after)["clamp"] == 2
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)


def test_an_activation_of_equal_settings_in_another_spelling_is_equal() -> None:
    activations = [lambda y: F.leaky_relu(y, 0.01), F.leaky_relu]
    before = parallel(pointwise(3), pointwise(5), activations=activations)
    check(before, {"conv2d": 1, "leaky_relu": 1, "split_with_sizes": 1})


@pytest.mark.parametrize("bias", [(True, False, True), (False, False, False)])
def test_a_missing_bias_is_zeros_beside_one_that_is_there(bias: tuple[bool, ...]) -> None:
    before = parallel(*(pointwise(2, bias=each) for each in bias))
    after = check(before, {"conv2d": 1, "split_with_sizes": 1})
    constants = [n for n in after.graph_module.graph.nodes if n.op == "get_attr"]
    assert len(constants) == 1 + any(bias)


@pytest.mark.parametrize("shape", [(2, 5, 4), (7, 4), (4,)])
def test_linear_layers_of_any_rank(shape: tuple[int, ...]) -> None:
    before = parallel(*(nn.Linear(4, 6, bias=b) for b in (True, True, False)), x=torch.randn(shape))
    assert counts(before) == {"linear": 3}
    after = check(before, {"linear": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "3 linear layers into one of 18 channels"


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_one_two_and_three_dimensions_batched_or_not(batch: tuple[int, ...], spatial: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    x = torch.randn(*batch, 4, *[5] * spatial)
    before = parallel(layer(4, 2, 1), layer(4, 3, 1), x=x)
    check(before, {f"conv{spatial}d": 1, "split_with_sizes": 1})


def test_settings_in_different_spellings_are_equal() -> None:
    before = parallel(
        pointwise(2, padding="valid"), pointwise(3, padding=0), pointwise(1, padding="same")
    )
    check(before, {"conv2d": 1, "split_with_sizes": 1})


def test_two_groups_on_one_tensor() -> None:
    strided = {"stride": 2}
    before = parallel(pointwise(2), pointwise(3, **strided), pointwise(1), pointwise(2, **strided))
    check(before, {"conv2d": 2, "split_with_sizes": 2})


def test_a_layer_that_runs_twice_on_one_tensor() -> None:
    layer = pointwise(3)
    before = parallel(layer, layer)
    check(before, {"conv2d": 1, "split_with_sizes": 1})


def test_groups_behind_each_other() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Parallel(pointwise(3), pointwise(4), activations=[F.relu, F.relu])
            self.second = Parallel(pointwise(2), pointwise(5))

        def forward(self, x: Tensor) -> list[Tensor]:
            short, x = self.first(x)
            return [short, *self.second(x)]

    module = scramble(Blocks()).double()
    before = captured(module, torch.randn(1, 4, 5, 5).double())
    check(before, {"conv2d": 2, "split_with_sizes": 2, "relu": 1})


def test_a_head_on_several_levels_keeps_one_set_of_weights() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Parallel(pointwise(2), pointwise(3))

        def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
            return self.head(x) + self.head(y)

    module = scramble(Head()).double()
    before = captured(module, torch.randn(1, 4, 8, 8).double(), torch.randn(1, 4, 4, 4).double())
    after = check(before, {"conv2d": 2, "split_with_sizes": 2})
    constants = {n.target for n in after.graph_module.graph.nodes if n.op == "get_attr"}
    assert len(constants) == 2  # one weight and one bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constants_keep_the_dtype_and_the_values_of_the_model(dtype: torch.dtype) -> None:
    module = scramble(Parallel(pointwise(2), pointwise(3, bias=False))).to(dtype)
    before = captured(module, torch.randn(1, 4, 3, 3).to(dtype))
    after = check(before, {"conv2d": 1, "split_with_sizes": 1})
    assert {p.dtype for p in after.graph_module.parameters()} == {dtype}


def test_dynamic_batch_and_image_size() -> None:
    module = scramble(Parallel(pointwise(2), pointwise(3), activations=[F.relu, F.relu])).double()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height")}
    x = torch.randn(2, 4, 6, 5).double()
    before = capture(LoadedModel("dynamic", module, (x,), {}, dynamic_shapes=({**dims},)))
    after = check(before, {"conv2d": 1, "relu": 1, "split_with_sizes": 1})
    x = torch.randn(5, 4, 9, 5).double()
    for expected, found in zip(module(x), after.graph_module(x), strict=True):
        # One float64 convolution of 4 inputs each: a few units of 1e-16.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_any_kernel_combines_other_sizes_too() -> None:
    wide = {"padding": 1, "dilation": 1, "stride": 2}
    before = parallel(nn.Conv2d(4, 2, 3, **wide), nn.Conv2d(4, 5, 3, **wide))
    after = check(before, {"conv2d": 2})
    assert reasons(after, PASS) == [
        "its kernel is 3x3, not 1x1 (the option any_kernel would combine it with 1 more on the "
        "same tensor)"
    ]
    check(before, {"conv2d": 1, "split_with_sizes": 1}, ANY_KERNEL)


def test_same_padding_of_one_side_more() -> None:
    even = {"kernel_size": 2, "padding": "same"}
    before = parallel(nn.Conv2d(4, 2, **even), nn.Conv2d(4, 5, **even))
    check(before, {"conv2d": 1, "split_with_sizes": 1}, ANY_KERNEL)


@pytest.mark.parametrize("setting", ["stride", "padding"])
def test_refuses_a_lone_convolution_of_other_settings(setting: str) -> None:
    before = parallel(pointwise(2, **{setting: 2}), pointwise(3), pointwise(1))
    after = check(before, {"conv2d": 2, "split_with_sizes": 1})
    assert reasons(after, PASS) == [
        f"its {setting} is not that of conv2d (layers.0) on the same tensor"
    ]


def test_refuses_another_dilation() -> None:
    before = parallel(nn.Conv2d(4, 2, 3, dilation=2), nn.Conv2d(4, 2, 3))
    assert reasons(check(before, {"conv2d": 2}), PASS) == []  # nobody expects it of 3x3 kernels
    assert reasons(check(before, {"conv2d": 2}, ANY_KERNEL), PASS) == [
        "its dilation is not that of conv2d (layers.0) on the same tensor"
    ]


def test_refuses_groups() -> None:
    before = parallel(pointwise(2, groups=2), pointwise(4, groups=2))
    after = check(before, {"conv2d": 2})
    assert reasons(after, PASS) == ["it has 2 groups, and only convolutions of one are combined"]


def test_refuses_transposed_convolutions() -> None:
    before = parallel(nn.ConvTranspose2d(4, 2, 1), nn.ConvTranspose2d(4, 3, 1))
    after = check(before, {"conv_transpose2d": 2})
    assert reasons(after, PASS) == ["it is a transposed convolution, and these are not combined"]


class Computed(nn.Module):
    """Three 1x1 convolutions; the second one's weight and the third one's bias are inputs."""

    def __init__(self, constants: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(pointwise(3) for _ in range(constants))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        computed = [F.conv2d(x, weight), F.conv2d(x, self.layers[0].weight, bias)]
        return computed + [layer(x) for layer in self.layers]


def test_refuses_what_is_not_a_constant_and_combines_the_rest() -> None:
    module = scramble(Computed(2)).double()
    weight, bias = torch.randn(3, 4, 1, 1).double(), torch.randn(3).double()
    before = captured(module, torch.randn(1, 4, 5, 5).double(), weight, bias)
    after = check(before, {"conv2d": 3, "split_with_sizes": 1})
    assert reasons(after, PASS) == ["its weight is not a constant", "its bias is not a constant"]


def test_refuses_a_weight_that_the_model_writes_to() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = pointwise(3)
            self.register_buffer("weight", torch.randn(3, 4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            results = self.layer(x), F.conv2d(x, self.weight)
            self.weight.mul_(0.5)
            return results

    module = scramble(Written()).double()
    before = captured(module, torch.randn(1, 4, 5, 5).double())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["its weight is not a constant"]


def test_leaves_alone_what_stands_alone() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = pointwise(4), nn.Conv2d(4, 3, 3)
            self.beside = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.second(self.first(x)), self.beside(x)

    before = captured(scramble(Chain()).double(), torch.randn(1, 4, 6, 6).double())
    assert reasons(check(before, {"conv2d": 2, "linear": 1}), PASS) == []


def test_convolutions_of_integers_are_left_alone() -> None:
    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.arange(1, 9).reshape(2, 4, 1, 1))
            self.register_buffer("two", torch.arange(5, 17).reshape(3, 4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.conv2d(x, self.one), F.conv2d(x, self.two)

    before = captured(Integers().eval(), torch.arange(1, 37).reshape(1, 4, 3, 3))
    assert reasons(check(before, {"conv2d": 2}), PASS) == []


def test_googlenet_has_39_convolutions_left_of_57() -> None:
    before = captured(scramble(googlenet.build()), torch.randn(1, 3, 64, 64))
    after = optimized(before, f"fold_conv_bn,{PASS}")
    assert counts(before)["conv2d"] == counts(before)["relu"] == 57
    assert counts(after)["conv2d"] == counts(after)["relu"] == 39
    assert counts(after)["split_with_sizes"] == 9
    assert len(step(after, PASS).sites) == 9
