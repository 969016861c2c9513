#!/usr/bin/env python3
"""How fast Clarion is, beside the floor: the same statements driven by bare asyncpg, in the same run.

Absolute figures mean little on a shared machine; the ratio to the floor does. Each workload is the median of several
rounds, with the least and the most, and the CPU seconds that Postgres and our processes spent on 1,000 jobs."""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import anyio
import asyncpg
import msgspec
from rich.console import Console
from rich.table import Table

from clarion.db import connect
from clarion.embedded import running_postgres
from clarion.execution import Completion, Policy
from clarion.job import NewJob
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import CHANNEL, Ring, encode_ring
from verification import Deployment, console, database, progress_bar, stack, worker

TASK = "demo.echo"
CLIENTS = 32
FLOOR_BATCH = 100


class Round(msgspec.Struct, frozen=True):
    """One run of a workload: its figure, and the CPU seconds it cost a thousand jobs."""

    value: float
    postgres_cpu: float | None = None
    python_cpu: float | None = None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: ours and the floor; `smaller_is_better` for latencies."""

    name: str
    unit: str
    ours: Callable[["Bench"], Awaitable[Round]]
    floor: Callable[["Bench"], Awaitable[Round]]
    smaller_is_better: bool = False


class Bench(msgspec.Struct, frozen=True):
    """What a workload runs against."""

    target: Deployment
    settings: Settings
    connection: "asyncpg.Connection[asyncpg.Record]"
    jobs: int
    samples: int

    async def reset(self) -> str:
        """Empty tables, and a queue of this round's own."""
        await self.connection.execute("truncate clarion.jobs, clarion.job_history, clarion.attempts")
        await self.connection.execute("vacuum analyze clarion.jobs")
        return f"bench-{uuid4().hex[:8]}"

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        """The bare statements on one connection, with no pool, batcher or ringer above."""
        connection = await connect(self.settings, name="floor")
        try:
            yield Store(connection, self.settings)
        finally:
            await connection.close()


async def drain(bench: Bench) -> Round:
    """One worker process takes a queue of no-op jobs to its end; timed from its first start to its last finish."""
    queue = await bench.reset()
    await fill(bench, queue)
    before = cpu_seconds("postgres")
    flags = ("--queues", queue, "--concurrency", "100", "--log-level", "info")
    async with worker(bench.target, *flags) as process:
        await until_empty(bench)
        python = process_cpu(process.process.pid)
    spent = cpu_seconds("postgres") - before
    seconds = await bench.connection.fetchval(
        "select extract(epoch from max(finished_at) - min(started_at))::float8 from clarion.job_history"
    )
    return Round(bench.jobs / seconds, 1000 * spent / bench.jobs, 1000 * python / bench.jobs)


async def drain_floor(bench: Bench) -> Round:
    """The bare claim and complete loop, a hundred at a time."""
    queue = await bench.reset()
    await fill(bench, queue)
    async with bench.store() as store:
        before, started, own = cpu_seconds("postgres"), time.perf_counter(), time.process_time()
        while leases := await store.claim_jobs(
            uuid4(), {queue: FLOOR_BATCH}, {TASK: Policy()}, lease_seconds=bench.settings.lease_seconds
        ):
            await store.complete_jobs([Completion(lease.id, lease.token, "{}") for lease in leases])
        seconds = time.perf_counter() - started
        spent = cpu_seconds("postgres") - before
    return Round(bench.jobs / seconds, 1000 * spent / bench.jobs, 1000 * (time.process_time() - own) / bench.jobs)


async def enqueue(bench: Bench) -> Round:
    """Single jobs over HTTP from 32 clients."""
    queue = await bench.reset()
    left = iter(range(bench.samples * 10))
    before = cpu_seconds("postgres")
    started = time.perf_counter()
    async with bench.target.client() as http, anyio.create_task_group() as group:

        async def post() -> None:
            for _ in left:
                answer = await http.post("/v1/jobs", json={"task": TASK, "queue": queue})
                answer.raise_for_status()

        for _ in range(CLIENTS):
            group.start_soon(post)
    seconds = time.perf_counter() - started
    count = bench.samples * 10
    return Round(count / seconds, 1000 * (cpu_seconds("postgres") - before) / count)


async def enqueue_floor(bench: Bench) -> Round:
    """The bare statement, one job at a time, from as many connections as a pool has."""
    queue = await bench.reset()
    count = bench.samples * 10
    left = iter(range(count))
    before = cpu_seconds("postgres")

    async def insert() -> None:
        async with bench.store() as store:
            for _ in left:
                await store.enqueue_jobs([NewJob(task=TASK, queue=queue)])

    started = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(bench.settings.pool_max):
            group.start_soon(insert)
    seconds = time.perf_counter() - started
    return Round(count / seconds, 1000 * (cpu_seconds("postgres") - before) / count)


async def latency(bench: Bench) -> Round:
    """From the commit of a single enqueue over HTTP to the claim, on an idle worker: the median, in milliseconds."""
    queue = await bench.reset()
    async with worker(bench.target, "--queues", queue), bench.target.client() as http:
        for _ in range(bench.samples):
            answer = await http.post("/v1/jobs", json={"task": TASK, "queue": queue})
            await http.get(answer.headers["location"], params={"wait": "10s"})
    return await started_after(bench, "run_at")


async def latency_floor(bench: Bench) -> Round:
    """Insert, commit, notify, claim: nothing else, between two bare connections."""
    queue = await bench.reset()
    rung = anyio.Event()
    listener = await asyncpg.connect(bench.target.database_url)
    await listener.add_listener(CHANNEL, lambda *_: rung.set())
    payload = encode_ring(Ring({queue: 1}))
    async with bench.store() as enqueuing, bench.store() as claiming:
        for _ in range(bench.samples):
            rung = anyio.Event()
            await enqueuing.enqueue_jobs([NewJob(task=TASK, queue=queue)])
            await enqueuing.ring(CHANNEL, [payload])
            await rung.wait()
            (lease,) = await claiming.claim_jobs(uuid4(), {queue: 1}, {TASK: Policy()}, lease_seconds=30)
            await claiming.complete_jobs([Completion(lease.id, lease.token)])
    await listener.close()
    return await started_after(bench, "run_at")


async def due(bench: Bench) -> Round:
    """How late a job delayed by 2 s starts on an idle worker: the worst of ten, in milliseconds."""
    queue = await bench.reset()
    async with worker(bench.target, "--queues", queue), bench.target.client() as http:
        jobs = []
        for _ in range(10):
            answer = await http.post("/v1/jobs", json={"task": TASK, "queue": queue, "delay": "2s"})
            jobs.append(answer.headers["location"])
            await anyio.sleep(0.137)
        for job in jobs:
            await http.get(job, params={"wait": "10s"})
    worst = await bench.connection.fetchval(
        "select max(extract(epoch from started_at - run_at)) * 1000 from clarion.job_history"
    )
    return Round(float(worst))


async def due_floor(_bench: Bench) -> Round:
    """How late a bare sleep of 2 s ends here: the worst of ten, in milliseconds."""
    late = []

    async def nap() -> None:
        until = time.perf_counter() + 2
        await anyio.sleep(2)
        late.append((time.perf_counter() - until) * 1000)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(nap)
            await anyio.sleep(0.137)
    return Round(max(late))


WORKLOADS = (
    Workload(name="drain", unit="jobs/s", ours=drain, floor=drain_floor),
    Workload(name="enqueue", unit="jobs/s", ours=enqueue, floor=enqueue_floor),
    Workload(name="latency", unit="ms p50", ours=latency, floor=latency_floor, smaller_is_better=True),
    Workload(name="due", unit="ms worst", ours=due, floor=due_floor, smaller_is_better=True),
)


async def fill(bench: Bench, queue: str) -> None:
    """Ready no-op jobs, a thousand a statement."""
    async with bench.store() as store:
        for start in range(0, bench.jobs, 1000):
            await store.enqueue_jobs([NewJob(task=TASK, queue=queue)] * min(1000, bench.jobs - start))
    await bench.connection.execute("analyze clarion.jobs")


async def until_empty(bench: Bench) -> None:
    """Returns when no job is live any more."""
    empty = False
    while not empty:
        await anyio.sleep(0.02)
        empty = not await bench.connection.fetchval("select exists (select from clarion.jobs)")


async def started_after(bench: Bench, column: str) -> Round:
    """The median wait from that moment to the claim, in milliseconds of the database's clock."""
    rows = await bench.connection.fetch(f"select started_at - {column} as wait from clarion.job_history")  # noqa: S608  ours
    return Round(statistics.median(row["wait"].total_seconds() * 1000 for row in rows))


def process_cpu(pid: int) -> float:
    """CPU seconds that a process has used, from /proc."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(name: str) -> float:
    """CPU seconds of all living processes of that name, and of their children that have ended."""
    total = 0.0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as file:
                    head, _, tail = file.read().rpartition(")")
            except OSError:
                continue
            if head.endswith(f"({name}"):
                total += sum(int(field) for field in tail.split()[11:15]) / os.sysconf("SC_CLK_TCK")
    return total


class Result(msgspec.Struct, frozen=True):
    """A workload's rounds, ours and the floor's."""

    name: str
    unit: str
    ours: list[Round]
    floor: list[Round]

    @property
    def ratio(self) -> float:
        """Ours to the floor, of the medians."""
        return _median(self.ours) / _median(self.floor)


def _median(rounds: list[Round]) -> float:
    return statistics.median(each.value for each in rounds)


async def measure(options: argparse.Namespace, database_url: str) -> list[Result]:
    """All rounds of all workloads, ours and floor in turn."""
    chosen = [workload for workload in WORKLOADS if not options.only or workload.name in options.only]
    results: list[Result] = []
    async with stack(database_url) as target, database(target) as connection:
        settings = Settings(database_url=database_url, ephemeral=True)
        bench = Bench(target, settings, connection, options.jobs, options.samples)
        with progress_bar("rounds", len(chosen) * options.rounds) as bar:
            for workload in chosen:
                ours, floor = [], []
                for _ in range(options.rounds):
                    floor.append(await workload.floor(bench))
                    ours.append(await workload.ours(bench))
                    bar.update(len(results) * options.rounds + len(ours))
                results.append(Result(workload.name, workload.unit, ours, floor))
    return results


def show(results: list[Result]) -> None:
    """The table."""
    table = Table(
        "workload", "unit", "ours", "min-max", "floor", "ours/floor", "Postgres CPU s/1,000", "Python CPU s/1,000"
    )
    for result in results:
        values = [each.value for each in result.ours]
        table.add_row(
            result.name,
            result.unit,
            f"{_median(result.ours):,.1f}",
            f"{min(values):,.1f}-{max(values):,.1f}",
            f"{_median(result.floor):,.1f}",
            f"{result.ratio:.2f}",
            _cpu(result.ours, "postgres_cpu"),
            _cpu(result.ours, "python_cpu"),
        )
    screen = Console()
    Console(width=None if screen.is_terminal else 130).print(table)


def _cpu(rounds: list[Round], name: str) -> str:
    values = [getattr(each, name) for each in rounds if getattr(each, name) is not None]
    return f"{statistics.median(values):.3f}" if values else "-"


def main() -> None:
    """Measures, prints, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description="Measures Clarion beside the floor, in one run.")
    parser.add_argument("--dsn", help="a database that may be emptied; default: an ephemeral Postgres")
    parser.add_argument("--quick", action="store_true", help="fewer jobs and samples: under 90 s")
    parser.add_argument("--only", action="append", choices=[workload.name for workload in WORKLOADS])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each workload (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="where to write all rounds")
    options = parser.parse_args()
    options.jobs, options.samples = (10_000, 50) if options.quick else (50_000, 200)
    if options.dsn:
        results = anyio.run(measure, options, options.dsn, backend_options={"use_uvloop": True})
    else:
        with running_postgres(None, options={"fsync": "on"}) as server:
            results = anyio.run(measure, options, server.url, backend_options={"use_uvloop": True})
    show(results)
    if options.json:
        with open(options.json, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(results)))
        console.print(f"all rounds are in {options.json}")


if __name__ == "__main__":
    main()
