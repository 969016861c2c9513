"""Enqueueing as a service does it: single jobs coalesced into sets, and a ring after their commit."""

from collections import Counter
from collections.abc import Sequence

from clarion.batcher import Batcher
from clarion.job import Enqueued, JobState, NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer


class Enqueuer:
    """Adds jobs and wakes whoever can run them; `run` must be running for `enqueue_one`."""

    def __init__(self, store: Store, ringer: Ringer, settings: Settings) -> None:
        self._store = store
        self._ringer = ringer
        self._batcher: Batcher[NewJob, Enqueued] = Batcher(
            self.enqueue, batch_max=settings.batch_max_jobs, buffer_max=settings.enqueue_buffer_max_jobs
        )

    async def enqueue_one(self, job: NewJob) -> Enqueued:
        """Adds a job, together with those of other callers; returns after its commit."""
        return await self._batcher.submit(job)

    async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        """Adds all jobs or none, in one statement; returns after its commit."""
        added = await self._store.enqueue_jobs(jobs)
        pairs = list(zip(jobs, added, strict=True))
        ready = Counter(job.queue for job, answer in pairs if answer.state == JobState.READY)
        self._ringer.mark(ready, scheduled=any(answer.state == JobState.SCHEDULED for _, answer in pairs))
        return added

    async def run(self) -> None:
        """Serves `enqueue_one` until it is cancelled."""
        await self._batcher.run()
