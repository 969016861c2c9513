"""What an attempt leaves behind, and what becomes of it when everything around it ends."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
import pytest

from clarion.db import Database
from clarion.execution import Lease
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion_worker import SyncContext, Worker
from clarion_worker import runner as runner_module
from clarion_worker.leases import EndReason, Held, Leases
from clarion_worker.lines import LineKeeper
from clarion_worker.processes import open_processes
from clarion_worker.runner import Equipment, Outcome, Runner
from clarion_worker.service import WorkerService
from clarion_worker.testing.attempts import NotedEndings
from running import client, in_one_task, nothing_finishes

worker = Worker()
tasks_seen: list["weakref.ref[asyncio.Task[object]]"] = []
begun: list[str] = []
ended: list[str] = []
released: dict[UUID, threading.Event] = {}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def forget() -> None:
    for seen in (tasks_seen, begun, ended, released):
        seen.clear()


@worker.task("quick")
async def quick() -> None:
    task = asyncio.current_task()
    assert task is not None
    tasks_seen.append(weakref.ref(task))


@worker.task("endless")
async def endless() -> None:
    begun.append("endless")
    try:
        await anyio.sleep_forever()
    finally:
        ended.append("endless")


class Uncancellable(asyncio.Future[None]):
    """What some library's awaitable may be like."""

    def cancel(self, msg: object = None) -> bool:
        raise RuntimeError("this cannot be cancelled")


@worker.task("uncancellable")
async def uncancellable(seconds: float) -> None:
    awaited = Uncancellable()
    asyncio.get_running_loop().call_later(seconds, awaited.set_result, None)
    await awaited


@worker.task("deaf")
def deaf(*, ctx: SyncContext) -> None:
    released[ctx.job.id] = threading.Event()
    released[ctx.job.id].wait(30)


class Bench:
    """A runner, and the outcomes of what it ran."""

    def __init__(self, runner: Runner, leases: Leases) -> None:
        self.runner = runner
        self.leases = leases
        self.outcomes: list[Outcome] = []
        self.scope = anyio.CancelScope()
        self.over = anyio.Event()
        self._changed = anyio.Event()

    def start(self, task: str, *, args: str = "{}", timeout_seconds: float | None = None) -> Held:
        held = self.leases.add(lease(task, args, timeout_seconds), sent=0)
        self.runner.start(held, self.done)
        return held

    def done(self, held: Held, outcome: Outcome) -> None:
        self.leases.remove(held)
        self.outcomes.append(outcome)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, outcomes: int) -> None:
        while len(self.outcomes) < outcomes:
            await self._changed.wait()


def lease(task: str, args: str, timeout_seconds: float | None) -> Lease:
    return Lease(
        id=uuid4(), token=uuid4(), queue="default", task=task, args=args, priority=0, attempt=1, max_attempts=None,
        generation=1, errors=0, crashes=0, timeout_seconds=timeout_seconds, checkpoint=None,
        created_at=NOW, run_at=NOW, started_at=NOW, sort_key=NOW,
    )  # fmt: skip


@pytest.fixture
async def bench(database: Database, settings: Settings) -> AsyncIterator[Bench]:
    async with in_one_task(a_bench(database, settings)) as running:
        yield running


@asynccontextmanager
async def a_bench(database: Database, settings: Settings) -> AsyncIterator[Bench]:
    leases, endings = Leases(settings), NotedEndings(Store(database, settings), settings)
    async with open_processes(settings, processes_max=1) as processes, anyio.create_task_group() as group:
        equipment = Equipment(
            tasks=worker.tasks, endings=endings, keeper=LineKeeper(), processes=processes, targets={}, states={},
        )  # fmt: skip
        runner = Runner(equipment, leases, settings)
        running = Bench(runner, leases)

        async def run() -> None:
            with running.scope:
                await runner.run()
            running.over.set()

        group.start_soon(run)
        yield running
        group.cancel_scope.cancel()


async def test_nothing_of_a_job_waits_for_the_garbage_collector(bench: Bench) -> None:
    with no_garbage_collection():
        for _ in range(3):
            bench.start("quick")
        await bench.until(outcomes=3)
        await anyio.lowlevel.checkpoint()
        assert [task() for task in tasks_seen] == [None] * 3


async def test_a_handler_that_waits_for_what_cannot_be_cancelled_is_stuck_and_frees_its_slot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner_module, "CANCEL_GRACE_SECONDS", 0.05)
    held = bench.start("uncancellable", args='{"seconds": 0.3}', timeout_seconds=0.01)
    await bench.until(outcomes=1)
    assert (held.end_reason, bench.runner.stuck, len(bench.leases)) == (EndReason.TIMED_OUT, 1, 0)
    while bench.runner.stuck:
        await anyio.lowlevel.checkpoint()
    assert "this cannot be cancelled" in caplog.text


async def test_a_thread_that_was_given_up_is_counted_again_when_it_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(runner_module, "CANCEL_GRACE_SECONDS", 0.05)
    limiter = bench.runner._threads
    held = bench.start("deaf", timeout_seconds=0.01)
    await bench.until(outcomes=1)
    assert (bench.runner.stuck, limiter.total_tokens) == (1, settings.concurrency + 1)
    released[held.lease.id].set()
    while bench.runner.stuck:
        await anyio.lowlevel.checkpoint()
    assert limiter.total_tokens == settings.concurrency


async def test_an_attempt_is_concluded_once_when_its_handler_ends_with_its_grace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "CANCEL_GRACE_SECONDS", 0.0)
    for _ in range(20):
        bench.start("endless").end(EndReason.DRAINED)
    await bench.until(outcomes=20)
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert (len(bench.outcomes), len(bench.leases), bench.runner.stuck) == (20, 0, 0)


async def test_a_handler_ends_with_the_runner(bench: Bench) -> None:
    bench.start("endless")
    while not begun:
        await anyio.lowlevel.checkpoint()
    bench.scope.cancel()
    await bench.over.wait()
    with anyio.fail_after(10):
        while ended != ["endless"]:
            await anyio.lowlevel.checkpoint()


async def test_no_handler_begins_once_the_runner_has_ended(bench: Bench) -> None:
    bench.scope.cancel()
    await bench.over.wait()
    bench.start("endless")
    for _ in range(10):
        await anyio.lowlevel.checkpoint()
    assert begun == []


async def test_outcomes_in_flight_when_a_worker_is_cancelled_leave_no_complaints_behind(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(settings) as jobs, anyio.create_task_group() as group:
        service = WorkerService(worker, settings, stop=anyio.Event(), queues=["default"])
        group.start_soon(service.run)
        async with nothing_finishes(settings):
            await jobs.enqueue(*[NewJob(task="quick")] * 5)
            while len(service._leases) < 5 or service._leases.running:
                await jobs.database.fetch("select 1")
            group.cancel_scope.cancel()
    gc.collect()
    assert "never retrieved" not in caplog.text


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
