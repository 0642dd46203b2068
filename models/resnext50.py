"""ResNeXt-50 (32x4d).

Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017,
https://arxiv.org/abs/1611.05431.

53 convolutions, 16 of them in 32 groups, and 25,028,904 parameters, the count of torchvision's
network; the paper's table 1 rounds it to 25.0 million.
"""

import torch
from torch import Tensor, nn

from models._initialise import initialise
from models.resnet50 import ResNet


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(ResNet(groups=32, group_width=4), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
