"""The commands as a user types them: what they print, what they leave, how they exit."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import onnxruntime
import pytest
import torch
from typer.testing import CliRunner, Result

from optfuse import backends, passes
from optfuse.cli import app
from optfuse.passes.fold_conv_bn import FoldConvBn
from optfuse.report import schema
from optfuse.stages import Caveat

MODEL = """
import torch
from torch import nn

print("the model's own chatter")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


def build():
    return Net()


def example_inputs():
    return (torch.randn(2, 3, 12, 12),)


def broken():
    raise ValueError("no such width")


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


def branching():
    return Branching()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one model in it, as the current folder."""
    (tmp_path / "net_of_cli_tests.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def optimized(*arguments: str) -> Result:
    """`optfuse optimize` of the model above, on ONNX Runtime alone, without measuring."""
    given = " ".join(arguments)
    defaults = [] if "--engine" in given else ["--engine", "onnxruntime"]
    defaults += [] if "--duration" in given else ["--duration", "0"]
    return typed("optimize", *arguments, *defaults)


def outputs_of(path: Path, image: torch.Tensor) -> torch.Tensor:
    """What ONNX Runtime gives for the image."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def assert_refused(result: Result, code: int, *parts: str) -> None:
    """The exit code; thing, cause and next step on stderr; nothing on stdout, no traceback."""
    assert result.exit_code == code, result.stderr
    for part in parts:
        assert part in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_run_leaves_the_files_that_the_report_lists(folder: Path) -> None:
    result = optimized("net_of_cli_tests.py:build", "--output", "results")
    assert result.exit_code == 0, result.stderr
    written = sorted(path.name for path in (folder / "results").iterdir())
    assert written == ["baseline.onnx", "model.onnx", "report.json", "report.md"]
    report = json.loads((folder / "results" / "report.json").read_text())
    jsonschema.validate(report, schema.json_schema())
    assert {artifact["path"] for artifact in report["artifacts"]} == {"baseline.onnx", "model.onnx"}
    assert "optimized" in result.stdout
    assert "net_of_cli_tests" in (folder / "results" / "report.md").read_text()


def test_ablate_measures_each_pass_and_every_run_compares_the_layers(
    folder: Path, short_rounds: None
) -> None:
    result = optimized(
        *("net_of_cli_tests.py:build", "--output", "results", "--ablate", "--duration", "1"),
        *("--threads", "1", "--passes", "fold_conv_bn,combine_parallel_convs"),
    )
    assert result.exit_code == 0, result.stderr
    report = schema.parse((folder / "results" / "report.json").read_text()).document
    assert [(row["how"], row["pass"]) for row in report["ablation"]] == [
        (how, name)
        for how in ("up_to", "alone", "without")
        for name in ("fold_conv_bn", "combine_parallel_convs")
    ]
    assert all(row["relative_l2"] is not None for row in report["ablation"])
    # What the first pass leaves is what it leaves alone, and what leaving the second out leaves.
    programs = {(row["how"], row["pass"]): row["same_as"] for row in report["ablation"]}
    assert programs["alone", "fold_conv_bn"] == "up_to fold_conv_bn"
    assert programs["without", "combine_parallel_convs"] == "up_to fold_conv_bn"
    assert "What each pass earned on onnxruntime" in result.stdout
    assert report["layers"]["suspect"] is None
    # A float32 layer adds what rounding adds: far below the limit on a model this small.
    assert max(row["growth"] or 0 for row in report["layers"]["rows"]) < report["layers"]["limit"]
    # The combined convolution computes nothing that the model does; its two parts do.
    kinds = [each["kind"] for each in report["layers"]["rows"]]
    assert (kinds.count("conv2d"), kinds.count("getitem")) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--duration", "0"), "There is no time to measure in (--duration 0)."),
        (("--passes", "none", "--duration", "1"), "No pass is selected."),
    ],
)
def test_ablate_needs_time_and_passes(folder: Path, arguments: tuple[str, ...], cause: str) -> None:
    result = optimized("net_of_cli_tests.py:build", "--ablate", *arguments)
    assert_refused(result, 2, "What each pass earned cannot be measured.", cause)


def test_what_makes_a_latency_doubtful_is_in_the_report(
    folder: Path, short_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubtful(measurements: Any, before: Any, after: Any, **options: Any) -> list[Caveat]:
        assert after.taken_seconds > before.taken_seconds
        assert options["threads"] == 1
        assert {each.variant for each in measurements} == {"baseline", "control", "optimized"}
        return [Caveat("busy", "this machine", "It was busy", "Others ran", "Stop them")]

    monkeypatch.setattr("optfuse.trial.diagnose", doubtful)
    result = optimized("net_of_cli_tests.py:build", "--duration", "0.5", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert "WARNING: this machine: It was busy. Others ran. Stop them." in result.stdout


def test_the_default_folder_is_named_after_the_model(folder: Path) -> None:
    assert optimized("net_of_cli_tests.py:build").exit_code == 0
    assert (folder / "out" / "net_of_cli_tests" / "model.onnx").is_file()


def test_our_file_can_stand_in_for_the_export_as_it_comes(folder: Path) -> None:
    assert optimized("net_of_cli_tests.py:build", "--output", ".").exit_code == 0
    theirs, ours = onnx.load("baseline.onnx").graph, onnx.load("model.onnx").graph
    assert [each.name for each in ours.input] == [each.name for each in theirs.input]
    assert [each.name for each in ours.output] == [each.name for each in theirs.output]
    assert [node.op_type for node in ours.node].count("Conv") == 2  # stem, left + right
    assert all(len(node.input) == 3 for node in ours.node if node.op_type == "Conv")


def test_json_alone_is_on_standard_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/optfuse", "optimize", "a model.py:build"])
    result = optimized("net_of_cli_tests.py:build", "--json")
    report = json.loads(result.stdout)
    assert report == json.loads((folder / "out/net_of_cli_tests/report.json").read_text())
    assert report["command"] == "optfuse optimize 'a model.py:build'"


def test_quiet_prints_nothing(folder: Path) -> None:
    result = optimized("net_of_cli_tests.py:build", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")


def test_latency_is_measured_with_an_interval_and_a_verdict(folder: Path) -> None:
    result = optimized(
        "net_of_cli_tests.py:build", "--engine", "torch,onnxruntime", "--duration", "1", "--json"
    )
    report = json.loads(result.stdout)
    jsonschema.validate(report, schema.json_schema())
    measured = {(row["engine"], row["variant"]) for row in report["latency"]}
    variants = ("baseline", "control", "optimized")
    assert measured == {(e, v) for e in ("torch", "onnxruntime") for v in variants}
    assert all(len(row["samples_ms"]) >= 10 for row in report["latency"])
    compared = [(row["engine"], row["against_engine"]) for row in report["speedups"]]
    assert compared == [
        ("torch", "torch"),
        ("onnxruntime", "onnxruntime"),
        ("onnxruntime", "torch"),
    ]
    for row in report["speedups"]:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["verdict"] in ("faster", "slower", "undecided")
    drifts = {(row["engine"], row["variant"]): row for row in report["drift"]}
    # float32 rounds at 6e-8; a network of four layers stays below a hundred times that.
    assert all(0 < row["relative_l2"] < 6e-6 for row in drifts.values())


@pytest.mark.skipif(
    backends.get("tensorrt-rtx").unavailable() is not None,
    reason=str(backends.get("tensorrt-rtx").unavailable()),
)
def test_engines_are_built_for_each_target_side_by_side(folder: Path) -> None:
    result = optimized(
        "net_of_cli_tests.py:build", "--engine", "tensorrt-rtx", "--target", "sm_86,sm_89", "--json"
    )
    report = json.loads(result.stdout)
    built = [(row["target"], row["variant"]) for row in report["engines"]]
    assert sorted(built) == [(t, v) for t in ("sm_86", "sm_89") for v in ("baseline", "optimized")]
    assert all(row["layers"] > 0 and row["size_bytes"] > 0 for row in report["engines"])
    reasons = {row["reason"] for row in report["not_measured"]}
    if not torch.cuda.is_available():
        assert "no GPU" in reasons
        assert (
            "not measured: no GPU"
            in optimized(
                "net_of_cli_tests.py:build", "--engine", "tensorrt-rtx", "--target", "sm_89"
            ).stdout
        )


def test_explain_names_sites_and_refusals_and_writes_nothing(folder: Path) -> None:
    result = typed("explain", "net_of_cli_tests.py:build")
    assert result.exit_code == 0, result.stderr
    assert "fold_conv_bn" in result.stdout
    assert "stem" in result.stdout
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == ["net_of_cli_tests.py"]


def test_explain_goes_by_convolution_or_by_pass(folder: Path) -> None:
    told = typed("explain", "net_of_cli_tests.py:build")
    assert told.stdout.startswith("stem  conv2d 3x3 3->8  net_of_cli_tests.py:")
    assert "now conv_act, one with right" in told.stdout
    by_pass = typed("explain", "net_of_cli_tests.py:build", "--by", "pass")
    assert by_pass.stdout.startswith("eliminate_identity: ")


def test_explain_as_json_has_the_same(folder: Path) -> None:
    told = json.loads(typed("explain", "net_of_cli_tests.py:build", "--json").stdout)
    assert told["model"]
    assert {row["operator"] for row in told["convolutions"]} >= {"conv2d"}
    steps = json.loads(typed("explain", "net_of_cli_tests.py:build", "--by=pass", "--json").stdout)
    assert "fold_conv_bn" in [step["name"] for step in steps["steps"]]


def test_explain_shows_some_modules_alone(folder: Path) -> None:
    some = typed("explain", "net_of_cli_tests.py:build", "--module", "stem*", "--json")
    modules = [row["module"] for row in json.loads(some.stdout)["convolutions"]]
    assert modules
    assert all(module.startswith("stem") for module in modules)
    none = typed("explain", "net_of_cli_tests.py:build", "--module", "nowhere")
    assert none.exit_code == 2
    assert "No convolution fits --module nowhere" in none.stderr
    both = typed("explain", "net_of_cli_tests.py:build", "--module", "*", "--by", "pass")
    assert both.exit_code == 2
    assert "Leave one of the two out" in both.stderr


def test_normalisation_goes_into_the_file(folder: Path) -> None:
    model = ("net_of_cli_tests.py:build", "--engine", "onnxruntime", "--output")
    said = optimized(*model, "raw", "--normalize", "mean=0.4,0.5,0.6,std=0.2,0.3,0.25").stdout
    assert "images are normalised in the file: mean 0.4, 0.5, 0.6; std 0.2, 0.3, 0.25" in said
    optimized(*model, "plain")
    pixels = torch.rand(2, 3, 12, 12)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    by_hand = (pixels - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    expected = outputs_of(folder / "plain" / "model.onnx", by_hand)
    # float32 arithmetic in another order costs about 1e-7 of numbers of size 1.
    found = outputs_of(folder / "raw" / "model.onnx", pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, outputs_of(folder / "plain" / "model.onnx", pixels), atol=1e-2)


def test_a_normalisation_that_cannot_be_read_is_a_sentence(folder: Path) -> None:
    result = typed("explain", "net_of_cli_tests.py:build", "--normalize", "mean=grey")
    assert result.exit_code == 2
    assert "'grey' is no number" in result.stderr


def test_passes_are_listed_in_order_with_their_equations() -> None:
    printed = typed("passes").stdout
    places = [printed.index(name) for name in passes.ORDER]
    assert places == sorted(places)
    for name in passes.ORDER:
        assert passes.load(name).equation.split()[0] in printed


def test_engines_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = typed("engines").stdout
    for name in backends.BACKENDS:
        line = next(line for line in printed.splitlines() if line.startswith(name + " "))
        assert any(word in line for word in ("ready", "pip install", "apt-get install", "GPU"))


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["nowhere.py:build"], 3, ["nowhere.py"]),
        (["net_of_cli_tests.py:built"], 3, ["built", "build"]),
        (["net_of_cli_tests.py:broken"], 3, ["ValueError", "no such width", "net_of_cli_tests.py"]),
        (["net_of_cli_tests.py"], 2, ["like 'net_of_cli_tests.py:build'"]),
        (["net_of_cli_tests.py:build", "--input", "1x3x12xx"], 2, ["1x3x12xx"]),
        (["net_of_cli_tests.py:build", "--input", "1x3x12x12:float33"], 2, ["float33"]),
        (["net_of_cli_tests.py:build", "--input", "1x4x12x12"], 3, ["--input"]),
        (["net_of_cli_tests.py:build", "--passes", "fold_bn"], 2, ["fold_bn", "fold_conv_bn"]),
        (["net_of_cli_tests.py:build", "--engine", "trt"], 2, ["trt", "onnxruntime"]),
        (["net_of_cli_tests.py:build", "--weights", "w.safetensors"], 3, ["w.safetensors"]),
        (["net_of_cli_tests.py:build", "--threads", "0"], 2, ["--threads"]),
        (
            ["net_of_cli_tests.py:branching", "--input", "4"],
            3,
            ["net_of_cli_tests.py:", "if x.sum() > 0", "torch.where"],
        ),
    ],
)
def test_bad_input_is_one_sentence_each_for_thing_cause_and_next_step(
    folder: Path, arguments: list[str], code: int, parts: list[str]
) -> None:
    assert_refused(optimized(*arguments, "--output", "results"), code, *parts)
    assert not list(folder.glob("results/*"))


@pytest.mark.skipif(
    backends.get("tensorrt-rtx").unavailable() is not None,
    reason=str(backends.get("tensorrt-rtx").unavailable()),
)
def test_an_unknown_target_is_refused_before_any_work(folder: Path) -> None:
    result = optimized("net_of_cli_tests.py:build", "--engine", "tensorrt-rtx", "--target", "sm_90")
    assert_refused(result, 2, "sm_90", "sm_89")
    assert not (folder / "out").exists()


def test_a_missing_engine_exits_4_with_the_line_that_installs_it(folder: Path) -> None:
    missing = [n for n in backends.BACKENDS if backends.get(n).unavailable()]
    if not missing:
        pytest.skip("every engine is installed here")
    result = optimized("net_of_cli_tests.py:build", "--engine", missing[0])
    assert_refused(result, 4, missing[0])


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran-a-payload",))


def test_weights_that_want_unpickling_run_no_code(folder: Path) -> None:
    Path("w.pt").write_bytes(pickle.dumps({"stem.weight": _Payload()}))
    result = optimized("net_of_cli_tests.py:build", "--weights", "w.pt")
    assert_refused(result, 3, "w.pt")
    assert not Path("ran-a-payload").exists()


def test_an_output_that_is_a_file_is_refused(folder: Path) -> None:
    Path("results").write_text("mine")
    result = optimized("net_of_cli_tests.py:build", "--output", "results")
    assert_refused(result, 6, "results", "A file stands where a folder should be")
    assert Path("results").read_text() == "mine"


def test_a_full_disk_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimized("net_of_cli_tests.py:build", "--output", "results").exit_code == 0
    before = {path.name: path.read_bytes() for path in Path("results").iterdir()}

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = optimized("net_of_cli_tests.py:build", "--output", "results", "--seed", "1")
    assert_refused(result, 6, "The disk is full")
    assert {path.name: path.read_bytes() for path in Path("results").iterdir()} == before


def test_a_pass_that_changes_the_function_is_undone_and_strict_exits_5(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FoldConvBn.rewrite

    def wrong(self: Any, edit: Any, match: Any) -> Any:
        result = right(self, edit, match)
        with torch.no_grad():
            getattr(edit.graph_module, edit.constants[0]).mul_(1.0001)
        return result

    monkeypatch.setattr(FoldConvBn, "rewrite", wrong)
    lenient = optimized("net_of_cli_tests.py:build")
    assert lenient.exit_code == 0
    assert "WARNING" in lenient.stdout
    assert "fold_conv_bn" in lenient.stdout
    strict = optimized("net_of_cli_tests.py:build", "--strict", "--output", "strict")
    assert strict.exit_code == 5
    assert "fold_conv_bn changed what 'net_of_cli_tests' computes" in strict.stderr
    assert "--passes all,-fold_conv_bn" in strict.stderr
    report = json.loads(Path("strict/report.json").read_text())
    undone = [step["name"] for step in report["steps"] if step["undone"]]
    assert undone == ["fold_conv_bn"]
    # What is written is right all the same: float32 rounding, not the planted 1e-4.
    assert all(row["relative_l2"] < 6e-6 for row in report["drift"])


def test_an_engine_that_fails_ends_its_own_part_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optfuse.backends import onnx_runtime
    from optfuse.errors import EngineError

    def fails(*_: Any) -> Any:
        raise EngineError("It cannot start", "Out of memory", "Free some memory")

    monkeypatch.setattr(onnx_runtime.CPU_BACKEND, "open", fails)
    result = optimized("net_of_cli_tests.py:build", "--engine", "torch,onnxruntime")
    assert result.exit_code == 4
    assert "Out of memory" in result.stderr
    report = json.loads(Path("out/net_of_cli_tests/report.json").read_text())
    assert {row["engine"] for row in report["drift"]} == {"torch"}
    assert ("onnxruntime", "it failed: Out of memory") in {
        (row["engine"], row["reason"]) for row in report["not_measured"]
    }


def test_an_unforeseen_error_shows_no_traceback_unless_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("optfuse.pipeline.optimize", fails)
    assert_refused(optimized("net_of_cli_tests.py:build"), 1, "a bug of ours", "--debug")
    result = optimized("net_of_cli_tests.py:build", "--debug")
    assert isinstance(result.exception, ZeroDivisionError)


def test_debug_shows_where_a_users_error_came_from(folder: Path) -> None:
    result = optimized("net_of_cli_tests.py:broken", "--debug")
    assert result.exit_code == 3


def test_ctrl_c_exits_130_and_leaves_nothing_half_written(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import pathlib\nimport time\n\n"
        "def build():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "optfuse", "optimize", "slow.py:build", "--output", "results"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (folder / "started").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert not (folder / "results").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["engines"], ["--version"]])
def test_light_commands_do_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['optfuse', *{arguments!r}]\n"
        "from optfuse.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
