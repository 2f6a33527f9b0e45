"""A line to a request: both forms of every command, and what is said about lines that are none."""

from __future__ import annotations

import json
import math
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.commands import (
    COMMANDS,
    Cancel,
    Chat,
    Command,
    Detokenize,
    Embed,
    Free,
    Help,
    Infer,
    InferMulti,
    Load,
    Lora,
    Message,
    Models,
    Ping,
    Plan,
    Pull,
    Remove,
    Request,
    Show,
    TextPart,
    Tokenize,
)
from protocol.connection import encode_request
from protocol.errors import ErrorCode
from protocol.parse import BadCommand, describe, is_json_form, parse_request

SHA256 = "aF09" * 16


def refusal(line: bytes | str) -> BadCommand:
    with pytest.raises(BadCommand) as caught:
        parse_request(line if isinstance(line, bytes) else line.encode())
    return caught.value


# -- the text form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("PING", Ping()),
        ("  \tPING", Ping()),
        ("PING  ", Ping()),
        ("HELP", Help()),
        ("HELP INFER", Help(verb="INFER")),
        ("INFER hello", Infer(prompt="hello")),
        ("INFER max_tokens=5 temperature=0.5 a b  c ", Infer(max_tokens=5, temperature=0.5, prompt="a b  c ")),
        ("INFER  max_tokens=5   hello", Infer(max_tokens=5, prompt="hello")),
        ("INFER x=hello world", Infer(prompt="x=hello world")),
        ("INFER max_tokens hello", Infer(prompt="max_tokens hello")),
        ("INFER -- max_tokens=5 x", Infer(prompt="max_tokens=5 x")),
        ("INFER seed=1 -- {x}", Infer(seed=1, prompt="{x}")),
        ("INFER a\\nb", Infer(prompt="a\\nb")),
        ("INFER prompt=x", Infer(prompt="prompt=x")),
        ("INFER stop=a stop=b c", Infer(stop=["a", "b"], prompt="c")),
        ('INFER logit_bias={"5":-1.5} c', Infer(logit_bias={5: -1.5}, prompt="c")),
        ("INFER ignore_eos=true c", Infer(ignore_eos=True, prompt="c")),
        ("INFER_MULTI max_tokens=5 a||b ||  ||c", InferMulti(max_tokens=5, prompts=["a", "b ", "c"])),
        ("CHAT seed=1 hello you", Chat(seed=1, messages=[Message(role="user", content="hello you")])),
        ("EMBED encoding=base64 some text", Embed(encoding="base64", text="some text")),
        ("EMBED dimensions=1 some text", Embed(dimensions=1, text="some text")),
        ("TOKENIZE special=true a b", Tokenize(special=True, text="a b")),
        ("DETOKENIZE 1 2  3", Detokenize(tokens=[1, 2, 3])),
        ("LOAD n_ctx=64 name=tiny /a model.gguf ", Load(n_ctx=64, name="tiny", path="/a model.gguf")),
        ("FREE", Free()),
        ("FREE drain=false tiny", Free(drain=False, model="tiny")),
        ("FREE model=tiny", Free(model="tiny")),
        ("SHOW tiny ", Show(model="tiny")),
        ("CANCEL", Cancel()),
        ("CANCEL a1", Cancel(id="a1")),
        ("INFER model=user/repo:Q4_K_M hello", Infer(model="user/repo:Q4_K_M", prompt="hello")),
        ("INFER lora=/a.gguf:0.5 lora=b hello", Infer(lora=["/a.gguf:0.5", "b"], prompt="hello")),
        ("INFER keep_alive=-1 hello", Infer(keep_alive=-1.0, prompt="hello")),
        (
            "LOAD n_ctx=auto n_gpu_layers=auto n_threads=auto m",
            Load(n_ctx="auto", n_gpu_layers="auto", n_threads="auto", path="m"),
        ),
        (
            "LOAD lora=/a.gguf keep_alive=0.5 pin=true quant=q4_k_m user/repo",
            Load(lora=["/a.gguf"], keep_alive=0.5, pin=True, quant="q4_k_m", path="user/repo"),
        ),
        ("PLAN n_ctx=64 user/repo:Q8_0 ", Plan(n_ctx=64, path="user/repo:Q8_0")),
        ("FREE all", Free(model="all")),
        ("MODELS loaded=false", Models(loaded=False)),
        ("PULL https://host.example/m.gguf?a=b ", Pull(source="https://host.example/m.gguf?a=b")),
        (
            f"PULL sha256={SHA256} progress=false user/repo:Q4",
            Pull(sha256=SHA256, progress=False, source="user/repo:Q4"),
        ),
        ("PULL source=x", Pull(source="source=x")),
        ("REMOVE tiny ", Remove(model="tiny")),
        ("LORA", Lora()),
        ("LORA list", Lora()),
        ("LORA load /an adapter.gguf ", Lora(action="load", adapter="/an adapter.gguf")),
        ("LORA model=tiny check /a.gguf", Lora(model="tiny", action="check", adapter="/a.gguf")),
        ("LORA action=unload list", Lora(action="unload", adapter="list")),
    ],
)
def test_text_form(line: str, command: Command) -> None:
    assert parse_request(line.encode()) == Request(command, None)


def test_the_text_form_may_carry_an_id() -> None:
    assert parse_request(b"INFER id=a1 hello") == Request(Infer(prompt="hello"), "a1")


@pytest.mark.parametrize("line", [b"", b" ", b"\t ", b"  \t"])
def test_an_empty_line_is_nothing(line: bytes) -> None:
    assert parse_request(line) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("INFER", "No prompt provided"),
        ("INFER max_tokens=5", "No prompt after parameters"),
        ("INFER_STREAM ", "No prompt provided"),
        ("INFER_MULTI", "No prompts provided"),
        ("INFER_MULTI || ||", "No prompts provided"),
        ("INFER_MULTI seed=1 ", "No prompts after parameters"),
        ("LOAD", "No model path provided"),
        ("LOAD n_ctx=64", "No model path provided"),
        ("PLAN n_ctx=64", "No model path provided"),
        ("PULL", "No source provided"),
        ("PULL progress=false", "No source after parameters"),
        ('PULL {"source":""}', "No source provided"),
        ("CHAT", "No message provided"),
        ("EMBED", "No text provided"),
        ("DETOKENIZE", "No tokens provided"),
        ('INFER {"max_tokens":5}', "No prompt after parameters"),
    ],
)
def test_a_missing_text_is_named_as_the_llambo_bridge_does(line: str, message: str) -> None:
    error = refusal(line)
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith(message)


@pytest.mark.parametrize("line", ["PING x", "STATUS now", "MODELS -- x"])
def test_text_after_a_command_that_takes_none(line: str) -> None:
    error = refusal(line)
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert "takes no text" in error.message


@pytest.mark.parametrize(("line", "verb"), [("NOPE", "NOPE"), ("ping", "ping"), ("INFERX a", "INFERX")])
def test_unknown_command(line: str, verb: str) -> None:
    error = refusal(line)
    assert (error.code, error.message) == (ErrorCode.UNKNOWN_COMMAND, f"Unknown command: {verb}")


def test_a_long_unknown_command_is_not_echoed_whole() -> None:
    assert len(refusal("X" * 5000).message) < 100


# -- the JSON form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ('INFER {"prompt":"two\\nlines","id":"a1"}', Request(Infer(prompt="two\nlines"), "a1")),
        ('INFER  \t{"prompt":"x","stop":"a"}', Request(Infer(prompt="x", stop="a"))),
        ('INFER {"prompt":"x","logit_bias":{"7":1}}', Request(Infer(prompt="x", logit_bias={7: 1.0}))),
        ('PING {"id":"p"}', Request(Ping(), "p")),
        ("PING {}", Request(Ping())),
        ('CANCEL {"id":"a1"}', Request(Cancel(id="a1"))),
        (
            'CHAT {"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}]}',
            Request(Chat(messages=[Message(role="user", content=[TextPart(text="a")])])),
        ),
    ],
)
def test_json_form(line: str, request_: Request) -> None:
    assert parse_request(line.encode()) == request_


@pytest.mark.parametrize(
    ("start", "is_json"),
    [
        (b'INFER {"a', True),
        (b"  INFER  {", True),
        (b"INFER a {", False),
        (b"INFER", False),
        (b"{", False),
        (b"", False),
    ],
)
def test_which_lines_may_be_long(start: bytes, is_json: bool) -> None:
    assert is_json_form(start) is is_json


@pytest.mark.parametrize("id", ['"a1"', '"x"'])
def test_an_error_carries_the_id_of_its_line(id: str) -> None:
    assert refusal(f'INFER {{"prompt":"x","max_tokens":"y","id":{id}}}').id == json.loads(id)


@pytest.mark.parametrize("rest", ["max_tokens=y x", "max_tokens=5", "temperature=-1 --"])
def test_an_error_carries_the_id_of_its_text(rest: str) -> None:
    assert refusal(f"INFER id=a1 {rest}").id == "a1"
    assert refusal(f"INFER id={'x' * 65} {rest}").id is None


def test_the_id_in_a_cancel_is_not_its_own() -> None:
    assert refusal('CANCEL {"id":"a1","now":true}').id is None


@pytest.mark.parametrize("id", ["5", '""', "[]", '"' + "x" * 65 + '"'])
def test_a_bad_id_is_refused_and_not_echoed(id: str) -> None:
    error = refusal(f'INFER {{"prompt":"x","id":{id}}}')
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith("id: ")
    assert error.id is None


def test_an_unknown_key_is_named_with_the_known_ones() -> None:
    error = refusal('INFER {"prompt":"x","max_token":5}')
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith("max_token: unknown key; INFER takes ")
    assert "max_tokens" in error.message


# -- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"POST /v1/x HTTP/1.0", b"PRI * HTTP/2.0", b"OPTIONS * HTTP/1.1"])
def test_fault_02_http(line: bytes) -> None:
    error = refusal(line)
    assert error.code == ErrorCode.WRONG_PROTOCOL
    assert "HTTP" in error.message


@pytest.mark.parametrize(
    ("line", "where"),
    [(b"INFER \xff", "0xff at offset 6"), (b"\xc3", "0xc3 at offset 0"), (b"INFER \xed\xa0\x80", "0xed at offset 6")],
)
def test_fault_03_bad_encoding(line: bytes, where: str) -> None:
    error = refusal(line)
    assert error.code == ErrorCode.BAD_ENCODING
    assert where in error.message


DEEP = 100_000


@pytest.mark.parametrize(
    "json_text",
    [
        "{",
        "{}x",
        '{"prompt":}',
        '{"prompt":"x"}{"prompt":"y"}',
        '{"prompt":' + "[" * DEEP + "]" * DEEP + "}",
        '{"a":' * DEEP + "1" + "}" * DEEP,
        '{"prompt":' + "[" * 500 + "]" * 500 + "}",
        '{"prompt":"x","temperature":NaN}',
        '{"prompt":"x","temperature":Infinity}',
        '{"prompt":"x","temperature":-Infinity}',
        '{"prompt":"x","temperature":1e400}',
        '{"prompt":"\\ud800"}',
        '{"prompt":"\\udc00\\ud800"}',
        '{"prompt":"x","prompt":"y"}',
        '{"prompt":"x","logit_bias":{"1":1,"1":2}}',
        '{"prompt":"a\tb"}',
    ],
    ids=lambda text: text[:40],
)
def test_fault_11_bad_json(json_text: str) -> None:
    error = refusal(f"INFER {json_text}")
    # Deep nesting may also be refused as an argument of the wrong type, where the parser copes with it.
    assert error.code == ErrorCode.BAD_JSON or "[[" in json_text
    assert error.code in (ErrorCode.BAD_JSON, ErrorCode.BAD_ARGUMENT)
    assert len(error.message) < 500


@pytest.mark.parametrize(
    ("parameter", "allowed"),
    [
        ("max_tokens=-1", "an integer from 1 to 1048576"),
        ("max_tokens=0", "an integer from 1 to 1048576"),
        ("max_tokens=1.5", "an integer from 1 to 1048576"),
        ("max_tokens=9223372036854775808", "an integer from 1 to 1048576"),
        ("max_tokens=99999999999999999999999", "an integer from 1 to 1048576"),
        ("max_tokens=many", "an integer from 1 to 1048576"),
        ("max_tokens=", "an integer from 1 to 1048576"),
        ("temperature=-0.1", "a number from 0 to 100"),
        ("temperature=nan", "a number from 0 to 100"),
        ("temperature=inf", "a number from 0 to 100"),
        ("temperature=-inf", "a number from 0 to 100"),
        ("temperature=1e400", "a number from 0 to 100"),
        ("top_p=1.1", "a number from 0.0 to 1.0|a number from 0 to 1"),
        ("repeat_penalty=0", "a number over 0 to 10|a number over 0.0 to 10.0"),
        ("seed=-1", "an integer from 0 to 4294967295"),
        ("seed=4294967296", "an integer from 0 to 4294967295"),
        ("ignore_eos=perhaps", "true or false"),
        ("deadline_ms=0", "an integer from 1 to 86400000"),
    ],
)
def test_fault_12_bad_argument_in_the_text_form(parameter: str, allowed: str) -> None:
    error = refusal(f"INFER {parameter} hello")
    key = parameter.partition("=")[0]
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith(f"{key}: ")
    assert any(words in error.message for words in allowed.split("|"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", None),
        ("max_tokens", True),
        ("max_tokens", 2**63),
        ("max_tokens", -(2**63) - 1),
        ("max_tokens", 1.5),
        ("max_tokens", []),
        ("temperature", "0.5"),
        ("temperature", None),
        ("prompt", 5),
        ("prompt", ["a"]),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", {"a": 1}),
        ("logit_bias", {"-1": 0}),
        ("logit_bias", {"x": 0}),
        ("logit_bias", {"1": 1001}),
        ("logit_bias", {"2147483648": 1}),
        ("logprobs", 21),
    ],
)
def test_fault_12_bad_argument_in_the_json_form(key: str, value: Any) -> None:
    error = refusal("INFER " + json.dumps({"prompt": "x", key: value}))
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith(key)
    assert "allowed: " in error.message


@pytest.mark.parametrize("tokens", ["-1", "2147483648", "1 x", "1.5"])
def test_fault_12_bad_tokens(tokens: str) -> None:
    error = refusal(f"DETOKENIZE {tokens}")
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith("tokens")
    assert "an integer from 0 to 2147483647" in error.message


@pytest.mark.parametrize(
    ("line", "key", "allowed"),
    [
        ("LOAD n_ctx=7 m", "n_ctx", "an integer from 8 to 16777216 or auto"),
        ("LOAD n_ctx=most m", "n_ctx", "an integer from 8 to 16777216 or auto"),
        ("LOAD n_threads=0 m", "n_threads", "an integer from 1 to 512 or auto"),
        ("LOAD n_gpu_layers=-2 m", "n_gpu_layers", "an integer from -1 to 65536 or auto"),
        ("LOAD keep_alive=-2 m", "keep_alive", "a number from -1 to 31536000"),
        ("LOAD keep_alive=31536001 m", "keep_alive", "a number from -1 to 31536000"),
        ("INFER keep_alive=nan x", "keep_alive", "a number from -1 to 31536000"),
        ("EMBED keep_alive=5m x", "keep_alive", "a number from -1 to 31536000"),
        ("LOAD pin=perhaps m", "pin", "true or false"),
        ("LOAD name=a/b m", "name", "a string of 1 to 128 characters without blanks and slashes"),
        ("LOAD quant= m", "quant", "a string of 1 to 32 characters"),
        (f"INFER model={'x' * 4097} hello", "model", "a string of 1 to 4096 characters"),
        ("INFER lora= x", "lora[0]", "a string of 1 to 4096 characters"),
        ("MODELS loaded=yes", "loaded", "true or false"),
        ("PULL sha256=abc x", "sha256", "64 hexadecimal digits"),
        (f"PULL sha256={'x' * 64} x", "sha256", "64 hexadecimal digits"),
        (f"PULL sha256={'a' * 65} x", "sha256", "64 hexadecimal digits"),
        ("LORA dance /a.gguf", "action", "check or list or load or unload"),
        ("LORA /a.gguf", "action", "check or list or load or unload"),
    ],
)
def test_fault_12_bad_arguments_about_models(line: str, key: str, allowed: str) -> None:
    error = refusal(line)
    assert error.code == ErrorCode.BAD_ARGUMENT
    assert error.message.startswith(f"{key}: ")
    assert error.message.endswith(f"; allowed: {allowed}")


def test_there_are_at_most_four_adapters() -> None:
    four = " ".join(["lora=a"] * 4)
    parse_request(f"INFER {four} x".encode())
    assert refusal(f"INFER {four} lora=a x").message.startswith("lora: ")


def test_fault_12_a_parameter_given_twice() -> None:
    assert refusal("INFER seed=1 seed=2 x").message == "seed: given twice"


# -- properties ------------------------------------------------------------------------------------------------

verbs = st.sampled_from([*COMMANDS, "NOPE", "GET / HTTP/1.1"])
words = st.sampled_from(
    [
        "max_tokens=5",
        "seed=x",
        "stop=a",
        "id=a",
        "model=m",
        "x=y",
        "--",
        "{",
        "[",
        "a||b",
        "5",
        "-1",
        "=",
        "logit_bias={}",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(sorted({field for command in COMMANDS.values() for field in command.__struct_fields__} | {"id"}))
text_lines = st.builds(
    lambda verb, rest: " ".join([verb, *rest]).encode(), verbs, st.lists(words | st.text(max_size=8))
)
json_lines = st.builds(
    lambda verb, values: f"{verb} {json.dumps(values)}".encode(), verbs, st.dictionaries(keys | st.text(), json_values)
)


@given(st.binary() | text_lines | json_lines)
@example(b'INFER {"logit_bias":{"":1}}')
@example(b"INFER logit_bias={")
@example(b'CHAT {"messages":[{"role":"user","content":[{"type":"image"}]}]}')
def test_garbage_is_only_ever_a_bad_command(line: bytes) -> None:
    try:
        request = parse_request(line)
    except BadCommand as error:
        refused = error
    else:
        assert request is None or COMMANDS[request.command.VERB] is type(request.command)
        return
    assert refused.message
    assert refused.code in set(ErrorCode)


def commands() -> st.SearchStrategy[Command]:
    return st.one_of(
        st.builds(Ping),
        st.builds(Cancel, id=st.none() | ids),
        st.builds(Free, model=st.none() | names, drain=st.booleans()),
        st.builds(
            Load,
            path=texts,
            name=st.none() | names,
            n_ctx=st.none() | st.integers(8, 99),
            use_mmap=st.none() | st.booleans(),
        ),
        st.builds(
            Infer,
            prompt=texts,
            max_tokens=st.integers(1, 1_048_576),
            temperature=st.floats(0, 100),
            stop=st.lists(stops, max_size=3) | stops,
            seed=st.none() | st.integers(0, 2**32 - 1),
            logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-1000, 1000), max_size=3),
        ),
        st.builds(InferMulti, prompts=st.lists(texts, min_size=1, max_size=3)),
        st.builds(Chat, messages=st.lists(messages, min_size=1, max_size=3)),
        st.builds(
            Embed, text=texts | st.lists(texts, min_size=1, max_size=3), encoding=st.sampled_from(["float", "base64"])
        ),
        st.builds(Detokenize, tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)),
    )


texts = st.text(min_size=1)
stops = st.text(min_size=1, max_size=9)
ids = st.text(min_size=1, max_size=64)
names = st.from_regex(r"[a-zA-Z0-9_.:-]{1,128}", fullmatch=True)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=st.none() | st.text() | st.lists(st.builds(TextPart, text=st.text()), max_size=2),
)


@given(commands(), st.none() | ids)
def test_what_a_client_writes_the_daemon_reads(command: Command, id: str | None) -> None:
    line = encode_request(Request(command, id))
    assert line.endswith(b"\n")
    assert b"\n" not in line[:-1]
    assert parse_request(line[:-1]) == Request(command, None if isinstance(command, Cancel) else id)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_parameter_is_described(command: type[Command]) -> None:
    described = describe(command)
    assert described.keys() >= set(command.__struct_fields__)
    assert "nothing" not in described.values()
    assert command.DOC.startswith(command.VERB)
    assert command.TEXT is None or command.TEXT in command.__struct_fields__


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_default_is_allowed(command: type[Command]) -> None:
    hints = typing.get_type_hints(command, include_extras=True)
    for field in msgspec.structs.fields(command):
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        if default != "" and not (isinstance(default, float) and math.isnan(default)):
            msgspec.convert(default, hints[field.name])
