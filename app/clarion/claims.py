"""Claims that wait for jobs, however many, without a connection each: the hub behind `POST /v1/leases`.

Everybody looks when he comes. Who finds nothing stands in the line of each of his queues until a ring says that so many
jobs became ready in one. The ring is dealt out from the head of the line: each gets a *hint* of as many jobs as he
takes, until none are left; the others sleep on. Waking everybody for each job would cost a claim apiece: with 1,000
in line a thousand statements, of which 999 find nothing.

A hint is used up by jobs that were found. What is left of it goes on to others: when its owner leaves before he looked
(time is up, client gone, served from another queue), when he took all that he wanted, and when he found less than that.
In the last case there is nothing left for his tasks, so it goes to somebody with other tasks, or nowhere.

Rings can be lost. So after each LISTEN, and in a jittered sweep, the heads of all lines get a hint of unknown size: who
finds all he wanted passes it on to two others, so that a backlog wakes all it needs, and none costs one claim a queue.

Those who look at the same time share a statement (`clarion/joint_claims.py`).
"""

import heapq
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from operator import attrgetter
from uuid import UUID

import anyio
import msgspec

from clarion.dealing import deal
from clarion.errors import Overloaded, Unavailable
from clarion.execution import Lease, Ready
from clarion.joint_claims import JointClaims, Tasks, Want
from clarion.loops import Signal, jittered, run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring

_NO_TASKS: frozenset[str] = frozenset()


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker wants: up to `jobs_max` jobs of these queues, which differ; of any task where `tasks` is None."""

    worker_id: UUID
    queues: Sequence[str]
    tasks: Tasks
    jobs_max: int
    lease_seconds: float


class _Hint(msgspec.Struct, frozen=True):
    """So many jobs may be ready in a queue, infinity if nobody knows; those of the tasks `tried` are gone already."""

    jobs: float
    tried: frozenset[str] = _NO_TASKS


class _Waiter:
    """Somebody in line, who came as the `place`-th; `hints` are those he has not followed yet."""

    __slots__ = ("ask", "hints", "patience", "place", "wake")

    def __init__(self, ask: Ask, place: int, patience: anyio.CancelScope) -> None:
        self.ask = ask
        self.place = place
        self.patience = patience
        self.hints = dict.fromkeys(ask.queues, _Hint(0))
        self.wake = Signal()

    async def woken(self, gone: Callable[[], Awaitable[None]]) -> None:
        """Waits for a hint; the claimant's patience ends when he is gone."""

        async def watch() -> None:
            await gone()
            self.patience.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await self.wake.wait()
            group.cancel_scope.cancel()


class Claims:
    """The claims of one process, `waiting` of them in line; without `run` and rings, who waits is served by no one."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._joint = JointClaims(store, settings)
        self._waiters_max = settings.waiters_max
        self._sweep_seconds = settings.sweep_seconds
        # By queue and, since workers of one sort are many, by tasks; who came first at the head.
        self._lines: dict[str, dict[Tasks, dict[_Waiter, None]]] = {}
        self._places = count()
        self._turn = 0
        self._closed = False
        self.waiting = 0

    async def claim(
        self,
        ask: Ask,
        *,
        wait_seconds: float = 0,
        looking: Callable[[], None] = lambda: None,
        gone: Callable[[], Awaitable[None]] = anyio.sleep_forever,
    ) -> list[Lease]:
        """Leases in the order of the line; none when nothing came in time, or after `close`.

        `looking` is called before each look: no lease began before the last of these calls. `gone` returns when the
        claimant has gone away, and does nothing irrevocable before: it is started and cancelled with each wait, which
        it ends.

        Raises Overloaded when too many wait already, Unavailable in weather. When it is cancelled, a claim under way
        still comes to its end, and the leases are answered: whoever cancelled must hand them back.
        """
        looking()
        if not wait_seconds:
            return (await self._take(ask, ask.queues))[0]
        with anyio.move_on_after(wait_seconds) as patience, self._in_line(ask, patience) as waiter:
            while not (leases := await self._follow_hints(waiter)):
                await waiter.woken(gone)
                looking()
            return leases
        return []

    def hear(self, ring: Ring) -> None:
        """Somebody made jobs ready."""
        self.expect(ring.queues)
        for queue, ready in ring.queues.items():
            self._tell(queue, _Hint(ready.jobs))

    def expect(self, ready: Mapping[str, Ready]) -> None:
        """Jobs became ready here, and the ring that wakes those who wait for them is on its way.

        So whoever claims here after an enqueue was answered here sees its job, also one that goes before all others.
        The claims of other processes learn it by the ring, within some 10 ms when all is well.
        """
        self._joint.expect(ready)

    def look_everywhere(self) -> None:
        """Rings may have been missed: every queue may have work."""
        self._joint.look_everywhere()
        for queue in self._lines:
            self._tell(queue, _Hint(math.inf))

    def close(self) -> None:
        """Lets everybody go, now and from now on: shutdown has begun."""
        self._closed = True
        for queue in self._lines:
            for waiter in self._line(queue):
                waiter.patience.cancel()

    async def run(self) -> None:
        """Claims and sweeps until it is cancelled; a sweep asks nothing while nobody waits."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._joint.run)
            await run_forever(self._sweep, name="claims")

    async def _sweep(self) -> float:
        self.look_everywhere()
        return jittered(self._sweep_seconds)

    @contextmanager
    def _in_line(self, ask: Ask, patience: anyio.CancelScope) -> Iterator[_Waiter]:
        """In line before the first look, so that a ring which comes during it is heard."""
        if self.waiting >= self._waiters_max:
            raise Overloaded(f"{self._waiters_max} requests are waiting for jobs already")
        waiter = _Waiter(ask, next(self._places), patience)
        if self._closed:
            patience.cancel()
        self.waiting += 1
        for queue in ask.queues:
            self._lines.setdefault(queue, {}).setdefault(ask.tasks, {})[waiter] = None
        try:
            yield waiter
        finally:
            self.waiting -= 1
            for queue in ask.queues:
                self._leave_line(queue, waiter)
            for queue, hint in waiter.hints.items():
                self._tell(queue, hint)

    def _leave_line(self, queue: str, waiter: _Waiter) -> None:
        lines, tasks = self._lines[queue], waiter.ask.tasks
        del lines[tasks][waiter]
        if not lines[tasks]:
            del lines[tasks]
        if not lines:
            del self._lines[queue]

    def _line(self, queue: str, tried: frozenset[str] = _NO_TASKS) -> Iterator[_Waiter]:
        """Those in line who take tasks besides the tried ones, who came first at the head."""
        lines = self._lines.get(queue, {}).items()
        fitting = [line for tasks, line in lines if tasks is None or not tasks <= tried]
        return heapq.merge(*fitting, key=attrgetter("place"))

    def _tell(self, queue: str, hint: _Hint, *, lookers: int = 1) -> None:
        """Deals a hint out to those whom it may help, from the head of the line; one of unknown size to `lookers`."""
        unknown = math.isinf(hint.jobs)
        left = lookers if unknown else hint.jobs
        for waiter in self._line(queue, hint.tried):
            if left <= 0:
                return
            if queue not in waiter.hints:
                part = 1 if unknown else min(left, waiter.ask.jobs_max)
                waiter.hints[queue] = hint if unknown else _Hint(part, hint.tried)
                waiter.wake.set()
                left -= part

    async def _follow_hints(self, waiter: _Waiter) -> list[Lease]:
        """Looks where the hints point, and passes on what is left of them; in weather they are lost until the sweep."""
        hints, waiter.hints = waiter.hints, {}
        if not hints:
            return []
        leases, emptied = await self._take(waiter.ask, hints)
        found = Counter(lease.queue for lease in leases)
        for queue, hint in hints.items():
            left = hint.jobs - found[queue]
            if queue not in emptied:
                self._tell(queue, _Hint(left, hint.tried), lookers=2)
            elif waiter.ask.tasks is not None:
                self._tell(queue, _Hint(left, hint.tried | waiter.ask.tasks))
        return leases

    async def _take(self, ask: Ask, queues: Collection[str]) -> tuple[list[Lease], set[str]]:
        """Claims until there is enough or nothing more; also the queues that have nothing more."""
        leases: list[Lease] = []
        hungry, emptied = set(queues), set[str]()
        # Never cancelled half-way: a claim whose answer is thrown away strands its jobs until the leases run out.
        with anyio.CancelScope(shield=True):
            while hungry and len(leases) < ask.jobs_max:
                self._turn += 1
                claim_max = deal(ask.jobs_max - len(leases), hungry, turn=self._turn)
                want = Want(worker_id=ask.worker_id, claim_max=claim_max, lease_seconds=ask.lease_seconds)
                try:
                    found = await self._joint.claim(ask.tasks, want)
                except Unavailable:
                    if not leases:
                        raise
                    break  # whoever has some jobs by now must hear of them
                leases += found
                given = Counter(lease.queue for lease in found)
                emptied |= {queue for queue, most in claim_max.items() if given[queue] < most}
                hungry -= emptied
        return sorted(leases, key=lambda lease: (lease.sort_key, lease.id)), emptied
