"""What a training is asked to do: every option, its default, and what it may be. Free of torch."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teamlora_export.adapter.config import AdapterConfig
from teamlora_export.adapter.families import FAMILIES
from teamlora_export.adapter.patterns import why_no_pattern
from teamlora_export.errors import ExportError

FAMILY_NAMES = tuple(family.name for family in FAMILIES if family.leaves is not None)
SCHEDULES = ("cosine", "linear", "constant")
TOO_LONG = ("error", "cut", "skip")
IMPLEMENTATIONS = ("packed", "published")
BASE_DTYPES = ("fp32", "bf16")
SAVED_DTYPES = ("fp32", "fp16", "bf16")
ALL_LINEAR = "all-linear"
# Of the balance loss, for TeamLoRA. Of the other families' published code HydraLoRA's has one, off by default.
_BALANCE_WEIGHT = 0.05
_PATIENCE = 3
# How a killed training goes on does not depend on these, nor what it trains.
_FREE = ("output", "resume", "save_every", "log_every", "save_dtype")
# Nor on where the files lie, whose contents are compared.
_PLACES = ("base", "data")
_LARGEST = 1_000_000_000


@dataclass(frozen=True)
class TrainOptions:
    """One training.

    Attributes:
        base: a local folder or a hub name. data: JSON Lines files, and folders of them. output: folder of the adapter.
        family: one of `FAMILY_NAMES`.
        rank: `r` of the adapter's configuration: of teamlora and moelora it counts all experts, of hydralora it is the
            rank of the shared A and of each B.
        experts: k; of lora always 1.
        alpha: numerator of the scaling; None: twice the rank that it is divided by, so that the scaling is 2.
        targets: endings of module names, or one regular expression for whole names; "all-linear": every linear layer of
            the model's body.
        dropout: of what the experts read, while training.
        steps, epochs: how long; at most one of them. Default: 3 epochs.
        batch: rows of one forward, in each process. accumulate: forwards of one step.
        learning_rate: at its highest. warmup: steps, or below 1 a share of them, until it is reached. schedule: of the
            way down: cosine, linear, or constant (none).
        clip: the most that the norm of the gradients may be; 0: no limit.
        balance_weight: of the balance loss; None: 0.05 for teamlora, else 0. overconfidence_weight: of the
            overconfidence loss.
        validation: held-out rows: files or a folder, or a share of the training rows; None: none.
        evaluate_every: steps; None: a tenth of all. patience: stop after so many evaluations without a lower held-out
            loss; 0: never. What is written is the adapter of the lowest held-out loss.
        save_every: steps between checkpoints; None: as `evaluate_every`. log_every: steps; None: a fiftieth of all.
        seed: of the start of the adapter, the order of the rows, dropout, and which rows are held out.
        dtype: of the frozen base, fp32 or bf16; the adapter is trained in float32. save_dtype: of the files, which the
            figures of the end are of.
        gradient_checkpointing: compute activations again in place of keeping them.
        max_length: tokens of a row; None: 2,048, or fewer where the model has fewer positions.
        too_long: what becomes of a longer row: error, cut (its prompt loses its beginning), or skip.
        chat: put each prompt into the model's own chat template, as a user's turn.
        resume: go on where a killed training of the same output stopped; begin where there is none.
        implementation: packed: one product for all experts; published: one for each, as the authors' code has it. The
            same function; the latter is there to be timed.
    """

    base: str
    data: tuple[Path, ...]
    output: Path
    family: str = "teamlora"
    rank: int = 8
    experts: int = 4
    alpha: float | None = None
    targets: tuple[str, ...] | str = ALL_LINEAR
    dropout: float = 0.0
    steps: int | None = None
    epochs: float | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    balance_weight: float | None = None
    overconfidence_weight: float = 0.0
    validation: tuple[Path, ...] | float | None = None
    evaluate_every: int | None = None
    patience: int = _PATIENCE
    save_every: int | None = None
    log_every: int | None = None
    seed: int = 0
    dtype: str = "fp32"
    save_dtype: str = "fp32"
    gradient_checkpointing: bool = False
    max_length: int | None = None
    too_long: str = "error"
    chat: bool = False
    resume: bool = False
    implementation: str = "packed"

    def __post_init__(self) -> None:
        """One path, or a list of them, is a tuple of paths.

        Raises:
            ExportError: a path is empty.
        """
        object.__setattr__(self, "data", _paths("data", self.data))
        object.__setattr__(self, "output", Path(self.output))
        if self.validation is not None and not isinstance(self.validation, (int, float)):
            object.__setattr__(self, "validation", _paths("validation", self.validation))
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.targets == (ALL_LINEAR,):
            object.__setattr__(self, "targets", ALL_LINEAR)

    @property
    def num_experts(self) -> int:
        return 1 if self.family == "lora" else self.experts

    @property
    def divisor(self) -> int:
        """What alpha is divided by."""
        return self.rank // self.num_experts if self.family in ("teamlora", "moelora") else self.rank

    @property
    def used_alpha(self) -> float:
        return 2.0 * self.divisor if self.alpha is None else self.alpha

    @property
    def used_balance_weight(self) -> float:
        if self.balance_weight is not None:
            return self.balance_weight
        return _BALANCE_WEIGHT if self.family == "teamlora" else 0.0

    @property
    def held_out_share(self) -> float:
        return self.validation if isinstance(self.validation, float) else 0.0

    @property
    def validation_paths(self) -> tuple[Path, ...]:
        return self.validation if isinstance(self.validation, tuple) else ()

    def config(self, targets: tuple[str, ...] | str) -> AdapterConfig:
        """The adapter's configuration, with `targets` as they were found in the base."""
        return AdapterConfig(
            r=self.rank,
            lora_alpha=self.used_alpha,
            lora_nums=None if self.family == "lora" else self.experts,
            target_modules=targets,
            lora_dropout=self.dropout,
            blc_weight=self.used_balance_weight,
            base_model_name_or_path=self.base,
            task_type="CAUSAL_LM",
        )

    def check(self) -> None:
        """Refuse what cannot be, by the name of the option.

        Raises:
            ExportError: for the first one that cannot be.
        """
        for name, allowed in (
            ("family", FAMILY_NAMES),
            ("schedule", SCHEDULES),
            ("too_long", TOO_LONG),
            ("implementation", IMPLEMENTATIONS),
            ("dtype", BASE_DTYPES),
            ("save_dtype", SAVED_DTYPES),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ExportError(
                    f"{option_name(name)} {value}: unknown. Use {', '.join(allowed[:-1])} or {allowed[-1]}."
                )
        for name, kind, least, most in (
            ("rank", int, 1, 65_536),
            ("experts", int, 1, 1024),
            ("alpha", float, 0, 1e9),
            ("dropout", float, 0, 0.99),
            ("steps", int, 1, _LARGEST),
            ("epochs", float, 1e-6, 1e6),
            ("batch", int, 1, 1 << 20),
            ("accumulate", int, 1, 1 << 20),
            ("learning_rate", float, 0, 1e6),
            ("warmup", float, 0, _LARGEST),
            ("weight_decay", float, 0, 1e3),
            ("clip", float, 0, 1e9),
            ("balance_weight", float, 0, 1e9),
            ("overconfidence_weight", float, 0, 1e9),
            ("evaluate_every", int, 1, _LARGEST),
            ("patience", int, 0, _LARGEST),
            ("save_every", int, 1, _LARGEST),
            ("log_every", int, 1, _LARGEST),
            ("seed", int, 0, 2**32 - 1),
            ("max_length", int, 2, 1 << 24),
        ):
            value = getattr(self, name)
            if value is not None and not _is_between(value, kind, least, most):
                raise ExportError(f"{option_name(name)} {value}: expected {_KINDS[kind]} from {least:g} to {most:g}.")
        self._check_together()

    def _check_together(self) -> None:
        if not self.data:
            raise ExportError("--data: give a JSON Lines file, or a folder of them.")
        if self.steps is not None and self.epochs is not None:
            raise ExportError("--steps and --epochs: both say how long. Give one of them.")
        if self.family in ("teamlora", "moelora") and self.rank % self.experts:
            raise ExportError(
                f"--experts {self.experts}: does not divide --rank {self.rank}, which counts all experts."
            )
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR and (reason := why_no_pattern(self.targets)):
            raise ExportError(f"--targets {self.targets!r:.80}: is not a regular expression ({reason}).")
        if not self.targets or not all(self.targets):
            raise ExportError("--targets is empty. Give names of modules, or leave the option out.")
        if isinstance(self.targets, tuple) and ALL_LINEAR in self.targets:
            raise ExportError(f"--targets {ALL_LINEAR}: has all others in it. Give it alone, or names without it.")
        # No whole number, True among them, lies there.
        if isinstance(self.validation, (int, float)) and not 0 < self.validation < 1:
            raise ExportError(f"--validation {self.validation}: a share of the rows lies between 0 and 1.")
        if self.chat and self.too_long == "cut":
            raise ExportError("--too-long cut: would cut a chat template apart. Use error or skip with --chat.")
        if self.family == "lora" and (self.balance_weight or self.overconfidence_weight):
            raise ExportError("--balance-weight and --overconfidence-weight: are of experts, which lora has not.")

    def doubts(self, steps: int) -> list[str]:
        """What can be, and is hardly meant; a sentence each.

        Args:
            steps: of the whole training.
        """
        found = []
        if self.used_alpha == 0:
            found.append("--alpha 0: the scaling is 0, and the adapter changes nothing.")
        if self.learning_rate == 0:
            found.append("--learning-rate 0: nothing is learned.")
        if self.validation is None and self.evaluate_every is not None:
            found.append("--evaluate-every: nothing is held out (--validation): it is for checkpoints alone.")
        if self.validation is None and self.patience not in (0, _PATIENCE):
            found.append("--patience: nothing is held out (--validation), and nothing stops the training early.")
        # As transformers counts them.
        warmup = int(self.warmup) if self.warmup >= 1 else math.ceil(steps * self.warmup)
        if warmup >= steps:
            found.append(f"--warmup {self.warmup:g}: {warmup:,} of {steps:,} steps: --learning-rate is never reached.")
        return found

    def outcome(self) -> dict[str, Any]:
        """The options that the trained adapter depends on beside the files, of types that JSON has."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in (*_FREE, *_PLACES)}
        fields["validation"] = "files" if self.validation_paths else self.validation
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def command(self) -> str:
        """The command line that asks for this training; options that have their default are left out."""
        words = ["teamlora-export", "train", self.base]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in dataclasses.asdict(self).items():
            # `implementation` is no option of it, and the same function.
            if (
                name in ("base", "resume", "implementation")
                or value is None
                or (name in defaults and value == defaults[name])
            ):
                continue
            if name == "data" or (name == "validation" and isinstance(value, tuple)):
                words += [word for path in value for word in (option_name(name), str(path))]
            elif value is True:
                words.append(option_name(name))
            else:
                words += [option_name(name), ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


def option_name(field: str) -> str:
    """The option of the command line for a field of `TrainOptions`."""
    return "--" + field.replace("_", "-")


def parse_targets(given: Sequence[str]) -> tuple[str, ...] | str:
    """Names as the command line takes them: several options, or several names with commas; one regular expression."""
    if not given:
        return ALL_LINEAR
    if len(given) == 1 and (given[0] == ALL_LINEAR or not set(given[0]) <= _NAME_CHARACTERS):
        return given[0]
    return tuple(name.strip() for one in given for name in one.split(","))


def parse_validation(given: Sequence[str]) -> tuple[Path, ...] | float | None:
    """A share where the one that is given is a number, else files and folders.

    Raises:
        ExportError: one is empty.
    """
    if not given:
        return None
    _refuse_empty("validation", given)
    if len(given) == 1:
        try:
            share = float(given[0])
        except ValueError:
            pass
        else:
            if not Path(given[0]).exists():
                return share
    return tuple(Path(one).expanduser() for one in given)


_KINDS = {int: "a whole number", float: "a number"}
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,- ")


def _paths(field: str, given: Any) -> tuple[Path, ...]:
    paths = (given,) if isinstance(given, (str, Path)) else tuple(given)
    _refuse_empty(field, paths)
    return tuple(map(Path, paths))


def _refuse_empty(field: str, given: Sequence[str | Path]) -> None:
    """An empty path would be the current folder: what an unset variable of a shell asks for."""
    if "" in given:
        raise ExportError(f"{option_name(field)} is empty. Give a file or a folder.")


def _is_between(value: Any, kind: type, least: float, most: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return least <= value <= most and (kind is float or isinstance(value, int))
