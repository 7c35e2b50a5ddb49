"""A model in a folder, opened in ONNX Runtime: what describes it, its files' hashes, its inputs and outputs.

It needs onnxruntime and numpy alone; so do the files beside it, which are deployed with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, Adapters, Memory, open_regular
    from teamlora_export.deploy.cores import usable_cores
    from teamlora_export.deploy.device_tensor import DeviceTensor, DeviceTensors
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.model_session import ModelSession, Place
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, Adapters, Memory, open_regular
    from cores import usable_cores
    from device_tensor import DeviceTensor, DeviceTensors
    from failure import ModelError
    from model_session import ModelSession, Place

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# By its bits, in memory that ONNX Runtime is told the type of: NumPy has no bfloat16.
SLOT_TYPES: dict[str, type] = {**NUMPY, "tensor(bfloat16)": np.uint16}
_BFLOAT16 = 16
RESULTS = ("sentence_embedding", "logits", "last_hidden_state")
NUMBERS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# What describes a folder: which of its fields has the hashes, and the newest format that is known.
_DESCRIPTIONS = {"deploy.json": ("files", 2), "manifest.json": ("sha256", 3)}
# What is opened here or by a server, so that a list of hashes without one of them is not whole.
_OPENED = (
    *("model.onnx", "model.onnx.data", "adapter.onnx.data"),
    *("model.plan", "model.json", "plugins/libteamlora_tensorrt.so"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
# What adapters of a shelf are for.
_MODEL = ("model.onnx", "model.onnx.data", "model.plan")
_LARGEST_TEXT = 512 << 20
_MOST_THREADS = 1024
_CUDA = "CUDAExecutionProvider"
_CPU_LIBRARY = "libteamlora_onnxruntime.so"
_MOST_SLOTS = 4096
# Of an adapter's hash, in the name of its file.
_NAMED_DIGITS = 16
_SPIN_MICROSECONDS = "20"
# The names of the axis that holds the tokens of a cache in place, and of one whose layer sees so many tokens only.
CAPACITY = re.compile(r"capacity|window_([1-9]\d{0,8})")


class Session(ModelSession):
    """The model, which holds no state of a request: many threads may run it at once.

    Args:
        library: a native library with the op, to be used in place of the definition inside the model.
        check: compare the files with their hashes first.
        check_adapters: the same of each adapter of a shelf, when it is read; None: as `check`.
        threads: of ONNX Runtime; 0: one for each core that may be used.
        spinning: threads that wait for work keep their cores for a moment, which is faster where nothing else runs.
        device: "cpu", or "cuda" or "cuda:1": a GPU, with onnxruntime-gpu. Has not yet run on one.

    Attributes:
        onnx: ONNX Runtime's own session.
        inputs: by their names, as ONNX Runtime describes them.
    """

    runtime = "ONNX Runtime"

    def __init__(
        self,
        folder: Path,
        library: Path | None = None,
        check: bool = True,
        threads: int = 0,
        spinning: bool = True,
        device: str = "cpu",
        check_adapters: bool | None = None,
    ) -> None:
        import onnxruntime as ort

        self.device = _device(device)
        if library is not None and self.device[0] != "cpu" and Path(library).name == _CPU_LIBRARY:
            raise ModelError(
                f"{library}: has the op for a CPU, and --device {device} is a GPU. Build the other one: "
                "teamlora-export plugins build --onnxruntime --cuda"
            )
        if not 0 <= threads <= _MOST_THREADS:
            raise ModelError(f"{threads} threads: give 0 to {_MOST_THREADS}.")
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        if check:
            check_files(self.folder, self.settings.own_hashes)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # A number of its own: left to itself, ONNX Runtime binds each thread to a core, busy or not. Threads that spin
        # for as long as it lets them take the core from those that they wait for, as soon as anything else runs on the
        # machine; threads that do not spin at all wake too late for the next kernel.
        options.intra_op_num_threads = threads or usable_cores()
        if spinning:
            options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            if library is not None:
                # A bare name would be looked for in the system's folders.
                options.register_custom_ops_library(str(Path(library).resolve()))
        except Exception as error:
            raise ModelError(f"{library}: cannot be loaded as a library of ops ({brief(error)}).") from None
        self._providers: list[Any] = ["CPUExecutionProvider"]
        if self.device[0] != "cpu":
            self._providers.insert(0, (_CUDA, {"device_id": self.device[1], "use_tf32": 0}))
        try:
            self.onnx = ort.InferenceSession(self.folder / "model.onnx", options, self._providers)
        except Exception as error:
            raise ModelError(
                f"{self.folder}: ONNX Runtime {ort.__version__} cannot load the model ({brief(error)})."
            ) from None
        # Where a provider cannot start, ONNX Runtime goes on without it.
        if self.device[0] != "cpu" and _CUDA not in self.onnx.get_providers():
            raise ModelError(
                f"--device {device}: ONNX Runtime {ort.__version__} cannot use it: no GPU, or not its CUDA."
            )
        self.inputs = {value.name: value for value in self.onnx.get_inputs()}
        self.outputs = [value.name for value in self.onnx.get_outputs()]
        self.caches = [value for name, value in self.inputs.items() if name.startswith("past_key_values.")]
        self._check_interface()
        self._tensors: DeviceTensors | None = None
        self.adapters = self._open_adapters(
            check if check_adapters is None else check_adapters, on_device=self.device[0] != "cpu"
        )

    def _open_adapters(self, check: bool, on_device: bool) -> Adapters | None:
        defaults = {value.name: value for value in self.onnx.get_overridable_initializers()}
        if (ADAPTER in defaults) != (self.settings.shelf is not None):
            raise ModelError(f"{self.folder}: its model and its shelf of adapters do not belong together.")
        if self.settings.shelf is None:
            return None
        slots = {name: value for name, value in defaults.items() if name != ADAPTER}
        for name, value in slots.items():
            if value.type not in SLOT_TYPES or not all(isinstance(size, int) for size in value.shape[1:]):
                raise ModelError(f"{self.folder}: its model's slots {name!r:.80} are not of a kind that is known here.")

        inputs = {name: (tuple(value.shape[1:]), SLOT_TYPES[value.type]) for name, value in slots.items()}
        if not on_device:
            return open_adapters(self.folder, self.settings, inputs, check)
        return open_adapters(self.folder, self.settings, inputs, check, self._on_device, self.device[0])

    def _on_device(self, shape: tuple[int, ...], kind: type) -> DeviceTensor:
        if self._tensors is None:
            self._tensors = DeviceTensors(self.device, self._providers)
        return self._tensors(shape, kind)

    def cache_memory(self, shape: tuple[int, ...], kind: type) -> DeviceTensor:
        kind_of_device, number = self.device
        named = {"cpu": "Cpu", "cuda": "Cuda"}[kind_of_device]
        places = zip(self.onnx.get_inputs(), self.onnx.get_input_memory_infos(), strict=True)
        for value, memory in places:
            # What is bound once would be copied once.
            if value.name.startswith("past_key_values.") and (memory.name, memory.device_id) != (named, number):
                raise ModelError(
                    f"{self.folder}: ONNX Runtime's provider for {kind_of_device} leaves {value.name} to the CPU. Use "
                    "a newer one, or a model with a growing cache."
                )
        return self._on_device(shape, kind)

    def bound(self, caches: Mapping[str, Place]) -> BoundCall:
        return BoundCall(self, caches)

    def run(self, output: str, feeds: Mapping[str, np.ndarray], names: Sequence[str | None]) -> np.ndarray:
        with self.rows_of(names) as rows:
            try:
                binding = self.onnx.io_binding()
                for name, value in feeds.items():
                    binding.bind_cpu_input(name, value)
                bind_inputs(binding, {**self.slot_memory, **rows})
                binding.bind_output(output)
                self.onnx.run_with_iobinding(binding)
                found: np.ndarray = binding.get_outputs()[0].numpy()
            except Exception as error:
                raise ModelError(f"{self.folder}: ONNX Runtime cannot run the model ({brief(error)}).") from None
        return found

    def _check_interface(self) -> None:
        """Refuse a model that is not one of ours before anything is asked of it."""
        for name, value in self.inputs.items():
            if name not in NUMBERS and value not in self.caches:
                raise ModelError(f"{self.folder}: its model has an input {name!r:.80}, which is unknown here.")
        for cache in self.caches:
            if cache.type not in NUMPY:
                raise ModelError(
                    f"{self.folder}: has inputs of {cache.type}, which NumPy does not know: use fp16 or fp32."
                )
            sizes = [cache.shape[axis] for axis in (1, 3)] if len(cache.shape) == 4 else [None]
            if not all(isinstance(size, int) for size in sizes) or present_of(cache.name) not in self.outputs:
                raise ModelError(f"{self.folder}: its model's cache {cache.name!r:.80} is not one that is known here.")
        if not any(name in self.outputs for name in (("logits",) if self.caches else RESULTS)):
            raise ModelError(f"{self.folder}: its model gives no {' or '.join(RESULTS)}.")


class BoundCall:
    """Calls of a model with caches at places of their own; see `ModelSession.bound`."""

    def __init__(self, session: Session, caches: Mapping[str, Place]) -> None:
        self._session = session
        self.binding = session.onnx.io_binding()
        self.binding.bind_output("logits")
        for name, (address, shape, kind) in caches.items():
            for bind, end in ((self.binding.bind_input, name), (self.binding.bind_output, present_of(name))):
                bind(end, *session.device, kind, shape, address)
        bind_inputs(self.binding, session.slot_memory)

    def __call__(self, feeds: Mapping[str, np.ndarray], adapters: Memory) -> np.ndarray:
        for name, value in feeds.items():
            self.binding.bind_cpu_input(name, value)
        bind_inputs(self.binding, adapters)
        self._session.onnx.run_with_iobinding(self.binding)
        # The first of the outputs, since it was bound first. Bound anew, it is not kept until the next call.
        logits: np.ndarray = self.binding.get_outputs()[0].numpy()
        self.binding.bind_output("logits")
        return logits


def bind_inputs(binding: Any, inputs: Memory) -> None:
    """Where they are, which must outlive the call. `bind_cpu_input` does not know inputs that have a default (ONNX
    Runtime 1.32)."""
    for name, value in inputs.items():
        device, address = (
            (value.device, value.address) if isinstance(value, DeviceTensor) else (("cpu", 0), value.ctypes.data)
        )
        binding.bind_input(name, *device, element_type(value), value.shape, address)


def _device(name: str) -> tuple[str, int]:
    """The kind and the number of a device, where this ONNX Runtime knows one of its kind."""
    import onnxruntime as ort

    found = re.fullmatch(r"(cpu|cuda)(?::(\d{1,3}))?", name)
    if found is None or name.startswith("cpu:"):
        raise ModelError(f"--device {name!r:.40}: give cpu, cuda, or cuda:1 and so on.")
    if found[1] == "cuda" and _CUDA not in ort.get_available_providers():
        raise ModelError(
            f"--device {name}: ONNX Runtime {ort.__version__} here is for CPUs. Install onnxruntime-gpu[cuda,cudnn] in "
            "its place."
        )
    if found[1] == "cuda" and hasattr(ort, "preload_dlls"):
        # CUDA from packages, which the loader does not find by itself.
        ort.preload_dlls()
    return found[1], int(found[2] or 0)


@dataclass(frozen=True)
class Settings:
    """What describes the model.

    Attributes:
        hashes: SHA-256 of its files.
        vocabulary: ids are below it; None where that is not known. padding: the id that fills a row.
        stops: the ids that end a text.
        most: tokens that the model takes at most, prompt and answer together; None where there is no limit.
        cut: words are cut to so many tokens; None where a longer input is refused.
        padded: rows of one batch may have padding in front.
        shelf: the adapters that rows can have, with the file and the SHA-256 of each; None where the model has one of
            its own. slots: how many of them are to be in memory at a time.
    """

    hashes: Mapping[str, str]
    vocabulary: int | None
    padding: int
    stops: tuple[int, ...]
    most: int | None
    cut: int | None
    padded: bool = True
    shelf: Mapping[str, tuple[str, str]] | None = None
    slots: int = 0

    @property
    def own_hashes(self) -> dict[str, str]:
        """Of all files but those of a shelf's adapters. Each of these is looked at when it is needed: there may be
        many, and they come and go."""
        shelved = {file for file, _ in (self.shelf or {}).values()}
        return {name: sha for name, sha in self.hashes.items() if name not in shelved}

    def require_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids of one input, all of which must exist."""
        ids = list(ids)
        if not ids:
            raise ModelError("An empty prompt has nothing to go on from.")
        for id_ in ids:
            if not isinstance(id_, (int, np.integer)) or not 0 <= id_ < (self.vocabulary or 1 << 31):
                known = f"vocabulary of {self.vocabulary}" if self.vocabulary else "vocabulary"
                raise ModelError(f"Token {id_!r:.40} is not in the model's {known}.")
        return ids

    def require_room(self, inputs: Sequence[Sequence[int]]) -> None:
        """Refuse inputs that are longer than the model takes."""
        if not inputs:
            raise ModelError("There is no prompt.")
        longest = max(map(len, inputs))
        if self.most is not None and longest > self.most:
            raise ModelError(f"{longest} tokens; the model takes {self.most}.")

    def room(self, prompts: Sequence[Sequence[int]], count: int) -> int:
        """How many tokens can follow the prompts, `count` at most."""
        if count < 1:
            raise ModelError(f"{count} tokens: give at least 1.")
        self.require_room(prompts)
        longest = max(map(len, prompts))
        if longest == self.most:
            raise ModelError(f"{longest} tokens; the model takes {self.most}, its answer included.")
        return count if self.most is None else min(count, self.most - longest)


def open_adapters(
    folder: Path,
    settings: Settings,
    inputs: Mapping[str, tuple[tuple[int, ...], type]],
    check: bool,
    make: Callable[[tuple[int, ...], type], Any] = np.zeros,
    where: str = "cpu",
) -> Adapters:
    """The shelf of the model in a folder.

    Args:
        settings: of the folder, as the model was opened. inputs, check, make: see `Adapters`. where: it makes them.

    Raises:
        ModelError: there is not so much memory.
    """

    def listed() -> Mapping[str, tuple[str, str]]:
        now = read_settings(folder)
        if any(now.hashes.get(name) != settings.hashes.get(name) for name in _MODEL):
            raise ModelError(f"{folder}: holds another model by now, and adapters of that. Open it anew.")
        return now.shelf or {}

    stamp = _stamp_of(_description(folder))
    try:
        return Adapters(folder, inputs, settings.slots, listed, stamp, check, make)
    except Exception as error:
        needed = settings.slots * sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in inputs.values())
        raise ModelError(
            f"{folder}: no {needed >> 20} MiB of {where} memory for {settings.slots} adapters "
            f"({brief(error)}). Export it with fewer --slots."
        ) from None


def read_settings(folder: Path) -> Settings:
    """From the deploy.json in the model's folder, or from a bundle's manifest.json.

    Raises:
        ModelError: there is none, a newer tool wrote it, or a field is missing or of another type.
    """
    path = _description(folder)
    entry, newest = _DESCRIPTIONS[path.name]
    fields = read_json(path)
    version = fields.get("format_version")
    if type(version) is int and version > newest:
        raise ModelError(f"{path}: was written by a newer teamlora-export. Use that version's program.")
    hashes: Any = fields.get(entry)
    tokens: Any = fields.get("tokens")

    def fits(name: str, least: int) -> bool:
        return name in tokens and (tokens[name] is None or _is_whole(tokens[name], least))

    if not (
        _is_whole(version, 1)
        and isinstance(hashes, dict)
        and all(isinstance(value, str) for value in hashes.values())
        and isinstance(tokens, dict)
        and all(fits(name, 1) for name in ("vocabulary", "most", "cut"))
        and _is_whole(tokens.get("padding"), 0)
        and isinstance(tokens.get("stops"), list)
        and all(_is_whole(stop, 0) for stop in tokens["stops"])
    ):
        raise ModelError(f"{path}: format_version, {entry} or tokens are not as they should be. Copy it again.")
    shelf, slots = _read_shelf(path, fields.get("shelf"), hashes)
    return Settings(
        hashes,
        tokens["vocabulary"],
        tokens["padding"],
        tuple(tokens["stops"]),
        tokens["most"],
        tokens["cut"],
        tokens.get("padded") is not False,
        shelf,
        slots,
    )


def _description(folder: Path) -> Path:
    name = next((name for name in _DESCRIPTIONS if os.path.lexists(folder / name)), None)
    if name is None:
        raise ModelError(f"{folder}: holds neither deploy.json nor manifest.json. Is it a model's folder?")
    return folder / name


def _read_shelf(path: Path, shelf: Any, hashes: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]] | None, int]:
    """The adapters that a description lists, and the slots that it asks for."""
    if shelf is None:
        return None, 0
    slots, adapters = (shelf.get(name) for name in ("slots", "adapters")) if isinstance(shelf, dict) else (None, None)
    if type(slots) is not int or not 1 <= slots <= _MOST_SLOTS or not isinstance(adapters, dict):
        raise ModelError(f"{path}: its shelf of adapters is not as it should be. Copy it again.")
    found = {}
    for name, fields in adapters.items():
        file = fields.get("file") if isinstance(fields, dict) else None
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts or file not in hashes:
            raise ModelError(f"{path}: its adapter {name!r:.80} is not as it should be. Copy it again.")
        sha256 = hashes[file]
        # What is in memory is known by its hash, also where nothing is compared with it.
        if sha256 != fields.get("sha256") or not file.endswith(f".{sha256[:_NAMED_DIGITS]}.safetensors"):
            raise ModelError(f"{path}: its adapter {name!r:.80} has more than one hash. Copy it again.")
        found[name] = (file, sha256)
    return found, slots


def _stamp_of(path: Path) -> Callable[[], object]:
    """What is another whenever another file has taken a file's place."""

    def stamp() -> object:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    return stamp


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 31


def check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare every file of the model with its hash.

    Raises:
        ModelError: the list of hashes is not whole, a file is missing, or it is another one.
    """
    listed = {"model.onnx", "model.onnx.data"} <= set(hashes) or any(_is_engine(name) for name in hashes)
    unlisted = [name for name in _OPENED if (folder / name).is_file() and name not in hashes]
    if not listed or unlisted:
        missing = unlisted[0] if unlisted else "the model"
        raise ModelError(f"{folder}: its list of hashes lacks {missing}. Copy the folder again.")
    for file, expected in hashes.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ModelError(f"{folder}: its list of hashes names {file!r:.80}, which is not in its folder.")
        if _sha256(folder / file) != expected:
            raise ModelError(
                f"{folder / file}: is not the file that belongs here (its SHA-256 differs). Copy it again."
            )


def _is_engine(name: str) -> bool:
    return name == "model.plan" or (name.startswith("engines/") and name.endswith(".engine"))


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). Copy the folder again.") from None


def element_type(array: np.ndarray | DeviceTensor) -> Any:
    """What ONNX Runtime calls the type of an array that a model is given; `uint16` is bfloat16 by its bits."""
    return _BFLOAT16 if array.dtype == np.uint16 else array.dtype


def ort_value(array: np.ndarray) -> Any:
    """ONNX Runtime's value on a contiguous array, which must outlive it; `uint16` is bfloat16 by its bits."""
    import onnxruntime as ort

    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def run_once(session: Any, wanted: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs `wanted` of a session of ONNX Runtime, whose inputs may be bfloat16 by its bits."""
    if not any(array.dtype == np.uint16 for array in feeds.values()):
        found: list[np.ndarray] = session.run(list(wanted), dict(feeds))
        return found
    held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    values = {name: ort_value(array) for name, array in held.items()}
    return [value.numpy() for value in session.run_with_ort_values(list(wanted), values)]


def present_of(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def brief(error: BaseException) -> str:
    """The first line of what another library says."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]}..."


def read_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            # Python makes room for all that is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, _LARGEST_TEXT) + 1)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None
    if len(data) > _LARGEST_TEXT:
        raise ModelError(f"{path}: is larger than such a file can be.")
    return data


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({brief(error)}). Copy it again.") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: does not hold a JSON object. Copy it again.")
    return fields
