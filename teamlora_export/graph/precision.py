"""Re-types a graph: a bundle in float32 becomes a float16 or bfloat16 graph whose sensitive parts stay in float32, and
16-bit bundles are taken back or exchanged.

TensorRT 11 builds what the graph's own types say, so precision is decided here. Going down from float32, every node
gets one precision for all its floating-point inputs:

- products with activations, the op and its weights: the low one;
- norms, softmax, reductions, exponentials, sines: float32;
- what is computed of positions and masks alone: float32, until it meets an activation;
- the rest follows its inputs. A product of an activation in float32 and one in the low type (a norm's x times its
  inverse root) stays in float32; a sum of the two (a residual) is in the low type.

Casts go where precisions meet. Routing is in float32 in any case, from logits rounded to the low type: inside the op,
and in a body of it that is inlined already, where a softmax meets weights alone. Coming from a 16-bit type, whose graph
already says what stays in float32, one type takes the other's place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.cooked import cast_weight

IR_DTYPES = {name: ir.DataType[dtype.onnx.upper()] for name, dtype in DTYPES.items()}

_PRODUCTS = {"MatMul", "Gemm", "Conv", "Einsum", "Attention"}
_SENSITIVE = {
    *("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
    *("ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceLogSumExp", "CumSum"),
    *("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Cos", "Sin", "Range"),
    *("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "IsNaN", "IsInf"),
}
_MOVES = {
    *("Transpose", "Reshape", "Identity", "Unsqueeze", "Squeeze"),
    *("Slice", "Split", "Concat", "Expand", "Shape", "Size"),
}
_LARGEST_FLOAT16 = 65504.0
# They take any type, and give what they name.
_CASTS = {"Cast", "CastLike"}
# Where activations of two precisions meet here, they stay in float32.
_SCALING = {"Mul", "Div", "Sub"}


class ChangePrecision(ir.passes.InPlacePass):
    """Turns a graph of the dtype `source` into one of `target` ("fp32", "fp16", "bf16"); see the module's docstring.

    Weights become lazy: each is cast when it is written, so that no two are in memory at a time. Inputs and outputs
    of the graph are of the target type.

    Raises:
        ExportError: the graph has branches or loops; when written, a weight does not fit into float16.
    """

    def __init__(self, source: str, target: str) -> None:
        super().__init__()
        self._source, self._target = IR_DTYPES[source], IR_DTYPES[target]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if self._source == self._target:
            return ir.passes.PassResult(model, False)
        for node in model.graph:
            if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise ExportError(f"{node.name}: graphs with branches or loops ({node.op_type}) cannot be re-typed.")
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        if any(value.dtype is None for node in model.graph for value in node.outputs):
            # Inlined bodies have no types of their own.
            common.ShapeInferencePass()(model)
        if self._source == ir.DataType.FLOAT:
            _Lowering(model.graph, self._target).run()
        else:
            _substitute(model.graph, self._source, self._target)
        for name, value in list(model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[name]
        return ir.passes.PassResult(model, True)


class _Lowering:
    """From float32 down to `low`. `_precision` has the type that each floating-point value ends up in."""

    def __init__(self, graph: ir.Graph, low: ir.DataType) -> None:
        self._graph = graph
        self._low = low
        self._precision: dict[ir.Value, ir.DataType] = {}
        # Values that no activation has touched: positions, masks, tables; and those that may be beyond float16.
        self._positional: set[ir.Value] = set()
        self._huge: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._lowered: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for value in self._graph.inputs:
            if value.dtype == ir.DataType.FLOAT:
                self._precision[value] = self._low
                value.type = ir.TensorType(self._low)
        for node in list(self._graph):
            self._lower(node)
        for index, value in enumerate(self._graph.outputs):
            if self._precision.get(value) == ir.DataType.FLOAT:
                self._lower_output(index, value)
        self._name_weights()

    def _lower(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None and self._is_floating(value)]
        outputs = [value for value in node.outputs if value.dtype == ir.DataType.FLOAT]
        if not _looks_up_weights(node) and all(value in self._positional for value in _activations(inputs)):
            self._positional.update(outputs)
            if any(value in self._huge or _holds_huge_number(value) for value in inputs):
                self._huge.update(outputs)
        precision = self._choose(node, inputs)
        for index, value in enumerate(node.inputs):
            if value in inputs and node.op_type not in _CASTS and not (op.is_op(node) and op.INPUTS[index] == "mix"):
                node.replace_input_with(index, self._as(value, precision))  # type: ignore[arg-type]
        for value in outputs:
            self._precision[value] = precision
            value.type = ir.TensorType(precision)

    def _is_floating(self, value: ir.Value) -> bool:
        return value in self._precision or (value.is_initializer() and value.dtype == ir.DataType.FLOAT)

    def _choose(self, node: ir.Node, inputs: list[ir.Value]) -> ir.DataType:
        """The precision of a node's floating-point inputs and outputs."""
        high, low = ir.DataType.FLOAT, self._low
        activations = _activations(inputs)
        touched = [value for value in activations if value not in self._positional]
        if op.is_op(node) or _looks_up_weights(node):
            return low
        if node.op_type == "DequantizeLinear":
            # Of a product's weight, in the product's type.
            return low
        if node.op_type in _CASTS:
            like = node.inputs[1] if node.op_type == "CastLike" else None
            return self._precision[like] if like is not None else high
        if node.op_type in _PRODUCTS:
            # Nothing that an activation has touched, or a softmax times weights: the op's router.
            return high if all(_is_softmax(value) for value in touched) else low
        if not activations:
            return low if inputs and node.op_type in _MOVES and not _feeds_a_router(node) else high
        if node.op_type in _SENSITIVE or node.domain != "":
            return high
        precisions = {self._precision[value] for value in touched or activations}
        if node.op_type in _SCALING:
            return high if high in precisions else low
        return low if low in precisions else high

    def _as(self, value: ir.Value, precision: ir.DataType) -> ir.Value:
        """`value` in `precision`: itself, or a cast of it that its users share."""
        if value.is_initializer():
            return value if precision == ir.DataType.FLOAT else self._lowered_weight(value)
        if self._precision[value] == precision:
            return value
        key = (value, precision)
        if key not in self._casts:
            source = value
            if precision == ir.DataType.FLOAT16 and value in self._huge:
                # Masks hold float32's lowest number, which would become an infinity.
                source = self._insert_after(value, "Max", [value, self._scalar(-_LARGEST_FLOAT16)], {})
            self._casts[key] = self._insert_after(source, "Cast", [source], {"to": int(precision)}, precision)
        return self._casts[key]

    def _lowered_weight(self, value: ir.Value) -> ir.Value:
        """A stored weight in the low type, beside the float32 one."""
        if value not in self._lowered:
            lowered = ir.Value(name=f"{value.name}.low", type=ir.TensorType(self._low), shape=value.shape)
            lowered.const_value = _cast_when_written(value, self._low)
            self._graph.initializers.add(lowered)
            self._lowered[value] = lowered
        return self._lowered[value]

    def _name_weights(self) -> None:
        """A weight keeps its name in the low type; what is needed in float32 as well is called so."""
        for value, lowered in self._lowered.items():
            name = value.name
            assert name is not None
            assert lowered.name is not None
            del self._graph.initializers[name]
            del self._graph.initializers[lowered.name]
            value.name, lowered.name = f"{name}.float32", name
            self._graph.initializers.add(lowered)
            if value.uses():
                self._graph.initializers.add(value)

    def _lower_output(self, index: int, value: ir.Value) -> None:
        """Outputs are of the low type, under their own names."""
        name = value.name
        value.name = f"{name}.float32"
        cast = self._insert_after(value, "Cast", [value], {"to": int(self._low)}, self._low)
        cast.name = name
        cast.metadata_props.update(value.metadata_props)
        value.metadata_props.clear()
        self._graph.outputs[index] = cast

    def _insert_after(
        self,
        value: ir.Value,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, int],
        precision: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        name = f"{value.name}.{op_type.lower()}.{precision.name.lower()}"
        node = ir.node(op_type, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(precision), value.shape
        producer = value.producer()
        assert producer is not None
        self._graph.insert_after(producer, node)
        return output

    def _scalar(self, number: float) -> ir.Value:
        name = f"teamlora.scalar.{number:g}"
        if name not in self._graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
            value.const_value = ir.tensor(np.float32(number), name=name)
            self._graph.initializers.add(value)
        return self._graph.initializers[name]


def _substitute(graph: ir.Graph, source: ir.DataType, target: ir.DataType) -> None:
    """Exchange one type for another everywhere; what is float32 stays float32."""
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.dtype == source:
            value.type = ir.TensorType(target)
    for value in list(graph.initializers.values()):
        if value.dtype == source:
            value.const_value = _cast_when_written(value, target)
            value.type = ir.TensorType(target)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == source:
                array = _cast_clipped(attribute.as_tensor().numpy(), target, node.name or node.op_type)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(array, dtype=target))
            elif name in ("to", "dtype") and attribute.as_int() == source:
                node.attributes[name] = ir.AttrInt64(name, int(target))


def _cast_when_written(value: ir.Value, dtype: ir.DataType) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None
    name = value.name or ""

    def cast() -> ir.TensorProtocol:
        made = ir.tensor(_cast_clipped(tensor.numpy(), dtype, name), dtype=dtype, name=name)
        if isinstance(tensor, ir.ExternalTensor):
            # It would stay mapped, and the whole model with it in the end.
            tensor.release()
        return made

    return ir.LazyTensor(cast, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _cast_clipped(array: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """A weight must fit; a scalar beyond float16 is a mask's lowest number, and becomes float16's."""
    if array.size == 1 and dtype == ir.DataType.FLOAT16:
        array = np.clip(array.astype(np.float32), -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return cast_weight(array, dtype, name)


def _activations(values: list[ir.Value]) -> list[ir.Value]:
    return [value for value in values if not value.is_initializer()]


def _is_softmax(value: ir.Value | None) -> bool:
    """A softmax's output, or several side by side."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Concat":
        return all(map(_is_softmax, producer.inputs))
    return producer is not None and producer.op_type == "Softmax"


def _feeds_a_router(node: ir.Node) -> bool:
    """Moves weights that a softmax is multiplied by, once they have been moved on and multiplied by constants."""
    users = [use.node for value in node.outputs if value.dtype == ir.DataType.FLOAT for use in value.uses()]
    return any(
        _is_softmax(user.inputs[0]) if user.op_type == "MatMul" else _passes_on(user) and _feeds_a_router(user)
        for user in users
    )


def _passes_on(node: ir.Node) -> bool:
    return node.op_type in _MOVES or (
        node.op_type == "Mul" and any(value is not None and value.is_initializer() for value in node.inputs)
    )


def _looks_up_weights(node: ir.Node) -> bool:
    """An embedding: its rows are activations, though nothing but integers chose them."""
    table = node.inputs[0] if node.op_type == "Gather" and node.domain == "" else None
    return table is not None and table.is_initializer() and table.dtype == ir.DataType.FLOAT


def _holds_huge_number(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and tensor.size == 1 and bool(np.abs(tensor.numpy()).max() > _LARGEST_FLOAT16)
