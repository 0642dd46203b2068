"""What builders do by themselves: real ahead-of-time builds, and made-up layer tables."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from optfuse.backends.tensorrt_rtx import BACKEND as RTX
from optfuse.builder_findings import BuilderFinding, findings
from optfuse.capture import capture
from optfuse.export import export, export_baseline
from optfuse.optimize import optimize, select
from optfuse.stages import (
    BuildOptions,
    EngineLayer,
    EngineReport,
    Involved,
    LoadedModel,
    Program,
    Site,
    Step,
)
from tests.harness import captured, scramble

builds_ahead = pytest.mark.skipif(RTX.unavailable() is not None, reason=str(RTX.unavailable()))
SM_89 = BuildOptions(targets=("sm_89",))


def built(program: Program, folder: Path, passes: str = "all") -> dict[str, BuilderFinding]:
    """What the findings say of real engines of a program, by kind of rewrite."""
    after = optimize(program, select(passes))
    baseline = export_baseline(program, folder / "baseline.onnx")
    ours = export(after, folder / "model.onnx")
    (((_, first),), ((_, second),)) = (
        RTX.build(each, SM_89, folder / "engines") for each in (baseline, ours)
    )
    found = findings(first, second, ours.trace, baseline.path, ours.path)
    return {each.rewrite: each for each in found}


class Inception(nn.Module):
    """Three 1x1 convolutions on one tensor, two of them with another behind, and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([self.block(16, 8, 1) for _ in range(3)])
        self.tails = nn.ModuleList([self.block(8, 16, 3) for _ in range(2)])

    @staticmethod
    def block(inputs: int, outputs: int, size: int) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = (head(x) for head in self.heads)
        return torch.cat([first, self.tails[0](second), self.tails[1](third)], 1)


@builds_ahead
def test_an_inception_block(tmp_path: Path) -> None:
    program = captured(scramble(Inception()), torch.randn(1, 16, 14, 14))
    found = built(program, tmp_path)
    assert {kind: each.verdict for kind, each in found.items()} == {
        "operators without effect": "not needed",
        "batch norm into convolution": "not needed",
        "activation into convolution": "yes",
        "parallel convolutions into one": "no",
        "concatenations without a copy": "yes",
    }
    assert found["operators without effect"].sentence == (
        "torch.onnx does it: 5 of 5 operators without effect are gone from the file as exported"
    )
    assert found["batch norm into convolution"].sentence == (
        "torch.onnx does it: 5 of 5 batch norms are gone from the file as exported"
    )
    assert found["activation into convolution"].sentence == (
        "5 of 5 activations are inside the convolution's layer as exported"
    )
    merged = found["parallel convolutions into one"]
    assert merged.sentence.startswith(
        "0 of 1 group of parallel convolutions are one layer as exported: 5 convolutions, 3 with "
        "ours; 0 copies, "
    )
    assert (merged.counts["by_itself"], merged.counts["places"]) == (0, 1)
    assert found["concatenations without a copy"].sentence.startswith(
        "1 of 1 concatenation has no copy of its own as exported: 1 has no layer, and 0 are inside "
        "one that computes; 0 copies for concatenations, "
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + x)


@builds_ahead
def test_a_residual_block(tmp_path: Path) -> None:
    program = captured(scramble(Residual()), torch.randn(1, 8, 14, 14))
    found = built(program, tmp_path)
    assert {kind: each.sentence for kind, each in found.items()} == {
        "activation into convolution": (
            "2 of 2 activations are inside the convolution's layer as exported"
        ),
        "sum into convolution": "1 of 1 sum is inside the convolution's layer as exported",
    }
    assert {each.verdict for each in found.values()} == {"yes"}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.wide(x) + self.narrow(x))


@builds_ahead
def test_branches_that_are_summed(tmp_path: Path) -> None:
    program = captured(scramble(Branches()), torch.randn(1, 8, 14, 14))
    found = built(program, tmp_path)
    assert found["summed branches into one"].verdict == "no"
    assert found["summed branches into one"].sentence.startswith(
        "0 of 1 group of summed branches are one layer as exported: 2 convolutions, 1 with ours"
    )
    # Their sum is told of there, and nowhere else.
    assert "sum into convolution" not in found


@builds_ahead
def test_what_no_pass_did_is_left_out(tmp_path: Path) -> None:
    program = captured(scramble(Residual()), torch.randn(1, 8, 14, 14))
    assert built(program, tmp_path, passes="eliminate_identity") == {}


@builds_ahead
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "googlenet",
            {
                "operators without effect": ("not needed", 1, 1),
                "batch norm into convolution": ("not needed", 57, 57),
                "activation into convolution": ("yes", 57, 57),
                "parallel convolutions into one": ("no", 0, 9),
                "concatenations without a copy": ("yes", 9, 9),
            },
        ),
        (
            "resnet50",
            {
                "operators without effect": ("not needed", 1, 1),
                "batch norm into convolution": ("not needed", 53, 53),
                "activation into convolution": ("yes", 49, 49),
                "sum into convolution": ("yes", 16, 16),
            },
        ),
    ],
)
def test_networks(name: str, expected: dict[str, tuple[str, int, int]], tmp_path: Path) -> None:
    module = importlib.import_module(f"models.{name}")
    model = LoadedModel(name, module.build().eval(), module.example_inputs())
    found = built(capture(model), tmp_path)
    seen = {
        kind: (
            each.verdict,
            each.counts.get("by_itself", each.counts.get("by_exporter")),
            each.counts["places"],
        )
        for kind, each in found.items()
    }
    assert seen == expected
    if name == "googlenet":
        counts = found["parallel convolutions into one"].counts
        assert (counts["convolutions_before"], counts["convolutions_after"]) == (57, 39)


# Layer tables made up: c1 and c2 with a ReLU each, and a concat of both


def file(path: Path, *also: onnx.NodeProto) -> Path:
    def made_of(name: str, captured_name: str, operator: str, *inputs: str) -> onnx.NodeProto:
        node = helper.make_node(operator, list(inputs), [f"{name}_out"], name=name)
        record = node.metadata_props.add()
        record.key, record.value = "pkg.torch.onnx.fx_node", f"%{captured_name} : [num_users=1] ="
        return node

    nodes = [
        made_of("conv_1", "conv2d", "Conv", "x", "w"),
        made_of("relu_1", "relu", "Relu", "conv_1_out"),
        made_of("conv_2", "conv2d_1", "Conv", "x", "w"),
        made_of("relu_2", "relu_1", "Relu", "conv_2_out"),
        made_of("cat", "cat", "Concat", "relu_1_out", "relu_2_out"),
        made_of("norm", "batch_norm", "BatchNormalization", "cat_out", "s", "s", "s", "s"),
        made_of("noop", "clone", "Identity", "norm_out"),
        made_of("shuffle", "transpose", "Transpose", "noop_out"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xwsy"]
    graph = helper.make_graph([*nodes, *also], "g", values[:3], values[3:])
    onnx.save(helper.make_model(graph), path)
    return path


def report(*layers: Sequence[str], activation_bytes: int | None = None) -> EngineReport:
    table = tuple(
        EngineLayer(f"layer_{number}", "kgen", tuple(nodes)) for number, nodes in enumerate(layers)
    )
    return EngineReport("tensorrt-rtx", "sm_89", "baseline", table, activation_bytes, None, 1, 1.0)


def step(name: str, *origins: tuple[str, ...], undone: str | None = None) -> Step:
    sites = tuple(Site(each[0], involved=Involved("op", "", each)) for each in origins)
    return Step("pass", name, 0.1, 9, 8, sites=sites, undone=undone)


FUSED = step("fuse_conv_activation", ("conv2d", "relu"), ("conv2d_1", "relu_1"))
MERGED = step("combine_parallel_convs", ("conv2d", "conv2d_1", "relu", "relu_1"))


def one(tmp_path: Path, trace: Step, kind: str, *layers: Sequence[str]) -> BuilderFinding:
    path = file(tmp_path / "x.onnx")
    found = findings(report(*layers), report(["conv_1"]), [trace], path, path)
    return next(each for each in found if each.rewrite == kind)


@pytest.mark.parametrize(
    ("layers", "verdict", "inside"),
    [
        ([["conv_1", "relu_1"], ["conv_2", "relu_2"]], "yes", 2),
        ([["conv_1", "relu_1"], ["conv_2"], ["relu_2"]], "partly", 1),
        ([["conv_1"], ["relu_1"], ["conv_2"], ["relu_2"]], "no", 0),
        # Half of it in a layer of its own is not inside.
        ([["conv_1", "relu_1"], ["relu_1"], ["conv_2"], ["relu_2"]], "no", 0),
        # A node that no layer names is not known to be inside.
        ([["conv_1"], ["conv_2", "relu_2"]], "partly", 1),
    ],
)
def test_activations(tmp_path: Path, layers: list[list[str]], verdict: str, inside: int) -> None:
    found = one(tmp_path, FUSED, "activation into convolution", *layers)
    assert found.verdict == verdict
    assert found.counts == {"by_itself": inside, "places": 2}


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [
        ([["conv_1"], ["conv_2"]], "no"),
        ([["conv_1", "relu_1", "conv_2", "relu_2"]], "yes"),
    ],
)
def test_parallel_convolutions(tmp_path: Path, layers: list[list[str]], verdict: str) -> None:
    found = one(tmp_path, MERGED, "parallel convolutions into one", *layers)
    assert found.verdict == verdict
    assert found.counts["convolutions_before"] == len(layers)
    assert "MB" not in found.sentence  # nothing is known of the memory


def test_memory_is_told_where_both_are_known(tmp_path: Path) -> None:
    path = file(tmp_path / "x.onnx")
    sizes = [report(["conv_1"], activation_bytes=size) for size in (35_374_080, 12_808_192)]
    (merged, _) = findings(*sizes, [MERGED], path, path)
    assert merged.sentence.endswith("; 35.4 MB of activations, 12.8 MB with ours")


@pytest.mark.parametrize(
    ("layers", "verdict", "elided", "inside"),
    [
        ([["conv_1"]], "yes", 1, 0),
        ([["cat", "norm"]], "yes", 0, 1),
        ([["cat"]], "no", 0, 0),
        ([["cat", "shuffle"]], "no", 0, 0),
    ],
)
def test_concatenations(
    tmp_path: Path, layers: list[list[str]], verdict: str, elided: int, inside: int
) -> None:
    found = one(tmp_path, FUSED, "concatenations without a copy", *layers)
    assert found.verdict == verdict
    assert (found.counts["elided"], found.counts["inside"]) == (elided, inside)


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [([["norm"]], "no"), ([["norm", "conv_2"]], "yes")],
)
def test_batch_norms_that_the_exporter_left(
    tmp_path: Path, layers: list[list[str]], verdict: str
) -> None:
    folded = step("fold_conv_bn", ("conv2d_1", "batch_norm"))
    found = one(tmp_path, folded, "batch norm into convolution", *layers)
    assert found.verdict == verdict
    assert found.sentence.startswith("torch.onnx leaves 1 batch norm of these behind, and ")


@pytest.mark.parametrize(
    ("layers", "verdict"), [([["noop"]], "no"), ([["noop", "norm"]], "yes"), ([["norm"]], "yes")]
)
def test_operators_without_effect_that_the_exporter_left(
    tmp_path: Path, layers: list[list[str]], verdict: str
) -> None:
    gone = step("eliminate_identity", ("clone",))
    assert one(tmp_path, gone, "operators without effect", *layers).verdict == verdict


@pytest.mark.parametrize(
    ("layers", "verdict", "sentence"),
    [
        ([["shuffle"], ["cat"]], "no", "2 operators that only move data are 2 copies as exported"),
        ([["shuffle", "cat"]], "partly", "2 operators that only move data are 1 copy as exported"),
        ([["norm"]], "yes", "0 operators that only move data are 0 copies as exported"),
    ],
)
def test_channel_shuffles(
    tmp_path: Path, layers: list[list[str]], verdict: str, sentence: str
) -> None:
    routed = step("route_channels", ("cat", "transpose"))
    found = one(tmp_path, routed, "channel shuffles into weights", *layers)
    assert found.verdict == verdict
    assert found.sentence == f"{sentence}, and 0 with ours"


def test_what_was_undone_does_not_count(tmp_path: Path) -> None:
    path = file(tmp_path / "x.onnx")
    undone = replace(FUSED, undone="it changed the function")
    found = findings(report(["conv_1"]), report(["conv_1"]), [undone], path, path)
    assert [each.rewrite for each in found] == ["concatenations without a copy"]


def test_where_a_builder_told_no_layers_nothing_is_found(tmp_path: Path) -> None:
    path = file(tmp_path / "x.onnx")
    assert findings(report(), report(["conv_1"]), [FUSED], path, path) == ()
    assert findings(report(["conv_1"]), report(), [FUSED], path, path) == ()
