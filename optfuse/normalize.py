"""Put an image's normalisation, (x - mean) / std, in front of a model, so that it is in the file.

Whoever runs the exported model then gives it raw pixels, and the passes fold what can be folded
into the first convolution.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from optfuse.errors import UsageError
from optfuse.stages import LoadedModel, Normalization


def parse_normalization(text: str) -> Normalization:
    """Read `mean=0.485,0.456,0.406,std=0.229,0.224,0.225`; one of the two may be left out.

    Raises:
        UsageError: it is written differently, or nothing can be divided by its std.
    """
    found: dict[str, list[float]] = {}
    name = ""
    for word in text.split(","):
        before, equals, number = word.strip().rpartition("=")
        if equals:
            name = before.strip()
            if name not in ("mean", "std"):
                raise _unreadable(text, f"'{name}' is neither 'mean' nor 'std'")
            if name in found:
                raise _unreadable(text, f"'{name}' is given more than once")
        if not name:
            raise _unreadable(text, f"'{number}' stands behind neither 'mean=' nor 'std='")
        found.setdefault(name, []).append(_number(text, number))
    if not all(found.get("std", [1.0])):
        raise _unreadable(text, "Nothing can be divided by a std of 0")
    return Normalization(**{name: tuple(numbers) for name, numbers in found.items()})


def normalized(model: LoadedModel, normalization: Normalization) -> LoadedModel:
    """The model that takes raw pixels x and gives what `model` gives of (x - mean) / std.

    The image is the first floating-point input with at least three dimensions; its channels are in
    the third one from the end. Inputs keep their names, their order and the numbers of their
    examples, and the model itself is not changed.

    Raises:
        UsageError: no input is an image, or it has another number of channels.
    """
    key, image = _image(model)
    for what, numbers in (("mean", normalization.mean), ("std", normalization.std)):
        if len(numbers) not in (1, image.shape[-3]):
            raise UsageError(
                f"The images of '{model.name}' cannot be normalised",
                f"The {what} has {len(numbers)} numbers, and an image of shape "
                f"{'x'.join(map(str, image.shape))} has {image.shape[-3]} channels",
                "Give one number, or one a channel",
            )
    held = [
        torch.tensor(numbers, dtype=image.dtype, device=image.device).reshape(-1, 1, 1)
        for numbers in (normalization.mean, normalization.std)
    ]
    if not all(bool(numbers.isfinite().all()) for numbers in held) or bool((held[1] == 0).any()):
        raise UsageError(
            f"The images of '{model.name}' cannot be normalised",
            f"In {str(image.dtype).removeprefix('torch.')}, as which they are given, the mean is "
            "not finite or the std is 0",
            "Give other numbers, or the images in a wider dtype",
        )
    return replace(model, module=_normalized_class(model.module)(model.module, key, *held))


def _image(model: LoadedModel) -> tuple[int | str, torch.Tensor]:
    """The input that is an image, and where it stands: its position, or its name."""
    inputs: list[tuple[int | str, Any]] = [
        *enumerate(model.example_args),
        *model.example_kwargs.items(),
    ]
    for key, given in inputs:
        if isinstance(given, torch.Tensor) and given.is_floating_point() and given.dim() >= 3:
            return key, given
    raise UsageError(
        f"'{model.name}' has no images to normalise",
        "None of its inputs is a floating-point tensor of at least three dimensions",
        "Leave --normalize out, or check the shapes and dtypes given with --input",
    )


class _Normalized(nn.Module):
    """A model with (x - mean) / std in front of one of its inputs, x.

    Args:
        model: as it is.
        key: x's position among the inputs, or its name.
        mean, std: shape (channels or 1, 1, 1).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, key: int | str, mean: torch.Tensor, std: torch.Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._key = key
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, on the normalised x."""
        positional = list(args)
        given: Any = positional if isinstance(self._key, int) else kwargs
        given[self._key] = (given[self._key] - self.mean) / self.std
        return self.model(*positional, **kwargs)


def _normalized_class(model: nn.Module) -> type[_Normalized]:
    """`_Normalized` with the model's own signature: torch.export names the inputs after it."""

    def forward(self: _Normalized, *args: Any, **kwargs: Any) -> Any:
        return _Normalized.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    taken = inspect.signature(model.forward).parameters.values()
    forward.__signature__ = inspect.Signature([own, *taken])  # type: ignore[attr-defined]
    return type("Normalized", (_Normalized,), {"forward": forward})


def _number(text: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        raise _unreadable(text, f"'{word}' is no number") from None
    if not math.isfinite(number):
        raise _unreadable(text, f"'{word}' is not finite")
    return number


def _unreadable(text: str, cause: str) -> UsageError:
    return UsageError(
        f"The normalisation '{text}' cannot be read",
        cause,
        "Write it like --normalize mean=0.485,0.456,0.406,std=0.229,0.224,0.225",
    )
