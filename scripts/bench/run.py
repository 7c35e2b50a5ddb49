"""SmolLM2-135M with random adapters on all its projections, in every way that we know to run it, in strict turns.

    python scripts/bench/run.py                              everything; the first run traces for half an hour
    python scripts/bench/run.py --rows bypassed TeamLoRA     only rows whose names hold one of these
    python scripts/bench/run.py --skip compiled              torch.compile takes minutes at each length
    python scripts/bench/run.py --baseline "genai, un-adapted"
    python scripts/bench/run.py --neighbour                  beside another process that keeps one core busy

Times, ratios, noise, load time, memory and files are those of `teamlora-export bench`, which measures one bundle.
Graphs that other tools make, and layers that are traced as they are, are kept in the user's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from method.command import run as run_command
from neighbours import neighbours
from other_rows import GenaiRow, OptimumRow, genai_graph, genai_int4_graph, genai_lora_graph, optimum_graph
from rich.console import Console
from traced import Layer, MoeLora, PlainLora, TeamLora, random_projections, traced_graph

from teamlora_export.adapter import AdapterConfig, read_adapter, write_adapter
from teamlora_export.adapter.spec import ExpertProjection
from teamlora_export.attach.run import attach
from teamlora_export.bench.floor import Work
from teamlora_export.bench.graphs import Graphs, written_graphs
from teamlora_export.bench.measure import measure
from teamlora_export.bench.plot import require_matplotlib, write_plot
from teamlora_export.bench.report import benchmark_fields, print_benchmark, write_html
from teamlora_export.bench.rows import GraphRow, Row, TorchRow
from teamlora_export.bench.turns import Workload
from teamlora_export.cli_output import write_json
from teamlora_export.deploy.cores import usable_cores
from teamlora_export.deploy.genai import deploy_genai
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.export import export_onnx
from teamlora_export.manifest import MANIFEST_NAME
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.progress import Reporter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
from get_model import get_model  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = 4
VOCABULARY = 49_152
BYPASSED, GENAI_INT4 = "experts bypassed", "genai int4, un-adapted"


def main() -> None:
    given = _arguments()
    if given.plot is not None:
        require_matplotlib()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        entries = _entries(Path(folder), stack, given.ranks, given.threads)
        chosen = [name for name in entries if name == given.baseline or _is_wanted(name, given.rows, given.skip)]
        if given.baseline not in chosen:
            raise SystemExit(f"--baseline: none of {', '.join(entries)}.")
        rows = [entries[name].make() for name in chosen]
        workloads = [Workload(batch, length, given.count) for batch in given.batch for length in given.lengths]
        with neighbours(int(given.neighbour)):
            benchmark = measure(
                rows,
                given.baseline,
                workloads,
                given.turns,
                vocabulary=VOCABULARY,
                threads=given.threads,
                works={name: entries[name].work for name in chosen},
                memory=given.memory,
                reporter=Reporter(),
            )
    name = "SmolLM2-135M" + (", beside a busy process" if given.neighbour else "")
    print_benchmark(benchmark, name, Console(width=132))
    if given.report is not None:
        write_html(benchmark, name, given.report)
    if given.plot is not None:
        write_plot(benchmark, name, given.plot)
    write_json(benchmark_fields(benchmark, name), given.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], help=f"r of all {EXPERTS} experts together")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1500], help="tokens of a prompt")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], help="prompts at once; each row holds its own cache"
    )
    parser.add_argument("--count", type=int, default=32, help="tokens that are timed after each prompt")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every row")
    parser.add_argument("--rows", nargs="+", help="only rows whose names hold one of these")
    parser.add_argument("--skip", nargs="+", default=[], help="no rows whose names hold one of these")
    parser.add_argument("--baseline", default=BYPASSED, help="the row that ratios are over")
    parser.add_argument("--neighbour", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="and load time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, help="an HTML page")
    parser.add_argument("--plot", type=Path, help="a PNG")
    return parser.parse_args()


def _is_wanted(name: str, wanted: list[str] | None, unwanted: list[str]) -> bool:
    return (not wanted or any(part in name for part in wanted)) and not any(part in name for part in unwanted)


@dataclass(frozen=True)
class Entry:
    """What makes a row, which may take minutes the first time, and what it has to do."""

    make: Callable[[], Row]
    work: Work


def _entries(folder: Path, stack: ExitStack, ranks: list[int], threads: int) -> dict[str, Entry]:
    """Every row by its name."""
    base = open_base(str(get_model("smollm2")))
    library = find_library(None, Reporter()).path
    entries: dict[str, Entry] = {}
    for rank in ranks:
        adapter = folder / f"adapter-{rank}"
        write_adapter(new_adapter(base.signature, _config(rank, EXPERTS), seed=0, spread=0.02), adapter)
        in_place = _graphs(base, adapter, folder / f"r{rank}", "in-place", stack)
        growing = _graphs(base, adapter, folder / f"r{rank}-growing", "growing", stack)
        quantised = _graphs(base, adapter, folder / f"r{rank}-int4", "in-place", stack, "int4")
        work, without = in_place.adapted_work, in_place.bypassed_work
        entries.setdefault(BYPASSED, Entry(partial(GraphRow, BYPASSED, in_place.bypassed, None, threads), without))
        for name, graphs, native in (
            (f"TeamLoRA r={rank}, body", in_place, None),
            (f"TeamLoRA r={rank}, native op", in_place, library),
            (f"TeamLoRA r={rank}, growing, body", growing, None),
            (f"TeamLoRA r={rank}, growing, native op", growing, library),
        ):
            entries[name] = Entry(partial(GraphRow, name, graphs.adapted, native, threads), work)
        for name, native in (
            (f"TeamLoRA r={rank}, int4, body", None),
            (f"TeamLoRA r={rank}, int4, native op", library),
        ):
            entries[name] = Entry(partial(GraphRow, name, quantised.adapted, native, threads), quantised.adapted_work)
        entries.setdefault(GENAI_INT4, Entry(partial(_genai_int4, base.folder, threads), quantised.bypassed_work))
        for name, native, dtype in (
            (f"genai int4, TeamLoRA r={rank} attached, body", None, None),
            (f"genai int4, TeamLoRA r={rank} attached, native op", library, None),
            (f"genai int4, TeamLoRA r={rank} in fp16 attached, body", None, "fp16"),
            (f"genai int4, TeamLoRA r={rank} in fp16 attached, native op", library, "fp16"),
        ):
            made = folder / name.replace(" ", "-")
            attached = partial(_genai_attached, name, base.folder, adapter, made, native, dtype, threads)
            bytes_saved = _matrix_bytes(adapter) // 2 if dtype else 0
            work = dataclasses.replace(quantised.adapted_work, bytes=quantised.adapted_work.bytes - bytes_saved)
            entries[name] = Entry(attached, work)
        for name, compiled in ((f"TeamLoRA r={rank}, PyTorch", False), (f"TeamLoRA r={rank}, PyTorch, compiled", True)):
            row = partial(TorchRow, name, base.name, str(adapter), base.task, "fp32", threads, compiled)
            entries[name] = Entry(row, work)
        entries |= _traced_entries(base, growing, rank, threads)
    return entries | _other_entries(base, without, quantised.bypassed_work, ranks, threads)


def _traced_entries(base: BaseModel, ours: Graphs, rank: int, threads: int) -> dict[str, Entry]:
    """The published layers, traced as they are; and the base, traced in the same way."""
    without = ours.bypassed_work
    experts = random_projections(base, _config(rank, EXPERTS))
    plain = random_projections(base, _config(rank, 1))
    kinds = (
        ("base, traced as it is", "traced-base", {}, None, without),
        (f"TeamLoRA r={rank}, traced as it is", f"traced-teamlora{rank}", experts, TeamLora, ours.adapted_work),
        (f"MoELoRA r={rank}, traced as it is", f"traced-moelora{rank}", experts, MoeLora, ours.adapted_work),
        (f"LoRA r={rank}, traced as it is", f"traced-lora{rank}", plain, PlainLora, _with_lora(without, plain)),
    )

    def make(name: str, kept: str, projections: Mapping[str, ExpertProjection], layer: Layer | None) -> Row:
        folder = traced_graph(kept, base, projections, layer)
        # What the runner knows of the model's tokens.
        shutil.copyfile(ours.adapted / MANIFEST_NAME, folder / MANIFEST_NAME)
        return GraphRow(name, folder, None, threads)

    return {name: Entry(partial(make, name, *kept), work) for name, *kept, work in kinds}


def _other_entries(
    base: BaseModel, without: Work, without_int4: Work, ranks: list[int], threads: int
) -> dict[str, Entry]:
    """Other tools, with the base's own graph and, where they have one, a LoRA of their own."""
    folder = base.folder
    names = {"genai, un-adapted": threads, "genai, un-adapted, its threads": 0}
    entries = {
        name: Entry(lambda name=name, used=used: GenaiRow(name, genai_graph(folder), used), without)
        for name, used in names.items()
    }

    def lora(name: str, rank: int, plain: Mapping[str, ExpertProjection], precision: str) -> Row:
        return GenaiRow(name, genai_lora_graph(folder, rank, plain, precision), threads)

    for rank in ranks:
        plain = random_projections(base, _config(rank, 1))
        for name, precision, work in (
            (f"genai, LoRA r={rank}", "fp32", without),
            (f"genai int4, LoRA r={rank}", "int4", without_int4),
        ):
            entries[name] = Entry(partial(lora, name, rank, plain, precision), _with_lora(work, plain))
    name = "optimum, un-adapted"
    return {**entries, name: Entry(lambda: OptimumRow(name, optimum_graph(folder), threads), without)}


def _with_lora(without: Work, projections: Mapping[str, ExpertProjection]) -> Work:
    added = sum(p.down.size + sum(up.size for up in p.ups) for p in projections.values())
    return Work(without.bytes + 4 * added, without.each + added, without.last)


def _genai_int4(folder: Path, threads: int) -> Row:
    return GenaiRow(GENAI_INT4, genai_int4_graph(folder), threads)


def _matrix_bytes(adapter: Path) -> int:
    """Of `down` and `up` in float32."""
    projections = read_adapter(adapter).projections.values()
    return sum(4 * (p.down.size + p.router.size + sum(up.size for up in p.ups)) for p in projections)


def _genai_attached(
    name: str, base: Path, adapter: Path, folder: Path, library: Path | None, dtype: str | None, threads: int
) -> Row:
    bundle = attach(genai_int4_graph(base), adapter, folder / "bundle", adapter_dtype=dtype)
    return GenaiRow(name, deploy_genai(bundle, folder / "deployed", library), threads)


def _graphs(
    base: BaseModel, adapter: Path, bundle: Path, cache: str, stack: ExitStack, weights: str | None = None
) -> Graphs:
    made = export_onnx(base.name, adapter, bundle, cache=cache, weights_form=weights, head_form=weights)
    return stack.enter_context(written_graphs(made))


def _config(rank: int, experts: int) -> AdapterConfig:
    return AdapterConfig(r=rank, lora_alpha=16.0, lora_nums=experts, target_modules=TARGETS)


if __name__ == "__main__":
    run_command(main)
