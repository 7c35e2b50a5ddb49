"""Reading adapters: every published layout, and every way in which one can be broken."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_adapter
from formula import by_formula
from safetensors.numpy import load_file, save_file

from teamlora_export.adapter import AdapterConfig, align_with_base, read_adapter, write_adapter
from teamlora_export.errors import ExportError
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.train import TrainOptions
from teamlora_export.train.model import start_adapter

PREFIX = "base_model.model."
IN, OUT = 12, 20


def write(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def teamlora(
    rng: np.random.Generator, path: str = f"{PREFIX}layers.0.q_proj", r: int = 8, k: int = 4
) -> dict[str, np.ndarray]:
    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        f"{path}.lora_A.weight": array(r, IN),
        **{f"{path}.lora_B{i}.weight": array(OUT, r // k) for i in range(k)},
        f"{path}.lora_route.fc.weight": array(k, IN),
        f"{path}.lora_interaction_matrix.weight": array(k, k),
    }


def only(folder: Path):
    (projection,) = read_adapter(folder).projections.values()
    return projection


def assert_arrays(projection, tensors: dict[str, np.ndarray]) -> None:
    """Every array of the checkpoint is in its place, expert by expert."""

    def leaves(kind: str) -> list[np.ndarray]:
        return [value for name, value in tensors.items() if f".lora_{kind}" in name]

    assert np.array_equal(projection.down, np.concatenate(leaves("A")))
    assert np.array_equal(projection.ups, leaves("B"))
    assert np.array_equal(projection.router, *leaves("route"))
    assert np.array_equal(projection.interaction, *(leaves("interaction") or [np.zeros_like(projection.interaction)]))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_the_published_layout_is_read_for_any_k_that_divides_r(k, tmp_path, rng):
    tensors = teamlora(rng, k=k)
    projection = only(write(tmp_path, tensors, lora_nums=k))
    assert (projection.num_experts, projection.expert_rank, projection.down_rank) == (k, 8 // k, 8)
    assert projection.scaling == 16 / (8 / k)
    assert projection.routing_sum == k
    assert_arrays(projection, tensors)


def test_the_prefix_may_be_missing(tmp_path, rng):
    folder = write(tmp_path, teamlora(rng, path="layers.0.q_proj"), lora_nums=4)
    assert list(read_adapter(folder).projections) == ["layers.0.q_proj"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_every_float_dtype_is_kept_as_it_is(dtype, tmp_path, rng):
    tensors = {name: value.astype(dtype) for name, value in teamlora(rng).items()}
    assert only(write(tmp_path, tensors, lora_nums=4)).down.dtype == dtype


def test_a_bin_file_gives_what_safetensors_gives(tmp_path, rng):
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in teamlora(rng).items()}
    expected = only(write(tmp_path, tensors, lora_nums=4))
    (tmp_path / "adapter_model.safetensors").unlink()
    state = {name: torch.tensor(value.astype(np.float32)).bfloat16() for name, value in tensors.items()}
    torch.save(state, tmp_path / "adapter_model.bin")
    found = only(tmp_path)
    assert np.array_equal(found.down, expected.down)
    assert found.down.dtype == expected.down.dtype


def test_target_modules_may_be_a_regular_expression(tmp_path, rng):
    folder = write(tmp_path, teamlora(rng), lora_nums=4, target_modules=r"layers\.\d+\.[qv]_proj")
    assert len(read_adapter(folder).projections) == 1


def test_pefts_lora_is_one_expert(tmp_path, rng):
    path = f"{PREFIX}layers.0.q_proj"
    tensors = {
        f"{path}.lora_A.weight": rng.normal(size=(8, IN)).astype(np.float32),
        f"{path}.lora_B.weight": rng.normal(size=(OUT, 8)).astype(np.float32),
    }
    projection = only(write(tmp_path, tensors))
    assert (projection.num_experts, projection.scaling, projection.routing_sum) == (1, 2.0, 1.0)
    assert only(write(tmp_path, tensors, use_rslora=True)).scaling == pytest.approx(16 / 8**0.5)
    assert only(write(tmp_path, tensors, alpha_pattern={"q_proj": 4})).scaling == 0.5


def test_hydraloras_experts_share_all_of_a(tmp_path, rng):
    path = f"{PREFIX}layers.0.q_proj"
    tensors = {
        f"{path}.lora_A.weight": rng.normal(size=(8, IN)).astype(np.float32),
        **{f"{path}.lora_B{i}.weight": rng.normal(size=(OUT, 8)).astype(np.float32) for i in range(3)},
        f"{path}.lora_route.weight": rng.normal(size=(3, IN)).astype(np.float32),
    }
    projection = only(write(tmp_path, tensors, lora_nums=3))
    assert projection.shared_down
    assert (projection.num_experts, projection.down_rank, projection.scaling) == (3, 8, 2.0)
    assert_arrays(projection, tensors)


@pytest.mark.parametrize("c", [8, 2])
def test_moeloras_experts_have_a_of_their_own(c, tmp_path, rng):
    path = f"{PREFIX}layers.0.q_proj"
    tensors = {
        **{f"{path}.lora_A{i}.weight": rng.normal(size=(c, IN)).astype(np.float32) for i in range(4)},
        **{f"{path}.lora_B{i}.weight": rng.normal(size=(OUT, c)).astype(np.float32) for i in range(4)},
        f"{path}.lora_route.weight": rng.normal(size=(4, IN)).astype(np.float32),
    }
    projection = only(write(tmp_path, tensors, lora_nums=4))
    assert not projection.shared_down
    assert (projection.down_rank, projection.expert_rank, projection.scaling) == (4 * c, c, 16 / c)
    assert_arrays(projection, tensors)


@pytest.mark.parametrize("core_router", [True, False])
@pytest.mark.parametrize("rank", [8, IN])
def test_comols_cores_are_experts_between_a_shared_a_and_b(rank, core_router, tmp_path, rng):
    """Its published layer, token by token: y = base + scaling B (sum_i p_i C_i)t A x."""
    path = f"{PREFIX}layers.0.q_proj"
    shapes = [(rank, IN), (OUT, rank), *3 * [(rank, rank)]]
    down, up, *cores = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    router = rng.normal(size=(3, rank if core_router else IN)).astype(np.float32)
    tensors = {
        f"{path}.lora_router.weight": router,
        f"{path}.lora_A.weight": down,
        **{f"{path}.lora_Cores.{i}": core for i, core in enumerate(cores)},
        f"{path}.lora_B.weight": up,
    }
    settings = {"peft_type": "MoCoreLORA", "lora_rank": rank, "num_experts": 3, "core_router": core_router}
    config = {"lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path)
    assert adapter.family == "comol"
    x, base = rng.normal(size=(4, IN)), rng.normal(size=(4, OUT))
    expected = base.copy()
    for token in range(4):
        low = down.astype(np.float64) @ x[token]
        p = np.exp(router @ (low if core_router else x[token]))
        core = sum(share * core for share, core in zip(p / p.sum(), cores, strict=True))
        expected[token] += 16 / rank * (up @ (low @ core))
    found = by_formula(only(tmp_path), x, base)
    # The products of its matrices are rounded to float32.
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    with pytest.raises(ExportError, match="comol are read only"):
        write_adapter(adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    contradicts = (
        rf": lora_router reads {'A x' if core_router else 'x'}, and core_router is {not core_router!s}".lower()
    )
    for changed, words in (
        ({"lora_rank": rank - 1}, rf"lora_cores.0 is \[{rank}, {rank}\], .* are lora_rank and num_experts right"),
        ({"num_experts": None}, "1 problem.*num_experts is missing"),
        ({"lora_rank": None}, "1 problem.*lora_rank is none, expected an integer"),
        ({"peft_type": "MoCoreLORASh"}, "peft_type is 'mocorelorash', which is not known here"),
        ({"use_rslora": True}, "use_rslora is set, and the published layer of comol has no such"),
        *([({"core_router": not core_router}, contradicts)] if rank != IN else []),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ExportError) as refused:
            read_adapter(tmp_path)
        assert re.search(words, " ".join(str(refused.value).lower().split()))
    # Theirs counts where ours is there and says nothing.
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": None, "lora_nums": None}))
    assert read_adapter(tmp_path).config == adapter.config


def test_biases_are_taken_over_where_the_config_trains_them(tmp_path, rng):
    bias = {
        f"{PREFIX}layers.0.q_proj.bias": np.arange(OUT, dtype=np.float32),
        f"{PREFIX}norm.bias": np.ones(4, np.float32),
    }
    adapter = read_adapter(write(tmp_path, {**teamlora(rng), **bias}, lora_nums=4, bias="all"))
    assert set(adapter.overrides) == {"layers.0.q_proj.bias", "norm.bias"}
    assert np.array_equal(adapter.overrides["layers.0.q_proj.bias"], np.arange(OUT))
    with pytest.raises(ExportError, match=r"norm\.bias"):
        read_adapter(write(tmp_path, {**teamlora(rng), **bias}, lora_nums=4, bias="lora_only"))


def test_what_is_written_is_read_back_equal(tmp_path, make_base):
    config = AdapterConfig(
        r=8,
        lora_alpha=16.0,
        lora_nums=4,
        target_modules=("q_proj", "down_proj"),
        exclude_modules=r".*layers\.1\..*",
        bias="all",
        fan_in_fan_out=True,
        blc_alpha=0.1,
        blc_weight=0.2,
        lora_dropout=0.3,
        modules_to_save=("norm",),
        base_model_name_or_path="a base",
        task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 4},
        alpha_pattern={"layers.2.self_attn.q_proj": 3.0},
        core_router=True,
        layers_to_transform=(0, 2, 3),
        layers_pattern=("h", "layers"),
    )
    left_out = [field.name for field in fields(config) if getattr(config, field.name) == field.default]
    # Plain LoRA alone has that one.
    assert left_out == ["use_rslora"], "a field that is as it is by default may be lost unseen"
    overrides = {"model.norm.weight": np.arange(32, dtype=np.float16)}
    adapter = replace(new_adapter(make_base("qwen2").signature, config, 0, spread=0.1), overrides=overrides)
    write_adapter(adapter, tmp_path)
    found = read_adapter(tmp_path)
    assert found.config == config
    assert found.overrides.keys() == overrides.keys()
    assert np.array_equal(found.overrides["model.norm.weight"], overrides["model.norm.weight"])
    assert found.projections.keys() == adapter.projections.keys()
    for path, projection in adapter.projections.items():
        for field in fields(projection):
            assert np.array_equal(getattr(found.projections[path], field.name), getattr(projection, field.name))


BROKEN = {
    "a missing expert": (
        lambda t: t.pop(f"{PREFIX}layers.0.q_proj.lora_B2.weight"),
        r"lora_B2\.weight is missing",
    ),
    "an extra expert": (
        lambda t: t.update({f"{PREFIX}layers.0.q_proj.lora_B4.weight": np.zeros((OUT, 2), np.float32)}),
        r"lora_B4\.weight is not a key",
    ),
    "a wrong shape": (
        lambda t: t.update({f"{PREFIX}layers.0.q_proj.lora_B2.weight": np.zeros((OUT, 3), np.float32)}),
        r"lora_B2\.weight is \[20, 3\], expected \[20, 2\] \(r=8, k=4\)",
    ),
    "a NaN": (
        lambda t: t[f"{PREFIX}layers.0.q_proj.lora_A.weight"].__setitem__((0, 0), np.nan),
        r"1 values that are NaN",
    ),
    "two spellings of one key": (
        lambda t: t.update({f"{PREFIX}layers.0.q_proj.lora_B2.default.weight": np.zeros((OUT, 2), np.float32)}),
        r"lora_B2\.\S*weight: is there twice",
    ),
    "an unknown key": (lambda t: t.update({"head.scale": np.zeros(3, np.float32)}), r"head\.scale"),
    "integers": (
        lambda t: t.update({f"{PREFIX}layers.0.q_proj.lora_A.weight": np.zeros((8, IN), np.int32)}),
        r"is int32, expected",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_with_its_key(name, tmp_path, rng):
    breaks, message = BROKEN[name]
    tensors = teamlora(rng)
    breaks(tensors)
    with pytest.raises(ExportError, match=message):
        read_adapter(write(tmp_path, tensors, lora_nums=4))


def test_all_findings_are_listed_at_once(tmp_path, rng):
    tensors = {**teamlora(rng), **teamlora(rng, f"{PREFIX}layers.1.q_proj")}
    del tensors[f"{PREFIX}layers.0.q_proj.lora_B2.weight"]
    tensors[f"{PREFIX}layers.1.q_proj.lora_A.weight"][3] = np.inf
    with pytest.raises(ExportError, match=r"2 problems(.|\n)*infinite(.|\n)*lora_B2"):
        read_adapter(write(tmp_path, tensors, lora_nums=4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_nums": 3}, "lora_nums=3 does not divide r=8"),
        ({"lora_nums": "4"}, "lora_nums is '4'"),
        ({"lora_nums": 4, "r": -8}, "r is -8"),
        ({"lora_nums": 4, "r": float("nan")}, "r is nan"),
        ({"lora_nums": 4, "bias": "some"}, "bias is 'some'"),
        ({"lora_nums": 4, "target_modules": "(q_proj"}, "not a regular expression"),
        ({"lora_nums": 4, "use_dora": True}, "use_dora"),
        ({"lora_nums": 4, "target_modules": ["v_proj"]}, "target_modules does not name it"),
        ({}, "lora_nums is missing"),
        ({"lora_nums": 4, "layers_to_transform": [1, 2]}, "target_modules does not name it"),
        ({"lora_nums": 4, "layers_to_transform": [0, "1"]}, "layers_to_transform is"),
        ({"lora_nums": 4, "layers_to_transform": 0, "layers_pattern": ["h", "("]}, "not a regular expression"),
        ({"lora_nums": 4, "layers_to_transform": 0, "layers_pattern": "(?x) h #"}, "not a regular expression"),
        ({"lora_nums": 4, "rank_pattern": {"(?x) h #": 8}}, "not a regular expression"),
        ({"lora_nums": 4, "r": float("inf")}, "r is inf"),
        ({"lora_nums": 4, "lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_nums": 10**8, "r": 10**8}, "lora_nums is 100000000"),
        ({"lora_nums": 4, "rank_pattern": {"q_proj": 2.5}}, "rank_pattern is"),
        ({"lora_nums": 4, "rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"lora_nums": 4, "fan_in_fan_out": "no"}, "fan_in_fan_out is 'no'"),
        ({"lora_nums": 4, "task_type": ["x" * 99_999]}, "task_type is"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, message, tmp_path, rng):
    with pytest.raises(ExportError, match=message.replace("(", r"\(")):
        read_adapter(write(tmp_path, teamlora(rng), **config))


def test_damaged_files_are_refused(tmp_path, rng):
    folder = write(tmp_path, teamlora(rng), lora_nums=4)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ExportError, match="truncated"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read as JSON"):
        read_adapter(folder)
    with pytest.raises(ExportError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")


ODD_TENSORS = {
    "sparse": (lambda: torch.ones(8, IN).to_sparse(), "is sparse or nested"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(8, IN), torch.ones(2, IN)]), "is sparse or nested"),
    "on meta": (lambda: torch.ones(8, IN, device="meta"), "holds no values"),
    "larger than the file": (lambda: torch.zeros(1).expand(1 << 40), "more values than the file has"),
    "complex": (lambda: torch.ones(8, IN, dtype=torch.complex64), "is complex64, expected"),
    "of eight bits": (lambda: torch.ones(8, IN).to(torch.float8_e4m3fn), "is float8_e4m3fn, expected"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(8, IN), 0.1, 0, torch.qint8), "is quantised"),
    "no tensor": (lambda: [1, 2], "does not hold tensors by name"),
}


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_a_tensor_of_a_bin_file_that_is_not_plain_is_refused_by_name(name, tmp_path, rng):
    make, message = ODD_TENSORS[name]
    key = f"{PREFIX}layers.0.q_proj.lora_A.weight"
    folder = write(tmp_path, teamlora(rng), lora_nums=4)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({key: make()}, folder / "adapter_model.bin")
    with pytest.raises(ExportError, match=message):
        read_adapter(folder)


def test_a_compressed_bin_file_is_not_unpacked(tmp_path, rng):
    folder = write(tmp_path, teamlora(rng), lora_nums=4)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1 << 20)}, folder / "plain")
    with (
        zipfile.ZipFile(folder / "plain") as plain,
        zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ExportError, match="it is compressed"):
        read_adapter(folder)


class _Payload:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.touch, (Path("unpickled"),))


def test_a_bin_file_is_never_unpickled(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path, teamlora(rng), lora_nums=4)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": _Payload()}, folder / "adapter_model.bin")
    with pytest.raises(ExportError, match="refused or unreadable"):
        read_adapter(folder)
    assert not (tmp_path / "unpickled").exists()


def test_a_link_out_of_the_folder_is_refused(tmp_path, rng):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    write(inside, teamlora(rng), lora_nums=4)
    (inside / "adapter_model.safetensors").rename(outside / "x.safetensors")
    (inside / "adapter_model.safetensors").symlink_to(outside / "x.safetensors")
    with pytest.raises(ExportError, match="link to a file outside"):
        read_adapter(inside)


def test_an_adapter_of_another_model_is_refused(tmp_path, make_base, make_adapter):
    with pytest.raises(ExportError, match="the base has no linear layer of that name"):
        align_with_base(read_adapter(make_adapter("gpt2")), make_base("llama").signature)
    write_adapter(random_adapter(make_base("llama"), ("q_proj",)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wider = {n: np.pad(v, ((0, 0), (0, 4))) if "lora_A" in n or "route" in n else v for n, v in tensors.items()}
    save_file(wider, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path)
    with pytest.raises(ExportError, match="Was it trained on another model"):
        align_with_base(adapter, make_base("llama").signature)


@pytest.mark.parametrize("family", ["teamlora", "hydralora", "moelora", "lora"])
def test_a_family_is_known_by_its_tensors_whatever_the_configuration_calls_it(family, tmp_path, make_base):
    """Ours is called by its name, so that PEFT refuses what it does not know; the authors' is LORA."""
    options = TrainOptions(base="", data=(), output=tmp_path, family=family, targets=("q_proj",))
    write_adapter(start_adapter(make_base("llama").signature, options), tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields["peft_type"] == family.upper()
    for name in (family.upper(), "LORA"):
        path.write_text(json.dumps({**fields, "peft_type": name}))
        assert read_adapter(tmp_path).family == family


def test_targets_without_weights_are_found(tmp_path, make_base):
    base = make_base("llama").signature
    full = new_adapter(base, AdapterConfig(8, 16.0, 4, ("q_proj",)), 0)
    projections = {path: p for path, p in full.projections.items() if ".2." not in path}
    of_layers = replace(full.config, layers_to_transform=(0, 1, 3))
    write_adapter(type(full)(full.family, of_layers, projections, {}, "", ""), tmp_path)
    assert align_with_base(read_adapter(tmp_path), base).projections.keys() == projections.keys()
    write_adapter(type(full)(full.family, full.config, projections, {}, "", ""), tmp_path)
    with pytest.raises(ExportError, match=r"layers\.2\.self_attn\.q_proj: target_modules names it"):
        align_with_base(read_adapter(tmp_path), base)


@pytest.mark.parametrize(
    ("layers", "pattern", "named"),
    [
        (0, None, ["layers.0", "h.0"]),
        ([1, 2], None, ["layers.1", "layers.2", "h.1", "h.2"]),
        ([1, 2], "layers", ["layers.1", "layers.2"]),
        ([1], ["none", "h|x"], ["h.1"]),
        ([1], ["none"], []),
        ([], None, [f"{kind}.{i}" for kind in ("layers", "h") for i in range(3)]),
    ],
)
def test_layers_to_transform_chooses_layers_by_pefts_rule(layers, pattern, named, tmp_path, rng):
    chosen = {"layers_to_transform": layers, "layers_pattern": pattern, "target_modules": ["q_proj", "score"]}
    found = read_adapter(write(tmp_path, teamlora(rng, f"{PREFIX}score"), lora_nums=4, **chosen)).config
    paths = [f"{prefix}{kind}.{i}" for prefix in ("", "model.") for kind in ("layers", "h") for i in range(3)]
    known = [path for path in paths if found.targets(f"{path}.q_proj")]
    assert known == [prefix + path for prefix in ("", "model.") for path in named]
    # Outside of layers is no layer; what is named in full is meant.
    assert found.targets("score") and found.targets("model.score") == (not layers and layers != 0)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_adapter_trained_with_a_head_fits_the_body_alone_and_the_other_way_round(name, make_base):
    model = make_base(name)
    body = open_base(model.name, "feature-extraction")
    for trained, base in ((model, body.signature), (body, model.signature)):
        norm, shape = next((n, s) for n, s in trained.signature.parameters.items() if "norm" in n.lower())
        adapter = random_adapter(trained, ARCHITECTURES[name].targets)
        adapter = align_with_base(replace(adapter, overrides={norm: np.zeros(shape, np.float32)}), base)
        assert set(adapter.projections) <= set(base.linears)
        assert all(projection.path == path for path, projection in adapter.projections.items())
        assert set(adapter.overrides) <= set(base.parameters)
