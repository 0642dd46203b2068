"""Caches of measurements and of kernels: whole, of one key, or none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optfuse.backends.nvinfer_cache import (
    CacheFile,
    RuntimeCache,
    attach_timing_cache,
    cache_file,
    keep_timing_cache,
)

KEY: dict[str, Any] = {"onnx_sha256": "a" * 64, "device": "NVIDIA H200", "shapes": []}


def file(folder: Path, **changed: Any) -> CacheFile:
    named = {"kind": "timing", "package": "tensorrt", "version": "10.9", "target": "sm_90"}
    for name in named.keys() & changed.keys():
        named[name] = changed.pop(name)
    return cache_file(folder, depends_on={**KEY, **changed}, **named)  # type: ignore[arg-type]


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    assert file(tmp_path).read() == b""
    file(tmp_path).keep(b"measured")
    assert file(tmp_path).read() == b"measured"
    assert file(tmp_path).path.name.startswith("tensorrt-10.9-sm_90-")
    assert file(tmp_path).path.suffix == ".timing"


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "runtime"},
        {"package": "tensorrt-rtx"},
        {"version": "10.10"},
        {"target": "sm_89"},
        {"onnx_sha256": "b" * 64},
        {"device": "NVIDIA H100"},
        {"shapes": [[1, 3]]},
    ],
)
def test_each_key_has_a_file_of_its_own(tmp_path: Path, changed: dict[str, Any]) -> None:
    one, other = file(tmp_path), file(tmp_path, **changed)
    assert one.path != other.path
    one.keep(b"measured")
    # A file that was copied from elsewhere under this name is not read.
    other.path.write_bytes(one.path.read_bytes())
    assert other.read() == b""


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b + b"!"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, spoil: Any) -> None:
    kept = file(tmp_path)
    kept.keep(b"measured")
    kept.path.write_bytes(spoil(kept.path.read_bytes()))
    assert kept.read() == b""


def test_what_cannot_be_kept_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = file(tmp_path / "file" / "cache")
    kept.keep(b"measured")
    assert kept.read() == b""


class Config:
    """A builder's configuration that takes no cache with `foreign` or `other driver` in it."""

    def __init__(self) -> None:
        self.cache: Any = None

    def create_timing_cache(self, content: bytes) -> Any:
        serialize = lambda: content + b"more"  # noqa: E731
        return None if b"foreign" in content else SimpleNamespace(serialize=serialize, was=content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return b"other driver" not in cache.was

    def get_timing_cache(self) -> Any:
        return self.cache


def test_measurements_go_from_build_to_build(tmp_path: Path) -> None:
    for builds in 0, 1, 2:
        config = Config()
        attach_timing_cache(config, file(tmp_path))
        assert config.cache.was == b"more" * builds
        keep_timing_cache(config, file(tmp_path))


@pytest.mark.parametrize("content", [b"other driver", b"foreign"])
def test_measurements_that_the_package_refuses(tmp_path: Path, content: bytes) -> None:
    file(tmp_path).keep(content)
    config = Config()
    attach_timing_cache(config, file(tmp_path))
    assert config.cache.was == b""


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    keep_timing_cache(Config(), file(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_kernels_are_written_only_where_there_are_new_ones(tmp_path: Path) -> None:
    compiled = [b"one;"]
    given: list[bytes] = []
    config = SimpleNamespace(
        create_runtime_cache=lambda: SimpleNamespace(
            deserialize=given.append, serialize=lambda: compiled[0]
        ),
        set_runtime_cache=lambda cache: True,
    )
    first = RuntimeCache(config, file(tmp_path))
    assert given == []
    first.keep()
    assert file(tmp_path).read() == b"one;"
    written_at = file(tmp_path).path.stat().st_mtime_ns
    second = RuntimeCache(config, file(tmp_path))
    assert given == [b"one;"]
    second.keep()
    assert file(tmp_path).path.stat().st_mtime_ns == written_at
    compiled[0] = b"one;two;"
    second.keep()
    assert file(tmp_path).read() == b"one;two;"
    config.create_runtime_cache = lambda: SimpleNamespace(
        deserialize=given.append, serialize=lambda: None
    )
    RuntimeCache(config, file(tmp_path)).keep()  # the package has nothing to give
    assert file(tmp_path).read() == b"one;two;"
