"""Workers behind the HTTP API, as people see them: what their claims and heartbeats say goes to the list of workers."""

import time
from collections.abc import Sequence
from uuid import UUID

import msgspec

from clarion.batcher import Batcher
from clarion.execution import Directive, WorkerRecord
from clarion.settings import Settings
from clarion.store import Store

# A worker that claims again and again without a heartbeat, since it holds nothing, is recorded so often.
_CLAIM_EVERY_SECONDS = 10.0
_SEEN_MAX = 10_000


class _Seen(msgspec.Struct, frozen=True):
    at: float
    running: int
    directive: Directive


class Roster:
    """What this process has recorded lately of whom; `run` must be running, unless each record is its own statement."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._records: Batcher[WorkerRecord, Directive] = Batcher(
            self._flush, batch_max=settings.batch_max, buffer_max=settings.enqueue_buffer_max_jobs
        )
        self._seen: dict[UUID, _Seen] = {}

    async def run(self) -> None:
        """Serves the others until it is cancelled."""
        await self._records.run()

    async def note_claim(self, worker: WorkerRecord) -> Directive:
        """Records a worker that asks for jobs, unless it was recorded just now; what it is told to do.

        How many it runs its heartbeats say.
        """
        seen = self._seen.get(worker.id)
        if seen and time.monotonic() < seen.at + _CLAIM_EVERY_SECONDS:
            return seen.directive
        return await self._record(msgspec.structs.replace(worker, running=seen.running if seen else 0))

    async def note_heartbeat(self, worker: WorkerRecord) -> Directive:
        """Records a worker that says what it runs; what it is told to do."""
        return await self._record(worker)

    async def _record(self, worker: WorkerRecord) -> Directive:
        directive = await self._records.submit(worker)
        self._seen.pop(worker.id, None)
        self._seen[worker.id] = _Seen(time.monotonic(), worker.running, directive)
        if len(self._seen) > _SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        return directive

    async def _flush(self, workers: Sequence[WorkerRecord]) -> list[Directive]:
        latest: dict[UUID, WorkerRecord] = {}
        for worker in workers:
            latest[worker.id] = _together(latest.get(worker.id), worker)
        told = dict(zip(latest, await self._store.record_workers(list(latest.values())), strict=True))
        return [told[worker.id] for worker in workers]


def _together(before: WorkerRecord | None, now: WorkerRecord) -> WorkerRecord:
    """What a worker said twice, as one record: a heartbeat names no queues, and leaves what a claim has said."""
    if before is None or now.queues:
        return now
    return msgspec.structs.replace(before, running=now.running, state=now.state)
