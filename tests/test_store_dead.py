"""Dead letters: listed and paged oldest first, filtered, and grouped by what they died of."""

from datetime import datetime, timedelta
from uuid import UUID

import pytest

from clarion.db import Database
from clarion.job import DeadFilter, DeadReason, JobSummary, NewJob
from clarion.settings import Settings
from store_actions import Jobs, failure


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def kill(
    jobs: Jobs,
    *,
    task: str = "t",
    queue: str = "default",
    error_type: str = "Oops",
    reason: DeadReason = DeadReason.NOT_RETRYABLE,
) -> UUID:
    """A job that died of this, just now."""
    await jobs.store.enqueue_jobs([NewJob(task=task, queue=queue)])
    (lease,) = await jobs.store.claim_for(jobs.worker_id, {queue: 1}, None, lease_seconds=30)
    await jobs.store.fail_jobs([failure(lease, error_type=error_type, dead_reason=reason)])
    return lease.id


async def died_at(jobs: Jobs, job_id: UUID) -> datetime:
    moment: datetime = (await jobs.row(job_id))["died_at"]
    return moment


async def found(jobs: Jobs, *, limit: int = 100, **where: object) -> list[UUID]:
    return [job.id for job in await jobs.store.find_dead(DeadFilter(**where), limit=limit)]  # type: ignore[arg-type]


# -- Lists


async def test_those_that_died_first_are_at_the_head(jobs: Jobs) -> None:
    dead = [await kill(jobs) for _ in range(5)]
    await jobs.fetch("update clarion.jobs set died_at = died_at - interval '1 h' where id = $1", dead[3])
    assert await found(jobs) == [dead[3], *dead[:3], dead[4]]
    assert await found(jobs, limit=2) == [dead[3], dead[0]]


async def test_only_dead_jobs_are_found(jobs: Jobs) -> None:
    await kill(jobs)
    (cancelled,) = await found(jobs)
    await jobs.cancel(cancelled)
    retried = await kill(jobs)
    await jobs.retry(retried)
    await jobs.run(queue="other")
    await jobs.enqueue(delay_seconds=60.0)
    assert await found(jobs) == []


async def test_a_dead_job_is_shown_as_in_every_list(jobs: Jobs) -> None:
    job_id = await kill(jobs)
    (summary,) = await jobs.store.find_dead(DeadFilter(), limit=9)
    job = await jobs.job(job_id)
    assert type(summary) is JobSummary
    assert {name: getattr(summary, name) for name in JobSummary.__struct_fields__} == {
        name: getattr(job, name) for name in JobSummary.__struct_fields__
    }
    assert (summary.dead_reason, summary.error_type) == ("not_retryable", "Oops")
    assert summary.finished_at == await died_at(jobs, job_id)


async def test_dead_jobs_are_filtered_by_what_they_were_and_died_of(jobs: Jobs) -> None:
    plain = await kill(jobs)
    mail = await kill(jobs, queue="mail")
    other_task = await kill(jobs, task="u")
    other_error = await kill(jobs, error_type="KeyError")
    exhausted = await kill(jobs, reason=DeadReason.ATTEMPTS_EXHAUSTED)
    assert await found(jobs, queue="mail") == [mail]
    assert await found(jobs, task="u") == [other_task]
    assert await found(jobs, error_type="KeyError") == [other_error]
    assert await found(jobs, dead_reason=DeadReason.ATTEMPTS_EXHAUSTED) == [exhausted]
    assert await found(jobs, queue="default", task="t", error_type="Oops", dead_reason=DeadReason.NOT_RETRYABLE) == [
        plain
    ]
    assert await found(jobs, queue="mail", task="u") == []


async def test_a_span_of_time_includes_its_start_and_excludes_its_end(jobs: Jobs) -> None:
    dead = [await kill(jobs) for _ in range(4)]
    second, fourth = await died_at(jobs, dead[1]), await died_at(jobs, dead[3])
    assert await found(jobs, died_after=second) == dead[1:]
    assert await found(jobs, died_before=fourth) == dead[:3]
    assert await found(jobs, died_after=second, died_before=fourth) == dead[1:3]
    assert await found(jobs, died_after=fourth + timedelta(seconds=1)) == []


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("at_once", [False, True])
async def test_pages_join_to_the_whole_list(jobs: Jobs, limit: int, at_once: bool) -> None:
    for _ in range(7):
        await kill(jobs)
    if at_once:
        await jobs.fetch("update clarion.jobs set died_at = '2026-01-01Z'")
    pages: list[JobSummary] = []
    after = None
    while page := await jobs.store.find_dead(DeadFilter(after=after, task="t"), limit=limit):
        assert len(page) <= limit
        pages += page
        assert page[-1].finished_at is not None
        after = (page[-1].finished_at, page[-1].id)
    assert [job.id for job in pages] == await found(jobs)
    assert len(pages) == 7


# -- Groups


async def test_the_dead_are_grouped_by_what_they_died_of(jobs: Jobs) -> None:
    keys = [await kill(jobs, error_type="KeyError") for _ in range(3)]
    values = [await kill(jobs, error_type="ValueError") for _ in range(2)]
    (expired,) = await jobs.enqueue(start_within_seconds=60.0)
    await jobs.age(expired.id, 61)
    await jobs.store.expire_jobs()
    groups = await jobs.store.group_dead(queue=None, limit=10)
    assert [(group.task, group.error_type, group.dead_reason, group.jobs, group.latest_id) for group in groups] == [
        ("t", "KeyError", "not_retryable", 3, keys[-1]),
        ("t", "ValueError", "not_retryable", 2, values[-1]),
        ("t", None, "expired", 1, expired.id),
    ]
    assert (groups[0].first_died_at, groups[0].last_died_at) == (
        await died_at(jobs, keys[0]), await died_at(jobs, keys[-1]),
    )  # fmt: skip


async def test_of_groups_of_one_size_the_freshest_is_first_and_the_limit_holds(jobs: Jobs) -> None:
    for error_type in ("A", "B", "C"):
        await kill(jobs, error_type=error_type)
    groups = await jobs.store.group_dead(queue=None, limit=2)
    assert [group.error_type for group in groups] == ["C", "B"]


async def test_one_queue_can_be_grouped_alone(jobs: Jobs) -> None:
    await kill(jobs)
    await kill(jobs, queue="mail")
    (group,) = await jobs.store.group_dead(queue="mail", limit=10)
    assert group.jobs == 1
    assert await jobs.store.group_dead(queue="none", limit=10) == []


async def test_a_job_that_runs_again_leaves_its_group(jobs: Jobs) -> None:
    kept, retried = await kill(jobs), await kill(jobs)
    await jobs.retry(retried)
    (group,) = await jobs.store.group_dead(queue=None, limit=10)
    assert (group.jobs, group.latest_id) == (1, kept)
