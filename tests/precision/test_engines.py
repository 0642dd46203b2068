"""Low precision in real networks: in the ONNX file, on the engines, and by what it reads."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from optfuse import backends
from optfuse.activations import ACTIVATIONS
from optfuse.export import export
from optfuse.float64 import distance, run_float64
from optfuse.precision import Lowering, lower
from optfuse.stages import Artifact, BuildOptions, Program
from tests import test_digits
from tests.harness import captured, optimized
from tests.precision.test_floats import ONNX_TYPE, UNIT, both, casts, ran
from tests.precision.written import exported_again

DRIFT = {
    "digits": 8,
    "efficientnet_b0": 8,
    "googlenet": 30,
    "mobilenet_v2": 120,
    "shufflenet_v2": 8,
    "vit_tiny": 8,
}
"""How many times one rounding the output moves, at most: 2 to 3 times what was seen. Weights drawn
at random give logits that nearly cancel, the more so the deeper the network; the trained one's do
not."""

CASTS = {
    # The image and the result, and around each mean over an image.
    "digits": 2 + 2 * 2,
    "googlenet": 2 + 2,
    "mobilenet_v2": 2 + 2,
    "shufflenet_v2": 2 + 2,
    # One of them is in each of 16 gates.
    "efficientnet_b0": 2 + 2 * 17,
    # 25 norms, of which the last one's result is read by the classifier, and 12 softmaxes.
    "vit_tiny": 2 + 2 * (25 + 12),
}

every_network = pytest.mark.parametrize(
    "name",
    [each if each == "digits" else pytest.param(each, marks=pytest.mark.slow) for each in DRIFT],
)


@cache
def network(name: str) -> Program:
    module = importlib.import_module(f"models.{name}")
    return optimized(captured(module.build(), *module.example_inputs(), name=name), "all")


@cache
def exact(name: str) -> list[Any]:
    return run_float64(network(name).graph_module, network(name).example_args, {})


def outputs(engine: str, opened: Artifact | Program, program: Program) -> list[torch.Tensor]:
    backend = backends.get(engine)
    if reason := backend.unavailable() or backend.cannot_run():
        pytest.skip(reason)
    with backend.open(opened, BuildOptions(threads=1)) as session:
        session.bind(pytree.tree_leaves(program.example_args))
        session.run()
        return session.fetch()


@every_network
@both
def test_a_network_runs_low_wherever_that_is_not_refused(
    name: str, low: str, tmp_path: Path
) -> None:
    program = lower(network(name), low)
    assert casts(program) == CASTS[name]
    limit = DRIFT[name] * UNIT[low]
    assert UNIT[low] / 10 < distance(exact(name), [each.double() for each in ran(program)]) < limit
    file = export(program, tmp_path / f"{name}.onnx")
    _check(file, low, casts(program))
    for engine in ("onnxruntime", "openvino"):
        if backends.get(engine).refuses(low) is None:
            found = outputs(engine, file, program)
            assert [each.dtype for each in found] == [torch.float32]
            assert distance(exact(name), [each.double() for each in found]) < limit


def _check(file: Artifact, low: str, number: int) -> None:
    """The file is valid, holds its weights in the low precision, and has each cast of the graph."""
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Cast"] == number
    held = {each.name: each for each in model.graph.initializer}
    layers = [each for each in model.graph.node if each.op_type in ("Conv", "Gemm", "MatMul")]
    constants = [held[name] for node in layers for name in node.input if name in held]
    assert len(constants) >= len(layers) // 2
    assert {each.data_type for each in constants} == {ONNX_TYPE[low]}


@both
def test_inputs_and_outputs_of_the_file_are_low_where_that_is_asked_for(
    low: str, tmp_path: Path
) -> None:
    program = lower(network("digits"), low, io=True)
    file = export(program, tmp_path / "digits.onnx")
    model = onnx.load(file.path)
    borders = (*model.graph.input, *model.graph.output)
    assert [each.type.tensor_type.elem_type for each in borders] == [ONNX_TYPE[low]] * 2
    for engine in ("onnxruntime", "openvino"):
        if backends.get(engine).refuses(low) is None:
            (found,) = outputs(engine, file, program)
            assert found.dtype is program.example_args[0].dtype
            assert distance(exact("digits"), [found.double()]) < DRIFT["digits"] * UNIT[low]


def test_the_compiler_is_given_the_low_program() -> None:
    program = exported_again(lower(network("digits"), "bf16"))
    dtypes = {each.dtype for each in program.exported.state_dict.values()}
    assert dtypes == {torch.bfloat16}
    found = program.exported.module()(*program.example_args)
    assert torch.equal(pytree.tree_leaves(found)[0], ran(program)[0])


def test_openvino_runs_each_part_in_the_precision_of_the_file(tmp_path: Path) -> None:
    backend = backends.get("openvino")
    if reason := backend.unavailable():
        pytest.skip(reason)
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no instructions for bfloat16")
    lowering = Lowering(network("digits"), "bf16")
    kept = lowering.layers[-1]
    found = []
    for high in ((), (kept,)):
        file = export(lowering.program(high), tmp_path / "digits.onnx")
        with backend.open(file, BuildOptions(threads=1)) as session:
            found.append(_executed(session))
    assert {found[0][kind, "bf16"] for kind in ("Convolution", "FullyConnected")} == {14, 1}
    assert found[0]["Reduce", "f32"] == 2
    assert (found[1]["Convolution", "bf16"], found[1]["FullyConnected", "f32"]) == (14, 1)


def _executed(session: Any) -> Counter[tuple[str, str]]:
    """How many of OpenVINO's own layers of each kind run in each precision."""
    found: Counter[tuple[str, str]] = Counter()
    for node in session._compiled.get_runtime_model().get_ordered_ops():
        said = node.get_rt_info()
        texts = (said[key] for key in ("layerType", "runtimePrecision"))
        kind, precision = (each if isinstance(each, str) else each.astype(str) for each in texts)
        found[kind, precision] += 1
    return found


# --- Operators in the file


class Spatial(nn.Module):
    """Convolutions in one to three dimensions, both ways."""

    def __init__(self, kind: type[nn.Module], dims: int) -> None:
        super().__init__()
        self.first, self.second = kind(3, 4, 3, padding=1), kind(4, 4, 1, groups=2)
        self.size = (5,) * dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.relu(self.second(self.first(x) * 2))
        return y


class Masked(nn.Module):
    def __init__(self, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.mask = None if mask is None else nn.Buffer(mask)
        self.linear = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        operands = self.linear(x).unflatten(-1, (2, 12)).transpose(1, 2).split(4, -1)
        y = functional.scaled_dot_product_attention(
            *operands, attn_mask=self.mask, is_causal=self.mask is None
        )
        return y.transpose(1, 2).flatten(2)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.head = nn.Parameter(torch.randn(4, 6))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = torch.einsum("bsd,kd->bsk", self.table(tokens), self.head)
        return found.topk(3, -1).values


class Activated(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.convolution, self.activation = nn.Conv2d(3, 4, 3), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.activation(self.convolution(x))
        return y


MASK = torch.ones(5, 5, dtype=torch.bool).tril(1)
ACTIVATED = {
    "relu": nn.ReLU(),
    "hardtanh": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(4),
    "elu": nn.ELU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(beta=2, threshold=15),
    "softsign": nn.Softsign(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "mish": nn.Mish(),
}
CASES: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    **{
        f"{kind.__name__}": partial(
            lambda kind, dims: (Spatial(kind, dims), torch.randn(2, 3, *(5,) * dims)), kind, dims
        )
        for dims, kinds in enumerate(
            [
                (nn.Conv1d, nn.ConvTranspose1d),
                (nn.Conv2d, nn.ConvTranspose2d),
                (nn.Conv3d, nn.ConvTranspose3d),
            ],
            start=1,
        )
        for kind in kinds
    },
    "causal attention": lambda: (Masked(None), torch.randn(2, 5, 8)),
    "masked attention": lambda: (Masked(MASK), torch.randn(2, 5, 8)),
    "biased attention": lambda: (Masked(MASK.float() * -2), torch.randn(2, 5, 8)),
    "embedding, einsum and topk": lambda: (Words(), torch.tensor([[1, 4, 19], [0, 2, 2]])),
    **{
        name: partial(lambda each: (Activated(each), torch.randn(2, 3, 6, 6)), each)
        for name, each in ACTIVATED.items()
    },
}


def test_every_activation_is_among_the_cases() -> None:
    assert set(ACTIVATED) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", CASES)
@both
def test_the_file_computes_what_the_graph_does(name: str, low: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, given = CASES[name]()
    before = optimized(captured(model.eval(), given), "all")
    program = lower(before, low)
    file = export(program, tmp_path / "model.onnx")
    onnx.checker.check_model(onnx.load(file.path), full_check=True)
    reference = run_float64(before.graph_module, (given,), {})
    # Up to three products in a row, each with two operands and a result, and what is between.
    limit = 12 * UNIT[low]
    assert UNIT[low] / 50 < distance(reference, [each.double() for each in ran(program)]) < limit
    engine = "onnxruntime" if low == "fp16" else "openvino"
    found = outputs(engine, file, program)
    assert distance(reference, [each.double() for each in found]) < limit


# --- By what it reads


AT_STAKE = {"fp16": 1, "bf16": 3}
"""How many of the 896 images have a second logit that is nearer to the first than twice the most
that a logit moves: 0.007 in fp16 and 0.055 in bf16. None was seen to change."""


@both
def test_the_trained_network_reads_on(low: str) -> None:
    (found,) = ran(lower(test_digits.after(), low))
    original = test_digits.logits(test_digits.before())
    changed = int((found.argmax(1) != original.argmax(1)).sum())
    assert changed <= AT_STAKE[low]
    assert test_digits.correct(found) >= test_digits.CORRECT - AT_STAKE[low]
    assert (found - original).abs().max() < 20 * UNIT[low]  # of logits around 1.6
