"""What glibc is told about a large model's memory."""

from __future__ import annotations

from typing import Any

import pytest

from optfuse import memory


@pytest.fixture
def settings_of_malloc(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What glibc is told from now on, instead of telling it."""
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(memory, "_glibc", lambda *call: told.append(call))
    return told


def test_malloc_is_as_it_was_after_a_large_model_even_where_that_failed(
    settings_of_malloc: list[tuple[Any, ...]],
) -> None:
    def fail_inside() -> None:
        with memory.freed_at_once(True):
            assert settings_of_malloc == [("mallopt", -3, 256 * 1024)]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    # The upper limits that mallopt(3) gives for a 64-bit system, and the ratio of the two.
    limits = [("mallopt", -3, 32 * 1024**2), ("mallopt", -1, 64 * 1024**2)]
    assert settings_of_malloc[1:] == limits


def test_malloc_is_left_alone_with_a_model_that_is_not_large(
    settings_of_malloc: list[tuple[Any, ...]],
) -> None:
    with memory.freed_at_once(False):
        pass
    assert settings_of_malloc == []


def test_a_function_that_the_c_library_does_not_have_is_not_missed() -> None:
    memory._glibc("no_such_function_of_any_c_library", 1)
