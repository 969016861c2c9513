"""How attempts end: completed, failed, snoozed or released, and what each makes of the job."""

from datetime import timedelta
from uuid import UUID

import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.execution import AttemptOutcome, Completion, Ended, Failure, Lease, Policy, Release, Snoozing
from clarion.job import DeadReason
from clarion.settings import Settings
from recording import amounts
from store_actions import EVERY_OPTION, Jobs, failure


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def wait_seconds(jobs: Jobs, job_id: UUID) -> float:
    """How long after the end of its latest attempt the job runs again, as recorded and as stored on the job."""
    (row,) = await jobs.fetch(
        """
        select extract(epoch from a.next_run_at - a.ended_at)::float8 as seconds, a.next_run_at = j.run_at as same
        from clarion.attempts as a join clarion.jobs as j on j.id = a.job_id
        where j.id = $1 order by a.ended_at desc limit 1
        """,
        job_id,
    )
    assert row["same"]
    return float(row["seconds"])


async def completed(jobs: Jobs, *completions: Completion) -> list[str | None]:
    return [answer.state for answer in await jobs.store.complete_jobs(completions)]


async def failed(jobs: Jobs, *failures: Failure) -> list[str | None]:
    return [answer.state for answer in await jobs.store.fail_jobs(failures)]


async def again(jobs: Jobs, lease: Lease) -> Lease:
    """The next attempt of the job, once it is due."""
    await jobs.make_due(lease.id)
    (lease,) = await jobs.claim()
    return lease


# -- Completion


async def test_a_completed_job_moves_to_the_history_whole(jobs: Jobs) -> None:
    lease = await jobs.run(**EVERY_OPTION)
    await jobs.wear(lease.id)
    before = await jobs.row(lease.id)
    assert await completed(jobs, Completion(lease.id, lease.token, '{"b": 1.10, "a": "é"}', "k")) == ["succeeded"]
    assert not await jobs.fetch("select from clarion.jobs")
    (after,) = await jobs.fetch("select * from clarion.job_history")
    # What an attempt left for the next is of no more use.
    new = {"state": "succeeded", "result": '{"b": 1.10, "a": "é"}', "completion_key": "k", "checkpoint": None}
    assert {column: after[column] for column in new} == new
    assert {column for column, value in after.items() if value is None} == {"checkpoint"}
    kept = {*after.keys()} - {*new, "finished_at"}
    assert {column: after[column] for column in kept} == {column: before[column] for column in kept}
    assert after["finished_at"] >= before["started_at"]


async def test_a_job_may_complete_without_a_result(jobs: Jobs) -> None:
    lease = await jobs.run()
    assert await completed(jobs, Completion(lease.id, lease.token)) == ["succeeded"]
    job = await jobs.job(lease.id)
    assert (job.result, job.state) == (None, "succeeded")


async def test_a_clean_success_leaves_no_attempt(jobs: Jobs) -> None:
    await jobs.attempt("complete", await jobs.run())
    assert not await jobs.fetch("select from clarion.attempts")


async def test_completions_are_answered_in_order_and_results_are_not_mixed_up(jobs: Jobs) -> None:
    await jobs.enqueue(50)
    leases = await jobs.claim(50)
    lost = leases[::10]
    for lease in lost:
        await jobs.lose(lease)
    leases.reverse()
    answers = await completed(jobs, *(Completion(item.id, item.token, f'"{item.id}"') for item in leases))
    assert answers == [None if lease in lost else "succeeded" for lease in leases]
    rows = await jobs.fetch("select id, result from clarion.job_history")
    assert len(rows) == 45
    assert all(row["result"] == f'"{row["id"]}"' for row in rows)


# -- Failure


@pytest.mark.parametrize(("errors", "seconds"), [(0, 4), (1, 8), (2, 16), (5, 128), (7, 512)])
async def test_the_backoff_doubles_with_each_error(jobs: Jobs, errors: int, seconds: float) -> None:
    lease = await jobs.run(backoff_seconds=4.0)
    await jobs.fetch("update clarion.jobs set errors = $2::int where id = $1", lease.id, errors)
    await jobs.attempt("fail", lease)
    assert seconds * 0.8 <= await wait_seconds(jobs, lease.id) <= seconds * 1.2 + 0.5


@pytest.mark.parametrize("errors", [10, 100, 32_000])
async def test_the_backoff_ends_at_its_cap(jobs: Jobs, errors: int) -> None:
    lease = await jobs.run(backoff_seconds=4.0, backoff_cap_seconds=100.0)
    await jobs.fetch("update clarion.jobs set errors = $2::int where id = $1", lease.id, errors)
    await jobs.attempt("fail", lease)
    assert 80 <= await wait_seconds(jobs, lease.id) <= 120.5


async def test_the_backoff_counts_errors_and_not_attempts(jobs: Jobs) -> None:
    lease = await jobs.run(backoff_seconds=4.0)
    await jobs.fetch("update clarion.jobs set attempt = 15, snoozes = 9, crashes = 9 where id = $1", lease.id)
    await jobs.attempt("fail", lease)
    assert 3.2 <= await wait_seconds(jobs, lease.id) <= 5.3


async def test_jobs_that_failed_together_do_not_come_back_together(jobs: Jobs) -> None:
    await jobs.enqueue(200, backoff_seconds=1000.0)
    leases = await jobs.claim(200)
    await jobs.store.fail_jobs([failure(lease) for lease in leases])
    waits = [await wait_seconds(jobs, lease.id) for lease in leases]
    assert len(set(waits)) > 190
    assert 800 <= min(waits) < 850
    assert 1150 < max(waits) <= 1200.5


async def test_a_job_without_a_policy_fails_by_the_settings(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("fail", lease)
    usual = jobs.settings.backoff_seconds
    assert usual * 0.8 <= await wait_seconds(jobs, lease.id) <= usual * 1.2 + 0.5
    await jobs.fetch(
        "update clarion.jobs set attempt = $2::int where id = $1", lease.id, jobs.settings.max_attempts - 1
    )
    assert await jobs.attempt("fail", await again(jobs, lease)) == "dead"


async def test_a_failure_may_say_when_to_try_again(jobs: Jobs) -> None:
    lease = await jobs.run()
    assert await failed(jobs, failure(lease, retry_in_seconds=1234.5)) == ["scheduled"]
    assert await wait_seconds(jobs, lease.id) == pytest.approx(1234.5, abs=0.5)
    assert (await jobs.row(lease.id))["errors"] == 1


async def test_a_wish_to_try_again_does_not_lengthen_the_budget(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=1)
    assert await failed(jobs, failure(lease, retry_in_seconds=1.0)) == ["dead"]


async def test_max_attempts_counts_runs_the_first_included(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=3)
    states = []
    for attempt in (1, 2, 3):
        assert lease.attempt == attempt
        states.append(await jobs.attempt("fail", lease))
        if states[-1] == "scheduled":
            lease = await again(jobs, lease)
    assert states == ["scheduled", "scheduled", "dead"]
    row = await jobs.row(lease.id)
    assert (row["attempt"], row["errors"], row["dead_reason"]) == (3, 3, "attempts_exhausted")


async def test_snoozes_and_releases_use_no_attempts_up(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=2)
    for ending in ("snooze", "release", "fail", "snooze", "release"):
        assert await jobs.attempt(ending, lease)
        lease = await again(jobs, lease)
    assert (lease.attempt, lease.errors) == (2, 1)
    assert await jobs.attempt("fail", lease) == "dead"


@pytest.mark.parametrize("reason", DeadReason)
async def test_a_failure_may_be_final_and_says_why(jobs: Jobs, reason: DeadReason) -> None:
    lease = await jobs.run()
    assert await failed(jobs, failure(lease, dead_reason=reason)) == ["dead"]
    row = await jobs.row(lease.id)
    assert (row["state"], row["dead_reason"], row["lease_token"], row["worker_id"]) == ("dead", reason, None, None)
    assert row["died_at"] >= row["started_at"]
    assert not await jobs.claim()
    assert await jobs.store.promote_jobs() == {}


@pytest.mark.parametrize("outcome", [AttemptOutcome.FAILED, AttemptOutcome.TIMEOUT])
async def test_a_failed_attempt_is_recorded(jobs: Jobs, outcome: AttemptOutcome) -> None:
    lease = await jobs.run()
    said = {"error_type": "ValueError", "error_message": "é\n" * 1000, "error_trace": "a trace"}
    await jobs.store.fail_jobs([failure(lease, outcome=outcome, **said)])
    (row,) = await jobs.attempts(lease.id)
    assert {name: row[name] for name in said} == said
    assert (row["outcome"], row["state"], row["attempt"], row["worker_id"], row["lease_token"]) == (
        outcome, "scheduled", 1, jobs.worker_id, lease.token,
    )  # fmt: skip
    assert row["started_at"] == lease.started_at
    assert row["next_run_at"] > row["ended_at"] >= lease.started_at


@pytest.mark.parametrize("ending", ["fail", "snooze", "release", "crash"])
async def test_an_attempt_says_its_generation_and_since_when_the_job_was_ready(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    await jobs.fetch("update clarion.jobs set generation = 4")
    if ending == "crash":
        await jobs.lose(lease)
    else:
        await jobs.attempt(ending, lease)
    (row,) = await jobs.attempts(lease.id)
    assert (row["generation"], row["run_at"], row["attempt"]) == (4, lease.run_at, 1)


async def test_a_job_shows_the_sort_of_its_latest_error(jobs: Jobs) -> None:
    lease = await jobs.run()
    seen = []
    for error_type in ("ValueError", "KeyError"):
        await jobs.store.fail_jobs([failure(lease, error_type=error_type)])
        seen.append((await jobs.job(lease.id)).error_type)
        lease = await again(jobs, lease)
    await jobs.attempt("snooze", lease)
    lease = await again(jobs, lease)
    await jobs.attempt("complete", lease)
    seen.append((await jobs.job(lease.id)).error_type)
    assert seen == ["ValueError", "KeyError", "KeyError"]


async def test_the_attempt_that_killed_the_job_plans_no_other(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=1)
    await jobs.attempt("fail", lease)
    (row,) = await jobs.attempts(lease.id)
    assert (row["state"], row["next_run_at"]) == ("dead", None)


async def test_a_batch_of_failures_is_answered_in_order(jobs: Jobs) -> None:
    leases = [await jobs.run(max_attempts=n % 2 + 1) for n in range(10)]
    lost = leases[5]
    await jobs.lose(lost)
    leases.reverse()
    assert await failed(jobs, *(failure(lease) for lease in leases)) == [
        None if lease == lost else "dead" if lease.max_attempts == 1 else "scheduled" for lease in leases
    ]


# -- Snooze and release


async def test_a_snoozed_job_is_scheduled_and_counted(jobs: Jobs) -> None:
    lease = await jobs.run()
    answers = await jobs.store.snooze_jobs([Snoozing(lease.id, lease.token, 3600)])
    row = await jobs.row(lease.id)
    assert answers == [Ended("scheduled", row["run_at"])]
    assert (row["state"], row["attempt"], row["snoozes"], row["errors"]) == ("scheduled", 0, 1, 0)
    assert await wait_seconds(jobs, lease.id) == pytest.approx(3600, abs=0.5)
    (attempt,) = await jobs.attempts(lease.id)
    assert (attempt["outcome"], attempt["state"], attempt["error_type"]) == ("snoozed", "scheduled", None)


@pytest.mark.parametrize("seconds", [1e10, float("nan"), float("inf")])
async def test_a_snooze_past_all_sense_is_refused_and_changes_nothing(jobs: Jobs, seconds: float) -> None:
    lease = await jobs.run()
    before = await jobs.everything()
    with pytest.raises(Unstorable):
        await jobs.store.snooze_jobs([Snoozing(lease.id, lease.token, seconds)])
    assert await jobs.everything() == before


async def test_released_jobs_are_ready_at_once_and_counted_by_queue(jobs: Jobs) -> None:
    leases = [await jobs.run(queue=queue) for queue in ("a", "b", "b")]
    lost = await jobs.run(queue="a")
    await jobs.lose(lost)
    answers, ready = await jobs.store.release_jobs([Release(item.id, item.token) for item in [lost, *leases]])
    assert [answer.state for answer in answers] == [None, "ready", "ready", "ready"]
    assert amounts(ready) == {"a": 1, "b": 2}
    assert {lease.id for lease in [*await jobs.claim(9, queue="a"), *await jobs.claim(9, queue="b")]} == {
        lease.id for lease in leases
    }


async def test_a_release_repeated_rings_nobody(jobs: Jobs) -> None:
    lease = await jobs.run()
    release = [Release(lease.id, lease.token)]
    answers, ready = await jobs.store.release_jobs(release)
    assert (answers, amounts(ready)) == ([Ended("ready", None)], {"default": 1})
    assert await jobs.store.release_jobs(release) == ([Ended("ready", None)], {})


async def test_a_release_is_recorded_without_an_error(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("release", lease)
    (row,) = await jobs.attempts(lease.id)
    assert (row["outcome"], row["state"], row["error_type"], row["attempt"]) == ("released", "ready", None, 1)


async def test_every_attempt_that_ended_badly_has_a_row_of_its_own(jobs: Jobs) -> None:
    lease = await jobs.run()
    for ending in ("fail", "snooze", "release", "fail"):
        await jobs.attempt(ending, lease)
        lease = await again(jobs, lease)
    await jobs.attempt("complete", lease)
    rows = await jobs.attempts(lease.id)
    assert [row["outcome"] for row in rows] == ["failed", "snoozed", "released", "failed"]
    assert len({row["lease_token"] for row in rows}) == 4


async def test_a_policy_of_the_claim_decides_when_the_job_has_none(jobs: Jobs) -> None:
    await jobs.enqueue()
    (lease,) = await jobs.claim(policy=Policy(max_attempts=2, backoff_seconds=500.0, backoff_cap_seconds=300.0))
    await jobs.attempt("fail", lease)
    assert 240 <= await wait_seconds(jobs, lease.id) <= 360.5
    assert timedelta(0) < (await jobs.row(lease.id))["run_at"] - lease.started_at
    assert await jobs.attempt("fail", await again(jobs, lease)) == "dead"
