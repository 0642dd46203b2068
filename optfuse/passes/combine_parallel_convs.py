"""Combine the convolutions that read one tensor into one convolution and a split.

    [conv(x, W1, b1), conv(x, W2, b2)]  =  split(conv(x, [W1; W2], [b1; b2]))

with weights and biases stacked along the output channels, in graph order; a bias that is missing
beside one that is not counts as zeros. Parallel linear layers (query, key and value of an
attention) likewise. An activation that follows all of them with equal settings moves in front of
the split:

    [f(conv1(x)), f(conv2(x))]  =  split(f(conv12(x)))      f elementwise

Why: one large convolution fills the device better than several small ones, and reads x once. The
price is the split, which some engines copy; `elide_concat` removes it where it meets a concat.

Guards (those of TVM's CombineParallelConv2D, and constants): same tensor, kernel, stride, padding
and dilation, so that all results have one shape but for the channels; one group; not transposed;
constant weights and biases; a 1x1 kernel unless `any_kernel` is on. The dtypes are equal because
the tensor they read is the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from optfuse.convolution import Convolution, convolution_of
from optfuse.graph import Edit, arguments, constant_of, describe, is_call, kind, sole_user, value
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


@dataclass(frozen=True)
class Settings:
    """What convolutions on one tensor must have in common; `kernel` has a number a dimension."""

    linear: bool
    transposed: bool
    kernel: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | None
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def family(self) -> tuple[bool, bool, tuple[int, ...], int]:
        """What tells two kinds of convolution apart, rather than two settings of one kind."""
        return self.linear, self.transposed, self.kernel, self.groups

    @property
    def pointwise(self) -> bool:
        """Whether it looks at one point at a time: a 1x1 kernel, or a linear layer."""
        return all(size == 1 for size in self.kernel)

    def difference(self, other: Settings) -> str | None:
        """The first setting in which the two differ."""
        return next(
            (
                name
                for name in ("stride", "padding", "dilation")
                if getattr(self, name) != getattr(other, name)
            ),
            None,
        )


@dataclass(frozen=True)
class Member:
    """One convolution of a group.

    Attributes:
        weight, bias: the constants as they are held; bias is None where it has none.
        result: what the split gives back: the convolution, or the activation behind it.
    """

    convolution: Convolution
    weight: torch.Tensor
    bias: torch.Tensor | None
    result: fx.Node

    @property
    def held_as(self) -> tuple[object, object]:
        """The names of its constants; members of equal names have equal constants."""
        bias = self.convolution.bias
        return self.convolution.weight.target, bias.target if bias is not None else None


@dataclass(frozen=True, kw_only=True)
class Combine(Match):
    """Convolutions that become one, in graph order.

    Attributes:
        activation: one of the equal activations behind them, or None.
        dim: the dimension of the results that holds the channels.
    """

    members: tuple[Member, ...]
    activation: fx.Node | None
    dim: int


class CombineParallelConvs(Pass):
    """[conv(x, W1), conv(x, W2)] = split(conv(x, [W1; W2])); see the module."""

    name = "combine_parallel_convs"
    equation = "[conv(x, W1, b1), conv(x, W2, b2)]  =  split(conv(x, [W1; W2], [b1; b2]))"
    OPTIONS = {"any_kernel": "combine convolutions of any kernel size, not just 1x1"}

    def __init__(self, options: frozenset[str] = frozenset()) -> None:
        super().__init__(options)
        self._groups: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._refusals: dict[fx.Node, Refusal] = {}
        self._combined: dict[tuple[object, ...], tuple[fx.Node, fx.Node | None]] = {}

    def begin(self, graph: fx.Graph) -> None:
        """Find the groups: who belongs together shows only where the whole graph is seen."""
        self._groups, self._refusals, self._combined = {}, {}, {}
        by_tensor: dict[fx.Node, list[Convolution]] = {}
        for node in graph.nodes:
            convolution = convolution_of(node)
            if convolution is not None and value(convolution.weight).is_floating_point():
                by_tensor.setdefault(convolution.x, []).append(convolution)
        for parallel in by_tensor.values():
            if len(parallel) > 1:
                self._group(parallel)

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at every convolution; the first of a group stands for all of it."""
        group = self._groups.get(node)
        return self._refusals.get(node) if group is None else _match_group(group)

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """One convolution, the activation, and a split into what the members gave."""
        assert isinstance(match, Combine)
        first = match.members[0].convolution
        weight, bias = self._constants(edit, match.members)
        result = _call_like(edit, first.node, *first.with_constants(weight, bias))
        if match.activation is not None:
            result = _call_like(edit, match.activation, result, *match.activation.args[1:])
        sizes = [member.convolution.out_channels for member in match.members]
        split = edit.call(aten.split_with_sizes.default, result, sizes, match.dim)
        return {
            member.result: edit.call(operator.getitem, split, index)
            for index, member in enumerate(match.members)
        }

    def _group(self, parallel: Sequence[Convolution]) -> None:
        """Sort the convolutions of one tensor into groups and refusals."""
        alike: dict[Settings, list[Convolution]] = {}
        for convolution in parallel:
            alike.setdefault(_settings(convolution), []).append(convolution)
        for settings, members in alike.items():
            if len(members) == 1:
                continue
            reason = self._why_not(settings, len(members) - 1)
            if reason is not None:
                self._refusals[members[0].node] = Refusal(reason)
                continue
            constant = list(self._with_constants(members))
            if len(constant) > 1:
                self._groups[constant[0]] = tuple(constant)
        self._refuse_lone(alike)

    def _why_not(self, settings: Settings, others: int) -> str | None:
        """Why convolutions with these settings are not combined with each other."""
        if settings.transposed:
            return "it is a transposed convolution, and these are not combined"
        if settings.groups != 1:
            return f"it has {settings.groups} groups, and only convolutions of one are combined"
        if not settings.pointwise and "any_kernel" not in self.options:
            kernel = "x".join(map(str, settings.kernel))
            return (
                f"its kernel is {kernel}, not 1x1 (the option any_kernel would combine it with "
                f"{others} more on the same tensor)"
            )
        return None

    def _with_constants(self, members: Iterable[Convolution]) -> Iterator[fx.Node]:
        """The members whose weight and bias are constants; the others are refused."""
        for member in members:
            if constant_of(member.weight) is None:
                self._refusals[member.node] = Refusal("its weight is not a constant")
            elif member.bias is not None and constant_of(member.bias) is None:
                self._refusals[member.node] = Refusal("its bias is not a constant")
            else:
                yield member.node

    def _refuse_lone(self, alike: Mapping[Settings, Sequence[Convolution]]) -> None:
        """Say of a convolution without a partner what parts it from the first of its kind."""
        first: dict[object, Convolution] = {}
        for settings, members in alike.items():
            nearest = first.setdefault(settings.family, members[0])
            difference = settings.difference(_settings(nearest))
            if len(members) == 1 and difference and self._why_not(settings, 0) is None:
                self._refusals[members[0].node] = Refusal(
                    f"its {difference} is not that of {describe(nearest.node)} on the same tensor"
                )

    def _constants(self, edit: Edit, members: Sequence[Member]) -> tuple[fx.Node, fx.Node | None]:
        """The stacked weight and bias, made once for layers that run on several tensors (the head
        of a detector on its levels)."""
        key = tuple(member.held_as for member in members)
        if key not in self._combined:
            first = members[0].convolution.weight
            dtype = value(first).dtype
            weight = edit.constant(f"{first.target}_combined", _stacked_weight(members), dtype)
            stacked = _stacked_bias(members)
            self._combined[key] = (
                weight,
                None
                if stacked is None
                else edit.constant(f"{first.target}_combined_bias", stacked, dtype),
            )
        return self._combined[key]


def _settings(convolution: Convolution) -> Settings:
    return Settings(
        linear=convolution.linear,
        transposed=convolution.transposed,
        kernel=tuple(value(convolution.weight).shape[2:]),
        groups=convolution.groups,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
        output_padding=convolution.output_padding,
    )


def _match_group(group: Sequence[fx.Node]) -> Combine:
    # What the group read may have been replaced since `begin`, so nothing is taken from there.
    activations = _equal_activations(group)
    results = activations or group
    members = tuple(_member(node, result) for node, result in zip(group, results, strict=True))
    first = members[0].convolution
    channels = sum(member.convolution.out_channels for member in members)
    what = "linear layers" if first.linear else "convolutions"
    behind = f", and the {kind(activations[0])} behind them" if activations else ""
    return Combine(
        nodes=tuple(dict.fromkeys((*group, *results))),
        anchor=0,
        note=f"{len(members)} {what} into one of {channels} channels{behind}",
        members=members,
        activation=activations[0] if activations else None,
        dim=value(first.node).dim() + first.channel_dim,
    )


def _member(node: fx.Node, result: fx.Node) -> Member:
    convolution = convolution_of(node)
    assert convolution is not None
    weight = constant_of(convolution.weight)
    assert weight is not None
    return Member(convolution, weight, constant_of(convolution.bias), result)


def _equal_activations(group: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The activation behind each of the nodes, if all have one and all are equal, else nothing."""
    found: list[fx.Node] = []
    for node in group:
        user = sole_user(node)
        # With more inputs than this one, e.g. a computed limit, it could not be moved forward.
        if not is_call(user, *_ACTIVATIONS) or user is None or user.all_input_nodes != [node]:
            return ()
        if found and (user.target, _scalars(user)) != (found[0].target, _scalars(found[0])):
            return ()
        found.append(user)
    return tuple(found)


def _scalars(activation: fx.Node) -> tuple[object, ...]:
    return tuple(arguments(activation).values())[1:]


def _stacked_weight(members: Iterable[Member]) -> torch.Tensor:
    return torch.cat([member.weight.double() for member in members])


def _stacked_bias(members: Sequence[Member]) -> torch.Tensor | None:
    """The biases behind each other, or None where no member has one."""
    if all(member.bias is None for member in members):
        return None
    return torch.cat(
        [
            member.weight.new_zeros(member.convolution.out_channels, dtype=torch.float64)
            if member.bias is None
            else member.bias.double()
            for member in members
        ]
    )


def _call_like(edit: Edit, old: fx.Node, *args: object) -> fx.Node:
    assert callable(old.target)
    return edit.call(old.target, *args, **old.kwargs)
