"""The claimer: what it does when a claim's answer is lost, and how it deals out its slots."""

from collections.abc import Mapping
from uuid import UUID, uuid4

import pytest

from clarion.db import Database
from clarion.errors import Unavailable
from clarion.execution import Lease, Policy
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion_worker.claimer import Claimer, Subscription


class LossyStore(Store):
    """Runs the first claim, and loses its answer."""

    lost = False

    async def claim_jobs(
        self,
        worker_id: UUID,
        claim_max: Mapping[str, int],
        policies: Mapping[str, Policy] | None,
        *,
        lease_seconds: float,
    ) -> list[Lease]:
        leases = await super().claim_jobs(worker_id, claim_max, policies, lease_seconds=lease_seconds)
        if not self.lost:
            self.lost = True
            raise Unavailable("the answer was lost")
        return leases


class Slots:
    """Where claimed jobs go."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: list[Lease] = []

    def claimer(self, store: Store, settings: Settings, *queues: str) -> Claimer:
        return Claimer(
            store,
            settings,
            subscription=Subscription(worker_id=uuid4(), queues=queues, policies={"t": Policy()}),
            free_slots=lambda: self.count - len(self.held),
            known_tokens=lambda: [lease.token for lease in self.held],
            start=lambda lease, _sent: self.held.append(lease),
        )


async def test_jobs_of_a_claim_whose_answer_was_lost_are_taken_again_at_once(
    database: Database, settings: Settings
) -> None:
    store, slots = LossyStore(database, settings), Slots(5)
    await store.enqueue_jobs([NewJob(task="t")] * 3)
    claimer = slots.claimer(store, settings, "default")
    with pytest.raises(Unavailable):
        await claimer.step()
    await claimer.step()
    assert [(lease.attempt, lease.crashes) for lease in slots.held] == [(1, 0)] * 3


async def test_what_the_worker_knows_is_not_handed_back(database: Database, settings: Settings) -> None:
    store, slots = LossyStore(database, settings), Slots(2)
    store.lost = True
    await store.enqueue_jobs([NewJob(task="t")] * 2)
    claimer = slots.claimer(store, settings, "default")
    await claimer.step()
    store.lost, slots.count = False, 3
    with pytest.raises(Unavailable):
        await claimer.step()
    await claimer.step()
    rows = await database.fetch("select lease_token from clarion.jobs where state = 'running'")
    assert {row["lease_token"] for row in rows} == {lease.token for lease in slots.held}


async def test_slots_are_dealt_out_among_queues_that_all_have_work(database: Database, settings: Settings) -> None:
    store, slots = Store(database, settings), Slots(5)
    for queue in ("a", "b", "c"):
        await store.enqueue_jobs([NewJob(task="t", queue=queue)] * 10)
    await slots.claimer(store, settings, "a", "b", "c").step()
    taken = sorted(sum(lease.queue == queue for lease in slots.held) for queue in ("a", "b", "c"))
    assert taken == [1, 2, 2]


async def test_slots_that_one_queue_cannot_fill_go_to_the_others(database: Database, settings: Settings) -> None:
    store, slots = Store(database, settings), Slots(9)
    await store.enqueue_jobs([NewJob(task="t", queue="full")] * 20)
    await store.enqueue_jobs([NewJob(task="t", queue="nearly-empty")])
    claimer = slots.claimer(store, settings, "full", "nearly-empty")
    while await claimer.step() == 0:
        pass
    assert len(slots.held) == 9
