"""Go on drawing networks: `python -m tests.random_graphs --minutes 10 --seed 0`.

Prints how many networks were tried and what the passes did in them, and every failure as the
smallest listing that still fails. Exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence

import torch

from optfuse import passes
from tests.random_graphs.fuzzing import every_case_holds
from tests.random_graphs.properties import check, check_onnx


def main(arguments: Sequence[str]) -> int:
    """Check networks until the time is over; 1 if something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_graphs", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the first network (default: 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what torch.export says of torch's own code, once a network
    seen: Counter[str] = Counter()
    tried = failed = 0
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        number = options.seed + tried
        try:
            seen += every_case_holds(check, [number])
            if number % 8 == 0:
                every_case_holds(check_onnx, [number], dtype=torch.float32)
        except Exception as error:
            failed += 1
            where = traceback.format_tb(error.__traceback__)[-2:]
            listing = getattr(error, "__notes__", [])  # Python 3.10 does not print them by itself
            print(f"\n--seed {number} fails:", *where, f"{type(error).__name__}: {error}", sep="\n")
            print(*listing, sep="\n", flush=True)
        tried += 1
        if tried % 50 == 0:
            print(f"{tried} networks, {failed} failed", flush=True)
    print(f"\n{tried} networks, {failed} failed\n")
    for name in passes.ORDER:
        print(f"{seen.pop(name, 0):7} rewrites by {name}")
    for name, count in sorted(seen.items()):
        print(f"{count:7} {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
