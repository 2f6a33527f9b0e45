"""The commands about jobs, which go on without the terminal that began them: submit, attach, jobs."""

from __future__ import annotations

from typing import Any

import click

from bridge.cli.main import json_option, parameters_of, print_json, talks
from bridge.cli.tables import in_bytes, print_table
from bridge.cli.text import generates, print_stream, text_of
from client import Client, ConnectionLost
from client.results import Job
from protocol.commands import ChatStream, Command, InferStream, Message


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("--chat", is_flag=True, help="It is a user's message, to be answered.")
@click.option("--ttl", "ttl_s", type=int, help="Seconds that the answer is kept for somebody to fetch it.")
@generates
@talks
def submit(
    client: Client,
    prompt: tuple[str, ...],
    chat: bool,
    ttl_s: int | None,
    pairs: tuple[str, ...],
    as_json: bool,
    **named: Any,
) -> None:
    """Begin to complete a prompt, or the standard input, as a job, and print its name, which `attach` takes."""
    text = text_of(prompt)
    parameters = parameters_of(client, ChatStream if chat else InferStream, pairs, named)
    request: Command = InferStream(prompt=text, **parameters)
    if chat:
        request = ChatStream(messages=[Message(role="user", content=text)], **parameters)
    submitted = client.submit(request, ttl_s=ttl_s)
    print_json(submitted) if as_json else click.echo(submitted.job)


@click.command()
@click.argument("job")
@click.option("--offset", type=int, default=0, help="Leave out so many characters.")
@json_option
@talks
def attach(client: Client, job: str, offset: int, as_json: bool) -> None:
    """A job's answer, as it comes. To interrupt this does not end the job."""
    stream = client.attach(job, offset=offset)
    if not as_json:
        try:
            print_stream(stream)
        except ConnectionLost:
            click.echo(f"(with --offset {stream.offset or offset} it goes on from here)", err=True)
            raise
        if stream.result and stream.result.reply:
            print_json(stream.result.reply.get("data"))
        return
    with stream:
        for _ in stream:
            pass
    print_json(stream.result)


@click.command()
@click.argument("action", type=click.Choice(["list", "cancel", "forget"]), default="list")
@click.argument("job", required=False)
@click.option("-a", "--all", "all_of_them", is_flag=True, help="Those of everybody; for operators.")
@json_option
@talks
def jobs(client: Client, action: str, job: str | None, all_of_them: bool, as_json: bool) -> None:
    """One's jobs: list them, end one, delete one."""
    if action == "list":
        there = client.jobs(job or "", all=all_of_them)
        if as_json:
            return print_json(there)
        if not there:
            return click.echo("no jobs")
        titles = ("job", "state", "request", "model", "age", "characters", "size", "owner")
        return print_table(titles, map(_cells, there))
    if job is None:
        raise click.UsageError(f"{action}: which job?")
    if action == "forget":
        client.jobs_forget(job)
        return print_json(None) if as_json else click.echo(f"{job} forgotten")
    about = client.jobs_cancel(job)
    return print_json(about) if as_json else click.echo(f"{job} is {about.state}")


def _cells(job: Job) -> tuple[object, ...]:
    about = (job.job, job.state, job.verb, job.model)
    return (*about, f"{job.age_s:.0f} s", job.length, in_bytes(job.size), job.owner)
