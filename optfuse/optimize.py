"""Program -> Program: run the passes to a fixed point, prove each one, record everything.

The proof: after a pass has changed the graph, the program is run in float64 on seeded random
inputs and compared with what it gave before. A relative L2 distance above `PROOF_LIMIT` undoes the
pass. New constants stay float64 until all passes are done, so an exact rewrite is exact to about
1e-15 here, and 1e-10 leaves room for long sums while any real mistake is far above it. With open
dimensions that is done at two sizes, so that nothing is right at the captured one alone.

The passes also run on the branches of higher-order operators such as `torch.cond`. Each of them is
a graph with a proof of its own, on random inputs like those it is called with, so that a branch
that the program's inputs do not take is proved as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from optfuse import passes
from optfuse.branches import (
    branches,
    close_over,
    example_inputs,
    independent,
    left_alone,
    lift,
)
from optfuse.errors import ModelError, UsageError
from optfuse.float64 import distance, random_inputs, run_float64
from optfuse.graph import (
    Edit,
    attribute,
    copied,
    describe,
    is_finite_as,
    kind,
    module_path,
    operators,
    origins_of_all,
    own_what_is_written,
    prepare,
    take_over,
)
from optfuse.passes import Match, Pass, Refusal
from optfuse.stages import Involved, Notify, Point, Program, Refused, Rewrite, Site, Step, silent

PROOF_LIMIT = 1e-10
ROUND_LIMIT = 10
"""Two or three rounds are usual; more means that passes undo each other's work."""
REWRITES_PER_NODE = 4
"""A pass that rewrites more often than this for each node it was given will never come to an end;
one that does takes away a node with each rewrite, or leaves one where it matches no more."""


Left = Callable[[Rewrite], str | None]
"""Why a rewrite is not to be done, as a clause that a user understands; None where it is."""


def leave_nothing(rewrite: Rewrite) -> str | None:  # noqa: ARG001 it is a `Left`
    """Every rewrite that a pass finds is done."""
    return None


def select(text: str) -> list[Pass]:
    """The passes that `--passes` names, in the order they run.

    Args:
        text: a comma-separated list of names, `all`, `none`, `-name` to take one away, and
            `name.option` to switch an option of a pass on (which also selects the pass).

    Raises:
        UsageError: for a pass or an option that does not exist.
    """
    chosen: dict[str, set[str]] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, _, option = word.removeprefix("-").partition(".")
        if word == "all":
            for each in passes.ORDER:
                chosen.setdefault(each, set())
        elif word == "none":
            chosen.clear()
        elif name not in passes.ORDER:
            raise UsageError(
                f"There is no pass '{name}'",
                f"The passes are {', '.join(passes.ORDER)}",
                "Choose from them, or run 'optfuse passes' to see what each one does",
            )
        else:
            if option:
                _check_option(name, option)
            if not word.startswith("-"):
                chosen.setdefault(name, set()).update(filter(None, [option]))
            elif option:
                chosen.get(name, set()).discard(option)
            else:
                chosen.pop(name, None)
    return [passes.load(n)(frozenset(chosen[n])) for n in passes.ORDER if n in chosen]


def _check_option(name: str, option: str) -> None:
    known = passes.load(name).OPTIONS
    if option not in known:
        raise UsageError(
            f"The pass {name} has no option '{option}'",
            f"Its options are {', '.join(known)}" if known else "It has no options",
            "Leave it out, or run 'optfuse passes' to see what each one does",
        )


def optimize(
    program: Program,
    selected: Sequence[Pass],
    *,
    left: Left = leave_nothing,
    seed: int = 0,
    notify: Notify = silent,
) -> Program:
    """Run the selected passes on a copy of the program's graph until none finds anything more.

    Args:
        program: what capture gave; it and the model behind it stay as they are.
        selected: passes in the order they run.
        left: asked before each rewrite of the program's own graph; where it gives a reason, the
            rewrite is refused with it.
        seed: of the random inputs of the proof.
        notify: told which pass runs.

    Returns:
        The rewritten program, with new constants rounded once to the model's own dtypes, and one
        step a pass added to its trace. A pass that changed the function is undone and not run
        again; its step says so in `undone`.

    Raises:
        ModelError: the program cannot be run in float64, so that nothing can be proved.
    """
    run = _Run(program, left, seed)
    waiting = True
    number = 0
    while waiting and number < ROUND_LIMIT:
        number += 1
        waiting = False
        if selected:
            run.enter_branches()
        for position, each in enumerate(selected):
            if each.name in run.undone or run.settled.get(each.name) == run.version:
                continue
            notify(f"{each.name}", (position + 0.5) / len(selected))
            waiting |= run.apply(each, number)
    if waiting and selected:
        run.refuse_another_round(selected[-1], number)
    step = run.round_constants()
    lift(run.graph_module)
    return replace(
        program,
        graph_module=independent(run.graph_module),
        trace=(*program.trace, *run.steps(), *([step] if step else [])),
    )


@dataclass
class _Run:
    """One call of `optimize`: the graph being rewritten, and what was seen on the way."""

    program: Program
    left: Left
    seed: int
    graph_module: fx.GraphModule = field(init=False)
    version: int = 0
    """Counts the changes; a pass that came to its end at this version need not run again."""
    settled: dict[str, int] = field(default_factory=dict)
    undone: set[str] = field(default_factory=set)
    refused: dict[str, tuple[Refused, ...]] = field(default_factory=dict)
    recorded: list[Step] = field(default_factory=list)
    bodies: list[_Body] = field(init=False)
    """The program's own graph, then those of its branches."""

    def __post_init__(self) -> None:
        original = self.program.graph_module
        prepare(original)
        self.graph_module = independent(original)
        own_what_is_written(self.graph_module)
        inputs = [_redrawn(each, self.seed) for each in _sizes_of_proof(self.program)]
        proof = _Proof(self.program.name, original, inputs, self.seed)
        self.bodies = [_Body("", self.graph_module, proof)]

    def enter_branches(self) -> None:
        """Let passes see what is constant in each branch, and give it a proof of its own."""
        moved = close_over(self.graph_module)
        inner = list(branches(self.graph_module))
        own, *known = self.bodies
        if not moved and [each.graph_module for each in inner] == [b.graph_module for b in known]:
            return
        self.version += 1
        constants = {id(body.graph_module): body.constants for body in known}
        inputs = self._inputs_of_branches()
        self.bodies = [own]
        for each in inner:
            drawn = _redrawn(Point("", inputs[each.path]), self.seed)
            proof = _Proof(
                f"{self.program.name}: {each.path}",
                independent(each.graph_module),
                [drawn],
                self.seed,
            )
            body = _Body(f"{each.path}.", each.graph_module, proof)
            body.constants = constants.get(id(each.graph_module), [])
            self.bodies.append(body)

    def _inputs_of_branches(self) -> Mapping[str, tuple[Any, ...]]:
        args, kwargs = self.program.example_args, self.program.example_kwargs
        try:
            return example_inputs(self.graph_module, args, kwargs, self.seed)
        except Exception as error:
            raise _not_provable(self.program.name, error) from error

    def apply(self, each: Pass, number: int) -> bool:
        """Run one pass to its own fixed point, prove it, record it; whether it changed anything."""
        started = time.perf_counter()
        before = sum(operators(self.graph_module).values())
        attempts = [
            # A branch's nodes have names of their own, that `left` knows nothing of.
            _Attempt(each, Edit(body.graph_module), leave_nothing if body.path else self.left)
            for body in self.bodies
        ]
        relative_l2, undone = self._attempt(attempts)
        changed = undone is None and any(attempt.sites for attempt in attempts)
        if undone is not None:
            for attempt in attempts:
                attempt.undo()
            self.undone.add(each.name)
        else:
            if changed:
                self.version += 1
                for body, attempt in zip(self.bodies, attempts, strict=True):
                    body.keep(attempt.edit.constants)
            self.settled[each.name] = self.version
        sites, self.refused[each.name] = self._places(attempts)
        if changed or undone is not None or number == 1:
            self.recorded.append(
                Step(
                    stage="pass",
                    name=each.name,
                    seconds=time.perf_counter() - started,
                    operators_before=before,
                    operators_after=sum(operators(self.graph_module).values()),
                    settings={"round": number, "options": sorted(each.options)},
                    sites=sites,
                    relative_l2=relative_l2,
                    undone=undone,
                )
            )
        return changed

    def _attempt(self, attempts: Sequence[_Attempt]) -> tuple[float | None, str | None]:
        """Rewrite and prove every graph: the largest distance, and why all must be undone."""
        largest: float | None = None
        for body, attempt in zip(self.bodies, attempts, strict=True):
            undone = attempt.run()
            if attempt.sites and undone is None:
                relative_l2, undone = body.proof.check(body.graph_module)
                if relative_l2 is not None:
                    largest = max(relative_l2, largest or 0.0)
            if undone is not None:
                return largest, f"in {body.path.rstrip('.')} {undone}" if body.path else undone
        for body, attempt in zip(self.bodies, attempts, strict=True):
            if attempt.sites:
                body.proof.accept()
        return largest, None

    def _places(self, attempts: Sequence[_Attempt]) -> tuple[tuple[Site, ...], tuple[Refused, ...]]:
        """What was rewritten and what was refused, in a branch with the branch's name."""
        sites: list[Site] = []
        refused: list[Refused] = []
        for body, attempt in zip(self.bodies, attempts, strict=True):
            sites += [replace(each, site=body.path + each.site) for each in attempt.sites]
            refused += [replace(each, site=body.path + each.site) for each in attempt.refused]
        refused += [Refused(*each) for each in left_alone(self.graph_module)]
        return tuple(sites), tuple(refused)

    def steps(self) -> list[Step]:
        """The recorded steps; a pass's refusals stand at its first one, as of its last sweep."""
        waiting = dict(self.refused)
        return [replace(step, refused=waiting.pop(step.name, ())) for step in self.recorded]

    def refuse_another_round(self, last: Pass, number: int) -> None:
        """Say in the last pass's record that the passes did not come to rest."""
        refused = Refused(
            "the whole graph",
            f"the passes still found something to do after {number} rounds, and may be undoing "
            "each other's work; what they left is proved all the same",
        )
        self.refused[last.name] = (*self.refused.get(last.name, ()), refused)

    def round_constants(self) -> Step | None:
        """Round the new constants, once, to the dtypes the model holds them in."""
        started = time.perf_counter()
        count = 0
        for body in self.bodies:
            count += _round_constants(body.graph_module)
        if not count:
            return None
        total = sum(operators(self.graph_module).values())
        return Step(
            stage="round",
            name="round_constants",
            seconds=time.perf_counter() - started,
            operators_before=total,
            operators_after=total,
            settings={"constants": count},
        )


def _sizes_of_proof(program: Program) -> list[Point]:
    """Inputs of every size that a proof runs at: those it was captured on and, with open
    dimensions, the point with the fewest elements of those with other sizes."""
    captured = Point("", program.example_args, program.example_kwargs)
    if program.sizes is None:
        return [captured]
    others = [point for point in program.sizes.points if _shapes(point) != _shapes(captured)]
    return [captured, *sorted(others, key=lambda point: sum(map(math.prod, _shapes(point))))[:1]]


def _shapes(point: Point) -> list[torch.Size]:
    leaves = pytree.tree_leaves((tuple(point.args), dict(point.kwargs)))
    return [leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _redrawn(point: Point, seed: int) -> Point:
    return Point(point.at, *random_inputs(point.args, point.kwargs, seed))


class _Proof:
    """What a graph computes in float64, taken once and compared with after every pass.

    Args:
        name: of the program, for errors.
        original: the graph as it was.
        inputs: of each size that it is run at.
        seed: for operators that draw random numbers.
    """

    def __init__(
        self, name: str, original: fx.GraphModule, inputs: Sequence[Point], seed: int
    ) -> None:
        self._name = name
        self._original = original
        self._inputs = inputs
        self._seed = seed
        self._reference: list[list[Any]] | None = None
        self._proved: list[list[Any]] | None = None

    def check(self, graph_module: fx.GraphModule) -> tuple[float | None, str | None]:
        """The distance to what the graph gave before (None where there are no outputs to compare),
        and why the pass must be undone."""
        if self._reference is None:
            self._reference = self._run_original()
        proved = []
        largest = 0.0
        for inputs, reference in zip(self._inputs, self._reference, strict=True):
            where = f" at {inputs.at}" if inputs.at else ""
            try:
                outputs = self._run(graph_module, inputs)
            except Exception as error:
                failed = f"the rewritten graph does not run in float64{where}: {_one_line(error)}"
                return None, failed
            relative_l2 = distance(reference, outputs)
            if not relative_l2 <= PROOF_LIMIT:
                return relative_l2, _moved(relative_l2, where)
            proved.append(outputs)
            largest = max(largest, relative_l2)
        self._proved = proved
        return largest, None

    def accept(self) -> None:
        """Compare the next pass with what was checked last."""
        self._reference, self._proved = self._proved, None

    def _run_original(self) -> list[list[Any]]:
        try:
            return [self._run(self._original, inputs) for inputs in self._inputs]
        except Exception as error:
            raise _not_provable(self._name, error) from error

    def _run(self, graph_module: fx.GraphModule, inputs: Point) -> list[Any]:
        return run_float64(graph_module, inputs.args, inputs.kwargs, seed=self._seed)


def _moved(relative_l2: float, where: str) -> str:
    """Why a pass that moved the outputs so far is undone."""
    if relative_l2 == float("inf"):
        return (
            f"in float64 its outputs differ{where} in shape, in dtype, in an integer, or in where "
            "they are finite"
        )
    return (
        f"in float64 its outputs moved{where} by a relative L2 of {relative_l2:.1e}, "
        f"and {PROOF_LIMIT:.0e} is the limit"
    )


@dataclass
class _Body:
    """One of the graphs that the passes run on.

    Attributes:
        path: of a branch, its dotted name in the program and a dot; else empty.
        constants: the names of those that passes added to it.
    """

    path: str
    graph_module: fx.GraphModule
    proof: _Proof
    constants: list[str] = field(default_factory=list)

    def keep(self, added: Sequence[str]) -> None:
        """Take in what a pass added, and drop what nothing uses any more."""
        used = {node.target for node in self.graph_module.graph.find_nodes(op="get_attr")}
        names = [*self.constants, *added]
        for name in set(names) - used:
            delattr(self.graph_module, name)
        self.constants = [name for name in names if name in used]


@dataclass
class _Attempt:
    """One pass run to its own fixed point, and what takes it back."""

    each: Pass
    edit: Edit
    left: Left
    sites: list[Site] = field(default_factory=list)
    refused: tuple[Refused, ...] = ()
    kept: fx.Graph | None = None
    """The graph as it was, copied only where something is rewritten."""

    def run(self) -> str | None:
        """Sweep until nothing matches; why the pass must be undone, or None."""
        graph = self.edit.graph
        limit = REWRITES_PER_NODE * len(graph.nodes)
        try:
            found = -1
            while found != len(self.sites):
                found = len(self.sites)
                self._sweep(limit)
            graph.lint()
        except _EndlessError:
            return (
                f"it does not come to an end: it had rewritten {len(self.sites)} places of a "
                f"graph with {limit // REWRITES_PER_NODE} nodes, and went on"
            )
        except Exception as error:  # a fault in one pass must not cost the user the others
            return f"it failed with {_one_line(error)}"
        return None

    def undo(self) -> None:
        """Put the graph back as it was."""
        if self.kept is not None:
            self.edit.graph_module.graph = self.kept
        for name in self.edit.constants:
            delattr(self.edit.graph_module, name)

    def _sweep(self, limit: int) -> None:
        refused: list[Refused] = []
        self.each.begin(self.edit.graph)
        for node in list(self.edit.graph.nodes):
            if node._erased:
                continue
            outcome = self.each.match(node)
            if isinstance(outcome, Refusal):
                involved = _involved(node, [node], outcome.about)
                refused.append(Refused(describe(node), outcome.reason, involved))
            elif outcome is not None:
                place = outcome.nodes[outcome.anchor]
                involved = _involved(place, outcome.nodes)
                rewrite = Rewrite(self.each.name, outcome.options, frozenset(involved.origins))
                reason = self.left(rewrite)
                if reason is not None:
                    refused.append(Refused(describe(place), reason, involved))
                    continue
                self.kept = self.kept or copied(self.edit.graph)
                site = Site(describe(place), outcome.note, involved, rewrite)
                self.sites.append(site)
                instead = _rewrite(self.each, self.edit, outcome)
                self.sites[-1] = replace(site, involved=_involved(place, outcome.nodes, instead))
                if len(self.sites) > limit:
                    raise _EndlessError
        self.refused = tuple(refused)


class _EndlessError(Exception):
    """A pass goes on matching what it has just written."""


def _involved(place: fx.Node, nodes: Iterable[fx.Node], about: Iterable[fx.Node] = ()) -> Involved:
    made_of = origins_of_all(nodes)
    known = frozenset(made_of)
    besides = tuple(name for name in origins_of_all(about) if name not in known)
    return Involved(kind(place), module_path(place), made_of, besides)


def _rewrite(each: Pass, edit: Edit, match: Match) -> list[fx.Node]:
    """Rewrite one place; what stands there now."""
    edit.before(match.nodes[match.anchor], match.nodes)
    replacements: Mapping[fx.Node, fx.Node] = each.rewrite(edit, match)
    for old, new in replacements.items():
        take_over(new, old)
    # Once a user and not once a replacement: a concat may take in a thousand branches.
    for user in dict.fromkeys(user for old in replacements for user in old.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda node: replacements.get(node, node)
        )
    edit.erase_unused((*replacements, *match.nodes))
    return list(replacements.values())


def _round_constants(graph_module: fx.GraphModule) -> int:
    """Round the new constants of one graph; how many there were."""
    count = 0
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if "round_to" not in node.meta:
            continue
        name, dtype = str(node.target), node.meta.pop("round_to")
        exact = attribute(graph_module, name).detach()
        rounded = exact.to(dtype)
        if not is_finite_as(exact, dtype) and not torch.equal(
            torch.isfinite(exact), torch.isfinite(rounded)
        ):
            raise ModelError(
                f"A folded constant of {describe(node)} cannot be kept",
                f"It is not finite in {str(dtype).removeprefix('torch.')}",
                "Leave the folding passes out with --passes, or use a wider dtype",
            )
        graph_module.register_parameter(name, torch.nn.Parameter(rounded, requires_grad=False))
        count += 1
    return count


def _not_provable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"'{name}' cannot be run in float64, so no pass can be proved",
        _one_line(error),
        "Use --passes none to export it as it is, and please report the model",
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
