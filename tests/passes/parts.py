"""What the tests of several passes build their models of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Model(nn.Module):
    """`forward` as a function of the model and its input, over modules and tensors by name."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


class TwoInputs(Model):
    """The same with a second input."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return self._forward(self, x, y)


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Seeded random numbers."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)
