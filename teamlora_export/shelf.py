"""The adapters of a bundle that takes one for each row: listed, added, removed and replaced, each a file of its own.

    adapters/NAME.HASH.safetensors      in the form of a slot: what a program copies into its memory, as it is
    manifest.json                       which of these files are on the shelf

An edit writes a file that nothing names yet, then the manifest in one step, and removes what that no longer names. Who
is killed in between leaves a shelf that is the old one or the new one, whole, and at most a file that the next edit
removes. Neither the base's weights nor the graph are touched, or read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teamlora_export.adapter import (
    AdapterSpec,
    BaseSignature,
    ExpertProjection,
    LinearShape,
    align_with_base,
    read_adapter,
)
from teamlora_export.adapter.padding import MOST_ROOM, Slot, placed, room_for
from teamlora_export.bundle import Bundle, read_bundle, refuse_linked_adapters, unlisted_adapters
from teamlora_export.disk import sync, sync_names
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.graph.cooked import adapter_weights
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.graph.weights import Recipe
from teamlora_export.manifest import ADAPTERS_NAME, SHELVED_NAME, Manifest, Refit, Shelf, ShelvedAdapter, write_manifest
from teamlora_export.origin import describe_adapter, refuse_cancelled_routing, require_base, warn_of_normalizers
from teamlora_export.progress import Reporter
from teamlora_export.staging import held_file, require_space, write_aside

_NAME = re.compile(SHELVED_NAME)
# What rows of the base alone are said to have.
NO_ADAPTER_NAME = "none"
_LINE = 64
# As a safetensors file calls them.
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def add_adapter(
    folder: Path, name: str, source: Path, reporter: Reporter | None = None, *, any_base: bool = False
) -> Bundle:
    """Put the adapter in the folder `source` on the shelf of the bundle in `folder`, as `name`.

    Args:
        any_base: also one that was trained on a base of another name.

    Raises:
        ExportError: there is no shelf, it has one of that name, or the adapter does not fit; nothing is changed then.
    """
    return _put(folder, name, source, reporter or Reporter(), any_base, replaces=False)


def replace_adapter(
    folder: Path, name: str, source: Path, reporter: Reporter | None = None, *, any_base: bool = False
) -> Bundle:
    """The same in place of the one of that name.

    Raises:
        ExportError: as `add_adapter`; or there is none of that name.
    """
    return _put(folder, name, source, reporter or Reporter(), any_base, replaces=True)


def remove_adapter(folder: Path, name: str) -> Bundle:
    """Take the adapter `name` off the shelf of the bundle in `folder`.

    Raises:
        ExportError: there is no shelf, or none of that name on it.
    """
    with edited(folder) as edit:
        shelf = require_shelf(edit.bundle)
        require_known(edit.bundle, shelf, name)
        return edit.keep({other: adapter for other, adapter in shelf["adapters"].items() if other != name})


def require_shelf(bundle: Bundle) -> Shelf:
    """The bundle's shelf.

    Raises:
        ExportError: it has none.
    """
    if bundle.manifest.shelf is None:
        raise ExportError(
            f"{bundle.folder}: has one adapter of its own, and no shelf. Export it with several --adapter, or with "
            "--slots."
        )
    return bundle.manifest.shelf


def require_known(bundle: Bundle, shelf: Shelf, name: str) -> None:
    """Refuse a name that is not on the shelf of `bundle`.

    Raises:
        ExportError: there is none of that name.
    """
    if name not in shelf["adapters"]:
        raise ExportError(f"{bundle.folder}: has no adapter {name!r:.80}; it has {some_names(shelf['adapters'])}.")


def require_name(name: str) -> str:
    """`name`, which can be the name of an adapter.

    Raises:
        ExportError: it cannot.
    """
    if name.lower() == NO_ADAPTER_NAME:
        raise ExportError(f"{name}: cannot name an adapter, since it says that there is none. Choose another name.")
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"{name!r:.80}: cannot name an adapter. Use up to 64 letters, digits, dots, dashes and underscores, the "
            "first a letter or a digit."
        )
    return name


def slots_of(refit: Refit) -> dict[str, Slot]:
    """The slot of each module, by its path."""
    return {
        path: Slot(sizes[0], sizes[1], sizes[3], sizes[4], sizes[3] > 1 and sizes[2] == sizes[4])
        for path, sizes in refit["projections"].items()
    }


def slot_bytes(refit: Refit, dtype: str) -> int:
    """Of one adapter in memory, whichever it is."""
    width, size = int(IR_DTYPES[dtype].itemsize), 0
    for slot in slots_of(refit).values():
        k = slot.num_experts
        size += width * ((slot.down_rank + k) * slot.in_features + k * slot.expert_rank * slot.out_features) + 4 * k * k
    return size


def slot_megabytes(manifest: Manifest) -> str:
    """The same of a bundle's, in words."""
    return f"{slot_bytes(manifest.refit, manifest.op.get('adapter_dtype', manifest.dtype)) / 1e6:,.2f} MB"


def slot_sizes(refit: Refit) -> str:
    """The room that a slot has in each module, in words; kinds of modules are named where they differ."""
    kinds: dict[str, set[str]] = {}
    for path, slot in slots_of(refit).items():
        experts = "1 expert" if slot.num_experts == 1 else f"{slot.num_experts} experts"
        text = f"{experts} of rank {slot.expert_rank}" + " that share A" * slot.shared_down
        kinds.setdefault(text, set()).add(path.rpartition(".")[2])
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{text} ({', '.join(sorted(names))})" for text, names in kinds.items())


def fit_adapter(adapter: AdapterSpec, refit: Refit, base: str) -> AdapterSpec:
    """`adapter` under the base's names, in the form of the slots.

    Args:
        base: what the base is called.

    Raises:
        ExportError: it does not fit; every reason listed.
    """
    slots = slots_of(refit)
    signature = BaseSignature(
        name=base,
        linears={
            path: LinearShape(slot.in_features, slot.out_features, has_bias=False, transposed=False)
            for path, slot in slots.items()
        },
        parameters={},
        body_prefix=refit["body_prefix"],
    )
    refuse_overrides(adapter)
    strange = _strange_modules(adapter, slots, refit["body_prefix"])
    others = {path: p for path, p in adapter.projections.items() if path not in strange}
    aligned = align_with_base(dataclasses.replace(adapter, projections=others), signature)
    findings = [
        f"{path}: {reason}" for path, p in aligned.projections.items() if (reason := slots[path].misfit(p)) is not None
    ]
    if strange:
        kinds = ", ".join(_kinds(strange))
        findings.append(f"{next(iter(strange))}: has no slot; of these there are {len(strange)} ({kinds:.200})")
    if findings:
        whole = dataclasses.replace(aligned, projections={**aligned.projections, **strange})
        raise_findings(
            f"The adapter {adapter.source} does not fit the slots of this bundle of {base}. An export with it among "
            f"the adapters{_larger_slots(whole, slots)} makes room for it",
            findings,
        )
    return placed(aligned, slots)


def refuse_overrides(adapter: AdapterSpec) -> None:
    """Refuse an adapter that is more than its experts.

    Raises:
        ExportError: it replaces weights of the base.
    """
    if adapter.overrides:
        names = ", ".join(list(adapter.overrides)[:3])
        raise ExportError(
            f"{adapter.source}: replaces weights of the base ({names}), which all adapters of a shelf share. Export a "
            "bundle of its own for it."
        )


def _strange_modules(adapter: AdapterSpec, slots: Mapping[str, Slot], prefix: str) -> dict[str, ExpertProjection]:
    """Modules that the base may well have, but that have no place in the graph: no adapter of the export changed
    them."""
    known = {slot.removeprefix(f"{prefix}.") for slot in slots}
    return {path: p for path, p in adapter.projections.items() if not any(path.endswith(name) for name in known)}


def _kinds(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _larger_slots(adapter: AdapterSpec, slots: Mapping[str, Slot]) -> str:
    """The options that make slots as they are, and large enough for `adapter`; nothing where they cannot."""
    room = room_for(adapter, slots)
    if room.rank > MOST_ROOM.rank or room.experts > MOST_ROOM.experts:
        return ""
    targets = ",".join(_kinds([*slots, *adapter.projections]))
    return f", or with --slot-rank {room.rank} --slot-experts {room.experts} --slot-targets {targets}"


def slot_file(
    placed_adapter: AdapterSpec, weights: Mapping[str, str], dtype: str, adapter_sha256: str
) -> tuple[bytes, str]:
    """The bytes of an adapter's file, a safetensors file with a tensor for each of the graph's inputs, and their
    SHA-256.

    Args:
        placed_adapter: in the form of the slots. weights: the inputs' recipes, by name.
        dtype: of `down` and `up`; `mix` is in float32.
        adapter_sha256: of the adapter as it was trained, for the file to say.

    Raises:
        ExportError: a number of it is none in `dtype`.
    """
    recipes = {name: Recipe.from_json(text) for name, text in weights.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "teamlora", "adapter_sha256": adapter_sha256}}
    parts, end = [], 0
    for name, array in adapter_weights(recipes, placed_adapter, IR_DTYPES[dtype]):
        data = np.ascontiguousarray(array)
        if not np.isfinite(data).all():
            raise ExportError(
                f"{placed_adapter.source}: {name} has numbers that are none, or none in {data.dtype.name} with the "
                "adapter's scaling. Is its training whole?"
            )
        header[name] = {
            "dtype": _TYPES[data.dtype.name],
            "shape": list(data.shape),
            "data_offsets": [end, end + data.nbytes],
        }
        # The array's memory is used again.
        parts.append(data.tobytes())
        end += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _LINE)
    content = b"".join([len(text).to_bytes(8, "little"), text, *parts])
    return content, hashlib.sha256(content).hexdigest()


def shelve(folder: Path, name: str, content: bytes, sha256: str, adapter: AdapterSpec) -> ShelvedAdapter:
    """Write an adapter's file into a bundle's folder, beside those that are there.

    Raises:
        ExportError: its place is behind a link, or cannot be written.
    """
    refuse_linked_adapters(folder)
    file = f"{ADAPTERS_NAME}/{name}.{sha256[:16]}.safetensors"
    (folder / ADAPTERS_NAME).mkdir(exist_ok=True)
    require_space(folder, len(content))
    write_aside(folder / file, content, result=False)
    # Before anything names it, should the power fail.
    sync(folder / file)
    sync_names(folder / ADAPTERS_NAME)
    return {"file": file, "sha256": sha256, "origin": describe_adapter(adapter), "validation": None}


def _put(folder: Path, name: str, source: Path, reporter: Reporter, any_base: bool, replaces: bool) -> Bundle:
    if not replaces:
        require_name(name)
    bundle = read_bundle(folder)
    _require_place(bundle, name, replaces)
    manifest = bundle.manifest
    adapter = read_adapter(source)
    names = manifest.base.get("names")
    # An earlier manifest may lack the name by which its adapters know the base.
    require_base(adapter, [manifest.base["source"], *(names or ())], any_base or names is None, reporter)
    refuse_cancelled_routing(adapter)
    fitting = fit_adapter(adapter, manifest.refit, str(manifest.base["source"]))
    warn_of_normalizers(adapter, reporter)
    dtype = manifest.op.get("adapter_dtype", manifest.dtype)
    content, sha256 = slot_file(fitting, manifest.refit["weights"], dtype, adapter.sha256)
    with edited(folder) as edit:
        now = edit.bundle.manifest
        if (now.refit, now.dtype, now.op) != (manifest.refit, manifest.dtype, manifest.op):
            raise _exported_anew(folder)
        _require_place(edit.bundle, name, replaces)
        shelf = require_shelf(edit.bundle)
        return edit.keep({**shelf["adapters"], name: shelve(folder, name, content, sha256, adapter)})


def _require_place(bundle: Bundle, name: str, replaces: bool) -> None:
    shelf = require_shelf(bundle)
    if replaces:
        require_known(bundle, shelf, name)
    elif name in shelf["adapters"]:
        raise ExportError(f"{bundle.folder}: has an adapter {name} already. Use `adapters replace`, or another name.")


def some_names(names: Iterable[str]) -> str:
    """The names of a shelf, in words; of many, some."""
    listed = sorted(names)
    return (", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")) or "none"


@dataclass(frozen=True)
class Edit:
    """A change of a bundle by one who is alone with it.

    Attributes:
        bundle: as it is. is_gone: whether another is in its place by now; see `held_file`.
    """

    bundle: Bundle
    is_gone: Callable[[], bool]

    def keep(self, adapters: dict[str, ShelvedAdapter]) -> Bundle:
        """The shelf becomes `adapters`, whose files are there."""
        manifest, folder = self.bundle.manifest, self.bundle.folder
        assert manifest.shelf is not None
        before = {adapter["file"] for adapter in manifest.shelf["adapters"].values()}
        files = {adapter["file"]: adapter["sha256"] for adapter in adapters.values()}
        others = {name: digest for name, digest in manifest.sha256.items() if name not in before}
        shelf: Shelf = {"slots": manifest.shelf["slots"], "adapters": dict(sorted(adapters.items()))}
        hashes = dict(sorted({**others, **files}.items()))
        # The verdict was on what was on the shelf; each adapter keeps its own.
        changed = dataclasses.replace(manifest, shelf=shelf, sha256=hashes, validation=None)
        try:
            self.write(changed)
        finally:
            # What the list names no more; or, where it could not be written, what was to be in it.
            _remove_unlisted(folder)
        return Bundle(folder, changed)

    def write(self, manifest: Manifest) -> None:
        if self.is_gone():
            raise _exported_anew(self.bundle.folder)
        write_manifest(self.bundle.folder, manifest)


def _remove_unlisted(folder: Path) -> None:
    with suppress(OSError, ExportError):
        for name in unlisted_adapters(folder):
            with suppress(OSError):
                (folder / name).unlink()


def change_manifest(bundle: Bundle, change: Callable[[Manifest], Manifest]) -> None:
    """Write what `change` makes of the manifest of `bundle` as it is by now: its shelf may have changed meanwhile.

    Raises:
        ExportError: the bundle is another by now, or the manifest cannot be written.
    """
    with edited(bundle.folder) as edit:
        if _graph_files(edit.bundle.manifest) != _graph_files(bundle.manifest):
            raise _exported_anew(bundle.folder)
        edit.write(change(edit.bundle.manifest))


def _graph_files(manifest: Manifest) -> dict[str, str]:
    return {name: sha for name, sha in manifest.sha256.items() if not name.startswith(f"{ADAPTERS_NAME}/")}


def _exported_anew(folder: Path) -> ExportError:
    return ExportError(f"{folder}: was exported anew meanwhile. Run the command again.")


@contextmanager
def edited(folder: Path) -> Iterator[Edit]:
    """The bundle as it is when nobody else changes it, or replaces it by another."""
    with holding(read_bundle(folder).model) as is_gone:
        yield Edit(read_bundle(folder), is_gone)


@contextmanager
def holding(model: Path) -> Iterator[Callable[[], bool]]:
    """See `held_file`.

    Raises:
        ExportError: it cannot be opened.
    """
    with ExitStack() as held:
        try:
            is_gone = held.enter_context(held_file(model))
        except OSError as error:
            raise ExportError(f"{model}: cannot be opened ({error.strerror}).") from None
        yield is_gone
