"""Push scales and shifts through linear operators into the weights that they end up at.

    f(linear(x, W, b)) * s + t     =  f(linear(x, s W, s b + t))     f moves elements, or averages
    linear(f(s x + t), W, b)       =  linear(f(x), W s, b + W t)
    (a @ b) * s                    =  (a s) @ b                      and on into what made a, or b
    linear(norm(x) * g + t, W, b)  =  linear(norm(x), W g, b + W t)  layer, group and RMS norm

1. A `mul`, `div`, `add`, `sub` or batch norm by constants, upwards: through views, permutes,
   selections and splits (the query of an attention, cut out of one linear layer), pooling, means,
   resampling and padding, to the convolution or linear layer that made the tensor. Where the
   layer's other channels go elsewhere, only its own are scaled.
2. A scale that is one number also goes through what is linear in several operands: into a factor
   of a matrix product or of a `mul` (attention scores, a gate), into all terms of a sum or concat.
   It may end in a constant operand.
3. The same as 1 and 2 downwards: to all layers that read it through at least one operator.
4. The weight and bias of a layer, group or RMS norm, downwards, also where nothing is in between.

Each of 1 to 3 takes away one operator and adds none. Case 4 keeps the norm and takes away its
constants, and where an engine calculates them on their own, a multiplication and an addition. What
stands directly behind or in front of a layer is `fold_conv_bn`'s and `fold_affine_input`'s.

Guards. Nothing else sees what changes its value. A channel gets one number wherever it stands. A
shift meets no padding with zeros, no sum and no product. No cast and no other shape; constants that
their dtype holds well; no weight that is computed, or that an embedding is tied to. The model does
not write to that memory, and a view of the result finds the same layout in memory as before.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.convolution import (
    ARITHMETIC,
    BATCH_NORM,
    Affine,
    Convolution,
    arithmetic_affine,
    batch_norm_affine,
    convolution_of,
)
from optfuse.folding import Folded, FoldedLayers, fold_input, fold_output, why_not_held
from optfuse.graph import (
    Edit,
    arguments,
    constant_of,
    describe,
    is_call,
    kind,
    sole_user,
    value,
    why_not_sole_user,
    written_memory,
)
from optfuse.lanes import (
    Lanes,
    channels_along,
    channels_in,
    followed,
    lanes_along,
    passage,
    per_channel,
)
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten

REACH = 64
"""How many operators a number is pushed through at most, so that a sweep stays linear."""

_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
_PRODUCTS: Mapping[Any, tuple[int, ...]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0, 1),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
}
"""Operators that are linear in each of these operands, and where those stand."""
_SUMS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
_SUMS_WITH_PRODUCT = (aten.addmm.default, aten.baddbmm.default)
_NORMS: Mapping[Any, int] = {
    aten.layer_norm.default: -1,
    aten.rms_norm.default: -1,
    aten.group_norm.default: 1,
}
"""Norms with a weight and a bias of one number a channel, and the dimension of the channels."""


@dataclass(frozen=True)
class Change:
    """y -> factor * y + addend, in float64 and in shapes that broadcast to y; None adds nothing."""

    factor: torch.Tensor
    addend: torch.Tensor | None = None

    @property
    def one_number(self) -> bool:
        """Whether it multiplies everything with the same number and does nothing else."""
        return self.addend is None and self.factor.numel() == 1


@dataclass(frozen=True)
class Start:
    """What is pushed away.

    Attributes:
        node: the call.
        result: what it gives: the call, or what is picked from it.
        source: what takes the result's place; None for a norm, which stays without its constants.
        change: what `node` does to `source`; None for a norm.
        affine: what is done to each channel, shape (channels,), or to all, shape (1,); None where
            the numbers vary along several dimensions.
        lanes: which channel each element of the result belongs to; None for one number for all.
    """

    node: fx.Node
    result: fx.Node
    source: fx.Node | None
    change: Change | None
    affine: Affine | None
    lanes: torch.Tensor | None


@dataclass(frozen=True)
class Operand:
    """A constant operand with another number or tensor (in float64) in its place."""

    user: fx.Node
    position: int
    replacement: torch.Tensor | float


@dataclass(frozen=True)
class Plan:
    """What a number ends up in.

    Attributes:
        layers: layers with other constants.
        operands: other constant operands.
        between: operators that are called again on what changes.
        same: those calls and layers whose value stays.
    """

    layers: tuple[Folded, ...] = ()
    operands: tuple[Operand, ...] = ()
    between: tuple[fx.Node, ...] = ()
    same: tuple[fx.Node, ...] = ()

    def __add__(self, other: Plan) -> Plan:
        return Plan(
            self.layers + other.layers,
            self.operands + other.operands,
            self.between + other.between,
            self.same + other.same,
        )

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        """Every call that is made again."""
        return (*self.between, *(folded.convolution.node for folded in self.layers))


Outcome = Plan | str | None
"""A plan; or why there is none, as a clause; or None where nothing looked like one."""


@dataclass(frozen=True, kw_only=True)
class Push(Match):
    """A scale, a shift or a norm's constants that go elsewhere."""

    start: Start
    plan: Plan


class FoldLinearChain(Pass):
    """f(linear(x, W)) * s = f(linear(x, s W)), and in the other direction; see the module."""

    name = "fold_linear_chain"
    equation = (
        "f(linear(x, W)) * s  =  f(linear(x, s W));  "
        "linear(f(s * x + t), W, b)  =  linear(f(x), W s, b + W t)   (f linear; also layer norm)"
    )

    def begin(self, graph: fx.Graph) -> None:
        """Find the memory that the graph writes to, and the weights that not only layers read."""
        self._written = written_memory(graph)
        self._layers = FoldedLayers(graph)

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the scale, the shift or the norm."""
        start = _start(node)
        if start is None:
            return None
        search = _Search(self._layers)
        above, below = search.above(start), None
        if not isinstance(above, Plan):
            below = search.below(start)
        plan = next((each for each in (above, below) if isinstance(each, Plan)), above or below)
        if plan is None or isinstance(plan, str):
            return None if plan is None else Refusal(plan)
        reason = self._why_not(start, plan)
        if reason is not None:
            return Refusal(reason)
        if plan is above:
            plan = plan + Plan(same=(start.result,))
        return Push(
            nodes=tuple(dict.fromkeys((start.node, start.result, *plan.calls))),
            anchor=0,
            note=f"{_what(start)} folded into {_names(plan)}",
            start=start,
            plan=plan,
        )

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The same calls from the layers on, with other constants and without the scale."""
        assert isinstance(match, Push)
        start, plan = match.start, match.plan
        folded = {each.convolution.node: each for each in plan.layers}
        new: dict[fx.Node, fx.Node] = {}
        for node in sorted({start.node, *plan.calls}):
            if node is start.node:
                source = start.source
                plain = _plain(edit, node) if source is None else new.get(source, source)
                new[start.result] = plain
            elif node in folded:
                x = folded[node].convolution.x
                new[node] = self._layers.call(edit, folded[node], new.get(x, x), (node, start.node))
            else:
                new[node] = self._again(edit, node, match, new)
        return {old: new[old] for old in plan.same}

    def _again(
        self, edit: Edit, node: fx.Node, match: Push, new: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        """The same call on what has changed."""
        edit.before(node, (node, match.start.node))
        given, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: new.get(each, each))
        args = list(given)
        for operand in match.plan.operands:
            if operand.user is node:
                args[operand.position] = self._operand(edit, operand)
        assert callable(node.target)
        return edit.call(node.target, *args, **kwargs)

    def _operand(self, edit: Edit, operand: Operand) -> fx.Node | float:
        if not isinstance(operand.replacement, torch.Tensor):
            return operand.replacement
        old = operand.user.args[operand.position]
        assert isinstance(old, fx.Node)
        # A number may be held in a narrower dtype than what it is multiplied with.
        name, dtype = f"{old.target}_scaled", value(operand.user).dtype
        return self._layers.constant(edit, name, operand.replacement, dtype, operand.user)

    def _why_not(self, start: Start, plan: Plan) -> str | None:
        if any(node in self._written for node in (start.source, start.result, *plan.calls)):
            return "the model writes to that memory"
        return _why_not_laid_out(start)


# Where it starts ----------------------------------------------------------------------------------


def _start(node: fx.Node) -> Start | None:
    if is_call(node, *_NORMS):
        return _norm(node)
    if is_call(node, BATCH_NORM):
        picked = sole_user(node)
        return None if picked is None else _batch_norm(node, picked)
    if not is_call(node, *ARITHMETIC):
        return None
    operands = node.args[:2]
    computed = [each for each in operands if isinstance(each, fx.Node) and each.op != "get_attr"]
    if len(computed) != 1 or (node.target in _DIVISIONS and operands[1] is computed[0]):
        return None
    return _arithmetic(node, computed[0], operands[1 - operands.index(computed[0])])


def _batch_norm(node: fx.Node, picked: fx.Node) -> Start | None:
    affine = batch_norm_affine(node)
    if isinstance(affine, str) or not is_call(picked, operator.getitem) or picked.args[1] != 0:
        return None
    lanes = lanes_along(value(picked), 1)
    source: fx.Node = arguments(node)["input"]
    return Start(node, picked, source, _change(affine, 1 - lanes.dim()), affine, lanes)


def _arithmetic(node: fx.Node, source: fx.Node, other: Any) -> Start | None:
    if not _alike(value(source), value(node)) or not value(node).is_floating_point():
        return None
    constant = _real_constant(other)
    if constant is None or constant.numel() == 0:
        return None
    varying = [dim for dim in range(-constant.dim(), 0) if constant.shape[dim] != 1]
    if len(varying) > 1:
        factor = 1 / constant.double() if node.target in _DIVISIONS else constant.double()
        change = Change(factor) if node.target in _SCALES else None
        return Start(node, node, source, change, None, None)
    dim = varying[0] if varying else -1
    affine = arithmetic_affine(node, source, dim, constant.numel())
    if not isinstance(affine, Affine):
        return None
    lanes = lanes_along(value(node), dim) if varying else None
    return Start(node, node, source, _change(affine, dim), affine, lanes)


def _change(affine: Affine, dim: int) -> Change:
    """What is done to each channel along `dim` (from the end), in a shape that broadcasts."""
    shape = [-1, *[1] * (-1 - dim)] if affine.scale.numel() > 1 else []
    shifts = bool((affine.shift != 0).any())
    return Change(affine.scale.reshape(shape), affine.shift.reshape(shape) if shifts else None)


def _real_constant(operand: Any) -> torch.Tensor | None:
    """A number, or a constant tensor of real numbers."""
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return torch.tensor(operand, dtype=torch.float64)
    constant = constant_of(operand)
    if constant is None or constant.is_complex() or constant.dtype is torch.bool:
        return None
    return constant


def _norm(node: fx.Node) -> Start | None:
    bound = arguments(node)
    if len(bound.get("normalized_shape", [1])) != 1:
        return None
    given = [bound["weight"], bound.get("bias")]
    constants = [constant_of(each) for each in given]
    # Without any there is nothing to fold, and a computed one is none of this pass's business.
    if all(each is None for each in given) or any(
        each is None for each, operand in zip(constants, given, strict=True) if operand is not None
    ):
        return None
    weight, bias = (None if each is None else each.double() for each in constants)
    like = weight if weight is not None else bias
    assert like is not None
    scale = torch.ones_like(like) if weight is None else weight
    shift = torch.zeros_like(like) if bias is None else bias
    lanes = lanes_along(value(node), _NORMS[node.target])
    return Start(node, node, None, None, Affine(scale, shift), lanes)


def _plain(edit: Edit, norm: fx.Node) -> fx.Node:
    """The norm without weight and bias."""
    bound = arguments(norm)
    bound.update({name: None for name in ("weight", "bias") if name in bound})
    edit.before(norm, (norm,))
    assert callable(norm.target)
    return edit.call(norm.target, *bound.values())


# Where it ends ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """Looks for the weights that a number can go into.

    Attributes:
        seen: nodes that it came down to. One that it comes to twice would be changed twice.
    """

    layers: FoldedLayers
    seen: set[fx.Node] = field(default_factory=set)

    def above(self, start: Start) -> Outcome:
        """The plan in which `source` comes out as what the result is."""
        if start.source is None or start.change is None or convolution_of(start.source) is not None:
            return None
        return _once(self._up(start.source, start.node, start.change, REACH))

    def below(self, start: Start) -> Outcome:
        """The plan in which everybody who reads the result reads `source` as well."""
        layers = [convolution_of(user) for user in start.result.users]
        directly = all(each is not None and each.x is start.result for each in layers)
        if start.affine is None or (directly and start.source is not None):
            return None
        return _once(self._down(start.result, start.affine, start.lanes, REACH))

    def _up(self, node: fx.Node, user: fx.Node, change: Change, room: int) -> Outcome:
        """The plan in which `user` finds `node` changed."""
        path: list[fx.Node] = []
        while (how := passage(node)) is not None and len(path) < room:
            if how == "scales" and change.addend is not None:
                return None
            path.append(node)
            node = node.args[0]  # type: ignore[assignment]
        layer = convolution_of(node)
        if layer is not None:
            return self._up_into(layer, path[::-1], user, change)
        if not change.one_number:
            return None
        # First, so that a tensor that is read twice is not searched twice.
        steps = pairwise([node, *path[::-1], user])
        reason = next(filter(None, (why_not_sole_user(*step) for step in steps)), None)
        if reason is not None:
            return reason if is_call(node, *_PRODUCTS) else None
        plan = self._up_through(node, change.factor, room - len(path) - 1)
        return plan + Plan(between=tuple(path)) if isinstance(plan, Plan) else plan

    def _up_into(
        self, layer: Convolution, path: Sequence[fx.Node], user: fx.Node, change: Change
    ) -> Outcome:
        """The plan in which the layer gives the channels that `path` leads to `user` changed, and
        those that go elsewhere as they are."""
        if constant_of(layer.weight) is None:
            return "the weight is not a constant"
        held: Lanes = lanes_along(value(layer.node), layer.channel_dim)
        lanes: Lanes | None = held
        elsewhere: list[tuple[fx.Node, Lanes]] = []
        for node, reader in pairwise([layer.node, *path, user]):
            for other in node.users:
                if other is reader:
                    continue
                aside = None if lanes is None else followed(other, lanes)
                if aside is None:
                    return why_not_sole_user(node, reader)
                elsewhere.append((other, aside))
            if reader is not user and lanes is not None:
                lanes = followed(reader, lanes)
                held = held if lanes is None else lanes
        mine = channels_in(held, layer.out_channels)
        for other, aside in elsewhere:
            if bool((mine & channels_in(aside, layer.out_channels)).any()):
                return f"{describe(other)} reads some of the same channels"
        affine = _of_channels(change, lanes, mine)
        if affine is None:
            return f"its constant does not have one number a channel of {describe(layer.node)}"
        plan = self._planned(fold_output(layer, affine))
        others = tuple(other for other, _ in elsewhere)
        return plan if isinstance(plan, str) else plan + Plan(between=(*path, *others), same=others)

    def _up_through(self, node: fx.Node, factor: torch.Tensor, room: int) -> Outcome:
        """The plan in which a sum or a product comes out as `factor` times what it is."""
        if node.op != "call_function" or room <= 0:
            return None
        outcome: Outcome = None
        if is_call(node, *_PRODUCTS):
            outcome = self._any_of(node, _PRODUCTS[node.target], factor, room)
        elif is_call(node, *_SUMS):
            outcome = _all_of(self._factor_of(node, each, factor, room) for each in (0, 1))
        elif is_call(node, *_SUMS_WITH_PRODUCT):
            product = self._any_of(node, (1, 2), factor, room)
            outcome = _all_of([self._factor_of(node, 0, factor, room), product])
        elif is_call(node, aten.cat.default):
            tensors = arguments(node)["tensors"]
            outcome = _all_of(self._up(each, node, Change(factor), room) for each in tensors)
        return outcome + Plan(between=(node,)) if isinstance(outcome, Plan) else outcome

    def _any_of(
        self, node: fx.Node, positions: Iterable[int], factor: torch.Tensor, room: int
    ) -> Outcome:
        """The plan in which one of these operands is `factor` times what it is: a constant, if
        there is one."""
        if node.target in _DIVISIONS and _real_constant(node.args[1]) is not None:
            return self._factor_of(node, 1, 1 / factor, room)
        found: Outcome = None
        for position in sorted(positions, key=lambda each: _real_constant(node.args[each]) is None):
            outcome = self._factor_of(node, position, factor, room)
            if isinstance(outcome, Plan):
                return outcome
            found = found or outcome
        return found

    def _factor_of(self, node: fx.Node, position: int, factor: torch.Tensor, room: int) -> Outcome:
        """The plan in which this operand of `node` is `factor` times what it is."""
        operand = node.args[position]
        constant = _real_constant(operand)
        if constant is not None and not isinstance(operand, fx.Node):
            return Plan(operands=(Operand(node, position, float(constant) * float(factor)),))
        if not isinstance(operand, fx.Node) or sum(each is operand for each in node.args) > 1:
            return None
        if constant is None:
            return self._up(operand, node, Change(factor), room)
        if not value(node).is_floating_point():
            return None
        # One number more hardly counts, but a table would have to be held twice.
        reason = why_not_sole_user(operand, node) if constant.numel() > 1 else None
        constant = constant.double() * factor.to(constant.device).reshape(())
        reason = reason or why_not_held("constant", constant, value(node).dtype)
        return reason or Plan(operands=(Operand(node, position, constant),))

    def _down(self, node: fx.Node, affine: Affine, lanes: Lanes | None, room: int) -> Outcome:
        """The plan in which all that read `node` find it without `affine`, and come to the same."""
        if room <= 0 or node in self.seen:
            return None
        self.seen.add(node)
        found = {each: self._down_to(node, each, affine, lanes, room) for each in node.users}
        outcome = _all_of(found.values())
        if outcome is None and any(found.values()):
            other = next(each for each, found_there in found.items() if found_there is None)
            if other.op == "output":
                return f"the result of {describe(node)} is also an output of the model"
            return f"{describe(other)} also reads the result of {describe(node)}"
        return outcome

    def _down_to(
        self, node: fx.Node, user: fx.Node, affine: Affine, lanes: Lanes | None, room: int
    ) -> Outcome:
        layer = convolution_of(user)
        if layer is not None:
            alone = layer.x is node and node not in (layer.weight, layer.bias)
            return self._down_into(layer, affine, lanes) if alone else None
        shifted = bool((affine.shift != 0).any())
        how = passage(user) if user.args[:1] == (node,) else None
        if how is not None:
            onwards = None if lanes is None else followed(user, lanes)
            if lanes is not None and onwards is None:
                return None
            outcome = self._down(user, affine, onwards, room - 1)
            if isinstance(outcome, Plan) and shifted and how == "scales":
                return f"{describe(user)} does not pass its shift on"
            return outcome + Plan(between=(user,)) if isinstance(outcome, Plan) else outcome
        positions = [each for each in _PRODUCTS.get(user.target, ()) if user.args[each] is node]
        if len(positions) != 1 or user.op != "call_function" or lanes is not None or shifted:
            return None
        outcome = self._down(user, affine, None, room - 1)
        if isinstance(outcome, Plan):
            return outcome + Plan(between=(user,))
        others = [each for each in _PRODUCTS[user.target] if each != positions[0]]
        beside = self._any_of(user, others, affine.scale.reshape(()), room - 1)
        if isinstance(beside, Plan):
            return beside + Plan(between=(user,), same=(user,))
        return outcome or beside

    def _down_into(self, layer: Convolution, affine: Affine, lanes: Lanes | None) -> Outcome:
        """The plan in which the layer takes what it is given without `affine`."""
        if constant_of(layer.weight) is None:
            return "the weight is not a constant"
        if lanes is None:
            size = layer.in_channels
            affine = Affine(affine.scale.expand(size), affine.shift.expand(size))
        else:
            assert not isinstance(lanes, tuple)
            numbers = channels_along(lanes, lanes.dim() + layer.channel_dim)
            if numbers is None:
                return f"{describe(layer.node)} has its channels in another dimension"
            numbers = numbers.to(affine.scale.device)
            affine = Affine(affine.scale[numbers], affine.shift[numbers])
        reason = layer.why_no_shift()
        if reason is not None and bool((affine.shift != 0).any()):
            return f"{describe(layer.node)} {reason}"
        plan = self._planned(fold_input(layer, affine))
        return plan if isinstance(plan, str) else plan + Plan(same=(layer.node,))

    def _planned(self, folded: Folded | str) -> Plan | str:
        reason = folded if isinstance(folded, str) else self.layers.why_held(folded)
        if reason is not None:
            return reason
        assert isinstance(folded, Folded)
        return Plan(layers=(folded,))


def _of_channels(change: Change, lanes: Lanes | None, mine: torch.Tensor) -> Affine | None:
    """The change as numbers for a layer's channels, of which those in `mine` are changed; None
    where it has several for one channel, or the channels could not be followed."""
    total = []
    for numbers, neutral in ((change.factor, 1.0), (change.addend, 0.0)):
        if numbers is None:
            numbers = torch.tensor(neutral, dtype=torch.float64)
        if numbers.numel() == 1:
            found: torch.Tensor | None = numbers.new_full(mine.shape, neutral)
            assert found is not None
            found[mine] = numbers.reshape(())
        elif isinstance(lanes, torch.Tensor):
            found = per_channel(lanes, numbers, len(mine), otherwise=neutral)
        else:
            found = None
        if found is None:
            return None
        total.append(found)
    return Affine(*total)


def _all_of(outcomes: Iterable[Outcome]) -> Outcome:
    """One plan out of all of them, or why one is none."""
    found = list(outcomes)
    plans = [each for each in found if isinstance(each, Plan)]
    if found and len(plans) == len(found):
        return sum(plans[1:], plans[0])
    return next((each for each in found if isinstance(each, str)), None)


def _once(outcome: Outcome) -> Outcome:
    """The plan, unless something in it would have to be called anew in two ways."""
    if not isinstance(outcome, Plan):
        return outcome
    twice = next((call for call, times in Counter(outcome.calls).items() if times > 1), None)
    return outcome if twice is None else f"{describe(twice)} leads to it in several ways"


def _alike(first: Any, second: Any) -> bool:
    """Whether dtype and shape are equal for every input; never specialises a dynamic size."""
    return (
        isinstance(first, torch.Tensor)
        and first.dtype == second.dtype
        and first.dim() == second.dim()
        and all(
            statically_known_true(one == other)
            for one, other in zip(first.shape, second.shape, strict=True)
        )
    )


def _why_not_laid_out(start: Start) -> str | None:
    """None where a view of the result can be one of `source`, else why not, as a clause."""
    if start.source is None:
        return None
    source, result = value(start.source), value(start.result)
    dims = zip(result.shape, source.stride(), result.stride(), strict=True)
    if all(
        statically_known_true(size == 1) or statically_known_true(one == other)
        for size, one, other in dims
    ):
        return None
    reader = next((each for each in start.result.users if _reads_layout(each)), None)
    if reader is None:
        return None
    return f"{describe(reader)} would find it laid out in memory in another way"


def _reads_layout(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return is_view or is_call(node, aten.clone.default, aten.reshape.default, aten._to_copy.default)


def _what(start: Start) -> str:
    if start.source is not None:
        return kind(start.node)
    bound = arguments(start.node)
    names = [name for name in ("weight", "bias") if bound.get(name) is not None]
    return f"the {' and '.join(names)} of {kind(start.node)}"


def _names(plan: Plan) -> str:
    *some, last = dict.fromkeys(
        [
            *(describe(folded.convolution.node) for folded in plan.layers),
            *(f"the constant of {describe(operand.user)}" for operand in plan.operands),
        ]
    )
    return f"{', '.join(some)} and {last}" if some else last
