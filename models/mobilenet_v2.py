"""MobileNetV2 (width 1.0).

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
https://arxiv.org/abs/1801.04381.

52 convolutions, 17 of them depthwise, and 3,504,872 parameters, the count of torchvision's
network; the paper rounds it to 3.4 million.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models._blocks import ConvBnAct, ImageClassifier, InvertedResidual
from models._initialise import initialise

# Expansion, output channels, number of blocks and stride of the first block (table 2).
_STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


class MobileNetV2(ImageClassifier):
    """Seventeen inverted residuals between two convolutions."""

    def __init__(self) -> None:
        features = nn.Sequential(
            OrderedDict(stem=ConvBnAct(3, 32, 3, stride=2, activation=nn.ReLU6))
        )
        channels = 32
        for stage, (expansion, out_channels, blocks, first_stride) in enumerate(_STAGES, start=1):
            for block in range(1, blocks + 1):
                features.add_module(
                    f"stage{stage}_block{block}",
                    InvertedResidual(
                        channels,
                        out_channels,
                        expansion=expansion,
                        stride=first_stride if block == 1 else 1,
                        activation=nn.ReLU6,
                    ),
                )
                channels = out_channels
        features.add_module("head", ConvBnAct(channels, 1280, activation=nn.ReLU6))
        super().__init__(features, channels=1280, dropout=0.2)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(MobileNetV2(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
