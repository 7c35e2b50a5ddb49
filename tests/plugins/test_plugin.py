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
    assert strings["kOpAttributes"] == op.ATTRIBUTES
    check_plugin(plugin)


def test_the_life_cycle_through_its_own_interfaces(programs, plugin):
    result = subprocess.run([programs / "life_cycle", plugin.path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed, 0 failed", result.stdout)[1]) > 40  # type: ignore[index]


def test_nothing_but_the_entry_points_leaves_the_library_and_nothing_is_left_undefined(plugin):
    symbols = subprocess.run(["nm", "-D", plugin.path], capture_output=True, text=True, check=True).stdout
    defined = set(re.findall(r" [TBDRVW] (\w+)", symbols))
    assert defined == {"getCreators", "setLoggerFinder", "teamlora_plugin_info"}
    undefined = re.findall(r" U (\w+)", symbols)
    assert not [name for name in undefined if "nvinfer" in name.lower() or name.startswith("cu")]


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
    command = [sys.executable, "-c", _PARSE, str(plugin.path), str(tmp_path / "one.onnx")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "parsed: False" in result.stdout, result.stderr
    assert f"layer3.q_proj: attribute {message}" in result.stderr


_PARSE = """
import sys
from teamlora_export.engine.runtime import Messages, open_runtime
messages, runtime = Messages(), open_runtime("rtx")
trt, logger = runtime.trt, runtime.logger(messages)
builder = trt.Builder(logger)
builder.get_plugin_registry().load_library(sys.argv[1])
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
print("parsed:", parser.parse_from_file(sys.argv[2]))
print(*messages.errors, sep="\\n")
"""


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
    with pytest.raises(ExportError, match=r"version 2 .* the model needs .* version 1"):
        check_plugin(dataclasses.replace(plugin, op_version=2))
