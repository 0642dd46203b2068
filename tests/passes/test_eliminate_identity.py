"""eliminate_identity: each case of its docstring, and everything that only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from optfuse.capture import capture
from optfuse.stages import LoadedModel, Program
from tests.harness import (
    assert_same_function,
    assert_settled,
    captured,
    counts,
    optimized,
    reasons,
    step,
)

PASS = "eliminate_identity"
# An identity gives the very same numbers, so nothing moves at all.
EXACT = 0.0


class Between(nn.Module):
    """`middle` between two operators, so that it touches neither an input nor an output."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.middle(torch.tanh(x)))


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3)).to(dtype)


def line() -> torch.Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(4))


def volume() -> torch.Tensor:
    return torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def program_of(middle: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Program:
    return captured(Between(middle).eval(), x)


IMAGE_CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": nn.Dropout(0.3).eval(),
    "dropout of channels": nn.Dropout2d(0.3).eval(),
    "dropout for SELU": nn.AlphaDropout(0.3).eval(),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "dropout, native": lambda x: torch.ops.aten.native_dropout(x, 0.3, False)[0],
    "clone": torch.clone,
    "detach": torch.detach,
    "detached copy": lambda x: x.detach().clone(),
    "view": lambda x: x.view(2, 4, 5, 5),
    "reshape": lambda x: x.reshape(2, -1, 5, 5),
    "flatten": lambda x: x.flatten(3),
    "unflatten": lambda x: x.unflatten(1, (4,)),
    "squeeze of a larger dimension": lambda x: x.squeeze(1),
    "squeeze of several": lambda x: x.squeeze((1, 2)),
    "squeeze of all": torch.squeeze,
    "permute": lambda x: x.permute(0, 1, -2, -1),
    "transpose": lambda x: x.transpose(-1, 3),
    "movedim": lambda x: x.movedim(1, 1),
    "expand": lambda x: x.expand(-1, -1, 5, -1),
    "broadcast": lambda x: x.broadcast_to(2, 4, 5, 5),
    "repeat": lambda x: x.repeat(1, 1, 1, 1),
    "contiguous": lambda x: x.contiguous(),
    "to the same dtype": lambda x: x.to(torch.float32, copy=True),
    "to the same device": lambda x: x.to("cpu", copy=True),
    "type of itself": lambda x: x.type_as(x),
    "x * 1": lambda x: x * 1,
    "1.0 * x": lambda x: 1.0 * x,
    "x / 1": lambda x: x / 1,
    "x + 0": lambda x: x + 0,
    "0 + x": lambda x: 0.0 + x,
    "x - 0": lambda x: x - 0,
    "alpha times 0": lambda x: torch.add(x, 0, alpha=3),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0)),
    "pad by reflection": lambda x: F.pad(x, (0, 0, 0, 0), mode="reflect"),
    "pad by replication": lambda x: F.pad(x, (0, 0, 0, 0), mode="replicate"),
    "cat of one": lambda x: torch.cat([x], dim=-3),
    "cat with nothing": lambda x: torch.cat([x, x[:, :0]], dim=1),
    "slice": lambda x: x[:, 0:4],
    "slice past the end": lambda x: x[..., :99],
    "narrow": lambda x: x.narrow(2, 0, 5),
    "split into one": lambda x: x.split(4, dim=1)[0],
    "split by sizes into one": lambda x: x.split([4], dim=1)[0],
    "max pool": nn.MaxPool2d(1),
    "max pool, dilated": nn.MaxPool2d(1, stride=1, dilation=2),
    "max pool with indices": lambda x: F.max_pool2d(x, 1, return_indices=True)[0],
    "average pool": nn.AvgPool2d(1, count_include_pad=False),
    "average pool divided by 1": lambda x: F.avg_pool2d(x, 1, divisor_override=1),
    "adaptive average pool": nn.AdaptiveAvgPool2d((5, None)),
    "adaptive max pool": nn.AdaptiveMaxPool2d(5),
    "nearest upsampling": nn.Upsample(scale_factor=1),
    "nearest upsampling to a size": lambda x: F.interpolate(x, size=(5, 5)),
    "exact nearest upsampling": lambda x: F.interpolate(x, scale_factor=1.0, mode="nearest-exact"),
}


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_identity_goes(case: str) -> None:
    before = program_of(IMAGE_CASES[case], image())
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "sigmoid": 1}
    assert_same_function(before, after, tolerance=EXACT)
    assert_settled(after, PASS)


@pytest.mark.parametrize(
    ("middle", "x"),
    [
        (nn.MaxPool1d(1), line()),
        (nn.AvgPool1d(1), line()),
        (nn.AdaptiveAvgPool1d(6), line()),
        (lambda x: F.interpolate(x, scale_factor=1), line()),
        (lambda x: F.pad(x, (0, 0), mode="replicate"), line()),
        (nn.MaxPool3d(1), volume()),
        (nn.AvgPool3d(1), volume()),
        (nn.AdaptiveAvgPool3d((3, 4, 4)), volume()),
        (nn.AdaptiveMaxPool3d((3, 4, 4)), volume()),
        (lambda x: F.max_pool3d(x, 1, return_indices=True)[0], volume()),
        (lambda x: F.interpolate(x, scale_factor=1, mode="nearest-exact"), volume()),
        (nn.MaxPool2d(1, stride=2), torch.randn(2, 3, 1, 1)),
        (lambda x: x.permute(2, 1, 0, 3), torch.randn(1, 3, 1, 5)),
        (nn.MaxPool2d(1), torch.randn(4, 5, 5)),
        (lambda x: x * 1, torch.tensor(1.7)),
    ],
)
def test_identity_goes_in_other_ranks(
    middle: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> None:
    before = program_of(middle, x)
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "sigmoid": 1}
    assert_same_function(before, after, tolerance=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_identity_goes_in_other_dtypes(dtype: torch.dtype) -> None:
    before = program_of(lambda x: nn.Identity()((x * 1.0 + 0).to(dtype)), image(dtype))
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "sigmoid": 1}
    assert_same_function(before, after, tolerance=EXACT)


def test_integers_and_booleans() -> None:
    class Integers(nn.Module):
        def forward(self, i: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (i.abs() + 0).neg(), (i.abs() * 1).neg(), (b.logical_not() * True).logical_not()

    before = captured(Integers(), torch.tensor([3, -7]), torch.tensor([True, False]))
    after = optimized(before, PASS)
    assert counts(after) == {"abs": 2, "neg": 2, "logical_not": 2}
    assert_same_function(before, after, tolerance=EXACT)


class Constants(nn.Module):
    """Arithmetic with constant tensors."""

    def __init__(self, function: Callable[..., torch.Tensor], *constant: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for index, each in enumerate(constant):
            self.register_buffer(f"c{index}", each)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.function(torch.tanh(x), *self.buffers()))


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (torch.mul, torch.ones(5)),
        (lambda x, c: c * x, torch.ones(4, 1, 1)),
        (torch.div, torch.ones(())),
        (torch.add, torch.zeros(2, 4, 5, 5)),
        (lambda x, c: c + x, torch.zeros(1)),
        (torch.sub, torch.zeros(5, 5)),
        (torch.mul, torch.ones(5, dtype=torch.float16)),
        (torch.mul, torch.ones(5, dtype=torch.bool)),
    ],
)
def test_neutral_tensors_go(function: Callable[..., torch.Tensor], constant: torch.Tensor) -> None:
    before = captured(Constants(function, constant), image())
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "sigmoid": 1}
    assert_same_function(before, after, tolerance=EXACT)


def test_copies_of_sparse_tensors_go() -> None:
    before = program_of(lambda x: torch.sparse.mm(x.to_sparse().clone(), x), torch.randn(4, 4))
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "to_sparse": 1, "_sparse_mm": 1, "sigmoid": 1}
    assert_same_function(before, after, tolerance=EXACT)


def test_two_constants() -> None:
    # Either operand may be the neutral one, but here only one of them is.
    before = captured(Constants(lambda x, c, d: x + c * d, torch.ones(5), torch.randn(5)), image())
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "add": 1, "sigmoid": 1}
    assert_same_function(before, after, tolerance=EXACT)


STAYS: dict[str, Callable[[torch.Tensor], Any]] = {
    "pad": lambda x: F.pad(x, (1, -1)),
    "clone": lambda x: x.clone(memory_format=torch.channels_last),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "transpose": lambda x: x.transpose(2, 3),
    "mul": lambda x: x * 2,
    "add": lambda x: x + 1,
    "sub": lambda x: x - 1,
    "rsub": lambda x: torch.rsub(x, 0),
    "reciprocal": lambda x: 1 / x,
    "div": lambda x: torch.div(x, 1, rounding_mode="floor"),
    "max_pool2d": nn.MaxPool2d(3, stride=1, padding=1),
    "avg_pool2d": nn.AvgPool2d(1, divisor_override=2),
    "slice": lambda x: x[:, 1:],
    "cat": lambda x: torch.cat([x, x.detach()]),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d(4),
    "upsample_bilinear2d": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
    "_to_copy": lambda x: x.to(torch.float64),
    "split": lambda x: x.split(3, dim=1)[0],
    "unsqueeze": lambda x: x.unsqueeze(0),
    "view": lambda x: x.reshape(2, 4, 25),
}


@pytest.mark.parametrize("kind", STAYS)
def test_what_does_something_stays(kind: str) -> None:
    before = program_of(STAYS[kind], image())
    after = optimized(before, PASS)
    assert counts(after)[kind] == 1
    assert reasons(after, PASS) == []


def test_subtraction_from_zero_stays() -> None:
    before = captured(Constants(lambda x, c: c - x, torch.zeros(5)), image())
    assert counts(optimized(before, PASS)) == {"tanh": 1, "sub": 1, "sigmoid": 1}


def test_scaled_operand_stays() -> None:
    before = captured(Constants(lambda x, c: torch.add(c, x, alpha=3), torch.zeros(5)), image())
    assert counts(optimized(before, PASS)) == {"tanh": 1, "add": 1, "sigmoid": 1}


def test_nearly_neutral_tensor_stays() -> None:
    nearly = torch.ones(5)
    nearly[4] = 1.5
    before = captured(Constants(torch.mul, nearly), image())
    assert counts(optimized(before, PASS)) == {"tanh": 1, "mul": 1, "sigmoid": 1}


def test_indices_stay() -> None:
    class Indices(nn.Module):
        def forward(self, i: torch.Tensor) -> torch.Tensor:
            # Of the pool's own dtype: 0 to 24 whatever it is given.
            return F.max_pool2d(i.abs(), 1, return_indices=True)[1].neg()

    before = captured(Indices(), torch.arange(-50, 50).view(1, 4, 5, 5))
    after = optimized(before, PASS)
    assert counts(after) == {"abs": 1, "max_pool2d_with_indices": 1, "neg": 1}
    assert_same_function(before, after, tolerance=EXACT)


def test_copy_that_a_view_needs_stays() -> None:
    # Without the copy, `view` cannot read the transposed memory.
    before = program_of(lambda x: x.transpose(1, 2).contiguous().view(2, 20, 5), image())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == []


def test_refuses_another_layout() -> None:
    before = program_of(lambda x: F.avg_pool2d(x.transpose(1, 2), 1), image())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["it also changes the memory layout"]


def test_refuses_another_dtype() -> None:
    before = captured(
        Constants(torch.mul, torch.ones(5, dtype=torch.float32)), image(torch.float16)
    )
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["the mul changes the dtype from float16 to float32"]


def test_refuses_integer_division() -> None:
    class Divided(nn.Module):
        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(i.abs() / 1)

    after = optimized(captured(Divided(), torch.tensor([3, -7])), PASS)
    assert counts(after) == {"abs": 1, "div": 1, "sigmoid": 1}
    assert reasons(after, PASS) == ["the div changes the dtype from int64 to float32"]


def test_refuses_a_broadcast() -> None:
    before = captured(Constants(torch.add, torch.zeros(3, 2, 4, 5, 5)), image())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["the constant of add makes the result larger"]


def test_refuses_a_scale_that_keeps_the_size() -> None:
    before = program_of(lambda x: F.interpolate(x, scale_factor=1.15), image())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["its scale of 1.15 reads some elements twice and others never"]


def test_refuses_dropout_in_training_mode() -> None:
    before = program_of(lambda x: F.dropout(x, 0.5), image())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["the dropout is in training mode and draws random numbers"]


class Outputs(nn.Module):
    """Results that would become an input, a parameter, or one another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.tanh(x)
        return x * 1, self.weight.clone(), y, y + 0, torch.sigmoid(x) / 1


def test_refuses_to_change_outputs() -> None:
    before = captured(Outputs(), torch.randn(4))
    after = optimized(before, PASS)
    assert counts(after) == {"tanh": 1, "sigmoid": 1, "mul": 1, "clone": 1, "add": 1}
    assert reasons(after, PASS) == [
        "its result is an output and its input is an input of the model",
        "its result is an output and its input is a parameter of the model",
        "its result and its input are both outputs of the model",
    ]
    assert_same_function(before, after, tolerance=EXACT)
    assert_settled(after, PASS)


class Swapped(nn.Module):
    """Two buffers change places at each call; without the copies both would become one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.tensor([0.3, -1.2]))
        self.register_buffer("second", torch.tensor([2.5, 0.7]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.first.clone()
        self.first.copy_(self.second * 1)
        self.second.copy_(kept)
        return x + self.first - self.second


def test_refuses_memory_that_is_written() -> None:
    x = torch.tensor([1.1, -0.4])
    after = optimized(captured(Swapped(), x), PASS)
    assert "the model writes to the memory of its input" in reasons(after, PASS)
    model = Swapped()
    for _ in range(3):
        # float32 against itself, the same operators: equal to the last bit.
        torch.testing.assert_close(after.graph_module(x), model(x), rtol=0, atol=0)


def test_refuses_views_of_memory_that_is_written() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor([[0.5, 1.5], [2.5, 3.5]]))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            old = self.count[0] * 1
            self.count.add_(1)
            return x * 3, old

    before = captured(Counter(), torch.tensor([1.1]))
    after = optimized(before, PASS)
    assert reasons(after, PASS) == ["the model writes to the memory of its input"]
    assert_same_function(before, after, tolerance=EXACT)


def dynamic(middle: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    return capture(
        LoadedModel(
            "dynamic",
            Between(middle).eval(),
            (line(),),
            {},
            dynamic_shapes=({0: Dim("batch", min=1, max=64), 2: Dim("length", min=2, max=64)},),
        )
    )


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.reshape(x.shape[0], 4, -1),
        lambda x: x.expand(x.shape[0], -1, x.shape[2]) * 1.0,
        lambda x: x[: x.shape[0], :, : x.shape[2]],
        lambda x: torch.cat([F.pad(x, (0, 0))]) + 0,
        lambda x: F.dropout(x.permute(0, 1, 2), training=False),
    ],
)
def test_dynamic_shapes(middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
    before = dynamic(middle)
    after = optimized(before, PASS)
    left = {name: n for name, n in counts(after).items() if name != "sym_size"}
    assert left == {"tanh": 1, "sigmoid": 1}
    longer = torch.randn(3, 4, 9)
    # The same two operators on the same numbers: equal to the last bit.
    torch.testing.assert_close(
        after.graph_module(longer), before.graph_module(longer), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("kind", "middle"),
    [
        # Equal to the example's length, not to every length.
        ("adaptive_avg_pool1d", nn.AdaptiveAvgPool1d(6)),
        ("transpose", lambda x: x.transpose(0, 2)),
    ],
)
def test_dynamic_shapes_are_never_taken_for_the_examples(
    kind: str, middle: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    before = dynamic(middle)
    after = optimized(before, PASS)
    assert counts(after)[kind] == 1


def test_chain_goes_at_once_and_is_recorded() -> None:
    model = Between(nn.Sequential(nn.Dropout(), nn.Identity(), nn.Flatten(3), nn.MaxPool2d(1)))
    after = optimized(captured(model.eval(), image()), PASS)
    assert counts(after) == {"tanh": 1, "sigmoid": 1}
    assert {site.note for site in step(after, PASS).sites} == {"gives tanh"}


def test_branches_keep_their_operands() -> None:
    class Branched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(x)
            return torch.cond(x.sum() > 0, lambda a, b: a + b, lambda a, b: a - 2 * b, (y, y * 1))

    x = torch.randn(4)
    before = captured(Branched(), x)
    after = optimized(before, PASS)
    assert "mul" not in {n.name for n in after.graph_module.graph.nodes}
    # float32, the same operators on the same numbers: equal to the last bit.
    for each in (x, -x):
        torch.testing.assert_close(
            after.graph_module(each), before.graph_module(each), rtol=0, atol=0
        )


class Views(nn.Module):
    """A copy of a view of an input, of a view of a parameter, and of a view that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, 2.5]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.exp()
        return x[0].clone(), self.weight.view(2, 1).clone(), y[0], y[1].clone(), y.cos()


def test_an_output_does_not_become_a_view_that_it_was_not() -> None:
    before = captured(Views(), torch.randn(2, 3, generator=torch.Generator().manual_seed(3)))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "its result is an output and its input is a view of an input of the model",
        "its result is an output and its input is a view of a parameter of the model",
        "its result is an output, and another output lies in the memory of its input",
    ]
