"""A training from end to end: rows, base, adapter, loop, figures, files.

Everything that can be wrong with the input is found before the base's weights are loaded. What takes long can be
killed: checkpoints lie beside the output (`checkpoint.py`), and the output takes its place whole, at the end.

Under `torchrun` or `accelerate launch` each process runs this: the first one alone decides, writes and prints.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teamlora_export import __version__, interrupt
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.progress import Reporter
from teamlora_export.staging import refuse_foreign, staged
from teamlora_export.train.card import TrainResult, listed, trained_record, use_by_layer, use_by_task, write_result
from teamlora_export.train.data import read_rows
from teamlora_export.train.encode import Encoded
from teamlora_export.train.material import Material, read_material
from teamlora_export.train.options import TrainOptions

if TYPE_CHECKING:
    from teamlora_export.adapter import AdapterSpec
    from teamlora_export.model.base import BaseModel
    from teamlora_export.train.callbacks import Timed
    from teamlora_export.train.checkpoint import Session
    from teamlora_export.train.trainer import AdapterTrainer

_LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers")
# Of each task, to measure the use of experts where nothing is held out.
_MEASURED_ROWS = 32
# To see before the training whether each layer is called on each token.
_TRIED_ROWS = 2
_EVALUATIONS, _LOGS = 10, 50


def train(options: TrainOptions, reporter: Reporter | None = None) -> TrainResult:
    """Train an adapter and write it to `options.output`.

    Raises:
        ExportError: the options, the data or the base are not what they should be, the training diverged, or what was
            begun before was begun with other options.
    """
    options.check()
    _refuse_launchers_wishes()
    first = int(os.environ.get("RANK", "0")) == 0
    reporter = reporter or Reporter(quiet=not first)
    read = read_rows(options.data)
    held_out = read_rows(options.validation_paths) if options.validation_paths else None

    from teamlora_export.model.base import open_base

    base = open_base(options.base, "text-generation")
    with _companions(base) as folder:
        material = read_material(options, read, held_out, folder, reporter)
    return _train(options, base, material, reporter)


def count_parameters(options: TrainOptions) -> int:
    """How many numbers such a training would train; neither data nor weights are read.

    Raises:
        ExportError: the options or the base are not what they should be.
    """
    options.check()
    from teamlora_export.model.base import open_base
    from teamlora_export.train.model import trained_parameters

    return trained_parameters(open_base(options.base, "text-generation").signature, options)


@contextmanager
def _companions(base: BaseModel) -> Iterator[Path]:
    """The folder with the base's tokenizer."""
    if base.source.gguf_file is None:
        yield base.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        base.save_companions(Path(folder))
        yield Path(folder)


def _refuse_launchers_wishes() -> None:
    """`accelerate launch` hands on its own, which would change every product, and be told nowhere."""
    for name, option, instead in (
        ("ACCELERATE_MIXED_PRECISION", "--mixed_precision", " --dtype bf16 has the base in 16 bits."),
        ("ACCELERATE_DYNAMO_BACKEND", "--dynamo_backend", ""),
    ):
        kind = os.environ.get(name, "no").lower()
        if kind not in ("", "no"):
            raise ExportError(f"{name} is {kind:.20}: not supported. Launch with {option} no.{instead}")


def _train(options: TrainOptions, base: BaseModel, material: Material, reporter: Reporter) -> TrainResult:
    import torch

    from teamlora_export.model.checkpoint import missing_text
    from teamlora_export.model.inject import extract
    from teamlora_export.model.source import weights_sha256
    from teamlora_export.origin import warn_of_normalizers
    from teamlora_export.train import checkpoint
    from teamlora_export.train.model import adapt, start_adapter

    adapter, asked = start_adapter(base.signature, options), options
    options = dataclasses.replace(options, targets=adapter.config.target_modules)
    arguments = _arguments(options, len(material.rows))
    for doubt in options.doubts(arguments.max_steps):
        reporter.warn(doubt)
    hashes = {**material.hashes, **base.source.identity(), **weights_sha256(base.source)}
    session = checkpoint.Session(options.outcome(), hashes, arguments.world_size, _versions())
    work = checkpoint.work_folder(options.output)
    with ExitStack() as alone:
        inputs = [base.folder, *options.data, *options.validation_paths]
        resumed = _shared(arguments, lambda: _begin(options, work, inputs, session, reporter, alone))
        if arguments.process_index == 0:
            alone.enter_context(checkpoint.left_as_useful(work))
        with reporter.step(f"Loading {base.name}"):
            model, missing = base.load_and_miss(getattr(torch, DTYPES[options.dtype].torch))
        raise_findings(f"The weights of {base.name}", [missing_text(name) for name in sorted(missing)])
        layers = adapt(model, adapter, options)
        trainer, timed = _run(model, arguments, layers, material, options, work, resumed, reporter)
        found = extract(model, adapter)
        _refuse_not_finite(found, options)
        trainer.round_adapter(getattr(torch, DTYPES[options.save_dtype].torch))
        result = _result(trainer, timed, material, session)
        warn_of_normalizers(found, reporter)
        if result.is_first:
            with checkpoint.goes_on(work), staged(options.output, listed, inputs) as staging:
                write_result(staging, found, result, asked)
            checkpoint.finish(work)
        trainer.accelerator.wait_for_everyone()
    return result


def _arguments(options: TrainOptions, rows: int) -> Any:
    """The Trainer's own, which also joins the other processes."""
    import torch
    from transformers import TrainingArguments
    from transformers.utils import logging

    from teamlora_export.train.checkpoint import work_folder

    logging.set_verbosity_error()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps_an_epoch = math.ceil(math.ceil(rows / (options.batch * world)) / options.accumulate)
    epochs = 3.0 if options.epochs is None else options.epochs
    steps = options.steps or math.ceil(epochs * steps_an_epoch)
    evaluate_every = options.evaluate_every or max(1, math.ceil(steps / _EVALUATIONS))
    arguments = TrainingArguments(
        str(work_folder(options.output)),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        average_tokens_across_devices=True,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        warmup_steps=options.warmup,
        optim="adamw_torch",
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        logging_steps=options.log_every or max(1, steps // _LOGS),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if options.validation is not None else "no",
        eval_steps=evaluate_every,
        save_strategy="steps",
        save_steps=options.save_every or evaluate_every,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=options.seed,
        data_seed=options.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        # Several processes on CPUs find one another only so.
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    # Several GPUs in one process would each have a copy of the layers, whose routing is not seen.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _begin(
    options: TrainOptions, work: Path, inputs: Sequence[Path], session: Session, reporter: Reporter, alone: ExitStack
) -> Path | None:
    """Look at what is there, and write down what begins; the checkpoint to go on from.

    Args:
        alone: nobody else trains there until it ends.
    """
    from teamlora_export.train import checkpoint

    place = work.with_name(work.name.removesuffix(".training"))
    refuse_foreign(place, listed, inputs)
    found, was_begun, record = None, checkpoint.was_begun(work), trained_record(place)
    if was_begun:
        alone.enter_context(checkpoint.alone(work))
        found = checkpoint.last_checkpoint(work)
        if (
            record is not None
            and record.is_of(session.sha256, options)
            and checkpoint.has_ended(work, session, record.steps)
        ):
            checkpoint.finish(work)
            reporter.say(f"The training of {options.output} had ended; what it left beside it is cleared up.")
            found, was_begun = None, False
    if found is not None and not options.resume:
        raise ExportError(
            f"{work}: a training of {options.output} was left unfinished. Go on with --resume, or remove that folder."
        )
    if found is not None:
        if changed := checkpoint.refuse_other(work, session):
            reporter.warn(f"Begun with {', '.join(changed)}: it goes on, though not to the bit.")
        reporter.say(f"Going on from {found.name}.")
        return found
    if options.resume and not was_begun and record is not None:
        raise ExportError(f"{options.output}: its training has ended. Leave --resume out to train it anew.")
    if options.resume:
        reporter.say(f"No training of {options.output} was left unfinished: it begins.")
    alone.enter_context(checkpoint.begin(work, session, again=was_begun))
    return None


def _shared(arguments: Any, decide: Any) -> Any:
    """What the first process decides, in all of them; what it refuses, all refuse."""
    if arguments.world_size == 1:
        return decide()
    import torch

    answer: list[Any] = [None, None]
    if arguments.process_index == 0:
        try:
            answer = [decide(), None]
        except ExportError as error:
            answer = [None, str(error)]
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise ExportError(answer[1])
    return answer[0]


def _run(
    model: Any,
    arguments: Any,
    layers: Any,
    material: Material,
    options: TrainOptions,
    work: Path,
    resumed: Path | None,
    reporter: Reporter,
) -> tuple[AdapterTrainer, Timed]:
    """Train to the end; `model` has the adapter that is to be written."""
    import torch

    from teamlora_export.train.callbacks import Stopped, Timed, Told
    from teamlora_export.train.checkpoint import read_checkpoint
    from teamlora_export.train.encode import collator
    from teamlora_export.train.trainer import AdapterTrainer

    timed = Timed()
    told, stopped = Told(reporter, timed), Stopped()
    trainer = AdapterTrainer(
        model,
        arguments,
        layers,
        material.rows,
        material.held_out,
        material.tasks,
        collator(material.encoder.padding),
        options,
        work,
        read_checkpoint(resumed) if resumed is not None else None,
        [timed, told, stopped],
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ExportError("FSDP and DeepSpeed: not supported. Launch the processes without them (data parallelism).")
    if torch.cuda.device_count() > 1 and arguments.world_size == 1:
        reporter.warn(f"One of {torch.cuda.device_count()} GPUs is used. Launch with torchrun to use them all.")
    reporter.say(f"{options.family}: {trainer.num_trained:,} trained parameters on {len(layers):,} layers")
    try:
        with interrupt.held():
            trainer.try_on(sorted(material.rows, key=lambda row: len(row.ids))[:_TRIED_ROWS])
            _loop(trainer, resumed)
    finally:
        told.stop()
    if stopped.stopped:
        # Another process was interrupted.
        raise interrupt.Interrupted
    trainer.take_best()
    return trainer, timed


def _loop(trainer: AdapterTrainer, resumed: Path | None) -> None:
    """From the beginning or from a checkpoint to the end; a training that had ended already is only taken up."""
    if resumed is None:
        if trainer.held_out:
            trainer.standing.before = trainer.measure(trainer.held_out).by_task(trainer.tasks)
        trainer.train()
        return
    from transformers import TrainerState

    from teamlora_export.train.callbacks import Logged
    from teamlora_export.train.checkpoint import TRAINER_STATE_NAME

    path = resumed / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(path))
    except TypeError as error:
        raise ExportError(f"{path}: {error}. Remove {resumed.parent}, and train again.") from None
    trainer.catch_up(state)
    if state.global_step < trainer.args.max_steps and not trainer.standing.stopped:
        trainer.add_callback(Logged(state.log_history, trainer.take_up_sums))
        trainer.train(resume_from_checkpoint=str(resumed))
    else:
        trainer.log_end()


def _result(trainer: AdapterTrainer, timed: Timed, material: Material, session: Session) -> TrainResult:
    log = trainer.state.log_history
    steps, held_out = trainer.state.global_step, bool(material.held_out)
    found = trainer.measure(material.held_out or _some_of_each(material.rows))
    return TrainResult(
        folder=trainer.options.output,
        family=trainer.options.family,
        steps=steps,
        best_step=trainer.standing.best_step if held_out else steps,
        stopped_early=trainer.standing.stopped,
        trained_parameters=trainer.num_trained,
        seconds_per_step=statistics.median(timed.seconds[1:] or timed.seconds or [math.nan]),
        losses=[(int(entry["step"]), entry["loss"]) for entry in log if "loss" in entry],
        rows=len(material.rows),
        held_out_rows=len(material.held_out),
        held_out_before=trainer.standing.before,
        held_out=found.by_task(material.tasks) if held_out else {},
        held_out_loss=found.loss if held_out else None,
        balance_loss=found.balance(),
        expert_use=use_by_task(found, material.tasks),
        layer_use=use_by_layer(found, list(trainer.layers)),
        versions=session.versions,
        hashes=session.hashes,
        session=session.sha256,
        used=_used(trainer.options, material),
        rows_cut=material.lengths.cut,
        rows_skipped=material.lengths.skipped,
        log=log,
        is_first=trainer.is_world_process_zero(),
    )


def _used(options: TrainOptions, material: Material) -> dict[str, Any]:
    return {
        "alpha": options.used_alpha,
        "balance_weight": options.used_balance_weight,
        "experts": options.num_experts,
        "targets": list(options.targets) if isinstance(options.targets, tuple) else options.targets,
        "max_length": material.lengths.most,
    }


def _refuse_not_finite(adapter: AdapterSpec, options: TrainOptions) -> None:
    """Of an adapter as it is written."""
    import numpy as np
    import torch

    from teamlora_export.train.checkpoint import work_folder

    largest = torch.finfo(getattr(torch, DTYPES[options.save_dtype].torch)).max
    for path, projection in adapter.projections.items():
        for array in (projection.down, projection.router, projection.interaction, *projection.ups):
            if not np.isfinite(array).all():
                raise ExportError(
                    f"{path}: its trained numbers are not finite: the training diverged. Lower --learning-rate, and "
                    f"remove {work_folder(options.output)}."
                )
            if np.abs(array).max() > largest:
                raise ExportError(
                    f"{path}: its trained numbers, up to {np.abs(array).max():.3g}, do not fit into --save-dtype "
                    f"{options.save_dtype}. Give the same again with --resume --save-dtype fp32, to write it."
                )


def _some_of_each(rows: Sequence[Encoded]) -> list[Encoded]:
    taken: dict[int, list[Encoded]] = {}
    for row in rows:
        of_task = taken.setdefault(row.task, [])
        if len(of_task) < _MEASURED_ROWS:
            of_task.append(row)
    return [row for of_task in taken.values() for row in of_task]


def _versions() -> dict[str, str]:
    """Of what computes; sums are in another order with other threads."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"teamlora-export": __version__, **versions, "threads": str(torch.get_num_threads())}
