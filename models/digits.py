"""A small network that reads handwritten digits: the one network here that is trained.

Its weights lie beside it in ``digits.safetensors``, and ``_train_digits.py`` made them.  What moves
an output can so be judged by what it is for: by top-1 agreement and accuracy on the real images in
``digits_heldout.npz``, of which ``digits_heldout_labels.npy`` has the digits.  None of them was
trained on.

No paper's network: a block of each kind that the others here consist of, so that nearly every pass
has something to do.  A margin of background and a normalisation of the grey levels, a residual
block, RepVGG's three summed branches, Inception's concatenated branches with a concat in a concat,
a grouped convolution and a channel shuffle, a depthwise convolution with a gate, and batch
normalisation in front of the classifier.

The images are "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0: 8x8 pixels, each of which
counts the dark ones among 4x4 of a scan.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models._blocks import Branches, ConvBnAct, InvertedResidual
from models.efficientnet_b0 import SqueezeExcite
from models.repvgg_a0 import RepVggBlock

WEIGHTS = Path(__file__).with_name("digits.safetensors")
HELD_OUT = Path(__file__).with_name("digits_heldout.npz")
LABELS = Path(__file__).with_name("digits_heldout_labels.npy")

CLASSES = 10

# Of the pixels that it was trained on, to a tenth.
_MEAN, _DEVIATION = 4.9, 6.0


class Normalise(nn.Module):
    """Grey levels from 0 to 16 with about mean 0 and variance 1."""

    def forward(self, image: Tensor) -> Tensor:
        return (image - _MEAN) / _DEVIATION


class Residual(nn.Module):
    """Two 3x3 convolutions and the input, added and rectified (ResNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvBnAct(channels, channels, 3),
            ConvBnAct(channels, channels, 3, activation=nn.Identity),
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.activation(x + self.layers(x))
        return output


class Shuffle(nn.Module):
    """Interleave groups of channels (ShuffleNet)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        groups = x.view(batch, self.groups, channels // self.groups, height, width)
        return groups.transpose(1, 2).contiguous().view(batch, channels, height, width)


class Digits(nn.Sequential):
    """Convolutions at 8x8 and 4x4 pixels, global average pooling and one linear layer."""

    def __init__(self) -> None:
        inception = Branches(
            ConvBnAct(16, 16),
            nn.Sequential(ConvBnAct(16, 12), ConvBnAct(12, 16, 3)),
            nn.Sequential(
                ConvBnAct(16, 8), Branches(ConvBnAct(8, 4, (1, 3)), ConvBnAct(8, 4, (3, 1)))
            ),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvBnAct(16, 8)),
        )
        super().__init__(
            OrderedDict(
                margin=nn.ZeroPad2d(1),
                normalise=Normalise(),
                stem=ConvBnAct(1, 16, 3, padding=0),
                residual=Residual(16),
                reparametrised=RepVggBlock(16, 16, stride=1),
                halve=nn.MaxPool2d(2),
                inception=inception,
                grouped=ConvBnAct(48, 48, groups=4),
                shuffle=Shuffle(4),
                gated=InvertedResidual(
                    48, 32, expansion=1, activation=nn.ReLU, gate=SqueezeExcite(48, 12)
                ),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                norm=nn.BatchNorm1d(32),
                dropout=nn.Dropout(0.2),
                classifier=nn.Linear(32, CLASSES),
            )
        )


def build() -> nn.Module:
    """Return the network in eval mode with its trained weights."""
    with torch.random.fork_rng(devices=[]):
        network = Digits()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def example_inputs() -> tuple[Tensor, ...]:
    """Return one held-out image, 1x1x8x8, with grey levels from 0 (paper) to 16 (ink)."""
    with np.load(HELD_OUT) as arrays:
        return (torch.from_numpy(arrays["input"][:1]),)
