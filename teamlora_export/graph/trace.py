"""Traces an adapted model into an ONNX graph whose weights are recipes.

    skeleton (no weights) -> adapted layers become the op -> transformers' OnnxExporter -> parameters become recipes
    -> exact simplification (`optimize.py`) -> the ecosystem's names

What comes out depends on the base's configuration, the adapter's shapes, the task and the dtype, and on no weight.
Rewrites that follow are in `passes/`. Each task's inputs and outputs are in `tasks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch import Tensor, nn
from torch.export._trace import _compiling_state_context  # noqa: F401  (`record.py` takes it: if missing, said here)
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from teamlora_export.adapter.spec import AdapterSpec, ExpertProjection
from teamlora_export.errors import ExportError, first_line
from teamlora_export.graph import op
from teamlora_export.graph.attention import use_attention_operator
from teamlora_export.graph.marks import marked
from teamlora_export.graph.optimize import optimize
from teamlora_export.graph.silence import silenced
from teamlora_export.graph.tasks import TracedSignature
from teamlora_export.graph.weights import OP_SOURCES, Part, Recipe, bind
from teamlora_export.model.base import BaseModel
from teamlora_export.model.inject import swap_linears
from teamlora_export.model.layer import FrozenLinear
from teamlora_export.model.versions import TESTED


class TracedExpertLinear(FrozenLinear):
    """The adapted layer as tracing sees it: the base's projection, then one node of the op.

    Its op inputs are uninitialised parameters of the shapes that `op.fold` gives.
    """

    teamlora_down: Tensor
    teamlora_mix: Tensor
    teamlora_up: Tensor

    def __init__(self, linear: nn.Module, projection: ExpertProjection) -> None:
        super().__init__(linear)
        for name, shape in op.weight_shapes(projection).items():
            dtype = torch.float32 if name == "mix" else self.weight.dtype
            self.register_parameter(f"teamlora_{name}", nn.Parameter(torch.empty(shape, dtype=dtype), False))
        self.attributes: dict[str, Any] = {
            "num_experts": projection.num_experts,
            "shared_down": int(projection.shared_down),
            "out_splits": [self.out_features],
        }

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_projection(x)
        inputs = (x, base, self.teamlora_down, self.teamlora_mix, self.teamlora_up)
        return torch.onnx.ops.symbolic(
            f"{op.DOMAIN}::{op.NAME}",
            inputs,
            self.attributes,
            dtype=base.dtype,
            shape=base.shape,
            version=op.VERSION,
        )


def traceable(base: BaseModel, adapter: AdapterSpec, dtype: torch.dtype) -> nn.Module:
    """`base` without weights, the layers that `adapter` (aligned with it) changes being the op."""
    # Each expert of a mixture on its own tokens (`grouped_mm`), without a loop that the tokens decide.
    model = base.skeleton(dtype, experts=None)
    use_attention_operator(model)
    swap_linears(model, adapter.projections, lambda path, linear: TracedExpertLinear(linear, adapter.projections[path]))
    return model


def trace(base: BaseModel, model: nn.Module, signature: TracedSignature) -> ir.Model:
    """Trace `model`, `base` as `traceable` gives it or some of its layers, with the inputs of `signature`.

    Raises:
        ExportError: transformers cannot trace this model.
    """
    model.forward = signature.forward  # type: ignore[method-assign]
    try:
        with marked(model):
            graph_model = _export(model, signature)
    except Exception as error:
        raise ExportError(
            f"{base.name}: transformers' exporter cannot trace {base.config.model_type} for {base.task} "
            f"({first_line(error)})."
        ) from error
    names = _tied_names(model)
    parameters = _bind_parameters(graph_model, names)
    with silenced(), _out_of_sight(graph_model, parameters):
        optimize(graph_model)
    _name_inputs_and_outputs(graph_model, signature)
    _name_dimensions(graph_model, signature)
    return graph_model


def _export(model: nn.Module, signature: TracedSignature) -> ir.Model:
    config = OnnxConfig(dynamic=True, dynamic_shapes=signature.dynamic_shapes, opset_version=op.OPSET, optimize=False)
    with silenced():
        program, _metadata = OnnxExporter().export_program(model, dict(signature.sample), config)  # type: ignore[arg-type]
    return program


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name of that parameter."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def _bind_parameters(model: ir.Model, names: dict[str, str]) -> list[ir.Value]:
    """Turn the parameters among the initializers into recipes; buffers that the code computes keep their numbers."""
    values = []
    for name, value in list(model.graph.initializers.items()):
        if name not in names:
            continue
        module_path, _, leaf = names[name].rpartition(".")
        source = leaf.removeprefix("teamlora_")
        if leaf.startswith("teamlora_") and source in OP_SOURCES:
            recipe = Recipe((Part(source, module_path),))
        else:
            recipe = Recipe((Part("base", names[name]),))
        assert value.const_value is not None
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(value.const_value.shape.numpy())
        bind(value, recipe)
        values.append(value)
    return values


@contextmanager
def _out_of_sight(model: ir.Model, parameters: list[ir.Value]) -> Iterator[None]:
    """Parameters as inputs: an optimizer folds what it can read, and they have no values."""
    graph = model.graph
    tensors = [value.const_value for value in parameters]
    for value in parameters:
        graph.initializers.pop(value.name)  # type: ignore[arg-type]
        value.const_value = None
        graph.inputs.append(value)
    try:
        yield
    finally:
        for value, tensor in zip(parameters, tensors, strict=True):
            graph.inputs.remove(value)
            value.const_value = tensor
            if value.uses():
                graph.initializers[value.name] = value  # type: ignore[index]


def _name_inputs_and_outputs(model: ir.Model, signature: TracedSignature) -> None:
    """Give inputs and outputs the ecosystem's names.

    Raises:
        ExportError: these are not the names that the task has: transformers calls something otherwise than it did.
    """
    for kind, values, rename, expected in (
        ("inputs", model.graph.inputs, signature.input_name, signature.inputs),
        ("outputs", model.graph.outputs, signature.output_name, signature.outputs),
    ):
        traced = [value.name or "" for value in values]
        for value, name in zip(values, traced, strict=True):
            value.name = rename(name)
        names = tuple(value.name for value in values)
        if names != expected:
            raise ExportError(
                f"transformers {transformers.__version__} (tested: {', '.join(TESTED)}) traces {kind} named "
                f"{_difference(names, expected)}. Install a tested version."
            )


def _difference(names: Sequence[str | None], expected: Sequence[str]) -> str:
    strange = [str(name) for name in names if name not in expected]
    missing = [name for name in expected if name not in names]
    if not strange and not missing:
        return "in another order than expected"
    return f"{', '.join(strange[:3]) or 'nothing'} where {', '.join(missing[:3]) or 'nothing'} is expected"


def _name_dimensions(model: ir.Model, signature: TracedSignature) -> None:
    """Give the exporter's symbols (`s44`, `s36 + s70`) the ecosystem's names, in every value of the graph."""
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in signature.dimensions(value.name or "").items():
            size = value.shape[axis] if value.shape is not None else None
            if not isinstance(size, ir.SymbolicDim):
                raise ExportError(f"{value.name}: axis {axis} ({name}) became the constant {size} while tracing.")
            symbols.setdefault(str(size.value), name)
    symbols |= signature.derived_dimensions(symbols)
    for value in _all_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed_dimension(size, symbols) for size in value.shape])
    for value in model.graph.inputs:
        assert value.shape is not None
        sizes = list(value.shape)
        for axis, name in signature.dimensions(value.name or "").items():
            sizes[axis] = ir.SymbolicDim(name)
        value.shape = ir.Shape(sizes)


def _renamed_dimension(size: int | ir.SymbolicDim, symbols: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(size, int) or size.value is None:
        return size
    text = str(size.value)
    return ir.SymbolicDim(symbols.get(text) or re.sub(r"\bs\d+\b", lambda m: symbols.get(m[0], m[0]), text))


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
