"""Requests that wait for jobs to finish (`?wait=20s`), however many, for the price of one query per tick.

A waiter is an entry in a dict: it holds no connection and no timer of its own query. Once a tick, one statement asks
which of all the awaited jobs are finished. That is level-triggered: it looks at what is, so a job that finished
before its waiter came, during an outage, or in another process is found all the same, and finishing a job pays
nothing for being watched. Measured: 0.2 ms a tick for one waiter, 7.5 ms for ten thousand. While nobody waits nothing
runs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import anyio

from clarion.errors import Overloaded
from clarion.loops import Signal, run_forever
from clarion.settings import Settings
from clarion.store import Store


class Waits:
    """The waiters of one process, `waiting` of them; `run` must be running, or they wait until their time is up."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._waiters_max = settings.waiters_max
        self._tick_seconds = settings.wait_tick_seconds
        self._waiters: dict[UUID, list[anyio.Event]] = {}
        self.waiting = 0
        self._closed = False
        self._arrival = Signal()

    @contextmanager
    def waiter(self, job_id: UUID) -> Iterator[anyio.Event]:
        """An event that is set once the job is finished; raises Overloaded when too many wait already."""
        if self.waiting >= self._waiters_max:
            raise Overloaded(f"{self._waiters_max} requests are waiting for jobs already")
        event = anyio.Event()
        if self._closed:
            event.set()
        if not self._waiters:
            self._arrival.set()
        self._waiters.setdefault(job_id, []).append(event)
        self.waiting += 1
        try:
            yield event
        finally:
            self.waiting -= 1
            self._drop(job_id, event)

    async def wait(self, job_id: UUID, seconds: float) -> bool:
        """Waits for a job to finish, or for the time to be up, or for `close`; whether it was not the time."""
        with self.waiter(job_id) as event, anyio.move_on_after(seconds):
            await event.wait()
            return True
        return False

    async def step(self) -> float:
        """Answers everybody whose job is finished; the seconds until it should be called again."""
        if not self._waiters:
            return math.inf
        for job_id in await self._store.find_finished(list(self._waiters)):
            for event in self._waiters.get(job_id, ()):
                event.set()
        return self._tick_seconds

    async def run(self) -> None:
        """Serves waiters until it is cancelled; sleeps while there are none."""
        await run_forever(self.step, name="waits", wake=self._arrival)

    def close(self) -> None:
        """Releases everybody, now and from now on: shutdown has begun, and they are answered with what is."""
        self._closed = True
        for events in self._waiters.values():
            for event in events:
                event.set()

    def _drop(self, job_id: UUID, event: anyio.Event) -> None:
        events = self._waiters[job_id]
        events.remove(event)
        if not events:
            del self._waiters[job_id]
