"""`teamlora-export trt`: a bundle in, an engine and its facts out.

    prepare the graph -> parse -> profiles and flags -> build -> write both files aside, then move them

The same code drives TensorRT and TensorRT-RTX, whose packages have one interface; what differs is in `runtime.py` and
in `_targets` below.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teamlora_export import __version__
from teamlora_export.bundle import ENGINES_NAME, Bundle, check_files
from teamlora_export.cache import cache_folder
from teamlora_export.dtypes import DTYPES
from teamlora_export.engine.facts import (
    FORMAT_VERSION,
    SHELF_FORMAT_VERSION,
    EngineFacts,
    EnginePlugin,
    PluginTimes,
    refuse_foreign_engine,
    write_engine,
)
from teamlora_export.engine.plugin import PluginLibrary, find_plugin, load_plugin
from teamlora_export.engine.prepare import prepared_model, refuse_other_dtype_of_slots, slot_inputs
from teamlora_export.engine.profiles import ShapeProfile, capacity_of, make_profiles
from teamlora_export.engine.progress import BuildProgress, run_cancellable
from teamlora_export.engine.runtime import Messages, TensorRT, open_runtime
from teamlora_export.engine.timing import time_engine
from teamlora_export.errors import ExportError
from teamlora_export.files import read_bytes
from teamlora_export.progress import Reporter
from teamlora_export.staging import existing, write_aside

_MOST_WARNINGS = 3
_LARGEST_TIMINGS = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """What a user can choose.

    Attributes:
        dtype: fp32, fp16 or bf16; None: the bundle's.
        runtime: auto, tensorrt or rtx.
        shapes: as `make_profiles` takes them.
        use_plugin: leave the op to the plugin where the runtime takes plugins; else its body is inlined.
        compare: build with the plugin and without, time both, and keep the faster.
        plugin: a library to use instead of one that is built here.
        architectures: compute capabilities, without the dot, that the plugin is compiled for; None: see `find_plugin`.
        capabilities: compute capabilities that an RTX engine is for, such as "8.9"; none: the machine's GPU, or all.
        memory_gb: of workspace at most.
        optimization_level: 0 to 5, as TensorRT defines them.
        refit: the adapter's weights can be exchanged later.
        strip_weights: the engine holds no weights, and gets the bundle's when it is loaded.
        timing_cache: a file to keep tactic timings in; None: one in the user's cache for this GPU and version.
    """

    dtype: str | None = None
    runtime: str = "auto"
    shapes: str | None = None
    use_plugin: bool = True
    compare: bool = False
    plugin: Path | None = None
    architectures: tuple[str, ...] | None = None
    capabilities: tuple[str, ...] = ()
    memory_gb: float | None = None
    optimization_level: int | None = None
    refit: bool = False
    strip_weights: bool = False
    timing_cache: Path | None = None


def build_engine(
    bundle: Bundle, options: BuildOptions, output: Path | None = None, reporter: Reporter | None = None
) -> tuple[Path, EngineFacts]:
    """Build an engine of `bundle`; returns its path and its facts.

    Args:
        output: NAME.engine to write; None: `engines/DTYPE-RUNTIME.engine` in the bundle. NAME.json comes beside it.

    Raises:
        ExportError: wrong options or environment, or TensorRT refuses the graph; no file has been touched then.
    """
    reporter = reporter or Reporter()
    dtype = options.dtype or bundle.manifest.dtype
    if dtype not in DTYPES:
        raise ExportError(f"dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")
    if options.compare and not options.use_plugin:
        raise ExportError("--plugin auto and --no-plugin exclude each other.")
    if options.compare and options.strip_weights:
        raise ExportError("--plugin auto times engines, and --strip-weights leaves none that runs. Choose one of them.")
    refuse_other_dtype_of_slots(bundle, dtype)
    if bundle.manifest.shelf is not None and options.refit:
        raise ExportError(
            f"--refit: the adapters of {bundle.folder} are inputs of the engine, so another takes its place by a copy "
            "into a slot. Leave it out."
        )
    profiles = make_profiles(bundle, options.shapes, slot_inputs(bundle))
    runtime = open_runtime(options.runtime, reporter.say)
    capabilities = _capabilities(runtime, options.capabilities)
    if runtime.name == "rtx" and runtime.gpu is None and (options.refit or options.strip_weights):
        raise ExportError("--refit and --strip-weights: TensorRT-RTX builds such engines on a GPU; there is none here.")
    check_files(bundle)
    path = output or bundle.folder / ENGINES_NAME / f"{dtype}-{runtime.name}.engine"
    if path.suffix != ".engine":
        raise ExportError(f"{path}: an engine's name ends in .engine, because NAME.json comes beside it.")
    refuse_foreign_engine(path)
    use_plugin = options.use_plugin and runtime.takes_plugins
    if options.plugin is not None and options.architectures is not None:
        raise ExportError("--plugin and --arch exclude each other: --arch compiles one.")
    if not use_plugin and (options.plugin is not None or options.compare or options.architectures is not None):
        given = "--plugin" if options.plugin is not None or options.compare else "--arch"
        raise ExportError(f"{given}: this engine has no plugin.")
    plugin = find_plugin(options.plugin, runtime, reporter, options.architectures) if use_plugin else None
    with existing(path.parent):

        def build(plugin: PluginLibrary | None) -> memoryview:
            capacity, for_plugin = capacity_of(profiles), plugin is not None
            with prepared_model(
                bundle, dtype, path, for_plugin=for_plugin, reporter=reporter, capacity=capacity
            ) as model:
                return _Builder(runtime, options, reporter).build(model, bundle, profiles, capabilities, plugin)

        engine, plugin_times = build(plugin), None
        if options.compare and plugin is not None:
            without = build(None)
            plugin_times = _compare(runtime, profiles, reporter, engine, without)
            if plugin_times is not None and plugin_times["inlined"] < plugin_times["plugin"]:
                engine, plugin = without, None
        facts = EngineFacts(
            runtime=runtime.name,
            runtime_version=runtime.version,
            targets=_targets(runtime, capabilities),
            task=bundle.manifest.task,
            dtype=dtype,
            profiles=profiles,
            plugin=_describe(plugin) if plugin else None,
            plugin_times=plugin_times,
            model_sha256=dict(bundle.manifest.sha256),
            adapter_sha256=bundle.manifest.adapter["sha256"],
            refit_weights=dict(bundle.manifest.refit["weights"]) if options.refit else None,
            stripped=options.strip_weights,
            slots=None if bundle.manifest.shelf is None else bundle.manifest.shelf["slots"],
            format_version=FORMAT_VERSION if bundle.manifest.shelf is None else SHELF_FORMAT_VERSION,
            size=len(engine),
            sha256=hashlib.sha256(engine).hexdigest(),
            tool_version=__version__,
        )
        write_engine(engine, facts, path)
    return path, facts


def _compare(
    runtime: TensorRT, profiles: Sequence[ShapeProfile], reporter: Reporter, engine: memoryview, without: memoryview
) -> PluginTimes | None:
    """Both engines' times, or None, said, where they cannot be timed: one without weights has no times of its own."""
    messages = Messages()
    times = {}
    for name, serialized in (("plugin", engine), ("inlined", without)):
        opened = runtime.trt.Runtime(runtime.logger(messages)).deserialize_cuda_engine(serialized)
        try:
            if opened is None:
                raise ExportError(f"The engine cannot be timed: {messages.reason()}")
            times[name] = time_engine(opened, runtime.trt, profiles)
        except Exception as error:
            # polygraphy's and CUDA's errors are of many kinds, and none of them is worth losing both engines.
            reporter.warn(f"--plugin auto: the plugin is kept, since the two were not timed ({error}).")
            return None
    reporter.say(
        f"A step takes {1e6 * times['plugin']:.0f} us with the plugin, {1e6 * times['inlined']:.0f} us with the op's "
        "body: the faster is kept."
    )
    return PluginTimes(plugin=times["plugin"], inlined=times["inlined"])


class _Builder:
    def __init__(self, runtime: TensorRT, options: BuildOptions, reporter: Reporter) -> None:
        self._runtime, self._trt = runtime, runtime.trt
        self._options = options
        self._reporter = reporter
        self._messages = Messages()
        self._logger = runtime.logger(self._messages)

    def build(
        self,
        model: Path,
        bundle: Bundle,
        profiles: Sequence[ShapeProfile],
        capabilities: Sequence[str],
        plugin: PluginLibrary | None,
    ) -> memoryview:
        """The serialised engine."""
        if plugin is not None:
            load_plugin(plugin, self._runtime)
        builder = self._trt.Builder(self._logger)
        network = builder.create_network(self._network_flags())
        parser = self._trt.OnnxParser(network, self._logger)
        with self._reporter.step("Parsing the graph"):
            if not run_cancellable(lambda: parser.parse_from_file(str(model)), lambda: None):
                raise self._parse_error(parser)
        self._allow_attention_in_parts(network)
        if self._options.refit:
            self._mark_refittable(network, bundle.manifest.refit["weights"])
        with BuildProgress(self._trt, self._reporter) as progress:
            config = self._configure(builder, network, profiles, capabilities, plugin is not None)
            config.progress_monitor = progress.monitor
            names = " and ".join(profile.name for profile in profiles)
            with self._reporter.step(f"Building for {names}"):
                # The parser owns the weights that the network refers to.
                work = _holding(parser, lambda: builder.build_serialized_network(network, config))
                engine = run_cancellable(work, progress.cancel)
        for warning in self._messages.notable_warnings()[:_MOST_WARNINGS]:
            self._reporter.warn(warning)
        if engine is None:
            raise ExportError(f"{self._title()} could not build the engine: {self._messages.reason()}")
        self._keep_timings(config)
        return memoryview(engine)

    def _title(self) -> str:
        return f"{'TensorRT-RTX' if self._runtime.name == 'rtx' else 'TensorRT'} {self._runtime.version}"

    def _network_flags(self) -> int:
        """Precision is the graph's own; TensorRT 11 knows nothing else and has no flag for it."""
        flags = self._trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def _parse_error(self, parser: Any) -> ExportError:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        places = [
            f"{error.node_name() or 'the graph'} ({error.node_operator() or '-'}): {error.desc()}" for error in errors
        ]
        return ExportError(f"{self._title()} cannot take the graph: {places[0] if places else self._messages.reason()}")

    def _allow_attention_in_parts(self, network: Any) -> None:
        """Where no kernel of its own fits an `Attention` (a size of heads, a GPU), it is computed of products and a
        softmax; TensorRT refuses it otherwise."""
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == getattr(self._trt.LayerType, "ATTENTION_INPUT", None):
                layer.__class__ = self._trt.IAttentionBoundaryLayer
                layer.attention.decomposable = True

    def _mark_refittable(self, network: Any, names: Mapping[str, str]) -> None:
        for name in names:
            if not network.mark_weights_refittable(name):
                raise ExportError(
                    f"{name}: {self._title()} cannot make these weights refittable. Build without --refit."
                )

    def _configure(
        self,
        builder: Any,
        network: Any,
        profiles: Sequence[ShapeProfile],
        capabilities: Sequence[str],
        has_plugin: bool,
    ) -> Any:
        trt, options = self._trt, self._options
        config = builder.create_builder_config()
        # What was asked for as float32 is not to be rounded to TF32.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if has_plugin:
            _let_outputs_alias_inputs(trt, config)
        if options.memory_gb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.memory_gb * 1e9))
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.refit:
            config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        if options.strip_weights:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            if not options.refit:
                config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
        for profile in profiles:
            shapes = builder.create_optimization_profile()
            for name, points in profile.inputs.items():
                shapes.set_shape(name, *points)
            config.add_optimization_profile(shapes)
        if self._runtime.name == "rtx":
            config.num_compute_capabilities = len(capabilities)
            for index, name in enumerate(capabilities):
                config.set_compute_capability(_rtx_capability(trt, name), index)
        else:
            self._load_timings(config)
        return config

    def _timing_file(self) -> Path:
        gpu = re.sub(r"\W+", "-", self._runtime.gpu.name if self._runtime.gpu else "none")
        return self._options.timing_cache or cache_folder() / "timings" / f"{self._runtime.version}-{gpu}.cache"

    def _load_timings(self, config: Any) -> None:
        path = self._timing_file()
        held = read_bytes(path, largest=_LARGEST_TIMINGS) if path.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(held), ignore_mismatch=False):
            if self._options.timing_cache is not None:
                raise ExportError(f"{path}: is no timing cache of this GPU and version. Name another --timing-cache.")
            self._reporter.warn(f"{path}: is a timing cache of another GPU or version; it is made anew.")
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _keep_timings(self, config: Any) -> None:
        """A cache that cannot be written is no reason to lose the engine."""
        if self._runtime.name == "rtx":
            return
        path = self._timing_file()
        try:
            write_aside(path, memoryview(config.get_timing_cache().serialize()), result=False)
        except ExportError as error:
            self._reporter.warn(f"The timing cache is not kept: {error}")


def _let_outputs_alias_inputs(trt: Any, config: Any) -> None:
    """The plugin's y may then be written where base is. TensorRT asks plugins for it only with this feature, which
    came with 10.3; without it, y has memory of its own."""
    feature = getattr(getattr(trt, "PreviewFeature", None), "ALIASED_PLUGIN_IO_10_03", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def _holding(held: object, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, which keeps `held` alive while it runs."""

    def run() -> Any:
        result = work()
        del held_until_done[:]
        return result

    held_until_done = [held]
    return run


def _capabilities(runtime: TensorRT, wanted: Sequence[str]) -> tuple[str, ...]:
    """What an RTX engine is built for; TensorRT itself builds for the GPU that it runs on."""
    if runtime.name == "tensorrt":
        if wanted:
            raise ExportError("--compute-capability: TensorRT builds for its own GPU. Use --runtime rtx.")
        return ()
    for name in wanted:
        _rtx_capability(runtime.trt, name)
    if len(set(wanted)) < len(wanted):
        raise ExportError(f"--compute-capability: {', '.join(wanted)} names one twice.")
    if wanted:
        return tuple(wanted)
    return ("current",) if runtime.gpu is not None else _known_capabilities(runtime.trt)


def _known_capabilities(trt: Any) -> tuple[str, ...]:
    names = [name for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    # 7.5 knows no bfloat16, and an engine is for all or for none.
    numbers = sorted(int(name[2:]) for name in names if int(name[2:]) >= 80)
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def _rtx_capability(trt: Any, name: str) -> Any:
    if name == "current":
        return trt.ComputeCapability.CURRENT
    known = getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}", None)
    if known is None or not re.fullmatch(r"\d+\.\d", name):
        raise ExportError(
            f"--compute-capability {name}: TensorRT-RTX does not build for it. "
            f"It knows {', '.join(_known_capabilities(trt))}."
        )
    return known


def _targets(runtime: TensorRT, capabilities: Sequence[str]) -> tuple[str, ...]:
    if runtime.gpu is not None and (not capabilities or capabilities[0] == "current"):
        return (runtime.gpu.name,)
    return tuple(f"compute capability {name}" for name in capabilities)


def _describe(plugin: PluginLibrary) -> EnginePlugin:
    return {
        "op": plugin.op,
        "op_version": plugin.op_version,
        "build": plugin.build,
        "sha256": plugin.sha256,
        "tensorrt": plugin.tensorrt,
    }
