"""What the benchmark measures on: processes that log to files, an API, queues full of jobs, and their end.

Logs go to files, as a supervisor would have it: with a pipe, the benchmark itself would compete for the processor to
read them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import anyio
import asyncpg
import httpx2
import msgspec
from anyio.abc import Process

from benchmark_load import Load, Plan
from benchmark_measure import CpuMeter, Round, Sizes, family, postmaster_of
from clarion.db import close_connection, connect
from clarion.execution import Ready
from clarion.settings import PREFIX, Settings
from clarion.store import Store
from clarion.wake import CHANNEL, Ring, encode_ring
from verification import SCRIPTS, VerificationError, clarion

NOTHING = "bench.nothing"
# What drains fastest on two cores; see the workload `concurrency`.
CONCURRENCY = 500

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0
_PATIENCE_SECONDS = 180.0
_POLL_SECONDS = 0.02
_FILL = "insert into clarion.jobs (queue, task) select $1, $2 from generate_series(1, $3::integer)"
_LAST = "select id from clarion.jobs where queue = $1 order by id desc limit 1"
_IS_BUSY = """
    select exists (select from clarion.jobs where queue = $1 and state = 'ready')
        or exists (select from clarion.jobs where queue = $1 and state = 'running')
"""
_DRAIN_SECONDS = """
    select extract(epoch from max(finished_at) - min(started_at))::float8 as seconds, count(*) as jobs
    from clarion.job_history where queue = $1 and created_at >= $2
"""
_WORKERS = "select count(*) from clarion.workers where $1 = any(queues)"


class Launched(msgspec.Struct, frozen=True):
    """A process of ours, and the file to which it logs."""

    process: Process
    log: Path

    @property
    def pid(self) -> int:
        """The root of its tree."""
        return self.process.pid

    def check(self) -> None:
        """Raises VerificationError, with the end of its log, if it has ended."""
        if self.process.returncode is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise VerificationError(f"a process ended with {self.process.returncode}; its log ends:\n{tail}")

    async def said(self, text: str) -> str:
        """The first line of its log that contains the text, once it is there."""
        with anyio.move_on_after(_START_SECONDS):
            while True:
                lines = (await anyio.Path(self.log).read_text(errors="replace")).splitlines(keepends=True)
                for line in lines:
                    if text in line and line.endswith("\n"):
                        return line.rstrip("\n")
                self.check()
                await anyio.sleep(_POLL_SECONDS)
        raise VerificationError(f"a process never said {text!r}: see {self.log}")


class Api(Launched, frozen=True):
    """A process that answers HTTP, and where."""

    url: str

    def client(self) -> httpx2.AsyncClient:
        """For requests whose own cost is not measured."""
        return httpx2.AsyncClient(base_url=self.url, timeout=60)


class Backlog(msgspec.Struct, frozen=True):
    """Jobs that became ready at one moment; `last` stands last in line."""

    queue: str
    jobs: int
    since: datetime
    last: UUID


class WorkerPlan(msgspec.Struct, frozen=True):
    """How to start a worker; one that is stopped within 0 s is killed, and not warmed up either."""

    queue: str
    flags: tuple[str, ...] = ()
    concurrency: int = CONCURRENCY
    processes: int = 1
    stop_seconds: float = _STOP_SECONDS

    @property
    def warm_up_jobs(self) -> int:
        """How many jobs it runs before it counts as warm."""
        return min(2000, 20 * self.concurrency) if self.stop_seconds else 0

    def command(self) -> list[str]:
        """The command line."""
        command = [*clarion(), "worker", "benchmark_tasks:tasks", "--queues", self.queue, "--until-stdin-closes"]
        command += ["--concurrency", str(self.concurrency), *self.flags]
        return command if self.processes == 1 else [*command, "--processes", str(self.processes)]


Condition = Callable[[], Awaitable[bool]]


class Bench(msgspec.Struct, frozen=True):
    """What a workload runs against: a migrated database that may be emptied, on a server whose CPU time can be read."""

    settings: Settings
    connection: "asyncpg.Connection[asyncpg.Record]"
    sizes: Sizes
    logs: Path
    postmaster: int | None
    scheduler: Launched | None = None
    shared_api: Api | None = None

    @property
    def api(self) -> Api:
        """An API as it is shipped, for all workloads."""
        if self.shared_api is None:
            raise VerificationError("this bench has no API")
        return self.shared_api

    async def reset(self) -> None:
        """Empties the tables."""
        await self.connection.execute("truncate clarion.jobs, clarion.job_history, clarion.attempts")
        await self.connection.execute("vacuum analyze clarion.jobs")

    async def fill(self, queue: str, jobs: int, task: str = NOTHING) -> Backlog:
        """Ready jobs, which all appear at the same moment."""
        async with self.connection.transaction():
            since = await self.connection.fetchval("select now()")
            await self.connection.execute(_FILL, queue, task, jobs)
            last = await self.connection.fetchval(_LAST, queue)
            await self.connection.execute("analyze clarion.jobs")
        return Backlog(queue, jobs, since, last)

    def meter(self, *ours: Launched) -> CpuMeter:
        """CPU times from now on: the server's, and those of our processes."""
        return CpuMeter(self.postmaster, *(each.pid for each in ours))

    @asynccontextmanager
    async def bare(self) -> AsyncIterator[Store]:
        """The statements on one connection, with no pool, batcher or ringer above."""
        connection = await connect(self.settings, name="floor")
        try:
            yield Store(connection, self.settings)
        finally:
            await close_connection(connection)

    @asynccontextmanager
    async def looking_on(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Another connection, to look while the first one waits."""
        connection = await asyncpg.connect(self.settings.database_url)
        try:
            yield connection
        finally:
            await close_connection(connection)

    @asynccontextmanager
    async def held_snapshot(self) -> AsyncIterator[None]:
        """Another session that holds a snapshot, as a long report or a forgotten transaction does."""
        async with self.looking_on() as connection, connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("select count(*) from clarion.jobs")
            yield

    @asynccontextmanager
    async def launched(
        self, *command: str, stop_seconds: float = _STOP_SECONDS, settings: Mapping[str, str] | None = None
    ) -> AsyncIterator[Launched]:
        """A process that does not outlive the block, nor do its children; `settings` are Clarion's, by name."""
        log = self.logs / f"{uuid4().hex}.log"
        with log.open("wb") as file:
            process = await anyio.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=file,
                cwd=SCRIPTS,
                env=self._environment(settings or {}),
            )
        try:
            yield Launched(process, log)
        finally:
            with anyio.CancelScope(shield=True):
                await _end(process, stop_seconds)

    @asynccontextmanager
    async def serving(self, settings: Mapping[str, str] | None = None) -> AsyncIterator[Api]:
        """A process that answers HTTP."""
        async with self.launched(*clarion(), "serve", "--port", "0", settings=settings) as process:
            said = await process.said("Clarion answers on ")
            yield Api(process.process, process.log, said.partition("Clarion answers on ")[2])

    @asynccontextmanager
    async def workers(self, *plans: WorkerPlan) -> AsyncIterator[list[Launched]]:
        """Workers with the tasks of `benchmark_tasks`, started at once; when all their processes claim.

        They are warm: what a process does only once, plans and imports and connections, is not what is measured.
        """
        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(self.launched(*plan.command(), stop_seconds=plan.stop_seconds))
                for plan in plans
            ]
            for plan, worker in zip(plans, workers, strict=True):
                await self.until(partial(self._has_workers, plan), worker)
            for plan, worker in zip(plans, workers, strict=True):
                if plan.warm_up_jobs:
                    await self.drained(await self.fill(plan.queue, plan.warm_up_jobs), worker)
            yield workers

    @asynccontextmanager
    async def worker(self, queue: str, *flags: str) -> AsyncIterator[Launched]:
        """One of them, with the settings that drain fastest."""
        async with self.workers(WorkerPlan(queue, flags)) as [worker]:
            yield worker

    async def drained(self, backlog: Backlog, *workers: Launched) -> Round:
        """Rings for these jobs, and measures how they are drained, from the first start to the last finish."""
        meter = self.meter(*workers)
        await self.ring(backlog)
        await self.emptied(backlog, *workers)
        rate = await self.rate(backlog)
        return meter.round({"rate": rate}, backlog.jobs)

    async def rate(self, backlog: Backlog) -> float:
        """Jobs a second, from the first start to the last finish, by the clock of the database."""
        [row] = await self.connection.fetch(_DRAIN_SECONDS, backlog.queue, backlog.since)
        if row["jobs"] != backlog.jobs:
            raise VerificationError(f"{row['jobs']} of {backlog.jobs} jobs of {backlog.queue} succeeded")
        return float(backlog.jobs / row["seconds"])

    async def emptied(self, backlog: Backlog, *workers: Launched) -> None:
        """Returns when the jobs are finished. Watches the last in line, by its key, which costs next to nothing."""

        async def is_last_gone() -> bool:
            return not await self.connection.fetchval(
                "select exists (select from clarion.jobs where id = $1)", backlog.last
            )

        async def is_idle() -> bool:
            return not await self.connection.fetchval(_IS_BUSY, backlog.queue)

        await self.until(is_last_gone, *workers)
        await self.until(is_idle, *workers)

    async def load(self, api: Api, plan: Plan) -> Load:
        """What clients in a process of their own achieve on that API."""
        command = [sys.executable, str(SCRIPTS / "benchmark_load.py"), api.url]
        done = await anyio.run_process(command, input=msgspec.json.encode(plan), check=False)
        if done.returncode:
            raise VerificationError(f"the clients failed: {done.stderr.decode().strip()}")
        return msgspec.json.decode(done.stdout, type=Load)

    async def is_empty(self) -> bool:
        """Whether no job is live."""
        return not await self.connection.fetchval("select exists (select from clarion.jobs)")

    async def expect_jobs(self, jobs: int) -> None:
        """Raises VerificationError unless so many are live."""
        live = await self.connection.fetchval("select count(*) from clarion.jobs")
        if live != jobs:
            raise VerificationError(f"{live} jobs are live instead of {jobs}")

    async def ring(self, backlog: Backlog) -> None:
        """Tells whoever works on the queue."""
        ring = Ring({backlog.queue: Ready(backlog.jobs, backlog.since)})
        await Store(self.connection, self.settings).ring(CHANNEL, [encode_ring(ring)])

    async def _has_workers(self, plan: WorkerPlan) -> bool:
        # A worker writes itself down with its first heartbeat, which is when it starts to claim.
        return int(await self.connection.fetchval(_WORKERS, plan.queue)) >= plan.processes

    async def until(self, condition: Condition, *processes: Launched) -> None:
        """Waits for it, as long as these processes live."""
        with anyio.move_on_after(_PATIENCE_SECONDS):
            while not await condition():
                for process in processes:
                    process.check()
                await anyio.sleep(_POLL_SECONDS)
            return
        states = await self.connection.fetch("select queue, state::text, count(*) from clarion.jobs group by 1, 2")
        live = ", ".join(f"{row['count']} {row['state']} in {row['queue']}" for row in states) or "none"
        raise VerificationError(f"{condition!r} did not come true within {_PATIENCE_SECONDS:g} s; live jobs: {live}")

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Ours without what the shell says of some other deployment."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        own = {"database_url": self.settings.database_url, "ephemeral": "true"} | dict(settings)
        return kept | {f"{PREFIX}{name.upper()}": value for name, value in own.items()}


@asynccontextmanager
async def opened(settings: Settings, sizes: Sizes, logs: Path, *, with_api: bool = True) -> AsyncIterator[Bench]:
    """A bench on that database, which is migrated first, with a scheduler beside it as in any deployment."""
    connection = await asyncpg.connect(settings.database_url)
    try:
        postmaster = postmaster_of(await connection.fetchval("select pg_backend_pid()"))
        bench = Bench(settings, connection, sizes, logs, postmaster)
        async with bench.launched(*clarion(), "migrate", "up") as migration:
            if await migration.process.wait():
                migration.check()
        async with bench.launched(*clarion(), "scheduler") as scheduler:
            bench = msgspec.structs.replace(bench, scheduler=scheduler)
            if with_api:
                async with bench.serving() as api:
                    yield msgspec.structs.replace(bench, shared_api=api)
            else:
                yield bench
    finally:
        await close_connection(connection)


async def _end(process: Process, seconds: float) -> None:
    """Asks the process to stop, and kills what is left of it and of its children after so long."""
    members = family(process.pid)
    if process.returncode is None:
        process.terminate()
    with anyio.move_on_after(seconds):
        await process.wait()
    for pid in {*members, *family(process.pid)} if process.returncode is None else family(*members[1:]):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await process.aclose()
