"""Chat templates, rendered as transformers renders them, and what a template cannot do."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from conftest import get_model
from transformers import AutoTokenizer
from waiting import SECONDS

from teamlora_export.deploy.chat import Chat, Template
from teamlora_export.deploy.failure import ModelError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Sort: "é", <b>'},
    {"role": "assistant", "content": "b é"},
    {"role": "user", "content": "Again\n"},
]
# Blocks on lines of their own, loop controls, JSON, tokens by name.
TEMPLATE = """
{%- for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% endif %}
{{ bos_token }}{{ message | tojson }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}>{% endif %}"""


def write(folder: Path, template: object, **fields: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **fields}))
    return folder


def test_a_real_models_template_gives_what_transformers_gives():
    folder = Path(get_model("smollm2"))
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert Template(folder).text(json.dumps(MESSAGES)) == expected
    assert "Be brief." in expected
    chat = Chat(folder)
    assert [chat.text(json.dumps(MESSAGES[:count])) for count in (4, 4)] == [expected] * 2
    chat.close()


@pytest.mark.parametrize("place", ["field", "named", "file"])
def test_a_template_is_found_and_rendered_as_transformers_does(place, tmp_path, make_base):
    tokenizer = AutoTokenizer.from_pretrained(make_base("llama").folder)
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if place == "file":
        (write(tmp_path, "not this", **tokens) / "chat_template.jinja").write_text(TEMPLATE)
    else:
        named = [{"name": "tools", "template": "not this"}, {"name": "default", "template": TEMPLATE}]
        write(tmp_path, TEMPLATE if place == "field" else named, **tokens)
    assert Template(tmp_path).text(json.dumps(MESSAGES)) == expected
    assert expected.startswith('<s>{"role": "user", "content": "Sort: \\"é\\", <b>"}</s>')


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools is not none or documents is not none %}With tools.{% endif %}",
        "{{ messages | tojson(indent=2, separators=(',', ':'), sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% set n = namespace(role='') %}{% for m in messages %}{% set n.role = m.role %}{% endfor %}{{ n.role }}",
        "{{ dict(a=1) | tojson }}",
    ],
)
def test_what_real_templates_use_is_there_as_in_transformers(template, tmp_path, make_base):
    tokenizer = AutoTokenizer.from_pretrained(make_base("llama").folder)
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert Template(write(tmp_path, template)).text(json.dumps(MESSAGES)) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'tokenizer_config.json' %}",
        "{{ dict.fromkeys('a') }}",
        "{{ namespace(__html__=raise_exception) }}",
        "{% set n = namespace() %}{% set n.__html__ = raise_exception %}",
        "{{ raise_exception('Roles must alternate.') }}",
    ],
)
def test_a_template_reaches_nothing_outside_and_may_refuse(template, tmp_path):
    chat = Template(write(tmp_path, template))
    with pytest.raises(ModelError, match="chat template cannot take these messages"):
        chat.text(json.dumps(MESSAGES))


def test_an_old_jinja_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"jinja2": "3.1.5"}[name])
    with pytest.raises(ModelError, match=r"need jinja2 3\.1\.6 or newer, not 3\.1\.5"):
        Template(write(tmp_path, "{{ messages }}"))


def test_what_is_no_template_and_what_are_no_messages_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has no chat template"):
        Template(tmp_path)
    # The second is too deep for Python's compiler, and the number of the third too long.
    deep = "{% for i in messages %}" * 30 + "{% endfor %}" * 30
    for template in ("{% if %}", deep, f"{{{{ {'9' * 5000} }}}}"):
        with pytest.raises(ModelError, match="chat template cannot be read"):
            Template(write(tmp_path, template))
    chat = Template(write(tmp_path, "{{ messages }}"))
    for messages in ("", "[", "[" * 100_000, "{}", "[]", "[1]", '[{"role": "user"}]', '[{"role": 1, "content": "a"}]'):
        with pytest.raises(ModelError, match="messages: give JSON"):
            chat.text(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(9999) %}{% for i in range(9999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    ],
    ids=["time", "memory", "length"],
)
def test_a_template_that_takes_too_much_is_ended_and_the_next_conversation_is_answered(template, tmp_path):
    folder = write(tmp_path, f"{{% if messages | length > 1 %}}{template}{{% endif %}}{{{{ messages[0].content }}}}")
    chat = Chat(folder, seconds=1)
    with pytest.raises(ModelError, match="takes more time or memory than it may"):
        chat.text(json.dumps(MESSAGES))
    chat._seconds = SECONDS
    assert chat.text(json.dumps(MESSAGES[:1])) == "Be brief."
    chat.close()


def test_what_is_wrong_is_said_by_the_process_as_well(tmp_path):
    for template, message in (
        ("{% if %}", "cannot be read"),
        ("{{ raise_exception('Roles \ud800 must alternate.') }}", "Roles \ud800 must alternate"),
    ):
        chat = Chat(write(tmp_path, template))
        for _ in range(2):
            with pytest.raises(ModelError, match=message):
                chat.text(json.dumps(MESSAGES))
        with pytest.raises(ModelError, match="messages: give JSON"):
            chat.text("[]")
        chat.close()
