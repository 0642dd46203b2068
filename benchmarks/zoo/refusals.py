"""What the passes refused, without what belongs to one place, and what would lift each refusal.

A reason that the zoo meets and that has no entry in `LIFTED_BY` fails the zoo's test.
"""

from __future__ import annotations

import re

_PLACE = re.compile(
    r"\b[A-Za-z_]\w* \([\w.-]+\)"  # relu_3 (features.0.act)
    r"|\b[a-z]\w*_\d+\b"  # relu_3, of no module
)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*(?<![.,])(?!\w)(?: (?:bytes|KiB|MiB)\b)?")
_SEVERAL = re.compile(r"…(?:(?:, | and |, and )…)+")

LIFTED_BY = {
    "combine_parallel_convs": {
        r"its stride is not that of … on the same tensor": "nothing that pays: the one with the "
        "larger stride would compute what is then thrown away",
        r".* follows it and .* follows … on the same tensor; behind a split that would not be "
        r"fused": "an engine that fuses activations behind a split",
        r"its kernel is .*, not 1x1 \(the option any_kernel .*": "`combine_parallel_convs."
        "any_kernel`",
        r"it has … groups, not one \(the option grouped .*": "`combine_parallel_convs.grouped`",
        r"its kernel is .* and it has … groups.*": "`combine_parallel_convs.any_kernel` and "
        "`.grouped`",
    },
    "elide_concat": {
        r"the concat inside it stays: the result of … has … users": "nothing that pays: the inner "
        "concat would stay for the others, and no operator would go",
    },
    "fold_constants": {
        r"the constant would take … in the model and replace …": "a limit on the size of what is "
        "folded that the user sets; the model would grow",
    },
    "fold_conv_bn": {
        r"a branch of the concat in front of it, …, is no convolution": "nothing that pays: what "
        "a pooling gives would need a scale and a shift of its own",
        r"the result of … has … users": "nothing that pays: the others need the result as it is, "
        "so it would be computed twice",
    },
    "fold_linear_chain": {
        r"the result of … has … users": "nothing that pays: the others need the result as it is",
        r"… also reads the result of …": "nothing that pays: it needs the result as it is",
        r"… pads with zeros, where a folded shift would be missing": "a sum per place at the "
        "border, which costs as much as the shift does",
    },
    "fuse_conv_activation": {
        r"the result of … is also an output of the model": "nothing: the model gives out what "
        "stands in front of the activation too",
    },
    "merge_branches": {
        r"the result of … has … users": "nothing that pays: the first convolution would have to "
        "stay for the others",
        r"the result of … is also an output of the model": "nothing: the model gives out what a "
        "convolution in the middle gives too",
    },
    "route_channels": {
        r"to put its channels where they are read .* is not known to treat its channels alike": "a "
        "rule for that operator in `optfuse/routing`",
        r"to put its channels where they are read would take .* against .*": "nothing that pays: "
        "as much would be moved elsewhere",
    },
}
"""Pass -> a regular expression of generalised reasons -> what would lift them."""


def generalised(reason: str) -> str:
    """The reason with `…` for what belongs to one place: nodes with their modules, and numbers."""
    for pattern in (_PLACE, _NUMBER, _SEVERAL):
        reason = pattern.sub("…", reason)
    return reason


def what_would_lift(name: str, reason: str) -> str | None:
    """The entry of a pass's generalised reason in `LIFTED_BY`, None where it has none."""
    entries = LIFTED_BY.get(name, {})
    return next((lift for pattern, lift in entries.items() if re.fullmatch(pattern, reason)), None)
