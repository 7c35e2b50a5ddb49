"""`deploy triton`: a model repository for Triton Inference Server, clients, and how to start it.

models/NAME           the model: its graph on ONNX Runtime, or its engine on TensorRT
models/NAME_text      words in: the ensemble around an encoder, or the loop around a text generator
models/NAME_tokenizer the ensemble's first step

A text generator that batches continuously is one model, NAME_text, with the graph in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from teamlora_export.bundle import Bundle
from teamlora_export.deploy import triton_config
from teamlora_export.deploy.engine import (
    add_engine,
    longest_text,
    refuse_stray_plugin,
    refuse_unserved,
    serving_packages,
)
from teamlora_export.deploy.engine_session import ENGINE_NAME
from teamlora_export.deploy.folder import TEMPLATES, Deployment, deployment
from teamlora_export.deploy.python import OPENING, SCHEDULING
from teamlora_export.deploy.render import render
from teamlora_export.deploy.slots_base import MOST_SLOTS
from teamlora_export.deploy.triton_options import DEFAULTS, TritonOptions
from teamlora_export.engine.facts import EngineFacts
from teamlora_export.engine.onnxruntime_library import LIBRARY_NAME
from teamlora_export.engine.profiles import choose_capacity
from teamlora_export.errors import ExportError
from teamlora_export.ports import Port, keeps_in_place

SOURCES = TEMPLATES / "triton"
REPOSITORY = "models"
BATCHING = ("continuous", "sequence")
# It is also a folder's, with more behind it.
_LONGEST_NAME = 100


def deploy_triton(bundle: Bundle, out: Path, options: TritonOptions = DEFAULTS) -> Path:
    """Write the repository into `out`.

    Raises:
        ExportError: see `deployment` and `add_engine`; the engine does not run in Triton; a model in bfloat16 would
            run on a CPU; an engine's cache or adapters are not what Triton's own back end takes; the model cannot be
            batched so; the name is none; or `library` is no path, or the one for a CPU where the graph is to run on a
            GPU.
    """
    name = options.name or default_name(bundle)
    _refuse_unfit(bundle, name, options)
    options = replace(options, text=options.text and (bundle.folder / "tokenizer.json").is_file())
    if _batching(bundle, options) == "continuous":
        _deploy_continuous(bundle, out, name, options)
    else:
        _deploy_states(bundle, out, name, options)
    return out


def _refuse_unfit(bundle: Bundle, name: str, options: TritonOptions) -> None:
    """Refuse options that exclude each other, whatever the model is batched by."""
    engine, library = options.engine, options.library
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ExportError(f"--name {name}: give letters, digits, '_', '-' and '.'.")
    refuse_stray_plugin(engine, options.plugin)
    if engine is not None and library is not None:
        raise ExportError(f"--library {library}: is for ONNX Runtime, an engine takes --plugin.")
    if library in ("", "auto"):
        raise ExportError(f"--library {library}: give the path at which the server will find the library.")
    if options.gpu and library is not None and PurePath(library).name == LIBRARY_NAME:
        raise ExportError(
            f"--library {library}: has the op for a CPU, and --gpu runs the graph on a GPU. "
            "Build the other one: teamlora-export plugins build --onnxruntime --cuda"
        )
    if engine is None and bundle.manifest.dtype == "bf16" and not options.gpu:
        raise ExportError(f"{bundle.folder}: is in bfloat16, which ONNX Runtime runs on a GPU only: add --gpu.")


def _deploy_states(bundle: Bundle, out: Path, name: str, options: TritonOptions) -> None:
    """A step of the model, whose cache, if it has one, is Triton's state; and the models that take words."""
    engine, capacity = options.engine, choose_capacity(bundle, options.capacity)
    if engine is not None and capacity is not None:
        raise ExportError(
            f"{engine}: keeps its cache in place, in one buffer that it reads and writes, and Triton's TensorRT "
            "back end has two for a state. Leave out --batching sequence and --no-text, or export the model with "
            "--cache growing, and build an engine of that."
        )
    generates, inside = bundle.manifest.task == "text-generation", f"{REPOSITORY}/{name}/1"
    with deployment(bundle, out, "triton", inside, engine is None, options.logits, capacity) as made:
        facts = add_engine(made, engine, options.plugin, ENGINE_NAME) if engine is not None else None
        if facts is not None and facts.runtime != "tensorrt":
            raise ExportError(
                f"{engine}: is an engine of TensorRT-RTX; Triton runs TensorRT's. Build one with --runtime."
            )
        batch = _batch(facts, options.batch, 8 if generates else 32)
        model = triton_config.model_config(made.bundle, name, options, facts, batch)
        _write_config(made, model)
        if not generates:
            made.write(f"{REPOSITORY}/{name}/warmup/{triton_config.WARMUP_FILE}", triton_config.warmup_ones())
        if options.text and generates:
            config = triton_config.generate_config(bundle, name, options.check_files, 4, capacity)
            _write_python_model(made, config, "generate.py")
        elif options.text:
            tokenizer = triton_config.tokenize_config(bundle, name, options.check_files, model.max_batch_size)
            _write_python_model(made, tokenizer, "tokenizer.py")
            ensemble = triton_config.ensemble_config(model, tokenizer, triton_config.result_of(bundle))
            _write_config(made, ensemble)
            # A version of an ensemble is an empty folder, which copies and archives lose.
            made.write(f"{REPOSITORY}/{ensemble.name}/1/README", "An ensemble has no file of its own.\n")
        packages = ["tokenizers"]
        _write_program(made, name, options, packages=packages, continuous=False, engine=facts, capacity=capacity)


def _deploy_continuous(bundle: Bundle, out: Path, name: str, options: TritonOptions) -> None:
    engine, capacity = options.engine, options.capacity
    if capacity is not None:
        choose_capacity(bundle, capacity)
    adapters, inside = _adapters_of(bundle), f"{REPOSITORY}/{name}{triton_config.TEXT}/1"
    with deployment(bundle, out, "triton", inside, engine is None, options.logits, shelf="slots") as made:
        facts = add_engine(made, engine, options.plugin, ENGINE_NAME) if engine is not None else None
        if engine is not None and facts is not None:
            refuse_unserved(engine, facts)
            options = replace(options, gpu=True)
        slots = _batch(facts, options.batch, 8)
        waiting = max(1, options.sequences - slots)
        config = triton_config.continuous_config(
            name, options, slots=slots, waiting=waiting, shelf=adapters is not None
        )
        _write_python_model(made, config, "continuous.py", *SCHEDULING, "chat.py")
        longest = longest_text(facts) if facts is not None else None
        _write_program(
            made,
            name,
            options,
            packages=serving_extras(facts, options.gpu),
            continuous=True,
            engine=facts,
            capacity=min((size for size in (capacity, longest) if size), default=None),
            longest=longest,
            adapters=adapters,
            slots=slots,
            sequences=slots + waiting,
        )


def serving_extras(facts: EngineFacts | None, gpu: bool) -> list[str]:
    """What the model that batches continuously imports, and Triton's container has not, as pip is told.

    Args:
        facts: of the engine that it runs; None: it runs the graph.
    """
    if facts is not None:
        runtime = serving_packages(facts)
    else:
        runtime = ["onnxruntime-gpu[cuda,cudnn]" if gpu else "onnxruntime"]
    return [*runtime, "jinja2>=3.1.6", "tokenizers"]


def pip_arguments(packages: Sequence[str]) -> str:
    """As a shell is told."""
    return " ".join(f'"{package}"' if re.search(r"[\[<>]", package) else package for package in packages)


def _adapters_of(bundle: Bundle) -> list[str] | None:
    """The names of those that a request can ask for; None where the model has one of its own."""
    return None if bundle.manifest.shelf is None else sorted(bundle.manifest.shelf["adapters"])


def default_name(bundle: Bundle) -> str:
    """The base's name and the adapter's, as a model is called in a repository."""
    sources = (str(bundle.manifest.base["source"]), str(bundle.manifest.adapter["source"]))
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", PurePath(source).name) for source in sources)
    return name.strip("-._")[:_LONGEST_NAME] or "model"


def _batching(bundle: Bundle, options: TritonOptions) -> str:
    wanted, engine = options.batching, options.engine
    if wanted not in (None, *BATCHING):
        raise ExportError(f"--batching {wanted}: unknown. Use {' or '.join(BATCHING)}.")
    obstacles = (
        (bundle.manifest.task != "text-generation", f"{bundle.folder} does not generate text."),
        (
            engine is not None and not keeps_in_place(bundle.manifest.inputs),
            "texts share the steps of an engine whose cache is in place. Export the model with --cache in-place, and "
            "build an engine of that.",
        ),
        (
            engine is None and bundle.manifest.dtype == "bf16",
            f"NumPy knows no bfloat16, in which {bundle.folder} is. Export it in fp16.",
        ),
        (not options.text, "takes words, so it needs the model's tokenizer.json, and no --no-text."),
    )
    obstacle = next((reason for holds, reason in obstacles if holds), None)
    if wanted == "continuous" and obstacle is not None:
        raise ExportError(f"--batching continuous: {obstacle}")
    # Rows that Triton puts together may be of any length, and know no adapters.
    shared = keeps_in_place(bundle.manifest.inputs) or not bundle.manifest.tokens.padded or bundle.manifest.shelf
    chosen = wanted or ("continuous" if obstacle is None and shared else "sequence")
    if chosen == "sequence" and bundle.manifest.shelf is not None:
        raise ExportError(_why_no_shelf(bundle, obstacle))
    return chosen


def _why_no_shelf(bundle: Bundle, obstacle: str | None) -> str:
    """Args:
    obstacle: what keeps the model from being batched continuously; None: the user's wish.
    """
    told = f"{bundle.folder}: has a shelf of adapters, and Triton's own back ends know none"
    if bundle.manifest.task != "text-generation":
        return f"{told}. Export a bundle with a single --adapter for each, or serve it by `deploy python`."
    if obstacle is None:
        return f"{told}. Leave out --batching sequence: the model that batches continuously knows them."
    return f"{told}; the model that batches continuously does. --batching continuous: {obstacle}"


def _batch(facts: EngineFacts | None, wanted: int | None, default: int) -> int:
    if facts is None:
        return wanted or default
    # Triton refuses more than every profile takes.
    most = min(profile.inputs["input_ids"][2][0] for profile in facts.profiles)
    if wanted is not None and wanted > most:
        raise ExportError(f"--batch {wanted}: the engine takes {most} at most. Build it with other --shapes.")
    return wanted or min(most, MOST_SLOTS)


def _cache_bytes(ports: Sequence[Port]) -> int:
    """Of a sequence; 0 where its cache grows."""
    kept = [port for port in ports if port.name.startswith("past_key_values.")]
    sizes = [[size for size in port.shape[1:] if isinstance(size, int)] for port in kept]
    widths = [4 if port.dtype == "float" else 2 for port in kept]
    return sum(math.prod(size) * width for size, width in zip(sizes, widths, strict=True) if len(size) == 3)


def _write_config(made: Deployment, config: object) -> None:
    text = triton_config.to_text(config)
    made.write(f"{REPOSITORY}/{config.name}/config.pbtxt", text)  # type: ignore[attr-defined]


def _write_python_model(made: Deployment, config: object, source: str, *parts: str) -> None:
    """Args:
    parts: further files of this package that it imports.
    """
    folder = f"{REPOSITORY}/{config.name}/1"  # type: ignore[attr-defined]
    _write_config(made, config)
    made.write(f"{folder}/model.py", SOURCES / source)
    made.write(f"{folder}/opened.py", SOURCES / "opened.py")
    for part in (*OPENING, *parts):
        made.write(f"{folder}/{part}", Path(__file__).parent / part)


def _write_program(
    made: Deployment, name: str, options: TritonOptions, *, packages: Sequence[str], **facts: object
) -> None:
    """What a person reads and runs: README and clients.

    Args:
        packages: that models which take words import. facts: what else the texts tell.
    """
    manifest, tokens = made.bundle.manifest, made.bundle.manifest.tokens
    inputs = [port.name for port in manifest.inputs if not port.name.startswith("past_key_values.")]
    generates = manifest.task == "text-generation"
    values = {
        **facts,
        "pip": pip_arguments(packages),
        "name": name,
        # The one with the model's files.
        "folder": made.model.parent.name,
        "inputs": inputs,
        "output": triton_config.result_of(made.bundle),
        "text": options.text,
        "library": options.library,
        "gpu": options.gpu,
        "check_files": options.check_files,
        "generates": generates,
        "takes_positions": "position_ids" in inputs,
        "stops": list(tokens.stops),
        "vocabulary": tokens.vocabulary or 1 << 31,
        "most": tokens.most,
        "megabytes": _cache_bytes(manifest.inputs) / 1e6,
    }
    client = "client_generate.py.j2" if generates else "client_encode.py.j2"
    for file, template in (("client.py", client), ("client.sh", "client.sh.j2"), ("README.md", "README.md.j2")):
        made.write(file, render(f"triton/{template}", made.bundle, **values))
