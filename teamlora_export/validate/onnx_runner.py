"""A bundle's model in ONNX Runtime, on the CPU: as it is, with its inside to be seen, and in wide arithmetic.

The op is run by its body, or by a native library.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import torch

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.session import run_once
from teamlora_export.errors import ExportError, first_line
from teamlora_export.graph import op
from teamlora_export.graph.choices import is_choice
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.graph.quantized import keep_activations
from teamlora_export.graph.read import read_graph
from teamlora_export.ports import ADAPTER_NAME, keeps_in_place, window_of
from teamlora_export.validate.cases import Feeds
from teamlora_export.validate.in_place import in_place_call
from teamlora_export.validate.stored import adapted_modules
from teamlora_export.validate.taps import (
    EXPERTS,
    Tap,
    expert_inputs,
    find_taps,
    is_part,
    live_values,
    marked_values,
    module_of,
    with_rounded_constants,
)
from teamlora_export.validate.verdict import Departure
from teamlora_export.validate.widen import widen


@dataclass(frozen=True)
class SlotFill:
    """What a graph that takes adapters is run with.

    Attributes:
        arrays: by the input's name, [slots, ..]. indices: `adapter`, int32 [1] or [batch].
    """

    arrays: Mapping[str, np.ndarray]
    indices: np.ndarray


class OnnxRunner:
    """A bundle's model.

    bfloat16 models run in float32 with every node's result rounded to bfloat16, because the runtime has no CPU
    kernels for it.

    Args:
        adapted: paths of the adapted projections, whose parts can be looked at.
        library: a native library that runs the op's nodes, not for bfloat16. The bodies are left out then, so that
            nothing else can run them.
        as_deployed: with what the runtime saves on the graph, which would hide faults (`prepare`).
        fill: what is in the slots of a graph that takes adapters; they are constants then.

    Raises:
        ExportError: as `read_graph`.
    """

    def __init__(
        self,
        bundle: Bundle,
        adapted: Collection[str],
        library: Path | None = None,
        as_deployed: bool = False,
        fill: SlotFill | None = None,
    ) -> None:
        self.bundle, self.library = bundle, library
        self._fill = fill
        self._as_deployed = as_deployed
        # As it is in the file, and to be read only; read here, so that what is no graph is found before anything runs.
        self.written = read_graph(bundle)
        if fill is not None:
            # What the file of one adapter says, for its weights to be compared.
            own = {name: array[fill.indices[0]] for name, array in fill.arrays.items()}
            _fill_slots(self.written, SlotFill(own, fill.indices))
        self._adapted = adapted
        self._session: ort.InferenceSession | None = None
        self._tapped: dict[bool, ort.InferenceSession] = {}

    @property
    def label(self) -> str:
        return "ONNX Runtime" + (" with the native op" if self.library else "")

    @cached_property
    def model(self) -> ir.Model:
        """The model as it runs: the op's bodies in place of its nodes, or the nodes alone where a library runs them.

        To be read only: its weights stay in the bundle's file.
        """
        return self._opened[0]

    @cached_property
    def taps(self) -> dict[str, Tap]:
        """What of the inside can be looked at, in the order of the graph."""
        return find_taps(self.model, self._adapted, self._opened[1])

    def inexact(self, weights: Collection[str]) -> set[str]:
        """Taps and outputs that are computed with constants that the graph's own type may have rounded.

        Args:
            weights: names of what is no such constant, since the reference has it as well.
        """
        values = {name: tap.value for name, tap in self.taps.items()}
        values |= {port.name: port.name for port in self.bundle.manifest.outputs}
        rounded = with_rounded_constants(self.model, values.values(), weights)
        return {name for name, value in values.items() if value in rounded}

    def departures(self) -> Iterator[Departure]:
        """What is wrong with the graph's form: modules that nothing reads, and projections without experts."""
        live = live_values(self.written)
        for value, modules in marked_values(self.written):
            if value.name not in live:
                node = self.producer_of(modules[0])
                yield Departure("graph", module_of(modules[0]), node, f"{modules[0]} is read by nothing")
        marked = {name.partition("#")[0] for _, modules in marked_values(self.written) for name in modules}
        for path in sorted(adapted_modules(self.bundle.manifest) - marked):
            yield Departure("graph", path, "none", "no value of the graph says that it is this module's output")
        for name in self.taps:
            is_adapted = name.partition("#")[0] in self._adapted and not is_part(name)
            if is_adapted and f"{name}/{EXPERTS}" not in self.taps:
                yield Departure("graph", module_of(name), self.producer_of(name), "no experts are added to its base")

    def producer_of(self, tap_or_output: str) -> str:
        """Name of the node that makes a module's value, or an output of the model; of siblings, their common node."""
        module = tap_or_output.partition("/")[0]
        modules = {name: str(value.name) for value, names in marked_values(self.written) for name in names}
        made = {value.name: node for node in self.written.graph for value in node.outputs}
        node = made.get(modules.get(tap_or_output) or modules.get(module, module))
        if node is not None and node.op_type in ("Split", "Squeeze") and node.inputs[0] is not None:
            node = node.inputs[0].producer() or node
        return (node.name or node.op_type) if node is not None else "an input of the model"

    def prepare(self, model: ir.Model) -> bool:
        """Take out of a model what a runtime saves on what the graph says, but for one that runs as it is deployed, in
        place; whether it is another then."""
        return not self._as_deployed and keep_activations(model)

    @cached_property
    def _opened(self) -> tuple[ir.Model, dict[str, str], bool]:
        """The model as it runs, the values that experts read, by module, and whether it computes what the file does."""
        model = read_graph(self.bundle)
        as_in_file = not self.prepare(model)
        if self._fill is not None:
            _fill_slots(model, self._fill)
            as_in_file = False
        inputs = expert_inputs(model)
        if self.library is None:
            inline_bodies(model)
        else:
            _leave_out_bodies(model)
        return model, inputs, as_in_file

    @cached_property
    def choices(self) -> dict[str, str]:
        """The values that hold what was chosen, by tap."""
        return {name: tap.value for name, tap in self.taps.items() if is_choice(name)}

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name, and by tap what was chosen: which experts a router took. A cache grows here, whatever form
        the graph keeps it in."""
        return self._named(self._as_growing(self._run, feeds), self.choices)

    def run_with_taps(self, feeds: Feeds, wide: bool = False) -> Feeds:
        """Values by tap, then outputs by name.

        Args:
            wide: in float32 arithmetic throughout, with the weights of the file.
        """
        return self._named(self._as_growing(lambda given: self._run_tapped(given, wide), feeds), self.taps)

    def refill(self, fill: SlotFill) -> None:
        """Other adapters in the slots."""
        self.forget()
        self._fill = fill
        for made in ("_opened", "model", "taps", "choices"):
            self.__dict__.pop(made, None)

    def forget(self) -> None:
        """Close all sessions: each holds the weights."""
        self._session = None
        self._tapped.clear()

    def _as_growing(self, run: Callable[[Feeds], Feeds], feeds: Feeds) -> Feeds:
        inputs = self.bundle.manifest.inputs
        if not keeps_in_place(inputs):
            return run(feeds)
        windows = {port.name: window for port in inputs for size in port.shape if (window := window_of(size))}
        call = in_place_call(feeds, windows)
        return call.present(run(call.feeds))

    def _run(self, feeds: Feeds) -> Feeds:
        if self._session is None:
            in_file = self._opened[2] and self.bundle.manifest.dtype != "bf16"
            in_file = in_file and not self.choices and self.library is None
            as_deployed = self._as_deployed
            self._session = (
                open_session(self.bundle.model, as_deployed=as_deployed)
                if in_file
                else self._open(self.choices.values())
            )
        return run_session(self._session, feeds)

    def _run_tapped(self, feeds: Feeds, wide: bool) -> Feeds:
        if wide not in self._tapped:
            self._tapped.clear()
            self._tapped[wide] = self._open((tap.value for tap in self.taps.values()), wide)
        return feeds | run_session(self._tapped[wide], feeds, self._given)

    @property
    def _given(self) -> Mapping[str, np.ndarray]:
        """Inputs that have a default."""
        return {}

    def _open(self, wanted: Iterable[str], wide: bool = False) -> ort.InferenceSession:
        """A session on the model that gives the values `wanted` as well."""
        model = self._fresh()
        values = {value.name: value for node in model.graph for value in node.outputs}
        present = {value.name for value in (*model.graph.outputs, *model.graph.inputs)}
        model.graph.outputs.extend(values[name] for name in dict.fromkeys(wanted) if name not in present)
        return open_model(model, self.bundle, wide, self.library, self._as_deployed)

    def _named(self, values: Feeds, names: Iterable[str]) -> Feeds:
        """Those of the taps `names` that are among `values`, then the outputs."""
        taps = {name: self.taps[name] for name in names}
        found = {name: tap.of(values) for name, tap in taps.items() if tap.value in values}
        return found | {port.name: values[port.name] for port in self.bundle.manifest.outputs}

    def _fresh(self) -> ir.Model:
        """The model, to be changed."""
        return self.model.clone()


def _fill_slots(model: ir.Model, fill: SlotFill) -> None:
    """Make the inputs that have a default constants, in place."""
    for value in [value for value in model.graph.inputs if value.const_value is not None]:
        array = fill.indices if value.name == ADAPTER_NAME else fill.arrays[str(value.name)]
        value.const_value = ir.tensor(np.ascontiguousarray(array), dtype=value.dtype, name=value.name)
        value.shape = ir.Shape(array.shape)
        model.graph.inputs.remove(value)


def _leave_out_bodies(model: ir.Model) -> None:
    """Leave the op's nodes to a library, in place."""
    for identifier in [f for f in model.functions if f[:2] == (op.DOMAIN, op.NAME)]:
        del model.functions[identifier]


def open_model(
    model: ir.Model, bundle: Bundle, wide: bool = False, library: Path | None = None, as_deployed: bool = False
) -> ort.InferenceSession:
    """A session on a model derived from a bundle's (`OnnxRunner.model`), with the bundle's weights.

    Args:
        as_deployed: products of DequantizeLinear's results may round what they read to 8 bits.
    """
    dtype = bundle.manifest.dtype
    if dtype == "bf16" or (wide and dtype != "fp32"):
        widen(model, IR_DTYPES[dtype], rounded=not wide)
        common.RemoveUnusedNodesPass()(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        return open_session(path, bundle.folder, library, as_deployed)


def open_session(
    path: Path, weights_folder: Path | None = None, library: Path | None = None, as_deployed: bool = False
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # PyTorch's threads are its neighbours: it has as many, which do not wait for work for long.
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    if not as_deployed:
        # ONNX Runtime makes MatMulNBits of such products; its default is an accuracy level of 4.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    try:
        if library is not None:
            options.register_custom_ops_library(str(library.resolve()))
        if weights_folder is None:
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"{path.name}: ONNX Runtime {ort.__version__} cannot load it ({error}).") from None


_NUMPY_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def run_session(session: ort.InferenceSession, feeds: Feeds, more: Mapping[str, np.ndarray] | None = None) -> Feeds:
    """Feed a session what it takes of `feeds`, cast to its types; every output by name.

    Args:
        more: inputs that have a default, as they are; bfloat16 by its bits.
    """
    types = {value.name: _NUMPY_TYPES[value.type] for value in session.get_inputs()}
    with np.errstate(over="ignore"):
        inputs = {name: feeds[name].astype(kind) for name, kind in types.items()}
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, run_once(session, names, inputs | dict(more or {})), strict=True))
    except Exception as error:  # ONNX Runtime has no type for what a model makes of its input
        raise ExportError(f"ONNX Runtime {ort.__version__} cannot run the model ({first_line(error)}).") from None
