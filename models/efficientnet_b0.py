"""EfficientNet-B0.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019, https://arxiv.org/abs/1905.11946.  Stochastic depth, an identity at inference, is
left out.

81 convolutions, 32 of them in the squeeze-and-excitation gates, and 5,288,548 parameters, the
count of torchvision's network; the paper rounds it to 5.3 million.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models._blocks import ConvBnAct, ImageClassifier, InvertedResidual
from models._initialise import initialise

# Expansion, kernel, output channels, number of blocks and stride of the first block (table 1).
_STAGES = [
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
]


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the averages of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                squeeze=nn.Conv2d(channels, squeezed, 1),
                activation=nn.SiLU(),
                excite=nn.Conv2d(squeezed, channels, 1),
                sigmoid=nn.Sigmoid(),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(x)
        return x * gate


class EfficientNetB0(ImageClassifier):
    """Sixteen gated inverted residuals between two convolutions."""

    def __init__(self) -> None:
        features = nn.Sequential(
            OrderedDict(stem=ConvBnAct(3, 32, 3, stride=2, activation=nn.SiLU))
        )
        channels = 32
        for stage, (expansion, kernel_size, out_channels, blocks, first_stride) in enumerate(
            _STAGES, start=1
        ):
            for block in range(1, blocks + 1):
                features.add_module(
                    f"stage{stage}_block{block}",
                    InvertedResidual(
                        channels,
                        out_channels,
                        expansion=expansion,
                        kernel_size=kernel_size,
                        stride=first_stride if block == 1 else 1,
                        activation=nn.SiLU,
                        gate=SqueezeExcite(channels * expansion, channels // 4),
                    ),
                )
                channels = out_channels
        features.add_module("head", ConvBnAct(channels, 1280, activation=nn.SiLU))
        super().__init__(features, channels=1280, dropout=0.2)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(EfficientNetB0(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
