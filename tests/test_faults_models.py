"""The table of faults, rows 15 to 25: grammars, templates, files and workers. The others are in test_faults.py."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import quote_plus

import orjson
import pytest
import trio
from helpers import Inside, Place, daemon, eventually
from tiny_models import tiny_model

from bridge.config import Limits, Pool, Store
from bridge.providers import liveness
from bridge.providers.local import LocalProvider
from protocol.options import LoadOptions

SLOW = "echo?step_ms=5"
ENDLESS = "INFER_STREAM max_tokens=100000 ignore_eos=true"
TINY = LoadOptions(n_ctx=64, n_threads=1)


async def still_answers(place: Place) -> None:
    async with await place.unix() as wire:
        assert (await wire.ask("INFER max_tokens=2 a b"))["data"] == "a b"


# -- 15 to 17: what is run for a client ------------------------------------------------------------------------

GRAMMARS = {
    "nested": "root ::= " + "(" * 30_000 + "[a]" + ")" * 30_000,
    "nested and left open": "root ::= " + "(" * 60_000,
    "a rule that begins with itself": "root ::= root [a]",
    "rules in a circle": "root ::= one\none ::= two\ntwo ::= one",
    "a rule that is missing": "root ::= nobody",
    "repetitions of repetitions": "root ::= (([a]{1,1000}){1,1000}){1,1000}",
    "no rule": "",
    "not a grammar": "{}",
}


@pytest.mark.needs("llama_cpp")
async def test_fault_15_a_grammar_that_attacks(tmp_path: Path) -> None:
    """Refused before it is queued; who is there is not disturbed."""
    path = tiny_model(tmp_path, "llama")
    async with daemon(backend="llama", load=TINY) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD {path}"))["status"] == "ok"
        pid = await place.pid("tiny-llama")
        for what, grammar in GRAMMARS.items():
            request = orjson.dumps({"prompt": "a", "grammar": grammar, "max_tokens": 4}).decode()
            for verb in ("INFER", "INFER_STREAM"):
                reply = await wire.ask(f"{verb} {request}")
                expected = "bad_argument" if not grammar else "bad_grammar"
                assert (reply.get("code"), reply.get("blame")) == (expected, "client"), (what, reply)
        assert (await wire.ask("INFER max_tokens=1 a"))["status"] == "ok"
        assert await place.pid("tiny-llama") == pid


async def test_fault_15_a_schema_is_not_fetched() -> None:
    """There are no schemas here, so none can send the daemon anywhere."""
    listener = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener[0].socket.getsockname()[1]
    async with daemon("echo") as place, await place.unix() as wire:
        for key in ("json_schema", "grammar", "response_format"):
            schema = {"$ref": f"http://127.0.0.1:{port}/schema.json"}
            assert await wire.code(f"INFER {orjson.dumps({'prompt': 'a', key: schema}).decode()}") == "bad_argument"
        with trio.move_on_after(0.1) as nobody:
            await listener[0].accept()
        assert nobody.cancelled_caught
    await listener[0].aclose()


@pytest.mark.parametrize("how", ["segv", "abort", "kill"])
async def test_fault_16_a_grammar_is_a_workers_death(how: str) -> None:
    async with daemon(SLOW, "other") as place, await place.unix() as wire, await place.unix() as stream:
        pid = await place.pid()
        await stream.start(f"{ENDLESS} a")
        await stream.line()
        error = await wire.ask(f"INFER grammar=!{how} a")
        assert (error["code"], error["blame"]) == ("model_crashed", "retry")
        assert (await stream.final())["code"] == "model_crashed"
        assert (await wire.ask("INFER model=other max_tokens=1 a"))["data"] == "a"
        await still_answers(place)
        assert await place.pid() != pid


TEMPLATES = {
    "an attribute walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by a filter": "{{ ''|attr('__class__') }}{{ [].append.__globals__ }}",
    "the globals of a function": "{{ raise_exception.__globals__.os }}",
    "what it is given is changed": "{{ messages.append(1) }}",
    "a loop without end": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a text without end": "{{ 'x' * 10000000000 }}",
    "numbers without end": "{{ 9 ** (9 ** 9) }}",
    "no template": "{% for",
    "it calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
async def test_fault_17_a_template_that_attacks(what: str) -> None:
    """The model goes on: others' requests, and what needs no template."""
    model = f"echo?template={quote_plus(TEMPLATES[what])}"
    async with daemon(model) as place, await place.unix() as wire:
        pid = await place.pid()
        for verb in ("CHAT", "CHAT_STREAM"):
            error = await wire.ask(f"{verb} hello")
            assert (error["code"], error["blame"]) == ("template_error", "client"), error
        await still_answers(place)
        assert await place.pid() == pid


# -- 18: files -------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
async def test_fault_18_a_file_cut_short(default_model: Path, tmp_path: Path) -> None:
    """At many offsets; and the model that was loaded before still answers."""
    path = tmp_path / "cut.gguf"
    shutil.copyfile(default_model, path)
    size = path.stat().st_size
    header = size - 96_595_968  # about where the tensors begin
    offsets = [size - 1, size // 2, header + 4096, header, header // 2, 4096, 333, 24, 16, 5, 0]
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=before {default_model}"))["status"] == "ok"
        for offset in offsets:
            os.truncate(path, offset)
            error = await wire.ask(f"LOAD {path}")
            assert error["code"] == "load_failed", offset
            assert error["message"].startswith(f"Failed to load model: {path}: ")
        assert (await wire.ask("INFER max_tokens=2 Hello"))["model"] == "before"
        assert list(await place.models()) == ["before"]


@pytest.mark.parametrize("start", [b"GGUX\x03\0\0\0", b"GGUF\0\0\0\0", b"GGUF\x01\0\0\0", b"GGUF" + b"\xff" * 4])
async def test_fault_18_a_bad_beginning(default_model: Path, tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "bad.gguf"
    with default_model.open("rb") as file:
        path.write_bytes(start + file.read(1 << 20)[len(start) :])
    async with daemon(backend="llama") as place, await place.unix() as wire:
        assert await wire.code(f"LOAD {path}") == "load_failed"
        assert (await wire.ask("PING"))["data"] == "pong"


def lies(content: bytes) -> dict[str, bytes]:
    """A model with one number in its header changed."""

    def changed(after: bytes | int, number: int, size: int = 8) -> bytes:
        at = after if isinstance(after, int) else content.index(after) + len(after)
        return content[:at] + number.to_bytes(size, "little") + content[at + size :]

    tokens = b"tokenizer.ggml.tokens\x09\0\0\0"
    embedding = b"token_embd.weight\x02\0\0\0"
    return {
        "2^60 tensors": changed(8, 2**60),
        "2^60 keys": changed(16, 2**60),
        "a key of 2^63 bytes": changed(24, 2**63),
        "tokens that are numbers": changed(tokens, 4, size=4),
        "2^60 tokens": changed(tokens + b"\x08\0\0\0", 2**60),
        "a dimension of 2^62": changed(embedding, 2**62),
        "an offset past the end": changed(embedding + content[content.index(embedding) + len(embedding) :][:20], 2**40),
    }


@pytest.mark.needs("llama_cpp")
async def test_fault_19_a_header_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker is spawned for it, so llama.cpp does not see it; and the model loaded before still answers."""
    path = tiny_model(tmp_path, "llama")
    content = path.read_bytes()
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=before {path}"))["status"] == "ok"
        monkeypatch.setattr(LocalProvider, "_spawn", lambda self: pytest.fail("a worker was spawned"))
        bad = tmp_path / "bad.gguf"
        for what, patch in lies(content).items():
            bad.write_bytes(patch)
            error = await wire.ask(f"LOAD {bad}")
            assert error["code"] == "load_failed", what
            assert error["message"].startswith(f"Failed to load model: {bad}: "), what
        assert (await wire.ask("INFER max_tokens=2 Hello"))["model"] == "before"


@pytest.mark.needs("llama_cpp")
@pytest.mark.parametrize("cut", [0, 5, 16, 333, 0.5, -1])
async def test_fault_18_a_tiny_model_cut_short(tmp_path: Path, cut: float) -> None:
    """By a LOAD, and by a request that names it; what is known of it later, when it is whole, is not what was then."""
    path = tiny_model(tmp_path, "llama")
    content = path.read_bytes()
    end = int(cut * len(content)) if isinstance(cut, float) else cut
    path.write_bytes(content[:end])
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        for line in (f"LOAD {path}", f"INFER model={path} a"):
            assert await wire.code(line) == "load_failed", line
        assert await place.models() == {}
        path.write_bytes(content)
        assert (await wire.ask(f"INFER model={path} max_tokens=1 a"))["model"] == "tiny-llama"


STRANGE = {  # a key, and the type and the value in place of its uint32
    "no layers": ("llama.block_count", b"\x04\0\0\0" + b"\0" * 4),
    "4,294,967,295 layers": ("llama.block_count", b"\x04\0\0\0" + b"\xff" * 4),
    "no heads": ("llama.attention.head_count", b"\x04\0\0\0" + b"\0" * 4),
    "a length below nothing": ("llama.context_length", b"\x05\0\0\0" + b"\xff" * 4),
    "heads without end": ("llama.attention.head_count_kv", b"\x06\0\0\0" + b"\0\0\x80\x7f"),
}


@pytest.mark.needs("llama_cpp")
async def test_fault_19_a_header_of_strange_values(tmp_path: Path) -> None:
    """They are well formed, and believed until they are computed with. Nobody else suffers."""
    path = tiny_model(tmp_path, "llama")
    content = path.read_bytes()
    strange = tmp_path / "strange.gguf"
    async with daemon(backend="llama", load=LoadOptions(n_ctx=64, n_threads=1)) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD name=before {path}"))["status"] == "ok"
        pid = await place.pid("before")
        for what, (key, value) in STRANGE.items():
            at = content.index(key.encode()) + len(key)
            assert content[at : at + 4] == b"\x04\0\0\0", "a uint32"
            strange.write_bytes(content[:at] + value + content[at + 8 :])
            for line in (f"PLAN {strange}", f"LOAD {strange}", f"SHOW {strange}"):
                reply = await wire.ask(line)
                assert reply.get("blame") != "bug", (what, line, reply)
            await wire.ask("FREE strange")
        assert await place.pid("before") == pid
        assert (await wire.ask("INFER model=before max_tokens=2 Hello"))["status"] == "ok"


async def test_fault_20_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    what = [tmp_path / "fifo", tmp_path, "/dev/zero", "/dev/fd/0", tmp_path / "missing", tmp_path / "dangling"]
    what += [tmp_path / "loop", tmp_path / "fifo" / "x.gguf", "x" * 4000, "/" + "../" * 500 + "nowhere", "~nobody/x"]
    async with daemon(backend="llama") as place, await place.unix() as wire:
        for path in what:
            for line in (f"LOAD {path}", f"INFER model={path} a", f"PLAN {path}", f"LORA check {path}"):
                reply = await wire.ask(line)
                allowed = ("not_found", "no_model") if line.startswith("LORA") else ("not_found",)
                assert reply.get("code") in allowed, (line[:100], reply)
        for text in ("two\\nlines", "nul\\u0000", "/etc/pass\\u0000wd"):
            for line in (f'LOAD {{"path":"{text}"}}', f'INFER {{"prompt":"a","model":"{text}"}}'):
                assert await wire.code(line) in ("bad_argument", "not_found"), line
        assert (await wire.ask("STATUS"))["message"] == "No model loaded"


@pytest.mark.needs("llama_cpp")
async def test_fault_20_what_lies_outside(tmp_path: Path) -> None:
    """It is forbidden whether it is there or not, and whatever it is."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    tiny_model(outside, "llama")
    os.mkfifo(outside / "fifo")
    (inside / "escapes.gguf").symlink_to(outside / "tiny-llama.gguf")
    (inside / "folder").symlink_to(outside)
    (inside / "within.gguf").symlink_to(tiny_model(inside, "llama"))
    store = Store(dir=str(tmp_path / "store"), allow=[str(inside)], discover=False)
    fields = {"store": store, "load": LoadOptions(n_ctx=64, n_threads=1)}
    async with daemon(backend="llama", **fields) as place, await place.unix() as wire:
        for path in (
            outside / "tiny-llama.gguf",
            outside / "missing.gguf",
            outside / "fifo",
            inside / "escapes.gguf",
            inside / "folder" / "tiny-llama.gguf",
            f"{inside}/../out/tiny-llama.gguf",
            f"{inside}ly/tiny-llama.gguf",
            "/dev/zero",
            "/etc/passwd",
        ):
            for line in (f"LOAD {path}", f"INFER model={path} a", f"PLAN {path}", f"SHOW {path}"):
                reply = await wire.ask(line)
                assert (reply.get("code"), reply.get("allowed")) == ("forbidden", [str(inside)]), line
        assert await place.models() == {}
        assert await wire.code(f"LOAD {inside}/missing.gguf") == "not_found"
        assert (await wire.ask(f"LOAD {inside}/within.gguf"))["status"] == "ok"


@pytest.mark.needs("llama_cpp")
async def test_fault_21_a_file_cut_short_under_a_model(tmp_path: Path) -> None:
    """The pages that are gone are a SIGBUS for who reads them; nobody else reads them."""
    (tmp_path / "cut").mkdir()
    path, other = tiny_model(tmp_path / "cut", "llama"), tiny_model(tmp_path, "swa")
    load = LoadOptions(n_ctx=64, n_threads=1, use_mmap=True, repack=False)
    async with daemon(backend="llama", load=load) as place, await place.unix() as wire:
        assert (await wire.ask(f"LOAD {path}"))["model"] == "tiny-llama"
        assert (await wire.ask(f"LOAD {other}"))["model"] == "tiny-swa"
        os.truncate(path, 4096)
        reply = await wire.ask("INFER model=tiny-llama max_tokens=2 Hello")
        assert (reply["code"], reply["blame"]) == ("model_crashed", "retry")
        assert "SIGBUS" in reply["message"]
        assert await wire.code("INFER model=tiny-llama a") == "model_resting", "it cannot be started again"
        assert (await wire.ask("INFER model=tiny-swa max_tokens=2 Hello"))["status"] == "ok"
        assert await wire.code(f"LOAD {path}") == "load_failed"
        assert (await wire.ask("FREE all"))["status"] == "ok"
        assert await place.models() == {}


# -- 22, 24 and 25: workers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
async def test_fault_22_a_worker_dies(number: signal.Signals) -> None:
    async with daemon(SLOW, "other?step_ms=5") as place, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await place.unix()) for _ in range(6)]
        *streaming, quiet, queued, other = wires
        await quiet.send("INFER max_tokens=100000 a")
        await place.until(lambda models: models["echo"]["running"] == 1)
        for wire in streaming:
            await wire.start(f"{ENDLESS} a")
            assert (await wire.line())["type"] == "token"
        await queued.send("INFER max_tokens=2 a b")
        await other.start("INFER_STREAM model=other max_tokens=300 a")
        await place.until(lambda models: models["echo"]["running"] + models["echo"]["queued"] == 5)
        pid = await place.pid()
        os.kill(pid, number)
        for wire in streaming:
            final = await wire.final()
            assert (final["finish_reason"], final["code"], final["blame"]) == ("error", "model_crashed", "retry")
            assert number.name in final["reason"]
        error = await quiet.line()
        assert (error["status"], error["code"], error["blame"]) == ("error", "model_crashed", "retry")
        assert number.name in error["message"]
        assert not error["retried"]
        answer = await queued.line()
        assert (answer["data"], answer["retried"]) == ("a b", True), "it had no token, and is asked again by itself"
        await still_answers(place)
        assert await place.pid() != pid
        assert await other.text() == "a" + " a" * 299, "the other model's stream never noticed"


async def test_fault_22_after_three_crashes_it_rests() -> None:
    async with daemon("echo", "other") as place, await place.unix() as wire:
        for how in ("segv", "abort", "kill"):
            assert await wire.code(f"INFER a !{how}") == "model_crashed"
        error = await wire.ask("INFER a")
        assert (error["code"], error["blame"]) == ("model_resting", "retry")
        assert "3 times within 60 s" in error["message"]
        assert (await place.models())["echo"]["state"] == "resting"
        assert (await wire.ask("INFER model=other max_tokens=1 a"))["data"] == "a"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOEXEC, "model_resting"), (errno.EAGAIN, "overloaded")])
async def test_fault_22_a_restart_that_fails(number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as a crash, unless it is the machine that has nothing left; who waits for it is told."""

    def spawn(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    async with daemon("echo?load_ms=100") as place, await place.unix() as wire:
        await wire.send(b"INFER a !kill\nINFER a\n")
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", spawn)
            assert (await wire.line())["code"] == "model_crashed"
            assert (await wire.line())["code"] == code
        assert (await wire.ask("LOAD echo?load_ms=100"))["message"] == "Model loaded successfully"
        assert (await wire.ask("INFER max_tokens=1 a"))["data"] == "a"


STOPPED = {"generating": "INFER max_tokens=1 a", "embedding": "EMBED a", "looking": "QUEUE"}


@pytest.mark.parametrize("what", STOPPED)
async def test_fault_23_a_worker_is_stopped(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed by whoever waits for it, and killed; who had a token is told, the others are asked again."""
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    async with daemon(SLOW, "other") as place, await place.unix() as stream, await place.unix() as wire:
        pid = await place.pid()
        await stream.start(f"{ENDLESS} a")
        assert (await stream.line())["type"] == "token"
        os.kill(pid, signal.SIGSTOP)
        await wire.send(STOPPED[what])
        async with await place.unix() as other:
            assert (await other.ask("INFER model=other max_tokens=1 a"))["data"] == "a"
        final = await stream.final()
        assert (final["code"], final["blame"]) == ("model_crashed", "retry")
        assert "is stopped, and was killed" in final["reason"]
        reply = await wire.line()
        if what == "looking":  # at a queue that is no more
            assert reply["code"] == "model_crashed"
        else:
            assert (reply["status"], reply["retried"]) == ("ok", True)
        await still_answers(place)
        assert await place.pid() != pid
        assert (await place.models())["echo"]["restarts"] == 1


async def test_fault_23_a_worker_that_is_stopped_shortly_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    monkeypatch.setattr(liveness, "LOOKS", 1_000_000)
    async with daemon(SLOW) as place, await place.unix() as wire:
        pool, pid = place.server._daemon.pool, await place.pid()
        await wire.start("INFER_STREAM max_tokens=50 a")
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: ails(place, ["echo: its worker is stopped"]))
        os.kill(pid, signal.SIGCONT)
        assert await wire.text() == "a" + " a" * 49
        assert (pool.ailing(), await place.pid()) == ([], pid)


async def ails(place: Inside, expected: list[str]) -> bool:
    return place.server._daemon.pool.ailing() == expected


async def test_fault_23_an_idle_one_is_looked_at_by_who_asks() -> None:
    """Nobody waits for it, so it is left alone; who asks how things are is told."""
    async with daemon("echo") as place:
        pid = await place.pid()
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: ails(place, ["echo: its worker is stopped"]))
        os.kill(pid, signal.SIGCONT)
        await eventually(lambda: ails(place, []))
        await still_answers(place)
        assert await place.pid() == pid


async def test_fault_23_a_worker_computes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    async with daemon("echo", "other", limits=Limits(step=1.0)) as place, await place.unix() as wire:
        pid = await place.pid()
        await wire.start("INFER_STREAM a !hang")
        async with await place.unix() as queued, await place.unix() as other:
            await queued.send("INFER max_tokens=1 b")
            assert (await other.ask("INFER model=other max_tokens=1 a"))["data"] == "a"
            final = await wire.final()
            assert final["code"] == "model_crashed"
            assert "said nothing for" in final["reason"]
            answer = await queued.line()
            assert (answer["data"], answer["retried"]) == ("b", True)
        await still_answers(place)
        assert await place.pid() != pid


async def test_fault_23_one_that_works_long_in_silence_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds without a word to its client, where a step may take one and the worker says that it goes on."""
    monkeypatch.setattr(liveness, "LOOK", 0.05)
    async with daemon("echo?step_ms=50", limits=Limits(step=1.2)) as place, await place.unix() as wire:
        pid = await place.pid()
        assert (await wire.ask("INFER max_tokens=50 ignore_eos=true a"))["finish_reason"] == "length"
        assert await place.pid() == pid


async def test_fault_23_a_load_hangs() -> None:
    async with daemon("other", limits=Limits(load=2.0)) as place, await place.unix() as wire:
        error = await wire.ask("LOAD echo?load_ms=60000")
        assert error["code"] == "load_failed"
        assert "longer than 2 s" in error["message"]
        assert (await wire.ask("INFER model=other max_tokens=1 a"))["data"] == "a"


async def test_fault_24_two_loads_at_once() -> None:
    async with daemon() as place, await place.unix() as one, await place.unix() as two:
        for wire in (one, two):
            await wire.send("LOAD echo?load_ms=100")
        for wire in (one, two):
            assert (await wire.line())["message"] == "Model loaded successfully"
        assert list(await place.models()) == ["echo"]
        assert await one.code("LOAD name=echo other") == "name_taken"


@pytest.mark.parametrize("drain", ["true", "false"])
async def test_fault_24_free_during_a_generation(drain: str) -> None:
    async with daemon(SLOW) as place, await place.unix() as wire, await place.unix() as other:
        await wire.start("INFER_STREAM max_tokens=60 a")
        reply = await other.ask(f"FREE drain={drain} echo")
        if drain == "true":
            assert reply["freed"] == ["echo"]
        else:
            assert (reply["code"], reply["blame"]) == ("busy", "retry")
        assert await wire.text() == "a" + " a" * 59


async def test_fault_24_fifty_loads_and_frees_at_once() -> None:
    """In any order: each is answered, and in the end the model is there or it is not, with one worker or none."""
    before = children()
    async with daemon("other") as place, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(await place.unix()) for _ in range(50)]
        for _ in range(3):
            for number, wire in enumerate(wires):
                await wire.send("FREE echo" if number % 2 else "LOAD echo")
            replies = [await wire.line() for wire in wires]
            assert {reply.get("code", "ok") for reply in replies} <= {"ok", "not_found", "busy"}
            assert "ok" in {reply["status"] for reply in replies}
        models = await place.models()
        assert models.keys() <= {"echo", "other"}
        await wires[0].ask("FREE all")
        assert await place.models() == {}
        assert children() == before


def children() -> set[int]:
    """The processes that this one began and that are still there."""
    return {int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()}


async def test_fault_25_too_little_memory() -> None:
    """Before anything is loaded; who is there stays, and is not asked to leave for nothing."""
    pool = Pool(memory=250 << 20)
    async with daemon("echo?mb=100", pool=pool) as place, await place.unix() as wire:
        pid = await place.pid()
        for line in ("LOAD big?mb=300", "LOAD big?mb=300&load=segv"):
            reply = await wire.ask(line)
            assert (reply["code"], reply["blame"]) == ("load_failed", "client")
            assert (reply["need"]["host"], reply["have"]["host"]) == (300 << 20, 150 << 20)
        assert list(await place.models()) == ["echo"]
        assert await place.pid() == pid
        await still_answers(place)


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_fault_25_when_memory_runs_out_a_worker_goes_first() -> None:
    """By the kernel's choice: the daemon, and with it the other models, are to stay."""
    async with daemon("echo") as place:
        assert oom_score(await place.pid()) > oom_score(os.getpid())


@pytest.mark.needs("llama_cpp")
async def test_fault_25_too_little_memory_for_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(tmp_path, "llama")
    monkeypatch.setattr(LocalProvider, "_spawn", lambda self: pytest.fail("a worker was spawned"))
    async with daemon(backend="llama", pool=Pool(memory=10 << 20)) as place, await place.unix() as wire:
        reply = await wire.ask(f"LOAD n_ctx=4096 {path}")
        assert (reply["code"], reply["blame"]) == ("load_failed", "client")
        assert reply["need"]["host"] > 10 << 20
        assert reply["have"]["host"] == 10 << 20
        assert await place.models() == {}
