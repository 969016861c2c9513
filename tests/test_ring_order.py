"""A ring leaves after the commit that it speaks of, and says how far back in the line somebody has to look.

Who hears it earlier finds nothing, and sleeps over the job; who looks too far on does so too.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from uuid import UUID

import anyio
import asyncpg
import httpx2
import msgspec
import pytest

from api_harness import client_of, services_over
from clarion.db import Database
from clarion.endings import Endings
from clarion.enqueuer import Enqueuer
from clarion.execution import Failure, Lease, Ready, Release, Snoozing
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
        self.ready: dict[str, Ready] = {}

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        rows = await self._database.fetch(sql, *args)
        self.notes.append("committed")
        return rows


class NotingRinger(Ringer):
    def __init__(self, journal: Journal, settings: Settings) -> None:
        super().__init__(Store(journal, settings), settings)
        self._journal = journal

    def mark(
        self,
        ready: Mapping[str, Ready] | None = None,
        *,
        scheduled: bool = False,
        cancelled: Iterable[UUID] = (),
        hops: int = 0,
    ) -> None:
        for queue, more in (ready or {}).items():
            noted = self._journal.ready.get(queue)
            self._journal.ready[queue] = more if noted is None else noted.together(more)
        if ready or scheduled or list(cancelled):
            self._journal.notes.append("rung")


class Noted:
    """Everything that rings, over one journal."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.jobs = Jobs(database, settings)
        self.journal = Journal(database)
        store, ringer = Store(self.journal, settings), NotingRinger(self.journal, settings)
        self.services = msgspec.structs.replace(services_over(store, settings), ringer=ringer)
        self.enqueuer = Enqueuer(store, ringer, settings)
        self.endings = Endings(store, ringer, buffer_max=10)
        self.maintenance = Maintenance(store, ringer, settings)

    async def end(self, call: Callable[[Lease], Failure | Snoozing | Release]) -> None:
        lease = await self.jobs.run()
        async with anyio.create_task_group() as group:
            self.endings.start(group)
            await self.endings.end(call(lease))
            group.cancel_scope.cancel()

    async def release(self, *leases: Lease) -> None:
        async with anyio.create_task_group() as group:
            self.endings.start(group)
            for lease in leases:
                await self.endings.end(Release(lease.id, lease.token))
            group.cancel_scope.cancel()

    async def call(self, method: str, path: str, body: object = None) -> httpx2.Response:
        async with client_of(self.services) as client:
            return await client.request(method, path, json=body)


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


# -- What a ring says


async def enqueue_in_any_order(noted: Noted) -> None:
    jobs = [NewJob(task=TASK, queue=queue, priority=n) for queue in ("a", "b") for n in (0, 7, -7)]
    await noted.enqueuer.enqueue([*jobs, NewJob(task=TASK, queue="a", delay_seconds=60)])


async def release_two(noted: Noted) -> None:
    await noted.release(*[await noted.jobs.run(priority=priority) for priority in (-5, 5)])


async def promote_two(noted: Noted) -> None:
    for priority in (0, 20):
        (added,) = await noted.jobs.enqueue(priority=priority, delay_seconds=60)
        await noted.jobs.age(added.id, 120)
    await noted.maintenance.promote()


async def reap_two(noted: Noted) -> None:
    for priority in (0, 20):
        await noted.jobs.expire((await noted.jobs.run(priority=priority)).id)
    await noted.maintenance.reap()


async def hurry(noted: Noted) -> None:
    (added,) = await noted.jobs.enqueue(delay_seconds=60, priority=3)
    assert (await noted.call("POST", f"/v1/jobs/{added.id}/retry")).status_code == 200


async def run_the_cancelled_again(noted: Noted) -> None:
    (added,) = await noted.jobs.enqueue(priority=-3)
    await noted.jobs.cancel(added.id)
    assert (await noted.call("POST", f"/v1/jobs/{added.id}/retry")).status_code == 200


async def redrive(noted: Noted) -> None:
    for priority in (0, 9):
        lease = await noted.jobs.run(priority=priority, max_attempts=1)
        await noted.jobs.store.fail_jobs([failure(lease)])
    assert (await noted.call("POST", "/v1/dead/redrive", {})).json()["redriven"] == 2


async def change_what_is_ready(noted: Noted) -> None:
    """A claim that ran at this moment has passed the locked row by: also a change of no place is to be rung."""
    (added,) = await noted.jobs.enqueue(priority=1)
    assert (await noted.call("PATCH", f"/v1/jobs/{added.id}", {"max_attempts": 3})).status_code == 200


async def change_the_place(noted: Noted) -> None:
    (added,) = await noted.jobs.enqueue(queue="a")
    assert (await noted.call("PATCH", f"/v1/jobs/{added.id}", {"queue": "b", "priority": 50})).status_code == 200


async def change_the_time(noted: Noted) -> None:
    (added,) = await noted.jobs.enqueue(delay_seconds=60)
    assert (await noted.call("PATCH", f"/v1/jobs/{added.id}", {"delay": 0})).status_code == 200


@pytest.mark.parametrize(
    "act",
    [
        enqueue_in_any_order, release_two, promote_two, reap_two, hurry, run_the_cancelled_again, redrive,
        change_what_is_ready, change_the_place, change_the_time,
    ],
)  # fmt: skip
async def test_a_ring_names_how_many_became_ready_and_the_earliest_place_in_line(
    database: Database, settings: Settings, act: Callable[[Noted], Awaitable[None]]
) -> None:
    noted = Noted(database, settings)
    await act(noted)
    rows = await database.fetch("""
        select queue, count(*)::integer as jobs, min(sort_key) as earliest from clarion.jobs
        where state = 'ready' group by queue
    """)
    assert rows
    assert noted.journal.ready == {row["queue"]: Ready(row["jobs"], row["earliest"]) for row in rows}
