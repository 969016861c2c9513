#!/usr/bin/env python3
"""Many idle workers on one database: what they cost those who enqueue, and how many of them a single job wakes.

Run as a program it is the herd: so many workers in one process, each with its own listening connection, claims, and
heartbeats, until its standard input closes.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread
import asyncpg
import msgspec

from benchmark_load import Plan
from benchmark_measure import Figure, Round, Sides, SkippedError, Target, Workload
from benchmark_stack import NOTHING, Bench, Launched
from benchmark_tasks import tasks
from clarion.log import configure_logging
from clarion.settings import load_settings
from clarion_worker.service import WorkerService

CLIENTS = 16
_JOBS_A_SECOND = 50
# Each worker knows the others from its second heartbeat on, a third of a lease after the first.
_LEASE_SECONDS = 6.0
_SETTLE_SECONDS = _LEASE_SECONDS / 3 + 1
# A listener, heartbeats and a pool of one for each, and some for everybody else.
_CONNECTIONS_EACH, _CONNECTIONS_ELSE = 3, 60
_LISTENERS = "select count(*) from pg_stat_activity where application_name = 'clarion listener'"
_CLAIMS = """
    select coalesce(sum(calls), 0)::bigint from pg_stat_statements
    where query like '%update clarion.jobs as j%' and query like '%lease_token = gen_random_uuid()%'
"""


@asynccontextmanager
async def listening(bench: Bench, queue: str, **settings: str) -> AsyncIterator[Launched]:
    """The herd, once all of it listens."""
    before = await bench.connection.fetchval(_LISTENERS)
    command = (sys.executable, __file__, queue, str(bench.sizes.herd_workers))
    async with bench.launched(*command, settings=settings) as herd:

        async def are_listening() -> bool:
            return bool(await bench.connection.fetchval(_LISTENERS) >= before + bench.sizes.herd_workers)

        await bench.until(are_listening, herd)
        yield herd


async def enqueue(bench: Bench, *, with_herd: bool) -> Round:
    """How many jobs a second go in; the herd works on another queue."""
    jobs = bench.sizes.herd_requests
    body = msgspec.json.encode({"task": NOTHING, "queue": "in"}).decode()
    plan = Plan(connections=CLIENTS, requests=jobs, body=body)
    await bench.reset()
    if not with_herd:
        meter = bench.meter(bench.api)
        return meter.round({"rate": jobs / (await bench.load(bench.api, plan)).seconds}, jobs)
    async with listening(bench, "another") as herd:
        meter = bench.meter(bench.api, herd)
        return meter.round({"rate": jobs / (await bench.load(bench.api, plan)).seconds}, jobs)


async def claims_of_a_job(bench: Bench) -> Round:
    """How many claims one job costs, in a steady trickle into the herd's own queue."""
    jobs = bench.sizes.herd_jobs
    await bench.reset()
    async with listening(bench, "herd", lease_seconds=str(_LEASE_SECONDS)), bench.api.client() as http:
        await anyio.sleep(_SETTLE_SECONDS)
        before, due = await bench.connection.fetchval(_CLAIMS), anyio.current_time()
        for _ in range(jobs):
            (await http.post("/v1/jobs", json={"task": NOTHING, "queue": "herd"})).raise_for_status()
            due += 1 / _JOBS_A_SECOND
            await anyio.sleep_until(due)
        await bench.until(bench.is_empty)
        claims = await bench.connection.fetchval(_CLAIMS) - before
    return Round({"claims": claims / jobs})


@asynccontextmanager
async def herd(bench: Bench) -> AsyncIterator[Sides]:
    """Enqueueing without and with a herd."""
    await _check_connections(bench)
    yield {
        "alone": partial(enqueue, bench, with_herd=False),
        "herd": partial(enqueue, bench, with_herd=True),
    }


@asynccontextmanager
async def herd_claims(bench: Bench) -> AsyncIterator[Sides]:
    """A trickle of jobs into a herd whose statements are counted."""
    await _check_connections(bench)
    async with _counted_statements(bench):
        yield {"herd": partial(claims_of_a_job, bench)}


async def _check_connections(bench: Bench) -> None:
    needed = bench.sizes.herd_workers * _CONNECTIONS_EACH + _CONNECTIONS_ELSE
    allowed = int(await bench.connection.fetchval("select current_setting('max_connections')"))
    if allowed < needed:
        raise SkippedError(f"the server has max_connections = {allowed}, and {needed} are needed")


@asynccontextmanager
async def _counted_statements(bench: Bench) -> AsyncIterator[None]:
    """Statements of sessions that are opened within the block are counted: it costs a little, so nowhere else."""
    name = '"' + (await bench.connection.fetchval("select current_database()")).replace('"', '""') + '"'
    try:
        await bench.connection.execute("create extension if not exists pg_stat_statements")
        await bench.connection.fetchval(_CLAIMS)
        await bench.connection.execute(f"alter database {name} set pg_stat_statements.track = 'top'")
    except asyncpg.PostgresError as error:
        raise SkippedError(f"statements cannot be counted: {error}") from error
    try:
        yield
    finally:
        await bench.connection.execute(f"alter database {name} reset pg_stat_statements.track")


HERD = Workload(
    name="herd",
    what=f"{CLIENTS} clients enqueue singly while 100 idle workers listen",
    sides=herd,
    quick_rounds=1,
    figures=[
        Figure(
            name="herd", unit="jobs/s", ours="herd.rate",
            beside=("alone.rate",), beside_is="none listening", target=Target(at_least=0.6),
        ),
    ],
)  # fmt: skip
HERD_CLAIMS = Workload(
    name="herd_claims",
    what=f"claims for one job, {_JOBS_A_SECOND} jobs a second for 100 idle workers, their sweeps included",
    sides=herd_claims,
    quick_rounds=1,
    figures=[
        Figure(name="herd, claims", unit="a job", ours="herd.claims", target=Target(at_most=4, of_value=True)),
    ],
)


async def be_herd(queue: str, workers: int) -> None:
    """Runs the workers until standard input closes."""
    settings = load_settings({"pool_max": 1, "concurrency": 1, "log_level": "warning"})
    configure_logging(settings)
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        for _ in range(workers):
            group.start_soon(WorkerService(tasks, settings, queues=[queue], stop=stop).run)
        await anyio.to_thread.run_sync(sys.stdin.buffer.read, abandon_on_cancel=True)
        stop.set()


if __name__ == "__main__":
    anyio.run(be_herd, sys.argv[1], int(sys.argv[2]), backend_options={"use_uvloop": True})
