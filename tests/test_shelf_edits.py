"""Edits of a shelf: what they do, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import _ALL, random_adapter
from safetensors.numpy import load_file, save_file
from shelves import SHELF, write_family

from teamlora_export.adapter import write_adapter
from teamlora_export.bundle import check_files, read_bundle
from teamlora_export.deploy.runner import Model
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter
from teamlora_export.staging import entries

pytest_plugins = ["shelf_fixtures"]


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


def test_a_bundle_with_one_adapter_of_its_own_has_no_shelf(make_bundle, shelf_adapters):
    with pytest.raises(ExportError, match="has one adapter of its own, and no shelf"):
        add_adapter(make_bundle("llama").folder, "new", shelf_adapters["lora"])


def test_an_adapter_of_an_older_shelf_whose_name_is_refused_by_now_is_replaced(bundle, shelf_adapters):
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    adapters = manifest["shelf"]["adapters"]
    adapters["none"] = adapters.pop("lora")
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    replace_adapter(bundle.folder, "none", shelf_adapters["small"])
    assert read_bundle(bundle.folder).manifest.shelf["adapters"]["none"]["origin"]["r"] == 2
