"""Models as people write them: each is captured, given all passes, compared, and run again.

A class says what it is. Beside each stands what the passes leave of it, operator by operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

from optfuse import backends
from optfuse.capture import capture
from optfuse.export import export
from optfuse.float64 import distance, random_inputs, run_float64
from optfuse.stages import BuildOptions, LoadedModel, Program
from tests.harness import assert_settled, counts, optimized, scramble

FLOAT32 = 2e-6
"""Folded weights are rounded to float32, once a layer; the models are a few layers deep."""
TOLERANCE = {
    torch.float64: 1e-12,  # a few roundings in float64
    torch.float16: 5e-3,  # as FLOAT32, with 11 bits
    torch.bfloat16: 4e-2,  # as FLOAT32, with 8 bits
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return numbers(*(shape or (2, 3, 8, 8)), dtype=dtype)


@dataclass(frozen=True)
class Case:
    """A model, inputs, and what the passes leave.

    Attributes:
        left: operators of each kind after all passes.
        tolerance: of the outputs' relative L2 distance in float64.
        in_onnx: whether torch.onnx and ONNX Runtime take it.
    """

    model: Callable[[], nn.Module]
    args: tuple[Any, ...]
    left: dict[str, int]
    kwargs: dict[str, Any]
    tolerance: float
    in_onnx: bool
    prepare: Callable[[nn.Module], nn.Module]


CASES: list[Case] = []


def given(
    *args: Any,
    left: dict[str, int],
    kwargs: dict[str, Any] | None = None,
    tolerance: float = FLOAT32,
    in_onnx: bool = True,
    prepare: Callable[[nn.Module], nn.Module] = scramble,
) -> Callable[[Any], Any]:
    def add(model: Any) -> Any:
        CASES.append(Case(model, args, left, kwargs or {}, tolerance, in_onnx, prepare))
        return model

    return add


class Block(nn.Module):
    """A convolution and its batch norm, for models that call both as they like."""

    def __init__(self, inputs: int = 3, outputs: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


# How it is called


@given(image(), left={"conv2d": 1})
class FunctionalCalls(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = F.conv2d(x, self.conv.weight, stride=2, padding=1)
        norm = self.norm
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)


@given(image(), left={"conv2d": 2})
class PaddingGivenAsAWord(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(F.conv2d(x, self.conv.weight, padding="same", dilation=2))
        return F.conv2d(y, self.conv.weight[:, :1].repeat(1, 4, 1, 1), padding="valid")


@given(image(2, 4, 8, 8), left={"conv_act": 2})
class SharedModuleCalledTwice(Block):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        for _ in range(2):
            x = torch.relu(self.norm(self.conv(x)))
        return x


@given(image(2, 4, 8, 8), left={"conv2d": 2})
class SharedConvolutionTwoNorms(Block):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.other_norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.other_norm(self.conv(self.norm(self.conv(x))))


@given(torch.tensor([[1, 5, 2], [0, 3, 3]]), left={"embedding": 1, "linear": 1})
class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.embedding(ids))


@given(image(2, 4, 8, 8), left={"conv2d": 2, "add": 1, "tanh": 1})
class TiedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.one(x)) + self.other(x.tanh())


@given(image(), left={"conv_act": 2})
class SequentialTricks(nn.Module):
    """Indexed, sliced, joined, changed after the fact, and called in part."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        body.append(nn.Conv2d(4, 4, 1))
        body.insert(5, nn.BatchNorm2d(4))
        body[2] = nn.Hardswish()
        self.body = body + nn.Sequential(nn.Identity(), nn.ReLU6(inplace=True))
        del self.body[6]

    def forward(self, x: torch.Tensor) -> Any:
        return self.body[4:](self.body[:4](x))


@given(image(), left={"conv_act": 1})
class DictOfModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4)})
        self.rest = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)])

    def forward(self, x: torch.Tensor) -> Any:
        for layer in (*self.layers.values(), *self.rest):
            x = layer(x)
        return x


def _tripled(module: nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
    return result * 3


def _halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


@given(image(), left={"conv2d": 1})
class ForwardHooks(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(_tripled)
        self.conv.register_forward_pre_hook(_halved)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.conv(x))


# What the weights are


@given(image(), left={"conv2d": 1})
class BuffersAsConstants(nn.Module):
    """Mean and deviation of the images, a mask that is made, a table that is computed."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.2, 0.3, 0.25])[:, None, None])
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        table = torch.arange(1, 5).to(x.dtype).sqrt().view(1, 4, 1, 1)
        return self.conv((x - self.mean) / self.deviation) * table


@given(image(), left={"conv_act": 1})
class WeightNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.conv)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.norm(self.conv(x)))


@given(image(), left={"conv2d": 1})
class SpectralNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.conv)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.conv(x))


class Positive(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.exp()


@given(image(), left={"conv2d": 1})
class Parametrized(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.conv, "weight", Positive())

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.conv(x))


@given(image(2, 4, 5, 5), left={"conv_act": 1, "conv_transpose2d": 1})
class TransposedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.ConvTranspose2d(6, 6, 3, groups=6)
        self.last_norm = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last_norm(self.last(torch.relu(self.norm(self.up(x)))))


# Ways to write an operator


@given(
    image(2, 6, 8),
    left={
        "einsum": 2,
        "linear": 2,
        "_unsafe_view": 1,
        "clone": 1,
        "softmax": 1,
        "unbind": 1,
        "view": 1,
    },
)
class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
        weights = torch.einsum("bqhd,bkhd->bhqk", q * 4**-0.5, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


@given(
    image(2, 4, 8, 8),
    left={"conv2d": 2, "cat": 1, "mean": 1, "mul": 1, "sigmoid": 1, "split": 1, "transpose": 1},
)
class ChunksAndNegativeDims(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        value, gate = torch.chunk(self.norm(self.conv(x)), 2, dim=-3)
        y = torch.cat([value * gate.sigmoid(), x.narrow(-3, 0, 2), x[:, 2:]], dim=-3)
        return self.last(y).transpose(-1, -2).squeeze(-4).mean(-1)


@given(image(2, 4, 8, 8), left={"conv_act": 2, "add": 1, "clamp": 1, "mul": 1})
class InPlaceActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.one(x)).relu_()
        z = F.silu(self.other(y), inplace=True)
        z += x
        z.mul_(2).clamp_(min=-1)
        return z


@given(image(), left={"conv2d": 1})
class DropoutInEvaluation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.norm = nn.Conv2d(3, 4, 1), nn.Dropout2d(0.5), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        y = F.dropout(self.drop(self.conv(x)), 0.3, self.training)
        return F.alpha_dropout(self.norm(y), training=False)


@given(image(), left={"conv2d": 1})
class ControlFlowOnShapesAndSettings(Block):
    def forward(self, x: torch.Tensor, flip: bool = False) -> Any:
        if x.shape[1] != 3:
            raise ValueError("three channels")
        y = self.conv(x)
        for scale in (2.0, 0.5):
            y = y * scale
        assert y.dim() == 4
        return self.norm(y) if not flip else y


@given(image(), left={"cond": 1, "conv2d": 1, "conv_act": 1, "gt": 1, "mean": 1})
class ConditionOnValues(Block):
    """Becomes a higher-order operator; the passes go into both of its branches."""

    def forward(self, x: torch.Tensor) -> Any:
        return torch.cond(
            x.mean() > 0, lambda x: self.norm(self.conv(x)), lambda x: self.conv(x).relu(), (x,)
        )


@given(image(), left={"conv_act": 1})
class GradientModesAndAutocast(Block):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            y = self.norm(y)
        with torch.enable_grad(), torch.inference_mode(mode=False):
            return y.relu()


# What comes in and goes out


class Named(NamedTuple):
    image: torch.Tensor
    mean: torch.Tensor


@dataclass
class Result:
    image: torch.Tensor
    scores: torch.Tensor
    nothing: None = None


torch.export.register_dataclass(Result)


@given(
    image(),
    image(2, 5, 8, 8),
    left={"cat": 1, "conv2d": 1, "mean": 1, "mul": 1},
    kwargs={"gain": numbers(1)},
)
class SeveralInputsAndOutputs(Block):
    def forward(self, x: torch.Tensor, y: torch.Tensor, *, gain: torch.Tensor) -> Any:
        z = self.norm(self.conv(x))
        return {"both": torch.cat([z, y], 1) * gain, "rest": [z.mean((2, 3)), (y,)]}


@given(image(), left={"conv2d": 1, "mean": 1})
class ReturnsADataclass(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.conv(x))
        return Result(y, y.mean((2, 3)))


@given(image(), left={"conv2d": 1, "mean": 1})
class ReturnsANamedTupleAndNone(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.conv(x))
        return Named(y, y.mean((2, 3))), None


@given([image(), image()], {"a": image(), "b": 2.5}, left={"add": 2, "conv2d": 1, "mul": 1})
class TakesAListAndADict(Block):
    def forward(self, xs: Any, named: Any) -> Any:
        return self.norm(self.conv(xs[0] + xs[1] + named["a"] * named["b"]))


@given(image(), image(), left={"conv2d": 1})
class DeadInput(Block):
    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> Any:
        return self.norm(self.conv(x))


@given(image(), left={"conv2d": 1, "select": 1, "transpose": 1, "view": 1}, in_onnx=False)
class OutputsThatAreInputsParametersOrViews(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.norm(self.conv(x))
        return x, x[0], x.transpose(0, 1), self.norm.weight, y, y.flatten(1), x


@given(image(), left={"batch_norm": 1, "conv2d": 1, "relu": 1})
class ConvolutionThatIsAnOutputToo(Block):
    """The batch norm must not go into it: what is returned is the convolution's own result."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return y, torch.relu(self.norm(y))


@given(image(), left={"conv2d": 1})
class ConstantOutput(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.conv(x)), torch.arange(4).sum() * 1.5


@given(image(), left={"conv2d": 1}, in_onnx=False)
class NumberAsOutput(Block):
    """torch.onnx takes no number for an output."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.conv(x)), 7, x.shape[0]


@given(torch.tensor(1.5), left={"add": 1, "mul": 1, "relu": 1})
class ScalarInput(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return (x * 2 + 1).relu()


@given(image(), left={"mul": 1, "sigmoid": 1})
class NoConvolution(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x * x.sigmoid()


@given(image(), left={}, in_onnx=False)
class NoOperator(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x


@given(image(2, 1, 1, 1), left={"conv2d": 1, "conv_act": 1})
class OneChannelOnePixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
        self.last = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(F.leaky_relu(self.norm(self.conv(x)), 0.1))


@given(image(3, 8, 8), left={"conv2d": 1, "conv_act": 1})
class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(torch.relu(self.conv(x) * 2))


# Dtypes


class Typed(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


for dtype in (torch.float16, torch.bfloat16, torch.float64):
    # ONNX Runtime has no convolution of float64 or bfloat16 on a CPU.
    given(
        image(dtype=dtype),
        left={"conv_act": 1, "linear": 1, "mean": 1},
        tolerance=TOLERANCE[dtype],
        in_onnx=dtype == torch.float16,
    )(lambda dtype=dtype: Typed(dtype))


@given(
    image(),
    left={"_to_copy": 2, "batch_norm": 1, "conv2d": 1, "mul": 1, "relu": 1},
    tolerance=TOLERANCE[torch.float16],
)
class HalfInTheMiddle(Block):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x).half()
        return self.norm(y.float() * 2).relu()


@given(
    image(2, 3, 8, 8),
    left={"abs": 1, "conv2d": 1, "fft_irfft2": 1, "fft_rfft2": 1, "mul": 1},
    in_onnx=False,
)
class ComplexNumbers(Block):
    def forward(self, x: torch.Tensor) -> Any:
        spectrum = torch.fft.rfft2(self.norm(self.conv(x)))
        return torch.fft.irfft2(spectrum * (0.5 + 0.5j)), spectrum.abs()


@given(image(), left={"conv2d": 1})
class EightBitWeights(nn.Module):
    """Kept as integers with a scale a channel, and made floats where they are used."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        levels = torch.randint(-127, 128, (4, 3, 3, 3), generator=generator)
        self.register_buffer("weight", levels.to(torch.int8))
        self.register_buffer("scale", torch.rand(4, 1, 1, 1, generator=generator) / 100)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(F.conv2d(x, self.weight.float() * self.scale))


def captured_case(case: Case) -> tuple[nn.Module, Program]:
    module = case.prepare(case.model())
    return module, capture(LoadedModel("model", module, case.args, case.kwargs))


def name_of(case: Case) -> str:
    return getattr(case.model, "__name__", "") if isinstance(case.model, type) else "Typed"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_model_as_written(case: Case) -> None:
    module, program = captured_case(case)
    state = copy.deepcopy(module.state_dict())
    after = optimized(program, "all")
    assert counts(after) == case.left
    for seed in (1, 2):
        inputs = random_inputs(case.args, case.kwargs, seed)
        reference = run_float64(program.graph_module, *inputs)
        moved = distance(reference, run_float64(after.graph_module, *copy.deepcopy(inputs)))
        assert moved <= case.tolerance
        ours = after.graph_module(*inputs[0], **inputs[1])
        theirs = module(*inputs[0], **inputs[1])
        assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    assert_settled(after, "all")
    for name, kept in module.state_dict().items():
        assert torch.equal(kept, state[name]), name


class Together(nn.Module):
    """All models that ONNX Runtime takes in one, since exporting each would take a second."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.models = nn.ModuleList([case.prepare(case.model()) for case in cases])

    def forward(self, inputs: Any) -> Any:
        pairs = zip(self.models, inputs, strict=True)
        return [model(*args, **kwargs) for model, (args, kwargs) in pairs]


def test_models_as_written_under_onnx_runtime(tmp_path: Path) -> None:
    cases = [case for case in CASES if case.in_onnx]
    inputs = [(case.args, case.kwargs) for case in cases]
    program = capture(LoadedModel("together", Together(cases), (inputs,)))
    after = optimized(program, "all")
    reference = run_float64(program.graph_module, (inputs,), {})
    found = under_onnx_runtime(after, tmp_path, [inputs])[0]
    owners = [
        case
        for case, model in zip(cases, Together(cases).models, strict=True)
        for each in pytree.tree_leaves(model(*case.args, **case.kwargs))
        if isinstance(each, torch.Tensor)
    ]
    wanted = [each for each in reference if isinstance(each, torch.Tensor)]
    for ours, theirs, case in zip(found, wanted, owners, strict=True):
        assert_near(ours, theirs, case.tolerance, name_of(case))


def under_onnx_runtime(after: Program, folder: Path, feeds: list[Any]) -> list[list[Any]]:
    """The outputs of the optimised program's file, for each of several inputs."""
    backend = backends.get("onnxruntime")
    if reason := backend.unavailable():
        pytest.skip(reason)
    found = []
    with backend.open(export(after, folder / "model.onnx"), BuildOptions()) as session:
        for inputs in feeds:
            session.bind([x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)])
            session.run()
            found.append(session.fetch())
    return found


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, name: str) -> None:
    assert ours.shape == theirs.shape, name
    error = (ours.double() - theirs.double()).norm()
    # The engine rounds each layer's result too.
    assert error <= 10 * tolerance * theirs.double().norm(), name


# Sizes that change


class Sized(nn.Module):
    """Sizes taken from shapes, a concat, a residual, a view, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.norm, self.up = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        batch, _, height, width = x.shape
        y = self.stem(x)
        y = torch.relu(self.norm(torch.cat([self.left(y), self.right(y)], 1))) + y
        z = F.interpolate(self.up(y) * 2, size=(height, width), mode="nearest")
        z = z.reshape(batch, 2, 2, height, width).transpose(1, 2).reshape(batch, 4, height * width)
        return self.head(z.mean(-1)), z


DIM = torch.export.Dim


@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [
        ({0: DIM("batch", min=0)}, [(1, 3, 8, 8), (5, 3, 8, 8), (0, 3, 8, 8)]),
        (
            {0: DIM("batch", min=0), 2: DIM("height"), 3: DIM("width")},
            [(1, 3, 4, 7), (3, 3, 10, 4), (2, 3, 16, 33), (0, 3, 6, 6)],
        ),
    ],
    ids=["batch", "batch and image"],
)
def test_sizes_that_change(sizes: Any, shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    module = scramble(Sized())
    model = LoadedModel("sized", module, (image(2, 3, 8, 8),), dynamic_shapes=(sizes,))
    program = capture(model)
    after = optimized(program, "all")
    assert "batch_norm" not in counts(after)
    assert counts(after)["conv_act"] == 2
    assert_settled(after, "all")
    filled = [image(*shape) for shape in shapes if shape[0] > 0]
    references = []
    for x in (*filled, image(*shapes[-1])):
        references.append(run_float64(program.graph_module, (x,), {}))
        assert distance(references[-1], run_float64(after.graph_module, (x,), {})) <= FLOAT32
        assert [each.shape for each in references[-1]] == [each.shape for each in module(x)]
    for found, reference in zip(
        under_onnx_runtime(after, tmp_path, filled), references, strict=False
    ):
        for ours, theirs in zip(found, reference, strict=True):
            assert_near(ours, theirs, FLOAT32, "sized")


def test_a_batch_of_none_captured_as_it_is() -> None:
    """Everything is empty, and the one proof there can be is that shapes stay."""
    program = capture(LoadedModel("sized", scramble(Sized()), (image(0, 3, 8, 8),)))
    after = optimized(program, "all")
    assert [tuple(each.shape) for each in after.graph_module(image(0, 3, 8, 8))] == [
        (0, 5),
        (0, 4, 64),
    ]


# Memory layouts, training mode, and numbers drawn at random


@pytest.mark.parametrize("of_weights", [False, True])
@pytest.mark.parametrize("of_inputs", [False, True])
def test_channels_last(of_weights: bool, of_inputs: bool, tmp_path: Path) -> None:
    module = scramble(Sized())
    if of_weights:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = image()
    if of_inputs:
        x = x.to(memory_format=torch.channels_last)
    program = capture(LoadedModel("sized", module, (x,)))
    after = optimized(program, "all")
    assert "batch_norm" not in counts(after)
    assert_settled(after, "all")
    reference = run_float64(program.graph_module, (x,), {})
    assert distance(reference, run_float64(after.graph_module, (x,), {})) <= FLOAT32
    for ours, theirs in zip(after.graph_module(x), module(x), strict=True):
        assert ours.shape == theirs.shape
    if of_weights and of_inputs:
        (found,) = under_onnx_runtime(after, tmp_path, [x])
        for ours, theirs in zip(found, reference, strict=True):
            assert_near(ours, theirs, FLOAT32, "channels last")


class Trained(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.drop(self.norm(self.conv(x)))


def test_a_model_in_training_mode_is_taken_at_its_word() -> None:
    """Loading puts every model in evaluation mode; one that is captured by hand in training mode
    keeps its batch's own statistics and its random numbers."""
    module = scramble(Trained()).train()
    statistics = copy.deepcopy(module.state_dict())
    program = capture(LoadedModel("trained", module, (image(),)))
    after = optimized(program, "all")
    assert counts(after)["batch_norm"] == 1
    assert after.graph_module(image()).eq(0).float().mean() > 0.3  # half of them, drawn
    (refused,) = [
        each.reason for step in after.trace if step.name == "fold_conv_bn" for each in step.refused
    ]
    assert refused == "the batch norm uses the statistics of the batch it sees, not stored ones"
    for name, kept in module.state_dict().items():
        assert torch.equal(kept, statistics[name]), name
