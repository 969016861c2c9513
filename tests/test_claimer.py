"""The claimer: what it does when a claim's answer is lost, how it deals out its slots, and where it looks."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import anyio
import msgspec
import pytest

from claiming import TASK, CountingStore, Holder
from clarion.db import Database
from clarion.errors import Unavailable
from clarion.execution import Lease, Policy, Ready, Share, Standing
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring


class LossyStore(Store):
    """Runs the first claim, and loses its answer."""

    lost = False

    async def claim_jobs(self, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        leases = await super().claim_jobs(shares, policies)
        if not self.lost:
            self.lost = True
            raise Unavailable("the answer was lost")
        return leases


@pytest.fixture
def store(database: Database, settings: Settings) -> CountingStore:
    return CountingStore(database, settings)


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """No sweep comes by itself."""
    return msgspec.structs.replace(settings, sweep_seconds=300.0)


def bounds(store: CountingStore) -> list[datetime | None]:
    """Where the last claim began to look."""
    return [None if share.earliest is None else share.earliest[0] for share in store.claims[-1]]


async def test_jobs_of_a_claim_whose_answer_was_lost_are_taken_again_at_once(
    database: Database, settings: Settings
) -> None:
    store = LossyStore(database, settings)
    await store.enqueue_jobs([NewJob(task=TASK)] * 3)
    holder = Holder(store, settings, slots=5)
    with pytest.raises(Unavailable):
        await holder.claimer.step()
    await holder.claimer.step()
    assert [(lease.attempt, lease.crashes) for lease in holder.held] == [(1, 0)] * 3


@pytest.mark.parametrize(("slots", "told"), [(0, 1), (2, 0)])
async def test_jobs_of_a_claim_whose_answer_was_lost_are_told_to_others_if_there_is_no_room_by_then(
    database: Database, patient: Settings, slots: int, told: int
) -> None:
    store = LossyStore(database, patient)
    (added,) = await store.enqueue_jobs([NewJob(task=TASK)])
    holder = Holder(store, patient, slots=2)
    holder.peers.learn([Standing("default", 0, 2, 1)])
    with pytest.raises(Unavailable):
        await holder.claimer.step()
    holder.slots = slots
    await holder.claimer.step()
    assert added.sort_key is not None
    assert holder.ringer.ready == [({"default": Ready(1, added.sort_key)}, 0)] * told


async def test_what_the_worker_knows_is_not_handed_back(database: Database, settings: Settings) -> None:
    store = LossyStore(database, settings)
    store.lost = True
    await store.enqueue_jobs([NewJob(task=TASK)] * 2)
    holder = Holder(store, settings, slots=2)
    await holder.claimer.step()
    store.lost, holder.slots = False, 3
    with pytest.raises(Unavailable):
        await holder.claimer.step()
    await holder.claimer.step()
    rows = await database.fetch("select lease_token from clarion.jobs where state = 'running'")
    assert {row["lease_token"] for row in rows} == {lease.token for lease in holder.held}


async def test_slots_are_dealt_out_among_queues_that_all_have_work(store: CountingStore, settings: Settings) -> None:
    for queue in ("a", "b", "c"):
        await store.enqueue_jobs([NewJob(task=TASK, queue=queue)] * 10)
    holder = Holder(store, settings, queues=["a", "b", "c"], slots=5)
    await holder.claimer.step()
    taken = sorted(sum(lease.queue == queue for lease in holder.held) for queue in ("a", "b", "c"))
    assert taken == [1, 2, 2]


async def test_slots_that_one_queue_cannot_fill_go_to_the_others(store: CountingStore, settings: Settings) -> None:
    await store.enqueue_jobs([NewJob(task=TASK, queue="full")] * 20)
    await store.enqueue_jobs([NewJob(task=TASK, queue="nearly-empty")])
    holder = Holder(store, settings, queues=["full", "nearly-empty"], slots=9)
    await holder.settle()
    assert len(holder.held) == 9


async def test_who_found_nothing_claims_nothing_until_it_is_called_or_sweeps(
    store: CountingStore, patient: Settings
) -> None:
    holder = Holder(store, patient)
    await holder.settle()
    assert len(store.claims) == 1
    for _ in range(3):
        assert 0 < await holder.claimer.step() <= 1.2 * 300
    assert len(store.claims) == 1


async def test_a_worker_that_one_queue_keeps_busy_sweeps_the_others_as_well(
    store: CountingStore, settings: Settings
) -> None:
    """A ring of the other one was lost, and the busy one never runs dry."""
    holder = Holder(store, msgspec.structs.replace(settings, sweep_seconds=0.05), queues=["busy", "other"])
    (first, _) = await store.enqueue_jobs([NewJob(task=TASK, queue="busy")] * 2)
    assert first.sort_key is not None
    await holder.settle()
    holder.claimer.hear(Ring({"busy": Ready(2, first.sort_key)}))
    await holder.settle()
    assert [lease.queue for lease in holder.held] == ["busy"]
    (silent,) = await store.enqueue_jobs([NewJob(task=TASK, queue="other")])
    taken = []
    with anyio.fail_after(10):
        while silent.id not in taken:
            await store.enqueue_jobs([NewJob(task=TASK, queue="busy")])
            holder.held.clear()
            holder.claimer.slot_freed()
            await holder.settle()
            taken += [lease.id for lease in holder.held]


async def test_a_claim_begins_where_the_last_one_ended(store: CountingStore, patient: Settings) -> None:
    added = await store.enqueue_jobs([NewJob(task=TASK, delay_seconds=-n) for n in range(4)])
    holder = Holder(store, patient, slots=2)
    await holder.settle()
    assert bounds(store) == [None]
    holder.held.clear()
    await holder.claimer.step()
    assert bounds(store) == [added[1].sort_key]


async def test_a_ring_for_an_earlier_place_in_line_takes_the_next_claim_there(
    store: CountingStore, patient: Settings
) -> None:
    (added,) = await store.enqueue_jobs([NewJob(task=TASK)])
    holder = Holder(store, patient, slots=2)
    await holder.settle()
    assert added.sort_key is not None
    for key in (added.sort_key - timedelta(hours=1), added.sort_key - timedelta(hours=2)):
        holder.claimer.hear(Ring({"default": Ready(1, key)}))
        await holder.settle()
        assert bounds(store) == [key]


async def test_after_a_reconnect_the_claims_look_from_the_start(store: CountingStore, patient: Settings) -> None:
    await store.enqueue_jobs([NewJob(task=TASK)] * 2)
    holder = Holder(store, patient, slots=3)
    await holder.settle()
    for _ in range(2):
        holder.claimer.look_everywhere()
        await holder.claimer.step()
        assert bounds(store) == [None]


async def test_workers_that_connect_at_the_same_time_sweep_at_different_times(
    store: CountingStore, patient: Settings
) -> None:
    pauses = []
    for _ in range(30):
        holder = Holder(store, patient)
        await holder.settle()
        holder.claimer.look_everywhere()
        await holder.settle()
        pauses.append(await holder.claimer.step())
    # That all of them are in one half happens once in 2^29 runs.
    assert min(pauses) < 150 < max(pauses) < 300


async def test_a_sweep_looks_from_the_start(store: CountingStore, settings: Settings) -> None:
    holder = Holder(store, msgspec.structs.replace(settings, sweep_seconds=0.001), slots=3)
    await store.enqueue_jobs([NewJob(task=TASK)] * 2)
    await holder.settle()
    while len(store.claims) < 5:
        await holder.claimer.step()
    assert bounds(store) == [None]


async def test_jobs_of_a_claim_whose_answer_was_lost_are_found_before_the_mark(
    database: Database, patient: Settings
) -> None:
    """They are released without a ring, and stand before what was claimed since."""
    store = LossyStore(database, patient)
    store.lost = True
    await store.enqueue_jobs([NewJob(task=TASK)])
    holder = Holder(store, patient, slots=5)
    await holder.settle()
    (late, early) = await store.enqueue_jobs([NewJob(task=TASK), NewJob(task=TASK, priority=50)])
    assert early.sort_key is not None
    holder.claimer.hear(Ring({"default": Ready(2, early.sort_key)}))
    store.lost = False
    with pytest.raises(Unavailable):
        await holder.claimer.step()
    await holder.settle()
    assert {late.id, early.id} < {lease.id for lease in holder.held}
