"""The adapted model in PyTorch: the reference that every artefact is judged against, and what training runs.

`layer.py` is the mathematics, `inject.py` puts it into a Hugging Face model, `balance.py` is the training loss,
`base.py` opens base models, `checkpoint.py` reads their weights without loading the model.
"""
