"""The commands that try a bundle, `generate` and `embed`: parse, call, print. No logic lives here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_output import NativeLibraryOption, given_path, native_library, say, say_answer
from teamlora_export.errors import ExportError

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or cuda:1 and so on, with onnxruntime-gpu.")]


def generate_command(
    bundle: Annotated[Path, typer.Argument(parser=given_path, metavar="BUNDLE", help="Folder of the bundle.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One is streamed; several make a batch.")],
    tokens: Annotated[int, typer.Option(min=1, help="Generate at most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token, always; above: drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that are so likely together.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Of tokens that are there already; 1: none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same one draws the same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this; may be given again.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Of the shelf: what answers; give it again for each prompt's own, - for none."
        ),
    ] = None,
    library: NativeLibraryOption = None,
    device: DeviceOption = "cpu",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the files with their hashes.")] = True,
) -> None:
    """Try a bundle: text in ONNX Runtime, greedy by default, with the tokens a second at the end."""
    from teamlora_export.attach.interface import refuse_window_caches
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.runner import Model, Sampling, answer

    native = native_library(library)
    refuse_window_caches(bundle)
    try:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed=seed)
        model = Model(bundle, native, check, device=device)
        written = [prompt.replace("\\n", "\n") for prompt in prompts]
        count, seconds = answer(model, written, tokens, say_answer, sampling, stop or (), adapter or ())
    except ModelError as error:
        raise ExportError(str(error)) from None
    print(f"({count} tokens, {count / seconds:.1f} a second)", file=sys.stderr)


def embed_command(
    bundle: Annotated[Path, typer.Argument(parser=given_path, metavar="BUNDLE", help="Folder of the bundle.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Of the shelf: what reads them; give it again for each text's own, - for none."
        ),
    ] = None,
    library: NativeLibraryOption = None,
    device: DeviceOption = "cpu",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the files with their hashes.")] = True,
) -> None:
    """Try a bundle that does not generate text: a line of JSON for each text, with its vector or scores."""
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.runner import Model, encode_text, shared_adapters

    native = native_library(library)
    try:
        model = Model(bundle, native, check, device=device)
        ids = [encode_text(model.tokenizer, text) for text in texts]
        rows = model.encode(ids, shared_adapters(adapter or (), len(ids)))
    except ModelError as error:
        raise ExportError(str(error)) from None
    for row in rows:
        say(str(row.astype(float).tolist()))
