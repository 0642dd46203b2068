"""What the packages `tensorrt` and `tensorrt_rtx` share: one API, and so one backend.

Neither package raises when a parse or a build fails: it hands back None or False and tells its
logger why. So every call here that can fail reads its reason out of the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optfuse.backends import builder_log
from optfuse.backends.nvidia import device_target, gpu_count
from optfuse.backends.nvinfer_log import errors_of, message_logger, sentence_of
from optfuse.backends.nvinfer_session import STATIC_SHAPES, NvinferSession
from optfuse.errors import EngineError, OutputError, UsageError
from optfuse.files import write_bytes
from optfuse.stages import Artifact, BuildOptions, EngineReport

if TYPE_CHECKING:
    from optfuse.stages import Program

_LEAVE_OUT = "Change the model at that place, or leave this engine out"
_DIGEST_BYTES = hashlib.sha256().digest_size


class NvinferBackend:
    """An engine of the TensorRT family. Nothing of its package is imported before it is needed.

    Args:
        name: on the command line.
        package: the Python package.
        extra: of optfuse that installs the package.
        oldest: the first version (major, minor) that will do.
        targets: compute capabilities it builds for ahead of time, without a GPU; empty where it
            builds only on the GPU that is here.
        keeps_timing_cache: whether measurements of one build are worth keeping for the next.
    """

    builds = True

    def __init__(
        self,
        name: str,
        package: str,
        extra: str,
        oldest: tuple[int, int],
        targets: tuple[str, ...] = (),
        keeps_timing_cache: bool = False,
    ) -> None:
        self.name = name
        # A protocol's attribute can be assigned to, so its type has to be the protocol's own.
        self.consumes: Literal["onnx", "program"] = "onnx"
        self.package = package
        self.extra = extra
        self.oldest = oldest
        self.targets = targets
        self.keeps_timing_cache = keeps_timing_cache
        # One for the whole process: TensorRT keeps using the first logger that it was given.
        self._log: Any = None

    def unavailable(self) -> str | None:
        """None where engines can be built here, else what is missing and how to get it."""
        version = self.version()
        install = f"pip install --upgrade 'optfuse[{self.extra}]'"
        if version is None:
            return f"The package {self.name} is not installed: pip install 'optfuse[{self.extra}]'"
        if _major_minor(version) < self.oldest:
            oldest = ".".join(map(str, self.oldest))
            return f"The package {self.name} {version} is older than {oldest}: {install}"
        if not self.targets and gpu_count() == 0:
            return (
                f"{self.name} builds only on a machine with an NVIDIA GPU, and there is none here"
            )
        return None

    def version(self) -> str | None:
        """The package's version, None where it isn't installed."""
        if importlib.util.find_spec(self.package) is None:
            return None
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:  # e.g. installed by a system's packages
            return str(self._import().__version__)

    def cannot_run(self) -> str | None:
        """None where an engine can run here, else why not."""
        import torch

        if not torch.cuda.is_available():
            return "no GPU" if gpu_count() == 0 else "this PyTorch was built without CUDA"
        return self.unavailable()

    def check_target(self, target: str) -> None:
        """Whether an engine can be built for `target` on a machine without a GPU.

        Raises:
            UsageError: it cannot.
        """
        if target not in self.targets:
            raise UsageError(
                f"{self.name} cannot build for '{target}'",
                f"The compute capabilities that it supports are {', '.join(self.targets)}: Turing, "
                "Ampere, Ada and Blackwell, but not Hopper (sm_90)",
                "Pass one of them as --target, or use the engine tensorrt on the GPU itself",
            )

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Build one engine a target, into `directory/<target>.<variant>.engine`.

        Raises:
            EngineError: with the parser's or the builder's own reason.
            UsageError: a target that this engine cannot be built for.
            OutputError: the file cannot be written.
        """
        missing = self.unavailable()
        if missing:
            raise EngineError(
                f"{self.name} cannot build an engine", missing, "Install it, or leave it out"
            )
        targets = self._targets(options)
        return [self._build_one(artifact, target, options.cache, directory) for target in targets]

    def open(
        self,
        program: Artifact | Program,
        options: BuildOptions,  # noqa: ARG002 - no choice of an engine is left when it is loaded
    ) -> NvinferSession:
        """Load an engine file on the GPU that is here.

        Raises:
            EngineError: there is no such GPU, or the file doesn't fit it.
        """
        if not isinstance(program, Artifact) or program.kind != "engine":
            raise EngineError(
                f"{self.name} cannot open this program",
                "It runs engine files only",
                "Build an engine from the program's ONNX file first",
            )
        reason = self.cannot_run()
        if reason:
            raise EngineError(
                f"{self.name} cannot run {program.path.name}",
                f"The reason is: {reason}",
                "Copy the file to a machine with the GPU that it was built for",
            )
        import torch

        engine = self._deserialise(program.path)
        name = torch.cuda.get_device_name()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with _no_traceback(f"{self.name} cannot run {program.path.name}"):
            return NvinferSession(engine, program, self._log, torch.device("cuda"), stream, name)

    def _targets(self, options: BuildOptions) -> tuple[str, ...]:
        for target in options.targets if self.targets else ():
            self.check_target(target)
        if self.targets and options.targets:
            return tuple(dict.fromkeys(options.targets))
        here = device_target()
        if here is None:
            raise EngineError(
                f"{self.name} has nothing to build for",
                f"It was given no --target, and this machine cannot stand in for one: "
                f"{self.cannot_run()}",
                "Pass --target sm_89 to the engine tensorrt-rtx, or the compute capability of "
                "your own GPU",
            )
        if self.targets:
            self.check_target(here)
        elif options.targets and here not in options.targets:
            raise EngineError(
                f"{self.name} cannot build for {', '.join(options.targets)}",
                f"It builds only for the GPU that is here, which is {here}",
                f"Pass --target {here}, or use the engine tensorrt-rtx",
            )
        return (here,)

    def _build_one(
        self, artifact: Artifact, target: str, cache: Path | None, directory: Path
    ) -> tuple[Artifact, EngineReport]:
        trt = self._import()
        log = self._logger(trt)
        timings = self._timing_cache_file(cache, target)
        failed = f"{self.name} cannot build {artifact.path.name} for {target}"
        with _no_traceback(failed):
            builder = trt.Builder(log)
            network = builder.create_network(network_flags(trt))
            _parse(trt, network, log, artifact.path, failed)
            config = self._configure(trt, builder, target)
            if timings:
                attach_timing_cache(config, timings)
            log.messages.clear()
            start = time.perf_counter()
            plan = builder.build_serialized_network(network, config)
            build_seconds = time.perf_counter() - start
        if plan is None:
            raise EngineError(failed, sentence_of(errors_of(log.messages)[-1:]), _LEAVE_OUT)
        if timings:
            keep_timing_cache(config, timings)
        engine = _write_engine(plan, artifact, directory / f"{target}.{artifact.variant}.engine")
        seen = builder_log.parse("\n".join(text for _, text in log.messages))
        log.messages.clear()
        return engine, EngineReport(
            engine=self.name,
            target=target,
            variant=artifact.variant,
            layers=seen.layers,
            activation_bytes=seen.activation_bytes,
            weight_bytes=seen.weight_bytes,
            size_bytes=engine.size_bytes,
            build_seconds=build_seconds,
            not_measured=self._not_measured(target),
        )

    def _configure(self, trt: Any, builder: Any, target: str) -> Any:
        config = builder.create_builder_config()
        # On by default: it would round the inputs of every convolution to 10 bits of mantissa.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.targets:
            capability = getattr(trt.ComputeCapability, target.replace("_", "").upper(), None)
            config.num_compute_capabilities = 1
            if capability is None or not config.set_compute_capability(capability, 0):
                raise EngineError(
                    f"{self.name} {self.version()} cannot build for {target}",
                    "This version of the package doesn't know that compute capability",
                    f"Install a newer one: pip install --upgrade 'optfuse[{self.extra}]'",
                )
        return config

    def _not_measured(self, target: str) -> str | None:
        reason = self.cannot_run()
        here = device_target()
        if reason is None and here != target:
            return f"built for {target}, and the GPU here is {here}"
        return reason

    def _timing_cache_file(self, cache: Path | None, target: str) -> Path | None:
        if cache is None or not self.keeps_timing_cache:
            return None
        return cache / f"{self.package}-{self.version()}-{target}.timing"

    def _deserialise(self, path: Path) -> Any:
        """The engine in a file.

        Raises:
            EngineError: it cannot be read, or belongs to another GPU or version.
        """
        trt = self._import()
        log = self._logger(trt)
        failed = f"{self.name} cannot load {path.name}"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EngineError(failed, str(error), "Build the engine again") from error
        log.messages.clear()
        with _no_traceback(failed):
            # The bindings let the engine keep its runtime alive.
            engine = trt.Runtime(log).deserialize_cuda_engine(content)
        if engine is None:
            # The first error: the ones behind it are its consequences.
            raise EngineError(
                failed,
                sentence_of(errors_of(log.messages)[:1]),
                "Build it again, with this version and for this GPU",
            )
        return engine

    def _import(self) -> Any:
        try:
            return importlib.import_module(self.package)
        except (ImportError, OSError) as error:  # OSError: a shared library of it doesn't load
            raise EngineError(
                f"The package {self.name} cannot be imported",
                str(error),
                f"Install it again: pip install --force-reinstall 'optfuse[{self.extra}]'",
            ) from error

    def _logger(self, trt: Any) -> Any:
        if self._log is None:
            self._log = message_logger(trt)
        return self._log


def network_flags(trt: Any) -> int:
    """Precision is what the ONNX says: TensorRT 10 needs a flag for it, and 11 may lack it."""
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if strongly_typed is None else 1 << int(strongly_typed)


def attach_timing_cache(config: Any, file: Path) -> None:
    """Give the builder the measurements of earlier builds; a file that is damaged counts as none.

    The file is the sha256 of the cache and then the cache, so that no damaged bytes reach the
    package's own reader.
    """
    try:
        stored = file.read_bytes()
    except OSError:
        stored = b""
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        content = b""
    # An empty cache where the package refuses the stored one, e.g. of another driver.
    for offered in (content, b""):
        cache = config.create_timing_cache(offered)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def keep_timing_cache(config: Any, file: Path) -> None:
    """Keep the builder's measurements for the next build."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    content = bytes(cache.serialize())
    # A cache that can't be kept costs time at the next build, and never a result.
    with contextlib.suppress(OutputError):
        write_bytes(file, hashlib.sha256(content).digest() + content)


def _parse(trt: Any, network: Any, log: Any, path: Path, failed: str) -> None:
    if not path.is_file():
        raise EngineError(failed, f"There is no file {path}", "Export the model first")
    # It owns the weights until the engine is built: the bindings let the network keep it alive.
    parser = trt.OnnxParser(network, log)
    # By path: weights in a second file are found beside it.
    if not parser.parse_from_file(str(path)):
        raise EngineError(failed, _parser_error(parser, log), _LEAVE_OUT)
    if network.num_outputs == 0:  # the parser's answer to a file that holds no ONNX at all
        raise EngineError(failed, "The file holds no ONNX graph", "Export the model again")
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(size < 0 for size in tensor.shape):
            shape = "x".join("?" if size < 0 else str(size) for size in tensor.shape)
            raise EngineError(
                failed,
                f"Its input '{tensor.name}', {shape}, has dimensions that are open",
                STATIC_SHAPES,
            )


def _parser_error(parser: Any, log: Any) -> str:
    if parser.num_errors == 0:
        return sentence_of(errors_of(log.messages)[-1:])
    error = parser.get_error(0)
    cause = sentence_of([error.desc()])
    if not error.node_name():
        return cause
    return (
        f"Its parser stopped at the node '{error.node_name()}' ({error.node_operator()}): {cause}"
    )


@contextlib.contextmanager
def _no_traceback(failed: str) -> Iterator[None]:
    """The bindings raise where a constructor gives nothing, e.g. for want of memory."""
    try:
        yield
    except (TypeError, RuntimeError, MemoryError) as error:
        cause = sentence_of([str(error)]) if str(error) else "It ran out of memory"
        raise EngineError(failed, cause, _LEAVE_OUT) from error


def _write_engine(plan: Any, source: Artifact, path: Path) -> Artifact:
    content = memoryview(plan)
    write_bytes(path, content)
    return Artifact(
        path=path,
        kind="engine",
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=content.nbytes,
        variant=source.variant,
        input_names=source.input_names,
        output_names=source.output_names,
        trace=source.trace,
    )


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
