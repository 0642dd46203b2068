"""The engine inspector's JSON, as TensorRT 10 and 11 write it, and times of layers."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optfuse.backends.inspector import inspected, parse, time_layers
from optfuse.stages import EngineLayer

TENSORRT_10 = (
    '{"Layers": [{"Name": "stem + relu", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x", '
    '"Location": "Device", "Dimensions": [1,3,8,8], "Format/Datatype": "Half"}], "Outputs": '
    '[{"Name": "y", "Location": "Device", "Dimensions": [1,4,8,8], "Format/Datatype": "Half"}], '
    '"ParameterType": "Convolution", "TacticName": "sm90_xmma_fprop", "TacticValue": "0x1", '
    '"StreamId": 0, "Metadata": "[ONNX Layer: stem]\x1e[ONNX Layer: relu]"}], "Bindings": ["x"]}'
)
TENSORRT_11 = {
    "Layers": [
        {
            "Name": "stem_myl0_1",
            "LayerType": "correlation",
            "Outputs": [{"Name": "y", "Dimensions": [1, 4, 8, 8], "Datatype": "Float"}],
            "TacticName": "",
            "StreamId": 2,
            "Metadata": "[ONNX Layer: stem][ONNX Layer: relu]",
        },
        {"Name": "wait_1", "LayerType": "wait", "StreamId": 1},
    ]
}


def test_layers_of_tensorrt_10_with_a_bare_separator_between_nodes() -> None:
    (layer,) = parse(TENSORRT_10)
    assert layer == EngineLayer(
        "stem + relu",
        "CaskConvolution",
        ("stem", "relu"),
        "Half [1,4,8,8], tactic sm90_xmma_fprop, stream 0",
    )


def test_layers_of_tensorrt_11() -> None:
    assert parse(json.dumps(TENSORRT_11)) == (
        EngineLayer("stem_myl0_1", "correlation", ("stem", "relu"), "Float [1,4,8,8], stream 2"),
        EngineLayer("wait_1", "wait", (), "stream 1"),
    )


def test_an_engine_built_without_details_gives_names() -> None:
    assert parse('{"Layers": ["a", "b"]}') == (EngineLayer("a", ""), EngineLayer("b", ""))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"Layers": 3}', '{"Layers": [3, null, {"Name": 4}, []]}', "[" * 9999],
)
def test_what_is_not_understood_is_passed_over(text: str) -> None:
    assert parse(text) == ()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
)


@given(st.dictionaries(st.sampled_from(list(TENSORRT_11["Layers"][0])), JSON))
def test_any_layer_is_read(layer: dict[str, Any]) -> None:
    found = parse(json.dumps({"Layers": [layer]}))
    assert len(found) == isinstance(layer.get("Name"), str)


def test_the_inspector_is_asked_for_the_shapes_that_are_set() -> None:
    asked: list[Any] = []
    inspector = SimpleNamespace(execution_context=None)

    def information(kind: str) -> str:
        asked.append((kind, inspector.execution_context))
        return TENSORRT_10

    inspector.get_engine_information = information
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    trt = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="JSON"))
    assert inspected(trt, engine, "a context") == parse(TENSORRT_10)
    assert asked == [("JSON", "a context")]


class Package:
    class IProfiler:
        pass


def test_the_median_of_each_layer() -> None:
    context = SimpleNamespace(profiler=None)
    times = iter([1.0, 9.0, 2.0])
    ran: list[bool] = []

    def run() -> None:
        ran.append(context.profiler is not None)
        if context.profiler is not None:
            context.profiler.report_layer_time("a", next(times))

    layers = (EngineLayer("a", "kgen"), EngineLayer("b", "wait"))
    timed = time_layers(Package, context, run, layers, 3)
    assert [layer.milliseconds for layer in timed] == [2.0, None]
    assert ran == [False, True, True, True]
