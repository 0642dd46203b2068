"""An engine and its description: written together, and opened only where everything fits."""

import errno
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optfuse.backends import engine_file
from optfuse.backends.engine_file import Built, EngineInput, Here
from optfuse.errors import EngineError, OutputError
from optfuse.stages import Artifact, BuildOptions, InputShapes, InputSpec

CONTENT = b"native code " * 9
SHAPES = (InputShapes("image", (1, 3), (8, 3), (32, 3)), InputShapes("mask", (1,), (2,), (3,)))
BUILT = Built(
    onnx_sha256="a" * 64,
    package="tensorrt",
    version="10.9.0.34",
    target="sm_90",
    device="NVIDIA H200",
    oldest_target="sm_90",
    shapes=SHAPES,
    version_compatible=False,
    hardware_compatible=False,
    inputs=(EngineInput("image", "float32", (-1, 3)), EngineInput("mask", "bool", (-1,))),
    outputs=("score",),
)
HERE = Here("tensorrt", "10.9.0.34", "sm_90", "NVIDIA H200")


def engine(folder: Path, **changed: Any) -> Path:
    path = folder / "x.engine"
    engine_file.write(path, CONTENT, replace(BUILT, **changed))
    return path


def reason(path: Path, here: Here = HERE, **options: Any) -> str:
    """Why it is not opened."""
    with pytest.raises(EngineError) as refused:
        engine_file.load(path, here, BuildOptions(**options))
    assert refused.value.thing == "The engine x.engine is not opened"
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 4
    return refused.value.cause


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = engine(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]
    assert engine_file.read(path) == BUILT
    assert engine_file.load(path, HERE, BuildOptions()) == (CONTENT, BUILT)
    said = json.loads((tmp_path / "x.engine.json").read_text())
    assert said["engine_sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_both_can_be_copied_elsewhere_and_renamed_together(tmp_path: Path) -> None:
    path = engine(tmp_path)
    there = tmp_path / "elsewhere"
    there.mkdir()
    path.rename(there / "y.engine")
    engine_file.description_of(path).rename(there / "y.engine.json")
    assert engine_file.load(there / "y.engine", HERE, BuildOptions())[0] == CONTENT


def test_the_names_in_the_description_are_taken_where_there_are_none(tmp_path: Path) -> None:
    given = Artifact(tmp_path / "x.engine", "engine", "a" * 64, 1)
    named = engine_file.named(given, BUILT)
    assert (named.input_names, named.output_names) == (("image", "mask"), ("score",))
    own = replace(given, input_names=("mask", "image"), output_names=("score",))
    assert engine_file.named(own, BUILT) == own


def test_the_usual_inputs_of_an_engine() -> None:
    fixed = replace(BUILT, inputs=(EngineInput("scale", "float16", (2, 2)), *BUILT.inputs))
    assert engine_file.usual_inputs(fixed) == (
        InputSpec("scale", (2, 2), "float16"),
        InputSpec("image", (8, 3), "float32"),
        InputSpec("mask", (2,), "bool"),
    )


# What is refused


def test_an_engine_without_its_description(tmp_path: Path) -> None:
    path = engine(tmp_path)
    engine_file.description_of(path).unlink()
    with pytest.raises(EngineError) as refused:
        engine_file.load(path, HERE, BuildOptions())
    assert str(refused.value) == (
        "The engine x.engine is not opened. There is no x.engine.json beside it, which says what "
        "it was built for. Copy that file too, or build the engine again: engines run native "
        "code, and unknown ones are not opened."
    )


@pytest.mark.parametrize(
    "content", [b"", CONTENT[:-1], CONTENT + b"!", b"X" + CONTENT[1:], b"another engine"]
)
def test_an_engine_that_was_cut_short_or_changed(tmp_path: Path, content: bytes) -> None:
    path = engine(tmp_path)
    path.write_bytes(content)
    assert reason(path) == (
        "Its sha256 is not the one that x.engine.json beside it says: it was cut short, replaced "
        "or changed"
    )


def test_an_engine_that_is_gone(tmp_path: Path) -> None:
    path = engine(tmp_path)
    path.unlink()
    assert reason(path) == "It cannot be read: No such file or directory"


CHANGED = "x.engine.json beside it was changed after it was written"


@pytest.mark.parametrize("key", [*asdict(BUILT), "engine_sha256", "format", "sha256"])
def test_a_description_changed_by_hand(tmp_path: Path, key: str) -> None:
    path = engine(tmp_path)
    description = engine_file.description_of(path)
    said = json.loads(description.read_text())
    for other in ({**said, key: "sm_75"}, {k: v for k, v in said.items() if k != key}):
        description.write_text(json.dumps(other))
        assert reason(path) == CHANGED
        with pytest.raises(EngineError, match="was changed after it was written"):
            engine_file.read(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"no JSON", b"[]", b"3", b"[" * 100_000, b"{" * 9]
)
def test_a_description_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = engine(tmp_path)
    engine_file.description_of(path).write_bytes(content)
    assert reason(path) == CHANGED


def test_a_description_that_is_too_large_to_be_one(tmp_path: Path) -> None:
    path = engine(tmp_path)
    with engine_file.description_of(path).open("wb") as file:
        file.truncate((1 << 24) + 1)
    assert reason(path) == CHANGED


def test_a_description_that_cannot_be_read(tmp_path: Path) -> None:
    path = engine(tmp_path)
    engine_file.description_of(path).unlink()
    engine_file.description_of(path).mkdir()
    assert reason(path) == "x.engine.json beside it cannot be read: Is a directory"


def signed(path: Path, said: dict[str, Any]) -> None:
    """A forged description, whose own checksum fits."""
    said.pop("sha256")
    engine_file.description_of(path).write_text(
        json.dumps({**said, "sha256": engine_file._digest(said)})
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("target", "Hopper"), ("target", 90), ("shapes", [3]), ("inputs", 3), ("version", 10)],
)
def test_a_description_of_other_types(tmp_path: Path, key: str, value: Any) -> None:
    path = engine(tmp_path)
    signed(path, {**json.loads(engine_file.description_of(path).read_text()), key: value})
    assert reason(path) == CHANGED


def test_a_description_of_another_format(tmp_path: Path) -> None:
    path = engine(tmp_path)
    signed(path, {**json.loads(engine_file.description_of(path).read_text()), "format": 2})
    assert reason(path) == "x.engine.json was written by another version of optfuse"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_no_byte_of_a_description_can_be_changed(tmp_path: Path, at: int, byte: int) -> None:
    path = engine(tmp_path)
    description = engine_file.description_of(path)
    content = bytearray(description.read_bytes())
    at %= len(content)
    content[at] = byte
    description.write_bytes(content)
    found: Built | str
    try:
        found = engine_file.read(path)
    except EngineError as error:
        found = error.cause
    assert found in (BUILT, CHANGED)  # the same byte, or space between words


# Where it may run


def test_an_engine_of_another_package(tmp_path: Path) -> None:
    there = replace(HERE, package="tensorrt-rtx")
    assert reason(engine(tmp_path), there) == (
        "It was built by tensorrt, and was to be run by tensorrt-rtx"
    )


@pytest.mark.parametrize("version", ["10.9.0.33", "10.10.0.31", "11.0.0", "9.3", "10.9.0.34.1"])
def test_an_engine_of_another_version(tmp_path: Path, version: str) -> None:
    there = replace(HERE, version=version)
    assert reason(engine(tmp_path), there) == (
        f"It was built by tensorrt 10.9.0.34, and this is {version}"
    )


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("10.9.0.34", True),
        ("10.10.0.31", True),
        ("11.4.1.2", True),
        ("10.9.0.33", False),
        ("10.8.0.43", False),
        ("12.0.0.1", False),
    ],
)
def test_later_versions_open_an_engine_that_was_built_for_them(
    tmp_path: Path, version: str, fits: bool
) -> None:
    path, there = engine(tmp_path, version_compatible=True), replace(HERE, version=version)
    if fits:
        assert engine_file.load(path, there, BuildOptions())[0] == CONTENT
    else:
        assert reason(path, there) == (
            f"It was built by tensorrt 10.9.0.34 for later versions, and {version} is none that "
            "can load it"
        )


def test_an_engine_of_another_gpu(tmp_path: Path) -> None:
    path = engine(tmp_path)
    assert reason(path, replace(HERE, target="sm_89")) == (
        "It was built for sm_90, and the GPU here is sm_89"
    )
    assert reason(path, replace(HERE, device="NVIDIA H100")) == (
        "It was built on a NVIDIA H200, and the GPU here is a NVIDIA H100"
    )
    ahead_of_time = engine(tmp_path, device=None)
    other = replace(HERE, device="NVIDIA H100")
    assert engine_file.load(ahead_of_time, other, BuildOptions())[0] == CONTENT


@pytest.mark.parametrize(("target", "fits"), [("sm_75", False), ("sm_80", True), ("sm_120", True)])
def test_later_gpus_open_an_engine_that_was_built_for_them(
    tmp_path: Path, target: str, fits: bool
) -> None:
    path = engine(tmp_path, hardware_compatible=True, oldest_target="sm_80")
    there = replace(HERE, target=target, device="another")
    if fits:
        assert engine_file.load(path, there, BuildOptions())[0] == CONTENT
    else:
        assert reason(path, there) == "It was built for sm_80 and later, and the GPU here is sm_75"


def test_options_that_the_engine_was_not_built_with(tmp_path: Path) -> None:
    path = engine(tmp_path)
    assert reason(path, shapes=SHAPES[:1]) == "It was built for other shapes of its inputs"
    assert reason(path, version_compatible=True) == "It was not built for later versions"
    assert reason(path, hardware_compatible=True) == "It was not built for later GPUs"
    # In any order, and whatever else was asked for where it was built.
    options = BuildOptions(shapes=SHAPES[::-1], targets=("sm_89",), threads=3)
    assert engine_file.load(path, HERE, options)[0] == CONTENT


# Both or neither


def test_a_full_disk_leaves_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="The disk is full"):
        engine(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_engine_leaves_no_description(tmp_path: Path) -> None:
    (tmp_path / "x.engine").mkdir()
    with pytest.raises(OutputError, match="A folder stands where a file should be"):
        engine(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.engine"]


def test_an_older_engine_does_not_pass_for_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.engine"
    engine_file.write(path, b"older", replace(BUILT, target="sm_89"))
    move = Path.replace

    def fails_at_the_engine(source: Path, target: Path) -> Path:
        if target.name == "x.engine":
            raise OSError(errno.EIO, "Input/output error")
        return move(source, target)

    monkeypatch.setattr(Path, "replace", fails_at_the_engine)
    with pytest.raises(OutputError):
        engine(tmp_path)
    monkeypatch.undo()
    assert "Its sha256 is not the one" in reason(path)
