"""Rows from JSON Lines, and as token ids: what is read, what is learned, and what is refused by file and line."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from teamlora_export.deploy.words import encode_text, open_tokenizer
from teamlora_export.errors import ExportError
from teamlora_export.train.data import Row, read_rows, shared_prompts, split_rows
from teamlora_export.train.encode import Encoder, collator, digest
from teamlora_export.train.options import TrainOptions, option_name, parse_targets, parse_validation

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GOOD = '{"prompt": "a", "answer": "b"}'


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def test_rows_are_read_in_order_with_the_files_name_for_a_task(tmp_path):
    write(tmp_path / "b.jsonl", '{"prompt": "p", "answer": "q", "task": "named", "id": 7}', "", GOOD)
    write(tmp_path / "a.jsonl", "\ufeff" + GOOD)
    write(tmp_path / "notes.txt", "no rows")
    read = read_rows([tmp_path])
    assert [(row.prompt, row.task, Path(row.where.split(",")[0]).name) for row in read.rows] == [
        ("a", "a", "a.jsonl"),
        ("p", "named", "b.jsonl"),
        ("a", "b", "b.jsonl"),
    ]
    assert read.rows[2].where.endswith("b.jsonl, line 3")
    assert [Path(name).name for name in read.sha256] == ["a.jsonl", "b.jsonl"]


BAD_LINES = {
    "prompt: a": "is not JSON",
    '{"prompt": "a\x00", "answer": "b"}': "is not JSON",
    '{"prompt": "a"}': "has no 'answer'",
    '{"prompt": 3, "answer": "b"}': "prompt is a number, expected a string",
    '{"prompt": "a", "answer": " \\n"}': "answer is empty",
    '{"prompt": "a", "answer": "b", "task": null}': "task is null",
    '{"prompt": "a", "answer": "\\ud800"}': "half of a character",
    '{"prompt": "a", "answer": "b", "answer": "c"}': "names a field twice",
    '["a", "b"]': "is no JSON object",
    "[" * 100_000: "nested too deep",
    '{"prompt": ' + "9" * 9999 + ', "answer": "b"}': "is not JSON",
    json.dumps({"prompt": "a", "answer": "b", "task": "t" * 201}): "task has 201 characters",
}


def test_every_bad_row_is_named_by_file_and_line_with_what_is_wrong(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, *BAD_LINES, b"\xff\xfe")
    with pytest.raises(ExportError) as found:
        read_rows([path])
    told = str(found.value).splitlines()
    assert told[0].endswith(f"rows.jsonl: {len(BAD_LINES) + 1} problems")
    for number, (line, reason) in enumerate(zip(told[1:], [*BAD_LINES.values(), "not text in UTF-8"], strict=True), 2):
        assert f"rows.jsonl, line {number}: " in line and reason in line


def test_a_line_without_an_end_is_refused_before_it_is_read_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ExportError, match="line 1: has more than 16,777,216 bytes"):
        read_rows([path])


def test_what_is_no_file_or_leads_out_of_its_folder_is_refused(tmp_path):
    write(tmp_path / "outside.jsonl", GOOD)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "empty").mkdir()
    for path, reason in (
        (tmp_path / "empty", r"no file \*\.jsonl in it"),
        (folder / "none.jsonl", "no such file"),
        (write(folder / "empty.jsonl", ""), "no row in it"),
    ):
        with pytest.raises(ExportError, match=reason):
            read_rows([path])
    os.mkfifo(folder / "fifo.jsonl")
    with pytest.raises(ExportError, match="not a regular file"):
        read_rows([folder / "fifo.jsonl"])
    (folder / "fifo.jsonl").unlink()
    (folder / "linked.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(ExportError, match="a link to a file outside"):
        read_rows([folder])


def test_a_share_of_each_task_is_held_out_and_prompts_stay_together():
    rows = [Row(f"{task}{i // 2}", str(i), task, "") for task in ("one", "two") for i in range(40)]
    kept, held_out = split_rows(rows, 0.2, seed=1)
    assert {row.task for row in held_out} == {"one", "two"}
    assert len(held_out) == 16 and len(kept) + len(held_out) == len(rows)
    assert shared_prompts(kept, held_out) == 0
    assert split_rows(rows, 0.2, seed=1)[1] == held_out != split_rows(rows, 0.2, seed=2)[1]
    with pytest.raises(ExportError, match="has one prompt alone"):
        split_rows([Row("a", "b", "task", "")], 0.2, 0)


def test_a_small_task_keeps_rows_in_both_parts_where_tasks_share_prompts():
    rows = [*(Row(f"{i}", "a", "large", "") for i in range(40)), *(Row(f"{i}", "b", "small", "") for i in (1, 2))]
    for seed in range(50):
        for part in split_rows(rows, 0.3, seed):
            assert {row.task for row in part} == {"large", "small"}, seed
    # Two of three prompts would lie in the same part, and these two are a task.
    pairs = {"x": "ab", "y": "bc", "z": "ca"}
    with pytest.raises(ExportError, match="shares its prompts with others"):
        split_rows([Row(prompt, "a", task, "") for task in pairs for prompt in pairs[task]], 0.5, 0)


@pytest.fixture
def folder(make_base) -> Path:
    return make_base("llama").folder


def options(**fields: object) -> TrainOptions:
    return TrainOptions(base="", data="rows.jsonl", output="out", **fields)  # type: ignore[arg-type]


def test_the_answer_and_the_end_of_the_text_are_learned_and_nothing_else(folder):
    rows = [Row("Say it:", " the software", "t", ""), Row("A", "B", "t", "")]
    encoded, lengths = Encoder(folder, options()).encode(rows, ["t"])
    tokenizer = open_tokenizer(folder, None)
    answer = [*encode_text(tokenizer, " the software", specials=False), 2]
    # As a program reads the prompt: with the token that begins a text.
    assert list(encoded[0].ids) == [*encode_text(tokenizer, "Say it:"), *answer] and encoded[0].ids[0] == 1
    assert lengths.told() is None
    batch = collator(0)(encoded)
    longest, short = len(encoded[0].ids), len(encoded[1].ids)
    assert batch["labels"][0].tolist() == [-100] * (longest - len(answer)) + answer
    assert batch["input_ids"][1].tolist() == [*encoded[1].ids, *[0] * (longest - short)]
    assert batch["attention_mask"].sum(dim=1).tolist() == [longest, short]
    assert batch["labels"][1, short:].eq(-100).all() and batch["labels"].dtype == torch.int64


def test_rows_that_the_model_cannot_read_are_refused_by_line(folder, tmp_path):
    """Tokens that were added to the tokenizer and not to the model; and words that leave no token."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<added>"])
    fields = json.loads(tokenizer.to_str())
    fields["normalizer"] = {"type": "Replace", "pattern": {"String": "é"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    rows = [Row("a", "b", "t", "line 1"), Row("<added> a", "b", "t", "line 2"), Row("a", "é", "t", "line 3")]
    with pytest.raises(ExportError) as found:
        Encoder(tmp_path, options()).encode(rows, ["t"])
    told = str(found.value)
    assert "Rows that the model cannot read: 2 problems" in told and "line 1" not in told
    assert "line 2: its prompt has token 384, and the model has 384, from 0" in told
    assert "line 3: the tokenizer makes no token of its answer" in told
    # Without a token that begins a text.
    fields["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ExportError, match="line 4: the tokenizer makes no token of its prompt"):
        Encoder(tmp_path, options()).encode([Row("é", "b", "t", "line 4")], ["t"])


def test_an_end_of_the_text_within_an_answer_is_told(folder):
    rows = [Row("a", answer, "t", f"line {i}") for i, answer in enumerate(("b", "b</s>", "b</s> c"), 1)]
    encoded, lengths = Encoder(folder, options()).encode(rows, ["t"])
    (told,) = lengths.doubts()
    assert told.endswith("where the model learns to end: 2, the first in line 2.")
    assert encoded[1].ids[-2:] == (2, 2) and lengths.told() is None


def test_what_is_learned_from_is_known_by_its_tokens(folder):
    rows = [Row("a", "b", "t", ""), Row("ab", "c", "u", "")]
    encoded, _ = Encoder(folder, options()).encode(rows, ["t", "u"])
    first = encoded[0]
    others = [
        encoded[::-1],
        encoded[:1],
        [dataclasses.replace(first, task=1), encoded[1]],
        [dataclasses.replace(first, prompt_length=1), encoded[1]],
        [dataclasses.replace(first, ids=(*first.ids[:-1], 0)), encoded[1]],
    ]
    known = {digest(encoded, ["t", "u"]), digest(encoded, ["t", "v"]), *(digest(other, ["t", "u"]) for other in others)}
    assert len(known) == 7 and digest(list(encoded), ["t", "u"]) in known


# Of Llama 2, of later conversions from SentencePiece, and of a tokenizer that puts nothing before a text.
PREPENDING = {
    "normalizer": {"normalizer": [{"type": "Prepend", "prepend": "▁"}, _REPLACE], "pre_tokenizer": None},
    "metaspace": {"normalizer": [], "pre_tokenizer": {**_METASPACE, "prepend_scheme": "first"}},
    "none": {"normalizer": [_REPLACE], "pre_tokenizer": None},
}


@pytest.mark.parametrize("kind", PREPENDING)
@pytest.mark.parametrize("answer", ["yes", " yes", "\nyes", "  yes"])
def test_an_answer_has_no_space_that_is_not_written(kind, answer, folder, tmp_path):
    """The prompt and the answer are read as one text, whatever the tokenizer puts before a text."""
    fields = PREPENDING[kind]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *"yesquo:", "▁▁"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["▁", "▁"]], "unk_token": "<unk>"}
    decoder = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    normalizer = {"type": "Sequence", "normalizers": fields["normalizer"]}
    parts = {"normalizer": normalizer, "pre_tokenizer": fields["pre_tokenizer"], "decoder": decoder, "model": model}
    nothing = {"truncation": None, "padding": None, "post_processor": None, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **nothing, **parts}))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    encoded, _ = Encoder(tmp_path, options()).encode([Row("quo:", answer, "t", "")], ["t"])
    tokenizer = open_tokenizer(tmp_path, None)
    assert list(encoded[0].ids) == [*encode_text(tokenizer, f"quo:{answer}"), 2]


# GPT-2's kind with a space before each text, and a merge of that with a line's end; and one that drops lines' ends.
SPACED = {
    "bytes": (
        {"normalizer": None, "pre_tokenizer": {**_BYTES, "add_prefix_space": True}, "decoder": _BYTES},
        (["Ġ", "Ċ"], ["Ġ", "a"]),
    ),
    "stripped": (
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
                    {"type": "Strip", "strip_left": True, "strip_right": True},
                ],
            },
            "pre_tokenizer": {**_METASPACE, "prepend_scheme": "always", "split": True},
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        },
        (["▁", "a"],),
    ),
}


@pytest.mark.parametrize("kind", SPACED)
def test_an_answer_without_a_space_has_none_where_a_line_end_tells_nothing(kind, folder, tmp_path):
    parts, merges = SPACED[kind]
    tokens = ["<pad>", "<s>", "</s>", *"Ġ▁Ċax:(", *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": list(merges), "unk_token": None}
    nothing = {"truncation": None, "padding": None, "post_processor": None, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **nothing, **parts, "model": model}))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    rows = [Row("x:", "a", "t", "line 1"), Row("x:", " a", "t", "line 2")]
    encoded, lengths = Encoder(tmp_path, options()).encode(rows, ["t"])
    said = [[tokens[i] for i in row.ids[row.prompt_length : -1]] for row in encoded]
    assert said[0] == ["a"] and not lengths.doubts()
    assert said[1] == (["Ġa"] if kind == "bytes" else ["▁a"])


def test_a_space_that_a_tokenizer_cannot_be_kept_from_is_told(folder, monkeypatch):
    encoder = Encoder(folder, options())
    encoder._prepends = True
    monkeypatch.setattr(encoder, "_behind", lambda text: iter(()))
    rows = [Row("a", "b", "t", "line 1"), Row("a", " b", "t", "line 2")]
    (told,) = encoder.encode(rows, ["t"])[1].doubts()
    assert "begins with a space that is not in them: line 1." in told


def test_rows_that_are_too_long_are_an_error_or_cut_or_left_out_and_counted(folder):
    rows = [Row("abc " * 40, "d", "t", "rows.jsonl, line 1"), Row("a", "d", "t", "rows.jsonl, line 2")]
    with pytest.raises(ExportError, match=r"line 1: \d+ tokens, 16 at most"):
        Encoder(folder, options(max_length=16)).encode(rows, ["t"])
    whole, _ = Encoder(folder, options()).encode(rows, ["t"])
    cut, lengths = Encoder(folder, options(max_length=16, too_long="cut")).encode(rows, ["t"])
    assert lengths.told() == "Longer than 16 tokens: 1 prompt lost its beginning."
    assert cut[0].ids == (1, *whole[0].ids[-15:]), "the token that begins a text stays, and the whole answer"
    kept, lengths = Encoder(folder, options(max_length=16, too_long="skip")).encode(rows, ["t"])
    assert kept == [whole[1]] and lengths.skipped == 1
    with pytest.raises(ExportError, match=r"line 1: \d+ tokens"):
        Encoder(folder, options(max_length=16, too_long="cut")).encode([Row("a", "bcd " * 40, "t", "line 1")], ["t"])
    with pytest.raises(ExportError, match="the model has 128 positions"):
        Encoder(folder, options(max_length=4096))


def test_a_prompt_can_be_put_into_the_models_own_chat_template(folder, tmp_path):
    with pytest.raises(ExportError, match="no chat template"):
        Encoder(folder, options(chat=True))
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("<s>{% for m in messages %}[{{ m.content }}]{% endfor %}")
    encoded, _ = Encoder(tmp_path, options(chat=True)).encode([Row("Hi", "yes", "t", "")], ["t"])
    assert list(encoded[0].ids[: encoded[0].prompt_length]) == encode_text(open_tokenizer(folder, None), "[Hi]")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('not so') }}")
    with pytest.raises(ExportError, match=r"rows.jsonl, line 1: .*not so"):
        Encoder(tmp_path, options(chat=True)).encode([Row("Hi", "yes", "t", "rows.jsonl, line 1")], ["t"])


CHAT_TEMPLATES = {
    # As of models whose turns end otherwise than their texts.
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<pad>{% endfor %}{{ '[assistant]</s>' }}": 0,
    "{% for m in messages %}{{ m.content }}</s>{% endfor %}": 2,
    # Nothing that ends a text, or no answer at all: the first that the model names.
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": 2,
    "{% if messages[1] is defined %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}": 2,
}


@pytest.mark.parametrize(("template", "end"), CHAT_TEMPLATES.items())
def test_an_answer_ends_with_the_token_that_the_chat_template_puts_there(template, end, folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (tmp_path / "chat_template.jinja").write_text(template)
    encoded, _ = Encoder(tmp_path, options(chat=True)).encode([Row("Hi", "yes", "t", "")], ["t"])
    assert encoded[0].ids[-1] == end


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"family": "dora"}, "--family dora: unknown"),
        ({"rank": 6}, "--experts 4: does not divide --rank 6"),
        ({"steps": 1, "epochs": 1.0}, "--steps and --epochs"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"batch": 0}, "--batch 0"),
        ({"validation": 1.5}, "--validation 1.5"),
        ({"validation": 1}, "--validation 1: a share"),
        ({"validation": 0}, "--validation 0: a share"),
        ({"validation": True}, "--validation True: a share"),
        ({"targets": "(q_proj"}, "is not a regular expression"),
        ({"targets": ("all-linear", "q_proj")}, "--targets all-linear: has all others in it"),
        ({"chat": True, "too_long": "cut"}, "--too-long cut"),
        ({"family": "lora", "balance_weight": 0.1}, "which lora has not"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(fields, reason):
    with pytest.raises(ExportError) as found:
        options(**fields).check()
    assert reason in str(found.value)


def test_what_is_hardly_meant_is_told():
    assert options().doubts(2) == options(warmup=1.0).doubts(2) == options(warmup=0.0).doubts(1) == []
    for fields, told in (({"alpha": 0.0}, "--alpha 0"), ({"learning_rate": 0.0}, "--learning-rate 0")):
        assert [told in doubt for doubt in options(**fields).doubts(100)] == [True]
    for fields in ({"evaluate_every": 3}, {"patience": 1}):
        (told,) = options(**fields).doubts(100)
        assert told.startswith(option_name(*fields)) and "nothing is held out" in told
        assert options(**fields, validation=0.1).doubts(100) == []
    assert options(patience=0).doubts(100) == []
    assert options(warmup=100.0).doubts(2) == ["--warmup 100: 100 of 2 steps: --learning-rate is never reached."]
    assert options().doubts(1) == ["--warmup 0.05: 1 of 1 steps: --learning-rate is never reached."]


def test_the_command_of_a_training_asks_for_the_same_training(tmp_path):
    from typer.testing import CliRunner

    from teamlora_export import cli_train

    asked = options(family="hydralora", targets=("q_proj", "v_proj"), validation=0.25, chat=True, epochs=2.0, seed=3)
    given: list[TrainOptions] = []

    def check(self: TrainOptions) -> None:
        given.append(self)
        raise ExportError("seen")

    import typer

    app = typer.Typer()
    app.command()(cli_train.train_command)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainOptions, "check", check)
        import shlex

        CliRunner().invoke(app, shlex.split(asked.command())[2:])
    assert given == [asked]


def test_targets_and_held_out_rows_are_read_as_people_write_them(tmp_path):
    assert parse_targets([]) == "all-linear"
    assert parse_targets(["all-linear,q_proj"]) == parse_targets(["all-linear", "q_proj"]) == ("all-linear", "q_proj")
    assert options(targets=["all-linear"]).targets == "all-linear"
    assert parse_targets(["q_proj, v_proj", "o_proj"]) == ("q_proj", "v_proj", "o_proj")
    assert parse_targets([r".*\.layers\.[01]\..*"]) == r".*\.layers\.[01]\..*"
    assert parse_validation([]) is None
    # An unset variable of a shell, which would be the current folder.
    for ask in (
        lambda: parse_validation([""]),
        lambda: parse_validation(["a.jsonl", ""]),
        lambda: options(validation=""),
        lambda: TrainOptions(base="", data=["a.jsonl", ""], output="out"),
    ):
        with pytest.raises(ExportError, match=r"--(validation|data) is empty\. Give a file"):
            ask()
    assert parse_validation(["0.1"]) == 0.1
    assert parse_validation(["a.jsonl", "b"]) == (Path("a.jsonl"), Path("b"))
