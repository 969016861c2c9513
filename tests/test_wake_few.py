"""A ring wakes few of the idle workers; and whatever becomes of those few, every job starts."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from claiming import TASK, CountingStore, Holder, at_work, beat_all
from clarion.db import Database
from clarion.enqueuer import Enqueuer
from clarion.errors import Unavailable
from clarion.execution import Lease, Policy, Ready, Share, Standing
from clarion.job import NewJob
from clarion.loops import run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import HOPS_MAX, Ring, Ringer
from clarion_worker import Worker, claimer, peers
from clarion_worker.leases import Heartbeats, Leases
from running import Client, client, running_worker

worker = Worker()


@worker.task(TASK)
async def nothing() -> None: ...


NOW = datetime(2026, 1, 1, tzinfo=UTC)
FLEET = 30
# Within which what the tests wait for must have happened: much more than it takes, much less than the next sweep.
SOON_SECONDS = 10.0


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """No sweep comes to help."""
    return msgspec.structs.replace(settings, sweep_seconds=300.0)


@pytest.fixture
def store(database: Database, patient: Settings) -> CountingStore:
    return CountingStore(database, patient)


def ring(jobs: int = 1, *, point: float = 0.0, hops: int = 0, queue: str = "default") -> Ring:
    return Ring({queue: Ready(jobs, NOW)}, point=point, hops=hops)


def standing(rank: int, workers: int, *, idle: int = 1_000_000) -> Standing:
    """By default among so many idle workers that nobody makes sure."""
    return Standing("default", rank, workers, idle)


def fleet(store: CountingStore, settings: Settings, size: int, *, slots: int = 1) -> list[Holder]:
    """So many workers that know each other's ranks and have nothing to look for."""
    holders = [Holder(store, settings, slots=slots) for _ in range(size)]
    for rank, holder in enumerate(holders):
        holder.peers.learn([standing(rank, size)])
    return holders


async def settle(holders: Sequence[Holder]) -> None:
    for holder in holders:
        await holder.settle()


class Clock:
    """Stands in for the module `time`; goes on by `tick` seconds at each look."""

    def __init__(self, *, tick: float = 0) -> None:
        self.now = 1_000.0
        self._tick = tick

    def monotonic(self) -> float:
        self.now += self._tick
        return self.now


class Starts:
    """Which jobs these workers started."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        self.ids: list[UUID] = []
        self._changed = anyio.Event()
        for holder in holders:
            holder.on_start = self._note

    def _note(self, lease: Lease) -> None:
        self.ids.append(lease.id)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, job_id: UUID) -> None:
        with anyio.fail_after(SOON_SECONDS):
            while job_id not in self.ids:
                await self._changed.wait()


@asynccontextmanager
async def enqueuing(store: CountingStore, settings: Settings) -> AsyncIterator[Enqueuer]:
    ringer = Ringer(store, settings)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(run_forever, ringer.step, name="ring"))
        yield Enqueuer(store, ringer, settings)
        group.cancel_scope.cancel()


async def add(enqueuer: Enqueuer) -> UUID:
    (added,) = await enqueuer.enqueue([NewJob(task=TASK)])
    return added.id


def points() -> Iterator[float]:
    yield from (0.0, 0.017, 0.5, 0.98, 0.999999)


# -- Whom a ring means


@pytest.mark.parametrize(("jobs", "claims"), [(1, 2), (2, 2), (5, 5), (29, 29), (30, 30), (1_000, 30)])
async def test_a_ring_costs_two_claims_or_one_a_job(
    store: CountingStore, patient: Settings, jobs: int, claims: int
) -> None:
    holders = fleet(store, patient, FLEET)
    await settle(holders)
    for point in points():
        store.claims.clear()
        for holder in holders:
            holder.claimer.hear(ring(jobs, point=point))
        await settle(holders)
        assert len(store.claims) == claims


@pytest.mark.parametrize("size", [1, 2, 3, 4])
async def test_of_up_to_four_workers_all_look(store: CountingStore, patient: Settings, size: int) -> None:
    holders = fleet(store, patient, size)
    await settle(holders)
    store.claims.clear()
    for holder in holders:
        holder.claimer.hear(ring(point=0.5))
    await settle(holders)
    assert len(store.claims) == size


async def test_who_knows_nothing_of_others_looks(store: CountingStore, patient: Settings) -> None:
    holder = Holder(store, patient)
    await holder.settle()
    for known in ([], [Standing("another", 5, 30, 30)]):
        holder.peers.learn(known)
        store.claims.clear()
        holder.claimer.hear(ring(point=0.9))
        await holder.settle()
        assert len(store.claims) == 1


async def test_a_ring_for_other_queues_costs_nothing(store: CountingStore, patient: Settings) -> None:
    holder = Holder(store, patient)
    await holder.settle()
    store.claims.clear()
    holder.claimer.hear(ring(queue="another"))
    await holder.settle()
    assert not store.claims


async def test_workers_that_know_each_other_claim_a_few_times_a_job(store: CountingStore, patient: Settings) -> None:
    holders = [Holder(store, patient, slots=100) for _ in range(FLEET)]
    await beat_all(holders)
    started = Starts(holders)
    async with at_work(patient, holders), enqueuing(store, patient) as enqueuer:
        store.claims.clear()
        for _ in range(20):
            await started.until(await add(enqueuer))
        # Beside the two who are meant about two of 30 make sure, or fewer: once for all rings of a second.
        assert len(store.claims) <= 5 * 20


async def test_those_who_are_not_meant_make_sure_a_little_later(store: CountingStore, patient: Settings) -> None:
    holder, (silent,) = Holder(store, patient), await store.enqueue_jobs([NewJob(task=TASK, delay_seconds=60)])
    holder.peers.learn([standing(5, FLEET, idle=1)])
    started = Starts([holder])
    async with at_work(patient, [holder]):
        store.claims.clear()
        await store.retry_jobs([silent.id], [0], actor="test")
        for _ in range(10):
            holder.claimer.hear(ring())
        await started.until(silent.id)
    assert len(store.claims) == 1


async def test_who_looked_before_it_was_time_to_make_sure_does_not_look_again(
    store: CountingStore, patient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(claimer, "time", clock)
    holder = Holder(store, patient)
    holder.peers.learn([standing(5, FLEET, idle=1)])
    await holder.settle()
    for meant, claims in ((True, 1), (False, 1)):
        store.claims.clear()
        holder.claimer.hear(ring())
        if meant:
            holder.claimer.hear(ring(FLEET))
            await holder.settle()
        clock.now += 2
        await holder.settle()
        await holder.settle()
        assert len(store.claims) == claims


def test_about_one_of_the_idle_makes_sure_however_many_are_busy(store: CountingStore, patient: Settings) -> None:
    peers = Holder(store, patient).peers
    peers.learn([standing(5, 1_000_000, idle=1)])
    assert all(peers.doubts("default") for _ in range(20))
    peers.learn([standing(5, 1_000_000)])
    assert not all(peers.doubts("default") for _ in range(20))


async def test_worker_processes_learn_each_others_ranks_by_their_heartbeats(
    database: Database, patient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = 0
    claim_jobs = Store.claim_jobs

    async def counted(self: Store, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        nonlocal claims
        claims += 1
        return await claim_jobs(self, shares, policies)

    monkeypatch.setattr(Store, "claim_jobs", counted)
    brisk = msgspec.structs.replace(patient, lease_seconds=1.0)
    async with AsyncExitStack() as stack:
        jobs = await stack.enter_async_context(client(patient))
        for _ in range(6):
            await stack.enter_async_context(running_worker(worker, brisk))
        for _ in range(3):
            await until_all_have_beaten(jobs, 6)
        claims = 0
        for _ in range(20):
            assert (await jobs.run(NewJob(task=TASK))).state == "succeeded"
    assert claims <= 4 * 20


async def until_all_have_beaten(jobs: Client, workers: int) -> None:
    """Until so many have been seen since now."""
    (row,) = await jobs.database.fetch("select clock_timestamp() as now")
    poll = anyio.Event()
    while sum(seen.seen_at > row["now"] for seen in await jobs.store.list_workers(limit=100)) < workers:
        with anyio.move_on_after(0.01):
            await poll.wait()


# -- Workers without room


async def test_the_first_of_those_meant_passes_on_what_it_has_no_room_for(
    store: CountingStore, patient: Settings
) -> None:
    holders = fleet(store, patient, FLEET, slots=0)
    for holder in holders:
        holder.claimer.hear(ring(5))
    assert [holder.ringer.ready for holder in holders] == [[({"default": Ready(5, NOW)}, 1)], *[[]] * (FLEET - 1)]


async def test_a_worker_that_is_full_before_it_looked_passes_the_ring_on(
    store: CountingStore, patient: Settings
) -> None:
    (first, *_) = fleet(store, patient, FLEET)
    await first.settle()
    first.claimer.hear(ring(5))
    assert first.ringer.ready == []
    first.slots = 0
    await first.settle()
    assert first.ringer.ready == [({"default": Ready(5, NOW)}, 1)]


async def test_a_worker_that_has_looked_does_not_pass_the_ring_on(store: CountingStore, patient: Settings) -> None:
    (first, *_) = fleet(store, patient, FLEET)
    await first.settle()
    first.claimer.hear(ring())
    await first.settle()
    first.slots = 0
    await first.settle()
    assert first.ringer.ready == []


async def test_a_ring_that_is_passed_on_means_twice_as_many_each_time(store: CountingStore, patient: Settings) -> None:
    holders = fleet(store, patient, FLEET)
    await settle(holders)
    for hops in range(HOPS_MAX + 1):
        store.claims.clear()
        for holder in holders:
            holder.claimer.hear(ring(hops=hops))
        await settle(holders)
        assert len(store.claims) == 2 * 2**hops


async def test_a_ring_is_not_passed_on_for_ever(store: CountingStore, patient: Settings) -> None:
    (first, *_) = fleet(store, patient, FLEET, slots=0)
    first.claimer.hear(ring(hops=HOPS_MAX))
    assert first.ringer.ready == []


@pytest.mark.parametrize("jobs", [FLEET, 1_000])
async def test_a_ring_that_means_all_is_not_passed_on(store: CountingStore, patient: Settings, jobs: int) -> None:
    (first, *_) = fleet(store, patient, FLEET, slots=0)
    first.claimer.hear(ring(jobs))
    assert first.ringer.ready == []


async def test_in_a_backlog_nobody_rings_for_each_job(store: CountingStore, patient: Settings) -> None:
    await store.enqueue_jobs([NewJob(task=TASK)] * 100)
    (first, *_) = fleet(store, patient, FLEET)
    for _ in range(50):
        first.claimer.hear(ring())
        await first.settle()
        first.claimer.hear(ring())
        first.held.clear()
        first.claimer.slot_freed()
    assert len(store.claims) >= 50
    assert 1 <= len(first.ringer.ready) <= 10


async def test_a_worker_that_found_the_queue_empty_passes_on_again(store: CountingStore, patient: Settings) -> None:
    (first, *_) = fleet(store, patient, FLEET, slots=0)
    for n in range(1, 4):
        first.slots = 0
        first.claimer.hear(ring())
        assert len(first.ringer.ready) == n
        first.slots = 1
        await first.settle()


async def test_a_worker_full_of_long_jobs_passes_on_less_and_less_and_anew_after_a_quiet_time(
    store: CountingStore, patient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(peers, "time", clock)
    (first, *_) = fleet(store, msgspec.structs.replace(patient, sweep_seconds=5.0), FLEET, slots=0)

    def passed_on_in_ten_seconds() -> int:
        before = len(first.ringer.ready)
        for _ in range(100):
            first.claimer.hear(ring())
            clock.now += 0.1
        return len(first.ringer.ready) - before

    assert passed_on_in_ten_seconds() >= 6
    assert 1 <= passed_on_in_ten_seconds() <= 3
    assert 1 <= passed_on_in_ten_seconds() <= 3
    clock.now += 10
    assert passed_on_in_ten_seconds() >= 6


async def test_a_queue_that_was_rung_while_all_slots_were_taken_is_looked_at_when_one_is_free(
    store: CountingStore, patient: Settings
) -> None:
    holder = fleet(store, patient, FLEET)[20]
    await holder.settle()
    holder.slots = 0
    holder.claimer.hear(ring())
    await store.enqueue_jobs([NewJob(task=TASK)])
    await holder.settle()
    assert not holder.held
    holder.slots = 1
    holder.claimer.slot_freed()
    await holder.settle()
    assert len(holder.held) == 1


async def test_who_found_more_than_was_rung_for_calls_others(store: CountingStore, patient: Settings) -> None:
    added = await store.enqueue_jobs([NewJob(task=TASK)] * 10)
    (first, *_) = fleet(store, patient, FLEET, slots=5)
    await first.settle()
    assert first.ringer.ready == [({"default": Ready(5, added[4].sort_key or NOW)}, 0)]


async def test_who_found_what_was_rung_for_calls_nobody(store: CountingStore, patient: Settings) -> None:
    (first, *_) = fleet(store, patient, FLEET)
    await first.settle()
    for _ in range(3):
        await store.enqueue_jobs([NewJob(task=TASK)])
        first.claimer.hear(ring())
        await first.settle()
        assert len(first.held) == 1
        first.held.clear()
        await first.settle()
    assert first.ringer.ready == []


async def test_who_is_alone_calls_nobody(store: CountingStore, patient: Settings) -> None:
    await store.enqueue_jobs([NewJob(task=TASK)] * 10)
    (holder,) = fleet(store, patient, 1)
    await holder.settle()
    assert holder.ringer.ready == []


# -- Who counts


async def test_ranks_are_those_of_the_ids_for_each_queue(store: CountingStore, patient: Settings) -> None:
    holders = [Holder(store, patient, queues=queues) for queues in (["a", "b"], ["b"], ["a", "b", "c"])]
    for holder in holders:
        await store.record_worker(holder.record())
    found = {holder.id: await store.find_standings(holder.id, gone_seconds=60) for holder in holders}
    for queue in ("a", "b", "c"):
        ids = sorted(holder.id for holder in holders if queue in holder.queues)
        ranks = {item.rank: item for standings in found.values() for item in standings if item.queue == queue}
        assert ranks == {rank: Standing(queue, rank, len(ids), len(ids)) for rank in range(len(ids))}
        assert [rank for worker in ids for rank in [next(x.rank for x in found[worker] if x.queue == queue)]] == [
            *range(len(ids))
        ]


@pytest.mark.parametrize(
    "other",
    [
        {"version": "2"},
        {"version": "http"},
        {"tasks": ["another"]},
        {"tasks": [TASK, "another"]},
        {"state": "draining"},
    ],
)
async def test_who_cannot_hear_the_ring_or_run_its_job_does_not_count(
    store: CountingStore, patient: Settings, other: dict[str, object]
) -> None:
    holder, stranger = Holder(store, patient), Holder(store, patient)
    await store.record_worker(holder.record())
    await store.record_worker(stranger.record(**other))  # type: ignore[arg-type]
    assert await store.find_standings(holder.id, gone_seconds=60) == [Standing("default", 0, 1, 1)]


async def test_who_was_not_seen_for_a_while_does_not_count(
    store: CountingStore, patient: Settings, database: Database
) -> None:
    holder, gone = Holder(store, patient), Holder(store, patient)
    for worker in (holder, gone):
        await store.record_worker(worker.record())
    await database.fetch("update clarion.workers set seen_at = now() - interval '30 s'")
    await store.record_worker(holder.record())
    assert [item.workers for item in await store.find_standings(holder.id, gone_seconds=20)] == [1]
    assert [item.workers for item in await store.find_standings(holder.id, gone_seconds=40)] == [2]


async def test_who_has_no_room_counts_but_is_not_idle(store: CountingStore, patient: Settings) -> None:
    holder, busy = Holder(store, patient), Holder(store, patient, slots=0)
    for worker in (holder, busy):
        await store.record_worker(worker.record())
    (found,) = await store.find_standings(holder.id, gone_seconds=60)
    assert (found.workers, found.idle) == (2, 1)


async def test_a_worker_that_is_not_on_the_list_has_no_rank(store: CountingStore, patient: Settings) -> None:
    assert await store.find_standings(Holder(store, patient).id, gone_seconds=60) == []


class Unanswering(Store):
    """What else is asked of it is answered; who stands where is refused, or not answered at all."""

    refuses = True

    async def find_standings(self, worker_id: UUID, *, gone_seconds: float) -> list[Standing]:
        if self.refuses:
            raise Unavailable("the server is busy")
        await anyio.sleep_forever()
        return []


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_worker_that_cannot_find_its_ranks_keeps_those_it_knows(
    database: Database, settings: Settings, refuses: bool
) -> None:
    store = Unanswering(database, msgspec.structs.replace(settings, lease_seconds=0.3))
    store.refuses = refuses
    holder, learnt = Holder(store, settings), list[list[Standing]]()
    brief = msgspec.structs.replace(settings, lease_seconds=0.3)
    heartbeats = Heartbeats(Leases(brief), brief, holder.record, on_standings=learnt.append)
    loop = asyncio.get_running_loop()
    await heartbeats.beat(store, loop)
    with anyio.fail_after(SOON_SECONDS):
        await heartbeats.look_around(store, loop)
    await wait_all_tasks_blocked()
    assert learnt == []
    await heartbeats.look_around(Store(database, settings), loop)
    await wait_all_tasks_blocked()
    assert learnt == [[Standing("default", 0, 1, 1)]]


# -- Every job starts


async def test_with_all_the_others_dead_and_still_on_the_list_every_job_starts_within_a_sweep(
    store: CountingStore, settings: Settings
) -> None:
    brisk = msgspec.structs.replace(settings, sweep_seconds=0.3)
    living, *dead = [Holder(store, brisk, slots=100) for _ in range(FLEET)]
    await beat_all([living, *dead])
    started = Starts([living])
    async with at_work(brisk, [living]), enqueuing(store, brisk) as enqueuer:
        for _ in range(10):
            await started.until(await add(enqueuer))


async def test_with_all_the_others_busy_every_job_starts_because_they_pass_it_on(
    store: CountingStore, patient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody makes sure, no sweep comes, and between two rings there is always enough time to pass on the second too.
    monkeypatch.setattr(peers, "time", Clock(tick=1_000))
    idle, *busy = fleet(store, patient, 8, slots=0)
    idle.slots = 100
    started = Starts([idle])
    async with at_work(patient, [idle, *busy]), enqueuing(store, patient) as enqueuer:
        for _ in range(5):
            await started.until(await add(enqueuer))


async def test_with_ranks_that_nobody_shares_every_job_starts_within_a_sweep(
    store: CountingStore, settings: Settings
) -> None:
    brisk = msgspec.structs.replace(settings, sweep_seconds=0.3)
    holders = [Holder(store, brisk, slots=100) for _ in range(6)]
    for holder in holders:
        holder.peers.learn([standing(17, FLEET)])
    started = Starts(holders)
    async with at_work(brisk, holders), enqueuing(store, brisk) as enqueuer:
        for _ in range(10):
            await started.until(await add(enqueuer))


async def test_a_backlog_that_nobody_rang_for_spreads_over_idle_workers(
    store: CountingStore, patient: Settings
) -> None:
    holders = [Holder(store, patient, slots=5) for _ in range(8)]
    await beat_all(holders)
    started = Starts(holders)
    async with at_work(patient, holders):
        added = await store.enqueue_jobs([NewJob(task=TASK)] * 40)
        holders[3].claimer.look_everywhere()
        for job in added:
            await started.until(job.id)
    assert [len(holder.held) for holder in holders] == [5] * 8


async def test_an_earlier_place_in_line_is_found_through_any_ring(store: CountingStore, patient: Settings) -> None:
    """Also one that meant others: whoever looks next has to look there."""
    await store.enqueue_jobs([NewJob(task=TASK)] * 3)
    holder = fleet(store, patient, FLEET)[20]
    await holder.settle()
    holder.held.clear()
    (urgent,) = await store.enqueue_jobs([NewJob(task=TASK, priority=100)])
    assert urgent.sort_key is not None
    assert urgent.sort_key < urgent.run_at - timedelta(minutes=99)
    holder.claimer.hear(Ring({"default": Ready(1, urgent.sort_key)}, point=0.0))
    await holder.settle()
    assert [lease.id for lease in holder.held] == [urgent.id]
