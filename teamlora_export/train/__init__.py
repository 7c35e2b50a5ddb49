"""Training of adapters: a Hugging Face base, JSON Lines, a family; an adapter in the published layout comes out.

`options.py` is what can be asked, `data.py`, `encode.py` and `material.py` read the rows, `model.py` is the adapted
model, `trainer.py` the loop (transformers' own), `evaluate.py` its figures, `checkpoint.py` what a killed training goes
on from, `card.py` what is written. `run.py` joins them.
"""

from teamlora_export.train.card import TrainResult
from teamlora_export.train.options import TrainOptions
from teamlora_export.train.run import count_parameters, train

__all__ = ["TrainOptions", "TrainResult", "count_parameters", "train"]
