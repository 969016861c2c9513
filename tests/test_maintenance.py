"""The steps that keep jobs moving, awaited one by one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import msgspec
import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.maintenance import Maintenance
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from store_actions import Jobs


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


@pytest.fixture
def maintenance(store: Store, settings: Settings) -> Maintenance:
    return Maintenance(store, Ringer(store, settings), settings)


@asynccontextmanager
async def unhandled(jobs: Jobs, job_id: UUID) -> AsyncIterator[None]:
    """A row that no statement may charge with a crash."""
    await jobs.fetch(f"alter table clarion.jobs add constraint bad_row check (id <> '{job_id}' or crashes = 0)")
    yield
    await jobs.fetch("alter table clarion.jobs drop constraint bad_row")


async def test_promotion_sleeps_until_the_next_job_is_due(jobs: Jobs, maintenance: Maintenance) -> None:
    await jobs.enqueue(delay_seconds=0.5)
    assert 0 < await maintenance.promote() <= 0.5


async def test_promotion_looks_again_at_once_after_a_full_page(jobs: Jobs, settings: Settings) -> None:
    pages_of_two = msgspec.structs.replace(settings, step_max_jobs=2)
    store = Store(jobs.database, pages_of_two)
    await jobs.enqueue(3, delay_seconds=60)
    await jobs.fetch("update clarion.jobs set run_at = now()")
    maintenance = Maintenance(store, Ringer(store, pages_of_two), pages_of_two)
    assert await maintenance.promote() == 0
    assert await maintenance.promote() > 0
    assert [row["state"] for row in await jobs.fetch("select state::text from clarion.jobs")] == ["ready"] * 3


async def test_a_row_that_the_reaper_cannot_handle_is_parked_and_the_others_go_on(
    jobs: Jobs, store: Store, maintenance: Maintenance
) -> None:
    await jobs.enqueue(5)
    leases = await jobs.claim(5)
    for lease in leases:
        await jobs.expire(lease.id)
    bad = leases[2].id
    async with unhandled(jobs, bad):
        with pytest.raises(Unstorable):
            await store.reap_jobs()
        await maintenance.reap()
        await maintenance.reap()
        rows = await jobs.fetch("select id, state::text, dead_reason::text from clarion.jobs")
    states = {row["id"]: (row["state"], row["dead_reason"]) for row in rows}
    assert states.pop(bad) == ("dead", "unprocessable")
    assert list(states.values()) == [("ready", None)] * 4


async def test_a_step_without_work_asks_for_its_pause(maintenance: Maintenance) -> None:
    assert 0 < await maintenance.reap() <= 1
    assert await maintenance.partition() > 60
    assert await maintenance.prune() > 10
    assert await maintenance.promote() > 0


@pytest.mark.parametrize(
    "spoilt",
    [
        "timeout_seconds = 1e30",
        "timeout_seconds = 'NaN'",
        "backoff_seconds = -1",
        "run_at = 'infinity'",
        "sort_key = '-infinity'",
        "state = 'running'",
        "state = 'succeeded'",
    ],
)
async def test_a_row_that_would_stop_a_statement_cannot_be_stored(jobs: Jobs, spoilt: str) -> None:
    (job,) = await jobs.enqueue()
    with pytest.raises(Unstorable):
        await jobs.fetch(f"update clarion.jobs set {spoilt} where id = $1", job.id)


@pytest.mark.parametrize("column", ["attempt", "errors", "crashes"])
async def test_a_counter_at_its_end_stops_nothing(jobs: Jobs, column: str) -> None:
    (job,) = await jobs.enqueue(backoff_seconds=1)
    await jobs.fetch(f"update clarion.jobs set max_attempts = 32767, {column} = 32767 where id = $1", job.id)
    (lease,) = await jobs.claim()
    await jobs.expire(lease.id)
    (reaped,) = await jobs.store.reap_jobs()
    assert reaped.id == job.id
