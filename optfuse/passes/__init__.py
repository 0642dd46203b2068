"""The graph passes: one file each, and the one visible order they run in.

A pass is a `match` and a `rewrite`. It reads the graph through `optfuse.graph`, writes through the
`Edit` it is given, and never iterates, logs, cleans up, or verifies: `optfuse.optimize` does that
for all of them.

Adding one takes one file, one test file and one line in `ORDER`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

from torch import fx

from optfuse.graph import Edit

ORDER = (
    "eliminate_identity",
    "fold_constants",
    "eliminate_common_subexpressions",
    "fold_conv_bn",
    "fold_affine_input",
    "fold_linear_chain",
    "merge_branches",
    "combine_parallel_convs",
    "elide_concat",
    "route_channels",
    "fuse_conv_activation",
)
"""First what has no effect, then constants, so that folding sees plain convolutions, and merging
sees batch norms only where they stand on none; combining before fusing, so that branches with and
without an activation can be combined alike."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Everything `rewrite` needs to know of one place; it looks nothing up again.

    Attributes:
        nodes: every operator that the rewrite replaces; the new ones are put in front of
            `nodes[anchor]`.
        note: what is done here, as the report says it, e.g. `into conv2d_3`.
        options: those of the pass without which it would leave this place alone.
    """

    nodes: tuple[fx.Node, ...]
    note: str
    anchor: int = -1
    options: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Refusal:
    """Why a place that looks like a match is left alone, as a clause that a user understands.

    Attributes:
        reason: the clause.
        about: the layers that the pass would have changed, besides the node it was called at.
    """

    reason: str
    about: tuple[fx.Node, ...] = ()


class Pass(ABC):
    """One kind of rewrite. Its docstring says the equation, the guards and the why.

    Args:
        options: the names of the options that are on, each of them one of `OPTIONS`.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    OPTIONS: ClassVar[Mapping[str, str]] = {}
    """Name -> what it does. Every option is off by default."""

    def __init__(self, options: frozenset[str] = frozenset()) -> None:
        self.options = options

    def __str__(self) -> str:
        """As `--passes` takes it: the name, and each option that is on."""
        return ",".join([f"{self.name}.{o}" for o in sorted(self.options)] or [self.name])

    def begin(self, graph: fx.Graph) -> None:  # noqa: B027 most passes keep nothing
        """Called before each sweep over the graph; forget what the last sweep saw."""

    @abstractmethod
    def match(self, node: fx.Node) -> Match | Refusal | None:
        """What this pass would do at `node`; None where it is none of its business.

        Called once a sweep for every node in topological order. Changes nothing.
        """

    @abstractmethod
    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """Add the new operators and return which new node stands for which old one.

        A new node computes exactly the value of the old one that it stands for, unless its shape
        differs: drift is compared layer by layer there.

        The driver then moves the users over and erases what is no longer used.
        """


def load(name: str) -> type[Pass]:
    """The class of the pass called `name` (one of `ORDER`)."""
    module = import_module(f"optfuse.passes.{name}")
    found: type[Pass] = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    return found
