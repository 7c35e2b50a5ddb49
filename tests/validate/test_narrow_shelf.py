"""Shelves in 16 bits beside a graph in float32: what their files hold, what is answered, and the verdict on them."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime_genai as og
import pytest
from faults import judged
from safetensors import safe_open

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.deploy.genai import deploy_genai
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.shelf import add_adapter
from teamlora_export.validate.verdict import Thresholds

LENIENT = Thresholds(perplexity=10.0, agreement=0.0)


@pytest.fixture
def copied(make_shelf, tmp_path):  # type: ignore[no-untyped-def]
    def copy(**options: str) -> Bundle:
        shutil.copytree(make_shelf(**options).folder, tmp_path / "bundle")
        return read_bundle(tmp_path / "bundle")

    return copy


@pytest.mark.parametrize(
    ("options", "only", "native"),
    [
        ({"adapter_dtype": "fp16"}, ["hydra", "lora"], False),
        ({"adapter_dtype": "bf16", "cache": "in-place"}, ["moe", "team"], True),
        ({"adapter_dtype": "bf16", "op_form": "standard"}, ["moe"], False),
        ({"adapter_dtype": "fp16", "weights_form": "int4"}, ["lora"], True),
    ],
)
def test_every_adapter_is_right_and_says_what_rounding_cost(options, only, native, copied):
    """`lora`, whose one expert has a larger rank than the slots, is cut into several."""
    bundle = copied(**options)
    library = build_library().path if native else None
    verdict = judged(bundle, only=only, thresholds=LENIENT, library=library)
    assert verdict.exact, [*verdict.departures, *(case for case in verdict.cases if not case.passed)]
    assert list(verdict.qualities) == only
    assert all(0 < quality.quantised.kl < quality.base.kl for quality in verdict.qualities.values())


@pytest.mark.parametrize(("dtype", "step", "least"), [("float16", 2.0**-10, 2.0**-24), ("bfloat16", 2.0**-7, 0.0)])
def test_the_files_hold_the_numbers_of_float32_to_half_a_step(dtype, step, least, make_shelf):
    """They are rounded once from float64, which those in float32 are as well. `least`: float16's smallest step."""
    narrow, wide = make_shelf(adapter_dtype={"float16": "fp16", "bfloat16": "bf16"}[dtype]), make_shelf()
    for name, adapter in narrow.manifest.shelf["adapters"].items():
        wide_file = wide.folder / wide.manifest.shelf["adapters"][name]["file"]
        with safe_open(narrow.folder / adapter["file"], "pt") as held, safe_open(wide_file, "pt") as full:
            assert set(held.keys()) == set(full.keys())
            for key in list(held.keys()):
                found, expected = held.get_tensor(key), full.get_tensor(key).numpy()
                if key.endswith("mix"):
                    assert (found.numpy() == expected).all()
                    continue
                assert str(found.dtype) == f"torch.{dtype}"
                most = np.maximum(np.abs(expected) * step, least) / 2
                assert (np.abs(found.float().numpy() - expected) <= most * (1 + 2.0**-10)).all(), key
    sizes = [b.folder / b.manifest.shelf["adapters"]["team"]["file"] for b in (narrow, wide)]
    assert sizes[0].stat().st_size < 0.65 * sizes[1].stat().st_size


@pytest.mark.parametrize(("dtype", "cache"), [("fp16", "growing"), ("bf16", "growing"), ("bf16", "in-place")])
def test_rows_are_answered_by_body_and_native_op_alike_and_alone_as_together(dtype, cache, make_shelf):
    bundle = make_shelf(adapter_dtype=dtype, cache=cache)
    prompts, names = [[5, 6, 7], [9, 3], [44, 45, 46, 47], [5, 6, 7]], ["team", "lora", None, "hydra"]
    body, native = Model(bundle.folder), Model(bundle.folder, build_library().path)
    together = body.generate(prompts, 12, adapters=names)
    assert native.generate(prompts, 12, adapters=names) == together
    for prompt, name, answer in zip(prompts, names, together, strict=True):
        assert body.generate([prompt], 12, adapters=[name]) == [answer]
    assert together[0] != together[3]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_onnxruntime_genais_own_adapters_are_ours(dtype, make_shelf, tmp_path):
    bundle = make_shelf(adapter_dtype=dtype)
    out = deploy_genai(bundle, tmp_path / "out")
    model = og.Model(str(out))
    adapters = og.Adapters(model)
    adapters.load(str(out / "adapters" / "team.onnx_adapter"), "team")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=3 + 8, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.set_active_adapter(adapters, "team")
    generator.append_tokens(np.array([[5, 6, 7]], np.int32))
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == Model(bundle.folder).generate([[5, 6, 7]], 8, adapters=["team"])[0]


def test_an_adapter_that_is_added_is_rounded_as_the_others(shelf_adapters, copied):
    bundle = copied(adapter_dtype="bf16")
    again = add_adapter(bundle.folder, "again", shelf_adapters["team"]).manifest.shelf["adapters"]
    assert again["again"]["sha256"] == again["team"]["sha256"]
