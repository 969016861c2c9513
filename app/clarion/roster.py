"""Workers behind the HTTP API, as people see them: what their claims and heartbeats say goes to the list of workers."""

import time
from uuid import UUID

import msgspec

from clarion.execution import Directive, WorkerRecord
from clarion.store import Store

# A worker that claims again and again without a heartbeat, since it holds nothing, is recorded so often.
_CLAIM_EVERY_SECONDS = 10.0
_SEEN_MAX = 10_000


class _Seen(msgspec.Struct, frozen=True):
    at: float
    running: int
    directive: Directive


class Roster:
    """What this process has recorded lately of whom."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[UUID, _Seen] = {}

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
        directive = await self._store.record_worker(worker)
        self._seen.pop(worker.id, None)
        self._seen[worker.id] = _Seen(time.monotonic(), worker.running, directive)
        if len(self._seen) > _SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        return directive
