"""Which value of an ONNX file is the value of which node of the captured program."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx
from torch import fx

from optfuse.graph import ONNX_LAYERS, is_call
from optfuse.layers.drifts import Place
from optfuse.layers.programs import Captured

_CALL = re.compile(r"%(\S+) : .*?\[target=([^\]]+)\]\(args = (.*)\)$", re.DOTALL)
"""A call as FX writes it. torch.onnx keeps it in the metadata of the ONNX nodes made of it."""

_PARAMETER = re.compile(r"^(p|b|c|obj)_")
"""What torch.export puts in front of the name of a lifted parameter, buffer or constant."""


@dataclass(frozen=True)
class Stated:
    """The captured nodes whose value something computes, and those that went into it."""

    equals: Sequence[str]
    origins: Sequence[str]


def places_in(model: onnx.ModelProto, captured: Captured) -> list[Place]:
    """Where an ONNX file computes the values of captured nodes, each of them once.

    A file that our export wrote says so itself. In others, a value is taken for the captured node
    of its name where the file's record of the call has the same operator and the same inputs.
    """
    stated = _written_down(model)
    if stated is None:
        stated = _by_name(model, captured)
    places = []
    taken: set[str] = set()
    for node in model.graph.node:
        for name in node.output:
            if name not in stated:
                continue
            known = stated[name].equals
            equal = [each for each in known if each in captured.nodes and each not in taken]
            if equal:
                taken.update(equal)
                places.append(captured.place(name, node.op_type, equal, stated[name].origins))
    return places


def same_names(model: onnx.ModelProto, reference: onnx.ModelProto) -> list[Place]:
    """Where two ONNX files compute the same, each value once: those of the same name.

    A file that our export wrote says for which captured node a value stands; torch.onnx calls it
    what the captured node is called. So the two can be compared with each other. Of two files that
    say nothing, a pair is left out whose records of the call differ.
    """
    ours = _names(model)
    made_by = {value: node for node in reference.graph.node for value in node.output}
    targets = {
        name: value
        for value, stated in _names(reference).items()
        for name in stated.equals
        if value in made_by
    }
    says = _written_down(model) is not None or _written_down(reference) is not None
    places: dict[str, Place] = {}
    for node in model.graph.node:
        for value in node.output:
            if value not in ours:
                continue
            equal = [name for name in ours[value].equals if name in targets]
            target = targets[equal[0]] if equal else ""
            if equal and target not in places and (says or _same_record(node, made_by[target])):
                origins = tuple(ours[value].origins)
                module = _module(node)
                places[target] = Place(value, node.op_type, module, tuple(equal), origins, target)
    return list(places.values())


def _names(model: onnx.ModelProto) -> dict[str, Stated]:
    """For which names each value of a file stands: those that it says, or its own."""
    stated = _written_down(model)
    if stated is not None:
        return stated
    names = (value for node in model.graph.node for value in node.output if value)
    return {name: Stated([name], [name]) for name in names}


def _same_record(one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Whether two nodes were made of the same call, as far as they tell."""
    calls = [_parsed(_metadata(node, "fx_node")) for node in (one, other)]
    return None in calls or calls[0] == calls[1]


def _written_down(model: onnx.ModelProto) -> dict[str, Stated] | None:
    """What our export wrote down; None in a file of another kind, or where that is spoilt."""
    text = next((each.value for each in model.metadata_props if each.key == ONNX_LAYERS), None)
    if text is None:
        return None
    try:
        return {
            name: Stated(
                [str(each) for each in of["equals"]], [str(each) for each in of["origins"]]
            )
            for name, of in json.loads(text).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _by_name(model: onnx.ModelProto, captured: Captured) -> dict[str, Stated]:
    recorded = dict(
        filter(None, (_parsed(_metadata(node, "fx_node")) for node in model.graph.node))
    )
    values = {name for node in model.graph.node for name in node.output}
    stated = {}
    for name in values & captured.nodes.keys():
        node = captured.nodes[name]
        call = node.all_input_nodes[0] if is_call(node, operator.getitem) else node
        if call.name in recorded and _agree(recorded[call.name], call, captured.names):
            stated[name] = Stated([name], _made_of(node, values))
    return stated


def _made_of(node: fx.Node, values: Collection[str]) -> list[str]:
    """The captured nodes that a value stands for: it, and those before it that have no value."""
    found: dict[str, None] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each.name not in found:
            found[each.name] = None
            inputs = (before for before in each.all_input_nodes if before.op == "call_function")
            waiting += [before for before in inputs if before.name not in values]
    return list(found)[::-1]


@dataclass(frozen=True)
class _Call:
    """The target of a call, and the names of the nodes that it reads, as written."""

    target: str
    reads: tuple[str, ...]


def _parsed(text: str | None) -> tuple[str, _Call] | None:
    """A call's name and the call; None where the text is none."""
    found = _CALL.match(text or "")
    if found is None:
        return None
    return found[1], _Call(found[2], tuple(re.findall(r"%(\w+)", found[3])))


def _agree(recorded: _Call, node: fx.Node, captured_names: Collection[str]) -> bool:
    """Whether a file's record is of that captured call.

    An input of another name is let pass where the captured program has no node of that name: the
    exporter split up the call in front of it.
    """
    parsed = _parsed(node.format_node())
    if parsed is None or recorded.target != parsed[1].target:
        return False
    reads = parsed[1].reads
    if len(recorded.reads) != len(reads):
        return False
    return all(
        _without_kind(theirs) == _without_kind(ours)
        or not (_PARAMETER.match(theirs) or theirs in captured_names)
        for theirs, ours in zip(recorded.reads, reads, strict=True)
    )


def _without_kind(name: str) -> str:
    return _PARAMETER.sub("", name.lower())


def _module(node: onnx.NodeProto) -> str:
    """The module that a node came from, as torch.onnx notes it; empty where it does not."""
    scopes = re.findall(r"'([^']*)'", _metadata(node, "name_scopes"))
    return scopes[-2] if len(scopes) > 1 else ""


def _metadata(node: onnx.NodeProto, key: str) -> str:
    wanted = f"pkg.torch.onnx.{key}"
    return next((entry.value for entry in node.metadata_props if entry.key == wanted), "")
