"""Sessions of the TensorRT family, with fake engines that compute in the CPU's memory."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optfuse.backends import nvinfer_session
from optfuse.backends.nvinfer_runtime import Running
from optfuse.backends.nvinfer_session import NvinferSession
from optfuse.errors import EngineError
from optfuse.stages import Artifact


class FakeEngine:
    """Computes difference = left - right on the memory that it was given; both are 2x3, or Nx3 with
    N from 1 to 4 where they are open."""

    def __init__(self, *, open_batch: bool = False, **tensors: Any) -> None:
        shape = (-1, 3) if open_batch else (2, 3)
        self.tensors: dict[str, tuple[str, str, tuple[int, ...]]] = tensors or {
            "right": ("INPUT", "FLOAT", shape),
            "left": ("INPUT", "FLOAT", shape),
            "difference": ("OUTPUT", "FLOAT", shape),
        }
        self.num_io_tensors = len(self.tensors)
        self.contexts: list[FakeContext] = []
        self.on_host: set[str] = set()

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.tensors[name][1])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="HOST" if name in self.on_host else "DEVICE")

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return [[1, 3], [2, 3], [4, 3]]

    def create_execution_context(self) -> "FakeContext":
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]

    def create_engine_inspector(self) -> SimpleNamespace:
        layers = [{"Name": name, "LayerType": "kgen"} for name in ("subtract", "copy")]
        text = json.dumps({"Layers": layers})
        return SimpleNamespace(get_engine_information=lambda kind: text)


class FakeContext:
    """Runs at once, on the addresses and shapes that it was told."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.asked: list[str] = []
        self.succeeds = True
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        self.asked.append(name)
        wanted = self.engine.tensors[name][2]
        return self.shapes["left"] if wanted[0] == -1 and "left" in self.shapes else wanted

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        if not self.succeeds:
            return False
        count = self.shapes["left"][0] * 3
        left, right, difference = (
            (ctypes.c_float * count).from_address(self.addresses[name])
            for name in ("left", "right", "difference")
        )
        for index in range(count):
            difference[index] = left[index] - right[index]
        if self.profiler is not None:
            # 2, 4, 6, ... milliseconds: a median is not the mean of the last two by chance.
            self.profiler.report_layer_time("subtract", 2.0 * len(self.streams))
        return True


class FakeStream:
    cuda_stream = 1234

    def __init__(self) -> None:
        self.waits = 0
        self.error: str | None = None

    def synchronize(self) -> None:
        self.waits += 1
        if self.error:
            raise RuntimeError(self.error)


class FakePackage:
    LayerInformationFormat = SimpleNamespace(JSON="JSON")

    class IProfiler:
        pass


class Recorder:
    """In place of `recorded`: notes what was recorded, and plays back by running it again."""

    def __init__(self) -> None:
        self.made = 0
        self.played = 0
        self.can = True

    def __call__(self, queue: Callable[[Any], bool], stream: Any) -> Callable[[], None] | None:
        self.made += 1
        if not self.can:
            return None

        def play() -> None:
            self.played += 1
            queue(stream)

        return play


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(nvinfer_session, "recorded", found)
    return found


def session(
    engine: FakeEngine,
    stream: FakeStream | None = None,
    inputs: tuple[str, ...] = ("left", "right"),
    outputs: tuple[str, ...] = ("difference",),
    **running: Any,
) -> NvinferSession:
    return NvinferSession(
        FakePackage(),
        engine,
        Running(
            **{
                "context": engine.create_execution_context(),
                "to_profile": engine.create_execution_context,
                **running,
            }
        ),
        Artifact(Path("sm_90.engine"), "engine", "a" * 64, 1, "optimized", inputs, outputs),
        SimpleNamespace(messages=[("INFO", "loaded"), ("ERROR", "out of device memory")]),
        torch.device("cpu"),
        stream or FakeStream(),
        "NVIDIA H200",
    )


def rows(count: int, seed: int) -> torch.Tensor:
    """Sums of few powers of two: differences are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 99, (count, 3), generator=generator) / 4


def test_a_session_takes_and_gives_tensors_in_the_programs_order(recorder: Recorder) -> None:
    engine, stream = FakeEngine(), FakeStream()
    left = torch.tensor([[1.5, 2.5, 4.5], [8.5, 16.5, 32.5]])
    right = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]]).T  # not contiguous
    with session(engine, stream) as opened:
        assert (opened.inputs, opened.outputs) == (("left", "right"), ("difference",))
        assert opened.device == "NVIDIA H200"
        opened.bind([left, right])
        assert opened.plays_back
        opened.run()
        (first,) = opened.fetch()
        assert torch.equal(first, left - right)
        opened.bind([right.contiguous(), left])
        opened.run()
        (second,) = opened.fetch()
    assert torch.equal(second, right - left)
    assert torch.equal(first, left - right)  # its memory is its own
    # Once unrecorded, so that nothing is set aside in the recording; then it is played back.
    assert set(engine.contexts[0].streams) == {1234}
    assert (recorder.made, recorder.played, stream.waits) == (1, 2, 3)


def test_another_shape_is_recorded_anew(recorder: Recorder) -> None:
    engine = FakeEngine(open_batch=True)
    with session(engine) as opened:
        for times, count in enumerate((1, 4, 2), start=1):
            for seed in 1, 2:
                left, right = rows(count, seed), rows(count, seed + 10)
                opened.bind([left, right])
                opened.run()
                (found,) = opened.fetch()
                assert torch.equal(found, left - right)
            assert recorder.made == times
            assert engine.contexts[0].shapes == {"left": (count, 3), "right": (count, 3)}


@pytest.mark.parametrize("count", [5, 0])
def test_a_shape_out_of_the_profile_is_refused_and_the_session_goes_on(count: int) -> None:
    with session(FakeEngine(open_batch=True)) as opened:
        opened.bind([rows(2, 1), rows(2, 2)])
        with pytest.raises(EngineError) as refused:
            opened.bind([rows(count, 1), rows(count, 2)])
        assert str(refused.value) == (
            f"The engine sm_90.engine cannot run. Its input 'left' was given {count}x3, and it was "
            "built for 1x3 to 4x3. Build it for a wider range with --dim."
        )
        opened.run()
        assert torch.equal(opened.fetch()[0], rows(2, 1) - rows(2, 2))


def test_what_cannot_be_recorded_runs_without(recorder: Recorder) -> None:
    recorder.can = False
    with session(FakeEngine()) as opened:
        opened.bind([rows(2, 1), rows(2, 2)])
        assert not opened.plays_back
        opened.run()
        assert torch.equal(opened.fetch()[0], rows(2, 1) - rows(2, 2))


def test_a_package_that_records_by_itself_is_left_to_it(recorder: Recorder) -> None:
    with session(FakeEngine(), records=False) as opened:
        opened.bind([rows(2, 1), rows(2, 2)])
        opened.run()
        assert torch.equal(opened.fetch()[0], rows(2, 1) - rows(2, 2))
    assert recorder.made == 0


def test_a_context_that_says_it_cannot_be_recorded_is_not(recorder: Recorder) -> None:
    engine = FakeEngine()
    opened = session(engine)
    engine.contexts[0].is_stream_capturable = lambda stream: False  # type: ignore[attr-defined]
    opened.bind([rows(2, 1), rows(2, 2)])
    assert recorder.made == 0


def test_what_was_recorded_for_another_shape_is_never_played_back(recorder: Recorder) -> None:
    engine = FakeEngine(open_batch=True)
    opened = session(engine)
    opened.bind([rows(2, 1), rows(2, 2)])
    assert opened.plays_back
    engine.contexts[0].is_stream_capturable = lambda stream: False  # type: ignore[attr-defined]
    opened.bind([rows(3, 1), rows(3, 2)])
    assert not opened.plays_back
    opened.run()
    assert torch.equal(opened.fetch()[0], rows(3, 1) - rows(3, 2))
    assert recorder.played == 0


def test_values_on_the_host_are_read_anew_by_every_run(recorder: Recorder) -> None:
    engine = FakeEngine()
    engine.on_host = {"right"}
    with session(engine) as opened:
        for seed in 1, 2:
            opened.bind([rows(2, 1), rows(2, seed)])
            opened.run()
            assert torch.equal(opened.fetch()[0], rows(2, 1) - rows(2, seed))
    assert recorder.made == 0
    # They may change the shapes of outputs, which are asked for every time.
    assert engine.contexts[0].asked == ["difference", "difference"]


def test_at_the_end_the_kernels_are_kept_while_the_engine_is_there() -> None:
    seen: list[bool] = []
    opened = session(FakeEngine(), at_the_end=lambda: seen.append(opened._engine is not None))
    with opened:
        assert seen == []
    assert seen == [True]


def test_the_layers_with_their_times() -> None:
    engine = FakeEngine()
    with session(engine) as opened:
        opened.bind([rows(2, 1), rows(2, 2)])
        subtract, copy = opened.layers()
        opened.run()
        assert torch.equal(opened.fetch()[0], rows(2, 1) - rows(2, 2))
    profiled = engine.contexts[1]
    assert len(profiled.streams) == nvinfer_session.PROFILED_RUNS + 1
    # The runs after the first took 4, 6, ... 42 ms.
    assert (subtract.name, subtract.milliseconds) == ("subtract", 23.0)
    assert (copy.name, copy.milliseconds) == ("copy", None)
    with pytest.raises(EngineError, match="No inputs were bound"):
        session(FakeEngine()).layers()


def test_without_names_the_engines_own_order_holds() -> None:
    assert session(FakeEngine(), inputs=(), outputs=()).inputs == ("right", "left")


@pytest.mark.parametrize(
    ("feeds", "cause"),
    [
        ([torch.ones(2, 3)], "It has 2 inputs and was given 1"),
        (
            [torch.ones(2, 3), torch.ones(1, 3)],
            "Its input 'right' is 2x3 float32 and was given 1x3 float32",
        ),
        (
            [torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3)],
            "Its input 'left' is 2x3 float32 and was given 2x3 float64",
        ),
    ],
)
def test_feeds_that_do_not_fit(feeds: list[torch.Tensor], cause: str) -> None:
    with pytest.raises(EngineError) as refused:
        session(FakeEngine()).bind(feeds)
    assert refused.value.thing == "The engine sm_90.engine cannot run"
    assert refused.value.cause == cause


def test_an_engine_of_another_program() -> None:
    with pytest.raises(EngineError) as refused:
        session(FakeEngine(), inputs=("image",))
    assert refused.value.cause == "Its inputs are right, left, and the program's image"
    with pytest.raises(EngineError, match="Its outputs are difference, and the program's score"):
        session(FakeEngine(), outputs=("score",))


def test_shapes_and_data_types_that_cannot_be_held() -> None:
    found = session(FakeEngine(found=("OUTPUT", "INT64", (-1, 4))), inputs=(), outputs=())
    with pytest.raises(EngineError, match="The shape of 'found' is known only when it has run"):
        found.bind([])
    with pytest.raises(EngineError, match="PyTorch has no data type for its 'packed'"):
        session(FakeEngine(packed=("OUTPUT", "FP4", (2, 4))), inputs=(), outputs=())


def test_every_data_type_is_one_of_torchs() -> None:
    for name in nvinfer_session.TORCH_DTYPES.values():
        assert isinstance(getattr(torch, name), torch.dtype)


def test_a_gpu_that_refuses() -> None:
    engine, stream = FakeEngine(), FakeStream()
    opened = session(engine, stream)
    with pytest.raises(EngineError, match="No inputs were bound"):
        opened.run()
    opened.bind([torch.ones(2, 3), torch.full((2, 3), 0.5)])
    stream.error = "CUDA error: an illegal memory access was encountered\nand more"
    with pytest.raises(EngineError, match="an illegal memory access was encountered and more"):
        opened.run()
    stream.error = None
    engine.contexts[0].succeeds = False
    with pytest.raises(EngineError, match="out of device memory"):
        session(FakeEngine(), context=engine.contexts[0]).bind([rows(2, 1), rows(2, 2)])
    with pytest.raises(EngineError, match="out of device memory"):
        session(engine, context=None)
