"""From a bundle to what a team drops into its system.

`folder.py` makes the folder that every target starts from: the model's files, a `deploy.json` with their hashes, and no
path of the machine that made it. Each target is one module: `python.py` adds a single-file program, `genai.py` what
onnxruntime-genai reads, `cpp.py` a CMake project, `triton.py` a model repository, whose configurations come from
`triton_config.py`. `genai_tokenizer.py` describes the tokenizer to onnxruntime-genai, `engine.py` adds engines with
their plugin, `render.py` fills in texts. `runner.py` is the single-file program, and what `generate` and `embed` run.
`templates/` holds what else is written: READMEs, C++ in `cpp/`, Python models and clients in `triton/`.
"""
