"""The adapted model in PyTorch: the reference that every artefact is judged against, and what training runs.

`layer.py` is the mathematics, `inject.py` puts it into a Hugging Face model, `balance.py` is the training loss.
`base.py` opens base models in PyTorch, `streaming.py` runs those that do not fit into memory. `source.py` and
`checkpoint.py` find a base's files and read its weights without torch.
"""

from teamlora_export.model.versions import require_transformers

require_transformers()
