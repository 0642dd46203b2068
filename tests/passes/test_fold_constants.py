"""fold_constants: what is computed from constants alone, and what must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from optfuse.capture import capture
from optfuse.graph import constant_of
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

PASS = "fold_constants"
# The proof's own numbers: the same float64 operators, once at folding and once in the reference.
EXACT = 0.0
# One rounding of the folded constant to float32 (2**-24 = 6e-8), which conv and batch norm pass on.
ROUNDED = 1e-6
# A float64 model folds in its own dtype; a few roundings at 1e-16 each.
FLOAT64 = 1e-14


class Constants(nn.Module):
    """`function(x, *constants)` with each constant a parameter or buffer."""

    def __init__(self, function: Callable[..., Any], *constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for index, each in enumerate(constants):
            self.register_buffer(f"c{index}", each)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.buffers())


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def program_of(function: Callable[..., Any], *constants: torch.Tensor) -> Program:
    return captured(Constants(function, *constants).eval(), numbers(4, seed=2))


def constants_of(program: Program) -> list[torch.Tensor]:
    found = [constant_of(node) for node in program.graph_module.graph.nodes]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normed", [weight_norm, spectral_norm, torch.nn.utils.spectral_norm, None])
def test_normed_weights_become_plain_ones(
    normed: Callable[..., nn.Module] | None, dtype: torch.dtype
) -> None:
    def layer(module: nn.Module) -> nn.Module:
        return normed(module) if normed else module

    model = scramble(
        nn.Sequential(
            layer(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), layer(nn.Conv2d(4, 5, 1))
        ).to(dtype)
    )
    kept = {name: each.clone() for name, each in model.state_dict().items()}
    before = captured(model, torch.randn(2, 3, 8, 8, dtype=dtype))
    after = optimized(before, f"{PASS},fold_conv_bn")
    assert counts(after) == {"conv2d": 2, "relu": 1}
    assert_same_function(before, after, tolerance=FLOAT64 if dtype is torch.float64 else ROUNDED)
    assert {c.dtype for c in constants_of(after)} == {dtype}
    assert all(torch.equal(kept[name], each) for name, each in model.state_dict().items())
    assert_settled(after, f"{PASS},fold_conv_bn")


def test_chain_becomes_one_constant_of_the_right_value() -> None:
    a, b = numbers(4), numbers(3, 4, seed=5)
    after = optimized(program_of(lambda x, a, b: x + ((a * 3).exp() - b).sum(0), a, b), PASS)
    assert counts(after) == {"add": 1}
    expected = ((a.double() * 3).exp() - b.double()).sum(0)
    # Computed in float64 as here, rounded once.
    assert torch.equal(constants_of(after)[0], expected.float())
    assert [site.note for site in step(after, PASS).sites] == [
        "a constant of shape (4,) from 4 operators"
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_inside_round_nothing(dtype: torch.dtype) -> None:
    a = numbers(4)
    before = program_of(lambda x, a: x * (a.to(dtype) / 3).float(), a)
    after = optimized(before, PASS)
    assert counts(after) == {"mul": 1}
    assert torch.equal(constants_of(after)[0], (a.double() / 3).float())


def test_constants_keep_the_models_dtype() -> None:
    before = captured(
        Constants(lambda x, a: x * a.exp(), numbers(4).half()).eval(), numbers(4).half()
    )
    after = optimized(before, PASS)
    assert [each.dtype for each in constants_of(after)] == [torch.float16]
    # One rounding to float16: 2**-11 = 5e-4.
    assert_same_function(before, after, tolerance=1e-3)


def test_integers_and_booleans_stay_exact() -> None:
    large = torch.tensor([2**53 + 1, -(2**60) - 3, 5, 7])
    before = program_of(lambda x, i: (x > 0, (i * 3) // 2, ~(i > 6) * (x > 0)), large)
    after = optimized(before, PASS)
    assert counts(after) == {"gt": 2, "mul": 1}
    assert_same_function(before, after, tolerance=EXACT)
    folded = [c for c in constants_of(after) if c.dtype is torch.int64]
    assert torch.equal(folded[0], (large * 3) // 2)


def made(x: torch.Tensor) -> torch.Tensor:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    positions = torch.arange(4) * 2 + torch.zeros(4, dtype=torch.int64)
    return (x + mask).softmax(-1) * positions * torch.tensor([1.5, 2.5, 3.5, 4.5])


def test_what_the_model_makes_itself() -> None:
    before = program_of(made)
    after = optimized(before, PASS)
    assert counts(after) == {"add": 1, "softmax": 1, "mul": 2}
    # Minus infinity, small integers and halves are exact in float32.
    assert_same_function(before, after, tolerance=EXACT)
    assert_settled(after, PASS)


def test_what_is_made_like_a_tensor_has_none_of_its_numbers() -> None:
    def windows(x: torch.Tensor) -> torch.Tensor:
        """The mask of shifted windows, as Swin makes it for each input."""
        mask = x.new_zeros((4, 4))
        for number, (start, stop) in enumerate([(0, 2), (2, 3), (3, 4)]):
            mask[start:stop] = number + 0.5
        mask = mask - mask.t()
        mask = mask.masked_fill(mask != 0, -100.0)
        return x.exp() + mask + torch.ones_like(x) * 3 + torch.full_like(x, 0.25)

    before = program_of(windows)
    after = optimized(before, PASS)
    assert counts(after) == {"exp": 1, "add": 3}
    # Small numbers that float32 has exactly.
    assert_same_function(before, after, tolerance=EXACT)
    assert_settled(after, PASS)


def test_what_is_made_like_a_tensor_keeps_its_dtype() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = (x > 0).long()
        return x * x.new_ones(4), whole * torch.full_like(whole, 7), whole * x.new_full((4,), 0.5)

    before = program_of(function)
    after = optimized(before, PASS)
    assert {c.dtype for c in constants_of(after)} == {torch.float32, torch.int64}
    assert counts(after).keys() == {"gt", "mul", "_to_copy"}
    assert_same_function(before, after, tolerance=EXACT)


def test_several_results() -> None:
    def function(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        first, second = (c * 2).split(2)
        largest, index = c.view(2, 2).max(1)
        return x + first.repeat(2) - second.repeat(2) * largest[0] + index.sum()

    before = program_of(function, numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == {"add": 2, "sub": 1}
    assert_same_function(before, after, tolerance=ROUNDED)


def test_one_constant_used_by_several_chains() -> None:
    before = program_of(lambda x, c: (x * c.exp(), x + c.exp().sin(), x - c), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == {"mul": 1, "add": 1, "sub": 1}
    assert_same_function(before, after, tolerance=ROUNDED)


def test_constant_outputs() -> None:
    before = program_of(lambda x, c: (x.sin(), c.exp()), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == {"sin": 1}
    assert_same_function(before, after, tolerance=ROUNDED)


def test_complex_numbers() -> None:
    def rotary(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(
            torch.view_as_complex(x.view(2, 2)) * torch.polar(angle * 0 + 1, angle)
        )

    before = program_of(rotary, numbers(2))
    after = optimized(before, PASS)
    assert counts(after) == {"view": 1, "view_as_complex": 1, "mul": 1, "view_as_real": 1}
    assert_same_function(before, after, tolerance=ROUNDED)


def test_long_chain() -> None:
    def function(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for _ in range(300):
            c = (c + 0.01).sin()
        return x * c

    after = optimized(program_of(function, numbers(4)), PASS)
    assert counts(after) == {"mul": 1}
    assert step(after, PASS).sites[0].note == "a constant of shape (4,) from 600 operators"


def test_shared_weights_are_not_stored_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(600, 512)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = (x * 0).long()
            return self.embedding(tokens).tanh() @ self.embedding.weight.t()

    before = captured(Tied().eval(), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "the constant would take 1.2 MiB in the model and replace 0 bytes"
    ]


def test_large_weights_that_are_replaced_fold() -> None:
    # 1.2 MiB in, 1.2 MiB out, by two ways from one weight, as in spectral norm.
    weight = numbers(600, 512)
    after = optimized(program_of(lambda x, w: x.sum() * (w / w.view(-1).norm()), weight), PASS)
    assert counts(after) == {"sum": 1, "mul": 1}


def test_refuses_what_would_make_the_model_larger() -> None:
    before = program_of(lambda x, c: x.sum() + c.repeat(1000, 1), numbers(1000))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "the constant would take 3.8 MiB in the model and replace 3.9 KiB"
    ]


def test_folds_up_to_what_would_make_the_model_larger() -> None:
    before = program_of(lambda x, c: x.sum() + (c * 2).repeat(1000, 1), numbers(1000))
    assert counts(optimized(before, PASS)) == {"sum": 1, "repeat": 1, "add": 1}


def test_refuses_large_tensors_from_nothing() -> None:
    before = program_of(lambda x: x.sum() + torch.ones(129, 128))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "the constant would take 64.5 KiB in the model and replace 0 bytes"
    ]
    smaller = program_of(lambda x: x.sum() + torch.ones(128, 128))
    assert counts(optimized(smaller, PASS)) == {"sum": 1, "add": 1}


def test_refuses_random_numbers() -> None:
    before = program_of(lambda x, c: x + torch.bernoulli(c) + torch.rand(4), torch.rand(4))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["it draws random numbers", "it draws random numbers"]


def test_refuses_what_overflows() -> None:
    scales = torch.tensor([0.5, 1.2, -0.3, 0.9], dtype=torch.float16)
    before = captured(Constants(lambda x, c: x + c * 60000, scales).eval(), numbers(4).half())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["its result is finite in float64 and overflows in float16"]


def test_infinity_of_the_models_own_stays() -> None:
    before = program_of(lambda x, c: x + 1 / (c * 0), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == {"add": 1}
    assert_same_function(before, after, tolerance=EXACT)


def test_refuses_what_reads_bits() -> None:
    # float32's bits as integers: a float64 run has twice as many of them.
    before = program_of(lambda x, c: (x.sin(), c.view(torch.int16).float()), numbers(4))
    after = optimized(before, PASS)
    assert reasons(after, PASS) == [
        "in float64 it gives another shape or dtype, as where it reads bits"
    ]


def test_refuses_what_does_not_run_in_float64() -> None:
    before = program_of(lambda x, c: (x.sin(), c.view(torch.int32).view(2, 2).float()), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "view_1 does not run in float64 (shape '[2, 2]' is invalid for input of size 8)"
    ]


def test_leaves_constants_that_are_written_alone() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor([0.5, 1.5]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * self.count.exp().sum()

    before = captured(Counter(), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)


def test_leaves_fake_quantisation_to_the_engine() -> None:
    before = program_of(
        lambda x, w: x * torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127), numbers(4)
    )
    after = optimized(before, PASS)
    assert counts(after) == counts(before)


def test_leaves_uninitialised_memory_alone() -> None:
    before = program_of(lambda x: x + torch.empty(4).fill_(2.5))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)


def test_leaves_dynamic_shapes_alone() -> None:
    class Positions(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[0]) * 2 + torch.zeros(x.shape[0]) + torch.ones(1)

    before = capture(
        LoadedModel("d", Positions(), (numbers(4),), {}, dynamic_shapes=({0: Dim("n", min=2)},))
    )
    after = optimized(before, PASS)
    left = {name: n for name, n in counts(after).items() if name != "sym_size"}
    assert left == {"arange": 1, "mul": 1, "zeros": 1, "add": 3}
    longer = numbers(7)
    # The same operators on the same numbers: equal to the last bit.
    torch.testing.assert_close(
        after.graph_module(longer), before.graph_module(longer), rtol=0, atol=0
    )


def test_leaves_what_is_made_like_a_tensor_of_dynamic_shape() -> None:
    class Like(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones_like(x) * 2 + x.new_full((1,), 3) + x.new_zeros(x.shape[0])

    before = capture(
        LoadedModel("d", Like(), (numbers(4),), {}, dynamic_shapes=({0: Dim("n", min=2)},))
    )
    after = optimized(before, PASS)
    left = {name: n for name, n in counts(after).items() if name != "sym_size"}
    assert left == {"ones_like": 1, "mul": 1, "new_zeros": 1, "add": 3}
    longer = numbers(7)
    # The same operators on the same numbers: equal to the last bit.
    torch.testing.assert_close(
        after.graph_module(longer), before.graph_module(longer), rtol=0, atol=0
    )


def test_leaves_sizes_that_depend_on_numbers_alone() -> None:
    before = program_of(lambda x, c: x + c.nonzero().sum(), numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)


def test_nothing_to_do() -> None:
    before = program_of(lambda x, c: x * c + 1, numbers(4))
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert constants_of(after)[0].data_ptr() == constants_of(before)[0].data_ptr()


def test_a_copy_that_is_returned_stays() -> None:
    """So that no caller gets the model's own constant, and none of two gets the other's."""

    def function(x: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return c.clone(), x + 1, (c * 2).clone()

    before = program_of(function, torch.tensor([1.5, 2.5, 3.5, 4.5]))
    after = optimized(before, PASS)
    assert counts(after) == {"clone": 1, "add": 1}
    assert [each.note for each in step(after, PASS).sites] == [
        "a constant of shape (4,) from 2 operators"
    ]
    assert_same_function(before, after, tolerance=EXACT)
    assert_settled(after, PASS)
