"""Extending leases: from now, never past the attempt's deadline, and cheap."""

import math
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from clarion.db import Database, Locked
from clarion.errors import Unstorable
from clarion.execution import Lease
from clarion.settings import Settings
from store_actions import BEATS, Jobs, attempt_all, beat

UPDATES = "select n_tup_upd, n_tup_hot_upd from pg_stat_xact_user_tables where relid = 'clarion.jobs'::regclass"


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def seconds_left(jobs: Jobs, job_id: UUID) -> float:
    (row,) = await jobs.fetch(
        "select extract(epoch from lease_expires_at - clock_timestamp())::float8 as s from clarion.jobs where id = $1",
        job_id,
    )
    return float(row["s"])


async def extend(jobs: Jobs, *leases: Lease, **options: Any) -> dict[UUID, bool]:
    """Whether each lease that is still held was extended."""
    beats = [beat(lease, **{"lease_seconds": 100.0} | options) for lease in leases]
    return {answer.id: answer.extended for answer in await jobs.store.heartbeat_jobs(beats)}


@pytest.mark.parametrize("lease_seconds", [1000, 5])
async def test_an_extension_counts_from_now_and_may_shorten(jobs: Jobs, lease_seconds: float) -> None:
    lease = await jobs.run()
    assert await extend(jobs, lease, lease_seconds=lease_seconds) == {lease.id: True}
    assert await seconds_left(jobs, lease.id) == pytest.approx(lease_seconds, abs=1)


@pytest.mark.parametrize(("asked", "seconds"), [(100.0, 100), (None, 30)])
async def test_a_beat_that_does_not_say_extends_by_what_the_claim_asked_for(
    jobs: Jobs, asked: float | None, seconds: float
) -> None:
    await jobs.enqueue()
    (lease,) = await jobs.claim(lease_seconds=100.0)
    # None: it was claimed before leases were kept.
    await jobs.fetch("update clarion.jobs set lease_seconds = $1::real", asked)
    await jobs.expire(lease.id)
    assert await extend(jobs, lease, lease_seconds=None) == {lease.id: True}
    assert await seconds_left(jobs, lease.id) == pytest.approx(seconds, abs=1)


async def test_a_longer_lease_asked_for_by_one_beat_is_for_that_beat_only(jobs: Jobs) -> None:
    lease = await jobs.run()
    await extend(jobs, lease, lease_seconds=500.0)
    await extend(jobs, lease, lease_seconds=None)
    assert await seconds_left(jobs, lease.id) == pytest.approx(30, abs=1)


async def test_the_answer_says_how_long_the_lease_still_holds(jobs: Jobs) -> None:
    lease, short = await jobs.run(), await jobs.run(timeout_seconds=10)
    answers = await jobs.store.heartbeat_jobs([beat(item, lease_seconds=100.0) for item in (lease, short)])
    seconds = {answer.token: answer.lease_seconds for answer in answers}
    assert seconds == {lease.token: pytest.approx(100, abs=1), short.token: pytest.approx(15, abs=1)}
    assert {answer.id for answer in answers} == {lease.id, short.id}
    assert not any(answer.cancelled for answer in answers)


@pytest.mark.parametrize(("ran_for", "left"), [(0, 65), (50, 15), (63, 2), (70, -5)])
async def test_no_lease_lasts_past_the_attempts_deadline(jobs: Jobs, ran_for: float, left: float) -> None:
    lease = await jobs.run(timeout_seconds=60)
    await jobs.age(lease.id, ran_for)
    await extend(jobs, lease, lease_seconds=1000.0)
    assert await seconds_left(jobs, lease.id) == pytest.approx(left, abs=1)


async def test_a_lease_that_is_no_longer_held_is_left_out_of_the_answer(jobs: Jobs) -> None:
    held, lost, done = [await jobs.run() for _ in range(3)]
    await jobs.lose(lost)
    await jobs.attempt("complete", done)
    unknown = msgspec.structs.replace(held, id=uuid4(), token=uuid4())
    assert await extend(jobs, lost, held, done, unknown) == {held.id: True}


async def test_a_beat_for_nothing_answers_nothing(jobs: Jobs) -> None:
    assert await extend(jobs) == {}


async def test_a_locked_row_is_still_held_and_its_neighbours_are_extended(jobs: Jobs) -> None:
    locked, *free = [await jobs.run() for _ in range(3)]
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked.id)
        answers = await extend(jobs, locked, *free)
    assert answers == {locked.id: False, free[0].id: True, free[1].id: True}
    assert await seconds_left(jobs, locked.id) < 31
    assert await seconds_left(jobs, free[0].id) > 90
    assert await extend(jobs, locked) == {locked.id: True}


@pytest.mark.parametrize("ending", ["complete", "fail", "snooze", "release"])
async def test_a_beat_does_not_wait_for_an_ending_in_flight(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    async with jobs.session() as other:
        await jobs.attempt(ending, lease, store=other.store)
        assert await extend(jobs, lease) == {lease.id: False}
        await other.commit()
    assert await extend(jobs, lease) == {}


async def test_a_beat_keeps_the_reaper_away(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.expire(lease.id)
    await extend(jobs, lease)
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


# -- Progress and checkpoints


async def said(jobs: Jobs, job_id: UUID) -> tuple[str | None, str | None]:
    job = await jobs.job(job_id)
    return job.progress, job.checkpoint


async def test_progress_and_checkpoint_are_kept_to_the_letter_until_others_come(jobs: Jobs) -> None:
    lease = await jobs.run()
    await extend(jobs, lease, progress='{"n": 1.10}', checkpoint="[1,  2]")
    assert await said(jobs, lease.id) == ('{"n": 1.10}', "[1,  2]")
    await extend(jobs, lease)
    assert await said(jobs, lease.id) == ('{"n": 1.10}', "[1,  2]")
    await extend(jobs, lease, progress="2")
    await extend(jobs, lease, checkpoint="null")
    assert await said(jobs, lease.id) == ("2", "null")


async def test_each_lease_of_a_batch_keeps_its_own(jobs: Jobs) -> None:
    leases = [await jobs.run() for _ in range(20)]
    beats = [beat(lease, progress=f'"{lease.id}"', checkpoint=f'["{lease.id}"]') for lease in reversed(leases)]
    assert len(await jobs.store.heartbeat_jobs(beats)) == 20
    for lease in leases:
        assert await said(jobs, lease.id) == (f'"{lease.id}"', f'["{lease.id}"]')


@pytest.mark.parametrize("ending", ["fail", "snooze", "release", "crash"])
async def test_a_checkpoint_is_for_the_next_attempt_and_progress_is_not(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    assert lease.checkpoint is None
    await extend(jobs, lease, progress="1", checkpoint='{"page": 7}')
    if ending == "crash":
        again = await jobs.lose(lease)
    else:
        await jobs.attempt(ending, lease)
        assert await said(jobs, lease.id) == ("1", '{"page": 7}')
        await jobs.make_due(lease.id)
        (again,) = await jobs.claim()
    assert again.checkpoint == '{"page": 7}'
    assert await said(jobs, lease.id) == (None, '{"page": 7}')


async def test_the_last_progress_is_seen_in_the_history(jobs: Jobs) -> None:
    lease = await jobs.run()
    await extend(jobs, lease, progress='{"current": 3}')
    await jobs.attempt("complete", lease)
    assert (await said(jobs, lease.id))[0] == '{"current": 3}'


@pytest.mark.parametrize("options", [{"progress": "no JSON"}, {"checkpoint": "{"}, {"lease_seconds": float("nan")}])
async def test_a_beat_that_postgres_refuses_undoes_its_set(jobs: Jobs, options: dict[str, Any]) -> None:
    lease, other = await jobs.run(), await jobs.run()
    before = await jobs.everything()
    with pytest.raises(Unstorable):
        await jobs.store.heartbeat_jobs([beat(other, progress="1"), beat(lease, **options)])
    assert await jobs.everything() == before


async def test_what_a_locked_row_was_to_keep_is_for_the_next_beat(jobs: Jobs) -> None:
    lease = await jobs.run()
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", lease.id)
        assert await extend(jobs, lease, progress="1") == {lease.id: False}
    assert await said(jobs, lease.id) == (None, None)
    assert await extend(jobs, lease, progress="1") == {lease.id: True}
    assert await said(jobs, lease.id) == ("1", None)


async def test_two_beats_of_one_lease_need_not_wait_for_each_other(jobs: Jobs) -> None:
    """A worker's heartbeat and its handler's progress come on different connections."""
    lease = await jobs.run()
    async with jobs.session() as other:
        assert await jobs.attempt("progress", lease, store=other.store)
        assert await extend(jobs, lease) == {lease.id: False}
        await other.commit()
    assert await extend(jobs, lease) == {lease.id: True}
    assert await said(jobs, lease.id) == ('{"current": 1}', '{"at": 1}')


# -- All leases of a worker at once


async def test_leases_are_extended_by_as_much_as_their_claims_asked_for(jobs: Jobs) -> None:
    await jobs.enqueue(2)
    (long,), (short,) = [await jobs.claim(lease_seconds=seconds) for seconds in (100.0, 50.0)]
    for lease in (long, short):
        await jobs.expire(lease.id)
    answers = {answer.id: answer for answer in await jobs.store.extend_leases([short, long])}
    assert [answers[lease.id].extended for lease in (long, short)] == [True, True]
    assert [answers[lease.id].lease_seconds for lease in (long, short)] == [math.inf] * 2
    assert await seconds_left(jobs, long.id) == pytest.approx(100, abs=1)
    assert await seconds_left(jobs, short.id) == pytest.approx(50, abs=1)


async def test_what_a_deadline_leaves_of_a_lease_is_said(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=10.0)
    (answer,) = await jobs.store.extend_leases([lease])
    assert answer.lease_seconds == pytest.approx(15, abs=1)
    assert await seconds_left(jobs, lease.id) == pytest.approx(15, abs=1)


async def test_a_lease_to_be_cancelled_is_not_extended_with_the_others(jobs: Jobs) -> None:
    lease, other = await jobs.run(), await jobs.run()
    await jobs.cancel(lease.id)
    before = await jobs.row(lease.id)
    answers = {answer.id: answer for answer in await jobs.store.extend_leases([lease, other])}
    assert (answers[lease.id].cancelled, answers[other.id].cancelled) == (True, False)
    assert (await jobs.row(lease.id))["lease_expires_at"] == before["lease_expires_at"]


async def test_of_all_leases_only_those_still_held_are_answered(jobs: Jobs) -> None:
    lease, lost, done = [await jobs.run() for _ in range(3)]
    await jobs.lose(lost)
    await jobs.attempt("complete", done)
    stale = msgspec.structs.replace(lease, token=uuid4())
    assert [answer.id for answer in await jobs.store.extend_leases([lease, lost, done])] == [lease.id]
    assert await jobs.store.extend_leases([stale]) == []


async def test_where_a_row_stays_locked_nothing_is_extended_and_it_is_said(jobs: Jobs) -> None:
    lease, locked = await jobs.run(), await jobs.run()
    before = await jobs.row(lease.id)
    async with jobs.session() as other, jobs.session() as beating:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked.id)
        await beating.fetch("set local lock_timeout = '50ms'")
        with pytest.raises(Locked):
            await beating.store.extend_leases([lease, locked])
    assert (await jobs.row(lease.id))["lease_expires_at"] == before["lease_expires_at"]


async def test_extending_all_leases_is_hot_as_well(jobs: Jobs) -> None:
    leases = [await jobs.run() for _ in range(5)]
    async with jobs.session() as session:
        await session.store.extend_leases(leases)
        (row,) = await session.fetch(UPDATES)
    assert (row["n_tup_upd"], row["n_tup_hot_upd"]) == (5, 5)


# -- What it costs


@pytest.mark.parametrize("verb", BEATS)
async def test_a_heartbeat_is_a_hot_update(jobs: Jobs, verb: str) -> None:
    leases = [await jobs.run() for _ in range(5)]
    async with jobs.session() as session:
        assert all(await attempt_all(session.store, verb, leases))
        (row,) = await session.fetch(UPDATES)
    assert (row["n_tup_upd"], row["n_tup_hot_upd"]) == (5, 5)


@pytest.mark.parametrize("column", ["lease_expires_at", "progress", "checkpoint", "log_lines", "cancel_requested_at"])
async def test_no_index_holds_what_a_beat_changes(jobs: Jobs, column: str) -> None:
    rows = await jobs.fetch(
        """
        select i.indexrelid::regclass::text as name
        from pg_index as i join pg_attribute as a on a.attrelid = i.indrelid and a.attname = $1
        where i.indrelid = 'clarion.jobs'::regclass
          and (a.attnum = any(i.indkey) or pg_get_indexdef(i.indexrelid) like '%' || $1 || '%')
        """,
        column,
    )
    assert rows == []
