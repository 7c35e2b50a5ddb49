"""`teamlora-export bench` as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import teamlora_export
from teamlora_export.bench import rows
from teamlora_export.bench.alone import measure_alone
from teamlora_export.bench.run import BODY, BYPASSED, EAGER, NATIVE, BenchOptions, bench_bundle, choose_workloads
from teamlora_export.bench.turns import AGAIN, Workload
from teamlora_export.bundle import read_bundle
from teamlora_export.cli import _WrongUsage as WRONG_USAGE
from teamlora_export.cli import app
from teamlora_export.deploy.cores import usable_cores
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.errors import ExportError
from teamlora_export.page import refuse_foreign_report

BRIEF = ("--count", "3", "--turns", "2")


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teamlora_export.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})


def test_every_figure_is_in_the_json_the_page_and_the_plot(make_bundle, tmp_path):
    report, plot, figures = tmp_path / "bench.html", tmp_path / "bench.png", tmp_path / "bench.json"
    places = ("--report", report, "--plot", plot, "--json", figures)
    lengths = ("--length", 5, "--lengths", 9, "--batch", 1, "--batch", 2)
    done = run(make_bundle("llama").folder, *BRIEF, *lengths, *places, TEAMLORA_EXPORT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "Native op: left out. No native op was built here" in done.stderr
    assert "Too few turns to tell" in done.stdout
    found = json.loads(figures.read_text())
    assert (found["baseline"], found["turns"], found["quiet"]) == (BYPASSED, 2, False)
    assert found["threads"] == found["machine"]["cores"] == usable_cores()
    assert {alone["row"] for alone in found["alone"]} == {BYPASSED, BODY}
    assert all(alone["load_seconds"] > 0 and alone["bytes"] > 1 << 20 for alone in found["alone"])
    places = {(f["row"], f["quantity"], f["batch"], f["length"]) for f in found["figures"]}
    assert places == {
        (row, quantity, batch, length)
        for row in (BYPASSED, BODY, AGAIN)
        for quantity in ("prefill", "decode")
        for batch in (1, 2)
        for length in (5, 9)
    }
    for figure in found["figures"]:
        assert len(figure["seconds"]) == 2 and min(figure["seconds"]) > 0
        if figure["row"] == BODY:
            assert figure["floor"]["bytes"] > 1.1 and figure["floor"]["operations"] > 1.1
    page = report.read_text()
    assert page.count("<svg") == 8
    assert "http" not in page.replace("http://www.w3.org", ""), "the page needs no network"
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Reports replace reports.
    refuse_foreign_report(report)
    refuse_foreign_report(plot)


def test_a_shelf_is_measured_with_one_adapter_with_several_and_with_none(make_shelf, tmp_path, monkeypatch):
    """What rows have is what their names say: three slots, five adapters."""
    asked: dict[tuple[str | None, ...], int] = {}
    ask = Model.ask

    def watched(self: Model, prompts: list[list[int]], *given: object, **options: Any) -> object:
        names = tuple(options["adapters"] or ())
        asked[names] = asked.get(names, 0) + 1
        return ask(self, prompts, *given, **options)

    monkeypatch.setattr(Model, "ask", watched)
    places = ("--json", tmp_path / "bench.json", "--report", tmp_path / "bench.html", "--no-memory")
    given = (make_shelf().folder, *BRIEF, "--length", 5, "--batch", 4, *places, "--library", build_library().path)
    app(["bench", *map(str, given)], standalone_mode=False)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["adapters"] == ["team", "small", "lora"]
    ways = ("one adapter", "mixed adapters", "base alone")
    rows = {f"{op}, {way}" for op in (BODY, NATIVE) for way in ways}
    assert {figure["row"] for figure in found["figures"]} == {BYPASSED, AGAIN, *rows}
    # Body and native op, two turns and the one before them; the baseline has no shelf.
    names = [("team",) * 4, ("team", "small", "lora", "team"), (None,) * 4]
    assert asked == {**dict.fromkeys(names, 6), (): 6}
    floors = {f["row"]: f["floor"]["bytes"] for f in found["figures"] if f["quantity"] == "decode" and f["floor"]}
    one, mixed, base = (floors[f"{NATIVE}, {way}"] for way in ways)
    assert base == 1 < one < mixed
    assert mixed - 1 == pytest.approx(3 * (one - 1))
    assert "team, small, lora" in (tmp_path / "bench.html").read_text()


def test_of_a_shelf_those_are_measured_that_are_named_beside_pytorch_with_the_first(make_shelf, make_bundle):
    brief = BenchOptions(lengths=(5,), batches=(2,), count=2, turns=1, memory=False, pytorch=True, only=("moe",))
    benchmark = bench_bundle(make_shelf(), brief)
    assert benchmark.adapters == ("moe",)
    rows = {figure.row for figure in benchmark.figures}
    assert {f"{BODY}, one adapter", f"{BODY}, base alone", f"{EAGER}, one adapter"} <= rows
    assert not any("mixed" in row for row in rows)
    with pytest.raises(ExportError, match="has no adapter 'nobody'; it has hydra, lora"):
        bench_bundle(make_shelf(), replace(brief, only=("nobody",)))
    with pytest.raises(ExportError, match="and no shelf"):
        bench_bundle(make_bundle("llama"), brief)


def test_what_cannot_be_printed_is_kept_in_files_all_the_same(make_bundle, tmp_path):
    """A reader that is gone, or a full disk, costs no measurement."""
    places = {name: tmp_path / f"bench.{name}" for name in ("html", "png", "json")}
    options = ("--report", places["html"], "--plot", places["png"], "--json", places["json"], "--no-memory")
    command = [sys.executable, "-m", "teamlora_export.cli", "bench", make_bundle("llama").folder, *BRIEF, *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*map(str, command), "--length", "5"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("Error: The result cannot be printed (No space left on device).\n")
    assert all(place.stat().st_size > 1000 for place in places.values())
    assert json.loads(places["json"].read_text())["figures"]


def test_a_text_generator_is_measured_beside_pytorch(make_bundle):
    options = BenchOptions(lengths=(6,), batches=(2,), count=2, turns=1, pytorch=True, memory=False)
    benchmark = bench_bundle(make_bundle("llama"), options)
    assert {f.quantity for f in benchmark.figures if f.row == EAGER} == {"prefill", "decode"}


def test_lengths_are_those_that_the_model_takes(make_bundle):
    """The tiny Llama takes 128 tokens."""
    bundle = make_bundle("llama")
    assert choose_workloads(bundle, BenchOptions(batches=(1,), count=27)) == [Workload(1, 64, 27), Workload(1, 100, 27)]
    assert choose_workloads(bundle, BenchOptions(lengths=(100,), batches=(1,), count=27)) == [Workload(1, 100, 27)]
    with pytest.raises(ExportError, match=r"--length 101: the model takes 128 tokens, and 28 follow.*Give 100 at most"):
        choose_workloads(bundle, BenchOptions(lengths=(101,), count=27))
    with pytest.raises(ExportError, match="--count 128"):
        choose_workloads(bundle, BenchOptions(count=128))
    assert choose_workloads(make_bundle("bert"), BenchOptions(batches=(8,))) == [
        Workload(8, 64, 0),
        Workload(8, 130, 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BUNDLE", "--length", "0"], "greater than or equal to 1"),
        (["BUNDLE", "--batch", "1000000"], "less than or equal to 1024"),
        (["BUNDLE", "--turns", "0"], "greater than or equal to 1"),
        (["BUNDLE", "--length", "4000"], "the model takes 128 tokens"),
        (["BUNDLE", "--library", "MINE"], "not a library of teamlora-export's op"),
        (["BUNDLE", "--plot", "MINE"], "is not a report that teamlora-export wrote"),
        (["BUNDLE", "--report", "MINE"], "is not a report that teamlora-export wrote"),
        (["BUNDLE", "--report", "MODEL"], "is not a report that teamlora-export wrote"),
        (["BUNDLE", "--report", "NEW", "--plot", "NEW"], "is to take two results"),
        (["BUNDLE", "--plot", "NEW", "--json", "NEW"], "is to take two results"),
        (["BUNDLE", "--pytorch", "--adapter", "nowhere"], "nowhere"),
        (["BUNDLE", "--adapter", "nowhere"], "are for PyTorch"),
        (["nowhere"], "is not a bundle"),
    ],
)
def test_wrong_arguments_are_one_message_before_anything_is_measured(arguments, message, make_bundle, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_text("not yours")
    bundle = make_bundle("llama").folder
    names = {"BUNDLE": bundle, "MODEL": bundle / "model.onnx", "MINE": mine, "NEW": tmp_path / "new"}
    with pytest.raises((ExportError, WRONG_USAGE), match=message):
        app(["bench", *(str(names.get(a, a)) for a in arguments)], standalone_mode=False)
    assert "turns of all" not in capsys.readouterr().err
    assert mine.read_text() == "not yours"


def test_a_bundle_in_bfloat16_or_a_changed_one_is_refused(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    with pytest.raises(ExportError, match="bfloat16"):
        bench_bundle(replace(bundle, manifest=replace(bundle.manifest, dtype="bf16")), BenchOptions())
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\1\2\3\4")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        bench_bundle(read_bundle(folder), BenchOptions())


@pytest.mark.parametrize(("package", "extra"), [("matplotlib", "bench"), ("onnxruntime", "cpu")])
def test_without_a_package_the_command_says_first_how_to_get_it(package, extra, make_bundle, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name='{package}')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(make_bundle("llama").folder, *BRIEF, "--plot", tmp_path / "plot.png", PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: {package} is not installed, and this command needs it: pip install 'teamlora-export[{extra}]'\n"
    )


def test_an_interruption_ends_every_process_and_leaves_nothing(make_bundle, tmp_path):
    """Ctrl-C goes to all processes of the terminal, a polite kill to one: while a row runs in a process of its own."""
    folder = Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "bundle"))
    for stop in (lambda process: os.killpg(process.pid, signal.SIGINT), lambda process: process.terminate()):
        command = [sys.executable, "-m", "teamlora_export.cli", "bench", folder, "--report", tmp_path / "page.html"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started, deadline = psutil.Process(process.pid), time.monotonic() + 60
        # The graphs lie beside the bundle before the first row runs.
        while len(list(tmp_path.iterdir())) < 2 or not (apart := started.children()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stop(process)
        assert process.communicate(timeout=60)[1].endswith("Error: Interrupted; nothing was written.\n")
        assert process.returncode == 2
        assert not psutil.wait_procs(apart, timeout=60)[1]
        assert list(tmp_path.iterdir()) == [folder]


def test_pytorch_has_as_many_threads_as_a_graph(make_bundle, monkeypatch):
    """It would take as many as OpenMP's variables say."""
    monkeypatch.setattr(rows, "usable_cores", lambda: 3)
    before = torch.get_num_threads()
    bundle = make_bundle("llama")
    sources = (str(bundle.manifest.base["source"]), str(bundle.manifest.adapter["source"]))
    try:
        for threads, expected in ((0, 3), (1, 1)):
            rows.TorchRow("row", *sources, "text-generation", "fp32", threads).open()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


class Broken:
    """A row whose process dies, or cannot open its model."""

    libraries = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self) -> object:
        if self.name == "dies":
            os._exit(7)
        raise ExportError("broken: a sentence.")


@pytest.mark.parametrize(
    ("name", "message"), [("dies", "dies: its process ended with code 7"), ("fails", "a sentence")]
)
def test_a_row_that_fails_in_a_process_of_its_own_is_told(name, message, monkeypatch):
    # So that the process finds the class.
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    monkeypatch.setattr(Broken, "__module__", "test_bench")
    monkeypatch.setitem(sys.modules, "test_bench", sys.modules[__name__])
    with pytest.raises(ExportError, match=message):
        measure_alone([Broken(name)], [[1]], 1, 1)


def test_nothing_is_taken_from_the_current_folder(make_bundle, tmp_path):
    """Which is a bundle's where none is named."""
    folder = Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "bundle"))
    for module in ("onnxruntime", "numpy", "pickle", "json", "ctypes"):
        (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "matplotlibrc").write_text("figure.facecolor: red\nno setting\n")
    options = (*BRIEF, "--batch", "1", "--length", "5", "--plot", str(tmp_path / "plot.png"))
    command = [sys.executable, "-P", "-m", "teamlora_export.cli", "bench", *options]
    path = str(Path(teamlora_export.__file__).parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert "matplotlibrc" not in done.stderr
    assert not (tmp_path / "ran").exists()
