"""A model in the precision that was asked for: its files and programs, and what is told of them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from models import digits
from optfuse import backends
from optfuse.compare import drift
from optfuse.errors import UsageError
from optfuse.lower import (
    Timing,
    lower,
    with_random_data,
)
from optfuse.precision import trials
from optfuse.precision.lowered import Lowered, told
from optfuse.precision.plan import Plan, check
from optfuse.stages import Artifact, BuildOptions, Program
from tests.harness import captured, optimized

ENGINES = ("onnxruntime", "openvino", "tensorrt-rtx")


@cache
def before() -> Program:
    return captured(digits.build(), *digits.example_inputs(), name="digits")


@cache
def after() -> Program:
    return optimized(before(), "all")


@cache
def samples() -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """To calibrate on, and to judge by: 32 images and 32 others."""
    with np.load(digits.HELD_OUT) as arrays:
        images = torch.from_numpy(arrays["input"])[:64]
    calibrating, judging = trials.split([[image[None]] for image in images])
    return calibrating, judging


def plan(precision: Any, **options: Any) -> Plan:
    calibrating, judging = samples()
    return Plan(precision, calibration=calibrating, judging=judging, **options)


def lowered(folder: Path, asked: Plan, **options: Any) -> Lowered:
    check(asked)
    return lower(
        after(),
        asked,
        folder / "model.onnx",
        captured=before(),
        engines=options.pop("engines", ENGINES),
        input_names=("image",),
        output_names=("logits",),
        **options,
    )


def types(artifact: Artifact) -> Counter[str]:
    """How many weights of more than one number there are of each type."""
    model = onnx.load(artifact.path)
    return Counter(
        TensorProto.DataType.Name(each.data_type)
        for each in model.graph.initializer
        if len(each.dims) >= 2
    )


def far_from_float64(artifact: Artifact) -> float:
    """Relative L2 over all images that are judged by, on ONNX Runtime."""
    _, judging = samples()
    outputs: list[torch.Tensor] = []
    with backends.get("onnxruntime").open(artifact, BuildOptions(threads=1)) as session:
        for sample in judging:
            session.bind(sample)
            session.run()
            outputs += session.fetch()
    reference = trials.float64_outputs(before(), judging)
    return drift(
        outputs, reference, engine="onnxruntime", variant="optimized", reference_name="float64"
    ).relative_l2


def test_float32_is_the_program_as_it_is(tmp_path: Path) -> None:
    found = lowered(tmp_path, Plan())
    assert found.program is after()
    assert found.step is None
    assert told(found) is None
    assert set(types(found.artifact)) == {"FLOAT"}
    assert found.artifact.input_names == ("image",)
    assert all(found.file_for(engine) is found.artifact for engine in ENGINES)


# What a rounding to so many bits of mantissa may do to logits through 20 layers: each layer adds
# about one rounding, 2^-11 or 2^-8, and they add like a random walk, sqrt(20) < 5, with as much
# again for casts.
@pytest.mark.parametrize(
    ("precision", "weights", "limit"),
    [("fp16", "FLOAT16", 10 * 2**-11), ("bf16", "BFLOAT16", 10 * 2**-8)],
)
def test_half_precisions_are_in_the_file_and_in_the_program(
    tmp_path: Path, precision: str, weights: str, limit: float
) -> None:
    found = lowered(tmp_path, plan(precision))
    assert found.program is not None
    assert types(found.artifact)[weights] >= 15
    document = told(found)
    assert document is not None
    assert (document["asked"], document["low"], document["io"]) == (precision, precision, "fp32")
    assert 0 < document["low_layers"] <= document["layers"]
    assert document["curve"] == []
    _, judging = samples()
    reference = trials.float64_outputs(before(), judging)
    away = trials.program_drift(lambda _: found.program, judging, reference)(())  # type: ignore[arg-type, return-value]
    assert 0 < away < limit


def test_inputs_and_outputs_can_be_low_as_well(tmp_path: Path) -> None:
    found = lowered(tmp_path, plan("fp16", io="fp16"))
    graph = onnx.load(found.artifact.path).graph
    kinds = {each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)}
    assert kinds == {TensorProto.FLOAT16}
    assert found.program is not None
    assert found.program.example_args[0].dtype == torch.float16


def test_int8_is_one_file_for_each_scheme_and_old_ones_go(tmp_path: Path) -> None:
    found = lowered(tmp_path, plan("int8"))
    assert found.program is None
    names = ["model.onnx", "model.openvino.onnx", "model.tensorrt.onnx"]
    assert sorted(each.name for each in tmp_path.iterdir()) == names
    assert [found.file_for(engine).path.name for engine in ENGINES] == names
    assert found.file_for("onnxruntime-cuda").path.name == "model.onnx"
    # Every file has its weights in int8, and says so itself.
    for engine in ENGINES:
        assert types(found.file_for(engine))["INT8"] >= 15
    document = told(found)
    assert document is not None
    assert document["calibration"] == "ranges from 32 samples of the data"
    # 8 bits of 20 layers: what models/digits has on all its held-out images is 0.027.
    assert 0 < far_from_float64(found.artifact) < 0.1
    lowered(tmp_path, plan("fp16"))
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_a_mixture_keeps_to_its_limit_and_shows_its_curve(tmp_path: Path) -> None:
    limit = 0.01
    found = lowered(tmp_path, plan("mixed", low="int8", max_drift=limit))
    document = told(found)
    assert document is not None
    assert 0 < document["low_layers"] < document["layers"]
    assert far_from_float64(found.artifact) <= limit
    [chosen] = [point for point in document["curve"] if point["chosen"]]
    assert chosen["low"] == document["low_layers"]
    assert chosen["within"]
    # The curve goes from none to all, and all are too many.
    shares = [point["share"] for point in document["curve"]]
    assert (min(shares), max(shares)) == (0.0, 1.0)
    assert not document["curve"][-1]["within"]
    costs = {each["layer"]: each["relative_l2"] for each in document["sensitivities"]}
    high = {each["layer"] for each in document["sensitivities"] if each["high"]}
    assert len(costs) == document["layers"]
    # Those that stay cost more alone than the dearest half of those that do not.
    low = sorted(cost for layer, cost in costs.items() if layer not in high)
    assert min(costs[layer] for layer in high) >= low[len(low) // 2]


def test_a_mixture_of_half_precision_is_a_program_too(tmp_path: Path) -> None:
    found = lowered(tmp_path, plan("mixed", low="bf16", max_drift=2e-3))
    assert found.program is not None
    assert {"FLOAT", "BFLOAT16"} <= set(types(found.artifact))
    document = told(found)
    assert document is not None
    assert 0 < document["low_layers"] < document["layers"]


def test_the_candidates_of_a_mixture_are_timed_where_it_will_run(tmp_path: Path) -> None:
    from optfuse.measure import Schedule

    timing = Timing(
        "onnxruntime",
        BuildOptions(threads=1),
        schedule=Schedule(budget_seconds=0.2, min_blocks=3, block_ms=1.0, warmup_ms=1.0),
    )
    found = lowered(tmp_path, plan("mixed", low="int8", max_drift=0.01), timing=timing)
    document = told(found)
    assert document is not None
    assert document["timed_on"] == "onnxruntime"
    assert sum(point["ratio"] is not None for point in document["curve"]) >= 2


def test_random_data_is_marked_as_such(tmp_path: Path) -> None:
    drawn = with_random_data(Plan("int8"), before(), seed=0)
    found = lowered(tmp_path, drawn, engines=("onnxruntime",))
    assert found.caveat is not None
    assert found.caveat.kind == "random-calibration"
    document = told(found)
    assert document is not None
    assert document["calibration"] == "ranges from 8 samples of random inputs"


def test_int8_without_data_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data to take them from"):
        lowered(tmp_path, Plan("int8"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Plan("mixed"), "needs a limit that its drift is kept below"),
        (Plan("mixed", max_drift=0.0), "a positive number"),
        (Plan("mixed", max_drift=float("nan")), "a positive number"),
        (Plan("fp16", max_drift=0.1), "--max-drift chooses which layers of a mixture are low"),
        (Plan("fp16", io="bf16"), "With layers in fp16, inputs and outputs can be fp32 or fp16"),
        (Plan("int8", io="fp16"), "With layers in int8, inputs and outputs can be fp32"),
        (Plan("fp32", io="fp16"), "With layers in fp32, inputs and outputs can be fp32"),
    ],
)
def test_what_contradicts_itself_is_refused(asked: Plan, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(asked)
    assert sentence in str(refused.value)
