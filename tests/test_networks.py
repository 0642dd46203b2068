"""All passes on whole networks: what is left of each, written out, and that it is the same
function."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.figures import figures_of
from optfuse.stages import Program
from tests.harness import assert_same_function, captured, counts, optimized, reasons


@dataclass(frozen=True)
class Expected:
    """What a network comes to.

    Attributes:
        convolutions: fused or not, before and after.
        batch_norms: before and after.
        rewritten: sites of each pass that found any.
    """

    convolutions: tuple[int, int]
    batch_norms: tuple[int, int]
    rewritten: dict[str, int]


NETWORKS = {
    "googlenet": Expected(
        (57, 39),
        (57, 0),
        {
            "eliminate_identity": 1,
            "fold_conv_bn": 57,
            "combine_parallel_convs": 9,
            "fuse_conv_activation": 39,
        },
    ),
    "inception_v3": Expected(
        (94, 75),
        (94, 0),
        {
            "eliminate_identity": 1,
            "fold_conv_bn": 94,
            "combine_parallel_convs": 10,
            "elide_concat": 2,
            "fuse_conv_activation": 75,
        },
    ),
    "squeezenet": Expected((26, 26), (0, 0), {"eliminate_identity": 1, "fuse_conv_activation": 26}),
    # The first block's shortcut reads what its first convolution reads, with stride 1 there alone;
    # but the one takes in a sum and the other a ReLU.
    "resnet50": Expected(
        (53, 53),
        (53, 0),
        {"eliminate_identity": 1, "fold_conv_bn": 53, "fuse_conv_activation": 49},
    ),
    "resnext50": Expected(
        (53, 53),
        (53, 0),
        {"eliminate_identity": 1, "fold_conv_bn": 53, "fuse_conv_activation": 49},
    ),
    # A dense layer normalises what others read too: those batch norms have no convolution of
    # their own to go into.
    "densenet121": Expected(
        (120, 120),
        (121, 62),
        {"eliminate_identity": 1, "fold_conv_bn": 59, "fuse_conv_activation": 59},
    ),
    # The batch norm of RepVGG's identity branch goes into the merge, and the one in front of the
    # classifier goes into it as an affine input.
    "digits": Expected(
        (17, 14),
        (17, 0),
        {
            "eliminate_identity": 1,
            "fold_conv_bn": 15,
            "fold_affine_input": 3,
            "merge_branches": 1,
            "combine_parallel_convs": 1,
            "elide_concat": 1,
            "route_channels": 1,
            "fuse_conv_activation": 13,
        },
    ),
    "mobilenet_v2": Expected(
        (52, 52),
        (52, 0),
        {"eliminate_identity": 1, "fold_conv_bn": 52, "fuse_conv_activation": 35},
    ),
    "shufflenet_v2": Expected(
        (56, 56),
        (56, 0),
        {
            "eliminate_identity": 1,
            "fold_conv_bn": 56,
            "route_channels": 3,
            "fuse_conv_activation": 37,
        },
    ),
    "efficientnet_b0": Expected(
        (81, 81),
        (49, 0),
        {"eliminate_identity": 1, "fold_conv_bn": 49, "fuse_conv_activation": 65},
    ),
    "repvgg_a0": Expected(
        (44, 22),
        (61, 0),
        {
            "eliminate_identity": 1,
            "fold_conv_bn": 44,
            "merge_branches": 22,
            "fuse_conv_activation": 22,
        },
    ),
    "unet": Expected((23, 23), (22, 0), {"fold_conv_bn": 22, "fuse_conv_activation": 18}),
    "yolo_neck": Expected(
        (36, 36), (30, 0), {"fold_conv_bn": 30, "elide_concat": 4, "fuse_conv_activation": 30}
    ),
    # The layer norms' scales and shifts go into the linear layers behind them.
    "vit_tiny": Expected(
        (1, 1),
        (0, 0),
        {"eliminate_identity": 1, "fold_linear_chain": 25, "combine_parallel_convs": 12},
    ),
}


ZOO = Path(__file__).parent.parent / "docs" / "zoo.json"
SNAPSHOT: dict[str, dict[str, Any]] = json.loads(ZOO.read_text(encoding="utf-8"))
"""Of every network, what `make zoo` counted."""


def densenet_says_why_its_batch_norms_stay(before: Program, after: Program) -> None:
    said = reasons(after, "fold_conv_bn")
    assert len(said) == 58
    assert sum("has 2 users" in reason for reason in said) == 54
    assert sum("is no convolution" in reason for reason in said) == 4


def no_feature_map_of_shufflenet_is_transposed_or_reshaped(before: Program, after: Program) -> None:
    moving = ("view", "transpose", "clone", "split", "split_with_sizes", "cat")
    assert [counts(before).get(kind, 0) for kind in moving] == [33, 16, 17, 13, 0, 16]
    # The one view is the classifier's own: (1, 1024, 1, 1) -> (1, 1024).
    assert [counts(after).get(kind, 0) for kind in moving] == [1, 0, 0, 0, 16, 16]


def partial_convolutions_take_the_concats_out_of_squeezenet(
    before: Program, after: Program
) -> None:
    after = optimized(before, "all,elide_concat.partial")
    # Six of the eight fire modules feed a 1x1 convolution alone; two feed a pooling.
    assert counts(before)["cat"] - counts(after)["cat"] == 6
    assert_same_function(before, after, tolerance=1e-5)


def resnets_say_why_the_first_shortcut_stays_apart(before: Program, after: Program) -> None:
    first, *strided = reasons(after, "combine_parallel_convs")
    assert first.startswith("relu of a sum follows it and relu follows ")
    assert first.endswith(" on the same tensor; behind a split that would not be fused")
    assert len(strided) == 3
    assert all(reason.startswith("its stride is not that of ") for reason in strided)


BESIDES: dict[str, Callable[[Program, Program], None]] = {
    "densenet121": densenet_says_why_its_batch_norms_stay,
    "shufflenet_v2": no_feature_map_of_shufflenet_is_transposed_or_reshaped,
    "squeezenet": partial_convolutions_take_the_concats_out_of_squeezenet,
    "resnet50": resnets_say_why_the_first_shortcut_stays_apart,
    "resnext50": resnets_say_why_the_first_shortcut_stays_apart,
}
"""What holds of one network alone, before all passes and after them: looked at where it is compared
anyway, since capturing it and optimising it takes seconds."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_to_what_is_written_here(name: str) -> None:
    network = importlib.import_module(f"models.{name}")
    expected = NETWORKS[name]
    before = captured(network.build(), *network.example_inputs())
    after = optimized(before, "all")

    convolutions, batch_norms = [], []
    for program in (before, after):
        left = counts(program)
        convolutions.append(sum(left.get(k, 0) for k in ("conv2d", "conv_transpose2d", "conv_act")))
        batch_norms.append(left.get("batch_norm", 0))
    assert tuple(convolutions) == expected.convolutions
    assert tuple(batch_norms) == expected.batch_norms
    rewritten = {s.name: s.matched for s in after.trace if s.stage == "pass" and s.matched}
    assert rewritten == expected.rewritten
    figures = figures_of(before, after)
    assert figures == {key: SNAPSHOT[f"models/{name}"][key] for key in figures}
    # Rounding the folded constants to float32 costs 6e-8 a layer; the deepest network here
    # amplifies that to 3e-6.
    assert_same_function(before, after, tolerance=1e-5)
    if name in BESIDES:
        BESIDES[name](before, after)
