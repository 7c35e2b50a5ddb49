"""Simplifies a traced graph by rewrites that change no result: constants are folded, shapes made plain, copies dropped.

These are onnxscript's own folder and rules, in the order of its `optimize_ir`, with those left out that are not exact
for every graph (onnxscript 0.7):

    x * 1, x / 1, x + 0, x - 0               take 1.00001 for 1 and 1e-8 for 0: put in exactly, below; zeros for whole
                                             numbers alone, as -0.0 + 0.0 is 0.0
    Dropout(0)                               takes 1e-8 for 0, too
    Cast of Cast                             also from double and int64, which float32 rounds first
    Min, Max, Clip, Relu of one another      exchange the bounds where they cross
    BatchNormalization into Conv and Gemm    rounds the weights anew
    Pad into Conv, optional bias             fire on constant weights only, and ours are none
    MatMul between Reshapes                  look at the last shape, and not at those of the factors
    ScatterND of all rows                    forgets that it adds, and a Shape that ends early
    ConstantOfShape, then Cast               casts otherwise than the runtime, and fails out of range
    Flatten into Reshape                     gives two shapes one name; a size of 0 is taken for a copy
    Reshape to what is known                 a size of 0 beside one that is not known
    two Slices into a Split                  takes an odd size for an even one, and time: it goes through all nodes for
                                             each

What is folded is computed by numpy: of a sum, a sine or a power of constants the last bit may be another than the
runtime's, and of a number that does not fit a type, all of it. (The constants of the library's patterns match within
1e-5 and 1e-8 unless told otherwise; a test looks for such constants in every rule that is left. Of the last six, and of
zeros that are floats, none applied to an architecture of our tests, but for two Reshapes and two zeros of a mixture.)
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass, pattern
from onnxscript.rewriter.rules import common as rules

_ROUNDS = 2


def _exactly(number: int) -> pattern.Constant:
    return pattern.Constant(number, rel_tol=0.0, abs_tol=0.0)


def _unchanged(op, x, **_):  # type: ignore[no-untyped-def]
    return op.Identity(x)


def _is_whole(_context, x: ir.Value, **_) -> bool:  # type: ignore[no-untyped-def]
    """Of floats, zeros have signs."""
    return x.dtype is not None and x.dtype.is_integer()


_NO_OPS = (
    *pattern.RewriteRule(lambda op, x: op.Mul(x, _exactly(1)), _unchanged, name="mul by 1").commute(),
    pattern.RewriteRule(lambda op, x: op.Div(x, _exactly(1)), _unchanged, name="divide by 1"),
    *pattern.RewriteRule(lambda op, x: op.Add(x, _exactly(0)), _unchanged, _is_whole, name="add 0").commute(),
    pattern.RewriteRule(lambda op, x: op.Sub(x, _exactly(0)), _unchanged, _is_whole, name="subtract 0"),
)
EXACT_RULES: tuple[pattern.RewriteRule, ...] = (
    *_NO_OPS,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
)


def optimize(model: ir.Model) -> None:
    """Simplify `model` in place."""
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        fold_constants(model, onnx_shape_inference=True)
        ir.passes.Sequential(
            RewritePass(EXACT_RULES),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        )(model)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
