"""`deploy python` as its README says to use it, `generate` and `embed`, and the program itself under many requests."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import transformers
from conftest import (
    ANSWER,
    GREEDY_TOKENS,
    PROMPT,
    ROOT,
    assert_names_no_place,
    poison_token,
    pytorch_greedy,
    readme_block,
    save_tokenizer,
)
from typer.testing import CliRunner

from teamlora_export.bundle import Bundle
from teamlora_export.cli import app
from teamlora_export.deploy import runner, slots, slots_in_place
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.folder import DEPLOY_NAME
from teamlora_export.deploy.folder import SHELF_FORMAT_VERSION as DEPLOY_VERSION
from teamlora_export.deploy.model_folder import _DESCRIPTIONS, _MOST_SLOTS
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.sampling import Sampling
from teamlora_export.deploy.slots import InPlaceSlots
from teamlora_export.deploy.words import TextStream, encode_text
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.manifest import MANIFEST_NAME, MOST_SLOTS, SHELF_FORMAT_VERSION, write_manifest
from teamlora_export.ports import window_of

# Importing anything that the deployment's requirements do not name is refused.
_ONLY_REQUIREMENTS = """
import sys
import tomllib
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnx_ir", "teamlora_export", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _ONLY_REQUIREMENTS, folder / "runner.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teamlora_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def deployed(smollm2, tmp_path_factory) -> Path:
    return deploy_python(smollm2, tmp_path_factory.mktemp("deploy") / "smollm2")


def test_the_package_and_its_deployments_want_the_same_onnx_runtime(deployed):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = project["cpu"]
    assert wanted in (deployed / "requirements.txt").read_text().splitlines()
    assert project["gpu"] == [wanted.replace("onnxruntime", "onnxruntime-gpu")]
    page = (ROOT / "teamlora_export" / "deploy" / "templates" / "cpp.README.md.j2").read_text()
    assert f"ONNX Runtime ({wanted.partition('>=')[2]} or later)" in page


def test_greedy_text_equals_pytorchs_alone_and_in_batches(deployed, smollm2_greedy):
    model = Model(deployed)
    prompts, answers = [list(ids) for ids in smollm2_greedy], list(smollm2_greedy.values())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert model.generate([prompt], GREEDY_TOKENS) == [answer]
    assert model.generate([*prompts, prompts[0]], GREEDY_TOKENS) == [*answers, answers[0]]


@pytest.mark.parametrize("part", [5, 512])
def test_a_cache_in_place_gives_the_tokens_of_one_that_grows(part, make_bundle, monkeypatch):
    """Buffers are made longer several times, and long prompts are read in parts."""
    monkeypatch.setattr(runner, "_PART", part)
    monkeypatch.setattr(slots_in_place, "_LEAST_CAPACITY", 4)
    prompts = [[7, 5, 300, 9, 14, 21, 3, 8], [11], [4, 4, 200]]
    growing, in_place = (Model(make_bundle("llama", cache=form).folder) for form in ("growing", "in-place"))
    expected = growing.generate(prompts, 40)
    assert in_place.generate(prompts, 40) == expected
    assert list(in_place.stream(prompts[0], 12)) == list(growing.stream(prompts[0], 12))


@pytest.fixture(scope="module")
def long_texts(make_base, make_adapter) -> Callable[[str], tuple[list[list[int]], list[list[int]]]]:
    """Prompts for a tiny model, and what PyTorch writes after each; made once."""

    @functools.cache
    def make(name: str) -> tuple[list[list[int]], list[list[int]]]:
        rng = np.random.default_rng(7)
        prompts = [rng.integers(3, 384, length).tolist() for length in (37, 2, 21)]
        return prompts, [pytorch_greedy(make_base(name), make_adapter(name), prompt, 60) for prompt in prompts]

    return make


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("part", [5, 512])
def test_text_of_many_windows_equals_pytorchs_and_a_window_is_kept_no_longer(
    name, part, make_bundle, long_texts, monkeypatch
):
    """A window has six tokens; a ring has room for it and a part, or for the text where that is shorter, with what is
    in front of it: the prompt of 21 tokens shares a call with that of 37."""
    monkeypatch.setattr(runner, "_PART", part)
    monkeypatch.setattr(slots_in_place, "_LEAST_CAPACITY", 4)
    made = []
    monkeypatch.setattr(slots, "InPlaceSlots", lambda *given: made.append(InPlaceSlots(*given)) or made[-1])
    bundle = make_bundle(name, cache="in-place")
    model = Model(bundle.folder)
    prompts, expected = long_texts(name)
    stops = bundle.manifest.tokens.stops
    until_stop = [list(itertools.takewhile(lambda token: token not in stops, answer)) for answer in expected]
    for prompt, answer in zip(prompts, until_stop, strict=True):
        assert list(model.stream(prompt, 60)) == answer
    assert model.generate(prompts, 60) == until_stop
    # An end-of-text token may be one like any other.
    scheduler, answers = model.ask(prompts, 60, stops=())
    while scheduler.busy:
        scheduler.turn()
    assert [[token.id for token in answer] for answer in answers] == expected
    for port in bundle.manifest.inputs:
        if port.name.startswith("past_"):
            rows = made[-1]._buffers[port.name].shape[2]
            # The last token is not read.
            if window_of(port.shape[2]) and part == 5:
                assert rows == 10
            else:
                assert 37 + 59 <= rows <= 37 + 60 + (37 - 21 if part == 512 else 0)


def test_the_program_needs_its_requirements_alone_and_streams_words(deployed, smollm2_greedy):
    ids, answer = next(iter(smollm2_greedy.items()))
    found = run(deployed, "--tokens", GREEDY_TOKENS, "--ids", *ids)
    assert [int(token) for token in found.stdout.split()] == answer, found.stderr
    told = run(deployed, PROMPT.replace("\n", "\\n"))
    assert told.stdout == f"{PROMPT}{ANSWER}\n"
    assert "tokens," in told.stderr


def test_its_readme_works_to_the_letter(deployed, tmp_path):
    folder = Path(shutil.copytree(deployed, tmp_path / "copy"))
    environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    environment.pop("VIRTUAL_ENV", None)
    commands = ["sh", "-e", "-c", readme_block(folder, "sh")]
    done = subprocess.run(commands, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout
    program = readme_block(folder, "python")
    own = subprocess.run(
        [folder / ".venv" / "bin" / "python", "-c", program], capture_output=True, text=True, cwd=folder
    )
    assert own.returncode == 0, own.stderr
    assert own.stdout.strip()


def test_nothing_written_names_a_path_of_this_machine(deployed, smollm2):
    assert_names_no_place(deployed, smollm2)
    fields = json.loads((deployed / "deploy.json").read_text())
    files = (path for path in deployed.rglob("*") if path.is_file() and path.suffix != ".pyc")
    written = {path.relative_to(deployed).as_posix() for path in files} - {"deploy.json"}
    assert set(fields["files"]) | set(fields["program"]) == written


def test_a_changed_or_missing_file_is_refused_unless_the_check_is_left_out(deployed, tmp_path):
    folder = Path(shutil.copytree(deployed, tmp_path / "copy"))
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\1")
    refused = run(folder, "--ids", 1)
    assert refused.returncode == 2
    assert "model.onnx.data: is not the file that belongs here" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run(folder, "--ids", 1, "--no-check", "--tokens", 1).returncode == 0
    shutil.copyfile(deployed / "model.onnx.data", folder / "model.onnx.data")
    (folder / "config.json").unlink()
    assert "config.json: cannot be read" in run(folder, "--ids", 1).stderr
    fields = json.loads((folder / "deploy.json").read_text())
    without = {name: {n: h for n, h in fields["files"].items() if n != name} for name in fields["files"]}
    for files, message in (
        ({"../secret": "0", **fields["files"]}, "not in its folder"),
        (without["model.onnx"], "lacks model.onnx"),
        (without["model.onnx.data"], "lacks model.onnx.data"),
        (without["tokenizer.json"], "lacks tokenizer.json"),
        ({}, "lacks model.onnx"),
    ):
        (folder / "deploy.json").write_text(json.dumps({**fields, "files": files}))
        assert message in run(folder, "--ids", 1).stderr
    assert "neither deploy.json nor manifest.json" in run(folder, "--model", tmp_path, "--ids", 1).stderr


def test_requests_that_cannot_be_are_refused(deployed, make_bundle):
    model = Model(deployed, check=False)
    with pytest.raises(ModelError, match="empty prompt"):
        model.generate([[]])
    with pytest.raises(ModelError, match="8192 tokens; the model takes 8192, its answer included"):
        model.generate([[1] * 8192])
    for ids in ([-1], [49152], [1.5], [10**30], ["1"]):
        with pytest.raises(ModelError, match="is not in the model's vocabulary of 49152"):
            model.generate([ids])
    with pytest.raises(ModelError, match="gives no vectors"):
        model.encode([[1]])
    with pytest.raises(ModelError, match="does not generate text"):
        Model(make_bundle("bert").folder).generate([[1]])
    with pytest.raises(ModelError, match=r"tokenizer\.json: is missing"):
        _ = Model(make_bundle("bert").folder).tokenizer


def test_a_thousand_requests_on_eight_threads_are_answered_as_one_by_one(make_bundle):
    model = Model(make_bundle("llama").folder, threads=1)
    drawn = random.Random(3)
    requests = [[drawn.randrange(1, 384) for _ in range(drawn.randrange(1, 40))] for _ in range(1000)]
    first = [model.generate([ids], 4)[0] for ids in requests[:250]]
    grown = []
    # Once more where something else in this process grew; a leak grows again.
    while len(grown) < 2 and (not grown or grown[-1] > 8e6):
        gc.collect()
        before = psutil.Process().memory_info().rss
        alone = first + [model.generate([ids], 4)[0] for ids in requests[250:]]
        grown.append(psutil.Process().memory_info().rss - before)
    # The caches of 750 requests are 16 MB.
    assert min(grown) < 8e6, grown
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda ids: model.generate([ids], 4)[0], requests)) == alone


def test_characters_of_several_tokens_are_streamed_whole(deployed):
    tokenizer = Model(deployed, check=False).tokenizer
    text = "naïve 🦙 über"
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_long_text_is_streamed_in_pieces_that_take_no_longer_at_its_end(deployed):
    tokenizer, rng = Model(deployed, check=False).tokenizer, random.Random(3)
    text = "".join(
        rng.choice(["word", " Word", "\n", ".", " ", "é", "日本", "👩‍👩‍👧", "  x", "<", "don't"]) for _ in range(2000)
    )
    ids, read = tokenizer.encode(text).ids, []

    class Watched:
        def decode(self, ids: list[int]) -> str:
            read.append(len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(Watched(), [])
    assert "".join(map(stream.add, ids)) == tokenizer.decode(ids)
    assert max(read) <= 32 < len(ids)
    # What is no text at all is shown as such, and what follows it as it is.
    broken = [token for token in range(tokenizer.get_vocab_size()) if tokenizer.decode([token]) == "\ufffd"][:1]
    shown = "".join(map(stream.add, [*broken * 40, *tokenizer.encode(" And then.").ids]))
    assert shown.startswith("\ufffd") and shown.endswith(" And then.")
    assert max(read) <= 32


def test_text_is_drawn_and_stopped_as_asked(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    folder = deploy_python(bundle, tmp_path / "out")
    ids = encode_text(Model(folder).tokenizer, "a b")
    greedy = "".join(map(TextStream(Model(folder).tokenizer, ids).add, Model(folder).generate([ids], 20)[0]))
    stop = greedy[len(greedy) // 2 :][:3]
    stopped = run(folder, "a b", "--tokens", 20, "--stop=~~~", f"--stop={stop}")
    assert stopped.stdout == f"a b{runner._printable(greedy[: greedy.index(stop)])}\n", stopped.stderr
    drawn = ("--tokens", "8", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.2")
    sampling = Sampling(1.5, 50, 0.9, 1.2, seed=4)
    expected = Model(folder).generate([[5, 6]], 8, sampling=sampling)[0]
    found = run(folder, "--ids", 5, 6, *drawn, "--seed", 4)
    assert [int(token) for token in found.stdout.split()] == expected != Model(folder).generate([[5, 6]], 8)[0]
    assert list(Model(folder).stream([5, 6], 8, sampling)) == expected
    of_cli = CliRunner().invoke(app, ["generate", str(bundle.folder), "a b", *drawn, "--seed", "4", "--stop", "~~~"])
    assert of_cli.stdout == run(folder, "a b", *drawn, "--seed", 4).stdout
    # A batch is drawn from as one of its texts alone.
    assert Model(folder).generate([[5, 6], [7]], 8, sampling=sampling)[0] == expected
    for wrong, message in (("--top-p=2", "top_p 2.0: give"), ("--temperature=nan", "nan: give"), ("--stop=a", "TEXT")):
        refused = run(folder, "--ids", 5, wrong)
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr


def test_generate_and_embed_try_a_bundle_from_the_shell(smollm2, minilm):
    told = cli("generate", smollm2.folder, PROMPT.replace("\n", "\\n"))
    assert told.stdout == f"{PROMPT}{ANSWER}\n", told.stderr
    assert "a second)" in told.stderr
    model, texts = Model(minilm.folder), ("A sentence.", "Another one.")
    found = cli("embed", minilm.folder, *texts)
    for line, text in zip(found.stdout.splitlines(), texts, strict=True):
        assert np.allclose(json.loads(line), model.encode([encode_text(model.tokenizer, text)])[0], atol=1e-5)
    refused = cli("embed", smollm2.folder, "word")
    assert refused.returncode == 2
    assert "generates text" in refused.stderr


def test_encoders_give_a_row_for_each_input(make_bundle, tmp_path):
    folder = deploy_python(make_bundle("bert"), tmp_path / "bert")
    model = Model(folder)
    alone = np.concatenate([model.encode([ids]) for ids in ([5, 6, 7], [9])])
    assert np.allclose(model.encode([[5, 6, 7], [9]]), alone, atol=1e-5)
    found = run(folder, "--ids", 5, 6, 7)
    assert np.allclose([float(value) for value in found.stdout.split()], alone[0], atol=1e-5), found.stderr


def test_what_cannot_be_deployed_is_refused_and_leaves_nothing(make_bundle, tmp_path):
    with pytest.raises(ExportError, match=r"bfloat16.*Export it with"):
        deploy_python(make_bundle("llama", "bf16"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ExportError, match="not a deployment"):
        deploy_python(make_bundle("llama"), tmp_path / "mine")
    bundle = Bundle(Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "b")), make_bundle("llama").manifest)
    write_manifest(bundle.folder, bundle.manifest)
    with bundle.data.open("r+b") as file:
        file.write(b"1234")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        deploy_python(bundle, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "mine"]


def test_an_input_is_as_long_as_the_model_takes_and_no_longer(make_bundle):
    decoder = Model(make_bundle("gpt2").folder)
    prompt = [7] * 120
    assert len(decoder.generate([prompt, [8]], 100)[0]) <= 128 - 120
    with pytest.raises(ModelError, match="128 tokens; the model takes 128, its answer included"):
        decoder.generate([[7] * 128])
    # RoBERTa's 130 positions hold 128 tokens, since it counts from the padding's id on.
    encoder = Model(make_bundle("roberta").folder)
    assert encoder.encode([[7] * 128]).shape[1] == 128
    with pytest.raises(ModelError, match="129 tokens; the model takes 128"):
        encoder.encode([[7] * 129, [8]])


def test_sentences_are_cut_as_sentence_transformers_cuts_them(minilm):
    model, words = Model(minilm.folder), "A sentence that is long. " * 100
    ids = encode_text(model.tokenizer, words)
    expected = transformers.AutoTokenizer.from_pretrained(minilm.folder)(words, truncation=True, max_length=256)
    limit = json.loads((minilm.folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert (len(ids), ids) == (limit, expected["input_ids"])
    assert model.encode([ids]).shape == (1, 384)


def test_a_nan_in_one_request_is_refused_and_reaches_no_other(make_bundle, tmp_path):
    folder = deploy_python(make_bundle("mistral"), tmp_path / "out")
    prompts = [[9, 10, 11, 12, 13], [14, 15]]
    expected = Model(folder).generate(prompts, 8)
    poison_token(folder, 7)
    model = Model(folder, check=False)
    assert model.generate(prompts, 8) == expected
    for bad in ([[7]], [[7, 9], [10]]):
        with pytest.raises(ModelError, match="no number"):
            model.generate(bad, 8)
        assert model.generate(prompts, 8) == expected


def test_arguments_and_files_that_cannot_be_are_one_sentence(make_bundle, tmp_path):
    folder = deploy_python(make_bundle("llama"), tmp_path / "out")
    described = json.loads((folder / "deploy.json").read_text())

    def refused(*arguments: object, **environment: str) -> str:
        command = [sys.executable, folder / "runner.py", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=60, env={**os.environ, **environment})
        told = done.stderr.decode()
        assert done.returncode == 2, told
        assert "Traceback" not in told
        return told.splitlines()[-1]

    assert "give at least 1" in refused("--ids", "5", "--tokens", "-3")
    assert "give 0 to 1024" in refused("--ids", "5", "--threads", "100000000")
    assert "is not a whole number" in refused("--ids", "5", "1.5")
    assert "is not a whole number" in refused("--ids", "9" * 5000)
    assert "vocabulary of 384" in refused("--ids", "384")
    assert "vocabulary of 384" in refused("--ids", "-1")
    assert "cannot be loaded as a library of ops" in refused("--ids", "5", "--library", folder / "README.md")
    save_tokenizer(folder)
    described["files"]["tokenizer.json"] = sha256_of(folder / "tokenizer.json")

    def describe(**changes: object) -> None:
        (folder / "deploy.json").write_text(json.dumps({**described, **changes}))

    describe()
    assert "cannot be read by the tokenizer" in refused(b"\xff\xfe")
    for name, content in (("tokenizer.json", "{}"), ("model.onnx", "no model")):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(content)
        describe(files={**described["files"], name: sha256_of(folder / name)})
        assert ("cannot be read as a tokenizer" if "tok" in name else "cannot load the model") in refused("word")
        (folder / name).write_bytes(kept)
    tokens = described["tokens"]
    for wrong in ({"padding": None}, {"stops": [1.5]}, {"most": "9"}, {"vocabulary": 10**400}, {"cut": -1}):
        describe(tokens={**tokens, **wrong})
        assert "not as they should be" in refused("--ids", "5")
    for wrong in ({"tokens": []}, {"files": [1]}, {"files": {"model.onnx": 5}}, {"format_version": "1"}):
        describe(**wrong)
        assert "not as they should be" in refused("--ids", "5")
    describe(format_version=99)
    assert "newer teamlora-export" in refused("--ids", "5")
    for content in (b"{", b"[1]", b"\xff", b'{"a":' * 100_000, b"1" * 5000):
        (folder / "deploy.json").write_bytes(content)
        assert "deploy.json: " in refused("--ids", "5")
    (folder / "deploy.json").unlink()
    os.mkfifo(folder / "deploy.json")
    assert "deploy.json: cannot be read" in refused("--ids", "5")


def test_no_text_of_a_model_or_a_library_commands_the_terminal(make_bundle, tmp_path):
    folder = deploy_python(make_bundle("llama"), tmp_path / "out")
    told = run(folder, "a\x1b[31m\tb\u200d", "--tokens", 1)
    assert told.stdout.startswith("a\\x1b[31m\tb\u200d"), told.stderr
    told = cli("generate", make_bundle("llama").folder, "a\x1b[31m\tb\u200d", "--tokens", 1)
    assert told.stdout.startswith("a\\x1b[31m\tb\u200d"), told.stderr
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "Frobnicate\x1b[31m"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    refused = run(folder, "--ids", 5, "--no-check")
    assert refused.returncode == 2
    assert "Frobnicate\\x1b[31m" in refused.stderr
    assert "\x1b" not in refused.stderr


def test_what_it_reads_is_what_is_written_today():
    newest = {DEPLOY_NAME: ("files", DEPLOY_VERSION), MANIFEST_NAME: ("sha256", SHELF_FORMAT_VERSION)}
    assert newest == _DESCRIPTIONS
    assert _MOST_SLOTS == MOST_SLOTS
