"""Holding leases: who runs what in this process, until when, and the heartbeats that keep it so.

Heartbeats leave from a thread with an event loop and a connection of its own, so that neither a busy pool nor a
handler that hogs the main loop costs a lease. But a main loop that does not turn at all for `hang_after_seconds` is
hung, not busy: then the thread stops beating, the leases run out, and another worker takes the jobs.

A worker judges its own leases by the monotonic clock, counted from *before* the request that took or extended them was
sent, less a margin. Past that it ends the handler even if the database is silent: the job may be another's by then.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import StrEnum
from uuid import UUID

import anyio
import structlog

from clarion.db import DedicatedDatabase, Locked
from clarion.errors import Unavailable
from clarion.events import Event
from clarion.execution import Beat, Directive, Heartbeat, Lease, Standing, WorkerRecord
from clarion.loops import Signal
from clarion.settings import Settings
from clarion.signals import leave_signals_to_the_main_thread
from clarion.store import Store

log = structlog.get_logger()

_MARGIN = 0.1
_BEATS_PER_LEASE = 3
# A worker whose row is older than so many beats is not counted on: beats may be late, seldom two of them.
_GONE_BEATS = 2.5
# How much of the pause between two beats the look at the other workers may take.
_LOOK_PART = 0.25
_RETRY_SECONDS = 0.5
# How long a beat waits for locked rows before it passes over them.
_LOCK_WAIT_SECONDS = 0.1
_TICK_SECONDS = 0.25
_STOP_SECONDS = 1.0


class EndReason(StrEnum):
    """Why an attempt was ended from outside."""

    TIMED_OUT = "timed_out"
    LOST = "lost"
    CANCELLED = "cancelled"
    FENCED = "fenced"
    DRAINED = "drained"


class Held:
    """A lease in this process, while its attempt runs and until its outcome is recorded. For the main loop only."""

    __slots__ = (
        "_began", "committing", "end_handler", "end_reason", "ending", "finishing", "in_thread", "lease", "ran_seconds",
        "valid_until",
    )  # fmt: skip

    def __init__(self, lease: Lease, *, valid_until: float) -> None:
        self.lease = lease
        self.valid_until = valid_until  # on the monotonic clock
        self._began = time.monotonic()
        self.ran_seconds = 0.0  # from here until the outcome was known
        self.end_handler: Callable[[], None] | None = None  # set while one runs
        self.ending = False  # the handler is to end
        self.end_reason: EndReason | None = None
        self.in_thread = False  # the handler sits in a thread, where no cancellation reaches it
        self.committing = False  # the handler finishes the job in a transaction of its own
        self.finishing = False  # the outcome is known, and being recorded

    def renew(self, answer: Heartbeat, valid_until: float, sent: float) -> None:
        """Trusts the lease for as long as the answer to a beat says, and no longer than its margin allows.

        A row that is locked is not extended; but where its own handler has locked it, nobody else can take it either.
        """
        if answer.extended:
            self.valid_until = max(self.valid_until, min(valid_until, sent + answer.lease_seconds))
        elif self.committing:
            self.valid_until = max(self.valid_until, valid_until)

    def end(self, reason: EndReason) -> None:
        """Asks for the handler's end; the first reason stands. Nothing, once the outcome is known."""
        if self.end_reason is None and not self.finishing:
            self.end_reason = reason
            self.ending = True
            if self.end_handler is not None:
                self.end_handler()

    def finish(self) -> None:
        """The outcome is known; whatever would end the attempt comes too late."""
        self.finishing = True
        self.ran_seconds = time.monotonic() - self._began

    def is_ending(self) -> bool:
        """Whether the handler was told to end."""
        return self.ending


class Leases:
    """All leases of this process, by token."""

    def __init__(self, settings: Settings) -> None:
        self.lease_seconds = settings.lease_seconds
        self._held: dict[UUID, Held] = {}
        self._finishing = 0
        self.emptied = Signal()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def running(self) -> int:
        """Those whose attempts still run; the outcomes of the others are being recorded."""
        return len(self._held) - self._finishing

    def all(self) -> list[Held]:
        """A copy, safe to take from another thread."""
        return list(self._held.values())

    def valid_until(self, sent: float) -> float:
        """The monotonic time to which a lease taken by a request sent at `sent` may be trusted."""
        return sent + self.lease_seconds * (1 - _MARGIN)

    def add(self, lease: Lease, *, sent: float) -> Held:
        """Starts to hold a lease that was just claimed."""
        held = Held(lease, valid_until=self.valid_until(sent))
        self._held[lease.token] = held
        return held

    def finish(self, held: Held) -> None:
        """Its outcome is known, and its slot is free."""
        held.finish()
        self._finishing += 1

    def remove(self, held: Held) -> None:
        """Stops to hold one that was finished."""
        del self._held[held.lease.token]
        self._finishing -= 1
        if not self._held:
            self.emptied.set()

    def fence(self) -> None:
        """Ends every attempt whose lease can no longer be trusted."""
        now = time.monotonic()
        for held in self.all():
            if now > held.valid_until and held.end_reason is None and not held.finishing:
                held.end(EndReason.FENCED)
                log.warning(Event.LEASE_FENCED, job_id=str(held.lease.id), task=held.lease.task)

    def lose(self, lost: Iterable[Held]) -> None:
        """Ends attempts whose jobs belong to somebody else by now, or are finished in the handler's transaction."""
        for held in lost:
            if not held.committing:
                held.end(EndReason.LOST)

    def cancel(self, cancelled: Iterable[Held]) -> None:
        """Ends attempts whose jobs are to be cancelled."""
        for held in cancelled:
            held.end(EndReason.CANCELLED)


class Heartbeats:
    """The thread that extends all leases in one statement, and says that the worker is alive.

    `on_drain` is called, on the main loop, when the answer is that this worker is to stop; `on_standings` with what
    each beat found out about the workers that hear the same rings.
    """

    def __init__(
        self,
        leases: Leases,
        settings: Settings,
        describe: Callable[[], WorkerRecord],
        on_drain: Callable[[], None] = lambda: None,
        on_standings: Callable[[list[Standing]], None] = lambda _: None,
    ) -> None:
        self._leases = leases
        self._settings = settings
        self._describe = describe
        self._on_drain = on_drain
        self._on_standings = on_standings
        self._interval_seconds = settings.lease_seconds / _BEATS_PER_LEASE
        self._ticked = time.monotonic()
        self._hung = False
        self._stopping = False
        self._thread_loop: asyncio.AbstractEventLoop | None = None
        self._wake = Signal()
        self._ended = anyio.Event()

    async def run(self) -> None:
        """Beats until cancelled; turns the main loop's tick meanwhile. A bug in the thread ends this too."""
        loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._run_thread, args=(loop,), name="clarion-heartbeats", daemon=True)
        thread.start()
        try:
            while not self._ended.is_set():
                self._ticked = time.monotonic()
                self._leases.fence()
                with anyio.move_on_after(_TICK_SECONDS):
                    await self._ended.wait()
            if not self._stopping:
                raise RuntimeError("the heartbeat thread ended; its traceback stands above")
        finally:
            await self.stop()

    def hurry(self) -> None:
        """Beats now: a job of ours was cancelled, or others are to know what this worker does."""
        if self._thread_loop is not None:
            with suppress(RuntimeError):  # it is being closed
                self._thread_loop.call_soon_threadsafe(self._wake.set)

    async def stop(self) -> None:
        """Beats no more; returns when the thread has ended, or after a moment if a beat hangs."""
        self._stopping = True
        with anyio.move_on_after(_STOP_SECONDS, shield=True):
            while not self._ended.is_set():
                self.hurry()
                with anyio.move_on_after(_TICK_SECONDS):
                    await self._ended.wait()

    def _run_thread(self, main_loop: asyncio.AbstractEventLoop) -> None:
        leave_signals_to_the_main_thread()
        try:
            anyio.run(self._beat_until_stopped, main_loop)
        finally:
            self._thread_loop = None
            with suppress(RuntimeError):  # the main loop is closed: nobody waits
                main_loop.call_soon_threadsafe(self._ended.set)

    async def _beat_until_stopped(self, main_loop: asyncio.AbstractEventLoop) -> None:
        database = DedicatedDatabase(self._settings, name="heartbeat", lock_timeout_seconds=_LOCK_WAIT_SECONDS)
        store = Store(database, self._settings)
        self._wake = Signal()
        self._thread_loop = asyncio.get_running_loop()
        weather = False
        while not self._stopping:
            try:
                with anyio.fail_after(self._interval_seconds):
                    await self.beat(store, main_loop)
                await self.look_around(store, main_loop)
            except (Unavailable, TimeoutError) as error:
                if not weather:
                    log.warning(Event.STEP_FAILED, step="heartbeat", error=str(error) or "it took too long")
                weather = True
                await database.close()
                await self._wake.wait_for(min(_RETRY_SECONDS, self._interval_seconds))
            else:
                if weather:
                    log.info(Event.STEP_RECOVERED, step="heartbeat")
                weather = False
                await self._wake.wait_for(self._interval_seconds)
        await database.close()

    async def beat(self, store: Store, main_loop: asyncio.AbstractEventLoop) -> None:
        """One heartbeat for everything held, unless the main loop is hung."""
        if self._is_hung():
            return
        held = {item.lease.token: item for item in self._leases.all()}
        if held:
            sent = time.monotonic()
            answers = await _extend(store, list(held.values()))
            cancelled = []
            for answer in answers:
                item = held.pop(answer.token)
                if answer.cancelled:
                    cancelled.append(item)
                else:
                    item.renew(answer, self._leases.valid_until(sent), sent)
            main_loop.call_soon_threadsafe(self._leases.cancel, cancelled)
            main_loop.call_soon_threadsafe(self._leases.lose, list(held.values()))
        worker = self._describe()
        if await store.record_worker(worker) is Directive.DRAIN:
            main_loop.call_soon_threadsafe(self._on_drain)

    async def look_around(self, store: Store, main_loop: asyncio.AbstractEventLoop) -> None:
        """Finds out who else hears the rings, in a part of the pause; failing that, what is known stays."""
        with suppress(Unavailable), anyio.move_on_after(self._interval_seconds * _LOOK_PART):
            worker_id, gone_seconds = self._describe().id, _GONE_BEATS * self._interval_seconds
            standings = await store.find_standings(worker_id, gone_seconds=gone_seconds)
            main_loop.call_soon_threadsafe(self._on_standings, standings)

    def _is_hung(self) -> bool:
        still_seconds = time.monotonic() - self._ticked
        hung = still_seconds > self._settings.hang_after_seconds
        if hung and not self._hung:
            log.error(Event.WORKER_HUNG, still_seconds=round(still_seconds, 1), held=len(self._leases))
        self._hung = hung
        return hung


async def _extend(store: Store, held: Sequence[Held]) -> list[Heartbeat]:
    """Extends these leases; passes over rows that are locked, which only a handler's own transaction keeps for long."""
    if not any(item.committing for item in held):
        with suppress(Locked):
            return await store.extend_leases([item.lease for item in held])
    return await store.heartbeat_jobs([Beat(id=item.lease.id, token=item.lease.token) for item in held])
