"""What engines of the TensorRT family measured or compiled, kept for the next time.

The builder of `tensorrt` times kernels (a timing cache); `tensorrt-rtx` compiles them when an
engine is loaded (a runtime cache). Either is worth something only to the same package on the same
GPU, so each file belongs to one key, and its checksum takes the key in: no damaged bytes, and none
of another machine or model, reach the package's own reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optfuse.errors import OutputError
from optfuse.files import write_bytes

_DIGEST_BYTES = hashlib.sha256().digest_size
_SHOWN_DIGITS = 16


@dataclass(frozen=True)
class CacheFile:
    """A file that belongs to one key.

    Attributes:
        path: where it lies; its name starts with what a user looks for, and ends with the key.
        key: everything that its content depends on, as a digest.
    """

    path: Path
    key: str

    def read(self) -> bytes:
        """What was kept; empty where there is nothing, or it is damaged or of another key."""
        try:
            stored = self.path.read_bytes()
        except OSError:
            return b""
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        return content if digest == self._checksum(content) else b""

    def keep(self, content: bytes) -> None:
        """Keep it; where that is impossible it costs time at the next start, and never a result."""
        with contextlib.suppress(OutputError):
            write_bytes(self.path, self._checksum(content) + content)

    def _checksum(self, content: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + content).digest()


def cache_file(
    folder: Path,
    kind: Literal["timing", "runtime"],
    package: str,
    version: str,
    target: str,
    depends_on: Mapping[str, Any],
) -> CacheFile:
    """The file of one package, version, target and whatever else its content depends on.

    Args:
        folder: that holds all of them.
        kind: of cache; the file's suffix.
        package, version: of the engine.
        target: the compute capability.
        depends_on: the model's sha256, the GPU's name and the build options, as JSON takes them.
    """
    whole = {**depends_on, "kind": kind, "package": package, "version": version, "target": target}
    key = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    name = f"{package}-{version}-{target}-{key[:_SHOWN_DIGITS]}.{kind}"
    return CacheFile(folder / name, key)


def attach_timing_cache(config: Any, file: CacheFile) -> None:
    """Give the builder the measurements of an earlier build of the same."""
    # An empty cache where the package refuses the stored one, e.g. of another driver.
    for offered in (file.read(), b""):
        cache = config.create_timing_cache(offered)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def keep_timing_cache(config: Any, file: CacheFile) -> None:
    """Keep the builder's measurements for the next build."""
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is not None:
        file.keep(bytes(content))


class RuntimeCache:
    """The kernels that TensorRT for RTX compiles for one engine on one GPU.

    Args:
        config: an `IRuntimeConfig`, which is given the cache.
        file: where they are kept.
    """

    def __init__(self, config: Any, file: CacheFile) -> None:
        self._file = file
        self._stored = file.read()
        self._cache = config.create_runtime_cache()
        # The package refuses what another driver or GPU compiled, and compiles again.
        if self._stored:
            self._cache.deserialize(self._stored)
        self.share(config)

    def share(self, config: Any) -> None:
        """Let another context of the same engine use and fill the cache too."""
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Keep what was compiled since, if anything was."""
        content = self._cache.serialize()
        if content is not None and bytes(content) not in (b"", self._stored):
            self._file.keep(bytes(content))
