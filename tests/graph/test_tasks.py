"""What sentence-transformers' files ask for is computed, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teamlora_export.errors import ExportError
from teamlora_export.graph.tasks import Pooling, read_pooling


def write_modules(folder: Path, *kinds: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    modules = [{"idx": index, "type": f"sentence_transformers.models.{kind}"} for index, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_pooling_is_as_the_modules_say(tmp_path):
    assert read_pooling(tmp_path) == Pooling("mean", True)
    write_modules(tmp_path, "Transformer", "Pooling")
    assert read_pooling(tmp_path) == Pooling("cls", False)
    write_modules(tmp_path, "Transformer", "Pooling", "Dropout", "Normalize")
    assert read_pooling(tmp_path) == Pooling("cls", True)


def test_a_module_that_the_graph_does_not_compute_is_refused_by_name(tmp_path):
    write_modules(tmp_path, "Transformer", "Pooling", "Dense", "Normalize")
    with pytest.raises(ExportError, match="names Dense; "):
        read_pooling(tmp_path)
