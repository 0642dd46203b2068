"""fold_linear_chain: what it folds, that the function stays, what it refuses, that it settles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from models import efficientnet_b0, vit_tiny
from optfuse.capture import capture
from optfuse.graph import attribute, kind
from optfuse.optimize import optimize, select
from optfuse.passes import fold_linear_chain
from optfuse.passes.fold_linear_chain import FoldLinearChain
from optfuse.stages import LoadedModel, Program
from tests.harness import assert_same_function, captured, counts, reasons, scramble, step
from tests.passes.parts import Model, TwoInputs, normal

PASS = "fold_linear_chain"

# Folding float64 numbers in float64 moves an output by a few 1e-16 for each product and sum.
FLOAT64 = 1e-12
# The folded constants are rounded once to float32, each by at most 6e-8 of itself.
FLOAT32 = 1e-6
# Likewise in float16 and bfloat16, which keep 11 and 8 bits: at most 4.9e-4 and 3.9e-3.
HALF = 1e-3
BFLOAT16 = 1e-2


def numbers(*shape: int, seed: int = 5) -> torch.Tensor:
    """Seeded numbers that can be divided by, of both signs."""
    drawn = normal(*shape, seed=seed)
    return drawn.sign() * (drawn.abs() + 0.4)


def tokens(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Two sequences of five tokens with eight features."""
    return normal(2, 5, 8, seed=11, dtype=dtype)


def image(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(2, 4, 8, 6, seed=11, dtype=dtype)


def double(forward: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> nn.Module:
    """A float64 `Model` in eval mode; buffers keep their numbers."""
    return scramble(Model(forward, **parts).double())


def conv(in_channels: int = 4, out_channels: int = 6, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, **more)


def run(program: Program, also: str = "none") -> Program:
    """The program after the passes named and this one, undone by nothing."""
    after = optimize(program, [*select(also), FoldLinearChain()])
    assert [each.undone for each in after.trace if each.undone] == []
    return after


def folded(
    program: Program,
    gone: dict[str, int],
    *notes: str,
    tolerance: float = FLOAT64,
    also: str = "none",
) -> Program:
    """The program after the pass: without these operators, with nothing new and no refusal, the
    same function, settled; and what the pass says it did."""
    before = counts(optimize(program, select(also)) if also != "none" else program)
    after = run(program, also)
    assert counts(after) == {k: n - gone.get(k, 0) for k, n in before.items() if n > gone.get(k, 0)}
    assert reasons(after, PASS) == []
    assert [site.note for site in step(after, PASS).sites] == list(notes)
    assert_same_function(program, after, tolerance=tolerance)
    again = run(after, also)
    assert counts(again) == counts(after)
    assert [each.name for each in again.trace[len(after.trace) :] if each.matched] == []
    return after


def refused(program: Program, reason: str) -> None:
    """The pass leaves the program as it is, for this one reason."""
    after = run(program)
    assert step(after, PASS).sites == ()
    assert reasons(after, PASS) == [reason]


def ignored(program: Program) -> None:
    """The pass leaves the program as it is and has nothing to say about it."""
    after = run(program)
    assert step(after, PASS).sites == ()
    assert reasons(after, PASS) == []


# Attention ----------------------------------------------------------------------------------------

HEADS = 2


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    attention = (query @ key.transpose(-2, -1)).softmax(-1)
    return (attention @ value).transpose(1, 2).flatten(2)


def packed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Query, key and value out of one layer, as in timm and Swin."""
    batch, length, width = x.shape
    qkv = m.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    return m.project(attend(query * 0.35, key, value))


def chunked(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    query, key, value = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in m.qkv(x).chunk(3, -1)
    )
    return m.project(attend(query / 1.7, key, value))


def indexed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    qkv = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return m.project(attend(0.35 * qkv[0], qkv[1], qkv[2]))


def per_head(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One number a head."""
    qkv = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return m.project(attend(qkv[0] * m.temperature, qkv[1], qkv[2]))


def per_feature(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One number a feature of the query, and another one of the value."""
    qkv = m.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return m.project(attend(qkv[0], qkv[1], qkv[2] * m.features))


ATTENTIONS = {
    "packed": packed,
    "chunked": chunked,
    "indexed": indexed,
    "per_head": per_head,
    "per_feature": per_feature,
}


def attention(name: str, bias: bool = True) -> nn.Module:
    return double(
        ATTENTIONS[name],
        qkv=nn.Linear(8, 24, bias=bias),
        project=nn.Linear(8, 8),
        temperature=numbers(HEADS, 1, 1),
        features=numbers(4),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_scale_of_a_query_goes_into_its_own_channels(name: str, bias: bool) -> None:
    what = "div" if name == "chunked" else "mul"
    model = attention(name, bias)
    after = folded(captured(model, tokens()), {what: 1}, f"{what} folded into linear (qkv)")
    layer = next(n for n in after.graph_module.graph.nodes if kind(n) == "linear")
    weight = attribute(after.graph_module, layer.args[1].target)
    changed = (weight != model.qkv.weight).any(1)
    scaled = slice(16, 24) if name == "per_feature" else slice(0, 8)
    assert changed[scaled].all()
    # The other two parts are not touched, to the last bit.
    assert int(changed.sum()) == 8


def test_the_scale_of_a_query_with_dynamic_sizes() -> None:
    model = attention("packed")
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    before = capture(LoadedModel("test", model, (tokens(),), {}, (dims,)))
    after = folded(before, {"mul": 1}, "mul folded into linear (qkv)")
    longer = normal(3, 9, 8)
    # A few units of 1e-16 for each of some 40 products.
    torch.testing.assert_close(after.graph_module(longer), model(longer), rtol=1e-12, atol=1e-12)


def three_layers(m: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [
        layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (m.query, m.key, m.value)
    ]


def scores_divided(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As in BERT: the scores are divided, behind the product."""
    query, key, value = three_layers(m, x)
    attention = (query @ key.transpose(-1, -2) / math.sqrt(4.0)).softmax(-1)
    return (attention @ value).transpose(1, 2).flatten(2)


def scores_with_a_mask(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The mask behind the scale stays as it is."""
    query, key, value = three_layers(m, x)
    attention = (query @ key.transpose(-1, -2) * 0.25 + m.mask).softmax(-1)
    return (attention @ value).transpose(1, 2).flatten(2)


def batched(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As in nn.MultiheadAttention: heads and batch in one dimension, and `bmm`."""
    query, key, value = (each.flatten(0, 1) for each in three_layers(m, x))
    attention = torch.bmm(query, key.transpose(1, 2)).mul(0.25).softmax(-1)
    return torch.bmm(attention, value).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


def query_turned(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The query passes through a norm, so that the key takes the scale."""
    query, key, value = three_layers(m, x)
    scores = (F.layer_norm(query, (4,)) @ key.transpose(-1, -2)) * 0.25
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


SCORES = {
    scores_divided: ("div", "linear (query)"),
    scores_with_a_mask: ("mul", "linear (query)"),
    batched: ("mul", "linear (query)"),
    query_turned: ("mul", "linear_1 (key)"),
}


@pytest.mark.parametrize("forward", SCORES, ids=lambda each: each.__name__)
def test_the_scale_of_the_scores_goes_into_one_factor(forward: Callable[..., Any]) -> None:
    model = double(
        forward,
        query=nn.Linear(8, 8),
        key=nn.Linear(8, 8, bias=False),
        value=nn.Linear(8, 8),
        mask=normal(5, 5),
    )
    what, layer = SCORES[forward]
    folded(captured(model, tokens()), {what: 1}, f"{what} folded into {layer}")


# Scales and shifts behind a layer -----------------------------------------------------------------

BEHIND: dict[str, tuple[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]]] = {
    "avg_pool": ("mul", lambda m, x: F.avg_pool2d(m.conv(x), 2) * m.c),
    "avg_pool_shift": ("add", lambda m, x: F.avg_pool2d(m.conv(x), 2) + m.c),
    "avg_pool_padded": ("div", lambda m, x: F.avg_pool2d(m.conv(x), 3, padding=1) / m.c),
    "adaptive": ("sub", lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1) - m.c),
    "mean": ("mul", lambda m, x: m.conv(x).mean((2, 3)) * m.flat),
    "mean_shift": ("rsub", lambda m, x: torch.rsub(m.conv(x).mean((2, 3)), 1.5)),
    "sum": ("mul", lambda m, x: m.conv(x).sum((2, 3)) * 0.3),
    "nearest": ("mul", lambda m, x: F.interpolate(m.conv(x), scale_factor=2) * m.c),
    "bilinear": (
        "add",
        lambda m, x: F.interpolate(m.conv(x), scale_factor=2, mode="bilinear") + m.c,
    ),
    "pixel_shuffle": ("mul", lambda m, x: F.pixel_shuffle(m.conv(x)[:, :4], 2) * 0.3),
    "padded": ("mul", lambda m, x: F.pad(m.conv(x), (1, 0, 2, 0)) * m.c),
    "flattened": ("mul", lambda m, x: m.conv(x).flatten(2).transpose(1, 2) * m.flat),
    "strided_slice": ("mul", lambda m, x: m.conv(x)[:, 1::2] * m.three),
    "transposed": ("mul", lambda m, x: F.avg_pool2d(m.up(x), 2) * m.c),
    "grouped": ("mul", lambda m, x: F.avg_pool2d(m.grouped(x), 2) * m.c),
    "two_layers_summed": ("mul", lambda m, x: (m.conv(x) + m.grouped(x)) * 0.3),
    "two_layers_subtracted": ("div", lambda m, x: (m.conv(x) - m.grouped(x)) / 3.0),
    "two_layers_joined": ("mul", lambda m, x: torch.cat([m.conv(x), m.grouped(x)], 1) * 0.3),
    "gate": ("mul", lambda m, x: m.conv(x) * torch.sigmoid(x.mean()) * 0.3),
    "average_of_a_gate": (
        "mul",
        lambda m, x: (F.avg_pool2d(m.conv(x), 2) * torch.sigmoid(m.conv(x)).mean()) * 0.3,
    ),
}


@pytest.mark.parametrize("case", BEHIND)
def test_what_stands_further_behind_a_layer_goes_into_it(case: str) -> None:
    what, function = BEHIND[case]
    model = double(
        lambda m, x: torch.tanh(function(m, x)),
        conv=conv(),
        grouped=conv(4, 6, 3, groups=2, bias=False),
        up=nn.ConvTranspose2d(4, 6, 3, groups=2),
        c=numbers(6, 1, 1),
        flat=numbers(6),
        three=numbers(3, 1, 1),
    )
    before = captured(model, image())
    after = run(before)
    expected = dict(counts(before))
    expected[what] -= 1
    assert counts(after) == {name: count for name, count in expected.items() if count}
    assert_same_function(before, after, tolerance=FLOAT64)
    assert step(run(after), PASS).matched == 1  # the first step; nothing is done again
    assert [each.matched for each in run(after).trace[len(after.trace) :]] == [0]


def test_batch_norm_behind_a_linear_layer_and_a_view() -> None:
    # As in LeViT: batch norm over the features of all tokens.
    model = double(
        lambda m, x: torch.relu(m.norm(m.linear(x).flatten(0, 1)).reshape(2, 5, 6)),
        linear=nn.Linear(8, 6, bias=False),
        norm=nn.BatchNorm1d(6, eps=0.1),
    )
    folded(captured(model, tokens()), {"batch_norm": 1}, "batch_norm folded into linear (linear)")


def test_a_scale_that_is_two_in_one() -> None:
    model = double(lambda m, x: (torch.relu(x) * 0.3).flatten(1) / 1.7)
    after = folded(captured(model, image()), {"mul": 1}, "mul folded into the constant of div")
    assert counts(after)["div"] == 1


def test_a_number_in_a_narrower_dtype_loses_nothing() -> None:
    # Numbers without dimensions promote nothing: both are float32, and the product is float64.
    model = Model(lambda m, x: (torch.relu(x) * m.one).flatten(1) * m.two)
    model.register_buffer("one", torch.tensor(0.3))
    model.register_buffer("two", torch.tensor(0.7))
    folded(captured(model, image()), {"mul": 1}, "mul folded into the constant of mul_1")


def test_a_scale_goes_into_a_constant_operand() -> None:
    model = double(
        lambda m, x: (torch.relu(x) @ m.weight + m.bias) * 0.3,
        weight=normal(8, 6),
        bias=normal(6, seed=4),
    )
    note = "mul folded into the constant of matmul and the constant of add"
    folded(captured(model, tokens()), {"mul": 1}, note)


def test_a_scale_behind_a_matrix_product_with_a_bias() -> None:
    model = double(
        lambda m, x: torch.tanh(torch.addmm(m.bias, x.flatten(0, 1), m.weight).view(2, 5, 6) * 0.3),
        weight=normal(8, 6),
        bias=normal(6, seed=4),
    )
    folded(captured(model, tokens()), {"mul": 1}, "mul folded into the constant of addmm")


# Scales and shifts in front of layers -------------------------------------------------------------

IN_FRONT: dict[str, tuple[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]]] = {
    "mean": ("mul", lambda m, x: m.head((x * m.c).mean((2, 3)))),
    "mean_shift": ("sub", lambda m, x: m.head((x - m.c).mean((2, 3)))),
    "pool_and_flatten": ("div", lambda m, x: m.head(F.adaptive_avg_pool2d(x / m.c, 1).flatten(1))),
    "channels_last": ("mul", lambda m, x: m.head((x * m.c).permute(0, 2, 3, 1))),
    "upsampled": (
        "add",
        lambda m, x: m.conv(F.interpolate(x + m.c, scale_factor=2, mode="bilinear")),
    ),
    "one_sided_padding": ("mul", lambda m, x: m.conv(F.pad(x * m.c, (0, 1, 0, 1)))),
    "reflected": ("rsub", lambda m, x: m.conv(F.pad(1.5 - x, (1, 1, 1, 1), mode="reflect"))),
    "two_readers": (
        "mul",
        lambda m, x: (lambda y: m.conv(y) + m.conv(F.avg_pool2d(y, 1)))(x * m.c),
    ),
    "several_cuts": (
        "mul",
        lambda m, x: (lambda y: m.conv(y[:, :, :4]) + m.conv(y[:, :, 4:]))(x * m.c),
    ),
    "some_channels": ("mul", lambda m, x: m.narrow((x * m.c)[:, 1:3])),
    "one_channel": ("mul", lambda m, x: m.wide((x * m.c)[:, 2])),
    "product": ("mul", lambda m, x: m.wide((x * 0.3) @ x.transpose(2, 3).tanh() @ x)),
    "gate": ("mul", lambda m, x: m.conv((x * 0.3) * torch.sigmoid(x.mean((2, 3), keepdim=True)))),
}


@pytest.mark.parametrize("case", IN_FRONT)
def test_what_stands_further_in_front_of_layers_goes_into_them(case: str) -> None:
    what, function = IN_FRONT[case]
    model = double(
        lambda m, x: function(m, torch.relu(x)),
        conv=conv(),
        narrow=conv(2),
        head=nn.Linear(4, 3),
        wide=nn.Linear(6, 3),
        c=numbers(4, 1, 1),
    )
    before = captured(model, image())
    after = run(before)
    expected = dict(counts(before))
    expected[what] -= 1
    assert counts(after) == {name: count for name, count in expected.items() if count}
    assert reasons(after, PASS) == []
    assert_same_function(before, after, tolerance=FLOAT64)
    assert [each.matched for each in run(after).trace[len(after.trace) :]] == [0]


def test_batch_norm_in_front_of_reflected_padding() -> None:
    layer = conv(padding=1, padding_mode="reflect")
    model = scramble(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), layer).double())
    folded(captured(model, image()), {"batch_norm": 1}, "batch_norm folded into conv2d (2)")


def test_the_value_of_an_attention_hands_its_scale_on() -> None:
    # The value comes out of no layer, but a layer follows.
    model = double(
        lambda m, x: m.project(x.softmax(-1) @ (torch.relu(x) * 0.3).transpose(1, 2)),
        project=nn.Linear(5, 3),
    )
    folded(captured(model, tokens()), {"mul": 1}, "mul folded into linear (project)")


def test_a_scale_crosses_over_to_the_other_factor() -> None:
    # Neither in front of the query nor behind the product is a layer; the key comes from one.
    model = double(
        lambda m, x: ((torch.relu(x) * 0.3) @ m.key(x).transpose(1, 2)).softmax(-1),
        key=nn.Linear(8, 8),
    )
    folded(captured(model, tokens()), {"mul": 1}, "mul folded into linear (key)")


# Norms --------------------------------------------------------------------------------------------


def constants_of(program: Program, what: str) -> list[Any]:
    """The weight and bias that each call of this norm is given."""
    found = [n for n in program.graph_module.graph.nodes if kind(n) == what]
    return [each for node in found for each in node.all_input_nodes if each.op == "get_attr"]


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer_norm": (lambda: nn.LayerNorm(8), "weight and bias"),
    "layer_norm_without_bias": (lambda: nn.LayerNorm(8, bias=False), "weight"),
    "rms_norm": (lambda: nn.RMSNorm(8), "weight"),
    "rms_norm_eps": (lambda: nn.RMSNorm(8, eps=0.1), "weight"),
    "group_norm": (lambda: nn.GroupNorm(4, 8), "weight and bias"),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norms_constants_go_into_the_layers_behind_it(name: str, bias: bool) -> None:
    make, what = NORMS[name]
    model = double(
        lambda m, x: (lambda y: (m.one(y), m.two(y)))(m.norm(x)),
        norm=make(),
        one=nn.Conv1d(8, 3, 2, bias=bias) if name == "group_norm" else nn.Linear(8, 3, bias=bias),
        two=nn.Conv1d(8, 2, 1, groups=2) if name == "group_norm" else nn.Linear(8, 2),
    )
    x = normal(2, 8, 5) if name == "group_norm" else tokens()
    before = captured(model, x)
    norm = next(each for each in counts(before) if each.endswith("norm"))
    layer = "conv1d" if name == "group_norm" else "linear"
    note = f"the {what} of {norm} folded into {layer} (one) and {layer}_1 (two)"
    after = folded(before, {}, note)
    assert constants_of(after, norm) == []


BETWEEN: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "class_token": lambda m, x: m.head(m.norm(x)[:, 0]),
    "mean_of_tokens": lambda m, x: m.head(m.norm(x).mean(1)),
    "windows": lambda m, x: m.head(
        m.norm(x).view(2, 2, 4, 8).roll(1, 2).view(2, 2, 2, 2, 8).transpose(1, 2).reshape(-1, 4, 8)
    ),
    "image": lambda m, x: m.conv(m.norm(x).view(2, 4, 2, 8).permute(0, 3, 1, 2)),
    "tokens_left_out": lambda m, x: m.head(m.norm(x)[:, 1:]),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_norms_constants_pass_through_what_moves_tokens(case: str) -> None:
    model = double(BETWEEN[case], norm=nn.LayerNorm(8), head=nn.Linear(8, 3), conv=conv(8, 3, 2))
    before = captured(model, normal(2, 8, 8))
    layer = "conv2d (conv)" if case == "image" else "linear (head)"
    after = folded(before, {}, f"the weight and bias of layer_norm folded into {layer}")
    assert constants_of(after, "layer_norm") == []


def test_a_vision_transformer_keeps_no_constants_in_its_norms() -> None:
    before = captured(vit_tiny.build(), *vit_tiny.example_inputs())
    after = run(before)
    assert counts(after) == counts(before)
    # Two norms a layer, and the last one in front of the classifier.
    assert len(step(after, PASS).sites) == 25
    assert constants_of(after, "layer_norm") == []
    # Twelve layers amplify the rounding of the folded constants to float32.
    assert_same_function(before, after, tolerance=1e-5)


def test_a_convolutional_network_has_nothing_for_it() -> None:
    before = captured(efficientnet_b0.build(), *efficientnet_b0.example_inputs())
    after = run(before, "fold_conv_bn")
    assert step(after, PASS).sites == ()
    assert reasons(after, PASS) == []


# Shared weights, dtypes and the caller's model ----------------------------------------------------


def test_an_encoder_of_one_layer_that_runs_three_times_keeps_one_set_of_weights() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + torch.relu(m.linear(m.norm(x)))
        return x

    model = double(forward, norm=nn.LayerNorm(8), linear=nn.Linear(8, 8))
    note = "the weight and bias of layer_norm folded into "
    notes = [note + f"linear{number} (linear)" for number in ("", "_1", "_2")]
    after = folded(captured(model, tokens()), {}, *notes)
    assert len({n.target for n in after.graph_module.graph.nodes if n.op == "get_attr"}) == 2


def test_the_models_own_weights_stay_as_they_are() -> None:
    model = attention("packed")
    tied = Model(lambda m, x: m.a(x) + m.linear(x)[..., :8], a=model, linear=nn.Linear(8, 24))
    tied.linear.weight = model.qkv.weight
    kept = {name: tensor.clone() for name, tensor in tied.double().state_dict().items()}
    folded(captured(tied.eval(), tokens()), {"mul": 1}, "mul folded into linear (a.qkv)")
    now = tied.state_dict()
    # Bit for bit: the caller's model is not ours to write.
    assert all(torch.equal(now[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, FLOAT64),
        (torch.float32, FLOAT32),
        (torch.float16, HALF),
        (torch.bfloat16, BFLOAT16),
    ],
    ids=["float64", "float32", "float16", "bfloat16"],
)
def test_constants_are_rounded_once_to_the_models_own_dtype(
    dtype: torch.dtype, tolerance: float
) -> None:
    model = attention("packed").to(dtype)
    note = "mul folded into linear (qkv)"
    after = folded(captured(model, tokens(dtype)), {"mul": 1}, note, tolerance=tolerance)
    assert {p.dtype for p in after.graph_module.parameters()} == {dtype}
    layer = next(n for n in after.graph_module.graph.nodes if kind(n) == "linear")
    assert layer.args[1].target == "qkv_weight_folded"
    exact = model.qkv.weight.double()
    exact = torch.cat([exact[:8] * 0.35, exact[8:]])
    # Rounding once: the weight is the one that float64 arithmetic gives, to the last bit.
    assert torch.equal(attribute(after.graph_module, layer.args[1].target), exact.to(dtype))


def test_a_number_behind_a_view_over_a_dimension_of_size_one_goes_into_every_channel() -> None:
    """Found by fuzzing: it went into the first channel alone, and the driver undid the pass."""
    model = double(lambda m, x: m.conv(x).view(-1) * 0.5, conv=conv(4, 3, 1))
    folded(captured(model, normal(1, 4, 1, 5)), {"mul": 1}, "mul folded into conv2d (conv)")


# What it refuses ----------------------------------------------------------------------------------


def test_refuses_a_layer_whose_result_something_else_reads() -> None:
    model = double(
        lambda m, x: (lambda y: (y.mean((2, 3)) * 0.3, torch.relu(y)))(m.conv(x)), conv=conv()
    )
    refused(captured(model, image()), "the result of conv2d (conv) has 2 users")


def test_refuses_a_layer_whose_result_is_an_output() -> None:
    model = double(lambda m, x: (lambda y: (y.mean((2, 3)) * 0.3, y))(m.conv(x)), conv=conv())
    refused(captured(model, image()), "the result of conv2d (conv) is also an output of the model")


def test_refuses_what_is_read_between_the_layer_and_the_scale() -> None:
    model = double(
        lambda m, x: (lambda y: (y * 0.3, torch.relu(y)))(m.conv(x).mean((2, 3))), conv=conv()
    )
    refused(captured(model, image()), "the result of mean has 2 users")


def test_refuses_channels_that_something_else_reads_too() -> None:
    model = double(
        lambda m, x: (lambda y: (y[..., :3] * 0.3, y[..., 2:]))(m.linear(x)),
        linear=nn.Linear(8, 6),
    )
    refused(captured(model, tokens()), "slice_2 reads some of the same channels")


@pytest.mark.parametrize(
    "joined",
    [lambda a, b: a + b, lambda a, b: torch.cat([b, a], 0)],
    ids=["sum", "concat"],
)
def test_refuses_a_layer_that_comes_in_several_pieces(
    joined: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    # One piece's plan leaves the other piece as it is, and the other way round.
    model = double(
        lambda m, x: joined(*m.linear(x).unflatten(-1, (2, 3)).unbind(2)) * 0.3,
        linear=nn.Linear(8, 6),
    )
    after = run(captured(model, tokens()))
    assert step(after, PASS).sites == ()
    (reason,) = reasons(after, PASS)
    assert reason.endswith(" leads to it in several ways")


def test_refuses_scores_that_something_else_reads() -> None:
    model = double(
        lambda m, x: (lambda y: (y * 0.3, y))(m.linear(x) @ x.transpose(1, 2)),
        linear=nn.Linear(8, 8),
    )
    refused(captured(model, tokens()), "the result of matmul is also an output of the model")


@pytest.mark.parametrize("shape", [(5, 1), (2, 1, 1), (1, 5, 6)])
def test_refuses_several_numbers_for_one_channel(shape: tuple[int, ...]) -> None:
    model = double(
        lambda m, x: m.linear(x).transpose(0, 1).transpose(0, 1) * m.c,
        linear=nn.Linear(8, 6),
        c=numbers(*shape),
    )
    refused(
        captured(model, tokens()),
        "its constant does not have one number a channel of linear (linear)",
    )


def test_refuses_channels_that_cannot_be_followed() -> None:
    # What pixel_shuffle gives are four channels in one.
    model = double(
        lambda m, x: F.pixel_shuffle(m.conv(x), 2) * m.c, conv=conv(4, 8), c=numbers(2, 1, 1)
    )
    refused(
        captured(model, image()),
        "its constant does not have one number a channel of conv2d (conv)",
    )


def test_refuses_what_something_else_reads_in_front_of_a_layer() -> None:
    model = double(
        lambda m, x: (lambda y: (m.head(y.mean((2, 3))), y.tanh()))(x.relu() * 0.3),
        head=nn.Linear(4, 3),
    )
    refused(captured(model, image()), "tanh also reads the result of mul")


def test_refuses_what_is_an_output_in_front_of_a_layer() -> None:
    model = double(
        lambda m, x: (lambda y: (m.head(y), y))((x.relu() * 0.3).mean((2, 3))),
        head=nn.Linear(4, 3),
    )
    refused(captured(model, image()), "the result of mean is also an output of the model")


@pytest.mark.parametrize(
    ("moved", "reason"),
    [
        (torch.tanh, "tanh also reads the result of mul"),
        (lambda y: y.transpose(1, 2), "the result of mul has 2 users"),
    ],
    ids=["changed", "moved"],
)
def test_refuses_both_factors_of_a_product(
    moved: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    # The square of the scale would have to be folded.
    model = double(
        lambda m, x: (lambda y: m.five(y @ moved(y)))(torch.relu(x) * 0.3), five=nn.Linear(5, 3)
    )
    refused(captured(model, normal(2, 5, 5)), reason)


def test_refuses_a_norm_whose_result_something_else_reads() -> None:
    model = double(
        lambda m, x: (lambda y: y + m.linear(y))(m.norm(x)),
        norm=nn.LayerNorm(8),
        linear=nn.Linear(8, 8),
    )
    refused(captured(model, tokens()), "add also reads the result of layer_norm (norm)")


def test_refuses_a_norm_in_front_of_padding_with_zeros() -> None:
    model = double(lambda m, x: m.conv(m.norm(x)), norm=nn.GroupNorm(2, 4), conv=conv(padding=1))
    refused(
        captured(model, image()),
        "conv2d (conv) pads with zeros, where a folded shift would be missing",
    )


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("pad", lambda y: F.pad(y, (1, 0))),
        ("sum_1", lambda y: y.sum(-1, keepdim=True)),
        ("avg_pool2d", lambda y: F.avg_pool2d(y, 3, padding=1)),
    ],
)
def test_refuses_a_shift_in_front_of_what_does_not_pass_it_on(
    name: str, operator: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = double(
        lambda m, x: m.conv(operator(torch.relu(x) + m.c)), conv=conv(4, 6, 1), c=numbers(4, 1, 1)
    )
    refused(captured(model, image()), f"{name} does not pass its shift on")


def test_refuses_channels_in_another_dimension() -> None:
    model = double(
        lambda m, x: m.linear((torch.relu(x) * m.c).transpose(0, 1)),
        linear=nn.Linear(6, 3),
        c=numbers(4, 1, 1),
    )
    refused(captured(model, image()), "linear (linear) has its channels in another dimension")


def test_refuses_a_weight_that_is_an_input() -> None:
    before = captured(
        TwoInputs(lambda m, x, w: F.linear(x, w).transpose(0, 1) * 0.3), tokens(), normal(6, 8)
    )
    refused(before, "the weight is not a constant")
    before = captured(
        TwoInputs(lambda m, x, w: F.linear((x.relu() * 0.3).transpose(0, 1), w)),
        tokens(),
        normal(6, 8),
    )
    refused(before, "the weight is not a constant")


def test_refuses_a_bias_that_is_an_input() -> None:
    model = TwoInputs(lambda m, x, b: F.linear(x, m.w, b).transpose(0, 1) * 0.3, w=normal(6, 8))
    refused(captured(model, tokens(), normal(6)), "the bias is not a constant")


def test_refuses_a_layer_that_an_embedding_is_tied_to() -> None:
    # As in GPT-2: the head's weight is the embedding's, and would have to be held twice.
    def forward(m: nn.Module, words: torch.Tensor) -> torch.Tensor:
        return m.head(m.norm(m.embedding(words)))

    model = double(
        forward,
        embedding=nn.Embedding(9, 8),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 9, bias=False),
    )
    model.head.weight = model.embedding.weight
    refused(
        captured(model, torch.arange(6).reshape(2, 3)),
        "embedding (embedding) reads the same weight, which would have to be held twice",
    )


def test_refuses_a_table_that_something_else_reads() -> None:
    model = double(
        lambda m, x: (torch.relu(x) @ m.table * 0.3, x @ m.table.t()), table=normal(8, 8)
    )
    refused(captured(model, tokens()), "the result of table has 2 users")


def test_refuses_what_float16_could_not_hold_well() -> None:
    # 1e-6 times numbers around 0.5: the steps between float16 numbers are 6e-8 there.
    model = scramble(
        Model(lambda m, x: m.linear(x).transpose(0, 1) * 1e-6, linear=nn.Linear(8, 6))
    ).half()
    refused(
        captured(model, tokens(torch.float16)),
        "the folded weight is too small to be held in float16",
    )
    model = scramble(
        Model(lambda m, x: (torch.relu(x) @ m.table) * 1e-6, table=normal(8, 6)).half()
    )
    refused(
        captured(model, tokens(torch.float16)),
        "the folded constant is too small to be held in float16",
    )


def test_refuses_memory_that_the_model_writes_to() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result = m.head((x * 0.3).mean((2, 3)))
        x.add_(1.0)
        return result

    model = double(forward, head=nn.Linear(4, 3))
    refused(captured(model, image()), "the model writes to that memory")


def test_refuses_a_scale_whose_layout_a_view_needs() -> None:
    # A query cut out of three lies apart in memory; what the scale gives does not.
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        query = m.linear(x).view(2, 5, 3, 8)[:, :, 0]
        return (query * 0.3).view(10, 8)

    model = double(forward, linear=nn.Linear(8, 24))
    refused(captured(model, tokens()), "view_1 would find it laid out in memory in another way")


# What it leaves alone without a word --------------------------------------------------------------

UNRELATED: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "directly_behind": lambda m, x: m.linear(x) * 0.3,
    "directly_in_front": lambda m, x: m.linear(torch.relu(x) * 0.3),
    "relu_between": lambda m, x: torch.relu(m.linear(x)) * 0.3,
    "relu_between_below": lambda m, x: m.linear(torch.relu(x * 0.3)),
    "softmax_between": lambda m, x: m.linear(x).softmax(-1) * 0.3,
    "no_layer_at_all": lambda m, x: (torch.relu(x) * 0.3).flatten(1).tanh(),
    "squared": lambda m, x: (m.linear(x) @ m.linear(x).transpose(1, 2)).square() * 0.3,
    "same_factor_twice": lambda m, x: (lambda y: (y @ y) * 0.3)(torch.tanh(x @ x.transpose(1, 2))),
    "divided_by_it": lambda m, x: m.linear(1.0 / (torch.relu(x) * 0.3 + 1.0)),
    "term_of_a_sum": lambda m, x: m.linear((torch.relu(x) * 0.3 + x).transpose(0, 1)),
    "shift_in_a_product": lambda m, x: m.five((torch.relu(x) + 0.3) @ x.transpose(1, 2)),
    "computed_scale": lambda m, x: m.linear(x).transpose(0, 1) * x.mean(),
    "truth_value": lambda m, x: m.linear(x).transpose(0, 1) * m.mask,
    "rounded_division": lambda m, x: torch.div(m.linear(x).flatten(0, 1), 2, rounding_mode="floor"),
    "cast_between": lambda m, x: m.linear(x).float() * 0.3,
    "wider_result": lambda m, x: m.linear(x).unsqueeze(0) * m.wide,
    "norm_without_constants": lambda m, x: m.linear(F.layer_norm(x, (8,))),
    "norm_over_two_dimensions": lambda m, x: m.linear(F.layer_norm(x, (5, 8), m.area)),
    "norm_with_a_computed_weight": lambda m, x: m.linear(F.layer_norm(x, (8,), x[0, 0])),
    "norm_without_a_layer": lambda m, x: torch.relu(F.layer_norm(x, (8,), m.linear.weight[0])),
    "integers": lambda m, x: (x.to(torch.int64) * 3).flatten(1) * 2,
    "no_numbers": lambda m, x: m.linear(x)[:, :0] * m.none,
}


@pytest.mark.parametrize("case", UNRELATED)
def test_ignores_what_is_none_of_its_business(case: str) -> None:
    model = double(
        UNRELATED[case],
        linear=nn.Linear(8, 8),
        five=nn.Linear(5, 3),
        mask=torch.ones(8),
        wide=numbers(3, 1, 1, 1),
        area=normal(5, 8),
        none=torch.ones(0, 8),
    )
    model.mask = torch.tensor([True, False] * 4)
    ignored(captured(model, tokens()))


def test_a_number_goes_no_further_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.linear(x)
        for _ in range(4):
            x = x.transpose(0, 1)
        return x * 0.3

    before = captured(double(forward, linear=nn.Linear(8, 8)), tokens())
    monkeypatch.setattr(fold_linear_chain, "REACH", 3)
    ignored(before)
    monkeypatch.setattr(fold_linear_chain, "REACH", 4)
    folded(before, {"mul": 1}, "mul folded into linear (linear)")


def test_a_tensor_that_is_read_twice_again_and_again_is_searched_once() -> None:
    # 2^40 ways lead up and down through this network.
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x) * 0.3
        for _ in range(40):
            x = x.transpose(1, 2) @ x
        for _ in range(40):
            x = x + x.transpose(1, 2)
        return x * 0.3

    after = run(captured(double(forward), normal(2, 3, 3)))
    assert step(after, PASS).sites == ()


# Random chains ------------------------------------------------------------------------------------

HERE = {"mul": 0.7, "div": 1.3, "add": 0.4, "sub": -0.6}


class Chain(nn.Module):
    """Operators drawn one by one, between two layers; `listing` says which.

    Args:
        draw: gives a number between 0 and the one it is given.
    """

    def __init__(self, draw: Callable[[int], int]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.ModuleList()
        self.listing: list[str] = []
        self.steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
        x = self.first(torch.zeros(2, 6, 8))
        for _ in range(1 + draw(6)):
            name, function = self._step(draw, x)
            x = function(x)
            self.listing.append(f"{name} -> {tuple(x.shape)}")
            self.steps.append(function)
        if draw(1):
            self.last.append(nn.Linear(x.shape[-1], 3))
        self.aside = bool(draw(1))

    def _step(
        self, draw: Callable[[int], int], x: torch.Tensor
    ) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
        rank = x.dim()
        one, other = draw(rank - 1), draw(rank - 1)
        which = draw(9)
        if which in (0, 1):
            name = list(HERE)[draw(3)]
            shape = [size if draw(2) == 0 else 1 for size in x.shape]
            given = numbers(*shape) if draw(1) else torch.tensor(HERE[name])
            self.register_buffer(f"c{len(self.listing)}", given)
            return f"{name} {tuple(given.shape)}", lambda y: getattr(torch, name)(y, given)
        if which == 2:
            return f"transpose {one} {other}", lambda y: y.transpose(one, other)
        if which == 3 and x.shape[one] % 2 == 0:
            return f"cut {one}", lambda y: y.unflatten(one, (2, -1))
        if which == 4 and rank > 2 and one < rank - 1:
            return f"join {one}", lambda y: y.flatten(one, one + 1)
        if which == 5 and x.shape[one] > 1:
            index = draw(x.shape[one] - 1)
            return f"narrow {one} from {index}", lambda y: y.narrow(
                one, index, y.shape[one] - index
            )
        if which == 6 and rank > 2:
            return f"select {one}", lambda y: y.select(one, -1)
        if which == 7:
            return f"mean {one}", lambda y: y.mean(one, keepdim=True)
        if which == 8:
            return f"pad {one}", lambda y: F.pad(y, (one, 0))
        return f"roll {one}", lambda y: y.roll(1, one)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.first(x)
        x = made
        for function in self.steps:
            x = function(x)
        for layer in self.last:
            x = layer(x)
        return (x, made[..., :2]) if self.aside else (x,)

    def __repr__(self) -> str:
        ends = ["linear"] * len(self.last), ["and the first channels aside"] * self.aside
        return "; ".join(["linear (2, 6, 12)", *self.listing, *ends[0], *ends[1]])


@st.composite
def chains(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Chain:
    """A chain with scrambled layers, in float64."""
    drawn = iter(draw(st.binary(min_size=48, max_size=48)))
    chain = Chain(lambda most: next(drawn, 0) % (most + 1))
    return scramble(chain.double())  # type: ignore[return-value]


def test_random_chains_keep_their_function() -> None:
    matched = 0

    @settings(
        max_examples=14,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(chain=chains())
    def every_chain_keeps_its_function(chain: Chain) -> None:
        nonlocal matched
        before = captured(chain, normal(2, 6, 8))
        after = run(before)
        assert_same_function(before, after, tolerance=FLOAT64)
        found = step(after, PASS).matched
        assert sum(counts(after).values()) == sum(counts(before).values()) - found
        assert [each.matched for each in run(after).trace[len(after.trace) :]] == [0]
        matched += found

    # Fixed seeds, so that every run draws the same.
    for start in range(2):
        seed(start)(every_chain_keeps_its_function)()
    assert matched > 8  # chains in which it finds nothing would say nothing about it


# The proof guards the pass ------------------------------------------------------------------------


def test_the_driver_undoes_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    before = captured(attention("packed"), tokens())
    # As if all of the layer's channels were the query's, and nobody else's.
    monkeypatch.setattr(fold_linear_chain, "followed", lambda node, lanes: lanes)
    monkeypatch.setattr(fold_linear_chain, "channels_in", _all_then_none())
    after = optimize(before, [FoldLinearChain()])
    assert counts(after) == counts(before)
    undone = step(after, PASS).undone
    assert undone is not None
    assert undone.startswith("in float64 its outputs moved by a relative L2 of ")


def _all_then_none() -> Callable[..., torch.Tensor]:
    calls = iter(range(1000))
    return lambda lanes, channels: torch.full((channels,), next(calls) == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ATTENTIONS)
def test_folds_on_a_gpu_where_numbers_live_on_the_cpu(name: str) -> None:
    what = "div" if name == "chunked" else "mul"
    before = captured(attention(name).cuda(), tokens().cuda())
    folded(before, {what: 1}, f"{what} folded into linear (qkv)")
