"""Judges an artefact against PyTorch.

`run.py` is the way through: `cases.py` makes inputs; `torch_runner.py`, `onnx_runner.py`, `engine_runner.py` and, for
models larger than memory, `layerwise.py` run them; `metrics.py` measures. Three judges decide: `judge.py` on the
outputs, `stored.py` on every weight in the file, `local.py` on every module, fed with what the candidate computed
before it (`taps.py`). `shelf.py` judges rows that have adapters of their own, `engine_shelf.py` has these in an engine.
In ONNX Runtime the op is run by its body, or by a native library. `widen.py` runs a 16-bit graph in float32
arithmetic, with or without its roundings. `verdict.py` is what they find, `report.py` shows it.
"""
