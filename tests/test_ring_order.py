"""A ring leaves after the commit that it speaks of: who hears it earlier finds nothing, and sleeps over the job."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from uuid import UUID

import anyio
import asyncpg
import pytest

from clarion.db import Database
from clarion.endings import Endings
from clarion.enqueuer import Enqueuer
from clarion.execution import Failure, Lease, Release, Snoozing
from clarion.job import NewJob
from clarion.maintenance import Maintenance
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from store_actions import TASK, Jobs, failure


class Journal:
    """An Executor that notes each commit, and what is rung, in order."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.notes: list[str] = []

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        rows = await self._database.fetch(sql, *args)
        self.notes.append("committed")
        return rows


class NotingRinger(Ringer):
    def __init__(self, journal: Journal, settings: Settings) -> None:
        super().__init__(Store(journal, settings), settings)
        self._journal = journal

    def mark(
        self, ready: Mapping[str, int] | None = None, *, scheduled: bool = False, cancelled: Iterable[UUID] = ()
    ) -> None:
        if ready or scheduled or list(cancelled):
            self._journal.notes.append("rung")


class Noted:
    """Everything that rings, over one journal."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.jobs = Jobs(database, settings)
        self.journal = Journal(database)
        store, ringer = Store(self.journal, settings), NotingRinger(self.journal, settings)
        self.enqueuer = Enqueuer(store, ringer, settings)
        self.endings = Endings(store, ringer, buffer_max=10)
        self.maintenance = Maintenance(store, ringer, settings)

    async def end(self, call: Callable[[Lease], Failure | Snoozing | Release]) -> None:
        lease = await self.jobs.run()
        async with anyio.create_task_group() as group:
            self.endings.start(group)
            await self.endings.end(call(lease))
            group.cancel_scope.cancel()


async def enqueue(noted: Noted) -> None:
    await noted.enqueuer.enqueue([NewJob(task=TASK)])


async def enqueue_for_later(noted: Noted) -> None:
    await noted.enqueuer.enqueue([NewJob(task=TASK, delay_seconds=60)])


async def fail(noted: Noted) -> None:
    await noted.end(failure)


async def snooze(noted: Noted) -> None:
    await noted.end(lambda lease: Snoozing(lease.id, lease.token, 60))


async def release(noted: Noted) -> None:
    await noted.end(lambda lease: Release(lease.id, lease.token))


async def promote(noted: Noted) -> None:
    (added,) = await noted.jobs.enqueue(delay_seconds=60)
    await noted.jobs.age(added.id, 120)
    await noted.maintenance.promote()


async def reap(noted: Noted) -> None:
    lease = await noted.jobs.run()
    await noted.jobs.expire(lease.id)
    await noted.maintenance.reap()


@pytest.mark.parametrize("act", [enqueue, enqueue_for_later, fail, snooze, release, promote, reap])
async def test_a_ring_comes_after_the_commit(
    database: Database, settings: Settings, act: Callable[[Noted], Awaitable[None]]
) -> None:
    noted = Noted(database, settings)
    await act(noted)
    assert noted.journal.notes[:2] == ["committed", "rung"]
