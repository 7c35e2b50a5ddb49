"""From a bundle to what a team drops into its system.

`folder.py` makes the folder that every target starts from: the model's files, a `deploy.json` with their hashes, and no
path of the machine that made it. `python.py` adds a single-file program, `genai.py` what onnxruntime-genai reads.
`runner.py` is that program, and what `generate` and `embed` run. `templates/` holds what else is written.
"""
