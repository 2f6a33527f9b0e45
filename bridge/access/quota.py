"""What one may use up: requests and tokens a minute, answers at once. Time is handed in, in monotonic seconds.

The rates are token buckets: what is not used gathers, up to a minute's worth, so a burst may be that long, and over
any time of T minutes no more than 1 + T minutes' worth is let in. What tokens a request takes is known when it is
done. So one is let in while anything is left, and what it takes beyond that has to be made up for first.
"""

from __future__ import annotations

from typing import Any

from bridge import ipc
from bridge.access.config import Allowance
from protocol.errors import BridgeError, ErrorCode

_MINUTE = 60.0


class Bucket:
    """``rate`` a minute; 0 is no limit."""

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._level = float(rate)
        self._since = now

    def left(self, now: float) -> float:
        """Below 0 where more was spent than there was."""
        self._level = min(float(self.rate), self._level + max(0.0, now - self._since) * self.rate / _MINUTE)
        self._since = now
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is left."""
        return max(0.0, (amount - self.left(now)) * _MINUTE / self.rate) if self.rate else 0.0

    def spend(self, amount: float, now: float) -> None:
        if self.rate:
            self._level = self.left(now) - amount

    def set_rate(self, rate: int, now: float) -> None:
        """What was used up stays so."""
        if rate != self.rate:
            used = self.rate - self.left(now) if self.rate else 0.0
            self.rate, self._level = rate, rate - used if rate else 0.0


class Quota:
    """Of one owner, over all of his connections."""

    def __init__(self, allowance: Allowance, now: float) -> None:
        self.allowance = allowance
        self.running = 0
        self._requests = Bucket(allowance.requests_per_minute, now)
        self._tokens = Bucket(allowance.tokens_per_minute, now)
        self._seconds = 1.0  # that a request takes, a running average

    def set_allowance(self, allowance: Allowance, now: float) -> None:
        self.allowance = allowance
        self._requests.set_rate(allowance.requests_per_minute, now)
        self._tokens.set_rate(allowance.tokens_per_minute, now)

    def admit(self, answers: int, now: float, *, later: bool = False) -> Grant:
        """Lets a request in that makes so many answers, or a job, which makes them ``later`` beside what runs now.

        Raises BridgeError: rate_limited, forbidden.
        """
        for key in ("requests_per_minute", "running"):
            most = getattr(self.allowance, key)
            if most and answers > most:
                message = f"{answers} answers are asked for at once; allowed: {most}, as {key} says"
                raise BridgeError(ErrorCode.FORBIDDEN, message)
        allowance = self.allowance
        if wait := self._requests.wait(answers, now):
            raise _limited(f"{allowance.requests_per_minute} requests a minute are allowed", wait)
        if wait := self._tokens.wait(1.0, now):
            raise _limited(f"{allowance.tokens_per_minute} tokens a minute are allowed", wait)
        if not later and allowance.running and self.running + answers > allowance.running:
            message = f"{allowance.running} answers at once are allowed, and {self.running} wait or run"
            raise _limited(message, self._seconds / self.running)
        self._requests.spend(answers, now)
        if later:
            return UNCOUNTED
        self.running += answers
        return Grant(self, answers, now)

    def charge(self, tokens: int, now: float) -> None:
        self._tokens.spend(tokens, now)

    def end(self, grant: Grant, now: float) -> None:
        self.running -= grant.answers
        self._seconds += 0.1 * (now - grant.since - self._seconds)

    def idle(self, now: float) -> bool:
        """It is as a new one would be."""
        full = (bucket.left(now) >= bucket.rate for bucket in (self._requests, self._tokens))
        return not self.running and all(full)

    def describe(self, now: float) -> dict[str, Any]:
        """Each limit, and what is left of it; None where there is none."""
        allowance = self.allowance
        left = {
            "requests_per_minute": self._requests.left(now),
            "tokens_per_minute": self._tokens.left(now),
            "running": allowance.running - self.running,
        }
        limits: dict[str, Any] = {
            key: {"limit": limit, "left": max(0, int(amount))} if (limit := getattr(allowance, key)) else None
            for key, amount in left.items()
        }
        return limits | {"models": allowance.models or None, "priority": allowance.priority}


class Grant:
    """A request that was let in. Without a quota it is of a kind that is not counted."""

    def __init__(self, quota: Quota | None, answers: int, since: float) -> None:
        self._quota = quota
        self.answers = answers
        self.since = since

    def charge(self, answer: ipc.Done | ipc.Embedded, now: float) -> None:
        if self._quota:
            self._quota.charge(cost_of(answer), now)

    def end(self, now: float) -> None:
        if self._quota:
            self._quota.end(self, now)


def cost_of(answer: ipc.Done | ipc.Embedded) -> int:
    """The tokens that were computed for it, and those of the answer."""
    if isinstance(answer, ipc.Embedded):
        return answer.prompt_tokens
    usage = answer.usage
    return usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens


UNCOUNTED = Grant(None, 0, 0.0)


def _limited(message: str, wait: float) -> BridgeError:
    return BridgeError(ErrorCode.RATE_LIMITED, message, retry_after_ms=max(1, round(wait * 1000 + 0.5)))
