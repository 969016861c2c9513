"""Jobs that must begin or end by a moment: no attempt begins too late or lasts too long, and waiting in vain ends."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.execution import Ended, Lease, Snoozing
from clarion.job import Expired, NewJob
from clarion.settings import Settings
from store_actions import TASK, Jobs, beat, failure

MINUTE = timedelta(minutes=1)
# Each of the two deadlines, a minute after the job is due, and why a job that misses it is dead.
DEADLINES = [("start_within_seconds", "expired"), ("total_timeout_seconds", "total_timeout")]


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def seconds_left(jobs: Jobs, job_id: UUID) -> float:
    (row,) = await jobs.fetch(
        "select extract(epoch from lease_expires_at - clock_timestamp())::float8 as s from clarion.jobs where id = $1",
        job_id,
    )
    return float(row["s"])


async def extend(jobs: Jobs, lease: Lease, lease_seconds: float = 1000) -> float:
    (answer,) = await jobs.store.heartbeat_jobs([beat(lease, lease_seconds=lease_seconds)])
    assert answer.extended
    return answer.lease_seconds


# -- From when they count


@pytest.mark.parametrize("delay_seconds", [None, 3600.0])
async def test_deadlines_count_from_when_the_job_is_due(jobs: Jobs, delay_seconds: float | None) -> None:
    (added,) = await jobs.enqueue(start_within_seconds=60.0, total_timeout_seconds=120.0, delay_seconds=delay_seconds)
    job = await jobs.job(added.id)
    assert (job.start_by, job.finish_by) == (added.run_at + MINUTE, added.run_at + 2 * MINUTE)
    assert job.total_timeout_seconds == 120


async def test_a_start_by_is_a_moment_and_wins_over_a_span(jobs: Jobs) -> None:
    moment = datetime.now(UTC) + timedelta(days=1)
    (added,) = await jobs.enqueue(start_by=moment, start_within_seconds=60.0)
    assert (await jobs.job(added.id)).start_by == moment


@pytest.mark.parametrize(
    "options",
    [
        {"start_by": datetime(2400, 1, 1, tzinfo=UTC)},
        {"start_within_seconds": float("nan")},
        {"total_timeout_seconds": float("inf")},
        {"total_timeout_seconds": 2e9},
    ],
)
async def test_a_deadline_past_all_sense_is_refused(jobs: Jobs, options: dict[str, Any]) -> None:
    with pytest.raises(Unstorable):
        await jobs.enqueue(**options)
    assert not await jobs.fetch("select from clarion.jobs")


# -- Claims


@pytest.mark.parametrize(("deadline", "_reason"), DEADLINES)
async def test_no_claim_takes_a_job_that_is_too_late(jobs: Jobs, deadline: str, _reason: str) -> None:
    options: dict[str, Any] = {deadline: 60.0}
    late, early = [(await jobs.enqueue(**options))[0].id for _ in range(2)]
    await jobs.age(late, 61)
    before = await jobs.row(late)
    assert [lease.id for lease in await jobs.claim(2)] == [early]
    assert await jobs.row(late) == before
    assert await jobs.store.claim_for(jobs.worker_id, {"default": 9}, None, lease_seconds=30) == []


async def test_late_jobs_at_the_head_of_the_line_hide_nobody(jobs: Jobs) -> None:
    late = [(await jobs.enqueue(start_within_seconds=60.0))[0].id for _ in range(5)]
    for job_id in late:
        await jobs.age(job_id, 61)
    (behind,) = await jobs.enqueue()
    assert [lease.id for lease in await jobs.claim(1)] == [behind.id]


async def test_an_attempt_has_what_is_left_of_the_total_timeout(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=50.0, total_timeout_seconds=60.0)
    assert lease.timeout_seconds == 50
    await jobs.attempt("release", lease)
    await jobs.age(lease.id, 40)
    (lease,) = await jobs.claim()
    assert lease.timeout_seconds == pytest.approx(20, abs=1)
    assert (await jobs.job(lease.id)).timeout_seconds == 50


async def test_the_total_timeout_is_the_attempts_where_there_is_no_other(jobs: Jobs) -> None:
    lease = await jobs.run(total_timeout_seconds=60.0)
    assert lease.timeout_seconds == pytest.approx(60, abs=1)
    assert (await jobs.job(lease.id)).timeout_seconds is None


@pytest.mark.parametrize("options", [{}, {"start_within_seconds": 60.0}])
async def test_without_a_timeout_an_attempt_has_none(jobs: Jobs, options: dict[str, Any]) -> None:
    assert (await jobs.run(**options)).timeout_seconds is None


# -- Leases


async def test_no_lease_lasts_past_the_total_timeout_and_a_grace(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(total_timeout_seconds=60.0)
    (lease,) = await jobs.claim(lease_seconds=1000)
    assert await seconds_left(jobs, added.id) == pytest.approx(65, abs=1)
    await jobs.age(lease.id, 30)
    assert await extend(jobs, lease) == pytest.approx(35, abs=1)


@pytest.mark.parametrize(("timeout", "total", "left"), [(20.0, 60.0, 25), (60.0, 20.0, 25)])
async def test_the_nearer_deadline_counts(jobs: Jobs, timeout: float, total: float, left: float) -> None:
    lease = await jobs.run(timeout_seconds=timeout, total_timeout_seconds=total)
    assert await extend(jobs, lease) == pytest.approx(left, abs=1)


async def test_a_start_by_bounds_no_lease(jobs: Jobs) -> None:
    lease = await jobs.run(start_within_seconds=60.0)
    await jobs.age(lease.id, 120)
    assert await extend(jobs, lease) == pytest.approx(1000, abs=1)


async def test_what_outlives_the_total_timeout_is_reaped_as_timed_out(jobs: Jobs) -> None:
    lease = await jobs.run(total_timeout_seconds=60.0)
    await jobs.age(lease.id, 60)
    await extend(jobs, lease)
    await jobs.age(lease.id, 6)
    (reaped,) = await jobs.reaper.reap_jobs()
    assert (reaped.state, reaped.timed_out) == ("dead", True)
    job = await jobs.job(lease.id)
    assert (job.dead_reason, job.errors, job.crashes, job.error_type) == ("total_timeout", 1, 0, "AttemptTimeout")
    (row,) = await jobs.attempts(lease.id)
    assert (row["outcome"], row["state"], row["next_run_at"]) == ("timeout", "dead", None)


async def test_an_attempt_that_outlives_its_own_timeout_may_be_tried_again(jobs: Jobs) -> None:
    lease = await jobs.run(timeout_seconds=50.0, total_timeout_seconds=600.0)
    await jobs.age(lease.id, 50)
    await extend(jobs, lease)
    await jobs.age(lease.id, 6)
    (reaped,) = await jobs.reaper.reap_jobs()
    assert (reaped.state, reaped.timed_out) == ("scheduled", True)


async def test_a_crash_before_the_end_of_the_total_timeout_is_a_crash(jobs: Jobs) -> None:
    lease = await jobs.run(total_timeout_seconds=600.0)
    await jobs.expire(lease.id)
    (reaped,) = await jobs.store.reap_jobs()
    assert (reaped.state, reaped.timed_out) == ("ready", False)


# -- Failures


@pytest.mark.parametrize(("retry_in", "state"), [(50.0, "scheduled"), (70.0, "dead")])
async def test_a_run_past_the_total_timeout_is_not_planned(jobs: Jobs, retry_in: float, state: str) -> None:
    lease = await jobs.run(total_timeout_seconds=60.0)
    (answer,) = await jobs.store.fail_jobs([failure(lease, retry_in_seconds=retry_in)])
    assert (answer.state, answer.next_run_at is None) == (state, state == "dead")
    job = await jobs.job(lease.id)
    assert (job.state, job.dead_reason) == (state, "total_timeout" if state == "dead" else None)
    (row,) = await jobs.attempts(lease.id)
    assert (row["state"], row["next_run_at"]) == (state, answer.next_run_at)


async def test_the_tries_are_named_before_the_total_timeout(jobs: Jobs) -> None:
    lease = await jobs.run(total_timeout_seconds=60.0, max_attempts=1)
    await jobs.store.fail_jobs([failure(lease, retry_in_seconds=70.0)])
    assert (await jobs.job(lease.id)).dead_reason == "attempts_exhausted"


async def test_a_start_by_kills_nothing_that_has_run(jobs: Jobs) -> None:
    lease = await jobs.run(start_within_seconds=60.0)
    await jobs.age(lease.id, 600)
    assert await jobs.attempt("fail", lease) == "scheduled"


# -- Expiry


@pytest.mark.parametrize("delay_seconds", [None, 600.0])
@pytest.mark.parametrize(("deadline", "reason"), DEADLINES)
async def test_a_job_that_waits_past_its_deadline_is_dead(
    jobs: Jobs, deadline: str, reason: str, delay_seconds: float | None
) -> None:
    options: dict[str, Any] = {deadline: 60.0, "delay_seconds": delay_seconds, "queue": "mail"}
    (added,) = await jobs.enqueue(**options)
    await jobs.age(added.id, (delay_seconds or 0) + 59)
    assert await jobs.store.expire_jobs() == []
    await jobs.age(added.id, 2)
    assert await jobs.store.expire_jobs() == [Expired(added.id, "mail", TASK, reason)]
    job = await jobs.job(added.id)
    assert (job.state, job.dead_reason, job.attempt, job.finished_at is None) == ("dead", reason, 0, False)
    assert await jobs.store.list_attempts(added.id) == []
    (event,) = await jobs.store.list_events(added.id)
    assert (event.event, event.actor, event.state, event.detail) == ("expired", "scheduler", "dead", reason)
    assert await jobs.store.expire_jobs() == []


async def test_a_job_without_deadlines_waits_for_ever(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    await jobs.age(added.id, 1e7)
    assert await jobs.store.expire_jobs() == []
    assert len(await jobs.claim()) == 1


@pytest.mark.parametrize("ending", ["release", "fail", "snooze"])
async def test_a_start_by_is_kept_by_the_first_attempt_for_all(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run(start_within_seconds=60.0)
    await jobs.attempt(ending, lease)
    await jobs.age(lease.id, 600)
    assert await jobs.store.expire_jobs() == []
    await jobs.make_due(lease.id)
    assert [again.id for again in await jobs.claim()] == [lease.id]


@pytest.mark.parametrize("ending", ["release", "fail", "snooze"])
async def test_a_total_timeout_counts_over_all_attempts(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run(total_timeout_seconds=300.0)
    await jobs.attempt(ending, lease)
    await jobs.age(lease.id, 301)
    assert [expired.reason for expired in await jobs.store.expire_jobs()] == ["total_timeout"]
    job = await jobs.job(lease.id)
    assert (job.state, job.errors) == ("dead", int(ending == "fail"))


async def test_a_running_job_is_left_to_its_worker(jobs: Jobs) -> None:
    lease = await jobs.run(total_timeout_seconds=60.0, start_within_seconds=60.0)
    await jobs.age(lease.id, 600)
    assert await jobs.store.expire_jobs() == []
    assert await jobs.attempt("complete", lease) == "succeeded"


async def test_expiry_takes_the_latest_first_and_keeps_to_its_limit(jobs: Jobs) -> None:
    late = [(await jobs.enqueue(start_within_seconds=60.0 - n))[0].id for n in range(5)]
    for job_id in late:
        await jobs.age(job_id, 61)
    limited = jobs.limited_to(3)
    assert {expired.id for expired in await limited.expire_jobs()} == set(late[2:])
    assert {expired.id for expired in await limited.expire_jobs()} == set(late[:2])
    assert await limited.expire_jobs() == []


async def test_expiry_skips_what_another_session_has_locked(jobs: Jobs) -> None:
    locked, free = [(await jobs.enqueue(start_within_seconds=60.0))[0].id for _ in range(2)]
    for job_id in (locked, free):
        await jobs.age(job_id, 61)
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked)
        assert [expired.id for expired in await jobs.store.expire_jobs()] == [free]
        await other.rollback()
    assert [expired.id for expired in await jobs.store.expire_jobs()] == [locked]


async def test_expiry_does_not_kill_what_is_being_claimed(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    async with jobs.session() as claiming:
        # In time for the claim, whose transaction began before.
        await jobs.fetch("update clarion.jobs set start_by = clock_timestamp()")
        assert await claiming.store.claim_for(jobs.worker_id, {"default": 1}, None, lease_seconds=30)
        assert await jobs.store.expire_jobs() == []
        await claiming.commit()
    assert await jobs.state(added.id) == "running"


async def test_an_expired_job_can_be_run_again(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(start_within_seconds=60.0, total_timeout_seconds=100.0)
    await jobs.age(added.id, 61)
    await jobs.store.expire_jobs()
    await jobs.retry(added.id)
    (lease,) = await jobs.claim()
    assert (lease.id, lease.generation) == (added.id, 2)
    assert lease.timeout_seconds == pytest.approx(100, abs=1)


async def test_a_batch_of_jobs_has_a_deadline_each(jobs: Jobs) -> None:
    new = [NewJob(task=TASK, total_timeout_seconds=60.0 * n or None) for n in range(3)]
    added = await jobs.store.enqueue_jobs(new)
    spans = [finish_by and finish_by - run_at for finish_by, run_at in await deadlines(jobs, added)]
    assert spans == [None, MINUTE, 2 * MINUTE]


async def deadlines(jobs: Jobs, added: Any) -> list[tuple[datetime | None, datetime]]:
    rows = [await jobs.row(answer.id) for answer in added]
    return [(row["finish_by"], row["run_at"]) for row in rows]


# -- Snoozes


async def test_a_job_may_be_snoozed_so_often_and_then_it_is_dead(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=1)
    await jobs.fetch("update clarion.jobs set snoozes = $1::int", jobs.settings.max_snoozes - 1)
    assert await jobs.attempt("snooze", lease) == "scheduled"
    await jobs.make_due(lease.id)
    (lease,) = await jobs.claim()
    for _ in range(2):
        (answer,) = await jobs.store.snooze_jobs([Snoozing(lease.id, lease.token, 60)])
        assert answer == Ended("dead", None)
    job = await jobs.job(lease.id)
    assert (job.dead_reason, job.snoozes, job.attempt, job.errors) == (
        "snoozes_exhausted", jobs.settings.max_snoozes + 1, 0, 0,
    )  # fmt: skip
    assert job.finished_at is not None
    outcomes = [(row["outcome"], row["state"], row["next_run_at"] is None) for row in await jobs.attempts(lease.id)]
    assert outcomes == [("snoozed", "scheduled", False), ("snoozed", "dead", True)]


async def test_a_retry_gives_the_snoozes_back(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.fetch("update clarion.jobs set snoozes = 32767")
    assert await jobs.attempt("snooze", lease) == "dead"
    assert (await jobs.row(lease.id))["snoozes"] == 32767
    await jobs.retry(lease.id)
    (lease,) = await jobs.claim()
    assert await jobs.attempt("snooze", lease) == "scheduled"
