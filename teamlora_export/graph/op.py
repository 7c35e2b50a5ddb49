"""`teamlora::MixedExpertProjection`: the one definition of the op.

| in | type and shape | |
|---|---|---|
| x | T [.., in] | |
| base | T [.., O] | the frozen projections' output, siblings concatenated; O = sum(out_splits) |
| down | T [G (a + k), in] | per sibling: a rows of A (constants folded in), then k router rows |
| mix | float32 [G, k, k] | per sibling: I + M |
| up | T [k c, O] | expert-major; the columns of sibling g serve sibling g alone |

out: y, T [.., O] = base + the mixed experts. T is float32, float16 or bfloat16. Where T is float32, `down` and `up` may
be float16 or bfloat16, both of one type; they are widened, which is exact.
Attributes: num_experts (k), shared_down (0: a = k c, expert e reads its chunk; 1: a = c, all read the whole),
out_splits (G widths).

Version 2 has an optional input, and without it is version 1:

| adapter | int32 [batch] or [1] | the slot of each row's adapter, or of all rows'; below 0: the base alone, y = base |

x and base are then [batch, tokens, ..], and `down`, `mix` and `up` have a leading dimension of N slots, an adapter in
each. Adapters of fewer experts or a smaller rank share a slot by padding (`adapter/padding.py`), which is exact: an
expert whose row of `mix` is all zeros is not part of the routing, whatever its logit, and a sibling all of whose rows
are adds nothing to rows whose z is finite. An index of N or more is an error. So is any other number of indices: the
kernels refuse it, and the body does but beside a batch of one row, which it broadcasts as standard operators do: y then
has a row for each index.

What is computed, and where it is rounded. Sums are in float32, in any order; "to T" is one rounding to nearest, ties to
even, and none where T is float32:

1. z = x downT, summed in float32, rounded to T. Its first a columns of a sibling are u, the last k the logits.
2. w = normalise(softmax(logits) mix), in float32 throughout, from the rounded logits.
3. v = w_e u_j for each expert e and column j that it reads, multiplied in float32, rounded to T.
4. y = base + v up, summed in float32, rounded to T. An implementation may round v up to T before it adds `base`, as the
   function body must, whose values have no other type; a kernel need not.

The roundings of 1, 3 and of y belong to the definition: the CUDA kernels and the body make all of them, and tests hold
both to float64 with exactly these. (ONNX Runtime's CPU provider has no products in float16: it computes the body in
float32 and drops casts to T that it finds between two products, so that it rounds less there.)

The function body is written out for each form (G, shared_down), which is the function's overload, because ONNX has no
loop over siblings that a compiler would see through. Softmax's own denominator cancels in the normalisation, and the
interaction is linear, so with s = mix 1 the whole routing is  w = (p mix) / (p s).  Each weight is needed c times, once
for each column of its expert, so `mix` is widened instead of w; the siblings' matrices stand on one diagonal, so that
all are mixed at once. These are constants, folded when the model is loaded. (A NaN in the logits of one sibling is one
in the weights of all; they read the same x.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from teamlora_export.adapter.spec import ExpertProjection

NAME = "MixedExpertProjection"
DOMAIN = "teamlora"
VERSION = 1
# Of a node that has the optional input.
ADAPTERS_VERSION = 2
# What the tracer marks module outputs with; `passes/module_outputs.py` takes the marks out again.
MARKER = "ModuleOutput"
INPUTS = ("x", "base", "down", "mix", "up")
OPTIONAL_INPUTS = ("adapter",)
# May have 16 bits where T is float32.
NARROW_INPUTS = ("down", "up")
ATTRIBUTES = ("num_experts", "shared_down", "out_splits")
# What the CUDA kernels take of one projection: experts k, and rows k c of `up`.
MOST_EXPERTS_ON_GPU, MOST_RANK_ON_GPU = 32, 4096
# Of ONNX's own operators: what the body is written in unless a graph is older, what it can be written in at least, and
# what graphs are traced in (the first with TensorScatter).
BODY_OPSET, OLDEST_OPSET, OPSET = 20, 13, 24


@dataclass(frozen=True)
class OpForm:
    """What a function body is specialised for."""

    num_siblings: int
    shared_down: bool
    adapters: bool = False
    # `down` and `up` have 16 bits, and T is float32.
    narrow: bool = False

    @property
    def overload(self) -> str:
        return (
            f"siblings{self.num_siblings}"
            + "_shared" * self.shared_down
            + "_adapters" * self.adapters
            + "_narrow" * self.narrow
        )

    @property
    def version(self) -> int:
        return ADAPTERS_VERSION if self.adapters else VERSION

    @property
    def inputs(self) -> tuple[str, ...]:
        return INPUTS + OPTIONAL_INPUTS if self.adapters else INPUTS


@dataclass(frozen=True)
class OpWeights:
    """One projection's weights as the op takes them, in float64: down [a + k, in], mix [1, k, k], up [k c, out]."""

    down: np.ndarray
    mix: np.ndarray
    up: np.ndarray


def is_op(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == NAME


def takes_adapters(node: ir.Node) -> bool:
    """Whether a node of the op has the optional input, and so is of version 2."""
    return len(node.inputs) > len(INPUTS) and node.inputs[len(INPUTS)] is not None


def form_of(node: ir.Node) -> OpForm:
    return OpForm(
        len(node.attributes["out_splits"].as_ints()),
        bool(node.attributes["shared_down"].as_int()),
        takes_adapters(node),
        has_narrow_weights(node),
    )


def has_narrow_weights(node: ir.Node) -> bool:
    """Whether a node's `down` and `up` have 16 bits, and its T is float32."""
    up = node.inputs[INPUTS.index("up")]
    return up is not None and up.dtype != ir.DataType.FLOAT and node.outputs[0].dtype == ir.DataType.FLOAT


def fold(projection: ExpertProjection) -> OpWeights:
    """Fold scaling and routing sum into A, stack A and R, widen M to I + M. Exact up to float64 rounding."""
    constant = projection.scaling * projection.routing_sum
    k = projection.num_experts
    return OpWeights(
        down=np.concatenate([projection.down.astype(np.float64) * constant, projection.router.astype(np.float64)]),
        mix=(np.eye(k) + projection.interaction.astype(np.float64))[None],
        up=np.concatenate([up.astype(np.float64).T for up in projection.ups]),
    )


def as_held(projection: ExpertProjection, dtype: np.dtype, parts: int = 1) -> ExpertProjection:
    """The projection that `down` and `up` of `dtype` stand for, in float64: folding it again gives their numbers.

    Args:
        parts: what B is held multiplied by, of an adapter in a slot (`Slot.parts`).
    """
    weights = fold(projection)
    constant = projection.scaling * projection.routing_sum
    down = weights.down.astype(dtype).astype(np.float64)
    ups = ((up.astype(np.float64) * parts).astype(dtype).astype(np.float64) / parts for up in projection.ups)
    rows = projection.down_rank
    return replace(projection, down=down[:rows] / constant, router=down[rows:], ups=tuple(ups))


def weight_shapes(projection: ExpertProjection) -> dict[str, tuple[int, ...]]:
    """Shapes of `fold(projection)` without folding it."""
    k = projection.num_experts
    return {
        "down": (projection.down_rank + k, projection.in_features),
        "mix": (1, k, k),
        "up": (k * projection.expert_rank, projection.out_features),
    }


def function(form: OpForm, opset: int = BODY_OPSET, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Function:
    """The function body for `form`, in standard ops of `opset`: the model's own, `OLDEST_OPSET` or newer, since a body
    that is put in place of its node becomes part of the model. Below 15 it is for T = `dtype` alone."""
    proto = onnx.parser.parse_function(_body_text(form, opset, dtype))
    proto.overload = form.overload
    for index, node in enumerate(proto.node):
        node.name = f"{NAME}_{form.overload}_{index}_{node.op_type}"
    return ir.serde.deserialize_function(proto)


def _body_text(form: OpForm, opset: int, dtype: ir.DataType) -> str:
    lines = [*_widened(form), *_sizes(form), *_chosen(form), *_skinny_product(form), *_routing(form), *_experts(form)]
    body = "\n".join(f"    {older}" for line in lines for older in _as_in(opset, line, dtype))
    inputs = ", ".join(_held(name, form) for name in form.inputs)
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{NAME} <{', '.join(ATTRIBUTES)}> ({inputs}) => (y)\n{{\n{body}\n}}"
    )


def _held(name: str, form: OpForm) -> str:
    """What the body calls an input."""
    return f"{name}_held" if form.narrow and name in NARROW_INPUTS else name


def _widened(form: OpForm) -> list[str]:
    """Weights of 16 bits as numbers of T: constants, folded when the model is loaded. Of slots, those that are chosen
    are (`_gathered`)."""
    if form.adapters:
        return []
    return [f"{name} = CastLike ({_held(name, form)}, x)" for name in NARROW_INPUTS if form.narrow]


def _gathered(name: str, form: OpForm) -> list[str]:
    """What a weight's slots hold of each row's adapter, as numbers of T."""
    if _held(name, form) == name:
        return [f"{name}_of = Gather <axis = 0> ({name}, slot)"]
    return [
        f"{name}_narrow = Gather <axis = 0> ({_held(name, form)}, slot)",
        f"{name}_of = CastLike ({name}_narrow, x)",
    ]


def _as_in(opset: int, line: str, dtype: ir.DataType) -> list[str]:
    """A line of the body as an older opset has it."""
    if opset < 18:
        # Equal parts, as many as there are outputs.
        line = re.sub(r", num_outputs = \d+", "", line)
    if opset < 15:
        line = re.sub(r"CastLike \((\w+), x\)", rf"Cast <to = {dtype.value}> (\1)", line)
        if part := re.fullmatch(r"(\w+) = Shape <start = (\d), end = \d> \((\w+)\)", line):
            name, axis, value = part.groups()
            return [f"{name}_of = Shape ({value})", f"{name} = Gather ({name}_of, {_NUMBERS[int(axis)]})"]
    return [line]


# Constants of the body, by value.
_NUMBERS = ("zero", "one", "two", "three", "four")


def _each(name: str, form: OpForm) -> list[str]:
    """The parts of `name`, one for each sibling; a single sibling has it whole."""
    return [name] if form.num_siblings == 1 else [f"{name}_{g}" for g in range(form.num_siblings)]


def _join(name: str, form: OpForm) -> list[str]:
    """`name` of its parts, side by side."""
    return [] if form.num_siblings == 1 else [f"{name} = Concat <axis = -1> ({', '.join(_each(name, form))})"]


def _axis(form: OpForm, axis: int) -> int:
    """Where an axis of an adapter's weight is: behind that of the slots, or of the rows, where there is one."""
    return axis + form.adapters


def _row(form: OpForm) -> str:
    """Put before the sizes that Reshape and Expand give: the rows stay as many as they are."""
    return "zero, " if form.adapters else ""


def _row_of_one(form: OpForm) -> str:
    return "one, " if form.adapters else ""


def _sizes(form: OpForm) -> list[str]:
    def size(name: str, value: str, axis: int) -> str:
        axis = _axis(form, axis)
        return f"{name} = Shape <start = {axis}, end = {axis + 1}> ({value})"

    return [
        *(f"{name} = Constant <value_ints = [{i}]> ()" for i, name in enumerate(_NUMBERS[: 5 if form.adapters else 4])),
        f"g_dim = Constant <value_ints = [{form.num_siblings}]> ()",
        "k = Constant <value_int: int = @num_experts> ()",
        "k_dim = Reshape (k, one)",
        size("kc_dim", _shaped("up", form), 0),
        "c_dim = Div (kc_dim, k_dim)",
        size("rows", _shaped("down", form), 0),
        "sibling_rows = Div (rows, g_dim)",
        "a_dim = Sub (sibling_rows, k_dim)",
    ]


def _chosen(form: OpForm) -> list[str]:
    """What each row's adapter is made of, [batch or 1, ..]; that of the first slot where it has none."""
    if not form.adapters:
        return []
    return [
        "none = Constant <value = int32[1] {0}> ()",
        "slot = Max (adapter, none)",
        *(line for name in ("down", "mix", "up") for line in _gathered(name, form)),
        # Whether a row has an adapter at all, and of it each expert, and each sibling.
        "has_adapter = GreaterOrEqual (adapter, none)",
        "by_row = Concat <axis = 0> (zero, one, one)",
        "has_rows = Reshape (has_adapter, by_row)",
        "mix_size = Abs (mix_of)",
        "row_size = ReduceSum <keepdims = 0> (mix_size, three)",
        "no_size = Constant <value = float[1] {0}> ()",
        "has_expert = Greater (row_size, no_size)",
        "expert_count = Cast <to = 1> (has_expert)",
        "sibling_count = ReduceSum <keepdims = 1> (expert_count, two)",
        "has_no_sibling = Equal (sibling_count, no_size)",
        "blank = Cast <to = 1> (has_no_sibling)",
        "least = Constant <value = float[1] {-3.4028234e38}> ()",
    ]


def _shaped(name: str, form: OpForm) -> str:
    """A value of a weight's shape, slots included."""
    return _held(name, form) if form.adapters else name


def _weight(name: str, form: OpForm) -> str:
    return f"{name}_of" if form.adapters else name


def _skinny_product(form: OpForm) -> list[str]:
    """z = x downT, cut into u of all siblings and the logits of each. The rows of A come first, then those of R."""
    lines = []
    down = rows = _weight("down", form)
    first = _axis(form, 0)
    if form.num_siblings > 1:
        rows = "regrouped"
        lines = [
            f"in_dim = Shape <start = {first + 1}, end = {first + 2}> ({_shaped('down', form)})",
            "minus_one = Constant <value_ints = [-1]> ()",
            f"by_sibling = Concat <axis = 0> ({_row(form)}g_dim, sibling_rows, in_dim)",
            f"flat = Concat <axis = 0> ({_row(form)}minus_one, in_dim)",
            "row_sizes = Concat <axis = 0> (a_dim, k_dim)",
            f"down3 = Reshape ({down}, by_sibling)",
            f"a3, r3 = Split <axis = {first + 1}> (down3, row_sizes)",
            "a2 = Reshape (a3, flat)",
            "r2 = Reshape (r3, flat)",
            f"regrouped = Concat <axis = {first}> (a2, r2)",
        ]
    u, u_sizes = (_each("u", form), ["a_dim"] * form.num_siblings) if form.shared_down else (["u"], ["u_dim"])
    return [
        *lines,
        f"down_t = Transpose <perm = [{'0, 2, 1' if form.adapters else '1, 0'}]> ({rows})",
        "z = MatMul (x, down_t)",
        "u_dim = Mul (a_dim, g_dim)",
        f"z_sizes = Concat <axis = 0> ({', '.join([*u_sizes, *['k_dim'] * form.num_siblings])})",
        f"{', '.join([*u, *_each('logits', form)])} = Split <axis = -1> (z, z_sizes)",
    ]


def _routing(form: OpForm) -> list[str]:
    """w [.., G k c], from the softmax of each sibling and the mixing matrices of all, side by side on a diagonal."""
    mix, row, row_of_one = _weight("mix", form), _row(form), _row_of_one(form)
    # Axes of `mix`: its columns, and one behind them.
    axis_of_columns, axis_behind = (_NUMBERS[_axis(form, axis)] for axis in (2, 3))
    lines = []
    if form.adapters and form.num_siblings > 1:
        parts = ", ".join(_each("has_expert", form))
        lines.append(f"{parts} = Split <axis = 1, num_outputs = {form.num_siblings}> (has_expert)")
    for g, (p, logits) in enumerate(zip(_each("p", form), _each("logits", form), strict=True)):
        routed = f"{logits}_32"
        lines.append(f"{routed} = Cast <to = 1> ({logits})")
        if form.adapters:
            lines.append(f"{logits}_own = Where ({_each('has_expert', form)[g]}, {routed}, least)")
            routed = f"{logits}_own"
        lines.append(f"{p} = Softmax <axis = -1> ({routed})")
    lines += [
        *_join("p", form),
        f"mix4 = Unsqueeze ({mix}, {axis_behind})",
        f"repeats_c = Concat <axis = 0> ({row_of_one}one, one, one, c_dim)",
        "mix_wide4 = Expand (mix4, repeats_c)",
        f"sum3 = ReduceSum <keepdims = 1> ({mix}, {axis_of_columns})",
    ]
    if form.num_siblings == 1:
        lines += [
            f"wide_shape = Concat <axis = 0> ({row}k_dim, kc_dim)",
            "mix_wide = Reshape (mix_wide4, wide_shape)",
            f"mix_sum = Squeeze (sum3, {_NUMBERS[_axis(form, 0)]})",
        ]
    else:
        n = form.num_siblings
        own = ", ".join("1" if row == column else "0" for row in range(n) for column in range(n))
        lines += [
            f"own = Constant <value = float[{n}, 1, {n}, 1] {{{own}}}> ()",
            "gk_dim = Mul (g_dim, k_dim)",
            "gkc_dim = Mul (g_dim, kc_dim)",
            f"row_shape = Concat <axis = 0> ({row}g_dim, k_dim, one, kc_dim)",
            f"wide_shape = Concat <axis = 0> ({row}gk_dim, gkc_dim)",
            f"repeats_kc = Concat <axis = 0> ({row_of_one}one, one, one, kc_dim)",
            "mix_rows = Reshape (mix_wide4, row_shape)",
            "mix_blocks = Mul (mix_rows, own)",
            "mix_wide = Reshape (mix_blocks, wide_shape)",
            f"sum4 = Unsqueeze (sum3, {axis_behind})",
            "sum_rows = Expand (sum4, repeats_kc)",
            "sum_blocks = Mul (sum_rows, own)",
            "mix_sum = Reshape (sum_blocks, wide_shape)",
        ]
    lines += ["w_wide = MatMul (p, mix_wide)", "w_sum = MatMul (p, mix_sum)"]
    if not form.adapters:
        return [*lines, "w = Div (w_wide, w_sum)"]
    if form.num_siblings > 1:
        lines += [
            "repeats_blank = Concat <axis = 0> (one, one, kc_dim)",
            "blank_rows = Expand (blank, repeats_blank)",
            "blank_shape = Concat <axis = 0> (zero, one, gkc_dim)",
            "blank_wide = Reshape (blank_rows, blank_shape)",
        ]
    # 0 / 1 for a sibling without experts, in place of 0 / 0.
    blank = "blank" if form.num_siblings == 1 else "blank_wide"
    return [*lines, f"w_total = Add (w_sum, {blank})", "w = Div (w_wide, w_total)"]


def _experts(form: OpForm) -> list[str]:
    """y, from what each expert reads of u, times its weight."""
    lines = []
    if form.shared_down:
        lines = [
            "x_shape = Shape (x)",
            "x_rank = Shape (x_shape)",
            "lead = Sub (x_rank, one)",
            "ones = Expand (one, lead)",
            "repeats_u = Concat <axis = 0> (ones, k_dim)",
        ]
        for read, u in zip(_each("read", form), _each("u", form), strict=True):
            lines.append(f"{read} = Tile ({u}, repeats_u)")
        lines += _join("read", form)
    lines += [
        f"u32 = Cast <to = 1> ({'read' if form.shared_down else 'u'})",
        "v32 = Mul (u32, w)",
        "v = CastLike (v32, x)",
    ]
    ups = [_weight("up", form)]
    if form.num_siblings > 1:
        ups = _each("up", form)
        lines += [
            f"{', '.join(_each('v', form))} = Split <axis = -1, num_outputs = {form.num_siblings}> (v)",
            "out_sizes = Constant <value_ints: ints = @out_splits> ()",
            f"{', '.join(ups)} = Split <axis = {_axis(form, 1)}> ({_weight('up', form)}, out_sizes)",
        ]
    for delta, v, up in zip(_each("delta", form), _each("v", form), ups, strict=True):
        lines.append(f"{delta} = MatMul ({v}, {up})")
    lines += _join("delta", form)
    if not form.adapters:
        return [*lines, "y = Add (base, delta)"]
    return [
        *lines,
        "no_experts = CastLike (no_size, x)",
        "experts = Where (has_rows, delta, no_experts)",
        "y = Add (base, experts)",
    ]
