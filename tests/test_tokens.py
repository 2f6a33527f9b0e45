"""The file of tokens, and the commands that write it."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from bridge.access.config import Allowance
from bridge.access.tokens import PREFIX, TokenError, Tokens, digest_of, issue, parse_line, read_tokens, revoke
from bridge.cli.token import token as token_command

HEX = "a" * 64


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "tokens")


def refusal(text: str) -> str:
    with pytest.raises(TokenError) as caught:
        parse_line(text, "tokens, line 3")
    return str(caught.value)


# -- lines -----------------------------------------------------------------------------------------------------


def test_a_line() -> None:
    token = parse_line(f"ci operator sha256:{HEX} running=4 models=a,b priority=low expires=2030-01-31", "here")
    assert token is not None
    assert (token.name, token.role, token.digest, token.running) == ("ci", "operator", HEX, 4)
    assert (token.models, token.priority, token.requests_per_minute) == (["a", "b"], "low", None)
    assert token.ends == 1_896_048_000


@pytest.mark.parametrize("text", ["", "   ", "# ci user", "#"])
def test_no_line(text: str) -> None:
    assert parse_line(text, "here") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ci", "expected is NAME ROLE sha256:HEX [KEY=VALUE ...]"),
        (f"ci user {HEX}", "expected is NAME ROLE"),
        (f"ci user sha256:{HEX} often", "expected is NAME ROLE"),
        (f"ci king sha256:{HEX}", "'king'"),
        (f"ci none sha256:{HEX}", "'none'"),
        ("ci user sha256:abc", "$.digest"),
        (f"ci user sha256:{HEX} runing=3", "`runing`"),
        (f"ci user sha256:{HEX} running=-3", "$.running"),
        (f"ci user sha256:{HEX} expires=tomorrow", "$.expires"),
        (f"a/b user sha256:{HEX}", "is no name"),
        (f"{'a' * 65} user sha256:{HEX}", "is no name"),
    ],
)
def test_a_line_that_is_wrong(text: str, words: str) -> None:
    message = refusal(text)
    assert message.startswith("tokens, line 3: ")
    assert words in message
    assert HEX not in message


@given(st.text(max_size=200))
def test_any_line_is_a_token_or_refused(text: str) -> None:
    with suppress(TokenError):
        parse_line(text, "here")


@pytest.mark.parametrize("zone", ["Z", "+00:00", ""])
def test_a_time_without_a_zone_is_utc(zone: str) -> None:
    token = parse_line(f"ci user sha256:{HEX} expires=2030-01-31T12:00:00{zone}", "here")
    assert token is not None
    assert token.ends == 1_896_048_000 + 12 * 3600


def test_limits_of_its_own_and_of_its_role() -> None:
    token = parse_line(f"ci user sha256:{HEX} running=0 models=a", "here")
    assert token is not None
    role = Allowance(requests_per_minute=5, running=3, priority="low")
    assert token.allowance(role) == Allowance(requests_per_minute=5, running=0, models=["a"], priority="low")


# -- the file --------------------------------------------------------------------------------------------------


def test_what_is_issued_is_found(path: str) -> None:
    secrets = {name: issue(path, name, "user") for name in ("a", "b", "c")}
    tokens = read_tokens(path)
    assert len(set(secrets.values())) == len(tokens) == 3
    for name, secret in secrets.items():
        found = tokens.find(secret)
        assert found is not None
        assert found.name == name
        assert secret.startswith(PREFIX)
        assert len(secret) == len(PREFIX) + 43, "256 bits"
    for wrong in ("", "a", PREFIX, secrets["a"][:-1], secrets["a"] + "x", secrets["a"].upper(), "\udcff", "é"):
        assert tokens.find(wrong) is None


def test_the_file_holds_no_token(path: str) -> None:
    secret = issue(path, "ci", "user")
    text = Path(path).read_text()
    assert secret not in text
    assert secret.removeprefix(PREFIX) not in text
    assert digest_of(secret) in text
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_file_that_is_not_there_has_none(path: str) -> None:
    assert len(read_tokens(path)) == 0
    assert Tokens().find("a") is None


def test_what_people_write_beside_stays(path: str) -> None:
    Path(path).write_text(f"# ours\n\nold user sha256:{HEX}")
    os.chmod(path, 0o640)
    issue(path, "new", "admin", ["running=2"])
    lines = Path(path).read_text().splitlines()
    assert lines[:3] == ["# ours", "", f"old user sha256:{HEX}"]
    assert lines[3].startswith("new admin sha256:")
    assert lines[3].endswith(" running=2")
    revoke(path, "old")
    assert Path(path).read_text().splitlines() == ["# ours", "", lines[3]]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert os.listdir(os.path.dirname(path)) == ["tokens"]


@pytest.mark.parametrize(
    ("name", "role", "settings", "words"),
    [
        ("ci", "user", (), "there is a token called ci"),
        ("a b", "user", (), "is no name"),
        ("a", "none", (), "no role"),
        ("a", "user", ("running=2 priority=high",), "has a blank"),
        ("a", "user", ("running=two",), "$.running"),
    ],
)
def test_what_is_not_issued(path: str, name: str, role: str, settings: tuple[str, ...], words: str) -> None:
    issue(path, "ci", "user")
    before = Path(path).read_text()
    with pytest.raises(TokenError) as caught:
        issue(path, name, role, settings)
    assert words in str(caught.value)
    assert Path(path).read_text() == before


def test_two_of_a_name(path: str) -> None:
    Path(path).write_text(f"ci user sha256:{HEX}\nci admin sha256:{HEX}\n")
    with pytest.raises(TokenError, match="line 2: a second token is called ci"):
        read_tokens(path)


def test_a_file_that_others_may_write(path: str) -> None:
    issue(path, "ci", "user")
    os.chmod(path, 0o606)
    with pytest.raises(TokenError, match="others may write it"):
        read_tokens(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="Is a directory"):
        read_tokens(str(tmp_path))
    (tmp_path / "tokens").write_bytes(b"\xff")
    with pytest.raises(TokenError, match="not UTF-8"):
        read_tokens(str(tmp_path / "tokens"))


def test_a_revoke_of_what_is_not_there(path: str) -> None:
    issue(path, "ci", "user")
    with pytest.raises(TokenError, match=r"no token is called c$"):
        revoke(path, "c")


# -- the commands ----------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(token_command, arguments)


def test_new_list_and_revoke(path: str) -> None:
    made = run("new", "ci", "--role", "operator", "--days", "1", "--running", "2", "--model", "a", "--file", path)
    secret = made.stdout.strip()
    assert (made.exit_code, secret[:3]) == (0, PREFIX)
    assert "after RELOAD" in made.stderr
    assert "credential of its unit, after systemctl restart" in made.stderr
    found = read_tokens(path).find(secret)
    assert found is not None
    assert (found.role, found.running, found.models) == ("operator", 2, ["a"])
    listed = run("list", "--file", path)
    assert "operator" in listed.stdout
    assert found.digest not in listed.stdout + run("list", "--json", "--file", path).stdout
    [about] = json.loads(run("list", "--json", "--file", path).stdout)
    assert (about["name"], about["running"]) == ("ci", 2)
    assert run("revoke", "ci", "--file", path).exit_code == 0
    assert json.loads(run("list", "--json", "--file", path).stdout) == []
    assert run("list", "--file", path).stdout == f"no tokens in {path}\n"


def test_an_error_of_the_commands(path: str) -> None:
    assert run("new", "ci", "--file", path).exit_code == 0
    again = run("new", "ci", "--file", path)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("error: ")
    assert "error: 'a b' is no name of a token; allowed: " in run("new", "a b", "--file", path).stderr
    assert run("revoke", "nobody", "--file", path).exit_code == 1
    assert run("new", "ci", "--file", "/nowhere/at/all").exit_code == 1
