"""Ringing and listening: how an idle process learns at once that there is work, without polling.

A notification is only a hint (law 4): lost, late or doubled, it costs latency, never a job, because every listener
also sweeps. And it is dear: commits that carry NOTIFY take one lock in turn, and every listener of the database is
signalled. Measured on PostgreSQL 18 with 16 clients enqueueing single jobs: 5,700/s without NOTIFY, 1,800/s with one
inside each insert, 380/s with 100 idle listeners as well. Rung after the commit and coalesced to one per 10 ms:
3,100/s with the same 100 listeners. So enqueueing never notifies inside its transaction; it marks the queue here,
and one ringer per process sends one NOTIFY for all marked queues: at once when quiet, then at most every interval.

A ring says what somebody needs who has to decide whether to look: how many jobs, the earliest place in line among
them, and a random point, by which the idle workers agree without a word which few of them are meant
(`clarion_worker/peers.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, TypeVar
from uuid import UUID

import anyio
import asyncpg
import msgspec
import structlog
from msgspec import Meta

from clarion.db import close_connection, connect, translated_errors
from clarion.errors import Unavailable
from clarion.events import Event
from clarion.execution import Ready
from clarion.loops import Signal, backoff_seconds
from clarion.settings import Settings
from clarion.statements import statement
from clarion.store import Store

log = structlog.get_logger()

CHANNEL = "clarion_wake"

# A payload must stay under 8,000 bytes: a queue's name has 128 at most, what is ready in it 50, a job's id 36.
_RING_MAX_QUEUES = 25
# How often a ring is passed on by workers that have no room for its jobs.
HOPS_MAX = 3

T = TypeVar("T")


class Ring(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened: what became ready in these queues; `scheduled`: the next due time may be nearer now.

    `cancelled`: running jobs whose workers are to end them. `point` is anywhere from 0 to 1; `hops`: how often this
    was passed on.
    """

    queues: dict[str, Ready] = {}
    scheduled: bool = False
    cancelled: list[UUID] = []
    point: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    hops: Annotated[int, Meta(ge=0, le=HOPS_MAX)] = 0


class Ringer:
    """Collects what happened in this process and tells the others; `on_ready` is told at once what became ready."""

    def __init__(
        self, store: Store, settings: Settings, *, on_ready: Callable[[Mapping[str, Ready]], None] = lambda _ready: None
    ) -> None:
        self._store = store
        self._on_ready = on_ready
        self._interval_seconds = settings.wake_interval_seconds
        # By how often it was passed on.
        self._ready: dict[int, dict[str, Ready]] = {}
        self._scheduled = False
        self._cancelled: set[UUID] = set()
        self._marked = Signal()

    def mark(
        self,
        ready: Mapping[str, Ready] | None = None,
        *,
        scheduled: bool = False,
        cancelled: Iterable[UUID] = (),
        hops: int = 0,
    ) -> None:
        """Notes, after their commit: these jobs became ready in each queue, some were scheduled, or cancelled."""
        self._on_ready(ready or {})
        for queue, more in (ready or {}).items():
            marked = self._ready.setdefault(hops, {})
            marked[queue] = marked[queue].together(more) if queue in marked else more
        self._scheduled = self._scheduled or scheduled
        self._cancelled.update(cancelled)
        if self._ready or self._scheduled or self._cancelled:
            self._marked.set()

    async def step(self) -> float:
        """Waits for marks, sends them all, and asks for the interval's pause. On weather the marks stay."""
        await self._marked.wait()
        ready, self._ready = self._ready, {}
        scheduled, self._scheduled = self._scheduled, False
        cancelled, self._cancelled = self._cancelled, set()
        try:
            await self._store.ring(CHANNEL, [encode_ring(ring) for ring in _rings(ready, scheduled, cancelled)])
        except Unavailable:
            self.mark(scheduled=scheduled, cancelled=cancelled)
            for hops, queues in ready.items():
                self.mark(queues, hops=hops)
            raise
        return self._interval_seconds


class Listener:
    """One LISTEN connection, outside the pool, watched by a round trip with a time limit.

    `on_ring` is told every ring. `on_connect` is called after each LISTEN, so that whoever claims does so *after*
    listening: what became ready while nobody listened is found then.
    """

    def __init__(self, settings: Settings, *, on_ring: Callable[[Ring], None], on_connect: Callable[[], None]) -> None:
        self._settings = settings
        self._on_ring = on_ring
        self._on_connect = on_connect
        self.is_listening: bool | None = None  # None: not yet

    async def run(self) -> None:
        """Listens for ever; weather is logged once, waited out, and listened through again."""
        failures = 0
        while True:
            try:
                connection = await connect(self._settings, name="listener")
                try:
                    await self._listen(connection)
                    failures = 0
                    await self._watch(connection)
                finally:
                    self.is_listening = None if self.is_listening is None else False
                    await close_connection(connection)
            except Unavailable as error:
                failures += 1
                if failures == 1:
                    log.warning(Event.LISTENER_LOST, error=str(error))
                await anyio.sleep(backoff_seconds(failures))

    async def _listen(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        with translated_errors():
            await connection.add_listener(CHANNEL, self._hear)
        log.debug(Event.LISTENER_CONNECTED)
        self.is_listening = True
        self._on_connect()

    async def _watch(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        closed = Signal()
        connection.add_termination_listener(lambda _connection: closed.set())
        while not await closed.wait_for(self._settings.listener_ping_seconds):
            with translated_errors():
                await connection.fetch(statement("ping"), timeout=self._settings.listener_ping_seconds)
        raise Unavailable("the LISTEN connection was closed")

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._on_ring(decode_ring(str(payload)))


def encode_ring(ring: Ring) -> str:
    """The payload of a notification."""
    return msgspec.json.encode(ring).decode()


def decode_ring(payload: str) -> Ring:
    """The ring in a payload; one that cannot be read, from a stranger or another version, says nothing."""
    try:
        return msgspec.json.decode(payload, type=Ring)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Ring()


def _rings(ready: Mapping[int, Mapping[str, Ready]], scheduled: bool, cancelled: Iterable[UUID]) -> Iterator[Ring]:
    """Everything, in payloads of a bounded size."""
    rung = [(hops, page) for hops, queues in ready.items() for page in _pages(list(queues.items()))]
    pages = list(zip_longest(rung, _pages(list(cancelled)))) or [(None, None)]
    for queues_page, cancelled_page in pages:
        hops, queues = queues_page or (0, [])
        # What wakes no worker needs no point.
        point = round(random.random(), 6) % 1 if queues else 0.0  # noqa: S311  who is meant is no secret
        yield Ring(dict(queues), scheduled, list(cancelled_page or []), point, hops)


def _pages(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _RING_MAX_QUEUES] for start in range(0, len(items), _RING_MAX_QUEUES)]
