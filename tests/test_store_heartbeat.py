"""Extending leases: from now, never past the attempt's deadline, and cheap."""

from uuid import UUID, uuid4

import pytest

from clarion.db import Database
from clarion.execution import Heartbeat, Release
from clarion.settings import Settings
from store_actions import Jobs


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def seconds_left(jobs: Jobs, job_id: UUID) -> float:
    (row,) = await jobs.fetch(
        "select extract(epoch from lease_expires_at - clock_timestamp())::float8 as s from clarion.jobs where id = $1",
        job_id,
    )
    return float(row["s"])


async def beat(jobs: Jobs, *leases: Release, lease_seconds: float = 100) -> list[Heartbeat]:
    return await jobs.store.heartbeat_jobs(leases, lease_seconds=lease_seconds)


@pytest.mark.parametrize("lease_seconds", [1000, 5])
async def test_an_extension_counts_from_now_and_may_shorten(jobs: Jobs, lease_seconds: float) -> None:
    lease = await jobs.run()
    assert await beat(jobs, Release(lease.id, lease.token), lease_seconds=lease_seconds) == [Heartbeat(lease.id, True)]
    assert await seconds_left(jobs, lease.id) == pytest.approx(lease_seconds, abs=1)


@pytest.mark.parametrize(("ran_for", "left"), [(0, 65), (50, 15), (63, 2), (70, -5)])
async def test_no_lease_lasts_past_the_attempts_deadline(jobs: Jobs, ran_for: float, left: float) -> None:
    lease = await jobs.run(timeout_seconds=60)
    await jobs.age(lease.id, ran_for)
    await beat(jobs, Release(lease.id, lease.token), lease_seconds=1000)
    assert await seconds_left(jobs, lease.id) == pytest.approx(left, abs=1)


async def test_a_lease_that_is_no_longer_held_is_left_out_of_the_answer(jobs: Jobs) -> None:
    held, lost, done = [await jobs.run() for _ in range(3)]
    await jobs.lose(lost)
    await jobs.attempt("complete", done)
    leases = [Release(lease.id, lease.token) for lease in (lost, held, done)]
    assert await beat(jobs, *leases, Release(uuid4(), uuid4())) == [Heartbeat(held.id, True)]


async def test_a_beat_for_nothing_answers_nothing(jobs: Jobs) -> None:
    assert await beat(jobs) == []


async def test_a_locked_row_is_still_held_and_its_neighbours_are_extended(jobs: Jobs) -> None:
    locked, *free = [await jobs.run() for _ in range(3)]
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked.id)
        answers = await beat(jobs, *(Release(lease.id, lease.token) for lease in (locked, *free)))
    assert {answer.id: answer.extended for answer in answers} == {
        locked.id: False, free[0].id: True, free[1].id: True,
    }  # fmt: skip
    assert await seconds_left(jobs, locked.id) < 31
    assert await seconds_left(jobs, free[0].id) > 90
    assert await beat(jobs, Release(locked.id, locked.token)) == [Heartbeat(locked.id, True)]


@pytest.mark.parametrize("ending", ["complete", "fail", "snooze", "release"])
async def test_a_beat_does_not_wait_for_an_ending_in_flight(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    async with jobs.session() as other:
        await jobs.attempt(ending, lease, store=other.store)
        assert await beat(jobs, Release(lease.id, lease.token)) == [Heartbeat(lease.id, False)]
        await other.commit()
    assert await beat(jobs, Release(lease.id, lease.token)) == []


async def test_a_beat_keeps_the_reaper_away(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.expire(lease.id)
    await beat(jobs, Release(lease.id, lease.token))
    assert await jobs.store.reap_jobs() == []


async def test_the_reaper_looks_again_at_a_lease_that_was_extended_meanwhile(jobs: Jobs) -> None:
    """Its snapshot still shows the expired lease; the row it locks does not."""
    lease, expired = await jobs.run(), await jobs.run()
    for job_id in (lease.id, expired.id):
        await jobs.expire(job_id)
    async with jobs.session() as other:
        await jobs.attempt("heartbeat", lease, store=other.store)
        assert [reaped.id for reaped in await jobs.store.reap_jobs()] == [expired.id]
        await other.commit()
    assert await jobs.store.reap_jobs() == []


async def test_a_heartbeat_is_a_hot_update(jobs: Jobs) -> None:
    leases = [Release(lease.id, lease.token) for lease in [await jobs.run() for _ in range(5)]]
    async with jobs.session() as session:
        await session.store.heartbeat_jobs(leases, lease_seconds=60)
        (row,) = await session.fetch("""
            select n_tup_upd, n_tup_hot_upd from pg_stat_xact_user_tables where relid = 'clarion.jobs'::regclass
        """)
    assert (row["n_tup_upd"], row["n_tup_hot_upd"]) == (5, 5)


async def test_no_index_holds_the_expiry(jobs: Jobs) -> None:
    rows = await jobs.fetch("""
        select i.indexrelid::regclass::text as name
        from pg_index as i join pg_attribute as a on a.attrelid = i.indrelid and a.attname = 'lease_expires_at'
        where i.indrelid = 'clarion.jobs'::regclass
          and (a.attnum = any(i.indkey) or pg_get_indexdef(i.indexrelid) like '%lease_expires_at%')
    """)
    assert rows == []
