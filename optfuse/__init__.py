"""optfuse: makes a PyTorch model faster to run, proves each step, and reports what it gained.

    model = load(Source("models/googlenet.py:build"))
    program = capture(model)
    faster = optimize(program, select("all"))
    artifact = export(faster, Path("model.onnx"))
    with backends.get("onnxruntime").open(artifact, BuildOptions()) as session:
        session.bind(program.example_args)
        [measurement] = measure([("onnxruntime", "optimized", session)])
        moved = drift(session.fetch(), reference, ...)

`pipeline.run(Request(...))` does all of it and gives the report. Nothing is imported before it is
asked for, so that the command line answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from optfuse.version import __version__

if TYPE_CHECKING:
    from optfuse.capture import capture
    from optfuse.compare import drift
    from optfuse.errors import OptfuseError
    from optfuse.export import export, export_baseline
    from optfuse.load import load
    from optfuse.lower import lower
    from optfuse.measure import measure
    from optfuse.optimize import optimize, select
    from optfuse.pipeline import Request, run
    from optfuse.precision.plan import Plan
    from optfuse.stages import (
        Artifact,
        BuildOptions,
        Dimension,
        Drift,
        InputSpec,
        LoadedModel,
        Measurement,
        Program,
        Report,
        Source,
    )

_HOMES = {
    "capture": "capture",
    "drift": "compare",
    "OptfuseError": "errors",
    "export": "export",
    "export_baseline": "export",
    "load": "load",
    "Plan": "precision.plan",
    "lower": "lower",
    "measure": "measure",
    "optimize": "optimize",
    "select": "optimize",
    "Request": "pipeline",
    "run": "pipeline",
    **dict.fromkeys(
        (
            "Artifact",
            "BuildOptions",
            "Dimension",
            "Drift",
            "InputSpec",
            "LoadedModel",
            "Measurement",
            "Program",
            "Report",
            "Source",
        ),
        "stages",
    ),
}

__all__ = [
    "Artifact",
    "BuildOptions",
    "Dimension",
    "Drift",
    "InputSpec",
    "LoadedModel",
    "Measurement",
    "OptfuseError",
    "Plan",
    "Program",
    "Report",
    "Request",
    "Source",
    "__version__",
    "capture",
    "drift",
    "export",
    "export_baseline",
    "load",
    "lower",
    "measure",
    "optimize",
    "run",
    "select",
]


class _Package(ModuleType):
    """An arrow's file and its function share a name; on the package, the name is the function's,
    although importing the file would bind it to the file."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'optfuse' has no attribute '{name}'")
        return getattr(import_module(f"optfuse.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
