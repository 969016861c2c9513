"""What is kept of the past and for how long: the history's partitions, attempts, events, and the list of workers."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import anyio
import msgspec
import pytest

from clarion.db import Locked, open_database
from clarion.execution import Directive, WorkerRecord
from clarion.settings import Settings
from clarion.store import Store
from conftest import settings_for
from store_actions import Jobs

STRAY = """
    insert into clarion.job_history (
      id, finished_at, created_at, run_at, state, priority, attempt, errors, crashes, snoozes, queue, task, args
    )
    select clarion.new_id(), (now() at time zone 'UTC')::date at time zone 'UTC' + make_interval(days => d, secs => 60),
      now(), now(), 'succeeded', 0, 1, 0, 0, 0, 'default', 't', '{}'
    from unnest($1::integer[]) as d
"""
PARTITIONS = """
    select c.relname::text as name, pg_get_expr(c.relpartbound, c.oid) as bound,
      (select count(*) from pg_constraint where conrelid = c.oid and conname = 'bound') as leftovers,
      (select count(*) from pg_index where indrelid = c.oid and indisprimary and indisvalid) as keys
    from pg_inherits as i join pg_class as c on c.oid = i.inhrelid
    where i.inhparent = 'clarion.job_history'::regclass order by c.relname
"""
# What the migrations make of the first days is dropped, so that each test starts with the default partition alone.
FORGET = "select clarion.drop_history_partitions('2100-01-01')"


@pytest.fixture
def settings(new_database: Callable[[], str]) -> Settings:
    """A database for each test: partitions are not rows."""
    return settings_for(new_database())


@pytest.fixture
async def jobs(settings: Settings) -> AsyncIterator[Jobs]:
    async with open_database(settings, name="test") as database:
        await database.fetch(FORGET)
        yield Jobs(database, settings)


@pytest.fixture
def store(jobs: Jobs) -> Store:
    return jobs.store


async def partitions(jobs: Jobs) -> list[str]:
    return [row["name"] for row in await jobs.fetch(PARTITIONS) if row["name"] != "job_history_default"]


async def add_strays(jobs: Jobs, *days: int) -> None:
    """Rows that finished a minute into these days, counted from today."""
    await jobs.fetch(STRAY, list(days))


@asynccontextmanager
async def somebody_reads_the_history(jobs: Jobs) -> AsyncIterator[None]:
    async with jobs.session() as reader:
        await reader.fetch("select count(*) from clarion.job_history")
        yield
        await reader.rollback()


# -- Partitions


async def test_partitions_are_made_ahead_of_time_and_once(jobs: Jobs) -> None:
    assert await jobs.store.create_history_partitions(days_ahead=3) == 4
    assert await jobs.store.create_history_partitions(days_ahead=3) == 0
    assert await jobs.store.create_history_partitions(days_ahead=5) == 2
    rows = await jobs.fetch(PARTITIONS)
    assert len(rows) == 7
    assert {(row["leftovers"], row["keys"]) for row in rows} == {(0, 1)}


async def test_a_partition_holds_the_days_of_utc(jobs: Jobs) -> None:
    await jobs.store.create_history_partitions(days_ahead=0)
    (row,) = [row for row in await jobs.fetch(PARTITIONS) if row["name"] != "job_history_default"]
    (today,) = await jobs.fetch("select (now() at time zone 'UTC')::date as day")
    day = today["day"]
    assert row["name"] == f"job_history_{day:%Y%m%d}"
    assert row["bound"].startswith(f"FOR VALUES FROM ('{day} 00:00:00+00')")


async def test_a_job_finishes_into_the_partition_of_today(jobs: Jobs) -> None:
    await jobs.store.create_history_partitions(days_ahead=0)
    lease = await jobs.run()
    await jobs.attempt("complete", lease)
    (row,) = await jobs.fetch("select tableoid::regclass::text as place from clarion.job_history")
    assert [row["place"]] == await partitions(jobs)
    assert await jobs.attempt("complete", lease)


async def test_without_a_partition_nothing_that_finished_is_lost(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("complete", lease)
    (row,) = await jobs.fetch("select tableoid::regclass::text as place from clarion.job_history")
    assert row["place"] == "job_history_default"
    assert await jobs.attempt("complete", lease)


async def test_strays_move_to_the_partition_of_their_day(jobs: Jobs) -> None:
    await add_strays(jobs, -40, -40, -1, 0, 1, 9)
    assert await jobs.store.create_history_partitions(days_ahead=1) == 5
    rows = await jobs.fetch("""
        select tableoid::regclass::text as place, to_char(finished_at at time zone 'UTC', 'YYYYMMDD') as day
        from clarion.job_history
    """)
    assert len(rows) == 6
    assert all(row["place"] == f"job_history_{row['day']}" for row in rows)


async def test_a_stray_keeps_answering_repeated_calls_after_its_move(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("complete", lease)
    await jobs.store.create_history_partitions(days_ahead=0)
    assert await jobs.attempt("complete", lease)
    assert await jobs.state(lease.id) == "succeeded"


async def test_partitions_past_retention_are_dropped_and_the_others_kept(jobs: Jobs) -> None:
    days = jobs.settings.history_days
    await add_strays(jobs, -days - 40, -days - 1, -days, 0)
    await jobs.store.create_history_partitions(days_ahead=1)
    assert len(await jobs.store.drop_history_partitions()) == 2
    assert await jobs.store.drop_history_partitions() == []
    rows = await jobs.fetch(
        "select (now() at time zone 'UTC')::date - finished_at::date as age from clarion.job_history"
    )
    assert sorted(row["age"] for row in rows) == [0, days]
    assert len(await partitions(jobs)) == 3


async def test_two_callers_at_once_make_each_partition_once(jobs: Jobs) -> None:
    made: list[int] = []

    async def create() -> None:
        made.append(await jobs.store.create_history_partitions(days_ahead=6))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(create)
    assert sum(made) == 7
    assert len(await partitions(jobs)) == 7


async def test_a_second_caller_makes_nothing_while_the_first_is_at_it(jobs: Jobs) -> None:
    async with jobs.session() as first:
        assert await first.store.create_history_partitions(days_ahead=1) == 2
        assert await jobs.store.create_history_partitions(days_ahead=9) == 0
        await first.commit()
    assert await jobs.store.create_history_partitions(days_ahead=1) == 0


async def test_a_second_caller_drops_nothing_while_the_first_is_at_it(jobs: Jobs) -> None:
    await add_strays(jobs, -100)
    await jobs.store.create_history_partitions(days_ahead=0)
    async with jobs.session() as first:
        assert len(await first.store.drop_history_partitions()) == 1
        assert await jobs.store.drop_history_partitions() == []
        await first.rollback()
    assert len(await jobs.store.drop_history_partitions()) == 1


@pytest.mark.parametrize("strays", [(), (0,)])
async def test_whoever_reads_the_history_is_not_waited_for(jobs: Jobs, strays: tuple[int, ...]) -> None:
    await add_strays(jobs, -100)
    await jobs.store.create_history_partitions(days_ahead=0)
    await add_strays(jobs, *strays)
    before = await partitions(jobs)
    async with somebody_reads_the_history(jobs):
        started = anyio.current_time()
        with pytest.raises(Locked):
            await jobs.store.create_history_partitions(days_ahead=1)
        with pytest.raises(Locked):
            await jobs.store.drop_history_partitions()
        assert anyio.current_time() - started < 1.5
        # Nobody queues behind an attempt that was given up.
        assert await jobs.attempt("complete", await jobs.run())
        assert await partitions(jobs) == before
    assert await jobs.store.create_history_partitions(days_ahead=1) == 1
    assert len(await jobs.store.drop_history_partitions()) == 1


async def test_foreign_partitions_are_left_alone_and_no_name_of_theirs_breaks_it(jobs: Jobs) -> None:
    await jobs.fetch("""
        create table clarion.job_history_archive partition of clarion.job_history
        for values from ('2001-01-01Z') to ('2002-01-01Z')
    """)
    await jobs.fetch("""
        create table clarion.job_history_99999999 partition of clarion.job_history
        for values from ('2002-01-01Z') to ('2003-01-01Z')
    """)
    assert await jobs.store.drop_history_partitions() == []
    assert await partitions(jobs) == ["job_history_99999999", "job_history_archive"]


# -- Attempts


async def age_attempts(jobs: Jobs, days: int) -> None:
    await jobs.fetch("update clarion.attempts set ended_at = ended_at - make_interval(days => $1::int)", days)


async def remembered(jobs: Jobs) -> set[UUID]:
    return {row["job_id"] for row in await jobs.fetch("select job_id from clarion.attempts")}


async def test_attempts_of_finished_jobs_go_with_retention_and_no_sooner(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.attempt("fail", lease)
    await jobs.fetch("delete from clarion.jobs")
    await age_attempts(jobs, jobs.settings.history_days - 1)
    assert await jobs.store.prune_attempts() == 0
    await age_attempts(jobs, 2)
    assert await jobs.store.prune_attempts() == 1
    assert await remembered(jobs) == set()


@pytest.mark.parametrize("ending", ["fail", "snooze", "release"])
async def test_attempts_of_live_jobs_stay(jobs: Jobs, ending: str) -> None:
    lease = await jobs.run()
    await jobs.attempt(ending, lease)
    await age_attempts(jobs, 10_000)
    assert await jobs.store.prune_attempts() == 0
    assert await remembered(jobs) == {lease.id}


async def test_attempts_of_dead_jobs_stay(jobs: Jobs) -> None:
    dead = await jobs.run(max_attempts=1)
    await jobs.attempt("fail", dead)
    done = await jobs.run()
    await jobs.attempt("fail", done)
    await jobs.fetch("delete from clarion.jobs where id = $1", done.id)
    await age_attempts(jobs, 10_000)
    assert await jobs.store.prune_attempts() == 1
    assert await remembered(jobs) == {dead.id}


async def test_attempts_are_pruned_oldest_first_and_within_the_limit(jobs: Jobs) -> None:
    leases = [await jobs.run() for _ in range(5)]
    for lease in leases:
        await jobs.attempt("fail", lease)
        await age_attempts(jobs, 100)
    await jobs.fetch("delete from clarion.jobs")
    assert await jobs.limited_to(3).prune_attempts() == 3
    assert await remembered(jobs) == {lease.id for lease in leases[3:]}


# -- Events


async def age_events(jobs: Jobs, days: int) -> None:
    await jobs.fetch("update clarion.job_events set at = at - make_interval(days => $1::int)", days)


async def test_events_of_finished_jobs_go_with_retention_and_no_sooner(jobs: Jobs) -> None:
    cancelled = [(await jobs.enqueue())[0].id for _ in range(3)]
    for job_id in cancelled:
        await jobs.cancel(job_id)
        await age_events(jobs, 1)
    await age_events(jobs, jobs.settings.history_days - 3)
    assert await jobs.limited_to(2).prune_events() == 1
    await age_events(jobs, 3)
    assert [await jobs.limited_to(1).prune_events() for _ in range(3)] == [1, 1, 0]
    assert [await jobs.events(job_id) for job_id in cancelled] == [[]] * 3


@pytest.mark.parametrize("state", ["dead", "ready"])
async def test_events_of_live_and_dead_jobs_stay(jobs: Jobs, state: str) -> None:
    (added,) = await jobs.enqueue(start_within_seconds=60.0)
    await jobs.change(added.id, priority=1)
    if state == "dead":
        await jobs.age(added.id, 61)
        await jobs.store.expire_jobs()
    assert await jobs.state(added.id) == state
    await age_events(jobs, 10_000)
    assert await jobs.store.prune_events() == 0
    assert len(await jobs.events(added.id)) == 1 + (state == "dead")


async def test_the_past_of_a_job_that_was_retried_outlives_its_cancellation(jobs: Jobs) -> None:
    lease = await jobs.run()
    await jobs.cancel(lease.id)
    await jobs.attempt("release", lease)
    await jobs.retry(lease.id)
    await age_events(jobs, 10_000)
    await age_attempts(jobs, 10_000)
    assert (await jobs.store.prune_events(), await jobs.store.prune_attempts()) == (0, 0)


# -- Workers


def record(**changes: object) -> WorkerRecord:
    worker = WorkerRecord(
        id=uuid4(), name="host:1", version="1.0", queues=["a", "b"], tasks=["t"], concurrency=5, running=0,
        state="running",
    )  # fmt: skip
    return msgspec.structs.replace(worker, **changes)


async def test_a_worker_is_listed_once_and_its_changes_are_seen(jobs: Jobs) -> None:
    worker = record()
    await jobs.store.record_worker(worker)
    await jobs.fetch("update clarion.workers set seen_at = now() - interval '1 hour'")
    await jobs.store.record_worker(msgspec.structs.replace(worker, running=3, state="draining"))
    (row,) = await jobs.fetch("select *, now() - seen_at < interval '1 minute' as seen from clarion.workers")
    assert (row["id"], row["name"], row["queues"], row["tasks"]) == (worker.id, "host:1", ["a", "b"], ["t"])
    assert (row["running"], row["state"], row["seen"]) == (3, "draining", True)


async def test_a_worker_that_stops_is_taken_off_the_list(jobs: Jobs) -> None:
    gone, kept = record(), record()
    for worker in (gone, kept):
        await jobs.store.record_worker(worker)
    await jobs.store.remove_worker(gone.id)
    await jobs.store.remove_worker(gone.id)
    assert [row["id"] for row in await jobs.fetch("select id from clarion.workers")] == [kept.id]


async def test_workers_not_seen_lately_are_taken_off_the_list_within_the_limit(jobs: Jobs) -> None:
    for _ in range(3):
        await jobs.store.record_worker(record())
    await jobs.fetch("update clarion.workers set seen_at = now() - interval '2 minutes'")
    fresh = record()
    await jobs.store.record_worker(fresh)
    assert await jobs.store.prune_workers(unseen_seconds=121) == 0
    assert await jobs.limited_to(2).prune_workers(unseen_seconds=119) == 2
    assert await jobs.store.prune_workers(unseen_seconds=119) == 1
    assert [row["id"] for row in await jobs.fetch("select id from clarion.workers")] == [fresh.id]


async def test_a_worker_goes_on_until_it_is_told_to_drain(jobs: Jobs) -> None:
    worker, other = record(), record()
    assert [await jobs.store.record_worker(item) for item in (worker, other)] == [Directive.OK, Directive.OK]
    assert await jobs.store.drain_worker(worker.id)
    assert await jobs.store.drain_worker(worker.id)
    assert [await jobs.store.record_worker(item) for item in (worker, other)] == [Directive.DRAIN, Directive.OK]


async def test_an_unknown_worker_cannot_be_told_anything(jobs: Jobs) -> None:
    assert not await jobs.store.drain_worker(uuid4())
    assert await jobs.fetch("select from clarion.workers") == []


async def test_workers_are_listed_with_all_they_said_youngest_first(jobs: Jobs) -> None:
    workers = [record(name=f"host:{n}", tasks=[], running=n) for n in range(3)]
    for worker in workers:
        await jobs.store.record_worker(worker)
    await jobs.store.drain_worker(workers[0].id)
    listed = await jobs.store.list_workers(limit=10)
    assert [item.name for item in listed] == ["host:2", "host:1", "host:0"]
    assert [item.directive for item in listed] == ["ok", "ok", "drain"]
    fields = WorkerRecord.__struct_fields__
    assert {name: getattr(listed[0], name) for name in fields} == msgspec.structs.asdict(workers[2])
    assert listed[0].started_at <= listed[0].seen_at
    assert len(await jobs.store.list_workers(limit=2)) == 2
