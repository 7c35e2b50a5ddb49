"""An engine of TensorRT, or of TensorRT-RTX, in a deployment's folder, opened in Python. It has not yet run on a GPU.

It needs numpy, the package of the runtime that built it, and cuda-bindings; the files beside it are deployed with it.

What a text generator keeps stays in the GPU's memory: its cache is bound to both ends of the engine, the slots of
adapters are bound once and are written to by copies. A call brings up ids, mask, places and which adapter each row has,
and brings back logits of the last token of each row.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, Adapters, Memory
    from teamlora_export.deploy.cuda_memory import Cuda, CudaError, CudaTensor, Stream
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.model_folder import check_files, open_adapters, read_json, read_settings
    from teamlora_export.deploy.model_session import NUMBERS, RESULTS, Call, ModelSession, Place, present_of
    from teamlora_export.deploy.session import Session
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, Adapters, Memory
    from cuda_memory import Cuda, CudaError, CudaTensor, Stream
    from failure import ModelError, brief
    from model_folder import check_files, open_adapters, read_json, read_settings
    from model_session import NUMBERS, RESULTS, Call, ModelSession, Place, present_of
    from session import Session

ENGINE_NAME, FACTS_NAME, PLUGIN_NAME = "model.plan", "model.json", "plugins/libteamlora_tensorrt.so"
# What TensorRT's registry calls the plugin.
_OP = "MixedExpertProjection"
# SHA-256 of the plugin that this process has.
_LOADED: set[str] = set()
# By an engine's runtime: its module, its package, and what people call it.
_RUNTIMES = {
    "tensorrt": ("tensorrt", "tensorrt", "TensorRT"),
    "rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13", "TensorRT-RTX"),
}
# By TensorRT's names: what ONNX Runtime calls a type, and NumPy; uint16 is bfloat16 by its bits.
_TYPES: dict[str, tuple[str, type]] = {
    "FLOAT": ("tensor(float)", np.float32),
    "HALF": ("tensor(float16)", np.float16),
    "BF16": ("tensor(bfloat16)", np.uint16),
    "INT32": ("tensor(int32)", np.int32),
    "INT64": ("tensor(int64)", np.int64),
}
_PAST = "past_key_values."
# Of a call: the first is what the others follow from.
_MOST_ERRORS = 16
# Of what TensorRT is given an address of, which may be any row of a cache.
ALIGNMENT = 256
# The least, the best and the largest shape of each input.
_Profile = Mapping[str, tuple[tuple[int, ...], ...]]


def open_session(
    folder: Path,
    library: Path | None = None,
    check: bool = True,
    threads: int = 0,
    spinning: bool = True,
    device: str = "cpu",
    check_adapters: bool | None = None,
) -> ModelSession:
    """What is in a folder, an engine or a graph; see `Session`. An engine runs on the first GPU, or on that of
    `device`."""
    if not (Path(folder) / ENGINE_NAME).is_file():
        return Session(folder, library, check, threads, spinning, device, check_adapters)
    if library is not None:
        raise ModelError(f"{library}: is for ONNX Runtime, and {folder} holds an engine. Leave --library out.")
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", device)
    if found is None:
        raise ModelError(f"--device {device!r:.40}: an engine runs on a GPU: give cuda, or cuda:1 and so on.")
    return EngineSession(folder, check, int(found[1] or 0), check_adapters)


@dataclass(frozen=True)
class EngineCache:
    """See `CachePort`."""

    name: str
    shape: tuple[int | str, ...]
    type: str


class EngineSession(ModelSession):
    """An engine, which holds no state of a request: threads may run it, one at a time.

    Args:
        check, check_adapters: see `Session`. number: of the GPU.

    Raises:
        ModelError: the folder is not as it was written, a package or a GPU is missing, or TensorRT refuses the engine.
    """

    def __init__(self, folder: Path, check: bool = True, number: int = 0, check_adapters: bool | None = None) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        if check:
            check_files(self.folder, self.settings.own_hashes)
        facts = read_json(self.folder / FACTS_NAME)
        trt, self.runtime = _open_package(self.folder, facts)
        self.device = ("cuda", number)
        self._errors: list[str] = []
        self._cuda = Cuda(number)
        self._stream = Stream(self._cuda)
        self._lock = Lock()
        # TensorRT keeps no reference to it.
        self._logger = _logger_class(trt)(self._errors)
        if facts.get("plugin") is not None:
            _load_plugin(trt, self.folder / PLUGIN_NAME)
        self._opened = trt.Runtime(self._logger)
        self._engine = self._opened.deserialize_cuda_engine((self.folder / ENGINE_NAME).read_bytes())
        if self._engine is None:
            raise ModelError(f"{self.folder}: {self.runtime} {trt.__version__} refuses the engine{self._reason()}.")
        self._describe(trt)
        self._check_interface()
        self.adapters = self._open_adapters(check if check_adapters is None else check_adapters)
        try:
            self._contexts = [self._context(trt, index) for index in range(len(self._profiles))]
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{self.folder}: {self.runtime} makes no context for the engine ({brief(error)})."
            ) from None

    def cache_memory(self, shape: tuple[int, ...], kind: type) -> CudaTensor:
        return self._cuda.tensor(shape, kind)

    def bound(self, caches: Mapping[str, Place]) -> Call:
        def call(feeds: Mapping[str, np.ndarray], adapters: Memory) -> np.ndarray:
            return self._execute(feeds, adapters, caches, "logits", last=True)

        return call

    def run(self, output: str, feeds: Mapping[str, np.ndarray], names: Sequence[str | None]) -> np.ndarray:
        with self.rows_of(names) as adapters:
            try:
                return self._execute(feeds, adapters, {}, output, last=False)
            except ModelError:
                raise
            except Exception as error:
                raise ModelError(f"{self.folder}: {self.runtime} cannot run the model ({brief(error)}).") from None

    def _describe(self, trt: Any) -> None:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        kinds = {name: engine.get_tensor_dtype(name).name for name in names}
        if unknown := [name for name, kind in kinds.items() if kind not in _TYPES]:
            raise ModelError(f"{self.folder}: its engine has {unknown[0]!r:.80} of a type that is unknown here.")
        self._types = {name: _TYPES[kind][1] for name, kind in kinds.items()}
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in given]
        self._profiles: list[_Profile] = [
            {name: tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index)) for name in given}
            for index in range(engine.num_optimization_profiles)
        ]
        self.inputs = {name: kinds[name] for name in given if name in NUMBERS or name.startswith(_PAST)}
        self._slots = {
            name: tuple(self._profiles[0][name][0]) for name in given if name not in self.inputs and name != ADAPTER
        }
        self._takes_adapters = ADAPTER in given
        first = self._profiles[0]
        past = [name for name in given if name.startswith(_PAST)]
        sizes = {profile[name][end][2:3] for profile in self._profiles for name in past for end in (0, 2)}
        self.capacity = sizes.pop()[0] if past and len(sizes) == 1 and () not in sizes else None
        places = "past" if self.capacity is None else "capacity"
        self.caches = [
            EngineCache(name, ("batch", first[name][0][1], places, first[name][0][3]), _TYPES[kinds[name]][0])
            for name in past
            if len(first[name][0]) == 4
        ]
        self.rows = min(profile["input_ids"][2][0] for profile in self._profiles) if "input_ids" in given else 0

    def _check_interface(self) -> None:
        """Refuse an engine that is not one of ours before anything is asked of it."""
        past = [name for name in self.inputs if name.startswith(_PAST)]
        known = {*(present_of(name) for name in past), *RESULTS}
        if not self.rows or len(self.caches) != len(past) or not {*map(present_of, past)} <= {*self.outputs} <= known:
            raise ModelError(f"{self.folder}: its engine is not one that is known here.")
        if not any(name in self.outputs for name in (("logits",) if past else RESULTS)):
            raise ModelError(f"{self.folder}: its engine gives no {' or '.join(RESULTS)}.")
        if self._takes_adapters != (self.settings.shelf is not None) or bool(self._slots) != self._takes_adapters:
            raise ModelError(f"{self.folder}: its engine and its shelf of adapters do not belong together.")
        if self._slots and {shape[0] for shape in self._slots.values()} != {self.settings.slots}:
            raise ModelError(f"{self.folder}: its engine has other slots than its shelf asks for.")
        rows = {name: first[2][1:] for name, first in self._profiles[0].items() if name.startswith(_PAST)}
        sizes = {int(np.prod(shape)) * np.dtype(self._types[name]).itemsize for name, shape in rows.items()}
        if self.capacity is not None and any(size % ALIGNMENT for size in sizes):
            raise ModelError(
                f"{self.folder}: rows of its engine's cache do not begin at multiples of {ALIGNMENT} bytes. Build it "
                "with --shapes whose most tokens are a multiple of 16."
            )
        if max(profile["input_ids"][0][0] for profile in self._profiles) > 1:
            raise ModelError(
                f"{self.folder}: its engine takes no single row. Build it with --shapes that begin at 1x1."
            )

    def _open_adapters(self, check: bool) -> Adapters | None:
        if self.settings.shelf is None:
            return None
        inputs = {name: (shape[1:], self._types[name]) for name, shape in self._slots.items()}
        return open_adapters(self.folder, self.settings, inputs, check, self._cuda.tensor, "GPU")

    def _context(self, trt: Any, index: int) -> _Context:
        """A context of one profile: what all of its calls have in common is bound."""
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        context = self._engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(index, int(self._stream.handle)):
            raise ModelError(f"{self.folder}: {self.runtime} makes no context for the engine{self._reason()}.")
        self._stream.wait()
        profile = self._profiles[index]
        named = [name for name in profile if name not in self._slots and not name.startswith(_PAST)]
        numbers = {name: self._cuda.tensor(profile[name][2], self._types[name]) for name in named}
        slots: Mapping[str, Any] = self.slot_memory
        for name, memory in {**numbers, **slots}.items():
            self._bind(context, name, memory.address)
        for name, shape in self._slots.items():
            self._shape(context, name, shape)
        return _Context(context, profile, numbers)

    def _execute(
        self,
        feeds: Mapping[str, np.ndarray],
        adapters: Memory,
        caches: Mapping[str, Place],
        output: str,
        last: bool,
    ) -> np.ndarray:
        """One of the outputs.

        Args:
            last: of each row's tokens, of the last alone.
        """
        rows, tokens = feeds["input_ids"].shape
        given = dict(feeds)
        if self._takes_adapters:
            index = np.asarray(adapters[ADAPTER])
            given[ADAPTER] = np.repeat(index, rows) if len(index) == 1 else index
        with self._lock, self._settled():
            self._errors.clear()
            context = self._context_for(rows, tokens)
            # They must be there until the copies are over.
            arrays = {name: self._fitting(context, name, array) for name, array in given.items()}
            for name, array in arrays.items():
                self._shape(context.trt, name, array.shape)
                self._cuda.up(context.numbers[name].address, array, self._stream)
            self._bind_caches(context, caches)
            shapes = {name: tuple(context.trt.get_tensor_shape(name)) for name in self.outputs if name in RESULTS}
            for name, shape in shapes.items():
                self._bind(context.trt, name, self._room(context, name, shape))
            if not context.trt.execute_async_v3(int(self._stream.handle)):
                raise ModelError(f"{self.runtime} refuses a step{self._reason()}.")
            found = self._down(context.results[output].address, shapes[output], self._types[output], last)
            self._stream.wait()
        return _widened(found)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Whatever was begun inside is over behind it, also where something fails midway: others write to what it
        would write to."""
        try:
            yield
        except BaseException:
            with suppress(CudaError):
                self._stream.wait()
            raise

    def _bind_caches(self, context: _Context, caches: Mapping[str, Place]) -> None:
        """Both ends of each; those of the call before are there already, and there are hundreds."""
        if context.caches is caches:
            return
        context.caches = None
        for name, (address, shape, _) in caches.items():
            self._shape(context.trt, name, shape)
            for end in (name, present_of(name)):
                self._bind(context.trt, end, address)
        context.caches = caches

    def _context_for(self, rows: int, tokens: int) -> _Context:
        # The last one is the narrowest: one token is a prompt's last part as well.
        for context in reversed(self._contexts):
            least, _, most = context.profile["input_ids"]
            if least[0] <= rows <= most[0] and least[1] <= tokens <= most[1]:
                return context
        raise ModelError(
            f"{self.folder}: its engine takes no {rows} rows of {tokens} tokens. Build it with other --shapes."
        )

    def _fitting(self, context: _Context, name: str, array: np.ndarray) -> np.ndarray:
        """An input as the engine takes it: a mask that is shorter than any of it goes on with zeros."""
        least, _, most = context.profile[name]
        if name == "attention_mask" and self.caches and array.shape[1] < least[1]:
            array = np.pad(array, ((0, 0), (0, least[1] - array.shape[1])))
        if any(size > limit for size, limit in zip(array.shape, most, strict=True)):
            raise ModelError(
                f"{self.folder}: its engine takes {name} of {list(most)} at most, not {list(array.shape)}."
            )
        return np.ascontiguousarray(array, self._types[name])

    def _room(self, context: _Context, name: str, shape: tuple[int, ...]) -> int:
        """The address of an output, whose memory grows with what it has held."""
        held = context.results.get(name)
        count = int(np.prod(shape))
        if held is None or held.shape[0] < count:
            context.results.pop(name, None)
            context.results[name] = held = self._cuda.tensor((count,), self._types[name])
        return held.address

    def _down(self, address: int, shape: tuple[int, ...], kind: type, last: bool) -> np.ndarray:
        """What is at an address, when the stream has been waited for."""
        found: np.ndarray
        if not last or shape[1] == 1:
            found = np.empty(shape, kind)
            self._cuda.down(found, address, self._stream)
            return found
        rows, tokens, count = shape
        found = np.empty((rows, 1, count), kind)
        for row in range(rows):
            place = address + ((row + 1) * tokens - 1) * count * found.itemsize
            self._cuda.down(found[row], place, self._stream)
        return found

    def _bind(self, context: Any, name: str, address: int) -> None:
        if context.get_tensor_address(name) != address and not context.set_tensor_address(name, address):
            raise ModelError(f"{self.runtime} refuses the address of {name}{self._reason()}.")

    def _shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if tuple(context.get_tensor_shape(name)) != shape and not context.set_input_shape(name, shape):
            raise ModelError(f"{self.runtime} refuses {name} of {list(shape)}{self._reason()}.")

    def _reason(self) -> str:
        """What TensorRT has logged of this call."""
        said = f" ({self._errors[0]:.300})" if self._errors else ""
        self._errors.clear()
        return said


@dataclass
class _Context:
    """A context of one profile.

    Attributes:
        numbers: where ids, masks and the like are. results: where outputs are that come back.
        caches: what is bound as such, the very mapping.
    """

    trt: Any
    profile: _Profile
    numbers: Mapping[str, CudaTensor]
    results: dict[str, CudaTensor] = field(default_factory=dict)
    caches: Mapping[str, Place] | None = None


def _open_package(folder: Path, facts: Mapping[str, Any]) -> tuple[Any, str]:
    """The module that runs the engine, and what people call it."""
    if facts.get("runtime") not in _RUNTIMES:
        raise ModelError(f"{folder / FACTS_NAME}: its runtime is {facts.get('runtime')!r:.40}, which is unknown here.")
    module, package, label = _RUNTIMES[facts["runtime"]]
    wanted = f"pip install {package}=={facts.get('runtime_version')}"
    try:
        trt = importlib.import_module(module)
    except Exception as error:
        raise ModelError(
            f"{folder}: holds an engine of {label}, which cannot be imported ({brief(error)}): {wanted}"
        ) from None
    if trt.__version__ != facts.get("runtime_version"):
        raise ModelError(
            f"{folder}: its engine does not run with {label} {trt.__version__}, which is installed here: {wanted}"
        )
    return trt, label


def _load_plugin(trt: Any, library: Path) -> None:
    """A process has one build of it: TensorRT takes no second of a name, and an engine runs with the one that it was
    built with."""
    registry = trt.get_plugin_registry()
    try:
        sha256 = hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{library}: cannot be read ({error.strerror}). Copy the folder again.") from None
    if _LOADED and sha256 not in _LOADED:
        raise ModelError(f"{library}: this process has another build of the plugin. Open this model in another.")
    there = any(creator.name == _OP for creator in registry.all_creators)
    if not there and registry.load_library(str(library.resolve())) is None:
        raise ModelError(f"{library}: TensorRT {trt.__version__} refuses to load the plugin.")
    _LOADED.add(sha256)


def _logger_class(trt: Any) -> type:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self, errors: list[str]) -> None:
            trt.ILogger.__init__(self)
            self._errors = errors

        def log(self, severity: Any, message: str) -> None:
            is_error = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            if is_error and len(self._errors) < _MOST_ERRORS:
                self._errors.append(message)

    return Logger


def _widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 that is held by its bits, as float32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array
