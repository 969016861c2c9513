"""One slot of a worker, on a real database: claims, runs and reports jobs in the caller's own task, in fixed order."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import UnsetType

from clarion.db import open_database
from clarion.execution import Lease
from clarion.job import JobChange, JobFilter, JobState, JobSummary
from clarion.settings import Settings
from clarion.store import Store
from clarion_worker.registry import Worker
from clarion_worker.testing.attempts import Attempts, open_attempts, open_states
from clarion_worker.testing.runs import HandlerRun

# Who asks, in the timeline of a job.
ACTOR = "test"
NOW = JobChange(names=frozenset({"delay_seconds"}), delay_seconds=0)
_PAGE_JOBS = 500


class Slot:
    """Takes the jobs of a worker one at a time: from its first queue that has any, the head of the line."""

    def __init__(
        self, worker: Worker, store: Store, attempts: Attempts, settings: Settings, *, queues: Sequence[str]
    ) -> None:
        self._worker_id = uuid4()
        self._policies = {name: task.policy for name, task in worker.tasks.items()}
        self._queues = queues
        self._store = store
        self._attempts = attempts
        self._settings = settings

    async def catch_up(self) -> None:
        """Does what the maintenance would have done by now: due jobs become ready, late ones dead."""
        while await self._store.expire_jobs():
            pass
        while await self._store.promote_jobs():
            pass

    async def run_next(self, *, report: bool = True) -> HandlerRun[Any] | None:
        """Runs the next job; None if none is ready. Unless it is to report, the job stays running, as after a crash."""
        lease = await self._claim()
        if lease is None:
            return None
        held = self._attempts.hold(lease)
        outcome, run = await self._attempts.run(held)
        if report:
            await self._attempts.finish(held, outcome)
        return await self._as_recorded(run)

    async def make_next_due(self) -> bool:
        """Lets the time come of the jobs that are due next; False if none are scheduled."""
        scheduled = [
            job
            for queue in self._queues
            for job in await find_jobs(self._store, JobFilter(state=JobState.SCHEDULED, queue=queue))
            if job.task in self._policies
        ]
        moment = min((job.run_at for job in scheduled), default=None)
        for job in scheduled:
            if job.run_at == moment:
                await self._store.change_job(job.id, NOW, version=None, actor=ACTOR)
        return bool(scheduled)

    async def _claim(self) -> Lease | None:
        for queue in self._queues:
            leases = await self._store.claim_for(
                self._worker_id, {queue: 1}, self._policies, lease_seconds=self._settings.lease_seconds
            )
            if leases:
                return leases[0]
        return None

    async def _as_recorded(self, run: HandlerRun[Any]) -> HandlerRun[Any]:
        """The run as everybody sees it from now on: its lease may have been lost, or its transaction rolled back."""
        attempts, job = await self._store.list_attempts(run.job_id), await self._store.get_job(run.job_id)
        if job is None or not attempts:
            return run
        last = attempts[-1]
        if last.outcome is None:
            return msgspec.structs.replace(run, state=job.state)
        return msgspec.structs.replace(
            run,
            state=job.state,
            dead_reason=job.dead_reason,
            outcome=last.outcome,
            error_type=last.error_type,
            error_message=last.error_message,
            error_trace=last.error_trace,
            result_json=job.result,
        )


@asynccontextmanager
async def open_slot(
    worker: Worker, settings: Settings, *, queues: Sequence[str], state: Any | UnsetType
) -> AsyncIterator[Slot]:
    """A slot with what its handlers share."""
    async with open_database(settings, name="testing") as database, open_states(worker.tasks, state) as states:
        store = Store(database, settings)
        async with open_attempts(worker.tasks, store, settings, states) as attempts:
            slot = Slot(worker, store, attempts, settings, queues=queues or worker.queues())
            await slot.catch_up()
            yield slot


async def find_jobs(store: Store, where: JobFilter) -> list[JobSummary]:
    """All such jobs, oldest first."""
    found: list[JobSummary] = []
    while page := await store.list_jobs(where, limit=_PAGE_JOBS):
        found += page
        where = msgspec.structs.replace(where, before_id=page[-1].id)
    return found[::-1]
