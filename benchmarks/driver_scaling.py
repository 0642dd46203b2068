"""Whether the driver's time grows linearly with the number of nodes.

    python -m benchmarks.driver_scaling [NODES ...]

Builds graphs of about 1000, 4000 and 16000 nodes: chains of convolution blocks, of elementwise
operators, of channel shuffles, of sums of branches, and of norms, linear layers and scales; and
convolutions side by side on one tensor. Their tensors are so tiny that
arithmetic costs nothing. Runs all passes on them with their proofs and prints, for each, the
seconds, the microseconds a node and the ratio to the smallest graph of its kind: 1.0 is linear.
Processor time on one thread, the smallest of a few runs, so that other work on the machine
disturbs it least.
"""

from __future__ import annotations

import gc
import operator
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from optfuse.graph import prepare
from optfuse.optimize import optimize, select
from optfuse.stages import Program

aten = torch.ops.aten

NODES = (1000, 4000, 16000)
REPEATS = 2
CHANNELS = 4


class Building:
    """A program under construction, by hand: because torch.export takes minutes for 16000 nodes."""

    def __init__(self) -> None:
        self.example = torch.randn(1, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.fake = FakeTensorMode().from_tensor(self.example)
        self.half = self.fake[:, : CHANNELS // 2]
        self.generator = torch.Generator().manual_seed(1)
        self.first = self.last = self.graph.placeholder("x")
        self.first.meta["val"] = self.fake
        self.branches: list[fx.Node] = []

    def call(self, target: Callable[..., Any], *args: Any, val: Any = None) -> fx.Node:
        """Append a call; every result has the shape of the input unless `val` says otherwise."""
        self.last = self.graph.call_function(target, args)
        self.last.meta["val"] = self.fake if val is None else val
        return self.last

    def constant(self, name: str, *shape: int) -> fx.Node:
        """Append a parameter of random numbers around 1 / CHANNELS, so that a long chain neither
        grows nor fades."""
        data = (torch.rand(shape, generator=self.generator) + 0.5) / CHANNELS
        self.root.register_parameter(name, nn.Parameter(data, requires_grad=False))
        return self.graph.get_attr(name)

    def convolution_block(self, number: int) -> None:
        """conv -> batch norm -> relu: ten nodes."""
        weight = self.constant(f"conv{number}_weight", CHANNELS, CHANNELS, 1, 1)
        x = self.call(aten.conv2d.default, self.last, weight, None)
        gamma, beta, mean, var = (
            self.constant(f"bn{number}_{name}", CHANNELS)
            for name in ("weight", "bias", "mean", "var")
        )
        norm = aten._native_batch_norm_legit_no_training.default
        values = (self.fake, self.fake, self.fake)
        x = self.call(norm, x, gamma, beta, mean, var, 0.1, 1e-5, val=values)
        self.call(aten.relu.default, self.call(operator.getitem, x, 0))

    def elementwise_block(self, number: int) -> None:
        """Something to eliminate, something to share and something that stays: six nodes."""
        x = self.call(aten.mul.Tensor, self.last, 1)
        twice = [self.call(aten.sigmoid.default, x) for _ in range(2)]
        x = self.call(aten.add.Tensor, *twice)
        x = self.call(aten.sub.Tensor, x, 0.25 + number % 3)
        self.call(aten.tanh.default, x)

    def shuffle_block(self, number: int) -> None:
        """Half of the channels through a convolution, then a channel shuffle: ten nodes."""
        kept = self.call(aten.slice.Tensor, self.last, 1, 0, CHANNELS // 2, val=self.half)
        given = self.call(
            aten.slice.Tensor, kept.args[0], 1, CHANNELS // 2, CHANNELS, val=self.half
        )
        weight = self.constant(f"conv{number}_weight", CHANNELS // 2, CHANNELS // 2, 1, 1)
        made = self.call(aten.conv2d.default, given, weight, None, val=self.half)
        made = self.call(aten.tanh.default, made, val=self.half)
        x = self.call(aten.cat.default, [kept, made], 1)
        apart = self.fake.view(1, 2, CHANNELS // 2, 4, 4)
        x = self.call(aten.view.default, x, list(apart.shape), val=apart)
        x = self.call(aten.transpose.int, x, 1, 2, val=apart.transpose(1, 2))
        x = self.call(aten.clone.default, x, val=apart.transpose(1, 2).contiguous())
        x.kwargs = {"memory_format": torch.contiguous_format}
        self.call(aten.view.default, x, list(self.fake.shape))

    def sum_block(self, number: int) -> None:
        """A sum of two convolutions and their input, then an activation: seven nodes."""
        x = self.last
        weights = [
            self.constant(f"conv{number}_{name}", CHANNELS, CHANNELS, 1, 1) for name in ("a", "b")
        ]
        one, two = (self.call(aten.conv2d.default, x, weight, None) for weight in weights)
        self.call(
            aten.tanh.default, self.call(aten.add.Tensor, self.call(aten.add.Tensor, one, two), x)
        )

    def linear_block(self, number: int) -> None:
        """layer norm -> linear -> scale -> tanh: seven nodes."""
        scale, shift = (self.constant(f"norm{number}_{name}", 4) for name in ("scale", "shift"))
        x = self.call(aten.layer_norm.default, self.last, [4], scale, shift)
        x = self.call(aten.linear.default, x, self.constant(f"linear{number}_weight", 4, 4))
        x = self.call(aten.view.default, x, list(self.fake.shape))
        self.call(aten.tanh.default, self.call(aten.mul.Tensor, x, 0.5))

    def branch(self, number: int) -> None:
        """conv -> relu beside the other branches: three nodes."""
        weight = self.constant(f"conv{number}_weight", CHANNELS, CHANNELS, 1, 1)
        x = self.call(aten.conv2d.default, self.first, weight, None)
        self.branches.append(self.call(aten.relu.default, x))

    def program(self) -> Program:
        """The finished program."""
        if self.branches:
            with self.fake.fake_mode:
                joined = torch.cat([self.fake] * len(self.branches), 1)
            self.call(aten.cat.default, self.branches, 1, val=joined)
        self.graph.output((self.last,))
        inputs = pytree.tree_flatten(((self.example,), {}))[1]
        outputs = pytree.tree_flatten((self.example,))[1]
        self.graph._codegen = _PyTreeCodeGen(_PyTreeInfo(["x"], inputs, outputs))
        graph_module = fx.GraphModule(self.root, self.graph)
        prepare(graph_module)
        never_exported = cast(torch.export.ExportedProgram, None)
        return Program("built", graph_module, never_exported, (self.example,))


def build(block: Callable[[Building, int], None], nodes: int) -> Program:
    """A program of such blocks with at least `nodes` nodes."""
    built = Building()
    number = 0
    while len(built.graph.nodes) < nodes:
        block(built, number)
        number += 1
    return built.program()


def seconds_of(program: Program) -> float:
    """The shortest of a few runs of all passes."""
    shortest = float("inf")
    for _ in range(REPEATS):
        gc.collect()
        started = time.process_time()
        after = optimize(program, select("all"))
        shortest = min(shortest, time.process_time() - started)
        assert not [step.undone for step in after.trace if step.undone]
        assert len(after.graph_module.graph.nodes) < len(program.graph_module.graph.nodes)
    return shortest


def main(sizes: list[int]) -> None:
    """Print one line a graph."""
    torch.set_num_threads(1)
    print(f"{'graph of':<14}{'nodes':>8}{'seconds':>10}{'us a node':>12}{'ratio':>8}")
    for name, block in (
        ("convolutions", Building.convolution_block),
        ("elementwise", Building.elementwise_block),
        ("shuffles", Building.shuffle_block),
        ("sums", Building.sum_block),
        ("linear layers", Building.linear_block),
        ("branches", Building.branch),
    ):
        seconds_of(build(block, 50))  # imports and caches
        smallest = None
        for nodes in sizes:
            program = build(block, nodes)
            count = len(program.graph_module.graph.nodes)
            seconds = seconds_of(program)
            each = seconds / count * 1e6
            smallest = smallest or each
            print(f"{name:<14}{count:>8}{seconds:>10.2f}{each:>12.1f}{each / smallest:>8.2f}")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(NODES))
