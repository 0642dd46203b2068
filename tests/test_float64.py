"""The float64 run computes the function a model was written for, and changes nothing on its way."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from optfuse import float64
from optfuse.float64 import (
    call_float64,
    distance,
    random_inputs,
    run_float64,
    run_stepwise,
    torch_threads,
    widened,
)
from tests.harness import captured, scramble

INFINITE = float("inf")


class Calling(nn.Module):
    """A module whose forward is a function of its linear layer and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.linear, *args, **kwargs)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    program = captured(scramble(Calling(function)), *args, kwargs=kwargs)
    return run_float64(program.graph_module, program.example_args, program.example_kwargs)


def test_it_is_what_the_module_gives_in_float64() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()))
    x = numbers(2, 3, 8, 8)
    program = captured(module, x)
    (given,) = run_float64(program.graph_module, (x,), {})
    expected = copy.deepcopy(module).double()(x.double())
    # 1e-13: the same operators on the same float64 numbers, perhaps in another order of summing;
    # float32 anywhere on the way would leave 1e-7.
    assert distance([expected.detach()], [given]) < 1e-13


@pytest.mark.parametrize(
    "cast",
    [
        lambda linear, x: linear(x).half().float() + 1,
        lambda linear, x: linear(x).to(torch.bfloat16).to(torch.float32) + 1,
        lambda linear, x: linear(x) + torch.ones(4, dtype=torch.float16),
        lambda linear, x: linear(x) + torch.full((4,), 1.0, dtype=torch.float32),
        lambda linear, x: linear(x) + torch.ones_like(x, dtype=torch.bfloat16),
    ],
)
def test_casts_inside_the_graph_are_read_as_float64(cast: Callable[..., Any]) -> None:
    x = numbers(2, 4)
    module = scramble(Calling(lambda linear, x: linear(x) + 1))
    (expected,) = run_float64(captured(module, x).graph_module, (x,), {})
    (given,) = run(cast, x)
    assert given.dtype is torch.float64
    # 1e-14: one rounding in float64; bfloat16 anywhere on the way would leave 1e-3.
    assert distance([expected], [given]) < 1e-14


def test_an_autocast_block_is_read_as_float64() -> None:
    def autocast(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: torch.Tensor = linear(x)
        return y

    x = numbers(2, 4)
    (expected,) = run(lambda linear, x: linear(x), x)
    # Exactly: the casts become no-ops, what is left are the same operators.
    assert distance([expected], run(autocast, x)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_run_in_float64(dtype: torch.dtype) -> None:
    module = scramble(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(-1)).to(dtype))
    x = numbers(2, 4).to(dtype)
    (given,) = run_float64(captured(module, x).graph_module, (x,), {})
    expected = copy.deepcopy(module).double()(x.double()).detach()
    # 1e-13: the same operators in float64; in the model's own dtype 1e-3 would be left.
    assert distance([expected], [given]) < 1e-13


def branching(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    def positive(x: torch.Tensor) -> torch.Tensor:
        return linear(x).half().float() + 1  # type: ignore[no-any-return]

    def negative(x: torch.Tensor) -> torch.Tensor:
        return linear(x).to(torch.bfloat16).float() * 0.1  # type: ignore[no-any-return]

    picked: torch.Tensor = torch.cond(x.sum() > 0, positive, negative, (x,))
    return picked


@pytest.mark.parametrize("sign", [1, -1])
def test_casts_in_the_branches_of_cond_are_read_as_float64(sign: int) -> None:
    x = sign * numbers(2, 4).abs()
    (given,) = run(branching, x)
    (linear,) = run(lambda linear, x: linear(x), x)
    expected = linear + 1 if sign > 0 else linear * 0.1
    # 1e-14: one rounding in float64.
    assert distance([expected], [given]) < 1e-14


def test_casts_in_a_branch_of_a_branch_are_read_as_float64() -> None:
    def nested(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return x.half().float() + 1

        def outer(x: torch.Tensor) -> torch.Tensor:
            picked: torch.Tensor = torch.cond(x.max() > 0, inner, lambda x: x * 3, (x,))
            return picked * 2

        taken: torch.Tensor = torch.cond(x.sum() > 0, outer, lambda x: x - 1, (x,))
        return taken

    x = numbers(2, 4).abs()
    # Exactly: float32 numbers are exact in float64, and so are their sum with 1 and its double.
    assert torch.equal(run(nested, x)[0], (x.double() + 1) * 2)


def test_a_branch_is_widened_in_a_copy() -> None:
    program = captured(scramble(Calling(branching)), numbers(2, 4))
    before = program.graph_module.print_readable(print_output=False)
    run_float64(program.graph_module, program.example_args, {})
    assert program.graph_module.print_readable(print_output=False) == before


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor([1.5, 2.5], dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(7))
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen.add_(x)
        self.calls += 1
        x.mul_(2)
        index.add_(1)
        return x * self.seen * self.weight, self.calls * 2, index


def test_what_forward_writes_to_is_not_changed() -> None:
    """Neither buffers nor inputs, even those that need no widening and could be shared."""
    x, index = torch.tensor([10.0, 20.0], dtype=torch.float64), torch.tensor([3, 4])
    module = Counting()
    program = captured(module, x, index)
    state = copy.deepcopy(program.graph_module.state_dict())
    results = [run_float64(program.graph_module, (x, index), {}) for _ in range(2)]
    for product, calls, written in results:
        # Exactly: small whole and half numbers. 2x (s + x) w: 20 * 11.5 * 3 and 40 * 22.5 * 4.
        assert torch.equal(product, torch.tensor([690.0, 3600.0], dtype=torch.float64))
        assert int(calls) == 16
        assert written.tolist() == [4, 5]
    assert x.tolist() == [10.0, 20.0]
    assert index.tolist() == [3, 4]
    after = program.graph_module.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_parameters_stay_as_they_are() -> None:
    module = scramble(nn.Linear(4, 4))
    program = captured(module, numbers(2, 4))
    run_float64(program.graph_module, program.example_args, {})
    assert {each.dtype for each in program.graph_module.parameters()} == {torch.float32}
    assert torch.get_default_dtype() is torch.float32


def test_the_default_dtype_comes_back_after_a_failure() -> None:
    program = captured(nn.Linear(4, 4), numbers(2, 4))
    with pytest.raises(RuntimeError):
        run_float64(program.graph_module, (numbers(2, 5),), {})
    assert torch.get_default_dtype() is torch.float32


def random(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    noise = torch.rand_like(x) + torch.randn(4) + torch.bernoulli(x.sigmoid())
    return nn.functional.dropout(linear(x), 0.5, training=True) + noise


def test_random_operators_draw_from_the_seed_alone() -> None:
    program = captured(scramble(Calling(random)), numbers(2, 4))
    before = torch.random.get_rng_state()

    def once(seed: int) -> list[Any]:
        return run_float64(program.graph_module, program.example_args, {}, seed)

    first = once(5)
    torch.rand(17)
    # Exactly: the same numbers are drawn.
    assert distance(first, once(5)) == 0.0
    assert distance(first, once(6)) > 0.1
    torch.random.set_rng_state(before)
    once(5)
    assert torch.equal(torch.random.get_rng_state(), before), "a run must not move the caller's"


def test_integer_and_boolean_outputs_keep_their_dtypes() -> None:
    x = numbers(3, 4)
    index, positive, count, size = run(lambda linear, x: (x.argmax(1), x > 0, 7, x.shape[0]), x)
    assert torch.equal(index, x.argmax(1))
    assert index.dtype is torch.int64
    assert torch.equal(positive, x > 0)
    assert (count, size) == (7, 3)


def test_complex_numbers_are_read_as_complex128() -> None:
    x = torch.complex(numbers(4), numbers(4) + 1)
    (given,) = run(lambda linear, x: x * x, x)
    assert given.dtype is torch.complex128
    # 1e-14: one rounding in float64.
    assert distance([x.to(torch.complex128) ** 2], [given]) < 1e-14


def test_any_nesting_of_inputs() -> None:
    def nested(linear: nn.Linear, pair: Any, times: int, none: Any, *, named: Any) -> Any:
        return {"a": pair[0] * times, "b": [pair[1] + named["x"], none]}

    a, b, c = numbers(4), numbers(2, 4), numbers(1)
    first, second, *rest = run(nested, (a, b), 3, None, named={"x": c})
    # Exactly: one operation on numbers that are exact in float64, done twice alike.
    assert torch.equal(first, a.double() * 3)
    assert torch.equal(second, b.double() + c.double())
    assert [each for each in rest if each is not None] == []


def test_a_dynamic_batch_runs_with_another_one() -> None:
    from optfuse.capture import capture
    from optfuse.stages import LoadedModel

    module = scramble(nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)))
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = capture(LoadedModel("net", module, (numbers(2, 4),), dynamic_shapes=shapes))
    (given,) = run_float64(program.graph_module, (numbers(5, 4),), {})
    assert given.shape == (20,)


def test_results_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the chain, only a few of its results are alive at once."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    real = float64._call

    def watched(target: Any, args: Any, kwargs: Any) -> Any:
        nonlocal most
        result = real(target, args, kwargs)
        alive.add(result)
        most = max(most, len(alive))
        return result

    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = x.exp()
            for _ in range(20):
                x = x.sigmoid() + kept
            return x

    program = captured(Chain(), numbers(4))
    monkeypatch.setattr(float64, "_call", watched)
    run_float64(program.graph_module, program.example_args, {})
    # What is kept, what an operator reads and what it gives.
    assert most == 3


def steps(
    function: Callable[..., Any], *args: Any, widen: bool, seed: int = 0, replace: Any = None
) -> list[tuple[str, Any]]:
    """Name and result of every step of a run."""
    program = captured(scramble(Calling(function)), *args)
    run = run_stepwise(program.graph_module, args, {}, widen=widen, seed=seed, replace=replace)
    return [(node.name, result) for node, result in run]


def doubled(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return (linear(x) * 2).relu()


def test_a_run_in_steps_gives_every_node_with_its_result() -> None:
    x = numbers(2, 4)
    found = steps(doubled, x, widen=False)
    assert [name for name, _ in found] == ["args_0", "linear", "mul", "relu", "output"]
    (given,) = found[-1][1]
    assert torch.equal(given, scramble(Calling(doubled))(x)), "in its own precision"


def test_a_run_in_steps_can_be_in_float64() -> None:
    x = numbers(2, 4)
    found = dict(steps(doubled, x, widen=True))
    assert {found[name].dtype for name in ("args_0", "linear", "relu")} == {torch.float64}
    # Exactly: the same operators on the same numbers.
    assert torch.equal(found["output"][0], run(doubled, x)[0])


def test_later_steps_read_what_a_result_is_replaced_with() -> None:
    x = numbers(2, 4)

    def replaced(node: Any, result: torch.Tensor) -> torch.Tensor:
        return torch.full_like(result, 3.0) if node.name == "linear" else result

    found = dict(steps(doubled, x, widen=False, replace=replaced))
    assert torch.equal(found["relu"], torch.full((2, 4), 6.0))
    assert torch.equal(found["linear"], dict(steps(doubled, x, widen=False))["linear"]), (
        "what a step gave by itself is told all the same"
    )


def test_runs_that_take_turns_do_not_see_each_other() -> None:
    x = numbers(2, 4)
    program = captured(scramble(Calling(random)), x)
    before = torch.random.get_rng_state()
    runs = [
        run_stepwise(program.graph_module, (x,), {}, widen=widen, seed=5)
        for widen in (True, False, False)
    ]
    for results in zip(*runs, strict=True):
        wide, one, other = (pytree.tree_leaves(result) for _, result in results)
        assert (wide[0].dtype, one[0].dtype) == (torch.float64, torch.float32)
        assert torch.equal(one[0], other[0]), "they draw the same numbers"
        assert torch.get_default_dtype() is torch.float32
        assert torch.is_grad_enabled()
    # Exactly: the same numbers are drawn as in a run of its own.
    assert torch.equal(wide[0], run_float64(program.graph_module, (x,), {}, seed=5)[0])
    assert torch.equal(torch.random.get_rng_state(), before), "a run must not move the caller's"


@pytest.mark.parametrize("widen", [True, False])
def test_a_run_in_steps_frees_what_it_gave(widen: bool) -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = x.sigmoid()
            return x

    program = captured(Chain(), numbers(4))
    given: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for node, result in run_stepwise(program.graph_module, (numbers(4),), {}, widen=widen):
        if node.op != "placeholder":  # which is the caller's own
            given += map(weakref.ref, pytree.tree_leaves(result))
        del result
        most = max(most, sum(each() is not None for each in given))
    # What an operator reads and what it gives.
    assert most == 2


@pytest.mark.parametrize("widen", [True, False])
def test_a_run_in_steps_writes_to_nothing_of_the_callers(widen: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            x.mul_(2)
            return x * self.seen

    x = numbers(4)
    program = captured(Counting(), x.clone())
    for _ in run_stepwise(program.graph_module, (x,), {}, widen=widen):
        pass
    assert float(program.graph_module.seen) == 3.0
    assert torch.equal(x, numbers(4))


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    # Set and not run with: two of them misbehave on some machines.
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_call_float64_reads_every_float_type_as_float64() -> None:
    x = numbers(4)
    aten = torch.ops.aten
    made = call_float64(aten._to_copy.default, (x,), {"dtype": torch.float16})
    assert made.dtype is torch.float64
    assert torch.equal(made, x.double())
    assert call_float64(aten.ones.default, ([2],), {}).dtype is torch.float64
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex128),
        (torch.int8, torch.int8),
        (torch.bool, torch.bool),
    ],
)
def test_which_dtype_stands_for_which(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert widened(dtype) is wide


# Random inputs


def test_random_inputs_are_like_the_examples_with_other_numbers_in_them() -> None:
    image = numbers(2, 3, 4, 4).to(memory_format=torch.channels_last).half()
    ids, mask = torch.tensor([[3, 9], [5, 3]], dtype=torch.int32), torch.tensor([True, False])
    wave, none = torch.complex(numbers(5), numbers(5)), torch.empty(0, dtype=torch.int64)
    args, kwargs = random_inputs((image, (ids, 7)), {"a": [mask, None], "b": wave, "c": none}, 1)
    drawn, (drawn_ids, seven) = args
    assert (drawn.shape, drawn.dtype) == (image.shape, torch.float16)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(drawn, image)
    assert drawn_ids.dtype is torch.int32
    assert int(drawn_ids.min()) >= 3
    assert int(drawn_ids.max()) <= 9
    assert seven == 7
    assert kwargs["a"][0].dtype is torch.bool
    assert kwargs["a"][1] is None
    assert kwargs["b"].dtype is torch.complex64
    assert float(kwargs["b"].imag.abs().sum()) > 0
    assert kwargs["c"].shape == (0,)


def test_random_inputs_come_from_the_seed_alone() -> None:
    x = numbers(8)
    (first,), _ = random_inputs((x,), {}, 1)
    torch.rand(3)
    (again,), _ = random_inputs((x,), {}, 1)
    (other,), _ = random_inputs((x,), {}, 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_all_of_an_index_range_is_drawn() -> None:
    (drawn,), _ = random_inputs((torch.tensor([2, 4] * 50),), {}, 0)
    assert set(drawn.tolist()) == {2, 3, 4}


# Distance


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        ([doubles(3, 4)], [doubles(3, 4)], 0.0),
        ([doubles(3, 4)], [doubles(3, 4.5)], 0.1),
        ([doubles(3, 4), doubles(300, 400)], [doubles(3, 4.5), doubles(300, 401)], 0.1),
        ([doubles(0, 0)], [doubles(0, 0)], 0.0),
        ([doubles(0, 0)], [doubles(0, 1e-300)], INFINITE),
        ([doubles(3e200, 4e200)], [doubles(3e200, 4.5e200)], 0.1),
        ([doubles(3e-200, 4e-200)], [doubles(3e-200, 4.5e-200)], 0.1),
        ([doubles(3, 4, math.nan)], [doubles(3, 4.5, math.nan)], 0.1),
        ([doubles(3, math.inf)], [doubles(3, math.inf)], 0.0),
        ([doubles(3, math.inf)], [doubles(3, -math.inf)], INFINITE),
        ([doubles(3, math.inf)], [doubles(3, math.nan)], INFINITE),
        ([doubles(3, 4)], [doubles(3, math.nan)], INFINITE),
        ([doubles(math.nan)], [doubles(math.nan)], 0.0),
        ([doubles(3, 4)], [doubles(3, 4, 5)], INFINITE),
        ([doubles(3, 4)], [doubles(3, 4).float()], INFINITE),
        ([doubles(3, 4)], [], INFINITE),
        ([], [], 0.0),
        ([torch.tensor([1, 2])], [torch.tensor([1, 2])], 0.0),
        ([torch.tensor([1, 2])], [torch.tensor([1, 3])], INFINITE),
        ([torch.tensor([True])], [torch.tensor([False])], INFINITE),
        ([7], [7], 0.0),
        ([7], [8], INFINITE),
        ([None], [None], 0.0),
        ([torch.empty(0).double()], [torch.empty(0).double()], 0.0),
        ([torch.tensor([3 + 4j])], [torch.tensor([3 + 4.5j])], 0.1),
    ],
)
def test_distance(reference: list[Any], other: list[Any], expected: float) -> None:
    # 1e-6: complex64 rounds the quotient; in float64 all of these are exact to 1e-15.
    assert distance(reference, other) == pytest.approx(expected, rel=1e-6)


def test_infinities_and_not_a_numbers_do_not_stand_for_large_numbers() -> None:
    largest = torch.finfo(torch.float64).max
    assert distance([doubles(math.inf, 1)], [doubles(largest, 1)]) == INFINITE
    assert distance([doubles(math.nan, 1)], [doubles(0, 1)]) == INFINITE
