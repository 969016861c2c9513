"""What the tests of the store share: making jobs, taking them through their life, and looking at the bare rows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import anyio
import asyncpg
import msgspec

from clarion.db import Database, Executor, connect_options, translated_errors
from clarion.execution import Beat, Completion, Failure, Lease, LogLine, Policy, Release, Snoozing
from clarion.job import Cancelling, Enqueued, Job, JobChange, NewJob, Requeued
from clarion.settings import Settings
from clarion.store import Store

Answer: TypeAlias = bool | str | None

TASK = "t"
ACTOR = "test"
# What a worker may say of an attempt: while it runs, and to end it.
BEATS = ("heartbeat", "progress", "log")
ENDINGS = ("complete", "fail", "snooze", "release")
VERBS = (*BEATS, *ENDINGS)
# All that an enqueue can say, but for dates and keys.
EVERY_OPTION: dict[str, Any] = {
    "args": '{"exact": 1.10}',
    "queue": "mail",
    "priority": 5,
    "max_attempts": 4,
    "timeout_seconds": 9.5,
    "backoff_seconds": 1.5,
    "backoff_cap_seconds": 60.0,
    "start_within_seconds": 60.0,
    "total_timeout_seconds": 600.0,
    "enqueued_by": "api:ada",
}
# A row's life, as far as a refused call could have changed it.
EVERYTHING = """
    select
      (select json_agg(j order by j.id) from clarion.jobs as j)::text as jobs,
      (select json_agg(h order by h.id) from clarion.job_history as h)::text as history,
      (select json_agg(a order by a.job_id, a.lease_token) from clarion.attempts as a)::text as attempts,
      (select json_agg(e order by e.id) from clarion.job_events as e)::text as events,
      (select json_agg(l order by l.id) from clarion.job_logs as l)::text as logs
"""


def where(answer: Requeued | None) -> tuple[str | None, str | None] | None:
    """The state and the queue of a job that was put back into line."""
    return None if answer is None else (answer.state, answer.queue)


class Jobs:
    """Jobs of one test; `store` is what it tests."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self.store = Store(database, settings)
        # Reaps at once what was claimed, as far as the database can tell, before the server of the tests was started.
        self.reaper = Store(database, msgspec.structs.replace(settings, lease_seconds=0))
        self.worker_id = uuid4()

    def limited_to(self, rows: int, database: Executor | None = None) -> Store:
        """A store whose maintenance takes so many rows at once."""
        return Store(database or self.database, msgspec.structs.replace(self.settings, step_max_jobs=rows))

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        return await self.database.fetch(sql, *args)

    async def enqueue(self, count: int = 1, **options: Any) -> list[Enqueued]:
        return await self.store.enqueue_jobs([NewJob(task=TASK, **options)] * count)

    async def claim(self, count: int = 1, *, queue: str = "default", **options: Any) -> list[Lease]:
        """Claims from one queue, in the order of the line. `options`: lease_seconds, policy."""
        leases = await self.store.claim_for(
            options.get("worker_id", self.worker_id),
            {queue: count},
            {TASK: options.get("policy", Policy())},
            lease_seconds=options.get("lease_seconds", 30),
        )
        return sorted(leases, key=lambda lease: (lease.sort_key, lease.id))

    async def run(self, **options: Any) -> Lease:
        """A job of its own that is running."""
        (added,) = await self.enqueue(**options)
        (lease,) = await self.claim(queue=options.get("queue", "default"))
        assert lease.id == added.id
        return lease

    async def row(self, job_id: UUID) -> asyncpg.Record:
        """The live row."""
        (row,) = await self.fetch("select * from clarion.jobs where id = $1", job_id)
        return row

    async def state(self, job_id: UUID) -> str:
        (row,) = await self.fetch(
            "select state::text from clarion.jobs where id = $1 "
            "union all select state::text from clarion.job_history where id = $1",
            job_id,
        )
        return str(row["state"])

    async def attempts(self, job_id: UUID) -> list[asyncpg.Record]:
        return await self.fetch("select * from clarion.attempts where job_id = $1 order by ended_at", job_id)

    async def job(self, job_id: UUID) -> Job:
        """The job as the store shows it, wherever it lives."""
        job = await self.store.get_job(job_id)
        assert job is not None
        return job

    async def events(self, job_id: UUID) -> list[tuple[str, str, str]]:
        """What happened to the job besides its attempts: event, actor, and the state it was in then."""
        return [(item.event, item.actor, item.state) for item in await self.store.list_events(job_id)]

    async def everything(self) -> asyncpg.Record:
        """All rows of all jobs, to see that nothing changed."""
        (row,) = await self.fetch(EVERYTHING)
        return row

    async def age(self, job_id: UUID, seconds: float) -> None:
        """Makes the job older, its place in line, its lease and its deadlines with it."""
        await self.fetch(
            """
            update clarion.jobs set
              created_at = created_at - d, run_at = run_at - d, sort_key = sort_key - d,
              started_at = started_at - d, lease_expires_at = lease_expires_at - d, died_at = died_at - d,
              start_by = start_by - d, finish_by = finish_by - d
            from make_interval(secs => $2::float8) as d where id = $1
            """,
            job_id,
            seconds,
        )

    async def wear(self, job_id: UUID) -> None:
        """Makes it a job that has been through much."""
        await self.fetch(
            """
            update clarion.jobs set
              errors = 1, crashes = 2, snoozes = 3, generation = 2, log_lines = 4, error_type = 'Oops',
              progress = '{"current": 1}', checkpoint = '{"at": 1}', started_at = coalesce(started_at, now())
            where id = $1
            """,
            job_id,
        )

    async def expire(self, job_id: UUID) -> None:
        """Lets the job's lease run out."""
        await self.fetch(
            "update clarion.jobs set lease_expires_at = clock_timestamp() - interval '1 s' where id = $1", job_id
        )

    async def make_due(self, job_id: UUID) -> None:
        """Lets a scheduled job's time come, and promotes it."""
        await self.fetch("update clarion.jobs set run_at = now() - interval '1 s' where id = $1", job_id)
        await self.store.promote_jobs()

    async def lose(self, lease: Lease) -> Lease:
        """Lets the lease run out and another worker claim the job; the other's lease."""
        await self.expire(lease.id)
        await self.store.reap_jobs()
        (other,) = await self.claim(worker_id=uuid4(), queue=lease.queue)
        assert other.id == lease.id
        return other

    async def cancel(self, job_id: UUID, *, store: Store | None = None) -> Cancelling:
        (answer,) = await (store or self.store).cancel_jobs([job_id], actor=ACTOR)
        return answer

    async def retry(self, job_id: UUID, *, store: Store | None = None, delay_seconds: float = 0) -> Requeued:
        (answer,) = await (store or self.store).retry_jobs([job_id], [delay_seconds], actor=ACTOR)
        return answer

    async def change(self, job_id: UUID, *, version: str | None = None, **values: Any) -> Requeued | None:
        """Changes these columns of a job that waits."""
        change = JobChange(names=frozenset(values), **values)
        return await self.store.change_job(job_id, change, version=version, actor=ACTOR)

    async def attempt(self, verb: str, lease: Lease, *, store: Store | None = None) -> Answer:
        """What the store answers to one call of this verb; falsy when the lease is lost.

        True where a beat took, False where its row was locked; what an ending made of the job.
        """
        (answer,) = await attempt_all(store or self.store, verb, [lease])
        return answer

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A second client; what it has not committed when this context ends is undone."""
        async with Session.open(self.settings) as session:
            yield session


class Session:
    """One connection in one open transaction; an Executor whose work nobody sees until `commit`."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record], settings: Settings) -> None:
        self.connection = connection
        self.store = Store(self, settings)
        self._transaction = connection.transaction()

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Session]:
        connection = await asyncpg.connect(**connect_options(settings, name="test session"))
        session = cls(connection, settings)
        await session._transaction.start()
        try:
            yield session
            if connection.is_in_transaction():
                await session.rollback()
        finally:
            connection.terminate()

    async def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        with translated_errors():
            return await self.connection.fetch(sql, *args)

    async def commit(self) -> None:
        await self._transaction.commit()

    async def rollback(self) -> None:
        await self._transaction.rollback()

    async def until_it_blocks_another(self) -> None:
        """Returns when another session waits for a lock that this one holds."""
        pid = self.connection.get_server_pid()
        blocked = "select 1 from pg_stat_activity where $1 = any(pg_blocking_pids(pid))"
        while not await self.connection.fetch(blocked, pid):
            await anyio.lowlevel.checkpoint()


async def attempt_all(store: Store, verb: str, leases: list[Lease]) -> list[Answer]:
    """One call of this verb for several leases: an answer each, in order."""
    match verb:
        case "complete":
            completed = await store.complete_jobs([Completion(item.id, item.token, '{"n": 1}') for item in leases])
            return [answer.state for answer in completed]
        case "fail":
            return [answer.state for answer in await store.fail_jobs([failure(item) for item in leases])]
        case "snooze":
            snoozings = [Snoozing(item.id, item.token, 60) for item in leases]
            return [answer.state for answer in await store.snooze_jobs(snoozings)]
        case "release":
            released, _ = await store.release_jobs([Release(item.id, item.token) for item in leases])
            return [answer.state for answer in released]
        case "log":
            return [*await store.record_logs([line(item) for item in leases])]
        case "heartbeat":
            beats = [beat(item) for item in leases]
        case "progress":
            beats = [beat(item, progress='{"current": 1}', checkpoint='{"at": 1}') for item in leases]
        case _:
            raise AssertionError(verb)
    extended = {answer.token: answer.extended for answer in await store.heartbeat_jobs(beats)}
    return [extended.get(item.token) for item in leases]


def failure(lease: Lease, **options: Any) -> Failure:
    """The record of an error in this attempt."""
    return Failure(id=lease.id, token=lease.token, **{"error_type": "Oops", "error_message": "no luck"} | options)


def beat(lease: Lease, **options: Any) -> Beat:
    """A wish to hold this lease for longer."""
    return Beat(id=lease.id, token=lease.token, **options)


def line(lease: Lease, n: int = 1, **options: Any) -> LogLine:
    """A log line of this attempt."""
    return LogLine(id=lease.id, token=lease.token, n=n, **{"level": "info", "message": f"line {n}"} | options)


def with_token(lease: Lease, token: UUID) -> Lease:
    """The same job under another token."""
    return msgspec.structs.replace(lease, token=token)
