"""Capturing with open dimensions: what torch.export demands of them, met or explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from optfuse.capture import capture
from optfuse.errors import CaptureError, LoadError
from optfuse.stages import LoadedModel
from tests.open_sizes import opened


class Net(nn.Module):
    """A function of itself and one or two inputs, with something to compute with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.linspace(-1, 1, 16 * 8).reshape(16, 8))
        self.narrow = nn.Conv1d(8, 8, 3, stride=2)


class One(Net):
    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Both(Net):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(self, x, y)


class Starred(Net):
    def forward(self, *x: torch.Tensor) -> Any:
        return self.function(self, *x)


class Named(Net):
    def forward(self, x: torch.Tensor, **more: torch.Tensor) -> Any:
        return self.function(self, x, **more)


def sizes_captured_on(model: LoadedModel) -> list[tuple[int, ...]]:
    program = capture(model)
    assert program.sizes is model.sizes
    leaves = pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    return [tuple(leaf.shape) for leaf in leaves]


@pytest.mark.parametrize(
    ("model", "inputs", "dims", "captured_on"),
    [
        (One(lambda m, x: m.linear(x)), ["Nx8"], ["N=1:8:32"], [(2, 8)]),
        (One(lambda m, x: m.linear(x)), ["Nx8"], ["N=1:1:2"], [(2, 8)]),
        (Both(lambda m, x, y: x + y), ["Nx8", "Nx8"], ["N=1:8:32"], [(2, 8), (2, 8)]),
        (One(lambda m, x: x @ x), ["NxN"], ["N=1:8:32"], [(2, 2)]),
        # Named inputs, in another order than forward's.
        (
            Both(lambda m, x, y: torch.cat([x, y])),
            *(["y=Mx8", "x=Nx8"], ["N=1:8:32", "M=1:9:9"], [(3, 8), (2, 8)]),
        ),
        (Starred(lambda m, x, y: x + y), ["Nx8", "Nx8"], ["N=1:8:32"], [(2, 8), (2, 8)]),
        # Integers, and a size in two places of two inputs.
        (
            Both(lambda m, x, y: m.positions[x] + y),
            *(["NxL:int64", "NxLx8"], ["N=1:8:32", "L=3:16:32"], [(2, 3), (2, 3, 8)]),
        ),
        # Multiples: torch.export demands them, and these sizes are some. 8 is taken.
        (One(lambda m, x: x.view(-1, 4, 8)), ["Nx8"], ["N=8:16:32"], [(16, 8)]),
        # 4 would be one time 4, which torch.export takes for granted; so the usual size.
        (One(lambda m, x: x.view(-1, 4, 8)), ["Nx8"], ["N=4:8:32"], [(8, 8)]),
        (One(lambda m, x: x[::2] + x[1::2]), ["Nx8"], ["N=2:8:32"], [(8, 8)]),
        (One(lambda m, x: x + m.positions[: x.shape[0]]), ["Lx8"], ["L=1:8:16"], [(2, 8)]),
    ],
)
def test_what_can_be_captured(
    model: nn.Module, inputs: list[str], dims: list[str], captured_on: list[tuple[int, ...]]
) -> None:
    assert sizes_captured_on(opened(model, inputs, dims)) == captured_on


REFUSED = [
    # A size that is burnt in, and one that is out of range: plain PyTorch tells best.
    (
        One(lambda m, x: x.view(3, -1)),
        *(["Nx8"], ["N=1:8:32"]),
        "Its forward fails at N=1 at ",
        "shape '[3, -1]' is invalid for input of size 8",
        "Check the shapes and dtypes given with --input and --dim",
    ),
    (
        One(lambda m, x: x + m.positions[: x.shape[0]]),
        *(["Lx8"], ["L=1:8:32"]),
        "Its forward fails at L=32 at ",
        "The size of tensor a (32) must match the size of tensor b (16)",
        "It runs at L=1: give a narrower range with --dim",
    ),
    # Multiples.
    (
        One(lambda m, x: x[: x.shape[0] // 4 * 4].view(-1, 4, 8)),
        *(["Nx8"], ["N=4:8:30"]),
        "The model takes multiples of 4 alone for N, and 30 is none",
        "",
        "Give multiples of 4 with --dim N=MIN:OPT:MAX",
    ),
    # One size alone.
    (
        One(lambda m, x: x * int(x.shape[0])),
        *(["Nx8"], ["N=1:8:32"]),
        "The model's code makes a plain number of N, or takes one size of it for granted",
        "",
        "or give one size with --dim N=8",
    ),
    # Two that are one.
    (
        Both(lambda m, x, y: x + y),
        *(["Nx8", "Mx8"], ["N=1:8:32", "M=1:8:32"]),
        "The model takes N and M of the same size alone",
        "",
        "Write --input with N in both places, and leave --dim M out",
    ),
    # Branches that depend on a size: on one side of a number, at one, and where two are equal.
    (
        One(lambda m, x: x * 2 if x.shape[0] > 6 else x),
        *(["Nx8"], ["N=1:8:32"]),
        "The model's code does something else for N below 7, or fails there, and --dim has 1",
        "",
        "Give --dim N=7:8:32, or make that code the same for every size",
    ),
    (
        One(lambda m, x: x * 2 if x.shape[0] == 1 else x),
        *(["Nx8"], ["N=1:8:32"]),
        "At N=1 the program gives something else than the model",
        "its code takes another way there",
        "give a range of --dim on one side of it",
    ),
    (
        One(lambda m, x: x @ x.T if x.shape[0] == x.shape[1] else x * 3),
        *(["AxB"], ["A=2:8:32", "B=3:8:32"]),
        "At A=8, B=8 the program gives something else than the model",
        "",
        "Make that code the same for every size",
    ),
    # A size of 1 in the middle of the model.
    (
        One(lambda m, x: m.narrow(x)),
        *(["2x8xL"], ["L=3:9:32"]),
        "The model's code takes for granted that (1 + (((-3) + L) // 2)) != 1, which does not hold "
        "for every L from 3 to 32",
        "",
        "Give a narrower range with --dim",
    ),
]


@pytest.mark.parametrize(("model", "inputs", "dims", "cause", "more", "step"), REFUSED)
def test_what_cannot_be_captured(
    model: nn.Module,
    inputs: list[str],
    dims: list[str],
    cause: str,
    more: str,
    step: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(CaptureError) as error:
        capture(opened(model, inputs, dims))
    assert error.value.exit_code == 3
    assert error.value.thing == "'net' cannot be captured"
    assert error.value.cause.startswith(cause)
    assert more in error.value.cause
    assert step in error.value.next_step
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_range_that_can_be_captured_after_all() -> None:
    """What the sentence above asks for."""
    model = One(lambda m, x: m.narrow(x))
    assert sizes_captured_on(opened(model, ["2x8xL"], ["L=5:9:32"])) == [(2, 8, 5)]


def test_inputs_that_forward_takes_without_a_name_of_its_own() -> None:
    model = Named(lambda m, x, z: x + z)
    with pytest.raises(LoadError) as error:
        opened(model, ["Nx8", "z=Nx8"], ["N=1:8:32"])
    assert error.value.cause.startswith("Its forward takes '**more', and torch.export")


def test_a_model_that_draws_random_numbers_is_not_compared() -> None:
    model = One(lambda m, x: x + torch.nn.functional.dropout(x, 0.5, training=True))
    assert sizes_captured_on(opened(model, ["Nx8"], ["N=1:8:32"])) == [(2, 8)]


class Counting(nn.Module):
    """Writes to a buffer each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: torch.Tensor
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x * self.runs


def test_a_model_that_writes_to_itself_is_left_as_it_was() -> None:
    model = Counting()
    program = capture(opened(model, ["Nx8"], ["N=1:8:32"]))
    assert model.runs == 0
    held = [each for each in program.graph_module.buffers() if each.shape == ()]
    assert [float(each) for each in held] == [0.0] * len(held)
