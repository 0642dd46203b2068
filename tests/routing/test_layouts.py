"""Which order the channels of each tensor get."""

import numpy as np
import pytest

from optfuse.routing.layouts import (
    Array,
    Bundle,
    Grouped,
    Layout,
    Placement,
    choose,
    join,
    places_of,
)


def plain(size: int, **settings: bool | int) -> Placement:
    """A tensor with a layout of its own."""
    return Placement(Layout(size, **settings), np.arange(size))  # type: ignore[arg-type]


def bundle(*taken: tuple[Placement, list[int]]) -> Bundle:
    """Channels of several tensors behind each other."""
    sources = np.repeat(range(len(taken)), [len(channels) for _, channels in taken])
    channels = np.concatenate([channels for _, channels in taken])
    tensors = tuple(tensor for tensor, _ in taken)
    return Bundle(plain(len(channels)), tensors, sources, channels)


def chosen(
    *tensors: Placement,
    bundles: tuple[Bundle, ...] = (),
    wishes: tuple[Placement, ...] = (),
    grouped: tuple[Grouped, ...] = (),
) -> list[list[int]]:
    """The sequences of all tensors and bundles, once the orders are chosen."""
    placements = [*tensors, *(each.placement for each in bundles)]
    choose([placement.layout for placement in placements], bundles, wishes, grouped)
    return [placement.sequence().tolist() for placement in placements]


def permuted(placement: Placement, *order: int) -> Placement:
    """A tensor that holds the channels of another in this order."""
    return Placement(placement.layout, placement.slots[list(order)])


def test_without_a_reason_the_model_s_order_stays() -> None:
    one, other = plain(3), plain(4)
    both = bundle((other, [0, 1, 2, 3]), (one, [0, 1, 2]))
    assert chosen(one, other, bundles=(both,)) == [[0, 1, 2], [0, 1, 2, 3], list(range(7))]


def test_runs_that_are_already_there_are_not_sorted_anew() -> None:
    tensor = plain(6)
    late, early = bundle((tensor, [4, 5])), bundle((tensor, [0, 1, 2, 3]))
    assert chosen(tensor, bundles=(late, early))[0] == [0, 1, 2, 3, 4, 5]


def test_each_taker_finds_its_channels_beside_each_other() -> None:
    tensor = plain(6)
    odd, even = bundle((tensor, [1, 3, 5])), bundle((tensor, [0, 2, 4]))
    assert chosen(tensor, bundles=(odd, even)) == [[1, 3, 5, 0, 2, 4], [0, 1, 2], [0, 1, 2]]


def test_takers_of_a_taker_count_too() -> None:
    tensor = plain(8)
    half = bundle((tensor, [0, 2, 4, 6]))
    quarter, rest = bundle((half.placement, [1, 3])), bundle((half.placement, [0, 2]))
    other = bundle((tensor, [1, 3, 5, 7]))
    order, within, *_ = chosen(tensor, bundles=(half, quarter, rest, other))
    assert order == [2, 6, 0, 4, 1, 3, 5, 7]
    assert within == [1, 3, 0, 2]


def test_a_bundle_lies_as_its_sources_lie() -> None:
    fixed = plain(4, fixed=True)
    mixed = bundle((fixed, [2, 0, 3, 1]))
    assert chosen(fixed, bundles=(mixed,)) == [[0, 1, 2, 3], [1, 3, 0, 2]]


def test_a_fixed_order_stays_whatever_is_taken() -> None:
    fixed = plain(4, fixed=True)
    takers = bundle((fixed, [1, 3])), bundle((fixed, [0, 2]))
    wish = permuted(fixed, 3, 2, 1, 0)
    assert chosen(fixed, bundles=takers, wishes=(wish,))[0] == [0, 1, 2, 3]


def test_a_wish_is_met_where_that_costs_nothing() -> None:
    tensor = plain(3)
    shuffled = permuted(tensor, 2, 0, 1)
    assert chosen(tensor, wishes=(shuffled,)) == [[2, 0, 1]]
    assert shuffled.sequence().tolist() == [0, 1, 2]
    assert shuffled.positions().tolist() == [0, 1, 2]


def test_joined_tensors_share_an_order() -> None:
    one, other = plain(3), plain(3)
    join(one, permuted(other, 1, 2, 0))
    assert chosen(one, wishes=(other,)) == [[2, 0, 1]]
    assert other.sequence().tolist() == [0, 1, 2]
    join(one, other)  # once more changes nothing
    assert one.settled().layout is other.settled().layout


@pytest.mark.parametrize("first", [True, False])
def test_a_fixed_order_is_taken_over(first: bool) -> None:
    fixed, free = plain(3, fixed=True), plain(3)
    shuffled = permuted(fixed, 1, 2, 0)
    join(*((shuffled, free) if first else (free, shuffled)))
    choose([fixed.layout, free.layout], [], [], [])
    assert free.sequence().tolist() == [2, 0, 1]
    assert shuffled.sequence().tolist() == [2, 0, 1]


def test_two_fixed_orders_are_not_joined() -> None:
    one, other = plain(3, fixed=True), plain(3, groups=3)
    join(one, permuted(other, 1, 2, 0))
    assert one.layout.joined is None
    assert other.layout.joined is None


def test_places_of_groups() -> None:
    def places(*sequence: int) -> list[int] | None:
        found: Array | None = places_of(np.array(sequence), 2)
        return None if found is None else found.tolist()

    assert places(0, 1, 2, 3) == [0, 1]
    assert places(3, 2, 0, 1) == [1, 0]
    assert places(0, 2, 1, 3) is None


def test_groups_stay_together_and_follow_their_inputs() -> None:
    fixed = plain(4, fixed=True)
    outputs = plain(6, groups=2)
    exchanged = Grouped(2, permuted(fixed, 2, 3, 0, 1), outputs)
    assert chosen(fixed, outputs, grouped=(exchanged,))[1] == [3, 4, 5, 0, 1, 2]
    assert exchanged.fits()


def test_rows_of_a_grouped_convolution_are_sorted_within_their_groups() -> None:
    inputs, outputs = plain(4), plain(8, groups=2)
    grouped = Grouped(2, inputs, outputs)
    takers = bundle((outputs, [1, 3, 5, 7])), bundle((outputs, [0, 2, 4, 6]))
    chosen(inputs, outputs, bundles=takers, grouped=(grouped,))
    assert outputs.sequence().tolist() == [1, 3, 0, 2, 5, 7, 4, 6]
    assert grouped.fits()


def test_what_a_grouped_convolution_reads_is_sorted_by_group() -> None:
    inputs, outputs = plain(4), plain(4, groups=2)
    grouped = Grouped(2, permuted(inputs, 0, 2, 1, 3), outputs)
    assert chosen(inputs, outputs, grouped=(grouped,))[0] == [0, 2, 1, 3]
    assert grouped.fits()


def test_inputs_that_cannot_be_sorted_by_group_do_not_fit() -> None:
    fixed, outputs = plain(4, fixed=True), plain(4, groups=2)
    grouped = Grouped(2, permuted(fixed, 0, 2, 1, 3), outputs)
    chosen(fixed, outputs, grouped=(grouped,))
    assert not grouped.fits()
