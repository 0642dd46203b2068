"""The user's names for the open dimensions of an ONNX file, where torch.onnx has `s77`, and their
ranges.

A size that follows from them is written as a formula of theirs: `2*N`, `(H//16)`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.printing.str import StrPrinter

from optfuse.graph import flat_inputs
from optfuse.stages import Dimension, InputSpec, Program

if TYPE_CHECKING:
    import onnx
    import onnx_ir
    from torch.onnx import ONNXProgram


RANGES = "optfuse.dimensions"
"""Key in an ONNX file's metadata under which its open dimensions stand: `N=1:8:32 H=64:128:256`."""


def name_dimensions(onnx_program: ONNXProgram, program: Program) -> None:
    """Give the sizes of every value the names that the user gave the dimensions of the inputs, and
    write the ranges of these into the metadata.

    Args:
        onnx_program: what torch.onnx made; changed in place.
        program: what it was made of.
    """
    if program.sizes is None:
        return
    assert onnx_program.exported_program is not None
    exported = onnx_program.exported_program
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    sizes = [values[str(name)] for name in exported.graph_signature.user_inputs]
    specs = flat_inputs(program.graph_module, *program.sizes.arranged)
    known = _known(sizes, specs)
    written: dict[str, str] = {}
    for value in _values(onnx_program.model):
        if value.shape is None:
            continue
        given = [getattr(size, "value", size) for size in value.shape]
        if any(isinstance(size, str) for size in given):
            shape = [
                written.setdefault(size, renamed(size, known)) if isinstance(size, str) else size
                for size in given
            ]
            value.shape = type(value.shape)(shape)
    onnx_program.model.metadata_props[RANGES] = " ".join(
        f"{each.name}={each.least}:{each.usual}:{each.most}" for each in program.sizes.dimensions
    )


def dimensions_of(model: onnx.ModelProto) -> dict[str, Dimension]:
    """The open dimensions that an ONNX file was exported for, by their names; none where optfuse
    did not write it."""
    text = next((each.value for each in model.metadata_props if each.key == RANGES), "")
    return {
        name: Dimension(name, int(least), int(usual), int(most))
        for name, least, usual, most in re.findall(r"(\w+)=(\d+):(\d+):(\d+)", text)
    }


def renamed(text: str, known: Mapping[str, sympy.Expr]) -> str:
    """A size that torch.onnx wrote, as a formula of other names.

    Args:
        text: e.g. `16*s30`.
        known: what its names stand for, e.g. `s30` for `H / 16`.
    """
    words = set(re.findall(r"\b[A-Za-z_]\w*\b(?!\s*\()", text))
    symbols = {word: sympy.Symbol(word, integer=True, positive=True) for word in words}
    # At once: a name of the user's may be one of torch.onnx's.
    values = {symbols[word]: value for word, value in known.items() if word in words}
    formula = sympy.sympify(text, locals=symbols).subs(values, simultaneous=True)
    return str(_Printer().doprint(formula))


class _Printer(StrPrinter):  # type: ignore[misc]
    """Sizes as Python writes them: `(N//2)`, and not `floor(N/2)`."""

    def _print_floor(self, formula: Any) -> str:
        over, under = formula.args[0].as_numer_denom()
        return f"({self._in_brackets(over)}//{self._in_brackets(under)})"

    def _print_Mul(self, formula: Any) -> str:  # noqa: N802 - as sympy calls it
        over, under = formula.as_numer_denom()
        if under == 1:
            return str(super()._print_Mul(formula))
        # A size is a whole number: what is divided here is a multiple.
        return f"({self._in_brackets(over)}//{self._in_brackets(under)})"

    def _in_brackets(self, formula: Any) -> str:
        text = str(self.doprint(formula))
        return text if formula.is_Atom else f"({text})"


def _known(sizes: Sequence[Any], specs: Sequence[InputSpec]) -> dict[str, sympy.Expr]:
    """torch.export's names -> what they stand for, from the shapes of the inputs."""
    known: dict[str, sympy.Expr] = {}
    for value, spec in zip(sizes, specs, strict=True):
        for size, name in zip(value.shape, spec.shape, strict=True):
            if not isinstance(name, str) or not isinstance(size, torch.SymInt):
                continue
            factor, symbol = size.node.expr.as_coeff_Mul()
            users = sympy.Symbol(name, integer=True, positive=True)
            known.setdefault(str(symbol), users / factor)
    return known


def _values(model: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    """Every value of the file, those inside branches and functions too."""
    import onnx_ir

    graphs: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        yield from graph.inputs
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            yield from node.outputs
            for attribute in node.attributes.values():
                if attribute.type is onnx_ir.AttributeType.GRAPH:
                    yield from attribute.as_graph().inputs
