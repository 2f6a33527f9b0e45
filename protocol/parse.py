"""A line becomes a Request:  ``VERB key=value ... text``  or  ``VERB {json}``.

Everything here is pure, and raises only BadCommand, with one of the codes about bytes and commands.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from typing import Any

import msgspec
import orjson

from protocol.allowed import allowed, explain, fields_of
from protocol.commands import COMMANDS, Cancel, Command, Id, Request
from protocol.errors import BridgeError, ErrorCode

# What a missing text is answered with, without and after parameters: in the words of the Llambo bridge.
_NO_TEXT = {
    "prompt": ("No prompt provided", "No prompt after parameters"),
    "prompts": ("No prompts provided", "No prompts after parameters"),
    "path": ("No model path provided", "No model path provided"),
    "source": ("No source provided", "No source after parameters"),
    "messages": ("No message provided", "No message after parameters"),
    "text": ("No text provided", "No text after parameters"),
    "request": ("No request provided", "No request after parameters"),
    "tokens": ("No tokens provided", "No tokens after parameters"),
    "token": ("No token provided", "No token after parameters"),
}
_REPEATABLE = ("stop", "lora")  # keys that may be given several times
TLS_START = b"\x16\x03"
_LARGE = 1 << 20  # characters of JSON
_HTTP = re.compile(rb"^(GET|HEAD|POST|PUT|DELETE|OPTIONS|CONNECT|TRACE|PATCH|PRI) \S+ HTTP/\d", re.ASCII)


class BadCommand(BridgeError):
    """A line that is no command. ``id`` is the id it carried, where that much could be read."""

    id: str | None = None


def wrong_protocol_tls() -> BadCommand:
    return BadCommand(ErrorCode.WRONG_PROTOCOL, "This port speaks no TLS: send one command a line, such as PING")


def is_json_form(start: bytes) -> bool:
    """Whether a line that begins so is ``VERB {json}``; such lines may be longer."""
    _, _, rest = start.lstrip(b" \t").partition(b" ")
    return rest.lstrip(b" \t").startswith(b"{")


def parse_request(line: bytes) -> Request | None:
    """The request on this line (without its end), or None for an empty line. Raises BadCommand."""
    if _HTTP.match(line):
        raise BadCommand(ErrorCode.WRONG_PROTOCOL, "This is not an HTTP port: send one command a line, such as PING")
    if line.startswith(TLS_START):
        raise wrong_protocol_tls()
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        message = f"Line is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start}"
        raise BadCommand(ErrorCode.BAD_ENCODING, message) from None
    verb, _, rest = text.lstrip(" \t").partition(" ")
    if not verb:
        return None
    command = COMMANDS.get(verb)
    if command is None:
        raise BadCommand(ErrorCode.UNKNOWN_COMMAND, f"Unknown command: {verb[:64]}")
    rest = rest.lstrip(" \t")
    return _from_json(command, rest) if rest.startswith("{") else _from_text(command, rest)


def describe(command: type[Command]) -> dict[str, str]:
    """What each parameter of a command may be, in words."""
    return {name: allowed(field.type) for name, field in _FIELDS[command].items()}


# -- the JSON form ---------------------------------------------------------------------------------------------


def _from_json(command: type[Command], text: str) -> Request:
    if len(text) > _LARGE:
        _refuse_wrong_types(command, text)
    values = _load_json(text)
    try:
        return _build(command, values, strict=True)
    except BadCommand as error:
        error.id = _id_among(values, command)
        raise


def _refuse_wrong_types(command: type[Command], text: str) -> None:
    """Ends at the first value of a wrong type, before 16 MiB of ``[[],[],...`` have become millions of objects."""
    try:
        msgspec.json.decode(text, type=_with_id(command))
    except msgspec.ValidationError as error:
        refusal = _bad_argument(command, str(error))
        with contextlib.suppress(msgspec.DecodeError):  # no id, or a bad one
            refusal.id = None if command is Cancel else msgspec.json.decode(text, type=_WithId).id
        raise refusal from None
    except (msgspec.DecodeError, RecursionError):
        pass  # _load_json says what is wrong


@functools.cache
def _with_id(command: type[Command]) -> type[msgspec.Struct]:
    return command if command is Cancel else msgspec.defstruct(command.__name__, [("id", Any, None)], bases=(command,))


def _id_among(values: dict[str, Any], command: type[Command]) -> str | None:
    """Whoever sent an id waits for an answer with that id, also if it is an error."""
    if command is Cancel:  # its id is another request's
        return None
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(values.get("id"), Id | None)
    return None


def _load_json(text: str) -> dict[str, Any]:
    """Parses strictly: what two parsers could read in two ways is refused."""
    try:
        # orjson refuses NaN, infinities, lone surrogates and deep nesting; it alone keeps the last of two equal keys.
        values: dict[str, Any] = orjson.loads(text)
        json.loads(text, object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str)
    except ValueError as error:
        raise BadCommand(ErrorCode.BAD_JSON, f"Bad JSON: {error}") from None
    except RecursionError:
        raise BadCommand(ErrorCode.BAD_JSON, "Bad JSON: nested too deeply") from None
    return values


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:64]!r} stands there twice")


# -- the text form ---------------------------------------------------------------------------------------------


def _from_text(command: type[Command], rest: str) -> Request:
    values, text = _split_parameters(command, rest)
    try:
        if text:
            if command.TEXT is None:
                takes = ", ".join(_FIELDS[command])
                message = f"{command.VERB} takes no text, only key=value: {takes}; got {text[:64]!r}"
                raise BadCommand(ErrorCode.BAD_ARGUMENT, message)
            if command.WORD and command.WORD not in values:
                values[command.WORD], _, text = text.partition(" ")
            if text:
                values[command.TEXT] = _text_value(command.TEXT, text)
        return _build(command, values, strict=False)
    except BadCommand as error:
        error.id = _id_among(values, command)
        raise


def _split_parameters(command: type[Command], rest: str) -> tuple[dict[str, Any], str]:
    """Takes the leading ``key=value`` words with known keys; the text is what follows them, verbatim."""
    known = _FIELDS[command]
    values: dict[str, Any] = {}
    while True:
        rest = rest.lstrip(" ")
        word, _, after = rest.partition(" ")
        if word == "--":
            return values, after
        key, equals, value = word.partition("=")
        if not equals or key not in known or (key == command.TEXT and key in _NO_TEXT):
            return values, rest
        if key in _REPEATABLE:
            values.setdefault(key, []).append(value)
        elif key in values:
            raise BadCommand(ErrorCode.BAD_ARGUMENT, f"{key}: given twice")
        else:
            values[key] = _load_json(value) if value.startswith("{") else value
        rest = after


def _text_value(field: str, text: str) -> Any:
    match field:
        case "prompts":
            return [prompt for prompt in text.split("||") if prompt.strip()]
        case "messages":
            return [{"role": "user", "content": text}]
        case "tokens" | "kinds":
            return text.split()
        case "id" | "model" | "verb" | "path" | "source" | "adapter" | "token" | "job":
            return text.strip()
        case _:
            return text


# -- types -----------------------------------------------------------------------------------------------------


def _build(command: type[Command], values: dict[str, Any], *, strict: bool) -> Request:
    """``strict`` is the JSON form, where "5" is no number; in the text form everything is a string."""
    fields = dict(values)
    try:
        request_id = None if command is Cancel else msgspec.convert({"id": fields.pop("id", None)}, _WithId).id
        built = msgspec.convert(fields, command, strict=strict, str_keys=True)
    except msgspec.ValidationError as error:
        raise _bad_argument(command, str(error)) from None
    if command.TEXT in _NO_TEXT and not getattr(built, command.TEXT):
        raise BadCommand(ErrorCode.BAD_ARGUMENT, _NO_TEXT[command.TEXT][bool(values.keys() - {command.TEXT})])
    return Request(built, request_id)


class _WithId(msgspec.Struct):
    id: Id | None = None


def _bad_argument(command: type[Command], error: str) -> BadCommand:
    return BadCommand(ErrorCode.BAD_ARGUMENT, explain(error, _FIELDS[command], command.VERB))


_FIELDS = {command: fields_of(command) | fields_of(_WithId) for command in COMMANDS.values()}
