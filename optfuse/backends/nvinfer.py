"""What the packages `tensorrt` and `tensorrt_rtx` share: one API, and so one backend."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optfuse.backends import builder_log, engine_file
from optfuse.backends.engine_file import Built, Here
from optfuse.backends.nvidia import capability, device_target, gpu_count
from optfuse.backends.nvinfer_build import (
    build_for_later_gpus,
    check_gpu_for_later_ones,
    checked_plan,
    configuration,
    inputs_of,
    no_traceback,
    parsed_network,
    target_capabilities,
)
from optfuse.backends.nvinfer_cache import (
    CacheFile,
    attach_timing_cache,
    cache_file,
    keep_timing_cache,
)
from optfuse.backends.nvinfer_log import errors_of, message_logger, sentence_of
from optfuse.backends.nvinfer_runtime import Running, compiling_context
from optfuse.backends.nvinfer_session import NvinferSession
from optfuse.backends.onnx_places import file_sha256
from optfuse.backends.profiles import check_shapes
from optfuse.errors import EngineError, OptfuseError, UsageError
from optfuse.stages import Artifact, BuildOptions, EngineReport

if TYPE_CHECKING:
    from optfuse.stages import Program


class NvinferBackend:
    """An engine of the TensorRT family. Nothing of its package is imported before it is needed.

    Args:
        name: on the command line.
        package: the Python package.
        extra: of optfuse that installs the package.
        oldest: the first version (major, minor) that will do.
        targets: compute capabilities it builds for ahead of time, without a GPU; empty where it
            builds only on the GPU that is here.
        later_versions: a later version of its package can load an engine that is built for that.
        keeps: what is worth keeping for the next time: what the builder measured, or the kernels
            that are compiled when an engine is loaded.
    """

    builds = True

    def __init__(
        self,
        name: str,
        package: str,
        extra: str,
        oldest: tuple[int, int],
        targets: tuple[str, ...] = (),
        *,
        later_versions: bool,
        keeps: Literal["timing", "runtime"] = "timing",
    ) -> None:
        self.name = name
        # A protocol's attribute can be assigned to, so its type has to be the protocol's own.
        self.consumes: Literal["onnx", "program"] = "onnx"
        self.package = package
        self.extra = extra
        self.oldest = oldest
        self.targets = targets
        self.later_versions = later_versions
        self.keeps = keeps
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
        """Whether an engine can be built for `target` on a machine without a GPU; an engine without
        a list builds for the GPU that is here, and says so when it builds.

        Raises:
            UsageError: it cannot.
        """
        if self.targets and target not in self.targets:
            raise UsageError(
                f"{self.name} cannot build for '{target}'",
                f"The compute capabilities that it supports are {', '.join(self.targets)}: Turing, "
                "Ampere, Ada and Blackwell, but not Hopper (sm_90)",
                "Pass one of them as --target, or use the engine tensorrt on the GPU itself",
            )

    def check_options(self, options: BuildOptions) -> None:
        """Whether engines can be built here as these options ask for.

        Raises:
            UsageError: they cannot.
        """
        if options.version_compatible and not self.later_versions:
            raise UsageError(
                f"--version-compatible cannot be used with {self.name}",
                "It loads no engine of an earlier release, however that was built",
                "Leave the option out, or use the engine tensorrt on the GPU itself: pip install "
                "'optfuse[gpu]'",
            )
        here = None if self.targets else device_target()
        if options.hardware_compatible and here is not None:
            check_gpu_for_later_ones(self.name, here)

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, EngineReport]]:
        """Build one engine a target, into `directory/<target>.<variant>.engine`, and beside it what
        it is, `<target>.<variant>.engine.json`.

        Raises:
            EngineError: with the parser's or the builder's own reason.
            UsageError: a target or an option that this engine cannot be built for, or shapes that
                contradict each other or the network.
            OutputError: the file cannot be written.
        """
        missing = self.unavailable()
        if missing:
            raise EngineError(
                f"{self.name} cannot build an engine", missing, "Install it, or leave it out"
            )
        self.check_options(options)
        targets = self._targets(options)
        check_shapes(options.shapes)
        built: list[tuple[Artifact, EngineReport]] = []
        try:
            for target in targets:
                built.append(self._build_one(artifact, target, options, directory))
        except OptfuseError:
            for engine, _ in built:  # all of them, or none
                engine_file.remove(engine.path)
            raise
        return built

    def open(self, program: Artifact | Program, options: BuildOptions) -> NvinferSession:
        """Load an engine file on the GPU that is here.

        Raises:
            EngineError: there is no such GPU, or the file is not what its description says, or not
                for this GPU, version or these options. Nothing of it has reached the package then.
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

        device = torch.cuda.get_device_name()
        here = Here(self.name, str(self.version()), str(device_target()), device)
        content, built = engine_file.load(program.path, here, options)
        with no_traceback(f"{self.name} cannot run {program.path.name}"):
            engine = self._deserialise(content, program.path.name, built)
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            return NvinferSession(
                self._import(),
                engine,
                self._running(engine, built, options.cache, device),
                engine_file.named(program, built),
                self._log,
                torch.device("cuda"),
                stream,
                device,
            )

    def _targets(self, options: BuildOptions) -> tuple[str, ...]:
        for target in options.targets:
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
        self, artifact: Artifact, target: str, options: BuildOptions, directory: Path
    ) -> tuple[Artifact, EngineReport]:
        plan, built, build_seconds = self._plan(artifact, target, options)
        path = directory / f"{target}.{artifact.variant}.engine"
        engine = Artifact(
            path=path,
            kind="engine",
            sha256=engine_file.write(path, plan, built),
            size_bytes=plan.nbytes,
            variant=artifact.variant,
            input_names=artifact.input_names,
            output_names=artifact.output_names,
            trace=artifact.trace,
        )
        seen = builder_log.parse("\n".join(text for _, text in self._log.messages))
        self._log.messages.clear()
        return engine, EngineReport(
            engine=self.name,
            target=target,
            variant=artifact.variant,
            layers=seen.layers,
            activation_bytes=seen.activation_bytes,
            weight_bytes=seen.weight_bytes,
            size_bytes=engine.size_bytes,
            build_seconds=build_seconds,
            not_measured=self._not_measured(target, options.hardware_compatible),
        )

    def _plan(
        self, artifact: Artifact, target: str, options: BuildOptions
    ) -> tuple[memoryview, Built, float]:
        """The bytes of an engine, what it is, and how many seconds its builder took; what that said
        is in the log."""
        trt = self._import()
        log = self._logger(trt)
        log.messages.clear()
        failed = f"{self.name} cannot build {artifact.path.name} for {target}"
        with no_traceback(failed):
            builder = trt.Builder(log)
            network = parsed_network(trt, builder, log, artifact.path, options.shapes, failed)
            config = configuration(trt, builder, options, failed)
            oldest = self._aim(trt, config, target, options, failed)
            built = self._built(artifact, network, target, oldest, options)
            timings = self._cache_file("timing", options.cache, built, str(built.device))
            if timings:
                attach_timing_cache(config, timings)
            log.messages.clear()
            start = time.perf_counter()
            plan = builder.build_serialized_network(network, config)
            seconds = time.perf_counter() - start
        plan = checked_plan(plan, log.messages, artifact.path, failed)
        if timings:
            keep_timing_cache(config, timings)
        return memoryview(plan), built, seconds

    def _aim(self, trt: Any, config: Any, target: str, options: BuildOptions, failed: str) -> str:
        """Tell the builder which GPUs to build for; gives the least compute capability."""
        if not self.targets:
            if options.hardware_compatible:
                return build_for_later_gpus(trt, config, failed)
            return target
        later = self.targets[self.targets.index(target) + 1 :]
        wanted = (target, *(later if options.hardware_compatible else ()))
        if not target_capabilities(trt, config, wanted):
            raise EngineError(
                f"{self.name} {self.version()} cannot build for {target}",
                "This version of the package doesn't know that compute capability",
                f"Install a newer one: pip install --upgrade 'optfuse[{self.extra}]'",
            )
        return target

    def _built(
        self,
        artifact: Artifact,
        network: Any,
        target: str,
        oldest_target: str,
        options: BuildOptions,
    ) -> Built:
        import torch

        # What was built ahead of time runs on every GPU of that compute capability.
        device = None if self.targets else str(torch.cuda.get_device_name())
        return Built(
            onnx_sha256=file_sha256(artifact.path),
            package=self.name,
            version=str(self.version()),
            target=target,
            device=device,
            oldest_target=oldest_target,
            shapes=options.shapes,
            version_compatible=options.version_compatible,
            hardware_compatible=options.hardware_compatible,
            inputs=inputs_of(network, artifact.input_names),
            outputs=artifact.output_names,
        )

    def _not_measured(self, target: str, on_later_gpus: bool) -> str | None:
        reason = self.cannot_run()
        here = device_target()
        if reason or here is None or here == target:
            return reason
        if on_later_gpus and capability(here) > capability(target):
            return None
        return f"built for {target}, and the GPU here is {here}"

    def _cache_file(
        self, kind: Literal["timing", "runtime"], folder: Path | None, built: Built, device: str
    ) -> CacheFile | None:
        if folder is None or self.keeps != kind:
            return None
        depends_on = {**asdict(built), "device": device}
        return cache_file(folder, kind, self.name, built.version, built.target, depends_on)

    def _running(self, engine: Any, built: Built, folder: Path | None, device: str) -> Running:
        if self.keeps == "timing":
            return Running(engine.create_execution_context(), engine.create_execution_context)
        file = self._cache_file("runtime", folder, built, device)
        return compiling_context(self._import(), engine, file)

    def _deserialise(self, content: bytes, name: str, built: Built) -> Any:
        """The engine in these bytes.

        Raises:
            EngineError: the package refuses them.
        """
        trt = self._import()
        log = self._logger(trt)
        log.messages.clear()
        # The bindings let the engine keep its runtime alive.
        runtime = trt.Runtime(log)
        if built.version_compatible:
            # Such an engine carries the code of the runtime that it was built with.
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            # The first error: the ones behind it are its consequences.
            raise EngineError(
                f"{self.name} cannot load {name}",
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

    def refuses(self, precision: str) -> str | None:
        """None but for bf16 on a GPU from before Ampere. Ahead of time it is the builder that
        refuses a target without the instructions for it."""
        here = device_target() if precision == "bf16" else None
        if here is not None and capability(here) < 80:
            return f"The GPU here is {here}, and bf16 needs sm_80 or later"
        return None

    def widens(self, precision: str) -> str | None:
        """None: a network's types say what its layers compute in."""
        del precision
        return None


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
