"""`deploy genai` in the real onnxruntime-genai."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import onnxruntime_genai as og
import pytest
from conftest import GREEDY_TOKENS, PROMPTS, readme_block

from teamlora_export.deploy.genai import deploy_genai, genai_config
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
    folder = deploy_genai(smollm2, tmp_path / "smollm2", library=str(build_library().path))
    ids, answer = next(iter(smollm2_greedy.items()))
    native = og.Model(str(folder))
    found = generate(native, [list(ids)], GREEDY_TOKENS)[0]
    assert str(folder / LIBRARY_NAME) in Path("/proc/self/maps").read_text()
    assert without_stops(found, 2) == answer
    with pytest.raises(ExportError, match="no such file"):
        deploy_genai(smollm2, tmp_path / "other", library=str(tmp_path / "none.so"))


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


def test_a_batch_of_four_gives_four_times_the_same(model, smollm2_greedy):
    ids, answer = next(iter(smollm2_greedy.items()))
    rows = generate(model, [list(ids)] * 4, GREEDY_TOKENS)
    assert [without_stops(row, 2) for row in rows] == [answer] * 4


def test_its_tokenizer_reads_words_as_ours_does(model, smollm2_greedy):
    tokenizer = og.Tokenizer(model)
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


def test_what_it_cannot_run_is_refused(make_bundle, tmp_path):
    with pytest.raises(ExportError, match="generates text only"):
        deploy_genai(make_bundle("bert"), tmp_path / "out")
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        deploy_genai(make_bundle("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_it(smollm2, tmp_path):
    command = [sys.executable, "-m", "teamlora_export.cli", "deploy", "genai", smollm2.folder, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"genai_config.json", "model.onnx", "deploy.json", "README.md"} <= {
        p.name for p in Path(tmp_path / "out").iterdir()
    }
