"""Program -> ONNX artifact: what torch.onnx.export gives as it comes, and ours."""

from __future__ import annotations

import json
import logging
import operator
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from optfuse.conv_act import ensure_bias, translation_table
from optfuse.errors import ExportError, OptfuseError, UsageError
from optfuse.files import sha256, staged
from optfuse.graph import ONNX_LAYERS, equals, export_again, is_call, operators, origins
from optfuse.onnx_dimensions import name_dimensions
from optfuse.stages import Artifact, Program, Step, Variant

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 20
"""Of our file: what the translation of `conv_act` is written in, and what torch.onnx takes by
itself."""

BFLOAT16_OPSET = 22

EMBED_LIMIT_BYTES = 256 * 2**20
"""From here on parameters lie in a second file beside the ONNX file, as torch.onnx does by itself.
Protobuf allows less than 2 GiB in one file, and holds three copies of all of it while it writes."""


def export_baseline(program: Program, path: Path, *, output_names: Sequence[str] = ()) -> Artifact:
    """Write what `torch.onnx.export` gives as it comes: what people would deploy otherwise.

    Its open dimensions have the user's names.

    Args:
        program: as captured; its exported program is handed over untouched.
        path: of the ONNX file, which appears whole or not at all.
        output_names: what to call outputs, by default what torch.onnx calls them.

    Raises:
        ExportError: torch.onnx cannot translate the program.
        OutputError: the file cannot be written.
        UsageError: the names are not one for each output, or one is taken.
    """
    started = time.perf_counter()
    with _explained(program.name):
        onnx_program = _to_onnx(program.exported)
        name_dimensions(onnx_program, program)
        if output_names:
            _name_outputs(onnx_program, output_names)
    return _write(onnx_program, program, path, "baseline", started)


def export(
    program: Program,
    path: Path,
    *,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
) -> Artifact:
    """Write an optimised program as ONNX.

    The file's metadata says which of its values are those of which captured nodes, under
    `graph.ONNX_LAYERS`.

    Args:
        program: what `optimize` gave.
        path: of the ONNX file, which appears whole or not at all.
        input_names, output_names: what to call inputs and outputs, so that the file can stand in
            for the export as it comes; by default what torch.onnx calls them.

    Raises:
        ExportError: torch.onnx cannot translate the program.
        OutputError: the file cannot be written.
    """
    started = time.perf_counter()
    with _explained(program.name):
        _mark(program.graph_module)
        exported = export_again(program)
        onnx_program = _to_onnx(
            exported,
            custom_translation_table=translation_table(),
            opset_version=_opset(program.graph_module),
            input_names=list(input_names) or None,
            output_names=list(output_names) or None,
        )
        ensure_bias(onnx_program.model)
        name_dimensions(onnx_program, program)
        _name_values(onnx_program, program.graph_module)
    return _write(onnx_program, replace(program, exported=exported), path, "optimized", started)


def _mark(graph_module: fx.GraphModule) -> None:
    """Note every node's name where torch.export and torch.onnx carry it along: in the metadata of
    what they make of the node."""
    for node in graph_module.graph.nodes:
        node.meta["custom"] = {**node.meta.get("custom", {}), ONNX_LAYERS: node.name}


def _name_values(onnx_program: ONNXProgram, graph_module: fx.GraphModule) -> None:
    """Write down which value of the file stands for which captured nodes, and give no other value
    the name of an output, which torch.onnx does where outputs are named."""
    assert onnx_program.exported_program is not None
    graph = onnx_program.model.graph
    nodes = {node.name: node for node in graph_module.graph.nodes}
    names = _names_in_onnx(onnx_program, nodes)
    returned = onnx_program.exported_program.graph_signature.user_outputs
    outputs = dict(zip(graph.outputs, returned, strict=False))
    values = [value for node in graph for value in node.outputs]
    by_torch = {value: outputs.get(value, value.name) or "" for value in values}
    _free_names_of_outputs(graph)
    layers = {}
    for value, name in by_torch.items():
        node = nodes.get(names.get(name, ""))
        if node is not None and equals(node):
            layers[value.name] = {"equals": equals(node), "origins": origins(node)}
    onnx_program.model.metadata_props[ONNX_LAYERS] = json.dumps(layers)


def _free_names_of_outputs(graph: Any) -> None:
    """Give each value that has the name of an output another one."""
    outputs = set(graph.outputs)
    output_names = {value.name for value in outputs}
    values = [value for node in graph for value in node.outputs]
    taken = {value.name for value in values}
    for value in values:
        name, number = value.name, 1
        while value not in outputs and value.name in output_names:
            inner = f"{name}_inner_{number}"
            value.name = value.name if inner in taken else inner
            number += 1


def _name_outputs(onnx_program: ONNXProgram, names: Sequence[str]) -> None:
    """Call the outputs as the user wants it.

    Raises:
        UsageError: these are not as many as there are outputs, or one is taken.
    """
    graph = onnx_program.model.graph
    own = [value.name for value in graph.outputs]
    if len(names) != len(own):
        count = f"{len(own)} output{'' if len(own) == 1 else 's'}"
        raise UsageError(
            f"The outputs cannot be called {', '.join(names)}",
            f"The model has {count} ({', '.join(map(str, own))}), and --output-name is given "
            f"{len(names)} times",
            "Give it once for each output, in order",
        )
    inputs = {value.name for value in graph.inputs}
    for name in names:
        taken = (
            "It is the name of an input"
            if name in inputs
            else "It is the name of a weight"
            if name in graph.initializers
            else "It is given more than once"
            if list(names).count(name) > 1
            else None
        )
        if taken or not name.strip() or not name.isprintable():
            raise UsageError(
                f"An output cannot be called {name!r}",
                taken or "A name has letters, digits or signs, and nothing that cannot be seen",
                "Choose another name with --output-name",
            )
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    _free_names_of_outputs(graph)


def _names_in_onnx(onnx_program: ONNXProgram, nodes: Mapping[str, fx.Node]) -> dict[str, str]:
    """What torch.onnx calls the result of a node by itself -> the node's name."""
    assert onnx_program.exported_program is not None
    picks = {
        (node.args[0].name, node.args[1]): node.name
        for node in nodes.values()
        if is_call(node, operator.getitem) and isinstance(node.args[0], fx.Node)
    }
    found: dict[str, str] = {}
    last: dict[str, str] = {}
    for node in onnx_program.exported_program.graph.nodes:
        marked = node.meta.get("custom", {}).get(ONNX_LAYERS)
        if node.op != "call_function" or marked not in nodes:
            continue
        if not is_call(node, operator.getitem):
            last[marked] = node.name  # of all that was made of a node, the last gives its result
        elif (marked, node.args[1]) in picks:
            picked = picks[marked, node.args[1]]
            # torch.onnx makes one node of a split and its picks, and numbers the results.
            found[node.name] = found[f"{node.args[0].name}_split_{node.args[1]}"] = picked
    return {**found, **{value: name for name, value in last.items()}}


def _opset(graph_module: fx.GraphModule) -> int:
    """The opset that has every type of the graph: a convolution in bfloat16 is in 22 at first."""
    held = (*graph_module.parameters(), *graph_module.buffers())
    return BFLOAT16_OPSET if any(each.dtype == torch.bfloat16 for each in held) else OPSET


def data_file(path: Path) -> Path:
    """The second file of an ONNX file, where its parameters are if they are not in the first."""
    return path.with_name(path.name + ".data")


def _to_onnx(exported: torch.export.ExportedProgram, **options: Any) -> ONNXProgram:
    with torch.no_grad(), _quiet():
        onnx_program = torch.onnx.export(exported, (), dynamo=True, verbose=False, **options)
    assert onnx_program is not None
    return onnx_program


def _write(
    onnx_program: ONNXProgram, program: Program, path: Path, variant: Variant, started: float
) -> Artifact:
    weights_bytes = sum(
        value.const_value.nbytes
        for value in onnx_program.model.graph.initializers.values()
        if value.const_value is not None
    )
    beside = weights_bytes > EMBED_LIMIT_BYTES
    with staged(path.parent) as folder:
        onnx_program.save(folder / path.name, external_data=beside)
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        digest = sha256(folder / path.name)
    if not beside:
        data_file(path).unlink(missing_ok=True)  # of a larger model that was exported here before
    graph = onnx_program.model.graph
    total = sum(operators(program.graph_module).values())
    step = Step(
        stage="export",
        name="torch.onnx.export",
        seconds=time.perf_counter() - started,
        operators_before=total,
        operators_after=sum(1 for _ in graph),
        settings={"variant": variant},
    )
    return Artifact(
        path=path,
        kind="onnx",
        sha256=digest,
        size_bytes=size_bytes,
        variant=variant,
        input_names=tuple(value.name or "" for value in graph.inputs),
        output_names=tuple(value.name or "" for value in graph.outputs),
        trace=(*program.trace, step),
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except OptfuseError:
        raise
    except Exception as error:
        raise ExportError(
            f"'{name}' cannot be exported to ONNX",
            f"{type(error).__name__}: {_reason(error)}",
            "Replace that operator in the model by ones ONNX has, or run again with --debug",
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause that says something, in one line: the exporter wraps it in advice."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own notices (missing torchvision, deprecations) off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
