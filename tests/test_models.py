"""The demonstration networks are the published ones, deterministic and fit to be captured."""

import importlib
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Published:
    """What a network must have: counts of the whole network as built, without auxiliary heads."""

    parameters: int
    convolutions: int
    batch_norms: int
    outputs: tuple[tuple[int, ...], ...] = ((1, 1000),)


PUBLISHED = {
    # Caffe's bvlc_googlenet has 6,998,552 parameters; batch normalisation instead of a bias adds
    # one parameter to each of the 7,280 convolution channels.
    "googlenet": Published(6_998_552 + 7_280, 57, 57),
    # torchvision: inception_v3 with aux_logits=False.
    "inception_v3": Published(23_834_568, 94, 94),
    # torchvision: squeezenet1_1.
    "squeezenet": Published(1_235_496, 26, 0),
    # torchvision: resnet50.
    "resnet50": Published(25_557_032, 53, 53),
    # torchvision: resnext50_32x4d.
    "resnext50": Published(25_028_904, 53, 53),
    # torchvision: densenet121.
    "densenet121": Published(7_978_856, 120, 121),
    # torchvision: mobilenet_v2.
    "mobilenet_v2": Published(3_504_872, 52, 52),
    # torchvision: shufflenet_v2_x1_0.
    "shufflenet_v2": Published(2_278_604, 56, 56),
    # torchvision: efficientnet_b0; each of the 16 gates has two convolutions.
    "efficientnet_b0": Published(5_288_548, 49 + 2 * 16, 49),
    # The stem, the four stages and the classifier; 17 of the 22 blocks have an identity branch.
    "repvgg_a0": Published(
        1_632
        + (23_232 + 23_328)
        + (46_464 + 3 * 92_736)
        + (185_088 + 13 * 369_792)
        + 2_462_720
        + 1_281_000,
        2 * 22,
        2 * 22 + 17,
    ),
    # mateuszbuda/brain-segmentation-pytorch has 7,763,041 parameters; batch normalisation instead
    # of a bias adds one to each channel of the transposed convolutions.
    "unet": Published(
        7_763_041 + 256 + 128 + 64 + 32, 18 + 4 + 1, 18 + 4, outputs=((1, 1, 128, 128),)
    ),
    # ultralytics lists 3,157,200 parameters for yolov8n: without the backbone, layers 0 to 9, and
    # without the 16 constants that decode the boxes.
    "yolo_neck": Published(
        3_157_200
        - (464 + 4_672 + 7_360 + 18_560 + 49_664 + 73_984 + 197_632 + 295_424 + 460_288 + 164_608)
        - 16,
        4 * 4 + 2 + 3 * 6,
        4 * 4 + 2 + 3 * 4,
        outputs=((1, 144, 80, 80), (1, 144, 40, 40), (1, 144, 20, 20)),
    ),
    # timm: deit_tiny_patch16_224 (its fused projection has as many parameters as three).
    "vit_tiny": Published(5_717_416, 1, 0),
}

each_network = pytest.mark.parametrize("name", PUBLISHED)


@cache
def network(name: str) -> nn.Module:
    built = importlib.import_module(f"models.{name}").build()
    assert isinstance(built, nn.Module)
    return built


def example_inputs(name: str) -> tuple[Tensor, ...]:
    inputs = importlib.import_module(f"models.{name}").example_inputs()
    assert isinstance(inputs, tuple)
    return inputs


def run(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        outputs = network(name)(*inputs)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@each_network
def test_counts_are_the_published_ones(name: str) -> None:
    expected = PUBLISHED[name]
    modules = list(network(name).modules())
    assert sum(parameter.numel() for parameter in network(name).parameters()) == expected.parameters
    assert (
        sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in modules)
        == expected.convolutions
    )
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == expected.batch_norms


@each_network
def test_same_weights_and_inputs_whatever_the_global_random_state(name: str) -> None:
    first, first_inputs = network(name).state_dict(), example_inputs(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        second = importlib.import_module(f"models.{name}").build().state_dict()
        second_inputs = example_inputs(name)
        assert torch.equal(before, torch.get_rng_state())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(map(torch.equal, first_inputs, second_inputs))


@each_network
def test_every_module_is_in_eval_mode(name: str) -> None:
    assert not any(module.training for module in network(name).modules())


@each_network
def test_no_batch_norm_is_an_identity(name: str) -> None:
    for module in network(name).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for values in (module.running_mean, module.bias):
                assert 0.01 < values.std() < 0.2
            for values in (module.running_var, module.weight):
                assert 0.4 < values.min() < values.max() < 1.6
                assert values.std() > 0.05


@each_network
def test_outputs_have_shape_and_scale_and_depend_on_the_input(name: str) -> None:
    inputs = example_inputs(name)
    outputs = run(name, inputs)
    assert tuple(tuple(output.shape) for output in outputs) == PUBLISHED[name].outputs
    others = run(name, tuple(values.flip(-1) for values in inputs))
    for output, other in zip(outputs, others, strict=True):
        assert output.isfinite().all()
        assert 1e-3 < output.std() < 1e3
        assert (output - other).std() > 0.01 * output.std()


@each_network
def test_export_captures_the_network(name: str) -> None:
    inputs = example_inputs(name)
    with torch.no_grad():
        captured = torch.export.export(network(name), inputs).module()(*inputs)
    captured = (captured,) if isinstance(captured, Tensor) else captured
    for output, expected in zip(captured, run(name, inputs), strict=True):
        torch.testing.assert_close(output, expected)
