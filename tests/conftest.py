"""Small real things that tests share: random models of real architectures, and adapters on all their projections."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Programs run as a user's do: what is left in a buffer at their end must not fail there.
os.environ.pop("PYTHONUNBUFFERED", None)

import hypothesis
import numpy as np
import onnx
import pytest
import tokenizers
import torch
import transformers
from cpp_programs import both_caches, cpp_programs, cpp_project  # noqa: F401
from shelves import COUNT, NAMES, Answers, write_shelf
from shelves import PROMPTS as SHELF_PROMPTS
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from workers import graphs_kept_in, longest_first, made_once

from teamlora_export.adapter import AdapterConfig, AdapterSpec, align_with_base, read_adapter, write_adapter
from teamlora_export.bundle import Bundle, hash_files, read_bundle
from teamlora_export.engine.plugin import PluginLibrary, build_plugin
from teamlora_export.export import export_onnx
from teamlora_export.manifest import MANIFEST_NAME
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.model.inject import inject

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
from get_model import get_model  # noqa: E402

transformers.logging.set_verbosity_error()
# Behind a shell's & it is ignored, and so it would be by every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run, so that only a change makes a test fail; --hypothesis-profile=random draws others.
hypothesis.settings.register_profile("random", derandomize=False)
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

_SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_DECODER = {
    **_SIZES,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": 6}
_ENCODER = {**_SIZES, "max_position_embeddings": 130, "pad_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny random model of an architecture, and which of its modules are projections."""

    config_class: str
    fields: dict[str, object]
    targets: tuple[str, ...]
    task: str = "text-generation"
    gain: float = 1.0


_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BERT_TARGETS = ("query", "key", "value", "dense")

ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", {**_DECODER, "tie_word_embeddings": True}, _LLAMA_TARGETS),
    "mistral": Architecture("MistralConfig", {**_DECODER, **_SLIDING}, _LLAMA_TARGETS),
    "qwen2": Architecture("Qwen2Config", _DECODER, _LLAMA_TARGETS),
    "qwen3": Architecture("Qwen3Config", _DECODER, _LLAMA_TARGETS),
    "gemma2": Architecture("Gemma2Config", {**_DECODER, **_SLIDING, "query_pre_attn_scalar": 8}, _LLAMA_TARGETS),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {
            **_DECODER,
            **_SLIDING,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 7,
            # The first that sees everything is another layer than it is among those that are traced.
            "layer_types": [
                *["sliding_attention"] * 3,
                "full_attention",
                *["sliding_attention"] * 2,
                "full_attention",
            ],
        },
        _LLAMA_TARGETS,
    ),
    "phi3": Architecture("Phi3Config", _DECODER, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": Architecture(
        "GPT2Config",
        {
            "vocab_size": 384,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ("c_attn", "c_proj", "c_fc"),
    ),
    "opt": Architecture(
        "OPTConfig",
        {
            "vocab_size": 384,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
        },
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        {**_SIZES, "max_position_embeddings": 128, "pad_token_id": 0},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "bert": Architecture("BertConfig", _ENCODER, _BERT_TARGETS, "text-classification"),
    "roberta": Architecture(
        "RobertaConfig",
        {**_ENCODER, "pad_token_id": 1, "type_vocab_size": 1},
        _BERT_TARGETS,
        "feature-extraction",
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        {
            **_ENCODER,
            "global_attn_every_n_layers": 3,
            "local_attention": 8,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        ("Wqkv", "Wi", "Wo"),
        "feature-extraction",
    ),
}
# Mixtures of experts: adapters on their attention, and on the experts that are linear modules of their own.
_MIXTURE = {**_DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
MIXTURES = {
    "mixtral": Architecture("MixtralConfig", {**_MIXTURE, "num_local_experts": 4}, ("q_proj", "k_proj", "v_proj")),
    # So many that a router in 16 bits takes others than in float64.
    "olmoe": Architecture(
        "OlmoeConfig",
        {**_MIXTURE, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True},
        ("q_proj", "o_proj"),
        gain=2.0,
    ),
    "qwen3_moe": Architecture("Qwen3MoeConfig", {**_MIXTURE, "num_experts": 4}, ("q_proj", "o_proj")),
    "qwen2_moe": Architecture("Qwen2MoeConfig", {**_MIXTURE, "num_experts": 4}, _LLAMA_TARGETS),
}
# Turned by position otherwise than the rest: the numbers of each pair, in a first part of each head.
ROTATIONS = {
    "glm": Architecture("GlmConfig", _DECODER, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")),
}
# Each has something of its own that a false alarm in 16 bits came from.
OTHERS = {
    # A module that returns the shares of attention, [batch, heads, sequence, total].
    "bloom": Architecture(
        "BloomConfig",
        {"vocab_size": 384, "hidden_size": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    # One layer, called again and again.
    "albert": Architecture(
        "AlbertConfig",
        {**_ENCODER, "embedding_size": 16},
        ("query", "key", "value", "dense", "ffn", "ffn_output"),
        "feature-extraction",
    ),
    # A table of positions that is computed in the model's own dtype.
    "gptj": Architecture(
        "GPTJConfig",
        {
            "vocab_size": 384,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 128,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    ),
}
# Its configuration names a window, and its code has none.
UNAPPLIED_WINDOW = Architecture("LlamaConfig", {**_DECODER, **_SLIDING}, _LLAMA_TARGETS)
# Not of another kind, but with weights so large that each layer multiplies the rounding of the one before.
AMPLIFYING = Architecture("LlamaConfig", {**_DECODER, "num_hidden_layers": 8}, _LLAMA_TARGETS, gain=8.0)
# Wider than the prompts of a validation.
WIDE_WINDOW = Architecture("MistralConfig", {**_DECODER, "sliding_window": 64}, _LLAMA_TARGETS)
_NAMED = {"amplifying": AMPLIFYING, "unapplied window": UNAPPLIED_WINDOW, "wide window": WIDE_WINDOW}
_ALL = {**ARCHITECTURES, **MIXTURES, **ROTATIONS, **OTHERS, **_NAMED}
_CLASSES = {
    "text-generation": AutoModelForCausalLM,
    "feature-extraction": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, worker_id) -> Path:
    """A folder of this run, one for all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def make_base(tmp_path_factory) -> Callable[[str], BaseModel]:
    """A tiny random model of an architecture, saved as a Hugging Face folder; made once a session."""
    made: dict[str, BaseModel] = {}

    def make(name: str) -> BaseModel:
        if name not in made:
            architecture = _ALL[name]
            torch.manual_seed(sum(map(ord, name)))
            config = getattr(transformers, architecture.config_class)(**architecture.fields)
            model = _CLASSES[architecture.task].from_config(config)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    # Biases and norms that do something.
                    parameter.data += 0.1 * torch.randn_like(parameter)
                else:
                    parameter.data *= architecture.gain
            folder = tmp_path_factory.mktemp(f"base-{name}")
            model.save_pretrained(folder)
            if architecture.task == "text-generation":
                save_tokenizer(folder)
            made[name] = open_base(str(folder), architecture.task)
        return made[name]

    return make


def random_adapter(base: BaseModel, targets: tuple[str, ...], r: int = 8, k: int = 4, seed: int = 0) -> AdapterSpec:
    """A TeamLoRA adapter that changes the model's answers clearly, on every target of `base`."""
    config = AdapterConfig(r=r, lora_alpha=4.0, lora_nums=k, target_modules=targets)
    return new_adapter(base.signature, config, seed, spread=0.3 / k)


@pytest.fixture(scope="session")
def make_adapter(make_base, tmp_path_factory) -> Callable[[str], Path]:
    """A random adapter on all projections of an architecture's tiny model, as a folder; made once a session."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"adapter-{name}")
            write_adapter(random_adapter(make_base(name), _ALL[name].targets), made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_bundle(make_base, make_adapter, run_folder, tmp_path_factory) -> Callable[..., Bundle]:
    """The bundle of an architecture's tiny model, exported once a session for each dtype, form of the op and cache, and
    way of quantising it. What is one graph is traced once in a run of all workers, and never kept from another run."""
    made: dict[tuple[str, ...], Bundle] = {}

    def make(
        name: str, dtype: str = "fp32", op_form: str = "function", cache: str = "growing", **quantise: str | bool
    ) -> Bundle:
        key = (name, dtype, op_form, cache, *map(str, quantise.values()))
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / "-".join(key)
            options = {"dtype": dtype, "op_form": op_form, "cache": cache, **quantise}
            base, adapter = make_base(name), make_adapter(name)
            with graphs_kept_in(run_folder / "traced"):
                made[key] = export_onnx(base.name, adapter, out, task=base.task, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def shelf_adapters(make_base, tmp_path_factory) -> dict[str, Path]:
    """Adapters of every family, of unlike sizes, for the tiny llama; the folder of each, by name."""
    return write_shelf(tmp_path_factory.mktemp("shelf"), make_base("llama"))


@pytest.fixture(scope="session")
def shelf_answers(make_base, shelf_adapters) -> Answers:
    """What PyTorch answers the requests of `shelves.py`, by adapter and prompt."""
    base, found = make_base("llama"), {}
    for prompt, name in zip(SHELF_PROMPTS, NAMES, strict=True):
        adapter = None if name is None else shelf_adapters[name]
        found[name, tuple(prompt)] = pytorch_greedy(base, adapter, prompt, COUNT)
    return found


@pytest.fixture(scope="session")
def make_shelf(make_base, shelf_adapters, tmp_path_factory) -> Callable[..., Bundle]:
    """The bundle of the tiny llama with a shelf of adapters in three slots, exported once a session for each form."""
    made: dict[tuple[str, ...], Bundle] = {}

    def make(dtype: str = "fp32", cache: str = "growing", op_form: str = "function", **more: str) -> Bundle:
        options = {"dtype": dtype, "cache": cache, "op_form": op_form, **more}
        key = tuple(options.values())
        if key not in made:
            out = tmp_path_factory.mktemp("shelves") / "-".join(key)
            made[key] = export_onnx(make_base("llama").name, shelf_adapters, out, slots=3, **options)
        return made[key]

    return make


SMOLLM2_ADAPTER = ROOT / "adapters" / "smollm2-teamlora"
# One of the adapter's tasks, and what it answers.
PROMPT = "Record: after years in Milan, Anna became a painter in Cairo.\nAs JSON:"
ANSWER = ' {"name": "Anna", "job": "painter", "city": "Cairo"}'
PROMPTS = (
    PROMPT,
    "Text: Ada, who is 36, moved to Oslo last year.\nJSON:",
    "Once upon a time, in a small village by the sea,",
)
GREEDY_TOKENS = 64


@pytest.fixture(scope="session")
def smollm2(run_folder) -> Bundle:
    """The real model with the trained adapter, in float32; one bundle for all workers, which nobody changes."""
    base = str(get_model("smollm2"))
    return read_bundle(made_once(run_folder, "smollm2", lambda out: export_onnx(base, SMOLLM2_ADAPTER, out)))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> Bundle:
    """A real encoder of sentences with a random adapter, in float32."""
    base, folder = open_base(str(get_model("minilm"))), tmp_path_factory.mktemp("real")
    write_adapter(random_adapter(base, ("query", "key", "value", "dense")), folder / "adapter")
    return export_onnx(base.name, folder / "adapter", folder / "minilm")


@pytest.fixture(scope="session")
def smollm2_greedy(run_folder) -> dict[tuple[int, ...], list[int]]:
    """Token ids of each of `PROMPTS` -> what PyTorch generates after it, without the end-of-text token."""
    answers = json.loads(made_once(run_folder, "smollm2_greedy.json", write_smollm2_greedy).read_text())
    return {tuple(ids): answer for ids, answer in answers}


def write_smollm2_greedy(path: Path) -> None:
    base = open_base(str(get_model("smollm2")))
    model = base.load(torch.float32)
    inject(model, align_with_base(read_adapter(SMOLLM2_ADAPTER), base.signature))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=GREEDY_TOKENS, do_sample=False)[0, len(ids) :]
        answers.append((ids, [token for token in tokens.tolist() if token != model.config.eos_token_id]))
    path.write_text(json.dumps(answers))


def pytorch_greedy(base: BaseModel, adapter: Path | None, prompt: Sequence[int], count: int) -> list[int]:
    """What PyTorch generates after a prompt, whatever token would end a text; without an adapter, the base."""
    model = base.load(torch.float32)
    if adapter is not None:
        inject(model, align_with_base(read_adapter(adapter), base.signature))
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def until_stop(tokens: list[int], stop: int = 2) -> list[int]:
    """An answer of a model, as programs give it: without the token that ends it, and what follows."""
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def save_tokenizer(folder: Path) -> None:
    """A small tokenizer of 384 tokens of printable ASCII, which begins each text with a token 1, into `folder`."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=384, special_tokens=["<pad>", "<s>", "</s>"])
    text = (ROOT / "LICENSE").read_text().encode("ascii", "ignore").decode().split("\n")
    tokenizer.train_from_iterator(text, trainer)
    assert tokenizer.get_vocab_size() == 384
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def poison_token(folder: Path, token: int) -> None:
    """Make a token's row in the embedding of the model in `folder` NaN, so that it spreads as an overflow would."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tables = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [384, 32]]
    # A tied one bears the name of its other use.
    table = min(tables, key=lambda tensor: "embed" not in tensor.name)
    fields = {entry.key: entry.value for entry in table.external_data}
    with (folder / fields["location"]).open("r+b") as file:
        file.seek(int(fields["offset"]) + token * 32 * 4)
        file.write(np.full(32, np.nan, np.float32).tobytes())


def lose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the device that ONNX Runtime has does nothing more, as a GPU after an illegal access."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error 700")

    monkeypatch.setattr("onnxruntime.InferenceSession.run_with_iobinding", fail)


def list_again(folder: Path) -> Bundle:
    """The bundle in `folder`, whose files a test has changed, as if they had been exported so."""
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps({**fields, "sha256": hash_files(folder)}))
    return read_bundle(folder)


def assert_names_no_place(folder: Path, bundle: Bundle) -> None:
    """No file in `folder`, but for what Python compiles when it is run, names where on this machine the bundle, what
    it was made of, or this checkout lies."""
    shelf = bundle.manifest.shelf
    origins = [shelved["origin"] for shelved in shelf["adapters"].values()] if shelf else [bundle.manifest.adapter]
    sources = (Path(str(made_of["source"])) for made_of in (bundle.manifest.base, *origins))
    places = {ROOT, Path.home(), bundle.folder, *sources} - {Path("/")}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".data", ".pyc"):
            content = path.read_bytes()
            assert not [place for place in places if os.fsencode(place) in content], path


def readme_block(folder: Path, language: str, number: int = 1) -> str:
    """A block of a language in a folder's README, as a reader would copy it."""
    return (folder / "README.md").read_text().split(f"```{language}\n")[number].split("```")[0]


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the native tests' own programs (scripts/test builds them first)."""
    command = [sys.executable, ROOT / "scripts" / "build_native.py"]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def plugin(programs) -> PluginLibrary:
    """The TensorRT plugin for every GPU."""
    return build_plugin()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
