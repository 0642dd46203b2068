"""Engine files of TensorRT and TensorRT-RTX: which are opened, how, and what they compute on a GPU.

Without one, a fake package takes the place of the real one.
"""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from optfuse.backends import engine_file, nvinfer
from optfuse.backends.engine_file import EngineInput
from optfuse.backends.nvinfer import NvinferBackend
from optfuse.backends.tensorrt import BACKEND as TENSORRT
from optfuse.backends.tensorrt_rtx import BACKEND as RTX
from optfuse.errors import EngineError, UsageError
from optfuse.stages import Artifact, BuildOptions, Program
from tests.backends.nvinfer_examples import batches, builds_ahead, open_batch, residual_block

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


def described(path: Path, content: bytes, **changed: Any) -> Artifact:
    """An engine file with a description that says it was built by what is here, for sm_90."""
    facts: dict[str, Any] = {
        "onnx_sha256": "a" * 64,
        "package": "tensorrt-rtx",
        "version": str(RTX.version()),
        "target": "sm_90",
        "device": None,
        "oldest_target": "sm_90",
        "shapes": (),
        "version_compatible": False,
        "hardware_compatible": False,
        "inputs": (EngineInput("image", "float32", (1, 3, 8, 8)),),
        "outputs": ("score",),
    }
    digest = engine_file.write(path, content, engine_file.Built(**{**facts, **changed}))
    return Artifact(path, "engine", digest, len(content))


@builds_ahead
def test_what_the_package_refuses_though_its_description_fits(tmp_path: Path, hopper: None) -> None:
    noise = described(tmp_path / "noise.engine", b"this is not an engine" * 30)
    with pytest.raises(EngineError) as refused:
        RTX.open(noise, BuildOptions())
    assert refused.value.thing == "tensorrt-rtx cannot load noise.engine"
    assert "magicTag" in refused.value.cause
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 4


@pytest.mark.usefixtures("hopper")
def test_nothing_of_an_engine_that_does_not_fit_reaches_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Any:
        raise AssertionError("the package was imported")

    monkeypatch.setattr(RTX, "_import", never)
    monkeypatch.setattr(RTX, "version", lambda: "1.7.1.116")
    monkeypatch.setattr(RTX, "unavailable", lambda: None)
    content = b"an engine" * 30
    engine = described(tmp_path / "x.engine", content, version="1.7.1.116")
    with pytest.raises(AssertionError, match="the package was imported"):
        RTX.open(engine, BuildOptions())  # nothing is wrong with this one

    engine.path.write_bytes(content[:-1])
    assert "Its sha256 is not the one" in why_not(engine)
    (tmp_path / "x.engine.json").unlink()
    assert "There is no x.engine.json beside it" in why_not(engine)
    other = described(tmp_path / "x.engine", content, version="1.6.0.1")
    assert "It was built by tensorrt-rtx 1.6.0.1, and this is 1.7.1.116" in why_not(other)
    other = described(tmp_path / "x.engine", content, version="1.7.1.116", target="sm_89")
    assert "It was built for sm_89, and the GPU here is sm_90" in why_not(other)
    other = described(tmp_path / "x.engine", content, package="tensorrt", version="10.9")
    assert "It was built by tensorrt, and was to be run by tensorrt-rtx" in why_not(other)
    engine.path.unlink()
    assert "It cannot be read: No such file or directory" in why_not(engine)


def why_not(engine: Artifact) -> str:
    with pytest.raises(EngineError) as refused:
        RTX.open(engine, BuildOptions())
    text = str(refused.value)
    assert text.startswith("The engine x.engine is not opened. ")
    assert "\n" not in text
    assert refused.value.exit_code == 4
    return text


# What opening an engine does with the package, with a fake one


class FakeRuntimeConfig:
    """Holds what TensorRT for RTX is told of how to run an engine."""

    def __init__(self) -> None:
        self.cache: FakeRuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = "LAZY"
        self.cuda_graph_strategy = "DISABLED"

    def create_runtime_cache(self) -> "FakeRuntimeCache":
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: "FakeRuntimeCache") -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        accepted = b"other driver" not in content
        self.content = content if accepted else b""
        return accepted

    def serialize(self) -> bytes:
        return self.content or b"compiled;"


class LoadedEngine:
    """An engine with the input `image` and the output `score`, and the contexts made of it."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.contexts: list[Any] = []

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, config: Any = None) -> SimpleNamespace:
        self.contexts.append(config)
        return SimpleNamespace()

    def get_tensor_name(self, index: int) -> str:
        return ("image", "score")[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INPUT" if name == "image" else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="DEVICE")


class FakeLoader:
    """The calls that open an engine."""

    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")

    class ILogger:
        pass

    def __init__(self) -> None:
        self.engine = LoadedEngine()
        self.loaded: list[bytes] = []
        self.runtime = SimpleNamespace(
            engine_host_code_allowed=False, deserialize_cuda_engine=self.load
        )

    def Runtime(self, log: Any) -> SimpleNamespace:
        return self.runtime

    def load(self, content: bytes) -> LoadedEngine:
        self.loaded.append(content)
        return self.engine


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, hopper: None) -> FakeLoader:
    """Both engines in a version 10.9.0 that loads any bytes, on a Hopper GPU."""
    package = FakeLoader()
    for backend in TENSORRT, RTX:
        monkeypatch.setattr(backend, "version", lambda: "10.9.0")
        monkeypatch.setattr(backend, "_import", lambda: package)
        monkeypatch.setattr(backend, "_log", None)
        monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace())
    return package


def test_an_engine_for_later_versions_may_run_the_code_in_it(
    tmp_path: Path, loader: FakeLoader
) -> None:
    here = {"package": "tensorrt", "device": "NVIDIA H200"}
    TENSORRT.open(
        described(tmp_path / "x.engine", b"usual", version="10.9.0", **here), BuildOptions()
    )
    assert not loader.runtime.engine_host_code_allowed
    older = described(
        tmp_path / "x.engine", b"portable", version="10.8.0.43", version_compatible=True, **here
    )
    session = TENSORRT.open(older, BuildOptions())
    assert loader.runtime.engine_host_code_allowed
    assert loader.loaded == [b"usual", b"portable"]
    assert (session.inputs, session.outputs) == (("image",), ("score",))
    assert session.device == "NVIDIA H200"


def test_kernels_that_were_compiled_are_kept(tmp_path: Path, loader: FakeLoader) -> None:
    engine = described(tmp_path / "x.engine", b"an engine", version="10.9.0")
    options = BuildOptions(cache=tmp_path / "cache")
    with RTX.open(engine, options) as session:
        (config,) = loader.engine.contexts
        assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER"
        assert config.cuda_graph_strategy == "WHOLE_GRAPH_CAPTURE"
        # Layers are timed on the same kernels, and outside of a CUDA graph.
        assert session._to_profile is not None
        session._to_profile()
        alike = loader.engine.contexts[1]
        assert alike.dynamic_shapes_kernel_specialization_strategy == "EAGER"
        assert alike.cuda_graph_strategy == "DISABLED"
        assert alike.cache is config.cache
        assert not (tmp_path / "cache").exists()
    (file,) = (tmp_path / "cache").iterdir()
    assert re.fullmatch(r"tensorrt-rtx-10\.9\.0-sm_90-[0-9a-f]{16}\.runtime", file.name)
    assert file.read_bytes()[32:] == b"compiled;"

    with RTX.open(engine, options):
        assert loader.engine.contexts[-1].cache.content == b"compiled;"
    file.write_bytes(b"x" * 99)
    with RTX.open(engine, options):
        assert loader.engine.contexts[-1].cache.content == b""
    assert file.read_bytes()[32:] == b"compiled;"


@pytest.mark.parametrize(
    "other", [{"onnx_sha256": "b" * 64}, {"hardware_compatible": True}, {"inputs": ()}]
)
def test_kernels_of_another_engine_are_not_taken(
    tmp_path: Path, loader: FakeLoader, other: dict[str, Any]
) -> None:
    options = BuildOptions(cache=tmp_path / "cache")
    with RTX.open(described(tmp_path / "x.engine", b"one", version="10.9.0"), options):
        pass
    with RTX.open(described(tmp_path / "x.engine", b"two", version="10.9.0", **other), options):
        pass
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_without_a_cache_no_kernels_are_kept(tmp_path: Path, loader: FakeLoader) -> None:
    with RTX.open(described(tmp_path / "x.engine", b"one", version="10.9.0"), BuildOptions()):
        assert loader.engine.contexts[0].cache is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]


def test_tensorrt_compiles_nothing_when_it_loads(tmp_path: Path, loader: FakeLoader) -> None:
    engine = described(
        tmp_path / "x.engine", b"one", package="tensorrt", version="10.9.0", device="NVIDIA H200"
    )
    with TENSORRT.open(engine, BuildOptions(cache=tmp_path / "cache")):
        assert loader.engine.contexts == [None]
    assert not (tmp_path / "cache").exists()


# On a real GPU


@pytest.fixture(params=[TENSORRT, RTX], ids=lambda backend: backend.name)
def on_gpu(request: pytest.FixtureRequest) -> NvinferBackend:
    """The engine, where it can build for the GPU that is here, and run there."""
    backend: NvinferBackend = request.param
    reason = backend.unavailable() or backend.cannot_run()
    if reason:
        pytest.skip(reason)
    try:
        backend._targets(BuildOptions())
    except UsageError as refused:  # e.g. a Hopper GPU, which tensorrt-rtx doesn't support
        pytest.skip(str(refused))
    return backend


def weights_of(source: Artifact) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()).double()
        for tensor in onnx.load(source.path).graph.initializer
    }


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count)) - 0.5


@pytest.mark.gpu
def test_an_engine_computes_what_onnx_says(on_gpu: NvinferBackend, tmp_path: Path) -> None:
    source = residual_block(tmp_path / "block.onnx")
    ((engine, report),) = on_gpu.build(source, BuildOptions(cache=tmp_path), tmp_path)
    assert report.not_measured is None
    with on_gpu.open(engine, BuildOptions()) as opened:
        opened.bind([images(1)])
        opened.run()
        (score,) = opened.fetch()
        assert opened.device == torch.cuda.get_device_name()
    weights = weights_of(source)
    first = torch.conv2d(images(1).double(), weights["w1"], padding=1).relu()
    expected = (torch.conv2d(first, weights["w2"], padding=1) + first).relu()
    distance = (score.double() - expected).norm() / expected.norm()
    # float32 sums of 27 and 36 products are good to about 1e-6; TF32 would give about 1e-3.
    assert distance < 1e-5


@pytest.mark.gpu
def test_an_engine_runs_every_shape_of_its_profile(on_gpu: NvinferBackend, tmp_path: Path) -> None:
    source = open_batch(tmp_path / "open.onnx")
    options = BuildOptions(cache=tmp_path / "cache", shapes=batches(1, 8, 32))
    ((engine, _),) = on_gpu.build(source, options, tmp_path)
    with on_gpu.open(engine, options) as opened:
        for count in (1, 8, 32, 8, 1):
            opened.bind([images(count)])
            for _ in range(3):
                opened.run()
            (score,) = opened.fetch()
            expected = torch.conv2d(images(count).double(), weights_of(source)["w"])
            assert score.shape == expected.shape
            # float32 sums of 27 products; TF32 would give about 1e-3.
            assert (score.double() - expected).norm() / expected.norm() < 1e-5
        with pytest.raises(EngineError, match="it was built for 1x3x8x8 to 32x3x8x8"):
            opened.bind([images(33)])
    kept = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert kept == {f".{on_gpu.keeps}"}
    with on_gpu.open(engine, options) as opened:  # with what was kept
        opened.bind([images(8)])
        opened.run()


@pytest.mark.gpu
def test_each_layer_is_timed(on_gpu: NvinferBackend, tmp_path: Path) -> None:
    source = residual_block(tmp_path / "block.onnx")
    ((engine, _),) = on_gpu.build(source, BuildOptions(), tmp_path)
    with on_gpu.open(engine, BuildOptions()) as opened:
        opened.bind([images(1)])
        opened.run()
        (before,) = opened.fetch()
        layers = opened.layers()
        opened.run()
        (after,) = opened.fetch()
    assert torch.equal(before, after)
    assert {name for layer in layers for name in layer.nodes} >= {"first", "second"}
    timed = [layer.milliseconds for layer in layers if layer.milliseconds is not None]
    assert timed
    assert all(each >= 0 for each in timed)


@pytest.mark.gpu
def test_an_engine_of_another_gpu_is_not_opened(on_gpu: NvinferBackend, tmp_path: Path) -> None:
    source = residual_block(tmp_path / "block.onnx")
    ((engine, _),) = on_gpu.build(source, BuildOptions(), tmp_path)
    built = engine_file.read(engine.path)
    other = replace(built, target="sm_75", oldest_target="sm_75")
    engine_file.write(engine.path, engine.path.read_bytes(), other)
    with pytest.raises(EngineError, match="It was built for sm_75, and the GPU here is sm_"):
        on_gpu.open(engine, BuildOptions())
