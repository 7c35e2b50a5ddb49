"""The command `train`: parse, call, print. No logic lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_output import JsonOption, OutputOption, given_path, show


def train_command(
    base: Annotated[str, typer.Argument(help="Base model: a local folder, or a name on the hub.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            parser=given_path,
            metavar="FILE|FOLDER",
            help="JSON Lines with prompt, answer and task (default: the file's name); or a folder of them. May be "
            "given again.",
        ),
    ],
    output: OutputOption,
    family: Annotated[str, typer.Option(help="teamlora, hydralora, moelora or lora.")] = "teamlora",
    rank: Annotated[
        int, typer.Option(help="r. Of teamlora and moelora of all experts together; of hydralora of A and of each B.")
    ] = 8,
    experts: Annotated[int, typer.Option(help="k. Of lora there are none.")] = 4,
    alpha: Annotated[
        float | None, typer.Option(help="Of the scaling. Default: twice what it is divided by, so that it is 2.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Endings of module names, with commas; or one regular expression. Default: every linear layer of the "
            "model's body.",
        ),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Of what the experts read, while training.")] = 0.0,
    steps: Annotated[int | None, typer.Option(help="How long. Default: 3 epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="The same, in passes over the rows.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at once, in each process.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches of one step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Steps until then; below 1: a share of all steps.")] = 0.05,
    schedule: Annotated[str, typer.Option(help="After that: cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    clip: Annotated[float, typer.Option(help="The largest norm of the gradients; 0: any.")] = 1.0,
    balance_weight: Annotated[
        float | None, typer.Option(help="Of the loss of unequally used experts. Default: 0.05 for teamlora, else 0.")
    ] = None,
    overconfidence_weight: Annotated[
        float, typer.Option(help="Of the loss of experts with more than 1.5 times an equal share of a token.")
    ] = 0.0,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|FOLDER|SHARE",
            help="Held-out rows, or the share of the rows to hold out. The adapter of the lowest held-out loss stays.",
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations. Default: a tenth of all.")
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Stop after so many evaluations without a lower held-out loss; 0: never.")
    ] = 3,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: as --evaluate-every.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines. Default: a fiftieth of all.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the adapter's start, the rows' order, dropout and the held-out share.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="fp32 or bf16: of the frozen base. The adapter is trained in fp32.")
    ] = "fp32",
    save_dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16: of the adapter's file.")] = "fp32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory: activations are computed again.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a row. Default: 2,048, or what the model takes.")
    ] = None,
    too_long: Annotated[
        str, typer.Option(help="Longer rows: error, cut (the prompt loses its beginning), or skip.")
    ] = "error",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's own chat template.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed training of the same -o stopped.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train an adapter on a base model; several GPUs by torchrun or accelerate launch."""
    from teamlora_export.train.options import TrainOptions, parse_targets, parse_validation

    options = TrainOptions(
        base=base,
        data=tuple(data),
        output=output,
        family=family,
        rank=rank,
        experts=experts,
        alpha=alpha,
        targets=parse_targets(targets or ()),
        dropout=dropout,
        steps=steps,
        epochs=epochs,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        clip=clip,
        balance_weight=balance_weight,
        overconfidence_weight=overconfidence_weight,
        validation=parse_validation(validation or ()),
        evaluate_every=evaluate_every,
        patience=patience,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
        dtype=dtype,
        save_dtype=save_dtype,
        gradient_checkpointing=gradient_checkpointing,
        max_length=max_length,
        too_long=too_long,
        chat=chat,
        resume=resume,
    )
    options.check()
    from teamlora_export.train import train
    from teamlora_export.train.card import record_fields, summary

    result = train(options)
    if result.is_first:
        show(summary(result), {"adapter": result.folder, **record_fields(result, options)}, json)
