"""Who gets which job: the line, the limits, and many claimers at once."""

from datetime import UTC, datetime
from uuid import UUID, uuid4

import anyio
import msgspec
import pytest

from clarion.db import Database, DedicatedDatabase
from clarion.execution import Lease, Policy, Share
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from store_actions import TASK, Jobs

POLICY = Policy(max_attempts=3, timeout_seconds=30.5, backoff_seconds=1.5, backoff_cap_seconds=60.0)

NEVER = datetime(2199, 1, 1, tzinfo=UTC), UUID(int=0)


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


async def ids(jobs: Jobs, count: int = 1, **options: object) -> list[UUID]:
    return [added.id for added in await jobs.enqueue(count, **options)]


def policy_of(lease: Lease) -> tuple[object, ...]:
    return (lease.max_attempts, lease.timeout_seconds)


# -- The line


async def test_jobs_are_claimed_first_in_first_out(jobs: Jobs) -> None:
    line = [*await ids(jobs, 5), *await ids(jobs), *await ids(jobs, 5)]
    claimed = [lease.id for size in (1, 3, 7) for lease in await jobs.claim(size)]
    assert claimed == line


async def test_priority_is_a_head_start_of_a_minute_a_level(jobs: Jobs) -> None:
    (plain,), (urgent,), (lazy,) = await ids(jobs), await ids(jobs, priority=1), await ids(jobs, priority=-1)
    assert [lease.id for lease in await jobs.claim(3)] == [urgent, plain, lazy]


async def test_a_head_start_is_overtaken_by_age(jobs: Jobs) -> None:
    (old,) = await ids(jobs)
    await jobs.age(old, 2 * 60 + 10)
    urgent = [(await ids(jobs, priority=priority))[0] for priority in (2, 3)]
    assert [lease.id for lease in await jobs.claim(3)] == [urgent[1], old, urgent[0]]


async def test_a_queue_has_its_own_credit(jobs: Jobs) -> None:
    await jobs.fetch("insert into clarion.queues (name, priority_credit_seconds) values ('slow', 3600), ('flat', 0)")
    (old,) = await ids(jobs, queue="slow")
    await jobs.age(old, 3500)
    (urgent,) = await ids(jobs, queue="slow", priority=1)
    assert [lease.id for lease in await jobs.claim(2, queue="slow")] == [urgent, old]
    first, second = *await ids(jobs, queue="flat"), *await ids(jobs, queue="flat", priority=100)
    assert [lease.id for lease in await jobs.claim(2, queue="flat")] == [first, second]


@pytest.mark.parametrize("ending", ["release", "fail", "snooze"])
async def test_a_job_keeps_the_head_start_of_its_priority(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run(priority=3)
    await jobs.attempt(ending, lease)
    row = await jobs.row(lease.id)
    assert (row["run_at"] - row["sort_key"]).total_seconds() == pytest.approx(180)


async def test_a_released_job_keeps_its_place_in_line(jobs: Jobs) -> None:
    first, second = [*await ids(jobs), *await ids(jobs)]
    (lease,) = await jobs.claim()
    await jobs.attempt("release", lease)
    assert [lease.id for lease in await jobs.claim(2)] == [first, second]


# -- Limits and filters


async def test_a_claim_keeps_to_each_queues_limit(jobs: Jobs) -> None:
    for queue in ("a", "b", "c", "d"):
        await ids(jobs, 10, queue=queue)
    leases = await jobs.store.claim_for(uuid4(), {"a": 3, "b": 1, "c": 0, "e": 5}, {TASK: Policy()}, lease_seconds=30)
    assert sorted(lease.queue for lease in leases) == ["a", "a", "a", "b"]
    rows = await jobs.fetch("select from clarion.jobs where state = 'running'")
    assert len(rows) == 4


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
async def test_a_claim_takes_no_more_than_it_was_asked_for(jobs: Jobs, count: int) -> None:
    await ids(jobs, 20)
    claimed = await jobs.claim(count)
    assert len(claimed) == min(count, 20)
    assert len(await jobs.fetch("select from clarion.jobs where state = 'running'")) == len(claimed)


async def test_a_claim_takes_only_tasks_the_worker_can_run(jobs: Jobs) -> None:
    await jobs.store.enqueue_jobs([NewJob(task=task) for task in ("a", "b", "c")] * 2)
    policies = {"a": Policy(max_attempts=1), "c": Policy(max_attempts=3), "d": Policy()}
    leases = await jobs.store.claim_for(uuid4(), {"default": 10}, policies, lease_seconds=30)
    assert sorted((lease.task, lease.max_attempts) for lease in leases) == [("a", 1), ("a", 1), ("c", 3), ("c", 3)]
    assert not await jobs.store.claim_for(uuid4(), {"default": 10}, {}, lease_seconds=30)


async def test_a_claim_may_take_any_task_and_leaves_policies_to_the_settings(jobs: Jobs) -> None:
    line = [NewJob(task="a", max_attempts=7), NewJob(task="b"), NewJob(task=""), NewJob(task="c", queue="other")]
    added = await jobs.store.enqueue_jobs(line)
    leases = await jobs.store.claim_for(uuid4(), {"default": 10}, None, lease_seconds=30)
    assert sorted((lease.id, lease.task, lease.max_attempts) for lease in leases) == [
        (added[0].id, "a", 7), (added[1].id, "b", None), (added[2].id, "", None),
    ]  # fmt: skip
    assert {policy_of(lease)[1] for lease in leases} == {None}


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
async def test_a_claim_of_any_task_keeps_to_its_limit(jobs: Jobs, count: int) -> None:
    await jobs.store.enqueue_jobs([NewJob(task=f"t{n}") for n in range(20)])
    leases = await jobs.store.claim_for(uuid4(), {"default": count}, None, lease_seconds=30)
    assert len({lease.id for lease in leases}) == len(leases) == min(count, 20)


@pytest.mark.parametrize("ending", ["complete", "fail", "snooze"])
async def test_only_ready_jobs_are_claimed(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    assert not await jobs.claim()
    await jobs.attempt(ending, lease)
    assert not await jobs.claim()


async def test_a_lease_says_everything_about_its_job(jobs: Jobs) -> None:
    (added,) = await jobs.enqueue(args='{"a": 1}', queue="mail", priority=2)
    (lease,) = await jobs.claim(queue="mail", policy=POLICY)
    row = await jobs.row(added.id)
    assert (lease.id, lease.queue, lease.task, lease.args, lease.priority) == (added.id, "mail", TASK, '{"a": 1}', 2)
    assert (lease.attempt, lease.errors, lease.crashes, *policy_of(lease)) == (1, 0, 0, 3, 30.5)
    assert (lease.created_at, lease.run_at) == (added.created_at, added.run_at)
    assert (lease.token, lease.started_at, lease.sort_key) == (row["lease_token"], row["started_at"], row["sort_key"])
    assert row["worker_id"] == jobs.worker_id
    assert (row["lease_seconds"], lease.generation, lease.checkpoint) == (30, 1, None)


async def test_every_claim_has_a_fresh_token(jobs: Jobs) -> None:
    await ids(jobs, 50)
    tokens = []
    for _ in range(3):
        leases = await jobs.claim(50)
        tokens += [lease.token for lease in leases]
        for lease in leases:
            await jobs.attempt("release", lease)
    assert len(set(tokens)) == 150


async def test_a_lease_runs_from_now_and_ends_soon_after_the_attempts_timeout(jobs: Jobs) -> None:
    await ids(jobs, 2)
    (long,) = await jobs.claim(lease_seconds=100)
    (short,) = await jobs.claim(lease_seconds=100, policy=Policy(timeout_seconds=20))
    for lease, seconds in ((long, 100), (short, 25)):
        (row,) = await jobs.fetch(
            "select extract(epoch from lease_expires_at - started_at)::float8 as s from clarion.jobs where id = $1",
            lease.id,
        )
        assert row["s"] == pytest.approx(seconds, abs=1)


# -- Policies and attempts


async def test_the_jobs_own_policy_wins_over_the_tasks(jobs: Jobs) -> None:
    (job_id,) = await ids(jobs, max_attempts=9, timeout_seconds=9.5, backoff_seconds=9.25, backoff_cap_seconds=99.0)
    (lease,) = await jobs.claim(policy=POLICY)
    row = await jobs.row(job_id)
    assert policy_of(lease) == (9, 9.5)
    assert (row["backoff_seconds"], row["backoff_cap_seconds"]) == (9.25, 99)


async def test_the_tasks_policy_is_stamped_by_the_first_claim(jobs: Jobs) -> None:
    (job_id,) = await ids(jobs, max_attempts=9)
    (lease,) = await jobs.claim(policy=POLICY)
    await jobs.attempt("release", lease)
    other = Policy(max_attempts=1, timeout_seconds=1, backoff_seconds=1, backoff_cap_seconds=1)
    (lease,) = await jobs.claim(policy=other)
    row = await jobs.row(job_id)
    assert policy_of(lease) == (9, 30.5)
    assert (row["backoff_seconds"], row["backoff_cap_seconds"]) == (1.5, 60)


async def test_an_attempt_is_counted_when_it_begins(jobs: Jobs) -> None:
    lease = await jobs.run()
    assert lease.attempt == 1
    assert (await jobs.row(lease.id))["attempt"] == 1
    assert (await jobs.lose(lease)).attempt == 2


@pytest.mark.parametrize(("ending", "attempt"), [("release", 0), ("snooze", 0), ("fail", 1)])
async def test_release_and_snooze_give_the_attempt_back(jobs: Jobs, ending: str, attempt: int) -> None:
    lease = await jobs.run()
    await jobs.attempt(ending, lease)
    row = await jobs.row(lease.id)
    assert (row["attempt"], row["errors"], row["snoozes"]) == (attempt, ending == "fail", ending == "snooze")
    await jobs.make_due(lease.id)
    (again,) = await jobs.claim()
    assert again.attempt == attempt + 1


# -- Several at once


async def test_claimants_of_one_statement_share_a_queue_in_the_order_they_came(jobs: Jobs) -> None:
    line, other_line = await ids(jobs, 4), [added.id for added in await jobs.enqueue(2, queue="other")]
    ada, bob, eve = uuid4(), uuid4(), uuid4()
    wishes = [("default", 2, ada, 30), ("other", 1, ada, 30), ("default", 1, bob, 60), ("default", 5, eve, 90)]
    shares = [
        Share(queue=queue, jobs_max=most, worker_id=worker_id, lease_seconds=seconds)
        for queue, most, worker_id, seconds in wishes
    ]
    taken = await jobs.store.claim_jobs(shares, None)
    assert [[lease.id for lease in leases] for leases in taken] == [line[:2], other_line[:1], line[2:3], line[3:]]
    for leases, (_, _, worker_id, seconds) in zip(taken, wishes, strict=True):
        for lease in leases:
            row = await jobs.row(lease.id)
            assert (row["worker_id"], row["lease_seconds"]) == (worker_id, seconds)


async def test_a_claim_looks_from_the_least_bound_of_its_shares(jobs: Jobs) -> None:
    (first,) = await jobs.enqueue()
    (second,) = await jobs.enqueue()
    late = Share(queue="default", jobs_max=1, worker_id=uuid4(), lease_seconds=30, earliest=(second.run_at, second.id))
    assert [[lease.id for lease in leases] for leases in await jobs.store.claim_jobs([late], None)] == [[second.id]]
    early = msgspec.structs.replace(late, earliest=(first.run_at, first.id))
    (third,) = await jobs.enqueue()
    taken = await jobs.store.claim_jobs([late, early], None)
    assert [[lease.id for lease in leases] for leases in taken] == [[first.id], [third.id]]


async def test_a_claim_looks_from_a_job_among_those_that_came_together(jobs: Jobs) -> None:
    line = await ids(jobs, 4)
    together = await jobs.fetch("select distinct sort_key from clarion.jobs")
    assert len(together) == 1
    third = Share(
        queue="default", jobs_max=9, worker_id=uuid4(), lease_seconds=30, earliest=(together[0]["sort_key"], line[2])
    )
    (taken,) = await jobs.store.claim_jobs([third], None)
    assert [lease.id for lease in taken] == line[2:]


async def test_a_bound_of_one_share_hides_nothing_from_another_that_has_none(jobs: Jobs) -> None:
    (first,) = await jobs.enqueue()
    bounded = Share(queue="default", jobs_max=1, worker_id=uuid4(), lease_seconds=30, earliest=NEVER)
    anywhere = msgspec.structs.replace(bounded, earliest=None)
    assert await jobs.store.claim_jobs([bounded], None) == [[]]
    taken = await jobs.store.claim_jobs([bounded, anywhere], None)
    assert [lease.id for leases in taken for lease in leases] == [first.id]


async def test_two_claims_at_once_get_different_jobs(jobs: Jobs) -> None:
    line = await ids(jobs, 10)
    async with jobs.session() as other:
        first = await other.store.claim_for(uuid4(), {"default": 4}, {TASK: Policy()}, lease_seconds=30)
        second = await jobs.claim(10)
        await other.commit()
    assert {lease.id for lease in first} == set(line[:4])
    assert [lease.id for lease in second] == line[4:]


async def test_a_claim_that_is_undone_leaves_its_jobs_to_others(jobs: Jobs) -> None:
    line = await ids(jobs, 5)
    async with jobs.session() as other:
        await other.store.claim_for(uuid4(), {"default": 4}, {TASK: Policy()}, lease_seconds=30)
        await other.rollback()
    assert [lease.id for lease in await jobs.claim(10)] == line


async def test_a_claim_skips_what_another_session_has_locked(jobs: Jobs) -> None:
    locked, *free = await ids(jobs, 3)
    async with jobs.session() as other:
        await other.fetch("select from clarion.jobs where id = $1 for update", locked)
        assert [lease.id for lease in await jobs.claim(2)] == free
    assert [lease.id for lease in await jobs.claim(2)] == [locked]


async def test_of_many_claimers_each_job_has_exactly_one(jobs: Jobs, settings: Settings) -> None:
    line = [added.id for queue in ("a", "b") for added in await jobs.enqueue(100, queue=queue)]
    claimed: list[Lease] = []

    async def claim_all(store: Store, worker_id: UUID) -> None:
        asked = {"a": 3, "b": 2}
        while leases := await store.claim_for(worker_id, asked, {TASK: Policy()}, lease_seconds=30):
            assert all([lease.queue for lease in leases].count(queue) <= most for queue, most in asked.items())
            claimed.extend(leases)

    databases = [DedicatedDatabase(settings, name=f"claimer {n}") for n in range(20)]
    try:
        async with anyio.create_task_group() as group:
            for database in databases:
                group.start_soon(claim_all, Store(database, settings), uuid4())
    finally:
        for database in databases:
            await database.close()
    assert sorted(lease.id for lease in claimed) == sorted(line)
    rows = await jobs.fetch("select id, lease_token, attempt from clarion.jobs where state = 'running'")
    assert {(row["id"], row["lease_token"], row["attempt"]) for row in rows} == {
        (lease.id, lease.token, 1) for lease in claimed
    }
