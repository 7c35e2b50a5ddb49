"""From a bundle to what a team drops into its system.

`folder.py` makes the folder that every target starts from: the model's files, a `deploy.json` with their hashes, and no
path of the machine that made it. Each target is one module: `python.py` adds a program, `genai.py` what
onnxruntime-genai reads, `cpp.py` a CMake project, `triton.py` a model repository (what can be chosen of it is in
`triton_options.py`, its configurations in `triton_config.py`), `kubernetes.py` what runs that in a cluster.
`publish.py` brings a deployment's shelf to its bundle's. `genai_tokenizer.py` describes the tokenizer to
onnxruntime-genai, `engine.py` adds engines with their plugin, `library.py` the native op, `render.py` fills in texts.
`templates/` holds what else is written: READMEs, C++ in `cpp/`, Python models and clients in `triton/`.

What is deployed in Python stands alone: its files import one another and nothing else of ours. `python.py` lists them;
a new one is of no use before it is listed there.

    model_folder.py   what describes a model's folder, its hashes, its shelf; failure.py has what goes wrong in words
    model_session.py  an open model, whatever runs it: session.py on ONNX Runtime, engine_session.py on TensorRT
                      (device_tensor.py, cuda_memory.py: memory of a GPU; cores.py: how many threads;
                      pages.py: memory's pages)
    adapter_slots.py  the adapters of a shelf, in memory
    slots.py          rows of texts, each with its place in the cache (slots_*.py: by where that is)
    scheduler.py      requests share those rows; answers.py is what they get, sampling.py chooses tokens, health.py
                      tells whether there is any use in going on
    words.py          words to tokens and back; chat.py messages to words
    runner.py         the program, and what `generate` and `embed` run
"""
