"""U-Net with 32 base channels, padded convolutions and batch normalisation.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, https://arxiv.org/abs/1505.04597; in the size of Buda et al., "Association of
genomic subtypes of lower-grade gliomas with shape features automatically extracted by a deep
learning algorithm", 2019, https://arxiv.org/abs/1906.03720.

18 convolutions 3x3, 4 transposed convolutions and one 1x1 head; 7,763,521 parameters.  Buda's
network has 7,763,041: its transposed convolutions have a bias for each of their 480 channels,
these have the weight and bias of batch normalisation.  The input is 128x128, half the published
resolution, to stay light; the network takes any multiple of 16.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from models._blocks import ConvBnAct
from models._initialise import initialise


def _convolve_twice(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        ConvBnAct(in_channels, out_channels, 3), ConvBnAct(out_channels, out_channels, 3)
    )


def _double_resolution(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class UNet(nn.Module):
    """An encoder and a decoder joined at every resolution; one logit a pixel."""

    def __init__(self) -> None:
        super().__init__()
        widths = [32, 64, 128, 256, 512]
        self.stem = _convolve_twice(3, widths[0])
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(
            _convolve_twice(narrow, wide) for narrow, wide in pairwise(widths)
        )
        self.upsample = nn.ModuleList(
            _double_resolution(wide, narrow) for wide, narrow in pairwise(reversed(widths))
        )
        self.decoder = nn.ModuleList(
            _convolve_twice(wide, narrow) for wide, narrow in pairwise(reversed(widths))
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.stem(image)
        skipped = []
        for encode in self.encoder:
            skipped.append(x)
            x = encode(self.pool(x))
        for upsample, decode in zip(self.upsample, self.decoder, strict=True):
            x = decode(torch.cat([upsample(x), skipped.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(UNet(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 128x128 image."""
    return (torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)),)
