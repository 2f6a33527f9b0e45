"""Where a client's token comes from, and what is refused before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from client import Client, Unauthorized
from client.credentials import resolve_credentials
from protocol.address import Tcp, Tls, Unix

HERE = Unix("/s")


def token(given: str | None, environ: dict[str, str]) -> str:
    return resolve_credentials(HERE, given, None, None, environ).token


def test_which_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("of-file \nsecond line\n")
    by_file = {"LLAMA_BRIDGE_TOKEN_FILE": str(file)}
    by_name = {"LLAMA_BRIDGE_TOKEN": "of-environment"}
    assert token("given", by_name | by_file) == "given"
    assert token("", by_name | by_file) == ""
    assert token(None, by_name | by_file) == "of-environment"
    assert token(None, by_file) == "of-file"
    assert token(None, {}) == ""


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_without_a_token(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(Unauthorized, match="no token can be read from"):
        token(None, {"LLAMA_BRIDGE_TOKEN_FILE": str(tmp_path / "token")})


def test_certificates_are_for_tls() -> None:
    with pytest.raises(ValueError, match="speaks no TLS"):
        resolve_credentials(Tcp("localhost", 1), "", "/ca.pem", None, {})
    with pytest.raises(ValueError, match="speaks no TLS"):
        Client("/s", certificate="/c.pem")
    environ = {"LLAMA_BRIDGE_CA": "/ca.pem"}
    assert resolve_credentials(Tls("localhost", 1), "", None, None, environ).ca == "/ca.pem"
    assert resolve_credentials(HERE, "", None, None, environ).token == ""


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(resolve_credentials(HERE, "secret", None, None, {}))
