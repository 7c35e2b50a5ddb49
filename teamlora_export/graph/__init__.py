"""From an adapted model to an ONNX graph, and from weights on disk to its external data.

`trace.py` makes a graph whose initializers are recipes, not numbers; `passes/` rewrites it; `op.py` defines the op and
its function body; `weights.py` cooks the recipes, one tensor at a time, into the data file.
"""
