"""Small foreign graphs: one projection between an embedding and the output, in each form that exporters write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from formula import make_projection
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_bnb4
from safetensors.numpy import save_file

from teamlora_export.adapter import AdapterConfig, AdapterSpec, write_adapter
from teamlora_export.graph.quantized import Scheme, quantised

VOCABULARY, IN, OUT = 11, 32, 16
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int64)
NAME = "/model/layers.0/attn/o_proj"
PATH = "model.layers.0.self_attn.o_proj"


@dataclass
class Graph:
    """A foreign graph that is being made; `opset` of ONNX's own operators."""

    opset: int = 20
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: object) -> str:
        outputs = [output] if isinstance(output, str) else list(output)
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=f"{outputs[0]}/{op_type}", **attributes))
        return outputs[0]

    def embed(self, rng: np.random.Generator) -> str:
        table = self.weight("table", rng.normal(size=(VOCABULARY, IN)).astype(np.float32))
        return self.node("Gather", [table, "input_ids"], "embedded")

    def save(self, folder: Path, result: str, name: str = "model.onnx", external: str | None = None) -> Path:
        """Write the graph as an encoder that gives the value `result`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.node("Identity", [result], "last_hidden_state")
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        out = helper.make_tensor_value_info(
            "last_hidden_state", TensorProto.FLOAT, ["batch_size", "sequence_length", None]
        )
        graph = helper.make_graph(self.nodes, "foreign", [ids], [out], self.weights)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        options = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
        onnx.save(model, folder / name, **options)
        return folder / name


def matmul(graph: Graph, x: str, w: np.ndarray, name: str = NAME) -> str:
    weight = graph.weight(f"{name[1:].replace('/', '.')}.weight", w)
    return graph.node("MatMul", [x, weight], f"{name}/MatMul_output_0")


def gemm(graph: Graph, x: str, w: np.ndarray, name: str = NAME, transposed: bool = True) -> str:
    """As exporters of two-dimensional products write it: rows of tokens, and a bias."""
    weight = graph.weight(f"{name}.weight", w.T if transposed else w)
    bias = graph.weight(f"{name}.bias", np.linspace(-1, 1, w.shape[1], dtype=np.float32))
    flat = graph.node("Reshape", [x, graph.weight("rows", np.array([-1, len(w)]))], "flat")
    return graph.node("Gemm", [flat, weight, bias], f"{name}/Gemm_output_0", transB=int(transposed))


def nbits(graph: Graph, x: str, w: np.ndarray, name: str = NAME, bits: int = 4, zero_points: bool = False) -> str:
    scheme = Scheme(bits, zero_points)
    made = quantised(w, scheme)
    inputs = [x, graph.weight(f"{name}.qweight", made.codes), graph.weight(f"{name}.scales", made.scales)]
    if made.zeros is not None:
        inputs.append(graph.weight(f"{name}.qzeros", made.zeros))
    sizes = {"K": len(w), "N": w.shape[1], "bits": bits, "block_size": scheme.block, "accuracy_level": 1}
    return graph.node("MatMulNBits", inputs, f"{name}/MatMul/output_0", domain="com.microsoft", **sizes)


def bnb4(graph: Graph, x: str, w: np.ndarray, name: str = NAME, kind: int = 1) -> str:
    """bitsandbytes' codes (`kind` 0: FP4, 1: NF4), as ONNX Runtime's quantiser writes them."""
    block, (inputs, outputs) = 64, w.shape
    codes, sizes = np.zeros(-(-w.size // 2), np.uint8), np.zeros(-(-w.size // block), np.float32)
    quantize_matmul_bnb4(codes, np.ascontiguousarray(w.T), sizes, block, kind, outputs, inputs)
    given = [x, graph.weight(f"{name}.qweight", codes), graph.weight(f"{name}.absmax", sizes)]
    attributes = {"K": inputs, "N": outputs, "block_size": block, "quant_type": kind}
    return graph.node("MatMulBnb4", given, f"{name}/MatMul/output_0", domain="com.microsoft", **attributes)


def dequantised(graph: Graph, x: str, w: np.ndarray, name: str = NAME) -> str:
    """DequantizeLinear -> Transpose -> MatMul, one scale for each row of the stored weight."""
    scale = (np.abs(w).max(axis=0) / 127).astype(np.float32)
    codes = np.round(w / scale).astype(np.int8).T
    inputs = [graph.weight(f"{name}.qweight", codes), graph.weight(f"{name}.scales", scale)]
    weight = graph.node("DequantizeLinear", inputs, f"{name}/dequantised", axis=0)
    turned = graph.node("Transpose", [weight], f"{name}/turned", perm=[1, 0])
    return graph.node("MatMul", [x, turned], f"{name}/MatMul_output_0")


def integers(graph: Graph, w: np.ndarray, name: str) -> tuple[str, str, str]:
    """Names of codes, scales and zero points of 8 bits, one for each column."""
    scale = (np.ptp(w, axis=0) / 255).astype(np.float32)
    zero = np.round(-128 - w.min(axis=0) / scale).astype(np.int8)
    codes = np.clip(np.round(w / scale) + zero, -128, 127).astype(np.int8)
    arrays = {"weight_quantized": codes, "weight_scale": scale, "weight_zero_point": zero}
    stored = [graph.weight(f"{name}.{kind}", array) for kind, array in arrays.items()]
    return stored[0], stored[1], stored[2]


def dynamic(graph: Graph, x: str, w: np.ndarray, name: str = NAME, in_turn: bool = False) -> str:
    """As ONNX Runtime's dynamic quantisation leaves a product; `in_turn`: one scale after the other."""
    codes, scale, zero = integers(graph, w, name)
    graph.node("DynamicQuantizeLinear", [x], ["x_codes", "x_scale", "x_zero"])
    sums = graph.node("MatMulInteger", ["x_codes", codes, "x_zero", zero], f"{name}/sums")
    numbers = graph.node("Cast", [sums], f"{name}/numbers", to=TensorProto.FLOAT)
    if in_turn:
        part = graph.node("Mul", [numbers, "x_scale"], f"{name}/part")
        return graph.node("Mul", [part, scale], f"{name}/MatMul_output_0")
    both = graph.node("Mul", ["x_scale", scale], f"{name}/both")
    return graph.node("Mul", [numbers, both], f"{name}/MatMul_output_0")


def fused(graph: Graph, x: str, w: np.ndarray, name: str = NAME, quantises: bool = True) -> str:
    """What ONNX Runtime makes of such a product and its bias."""
    codes, scale, zero = integers(graph, w, name)
    bias = graph.weight(f"{name}.bias", np.linspace(-1, 1, w.shape[1], dtype=np.float32))
    if quantises:
        inputs = [x, codes, scale, zero, bias]
        return graph.node("DynamicQuantizeMatMul", inputs, f"{name}/MatMul_output_0", domain="com.microsoft")
    graph.node("DynamicQuantizeLinear", [x], ["x_codes", "x_scale", "x_zero"])
    inputs = ["x_codes", codes, "x_scale", scale, "x_zero", zero, bias]
    return graph.node("MatMulIntegerToFloat", inputs, f"{name}/MatMul_output_0", domain="com.microsoft")


def biased(graph: Graph, x: str, w: np.ndarray, name: str = NAME) -> str:
    bias = graph.weight(f"{name}.bias", np.linspace(-1, 1, w.shape[1], dtype=np.float32))
    return graph.node("Add", [bias, matmul(graph, x, w, name)], f"{name}/Add_output_0")


def scaled(graph: Graph, x: str, w: np.ndarray, name: str = NAME) -> str:
    """AWQ: a scale for each channel in front, taken out of the weights."""
    scale = np.linspace(0.5, 2.0, len(w), dtype=np.float32)
    before = graph.node("Mul", [x, graph.weight("pre_quant_scale", scale)], "scaled")
    return nbits(graph, before, w / scale[:, None], name)


FORMS = {
    "MatMul": matmul,
    "Gemm, transposed": gemm,
    "Gemm": lambda graph, x, w: gemm(graph, x, w, transposed=False),
    "MatMulNBits": nbits,
    "MatMulNBits with zero points": lambda graph, x, w: nbits(graph, x, w, zero_points=True),
    "MatMulNBits of 8 bits": lambda graph, x, w: nbits(graph, x, w, bits=8),
    "MatMulBnb4 of NF4": bnb4,
    "MatMulBnb4 of FP4": lambda graph, x, w: bnb4(graph, x, w, kind=0),
    "DequantizeLinear": dequantised,
    "MatMulInteger": dynamic,
    "MatMulInteger, scaled in turn": lambda graph, x, w: dynamic(graph, x, w, in_turn=True),
    "DynamicQuantizeMatMul": fused,
    "MatMulIntegerToFloat": lambda graph, x, w: fused(graph, x, w, quantises=False),
    "bias": biased,
    "AWQ": scaled,
}


def adapter_of(rng: np.random.Generator, folder: Path, sizes: Mapping[str, tuple[int, int]]) -> AdapterSpec:
    """A random adapter on modules of the given sizes (in, out), written to `folder`."""
    projections = {}
    for path, (d_in, d_out) in sizes.items():
        made = make_projection(rng, 2, 3, False, d_in, d_out, interaction=0.1)
        fields = {"down": made.down, "router": made.router, "interaction": made.interaction}
        arrays = {name: array.astype(np.float32) for name, array in fields.items()}
        ups = tuple(up.astype(np.float32) for up in made.ups)
        projections[path] = type(made)(path=path, ups=ups, scaling=1.0, routing_sum=2.0, shared_down=False, **arrays)
    leaves = tuple(sorted({path.rpartition(".")[2] for path in sizes}))
    config = AdapterConfig(r=6, lora_alpha=3.0, lora_nums=2, target_modules=leaves)
    spec = AdapterSpec("teamlora", config, projections, {}, "(test)", "")
    write_adapter(spec, folder)
    return spec


def save_base(folder: Path, weights: Mapping[str, np.ndarray]) -> Path:
    """A base's folder with the weights [in, out] of modules, as PyTorch has them."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 11, "max_position_embeddings": 64}')
    tensors = {f"{path}.weight": np.ascontiguousarray(array.T) for path, array in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(path: Path, *wanted: str) -> list[np.ndarray]:
    """Values of a graph in ONNX Runtime, for `IDS`."""
    model = onnx.load(path)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted if name not in known)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(wanted), {"input_ids": IDS})
