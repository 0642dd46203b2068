"""The property itself: every case that Hypothesis draws holds, or is cut down to where it fails."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.random_graphs.drawing import Case, cases


def every_case_holds(
    check: Callable[[Case], Counter[str]], seeds: Iterable[int], **drawn: Any
) -> Counter[str]:
    """Check one case a seed.

    One, since the first example of a run is always the simplest one, which is passed over, the
    second one is random, and most others would be variations on it.

    Args:
        check: raises an error where something does not hold of a case; gives what is to be counted.
        seeds: each draws the same network in every run.
        drawn: what is not to be drawn, as `cases` takes it.

    Returns:
        What the checks counted, and how many cases they saw as `networks`.
    """
    seen: Counter[str] = Counter()

    @settings(
        max_examples=2,
        phases=(Phase.generate, Phase.shrink),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(**drawn))
    def holds(case: Case) -> None:
        if case.is_the_simplest:
            return
        seen.update(check(case))
        seen["networks"] += 1

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        for each in seeds:
            seed(each)(holds)()
    return seen
