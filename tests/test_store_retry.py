"""Running jobs again: dead and cancelled ones in a new generation that starts from nothing, others without a wait."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import msgspec
import pytest

from api_harness import client_of, services_over
from clarion.db import Database
from clarion.errors import Unstorable
from clarion.execution import Lease, ready_by_queue
from clarion.job import DeadReason, Requeued
from clarion.joint_claims import JointClaims, Want
from clarion.settings import Settings
from clarion.store import Store
from recording import RecordingRinger, Rung
from store_actions import ACTOR, EVERY_OPTION, Jobs, failure, line, where

ENDS = ("dead", "cancelled")
# What a new generation starts from.
NOTHING = {
    "attempt": 0, "errors": 0, "crashes": 0, "snoozes": 0, "generation": 3, "dead_reason": None, "died_at": None,
    "start_by": None, "progress": None, "lease_token": None, "worker_id": None, "log_lines": 0,
}  # fmt: skip


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def ended(jobs: Jobs, state: str, **options: object) -> Lease:
    """A job that died of its second attempt, after a crash and a log line; or was cancelled after that."""
    lease = await jobs.lose(await jobs.run(**{"max_attempts": 2} | options))
    await jobs.store.record_logs([line(lease)])
    assert await jobs.attempt("progress", lease)
    assert await jobs.attempt("fail", lease) == "dead"
    if state == "cancelled":
        assert (await jobs.cancel(lease.id)).state == "cancelled"
    return lease


async def retried_seconds_ago(jobs: Jobs, job_id: UUID) -> float:
    """How long before now the job became, or becomes, ready."""
    (row,) = await jobs.fetch(
        "select extract(epoch from clock_timestamp() - run_at)::float8 as s from clarion.jobs where id = $1", job_id
    )
    return float(row["s"])


# -- A new generation


@pytest.mark.parametrize("state", ENDS)
async def test_a_dead_or_cancelled_job_runs_again_at_once(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state)
    assert where(await jobs.retry(lease.id)) == ("ready", "default")
    (again,) = await jobs.claim()
    assert (again.id, again.attempt, again.generation, again.max_attempts) == (lease.id, 1, 2, 2)
    assert await jobs.attempt("complete", again) == "succeeded"
    assert (await jobs.job(lease.id)).generation == 2


@pytest.mark.parametrize("state", ENDS)
async def test_a_new_generation_counts_from_nothing_and_keeps_what_the_job_is(jobs: Jobs, state: str) -> None:
    (added,) = await jobs.enqueue(**EVERY_OPTION)
    await jobs.wear(added.id)
    await jobs.fetch("update clarion.jobs set state = 'dead', dead_reason = 'expired', attempt = 3, died_at = now()")
    before = await jobs.row(added.id)
    if state == "cancelled":
        await jobs.cancel(added.id)
    await jobs.retry(added.id)
    after = await jobs.row(added.id)
    assert {column: after[column] for column in NOTHING} == NOTHING
    made_anew = {*NOTHING, "state", "run_at", "sort_key", "finish_by"}
    kept = {*after.keys()} - made_anew
    assert {column: after[column] for column in kept} == {column: before[column] for column in kept}
    assert {"checkpoint", "error_type", "enqueued_by", "created_at"} <= kept


@pytest.mark.parametrize("state", ENDS)
async def test_the_tries_of_a_new_generation_are_a_whole_budget(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state)
    await jobs.retry(lease.id)
    (again,) = await jobs.claim()
    assert await jobs.attempt("fail", again) == "scheduled"
    await jobs.make_due(lease.id)
    (again,) = await jobs.claim()
    assert again.attempt == 2
    assert await jobs.attempt("fail", again) == "dead"


@pytest.mark.parametrize("state", ENDS)
async def test_the_past_of_the_job_is_kept(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state)
    await jobs.retry(lease.id)
    (again,) = await jobs.claim()
    await jobs.attempt("fail", again)
    attempts = await jobs.store.list_attempts(lease.id)
    assert [(item.generation, item.attempt, item.outcome) for item in attempts] == [
        (1, 1, "lease_lost"), (1, 2, "failed"), (2, 1, "failed"),
    ]  # fmt: skip
    assert [item.message for item in await jobs.store.list_logs(lease.id, after=None, limit=9)] == ["line 1"]
    assert again.checkpoint == '{"at": 1}'
    told = [event for event, _, _ in await jobs.events(lease.id)]
    assert told == [*(["cancelled"] if state == "cancelled" else []), "retried"]


@pytest.mark.parametrize("state", ENDS)
async def test_the_attempts_of_a_generation_that_is_over_get_their_answers(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state)
    await jobs.retry(lease.id)
    before = await jobs.everything()
    assert await jobs.attempt("fail", lease) == "dead"
    assert not await jobs.attempt("complete", lease)
    assert await jobs.everything() == before


@pytest.mark.parametrize("state", ENDS)
async def test_the_total_timeout_begins_again_and_a_start_by_is_over(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state, total_timeout_seconds=100.0, start_within_seconds=50.0)
    if state == "dead":
        await jobs.age(lease.id, 1000)
    else:
        await jobs.fetch("update clarion.job_history set finish_by = finish_by - interval '1000 s'")
    await jobs.retry(lease.id, delay_seconds=60)
    row = await jobs.row(lease.id)
    assert (row["finish_by"] - row["run_at"], row["start_by"]) == (timedelta(seconds=100), None)
    assert await jobs.store.expire_jobs() == []


@pytest.mark.parametrize("state", ENDS)
async def test_the_place_in_line_is_what_an_enqueue_now_would_get(jobs: Jobs, state: str) -> None:
    await jobs.fetch("insert into clarion.queues (name, priority_credit_seconds) values ('slow', 3600)")
    for queue, credit in (("default", 60), ("slow", 3600)):
        lease = await ended(jobs, state, queue=queue, priority=2)
        await jobs.retry(lease.id)
        row = await jobs.row(lease.id)
        assert row["run_at"] - row["sort_key"] == timedelta(seconds=2 * credit)
        assert 0 <= await retried_seconds_ago(jobs, lease.id) < 5


@pytest.mark.parametrize("state", ENDS)
async def test_a_retry_may_be_for_later(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state)
    assert where(await jobs.retry(lease.id, delay_seconds=3600)) == ("scheduled", "default")
    assert await retried_seconds_ago(jobs, lease.id) == pytest.approx(-3600, abs=5)
    assert await jobs.claim() == []
    await jobs.make_due(lease.id)
    assert [again.generation for again in await jobs.claim()] == [2]


async def test_generations_go_on_counting(jobs: Jobs) -> None:
    lease = await ended(jobs, "dead")
    for generation in (2, 3, 4):
        await jobs.retry(lease.id)
        if generation == 3:
            await jobs.cancel(lease.id)
            continue
        (again,) = await jobs.claim()
        assert again.generation == generation
        await jobs.store.fail_jobs([failure(again, dead_reason=DeadReason.NOT_RETRYABLE)])


async def test_the_history_says_who_ran_a_job_again_and_why(jobs: Jobs) -> None:
    lease = await ended(jobs, "dead")
    await jobs.store.retry_jobs([lease.id], [0], actor="api:ada", reason="the disk is larger now")
    (event,) = await jobs.store.list_events(lease.id)
    assert (event.event, event.actor, event.state, event.generation, event.detail) == (
        "retried", "api:ada", "ready", 2, "the disk is larger now",
    )  # fmt: skip


# -- What waits, and what cannot


async def test_a_scheduled_job_runs_now_in_the_same_generation(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("fail", lease)
    assert where(await jobs.retry(lease.id)) == ("ready", "default")
    (again,) = await jobs.claim()
    assert (again.attempt, again.errors, again.generation) == (2, 1, 1)
    assert await jobs.events(lease.id) == [("retried", ACTOR, "ready")]


async def test_a_scheduled_job_may_get_another_wait(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(delay_seconds=7200.0, start_within_seconds=60.0, total_timeout_seconds=600.0)
    before = await jobs.row(added.id)
    assert where(await jobs.retry(added.id, delay_seconds=3600)) == ("scheduled", "default")
    assert await retried_seconds_ago(jobs, added.id) == pytest.approx(-3600, abs=5)
    after = await jobs.row(added.id)
    assert (after["start_by"], after["finish_by"]) == (before["start_by"], before["finish_by"])


async def test_to_a_ready_job_nothing_is_done_and_it_is_answered_where_it_waits(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    before = await jobs.everything()
    for delay_seconds in (0, 60):
        assert await jobs.retry(added.id, delay_seconds=delay_seconds) == Requeued("ready", "default", added.sort_key)
    assert await jobs.everything() == before


async def test_of_a_ready_job_that_is_not_meant_it_is_answered_where_it_waits(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue()
    before = await jobs.everything()
    for others in ({"only_dead": True}, {"generation": 2}):
        answers = await jobs.store.retry_jobs([added.id], [0], actor=ACTOR, **others)
        assert answers == [Requeued(None, "default", added.sort_key)]
    assert await jobs.everything() == before


async def test_a_running_succeeded_or_unknown_job_is_not_run_again(jobs: Jobs) -> None:
    done = await jobs.run()
    await jobs.attempt("complete", done)
    running = await jobs.run()
    before = await jobs.everything()
    for job_id in (running.id, done.id, uuid4()):
        assert where(await jobs.retry(job_id)) == (None, None)
    assert await jobs.everything() == before


async def test_only_dead_jobs_may_be_meant(jobs: Jobs) -> None:
    gone, doomed = await ended(jobs, "cancelled"), await ended(jobs, "dead", queue="mail")
    (waiting,) = await jobs.enqueue(delay_seconds=60.0)
    ids = [gone.id, waiting.id, doomed.id]
    answers = await jobs.store.retry_jobs(ids, [0.0] * 3, actor=ACTOR, only_dead=True)
    assert [where(answer) for answer in answers] == [(None, None), (None, None), ("ready", "mail")]
    assert [await jobs.state(job_id) for job_id in ids] == ["cancelled", "scheduled", "ready"]


async def test_each_job_has_its_own_delay_and_its_answer_in_order(jobs: Jobs) -> None:
    leases = [await ended(jobs, ENDS[n % 2], queue=f"q{n}") for n in range(6)]
    running, unknown = await jobs.run(), uuid4()
    leases.reverse()
    ids = [unknown, *(lease.id for lease in leases), running.id]
    answers = await jobs.store.retry_jobs(ids, [0.0, 0.0, 100.0, 200.0, 0.0, 300.0, 400.0, 0.0], actor=ACTOR)
    assert [answer.state for answer in answers] == [
        None, "ready", "scheduled", "scheduled", "ready", "scheduled", "scheduled", None,
    ]  # fmt: skip
    assert [answer.queue for answer in answers] == [None, "q5", "q4", "q3", "q2", "q1", "q0", None]
    waits = [-await retried_seconds_ago(jobs, lease.id) for lease in leases]
    assert waits == [pytest.approx(seconds, abs=5) for seconds in (0, 100, 200, 0, 300, 400)]
    assert await jobs.store.retry_jobs([], [], actor=ACTOR) == []


async def test_a_job_that_cannot_be_taken_back_stays_where_it_is(jobs: Jobs) -> None:
    lease = await ended(jobs, "cancelled")
    before = await jobs.everything()
    with pytest.raises(Unstorable):
        await jobs.retry(lease.id, delay_seconds=float("nan"))
    assert await jobs.everything() == before


# -- Two at once


@pytest.mark.parametrize("state", ENDS)
async def test_of_two_who_retry_at_once_one_begins_a_generation(jobs: Jobs, state: str) -> None:
    lease = await ended(jobs, state)
    answers: list[Requeued] = []

    async def retry() -> None:
        answers.append(await jobs.retry(lease.id))

    async with jobs.session() as first, anyio.create_task_group() as group:
        assert (await jobs.retry(lease.id, store=first.store)).state == "ready"
        group.start_soon(retry)
        await first.until_it_blocks_another()
        await first.commit()
    # Where the row was locked twice, it is to be rung twice; of a cancelled one there is none yet that could be locked.
    assert [answer.queue for answer in answers] == ["default" if state == "dead" else None]
    assert (await jobs.row(lease.id))["generation"] == 2
    assert (await jobs.events(lease.id)).count(("retried", ACTOR, "ready")) == 1


async def test_of_two_redrives_at_once_the_later_one_tells_too_where_the_job_waits(jobs: Jobs) -> None:
    """It has locked the job, which is ready by then, until its own end."""
    lease = await ended(jobs, "dead")
    answers: list[Requeued] = []

    async def redrive() -> None:
        answers.extend(await jobs.store.retry_jobs([lease.id], [0], actor=ACTOR, only_dead=True))

    async with jobs.session() as first, anyio.create_task_group() as group:
        await first.store.retry_jobs([lease.id], [0], actor=ACTOR, only_dead=True)
        group.start_soon(redrive)
        await first.until_it_blocks_another()
        await first.commit()
    row = await jobs.row(lease.id)
    assert answers == [Requeued(None, "default", row["sort_key"])]
    assert row["generation"] == 2


class Late(Store):
    """Somebody is always faster with a retry."""

    async def retry_jobs(
        self, job_ids: Sequence[UUID], delays_seconds: Sequence[float], **options: Any
    ) -> list[Requeued]:
        await super().retry_jobs(job_ids, delays_seconds, actor="somebody")
        return await super().retry_jobs(job_ids, delays_seconds, **options)


async def test_a_redrive_that_comes_too_late_for_a_job_rings_for_it(jobs: Jobs) -> None:
    await ended(jobs, "dead")
    store = Late(jobs.database, jobs.settings)
    ringer = RecordingRinger(store, jobs.settings)
    services = msgspec.structs.replace(services_over(store, jobs.settings), ringer=ringer)
    async with client_of(services) as http:
        answer = (await http.post("/v1/dead/redrive", json={})).json()
    assert (answer["matched"], answer["redriven"], ringer.heard()) == (1, 0, [Rung({"default": 1})])


async def test_a_ready_job_that_claims_skipped_during_its_retry_is_found_by_the_ring_of_that_retry(jobs: Jobs) -> None:
    (skipped,), (other,) = await jobs.enqueue(), await jobs.enqueue()
    joint = JointClaims(jobs.store, msgspec.structs.replace(jobs.settings, batch_max=1))

    async def take() -> list[UUID]:
        want = Want(worker_id=jobs.worker_id, claim_max={"default": 1}, lease_seconds=30)
        return [lease.id for lease in await joint.claim(None, want)]

    async with jobs.session() as session:
        answer = await jobs.retry(skipped.id, store=session.store)
        assert await take() == [other.id]
        await session.commit()
    assert await take() == []
    joint.expect(ready_by_queue([(answer.queue, answer.sort_key)]))
    assert await take() == [skipped.id]


@pytest.mark.parametrize("state", ENDS)
async def test_batches_that_share_jobs_take_them_in_one_order(jobs: Jobs, state: str) -> None:
    first, *others = sorted([(await ended(jobs, state)).id for _ in range(5)])
    table = "jobs" if state == "dead" else "job_history"

    async def retry() -> None:
        await jobs.store.retry_jobs([*reversed(others), first], [0.0] * 5, actor=ACTOR)

    async with jobs.session() as session, anyio.create_task_group() as group:
        await session.fetch(f"select from clarion.{table} where id = $1 for update", first)
        group.start_soon(retry)
        await session.until_it_blocks_another()
        free = await session.fetch(f"select from clarion.{table} where id <> $1 for update skip locked", first)
        assert len(free) == 4
        await session.rollback()
    assert {await jobs.state(job_id) for job_id in (first, *others)} == {"ready"}
