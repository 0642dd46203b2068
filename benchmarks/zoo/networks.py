"""The networks of the zoo: which ones there are, how each is built, and what it is run on.

None of torchvision's is trained: weights are random and seeded, so that nothing is downloaded. A
batch norm gets the statistics of the activations that reach it, moved at random, and no parameter
keeps a value that hides mistakes, such as 0 and 1: activations keep their scale through any depth,
and no layer is an identity.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

SEED = 0

BIAS = 1.5
"""Of batch norms, in standard deviations of what they give. A random network with ReLUs behind
batch norms is chaotic: each layer makes an error 1.21 times as large as it was (Yang et al.,
arXiv:1902.08129), and after a hundred of them nothing is left of float32. Where an activation lets
most through, it is 1.02 times."""

Shape = tuple[int, ...]

# The one place where torchvision is imported. From the registry it is built for CUDA; beside a CPU
# build of torch its operators do not load, and its import fails at the first two whose gradients
# it registers. The definitions of its networks call neither, so declaring the two schemas is all
# that is missing. For the zoo and its test alone: optfuse itself does nothing like it.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARY: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
"""What defines them; they go when it goes."""


@functools.cache
def torchvision_models() -> ModuleType:
    """`torchvision.models`, imported beside a CPU build of torch too.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the import left behind half done
    for schema in _SCHEMAS:
        _LIBRARY.define(schema)
    return importlib.import_module("torchvision.models")


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    Attributes:
        name: what `--only` takes, e.g. `resnet18`, or `models/resnet50` for a demonstration one.
        group: one of `GROUPS`.
        family: what it stands under within the group: the file that defines it.
        shape: of its one input.
        parameter_bytes: as torchvision says, of the whole detector for a backbone; 0 where unknown.
        build: makes it with random weights, in eval mode.
    """

    name: str
    group: str
    family: str
    shape: Shape
    parameter_bytes: int
    build: Callable[[], nn.Module]


GROUPS = {
    "classification": "Classification",
    "segmentation": "Segmentation",
    "detection": "Backbones of the detectors",
    "video": "Video",
    "demonstration": "Demonstration networks of this repository",
}
"""Each group and its heading."""

LEFT_OUT = {
    "the quantizable networks of `torchvision.models.quantization`": "they are classification "
    "networks again, with stubs where observers go; quantized they are integer programs, of which "
    "there is no float64 reference",
    "the detectors behind their backbones": "anchors, box decoding and non-maximum suppression "
    "depend on the values of tensors, and their operators are missing from a CPU build",
    "RAFT, of `torchvision.models.optical_flow`": "it takes two images, where all others take one",
}
"""What of torchvision is not in the zoo, and why."""

_SIDES = {
    "inception_v3": 299,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 320,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
}
"""Height and width where they are not 224."""

_CLIP = (1, 3, 16, 112, 112)
_CLIPS = dict.fromkeys(("mvit_v1_b", "mvit_v2_s", "s3d"), (1, 3, 16, 224, 224))
"""Batch, channels, frames, height and width of a clip; some fit one height and width alone."""

_FROZEN = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)
"""Detectors whose batch norms torchvision freezes once they have trained weights."""


def networks() -> list[Network]:
    """All of them, group by group, in alphabetical order within each."""
    models = torchvision_models()
    listed = [
        *_of_torchvision(models, "classification"),
        *_of_torchvision(models.segmentation, "segmentation"),
        *_of_torchvision(models.detection, "detection"),
        *_of_torchvision(models.video, "video"),
    ]
    folder = Path(__file__).parents[2] / "models"
    for module in sorted(each.name for each in pkgutil.iter_modules([str(folder)])):
        if not module.startswith("_"):
            listed.append(_of_this_repository(module))
    return listed


def examples(network: Network) -> tuple[torch.Tensor, ...]:
    """Seeded random inputs of its shape; a demonstration network has its own."""
    if network.group == "demonstration":
        own = importlib.import_module(network.name.replace("/", ".")).example_inputs()
        return tuple(own)
    return (torch.randn(network.shape, generator=torch.Generator().manual_seed(SEED)),)


def _of_torchvision(module: Any, group: str) -> list[Network]:
    models = torchvision_models()
    found = []
    for name in models.list_models(module=module):
        side = _SIDES.get(name, 224)
        shape = _CLIPS.get(name, _CLIP) if group == "video" else (1, 3, side, side)
        maker = models.get_model_builder(name)
        found.append(
            Network(
                name=f"{name}.backbone" if group == "detection" else name,
                group=group,
                family=maker.__module__.rpartition(".")[2],
                shape=shape,
                parameter_bytes=4 * models.get_model_weights(name).DEFAULT.meta["num_params"],
                build=functools.partial(_build, name, maker, shape, group == "detection"),
            )
        )
    return found


def _of_this_repository(name: str) -> Network:
    module = importlib.import_module(f"models.{name}")
    (first, *_) = module.example_inputs()
    return Network(f"models/{name}", "demonstration", "models", tuple(first.shape), 0, module.build)


def _build(name: str, maker: Callable[..., nn.Module], shape: Shape, backbone: bool) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    # Without this a backbone is downloaded.
    if "weights_backbone" in inspect.signature(maker).parameters:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # it takes long, and is replaced below
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(SEED)
        made = maker(**options)
    module: nn.Module = made.backbone if backbone else made  # type: ignore[assignment]
    draw_weights(module, torch.randn((2, *shape[1:]), generator=_generator()))
    if name in _FROZEN:
        _freeze(module)
    return module.eval()


def draw_weights(module: nn.Module, batch: torch.Tensor) -> None:
    """Draw anew whatever hides mistakes, and give every batch norm that `batch` reaches the
    statistics of what reaches it there, moved at random.

    Args:
        module: written to, and put in eval mode.
        batch: an input of at least two samples, since one has no variance.
    """
    generator = _generator()
    with torch.no_grad():
        for parameter in module.parameters():
            low, high = torch.aminmax(parameter)
            if low != high:
                continue  # drawn by torchvision
            if low == 1:  # a norm's scale
                parameter.uniform_(0.7, 1.3, generator=generator)
            else:  # zeros, and LayerScale's 1e-6, in which a branch would vanish
                parameter.normal_(0, 0.1, generator=generator)
        norms = [part for part in module.eval().modules() if isinstance(part, _BatchNorm)]
        for norm in norms:
            norm.bias.add_(BIAS)
            norm.train()
            norm.momentum = 1.0
        if norms:
            module(batch)
        for norm in norms:
            norm.eval()
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None
            assert var is not None
            # Behind a global pooling there are two numbers a channel, which may be nearly alike.
            var.clamp_(min=0.05 * float((var + mean**2).mean()))
            mean.add_(var.sqrt() * 0.1 * torch.randn(mean.shape, generator=generator))
            var.mul_(torch.rand(var.shape, generator=generator) + 0.5)


def _freeze(module: nn.Module) -> None:
    """Put torchvision's frozen batch norm in place of every batch norm, as its trained detectors
    have it."""
    frozen_kind = importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.BatchNorm2d):
                frozen = frozen_kind(part.num_features, part.eps)
                frozen.load_state_dict(part.state_dict())
                setattr(parent, name, frozen)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)
