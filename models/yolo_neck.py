"""The neck and the heads of YOLOv8n, without its backbone.

Jocher et al., "Ultralytics YOLOv8", 2023, https://github.com/ultralytics/ultralytics (there is
no paper); the neck is the path aggregation network of Liu et al., "Path Aggregation Network for
Instance Segmentation", CVPR 2018, https://arxiv.org/abs/1803.01534.

36 convolutions and 1,884,528 parameters: layers 10 to 22 of the published network (986,880 in
the neck and 897,664 in the heads, of 3,157,200 in all) less the 16 constants with which it
decodes boxes.  The inputs have the shapes which its backbone makes of a 640x640 image.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models._blocks import Branches, ConvBnAct
from models._initialise import initialise

_CHANNELS = (64, 128, 256)  # of P3, P4 and P5
_CLASSES = 80
_BOX_CHANNELS = 4 * 16  # a distribution over 16 distances for each side of the box
_convolution = partial(ConvBnAct, activation=nn.SiLU, eps=1e-3)


class C2f(nn.Module):
    """Convolve one half of the channels further; keep both halves and the result."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.expand = _convolution(in_channels, out_channels)
        self.convolve = nn.Sequential(_convolution(half, half, 3), _convolution(half, half, 3))
        self.project = _convolution(3 * half, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        kept, convolved = self.expand(x).chunk(2, dim=1)
        output: Tensor = self.project(torch.cat([kept, convolved, self.convolve(convolved)], dim=1))
        return output


class DecoupledHead(Branches):
    """Box distances and class logits from convolutions that share nothing but their input."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(
            self._predict(in_channels, _BOX_CHANNELS), self._predict(in_channels, _CLASSES)
        )

    @staticmethod
    def _predict(in_channels: int, out_channels: int) -> nn.Module:
        return nn.Sequential(
            _convolution(in_channels, out_channels, 3),
            _convolution(out_channels, out_channels, 3),
            nn.Conv2d(out_channels, out_channels, 1),
        )


class YoloNeck(nn.Module):
    """Pass coarse features down to fine ones and back up, then predict at each resolution."""

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = _CHANNELS
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.down_middle = C2f(coarse + middle, middle)
        self.down_fine = C2f(middle + fine, fine)
        self.reduce_fine = _convolution(fine, fine, 3, stride=2)
        self.up_middle = C2f(fine + middle, middle)
        self.reduce_middle = _convolution(middle, middle, 3, stride=2)
        self.up_coarse = C2f(middle + coarse, coarse)
        self.heads = nn.ModuleList(DecoupledHead(channels) for channels in _CHANNELS)

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor) -> tuple[Tensor, ...]:
        middle = self.down_middle(torch.cat([self.upsample(p5), p4], dim=1))
        fine = self.down_fine(torch.cat([self.upsample(middle), p3], dim=1))
        middle = self.up_middle(torch.cat([self.reduce_fine(fine), middle], dim=1))
        coarse = self.up_coarse(torch.cat([self.reduce_middle(middle), p5], dim=1))
        features = (fine, middle, coarse)
        return tuple(head(x) for head, x in zip(self.heads, features, strict=True))


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(YoloNeck(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return random feature maps at strides 8, 16 and 32 of a 640x640 image."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, channels, size, size, generator=generator)
        for channels, size in zip(_CHANNELS, (80, 40, 20), strict=True)
    )
