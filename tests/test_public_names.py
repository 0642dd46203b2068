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


@pytest.mark.parametrize(
    "before", ["pass", "import optfuse.optimize", "import optfuse.pipeline", "optfuse.capture"]
)
def test_functions_win_over_the_files_they_share_a_name_with(before: str) -> None:
    script = (
        f"import optfuse\n{before}\n"
        "from optfuse import capture, load, optimize\n"
        "assert all(map(callable, (capture, load, optimize, optfuse.export, optfuse.measure)))\n"
        "from optfuse.optimize import PROOF_LIMIT\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=root, check=True)
