"""What is compared with what, on which inputs, and what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optfuse import backends
from optfuse.capture import capture
from optfuse.diff import DiffRequest, diff, references
from optfuse.errors import EngineError, LoadError, OptfuseError, UsageError
from optfuse.export import export, export_baseline
from optfuse.load import load
from optfuse.optimize import optimize, select
from optfuse.precision import floats
from optfuse.report import schema
from optfuse.samples import Wanted, read_samples
from optfuse.stages import Dimension, InputSpec, Source
from tests.harness import captured, scramble

pytestmark = pytest.mark.skipif(
    backends.get("onnxruntime").unavailable() is not None,
    reason=str(backends.get("onnxruntime").unavailable()),
)

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(self.middle(x))
        return self.head(x.mean((2, 3)))


def build():
    return Net()


def planted():
    net = Net()
    with torch.no_grad():
        net.middle.weight.mul_(1.01)
    return net


def planted_by_a_tenth():
    net = Net()
    with torch.no_grad():
        net.middle.weight.mul_(1.1)
    return net


class Several(nn.Module):
    def forward(self, a, b):
        scores = a @ b.float()
        masked = scores.masked_fill(scores > 1, -float("inf"))
        return scores.softmax(-1), scores.argmax(-1), scores > 0.5, masked


def several():
    return Several()


class Half(nn.Module):
    def forward(self, x):
        return x.half().float()


def half():
    return Half()


def example_inputs():
    return (torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with some models in a file, as the current folder."""
    (tmp_path / "net_of_diff_tests.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NET = "net_of_diff_tests.py:build"
PLANTED = "net_of_diff_tests.py:planted"


def compared(*subjects: str, **options: Any) -> list[dict[str, Any]]:
    """What a diff found, one entry for each thing that was compared."""
    report = diff(DiffRequest(subjects, command=("optfuse", "diff", *subjects), **options))
    jsonschema.validate(report.document, schema.json_schema("diff"))
    found: list[dict[str, Any]] = report.document["compared"]
    return found


def reference(*subjects: str, **options: Any) -> str:
    return str(diff(DiffRequest(subjects, **options)).document["reference"])


def exported(folder: Path, source: str = NET, name: str = "net.onnx", *inputs: str) -> str:
    """The ONNX file of a model source."""
    return str(export_baseline(capture(load(Source(source))), folder / name).path)


def worst(row: dict[str, Any]) -> float:
    found: float = row["samples"][row["worst_sample"]]["relative_l2"]
    return found


# float32 rounds at 6e-8; networks of four layers stay below a hundred times that.
ROUNDING = 6e-6


# What is compared with what


def test_a_source_alone_is_compared_with_itself_in_float64(folder: Path) -> None:
    (row,) = compared(NET)
    assert (row["name"], row["kind"], row["sha256"]) == ("net_of_diff_tests@torch", "source", None)
    assert 0 < worst(row) < ROUNDING
    assert row["samples"][0]["ratio_to_own"] == 1.0
    assert reference(NET) == "captured program in float64"


def test_a_source_and_its_file_are_both_compared_with_float64(folder: Path) -> None:
    itself, file = compared(NET, exported(folder))
    assert (itself["engine"], file["engine"]) == ("torch", "onnxruntime")
    assert file["name"] == f"{folder.name}/net.onnx@onnxruntime"
    assert 0 < worst(file) < ROUNDING
    sample = file["samples"][0]
    assert sample["own_relative_l2"] == worst(itself)
    assert sample["ratio_to_own"] == worst(file) / worst(itself)


def test_a_source_on_onnx_runtime_is_exported_for_that(folder: Path) -> None:
    (row,) = compared(f"{NET}@onnxruntime", per_layer=True)
    assert (row["kind"], row["engine"]) == ("source", "onnxruntime")
    assert row["outputs"][0]["name"] == "linear"
    assert row["layers"]["engine"] == "onnxruntime"
    assert row["layers"]["rows"]


def test_what_passes_make_of_a_source_is_compared_too(folder: Path) -> None:
    itself, ours = compared(NET, passes="all", per_layer=True)
    assert ours["name"] == "net_of_diff_tests optimized@torch"
    assert 0 < worst(ours) < ROUNDING
    assert itself["layers"] is None, "it has nothing to tell beside another"
    equal = [row["equals"] for row in ours["layers"]["rows"]]
    assert equal == [["relu"], ["relu_1"], ["mean"], ["linear"]]
    assert ours["layers"]["suspect"] is None


def test_no_passes_change_nothing(folder: Path) -> None:
    itself, ours = compared(NET, passes="none")
    assert worst(ours) == worst(itself)


def test_another_source_of_the_same_architecture(folder: Path) -> None:
    itself, other = compared(NET, PLANTED, per_layer=True)
    assert itself["layers"] is None
    assert 1e-4 < worst(other) < 1e-1
    assert other["layers"]["suspect"] == "conv2d_1"
    assert other["name"] != itself["name"]


def test_a_file_alone_is_compared_with_itself_in_float64(folder: Path) -> None:
    path = exported(folder)
    (row,) = compared(path, per_layer=True)
    assert reference(path) == "net.onnx in float64"
    assert 0 < worst(row) < ROUNDING
    assert row["samples"][0]["own_relative_l2"] is None
    assert row["layers"]["suspect"] is None
    assert row["layers"]["rows"][-1]["equals"] == ["linear"]


def test_of_two_files_the_first_as_it_runs_is_the_reference(folder: Path) -> None:
    first, second = exported(folder), exported(folder, PLANTED, "planted.onnx")
    (row,) = compared(first, second, per_layer=True)
    assert reference(first, second) == f"{folder.name}/net.onnx@onnxruntime as it runs"
    assert 1e-4 < worst(row) < 1e-1
    assert row["samples"][0]["ratio_to_own"] is None
    assert row["layers"]["suspect"] == "conv2d_1"
    (same,) = compared(first, first)
    assert (worst(same), same["samples"][0]["sqnr_db"]) == (0.0, None)


def test_a_folder_of_results_is_its_two_files(folder: Path) -> None:
    (folder / "out").mkdir()
    for name in ("baseline.onnx", "model.onnx"):
        exported(folder / "out", NET, name)
    names = [row["name"] for row in compared(NET, "out")]
    assert names == [
        "net_of_diff_tests@torch",
        "out/baseline.onnx@onnxruntime",
        "out/model.onnx@onnxruntime",
    ]
    assert [row["name"] for row in compared("out")] == ["out/model.onnx@onnxruntime"]


def test_layers_of_a_source_cannot_be_compared_with_those_of_a_file(folder: Path) -> None:
    (row,) = compared(exported(folder), NET, per_layer=True)
    assert row["layers"] is None
    assert "The first one is a file" in row["no_layers"]
    assert worst(row) < ROUNDING


def lowered(folder: Path, source: str, name: str) -> str:
    """The ONNX file of a model source in fp16; its mean stays in float32."""
    from optfuse.capture import capture
    from optfuse.load import load
    from optfuse.stages import Source

    program = floats.lower(optimize(capture(load(Source(source))), select("all")), "fp16")
    return str(export(program, folder / name).path)


def test_what_stays_in_float32_among_layers_in_half_precision_is_not_to_blame(folder: Path) -> None:
    path = lowered(folder, NET, "low.onnx")
    _, row = compared(NET, path, per_layer=True)
    assert row["layers"]["suspect"] is None
    assert "ReduceMean" in [layer["kind"] for layer in row["layers"]["rows"]]
    (alone,) = compared(path, per_layer=True)
    assert alone["layers"]["suspect"] is None


def test_a_wrong_layer_in_half_precision_is_named(folder: Path) -> None:
    source = "net_of_diff_tests.py:planted_by_a_tenth"
    _, row = compared(NET, lowered(folder, source, "low.onnx"), per_layer=True)
    (found,) = [each for each in row["layers"]["rows"] if each["name"] == row["layers"]["suspect"]]
    assert found["module"] == "middle"


# Outputs


@pytest.fixture
def several(folder: Path) -> dict[str, Any]:
    from optfuse.inputs import parse_input

    return {"inputs": tuple(map(parse_input, ("4x3", "3x5:int64"))), "seed": 4}


def test_integers_booleans_and_infinities_are_compared_by_what_they_are(
    folder: Path, several: dict[str, Any]
) -> None:
    (row,) = compared("net_of_diff_tests.py:several", **several)
    found = {each["dtype"]: each for each in row["outputs"][1:3]}
    assert (found["int64"]["mismatched"], found["bool"]["mismatched"]) == (0, 0)
    assert found["bool"]["tolerances"] is None
    assert row["outputs"][0]["mismatched"] is None
    assert row["outputs"][3]["both_nonfinite"] > 0
    assert row["outputs"][3]["nonfinite"] == 0
    assert row["outputs"][3]["tolerances"]["atol"] is not None
    assert math.isfinite(worst(row))


def test_outputs_are_matched_by_their_names_where_files_have_the_same(folder: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.tanh(), x.exp()

    path = export_baseline(captured(Two(), torch.randn(3)), folder / "a.onnx").path
    model = onnx.load(path)
    outputs = list(model.graph.output)[::-1]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, folder / "b.onnx")
    (row,) = compared("a.onnx", "b.onnx")
    assert [each["name"] for each in row["outputs"]] == ["tanh", "exp"]
    assert worst(row) == 0.0


def refused(kind: type[OptfuseError], *subjects: str, **options: Any) -> OptfuseError:
    with pytest.raises(kind) as raised:
        diff(DiffRequest(subjects, **options))
    return raised.value


def of_module(folder: Path, name: str, module: nn.Module, *args: Any) -> str:
    return str(export_baseline(captured(scramble(module), *args), folder / name).path)


class Taking(nn.Module):
    """Takes as many inputs and gives as many outputs as is asked for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x + y)


@pytest.mark.parametrize(
    ("function", "args", "cause"),
    [
        (lambda x: x.tanh(), 2, "It takes 2 inputs and the first 1"),
        (lambda x: (x.tanh(), x.sin()), 1, "It gives 2 outputs and the reference 1"),
        (
            lambda x: x.tanh().sum(1),
            1,
            "Its output 'sum_1' has the shape 2 and the reference's 2x3",
        ),
        (
            lambda x: x.tanh().sum(),
            1,
            "Its output 'sum_1' has the shape scalar and the reference's 2x3",
        ),
    ],
    ids=["inputs", "outputs", "shape", "scalar"],
)
def test_what_does_not_compute_the_same_thing_is_one_sentence(
    folder: Path, function: Callable[..., Any], args: int, cause: str
) -> None:
    first = of_module(folder, "a.onnx", Taking(torch.sin), torch.randn(2, 3))
    examples = [torch.randn(2, 3) for _ in range(args)]
    second = of_module(folder, "b.onnx", Taking(function), *examples)
    error = refused(UsageError, first, second)
    assert error.cause == cause
    assert (
        error.thing == f"'{folder.name}/b.onnx@onnxruntime' cannot be compared with the reference"
    )


def test_another_dtype_is_the_engines_own_sentence(folder: Path) -> None:
    first = of_module(folder, "a.onnx", Taking(torch.sin), torch.randn(2, 3))
    second = of_module(folder, "b.onnx", Taking(torch.sin), torch.randn(2, 3).double())
    assert refused(EngineError, first, second).cause == "It takes float64 and got float32"


def test_what_cannot_be_combined(folder: Path) -> None:
    path = exported(folder)
    assert "--passes" in refused(UsageError, path, passes="all").thing
    assert "fold_bn" in refused(UsageError, NET, passes="fold_bn").thing
    error = refused(UsageError, NET, data=Path("x.npz"), samples=3)
    assert error.thing == "--data and --samples cannot be combined"
    assert "nowhere" in refused(UsageError, "nowhere").thing


def test_an_engine_that_cannot_run_here(folder: Path) -> None:
    missing = [name for name in backends.BACKENDS if backends.get(name).cannot_run()]
    if not missing:
        pytest.skip("every engine runs here")
    assert missing[0] in refused(EngineError, f"{NET}@{missing[0]}").thing


def test_an_engine_file_alone_has_no_float64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.get("tensorrt-rtx")
    monkeypatch.setattr(type(backend), "cannot_run", lambda self: None)
    (folder / "x.engine").write_bytes(b"engine")
    error = refused(UsageError, "x.engine@tensorrt-rtx")
    assert error.thing == "'x.engine' cannot be compared with itself in float64"


# Inputs


def test_one_run_on_the_examples_by_default(folder: Path) -> None:
    settings = diff(DiffRequest((NET,))).document["settings"]
    assert (settings["inputs"], settings["samples"]) == ("examples", 1)


def test_random_samples_come_from_the_seed_and_the_worst_is_shown(folder: Path) -> None:
    (row,) = compared(NET, samples=4, seed=5)
    distances = [each["relative_l2"] for each in row["samples"]]
    assert len(set(distances)) == 4
    assert distances[row["worst_sample"]] == max(distances)
    assert row["outputs"][0]["relative_l2"] == max(distances)
    again = compared(NET, samples=2, seed=5)[0]["samples"]
    # Exactly: the model is built from the same seed, and run on the same numbers.
    assert [each["relative_l2"] for each in again] == distances[:2]
    other = compared(NET, samples=2, seed=6)[0]["samples"]
    assert [each["relative_l2"] for each in other] != distances[:2]


def test_layers_are_compared_on_the_worst_sample(folder: Path) -> None:
    _, ours = compared(NET, passes="all", samples=3, per_layer=True)
    assert ours["layers"]["rows"][-1]["relative_l2"] == pytest.approx(worst(ours), rel=1e-9)


def test_the_users_own_inputs(folder: Path) -> None:
    np.savez("mine.npz", image=example(6).numpy())
    (row,) = compared(NET, data=Path("mine.npz"))
    assert len(row["samples"]) == 3, "six rows are three runs of two"
    (of_file,) = compared(exported(folder), data=Path("mine.npz"))
    assert len(of_file["samples"]) == 3
    settings = diff(DiffRequest((NET,), data=Path("mine.npz"))).document["settings"]
    assert (settings["inputs"], settings["data"]) == ("file", "mine.npz")


def example(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_file_with_open_sizes_is_run_within_the_sizes_it_was_exported_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Dimension("N", 1, 2, 4)
    source = Source(NET, inputs=(InputSpec(None, ("N", 3, 8, 8)),), dimensions=(sizes,))
    export_baseline(capture(load(source)), folder / "open.onnx")
    np.savez("mine.npz", image=example(6).numpy())
    six, three = ((InputSpec(None, (count, 3, 8, 8)),) for count in (6, 3))
    with monkeypatch.context() as patched:
        # Said before the file is run in float64, which takes its time.
        patched.setattr(references, "run_file_float64", pytest.fail)
        alone = refused(UsageError, "open.onnx", data=Path("mine.npz"))
    for given in (alone, refused(UsageError, NET, "open.onnx", inputs=six)):
        assert "cannot be run with N=6. It was exported for N from 1 to 4." in str(given)
    # With --input, each run takes so many of them.
    (row,) = compared("open.onnx", data=Path("mine.npz"), inputs=three)
    assert len(row["samples"]) == 2


def test_inputs_that_are_not_finite_are_compared_all_the_same(folder: Path) -> None:
    image = example(2)
    image[1, 0, 3, 3] = math.nan
    np.save("nan.npy", image.numpy())
    (row,) = compared(NET, data=Path("nan.npy"))
    # Of two rows of five, that of the image with the NaN.
    assert row["outputs"][0]["both_nonfinite"] == 5
    assert worst(row) < ROUNDING


# Reading inputs


IMAGE = Wanted("image", "float32", (2, 3))
IDS = Wanted("ids", "int64", (2, 4))


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "given.npz", **arrays)
    return folder / "given.npz"


def images(rows: int = 2) -> Any:
    return np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)


def ids(rows: int = 2) -> Any:
    return np.random.default_rng(1).integers(0, 9, (rows, 4))


def test_arrays_are_matched_by_name_whatever_their_order(tmp_path: Path) -> None:
    path = saved(tmp_path, ids=ids(), image=images())
    ((image, index),) = read_samples(path, [IMAGE, IDS])
    assert (image.dtype, index.dtype) == (torch.float32, torch.int64)
    assert np.array_equal(image.numpy(), images())
    assert np.array_equal(index.numpy(), ids())


def test_arrays_without_names_are_taken_in_their_order(tmp_path: Path) -> None:
    wanted = [Wanted(f"x{number}", "int64", ()) for number in range(11)]
    np.savez(tmp_path / "given.npz", *range(11))
    (found,) = read_samples(tmp_path / "given.npz", wanted)
    assert [int(each) for each in found] == list(range(11)), "arr_10 comes after arr_9"


def test_a_npy_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "given.npy", images())
    ((image,),) = read_samples(tmp_path / "given.npy", [IMAGE])
    assert np.array_equal(image.numpy(), images())
    with pytest.raises(UsageError, match="They are arr_0, and the inputs are image, ids"):
        read_samples(tmp_path / "given.npy", [IMAGE, IDS])


def test_the_only_array_needs_no_name(tmp_path: Path) -> None:
    assert len(read_samples(saved(tmp_path, picture=images()), [IMAGE])) == 1


def test_safetensors_hold_dtypes_that_numpy_has_not(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, 3).bfloat16()}, tmp_path / "given.safetensors")
    wanted = [Wanted("x", "bfloat16", (2, 3))]
    ((found,),) = read_samples(tmp_path / "given.safetensors", wanted)
    assert found.dtype is torch.bfloat16


def test_several_runs_worth_are_several_samples(tmp_path: Path) -> None:
    found = read_samples(saved(tmp_path, image=images(6), ids=ids(6)), [IMAGE, IDS])
    assert [each[0].shape for each in found] == [(2, 3)] * 3
    assert np.array_equal(found[2][0].numpy(), images(6)[4:])
    assert np.array_equal(found[2][1].numpy(), ids(6)[4:])


def test_an_array_for_one_run_serves_all(tmp_path: Path) -> None:
    found = read_samples(saved(tmp_path, image=images(6), ids=ids()), [IMAGE, IDS])
    assert [np.array_equal(each[1].numpy(), ids()) for each in found] == [True] * 3
    with pytest.raises(UsageError, match="They hold inputs for 2 and 3 runs"):
        read_samples(saved(tmp_path, image=images(6), ids=ids(4)), [IMAGE, IDS])


def test_an_open_first_size_takes_everything_at_once(tmp_path: Path) -> None:
    wanted = [Wanted("image", "float32", ("batch", 3))]
    ((found,),) = read_samples(saved(tmp_path, image=images(6)), wanted)
    assert found.shape == (6, 3)


def test_numbers_of_the_other_byte_order(tmp_path: Path) -> None:
    ((found,),) = read_samples(saved(tmp_path, image=images().astype(">f4")), [IMAGE])
    assert np.array_equal(found.numpy(), images())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (images().astype(np.float64), "It is 2x3 float64, and one run takes 2x3 float32"),
        (images(3), "It is 3x3 float32, and one run takes 2x3 float32"),
        (images()[:1], "It is 1x3 float32"),
        (images()[:0], "It is 0x3 float32"),
        (images()[:, :2], "It is 2x2 float32"),
        (images()[0], "It is 3 float32"),
        (np.float32(1), "It is scalar float32"),
    ],
    ids=["dtype", "not a multiple", "too few", "none", "another size", "a rank less", "scalar"],
)
def test_an_array_that_does_not_fit_is_one_sentence(tmp_path: Path, array: Any, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_samples(saved(tmp_path, image=array), [IMAGE])
    assert raised.value.cause.startswith(said)
    assert "'image'" in raised.value.thing


@pytest.mark.parametrize(
    "arrays", [{"image": images(), "ids": ids(), "more": ids()}, {"image": images()}, {}]
)
def test_a_missing_array_or_one_too_many(tmp_path: Path, arrays: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        read_samples(saved(tmp_path, **arrays), [IMAGE, IDS])
    assert raised.value.cause.endswith("and the inputs are image, ids")


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"no arrays at all", b"\x80\x04N."]
)
def test_a_file_that_is_cut_short_or_foreign_is_one_sentence(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"given.{suffix}"
    path.write_bytes(content)
    with pytest.raises(LoadError) as raised:
        read_samples(path, [IMAGE])
    assert raised.value.cause.startswith("It is cut short or of another kind: ")
    assert "\n" not in str(raised.value)


def test_half_a_file_is_one_sentence(tmp_path: Path) -> None:
    path = saved(tmp_path, image=images(1000))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(LoadError, match="cut short"):
        read_samples(path, [IMAGE])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran-a-payload",))

    np.save(tmp_path / "given.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with pytest.raises(LoadError):
        read_samples(tmp_path / "given.npy", [IMAGE])
    assert not (tmp_path / "ran-a-payload").exists()


def test_texts_are_no_inputs(tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        read_samples(saved(tmp_path, image=np.array(["a", "b"])), [IMAGE])


def test_a_file_of_another_name_or_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"only \.npz, \.npy, \.safetensors are read"):
        read_samples(tmp_path / "given.csv", [IMAGE])
    with pytest.raises(LoadError, match="There is no such file"):
        read_samples(tmp_path / "given.npz", [IMAGE])
