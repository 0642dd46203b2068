"""What the packages `tensorrt` and `tensorrt_rtx` say: kept, and turned into sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_SOURCE_LOCATION = re.compile(r" In \S+ at \S+:[0-9]+")


def message_logger(trt: Any) -> Any:
    """A logger that keeps what it is told: `messages` holds (severity, text)."""

    class MessageLogger(trt.ILogger):  # type: ignore[misc]  # the package is found at run time
        def __init__(self) -> None:
            # Not super(): pybind11 wants its own constructor called by name.
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity.name, message))

    return MessageLogger()


def errors_of(messages: Iterable[tuple[str, str]]) -> list[str]:
    """The texts of a logger's errors."""
    return [text for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]


def sentence_of(errors: list[str]) -> str:
    """At most one error on one line, without places in the package's own source."""
    text = errors[0] if errors else "It gave no reason"
    return _SOURCE_LOCATION.sub("", " ".join(text.split()))
