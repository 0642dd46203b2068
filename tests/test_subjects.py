"""What bench and diff are given: how it is read, opened and fed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from optfuse.backends import engine_file, nvinfer
from optfuse.backends.engine_file import Built, EngineInput
from optfuse.errors import EngineError, LoadError, OptfuseError, UsageError
from optfuse.feeds import feeds_of, onnx_inputs
from optfuse.stages import Artifact, InputShapes, InputSpec, Program
from optfuse.subjects import Subject, opened_by, parse_subjects, program_of
from tests.backends.nvinfer_examples import builds_ahead

MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

def example_inputs():
    return torch.randn(2, 3, 8, 8)

class Scale(nn.Module):
    def forward(self, factor):
        return factor * 3.0
"""


def onnx_file(
    path: Path, shape: tuple[int | str, ...] = (1, 4), element: int = TensorProto.FLOAT
) -> Path:
    """y = x + c, where c is a constant that older files list among the inputs too."""
    x = helper.make_tensor_value_info("x", element, shape)
    c = helper.make_tensor_value_info("c", element, [1])
    y = helper.make_tensor_value_info("y", element, shape)
    constant = helper.make_tensor("c", element, [1], [2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "c"], ["y"])], "g", [x, c], [y])
    graph.initializer.append(constant)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


IMAGE = InputShapes("image", (1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8))
BUILT = Built(
    onnx_sha256="a" * 64,
    package="tensorrt-rtx",
    version="1.7.1.116",
    target="sm_89",
    device=None,
    oldest_target="sm_89",
    shapes=(IMAGE,),
    version_compatible=False,
    hardware_compatible=False,
    inputs=(EngineInput("image", "float16", (-1, 3, 8, 8)), EngineInput("mask", "bool", (8, 2))),
    outputs=("score",),
)


def engine(path: Path, **changed: Any) -> Path:
    """No engine, with the description of one beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    engine_file.write(path, b"not looked at", replace(BUILT, **changed))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    onnx_file(tmp_path / "out" / "baseline.onnx")
    onnx_file(tmp_path / "out" / "model.onnx")
    return tmp_path


def read(*texts: str) -> list[tuple[str, str, str]]:
    return [(each.kind, each.name, each.engine) for each in parse_subjects(texts)]


def test_each_kind_has_its_usual_engine_and_at_chooses_another(folder: Path) -> None:
    built = engine(folder / "engines" / "tensorrt-rtx" / "sm_89.engine")
    assert read("net.py:build") == [("source", "net@torch", "torch")]
    assert read("net.py:build@onnxruntime") == [("source", "net@onnxruntime", "onnxruntime")]
    assert read("torchvision:resnet18") == [("source", "resnet18@torch", "torch")]
    assert read("out/model.onnx") == [("onnx", "out/model.onnx@onnxruntime", "onnxruntime")]
    assert read(f"{built}") == [
        ("engine", "tensorrt-rtx/sm_89.engine@tensorrt-rtx", "tensorrt-rtx")
    ]


@pytest.mark.parametrize("text", ["out", "out/", "out/report.json"])
def test_a_folder_of_results_is_its_two_files(folder: Path, text: str) -> None:
    (folder / "out" / "report.json").write_text("{}")
    assert read(text) == [
        ("onnx", "out/baseline.onnx@onnxruntime", "onnxruntime"),
        ("onnx", "out/model.onnx@onnxruntime", "onnxruntime"),
    ]


def test_names_are_told_apart(folder: Path) -> None:
    onnx_file(folder / "old" / "out" / "model.onnx")
    named = [name for _, name, _ in read("out/model.onnx", "old/out/model.onnx", "out/model.onnx")]
    assert named == [
        "out/model.onnx@onnxruntime",
        "old/out/model.onnx@onnxruntime",
        "out/model.onnx@onnxruntime (2)",
    ]


def test_an_at_that_no_engine_follows_belongs_to_the_path(folder: Path) -> None:
    onnx_file(folder / "a@b" / "model.onnx")
    named = ("onnx", "a@b/model.onnx@onnxruntime", "onnxruntime")
    assert read("a@b/model.onnx") == [named]


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("net.py:build@nosuch", UsageError, "There is no engine 'nosuch'."),
        ("nothing", UsageError, "There is no such file or folder"),
        ("net.py", UsageError, "It is no model source, no .onnx or .engine file"),
        (".", UsageError, "The folder holds neither of baseline.onnx and model.onnx."),
        ("gone.onnx", LoadError, "There is no such file."),
        ("gone/report.json", UsageError, "not written as a model source"),
    ],
)
def test_what_cannot_be_compared_is_said(
    folder: Path, text: str, error: type[OptfuseError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        parse_subjects([text])
    assert sentence in str(caught.value)


def test_what_lies_beside_an_engine_file_chooses_its_engine(folder: Path) -> None:
    """Wherever both were copied to: here, to the folder of another engine."""
    engine(folder / "tensorrt" / "x.engine")
    assert read("tensorrt/x.engine") == [
        ("engine", "tensorrt/x.engine@tensorrt-rtx", "tensorrt-rtx")
    ]
    assert parse_subjects(["tensorrt/x.engine@tensorrt"])[0].engine == "tensorrt"


def test_an_engine_file_that_nothing_describes_is_refused_as_it_would_be_opened(
    folder: Path,
) -> None:
    (folder / "x.engine").write_bytes(b"x")
    with pytest.raises(EngineError, match=r"There is no x\.engine\.json beside it") as caught:
        parse_subjects(["x.engine"])
    assert caught.value.exit_code == 4
    with pytest.raises(EngineError, match=r"There is no x\.engine\.json beside it"):
        opened_by(subject("x.engine@tensorrt"), folder)
    beside = engine(folder / "y.engine").with_name("y.engine.json")
    beside.write_text(beside.read_text().replace("sm_89", "sm_90"))
    with pytest.raises(EngineError, match=r"y\.engine\.json beside it was changed"):
        parse_subjects(["y.engine"])


def test_an_engine_of_a_package_that_is_none_here_is_refused(folder: Path) -> None:
    engine(folder / "x.engine", package="another")
    with pytest.raises(UsageError, match="There is no engine 'another'"):
        parse_subjects(["x.engine"])


def subject(text: str) -> Subject:
    [only] = parse_subjects([text])
    return only


def test_a_source_is_captured_or_exported_as_its_engine_wants(folder: Path) -> None:
    program = opened_by(subject("net.py:build"), folder)
    assert isinstance(program, Program)
    exported = opened_by(subject("net.py:build@onnxruntime"), folder / "made")
    assert isinstance(exported, Artifact)
    assert (exported.kind, exported.variant) == ("onnx", "baseline")
    assert exported.path == folder / "made" / "net.onnx"


def test_a_batch_repeats_the_examples_rows(folder: Path) -> None:
    two, five = (program_of(subject("net.py:build"), batch) for batch in (None, 5))
    [rows], [more] = feeds_of(two), feeds_of(five)
    assert (tuple(rows.shape), tuple(more.shape)) == ((2, 3, 8, 8), (5, 3, 8, 8))
    assert torch.equal(more, rows[torch.tensor([0, 1, 0, 1, 0])])


def test_a_model_without_a_first_dimension_has_no_batch(folder: Path) -> None:
    [scale] = parse_subjects(["net.py:Scale"], inputs=(InputSpec(None, ()),))
    with pytest.raises(UsageError, match="None of its example inputs has a first dimension"):
        program_of(scale, 4)


def test_an_onnx_files_inputs_leave_its_constants_out(folder: Path) -> None:
    path = onnx_file(folder / "open.onnx", ("batch", 4, "width"))
    assert onnx_inputs(path) == [("x", "float32", ("batch", 4, "width"))]


def test_open_sizes_come_from_the_batch_or_the_user(folder: Path) -> None:
    onnx_file(folder / "batch.onnx", ("n", 4))
    thing = opened_by(subject("batch.onnx"), folder, 8)
    [feed] = feeds_of(thing, batch=8)
    assert (tuple(feed.shape), feed.dtype) == ((8, 4), torch.float32)
    [other] = feeds_of(thing, (InputSpec("x", (3, 4)),))
    assert tuple(other.shape) == (3, 4)
    [unnamed] = feeds_of(thing, (InputSpec(None, (2, 4)),), seed=1)
    [again] = feeds_of(thing, (InputSpec(None, (2, 4)),), seed=1)
    assert torch.equal(unnamed, again)
    assert unnamed.std() > 0.1  # drawn, not zeros


@pytest.mark.parametrize(
    ("shape", "specs", "sentence"),
    [
        (("n", 4), (), "Give it with --input x=SHAPE:float32"),
        (("n", 4), (InputSpec("x", (2, 5)),), "The file takes nx4:float32"),
        ((2, 4), (InputSpec("x", (2, 4), "int64"),), "The file takes 2x4:float32"),
        ((2, 4), (InputSpec("x", (2, 4, 1)),), "The file takes 2x4:float32"),
    ],
)
def test_inputs_that_do_not_fit_the_file(
    folder: Path, shape: tuple[int | str, ...], specs: tuple[InputSpec, ...], sentence: str
) -> None:
    onnx_file(folder / "open.onnx", shape)
    with pytest.raises(UsageError) as caught:
        feeds_of(opened_by(subject("open.onnx"), folder), specs)
    assert sentence in str(caught.value)


def test_a_file_for_another_batch_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="It was exported for a batch of 1"):
        opened_by(subject("out/model.onnx"), folder, 8)
    opened_by(subject("out/model.onnx"), folder, 1)


def test_the_batch_is_that_of_every_input_as_long_as_the_first(folder: Path) -> None:
    specs = (InputSpec(None, ()), InputSpec("x", (1, 4)))
    thing = opened_by(subject(str(onnx_file(folder / "open.onnx", ("n", "m")))), folder, 6)
    [feed] = feeds_of(thing, specs, batch=6)
    assert tuple(feed.shape) == (6, 4)
    # Another first size than the first input's is no batch's, and an input without a name is first.
    for specs in (
        (InputSpec("mask", (1, 2)), InputSpec("x", (3, 4))),
        (InputSpec("x", (3, 4)), InputSpec(None, (1, 2))),
    ):
        [other] = feeds_of(thing, specs, batch=6)
        assert tuple(other.shape) == (3, 4)


RANGES = {"n": (2, 4, 8), "width": (3, 3, 5)}


def ranged(path: Path) -> Path:
    """A file that `--dim n=2:4:8 --dim width=3:3:5` was given for."""
    model = onnx.load(onnx_file(path, ("n", 4, "width")))
    written = " ".join(f"{name}={':'.join(map(str, each))}" for name, each in RANGES.items())
    helper.set_model_props(model, {"optfuse.dimensions": written})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("shape", "batch", "told"),
    [
        ((2, 4, 3), None, None),
        ((8, 4, 5), None, None),
        ((1, 4, 4), 8, None),
        ((1, 4, 3), None, "n=1"),
        ((9, 4, 3), None, "n=9"),
        ((4, 4, 6), None, "width=6"),
        ((1, 4, 4), 64, "n=64"),
    ],
)
@pytest.mark.parametrize(
    "engine_name", ["onnxruntime", pytest.param("tensorrt-rtx", marks=builds_ahead)]
)
def test_a_file_is_not_run_beyond_what_it_was_exported_for(
    folder: Path,
    ada: None,
    engine_name: str,
    shape: tuple[int, ...],
    batch: int | None,
    told: str | None,
) -> None:
    ranged(folder / "open.onnx")
    specs = (InputSpec("x", shape),)
    [x] = parse_subjects([f"open.onnx@{engine_name}"], inputs=specs)

    def fed() -> list[torch.Tensor]:
        return feeds_of(opened_by(x, folder, batch), specs, batch=batch)

    if told is None:
        [feed] = fed()
        assert tuple(feed.shape) == (batch or shape[0], *shape[1:])
        return
    with pytest.raises(UsageError) as refused:
        fed()
    name = told.partition("=")[0]
    least, _, most = RANGES[name]
    assert str(refused.value) == (
        f"'open.onnx' cannot be run with {told}. It was exported for {name} from {least} to "
        f"{most}. Choose a size that it was exported for, or export it for others with 'optfuse "
        "optimize --dim'."
    )
    assert not list(folder.glob("*.engine"))


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"not an onnx file"])
def test_what_is_no_onnx_file_is_said(folder: Path, content: bytes) -> None:
    (folder / "bad.onnx").write_bytes(content)
    with pytest.raises(LoadError, match=r"'bad\.onnx' cannot be read"):
        opened_by(subject("bad.onnx"), folder)


def test_inputs_that_are_no_tensors_of_numbers_are_said(folder: Path) -> None:
    onnx_file(folder / "text.onnx", (1,), TensorProto.INT32)
    model = onnx.load(folder / "text.onnx")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    onnx.save(model, folder / "text.onnx")
    with pytest.raises(LoadError, match="Its input 'x' is no tensor of a dtype that PyTorch has"):
        onnx_inputs(folder / "text.onnx")


def shapes_and_dtypes(tensors: list[torch.Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(each.shape), each.dtype) for each in tensors]


def test_an_engine_is_given_what_it_is_fastest_at_or_what_the_user_says(folder: Path) -> None:
    engine(folder / "x.engine")
    thing = opened_by(subject("x.engine"), folder)
    assert isinstance(thing, Artifact)
    assert (thing.input_names, thing.output_names) == (("image", "mask"), ("score",))
    mask = ((8, 2), torch.bool)
    for specs, batch, rows in (
        ((), None, 4),
        ((), 16, 16),
        ((InputSpec("image", (2, 3, 8, 8), "float16"),), None, 2),
        ((InputSpec(None, (1, 3, 8, 8), "float16"),), 16, 16),
        ((InputSpec("mask", (8, 2), "bool"),), None, 4),
    ):
        feeds = feeds_of(thing, specs, batch=batch)
        assert shapes_and_dtypes(feeds) == [((rows, 3, 8, 8), torch.float16), mask]
        assert feeds[0].std() > 0.5  # drawn, not zeros
    with pytest.raises(UsageError, match=r"The file takes \?x3x8x8:float16"):
        feeds_of(thing, (InputSpec("image", (2, 3, 9, 8), "float16"),))
    with pytest.raises(UsageError, match=r"The file takes \?x3x8x8:float16"):
        feeds_of(thing, (InputSpec("image", (2, 3, 8, 8)),))


FIXED = (EngineInput("image", "float32", (4, 3)), EngineInput("factor", "float32", ()))
TALL = EngineInput("image", "float32", (1, -1))


@pytest.mark.parametrize(
    ("changed", "within", "outside", "sentence"),
    [
        ({}, (1, 16), (17,), "It was built for batches of 1 to 16"),
        ({"shapes": (), "inputs": FIXED}, (4,), (1, 5), "It was built for a batch of 4"),
        (
            {"shapes": (InputShapes("image", (1, 2), (1, 4), (1, 8)),), "inputs": (TALL,)},
            (1,),
            (2, 4),
            "It was built for a batch of 1",
        ),
    ],
    ids=["open batch", "fixed", "open in another dimension"],
)
def test_an_engine_takes_the_batches_that_it_was_built_for(
    folder: Path,
    changed: dict[str, Any],
    within: tuple[int, ...],
    outside: tuple[int, ...],
    sentence: str,
) -> None:
    engine(folder / "x.engine", **changed)
    for batch in within:
        thing = opened_by(subject("x.engine"), folder, batch)
        assert feeds_of(thing, batch=batch)[0].shape[0] == batch
    for batch in outside:
        with pytest.raises(UsageError) as caught:
            opened_by(subject("x.engine"), folder, batch)
        assert caught.value.cause == sentence


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU of compute capability 8.9 were here, for a builder that needs none."""
    monkeypatch.setattr(nvinfer, "device_target", lambda: "sm_89")


@builds_ahead
@pytest.mark.parametrize(
    ("shape", "batch", "specs", "built_for"),
    [
        ((2, 4), None, (), None),
        (("n", 4), 3, (), (3, 4)),
        (("n", "width"), None, (InputSpec("x", (2, 5)),), (2, 5)),
        (("n", "width"), 3, (InputSpec(None, (1, 5)),), (3, 5)),
    ],
    ids=["nothing open", "a batch", "an input", "an input and a batch"],
)
def test_an_engine_is_built_for_the_shapes_that_it_is_run_with(
    folder: Path,
    ada: None,
    shape: tuple[int | str, ...],
    batch: int | None,
    specs: tuple[InputSpec, ...],
    built_for: tuple[int, ...] | None,
) -> None:
    onnx_file(folder / "x.onnx", shape)
    [x] = parse_subjects(["x.onnx@tensorrt-rtx"], inputs=specs)
    made = folder / "made"
    made.mkdir()
    thing = opened_by(x, made, batch)
    assert isinstance(thing, Artifact)
    assert (thing.kind, thing.path.parent) == ("engine", made)
    built = engine_file.read(thing.path)
    wanted = () if built_for is None else (InputShapes("x", built_for, built_for, built_for),)
    assert built.shapes == wanted
    [feed] = feeds_of(thing, specs, batch=batch)
    assert tuple(feed.shape) == (built_for or shape)
    # And as a file of its own, which says its sizes itself.
    [again] = feeds_of(opened_by(subject(str(thing.path)), folder, len(feed)))
    assert torch.equal(again, feed)


@builds_ahead
def test_a_source_on_an_engine_that_builds_is_fed_like_its_examples(
    folder: Path, ada: None
) -> None:
    (folder / "made").mkdir()
    thing = opened_by(subject("net.py:build@tensorrt-rtx"), folder / "made", 3)
    assert shapes_and_dtypes(feeds_of(thing, batch=3)) == [((3, 3, 8, 8), torch.float32)]


@builds_ahead
def test_an_open_size_that_nobody_names_is_asked_for_before_an_engine_is_built(
    folder: Path, ada: None
) -> None:
    onnx_file(folder / "x.onnx", ("n", 4))
    with pytest.raises(UsageError, match="Give it with --input x=SHAPE:float32"):
        opened_by(subject("x.onnx@tensorrt-rtx"), folder)


def test_an_engine_that_cannot_open_it_says_so(folder: Path) -> None:
    from optfuse import backends
    from optfuse.stages import BuildOptions

    thing = opened_by(subject("out/model.onnx@torch"), folder)
    with pytest.raises(EngineError, match="Open the file with the engine 'onnxruntime'"):
        backends.get("torch").open(thing, BuildOptions())


def test_a_folder_gives_an_engine_the_file_that_was_written_for_it(tmp_path: Path) -> None:
    for name in ("baseline.onnx", "model.onnx", "model.openvino.onnx", "model.tensorrt.onnx"):
        (tmp_path / name).write_bytes(b"")
    chosen = {
        engine: [each.path.name for each in parse_subjects([f"{tmp_path}@{engine}"]) if each.path]
        for engine in ("onnxruntime", "openvino", "tensorrt-rtx")
    }
    assert chosen == {
        "onnxruntime": ["baseline.onnx", "model.onnx"],
        "openvino": ["baseline.onnx", "model.openvino.onnx"],
        "tensorrt-rtx": ["baseline.onnx", "model.tensorrt.onnx"],
    }
