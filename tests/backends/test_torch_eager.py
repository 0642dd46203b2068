"""What only eager PyTorch has: arguments that aren't tensors, and settings it must put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfuse.backends.torch_eager import BACKEND
from optfuse.errors import EngineError
from optfuse.stages import BuildOptions, Program

# torch.export copies a tree specification in a way that PyTorch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Structured(nn.Module):
    def forward(self, batch: dict[str, Any], power: int, flag: None = None, *, offset: Any) -> Any:
        total = batch["a"] ** power + batch["b"].sum()
        return {"total": total, "rest": (offset + 1, None, 3)}


def captured(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    exported = torch.export.export(module.eval(), args, kwargs).run_decompositions({})
    return Program("example", exported.module(check_guards=False), exported, args, kwargs)


@pytest.fixture
def structured() -> Program:
    batch = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0, 5.0])}
    return captured(Structured(), (batch, 2, None), {"offset": torch.tensor([7])})


def test_only_the_tensors_among_the_arguments_are_replaced(structured: Program) -> None:
    with BACKEND.open(structured, BuildOptions()) as session:
        assert session.inputs == ("batch_a", "batch_b", "offset")
        session.bind([torch.tensor([3.0, 5.0]), torch.tensor([0.5, 0.25, 0.25]), torch.tensor([8])])
        session.run()
        total, offset = session.fetch()
        assert session.outputs == ("output_0", "output_1")
    assert total.tolist() == [10.0, 26.0]
    assert offset.tolist() == [9]
    assert structured.example_args[0]["a"].tolist() == [1.0, 2.0]


def test_it_runs_in_inference_mode_whatever_the_inputs_need() -> None:
    linear = nn.Linear(3, 2)
    program = captured(linear, (torch.ones(1, 3),), {})
    modes: list[bool] = []
    program.graph_module.register_forward_pre_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    with BACKEND.open(program, BuildOptions()) as session:
        session.bind([torch.full((1, 3), 2.0, requires_grad=True)])
        session.run()
        (output,) = session.fetch()
    assert modes == [True]
    assert not output.requires_grad
    # 1e-6: one float32 dot product of three terms.
    expected = linear(torch.full((1, 3), 2.0)).detach()
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_a_program_without_parameters_runs_where_its_inputs_are(structured: Program) -> None:
    assert BACKEND.open(structured, BuildOptions()).device == "cpu"


def test_the_thread_count_is_the_one_asked_for_and_put_back(structured: Program) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with BACKEND.open(structured, BuildOptions(threads=1)):
            assert torch.get_num_threads() == 1
            with BACKEND.open(structured, BuildOptions(threads=3)):
                assert torch.get_num_threads() == 3
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_thread_count_is_put_back_after_a_failure(structured: Program) -> None:
    before = torch.get_num_threads()
    with pytest.raises(EngineError), BACKEND.open(structured, BuildOptions(threads=1)) as session:
        session.run()
    assert torch.get_num_threads() == before


def test_a_failing_operator_is_one_sentence(structured: Program) -> None:
    linear = captured(nn.Linear(3, 2), (torch.ones(1, 3),), {})
    with BACKEND.open(linear, BuildOptions()) as session:
        session.bind([torch.ones(1, 5)])
        with pytest.raises(EngineError) as caught:
            session.run()
    assert caught.value.thing == "The engine 'torch' failed to run the program"
    assert "5" in caught.value.cause
    assert "\n" not in str(caught.value)
    assert caught.value.next_step == "Give it inputs with the shapes it was captured for"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
def test_on_a_gpu_tf32_is_off_while_it_runs_and_put_back() -> None:
    program = captured(nn.Linear(3, 2).cuda(), (torch.ones(1, 3).cuda(),), {})
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [flag.fp32_precision for flag in flags]
    with BACKEND.open(program, BuildOptions()) as session:
        assert session.device == torch.cuda.get_device_name(0)
        assert [flag.fp32_precision for flag in flags] == ["ieee"] * 3
        session.bind([torch.ones(1, 3)])
        session.run()
        assert session.fetch()[0].device.type == "cpu"
    assert [flag.fp32_precision for flag in flags] == before
