"""The rules of the code's shape: who may import whom, and what every file must have."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optfuse.passes import ORDER, Pass, load

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "optfuse"

LEVELS = (
    ("__main__", "__init__"),
    ("cli",),
    ("pipeline", "bench", "diff"),
    ("isolated", "lower"),
    ("precision",),
    ("ablate", "roofline", "subjects", "gate", "trial"),
    (
        *("load", "capture", "optimize", "export", "measure", "diagnose", "compare"),
        *("explain", "report", "layers", "limits", "feeds"),
    ),
    (
        *("passes", "backends", "inputs", "normalize", "cost", "constraints", "onnx_dimensions"),
        *("samples", "recommend", "builder_findings"),
    ),
    ("weights", "branches", "dimensions"),
    (
        *("graph", "convolution", "folding", "lanes", "routing", "activations", "conv_act"),
        "float64",
        *("kernels", "sums", "onnx_cost", "fingerprint", "stats", "environment", "files", "memory"),
    ),
    ("stages",),
    ("errors", "version"),
)
"""From top to bottom. A file imports from lower levels, and inside its own package; a name stands
for the file or the folder."""

BASES = {"graph", "convolution", "activations"}
"""What others on its own level may build on, without a circle."""

ENGINES = {
    # What rounds to int8 is a part of ONNX Runtime.
    "onnxruntime": {
        "backends/onnx_runtime.py",
        "precision/calibration.py",
        "precision/int8.py",
    },
    "tensorrt": {"backends/nvinfer.py", "backends/tensorrt.py"},
    "tensorrt_rtx": {"backends/nvinfer.py", "backends/tensorrt_rtx.py"},
    "openvino": {"backends/openvino.py"},
}
"""Engine package -> the files that may import it, and those only inside functions."""

FRONT_ENDS = {"typer": {"cli"}, "rich": {"cli", "report/terminal.py"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=relative)


def unit(path: Path) -> str:
    """The name in `LEVELS` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    found = [number for number, names in enumerate(LEVELS) if name in names]
    assert found, (
        f"optfuse/{name} has no place in LEVELS: decide which files it may import from and which "
        "may import it, and add it there"
    )
    return found[0]


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Every module that a file imports, dotted, wherever in the file, with the statement."""
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(each.name, node) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            module = node.module or ""
            # `from optfuse import passes` takes in a module, `from optfuse.passes import Pass` not.
            if module == "optfuse":
                found += [(f"optfuse.{each.name}", node) for each in node.names]
            else:
                found.append((module, node))
    return found


def at_the_top(path: Path) -> set[ast.stmt]:
    """The statements of a file that run when it is imported."""
    found: set[ast.stmt] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            only_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not only_for_types:
                waiting.append(node)
                if isinstance(node, ast.stmt):
                    found.add(node)
    return found


def imported_at_the_top(path: Path) -> set[str]:
    lines = {node.lineno for node in at_the_top(path)}
    return {module.split(".")[0] for module, node in imports(path) if node.lineno in lines}


@every_file
def test_every_file_has_its_level(path: Path) -> None:
    assert level(unit(path)) >= 0


@every_file
def test_imports_point_down(path: Path) -> None:
    own = unit(path)
    for module, node in imports(path):
        if not module.startswith("optfuse."):
            continue
        other = module.split(".")[1]
        if other == "__version__" or other == own:
            continue
        here, there = level(own), level(other)
        where = f"{relative(path)}:{node.lineno} imports optfuse.{other}"
        assert here <= there, f"{where}, which stands above it"
        assert here < there or other in BASES, f"{where}, its sibling"


def test_nothing_imports_in_a_circle() -> None:
    needs = {
        relative(path): {
            candidate
            for module, _ in imports(path)
            if module.startswith("optfuse")
            for candidate in (
                "/".join(module.split(".")[1:]) + ".py",
                "/".join(module.split(".")[1:]) + "/__init__.py",
            )
            if (PACKAGE / candidate).exists() and candidate != relative(path)
        }
        for path in FILES
    }
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"these import each other: {', '.join(sorted(needs))}"
        for name in free:
            del needs[name]


def test_no_pass_and_no_engine_builds_on_another() -> None:
    """Except that engines for NVIDIA GPUs, and those in PyTorch, share what has its own files."""
    names = (
        *("nvinfer", "nvinfer_build", "nvinfer_cache", "nvinfer_log", "nvinfer_runtime"),
        *("nvinfer_session", "nvidia", "builder_log", "cuda_recording", "engine_file"),
        *("given", "inspector", "onnx_places", "profiles", "torch_gpu", "torch_program"),
    )
    shared = {f"backends/{name}.py" for name in names}
    for folder in ("passes", "backends"):
        for path in sorted((PACKAGE / folder).glob("*.py")):
            for module, node in imports(path):
                name = module.replace(".", "/").removeprefix("optfuse/") + ".py"
                between = name.startswith(f"{folder}/") and name not in shared
                assert not between, f"{relative(path)}:{node.lineno} imports {module}, its sibling"


@every_file
def test_front_ends_stand_only_where_they_belong(path: Path) -> None:
    for module, node in imports(path):
        allowed = FRONT_ENDS.get(module.split(".")[0])
        assert allowed is None or {relative(path), unit(path)} & allowed, (
            f"{relative(path)}:{node.lineno} imports {module}"
        )


@every_file
def test_engine_packages_stay_in_their_own_file_inside_functions(path: Path) -> None:
    for module, node in imports(path):
        allowed = ENGINES.get(module.split(".")[0])
        assert allowed is None or relative(path) in allowed, (
            f"{relative(path)}:{node.lineno} imports {module}"
        )
    assert not imported_at_the_top(path) & ENGINES.keys()


TORCH_FREE = ["optfuse", "optfuse.cli", "optfuse.backends", "optfuse.stages", "optfuse.errors"]


def modules_after(statement: str) -> set[str]:
    """What a fresh interpreter has imported after one statement."""
    code = f"import json, sys\n{statement}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


COMMAND = (
    "import contextlib\n"
    "from optfuse.cli import main\n"
    "sys.argv = ['optfuse', {words}]\n"
    "with contextlib.suppress(SystemExit):\n"
    "    main()\n"
)


@pytest.mark.parametrize(
    "statement",
    [
        *[f"import {name}" for name in TORCH_FREE],
        COMMAND.format(words="'--help'"),
        COMMAND.format(words="'--version'"),
        COMMAND.format(words="'optimize', '--help'"),
        COMMAND.format(words="'engines'"),
        COMMAND.format(words="'bench', '--help'"),
        COMMAND.format(words="'check', '--help'"),
    ],
)
def test_answers_at_once(statement: str) -> None:
    """`torch` alone takes over a second to import, an engine nearly as long."""
    heavy = {"torch", "onnx", "onnxscript", "numpy", *ENGINES}
    assert modules_after(statement) & heavy == set()


@pytest.mark.parametrize("name", ORDER)
def test_a_pass_is_one_file_one_class_and_one_test_file(name: str) -> None:
    each = load(name)
    assert issubclass(each, Pass)
    assert each.name == name
    assert " = " in each.equation or "->" in each.equation, "an equation says what becomes what"
    assert "\n" not in each.equation
    assert each.__doc__
    module = importlib.import_module(each.__module__)
    assert module.__doc__
    assert len(module.__doc__.splitlines()) > 3, "the module says the equation, the guards, why"
    assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()
    for option, meaning in each.OPTIONS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", option)
        assert meaning


def test_every_pass_file_stands_in_the_order() -> None:
    files = {path.stem for path in (PACKAGE / "passes").glob("[!_]*.py")}
    assert files == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@every_file
def test_whatever_is_public_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{relative(path)}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    assert ast.get_docstring(method) or _inherits(path, node.name, method.name), (
                        f"{relative(path)}:{method.lineno} {node.name}.{method.name}"
                    )


def _inherits(path: Path, owner: str, name: str) -> bool:
    """Whether a class above, or the protocol it fulfils, says what the method is for."""
    dotted = ".".join(("optfuse", *path.relative_to(PACKAGE).with_suffix("").parts))
    found = getattr(importlib.import_module(dotted.removesuffix(".__init__")), owner)
    backends = importlib.import_module("optfuse.backends")
    above = [*found.__mro__[1:], backends.Session, backends.Backend]
    return any(inspect.getdoc(getattr(each, name, None)) for each in above if hasattr(each, name))


@every_file
def test_nothing_is_left_for_later(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line), f"{relative(path)}:{number}"
        assert "NotImplementedError" not in line, f"{relative(path)}:{number} is a stub"


@every_file
def test_names_say_something(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "manager"}
