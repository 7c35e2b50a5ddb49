"""The method itself, measured: what TeamLoRA and its relatives score, and what they cost.

`plan.py` says what is trained, at which rank; `score.py` asks a model and counts; `cells.py` trains and scores one cell
of the grid and keeps it; `exports.py` scores what is exported; `steps.py` and `inference.py` time, in strict turns;
`report.py` tells it all. `claims.py` beside this folder is the command.
"""
