"""What those who run jobs ask: claim, heartbeat, the ends of attempts. All but the claim are fenced by the token."""

from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter
from uuid import UUID

import msgspec

from clarion.execution import (
    Beat,
    Claimed,
    Completed,
    Completion,
    Directive,
    Ended,
    Failure,
    Heartbeat,
    Lease,
    LogLine,
    Place,
    Policy,
    Ready,
    Release,
    Share,
    Snoozing,
    Standing,
    WorkerRecord,
    ready_by_queue,
)
from clarion.store.statement_runner import StatementRunner, columns

_ANY_TASK = {"": Policy()}
_place = attrgetter("place")


class Execution(StatementRunner):
    """A job's run, from claim to end."""

    async def claim_jobs(self, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        """Takes ready jobs for any number of claimants at once: one list per share, in the order of the line.

        Only of the tasks in `policies`; None takes any task, and leaves policies to the settings. Who stands first
        among the shares of a queue gets its first jobs, and is the last to go without.
        """
        chosen = _ANY_TASK if policies is None else policies
        rows = await self._fetch(
            "claim_jobs",
            *_queues(shares),
            *_places(shares),
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
        taken: list[list[Lease]] = [[] for _ in shares]
        for lease in sorted([Claimed(*row) for row in rows], key=_place):
            taken[lease.share - 1].append(lease)
        return taken

    async def claim_for(
        self,
        worker_id: UUID,
        claim_max: Mapping[str, int],
        policies: Mapping[str, Policy] | None,
        *,
        lease_seconds: float,
    ) -> list[Lease]:
        """The same for one claimant: up to `claim_max[queue]` jobs from each queue, queue by queue."""
        shares = [
            Share(queue=queue, jobs_max=most, worker_id=worker_id, lease_seconds=lease_seconds)
            for queue, most in claim_max.items()
        ]
        return [lease for leases in await self.claim_jobs(shares, policies) for lease in leases]

    async def heartbeat_jobs(self, beats: Sequence[Beat]) -> list[Heartbeat]:
        """Extends leases; one answer for each that is still held, in no particular order."""
        rows = await self._fetch(
            "heartbeat_jobs", *columns(beats, "id", "token", "lease_seconds", "progress", "checkpoint")
        )
        return [Heartbeat(*row) for row in rows]

    async def extend_leases(self, leases: Sequence[Lease]) -> list[Heartbeat]:
        """Extends leases by as much as their claims asked for; one answer for each that is still held.

        Raises Locked, and has done nothing, where another session keeps a row locked: `heartbeat_jobs` passes over it.
        """
        ordered = sorted(leases, key=attrgetter("id"))
        rows = await self._fetch("extend_leases", *columns(ordered, "id", "token"))
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

    async def release_jobs(self, releases: Sequence[Release]) -> tuple[list[Ended], dict[str, Ready]]:
        """Hands jobs back; one answer each, in order. Also what became ready in each queue."""
        rows = await self._fetch("release_jobs", *columns(releases, "id", "token"))
        ready = ready_by_queue((row["queue"], row["sort_key"]) for row in rows)
        return [Ended(row["state"], None) for row in rows], ready

    async def release_unanswered_jobs(self, worker_id: UUID, known_tokens: Sequence[UUID]) -> dict[str, Ready]:
        """Hands back jobs that the worker holds without knowing; what became ready in each queue."""
        rows = await self._fetch("release_unanswered_jobs", worker_id, list(known_tokens))
        return ready_by_queue((row["queue"], row["sort_key"]) for row in rows)

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
        return (await self.record_workers([worker]))[0]

    async def record_workers(self, workers: Sequence[WorkerRecord]) -> list[Directive]:
        """The same of many, which are distinct; one answer each, in order."""
        rows = await self._fetch(
            "record_workers",
            *columns(workers, "id", "name", "version"),
            [msgspec.json.encode(worker.queues).decode() for worker in workers],
            [msgspec.json.encode(worker.tasks).decode() for worker in workers],
            *columns(workers, "concurrency", "running", "state"),
        )
        told = {row["id"]: Directive(row["directive"]) for row in rows}
        return [told[worker.id] for worker in workers]

    async def find_standings(self, worker_id: UUID, *, gone_seconds: float) -> list[Standing]:
        """Where a worker stands among those that hear the rings of its queues; not seen for so long, one is gone."""
        rows = await self._fetch("find_standings", worker_id, gone_seconds)
        return [Standing(*row) for row in rows]

    async def remove_worker(self, worker_id: UUID) -> None:
        """Takes a worker that stops by itself off the list."""
        await self._fetch("remove_worker", worker_id)


def _queues(shares: Sequence[Share]) -> list[list[object]]:
    """Each queue once: its name, how many jobs all its shares want, and the least of their bounds, if all have one."""
    asked: dict[str, tuple[int, Place | None]] = {}
    for share in shares:
        most, earliest = asked.get(share.queue, (0, share.earliest))
        least = None if earliest is None or share.earliest is None else min(earliest, share.earliest)
        asked[share.queue] = most + share.jobs_max, least
    places = [place or (None, None) for _, place in asked.values()]
    return [
        list(asked),
        [most for most, _ in asked.values()],
        [key for key, _ in places],
        [job_id for _, job_id in places],
    ]


def _places(shares: Sequence[Share]) -> list[list[object]]:
    """For each share its queue, its first and last place in what is taken from it, its worker and its lease."""
    taken: Counter[str] = Counter()
    firsts, lasts = [], []
    for share in shares:
        firsts.append(taken[share.queue] + 1)
        taken[share.queue] += share.jobs_max
        lasts.append(taken[share.queue])
    queues, worker_ids, leases_seconds = columns(shares, "queue", "worker_id", "lease_seconds")
    return [queues, list(firsts), list(lasts), worker_ids, leases_seconds]
