"""Lines that nobody sends in good faith, drawn from a seed: right ones, nearly right ones, and bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from protocol.commands import COMMANDS
from protocol.parse import BadCommand, describe, parse_request

# They end the daemon, never end, or outlive their connection.
NOT_SENT = {"QUIT", "RELOAD", "EVENTS", "SUBMIT"}
# Of these only what is malformed: each wrong token has those after it answered later, by up to 5 s, which
# test_fault_26 looks at, and here would be waited for.
NOT_WELL_FORMED = {"AUTH"}
# What acts on more than the one request is sent with these parameters only.
HARMLESS = {
    "LOAD": ["x?load=fail", "n_ctx=0 x", "name=a/b x"],
    "FREE": ["nobody", "drain=false nobody"],
    "PULL": ["user/repo:Q4_K_M", "sha256=00 http://127.0.0.1:1/x.gguf"],
    "REMOVE": ["nobody"],
    "LORA": ["list", "check a?load=fail", "unload nobody", "dance a"],
}
VERBS = sorted(COMMANDS.keys() - NOT_SENT - HARMLESS.keys())
WORDS = ["a", "b c", "é", "🦙", "\u2028", "x=1", "--", "{", "\\n", '"', "!eos", "!bytes", "!error", "word " * 70, ""]
NUMBERS = [
    "0", "1", "-1", "2", "64", "0.5", "1e400", "-1e999", "NaN", "nan", "inf", "9223372036854775808", "4294967296",
    "1048577", "0x10", "1_0", "٣", "1e-400", "-0",
]  # fmt: skip
VALUES = [*NUMBERS, "true", "false", "null", "high", "x" * 300, "[]", "{}", '{"1":1}', '{"1":NaN}', "a,b", "\ufeff"]
JSONS = [
    "null", "true", '""', '"a"', "[]", "{}", "[[]]", '{"a":1,"a":2}', '"\\ud800"', '"\\u0000"', "[" * 2000, "1,",
    '["a",1]',
    '[{"role":"user","content":"a"}]', '[{"role":"user"}]', '[{"role":"nobody","content":[]}]', '"x', "{'a':1}", "tru",
]  # fmt: skip


class Lines:
    """Draws lines, without their ends. None of those that are commands does any harm."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def any(self) -> bytes:
        kinds: list[Callable[[], bytes]] = [self.text_form, self.json_form, self.mutated, self.raw, self.harmless]
        while True:
            line = self.dice.choice(kinds)().replace(b"\n", b" ")
            if b"\0" in line and self.dice.random() < 0.99:
                continue  # it ends the connection, and with it all that comes after
            if is_harmless(line):
                return line

    def malformed(self) -> bytes:
        """One that is answered with an error, whatever there is: neither a command nor empty."""
        while True:
            line = self.any()
            if error_of(line) is not None:
                return line

    def text_form(self) -> bytes:
        verb = self.dice.choice(VERBS)
        keys = [*describe(COMMANDS[verb]), "nonsense", "", "MODEL"]
        words = [f"{self.dice.choice(keys)}={self._value()}" for _ in range(self.dice.choice([0, 0, 0, 1, 2, 5]))]
        words += [self.dice.choice(WORDS) for _ in range(self.dice.choice([0, 1, 1, 3]))]
        if self.dice.random() < 0.3:
            words.insert(0, f"id={self._id()}")
        return self._strange(" ".join([verb, *words]).encode())

    def json_form(self) -> bytes:
        verb = self.dice.choice(VERBS)
        keys = [*describe(COMMANDS[verb]), "nonsense", ""]
        fields = [
            f"{json.dumps(self.dice.choice(keys))}:{self._json()}" for _ in range(self.dice.choice([0, 1, 2, 3, 8]))
        ]
        if self.dice.random() < 0.5:
            fields.append(f'"{self.dice.choice(["prompt", "text", "model"])}":"a b"')
        if self.dice.random() < 0.3:
            fields.append(f'"id":"{self._id()}"')
        self.dice.shuffle(fields)
        return self._strange(f"{verb} {{{','.join(fields)}}}".encode())

    def harmless(self) -> bytes:
        verb = self.dice.choice(sorted(HARMLESS))
        return f"{verb} {self.dice.choice(HARMLESS[verb])}".encode()

    def mutated(self) -> bytes:
        """A line in which bytes were changed, left out, doubled or put in another place."""
        line = bytearray(self.dice.choice([self.text_form, self.json_form])())
        for _ in range(self.dice.choice([1, 1, 2, 5, 20])):
            at, end = sorted(self.dice.randrange(len(line) + 1) for _ in range(2))
            match self.dice.randrange(4):
                case 0:
                    line[at : at + 1] = bytes([self.dice.randrange(256)])
                case 1:
                    del line[at : min(end, at + 8)]
                case 2:
                    line[at:at] = line[at:end][:64]
                case 3:
                    line[at:at] = self.dice.choice(
                        [b"{", b"}", b'"', b"\\", b" ", b"=", b"\r", b"\t", b"\x7f", b"\xc3"]
                    )
        return bytes(line)

    def raw(self) -> bytes:
        return self.dice.randbytes(self.dice.choice([1, 3, 10, 100, 3000]))

    def _strange(self, line: bytes) -> bytes:
        match self.dice.randrange(20):
            case 0:
                return line.lower()
            case 1:
                return b" \t" + line
            case 2:
                return line + self.dice.choice([b"\r", b" ", b"\0", b"\xff", b"}"])
            case 3:
                return line[: self.dice.randrange(len(line) + 1)]
            case _:
                return line

    def _value(self) -> str:
        return self.dice.choice([*VALUES, *WORDS]).replace(" ", "")

    def _json(self) -> str:
        return self.dice.choice([*JSONS, *NUMBERS, *map(json.dumps, WORDS)])

    def _id(self) -> str:
        return self.dice.choice(["a", "a", "a", "b", "c", "x" * 65, "", "é", str(self.dice.randrange(1000))])


def is_harmless(line: bytes) -> bool:
    """A command that acts on others is one of those that are known to do no harm; and no blank line is among them."""
    try:
        request = parse_request(line.removesuffix(b"\r"))
    except BadCommand:
        return True
    if request is None or b"\0" in line:
        return request is not None
    verb = request.command.VERB
    rest = line.decode().strip().partition(" ")[2].strip()
    return verb not in NOT_SENT | NOT_WELL_FORMED and (verb not in HARMLESS or rest in HARMLESS[verb])


def error_of(line: bytes) -> BadCommand | None:
    """What is wrong with a line by itself."""
    try:
        parse_request(line.removesuffix(b"\r"))
    except BadCommand as error:
        return error
    return None


def pieces(dice: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in packets of any size."""
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice([0, 3, 30])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
