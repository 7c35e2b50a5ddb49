"""From an adapted model to an ONNX graph, and from weights on disk to its external data.

`build.py` is the way through: `record.py` notes what each layer computes, `layers.py` plans a shallow model of it,
`trace.py` makes a graph whose initializers are recipes, not numbers (`tasks.py`: of which inputs and outputs),
`optimize.py` simplifies it exactly, `passes/` rewrites it, `stamp.py` repeats its layers.
`op.py` defines the op and its function body. `traced.py` keeps graphs for the next adapter; `weights.py` has the
recipes, `cooked.py` what they give, `external_data.py` writes that beside the model. `read.py` reads what was written.
"""
