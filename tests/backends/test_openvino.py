"""What only OpenVINO has: its types, its settings, its manners, and its own ways to fail."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

from optfuse.backends import openvino as module  # noqa: E402
from optfuse.backends.openvino import BACKEND, ELEMENT_TYPES, INT8_SCHEME  # noqa: E402
from optfuse.errors import EngineError  # noqa: E402
from optfuse.precision.int8 import SCHEME, SCHEMES  # noqa: E402
from optfuse.stages import Artifact, BuildOptions, Program  # noqa: E402

here = pytest.mark.skipif(
    BACKEND.unavailable() is not None, reason=BACKEND.unavailable() or "it is here"
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


def transpose(path: Path, element_type: int = TensorProto.FLOAT) -> Artifact:
    return saved(
        path,
        [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])],
        [helper.make_tensor_value_info("x", element_type, [2, 3])],
        [helper.make_tensor_value_info("y", element_type, [3, 2])],
    )


@pytest.fixture
def example(tmp_path: Path) -> Artifact:
    return transpose(tmp_path / "model.onnx")


# --- Types


@here
@pytest.mark.parametrize("dtype_name", ELEMENT_TYPES.values())
def test_every_type_goes_in_and_comes_out_bit_for_bit(tmp_path: Path, dtype_name: str) -> None:
    number = getattr(TensorProto, {"float32": "FLOAT"}.get(dtype_name, dtype_name.upper()))
    feed = torch.tensor([[1, 0, 3], [0.5, 5, 6]]).to(getattr(torch, dtype_name))
    with BACKEND.open(transpose(tmp_path / "model.onnx", number), BuildOptions()) as session:
        session.bind([feed])
        session.run()
        (output,) = session.fetch()
    assert output.dtype == feed.dtype
    assert output.double().tolist() == feed.T.double().tolist()


@here
def test_float64_is_refused_because_it_would_be_computed_in_float32(tmp_path: Path) -> None:
    artifact = transpose(tmp_path / "model.onnx", TensorProto.DOUBLE)
    with pytest.raises(EngineError, match="'x' is float64, which OpenVINO computes in float32"):
        BACKEND.open(artifact, BuildOptions())


@here
@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_numbers_that_it_would_cut_off_are_refused(tmp_path: Path, value: int) -> None:
    artifact = transpose(tmp_path / "model.onnx", TensorProto.INT64)
    with BACKEND.open(artifact, BuildOptions()) as session:
        with pytest.raises(EngineError, match="values that need more") as caught:
            session.bind([torch.full((2, 3), value)])
        assert caught.value.thing == "The engine 'openvino' cannot bind the input 'x'"
        nearest = value - 1 if value > 0 else value + 1
        session.bind([torch.full((2, 3), nearest)])
        assert session.fetch()[0].tolist() == [[nearest] * 2] * 3


@here
def test_a_type_that_pytorch_lacks_is_refused_when_the_file_is_opened(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'x' has the type string") as caught:
        BACKEND.open(transpose(tmp_path / "model.onnx", TensorProto.STRING), BuildOptions())
    assert caught.value.next_step == (
        "Change the model so that all its inputs and outputs are tensors of numbers"
    )


@here
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
    with BACKEND.open(artifact, BuildOptions()) as session:
        session.bind([torch.empty(0, 4), torch.tensor(2.5)])
        session.run()
        no_elements, one_element = session.fetch()
    assert no_elements.shape == (0, 4)
    assert one_element.shape == ()
    assert one_element.item() == -2.5


# --- Settings


@here
def test_a_dynamic_shape_may_change_from_one_bind_to_the_next(tmp_path: Path) -> None:
    artifact = saved(
        tmp_path / "model.onnx",
        [helper.make_node("Neg", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    with BACKEND.open(artifact, BuildOptions()) as session:
        for length in (2, 5):
            session.bind([torch.arange(length) + 1.5])
            session.run()
            assert session.fetch()[0].tolist() == [-1.5 - n for n in range(length)]


@here
def test_it_computes_in_float32_on_as_many_threads_as_asked_for(example: Artifact) -> None:
    with BACKEND.open(example, BuildOptions(threads=1)) as session:
        compiled = session._compiled
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
        assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
        assert compiled.get_property("PERFORMANCE_HINT") == "LATENCY"
        assert compiled.get_property("ENABLE_CPU_PINNING") is False
        assert compiled.get_property("EXECUTION_DEVICES") == ["CPU"]
        assert session.device == "cpu"


@here
def test_another_device_than_the_cpu_is_an_error_and_no_fall_back(
    example: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compiled:
        def get_property(self, _: str) -> list[str]:
            return ["TEMPLATE"]

    class Core:
        def compile_model(self, *_: object) -> Compiled:
            return Compiled()

    with BACKEND.open(example, BuildOptions()):  # OpenVINO is imported, as it should be
        pass
    monkeypatch.setattr(sys.modules["openvino"], "Core", Core)
    with pytest.raises(EngineError, match="CPU was asked for and TEMPLATE would run it"):
        BACKEND.open(example, BuildOptions())


# --- Precisions


def convolution(path: Path, element_type: int) -> Artifact:
    weight = helper.make_tensor("w", element_type, [4, 3, 3, 3], [0.25, -1.5, 3.0] * 36)
    give = helper.make_node("Constant", [], ["w"], value=weight)
    return saved(
        path,
        [give, helper.make_node("Conv", ["x", "w"], ["y"])],
        [helper.make_tensor_value_info("x", element_type, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", element_type, [1, 4, 6, 6])],
    )


@here
@pytest.mark.parametrize(
    ("precision", "element_type", "own"),
    [
        ("fp32", TensorProto.FLOAT, "f32"),
        ("fp16", TensorProto.FLOAT16, "f16"),
        ("bf16", TensorProto.BFLOAT16, "bf16"),
    ],
)
def test_what_it_says_to_widen_ran_in_float32_and_the_rest_as_it_is(
    tmp_path: Path, precision: str, element_type: int, own: str
) -> None:
    with BACKEND.open(convolution(tmp_path / "model.onnx", element_type), BuildOptions()) as found:
        layers = [each.get_rt_info() for each in found._compiled.get_runtime_model().get_ops()]
    [ran] = [
        each["runtimePrecision"].astype(str)
        for each in layers
        if each["layerType"].astype(str) == "Convolution"
    ]
    assert ran == (own if BACKEND.widens(precision) is None else "f32")


@pytest.mark.parametrize("known", [[], ["FP32", "INT8"], ["FP32", "BF16"]])
def test_bf16_is_widened_where_the_cpu_plugin_does_not_name_it(
    monkeypatch: pytest.MonkeyPatch, known: list[str]
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    monkeypatch.setattr(module, "_capabilities", lambda: known)
    said = None if "BF16" in known else "OpenVINO computes bf16 in float32 on this CPU"
    assert BACKEND.widens("bf16") == said
    assert BACKEND.widens("fp32") is BACKEND.widens("int8") is None


def test_nothing_is_asked_of_a_package_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert BACKEND.widens("bf16") is None
    assert BACKEND.widens("fp16") == "OpenVINO computes fp16 in float32"


def signed(artifact: Artifact, scheme: str) -> Artifact:
    model = onnx.load(artifact.path)
    helper.set_model_props(model, {"other": "left alone", SCHEME: scheme})
    onnx.save(model, artifact.path)
    return artifact


def test_the_key_in_the_metadata_is_the_one_that_is_written() -> None:
    assert INT8_SCHEME == SCHEME
    assert "openvino" in SCHEMES


@here
@pytest.mark.parametrize("scheme", [*sorted(SCHEMES.keys() - {"openvino"}), "of a later version"])
def test_int8_for_another_engine_is_refused_before_anything_is_compiled(
    example: Artifact, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with BACKEND.open(signed(example, "openvino"), BuildOptions()) as session:
        assert session.inputs == ("x",)
    monkeypatch.setattr(sys.modules["openvino"], "Core", None)
    with pytest.raises(EngineError) as caught:
        BACKEND.open(signed(example, scheme), BuildOptions())
    assert str(caught.value) == (
        f"The engine 'openvino' cannot open '{example.path}'. Its int8 was written for {scheme}, "
        "and OpenVINO crashes on some such files and computes others wrongly. Give --engine "
        "openvino when optimizing, or use model.openvino.onnx where that is beside it."
    )
    assert caught.value.exit_code == 4


# --- Manners


@here
def test_nothing_is_reported_to_its_makers(example: Artifact, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from optfuse.backends.openvino import BACKEND\n"
        "from optfuse.stages import Artifact, BuildOptions\n"
        f"BACKEND.open(Artifact(Path({str(example.path)!r}), 'onnx', '', 0), BuildOptions())\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"HOME": str(home), "PYTHONPATH": ":".join(sys.path)},
    )
    assert answer.stdout.strip() == "[]"
    assert list(home.iterdir()) == []


@here
def test_the_inputs_are_read_where_they_lie(example: Artifact) -> None:
    feed = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with BACKEND.open(example, BuildOptions()) as session:
        session.bind([feed])
        feed[0, 1] = 7.0
        session.run()
        assert session.fetch()[0].tolist() == [[1.0, 4.0], [7.0, 5.0], [3.0, 6.0]]


# --- Refusals


def test_a_missing_package_names_the_line_that_installs_it(
    example: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optfuse.backends.openvino.find_spec", lambda _: None)
    reason = "The package openvino is not installed: pip install 'optfuse[openvino]'"
    assert BACKEND.unavailable() == BACKEND.cannot_run() == reason
    with pytest.raises(EngineError) as caught:
        BACKEND.open(example, BuildOptions())
    assert str(caught.value) == (
        "The engine 'openvino' is not here. The package openvino is not installed. "
        "Run: pip install 'optfuse[openvino]'."
    )


@here
def test_a_missing_file_is_named(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "gone.onnx", "onnx", "", 0)
    with pytest.raises(EngineError, match="There is no such file") as caught:
        BACKEND.open(artifact, BuildOptions())
    assert str(artifact.path) in caught.value.thing


@here
def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    engine = Artifact(tmp_path / "model.engine", "engine", "", 0)
    with pytest.raises(EngineError, match="It reads ONNX files only") as caught:
        BACKEND.open(engine, BuildOptions())
    assert caught.value.next_step == "Export the program to ONNX first"


@here
def test_a_captured_program_is_refused() -> None:
    linear = torch.nn.Linear(3, 2)
    exported = torch.export.export(linear, (torch.ones(1, 3),))
    program = Program("example", exported.module(check_guards=False), exported, ())
    with pytest.raises(EngineError, match="cannot open a captured program"):
        BACKEND.open(program, BuildOptions())


@here
def test_what_is_no_model_is_said_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no model")
    with pytest.raises(EngineError) as caught:
        BACKEND.open(Artifact(path, "onnx", "", 16), BuildOptions())
    assert caught.value.cause == "Model can't be parsed"
    assert capfd.readouterr() == ("", "")


@here
def test_an_unknown_operator_is_named_without_the_places_in_openvinos_source(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = saved(
        tmp_path / "model.onnx",
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    with pytest.raises(EngineError, match=r"No conversion rule.*NoSuchOper") as caught:
        BACKEND.open(artifact, BuildOptions())
    assert "src/" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@here
def test_a_wrong_shape_is_said_with_the_one_it_takes(
    example: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    with BACKEND.open(example, BuildOptions()) as session:
        with pytest.raises(EngineError, match=r"shape=\[2,3\].*shape=\(2\.5\)") as caught:
            session.bind([torch.ones(2, 5)])
        assert caught.value.thing == "The engine 'openvino' failed to run the file"
        assert caught.value.next_step == "Give it inputs with the shapes it was exported for"
        assert "src/" not in str(caught.value)
        with pytest.raises(EngineError, match="No inputs were bound"):
            session.run()
    assert capfd.readouterr() == ("", "")


def test_a_failure_in_a_run_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from optfuse.backends.openvino import OpenVinoSession

    class Request:
        def infer(self, **_: object) -> None:
            raise RuntimeError(
                "Exception from src/inference/src/cpp/infer_request.cpp:223:\n"
                "Check 'x == y' failed at src/plugins/intel_cpu/src/node.cpp:7:\n"
                "The sizes\ndo not fit.\n\n"
            )

    class Compiled:
        inputs: tuple[Any, ...] = ()
        outputs: tuple[Any, ...] = ()

        def create_infer_request(self) -> Request:
            return Request()

    session = OpenVinoSession(Compiled())
    session._is_bound = True
    with pytest.raises(EngineError) as caught:
        session.run()
    assert caught.value.cause == "The sizes: do not fit"
