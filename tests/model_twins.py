"""A store and a model that are told the same: each call is made of one and foretold by the other, and both compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from copy import deepcopy
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from clarion.db import Executor
from clarion.job import JobState
from clarion.settings import Settings
from clarion.store import Store
from job_model import WAITING, JobModel, Limits, Span

# A moment of the model that is so near may be over in the database, or not.
NEAR_SECONDS = 5.0
# Each job's rows, wherever they are: one that stands in both tables, or in neither, is seen.
ROWS = """
    with rows as (
      select
        'jobs' as place, j.id, j.state::text as state, j.generation, j.attempt, j.errors, j.crashes, j.snoozes,
        j.max_attempts, j.priority, j.dead_reason::text as dead_reason, j.cancel_requested_at is not null as asked,
        j.lease_token as token, j.worker_id as worker, j.checkpoint::text as checkpoint, j.log_lines as lines,
        null as result, null as key, extract(epoch from j.run_at - clock_timestamp())::float8 as runs_in,
        extract(epoch from j.lease_expires_at - clock_timestamp())::float8 as held_for
      from clarion.jobs as j
      union all
      select
        'job_history', h.id, h.state::text, h.generation, h.attempt, h.errors, h.crashes, h.snoozes,
        h.max_attempts, h.priority, null, false,
        null, null, h.checkpoint::text, h.log_lines,
        h.result::text, h.completion_key, null, null
      from clarion.job_history as h
    )
    select r.*,
      array(select (a.outcome, a.state)::text from clarion.attempts as a where a.job_id = r.id) as attempts,
      array(select e.event::text from clarion.job_events as e where e.job_id = r.id order by e.id) as events,
      (select count(*) from clarion.job_logs as l where l.job_id = r.id) as kept
    from rows as r
    order by r.id
"""
AGE = """
    update clarion.jobs set
      run_at = run_at - d, sort_key = sort_key - d, started_at = started_at - d,
      lease_expires_at = lease_expires_at - d, start_by = start_by - d, finish_by = finish_by - d
    from make_interval(secs => $2::float8) as d where id = $1
"""
WAIT = """
    update clarion.jobs
    set run_at = now() + make_interval(secs => $2::float8), sort_key = now() + make_interval(secs => $2::float8)
    where id = $1
"""
LIMITS = Limits()
TABLES = ("jobs", "job_history", "attempts", "job_events", "job_logs", "idempotency_keys")


def tightened(settings: Settings) -> Settings:
    """Settings with the limits that the model has: so low that a few calls reach them."""
    return msgspec.structs.replace(
        settings,
        max_attempts=LIMITS.max_attempts,
        max_crashes=LIMITS.max_crashes,
        max_snoozes=LIMITS.max_snoozes,
        backoff_seconds=LIMITS.backoff_seconds,
        backoff_cap_seconds=LIMITS.backoff_cap_seconds,
        job_log_max_lines=LIMITS.log_max_lines,
        # The reaper's grace for leases from before the start of Postgres, which jobs that were aged seem to be.
        lease_seconds=0,
    )


class Call(msgspec.Struct, frozen=True):
    """One call of the store, and what the model foretells; `foretell` is given the answer for the ids in it.

    `skips` is the answer of one that passes over rows which another session has locked, instead of waiting. `gives_up`
    is that of one that waited and then finds its job in neither table, since it moved meanwhile: it did nothing.
    """

    name: str
    make: Callable[[Store], Awaitable[Any]]
    foretell: Callable[[World, Any], Any]
    skips: Any = None
    gives_up: Any = None


class World(msgspec.Struct):
    """All jobs of a model, and what was answered that is to be answered again: to keyed enqueues, of next runs."""

    limits: Limits
    jobs: dict[UUID, JobModel] = {}
    keys: dict[str, UUID] = {}
    next_runs: dict[tuple[str, UUID], datetime | None] = {}

    def copy(self) -> World:
        return deepcopy(self)


class Twins:
    """The two, with everything that was ever answered."""

    def __init__(self, database: Executor, settings: Settings) -> None:
        self.database = database
        self.store = Store(database, settings)
        self.world = World(LIMITS)

    async def forget(self) -> None:
        """Deletes every job of either."""
        for table in TABLES:
            await self.database.fetch(f"delete from clarion.{table}")
        self.world = World(LIMITS)

    async def tell(self, call: Call, store: Store | None = None) -> Any:
        """Makes the call, and holds its answer against the model's."""
        answer = await call.make(store or self.store)
        foretold = call.foretell(self.world, answer)
        assert answer == foretold, f"{call.name} was answered {answer}, not {foretold}"
        return answer

    async def pass_time(self, job_id: UUID, seconds: float) -> None:
        """Makes a job older, its leases and deadlines with it."""
        await self.database.fetch(AGE, job_id, float(seconds))
        self.world.jobs[job_id].pass_time(seconds)

    async def leave_nothing_to_chance(self) -> None:
        """Makes waits that were drawn as long as they may be, and lets moments pass in which something is to change."""
        for job_id, job in self.world.jobs.items():
            low, high = job.run_at
            if job.state == JobState.SCHEDULED and low != high:
                await self.database.fetch(WAIT, job_id, high - job.now)
                job.run_at = (high, high)
            while any(abs(moment - job.now) < NEAR_SECONDS for moment in job.thresholds()):
                await self.pass_time(job_id, 2 * NEAR_SECONDS)

    async def check(self) -> None:
        """Compares every row of every job."""
        differences = await self.differences(self.world)
        assert not differences, "\n".join(differences)

    async def differences(self, world: World) -> list[str]:
        """What the database and a model say differently."""
        rows = await self.database.fetch(ROWS)
        places = Counter(row["id"] for row in rows)
        found = [f"{job_id} stands in {places[job_id]} places" for job_id in world.jobs if places[job_id] != 1]
        found += [f"nobody enqueued {job_id}" for job_id in places if job_id not in world.jobs]
        for row in rows:
            if row["id"] in world.jobs:
                found += _differences(row, world.jobs[row["id"]])
        return found


def _differences(row: asyncpg.Record, job: JobModel) -> list[str]:
    succeeded = job.state == JobState.SUCCEEDED
    _, result, key = job.completion or (None, None, None)
    expected = {
        "place": "job_history" if job.is_over else "jobs",
        "state": job.state,
        "generation": job.generation,
        "attempt": job.attempt,
        "errors": job.errors,
        "crashes": job.crashes,
        "snoozes": job.snoozes,
        "max_attempts": job.max_attempts,
        "priority": job.priority,
        "dead_reason": job.dead_reason,
        "asked": job.cancel_requested,
        "token": job.token,
        "worker": job.worker,
        "checkpoint": None if succeeded else job.checkpoint,
        "kept": sum(job.lines.values()),
        "result": result if succeeded else None,
        "key": key if succeeded else None,
        "attempts": sorted(f"({outcome},{state})" for outcome, state in job.attempts),
        "events": job.events,
    }
    actual = {**row, "attempts": sorted(row["attempts"])}
    # A line beyond the limit leaves no trace but its count, so a repeated call counts it again.
    lines = list(job.lines.values())[job.earlier_lines :]
    expected["lines"] = len(lines) if all(lines) else max(len(lines), row["lines"])
    found = [f"{name} is {actual[name]}, not {value}" for name, value in expected.items() if actual[name] != value]
    found += _at_another_time("waits", row["runs_in"], job.run_at, job) if job.state in WAITING else []
    found += _at_another_time("is held", row["held_for"], (job.lease_ends,) * 2, job) if job.token else []
    return [f"{row['id']}: {text}" for text in found]


def _at_another_time(what: str, seconds: float, span: Span, job: JobModel) -> list[str]:
    low, high = (moment - job.now for moment in span)
    is_near = low - NEAR_SECONDS <= seconds <= high + NEAR_SECONDS
    return [] if is_near else [f"it {what} for {seconds} s, not for {low} to {high}"]
