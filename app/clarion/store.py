"""The only caller of SQL about jobs: one method per file in `sql/queries`, of the same name.

Every method takes a set and answers in the order of its input where the file says so. All raise `Unavailable` for
weather and `Unstorable` for a value that Postgres refuses; then the whole set is undone.
"""

from collections.abc import Mapping, Sequence
from uuid import UUID

import asyncpg
import msgspec

from clarion.db import Executor
from clarion.job import (
    Completion,
    Enqueued,
    Failure,
    Heartbeat,
    Job,
    JobFilter,
    JobSummary,
    Lease,
    NewJob,
    Policy,
    Reaped,
    Release,
    Snoozing,
    WorkerRecord,
)  # fmt: skip
from clarion.settings import Settings
from clarion.statements import statement


class Ground(msgspec.Struct, frozen=True):
    """What the database says about itself at start-up."""

    fsync: bool
    read_only: bool
    server_version: int
    synchronous_commit: bool
    schema_version: int | None
    unlogged_tables: list[str]
    missing_unique_indexes: list[str]


class Store:
    """Jobs in Postgres, as sets."""

    def __init__(self, database: Executor, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    async def enqueue_jobs(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        """Adds jobs; one answer each, in order."""
        rows = await self._fetch(
            "enqueue_jobs",
            *_columns(
                jobs, "queue", "task", "args", "priority", "run_at", "delay_seconds",
                "max_attempts", "timeout_seconds", "backoff_seconds", "backoff_cap_seconds",
            ),
        )  # fmt: skip
        return [Enqueued(*row) for row in rows]

    async def claim_jobs(
        self,
        worker_id: UUID,
        claim_max: Mapping[str, int],
        policies: Mapping[str, Policy],
        *,
        lease_seconds: float,
    ) -> list[Lease]:
        """Takes up to `claim_max[queue]` jobs from each queue, of the tasks in `policies`; in no particular order."""
        rows = await self._fetch(
            "claim_jobs",
            worker_id,
            lease_seconds,
            list(claim_max),
            list(claim_max.values()),
            list(policies),
            *_columns(
                list(policies.values()),
                "max_attempts",
                "timeout_seconds",
                "backoff_seconds",
                "backoff_cap_seconds",
            ),
        )
        return [Lease(*row) for row in rows]

    async def heartbeat_jobs(self, leases: Sequence[Release], *, lease_seconds: float) -> list[Heartbeat]:
        """Extends leases; one answer for each that is still held, in no particular order."""
        rows = await self._fetch("heartbeat_jobs", *_columns(leases, "id", "token"), lease_seconds)
        return [Heartbeat(*row) for row in rows]

    async def complete_jobs(self, completions: Sequence[Completion]) -> list[bool]:
        """Finishes jobs; True for each that this token finished, False where the lease is lost."""
        rows = await self._fetch("complete_jobs", *_columns(completions, "id", "token", "result"))
        return [row["completed"] for row in rows]

    async def fail_jobs(self, failures: Sequence[Failure]) -> list[str | None]:
        """Ends attempts that went wrong; the state each job is in now, None where the lease is lost."""
        settings = self._settings
        rows = await self._fetch(
            "fail_jobs",
            *_columns(
                failures, "id", "token", "outcome", "error_type", "error_message", "error_trace",
                "retry_in_seconds", "dead_reason",
            ),
            settings.max_attempts,
            settings.backoff_seconds,
            settings.backoff_cap_seconds,
        )  # fmt: skip
        return [row["state"] for row in rows]

    async def snooze_jobs(self, snoozings: Sequence[Snoozing]) -> list[bool]:
        """Postpones jobs; False where the lease is lost."""
        rows = await self._fetch("snooze_jobs", *_columns(snoozings, "id", "token", "delay_seconds"))
        return [row["snoozed"] for row in rows]

    async def release_jobs(self, releases: Sequence[Release]) -> tuple[list[bool], dict[str, int]]:
        """Hands jobs back; False where the lease is lost. Also how many became ready in each queue."""
        rows = await self._fetch("release_jobs", *_columns(releases, "id", "token"))
        return [row["released"] for row in rows], _count([row["queue"] for row in rows if row["queue"]])

    async def release_unanswered_jobs(self, worker_id: UUID, known_tokens: Sequence[UUID]) -> dict[str, int]:
        """Hands back jobs that the worker holds without knowing; how many became ready in each queue."""
        rows = await self._fetch("release_unanswered_jobs", worker_id, list(known_tokens))
        return _count([row["queue"] for row in rows])

    async def promote_jobs(self) -> dict[str, int]:
        """Makes due jobs ready; how many in each queue."""
        rows = await self._fetch("promote_jobs", self._settings.step_max_jobs)
        return {row["queue"]: row["jobs"] for row in rows}

    async def next_due_seconds(self) -> float | None:
        """Seconds until the next scheduled job is due, negative when late; None when there is none."""
        rows = await self._fetch("next_due_seconds")
        return rows[0]["seconds"] if rows else None

    async def reap_jobs(self, *, only: Sequence[UUID] | None = None) -> list[Reaped]:
        """Takes jobs back whose leases ran out: a page of them, or `only` some."""
        settings = self._settings
        rows = await self._fetch(
            "reap_jobs",
            settings.step_max_jobs,
            settings.max_crashes,
            settings.max_attempts,
            settings.backoff_seconds,
            settings.backoff_cap_seconds,
            settings.lease_seconds,
            None if only is None else list(only),
        )
        return [Reaped(*row) for row in rows]

    async def find_expired(self) -> list[Release]:
        """The jobs that `reap_jobs` would take, by id and token."""
        rows = await self._fetch("find_expired", self._settings.step_max_jobs, self._settings.lease_seconds)
        return [Release(*row) for row in rows]

    async def park_jobs(self, job: Release) -> bool:
        """Takes a job that `reap_jobs` cannot handle out of its way, for ever; False if its token is gone."""
        return bool(await self._fetch("park_jobs", job.id, job.token))

    async def get_job(self, job_id: UUID) -> Job | None:
        """One job whole, live or in the history."""
        rows = await self._fetch("get_job", job_id)
        return Job(*rows[0]) if rows else None

    async def list_jobs(self, where: JobFilter, *, limit: int) -> list[JobSummary]:
        """Up to `limit` jobs, newest first."""
        rows = await self._fetch(
            "list_jobs", where.state, where.queue, where.task, where.created_after, where.created_before,
            where.before_id, limit,
        )  # fmt: skip
        return [JobSummary(*row) for row in rows]

    async def find_finished(self, job_ids: Sequence[UUID]) -> set[UUID]:
        """Those of the jobs that no run is planned for any more."""
        rows = await self._fetch("find_finished", list(job_ids))
        return {row["id"] for row in rows}

    async def record_worker(self, worker: WorkerRecord) -> None:
        """Says that a worker is alive."""
        await self._fetch("record_worker", *msgspec.structs.astuple(worker))

    async def remove_worker(self, worker_id: UUID) -> None:
        """Takes a worker that stops by itself off the list."""
        await self._fetch("remove_worker", worker_id)

    async def prune_workers(self, *, unseen_seconds: float) -> int:
        """Takes workers off the list that were not seen lately; how many."""
        return len(await self._fetch("prune_workers", unseen_seconds, self._settings.step_max_jobs))

    async def prune_attempts(self) -> int:
        """Deletes attempts past retention whose jobs are no longer live; how many."""
        return len(await self._fetch("prune_attempts", self._settings.history_days, self._settings.step_max_jobs))

    async def create_history_partitions(self, *, days_ahead: int) -> int:
        """Makes the history's partitions up to some days ahead; how many were missing."""
        rows = await self._fetch("create_history_partitions", days_ahead)
        return int(rows[0]["created"])

    async def drop_history_partitions(self) -> list[str]:
        """Drops the history's partitions past retention; their names."""
        rows = await self._fetch("drop_history_partitions", self._settings.history_days)
        return [row["name"] for row in rows]

    async def ring(self, channel: str, payloads: Sequence[str]) -> None:
        """Sends notifications, each payload under 8,000 bytes."""
        await self._fetch("ring", channel, list(payloads))

    async def has_migrations(self) -> bool:
        """Whether this database was ever migrated."""
        rows = await self._fetch("has_migrations")
        return bool(rows[0]["present"])

    async def read_ground(self) -> Ground:
        """What start-up checks, of a database that `has_migrations`."""
        rows = await self._fetch("read_ground")
        return Ground(*rows[0])

    async def _fetch(self, name: str, *args: object) -> list[asyncpg.Record]:
        return await self._database.fetch(statement(name), *args)


def _columns(items: Sequence[msgspec.Struct], *names: str) -> list[list[object]]:
    """The items as one array per field, the shape that `unnest` takes."""
    return [[getattr(item, name) for item in items] for name in names]


def _count(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in set(names)}
