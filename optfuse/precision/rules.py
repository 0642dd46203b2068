"""Which operators may run in a low precision, and why the others stay in float32.

An operator is one of four kinds. A *layer* does the work, and is what a low precision is for. What
*follows* moves data or computes each element on its own, and is as good in either. What *stays* has
its reason here. A *source* makes a tensor of a dtype that the model names. Operators go by their
names in ATen without overload, as `graph.kind` gives them.
"""

from __future__ import annotations

import torch
from torch import fx

from optfuse.graph import arguments, kind, value

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""What users call the dtypes."""

ASKED = "it was asked to stay in float32"

_SUMS = "it sums many numbers, and their rounding errors would add up"
_SPREADS = "it divides by a spread that it takes from small differences"
_VARIANCES = "a small variance that it divides by may vanish"
_SHARES = "it divides exponentials by their sum"
_STEEP = "a small rounding of what it reads can be a large change of what it gives"
_LOSS = "it is a loss"
_BRANCHES = "its inner graphs are left in the types they have"
_WRITES = "it writes to memory that others read"
_RANDOM = "it draws random numbers"
_NAMED = "the model names the dtype that it computes in"
_UNKNOWN = "nothing is known of what it does to small rounding errors"


def _operators(names: str) -> frozenset[str]:
    return frozenset(names.split())


LAYERS = _operators(
    """
    addmm baddbmm bmm conv1d conv2d conv3d conv_act conv_transpose1d conv_transpose2d
    conv_transpose3d convolution einsum embedding linear matmul mm mv
    """
)
"""Whose weights and operands a low precision is for."""

_MOVEMENT = """
    alias broadcast_tensors broadcast_to cat channel_shuffle chunk clone concat constant_pad_nd
    contiguous copy detach diagonal expand expand_as fill flatten flip gather hstack im2col index
    index_select lift_fresh lift_fresh_copy mT movedim narrow pad permute pixel_shuffle
    pixel_unshuffle ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape roll rot90
    select select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims
    t take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsafe_chunk
    unsafe_split unsafe_split_with_sizes unsqueeze upsample_nearest1d upsample_nearest2d
    upsample_nearest3d view view_as vstack _reshape_alias _unsafe_view
"""
_CHOICE = """
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin argmax argmin eq ge gt
    isfinite isinf isnan le logical_and logical_not logical_or lt max max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum min minimum ne sort topk
    where
"""
_ELEMENTWISE = """
    abs add addcmul ceil clamp clamp_max clamp_min clip div elu floor gelu glu hardsigmoid hardswish
    hardtanh leaky_relu lerp masked_fill mish mul multiply neg prelu relu relu6 round rsub selu
    sigmoid sign silu softsign sub subtract tanh threshold true_divide trunc upsample_bilinear2d
    upsample_linear1d upsample_trilinear3d
"""
_ALIKE = _operators("full_like new_full new_ones new_zeros ones_like to zeros_like _to_copy")
"""What gives a tensor of the dtype that it reads, unless it is told another."""

FOLLOWS = _ALIKE | _operators(_MOVEMENT + _CHOICE + _ELEMENTWISE)
"""What runs in the precision that costs the fewest casts around it."""

_STAYS = {
    _SUMS: """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d
        avg_pool3d cdist cosine_similarity cumprod cumsum dist embedding_bag linalg_norm
        linalg_vector_norm logcumsumexp logsumexp mean nanmean nansum norm prod sum
        _adaptive_avg_pool2d _adaptive_avg_pool3d
    """,
    _SPREADS: """
        group_norm instance_norm layer_norm local_response_norm native_group_norm
        native_layer_norm rms_norm std std_mean var var_mean _fused_rms_norm
    """,
    _VARIANCES: "batch_norm native_batch_norm",
    _SHARES: """
        log_softmax scaled_dot_product_attention softmax _log_softmax _safe_softmax _softmax
    """,
    _STEEP: """
        acos acosh asin asinh atan atan2 atanh celu cos cosh digamma erf erfc erfinv exp exp2 expm1
        float_power lgamma log log10 log1p log2 log_sigmoid pow reciprocal rsqrt sin sinh softplus
        sqrt square tan
    """,
}
_WHY = {name: reason for reason, names in _STAYS.items() for name in _operators(names)}

_NOT_IN_ONNX = {torch.bfloat16: _operators("einsum sort topk")}
"""What ONNX takes in no such type, in the operator sets up to 23."""

_READS_NO_DATA = _operators("getitem sym_numel sym_size sym_storage_offset sym_stride")

_DROPOUT = _operators("alpha_dropout dropout feature_dropout native_dropout")


def is_layer(node: fx.Node) -> bool:
    """Whether a node is an operator that a low precision is for, and gives float32."""
    return _is_float32(node) and _follows_its_operands(node) and kind(node) in LAYERS


def follows(node: fx.Node) -> bool:
    """Whether a node is as good in one precision as in the other."""
    return _follows_its_operands(node) and (kind(node) in FOLLOWS or _drops_nothing(node))


def reads_no_data(node: fx.Node) -> bool:
    """Whether a node asks of a tensor nothing but its sizes, or only picks one of several."""
    return node.op == "call_function" and kind(node) in _READS_NO_DATA


def why_it_stays(node: fx.Node) -> str | None:
    """Why an operator stays in float32, as a clause; None of one that may run in a low precision,
    and of a source, which computes nothing."""
    if node.op != "call_function" or reads_no_data(node):
        return None
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _BRANCHES
    if not isinstance(node.target, torch._ops.OpOverload) or not _touches_float32(node):
        return None
    if node.target._schema.is_mutable:
        return _WRITES
    name = kind(node)
    if _drops_nothing(node):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags and _drops(node):
        return _RANDOM
    if name in _WHY or name.endswith("_loss"):
        return _WHY.get(name, _LOSS)
    if _names_a_dtype(node):
        return _NAMED if name in (LAYERS | FOLLOWS) - _ALIKE else None
    return None if name in LAYERS | FOLLOWS else _UNKNOWN


def why_no_file_has_it(node: fx.Node, dtype: torch.dtype) -> str | None:
    """Why an operator cannot be written as ONNX in a dtype, as a clause."""
    if kind(node) in _NOT_IN_ONNX.get(dtype, ()):
        return f"ONNX has no {kind(node)} in {NAMES[dtype]}"
    return None


def _follows_its_operands(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and not _names_a_dtype(node)
        and all(
            each.dtype is torch.float32
            for each in _tensors(node)
            if each.dtype.is_floating_point or each.dtype.is_complex
        )
    )


def _drops_nothing(node: fx.Node) -> bool:
    """Whether it is a dropout as it is after training: what it reads."""
    return kind(node) in _DROPOUT and not _drops(node)


def _drops(node: fx.Node) -> bool:
    """Whether what random numbers it has are not switched off."""
    bound = arguments(node)
    return bound.get("train") is not False and bound.get("dropout_p") != 0


def _names_a_dtype(node: fx.Node) -> bool:
    return any(isinstance(each, torch.dtype) for each in arguments(node).values())


def _is_float32(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, torch.Tensor) and found.dtype is torch.float32


def _touches_float32(node: fx.Node) -> bool:
    """Whether it computes something from a tensor in float32."""
    read = [value(each) for each in node.all_input_nodes if "val" in each.meta]
    return any(isinstance(each, torch.Tensor) and each.dtype is torch.float32 for each in read)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that a node reads and gives, one by one."""
    read = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    flat = [leaf for each in read for leaf in (each if isinstance(each, (list, tuple)) else [each])]
    return [each for each in flat if isinstance(each, torch.Tensor)]
