"""Judges whether each node of the op is where `attach` would put it.

modules   every module of the adapter has a node, and no other has
products  the product behind a node is the one that `attach` finds for its module in the graph without the op
x, base   a node reads what the projection reads in the model, and nothing else reads what the projection gives
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.insert import detach
from teamlora_export.attach.match import WEIGHTS, Found
from teamlora_export.attach.products import Product, find_products
from teamlora_export.attach.stored import constant_of, input_of, name_of
from teamlora_export.attach.weigh import Weigher
from teamlora_export.graph import op
from teamlora_export.graph.passes.module_outputs import COLUMNS_KEY, MODULES_KEY
from teamlora_export.progress import Reporter
from teamlora_export.validate.held_by_products import find_all
from teamlora_export.validate.verdict import Departure


@dataclass(frozen=True)
class _Piece:
    """Columns of a product."""

    product: Product
    start: int
    end: int


def judge_wiring(
    model: ir.Model,
    adapter: AdapterSpec,
    evidence: Mapping[str, Sequence[str]],
    weigher: Weigher | None,
    reporter: Reporter,
) -> Iterator[Departure]:
    """What is wrong with the places of the op's nodes in `model`, which is not changed.

    Args:
        evidence: what each module was found by when the adapter was attached.
        weigher: the weights of the base, where it is given. Modules that only these show are not judged without.
    """
    nodes = [node for node in model.graph if op.is_op(node)]
    yield from _missing(nodes, adapter)
    found, problems = _found_again(model, adapter, weigher)
    unknown = [path for path in problems if weigher is None and WEIGHTS in evidence.get(path, ())]
    if unknown:
        reporter.warn(
            f"{', '.join(unknown[:4])}{' and others' if len(unknown) > 4 else ''}: found by the base's weights alone, "
            "and not judged to be in the right place. Give --base."
        )
    wrong = {path: problem for path, problem in problems.items() if path not in unknown}
    products = {product.output: product for product in find_products(model.graph)}
    index = {node: number for number, node in enumerate(model.graph)}
    for node in nodes:
        yield from _judge_node(node, products, found, wrong, index)


def _missing(nodes: Sequence[ir.Node], adapter: AdapterSpec) -> Iterator[Departure]:
    marked = [path for node in nodes for path, _ in _modules(node)]
    for path in sorted(adapter.projections.keys() - set(marked)):
        yield Departure("graph", path, "none", "no node of the graph adds its experts")
    for node in nodes:
        for path, _ in _modules(node):
            if path not in adapter.projections or marked.count(path) > 1:
                reason = "adds its experts once more" if path in adapter.projections else "the adapter has none for it"
                yield Departure("graph", path, name_of(node), reason)


@dataclass(frozen=True)
class _Place:
    """Where a module was found: columns of the product that is node `index`, and whether x is what comes before a
    factor that was taken out of its weights."""

    index: int
    start: int
    end: int
    is_taken_out: bool


def _found_again(
    model: ir.Model, adapter: AdapterSpec, weigher: Weigher | None
) -> tuple[dict[str, list[_Place]], dict[str, str]]:
    """Each module's place in the graph without the op, and why the rest have none."""
    bare = model.clone()
    index = {node: number for number, node in enumerate(bare.graph)}
    detach(bare)
    sizes = {path: (p.in_features, p.out_features) for path, p in adapter.projections.items()}
    found, problems = find_all(bare.graph, sizes, weigher)
    return {path: _places_of(answer, index) for path, answer in found.items()}, problems


def _places_of(found: Found, index: Mapping[ir.Node, int]) -> list[_Place]:
    return [
        _Place(index[span.product.node], span.start, span.end, span.product.taken_out is not None)
        for span in found.spans
    ]


def _judge_node(
    node: ir.Node,
    products: Mapping[ir.Value, Product],
    found: Mapping[str, list[_Place]],
    problems: Mapping[str, str],
    index: Mapping[ir.Node, int],
) -> Iterator[Departure]:
    modules, name = _modules(node), name_of(node)
    paths = ",".join(path for path, _ in modules)
    x, base = node.inputs[:2]
    pieces = _pieces(base, products)
    if x is None or base is None or pieces is None:
        reason = f"{base.name if base else None}, its base, is no product with a stored weight"
        yield Departure("graph", paths, name, reason)
        return
    yield from (Departure("graph", paths, name, reason) for reason in _passed_by(node, pieces))
    for path, columns in modules:
        behind = _within(pieces, columns)
        if path in problems:
            yield Departure("graph", path, name, f"is behind {_listed(behind)}, and the module {problems[path]}")
            continue
        places = found.get(path)
        if places is not None and _numbered(behind, index) != [(each.index, each.start, each.end) for each in places]:
            yield Departure("graph", path, name, f"is behind {_listed(behind)}, which is another projection")
            continue
        for number, piece in enumerate(behind):
            read = _may_read(piece.product, None if places is None else places[number].is_taken_out)
            if x not in read:
                expected = " or ".join(str(value.name) for value in read) or "what comes before a factor"
                yield Departure("graph", path, name, f"reads {x.name}, and the product behind it {expected}")


def _may_read(product: Product, is_taken_out: bool | None) -> list[ir.Value]:
    """What the node behind a product may read, where it is known whether a factor was taken out of its weights, and
    where it is not."""
    scaling = product.scaling
    if scaling is None:
        return [] if is_taken_out else [product.x]
    if is_taken_out is None:
        return [scaling.before, scaling.after]
    return [scaling.before if is_taken_out else scaling.after]


def _modules(node: ir.Node) -> list[tuple[str, tuple[int, int] | None]]:
    """The modules whose experts a node adds, each with its columns; None: all of them."""
    marks = node.outputs[0].metadata_props
    paths = marks[MODULES_KEY].split(",") if MODULES_KEY in marks else []
    if COLUMNS_KEY not in marks:
        return [(path, None) for path in paths]
    borders = [columns.partition(":") for columns in marks[COLUMNS_KEY].split(",")]
    return [(path, (int(start), int(end))) for path, (start, _, end) in zip(paths, borders, strict=False)]


def _pieces(base: ir.Value | None, products: Mapping[ir.Value, Product]) -> list[_Piece] | None:
    """The columns of products that a base is put together of; None where it is anything else."""
    maker = base.producer() if base is not None else None
    if base in products:
        return [_Piece(products[base], 0, products[base].out_features)]  # type: ignore[index]
    if maker is not None and maker.op_type == "Concat" and all(value in products for value in maker.inputs):
        whole = [products[value] for value in maker.inputs]  # type: ignore[index]
        return [_Piece(product, 0, product.out_features) for product in whole]
    source = input_of(maker, 0) if maker is not None and maker.op_type == "Split" else None
    sizes = constant_of(input_of(maker, 1)) if maker is not None else None
    if source in products and sizes is not None and base is not None:
        widths = [int(size) for size in sizes.numpy()]
        start = sum(widths[: base.index()])
        return [_Piece(products[source], start, start + widths[base.index() or 0])]  # type: ignore[index]
    return None


def _within(pieces: Sequence[_Piece], columns: tuple[int, int] | None) -> list[_Piece]:
    """Those columns of all `pieces`, side by side."""
    if columns is None:
        return list(pieces)
    found, offset = [], 0
    for piece in pieces:
        start, end = (min(max(border - offset, 0), piece.end - piece.start) for border in columns)
        if start < end:
            found.append(_Piece(piece.product, piece.start + start, piece.start + end))
        offset += piece.end - piece.start
    return found


def _numbered(pieces: Sequence[_Piece], index: Mapping[ir.Node, int]) -> list[tuple[int, int, int]]:
    return [(index[piece.product.node], piece.start, piece.end) for piece in pieces]


def _listed(pieces: Sequence[_Piece]) -> str:
    return ", ".join(f"{name_of(piece.product.node)}[{piece.start}:{piece.end}]" for piece in pieces)


def _passed_by(node: ir.Node, pieces: Sequence[_Piece]) -> Iterator[str]:
    """Readers of what the products behind a node give that do not go through the op."""
    base = node.inputs[1]
    assert base is not None
    for value in dict.fromkeys((base, *(piece.product.output for piece in pieces))):
        is_base = value is base
        others = [name_of(each) for each in value.consumers() if not (each is node if is_base else _leads_to_op(each))]
        others += ["an output of the model"] if value.is_graph_output() else []
        if others:
            yield f"{others[0]} reads {value.name} without what the experts add"


def _leads_to_op(node: ir.Node) -> bool:
    """The op, or what takes bases together or apart for it."""
    if op.is_op(node):
        return True
    readers = [each for value in node.outputs for each in value.consumers()]
    return node.op_type in ("Concat", "Split") and any(op.is_op(each) for each in readers)
