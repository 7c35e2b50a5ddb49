"""Checkpoints of TeamLoRA and its relatives, read into one `AdapterSpec`.

`tensors.py` opens what lies on disk, `config.py` reads `adapter_config.json`, `families.py` knows each family's keys,
`read.py` joins the three, `check.py` compares the result with a base model, `write.py` writes the published layout.
To add a family, add one `Family` to `families.py`.
"""

from teamlora_export.adapter.check import BaseSignature, LinearShape, align_with_base
from teamlora_export.adapter.config import AdapterConfig
from teamlora_export.adapter.read import read_adapter
from teamlora_export.adapter.spec import AdapterSpec, ExpertProjection
from teamlora_export.adapter.write import write_adapter

__all__ = [
    "AdapterConfig",
    "AdapterSpec",
    "BaseSignature",
    "ExpertProjection",
    "LinearShape",
    "align_with_base",
    "read_adapter",
    "write_adapter",
]
