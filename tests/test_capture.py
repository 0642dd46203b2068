"""Capture: what a model may take and give, that it stays untouched, and what a failure says."""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from optfuse.capture import capture
from optfuse.errors import CaptureError
from optfuse.graph import operators
from optfuse.stages import LoadedModel, Program
from tests.harness import captured, counts, scramble

HERE = Path(__file__)


class Calling(nn.Module):
    """A module with a few layers whose forward is a function of it and its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(5))


def assert_runs_alike(module: nn.Module, program: Program) -> None:
    """Exactly alike: the same kernels on the same numbers."""
    args, kwargs = copy.deepcopy((program.example_args, dict(program.example_kwargs)))
    expected = module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    given = program.graph_module(*args, **kwargs)
    wanted, wanted_shape = pytree.tree_flatten(expected)
    found, found_shape = pytree.tree_flatten(given)
    assert wanted_shape == found_shape
    for one, other in zip(wanted, found, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other


def two(module: Calling, x: Any, y: Any) -> Any:
    return x + 2 * y


def nested(module: Calling, pair: Any, named: Any) -> Any:
    return {"sum": pair[0] + named["a"], "rest": (pair[1] * named["b"], [pair[0]])}


def with_keywords(module: Calling, x: Any, *, scale: Any, shift: Any = None) -> Any:
    return x * scale if shift is None else x * scale + shift


def with_numbers(module: Calling, x: Any, times: int, missing: Any, flag: bool) -> Any:
    return (x * times if flag else x), missing, times


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, shift: Any = None) -> torch.Tensor:
        y: torch.Tensor = self.conv(x) * scale
        return y if shift is None else y + shift


INPUTS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (two, (image(3), image(3)), {}),
    (nested, ((image(3), image(3)), {"a": image(3), "b": image(1)}), {}),
    (with_keywords, (image(3),), {"scale": image(1)}),
    (with_keywords, (image(3),), {"shift": image(3), "scale": image(1)}),
    (with_numbers, (image(3), 3, None, True), {}),
]


@pytest.mark.parametrize(("function", "args", "kwargs"), INPUTS)
def test_any_nesting_of_inputs_and_outputs(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

    # torch.export reads the names of the inputs off the signature of forward.
    Plain.forward = lambda self, *a, **k: function(self, *a, **k)  # type: ignore[method-assign]
    module = Plain().eval()
    assert_runs_alike(module, captured(module, *args, kwargs=kwargs))


def test_keyword_inputs_of_a_real_signature_in_any_order() -> None:
    module = scramble(Scaled())
    program = captured(module, image(), kwargs={"shift": image(1), "scale": image(4, 1, 1)})
    assert_runs_alike(module, program)
    assert counts(program) == {"conv2d": 1, "mul": 1, "add": 1}


def test_the_program_is_functional_and_says_how_it_came_to_be() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    program = captured(module, image(), name="net")
    assert counts(program) == {"conv2d": 1, "batch_norm": 1, "relu": 1}
    assert program.name == "net"
    (step,) = program.trace
    assert (step.stage, step.name) == ("capture", "torch.export")
    assert (step.operators_before, step.operators_after) == (3, 3)
    assert step.seconds > 0
    assert_runs_alike(module, program)


def test_parameters_are_shared_with_the_model_and_not_copied() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 2)))
    program = captured(module, image())
    held = {parameter.data_ptr() for parameter in program.graph_module.parameters()}
    assert held == {parameter.data_ptr() for parameter in module.parameters()}


class Counting(nn.Module):
    """Writes to two buffers, one of them not in the state dict, and to a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor([1.5, 2.5]))
        self.register_buffer("calls", torch.tensor(7), persistent=False)
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.add_(x)
        self.calls += 1
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.seen * self.weight, self.calls * 2


def test_running_the_program_leaves_the_model_as_it_was() -> None:
    module = Counting().eval()
    x = torch.tensor([10.0, 20.0])
    program = captured(module, x)
    first = program.graph_module(x)
    second = program.graph_module(x)
    # The program keeps its own state, as the model would: 11.5 * 10 * 1.5, then 21.5 * 10 * 0.75.
    assert torch.equal(first[0], torch.tensor([172.5, 900.0]))
    assert torch.equal(second[0], torch.tensor([161.25, 850.0]))
    assert (int(first[1]), int(second[1])) == (16, 18)
    assert torch.equal(module.seen, torch.tensor([1.5, 2.5]))
    assert int(module.calls) == 7
    assert torch.equal(module.weight, torch.tensor([3.0, 4.0]))


def test_capturing_does_not_write_to_the_inputs() -> None:
    x = image(3)
    before = x.clone()

    def writes(module: Calling, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    captured(Calling(writes), x)
    assert torch.equal(x, before)


def test_a_batch_norm_in_training_mode_leaves_the_models_statistics_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(module.state_dict())
    program = captured(module, image())
    program.graph_module(image())
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_that_is_called_twice_stays_one_parameter() -> None:
    module = scramble(Calling(lambda m, x: m.linear(x) + m.linear(x * 3)))
    program = captured(module, image(2, 8))
    assert counts(program) == {"linear": 2, "mul": 1, "add": 1}
    used = {n.target for n in program.graph_module.graph.nodes if n.op == "get_attr"}
    assert used == {"linear.weight", "linear.bias"}
    assert_runs_alike(module, program)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.head(self.embedding(ids))
            return scores

    module = scramble(Tied())
    program = captured(module, torch.tensor([[1, 5, 2]]))
    assert len({parameter.data_ptr() for parameter in program.graph_module.parameters()}) == 1
    assert_runs_alike(module, program)


def test_no_grad_and_autocast_blocks_are_read() -> None:
    def blocks(module: Calling, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = x * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module.linear(x)
        return y.float() + 1

    module = scramble(Calling(blocks))
    program = captured(module, image(2, 8))
    assert counts(program)["linear"] == 1
    assert_runs_alike(module, program)


def test_channels_last_inputs_keep_their_layout() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    x = image().to(memory_format=torch.channels_last)
    program = captured(module.to(memory_format=torch.channels_last), x)
    (given,) = program.example_args
    assert given.is_contiguous(memory_format=torch.channels_last)
    assert_runs_alike(module, program)


def test_outputs_that_are_inputs_or_views_of_them() -> None:
    module = Calling(lambda m, x: (x, x[0], x.transpose(0, 1), x + 1, x))
    assert_runs_alike(module, captured(module, image(2, 3)))


def test_a_model_without_parameters() -> None:
    program = captured(nn.ReLU(), image(3))
    assert counts(program) == {"relu": 1}
    assert_runs_alike(nn.ReLU(), program)


def test_a_model_that_only_hands_its_input_on() -> None:
    program = captured(nn.Identity(), image(3))
    assert counts(program) == {}
    assert_runs_alike(nn.Identity(), program)


def test_a_dynamic_batch_runs_with_another_one() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)))
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = capture(LoadedModel("net", module, (image(),), dynamic_shapes=shapes))
    other = image(5, 3, 8, 8)
    # Exactly alike: the same kernels on the same numbers.
    assert torch.equal(program.graph_module(other), module(other))
    assert program.dynamic_shapes is shapes


class Summed(nn.Module):
    """Takes any number of inputs."""

    def forward(self, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return sum(others, first)


@pytest.mark.parametrize("named", [False, True])
def test_dynamic_shapes_of_starred_inputs_are_those_of_the_captured_ones(named: bool) -> None:
    """The captured graph takes each of `*inputs` by a name of its own, so the shapes as the model
    takes them did not fit when its program was exported to ONNX."""
    left_open = {0: torch.export.Dim("batch", min=2)}
    given = (left_open, (left_open, None))
    shapes = dict(zip(("first", "others"), given, strict=True)) if named else given
    inputs = (image(), image(), image(1, 3, 8, 8))
    program = capture(LoadedModel("net", Summed().eval(), inputs, dynamic_shapes=shapes))
    expected = {"first": left_open, "others_0": left_open, "others_1": None}
    assert program.dynamic_shapes == expected
    again = capture(
        LoadedModel("again", program.graph_module, inputs, dynamic_shapes=program.dynamic_shapes)
    )
    other = (image(5, 3, 8, 8), image(5, 3, 8, 8), image(1, 3, 8, 8))
    assert torch.equal(again.graph_module(*other), Summed()(*other))


def test_asserts_on_dtypes_are_left_out() -> None:
    """They hold by construction, and would fail in float64."""
    program = captured(Calling(lambda m, x: x.to(torch.float16).to(torch.float32)), image(3))
    assert "_assert_tensor_metadata" not in str(program.graph_module.graph)
    assert operators(program.graph_module) == {"_to_copy": 2}


# What fails, and what its user reads.


def branches(module: Calling, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:  # a branch on values
        return x
    return -x


def loops(module: Calling, x: torch.Tensor) -> torch.Tensor:
    while x.norm() > 1:  # a loop on values
        x = x / 2
    return x


def slices(module: Calling, x: torch.Tensor) -> torch.Tensor:
    return x[: int(x.argmax())].clone().repeat(int(x.argmin()))  # a size from values


def wrong_channels(module: Calling, x: torch.Tensor) -> torch.Tensor:
    return module.conv(x)  # type: ignore[no-any-return]  # three channels, please


def raises(module: Calling, x: torch.Tensor) -> torch.Tensor:
    advice = "See https://example.org"
    raise ValueError(f"the image is too small. {advice}")  # on purpose


def raises_wordlessly(module: Calling, x: torch.Tensor) -> torch.Tensor:
    assert x.shape[0] == 77  # no words
    return x


def multiplies(module: Calling, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, -1) @ torch.ones(7, 3)  # seven rows


def misspells(module: Calling, x: torch.Tensor) -> torch.Tensor:
    return module.linaer(x)  # type: ignore[operator]  # misspelt


def through_the_library(module: Calling, x: torch.Tensor) -> torch.Tensor:
    import json

    json.loads("{")  # the fault is seen in Python's own library
    return x


def through_numpy(module: Calling, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * 2)  # by way of NumPy


class Box:
    def __init__(self, content: torch.Tensor) -> None:
        self.content = content


def boxes(module: Calling, x: torch.Tensor) -> Box:
    return Box(x)


def writes_to_an_attribute(module: Calling, x: torch.Tensor) -> torch.Tensor:
    module.table.mul_(2)  # type: ignore[operator, union-attr]
    return x * module.table  # type: ignore[operator]


VALUES = "depends on the values of a tensor"
VALUES_STEP = (
    "Write the branch with torch.cond or torch.where, and take sizes from shapes, so that one "
    "graph serves all inputs"
)
PLAIN_STEP = (
    "Check the shapes and dtypes given with --input or example_inputs(), and that the model runs "
    "on them in plain PyTorch"
)

FAILING: list[tuple[Callable[..., Any], str | None, str, str]] = [
    (branches, "a branch on values", VALUES, VALUES_STEP),
    (loops, "a loop on values", VALUES, VALUES_STEP),
    (slices, "a size from values", VALUES, VALUES_STEP),
    (
        wrong_channels,
        "three channels, please",
        "with RuntimeError: Given groups=1, weight of size [4, 3, 3, 3], expected input",
        PLAIN_STEP,
    ),
    (raises, "# on purpose", "with ValueError: the image is too small", PLAIN_STEP),
    (raises_wordlessly, "# no words", "with AssertionError", PLAIN_STEP),
    (
        multiplies,
        "# seven rows",
        "with RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x256 and 7x3)",
        PLAIN_STEP,
    ),
    (
        misspells,
        "# misspelt",
        "with AttributeError: 'Calling' object has no attribute 'linaer'",
        PLAIN_STEP,
    ),
    (
        through_the_library,
        "the fault is seen in Python's own library",
        "with JSONDecodeError: Expecting property name enclosed in double quotes",
        PLAIN_STEP,
    ),
    (
        through_numpy,
        "# by way of NumPy",
        "It goes through NumPy",
        "Replace that line by tensor operations",
    ),
    (
        boxes,
        None,
        "Its forward returns something other than tensors, numbers, tuples, lists and dicts",
        "Return one of those, or register the class with torch.export.register_dataclass",
    ),
    (
        writes_to_an_attribute,
        None,
        "Its forward writes to a tensor that is no buffer: Constant table is mutated",
        "Register that tensor with register_buffer",
    ),
]


def failing(model: LoadedModel) -> CaptureError:
    with pytest.raises(CaptureError) as raised:
        capture(model)
    error = raised.value
    assert error.exit_code == 3
    assert error.thing == f"'{model.name}' cannot be captured"
    for part in (error.thing, error.cause, error.next_step):
        assert part == part.strip()
        assert part.startswith(("'", "torch.")) or part[0].isupper()
        assert "\n" not in part
        assert "Traceback" not in part
    return error


@pytest.mark.parametrize(("function", "line", "cause", "step"), FAILING)
def test_a_failure_names_the_line_the_cause_and_the_next_step(
    function: Callable[..., Any],
    line: str | None,
    cause: str,
    step: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Calling(function)
    module.table = torch.tensor([2.0])  # type: ignore[assignment]
    error = failing(LoadedModel("net", module.eval(), (image(2, 4, 8, 8),)))
    assert cause in error.cause
    if line is not None:
        numbers = [n for n, text in enumerate(HERE.read_text().splitlines(), 1) if line in text]
        assert f"{HERE}:{numbers[0]} (`" in error.cause
    assert error.next_step == step
    assert "https" not in str(error)
    # torch.export prints the graph as far as it came, and logs: neither is the user's business.
    assert capfd.readouterr() == ("", "")
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


class Needing(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((image(3),), {}, "missing a required argument: 'mask'"),
        ((image(3),) * 3, {}, "too many positional arguments"),
        ((image(3),) * 2, {"scale": image(3)}, "got an unexpected keyword argument 'scale'"),
        ((image(3),), {"x": image(3)}, "multiple values for argument 'x'"),
    ],
)
def test_inputs_that_forward_does_not_take(
    args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    error = failing(LoadedModel("net", Needing(), args, kwargs))
    signature = "forward(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor"
    assert re.sub("'(torch.Tensor)'", r"\1", error.cause) == (
        f"Its inputs do not fit {signature}: {reason}"
    )
    assert error.next_step == (
        "Give every input that forward needs, and no other, with --input [NAME=]SHAPE[:DTYPE]"
    )


def test_an_input_that_is_no_tensor_and_no_number() -> None:
    error = failing(LoadedModel("net", Calling(lambda m, x, box: x * 2), (image(3), Box(image(3)))))
    assert error.cause.startswith("An input is no tensor, number, tuple, list or dict: Unsupported")
    assert "register_dataclass" in error.next_step


def test_a_torchscript_module() -> None:
    scripted = torch.jit.script(nn.Linear(3, 2))
    error = failing(LoadedModel("net", scripted, (image(3),)))
    assert error.cause == "It is a TorchScript module"
    assert error.next_step == "Give the nn.Module that it was made from"


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"nope": {0: torch.export.Dim("batch")}}, "['nope']"),
        (({0: torch.export.Dim("batch", min=3, max=4)},), "2 not in range [3, 4]"),
        (
            ({0: torch.export.Dim("a"), 1: torch.export.Dim("b")},),
            "You marked b as dynamic but your code specialized it to be a constant (8)",
        ),
    ],
)
def test_dynamic_shapes_that_do_not_fit(shapes: Any, reason: str) -> None:
    model = LoadedModel(
        "net", nn.Sequential(nn.Linear(8, 2)), (image(2, 8),), dynamic_shapes=shapes
    )
    error = failing(model)
    assert error.cause.startswith("Its dynamic shapes do not fit: ")
    assert error.cause.endswith(reason)
    assert error.next_step == (
        "Correct dynamic_shapes, or leave them out for a program of these shapes alone"
    )


def test_whatever_else_torch_export_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("an unheard-of trouble\nwith many lines")

    monkeypatch.setattr(torch.export, "export", unknown)
    error = failing(LoadedModel("net", nn.Linear(3, 2), (image(3),)))
    assert re.fullmatch(
        r"torch\.export stopped at .*test_capture\.py:\d+ \(`raise RuntimeError\(.*`\) "
        r"with RuntimeError: an unheard-of trouble",
        error.cause,
    )
    assert error.next_step == (
        "Rewrite that line with tensor operations, or run again with --debug"
    )


def test_the_cause_is_kept_for_debugging() -> None:
    with pytest.raises(CaptureError) as raised:
        capture(LoadedModel("net", Calling(raises), (image(3),)))
    assert isinstance(raised.value.__cause__, ValueError)


def test_logging_and_stderr_are_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = (logging.root.manager.disable, sys.stderr)
    captured(nn.ReLU(), image(3))
    with pytest.raises(CaptureError):
        capture(LoadedModel("net", Calling(raises), (image(3),)))
    assert (logging.root.manager.disable, sys.stderr) == before
