"""A token that no longer holds its job changes nothing, whatever it says and whatever became of the job meanwhile."""

from collections.abc import Awaitable, Callable
from itertools import permutations
from uuid import uuid4

import anyio
import pytest

from clarion.db import Database
from clarion.errors import Unstorable
from clarion.execution import AttemptOutcome, Completed, Completion, Ended, Lease, Release, Snoozing
from clarion.job import DeadReason
from clarion.settings import Settings
from recording import amounts
from store_actions import BEATS, ENDINGS, VERBS, Answer, Jobs, attempt_all, failure, with_token


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def taken_back(jobs: Jobs, lease: Lease) -> None:
    await jobs.expire(lease.id)
    await jobs.store.reap_jobs()


async def claimed_by_another(jobs: Jobs, lease: Lease) -> None:
    await jobs.lose(lease)


async def completed_by_another(jobs: Jobs, lease: Lease) -> None:
    await jobs.attempt("complete", await jobs.lose(lease))


async def failed_by_another(jobs: Jobs, lease: Lease) -> None:
    await jobs.attempt("fail", await jobs.lose(lease))


async def killed_by_another(jobs: Jobs, lease: Lease) -> None:
    other = await jobs.lose(lease)
    (ended,) = await jobs.store.fail_jobs([failure(other, dead_reason=DeadReason.NOT_RETRYABLE)])
    assert ended.state == "dead"


async def dead_of_crashes(jobs: Jobs, lease: Lease) -> None:
    await jobs.fetch("update clarion.jobs set crashes = 100 where id = $1", lease.id)
    await taken_back(jobs, lease)
    assert await jobs.state(lease.id) == "dead"


async def pruned(jobs: Jobs, lease: Lease) -> None:
    await jobs.fetch("delete from clarion.jobs where id = $1", lease.id)


FATES = (
    taken_back,
    claimed_by_another,
    completed_by_another,
    failed_by_another,
    killed_by_another,
    dead_of_crashes,
    pruned,
)


@pytest.mark.parametrize("verb", VERBS)
async def test_the_current_token_is_accepted(jobs: Jobs, verb: str) -> None:
    lease = await jobs.run()
    assert await jobs.attempt(verb, lease)


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("verb", VERBS)
async def test_a_stale_token_is_refused_and_changes_nothing(
    jobs: Jobs, verb: str, fate: Callable[[Jobs, Lease], Awaitable[None]]
) -> None:
    lease = await jobs.run()
    await fate(jobs, lease)
    before = await jobs.everything()
    assert not await jobs.attempt(verb, lease)
    assert await jobs.everything() == before


@pytest.mark.parametrize("verb", VERBS)
async def test_a_token_fits_no_other_job(jobs: Jobs, verb: str) -> None:
    one, other = await jobs.run(), await jobs.run()
    before = await jobs.everything()
    assert not await jobs.attempt(verb, with_token(one, other.token))
    assert not await jobs.attempt(verb, with_token(one, uuid4()))
    assert await jobs.everything() == before


@pytest.mark.parametrize("verb", VERBS)
async def test_a_lost_lease_in_a_batch_does_not_harm_its_neighbours(jobs: Jobs, verb: str) -> None:
    held, lost = await jobs.run(), await jobs.run()
    other = await jobs.lose(lost)
    answers = await attempt_all(jobs.store, verb, [lost, held, with_token(held, uuid4())])
    assert [bool(answer) for answer in answers] == [False, True, False]
    assert (await jobs.row(lost.id))["lease_token"] == other.token


@pytest.mark.parametrize(("first", "second"), list(permutations(ENDINGS, 2)))
async def test_an_attempt_ends_in_one_way_only(jobs: Jobs, first: str, second: str) -> None:
    lease = await jobs.run()
    assert await jobs.attempt(first, lease)
    before = await jobs.everything()
    assert not await jobs.attempt(second, lease)
    assert await jobs.everything() == before


@pytest.mark.parametrize("beat", BEATS)
@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ended_attempt_says_nothing_more(jobs: Jobs, ending: str, beat: str) -> None:
    lease = await jobs.run()
    await jobs.attempt(ending, lease)
    before = await jobs.everything()
    assert await jobs.attempt(beat, lease) is None
    assert await jobs.everything() == before


@pytest.mark.parametrize("verb", VERBS)
async def test_an_expired_lease_holds_until_somebody_takes_the_job(jobs: Jobs, verb: str) -> None:
    lease = await jobs.run()
    await jobs.expire(lease.id)
    assert await jobs.attempt(verb, lease)
    # A log line is accepted, but extends nothing.
    assert len(await jobs.store.reap_jobs()) == (verb == "log")


@pytest.mark.parametrize("outcome", [AttemptOutcome.FAILED, AttemptOutcome.TIMEOUT])
async def test_what_the_reaper_ended_is_not_taken_for_the_workers_own_report(
    jobs: Jobs, outcome: AttemptOutcome
) -> None:
    lease = await jobs.run(timeout_seconds=1)
    await jobs.age(lease.id, 10)
    (reaped,) = await jobs.reaper.reap_jobs()
    assert reaped.timed_out
    (answer,) = await jobs.store.fail_jobs([failure(lease, outcome=outcome)])
    assert answer == Ended(None, None)


# -- The same call again


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_repeated_call_gets_the_answer_of_the_first(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    answer = await jobs.attempt(ending, lease)
    before = await jobs.everything()
    assert await jobs.attempt(ending, lease) == answer
    assert await jobs.everything() == before


@pytest.mark.parametrize("then", ["claimed", *ENDINGS])
@pytest.mark.parametrize("ending", ["fail", "snooze", "release"])
async def test_a_repeated_call_gets_its_answer_when_the_job_has_moved_on(jobs: Jobs, ending: str, then: str) -> None:
    lease = await jobs.run()
    answer = await jobs.attempt(ending, lease)
    await jobs.make_due(lease.id)
    (other,) = await jobs.claim()
    await jobs.attempt("heartbeat" if then == "claimed" else then, other)
    before = await jobs.everything()
    assert await jobs.attempt(ending, lease) == answer
    assert await jobs.everything() == before


async def test_a_failure_that_killed_the_job_is_still_answered_with_dead(jobs: Jobs) -> None:
    lease = await jobs.run(max_attempts=1)
    assert await jobs.attempt("fail", lease) == "dead"
    assert await jobs.attempt("fail", lease) == "dead"


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_call_that_stands_twice_in_a_batch_counts_once(jobs: Jobs, ending: str) -> None:
    leases = [await jobs.run(), await jobs.run()]
    answers = await attempt_all(jobs.store, ending, [*leases, *leases, leases[0]])
    assert len(set(answers)) == 1
    assert all(answers)
    (counts,) = await jobs.fetch("""
        select (select count(*) from clarion.job_history) + (select count(*) from clarion.attempts) as endings
    """)
    assert counts["endings"] == 2


async def test_of_two_results_in_a_batch_the_first_is_kept(jobs: Jobs) -> None:
    lease = await jobs.run()
    completions = [Completion(lease.id, lease.token, str(n)) for n in range(5)]
    answers = await jobs.store.complete_jobs(completions)
    assert [(answer.state, answer.replayed) for answer in answers] == [("succeeded", n > 0) for n in range(5)]
    assert [row["result"] for row in await jobs.fetch("select result from clarion.job_history")] == ["0"]


@pytest.mark.parametrize("key", [None, "first"])
@pytest.mark.parametrize("result", [None, '{"n": 1.10}'])
async def test_a_repeated_completion_is_told_what_was_stored_first(
    jobs: Jobs, result: str | None, key: str | None
) -> None:
    lease = await jobs.run()
    (first,) = await jobs.store.complete_jobs([Completion(lease.id, lease.token, result, key)])
    assert first == Completed("succeeded", replayed=False, completion_key=None, result=None)
    for other in (Completion(lease.id, lease.token), Completion(lease.id, lease.token, "2", "second")):
        (again,) = await jobs.store.complete_jobs([other])
        assert again == Completed("succeeded", replayed=True, completion_key=key, result=result)


async def test_a_completion_that_stands_twice_in_a_batch_is_told_what_the_first_stored(jobs: Jobs) -> None:
    lease, other = await jobs.run(), await jobs.run()
    first, plain, again = await jobs.store.complete_jobs(
        [
            Completion(lease.id, lease.token, "1", "first"),
            Completion(other.id, other.token, "2"),
            Completion(lease.id, lease.token, "3", "second"),
        ]
    )
    assert [first.replayed, plain.replayed] == [False, False]
    assert again == Completed("succeeded", replayed=True, completion_key="first", result="1")


async def test_a_lost_completion_is_no_replay(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.lose(lease)
    (answer,) = await jobs.store.complete_jobs([Completion(lease.id, lease.token, "1", "k")])
    assert answer == Completed(None, replayed=False, completion_key=None, result=None)


@pytest.mark.parametrize("ending", ["fail", "snooze"])
async def test_a_repeated_call_is_told_the_next_run_of_the_first(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()

    async def end(seconds: float) -> Ended:
        if ending == "fail":
            (answer,) = await jobs.store.fail_jobs([failure(lease, retry_in_seconds=seconds)])
        else:
            (answer,) = await jobs.store.snooze_jobs([Snoozing(lease.id, lease.token, seconds)])
        return answer

    first = await end(100)
    assert first == Ended("scheduled", (await jobs.row(lease.id))["run_at"])
    assert await end(5000) == first
    await jobs.make_due(lease.id)
    await jobs.attempt("complete", *await jobs.claim())
    assert await end(100) == first


@pytest.mark.parametrize("verb", BEATS)
async def test_a_beat_may_be_repeated(jobs: Jobs, verb: str) -> None:
    lease = await jobs.run()
    for _ in range(3):
        assert await jobs.attempt(verb, lease)
    job = await jobs.job(lease.id)
    assert (job.state, job.log_lines) == ("running", int(verb == "log"))


async def test_of_two_failures_in_a_batch_the_first_is_kept(jobs: Jobs) -> None:
    lease = await jobs.run()
    failures = [failure(lease, error_message=str(n), retry_in_seconds=100.0 + n) for n in range(5)]
    answers = await jobs.store.fail_jobs(failures)
    assert answers == [Ended("scheduled", (await jobs.row(lease.id))["run_at"])] * 5
    assert [row["error_message"] for row in await jobs.attempts(lease.id)] == ["0"]
    assert (await jobs.row(lease.id))["errors"] == 1


async def test_a_release_that_stands_twice_in_a_batch_rings_once(jobs: Jobs) -> None:
    lease = await jobs.run()
    _, ready = await jobs.store.release_jobs([Release(lease.id, lease.token)] * 2)
    assert amounts(ready) == {"default": 1}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_call_repeated_while_the_first_is_being_committed_gets_its_answer(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    answers: list[Answer] = []

    async def repeat() -> None:
        answers.append(await jobs.attempt(ending, lease))

    async with jobs.session() as first, anyio.create_task_group() as group:
        answer = await jobs.attempt(ending, lease, store=first.store)
        group.start_soon(repeat)
        await first.until_it_blocks_another()
        await first.commit()
    assert answers == [answer]
    assert len(await jobs.attempts(lease.id)) == (ending != "complete")


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_call_repeated_while_the_first_is_undone_counts_itself(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    answers: list[Answer] = []

    async def repeat() -> None:
        answers.append(await jobs.attempt(ending, lease))

    async with jobs.session() as first, anyio.create_task_group() as group:
        answer = await jobs.attempt(ending, lease, store=first.store)
        group.start_soon(repeat)
        await first.until_it_blocks_another()
        await first.rollback()
    assert answers == [answer]
    assert await jobs.attempt(ending, lease) == answer


@pytest.mark.parametrize("ending", ENDINGS)
async def test_batches_lock_their_jobs_in_one_order_so_that_they_never_deadlock(jobs: Jobs, ending: str) -> None:
    await jobs.enqueue(5)
    first, *others = await jobs.claim(5)
    answers: list[Answer] = []

    async def end() -> None:
        answers.extend(await attempt_all(jobs.store, ending, [*reversed(others), first]))

    async with jobs.session() as session, anyio.create_task_group() as group:
        await session.fetch("select from clarion.jobs where id = $1 for update", first.id)
        group.start_soon(end)
        await session.until_it_blocks_another()
        free = await session.fetch("select from clarion.jobs where id <> $1 for update skip locked", first.id)
        assert len(free) == 4
        await session.rollback()
    assert len(answers) == 5
    assert all(answers)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ending_waits_for_a_heartbeat_in_flight_and_then_counts(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    answers: list[Answer] = []

    async def end() -> None:
        answers.append(await jobs.attempt(ending, lease))

    async with jobs.session() as beating, anyio.create_task_group() as group:
        assert await jobs.attempt("heartbeat", lease, store=beating.store)
        group.start_soon(end)
        await beating.until_it_blocks_another()
        await beating.commit()
    assert all(answers)
    assert await jobs.attempt("heartbeat", lease) is None


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ending_that_loses_the_race_with_the_reaper_is_refused(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    await jobs.expire(lease.id)
    answers: list[Answer] = []

    async def end() -> None:
        answers.append(await jobs.attempt(ending, lease))

    async with jobs.session() as reaping, anyio.create_task_group() as group:
        assert len(await reaping.store.reap_jobs()) == 1
        group.start_soon(end)
        await reaping.until_it_blocks_another()
        await reaping.commit()
    assert not any(answers)
    assert await jobs.state(lease.id) == "ready"


async def test_an_unstorable_item_undoes_its_whole_batch(jobs: Jobs) -> None:
    good, bad = await jobs.run(), await jobs.run()
    before = await jobs.everything()
    with pytest.raises(Unstorable):
        await jobs.store.complete_jobs([Completion(good.id, good.token), Completion(bad.id, bad.token, "not JSON")])
    with pytest.raises(Unstorable):
        await jobs.store.fail_jobs([failure(good), failure(bad, error_message="\x00")])
    assert await jobs.everything() == before
