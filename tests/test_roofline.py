"""Ceilings, on times that are given, and the bound they put on a run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from optfuse.environment import environment
from optfuse.measure import Schedule
from optfuse.roofline import SIZES, Ceilings, achieved, bound_ms, ceilings
from optfuse.stages import Measurement

roofline = import_module("optfuse.roofline")

LIMITS = Ceilings(100.0, 20.0, 1, "cpu", "a processor", "2.13.0", "2026-01-02T03:04:05+00:00")
"""100 GFLOP/s, 20 GB/s: five operations a byte are where one bound gives way to the other."""


class Bench:
    """Stands for `measure`: runs each kernel once, and gives the times that are laid down for it.

    Args:
        product_ms: of each size of matrix product in turn, a list of block medians each.
        copy_ms: block medians of the copy.
    """

    def __init__(self, product_ms: list[list[float]], copy_ms: list[float]) -> None:
        self.times = [*product_ms, copy_ms]
        self.threads: list[int] = []
        self.precision: list[str] = []

    def __call__(
        self, sessions: Sequence[tuple[str, str, Any]], *, schedule: Schedule
    ) -> list[Measurement]:
        ((engine, variant, session),) = sessions
        session.run()
        self.threads.append(torch.get_num_threads())
        self.precision.append(torch.backends.cuda.matmul.fp32_precision)
        medians = self.times[(len(self.threads) - 1) % len(self.times)]
        # The median of three is the middle one.
        blocks = tuple((median * 7, median, median / 3) for median in medians)
        return [Measurement(engine, variant, session.device, blocks)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A machine with 80 GFLOP/s at 512, 107.4 at 1024, and a copy of 4 MB in 0.5 ms."""
    stub = Bench([[4.0, 2 * 512**3 / 80e6, 5.0], [30.0, 20.0]], [0.6, 0.5])
    stand_in(stub, monkeypatch)
    return stub


def stand_in(stub: Bench, monkeypatch: pytest.MonkeyPatch, onednn: Any = None) -> None:
    monkeypatch.setattr(roofline, "measure", stub)
    monkeypatch.setattr(roofline, "COPY_BYTES", 4_000_000)
    monkeypatch.setattr(roofline, "_ONEDNN", onednn)


def test_a_ceiling_is_the_fastest_block_of_the_best_size(bench: Bench) -> None:
    found = ceilings(1)
    # 1e-12: one multiplication and one division in float64.
    assert found.gflops_per_s == pytest.approx(2 * 1024**3 / 20e6, rel=1e-12)
    assert found.gbytes_per_s == pytest.approx(2 * 4e6 / 0.5e6, rel=1e-12)
    assert (found.threads, found.device) == (1, "cpu")
    assert found.cpu_model == environment(1)["cpu_model"]
    assert found.torch_version == torch.__version__
    assert found.measured.endswith("+00:00")


def test_a_larger_product_that_is_slower_does_not_lower_the_ceiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(Bench([[2.0], [40.0]], [1.0]), monkeypatch)
    assert ceilings(1).gflops_per_s == pytest.approx(2 * 512**3 / 2e6, rel=1e-12)


def test_larger_products_are_tried_while_they_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SIZES[:3] == (512, 1024, 2048)
    bench = Bench([[1.0], [7.9], [8.1]], [1.0])
    stand_in(bench, monkeypatch)
    assert ceilings(1).gflops_per_s == pytest.approx(2 * 2048**3 / 8.1e6, rel=1e-12)
    assert len(bench.threads) == 4  # three products and the copy


@pytest.mark.parametrize("times", [[[9.0], [4.0], [40.0], [30.0]], [[4.0], [9.0], [30.0], [40.0]]])
def test_the_faster_library_counts(
    times: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    bench = Bench(times, [1.0])
    stand_in(bench, monkeypatch, onednn=lambda a, b, *_: seen.append(a.shape))
    assert ceilings(1).gflops_per_s == pytest.approx(2 * 1024**3 / 30e6, rel=1e-12)
    assert seen == [(512, 512), (1024, 1024)]


def test_several_threads_are_used_and_one_is_tried_as_well(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set and not used: more than one PyTorch thread is no thing for a test."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    before = torch.get_num_threads()
    assert ceilings(3).threads == 3
    assert asked == [1, before, 3, before]


def test_threads_and_precision_are_put_back(bench: Bench) -> None:
    matmul = torch.backends.cuda.matmul
    before = (torch.get_num_threads(), matmul.fp32_precision)
    ceilings(1)
    assert set(bench.threads) == {1}
    assert set(bench.precision) == {"ieee"}
    assert (torch.get_num_threads(), matmul.fp32_precision) == before


def test_it_is_measured_once_and_kept(bench: Bench, tmp_path: Path) -> None:
    first = ceilings(1, cache=tmp_path / "new" / "folder")
    runs = len(bench.threads)
    again = ceilings(1, cache=tmp_path / "new" / "folder")
    assert again == first
    assert len(bench.threads) == runs
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert json.loads(file.read_text()) == asdict(first)


def test_what_was_surpassed_is_measured_again_and_the_higher_rates_are_kept(
    bench: Bench, tmp_path: Path
) -> None:
    once = ceilings(1, cache=tmp_path)
    [path] = tmp_path.iterdir()
    # As a busy machine would have left it, but for a copy that was faster than it is now.
    busy = replace(once, gflops_per_s=once.gflops_per_s / 2, gbytes_per_s=once.gbytes_per_s * 2)
    path.write_text(json.dumps(asdict(busy)), encoding="utf-8")
    assert ceilings(1, cache=tmp_path) == busy
    again = ceilings(1, cache=tmp_path, surpassed=True)
    assert again.gflops_per_s == once.gflops_per_s
    assert again.gbytes_per_s == busy.gbytes_per_s
    assert ceilings(1, cache=tmp_path) == again


def test_another_thread_count_and_another_pytorch_are_measured_anew(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    ceilings(1, cache=tmp_path)
    ceilings(2, cache=tmp_path)
    monkeypatch.setattr(torch, "__version__", "99.0")
    ceilings(1, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_without_a_cache_nothing_is_kept(bench: Bench) -> None:
    ceilings(1)
    runs = len(bench.threads)
    ceilings(1)
    assert len(bench.threads) == 2 * runs


BROKEN: dict[str, Any] = {
    "cut off": lambda text: text[:40],
    "no text": lambda text: b"\xff\xfe\x00",
    "a list": lambda text: "[1, 2]",
    "a key too many": lambda text: text.replace("{", '{"more": 1,'),
    "no rate": lambda text: json.dumps({**json.loads(text), "gflops_per_s": 0}),
    "negative": lambda text: json.dumps({**json.loads(text), "gbytes_per_s": -3.0}),
    "not finite": lambda text: json.dumps({**json.loads(text), "gbytes_per_s": math.inf}),
    "text for a rate": lambda text: json.dumps({**json.loads(text), "gflops_per_s": "fast"}),
    "another machine": lambda text: json.dumps({**json.loads(text), "cpu_model": "foreign"}),
    "no date": lambda text: json.dumps({**json.loads(text), "measured": "yesterday"}),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_does_not_hold_what_it_should_is_replaced(
    damage: Any, bench: Bench, tmp_path: Path
) -> None:
    first = ceilings(1, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    damaged = damage(good)
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    runs = len(bench.threads)
    again = ceilings(1, cache=tmp_path)
    assert len(bench.threads) == 2 * runs
    assert replace(again, measured=first.measured) == first
    assert json.loads(file.read_text()) == asdict(again)


def test_a_cache_that_cannot_be_written_to_costs_nothing_but_time(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert ceilings(1, cache=tmp_path / "file").gflops_per_s > 0


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("which", ["gflops_per_s", "gbytes_per_s"])
def test_a_ceiling_is_a_positive_finite_rate(which: str, rate: float) -> None:
    with pytest.raises(ValueError, match="a ceiling is a positive finite rate, not"):
        replace(LIMITS, **{which: rate})


def test_the_bound_is_the_longer_of_two_times() -> None:
    # 3 GFLOP take 30 ms at 100 GFLOP/s; 1 GB takes 50 ms at 20 GB/s.
    assert bound_ms(3_000_000_000, 0, LIMITS) == pytest.approx(30.0, rel=1e-12)
    assert bound_ms(0, 1_000_000_000, LIMITS) == pytest.approx(50.0, rel=1e-12)
    assert bound_ms(3_000_000_000, 1_000_000_000, LIMITS) == pytest.approx(50.0, rel=1e-12)
    assert bound_ms(9_000_000_000, 1_000_000_000, LIMITS) == pytest.approx(90.0, rel=1e-12)


def test_what_a_run_achieved() -> None:
    found = achieved(3_000_000_000, 1_000_000_000, 100.0, LIMITS)
    assert found.gflops_per_s == pytest.approx(30.0, rel=1e-12)
    assert found.gbytes_per_s == pytest.approx(10.0, rel=1e-12)
    assert found.share == pytest.approx(0.5, rel=1e-12)


def test_a_run_at_the_ceiling_has_a_share_of_1_and_one_above_it_more() -> None:
    assert achieved(1_000_000_000, 8, 10.0, LIMITS).share == pytest.approx(1.0, rel=1e-12)
    assert achieved(1_000_000_000, 8, 5.0, LIMITS).share == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("median_ms", [0.0, -1.0, math.nan, math.inf])
def test_a_run_takes_a_positive_finite_time(median_ms: float) -> None:
    with pytest.raises(ValueError, match="a run takes a positive finite time, not"):
        achieved(1, 1, median_ms, LIMITS)


@pytest.mark.parametrize("size", [3, 64])
def test_every_library_multiplies(size: int) -> None:
    """By what it returns; oneDNN takes the second factor transposed."""
    products = [work() for work in roofline._products(size, "cpu")]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand((2, size, size), generator=generator).double()
    # 1e-6: sums of up to 64 products of float32 numbers between 0 and 1.
    torch.testing.assert_close(products[0].double(), a @ b, rtol=1e-6, atol=0)
    for product in products[1:]:
        torch.testing.assert_close(product.double(), a @ b.T, rtol=1e-6, atol=0)


def test_this_machine_can_do_something(tmp_path: Path) -> None:
    """The real thing once, the kernels' own speed left out of it."""
    found = ceilings(1, cache=tmp_path)
    assert found.gflops_per_s > 0
    assert found.gbytes_per_s > 0
    assert ceilings(1, cache=tmp_path) == found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_ceilings_of_its_own(tmp_path: Path) -> None:
    ceilings(1, cache=tmp_path)
    found = ceilings(1, "cuda", tmp_path)
    assert found.device == torch.cuda.get_device_name(0)
    assert min(found.gflops_per_s, found.gbytes_per_s) > 0
    assert len(list(tmp_path.iterdir())) == 2
