"""Building blocks that several of the demonstration networks share."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

IMAGENET_CLASSES = 1000


class ConvBnAct(nn.Sequential):
    """A convolution without bias, batch normalisation and an activation.

    The padding defaults to half the kernel, which keeps the resolution at stride 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        groups: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU,
        eps: float = 1e-5,
    ) -> None:
        if isinstance(kernel_size, int):
            kernel_size = (kernel_size, kernel_size)
        if padding is None:
            padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(
                    in_channels,
                    out_channels,
                    kernel_size,
                    stride=stride,
                    padding=padding,
                    groups=groups,
                    bias=False,
                ),
                norm=nn.BatchNorm2d(out_channels, eps=eps),
                activation=activation(),
            )
        )


class Branches(nn.Module):
    """Modules that read the same input; their outputs are concatenated over the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class InvertedResidual(nn.Module):
    """Expand the channels, convolve them depthwise and project them back (MobileNetV2).

    ``gate``, if given, acts on the expanded channels just before the projection.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: Callable[[], nn.Module],
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels = in_channels * expansion
        layers = OrderedDict[str, nn.Module]()
        if expansion != 1:
            layers["expand"] = ConvBnAct(in_channels, channels, activation=activation)
        layers["depthwise"] = ConvBnAct(
            channels, channels, kernel_size, stride=stride, groups=channels, activation=activation
        )
        if gate is not None:
            layers["gate"] = gate
        layers["project"] = ConvBnAct(channels, out_channels, activation=nn.Identity)
        self.layers = nn.Sequential(layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        return x + output if self.has_shortcut else output


class ImageClassifier(nn.Module):
    """Convolutional features, global average pooling and one linear layer for ImageNet."""

    def __init__(self, features: nn.Module, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, IMAGENET_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.flatten(self.pool(self.features(image)))
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits
