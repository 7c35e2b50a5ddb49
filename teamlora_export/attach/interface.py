"""What a foreign graph takes and gives, as a manifest says it: its task, its inputs and outputs, its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from teamlora_export.attach.place import ATTENTIONS
from teamlora_export.attach.products import find_products
from teamlora_export.attach.read import Foreign
from teamlora_export.attach.stored import constant_of
from teamlora_export.bundle import ADAPTER_DATA_NAME, read_bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import port_of, read_graph
from teamlora_export.manifest import MANIFEST_NAME
from teamlora_export.model.source import CONFIG_NAME
from teamlora_export.ports import Port
from teamlora_export.tokens import Tokens, read_tokens

# They count a row's tokens, so that padding in front of them is taken for a text.
COUNTING = ("GroupQueryAttention", "SparseAttention", "PagedAttention")

# onnxruntime-genai's builder, 0.18: a layer's cache has room for its window alone, which its generator provides.
_WINDOW_CACHE = "sliding_window_cache"


@dataclass(frozen=True)
class Interface:
    """See `bundle.Manifest`."""

    task: str
    dtype: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    tokens: Tokens


def read_interface(foreign: Foreign, base: Path | None, adapted: Iterable[ir.DataType]) -> Interface:
    """What the graph is for. The size of a head is written into the graph where only its attention knows it.

    Its type is that of the cache; where there is none, that of the adapted products, the narrowest of several.

    Args:
        adapted: types of the adapted products.
        base: the folder of the model that it was made of, where it is given.

    Raises:
        ExportError: its inputs and outputs are those of no task.
    """
    graph = foreign.graph
    _write_head_sizes(foreign)
    inputs, outputs = (tuple(map(port_of, values)) for values in (graph.inputs, graph.outputs))
    task = _task_of(inputs, outputs)
    if task is None:
        names = ", ".join(port.name for port in (*inputs, *outputs)[:8])
        raise ExportError(
            f"{foreign.path}: its inputs and outputs ({names:.300}) are not those of a text model that this tool runs: "
            "input_ids (and attention_mask, position_ids, token_type_ids), past_key_values.N.key|value with "
            "present.N.key|value, and logits, last_hidden_state or sentence_embedding. Export it with these names."
        )
    kinds = [port.dtype for port in inputs if port.name.startswith("past_key_values.")]
    kinds += sorted({dtype.name.lower() for dtype in adapted}, key=lambda name: name == "float")
    dtype = next((name for name, kind in DTYPES.items() if kind.onnx == kinds[0]), None)
    if dtype is None:
        raise ExportError(
            f"{foreign.path}: keeps its cache in {kinds[0]}, which is not supported. Build it without that."
        )
    return Interface(task, dtype, inputs, outputs, _tokens(foreign, base, task, outputs))


def window_caches(graph: ir.Graph) -> list[ir.Node]:
    """The attentions whose caches have room for their window alone."""
    return [node for node in graph if node.attributes.get_int(_WINDOW_CACHE, 0)]


def grow_window_caches(model: ir.Model) -> bool:
    """Let caches of a window grow as others do, in place; what is beyond the window is hidden all the same. Returns
    whether there were any."""
    nodes = window_caches(model.graph)
    for node in nodes:
        del node.attributes[_WINDOW_CACHE]
    return bool(nodes)


def refuse_window_caches(folder: Path) -> None:
    """For programs that run a folder's graph as it is.

    Raises:
        ExportError: it is a bundle with such caches.
    """
    is_attached = all((folder / name).is_file() for name in (MANIFEST_NAME, ADAPTER_DATA_NAME))
    if is_attached and window_caches(read_graph(read_bundle(folder)).graph):
        raise ExportError(
            f"{folder}: some of its layers keep their cache in buffers of their window, which "
            "onnxruntime-genai's generator alone provides. Deploy it with `teamlora-export deploy python`, whose graph "
            "lets them grow, or run the folder in onnxruntime-genai."
        )


def _task_of(inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> str | None:
    given = {port.name: port for port in outputs}
    caches = any(port.name.startswith("past_key_values.") for port in inputs)
    if caches:
        return "text-generation" if "logits" in given else None
    if "logits" in given and len(given["logits"].shape) == 2:
        return "text-classification"
    if "sentence_embedding" in given:
        return "sentence-embedding"
    return "feature-extraction" if "last_hidden_state" in given else None


def _write_head_sizes(foreign: Foreign) -> None:
    """Give caches the size of a head as a number, where they have a name for it."""
    ends = [*foreign.graph.inputs, *foreign.graph.outputs]
    caches = [value for value in ends if value.shape is not None and len(value.shape) == 4]
    if all(isinstance(value.shape[3], int) for value in caches):  # type: ignore[index]
        return
    size = _head_size(foreign)
    if size is None:
        return
    for value in caches:
        assert value.shape is not None
        if not isinstance(value.shape[3], int):
            value.shape = ir.Shape([*value.shape[:3], size])


def _head_size(foreign: Foreign) -> int | None:
    """What the configuration says, or what an attention's queries have."""
    decoder = _decoder(foreign)
    if type(decoder.get("head_size")) is int and decoder["head_size"] > 0:
        return int(decoder["head_size"])
    widths = {product.output: product.out_features for product in find_products(foreign.graph)}
    for node in foreign.graph:
        if node.op_type in ATTENTIONS and node.inputs[0] in widths and "num_heads" in node.attributes:
            heads = node.attributes["num_heads"].as_int()
            if node.inputs[1] is None:
                heads += 2 * node.attributes.get_int("kv_num_heads", 0)
            return widths[node.inputs[0]] // heads
    return None


def _tokens(foreign: Foreign, base: Path | None, task: str, outputs: tuple[Port, ...]) -> Tokens:
    """From config.json beside the graph or in the base's folder, else from what onnxruntime-genai is told."""
    folder = next((each for each in (foreign.folder, base) if each and (each / CONFIG_NAME).is_file()), None)
    tokens = read_tokens(folder, task) if folder is not None else _genai_tokens(foreign, outputs)
    counts = any(node.op_type in COUNTING for node in foreign.graph)
    places = any(value.name == "position_ids" for value in foreign.graph.inputs)
    return dataclasses.replace(tokens, padded=task != "text-generation" or (places and not counts))


def _genai_tokens(foreign: Foreign, outputs: tuple[Port, ...]) -> Tokens:
    model = foreign.genai.get("model", {}) if foreign.genai is not None else {}
    logits = next((port.shape[-1] for port in outputs if port.name == "logits" and port.shape), None)
    known = (_whole(model.get("vocab_size")), logits if isinstance(logits, int) else None, _embedded(foreign))
    vocabulary = next((size for size in known if size is not None), None)
    stops = tuple(_ids(model, "eos_token_id", vocabulary))
    paddings = [*_ids(model, "pad_token_id", vocabulary), *stops, 0]
    return Tokens(
        vocabulary=vocabulary,
        padding=paddings[0],
        start=next(_ids(model, "bos_token_id", vocabulary), None),
        stops=stops,
        most=_whole(model.get("context_length")),
        cut=None,
        windowed=any(node.attributes.get_int("local_window_size", -1) > 0 for node in foreign.graph),
    )


def _embedded(foreign: Foreign) -> int | None:
    """Rows of the table that ids are looked up in."""
    for node in foreign.graph:
        if node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            table = constant_of(node.inputs[0])
            return int(table.shape.numpy()[0]) if table is not None else None
    return None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 1 <= value < 1 << 31 else None


def _ids(model: Mapping[str, Any], name: str, vocabulary: int | None) -> Iterator[int]:
    given = model.get(name)
    for each in given if isinstance(given, list) else [given]:
        if type(each) is int and 0 <= each < (vocabulary or 1 << 31):
            yield each


def _decoder(foreign: Foreign) -> dict[str, Any]:
    decoder = foreign.genai["model"]["decoder"] if foreign.genai is not None else {}
    return decoder if isinstance(decoder, dict) else {}
