"""Jobs of a test, on a real database: enqueue them, run them to their end in the test's own task, look at them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from clarion.api.representations import job_out
from clarion.client import AsyncClient, Client, JobView
from clarion.db import open_database
from clarion.execution import Reaped
from clarion.job import Job, JobFilter, JobState
from clarion.job_request import JobOptions, JobRequest, requested
from clarion.migrate import migrate
from clarion.settings import Settings
from clarion.store import Store
from clarion_worker.registry import Worker
from clarion_worker.testing.expectations import complaint, differences, wanted
from clarion_worker.testing.in_process import BlockingInProcess, InProcess
from clarion_worker.testing.runs import HandlerRun
from clarion_worker.testing.slot import ACTOR, NOW, find_jobs, open_slot

_URL = "http://clarion"
_EXPIRE_LEASES = Path(__file__).with_name("expire_leases.sql").read_text(encoding="utf-8")
_DEFAULT = Settings()


class Kit:
    """The jobs in one database, for a test that has it for itself; the fixture `clarion_kit` is one.

    Everything is real: the HTTP API takes the jobs in, the worker's own statements claim and finish them. Only nothing
    happens by itself, so that a test decides when what happens: no worker runs but in `drain` and `crash`.

    A kit belongs to no event loop and holds no connection between its calls, so there is nothing to close, and a
    test that is not async may say `anyio.run(kit.drain, worker)`.
    """

    def __init__(self, database_url: str, settings: Settings = _DEFAULT) -> None:
        self.database_url = database_url
        self._settings = msgspec.structs.replace(settings, database_url=database_url, api_token="")

    async def migrate(self) -> None:
        """Makes Clarion's tables, or upgrades them; the fixtures have done so."""
        await migrate(self._settings)

    def client(self) -> AsyncClient:
        """A client of the HTTP API on this database, for code under test that enqueues; there is no socket."""
        return AsyncClient(_URL, token="", transport=InProcess(self._settings))

    def sync_client(self) -> Client:
        """The same for code that does not await."""
        return Client(_URL, token="", transport=BlockingInProcess(self._settings))

    async def enqueue(
        self, request: JobRequest[Any] | str, args: Mapping[str, Any] | None = None, /, **options: Unpack[JobOptions]
    ) -> UUID:
        """Enqueues a job as a client does; its id. `await kit.enqueue(send.job(order_id=7), delay="5m")`"""
        async with self.client() as client:
            return (await client.enqueue(requested(request, args, options))).id

    async def drain(
        self,
        worker: Worker,
        *,
        queues: Sequence[str] = (),
        include_scheduled: bool = False,
        state: Any | UnsetType = UNSET,
        runs_max: int = 1_000,
    ) -> list[HandlerRun[Any]]:
        """Runs jobs of this worker, one after the other in this task, until none is ready; answers how each went.

        `queues`: those that its tasks name, unless given. Jobs are taken from the first queue that has any, in their
        order in line; what they enqueue is run too. What fails or snoozes is scheduled, and so not run again. With
        `include_scheduled` time flies: when nothing is ready, what is due next is made due, again and again, so jobs
        are tried until they succeed or are dead. `state` is `ctx.state`, instead of what the worker's lifespan yields,
        which then is not entered. AssertionError after `runs_max` runs.
        """
        runs: list[HandlerRun[Any]] = []
        async with open_slot(worker, self._settings, queues=queues, state=state) as slot:
            while len(runs) < runs_max:
                run = await slot.run_next()
                if run is not None:
                    runs.append(run)
                elif not include_scheduled or not await slot.make_next_due():
                    return runs
        raise AssertionError(f"there is still work after {runs_max} runs; the last was {runs[-1:]}")

    async def crash(
        self, worker: Worker, *, queues: Sequence[str] = (), state: Any | UnsetType = UNSET
    ) -> HandlerRun[Any]:
        """Runs the next ready job on a worker that is killed before it can report: the job stays `running`.

        With `expire_leases` and another `drain` it shows what a handler does that runs twice. The answer is how the
        handler ended; AssertionError if no job is ready.
        """
        async with open_slot(worker, self._settings, queues=queues, state=state) as slot:
            run = await slot.run_next(report=False)
        if run is None:
            raise AssertionError("no job of this worker is ready")
        return run

    async def expire_leases(self) -> list[Reaped]:
        """Lets the lease of every running job run out, and takes the jobs back as the maintenance does."""
        reaped: list[Reaped] = []
        async with open_database(self._settings, name="testing") as database:
            await database.fetch(_EXPIRE_LEASES)
            while page := await Store(database, self._settings).reap_jobs():
                reaped += page
        return reaped

    async def make_due(self, job_id: UUID) -> None:
        """Lets a scheduled job's time come; AssertionError if the job does not wait."""
        async with open_database(self._settings, name="testing") as database:
            changed = await Store(database, self._settings).change_job(job_id, NOW, version=None, actor=ACTOR)
        if changed is None:
            job = await self.job(job_id)
            raise AssertionError(f"only a job that waits can be made due, and this {job.task} is {job.state}")

    async def job(self, job_id: UUID) -> JobView:
        """A job as it is now; AssertionError if there is none."""
        async with open_database(self._settings, name="testing") as database:
            job = await Store(database, self._settings).get_job(job_id)
        if job is None:
            raise AssertionError(f"there is no job {job_id}")
        return _view(job)

    async def jobs(
        self, task: str | None = None, *, queue: str | None = None, state: str | None = None
    ) -> list[JobView]:
        """All jobs, or those of a task, in a queue, in a state; the oldest first."""
        where = JobFilter(task=task, queue=queue, state=None if state is None else JobState(state))
        async with open_database(self._settings, name="testing") as database:
            store = Store(database, self._settings)
            found = [await store.get_job(job.id) for job in await find_jobs(store, where)]
        return [_view(job) for job in found if job is not None]

    async def assert_enqueued(
        self,
        request: JobRequest[Any] | str,
        args: Mapping[str, Any] | None = None,
        *,
        queue: str | None = None,
        count: int | None = None,
    ) -> list[JobView]:
        """Asserts that such a job waits, ready or scheduled, or exactly `count` such jobs; answers them.

        A job is such a one if it has these arguments, and perhaps more; values are compared as JSON.

            await kit.assert_enqueued("email.send", {"order_id": 7}, queue="mail", count=1)
        """
        __tracebackhide__ = True
        expected = wanted(request, args, queue)
        jobs = await self.jobs()
        found = [job for job in jobs if not differences(job, expected)]
        if len(found) != count if count is not None else not found:
            raise AssertionError(complaint(expected, "at least 1" if count is None else str(count), jobs))
        return found

    async def refute_enqueued(
        self, request: JobRequest[Any] | str, args: Mapping[str, Any] | None = None, *, queue: str | None = None
    ) -> None:
        """Asserts that no such job waits."""
        __tracebackhide__ = True
        await self.assert_enqueued(request, args, queue=queue, count=0)


def _view(job: Job) -> JobView:
    """The job as the HTTP API shows it to its clients."""
    return msgspec.json.decode(msgspec.json.encode(job_out(job)), type=JobView)
