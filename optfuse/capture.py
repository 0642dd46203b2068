"""LoadedModel -> Program: torch.export, then functional ATen with parameters as `get_attr`."""

from __future__ import annotations

import inspect
import logging
import math
import re
import sysconfig
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from optfuse import constraints
from optfuse.branches import inline_calls
from optfuse.errors import CaptureError
from optfuse.float64 import distance, run_stepwise
from optfuse.graph import ASSERT, operators, own_what_is_written, prepare
from optfuse.stages import LoadedModel, Point, Program, Step

_BRANCHING = r"(?:%|\b)(?:cond|while_loop|scan|map_impl)\b"
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")


def capture(model: LoadedModel) -> Program:
    """Capture the model on its example inputs.

    The program shares its parameters with the model; what the model's own forward writes to is
    copied, so that running the program leaves the model as it was.

    With open dimensions the model is captured on the first inputs that it can be captured on, and
    the program is compared with the model at every point: a branch that depends on a size would
    hold for one side of it alone.

    Raises:
        CaptureError: torch.export cannot follow the model, or the inputs do not fit it; names
            the line of the user's code.
    """
    started = time.perf_counter()
    model, exported, graph_module = _exported(model)
    assert isinstance(graph_module, fx.GraphModule)
    inline_calls(graph_module)
    _drop_asserts(graph_module)
    prepare(graph_module)
    own_what_is_written(graph_module)
    for point in model.sizes.points if model.sizes else ():
        _require_same(model, graph_module, point)
    total = sum(operators(graph_module).values())
    step = Step(
        stage="capture",
        name="torch.export",
        seconds=time.perf_counter() - started,
        operators_before=total,
        operators_after=total,
    )
    return Program(
        name=model.name,
        graph_module=graph_module,
        exported=exported,
        example_args=tuple(model.example_args),
        example_kwargs=dict(model.example_kwargs),
        dynamic_shapes=_one_for_each_input(model),
        trace=(step,),
        sizes=model.sizes,
    )


_Exported = tuple[LoadedModel, torch.export.ExportedProgram, torch.nn.Module]
"""A model, with the inputs it was captured on, and what torch.export made of it."""


def _exported(model: LoadedModel) -> _Exported:
    if model.sizes is None:
        try:
            return _export(model)
        except Exception as error:
            raise _explain(model, error) from error
    errors = []
    for point in model.sizes.captures:
        attempt = replace(model, example_args=point.args, example_kwargs=point.kwargs)
        try:
            return _export_in_multiples(attempt)
        except CaptureError:
            raise
        except Exception as error:
            errors.append(error)
    # What torch.export says of dimensions tells more than an operator that does not fit others, and
    # what it says of the last inputs is no matter of small sizes, which it takes for granted.
    told = [error for error in errors if constraints.VIOLATED in str(error)]
    chosen = told[-1] if told else errors[0]
    raise _explain(model, chosen) from chosen


def _export_in_multiples(model: LoadedModel) -> _Exported:
    """The model exported, with those dimensions in multiples that have to be."""
    known: set[str] = set()
    while True:
        try:
            return _export(model)
        except Exception as error:
            changed = constraints.with_multiples(model, error)
            if changed is None or str(changed.dynamic_shapes) in known:
                raise
            model = changed
            known.add(str(model.dynamic_shapes))


def _export(model: LoadedModel) -> _Exported:
    with torch.no_grad(), _quiet():
        exported = torch.export.export(
            model.module,
            tuple(model.example_args),
            dict(model.example_kwargs),
            dynamic_shapes=model.dynamic_shapes,
            strict=False,
        )
        return model, exported, exported.run_decompositions({}).module(check_guards=False)


def _require_same(model: LoadedModel, graph_module: fx.GraphModule, point: Point) -> None:
    """Refuse a program that fails at a point, or gives something else there than the model.

    Raises:
        CaptureError: as it says.
    """
    try:
        steps = run_stepwise(graph_module, point.args, point.kwargs, widen=False)
        [(_, outputs)] = deque(steps, maxlen=1)  # the last step is the output
    except Exception as error:
        what = _explain_forward(model) or (
            f"At {point.at} the program fails with {type(error).__name__}: {_one_line(error)}",
            "Give a narrower range with --dim, or make the model take every size in it",
        )
        raise CaptureError(f"'{model.name}' cannot be captured", *what) from error
    if any(map(_cannot_be_run_again, graph_module.graph.nodes)):
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)  # as run_stepwise does
            expected = model.module(*_copied(point.args), **_copied(dict(point.kwargs)))
    except Exception as error:
        raise _explain(model, error) from error
    if not _alike(pytree.tree_leaves(expected), pytree.tree_leaves(outputs)):
        raise CaptureError(
            f"'{model.name}' cannot be captured",
            f"At {point.at} the program gives something else than the model: its code takes "
            "another way there, and a program has one way for all sizes",
            "Make that code the same for every size, or give a range of --dim on one side of it",
        )


def _cannot_be_run_again(node: fx.Node) -> bool:
    """Whether running a model with this in it changes the model, or gives something else."""
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return draws or (node.op == "get_attr" and bool(node.meta.get("written")))


def _copied(nested: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.clone, nested)


def _alike(expected: list[Any], found: list[Any]) -> bool:
    """Whether outputs are the same but for rounding.

    Half of the dtype's digits: operators in another spelling round in other places, which is far
    below that, while another way through a model's code is far above. An integer may be the place
    of one of two equal numbers, so of integers the shapes are compared alone.
    """
    if len(expected) != len(found):
        return False
    for wanted, given in zip(expected, found, strict=True):
        if not isinstance(wanted, torch.Tensor) or not isinstance(given, torch.Tensor):
            continue
        if wanted.shape != given.shape or wanted.dtype != given.dtype:
            return False
        if wanted.is_floating_point():
            limit = math.sqrt(torch.finfo(wanted.dtype).eps)
            if distance([wanted.double()], [given.double()]) > limit:
                return False
    return True


def _one_for_each_input(model: LoadedModel) -> Any:
    """The dynamic shapes as the captured graph takes them: what the model's forward takes as one
    `*inputs` are inputs of their own there."""
    shapes = model.dynamic_shapes
    if shapes is None:
        return None
    signature = inspect.signature(model.module.forward)
    starred = inspect.Parameter.VAR_POSITIONAL
    if all(each.kind is not starred for each in signature.parameters.values()):
        return shapes
    bound = signature.bind(*model.example_args, **model.example_kwargs).arguments
    if not isinstance(shapes, Mapping):
        if not isinstance(shapes, (tuple, list)):
            return shapes
        shapes = dict(zip(bound, shapes, strict=True))
    unpacked = {}
    for name, given in shapes.items():
        if signature.parameters[name].kind is starred:
            each = [None] * len(bound[name]) if given is None else given
            unpacked.update({f"{name}_{number}": one for number, one in enumerate(each)})
        else:
            unpacked[name] = given
    return unpacked


def _drop_asserts(graph_module: fx.GraphModule) -> None:
    """Asserts on dtype and layout hold by construction, and would fail in float64."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is ASSERT:
            graph_module.graph.erase_node(node)
    unused = [n for n in graph_module.graph.nodes if n.op == "get_attr" and not n.users]
    for node in unused:
        graph_module.graph.erase_node(node)
    graph_module.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.export prints besides its exception off the terminal: warnings, log lines,
    and the graph as far as it came."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _explain(model: LoadedModel, error: Exception) -> CaptureError:
    cause, step = (
        _explain_call(model)
        or _explain_values(error)
        or _explain_branches(error)
        or _explain_forward(model)
        or (model.sizes and constraints.explain(model, error))
        or _explain_export(model, error)
    )
    return CaptureError(f"'{model.name}' cannot be captured", cause, step)


def _explain_call(model: LoadedModel) -> tuple[str, str] | None:
    """Inputs that the signature of forward does not take, however torch.export reports them."""
    try:
        signature = inspect.signature(model.module.forward)
    except ValueError:  # written in C, and says nothing of what it takes
        return None
    try:
        signature.bind(*model.example_args, **model.example_kwargs)
    except TypeError as error:
        return (
            f"Its inputs do not fit forward{signature}: {_one_line(error)}",
            "Give every input that forward needs, and no other, with --input [NAME=]SHAPE[:DTYPE]",
        )
    return None


def _explain_values(error: Exception) -> tuple[str, str] | None:
    """A branch or a shape that depends on the values of a tensor."""
    if "GuardOnDataDependent" not in type(error).__name__ and "data-dependent" not in str(error):
        return None
    return (
        f"A branch or a shape{_where(error)} depends on the values of a tensor",
        "Write the branch with torch.cond or torch.where, and take sizes from shapes, so that one "
        "graph serves all inputs",
    )


def _explain_branches(error: Exception) -> tuple[str, str] | None:
    """What `torch.cond` and its like do not take; plain PyTorch says it at such length, too."""
    text = str(error)
    if "FunctionalTensor on its own" in text and re.search(_BRANCHING, text):
        return (
            f"A branch of a control-flow operator{_where(error)} makes a tensor from numbers, "
            "where torch.export cannot follow",
            "Register that tensor with register_buffer, or make it in front of the operator",
        )
    rejected = re.search(
        rf"with fake tensors: call_function {_BRANCHING}.*: got \w+\(([\"'])(.*?)(?:\. |\1\))", text
    )
    if rejected is None:
        return None
    return (
        f"The branches of a control-flow operator{_where(error)} do not fit: {rejected[2]}",
        "Give all branches contiguous results of one shape and one dtype, none of which is an "
        "input or a view of one",
    )


def _explain_forward(model: LoadedModel) -> tuple[str, str] | None:
    """A model that fails without torch.export too: then that is what its owner wants to know."""
    if model.sizes is None:
        error = _failure(model, model.example_args, model.example_kwargs)
        if error is None:
            return None
        return (
            f"Its forward fails on these inputs{error}",
            "Check the shapes and dtypes given with --input or example_inputs(), and that the "
            "model runs on them in plain PyTorch",
        )
    failures = {point.at: _failure(model, point.args, point.kwargs) for point in model.sizes.points}
    works = [at for at, error in failures.items() if error is None]
    for at, error in failures.items():
        if error is not None:
            return (
                f"Its forward fails at {at}{error}",
                f"It runs at {works[0]}: give a narrower range with --dim, or make that line take "
                "every size in it"
                if works
                else "Check the shapes and dtypes given with --input and --dim, and that the model "
                "runs on them in plain PyTorch",
            )
    return None


def _failure(model: LoadedModel, args: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Where and how forward fails; None where it does not."""
    try:
        with torch.no_grad(), _quiet():
            model.module(*args, **kwargs)
    except Exception as error:
        raised = type(error).__name__ + (f": {_one_line(error)}" if str(error).strip() else "")
        return f"{_where(error)} with {raised}"
    return None


def _explain_export(model: LoadedModel, error: Exception) -> tuple[str, str]:
    """What runs in plain PyTorch and torch.export does not take."""
    where, text = _where(error), str(error)
    if "numpy()" in text:
        return (
            f"It goes through NumPy{where}, where torch.export cannot follow",
            "Replace that line by tensor operations",
        )
    if "in output, which is not a known type" in text:
        return (
            "Its forward returns something other than tensors, numbers, tuples, lists and dicts: "
            + _one_line(error),
            "Return one of those, or register the class with torch.export.register_dataclass",
        )
    if "Unsupported input type" in text:
        return (
            f"An input is no tensor, number, tuple, list or dict: {_one_line(error)}",
            "Give it one of those, or register the class with torch.export.register_dataclass",
        )
    if "ScriptModule" in text:
        return "It is a TorchScript module", "Give the nn.Module that it was made from"
    if "is mutated in the forward method" in text:
        return (
            f"Its forward writes to a tensor that is no buffer: {_one_line(error)}",
            "Register that tensor with register_buffer",
        )
    if model.dynamic_shapes is not None and not where:
        violated = re.search(r"^  - (.*?)(?:\. |$)", text, re.MULTILINE)
        return (
            f"Its dynamic shapes do not fit: {violated[1] if violated else _one_line(error)}",
            "Correct dynamic_shapes, or leave them out for a program of these shapes alone",
        )
    return (
        f"torch.export stopped{where} with {type(error).__name__}: {_one_line(error)}",
        "Rewrite that line with tensor operations, or run again with --debug",
    )


def _where(error: BaseException) -> str:
    frame = _users_frame(error)
    return f" at {frame.filename}:{frame.lineno} (`{frame.line}`)" if frame else ""


def _users_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The deepest line of the traceback that the user wrote, else the deepest of a package that is
    neither PyTorch nor Python's own library."""
    not_theirs = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    python = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).exists() and not frame.filename.startswith(not_theirs)
    ]
    installed = [frame for frame in frames if _INSTALLED.search(frame.filename)]
    own = [f for f in frames if f not in installed and not f.filename.startswith(python)]
    if own or installed:
        return (own or installed)[-1]
    chain = error.__cause__ or error.__context__
    return _users_frame(chain) if chain is not None else None


def _one_line(error: BaseException) -> str:
    """The first sentence of the message; the exporter's own run on into advice and links."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else "no message"
