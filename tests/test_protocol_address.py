"""Addresses as people write them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.address import Address, Tcp, Tls, Unix, default_socket, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/x.sock", Unix("/run/x.sock")),
        ("./x:5", Unix("./x:5")),
        ("unix:x.sock", Unix("x.sock")),
        ("unix:/x", Unix("/x")),
        ("localhost:7000", Tcp("localhost", 7000)),
        ("tcp:10.0.0.1:0", Tcp("10.0.0.1", 0)),
        ("[::1]:65535", Tcp("::1", 65535)),
        ("tls:localhost:7000", Tls("localhost", 7000)),
        ("tls:[::1]:7000", Tls("::1", 7000)),
        ("::1:7000", Tcp("::1", 7000)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(parse_address(text)) if isinstance(address, Tcp | Tls) else f"unix:{address}") == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ":7000",
        "x:",
        "x:y",
        "x:-1",
        "x:65536",
        "x:\uff17",
        "tcp:/a/path",
        "tcp:/a:5",
        "tcp:",
        "tls:/a:5",
        "tls:x",
        "tcp:tls:x:5",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="bad address"):
        parse_address(text)


@given(st.text())
def test_garbage_is_only_ever_a_value_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert isinstance(address, Unix | Tcp | Tls)


def test_the_default_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_socket({"LLAMA_BRIDGE_SOCKET": "/a/b", "XDG_RUNTIME_DIR": "/run/user/7"}) == "/a/b"
    assert (
        default_socket({"LLAMA_BRIDGE_SOCKET": "", "XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/llama-bridge.sock"
    )
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert default_socket({}) == "/run/llama-bridge/bridge.sock"
    monkeypatch.setattr(os, "getuid", lambda: 7)
    assert default_socket({}).endswith("/llama-bridge-7/bridge.sock")
