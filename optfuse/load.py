"""Source -> LoadedModel: find the code, build the model from it, make inputs that fit.

    path/to/file.py:callable     a file; it runs, as code does
    package.module:callable      a module, searched for in the current folder first
    torchvision:NAME, timm:NAME  a model of these libraries, with random weights

Loading a SOURCE of the first two kinds runs the user's own code. Whatever that code raises becomes
a LoadError that names the line; the exception itself stays its `__cause__`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import random
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from optfuse.dimensions import capture_sizes, numbered, points, require_consistent, spelled
from optfuse.errors import LoadError, UsageError
from optfuse.inputs import Arguments, random_arguments, require_possible
from optfuse.normalize import normalized
from optfuse.stages import InputSpec, LoadedModel, OpenSizes, Point, Source
from optfuse.weights import describe, first_few, load_weights, require_file

LIBRARIES = ("torchvision", "timm")

ANONYMOUS_CALLABLES = ("build", "model", "get_model")
"""Names that say nothing about the model; its file or module does."""

SOURCE_KINDS = (
    "Write it as path/to/file.py:callable, package.module:callable, torchvision:NAME or timm:NAME"
)


@dataclass(frozen=True)
class _Found:
    """What a SOURCE led to: the model, its short name, and what makes example inputs for it."""

    name: str
    model: torch.nn.Module
    example_arguments: Callable[[], Arguments]


def load(source: Source) -> LoadedModel:
    """Build the model that a source names, in eval mode, with inputs for it.

    Unnamed inputs become positional arguments in their order, named ones keyword arguments.
    Without any, the source's own `example_inputs()` is called: it returns a tuple of positional
    arguments, a dict of keyword arguments, or a single tensor. Whether their shapes fit is found
    out when the model is captured; that they are as many as `forward` takes is checked here.

    Sizes that `--dim` leaves open are so in `dynamic_shapes` too, and the inputs are of sizes to
    capture the model on.

    The folder that the code is imported from stays the first on `sys.path`, because a model may
    import more of it when it runs. The global random states are as before.

    Raises:
        UsageError: the source or an input is not written as one, or nothing of it is an image that
            can be normalised.
        LoadError: the code, the weights or the inputs are not there or do not work together.
    """
    if not 0 <= source.seed < 2**63:
        raise UsageError(
            f"The seed {source.seed} cannot be used",
            "A seed lies between 0 and 2^63 - 1",
            "Choose a smaller whole number that is not negative",
        )
    _require_possible(source)
    library, _, name = source.text.partition(":")
    is_library = library in LIBRARIES and name
    found = _in_library(library, name, source) if is_library else _in_code(source)
    if source.weights is not None:
        load_weights(found.model, source.weights, trust=source.trust)
    with _user_code(source):
        found.model.eval()
    sizes = _open_sizes(source)
    if sizes is not None:
        arguments: Arguments = sizes.captures[0].args, dict(sizes.captures[0].kwargs)
    elif source.inputs:
        arguments = random_arguments(_with_numbers(source), source.seed)
    else:
        arguments = found.example_arguments()
    _require_accepted(found.model, arguments, source)
    shapes = None if sizes is None else _dynamic_shapes(found.model, sizes)
    model = LoadedModel(found.name, found.model, *arguments, dynamic_shapes=shapes, sizes=sizes)
    return normalized(model, source.normalize) if source.normalize else model


def _require_possible(source: Source) -> None:
    """Refuse inputs that cannot be, with every dimension at its most.

    Raises:
        UsageError: as it says.
    """
    require_consistent(source.dimensions, source.inputs)
    for spec in source.inputs:
        require_possible(spec)
    for spec in numbered(source.inputs, {each.name: each.most for each in source.dimensions}):
        require_possible(spec)


def _with_numbers(source: Source) -> tuple[InputSpec, ...]:
    """The inputs with numbers in the place of those names that are no more than that."""
    fixed = {each.name: each.usual for each in source.dimensions if each.least == each.most}
    return numbered(source.inputs, fixed)


def _open_sizes(source: Source) -> OpenSizes | None:
    """The open dimensions, with random inputs of each choice of their sizes that is of use; None
    where there are none."""
    dimensions = [each for each in source.dimensions if each.least < each.most]
    if not dimensions:
        return None
    specs = _with_numbers(source)
    taken = {size for spec in specs for size in spec.shape if isinstance(size, int)}

    def point(sizes: Mapping[str, int]) -> Point:
        return Point(spelled(sizes), *random_arguments(numbered(specs, sizes), source.seed))

    return OpenSizes(
        dimensions=tuple(dimensions),
        inputs=specs,
        points=tuple(map(point, points(dimensions))),
        captures=tuple(map(point, capture_sizes(dimensions, taken))),
    )


def _dynamic_shapes(model: torch.nn.Module, sizes: OpenSizes) -> Any:
    """What torch.export takes: by the names of forward's parameters, where it tells them."""
    made = {
        each.name: torch.export.Dim(each.name, min=each.least, max=each.most)
        for each in sizes.dimensions
    }

    def axes(spec: InputSpec) -> dict[int, Any]:
        return {axis: made[str(size)] for axis, size in enumerate(spec.shape) if size in made}

    positional, named = sizes.arranged
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return tuple(map(axes, positional))  # a forward written in C doesn't tell; capture will
    bound = signature.bind(
        *map(axes, positional), **{name: axes(spec) for name, spec in named.items()}
    )
    for name in bound.arguments:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            raise LoadError(
                "This model cannot have open sizes",
                f"Its forward takes '**{name}', and torch.export does not go together with that",
                "Name each of these inputs among forward's parameters, or give sizes as numbers",
            )
    return dict(bound.arguments)


def _in_library(library: str, name: str, source: Source) -> _Found:
    thing = _thing(source)
    try:
        package: Any = importlib.import_module(library)
        if library == "torchvision":
            package = importlib.import_module("torchvision.models")
    except ModuleNotFoundError as error:
        raise LoadError(
            thing,
            f"{error.name} is not installed",  # the library, or something that it needs
            f"Install it with 'pip install {library}'",
        ) from error
    except Exception as error:  # e.g. compiled for another version of torch
        raise LoadError(
            thing,
            f"Importing {library} failed with {describe(error)}",
            f"Install {library}, and what it imports, in versions made for torch "
            f"{torch.__version__}",
        ) from error
    make, size = (_torchvision if library == "torchvision" else _timm)(package, name, source)
    with _user_code(source), _seeded(source.seed):
        model = make()
    shape = (1, *size(model))
    return _Found(
        name,
        _require_module(model, source),
        lambda: random_arguments((InputSpec(None, shape),), source.seed),
    )


Maker = tuple[Callable[[], Any], Callable[[Any], tuple[int, ...]]]
"""What builds a library's model, and what tells the channels, height and width it was made for."""


def _torchvision(models: Any, name: str, source: Source) -> Maker:
    _require_listed(name.lower(), models.list_models(), "torchvision", source)
    options: dict[str, Any] = {"weights": None}
    # Segmentation and detection models download a trained backbone unless told not to.
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    side = 299 if name.lower() == "inception_v3" else 224
    return lambda: models.get_model(name, **options), lambda _model: (3, side, side)


def _timm(timm: Any, name: str, source: Source) -> Maker:
    if not timm.is_model(name):
        _require_listed(name, timm.list_models(), "timm", source)

    def input_size(model: Any) -> tuple[int, ...]:
        configuration = getattr(model, "default_cfg", None) or {}
        return tuple(configuration.get("input_size") or (3, 224, 224))

    return lambda: timm.create_model(name, pretrained=False), input_size


def _require_listed(name: str, names: Sequence[str], library: str, source: Source) -> None:
    if name in names:
        return
    close = get_close_matches(name, names, n=3)
    listing = (
        "torchvision.models.list_models()" if library == "torchvision" else "timm.list_models()"
    )
    raise LoadError(
        _thing(source),
        f"{library} has no model '{name}'",
        f"Did you mean {' or '.join(close)}?" if close else f"{listing} lists them",
    )


def _in_code(source: Source) -> _Found:
    target, colon, name = source.text.rpartition(":")
    if not colon or not target or not name:
        file = source.text.rstrip(":")
        raise UsageError(
            f"The source '{source.text}' cannot be read",
            "It does not name both a file or module and a callable in it",
            f"Add the callable, like '{file}:build'" if file.endswith(".py") else SOURCE_KINDS,
        )
    if target.endswith(".py") or "/" in target or "\\" in target:
        path = Path(target)
        module = _import_file(path, source)
        stem = path.resolve().parent.name if path.stem == "__init__" else path.stem
    else:
        module = _import_dotted(target, source)
        stem = target.rpartition(".")[2]
    return _Found(
        stem if name in ANONYMOUS_CALLABLES else name,
        _build(module, name, source),
        lambda: _own_example_arguments(module, source),
    )


def _import_file(path: Path, source: Source) -> ModuleType:
    """Import a file: as part of its package where its folder is one, else on its own."""
    require_file(path, _thing(source))
    if path.suffix != ".py":
        raise LoadError(
            _thing(source),
            f"'{path}' is not a Python file",
            "Name the .py file that builds the model; weights are passed with --weights",
        )
    path = path.resolve()
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    parts = path.relative_to(root).with_suffix("").parts
    _put_first_on_path(root)
    if len(parts) == 1 or any("." in part for part in parts):  # a dot would end a module's name
        with _user_code(source), _seeded(source.seed):
            return _execute(path)
    package = sys.modules.get(parts[0])
    folders = [Path(folder).resolve() for folder in getattr(package, "__path__", ())]
    if package is not None and root / parts[0] not in folders:
        raise LoadError(
            _thing(source),
            f"Another module named '{parts[0]}' is imported already",
            f"Rename the folder {_shown(root / parts[0])}, or load it in a process of its own",
        )
    dotted = ".".join(parts if parts[-1] != "__init__" else parts[:-1])
    with _user_code(source), _seeded(source.seed):
        return importlib.import_module(dotted)


def _execute(path: Path) -> ModuleType:
    """Run a file as a module, under a name that no installed module and no other file has."""
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = re.sub(r"\W", "_", f"{path.stem}_{digest}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a .py file there always is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_dotted(dotted: str, source: Source) -> ModuleType:
    if not all(dotted.split(".")):
        raise UsageError(
            f"The source '{source.text}' cannot be read",
            f"'{dotted}' is not the full name of a module",
            SOURCE_KINDS,
        )
    _put_first_on_path(Path.cwd())
    with _user_code(source), _seeded(source.seed):
        try:
            return importlib.import_module(dotted)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{dotted}.".startswith(f"{error.name}."):
                raise  # the module is there; something that it imports is not
            raise LoadError(
                _thing(source),
                f"There is no module '{error.name}' in the current folder or on Python's path",
                "Check the name, or run optfuse in the folder that holds it",
            ) from error


def _put_first_on_path(folder: Path) -> None:
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # the file may be younger than Python's listing of the folder


def _build(module: ModuleType, name: str, source: Source) -> torch.nn.Module:
    """The model that a module's attribute is or, called without arguments, gives."""
    with _user_code(source):
        if not hasattr(module, name):
            raise _no_such_callable(module, name, source)
        builder = getattr(module, name)
    if isinstance(builder, torch.nn.Module):
        return builder
    if not callable(builder):
        raise LoadError(
            _thing(source),
            f"'{name}' is {_kind_of(builder)}, which cannot be called",
            "Name a function or class without arguments that gives the model",
        )
    _require_no_arguments(builder, name, source)
    with _user_code(source), _seeded(source.seed):
        model = builder()
    return _require_module(model, source)


def _no_such_callable(module: ModuleType, name: str, source: Source) -> LoadError:
    names = [
        public
        for public, value in vars(module).items()
        if not public.startswith("_") and public != "example_inputs"
        if isinstance(value, torch.nn.Module)
        or (callable(value) and getattr(value, "__module__", None) == module.__name__)
    ]
    if not names:
        return LoadError(
            _thing(source),
            f"It has no '{name}', nor any other callable",
            "Add a function without arguments that returns the model",
        )
    close = get_close_matches(name, names, n=1)
    return LoadError(
        _thing(source),
        f"It has no '{name}'; its callables are {first_few(names)}",
        f"Did you mean '{close[0]}'?" if close else "Choose one of them",
    )


def _require_no_arguments(builder: Callable[..., Any], name: str, source: Source) -> None:
    try:
        inspect.signature(builder).bind()
    except ValueError:
        return  # a callable written in C may not tell
    except TypeError as error:
        raise LoadError(
            _thing(source),
            f"'{name}' cannot be called without arguments: {error}",
            "Add a function without arguments that calls it with yours",
        ) from error


def _require_module(model: Any, source: Source) -> torch.nn.Module:
    if isinstance(model, torch.nn.Module):
        return model
    raise LoadError(
        _thing(source),
        f"It gave {_kind_of(model)} where a torch.nn.Module is needed",
        "Return the model itself",
    )


def _own_example_arguments(module: ModuleType, source: Source) -> Arguments:
    thing = f"There are no inputs for '{source.text}'"
    function = getattr(module, "example_inputs", None)
    if not callable(function):
        raise LoadError(
            thing,
            "No --input is given and the source has no function example_inputs()",
            "Pass --input SHAPE for every input of the model, like --input 1x3x224x224",
        )
    next_step = "Correct example_inputs(), or pass --input SHAPE for every input of the model"
    with _user_code(source, thing, next_step), _seeded(source.seed):
        value = function()
    if isinstance(value, torch.Tensor):
        return (value,), {}
    if isinstance(value, tuple):
        return tuple(value), {}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return (), dict(value)
    raise LoadError(
        thing,
        f"example_inputs() gave {_kind_of(value)}, which is neither a tuple of arguments, a dict "
        "of named ones nor a tensor",
        next_step,
    )


def _require_accepted(model: torch.nn.Module, arguments: Arguments, source: Source) -> None:
    """Refuse inputs that `forward` doesn't have the parameters for."""
    positional, named = arguments
    if getattr(model.forward, "__name__", "") == "_forward_unimplemented":
        raise LoadError(
            f"The model of '{source.text}' cannot run",
            f"Its class '{type(model).__name__}' has no forward",
            "Name a model that can be called",
        )
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # a forward written in C doesn't tell; capture will
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        given = [f"{len(positional)} unnamed"] * bool(positional) + list(named)
        origin = "--input" if source.inputs else "example_inputs()"
        raise LoadError(
            f"The inputs from {origin} are not those of '{source.text}'",
            f"Its forward takes ({', '.join(signature.parameters)}) and is given "
            f"({', '.join(given)}): {error}",
            "Give one input for every parameter without a default, unnamed ones in order",
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every generator that initial weights come from, and put the global states back."""
    numpy_state, python_state = numpy.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        numpy.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            numpy.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def _user_code(source: Source, thing: str = "", next_step: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises into a LoadError; Ctrl-C stays Ctrl-C."""
    try:
        yield
    except (KeyboardInterrupt, LoadError):
        raise
    except BaseException as error:  # sys.exit() at the end of a script is no reason to vanish
        if isinstance(error, ModuleNotFoundError) and error.name:
            next_step = f"Install what provides '{error.name}', or correct the import"
        raise LoadError(
            thing or _thing(source),
            _cause(error),
            next_step or "Correct that, or pass --debug to see the traceback",
        ) from error


def _cause(error: BaseException) -> str:
    """What was raised, and the deepest line of the user's own code that it came through."""
    what = describe(error)
    if isinstance(error, SystemExit):
        what = f"It called sys.exit({error.code!r})"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({_shown(error.filename)}:{error.lineno})"
    places = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename != __file__
    ]
    own = [place for place in places if not _is_installed(place[0])] or places
    return f"{what} ({_shown(own[-1][0])}:{own[-1][1]})" if own else what


def _is_installed(filename: str) -> bool:
    """Whether a file belongs to Python or to an installed package rather than to the user."""
    parts = Path(filename).parts
    return (
        filename.startswith(("<frozen", sysconfig.get_paths()["stdlib"]))
        or "site-packages" in parts
        or "dist-packages" in parts
    )


def _shown(path: str | Path) -> str:
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _thing(source: Source) -> str:
    return f"The model '{source.text}' cannot be loaded"


def _kind_of(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class '{value.__name__}' itself"
    return f"a value of type '{type(value).__name__}'"
