"""TensorRT and TensorRT-RTX: real ahead-of-time builds, and fakes for what needs a GPU.

Only `tensorrt-rtx` builds without a GPU, so the shared code is tested through it. Branches that
belong to `tensorrt`, and sessions, run against small fakes that hold just the calls they make.
"""

import ctypes
import errno
import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from optfuse.backends import nvinfer, nvinfer_session
from optfuse.backends.nvinfer import NvinferBackend
from optfuse.backends.nvinfer_session import NvinferSession
from optfuse.backends.tensorrt import BACKEND as TENSORRT
from optfuse.backends.tensorrt_rtx import BACKEND as RTX
from optfuse.backends.tensorrt_rtx import check_target
from optfuse.errors import EngineError, OutputError, UsageError
from optfuse.stages import Artifact, BuildOptions, Program

builds_ahead = pytest.mark.skipif(RTX.unavailable() is not None, reason=str(RTX.unavailable()))
SM_89 = BuildOptions(targets=("sm_89",))


def onnx_artifact(
    path: Path,
    nodes: list[onnx.NodeProto],
    shape: tuple[int | str, ...] = (1, 3, 8, 8),
    weights: dict[str, np.ndarray] | None = None,
    **save: Any,
) -> Artifact:
    """A file with these nodes between the input `image` and the output `score`."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path, **save)
    return Artifact(path, "onnx", "a" * 64, 1, "baseline", ("image",), ("score",))


def residual_block(path: Path, **save: Any) -> Artifact:
    """Two convolutions, each followed by a ReLU, the second with a residual in between."""
    random = np.random.default_rng(3)
    weights = {
        "w1": random.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "w2": random.normal(size=(4, 4, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="first_relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["sum"], name="residual"),
        helper.make_node("Relu", ["sum"], ["score"], name="second_relu"),
    ]
    return onnx_artifact(path, nodes, weights=weights, **save)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvinfer, "gpu_count", lambda: 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU of compute capability 9.0 were here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(nvinfer, "gpu_count", lambda: 1)


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
    assert sorted(path.name for path in (tmp_path / "engines").iterdir()) == sorted(names)
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
    config = RTX._configure(trt, trt.Builder(RTX._logger(trt)), "sm_86")
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
        "Export it with static shapes: engines are built for fixed ones."
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
    fake = SimpleNamespace(
        BuilderFlag=SimpleNamespace(TF32="TF32"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED"),
        ComputeCapability=SimpleNamespace(SM89="SM89"),
    )
    builder = SimpleNamespace(create_builder_config=FakeConfig)
    with pytest.raises(EngineError, match="doesn't know that compute capability") as refused:
        RTX._configure(fake, builder, "sm_121")
    assert refused.value.next_step.endswith("pip install --upgrade 'optfuse[rtx]'")


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
        self.cache: FakeCache | None = None

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


class FakeTensorRT:
    """The calls of a build, with a plan or an error at its end."""

    BuilderFlag = SimpleNamespace(TF32="TF32")
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    class ILogger:
        pass

    def __init__(self, plan: bytes | None) -> None:
        self.plan = plan
        self.config = FakeConfig()
        self.flags: int | None = None

    def Builder(self, log: Any) -> SimpleNamespace:
        return SimpleNamespace(
            create_network=self.create_network,
            create_builder_config=lambda: self.config,
            build_serialized_network=lambda network, config: self.build(log),
        )

    def OnnxParser(self, network: Any, log: Any) -> SimpleNamespace:
        return SimpleNamespace(parse_from_file=lambda path: True)

    def create_network(self, flags: int) -> SimpleNamespace:
        self.flags = flags
        return SimpleNamespace(num_outputs=1, num_inputs=0)

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
    assert fake.config.cleared == ["TF32", "TF32"]


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
    assert nvinfer.network_flags(SimpleNamespace(NetworkDefinitionCreationFlag=flags)) == 2
    without = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace())
    assert nvinfer.network_flags(without) == 0


def test_the_timing_cache_is_kept_between_builds(tmp_path: Path, fake: FakeTensorRT) -> None:
    source = residual_block(tmp_path / "block.onnx")
    options = BuildOptions(cache=tmp_path / "cache")
    for builds in 1, 2, 3:
        TENSORRT.build(source, options, tmp_path)
        (file,) = (tmp_path / "cache").iterdir()
        assert file.name == "tensorrt-10.9.0-sm_90.timing"
        assert file.read_bytes()[32:] == b"measured;" * builds


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 99])
def test_a_damaged_timing_cache_is_built_again(
    tmp_path: Path, fake: FakeTensorRT, content: bytes
) -> None:
    (tmp_path / "tensorrt-10.9.0-sm_90.timing").write_bytes(content)
    TENSORRT.build(
        residual_block(tmp_path / "block.onnx"), BuildOptions(cache=tmp_path), tmp_path / "engines"
    )
    stored = (tmp_path / "tensorrt-10.9.0-sm_90.timing").read_bytes()
    assert stored == hashlib.sha256(b"measured;").digest() + b"measured;"


@pytest.mark.parametrize("content", [b"other driver", b"foreign"])
def test_a_timing_cache_that_the_package_refuses(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cache.timing"
    file.write_bytes(hashlib.sha256(content).digest() + content)
    config = FakeConfig()
    nvinfer.attach_timing_cache(config, file)
    assert config.cache is not None
    assert config.cache.content == b""


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


# Opening an engine


def engine_artifact(path: Path, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = ()) -> Any:
    return Artifact(path, "engine", "a" * 64, 1, "optimized", inputs, outputs)


def test_only_engine_files_can_be_opened(tmp_path: Path) -> None:
    program = Program("block", torch.nn.ReLU(), None, ())  # type: ignore[arg-type]
    for wrong in residual_block(tmp_path / "block.onnx"), program:
        with pytest.raises(EngineError) as refused:
            RTX.open(wrong, BuildOptions())
        assert str(refused.value) == (
            "tensorrt-rtx cannot open this program. It runs engine files only. "
            "Build an engine from the program's ONNX file first."
        )


def test_an_engine_cannot_be_opened_without_a_gpu(no_gpu: None) -> None:
    assert RTX.cannot_run() == "no GPU"
    with pytest.raises(EngineError) as refused:
        RTX.open(engine_artifact(Path("sm_89.baseline.engine")), BuildOptions())
    assert str(refused.value) == (
        "tensorrt-rtx cannot run sm_89.baseline.engine. The reason is: no GPU. "
        "Copy the file to a machine with the GPU that it was built for."
    )


def test_a_gpu_that_pytorch_cannot_use(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvinfer, "gpu_count", lambda: 2)
    assert RTX.cannot_run() == "this PyTorch was built without CUDA"


@builds_ahead
def test_a_file_that_is_not_an_engine(tmp_path: Path, hopper: None) -> None:
    path = tmp_path / "noise.engine"
    path.write_bytes(b"this is not an engine" * 30)
    with pytest.raises(EngineError, match=r"tensorrt-rtx cannot load noise\.engine\. .*magicTag"):
        RTX.open(engine_artifact(path), BuildOptions())
    with pytest.raises(EngineError, match="No such file or directory"):
        RTX.open(engine_artifact(tmp_path / "absent.engine"), BuildOptions())


# Sessions, with a fake engine in the CPU's memory


class FakeEngine:
    """Computes difference = left - right on the memory that it was given; both are 2x3."""

    def __init__(self, **tensors: tuple[str, str, tuple[int, ...]]) -> None:
        self.tensors = tensors or {
            "right": ("INPUT", "FLOAT", (2, 3)),
            "left": ("INPUT", "FLOAT", (2, 3)),
            "difference": ("OUTPUT", "FLOAT", (2, 3)),
        }
        self.num_io_tensors = len(self.tensors)
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.succeeds = True
        self.has_room = True

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.tensors[name][1])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="DEVICE")

    def create_execution_context(self) -> "FakeEngine | None":
        return self if self.has_room else None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        left, right, difference = (
            (ctypes.c_float * 6).from_address(self.addresses[name])
            for name in ("left", "right", "difference")
        )
        for index in range(6):
            difference[index] = left[index] - right[index]
        return self.succeeds


class FakeStream:
    cuda_stream = 1234

    def __init__(self) -> None:
        self.waits = 0
        self.error: str | None = None

    def synchronize(self) -> None:
        self.waits += 1
        if self.error:
            raise RuntimeError(self.error)


def session(
    engine: FakeEngine,
    stream: FakeStream | None = None,
    inputs: tuple[str, ...] = ("left", "right"),
    outputs: tuple[str, ...] = ("difference",),
) -> NvinferSession:
    return NvinferSession(
        engine,
        engine_artifact(Path("sm_90.engine"), inputs, outputs),
        SimpleNamespace(messages=[("INFO", "loaded"), ("ERROR", "out of device memory")]),
        torch.device("cpu"),
        stream or FakeStream(),
        "NVIDIA H200",
    )


def test_a_session_takes_and_gives_tensors_in_the_programs_order() -> None:
    engine, stream = FakeEngine(), FakeStream()
    left = torch.tensor([[1.5, 2.5, 4.5], [8.5, 16.5, 32.5]])
    right = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]]).T  # not contiguous
    with session(engine, stream) as opened:
        assert (opened.inputs, opened.outputs) == (("left", "right"), ("difference",))
        assert opened.device == "NVIDIA H200"
        opened.bind([left, right])
        opened.run()
        (first,) = opened.fetch()
        # Both are sums of few powers of two: exact in float32.
        assert torch.equal(first, left - right)
        opened.bind([right.contiguous(), left])
        opened.run()
        (second,) = opened.fetch()
    assert torch.equal(second, right - left)
    assert torch.equal(first, left - right)  # its memory is its own
    assert engine.streams == [1234, 1234]
    assert stream.waits == 2


def test_without_names_the_engines_own_order_holds() -> None:
    assert session(FakeEngine(), inputs=(), outputs=()).inputs == ("right", "left")


@pytest.mark.parametrize(
    ("feeds", "cause"),
    [
        ([torch.ones(2, 3)], "It has 2 inputs and was given 1"),
        (
            [torch.ones(2, 3), torch.ones(1, 3)],
            "Its input 'right' is 2x3 float32 and was given 1x3 float32",
        ),
        (
            [torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3)],
            "Its input 'left' is 2x3 float32 and was given 2x3 float64",
        ),
    ],
)
def test_feeds_that_do_not_fit(feeds: list[torch.Tensor], cause: str) -> None:
    with pytest.raises(EngineError) as refused:
        session(FakeEngine()).bind(feeds)
    assert refused.value.thing == "The engine sm_90.engine cannot run"
    assert refused.value.cause == cause


def test_an_engine_of_another_program() -> None:
    with pytest.raises(EngineError) as refused:
        session(FakeEngine(), inputs=("image",))
    assert refused.value.cause == "Its inputs are right, left, and the program's image"
    with pytest.raises(EngineError, match="Its outputs are difference, and the program's score"):
        session(FakeEngine(), outputs=("score",))


def test_shapes_and_data_types_that_cannot_be_held() -> None:
    with pytest.raises(EngineError, match="The shape of 'found' is known only when it runs"):
        session(FakeEngine(found=("OUTPUT", "INT64", (-1, 4))), inputs=(), outputs=())
    with pytest.raises(EngineError, match="PyTorch has no data type for its 'packed'"):
        session(FakeEngine(packed=("OUTPUT", "FP4", (2, 4))), inputs=(), outputs=())


def test_every_data_type_is_one_of_torchs() -> None:
    for name in nvinfer_session.TORCH_DTYPES.values():
        assert isinstance(getattr(torch, name), torch.dtype)


def test_a_gpu_that_refuses() -> None:
    engine, stream = FakeEngine(), FakeStream()
    opened = session(engine, stream)
    with pytest.raises(EngineError, match="No inputs were bound"):
        opened.run()
    opened.bind([torch.ones(2, 3), torch.full((2, 3), 0.5)])
    stream.error = "CUDA error: an illegal memory access was encountered\nand more"
    with pytest.raises(EngineError, match="an illegal memory access was encountered and more"):
        opened.run()
    engine.succeeds = False
    with pytest.raises(EngineError, match="out of device memory"):
        opened.run()
    engine.has_room = False
    with pytest.raises(EngineError, match="out of device memory"):
        session(engine)


# On a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [TENSORRT, RTX], ids=lambda backend: backend.name)
def test_an_engine_computes_what_onnx_says(backend: NvinferBackend, tmp_path: Path) -> None:
    reason = backend.unavailable() or backend.cannot_run()
    if reason:
        pytest.skip(reason)
    source = residual_block(tmp_path / "block.onnx")
    try:
        ((engine, report),) = backend.build(source, BuildOptions(cache=tmp_path), tmp_path)
    except UsageError as refused:  # e.g. a Hopper GPU, which tensorrt-rtx doesn't support
        pytest.skip(str(refused))
    assert report.not_measured is None
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)) - 0.5
    with backend.open(engine, BuildOptions()) as opened:
        opened.bind([image])
        opened.run()
        (score,) = opened.fetch()
        assert opened.device == torch.cuda.get_device_name()
    weights = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()).double()
        for tensor in onnx.load(source.path).graph.initializer
    }
    first = torch.conv2d(image.double(), weights["w1"], padding=1).relu()
    expected = (torch.conv2d(first, weights["w2"], padding=1) + first).relu()
    distance = (score.double() - expected).norm() / expected.norm()
    # float32 sums of 27 and 36 products are good to about 1e-6; TF32 would give about 1e-3.
    assert distance < 1e-5
