"""Bundles with a shelf of adapters: what an export writes, and what edits of the shelf do and refuse."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import _ALL, random_adapter
from safetensors.numpy import load_file, save_file
from shelves import COUNT, SHELF, write_family
from typer.testing import CliRunner

from teamlora_export import shelf as shelf_module
from teamlora_export.adapter import AdapterConfig, AdapterSpec, write_adapter
from teamlora_export.bundle import Bundle, check_files, listed_files, read_bundle
from teamlora_export.cli import app
from teamlora_export.cli_adapters import adapters_given
from teamlora_export.deploy import model_folder
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.folder import Description, deployment
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.files import read_record
from teamlora_export.graph import op
from teamlora_export.inspect import inspect_path
from teamlora_export.origin import model_name, require_base, require_one_base
from teamlora_export.progress import Reporter
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter, slot_sizes
from teamlora_export.staging import entries, held_file


@pytest.fixture
def bundle(make_shelf, tmp_path) -> Bundle:
    """One of its own."""
    shutil.copytree(make_shelf().folder, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")


def names(folder: Path) -> list[str]:
    return list(read_bundle(folder).manifest.shelf["adapters"])


def test_the_base_is_written_once_and_each_adapter_is_a_file_beside_it(make_shelf, make_bundle):
    bundle, plain = make_shelf(), make_bundle("llama")
    check_files(bundle)
    manifest = bundle.manifest
    assert list(manifest.shelf["adapters"]) == list(SHELF)
    assert (manifest.op["version"], manifest.shelf["slots"], manifest.format_version) == (2, 3, 3)
    assert (plain.manifest.op["version"], plain.manifest.shelf, plain.manifest.format_version) == (1, None, 2)
    assert manifest.inputs == plain.manifest.inputs, "what a caller must give is what it was"
    sizes = {(bundle.folder / adapter["file"]).stat().st_size for adapter in manifest.shelf["adapters"].values()}
    assert len(sizes) == 1, "all have the form of a slot"
    # The default of all slots is one run of zeros, as long as the longest of them.
    model = onnx.load(bundle.model, load_external_data=False)
    inputs, weights = {value.name for value in model.graph.input}, {t.name: t for t in model.graph.initializer}
    slots = [weights[name] for name in inputs & weights.keys() if name != "adapter"]
    offsets = {entry.value for t in slots for entry in t.external_data if entry.key == "offset"}
    assert len(slots) == 48 and len(offsets) == 1
    assert bundle.data.stat().st_size < plain.data.stat().st_size
    stored = load_file(bundle.folder / manifest.shelf["adapters"]["team"]["file"])
    assert stored.keys() == {tensor.name for tensor in slots}


def test_the_graph_by_itself_is_the_base_and_onnx_runtimes_own_adapters_fit_it(make_shelf, make_base, tmp_path):
    """Without our programs: `adapter` is left out, or set by a file of ONNX Runtime's own kind."""
    bundle, base = make_shelf(), make_base("llama")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle.model, options, providers=["CPUExecutionProvider"])
    ids = np.array([[5, 6, 7, 8]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
    feeds |= {v.name: np.zeros((1, 2, 0, 8), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    expected = base.load(torch.float32)(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(session.run(["logits"], feeds)[0] - expected).max() < 1e-4
    stored = load_file(bundle.folder / bundle.manifest.shelf["adapters"]["team"]["file"])
    parameters = {name: ort.OrtValue.ortvalue_from_numpy(array[None]) for name, array in stored.items()}
    parameters["adapter"] = ort.OrtValue.ortvalue_from_numpy(np.int32([0]))
    file = ort.AdapterFormat()
    file.set_parameters(parameters)
    file.export_adapter(str(tmp_path / "team.onnx_adapter"))
    loaded, run = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(tmp_path / "team.onnx_adapter"))
    run.add_active_adapter(loaded)
    found = session.run(["logits"], feeds, run)[0][0, -1].argmax()
    assert [found] == Model(bundle.folder).generate([[5, 6, 7, 8]], 1, adapters=["team"])[0]
    assert found != expected[0, -1].argmax()


def test_a_shelf_is_edited_by_commands_that_import_no_torch(bundle, shelf_adapters):
    """In a process of its own, as a user does it."""
    program = """
import sys
from teamlora_export.cli import app
for words in (["add", "late", "-a", sys.argv[2]], ["replace", "late", "-a", sys.argv[3]], ["remove", "lora"]):
    app(["adapters", words[0], sys.argv[1], *words[1:]], standalone_mode=False)
app(["adapters", "list", sys.argv[1]], standalone_mode=False)
print(sorted({"torch", "transformers", "onnxruntime", "pickle_torch"} & set(sys.modules)))
"""
    given = [str(bundle.folder), str(shelf_adapters["lora"]), str(shelf_adapters["small"])]
    before = {name: (bundle.folder / name).stat() for name in ("model.onnx", "model.onnx.data")}
    done = subprocess.run([sys.executable, "-c", program, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"{given[0]}: late is {what}" for what in ("added", "replaced")] + [
        f"{given[0]}: lora is removed"
    ]
    assert lines[3] == f"{given[0]}: adapters 5, slots 3 of 0.08 MB each"
    assert lines[-1] == "[]"
    assert {name: (bundle.folder / name).stat() for name in before} == before, "the base's files are not touched"
    check_files(read_bundle(bundle.folder))
    assert set(entries(bundle.folder)) == {"manifest.json", *read_bundle(bundle.folder).manifest.sha256}
    model, prompt = Model(bundle.folder), [5, 6, 7]
    assert (
        model.generate([prompt] * 2, 8, adapters=["late", "small"])[0]
        == model.generate([prompt], 8, adapters=["small"])[0]
    )


def test_what_does_not_fit_is_refused_by_what_and_why_and_changes_nothing(bundle, make_base, tmp_path):
    base, before = make_base("llama"), (bundle.folder / "manifest.json").read_bytes()
    write_family(tmp_path / "endless", base, "lora", ["q_proj"], 5000)
    head = write_family(tmp_path / "head", base, "teamlora", ["q_proj"], 16, 8)
    tensors = load_file(head / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors |= {name.replace(first, "base_model.model.lm_head"): a for name, a in tensors.items() if first in name}
    save_file(tensors, head / "adapter_model.safetensors")
    config = json.loads((head / "adapter_config.json").read_text()) | {"target_modules": ["q_proj", "lm_head"]}
    (head / "adapter_config.json").write_text(json.dumps(config))
    all_kinds = ",".join(sorted(SHELF["team"][1]))
    write_family(tmp_path / "experts", base, "teamlora", ["q_proj"], 16, 8)
    write_family(tmp_path / "rank", base, "teamlora", ["q_proj"], 32, 4)
    write_adapter(random_adapter(make_base("gpt2"), _ALL["gpt2"].targets), tmp_path / "gpt2")
    write_family(tmp_path / "biased", base, "teamlora", ["q_proj"], 8, 4)
    tensors = load_file(tmp_path / "biased" / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((384, 32), np.float32)
    save_file(tensors, tmp_path / "biased" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "biased" / "adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens"]
    (tmp_path / "biased" / "adapter_config.json").write_text(json.dumps(config))
    wide = write_family(tmp_path / "wide", base, "teamlora", ["q_proj"], 8, 4)
    changed = {
        n: np.pad(a, ((0, 0), (0, 8))) if a.shape[1] == 32 else a
        for n, a in load_file(wide / "adapter_model.safetensors").items()
    }
    save_file(changed, wide / "adapter_model.safetensors")
    huge = write_family(tmp_path / "huge", base, "lora", ["q_proj"], 4)
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file({n: np.sign(a) * np.float32(3e38) for n, a in tensors.items()}, huge / "adapter_model.safetensors")
    cancelled = write_family(tmp_path / "cancelled", base, "teamlora", ["q_proj"], 8, 4)
    tensors = load_file(cancelled / "adapter_model.safetensors")
    for key in (key for key in tensors if "layers.1." in key and "interaction" in key):
        tensors[key] = -np.eye(4, dtype=np.float32)
    save_file(tensors, cancelled / "adapter_model.safetensors")
    for given in (cancelled, {"cancelled": cancelled}):
        with pytest.raises(ExportError, match="divides by zero for every token"):
            export_onnx(base.name, given, tmp_path / "out")
    for name, words in (
        (
            "cancelled",
            r"divides by zero for every token.*: 1 problem\n  - model.layers.1.self_attn.q_proj: all rows of I",
        ),
        ("huge", r"q_proj.* has numbers that are none, or none in float32"),
        (
            "experts",
            rf"--slot-rank 16 --slot-experts 8 --slot-targets {all_kinds} makes room for it: .*[^$]*"
            "q_proj: has 8 experts, the bundle's slots have room for 4",
        ),
        ("endless", r"An export with it among the adapters makes room for it: "),
        ("rank", r"q_proj: has 4 experts of rank 8, the bundle's slots have room for 4 of rank 2"),
        (
            "gpt2",
            r"--slot-targets c_attn,c_fc,c_proj,down_proj,g.*: 1 problem\n.*c_attn: has no slot; of these there are 16",
        ),
        # All at once, so that one export is enough.
        (
            "head",
            rf"--slot-rank 16 --slot-experts 8 --slot-targets {all_kinds.replace('o_proj', 'lm_head,o_proj')} makes "
            r"room for it: 5 problems\n.*q_proj: has 8 experts[^$]*- lm_head: has no slot; of these there are 1 \(",
        ),
        ("biased", r"replaces weights of the base \(model.embed_tokens.weight\)"),
        ("wide", r"q_proj: the adapter maps 40 to 32 features, the base 32 to 32"),
        ("none", r"no such folder"),
    ):
        with pytest.raises(ExportError, match=words):
            add_adapter(bundle.folder, "new", tmp_path / name)
    lora = tmp_path / "experts"
    for edit, words in (
        (lambda: add_adapter(bundle.folder, "../out", lora), "cannot name an adapter"),
        (lambda: add_adapter(bundle.folder, "None", lora), "None: cannot name an adapter, since it says that there is"),
        (lambda: add_adapter(bundle.folder, "team", lora), "has an adapter team already"),
        (lambda: replace_adapter(bundle.folder, "nobody", lora), "has no adapter 'nobody'; it has hydra, lora, moe"),
        (lambda: remove_adapter(bundle.folder, "nobody"), "has no adapter 'nobody'"),
    ):
        with pytest.raises(ExportError, match=words):
            edit()
    assert (bundle.folder / "manifest.json").read_bytes() == before
    assert set(entries(bundle.folder)) == {"manifest.json", *bundle.manifest.sha256}


def test_room_that_is_asked_for_at_the_export_takes_later_adapters_that_are_larger(
    make_base, make_shelf, shelf_adapters, shelf_answers, tmp_path
):
    """It makes the graph that the larger ones make."""
    out, targets = tmp_path / "out", ",".join(SHELF["team"][1])
    options = ["--slot-rank", "8", "--slot-experts", "4", "--slot-targets", targets]
    given = ["onnx", make_base("llama").name, "-a", f"small={shelf_adapters['small']}", "-o", str(out), *options]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert read_bundle(out).model.read_bytes() == make_shelf().model.read_bytes()
    add_adapter(out, "team", shelf_adapters["team"])
    found = Model(out).generate([[5, 6, 7]] * 3, COUNT, adapters=["team", "small", None])
    assert found[0] == shelf_answers["team", (5, 6, 7)] != found[1] != found[2]


def test_adapters_that_were_trained_with_the_head_and_on_the_body_share_an_export(
    make_base, make_shelf, shelf_adapters, tmp_path
):
    body = shutil.copytree(shelf_adapters["small"], tmp_path / "body")
    tensors = load_file(body / "adapter_model.safetensors")
    renamed = {name.replace("model.model.layers", "model.layers"): array for name, array in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, body / "adapter_model.safetensors")
    given = {"team": shelf_adapters["team"], "small": body}
    made = export_onnx(make_base("llama").name, given, tmp_path / "out")
    assert made.manifest.refit == make_shelf().manifest.refit
    ours, theirs = (
        load_file(bundle.folder / bundle.manifest.shelf["adapters"]["small"]["file"]) for bundle in (made, make_shelf())
    )
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    # Which of them does not fit is said.
    write_adapter(random_adapter(make_base("gpt2"), _ALL["gpt2"].targets), tmp_path / "strange")
    with pytest.raises(ExportError, match=rf"The adapter {tmp_path}/strange does not fit the base"):
        export_onnx(make_base("llama").name, {"team": given["team"], "odd": tmp_path / "strange"}, tmp_path / "no")


def test_a_bundle_with_one_adapter_of_its_own_has_no_shelf(make_bundle, shelf_adapters):
    with pytest.raises(ExportError, match="has one adapter of its own, and no shelf"):
        add_adapter(make_bundle("llama").folder, "new", shelf_adapters["lora"])


_KILLED_AT_EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
from teamlora_export.bundle import check_files, read_bundle
from teamlora_export.origin import model_name, require_base
from teamlora_export.progress import Reporter
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter, slot_sizes
from teamlora_export.staging import entries, held_file

source, root, lora, small = map(Path, sys.argv[1:])
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "fcntl.flock")
EDITS = {
    "add": lambda folder: add_adapter(folder, "late", lora),
    "replace": lambda folder: replace_adapter(folder, "team", small),
    "remove": lambda folder: remove_adapter(folder, "moe"),
}

def shelf(folder):
    bundle = read_bundle(folder)
    check_files(bundle)
    return {name: adapter["sha256"] for name, adapter in bundle.manifest.shelf["adapters"].items()}

def end_at(number):
    left = number
    def watch(event, arguments):
        nonlocal left
        # What is read of the adapter, and what Python imports, changes nothing.
        if event in OPERATIONS and root.name in str(arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

for name, edit in EDITS.items():
    old, done = shelf(source), shutil.copytree(source, root / f"{name}-done")
    edit(done)
    new, number, code = shelf(done), 0, None
    assert new != old
    while code != 0:
        number += 1
        folder = shutil.copytree(source, root / f"{name}{number}")
        pid = os.fork()
        if pid == 0:
            end_at(number)
            edit(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        found = shelf(folder)
        assert found in (old, new), (name, number)
        # The next edit leaves nothing behind of the one that was killed.
        add_adapter(folder, "next", lora)
        assert shelf(folder).keys() == {*found, "next"}
        files = set(entries(folder)) - {"manifest.json"}
        assert files == set(read_bundle(folder).manifest.sha256), (name, number, files)
        shutil.rmtree(folder)
    assert number > 8, number
    print(name, number)
"""


def test_an_adapter_of_an_older_shelf_whose_name_is_refused_by_now_is_replaced(bundle, shelf_adapters):
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    adapters = manifest["shelf"]["adapters"]
    adapters["none"] = adapters.pop("lora")
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    replace_adapter(bundle.folder, "none", shelf_adapters["small"])
    assert read_bundle(bundle.folder).manifest.shelf["adapters"]["none"]["origin"]["r"] == 2


def test_an_edit_that_is_killed_at_any_moment_leaves_the_old_shelf_or_the_new(bundle, shelf_adapters, tmp_path):
    root = tmp_path / "killed-runs"
    root.mkdir()
    given = [bundle.folder, root, shelf_adapters["lora"], shelf_adapters["small"]]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_EVERY_OPERATION, *map(str, given)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_edits_at_once_lose_none(bundle, shelf_adapters):
    threads = [
        threading.Thread(target=add_adapter, args=(bundle.folder, f"new{i}", shelf_adapters["lora"])) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(names(bundle.folder)) == {*SHELF, *(f"new{i}" for i in range(6))}
    check_files(read_bundle(bundle.folder))


def export_meanwhile(bundle, base, adapters, monkeypatch, wait: bool):  # type: ignore[no-untyped-def]
    """While an edit has written its adapter's file and not the list: somebody exports into the same folder."""
    thread = threading.Thread(
        target=export_onnx, args=(base, {"lora": adapters["lora"]}, bundle.folder), kwargs={"dtype": "fp16"}
    )
    place = shelf_module.shelve

    def place_while_exported(*given):  # type: ignore[no-untyped-def]
        placed = place(*given)
        thread.start()
        thread.join(None if wait else 3)
        return placed

    monkeypatch.setattr(shelf_module, "shelve", place_while_exported)
    return thread


def test_an_export_waits_for_an_edit_of_what_it_replaces(bundle, make_base, shelf_adapters, make_shelf, monkeypatch):
    base = make_base("llama").name
    thread = export_meanwhile(bundle, base, shelf_adapters, monkeypatch, wait=False)
    added = add_adapter(bundle.folder, "late", shelf_adapters["moe"])
    assert "late" in added.manifest.shelf["adapters"]
    thread.join()
    found = read_bundle(bundle.folder)
    check_files(found)
    assert (found.manifest.dtype, names(bundle.folder)) == ("fp16", ["lora"])
    assert set(entries(bundle.folder)) == {"manifest.json", *found.manifest.sha256}


def test_where_nothing_can_be_locked_an_edit_of_what_was_replaced_is_refused(
    bundle, make_base, shelf_adapters, monkeypatch
):
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    base = make_base("llama").name
    export_meanwhile(bundle, base, shelf_adapters, monkeypatch, wait=True)
    with pytest.raises(ExportError, match="was exported anew meanwhile"):
        add_adapter(bundle.folder, "late", shelf_adapters["moe"])
    check_files(read_bundle(bundle.folder))


def test_an_edit_that_waited_for_an_export_is_of_what_is_there_then(bundle, make_base, shelf_adapters):
    """The lock was on a file that another has replaced."""
    base, order = make_base("llama").name, []

    def edit() -> None:
        try:
            add_adapter(bundle.folder, "late", shelf_adapters["lora"])
        except ExportError as error:
            order.append(str(error))

    thread = threading.Thread(target=edit)
    with held_file(bundle.model):
        thread.start()
        thread.join(1)
        other = export_onnx(base, {"small": shelf_adapters["small"]}, bundle.folder.with_name("other"))
        bundle.folder.rename(bundle.folder.with_name("old"))
        other.folder.rename(bundle.folder)
    thread.join()
    check_files(read_bundle(bundle.folder))
    assert len(order) == 1 and "was exported anew meanwhile" in order[0]


def test_an_export_that_leaves_out_what_is_on_the_shelf_says_so(bundle, make_base, shelf_adapters, capsys):
    export_onnx(make_base("llama").name, {"lora": shelf_adapters["lora"]}, bundle.folder)
    said = " ".join(capsys.readouterr().err.split())
    assert "hydra, moe, small, team on the shelf that is replaced: not given here, and removed with it" in said


def test_an_edit_whose_list_cannot_be_written_leaves_nothing(bundle, shelf_adapters, monkeypatch):
    before = sorted(entries(bundle.folder))

    def full(*_: object) -> None:
        raise ExportError("No space left on device; nothing was written.")

    monkeypatch.setattr(shelf_module, "write_manifest", full)
    with pytest.raises(ExportError, match="nothing was written"):
        add_adapter(bundle.folder, "late", shelf_adapters["moe"])
    assert sorted(entries(bundle.folder)) == before


def test_what_a_killed_edit_left_is_ours_and_nothing_else_is(bundle, make_base, shelf_adapters):
    """An export over the bundle replaces it."""
    left = bundle.folder / "adapters" / f"late.{'0' * 16}.safetensors"
    left.write_bytes(b"half")
    assert "adapters/" + left.name in listed_files(bundle.folder)
    again = export_onnx(make_base("llama").name, {"lora": shelf_adapters["lora"]}, bundle.folder)
    assert names(again.folder) == ["lora"]
    assert not left.exists()
    (again.folder / "adapters" / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"mine.safetensors: is not a file that teamlora-export wrote"):
        export_onnx(make_base("llama").name, {"lora": shelf_adapters["lora"]}, bundle.folder)


def test_files_of_adapters_are_read_with_care(bundle):
    """They are data, and whatever is in them is a sentence."""
    file = bundle.folder / bundle.manifest.shelf["adapters"]["team"]["file"]
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")

    def with_header(fields: dict[str, object]) -> bytes:
        text = json.dumps(fields).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    other = {**header, first: {**header[first], "dtype": "F16"}}
    beyond = {**header, first: {**header[first], "data_offsets": [0, 1 << 40]}}
    negative = {**header, first: {**header[first], "shape": [-1, -1]}}
    less = {name: fields for name, fields in header.items() if name != first}
    more = {**header, "more": header[first]}
    for content in (
        *(b"", good[:5], good[: length // 2], (1 << 62).to_bytes(8, "little") + good[8:], b"\x80\x04K\x01."),
        *(with_header(fields) for fields in (other, beyond, negative, less, more, {first: 3})),
        (8).to_bytes(8, "little") + b"[1, 2, 3" + good,
    ):
        file.write_bytes(content)
        model = Model(bundle.folder, check=False)
        with pytest.raises(ModelError, match=r"is no file of an adapter|for .* expected|more than the model takes"):
            model.generate([[5]], 1, adapters=["team"])


def test_a_manifest_that_lists_a_file_elsewhere_is_refused(bundle):
    fields = json.loads((bundle.folder / "manifest.json").read_text())
    for file in ("../team.safetensors", "/etc/passwd", "adapters/../x.0000000000000000.safetensors"):
        fields["shelf"]["adapters"]["team"]["file"] = file
        (bundle.folder / "manifest.json").write_text(json.dumps(fields))
        with pytest.raises(ExportError):
            read_bundle(bundle.folder)
        with pytest.raises(ModelError, match="'team' is not as it should be"):
            Model(bundle.folder)


def change_description(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Of a bundle or a deployment, as somebody may hand it on."""
    fields = json.loads(path.read_text())
    change(fields["shelf"]["adapters"], fields.get("sha256") or fields["files"])
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["../../../pwned", "team\n", "a/b", ".", "", 'x", "y'])
def test_names_that_no_adapter_can_have_are_refused_when_a_description_is_read(name, bundle, tmp_path):
    """Names become those of files, and words of programs."""
    out = deploy_python(bundle, tmp_path / "out")

    def rename(adapters, _):  # type: ignore[no-untyped-def]
        adapters[name] = adapters.pop("team")

    for path in (bundle.folder / "manifest.json", out / "deploy.json"):
        change_description(path, rename)
    with pytest.raises(ExportError, match=r"manifest.json: .*shelf"):
        read_bundle(bundle.folder)
    with pytest.raises(ExportError, match=r"deploy.json: .*shelf"):
        read_record(out / "deploy.json", Description, "Again.", newest=2)


def test_a_deployment_writes_into_its_folder_alone(bundle, tmp_path):
    with deployment(bundle, tmp_path / "out", "python", shelf="own") as made:
        for name in ("../out.txt", "adapters/../../out.txt", str(tmp_path / "out.txt")):
            with pytest.raises(ExportError, match="is not in the folder that is written"):
                made.add(name, "words")
    assert not list(tmp_path.rglob("out.txt"))


def test_an_adapter_with_more_than_one_hash_is_refused_when_a_description_is_read(bundle, tmp_path):
    """By a wrong one, one tenant's name could stand for what is another's in memory."""
    out = deploy_python(bundle, tmp_path / "out")

    def as_another(adapters, listed):  # type: ignore[no-untyped-def]
        adapters["lora"]["sha256"] = listed[adapters["lora"]["file"]] = adapters["team"]["sha256"]

    def listed_as_another(adapters, listed):  # type: ignore[no-untyped-def]
        listed[adapters["lora"]["file"]] = adapters["team"]["sha256"]

    for change in (listed_as_another, as_another):
        for path in (bundle.folder / "manifest.json", out / "deploy.json"):
            change_description(path, change)
            with pytest.raises(ModelError, match="'lora' has more than one hash"):
                Model(path.parent)
        with pytest.raises(ExportError, match="adapter lora has more than one hash"):
            read_bundle(bundle.folder)


def test_options_name_adapters_or_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "a=b", "my own"):
        Path(name).mkdir()
    assert adapters_given(["one"], False) == Path("one")
    assert adapters_given(["one"], True) == {"one": Path("one")}
    assert adapters_given(["x=one"], False) == {"x": Path("one")}
    assert adapters_given(["one", "x=two"], False) == {"one": Path("one"), "x": Path("two")}
    assert adapters_given(["a=b"], False) == Path("a=b"), "a folder of that name"
    with pytest.raises(ExportError, match=r"--adapter my own: 'my own' cannot name an adapter\. Give NAME=FOLDER"):
        adapters_given(["one", "my own"], False)
    with pytest.raises(ExportError, match="two are called one"):
        adapters_given(["one", "one=two"], False)


def test_exports_that_cannot_be_are_refused_before_anything_is_traced(make_base, shelf_adapters, tmp_path):
    base = make_base("llama").name
    team = {"team": shelf_adapters["team"]}
    for adapters, options, words in (
        (team, {"slots": 0}, "--slots 0: give 1 to 4096"),
        (team, {"slot_rank": 0}, "--slot-rank 0: give 1 to 4096"),
        (team, {"slot_experts": 5000}, "--slot-experts 5000: give 1 to 1024"),
        (team, {"slot_targets": ["c_attn"]}, "--slot-targets 'c_attn': ends no linear layer of .* It has down_proj, g"),
        ({}, {}, "There is no adapter"),
        ({"no name": shelf_adapters["team"]}, {}, "'no name': cannot name an adapter"),
        (shelf_adapters["team"], {"slots": 3}, "--slots: is for adapters that have names"),
        (shelf_adapters["team"], {"slot_targets": ["up_proj"]}, "--slot-targets: is for adapters that have names"),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(base, adapters, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["deploy", target, "BUNDLE", "-o", "OUT", "--batching", "sequence"] for target in ("triton", "kubernetes")],
)
def test_what_knows_no_shelf_refuses_one_in_a_sentence(words, make_shelf, tmp_path):
    known = {"BUNDLE": str(make_shelf().folder), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [known.get(word, word) for word in words])
    assert isinstance(done.exception, ExportError)
    assert "has a shelf of adapters, and Triton's own back ends know none. Leave out" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_an_older_program_is_told_that_it_is_older(make_shelf, monkeypatch):
    """Before it runs the base without an adapter."""
    monkeypatch.setattr(model_folder, "_DESCRIPTIONS", {"deploy.json": ("files", 1), "manifest.json": ("sha256", 2)})
    with pytest.raises(ModelError, match="was written by a newer teamlora-export"):
        Model(make_shelf().folder)


@pytest.mark.parametrize(("limit", "most", "words"), [("EXPERTS", 3, "is 3 experts and"), ("RANK", 7, "rank of 7 of")])
def test_what_the_cuda_kernels_do_not_take_is_told_at_the_export(
    limit, most, words, make_base, shelf_adapters, tmp_path, capsys, monkeypatch
):
    given = {"team": shelf_adapters["team"]}
    export_onnx(make_base("llama").name, given, tmp_path / "out")
    assert "CUDA" not in capsys.readouterr().err
    monkeypatch.setattr(op, f"MOST_{limit}_ON_GPU", most)
    export_onnx(make_base("llama").name, given, tmp_path / "out")
    said = capsys.readouterr().err
    assert words in said and re.search(r"28 modules are larger .*the first is .*_proj \(4 experts of rank 2\)", said)


def test_inspect_tells_what_is_on_the_shelf(make_shelf):
    rows = dict(inspect_path(make_shelf().folder).rows)
    assert rows["slots"] == "3 of 0.08 MB each, with room for 4 experts of rank 2"
    sizes = {
        "a.q_proj": (4, 4, 8, 4, 2),
        "b.q_proj": (4, 4, 8, 4, 2),
        "a.up": (4, 4, 3, 2, 3),
        "a.down": (4, 4, 5, 1, 5),
    }
    text = slot_sizes({"weights": {}, "projections": sizes, "overrides": {}, "body_prefix": ""})
    assert text == "4 experts of rank 2 (q_proj), 2 experts of rank 3 that share A (up), 1 expert of rank 5 (down)"
    assert rows["adapter hydra"].startswith("hydralora, r=2, k=3, 12 modules")
    assert rows["adapter hydra"].endswith("not validated")


def naming(folder: Path, base: str | None) -> Path:
    """The adapter in `folder`, as of one who trained it on `base`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


def test_an_adapter_that_names_another_base_is_refused_and_taken_when_that_is_asked_for(
    bundle, make_base, tmp_path, capsys
):
    base = make_base("llama")
    folder = naming(write_family(tmp_path / "other", base, "lora", ["q_proj"], 4), "somebody/another-llama")
    words = rf"says that it was trained on somebody/another-llama; the base here is {base.source.origin}\. .*--any-base"
    ours = naming(write_family(tmp_path / "ours", base, "lora", ["q_proj"], 4), base.name)
    with pytest.raises(ExportError, match=words):
        export_onnx(base.name, {"ours": ours, "other": folder}, tmp_path / "out")
    with pytest.raises(ExportError, match=r"says that it was trained on \\x00a; the"):
        add_adapter(bundle.folder, "other", naming(folder, "\0a"))
    naming(folder, "somebody/another-llama")
    with pytest.raises(ExportError, match=words):
        add_adapter(bundle.folder, "other", folder)
    with pytest.raises(ExportError, match=words):
        replace_adapter(bundle.folder, "team", folder)
    assert not (tmp_path / "out").exists() and names(bundle.folder) == list(SHELF)
    given = ["adapters", "add", str(bundle.folder), "other", "-a", str(folder), "--any-base"]
    assert CliRunner().invoke(app, given).exit_code == 0
    # It was taken, and its base is no name of this one.
    with pytest.raises(ExportError, match=words):
        add_adapter(bundle.folder, "again", folder)
    assert "other" in names(bundle.folder) and "again" not in names(bundle.folder)
    add_adapter(bundle.folder, "same", naming(folder, base.name))
    capsys.readouterr()
    add_adapter(bundle.folder, "silent", naming(folder, None))
    assert "does not say which base it was trained on" in capsys.readouterr().err


def test_the_name_on_which_an_export_agrees_is_the_bases_also_when_nothing_on_the_shelf_says_it(
    make_base, shelf_adapters, tmp_path, capsys
):
    given = naming(shutil.copytree(shelf_adapters["team"], tmp_path / "team"), "them/known")
    out = export_onnx(make_base("llama").name, {"team": given}, tmp_path / "out").folder
    assert read_bundle(out).manifest.base["names"] == ["them/known"]
    remove_adapter(out, "team")
    capsys.readouterr()
    add_adapter(out, "team", given)
    assert not capsys.readouterr().err
    with pytest.raises(ExportError, match="trained on them/other"):
        replace_adapter(out, "team", naming(given, "them/other"))
    # The release before did not keep it.
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["base"]["names"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    replace_adapter(out, "team", given)
    assert "says that it was trained on them/other" in capsys.readouterr().err
    assert "names" not in read_bundle(out).manifest.base


def test_a_base_has_one_name_wherever_it_lies(tmp_path, monkeypatch):
    same = (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "smollm2-135m-instruct/",
        "./SmolLM2-135M-Instruct",
        "/data/models/SmolLM2-135M-Instruct//",
        "C:\\models\\SmolLM2-135M-Instruct",
        "/root/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12fd25f77366fa6b",
        "HuggingFaceTB/SmolLM2-135M-Instruct@main",
        "/srv/SmolLM2-135M-Instruct/snapshots/0123abcd",
    )
    assert {model_name(name) for name in same} == {"smollm2-135m-instruct"}
    for nothing in (
        *("", ".", "../", "/", "checkpoint-500", "/models/base", "base_model", "/srv/hf-model", "ckpt", "./pretrained"),
        *("/home/u/checkpoint-100", "out/checkpoint-100", "final_model", "/srv/" + 20 * "a7", "snapshots/0123abcd"),
    ):
        assert model_name(nothing) is None
    assert model_name("out/tuned/checkpoint-500") == "tuned/checkpoint-500"
    # A link has two names, and is one folder.
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    adapter = AdapterSpec("lora", AdapterConfig(8, 1.0, base_model_name_or_path="link"), {}, {}, "mine", "0" * 64)
    require_base(adapter, [str(tmp_path / "folder")], False, Reporter(quiet=True))


def test_adapters_that_agree_on_another_name_of_the_base_are_taken_and_those_that_do_not_are_not(capsys):
    """Whoever names both in one command knows better than a name."""

    def of(base: str | None) -> AdapterSpec:
        return AdapterSpec("lora", AdapterConfig(8, 1.0, base_model_name_or_path=base), {}, {}, "mine", "0" * 64)

    for agreed in ([of("them/llama")], [of("them/llama"), of("/data/llama")]):
        assert require_one_base(agreed, "/data/production", False, Reporter()) == [
            agreed[-1].config.base_model_name_or_path
        ]
        assert capsys.readouterr().err.count("says that it was trained on") == len(agreed)
    require_one_base([of("them/production"), of("/data/production")], "/data/production", False, Reporter())
    require_one_base([of(None)], "/data/production", False, Reporter())
    assert not capsys.readouterr().err
    with pytest.raises(ExportError, match="trained on them/llama; the base here is /data/production"):
        require_one_base([of("them/production"), of("them/llama")], "/data/production", False, Reporter())
    # A folder that is called as any other says nothing, and they contradict each other.
    two = [of("them/llama"), of("them/qwen")]
    with pytest.raises(ExportError, match="trained on different bases: mine on them/llama, mine on them/qwen"):
        require_one_base(two, "/data/model", False, Reporter())
    assert require_one_base(two, "/data/model", True, Reporter()) == []
    assert require_one_base([of("them/llama"), of(None)], "/data/model", False, Reporter()) == ["them/llama"]
