"""What is said of a value that is not allowed: where it stands, what is wrong with it, and what is allowed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from protocol.allowed import explain, fields_of


class Inner(Struct, frozen=True, forbid_unknown_fields=True):
    count: Annotated[int, Meta(ge=1, le=9)] = 1
    share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    on: bool = False


class Outer(Struct, forbid_unknown_fields=True):
    inner: Inner = Inner()
    several: list[Inner] = []
    roles: dict[str, Literal["low", "high"]] = {}
    either: Annotated[int, Meta(ge=0, le=5)] | Literal["auto"] | None = None
    mode: Annotated[str, Meta(pattern="^[0-7]+$")] = "0"
    name: str = ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"count": "x"}}, "inner.count: expected int, got str; allowed: an integer from 1 to 9"),
        ({"inner": {"on": 1}}, "inner.on: expected bool, got int; allowed: true or false"),
        ({"inner": {"cuont": 1}}, "inner.cuont: unknown key; inner takes count, share, on"),
        ({"iner": {}}, "iner: unknown key; the file takes inner, several, roles, either, mode, name"),
        ({"inner": 3}, "inner: expected object, got int; allowed: an object with count, share, on"),
        ({"several": [{}, {"share": 2.5}]}, "several[1].share: expected float <= 1.0; allowed: a number from 0 to 1"),
        ({"several": [{"x": 1}]}, "several[0].x: unknown key; several[0] takes count, share, on"),
        ({"roles": {"a": "mid"}}, "roles[...]: invalid enum value 'mid'; allowed: high or low"),
        ({"either": 7}, "either: expected int <= 5; allowed: an integer from 0 to 5 or auto"),
        ({"mode": "9"}, "mode: expected str matching regex '^[0-7]+$'; allowed: a string like ^[0-7]+$"),
        ({"name": 1}, "name: expected str, got int; allowed: a string"),
    ],
)
def test_the_key_what_is_wrong_and_what_is_allowed(values: Any, message: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(values, Outer)
    assert explain(str(caught.value), fields_of(Outer), "the file") == message


def test_what_is_wrong_with_no_key() -> None:
    assert explain("Expected `object`, got `int`", fields_of(Outer), "the file") == "Expected `object`, got `int`"
