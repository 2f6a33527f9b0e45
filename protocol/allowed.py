"""What a value may be, in words. msgspec says what is wrong with one; who has to change it wants to know that, too."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import inspect

from protocol.command import HEXADECIMAL

Fields = Mapping[str, inspect.Field]
_AT = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<key>.*)`$", re.DOTALL)
_STEP = re.compile(r"[^.\[\]]+|\[[^\]]*\]")


def fields_of(struct: type[msgspec.Struct]) -> dict[str, inspect.Field]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return {field.encode_name: field for field in info.fields}


def explain(error: str, fields: Fields, owner: str) -> str:
    """A ValidationError's message, of an ``owner`` with these fields: begins with the key, ends with all that is
    allowed: ``limits.clients: expected int, got str; allowed: an integer from 1 to 9``.
    """
    at = _AT.match(error)
    assert at is not None
    what, path = at["what"], at["path"] or ""
    found = _at(fields, path)
    if unknown := _UNKNOWN.match(what):
        known = [field.encode_name for field in found.fields] if isinstance(found, inspect.StructType) else fields
        key = f"{path}.{unknown['key'][:64]}" if path else unknown["key"][:64]
        return f"{key}: unknown key; {path or owner} takes {', '.join(known)}"
    if found is None:
        return error
    what = what.replace("`", "")
    return f"{path}: {what[:1].lower()}{what[1:]}; allowed: {allowed(found)}"


def _at(fields: Fields, path: str) -> inspect.Type | None:
    """What stands there: a key, or ``key.inner``, ``key[0].inner``, ``key[...]``. None if that cannot be told."""
    steps = _STEP.findall(path)
    if not steps or steps[0] not in fields:
        return None
    found = fields[steps[0]].type
    for step in steps[1:]:
        further = [inner for one in _alternatives(found) if (inner := _inside(one, step))]
        if len(further) != 1:
            return found
        [found] = further
    return found


def _alternatives(type_: inspect.Type) -> tuple[inspect.Type, ...]:
    return type_.types if isinstance(type_, inspect.UnionType) else (type_,)


def _inside(type_: inspect.Type, step: str) -> inspect.Type | None:
    match type_:
        case inspect.ListType() if step.startswith("["):
            return type_.item_type
        case inspect.DictType() if step.startswith("["):
            return type_.value_type
        case inspect.StructType():
            return next((field.type for field in type_.fields if field.encode_name == step), None)
    return None


def allowed(type_: inspect.Type) -> str:
    match type_:
        case inspect.UnionType():
            return " or ".join(allowed(one) for one in type_.types if not isinstance(one, inspect.NoneType))
        case inspect.IntType():
            return f"an integer from {type_.ge} to {type_.le}"
        case inspect.FloatType():
            low = f"over {type_.gt}" if type_.gt is not None else f"from {type_.ge}"
            return f"a number {low} to {type_.le}"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return _allowed_string(type_)
        case inspect.LiteralType():
            return " or ".join(str(value) for value in type_.values)
        case inspect.ListType():
            return f"a list of {allowed(type_.item_type)}"
        case inspect.DictType():
            return f"an object of {allowed(type_.key_type)} to {allowed(type_.value_type)}"
        case inspect.DateTimeType():
            return "a date or time of ISO 8601"
        case inspect.StructType():
            return "an object with " + ", ".join(field.encode_name for field in type_.fields)
        case _:
            return "nothing"


def _allowed_string(type_: inspect.StrType) -> str:
    if type_.max_length is None:
        return f"a string like {type_.pattern}" if type_.pattern else "a string"
    if type_.pattern == HEXADECIMAL:
        return f"{type_.max_length} hexadecimal digits"
    without = " without blanks and slashes" if type_.pattern else ""
    return f"a string of {type_.min_length} to {type_.max_length} characters{without}"
