"""Random small networks: whatever the passes make of one, its function stays.

This is the part that runs every time; `make fuzz` goes on for as long as it is told to. A failure
is printed as a listing of the fewest lines that still fail (tests/random_graphs).
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module

import pytest
import torch
from torch import nn

from optfuse import backends, passes
from tests.random_graphs.drawing import EVERY_OPTION, Case
from tests.random_graphs.fuzzing import every_case_holds
from tests.random_graphs.properties import check, check_onnx


@pytest.mark.parametrize(
    ("selection", "seeds"),
    [("all", range(16, 40)), (EVERY_OPTION, range(1000, 1012)), (None, range(2000, 2012))],
    ids=["all", "every_option", "drawn"],
)
def test_passes_keep_the_function_of_random_networks(selection: str | None, seeds: range) -> None:
    seen = every_case_holds(check, seeds, selection=selection)
    assert seen["networks"] == len(seeds)
    if selection == "all":
        # Networks in which a pass finds nothing to do would say nothing about it.
        assert [name for name in passes.ORDER if seen[name] == 0] == []


def test_files_compute_under_onnx_runtime_what_random_networks_do() -> None:
    if reason := backends.get("onnxruntime").unavailable():
        pytest.skip(reason)
    seen = every_case_holds(check_onnx, range(3000, 3003), dtype=torch.float32)
    assert seen["networks"] == 3


def fails_on_two_activations(case: Case) -> Counter[str]:
    assert sum(isinstance(layer, nn.ReLU | nn.GELU) for layer in case.network.layers) < 2
    return Counter()


def test_a_failure_is_told_as_the_smallest_listing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzz = import_module("tests.random_graphs.__main__")
    monkeypatch.setattr(fuzz, "check", fails_on_two_activations)
    monkeypatch.setattr(fuzz, "check_onnx", fails_on_two_activations)
    assert fuzz.main(["--minutes", "0.001", "--seed", "24"]) == 1
    printed = capsys.readouterr().out
    listing = printed.partition("--seed 24 fails:")[2].partition("return")[0]
    # At most a convolution and a batch norm in front of each, as one line of drawing gives them.
    assert listing.count("ReLU()(") + listing.count("GELU(approximate='none')(") == 2
    assert listing.count(" = ") <= 2 + 6
    assert printed.count(" rewrites by ") == len(passes.ORDER)
