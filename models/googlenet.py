"""GoogLeNet (Inception v1) with batch normalisation and without auxiliary classifiers.

Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, https://arxiv.org/abs/1409.4842;
batch normalisation as in Ioffe and Szegedy, https://arxiv.org/abs/1502.03167.

57 convolutions and 7,005,832 parameters.  The paper states "6.8M" in round figures; its
reference implementation (Caffe's bvlc_googlenet) has 6,998,552, with one bias for each of the
7,280 convolution channels where batch normalisation has a weight and a bias.  torchvision's
network has 6,624,904 because it convolves 3x3 in the branch where the paper convolves 5x5.
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from models._blocks import Branches, ConvBnAct, ImageClassifier
from models._initialise import initialise

_convolution = partial(ConvBnAct, eps=1e-3)
_halve = partial(nn.MaxPool2d, kernel_size=3, stride=2, ceil_mode=True)


class Inception(Branches):
    """1x1, 3x3, 5x5 and pooled views of one input; each argument is a number of channels."""

    def __init__(
        self,
        in_channels: int,
        only_1x1: int,
        reduce_3x3: int,
        only_3x3: int,
        reduce_5x5: int,
        only_5x5: int,
        pooled: int,
    ) -> None:
        super().__init__(
            _convolution(in_channels, only_1x1),
            nn.Sequential(
                _convolution(in_channels, reduce_3x3), _convolution(reduce_3x3, only_3x3, 3)
            ),
            nn.Sequential(
                _convolution(in_channels, reduce_5x5), _convolution(reduce_5x5, only_5x5, 5)
            ),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(in_channels, pooled)),
        )


class GoogLeNet(ImageClassifier):
    """The 22 layers of table 1 of the paper."""

    def __init__(self) -> None:
        features = nn.Sequential(
            OrderedDict(
                convolution1=_convolution(3, 64, 7, stride=2),
                pool1=_halve(),
                reduce2=_convolution(64, 64),
                convolution2=_convolution(64, 192, 3),
                pool2=_halve(),
                inception3a=Inception(192, 64, 96, 128, 16, 32, 32),
                inception3b=Inception(256, 128, 128, 192, 32, 96, 64),
                pool3=_halve(),
                inception4a=Inception(480, 192, 96, 208, 16, 48, 64),
                inception4b=Inception(512, 160, 112, 224, 24, 64, 64),
                inception4c=Inception(512, 128, 128, 256, 24, 64, 64),
                inception4d=Inception(512, 112, 144, 288, 32, 64, 64),
                inception4e=Inception(528, 256, 160, 320, 32, 128, 128),
                pool4=_halve(),
                inception5a=Inception(832, 256, 160, 320, 32, 128, 128),
                inception5b=Inception(832, 384, 192, 384, 48, 128, 128),
            )
        )
        super().__init__(features, channels=1024, dropout=0.4)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(GoogLeNet(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
