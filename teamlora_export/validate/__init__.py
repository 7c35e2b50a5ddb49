"""Judges an artefact against PyTorch.

`run.py` is the way through: `cases.py` makes inputs, `runners.py` runs them (PyTorch in any precision, ONNX Runtime),
`engine_runner.py` runs an engine,
`metrics.py` measures, `judge.py` decides and locates, `report.py` shows. `bfloat16.py` lets a CPU run what it has no
kernels for; `layerwise.py` runs a model larger than memory.
"""
