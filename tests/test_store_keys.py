"""Idempotency keys: of all that enqueue with one key, in whatever order and processes, the first adds a job."""

from typing import Any
from uuid import UUID

import anyio
import pytest

from clarion.db import Database, Locked
from clarion.errors import Unstorable
from clarion.job import Enqueued, NewJob
from clarion.settings import Settings
from store_actions import TASK, Jobs, Session

REQUEST = '{"task": "abc"}'
OTHER = '{"task": "xyz"}'


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


def keyed(key: str | None, **options: Any) -> NewJob:
    return NewJob(task=TASK, key=key, **{"request": None if key is None else REQUEST} | options)


async def count(jobs: Jobs) -> int:
    return len(await jobs.fetch("select from clarion.jobs"))


def answer_of(added: Enqueued) -> tuple[UUID, str, Any, Any]:
    return added.id, added.state, added.created_at, added.run_at


# -- One key


@pytest.mark.parametrize("delay_seconds", [None, 600.0])
async def test_the_same_key_again_gets_the_answer_of_the_first(jobs: Jobs, delay_seconds: float | None) -> None:
    (first,) = await jobs.store.enqueue_jobs([keyed("k", delay_seconds=delay_seconds)])
    (again,) = await jobs.store.enqueue_jobs([keyed("k", delay_seconds=delay_seconds)])
    assert answer_of(again) == answer_of(first)
    assert (first.request, again.request) == (None, REQUEST)
    job = await jobs.job(first.id)
    assert answer_of(first) == (job.id, job.state, job.created_at, job.run_at)
    assert await count(jobs) == 1


async def test_the_answer_stays_as_it_was_whatever_became_of_the_job(jobs: Jobs) -> None:
    (first,) = await jobs.store.enqueue_jobs([keyed("k")])
    (lease,) = await jobs.claim()
    for after in ("running", "succeeded", "pruned"):
        if after == "succeeded":
            await jobs.attempt("complete", lease)
        if after == "pruned":
            await jobs.fetch("delete from clarion.job_history")
        (again,) = await jobs.store.enqueue_jobs([keyed("k")])
        assert answer_of(again) == answer_of(first)
    assert await count(jobs) == 0


async def test_another_key_is_another_job(jobs: Jobs) -> None:
    added = await jobs.store.enqueue_jobs([keyed("a"), keyed("b"), keyed("A"), keyed(" a")])
    assert len({answer.id for answer in added}) == 4
    assert await count(jobs) == 4


async def test_without_a_key_nothing_is_remembered(jobs: Jobs) -> None:
    for _ in range(2):
        await jobs.store.enqueue_jobs([keyed(None)] * 2)
    assert await count(jobs) == 4
    assert await jobs.fetch("select from clarion.idempotency_keys") == []


async def test_a_key_needs_a_request_to_be_compared_with(jobs: Jobs) -> None:
    with pytest.raises(Unstorable):
        await jobs.store.enqueue_jobs([keyed("k", request=None)])
    assert await count(jobs) == 0


# -- Sets


async def test_of_one_key_twice_in_a_set_the_first_adds_a_job(jobs: Jobs) -> None:
    first, other, again = await jobs.store.enqueue_jobs(
        [keyed("k", args="1"), keyed("x", args="2"), keyed("k", args="3")]
    )
    assert answer_of(again) == answer_of(first)
    assert [answer.request for answer in (first, other, again)] == [None, None, REQUEST]
    rows = await jobs.fetch("select id, args::text from clarion.jobs")
    assert {row["id"]: row["args"] for row in rows} == {first.id: "1", other.id: "2"}


async def test_a_mixed_set_is_answered_in_order(jobs: Jobs) -> None:
    known = await jobs.store.enqueue_jobs([keyed(f"old {n}") for n in range(10)])
    new = [
        job
        for n in range(10)
        for job in (
            keyed(f"old {n}"),
            keyed(f"new {n}", args=f"{n}", priority=n % 2),
            keyed(None, args=f"-{n}", delay_seconds=60.0 * (n % 2)),
        )
    ]
    added = await jobs.store.enqueue_jobs(new)
    assert [answer_of(answer) for answer in added[::3]] == [answer_of(answer) for answer in known]
    assert [answer.request for answer in added] == [REQUEST, None, None] * 10
    rows = await jobs.fetch("select id, args::text, created_at, run_at, sort_key from clarion.jobs")
    args = {row["id"]: row["args"] for row in rows}
    stored = {row["id"]: (row["created_at"], row["run_at"], row["sort_key"]) for row in rows}
    for n, answer in enumerate(added):
        assert (answer.created_at, answer.run_at) == stored[answer.id][:2]
        assert answer.sort_key == (stored[answer.id][2] if n % 3 else None)
    assert [args[answer.id] for answer in added[1::3]] == [f"{n}" for n in range(10)]
    assert [args[answer.id] for answer in added[2::3]] == [f"-{n}" for n in range(10)]
    assert len(rows) == 30


async def test_a_key_of_another_request_keeps_its_whole_set_out(jobs: Jobs) -> None:
    (first,) = await jobs.store.enqueue_jobs([keyed("k")])
    before = await jobs.fetch("select * from clarion.idempotency_keys")
    added = await jobs.store.enqueue_jobs([keyed(None), keyed("k", request=OTHER), keyed("x"), keyed("k")])
    assert [answer.state for answer in added] == [None, "ready", None, "ready"]
    assert [answer.request for answer in added] == [None, REQUEST, None, REQUEST]
    assert {added[1].id, added[3].id} == {first.id}
    assert await jobs.fetch("select * from clarion.idempotency_keys") == before
    assert await count(jobs) == 1


async def test_jobs_of_a_set_with_keys_keep_their_order_in_line(jobs: Jobs) -> None:
    added = await jobs.store.enqueue_jobs([keyed(f"{n:02}") for n in reversed(range(20))])
    assert [lease.id for lease in await jobs.claim(20)] == [answer.id for answer in added]


async def test_a_set_that_cannot_be_stored_leaves_its_keys_free(jobs: Jobs) -> None:
    with pytest.raises(Unstorable):
        await jobs.store.enqueue_jobs([keyed("k"), keyed("x", args="no JSON")])
    (added,) = await jobs.store.enqueue_jobs([keyed("k")])
    assert added.request is None


# -- Time


async def test_a_key_whose_time_is_over_is_taken_anew(jobs: Jobs) -> None:
    (first,) = await jobs.store.enqueue_jobs([keyed("k")])
    await outlive(jobs, "k")
    (second,) = await jobs.store.enqueue_jobs([keyed("k", request=OTHER)])
    assert (second.id != first.id, second.request) == (True, None)
    (again,) = await jobs.store.enqueue_jobs([keyed("k", request=OTHER)])
    assert (answer_of(again), again.request) == (answer_of(second), OTHER)
    assert await count(jobs) == 2


async def test_a_key_lasts_as_long_as_the_settings_say(jobs: Jobs) -> None:
    await jobs.store.enqueue_jobs([keyed("k")])
    (row,) = await jobs.fetch("""
        select extract(epoch from expires_at - created_at)::float8 as s from clarion.idempotency_keys
    """)
    assert row["s"] == jobs.settings.idempotency_ttl_seconds


async def test_only_keys_whose_time_is_over_are_pruned_within_the_limit(jobs: Jobs) -> None:
    await jobs.store.enqueue_jobs([keyed(f"k{n}") for n in range(5)])
    assert await jobs.store.prune_idempotency_keys() == 0
    for n in range(3):
        await outlive(jobs, f"k{n}")
    limited = jobs.limited_to(2)
    assert [await limited.prune_idempotency_keys() for _ in range(3)] == [2, 1, 0]
    rows = await jobs.fetch("select key from clarion.idempotency_keys order by key")
    assert [row["key"] for row in rows] == ["k3", "k4"]
    assert await count(jobs) == 5


async def outlive(jobs: Jobs, key: str) -> None:
    await jobs.fetch("update clarion.idempotency_keys set expires_at = now() - interval '1 s' where key = $1", key)


# -- Two sessions


class Second:
    """A caller who comes while a first session has its set open."""

    def __init__(self, jobs: Jobs, *new: NewJob) -> None:
        self._jobs = jobs
        self._new = new
        self.added: list[Enqueued] = []

    async def run(self) -> None:
        self.added = await self._jobs.store.enqueue_jobs(self._new)

    async def meet(self, first: Session, *, commit: bool) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self.run)
            await first.until_it_blocks_another()
            await (first.commit() if commit else first.rollback())


async def test_who_comes_second_waits_and_gets_the_answer_of_the_first(jobs: Jobs) -> None:
    second = Second(jobs, keyed(None), keyed("k"), keyed("x"))
    async with jobs.session() as session:
        (first,) = await session.store.enqueue_jobs([keyed("k")])
        await second.meet(session, commit=True)
    assert answer_of(second.added[1]) == answer_of(first)
    assert [added.request for added in second.added] == [None, REQUEST, None]
    assert await count(jobs) == 3


async def test_a_key_of_another_request_that_is_just_being_committed_costs_its_own_job_only(jobs: Jobs) -> None:
    second = Second(jobs, keyed(None), keyed("k", request=OTHER), keyed("x"))
    async with jobs.session() as session:
        await session.store.enqueue_jobs([keyed("k")])
        await second.meet(session, commit=True)
    assert [(added.state, added.request) for added in second.added] == [
        ("ready", None), ("ready", REQUEST), ("ready", None),
    ]  # fmt: skip
    assert await count(jobs) == 3


async def test_who_comes_second_is_first_when_the_other_is_undone(jobs: Jobs) -> None:
    second = Second(jobs, keyed("k"))
    async with jobs.session() as session:
        (first,) = await session.store.enqueue_jobs([keyed("k")])
        await second.meet(session, commit=False)
    (added,) = second.added
    assert (added.id != first.id, added.request) == (True, None)
    assert await count(jobs) == 1


async def test_of_two_who_take_an_old_key_anew_one_wins(jobs: Jobs) -> None:
    await jobs.store.enqueue_jobs([keyed("k")])
    await outlive(jobs, "k")
    second = Second(jobs, keyed("k"))
    async with jobs.session() as session:
        (first,) = await session.store.enqueue_jobs([keyed("k")])
        await second.meet(session, commit=True)
    assert [answer_of(added) for added in second.added] == [answer_of(first)]
    assert await count(jobs) == 2


async def test_who_waits_too_long_adds_nothing(jobs: Jobs) -> None:
    async with jobs.session() as first, jobs.session() as second:
        await second.fetch("set local lock_timeout = '50ms'")
        await first.store.enqueue_jobs([keyed("k")])
        with pytest.raises(Locked):
            await second.store.enqueue_jobs([keyed(None), keyed("k")])
        await first.rollback()
    assert await count(jobs) == 0


async def test_sets_that_share_keys_in_opposite_order_never_deadlock(jobs: Jobs) -> None:
    keys = [f"k{n}" for n in range(5)]
    answers: list[list[Enqueued]] = []

    async def enqueue(order: list[str]) -> None:
        answers.append(await jobs.store.enqueue_jobs([keyed(key) for key in order]))

    async with jobs.session() as holder:
        # Both wait for the last key, with the others in hand or wanted.
        await holder.store.enqueue_jobs([keyed(keys[-1])])
        async with anyio.create_task_group() as group:
            group.start_soon(enqueue, keys)
            group.start_soon(enqueue, [*reversed(keys)])
            await holder.until_it_blocks_another()
            await holder.rollback()
    assert len(answers) == 2
    assert [added.id for added in answers[0]] == [added.id for added in reversed(answers[1])]
    assert await count(jobs) == 5


async def test_of_many_who_come_at_once_one_adds_the_job(jobs: Jobs) -> None:
    answers: list[Enqueued] = []

    async def enqueue() -> None:
        answers.extend(await jobs.store.enqueue_jobs([keyed("k")]))

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(enqueue)
    assert len(answers) == 20
    assert len({answer_of(answer) for answer in answers}) == 1
    assert [answer.request for answer in answers].count(None) == 1
    assert await count(jobs) == 1


async def test_pruning_does_not_wait_for_a_key_that_is_being_taken_anew(jobs: Jobs) -> None:
    await jobs.store.enqueue_jobs([keyed("k")])
    await outlive(jobs, "k")
    async with jobs.session() as session:
        await session.store.enqueue_jobs([keyed("k")])
        assert await jobs.store.prune_idempotency_keys() == 0
        await session.commit()
    assert await jobs.store.prune_idempotency_keys() == 0
