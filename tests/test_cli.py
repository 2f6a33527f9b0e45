"""The client commands of the command line, against a scripted bridge."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import trustme
from click.testing import CliRunner, Result
from helpers import running, spawned
from scripted import MODEL, PIECES, SHA256, Peer, ignores, once, raw, scripted, until_cancelled

from bridge import __version__
from bridge.access.tokens import issue
from bridge.cli.main import cli
from protocol.commands import (
    Attach,
    Chat,
    ChatStream,
    Command,
    Embed,
    Free,
    Infer,
    InferStream,
    Jobs,
    Load,
    Lora,
    Message,
    Models,
    Plan,
    Pull,
    Reload,
    Remove,
    Show,
    Submit,
    Tokenize,
)
from protocol.errors import ErrorCode
from protocol.replies import Failed, Final, Ok, Started, Token

ROOT = Path(__file__).parent.parent
TEXT = "".join(PIECES)


def run(*arguments: str, stdin: str = "") -> Result:
    result = CliRunner().invoke(cli, arguments, input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*arguments: str, stdin: str = "") -> str:
    result = run(*arguments, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


# -- what is asked and printed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("ping", ["pong"]),
        ("hello", ["llama-bridge 9.9, protocol 1", "features: chat", "clients  4"]),
        ("status", ["Model loaded: /models/tiny.gguf", "version 9.9, pid 0, up 0 s, 0 clients", "tiny *"]),
        ("health", ["ready: 1 run and 0 wait, in 4 slots"]),
        ("metrics", ["up 60 s, 42.0 MB, 3 clients", "tiny", "500", "50%", "77", "125.0 ms", "(no command)", "70"]),
        ("metrics --prometheus", ["# TYPE a gauge\na 1\n"]),
        ("models", ["n_ctx", "tiny *"]),
        ("models --loaded TIN", ["tiny *"]),
        ("models other", ["no models"]),
        ("show", ["name", "tiny", "option", "n_ctx", "512"]),
        ("queue", ["runs", "7 *"]),
        ("load tiny.gguf", ["tiny loaded in 1.2 s"]),
        (
            "plan tiny",
            [
                "/models/tiny.gguf: it fits",
                "would be unloaded: old",
                "would have to wait for: busy",
                "longest n_ctx in what is free now: 8192",
                "98.4 MB",
                "KV cache",
                "GPU memory",
                "2.0 MB",
                "4.0 GB",
                "true",
                "the model was trained with it",
            ],
        ),
        ("free", ["freed: tiny"]),
        ("pull user/tiny:Q4_0", ["tiny: 100 bytes in /store/tiny.gguf\n"]),
        ("remove tiny", ["removed: tiny, 100 bytes"]),
        ("lora", ["style", "1.0 kB", "0.5", "/a/style.gguf"]),
        ("lora load style", ["style loaded: rank 8, alpha 16, 1.0 kB"]),
        ("lora check style", ["style fits: rank 8, alpha 16, 1.0 kB"]),
        ("lora unload style", ["style unloaded"]),
        ("infer some prompt", [TEXT]),
        ("infer --no-stream some prompt", ["some prompt"]),
        ("chat --no-stream some words", ["1: some words"]),
        ("embed some text", ["1 -2"]),
        ("tokenize ab", ["97 98"]),
        ("submit some prompt", ["0f" * 16]),
        ("attach 0f", [TEXT]),
        ("attach whole", ["[1.5]"]),
        ("jobs", ["0f" * 16, "running", "INFER", "5 s", "12", "2.0 kB"]),
        (f"jobs list {'0f' * 16}", ["running", "INFER"]),
        ("jobs cancel 0f", ["0f is cancelled"]),
        ("jobs forget 0f", ["0f forgotten"]),
    ],
)
def test_what_is_printed(line: str, printed: list[str]) -> None:
    with scripted() as server:
        output = good(*line.split(), "--socket", server.address)
        assert output.endswith("\n")
        for words in printed:
            assert words in output


@pytest.mark.parametrize(
    "line",
    ["hello", "status", "models", "show", "queue", "load x", "plan x", "free", "pull x", "remove x", "lora",
     "lora load x", "lora check x", "health", "metrics", "infer x", "chat x", "embed x", "tokenize x",
     "submit x", "attach x", "jobs", "jobs cancel x"],
)  # fmt: skip
def test_json(line: str) -> None:
    with scripted() as server:
        output = good(*line.split(), "--json", "--socket", server.address)
        assert output.count("\n") == 1
        assert json.loads(output)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("infer a b", InferStream(prompt="a b")),
        ("submit --ttl 60 -n 5 a b", Submit(request='INFER_STREAM {"max_tokens":5,"prompt":"a b"}', ttl_s=60)),
        ("submit --chat --seed 7 hi",
         Submit(request='CHAT_STREAM {"seed":7,"messages":[{"role":"user","content":"hi"}]}')),
        ("attach --offset 5 0f", Attach(job="0f", offset=5)),
        ("jobs --all", Jobs(all=True)),
        (f"jobs list {'0f' * 16}", Jobs(job="0f" * 16)),
        ("jobs forget 0f", Jobs(action="forget", job="0f")),
        ("infer --json -n 5 --temperature 0 --top-k 3 --top-p 0.5 --seed 7 -m tiny x",
         Infer(prompt="x", max_tokens=5, temperature=0.0, top_k=3, top_p=0.5, seed=7, model="tiny")),
        ("infer --no-stream --stop 5 --stop b -p stop=c x", Infer(prompt="x", stop=["5", "b", "c"])),
        ('infer --no-stream -p stop=["a","b"] -p min_p=0.1 x', Infer(prompt="x", stop=["a", "b"], min_p=0.1)),
        ('infer --no-stream -p logit_bias={"5":-1} -p ignore_eos=true x',
         Infer(prompt="x", logit_bias={5: -1.0}, ignore_eos=True)),
        ("infer --no-stream -p model=7 x", Infer(prompt="x", model="7")),
        ("infer --no-stream -- -p x", Infer(prompt="-p x")),
        ("chat a b", ChatStream(messages=[Message(role="user", content="a b")])),
        ("chat --json --system s -p template=chatml u",
         Chat(messages=[Message(role="system", content="s"), Message(role="user", content="u")], template="chatml")),
        ("load --name t --n-ctx 64 -p use_mmap=false -p type_k=q8_0 no/such/file.gguf",
         Load(path="no/such/file.gguf", name="t", n_ctx=64, use_mmap=False, type_k="q8_0")),
        ("load --n-ctx auto --n-gpu-layers -1 --keep-alive -1 --pin --lora a:0.5 --lora b -p lora=c --quant q4_k_m u/r",
         Load(path="u/r", n_ctx="auto", n_gpu_layers=-1, keep_alive=-1.0, pin=True, lora=["a:0.5", "b", "c"],
              quant="q4_k_m")),
        ("plan --n-parallel 2 --n-gpu-layers auto -p type_v=q8_0 tiny",
         Plan(path="tiny", n_parallel=2, n_gpu_layers="auto", type_v="q8_0")),
        ("free --no-drain tiny", Free(model="tiny", drain=False)),
        ("models", Models()),
        ("models --not-loaded", Models(loaded=False)),
        (f"pull --sha256 {SHA256} user/tiny/x.gguf", Pull(source="user/tiny/x.gguf", sha256=SHA256, progress=False)),
        ("pull --name tiny u/r", Pull(source="u/r", name="tiny", progress=False)),
        ("remove tiny", Remove(model="tiny")),
        ("lora", Lora()),
        ("lora list -m tiny", Lora(model="tiny")),
        ("lora unload -m tiny style", Lora(action="unload", adapter="style", model="tiny")),
        ("infer --no-stream --lora a --lora b:2 --keep-alive 0 x",
         Infer(prompt="x", lora=["a", "b:2"], keep_alive=0.0)),
        ("chat --json --lora a -m user/repo:Q4 u",
         Chat(messages=[Message(role="user", content="u")], lora=["a"], model="user/repo:Q4")),
        ("embed --keep-alive 60 --lora a x", Embed(text="x", encoding="base64", keep_alive=60.0, lora=["a"])),
        ("show tiny", Show(model="tiny")),
        ("embed -m tiny x", Embed(text="x", model="tiny", encoding="base64")),
        ("embed --dimensions 64 x", Embed(text="x", encoding="base64", dimensions=64)),
        ("tokenize --special x", Tokenize(text="x", special=True)),
    ],
)  # fmt: skip
def test_what_is_asked(line: str, command: Command) -> None:
    with scripted() as server:
        good(line.split()[0], "--socket", server.address, *line.split()[1:])
        assert server.seen == [command]


def test_a_number_that_is_none() -> None:
    result = run("load", "--n-ctx", "many", "a.gguf")
    assert result.exit_code == 2
    assert "'many' is neither a whole number nor auto" in result.stderr


def test_a_job_whose_connection_breaks_says_how_to_go_on() -> None:
    def breaks(peer: Peer) -> None:
        peer.reply(peer.expect().exchange, Started(), Token("so far", {"offset": 11}))

    with scripted(breaks) as server:
        result = run("attach", "--offset", "5", "0f", "--socket", server.address)
    assert (result.exit_code, result.stdout) == (1, "so far\n")
    assert result.stderr.startswith("(with --offset 11 it goes on from here)\nerror: the daemon closed the connection")


@pytest.mark.parametrize("arguments", [["infer"], ["infer", "-"]], ids=["none", "dash"])
def test_the_prompt_from_standard_input(arguments: list[str]) -> None:
    with scripted() as server:
        good(*arguments, "--socket", server.address, stdin="two\nlines\n")
        assert server.seen == [InferStream(prompt="two\nlines\n")]


def test_over_tcp() -> None:
    with scripted(tcp=True) as server:
        assert good("ping", "--tcp", server.address) == "pong\n"


def test_the_default_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted() as server:
        monkeypatch.setenv("LLAMA_BRIDGE_SOCKET", server.address)
        assert good("ping") == "pong\n"


def test_a_file_that_is_here_is_loaded_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    with scripted() as server, scripted(tcp=True) as other:
        good("load", "m.gguf", "--socket", server.address)
        good("load", "m.gguf", "--tcp", other.address)
        assert server.seen == [Load(path=str(tmp_path / "m.gguf"))]
        assert other.seen == [Load(path="m.gguf")]  # it may be another machine


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("line", ["load x", "plan x", "infer --no-stream x", "chat --no-stream x", "embed x"])
def test_an_adapter_that_is_here_is_named_by_its_whole_path(
    line: str, tcp: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    with scripted(tcp=tcp) as server:
        there = ("--tcp" if tcp else "--socket", server.address)
        good(*line.split(), "--lora", "a.gguf:0.5", "--lora", "a.gguf", "--lora", "elsewhere.gguf:2", *there)
        good("lora", "load", "a.gguf", *there)
        path = "a.gguf" if tcp else str(tmp_path / "a.gguf")
        assert [command.lora for command in server.seen if isinstance(command, Load | Plan | Infer | Chat | Embed)] == [
            [f"{path}:0.5", path, "elsewhere.gguf:2"]
        ]
        assert server.seen[-1] == Lora(action="load", adapter=path)


def test_a_plan_that_cannot_be() -> None:
    no = {"fits": False, "path": "/m.gguf", "need": {"total": {"host": 5_000, "gpu": 0}}, "have": {"host": 4_000}}
    with scripted(once(Ok("It does not fit", no | {"n_ctx_max": 0}))) as server:
        output = good("plan", "m", "--socket", server.address)
    assert output.startswith("/m.gguf: it does not fit\nlongest n_ctx in what is free now: none\n")
    assert "GPU" not in output
    assert "total" in output


def test_what_the_daemon_converted_is_listed_with_all_alone() -> None:
    made = {"name": "tiny-5e", "path": "/store/converted/5e.gguf", "state": "available", "source": "store", "size": 7}
    own = made | {"name": "mine", "path": "/a/converted/mine.gguf", "source": "directory"}
    with scripted(once(Ok("3 models", [MODEL, made, own]))) as server:
        output = good("models", "--socket", server.address)
        assert "mine" in output
        assert "tiny-5e" not in output
    with scripted(once(Ok("3 models", [MODEL, made, own]))) as server:
        assert "tiny-5e" in good("models", "--all", "--socket", server.address)


def test_what_was_pulled_before_says_so() -> None:
    with scripted(once(Ok("Model pulled", {"name": "m", "path": "/m.gguf", "size": 5, "fetched": False}))) as server:
        assert good("pull", "x", "--socket", server.address) == "m: 5 bytes in /m.gguf, and was there already\n"


@pytest.mark.parametrize(
    ("line", "printed"),
    [("models", "no models"), ("queue", "nothing runs or waits"), ("lora", "no adapters"), ("jobs", "no jobs")],
)
def test_an_empty_list(line: str, printed: str) -> None:
    with scripted(once(Ok("nothing", []))) as server:
        assert good(line, "--socket", server.address) == f"{printed}\n"


def test_what_free_left() -> None:
    with scripted(once(Ok("Resources freed", None, {"freed": [], "held": ["a", "b"]}))) as server:
        output = good("free", "--socket", server.address)
    assert output == "freed: nothing\nstays, for others hold it: a, b\n"


def test_what_a_reload_did_and_could_not() -> None:
    with scripted() as server:
        result = run("reload", "--socket", server.address)
        assert server.seen == [Reload()]
    assert (result.exit_code, result.stdout) == (1, "changed: models\nloaded: tiny\nfreed: old\n")
    assert result.stderr == "failed: gone.gguf: no such file\nonly with a restart: socket\n"
    with scripted() as server:
        result = run("reload", "--json", "--socket", server.address)
    assert (result.exit_code, json.loads(result.stdout)["loaded"], result.stderr) == (1, ["tiny"], "")


def test_a_template_is_printed_as_it_is() -> None:
    template = "{% for m in messages %}\n[bold]{{ m }}[/bold]{% endfor %}"
    with scripted(once(Ok("tiny", {"name": "[red]", "chat_template": template}))) as server:
        output = good("show", "--socket", server.address)
        assert template in output
        assert "[red]" in output


# -- errors ----------------------------------------------------------------------------------------------------

NO = Failed(ErrorCode.NOT_FOUND, "It is not there")
ASKING = [
    "attach x", "chat x", "chat --no-stream x", "embed x", "events --no-follow", "free x", "health", "hello",
    "infer x", "infer --no-stream x", "jobs", "jobs list x", "jobs cancel x", "jobs forget x", "load x", "lora",
    "lora load x", "lora unload x", "lora check x", "metrics", "metrics --prometheus", "models", "ping", "plan x",
    "pull x", "queue x", "reload", "remove x", "show x", "status", "submit x", "tokenize x", "top --once",
]  # fmt: skip
ASKING_NOBODY = {"completion", "doctor", "serve", "token"}  # and bench has tests of its own


def test_all_commands_that_ask_are_in_the_table() -> None:
    names = {line.split()[0] for line in ASKING} | ASKING_NOBODY | {"bench"}
    assert names == set(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize(
    "line", [*ASKING, *(f"{line} --json" for line in ASKING if line not in ("ping", "top --once"))]
)
def test_whatever_was_asked_an_error_is_exit_status_1(line: str) -> None:
    with scripted(once(NO)) as server:
        result = run(*line.split(), "--socket", server.address)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: It is not there [not_found]\n")


@pytest.mark.parametrize(
    ("line", "reply", "status"),
    [
        ("health", Ok("ready", {"state": "ready"}), 0),
        ("health", Ok("overloaded", {"state": "overloaded"}), 0),
        ("health", Ok("draining", {"state": "draining"}), 1),
        ("health --json", Ok("unavailable", {"state": "unavailable"}), 1),
        ("reload", Ok("Configuration reloaded", {"changed": ["models"]}), 0),
        ("reload --json", Ok("Configuration reloaded", {"failed": {"gone.gguf": "no such file"}}), 1),
        ("models x", Ok("0 models", []), 0),
        ("plan x", Ok("It does not fit", {"fits": False, "path": "x"}), 0),
    ],
)
def test_exit_statuses_of_answers(line: str, reply: Ok, status: int) -> None:
    with scripted(once(reply)) as server:
        assert run(*line.split(), "--socket", server.address).exit_code == status


def test_the_pages_have_the_same_table_of_exit_statuses() -> None:
    readme = (ROOT / "README.md").read_text().partition("exit status")[2].partition("**Python**")[0]
    manual = (ROOT / "systemd/man/llama-bridge.1").read_text().partition(".SH EXIT STATUS")[2].partition(".SH ")[0]
    usage = (ROOT / "client/bridge.sh").read_text().partition("\nExit status: ")[2].partition("\nEND")[0]
    assert re.findall(r"^\| (\d) \|", readme, re.MULTILINE) == ["0", "1", "2"]
    assert re.findall(r"^\.B (\d)", manual, re.MULTILINE) == ["0", "1", "2"]
    assert re.findall(r"\d", usage) == ["0", "1", "2"]
    for command in ("health", "doctor", "bench", "reload"):
        assert f"`{command}`" in readme
        assert f".BR {command} :" in manual


@pytest.mark.parametrize("line", ["infer", "chat", "embed", "tokenize", "submit"])
def test_what_is_no_text_is_a_wrong_command_line(line: str) -> None:
    for words in ((line, "-"), (line, "a\udcff")):
        result = CliRunner().invoke(cli, [*words, "--socket", "/nowhere"], input=b"a\xff")
        assert result.exit_code == 2
        assert result.stderr.endswith("Error: the text is not UTF-8\n")


def test_an_error_answer() -> None:
    with scripted() as server:
        result = run("load", "missing.gguf", "--socket", server.address)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "error: Failed to load model: missing.gguf [load_failed]\n"
        result = run("infer", "-n", "0", "x", "--socket", server.address)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: max_tokens: ")
        assert result.stderr.endswith("[bad_argument]\n")


def test_a_stream_that_fails_in_the_middle() -> None:
    end = Final("", "error", {"code": "model_crashed", "blame": "retry", "reason": "tiny died"})
    with scripted(once(Started(), Token("so far"), end)) as server:
        result = run("infer", "x", "--socket", server.address)
        assert (result.exit_code, result.stdout) == (1, "so far\n")
        assert result.stderr == "error: tiny died [model_crashed]\n"


def test_an_answer_that_was_cut_short_says_so() -> None:
    with scripted(once(Started(), Final("so far", "deadline"))) as server:
        result = run("infer", "x", "--socket", server.address)
        assert (result.exit_code, result.stdout) == (0, "so far\n")
        assert result.stderr == "(ended early: deadline)\n"


def test_nobody_there(tmp_path: Path) -> None:
    result = run("ping", "--socket", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert (
        result.stderr == f"error: no bridge answers at {tmp_path / 'none'}: No such file or directory [unreachable]\n"
    )


def test_no_bridge() -> None:
    with scripted(raw(b"220 ready\n")) as server:
        result = run("ping", "--socket", server.address)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: not a reply line")


def test_a_bridge_that_says_nothing() -> None:
    with scripted(ignores) as server:
        result = run("ping", "--timeout", "0.02", "--socket", server.address)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "error: the daemon did not answer in time [timeout]\n"


def test_an_interrupted_stream_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: str = "", **_: object) -> None:
        if text == PIECES[1]:
            raise KeyboardInterrupt

    with scripted(until_cancelled) as server:
        monkeypatch.setattr("bridge.cli.main.click.echo", interrupt)
        result = run("infer", "x", "--socket", server.address)
        assert result.exit_code == 1
        assert [command.VERB for command in server.seen] == ["INFER_STREAM", "CANCEL"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ping --tcp nonsense", "'nonsense' is not HOST:PORT"),
        ("ping --tcp /a/path", "is not HOST:PORT"),
        ("ping --tcp localhost:1 --socket x", "--socket, --tcp and --tls exclude each other"),
        ("ping --tls localhost:1 --key x", "--key needs --certificate"),
        ("ping --tcp localhost:1 --ca x", "speaks no TLS"),
        ("ping --timeout 0", "--timeout"),
        ("infer -p max_token=5 x", "-p max_token=5: INFER_STREAM takes KEY=VALUE with one of model, max_tokens"),
        ("infer -p prompt=5 x", "-p prompt=5: INFER_STREAM takes"),
        ("infer -p max_tokens x", "-p max_tokens: INFER_STREAM takes"),
        ("infer -p max_tokens=many x", "-p max_tokens=many: Expected `int`"),
        ("infer -p logit_bias={ x", "-p logit_bias={: Expected"),
        ("load", "Missing argument 'MODEL'"),
        ("load -p n_ctx=most x", "-p n_ctx=most: "),
        ("plan -p pin=true x", "-p pin=true: PLAN takes KEY=VALUE with one of"),
        ("pull", "Missing argument 'SOURCE'"),
        ("lora dance", "'dance' is not one of"),
        ("lora load", "load: which adapter?"),
        ("dance", "No such command 'dance'"),
    ],
)
def test_a_wrong_command_line(line: str, words: str) -> None:
    result = run(*line.split())
    assert result.exit_code == 2
    assert words in result.stderr


# -- the command -----------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert good("--version") == f"llama-bridge, version {__version__}\n"
    for name in cli.list_commands(click.Context(cli)):
        assert "--help" in good(name, "-h")
    assert "--n-ctx N|auto " in good("load", "-h")


def llama_bridge(*arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m bridge``, where the module ``without`` is not installed."""
    hide = f"import sys; sys.modules[{without!r}] = None; " if without else ""
    code = f"{hide}import sys; sys.argv[1:] = {list(arguments)!r}; from bridge.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bridge", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"llama-bridge, version {__version__}\n")


@pytest.mark.parametrize(("missing", "command"), [("click", "ping"), ("trio", "serve"), ("rich", "bench")])
def test_without_the_daemons_dependencies(missing: str, command: str) -> None:
    done = llama_bridge(command, without=missing)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{missing} is not installed" in done.stderr
    assert "pip install 'llama-bridge[daemon]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_ours_is_not_hidden_as_a_missing_dependency() -> None:
    done = llama_bridge("ping", without="client")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_is_no_fault() -> None:
    def endless(peer: Peer) -> None:
        exchange = peer.expect().exchange
        peer.reply(exchange, Started())
        while True:
            peer.reply(exchange, Token("word " * 100))

    with scripted(endless) as server:
        command = [sys.executable, "-m", "bridge", "infer", "x", "--socket", server.address]
        with running(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stderr
            assert process.stdout.read(4) == b"word"
            process.stdout.close()
            assert b"Traceback" not in process.stderr.read()
        server.await_end(0)


def test_an_interrupted_pull_leaves_the_daemon_at_once() -> None:
    def fetches(peer: Peer) -> None:
        peer.expect()
        process.send_signal(signal.SIGINT)
        assert peer.request() is None  # the connection is closed, which stops the work

    with scripted(fetches) as server:
        command = [sys.executable, "-m", "bridge", "pull", "x", "--socket", server.address]
        with running(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate()
        assert (process.returncode, out, err.strip()) == (1, b"", b"Aborted!")
        server.await_end(0)


def test_an_error_of_tomorrow() -> None:
    with scripted(once(Failed("of_tomorrow", "New"))) as server:
        result = run("ping", "--socket", server.address)
        assert (result.exit_code, result.stderr) == (1, "error: New [of_tomorrow]\n")


# -- who asks --------------------------------------------------------------------------------------------------


def test_a_token_of_a_file(tmp_path: Path) -> None:
    tokens, secret = str(tmp_path / "tokens"), tmp_path / "secret"
    secret.write_text(issue(tokens, "ci", "user", ["requests_per_minute=60", "running=2"]) + "\n")
    environ = {"LLAMA_BRIDGE_ACCESS_LOOPBACK": "none", "LLAMA_BRIDGE_ACCESS_TOKENS": tokens}
    with spawned("--load", "echo", environ=environ) as place:
        there = ("--tcp", f"127.0.0.1:{place.port}")
        assert "[unauthorized]" in run("status", *there).stderr
        told = good("status", *there, "--token-file", str(secret))
        assert "you are ci, user, requests per minute: 60 of 60 left, running: 2 of 2 left" in told
        assert "[forbidden]" in run("reload", *there, "--token-file", str(secret)).stderr
        assert "no token can be read" in run("status", *there, "--token-file", "/nowhere").stderr
        assert "you are" in good("status", "--socket", place.path)


def test_tls(tmp_path: Path) -> None:
    ca, files = trustme.CA(), {"ca": str(tmp_path / "ca.pem"), "bridge": str(tmp_path / "bridge.pem")}
    ca.cert_pem.write_to_path(files["ca"])
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(files["bridge"])
    client = ca.issue_cert("c.example", common_name="node1")
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "node1.pem"))
    client.private_key_pem.write_to_path(str(tmp_path / "node1.key"))
    (tmp_path / "config.toml").write_text(
        f"""
        [access]
        certificates = {{ "node1" = "admin" }}
        [tls]
        certificate = "{files["bridge"]}"
        client_ca = "{files["ca"]}"
        client = "optional"
        """
    )
    arguments = ("--config", str(tmp_path / "config.toml"), "--tcp", "tls:127.0.0.1:0", "--load", "echo")
    with spawned(*arguments, ports=2) as place:
        there = ("--tls", f"localhost:{place.ports[1]}", "--ca", files["ca"])
        assert "you are 127.0.0.1, operator" in good("status", *there)
        mine = ("--certificate", str(tmp_path / "node1.pem"), "--key", str(tmp_path / "node1.key"))
        assert "you are node1, admin" in good("status", *there, *mine)
        assert "CERTIFICATE_VERIFY_FAILED" in run("ping", *there[:2]).stderr
