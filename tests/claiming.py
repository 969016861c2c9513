"""Workers without handlers: they claim as real ones do, and hold what they get until the test says otherwise."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeAlias
from uuid import UUID, uuid4

import anyio

from clarion.db import Database
from clarion.execution import Lease, Policy, Share, WorkerRecord
from clarion.loops import run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Listener, Ring
from clarion_worker.claimer import Claimer, Slots, Subscription
from clarion_worker.peers import Peers
from recording import RecordingRinger

TASK = "t"
Send: TypeAlias = Callable[[], Awaitable[None]]


class CountingStore(Store):
    """Keeps the shares of each claim statement."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.claims: list[Sequence[Share]] = []

    async def claim_jobs(self, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        self.claims.append(shares)
        return await super().claim_jobs(shares, policies)


class DisturbedStore(Store):
    """A store whose rings somebody meddles with: `disturb` gets what would send each."""

    def __init__(self, database: Database, settings: Settings, disturb: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__(database, settings)
        self._disturb = disturb

    async def ring(self, channel: str, payloads: Sequence[str]) -> None:
        await self._disturb(partial(super().ring, channel, payloads))


class Holder:
    """One such worker; `ringer` keeps what it would tell others."""

    def __init__(
        self, store: Store, settings: Settings, *, queues: Sequence[str] = ("default",), slots: int = 1
    ) -> None:
        self.id: UUID = uuid4()
        self.slots = slots
        self.queues = list(queues)
        self.held: list[Lease] = []
        self.on_start: Callable[[Lease], None] = lambda _lease: None
        self.ringer = RecordingRinger(store, settings)
        self.peers = Peers(self.ringer, settings)
        self._store = store
        self.claimer = Claimer(
            store,
            settings,
            subscription=Subscription(worker_id=self.id, queues=self.queues, policies={TASK: Policy()}),
            slots=Slots(
                free=lambda: self.slots - len(self.held),
                known_tokens=lambda: [lease.token for lease in self.held],
                start=self._start,
            ),
            peers=self.peers,
        )

    def _start(self, lease: Lease, _sent: float) -> None:
        self.held.append(lease)
        self.on_start(lease)

    def record(self, *, version: str = "1", tasks: Sequence[str] = (TASK,), state: str = "running") -> WorkerRecord:
        """What its heartbeats say of it."""
        return WorkerRecord(
            id=self.id,
            name="holder",
            version=version,
            queues=self.queues,
            tasks=list(tasks),
            concurrency=self.slots,
            running=len(self.held),
            state=state,
        )

    async def beat(self) -> None:
        """One heartbeat: says what it does, and learns of the others."""
        await self._store.record_worker(self.record())
        self.peers.learn(await self._store.find_standings(self.id, gone_seconds=60))

    async def settle(self) -> None:
        """Claims until it has nothing to look for or no room."""
        while await self.claimer.step() == 0:
            pass


async def beat_all(holders: Sequence[Holder]) -> None:
    """All know all: the second round sees everybody who came in the first."""
    for _ in range(2):
        for holder in holders:
            await holder.beat()


@asynccontextmanager
async def at_work(settings: Settings, holders: Sequence[Holder]) -> AsyncIterator[None]:
    """The holders' loops, behind one LISTEN connection for all of them; once each has looked for the first time."""
    connected = anyio.Event()

    def hear(ring: Ring) -> None:
        for holder in holders:
            holder.claimer.hear(ring)

    for holder in holders:
        await holder.settle()
    async with anyio.create_task_group() as group:
        group.start_soon(Listener(settings, on_ring=hear, on_connect=connected.set).run)
        await connected.wait()
        for holder in holders:
            group.start_soon(partial(run_forever, holder.claimer.step, name="claim", wake=holder.claimer.wake))
            group.start_soon(partial(run_forever, holder.ringer.step, name="ring"))
        yield
        group.cancel_scope.cancel()
