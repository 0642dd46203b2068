"""SqueezeNet 1.1.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model
size", 2016, https://arxiv.org/abs/1602.07360; version 1.1 is the authors' later release, with
2.4 times less computation, https://github.com/forresti/SqueezeNet.

26 convolutions, all with bias and none with batch normalisation, and 1,235,496 parameters.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from models._blocks import IMAGENET_CLASSES, Branches
from models._initialise import initialise

_halve = partial(nn.MaxPool2d, kernel_size=3, stride=2, ceil_mode=True)


class Fire(nn.Sequential):
    """Squeeze the channels by a 1x1 convolution, expand them by a 1x1 and a 3x3."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__(
            OrderedDict(
                squeeze=nn.Conv2d(in_channels, squeezed, 1),
                activation=nn.ReLU(),
                expand=Branches(
                    nn.Sequential(nn.Conv2d(squeezed, expanded, 1), nn.ReLU()),
                    nn.Sequential(nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU()),
                ),
            )
        )


class SqueezeNet(nn.Sequential):
    """Eight fire modules between two convolutions, the second of which classifies."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                convolution1=nn.Conv2d(3, 64, 3, stride=2),
                activation1=nn.ReLU(),
                pool1=_halve(),
                fire2=Fire(64, 16, 64),
                fire3=Fire(128, 16, 64),
                pool3=_halve(),
                fire4=Fire(128, 32, 128),
                fire5=Fire(256, 32, 128),
                pool5=_halve(),
                fire6=Fire(256, 48, 192),
                fire7=Fire(384, 48, 192),
                fire8=Fire(384, 64, 256),
                fire9=Fire(512, 64, 256),
                dropout=nn.Dropout(0.5),
                convolution10=nn.Conv2d(512, IMAGENET_CLASSES, 1),
                activation10=nn.ReLU(),
                pool10=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(SqueezeNet(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
