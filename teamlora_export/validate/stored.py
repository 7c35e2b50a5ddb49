"""Compares every weight in a bundle's file with what its base and its adapter say it should be.

Exactly: a weight is copied, rounded once, or folded in float64 and rounded once, and each of these has one result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.graph import op
from teamlora_export.graph.cooked import make_weights
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.graph.weights import OP_SOURCES, BaseWeights, Part, Recipe
from teamlora_export.manifest import Manifest
from teamlora_export.shelf import slots_of
from teamlora_export.validate.verdict import Departure


def recipes_of(manifest: Manifest) -> dict[str, Recipe]:
    """How each weight of a bundle is made, by name."""
    texts = {**manifest.recipes, **manifest.refit["weights"]}
    return {name: Recipe.from_json(text) for name, text in texts.items()}


def as_held(adapter: AdapterSpec, manifest: Manifest) -> AdapterSpec:
    """The adapter that the bundle's matrices or slots stand for: itself, unless they have another type."""
    dtype = manifest.op.get("adapter_dtype")
    if dtype is None:
        return adapter
    held = np.dtype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float16)
    slots = slots_of(manifest.refit) if manifest.shelf is not None else {}
    parts = {path: slots[path].parts(p) if path in slots else 1 for path, p in adapter.projections.items()}
    projections = {path: op.as_held(p, held, parts[path]) for path, p in adapter.projections.items()}
    return replace(adapter, projections=projections)


def adapted_modules(manifest: Manifest) -> set[str]:
    """Paths of the adapted modules that the graph runs."""
    recipes = (Recipe.from_json(text) for text in manifest.refit["weights"].values())
    return {part.key for recipe in recipes for part in recipe.parts if part.source in OP_SOURCES}


def kept_in_float32(model: ir.Model, recipes: Mapping[str, Recipe]) -> set[str]:
    """Parameters of the base that the file holds in float32, and in no other type."""
    held: dict[str, set[ir.DataType | None]] = {}
    for name, recipe in recipes.items():
        if name in model.graph.initializers:
            for part in recipe.parts:
                held.setdefault(part.key, set()).add(model.graph.initializers[name].dtype)
    return {key for key, dtypes in held.items() if dtypes == {ir.DataType.FLOAT}}


def judge_weights(
    model: ir.Model,
    recipes: Mapping[str, Recipe],
    base: BaseWeights,
    adapter: AdapterSpec,
    live: set[str],
    manifest: Manifest,
) -> Iterator[Departure]:
    """What is wrong with the weights of `model`, one weight in memory at a time.

    Args:
        live: values that the model's outputs depend on.
        manifest: of the bundle: the file may not state other types.
    """
    graph = model.graph
    kept = {name: recipe for name, recipe in recipes.items() if name in live and name in graph.initializers}
    for name in sorted(set(recipes) - set(kept)):
        module = _module(recipes[name].parts[0])
        yield Departure("weights", module, _reader(graph, name), f"{name} is read by nothing")
    dtypes = {name: graph.initializers[name].const_value.dtype for name in kept}  # type: ignore[union-attr]
    for name in [name for name in kept if not _may_be_held_in(dtypes[name], kept[name], base, manifest)]:
        reason = f"{name} is {dtypes[name].name.lower()} in the file, which is no type of a bundle in {manifest.dtype}"
        yield Departure("weights", _module(kept.pop(name).parts[0]), _reader(graph, name), reason)
    for name, expected in make_weights(kept, base, adapter, dtypes):
        tensor = graph.initializers[name].const_value
        assert tensor is not None
        different = _compare(tensor.numpy(), expected, recipes[name], base, adapter)
        if isinstance(tensor, ir.ExternalTensor):
            # It would stay mapped, and the whole model with it in the end.
            tensor.release()
        if different:
            part, reason = different
            yield Departure("weights", _module(part), _reader(graph, name), f"{name} {reason}")


def _may_be_held_in(found: ir.DataType, recipe: Recipe, base: BaseWeights, manifest: Manifest) -> bool:
    """Numbers are in the bundle's type, or in float32 where that is kept; what counts or masks is in its own. Codes are
    bytes, and their scales of the type of what they are multiplied with. The adapter may have a type of its own."""
    dtype, adapter_dtype = manifest.dtype, manifest.op.get("adapter_dtype")
    if adapter_dtype is not None and recipe.parts[0].source in op.NARROW_INPUTS:
        return found == IR_DTYPES[adapter_dtype]
    if recipe.quantised is not None:
        return found == (IR_DTYPES[dtype] if recipe.quantised.role == "scales" else ir.DataType.UINT8)
    if found in (ir.DataType.FLOAT, IR_DTYPES[dtype]):
        return True
    return all(part.source not in OP_SOURCES and base.read(part.key).dtype.kind in "iub" for part in recipe.parts)


def _compare(
    found: np.ndarray, expected: np.ndarray, recipe: Recipe, base: BaseWeights, adapter: AdapterSpec
) -> tuple[Part, str] | None:
    """The first part of a weight that is not as expected, and how; None where all is."""
    reason = _difference(found, expected)
    return (_differing_part(found, expected, recipe, base, adapter), reason) if reason else None


def _difference(found: np.ndarray, expected: np.ndarray) -> str | None:
    if found.shape != expected.shape:
        return f"is {list(found.shape)}, its source {list(expected.shape)}"
    if np.array_equal(found, expected):
        return None
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    differs = ~(found == expected)
    largest = float(np.abs(found - expected)[differs].max())
    return (
        f"differs from its source in {int(differs.sum())} of {differs.size} values, by up to {largest:.2e} "
        f"(they are of size {float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))):.1e})"
    )


def _differing_part(
    found: np.ndarray, expected: np.ndarray, recipe: Recipe, base: BaseWeights, adapter: AdapterSpec
) -> Part:
    """The first part of a recipe where the values differ."""
    if len(recipe.parts) == 1 or found.shape != expected.shape:
        return recipe.parts[0]
    others = tuple(axis for axis in range(found.ndim) if axis != recipe.axis)
    first = int((~(found == expected)).any(axis=others).argmax())
    single = {str(index): replace(recipe, parts=(part,)) for index, part in enumerate(recipe.parts)}
    dtypes = dict.fromkeys(single, ir.DataType.FLOAT)
    end = 0
    for part, (_, array) in zip(recipe.parts, make_weights(single, base, adapter, dtypes), strict=True):
        end += array.shape[recipe.axis]
        if first < end:
            return part
    return recipe.parts[-1]


def _module(part: Part) -> str:
    return part.key if part.source in OP_SOURCES else part.key.rpartition(".")[0]


def _reader(graph: ir.Graph, name: str) -> str:
    value = graph.initializers.get(name)
    users = value.uses() if value is not None else ()
    return next((use.node.name or use.node.op_type for use in users), "no node")
