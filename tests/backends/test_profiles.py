"""Optimisation profiles: what is refused before anything is built, and what a builder is told."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optfuse.backends.profiles import add_profile, check_network, check_shapes, written
from optfuse.errors import EngineError, UsageError
from optfuse.stages import InputShapes

IMAGE = InputShapes("image", (1, 3, 32, 32), (8, 3, 64, 64), (32, 3, 64, 64))


def image(*three: tuple[int, ...]) -> InputShapes:
    return InputShapes("image", *three)


def test_shapes_that_go_together() -> None:
    check_shapes([])
    check_shapes([IMAGE, InputShapes("scale", (1,), (1,), (1,)), InputShapes("bias", (), (), ())])


@pytest.mark.parametrize(
    ("shapes", "cause"),
    [
        ([IMAGE, IMAGE], "It is given shapes more than once"),
        (
            [image((1, 3), (1, 3, 4), (1, 3, 4))],
            "They have different numbers of dimensions: smallest 1x3, usual 1x3x4, largest 1x3x4",
        ),
        ([image((0, 3), (1, 3), (2, 3))], "Its smallest shape, 0x3, has a size below 1"),
        ([image((1, 3), (1, -1), (2, 3))], "Its usual shape, 1x?, has a size below 1"),
        (
            [image((2, 3), (1, 3), (4, 3))],
            "Its smallest shape, 2x3, is not within its usual shape, 1x3",
        ),
        (
            [image((1, 3), (8, 3), (4, 3))],
            "Its usual shape, 8x3, is not within its largest shape, 4x3",
        ),
    ],
)
def test_shapes_that_contradict_each_other(shapes: list[InputShapes], cause: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_shapes(shapes)
    assert refused.value.thing == "No engine can be built for the shapes of 'image'"
    assert refused.value.cause == cause
    assert refused.value.exit_code == 2


@given(*[st.tuples(*[st.integers(-2, 9)] * 2)] * 3)
def test_only_ordered_sizes_from_1_on_are_let_through(
    least: tuple[int, ...], usual: tuple[int, ...], most: tuple[int, ...]
) -> None:
    fits = all(1 <= a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
    try:
        check_shapes([image(least, usual, most)])
    except UsageError:
        assert not fits
    else:
        assert fits


def test_shapes_that_fit_the_network() -> None:
    check_network({"image": (-1, 3, -1, -1), "scale": (1,)}, [IMAGE], "failed")
    # An input without open dimensions may be given the one shape that it has.
    check_network({"image": (2, 3)}, [image((2, 3), (2, 3), (2, 3))], "failed")


@pytest.mark.parametrize(
    ("inputs", "cause"),
    [
        ({"picture": (-1, 3, -1, -1)}, "The network has no such input: it has picture"),
        ({}, "The network has no such input: it has none"),
        (
            {"image": (-1, 4, -1, -1)},
            "The network takes ?x4x?x? there, and was given 1x3x32x32",
        ),
        ({"image": (-1, 3, -1)}, "The network takes ?x3x? there, and was given 1x3x32x32"),
        ({"image": (1, 3, -1, -1)}, "The network takes 1x3x?x? there, and was given 8x3x64x64"),
    ],
)
def test_shapes_that_do_not_fit_the_network(inputs: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_network(inputs, [IMAGE], "failed")
    assert refused.value.cause == cause


def test_open_dimensions_without_shapes() -> None:
    with pytest.raises(EngineError) as refused:
        check_network({"image": (-1, 3, -1, -1), "mask": (-1, 8)}, [IMAGE], "x cannot be built")
    assert str(refused.value) == (
        "x cannot be built. Its input 'mask', ?x8, has dimensions that are open. Name it with "
        "--dim, e.g. --dim N=1:8:32 for an --input of Nx3x224x224."
    )


class Profile:
    def __init__(self) -> None:
        self.shapes: list[tuple[Any, ...]] = []

    def set_shape(self, *given: Any) -> None:
        if given[0] == "inconsistent":
            raise ValueError("inconsistent dimensions")
        self.shapes.append(given)


def test_the_profile_that_is_added() -> None:
    profile, added = Profile(), []
    builder = SimpleNamespace(create_optimization_profile=lambda: profile)
    config = SimpleNamespace(add_optimization_profile=lambda each: added.append(each) or 0)
    add_profile(builder, config, [], "failed")
    assert added == []
    add_profile(builder, config, [IMAGE], "failed")
    assert added == [profile]
    assert profile.shapes == [("image", IMAGE.least, IMAGE.usual, IMAGE.most)]


def test_a_profile_that_the_package_refuses() -> None:
    builder = SimpleNamespace(create_optimization_profile=Profile)
    config = SimpleNamespace(add_optimization_profile=lambda profile: -1)
    with pytest.raises(EngineError, match="refused without a reason"):
        add_profile(builder, config, [IMAGE], "failed")
    odd = InputShapes("inconsistent", (1,), (1,), (1,))
    with pytest.raises(EngineError, match="refused: inconsistent dimensions"):
        add_profile(builder, config, [odd], "failed")


def test_how_a_shape_is_written() -> None:
    assert written((-1, 3, 224, 224)) == "?x3x224x224"
    assert written(()) == "scalar"
