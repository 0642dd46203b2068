"""Concats, splits and slices that only carry numbers to and fro are taken out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optfuse.capture import capture
from optfuse.stages import LoadedModel, Program
from tests.harness import (
    assert_same_function,
    assert_settled,
    captured,
    counts,
    float64_distance,
    optimized,
    reasons,
    scramble,
    step,
)

PASS = "elide_concat"
PARTIAL = "elide_concat.partial"

# Numbers are moved and not computed with, so nothing may change, not even the last bit.
EXACT = 0.0
# A sum over all input channels becomes a sum of sums: a few units of 1e-16 in float64.
SUMMED_OTHERWISE = 1e-14


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> object:
        return self.function(*tensors)


def program(function: Callable[..., object], *channels: int) -> Program:
    """A function of tensors with so many channels each, in dimension 1."""
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(2, size, 3, generator=generator).double() for size in channels]
    return captured(Calls(function).eval(), *tensors)


def check(
    before: Program, expected: dict[str, int], passes: str = PASS, tolerance: float = EXACT
) -> Program:
    after = optimized(before, passes)
    assert counts(after) == expected
    assert_same_function(before, after, tolerance=tolerance)
    assert_settled(after, passes)
    return after


def refused(before: Program, reason: str, passes: str = PASS) -> None:
    after = check(before, counts(before), passes)
    assert reasons(after, PASS) == [reason]


def cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, 1)


# Case 1: nested concats.


def test_nested_concats_become_one() -> None:
    before = program(lambda a, b, c: cat(a, cat(b, cat(c, a)), cat(b, c)), 2, 3, 1)
    assert counts(before) == {"cat": 4}
    after = check(before, {"cat": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "3 inside it into one with it"


def test_a_concat_inside_twice() -> None:
    def twice(a: Tensor, b: Tensor) -> Tensor:
        inner = cat(a, b)
        return torch.cat([inner, b, inner], -2)

    check(program(twice, 2, 3), {"cat": 1})


def test_concats_nested_deeper_than_python_may_recurse() -> None:
    # Only the description is deep: the model adds one tensor at a time to what it has.
    def deep(a: Tensor) -> Tensor:
        result = a
        for _ in range(300):
            result = cat(result, a)
        return result

    check(program(deep, 1), {"cat": 1})


def test_refuses_a_nested_concat_that_others_see() -> None:
    def seen(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        inner = cat(a, b)
        return inner.relu() + inner.sum(), cat(inner, b)

    refused(
        program(seen, 2, 3),
        "the concat inside it stays: the result of cat has 3 users",
    )


def test_concats_along_different_dimensions_are_left_alone() -> None:
    before = program(lambda a, b: torch.cat([cat(a, b), cat(b, a)], 2), 2, 3)
    assert reasons(check(before, {"cat": 3}), PASS) == []


# Case 2: pieces put back together.


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.split(3, 1),
        lambda x: x.split([1, 2, 5], -2),
        lambda x: x.chunk(3, 1),
        lambda x: x.unsafe_chunk(3, 1),
        lambda x: x.tensor_split(3, 1),
        lambda x: (x[:, 0:4], x[:, 4:8]),
        lambda x: (x[:, :-5], x[:, -5:-5], x[:, 3:100]),
        lambda x: (x.narrow(1, 0, 2), x[:, 2:][:, :3], x[:, 5:]),
        lambda x: (x[:, :2], *x[:, 2:].split([1, 5], 1)),
    ],
)
def test_all_pieces_of_a_tensor_are_that_tensor(
    cut: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    check(program(lambda x: cat(*cut(x)).relu(), 8), {"relu": 1})


def test_the_result_may_be_an_output_of_the_model() -> None:
    check(program(lambda x: cat(*x.relu().split(2, 1)), 8), {"relu": 1})


def test_pieces_that_others_see_too_are_joined_where_no_slice_is_needed() -> None:
    def c2f(x: Tensor) -> Tensor:
        pieces = x.relu().split([1, 2, 5], 1)
        return cat(*pieces, *(piece.exp() for piece in pieces))

    after = check(program(c2f, 8), {"relu": 1, "split_with_sizes": 1, "exp": 3, "cat": 1})
    concat = next(
        n for n in after.graph_module.graph.nodes if n.target is torch.ops.aten.cat.default
    )
    assert [each.name for each in concat.args[0]] == ["relu", "exp", "exp_1", "exp_2"]
    (site,) = step(after, PASS).sites
    assert site.note == "3 pieces of relu joined"


def test_adjacent_slices_are_one() -> None:
    before = program(lambda x: cat(x[:, 1:4], x[:, 4:6], x[:, 6:-1]), 8)
    after = check(before, {"slice": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "3 pieces of tensors_0 joined into a slice"


def test_a_cut_along_another_dimension_is_not_looked_through() -> None:
    def inner(x: Tensor) -> Tensor:
        narrow = x[..., :2]
        return cat(narrow[:, :3], narrow[:, 3:]).exp()

    check(program(inner, 8), {"slice": 1, "exp": 1})


def test_adjacent_slices_beside_another_tensor() -> None:
    before = program(lambda x, y: cat(y, x[:, 1:4], x[:, 4:6], x[:, 7:]), 8, 2)
    check(before, {"slice": 2, "cat": 1})


def test_a_split_gets_fewer_pieces_where_others_are_in_use() -> None:
    def part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = x.split([1, 2, 2, 3], 1)
        return cat(b, c, y), a.exp() + d.mean()

    before = program(part, 8, 2)
    after = check(before, {"split_with_sizes": 1, "cat": 1, "exp": 1, "mean": 1, "add": 1})
    (split,) = (n for n in after.graph_module.graph.nodes if "split" in n.name)
    assert split.args[1] == [1, 4, 3]
    (site,) = step(after, PASS).sites
    assert site.note == "4 pieces of tensors_0 into 3, joined again by cat"


def test_a_split_of_which_one_concat_takes_all_that_is_used() -> None:
    def part(x: Tensor, y: Tensor) -> Tensor:
        _, a, b, c = x.split([1, 2, 2, 3], 1)
        return cat(a, b, y, c)

    check(program(part, 8, 2), {"split_with_sizes": 1, "cat": 1})

    def run(x: Tensor, y: Tensor) -> Tensor:
        _, a, b, _ = x.split([1, 2, 2, 3], 1)
        return cat(a, b, y)

    check(program(run, 8, 2), {"slice": 1, "cat": 1})


def test_two_concats_of_one_split() -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = x.split(2, 1)
        return cat(a, b).relu(), cat(c, d)

    after = check(program(two, 8), {"split_with_sizes": 1, "relu": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "4 pieces of tensors_0 into 2, joined again by cat and cat_1"


def test_what_is_used_in_front_of_the_concat_is_replaced_there() -> None:
    def part(x: Tensor) -> Tensor:
        a, b, c = x.split([2, 3, 3], 1)
        return cat(a, b, c.exp())

    check(program(part, 8), {"split_with_sizes": 1, "exp": 1, "cat": 1})


def test_a_split_keeps_the_pieces_that_are_seen_twice() -> None:
    def seen(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = x.split(2, 1)
        return cat(a, b, y, b), cat(c, d, y) + d.sum()

    before = program(seen, 8, 3)
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert_same_function(before, after, tolerance=EXACT)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: cat(*reversed(x.split(2, 1))),
        lambda x: torch.cat(x.split(2, 1), 2),
        lambda x: cat(x[:, 0:2], x[:, 4:6], x[:, 2:4], x[:, 6:8]),
        lambda x: cat(x[:, 0:4:2], x[:, 2:6:2]),
        lambda x: cat(*(torch.exp(piece) for piece in x.split(4, 1))),
    ],
)
def test_pieces_in_another_order_stay(function: Callable[[Tensor], Tensor]) -> None:
    before = program(function, 8)
    assert reasons(check(before, counts(before)), PASS) == []


def test_refuses_to_join_what_would_add_an_operator() -> None:
    def seen(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b, c = x[:, 0:3], x[:, 3:5], x[:, 5:8]
        return cat(a, b, y), a, b, c

    refused(
        program(seen, 8, 2),
        "joining 2 of its pieces of tensors_0 would add an operator, since they have other users",
    )


def test_a_piece_that_stays_in_the_concat_does_not_pay_for_a_slice() -> None:
    def stays(x: Tensor, y: Tensor) -> Tensor:
        a, (b, c) = x[:, 0:3], x[:, 3:].split([2, 3], 1)
        return cat(a, b, y, a) * cat(c, y, y, b)

    before = program(stays, 8, 3)
    after = optimized(before, PASS)
    assert sum(counts(after).values()) <= sum(counts(before).values())
    assert_same_function(before, after, tolerance=EXACT)


# Case 3: cuts of a concat.


def test_a_split_at_the_borders_takes_the_inputs() -> None:
    def apart(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = cat(a, b).split([3, 5], 1)
        return first.exp(), second

    before = program(apart, 3, 5)
    after = check(before, {"exp": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "takes 2 inputs of cat directly"


def test_a_split_takes_concats_of_the_inputs() -> None:
    before = program(lambda a, b, c: cat(a, b, c, a).split([3, 4], 1), 1, 2, 3)
    check(before, {"cat": 2})


def test_one_result_of_a_split_that_is_an_input() -> None:
    def one(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        whole = cat(a, b, c)
        return (whole.exp(), *whole.split([3, 1, 2], 1))

    after = check(program(one, 3, 2, 1), {"cat": 1, "exp": 1, "split_with_sizes": 1})
    picks = [n for n in after.graph_module.graph.nodes if n.name.startswith("getitem")]
    assert len(picks) == 2


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 3, {}),
        (3, 8, {}),
        (4, 7, {"slice": 1}),
        (0, 8, {"cat": 1}),
        (0, 9, {"cat": 1, "alias": 1}),  # a slice that cuts nothing is captured as an alias
    ],
)
def test_a_slice_takes_the_inputs(start: int, stop: int, expected: dict[str, int]) -> None:
    check(program(lambda a, b, c: cat(a, b, c)[:, start:stop], 3, 5, 1), expected)


def test_a_slice_of_a_concat_that_others_see() -> None:
    def sliced(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        whole = cat(a, b)
        return whole, whole[:, :3].exp(), whole[:, 4:6].exp()

    after = check(program(sliced, 3, 5), {"cat": 1, "slice": 1, "exp": 2})
    (cut,) = (n for n in after.graph_module.graph.nodes if n.name.startswith("slice"))
    assert cut.args[0].name == "tensors_1"


def test_refuses_a_cut_across_the_borders() -> None:
    refused(
        program(lambda a, b: cat(a, b).split(4, 1), 3, 5),
        "taking its pieces from the inputs of cat would need 3 operators in place of 2",
    )


def test_refuses_a_slice_that_would_need_a_slice_and_a_concat() -> None:
    refused(
        program(lambda a, b: cat(a, b)[:, :6], 3, 5),
        "taking its pieces from the inputs of cat would need 2 operators in place of 2",
    )


def test_refuses_concats_of_the_inputs_beside_a_concat_that_others_see() -> None:
    def seen(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        whole = cat(a, b, c, a)
        return (whole.exp(), *whole.split([3, 4], 1))

    refused(
        program(seen, 1, 2, 3),
        "taking its pieces from the inputs of cat would need 2 operators in place of 1",
    )


def test_a_cut_along_another_dimension_than_the_concat_is_left_alone() -> None:
    before = program(lambda a, b: (cat(a, b)[..., :2], *cat(b, a).split(2, 2)), 3, 3)
    assert reasons(check(before, counts(before)), PASS) == []


def test_an_empty_slice_of_a_concat_is_left_alone() -> None:
    before = program(lambda a, b: cat(a, b)[:, 5:2].sum() + a.sum(), 3, 5)
    assert reasons(check(before, counts(before)), PASS) == []


# Case 4: convolutions of a concat.


class OnConcat(nn.Module):
    """Layers on a concat of the inputs along `dim`."""

    def __init__(self, *layers: nn.Module, dim: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dim = dim

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        whole = torch.cat(tensors, self.dim)
        return [layer(whole) for layer in self.layers]


def images(*channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, size, 4, 4, generator=generator).double() for size in channels]


def on_concat(*layers: nn.Module) -> Program:
    return captured(scramble(OnConcat(*layers)).double(), *images(3, 5, 1))


def test_partial_sums_convolutions_of_the_inputs() -> None:
    before = on_concat(nn.Conv2d(9, 4, 1, stride=2, padding=1), nn.Conv2d(9, 2, 1, bias=False))
    assert reasons(check(before, {"cat": 1, "conv2d": 2}), PASS) == []
    after = check(before, {"conv2d": 6, "add": 4}, PARTIAL, SUMMED_OTHERWISE)
    (site,) = step(after, PASS).sites
    assert site.note == "2 layers on it into a sum over its 3 inputs"
    assert site.rewrite is not None
    assert site.rewrite.options == {"partial"}


def test_partial_of_a_linear_layer_on_features() -> None:
    module = scramble(OnConcat(nn.Linear(5, 4), dim=-1)).double()
    before = captured(module, torch.randn(2, 3).double(), torch.randn(2, 2).double())
    check(before, {"linear": 2, "add": 1}, PARTIAL, SUMMED_OTHERWISE)


def test_partial_keeps_the_dtype_of_the_model() -> None:
    module = scramble(OnConcat(nn.Conv2d(9, 4, 1))).half()
    before = captured(module, *(image.half() for image in images(3, 5, 1)))
    after = check(before, {"conv2d": 3, "add": 2}, PARTIAL, SUMMED_OTHERWISE)
    assert {p.dtype for p in after.graph_module.parameters()} == {torch.float16}


def test_partial_of_a_concat_along_another_dimension_is_none_of_its_business() -> None:
    module = scramble(OnConcat(nn.Conv2d(4, 2, 1), dim=2)).double()
    before = captured(module, *images(4, 4))
    assert reasons(check(before, counts(before), PARTIAL), PASS) == []


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(9, 4, 1), nn.ReLU()], "relu (layers.1) reads it too"),
        ([nn.Conv2d(9, 4, 1), nn.Identity()], "output reads it too"),
        ([nn.Conv2d(9, 4, 3)], "the kernel of conv2d (layers.0) is 3x3, not 1x1"),
        ([nn.Conv2d(9, 9, 1, groups=3)], "conv2d (layers.0) has 3 groups"),
        (
            [nn.ConvTranspose2d(9, 4, 1)],
            "conv_transpose2d (layers.0) is a transposed convolution",
        ),
    ],
)
def test_partial_refuses(layers: list[nn.Module], reason: str) -> None:
    refused(on_concat(*layers), f"the concat stays, since {reason}", PARTIAL)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_partial_refuses_what_is_not_a_constant(what: str) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 8, 1, 1))

        def forward(self, a: Tensor, b: Tensor, given: Tensor) -> Tensor:
            constants = (given, None) if what == "weight" else (self.weight, given)
            return F.conv2d(cat(a, b), *constants)

    given = torch.randn(2, 8, 1, 1) if what == "weight" else torch.randn(2)
    module = scramble(Computed()).double()
    refused(
        captured(module, *images(3, 5), given.double()),
        f"the concat stays, since the {what} of conv2d is not a constant",
        PARTIAL,
    )


# Guards of all cases.


def test_refuses_memory_that_the_model_writes_to() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(2, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            before = cat(*self.state.view(2, 12)[:, :8].split(2, 1))
            self.state.add_(x)
            return before

    program = captured(Written().double().eval(), torch.randn(2, 4, 3).double())
    after = optimized(program, PASS)
    assert counts(after) == counts(program)
    assert set(reasons(after, PASS)) == {"the model writes to state"}


def test_a_concat_that_converts_an_input_is_left_alone() -> None:
    def converts(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return cat(a.to(torch.float32), b).split([2, 3], 1)

    before = program(converts, 2, 3)
    assert reasons(check(before, counts(before)), PASS) == []


def test_sizes_known_only_at_run_time() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        along_channels = cat(*x.split(2, 1))
        along_time = torch.cat([x[..., :2], x[..., 2:]], 2)
        return along_channels.exp(), along_time.exp()

    x = torch.randn(3, 4, 5).double()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("time", min=4)}
    model = LoadedModel("dynamic", Calls(both), (x,), {}, dynamic_shapes=((dims,),))
    before = capture(model)
    after = check(before, {"exp": 2, "slice": 2, "cat": 1})
    x = torch.randn(7, 4, 9).double()
    for expected, found in zip(both(x), after.graph_module(x), strict=True):
        assert torch.equal(expected, found)


# Together with combine_parallel_convs.


@pytest.mark.parametrize("activate", [F.relu, None])
def test_branches_that_only_a_concat_sees_leave_neither_split_nor_concat(
    activate: Callable[[Tensor], Tensor] | None,
) -> None:
    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Conv2d(4, size, 1) for size in (2, 3, 5))

        def forward(self, x: Tensor) -> Tensor:
            results = [branch(x) for branch in self.branches]
            return cat(*(map(activate, results) if activate else results))

    before = captured(scramble(Fire()).double(), *images(4))
    expected = {"conv2d": 1, "relu": 1} if activate else {"conv2d": 1}
    check(before, expected, f"combine_parallel_convs,{PASS}", SUMMED_OTHERWISE)


def test_an_inception_block_keeps_its_split_and_its_concat() -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = nn.ModuleList(nn.Conv2d(4, size, 1) for size in (2, 3, 5))
            self.wide = nn.Conv2d(5, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = (torch.relu(reduce(x)) for reduce in self.reduce)
            return cat(first, second, self.wide(third))

    before = captured(scramble(Inception()).double(), *images(4))
    after = check(
        before,
        {"conv2d": 2, "relu": 1, "split_with_sizes": 1, "cat": 1},
        f"combine_parallel_convs,{PASS}",
        SUMMED_OTHERWISE,
    )
    (split,) = (n for n in after.graph_module.graph.nodes if "split" in n.name)
    assert split.args[1] == [5, 5]  # the first two branches stay together


# Whatever is drawn.


class Drawn(nn.Module):
    """Applies drawn operations along dimension 1, each to earlier results; gives what is chosen.

    An operation is four numbers: which kind, and three that choose its operands and borders.
    """

    def __init__(self, operations: list[tuple[int, int, int, int]], outputs: int) -> None:
        super().__init__()
        self.operations = operations
        self.outputs = outputs

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        results = [x, y]
        for kind, *choice in self.operations:
            results += self._apply(kind, choice, results)
        kept = [r for index, r in enumerate(results) if self.outputs >> (index % 16) & 1]
        # What else there is counts too, without making each an output of its own.
        return [*kept, cat(*results[-3:])]

    @staticmethod
    def _apply(kind: int, choice: list[int], results: list[Tensor]) -> list[Tensor]:
        a, b, c = (results[-1 - each % len(results)] for each in choice)
        size = a.shape[1]
        if kind == 0:
            return [cat(a, b)] if size + b.shape[1] <= 40 else [a * 1.5]
        if kind == 1:
            neighbours = results[-2 - choice[0] % (len(results) - 1) :][:3]
            return [cat(*neighbours)] if sum(n.shape[1] for n in neighbours) <= 40 else [c - 1.0]
        if kind == 2:
            first = choice[1] % (size + 1)
            return list(a.split([first, size - first], 1))
        if kind == 3:
            return list(a.split(1 + choice[1] % 3 + size // 4, 1))
        return [a[:, choice[1] % (size + 1) :][:, : 1 + choice[2] % 5]]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), *[st.integers(0, 30)] * 3), min_size=3, max_size=9),
    st.integers(0, 2**16 - 1),
)
def test_any_nest_of_concats_splits_and_slices(
    operations: list[tuple[int, int, int, int]], outputs: int
) -> None:
    generator = torch.Generator().manual_seed(11)
    inputs = [torch.randn(1, size, 2, generator=generator).double() for size in (6, 4)]
    before = captured(Drawn(operations, outputs), *inputs)
    after = optimized(before, PASS)
    assert float64_distance(before, after) == EXACT
    assert sum(counts(after).values()) <= sum(counts(before).values())
    assert_settled(after, PASS)
