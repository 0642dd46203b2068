"""Routing: operators that compute nothing and only carry channels to other places.

- `pieces`: runs of indices, as concat, split and slice cut them.
- `channels`: which channel stands where in a tensor, through shuffles and reshapes too.
- `dimensions`: in which dimension that is, where nobody says so but those who read the tensor.
- `carriers`: operators that compute each channel by itself, so that an order passes through.
- `absorbers`: layers whose weight takes any order in and gives any out.
- `layouts`: which order the channels of each tensor should have.
- `flow`: all of these put to a graph.
- `assemblies`: tensors put together anew from parts of others, and what that costs.

Nothing here changes a graph.
"""

from optfuse.routing.pieces import (
    Concat,
    Piece,
    Run,
    Split,
    concat_of,
    flatten,
    known,
    origin,
    runs_of,
    slice_of,
    split_of,
    storage,
)

__all__ = [
    "Concat",
    "Piece",
    "Run",
    "Split",
    "concat_of",
    "flatten",
    "known",
    "origin",
    "runs_of",
    "slice_of",
    "split_of",
    "storage",
]
