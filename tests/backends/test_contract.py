"""One contract for every engine: all in BACKENDS are taken through the same assertions.

A test that needs an engine that is not here is skipped with the engine's own reason.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from optfuse.backends import BACKENDS, Backend, Session, get
from optfuse.errors import EngineError, UsageError
from optfuse.export import export
from optfuse.float64 import distance, run_float64
from optfuse.precision.floats import lower
from optfuse.stages import Artifact, BuildOptions, Program

# torch.export copies a tree specification in a way that PyTorch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

OPTIONS = BuildOptions(threads=1)
INPUTS, OUTPUTS = ("image", "scale"), ("features", "logits")


class Contract(nn.Module):
    """Two inputs of different shapes, two outputs in an order that a swap would break."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = torch.relu(self.convolution(image)) * scale
        return features, self.linear(features.mean((2, 3)))


def feeds(seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 9, 7, generator=random), torch.rand(8, 1, 1, generator=random) + 0.5]


def artifact_of(path: Path) -> Artifact:
    data = path.read_bytes()
    return Artifact(
        path,
        "onnx",
        hashlib.sha256(data).hexdigest(),
        len(data),
        input_names=INPUTS,
        output_names=OUTPUTS,
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Contract().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    exported = torch.export.export(model, tuple(feeds(0))).run_decompositions({})
    graph_module = exported.module(check_guards=False)
    return Program("contract", graph_module, exported, tuple(feeds(0)))


@pytest.fixture(scope="module")
def onnx_file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("contract") / "model.onnx"
    exported = torch.onnx.export(
        program.exported, input_names=INPUTS, output_names=OUTPUTS, verbose=False, dynamo=True
    )
    assert exported is not None
    exported.save(path)
    return artifact_of(path)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return get(request.param)


@pytest.fixture
def runnable(backend: Backend) -> Backend:
    """The engine, where it can run here."""
    if reason := backend.unavailable() or backend.cannot_run():
        pytest.skip(reason)
    return backend


@pytest.fixture
def session(
    runnable: Backend, program: Program, onnx_file: Artifact, tmp_path: Path
) -> Iterator[Session]:
    opened: Artifact | Program = program if runnable.consumes == "program" else onnx_file
    if runnable.builds:
        ((opened, _),) = runnable.build(onnx_file, OPTIONS, tmp_path)
    with runnable.open(opened, OPTIONS) as session:
        yield session


# --- What holds where the engine is missing, too


def test_an_engine_goes_by_the_name_it_is_listed_under() -> None:
    for name in BACKENDS:
        assert get(name).name == name
        assert get(name).consumes in ("onnx", "program")


def test_an_unknown_engine_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(UsageError, match="There is no engine 'tensorflow'") as caught:
        get("tensorflow")
    assert all(name in caught.value.cause for name in BACKENDS)
    assert caught.value.exit_code == 2


def test_a_missing_engine_names_the_line_that_installs_it(backend: Backend) -> None:
    reason = backend.unavailable()
    assert reason is None or "\n" not in reason
    if backend.version() is None:
        assert reason is not None
        assert "pip install" in reason


def test_a_reason_not_to_run_is_one_line(backend: Backend) -> None:
    reason = backend.cannot_run()
    assert reason is None or (reason.strip() == reason != "" and "\n" not in reason)


def test_asking_what_is_here_imports_neither_torch_nor_an_engine() -> None:
    program = (
        "import sys; from optfuse.backends import BACKENDS, get\n"
        "for name in BACKENDS: get(name).unavailable(), get(name).version()\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx'}"
        " & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_an_engine_without_a_build_step_builds_nothing(
    backend: Backend, onnx_file: Artifact, tmp_path: Path
) -> None:
    if backend.builds:
        pytest.skip(f"{backend.name} has a build step")
    assert backend.build(onnx_file, OPTIONS, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# --- What an engine makes of a precision


PRECISIONS = ("fp32", "fp16", "bf16", "int8")
ROUNDING = {"fp16": 2**-11, "bf16": 2**-8, "int8": 2**-8}
"""By how much a number is rounded at most, relative to itself; for int8 to the largest one."""


def in_precision(program: Program, onnx_file: Artifact, precision: str, path: Path) -> Program:
    """The program in a precision, and its ONNX file at a path."""
    if precision == "int8":
        onnx.save(_with_int8_convolutions(onnx.load(onnx_file.path)), path)
        return program
    program = lower(program, precision)
    export(program, path, input_names=INPUTS, output_names=OUTPUTS)
    return program


def _with_int8_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each convolution with a quantisation of its data and its weight in front of it."""
    graph = model.graph
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for place, name in enumerate(node.input[:2] if node.op_type == "Conv" else ()):
            # Four deviations of a normal distribution fit.
            scale = np.float32(np.abs(weights.get(name, np.float32(4))).max() / 127)
            values = {"scale": scale, "zero": np.int8(0)}
            for key, value in values.items():
                graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}_{key}"))
            by = [f"{name}_scale", f"{name}_zero"]
            for kind, read, gives in (
                ("QuantizeLinear", name, f"{name}_int8"),
                ("DequantizeLinear", f"{name}_int8", f"{name}_again"),
            ):
                nodes.append(onnx.helper.make_node(kind, [read, *by], [gives]))
            node.input[place] = f"{name}_again"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_is_refused_in_one_line_or_not_at_all(backend: Backend, precision: str) -> None:
    reason = backend.refuses(precision)
    assert reason is None or (reason.strip() == reason != "" and "\n" not in reason)
    assert precision != "fp32" or reason is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_computed_instead_is_one_sentence_without_a_full_stop(
    backend: Backend, precision: str
) -> None:
    instead = backend.widens(precision)
    if instead is not None:
        assert precision != "fp32"
        assert backend.refuses(precision) is None
        assert f" computes {precision} in float32" in instead
        assert re.fullmatch(r"[A-Z].*[^.\s]", instead)


def test_onnx_runtime_computes_fp16_in_float32_on_a_cpu_as_it_says(
    program: Program, onnx_file: Artifact, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert get("onnxruntime").widens("fp16") == "ONNX Runtime computes fp16 in float32 on a CPU"
    assert get("onnxruntime-cuda").widens("fp16") is None
    path = tmp_path / "fp16.onnx"
    in_precision(program, onnx_file, "fp16", path)
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "ran.onnx")
    settings.log_severity_level = 4  # a file that is for this machine alone is warned of
    onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    for file, dtype in ((path, "FLOAT16"), (tmp_path / "ran.onnx", "FLOAT")):
        weights = [each for each in onnx.load(file).graph.initializer if len(each.dims) > 1]
        kinds = {onnx.TensorProto.DataType.Name(each.data_type) for each in weights}
        assert kinds == {dtype}, file.name


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_precision_that_is_not_refused_runs_and_another_does_not(
    runnable: Backend, program: Program, onnx_file: Artifact, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / f"{precision}.onnx"
    opened: Artifact | Program = in_precision(program, onnx_file, precision, path)
    if runnable.refuses(precision) is not None:
        if runnable.consumes == "program":
            assert precision == "int8"  # which is no captured program
            return
        with pytest.raises(EngineError):
            runnable.open(artifact_of(path), OPTIONS)
        return
    if runnable.consumes == "onnx":
        opened = artifact_of(path)
    if runnable.builds:
        ((opened, _),) = runnable.build(artifact_of(path), OPTIONS, tmp_path)
    with runnable.open(opened, OPTIONS) as session:
        session.bind(feeds(1))
        session.run()
        outputs = session.fetch()
    for output, exact in zip(outputs, run_float64(program.graph_module, feeds(1), {}), strict=True):
        assert output.dtype is torch.float32
        # Two layers round their weights, what they read and what they give, and one product
        # between them does: eight roundings in a row.
        assert distance([exact], [output.double()]) < 8 * ROUNDING[precision]


# --- What a session does


def test_a_session_computes_what_the_model_computes(session: Session, model: nn.Module) -> None:
    session.bind(feeds(1))
    session.run()
    outputs = session.fetch()
    with torch.inference_mode():
        expected = model(*feeds(1))
    assert len(outputs) == len(session.outputs) == 2
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.device.type == "cpu"
        # float32 sums of 27 and of 63 products in another order: some 1e-6 of the values' size.
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


def test_a_session_names_its_inputs_in_order(session: Session) -> None:
    assert session.inputs == INPUTS


def test_a_session_says_what_runs_it(session: Session) -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_name(0)
    assert session.device in ("cpu", on_gpu)


def test_new_inputs_give_new_outputs_and_old_inputs_the_old_ones(session: Session) -> None:
    results = []
    for seed in (1, 2, 1):
        session.bind(feeds(seed))
        session.run()
        results.append(session.fetch())
    assert not torch.equal(results[0][0], results[1][0])
    # The same engine on the same input: 1e-6 allows for a reduction with atomics on a GPU.
    torch.testing.assert_close(results[0], results[2], rtol=1e-6, atol=1e-6)


def test_fetched_outputs_are_the_callers_own(session: Session) -> None:
    session.bind(feeds(1))
    session.run()
    kept = [output.clone() for output in session.fetch()]
    for output in session.fetch():
        output.fill_(-1.0)
    assert all(map(torch.equal, session.fetch(), kept))


def test_fetched_outputs_are_not_overwritten_by_the_next_run(session: Session) -> None:
    session.bind(feeds(1))
    session.run()
    outputs = session.fetch()
    kept = [output.clone() for output in outputs]
    session.bind(feeds(2))
    session.run()
    assert all(map(torch.equal, outputs, kept))


def test_a_run_leaves_the_inputs_alone(session: Session) -> None:
    given = feeds(1)
    session.bind(given)
    session.run()
    session.run()
    assert all(map(torch.equal, given, feeds(1)))


def test_an_input_need_not_be_contiguous(session: Session) -> None:
    image, scale = feeds(1)
    session.bind([image, scale])
    session.run()
    straight = session.fetch()
    session.bind([image.mT.contiguous().mT, scale])
    session.run()
    # 1e-6: another memory layout may choose another kernel, with another order of summation.
    torch.testing.assert_close(session.fetch(), straight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_wrong_number_of_inputs_is_refused(session: Session, given: int) -> None:
    with pytest.raises(EngineError) as caught:
        session.bind((feeds(1) * 2)[:given])
    assert re.findall(r"\d+", caught.value.cause) == ["2", str(given)]
    assert caught.value.exit_code == 4


def test_a_wrong_dtype_is_refused_by_the_inputs_name(session: Session) -> None:
    image, scale = feeds(1)
    with pytest.raises(EngineError, match="input 'scale'") as caught:
        session.bind([image, scale.double()])
    assert "float32" in caught.value.cause
    assert "float64" in caught.value.cause


def test_a_wrong_shape_is_refused(session: Session) -> None:
    image, scale = feeds(1)

    def bind_and_run() -> None:
        session.bind([image[:, :2].contiguous(), scale])
        session.run()

    with pytest.raises(EngineError) as caught:
        bind_and_run()
    assert "\n" not in str(caught.value)


def test_nothing_runs_before_it_has_inputs(session: Session) -> None:
    with pytest.raises(EngineError, match="No inputs were bound"):
        session.run()


def test_what_cannot_be_opened_is_an_engine_error(runnable: Backend, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no model")
    with pytest.raises(EngineError) as caught:
        runnable.open(artifact_of(path), OPTIONS)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)
