"""What people and programs want to know of jobs."""

from collections.abc import Sequence
from uuid import UUID

from clarion.execution import Attempt, StoredLine, WorkerSeen
from clarion.job import DeadFilter, DeadGroup, Happening, Job, JobFilter, JobSummary
from clarion.store.statement_runner import StatementRunner


class Reading(StatementRunner):
    """Questions; none changes anything."""

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

    async def find_states(self, job_ids: Sequence[UUID]) -> dict[UUID, str]:
        """What each job is now; one that does not exist is not in it."""
        rows = await self._fetch("find_states", list(job_ids))
        return {row["id"]: row["state"] for row in rows}

    async def list_attempts(self, job_id: UUID) -> list[Attempt]:
        """Every attempt of a job, in order."""
        rows = await self._fetch("list_attempts", job_id)
        return [Attempt(*row) for row in rows]

    async def list_events(self, job_id: UUID) -> list[Happening]:
        """What happened to a job besides its attempts, in order."""
        rows = await self._fetch("list_events", job_id)
        return [Happening(*row) for row in rows]

    async def list_logs(self, job_id: UUID, *, after: int | None, limit: int) -> list[StoredLine]:
        """Up to `limit` log lines of a job, in order, from the one after `after`."""
        rows = await self._fetch("list_logs", job_id, after, limit)
        return [StoredLine(*row) for row in rows]

    async def find_dead(self, where: DeadFilter, *, limit: int) -> list[JobSummary]:
        """Up to `limit` dead jobs, those that died first at the head."""
        died_at, job_id = where.after or (None, None)
        rows = await self._fetch(
            "find_dead", where.queue, where.task, where.error_type, where.dead_reason, where.died_after,
            where.died_before, died_at, job_id, limit,
        )  # fmt: skip
        return [JobSummary(*row) for row in rows]

    async def group_dead(self, *, queue: str | None, limit: int) -> list[DeadGroup]:
        """The dead jobs by task, error and reason, the largest groups first."""
        rows = await self._fetch("group_dead", queue, limit)
        return [DeadGroup(*row) for row in rows]

    async def list_workers(self, *, limit: int) -> list[WorkerSeen]:
        """Up to `limit` workers that were seen lately, the youngest first."""
        rows = await self._fetch("list_workers", limit)
        return [WorkerSeen(*row) for row in rows]
