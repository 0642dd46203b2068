"""Fold what scales and shifts a convolution's channels into its weight and bias.

    s * conv(x, W, b) + t  =  conv(x, s W, s b + t)         one s and one t an output channel

Batch norm in eval mode is such a pair: s = gamma / sqrt(var + eps), t = beta - s mean. So are
`mul`, `div`, `add` and `sub` with a constant that has one number a channel (frozen batch norm,
LayerScale). Three cases:

1. Convolution (1d, 2d, 3d, transposed, grouped) or linear layer, then batch norm.
2. The same, then a per-channel constant.
3. A `cat` of convolutions along channels, then batch norm: each branch takes its own channels.

Guards: nothing else sees the convolution's result; weight and bias are constants; batch norm uses
stored statistics; the channels are where batch norm counts them; dtype and shape stay the same;
numbers are real, and finite in the model's own dtype after folding.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from optfuse.convolution import (
    ARITHMETIC,
    BATCH_NORM,
    Affine,
    Convolution,
    arithmetic_affine,
    batch_norm_affine,
    convolution_of,
)
from optfuse.graph import (
    Edit,
    arguments,
    constant_of,
    describe,
    is_call,
    is_finite_as,
    kind,
    sole_user,
    value,
    why_not_sole_user,
)
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten

_TRAINING = (
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit_functional.default,
)


@dataclass(frozen=True)
class Folded:
    """A convolution and its new weight and bias in float64, and the names they came from."""

    convolution: Convolution
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Fold(Match):
    """Convolutions that take in what stands behind them.

    Attributes:
        folded: one, or one a branch of `cat`.
        result: the node that the new result stands for.
        cat: the concat between the convolutions and `result`, or None.
    """

    folded: tuple[Folded, ...]
    result: fx.Node
    cat: fx.Node | None


class FoldConvBn(Pass):
    """s * conv(x, W, b) + t = conv(x, s W, s b + t), per output channel; see the module."""

    name = "fold_conv_bn"
    equation = "s * conv(x, W, b) + t  =  conv(x, s W, s b + t)   (batch norm, mul, add, sub, div)"

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the batch norm or at the arithmetic behind the convolution."""
        outcome: Match | Refusal | None = None
        if is_call(node, *_TRAINING):
            outcome = _refuse_training(node)
        elif is_call(node, BATCH_NORM):
            outcome = _match_batch_norm(node)
        elif is_call(node, *ARITHMETIC):
            outcome = _match_arithmetic(node)
        if isinstance(outcome, Refusal):
            return replace(outcome, about=_in_front(node))
        return outcome

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The same convolutions with the folded weights (and the concat of them)."""
        assert isinstance(match, Fold)
        if match.cat is None:
            return {match.result: _rewrite_one(edit, match.folded[0])}
        behind = match.nodes[len(match.folded) :]
        results = []
        for folded in match.folded:
            edit.before(match.result, (folded.convolution.node, *behind))
            results.append(_rewrite_one(edit, folded))
        edit.before(match.result, match.nodes)
        return {match.result: edit.call(aten.cat.default, results, arguments(match.cat)["dim"])}


def _in_front(node: fx.Node) -> tuple[fx.Node, ...]:
    """The layers that what is calculated at `node` could go into."""
    sources = [each for each in node.args[:2] if isinstance(each, fx.Node)]
    in_concat = [arguments(each)["tensors"] for each in sources if is_call(each, aten.cat.default)]
    candidates = dict.fromkeys((*sources, *(each for tensors in in_concat for each in tensors)))
    return tuple(each for each in candidates if convolution_of(each) is not None)


def _rewrite_one(edit: Edit, folded: Folded) -> fx.Node:
    convolution = folded.convolution
    assert isinstance(convolution.weight.target, str)
    layer = re.sub(r"[._]?weight(_folded(_\d+)?)?$", "", convolution.weight.target)
    dtype = value(convolution.weight).dtype
    weight = edit.constant(f"{layer}_weight_folded", folded.weight, dtype)
    bias = edit.constant(f"{layer}_bias_folded", folded.bias, dtype)
    target = convolution.node.target
    assert callable(target)
    return edit.call(target, *convolution.with_constants(weight, bias), **convolution.node.kwargs)


def _refuse_training(node: fx.Node) -> Refusal | None:
    if convolution_of(node.args[0]) is None:
        return None
    return Refusal("the batch norm uses the statistics of the batch it sees, not stored ones")


def _match_batch_norm(node: fx.Node) -> Match | Refusal | None:
    bound = arguments(node)
    source: fx.Node = bound["input"]
    picked = sole_user(node)
    if picked is None or not is_call(picked, operator.getitem) or picked.args[1] != 0:
        return None
    if is_call(source, aten.cat.default):
        branches = list(arguments(source)["tensors"])
        if not any(convolution_of(branch) for branch in branches):
            return None
    elif convolution_of(source) is None:
        return None
    affine = batch_norm_affine(node)
    if isinstance(affine, str):
        return Refusal(affine)
    if is_call(source, aten.cat.default):
        return _fold_branches(source, node, picked, affine)
    return _fold_one(source, node, picked, affine)


def _fold_one(source: fx.Node, user: fx.Node, result: fx.Node, affine: Affine) -> Fold | Refusal:
    convolution = convolution_of(source)
    assert convolution is not None
    if is_call(user, BATCH_NORM):
        misplaced = _refuse_other_dimension(convolution)
        if misplaced is not None:
            return misplaced
    folded = _fold_into(convolution, user, affine)
    if isinstance(folded, Refusal):
        return folded
    return Fold(
        nodes=_distinct(source, user, result),
        note=f"{kind(user)} folded in",
        anchor=0,  # the new convolution stands in the old one's place and module
        folded=(folded,),
        result=result,
        cat=None,
    )


def _refuse_other_dimension(convolution: Convolution) -> Refusal | None:
    """Batch norm counts channels in dimension 1 of what it sees; the layer must put them there."""
    channels = value(convolution.node).dim() + convolution.channel_dim
    if channels == 1:
        return None
    return Refusal(
        f"the batch norm runs over dimension 1, the layer's channels are in dimension {channels}"
    )


def _fold_branches(cat: fx.Node, user: fx.Node, result: fx.Node, affine: Affine) -> Fold | Refusal:
    bound = arguments(cat)
    rank = value(cat).dim()
    if bound["dim"] % rank != 1:
        return Refusal("the concat in front of the batch norm is not along the channels")
    reason = why_not_sole_user(cat, user)
    if reason:
        return Refusal(reason)
    all_folded: list[Folded] = []
    start = 0
    for branch in bound["tensors"]:
        folded = _fold_branch(branch, cat, affine, start)
        if isinstance(folded, Refusal):
            return folded
        all_folded.append(folded)
        start += folded.convolution.out_channels
    return Fold(
        nodes=(*bound["tensors"], cat, user, result),
        note=f"{kind(user)} folded into the {len(all_folded)} branches of {describe(cat)}",
        folded=tuple(all_folded),
        result=result,
        cat=cat,
    )


def _fold_branch(branch: fx.Node, cat: fx.Node, affine: Affine, start: int) -> Folded | Refusal:
    """One branch of the concat, whose channels are the concat's from `start` on."""
    convolution = convolution_of(branch)
    if convolution is None:
        return Refusal(
            f"a branch of the concat in front of it, {describe(branch)}, is no convolution"
        )
    misplaced = _refuse_other_dimension(convolution)
    if misplaced is not None:
        return misplaced
    # Each place has its own part of the batch norm, so one convolution would have to become two.
    if sum(other is branch for other in arguments(cat)["tensors"]) > 1:
        return Refusal(f"the concat in front of it takes {describe(branch)} more than once")
    return _fold_into(convolution, cat, affine.part(start, convolution.out_channels))


def _fold_into(convolution: Convolution, user: fx.Node, affine: Affine) -> Folded | Refusal:
    reason = why_not_sole_user(convolution.node, user)
    if reason:
        return Refusal(reason)
    weight = constant_of(convolution.weight)
    if weight is None:
        return Refusal("the weight is not a constant")
    dtype = weight.dtype
    if not dtype.is_floating_point:
        return Refusal(f"the weight is {_dtype_name(dtype)}, not real floating-point numbers")
    bias = None
    if convolution.bias is not None:
        bias = constant_of(convolution.bias)
        if bias is None:
            return Refusal("the bias is not a constant")
    # A Python number or a scalar tensor lives on the CPU wherever the model is.
    scale, shift = affine.scale.to(weight.device), affine.shift.to(weight.device)
    folded_weight = convolution.scale_weight(weight.double(), scale)
    folded_bias = shift if bias is None else scale * bias.double() + shift
    for what, folded in (("weight", folded_weight), ("bias", folded_bias)):
        if not is_finite_as(folded, dtype):
            return Refusal(f"the folded {what} is not finite in {_dtype_name(dtype)}")
    return Folded(convolution, folded_weight, folded_bias)


def _match_arithmetic(node: fx.Node) -> Match | Refusal | None:
    sources = [operand for operand in node.args[:2] if convolution_of(operand) is not None]
    if len(sources) != 1:
        return None
    source = sources[0]
    assert isinstance(source, fx.Node)
    convolution = convolution_of(source)
    assert convolution is not None
    affine = arithmetic_affine(node, source, convolution.channel_dim, convolution.out_channels)
    if isinstance(affine, str):
        return Refusal(affine)
    return None if affine is None else _fold_one(source, node, node, affine)


def _distinct(*nodes: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
