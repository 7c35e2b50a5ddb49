"""The TensorRT plugin: its life cycle through its own interfaces, and a real registry and parser (TensorRT-RTX's)."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from teamlora_export.engine.gpu import find_gpu
from teamlora_export.engine.plugin import check_plugin, read_plugin
from teamlora_export.engine.runtime import Messages, open_runtime
from teamlora_export.errors import ExportError
from teamlora_export.graph import op

ROOT = Path(__file__).parents[2]


def test_the_definition_is_the_same_in_python_and_in_cpp(plugin):
    text = (ROOT / "plugins" / "op.h").read_text()
    strings = {
        name: tuple(re.findall(r'"([^"]*)"', value)) for name, value in re.findall(r"(kOp\w+)\S* = ([^;]+);", text)
    }
    assert strings["kOpName"] == (op.NAME,)
    assert strings["kOpDomain"] == (op.DOMAIN,)
    assert strings["kOpVersionText"] == (str(op.VERSION),)
    assert f"kOpVersion = {op.VERSION};" in text
    assert strings["kOpInputs"] == op.INPUTS
    assert strings["kOpAdaptersVersionText"] == (str(op.ADAPTERS_VERSION),)
    assert f"kOpAdaptersVersion = {op.ADAPTERS_VERSION};" in text
    assert strings["kOpOptionalInputs"] == op.OPTIONAL_INPUTS
    assert strings["kOpAttributes"] == op.ATTRIBUTES
    limits = (ROOT / "plugins" / "kernels" / "mixed_expert.h").read_text()
    assert f"kMaxExperts = {op.MOST_EXPERTS_ON_GPU};" in limits and f"kMaxRank = {op.MOST_RANK_ON_GPU};" in limits
    check_plugin(plugin)


def test_the_life_cycle_through_its_own_interfaces(programs, plugin):
    """Of the plugin itself, whose launch fails without a GPU, and of one around the emulated kernels, which runs."""
    libraries = {programs / "libteamlora_tensorrt_emulated.so": "runs"}
    if find_gpu() is None:
        libraries[plugin.path] = "fails"
    for library, mode in libraries.items():
        result = subprocess.run([programs / "life_cycle", library, mode], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        assert f"{64 if mode == 'runs' else 63} passed, 0 failed" in result.stdout


def test_nothing_but_the_entry_points_leaves_the_library_and_nothing_is_left_undefined(plugin):
    symbols = subprocess.run(["nm", "-D", plugin.path], capture_output=True, text=True, check=True).stdout
    defined = set(re.findall(r" [TBDRVW] (\w+)", symbols))
    assert defined == {"getCreators", "setLoggerFinder", "teamlora_plugin_info"}
    undefined = re.findall(r" U (\w+)", symbols)
    assert not [name for name in undefined if "nvinfer" in name.lower() or name.startswith("cu")]


def in_a_process(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with TensorRT-RTX's registry in it."""
    command = [sys.executable, "-c", _PROCESS + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


_PROCESS = """
import ctypes, sys
from pathlib import Path
from teamlora_export.engine.plugin import load_plugin, read_plugin
from teamlora_export.engine.runtime import Messages, open_runtime
messages, runtime = Messages(), open_runtime("rtx")
trt, logger = runtime.trt, runtime.logger(messages)
builder = trt.Builder(logger)
registry = builder.get_plugin_registry()
def there():
    return sum(creator.name == "MixedExpertProjection" for creator in registry.all_creators_recursive)
"""


def test_a_process_that_only_opens_the_library_has_the_creator(plugin):
    """As Triton's back end does; and the same process may ask its registry to load the library all the same."""
    done = in_a_process(
        """
print(there())
ctypes.CDLL(sys.argv[1])
creator = registry.get_creator("MixedExpertProjection", "1", "")
print(there(), creator.name, creator.plugin_version, len(messages.errors))
handle = registry.load_library(sys.argv[1])
print(handle is not None, there(), len(messages.errors))
registry.deregister_library(handle)
print(there())
""",
        plugin.path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0", "1 MixedExpertProjection 1 0", "True 1 0", "0"]


def test_building_and_validating_in_one_process_load_the_plugin_once(plugin):
    """TensorRT-RTX's registry stands in for TensorRT's."""
    done = in_a_process(
        """
import dataclasses
library = read_plugin(Path(sys.argv[1]))
runtime = dataclasses.replace(runtime, version=library.tensorrt)
for changes in ({}, {}, {"sha256": "0" * 64}, {"tensorrt": "99.1.0"}):
    try:
        load_plugin(dataclasses.replace(library, **changes), runtime)
        print(there())
    except Exception as error:
        print(str(error).split("): ")[1])
""",
        plugin.path,
    )
    assert done.returncode == 0, done.stderr
    first, second, other_build, other_version = done.stdout.splitlines()
    assert (first, second) == ("1", "1")
    assert other_build == "this process has another build of the plugin. Start a new one."
    assert "is not for TensorRT" in other_version


def test_the_library_opens_and_closes_where_there_is_no_tensorrt(plugin):
    program = "import _ctypes, ctypes, sys; _ctypes.dlclose(ctypes.CDLL(sys.argv[1])._handle); print('closed')"
    done = subprocess.run([sys.executable, "-c", program, plugin.path], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@pytest.mark.parametrize("major", [9, 12])
def test_a_tensorrt_of_another_major_version_is_given_no_creator_and_told_why(plugin, major, tmp_path):
    """A stand-in of that name, whose registry must not be touched."""
    source, library = tmp_path / "other.c", tmp_path / f"libnvinfer.so.{major}"
    source.write_text(
        f"int getInferLibVersion(void) {{ return {major}0304; }}\n"
        f"int getInferLibMajorVersion(void) {{ return {major}; }}\n"
        "void* getPluginRegistry(void) { return (void*)1; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library, f"-Wl,-soname,{library.name}"], check=True)
    program = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
count = ctypes.c_int32(7)
ctypes.CDLL(sys.argv[2]).getCreators(ctypes.byref(count))
print(count.value)
"""
    done = subprocess.run([sys.executable, "-c", program, library, plugin.path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    built_for = plugin.tensorrt.partition(".")[0]
    assert f"headers of TensorRT {built_for}, and this process has version {major}0304" in done.stderr


@pytest.fixture(scope="module")
def registry(plugin):
    """TensorRT-RTX's registry with our library in it, and what it logs."""
    messages = Messages()
    runtime = open_runtime("rtx")
    logger = runtime.logger(messages)
    builder = runtime.trt.Builder(logger)
    registry = builder.get_plugin_registry()
    handle = registry.load_library(str(plugin.path))
    assert handle is not None
    yield runtime.trt, registry, messages
    registry.deregister_library(handle)


def fields(trt, **values):
    kinds = {"num_experts": np.int32, "shared_down": np.int32, "out_splits": np.int32}
    return trt.PluginFieldCollection(
        [trt.PluginField(n, np.array(v, kinds[n]), trt.PluginFieldType.INT32) for n, v in values.items()]
    )


def test_a_real_registry_finds_the_creator_and_makes_plugins_in_both_phases(registry, capfd):
    trt, registry, messages = registry
    creator = registry.get_creator(op.NAME, str(op.VERSION), "")
    assert creator is not None
    attributes = fields(trt, num_experts=[4], shared_down=[0], out_splits=[576, 192, 192])
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        made = creator.create_plugin("layer0", attributes, phase)
        assert made is not None, messages.errors
    wrong = fields(trt, num_experts=[99], shared_down=[0], out_splits=[576])
    assert creator.create_plugin("layer7.down_proj", wrong, trt.TensorRTPhase.BUILD) is None
    # TensorRT-RTX gives plugins no logger; without one, errors go to standard error.
    assert "layer7.down_proj: attribute num_experts is 99" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_experts": 99, "shared_down": 0, "out_splits": [6]}, "num_experts is 99"),
        ({"num_experts": 2, "shared_down": 7, "out_splits": [6]}, "shared_down is neither 0 nor 1"),
        ({"num_experts": 2, "shared_down": 0, "out_splits": [1, 2, 1, 1, 1]}, "out_splits has 5 elements"),
        ({"num_experts": 2, "shared_down": 0}, "out_splits is missing"),
    ],
)
def test_the_real_parser_hands_the_attributes_of_a_node_to_the_creator(attributes, message, plugin, tmp_path):
    """Shown by what the creator says of wrong ones: it has read their names and values.

    (With right ones TensorRT-RTX would end the process, as it takes no plugins of others into a network.)
    """
    shapes = {"x": [1, 3, 8], "base": [1, 3, 6], "down": [6, 8], "mix": [1, 2, 2], "up": [4, 6]}
    values = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s)) for n, s in shapes.items()]
    node = ir.node(op.NAME, values, attributes, domain=op.DOMAIN, name="layer3.q_proj")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(shapes["base"])
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 20, op.DOMAIN: 1}, name="one")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "one.onnx")
    program = """
registry.load_library(sys.argv[1])
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed:", parser.parse_from_file(sys.argv[2]))
"""
    result = in_a_process(program, plugin.path, tmp_path / "one.onnx")
    assert "parsed: False" in result.stdout, result.stderr
    assert f"layer3.q_proj: attribute {message}" in result.stderr


def test_a_library_that_does_not_match_is_refused(plugin, tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        read_plugin(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(ExportError, match="not a plugin library of teamlora-export"):
        read_plugin(tmp_path / "text.so")
    source = tmp_path / "other.c"
    source.write_text('const char* teamlora_plugin_info(void) { return "{}"; }')
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "other.so"], check=True)
    with pytest.raises(ExportError, match="lacks getCreators"):
        read_plugin(tmp_path / "other.so")
    with pytest.raises(ExportError, match=r"version 1 .* the model needs .* version 2"):
        check_plugin(dataclasses.replace(plugin, op_version=1))
