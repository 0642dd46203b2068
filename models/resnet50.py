"""ResNet-50.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385.  The stride of a bottleneck stands on its 3x3 convolution, as
in torchvision ("v1.5"), not on the first 1x1.

53 convolutions and 25,557,032 parameters, the count of torchvision's network.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._blocks import ConvBnAct, ImageClassifier
from models._initialise import initialise

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input, projected if need be, is added."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                reduce=ConvBnAct(in_channels, width),
                convolve=ConvBnAct(width, width, 3, stride=stride, groups=groups),
                expand=ConvBnAct(width, out_channels, activation=nn.Identity),
            )
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvBnAct(
                in_channels, out_channels, stride=stride, activation=nn.Identity
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + self.shortcut(x))


class ResNet(ImageClassifier):
    """The 50-layer network; ``groups`` of ``group_width`` channels make it a ResNeXt."""

    def __init__(self, groups: int = 1, group_width: int = 64) -> None:
        features = nn.Sequential(
            OrderedDict[str, nn.Module](
                stem=ConvBnAct(3, 64, 7, stride=2),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        channels = 64
        for stage, blocks in enumerate([3, 4, 6, 3]):
            width = groups * group_width * 2**stage
            out_channels = 64 * 2**stage * _EXPANSION
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                features.add_module(
                    f"stage{stage + 1}_block{block + 1}",
                    Bottleneck(channels, width, out_channels, stride, groups),
                )
                channels = out_channels
        super().__init__(features, channels)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(ResNet(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
