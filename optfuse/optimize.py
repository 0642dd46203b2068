"""Program -> Program: run the passes to a fixed point, prove each one, record everything.

The proof: after a pass has changed the graph, the program is run in float64 on seeded random
inputs and compared with what it gave before. A relative L2 distance above `PROOF_LIMIT` undoes the
pass. New constants stay float64 until all passes are done, so an exact rewrite is exact to about
1e-15 here, and 1e-10 leaves room for long sums while any real mistake is far above it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from optfuse import passes
from optfuse.errors import ModelError, UsageError
from optfuse.float64 import distance, random_inputs, run_float64
from optfuse.graph import (
    Edit,
    attribute,
    copied,
    describe,
    is_finite_as,
    operators,
    own_what_is_written,
    prepare,
    take_over,
)
from optfuse.passes import Match, Pass, Refusal
from optfuse.stages import Notify, Program, Refused, Site, Step, silent

PROOF_LIMIT = 1e-10
ROUND_LIMIT = 10
"""Two or three rounds are usual; more means that passes undo each other's work."""
REWRITES_PER_NODE = 4
"""A pass that rewrites more often than this for each node it was given will never come to an end;
one that does takes away a node with each rewrite, or leaves one where it matches no more."""


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
    seed: int = 0,
    notify: Notify = silent,
) -> Program:
    """Run the selected passes on a copy of the program's graph until none finds anything more.

    Args:
        program: what capture gave; it and the model behind it stay as they are.
        selected: passes in the order they run.
        seed: of the random inputs of the proof.
        notify: told which pass runs.

    Returns:
        The rewritten program, with new constants rounded once to the model's own dtypes, and one
        step a pass added to its trace. A pass that changed the function is undone and not run
        again; its step says so in `undone`.

    Raises:
        ModelError: the program cannot be run in float64, so that nothing can be proved.
    """
    run = _Run(program, seed)
    waiting = True
    number = 0
    while waiting and number < ROUND_LIMIT:
        number += 1
        waiting = False
        for position, each in enumerate(selected):
            if each.name in run.undone or run.settled.get(each.name) == run.version:
                continue
            notify(f"{each.name}", (position + 0.5) / len(selected))
            waiting |= run.apply(each, number)
    if waiting and selected:
        run.refuse_another_round(selected[-1], number)
    step = run.round_constants()
    return replace(
        program,
        graph_module=_with_what_it_uses(run.graph_module),
        trace=(*program.trace, *run.steps(), *([step] if step else [])),
    )


@dataclass
class _Run:
    """One call of `optimize`: the graph being rewritten, and what was seen on the way."""

    program: Program
    seed: int
    graph_module: fx.GraphModule = field(init=False)
    version: int = 0
    """Counts the changes; a pass that came to its end at this version need not run again."""
    settled: dict[str, int] = field(default_factory=dict)
    undone: set[str] = field(default_factory=set)
    refused: dict[str, tuple[Refused, ...]] = field(default_factory=dict)
    recorded: list[Step] = field(default_factory=list)
    proof: _Proof = field(init=False)
    constants: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        original = self.program.graph_module
        prepare(original)
        self.graph_module = _with_what_it_uses(original)
        own_what_is_written(self.graph_module)
        self.proof = _Proof(self.program, self.seed)

    def apply(self, each: Pass, number: int) -> bool:
        """Run one pass to its own fixed point, prove it, record it; whether it changed anything."""
        started = time.perf_counter()
        before = sum(operators(self.graph_module).values())
        attempt = _Attempt(each, Edit(self.graph_module))
        relative_l2, undone = None, attempt.run()
        if attempt.sites and undone is None:
            relative_l2, undone = self.proof.check(self.graph_module)
        changed = bool(attempt.sites) and undone is None
        self.refused[each.name] = attempt.refused
        if undone is not None:
            attempt.undo()
            self.undone.add(each.name)
        else:
            if changed:
                self.version += 1
                self.constants += attempt.edit.constants
                self._drop_unused_constants()
            self.settled[each.name] = self.version
        if changed or undone is not None or number == 1:
            self.recorded.append(
                Step(
                    stage="pass",
                    name=each.name,
                    seconds=time.perf_counter() - started,
                    operators_before=before,
                    operators_after=sum(operators(self.graph_module).values()),
                    settings={"round": number, "options": sorted(each.options)},
                    sites=tuple(attempt.sites),
                    relative_l2=relative_l2,
                    undone=undone,
                )
            )
        return changed

    def _drop_unused_constants(self) -> None:
        used = {node.target for node in self.graph_module.graph.nodes if node.op == "get_attr"}
        for name in set(self.constants) - used:
            delattr(self.graph_module, name)
        self.constants = [name for name in self.constants if name in used]

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
        for node in list(self.graph_module.graph.nodes):
            if node.op != "get_attr" or "round_to" not in node.meta:
                continue
            name, dtype = node.target, node.meta.pop("round_to")
            exact = attribute(self.graph_module, name).detach()
            rounded = exact.to(dtype)
            if not is_finite_as(exact, dtype) and not torch.equal(
                torch.isfinite(exact), torch.isfinite(rounded)
            ):
                raise ModelError(
                    f"A folded constant of {describe(node)} cannot be kept",
                    f"It is not finite in {str(dtype).removeprefix('torch.')}",
                    "Leave the folding passes out with --passes, or use a wider dtype",
                )
            self.graph_module.register_parameter(
                name, torch.nn.Parameter(rounded, requires_grad=False)
            )
            count += 1
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


class _Proof:
    """What the program computes in float64, taken once and compared with after every pass."""

    def __init__(self, program: Program, seed: int) -> None:
        self._inputs = random_inputs(program.example_args, program.example_kwargs, seed)
        self._seed = seed
        self._program = program
        self._reference: list[Any] | None = None

    def check(self, graph_module: fx.GraphModule) -> tuple[float | None, str | None]:
        """The distance to what the program gave before (None where there are no outputs to
        compare), and why the pass must be undone."""
        if self._reference is None:
            self._reference = self._run_original()
        try:
            outputs = run_float64(graph_module, *self._inputs, seed=self._seed)
        except Exception as error:
            return None, f"the rewritten graph does not run in float64: {_one_line(error)}"
        relative_l2 = distance(self._reference, outputs)
        if relative_l2 <= PROOF_LIMIT:
            # The next pass is compared with the program just before it.
            self._reference = outputs
            return relative_l2, None
        if relative_l2 == float("inf"):
            return relative_l2, (
                "in float64 its outputs differ in shape, in dtype, in an integer, or in where "
                "they are finite"
            )
        return relative_l2, (
            f"in float64 its outputs moved by a relative L2 of {relative_l2:.1e}, "
            f"and {PROOF_LIMIT:.0e} is the limit"
        )

    def _run_original(self) -> list[Any]:
        try:
            return run_float64(self._program.graph_module, *self._inputs, seed=self._seed)
        except Exception as error:
            raise ModelError(
                f"'{self._program.name}' cannot be run in float64, so no pass can be proved",
                _one_line(error),
                "Use --passes none to export it as it is, and please report the model",
            ) from error


@dataclass
class _Attempt:
    """One pass run to its own fixed point, and what takes it back."""

    each: Pass
    edit: Edit
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
                refused.append(Refused(describe(node), outcome.reason))
            elif outcome is not None:
                self.kept = self.kept or copied(self.edit.graph)
                self.sites.append(Site(describe(outcome.nodes[outcome.anchor]), outcome.note))
                _rewrite(self.each, self.edit, outcome)
                if len(self.sites) > limit:
                    raise _EndlessError
        self.refused = tuple(refused)


class _EndlessError(Exception):
    """A pass goes on matching what it has just written."""


def _rewrite(each: Pass, edit: Edit, match: Match) -> None:
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


def _with_what_it_uses(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares those parameters that its graph uses, and keeps no others alive."""
    return fx.GraphModule(graph_module, copied(graph_module.graph)).eval()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
