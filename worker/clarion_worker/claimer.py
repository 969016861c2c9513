"""Keeps the slots full: claims when a ring says so, when a slot frees, and now and then without being told.

`hungry` holds the queues that may have work. A ring adds its queues, if this worker is meant (`peers.py`) or has no
room now; a claim takes its queues out, and puts those back that gave all they were asked for, since they may have more.
So a busy worker needs no rings: each freed slot claims at once from a queue that may have more. And an idle one claims
nothing but in a slow, jittered sweep of all queues. Busy ones sweep as well: a queue whose ring was lost must not wait
until another has run dry.

Each claim begins where the last one ended (`clarion/watermark.py`), unless a ring named an earlier place. The sweep
looks from the start.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from uuid import UUID

import anyio
import msgspec
import structlog

from clarion.dealing import deal
from clarion.events import Event
from clarion.execution import Lease, Place, Policy, Ready, Share
from clarion.loops import Signal, jittered
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring
from clarion.watermark import Watermarks
from clarion_worker.peers import Peers

log = structlog.get_logger()

_LAST_CLAIM_SECONDS = 2.0
# For how long after a claim without an answer the server may still come to run it.
_UNANSWERED_SECONDS = 120.0
# After which somebody looks who heard a ring that meant others.
_DOUBT_SECONDS = 1.0
_NEVER = float("inf")


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """Who claims, from which queues, and which tasks, each with the policy for jobs that bring none."""

    worker_id: UUID
    queues: Sequence[str]
    policies: Mapping[str, Policy]


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """Where claimed jobs go.

    `free` says how many may be taken, `known_tokens` which leases are held; `start` is handed each new one, with the
    monotonic time at which the claim was sent.
    """

    free: Callable[[], int]
    known_tokens: Callable[[], list[UUID]]
    start: Callable[[Lease, float], None]


class Claimer:
    """Claims for one worker."""

    def __init__(
        self, store: Store, settings: Settings, *, subscription: Subscription, slots: Slots, peers: Peers
    ) -> None:
        self._store = store
        self._settings = settings
        self._subscription = subscription
        self._queues = set(subscription.queues)
        self._slots = slots
        self._peers = peers
        self._watermarks = Watermarks()
        self._hungry: set[str] = set()
        # This worker's share of what was announced since the last claim of a queue; and what it has to pass on if it
        # has no room, with the hops so far.
        self._told: dict[str, float] = {}
        self._owed: dict[str, tuple[Ready, int]] = {}
        # Queues that were rung for others, and when to make sure.
        self._doubted: set[str] = set()
        self._doubt_at = _NEVER
        self._sweep_at = 0.0
        self._unanswered_until = 0.0
        self._turn = 0
        self._claiming: anyio.CancelScope | None = None
        self.wake = Signal()

    def hear(self, ring: Ring) -> None:
        """Somebody made jobs ready."""
        for queue in ring.queues.keys() & self._queues:
            self._watermarks.heard(queue, ring.queues[queue].earliest)
            has_room = self._slots.free() > 0
            if self._peers.is_meant(queue, ring):
                self._follow(queue, ring)
                self.wake.set()
            elif not has_room:
                self._hungry.add(queue)
            elif self._peers.doubts(queue):
                self._doubt(queue)
            if not has_room:
                self._pass_on()

    def look_everywhere(self) -> None:
        """Rings may have been missed: every queue may have work, anywhere in its line."""
        self._look_from_the_start()
        # Whoever connects at the same time as everybody else is not to sweep at the same time for ever.
        self._sweep_at = time.monotonic() + self._settings.sweep_seconds * random.random()  # noqa: S311  no secret
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
        """One claim for all free slots, if some queue may have work. Answers how long to sleep when nobody calls."""
        if time.monotonic() < self._unanswered_until:
            await self._release_unanswered()
        self._make_sure()
        free = self._slots.free()
        if free <= 0:
            self._pass_on()
        if free <= 0 or not self._hungry:
            return self._pause_seconds()
        self._turn += 1
        claim_max = deal(free, self._hungry, turn=self._turn)
        self._hungry -= claim_max.keys()
        # Never cancelled half-way: a claim whose answer is thrown away strands its jobs until the leases run out.
        with anyio.CancelScope(shield=True) as self._claiming:
            await self._claim(claim_max)
        return 0 if self._hungry and self._slots.free() > 0 else self._pause_seconds()

    def _follow(self, queue: str, ring: Ring) -> None:
        ready = ring.queues[queue]
        self._hungry.add(queue)
        self._told[queue] = self._told.get(queue, 0) + self._peers.share(queue, ring)
        if self._peers.is_to_pass_on(queue, ring):
            owed, hops = self._owed.get(queue, (ready, ring.hops))
            self._owed[queue] = ready.together(owed) if queue in self._owed else ready, min(hops, ring.hops)

    def _pass_on(self) -> None:
        """Calls others for the jobs that this worker has no room for."""
        for queue, (ready, hops) in self._owed.items():
            self._peers.call(queue, ready, hops=hops + 1)
        self._owed.clear()

    def _doubt(self, queue: str) -> None:
        self._doubted.add(queue)
        if self._doubt_at == _NEVER:
            self._doubt_at = time.monotonic() + jittered(_DOUBT_SECONDS)
            self.wake.set()

    def _make_sure(self) -> None:
        """What was heard in vain is looked at when it is time, and everything in each sweep."""
        now = time.monotonic()
        if now >= self._doubt_at:
            self._hungry |= self._doubted
            self._doubted.clear()
            self._doubt_at = _NEVER
        if now >= self._sweep_at:
            self._look_from_the_start()
            self._sweep_at = now + jittered(self._settings.sweep_seconds)

    def _look_from_the_start(self) -> None:
        self._hungry |= self._queues
        self._watermarks.forget()

    def _pause_seconds(self) -> float:
        return max(0.0, min(self._sweep_at, self._doubt_at) - time.monotonic())

    async def _claim(self, claim_max: Mapping[str, int]) -> None:
        looks = [self._watermarks.begin(queue) for queue in claim_max]
        told = {queue: ceil(self._told.pop(queue, 0)) for queue in claim_max}
        for queue in claim_max:
            self._owed.pop(queue, None)
        self._doubted -= claim_max.keys()
        sent = time.monotonic()
        try:
            taken = await self._store.claim_jobs(
                [self._share(look.queue, claim_max[look.queue], look.earliest) for look in looks],
                self._subscription.policies,
            )
        except BaseException:
            for look in looks:
                self._watermarks.lose(look)
            self._hungry |= claim_max.keys()
            self._unanswered_until = time.monotonic() + _UNANSWERED_SECONDS
            raise
        for look, leases in zip(looks, taken, strict=True):
            self._watermarks.end(look, leases, claim_max[look.queue])
        for lease in sorted([lease for leases in taken for lease in leases], key=lambda lease: lease.place_in_line):
            self._slots.start(lease, sent)
        self._call_others({look.queue: leases for look, leases in zip(looks, taken, strict=True)}, claim_max, told)

    def _share(self, queue: str, jobs_max: int, earliest: Place | None) -> Share:
        return Share(
            queue=queue,
            jobs_max=jobs_max,
            worker_id=self._subscription.worker_id,
            lease_seconds=self._settings.lease_seconds,
            earliest=earliest,
        )

    def _call_others(
        self, taken: Mapping[str, Sequence[Lease]], claim_max: Mapping[str, int], told: Mapping[str, int]
    ) -> None:
        """Notes which queues may have more; where that is news, and the slots are full, others are to look."""
        for queue, leases in taken.items():
            if len(leases) < claim_max[queue]:
                self._peers.note_empty(queue)
                continue
            self._hungry.add(queue)
            if self._slots.free() <= 0 and len(leases) > told[queue]:
                self._peers.call(queue, Ready(len(leases), leases[-1].sort_key))

    async def _release_unanswered(self) -> None:
        """Hands back what a claim took whose answer was lost; no claim of this worker is under way meanwhile."""
        found = await self._store.release_unanswered_jobs(self._subscription.worker_id, self._slots.known_tokens())
        if not found:
            return
        for queue, ready in found.items():
            self._watermarks.heard(queue, ready.earliest)
            if self._slots.free() <= 0:  # else the claim that follows tells others what it leaves
                self._peers.call(queue, ready)
        self._hungry |= found.keys()
        log.warning(Event.CLAIM_RELEASED, jobs=sum(ready.jobs for ready in found.values()))
