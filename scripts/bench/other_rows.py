"""Rows of other tools: onnxruntime-genai with its own graph of a base, with its own LoRA too, and optimum's graph."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from others import make_environment

from teamlora_export.adapter.spec import ExpertProjection
from teamlora_export.bench.turns import Reader
from teamlora_export.cache import cache_folder

_ADAPTER_NAME, _LORA = "lora", "lora.onnx_adapter"


@dataclass(frozen=True)
class GenaiRow:
    """onnxruntime-genai's graph of a base with its own generator.

    Attributes:
        threads: 0 leaves it to the package, which ran one (0.18) on a machine of two cores.
    """

    name: str
    folder: Path
    threads: int
    libraries: tuple[str, ...] = ("numpy", "onnxruntime_genai")

    def open(self) -> Reader:
        import onnxruntime_genai as og

        config = og.Config(str(self.folder))
        if self.threads:
            options = {"session_options": {"intra_op_num_threads": self.threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
        model = og.Model(config)
        adapters = og.Adapters(model) if (self.folder / _LORA).is_file() else None
        if adapters is not None:
            adapters.load(str(self.folder / _LORA), _ADAPTER_NAME)

        def read(prompts: Sequence[Sequence[int]], count: int) -> Callable[[], object]:
            params = og.GeneratorParams(model)
            # No text ends before the others do.
            length = len(prompts[0]) + count + 2
            params.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
            generator = og.Generator(model, params)
            if adapters is not None:
                generator.set_active_adapter(adapters, _ADAPTER_NAME)
            generator.append_tokens(np.array(prompts, np.int32))
            # The first token is chosen from what the prompt gave.
            generator.generate_next_token()
            return generator.generate_next_token

        return read


@dataclass(frozen=True)
class OptimumRow:
    """optimum's graph of a base, driven as optimum drives it: the logits of all tokens, a cache that grows."""

    name: str
    path: Path
    threads: int
    libraries: tuple[str, ...] = ("numpy", "onnxruntime")

    def open(self) -> Reader:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = self.threads
        session = ort.InferenceSession(self.path, settings, providers=["CPUExecutionProvider"])
        caches = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values")}
        outputs = [output.name for output in session.get_outputs()]

        def read(prompts: Sequence[Sequence[int]], _count: int) -> Callable[[], object]:
            ids, done = np.array(prompts), 0
            past = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in caches.items()}

            def step() -> object:
                nonlocal ids, done, past
                done += ids.shape[1]
                feeds = {
                    "input_ids": ids,
                    "attention_mask": np.ones((len(ids), done), np.int64),
                    "position_ids": np.arange(done - ids.shape[1], done)[None].repeat(len(ids), 0),
                    **past,
                }
                made = dict(zip(outputs, session.run(outputs, feeds), strict=True))
                ids = made["logits"][:, -1:].argmax(-1)
                past = {name: made[name.replace("past_key_values", "present")] for name in caches}
                return ids

            step()
            return step

        return read


def genai_graph(base: Path) -> Path:
    """onnxruntime-genai's own graph of the base, kept in the user's cache."""
    return _build_genai("genai-smollm2", base)


def genai_int4_graph(base: Path) -> Path:
    """The same in int4 (all products, the head among them), as the package's builder quantises it by itself."""
    return _build_genai("genai-smollm2-int4", base, precision="int4")


def genai_lora_graph(base: Path, rank: int, projections: Mapping[str, ExpertProjection], precision: str) -> Path:
    """Either of them with a LoRA adapter, whose weights are inputs that the package feeds from a file of its own
    format."""
    name = f"genai-smollm2-lora{rank}" + ("" if precision == "fp32" else f"-{precision}")
    folder = cache_folder() / "bench" / name
    if not (folder / _LORA).is_file():
        adapter = folder.with_name(f"{name}-adapter")
        _write_peft(adapter, rank, projections)
        _build_genai(name, base, f"adapter_path={adapter}", precision=precision)
        _move_lora_out(folder)
    return folder


def optimum_graph(base: Path) -> Path:
    """optimum's graph of the base, kept in the user's cache."""
    folder = cache_folder() / "bench" / "optimum-smollm2"
    if not (folder / "model.onnx").is_file():
        command = [make_environment("optimum") / "bin" / "optimum-cli", "export", "onnx", "--model", base]
        _run([*command, "--task", "text-generation-with-past", "--no-post-process", folder])
    return folder / "model.onnx"


def _build_genai(name: str, base: Path, *extra: str, precision: str = "fp32") -> Path:
    folder = cache_folder() / "bench" / name
    if not (folder / "genai_config.json").is_file():
        python = make_environment("genai") / "bin" / "python"
        command = [
            python,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            base,
            "-o",
            folder,
            "-p",
            precision,
            "-e",
            "cpu",
        ]
        _run([*command, *(["--extra_options", *extra] if extra else [])])
    return folder


def _run(command: Sequence[object]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _write_peft(folder: Path, rank: int, projections: Mapping[str, ExpertProjection]) -> None:
    """A LoRA adapter as PEFT writes it, of projections with one expert."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({path.rpartition(".")[2] for path in projections})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for path, projection in projections.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = projection.down
        tensors[f"base_model.model.{path}.lora_B.weight"] = projection.ups[0]
    save_file(tensors, folder / "adapter_model.safetensors")


def _move_lora_out(folder: Path) -> None:
    """The builder keeps an adapter's weights inside of its graph: make them inputs, with their values in the package's
    file of an adapter."""
    import onnx_ir as ir
    import onnxruntime as ort

    model = ir.load(folder / "model.onnx")
    weights = {
        name: value for name, value in model.graph.initializers.items() if ".lora_A." in name or ".lora_B." in name
    }
    if not weights:
        raise SystemExit(f"{folder}: the builder wrote no LoRA weights.")
    model.graph.inputs.extend(weights.values())
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    arrays = {name: ort.OrtValue.ortvalue_from_numpy(value.const_value.numpy()) for name, value in weights.items()}
    adapter.set_parameters(arrays)
    adapter.export_adapter(str(folder / _LORA))
    ir.save(model, folder / "model.onnx")
