"""The exception tree is the one its docstring draws, and every error is three whole sentences."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from optfuse import errors
from optfuse.errors import CaptureError, OptfuseError, OutputError

EVERY_ERROR = [
    found
    for _, found in inspect.getmembers(errors, inspect.isclass)
    if issubclass(found, OptfuseError)
]


def drawn() -> dict[str, tuple[str | None, int]]:
    """Name -> (the class above it, exit code), read off the drawing in the module's docstring."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"    ([│ ├└─]*)(\w+) +(\d+)(?: {2,}.*)?", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        above = [*above[:depth], found[2]]
        tree[found[2]] = (above[depth - 1] if depth else None, int(found[3]))
    return tree


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    real = {
        each.__name__: (
            None if each is OptfuseError else each.__bases__[0].__name__,
            each.exit_code,
        )
        for each in EVERY_ERROR
    }
    assert len(real) == 9
    assert drawn() == real


def test_every_exit_code_says_one_thing() -> None:
    """0 is success, 130 an interruption; those below the model's error share its code."""
    codes = {each.__name__: each.exit_code for each in EVERY_ERROR}
    assert codes == {
        "OptfuseError": 1,
        "UsageError": 2,
        "ModelError": 3,
        "LoadError": 3,
        "CaptureError": 3,
        "ExportError": 3,
        "EngineError": 4,
        "FunctionChangedError": 5,
        "OutputError": 6,
    }


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_every_error_has_three_parts_and_says_all_of_them(error: type[OptfuseError]) -> None:
    raised = error("The file x.pt cannot be read", "It is empty", "Copy it again")
    assert (raised.thing, raised.cause, raised.next_step) == (
        "The file x.pt cannot be read",
        "It is empty",
        "Copy it again",
    )
    assert str(raised) == "The file x.pt cannot be read. It is empty. Copy it again."
    assert error.__doc__


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_an_error_needs_all_three_parts(error: type[OptfuseError]) -> None:
    with pytest.raises(TypeError, match="next_step"):
        error("It is broken", "It was dropped")  # type: ignore[call-arg]


def test_a_sentence_that_has_its_stop_gets_no_second_one() -> None:
    error = OutputError("  It failed!  ", "Was the disk full?", "Look at it.")
    assert str(error) == "It failed! Was the disk full? Look at it."


def test_an_error_survives_being_pickled() -> None:
    """As it is when it crosses from one process to another."""
    error = CaptureError("It cannot be captured", "It branches", "Use torch.where")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is CaptureError
    assert str(copied) == str(error)
