"""DenseNet-121 (growth rate 32, with bottlenecks and compression).

Huang et al., "Densely Connected Convolutional Networks", CVPR 2017,
https://arxiv.org/abs/1608.06993.

120 convolutions, most of them before rather than after batch normalisation, and 7,978,856
parameters, the count of torchvision's network.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models._blocks import Branches, ConvBnAct, ImageClassifier
from models._initialise import initialise

_GROWTH = 32
_BOTTLENECK = 4 * _GROWTH


class DenseLayer(Branches):
    """The input itself and the 32 new channels computed from it."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            nn.Identity(),
            nn.Sequential(
                nn.BatchNorm2d(in_channels),
                nn.ReLU(),
                ConvBnAct(in_channels, _BOTTLENECK),
                nn.Conv2d(_BOTTLENECK, _GROWTH, 3, padding=1, bias=False),
            ),
        )


class Transition(nn.Sequential):
    """Halve the channels and the resolution between two dense blocks."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(in_channels),
                activation=nn.ReLU(),
                conv=nn.Conv2d(in_channels, in_channels // 2, 1, bias=False),
                pool=nn.AvgPool2d(2),
            )
        )


class DenseNet(ImageClassifier):
    """Dense blocks of 6, 12, 24 and 16 layers with transitions between them."""

    def __init__(self) -> None:
        features = nn.Sequential(
            OrderedDict[str, nn.Module](
                stem=ConvBnAct(3, 64, 7, stride=2),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        channels = 64
        for block, layers in enumerate([6, 12, 24, 16], start=1):
            if block > 1:
                features.add_module(f"transition{block - 1}", Transition(channels))
                channels //= 2
            for layer in range(1, layers + 1):
                features.add_module(f"block{block}_layer{layer}", DenseLayer(channels))
                channels += _GROWTH
        features.add_module("norm", nn.BatchNorm2d(channels))
        features.add_module("activation", nn.ReLU())
        super().__init__(features, channels)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(DenseNet(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
