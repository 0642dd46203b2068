"""--normalize: what it reads, and that (x - mean) / std stands in front of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfuse.capture import capture
from optfuse.errors import UsageError
from optfuse.export import export
from optfuse.graph import placeholders
from optfuse.normalize import normalized, parse_normalization
from optfuse.stages import LoadedModel, Normalization
from tests.harness import counts, scramble

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Two float32 operations in front, done alike here and there.
FLOAT32 = 1e-6


def numbers(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Classifier(nn.Module):
    """A mask, and an image behind it, by names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        return self.conv(picture).mean((2, 3)) * mask


class OneInput(nn.Sequential):
    """A convolution."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3))


def loaded(*args: Any, module: nn.Module | None = None, **kwargs: Any) -> LoadedModel:
    return LoadedModel("net", scramble(module or OneInput()), args, kwargs)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("mean=0.485,0.456,0.406,std=0.229,0.224,0.225", MEAN, STD),
        ("std=0.229,0.224,0.225,mean=0.485,0.456,0.406", MEAN, STD),
        ("mean=0.5,std=0.25", (0.5,), (0.25,)),
        (" mean = 0.5 , 0.25 , std = 1e2 ", (0.5, 0.25), (100.0,)),
        ("mean=-1", (-1.0,), (1.0,)),
        ("std=255", (0.0,), (255.0,)),
    ],
)
def test_reads_mean_and_std(text: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    assert parse_normalization(text) == Normalization(mean, std)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "'' stands behind neither 'mean=' nor 'std='"),
        ("0.5,0.5", "'0.5' stands behind neither 'mean=' nor 'std='"),
        ("imagenet", "'imagenet' stands behind neither 'mean=' nor 'std='"),
        ("var=1", "'var' is neither 'mean' nor 'std'"),
        ("=1", "'' is neither 'mean' nor 'std'"),
        ("mean=0.5,mean=0.25", "'mean' is given more than once"),
        ("mean=", "'' is no number"),
        ("mean=0.5,,std=1", "'' is no number"),
        ("mean=half", "'half' is no number"),
        ("mean=nan", "'nan' is not finite"),
        ("std=1,inf", "'inf' is not finite"),
        ("std=1,0.0,1", "Nothing can be divided by a std of 0"),
    ],
)
def test_says_what_it_cannot_read(text: str, cause: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_normalization(text)
    assert str(raised.value) == (
        f"The normalisation '{text}' cannot be read. {cause}. "
        "Write it like --normalize mean=0.485,0.456,0.406,std=0.229,0.224,0.225."
    )


def test_the_model_sees_the_normalised_image() -> None:
    model = loaded(numbers(2, 3, 8, 8))
    found = normalized(model, Normalization(MEAN, STD)).module(numbers(2, 3, 8, 8, seed=9))
    torch.testing.assert_close(
        found, model.module(by_hand(numbers(2, 3, 8, 8, seed=9))), rtol=FLOAT32, atol=FLOAT32
    )


def test_one_number_serves_all_channels() -> None:
    model = loaded(numbers(2, 3, 8, 8))
    x = numbers(2, 3, 8, 8, seed=9)
    found = normalized(model, Normalization((0.5,), (0.25,))).module(x)
    torch.testing.assert_close(found, model.module((x - 0.5) / 0.25), rtol=FLOAT32, atol=FLOAT32)


def test_the_image_is_the_first_input_that_can_be_one() -> None:
    mask, picture = numbers(2, 4), numbers(2, 3, 8, 8)
    for model in (
        loaded(mask, picture, module=Classifier()),
        loaded(mask, module=Classifier(), picture=picture),
        loaded(module=Classifier(), picture=picture, mask=mask),
    ):
        wrapped = normalized(model, Normalization(MEAN, STD))
        found = wrapped.module(*wrapped.example_args, **wrapped.example_kwargs)
        expected = model.module(mask, by_hand(picture))
        torch.testing.assert_close(found, expected, rtol=FLOAT32, atol=FLOAT32)


def test_inputs_keep_their_names_order_and_dynamic_sizes(tmp_path: Any) -> None:
    mask, picture = numbers(2, 4), numbers(2, 3, 8, 8)
    batch = torch.export.Dim("batch")
    model = LoadedModel(
        "net",
        scramble(Classifier()),
        (mask, picture),
        {},
        dynamic_shapes={"mask": {0: batch}, "picture": {0: batch}},
    )
    program = capture(normalized(model, Normalization(MEAN, STD)))
    assert [node.name for node in placeholders(program.graph_module.graph)] == ["mask", "picture"]
    assert counts(program)["sub"] == counts(program)["div"] == 1
    three = numbers(3, 4), numbers(3, 3, 8, 8)
    torch.testing.assert_close(
        program.graph_module(*three),
        model.module(three[0], by_hand(three[1])),
        rtol=FLOAT32,
        atol=FLOAT32,
    )
    assert export(program, tmp_path / "net.onnx").input_names == ("mask", "picture")


def test_the_model_itself_stays_as_it_is() -> None:
    model = loaded(numbers(2, 3, 8, 8))
    names, before = list(model.module.state_dict()), model.module(numbers(1, 3, 8, 8))
    wrapped = normalized(model, Normalization(MEAN, STD))
    assert not wrapped.module.training
    assert list(model.module.state_dict()) == names
    assert not model.module._forward_pre_hooks
    assert torch.equal(model.module(numbers(1, 3, 8, 8)), before)
    assert wrapped.example_args is model.example_args


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_numbers_have_the_dtype_of_the_image(dtype: torch.dtype) -> None:
    model = loaded(numbers(2, 3, 8, 8, dtype=dtype), module=OneInput().to(dtype))
    program = capture(normalized(model, Normalization(MEAN, STD)))
    assert {tensor.dtype for tensor in program.graph_module.state_dict().values()} == {dtype}
    assert "_to_copy" not in counts(program)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(UsageError) as raised:
        normalized(loaded(numbers(1, 1, 8, 8)), Normalization(MEAN, (1.0,)))
    assert str(raised.value) == (
        "The images of 'net' cannot be normalised. The mean has 3 numbers, and an image of shape "
        "1x1x8x8 has 1 channels. Give one number, or one a channel."
    )


def test_a_model_without_images_is_refused() -> None:
    with pytest.raises(UsageError) as raised:
        normalized(
            loaded(numbers(2, 4), torch.ones(1, 2, 3, dtype=torch.int64)), Normalization(MEAN, STD)
        )
    assert str(raised.value) == (
        "'net' has no images to normalise. None of its inputs is a floating-point tensor of at "
        "least three dimensions. Leave --normalize out, or check the shapes and dtypes given with "
        "--input."
    )


@pytest.mark.parametrize(("mean", "std"), [((1e6,), (1.0,)), ((0.5,), (1e-9,))])
def test_numbers_that_vanish_in_the_dtype_of_the_image_are_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with pytest.raises(UsageError) as raised:
        normalized(loaded(numbers(1, 3, 8, 8, dtype=torch.float16)), Normalization(mean, std))
    assert str(raised.value) == (
        "The images of 'net' cannot be normalised. In float16, as which they are given, the mean "
        "is not finite or the std is 0. Give other numbers, or the images in a wider dtype."
    )
