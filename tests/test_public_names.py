"""`optfuse.NAME` is the public surface: whole, and the same however it is reached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import optfuse


@pytest.mark.parametrize("name", optfuse.__all__)
def test_every_public_name_is_there_and_is_no_module(name: str) -> None:
    found = getattr(optfuse, name)
    assert isinstance(found, str) or callable(found)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'optfuse' has no attribute 'optimise'"):
        _ = optfuse.optimise


ORDERS = ("pass", "import optfuse.optimize", "import optfuse.pipeline", "optfuse.capture")

SCRIPT = """
import os, torch

for before in {orders}:
    if os.fork() == 0:
        break
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 0, before
else:
    raise SystemExit

import optfuse
exec(before)
from optfuse import capture, load, optimize
assert all(map(callable, (capture, load, optimize, optfuse.export, optfuse.measure)))
from optfuse.optimize import PROOF_LIMIT
"""


def test_functions_win_over_the_files_they_share_a_name_with() -> None:
    """Whatever is imported first. Each order has a process of its own, and all come from one that
    imported PyTorch."""
    root = Path(__file__).parent.parent
    script = SCRIPT.format(orders=ORDERS)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=root, check=True)
