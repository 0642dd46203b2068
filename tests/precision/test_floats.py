"""fp16 and bf16 in the graph: what runs low, what stays, and what it costs in accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from optfuse.capture import capture
from optfuse.errors import ModelError, UsageError
from optfuse.explain import histories
from optfuse.export import export
from optfuse.float64 import distance, random_inputs, run_float64, run_stepwise
from optfuse.graph import kind, value
from optfuse.precision import Lowering, layers, lower
from optfuse.stages import LoadedModel, Program, Step
from tests.harness import captured, counts, optimized, scramble
from tests.precision.written import exported_again

aten = torch.ops.aten

UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""By how much a number is rounded at most, relative to itself."""

DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}
ONNX_TYPE = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}

both = pytest.mark.parametrize("low", ["fp16", "bf16"])


def done(program: Program) -> Step:
    """What was noted of the last lowering."""
    return program.trace[-1]


def low_kinds(program: Program) -> dict[str, int]:
    """How many operators of each kind give a result in a low precision, casts not counted."""
    return dict(_kinds(program, tuple(DTYPE.values())))


def high_kinds(program: Program) -> dict[str, int]:
    """How many operators of each kind give one in float32."""
    return dict(_kinds(program, (torch.float32,)))


def _kinds(program: Program, dtypes: Sequence[torch.dtype]) -> Counter[str]:
    return Counter(
        kind(node)
        for node in program.graph_module.graph.nodes
        if node.op == "call_function" and kind(node) not in ("_to_copy", "getitem")
        if any(leaf.dtype in dtypes for leaf in _tensors(value(node)))
    )


def _tensors(nested: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def casts(program: Program) -> int:
    return counts(program).get("_to_copy", 0)


def constants(program: Program) -> dict[str, torch.dtype]:
    held = program.graph_module.named_parameters(remove_duplicate=False)
    return {name: each.dtype for name, each in held}


def reasons(program: Program) -> dict[str, str]:
    """Why what stayed in float32 did, by the name of the operator."""
    found = {}
    for each in done(program).refused:
        assert each.involved is not None
        found[each.involved.operator] = each.reason
    return found


def ran(program: Program, *args: Any) -> list[torch.Tensor]:
    """What PyTorch gives, with each result checked against what its node says of it."""
    results: list[torch.Tensor] = []
    given = args or program.example_args
    for node, result in run_stepwise(program.graph_module, given, {}, widen=False):
        results = _tensors(result)
        if node.op != "output":
            expected = [(each.dtype, each.dim()) for each in _tensors(value(node))]
            assert [(each.dtype, each.dim()) for each in results] == expected, node
    return results


def drift(program: Program, lowered: Program, *args: Any) -> float:
    """Relative L2 to the float64 program, on the example inputs unless others are given."""
    given = args or program.example_args
    exact = run_float64(program.graph_module, given, {})
    return distance(exact, [each.double() for each in ran(lowered, *given)])


class Small(nn.Module):
    """What a network is made of: convolutions, a sum, pooling, a linear layer and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(self.stem(x)), 2)
        x = torch.cat([x, torch.relu(self.left(x) + self.right(x))], 1)
        return self.linear(x.mean((2, 3))).softmax(-1)


def small(passes: str = "none") -> Program:
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return optimized(captured(Small().eval(), image), passes)


# --- What runs low, and where the casts are


@both
def test_layers_run_low_and_what_moves_data_follows_them(low: str) -> None:
    before = small()
    after = lower(before, low)
    assert low_kinds(after) == {
        "conv2d": 3,
        "relu": 2,
        "max_pool2d": 1,
        "add": 1,
        "cat": 1,
        "linear": 1,
    }
    assert high_kinds(after) == {"mean": 1, "softmax": 1}
    # The image, what the mean reads and gives, and what the softmax reads.
    assert casts(after) == done(after).settings["casts"] == 4
    assert set(constants(after).values()) == {DTYPE[low]}
    assert [each.dtype for each in ran(after)] == [torch.float32]


@both
def test_a_fused_convolution_runs_low(low: str) -> None:
    after = lower(small("all"), low)
    assert low_kinds(after) == {"conv_act": 2, "max_pool2d": 1, "cat": 1, "linear": 1}
    assert casts(after) == 4
    ran(after)


@both
def test_it_is_as_near_as_its_rounding(low: str) -> None:
    before = small("all")
    after = lower(before, low)
    # Three layers in a row round weights, what they read and what they give: nine roundings.
    assert UNIT[low] / 10 < drift(before, after) < 9 * UNIT[low]
    # And in float64, with the rounding of the weights alone.
    inputs = random_inputs(before.example_args, {}, seed=3)
    exact, rounded = (run_float64(each.graph_module, *inputs) for each in (before, after))
    assert UNIT[low] / 100 < distance(exact, rounded) < 3 * UNIT[low]


def test_the_program_stays_as_it_is() -> None:
    before = small("all")
    code, held = before.graph_module.code, constants(before)
    memory = [each.data_ptr() for each in before.graph_module.parameters()]
    lower(before, "fp16", io=True)
    assert before.graph_module.code == code
    assert constants(before) == held
    assert [each.data_ptr() for each in before.graph_module.parameters()] == memory
    assert all(each.dtype is torch.float32 for each in before.example_args)


@both
def test_a_second_time_changes_nothing(low: str) -> None:
    once = lower(small("all"), low)
    twice = lower(once, low)
    assert twice.graph_module.code == once.graph_module.code
    assert done(twice).sites == ()
    assert done(twice).settings["casts"] == 0


def test_what_was_done_says_so_of_each_layer() -> None:
    before = small("all")
    step = done(lower(before, "bf16", samples=[before.example_args]))
    assert (step.stage, step.name, step.relative_l2) == ("precision", "bf16", None)
    assert step.settings == {
        "casts": 4,
        "headroom": 4.0,
        "high": [],
        "io": False,
        "samples": 1,
    }
    assert [each.note for each in step.sites] == ["in bf16"] * 3
    assert step.sites[-1].site == "linear (linear)"
    assert step.operators_after == step.operators_before + 4


def test_explain_tells_of_it() -> None:
    before = captured(scramble(Small()), torch.rand(1, 3, 8, 8))
    after = lower(optimized(before, "all"), "fp16", high=["linear"])
    told = {
        each.label: [(e.name, e.what, e.text) for e in each.events]
        for each in histories(before, after)
    }
    assert ("fp16", "rewritten", "in fp16") in told["stem"]
    assert ("fp16", "refused", "it was asked to stay in float32") in told["linear"]


# --- The fewest casts


class Shared(nn.Module):
    """A norm whose result three layers read, and one more through a split."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.three, self.four = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.norm(x)
        first, second, _ = x.split(4, -1)
        return self.one(x), self.two(x), self.three(first), self.four(second)


def test_one_cast_serves_all_who_read_a_value() -> None:
    after = lower(captured(Shared().eval(), torch.randn(2, 12)), "bf16")
    # Behind the norm, in front of the split, and one for each of the four results.
    assert casts(after) == 1 + 4
    assert low_kinds(after) == {"linear": 4, "split_with_sizes": 1} or low_kinds(after) == {
        "linear": 4,
        "split": 1,
    }
    ran(after)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([self.linear(x), self.norm(x)], -1))


def test_a_concat_of_both_is_of_one() -> None:
    before = captured(Mixed().eval(), torch.randn(2, 6))
    after = lower(before, "fp16")
    # The input for the linear layer, what the norm gives, and the result.
    assert casts(after) == 3
    assert low_kinds(after) == {"linear": 2, "cat": 1}
    assert drift(before, after) < 9 * UNIT["fp16"]  # nine roundings, as above


def test_what_is_asked_to_stay_stays_with_no_more_casts_than_needed() -> None:
    before = small("all")
    names = layers(before)
    assert names == ("conv_act", "conv_act_1", "linear") or len(names) == 3
    lowering = Lowering(before, "bf16")
    assert lowering.layers == names
    after = lowering.program(high=names[1:2])
    assert reasons(after)["conv_act"] == "it was asked to stay in float32"
    assert len(done(after).sites) == 2
    # It reads what was pooled and gives it to the concat, in float32 like the mean behind that.
    assert casts(after) == 4
    assert lowering.program(high=names).graph_module.code == before.graph_module.code
    assert casts(lowering.program()) == 4


def test_a_layer_that_there_is_not_cannot_stay() -> None:
    with pytest.raises(UsageError, match="has no layer 'conv9'"):
        lower(small(), "fp16", high=["conv9"])


# --- What stays, and why


class Applied(nn.Module):
    """An operator between two linear layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.first = function, nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)).expand(4, 8))


RECURRENT = nn.LSTM(8, 8).eval()
SUMS = "it sums many numbers, and their rounding errors would add up"
SPREADS = "it divides by a spread that it takes from small differences"
SHARES = "it divides exponentials by their sum"
STEEP = "a small rounding of what it reads can be a large change of what it gives"
STAYS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("mean", lambda x: x.mean(-1, keepdim=True), SUMS),
    ("sum", lambda x: x.sum(0), SUMS),
    ("cumsum", lambda x: x.cumsum(0), SUMS),
    ("avg_pool1d", lambda x: functional.avg_pool1d(x[None], 3, 1, 1)[0], SUMS),
    ("linalg_vector_norm", lambda x: torch.linalg.vector_norm(x, dim=0), SUMS),
    ("var", lambda x: x.var(0), SPREADS),
    ("layer_norm", lambda x: functional.layer_norm(x, (8,)), SPREADS),
    ("group_norm", lambda x: functional.group_norm(x, 2), SPREADS),
    ("rms_norm", lambda x: functional.rms_norm(x, (8,)), SPREADS),
    ("softmax", lambda x: x.softmax(-1), SHARES),
    ("log_softmax", lambda x: x.log_softmax(-1), SHARES),
    ("exp", torch.exp, STEEP),
    ("log1p", lambda x: torch.log1p(x.abs()), STEEP),
    ("pow", lambda x: x**3, STEEP),
    ("rsqrt", lambda x: torch.rsqrt(x.abs() + 1), STEEP),
    ("sin", torch.sin, STEEP),
    ("softplus", functional.softplus, STEEP),
    ("mse_loss", lambda x: functional.mse_loss(x, torch.ones_like(x)), "it is a loss"),
    (
        "lstm",
        lambda x: RECURRENT(x)[0],
        "nothing is known of what it does to small rounding errors",
    ),
    ("bernoulli", lambda x: torch.bernoulli(x.sigmoid()), "it draws random numbers"),
    (
        "grid_sampler",
        lambda x: (
            functional.grid_sample(
                x.expand(1, 1, 4, 8), x[:4, :2].reshape(1, 2, 2, 2).tanh(), align_corners=False
            )
            .flatten()
            .repeat(2)
        ),
        "nothing is known of what it does to small rounding errors",
    ),
]


@pytest.mark.parametrize(("name", "function", "reason"), STAYS, ids=[each[0] for each in STAYS])
@both
def test_what_low_precision_would_hurt_stays(
    name: str, function: Callable[[torch.Tensor], torch.Tensor], reason: str, low: str
) -> None:
    torch.manual_seed(0)
    before = captured(Applied(function).eval(), torch.randn(4, 8))
    after = lower(before, low)
    assert reasons(after) == {name: reason}
    assert high_kinds(after)[name] == 1
    assert low_kinds(after)["linear"] == 2
    ran(after)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(x).relu())


def test_a_batch_norm_that_is_left_stays() -> None:
    before = captured(scramble(Norm()), torch.randn(1, 3, 5, 5))
    after = lower(before, "fp16")
    assert reasons(after) == {"batch_norm": "a small variance that it divides by may vanish"}
    # Its statistics as well.
    assert (
        sorted(map(str, constants(after).values())) == ["torch.float16"] * 2 + ["torch.float32"] * 2
    )


def test_what_onnx_does_not_take_in_a_precision_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,kj->ki", x, x)[:, :1].sort(0).values

    before = captured(Applied(function).eval(), torch.randn(4, 8))
    assert reasons(lower(before, "fp16")) == {}
    assert reasons(lower(before, "bf16")) == {
        "einsum": "ONNX has no einsum in bf16",
        "sort": "ONNX has no sort in bf16",
    }


FOLLOWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    torch.relu,
    functional.gelu,
    functional.silu,
    functional.hardswish,
    functional.relu6,
    lambda x: functional.leaky_relu(x, 0.1),
    lambda x: x * x.sigmoid() - x.tanh() / 3,
    lambda x: torch.where(x > 0.1, x, torch.zeros_like(x)),
    lambda x: x.masked_fill(x < 0, -torch.inf).amax(-1, keepdim=True),
    lambda x: x.clamp(-1, 1).roll(1).flip(0),
    lambda x: functional.pad(x, (1, 1))[:, 2:].reshape(8, 4).t(),
    lambda x: torch.stack([x, -x]).max(0).values,
    lambda x: functional.dropout(x, 0.5, training=False),
    lambda x: torch.maximum(*x.split(2)).repeat(2, 1),
    lambda x: functional.pixel_shuffle(x.reshape(1, 4, 2, 4), 2).reshape(4, 8),
    lambda x: functional.interpolate(x[None], scale_factor=2.0)[0, :, :8],
    lambda x: functional.max_pool1d(x[None], 3, 1, 1)[0],
]


@pytest.mark.parametrize("function", FOLLOWS)
def test_what_is_between_two_layers_needs_no_cast(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    before = captured(Applied(function).eval(), torch.randn(4, 8))
    after = lower(before, "bf16")
    assert reasons(after) == {}
    assert casts(after) == 2
    # Two layers and at most six operators between them, each of which rounds once.
    assert drift(before, after) < 12 * UNIT["bf16"]


# --- Numbers that do not fit


class Scaled(nn.Module):
    """Two layers; the first one's result is `scale` times as large as usual."""

    def __init__(self, scale: float, weight: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(8) * weight)
            self.first.bias.fill_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).abs())


def stays_because(program: Program, low: str, **options: Any) -> list[tuple[str, str]]:
    step = done(lower(program, low, **options))
    return [(each.site, each.reason) for each in step.refused]


def test_results_that_may_overflow_stay() -> None:
    before = captured(Scaled(2e4).eval(), torch.randn(2, 8))
    because = "2e+04 on the samples, and from 1.6e+04 on, 4 times below the largest number of fp16"
    assert stays_because(before, "fp16") == [
        ("linear (first)", f"its results reach {because}, they may overflow elsewhere"),
        ("linear_1 (last)", f"the numbers it reads reach {because}, they may overflow elsewhere"),
    ]
    assert stays_because(before, "bf16") == []
    assert stays_because(captured(Scaled(1.5e4).eval(), torch.randn(2, 8)), "fp16") == []


def test_samples_show_what_the_example_does_not() -> None:
    before = captured(Scaled(0.0).eval(), torch.randn(2, 8))
    assert stays_because(before, "fp16") == []
    small, large = torch.ones(2, 8), torch.full((2, 8), 3e4)
    found = stays_because(before, "fp16", samples=[[small], [large], [small]])
    assert [site for site, _ in found] == ["linear (first)", "linear_1 (last)"]
    assert found[0][1].startswith("the numbers it reads reach 3e+04 on the samples")


def test_a_weight_beyond_the_range_stays() -> None:
    before = captured(Scaled(0.0, weight=1e5).eval(), torch.zeros(2, 8))
    assert stays_because(before, "fp16") == [
        ("linear (first)", "a constant reaches 1e+05, beyond the largest number of fp16")
    ]
    assert stays_because(before, "bf16") == []


def test_weights_that_would_vanish_stay() -> None:
    before = captured(Scaled(1.0, weight=1e-9).eval(), torch.randn(2, 8))
    assert stays_because(before, "fp16") == [
        ("linear (first)", "8 of 8 numbers of a constant would become zero in fp16")
    ]
    assert stays_because(before, "bf16") == []


def test_results_that_would_lose_their_digits_stay() -> None:
    before = captured(Scaled(1e-6, weight=0.0).eval(), torch.randn(2, 8))
    assert stays_because(before, "fp16")[0] == (
        "linear (first)",
        "its results reach 1e-06 on the samples, and fp16 loses digits below 6.1e-05",
    )
    assert stays_because(before, "bf16") == []


def test_a_number_in_the_graph_that_does_not_fit_stays() -> None:
    before = captured(Applied(lambda x: x / (x.abs() + 1e-9)).eval(), torch.randn(4, 8))
    found = lower(before, "fp16")
    assert reasons(found) == {"add": "its constant 1e-09 does not fit fp16"}
    assert high_kinds(found)["add"] == 1
    assert reasons(lower(before, "bf16")) == {}


def test_what_overflows_inside_a_fused_convolution_stays() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.relu6(self.convolution(x))

    model = Hidden().eval()
    with torch.no_grad():
        model.convolution.bias.copy_(torch.tensor([0.0, 5e4, -5e4, 1.0]))
    before = optimized(captured(model, torch.randn(1, 3, 4, 4)), "all")
    assert counts(before) == {"conv_act": 1}
    (found,) = stays_because(before, "fp16")
    assert found[1].startswith("its results reach 5e+04 on the samples")


def test_samples_that_do_not_fit_the_program_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be run on its samples"):
        lower(small(), "fp16", samples=[[torch.randn(2, 4, 8, 8)]])


# --- Weights, inputs and outputs, sizes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.table(tokens)))


@both
def test_tied_weights_stay_one_tensor(low: str) -> None:
    before = captured(Tied().eval(), torch.tensor([[1, 4, 19], [0, 2, 2]]))
    after = lower(before, low)
    assert low_kinds(after) == {"embedding": 1, "relu": 1, "linear": 1}
    assert casts(after) == 1
    assert list(constants(after).values()) == [DTYPE[low]]
    assert after.example_args[0].dtype is torch.int64
    assert drift(before, after) < 4 * UNIT[low]  # two weights, one input and one result


def test_a_weight_that_both_precisions_read_is_held_in_both() -> None:
    after = lower(captured(Tied().eval(), torch.tensor([[1, 4]])), "fp16", high=["linear"])
    assert set(constants(after).values()) == {torch.float16, torch.float32}


@both
def test_inputs_and_outputs_become_low_where_that_is_asked_for(low: str) -> None:
    before = small("all")
    after = lower(before, low, io=True)
    assert [each.dtype for each in after.example_args] == [DTYPE[low]]
    assert [each.dtype for each in ran(after)] == [DTYPE[low]]
    # What the mean reads and gives, what the softmax reads and gives.
    assert casts(after) == 4
    exact = run_float64(before.graph_module, before.example_args, {})
    # The eight roundings of three layers and a softmax, and that of the image.
    assert distance(exact, [each.double() for each in ran(after)]) < 9 * UNIT[low]
    exported_again(after)


class Several(nn.Module):
    def forward(
        self, x: torch.Tensor, count: torch.Tensor, *, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {"y": x @ x.mT * mask, "count": count + 1, "mask": mask}


def test_only_float_inputs_become_low() -> None:
    before = capture(
        LoadedModel(
            "several",
            Several(),
            (torch.randn(3, 3), torch.tensor(4)),
            {"mask": torch.tensor([True, False, True])},
        )
    )
    after = lower(before, "fp16", io=True)
    dtypes = [each.dtype for each in (*after.example_args, *after.example_kwargs.values())]
    assert dtypes == [torch.float16, torch.int64, torch.bool]
    found = after.graph_module(*after.example_args, **after.example_kwargs)
    assert {name: each.dtype for name, each in found.items()} == {
        "y": torch.float16,
        "count": torch.int64,
        "mask": torch.bool,
    }


def test_open_dimensions_stay_open(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2, max=16)
    before = capture(
        LoadedModel("open", scramble(Small()), (torch.rand(3, 3, 8, 8),), {}, ({0: batch},))
    )
    after = exported_again(lower(optimized(before, "all"), "fp16"))
    images = torch.rand(7, 3, 8, 8)
    (found,) = _tensors(after.graph_module(images))
    assert found.shape == (7, 5)
    assert torch.equal(_tensors(after.exported.module()(images))[0], found)
    model = onnx.load(export(after, tmp_path / "open.onnx").path)
    (dimension, *_) = model.graph.input[0].type.tensor_type.shape.dim
    assert dimension.dim_param


def test_attention_with_open_lengths() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, values = self.linear(x).unflatten(-1, (2, 12)).transpose(1, 2).split(4, -1)
            found = functional.scaled_dot_product_attention(query, key, values, is_causal=True)
            return found.transpose(1, 2).flatten(2)

    length = torch.export.Dim("length", min=2, max=64)
    torch.manual_seed(0)
    before = capture(
        LoadedModel("causal", Causal().eval(), (torch.randn(2, 5, 8),), {}, ({1: length},))
    )
    after = exported_again(lower(before, "bf16"))
    assert low_kinds(after)["matmul"] == 2
    assert high_kinds(after)["_safe_softmax"] == 1
    assert reasons(after) == {"_safe_softmax": SHARES}
    for size in (5, 11):
        # Three products in a row, each with two operands and a result, and a softmax that passes
        # on what its scores, of around 1, are off by.
        assert drift(before, after, torch.randn(2, size, 8)) < 10 * UNIT["bf16"]


def test_attention_runs_low_around_its_softmax() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x)

    before = captured(Attention(), torch.randn(1, 2, 6, 4))
    assert layers(before) == ("scaled_dot_product_attention",)
    after = lower(before, "bf16")
    assert low_kinds(after) == {"mul": 1, "transpose": 1, "matmul": 2}
    assert reasons(after) == {"softmax": SHARES}
    kept = lower(before, "bf16", high=["scaled_dot_product_attention"])
    assert counts(kept) == counts(before)
    assert done(kept).sites == ()
    assert reasons(kept) == {"scaled_dot_product_attention": "it was asked to stay in float32"}


# --- Branches, and what is written to


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        x = torch.cond(x.sum() > 0, lambda x: x * 2 + 1, lambda x: x - 3, (x,))
        return self.after(x)


def test_branches_stay_and_casts_stand_around_them() -> None:
    torch.manual_seed(0)
    before = captured(Branching().eval(), torch.randn(3, 4))
    after = lower(before, "fp16")
    assert reasons(after)["cond"] == "its inner graphs are left in the types they have"
    assert low_kinds(after) == {"linear": 2}
    for sign in (1, -1):
        # Two layers of three roundings each, of which a sum with a constant keeps the size.
        assert drift(before, after, sign * torch.ones(3, 4)) < 12 * UNIT["fp16"]
    exported_again(after)


class Counting(nn.Module):
    """A buffer that running it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        self.total.add_(y.sum(0))
        return self.linear(y + self.total)


def test_memory_that_is_written_to_stays() -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    x = torch.randn(3, 4)
    before = captured(model, x)
    after = lower(before, "bf16")
    (found,) = _tensors(after.graph_module(x))
    y = model.linear(x)
    expected = model.linear(y + y.sum(0))
    # Two layers, a sum between them and one over three rows: ten roundings.
    assert distance([expected.detach()], [found]) < 10 * UNIT["bf16"]
    assert {name for name, _ in after.graph_module.named_buffers()} == {"total"}
    assert after.graph_module.total.dtype is torch.float32
    assert torch.equal(model.total, torch.zeros(4))
    # What it was given is right for the next run, too.
    assert distance([y.sum(0).detach()], [after.graph_module.total]) < 4 * UNIT["bf16"]


class Overwriting(nn.Module):
    """It writes to its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        x.add_(1)
        return y + x


def test_an_input_that_is_written_to_stays() -> None:
    torch.manual_seed(0)
    before = captured(Overwriting().eval(), torch.randn(3, 4))
    after = lower(before, "bf16", io=True)
    assert [each.dtype for each in after.example_args] == [torch.float32]
    assert reasons(after)["placeholder"] == "something writes to the memory of its result"
    x = torch.randn(3, 4)
    written = x.clone()
    (found,) = _tensors(after.graph_module(written))
    assert torch.equal(written, x + 1)
    exact = run_float64(before.graph_module, (x,), {})
    # A layer, a sum and the result: six roundings.
    assert distance(exact, [found.double()]) < 6 * UNIT["bf16"]
