"""What the engines that run a captured program in PyTorch have in common: all but the call."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optfuse.backends.given import nothing_bound, require_fitting
from optfuse.environment import package_version
from optfuse.errors import EngineError
from optfuse.stages import Artifact, BuildOptions, EngineReport, Program

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self


class ProgramBackend(ABC):
    """An engine that runs programs in PyTorch, on the device their parameters are on."""

    name: str
    # A protocol's attribute can be assigned to, so its type has to be the protocol's own.
    consumes: Literal["onnx", "program"] = "program"
    builds = False

    def unavailable(self) -> str | None:
        """None where PyTorch is installed."""
        if find_spec("torch") is None:
            return "The package torch is not installed: pip install torch"
        return None

    def version(self) -> str | None:
        """PyTorch's version."""
        return package_version("torch")

    def cannot_run(self) -> str | None:
        """None where it can run here, else why not."""
        return self.unavailable()

    def refuses(self, precision: str) -> str | None:
        """None but for int8. On a CPU without instructions for fp16, PyTorch's convolutions in it
        are over twenty times slower than in float32."""
        if precision == "int8":
            return "It runs captured programs, and int8 is written into ONNX files only"
        return None

    def widens(self, precision: str) -> str | None:
        """None: PyTorch computes in the dtypes of the program."""
        del precision
        return None

    def check_target(self, target: str) -> None:
        """Nothing: there is no build step."""
        del target

    def check_options(self, options: BuildOptions) -> None:
        """Nothing: there is no build step."""
        del options

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Nothing: there is no build step."""
        del artifact, options, directory
        return []

    def open(self, program: Artifact | Program, options: BuildOptions) -> ProgramSession:
        """A session on the program.

        Raises:
            EngineError: it was given a file, or the program cannot be run this way.
        """
        if not isinstance(program, Program):
            raise EngineError(
                f"The engine '{self.name}' cannot open a file",
                f"It runs a captured program, and '{program.path}' is an {program.kind} file",
                "Open the file with the engine 'onnxruntime'",
            )
        return self._session(program, options)

    @abstractmethod
    def _session(self, program: Program, options: BuildOptions) -> ProgramSession:
        """What `open` returns."""


class ProgramSession:
    """A program with its example inputs' tensors replaced by the ones bound.

    What else is among the example inputs (numbers, flags, None) stays as it is: torch.export has
    burnt it into the program. While the session is entered, PyTorch's thread count is the one
    asked for and, on a CUDA device, TF32 is off; both are put back on exit.

    Args:
        engine: its name, for errors.
        program: what is run.
        threads: of a CPU.

    Attributes:
        inputs: the program's placeholders that take a tensor, e.g. `x` or `batch_mask`.
        outputs: `output_0`, `output_1` ...; outputs that aren't tensors are left out.
        device: `cpu` or the CUDA device's name.
    """

    def __init__(self, engine: str, program: Program, threads: int) -> None:
        import torch
        from torch.utils import _pytree

        self._engine = engine
        self._graph_module = program.graph_module
        self._threads = threads
        self._restore = ExitStack()
        self._leaves, self._structure = _pytree.tree_flatten(
            (program.example_args, dict(program.example_kwargs))
        )
        self._tensor_positions = [
            index for index, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)
        ]
        self._torch_device = _device_of(program)
        self.device = (
            torch.cuda.get_device_name(self._torch_device)
            if self._torch_device.type == "cuda"
            else self._torch_device.type
        )
        self.inputs = self._input_names()
        self.outputs = self._output_names()
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._results: list[torch.Tensor] = []

    def bind(self, feeds: Sequence[torch.Tensor]) -> None:
        """Hand over the inputs.

        Raises:
            EngineError: their number or a dtype is not what the program takes.
        """
        self._check(feeds)
        self._arguments = self._arguments_of(
            [feed.detach().to(self._torch_device) for feed in feeds]
        )

    def run(self) -> None:
        """Run once and wait for the result.

        Raises:
            EngineError: PyTorch refused, e.g. a shape the program wasn't captured for.
        """
        if self._arguments is None:
            raise nothing_bound(self._engine)
        self._run(self._graph_module)

    def fetch(self) -> list[torch.Tensor]:
        """Copies of the last run's outputs, on the CPU."""
        return [result.detach().cpu().clone() for result in self._results]

    def __enter__(self) -> Self:
        self._restore.enter_context(self._settings())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore.close()
        self._arguments = None
        self._results = []

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """PyTorch as it is set while this session runs."""
        import torch

        with ExitStack() as restore:
            restore.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self._threads)
            if self._torch_device.type == "cuda":
                backends: Any = torch.backends
                # Not the older `allow_tf32` flags: only these can be put back exactly.
                for flags in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                    restore.callback(setattr, flags, "fp32_precision", flags.fp32_precision)
                    flags.fp32_precision = "ieee"
            yield

    def _run(self, function: Callable[..., Any]) -> None:
        """Call it with what is bound, and keep the tensors it returns."""
        import torch

        assert self._arguments is not None
        args, kwargs = self._arguments
        try:
            with torch.inference_mode():
                results = function(*args, **kwargs)
            self._wait()
        except Exception as error:  # an operator may raise anything
            raise EngineError(
                f"The engine '{self._engine}' failed to run the program",
                first_line(error),
                "Give it inputs with the shapes it was captured for",
            ) from error
        self._results = tensors_in(results)

    def _wait(self) -> None:
        import torch

        if self._torch_device.type == "cuda":
            torch.cuda.synchronize(self._torch_device)

    def _arguments_of(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the program is called with: the example inputs, with these tensors in them."""
        from torch.utils import _pytree

        leaves = list(self._leaves)
        for position, tensor in zip(self._tensor_positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = _pytree.tree_unflatten(leaves, self._structure)
        return args, kwargs

    def _examples(self) -> list[torch.Tensor]:
        """The tensors among the example inputs."""
        return [self._leaves[position] for position in self._tensor_positions]

    def _check(self, feeds: Sequence[torch.Tensor]) -> None:
        dtypes = [_short(example.dtype) for example in self._examples()]
        require_fitting(self._engine, "program", self.inputs, dtypes, feeds)

    def _input_names(self) -> tuple[str, ...]:
        placeholders = self._graph_module.graph.find_nodes(op="placeholder")
        return tuple(str(placeholders[position].target) for position in self._tensor_positions)

    def _output_names(self) -> tuple[str, ...]:
        import torch

        (returned,) = self._graph_module.graph.output_node().args
        values = returned if isinstance(returned, (tuple, list)) else (returned,)
        count = sum(isinstance(value, torch.fx.Node) for value in values)
        return tuple(f"output_{index}" for index in range(count))


def moved(program: Program, device: str) -> Program:
    """A copy of the program's graph, its tensors and its example inputs on another device.

    The program stays as it is; a tensor that lies on that device already is shared with it. The
    copy's `exported` is the program's own, on its own device.
    """
    import torch
    from torch.utils import _pytree

    place = torch.device(device)

    def there(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(tensor.detach().to(place), requires_grad=False)
        return tensor.detach().to(place)

    held = _tensors_held(program.graph_module)
    # A copy takes from its memo what it finds there: the tensors, on their new device.
    module = copy.deepcopy(program.graph_module, {id(each): there(each) for each in held})
    for each in _graph_modules(module):
        for node in each.graph.nodes:
            node.args, node.kwargs = torch.fx.node.map_aggregate(
                (node.args, node.kwargs),
                lambda value: place if isinstance(value, torch.device) else value,
            )
        each.recompile()
    args, kwargs = _pytree.tree_map_only(
        torch.Tensor, there, (program.example_args, dict(program.example_kwargs))
    )
    return replace(program, graph_module=module, example_args=args, example_kwargs=kwargs)


def _graph_modules(module: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """Itself, and the branches of its control flow."""
    import torch

    return [each for each in module.modules() if isinstance(each, torch.fx.GraphModule)]


def _tensors_held(module: torch.fx.GraphModule) -> list[torch.Tensor]:
    """Parameters, buffers, and the constants that are neither."""
    import torch

    constants = [
        value
        for each in module.modules()
        for value in vars(each).values()
        if isinstance(value, torch.Tensor)
    ]
    return [*module.parameters(), *module.buffers(), *constants]


def tensors_in(results: Any) -> list[torch.Tensor]:
    """The tensors among what a program returned, in its order."""
    import torch
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that PyTorch adds."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _device_of(program: Program) -> torch.device:
    """Where the parameters are, or the example inputs of a program without any; else the CPU."""
    import torch
    from torch.utils import _pytree

    module = program.graph_module
    examples = _pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    for tensor in (*module.parameters(), *module.buffers(), *examples):
        if isinstance(tensor, torch.Tensor):
            return tensor.device
    return torch.device("cpu")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
