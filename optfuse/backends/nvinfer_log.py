"""What the packages `tensorrt` and `tensorrt_rtx` say: kept, and turned into sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optfuse.backends.onnx_places import OnnxPlace, place_in, place_of

_SOURCE_LOCATION = re.compile(r" In \S+ at \S+:[0-9]+")
_API_CALL = re.compile(r"(?:^|\s)\w+::\w+: Error Code [0-9]+: [\w ]+ \((.*)", re.DOTALL)
"""`IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (the reason)`."""

_NEXT_ERROR = re.compile(r"\)(?: \[\w+\.cpp::|$)")
"""The end of a reason: of the text, or where another error is told behind it."""

_COMPILER = re.compile(r"^\[[\w.]+:[0-9]+: \w+\] ")
"""`[pass.cpp:1500: run_passes] the reason`."""

_ASSERTED = re.compile(r'&& "([^"]+)"$|^Assertion failed: .*?: (?=[A-Z])(.+)$')
"""An assertion of the parser's: `condition && "the reason"`, or `Assertion failed: condition: The
reason`."""

_IMPOSSIBLE = re.compile(
    r"k(MIN|OPT|MAX) values (?:are not self-consistent\. |"
    r"for profile [0-9]+ violate shape constraints: )(.*)",
    re.DOTALL,
)
"""A warning, or an error, of a shape in the profile that the network cannot have."""

_POINTS = {"MIN": "smallest", "OPT": "usual", "MAX": "largest"}


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
    text = " ".join((errors[0] if errors else "It gave no reason").split())
    call = _API_CALL.search(text)
    if call:
        text = _COMPILER.sub("", _NEXT_ERROR.split(call[1], maxsplit=1)[0])
    return _SOURCE_LOCATION.sub("", text).strip()


def build_failure(messages: Iterable[tuple[str, str]], onnx: Path) -> str:
    """Why a build failed, with the ONNX node that the builder names and the module behind it.

    Args:
        messages: the logger's, since the build began.
        onnx: the file that was built from.
    """
    cause = sentence_of(errors_of(messages)[-1:])
    place = place_in(onnx, cause)
    if place is None:
        return cause
    return f"Its builder stopped at {place}: {_without_place(cause, place)}"


def parse_failure(error: Any, onnx: Path) -> str:
    """Why a file was not understood, from a parser's error."""
    description = sentence_of([error.desc()])
    asserted = _ASSERTED.search(description)
    cause = (asserted[1] or asserted[2]) if asserted else description
    if cause in ("", "false"):  # all that it says where a check knows of no form that would do
        cause = "It does not support that operator there"
    name, operator = error.node_name(), error.node_operator()
    if not name:
        at = f"Its parser stopped at a node without a name ({operator}): " if operator else ""
        return at + cause
    place = place_of(onnx, name) or OnnxPlace(name, operator, "")
    return f"Its parser stopped at {place}: {cause.removeprefix(f'{name}: ')}"


def profile_failure(messages: Iterable[tuple[str, str]], onnx: Path) -> str | None:
    """Why the network cannot run at a shape of its profile, or None.

    Of all but the usual shape the builder only warns, and gives an engine that fails when it is
    given that shape.
    """
    for severity, text in messages:
        found = _IMPOSSIBLE.search(text) if severity in ("WARNING", "ERROR") else None
        if found:
            cause = sentence_of([found[2]]).removesuffix(")")
            place = place_in(onnx, cause)
            at = "" if place is None else f", at {place}"
            said = cause if place is None else _without_place(cause, place)
            return f"The network cannot run at its {_POINTS[found[1]]} shapes{at}: {said}"
    return None


def _without_place(cause: str, place: OnnxPlace) -> str:
    """The builder says which node it is about, often twice: `ITopKLayer topk: topk: K is large`."""
    return re.sub(rf"^(?:I\w+Layer )?(?:{re.escape(place.node)}: )+", "", cause)
