"""Running parts of Clarion inside a test: a worker, the maintenance, and somebody who enqueues."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar
from uuid import UUID

import anyio
import asyncpg
import msgspec

from clarion.db import Database, open_database
from clarion.enqueuer import Enqueuer
from clarion.job import FINAL, Job, NewJob
from clarion.loops import run_forever
from clarion.maintenance import Maintenance
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from clarion_worker import Worker
from clarion_worker.service import WorkerService

T = TypeVar("T")


@asynccontextmanager
async def in_one_task(context: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """Enters and leaves the context in one task, as task groups want; fixtures are set up and torn down in two."""
    entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def hold() -> None:
        try:
            async with context as value:
                entered.set_result(value)
                await leave.wait()
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    task = asyncio.create_task(hold())
    try:
        yield await entered
    finally:
        leave.set()
        await task


class Client(msgspec.Struct, frozen=True):
    """Somebody who enqueues jobs and waits for them."""

    database: Database
    store: Store
    enqueuer: Enqueuer
    ringer: Ringer

    async def enqueue(self, *jobs: NewJob) -> list[UUID]:
        """Adds jobs and rings; their ids."""
        return [added.id for added in await self.enqueuer.enqueue(jobs)]

    async def run(self, job: NewJob) -> Job:
        """Adds a job and waits until it is final."""
        (job_id,) = await self.enqueue(job)
        return await self.final(job_id)

    async def final(self, job_id: UUID) -> Job:
        """The job, once no run is planned for it any more."""
        return await self.until(job_id, lambda job: job.state in FINAL)

    async def until(self, job_id: UUID, condition: Callable[[Job], bool]) -> Job:
        """The job, once it is as wanted; the test's own time limit is the only one."""
        poll = anyio.Event()
        while True:
            job = await self.store.get_job(job_id)
            assert job is not None
            if condition(job):
                return job
            with anyio.move_on_after(0.01):
                await poll.wait()


@asynccontextmanager
async def client(settings: Settings) -> AsyncIterator[Client]:
    """A client with a pool and a ringer of its own, and the maintenance beside it."""
    async with open_database(settings, name="test-client") as database, anyio.create_task_group() as group:
        store = Store(database, settings)
        ringer = Ringer(store, settings)
        enqueuer = Enqueuer(store, ringer, settings)
        group.start_soon(enqueuer.run)
        group.start_soon(partial(run_forever, ringer.step, name="ring"))
        group.start_soon(Maintenance(store, ringer, settings).run)
        yield Client(database, store, enqueuer, ringer)
        group.cancel_scope.cancel()


@asynccontextmanager
async def running_worker(
    worker: Worker, settings: Settings, *, queues: Sequence[str] = ()
) -> AsyncIterator[WorkerService]:
    """A worker in this process; it drains at the end of the block."""
    stop = anyio.Event()
    service = WorkerService(worker, settings, queues=queues, stop=stop)
    async with anyio.create_task_group() as group:
        group.start_soon(service.run)
        try:
            yield service
        finally:
            stop.set()


@asynccontextmanager
async def nothing_finishes(settings: Settings) -> AsyncIterator[None]:
    """The history takes no row meanwhile; claims go on."""
    connection = await asyncpg.connect(settings.database_url)
    try:
        async with connection.transaction():
            await connection.execute("lock table clarion.job_history in share mode")
            yield
    finally:
        await connection.close()
