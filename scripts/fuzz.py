"""A campaign of bad input against every command and the deployed program, as long as one likes.

    python scripts/fuzz.py [--cases 1000 | --minutes 30] [--seed 1] [--kinds adapter base] [--only 17] [--keep FOLDER]

Each case spoils one thing in a copy of a small world (two bases with adapters, their bundles, an engine, a deployment)
and runs one command on it, in a child that is forked from this process after everything is imported. What must hold:

- exit code 0, 1 (`validate` alone) or 2; with 2, one message of at most 4 kB on standard error
- no traceback, no control character, no message that calls itself a fault of ours
- at most 20 s of processor time, a minute where it does not work, 2 GB of memory
- nothing is changed but what the command was told to write, and with 2 not even that; no text from outside is copied

A case is decided by seed, number and kinds alone: `--only N` with the same of both runs it again, `--keep` leaves its
folder.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of a pool do not live on in a forked child.
os.environ["OMP_NUM_THREADS"] = "1"

import onnxruntime
import tokenizers
import torch
import transformers
from fuzz_cases import KINDS, SECRET, Case, copy_world, make_case

from teamlora_export import cli, export, inspect  # noqa: F401
from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bench import run as _bench_run  # noqa: F401
from teamlora_export.bundle import read_bundle
from teamlora_export.deploy import cpp, genai, python, runner, triton  # noqa: F401
from teamlora_export.engine.build import BuildOptions, build_engine
from teamlora_export.graph import build  # noqa: F401
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.validate import run as _validate_run  # noqa: F401

# A graph that must be traced anew takes some 8 s; what waits for nothing is seen by the clock on the wall.
SECONDS, IDLE_SECONDS, BYTES, LONGEST = 20.0, 60.0, 2 << 30, 4096
# Packages that import much of themselves late, and start no thread then.
_SLOW = ("torch.", "transformers.", "onnxscript.", "sympy.")


@dataclass(frozen=True)
class Outcome:
    """How a case ended. `problems` is empty where all holds."""

    case: Case
    code: int
    seconds: float
    output: str
    problems: tuple[str, ...]


def make_world(folder: Path) -> None:
    """Bases, adapters, bundles, an engine and a deployment, all tiny and real."""
    os.environ["TEAMLORA_EXPORT_CACHE"] = str(folder / "cache")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = transformers.LlamaConfig(
        **sizes, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0
    )
    encoder = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(decoder).save_pretrained(folder / "base")
    transformers.AutoModel.from_config(encoder).save_pretrained(folder / "encoder")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(94))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    for base, adapter, bundle, targets in (
        ("base", "adapter", "bundle", ("q_proj", "v_proj", "down_proj")),
        ("encoder", "encoder-adapter", "encoder-bundle", ("query", "value")),
    ):
        fast.save_pretrained(folder / base)
        config = AdapterConfig(r=4, lora_alpha=4.0, lora_nums=2, target_modules=targets)
        write_adapter(new_adapter(open_base(str(folder / base)).signature, config, 0, 0.1), folder / adapter)
        export.export_onnx(str(folder / base), folder / adapter, folder / bundle)
    made = read_bundle(folder / "bundle")
    python.deploy_python(made, folder / "dist")
    build_engine(made, BuildOptions(runtime="rtx", capabilities=("8.9",)), folder / "bundle/engines/small.engine")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.txt").write_text(SECRET)
    (folder / "sibling.txt").write_text("not yours")
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_shared.so"
    shutil.copyfile(library, folder / "real.so")


def run_case(world: Path, scratch: Path, seed: int, number: int, kinds: Sequence[str] = ()) -> Outcome:
    """Run case `number` of `seed` in `scratch`/case, which is left for whoever wants to look at it."""
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    copy_world(world, folder)
    case = make_case(random.Random(f"{seed}/{number}"), folder, kinds)
    before = snapshot(folder)
    code, seconds, output, problems = _run(case, folder, scratch)
    problems += judge_message(case, code, output)
    problems += judge_files(case, code, before, snapshot(folder), folder)
    return Outcome(case, code, seconds, output, tuple(problems))


def _run(case: Case, folder: Path, scratch: Path) -> tuple[int, float, str, list[str]]:
    files = [scratch / "stdout", scratch / "stderr"]
    for path in files:
        path.write_bytes(b"")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_child(case, folder, files)
    problems: list[str] = []
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        wall = time.monotonic() - started
        if ended:
            break
        worked = _processor_seconds(child)
        if worked > SECONDS or wall > max(IDLE_SECONDS, 30 * worked):
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            problems.append(f"did not end ({wall:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of processor time)")
            break
        time.sleep(0.005)
    if usage.ru_maxrss * 1024 > BYTES:
        problems.append(f"took {usage.ru_maxrss / 1e6:.1f} GB of memory")
    output = "\n".join(path.read_text(encoding="utf-8", errors="backslashreplace") for path in files)
    return os.waitstatus_to_exitcode(status), wall, output, problems


def _be_child(case: Case, folder: Path, files: list[Path]) -> None:
    """Run the command as a process of its own would, and end."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["TEAMLORA_EXPORT_CACHE"] = str(folder / "cache")
        # Something that asks for all of the memory fails, and the machine lives on.
        resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(files[1], os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        _lead_standard_output(case.stdout, files[0])
        sys.argv = [case.program, *case.arguments]
        if case.program == "cli":
            cli.main()
        else:
            # It imports the files beside it.
            sys.path.insert(0, str(folder / case.program))
            program = compile((folder / case.program / "runner.py").read_text(), "runner.py", "exec")
            exec(program, {"__name__": "__main__", "__file__": str(folder / case.program / "runner.py")})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                code = 120
        os._exit(code)


def _lead_standard_output(where: str, file: Path) -> None:
    encoding = "ascii" if where == "ascii" else "utf-8"
    if where == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]
        return
    if where == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full" if where == "full" else file, os.O_WRONLY)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)


def _processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def judge_message(case: Case, code: int, output: str) -> list[str]:
    problems = []
    allowed = (0, 1, 2) if "validate" in case.arguments else (0, 2)
    if code not in allowed:
        problems.append(f"ended with {code}")
    for words in ("Traceback (most recent", "fault of teamlora-export", "Exception ignored", "do you wish to run"):
        if words.lower() in output.lower():
            problems.append(f"says {words!r}")
    if found := re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", output):
        problems.append(f"prints the control character {found[0]!r}")
    messages = re.findall(r"^(?:Error: |.*: error: )", output, re.MULTILINE)
    if code == 2 and len(messages) != 1:
        problems.append(f"has {len(messages)} messages")
    if code == 2 and messages and len(output[output.index(messages[0]) :].encode()) > LONGEST:
        problems.append("has a message that is too long")
    return problems


def judge_files(case: Case, code: int, before: dict[str, str], after: dict[str, str], folder: Path) -> list[str]:
    """What was changed, made or removed without leave."""
    written = os.path.normpath(case.out) if case.out and code == 0 else None
    places = [written or "", *map(os.path.normpath, case.changes)]
    problems = []
    for name in sorted(set(before) | set(after)):
        allowed = written is not None and (name == written or name.startswith(f"{written}/"))
        # A place may need folders of its own.
        parent = name not in before and any(place.startswith(f"{name}/") for place in places)
        free = allowed or parent or name in case.changes or name.startswith("cache/")
        if before.get(name) != after.get(name) and not free:
            problems.append(f"{name} was {'changed' if name in before and name in after else 'made or removed'}")
        if allowed and _holds_secret(folder / name):
            problems.append(f"{name} holds text from outside")
    return problems[:5]


def _holds_secret(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 1 << 24 and SECRET.encode() in path.read_bytes()


def snapshot(folder: Path) -> dict[str, str]:
    """Every path under `folder` with what it is: kind, size and hash, or where a link leads. What Python compiles of a
    program that runs is no part of it."""
    return dict(_entries(folder, ""))


def _entries(folder: Path, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in os.scandir(folder):
        if entry.name == "__pycache__":
            continue
        name = f"{prefix}{entry.name}"
        if entry.is_symlink():
            yield name, f"link to {os.readlink(entry.path)}"
        elif entry.is_dir():
            yield name, "folder"
            yield from _entries(Path(entry.path), f"{name}/")
        elif entry.is_file() and entry.stat().st_size < 1 << 30:
            yield name, hashlib.sha256(Path(entry.path).read_bytes()).hexdigest()
        else:
            yield name, f"{entry.stat().st_mode:o} {entry.stat().st_size}"


def make_world_apart(folder: Path) -> None:
    """Make the world in a child, so that this process never starts a thread, and import what that imported: the
    modules that wait for a trace are many, and each case would import them again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            known = set(sys.modules)
            make_world(folder)
            new = [name for name in list(sys.modules) if name not in known and name.startswith(_SLOW)]
            with os.fdopen(writer, "w") as pipe:
                pipe.write("\n".join(new))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        names = pipe.read().split()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError("the world could not be made")
    for name in names:
        # Not every name is that of a file.
        with suppress(ImportError):
            importlib.import_module(name)


def describe(number: int, outcome: Outcome) -> str:
    lines = [f"case {number}: {outcome.case.label}", f"  {' '.join(outcome.case.arguments)!r:.300}"]
    lines += [f"  {problem}" for problem in outcome.problems]
    return "\n".join([*lines, *(f"    | {line:.200}" for line in outcome.output.strip().splitlines()[-12:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="run so long, however many cases that is")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=(), help="spoil these only")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    given = parser.parse_args()
    root = given.keep or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "world").is_dir():
        make_world_apart(root / "world")
    # What is here is no child's garbage, and stays in memory that all share.
    gc.freeze()
    end = time.monotonic() + given.minutes * 60 if given.minutes else None
    failed = done = 0
    codes: dict[int, int] = {}
    seconds: dict[str, float] = {}
    numbers = iter(range(1 << 40)) if end else iter(range(given.cases))
    for number in [given.only] if given.only is not None else numbers:
        if end and time.monotonic() > end:
            break
        outcome = run_case(root / "world", root, given.seed, number, given.kinds)
        done += 1
        codes[outcome.code] = codes.get(outcome.code, 0) + 1
        kind = outcome.case.label.partition(":")[0]
        seconds[kind] = seconds.get(kind, 0.0) + outcome.seconds
        if outcome.problems or given.only is not None:
            failed += bool(outcome.problems)
            print(describe(number, outcome), flush=True)
    print(f"{done} cases of seed {given.seed}, {failed} failed; exit codes {dict(sorted(codes.items()))}")
    print("Seconds: " + ", ".join(f"{kind} {time:.0f}" for kind, time in sorted(seconds.items())))
    if given.keep is None:
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
