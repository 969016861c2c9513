"""Cancelling: at once what waits or is dead; what runs by asking its worker, whose success still wins."""

from uuid import UUID, uuid4

import anyio
import pytest

from clarion.db import Database
from clarion.execution import Ended, Release
from clarion.job import Cancelling
from clarion.settings import Settings
from recording import amounts
from store_actions import ACTOR, EVERY_OPTION, VERBS, Jobs, attempt_all, beat, failure

# What the history has no column for, or has anew.
ONLY_LIVE = {"sort_key", "lease_expires_at", "died_at", "dead_reason", "cancel_requested_at", "lease_seconds", "state"}


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def waiting(jobs: Jobs, state: str) -> UUID:
    """A job in this state, which no worker holds."""
    if state == "dead":
        lease = await jobs.run(max_attempts=1, queue="doomed")
        await jobs.attempt("fail", lease)
        return lease.id
    return (await jobs.enqueue(delay_seconds=3600.0 if state == "scheduled" else None))[0].id


# -- What nobody holds


@pytest.mark.parametrize("state", ["scheduled", "ready", "dead"])
async def test_a_job_that_nobody_holds_is_cancelled_at_once(jobs: Jobs, state: str) -> None:
    job_id = await waiting(jobs, state)
    assert await jobs.cancel(job_id) == Cancelling("cancelled", requested=False)
    job = await jobs.job(job_id)
    assert (job.state, job.dead_reason, job.finished_at is None) == ("cancelled", None, False)
    assert not await jobs.fetch("select from clarion.jobs")
    assert await jobs.store.promote_jobs() == {}
    assert await jobs.claim() == []


async def test_a_cancelled_job_moves_to_the_history_whole(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION)
    await jobs.wear(added.id)
    before = await jobs.row(added.id)
    await jobs.cancel(added.id)
    (after,) = await jobs.fetch("select * from clarion.job_history")
    kept = {*before.keys()} - ONLY_LIVE
    assert {column: after[column] for column in kept} == {column: before[column] for column in kept}
    assert (after["state"], after["result"], after["completion_key"]) == ("cancelled", None, None)
    assert after["finished_at"] >= before["created_at"]


async def test_the_history_says_who_cancelled_a_job_and_why(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    await jobs.fetch("update clarion.jobs set generation = 3")
    await jobs.store.cancel_jobs([added.id], actor="api:ada", reason="not needed any more")
    (event,) = await jobs.store.list_events(added.id)
    assert (event.event, event.actor, event.state, event.generation, event.detail) == (
        "cancelled", "api:ada", "cancelled", 3, "not needed any more",
    )  # fmt: skip
    assert event.at >= added.created_at


async def test_a_finished_or_unknown_job_cannot_be_cancelled(jobs: Jobs) -> None:
    done = await jobs.run()
    await jobs.attempt("complete", done)
    gone = (await jobs.enqueue())[0].id
    await jobs.cancel(gone)
    before = await jobs.everything()
    for job_id in (done.id, gone, uuid4()):
        assert await jobs.cancel(job_id) == Cancelling(None, requested=False)
    assert await jobs.everything() == before


async def test_the_answers_are_in_the_order_of_the_question(jobs: Jobs) -> None:
    running = await jobs.run()
    ready, scheduled, dead = [await waiting(jobs, state) for state in ("ready", "scheduled", "dead")]
    unknown = uuid4()
    asked = [unknown, dead, running.id, ready, dead, scheduled]
    answers = await jobs.store.cancel_jobs(asked, actor=ACTOR)
    assert [answer.state for answer in answers] == [None, "cancelled", "running", "cancelled", "cancelled", "cancelled"]
    assert [answer.requested for answer in answers] == [False, False, True, False, False, False]
    assert len(await jobs.events(dead)) == 1
    assert await jobs.store.cancel_jobs([], actor=ACTOR) == []


# -- What runs


async def test_of_a_running_job_the_cancellation_is_requested_once(jobs: Jobs) -> None:
    lease = await jobs.run()
    assert await jobs.cancel(lease.id) == Cancelling("running", requested=True)
    job = await jobs.job(lease.id)
    assert job.cancel_requested_at is not None
    before = await jobs.everything()
    assert await jobs.cancel(lease.id) == Cancelling("running", requested=False)
    assert await jobs.everything() == before
    assert await jobs.events(lease.id) == [("cancel_requested", ACTOR, "running")]


async def test_a_success_that_comes_first_wins(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    for _ in range(2):
        assert await jobs.attempt("complete", lease) == "succeeded"
    job = await jobs.job(lease.id)
    assert (job.state, job.result) == ("succeeded", '{"n": 1}')
    assert await jobs.events(lease.id) == [("cancel_requested", ACTOR, "running")]


@pytest.mark.parametrize("ending", ["fail", "snooze", "release"])
async def test_any_other_end_of_the_attempt_cancels_the_job(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run(max_attempts=1)
    await jobs.cancel(lease.id)
    assert await jobs.attempt(ending, lease) == "cancelled"
    job = await jobs.job(lease.id)
    assert (job.state, job.attempt, job.errors, job.snoozes, job.dead_reason) == ("cancelled", 1, 0, 0, None)
    assert await jobs.events(lease.id) == [
        ("cancel_requested", ACTOR, "running"),
        ("cancelled", f"worker:{jobs.worker_id}", "cancelled"),
    ]
    (row,) = await jobs.attempts(lease.id)
    assert (row["lease_token"], row["state"], row["next_run_at"]) == (lease.token, "cancelled", None)


@pytest.mark.parametrize("ending", ["fail", "snooze", "release"])
async def test_the_same_end_again_is_answered_with_cancelled_and_another_is_refused(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    await jobs.attempt(ending, lease)
    before = await jobs.everything()
    assert await jobs.attempt(ending, lease) == "cancelled"
    for verb in {"complete", "fail", "snooze", "release", "heartbeat", "log"} - {ending}:
        assert not await jobs.attempt(verb, lease)
    assert await jobs.everything() == before


@pytest.mark.parametrize("ending", ["fail", "snooze", "release"])
async def test_an_end_that_stands_twice_in_a_batch_cancels_once(jobs: Jobs, ending: str) -> None:
    lease, other = await jobs.run(), await jobs.run()
    await jobs.cancel(lease.id)
    answers = await attempt_all(jobs.store, ending, [lease, other, lease])
    assert answers[::2] == ["cancelled", "cancelled"]
    assert answers[1] in {"scheduled", "ready"}
    assert len(await jobs.attempts(lease.id)) == 1


async def test_a_cancelled_failure_plans_no_next_run(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    for _ in range(2):
        assert await jobs.store.fail_jobs([failure(lease, retry_in_seconds=1.0)]) == [Ended("cancelled", None)]


async def test_a_cancelled_release_rings_nobody(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    assert await jobs.store.release_jobs([Release(lease.id, lease.token)]) == ([Ended("cancelled", None)], {})


async def test_a_batch_of_cancelled_jobs_and_others_does_not_mix_them_up(jobs: Jobs) -> None:
    leases = [await jobs.run() for _ in range(6)]
    for lease in leases[::2]:
        await jobs.cancel(lease.id)
    answers = await attempt_all(jobs.store, "fail", leases)
    assert answers == ["cancelled", "scheduled"] * 3
    assert [await jobs.state(lease.id) for lease in leases] == answers


# -- Heartbeats, and workers that do not answer


async def test_a_heartbeat_says_that_the_job_is_to_be_cancelled_and_extends_nothing(jobs: Jobs) -> None:
    lease, other = await jobs.run(), await jobs.run()
    await jobs.cancel(lease.id)
    expires_at = (await jobs.row(lease.id))["lease_expires_at"]
    beats = [beat(item, lease_seconds=1000.0) for item in (lease, other)]
    answers = {answer.id: answer for answer in await jobs.store.heartbeat_jobs(beats)}
    assert (answers[lease.id].cancelled, answers[other.id].cancelled) == (True, False)
    assert 25 < answers[lease.id].lease_seconds <= 30
    assert answers[other.id].lease_seconds > 990
    assert (await jobs.row(lease.id))["lease_expires_at"] == expires_at


async def test_what_the_attempt_has_to_say_is_kept_after_the_request_too(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    assert await jobs.attempt("progress", lease)
    assert await jobs.attempt("log", lease)
    job = await jobs.job(lease.id)
    assert (job.progress, job.checkpoint, job.log_lines) == ('{"current": 1}', '{"at": 1}', 1)


async def test_a_row_that_is_locked_says_that_it_is_to_be_cancelled(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", lease.id)
        (answer,) = await jobs.store.heartbeat_jobs([beat(lease)])
    assert (answer.extended, answer.cancelled) == (False, True)


@pytest.mark.parametrize("timed_out", [False, True])
async def test_a_worker_that_never_stops_is_reaped_and_nothing_is_charged(jobs: Jobs, timed_out: bool) -> None:
    lease = await jobs.run(timeout_seconds=10 if timed_out else None, max_attempts=1)
    crashes = jobs.settings.max_crashes - 1
    await jobs.fetch("update clarion.jobs set crashes = $1::int", crashes)
    await jobs.cancel(lease.id)
    await jobs.age(lease.id, 31)
    (reaped,) = await jobs.reaper.reap_jobs()
    assert (reaped.id, reaped.state, reaped.timed_out) == (lease.id, "cancelled", timed_out)
    job = await jobs.job(lease.id)
    assert (job.state, job.crashes, job.errors, job.error_type) == ("cancelled", crashes, 0, None)
    (row,) = await jobs.attempts(lease.id)
    assert (row["outcome"], row["state"], row["reaped"], row["next_run_at"]) == (
        "timeout" if timed_out else "lease_lost", "cancelled", True, None,
    )  # fmt: skip
    assert await jobs.events(lease.id) == [
        ("cancel_requested", ACTOR, "running"),
        ("cancelled", "reaper", "cancelled"),
    ]
    for verb in VERBS:
        assert not await jobs.attempt(verb, lease)


async def test_the_reaper_takes_cancelled_jobs_and_others_in_one_page(jobs: Jobs) -> None:
    leases = [await jobs.run() for _ in range(4)]
    for lease in leases:
        await jobs.expire(lease.id)
    for lease in leases[:2]:
        await jobs.cancel(lease.id)
    reaped = {job.id: job.state for job in await jobs.store.reap_jobs()}
    assert [reaped[lease.id] for lease in leases] == ["cancelled", "cancelled", "ready", "ready"]
    assert [await jobs.state(lease.id) for lease in leases] == ["cancelled", "cancelled", "ready", "ready"]


async def test_a_cancelled_job_of_a_claim_whose_answer_was_lost_is_left_to_the_reaper(jobs: Jobs) -> None:
    cancelled, other = await jobs.run(), await jobs.run()
    await jobs.cancel(cancelled.id)
    assert amounts(await jobs.store.release_unanswered_jobs(jobs.worker_id, [])) == {"default": 1}
    assert (await jobs.state(cancelled.id), await jobs.state(other.id)) == ("running", "ready")
    await jobs.expire(cancelled.id)
    assert [reaped.state for reaped in await jobs.store.reap_jobs()] == ["cancelled"]


async def test_a_row_that_cannot_be_handled_is_parked_though_it_is_to_be_cancelled(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    assert await jobs.store.park_jobs(Release(lease.id, lease.token))
    job = await jobs.job(lease.id)
    assert (job.state, job.dead_reason, job.cancel_requested_at) == ("dead", "unprocessable", None)
    assert (await jobs.events(lease.id))[-1] == ("parked", "reaper", "dead")


# -- Two at once


class Canceller:
    """A second caller, who cancels while a first session holds the row."""

    def __init__(self, jobs: Jobs, job_id: UUID) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self.answers: list[Cancelling] = []

    async def run(self) -> None:
        self.answers.append(await self._jobs.cancel(self._job_id))


async def test_a_success_that_is_being_committed_is_waited_for_and_wins(jobs: Jobs) -> None:
    lease = await jobs.run()
    canceller = Canceller(jobs, lease.id)
    async with jobs.session() as finishing, anyio.create_task_group() as group:
        await jobs.attempt("complete", lease, store=finishing.store)
        group.start_soon(canceller.run)
        await finishing.until_it_blocks_another()
        await finishing.commit()
    assert canceller.answers == [Cancelling(None, requested=False)]
    assert await jobs.state(lease.id) == "succeeded"


@pytest.mark.parametrize(("ending", "state"), [("release", "ready"), ("snooze", "scheduled"), ("fail", "scheduled")])
async def test_what_has_stopped_meanwhile_is_cancelled_at_once(jobs: Jobs, ending: str, state: str) -> None:
    lease = await jobs.run()
    canceller = Canceller(jobs, lease.id)
    async with jobs.session() as finishing, anyio.create_task_group() as group:
        assert await jobs.attempt(ending, lease, store=finishing.store) == state
        group.start_soon(canceller.run)
        await finishing.until_it_blocks_another()
        await finishing.commit()
    assert canceller.answers == [Cancelling("cancelled", requested=False)]
    assert await jobs.attempt(ending, lease) == state


async def test_what_was_claimed_meanwhile_is_asked_for(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    canceller = Canceller(jobs, added.id)
    async with jobs.session() as claiming, anyio.create_task_group() as group:
        (lease,) = await claiming.store.claim_for(jobs.worker_id, {"default": 1}, None, lease_seconds=30)
        group.start_soon(canceller.run)
        await claiming.until_it_blocks_another()
        await claiming.commit()
    assert canceller.answers == [Cancelling("running", requested=True)]
    (answer,) = await jobs.store.heartbeat_jobs([beat(lease)])
    assert answer.cancelled


async def test_of_two_who_ask_at_once_one_requests(jobs: Jobs) -> None:
    lease = await jobs.run()
    canceller = Canceller(jobs, lease.id)
    async with jobs.session() as first, anyio.create_task_group() as group:
        assert (await jobs.cancel(lease.id, store=first.store)).requested
        group.start_soon(canceller.run)
        await first.until_it_blocks_another()
        await first.commit()
    assert canceller.answers == [Cancelling("running", requested=False)]
    assert len(await jobs.events(lease.id)) == 1


async def test_batches_that_share_jobs_take_them_in_one_order(jobs: Jobs) -> None:
    first, *others = [added.id for added in await jobs.enqueue(5)]

    async def cancel() -> None:
        await jobs.store.cancel_jobs([*reversed(others), first], actor=ACTOR)

    async with jobs.session() as session, anyio.create_task_group() as group:
        await session.fetch("select from clarion.jobs where id = $1 for update", first)
        group.start_soon(cancel)
        await session.until_it_blocks_another()
        free = await session.fetch("select from clarion.jobs where id <> $1 for update skip locked", first)
        assert len(free) == 4
        await session.rollback()
    assert not await jobs.fetch("select from clarion.jobs")
