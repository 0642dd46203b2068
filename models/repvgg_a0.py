"""RepVGG-A0 in its training form.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021,
https://arxiv.org/abs/2101.03697.  Every block still has its 3x3, 1x1 and identity branches,
which the paper merges into one 3x3 convolution for deployment.

44 convolutions, 61 batch normalisations and 9,108,968 parameters (the paper counts the deployed
form, 8.30 million).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._blocks import ConvBnAct, ImageClassifier
from models._initialise import initialise


class RepVggBlock(nn.Module):
    """The sum of a 3x3 convolution, a 1x1 convolution and, where shapes allow, the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.dense = ConvBnAct(in_channels, out_channels, 3, stride=stride, activation=nn.Identity)
        self.pointwise = ConvBnAct(in_channels, out_channels, stride=stride, activation=nn.Identity)
        self.identity = (
            nn.BatchNorm2d(in_channels) if stride == 1 and in_channels == out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        total = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            total = total + self.identity(x)
        return functional.relu(total)


class RepVggA0(ImageClassifier):
    """A first block and stages of 2, 4, 14 and 1 blocks, each of which halves the resolution."""

    def __init__(self) -> None:
        features = nn.Sequential(OrderedDict(stem=RepVggBlock(3, 48, stride=2)))
        channels = 48
        stages = [(48, 2), (96, 4), (192, 14), (1280, 1)]
        for stage, (out_channels, blocks) in enumerate(stages, start=1):
            for block in range(1, blocks + 1):
                features.add_module(
                    f"stage{stage}_block{block}",
                    RepVggBlock(channels, out_channels, stride=2 if block == 1 else 1),
                )
                channels = out_channels
        super().__init__(features, channels)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(RepVggA0(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
