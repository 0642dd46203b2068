"""The driver: what it selects, what it proves and undoes, what it records, and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import fx, nn

from optfuse import passes
from optfuse.capture import capture
from optfuse.errors import ModelError, UsageError
from optfuse.float64 import distance, run_float64
from optfuse.graph import Edit, equals, is_call, value
from optfuse.optimize import REWRITES_PER_NODE, optimize, select
from optfuse.passes import ORDER, Match, Pass, Refusal
from optfuse.stages import LoadedModel, Program, Rewrite, Step
from tests.harness import captured, counts, float64_distance, optimized, scramble

aten = torch.ops.aten


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# Which passes run


def chosen(text: str) -> list[str]:
    return [str(each) for each in select(text)]


def test_all_is_every_pass_in_order() -> None:
    assert [each.name for each in select("all")] == list(ORDER)
    assert all(each.options == frozenset() for each in select("all"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", []),
        ("", []),
        (" , ,", []),
        ("fold_conv_bn", ["fold_conv_bn"]),
        ("fold_conv_bn,eliminate_identity", ["eliminate_identity", "fold_conv_bn"]),
        (" fold_conv_bn , fold_conv_bn ", ["fold_conv_bn"]),
        ("all,none,fold_conv_bn", ["fold_conv_bn"]),
        ("fold_conv_bn,-fold_conv_bn", []),
        ("-fold_conv_bn,fold_conv_bn", ["fold_conv_bn"]),
        ("elide_concat.partial", ["elide_concat.partial"]),
        ("elide_concat.partial,elide_concat", ["elide_concat.partial"]),
        ("elide_concat.partial,-elide_concat.partial", ["elide_concat"]),
        ("elide_concat.partial,-elide_concat", []),
        ("-elide_concat.partial", []),
    ],
)
def test_a_list_of_passes(text: str, expected: list[str]) -> None:
    assert chosen(text) == expected


def test_all_but_one() -> None:
    assert chosen("all,-elide_concat") == [name for name in ORDER if name != "elide_concat"]


def test_all_with_an_option_of_one() -> None:
    expected = [f"{name}.partial" if name == "elide_concat" else name for name in ORDER]
    assert chosen("all,elide_concat.partial") == expected


@pytest.mark.parametrize("word", ["fold", "-fold", "ALL", "-all", "-none", "-", "fold.all", "."])
def test_a_pass_that_does_not_exist(word: str) -> None:
    name = word.removeprefix("-").partition(".")[0]
    with pytest.raises(UsageError) as raised:
        select(f"fold_conv_bn,{word}")
    assert str(raised.value) == (
        f"There is no pass '{name}'. The passes are {', '.join(ORDER)}. "
        "Choose from them, or run 'optfuse passes' to see what each one does."
    )
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("sign", ["", "-"])
def test_an_option_that_does_not_exist(sign: str) -> None:
    with pytest.raises(UsageError) as raised:
        select(f"{sign}elide_concat.whole")
    known = ", ".join(passes.load("elide_concat").OPTIONS)
    assert "partial" in known
    assert str(raised.value) == (
        f"The pass elide_concat has no option 'whole'. Its options are {known}. "
        "Leave it out, or run 'optfuse passes' to see what each one does."
    )


def test_an_option_of_a_pass_without_any() -> None:
    with pytest.raises(UsageError) as raised:
        select("fold_conv_bn.fast")
    assert raised.value.thing == "The pass fold_conv_bn has no option 'fast'"
    assert raised.value.cause == "It has no options"


# Passes made for these tests


class Rewriting(Pass):
    """Replaces every call of one operator by what `build` makes of it.

    Args:
        name: what the driver knows it by.
        target: the operator to replace.
        build: given the edit and the node, the node that stands for it.
        where: only nodes that this holds for.
    """

    equation = "whatever the test says"

    def __init__(
        self,
        name: str,
        target: Callable[..., Any],
        build: Callable[[Edit, fx.Node], fx.Node],
        where: Callable[[fx.Node], bool] = lambda node: True,
    ) -> None:
        super().__init__()
        self.name = name  # type: ignore[misc]
        self.target, self.build, self.where = target, build, where
        self.matched = 0

    def match(self, node: fx.Node) -> Match | Refusal | None:
        self.matched += 1
        if not is_call(node, self.target):
            return None
        if not self.where(node):
            return Refusal("the test says so")
        return Match(nodes=(node,), note="as the test says")

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        (node,) = match.nodes
        return {node: self.build(edit, node)}


def scaled_by(factor: float) -> Callable[[Edit, fx.Node], fx.Node]:
    """mul(x, c) -> x * (factor * c as a constant), written with a new constant."""

    def build(edit: Edit, node: fx.Node) -> fx.Node:
        data = torch.tensor(float(node.args[1]) * factor, dtype=torch.float64)  # type: ignore[arg-type]
        constant = edit.constant("scale", data, torch.float32)
        return edit.call(aten.mul.Tensor, node.args[0], constant)

    return build


def scalar(node: fx.Node) -> bool:
    return not isinstance(node.args[1], fx.Node)


def scaling(name: str, factor: float) -> Rewriting:
    """Right for a factor of 1, wrong by as much as the factor differs from it."""

    class Scaling(Rewriting):
        def match(self, node: fx.Node) -> Match | Refusal | None:
            return super().match(node) if is_call(node, aten.mul.Tensor) and scalar(node) else None

    return Scaling(name, aten.mul.Tensor, scaled_by(factor))


def sigmoid_to_tanh() -> Rewriting:
    """sigmoid(x) -> (tanh(x / 2) + 1) / 2, which is right."""

    def build(edit: Edit, node: fx.Node) -> fx.Node:
        half = edit.call(aten.div.Tensor, node.args[0], 2)
        shifted = edit.call(aten.add.Tensor, edit.call(aten.tanh.default, half), 1)
        return edit.call(aten.div.Tensor, shifted, 2)

    return Rewriting("sigmoid_to_tanh", aten.sigmoid.default, build)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * 1.7).sigmoid()


def small() -> Program:
    return captured(scramble(Small()), numbers(2, 4))


def passed(program: Program) -> list[Step]:
    return [step for step in program.trace if step.stage == "pass"]


def step_of(program: Program, name: str) -> Step:
    (step,) = [step for step in program.trace if step.name == name and step.matched] or [
        step for step in program.trace if step.name == name
    ]
    return step


def snapshot(program: Program) -> tuple[str, dict[str, torch.Tensor]]:
    state = program.graph_module.state_dict()
    return str(program.graph_module.graph), {name: t.clone() for name, t in state.items()}


def assert_as_it_was(program: Program, before: tuple[str, dict[str, torch.Tensor]]) -> None:
    graph, state = snapshot(program)
    assert graph == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(state[name], before[1][name]) for name in state)


# What is proved, and what is undone


def test_a_right_pass_stands_with_its_proof() -> None:
    program = small()
    after = optimize(program, [sigmoid_to_tanh()])
    step = step_of(after, "sigmoid_to_tanh")
    assert step.undone is None
    assert step.relative_l2 is not None
    assert 0 <= step.relative_l2 < 1e-14  # a few roundings in float64
    assert counts(after) == {"div": 2, "linear": 1, "mul": 1, "tanh": 1, "add": 1}
    assert float64_distance(program, after) < 1e-14  # as above


def test_a_wrong_pass_is_undone_and_named_and_the_others_go_on() -> None:
    program = small()
    after = optimize(program, [scaling("wrong", 1.1), sigmoid_to_tanh()])
    step = step_of(after, "wrong")
    assert step.matched == 1
    assert step.undone is not None
    assert step.undone.startswith("in float64 its outputs moved by a relative L2 of ")
    assert step.undone.endswith(", and 1e-10 is the limit")
    assert step.relative_l2 is not None
    assert step.relative_l2 > 1e-3
    assert (step.operators_before, step.operators_after) == (3, 3)
    assert step_of(after, "sigmoid_to_tanh").undone is None
    assert counts(after) == {"div": 2, "linear": 1, "mul": 1, "tanh": 1, "add": 1}
    assert float64_distance(program, after) < 1e-14  # a few roundings in float64


def test_an_undone_pass_leaves_no_constants_and_is_not_run_again() -> None:
    program = small()
    wrong = scaling("wrong", 1.1)
    after = optimize(program, [wrong, sigmoid_to_tanh()])
    names = {name for name, _ in after.graph_module.named_parameters()}
    assert names == {"linear.weight", "linear.bias"}
    assert not hasattr(after.graph_module, "scale")
    assert [step.name for step in passed(after)].count("wrong") == 1
    # Exactly: the same graph on the same numbers.
    x = numbers(2, 4)
    assert torch.equal(
        optimize(program, [scaling("wrong", 1.1)]).graph_module(x), program.graph_module(x)
    )


def test_an_undone_passs_names_are_free_again() -> None:
    after = optimize(small(), [scaling("wrong", 1.1), scaling("right", 1.0)])
    assert step_of(after, "right").undone is None
    assert float(after.graph_module.scale) == pytest.approx(1.7, rel=1e-7)  # float32's own rounding


def test_every_pass_answers_for_itself_alone() -> None:
    """The second is compared with what the first one left, not with the captured program."""

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1.7 - 0.0

    error = 6e-11

    def again(edit: Edit, node: fx.Node) -> fx.Node:
        return edit.call(aten.div.Tensor, node.args[0], 1 - error)

    second = Rewriting("second", aten.sub.Tensor, again)
    after = optimize(captured(Scaled(), numbers(5)), [scaling("first", 1 + error), second])
    assert [step.undone for step in passed(after)] == [None, None]
    # 1e-15: the error itself is rounded in float64.
    assert [step.relative_l2 for step in passed(after)] == pytest.approx([error] * 2, abs=1e-15)


def test_what_a_right_pass_did_survives_when_a_later_one_is_undone() -> None:
    program = small()
    after = optimize(program, [scaling("right", 1.0), sigmoid_to_tanh(), doubled_tanh()])
    assert step_of(after, "right").undone is None
    assert step_of(after, "doubled_tanh").undone is not None
    assert [name for name, _ in after.graph_module.named_parameters() if "scale" in name]
    # 1e-7: the constant was rounded to float32 at the end.
    assert float64_distance(program, after) < 1e-7


def doubled_tanh() -> Rewriting:
    def build(edit: Edit, node: fx.Node) -> fx.Node:
        wrong = edit.constant("two", torch.tensor(2.0, dtype=torch.float64), torch.float32)
        scaled = edit.call(aten.mul.Tensor, node.args[0], wrong)
        return edit.call(aten.tanh.default, scaled)

    def new(node: fx.Node) -> bool:
        return not is_call(node.args[0], aten.mul.Tensor)

    class Doubled(Rewriting):
        def match(self, node: fx.Node) -> Match | Refusal | None:
            return super().match(node) if is_call(node, aten.tanh.default) and new(node) else None

    return Doubled("doubled_tanh", aten.tanh.default, build)


@pytest.mark.parametrize(("error", "undone"), [(1e-9, True), (1e-13, False)])
def test_how_wrong_is_wrong(error: float, undone: bool) -> None:
    """1e-10 is between the smallest real mistake and the largest float64 rounding."""

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1.7

    after = optimize(captured(Scaled(), numbers(5)), [scaling("slightly", 1 + error)])
    step = step_of(after, "slightly")
    assert (step.undone is not None) == undone
    # 1e-15: the error itself is rounded in float64.
    assert step.relative_l2 == pytest.approx(error, abs=1e-15)


def test_a_pass_whose_graph_cannot_run_is_undone() -> None:
    def build(edit: Edit, node: fx.Node) -> fx.Node:
        new = edit.call(aten.sigmoid.default, node.args[0])
        picked = edit.call(aten.narrow.default, new, 0, 0, 1)
        picked.args = (new, 0, 0, 77)  # only seen when it runs
        return edit.call(aten.expand.default, picked, list(value(node).shape))

    def first(node: fx.Node) -> bool:
        return node.name == "sigmoid"

    broken = Rewriting("broken", aten.sigmoid.default, build, where=first)
    program = small()
    after = optimize(program, [broken, scaling("right", 1.0)])
    step = step_of(after, "broken")
    assert step.undone is not None
    assert step.undone.startswith("the rewritten graph does not run in float64: RuntimeError: ")
    assert "\n" not in step.undone
    assert step.relative_l2 is None
    assert counts(after) == counts(program)
    assert step_of(after, "right").undone is None


def test_a_pass_that_raises_while_it_rewrites_is_undone() -> None:
    def build(edit: Edit, node: fx.Node) -> fx.Node:
        edit.constant("left_behind", torch.tensor(1.5, dtype=torch.float64), torch.float32)
        return edit.call(aten.mm.default, node.args[0], node.args[0])  # the shapes do not fit

    program = small()
    after = optimize(program, [Rewriting("raising", aten.sigmoid.default, build)])
    step = step_of(after, "raising")
    assert step.undone is not None
    assert step.undone.startswith("it failed with RuntimeError: ")
    assert [site.site for site in step.sites] == ["sigmoid"]
    assert counts(after) == counts(program)
    assert not hasattr(after.graph_module, "left_behind")


def test_a_pass_that_raises_while_it_matches_is_undone() -> None:
    def fault(node: fx.Node) -> bool:
        raise KeyError

    faulty = Rewriting("faulty", aten.sigmoid.default, lambda edit, node: node, where=fault)
    after = optimize(small(), [faulty, sigmoid_to_tanh()])
    step = step_of(after, "faulty")
    assert step.undone == "it failed with KeyError"
    assert step_of(after, "sigmoid_to_tanh").undone is None


def test_a_pass_that_changes_a_shape_is_undone() -> None:
    def build(edit: Edit, node: fx.Node) -> fx.Node:
        return edit.call(aten.sum.dim_IntList, node.args[0], [0])

    after = optimize(small(), [Rewriting("summing", aten.sigmoid.default, build)])
    assert step_of(after, "summing").undone == (
        "in float64 its outputs differ in shape, in dtype, in an integer, or in where they are "
        "finite"
    )


class Endless(Rewriting):
    """Writes what it matches."""

    def __init__(self, growing: bool) -> None:
        def build(edit: Edit, node: fx.Node) -> fx.Node:
            x = edit.call(aten.sigmoid.default, node.args[0])
            return edit.call(aten.mul.Tensor, x, 1) if growing else x

        super().__init__("endless", aten.sigmoid.default, build)


@pytest.mark.parametrize("growing", [False, True])
def test_a_pass_that_never_ends_is_undone(growing: bool) -> None:
    program = small()
    nodes = len(program.graph_module.graph.nodes)
    after = optimize(program, [Endless(growing), scaling("right", 1.0)])
    step = step_of(after, "endless")
    assert step.matched == REWRITES_PER_NODE * nodes + 1
    assert step.undone == (
        f"it does not come to an end: it had rewritten {step.matched} places of a graph with "
        f"{nodes} nodes, and went on"
    )
    assert counts(after) == counts(program)
    assert step_of(after, "right").undone is None


def test_two_passes_that_undo_each_other_come_to_an_end() -> None:
    def to(target: Callable[..., Any]) -> Callable[[Edit, fx.Node], fx.Node]:
        return lambda edit, node: edit.call(target, node.args[0])

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

    there = Rewriting("there", aten.relu.default, to(aten.clamp_min.default))
    there.build = lambda edit, node: edit.call(aten.clamp_min.default, node.args[0], 0)
    back = Rewriting("back", aten.clamp_min.default, to(aten.relu.default))
    program = captured(Plain(), numbers(4))
    after = optimize(program, [there, back])
    assert [step.undone for step in passed(after)] == [None] * len(passed(after))
    assert len(passed(after)) == 20  # ten rounds of both
    assert [refused.reason for step in after.trace for refused in step.refused] == [
        "the passes still found something to do after 10 rounds, and may be undoing each other's "
        "work; what they left is proved all the same"
    ]
    assert float64_distance(program, after) == 0.0  # both are exact


# What is recorded


def test_a_pass_that_finds_nothing_is_recorded_once_without_a_proof() -> None:
    nothing = Rewriting("nothing", aten.cos.default, lambda edit, node: node)
    after = optimize(small(), [nothing, sigmoid_to_tanh()])
    (step,) = [step for step in passed(after) if step.name == "nothing"]
    assert (step.matched, step.relative_l2, step.undone) == (0, None, None)
    assert step.settings == {"round": 1, "options": []}
    assert step.seconds > 0


def test_steps_are_added_behind_those_that_are_there() -> None:
    program = small()
    after = optimize(program, [scaling("right", 1.0), sigmoid_to_tanh()])
    assert [(step.stage, step.name) for step in after.trace] == [
        ("capture", "torch.export"),
        ("pass", "right"),
        ("pass", "sigmoid_to_tanh"),
        ("round", "round_constants"),
    ]
    right, tanh = passed(after)
    assert right.sites[0].note == "as the test says"
    assert (right.operators_before, right.operators_after) == (3, 3)
    assert (tanh.operators_before, tanh.operators_after) == (3, 6)
    assert after.trace[-1].settings == {"constants": 1}
    assert len(program.trace) == 1


def test_a_site_names_the_module_it_came_from() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Sigmoid()))
    after = optimize(captured(scramble(net), numbers(2, 4)), [sigmoid_to_tanh()])
    assert [site.site for site in step_of(after, "sigmoid_to_tanh").sites] == ["sigmoid (1.0)"]


def test_options_are_recorded() -> None:
    after = optimize(small(), select("elide_concat.partial"))
    assert step_of(after, "elide_concat").settings["options"] == ["partial"]


def test_no_passes_leave_no_steps() -> None:
    program = small()
    after = optimize(program, [])
    assert after.trace == program.trace
    assert counts(after) == counts(program)


class TwoSigmoids(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid().sigmoid()


def test_refusals_are_those_of_the_last_sweep() -> None:
    """The second sigmoid is refused until the first one is gone; then nothing is."""

    def behind_no_other(node: fx.Node) -> bool:
        return not is_call(node.args[0], aten.sigmoid.default)

    tanh = sigmoid_to_tanh()
    patient = Rewriting("patient", aten.sigmoid.default, tanh.build, where=behind_no_other)
    # Backwards, so that the second sigmoid is looked at while the first is still there.
    after = optimize(captured(TwoSigmoids(), numbers(4)), [_Backwards(patient)])
    step = step_of(after, "patient")
    assert step.matched == 2
    assert step.refused == ()


class _Backwards(Pass):
    """Asks another pass about the last node when the driver is at the first one, and so on."""

    equation = "as the other one"

    def __init__(self, other: Pass) -> None:
        super().__init__()
        self.other = other
        self.name = other.name  # type: ignore[misc]

    def begin(self, graph: fx.Graph) -> None:
        self.waiting = list(graph.nodes)

    def match(self, node: fx.Node) -> Match | Refusal | None:
        return self.other.match(self.waiting.pop())

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        return self.other.rewrite(edit, match)


def test_a_refusal_that_stays_is_recorded_with_its_reason() -> None:
    refusing = Rewriting(
        "refusing", aten.sigmoid.default, lambda edit, node: node, where=lambda node: False
    )
    after = optimize(captured(TwoSigmoids(), numbers(4)), [refusing])
    refused = step_of(after, "refusing").refused
    assert [(each.site, each.reason) for each in refused] == [
        ("sigmoid", "the test says so"),
        ("sigmoid_1", "the test says so"),
    ]


def test_a_later_round_finds_what_an_earlier_pass_could_not() -> None:
    """The first pass matches only what the second one makes, so it takes a second round."""
    tanh_to_sigmoid = Rewriting(
        "tanh_to_sigmoid",
        aten.tanh.default,
        lambda edit, node: edit.call(
            aten.sub.Tensor,
            edit.call(
                aten.mul.Tensor,
                edit.call(aten.sigmoid.default, edit.call(aten.mul.Tensor, node.args[0], 2)),
                2,
            ),
            1,
        ),
    )
    only_once = sigmoid_to_tanh()
    only_once.where = lambda node: node.name == "sigmoid"
    after = optimize(small(), [tanh_to_sigmoid, only_once])
    rounds = [(step.name, step.settings["round"], step.matched) for step in passed(after)]
    assert rounds == [
        ("tanh_to_sigmoid", 1, 0),
        ("sigmoid_to_tanh", 1, 1),
        ("tanh_to_sigmoid", 2, 1),
    ]


def test_the_user_is_told_which_pass_runs() -> None:
    told: list[tuple[str, float | None]] = []
    optimize(
        small(),
        [scaling("first", 1.0), sigmoid_to_tanh()],
        notify=lambda text, fraction=None: told.append((text, fraction)),
    )
    assert told[:2] == [("first", 0.25), ("sigmoid_to_tanh", 0.75)]


def test_matching_looks_at_every_node_a_fixed_number_of_times() -> None:
    """Counted, not timed: twice as long a graph is looked at twice as often."""

    class Chain(nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.length = length

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.length):
                x = x.sigmoid()
            return x

    looks = []
    for length in (10, 20):
        each = sigmoid_to_tanh()
        optimize(captured(Chain(length), numbers(4)), [each])
        looks.append(each.matched)
    # Input, output and one operator for each sigmoid; then, for the sweep that finds nothing, four.
    # No second round: nothing has changed since that sweep.
    assert looks == [12 + 42, 22 + 82]


# What stays as it is


def test_the_program_and_the_model_stay_as_they_are() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()))
    program = captured(module, numbers(2, 3, 6, 6))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before = snapshot(program)
    example = program.example_args[0].clone()
    after = optimize(program, select("all"))
    assert counts(after) != counts(program)
    assert_as_it_was(program, before)
    assert torch.equal(program.example_args[0], example)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert not module.training
    assert after.exported is program.exported


def test_a_program_that_writes_to_its_state_is_proved_on_the_same_state() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor(3.0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            x.mul_(2)
            return (x * self.seen).sigmoid()

    program = captured(Counting(), numbers(4).double())
    after = optimized_with(program, [sigmoid_to_tanh()])
    assert float(program.graph_module.seen) == 3.0
    assert float(after.graph_module.seen) == 3.0


def optimized_with(program: Program, selected: list[Pass]) -> Program:
    after = optimize(program, selected)
    assert [step.undone for step in after.trace if step.undone] == []
    return after


def test_the_result_holds_no_parameters_that_it_does_not_use() -> None:
    """So that those of the original can be freed with it, and its file does not grow."""
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    after = optimized(captured(module, numbers(2, 3, 6, 6)), "all")
    assert {tuple(each.shape) for each in after.graph_module.parameters()} == {(4, 3, 3, 3), (4,)}
    assert len(after.graph_module.state_dict()) == 2


def test_all_passes_twice_change_nothing_more() -> None:
    module = scramble(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    )
    once = optimized(captured(module, numbers(2, 3, 6, 6)), "all")
    twice = optimized(once, "all")
    assert counts(twice) == counts(once)
    added = twice.trace[len(once.trace) :]
    assert [step.matched for step in added] == [0] * len(ORDER)
    assert snapshot(twice)[0] == snapshot(once)[0]


def test_new_nodes_know_which_captured_nodes_they_came_from() -> None:
    program = small()
    after = optimize(program, [sigmoid_to_tanh(), shifted_tanh()])
    origins = {
        node.name: node.meta["origins"]
        for node in after.graph_module.graph.nodes
        if node.op == "call_function"
    }
    assert origins["linear"] == ("linear",)
    assert origins["tanh_1"] == ("sigmoid",), "through two passes, back to what was captured"
    assert origins["mul"] == ("mul",)


def stands_for(program: Program) -> dict[str, tuple[str, ...]]:
    return {
        node.name: equals(node)
        for node in program.graph_module.graph.nodes
        if node.op == "call_function"
    }


def test_new_nodes_stand_for_the_captured_node_they_replace() -> None:
    after = optimize(small(), [sigmoid_to_tanh(), shifted_tanh()])
    # What is in between gives what nothing gave before.
    assert {name: names for name, names in stands_for(after).items() if names} == {
        "linear": ("linear",),
        "mul": ("mul",),
        "div_1": ("sigmoid",),
    }


def test_whatever_a_pass_makes_of_it_a_captured_value_has_one_node() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 5, 1)
    )
    after = optimized(captured(scramble(module), numbers(2, 3, 6, 6)), "all")
    # The dropout is gone (it was captured as a clone): what the activation gives is its value.
    assert stands_for(after) == {"conv_act": ("relu", "clone"), "conv2d_1": ("conv2d_1",)}


def test_branches_that_were_combined_are_told_apart() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.left(x), self.right(x)], 1)

    program = captured(scramble(Branches()), numbers(2, 3, 6, 6))
    after = optimized(program, "combine_parallel_convs")
    found = stands_for(after)
    assert [names for names in found.values() if names] == [("conv2d",), ("conv2d_1",), ("cat",)]
    # And one whole again: the convolution gives what the concat gave, not what a branch gave.
    joined = stands_for(optimized(program, "combine_parallel_convs,elide_concat"))
    assert list(joined.values()) == [("cat",)]


def test_what_an_undone_pass_took_over_is_forgotten() -> None:
    after = optimize(small(), [scaling("wrong", 1.5)])
    assert [step.undone for step in after.trace if step.undone]
    assert all(names == (name,) for name, names in stands_for(after).items())


def shifted_tanh() -> Rewriting:
    """tanh(x) -> tanh(x * 1), once."""
    return Rewriting(
        "shifted_tanh",
        aten.tanh.default,
        lambda edit, node: edit.call(
            aten.tanh.default, edit.call(aten.mul.Tensor, node.args[0], 1)
        ),
        where=lambda node: not is_call(node.args[0], aten.mul.Tensor),
    )


# Rounding


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constants_are_rounded_once_to_the_models_own_dtype(dtype: torch.dtype) -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype))
    program = captured(module, numbers(2, 3, 6, 6).to(dtype))
    after = optimized(program, "fold_conv_bn")
    assert {each.dtype for each in after.graph_module.parameters()} == {dtype}
    conv, norm = module[0], module[1]
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).detach()
    (weight,) = [each for each in after.graph_module.parameters() if each.dim() == 4]
    error = ((weight.detach().double() - exact) / exact).abs().max()
    # Half a unit in the last place of the dtype for the one rounding, and a few of float64 for the
    # formula above, which rounds in another order.
    assert float(error) <= 0.5 * torch.finfo(dtype).eps + 1e-15
    output = after.graph_module(numbers(2, 3, 6, 6).to(dtype))
    assert output.dtype is dtype


def test_a_constant_that_is_not_finite_in_the_models_dtype_is_an_error() -> None:
    """A pass should have refused; the driver is the last to look."""

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 60000.0

    def build(edit: Edit, node: fx.Node) -> fx.Node:
        doubled = torch.tensor(120000.0, dtype=torch.float64)
        constant = edit.constant("doubled", doubled, torch.float16)
        return edit.call(aten.div.Tensor, edit.call(aten.mul.Tensor, node.args[0], constant), 2)

    large = Rewriting("large", aten.mul.Tensor, build, where=scalar)
    with pytest.raises(ModelError) as raised:
        optimize(captured(Scaled(), numbers(4).half()), [large])
    assert str(raised.value) == (
        "A folded constant of doubled cannot be kept. It is not finite in float16. "
        "Leave the folding passes out with --passes, or use a wider dtype."
    )


def test_infinities_that_the_model_holds_itself_are_kept() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1.7).sigmoid()

    def build(edit: Edit, node: fx.Node) -> fx.Node:
        largest = torch.tensor([float("inf"), 5.0], dtype=torch.float64)
        limit = edit.constant("limit", largest.max(), torch.float32)
        return edit.call(aten.minimum.default, edit.call(aten.clone.default, node), limit)

    class Limiting(Rewriting):
        def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
            (node,) = match.nodes
            limit = edit.constant(
                "limit", torch.tensor(float("inf"), dtype=torch.float64), torch.float32
            )
            first = edit.call(aten.mul.Tensor, node.args[0], node.args[1])
            return {node: edit.call(aten.minimum.default, first, limit)}

    def unlimited(node: fx.Node) -> bool:
        return not any(is_call(user, aten.minimum.default) for user in node.users)

    limiting = Limiting("limiting", aten.mul.Tensor, build, where=unlimited)
    program = captured(Masked(), numbers(4))
    after = optimized_with(program, [limiting])
    assert float(after.graph_module.limit) == float("inf")
    assert float64_distance(program, after) == 0.0  # a minimum with infinity is exact


# What cannot be proved


class Bits(nn.Module):
    """Reads a float32 number's bits, which a float64 number has twice as many of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = x.view(torch.int32) & torch.ones(4, dtype=torch.int32)
        return x.sigmoid() + signs


def test_a_model_that_does_not_run_in_float64() -> None:
    program = captured(Bits(), numbers(4))
    with pytest.raises(ModelError) as raised:
        optimize(program, [sigmoid_to_tanh()])
    error = raised.value
    assert error.thing == "'test' cannot be run in float64, so no pass can be proved"
    assert error.cause.startswith("RuntimeError: The size of tensor a (8) must match")
    assert error.next_step == (
        "Use --passes none to export it as it is, and please report the model"
    )
    assert error.exit_code == 3


def test_where_nothing_matches_nothing_is_run_in_float64() -> None:
    program = captured(Bits(), numbers(4))
    assert counts(optimize(program, [scaling("nothing", 1.0)])) == counts(program)


def test_models_without_random_inputs_to_draw() -> None:
    """Index inputs keep their range, so that an embedding can be proved."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids).sigmoid()  # type: ignore[no-any-return]

    program = captured(scramble(Embedded()), torch.tensor([0, 4, 2]))
    optimized_with(program, [sigmoid_to_tanh()])


def test_a_dynamic_program_stays_dynamic() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = capture(LoadedModel("net", module, (numbers(2, 3, 6, 6),), dynamic_shapes=shapes))
    after = optimized(program, "all")
    assert after.dynamic_shapes is shapes
    x = numbers(5, 3, 6, 6)
    moved = distance(
        run_float64(program.graph_module, (x,), {}), run_float64(after.graph_module, (x,), {})
    )
    # 1e-6: the folded weights were rounded to float32.
    assert moved < 1e-6


def test_running_the_optimized_program_does_not_count_for_the_original() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.full((1,), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs.add_(1)
            return x * self.runs

    model = Counting()
    x = torch.linspace(1, 2, 3)
    before = captured(model, x)
    after = optimized(before, "all")
    for program in (before, after):
        assert torch.equal(program.graph_module(x), x * 1.5)
    assert torch.equal(model.runs, torch.full((1,), 0.5))


# What is left alone because the caller says so


def test_a_rewrite_that_is_not_to_be_done_is_refused_with_the_callers_reason() -> None:
    program = captured(TwoSigmoids(), numbers(2, 4))
    asked: list[Rewrite] = []

    def left(rewrite: Rewrite) -> str | None:
        asked.append(rewrite)
        return "it did not pay" if rewrite.origins == {"sigmoid_1"} else None

    after = optimize(program, [sigmoid_to_tanh()], left=left)
    found = step_of(after, "sigmoid_to_tanh")
    assert [site.site for site in found.sites] == ["sigmoid"]
    assert [(refused.site, refused.reason) for refused in found.refused] == [
        ("sigmoid_1", "it did not pay")
    ]
    assert counts(after)["sigmoid"] == 1
    assert found.sites[0].rewrite == Rewrite("sigmoid_to_tanh", frozenset(), frozenset({"sigmoid"}))
    assert set(asked) == {
        Rewrite("sigmoid_to_tanh", frozenset(), frozenset({name}))
        for name in ("sigmoid", "sigmoid_1")
    }
    assert float64_distance(program, after) < 1e-14  # a few roundings in float64


def test_a_rewrite_is_known_by_what_was_captured_whatever_came_before_it() -> None:
    """The same place is named alike with and without the folding that replaced its convolution."""
    block = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    program = captured(block, numbers(2, 3, 8, 8))

    def fused(text: str) -> list[Rewrite | None]:
        after = optimized(program, text)
        return [site.rewrite for site in step_of(after, "fuse_conv_activation").sites]

    (alone,) = fused("all")
    assert alone is not None
    norm = {"_native_batch_norm_legit_no_training", "getitem"}
    assert alone.origins == {"conv2d", "relu"} | norm
    assert fused("fold_conv_bn,fuse_conv_activation") == [alone]


def test_the_branches_of_a_program_are_not_asked_about() -> None:
    class Either(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: y.sigmoid(), lambda y: -y.sigmoid(), (x,))

    after = optimize(captured(Either(), numbers(2, 4)), [sigmoid_to_tanh()], left=lambda _: "no")
    assert step_of(after, "sigmoid_to_tanh").matched == 2
