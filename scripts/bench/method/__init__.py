"""The method itself, measured: what TeamLoRA and its relatives score, and what they cost.

`plan.py` says what is trained, at which rank; `score.py` asks a model and counts; `cells.py` trains and scores one cell
of the grid and keeps it; `exports.py` scores what is exported; `steps.py` and `inference.py` time, in strict turns;
`apart.py` has processes of their own. `groups.py` names results, `significance.py` says how sure a difference is,
`paper.py` what the paper makes of it, `notes.py` what a reader has to know of it all, and `report.py` shows it.
`figures.py` writes the folder, `rows.py` says what is in its figures, and `other_run.py` reads another's. `claims.py`
beside this folder is the command; `ask.py` and `quantised.py` there leave a file each (`record.py`), and all of them
end alike (`command.py`).
"""

import os

# Before transformers is imported, which reads it then: what is measured lies on this machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before PyTorch is imported, likewise: as in the command (`teamlora_export/__main__.py`).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
