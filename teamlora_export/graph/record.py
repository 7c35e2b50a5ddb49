"""What a model computes, call by call, without computing it.

The model runs on tensors that have no data (less than a second, whatever its size), patched as the exporter patches it,
and every call of a PyTorch operator is noted with all that it is given. A number that decides anything is seen there,
wherever it comes from: a setting, a list, a buffer, the configuration, a closure, a layer's index or the depth. Tensors
are noted by where they come from: an earlier call, a parameter's name, an input, or, where nothing else names them,
their values.

The calls are cut at the ends of the layers, and each layer's are written relative to it, so that two layers compute the
same exactly where their records are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache

from teamlora_export.graph.silence import silenced


class NotLayered(Exception):
    """The model is no chain of layers that read one another through one value, or cannot be followed."""


@dataclass(frozen=True)
class Record:
    """The calls of one run: ahead of the layers, of each layer, and after them. Equal records compute the same."""

    shared: tuple[object, ...]
    layers: tuple[tuple[object, ...], ...]
    head: tuple[object, ...]


class _Origin(NamedTuple):
    """Where a tensor comes from: `call` (its number, which result), `weight`, `input` or `cache` (layer, which)."""

    kind: str
    name: object
    detail: object = None


def layer_of(path: str, prefix: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp`, `model.layers` -> 3, `mlp`; None for a path outside the layers."""
    if not path.startswith(f"{prefix}."):
        return None, path
    index, _, rest = path[len(prefix) + 1 :].partition(".")
    return (int(index), rest) if index.isdigit() else (None, path)


def keys_and_values(cache: Cache) -> list[tuple[Any, Any]]:
    """Of each layer; None where it keeps none."""
    return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]


def without_data() -> FakeTensorMode:
    """The mode in which tensors have a shape and no data; runs that share one are faster."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def run(model: nn.Module, forward: Callable[..., Any], sample: Mapping[str, Any]) -> Any:
    """What `forward(**sample)` returns, without data. Leaves `model` as it was."""
    with _exporting(model), without_data():
        return forward(**sample)


def weights_needed(model: nn.Module, forward: Callable[..., Any], sample: Mapping[str, Any]) -> set[str]:
    """Names of the parameters that anything in `forward(**sample)`, a dict, is made of. Leaves `model` as it was."""
    makers = _Makers()
    with _exporting(model), without_data(), makers:
        outputs = forward(**sample)
    caches = [keys_and_values(value) for value in outputs.values() if isinstance(value, DynamicCache)]
    needed = makers.behind(tree_leaves((outputs, caches)))
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in needed}


def record(
    model: nn.Module, prefix: str, forward: Callable[..., Any], sample: Mapping[str, Any], mode: FakeTensorMode
) -> tuple[Record, Mapping[str, Any]]:
    """The record of `forward(**sample)`, a dict of tensors and caches, cut at the layers in the list `prefix`; and what
    it returns, without data. Leaves `model` as it was.

    Args:
        mode: from `without_data`.

    Raises:
        NotLayered: the layers cannot be cut apart.
    """
    recorder = _Recorder(model, prefix)
    for name, value in sample.items():
        recorder.name_input(name, value)
    layers = list(model.get_submodule(prefix).children())
    handles = [layers[0].register_forward_pre_hook(recorder.enter_first)]
    handles += [layer.register_forward_hook(recorder.leave_layer(index)) for index, layer in enumerate(layers)]
    try:
        with _exporting(model), mode, recorder:
            outputs = forward(**sample)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.cut(outputs, len(layers)), outputs


@contextmanager
def _exporting(model: nn.Module) -> Iterator[None]:
    """The state that the exporter traces in; afterwards the modules have their own attributes and buffers again."""
    # Seconds of imports, which only what follows a model needs. The first registers patches.
    import transformers.exporters.exporter_onnx  # noqa: F401
    from torch.export._trace import _compiling_state_context
    from transformers.exporters.utils import apply_patches

    kept = [(vars(module), dict(vars(module)), module._buffers, dict(module._buffers)) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(silenced())
        stack.enter_context(torch.no_grad())
        stack.enter_context(apply_patches("onnx"))
        stack.enter_context(apply_patches("dynamo"))
        stack.enter_context(_compiling_state_context())
        try:
            yield
        finally:
            for attributes, attributes_before, buffers, buffers_before in kept:
                for current, before in ((buffers, buffers_before), (attributes, attributes_before)):
                    current.clear()
                    current.update(before)


class _Makers(TorchDispatchMode):
    """Notes what each tensor is made of."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[int, list[Tensor]] = {}
        # An id belongs to a tensor for as long as it lives.
        self._alive: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for made in tree_leaves(result):
            self._inputs.setdefault(id(made), []).extend(read)
        self._alive.append(result)
        return result

    def behind(self, tensors: Iterable[object]) -> set[int]:
        """Ids of all that `tensors` are made of."""
        found: set[int] = set()
        waiting = list(tensors)
        while waiting:
            tensor = waiting.pop()
            if id(tensor) not in found:
                found.add(id(tensor))
                waiting.extend(self._inputs.get(id(tensor), ()))
        return found


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._calls: list[tuple[object, ...]] = []
        self._origins: dict[int, _Origin] = {}
        # An id belongs to a tensor for as long as it lives.
        self._alive: list[Tensor] = []
        self._first: int | None = None
        self._entry: _Origin | None = None
        self._ends: list[tuple[int, int, _Origin]] = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in self._origins:
                self._keep(tensor, _Origin("weight", name, (tuple(tensor.shape), tensor.dtype)))

    def name_input(self, name: str, value: object) -> None:
        if isinstance(value, DynamicCache):
            for index, (key, held) in enumerate(keys_and_values(value)):
                self._keep(key, _Origin("cache", index, "key"))
                self._keep(held, _Origin("cache", index, "value"))
        elif isinstance(value, Tensor):
            self._keep(value, _Origin("input", name))

    def enter_first(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._first is not None or not args or not isinstance(args[0], Tensor):
            raise NotLayered("what enters its first layer is not one tensor, once")
        self._first, self._entry = len(self._calls), self._origin(args[0])

    def leave_layer(self, index: int) -> Callable[..., None]:
        def leave(_layer: nn.Module, _args: Any, output: Any) -> None:
            value = output[0] if type(output) is tuple and output else output
            if not isinstance(value, Tensor):
                raise NotLayered(f"layer {index} returns a {type(value).__name__}")
            self._ends.append((index, len(self._calls), self._origin(value)))

        return leave

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        call = (str(func), *self._leaves(args), *self._leaves(kwargs))
        result = func(*args, **kwargs)
        number = len(self._calls)
        self._calls.append(call)
        for place, tensor in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
            if isinstance(tensor, Tensor):
                self._keep(tensor, _Origin("call", number, place))
        return result

    def _keep(self, tensor: Tensor, origin: _Origin) -> None:
        self._alive.append(tensor)
        self._origins[id(tensor)] = origin

    def _leaves(self, argument: object) -> Iterator[object]:
        if isinstance(argument, Tensor):
            yield self._origin(argument)
        elif isinstance(argument, (tuple, list)):
            yield "["
            for part in argument:
                yield from self._leaves(part)
            yield "]"
        elif isinstance(argument, Mapping):
            for name, part in argument.items():
                yield f"{name}="
                yield from self._leaves(part)
        elif argument is None or isinstance(
            argument, (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        ):
            # By type and in full: 1 is not True, and 1.000001 is not 1.
            yield (type(argument).__name__, repr(argument))
        else:
            raise NotLayered(f"an operator takes a {type(argument).__name__}")

    def _origin(self, tensor: Tensor) -> _Origin:
        origin = self._origins.get(id(tensor))
        if origin is None:
            if isinstance(tensor, FakeTensor):
                raise NotLayered("a tensor comes from nowhere")
            with unset_fake_temporarily():
                data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            values = (tuple(tensor.shape), tensor.dtype, hashlib.sha256(data.tobytes()).hexdigest())
            origin = _Origin("constant", values)
            self._keep(tensor, origin)
        return origin

    def cut(self, outputs: Mapping[str, Any], depth: int) -> Record:
        if self._first is None or self._entry is None or [index for index, _, _ in self._ends] != list(range(depth)):
            raise NotLayered("its layers do not run one after the other, once each")
        layers, start, before = [], self._first, self._entry
        for index, end, result in self._ends:
            relative = _Relative(self._prefix, index, start, self._first, before)
            calls = [relative.of(call) for call in self._calls[start:end]]
            cached = self._cached(outputs, index)
            layers.append((*calls, relative.of((result, *cached))))
            start, before = end, result
        head = _Relative(self._prefix, None, start, self._first, before)
        results = [self._origin(value) for value in outputs.values() if isinstance(value, Tensor)]
        shared = _Relative(self._prefix, None, 0, 0, None)
        return Record(
            shared=tuple(shared.of(call) for call in self._calls[: self._first]),
            layers=tuple(layers),
            head=(*(head.of(call) for call in self._calls[start:]), head.of(tuple(results))),
        )

    def _cached(self, outputs: Mapping[str, Any], index: int) -> list[_Origin]:
        caches = [keys_and_values(value) for value in outputs.values() if isinstance(value, DynamicCache)]
        if any(index >= len(cache) or any(part is None for part in cache[index]) for cache in caches):
            raise NotLayered(f"layer {index} keeps no cache of its own")
        return [self._origin(tensor) for cache in caches for tensor in cache[index]]


class _Relative(NamedTuple):
    """Writes calls relative to a part of the model: a layer, or what is around them (`layer` is None)."""

    prefix: str
    layer: int | None
    start: int
    first: int
    before: _Origin | None

    def of(self, call: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(self._origin(leaf) if isinstance(leaf, _Origin) else leaf for leaf in call)

    def _origin(self, origin: _Origin) -> _Origin:
        if origin == self.before:
            return _Origin("before", None)
        if origin.kind == "call":
            assert isinstance(origin.name, int)
            if origin.name >= self.start:
                return _Origin("own", origin.name - self.start, origin.detail)
            if origin.name < self.first:
                return _Origin("shared", origin.name, origin.detail)
            raise NotLayered(f"{self._name} reads what an earlier layer computed")
        if origin.kind == "cache":
            if origin.name != self.layer:
                raise NotLayered(f"{self._name} reads the cache of layer {origin.name}")
            return _Origin("cache", None, origin.detail)
        if origin.kind == "weight":
            index, rest = layer_of(str(origin.name), self.prefix)
            if index is not None and index != self.layer:
                raise NotLayered(f"{self._name} reads {origin.name}")
            return origin if index is None else _Origin("own weight", rest, origin.detail)
        return origin

    @property
    def _name(self) -> str:
        return "a part outside of the layers" if self.layer is None else f"layer {self.layer}"
