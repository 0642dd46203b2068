"""Reading state dicts: every format, every refusal, and files made to do harm."""

from __future__ import annotations

import collections
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from optfuse.errors import LoadError
from optfuse.weights import first_few, load_weights, read_state_dict, require_file


class Network(nn.Module):
    """A convolution, a batch norm and a linear layer: parameters and buffers of several ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3)
        self.normalization = nn.BatchNorm2d(3)
        self.classifier = nn.Linear(3, 4)


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


class WritesFile:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Exits:
    """A pickle that ends the process when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (7,)


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    model = Network()
    assert model.normalization.running_mean is not None
    assert model.normalization.running_var is not None
    model.normalization.running_mean.normal_()
    model.normalization.running_var.uniform_(0.5, 2.0)
    return model


def assert_same_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key  # copied, so equal to the bit


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def parts(error: pytest.ExceptionInfo[LoadError]) -> tuple[str, str, str]:
    return error.value.thing, error.value.cause, error.value.next_step


def save(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# ---------------------------------------------------------------- files that are read


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".PT"])
def test_every_suffix_gives_the_same_weights(tmp_path: Path, suffix: str) -> None:
    source, target = network(1), network(2)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    load_weights(target, path)
    assert_same_state(target, source.state_dict())


def test_format_before_zip_is_read(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    path = save(source.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    load_weights(target, path)
    assert_same_state(target, source.state_dict())


def test_compressed_archive_is_read(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    stored = save(source.state_dict(), tmp_path / "stored.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    load_weights(target, packed)
    assert_same_state(target, source.state_dict())


def test_file_written_on_a_gpu_is_read(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    here = save(source.state_dict(), tmp_path / "here.pt")
    there = tmp_path / "there.pt"
    with zipfile.ZipFile(here) as old, zipfile.ZipFile(there, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):  # the pickled name of a device, after its length
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, content)
    load_weights(target, there)
    assert_same_state(target, source.state_dict())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_wrapper_is_taken_off(tmp_path: Path, wrapper: str) -> None:
    source, target = network(1), network(2)
    path = save({wrapper: source.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pt")
    load_weights(target, path)
    assert_same_state(target, source.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefix_is_taken_off(tmp_path: Path, prefix: str, suffix: str) -> None:
    source, target = network(1), network(2)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = tmp_path / f"parallel{suffix}"
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, path)
    load_weights(target, path)
    assert_same_state(target, source.state_dict())


def test_data_parallel_checkpoint_is_read(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    path = save({"state_dict": nn.DataParallel(source).state_dict()}, tmp_path / "parallel.pth")
    load_weights(target, path)
    assert_same_state(target, source.state_dict())


def test_prefix_of_some_keys_only_stays(tmp_path: Path) -> None:
    model = network(2)
    state = dict(network(1).state_dict())
    state["module.classifier.bias"] = state.pop("classifier.bias")
    with pytest.raises(LoadError) as error:
        load_weights(model, save(state, tmp_path / "mixed.pt"))
    assert parts(error)[1] == (
        "missing keys: classifier.bias; unexpected keys: module.classifier.bias"
    )


def test_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = nn.ModuleDict({"module": nn.Linear(3, 2)})
    target = nn.ModuleDict({"module": nn.Linear(3, 2)})
    load_weights(target, save(source.state_dict(), tmp_path / "own.pt"))
    assert_same_state(target, source.state_dict())


@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight"])
def test_tied_weight_may_stand_under_one_name(tmp_path: Path, kept: str) -> None:
    torch.manual_seed(1)
    source = Tied()
    torch.manual_seed(2)
    target = Tied()
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_file({kept: source.embedding.weight.detach()}, path)
    load_weights(target, path)
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.embedding.weight, source.embedding.weight)


def test_missing_batch_counter_is_no_difference(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    state = dict(source.state_dict())
    del state["normalization.num_batches_tracked"]
    load_weights(target, save(state, tmp_path / "ancient.pt"))
    assert_same_state(target, source.state_dict())


def test_values_take_the_models_dtype(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    path = tmp_path / "half.safetensors"
    safetensors.torch.save_file(network(1).half().state_dict(), path)
    load_weights(target, path)
    assert target.classifier.weight.dtype == torch.float32
    # Half precision rounds to 11 bits: half a unit in the last place is 2^-11 = 4.9e-4 relative,
    # and numbers below its normal range (6e-5) are off by less than 3e-8.
    torch.testing.assert_close(
        target.classifier.weight, source.classifier.weight, rtol=4.9e-4, atol=3e-8
    )


def test_mapped_file_can_be_deleted_after_loading(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    path = save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(target, path)
    path.write_bytes(b"")
    assert_same_state(target, source.state_dict())


# ---------------------------------------------------------------- files that do not fit


def test_missing_and_unexpected_keys_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = network(2)
    before = snapshot(model)
    state = dict(network(1).state_dict())
    del state["classifier.weight"]
    state["head.weight"] = torch.ones(2)
    with pytest.raises(LoadError) as error:
        load_weights(model, save(state, tmp_path / "other.pt"))
    assert parts(error) == (
        f"The weights in '{tmp_path / 'other.pt'}' do not fit the model",
        "missing keys: classifier.weight; unexpected keys: head.weight",
        "Choose the weights of this very model, or load them in the callable that builds it",
    )
    assert_same_state(model, before)


def test_long_lists_are_cut_after_eight(tmp_path: Path) -> None:
    state = {f"layer{index:02}.weight": torch.full((2,), 3.0) for index in range(11)}
    with pytest.raises(LoadError) as error:
        load_weights(nn.ReLU(), save(state, tmp_path / "many.pt"))
    listed = ", ".join(f"layer{index:02}.weight" for index in range(8))
    assert parts(error)[1] == f"unexpected keys: {listed} and 3 more"


@pytest.mark.parametrize("count", [0, 1, 8])
def test_short_lists_are_whole(count: int) -> None:
    names = [f"n{index}" for index in range(count)]
    assert first_few(names) == ", ".join(names)


def test_shape_mismatch_is_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = network(2)
    before = snapshot(model)
    state = dict(network(1).state_dict())
    state["classifier.weight"] = torch.ones(9, 3)
    with pytest.raises(LoadError) as error:
        load_weights(model, save(state, tmp_path / "wide.pt"))
    assert parts(error)[1] == ("mismatches: classifier.weight (9x3:float32 instead of 4x3:float32)")
    assert_same_state(model, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_other_kind_of_number_is_a_mismatch(tmp_path: Path, dtype: torch.dtype) -> None:
    state = dict(network(1).state_dict())
    state["classifier.bias"] = torch.ones(4, dtype=dtype)
    with pytest.raises(LoadError, match=r"classifier\.bias \(4:\w+ instead of 4:float32\)"):
        load_weights(network(2), save(state, tmp_path / "kind.pt"))


def test_failing_load_hook_is_a_sentence(tmp_path: Path) -> None:
    class Strict(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
            raise RuntimeError("this layer is sealed\nand more lines")

    path = save(nn.Linear(3, 2).state_dict(), tmp_path / "sealed.pt")
    with pytest.raises(LoadError) as error:
        load_weights(Strict(3, 2), path)
    assert parts(error)[1:] == (
        "Its load_state_dict failed with RuntimeError: this layer is sealed",
        "Load the weights in the callable that builds the model",
    )


# ---------------------------------------------------------------- files that are refused


def test_missing_file_offers_the_closest_sibling(tmp_path: Path) -> None:
    (tmp_path / "resnet50.pt").write_bytes(b"something")
    path = tmp_path / "resnet5.pt"
    with pytest.raises(LoadError) as error:
        read_state_dict(path)
    assert parts(error) == (
        f"The weights file '{path}' cannot be read",
        "There is no such file",
        f"Did you mean '{tmp_path / 'resnet50.pt'}'?",
    )
    assert str(error.value).endswith("There is no such file. " + error.value.next_step)


@pytest.mark.parametrize("name", ["weights.pt", "no/such/folder/weights.pt"])
def test_missing_file_without_a_sibling(tmp_path: Path, name: str) -> None:
    with pytest.raises(LoadError) as error:
        read_state_dict(tmp_path / name)
    assert parts(error)[1:] == ("There is no such file", "Check the path")


def test_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "weights.pt"
    folder.mkdir()
    with pytest.raises(LoadError) as error:
        read_state_dict(folder)
    assert parts(error)[1:] == ("It is a folder", "Name a file in it")


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(LoadError) as error:
        read_state_dict(tmp_path / "pipe.pt")
    assert parts(error)[1:] == ("It is not a regular file", "Name a file on disk")


def test_impossible_name_is_refused() -> None:
    with pytest.raises(LoadError) as error:
        require_file(Path("w" * 5000 + ".pt"), "The file cannot be read")
    assert parts(error) == ("The file cannot be read", "File name too long", "Check the path")


@pytest.mark.parametrize("name", ["model.onnx", "model.bin", "model.pt2", "weights"])
def test_other_suffix_is_refused(tmp_path: Path, name: str) -> None:
    path = save(network(1).state_dict(), tmp_path / name)
    with pytest.raises(LoadError) as error:
        read_state_dict(path)
    assert parts(error)[1:] == (
        f"Its name ends in '{path.suffix}', and only .safetensors, .pt and .pth are weights",
        "Save model.state_dict() with safetensors.torch.save_file or with torch.save",
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.touch()
    with pytest.raises(LoadError) as error:
        read_state_dict(path, trust=True)
    assert parts(error)[1:] == ("It is empty", "Write or download it again")


def test_locked_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(network(1).state_dict(), tmp_path / "locked.pt")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a test may run as root, whom no mode keeps out
    with pytest.raises(LoadError) as error:
        read_state_dict(path)
    assert parts(error)[1:] == ("Permission denied", "Make it readable, or choose another file")


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2, 0.5, 0.9, 0.999])
def test_truncated_safetensors_is_refused(tmp_path: Path, share: float) -> None:
    whole = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(network(1).state_dict(), whole)
    content = whole.read_bytes()
    path = tmp_path / "short.safetensors"
    path.write_bytes(content[: max(1, int(len(content) * share))])
    with pytest.raises(LoadError) as error:
        read_state_dict(path)
    assert parts(error)[1].startswith(
        "It is cut short or no safetensors file (SafetensorError: Error while deserializing"
    )
    assert parts(error)[2] == "Write or download it again"


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0002, 0.002, 0.01, 0.2, 0.5, 0.9, 0.9999])
def test_truncated_pickle_is_refused(
    tmp_path: Path, share: float, zipped: bool, trust: bool
) -> None:
    whole = save(
        network(1).state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped
    )
    content = whole.read_bytes()
    path = tmp_path / "short.pt"
    path.write_bytes(content[: max(1, int(len(content) * share))])
    with pytest.raises(LoadError) as error:
        read_state_dict(path, trust=trust)
    if trust:
        assert parts(error)[1].startswith("Unpickling it failed with ")
        assert "\n" not in parts(error)[1]
    else:
        assert parts(error)[1:] == (
            "It is cut short or was not written by torch.save",
            "Write or download it again",
        )


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08 gzip", b"just a text\n" * 9, bytes(range(1, 255)), b"\x80\x02}q\x00."],
    ids=["gzip", "text", "bytes", "bare pickle"],
)
def test_foreign_content_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"cut short or was not written by torch\.save"):
        read_state_dict(path)


def test_zip_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.pt"
    for name in ("notes.txt", "archive/notes.txt", "archive/data.pkl"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "no pickle")
        with pytest.raises(LoadError) as error:
            read_state_dict(path)
        assert parts(error)[0] == f"The weights file '{path}' cannot be read"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.ones(3), "It holds a value of type 'Tensor'"),
        ([torch.ones(3)], "It holds a value of type 'list'"),
        (17, "It holds a value of type 'int'"),
        ({3: torch.ones(3)}, "Its key 3 is not a name"),
        ({"net": {"a": torch.ones(3)}}, "Its entry 'net' is of type 'dict', not a tensor"),
        ({"state_dict": {"lr": 0.1}}, "Its entry 'lr' is of type 'float', not a tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    path = save(content, tmp_path / "thing.pt")
    with pytest.raises(LoadError) as error:
        read_state_dict(path)
    assert parts(error) == (
        f"The weights file '{path}' holds no state dict",
        reason,
        "Save model.state_dict(), alone or under the key 'state_dict'",
    )


# ---------------------------------------------------------------- code in the file


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_payload_is_refused_and_does_not_run(tmp_path: Path, form: str) -> None:
    witness = tmp_path / "witness"
    content = {"weight": torch.ones(2), "payload": WritesFile(witness)}
    path = tmp_path / "payload.pt"
    if form == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(LoadError) as error:
        read_state_dict(path)
    assert not witness.exists()
    thing, cause, next_step = parts(error)
    assert thing == f"The weights file '{path}' cannot be read"
    assert cause.startswith("It refers to '")
    assert cause.endswith("which only unpickling can do, and unpickling runs code in the file")
    assert next_step == (
        "Save model.state_dict() alone, or pass --trust, which runs code in the file, "
        "if you trust who wrote it"
    )


def test_payload_in_a_new_pickle_protocol_does_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = save({"payload": WritesFile(witness)}, tmp_path / "payload.pt", pickle_protocol=4)
    with pytest.raises(LoadError, match="It holds more than tensors, which only unpickling can"):
        read_state_dict(path)
    assert not witness.exists()


def test_payload_named_safetensors_does_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = save({"payload": WritesFile(witness)}, tmp_path / "payload.safetensors")
    with pytest.raises(LoadError, match="cut short or no safetensors file"):
        read_state_dict(path, trust=True)
    assert not witness.exists()


def test_trusted_payload_runs(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = save({"payload": WritesFile(witness)}, tmp_path / "payload.pt")
    with pytest.raises(LoadError, match="Its entry 'payload' is of type 'NoneType'"):
        read_state_dict(path, trust=True)
    assert witness.exists()


def test_trusted_file_that_exits_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LoadError) as error:
        read_state_dict(save({"payload": Exits()}, tmp_path / "exit.pt"), trust=True)
    assert parts(error)[1:] == (
        "Unpickling it failed with SystemExit: 7",
        "Write it again as model.state_dict(), or make the classes in it importable",
    )


def test_number_of_numpy_wants_trust(tmp_path: Path) -> None:
    source, target = network(1), network(2)
    checkpoint = {"state_dict": source.state_dict(), "best": numpy.float64(0.75)}
    path = save(checkpoint, tmp_path / "scored.pt")
    with pytest.raises(LoadError, match="It refers to 'numpy"):
        load_weights(target, path)
    load_weights(target, path, trust=True)
    assert_same_state(target, source.state_dict())


@pytest.mark.parametrize("wrapped", [False, True])
def test_model_pickled_whole_wants_trust(tmp_path: Path, wrapped: bool) -> None:
    torch.manual_seed(1)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = save({"model": source} if wrapped else source, tmp_path / "whole.pt")
    with pytest.raises(LoadError, match=r"It refers to 'torch\.nn\.modules\.linear\.Linear'"):
        load_weights(target, path)
    load_weights(target, path, trust=True)
    assert_same_state(target, source.state_dict())


def test_torchscript_archive_wants_trust(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "script.pt"
    torch.jit.trace(source, torch.ones(1, 3)).save(path)  # type: ignore[no-untyped-call]
    with pytest.raises(LoadError, match="It holds more than tensors"):
        load_weights(target, path)
    load_weights(target, path, trust=True)
    assert_same_state(target, source.state_dict())


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_hostile_version_numbers_are_a_sentence_at_most(tmp_path: Path, prefix: str) -> None:
    weights = torch.arange(1.0, 7.0).reshape(2, 3)
    state = collections.OrderedDict(
        {f"{prefix}weight": weights, f"{prefix}bias": torch.tensor([3.0, -5.0])}
    )
    state._metadata = 5  # type: ignore[attr-defined]
    path = save(state, tmp_path / "hostile.pt")
    target = nn.Linear(3, 2)
    if prefix:  # taking it off makes a new dict, without the numbers
        load_weights(target, path)
        assert torch.equal(target.weight, weights)
    else:
        with pytest.raises(LoadError, match="Its load_state_dict failed with AttributeError"):
            load_weights(target, path)
