"""Enqueueing as a service does it: single jobs coalesced into sets, and a ring after their commit.

Jobs with an idempotency key have a batcher of their own: a statement that runs into a key which another session is just
committing waits for it, and whoever enqueues without keys is not to wait too.
"""

from collections.abc import Awaitable, Callable, Sequence

import anyio

from clarion.batcher import Batcher
from clarion.db import Locked
from clarion.errors import IdempotencyInFlight
from clarion.execution import ready_by_queue
from clarion.job import Enqueued, JobState, NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer

Enqueue = Callable[[Sequence[NewJob]], Awaitable[Sequence[Enqueued]]]


class Enqueuer:
    """Adds jobs and wakes whoever can run them; `run` must be running for `enqueue_one`."""

    def __init__(self, store: Store, ringer: Ringer, settings: Settings) -> None:
        self._store = store
        self._ringer = ringer
        limits = {
            "batch_max": min(settings.batch_max, settings.batch_max_jobs),
            "buffer_max": settings.enqueue_buffer_max_jobs,
        }
        self._keyless: Batcher[NewJob, Enqueued] = Batcher(self._add, **limits, weigh=_weigh)
        self._keyed: Batcher[NewJob, Enqueued] = Batcher(self._add_keyed, **limits, weigh=_weigh)

    async def enqueue_one(self, job: NewJob) -> Enqueued:
        """Adds a job, together with those of other callers; returns after its commit."""
        if job.key is None:
            return await self._keyless.submit(job)
        try:
            return await self._keyed.submit(job)
        except Locked as error:
            raise _in_flight() from error

    async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        """Adds all jobs or none, in one statement; returns after its commit.

        None, with an empty state, where one has a key that stands for another request: see `enqueue_jobs`.
        """
        try:
            return await self._add(jobs)
        except Locked as error:
            if all(job.key is None for job in jobs):
                raise
            raise _in_flight() from error

    async def run(self) -> None:
        """Serves `enqueue_one` until it is cancelled."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._keyless.run)
            group.start_soon(self._keyed.run)

    async def _add(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        added = await self._store.enqueue_jobs(jobs)
        ready = ready_by_queue(
            (job.queue, answer.sort_key)
            for job, answer in zip(jobs, added, strict=True)
            if answer.state == JobState.READY
        )
        # Of a known key, the answer has no place in line.
        scheduled = any(answer.state == JobState.SCHEDULED and answer.sort_key is not None for answer in added)
        self._ringer.mark(ready, scheduled=scheduled)
        return added

    async def _add_keyed(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        try:
            return await enqueue_each(self._add, jobs)
        except Locked as error:
            if len({job.key for job in jobs}) == 1:
                # Nothing to bisect: whoever waits for this key would wait in vain, one after the other.
                raise _in_flight() from error
            raise


async def enqueue_each(enqueue: Enqueue, jobs: Sequence[NewJob]) -> list[Enqueued]:
    """Adds each job for itself: those that another's key kept out are added without it, in one more statement."""
    added = list(await enqueue(jobs))
    kept_out = [place for place, answer in enumerate(added) if not answer.state]
    if kept_out:
        again = await enqueue_each(enqueue, [jobs[place] for place in kept_out])
        for place, answer in zip(kept_out, again, strict=True):
            added[place] = answer
    return added


def _in_flight() -> IdempotencyInFlight:
    return IdempotencyInFlight("another request with this idempotency key is being committed")


def _weigh(job: NewJob) -> int:
    return len(job.args)
