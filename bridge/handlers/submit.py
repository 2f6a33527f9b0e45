"""SUBMIT, ATTACH and JOBS: requests that outlive their connection. Tabled in ``dispatch``."""

from __future__ import annotations

import time
from typing import Any

from bridge.access.roles import Role
from bridge.call import Call
from bridge.jobs.job import Job, read_request
from bridge.permission import admit_job
from protocol import commands
from protocol.command import Request
from protocol.connection import encode_request
from protocol.errors import BridgeError, ErrorCode
from protocol.replies import Final, Ok, Started


async def submit(call: Call, command: commands.Submit) -> Ok:
    request, line = read_request(command.request), command.request
    allowed = admit_job(call, request)
    if allowed != request:  # so that after a restart, too, it is no more than that
        request, line = allowed, encode_request(Request(allowed)).decode().rstrip("\n")
    job = await call.daemon.jobs.submit(call.peer.owner, line, request, command.ttl_s, call.received)
    return Ok("Submitted", job.id, {"ttl_s": job.ttl_s})


async def attach(call: Call, command: commands.Attach) -> Final:
    job = await call.daemon.jobs.find(_named(command.job), call.peer.owner)
    call.say(Started())
    return await call.daemon.jobs.follow(job, command.offset, call.say)


async def jobs(call: Call, command: commands.Jobs) -> Ok:
    desk = call.daemon.jobs
    owner: str | None = call.peer.owner
    if command.action == "list" and command.all:
        call.check_role(Role.OPERATOR, "JOBS all=true")
        owner = None
    if command.action == "list" and not command.job:
        listed = await desk.of(owner)
        return Ok(f"{len(listed)} jobs", [_about(job) for job in listed])
    job = await desk.find(_named(command.job), owner)
    match command.action:
        case "list":
            return Ok("1 jobs", [_about(job)])
        case "cancel":
            await desk.cancel(job)
            return Ok(f"The job is {job.state}", _about(job))
        case "forget":
            await desk.forget(job)
            return Ok("Forgotten", job.id)


def _named(job: str) -> str:
    if not job:
        raise BridgeError(ErrorCode.BAD_ARGUMENT, "job: which one? What SUBMIT gave")
    return job


def _about(job: Job) -> dict[str, Any]:
    """Of the request no more than what it is: what it says is its owner's."""
    now = time.monotonic()
    ends = now if job.ended is None else job.ended
    return {
        "job": job.id,
        "state": str(job.state),
        "owner": job.owner,
        "verb": job.verb,
        "model": getattr(job.command, "model", None),
        "age_s": round(now - job.received, 1),
        "ran_s": None if job.began is None else round(ends - job.began, 1),
        "length": job.length,
        "size": job.size,
        "ttl_s": job.ttl_s,
        "fetched": job.fetched is not None,
        "followers": job.followers,
    }
