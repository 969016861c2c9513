"""Claims made together: who shares a statement with whom, who gets what, and from where each looks."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from clarion.db import Database
from clarion.errors import ClarionError, Overloaded, Unavailable
from clarion.execution import Lease, Policy, Ready, Share
from clarion.job import NewJob
from clarion.joint_claims import JointClaims, Want
from clarion.settings import Settings
from clarion.store import Store

WORK = frozenset({"work"})
OTHER = frozenset({"other"})


class Held(Store):
    """Notes the shares of each claim; holds claims up before Postgres hears of them, until `go_on` is set."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.statements: list[list[Share]] = []
        self.held_tasks: Collection[str] = ()
        self.weather: Collection[str] = ()
        self.go_on = anyio.Event()

    async def claim_jobs(self, shares: Sequence[Share], policies: Mapping[str, Policy] | None) -> list[list[Lease]]:
        self.statements.append(list(shares))
        tasks = set(policies or ("any",))
        if tasks & set(self.held_tasks):
            await self.go_on.wait()
        if tasks & set(self.weather):
            raise Unavailable("the database is away")
        return await super().claim_jobs(shares, policies)

    @property
    def sizes(self) -> list[int]:
        """How many claimants each statement had."""
        return [len({share.worker_id for share in shares}) for shares in self.statements]


class Claimants:
    """Workers that claim at once; what each got, by the order in which they came."""

    def __init__(self, joint: JointClaims, group: anyio.abc.TaskGroup) -> None:
        self.got: dict[int, list[Lease] | ClarionError] = {}
        self.wants: list[Want] = []
        self._joint = joint
        self._group = group

    async def come(self, *, tasks: frozenset[str] | None = WORK, lease_seconds: float = 30, **claim_max: int) -> None:
        """Returns when everybody waits, or is done; a claim that Postgres works on is not waited for."""
        want = Want(worker_id=uuid4(), claim_max=claim_max, lease_seconds=lease_seconds)
        self.wants.append(want)
        self._group.start_soon(self._claim, len(self.wants) - 1, tasks, want)
        await wait_all_tasks_blocked()

    async def _claim(self, place: int, tasks: frozenset[str] | None, want: Want) -> None:
        try:
            self.got[place] = await self._joint.claim(tasks, want)
        except ClarionError as error:
            self.got[place] = error

    async def until_served(self, *places: int) -> None:
        while not set(places) <= self.got.keys():
            await anyio.lowlevel.checkpoint()

    def leases(self, place: int) -> list[Lease]:
        got = self.got[place]
        assert isinstance(got, list)
        return got


@pytest.fixture
def held(database: Database, settings: Settings) -> Held:
    return Held(database, settings)


@asynccontextmanager
async def claimants(store: Held, settings: Settings) -> AsyncIterator[Claimants]:
    joint = JointClaims(store, settings)
    async with anyio.create_task_group() as group:
        group.start_soon(joint.run)
        await wait_all_tasks_blocked()
        yield Claimants(joint, group)
        group.cancel_scope.cancel()


async def enqueue(store: Store, count: int = 1, **options: Any) -> list[UUID]:
    jobs = [NewJob(**{"task": "work"} | options)] * count
    return [added.id for added in await store.enqueue_jobs(jobs)]


# -- Who shares a statement


async def test_who_comes_while_a_claim_is_in_flight_shares_the_next_and_first_come_is_first_served(
    held: Held, settings: Settings
) -> None:
    ids = await enqueue(held, 7)
    held.held_tasks = WORK
    async with claimants(held, settings) as them:
        await them.come(default=1)
        for most in (2, 1, 3, 1):
            await them.come(default=most)
        held.go_on.set()
        await them.until_served(0, 1, 2, 3, 4)
        assert held.sizes == [1, 4]
        assert [[lease.id for lease in them.leases(place)] for place in range(5)] == [
            ids[:1], ids[1:3], ids[3:4], ids[4:7], [],
        ]  # fmt: skip


async def test_each_lease_of_a_shared_statement_is_its_own_claimants(held: Held, settings: Settings) -> None:
    await enqueue(held, 3)
    held.held_tasks = WORK
    async with claimants(held, settings) as them:
        for lease_seconds in (10, 20, 30):
            await them.come(default=1, lease_seconds=lease_seconds)
        held.go_on.set()
        await them.until_served(0, 1, 2)
        rows = await held._database.fetch("select worker_id, lease_seconds from clarion.jobs order by lease_seconds")
        assert [tuple(row) for row in rows] == [(want.worker_id, want.lease_seconds) for want in them.wants]


async def test_a_statement_serves_no_more_claimants_than_the_setting(held: Held, settings: Settings) -> None:
    held.held_tasks = WORK
    async with claimants(held, msgspec.structs.replace(settings, batch_max=2)) as them:
        for _ in range(6):
            await them.come(default=1)
        held.go_on.set()
        await them.until_served(*range(6))
    assert held.sizes == [1, 2, 2, 1]


async def test_a_statement_does_not_take_all_that_hundreds_ask_for(held: Held, settings: Settings) -> None:
    held.held_tasks = WORK
    async with claimants(held, settings) as them:
        for _ in range(6):
            await them.come(default=1_000)
        held.go_on.set()
        await them.until_served(*range(6))
    assert held.sizes == [1, 3, 2]


async def test_claims_of_other_tasks_or_other_queues_do_not_wait_for_a_slow_one(held: Held, settings: Settings) -> None:
    await enqueue(held, task="other")
    await enqueue(held, queue="mail", task="slow")
    held.held_tasks = ["slow"]
    slow = frozenset({"slow"})
    async with claimants(held, settings) as them:
        await them.come(default=1, tasks=slow)
        await them.come(default=1, tasks=OTHER)
        await them.until_served(1)
        held.held_tasks = ()
        await them.come(mail=1, tasks=slow)
        await them.until_served(2)
        assert 0 not in them.got
        assert [len(them.leases(place)) for place in (1, 2)] == [1, 1]


async def test_without_batching_each_claim_is_a_statement_of_its_own(held: Held, settings: Settings) -> None:
    held.held_tasks = WORK
    async with claimants(held, msgspec.structs.replace(settings, batch_max=1)) as them:
        for _ in range(3):
            await them.come(default=1)
        assert held.sizes == [1, 1, 1]
        held.go_on.set()
        await them.until_served(0, 1, 2)


async def test_beyond_the_bound_a_claim_is_refused_and_the_others_are_served(held: Held, settings: Settings) -> None:
    await enqueue(held, 4)
    held.held_tasks = WORK
    async with claimants(held, msgspec.structs.replace(settings, enqueue_buffer_max_jobs=2)) as them:
        for _ in range(3):
            await them.come(default=1)
        assert isinstance(them.got[2], Overloaded)
        held.go_on.set()
        await them.until_served(0, 1)
        assert [len(them.leases(place)) for place in (0, 1)] == [1, 1]


async def test_weather_is_told_to_those_whose_statement_it_met_and_to_nobody_else(
    held: Held, settings: Settings
) -> None:
    await enqueue(held, 2)
    held.held_tasks, held.weather = ["work", "other"], OTHER
    async with claimants(held, settings) as them:
        await them.come(default=1)
        for tasks in (OTHER, WORK, OTHER):
            await them.come(default=1, tasks=tasks)
        held.go_on.set()
        await them.until_served(0, 1, 2, 3)
        assert [len(them.leases(place)) for place in (0, 2)] == [1, 1]
        assert [isinstance(them.got[place], Unavailable) for place in (1, 3)] == [True, True]


# -- From where they look


@pytest.fixture
def joint(held: Held, settings: Settings) -> JointClaims:
    """Claims each of which is a statement of its own."""
    return JointClaims(held, msgspec.structs.replace(settings, batch_max=1))


async def take(joint: JointClaims, most: int = 1, *, tasks: frozenset[str] | None = WORK) -> list[Lease]:
    return await joint.claim(tasks, Want(worker_id=uuid4(), claim_max={"default": most}, lease_seconds=30))


async def test_a_claim_looks_from_where_the_last_one_of_its_tasks_came_to(held: Held, joint: JointClaims) -> None:
    await enqueue(held, 3)
    first, second = [await take(joint), await take(joint)]
    await take(joint, tasks=None)
    earliest = [shares[0].earliest for shares in held.statements]
    assert earliest == [None, first[0].place_in_line, None]
    await take(joint)
    assert held.statements[-1][0].earliest == second[0].place_in_line


async def test_a_job_that_goes_before_the_last_one_is_found_once_it_is_expected(held: Held, joint: JointClaims) -> None:
    await enqueue(held, 3)
    await take(joint)
    (urgent,) = await held.enqueue_jobs([NewJob(task="work", priority=9)])
    assert urgent.sort_key
    joint.expect({"default": Ready(1, urgent.sort_key)})
    (lease,) = await take(joint)
    assert lease.id == urgent.id


async def test_a_job_that_nobody_rang_for_is_found_after_the_sweep(held: Held, joint: JointClaims) -> None:
    await enqueue(held, 2)
    await take(joint, 2)
    (urgent,) = await enqueue(held, priority=9)
    assert await take(joint) == []
    joint.look_everywhere()
    (lease,) = await take(joint)
    assert lease.id == urgent


async def test_after_weather_a_claim_looks_from_the_start(held: Held, joint: JointClaims) -> None:
    await enqueue(held, 2)
    await take(joint)
    held.weather = WORK
    with pytest.raises(Unavailable):
        await take(joint)
    held.weather = ()
    await take(joint)
    assert held.statements[-1][0].earliest is None


async def test_a_ring_that_comes_while_a_claim_is_in_flight_is_kept(held: Held, joint: JointClaims) -> None:
    await enqueue(held, 2)
    held.held_tasks = WORK
    rung = datetime.now(UTC) - timedelta(hours=1)
    async with anyio.create_task_group() as group:
        group.start_soon(take, joint, 2)
        await wait_all_tasks_blocked()
        joint.expect({"default": Ready(1, rung)})
        held.go_on.set()
    await take(joint)
    assert held.statements[-1][0].earliest == (rung, UUID(int=0))
