"""Keeps the slots full: claims when a ring says so, when a slot frees, and now and then without being told.

`hungry` holds the queues that may have work. A ring adds its queues; a claim takes its queues out, and puts those back
that gave all they were asked for, since they may have more. So a busy worker needs no rings (each freed slot claims at
once from a queue known to be full), and an idle one claims nothing but in a slow, jittered sweep.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

import anyio
import msgspec
import structlog

from clarion.dealing import deal
from clarion.events import Event
from clarion.execution import Lease, Policy
from clarion.loops import Signal, jittered
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring

log = structlog.get_logger()

_LAST_CLAIM_SECONDS = 2.0
# For how long after a claim without an answer the server may still come to run it.
_UNANSWERED_SECONDS = 120.0


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """Who claims, from which queues, and which tasks, each with the policy for jobs that bring none."""

    worker_id: UUID
    queues: Sequence[str]
    policies: Mapping[str, Policy]


class Claimer:
    """Claims for one worker.

    `free_slots` says how many jobs may be taken, `known_tokens` which leases are held; `start` is handed each new one.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        subscription: Subscription,
        free_slots: Callable[[], int],
        known_tokens: Callable[[], list[UUID]],
        start: Callable[[Lease, float], None],
    ) -> None:
        self._store = store
        self._settings = settings
        self._subscription = subscription
        self._queues = set(subscription.queues)
        self._free_slots = free_slots
        self._known_tokens = known_tokens
        self._unanswered_until = 0.0
        self._start = start
        self._hungry: set[str] = set()
        self._turn = 0
        self._claiming: anyio.CancelScope | None = None
        self.wake = Signal()

    def hear(self, ring: Ring) -> None:
        """Somebody made jobs ready."""
        rung = ring.queues.keys() & self._queues
        if rung:
            self._hungry |= rung
            self.wake.set()

    def look_everywhere(self) -> None:
        """Rings may have been missed: every queue may have work."""
        self._hungry |= self._queues
        self.wake.set()

    def slot_freed(self) -> None:
        """An attempt ended; worth a claim when some queue may have more."""
        if self._hungry:
            self.wake.set()

    def hurry(self) -> None:
        """The process is stopping: a claim under way gets a moment to be answered, and no longer."""
        if self._claiming is not None:
            self._claiming.deadline = anyio.current_time() + _LAST_CLAIM_SECONDS

    async def step(self) -> float:
        """One claim for all free slots. Answers how long to sleep when nobody calls: the sweep."""
        if time.monotonic() < self._unanswered_until:
            await self._release_unanswered()
        free = self._free_slots()
        if free <= 0:
            return jittered(self._settings.sweep_seconds)
        if not self._hungry:
            self.look_everywhere()
        self._turn += 1
        claim_max = deal(free, self._hungry, turn=self._turn)
        self._hungry -= claim_max.keys()
        # Never cancelled half-way: a claim whose answer is thrown away strands its jobs until the leases run out.
        with anyio.CancelScope(shield=True) as self._claiming:
            await self._claim(claim_max)
        return 0 if self._hungry and self._free_slots() > 0 else jittered(self._settings.sweep_seconds)

    async def _claim(self, claim_max: Mapping[str, int]) -> None:
        sent = time.monotonic()
        try:
            leases = await self._store.claim_jobs(
                self._subscription.worker_id,
                claim_max,
                self._subscription.policies,
                lease_seconds=self._settings.lease_seconds,
            )
        except BaseException:
            self._hungry |= claim_max.keys()
            self._unanswered_until = time.monotonic() + _UNANSWERED_SECONDS
            raise
        claimed = Counter(lease.queue for lease in leases)
        self._hungry |= {queue for queue, most in claim_max.items() if claimed[queue] >= most}
        for lease in sorted(leases, key=lambda lease: (lease.sort_key, lease.id)):
            self._start(lease, sent)

    async def _release_unanswered(self) -> None:
        """Hands back what a claim took whose answer was lost; no claim of this worker is under way meanwhile."""
        ready = await self._store.release_unanswered_jobs(self._subscription.worker_id, self._known_tokens())
        if ready:
            self._hungry |= ready.keys()
            log.warning(Event.CLAIM_RELEASED, jobs=sum(ready.values()))
