"""The hub of waiting claims: who is woken by what, and what becomes of the hints that nobody used."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from clarion.claims import Ask, Claims
from clarion.db import Database
from clarion.errors import Overloaded, Unavailable
from clarion.execution import Lease, Policy, Ready, Share
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ring

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


class CountingStore(Store):
    """Counts claims, in order; can hold one up once Postgres has answered, and have weather."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.claims: list[tuple[UUID, dict[str, int]]] = []
        self.answered = 0
        self.held = anyio.Event()
        self.go_on = anyio.Event()
        self.go_on.set()
        self.fails_at = 0

    async def claim_jobs(self, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        self.claims.append((shares[0].worker_id, {share.queue: share.jobs_max for share in shares}))
        if len(self.claims) == self.fails_at:
            raise Unavailable("the database is away")
        leases = await super().claim_jobs(shares, policies)
        self.answered += 1
        self.held.set()
        await self.go_on.wait()
        return leases

    def hold_up(self) -> None:
        """The next claims are answered by Postgres, and not to their callers until `go_on` is set."""
        self.held, self.go_on = anyio.Event(), anyio.Event()


@pytest.fixture
def counting(database: Database, settings: Settings) -> CountingStore:
    return CountingStore(database, settings)


@pytest.fixture
def claims(counting: CountingStore, settings: Settings) -> Claims:
    """A hub each of whose claims is a statement of its own, so that they can be counted."""
    return Claims(counting, msgspec.structs.replace(settings, batch_max=1))


class Line:
    """People who claim, a task each, and what they got."""

    def __init__(self, claims: Claims, group: anyio.abc.TaskGroup) -> None:
        self.claims = claims
        self.group = group
        self.got: list[list[Lease] | None] = []
        self.scopes: list[anyio.CancelScope] = []

    async def join(self, *asks: Ask, wait_seconds: float = 60) -> None:
        """Returns once all of them wait."""
        store: Any = self.claims._joint._store
        before = store.answered + sum(len(ask.queues) for ask in asks)
        for ask in asks:
            self.come(ask, wait_seconds=wait_seconds)
        while store.answered < before or self.claims.waiting < self.waiting:
            await anyio.lowlevel.checkpoint()

    def come(self, ask: Ask, *, wait_seconds: float = 60) -> None:
        """One more who claims; returns at once."""
        self.scopes.append(anyio.CancelScope())
        self.got.append(None)
        self.group.start_soon(partial(self._claim, len(self.got) - 1, ask, wait_seconds=wait_seconds))

    async def _claim(self, place: int, ask: Ask, *, wait_seconds: float) -> None:
        with self.scopes[place]:
            self.got[place] = await self.claims.claim(ask, wait_seconds=wait_seconds)

    @property
    def waiting(self) -> int:
        return sum(leases is None for leases in self.got)

    @property
    def served(self) -> list[int]:
        """Who got how many; those who wait got none."""
        return [len(leases or ()) for leases in self.got]

    async def until(self, *, served: int) -> None:
        while sum(self.served) != served:
            await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def a_line(claims: Claims) -> AsyncIterator[Line]:
    async with anyio.create_task_group() as group:
        yield Line(claims, group)
        group.cancel_scope.cancel()


def ask(*queues: str, tasks: set[str] | None = None, jobs_max: int = 1) -> Ask:
    return Ask(
        worker_id=uuid4(),
        queues=queues or ("default",),
        tasks=None if tasks is None else frozenset(tasks),
        jobs_max=jobs_max,
        lease_seconds=30,
    )


async def enqueue(store: Store, count: int = 1, **options: Any) -> None:
    await store.enqueue_jobs([NewJob(**{"task": "work"} | options)] * count)


def ring(**jobs: int) -> Ring:
    """So many jobs became ready in each of these queues, at any place in line."""
    return Ring({queue: Ready(count, LONG_AGO) for queue, count in jobs.items()})


async def asleep(store: CountingStore, claims: int) -> None:
    """Returns when so many claims were made in all and nobody is about to make another."""
    while store.answered < claims:
        await anyio.lowlevel.checkpoint()
    for _ in range(50):
        await anyio.lowlevel.checkpoint()
    assert len(store.claims) == claims


# -- Without waiting


async def test_what_is_there_is_taken_at_once_and_in_the_order_of_the_line(
    claims: Claims, counting: CountingStore
) -> None:
    await enqueue(counting, 2)
    await enqueue(counting, 1, priority=5)
    leases = await claims.claim(ask(jobs_max=3))
    assert [lease.priority for lease in leases] == [5, 0, 0]
    assert leases[1].id < leases[2].id


async def test_who_does_not_wait_is_told_at_once_that_there_is_nothing(claims: Claims) -> None:
    assert await claims.claim(ask()) == []
    assert claims.waiting == 0


async def test_a_claim_of_several_queues_takes_a_share_of_each_and_never_more_than_asked(
    claims: Claims, counting: CountingStore
) -> None:
    for queue in ("a", "b", "c"):
        await enqueue(counting, 10, queue=queue)
    leases = await claims.claim(ask("a", "b", "c", jobs_max=5))
    assert sorted(sum(lease.queue == queue for lease in leases) for queue in ("a", "b", "c")) == [1, 2, 2]


async def test_the_share_of_an_empty_queue_goes_to_the_others(claims: Claims, counting: CountingStore) -> None:
    await enqueue(counting, 10, queue="b")
    assert len(await claims.claim(ask("a", "b", "c", jobs_max=6))) == 6


async def test_one_job_is_found_in_whichever_queue_it_is(claims: Claims, counting: CountingStore) -> None:
    for queue in ("a", "b", "c"):
        await enqueue(counting, queue=queue)
        assert [lease.queue for lease in await claims.claim(ask("a", "b", "c"))] == [queue]


async def test_only_the_named_tasks_are_taken(claims: Claims, counting: CountingStore) -> None:
    await enqueue(counting, task="other")
    assert await claims.claim(ask(tasks={"work"})) == []
    assert [lease.task for lease in await claims.claim(ask(tasks={"work", "other"}))] == ["other"]


async def test_jobs_of_a_claim_that_meets_weather_half_way_are_answered(
    claims: Claims, counting: CountingStore
) -> None:
    await enqueue(counting, 3, queue="a")
    counting.fails_at = 2
    assert len(await claims.claim(ask("a", "b", jobs_max=4))) == 2
    counting.fails_at = 3
    with pytest.raises(Unavailable):
        await claims.claim(ask())


# -- Rings


async def test_a_ring_wakes_one_of_three_for_one_job_and_the_others_sleep_on(
    claims: Claims, counting: CountingStore
) -> None:
    async with a_line(claims) as line:
        await line.join(ask(), ask(), ask())
        await enqueue(counting)
        claims.hear(ring(default=1))
        await line.until(served=1)
        await asleep(counting, claims=4)
        assert line.served == [1, 0, 0]
        assert claims.waiting == 2


async def test_who_takes_several_jobs_is_woken_alone_for_them(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(ask(jobs_max=3), ask(jobs_max=3), ask(jobs_max=3))
        await enqueue(counting, 5)
        claims.hear(ring(default=5))
        await line.until(served=5)
        await asleep(counting, claims=5)
        assert sorted(line.served[:2]) == [2, 3]


async def test_a_ring_of_another_queue_wakes_nobody(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(ask("a"), ask("b"))
        claims.hear(ring(c=100))
        claims.hear(Ring(scheduled=True))
        await asleep(counting, claims=2)


async def test_only_the_queue_that_was_rung_is_looked_at(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(ask("a", "b", "c"))
        await enqueue(counting, queue="b")
        claims.hear(ring(b=1))
        await line.until(served=1)
        assert counting.claims[3:] == [(counting.claims[0][0], {"b": 1})]


async def test_a_ring_for_jobs_that_others_took_costs_one_claim_and_no_more(
    claims: Claims, counting: CountingStore
) -> None:
    async with a_line(claims) as line:
        await line.join(*[ask(tasks={"work"}) for _ in range(5)])
        claims.hear(ring(default=1))
        await asleep(counting, claims=6)
        assert claims.waiting == 5


async def test_a_job_of_another_task_is_left_to_who_takes_it(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(ask(tasks={"a"}), ask(tasks={"a"}), ask(tasks={"a", "b"}), ask(tasks={"b"}), ask())
        await enqueue(counting, task="b")
        claims.hear(ring(default=1))
        await line.until(served=1)
        await asleep(counting, claims=7)
        assert line.served == [0, 0, 1, 0, 0]


async def test_a_ring_that_comes_during_the_first_look_is_heard(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        counting.hold_up()
        await line.join(ask())
        await enqueue(counting)
        claims.hear(ring(default=1))
        counting.go_on.set()
        await line.until(served=1)


async def test_a_ring_that_comes_while_its_hearer_takes_another_job_goes_to_the_next(
    claims: Claims, counting: CountingStore
) -> None:
    async with a_line(claims) as line:
        await line.join(ask(), ask())
        counting.hold_up()
        await enqueue(counting)
        claims.hear(ring(default=1))
        await counting.held.wait()
        await enqueue(counting)
        claims.hear(ring(default=1))
        counting.go_on.set()
        await line.until(served=2)


async def test_who_leaves_before_he_looked_passes_the_ring_on(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(ask(), ask())
        await enqueue(counting)
        line.scopes[0].cancel()
        claims.hear(ring(default=1))
        await line.until(served=1)
        assert line.served == [0, 1]


# -- Looking without being told


async def test_a_look_everywhere_costs_one_claim_a_queue_while_there_is_nothing(
    claims: Claims, counting: CountingStore
) -> None:
    async with a_line(claims) as line:
        await line.join(*[ask("a") for _ in range(10)], *[ask("b") for _ in range(10)])
        claims.look_everywhere()
        await asleep(counting, claims=22)


async def test_a_look_everywhere_serves_everybody_there_is_a_job_for(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(*[ask() for _ in range(12)])
        await enqueue(counting, 9)
        claims.look_everywhere()
        await line.until(served=9)
        assert claims.waiting == 3


async def test_a_look_everywhere_reaches_every_sort_of_worker(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        tasks = [f"t{number}" for number in range(8)]
        await line.join(*[ask(tasks={task}) for task in tasks for _ in range(3)])
        await enqueue(counting, task="t7")
        claims.look_everywhere()
        await line.until(served=1)
        # One of each sort looks; who finds a job has two more look.
        await asleep(counting, claims=24 + 8 + 2)


async def test_a_job_that_nobody_rang_for_is_found_by_the_sweep(settings: Settings, counting: CountingStore) -> None:
    claims = Claims(counting, msgspec.structs.replace(settings, batch_max=1, sweep_seconds=0.01))
    async with a_line(claims) as line:
        await line.join(ask())
        await enqueue(counting)
        line.group.start_soon(claims.run)
        await line.until(served=1)


async def test_an_urgent_job_whose_ring_was_lost_is_found_after_a_look_everywhere(
    claims: Claims, counting: CountingStore
) -> None:
    await enqueue(counting, 2)
    assert len(await claims.claim(ask(jobs_max=2))) == 2
    await enqueue(counting, priority=9)
    assert await claims.claim(ask()) == []
    claims.look_everywhere()
    assert [lease.priority for lease in await claims.claim(ask())] == [9]


# -- The end of waiting


async def test_when_the_time_is_up_there_is_nothing(claims: Claims) -> None:
    assert await claims.claim(ask(), wait_seconds=0.01) == []
    assert claims.waiting == 0


async def test_jobs_that_are_claimed_when_the_time_is_up_are_answered(claims: Claims, counting: CountingStore) -> None:
    await enqueue(counting)
    counting.hold_up()
    async with a_line(claims) as line:
        await line.join(ask(), wait_seconds=0.001)
        with anyio.move_on_after(0.01):
            await anyio.sleep_forever()
        counting.go_on.set()
        await line.until(served=1)


async def test_a_claim_under_way_comes_to_its_end_when_its_caller_is_cancelled(
    claims: Claims, counting: CountingStore
) -> None:
    await enqueue(counting)
    async with a_line(claims) as line:
        counting.hold_up()
        await line.join(ask())
        line.scopes[0].cancel()
        counting.go_on.set()
        await line.until(served=1)


async def test_a_claim_that_shares_a_statement_comes_to_its_end_when_its_caller_is_cancelled(
    settings: Settings, counting: CountingStore
) -> None:
    claims = Claims(counting, settings)
    await enqueue(counting, 3)
    async with a_line(claims) as line:
        line.group.start_soon(claims.run)
        counting.hold_up()
        await line.join(ask())
        for _ in range(2):  # they go together, once the first is answered
            line.come(ask())
            await wait_all_tasks_blocked()
        line.scopes[1].cancel()
        counting.go_on.set()
        await line.until(served=3)
        assert line.served == [1, 1, 1]
        assert len(counting.claims) == 2


async def test_closing_lets_everybody_go_and_later_ones_only_look(claims: Claims, counting: CountingStore) -> None:
    async with a_line(claims) as line:
        await line.join(ask(), ask("a", "b"))
        claims.close()
        while line.waiting:
            await anyio.lowlevel.checkpoint()
        assert line.got == [[], []]
        assert await claims.claim(ask(), wait_seconds=60) == []
        await enqueue(counting)
        assert len(await claims.claim(ask(), wait_seconds=60)) == 1


async def test_the_number_of_those_who_wait_is_bounded(settings: Settings, counting: CountingStore) -> None:
    claims = Claims(counting, msgspec.structs.replace(settings, batch_max=1, waiters_max=2))
    async with a_line(claims) as line:
        await line.join(ask(), ask())
        with pytest.raises(Overloaded):
            await claims.claim(ask(), wait_seconds=60)
        assert await claims.claim(ask()) == []


async def test_who_is_woken_into_weather_is_told_and_the_others_wait_on(
    claims: Claims, counting: CountingStore
) -> None:
    told = anyio.Event()

    async def claim() -> None:
        with pytest.raises(Unavailable):
            await claims.claim(ask(), wait_seconds=60)
        told.set()

    async with a_line(claims) as line:
        line.group.start_soon(claim)
        await line.join(ask())
        counting.fails_at = 3
        claims.hear(ring(default=1))
        await told.wait()
        await enqueue(counting)
        claims.hear(ring(default=1))
        await line.until(served=1)
