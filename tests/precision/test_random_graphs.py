"""Random networks: whatever is lowered keeps its function and says the types that it has."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from optfuse.float64 import distance, run_float64
from optfuse.optimize import optimize, select
from optfuse.precision import floats, lower, rules
from tests.precision.test_floats import done, ran
from tests.random_graphs.drawing import Case
from tests.random_graphs.fuzzing import every_case_holds
from tests.random_graphs.properties import program_of


def holds(case: Case) -> Counter[str]:
    """To float64 nothing is rounded, so that all else that lowering does must be exact."""
    seen: Counter[str] = Counter()
    before = optimize(program_of(case, seen), select(case.selection))
    exact = run_float64(before.graph_module, before.example_args, {})
    wide = lower(before, "f64")
    # An attention in plain operators sums in another order; all else is equal bit for bit.
    assert distance(exact, run_float64(wide.graph_module, before.example_args, {})) < 1e-12
    for low in ("fp16", "bf16"):
        once = lower(before, low)
        assert [each.dtype for each in ran(once)] == [each.dtype for each in ran(before)]
        again = done(lower(once, low))
        assert (again.sites, again.settings["casts"]) == ((), 0)
        seen["layers"] += len(done(once).sites)
    return seen


def test_lowering_keeps_the_function_of_random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floats.DTYPES, "f64", torch.float64)
    monkeypatch.setitem(rules.NAMES, torch.float64, "f64")
    seen = every_case_holds(holds, range(8), dtype=torch.float32)
    assert seen["networks"] >= 7
    assert seen["layers"] > 20
