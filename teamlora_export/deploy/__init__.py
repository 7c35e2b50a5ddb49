"""From a bundle to what a team drops into its system.

`folder.py` makes the folder that every target starts from: the model's files, a `deploy.json` with their hashes, and no
path of the machine that made it. `python.py` adds a single-file program, `genai.py` what onnxruntime-genai reads.
`templates/` holds what is written; `templates/runner.py` is also what `generate` and `embed` run.
"""
