"""How near a run comes to what the machine can do: S. Williams, A. Waterman and D. Patterson,
"Roofline", Communications of the ACM 52(4), 2009.

Two ceilings are measured with PyTorch: the rate of a float32 matrix product, and the traffic of a
copy. The bound on a run is the longer of two times, that of its arithmetic at the first and that of
the bytes it cannot avoid moving at the second. How near a run comes to it tells whether there is
something left to gain without doing less work.

Both are rates of well-tuned code and not limits of physics, and there are runs that beat them:

- Winograd's and FFT convolutions do fewer operations than are counted, up to 2.25 times fewer for
  a 3x3 kernel on 2x2 tiles.
- Half precision, TF32 and int8 have higher ceilings than float32, which is the one measured here.
- Weights that fit into the last-level cache stay there from one run to the next, and then come
  faster than memory gives them; so do the inputs and the outputs of a small model. The arrays of
  the copy are far larger than any cache.
- Reading alone can be faster than a copy, which writes as much as it reads.

So a share near 1 says that the machine is the limit, and one above 1 that the run found a way
around it. A small share says that there is room, but not that somebody knows how to use it: what
the operators between hand to each other is not counted in the bytes, nor is elementwise arithmetic
counted in the operations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from optfuse.environment import environment
from optfuse.errors import OutputError
from optfuse.files import write_text
from optfuse.measure import Schedule, measure

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

SIZES = (512, 1024, 2048, 4096, 8192)
"""Rows and columns of the matrices that are tried: more cores and GPUs need larger ones to be
busy, and on a single core the largest would take minutes."""

LONGEST_MS = 8.0
"""The next larger product, which takes eight times as long, is tried after one this fast."""

COPY_BYTES = 256 * 2**20
"""Of each of the two arrays of the copy."""

COPIES_ON_DEVICE = 16
"""Copies that a device is given at once, so that starting one costs nothing beside them."""

SCHEDULE = Schedule(
    budget_seconds=0.1,
    min_blocks=3,
    max_blocks=12,
    block_ms=8.0,
    min_runs_per_block=2,
    warmup_ms=20.0,
    warmup_runs=2,
)
"""Of each matrix product and of the copy."""


_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's matrix product, where PyTorch was built with it."""


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most, as far as two simple programs can tell.

    Attributes:
        gflops_per_s: of a float32 matrix product, 10^9 operations a second, a multiply-add counted
            as two.
        gbytes_per_s: of a copy, 10^9 bytes a second, those read and those written counted alike
            (as J. McCalpin's STREAM counts them).
        threads: CPU threads both had.
        device: `cpu` or the CUDA device's name.
        cpu_model: as the system names it, or None.
        torch_version: of what both ran on.
        measured: when, UTC, ISO 8601.

    Raises:
        ValueError: a rate is not a positive finite number.
    """

    gflops_per_s: float
    gbytes_per_s: float
    threads: int
    device: str
    cpu_model: str | None
    torch_version: str
    measured: str

    def __post_init__(self) -> None:
        for rate in (self.gflops_per_s, self.gbytes_per_s):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"a ceiling is a positive finite rate, not {rate}")


@dataclass(frozen=True)
class Achieved:
    """What a run reached.

    Attributes:
        gflops_per_s, gbytes_per_s: its counted work over its time, in the units of `Ceilings`.
        share: the least time that the ceilings allow for that work over the time it took: 1 at
            the ceiling.
    """

    gflops_per_s: float
    gbytes_per_s: float
    share: float


def bound_ms(flops: int, moved_bytes: int, limits: Ceilings) -> float:
    """The least time that the ceilings allow, milliseconds: the longer one of the time for the
    arithmetic and the time for the traffic.

    Args:
        flops: floating-point operations.
        moved_bytes: bytes that have to be moved, as `cost.compulsory_bytes` counts them.
        limits: the machine's ceilings.
    """
    return max(flops / limits.gflops_per_s, moved_bytes / limits.gbytes_per_s) / 1e6


def achieved(flops: int, moved_bytes: int, median_ms: float, limits: Ceilings) -> Achieved:
    """What a run of `median_ms` milliseconds reached; see `bound_ms`.

    Raises:
        ValueError: the time is not a positive finite number.
    """
    if not (math.isfinite(median_ms) and median_ms > 0):
        raise ValueError(f"a run takes a positive finite time, not {median_ms} ms")
    return Achieved(
        gflops_per_s=flops / median_ms / 1e6,
        gbytes_per_s=moved_bytes / median_ms / 1e6,
        share=bound_ms(flops, moved_bytes, limits) / median_ms,
    )


def ceilings(
    threads: int, device: str = "cpu", cache: Path | None = None, *, surpassed: bool = False
) -> Ceilings:
    """This machine's ceilings, measured in about two seconds or read from the cache.

    Args:
        threads: CPU threads.
        device: `cpu`, or a CUDA device as PyTorch names it.
        cache: a folder that keeps them, one file for each processor, device, thread count and
            version of PyTorch; None to measure anew. A file that does not hold what it should is
            measured and written again.
        surpassed: a run was faster than the cache allows, which may have been written on a busy
            machine: measure again, and keep the higher one of each rate.
    """
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    about = {
        "threads": threads,
        "device": name,
        "cpu_model": environment(threads)["cpu_model"],
        "torch_version": str(torch.__version__),
    }
    if cache is None:
        return _measured(device, about)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"ceilings-{key}.json"
    kept = _read(path, about)
    found = kept
    if found is None or surpassed:
        found = _measured(device, about)
        if kept is not None:
            found = replace(
                found,
                gflops_per_s=max(found.gflops_per_s, kept.gflops_per_s),
                gbytes_per_s=max(found.gbytes_per_s, kept.gbytes_per_s),
            )
        with suppress(OutputError):  # it can be measured again, so it need not be kept
            write_text(path, json.dumps(asdict(found), indent=2) + "\n")
    return found


def _read(path: Path, about: dict[str, Any]) -> Ceilings | None:
    """What was measured before on the same machine, or None."""
    try:
        found = Ceilings(**json.loads(path.read_text(encoding="utf-8")))
        datetime.fromisoformat(found.measured)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kept = asdict(found)
    return found if all(kept[key] == value for key, value in about.items()) else None


def _measured(device: str, about: dict[str, Any]) -> Ceilings:
    rates = []
    # What one thread can do, several can do too, even where a busy machine makes them slower.
    for threads in sorted({1, about["threads"]}) if device == "cpu" else [about["threads"]]:
        with _settled(threads):
            rates.append((_matrix_product(device, about["device"]), _copy(device, about["device"])))
    gflops_per_s, gbytes_per_s = map(max, zip(*rates, strict=True))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Ceilings(gflops_per_s, gbytes_per_s, measured=now, **about)


def _matrix_product(device: str, name: str) -> float:
    """The best rate of any size and library, in 10^9 operations a second."""
    best = 0.0
    for size in SIZES:
        kernels = [_Kernel(work, device, name) for work in _products(size, device)]
        run_ms = min(map(_fastest_ms, kernels))
        best = max(best, 2 * size**3 / run_ms / 1e6)
        if run_ms > LONGEST_MS:
            break
    return best


def _products(size: int, device: str) -> list[Callable[[], object]]:
    """One product of square matrices, by each library that PyTorch has for it.

    On a CPU its BLAS is not always the fastest: MKL can leave half of an AMD processor unused where
    oneDNN does not.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.rand((2, size, size), generator=generator, device=device)
    product = torch.empty_like(a)
    libraries: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=product)]
    if device == "cpu" and _ONEDNN is not None:
        libraries.append(lambda: _ONEDNN(a, b, None, "none", [], ""))
    return libraries


def _copy(device: str, name: str) -> float:
    """The best rate, in 10^9 bytes read or written a second."""
    times = 1 if device == "cpu" else COPIES_ON_DEVICE
    # Written to, because memory that never was is all the same page of zeros.
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.full_like(source, 2)

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)

    return 2 * COPY_BYTES * times / _fastest_ms(_Kernel(copy, device, name)) / 1e6


def _fastest_ms(kernel: _Kernel) -> float:
    """The median run of the fastest block: what disturbs a run only ever slows it down, and a
    median does not believe a single reading of the clock."""
    (measured,) = measure([("torch", "ceiling", kernel)], schedule=SCHEDULE)
    return min(median(block) for block in measured.blocks)


class _Kernel:
    """A piece of work as a session, so that the project's one clock can time it."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __init__(self, work: Callable[[], object], device: str, name: str) -> None:
        self.device = name
        self._work = work
        self._synchronized = None if device == "cpu" else torch.device(device)

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Nothing: it holds its own."""

    def run(self) -> None:
        """Do the work and wait for it."""
        self._work()
        if self._synchronized is not None:
            torch.cuda.synchronize(self._synchronized)

    def fetch(self) -> list[torch.Tensor]:
        """Nothing: nobody wants to see it."""
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


@contextmanager
def _settled(threads: int) -> Iterator[None]:
    """So many threads, and full float32: TF32 is another machine's ceiling."""
    before, matmul = torch.get_num_threads(), torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    torch.set_num_threads(threads)
    matmul.fp32_precision = "ieee"
    try:
        with torch.inference_mode():
            yield
    finally:
        matmul.fp32_precision = precision
        torch.set_num_threads(before)
