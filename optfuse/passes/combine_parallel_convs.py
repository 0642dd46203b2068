"""Combine the layers that read one tensor into one layer and a split.

    [conv(x, W1, b1), conv(x, W2, b2)]  =  split(conv(x, [W1; W2], [b1; b2]))
    [x @ W1, x @ W2]                    =  split(x @ [W1, W2])
    [W1 @ x, W2 @ x]                    =  split([W1; W2] @ x)

with weights and biases stacked along what they give out, in graph order; a bias that is missing
beside one that is not counts as zeros. A layer is a convolution, transposed or not, a linear layer
(query, key and value of an attention), a matrix product with a constant (`matmul`, `mm`, `bmm`), or
an `einsum` of a tensor and a constant, which capturing leaves as it is. An activation that follows
all of them with equal settings moves in front of the split:

    [f(conv1(x)), f(conv2(x))]  =  split(f(conv12(x)))      f elementwise

Why: one large layer fills the device better than several small ones, and reads x once. The price is
the split, which some engines copy; `elide_concat` removes it where it meets a concat.

Guards (those of TVM's CombineParallelConv2D, and constants): same tensor, kernel, stride, padding
and dilation, so that all results have one shape but for the channels; of a product, constants of
one shape but for what is stacked; one group, and a 1x1 kernel unless `any_kernel` is on; nothing in
the graph writes to the tensor they read. The dtypes are equal because that tensor is the same.

Not all that meet these guards have to be combined. One stays apart whose weight or bias is not a
constant (stacking would cost a copy in every run), or whose result the graph writes to. And
convolutions are combined only with those that end alike, in equal activations or in none: what
follows a convolution is fused into it, and nothing is fused behind a split, so that {conv + relu}
and {conv} in one would leave a convolution, a split and a relu, and apart leave two operators.
Likewise apart stay a PReLU, whose slopes belong to the channels of one, and an activation on a sum,
unless a later convolution in the sum takes that in. Nothing is fused into linear layers and
products, so these are combined whatever follows them, as are the two layers of a gated unit,
silu(linear1(x)) * linear2(x).

Groups cost something, hence the option `grouped`. Each group's channels have to lie side by side,
so stacking interleaves those of the layers, and every result is gathered from all groups:

    conv1(x)  =  flatten(split(unflatten(conv12(x)))[0])

which copies it. Depthwise convolutions would no longer be depthwise, for which engines have kernels
of their own, so there x is copied instead, and the results lie as they should:

    [depthwise(x, W1), depthwise(x, W2)]  =  split(depthwise(cat(x, x), [W1; W2]))

Neither is a clear gain. In eager PyTorch and in ONNX Runtime on one CPU core, two to four grouped
convolutions of 8 input and 2 to 8 output channels a group took 0.1 to 1.1 times as long in the
first form; two or three depthwise ones took 0.4 to 2.0 times as long in the second, and 0.5 to 3.3
times in the first.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from optfuse.activations import activation_of
from optfuse.conv_act import CONV_ACT, convolution_within
from optfuse.convolution import Convolution, convolution_of
from optfuse.graph import (
    Edit,
    arguments,
    constant_of,
    describe,
    is_call,
    kind,
    sole_user,
    value,
    written_memory,
)
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten

_ACTIVATIONS = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.celu.default,
    aten.selu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.sigmoid.default,
    aten.log_sigmoid.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.softplus.default,
    aten.tanh.default,
)
"""Elementwise, whether they are fused later or not."""
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)


# Layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What layers on one tensor must have in common.

    Attributes:
        what: their name in the plural.
        form: what else tells two kinds of layer apart: of a product, where its constant stands and
            the sizes that are not stacked; of a depthwise convolution, the channels a group.
        kernel: one number a spatial dimension; none for what is no convolution.
        depthwise: each group reads one channel, and there are several.
    """

    what: str
    form: tuple[object, ...] = ()
    kernel: tuple[int | str, ...] = ()
    groups: int = 1
    depthwise: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | None = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    @property
    def family(self) -> Hashable:
        """What tells two kinds of layer apart, rather than two settings of one kind."""
        return self.what, self.form, self.kernel, self.groups

    @property
    def blocks(self) -> int:
        """How many runs of channels each layer has in the combined result."""
        return 1 if self.depthwise else self.groups

    def difference(self, other: Settings) -> str | None:
        """The first setting in which the two differ."""
        return next(
            (
                name.replace("_", " ")
                for name in ("stride", "padding", "dilation", "output_padding")
                if getattr(self, name) != getattr(other, name)
            ),
            None,
        )


@dataclass(frozen=True)
class Layer:
    """One call that can be stacked on others like it.

    Attributes:
        node: the call.
        x: the tensor that the others read too.
        weight, bias: its other operands; bias is None where it has none.
        settings: see there.
        stacked: the dimension of the weight that holds what the layer gives out.
        blocks: how many runs of it the weight holds there, which stacking interleaves.
        dim: the dimension of the result that holds it, counted from the front.
        size: how much that is.
        unit, called: what it is counted in, and the name of the weight.
        fused: an activation, perhaps on a sum, is a part of the call.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    settings: Settings
    stacked: int
    dim: int
    size: int
    blocks: int = 1
    unit: str = "channels"
    called: str = "weight"
    fused: bool = False


def _layers_of(node: fx.Node) -> Iterator[Layer]:
    """The layer that `node` is; two for a product of which either operand may be the constant."""
    # One that is fused is too late to combine, and still explains itself.
    convolution = convolution_of(node) or convolution_within(node)
    if convolution is not None:
        yield _convolution_layer(convolution)
    elif is_call(node, *_PRODUCTS):
        for weight in range(2):
            yield from _product_layers(node, weight)
    elif is_call(node, aten.einsum.default):
        for weight in range(2):
            yield from _einsum_layers(node, weight)


def _convolution_layer(convolution: Convolution) -> Layer:
    shape, groups = value(convolution.weight).shape, convolution.groups
    transposed = convolution.transposed
    depthwise = groups > 1 and _sizes(shape)[0 if transposed else 1] == (
        groups if transposed else 1
    )
    channels = shape[1] * groups if transposed else shape[0]
    settings = Settings(
        what=_what(convolution),
        form=_sizes([channels // groups]) if depthwise else (),
        kernel=_sizes(shape[2:]),
        groups=groups,
        depthwise=depthwise,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        output_padding=convolution.output_padding,
    )
    # A transposed weight is (in, out/groups, *k): it has no channels of two groups in a row.
    return Layer(
        convolution.node,
        convolution.x,
        convolution.weight,
        convolution.bias,
        settings,
        stacked=1 if transposed and not depthwise else 0,
        dim=value(convolution.node).dim() + convolution.channel_dim,
        size=channels,
        blocks=1 if transposed else settings.blocks,
        fused=is_call(convolution.node, CONV_ACT),
    )


def _what(convolution: Convolution) -> str:
    if convolution.linear:
        return "linear layers"
    return "transposed convolutions" if convolution.transposed else "convolutions"


def _product_layers(node: fx.Node, weight: int) -> Iterator[Layer]:
    """The product as a layer with its operand `weight` as the constant: W @ x or x @ W."""
    operands = list(arguments(node).values())
    constant, x = operands[weight], operands[1 - weight]
    rank = value(constant).dim()
    # A vector has nothing to stack: its result has a dimension less.
    if rank > 1 and x.op != "get_attr":
        rows = weight == 0
        stacked = rank - 2 if rows else rank - 1
        # W @ x gives a row of W one number where x is a vector.
        behind = 1 if rows and value(x).dim() > 1 else 0
        yield _product(node, x, constant, (weight,), stacked, value(node).dim() - 1 - behind)


def _einsum_layers(node: fx.Node, weight: int) -> Iterator[Layer]:
    """The einsum as a layer with its operand `weight` as the constant.

    Stacked along the first index of the result that the constant has and x has not; the others'
    sizes are a part of the settings.
    """
    bound = arguments(node)
    terms, arrow, result = bound["equation"].replace(" ", "").partition("->")
    if not arrow or len(bound["tensors"]) != 2:
        return
    constant, x = bound["tensors"][weight], bound["tensors"][1 - weight]
    own, other = (terms.split(",")[index] for index in (weight, 1 - weight))
    free = [index for index in result if index in own and index not in other]
    if not free or "." in own or len(set(own)) < len(own) or x.op == "get_attr":
        return
    before, _, after = result.partition("...")
    if free[0] in before:
        dim = before.index(free[0])
    else:
        dim = value(node).dim() - len(after) + after.index(free[0])
    form = (weight, terms, result)
    yield _product(node, x, constant, form, own.index(free[0]), dim, f"entries of {free[0]}")


def _product(
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    form: tuple[object, ...],
    stacked: int,
    dim: int,
    unit: str = "",
) -> Layer:
    sizes = _sizes(value(weight).shape)
    others = (*sizes[:stacked], *sizes[stacked + 1 :])
    return Layer(
        node,
        x,
        weight,
        None,
        Settings("einsums" if unit else "matrix products", (*form, others)),
        stacked=stacked,
        dim=dim,
        size=value(weight).shape[stacked],
        unit=unit or ("rows" if form == (0,) else "columns"),
        called="other operand",
    )


def _sizes(shape: Iterable[int | torch.SymInt]) -> tuple[int | str, ...]:
    """Sizes that can be compared without fixing one that was left open, by their names if need
    be."""
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


# What follows them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """What follows a layer and nothing else reads.

    Attributes:
        key: equal for what is the same behind two layers; None for nothing.
        name: as a user reads it.
        nodes: the operators that can move in front of a split; none where they cannot.
    """

    key: Hashable
    name: str
    nodes: tuple[fx.Node, ...] = ()

    @property
    def kind(self) -> str:
        """The activation without its numbers."""
        return kind(self.nodes[-1]) if len(self.nodes) == 1 else self.name


_NOTHING = Ending(None, "no activation")


def _ending_of(layer: Layer) -> Ending:
    """What follows a convolution that would be fused into it, or is."""
    if layer.fused:
        bound = arguments(layer.node)
        name = bound["activation"]
        if bound["residual"] is not None:
            return Ending(layer.node, f"{name} of a sum")
        alone = layer.node if bound["slope"] is not None else (name, tuple(bound["scalars"]))
        return Ending(alone, _called(name, bound["scalars"]))
    return _activation_behind(layer.node) or _sum_behind(layer.node) or _NOTHING


def _activation_behind(node: fx.Node) -> Ending | None:
    for user in node.users:
        found = activation_of(user)
        if found is None or found[1].source is not node:
            continue
        name, reading = found
        nodes = (*reading.between, user)
        if any(set(inner.users) - set(nodes) for inner in (node, *reading.between)):
            continue
        if reading.slope is not None:
            return Ending(node, name)
        return Ending((name, reading.scalars), _called(name, reading.scalars), nodes)
    alone = sole_user(node)
    # With more inputs than this one, e.g. a computed limit, it could not be moved forward.
    if alone is None or not is_call(alone, *_ACTIVATIONS) or alone.all_input_nodes != [node]:
        return None
    return Ending((alone.target, *list(arguments(alone).values())[1:]), kind(alone), (alone,))


def _sum_behind(node: fx.Node) -> Ending | None:
    """An activation on a sum that the convolution would take in."""
    add = sole_user(node)
    if add is None or not is_call(add, aten.add.Tensor):
        return None
    bound = arguments(add)
    other = bound["self"] if bound["other"] is node else bound["other"]
    if not isinstance(other, fx.Node) or other is node or bound["alpha"] != 1:
        return None
    given, taken = value(node), value(other)
    if given.dtype != taken.dtype or _sizes(given.shape) != _sizes(taken.shape):
        return None
    # Of two convolutions the later one takes in the other's result.
    convolution = convolution_of(other)
    if convolution and not convolution.linear and other > node and sole_user(other) is add:
        return None
    behind = _activation_behind(add)
    if behind is None or (behind.nodes and activation_of(behind.nodes[-1]) is None):
        return None
    return Ending(node, f"{behind.name} of a sum")


def _called(name: str, scalars: Iterable[float]) -> str:
    numbers = ", ".join(f"{number:g}" for number in scalars)
    return f"{name}({numbers})" if numbers else name


def _shared_ending(nodes: Iterable[fx.Node]) -> tuple[Ending, ...]:
    """The activation behind each of the nodes, if all have one that can be moved and all are equal,
    else nothing."""
    endings = [_activation_behind(node) or _NOTHING for node in nodes]
    alike = all(ending.nodes and ending.key == endings[0].key for ending in endings)
    return tuple(endings) if alike else ()


# The pass -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Layers that belong together.

    Attributes:
        nodes: their calls, in graph order.
        apart: how many others of their settings are on the same tensor and not among them.
    """

    nodes: tuple[fx.Node, ...]
    apart: int


@dataclass(frozen=True)
class Member:
    """One layer of a group.

    Attributes:
        weight, bias: the constants as they are held; bias is None where it has none.
        result: what the split gives back: the layer's result, or that of the activation behind it.
    """

    layer: Layer
    weight: torch.Tensor
    bias: torch.Tensor | None
    result: fx.Node

    @property
    def held_as(self) -> tuple[object, object]:
        """The names of its constants; members of equal names have equal constants."""
        bias = self.layer.bias
        return self.layer.weight.target, bias.target if bias is not None else None


@dataclass(frozen=True, kw_only=True)
class Combine(Match):
    """Layers that become one, in graph order.

    Attributes:
        activation: the operators of the activation behind the first of them, which equals the
            others; none where there is none or they differ.
    """

    members: tuple[Member, ...]
    activation: tuple[fx.Node, ...]


class CombineParallelConvs(Pass):
    """[conv(x, W1), conv(x, W2)] = split(conv(x, [W1; W2])); see the module."""

    name = "combine_parallel_convs"
    equation = "[conv(x, W1, b1), conv(x, W2, b2)]  =  split(conv(x, [W1; W2], [b1; b2]))"
    OPTIONS = {
        "any_kernel": "combine convolutions of any kernel size, not just 1x1",
        "grouped": "combine grouped and depthwise convolutions too, at the price of copies",
    }

    def __init__(self, options: frozenset[str] = frozenset()) -> None:
        super().__init__(options)
        self._groups: dict[fx.Node, Group] = {}
        self._refusals: dict[fx.Node, Refusal] = {}
        self._combined: dict[Hashable, tuple[fx.Node, fx.Node | None]] = {}
        self._written: frozenset[fx.Node] = frozenset()

    def begin(self, graph: fx.Graph) -> None:
        """Find the groups: who belongs together shows only where the whole graph is seen."""
        self._groups, self._refusals, self._combined = {}, {}, {}
        self._written = written_memory(graph)
        by_tensor: dict[fx.Node, list[Layer]] = {}
        for node in graph.nodes:
            for layer in _layers_of(node):
                if value(layer.weight).is_floating_point():
                    by_tensor.setdefault(layer.x, []).append(layer)
        for parallel in by_tensor.values():
            if len(parallel) > 1:
                self._sort(parallel)

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at every layer; the first of a group stands for all of it."""
        group = self._groups.get(node)
        return self._refusals.get(node) if group is None else _match_group(group)

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """One layer, the activation, and a split into what the members gave."""
        assert isinstance(match, Combine)
        layers = [member.layer for member in match.members]
        result = _call_stacked(edit, layers, *self._constants(edit, match.members))
        made = {layers[0].node: result}
        for node in match.activation:
            made[node] = _call_again(edit, node, made)
        parts = _split(edit, layers, made[match.activation[-1]] if match.activation else result)
        return {member.result: part for member, part in zip(match.members, parts, strict=True)}

    def _sort(self, parallel: Sequence[Layer]) -> None:
        """Sort the layers of one tensor into groups and refusals."""
        alike: dict[Settings, list[Layer]] = {}
        for layer in parallel:
            alike.setdefault(layer.settings, []).append(layer)
        for settings, layers in alike.items():
            if len(layers) > 1:
                self._divide(settings, layers)
        self._refuse_lone(alike)

    def _divide(self, settings: Settings, layers: Sequence[Layer]) -> None:
        """Find the groups among layers of one tensor and of the same settings."""
        reasons = {layer.node: self._why_apart(layer) for layer in layers}
        able = [layer for layer in layers if reasons[layer.node] is None]
        parts = _by_ending(able)
        nearest = max(parts, key=len, default=able)
        not_at_all = self._why_not(settings, len(nearest) - 1)
        if not_at_all is not None:
            if len(nearest) > 1:
                self._refuse(nearest[0], not_at_all)
            return
        for layer in layers:
            reason = reasons[layer.node]
            if reason is not None:
                apart = f", so it stays apart from {_beside(nearest[0])}" if nearest else ""
                self._refuse(layer, reason + apart)
        for part in parts:
            free = tuple(layer.node for layer in part if not layer.fused)
            if len(free) > 1:
                self._groups[free[0]] = Group(free, len(layers) - len(free))
            elif len(part) > 1:
                fused = next(layer for layer in part if layer.fused)
                self._refuse(fused, f"its {_ending_of(fused).name} is fused into it already")
            elif part is not nearest:
                self._refuse(part[0], _why_not_with(part[0], nearest[0]))

    def _refuse(self, layer: Layer, reason: str) -> None:
        self._refusals[layer.node] = Refusal(reason)

    def _why_not(self, settings: Settings, others: int) -> str | None:
        """Why layers with these settings are not combined with each other."""
        obstacles = _obstacles(settings)
        missing = [option for option in obstacles if option not in self.options]
        if not missing:
            return None
        options = f"option{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        return (
            f"{' and '.join(obstacles[option] for option in missing)} (the {options} would combine "
            f"it with {others} more on the same tensor)"
        )

    def _why_apart(self, layer: Layer) -> str | None:
        """Why this layer is not combined with others of the same settings, whatever they are."""
        if constant_of(layer.weight) is None:
            return f"its {layer.called} is not a constant"
        if layer.bias is not None and constant_of(layer.bias) is None:
            return "its bias is not a constant"
        if layer.x in self._written:
            return "the model writes to the tensor that it reads"
        return "the model writes to its result" if layer.node in self._written else None

    def _refuse_lone(self, alike: Mapping[Settings, Sequence[Layer]]) -> None:
        """Say of a layer without a partner what parts it from the first of its kind."""
        first: dict[Hashable, Layer] = {}
        for settings, layers in alike.items():
            nearest = first.setdefault(settings.family, layers[0])
            difference = settings.difference(nearest.settings)
            if len(layers) == 1 and difference and self._why_not(settings, 0) is None:
                self._refuse(layers[0], f"its {difference} is not that of {_beside(nearest)}")

    def _constants(self, edit: Edit, members: Sequence[Member]) -> tuple[fx.Node, fx.Node | None]:
        """The stacked weight and bias, made once for layers that run on several tensors (the head
        of a detector on its levels)."""
        first = members[0].layer
        blocks = first.settings.blocks
        key = (first.stacked, first.blocks, blocks, *(member.held_as for member in members))
        if key not in self._combined:
            name, dtype = f"{first.weight.target}_combined", value(first.weight).dtype
            weights = [member.weight.double() for member in members]
            weight = edit.constant(name, _stack(weights, first.stacked, first.blocks), dtype)
            biases = _biases(members)
            bias = (
                edit.constant(f"{name}_bias", _stack(biases, 0, blocks), dtype) if biases else None
            )
            self._combined[key] = weight, bias
        return self._combined[key]


def _obstacles(settings: Settings) -> dict[str, str]:
    """The options that layers with these settings are combined with only, and why."""
    obstacles = {}
    if any(size != 1 for size in settings.kernel):
        kernel = "x".join(map(str, settings.kernel))
        obstacles["any_kernel"] = f"its kernel is {kernel}, not 1x1"
    if settings.groups != 1:
        obstacles["grouped"] = f"it has {settings.groups} groups, not one"
    return obstacles


def _by_ending(layers: Iterable[Layer]) -> list[list[Layer]]:
    """The layers that may be combined with each other, going by what would be fused into them."""
    parts: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        key = _ending_of(layer).key if layer.settings.kernel else None
        parts.setdefault(key, []).append(layer)
    return list(parts.values())


def _why_not_with(layer: Layer, other: Layer) -> str:
    return (
        f"{_ending_of(layer).name} follows it and {_ending_of(other).name} follows "
        f"{_beside(other)}; behind a split that would not be fused"
    )


def _beside(layer: Layer) -> str:
    return f"{describe(layer.node)} on the same tensor"


def _match_group(group: Group) -> Combine:
    # What the group read may have been replaced since `begin`, so nothing is taken from there.
    endings = _shared_ending(group.nodes)
    results = [ending.nodes[-1] for ending in endings] or group.nodes
    members = tuple(map(_member, group.nodes, results))
    first = members[0].layer
    size = sum(member.layer.size for member in members)
    behind = f", and the {endings[0].kind} behind them" if endings else ""
    stay = f"; {group.apart} more on the same tensor stay{'s' * (group.apart == 1)} apart"
    inner = [node for ending in endings for node in ending.nodes]
    return Combine(
        nodes=(*group.nodes, *inner),
        anchor=0,
        note=f"{len(members)} {first.settings.what} into one of {size} {first.unit}{behind}"
        f"{stay if group.apart else ''}",
        options=frozenset(_obstacles(first.settings)),
        members=members,
        activation=endings[0].nodes if endings else (),
    )


def _member(node: fx.Node, result: fx.Node) -> Member:
    layer = next(layer for layer in _layers_of(node) if constant_of(layer.weight) is not None)
    weight = constant_of(layer.weight)
    assert weight is not None
    return Member(layer, weight, constant_of(layer.bias), result)


def _stack(parts: Iterable[torch.Tensor], dim: int, blocks: int) -> torch.Tensor:
    """The tensors behind each other along `dim`, each of `blocks` blocks beside its like."""
    blocked = [
        part.reshape(*part.shape[:dim], blocks, part.shape[dim] // blocks, *part.shape[dim + 1 :])
        for part in parts
    ]
    return torch.cat(blocked, dim + 1).flatten(dim, dim + 1)


def _biases(members: Sequence[Member]) -> list[torch.Tensor]:
    """The members' biases, zeros where one is missing; none where all are."""
    if all(member.bias is None for member in members):
        return []
    return [
        member.weight.new_zeros(member.layer.size, dtype=torch.float64)
        if member.bias is None
        else member.bias.double()
        for member in members
    ]


def _call_stacked(
    edit: Edit, layers: Sequence[Layer], weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    first = layers[0]
    if convolution_of(first.node) is None:
        return _call_again(edit, first.node, {first.weight: weight})
    given = arguments(first.node) | {"weight": weight, "bias": bias}
    if first.settings.depthwise:
        given["input"] = edit.call(aten.cat.default, [first.x] * len(layers), first.dim)
        given["groups"] *= len(layers)
    assert callable(first.node.target)
    return edit.call(first.node.target, *given.values())


def _call_again(edit: Edit, node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: instead.get(each, each))
    assert callable(node.target)
    return edit.call(node.target, *args, **kwargs)


def _split(edit: Edit, layers: Sequence[Layer], result: fx.Node) -> list[fx.Node]:
    """What each layer gave, cut out of the combined result."""
    dim, blocks = layers[0].dim, layers[0].settings.blocks
    sizes = [layer.size // blocks for layer in layers]
    if blocks > 1:
        result = edit.call(aten.unflatten.int, result, dim, [blocks, sum(sizes)])
    split = edit.call(aten.split_with_sizes.default, result, sizes, dim + 1 if blocks > 1 else dim)
    parts = [edit.call(operator.getitem, split, index) for index in range(len(layers))]
    if blocks == 1:
        return parts
    return [edit.call(aten.flatten.using_ints, part, dim, dim + 1) for part in parts]
