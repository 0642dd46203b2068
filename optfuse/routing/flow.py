"""How channels flow through a graph: which tensors share an order, and who needs them in which.

Every node is one of these:

- it moves channels (`channels`): what it gives is known, and nobody needs the node itself;
- channels pass through it one by one (`carriers`), or through a depthwise convolution: its result
  has the layout of what it reads;
- it is a dense convolution or a linear layer with a constant weight, which takes any order and has
  a layout of its own; or a grouped one, which must find each group in a place of its own;
- or none of these: it needs everything as the model has it, and gives its result so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from optfuse.graph import describe, is_call, value, written_memory
from optfuse.routing.absorbers import Layer, why_fixed
from optfuse.routing.assemblies import FEW, Assembly, Cost, Part, assemble, numbers_in
from optfuse.routing.carriers import Carrier, carrier_of
from optfuse.routing.channels import (
    Array,
    Channels,
    copies,
    picks_computed,
    reorders,
    routed,
)
from optfuse.routing.dimensions import dimensions_wanted
from optfuse.routing.layouts import Bundle, Grouped, Layout, Placement, choose, join, places_of

ANY, ALIKE, GROUPED, AS_IS = "any", "alike", "grouped", "as it is"


@dataclass(frozen=True, eq=False)
class Held:
    """An operand as some tensor holds it: one of the graph, or a bundle.

    Attributes:
        tensor: that tensor.
        placement: where the operand's channels are in its layout.
    """

    tensor: fx.Node | Bundled
    placement: Placement


@dataclass(frozen=True, eq=False)
class Bundled:
    """A tensor that is put together from channels of tensors of the graph, along `dim`."""

    bundle: Bundle
    nodes: tuple[fx.Node, ...]
    ids: Array
    dim: int


@dataclass(frozen=True, eq=False)
class Use:
    """One operand of one operator.

    Attributes:
        user, operand: these.
        role: which of several operands it is, where that matters.
        need: in which order it takes its channels: in any; in that of its own result (`ALIKE`);
            with each group in its place (`GROUPED`); or as the model has them (`AS_IS`).
        held: the operand.
        why: for `AS_IS`, the reason as a clause.
    """

    user: fx.Node
    operand: fx.Node
    role: str
    need: str
    held: Held
    why: str = ""


@dataclass(frozen=True, eq=False)
class Delivery:
    """What a use is given.

    Attributes:
        tensor: that.
        sequence: which of the operand's channels stands where in it.
        rearranged: whether it had to be put in another order than was chosen for the operand.
    """

    tensor: fx.Node | Assembly
    sequence: Array
    rearranged: bool

    @property
    def as_it_is(self) -> bool:
        """Whether the channels stand as the model has them."""
        return in_order(self.sequence)


@dataclass(eq=False)
class Component:
    """A part of the graph through which channels only move or pass one by one.

    Attributes:
        moving: the operators that move channels and that nobody needs as they are.
        uses: what reads its tensors.
    """

    moving: list[fx.Node] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)


class Flow:
    """The flow of channels through one graph, with an order chosen for each tensor.

    Args:
        graph: the graph; it is not changed.
        layer_of: the layer that a node calls, or None.

    Attributes:
        placements: where the channels of each tensor that is computed are in its layout.
        constants: of operators that channels pass through, those with one number a channel, and
            in which of their dimensions.
        blocked: operators that would move channels, and the reason why they must stay.
    """

    def __init__(self, graph: fx.Graph, layer_of: Callable[[fx.Node], Layer | None]) -> None:
        self.placements: dict[fx.Node, Placement] = {}
        self.constants: dict[fx.Node, Mapping[fx.Node, int]] = {}
        self.blocked: dict[fx.Node, str] = {}
        self._layer_of = layer_of
        self._written = written_memory(graph)
        self._dims = dimensions_wanted(graph, layer_of)
        self._known: dict[fx.Node, Channels | tuple[Channels, ...]] = {}
        self._sources: list[fx.Node] = []
        self._starts: list[int] = [0]
        self._moving: list[fx.Node] = []
        self._kept: set[fx.Node] = set()
        self._layouts: list[Layout] = []
        self._held: dict[fx.Node, Held] = {}
        self._bundles: dict[bytes, Bundled] = {}
        self._grouped: dict[fx.Node, Grouped] = {}
        self._uses: list[Use] = []
        self._beside: dict[fx.Node, fx.Node] = {}
        self._returned: set[fx.Node] = set(graph.output_node().all_input_nodes)
        for node in graph.nodes:
            self._enter(node)
        choose(
            self._layouts,
            [each.bundle for each in self._bundles.values()],
            [use.held.placement for use in self._uses if use.need == AS_IS],
            self._grouped.values(),
        )

    def components(self) -> list[Component]:
        """The parts of the graph in which something is moved, in the order of their first move."""
        found: dict[fx.Node, Component] = {}
        for node in self._moving:
            if node not in self._kept:
                found.setdefault(self.part_of(node), Component()).moving.append(node)
        for use in self._uses:
            component = found.get(self.part_of(use.operand))
            if component is not None:
                component.uses.append(use)
        return list(found.values())

    def deliveries(self, component: Component) -> dict[Use, Delivery]:
        """What each use of a component's tensors is to be given."""
        found: dict[Use, Delivery] = {}
        returned: dict[fx.Node | Assembly, fx.Node] = {each: each for each in self._returned}
        for use in component.uses:
            own = use.held.placement.sequence()
            wanted = self._wanted(use, own)
            tensor = self._made(use.held)
            rearranged = not np.array_equal(own, wanted)
            if rearranged:
                tensor = self._rearranged(use.operand, use.held, tensor, wanted)
            if use.user.op == "output":
                dim = self._dim(use.operand)
                assert dim is not None
                while self._is_another(tensor, use.operand, returned):
                    tensor = Assembly((Part(tensor, len(own), tuple(range(len(own)))),), dim)
                returned[tensor] = use.operand
            found[use] = Delivery(tensor, wanted, rearranged)
        return found

    def sequence(self, node: fx.Node) -> Array | None:
        """Which channel of a tensor that is computed stands where; None if that is not known."""
        placement = self.placements.get(node)
        return None if placement is None else placement.sequence()

    # Walking through the graph

    def _enter(self, node: fx.Node) -> None:
        tensors = node.all_input_nodes
        if node.op == "output":
            self._take_as_is(node, tensors, "they are an output of the model")
        elif written := [each for each in (node, *tensors) if each in self._written]:
            reason = f"the model writes to the memory of {describe(written[-1])}"
            self._refuse(node, reason, blocks=copies(node))
        elif node.op == "call_function":
            self._call(node)
        else:
            self._begin(node, self._dims.get(node), fixed=True)

    def _call(self, node: fx.Node) -> None:
        found = routed(node, self._known)
        layer = self._layer_of(node)
        if isinstance(found, tuple) or (found is not None and found.in_place):
            self._move(node, found)
        elif layer is not None:
            self._compute(node, layer)
        elif is_call(node, operator.getitem) and self._picks_channels(*node.args):
            (several,) = node.all_input_nodes
            self._put_beside(node, several)
            self._begin_like(node, self.placements[several], 1)
        elif (carrier := carrier_of(node, self._dim)) is not None:
            self._carry(node, carrier)
        elif found is not None:
            self._move(node, found)
        elif picks_computed(node):
            self._refuse(node, f"the index of {describe(node)} is not a constant", blocks=True)
        else:
            self._refuse(node, f"{describe(node)} is not known to treat its channels alike")

    def _move(self, node: fx.Node, found: Channels | tuple[Channels, ...]) -> None:
        self._known[node] = found
        self._moving.append(node)
        for operand in node.all_input_nodes:
            if operand in self._known and operand.op != "get_attr":
                self._put_beside(node, operand)

    def _carry(self, node: fx.Node, carrier: Carrier) -> None:
        first, *others = carrier.operands
        placement = self._hold(first).placement
        for other in others:
            join(placement, self._hold(other).placement)
        for operand in dict.fromkeys(carrier.operands):
            self._use(node, operand, ALIKE, why=f"{describe(node)} needs all in one order")
            self._put_beside(node, operand)
        self.constants[node] = carrier.constants
        rest = set(node.all_input_nodes) - {*carrier.operands, *carrier.constants}
        self._take_as_is(node, rest, f"{describe(node)} computes along them")
        self._begin_like(node, placement, carrier.dim)

    def _picks_channels(self, several: object, index: object) -> bool:
        """Whether it is the result of a batch norm; the other two have no channels."""
        return isinstance(several, fx.Node) and several in self.placements and index == 0

    def _compute(self, node: fx.Node, layer: Layer) -> None:
        convolution = layer.convolution
        dim = value(node).dim() + convolution.channel_dim
        reason = why_fixed(layer)
        x_dim = value(convolution.x).dim() + convolution.channel_dim
        if reason is None and self._dim(convolution.x) != x_dim:
            reason = f"{describe(node)} reads them mixed with other dimensions"
        if reason is None and layer.residual is not None and self._dim(layer.residual) != dim:
            reason = f"{describe(node)} adds them mixed with other dimensions"
        if reason is not None:
            self._refuse(node, reason, dim=dim)
            return
        groups, x = convolution.groups, self._hold(convolution.x)
        if groups == convolution.out_channels == len(x.placement.slots) > 1:
            self._use(node, convolution.x, ALIKE, role="x")
            self._put_beside(node, convolution.x)
            self._begin_like(node, x.placement, dim)
        elif groups == 1:
            self._use(node, convolution.x, ANY, role="x")
            self._begin(node, dim)
        else:
            self._use(
                node, convolution.x, GROUPED, role="x", why=f"{describe(node)} has {groups} groups"
            )
            self._put_beside(node, convolution.x)
            self._begin(node, dim, groups=groups)
            self._grouped[node] = Grouped(groups, x.placement, self.placements[node])
        if layer.residual is not None:
            join(self.placements[node], self._hold(layer.residual).placement)
            why = f"{describe(node)} needs all in one order"
            self._use(node, layer.residual, ALIKE, role="residual", why=why)
            self._put_beside(node, layer.residual)

    def _refuse(
        self, node: fx.Node, why: str, *, blocks: bool = False, dim: int | None = None
    ) -> None:
        """It takes and gives its channels as the model has them.

        Args:
            blocks: whether it would be routed around if it were not for this reason.
        """
        if blocks and any(operand in self._known for operand in node.all_input_nodes):
            self.blocked[node] = why
        self._take_as_is(node, node.all_input_nodes, why)
        self._begin(node, self._dims.get(node) if dim is None else dim, fixed=True)

    def _take_as_is(self, node: fx.Node, operands: Iterable[fx.Node], why: str) -> None:
        waiting = [(node, operand) for operand in operands]
        while waiting:
            user, operand = waiting.pop()
            known = self._known.get(operand)
            if isinstance(known, Channels) and known.in_place:
                self._use(user, operand, AS_IS, why=why)
            elif known is not None and operand not in self._kept:
                # Its channels are nowhere in one dimension: it stays, and so it must find its own
                # operands as they are.
                self._kept.add(operand)
                waiting += [(operand, each) for each in operand.all_input_nodes]

    def _use(
        self, user: fx.Node, operand: fx.Node, need: str, *, role: str = "", why: str = ""
    ) -> None:
        self._uses.append(Use(user, operand, role, need, self._hold(operand), why))

    def _dim(self, node: fx.Node) -> int | None:
        """The dimension that holds a tensor's channels, None where that is not known."""
        known = self._known.get(node)
        return known.dim if isinstance(known, Channels) and known.in_place else None

    # Layouts

    def _begin(
        self, node: fx.Node, dim: int | None, *, fixed: bool = False, groups: int = 1
    ) -> None:
        """A tensor with a layout of its own."""
        tensor = value(node) if "val" in node.meta else None
        if dim is None or not isinstance(tensor, torch.Tensor) or not 0 <= dim < tensor.dim():
            return
        channels = tensor.shape[dim]
        if isinstance(channels, int) and channels > 0:
            self._layouts.append(Layout(channels, fixed, groups))
            self._begin_like(node, Placement(self._layouts[-1], np.arange(channels)), dim)

    def _begin_like(self, node: fx.Node, placement: Placement, dim: int) -> None:
        """A tensor that is computed, with the layout of another one."""
        self.placements[node] = placement
        if isinstance(value(node), torch.Tensor):
            start = self._starts[-1]
            stop = start + len(placement.slots)
            self._known[node] = Channels.of(np.arange(start, stop), dim, value(node).shape)
            self._sources.append(node)
            self._starts.append(stop)

    def _origins(self, ids: Array) -> tuple[list[fx.Node], Array, Array]:
        """The tensors that channels come from, and for each channel which, and which there."""
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        which, sources = np.unique(numbers, return_inverse=True)
        channels = ids - np.asarray(self._starts)[numbers]
        return [self._sources[number] for number in which], sources, channels

    def _hold(self, operand: fx.Node) -> Held:
        """The tensor that holds exactly the channels of an operand, in whichever order."""
        if operand not in self._held:
            self._held[operand] = self._find(operand)
        return self._held[operand]

    def _find(self, operand: fx.Node) -> Held:
        if operand in self.placements:
            return Held(operand, self.placements[operand])
        known = self._known[operand]
        assert isinstance(known, Channels)
        ids = known.order
        nodes, sources, channels = self._origins(ids)
        placement = self.placements[nodes[0]]
        if len(nodes) == 1 and np.array_equal(np.sort(channels), np.arange(len(placement.slots))):
            return Held(nodes[0], Placement(placement.layout, placement.slots[channels]))
        key = np.sort(ids).tobytes()
        if key not in self._bundles:
            self._layouts.append(Layout(len(ids)))
            own = Placement(self._layouts[-1], np.arange(len(ids)))
            tensors = tuple(self.placements[node] for node in nodes)
            bundle = Bundle(own, tensors, sources, channels)
            self._bundles[key] = Bundled(bundle, tuple(nodes), ids, known.dim)
        bundled = self._bundles[key]
        slots = np.empty(len(ids), np.int64)
        slots[np.argsort(ids, kind="stable")] = np.argsort(bundled.ids, kind="stable")
        return Held(bundled, Placement(bundled.bundle.placement.layout, slots))

    # What uses are given

    def _wanted(self, use: Use, own: Array) -> Array:
        """Which channel of its operand a use wants where."""
        if use.need == AS_IS:
            return np.arange(len(own))
        if use.need == ALIKE:
            return self.placements[use.user].sequence()
        if use.need == GROUPED and not self._grouped[use.user].fits():
            grouped = self._grouped[use.user]
            places = places_of(grouped.outputs.sequence(), grouped.groups)
            assert places is not None, "a grouped convolution's results keep their groups together"
            return np.arange(len(own)).reshape(grouped.groups, -1)[places].reshape(-1)
        return own

    def _made(self, held: Held) -> fx.Node | Assembly:
        """The tensor that holds an operand, in the order that was chosen for it."""
        if isinstance(held.tensor, fx.Node):
            return held.tensor
        bundled = held.tensor
        sequence = bundled.bundle.placement.sequence()
        positions = bundled.bundle.positions()[sequence]
        return assemble(bundled.nodes, bundled.bundle.sources[sequence], positions, bundled.dim)

    def _rearranged(
        self, operand: fx.Node, held: Held, made: fx.Node | Assembly, wanted: Array
    ) -> fx.Node | Assembly:
        """An operand in another order: put together at once if that takes hardly more pieces, or
        else gathered from the tensor that holds it."""
        known = self._known[operand]
        assert isinstance(known, Channels)
        nodes, sources, channels = self._origins(known.order[wanted])
        positions = np.empty(len(wanted), np.int64)
        for number, node in enumerate(nodes):
            here = sources == number
            positions[here] = self.placements[node].positions()[channels[here]]
        at_once = assemble(nodes, sources, positions, known.dim)
        indices = held.placement.positions()[wanted]
        part = Part(made, len(held.placement.slots), tuple(indices.tolist()))
        gathered = Assembly((part,), known.dim)
        if isinstance(at_once, fx.Node):
            return at_once
        few = FEW + (len(made.parts) if isinstance(made, Assembly) else 1)
        return at_once if len(at_once.parts) <= few else gathered

    @staticmethod
    def _is_another(
        tensor: fx.Node | Assembly, operand: fx.Node, returned: Mapping[fx.Node | Assembly, fx.Node]
    ) -> bool:
        """Whether what is to be an output of the model is already another one, or an input or a
        parameter of it: ONNX cannot say that without renaming one of them."""
        if returned.get(tensor, operand) is not operand:
            return True
        return (
            isinstance(tensor, fx.Node) and tensor is not operand and tensor.op != "call_function"
        )

    # Components

    def part_of(self, node: fx.Node) -> fx.Node:
        """A node that stands for the part of the graph through which channels pass to this one."""
        while (above := self._beside.get(node, node)) is not node:
            self._beside[node] = self._beside.get(above, above)
            node = above
        return node

    def _put_beside(self, node: fx.Node, other: fx.Node) -> None:
        self._beside[self.part_of(node)] = self.part_of(other)


def in_order(sequence: Array) -> bool:
    """Whether channel i stands at place i."""
    return bool((sequence == np.arange(len(sequence))).all())


def cost_of_moving(node: fx.Node) -> Cost:
    """What an operator costs that moves channels: nothing for a view, or a copy of one."""
    if not copies(node):
        return Cost()
    results = value(node)
    if isinstance(results, torch.Tensor):
        return Cost(numbers_in(results), 1)
    used = {user.args[1] for user in node.users if is_call(user, operator.getitem)}
    return Cost(sum(numbers_in(results[index]) for index in used), 1)


def shuffle_in(component: Component) -> fx.Node | None:
    """The first operator in it that can change the order of channels."""
    return next((node for node in component.moving if reorders(node)), None)
