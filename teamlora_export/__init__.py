"""Takes a trained TeamLoRA model to ONNX Runtime, TensorRT, Triton and C++.

    adapter/ -> model/ -> graph/ -> engine/ -> validate/ -> deploy/

Each package imports only from those on its left; `bundle.py` is the folder they pass on, `manifest.py` what it says of
itself, `ports.py` what goes into a model and comes out; `cli.py` stands above them.
"""

__version__ = "0.1.0"
