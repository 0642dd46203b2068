"""The README is true: its tables are the code's, its commands parse, its examples run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from typer.testing import CliRunner

from optfuse import errors, passes
from optfuse.cli import INTERRUPTED, app
from optfuse.graph import Edit, is_call
from optfuse.optimize import optimize
from optfuse.passes import Match, Pass, Refusal
from tests.harness import assert_same_function, captured, counts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no block '{name}'"
    return found[1].strip()


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def table_of_passes() -> str:
    """The passes as the README lists them; print it to renew the README."""
    lines = ["| pass | what it does |", "|---|---|"]
    for name in passes.ORDER:
        each = passes.load(name)
        options = [f"<br>`{name}.{option}`: {text}" for option, text in each.OPTIONS.items()]
        lines.append(
            f"| `{name}` | `{each.equation.replace('|', chr(92) + '|')}`{''.join(options)} |"
        )
    return "\n".join(lines)


def test_the_table_of_passes_is_the_codes_own() -> None:
    assert block("passes") == table_of_passes()


COMMANDS = [
    line.strip().split("  #")[0].strip()
    for line in README.splitlines()
    if line.startswith("    optfuse ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_and_its_files_are_there(command: str) -> None:
    words = shlex.split(command)[1:]
    # Options are checked before --help answers, and nothing runs.
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    for word in words:
        if word.startswith("models/"):
            assert (ROOT / word.split(":")[0]).is_file()


def test_make_knows_the_commands() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"make {name}"


def test_the_exit_codes_are_the_errors_own() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    own = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.OptfuseError)
    }
    assert listed == {0, INTERRUPTED, *own}


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = [text for text in examples("python") if "import optfuse" in text]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "model.onnx").stat().st_size > 1_000_000
    assert "fuse_conv_activation 26" in capsys.readouterr().out


def test_the_example_pass_works() -> None:
    [example] = [text for text in examples("python") if "(Pass)" in text]
    names: dict[str, Any] = {
        **{"Pass": Pass, "Match": Match, "Refusal": Refusal, "Edit": Edit, "fx": fx},
        **{"is_call": is_call, "aten": torch.ops.aten, "Mapping": Mapping},
    }
    exec(compile(example, "README.md", "exec"), names)

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.neg(torch.neg(torch.sin(x)))

    before = captured(Net(), torch.linspace(-2, 2, 7))
    after = optimize(before, [names["EliminateDoubleNegation"]()])
    assert (counts(before), counts(after)) == ({"neg": 2, "sin": 1}, {"sin": 1})
    assert_same_function(before, after, tolerance=0.0)  # nothing is computed differently
