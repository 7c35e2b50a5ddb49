"""`teamlora::MixedExpertProjection`: the one definition of the op.

| in | type and shape | |
|---|---|---|
| x | T [.., in] | |
| base | T [.., O] | the frozen projections' output, siblings concatenated; O = sum(out_splits) |
| down | T [G (a + k), in] | per sibling: a rows of A (constants folded in), then k router rows |
| mix | float32 [G, k, k] | per sibling: I + M |
| up | T [k c, O] | expert-major; the columns of sibling g serve sibling g alone |

out: y, T [.., O] = base + the mixed experts. T is float32, float16 or bfloat16.
Attributes: num_experts (k), shared_down (0: a = k c, expert e reads its chunk; 1: a = c, all read the whole),
out_splits (G widths).

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
interaction is linear, so with c = mix 1 the whole routing is  w = (p mix) / (p c).  Each weight is needed c times, once
for each column of its expert, so `mix` is widened instead of w: constants, folded when the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from teamlora_export.adapter.spec import ExpertProjection

NAME = "MixedExpertProjection"
DOMAIN = "teamlora"
VERSION = 1
# What the tracer marks module outputs with; `passes/module_outputs.py` takes the marks out again.
MARKER = "ModuleOutput"
INPUTS = ("x", "base", "down", "mix", "up")
ATTRIBUTES = ("num_experts", "shared_down", "out_splits")
# Of ONNX's own operators: what the body needs, and what graphs are traced in (the first with TensorScatter).
BODY_OPSET, OPSET = 20, 24


@dataclass(frozen=True)
class OpForm:
    """What a function body is specialised for."""

    num_siblings: int
    shared_down: bool

    @property
    def overload(self) -> str:
        return f"siblings{self.num_siblings}" + ("_shared" if self.shared_down else "")


@dataclass(frozen=True)
class OpWeights:
    """One projection's weights as the op takes them, in float64: down [a + k, in], mix [1, k, k], up [k c, out]."""

    down: np.ndarray
    mix: np.ndarray
    up: np.ndarray


def is_op(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == NAME


def form_of(node: ir.Node) -> OpForm:
    return OpForm(len(node.attributes["out_splits"].as_ints()), bool(node.attributes["shared_down"].as_int()))


def fold(projection: ExpertProjection) -> OpWeights:
    """Fold scaling and routing sum into A, stack A and R, widen M to I + M. Exact up to float64 rounding."""
    constant = projection.scaling * projection.routing_sum
    k = projection.num_experts
    return OpWeights(
        down=np.concatenate([projection.down.astype(np.float64) * constant, projection.router.astype(np.float64)]),
        mix=(np.eye(k) + projection.interaction.astype(np.float64))[None],
        up=np.concatenate([up.astype(np.float64).T for up in projection.ups]),
    )


def weight_shapes(projection: ExpertProjection) -> dict[str, tuple[int, ...]]:
    """Shapes of `fold(projection)` without folding it."""
    k = projection.num_experts
    return {
        "down": (projection.down_rank + k, projection.in_features),
        "mix": (1, k, k),
        "up": (k * projection.expert_rank, projection.out_features),
    }


def function(form: OpForm, opset: int = BODY_OPSET) -> ir.Function:
    """The function body for `form`, in standard ops of `opset`: the model's own, `BODY_OPSET` or newer, since a body
    that is put in place of its node becomes part of the model."""
    proto = onnx.parser.parse_function(_body_text(form, opset))
    proto.overload = form.overload
    for index, node in enumerate(proto.node):
        node.name = f"{NAME}_{form.overload}_{index}_{node.op_type}"
    return ir.serde.deserialize_function(proto)


def _body_text(form: OpForm, opset: int) -> str:
    siblings = range(form.num_siblings)
    lines = [
        "k = Constant <value_int: int = @num_experts> ()",
        "one = Constant <value_ints = [1]> ()",
        "two = Constant <value_ints = [2]> ()",
        "k_dim = Reshape (k, one)",
        "down_t = Transpose <perm = [1, 0]> (down)",
        "z = MatMul (x, down_t)",
        "rows = Shape <start = 0, end = 1> (down)",
        f"sibling_count = Constant <value_ints = [{form.num_siblings}]> ()",
        "sibling_rows = Div (rows, sibling_count)",
        "a_dim = Sub (sibling_rows, k_dim)",
        "z_sizes = Concat <axis = 0> (a_dim, k_dim)",
        "kc_dim = Shape <start = 0, end = 1> (up)",
        "c_dim = Div (kc_dim, k_dim)",
        "wide_shape = Concat <axis = 0> (one, one, c_dim)",
        "flat_shape = Concat <axis = 0> (k_dim, kc_dim)",
        *_split("z", "-1", siblings, f"num_outputs = {form.num_siblings}", ""),
        *_split("mix", "0", siblings, f"num_outputs = {form.num_siblings}", ""),
        *(["out_sizes = Constant <value_ints: ints = @out_splits> ()"] if form.num_siblings > 1 else []),
        *_split("up", "1", siblings, "", ", out_sizes"),
    ]
    for g in siblings:
        lines += _sibling_text(g, form.shared_down)
    if form.num_siblings == 1:
        lines.append("y = Add (base, delta_0)")
    else:
        lines.append(f"delta = Concat <axis = -1> ({', '.join(f'delta_{g}' for g in siblings)})")
        lines.append("y = Add (base, delta)")
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{NAME} <{', '.join(ATTRIBUTES)}> ({', '.join(INPUTS)}) => (y)\n{{\n{body}\n}}"
    )


def _split(name: str, axis: str, siblings: range, attribute: str, sizes: str) -> list[str]:
    """Cut `name` into one part for each sibling; a single sibling takes it whole."""
    if len(siblings) == 1:
        return [f"{name}_0 = Identity ({name})"]
    outputs = ", ".join(f"{name}_{g}" for g in siblings)
    separator = ", " if attribute else ""
    return [f"{outputs} = Split <axis = {axis}{separator}{attribute}> ({name}{sizes})"]


def _sibling_text(g: int, shared_down: bool) -> list[str]:
    lines = [
        f"u_{g}, logits_{g} = Split <axis = -1> (z_{g}, z_sizes)",
        f"logits32_{g} = Cast <to = 1> (logits_{g})",
        f"p_{g} = Softmax <axis = -1> (logits32_{g})",
        f"mix2_{g} = Squeeze (mix_{g}, zero_{g})",
        f"mix3_{g} = Unsqueeze (mix2_{g}, two)",
        f"mix_wide3_{g} = Expand (mix3_{g}, wide_shape)",
        f"mix_wide_{g} = Reshape (mix_wide3_{g}, flat_shape)",
        f"mix_sum_{g} = ReduceSum <keepdims = 1> (mix2_{g}, one)",
        f"w_wide_{g} = MatMul (p_{g}, mix_wide_{g})",
        f"w_sum_{g} = MatMul (p_{g}, mix_sum_{g})",
        f"w_{g} = Div (w_wide_{g}, w_sum_{g})",
        f"u32_{g} = Cast <to = 1> (u_{g})",
    ]
    lines.insert(3, f"zero_{g} = Constant <value_ints = [0]> ()")
    experts = f"u32_{g}"
    if shared_down:
        experts = f"experts_{g}"
        lines += [
            f"u_shape_{g} = Shape (u_{g})",
            f"u_rank_{g} = Shape (u_shape_{g})",
            f"lead_{g} = Sub (u_rank_{g}, one)",
            f"ones_{g} = Expand (one, lead_{g})",
            f"repeats_{g} = Concat <axis = 0> (ones_{g}, k_dim)",
            f"{experts} = Tile (u32_{g}, repeats_{g})",
        ]
    return [
        *lines,
        f"v32_{g} = Mul ({experts}, w_{g})",
        f"v_{g} = CastLike (v32_{g}, x)",
        f"delta_{g} = MatMul (v_{g}, up_{g})",
    ]
