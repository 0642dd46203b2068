"""optfuse: makes a PyTorch model faster to run, proves each step, and reports what it gained.

    model = optfuse.load(optfuse.Source("models/googlenet.py:build"))
    program = optfuse.capture(model)
    faster = optfuse.optimize(program, optfuse.select("all"))
    artifact = optfuse.export(faster, Path("model.onnx"))
    ...

Nothing is imported before it is asked for, so that the command line answers at once.
"""

from optfuse.version import __version__

__all__ = ["__version__"]
