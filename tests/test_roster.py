"""The roster: who works over HTTP, written down for many workers at once."""

from collections.abc import Awaitable, Sequence
from uuid import UUID, uuid4

import anyio
import msgspec
import pytest

from clarion.db import Database
from clarion.execution import Directive, WorkerRecord
from clarion.roster import Roster
from clarion.settings import Settings
from clarion.store import Store
from store_actions import Session


class Watched(Store):
    """Notes how many workers each statement records."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.recorded: list[int] = []

    async def record_workers(self, workers: Sequence[WorkerRecord]) -> list[Directive]:
        self.recorded.append(len(workers))
        return await super().record_workers(workers)


@pytest.fixture
def store(database: Database, settings: Settings) -> Watched:
    return Watched(database, settings)


@pytest.fixture
def roster(store: Watched, settings: Settings) -> Roster:
    return Roster(store, msgspec.structs.replace(settings, batch_max=500))


def claimant(worker_id: UUID, *queues: str) -> WorkerRecord:
    return WorkerRecord(
        id=worker_id, name="box", version="http", queues=[*queues], tasks=["a b", 'c"'], concurrency=4, running=0,
        state="running",
    )  # fmt: skip


def beating(worker_id: UUID, *, running: int) -> WorkerRecord:
    return WorkerRecord(
        id=worker_id, name="unnamed", version="http", queues=[], tasks=[], concurrency=0, running=running,
        state="running",
    )  # fmt: skip


async def together(roster: Roster, *calls: Awaitable[Directive]) -> list[Directive]:
    """The answers to calls that stand in line before the first flush."""
    told: dict[int, Directive] = {}

    async def note(place: int, call: Awaitable[Directive]) -> None:
        told[place] = await call

    async with anyio.create_task_group() as group:
        async with anyio.create_task_group() as callers:
            for place, call in enumerate(calls):
                callers.start_soon(note, place, call)
            group.start_soon(roster.run)
        group.cancel_scope.cancel()
    return [told[place] for place in range(len(calls))]


async def test_workers_that_call_at_once_are_recorded_in_one_statement(roster: Roster, store: Watched) -> None:
    ids = [uuid4() for _ in range(20)]
    claims = [roster.note_claim(claimant(worker_id, "a", "b")) for worker_id in ids[:10]]
    await together(roster, *claims, *[roster.note_heartbeat(beating(worker_id, running=2)) for worker_id in ids[10:]])
    assert store.recorded == [20]
    workers = {worker.id: worker for worker in await store.list_workers(limit=100)}
    assert [workers[worker_id].queues for worker_id in ids] == [["a", "b"]] * 10 + [[]] * 10
    assert [workers[worker_id].running for worker_id in ids] == [0] * 10 + [2] * 10
    assert workers[ids[0]].tasks == ["a b", 'c"']


async def test_each_is_told_what_is_meant_for_it(store: Watched, settings: Settings) -> None:
    ids = [uuid4() for _ in range(5)]
    batching = msgspec.structs.replace(settings, batch_max=500)
    for expected in (Directive.OK, Directive.DRAIN):
        roster = Roster(store, batching)
        told = await together(roster, *[roster.note_heartbeat(beating(worker_id, running=1)) for worker_id in ids])
        assert told == [Directive.OK] * 3 + [expected, Directive.OK]
        assert await store.drain_worker(ids[3])


async def test_what_a_worker_says_twice_at_once_is_kept_both_times(roster: Roster, store: Watched) -> None:
    worker_id = uuid4()
    await together(
        roster,
        roster.note_claim(claimant(worker_id, "a")),
        roster.note_heartbeat(beating(worker_id, running=3)),
        roster.note_heartbeat(beating(uuid4(), running=1)),
    )
    assert store.recorded == [2]
    worker = next(worker for worker in await store.list_workers(limit=100) if worker.id == worker_id)
    assert (worker.name, worker.queues, worker.concurrency, worker.running) == ("box", ["a"], 4, 3)


async def test_a_worker_that_beats_before_it_claims_is_known_by_its_claim(roster: Roster, store: Watched) -> None:
    worker_id = uuid4()
    await store.record_worker(beating(worker_id, running=1))
    await together(roster, roster.note_claim(claimant(worker_id, "a")))
    (worker,) = await store.list_workers(limit=100)
    assert (worker.name, worker.queues, worker.tasks, worker.concurrency) == ("box", ["a"], ["a b", 'c"'], 4)


async def test_a_locked_row_holds_up_nobody(roster: Roster, store: Watched, settings: Settings) -> None:
    ids = [uuid4() for _ in range(4)]
    for worker_id in ids:
        await store.record_worker(beating(worker_id, running=0))
    async with Session.open(settings) as session:
        await session.fetch("update clarion.workers set directive = 'drain' where id = $1", ids[1])
        told = await together(roster, *[roster.note_heartbeat(beating(worker_id, running=5)) for worker_id in ids])
        assert told == [Directive.OK] * 4
        await session.commit()
    running = {worker.id: worker.running for worker in await store.list_workers(limit=100)}
    assert [running[worker_id] for worker_id in ids] == [5, 0, 5, 5]
    assert await store.record_worker(beating(ids[1], running=5)) is Directive.DRAIN
