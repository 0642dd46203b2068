"""Sentences made of what TensorRT-RTX 1.7 really logged."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import helper

from optfuse.backends.nvinfer_log import build_failure, parse_failure, profile_failure, sentence_of

LOCATIONS = (
    " In processCheck at /_src/optimizer/shapeof/graphShapeAnalyzer.cpp:1066"
    " In analyzeShapes at /_src/optimizer/shapeof/graphShapeAnalyzer.cpp:2825"
)
CALL = "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error "
ANOTHER = (
    " [checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is "
    "insufficient for CUDA runtime version))"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the nodes `best` and, of the module `head.view`, `view`."""
    view = helper.make_node("Reshape", ["x", "s"], ["y"], name="view")
    note = view.metadata_props.add()
    note.key, note.value = "pkg.torch.onnx.name_scopes", "['', 'head', 'head.view', 'view']"
    best = helper.make_node("TopK", ["x", "k"], ["v", "i"], name="best")
    path = tmp_path_factory.mktemp("onnx") / "x.onnx"
    onnx.save(helper.make_model(helper.make_graph([view, best], "g", [], [])), path)
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", ""),
        ("Out of memory.", "Out of memory."),
        ("Two\nlines In build at /_src/b.cpp:12", "Two lines"),
        (f"{CALL}(node: too large.{LOCATIONS})", "node: too large."),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] "
            "Cannot compile for target(s) sm75, because of b16. In compileGraph at /_src/c.cpp:9)",
            "Cannot compile for target(s) sm75, because of b16.",
        ),
        (
            "Invalid Node - mm ITensor::getDimensions: Error Code 4: API Usage Error (mm: 3 and 4 "
            f"must match.){ANOTHER}",
            "mm: 3 and 4 must match.",
        ),
    ],
)
def test_one_line_without_places_in_the_packages_source(text: str, sentence: str) -> None:
    assert sentence_of([text]) == sentence
    assert sentence_of([]) == "It gave no reason"


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        (
            "ITopKLayer best: best: K exceeds the maximum value allowed (3840).",
            "Its builder stopped at the node 'best' (TopK): K exceeds the maximum value allowed "
            "(3840).",
        ),
        (
            "Could not find any implementation for node {ForeignNode[view...best]}.",
            "Its builder stopped at the node 'view' (Reshape) of the module 'head.view': Could not "
            "find any implementation for node {ForeignNode[view...best]}.",
        ),
        ("Out of memory.", "Out of memory."),
    ],
)
def test_the_last_error_of_a_build_with_its_node_and_module(
    file: Path, reason: str, sentence: str
) -> None:
    log = [("ERROR", "first"), ("ERROR", f"{CALL}({reason}{LOCATIONS})"), ("INFO", "done")]
    assert build_failure(log, file) == sentence


def parser_error(description: str, node: str, operator: str) -> Any:
    return SimpleNamespace(
        desc=lambda: description, node_name=lambda: node, node_operator=lambda: operator
    )


@pytest.mark.parametrize(
    ("description", "cause"),
    [
        ("false", "It does not support that operator there"),
        (
            'creator && "Plugin not found, are the plugin name, version right?"',
            "Plugin not found, are the plugin name, version right?",
        ),
        (
            "Assertion failed: status.is_success(): Found unsupported input type of UINT8.",
            "Found unsupported input type of UINT8.",
        ),
        (
            "Assertion failed: f(x) == Version::kV3: NonZero version 1 was not found",
            "NonZero version 1 was not found",
        ),
        (
            f"Invalid Node - view A::b: Error Code 4: API Usage Error (view: too large.){ANOTHER}",
            "too large.",
        ),
    ],
)
def test_a_parsers_error_with_its_node_and_module(file: Path, description: str, cause: str) -> None:
    assert parse_failure(parser_error(description, "view", "Reshape"), file) == (
        f"Its parser stopped at the node 'view' (Reshape) of the module 'head.view': {cause}"
    )


def test_a_parsers_error_at_a_node_that_the_file_does_not_show(file: Path) -> None:
    assert parse_failure(parser_error("false", "inner", "Det"), file) == (
        "Its parser stopped at the node 'inner' (Det): It does not support that operator there"
    )
    assert parse_failure(parser_error("false", "", "Det"), file) == (
        "Its parser stopped at a node without a name (Det): It does not support that operator there"
    )
    assert parse_failure(parser_error("Failed to import w1", "", ""), file) == "Failed to import w1"


def test_shapes_of_a_profile_that_cannot_be(file: Path) -> None:
    warning = (
        "Profile kMAX values are not self-consistent. view: size of the output cannot be negative "
        "In operator() at /_src/runtime/core/shapeMachine.cpp:628 Instruction: CHECK_LESS 1 1."
    )
    log = [("INFO", "fine"), ("WARNING", "Make sure that it fits"), ("WARNING", warning)]
    assert profile_failure(log, file) == (
        "The network cannot run at its largest shapes, at the node 'view' (Reshape) of the module "
        "'head.view': size of the output cannot be negative Instruction: CHECK_LESS 1 1."
    )
    error = (
        "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kOPT values for profile 0 "
        f"violate shape constraints: IShuffleLayer best: 8 and 56 differ{LOCATIONS})"
    )
    assert profile_failure([("ERROR", error)], file) == (
        "The network cannot run at its usual shapes, at the node 'best' (TopK): 8 and 56 differ"
    )
    assert profile_failure([("VERBOSE", warning), ("ERROR", "Out of memory")], file) is None
