"""A conversation as the text that a model was trained to go on from, by the template that came with the model.

A template is a program of whoever made the model. It runs in jinja2's sandbox, as in transformers: it sees the messages
and a few names, changes nothing, and reaches no attribute that leads out. The sandbox limits neither time nor memory.
So it runs in a process of its own, which does: `Chat` starts this file as one, and sends it conversations.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.model_folder import read_bytes, read_json
else:
    # Deployed: the files lie beside one another.
    from failure import ModelError, brief
    from model_folder import read_bytes, read_json

# Tokens that templates name, as tokenizer_config.json has them.
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What transformers gives besides: a name that is none differs from one that is not known.
_GIVEN = {"add_generation_prompt": True, "tools": None, "documents": None}
# Templates reach out of the sandbox of older ones.
_OLDEST_JINJA = (3, 1, 6)
# Of the process, beyond what it has when it starts; and of its answers.
_MOST_MEMORY = 512 << 20
_MOST_BYTES = 16 << 20
# A busy machine may take a while to start it. A conversation takes milliseconds.
_SECONDS_TO_START = 60.0
_SECONDS = 5.0


class Chat:
    """The template of the model in a folder, rendered in a process that is limited; many threads may ask it.

    The process is started when it is first asked, and kept until it fails.
    """

    def __init__(self, folder: Path, seconds: float = _SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def text(self, messages: str) -> str:
        """See `Template.text`.

        Raises:
            ModelError: as `Template` does, or the template takes too much time or memory.
        """
        turns = _read_messages(messages)
        with self._lock:
            answer = self._ask(json.dumps(turns).encode())
        if "error" in answer:
            raise ModelError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, line: bytes) -> dict[str, str]:
        try:
            if self._process is None:
                self._process = self._start()
                self._answer(self._process, _SECONDS_TO_START)
            assert self._process.stdin is not None
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
            return self._answer(self._process, self._seconds)
        except (OSError, ValueError):
            self.close()
            return {"error": "The model's chat template takes more time or memory than it may."}

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Each thread of a library takes memory of its own.
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(self._folder)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment)

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, str]:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return json.loads(process.stdout.readline(_MOST_BYTES))


def _serve(folder: Path) -> None:
    """The process: a conversation in JSON on each line in, its text or what is wrong on each line out."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MOST_MEMORY,) * 2)
    template: Template | ModelError
    try:
        template = Template(folder)
    except ModelError as error:
        template = error
    print("{}", flush=True)
    for line in sys.stdin:
        try:
            if isinstance(template, ModelError):
                raise template
            answer = {"text": template.render(json.loads(line))}
        except ModelError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


class Template:
    """The template of the model in a folder.

    Raises:
        ModelError: the model has none, jinja2 is not installed or too old, or the template is none of jinja2's.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        self._names = {name: token for name in _TOKENS if (token := _content(config.get(name))) is not None}
        self._render = _compile(_source(folder, config))

    def text(self, messages: str) -> str:
        """The text up to where the answer begins, its special tokens included.

        Args:
            messages: JSON, [{"role": ..., "content": ...}, ...].
        """
        return self.render(_read_messages(messages))

    def render(self, turns: Sequence[Mapping[str, str]]) -> str:
        try:
            return self._render({**_GIVEN, "messages": turns, **self._names})
        except MemoryError:
            raise
        except Exception as error:
            raise ModelError(f"The model's chat template cannot take these messages ({brief(error)}).") from None


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    found = config.get("chat_template")
    if path.is_file():
        found = read_bytes(path).decode(errors="replace")
    elif isinstance(found, list):
        # Several, by their names.
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ModelError("The model has no chat template: give text_input.")
    return found


def _compile(source: str) -> Callable[[Mapping[str, Any]], str]:
    try:
        from importlib.metadata import version

        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace
    except ModuleNotFoundError:
        raise ModelError("Chat templates need jinja2, which is not installed there: pip install jinja2") from None
    installed = version("jinja2")
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:3]) < _OLDEST_JINJA:
        oldest = ".".join(map(str, _OLDEST_JINJA))
        raise ModelError(f"Chat templates need jinja2 {oldest} or newer, not {installed}: pip install -U jinja2")

    class Generation(Extension):
        """`{% generation %}`: marks an answer's text for training, and has a scope of its own."""

        tags = {"generation"}  # noqa: RUF012 - as its base declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class PublicNamespace(Namespace):
        """Without the names by which Python looks for what an object can do."""

        def __init__(*args: Any, **fields: Any) -> None:
            given = dict(*args[1:], **fields)
            for name in given:
                _require_public(name)
            Namespace.__init__(args[0], given)

        def __setitem__(self, name: str, value: Any) -> None:
            _require_public(name)
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    # A function in place of the class, which has more to call.
    environment.globals["dict"] = lambda *args, **fields: dict(*args, **fields)
    environment.globals["namespace"] = PublicNamespace
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source).render
    except Exception as error:
        # Python's own compiler has limits, too.
        raise ModelError(f"The model's chat template cannot be read ({brief(error)}).") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise ModelError(f"A namespace has no {name!r:.80}.")


def _refuse(message: object) -> NoReturn:
    raise ModelError(str(message))


def _read_messages(messages: str) -> Sequence[Mapping[str, str]]:
    try:
        turns = json.loads(messages)
    except (ValueError, RecursionError):
        turns = None
    is_list = isinstance(turns, list) and len(turns) > 0
    if not is_list or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    ):
        raise ModelError('messages: give JSON of the form [{"role": "user", "content": "Some text"}].')
    return turns


def _content(token: object) -> str | None:
    """A token's text; files have it alone, or with what else they know of it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
