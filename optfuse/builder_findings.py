"""Which of our rewrites an engine's builder does by itself, read off the layers of its engines.

The engine that was built from the export as it comes says what the builder made of it: each of its
layers names the ONNX nodes that went into it. Where a convolution and the activation behind it are
one layer there, fusing them beforehand earns nothing on this engine, and the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optfuse.stages import EngineReport, Site, Step

Verdict = Literal["yes", "partly", "no", "not needed"]
"""Whether the builder does it by itself; `not needed` where torch.onnx did it before."""

_CALLED = re.compile(r"%(\S+) : ")
"""The captured node that an ONNX node was made of, in the record that torch.onnx keeps of it."""

_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_WEIGHTED = _CONVOLUTIONS | {"Gemm", "MatMul"}
_NORMS = {"BatchNormalization"}
_SUMS = {"Add", "Sum"}
_MOVES = {
    *("Concat", "Split", "Slice", "Reshape", "Transpose", "Gather", "Squeeze", "Unsqueeze"),
    *("Flatten", "Expand", "Identity", "Pad"),
}
"""Operators that compute nothing."""


@dataclass(frozen=True)
class BuilderFinding:
    """What the builder does about one kind of rewrite.

    Attributes:
        rewrite: the kind, e.g. `activation into convolution`.
        verdict: whether the builder does it by itself.
        sentence: what its layers show, with the counts.
        counts: the same as numbers.
    """

    rewrite: str
    verdict: Verdict
    sentence: str
    counts: Mapping[str, int] = field(default_factory=dict)


def findings(
    baseline: EngineReport,
    optimized: EngineReport,
    trace: Sequence[Step],
    baseline_onnx: Path,
    optimized_onnx: Path,
) -> tuple[BuilderFinding, ...]:
    """What the builder does by itself of what the passes did to this program.

    A kind of rewrite that no pass did here is left out, but for concatenations, which the builder
    may get rid of where a pass could not. So is everything where a builder told no layers.

    Args:
        baseline, optimized: the reports of the engines of the two files, of one engine and target.
        trace: of the optimized program; what was taken back does not count.
        baseline_onnx, optimized_onnx: the files that they were built from.
    """
    if not (baseline.layers and optimized.layers):
        return ()
    before, after = _Engine.of(baseline, baseline_onnx), _Engine.of(optimized, optimized_onnx)
    sites = {
        name: [
            site for step in trace if step.name == name and not step.undone for site in step.sites
        ]
        for name in {step.name for step in trace}
    }
    found = [
        _identities(sites.get("eliminate_identity", []), before),
        _norms(sites.get("fold_conv_bn", []), before),
        _activations(sites.get("fuse_conv_activation", []), before),
        _sums(sites.get("fuse_conv_activation", []), sites.get("merge_branches", []), before),
        _branches(sites.get("merge_branches", []), before, after),
        _parallel(sites.get("combine_parallel_convs", []), before, after),
        _concats(before, after),
        _channels(sites.get("route_channels", []), before, after),
    ]
    return tuple(each for each in found if each is not None)


@dataclass(frozen=True)
class _Engine:
    """An engine's layers, and the ONNX file they were made of.

    Attributes:
        operators: every node of the file, and its operator.
        made_of: captured node -> the nodes of the file that were made of it.
        layers: the nodes in each layer that has any.
        report: what its builder said.
    """

    operators: Mapping[str, str]
    made_of: Mapping[str, Sequence[str]]
    layers: Sequence[frozenset[str]]
    report: EngineReport

    @classmethod
    def of(cls, report: EngineReport, onnx_file: Path) -> _Engine:
        import onnx

        nodes = onnx.load(onnx_file, load_external_data=False).graph.node
        made_of: dict[str, list[str]] = {}
        for node in nodes:
            called = _CALLED.match(_record(node))
            if called:
                made_of.setdefault(called[1], []).append(node.name)
        operators = {node.name: str(node.op_type) for node in nodes}
        layers = [frozenset(layer.nodes) & operators.keys() for layer in report.layers]
        return cls(operators, made_of, [layer for layer in layers if layer], report)

    def made(self, captured: Iterable[str], wanted: Callable[[str], bool]) -> dict[str, list[str]]:
        """The captured nodes that nodes of these operators were made of -> those nodes."""
        found = {}
        for name in dict.fromkeys(captured):
            nodes = [n for n in self.made_of.get(name, ()) if wanted(self.operators[n])]
            if nodes:
                found[name] = nodes
        return found

    def within(self, node: str, operators: Collection[str]) -> bool:
        """Whether every layer that a node is part of has one of these operators too."""
        around = [layer for layer in self.layers if node in layer]
        return bool(around) and all(self._has(layer, operators) for layer in around)

    def convolutions(self) -> int:
        """How many layers convolve."""
        return sum(self._has(layer, _CONVOLUTIONS) for layer in self.layers)

    def copies(self) -> list[frozenset[str]]:
        """The layers that only move data."""
        return [layer for layer in self.layers if {self.operators[n] for n in layer} <= _MOVES]

    def nodes(self, operators: Collection[str]) -> list[str]:
        """The file's nodes of these operators."""
        return [name for name, operator in self.operators.items() if operator in operators]

    def _has(self, layer: frozenset[str], operators: Collection[str]) -> bool:
        return any(self.operators[node] in operators for node in layer)


def _identities(sites: Sequence[Site], before: _Engine) -> BuilderFinding | None:
    rewrite = "operators without effect"
    left = before.made(_origins(sites), lambda _: True)
    if not left:
        return _exported(rewrite, "operator without effect", len(sites))
    running = [
        name for name, nodes in left.items() if any(layer <= set(nodes) for layer in before.layers)
    ]
    gone = len(left) - len(running)
    return BuilderFinding(
        rewrite,
        _verdict(gone, len(left)),
        f"{_of(gone, len(left), 'operator without effect')} in the file as exported "
        f"{_has(gone)} no layer of {_its(gone)} own",
        {"by_itself": gone, "places": len(left)},
    )


def _norms(sites: Sequence[Site], before: _Engine) -> BuilderFinding | None:
    rewrite = "batch norm into convolution"
    captured = _origins(sites)
    left = before.made(captured, _NORMS.__contains__)
    if not left:
        return _exported(rewrite, "batch norm", len(sites))
    inside = sum(all(before.within(n, _WEIGHTED) for n in nodes) for nodes in left.values())
    return BuilderFinding(
        rewrite,
        _verdict(inside, len(left)),
        f"torch.onnx leaves {_count(len(left), 'batch norm')} of these behind, and "
        f"{_of(inside, len(left))} {_is(inside)} inside a convolution's layer as exported",
        {"by_itself": inside, "places": len(left)},
    )


def _activations(sites: Sequence[Site], before: _Engine) -> BuilderFinding | None:
    others = _WEIGHTED | _NORMS | _SUMS | _MOVES
    made = before.made(_origins(sites), lambda operator: operator not in others)
    return _inside("activation into convolution", "activation", made, before)


def _sums(sites: Sequence[Site], merged: Sequence[Site], before: _Engine) -> BuilderFinding | None:
    """Those of branches that were merged are told of there."""
    of_branches = set(_origins(merged))
    captured = [name for name in _origins(sites) if name not in of_branches]
    made = before.made(captured, _SUMS.__contains__)
    return _inside("sum into convolution", "sum", made, before)


def _inside(
    rewrite: str, what: str, made: Mapping[str, Sequence[str]], before: _Engine
) -> BuilderFinding | None:
    if not made:
        return None
    inside = sum(all(before.within(n, _WEIGHTED) for n in nodes) for nodes in made.values())
    return BuilderFinding(
        rewrite,
        _verdict(inside, len(made)),
        f"{_of(inside, len(made), what)} {_is(inside)} inside the convolution's layer as exported",
        {"by_itself": inside, "places": len(made)},
    )


def _parallel(sites: Sequence[Site], before: _Engine, after: _Engine) -> BuilderFinding | None:
    return _groups(
        "parallel convolutions into one",
        "group of parallel convolutions",
        sites,
        before,
        after,
        whole=False,
    )


def _branches(sites: Sequence[Site], before: _Engine, after: _Engine) -> BuilderFinding | None:
    return _groups(
        "summed branches into one", "group of summed branches", sites, before, after, whole=True
    )


def _groups(
    rewrite: str,
    what: str,
    sites: Sequence[Site],
    before: _Engine,
    after: _Engine,
    *,
    whole: bool,
) -> BuilderFinding | None:
    """Convolutions that became one: a group is merged where one layer holds them all."""
    groups = [
        {
            n
            for nodes in before.made(_origins([site]), _CONVOLUTIONS.__contains__).values()
            for n in nodes
        }
        for site in sites
    ]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    merged = sum(any(group <= layer for layer in before.layers) for group in groups)
    touched = sum(any(len(group & layer) > 1 for layer in before.layers) for group in groups)
    layers = before.convolutions(), after.convolutions()
    copies = len(before.copies()), len(after.copies())
    partly = merged if whole else touched
    return BuilderFinding(
        rewrite,
        "partly" if not merged and partly else _verdict(merged, len(groups)),
        f"{_of(merged, len(groups), what)} {_is(merged)} one layer as exported: "
        f"{_count(layers[0], 'convolution')}, {layers[1]} with ours; "
        f"{_count(copies[0], 'copy', 'copies')}, {copies[1]} with ours"
        + _memory(before.report, after.report),
        {
            "by_itself": merged,
            "places": len(groups),
            "convolutions_before": layers[0],
            "convolutions_after": layers[1],
            "copies_before": copies[0],
            "copies_after": copies[1],
        },
    )


def _concats(before: _Engine, after: _Engine) -> BuilderFinding | None:
    concats = before.nodes({"Concat"})
    if not concats:
        return None
    copied = {node for layer in before.copies() for node in layer}
    used = {node for layer in before.layers for node in layer}
    elided = sum(node not in used for node in concats)
    inside = sum(node in used and node not in copied for node in concats)
    copied_after = {node for layer in after.copies() for node in layer}
    ours = sum(node in copied_after for node in after.nodes({"Concat"}))
    by_itself = elided + inside
    copies = len(concats) - by_itself
    return BuilderFinding(
        "concatenations without a copy",
        _verdict(by_itself, len(concats)),
        f"{_of(by_itself, len(concats), 'concatenation')} {_has(by_itself)} no copy of "
        f"{_its(by_itself)} own as exported: {elided} {_has(elided)} no layer, and {inside} "
        f"{_is(inside)} inside one that computes; {_count(copies, 'copy', 'copies')} for "
        f"concatenations, {ours} with ours",
        {
            "by_itself": by_itself,
            "places": len(concats),
            "elided": elided,
            "inside": inside,
            "copies_before": copies,
            "copies_after": ours,
        },
    )


def _channels(sites: Sequence[Site], before: _Engine, after: _Engine) -> BuilderFinding | None:
    if not sites:
        return None
    copies = len(before.copies()), len(after.copies())
    moved = len({node for layer in before.copies() for node in layer})
    return BuilderFinding(
        "channel shuffles into weights",
        "yes" if not copies[0] else "partly" if copies[0] < moved else "no",
        f"{_count(moved, 'operator')} that only move data "
        f"{'is' if moved == 1 else 'are'} {_count(copies[0], 'copy', 'copies')} as exported, and "
        f"{copies[1]} with ours",
        {"operators": moved, "copies_before": copies[0], "copies_after": copies[1]},
    )


def _exported(rewrite: str, what: str, places: int) -> BuilderFinding | None:
    if not places:
        return None
    return BuilderFinding(
        rewrite,
        "not needed",
        f"torch.onnx does it: {_of(places, places, what)} {_is(places)} gone from the file as "
        "exported",
        {"by_exporter": places, "places": places},
    )


def _origins(sites: Iterable[Site]) -> list[str]:
    return [name for site in sites if site.involved for name in site.involved.origins]


def _verdict(done: int, places: int) -> Verdict:
    return "yes" if done == places else "partly" if done else "no"


def _memory(before: EngineReport, after: EngineReport) -> str:
    sizes = before.activation_bytes, after.activation_bytes
    if None in sizes:
        return ""
    first, second = (f"{size / 1e6:.1f} MB" for size in sizes if size is not None)
    return f"; {first} of activations, {second} with ours"


def _record(node: Any) -> str:
    wanted = "pkg.torch.onnx.fx_node"
    return next((each.value for each in node.metadata_props if each.key == wanted), "")


def _of(done: int, places: int, what: str = "") -> str:
    return f"{done} of {places}" + (f" {what if places == 1 else _plural(what)}" if what else "")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or _plural(one)}"


def _plural(what: str) -> str:
    """Of `group of summed branches` it is the group that is many."""
    first, of, rest = what.partition(" of ")
    first, without, last = first.partition(" without ")
    return f"{first}s{without}{last}{of}{rest}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _has(number: int) -> str:
    return "has" if number == 1 else "have"


def _its(number: int) -> str:
    return "its" if number == 1 else "their"
