"""The commands that make a bundle, `onnx` and `attach`: parse, call, print. No logic lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_adapters import adapters_given, names_given
from teamlora_export.cli_output import (
    AdapterDtypeOption,
    AdapterOption,
    AnyBaseOption,
    JsonOption,
    OutputOption,
    given_path,
    show,
)


def onnx_command(
    base: Annotated[str, typer.Argument(help="Base model: a local folder, or a name on the hub.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            "-a",
            metavar="[NAME=]FOLDER",
            help="Folder of the trained adapter. With a name, or given again: a shelf, one of which each row takes.",
        ),
    ],
    output: OutputOption,
    slots: Annotated[
        int | None, typer.Option(help="Of a shelf: how many adapters programs hold in memory. Default: 8 at least.")
    ] = None,
    slot_rank: Annotated[
        int | None,
        typer.Option(
            help="Of a shelf: room for later adapters of up to this r. Give k times r for families whose r is of each "
            "expert (MoELoRA; HydraLoRA and CoMoL beside others). Default: what the given ones need together."
        ),
    ] = None,
    slot_experts: Annotated[
        int | None, typer.Option(help="Of a shelf: room for later adapters of up to so many experts.")
    ] = None,
    slot_targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Of a shelf: modules that later adapters may change as well, endings with commas."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    task: Annotated[
        str,
        typer.Option(help="auto, text-generation, feature-extraction, sentence-embedding or text-classification."),
    ] = "auto",
    op: Annotated[
        str, typer.Option("--op", help="function: keep the op and its body; standard: inline the body.")
    ] = "function",
    cache: Annotated[
        str, typer.Option(help="The KV cache: growing, or in-place (one buffer a layer, for runtimes with opset 24).")
    ] = "growing",
    weights: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4: the base's linear weights as codes (MatMulNBits, blocks of 32). Default: --dtype."
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="With --weights, int8 or int4: the head as well. Default: --dtype.")
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="With --weights: each block of codes has a zero point.")
    ] = False,
    adapter_dtype: AdapterDtypeOption = None,
    any_base: AnyBaseOption = False,
    retrace: Annotated[
        bool, typer.Option("--retrace", help="Trace the graph even where one is kept from an earlier export.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Export a base model with an adapter to a bundle with one ONNX graph."""
    from teamlora_export.export import export_onnx

    has_slots = bool(slot_targets) or any(number is not None for number in (slots, slot_rank, slot_experts))
    bundle = export_onnx(
        base,
        adapters_given(adapter, is_shelf=has_slots),
        output,
        slots=slots,
        slot_rank=slot_rank,
        slot_experts=slot_experts,
        slot_targets=names_given(slot_targets or ()),
        dtype=dtype,
        task=task,
        op_form=op,
        cache=cache,
        weights_form=weights,
        head_form=head,
        zero_points=zero_points,
        adapter_dtype=adapter_dtype,
        retrace=retrace,
        any_base=any_base,
    )
    made = bundle.manifest
    shelf = made.shelf["adapters"] if made.shelf is not None else {}
    adapters = f", adapters for {made.shelf['slots']} slots: {', '.join(shelf)}" if made.shelf is not None else ""
    codes = f" with weights of {made.quantisation['bits']} bits" if made.quantisation else ""
    fields = {
        "bundle": bundle.folder,
        "task": made.task,
        "dtype": made.dtype,
        "quantisation": made.quantisation,
        "op": made.op,
        "shelf": made.shelf,
        "sha256": made.sha256,
    }
    show(f"{bundle.folder}: {made.task}, {made.dtype}{codes}, {made.op['nodes']} expert nodes{adapters}", fields, json)


def attach_command(
    base: Annotated[
        Path,
        typer.Argument(
            parser=given_path,
            metavar="ONNX|FOLDER",
            help="A graph that another tool made, or the folder that it is in.",
        ),
    ],
    adapter: AdapterOption,
    output: OutputOption,
    source: Annotated[
        str | None,
        typer.Option("--base", help="The model that the graph was made of: its weights then prove each module."),
    ] = None,
    adapter_dtype: AdapterDtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Attach an adapter to a graph that was exported or quantised elsewhere."""
    from teamlora_export.attach.run import attach as attach_adapter

    bundle = attach_adapter(base, adapter, output, base_source=source, adapter_dtype=adapter_dtype)
    made = bundle.manifest
    show(
        f"{bundle.folder}: {made.task}, {made.dtype}, {made.op['nodes']} expert nodes",
        {
            "bundle": bundle.folder,
            "task": made.task,
            "dtype": made.dtype,
            "op": made.op,
            "sha256": made.sha256,
            "attached": made.attached,
        },
        json,
    )
