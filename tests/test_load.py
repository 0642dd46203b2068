"""Loading a source: every kind of it, its inputs, and everything that can be wrong with it."""

from __future__ import annotations

import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from optfuse.errors import LoadError, UsageError
from optfuse.inputs import DTYPES, parse_input
from optfuse.load import SOURCE_KINDS, load
from optfuse.stages import InputSpec, Source

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=None):
        y = self.dropout(self.linear(x))
        return y if scale is None else y * scale

def build():
    return Net()

def example_inputs():
    return (torch.randn(4, 3),)
"""


@pytest.fixture(autouse=True)
def _imports_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put `sys.path` and `sys.modules` back: loading changes both, by design."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in sys.modules.keys() - before.keys():
        if not name.startswith(("torch.", "numpy.", "safetensors")):
            del sys.modules[name]


def write(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def load_code(tmp_path: Path, code: str, name: str = "build", **options: Any) -> Any:
    """Load a callable from a file of its own with this code."""
    return load(Source(f"{write(tmp_path / 'net.py', code)}:{name}", **options))


def refused(tmp_path: Path, code: str, name: str = "build", **options: Any) -> LoadError:
    """The error that loading this code ends with."""
    with pytest.raises(LoadError) as error:
        load_code(tmp_path, code, name, **options)
    return error.value


# ---------------------------------------------------------------- where the code lies


def test_file_on_its_own(tmp_path: Path) -> None:
    loaded = load_code(tmp_path, NETWORK)
    assert loaded.name == "net"
    assert type(loaded.module).__name__ == "Net"
    assert not any(module.training for module in loaded.module.modules())
    assert [tensor.shape for tensor in loaded.example_args] == [(4, 3)]
    assert loaded.example_kwargs == {}
    assert loaded.dynamic_shapes is None


def test_file_imports_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_net.py", NETWORK)
    loaded = load_code(tmp_path, "from neighbour_of_net import Net, build, example_inputs")
    assert type(loaded.module).__module__ == "neighbour_of_net"


def test_file_does_not_shadow_an_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    path = write(tmp_path / "colorsys.py", NETWORK)
    loaded = load(Source(f"{path}:build"))
    assert loaded.name == "colorsys"
    assert type(loaded.module).__module__ != "colorsys"
    assert "colorsys" not in sys.modules


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    first = load(Source(f"{write(tmp_path / 'a' / 'net.py', NETWORK)}:build")).module
    second = load(Source(f"{write(tmp_path / 'b' / 'net.py', NETWORK)}:build")).module
    assert type(first) is not type(second)
    assert type(first).__module__ in sys.modules
    assert type(first).__module__ != type(second).__module__


def test_file_in_a_package_is_imported_as_part_of_it(tmp_path: Path) -> None:
    for folder in ("zoo_of_nets", "zoo_of_nets/small"):
        write(tmp_path / folder / "__init__.py", "")
    write(tmp_path / "zoo_of_nets/blocks.py", NETWORK)
    path = write(tmp_path / "zoo_of_nets/small/tiny.py", "from ..blocks import *\n")
    loaded = load(Source(f"{path}:build"))
    assert loaded.name == "tiny"
    assert type(loaded.module).__module__ == "zoo_of_nets.blocks"
    assert "zoo_of_nets.small.tiny" in sys.modules
    assert sys.path[0] == str(tmp_path)


def test_init_file_is_its_package(tmp_path: Path) -> None:
    path = write(tmp_path / "net_in_init" / "__init__.py", NETWORK)
    loaded = load(Source(f"{path}:build"))
    assert loaded.name == "net_in_init"
    assert type(loaded.module).__module__ == "net_in_init"


def test_file_with_a_dot_in_its_name(tmp_path: Path) -> None:
    write(tmp_path / "dotted_zoo" / "__init__.py", "")
    path = write(tmp_path / "dotted_zoo" / "net.v2.py", NETWORK)
    assert load(Source(f"{path}:build")).name == "net.v2"


def test_package_of_the_same_name_elsewhere_is_an_error(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "twin_zoo" / "__init__.py", "")
        write(tmp_path / folder / "twin_zoo" / "net.py", NETWORK)
    load(Source(f"{tmp_path}/one/twin_zoo/net.py:build"))
    with pytest.raises(LoadError) as error:
        load(Source(f"{tmp_path}/two/twin_zoo/net.py:build"))
    assert error.value.cause == "Another module named 'twin_zoo' is imported already"
    assert error.value.next_step == (
        f"Rename the folder {tmp_path / 'two' / 'twin_zoo'}, or load it in a process of its own"
    )


def test_dotted_module_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dotted_nets" / "__init__.py", "")
    write(tmp_path / "dotted_nets" / "tiny.py", NETWORK)
    monkeypatch.chdir(tmp_path)
    loaded = load(Source("dotted_nets.tiny:build"))
    assert loaded.name == "tiny"
    assert type(loaded.module).__module__ == "dotted_nets.tiny"


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "net.py", NETWORK)
    monkeypatch.chdir(tmp_path)
    assert load(Source("net.py:build")).name == "net"
    # Absolute, so that what the model imports later is found from any folder.
    assert sys.path[0] == str(tmp_path)


# ---------------------------------------------------------------- what the callable is


@pytest.mark.parametrize(
    ("name", "expected"), [("build", "net"), ("get_model", "net"), ("model", "net"), ("Net", "Net")]
)
def test_function_class_and_instance(tmp_path: Path, name: str, expected: str) -> None:
    code = NETWORK + "\nmodel = Net()\nget_model = lambda: Net()\n"
    loaded = load_code(tmp_path, code, name)
    assert type(loaded.module).__name__ == "Net"
    assert loaded.name == expected
    assert not loaded.module.training


def test_callable_with_defaults_and_options(tmp_path: Path) -> None:
    code = NETWORK + "\ndef wide(width=7, *, bias=True, **options):\n    return Net()\n"
    assert load_code(tmp_path, code, "wide").name == "wide"


def test_parameters_are_untouched(tmp_path: Path) -> None:
    code = NETWORK + "\nmodel = Net()\nmodel.linear.weight.requires_grad_(False)\n"
    code += "before = {k: (v, v._version, v.detach().clone()) for k, v in "
    code += "model.state_dict(keep_vars=True).items()}\n"
    loaded = load_code(tmp_path, code, "model")
    before = sys.modules[type(loaded.module).__module__].before
    after = loaded.module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for key, (same, version, values) in before.items():
        assert after[key] is same
        assert after[key]._version == version
        assert torch.equal(after[key], values)
    assert not after["linear.weight"].requires_grad
    assert after["linear.bias"].requires_grad


# ---------------------------------------------------------------- seeds


def weights_of(tmp_path: Path, code: str, name: str, seed: int) -> torch.Tensor:
    weight: torch.Tensor = load_code(tmp_path, code, name, seed=seed).module.linear.weight
    return weight


@pytest.mark.parametrize("name", ["build", "model"])
def test_seed_decides_the_weights(tmp_path: Path, name: str) -> None:
    code = NETWORK + "\nmodel = Net()\n"
    first = weights_of(tmp_path, code, name, 5)
    torch.manual_seed(99)
    assert torch.equal(first, weights_of(tmp_path, code, name, 5))
    assert not torch.equal(first, weights_of(tmp_path, code, name, 6))


def test_seed_decides_what_numpy_and_random_give(tmp_path: Path) -> None:
    code = NETWORK + textwrap.dedent("""
        import random
        import numpy

        def drawn():
            net = Net()
            net.drawn = (numpy.random.rand(), random.random())
            return net
        """)
    first, again, other = (
        load_code(tmp_path, code, "drawn", seed=seed).module.drawn for seed in (5, 5, 6)
    )
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_global_random_states_are_as_before(tmp_path: Path) -> None:
    torch_state = torch.random.get_rng_state()
    numpy_state, python_state = numpy.random.get_state(legacy=False), random.getstate()
    load_code(tmp_path, NETWORK)
    refused(tmp_path, "import numpy\nnumpy.random.rand()\nraise ValueError('late')")
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    after = numpy.random.get_state(legacy=False)
    assert numpy.array_equal(after["state"]["key"], numpy_state["state"]["key"])
    assert after["state"]["pos"] == numpy_state["state"]["pos"]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_impossible_seed_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(UsageError) as error:
        load_code(tmp_path, NETWORK, seed=seed)
    assert error.value.thing == f"The seed {seed} cannot be used"
    assert error.value.cause == "A seed lies between 0 and 2^63 - 1"


def test_largest_seed_is_taken(tmp_path: Path) -> None:
    assert load_code(tmp_path, NETWORK, seed=2**63 - 1).name == "net"


# ---------------------------------------------------------------- the source's own inputs


@pytest.mark.parametrize(
    ("body", "positional", "named"),
    [
        ("torch.ones(2, 3)", [(2, 3)], {}),
        ("(torch.ones(2, 3),)", [(2, 3)], {}),
        ("(torch.ones(2, 3), torch.ones(2))", [(2, 3), (2,)], {}),
        ("{'x': torch.ones(5, 3), 'scale': torch.ones(2)}", [], {"x": (5, 3), "scale": (2,)}),
    ],
)
def test_example_inputs(
    tmp_path: Path, body: str, positional: list[Any], named: dict[str, Any]
) -> None:
    loaded = load_code(tmp_path, f"{NETWORK}\ndef example_inputs():\n    return {body}\n")
    assert [tensor.shape for tensor in loaded.example_args] == positional
    assert {key: tensor.shape for key, tensor in loaded.example_kwargs.items()} == named
    loaded.module(*loaded.example_args, **loaded.example_kwargs)


def test_example_inputs_may_nest(tmp_path: Path) -> None:
    code = """
        import torch
        from torch import nn
        class Net(nn.Module):
            def forward(self, batch, pair):
                return batch["x"] * pair[0] + pair[1]
        def example_inputs():
            return {"x": torch.full((2,), 3.0)}, (torch.full((2,), 5.0), torch.full((2,), 7.0))
    """
    loaded = load_code(tmp_path, code, "Net")
    # 3 * 5 + 7, exact in float32
    assert loaded.module(*loaded.example_args).tolist() == [22.0, 22.0]


def test_input_wins_over_example_inputs(tmp_path: Path) -> None:
    code = NETWORK + "\ndef example_inputs():\n    raise RuntimeError('not asked for')\n"
    loaded = load_code(tmp_path, code, inputs=(InputSpec(None, (9, 3)),))
    assert loaded.example_args[0].shape == (9, 3)


def test_missing_example_inputs_asks_for_input(tmp_path: Path) -> None:
    error = refused(tmp_path, "from torch import nn\nbuild = nn.ReLU\nexample_inputs = 3\n")
    assert error.thing == f"There are no inputs for '{tmp_path / 'net.py'}:build'"
    assert error.cause == "No --input is given and the source has no function example_inputs()"
    assert error.next_step == (
        "Pass --input SHAPE for every input of the model, like --input 1x3x224x224"
    )


def test_raising_example_inputs(tmp_path: Path) -> None:
    error = refused(tmp_path, NETWORK + "\ndef example_inputs():\n    return 1 // 0\n")
    line = NETWORK.count("\n") + 3
    assert error.thing == f"There are no inputs for '{tmp_path / 'net.py'}:build'"
    assert error.cause == (
        f"ZeroDivisionError: integer division or modulo by zero ({tmp_path / 'net.py'}:{line})"
    )
    assert error.next_step == (
        "Correct example_inputs(), or pass --input SHAPE for every input of the model"
    )


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("[torch.ones(2, 3)]", "a value of type 'list'"),
        ("None", "None"),
        ("{3: torch.ones(2)}", "a value of type 'dict'"),
    ],
)
def test_other_example_inputs_are_refused(tmp_path: Path, body: str, kind: str) -> None:
    error = refused(tmp_path, f"{NETWORK}\ndef example_inputs():\n    return {body}\n")
    assert error.cause == (
        f"example_inputs() gave {kind}, which is neither a tuple of arguments, a dict of named "
        "ones nor a tensor"
    )


# ---------------------------------------------------------------- --input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x3x224x224", InputSpec(None, (1, 3, 224, 224), "float32")),
        ("7", InputSpec(None, (7,), "float32")),
        ("scalar", InputSpec(None, (), "float32")),
        ("scale=scalar:float64", InputSpec("scale", (), "float64")),
        ("tokens=1x128:int64", InputSpec("tokens", (1, 128), "int64")),
        ("x=2x2", InputSpec("x", (2, 2), "float32")),
        ("1099511627776", InputSpec(None, (2**40,), "float32")),
        *((f"2x3:{name}", InputSpec(None, (2, 3), name)) for name in DTYPES),
    ],
)
def test_parse_input(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1x", "x3", "1xx3", "1,3", "1X3", "1 x 3", "1.5x2", "+1x3", "1x3\n", "\u0661x3"),
        *("=1x3", "a b=3", "a=b=3", "x=", "()", "N*2x3"),
    ],
)
def test_unreadable_input_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_input(text)
    assert error.value.thing == f"The input '{text}' cannot be read"
    assert error.value.cause == (
        "An input is [NAME=]SHAPE[:DTYPE], and a shape is sizes joined by 'x', or 'scalar'"
    )
    assert error.value.next_step == "Write it like 1x3x224x224, or like tokens=1x128:int64"


@pytest.mark.parametrize(
    ("dtype", "next_step"),
    [
        ("float23", "Did you mean 'float32'?"),
        ("quaternion", "Choose one of them"),
        ("", "Choose one of them"),
        ("int8:int8", "Did you mean 'int8'?"),
    ],
)
def test_unknown_dtype_is_refused(dtype: str, next_step: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_input(f"1x3:{dtype}")
    assert error.value.thing == f"The input '1x3:{dtype}' cannot be made"
    assert error.value.cause == f"There is no dtype '{dtype}' among {', '.join(DTYPES)}"
    assert error.value.next_step == next_step


@pytest.mark.parametrize(("text", "size"), [("1x0x3", 0), ("0", 0), ("4x-2", -2)])
def test_size_that_is_not_positive_is_refused(text: str, size: int) -> None:
    with pytest.raises(UsageError) as error:
        parse_input(text)
    assert error.value.thing == f"The input '{text}' cannot be made"
    assert error.value.cause == f"Its size {size} is not positive"
    assert error.value.next_step == "Give the real sizes that the model shall be optimized for"


@pytest.mark.parametrize("text", ["1048576x1048577", "1099511627777:bool", "9" * 9000])
def test_absurd_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_input(text)
    assert error.value.cause == "It has more than 2^40 elements"
    assert error.value.next_step == "Check the shape for a size too many"


def test_specification_made_in_code_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        load_code(tmp_path, NETWORK, inputs=(InputSpec(None, (1, 3), "float31"),))
    assert error.value.thing == "The input '1x3' cannot be made"


@pytest.mark.parametrize("name", DTYPES)
def test_random_inputs_have_the_dtype_and_the_values(tmp_path: Path, name: str) -> None:
    inputs = (InputSpec(None, (50, 40), name),)
    (first,) = load_code(tmp_path, NETWORK, inputs=inputs, seed=3).example_args
    (again,) = load_code(tmp_path, NETWORK, inputs=inputs, seed=3).example_args
    (other,) = load_code(tmp_path, NETWORK, inputs=inputs, seed=4).example_args
    assert first.dtype == getattr(torch, name)
    assert first.shape == (50, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if first.dtype.is_floating_point:
        # Of 2000 standard normal values the mean's deviation is 0.022 and the deviation's 0.016:
        # six times that never happens with these seeds.
        assert abs(first.double().mean().item()) < 0.14
        assert abs(first.double().std().item() - 1) < 0.1
    else:
        assert set(first.int().flatten().tolist()) == {0, 1}


def test_named_inputs_become_keywords_and_unnamed_ones_stay_in_order(tmp_path: Path) -> None:
    code = """
        from torch import nn
        class Net(nn.Module):
            def forward(self, a, b, *, c):
                return a
    """
    specs = tuple(parse_input(text) for text in ("c=3", "1x2", "scalar:int32"))
    loaded = load_code(tmp_path, code, "Net", inputs=specs)
    assert [tuple(tensor.shape) for tensor in loaded.example_args] == [(1, 2), ()]
    assert loaded.example_args[1].dtype == torch.int32
    assert {key: tuple(t.shape) for key, t in loaded.example_kwargs.items()} == {"c": (3,)}


@pytest.mark.parametrize(
    ("texts", "given", "reason"),
    [
        (("z=1x3",), "z", "missing a required argument: 'x'"),
        (("1x3", "z=2"), "1 unnamed, z", "got an unexpected keyword argument 'z'"),
        (("1x3", "2", "2"), "3 unnamed", "too many positional arguments"),
        (("scale=2",), "scale", "missing a required argument: 'x'"),
        (("1x3", "x=1x3"), "1 unnamed, x", "multiple values for argument 'x'"),
    ],
)
def test_inputs_that_forward_does_not_take(
    tmp_path: Path, texts: tuple[str, ...], given: str, reason: str
) -> None:
    error = refused(tmp_path, NETWORK, inputs=tuple(parse_input(text) for text in texts))
    source = f"{tmp_path / 'net.py'}:build"
    assert error.thing == f"The inputs from --input are not those of '{source}'"
    assert error.cause == f"Its forward takes (x, scale) and is given ({given}): {reason}"
    assert error.next_step == (
        "Give one input for every parameter without a default, unnamed ones in order"
    )


def test_example_inputs_that_forward_does_not_take(tmp_path: Path) -> None:
    error = refused(tmp_path, f"{NETWORK}\ndef example_inputs():\n    return ()\n")
    assert error.thing.startswith("The inputs from example_inputs() are not those of ")
    assert error.cause == (
        "Its forward takes (x, scale) and is given (): missing a required argument: 'x'"
    )


def test_input_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        load_code(tmp_path, NETWORK, inputs=(parse_input("x=1x3"), parse_input("x=2x3")))
    assert error.value.thing == "The input 'x' cannot be used"
    assert error.value.cause == "It is given more than once"


def test_input_larger_than_memory_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 4 bytes\nand a stack")

    monkeypatch.setattr(torch, "randn", refuse)  # really asking for terabytes may end the machine
    error = refused(tmp_path, NETWORK, inputs=(InputSpec(None, (1, 3)),))
    assert error.thing == "An input of shape 1x3:float32 cannot be made"
    assert error.cause == "RuntimeError: can't allocate memory: you tried to allocate 4 bytes"
    assert error.next_step == "Choose a smaller shape"


# ---------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("text", "next_step"),
    [
        ("models/googlenet.py", "Add the callable, like 'models/googlenet.py:build'"),
        ("models/googlenet.py:", "Add the callable, like 'models/googlenet.py:build'"),
        (":build", SOURCE_KINDS),
        ("resnet18", SOURCE_KINDS),
        ("timm:", SOURCE_KINDS),
        ("", SOURCE_KINDS),
    ],
)
def test_source_without_a_callable_is_refused(text: str, next_step: str) -> None:
    with pytest.raises(UsageError) as error:
        load(Source(text))
    assert error.value.thing == f"The source '{text}' cannot be read"
    assert error.value.cause == "It does not name both a file or module and a callable in it"
    assert error.value.next_step == next_step


@pytest.mark.parametrize("text", ["..net:build", "a..b:build"])
def test_half_a_module_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not the full name of a module"):
        load(Source(text))


def test_missing_file_offers_the_closest_sibling(tmp_path: Path) -> None:
    write(tmp_path / "googlenet.py", NETWORK)
    for typed in ("goglenet.py", "googlenet"):
        with pytest.raises(LoadError) as error:
            load(Source(f"{tmp_path / typed}:build"))
        assert error.value.thing == f"The model '{tmp_path / typed}:build' cannot be loaded"
        assert error.value.cause == "There is no such file"
        assert error.value.next_step == f"Did you mean '{tmp_path / 'googlenet.py'}'?"


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        load(Source(f"{tmp_path}:build"))
    assert error.value.cause == "It is a folder"


def test_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "net.onnx", "")
    with pytest.raises(LoadError) as error:
        load(Source(f"{path}:build"))
    assert error.value.cause == f"'{path}' is not a Python file"
    assert error.value.next_step == (
        "Name the .py file that builds the model; weights are passed with --weights"
    )


@pytest.mark.parametrize(
    ("dotted", "missing"),
    [("no_such_zoo.tiny", "no_such_zoo"), ("half_zoo.tiny", "half_zoo.tiny")],
)
def test_missing_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dotted: str, missing: str
) -> None:
    write(tmp_path / "half_zoo" / "__init__.py", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError) as error:
        load(Source(f"{dotted}:build"))
    assert error.value.cause == (
        f"There is no module '{missing}' in the current folder or on Python's path"
    )
    assert error.value.next_step == "Check the name, or run optfuse in the folder that holds it"


def test_module_that_misses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "needy_net.py", "\nimport no_such_package\n")
    monkeypatch.chdir(tmp_path)
    for text in ("needy_net:build", "needy_net.py:build"):
        with pytest.raises(LoadError) as error:
            load(Source(text))
        assert error.value.cause == (
            "ModuleNotFoundError: No module named 'no_such_package' (needy_net.py:2)"
        )
        assert error.value.next_step == (
            "Install what provides 'no_such_package', or correct the import"
        )


def test_missing_callable_lists_those_there_are(tmp_path: Path) -> None:
    code = NETWORK + "\nfrom os.path import join\nmodel = Net()\ndef _hidden():\n    pass\n"
    error = refused(tmp_path, code, "biuld")
    assert error.cause == "It has no 'biuld'; its callables are Net, build, model"
    assert error.next_step == "Did you mean 'build'?"
    assert refused(tmp_path, code, "zzz").next_step == "Choose one of them"


def test_module_without_any_callable(tmp_path: Path) -> None:
    error = refused(tmp_path, "answer = 42\n")
    assert error.cause == "It has no 'build', nor any other callable"
    assert error.next_step == "Add a function without arguments that returns the model"


# ---------------------------------------------------------------- code that fails


def test_raising_callable_names_the_line_and_keeps_the_exception(tmp_path: Path) -> None:
    error = refused(
        tmp_path,
        """
        import torch
        def inner():
            return torch.ones(2, 3) @ torch.ones(2, 3)
        def build():
            return inner()
        """,
    )
    assert error.thing == f"The model '{tmp_path / 'net.py'}:build' cannot be loaded"
    assert error.cause.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert error.cause.endswith(f"({tmp_path / 'net.py'}:4)")
    assert error.next_step == "Correct that, or pass --debug to see the traceback"
    assert isinstance(error.__cause__, RuntimeError)


def test_line_is_the_users_own_when_a_library_raises(tmp_path: Path) -> None:
    error = refused(tmp_path, "import json\ndef build():\n    return json.loads('[1,')\n")
    assert error.cause.startswith("JSONDecodeError: Expecting value")
    assert error.cause.endswith(f"({tmp_path / 'net.py'}:3)")


def test_message_of_many_lines_is_cut_to_one(tmp_path: Path) -> None:
    error = refused(tmp_path, "def build():\n    raise ValueError('first\\nsecond')\n")
    assert error.cause == f"ValueError: first ({tmp_path / 'net.py'}:2)"


def test_syntax_error_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "net.py", "import torch\n\ndef build(:\n    pass\n")
    with pytest.raises(LoadError) as error:
        load(Source("net.py:build"))
    assert error.value.cause == "SyntaxError: invalid syntax (net.py:3)"


@pytest.mark.parametrize("content", [b"x = '\x00'\n", b"x = '\xff'\n"])
def test_file_that_is_no_text_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.py"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="SyntaxError"):
        load(Source(f"{path}:build"))


def test_exit_while_importing_is_a_sentence(tmp_path: Path) -> None:
    before = set(sys.modules)  # other tests load files of their own in this process
    error = refused(tmp_path, "import sys\nsys.exit(3)\n")
    assert error.cause == f"It called sys.exit(3) ({tmp_path / 'net.py'}:2)"
    assert not any(name.startswith("net_") for name in sys.modules.keys() - before)


def test_exit_in_the_callable_is_a_sentence(tmp_path: Path) -> None:
    error = refused(tmp_path, "def build():\n    raise SystemExit('bye')\n")
    assert error.cause == f"It called sys.exit('bye') ({tmp_path / 'net.py'}:2)"


def test_any_base_exception_is_a_sentence(tmp_path: Path) -> None:
    code = "class Odd(BaseException):\n    pass\ndef build():\n    raise Odd\n"
    assert refused(tmp_path, code).cause == f"Odd ({tmp_path / 'net.py'}:4)"


@pytest.mark.parametrize(
    "code", ["raise KeyboardInterrupt\n", "def build():\n    raise KeyboardInterrupt\n"]
)
def test_interrupt_passes_through(tmp_path: Path, code: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_code(tmp_path, code)


def test_attribute_that_raises(tmp_path: Path) -> None:
    error = refused(tmp_path, "def __getattr__(name):\n    raise OSError('lazy ' + name)\n")
    assert error.cause == f"OSError: lazy build ({tmp_path / 'net.py'}:2)"


def test_eval_that_raises(tmp_path: Path) -> None:
    code = (
        NETWORK + "\nclass Stubborn(Net):\n    def train(self, mode=True):\n        assert mode\n"
    )
    error = refused(tmp_path, code, "Stubborn")
    assert error.cause == f"AssertionError ({tmp_path / 'net.py'}:{NETWORK.count(chr(10)) + 4})"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("None", "None"),
        ("(Net(), 3)", "a value of type 'tuple'"),
        ("Net", "the class 'Net' itself"),
        ("Net().state_dict()", "a value of type 'OrderedDict'"),
    ],
)
def test_what_is_no_module_is_refused(tmp_path: Path, value: str, kind: str) -> None:
    error = refused(tmp_path, f"{NETWORK}\ndef build():\n    return {value}\n")
    assert error.cause == f"It gave {kind} where a torch.nn.Module is needed"
    assert error.next_step == "Return the model itself"


def test_attribute_that_cannot_be_called(tmp_path: Path) -> None:
    error = refused(tmp_path, "build = 'resnet'\n")
    assert error.cause == "'build' is a value of type 'str', which cannot be called"
    assert error.next_step == "Name a function or class without arguments that gives the model"


def test_callable_that_wants_arguments(tmp_path: Path) -> None:
    error = refused(tmp_path, "def build(classes, width=3):\n    pass\n")
    assert error.cause == (
        "'build' cannot be called without arguments: missing a required argument: 'classes'"
    )
    assert error.next_step == "Add a function without arguments that calls it with yours"


def test_model_without_forward(tmp_path: Path) -> None:
    error = refused(
        tmp_path,
        "from torch import nn\ndef build():\n    return nn.ModuleList([nn.ReLU()])\n",
        inputs=(InputSpec(None, (2,)),),
    )
    assert error.thing == f"The model of '{tmp_path / 'net.py'}:build' cannot run"
    assert error.cause == "Its class 'ModuleList' has no forward"
    assert error.next_step == "Name a model that can be called"


# ---------------------------------------------------------------- weights


def test_weights_replace_the_random_ones(tmp_path: Path) -> None:
    state = {"linear.weight": torch.full((2, 3), 0.25), "linear.bias": torch.tensor([3.0, -5.0])}
    torch.save(state, tmp_path / "weights.pt")
    loaded = load_code(tmp_path, NETWORK, weights=tmp_path / "weights.pt")
    # 0.25 * (1 + 2 + 4) + bias, exact in float32; a dropout that is not in eval mode would show.
    assert loaded.module(torch.tensor([[1.0, 2.0, 4.0]])).tolist() == [[4.75, -3.25]]


def test_trust_reaches_the_weights(tmp_path: Path) -> None:
    state = {
        "model": {"linear.weight": torch.full((2, 3), 0.25), "linear.bias": torch.ones(2)},
        "score": numpy.float64(0.5),
    }
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    error = refused(tmp_path, NETWORK, weights=path)
    assert "--trust, which runs code in the file" in error.next_step
    loaded = load_code(tmp_path, NETWORK, weights=path, trust=True)
    assert torch.equal(loaded.module.linear.weight, state["model"]["linear.weight"])


# ---------------------------------------------------------------- libraries


class Picture(nn.Module):
    """What the fake libraries build: one random parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[:, None, None]


class FakeTorchvision(ModuleType):
    """`torchvision.models` as far as it is used."""

    def __init__(self) -> None:
        super().__init__("torchvision.models")
        self.options: dict[str, Any] = {}

    def list_models(self) -> list[str]:
        return ["inception_v3", "lraspp_mobilenet", "resnet18"]

    def get_model_builder(self, name: str) -> Any:
        def classifier(*, weights: Any = None, **options: Any) -> nn.Module:
            self.options = {"weights": weights, **options}
            return Picture()

        def segmenter(*, weights: Any = None, weights_backbone: Any = "large") -> nn.Module:
            self.options = {"weights": weights, "weights_backbone": weights_backbone}
            return Picture()

        return segmenter if name.startswith("lraspp") else classifier

    def get_model(self, name: str, **options: Any) -> nn.Module:
        model: nn.Module = self.get_model_builder(name.lower())(**options)
        return model


class FakeTimm(ModuleType):
    """`timm` as far as it is used."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.options: dict[str, Any] = {}
        self.configuration: dict[str, Any] | None = {"input_size": (3, 160, 96)}

    def list_models(self) -> list[str]:
        return ["efficientnet_b0", "resnet18"]

    def is_model(self, name: str) -> bool:
        return name.partition(".")[0] in self.list_models()

    def create_model(self, name: str, **options: Any) -> nn.Module:
        self.options = options
        model = Picture()
        model.default_cfg = self.configuration  # type: ignore[assignment]
        return model


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> FakeTorchvision:
    models = FakeTorchvision()
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return models


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    package = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", package)
    return package


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 224), ("inception_v3", 299), ("ResNet18", 224)]
)
def test_torchvision_model(torchvision: FakeTorchvision, name: str, side: int) -> None:
    loaded = load(Source(f"torchvision:{name}", seed=4))
    assert loaded.name == name
    assert torchvision.options == {"weights": None}
    assert [tuple(tensor.shape) for tensor in loaded.example_args] == [(1, 3, side, side)]
    assert not loaded.module.training
    again, other = (load(Source(f"torchvision:{name}", seed=seed)).module for seed in (4, 5))
    assert torch.equal(loaded.module.weight, again.weight)  # type: ignore[arg-type]
    assert not torch.equal(loaded.module.weight, other.weight)  # type: ignore[arg-type]


def test_torchvision_backbone_is_not_downloaded(torchvision: FakeTorchvision) -> None:
    load(Source("torchvision:lraspp_mobilenet"))
    assert torchvision.options == {"weights": None, "weights_backbone": None}


def test_input_wins_over_the_default(torchvision: FakeTorchvision) -> None:
    loaded = load(Source("torchvision:resnet18", inputs=(InputSpec("x", (2, 3, 64, 64)),)))
    assert loaded.example_args == ()
    assert loaded.example_kwargs["x"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("name", ["resnet81", "zzz"])
def test_unknown_library_model(
    library: str, name: str, torchvision: FakeTorchvision, timm: FakeTimm
) -> None:
    with pytest.raises(LoadError) as error:
        load(Source(f"{library}:{name}"))
    assert error.value.thing == f"The model '{library}:{name}' cannot be loaded"
    assert error.value.cause == f"{library} has no model '{name}'"
    listing = {"torchvision": "torchvision.models.list_models()", "timm": "timm.list_models()"}
    assert error.value.next_step == (
        "Did you mean resnet18?" if name == "resnet81" else f"{listing[library]} lists them"
    )


@pytest.mark.parametrize(
    ("configuration", "shape"),
    [
        ({"input_size": (3, 160, 96)}, (1, 3, 160, 96)),
        ({"input_size": None}, (1, 3, 224, 224)),
        (None, (1, 3, 224, 224)),
    ],
)
def test_timm_model(timm: FakeTimm, configuration: Any, shape: tuple[int, ...]) -> None:
    timm.configuration = configuration
    loaded = load(Source("timm:resnet18.a1_in1k"))
    assert loaded.name == "resnet18.a1_in1k"
    assert timm.options == {"pretrained": False}
    assert [tuple(tensor.shape) for tensor in loaded.example_args] == [shape]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library_names_the_line_that_installs_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # what Python itself puts there to say "no"
    with pytest.raises(LoadError) as error:
        load(Source(f"{library}:resnet18"))
    assert error.value.cause == f"{library} is not installed"
    assert error.value.next_step == f"Install it with 'pip install {library}'"


def test_missing_package_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "timm.py", "import no_such_package\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError) as error:
        load(Source("timm:resnet18"))
    assert error.value.cause == "no_such_package is not installed"
    assert error.value.next_step == "Install it with 'pip install timm'"


def test_library_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "torchvision.py", "raise RuntimeError('operator nms does not exist')\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError) as error:
        load(Source("torchvision:resnet18"))
    assert error.value.cause == (
        "Importing torchvision failed with RuntimeError: operator nms does not exist"
    )
    assert error.value.next_step == (
        f"Install torchvision, and what it imports, in versions made for torch {torch.__version__}"
    )


def test_library_builder_that_raises(timm: FakeTimm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> None:
        raise ConnectionError("the hub is not reachable")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(LoadError, match="ConnectionError: the hub is not reachable"):
        load(Source("timm:resnet18"))
