"""Faults in the middle of a flush: everybody hears of his own outcome, nobody hangs, and the next flush works."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from clarion.claims import Ask, Claims
from clarion.db import Database, Locked, open_database
from clarion.endings import Endings
from clarion.enqueuer import Enqueuer
from clarion.errors import ClarionError, Overloaded, Unavailable, Unstorable
from clarion.execution import Completion, Lease
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from store_actions import TASK, Jobs

NOBODY_WRITES = "lock table clarion.jobs in exclusive mode"
BLOCKED = """
    from pg_stat_activity
    where application_name = 'clarion flushing' and datname = current_database() and wait_event_type = 'Lock'
"""
COUNT = 100

# Makes the n-th call of a test; answers the id of the job that it is about.
Call: TypeAlias = Callable[[int], Awaitable[UUID]]


class Parts:
    """What coalesces in a process, over a pool of its own, and the calls that a test makes at once."""

    def __init__(self, jobs: Jobs, database: Database, settings: Settings) -> None:
        store = Store(database, settings)
        self.database = database
        self.jobs = jobs
        self.ringer = Ringer(store, settings)
        self.enqueuer = Enqueuer(store, self.ringer, settings)
        self.endings = Endings(store, self.ringer, buffer_max=COUNT)
        self.claims = Claims(store, settings)
        self.outcomes: dict[int, UUID | ClarionError] = {}

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self.enqueuer.run)
            group.start_soon(self.claims.run)
            self.endings.start(group)

    async def note(self, call: Call, place: int) -> None:
        try:
            self.outcomes[place] = await call(place)
        except ClarionError as error:
            self.outcomes[place] = error

    def answered(self) -> dict[int, UUID]:
        return {place: outcome for place, outcome in self.outcomes.items() if isinstance(outcome, UUID)}

    def refused(self) -> dict[int, type[ClarionError]]:
        return {place: type(outcome) for place, outcome in self.outcomes.items() if isinstance(outcome, ClarionError)}

    async def until_all_know(self, count: int) -> None:
        while len(self.outcomes) < count:
            await anyio.lowlevel.checkpoint()

    # -- What can be called

    async def enqueue(self, _place: int) -> UUID:
        return (await self.enqueuer.enqueue_one(NewJob(task=TASK))).id

    async def claim(self, _place: int) -> UUID:
        ask = Ask(worker_id=uuid4(), queues=["default"], tasks=None, jobs_max=1, lease_seconds=30)
        (lease,) = await self.claims.claim(ask)
        return lease.id

    def complete(self, leases: list[Lease], results: dict[int, str] | None = None) -> Call:
        async def call(place: int) -> UUID:
            lease = leases[place]
            completed = await self.endings.complete(Completion(lease.id, lease.token, (results or {}).get(place)))
            assert completed.state == "succeeded"
            return lease.id

        return call


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def until_blocked(jobs: Jobs) -> None:
    """Returns when a flush waits for a lock."""
    while not await jobs.fetch(f"select 1 {BLOCKED}"):
        await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def parts_of(jobs: Jobs, settings: Settings, **changes: Any) -> AsyncIterator[tuple[Parts, anyio.abc.TaskGroup]]:
    changed = msgspec.structs.replace(settings, sweep_seconds=300, **changes)
    async with open_database(changed, name="flushing") as database, anyio.create_task_group() as group:
        parts = Parts(jobs, database, changed)
        group.start_soon(parts.run)
        yield parts, group
        group.cancel_scope.cancel()


async def call_of(verb: str, parts: Parts, jobs: Jobs) -> tuple[Call, str]:
    """A call of this verb, with what it needs in the database; and how to find the jobs that it had its way with."""
    if verb == "enqueue":
        return parts.enqueue, "select id from clarion.jobs"
    await jobs.enqueue(2 * COUNT)
    if verb == "claim":
        return parts.claim, "select id from clarion.jobs where state = 'running'"
    return parts.complete(await jobs.claim(2 * COUNT)), "select id from clarion.job_history"


@pytest.mark.parametrize("verb", ["enqueue", "claim", "complete"])
async def test_a_connection_that_is_killed_during_a_flush_leaves_nobody_in_the_dark(
    jobs: Jobs, settings: Settings, verb: str
) -> None:
    async with parts_of(jobs, settings) as (parts, group):
        call, done = await call_of(verb, parts, jobs)
        async with jobs.session() as session:
            await session.fetch(NOBODY_WRITES)
            for place in range(10):
                group.start_soon(parts.note, call, place)
            await until_blocked(jobs)
            # These go together in the next flush.
            for place in range(10, COUNT):
                group.start_soon(parts.note, call, place)
            await wait_all_tasks_blocked()
            assert await jobs.fetch(f"select pg_terminate_backend(pid) {BLOCKED}")
            while len(parts.outcomes) < 10:
                await anyio.lowlevel.checkpoint()
            await session.rollback()
        await parts.until_all_know(COUNT)
        assert parts.refused() == dict.fromkeys(range(10), Unavailable)
        assert set(parts.answered().values()) == {row["id"] for row in await jobs.fetch(done)}
        # Whoever was told that nobody knows asks again.
        for place in range(10):
            del parts.outcomes[place]
            group.start_soon(parts.note, call, place)
        await parts.until_all_know(COUNT)
        assert set(parts.answered().values()) == {row["id"] for row in await jobs.fetch(done)}
        assert len(set(parts.answered().values())) == COUNT


async def test_of_a_hundred_results_the_one_that_cannot_be_stored_is_refused(jobs: Jobs, settings: Settings) -> None:
    await jobs.enqueue(COUNT)
    leases = await jobs.claim(COUNT)
    async with parts_of(jobs, settings) as (parts, group):
        for place in range(COUNT):
            group.start_soon(parts.note, parts.complete(leases, {37: "no JSON"}), place)
        await parts.until_all_know(COUNT)
    assert parts.refused() == {37: Unstorable}
    assert await jobs.state(leases[37].id) == "running"
    assert len(await jobs.fetch("select from clarion.job_history where state = 'succeeded'")) == COUNT - 1


async def test_of_a_hundred_rows_the_one_that_somebody_keeps_locked_is_told_so(jobs: Jobs, settings: Settings) -> None:
    await jobs.enqueue(COUNT)
    leases = await jobs.claim(COUNT)
    async with parts_of(jobs, settings, pool_max=1) as (parts, group), jobs.session() as session:
        await parts.database.fetch("set lock_timeout = '20ms'")  # for this pool's only connection
        await session.fetch("select from clarion.jobs where id = $1 for update", leases[37].id)
        for place in range(COUNT):
            group.start_soon(parts.note, parts.complete(leases), place)
        await parts.until_all_know(COUNT)
        await session.rollback()
        assert parts.refused() == {37: Locked}
        group.start_soon(parts.note, parts.complete(leases), 37)
        while parts.refused():
            await anyio.lowlevel.checkpoint()
    assert len(await jobs.fetch("select from clarion.job_history where state = 'succeeded'")) == COUNT


async def test_the_job_of_a_caller_who_left_during_the_flush_is_there_and_rung(jobs: Jobs, settings: Settings) -> None:
    async with parts_of(jobs, settings) as (parts, group):
        async with jobs.session() as session:
            await session.fetch(NOBODY_WRITES)
            async with anyio.create_task_group() as leaving:
                leaving.start_soon(parts.note, parts.enqueue, 0)
                await until_blocked(jobs)
                leaving.cancel_scope.cancel()
        group.start_soon(parts.note, parts.enqueue, 1)
        await parts.until_all_know(1)
        assert len(await jobs.fetch("select from clarion.jobs")) == 2
        with anyio.fail_after(5):
            await parts.ringer.step()


async def test_whoever_finds_the_buffer_full_is_told_so_and_nothing_accepted_is_lost(
    jobs: Jobs, settings: Settings
) -> None:
    async with parts_of(jobs, settings, enqueue_buffer_max_jobs=5) as (parts, group):
        async with jobs.session() as session:
            await session.fetch(NOBODY_WRITES)
            group.start_soon(parts.note, parts.enqueue, 0)
            await until_blocked(jobs)  # in flight, so no longer in the buffer
            for place in range(1, 9):
                group.start_soon(parts.note, parts.enqueue, place)
            await parts.until_all_know(3)
            assert parts.refused() == dict.fromkeys([6, 7, 8], Overloaded)
        await parts.until_all_know(9)
        assert set(parts.answered().values()) == {row["id"] for row in await jobs.fetch("select id from clarion.jobs")}
        assert len(parts.answered()) == 6
