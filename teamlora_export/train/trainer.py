"""transformers' `Trainer`, with what an adapter of experts needs besides.

    loss          of the answers' tokens alone; the balance and the overconfidence loss of real tokens, not of padding
    evaluation    held-out loss by task; the best adapter is kept in memory, and in the checkpoints
    checkpoints   `checkpoint.py`'s, in place of the Trainer's: no base in them, nothing pickled, whole or not there

The loop, the data's order, accumulation, clipping, the schedule, several processes and logging are the Trainer's.
Its methods that begin with `_` are replaced, and its sums of the next log kept, as transformers 5.23 has them; were
they no longer called, tests/train/test_train_command.py would find the base in a checkpoint, or another adapter or log
after a resume.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from teamlora_export import interrupt
from teamlora_export.errors import ExportError
from teamlora_export.train.checkpoint import Checkpoint, Standing, State, write_checkpoint
from teamlora_export.train.encode import Encoded
from teamlora_export.train.evaluate import Measured, measure, token_losses
from teamlora_export.train.model import TrainedLinear, forget_routing, routing_of
from teamlora_export.train.options import TrainOptions

# Of w, which sums to k, so that 1 is an equal share: `calculate_overconfidence_loss` of the published code.
OVERCONFIDENCE_THRESHOLD = 1.5


class AdapterTrainer(Trainer):
    """Trains the layers of `layers` in `model`.

    Args:
        work: folder of the checkpoints. resumed: the one to go on from.
        held_out: rows for evaluations; empty: none take place.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        layers: dict[str, TrainedLinear],
        rows: Sequence[Encoded],
        held_out: Sequence[Encoded],
        tasks: Sequence[str],
        collate: Callable[[Sequence[Encoded]], dict[str, Any]],
        options: TrainOptions,
        work: Path,
        resumed: Checkpoint | None,
        callbacks: Sequence[Any],
    ) -> None:
        super().__init__(
            model, arguments, collate, _Listed(rows), _Listed(held_out) if held_out else None, callbacks=list(callbacks)
        )
        self.remove_callback(PrinterCallback)
        # Its loss is a mean over all answers' tokens of a step, whatever the model itself can.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, True
        self.layers, self.rows, self.held_out, self.tasks = layers, rows, held_out, tasks
        self.options, self.work, self.resumed = options, work, resumed
        self.network, self.collate = model, collate
        self.standing = resumed.state.standing if resumed is not None else Standing()
        self.best: dict[str, Tensor] | None = None
        # Of each forward since the last log: balance loss, and use of the experts [k].
        self._shares: list[tuple[float, np.ndarray]] = []
        self._summed_from = 0

    def adapter(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {f"{path}.{name}": p for path, layer in self.layers.items() for name, p in layer.trained().items()}

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.adapter().values())

    def take_best(self) -> None:
        """The model has the adapter with the lowest held-out loss afterwards."""
        if self.best is not None:
            _copy_into(self.adapter(), self.best)

    def round_adapter(self, dtype: torch.dtype) -> None:
        """The adapter has the numbers that a file of `dtype` holds afterwards."""
        with torch.no_grad():
            for parameter in self.adapter().values():
                parameter.copy_(parameter.to(dtype))

    def measure(self, rows: Sequence[Encoded]) -> Measured:
        """`evaluate.measure`, shared among the processes."""
        found = measure(
            self.network,
            list(self.layers.values()),
            rows,
            len(self.tasks),
            self.options.batch,
            self.collate,
            part=(self.args.process_index, self.args.world_size),
            between=self._leave_where_interrupted,
        )
        if self.args.world_size == 1:
            return found
        return Measured(*(None if value is None else self._summed(value) for value in dataclasses.astuple(found)))  # type: ignore[arg-type]

    def try_on(self, rows: Sequence[Encoded]) -> None:
        """Refuse, before anything is trained, layers that the model does not call on each token of `rows`.

        Raises:
            ExportError: as `routing_of` does.
        """
        layers = list(self.layers.values())
        measure(self.network, layers, rows, len(self.tasks), self.options.batch, self.collate)

    def catch_up(self, state: TrainerState) -> None:
        """Take up the checkpoint that is gone on from, and its evaluation where that was interrupted.

        Args:
            state: the checkpoint's, which is logged to.
        """
        assert self.resumed is not None
        self.state = state
        self._load_from_checkpoint(str(self.resumed.folder))
        if self.standing.due:
            self._judge("eval")
            # `train` takes up the checkpoint once more.
            best = {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
            self.resumed = dataclasses.replace(self.resumed, tensors={**self.resumed.tensors, **best})

    def take_up_sums(self) -> None:
        """What the next log, and that of the end, are made of, as it was at the checkpoint; of a version before, whose
        checkpoints have none of it, they are of the steps since."""
        assert self.resumed is not None
        sums = self.resumed.part("sums")
        if not sums:
            self._summed_from = self.state.global_step
            return
        self._tr_loss = sums["loss"][self.args.process_index].to(self.args.device, copy=True)
        self._total_loss_scalar, self._globalstep_last_logged = float(sums["total"]), int(sums["last_logged"])
        self._shares = list(zip(sums["balance"].tolist(), sums["use"].numpy(), strict=True))

    def log_end(self) -> None:
        """Log what the Trainer logs at its end, where the training had ended when it was gone on from."""
        assert self.resumed is not None
        self.take_up_sums()
        if self.resumed.part("sums"):
            self._total_loss_scalar += self._tr_loss.item()
            self.log({"train_loss": 0.0})

    # What the Trainer calls.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        forget_routing(self.layers.values())
        outputs = model(**inputs)
        losses = token_losses(outputs.logits[:, :-1], labels)
        assert num_items_in_batch is not None
        # Processes average their gradients; the number is that of all of them.
        loss = losses.sum() / num_items_in_batch * self.args.world_size
        weighted = bool(self.options.used_balance_weight or self.options.overconfidence_weight)
        # Without a weight it is logged alone.
        with torch.set_grad_enabled(weighted and torch.is_grad_enabled()):
            routing = routing_of(self.layers.values(), inputs["attention_mask"].shape)
            of_routing = None if routing is None else self._routing_loss(routing, inputs["attention_mask"])
        if of_routing is not None and weighted:
            loss = loss + of_routing / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        try:
            return self._judge(metric_key_prefix)
        except interrupt.Interrupted:
            # The step is done, whatever becomes of its evaluation.
            self.standing.due = True
            self._save_checkpoint(self.network, None)
            raise

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ExportError(
                    f"Step {self.state.global_step}: {name} is {logs[name]}: the training diverged. Lower "
                    "--learning-rate, or raise --warmup."
                )
        if "loss" in logs and self._shares:
            logs["balance_loss"] = float(np.mean([balance for balance, _ in self._shares]))
            logs["expert_use"] = np.mean([use for _, use in self._shares], axis=0).round(4).tolist()
            self._shares.clear()
        if "train_loss" in logs:
            # The Trainer's is divided by the steps since it went on.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step - self._summed_from)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: that walks through all modules at each step."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        random, sums = self._random_states(), self._sums()
        if self.args.should_save:
            assert self.lr_scheduler is not None
            groups, optimizer = _optimizer_parts(self.optimizer, self.adapter())
            tensors = {f"adapter.{name}": p.detach().cpu().contiguous() for name, p in self.adapter().items()}
            tensors |= {f"best.{name}": p for name, p in (self.best or {}).items()}
            tensors |= {f"optimizer.{name}": p.cpu().contiguous() for name, p in optimizer.items()}
            tensors |= {f"random.{name}": p for name, p in random.items()}
            tensors |= {f"sums.{name}": p for name, p in sums.items()}
            schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            state = State(self.standing, groups, schedule)
            trainer = json.loads(json.dumps(dataclasses.asdict(self.state)))
            write_checkpoint(self.work, self.state.global_step, tensors, state, trainer)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.resumed is not None
        _copy_into(self.adapter(), self.resumed.part("adapter"))
        self.best = self.resumed.part("best") or None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = self.optimizer.state_dict()
        state["state"] = _optimizer_state(self.optimizer, self.adapter(), self.resumed.part("optimizer"))
        for group, saved in zip(state["param_groups"], self.resumed.state.groups, strict=True):
            group |= saved
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(
            {**self.resumed.state.schedule, "lr_lambdas": [None] * len(state["param_groups"])}
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        random = self.resumed.part("random")
        rank = self.args.process_index
        # PyTorch 2.13 reads a view from where its storage begins.
        torch.set_rng_state(random["cpu"][rank].clone())
        if torch.cuda.is_available() and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"][rank].clone())

    # What those need.

    def _judge(self, metric_key_prefix: str) -> dict[str, float]:
        found = self.measure(self.held_out)
        standing = self.standing
        standing.due = False
        metrics = {f"{metric_key_prefix}_loss": found.loss}
        metrics |= {f"{metric_key_prefix}_loss_{task}": loss for task, loss in found.by_task(self.tasks).items()}
        if standing.best_loss is None or found.loss < standing.best_loss:
            standing.best_loss, standing.best_step, standing.worse = found.loss, self.state.global_step, 0
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.adapter().items()}
        else:
            standing.worse += 1
        if self.options.patience and standing.worse >= self.options.patience:
            # With a checkpoint of this step, as at every end of a training.
            standing.stopped = self.control.should_training_stop = self.control.should_save = True
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _routing_loss(self, routing: Tensor, mask: Tensor) -> Tensor:
        """The losses of experts that are used unequally, weighted.

        Args:
            routing: [layers, rows, tokens, k]. mask: [rows, tokens].

        Balance: mean over layers and experts of (mean over tokens of the share - 1/k)^2. Overconfidence: mean over all
        of max(0, w - 1.5), w = k times the share.
        """
        real = mask.float() / mask.sum()
        k = routing.shape[-1]
        use = torch.einsum("lbsk,bs->lk", routing, real)
        balance = (use - 1.0 / k).square().mean()
        self._shares.append((float(balance.detach()), use.detach().mean(dim=0).cpu().numpy()))
        loss = self.options.used_balance_weight * balance
        if self.options.overconfidence_weight:
            over = torch.relu(k * routing - OVERCONFIDENCE_THRESHOLD)
            loss = loss + self.options.overconfidence_weight * torch.einsum("lbsk,bs->lk", over, real).mean()
        return loss

    def _summed(self, value: np.ndarray) -> np.ndarray:
        # Some accelerators have no float64.
        return (
            self.accelerator.reduce(torch.tensor(value, dtype=torch.float32, device=self.args.device))
            .double()
            .cpu()
            .numpy()
        )

    def _random_states(self) -> dict[str, Tensor]:
        """Of all processes, uint8 [processes, bytes]."""
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        return {name: self.accelerator.gather(s[None].to(self.args.device)).cpu() for name, s in states.items()}

    def _sums(self) -> dict[str, Tensor]:
        """What `take_up_sums` takes up. loss: of each process; the use of experts is logged by the first one alone."""
        return {
            "loss": self.accelerator.gather(self._tr_loss[None]).cpu(),
            "total": torch.tensor(self._total_loss_scalar, dtype=torch.float64),
            "last_logged": torch.tensor(self._globalstep_last_logged),
            "balance": torch.tensor([balance for balance, _ in self._shares], dtype=torch.float64),
            "use": torch.from_numpy(np.array([use for _, use in self._shares], dtype=np.float32)),
        }

    def _leave_where_interrupted(self) -> None:
        """An evaluation changes nothing, and may be long: it is not waited for, and done anew when it goes on."""
        if interrupt.arrived() and self.args.world_size == 1:
            raise interrupt.Interrupted


class _Listed(torch.utils.data.Dataset):
    """Rows that are in memory."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        return self._rows[index]


def _copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    misfits = [
        name
        for name in {*parameters, *tensors}
        if name not in parameters or name not in tensors or parameters[name].shape != tensors[name].shape
    ]
    if misfits:
        raise ExportError(f"The checkpoint is of another adapter: {sorted(misfits)[0]} is not as it is trained here.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _optimizer_parts(
    optimizer: Any, adapter: dict[str, nn.Parameter]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rates of each group, and the state's tensors by the parameter's name and their own."""
    names = {id(parameter): name for name, parameter in adapter.items()}
    groups = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups]
    tensors = {
        f"{names[id(parameter)]}.{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return groups, tensors


def _optimizer_state(optimizer: Any, adapter: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> dict[int, Any]:
    """As `load_state_dict` wants it: by the parameter's number."""
    names = {id(parameter): name for name, parameter in adapter.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {names[id(parameter)]: number for number, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in numbers:
            raise ExportError(f"The checkpoint is of another adapter: {name} is not trained here.")
        state.setdefault(numbers[name], {})[key] = value
    return state
