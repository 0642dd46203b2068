"""What became of every layer, on small models whose answer is written out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optfuse
from optfuse.errors import UsageError
from optfuse.explain import fitting, histories, norms_left, places_elsewhere
from optfuse.optimize import optimize, select
from optfuse.stages import LayerEvent, LayerHistory, Program
from tests.harness import captured, optimized, scramble

IMAGE = torch.randn(1, 4, 8, 8)


def told(module: nn.Module, passes: str = "all", *inputs: Tensor) -> dict[str, LayerHistory]:
    """The histories of a module's layers, by what they are called."""
    before = captured(scramble(module), *(inputs or (IMAGE,)))
    found = histories(before, optimized(before, passes))
    assert len({each.label for each in found}) == len(found)
    return {each.label: each for each in found}


def done(history: LayerHistory) -> list[tuple[str, str]]:
    """The pass and the kind of every event."""
    return [(event.name, event.what) for event in history.events]


def only(history: LayerHistory, name: str) -> LayerEvent:
    """The one event of that pass."""
    (event,) = (each for each in history.events if each.name == name)
    return event


def line_of(text: str) -> int:
    """The one line of this file that holds the text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = (
        n for n, line in enumerate(lines, start=1) if text in line and "line_of" not in line
    )
    return number


class Chain(nn.Module):
    """A block in a Sequential, and one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.head = nn.ConvTranspose2d(6, 4, (3, 1), dilation=(2, 1), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.head(self.block(x))  # the line of both layers


def test_a_convolution_in_a_sequential_says_what_it_took_in_and_where_it_is_called() -> None:
    layers = told(Chain())
    block, head = layers["block.0"], layers["head"]

    assert (block.operator, block.settings) == ("conv2d", "3x3 4->6, stride 2")
    assert (block.module, block.name, block.call, block.calls) == ("block.0", "conv2d", 1, 1)
    assert done(block) == [("fold_conv_bn", "rewritten"), ("fuse_conv_activation", "rewritten")]
    assert only(block, "fold_conv_bn").took_in == ("block.1",)
    assert only(block, "fold_conv_bn").text == "batch_norm folded in"
    assert only(block, "fuse_conv_activation").took_in == ("block.2",)
    assert (block.became, block.one_with, block.gone) == (("conv_act",), (), None)
    assert head.settings == "3x1 6->4, dilation 2x1, 2 groups"
    assert (head.operator, head.events, head.became) == (
        "conv_transpose2d",
        (),
        ("conv_transpose2d",),
    )
    # PyTorch's own Sequential is no line that the user wrote.
    line = line_of("# the line of both layers")
    assert block.source == head.source
    assert block.source.endswith(f"tests/test_explain.py:{line}")


class Functional(nn.Module):
    """Two functional convolutions in one forward, one of them with a weight that another shares."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.weight = nn.Parameter(torch.empty(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """One here, two inside."""
        return torch.relu(functional.conv2d(self.inner(x), self.weight))


class Inner(nn.Module):
    """Two convolutions in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(4, 4, 3, 3))
        self.second = nn.Parameter(torch.empty(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """One behind the other."""
        x = torch.sin(functional.conv2d(x, self.first, padding=1))  # the first inner one
        return torch.sin(functional.conv2d(x, self.second, padding=1))  # the second inner one


def test_functional_convolutions_are_told_apart_by_their_nodes_and_lines() -> None:
    layers = told(Functional())

    assert list(layers) == ["conv2d (inner)", "conv2d_1 (inner)", "conv2d_2"]
    assert layers["conv2d (inner)"].source.endswith(f":{line_of('# the first inner one')}")
    assert layers["conv2d_1 (inner)"].source.endswith(f":{line_of('# the second inner one')}")
    assert layers["conv2d_2"].module == ""
    assert only(layers["conv2d_2"], "fuse_conv_activation").took_in == ("relu",)


class Again(nn.Module):
    """One layer called twice, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        """An activation behind the first call alone."""
        x = torch.sin(self.twice(torch.relu(self.twice(x))))
        return torch.sin(self.other(torch.relu(self.one(x))))


def test_a_module_called_twice_has_an_entry_for_each_call() -> None:
    layers = told(Again())
    first, second = layers["twice (1st call)"], layers["twice (2nd call)"]

    assert [(each.call, each.calls) for each in (first, second)] == [(1, 2), (2, 2)]
    assert (first.became, second.became) == (("conv_act",), ("conv2d",))
    assert second.events == ()


def test_layers_that_share_a_weight_are_layers_of_their_own() -> None:
    layers = told(Again())

    assert (layers["one"].became, layers["other"].became) == (("conv_act",), ("conv2d",))
    assert layers["one"].one_with == layers["other"].one_with == ()


class Shared(nn.Module):
    """A batch norm behind a convolution that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed one and a sine of it as it was."""
        x = self.conv(x)
        return self.norm(x), torch.sin(x)


def test_a_refusal_behind_a_convolution_is_its_own() -> None:
    conv = told(Shared())["conv"]

    assert conv.events[0] == LayerEvent(
        "fold_conv_bn",
        "refused",
        "the result of conv2d (conv) has 2 users",
        at=("batch_norm (norm)",),
    )
    assert (conv.became, conv.gone) == (("conv2d",), None)


class InConcat(nn.Module):
    """A batch norm over a concat, of which one branch is no convolution."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(branches))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        """Of the layers, and x where there is one alone."""
        tensors = [conv(x) for conv in self.convs]
        return self.norm(torch.cat(tensors if len(tensors) > 1 else [*tensors, x], 1))


def test_a_refusal_behind_a_concat_is_that_of_its_branches() -> None:
    event = only(told(InConcat(1))["convs.0"], "fold_conv_bn")

    assert (event.what, event.at) == ("refused", ("batch_norm (norm)",))
    assert event.text == "a branch of the concat in front of it, x, is no convolution"


def test_branches_that_share_a_batch_norm_stay_apart() -> None:
    layers = told(InConcat(2), "fold_conv_bn")

    for name, other in (("convs.0", "convs.1"), ("convs.1", "convs.0")):
        assert only(layers[name], "fold_conv_bn").together == (other,)
        assert (layers[name].became, layers[name].one_with) == (("conv2d",), ())


class Parallel(nn.Module):
    """Two 1x1 convolutions on one tensor, and two that are wider."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)
        self.wide, self.wider = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """With one activation behind all."""
        return torch.cat([torch.relu(each(x)) for each in self.children()], 1)


def test_a_group_that_became_one_says_with_whom() -> None:
    layers = told(Parallel())

    assert (layers["a"].one_with, layers["b"].one_with) == (("b",), ("a",))
    assert layers["a"].became == layers["b"].became == ("conv_act",)
    combined = only(layers["b"], "combine_parallel_convs")
    assert combined.together == ("a",)
    assert combined.text.startswith("2 convolutions into one of 8 channels")
    assert combined.took_in == ("relu_1",), "its own activation, and not that of the other"
    refused = only(layers["wide"], "combine_parallel_convs")
    assert (refused.what, refused.at) == ("refused", ())
    assert refused.text.startswith("its kernel is 3x3, not 1x1")
    assert (layers["wide"].became, layers["wide"].one_with) == (("conv_act",), ())


def test_of_very_many_others_the_first_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optfuse.explain._OTHERS", 2)

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([conv(x) for conv in self.convs], 1)

    last = told(Many())["convs.4"]
    assert last.one_with == only(last, "combine_parallel_convs").together == ("convs.0", "convs.1")


class RepVgg(nn.Module):
    """A block as RepVGG has it, with an identity branch."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.pointwise = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Their sum."""
        return torch.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


def test_the_branches_of_a_repvgg_block_became_one() -> None:
    layers = told(RepVgg())

    for name, other in (("dense.0", "pointwise.0"), ("pointwise.0", "dense.0")):
        history = layers[name]
        assert done(history) == [
            ("fold_conv_bn", "rewritten"),
            ("merge_branches", "rewritten"),
            ("fuse_conv_activation", "rewritten"),
        ]
        assert (history.became, history.one_with) == (("conv_act",), (other,))
        assert "identity" in only(history, "merge_branches").took_in


class TwoSums(nn.Module):
    """Two pairs of branches in one sum, each on a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """All four, and an activation."""
        y = torch.sin(x)
        return torch.relu(self.a(x) + self.b(x) + self.c(y) + self.d(y))


@pytest.mark.parametrize(("passes", "second"), [("merge_branches", "conv2d"), ("all", "conv_act")])
def test_of_two_groups_in_one_sum_each_is_one(passes: str, second: str) -> None:
    layers = told(TwoSums(), passes)

    assert {name: each.one_with for name, each in layers.items()} == {
        "a": ("b",),
        "b": ("a",),
        "c": ("d",),
        "d": ("c",),
    }
    # The second takes the sum in, and the first is what is added to it.
    assert [each.became for each in layers.values()] == [("conv2d",)] * 2 + [(second,)] * 2


class Shuffled(nn.Module):
    """A channel shuffle between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """As ShuffleNet does it."""
        x = torch.relu(self.before(x))
        x = x.view(1, 2, 4, 8, 8).transpose(1, 2).reshape(1, 8, 8, 8)
        return self.after(x)


def test_a_layer_with_its_channels_in_another_order_says_so_and_is_one_with_nobody() -> None:
    layers = told(Shuffled())
    reordered = [name for name, each in layers.items() if "route_channels" in dict(done(each))]

    assert reordered
    for each in layers.values():
        assert len(each.became) == 1
        assert each.one_with == ()


class Swapped(nn.Module):
    """Two convolutions that are combined, and one that reads their results the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """An activation between them."""
        first, second = torch.relu(self.a(x)), torch.relu(self.b(x))
        return self.c(torch.cat([second, first], 1))


def test_a_layer_that_reads_from_combined_ones_is_not_one_with_them() -> None:
    layers = told(Swapped())

    assert {name: each.one_with for name, each in layers.items()} == {
        "a": ("b",),
        "b": ("a",),
        "c": (),
    }
    assert dict(done(layers["c"]))["route_channels"] == "rewritten"


class Refusing(nn.Module):
    """Places that passes refuse at an operator beside the convolutions that they are about."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The place that is asked for."""
        if self.how == "fuse_conv_activation":
            x = self.one(x)
            return torch.relu(x), x
        if self.how == "fuse_conv_activation of a sum":
            return torch.relu(torch.add(self.one(x), x, alpha=2))
        if self.how == "fold_affine_input":
            return self.one(x + 1)
        if self.how == "merge_branches":
            x, y = self.one(x), self.other(x)
            return x + y, x
        return self.other(self.one(x))


@pytest.mark.parametrize(
    ("how", "about", "at"),
    [
        ("fuse_conv_activation", ["one"], ("relu",)),
        ("fuse_conv_activation of a sum", ["one"], ("relu",)),
        ("fold_affine_input", ["one"], ("add",)),
        ("merge_branches", ["one", "other"], ("add",)),
        ("merge_branches of a pair", ["one", "other"], ()),
    ],
)
def test_a_refusal_is_told_of_the_layers_that_it_is_about(
    how: str, about: list[str], at: tuple[str, ...]
) -> None:
    name = how.split()[0]
    layers = told(Refusing(how), name)

    assert [label for label, each in layers.items() if (name, "refused") in done(each)] == about
    assert only(layers[about[-1]], name).at == at


class Choice(nn.Module):
    """A convolution in each branch of torch.cond, one with a batch norm, and one in front."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        """Whichever the sum says."""
        x = torch.relu(self.conv(x))
        chosen = torch.cond(x.sum() > 0, self.other, self.conv, (x,))  # the line of the choice
        assert isinstance(chosen, Tensor)
        return chosen


def test_convolutions_in_the_branches_of_cond_have_histories_of_their_own() -> None:
    layers = told(Choice())
    inside = [layers[f"{name}_graph_0.conv2d"] for name in ("true", "false")]

    assert list(layers) == ["conv", *(each.label for each in inside)]
    # All three nodes are called conv2d, and none is taken for another.
    assert [done(each) for each in layers.values()] == [
        [("fuse_conv_activation", "rewritten")],
        [("fold_conv_bn", "rewritten")],
        [],
    ]
    assert [each.became for each in layers.values()] == [("conv_act",), ("conv2d",), ("conv2d",)]
    for each in inside:
        assert each.source.endswith(f":{line_of('# the line of the choice')}")


class Doubled(nn.Module):
    """The same call twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """A sine and a cosine of the same."""
        return torch.cat([torch.sin(self.conv(x)), torch.cos(self.conv(x))], 1)


def test_a_convolution_that_another_one_stands_for_is_gone() -> None:
    layers = told(Doubled())
    first, second = layers["conv (1st call)"], layers["conv (2nd call)"]

    assert (second.became, second.one_with) == ((), ())
    assert second.gone == "its result is that of conv (1st call)"
    event = only(first, "eliminate_common_subexpressions")
    assert event.at == ("conv2d (conv)",)
    assert (first.became, first.gone) == (("conv2d",), None)


class Constant(nn.Module):
    """A convolution of a buffer, which is the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("grid", torch.randn(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Added to the input."""
        return torch.sin(x) + self.conv(self.grid)


def test_a_convolution_that_was_computed_once_is_gone() -> None:
    conv = told(Constant())["conv"]

    assert (conv.became, conv.gone) == ((), "its result is a constant, computed once")
    assert done(conv) == [("fold_constants", "rewritten")]


class Linears(nn.Module):
    """A linear layer that a norm goes into, and one that nothing is done to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Both."""
        return self.second(torch.sin(self.first(self.norm(x))))


def test_a_linear_layer_is_told_of_where_a_pass_did_something_to_it() -> None:
    layers = told(Linears(), "all", torch.randn(2, 8))

    assert list(layers) == ["first"]
    assert layers["first"].settings == "8->6"
    assert only(layers["first"], "fold_linear_chain").took_in == ("norm",)


def test_what_was_undone_is_said_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = captured(scramble(Chain()), IMAGE)
    (spoilt,) = select("fold_conv_bn")
    rewrite = spoilt.rewrite

    def wrong(edit: Any, match: Any) -> Mapping[Any, Any]:
        return {
            old: edit.call(torch.ops.aten.neg.default, new)
            for old, new in rewrite(edit, match).items()
        }

    monkeypatch.setattr(spoilt, "rewrite", wrong)
    (block, _) = histories(before, optimize(before, [spoilt]))

    assert done(block) == [("fold_conv_bn", "undone")]
    assert only(block, "fold_conv_bn").text.startswith("in float64 its outputs moved")
    assert block.became == ("conv2d",)


def without(program: Program, *keys: str) -> Program:
    """A program as if it came from a file that says nothing of its source."""
    for node in program.graph_module.graph.nodes:
        for key in keys:
            node.meta.pop(key, None)
    return program


def test_without_stack_traces_the_source_line_is_unknown() -> None:
    before = without(captured(scramble(Chain()), IMAGE), "stack_trace")
    (block, head) = histories(before, optimized(before, "all"))

    assert (block.source, head.source) == ("", "")
    assert block.label == "block.0"


def test_without_modules_a_layer_is_called_by_its_node() -> None:
    before = without(captured(scramble(Chain()), IMAGE), "stack_trace", "nn_module_stack")
    (block, head) = histories(before, optimized(before, "all"))

    assert [each.label for each in (block, head)] == ["conv2d", "conv_transpose2d"]
    assert only(block, "fold_conv_bn").took_in == ("_native_batch_norm_legit_no_training",)


LINES = {
    f"{Path.cwd()}/net/blocks.py": "net/blocks.py:7",
    "/elsewhere/net.py": "/elsewhere/net.py:7",
    "/env/lib/site-packages/torchvision/models/resnet.py": "torchvision/models/resnet.py:7",
    f"{Path.cwd()}/.venv/lib/site-packages/timm/layers.py": "timm/layers.py:7",
    "/env/lib/site-packages/torch/nn/modules/conv.py": "mine.py:3",
    str(Path(torch.__file__).parent / "nn" / "functional.py"): "mine.py:3",
    str(Path(optfuse.__file__).parent / "normalize.py"): "mine.py:3",
    contextlib.__file__: "mine.py:3",
    "<eval_with_key>.3": "mine.py:3",
}
"""The deepest file of a stack trace -> what is shown, where `mine.py` is the one above it."""


def test_the_line_is_the_deepest_that_is_neither_pytorchs_nor_pythons() -> None:
    before = captured(scramble(Chain()), IMAGE)
    for file, shown in LINES.items():
        for node in before.graph_module.graph.nodes:
            node.meta["stack_trace"] = (
                f'File "{Path.cwd()}/mine.py", line 3, in forward\n    x = self.block(x)\n'
                f'  File "{file}", line 7, in forward\n    return f(x)\n'
            )
        assert histories(before, before)[0].source == shown


def test_a_pattern_chooses_among_modules() -> None:
    before = captured(scramble(Chain()), IMAGE)
    found = histories(before, optimized(before, "none"))

    assert [each.label for each in fitting(found, "block.*")] == ["block.0"]
    assert fitting(found, "*") == found
    with pytest.raises(UsageError, match=r"They are in 'block\.0', 'head'"):
        fitting(found, "blocks.*")
    with pytest.raises(UsageError, match="The model has none"):
        fitting((), "*")


def test_a_pattern_fits_the_node_of_a_layer_without_a_module() -> None:
    before = captured(scramble(Functional()), IMAGE)
    found = histories(before, optimized(before, "none"))

    assert [each.label for each in fitting(found, "conv2d_2")] == ["conv2d_2"]


class Pooled(nn.Module):
    """A batch norm behind a pooling, and one behind a convolution that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.BatchNorm2d(4), Shared()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One behind the other."""
        normed, wave = self.shared(torch.relu(self.first(functional.max_pool2d(x, 2))))
        return normed, wave


def test_a_batch_norm_behind_no_convolution_is_named() -> None:
    after = optimized(captured(scramble(Pooled()), IMAGE), "all")

    assert norms_left(after) == ("first (behind max_pool2d)",)


def test_refusals_that_are_no_layers_are_counted() -> None:
    before = captured(scramble(Shared()), IMAGE)
    after = optimized(before, "fold_conv_bn")
    found = histories(before, after)

    assert places_elsewhere(after.trace, found) == 0
    assert places_elsewhere(after.trace, ()) == 1
    bare = [
        replace(step, refused=tuple(replace(each, involved=None) for each in step.refused))
        for step in after.trace
    ]
    assert places_elsewhere(bare, found) == 1
