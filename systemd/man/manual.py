"""Writes the manual pages beside this file: what click knows of the command line, and the commented configuration.

    .venv/bin/python systemd/man/manual.py

They are committed, so that nobody needs click to build a package; tests/test_manual.py tells when they are out of date.
The format is man(7)'s.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from bridge import __version__
from bridge.cli.main import cli

FOLDER = Path(__file__).resolve().parent
CONFIG = FOLDER.parent / "config.toml"

DESCRIPTION = """
.B llama\\-bridge
keeps language models loaded and answers one command a line over a Unix socket or TCP, many callers at once.
.B llama\\-bridge serve
is the daemon; the other commands ask one that runs, except
.BR completion ,
which needs none, and
.BR doctor ,
which looks at the machine itself.
Models are GGUF files, and the arithmetic is llama.cpp's.
"""

AFTER = """
.SH EXIT STATUS
.TP
.B 0
It is done.
An empty list is an answer, too, and so is a text that a deadline or CANCEL cut short, which the standard error tells.
.TP
.B 1
The daemon answered with an error, or none answered; the standard error says why and, in brackets, by which code.
Of
.BR health :
the daemon is not good for another request; of
.BR doctor :
there is a problem; of
.BR bench :
something failed; of
.BR reload :
a model could not be loaded; of
.BR serve :
it could not listen, or read its tokens or certificates, or it cut clients off when it was stopped.
Whatever was interrupted ends with it as well.
.TP
.B 2
The command line or the configuration is wrong; nothing was asked.
.SH ENVIRONMENT
.TP
.B LLAMA_BRIDGE_SOCKET
Where the daemon listens and is looked for.
.TP
.B XDG_RUNTIME_DIR
Without the above, the socket is
.I llama\\-bridge.sock
in there; without either it is
.I /run/llama\\-bridge/bridge.sock
for root, and
.I /tmp/llama\\-bridge\\-UID/bridge.sock
for others.
.TP
.BI LLAMA_BRIDGE_ KEY
For
.BR serve :
every key of the configuration but
.BR models ,
with its section in front, such as
.BR LLAMA_BRIDGE_LIMITS_CLIENTS=64 .
.SH FILES
.TP
.I /etc/llama\\-bridge/config.toml
The configuration of the service; see
.BR llama\\-bridge.toml (5).
.TP
.I ~/.local/share/llama\\-bridge/models
The models that were pulled; of the service
.IR /var/lib/llama\\-bridge/models .
.SH EXAMPLES
.EX
llama\\-bridge serve \\-\\-load model.gguf &
llama\\-bridge infer \\-\\-max\\-tokens 64 \\(aqOnce upon a time\\(aq
git diff | llama\\-bridge chat \\-\\-system \\(aqReview this.\\(aq
llama\\-bridge pull user/repo:Q4_K_M
printf \\(aqPING\\en\\(aq | nc \\-N \\-U /run/llama\\-bridge/bridge.sock
.EE
.SH SEE ALSO
.BR llama\\-bridge.toml (5),
.BR nc (1),
.BR systemctl (1)
.PP
.IR PROTOCOL.md ,
in the Python package
.BR protocol :
every command of the protocol with all its replies.
"""

CONFIGURATION = """
.B llama\\-bridge serve \\-\\-config
reads a file in TOML; the service's is
.IR /etc/llama\\-bridge/config.toml .
Environment variables are stronger than it, and options of the command line stronger than both.
A key that is not known is refused by its name.
SIGHUP and
.B llama\\-bridge reload
have it read anew: models, limits and the budget of memory change in flight, and a bad file changes nothing.
"""


def escape(text: str) -> str:
    """Plain text as roff: every hyphen one that can be copied, and no line that is taken for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def heading(name: str, section: int) -> str:
    """Without a date, so that the page is the same whenever it is made."""
    return f'.TH {escape(name.upper())} {section} "" "llama\\-bridge {escape(__version__)}" "llama\\-bridge"'


def command_page() -> str:
    """llama-bridge(1)."""
    ctx = click.Context(cli, info_name="llama-bridge", **cli.context_settings)
    contexts = [*commands(ctx)]
    common = [*options(next(one for one in contexts if one.info_name == "ping"))]
    lines = [
        heading("llama-bridge", 1),
        ".SH NAME",
        "llama\\-bridge \\- language models on a socket, and the commands that talk to them",
        ".SH SYNOPSIS",
        ".B llama\\-bridge",
        "\\fICOMMAND\\fR [\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...",
        ".SH DESCRIPTION",
        DESCRIPTION.strip(),
        ".SH OPTIONS",
        "All commands that talk to a daemon take these:",
        *listed(common),
        ".SH COMMANDS",
    ]
    for one in contexts:
        lines += section(one, common)
    return "\n".join([*lines, AFTER.strip(), ""])


def commands(parent: click.Context) -> Iterator[click.Context]:
    """Those of a group, with those of the groups in it."""
    group = parent.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=parent)
        if isinstance(command, click.Group):
            yield from commands(ctx)
        elif not command.hidden:
            yield ctx


def section(ctx: click.Context, common: list[tuple[str, str]]) -> Iterator[str]:
    """A command: how it is called, what it does, its options but the common ones."""
    name = ctx.command_path.partition(" ")[2]
    yield f".SS {escape(name)} {escape(' '.join(ctx.command.collect_usage_pieces(ctx)))}".rstrip()
    yield from paragraphs(ctx.command.help or "")
    yield from listed([option for option in options(ctx) if option not in common])
    yield from paragraphs(ctx.command.epilog or "", first=".PP")


def options(ctx: click.Context) -> Iterator[tuple[str, str]]:
    """As --help has them: how it is written, and what it does."""
    for parameter in ctx.command.get_params(ctx):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
            yield record


def listed(records: list[tuple[str, str]]) -> Iterator[str]:
    for written, meaning in records:
        yield ".TP"
        yield re.sub(r"(\\-[^ ,/]+)", r"\\fB\1\\fR", escape(written))
        yield prose(meaning) or "\\&"


def paragraphs(text: str, first: str = "") -> Iterator[str]:
    """click's: those that begin with \\b keep their lines."""
    for paragraph in filter(None, re.split(r"\n\s*\n", inspect.cleandoc(text).strip())):
        if first:
            yield first
        first = ".PP"
        if paragraph.startswith("\b"):
            yield f".EX\n{escape(paragraph.removeprefix(chr(8)).strip(chr(10)))}\n.EE"
        else:
            yield prose(paragraph)


def prose(text: str) -> str:
    """A line a sentence, as roff wants it; what stands in backticks is bold."""
    text = re.sub(r"(?<=[a-z)][.!?]) +", "\n", " ".join(text.split()))
    return re.sub(r"`([^`]+)`", r"\\fB\1\\fR", escape(text))


def configuration_page() -> str:
    """llama-bridge.toml(5)."""
    lines = [
        heading("llama-bridge.toml", 5),
        ".SH NAME",
        "llama\\-bridge.toml \\- configuration of llama\\-bridge",
        ".SH DESCRIPTION",
        CONFIGURATION.strip(),
        ".SH THE FILE",
        "This is the one that is installed; lines that begin with a hash and a key show the default.",
        ".PP",
        ".EX",
        escape(CONFIG.read_text()).rstrip(),
        ".EE",
        ".SH SEE ALSO",
        ".BR llama\\-bridge (1)",
        "",
    ]
    return "\n".join(lines)


PAGES = {"llama-bridge.1": command_page, "llama-bridge.toml.5": configuration_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
