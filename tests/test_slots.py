"""How a worker keeps its slots busy: the next job starts while the outcome of the last is being recorded."""

from asyncio import Future
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest

from clarion.db import Database
from clarion.endings import Ending, Endings
from clarion.errors import ClarionError, Overloaded, Unavailable
from clarion.execution import Completed, Completion, Ended, Release
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.wake import Ringer
from clarion_worker import Worker
from clarion_worker.finisher import Finisher
from clarion_worker.leases import EndReason, Held, Leases
from clarion_worker.runner import Outcome
from clarion_worker.testing.attempts import NotedEndings
from running import client, nothing_finishes, running_worker
from store_actions import Jobs


class Gate:
    """Handlers that say when they have begun."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._changed = anyio.Event()
        self.worker = Worker()
        self.worker.task("numbered")(self.numbered)

    async def numbered(self, number: int) -> None:
        self.begun.append(number)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, begun: int) -> None:
        while len(self.begun) < begun:
            await self._changed.wait()


def numbered(number: int) -> NewJob:
    return NewJob(task="numbered", args=f'{{"number": {number}}}')


async def test_a_slot_takes_its_next_job_while_the_outcome_of_the_last_waits_for_the_database(
    settings: Settings,
) -> None:
    gate, one_slot = Gate(), msgspec.structs.replace(settings, concurrency=1, sweep_seconds=300.0, lease_seconds=300.0)
    async with client(settings) as jobs, running_worker(gate.worker, one_slot):
        await jobs.run(numbered(0))  # by now it listens, and has looked
        async with nothing_finishes(settings):
            ids = await jobs.enqueue(numbered(1), numbered(2))
            with anyio.fail_after(10):  # long before the next sweep
                await gate.until(begun=3)
            assert [(await jobs.store.get_job(job_id)).state for job_id in ids] == ["running"] * 2  # type: ignore[union-attr]
        for job_id in ids:
            assert (await jobs.final(job_id)).attempt == 1
    assert gate.begun == [0, 1, 2]


async def test_outcomes_that_wait_are_as_many_as_there_are_slots_and_no_more(settings: Settings) -> None:
    gate, two_slots = Gate(), msgspec.structs.replace(settings, concurrency=2, sweep_seconds=0.05)
    async with client(settings) as jobs, running_worker(gate.worker, two_slots):
        async with nothing_finishes(settings):
            ids = await jobs.enqueue(*[numbered(number) for number in range(9)])
            await gate.until(begun=4)
            for _ in range(200):  # in which a worker that has room claims
                await jobs.database.fetch("select 1")
            assert len(gate.begun) == 4
        for job_id in ids:
            assert (await jobs.final(job_id)).state == "succeeded"


async def test_a_lease_whose_outcome_is_known_holds_no_slot_and_cannot_be_ended(jobs: Jobs, leases: Leases) -> None:
    lease = await jobs.run()
    held = leases.add(lease, sent=0)
    ended: list[str] = []
    held.end_handler = lambda: ended.append("told")
    assert (len(leases), leases.running) == (1, 1)
    leases.finish(held)
    held.end(EndReason.TIMED_OUT)
    assert (len(leases), leases.running, ended, held.ending) == (1, 0, [], False)
    leases.remove(held)
    assert (len(leases), leases.running) == (0, 0)


class Told:
    """What a finisher said of outcomes."""

    def __init__(self) -> None:
        self.states: list[str | None] = []
        self._changed = anyio.Event()

    def recorded(self, _held: Held, _outcome: Outcome, state: str | None) -> None:
        self.states.append(state)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, count: int) -> None:
        while len(self.states) < count:
            await self._changed.wait()


class UnwillingEndings(NotedEndings):
    """Refuses the first calls with these errors."""

    def __init__(self, jobs: Jobs, *errors: ClarionError) -> None:
        super().__init__(jobs.store, jobs.settings)
        self.errors = list(errors)

    def post(self, ending: Ending) -> Future[Completed] | Future[Ended]:
        if self.errors and isinstance(self.errors[0], Overloaded):
            raise self.errors.pop(0)
        answered = super().post(ending)
        if self.errors:
            answered.set_exception(self.errors.pop(0))
        return answered


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("away")], ids=["full", "away"])
async def test_an_outcome_that_met_weather_is_said_again_until_it_is_recorded(jobs: Jobs, error: ClarionError) -> None:
    async with finishing(jobs, error) as (finisher, told):
        lease = await jobs.run()
        finisher.record(Held(lease, valid_until=1), Completion(lease.id, lease.token, "1"))
        await told.until(1)
    assert told.states == ["succeeded"]


async def test_a_result_that_postgres_refuses_ends_its_own_job_only(jobs: Jobs) -> None:
    async with finishing(jobs) as (finisher, told):
        leases = [await jobs.run() for _ in range(3)]
        for lease, result in zip(leases, ("1", '"\\u0000', "3"), strict=True):
            finisher.record(Held(lease, valid_until=1), Completion(lease.id, lease.token, result))
        await told.until(3)
    assert sorted(map(str, told.states)) == ["dead", "succeeded", "succeeded"]
    assert await jobs.state(leases[1].id) == "dead"


async def test_the_outcome_of_a_lost_lease_is_dropped_and_told_as_such(jobs: Jobs) -> None:
    async with finishing(jobs) as (finisher, told):
        lease = await jobs.run()
        await jobs.lose(lease)
        finisher.record(Held(lease, valid_until=1), Release(lease.id, lease.token))
        finisher.record(Held(lease, valid_until=1), None)
        await told.until(2)
    assert told.states == [None, None]


async def test_with_batching_off_each_outcome_is_recorded_all_the_same(jobs: Jobs) -> None:
    told, endings = Told(), Endings(jobs.store, Ringer(jobs.store, jobs.settings), buffer_max=100, batch_max=1)
    finisher = Finisher(endings, jobs.store.find_endings, told.recorded)
    async with anyio.create_task_group() as group:
        endings.start(group)
        group.start_soon(finisher.run)
        for lease in [await jobs.run() for _ in range(5)]:
            finisher.record(Held(lease, valid_until=1), Completion(lease.id, lease.token))
        await told.until(5)
        group.cancel_scope.cancel()
    assert told.states == ["succeeded"] * 5


@asynccontextmanager
async def finishing(jobs: Jobs, *errors: ClarionError) -> AsyncIterator[tuple[Finisher, Told]]:
    told, endings = Told(), UnwillingEndings(jobs, *errors)
    finisher = Finisher(endings, jobs.store.find_endings, told.recorded)
    async with anyio.create_task_group() as group:
        endings.start(group)
        group.start_soon(finisher.run)
        yield finisher, told
        group.cancel_scope.cancel()


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


@pytest.fixture
def leases(settings: Settings) -> Leases:
    return Leases(settings)
