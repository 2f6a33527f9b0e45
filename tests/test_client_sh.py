"""The shell client, with each way to the socket that this machine has."""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from helpers import PATIENCE, Spawned, running, spawned
from scripted import FETCHING, PIECES, SHA256, Peer, honest, raw, scripted

from bridge.access.tokens import issue
from protocol.commands import (
    Attach,
    Command,
    Embed,
    Free,
    Health,
    Infer,
    InferStream,
    Jobs,
    Load,
    Lora,
    Metrics,
    Models,
    Ping,
    Plan,
    Pull,
    Reload,
    Remove,
    Status,
    Submit,
)
from protocol.replies import Failed, Final, Ok, Progress, Started, Token

SCRIPT = Path(__file__).parent.parent / "client" / "bridge.sh"
SHELLS = [shell for shell in ("dash", "sh", "bash", "busybox") if shutil.which(shell)]
TOOLS = [tool for tool in ("socat", "nc", "ncat") if shutil.which(tool)]
AWKS = [awk for awk in ("mawk", "gawk", "original-awk", "busybox") if shutil.which(awk)]
TEXT = "".join(PIECES)

pytestmark = pytest.mark.skipif(not TOOLS, reason="needs socat or nc")
Sh = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sh(tmp_path: Path) -> Sh:
    """Runs bridge.sh; ``tool`` and ``awk`` choose what it runs on."""

    def run(
        *arguments: str,
        stdin: str = "",
        shell: str = "sh",
        tool: str = TOOLS[0],
        awk: str | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        path = os.environ["PATH"]
        if awk:
            link = tmp_path / "awk"
            if not link.exists():
                link.symlink_to(str(shutil.which(awk)))
            path = f"{tmp_path}:{path}"
        command = [shell, *(["sh"] if shell == "busybox" else []), str(SCRIPT), *arguments]
        return subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            encoding="utf-8",
            env={"PATH": path, "LLAMA_BRIDGE_NC": tool, **environment},
        )

    return run


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def bad(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    assert (done.returncode, done.stdout) == (status, "")
    return done.stderr


# -- commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("shell", SHELLS)
def test_every_way_there(sh: Sh, shell: str, tool: str, tcp: bool) -> None:
    with scripted(tcp=tcp) as server:
        where = ("-t" if tcp else "-s", server.address)
        assert good(sh(*where, "ping", shell=shell, tool=tool)) == "pong\n"
        assert good(sh(*where, "stream", "x", shell=shell, tool=tool)) == TEXT + "\n"
        assert good(sh(*where, "infer", TEXT, shell=shell, tool=tool)) == TEXT + "\n"


@pytest.mark.parametrize(
    ("arguments", "command", "printed"),
    [
        (["ping"], Ping(), "pong"),
        (["status"], Status(), "Model loaded: /models/tiny.gguf"),
        (["models"], Models(), '[{"name":"tiny","path":"/models/tiny.gguf","state":"ready","default":true,'),
        (["load", "/a b/m.gguf"], Load(path="/a b/m.gguf"), "Model loaded successfully"),
        (
            ["load", "-p", "n_ctx=64", "-p", "name=7", "m"],
            Load(path="m", name="7", n_ctx=64),
            "Model loaded successfully",
        ),
        (
            ["load", "-p", "n_ctx=auto", "-p", "lora=/a b:0.5", "-p", "lora=7", "-p", "keep_alive=-1", "user/repo:Q4"],
            Load(path="user/repo:Q4", n_ctx="auto", lora=["/a b:0.5", "7"], keep_alive=-1.0),
            "Model loaded successfully",
        ),
        (["plan", "-p", "n_parallel=2", "tiny"], Plan(path="tiny", n_parallel=2), '{"fits":true,'),
        (["health"], Health(), '{"state":"ready",'),
        (["metrics"], Metrics(format="prometheus"), "# TYPE a gauge\na 1\n"),
        (["reload"], Reload(), '{"changed":["models"],'),
        (["remove", "tiny"], Remove(model="tiny"), '{"name":"tiny",'),
        (
            ["pull", "-p", "progress=false", "-p", f"sha256={SHA256}", "a/b:Q4"],
            Pull(source="a/b:Q4", progress=False, sha256=SHA256),
            '{"name":"tiny","path":"/store/tiny.gguf",',
        ),
        (["lora"], Lora(), '[{"name":"style",'),
        (["lora", "-p", "model=7", "list"], Lora(model="7"), '[{"name":"style",'),
        (["lora", "load", "/a b.gguf"], Lora(action="load", adapter="/a b.gguf"), '{"name":"style",'),
        (["lora", "check", "x"], Lora(action="check", adapter="x"), '{"name":"style",'),
        (["lora", "unload", "x"], Lora(action="unload", adapter="x"), "style"),
        (["infer", "-p", "lora=7", "x"], Infer(prompt="x", lora=["7"]), "x"),
        (["free"], Free(), "Resources freed"),
        (["free", "-p", "drain=false", "tiny"], Free(model="tiny", drain=False), "Resources freed"),
        (["embed", "some", "text"], Embed(text="some text"), "[1.0,-2.0]"),
        (["embed", "-p", "encoding=base64", "x"], Embed(text="x", encoding="base64"), "AACAPwAAAMA="),
        (["infer", "a", "b"], Infer(prompt="a b"), "a b"),
        (["infer", "-p", "seed=5", "x"], Infer(prompt="x", seed=5), "x"),
        (["infer", "-p", "temperature=0.5", "-p", "model=5", "x"], Infer(prompt="x", temperature=0.5, model="5"), "x"),
        (["infer", "-p", "stop=5", "-p", 'stop="\n', "x"], Infer(prompt="x", stop=["5", '"\n']), "x"),
        (["infer", "-p", 'logit_bias={"5":-1}', "x"], Infer(prompt="x", logit_bias={5: -1.0}), "x"),
        (["infer", "-p", "ignore_eos=true", "x"], Infer(prompt="x", ignore_eos=True), "x"),
        (["infer", "--", "-x"], Infer(prompt="-x"), "-x"),
        (
            ["submit", "-p", "max_tokens=5", "-p", "stop=\n", 'a "b"\n\\'],
            Submit(request=r'INFER {"max_tokens":5,"stop":["\n"],"prompt":"a \"b\"\n\\"}'),
            "0f0f",
        ),
        (["attach", "-p", "offset=4", "0f"], Attach(job="0f", offset=4), " upon"),
        (["jobs"], Jobs(), '[{"job":"0f0f'),
        (["jobs", "list", "0f" * 16], Jobs(job="0f" * 16), '[{"job":"0f0f'),
        (["jobs", "cancel", "0f"], Jobs(action="cancel", job="0f"), '{"job":"0f0f'),
        (["jobs", "forget", "0f"], Jobs(action="forget", job="0f"), '{"job":"0f0f'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_commands(sh: Sh, arguments: list[str], command: Command, printed: str) -> None:
    with scripted() as server:
        assert good(sh("-s", server.address, *arguments)).startswith(printed)
        assert server.seen == [command]


def test_chat_and_raw(sh: Sh) -> None:
    with scripted() as server:
        assert good(sh("-s", server.address, "chat", "hello")) == TEXT + "\n"
        lines = good(sh("-s", server.address, "raw", "PING", "INFER max_tokens=1 x=1 4")).splitlines()
        assert lines[0] == '{"status":"ok","message":"pong","data":"pong"}'
        assert lines[1].startswith('{"status":"ok","message":"Inference completed","data":"x=1 4",')
        assert server.seen[-1] == Infer(prompt="x=1 4", max_tokens=1)


@pytest.mark.parametrize("arguments", [["infer"], ["infer", "-"]], ids=["none", "dash"])
def test_the_prompt_from_standard_input(sh: Sh, arguments: list[str]) -> None:
    with scripted() as server:
        good(sh("-s", server.address, *arguments, stdin='\n two "lines"\\\n\n'))
        assert server.seen == [Infer(prompt='\n two "lines"\\\n\n')]


def test_where_it_looks_by_default(sh: Sh) -> None:
    with scripted() as server:
        assert good(sh("ping", LLAMA_BRIDGE_SOCKET=server.address)) == "pong\n"
        runtime = os.path.dirname(server.address)
        os.symlink(server.address, os.path.join(runtime, "llama-bridge.sock"))
        assert good(sh("ping", XDG_RUNTIME_DIR=runtime)) == "pong\n"


def test_help(sh: Sh) -> None:
    text = good(sh("help"))
    assert good(sh("-h")) == text
    # Every command of the script stands in its help.
    _, _, main = SCRIPT.read_text().partition("\nmain() {")
    cases = re.findall(r"^ {8}([a-z]+(?: \| [a-z]+)*)\)", main, re.MULTILINE)
    commands = {name for names in cases for name in names.split(" | ")}
    assert {"ping", "reload", "plan"} <= commands
    assert commands - {"help"} <= set(re.findall(r"^  (\w+)", text, re.MULTILINE))


# -- JSON ------------------------------------------------------------------------------------------------------

HARD = 'q" b\\ s/ \n\n\t \r \x01\x1f\x7f &&\\& %s %d $x `y` é€\U0001f999 \\n \\u0041 {"a":[1]} \u2028'
ESCAPED = [
    (r"\"\\\/\b\f\n\r\t", '"\\/\b\f\n\r\t'),
    (r"\u0041\u00e9\u20AC\uFFFD", "A\xe9\u20ac\ufffd"),
    (r"\ud83e\udd99\uD83E\uDD99", "\U0001f999\U0001f999"),
    (r"\ud83e!\udd99", "\ufffd!\ufffd"),
    (r"\ud83eA", "\ufffdA"),
    (r"\\n\\u0041\\\"", '\\n\\u0041\\"'),
    (r"a\u0001b", "a\x01b"),
]


@pytest.mark.parametrize("awk", AWKS)
def test_a_hard_prompt_arrives_and_its_answer_is_printed_as_it_is(sh: Sh, awk: str) -> None:
    with scripted() as server:
        printed = sh("-s", server.address, "infer", HARD, awk=awk)
        assert server.seen == [Infer(prompt=HARD)]
        # subprocess reads \r as a newline in text mode
        assert good(printed) == HARD.replace("\r", "\n") + "\n"


@pytest.mark.parametrize(("escaped", "text"), ESCAPED)
@pytest.mark.parametrize("awk", AWKS)
def test_escapes_in_answers(sh: Sh, awk: str, escaped: str, text: str) -> None:
    expected = text.replace("\r", "\n") + "\n"
    answer = f'{{"status":"ok","message":"x","data":"{escaped}","model":"m"}}\n'
    tokens = '{"status":"ok","message":"Starting token generation"}\n'
    tokens += f'{{"type":"token","token":"{escaped}","logprobs":[{{"token":"{escaped}"}}]}}\n'
    tokens += '{"type":"token","token":"","final":true,"finish_reason":"stop"}\r\n'
    with scripted(raw(answer.encode()), raw(tokens.encode())) as server:
        assert good(sh("-s", server.address, "infer", "x", awk=awk)) == expected
        assert good(sh("-s", server.address, "stream", "x", awk=awk)) == expected


@pytest.mark.parametrize("awk", AWKS)
def test_long_lines(sh: Sh, awk: str) -> None:
    vector = [index / 7 for index in range(4096)]
    prompt = "0123456789\n" * 50_000

    def long(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Ok("x", vector))

    with scripted(long, honest) as server:
        assert good(sh("-s", server.address, "embed", "x", awk=awk)).count(",") == 4095
        assert good(sh("-s", server.address, "infer", stdin=prompt, awk=awk)) == prompt + "\n"
        assert server.seen[-1] == Infer(prompt=prompt)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("awk", AWKS)
def test_a_stream_is_printed_as_it_comes(awk: str, tool: str, tmp_path: Path) -> None:
    """The bridge says each piece only when the one before was on the screen."""
    (tmp_path / "awk").symlink_to(str(shutil.which(awk)))
    screen: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def one_by_one(peer: Peer) -> None:
        exchange = peer.expect().exchange
        output = screen.get(timeout=PATIENCE).stdout  # the script may ask before its process is in our hands
        assert output
        peer.reply(exchange, Started())
        for piece in ("one", "two", "three"):
            peer.reply(exchange, Token(piece))
            assert output.read(len(piece)) == piece.encode()
        peer.reply(exchange, Final("!", "stop"))

    with scripted(one_by_one) as server:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LLAMA_BRIDGE_NC": tool}
        command = ["sh", str(SCRIPT), "-s", server.address, "stream", "x"]
        with running(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as process:
            screen.put(process)
            server.await_end(0)
            assert process.stdout
            assert process.stdout.read() == b"!\n"
        assert process.returncode == 0
        assert server.seen == [InferStream(prompt="x")]


TOLD = ["download: 0 bytes", "download: 50 of 100 bytes", "check: 100 of 100 bytes"]


@pytest.mark.parametrize("awk", AWKS)
@pytest.mark.parametrize("arguments", [["pull", "x"], ["load", "-p", "progress=true", "x"]], ids=["pull", "load"])
def test_progress_goes_to_the_standard_error(sh: Sh, arguments: list[str], awk: str) -> None:
    with scripted() as server:
        done = sh("-s", server.address, *arguments, awk=awk)
        assert (done.returncode, done.stderr.splitlines()) == (0, TOLD)
        assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("awk", AWKS)
def test_progress_is_printed_as_it_comes(awk: str, tool: str, tmp_path: Path) -> None:
    """The bridge says each line only when the one before was on the screen."""
    (tmp_path / "awk").symlink_to(str(shutil.which(awk)))
    screen: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def one_by_one(peer: Peer) -> None:
        exchange = peer.expect().exchange
        errors = screen.get(timeout=PATIENCE).stderr  # the script may ask before its process is in our hands
        assert errors
        for progress, line in zip(FETCHING, TOLD, strict=True):
            peer.reply(exchange, progress)
            assert errors.read(len(line) + 1) == f"{line}\n".encode()
        peer.reply(exchange, Ok("Model pulled", "done"))

    with scripted(one_by_one) as server:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LLAMA_BRIDGE_NC": tool}
        command = ["sh", str(SCRIPT), "-s", server.address, "pull", "x"]
        pipe = subprocess.PIPE
        with running(*command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment) as process:
            screen.put(process)
            assert process.stdout
            assert process.stdout.read() == b"done\n"
        assert process.returncode == 0


# -- errors ----------------------------------------------------------------------------------------------------


def test_an_error_answer(sh: Sh) -> None:
    with scripted() as server:
        done = sh("-s", server.address, "load", "missing.gguf")
        assert bad(done) == "error: Failed to load model: missing.gguf [load_failed]\n"
        assert bad(sh("-s", server.address, "infer", "-p", "max_tokens=0", "x")).startswith("error: max_tokens: ")
        assert bad(sh("-s", server.address, "stream", "-p", "top_k=y", "x")).startswith("error: top_k: ")


def test_a_stream_that_fails_in_the_middle(sh: Sh) -> None:
    def fails(peer: Peer) -> None:
        end = Final("", "error", {"code": "model_crashed", "blame": "retry", "reason": 'tiny "died"'})
        peer.reply(peer.expect().exchange, Started(), Token("so far"), end)

    def refuses(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Failed("overloaded", "Full", {"retry_after_ms": 5}))

    with scripted(fails, refuses) as server:
        done = sh("-s", server.address, "stream", "x")
        assert (done.returncode, done.stdout, done.stderr) == (1, "so far\n", 'error: tiny "died" [model_crashed]\n')
        assert bad(sh("-s", server.address, "stream", "x")) == "error: Full [overloaded]\n"


def test_a_pull_that_fails(sh: Sh) -> None:
    def fails(peer: Peer) -> None:
        failed = Failed("pull_failed", "It broke off; what came is kept")
        peer.reply(peer.expect().exchange, Progress('a "phase"', 5, 10, "tensors"), failed)

    half = b'{"type":"progress","phase":"download","done":5,"total":null,"unit":"bytes","rate":null,"left_s":null}\n'
    with scripted(fails, raw(half)) as server:
        error = bad(sh("-s", server.address, "pull", "x"))
        assert error == 'a "phase": 5 of 10 tensors\nerror: It broke off; what came is kept [pull_failed]\n'
        error = bad(sh("-s", server.address, "pull", "x"))
        assert error == "download: 5 bytes\nerror: the daemon closed the connection before its answer ended\n"


def test_a_bridge_that_breaks(sh: Sh) -> None:
    half = b'{"status":"ok","message":"Starting token generation"}\n{"type":"token","token":"so"}\n'
    with scripted(raw(b""), raw(half), raw(b"220 mail.example ready\n")) as server:
        assert "no answer from" in bad(sh("-s", server.address, "ping"))
        done = sh("-s", server.address, "stream", "x")
        assert (done.returncode, done.stdout) == (1, "so")
        assert "closed the connection" in done.stderr
        assert "not a bridge: 220 mail" in bad(sh("-s", server.address, "ping"))


@pytest.mark.parametrize("tool", TOOLS)
def test_nobody_there(sh: Sh, tool: str, tmp_path: Path) -> None:
    assert f"no answer from {tmp_path}/none" in bad(sh("-s", f"{tmp_path}/none", "ping", tool=tool))


def test_no_tool(sh: Sh) -> None:
    assert "needs socat or nc" in bad(sh("ping", tool="no-such-tool"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command"),
        (["dance"], "unknown command dance"),
        (["-z", "ping"], "unknown option -z"),
        (["-s"], "-s needs a value"),
        (["ping", "x"], "ping takes no arguments"),
        (["infer", "-p", "novalue", "x"], "-p takes KEY=VALUE"),
        (["infer", "-q", "x"], "unknown option -q"),
        (["infer", "-p"], "-p needs a value"),
        (["load"], "load takes one model"),
        (["plan"], "plan takes one model"),
        (["remove", "a", "b"], "remove takes one model"),
        (["pull"], "pull takes one source"),
        (["reload", "x"], "reload takes no arguments"),
        (["lora", "dance"], "lora takes list, load, unload or check"),
        (["lora", "list", "x"], "lora list takes no adapter"),
        (["lora", "load"], "lora load takes one adapter"),
        (["free", "a", "b"], "free takes one model"),
        (["raw"], "raw takes one line"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line(sh: Sh, arguments: list[str], words: str) -> None:
    assert words in bad(sh(*arguments), status=2)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck() -> None:
    subprocess.run(["shellcheck", "--shell=sh", str(SCRIPT)], check=True)


# -- who asks --------------------------------------------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """A file of a token, beside the file of what the daemon knows of it."""
    path = tmp_path / "secret"
    path.write_text(issue(str(tmp_path / "tokens"), "ci", "operator") + "\n")
    return path


@pytest.fixture
def guarded(tmp_path: Path, token: Path) -> Iterator[Spawned]:
    variables = {"LOOPBACK": "none", "TOKENS": str(tmp_path / "tokens")}
    with spawned("--load", "echo", environ={f"LLAMA_BRIDGE_ACCESS_{key}": one for key, one in variables.items()}) as it:
        yield it


@pytest.mark.parametrize("tool", TOOLS)
def test_a_token(sh: Sh, guarded: Spawned, token: Path, tool: str) -> None:
    there = ("-t", f"127.0.0.1:{guarded.port}")
    by_file = {"LLAMA_BRIDGE_TOKEN_FILE": str(token)}
    by_itself = {"LLAMA_BRIDGE_TOKEN": token.read_text().strip()}
    assert "[unauthorized]" in bad(sh(*there, "status", tool=tool))
    for environment in (by_file, by_itself):
        assert good(sh(*there, "infer", "-p", "max_tokens=2", "a b", tool=tool, **environment)) == "a b\n"
        assert good(sh(*there, "stream", "-p", "max_tokens=2", "a b", tool=tool, **environment)) == "a b\n"
        assert '"role":"operator"' in good(sh(*there, "raw", "STATUS", tool=tool, **environment))
    wrong = {"LLAMA_BRIDGE_TOKEN": "lb_wrong"}
    assert "[unauthorized]" in bad(sh(*there, "status", tool=tool, **wrong))
    assert '"code":"unauthorized"' in sh(*there, "raw", "PING", tool=tool, **wrong).stdout.splitlines()[0]
    assert "No such file" in sh(*there, "ping", tool=tool, LLAMA_BRIDGE_TOKEN_FILE="/nowhere").stderr


@pytest.mark.needs("socat")
def test_tls(sh: Sh, tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "bridge.pem")
    environ = {"LLAMA_BRIDGE_TLS_CERTIFICATE": str(tmp_path / "bridge.pem")}
    with spawned("--load", "echo", "--tcp", "tls:127.0.0.1:0", ports=2, environ=environ) as place:
        there = ("-t", f"tls:localhost:{place.ports[1]}")
        assert good(sh(*there, "ping", tool="socat", LLAMA_BRIDGE_CA=str(tmp_path / "ca.pem"))) == "pong\n"
        assert sh(*there, "ping", tool="socat").returncode == 1
        assert "TLS takes socat" in sh(*there, "ping", tool="nc").stderr
