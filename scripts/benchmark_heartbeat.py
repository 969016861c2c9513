"""What it costs Postgres to keep the leases of thousands of running jobs, and whether their updates are HOT."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID

import anyio
import msgspec

from benchmark_measure import Figure, Round, Sides, SkippedError, Target, Workload, cpu_seconds
from benchmark_stack import Bench, Launched, WorkerPlan
from clarion.db import close_connection, connect
from verification import VerificationError

_LEASE_SECONDS = 2.0
_PAUSE_SECONDS = _LEASE_SECONDS / 3
# The first heartbeats after the claims move rows to pages with more room, whoever sends them.
_SETTLING_BEATS = 3
_WORKER_SESSIONS = ("clarion worker", "clarion heartbeat")
_FLOOR_SESSIONS = ("clarion floor",)
_RUNNING = "select count(*) from clarion.jobs where state = 'running'"
_EXPIRY = "select lease_expires_at from clarion.jobs where id = $1"
_HELD = "select id, lease_token from clarion.jobs order by id"
_CLAIM_BARE = """
    update clarion.jobs set state = 'running', lease_token = gen_random_uuid(), worker_id = gen_random_uuid(),
      started_at = now(), attempt = 1, lease_expires_at = now() + interval '1 hour'
    where queue = $1
"""
_BEAT_BARE = """
    update clarion.jobs as j set lease_expires_at = clock_timestamp() + interval '1 hour'
    from unnest($1::uuid[], $2::uuid[]) as h (id, token)
    where j.id = any(array[h.id]) and j.lease_token = h.token
"""
_SESSIONS = "select pid from pg_stat_activity where application_name = any($1) and datname = current_database()"
_END_SESSIONS = f"select pg_terminate_backend(pid) from ({_SESSIONS}) as sessions"  # noqa: S608  ours
_UPDATES = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relid = 'clarion.jobs'::regclass"


class Updates(msgspec.Struct, frozen=True):
    """How many rows were updated, and how many of them without touching an index."""

    all: int
    hot: int

    def share_since(self, before: "Updates") -> float:
        """Which share of those in between was HOT."""
        if self.all == before.all:
            raise VerificationError("no update was counted: is track_counts off?")
        return (self.hot - before.hot) / (self.all - before.all)


@asynccontextmanager
async def heartbeat(bench: Bench) -> AsyncIterator[Sides]:
    """A bare update, and a worker whose every slot is taken."""
    if bench.postmaster is None:
        raise SkippedError("the server runs elsewhere, so that its CPU time cannot be read")
    yield {"floor": partial(beat_bare, bench), "worker": partial(beat_by_worker, bench)}


async def beat_by_worker(bench: Bench) -> Round:
    """The CPU time of the backend that takes the heartbeats, over some of them."""
    jobs, beats, queue = bench.sizes.heartbeat_jobs, bench.sizes.heartbeat_beats, "heartbeat"
    await bench.reset()
    await bench.fill(queue, jobs, "bench.hold")
    flags = ("--lease-seconds", str(_LEASE_SECONDS))
    # Not stopped but killed: it would wait for its handlers.
    async with bench.workers(WorkerPlan(queue, flags, concurrency=jobs, stop_seconds=0)) as [worker]:

        async def is_full() -> bool:
            return bool(await bench.connection.fetchval(_RUNNING) == jobs)

        await bench.until(is_full, worker)
        watched = await bench.connection.fetchval("select id from clarion.jobs limit 1")
        await beaten(bench, watched, worker, times=_SETTLING_BEATS)
        before = await updates(bench, _WORKER_SESSIONS)
        await beaten(bench, watched, worker, times=1)
        pid = await heartbeat_backend(bench)
        started = cpu_seconds(pid)
        await beaten(bench, watched, worker, times=beats)
        spent = cpu_seconds(pid) - started
    return round_of(spent, beats * jobs, hot=(await updates(bench, _WORKER_SESSIONS)).share_since(before))


async def beaten(bench: Bench, job: UUID, worker: Launched, *, times: int) -> None:
    """Returns when the lease of that job has been extended so many times."""
    for _ in range(times):
        before = await bench.connection.fetchval(_EXPIRY, job)

        async def is_extended(before: object = before) -> bool:
            return bool(await bench.connection.fetchval(_EXPIRY, job) != before)

        await bench.until(is_extended, worker)


async def heartbeat_backend(bench: Bench) -> int:
    """The pid of the backend behind the worker's heartbeat thread."""
    pids = await bench.connection.fetch(_SESSIONS, ["clarion heartbeat"])
    if len(pids) != 1:
        raise VerificationError(f"{len(pids)} workers send heartbeats instead of 1")
    return int(pids[0]["pid"])


async def beat_bare(bench: Bench) -> Round:
    """The floor: one minimal update of all leases, as often."""
    jobs, beats, queue = bench.sizes.heartbeat_jobs, bench.sizes.heartbeat_beats, "bare-heartbeat"
    await bench.reset()
    await bench.fill(queue, jobs)
    connection = await connect(bench.settings, name="floor")
    try:
        await connection.execute(_CLAIM_BARE, queue)
        held = await connection.fetch(_HELD)
        columns = [row["id"] for row in held], [row["lease_token"] for row in held]
        for _ in range(_SETTLING_BEATS):
            await connection.execute(_BEAT_BARE, *columns)
    finally:
        await close_connection(connection)
    before = await updates(bench, _FLOOR_SESSIONS)
    connection = await connect(bench.settings, name="floor")
    try:
        await connection.execute(_BEAT_BARE, *columns)
        pid = await connection.fetchval("select pg_backend_pid()")
        started = cpu_seconds(pid)
        for _ in range(beats):
            await anyio.sleep(_PAUSE_SECONDS)
            await connection.execute(_BEAT_BARE, *columns)
        spent = cpu_seconds(pid) - started
    finally:
        await close_connection(connection)
    return round_of(spent, beats * jobs, hot=(await updates(bench, _FLOOR_SESSIONS)).share_since(before))


async def updates(bench: Bench, sessions: tuple[str, ...]) -> Updates:
    """What these sessions did so far. Each counts for itself, and tells when it ends: so they are ended."""
    await bench.connection.execute(_END_SESSIONS, sessions)

    async def is_told() -> bool:
        return not await bench.connection.fetch(_SESSIONS, sessions)

    await bench.until(is_told)
    [row] = await bench.connection.fetch(_UPDATES)
    return Updates(*row)


def round_of(spent: float, heartbeats: int, *, hot: float) -> Round:
    """CPU milliseconds per thousand heartbeats, and the share that was HOT."""
    cpu = 1000 * spent / heartbeats
    return Round({"cpu": 1000 * cpu, "hot": hot}, postgres_cpu=cpu)


HEARTBEAT = Workload(
    name="heartbeat",
    what="one worker holds 5,000 running jobs",
    sides=heartbeat,
    quick_rounds=1,
    figures=[
        Figure(
            name="heartbeat", unit="Postgres CPU ms per 1,000", ours="worker.cpu",
            beside=("floor.cpu",), beside_is="minimal update", target=Target(at_most=1.2),
        ),
        Figure(
            name="heartbeat, HOT", unit="share of updates", ours="worker.hot",
            beside=("floor.hot",), beside_is="minimal update", target=Target(at_least=0.95, of_value=True),
        ),
    ],
)  # fmt: skip
