"""Models with open dimensions, as `load` gives them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from optfuse.dimensions import parse_dimension
from optfuse.inputs import parse_input
from optfuse.load import _dynamic_shapes, _open_sizes
from optfuse.stages import LoadedModel, Source


def opened(
    module: nn.Module, inputs: Sequence[str], dims: Sequence[str], name: str = "net"
) -> LoadedModel:
    """What `load` makes of a module with these `--input` and `--dim`."""
    source = Source(
        name,
        inputs=tuple(parse_input(each, names=True) for each in inputs),
        dimensions=tuple(map(parse_dimension, dims)),
    )
    sizes = _open_sizes(source)
    assert sizes is not None
    first = sizes.captures[0]
    shapes = _dynamic_shapes(module, sizes)
    return LoadedModel(name, module.eval(), first.args, first.kwargs, shapes, sizes)
