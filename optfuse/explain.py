"""What became of every convolution, and why: the trace of the passes told layer by layer.

A layer is a node of the captured program, in the words its owner has for it: the path of its module
and the line that called it. What the passes did is linked to it by the captured nodes that they
noted as involved in each place, never by a name in a text.
"""

from __future__ import annotations

import operator
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from torch import fx

from optfuse.branches import branches
from optfuse.conv_act import CONV_ACT
from optfuse.convolution import BATCH_NORM, Convolution, convolution_of
from optfuse.errors import UsageError
from optfuse.graph import attribute, is_call, kind, module_path, origins, value
from optfuse.stages import Involved, LayerEvent, LayerHistory, Program, Refused, Site, Step

_FRAME = re.compile(r'^ *File "(.+)", line (\d+), in ', re.MULTILINE)
"""A line of the stack trace that torch.export keeps of each call."""

_NAMED = 3
"""How many paths an error names."""

_OTHERS = 50
"""How many other layers are listed at most, or a thousand that became one would list a million."""

_INSTALLED = re.compile(r"^.*[/\\](?:site|dist)-packages[/\\]")


def histories(captured: Program, optimized: Program) -> tuple[LayerHistory, ...]:
    """What became of every convolution of a captured program, in the order they run, and of every
    linear layer that a pass did something to, or declined to.

    Args:
        captured: as capture gave it.
        optimized: what `optimize` made of it, with its trace.
    """
    layers = _labelled(list(_layers(captured.graph_module)))
    story = _Story(
        {_name(node): node for graph in _graphs(captured.graph_module) for node in graph.nodes},
        {layer.name: layer.label for layer in layers},
        {layer.name: _Chapter(layer.name, frozenset([layer.name])) for layer in layers},
    )
    for step in optimized.trace:
        story.tell(step)
    ends = _Ends.of(optimized.graph_module, story.chapters)
    told = [_history(layer, story, ends) for layer in layers]
    return tuple(each for each in told if each.events or each.operator != "linear")


def fitting(told: Sequence[LayerHistory], pattern: str) -> tuple[LayerHistory, ...]:
    """Those whose module's path, or name where it has none, fits a pattern of `fnmatch`.

    Raises:
        UsageError: there is none.
    """
    found = tuple(each for each in told if fnmatchcase(each.module or each.name, pattern))
    if not found:
        paths = [repr(path) for path in dict.fromkeys(each.module or each.name for each in told)]
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        raise UsageError(
            f"No convolution fits --module {pattern}",
            f"They are in {', '.join(paths[:_NAMED])}{more}" if paths else "The model has none",
            "Give a path of these, or a pattern such as 'features.*'",
        )
    return found


def places_elsewhere(trace: Iterable[Step], told: Iterable[LayerHistory]) -> int:
    """How many of the refused places have to do with none of these layers."""
    names = {each.name for each in told}
    places = [refused.involved for step in trace for refused in step.refused]
    return sum(each is None or names.isdisjoint((*each.origins, *each.about)) for each in places)


def norms_left(optimized: Program) -> tuple[str, ...]:
    """The batch norms that stay and that no pass says anything of, e.g. `norm (behind relu)`: those
    behind no convolution."""
    refused = [each.involved for step in optimized.trace for each in step.refused]
    said = {name for involved in refused if involved is not None for name in involved.origins}
    return tuple(
        f"{module_path(node) or node.name} (behind {kind(node.all_input_nodes[0])})"
        for graph in _graphs(optimized.graph_module)
        for node in graph.nodes
        if is_call(node, BATCH_NORM) and said.isdisjoint(origins(node))
    )


# The layers of the captured program ---------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One layer as captured.

    Attributes:
        name: of its node, behind the names of the graphs that it is inside of.
        seen: the node that knows where it came from: its own, or the operator it is inside of.
        within: the kind of that operator, where no pass looks inside it; else empty.
        label, call, calls: as in `LayerHistory`.
    """

    convolution: Convolution
    name: str
    seen: fx.Node
    within: str
    label: str = ""
    call: int = 1
    calls: int = 1

    @property
    def module(self) -> str:
        """The path of the module that called it."""
        return module_path(self.seen)

    @property
    def visit(self) -> str:
        """Tells the calls of its module from each other: torch.export numbers them."""
        stack = self.seen.meta.get("nn_module_stack")
        return str(list(stack)[-1]) if stack else ""


def _layers(graph_module: fx.GraphModule) -> Iterator[_Layer]:
    looked_into = {id(branch.graph_module) for branch in branches(graph_module)}

    def layers(inside: fx.GraphModule, seen: fx.Node | None, within: str) -> Iterator[_Layer]:
        for node in inside.graph.nodes:
            convolution = _convolution(node)
            if convolution is not None:
                yield _Layer(convolution, _name(node), seen or node, within)
            for inner in _inner_graphs(inside, node):
                alone = "" if id(inner) in looked_into else kind(node)
                yield from layers(inner, seen or node, within or alone)

    return layers(graph_module, None, "")


def _convolution(node: fx.Node) -> Convolution | None:
    # Only the outermost graph is certain to know the shape of every constant.
    known = all("val" in each.meta for each in node.all_input_nodes)
    return convolution_of(node) if known else None


def _name(node: fx.Node) -> str:
    """A captured node's name, behind the names of the graphs that it is inside of."""
    return origins(node)[0]


def _graphs(graph_module: fx.GraphModule) -> Iterator[fx.Graph]:
    """A program's graph, and those inside it."""
    yield graph_module.graph
    for node in graph_module.graph.nodes:
        for inner in _inner_graphs(graph_module, node):
            yield from _graphs(inner)


def _inner_graphs(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that an operator such as `cond` chooses from or repeats."""
    for each in node.all_input_nodes if node.op == "call_function" else ():
        found = attribute(graph_module, str(each.target)) if each.op == "get_attr" else None
        if isinstance(found, fx.GraphModule):
            yield found


def _labelled(layers: Sequence[_Layer]) -> list[_Layer]:
    """The layers with names as a user would say them, each once: the module's path where that is
    but one layer."""
    visits: dict[str, dict[str, None]] = {}
    for layer in layers:
        visits.setdefault(layer.module, {})[layer.visit] = None
    calls = {module: list(found) for module, found in visits.items()}
    sizes = Counter((layer.module, layer.visit) for layer in layers)
    return [
        _with_label(layer, calls[layer.module], sizes[layer.module, layer.visit])
        for layer in layers
    ]


def _with_label(layer: _Layer, visits: Sequence[str], beside: int) -> _Layer:
    call, calls = visits.index(layer.visit) + 1, len(visits)
    label = layer.module
    if not label:
        label = layer.name
    elif beside > 1 or "." in layer.name:
        label = f"{layer.name} ({label}{f', {_ordinal(call)} call' if calls > 1 else ''})"
    elif calls > 1:
        label = f"{label} ({_ordinal(call)} call)"
    return replace(layer, label=label, call=call, calls=calls)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def _settings(convolution: Convolution) -> str:
    """Kernel, channels and what is not as usual, e.g. `3x3 32->64, stride 2`."""
    channels = f"{convolution.in_channels}->{convolution.out_channels}"
    if convolution.linear:
        return channels
    kernel = "x".join(str(size) for size in value(convolution.weight).shape[2:])
    parts = [f"{kernel} {channels}"]
    for name, sizes in (("stride", convolution.stride), ("dilation", convolution.dilation)):
        if set(sizes) != {1}:
            shown = sizes[:1] if len(set(sizes)) == 1 else sizes
            parts.append(f"{name} {'x'.join(map(str, shown))}")
    if convolution.groups > 1:
        parts.append(f"{convolution.groups} groups")
    return ", ".join(parts)


def _source(node: fx.Node) -> str:
    """The deepest line outside PyTorch, optfuse and Python that led to a call; empty if unknown.

    A file below the working directory or among the installed packages is named from there on.
    """
    found = _FRAME.findall(str(node.meta.get("stack_trace") or ""))
    lines = [(file, line) for file, line in found if not _is_not_theirs(file)]
    if not lines:
        return ""
    file, line = lines[-1]
    here = Path.cwd()
    inside = Path(file).is_relative_to(here) and not _INSTALLED.match(file)
    shown = str(Path(file).relative_to(here)) if inside else _INSTALLED.sub("", file)
    return f"{shown}:{line}"


def _is_not_theirs(file: str) -> bool:
    if file.startswith("<"):  # code that was generated, and stands in no file
        return True
    if _INSTALLED.match(file):
        return re.split(r"[/\\]", _INSTALLED.sub("", file))[0] in ("torch", "optfuse")
    ours = Path(__file__).parent
    python = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    return any(Path(file).is_relative_to(folder) for folder in (ours, *python))


# What the passes did to them ----------------------------------------------------------------------


@dataclass
class _Chapter:
    """What was seen of one layer so far.

    Attributes:
        name: of its node.
        one: captured nodes that are part of the same operator by now.
        equal: the layers whose result took the place of its own.
        done: what was done to it.
        refused: what was not: name of the pass and reason -> the places.
    """

    name: str
    one: frozenset[str]
    equal: tuple[str, ...] = ()
    done: dict[LayerEvent, None] = field(default_factory=dict)
    refused: dict[tuple[str, str], dict[str, None]] = field(default_factory=dict)

    @property
    def events(self) -> tuple[LayerEvent, ...]:
        """First what was done, then what was not."""
        refused = [
            LayerEvent(name, "refused", reason, at=tuple(filter(None, places)))
            for (name, reason), places in self.refused.items()
        ]
        return (*self.done, *refused)


@dataclass(frozen=True)
class _Story:
    """All layers, and what the steps of a trace say of each.

    Attributes:
        nodes: of the captured program, by their names.
        labels: what the layers are called, by the names of their nodes.
        chapters: one a layer.
    """

    nodes: Mapping[str, fx.Node]
    labels: Mapping[str, str]
    chapters: Mapping[str, _Chapter]

    def tell(self, step: Step) -> None:
        """Take in one step."""
        for site in step.sites:
            if step.undone is None:
                self._rewritten(step, site)
            else:
                for chapter in self._of(site.involved):
                    chapter.done[LayerEvent(step.name, "undone", step.undone)] = None
        for refused in step.refused:
            for chapter in self._of(refused.involved):
                places = chapter.refused.setdefault((step.name, refused.reason), {})
                places[_place(refused, chapter.name)] = None

    def _of(self, involved: Involved | None) -> list[_Chapter]:
        """The layers that are involved, in whatever way."""
        return [] if involved is None else self._named((*involved.origins, *involved.about))

    def _named(self, names: Iterable[str]) -> list[_Chapter]:
        return [self.chapters[name] for name in dict.fromkeys(names) if name in self.chapters]

    def _rewritten(self, step: Step, site: Site) -> None:
        if site.involved is None:
            return
        standing = self._named(site.involved.about)
        for chapter in standing:
            # It stays, and stands for what was behind it or beside it.
            event = LayerEvent(step.name, "rewritten", site.note, at=(_place(site, ""),))
            chapter.done[event] = None
        replaced = self._named(site.involved.origins)
        # By identity, since a thousand layers that became one share one set.
        ones = {id(chapter.one): chapter.one for chapter in replaced}
        known = frozenset[str]().union(*ones.values())
        fresh = frozenset(site.involved.origins) - known
        took_in = {key: self._reached(one, fresh) for key, one in ones.items()}
        for chapter in replaced:
            others = (each.name for each in replaced if each.name not in chapter.one)
            together = [*islice(others, _OTHERS), *(each.name for each in standing)]
            event = LayerEvent(
                step.name,
                "rewritten",
                site.note,
                took_in=took_in[id(chapter.one)],
                together=tuple(self.labels[name] for name in together),
            )
            chapter.done[event] = None
        one, equal = known | fresh, tuple(each.name for each in standing)
        for chapter in replaced:
            chapter.one, chapter.equal = one, equal or chapter.equal

    def _reached(self, one: Collection[str], names: Collection[str]) -> tuple[str, ...]:
        """The operators among `names` that are next to those of `one` or to each other, by their
        modules where known; those behind another layer are that one's."""
        waiting = list(one)
        seen = set(waiting)
        reached: set[fx.Node] = set()
        while waiting:
            node = self.nodes.get(waiting.pop())
            for each in () if node is None else (*node.all_input_nodes, *node.users):
                name = _name(each)
                if name in names and name not in seen and name not in self.labels:
                    seen.add(name)
                    waiting.append(name)
                    if each.op == "call_function" and not is_call(each, operator.getitem):
                        reached.add(each)
        return tuple(dict.fromkeys(module_path(node) or node.name for node in sorted(reached)))


def _place(where: Site | Refused, layer: str) -> str:
    """A place as the report names it, by operator and module; empty where it is the layer."""
    involved = where.involved
    assert involved is not None
    if layer in involved.origins and involved.operator in _LAYER_KINDS:
        return ""
    return f"{involved.operator} ({involved.module})" if involved.module else where.site


# What they are in the end -------------------------------------------------------------------------

_LAYER_KINDS = {
    "linear",
    "conv_act",
    *(f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)),
}


@dataclass(frozen=True)
class _Ends:
    """What the captured layers became.

    Attributes:
        operators: name of a captured layer -> the nodes of the optimized graph that it is now.
        made_of: and the other way round.
        constants: the layers that constants of the optimized graph were made of.
    """

    operators: Mapping[str, Sequence[fx.Node]]
    made_of: Mapping[fx.Node, Sequence[str]]
    constants: frozenset[str]

    @classmethod
    def of(cls, graph_module: fx.GraphModule, names: Iterable[str]) -> _Ends:
        """Read off an optimized program's graphs."""
        layers: dict[str, list[fx.Node]] = {name: [] for name in names}
        others: dict[str, list[fx.Node]] = {name: [] for name in layers}
        constants: set[str] = set()
        held = {
            node: [name for name in origins(node) if name in layers]
            for graph in _graphs(graph_module)
            for node in graph.nodes
        }
        for node, made_of in held.items():
            if node.op == "get_attr":
                constants.update(made_of)
            elif node.op == "call_function" and not is_call(node, operator.getitem):
                is_layer = _convolution(node) is not None or node.target is CONV_ACT
                for name in made_of:
                    (layers if is_layer else others)[name].append(node)
        # Into a convolution that took in a sum went whatever the sum is of, so that a layer is
        # taken for the operators that the fewest others went into.
        operators = {}
        for name, nodes in layers.items():
            fewest = min((len(held[node]) for node in nodes), default=0)
            operators[name] = [n for n in nodes if len(held[n]) == fewest] or others[name]
        became: dict[fx.Node, list[str]] = {}
        for name, nodes in operators.items():
            for node in nodes:
                became.setdefault(node, []).append(name)
        return cls(operators, became, frozenset(constants))

    def one_with(self, name: str) -> list[str]:
        """The other layers that its operators are too."""
        found: dict[str, None] = {}
        for node in self.operators[name]:
            for each in self.made_of[node]:
                if each != name:
                    found[each] = None
                if len(found) == _OTHERS:
                    return list(found)
        return list(found)


def _history(layer: _Layer, story: _Story, ends: _Ends) -> LayerHistory:
    chapter = story.chapters[layer.name]
    nodes = ends.operators[layer.name]
    return LayerHistory(
        label=layer.label,
        name=layer.name,
        module=layer.module,
        call=layer.call,
        calls=layer.calls,
        operator=kind(layer.convolution.node),
        settings=_settings(layer.convolution),
        source=_source(layer.seen),
        within=layer.within,
        events=chapter.events,
        became=tuple(map(kind, nodes)),
        one_with=tuple(story.labels[name] for name in ends.one_with(layer.name)),
        gone=None if nodes else _gone(chapter, story, ends),
    )


def _gone(chapter: _Chapter, story: _Story, ends: _Ends) -> str:
    if chapter.equal:
        same = " and ".join(story.labels[name] for name in chapter.equal)
        return f"its result is that of {same}"
    if chapter.name in ends.constants:
        return "its result is a constant, computed once"
    return "nothing uses its result any more"
