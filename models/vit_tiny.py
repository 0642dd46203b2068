"""Vision Transformer, tiny size (patches of 16x16, width 192, 12 layers, 3 heads).

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
Scale", ICLR 2021, https://arxiv.org/abs/2010.11929; the tiny size is that of Touvron et al.,
"Training data-efficient image transformers & distillation through attention", ICML 2021,
https://arxiv.org/abs/2012.12877.

One convolution, which cuts out the patches, and 5,717,416 parameters, as in the authors'
DeiT-Ti.  The projections to queries, keys and values are three linear layers on one input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._blocks import IMAGENET_CLASSES
from models._initialise import initialise

_IMAGE = 224
_PATCH = 16
_WIDTH = 192
_LAYERS = 12
_HEADS = 3
_EPS = 1e-6


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.project = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return output


class EncoderLayer(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.attention = SelfAttention()
        self.perceptron_norm = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.perceptron = nn.Sequential(
            nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        transformed: Tensor = self.perceptron(self.perceptron_norm(x))
        return x + transformed


class VisionTransformer(nn.Module):
    """Classify an image by a token of its own that attends to the patches."""

    def __init__(self) -> None:
        super().__init__()
        patches = (_IMAGE // _PATCH) ** 2
        self.embed = nn.Conv2d(3, _WIDTH, _PATCH, stride=_PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 1 + patches, _WIDTH))
        self.encoder = nn.Sequential(*(EncoderLayer() for _ in range(_LAYERS)))
        self.norm = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.classifier = nn.Linear(_WIDTH, IMAGENET_CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.embed(image).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(image.shape[0], -1, -1)
        encoded = self.encoder(torch.cat([class_token, patches], dim=1) + self.positions)
        logits: Tensor = self.classifier(self.norm(encoded)[:, 0])
        return logits


def build() -> nn.Module:
    """Return the network in eval mode, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        return initialise(VisionTransformer(), seed=0)


def example_inputs() -> tuple[Tensor, ...]:
    """Return one random 224x224 image."""
    shape = (1, 3, _IMAGE, _IMAGE)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
