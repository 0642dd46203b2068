"""TensorRT and TensorRT-RTX: real ahead-of-time builds, and fakes for what needs a GPU.

Only `tensorrt-rtx` builds without a GPU, so the shared code is tested through it. Branches that
belong to `tensorrt` run against a small fake that holds just the calls they make.
"""

import errno
import hashlib
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from optfuse.backends import engine_file, nvinfer, nvinfer_build
from optfuse.backends.engine_file import EngineInput
from optfuse.backends.nvinfer import NvinferBackend
from optfuse.backends.tensorrt import BACKEND as TENSORRT
from optfuse.backends.tensorrt_rtx import BACKEND as RTX
from optfuse.backends.tensorrt_rtx import check_target
from optfuse.capture import capture
from optfuse.errors import EngineError, OptfuseError, OutputError, UsageError
from optfuse.export import export_baseline
from optfuse.stages import Artifact, BuildOptions, InputShapes, InputSpec, LoadedModel
from tests.backends.nvinfer_examples import (
    SM_89,
    batches,
    builds_ahead,
    onnx_artifact,
    open_batch,
    residual_block,
    shapes,
)

# Targets


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"])
def test_targets_that_can_be_built_for(target: str) -> None:
    check_target(target)


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "SM_89", "89", ""])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_target(target)
    assert str(refused.value) == (
        f"tensorrt-rtx cannot build for '{target}'. The compute capabilities that it supports are "
        "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121: Turing, Ampere, Ada and Blackwell, but not "
        "Hopper (sm_90). Pass one of them as --target, or use the engine tensorrt on the GPU "
        "itself."
    )


@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
def test_what_builds_for_the_gpu_alone_takes_any_target_until_it_builds(target: str) -> None:
    TENSORRT.check_target(target)


def test_a_target_is_checked_without_importing_an_engine() -> None:
    code = (
        "import sys; from optfuse.backends.tensorrt_rtx import BACKEND, check_target;"
        "check_target('sm_89'); BACKEND.unavailable(); BACKEND.version();"
        "print(sorted({'torch', 'tensorrt_rtx', 'tensorrt'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


# Builds


@builds_ahead
def test_a_build_for_two_targets(tmp_path: Path) -> None:
    source = residual_block(tmp_path / "block.onnx")
    options = BuildOptions(targets=("sm_89", "sm_120", "sm_89"))
    built = RTX.build(source, options, tmp_path / "engines")

    names = ["sm_89.baseline.engine", "sm_120.baseline.engine"]
    assert [engine.path.name for engine, _ in built] == names
    beside = [f"{name}.json" for name in names]
    files = sorted(path.name for path in (tmp_path / "engines").iterdir())
    assert files == sorted([*names, *beside])
    for engine, report in built:
        content = engine.path.read_bytes()
        assert engine.kind == "engine"
        assert engine.sha256 == hashlib.sha256(content).hexdigest()
        assert engine.size_bytes == report.size_bytes == len(content)
        assert (engine.input_names, engine.output_names) == (("image",), ("score",))
        assert (engine.variant, report.variant) == ("baseline", "baseline")
        assert report.engine == "tensorrt-rtx"
        assert report.build_seconds > 0
    assert [report.target for _, report in built] == ["sm_89", "sm_120"]


@builds_ahead
def test_the_report_names_the_onnx_nodes_behind_each_layer(tmp_path: Path) -> None:
    ((_, report),) = RTX.build(residual_block(tmp_path / "block.onnx"), SM_89, tmp_path)
    fused = [set(layer.nodes) for layer in report.layers if layer.kind == "correlation"]
    assert fused == [{"first", "first_relu"}, {"second", "residual", "second_relu"}]
    assert report.layers_by_type["correlation"] == 2
    # The weights are 4*3*3*3 and 4*4*3*3 float32, and the builder aligns each constant.
    assert report.weight_bytes is not None
    assert report.weight_bytes >= 4 * (4 * 3 * 9 + 4 * 4 * 9)
    # At least one activation of 4x8x8 float32 lies between the two convolutions.
    assert report.activation_bytes is not None
    assert report.activation_bytes >= 4 * 4 * 8 * 8


@builds_ahead
def test_tf32_is_off_and_the_log_is_detailed() -> None:
    trt = RTX._import()
    builder = trt.Builder(RTX._logger(trt))
    config = nvinfer_build.configuration(trt, builder, BuildOptions(), "failed")
    assert RTX._aim(trt, config, "sm_86", BuildOptions(), "failed") == "sm_86"
    # Weight streaming is left to the builder, which has it off.
    assert not config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM86


@builds_ahead
def test_why_a_build_ahead_of_time_is_not_measured(tmp_path: Path, no_gpu: None) -> None:
    ((_, report),) = RTX.build(residual_block(tmp_path / "block.onnx"), SM_89, tmp_path)
    assert report.not_measured == "no GPU"


@builds_ahead
def test_an_engine_for_another_gpu_is_not_measured(tmp_path: Path, hopper: None) -> None:
    ((_, report),) = RTX.build(residual_block(tmp_path / "block.onnx"), SM_89, tmp_path)
    assert report.not_measured == "built for sm_89, and the GPU here is sm_90"


@builds_ahead
def test_weights_in_a_second_file(tmp_path: Path) -> None:
    inside = residual_block(tmp_path / "inside.onnx")
    apart = residual_block(
        tmp_path / "apart.onnx",
        save_as_external_data=True,
        location="apart.onnx.data",
        size_threshold=0,
    )
    assert (tmp_path / "apart.onnx.data").exists()
    ((first, _),) = RTX.build(inside, SM_89, tmp_path / "inside")
    ((second, _),) = RTX.build(apart, SM_89, tmp_path / "apart")
    assert first.size_bytes == second.size_bytes

    (tmp_path / "apart.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"Failed to import initializer: w1"):
        RTX.build(apart, SM_89, tmp_path / "apart")


# Profiles, and engines for more than one GPU or version


@builds_ahead
def test_an_engine_for_open_shapes(tmp_path: Path) -> None:
    options = replace(SM_89, shapes=batches(1, 8, 32))
    ((engine, report),) = RTX.build(open_batch(tmp_path / "open.onnx"), options, tmp_path)
    assert [layer.nodes for layer in report.layers if layer.nodes] == [("wide",)]
    built = engine_file.read(engine.path)
    assert built.shapes == options.shapes
    assert built.onnx_sha256 == hashlib.sha256((tmp_path / "open.onnx").read_bytes()).hexdigest()
    assert (built.package, built.version) == ("tensorrt-rtx", RTX.version())
    assert (built.target, built.oldest_target, built.device) == ("sm_89", "sm_89", None)
    assert built.inputs == (EngineInput("image", "float32", (-1, 3, 8, 8)),)
    assert built.outputs == ("score",)
    assert engine_file.usual_inputs(built) == (InputSpec("image", (8, 3, 8, 8), "float32"),)


def test_the_profile_that_a_builder_is_given(tmp_path: Path, fake: "FakeTensorRT") -> None:
    fake.inputs = {"image": (-1, 3, 8, 8)}
    source = residual_block(tmp_path / "block.onnx")
    TENSORRT.build(source, BuildOptions(shapes=batches(1, 8, 32)), tmp_path)
    (profile,) = fake.config.profiles
    assert profile.shapes == {"image": ((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}
    fake.inputs = {"image": (1, 3, 8, 8)}
    TENSORRT.build(source, BuildOptions(), tmp_path)
    assert fake.config.profiles == []


@builds_ahead
@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (
            batches(8, 1, 32),
            "Its smallest shape, 8x3x8x8, is not within its usual shape, 1x3x8x8.",
        ),
        (
            shapes((1, 4, 8, 8), (8, 4, 8, 8), (32, 4, 8, 8)),
            "The network takes ?x3x8x8 there, and was given 1x4x8x8.",
        ),
        (
            shapes((1, 3, 8, 8), (2, 3, 8, 8), (3, 3, 8, 8), name="picture"),
            "The network has no such input: it has image.",
        ),
    ],
)
def test_a_profile_that_cannot_be(
    tmp_path: Path, given: tuple[InputShapes, ...], cause: str
) -> None:
    source = open_batch(tmp_path / "open.onnx")
    with pytest.raises(UsageError) as refused:
        RTX.build(source, replace(SM_89, shapes=given), tmp_path / "engines")
    assert cause in str(refused.value)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "engines").exists()


@builds_ahead
def test_a_profile_that_the_network_cannot_run_at(tmp_path: Path) -> None:
    # The builder warns and gives an engine, which would fail at its first run of that shape.
    source = open_batch(tmp_path / "open.onnx", (1, 3, "H", "H"))
    given = shapes((1, 3, 1, 1), (1, 3, 8, 8), (1, 3, 9, 9))
    with pytest.raises(EngineError) as refused:
        RTX.build(source, replace(SM_89, shapes=given), tmp_path / "engines")
    assert refused.value.cause.startswith(
        "The network cannot run at its smallest shapes, at the node 'wide' (Conv): spatial "
        "dimension of convolution"
    )
    assert refused.value.next_step == "Give --dim a range that the model can run at"
    assert not (tmp_path / "engines").exists()


@builds_ahead
def test_sizes_that_do_not_go_together_are_refused_by_the_builder(tmp_path: Path) -> None:
    node = helper.make_node("Reshape", ["image", "shape"], ["score"], name="fixed_view")
    weights = {"shape": np.array([8, 12])}
    source = onnx_artifact(tmp_path / "view.onnx", [node], ("N", 4), weights)
    given = shapes((2, 4), (2, 4), (3, 4))
    with pytest.raises(EngineError) as refused:
        RTX.build(source, replace(SM_89, shapes=given), tmp_path / "engines")
    assert refused.value.cause == (
        "The network cannot run at its usual shapes, at the node 'fixed_view' (Reshape): reshaping "
        "failed for tensor: image reshape would change volume 8 to 96"
    )
    assert refused.value.next_step == "Give --dim a range that the model can run at"


@builds_ahead
def test_squeezenet_with_an_open_batch(tmp_path: Path) -> None:
    squeezenet = importlib.import_module("models.squeezenet")
    model = squeezenet.build().eval()
    batch = torch.export.Dim("N", min=2, max=32)
    example = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    loaded = LoadedModel("squeezenet", model, (example,), dynamic_shapes=({0: batch},))
    source = export_baseline(capture(loaded), tmp_path / "squeezenet.onnx")
    (name,) = source.input_names
    options = replace(
        SM_89,
        shapes=shapes((2, 3, 224, 224), (4, 3, 224, 224), (32, 3, 224, 224), name=name),
    )
    ((engine, report),) = RTX.build(source, options, tmp_path)
    # 26 convolutions, each with the ReLU behind it.
    fused = [layer for layer in report.layers if layer.kind == "correlation"]
    assert [len(layer.nodes) for layer in fused] == [2] * 26
    assert engine_file.read(engine.path).shapes == options.shapes


@builds_ahead
def test_an_engine_for_later_gpus_too(tmp_path: Path, no_gpu: None) -> None:
    source = residual_block(tmp_path / "block.onnx")
    options = replace(SM_89, hardware_compatible=True)
    ((alone, _),) = RTX.build(source, SM_89, tmp_path / "alone")
    ((engine, report),) = RTX.build(source, options, tmp_path / "more")
    assert engine.path.name == "sm_89.baseline.engine"
    # It holds what sm_120 and sm_121 need, too.
    assert engine.size_bytes > alone.size_bytes
    built = engine_file.read(engine.path)
    assert (built.hardware_compatible, built.oldest_target) == (True, "sm_89")
    assert report.not_measured == "no GPU"


@builds_ahead
def test_which_gpus_a_build_for_later_ones_names() -> None:
    trt = RTX._import()
    builder = trt.Builder(RTX._logger(trt))
    options = BuildOptions(hardware_compatible=True)
    config = nvinfer_build.configuration(trt, builder, options, "failed")
    RTX._aim(trt, config, "sm_89", options, "failed")
    found = [config.get_compute_capability(index) for index in range(3)]
    known = trt.ComputeCapability
    assert config.num_compute_capabilities == 3
    assert found == [known.SM89, known.SM120, known.SM121]


@builds_ahead
def test_rtx_has_no_engines_for_later_versions(tmp_path: Path) -> None:
    assert refused_for_later_versions(UsageError, tmp_path) == (
        "--version-compatible cannot be used with tensorrt-rtx. It loads no engine of an earlier "
        "release, however that was built. Leave the option out, or use the engine tensorrt on the "
        "GPU itself: pip install 'optfuse[gpu]'."
    )


@builds_ahead
def test_a_package_without_its_runtime_for_later_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RTX, "later_versions", True)  # it has not that runtime, and says so
    assert refused_for_later_versions(EngineError, tmp_path) == (
        "tensorrt-rtx cannot build block.onnx for sm_89. An engine for later versions carries the "
        "package's lean runtime (libnvinfer_lean), which is not installed. Install it, where "
        "NVIDIA offers it, or leave version compatibility out."
    )


def refused_for_later_versions(kind: type[OptfuseError], folder: Path) -> str:
    """What TensorRT-RTX says, which writes nothing."""
    options = replace(SM_89, version_compatible=True)
    with pytest.raises(kind) as refused:
        RTX.build(residual_block(folder / "block.onnx"), options, folder / "engines")
    assert not (folder / "engines").exists()
    return str(refused.value)


def test_tensorrt_builds_for_later_versions_and_gpus(tmp_path: Path, fake: "FakeTensorRT") -> None:
    source = residual_block(tmp_path / "block.onnx")
    ((plain, _),) = TENSORRT.build(source, BuildOptions(), tmp_path)
    assert (fake.config.flags, fake.config.hardware_compatibility_level) == ([], "NONE")
    assert engine_file.read(plain.path).device == "NVIDIA H200"
    options = BuildOptions(version_compatible=True, hardware_compatible=True)
    ((engine, _),) = TENSORRT.build(source, options, tmp_path)
    assert fake.config.flags == ["VERSION_COMPATIBLE"]
    assert fake.config.hardware_compatibility_level == "AMPERE_PLUS"
    built = engine_file.read(engine.path)
    assert (built.target, built.oldest_target) == ("sm_90", "sm_80")


def test_a_gpu_older_than_hardware_compatibility(
    tmp_path: Path, fake: "FakeTensorRT", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UsageError) as refused:
        TENSORRT.build(
            residual_block(tmp_path / "block.onnx"),
            BuildOptions(hardware_compatible=True),
            tmp_path / "engines",
        )
    assert str(refused.value) == (
        "--hardware-compatible cannot be used with tensorrt here. It builds for later GPUs from "
        "sm_80 on, and the GPU here is sm_75. Leave the option out, or build on a GPU of sm_80 or "
        "later."
    )
    assert not (tmp_path / "engines").exists()


def test_a_package_that_does_not_know_hardware_compatibility() -> None:
    with pytest.raises(EngineError, match="doesn't know hardware compatibility"):
        nvinfer_build.build_for_later_gpus(SimpleNamespace(), SimpleNamespace(), "failed")


@builds_ahead
def test_an_engine_for_later_gpus_can_be_measured_on_one(
    tmp_path: Path, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    options = replace(SM_89, hardware_compatible=True)
    source = residual_block(tmp_path / "block.onnx")
    ((_, report),) = RTX.build(source, options, tmp_path)
    assert report.not_measured is None
    ((_, report),) = RTX.build(source, SM_89, tmp_path)
    assert report.not_measured == "built for sm_89, and the GPU here is sm_120"


# Refusals


def refusal(source: Artifact, directory: Path) -> str:
    """What the user reads, on one line and with nothing left behind."""
    with pytest.raises(EngineError) as refused:
        RTX.build(source, SM_89, directory / "engines")
    assert not (directory / "engines").exists()
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith(f"tensorrt-rtx cannot build {source.path.name} for sm_89. ")
    return text


@builds_ahead
def test_open_shapes_are_refused(tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["image"], ["score"], name="relu")
    source = onnx_artifact(tmp_path / "open.onnx", [relu], shape=("N", 3, 8, "width"))
    assert refusal(source, tmp_path).endswith(
        "Its input 'image', ?x3x8x?, has dimensions that are open. "
        "Name it with --dim, e.g. --dim N=1:8:32 for an --input of Nx3x224x224."
    )


@builds_ahead
def test_an_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node(
        "FusedConv", ["image"], ["score"], name="fused_one", domain="com.microsoft"
    )
    text = refusal(onnx_artifact(tmp_path / "plugin.onnx", [node]), tmp_path)
    assert "Its parser stopped at the node 'fused_one' (FusedConv): " in text
    assert "Plugin not found" in text
    assert text.endswith("Change the model at that place, or leave this engine out.")


def from_module(node: onnx.NodeProto, path: str) -> onnx.NodeProto:
    """The node with the note on its module that torch.onnx leaves."""
    scopes = ["", *(path[:end] for end in range(len(path) + 1) if path[end : end + 1] in (".", ""))]
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", str([*scopes, "call"])
    return node


@builds_ahead
def test_an_unsupported_operator_is_named_with_its_module(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["image"], ["score"], name="node_det")
    source = onnx_artifact(tmp_path / "det.onnx", [from_module(node, "head.volume")], (2, 3, 3))
    assert refusal(source, tmp_path).endswith(
        "Its parser stopped at the node 'node_det' (Det) of the module 'head.volume': It does not "
        "support that operator there. Change the model at that place, or leave this engine out."
    )


@builds_ahead
def test_a_failing_build_is_told_with_node_and_module(tmp_path: Path) -> None:
    # It parses, and the builder refuses it.
    node = helper.make_node("TopK", ["image", "k"], ["score", "at"], name="node_topk")
    source = onnx_artifact(
        tmp_path / "topk.onnx",
        [from_module(node, "head.best")],
        (1, 10000),
        {"k": np.array([5000])},
    )
    assert refusal(source, tmp_path).endswith(
        "Its builder stopped at the node 'node_topk' (TopK) of the module 'head.best': K exceeds "
        "the maximum value allowed (3840). "
        "Change the model at that place, or leave this engine out."
    )


@builds_ahead
def test_a_data_type_that_the_target_lacks(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["low"], name="down", to=TensorProto.BFLOAT16),
        helper.make_node("Relu", ["low"], ["half"], name="relu"),
        helper.make_node("Cast", ["half"], ["score"], name="up", to=TensorProto.FLOAT),
    ]
    source = onnx_artifact(tmp_path / "bf16.onnx", nodes)
    with pytest.raises(EngineError, match=r"sm75.*contains HW-specific datatypes: b16"):
        RTX.build(source, BuildOptions(targets=("sm_75",)), tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


@builds_ahead
def test_a_weight_that_does_not_fit_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["image", "w"], ["score"], name="wide")
    weights = {"w": np.full((4, 5, 2, 2), 0.5, np.float32)}
    text = refusal(onnx_artifact(tmp_path / "wide.onnx", [node], weights=weights), tmp_path)
    assert "Its parser stopped at the node 'wide' (Conv): " in text
    assert "Kernel weight dimension failed to broadcast to input" in text


@builds_ahead
@pytest.mark.parametrize("content", [b"", b"this is not a network" * 9])
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    # The parser takes it for an empty network and reports no error.
    path = tmp_path / "noise.onnx"
    path.write_bytes(content)
    text = refusal(Artifact(path, "onnx", "a" * 64, 1), tmp_path)
    assert text.endswith("The file holds no ONNX graph. Export the model again.")


@builds_ahead
def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "absent.onnx"
    text = refusal(Artifact(path, "onnx", "a" * 64, 1), tmp_path)
    assert text.endswith(f"There is no file {path}. Export the model first.")


@builds_ahead
def test_no_target_and_no_gpu(tmp_path: Path, no_gpu: None) -> None:
    with pytest.raises(EngineError) as refused:
        RTX.build(residual_block(tmp_path / "block.onnx"), BuildOptions(), tmp_path)
    assert str(refused.value) == (
        "tensorrt-rtx has nothing to build for. It was given no --target, and this machine cannot "
        "stand in for one: no GPU. Pass --target sm_89 to the engine tensorrt-rtx, or the compute "
        "capability of your own GPU."
    )


@builds_ahead
def test_a_gpu_that_the_engine_does_not_support(tmp_path: Path, hopper: None) -> None:
    with pytest.raises(UsageError, match="tensorrt-rtx cannot build for 'sm_90'"):
        RTX.build(residual_block(tmp_path / "block.onnx"), BuildOptions(), tmp_path)


@builds_ahead
def test_an_older_package_may_not_know_a_target(tmp_path: Path) -> None:
    fake = SimpleNamespace(ComputeCapability=SimpleNamespace(SM89="SM89"))
    with pytest.raises(EngineError, match="doesn't know that compute capability") as refused:
        RTX._aim(fake, FakeConfig(), "sm_121", BuildOptions(), "failed")
    assert refused.value.next_step.endswith("pip install --upgrade 'optfuse[rtx]'")


@builds_ahead
def test_of_several_targets_all_are_built_or_none(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["low"], name="down", to=TensorProto.BFLOAT16),
        helper.make_node("Relu", ["low"], ["half"], name="relu"),
        helper.make_node("Cast", ["half"], ["score"], name="up", to=TensorProto.FLOAT),
    ]
    source = onnx_artifact(tmp_path / "bf16.onnx", nodes)
    with pytest.raises(EngineError, match=r"cannot build bf16\.onnx for sm_75"):
        RTX.build(source, BuildOptions(targets=("sm_89", "sm_75")), tmp_path / "engines")
    assert list((tmp_path / "engines").iterdir()) == []


@builds_ahead
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    source = residual_block(tmp_path / "block.onnx")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError) as refused:
        RTX.build(source, SM_89, tmp_path / "file" / "engines")
    assert str(refused.value) == (
        f"The results cannot be written to {tmp_path / 'file' / 'engines'}. "
        "A file stands where a folder should be. Choose another place."
    )


@builds_ahead
def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = residual_block(tmp_path / "block.onnx")
    write_bytes = Path.write_bytes

    def write_half(path: Path, content: Any) -> int:
        write_bytes(path, bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OutputError, match="The disk is full"):
        RTX.build(source, SM_89, tmp_path / "engines")
    assert list((tmp_path / "engines").iterdir()) == []


# Packages that are missing or too old


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        (TENSORRT, "The package tensorrt is not installed: pip install 'optfuse[gpu]'"),
        (RTX, "The package tensorrt-rtx is not installed: pip install 'optfuse[rtx]'"),
    ],
)
def test_a_package_that_is_not_installed(
    backend: NvinferBackend, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.version() is None
    assert backend.unavailable() == sentence
    with pytest.raises(EngineError) as refused:
        backend.build(residual_block(tmp_path / "block.onnx"), SM_89, tmp_path)
    assert str(refused.value) == (
        f"{backend.name} cannot build an engine. {sentence}. Install it, or leave it out."
    )


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TENSORRT, "version", lambda: "8.6.1.post1")
    assert TENSORRT.unavailable() == (
        "The package tensorrt 8.6.1.post1 is older than 10.8: pip install --upgrade 'optfuse[gpu]'"
    )


@pytest.mark.parametrize("version", ["10.8.0.43", "11.0.0.114"])
def test_tensorrt_needs_a_gpu_to_build(
    version: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TENSORRT, "version", lambda: version)
    assert TENSORRT.unavailable() == (
        "tensorrt builds only on a machine with an NVIDIA GPU, and there is none here"
    )
    monkeypatch.setattr(nvinfer, "gpu_count", lambda: 1)
    assert TENSORRT.unavailable() is None


@builds_ahead
def test_the_version_is_that_of_the_package() -> None:
    assert RTX.version() == RTX._import().__version__


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(EngineError) as refused:
        TENSORRT._import()
    assert str(refused.value) == (
        "The package tensorrt cannot be imported. libnvinfer.so.10: cannot open shared object "
        "file. Install it again: pip install --force-reinstall 'optfuse[gpu]'."
    )


# The branches of `tensorrt`, with a fake package


class FakeCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"measured;"


class FakeConfig:
    """Holds what a builder's configuration is told."""

    def __init__(self) -> None:
        self.cleared: list[str] = []
        self.flags: list[str] = []
        self.profiles: list[FakeProfile] = []
        self.hardware_compatibility_level = "NONE"
        self.cache: FakeCache | None = None

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: "FakeProfile") -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def create_timing_cache(self, content: bytes) -> FakeCache | None:
        return None if b"foreign" in content else FakeCache(content)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return b"other driver" not in cache.content

    def get_timing_cache(self) -> FakeCache | None:
        return self.cache


class FakeProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, *three: tuple[int, ...]) -> None:
        self.shapes[name] = three


class FakeTensorRT:
    """The calls of a build, with a plan or an error at its end."""

    BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    class ILogger:
        pass

    def __init__(self, plan: bytes | None) -> None:
        self.plan = plan
        self.config = FakeConfig()
        self.flags: int | None = None
        self.inputs = {"image": (1, 3, 8, 8)}

    def Builder(self, log: Any) -> SimpleNamespace:
        return SimpleNamespace(
            create_network=self.create_network,
            create_builder_config=self.new_config,
            create_optimization_profile=FakeProfile,
            build_serialized_network=lambda network, config: self.build(log),
        )

    def OnnxParser(self, network: Any, log: Any) -> SimpleNamespace:
        return SimpleNamespace(parse_from_file=lambda path: True)

    def new_config(self) -> FakeConfig:
        self.config = FakeConfig()
        return self.config

    def create_network(self, flags: int) -> SimpleNamespace:
        self.flags = flags
        float32 = SimpleNamespace(name="FLOAT")
        inputs = [
            SimpleNamespace(name=name, shape=shape, dtype=float32)
            for name, shape in self.inputs.items()
        ]
        return SimpleNamespace(
            num_outputs=1, num_inputs=len(inputs), get_input=lambda index: inputs[index]
        )

    def build(self, log: Any) -> bytes | None:
        log.log(SimpleNamespace(name="INFO"), "Total Activation Memory: 4096 bytes")
        if self.plan is None:
            log.log(SimpleNamespace(name="ERROR"), "the first error")
            log.log(
                SimpleNamespace(name="INTERNAL_ERROR"),
                "Could not find any implementation for node conv. In build at /_src/b.cpp:12",
            )
        return self.plan


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, hopper: None) -> FakeTensorRT:
    """`tensorrt` 10.9 on a machine with a Hopper GPU."""
    package = FakeTensorRT(b"plan of an engine")
    monkeypatch.setattr(TENSORRT, "version", lambda: "10.9.0")
    monkeypatch.setattr(TENSORRT, "_import", lambda: package)
    monkeypatch.setattr(TENSORRT, "_log", None)
    return package


def test_tensorrt_builds_for_the_gpu_that_is_here(tmp_path: Path, fake: FakeTensorRT) -> None:
    source = residual_block(tmp_path / "block.onnx")
    for options in BuildOptions(), BuildOptions(targets=("sm_75", "sm_90")):
        ((engine, report),) = TENSORRT.build(source, options, tmp_path)
        assert engine.path == tmp_path / "sm_90.baseline.engine"
        assert engine.path.read_bytes() == b"plan of an engine"
        assert (report.target, report.activation_bytes) == ("sm_90", 4096)
        assert report.not_measured is None
    assert fake.flags == 1 << 1
    assert fake.config.cleared == ["TF32"]


def test_tensorrt_refuses_a_target_that_is_not_here(tmp_path: Path, fake: FakeTensorRT) -> None:
    with pytest.raises(EngineError) as refused:
        TENSORRT.build(residual_block(tmp_path / "block.onnx"), SM_89, tmp_path)
    assert str(refused.value) == (
        "tensorrt cannot build for sm_89. It builds only for the GPU that is here, which is sm_90. "
        "Pass --target sm_90, or use the engine tensorrt-rtx."
    )


def test_the_builders_last_error_is_the_reason(tmp_path: Path, fake: FakeTensorRT) -> None:
    fake.plan = None
    with pytest.raises(EngineError) as refused:
        TENSORRT.build(residual_block(tmp_path / "block.onnx"), BuildOptions(), tmp_path)
    assert str(refused.value) == (
        "tensorrt cannot build block.onnx for sm_90. Could not find any implementation for node "
        "conv. Change the model at that place, or leave this engine out."
    )
    assert not list(tmp_path.glob("*.engine"))


def test_a_constructor_that_gives_nothing(
    tmp_path: Path, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(log: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Builder", nothing)
    with pytest.raises(EngineError, match="factory function returned nullptr"):
        TENSORRT.build(residual_block(tmp_path / "block.onnx"), BuildOptions(), tmp_path)


def test_networks_are_strongly_typed_where_that_is_a_choice() -> None:
    flags = SimpleNamespace(STRONGLY_TYPED=1)
    assert nvinfer_build.network_flags(SimpleNamespace(NetworkDefinitionCreationFlag=flags)) == 2
    without = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace())
    assert nvinfer_build.network_flags(without) == 0


def test_the_timing_cache_is_kept_between_builds(tmp_path: Path, fake: FakeTensorRT) -> None:
    source = residual_block(tmp_path / "block.onnx")
    options = BuildOptions(cache=tmp_path / "cache")
    for builds in 1, 2, 3:
        TENSORRT.build(source, options, tmp_path)
        (file,) = (tmp_path / "cache").iterdir()
        assert re.fullmatch(r"tensorrt-10\.9\.0-sm_90-[0-9a-f]{16}\.timing", file.name)
        assert file.read_bytes()[32:] == b"measured;" * builds


def test_another_model_gpu_version_or_option_has_its_own_timing_cache(
    tmp_path: Path, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = residual_block(tmp_path / "block.onnx")
    relu = [helper.make_node("Relu", ["image"], ["score"], name="relu")]
    other = onnx_artifact(tmp_path / "relu.onnx", relu)
    options = BuildOptions(cache=tmp_path / "cache")

    def files() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    TENSORRT.build(source, options, tmp_path)
    assert files() == 1
    TENSORRT.build(other, options, tmp_path)
    assert files() == 2
    TENSORRT.build(source, replace(options, hardware_compatible=True), tmp_path)
    assert files() == 3
    TENSORRT.build(source, replace(options, version_compatible=True), tmp_path)
    assert files() == 4
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    TENSORRT.build(source, options, tmp_path)
    assert files() == 5
    monkeypatch.setattr(TENSORRT, "version", lambda: "10.10.0")
    TENSORRT.build(source, options, tmp_path)
    assert files() == 6


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 99])
def test_a_damaged_timing_cache_is_built_again(
    tmp_path: Path, fake: FakeTensorRT, content: bytes
) -> None:
    source = residual_block(tmp_path / "block.onnx")
    options = BuildOptions(cache=tmp_path / "cache")
    TENSORRT.build(source, options, tmp_path / "engines")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(content)
    TENSORRT.build(source, options, tmp_path / "engines")
    assert file.read_bytes()[32:] == b"measured;"


def test_a_timing_cache_that_cannot_be_kept_costs_no_result(
    tmp_path: Path, fake: FakeTensorRT
) -> None:
    (tmp_path / "file").write_text("in the way")
    source = residual_block(tmp_path / "block.onnx")
    built = TENSORRT.build(source, BuildOptions(cache=tmp_path / "file" / "cache"), tmp_path)
    assert [engine.path.name for engine, _ in built] == ["sm_90.baseline.engine"]


@builds_ahead
def test_rtx_keeps_no_timing_cache(tmp_path: Path) -> None:
    options = BuildOptions(targets=("sm_89",), cache=tmp_path / "cache")
    RTX.build(residual_block(tmp_path / "block.onnx"), options, tmp_path)
    assert not (tmp_path / "cache").exists()
