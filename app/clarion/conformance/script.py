"""What the server of a scenario offers, how it is to answer, and every request that came."""

import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from uuid import UUID, uuid4

import anyio
import msgspec

from clarion.api.decoding import Form
from clarion.api.lease_forms import HeartbeatIn
from clarion.conformance.forms import ENDINGS, Verb, shown

LeaseStatus = Literal["extended", "cancel", "lost"]


class Refusal(msgspec.Struct, frozen=True):
    """An answer other than the usual one; with `cut`, the usual one, cut off in the middle."""

    status: int = 200
    retry_after_seconds: int | None = None
    cut: bool = False


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request: when it had arrived, by the monotonic clock, and what it said.

    `form` is None where `fault` says, in words, what is wrong with the request; `verb` where there is no such route.
    """

    at: float
    start: int
    path: str
    verb: Verb | None
    token: str | None
    authorization: str | None
    body: bytes
    form: Form | None
    fault: str | None

    def __str__(self) -> str:
        return f"{self.verb or self.path} {self.fault or shown(self.body)}".strip()

    def names(self, token: str) -> bool:
        """Whether it is a heartbeat for this lease."""
        return isinstance(self.form, HeartbeatIn) and any(lease.token == token for lease in self.form.leases)


class Offer:
    """A job on offer: what the worker is told of it, and how its calls are answered."""

    def __init__(self, task: str, args: Mapping[str, Any], *, timeout_seconds: float | None) -> None:
        self.id: UUID = uuid4()
        # All the characters that a URL takes as they are, so that nobody has to escape it.
        self.token = f"-._~{secrets.token_urlsafe(24)}"
        self.task = task
        self.args = args
        self.timeout_seconds = timeout_seconds
        # What heartbeats answer, and what one has answered.
        self.lease_status: LeaseStatus = "extended"
        self.told: LeaseStatus = "extended"
        self.refusals: dict[Verb, deque[Refusal]] = {}
        self.claimed_at: float | None = None
        self.ended: Verb | None = None

    def refuse(self, verb: Verb, *refusals: Refusal) -> None:
        """The next calls of this verb are answered so; those after them as usual."""
        self.refusals.setdefault(verb, deque()).extend(refusals)


class Script:
    """The state of one scenario's server."""

    def __init__(self, *, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self.hold_seconds = 30.0
        self.with_unknown_members = False
        self.heartbeats_fail = False
        # Whether a claim that found nothing is answered 200 with no lease, instead of 204.
        self.empty_claims = False
        self.directive: Literal["ok", "drain"] = "ok"
        self.closing = False
        self.starts = 0
        self.calls: list[Call] = []
        self._offers: list[Offer] = []
        self._changed = anyio.Event()

    def offer(self, task: str, args: Mapping[str, Any], *, timeout_seconds: float | None = None) -> Offer:
        """A job for the next one who asks."""
        offer = Offer(task, args, timeout_seconds=timeout_seconds)
        self._offers.append(offer)
        self.change()
        return offer

    def hand_out(self, at_most: int) -> Sequence[Offer]:
        """The next jobs, which are claimed from now on."""
        found = [offer for offer in self._offers if offer.claimed_at is None][:at_most]
        for offer in found:
            offer.claimed_at = time.monotonic()
        if found:
            self.change()
        return found

    def claimed(self, token: str) -> Offer | None:
        """The job that was handed out under this token."""
        return next((offer for offer in self._offers if offer.token == token and offer.claimed_at is not None), None)

    def note(self, call: Call) -> None:
        """Keeps a request that came."""
        self.calls.append(call)
        self.change()

    def calls_of(self, *verbs: Verb, offer: Offer | None = None) -> list[Call]:
        """The requests of these verbs, about this job."""
        return [call for call in self.calls if call.verb in verbs and (offer is None or call.token == offer.token)]

    def endings_of(self, offer: Offer) -> list[Call]:
        """The requests that say how this job ended."""
        return self.calls_of(*ENDINGS, offer=offer)

    def beats_of(self, offer: Offer) -> list[Call]:
        """The heartbeats that name this job's lease."""
        return [call for call in self.calls_of(Verb.HEARTBEAT) if call.names(offer.token)]

    def change(self) -> None:
        """Lets everybody who waits look again."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for(self, condition: Callable[[], object]) -> None:
        """Returns when the condition holds; looked at again with each change."""
        while not condition():
            await self._changed.wait()
