"""`deploy genai` in the real onnxruntime-genai."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
import pytest
from conftest import GREEDY_TOKENS, PROMPTS, readme_block
from tokenizers import Tokenizer

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.genai import deploy_genai, genai_config
from teamlora_export.deploy.genai_tokenizer import tokenizer_config, why_unreadable
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import LIBRARY_NAME, build_library
from teamlora_export.errors import ExportError


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory) -> og.Model:
    return og.Model(str(deploy_genai(smollm2, tmp_path_factory.mktemp("genai") / "smollm2")))


def generate(model: og.Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens after each prompt; prompts of one batch are of one length."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompts[0]) + count, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompts)
    while not generator.is_done():
        generator.generate_next_token()
    return [list(generator.get_sequence(row))[len(prompts[0]) :] for row in range(len(prompts))]


def without_stops(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def test_greedy_text_equals_pytorchs(model, smollm2_greedy):
    for ids, answer in smollm2_greedy.items():
        assert without_stops(generate(model, [list(ids)], GREEDY_TOKENS)[0], 2) == answer


def test_the_native_op_travels_along_and_runs(smollm2, smollm2_greedy, tmp_path):
    folder = deploy_genai(smollm2, tmp_path / "smollm2", library=build_library().path)
    ids, answer = next(iter(smollm2_greedy.items()))
    native = og.Model(str(folder))
    found = generate(native, [list(ids)], GREEDY_TOKENS)[0]
    assert str(folder / LIBRARY_NAME) in Path("/proc/self/maps").read_text()
    assert without_stops(found, 2) == answer
    with pytest.raises(ExportError, match="no such file"):
        deploy_genai(smollm2, tmp_path / "other", library=tmp_path / "none.so")


def test_the_program_in_its_readme_works(smollm2, tmp_path):
    folder = deploy_genai(smollm2, tmp_path / "smollm2")
    program = readme_block(folder, "python").replace("path/of/this/folder", str(folder))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    compare = ["sh", "-c", readme_block(folder, "sh", 2)]
    assert subprocess.run(compare, cwd=folder, capture_output=True).returncode == 0
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    found = subprocess.run(compare, cwd=folder, capture_output=True, text=True)
    assert (found.returncode, "config.json: FAILED" in found.stdout) == (1, True)


@pytest.mark.parametrize("name", ["llama", "smollm2"])
def test_its_readme_adds_special_tokens_where_they_are_required_alone(name, make_bundle, smollm2, tmp_path):
    folder = deploy_genai(smollm2 if name == "smollm2" else make_bundle(name), tmp_path / "out")
    line = 'tokenizer.update_options(add_special_tokens="true")'
    program = readme_block(folder, "python").split("parameters = ")[0].replace("path/of/this/folder", str(folder))
    assert (line in program) == (name == "llama")
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab").ids

    def encoded(lines: str) -> list[int]:
        names: dict[str, Any] = {}
        exec(lines, names)
        return list(names["tokenizer"].encode("ab"))

    assert encoded(program) == expected
    if name == "llama":
        assert encoded(program.replace(line, "")) != expected


def test_a_batch_of_four_gives_four_times_the_same(model, smollm2_greedy):
    ids, answer = next(iter(smollm2_greedy.items()))
    rows = generate(model, [list(ids)] * 4, GREEDY_TOKENS)
    assert [without_stops(row, 2) for row in rows] == [answer] * 4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_in_place_is_one_buffer_for_both_ends(name, make_bundle, tmp_path):
    """The graph refuses a cache that grows: it takes as many places as it gives. No ring wraps in one that is as long
    as the text."""
    bundle = make_bundle(name, cache="in-place")
    folder = deploy_genai(bundle, tmp_path / name)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    in_place, ours = og.Model(str(folder)), Model(bundle.folder)
    (stop,) = bundle.manifest.tokens.stops
    for prompts in ([[5]], [[7, 8, 9, 30, 31]], [[40, 41, 42], [9, 8, 7], [300, 5, 5], [11, 12, 13]]):
        expected = ours.generate(prompts, GREEDY_TOKENS)
        assert any(len(answer) == GREEDY_TOKENS for answer in expected)
        assert [without_stops(row, stop) for row in generate(in_place, prompts, GREEDY_TOKENS)] == expected
    config["search"]["past_present_share_buffer"] = False
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="TensorScatter"):
        generate(og.Model(str(folder)), [[5, 6, 7]], 3)


def test_logits_of_every_token_serve_as_well(smollm2, smollm2_greedy, tmp_path):
    every = og.Model(str(deploy_genai(smollm2, tmp_path / "smollm2", logits="all")))
    ids, answer = next(iter(smollm2_greedy.items()))
    assert without_stops(generate(every, [list(ids)], GREEDY_TOKENS)[0], 2) == answer


def test_its_tokenizer_reads_words_as_ours_does(model, smollm2_greedy):
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    assert [tuple(tokenizer.encode(prompt)) for prompt in PROMPTS] == list(smollm2_greedy)


def test_the_configuration_follows_the_graph(make_bundle):
    config = genai_config(make_bundle("gpt2"), library="libops.so")
    decoder = config["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 4, 8)
    assert decoder["session_options"]["custom_ops_library"] == "libops.so"
    assert decoder["inputs"]["position_ids"] == "position_ids"
    bundle = make_bundle("gpt2")
    fewer = tuple(port for port in bundle.manifest.inputs if port.name != "position_ids")
    without = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, inputs=fewer))
    assert "position_ids" not in genai_config(without)["model"]["decoder"]["inputs"]


def test_what_configurations_leave_open_is_settled(make_bundle):
    """Null and missing ids, an end that does not exist, a tokenizer_config.json that the library cannot read."""
    bundle = make_bundle("qwen2")
    fields = json.loads((bundle.folder / "config.json").read_text())
    assert fields["eos_token_id"] is fields["bos_token_id"] is None
    model = genai_config(bundle)["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([2], 0, 0)
    assert None not in [*model.values(), *model["decoder"].values()]
    written = json.loads(tokenizer_config(bundle))
    expected = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", **expected}


def test_a_tokenizer_or_a_cache_that_it_does_not_know_is_refused(make_bundle, tmp_path):
    source = make_bundle("llama")
    folder = Path(shutil.copytree(source.folder, tmp_path / "bundle"))
    bundle = Bundle(folder, source.manifest)
    assert why_unreadable(bundle) is None
    kept = json.loads((folder / "tokenizer.json").read_text())
    for changes, reason in (
        ({"decoder": None}, "its tokenizer's decoder is None"),
        ({"decoder": {"type": "Metaspace"}}, "decoder is 'Metaspace', and onnxruntime-genai reads ByteLevel and"),
        (
            {"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "WordPiece"}]}},
            "decoder has a part 'WordPiece', which",
        ),
        ({"model": {"type": "Unigram"}}, "its tokenizer's model is 'Unigram'"),
        ({"model": {"type": "BPE", "vocab": 3}}, "cannot be read as a tokenizer"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps({**kept, **changes}))
        assert reason in str(why_unreadable(bundle))
    first, *others = bundle.manifest.inputs
    wider = [dataclasses.replace(p, shape=(*p.shape[:3], 16)) if p.name.endswith("0.value") else p for p in others]
    manifest = dataclasses.replace(bundle.manifest, inputs=(first, *wider))
    with pytest.raises(ExportError, match="caches differ in size"):
        genai_config(Bundle(folder, manifest))
    endless = dataclasses.replace(source.manifest, tokens=dataclasses.replace(source.manifest.tokens, stops=()))
    with pytest.raises(ExportError, match="no token ends a text"):
        deploy_genai(Bundle(source.folder, endless), tmp_path / "out")


def test_what_it_cannot_run_is_refused(make_bundle, tmp_path):
    with pytest.raises(ExportError, match="generates text only"):
        deploy_genai(make_bundle("bert"), tmp_path / "out")
    source = make_bundle("llama")
    folder = Path(shutil.copytree(source.folder, tmp_path / "bundle", ignore=lambda *_: ["tokenizer.json"]))
    with pytest.raises(ExportError, match=r"there is no tokenizer\.json"):
        deploy_genai(Bundle(folder, source.manifest), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_it(smollm2, tmp_path):
    command = [sys.executable, "-m", "teamlora_export.cli", "deploy", "genai", smollm2.folder, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"genai_config.json", "model.onnx", "deploy.json", "README.md"} <= {
        p.name for p in Path(tmp_path / "out").iterdir()
    }
