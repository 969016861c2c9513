"""What people and programs ask of jobs: add, cancel, run again, change."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import msgspec

from clarion.errors import Unavailable
from clarion.job import Cancelling, Enqueued, JobChange, NewJob, Requeued
from clarion.store.statement_runner import StatementRunner, columns


class _Added(msgspec.Struct, frozen=True, gc=False):
    """A row of `enqueue_jobs`, which leaves out the moments that are the same for most; `moment` is in the first."""

    id: UUID
    state: str
    created_at: datetime | None
    run_at: datetime | None
    request: str | None
    sort_key: datetime | None
    moment: datetime | None

    def enqueued(self, moment: datetime) -> Enqueued:
        """The answer, all moments told."""
        run_at = self.run_at or moment
        if self.created_at is not None or not self.state:
            return Enqueued(self.id, self.state, self.created_at or moment, run_at, self.request, None)
        return Enqueued(self.id, self.state, moment, run_at, self.request, self.sort_key or run_at)


class Commands(StatementRunner):
    """Everything that a request may do to jobs."""

    async def enqueue_jobs(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        """Adds jobs; one answer each, in order. A key that is known already adds none: its first answer is repeated.

        Raises Unavailable, and adds nothing, when a key's time ran out at this very moment.
        """
        rows = await self._fetch(
            "enqueue_jobs",
            *columns(
                jobs, "queue", "task", "args", "priority", "run_at", "delay_seconds",
                "max_attempts", "timeout_seconds", "backoff_seconds", "backoff_cap_seconds",
                "start_by", "start_within_seconds", "total_timeout_seconds", "enqueued_by", "key", "request",
            ),
            self._settings.idempotency_ttl_seconds,
        )  # fmt: skip
        added = [_Added(*row).enqueued(rows[0]["moment"]) for row in rows]
        if not all(job.id for job in added):
            raise Unavailable("an idempotency key ran out while it was looked up: try again")
        return added

    async def cancel_jobs(self, job_ids: Sequence[UUID], *, actor: str, reason: str | None = None) -> list[Cancelling]:
        """Cancels what waits or is dead, and asks the workers of what runs; one answer each, in order."""
        rows = await self._fetch("cancel_jobs", list(job_ids), actor, reason)
        return [Cancelling(*row) for row in rows]

    async def retry_jobs(
        self,
        job_ids: Sequence[UUID],
        delays_seconds: Sequence[float],
        *,
        actor: str,
        reason: str | None = None,
        only_dead: bool = False,
        generation: int | None = None,
    ) -> list[Requeued]:
        """Runs jobs again, each after its delay; one answer each, in order. The ids are distinct.

        With a generation, only those that are in it.
        """
        rows = await self._fetch(
            "retry_jobs", list(job_ids), list(delays_seconds), only_dead, actor, reason, generation
        )
        return [Requeued(*row) for row in rows]

    async def change_job(self, job_id: UUID, change: JobChange, *, version: str | None, actor: str) -> Requeued | None:
        """Changes a job that waits; None when it does not, or is not of this version."""
        rows = await self._fetch(
            "change_job", job_id, version, actor, sorted(change.names), change.queue, change.priority, change.run_at,
            change.max_attempts, change.timeout_seconds, change.backoff_seconds, change.backoff_cap_seconds,
            change.total_timeout_seconds, change.start_by, change.args, change.delay_seconds,
        )  # fmt: skip
        return Requeued(*rows[0]) if rows else None

    async def drain_worker(self, worker_id: UUID) -> bool:
        """Tells a worker to finish what it runs and exit; False when there is no such worker."""
        return bool(await self._fetch("drain_worker", worker_id))
