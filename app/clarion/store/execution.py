"""What those who run jobs ask: claim, heartbeat, the ends of attempts. All but the claim are fenced by the token."""

from collections.abc import Mapping, Sequence
from uuid import UUID

import msgspec

from clarion.execution import (
    Beat,
    Completed,
    Completion,
    Directive,
    Ended,
    Failure,
    Heartbeat,
    Lease,
    LogLine,
    Policy,
    Release,
    Snoozing,
    WorkerRecord,
)
from clarion.store.statement_runner import StatementRunner, columns, count

_ANY_TASK = {"": Policy()}


class Execution(StatementRunner):
    """A job's run, from claim to end."""

    async def claim_jobs(
        self,
        worker_id: UUID,
        claim_max: Mapping[str, int],
        policies: Mapping[str, Policy] | None,
        *,
        lease_seconds: float,
    ) -> list[Lease]:
        """Takes up to `claim_max[queue]` jobs from each queue, in no particular order.

        Only of the tasks in `policies`; None takes any task, and leaves policies to the settings.
        """
        chosen = _ANY_TASK if policies is None else policies
        rows = await self._fetch(
            "claim_jobs",
            worker_id,
            lease_seconds,
            list(claim_max),
            list(claim_max.values()),
            list(chosen),
            *columns(
                list(chosen.values()),
                "max_attempts",
                "timeout_seconds",
                "backoff_seconds",
                "backoff_cap_seconds",
            ),
            policies is None,
        )
        return [Lease(*row) for row in rows]

    async def heartbeat_jobs(self, beats: Sequence[Beat]) -> list[Heartbeat]:
        """Extends leases; one answer for each that is still held, in no particular order."""
        rows = await self._fetch(
            "heartbeat_jobs", *columns(beats, "id", "token", "lease_seconds", "progress", "checkpoint")
        )
        return [Heartbeat(*row) for row in rows]

    async def complete_jobs(self, completions: Sequence[Completion]) -> list[Completed]:
        """Finishes jobs; one answer each, in order."""
        rows = await self._fetch("complete_jobs", *columns(completions, "id", "token", "result", "key"))
        return [Completed(*row) for row in rows]

    async def find_endings(self, attempts: Sequence[Release]) -> dict[UUID, str]:
        """What those attempts made of their jobs that their own workers have ended: the job's state, by token."""
        rows = await self._fetch("find_endings", *columns(attempts, "id", "token"))
        return {row["token"]: row["state"] for row in rows if row["state"] is not None}

    async def fail_jobs(self, failures: Sequence[Failure]) -> list[Ended]:
        """Ends attempts that went wrong; one answer each, in order."""
        settings = self._settings
        rows = await self._fetch(
            "fail_jobs",
            *columns(
                failures, "id", "token", "outcome", "error_type", "error_message", "error_trace",
                "retry_in_seconds", "dead_reason",
            ),
            settings.max_attempts,
            settings.backoff_seconds,
            settings.backoff_cap_seconds,
        )  # fmt: skip
        return [Ended(*row) for row in rows]

    async def snooze_jobs(self, snoozings: Sequence[Snoozing]) -> list[Ended]:
        """Postpones jobs; one answer each, in order."""
        rows = await self._fetch(
            "snooze_jobs", *columns(snoozings, "id", "token", "delay_seconds", "counted"), self._settings.max_snoozes
        )
        return [Ended(*row) for row in rows]

    async def release_jobs(self, releases: Sequence[Release]) -> tuple[list[Ended], dict[str, int]]:
        """Hands jobs back; one answer each, in order. Also how many became ready in each queue."""
        rows = await self._fetch("release_jobs", *columns(releases, "id", "token"))
        return [Ended(row["state"], None) for row in rows], count([row["queue"] for row in rows])

    async def release_unanswered_jobs(self, worker_id: UUID, known_tokens: Sequence[UUID]) -> dict[str, int]:
        """Hands back jobs that the worker holds without knowing; how many became ready in each queue."""
        rows = await self._fetch("release_unanswered_jobs", worker_id, list(known_tokens))
        return count([row["queue"] for row in rows])

    async def record_logs(self, lines: Sequence[LogLine]) -> list[bool | None]:
        """Keeps log lines; False for one beyond the job's limit, None where the lease is lost; in order."""
        rows = await self._fetch(
            "record_logs",
            *columns(lines, "id", "token", "n", "level", "message", "fields"),
            self._settings.job_log_max_lines,
        )
        return [row["kept"] for row in rows]

    async def record_worker(self, worker: WorkerRecord) -> Directive:
        """Says that a worker is alive; what it is told to do."""
        rows = await self._fetch("record_worker", *msgspec.structs.astuple(worker))
        return Directive(rows[0]["directive"])

    async def remove_worker(self, worker_id: UUID) -> None:
        """Takes a worker that stops by itself off the list."""
        await self._fetch("remove_worker", worker_id)
