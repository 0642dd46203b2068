"""Open dimensions as they are typed: what they mean, and everything that can be wrong with them."""

from __future__ import annotations

import pytest

from optfuse.dimensions import (
    capture_sizes,
    numbered,
    parse_dimension,
    points,
    require_consistent,
    spelled,
)
from optfuse.errors import LoadError, UsageError
from optfuse.inputs import parse_input, random_arguments, require_possible
from optfuse.load import load
from optfuse.stages import Dimension, InputSpec, Source

N = Dimension("N", 1, 8, 32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N=1:8:32", N),
        ("N=1:32", Dimension("N", 1, 32, 32)),
        ("N=8", Dimension("N", 8, 8, 8)),
        ("N=8:8:8", Dimension("N", 8, 8, 8)),
        ("batch_size2=007:8:999999999", Dimension("batch_size2", 7, 8, 999999999)),
    ],
)
def test_parse_dimension(text: str, expected: Dimension) -> None:
    assert parse_dimension(text) == expected


@pytest.mark.parametrize(
    ("text", "thing", "cause"),
    [
        ("N=8:1:32", "contradicts itself", "Its usual size, 1, does not lie from 8 to 32"),
        ("N=1:33:32", "contradicts itself", "Its usual size, 33, does not lie from 1 to 32"),
        ("N=32:8:1", "contradicts itself", "Its least size, 32, is larger than its most, 1"),
        ("N=32:8", "contradicts itself", "Its least size, 32, is larger than its most, 8"),
        ("N=0:8:32", "cannot be read", "'0' is no whole number from 1 to 999999999"),
        ("N=-1:8:32", "cannot be read", "'-1' is no whole number from 1 to 999999999"),
        ("N=1:8:1000000000", "cannot be read", "'1000000000' is no whole number from 1"),
        ("N=1:8:" + "9" * 5000, "cannot be read", "' is no whole number from 1 to 999999999"),
        ("N=1:8:", "cannot be read", "'' is no whole number from 1 to 999999999"),
        ("N=", "cannot be read", "'' is no whole number"),
        ("N=1.5", "cannot be read", "'1.5' is no whole number"),
        ("N=1:2:3:4", "cannot be read", "It has 4 sizes, and three are the most"),
        ("N", "cannot be read", "A dimension is NAME=MIN:OPT:MAX"),
        ("", "cannot be read", "A dimension is NAME=MIN:OPT:MAX"),
        ("=1:2:3", "cannot be read", "'' is no name"),
        ("2N=1:2:3", "cannot be read", "'2N' is no name: letters, digits and '_'"),
        ("a b=1:2:3", "cannot be read", "'a b' is no name"),
        ("max=1:2:3", "cannot be read", "The name 'max' has an 'x', which joins the sizes"),
        ("scalar=1:2:3", "cannot be read", "'scalar' is what an input without sizes is called"),
    ],
)
def test_a_dimension_that_makes_no_sense(text: str, thing: str, cause: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_dimension(text)
    assert error.value.exit_code == 2
    assert error.value.thing == f"The dimension '{text}' {thing}"
    assert cause in error.value.cause
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dimensions", "inputs", "sentence"),
    [
        ((N, N), ("Nx3",), "The dimension 'N' cannot be used. It is given more than once."),
        ((N,), ("1x3",), "The dimension 'N' is not used. No --input names it."),
        ((N,), (), "The dimension 'N' is not used. There is no --input that could name it."),
        ((), ("Nx3",), "The size 'N' of an input is not known. There is no --dim N that says"),
        ((N,), ("Nx3xH",), "The size 'H' of an input is not known."),
        ((Dimension("N", 8, 1, 32),), ("Nx3",), "The dimension 'N=8:1:32' contradicts itself."),
        ((Dimension("N", 0, 1, 32),), ("Nx3",), "Its least size, 0, is not positive."),
        ((Dimension("max", 1, 2, 3),), ("Nx3",), "The name 'max' has an 'x'"),
        ((Dimension("N", 1, 8, 10**9),), ("Nx9999x9999",), "It has more than 2^40 elements."),
    ],
)
def test_dimensions_and_inputs_that_do_not_go_together(
    dimensions: tuple[Dimension, ...], inputs: tuple[str, ...], sentence: str
) -> None:
    specs = tuple(parse_input(each, names=True) for each in inputs)
    # Before the model's code is run, and so before anything is written.
    with pytest.raises(UsageError) as error:
        load(Source("no_such_file.py:build", inputs=specs, dimensions=dimensions))
    assert sentence in str(error.value)


def test_names_among_the_sizes_of_an_input() -> None:
    spec = parse_input("image=Nx3xHxW:float16", names=True)
    assert spec == InputSpec("image", ("N", 3, "H", "W"), "float16")
    require_consistent([N, Dimension("H", 1, 1, 1), Dimension("W", 2, 2, 2)], [spec])
    require_possible(spec)
    assert numbered([spec], {"N": 2, "H": 4})[0].shape == (2, 3, 4, "W")
    with pytest.raises(ValueError, match="there is no tensor of the shape"):
        random_arguments([spec], 0)


def test_an_input_that_does_not_fit_into_memory() -> None:
    """With overcommitted memory the process would be ended rather than told."""
    specs = numbered([parse_input("Nx1024", names=True)], {"N": 999_999_999})
    with pytest.raises(LoadError) as error:
        random_arguments(specs, 0)
    assert error.value.thing == "An input of shape 999999999x1024:float32 cannot be made"
    assert error.value.cause.startswith("It takes 4096 GB, and this machine has ")


def test_only_numbers_where_nothing_can_be_open() -> None:
    with pytest.raises(UsageError) as error:
        parse_input("Nx3")
    assert error.value.cause == (
        "Its size 'N' is no number, and only 'optfuse optimize' and 'optfuse explain' have --dim "
        "for open sizes"
    )


def test_points_are_the_least_the_usual_and_the_most_each_once() -> None:
    assert points([N]) == [{"N": 1}, {"N": 8}, {"N": 32}]
    assert points([Dimension("N", 1, 1, 4)]) == [{"N": 1}, {"N": 4}]
    assert points([Dimension("N", 1, 4, 4), Dimension("H", 16, 32, 64)]) == [
        {"N": 1, "H": 16},
        {"N": 4, "H": 32},
        {"N": 4, "H": 64},
    ]
    assert spelled({"N": 4, "H": 32}) == "N=4, H=32"


@pytest.mark.parametrize(
    ("dimensions", "taken", "first"),
    [
        # Never 0 or 1, which torch.export takes for granted.
        ([N], (), {"N": 2}),
        # And not the number of channels.
        ([N], (2, 3), {"N": 4}),
        ([Dimension("N", 1, 2, 2)], (2,), {"N": 2}),
        # A size that the user gave, where it may have to be a multiple of something.
        ([Dimension("H", 64, 128, 256)], (), {"H": 64}),
        ([Dimension("H", 64, 128, 256)], (64,), {"H": 128}),
        # Unlike each other.
        ([Dimension("H", 64, 128, 256), Dimension("W", 64, 64, 256)], (), {"H": 64, "W": 256}),
        ([Dimension("N", 1, 1, 9), Dimension("M", 1, 1, 9)], (), {"N": 2, "M": 3}),
    ],
)
def test_a_model_is_captured_on_small_sizes_that_nothing_else_has(
    dimensions: list[Dimension], taken: tuple[int, ...], first: dict[str, int]
) -> None:
    assert capture_sizes(dimensions, taken)[0] == first


def test_the_usual_and_the_largest_sizes_are_tried_next() -> None:
    assert capture_sizes([N]) == [{"N": 2}, {"N": 8}, {"N": 32}]
    assert capture_sizes([Dimension("N", 1, 1, 2)]) == [{"N": 2}]
