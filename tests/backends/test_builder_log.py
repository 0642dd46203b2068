"""The parser of the build log, on logs that TensorRT-RTX 1.7 wrote and on everything else."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optfuse.backends.builder_log import BuilderLog, parse

DATA = Path(__file__).parent / "data"
SMALL = (DATA / "small_convolutions_rtx_1.7.log").read_text()
CUT = (DATA / "googlenet_cut_rtx_1.7.log").read_text()


def kinds(log: BuilderLog) -> list[str]:
    return [layer.kind for layer in log.layers]


def test_the_layer_table_of_a_small_network() -> None:
    log = parse(SMALL)
    assert kinds(log) == ["kgen", "correlation", "maxpool"] + ["correlation"] * 7 + ["kgen"] * 3
    assert log.activation_bytes == 8278016
    assert log.weight_bytes == 69312


def test_the_onnx_nodes_behind_each_layer() -> None:
    nodes = {layer.name: layer.nodes for layer in parse(SMALL).layers}
    assert nodes["node_conv2d_myl0_1"] == ("node_conv2d", "node_relu")
    assert nodes["node_conv2d_7_myl0_9"] == ("node_conv2d_7", "node_relu_7", "node_add")
    # One Gemm became two kernels; both name it.
    assert nodes["__myl_ReshMulSum_myl0_11"] == ("node_linear",)
    assert nodes["__myl_Add_myl0_12"] == ("node_linear",)
    # A change of layout that the builder put in by itself.
    assert nodes["__myl_Move_myl0_0"] == ()


def test_the_details_of_a_layer() -> None:
    details = {layer.name: layer.details for layer in parse(SMALL).layers}
    assert (
        details["node_conv2d_myl0_1"] == "Float [1,16,16,16], tactic __myelin_CASK_STUB, stream 0"
    )


def test_a_log_that_breaks_off_in_the_middle_of_a_layer() -> None:
    log = parse(CUT)
    assert kinds(log) == [
        *("kgen", "correlation", "maxpool", "correlation", "correlation", "maxpool"),
        *("signal", "maxpool", "correlation", "wait", "correlation", "correlation"),
    ]
    assert log.layers[-2].nodes == ("node_Conv_773", "node_relu_6")
    assert log.layers[-1].name == "node_Conv_776_myl0_11"
    assert log.layers[-1].nodes == ()
    assert log.layers[6].details == "stream 0"  # a signal has no kernel and no output
    assert (log.activation_bytes, log.weight_bytes) == (35374080, 26443008)


def test_tensors_of_the_network_are_not_layers() -> None:
    assert "I/O Tensors:" in SMALL
    assert not {"image", "score"} & {layer.name for layer in parse(SMALL).layers}


def test_the_record_separator_between_nodes_does_not_end_the_line() -> None:
    # TensorRT 10 writes U+001E between two nodes, which str.splitlines takes for a line break.
    log = parse(
        "[V] [TRT] Layers:\n"
        "Name: a + b, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, "
        "Dimensions: [1,3,8,8], Format/Datatype: Half }], Outputs: [ { Name: y, "
        "Location: Device, Dimensions: [1,4,8,8], Format/Datatype: Half }], Groups: 1, "
        "TacticName: some_kernel, TacticValue: 0x1, StreamId: 2, "
        "Metadata: [ONNX Layer: a]\x1e[ONNX Layer: b]\x1e[ONNX Layer: a]\n"
    )
    (layer,) = log.layers
    assert (layer.name, layer.kind) == ("a + b", "CaskConvolution")
    assert layer.nodes == ("a", "b")
    assert layer.details == "Half [1,4,8,8], tactic some_kernel, stream 2"


def test_a_node_name_may_hold_brackets() -> None:
    log = parse("Layers:\nName: n, LayerType: kgen, Metadata: [ONNX Layer: x[0]][ONNX Layer: y]\n")
    assert log.layers[0].nodes == ("x[0]", "y")


def test_the_last_of_several_builds_counts() -> None:
    log = parse(f"{CUT}\n\n{SMALL}")
    assert log == parse(SMALL)


@pytest.mark.parametrize("text", ["", "Layers:", "Layers:\nName: x", "Name: x, LayerType: kgen, "])
def test_a_log_without_a_layer_table(text: str) -> None:
    assert parse(text) == BuilderLog((), None, None)


def test_a_number_that_cannot_be_one() -> None:
    assert parse("Total Activation Memory: " + "7" * 5000).activation_bytes is None


def test_a_huge_hostile_line_is_read() -> None:
    # Two million characters: anything but linear time would not come back.
    count = 100_000
    log = parse("Layers:\nName: n, LayerType: k, " + "Metadata: [ONNX Layer: " * count)
    assert len(log.layers) == 1


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert parse(text).layers == ()


@given(st.integers(0, len(SMALL)))
def test_a_cut_log_gives_a_beginning_of_its_layers(length: int) -> None:
    whole, cut = parse(SMALL).layers, parse(SMALL[:length]).layers
    # The cut can only have damaged the last one.
    assert cut[:-1] == whole[: len(cut[:-1])]
    assert len(cut) <= len(whole)


@given(st.integers(0, len(SMALL)), st.integers(0, len(SMALL)), st.text(max_size=40))
def test_foreign_text_in_a_log_is_survived(start: int, end: int, foreign: str) -> None:
    log = parse(SMALL[: min(start, end)] + foreign + SMALL[max(start, end) :])
    assert len(log.layers) <= SMALL.count("Name: ")
