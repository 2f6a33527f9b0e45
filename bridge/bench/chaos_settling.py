"""The end of a chaos run's jobs: each that is known has an answer, none is left, and the disk has what it may."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from bridge.bench.chaos_asked import Asked
from bridge.bench.chaos_jobs import Attached, JobAsked, JobRecord
from bridge.bench.chaos_keys import TOKENS
from bridge.bench.chaos_talk import Talk, World
from bridge.bench.own import OwnDaemon
from protocol import commands
from protocol.commands import Request
from protocol.replies import Ok

_AT_ONCE = 16  # ATTACHes
_BOUND = 2.0  # of the files to jobs.bytes
_SPARE = 16 << 20  # bytes of the database and its log besides


async def settle(world: World, daemon: OwnDaemon) -> None:
    """Has every job told, by its owner, and then forgotten, also those whose names were lost. Raises OSError."""
    records = defaultdict(list)
    for record in world.book.records.values():
        records[record.owner].append(record)
    owners = {"uid": None, "loopback": None} | {f"token:{name}": name for name in TOKENS}
    for owner, token in owners.items():
        address = daemon.unix if owner == "uid" else daemon.tcp
        async with Talk(address, world) as talk:
            if token:
                await talk.introduce(world.keys.who(token))
            await _tell(talk, world, records[owner])
            await _forget(talk, world)
    most = _BOUND * world.cast.jobs_bytes + _SPARE
    if (size := sum(file.stat().st_size for file in (daemon.folder / "jobs").glob("*"))) > most:
        world.tally.blame(f"the jobs' database has {size} bytes")


async def _tell(talk: Talk, world: World, records: Iterable[JobRecord]) -> None:
    open_ones = [record for record in records if record.outcome is None and not record.forgotten]
    for start in range(0, len(open_ones), _AT_ONCE):
        for record in open_ones[start : start + _AT_ONCE]:
            attach = Request(commands.Attach(job=record.id), record.id)
            await talk.ask(Attached(request=attach, book=world.book, record=record))
        await talk.read_all()
    if missing := [record for record in open_ones if record.outcome is None and not record.may_be_gone]:
        world.tally.blame(f"{len(missing)} jobs have no answer, such as {missing[0]}")


async def _forget(talk: Talk, world: World) -> None:
    """All that are listed: also those whose names were told to somebody who had left."""
    listing = _Listing(Request(commands.Jobs()))
    await talk.ask(listing)
    await talk.read_all()
    for job in listing.jobs:
        record = world.book.records.get(job)
        if record:
            record.forgotten = True
        forget = Request(commands.Jobs(action="forget", job=job))
        await talk.ask(JobAsked(request=forget, book=world.book, record=record or _unknown(job)))
    await talk.read_all()
    await talk.ask(listing)
    await talk.read_all()
    if listing.jobs:
        world.tally.blame(f"{len(listing.jobs)} jobs are there after they were forgotten")


def _unknown(job: str) -> JobRecord:
    return JobRecord(job, "", commands.Ping(), [], 0.0, may_expire=True)


class _Listing(Asked):
    """JOBS: the names of those that are there."""

    jobs: list[str]

    def _check_ok(self, reply: Ok) -> None:
        self.jobs = [job["job"] for job in reply.data]
