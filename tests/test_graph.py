"""Reading a graph and editing it: names, arguments, users, constants, and true metadata."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from optfuse.graph import (
    Edit,
    arguments,
    attribute,
    constant_of,
    copied,
    describe,
    equals,
    flat_inputs,
    is_call,
    kind,
    memory_of,
    module_path,
    operators,
    origins,
    placeholders,
    prepare,
    sole_user,
    take_over,
    value,
    why_not_sole_user,
    written_memory,
)
from tests.harness import captured, scramble

aten = torch.ops.aten


class Calling(nn.Module):
    """A module whose forward is a function of its linear layer and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, *args: Any) -> Any:
        return self.function(self.linear, *args)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def graph_of(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    return captured(scramble(Calling(function)), *args).graph_module


def node(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(each for each in graph_module.graph.nodes if each.name == name)


# Reading


def test_operators_are_counted_by_kind_the_most_frequent_first() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)
    )
    counts = operators(captured(scramble(net), numbers(1, 3, 8, 8)).graph_module)
    assert list(counts.items()) == [
        ("conv2d", 2),
        ("batch_norm", 1),
        ("max_pool2d", 1),
        ("relu", 1),
    ]


def test_operators_inside_branches_count_too() -> None:
    def branching(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos() + 1, (x,))
        return y

    counts = operators(graph_of(branching, numbers(4)))
    assert counts == {"add": 1, "cond": 1, "cos": 1, "gt": 1, "sin": 1, "sum": 1}


def test_kind_of_a_node() -> None:
    graph_module = graph_of(lambda linear, x: linear(x).split(2)[0], numbers(4))
    kinds = [kind(each) for each in graph_module.graph.nodes]
    assert {"placeholder", "get_attr", "linear", "getitem"} <= set(kinds)
    assert kinds[-1] == "output"


def test_training_batch_norm_is_a_batch_norm_too() -> None:
    program = captured(nn.BatchNorm1d(4, track_running_stats=False), numbers(3, 4))
    assert operators(program.graph_module)["batch_norm"] == 1


def test_a_node_is_described_by_its_name_and_its_module() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    graph_module = captured(scramble(net), numbers(4)).graph_module
    assert describe(node(graph_module, "linear")) == "linear (0.0)"
    assert describe(node(graph_module, "relu")) == "relu (1)"
    (x,) = placeholders(graph_module.graph)
    assert describe(x) == x.name


def test_a_node_of_the_model_itself_has_no_module_to_name() -> None:
    graph_module = graph_of(lambda linear, x: x.sin(), numbers(4))
    assert describe(node(graph_module, "sin")) == "sin"


def test_is_call() -> None:
    graph_module = graph_of(lambda linear, x: x.sin().cos(), numbers(4))
    sin = node(graph_module, "sin")
    assert is_call(sin, aten.sin.default)
    assert is_call(sin, aten.cos.default, aten.sin.default)
    assert not is_call(sin, aten.cos.default)
    assert not is_call(sin)
    assert not is_call(3.5, aten.sin.default)
    assert not is_call(placeholders(graph_module.graph)[0], aten.sin.default)


def test_arguments_have_their_names_and_their_defaults() -> None:
    net = nn.Conv2d(3, 4, 3, bias=False)
    graph_module = captured(scramble(net), numbers(1, 3, 8, 8)).graph_module
    conv = node(graph_module, "conv2d")
    bound = arguments(conv)
    assert list(bound) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert bound["input"] is conv.args[0]
    assert bound["bias"] is None
    assert (bound["stride"], bound["padding"], bound["groups"]) == ([1, 1], [0, 0], 1)


def test_arguments_given_by_keyword() -> None:
    graph_module = graph_of(lambda linear, x: torch.add(x, x, alpha=3), numbers(4))
    assert arguments(node(graph_module, "add"))["alpha"] == 3
    without = graph_of(lambda linear, x: x + x, numbers(4))
    assert arguments(node(without, "add"))["alpha"] == 1


def test_sole_user() -> None:
    def forked(linear: nn.Linear, x: torch.Tensor) -> Any:
        a = x.sin()
        b = a.cos()
        c = b * b
        return c.exp() + c.tanh(), a

    graph_module = graph_of(forked, numbers(4))
    sin, cos, mul = (node(graph_module, name) for name in ("sin", "cos", "mul"))
    assert sole_user(cos) is mul, "a user that takes it twice counts once"
    assert sole_user(mul) is None
    assert sole_user(sin) is None
    assert why_not_sole_user(cos, mul) is None
    assert why_not_sole_user(mul, node(graph_module, "exp")) == "the result of mul has 2 users"
    assert why_not_sole_user(sin, cos) == "the result of sin is also an output of the model"
    assert why_not_sole_user(cos, sin) == "cos is not used here"


def test_nested_attributes() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    assert attribute(net, "0.0.weight") is net[0][0].weight  # type: ignore[index]


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("read", torch.tensor([1.5]))
        self.register_buffer("written", torch.tensor([2.5]))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.written.add_(1)
        y.mul_(2)
        return x * self.read + self.written * y


def test_a_constant_is_what_nothing_writes_to() -> None:
    graph_module = captured(Written(), numbers(1), numbers(1)).graph_module
    read, written = node(graph_module, "read"), node(graph_module, "written")
    found = constant_of(read)
    assert found is not None
    assert found.tolist() == [1.5]
    assert not found.requires_grad
    assert constant_of(written) is None
    assert constant_of(placeholders(graph_module.graph)[0]) is None
    assert constant_of(2.5) is None
    assert constant_of(None) is None


def test_a_branch_is_no_constant() -> None:
    def branching(linear: nn.Linear, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    graph_module = graph_of(branching, numbers(4))
    branches = [each for each in graph_module.graph.nodes if each.op == "get_attr"]
    assert branches
    assert [constant_of(each) for each in branches if "graph" in str(each.target)] == [None, None]


def test_flat_inputs_stand_in_the_placeholders_order() -> None:
    class Nested(nn.Module):
        def forward(self, pair: Any, *, b: Any, a: Any) -> Any:
            return pair["y"] + pair["x"] + a * b

    args = ({"y": numbers(1), "x": numbers(2)},)
    program = captured(Nested(), *args, kwargs={"b": numbers(3)[:1], "a": numbers(4)[:1]})
    flat = flat_inputs(program.graph_module, program.example_args, program.example_kwargs)
    nodes = placeholders(program.graph_module.graph)
    assert [tuple(value(each).shape) for each in nodes] == [tuple(leaf.shape) for leaf in flat]
    assert len(flat) == 4


def test_prepare_says_what_is_written_to_and_where_a_node_comes_from() -> None:
    graph_module = captured(Written(), numbers(1), numbers(1)).graph_module
    said = {
        each.name: each.meta["written"]
        for each in graph_module.graph.nodes
        if each.op in ("get_attr", "placeholder")
    }
    assert said == {"x": False, "y": True, "read": False, "written": True}
    assert all(each.meta["origins"] == (each.name,) for each in graph_module.graph.nodes)
    assert value(node(graph_module, "read")).shape == (1,)
    node(graph_module, "mul").meta["origins"] = ("earlier",)
    prepare(graph_module)
    assert node(graph_module, "mul").meta["origins"] == ("earlier",), "what is known stays"


def test_a_captured_node_stands_for_itself() -> None:
    graph_module = captured(Written(), numbers(1), numbers(1)).graph_module
    assert all(equals(each) == origins(each) == (each.name,) for each in graph_module.graph.nodes)
    take_over(node(graph_module, "mul"), node(graph_module, "x"))
    prepare(graph_module)
    assert equals(node(graph_module, "mul")) == ("mul", "x"), "what is known stays"


def test_a_node_takes_over_what_another_stood_for() -> None:
    graph_module = graph_of(lambda linear, x: linear(x).relu().sin(), numbers(4))
    linear, relu, sin = (node(graph_module, name) for name in ("linear", "relu", "sin"))
    take_over(relu, sin)
    take_over(linear, relu)
    assert equals(linear) == ("linear", "relu", "sin")
    assert equals(relu) == ("relu", "sin")
    take_over(linear, sin)
    assert equals(linear) == ("linear", "relu", "sin"), "each of them once"


def test_a_node_of_another_shape_or_dtype_takes_nothing_over() -> None:
    graph_module = graph_of(lambda linear, x: (linear(x), x.sum(), x.double()), numbers(4))
    linear = node(graph_module, "linear")
    for name in ("sum_1", "_to_copy"):
        take_over(linear, node(graph_module, name))
    assert equals(linear) == ("linear",)


def test_what_a_copy_takes_over_the_original_does_not_see() -> None:
    graph_module = graph_of(lambda linear, x: linear(x).relu(), numbers(4))
    before = {each.name: equals(each) for each in graph_module.graph.nodes}
    new = copied(graph_module.graph)
    by_name = {each.name: each for each in new.nodes}
    take_over(by_name["linear"], by_name["relu"])
    assert equals(by_name["linear"]) == ("linear", "relu")
    assert {each.name: equals(each) for each in graph_module.graph.nodes} == before


def test_a_node_knows_the_module_that_made_it() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
    graph_module = captured(scramble(net), numbers(3, 4)).graph_module
    assert module_path(node(graph_module, "linear")) == "0"
    assert module_path(node(graph_module, "relu")) == "1.0"
    assert module_path(fx.Graph().placeholder("x")) == ""


def test_written_memory_is_what_is_written_and_its_views() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    view = graph.call_function(aten.view.default, (x, [2, 2]))
    part = graph.call_function(
        operator.getitem, (graph.call_function(aten.split.Tensor, (y, 1)), 0)
    )
    other = graph.call_function(aten.sin.default, (y,))
    graph.call_function(aten.copy_.default, (view, other))
    graph.output((part, other))
    assert written_memory(graph) == {x, view}


def test_a_copied_graph_is_another_one_with_the_same_metadata() -> None:
    graph_module = graph_of(lambda linear, x: linear(x), numbers(4))
    new = copied(graph_module.graph)
    assert str(new) == str(graph_module.graph)
    pairs = list(zip(new.nodes, graph_module.graph.nodes, strict=True))
    assert all(a is not b for a, b in pairs)
    assert all(a.meta.get("val") is b.meta.get("val") for a, b in pairs)
    next(iter(new.nodes)).meta["mine"] = 1
    assert "mine" not in next(iter(graph_module.graph.nodes)).meta
    assert fx.GraphModule(graph_module, new)(numbers(4)).shape == (4,)


# Editing


def test_a_new_call_knows_its_shape_its_module_and_its_origins() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()))
    graph_module = captured(scramble(net), numbers(3, 4)).graph_module
    linear, relu = node(graph_module, "linear"), node(graph_module, "relu")
    edit = Edit(graph_module)
    edit.before(relu, (linear, relu))
    new = edit.call(aten.sum.dim_IntList, linear, [1], keepdim=True)
    assert new.name == "sum_1"
    assert new.kwargs == {"keepdim": True}
    assert (value(new).shape, value(new).dtype) == ((3, 1), torch.float32)
    assert new.meta["origins"] == ("linear", "relu")
    assert equals(new) == (), "until somebody says what it stands for"
    assert describe(new) == "sum_1 (1.0)"
    assert new.next is relu
    edit.before(new, (new,))
    assert edit.call(aten.neg.default, linear).meta["origins"] == ("linear", "relu")


def test_a_call_that_does_not_fit_is_seen_at_once() -> None:
    graph_module = graph_of(lambda linear, x: linear(x), numbers(3, 4))
    linear = node(graph_module, "linear")
    edit = Edit(graph_module)
    edit.before(linear, (linear,))
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        edit.call(aten.mm.default, linear, linear)


def test_a_new_constant_is_registered_beside_the_models_own() -> None:
    graph_module = graph_of(lambda linear, x: linear(x), numbers(3, 4))
    linear = node(graph_module, "linear")
    edit = Edit(graph_module)
    edit.before(linear, (linear,))
    data = torch.tensor([[1.5, 2.5], [3.5, 4.5]], dtype=torch.float64).T
    first = edit.constant("linear.weight", data, torch.float16)
    second = edit.constant("linear.weight", data + 1, torch.float16)
    assert (first.target, second.target) == ("linear_weight", "linear_weight_1")
    assert edit.constants == ["linear_weight", "linear_weight_1"]
    held = graph_module.linear_weight
    assert isinstance(held, nn.Parameter)
    assert not held.requires_grad
    assert held.dtype is torch.float64, "exact until all passes are done"
    assert held.is_contiguous()
    assert value(first).dtype is torch.float16, "what the program will hold it as"
    assert first.meta["round_to"] is torch.float16
    assert first.meta["written"] is False
    found = constant_of(second)
    assert found is not None
    assert torch.equal(found, data + 1)


def test_names_of_constants_never_meet() -> None:
    graph_module = graph_of(lambda linear, x: linear(x), numbers(3, 4))
    linear = node(graph_module, "linear")
    data = torch.tensor([1.5])
    names = []
    for _ in range(2):  # a second edit of the same graph
        edit = Edit(graph_module)
        edit.before(linear, (linear,))
        for name in ("scale", "scale", "scale_1", "linear", "training"):
            names.append(edit.constant(name, data, torch.float32).target)
    assert len(set(names)) == len(names)
    assert "linear" not in names
    assert "training" not in names


def test_unused_nodes_are_erased_with_what_only_they_used() -> None:
    def forked(linear: nn.Linear, x: torch.Tensor) -> Any:
        shared = x.sin()
        return shared.cos() + 1, linear(shared.tanh()).exp()

    graph_module = graph_of(forked, numbers(4))
    exp = node(graph_module, "exp")
    exp.replace_all_uses_with(node(graph_module, "add"))
    Edit(graph_module).erase_unused((exp,))
    assert operators(graph_module) == {"add": 1, "cos": 1, "sin": 1}
    assert [each.op for each in graph_module.graph.nodes].count("get_attr") == 0
    graph_module.graph.lint()


def test_what_is_used_is_not_erased() -> None:
    graph_module = graph_of(lambda linear, x: x.sin().cos(), numbers(4))
    before = str(graph_module.graph)
    Edit(graph_module).erase_unused(list(graph_module.graph.nodes))
    assert str(graph_module.graph) == before


def test_writes_are_an_effect_and_random_numbers_are_none() -> None:
    graph_module = captured(Written(), numbers(1), numbers(1)).graph_module
    copies = [each for each in graph_module.graph.nodes if is_call(each, aten.copy_.default)]
    edit = Edit(graph_module)
    edit.before(copies[0], copies)
    drawn = edit.call(aten.rand.default, [3])
    edit.erase_unused([*copies, drawn])
    assert [each for each in graph_module.graph.nodes if each in copies] == copies
    assert drawn not in list(graph_module.graph.nodes)


def test_the_memory_that_a_result_lies_in() -> None:
    def views(linear: nn.Linear, x: torch.Tensor) -> Any:
        first, second = x.view(4, 4).transpose(0, 1).split(2)
        largest, at = (first + second).max(0)
        return second, largest, at, linear.weight[0], x.sin()

    graph_module = graph_of(views, numbers(16))
    second, largest, at, weight, sine = graph_module.graph.output_node().all_input_nodes
    assert memory_of(second) == set(placeholders(graph_module.graph))
    assert memory_of(largest) == {largest}  # several results, and none is a view
    assert memory_of(at) == {at}
    (held,) = memory_of(weight)
    assert held.op == "get_attr"
    assert memory_of(sine) == {sine}


def branching() -> fx.GraphModule:
    def function(linear: nn.Linear, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: linear(x).sin(), lambda x: x.cos().cos(), (x,))

    return graph_of(function, numbers(2, 4))


def test_operators_of_branches_are_counted_while_something_calls_them() -> None:
    graph_module = branching()
    assert operators(graph_module) == {
        "cos": 2,
        "cond": 1,
        "gt": 1,
        "linear": 1,
        "sin": 1,
        "sum": 1,
    }
    (call,) = (each for each in graph_module.graph.nodes if kind(each) == "cond")
    for user in list(call.users):
        user.replace_all_uses_with(placeholders(graph_module.graph)[0])
        graph_module.graph.erase_node(user)
    Edit(graph_module).erase_unused((call,))
    assert operators(graph_module) == {}


def test_nodes_of_a_branch_are_named_after_it() -> None:
    graph_module = branching()
    branch = attribute(graph_module, "true_graph_0")
    assert origins(node(branch, "sin")) == ("true_graph_0.sin",)
    assert equals(node(branch, "sin")) == ("true_graph_0.sin",)
    assert value(node(branch, "sin")).shape == (2, 4)


def test_a_branch_takes_its_leaves_one_by_one() -> None:
    branch = attribute(branching(), "false_graph_0")
    assert flat_inputs(branch, (1, 2.5), {}) == [1, 2.5]
