"""Chat templates: rendered as transformers renders them, and caged."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
import time

import pytest

from bridge import ipc
from bridge.worker import chat
from bridge.worker.backend import Refusal
from bridge.worker.chat import ChatTemplate

# SmolLM2's own.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [ipc.Message("user", "Hello")]


def render(source: str, messages: list[ipc.Message] | None = None) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>").render(HELLO if messages is None else messages)


def failure(source: str, messages: list[ipc.Message] | None = None) -> str:
    with pytest.raises(Refusal) as caught:
        render(source, messages)
    assert caught.value.code == "template_error"
    return caught.value.message


# -- as templates expect ---------------------------------------------------------------------------------------


def test_a_conversation() -> None:
    turns = [
        ipc.Message("system", "Be brief."),
        ipc.Message("user", "Hi"),
        ipc.Message("assistant", "Hello"),
        ipc.Message("user", "How <|are|> {{ you }}?"),  # nobody's content is code
    ]
    assert render(SMOLLM2, turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nHow <|are|> {{ you }}?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_turn_has_the_keys_it_was_given() -> None:
    turns = [ipc.Message("user", "", name="ann"), ipc.Message("tool", "42", tool_call_id="c1")]
    assert render("{% for m in messages %}{{ m | tojson }}{% endfor %}", turns) == (
        '{"role": "user", "content": "", "name": "ann"}{"role": "tool", "content": "42", "tool_call_id": "c1"}'
    )
    assert render("{{ 'name' in messages[0] }} {{ tools is defined }}") == "False False"


def test_bos_and_eos() -> None:
    assert render("{{ bos_token }}a{{ eos_token }}") == "<s>a</s>"


def test_blocks_leave_no_blanks() -> None:
    assert render("{% if true %}\na\n  {% endif %}\nb") == "a\nb"


def test_loop_controls() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_tojson_is_plain_json() -> None:
    source = "{{ {'b': '<é>&', 'a': [1, none]} | tojson(%s) }}"
    assert render(source % "") == '{"b": "<é>&", "a": [1, null]}'
    assert render(source % "ensure_ascii=true, sort_keys=true") == '{"a": [1, null], "b": "<\\u00e9>&"}'
    assert render(source % "separators=(',', ':')") == '{"b":"<é>&","a":[1,null]}'
    indented = render(source % "indent=2")
    assert indented.startswith('{\n  "b"')
    assert json.loads(indented) == {"b": "<é>&", "a": [1, None]}


def test_strftime_now() -> None:
    assert re.fullmatch(r"\d\d \w+ \d{4}", render("{{ strftime_now('%d %B %Y') }}"))


# -- what goes wrong -------------------------------------------------------------------------------------------


def test_a_template_may_refuse_a_conversation() -> None:
    source = "{% if messages[0].role == 'user' %}{{ raise_exception('System first, please') }}{% endif %}ok"
    assert failure(source).endswith("System first, please")
    assert render(source, [ipc.Message("system", "")]) == "ok"


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'a", "{% endfor %}", "{% nonsense %}", "{{ a | nonsense }}"])
def test_syntax_errors(source: str) -> None:
    failure(source)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ none() }}", "{{ a.b }}"])
def test_errors_while_it_runs(source: str) -> None:
    failure(source)


def test_a_template_that_failed_can_be_used_again() -> None:
    template = ChatTemplate("{{ 1 / (messages | length - 1) }}", bos="", eos="")
    with pytest.raises(Refusal):
        template.render(HELLO)
    assert template.render(HELLO * 2) == "1.0"


# -- the cage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "walk",
    [
        "''.__class__.__mro__",
        "''['__class__']",
        "'' | attr('__class__')",
        "''.__class__.__base__.__subclasses__()",
        "messages.__class__.__init__.__globals__",
        "raise_exception.__globals__",
        "raise_exception.__code__.co_consts",
        "strftime_now.__self__",
        "self.__init__.__globals__",
        "cycler.__init__.__globals__.os.popen('id').read()",
        "lipsum.__globals__['os'].system('id')",
        "namespace.__init__.__globals__",
        "joiner.__init__.__globals__",
        "'{0.__class__.__mro__}'.format('')",
        "'{a.__class__}'.format_map({'a': ''})",
        "''.format.__self__.__class__",
        "self._TemplateReference__context.environment.globals",
        "(messages | map(attribute='__class__') | list)[0].__mro__",
        "messages | map('attr', '__class__') | list | tojson",
    ],
)
def test_no_way_out(walk: str) -> None:
    """Each fails or is undefined; none reaches a class, let alone a module."""
    with contextlib.suppress(Refusal):
        assert render("{{ " + walk + " }}") == ""


@pytest.mark.parametrize("change", ["messages.append(1)", "messages[0].update(a=1)", "messages.clear()"])
def test_messages_are_read_only(change: str) -> None:
    failure("{% set _ = " + change + " %}")


@pytest.mark.parametrize("file", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'a' %}"])
def test_no_files(file: str) -> None:
    failure(file)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% for i in range(9) %}{{ m(n) if n < 99 }}{% endfor %}{% endmacro %}{{ m(0) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "growth": "{% set n = namespace(a=[1]) %}{% for i in range(9999) %}"
    "{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a | string | length }}",
}


@pytest.fixture
def may_hit_a_finalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alarm may, and is lost there; the next one is not. That may be while pytest writes down the first."""
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)


@pytest.mark.usefixtures("may_hit_a_finalizer")
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.05)
    reason = failure(source)  # once: which of the two it is depends on how busy the machine is
    assert "more than 0.05 s" in reason or "recursion" in reason


@pytest.mark.usefixtures("may_hit_a_finalizer")
def test_a_template_that_was_ended_leaves_no_alarm_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "TIME_LIMIT", 0.01)
    failure(ENDLESS["loops"])
    end = time.monotonic() + 0.03
    while time.monotonic() < end:  # an alarm would be raised here
        pass


@pytest.mark.parametrize("bomb", ["{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% if 1 %}" * 5000, "{{ 'a'" + ".b" * 9999])
def test_nested_too_deep(bomb: str) -> None:
    failure(bomb)


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 'x'.center(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ range(10 ** 9) | list }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    ],
)
def test_what_grows_too_large_is_ended(bomb: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    failure(bomb)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_an_error_is_not_longer_than_people_read() -> None:
    assert len(failure("{{ raise_exception('x' * 10 ** 6) }}")) < 1000


def test_an_error_that_cannot_be_told() -> None:
    deep = "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = [n.a] %}{% endfor %}"
    assert "recursion" in failure(deep + "{{ raise_exception(n.a) }}")
