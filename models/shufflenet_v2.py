"""ShuffleNet V2 (x1.0).

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
ECCV 2018, https://arxiv.org/abs/1807.11164.

56 convolutions and 2,278,604 parameters, the count of torchvision's network; the paper rounds
it to 2.3 million.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models._blocks import ConvBnAct, ImageClassifier
from models._initialise import initialise


def _shuffle(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels."""
    batch, channels, height, width = x.shape
    halves = x.view(batch, 2, channels // 2, height, width)
    return halves.transpose(1, 2).contiguous().view(batch, channels, height, width)


def _depthwise(channels: int, stride: int) -> ConvBnAct:
    return ConvBnAct(channels, channels, 3, stride=stride, groups=channels, activation=nn.Identity)


class Unit(nn.Module):
    """Transform one half of the channels and shuffle it with the other (figure 3c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.transform = nn.Sequential(
            ConvBnAct(half, half), _depthwise(half, stride=1), ConvBnAct(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, transformed = x.chunk(2, dim=1)
        return _shuffle(torch.cat([kept, self.transform(transformed)], dim=1))


class DownsamplingUnit(nn.Module):
    """Halve the resolution in both branches, which read all channels (figure 3d)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.shortcut = nn.Sequential(
            _depthwise(in_channels, stride=2), ConvBnAct(in_channels, half)
        )
        self.transform = nn.Sequential(
            ConvBnAct(in_channels, half), _depthwise(half, stride=2), ConvBnAct(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        return _shuffle(torch.cat([self.shortcut(x), self.transform(x)], dim=1))


class ShuffleNetV2(ImageClassifier):
    """Three stages of units between two convolutions (table 5)."""

    def __init__(self) -> None:
        features = nn.Sequential(
            OrderedDict[str, nn.Module](
                stem=ConvBnAct(3, 24, 3, stride=2),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        channels = 24
        for stage, (out_channels, units) in enumerate([(116, 4), (232, 8), (464, 4)], start=2):
            features.add_module(f"stage{stage}_unit1", DownsamplingUnit(channels, out_channels))
            for unit in range(2, units + 1):
                features.add_module(f"stage{stage}_unit{unit}", Unit(out_channels))
            channels = out_channels
        features.add_module("head", ConvBnAct(channels, 1024))
        super().__init__(features, channels=1024)


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(ShuffleNetV2(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
