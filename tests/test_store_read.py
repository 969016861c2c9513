"""Looking at jobs: one, a page of many, and those that are finished; live or in the history alike."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from clarion.db import Database
from clarion.execution import Completion
from clarion.job import FINAL, DeadReason, Job, JobFilter, JobState, JobSummary, NewJob
from clarion.settings import Settings
from store_actions import EVERY_OPTION, TASK, Jobs, failure


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def one_of_each(jobs: Jobs) -> dict[JobState, UUID]:
    """A job in every state."""
    found = {}
    for ending, state in (("complete", JobState.SUCCEEDED), ("fail", JobState.DEAD), ("", JobState.RUNNING)):
        lease = await jobs.run(max_attempts=1)
        await jobs.attempt(ending or "heartbeat", lease)
        found[state] = lease.id
    found[JobState.READY] = (await jobs.enqueue())[0].id
    found[JobState.SCHEDULED] = (await jobs.enqueue(delay_seconds=60.0))[0].id
    found[JobState.CANCELLED] = (await jobs.enqueue())[0].id
    await jobs.cancel(found[JobState.CANCELLED])
    return found


async def listed(jobs: Jobs, *, limit: int = 100, **where: object) -> list[UUID]:
    return [job.id for job in await jobs.store.list_jobs(JobFilter(**where), limit=limit)]  # type: ignore[arg-type]


# -- One job


async def test_a_job_is_found_whatever_its_state(jobs: Jobs) -> None:
    found = await one_of_each(jobs)
    assert found.keys() == set(JobState)
    for state, job_id in found.items():
        job = await jobs.store.get_job(job_id)
        assert job is not None
        assert (job.id, job.state, job.task, job.args) == (job_id, state, TASK, "{}")
        assert (job.finished_at is not None) == (state in FINAL)


async def test_an_unknown_job_is_not_found(jobs: Jobs) -> None:
    await jobs.enqueue()
    assert await jobs.store.get_job(uuid4()) is None


async def test_a_job_shows_the_error_of_its_latest_attempt(jobs: Jobs) -> None:
    lease = await jobs.run()
    for message in ("first", "second"):
        await jobs.store.fail_jobs([failure(lease, error_message=message, retry_in_seconds=0.0)])
        await jobs.make_due(lease.id)
        (lease,) = await jobs.claim()
    await jobs.attempt("snooze", lease)  # ends without an error
    await jobs.make_due(lease.id)
    (lease,) = await jobs.claim()
    for state in ("running", "succeeded"):
        job = await jobs.store.get_job(lease.id)
        assert job is not None
        assert (job.state, job.error_type, job.error_message, job.errors) == (state, "Oops", "second", 2)
        await jobs.attempt("complete", lease)


async def test_a_dead_job_says_why(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.store.fail_jobs([failure(lease, dead_reason=DeadReason.NOT_RETRYABLE)])
    job = await jobs.store.get_job(lease.id)
    assert job is not None
    assert (job.state, job.dead_reason) == ("dead", "not_retryable")


async def test_a_list_shows_of_a_job_what_looking_at_it_shows(jobs: Jobs) -> None:
    for job_id in (await one_of_each(jobs)).values():
        job = await jobs.store.get_job(job_id)
        (summary,) = [item for item in await jobs.store.list_jobs(JobFilter(), limit=10) if item.id == job_id]
        assert type(job) is Job
        assert type(summary) is JobSummary
        assert {name: getattr(summary, name) for name in JobSummary.__struct_fields__} == {
            name: getattr(job, name) for name in JobSummary.__struct_fields__
        }


async def test_a_job_shows_what_was_asked_for_and_what_its_handler_said(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION)
    await jobs.wear(added.id)
    job = await jobs.job(added.id)
    asked = {**EVERY_OPTION}
    for unseen in ("start_within_seconds", "backoff_seconds", "backoff_cap_seconds"):
        asked.pop(unseen)
    assert {name: getattr(job, name) for name in asked} == asked
    assert (job.generation, job.log_lines, job.error_type) == (2, 4, "Oops")
    assert (job.progress, job.checkpoint) == ('{"current": 1}', '{"at": 1}')
    assert (job.start_by, job.finish_by) == (
        added.run_at + timedelta(seconds=60), added.run_at + timedelta(seconds=600),
    )  # fmt: skip


async def test_a_job_from_the_api_for_nobody_by_name_says_so(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    job = await jobs.job(added.id)
    assert (job.enqueued_by, job.generation, job.log_lines, job.cancel_requested_at) == (None, 1, 0, None)


# -- Attempts and events


async def test_the_attempts_of_a_job_are_listed_in_order_up_to_the_one_that_runs(jobs: Jobs) -> None:
    lease = await jobs.run()
    for ending in ("fail", "snooze", "release"):
        await jobs.attempt(ending, lease)
        await jobs.make_due(lease.id)
        (lease,) = await jobs.claim()
    lease = await jobs.lose(lease)
    attempts = await jobs.store.list_attempts(lease.id)
    assert [(item.attempt, item.outcome, item.state) for item in attempts] == [
        (1, "failed", "scheduled"), (2, "snoozed", "scheduled"), (2, "released", "ready"),
        (2, "lease_lost", "ready"), (3, None, "running"),
    ]  # fmt: skip
    assert [item.reaped for item in attempts] == [False, False, False, True, False]
    assert (attempts[0].error_type, attempts[0].error_message, attempts[3].error_type) == (
        "Oops",
        "no luck",
        "LeaseLost",
    )
    running = attempts[-1]
    assert (running.ended_at, running.next_run_at, running.started_at) == (None, None, lease.started_at)
    assert running.worker_id is not None
    assert attempts[0].next_run_at is not None
    await jobs.attempt("complete", lease)
    done = (await jobs.store.list_attempts(lease.id))[-1]
    assert (done.outcome, done.state, done.attempt, done.started_at) == ("succeeded", "succeeded", 3, lease.started_at)
    assert done.ended_at == (await jobs.job(lease.id)).finished_at


@pytest.mark.parametrize("ending", ["fail", "release", "complete", "reap"])
async def test_a_job_whose_cancellation_was_requested_lists_each_attempt_once(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    if ending == "reap":
        await jobs.expire(lease.id)
        await jobs.store.reap_jobs()
    else:
        await jobs.attempt(ending, lease)
    (attempt,) = await jobs.store.list_attempts(lease.id)
    assert attempt.state == ("succeeded" if ending == "complete" else "cancelled")


async def test_what_never_ran_has_no_attempts_and_no_events(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    for job_id in (added.id, uuid4()):
        assert await jobs.store.list_attempts(job_id) == []
        assert await jobs.store.list_events(job_id) == []


async def test_the_events_of_a_job_are_its_own_and_in_order(jobs: Jobs) -> None:
    (added,), (other,) = await jobs.enqueue(), await jobs.enqueue()
    await jobs.change(added.id, delay_seconds=60.0)
    await jobs.cancel(other.id)
    await jobs.retry(added.id)
    await jobs.cancel(added.id)
    await jobs.retry(added.id)
    events = await jobs.store.list_events(added.id)
    assert [(item.event, item.state, item.generation) for item in events] == [
        ("changed", "scheduled", 1), ("retried", "ready", 1), ("cancelled", "cancelled", 1), ("retried", "ready", 2),
    ]  # fmt: skip
    assert [item.at for item in events] == sorted(item.at for item in events)


# -- States


async def test_the_states_of_many_jobs_are_found_wherever_they_live(jobs: Jobs) -> None:
    found = await one_of_each(jobs)
    states = await jobs.store.find_states([uuid4(), *found.values()])
    assert states == {job_id: state for state, job_id in found.items()}
    assert await jobs.store.find_states([]) == {}


# -- Lists


async def test_a_list_is_newest_first_over_live_jobs_and_history(jobs: Jobs) -> None:
    await jobs.enqueue(9)
    line = await jobs.claim(9)
    for lease in line[::3]:
        await jobs.store.complete_jobs([Completion(lease.id, lease.token)])
    assert await listed(jobs) == [lease.id for lease in reversed(line)]


@pytest.mark.parametrize("limit", [1, 2, 5, 11])
async def test_pages_join_to_the_whole_list(jobs: Jobs, limit: int) -> None:
    await jobs.enqueue(11)
    for lease in (await jobs.claim(11))[1::2]:
        await jobs.attempt("complete", lease)
    pages, before = [], None
    while page := await listed(jobs, limit=limit, before_id=before):
        assert len(page) <= limit
        pages += page
        before = page[-1]
    assert pages == await listed(jobs)
    assert len(pages) == 11


@pytest.mark.parametrize("state", JobState)
async def test_a_list_by_state(jobs: Jobs, state: JobState) -> None:
    found = await one_of_each(jobs)
    assert await listed(jobs, state=state) == [found[state]]


async def test_a_list_by_queue_and_task(jobs: Jobs) -> None:
    new = [NewJob(task=task, queue=queue) for task in ("a", "b") for queue in ("x", "y")]
    ids = [added.id for added in await jobs.store.enqueue_jobs(new)]
    assert await listed(jobs, queue="x") == [ids[2], ids[0]]
    assert await listed(jobs, task="a") == [ids[1], ids[0]]
    assert await listed(jobs, task="b", queue="y") == [ids[3]]
    assert await listed(jobs, task="b", queue="y", state=JobState.RUNNING) == []


async def test_a_list_by_moment_includes_its_start_and_excludes_its_end(jobs: Jobs) -> None:
    added = [(await jobs.enqueue())[0] for _ in range(50)]
    for index, answer in enumerate(added):
        assert len(await listed(jobs, created_after=answer.created_at)) == 50 - index
        assert len(await listed(jobs, created_before=answer.created_at)) == index


@pytest.mark.parametrize("year", [1, 1900, 1970, 9999])
async def test_no_moment_breaks_a_list(jobs: Jobs, year: int) -> None:
    await jobs.enqueue(3)
    moment = datetime(year, 1, 1, tzinfo=UTC)
    assert len(await listed(jobs, created_after=moment)) == (0 if year == 9999 else 3)
    assert len(await listed(jobs, created_before=moment)) == (3 if year == 9999 else 0)


# -- Finished


async def test_finished_are_those_that_will_not_run_again(jobs: Jobs) -> None:
    found = await one_of_each(jobs)
    unknown = uuid4()
    finished = await jobs.store.find_finished([*found.values(), unknown])
    assert finished == {unknown, *(found[state] for state in FINAL)}


async def test_nothing_is_finished_of_nothing(jobs: Jobs) -> None:
    await one_of_each(jobs)
    assert await jobs.store.find_finished([]) == set()


async def test_a_job_asked_about_twice_is_answered_once(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    gone = uuid4()
    assert await jobs.store.find_finished([gone, added.id, gone]) == {gone}


async def test_many_can_be_asked_about_at_once(jobs: Jobs) -> None:
    added = [answer.id for answer in await jobs.enqueue(1000)]
    gone = [uuid4() for _ in range(9000)]
    assert await jobs.store.find_finished([*added, *gone]) == set(gone)
