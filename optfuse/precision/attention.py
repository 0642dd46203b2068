"""Scaled dot-product attention in plain operators, so that each can have a precision of its own.

    attention(q, k, v) = softmax((scale q) k^T + mask) v

as PyTorch documents `torch.nn.functional.scaled_dot_product_attention`. The queries are scaled in
front of the product rather than the scores behind it: it is what keeps these in a low precision's
range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from optfuse.graph import Edit, arguments, is_call, kind, take_over, value

aten = torch.ops.aten

INSIDE = "optfuse.inside"
"""Key in a node's metadata: the name of the attention that it was a part of."""


def is_attention(node: fx.Node) -> bool:
    """Whether it is an attention in float32 that plain operators can stand for."""
    if not is_call(node, aten.scaled_dot_product_attention.default):
        return False
    bound = arguments(node)
    operands = [bound["query"], bound["key"], bound["value"], bound["attn_mask"]]
    dtypes = [value(each).dtype for each in operands if each is not None]
    return (
        bound["dropout_p"] == 0
        and all(dtype is torch.float32 for dtype in dtypes[:3])
        and dtypes[-1] in (torch.float32, torch.bool)
        and isinstance(value(bound["query"]).shape[-1], int)
        and (not bound["enable_gqa"] or _repeats(bound) is not None)
    )


def spell_out(edit: Edit, node: fx.Node) -> None:
    """Put plain operators in the place of an attention, which is erased."""
    bound = arguments(node)
    query, key, values = bound["query"], bound["key"], bound["value"]
    edit.before(node, [node])
    before = set(node.graph.nodes)
    if bound["enable_gqa"]:
        repeats = _repeats(bound)
        key, values = (
            edit.call(aten.repeat_interleave.self_int, each, repeats, -3) for each in (key, values)
        )
    scale = bound["scale"]
    if scale is None:
        scale = 1 / math.sqrt(value(query).shape[-1])
    scaled = edit.call(aten.mul.Tensor, query, scale)
    turned = edit.call(aten.transpose.int, key, -2, -1)
    scores = edit.call(aten.matmul.default, scaled, turned)
    shares = _softmax(edit, bound, query, key, scores)
    result = edit.call(aten.matmul.default, shares, values)
    for each in node.graph.nodes:
        if each not in before:
            # No name depends on which other attentions are spelt out.
            each._rename(f"{node.name}_{kind(each)}")
            each.meta[INSIDE] = node.name
    take_over(result, node)
    node.replace_all_uses_with(result)
    edit.erase_unused([node])


def _softmax(
    edit: Edit, bound: dict[str, Any], query: fx.Node, key: fx.Node, scores: fx.Node
) -> fx.Node:
    mask = bound["attn_mask"]
    if bound["is_causal"]:
        sizes = [_size(edit, each, -2) for each in (query, key)]
        settings = {"dtype": torch.bool, "device": value(query).device}
        mask = edit.call(aten.tril.default, edit.call(aten.ones.default, sizes, **settings))
    elif mask is None:
        return edit.call(aten.softmax.int, scores, -1)
    if value(mask).dtype is torch.bool:
        scores = edit.call(aten.where.ScalarOther, mask, scores, -math.inf)
    else:
        scores = edit.call(aten.add.Tensor, scores, mask)
    # A row that is masked as a whole gives zeros, and not 0/0.
    return edit.call(aten._safe_softmax.default, scores, -1)


def _size(edit: Edit, node: fx.Node, dim: int) -> Any:
    size = value(node).shape[dim]
    return size if isinstance(size, int) else edit.call(aten.sym_size.int, node, dim)


def _repeats(bound: dict[str, Any]) -> int | None:
    """How many heads of the queries share one of the keys; None where that is open."""
    ours, theirs = (value(bound[name]).shape[-3] for name in ("query", "key"))
    return ours // theirs if isinstance(ours, int) and isinstance(theirs, int) else None
