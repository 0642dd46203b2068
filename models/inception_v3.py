"""Inception-v3 without the auxiliary classifier.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
https://arxiv.org/abs/1512.00567.  The blocks A to E are those of the authors' released network,
which torchvision follows.

94 convolutions and 23,834,568 parameters, the count of torchvision's network without its
auxiliary classifier; the paper rounds it to "less than 25 million".
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from models._blocks import Branches, ConvBnAct, ImageClassifier
from models._initialise import initialise

_convolution = partial(ConvBnAct, eps=1e-3)
_halve = partial(nn.MaxPool2d, kernel_size=3, stride=2)


def _pooled(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1), _convolution(in_channels, out_channels)
    )


class InceptionA(Branches):
    """1x1, 5x5 and two stacked 3x3 convolutions at 35x35 (figure 5 of the paper)."""

    def __init__(self, in_channels: int, pooled: int) -> None:
        super().__init__(
            _convolution(in_channels, 64),
            nn.Sequential(_convolution(in_channels, 48), _convolution(48, 64, 5)),
            nn.Sequential(
                _convolution(in_channels, 64), _convolution(64, 96, 3), _convolution(96, 96, 3)
            ),
            _pooled(in_channels, pooled),
        )


class InceptionB(Branches):
    """The reduction from 35x35 to 17x17 (figure 10)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            _convolution(in_channels, 384, 3, stride=2, padding=0),
            nn.Sequential(
                _convolution(in_channels, 64),
                _convolution(64, 96, 3),
                _convolution(96, 96, 3, stride=2, padding=0),
            ),
            _halve(),
        )


class InceptionC(Branches):
    """7x7 convolutions split into 1x7 and 7x1 at 17x17 (figure 6)."""

    def __init__(self, in_channels: int, inner: int) -> None:
        super().__init__(
            _convolution(in_channels, 192),
            nn.Sequential(
                _convolution(in_channels, inner),
                _convolution(inner, inner, (1, 7)),
                _convolution(inner, 192, (7, 1)),
            ),
            nn.Sequential(
                _convolution(in_channels, inner),
                _convolution(inner, inner, (7, 1)),
                _convolution(inner, inner, (1, 7)),
                _convolution(inner, inner, (7, 1)),
                _convolution(inner, 192, (1, 7)),
            ),
            _pooled(in_channels, 192),
        )


class InceptionD(Branches):
    """The reduction from 17x17 to 8x8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            nn.Sequential(
                _convolution(in_channels, 192), _convolution(192, 320, 3, stride=2, padding=0)
            ),
            nn.Sequential(
                _convolution(in_channels, 192),
                _convolution(192, 192, (1, 7)),
                _convolution(192, 192, (7, 1)),
                _convolution(192, 192, 3, stride=2, padding=0),
            ),
            _halve(),
        )


class InceptionE(Branches):
    """3x3 convolutions forked into 1x3 and 3x1 at 8x8: a concatenation in a concatenation."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            _convolution(in_channels, 320),
            nn.Sequential(_convolution(in_channels, 384), self._fork()),
            nn.Sequential(_convolution(in_channels, 448), _convolution(448, 384, 3), self._fork()),
            _pooled(in_channels, 192),
        )

    @staticmethod
    def _fork() -> Branches:
        return Branches(_convolution(384, 384, (1, 3)), _convolution(384, 384, (3, 1)))


class InceptionV3(ImageClassifier):
    """The stem, three blocks A, B, four blocks C, D and two blocks E."""

    def __init__(self) -> None:
        features = nn.Sequential(
            OrderedDict(
                convolution1a=_convolution(3, 32, 3, stride=2, padding=0),
                convolution2a=_convolution(32, 32, 3, padding=0),
                convolution2b=_convolution(32, 64, 3),
                pool1=_halve(),
                convolution3b=_convolution(64, 80),
                convolution4a=_convolution(80, 192, 3, padding=0),
                pool2=_halve(),
                mixed5b=InceptionA(192, pooled=32),
                mixed5c=InceptionA(256, pooled=64),
                mixed5d=InceptionA(288, pooled=64),
                mixed6a=InceptionB(288),
                mixed6b=InceptionC(768, inner=128),
                mixed6c=InceptionC(768, inner=160),
                mixed6d=InceptionC(768, inner=160),
                mixed6e=InceptionC(768, inner=192),
                mixed7a=InceptionD(768),
                mixed7b=InceptionE(1280),
                mixed7c=InceptionE(2048),
            )
        )
        super().__init__(features, channels=2048, dropout=0.5)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(InceptionV3(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 299x299 image."""
    return (torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)),)
