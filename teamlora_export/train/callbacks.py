"""What a person sees of a training, how long its steps take, and how an interruption ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from teamlora_export import interrupt
from teamlora_export.progress import Reporter


class Timed(TrainerCallback):
    """`seconds`: of each step of this run, forward to optimiser; neither evaluations nor checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)


class Told(TrainerCallback):
    """A bar on a terminal, and a line for each log and evaluation everywhere."""

    def __init__(self, reporter: Reporter, timed: Timed) -> None:
        self._reporter, self._timed = reporter, timed
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        console = self._reporter.console
        if console.is_terminal and not console.quiet:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        step = f"step {state.global_step:,} of {state.max_steps:,}"
        if "loss" in logs:
            balance = f", balance loss {logs['balance_loss']:.4f}" if "balance_loss" in logs else ""
            recent = self._timed.seconds[-10:]
            took = f", {sum(recent) / len(recent):.2f} s a step" if recent else ""
            self._reporter.say(f"{step}: loss {logs['loss']:.4f}{balance}{took}")
        elif "eval_loss" in logs:
            self._reporter.say(f"{step}: held-out loss {logs['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Logged(TrainerCallback):
    """What was logged between a checkpoint and going on from it.

    Args:
        take_up_sums: of what is logged next, which the Trainer has set to 0 by then.
    """

    def __init__(self, log: Sequence[dict[str, Any]], take_up_sums: Callable[[], None]) -> None:
        self._log, self._take_up_sums = list(log), take_up_sums

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history = self._log
        # The Trainer has taken the intervals of the checkpoint in place of those that are asked for now.
        state.compute_steps(args, state.max_steps)
        self._take_up_sums()


class Stopped(TrainerCallback):
    """An interruption ends the training after the step that it fell into, with a checkpoint; all processes together."""

    def __init__(self) -> None:
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._arrived(args):
            self.stopped = control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            # The last adapter is judged and kept, too.
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True

    def _arrived(self, args: Any) -> bool:
        arrived = interrupt.arrived()
        if args.world_size > 1:
            told = torch.tensor([int(arrived)], device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            arrived = bool(told.item())
        return arrived
