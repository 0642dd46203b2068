"""Route channels from where they are computed to where they are read, without moving them between.

    conv(P x, W)  =  conv(x, W P)          P conv(x, W, b)  =  conv(x, P W, P b)

with a permutation P of channels: the columns of a weight take any order in, its rows give any order
out. Concat, split, slice, flip, an index, a channel shuffle spelt as view, transpose and view: all
of these move channels and compute nothing, so what stands between two operators that compute is
described by what it comes to, channel c of this tensor is channel d of that one, and is built anew:

1. Every tensor that is computed, or put together for somebody, gets an order of its channels
   (`optfuse.routing.flow` says which ones share one, `optfuse.routing.layouts` how it is chosen).
   Activations, pooling, batch norm and depthwise convolutions pass an order on, their constants
   put in it too. So a shuffle is carried through whole blocks until a weight absorbs it.
2. Whoever reads channels of several tensors gets one concat of the fewest runs of them. Runs are
   cut by one split a tensor where they make up all of it, else by slices.
3. Whoever needs the model's own order gets that: by a concat of runs, or a gather where it would
   take many.

In ShuffleNet V2 each unit reads some channels of all units before it. The halves that the units
only pass on are not copied from unit to unit any more, and no transpose is left.

Guards: the new operators write no more numbers than the old ones, and are not more, and less in one
of the two (views count as nothing, cuts as copies, which they are in an engine); the number of
channels is known; what reads or computes a tensor in another order has constants for weights, one
group, or each group's channels in a place of its own; indices are constants; the model writes to
none of the memory. A constant is never written, it may be shared: the reordered one is new.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.conv_act import convolution_within
from optfuse.convolution import Convolution, convolution_of
from optfuse.graph import Edit, arguments, constant_of, value
from optfuse.passes import Match, Pass, Refusal
from optfuse.routing.absorbers import Layer, reordered_weight
from optfuse.routing.assemblies import (
    Assembly,
    Cost,
    Part,
    cost_of,
    splits_of,
    with_those_inside,
)
from optfuse.routing.channels import Array, copies
from optfuse.routing.flow import (
    Component,
    Delivery,
    Flow,
    Use,
    cost_of_moving,
    in_order,
    shuffle_in,
)

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Reordered:
    """A constant whose channels are put in another order.

    Attributes:
        node: it.
        data: what it holds.
        dim: the dimension that holds one number a channel.
    """

    node: fx.Node
    data: torch.Tensor
    dim: int


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """An operator that is called again with its channels in another order.

    Attributes:
        node: the old call.
        operands: its operands, by role -> what it is given instead.
        constants: those with one number a channel of its result.
        outputs: which channel stands where in its result.
        layer: what it is if it has a weight, with the weight, and which channel stands where in
            what that reads.
    """

    node: fx.Node
    operands: Mapping[tuple[str, fx.Node], fx.Node | Assembly]
    constants: tuple[Reordered, ...]
    outputs: torch.Tensor
    layer: Layer | None = None
    weight: torch.Tensor | None = None
    inputs: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What is written in front of one old node.

    Attributes:
        node: the old node.
        behind: the operators that moved its channels, are replaced, and that no step before names.
        rebuilt: its new version, if it gets one.
        made: tensors that are put together here.
        equal: what stands for the old node from now on, if anything does: its new version
            (itself), another tensor, or one that is put together.
    """

    node: fx.Node
    behind: tuple[fx.Node, ...]
    rebuilt: Rebuilt | None
    made: tuple[Assembly, ...]
    equal: fx.Node | Assembly | None


@dataclass(frozen=True, kw_only=True)
class Reroute(Match):
    """A part of the graph whose channels are routed anew.

    Attributes:
        steps: what is written, in graph order.
        splits: tensors that one split cuts into these runs.
    """

    steps: tuple[Step, ...]
    splits: Mapping[fx.Node, tuple[tuple[int, int], ...]]


class RouteChannels(Pass):
    """conv(P x, W) = conv(x, W P), so that channels need not be moved; see the module."""

    name = "route_channels"
    equation = "conv(P x, W)  =  conv(x, W P);  P conv(x, W, b)  =  conv(x, P W, P b)"

    def __init__(self, options: frozenset[str] = frozenset()) -> None:
        super().__init__(options)
        self._found: dict[fx.Node, Match | Refusal] = {}

    def begin(self, graph: fx.Graph) -> None:
        """Decide for the whole graph: where channels come from shows only there."""
        self._found = {}
        if any(copies(node) for node in graph.nodes):
            self._found = _Plan(graph).outcomes()

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at every node; the first that moves something stands for its part of the graph."""
        return self._found.get(node)

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The same results, with channels put together where they are read."""
        assert isinstance(match, Reroute)
        return _Writer(edit, match).write()


def _layer_of(node: fx.Node) -> Layer | None:
    """The layer that a node calls, fused with an activation or not."""
    convolution = convolution_of(node)
    if convolution is not None:
        return Layer(convolution)
    convolution = convolution_within(node)
    if convolution is None:
        return None
    bound = arguments(node)
    return Layer(convolution, bound["residual"], bound["slope"])


# What to do ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Change:
    """A component that is worth routing anew, or several that have a node in common.

    Attributes:
        before, after: what moving its channels costs.
        moving: the operators that go.
        given: what each use of its tensors is given.
    """

    before: Cost
    after: Cost
    moving: list[fx.Node]
    given: dict[Use, Delivery]

    def add(self, other: _Change) -> None:
        """Take in another one."""
        self.before, self.after = self.before + other.before, self.after + other.after
        self.moving += other.moving
        self.given |= other.given


class _Plan:
    """What is done, and what is refused, in one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._numbers = {node: number for number, node in enumerate(graph.nodes)}
        self._flow = Flow(graph, _layer_of)
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node in self._flow.placements:
            self._members.setdefault(self._flow.part_of(node), []).append(node)
        self._refusals = {node: Refusal(why) for node, why in self._flow.blocked.items()}
        changes: list[_Change] = []
        for component in self._flow.components():
            change = self._decide(component)
            changes += [] if change is None else [change]
        self._changing = {self._flow.part_of(change.moving[0]) for change in changes}
        self._changes = self._united(changes)

    def outcomes(self) -> dict[fx.Node, Match | Refusal]:
        """For each place the match or the refusal."""
        matches = [self._match(change) for change in self._changes]
        return {**self._refusals, **{match.nodes[match.anchor]: match for match in matches}}

    def _decide(self, component: Component) -> _Change | None:
        given = self._flow.deliveries(component)
        before = sum((cost_of_moving(node) for node in component.moving), Cost())
        after = cost_of(with_those_inside(delivery.tensor for delivery in given.values()))
        if after.below(before):
            return _Change(before, after, list(component.moving), given)
        shuffle = shuffle_in(component)
        if shuffle is not None or after.numbers < before.numbers:
            place = shuffle or next(node for node in component.moving if copies(node))
            held_up = [use.why for use, delivery in given.items() if delivery.rearranged]
            self._refusals[place] = Refusal(
                f"to put its channels where they are read would take {_said(after)}, against "
                f"{_said(before)} now" + (f", since {held_up[0]}" if held_up else "")
            )
        return None

    def _united(self, changes: Sequence[_Change]) -> list[_Change]:
        """The changes, made one where one of them replaces what another one reads or replaces."""
        replacing: dict[fx.Node, list[int]] = {}
        touching: list[set[fx.Node]] = []
        for number, change in enumerate(changes):
            rebuilt = self._rebuilt(change)
            for node in (*change.moving, *rebuilt):
                replacing.setdefault(node, []).append(number)
            touching.append(set().union(*map(_named_by, self._steps(change, rebuilt))))
        roots = list(range(len(changes)))
        for number, touched in enumerate(touching):
            for node in touched:
                for other in replacing.get(node, ()):
                    roots[_root(roots, other)] = _root(roots, number)
        united: dict[int, _Change] = {}
        for number, change in enumerate(changes):
            root = _root(roots, number)
            if root in united:
                united[root].add(change)
            else:
                united[root] = change
        return list(united.values())

    def _match(self, change: _Change) -> Reroute:
        rebuilt = self._rebuilt(change)
        steps = self._steps(change, rebuilt)
        assemblies = with_those_inside(delivery.tensor for delivery in change.given.values())
        layers = sum(each.layer is not None for each in rebuilt.values())
        plural = "" if layers == 1 else "s"
        reordered = f", {layers} layer{plural} reordered" if layers else ""
        nodes = sorted({*change.moving, *rebuilt}, key=self._numbers.__getitem__)
        return Reroute(
            nodes=tuple(nodes),
            anchor=next(i for i, node in enumerate(nodes) if copies(node)),
            note=f"from {_said(change.before)} to {_said(change.after)}{reordered}",
            steps=steps,
            splits=splits_of(assemblies),
        )

    def _rebuilt(self, change: _Change) -> dict[fx.Node, Rebuilt]:
        """The operators that read or give channels in another order than before."""
        uses: dict[fx.Node, list[Use]] = {}
        for use in change.given:
            uses.setdefault(use.user, []).append(use)
        found: dict[fx.Node, Rebuilt] = {}
        parts = {self._flow.part_of(node) for node in change.moving}
        members = {node for part in parts for node in self._members.get(part, ())}
        for node in sorted({*members, *uses}, key=self._numbers.__getitem__):
            outputs = self._outputs(node)
            read = uses.get(node, [])
            if not in_order(outputs) or not all(change.given[use].as_it_is for use in read):
                found[node] = _rebuild(node, read, change.given, outputs, self._flow)
        return found

    def _outputs(self, node: fx.Node) -> Array:
        """Which channel is to stand where in what a node gives."""
        sequence = self._flow.sequence(node)
        if sequence is None:
            return np.arange(0)
        changes = self._flow.part_of(node) in self._changing
        return sequence if changes else np.arange(len(sequence))

    def _steps(self, change: _Change, rebuilt: Mapping[fx.Node, Rebuilt]) -> tuple[Step, ...]:
        read: dict[fx.Node, list[Use]] = {}
        for use in change.given:
            read.setdefault(use.operand, []).append(use)
        moving = set(change.moving)
        unnamed = set(moving)
        steps = (
            Step(
                node=node,
                behind=_taken_behind(node, unnamed),
                rebuilt=rebuilt.get(node),
                # What a node that stays is made into can stand only behind it: its user makes it.
                made=tuple(
                    with_those_inside(change.given[use].tensor for use in read.get(node, ()))
                    if node in moving
                    else ()
                ),
                equal=_equal(node, read.get(node, ()), change.given, rebuilt),
            )
            for node in sorted({*read, *rebuilt}, key=self._numbers.__getitem__)
        )
        return tuple(step for step in steps if step.rebuilt or step.made or step.equal)


def _named_by(step: Step) -> set[fx.Node]:
    """The nodes of the graph that a step reads or replaces."""
    tensors: list[fx.Node | Assembly | None] = [*step.made, step.equal]
    named = {step.node}
    if step.rebuilt is not None:
        tensors += step.rebuilt.operands.values()
        named.update(step.node.all_input_nodes)
    made = with_those_inside(each for each in tensors if each is not None)
    tensors += [part.source for assembly in made for part in assembly.parts]
    return named | {each for each in tensors if isinstance(each, fx.Node)}


def _root(roots: list[int], number: int) -> int:
    """The number that stands for the group of this one."""
    while roots[number] != number:
        roots[number] = number = roots[roots[number]]
    return number


def _said(cost: Cost) -> str:
    if cost.operators == 0:
        return "none"
    operators = (
        "1 operator that moves" if cost.operators == 1 else f"{cost.operators} operators that move"
    )
    return f"{operators} {cost.numbers:,} numbers"


def _taken_behind(node: fx.Node, moving: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The operators that moved what `node` holds to it, taken out of `moving`.

    What moves channels on for several places counts for the first of them: a channel may pass
    through all units of a network, and each of its places would name all of them again.
    """
    found = []
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in moving:
            moving.remove(each)
            found.append(each)
            waiting += each.all_input_nodes
    return tuple(found)


def _equal(
    node: fx.Node,
    read: Iterable[Use],
    given: Mapping[Use, Delivery],
    rebuilt: Mapping[fx.Node, Rebuilt],
) -> fx.Node | Assembly | None:
    """What stands for a node where it is read as it was."""
    as_it_is = [use for use in read if given[use].as_it_is and use.user not in rebuilt]
    # What an output of the model is given may be a copy, which serves the others too.
    returned = [use for use in as_it_is if use.user.op == "output"]
    if node in rebuilt and in_order(rebuilt[node].outputs.numpy()) and not returned:
        return node
    if not as_it_is:
        return None
    tensor = given[(returned or as_it_is)[0]].tensor
    return None if tensor is node and node not in rebuilt else tensor


def _rebuild(
    node: fx.Node,
    read: Iterable[Use],
    given: Mapping[Use, Delivery],
    outputs: Array,
    flow: Flow,
) -> Rebuilt:
    """How an operator is called again."""
    operands = {(use.role, use.operand): given[use].tensor for use in read}
    layer = _layer_of(node)
    if layer is None:
        constants = flow.constants.get(node, {})
        reordered = tuple(_reordered(each, dim) for each, dim in constants.items())
        return Rebuilt(node, operands, reordered, torch.from_numpy(outputs))
    weight = constant_of(layer.convolution.weight)
    assert weight is not None, "a layer whose weight is no constant is not called again"
    per_channel = [layer.convolution.bias, layer.slope]
    inputs = [given[use].sequence for use in read if use.role == "x"]
    return Rebuilt(
        node,
        operands,
        tuple(_reordered(each, 0) for each in per_channel if each and value(each).numel() > 1),
        torch.from_numpy(outputs),
        layer,
        weight,
        torch.from_numpy(inputs[0] if inputs else np.arange(layer.convolution.in_channels)),
    )


def _reordered(node: fx.Node, dim: int) -> Reordered:
    data = constant_of(node)
    assert data is not None, "an operator whose constants are none is not called again"
    return Reordered(node, data, dim)


# Writing it ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Writer:
    """Writes one match into the graph; what several places need is written once."""

    edit: Edit
    match: Reroute
    _rebuilt: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _made: dict[Assembly, fx.Node] = field(default_factory=dict)
    _parts: dict[Part, fx.Node] = field(default_factory=dict)
    _splits: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _constants: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    def write(self) -> dict[fx.Node, fx.Node]:
        """Everything, and which new node stands for which old one."""
        became: dict[fx.Node, fx.Node] = {}
        for step in self.match.steps:
            self.edit.before(step.node, (step.node, *step.behind))
            if step.rebuilt is not None:
                self._rebuilt[step.node] = self._call_again(step.rebuilt)
            for assembly in step.made:
                self._tensor(assembly)
            if step.equal is not None:
                became[step.node] = self._tensor(step.equal)
                gone = {*self.match.nodes}
                if any(user.target in _VIEWS and user not in gone for user in step.node.users):
                    became[step.node] = self._in_memory_like(became[step.node], step.node)
        return became

    def _tensor(self, tensor: fx.Node | Assembly) -> fx.Node:
        if isinstance(tensor, fx.Node):
            return self._rebuilt.get(tensor, tensor)
        if tensor not in self._made:
            self._made[tensor] = self._put_together(tensor)
        return self._made[tensor]

    def _put_together(self, assembly: Assembly) -> fx.Node:
        first = assembly.parts[0]
        if len(assembly.parts) == 1 and first.whole:
            return self.edit.call(aten.clone.default, self._tensor(first.source))
        parts = [self._part(part, assembly.dim) for part in assembly.parts]
        return (
            parts[0] if len(parts) == 1 else self.edit.call(aten.cat.default, parts, assembly.dim)
        )

    def _part(self, part: Part, dim: int) -> fx.Node:
        if part not in self._parts:
            self._parts[part] = self._cut(part, dim)
        return self._parts[part]

    def _cut(self, part: Part, dim: int) -> fx.Node:
        source = self._tensor(part.source)
        if part.whole:
            return source
        if part.run is None:
            indices = torch.tensor(part.indices, device=value(source).device)
            constant = self.edit.constant("route_channels_index", indices, torch.int64)
            return self.edit.call(aten.index_select.default, source, dim, constant)
        runs = self.match.splits.get(part.source) if isinstance(part.source, fx.Node) else None
        if runs is None:
            return self.edit.call(aten.slice.Tensor, source, dim, *part.run)
        if source not in self._splits:
            sizes = [stop - start for start, stop in runs]
            self._splits[source] = self.edit.call(aten.split_with_sizes.default, source, sizes, dim)
        return self.edit.call(operator.getitem, self._splits[source], runs.index(part.run))

    def _call_again(self, rebuilt: Rebuilt) -> fx.Node:
        if rebuilt.layer is not None:
            return self._call_layer(rebuilt, rebuilt.layer)
        node = rebuilt.node
        assert callable(node.target)
        operands = {operand: tensor for (_, operand), tensor in rebuilt.operands.items()}
        became = {old: self._tensor(new) for old, new in operands.items()}
        if node.target in _VIEWS:
            became = {old: self._in_memory_like(new, old) for old, new in became.items()}
        for constant in rebuilt.constants:
            became[constant.node] = self._per_channel(constant, rebuilt.outputs)
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda old: became.get(old) or self._tensor(old)
        )
        return self.edit.call(node.target, *args, **kwargs)

    def _call_layer(self, rebuilt: Rebuilt, layer: Layer) -> fx.Node:
        new = {role: self._tensor(tensor) for (role, _), tensor in rebuilt.operands.items()}
        became = {each.node: self._per_channel(each, rebuilt.outputs) for each in rebuilt.constants}
        convolution = layer.convolution
        args = list(
            replace(convolution, x=new.get("x", convolution.x)).with_constants(
                self._weight(rebuilt, convolution),
                convolution.bias and became.get(convolution.bias, convolution.bias),
            )
        )
        fused = {layer.residual: new.get("residual"), layer.slope: became.get(layer.slope)}  # type: ignore[arg-type]
        args[3:] = [fused.get(arg) or arg if isinstance(arg, fx.Node) else arg for arg in args[3:]]
        target = convolution.node.target
        assert callable(target)
        return self.edit.call(target, *args, **convolution.node.kwargs)

    def _weight(self, rebuilt: Rebuilt, convolution: Convolution) -> fx.Node:
        inputs, outputs = rebuilt.inputs, rebuilt.outputs
        assert inputs is not None
        assert rebuilt.weight is not None
        if in_order(inputs.numpy()) and in_order(outputs.numpy()):
            return convolution.weight
        key = (
            convolution.weight.target,
            (convolution.groups, convolution.transposed),
            *map(bytes, (inputs.numpy(), outputs.numpy())),
        )
        if key not in self._constants:
            self._constants[key] = self.edit.constant(
                f"{convolution.weight.target}_routed",
                reordered_weight(convolution, rebuilt.weight.double(), inputs, outputs),
                value(convolution.weight).dtype,
            )
        return self._constants[key]

    def _per_channel(self, constant: Reordered, outputs: torch.Tensor) -> fx.Node:
        """A constant with its channels in another order."""
        if in_order(outputs.numpy()):
            return constant.node
        key = (constant.node.target, constant.dim, bytes(outputs.numpy()))
        if key not in self._constants:
            data = constant.data.double() if constant.data.is_floating_point() else constant.data
            self._constants[key] = self.edit.constant(
                f"{constant.node.target}_routed",
                data.index_select(constant.dim, outputs.to(data.device)),
                value(constant.node).dtype,
            )
        return self._constants[key]

    def _in_memory_like(self, new: fx.Node, old: fx.Node) -> fx.Node:
        """The same tensor such that a view takes it, which may need the old one's strides."""
        pairs = zip(value(new).stride(), value(old).stride(), strict=True)
        if all(statically_known_true(one == other) for one, other in pairs):
            return new
        return self.edit.call(aten.clone.default, new, memory_format=torch.contiguous_format)
