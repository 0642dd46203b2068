"""What must hold of every case, and `check`, which sees to it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from optfuse import backends
from optfuse.capture import capture
from optfuse.errors import CaptureError, ModelError
from optfuse.export import export
from optfuse.float64 import distance, random_inputs, run_float64
from optfuse.optimize import optimize, select
from optfuse.passes import Pass
from optfuse.stages import BuildOptions, LoadedModel, Program
from tests.harness import assert_settled, counts
from tests.random_graphs.drawing import Case
from tests.random_graphs.network import Network, Open

EXACT = 1e-10
"""As strict as the driver's own proof. In float64 and with numbers of size one an exact rewrite
moves an output by 1e-15 or so, and a wrong formula by far more than this."""

ROUNDED = 1e-5
"""Where a float64 network casts to float32 on the way: two calculations that differ in the last bit
of a float64 may round to neighbouring float32 numbers, 6e-8 apart, and go on from there."""

MARGIN = 4
"""How many times as far as by rounding all of its own constants once more (and the result once) a
network may move by having its new ones rounded. Seen is an eighth of it, since far from
all constants are new; a wrong formula moves an output by much more than 2 % (bfloat16) or 1e-6."""


def check(case: Case) -> Counter[str]:
    """Everything that must hold of one network.

    Returns:
        How often each pass matched, and what else is worth counting.

    Raises:
        AssertionError: something does not hold.
    """
    seen: Counter[str] = Counter()
    network = case.network
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = program_of(case, seen)
    after = try_to_optimize(before, select(case.selection), case, seen)
    if after is None:
        return seen
    limit = rounding_limit(before, case)
    assert_same_function(before, after, case, limit)
    assert_computes_what_the_model_computes(case, before, after, limit, seen)
    assert_settled(after, case.selection)
    assert not any("still found something" in each for each in reasons_of(after))
    if case.also == "another order":
        other = try_to_optimize(before, case.reordered(select(case.selection)), case, seen)
        if other is not None:
            assert_same_function(before, other, case, limit)
    else:
        assert_settled_when_captured_again(before, after, case, limit)
    now = network.state_dict()
    assert list(now) == list(kept)
    # Bit for bit: the caller's model is not ours to write.
    assert [name for name in kept if not torch.equal(now[name], kept[name])] == []
    for step in after.trace:
        if step.stage == "pass":
            seen[step.name] += step.matched
    return seen


def reasons_of(program: Program) -> list[str]:
    return [refused.reason for step in program.trace for refused in step.refused]


def inputs_of(case: Case) -> tuple[torch.Tensor, ...]:
    return tuple(example.to(case.dtype) for example in case.network.examples)


def program_of(case: Case, seen: Counter[str]) -> Program:
    """The network captured with its sizes left open; where torch.export finds that a size cannot
    be, with fewer of them."""
    possible: list[Open] = ["batch and space", "batch", "nothing"]
    for left_open in possible[possible.index(case.network.left_open) :]:
        shapes = dynamic_shapes(case.network, left_open)
        try:
            return capture(LoadedModel("random", case.network, inputs_of(case), {}, shapes))
        except CaptureError as error:
            if left_open == "nothing" or "dynamic shapes" not in str(error):
                raise
            seen[f"not captured with {left_open} left open"] += 1
            case.network.left_open = possible[possible.index(left_open) + 1]
    raise AssertionError


def dynamic_shapes(network: Network, left_open: Open) -> dict[str, object] | None:
    if left_open == "nothing":
        return None
    open_dims = {0: torch.export.Dim("batch")}
    if left_open == "batch and space":
        for dim in range(network.rank):
            open_dims[2 + dim] = torch.export.Dim(f"size_{dim}", min=4, max=1024)
    return {"inputs": tuple(open_dims for _ in network.examples)}


def try_to_optimize(
    before: Program, selected: Sequence[Pass], case: Case, seen: Counter[str]
) -> Program | None:
    """The program after the passes; None where a constant does not fit the dtype, which may be."""
    try:
        after = optimize(before, selected, seed=case.seed)
    except ModelError:
        if case.dtype is not torch.float16:
            raise
        seen["refused, since a constant overflows in float16"] += 1
        return None
    assert_nothing_undone(after)
    return after


def assert_nothing_undone(program: Program) -> None:
    undone = {each.name: each.undone for each in program.trace if each.undone}
    assert not undone, undone


def rounding_limit(before: Program, case: Case) -> float:
    """How far the outputs may move, as a relative L2, where new constants are rounded to a dtype.

    New constants are calculated in float64 and rounded once, so each is off by half a unit in the
    last place at most. What that does to the outputs is up to the network, so it is measured: the
    network's own constants are moved by as much, at random.
    """
    if case.dtype is torch.float64:
        return EXACT
    unit = torch.finfo(case.dtype).eps / 2
    inputs = random_inputs(before.example_args, before.example_kwargs, case.seed)
    reference = run_float64(before.graph_module, *inputs)
    moved = []
    for seed in range(8):  # signs that cancel out by luck would make it too small
        generator = torch.Generator().manual_seed(seed)
        shaken = copy.deepcopy(before.graph_module).double()
        with torch.no_grad():
            for constant in [*shaken.parameters(), *shaken.buffers()]:
                if constant.is_floating_point():
                    signs = torch.randint(0, 2, constant.shape, generator=generator) * 2.0 - 1
                    constant.mul_(1 + unit * signs)
        moved.append(distance(reference, run_float64(shaken, *inputs)))
    return MARGIN * (unit + max(moved))


def assert_same_function(before: Program, after: Program, case: Case, limit: float) -> None:
    """In float64, as the driver's proof has it, on other inputs."""
    inputs = random_inputs(before.example_args, before.example_kwargs, case.seed + 1)
    reference = run_float64(before.graph_module, *inputs)
    moved = distance(reference, run_float64(after.graph_module, *inputs))
    assert moved <= limit, f"outputs moved by {moved:.1e}, {limit:.1e} is the limit"


def assert_computes_what_the_model_computes(
    case: Case, before: Program, after: Program, limit: float, seen: Counter[str]
) -> None:
    """Eager PyTorch against the rewritten graph as it is run, on other sizes where those are open,
    and with no batch at all."""
    network = case.network
    generator = torch.Generator().manual_seed(case.seed + 2)
    shapes = [network.with_other_sizes(example).shape for example in network.examples]
    inputs = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    try:
        theirs = run(network, inputs)
    except NotImplementedError:
        seen[f"has an operator without a kernel for {case.dtype}"] += 1
        return
    ours = run(after.graph_module, inputs)
    if case.dtype is torch.float64:
        moved = distance(theirs, ours)
        limit = ROUNDED if network.rounds else limit
        assert moved <= limit, f"run eagerly, outputs moved by {moved:.1e}"
    else:
        reference = run_float64(before.graph_module, inputs, {})
        assert_as_near(reference, theirs, ours, limit, seen)
    if network.left_open != "nothing":
        empty = [each[:0] for each in inputs]
        try:
            theirs, captured = run(network, empty), run(before.graph_module, empty)
        except (RuntimeError, ValueError):
            seen["does not run on no batch at all by itself"] += 1
            return
        if distance(theirs, captured) == 0.0:
            assert distance(theirs, run(after.graph_module, empty)) == 0.0


def run(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a module gives; on inputs of its own, which it may write to."""
    with torch.no_grad():
        return [each.double() for each in module(*[each.clone() for each in inputs])]


def assert_as_near(
    reference: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    ours: Sequence[torch.Tensor],
    limit: float,
    seen: Counter[str],
) -> None:
    """Our outputs are about as near to the float64 reference as the model's own are."""
    if not all(bool(torch.isfinite(each).all()) for each in [*reference, *theirs]):
        seen["overflows by itself"] += 1
        return
    by_itself, moved = distance(reference, theirs), distance(reference, ours)
    assert moved <= 4 * by_itself + limit, (
        f"{moved:.1e} from float64, where the model itself is {by_itself:.1e} from it"
    )


def assert_settled_when_captured_again(
    before: Program, after: Program, case: Case, limit: float
) -> None:
    """What torch.export makes of an optimised program is that program, and optimising it brings
    nothing more."""
    again = capture(
        LoadedModel(
            "again",
            after.graph_module,
            before.example_args,
            dict(before.example_kwargs),
            before.dynamic_shapes,
        )
    )
    assert_same_function(before, again, case, limit)
    settled = optimize(again, select(case.selection), seed=case.seed)
    assert_nothing_undone(settled)
    assert counts(settled) == counts(after), f"{counts(after)} became {counts(settled)}"
    assert_same_function(before, settled, case, limit)


def check_onnx(case: Case) -> Counter[str]:
    """A float32 case's file under ONNX Runtime is about as near to float64 as PyTorch is."""
    seen: Counter[str] = Counter()
    before = program_of(case, seen)
    after = optimize(before, select(case.selection), seed=case.seed)
    inputs = inputs_of(case)
    with TemporaryDirectory() as folder:
        artifact = export(after, Path(folder) / "model.onnx")
        with backends.get("onnxruntime").open(artifact, BuildOptions()) as session:
            session.bind(inputs)
            session.run()
            ours = [each.double() for each in session.fetch()]
    reference = run_float64(before.graph_module, inputs, {})
    theirs, limit = run(case.network, inputs), rounding_limit(before, case)
    assert_as_near(reference, theirs, ours, limit, seen)
    return seen
