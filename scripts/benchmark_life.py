"""What must stay fast while jobs pile up, and while they are forgotten: backlogs, retention."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from functools import partial
from urllib.parse import urlsplit
from uuid import UUID

import anyio
import asyncpg
import msgspec

from benchmark_drain import drain_by
from benchmark_measure import Figure, Round, Sides, SkippedError, Target, Workload
from benchmark_stack import NOTHING, Bench, Launched, opened
from clarion.db import Locked, close_connection, connect
from clarion.store import Store

# -- backlog

_OTHER_DATABASE = "clarion_benchmark_backlog"
_SCHEDULED = """
    insert into clarion.jobs (queue, task, state, run_at, sort_key)
    select 'other', $1, 'scheduled', at, at
    from (select now() + interval '1 day' + n * interval '1 s' as at from generate_series(1, $2::integer) as n) as due
"""
_HISTORY = """
    insert into clarion.job_history (
      id, created_at, run_at, started_at, finished_at, state, priority, attempt, errors, crashes, snoozes,
      queue, task, args
    )
    select
      clarion.new_id(), at, at, at, at, 'succeeded', 0, 1, 0, 0, 0, 'other', $1, '{}'
    from (
      select $3::timestamptz + n * interval '1 microsecond' as at from generate_series(1, $2::integer) as n
    ) as finished
"""


@asynccontextmanager
async def backlog(bench: Bench) -> AsyncIterator[Sides]:
    """The empty database, and another one that is full of what does not concern the queue."""
    jobs = bench.sizes.drain_jobs
    async with another_database(bench) as full:
        await pile_up(full)
        async with bench.worker("plain") as plain, full.worker("full") as hindered:
            yield {
                "plain": partial(drain_by, bench, plain, "plain", jobs=jobs),
                "backlog": partial(drain_on, full, hindered, "full", jobs),
            }


async def drain_on(bench: Bench, worker: Launched, queue: str, jobs: int) -> Round:
    """The same drain, with everything else left in its place."""
    return await bench.drained(await bench.fill(queue, jobs), worker)


async def pile_up(bench: Bench) -> None:
    """Jobs for later, finished ones, and ready ones of a queue that nobody works on."""
    connection, sizes = bench.connection, bench.sizes
    await connection.execute(_SCHEDULED, NOTHING, sizes.backlog_scheduled)
    await connection.execute(_HISTORY, NOTHING, sizes.backlog_history, await connection.fetchval("select now()"))
    await bench.fill("other", sizes.backlog_ready)
    await connection.execute("vacuum analyze clarion.jobs")
    await connection.execute("vacuum analyze clarion.job_history")


@asynccontextmanager
async def another_database(bench: Bench) -> AsyncIterator[Bench]:
    """A second database of the same server, so that rounds with and without a backlog can take turns."""
    drop = f'drop database if exists "{_OTHER_DATABASE}" with (force)'
    try:
        await bench.connection.execute(drop)
        await bench.connection.execute(f'create database "{_OTHER_DATABASE}"')
    except asyncpg.InsufficientPrivilegeError as error:
        raise SkippedError(f"a second database is needed: {error}") from error
    try:
        url = urlsplit(bench.settings.database_url)._replace(path=f"/{_OTHER_DATABASE}").geturl()
        async with opened(
            msgspec.structs.replace(bench.settings, database_url=url), bench.sizes, bench.logs, with_api=False
        ) as other:
            yield other
    finally:
        await bench.connection.execute(drop)


# -- retention

_OLD_DAYS, _KEEP_DAYS = 10, 5
_MIDDLE = "select id from clarion.jobs where queue = $1 order by id offset $2::integer limit 1"
_GAP = """
    select extract(epoch from max(gap))::float8
    from (
      select finished_at - lag(finished_at) over (order by finished_at) as gap
      from clarion.job_history where queue = $1 and created_at >= $2
    ) as gaps
"""


@asynccontextmanager
async def retention(bench: Bench) -> AsyncIterator[Sides]:
    """A worker on its own, and while an old day of the history goes."""
    async with bench.worker("retention") as worker:
        yield {
            "plain": partial(drain_and_drop, bench, worker, rows=0),
            "drop": partial(drain_and_drop, bench, worker, rows=bench.sizes.retention_rows),
        }


async def drain_and_drop(bench: Bench, worker: Launched, *, rows: int) -> Round:
    """Drains, and half-way through drops the old day with the product's own statement, if there are rows."""
    await bench.reset()
    if rows:
        await make_old_day(bench, rows)
    backlog = await bench.fill("retention", bench.sizes.drain_jobs)
    middle = await bench.connection.fetchval(_MIDDLE, backlog.queue, backlog.jobs // 2)
    dropped: list[float] = []

    async def drop_when_half_is_done() -> None:
        if rows:
            dropped.append(await drop_old_day(bench, once_gone=middle))

    async with anyio.create_task_group() as group:
        group.start_soon(drop_when_half_is_done)
        measured = await bench.drained(backlog, worker)
    gap = await bench.connection.fetchval(_GAP, backlog.queue, backlog.since)
    values = measured.values | {"gap": 1000 * gap} | ({"seconds": dropped[0]} if dropped else {})
    return msgspec.structs.replace(measured, values=values)


async def make_old_day(bench: Bench, rows: int) -> None:
    """A day of finished jobs, vacuumed long ago: a vacuum under way would keep it from being dropped."""
    day = await bench.connection.fetchval("select (now() at time zone 'UTC')::date - $1::integer", _OLD_DAYS)
    while not await _partitioned(bench, day):
        pass
    at = await bench.connection.fetchval("select $1::date::timestamp at time zone 'UTC'", day)
    await bench.connection.execute(_HISTORY, NOTHING, rows, at)
    await bench.connection.execute(f"vacuum (freeze, analyze) clarion.job_history_{day:%Y%m%d}")


async def _partitioned(bench: Bench, day: date) -> bool:
    try:
        return bool(await bench.connection.fetchval("select clarion.create_history_partition($1)", day))
    except asyncpg.LockNotAvailableError:  # it gives up soon as well
        return False


async def drop_old_day(bench: Bench, *, once_gone: UUID) -> float:
    """Waits until that job is finished, then drops; how many seconds that took, with all its tries."""
    settings = msgspec.structs.replace(bench.settings, history_days=_KEEP_DAYS)
    connection = await connect(settings, name="retention")
    try:

        async def is_half_done() -> bool:
            return not await connection.fetchval("select exists (select from clarion.jobs where id = $1)", once_gone)

        await bench.until(is_half_done)
        store, started = Store(connection, settings), time.perf_counter()
        while not await _dropped(store):
            pass
        return time.perf_counter() - started
    finally:
        await close_connection(connection)


async def _dropped(store: Store) -> bool:
    try:
        return bool(await store.drop_history_partitions())
    except Locked:  # it gives up soon, rather than have others queue behind it
        return False


BACKLOG = Workload(
    name="backlog",
    what="drain beside 1,000,000 scheduled jobs, 1,000,000 in the history, 100,000 ready in another queue",
    sides=backlog,
    quick_rounds=1,
    figures=[
        Figure(
            name="backlog", unit="jobs/s", ours="backlog.rate",
            beside=("plain.rate",), beside_is="`drain` without it", target=Target(at_least=0.9),
        ),
    ],
)  # fmt: skip
RETENTION = Workload(
    name="retention",
    what="a day of 1,000,000 finished jobs is dropped in the midst of a drain",
    sides=retention,
    quick_rounds=1,
    figures=[
        Figure(name="retention, drop", unit="s", ours="drop.seconds", target=Target(at_most=1, of_value=True)),
        Figure(
            name="retention, drain", unit="jobs/s", ours="drop.rate",
            beside=("plain.rate",), beside_is="no drop", target=Target(at_least=0.9),
        ),
        Figure(
            name="retention, longest gap", unit="ms", ours="drop.gap", beside=("plain.gap",), beside_is="no drop"
        ),
    ],
)  # fmt: skip
