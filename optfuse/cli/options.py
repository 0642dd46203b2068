"""The arguments and options that several commands share, and what they are read into."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optfuse.errors import UsageError

if TYPE_CHECKING:
    from optfuse.stages import Source

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Where the model comes from: path/to/file.py:callable, package.module:callable, "
        "torchvision:NAME or timm:NAME. The callable gives an nn.Module; loading it runs its code.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .safetensors, .pt or .pth state dict to load."),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="An input, e.g. 1x3x224x224 or ids=1x128:int64. Repeat it for several. Not needed "
        "where the source has an example_inputs().",
    ),
]
DimOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="NAME=MIN:OPT:MAX",
        help="A size that stays open, e.g. N=1:8:32 with --input Nx3x224x224: any from 1 to 32, "
        "usually 8. N=1:32 is usually 32, N=8 is always 8. Repeat it for several.",
    ),
]
NormalizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="mean=…,std=…",
        help="Put (x - mean) / std in front of the model's images, so that the file takes raw "
        "pixels: one number or one a channel, e.g. mean=0.485,0.456,0.406,std=0.229,0.224,0.225.",
    ),
]
PassesOption = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Which passes run: names, all, none, or all,-name; name.option switches an option on.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seeds every random choice.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads of every engine.", show_default="one a physical core"),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Allow a weights file to run code while it is unpickled.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the Python traceback of an error.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.")
]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", help="Print nothing but errors; the files are written all the same."),
]


def source_of(
    text: str,
    weights: Path | None,
    inputs: list[str] | None,
    seed: int,
    trust: bool,
    normalize: str | None = None,
    dims: list[str] | None = None,
) -> Source:
    """A model's source as the user typed it.

    Raises:
        UsageError: an input, a dimension or the normalisation cannot be read.
    """
    from optfuse.dimensions import parse_dimension
    from optfuse.inputs import parse_input
    from optfuse.normalize import parse_normalization
    from optfuse.stages import Source

    return Source(
        text=text,
        weights=weights,
        inputs=tuple(parse_input(each, names=True) for each in inputs or ()),
        seed=seed,
        trust=trust,
        normalize=None if normalize is None else parse_normalization(normalize),
        dimensions=tuple(parse_dimension(each) for each in dims or ()),
    )


def sizes(option: str, text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers, each once.

    Raises:
        UsageError: one is no whole number above 0.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        # No size of 10 digits is possible, and Python refuses to convert thousands of them.
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", word):
            raise UsageError(
                f"The sizes '{text}' of {option} cannot be read",
                f"'{word}' is no whole number above 0",
                f"Write them like {option} 1,8,32",
            )
    return tuple(dict.fromkeys(int(word) for word in words))


def split(names: list[str] | None) -> tuple[str, ...]:
    """`--engine a --engine b` and `--engine a,b` mean the same."""
    words = (word.strip() for name in names or () for word in name.split(","))
    return tuple(dict.fromkeys(filter(None, words)))
