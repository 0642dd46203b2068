"""Weights files: a state dict is read without running code, and enters a model whole or not at all.

A `.pt` file is a pickle, and unpickling can run any code that its author put there. It is
therefore read with `weights_only=True`, which knows tensors and plain containers and refuses the
rest; only a user who says so (`trust`) gets the full unpickler. A `.safetensors` file holds
tensors and nothing else.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from optfuse.errors import LoadError

PICKLED_SUFFIXES = (".pt", ".pth")

WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
"""Where training scripts put the state dict inside a checkpoint, tried in this order."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every key."""

LISTED_AT_MOST = 8


def load_weights(model: torch.nn.Module, path: Path, *, trust: bool = False) -> None:
    """Copy the weights in a file into a model, all of them or none.

    Values are converted to the model's own dtypes. A tensor that the model holds under several
    names (tied weights) may stand in the file under one of them. A file without the
    `num_batches_tracked` of a batch norm is accepted: files from before PyTorch 0.4.1 have none,
    and evaluation doesn't read it.

    Raises:
        LoadError: the file cannot be read (see `read_state_dict`), or its keys, shapes or kinds of
            number are not the model's; the model is then as it was.
    """
    own = model.state_dict(keep_vars=True)
    state = _without_wrapper_prefixes(read_state_dict(path, trust=trust), own)
    thing = f"The weights in '{path}' do not fit the model"
    if problems := _differences(state, own):
        raise LoadError(
            thing,
            "; ".join(problems),
            "Choose the weights of this very model, or load them in the callable that builds it",
        )
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:  # a model's own loading hooks can raise anything
        raise LoadError(
            thing,
            f"Its load_state_dict failed with {describe(error)}",
            "Load the weights in the callable that builds the model",
        ) from error


def read_state_dict(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """The state dict in a `.safetensors`, `.pt` or `.pth` file, on the CPU.

    A `state_dict`, `model_state_dict` or `model` wrapper around it is taken off. Tensors are
    mapped from the file where its format allows that, so reading takes no memory of its own.

    Args:
        path: the file.
        trust: unpickle what `weights_only` refuses, which runs the code in the file.

    Raises:
        LoadError: there is no such file, it is of another kind, empty, cut short, wants to run
            code, or holds something else than a state dict.
    """
    thing = f"The weights file '{path}' cannot be read"
    require_file(path, thing)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *PICKLED_SUFFIXES):
        raise LoadError(
            thing,
            f"Its name ends in '{path.suffix}', and only .safetensors, .pt and .pth are weights",
            "Save model.state_dict() with safetensors.torch.save_file or with torch.save",
        )
    try:
        is_empty = path.stat().st_size == 0
        with path.open("rb"):
            pass
    except OSError as error:
        raise LoadError(
            thing, error.strerror or describe(error), "Make it readable, or choose another file"
        ) from error
    if is_empty:
        raise LoadError(thing, "It is empty", "Write or download it again")
    content = _read_safetensors(path) if suffix == ".safetensors" else _read_pickled(path, trust)
    return _as_state_dict(content, path)


def require_file(path: Path, thing: str) -> None:
    """Make sure that a path leads to a regular file.

    Raises:
        LoadError: it doesn't; the sentence offers the sibling with the closest name.
    """
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise LoadError(thing, "It is a folder", "Name a file in it")
        if path.exists():
            raise LoadError(thing, "It is not a regular file", "Name a file on disk")
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:  # e.g. a name that is too long, or a folder that is locked
        raise LoadError(thing, error.strerror or describe(error), "Check the path") from error
    close = get_close_matches(path.name, siblings, n=1)
    raise LoadError(
        thing,
        "There is no such file",
        f"Did you mean '{path.with_name(close[0])}'?" if close else "Check the path",
    )


def first_few(names: Iterable[str]) -> str:
    """The first names of a list as text, and how many more there are."""
    listed = list(names)
    more = len(listed) - LISTED_AT_MOST
    text = ", ".join(listed[:LISTED_AT_MOST])
    return f"{text} and {more} more" if more > 0 else text


def describe(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except Exception as error:  # a damaged header can surface as nearly any exception
        raise LoadError(
            f"The weights file '{path}' cannot be read",
            f"It is cut short or no safetensors file ({describe(error)})",
            "Write or download it again",
        ) from error


def _read_pickled(path: Path, trust: bool) -> Any:
    try:
        return _torch_load(path, weights_only=True)
    except Exception as error:
        if trust:
            return _unpickle_trusted(path)
        raise _refusal(path, error) from error


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    with warnings.catch_warnings():
        # Of a TorchScript archive torch.load says which other function would read it too.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(
            path, map_location="cpu", weights_only=weights_only, mmap=_is_mappable(path)
        )


def _is_mappable(path: Path) -> bool:
    """Whether tensors lie in the file as they are: not in the oldest format, nor compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _unpickle_trusted(path: Path) -> Any:
    try:
        return _torch_load(path, weights_only=False)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code in the file may call sys.exit
        raise LoadError(
            f"The weights file '{path}' cannot be read",
            f"Unpickling it failed with {describe(error)}",
            "Write it again as model.state_dict(), or make the classes in it importable",
        ) from error


def _refusal(path: Path, error: Exception) -> LoadError:
    """Tell a whole file that wants to run code from a damaged one."""
    thing = f"The weights file '{path}' cannot be read"
    named = re.search(r"GLOBAL (\S+)", str(error))
    is_whole = isinstance(error, UnpicklingError) and zipfile.is_zipfile(path)
    # TorchScript archives and the tar files of old are refused by this name.
    is_other_kind = re.search(r"Cannot use \W*weights_only=True", str(error))
    if named or is_whole or is_other_kind:
        wanted = f"refers to '{named[1]}'" if named else "holds more than tensors"
        return LoadError(
            thing,
            f"It {wanted}, which only unpickling can do, and unpickling runs code in the file",
            "Save model.state_dict() alone, or pass --trust, which runs code in the file, "
            "if you trust who wrote it",
        )
    return LoadError(
        thing,
        "It is cut short or was not written by torch.save",
        "Write or download it again",
    )


def _as_state_dict(content: Any, path: Path) -> dict[str, Any]:
    if isinstance(content, Mapping):
        inner = (content.get(key) for key in WRAPPER_KEYS)
        content = next((i for i in inner if isinstance(i, Mapping | torch.nn.Module)), content)
    if isinstance(content, torch.nn.Module):  # only a trusted file can hold a model pickled whole
        content = content.state_dict()
    if (reason := _not_a_state_dict(content)) is not None:
        raise LoadError(
            f"The weights file '{path}' holds no state dict",
            reason,
            "Save model.state_dict(), alone or under the key 'state_dict'",
        )
    # The same object, not a copy: it carries the version numbers that load_state_dict reads.
    return content if isinstance(content, dict) else dict(content)


def _not_a_state_dict(content: Any) -> str | None:
    if not isinstance(content, Mapping):
        return f"It holds a value of type '{type(content).__name__}'"
    for key, value in content.items():
        if not isinstance(key, str):
            return f"Its key {key!r} is not a name"
        if not isinstance(value, torch.Tensor) and not key.endswith("_extra_state"):
            return f"Its entry '{key}' is of type '{type(value).__name__}', not a tensor"
    return None


def _without_wrapper_prefixes(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Take off prefixes that stand before every key of the file and that the model doesn't have."""
    while state:
        prefix = next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), "")
        if not prefix or any(key.startswith(prefix) for key in own):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _differences(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What keeps a state dict from entering a model, one clause a kind of difference."""
    # A tied parameter is one object under several names; one of them in the file is enough.
    given = {id(value) for key, value in own.items() if key in state}
    missing = [
        key
        for key, value in own.items()
        if key not in state and id(value) not in given and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in own]
    unlike = [
        f"{key} ({_layout(state[key])} instead of {_layout(own[key])})"
        for key in own
        if key in state and _is_unlike(state[key], own[key])
    ]
    clauses = {"missing keys": missing, "unexpected keys": unexpected, "mismatches": unlike}
    return [f"{kind}: {first_few(names)}" for kind, names in clauses.items() if names]


def _is_unlike(found: Any, wanted: Any) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return False
    # Between kinds of number a copy changes values without a word, e.g. of int8 weights that
    # lost their scale; between widths it only rounds.
    return found.shape != wanted.shape or _kind(found.dtype) != _kind(wanted.dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "real"
    return "complex" if dtype.is_complex else "whole"


def _layout(tensor: torch.Tensor) -> str:
    shape = "x".join(str(size) for size in tensor.shape) or "scalar"
    return f"{shape}:{str(tensor.dtype).removeprefix('torch.')}"
