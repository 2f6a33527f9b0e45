"""A job's turn: its request is answered, and recorded, as if it had come over a connection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bridge.access.peer import Peer
from bridge.call import Call
from bridge.daemon import Daemon
from bridge.dispatch import LASTING
from bridge.exhausted import overloaded
from bridge.jobs.job import CANCELLED, INTERNAL, Job
from bridge.permission import permitted
from bridge.providers.base import Asking
from bridge.request_log import Record
from bridge.telemetry.receipts import Totals
from protocol.errors import BridgeError
from protocol.replies import Failed, Final, Ok, Reply

_CLIENT = 0  # in place of a connection's number; none has it


async def answer_job(daemon: Daemon, job: Job, asking: Asking, say: Callable[[Reply], None]) -> Ok | Final:
    """With what its owner may do now, not when he sent it. Raises BridgeError."""
    assert job.command is not None
    assert job.began is not None
    identity = await daemon.gate.identify_owner(job.owner)
    asking.bill = partial(daemon.gate.charge, identity)
    peer = Peer(_CLIENT, identity=identity)
    record = Record(daemon, peer, job.asked, job.command, job.began)
    call = Call(daemon, peer, Totals(), None, job.received, asking, record.hearing(say))
    last: Reply = Failed.of(CANCELLED)
    try:
        command = permitted(call, job.command)
        last = answer = await LASTING[type(command)](call, command)
    except BridgeError as error:
        last = Failed.of(error)
        raise
    except Exception as error:
        if lacking := overloaded(error):
            last = Failed.of(lacking)
            raise lacking from None
        last = Failed.of(INTERNAL)
        raise
    finally:
        record.end(last)
    return answer
