"""Adding jobs, and the moment at which those for later become ready."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import RFC_4122

import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.job import NewJob
from clarion.settings import Settings
from recording import amounts
from store_actions import TASK, Jobs

POLICY: dict[str, Any] = {
    "max_attempts": 3,
    "timeout_seconds": 30.5,
    "backoff_seconds": 1.5,
    "backoff_cap_seconds": 60.0,
}


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def test_each_job_gets_its_answer_in_order(jobs: Jobs) -> None:
    new = [NewJob(task=TASK, args=f'{{"n": {n}}}', delay_seconds=n % 2 * 60.0) for n in range(10)]
    added = await jobs.store.enqueue_jobs(new)
    assert [answer.state for answer in added] == ["ready", "scheduled"] * 5
    rows = await jobs.fetch("select id, args::text from clarion.jobs")
    assert {row["id"]: row["args"] for row in rows} == {
        answer.id: job.args for answer, job in zip(added, new, strict=True)
    }


async def test_nothing_in_gives_nothing_out(jobs: Jobs) -> None:
    assert await jobs.store.enqueue_jobs([]) == []


async def test_every_field_is_kept(jobs: Jobs) -> None:
    args = '{"exact": 0.1000000000000000055511151231257827, "a": 1, "a": 2}'
    (added,) = await jobs.enqueue(args=args, queue="mail", priority=7, **POLICY)
    job = await jobs.store.get_job(added.id)
    assert job is not None
    assert (job.args, job.queue, job.task, job.priority, job.created_at) == (args, "mail", TASK, 7, added.created_at)
    assert {name: (await jobs.row(added.id))[name] for name in POLICY} == POLICY


async def test_a_job_without_a_policy_leaves_it_open(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    row = await jobs.row(added.id)
    assert [row[name] for name in POLICY] == [None] * len(POLICY)


async def test_ids_are_version_7_and_in_the_order_of_the_input(jobs: Jobs) -> None:
    ids = [answer.id for answer in [*await jobs.enqueue(1000), *await jobs.enqueue(1000)]]
    assert ids == sorted(ids)
    assert len(set(ids)) == 2000
    assert {(job_id.version, job_id.variant) for job_id in ids} == {(7, RFC_4122)}


async def test_an_id_starts_with_the_moment_it_was_made(jobs: Jobs) -> None:
    (row,) = await jobs.fetch("""
        select min(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint - t) as low, max(t) as high
        from (select clarion.new_id() as id, (extract(epoch from clock_timestamp()) * 1000)::bigint as t
              from generate_series(1, 1000)) as made
    """)
    assert -20 <= row["low"] <= 20


async def test_the_floor_of_a_moment_is_below_every_id_made_from_then_on(jobs: Jobs) -> None:
    (row,) = await jobs.fetch("""
        select count(*) filter (where clarion.id_floor(before) > id) as wrong
        from (select clock_timestamp() as before, clarion.new_id() as id from generate_series(1, 5000)) as made
    """)
    assert row["wrong"] == 0


@pytest.mark.parametrize("moment", ["0001-01-01Z", "1969-12-31Z", "1970-01-01Z", "9999-12-31Z"])
async def test_every_moment_has_a_floor(jobs: Jobs, moment: str) -> None:
    (row,) = await jobs.fetch("select clarion.id_floor($1::text::timestamptz) as id", moment)
    assert (row["id"].version, row["id"].int >> 80 == 0) == (7, moment < "1970-01-02")


async def test_a_date_in_the_past_jumps_no_line(jobs: Jobs) -> None:
    (first,) = await jobs.enqueue()
    (second,) = await jobs.enqueue(run_at=datetime(2020, 1, 1, tzinfo=UTC))
    assert second.state == "ready"
    assert [lease.id for lease in await jobs.claim(2)] == [first.id, second.id]


async def test_a_date_and_a_delay_schedule_at_the_later_of_the_two(jobs: Jobs) -> None:
    near, far = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) + timedelta(hours=3)
    (by_delay,) = await jobs.enqueue(run_at=near, delay_seconds=7200.0)
    (by_date,) = await jobs.enqueue(run_at=far, delay_seconds=7200.0)
    assert timedelta(seconds=7199) < by_delay.run_at - by_delay.created_at < timedelta(seconds=7201)
    assert by_date.run_at == far
    assert {by_date.state, by_delay.state} == {"scheduled"}


@pytest.mark.parametrize(
    "options",
    [
        {"args": "not JSON"},
        {"args": '{"a": "\ud800"}'},
        {"queue": "a\x00b"},
        {"priority": 40_000},
        {"delay_seconds": 1e10},
        {"delay_seconds": float("nan")},
        {"delay_seconds": float("inf")},
        {"run_at": datetime(2300, 1, 1, tzinfo=UTC)},
        {"max_attempts": 100_000},
        {"timeout_seconds": 1e300},
    ],
)
async def test_a_value_that_postgres_refuses_undoes_the_whole_set(jobs: Jobs, options: dict[str, object]) -> None:
    poison = NewJob(task=TASK, **options)  # type: ignore[arg-type]  # any field
    with pytest.raises(Unstorable):
        await jobs.store.enqueue_jobs([NewJob(task=TASK), poison, NewJob(task=TASK)])
    assert not await jobs.fetch("select from clarion.jobs")


# -- Promotion


async def test_a_scheduled_job_becomes_ready_when_due_and_not_before(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(delay_seconds=3600.0)
    assert await jobs.store.promote_jobs() == {}
    assert not await jobs.claim()
    await jobs.age(added.id, 3601)
    assert amounts(await jobs.store.promote_jobs()) == {"default": 1}
    assert await jobs.store.promote_jobs() == {}
    assert [lease.id for lease in await jobs.claim()] == [added.id]


async def test_promotion_says_how_many_became_ready_in_each_queue(jobs: Jobs) -> None:
    for queue, count in (("a", 3), ("b", 2), ("c", 1)):
        await jobs.enqueue(count, queue=queue, delay_seconds=60.0)
    await jobs.fetch("update clarion.jobs set run_at = now() - interval '1 s' where queue <> 'c'")
    assert amounts(await jobs.store.promote_jobs()) == {"a": 3, "b": 2}


async def test_promotion_does_not_lose_a_place_in_line(jobs: Jobs) -> None:
    (early,) = await jobs.enqueue(delay_seconds=60.0)
    await jobs.age(early.id, 120)
    (later,) = await jobs.enqueue()
    await jobs.store.promote_jobs()
    assert [lease.id for lease in await jobs.claim(2)] == [early.id, later.id]


async def test_promotion_takes_the_longest_due_first_and_keeps_to_its_limit(jobs: Jobs) -> None:
    due = [(await jobs.enqueue(delay_seconds=60.0 + n))[0].id for n in range(8)]
    await jobs.fetch("update clarion.jobs set run_at = run_at - interval '1 hour'")
    limited = jobs.limited_to(5)
    assert amounts(await limited.promote_jobs()) == {"default": 5}
    rows = await jobs.fetch("select id from clarion.jobs where state = 'ready'")
    assert {row["id"] for row in rows} == set(due[:5])
    assert amounts(await limited.promote_jobs()) == {"default": 3}


async def test_promotion_skips_what_another_session_has_locked(jobs: Jobs) -> None:
    locked, free = [(await jobs.enqueue(delay_seconds=60.0))[0].id for _ in range(2)]
    await jobs.fetch("update clarion.jobs set run_at = now() - interval '1 s'")
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked)
        assert amounts(await jobs.store.promote_jobs()) == {"default": 1}
        assert (await jobs.state(locked), await jobs.state(free)) == ("scheduled", "ready")


async def test_two_sessions_promote_each_job_once(jobs: Jobs) -> None:
    await jobs.enqueue(10, delay_seconds=60.0)
    await jobs.fetch("update clarion.jobs set run_at = now() - interval '1 s'")
    async with jobs.session() as other:
        assert amounts(await jobs.limited_to(4, other).promote_jobs()) == {"default": 4}
        assert amounts(await jobs.store.promote_jobs()) == {"default": 6}
        await other.commit()
    assert await jobs.store.promote_jobs() == {}


async def test_the_next_due_time_is_that_of_the_first_scheduled_job(jobs: Jobs) -> None:
    assert await jobs.store.next_due_seconds() is None
    await jobs.enqueue()
    assert await jobs.store.next_due_seconds() is None
    await jobs.enqueue(delay_seconds=100.0)
    (soon,) = await jobs.enqueue(delay_seconds=50.0)
    seconds = await jobs.store.next_due_seconds()
    assert seconds is not None
    assert 40 < seconds <= 50
    await jobs.age(soon.id, 60)
    seconds = await jobs.store.next_due_seconds()
    assert seconds is not None
    assert -30 < seconds < 0
