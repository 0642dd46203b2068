"""What only ONNX Runtime has: every ONNX type, providers, and its own ways to fail."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

from optfuse.backends.onnx_runtime import (  # noqa: E402
    CPU,
    CPU_BACKEND,
    CUDA,
    CUDA_BACKEND,
    ELEMENT_TYPES,
    TENSORRT_BACKEND,
)
from optfuse.errors import EngineError  # noqa: E402
from optfuse.stages import Artifact, BuildOptions, Program  # noqa: E402

pytestmark = pytest.mark.skipif(
    CPU_BACKEND.unavailable() is not None, reason=CPU_BACKEND.unavailable() or "it is here"
)


def saved(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> Artifact:
    graph = helper.make_graph(nodes, "example", inputs, outputs)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9, producer_name="test"
    )
    path.write_bytes(model.SerializeToString())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Artifact(path, "onnx", digest, path.stat().st_size)


def transpose(path: Path, element_type: int) -> Artifact:
    return saved(
        path,
        [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])],
        [helper.make_tensor_value_info("x", element_type, [2, 3])],
        [helper.make_tensor_value_info("y", element_type, [3, 2])],
    )


@pytest.fixture
def example(tmp_path: Path) -> Artifact:
    return transpose(tmp_path / "model.onnx", TensorProto.FLOAT)


@pytest.mark.parametrize("dtype_name", [name for name, _ in ELEMENT_TYPES.values()])
def test_every_type_goes_in_and_comes_out_bit_for_bit(tmp_path: Path, dtype_name: str) -> None:
    number = dict(ELEMENT_TYPES.values())[dtype_name]
    feed = torch.tensor([[1, 0, 3], [0.5, 5, 6]]).to(getattr(torch, dtype_name))
    with CPU_BACKEND.open(transpose(tmp_path / "model.onnx", number), BuildOptions()) as session:
        session.bind([feed])
        session.run()
        (output,) = session.fetch()
    assert output.dtype == feed.dtype
    assert output.double().tolist() == feed.T.double().tolist()


def test_the_numbers_of_the_types_are_onnxs_own() -> None:
    for dtype_name, number in ELEMENT_TYPES.values():
        onnx_name = {
            "float32": "FLOAT",
            "float64": "DOUBLE",
        }.get(dtype_name, dtype_name.upper())
        assert TensorProto.DataType.Value(onnx_name) == number


def test_empty_and_zero_dimensional_tensors_pass_through(tmp_path: Path) -> None:
    artifact = saved(
        tmp_path / "model.onnx",
        [
            helper.make_node("Neg", ["empty"], ["no_elements"]),
            helper.make_node("Neg", ["scalar"], ["one_element"]),
        ],
        [
            helper.make_tensor_value_info("empty", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("scalar", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("no_elements", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("one_element", TensorProto.FLOAT, []),
        ],
    )
    with CPU_BACKEND.open(artifact, BuildOptions()) as session:
        session.bind([torch.empty(0, 4), torch.tensor(2.5)])
        session.run()
        no_elements, one_element = session.fetch()
    assert no_elements.shape == (0, 4)
    assert one_element.shape == ()
    assert one_element.item() == -2.5


def test_a_dynamic_shape_may_change_from_one_bind_to_the_next(tmp_path: Path) -> None:
    artifact = saved(
        tmp_path / "model.onnx",
        [helper.make_node("Neg", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    with CPU_BACKEND.open(artifact, BuildOptions()) as session:
        for length in (2, 5):
            session.bind([torch.arange(length) + 1.5])
            session.run()
            assert session.fetch()[0].tolist() == [-1.5 - n for n in range(length)]


def test_the_options_are_the_ones_every_engine_gets(example: Artifact) -> None:
    with CPU_BACKEND.open(example, BuildOptions(threads=3)) as session:
        options = session._session.get_session_options()
        assert options.intra_op_num_threads == 3
        assert options.inter_op_num_threads == 1
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.graph_optimization_level.name == "ORT_ENABLE_ALL"


# --- Providers


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every package of every provider were installed."""
    monkeypatch.setattr("optfuse.backends.onnx_runtime.find_spec", lambda _: object())
    monkeypatch.setattr("optfuse.backends.onnx_runtime.package_version", lambda *_: "1.0")


def test_a_provider_that_does_not_work_is_an_error_and_no_fall_back(
    example: Artifact, installed: None
) -> None:
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(EngineError) as caught:
        CUDA_BACKEND.open(example, BuildOptions())
    assert caught.value.thing == (
        f"The engine 'onnxruntime-cuda' would not run '{example.path}' where it was asked to"
    )
    assert caught.value.cause == f"{CUDA} was asked for and {CPU} would run it"
    assert caught.value.next_step.startswith("Install the onnxruntime package that has it")


def test_each_engine_asks_for_its_own_provider_and_for_no_tf32(
    example: Artifact, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    asked: list[tuple[str, dict[str, str]]] = []

    class Stub:
        def __init__(
            self, *_: object, providers: list[tuple[str, dict[str, str]]], **__: object
        ) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return ["whatever else"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Stub)
    for backend in (CPU_BACKEND, CUDA_BACKEND, TENSORRT_BACKEND):
        with pytest.raises(EngineError, match="was asked for and whatever else would run it"):
            backend.open(example, BuildOptions())
    cuda = (CUDA, {"use_tf32": "0"})
    assert asked == [(CPU, {}), cuda, ("TensorrtExecutionProvider", {}), cuda]


def test_a_gpu_provider_needs_its_package_and_a_gpu(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optfuse.backends.onnx_runtime.gpu_count", lambda: 0)
    assert CUDA_BACKEND.unavailable() is None
    assert CUDA_BACKEND.cannot_run() == TENSORRT_BACKEND.cannot_run() == "no GPU"
    assert CPU_BACKEND.cannot_run() is None
    monkeypatch.setattr("optfuse.backends.onnx_runtime.package_version", lambda *_: None)
    reason = "The package onnxruntime-gpu is not installed: pip install 'optfuse[gpu]'"
    assert CUDA_BACKEND.unavailable() == CUDA_BACKEND.cannot_run() == reason


# --- Refusals


def test_a_missing_package_names_the_line_that_installs_it(
    example: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optfuse.backends.onnx_runtime.find_spec", lambda _: None)
    reason = "The package onnxruntime is not installed: pip install 'optfuse[cpu]'"
    assert CPU_BACKEND.unavailable() == CPU_BACKEND.cannot_run() == reason
    with pytest.raises(EngineError) as caught:
        CPU_BACKEND.open(example, BuildOptions())
    assert str(caught.value) == (
        "The engine 'onnxruntime' is not here. The package onnxruntime is not installed. "
        "Run: pip install 'optfuse[cpu]'."
    )
    monkeypatch.undo()
    assert importlib.util.find_spec("onnxruntime") is not None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "gone.onnx", "onnx", "", 0)
    with pytest.raises(EngineError, match="There is no such file") as caught:
        CPU_BACKEND.open(artifact, BuildOptions())
    assert str(artifact.path) in caught.value.thing


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    engine = Artifact(tmp_path / "model.engine", "engine", "", 0)
    with pytest.raises(EngineError, match="It reads ONNX files only") as caught:
        CPU_BACKEND.open(engine, BuildOptions())
    assert caught.value.next_step == "Export the program to ONNX first"


def test_a_captured_program_is_refused() -> None:
    linear = torch.nn.Linear(3, 2)
    exported = torch.export.export(linear, (torch.ones(1, 3),))
    program = Program("example", exported.module(check_guards=False), exported, ())
    with pytest.raises(EngineError, match="cannot open a captured program"):
        CPU_BACKEND.open(program, BuildOptions())


def test_what_is_wrong_with_a_file_is_said_without_onnx_runtimes_own_prefix(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = saved(
        tmp_path / "model.onnx",
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    with pytest.raises(EngineError, match="NoSuchOperator") as caught:
        CPU_BACKEND.open(artifact, BuildOptions())
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_shape_is_said_and_nothing_else_is_printed(
    example: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    with CPU_BACKEND.open(example, BuildOptions()) as session:
        with pytest.raises(EngineError, match="Got: 5 Expected: 3") as caught:
            session.bind([torch.ones(2, 5)])
        assert caught.value.thing == "The engine 'onnxruntime' failed to run the file"
        assert caught.value.next_step == "Give it inputs with the shapes it was exported for"
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_fails_is_one_sentence_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = saved(
        tmp_path / "model.onnx",
        [helper.make_node("Gather", ["x", "index"], ["y"], name="pick")],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("index", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with CPU_BACKEND.open(artifact, BuildOptions()) as session:
        with pytest.raises(EngineError, match=r"Name:'pick'.*out of data bounds") as caught:
            session.bind([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([7])])
        assert "\n" not in str(caught.value)
        session.bind([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2])])
        assert session.fetch()[0].tolist() == [3.0]
    assert capfd.readouterr() == ("", "")


def test_a_type_that_pytorch_lacks_is_refused_when_the_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"'x' has the type tensor\(string\)") as caught:
        CPU_BACKEND.open(transpose(tmp_path / "model.onnx", TensorProto.STRING), BuildOptions())
    assert caught.value.next_step == (
        "Change the model so that all its inputs and outputs are tensors of numbers"
    )


def test_a_precision_without_kernels_is_sent_to_another_engine(tmp_path: Path) -> None:
    types = [helper.make_tensor_value_info(each, TensorProto.BFLOAT16, [2, 2]) for each in "xy"]
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "g", types[:1], types[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "low.onnx"
    onnx.save(model, path)
    artifact = Artifact(path, "onnx", "", path.stat().st_size)
    with pytest.raises(EngineError, match="Could not find an implementation") as caught:
        CPU_BACKEND.open(artifact, BuildOptions())
    assert "with @openvino" in caught.value.next_step


def test_nothing_is_left_in_the_home_directory(tmp_path: Path) -> None:
    """ONNX Runtime 1.31 keeps a number of the machine there, unless told not to."""
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from optfuse import backends\n"
        "from optfuse.export import export_baseline\n"
        "from optfuse.stages import BuildOptions\n"
        "from tests.harness import captured\n"
        "program = captured(torch.nn.Linear(3, 2).eval(), torch.randn(1, 3))\n"
        "file = export_baseline(program, Path(sys.argv[1]) / 'net.onnx')\n"
        "with backends.get('onnxruntime').open(file, BuildOptions()) as session:\n"
        "    session.bind(program.example_args)\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert list(home.rglob("*")) == []
