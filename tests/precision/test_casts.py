"""Where casts stand: against every choice there is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import pytest

from optfuse.precision.casts import low_operators

Values = list[tuple[str, Sequence[str]]]


def casts(values: Values, low: set[str]) -> int:
    """How many a choice needs: one for each value that somebody reads in the other precision."""
    return sum(
        any((reader in low) != (giver in low) for reader in readers) for giver, readers in values
    )


def least(values: Values, high: set[str], low: set[str]) -> int:
    """By trying every choice."""
    names = {name for giver, readers in values for name in (giver, *readers)}
    free = sorted(names - high - low)
    return min(
        casts(values, low | {name for name, chosen in zip(free, choice, strict=True) if chosen})
        for choice in product((False, True), repeat=len(free))
    )


def test_one_cast_serves_all_readers() -> None:
    values: Values = [("input", ["a", "b", "c"])]
    found = low_operators(values, {"input"}, {"a", "b", "c"})
    assert found == {"a", "b", "c"}
    assert casts(values, found) == 1


def test_what_is_split_for_low_readers_is_cast_before_it_is_split() -> None:
    values: Values = [("norm", ["split"]), *[("split", [name]) for name in ("q", "k", "v")]]
    found = low_operators(values, {"norm"}, {"q", "k", "v"})
    assert found == {"split", "q", "k", "v"}


def test_what_is_free_follows_what_it_reads() -> None:
    there: Values = [("convolution", ["relu"]), ("relu", ["pool"]), ("pool", ["mean"])]
    assert low_operators(there, {"mean"}, {"convolution"}) == {"convolution", "relu", "pool"}
    back: Values = [("norm", ["relu"]), ("relu", ["convolution"])]
    assert low_operators(back, {"norm"}, {"convolution"}) == {"convolution"}


def test_nothing_goes_up_and_down_again_between_two_that_are_low() -> None:
    values: Values = [("first", ["add"]), ("input", ["first", "add"]), ("add", ["second"])]
    found = low_operators(values, {"input"}, {"first", "second"})
    assert found == {"first", "add", "second"}


def test_without_anything_low_nothing_becomes_low() -> None:
    assert low_operators([("input", ["relu"]), ("relu", ["output"])], {"input", "output"}, ()) == (
        set()
    )
    assert low_operators([], (), ()) == set()


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_has_fewer_casts(seed: int) -> None:
    drawn = random.Random(seed)
    names = [f"operator_{number}" for number in range(11)]
    kinds = {name: drawn.choice(["high", "low", "free", "free"]) for name in names}
    values: Values = [
        (name, drawn.sample(names[place + 1 :], k=min(drawn.randint(0, 3), 10 - place)))
        for place, name in enumerate(names)
        for _ in range(drawn.choice([1, 1, 2]))  # an operator may give several values
    ]
    high = {name for name in names if kinds[name] == "high"}
    low = {name for name in names if kinds[name] == "low"}
    found = low_operators(values, high, low)
    assert found >= low
    assert not found & high
    assert casts(values, found) == least(values, high, low)
