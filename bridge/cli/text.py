"""The commands that have a model work on text: infer, chat, embed, tokenize."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from bridge.cli.connect import with_options
from bridge.cli.main import json_option, lora_option, parameters_of, print_json, talks
from bridge.cli.types import ModelName
from client import Client, Stream
from client.results import Completion
from protocol.commands import Chat, ChatStream, Embed, Infer, InferStream

F = TypeVar("F", bound=Callable[..., Any])


def text_of(words: tuple[str, ...]) -> str:
    """The words of the command line as one text, or the standard input where there are none, or a dash.

    Raises click.UsageError for what is no UTF-8: Python reads it as surrogates, or not at all, as the locale has it.
    """
    try:
        text = " ".join(words) if words and words != ("-",) else sys.stdin.read()
        text.encode()
    except UnicodeError:
        raise click.UsageError("the text is not UTF-8") from None
    return text


_keep_alive = click.option("--keep-alive", type=float, help="Seconds that the model stays after this; -1: for ever.")


_streamed = click.option(
    "--stream/--no-stream", "streamed", default=True, help="Print the text as it comes, or at once."
)


generates = with_options(
    click.option("-m", "--model", type=ModelName(), help="Which model; otherwise the default one."),
    click.option("-n", "--max-tokens", type=int, help="Longest answer, in tokens."),
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-k", type=int, help="Only so many of the likeliest tokens; 0 is all."),
    click.option("--top-p", type=float, help="Only the likeliest tokens of so much probability; 1 is all."),
    click.option("--seed", type=int, help="Makes the answer repeatable."),
    click.option("--stop", multiple=True, help="Where to stop; may be given several times."),
    lora_option,
    _keep_alive,
    click.option("-p", "pairs", metavar="KEY=VALUE", multiple=True, help="Any other parameter."),
    json_option,
)
"""The options of INFER and CHAT. The rarer ones are given with -p."""


@click.command()
@click.argument("prompt", nargs=-1)
@generates
@_streamed
@talks
def infer(
    client: Client, prompt: tuple[str, ...], pairs: tuple[str, ...], streamed: bool, as_json: bool, **named: Any
) -> None:
    """Complete a prompt; without one, the standard input."""
    text, streamed = text_of(prompt), streamed and not as_json
    parameters = parameters_of(client, InferStream if streamed else Infer, pairs, named)
    if streamed:
        return print_stream(client.stream(text, **parameters))
    _print_completions(client.infer_several(text, parameters.pop("n", 1), **parameters), as_json)


@click.command()
@click.argument("message", nargs=-1)
@click.option("--system", help="A system message before it.")
@generates
@_streamed
@talks
def chat(
    client: Client,
    message: tuple[str, ...],
    system: str | None,
    pairs: tuple[str, ...],
    streamed: bool,
    as_json: bool,
    **named: Any,
) -> None:
    """Answer a user's message; without one, the standard input."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text_of(message)})
    streamed = streamed and not as_json
    parameters = parameters_of(client, ChatStream if streamed else Chat, pairs, named)
    if streamed:
        return print_stream(client.chat_stream(messages, **parameters))
    _print_completions(client.chat_several(messages, parameters.pop("n", 1), **parameters), as_json)


def print_stream(stream: Stream) -> None:
    with stream:
        try:
            for piece in stream:
                click.echo(piece, nl=False)
        finally:
            if stream.text and not stream.text.endswith("\n"):
                click.echo()
    _explain(stream.result)


def _print_completions(completions: list[Completion], as_json: bool) -> None:
    if as_json:
        return print_json(completions if len(completions) > 1 else completions[0])
    for completion in completions:
        click.echo(completion.text)
        _explain(completion)


def _explain(completion: Completion | None) -> None:
    """An answer that was cut short by others than its caller should not pass for a whole one."""
    if completion and completion.finish_reason in ("cancelled", "deadline"):
        click.echo(f"(ended early: {completion.finish_reason})", err=True)


# -- vectors and tokens ----------------------------------------------------------------------------------------


@click.command()
@click.argument("text", nargs=-1)
@click.option("-m", "--model", type=ModelName(), help="Which model; otherwise the default one.")
@click.option("--dimensions", type=int, help="Only the first so many components, of length 1 again.")
@lora_option
@_keep_alive
@json_option
@talks
def embed(client: Client, text: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """The vector of a text; without one, of the standard input."""
    embeddings = client.embed(text_of(text), **parameters_of(client, Embed, (), named))
    print_json(embeddings) if as_json else click.echo(" ".join(f"{value:.9g}" for value in embeddings.vector))


@click.command()
@click.argument("text", nargs=-1)
@click.option("-m", "--model", type=ModelName(), help="Which model; otherwise the default one.")
@click.option("--special", is_flag=True, help="Add what the model puts around a text, such as BOS.")
@json_option
@talks
def tokenize(client: Client, text: tuple[str, ...], model: str | None, special: bool, as_json: bool) -> None:
    """A text's token ids; without one, those of the standard input."""
    tokens = client.tokenize(text_of(text), model=model, special=special)
    print_json(tokens) if as_json else click.echo(" ".join(map(str, tokens)))
