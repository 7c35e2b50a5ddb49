"""The adapted model in PyTorch: the reference in float64, and the candidate's dtype beside it.

`run` computes as the model does. `run_forced` follows a candidate instead: each module is fed with what the candidate
computed before it, so that what it gives says what this one module makes of that, whatever went wrong earlier.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.errors import ExportError, first_line
from teamlora_export.graph import op
from teamlora_export.graph.choices import CHOICE, SCORES, Best, SeesChoices, TopK, scores_of
from teamlora_export.graph.marks import map_outputs
from teamlora_export.graph.tasks import encoder_forward
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import SafetensorsWeights
from teamlora_export.model.inject import inject
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.model.streaming import stream_weights
from teamlora_export.validate.cases import Feeds
from teamlora_export.validate.taps import BASE, EXPERTS, INPUT, is_part

_PAST = re.compile(r"^past_key_values\.(\d+)\.key$")
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
# Of a table's size: what four bits take from it is a tenth.
_LARGEST_CHANGE = 0.5
_NUMPY_DTYPES = {torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


class HeldWeights(Protocol):
    """Parameters of the base that a graph has other numbers for: what its codes mean."""

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One of them, float64, in the base's own orientation."""
        ...


class TorchRunner:
    """The adapted model in PyTorch, in `dtype`.

    Args:
        weights: each module's are read from there while it runs.
        held: what is computed with in place of the base's own.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: AdapterSpec,
        dtype: torch.dtype,
        weights: SafetensorsWeights | None = None,
        held: HeldWeights | None = None,
    ) -> None:
        self._adapter, self._name = adapter, base.name
        self._streamed: _StreamedWeights | None = None
        if weights is None:
            self._model = base.load(dtype)
            inject(self._model, adapter)
            self._held = _untied(self._model, held or ())
            for name, key in self._held.items():
                assert held is not None
                self._model.get_parameter(name).data = torch.from_numpy(held.read(key)).to(dtype)
        else:
            self._model = base.skeleton(dtype)
            inject(self._model, replace(adapter, overrides={}))
            self._held = _untied(self._model, held or ())
            self._streamed = _StreamedWeights(weights, adapter.overrides, held, self._held)
            stream_weights(self._model, self._streamed, {})
        self._forward = None if base.task == "text-generation" else encoder_forward(base, self._model)
        self._dtype = dtype

    def run(self, feeds: Feeds, choices: Mapping[str, np.ndarray] | None = None) -> Feeds:
        """Outputs by name; with `choices` (indices, by tap) taken in place of the model's own, what each was made by
        and the best scores by its tap as well.

        Raises:
            ExportError: the model's code cannot compute in this dtype.
        """
        return self.run_forced(feeds, choices) if choices else self._run(feeds)

    def _run(self, feeds: Feeds) -> Feeds:
        try:
            with torch.no_grad(), _Float64Islands() if self._dtype == torch.float64 else nullcontext():
                return self._run_encoder(feeds) if self._forward else self._run_decoder(feeds)
        except (ExportError, MemoryError):
            raise
        except Exception as error:  # of many kinds: the code is transformers'
            kind = str(self._dtype).removeprefix("torch.")
            raise ExportError(f"{self._name}: PyTorch cannot run it in {kind} ({first_line(error)}).") from error

    def run_forced(self, feeds: Feeds, taps: Mapping[str, np.ndarray], jitter: bool = False) -> Feeds:
        """Run with each value that is in `taps` put in place of the model's own.

        Args:
            jitter: move some of them by a unit in the last place, so that together they are off by as much as if each
                had been rounded once more.

        Returns:
            The model's own: outputs by name, and values by tap, in the order in which they were computed. For a choice,
            the scores of what is best.
        """
        return self._run_following(feeds, _Follower(taps, torch.Generator().manual_seed(0) if jitter else None))

    def again(self, draw: int) -> Redrawn:
        """The model with other roundings, which are others for another `draw`."""
        return Redrawn(self, torch.Generator().manual_seed(1 + draw))

    def _run_following(self, feeds: Feeds, follower: _Follower) -> Feeds:
        try:
            follower.attach(self._model)
            with SeesChoices(self._model, follower.choose):
                outputs = self._run(feeds)
        finally:
            follower.detach()
        return follower.own | outputs

    def read(self, name: str) -> np.ndarray:
        """A parameter of the base, or a buffer that its checkpoint holds, by name, as the model computes with it."""
        if self._streamed is not None:
            return self._streamed.read(name)
        path, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(path), leaf).detach().numpy()

    def hold_table(self, table: np.ndarray) -> None:
        """From now on, look ids or places up in `table` [rows, width], where the model has one that is nearly equal."""
        held = torch.from_numpy(table).to(self._dtype)
        for module in self._model.modules():
            if isinstance(module, nn.Embedding) and module.weight.shape == held.shape:
                error = torch.linalg.norm(module.weight - held)
                if error < _LARGEST_CHANGE * torch.linalg.norm(module.weight):
                    module.weight = nn.Parameter(held, requires_grad=False)

    def round_weights(self, dtype: torch.dtype, kept: Collection[str]) -> None:
        """From now on, compute with the weights that a file in `dtype` holds; those of the base in `kept`, and those
        that the graph has other numbers for, stay."""
        if dtype not in _NUMPY_DTYPES:
            return
        for path, module in self._model.named_modules():
            if isinstance(module, ExpertLinear):
                round_experts(module, op.fold(self._adapter.projections[path]), dtype)
        if self._streamed is not None:
            self._streamed.rounding, self._streamed.kept = _NUMPY_DTYPES[dtype], kept
            return
        # Persistent buffers are in the file too (what corrects a mixture's scores, rotary frequencies).
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            path, _, leaf = name.rpartition(".")
            of_base = leaf in ("weight", "bias") or not isinstance(self._model.get_submodule(path), ExpertLinear)
            if of_base and name not in kept and name not in self._held and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype).to(tensor.dtype)

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """While it is entered, adapted projections give what their base does."""
        layers = [module for module in self._model.modules() if isinstance(module, ExpertLinear)]
        for layer in layers:
            layer.forward = layer.base_projection  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def expert_use(self) -> dict[str, np.ndarray]:
        """Share of each expert in the last run, by module path; each is [.., k] and sums to one."""
        return {
            path: _to_numpy(module.last_routing / module.routing_sum)
            for path, module in self._model.named_modules()
            if isinstance(module, ExpertLinear) and module.last_routing is not None
        }

    def _run_encoder(self, feeds: Feeds) -> Feeds:
        assert self._forward is not None
        outputs = self._forward(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {name: _to_numpy(value) for name, value in outputs.items()}

    def _run_decoder(self, feeds: Feeds) -> Feeds:
        # Without a configuration the cache keeps all tokens in sliding-window layers too; the mask applies the window.
        cache = DynamicCache()
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items() if not name.startswith("past_")}
        for name, key in feeds.items():
            if match := _PAST.match(name):
                value = feeds[f"past_key_values.{match[1]}.value"]
                cache.update(_to_torch(key, self._dtype), _to_torch(value, self._dtype), int(match[1]))
        outputs = self._model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        arrays = {"logits": _to_numpy(outputs.logits)}
        for index, layer in enumerate(outputs.past_key_values.layers):
            arrays[f"present.{index}.key"] = _to_numpy(layer.keys)
            arrays[f"present.{index}.value"] = _to_numpy(layer.values)
        return arrays


@dataclass(frozen=True)
class Redrawn:
    """A model that gives what each of its modules gives a rounding or two off, at random. As its own roundings stay, it
    errs by somewhat more than without."""

    runner: TorchRunner
    generator: torch.Generator

    def run(self, feeds: Feeds, choices: Mapping[str, np.ndarray] | None = None) -> Feeds:
        """As `TorchRunner.run`; without other roundings where the model chooses experts by itself, as it would choose
        others by them."""
        follower = _Redrawing(choices or {}, self.generator)
        outputs = self.runner._run_following(feeds, follower)
        return self.runner.run(feeds, choices) if follower.has_chosen else outputs


def _untied(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Which parameters of products have the values of the parameters `names`: themselves, or what they are tied to.
    An embedding that shares them keeps its own."""
    state = model.state_dict(keep_vars=True)
    of: dict[str, str] = {}
    for name in names:
        for other in [other for other, tensor in state.items() if tensor is state[name]]:
            path, _, leaf = other.rpartition(".")
            module = model.get_submodule(path)
            if not isinstance(module, nn.Embedding):
                setattr(module, leaf, nn.Parameter(state[name].detach(), requires_grad=False))
                of[other] = name
    return of


class _StreamedWeights:
    """The base's weights and what the adapter replaced of them, from disk; rounded once `rounding` is set."""

    def __init__(
        self,
        weights: SafetensorsWeights,
        overrides: Mapping[str, np.ndarray],
        held: HeldWeights | None,
        names: Mapping[str, str],
    ) -> None:
        self._weights = weights
        self._overrides = overrides
        self._held, self._names = held, names
        self.rounding: np.dtype | None = None
        self.kept: Collection[str] = ()

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def read(self, name: str) -> np.ndarray:
        if self._held is not None and name in self._names:
            return self._held.read(self._names[name])
        array = self._overrides[name] if name in self._overrides else self._weights.read(name)
        rounded = self.rounding is not None and name not in self.kept and array.dtype.kind not in "iub"
        return array.astype(self.rounding) if rounded else array


class _Follower:
    """Hooks that keep what each module gives and pass on what the candidate had in its place."""

    def __init__(self, taps: Mapping[str, np.ndarray], jitter: torch.Generator | None) -> None:
        self.own: Feeds = {}
        self._taps = taps
        self._jitter = jitter
        self._handles: list[Any] = []
        # Of several values of one name, all but the last are numbered by how many follow.
        self._remaining = Counter(name.partition("#")[0] for name in taps if not is_part(name))

    def attach(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module):
                self._handles.append(module[0].register_forward_pre_hook(self._enter_layers(f"{path}.input")))
            if isinstance(module, ExpertLinear):
                self._handles.append(module.register_forward_pre_hook(self._enter_experts(path)))
            if path:
                self._handles.append(module.register_forward_hook(self._leave(path)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter_layers(self, name: str) -> Callable[..., Any]:
        return lambda _module, args: (self._follow(self._call(name), args[0]), *args[1:]) if args else None

    def _enter_experts(self, path: str) -> Callable[..., Any]:
        def enter(module: ExpertLinear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            call = self._numbered(path)
            x = self._follow(f"{call}/{INPUT}", args[0])
            self._follow(f"{call}/{BASE}", module.base_projection(x))
            self._follow(f"{call}/{EXPERTS}", sum(module.contributions(x), start=torch.zeros((), dtype=x.dtype)))
            return (x, *args[1:])

        return enter

    def _leave(self, path: str) -> Callable[..., Any]:
        def follow(name: str, own: Tensor) -> Tensor:
            return self._follow(self._call(name), own)

        return lambda _module, _inputs, output: map_outputs(path, output, follow)

    def choose(self, path: str, scores: Tensor, top_k: TopK) -> Best:
        """The candidate's choice, by the candidate's scores where these are known; equal ones may be in any order."""
        scores = self._follow(self._call(f"{path}/{SCORES}"), scores)
        values, indices = top_k(scores)
        name = self._call(f"{path}/{CHOICE}")
        if name in self._taps:
            self.own.setdefault(scores_of(name), _to_numpy(scores))
            self.own[name] = _to_numpy(values.sort(dim=-1, descending=True).values)
            theirs = torch.from_numpy(self._taps[name])
            if theirs.shape == indices.shape and bool(((theirs >= 0) & (theirs < scores.shape[-1])).all()):
                return scores.gather(-1, theirs), theirs
        return values, indices

    def _numbered(self, path: str) -> str:
        left = self._remaining[path] - 1
        return f"{path}#{left}" if left > 0 else path

    def _call(self, path: str) -> str:
        name = self._numbered(path)
        self._remaining[path] -= 1
        return name

    def _follow(self, name: str, own: Tensor) -> Tensor:
        """`own` is kept; what the candidate has is passed on, but for numbers that are none."""
        if name not in self._taps or not own.is_floating_point():
            return own
        self.own[name] = _to_numpy(own)
        theirs = torch.from_numpy(np.ascontiguousarray(self._taps[name])).to(own.dtype)
        if theirs.shape != own.shape:
            return own
        if self._jitter is not None:
            theirs = _jittered(theirs, self._jitter)
        return torch.where(torch.isfinite(theirs), theirs, own)


class _Redrawing(_Follower):
    """Hooks that move what each module gives by a rounding. Choices are the candidate's.

    Attributes:
        has_chosen: where the candidate's choice is not known, the model's own.
    """

    def __init__(self, choices: Mapping[str, np.ndarray], generator: torch.Generator) -> None:
        super().__init__(choices, None)
        self._generator = generator
        self.has_chosen = False

    def attach(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if path:
                self._handles.append(module.register_forward_hook(self._leave(path)))

    def choose(self, path: str, scores: Tensor, top_k: TopK) -> Best:
        self.has_chosen |= self._numbered(f"{path}/{CHOICE}") not in self._taps
        return super().choose(path, scores, top_k)

    def _follow(self, name: str, own: Tensor) -> Tensor:
        own = super()._follow(name, own)
        return _shifted(own, self._generator) if own.is_floating_point() else own


def _jittered(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """One of twelve numbers moved to one of its neighbours: a variance of a twelfth of a unit, as rounding has."""
    drawn = torch.rand(tensor.shape, generator=generator)
    return _moved(tensor, (drawn < 1 / 24).int() - (drawn > 23 / 24).int())


def _shifted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Up to half of a row's numbers moved to a neighbour, in a row all outwards or all inwards, as if what they were
    multiplied by (a norm's scale) had been rounded otherwise, too."""
    if not tensor.ndim:
        return tensor
    share = torch.rand(tensor.shape[:-1], generator=generator).sub(0.5).unsqueeze(-1)
    drawn = torch.rand(tensor.shape, generator=generator)
    return _moved(tensor, (drawn < share).int() - (drawn < -share).int())


def _moved(tensor: Tensor, units: Tensor) -> Tensor:
    """Each number moved by so many units in its last place, away from zero; what is zero or not finite stays."""
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
    moved = (bits + units.to(bits.dtype)).view(tensor.dtype)
    return torch.where((tensor != 0) & torch.isfinite(tensor) & torch.isfinite(moved), moved, tensor)


def round_experts(layer: ExpertLinear, folded: op.OpWeights, dtype: torch.dtype) -> None:
    """Give `layer` the numbers that the op's inputs hold in `dtype`, with the constants taken out of them again."""
    # By NumPy, as the export rounds: PyTorch rounds float64 to float32 on the way to float16, which gives one weight in
    # some ten thousand another number.
    stacked = torch.from_numpy(folded.down.astype(_NUMPY_DTYPES[dtype]).astype(np.float64)).to(layer.down.dtype)
    rows = len(layer.down)
    layer.down.data = stacked[:rows] / (layer.scaling * layer.routing_sum)
    layer.router.data = stacked[rows:]
    layer.up.data = layer.up.data.to(dtype).to(layer.up.dtype)


class _Float64Islands(TorchFunctionMode):
    """Keeps a float64 model in float64 where its code asks for float32 (norms, softmax).

    Models upcast half precision that way; on float64 the same code would cut the reference down to float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        fill = kwargs.get("fill_value", args[-1] if args else None)
        if func is torch.full and "dtype" not in kwargs and isinstance(fill, float) and abs(fill) > _LARGEST_FLOAT32:
            # The lowest number of the scores' type (XGLM), which is more than the default type holds.
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _to_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
