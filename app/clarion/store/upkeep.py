"""What the maintenance and the start of a process ask."""

from collections.abc import Sequence
from uuid import UUID

import msgspec

from clarion.execution import Ready, Reaped, Release
from clarion.job import Expired
from clarion.store.statement_runner import StatementRunner


class Ground(msgspec.Struct, frozen=True):
    """What the database says about itself at start-up."""

    fsync: bool
    read_only: bool
    server_version: int
    synchronous_commit: bool
    schema_version: int | None
    unlogged_tables: list[str]
    missing_unique_indexes: list[str]


class Upkeep(StatementRunner):
    """Idempotent steps that skip what another process is at, and what start-up looks at."""

    async def promote_jobs(self) -> dict[str, Ready]:
        """Makes due jobs ready; what became ready in each queue."""
        rows = await self._fetch("promote_jobs", self._settings.step_max_jobs)
        return {row["queue"]: Ready(row["jobs"], row["earliest"]) for row in rows}

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

    async def expire_jobs(self) -> list[Expired]:
        """Makes jobs dead that wait past their deadlines: a page of them."""
        rows = await self._fetch("expire_jobs", self._settings.step_max_jobs)
        return [Expired(*row) for row in rows]

    async def prune_workers(self, *, unseen_seconds: float) -> int:
        """Takes workers off the list that were not seen lately; how many."""
        return len(await self._fetch("prune_workers", unseen_seconds, self._settings.step_max_jobs))

    async def prune_attempts(self) -> int:
        """Deletes attempts past retention whose jobs are no longer live; how many."""
        return len(await self._fetch("prune_attempts", self._settings.history_days, self._settings.step_max_jobs))

    async def prune_events(self) -> int:
        """Deletes events past retention whose jobs are no longer live; how many."""
        return len(await self._fetch("prune_events", self._settings.history_days, self._settings.step_max_jobs))

    async def prune_logs(self) -> int:
        """Deletes log lines past retention whose jobs are no longer live; how many."""
        return len(await self._fetch("prune_logs", self._settings.history_days, self._settings.step_max_jobs))

    async def prune_idempotency_keys(self) -> int:
        """Deletes idempotency keys whose time is over; how many."""
        return len(await self._fetch("prune_idempotency_keys", self._settings.step_max_jobs))

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
