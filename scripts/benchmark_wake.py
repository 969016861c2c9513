"""How soon an idle worker starts what has just become ready."""

import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

import anyio
import asyncpg
import msgspec

from benchmark_drain import claim
from benchmark_load import Plan
from benchmark_measure import Figure, Round, Sides, Target, Workload
from benchmark_stack import Bench
from clarion.db import close_connection
from clarion.execution import Completion, Ready
from clarion.job import NewJob
from clarion.wake import CHANNEL, Ring, encode_ring
from verification import VerificationError

CLOCK = "bench.clock"
_PAUSE_SECONDS = 0.05
_DELAY_SECONDS = 2
# Not in step with any tick of ours.
_DUE_PAUSE_SECONDS = 0.137
# `run_at` is when the enqueue's transaction began.
_WAITS = """
    select result::text::float8 - extract(epoch from run_at)::float8 as seconds
    from clarion.job_history where queue = $1
"""


async def latency_of_worker(bench: Bench, queue: str) -> Round:
    """Single enqueues over HTTP, some time apart; until the handler looks at the clock."""
    await bench.reset()
    samples = bench.sizes.latency_samples
    body = msgspec.json.encode({"task": CLOCK, "queue": queue}).decode()
    await bench.load(bench.api, Plan(connections=1, requests=samples, body=body, pause_seconds=_PAUSE_SECONDS))
    await bench.until(bench.is_empty)
    waits = [row["seconds"] for row in await bench.connection.fetch(_WAITS, queue)]
    return percentiles(waits, samples)


async def latency_of_bare_calls(bench: Bench) -> Round:
    """The floor: insert, commit, notify, claim, between bare connections, as far apart; until the claim is answered."""
    await bench.reset()
    queue, waits, rung = "bare-latency", [], anyio.Event()
    payload = encode_ring(Ring({queue: Ready(1, datetime.now(UTC))}))
    listener = await asyncpg.connect(bench.settings.database_url)
    async with bench.bare() as enqueuing, bench.bare() as claiming:
        await listener.add_listener(CHANNEL, lambda *_: rung.set())
        for _ in range(bench.sizes.latency_samples):
            rung = anyio.Event()
            await enqueuing.enqueue_jobs([NewJob(task="bench.nothing", queue=queue)])
            await enqueuing.ring(CHANNEL, [payload])
            await rung.wait()
            (lease,) = await claim(claiming, queue, 1)
            waits.append(time.time() - lease.run_at.timestamp())
            await claiming.complete_jobs([Completion(lease.id, lease.token)])
            await anyio.sleep(_PAUSE_SECONDS)
    await close_connection(listener)
    return percentiles(waits, bench.sizes.latency_samples)


def percentiles(waits: list[float], samples: int) -> Round:
    """The median and the 99th percentile, in milliseconds."""
    if len(waits) != samples:
        raise VerificationError(f"{len(waits)} of {samples} jobs succeeded")
    hundredths = statistics.quantiles(waits, n=100, method="inclusive")
    return Round({"p50": 1000 * hundredths[49], "p99": 1000 * hundredths[98]})


@asynccontextmanager
async def latency(bench: Bench) -> AsyncIterator[Sides]:
    """An idle worker, and bare calls."""
    async with bench.worker("latency"):
        yield {
            "floor": partial(latency_of_bare_calls, bench),
            "worker": partial(latency_of_worker, bench, "latency"),
        }


async def lateness_of_worker(bench: Bench, queue: str) -> Round:
    """The worst of some jobs that become due one after the other."""
    await bench.reset()
    async with bench.api.client() as http:
        jobs = []
        for _ in range(bench.sizes.due_jobs):
            answer = await http.post("/v1/jobs", json={"task": CLOCK, "queue": queue, "delay": f"{_DELAY_SECONDS}s"})
            jobs.append(answer.raise_for_status().headers["location"])
            await anyio.sleep(_DUE_PAUSE_SECONDS)
        for job in jobs:
            await http.get(job, params={"wait": "30s"})
    return Round({"worst": 1000 * max(row["seconds"] for row in await bench.connection.fetch(_WAITS, queue))})


async def lateness_of_sleep(bench: Bench) -> Round:
    """The floor: how late bare sleeps end here."""
    late: list[float] = []

    async def nap() -> None:
        until = time.perf_counter() + _DELAY_SECONDS
        await anyio.sleep(_DELAY_SECONDS)
        late.append(1000 * (time.perf_counter() - until))

    async with anyio.create_task_group() as group:
        for _ in range(bench.sizes.due_jobs):
            group.start_soon(nap)
            await anyio.sleep(_DUE_PAUSE_SECONDS)
    return Round({"worst": max(late)})


@asynccontextmanager
async def due(bench: Bench) -> AsyncIterator[Sides]:
    """An idle worker, and sleeps."""
    async with bench.worker("due"):
        yield {"floor": partial(lateness_of_sleep, bench), "worker": partial(lateness_of_worker, bench, "due")}


_FLOOR_IS = "bare insert, commit, notify, claim"
LATENCY = Workload(
    name="latency",
    what="single enqueues over HTTP, 50 ms apart, until the handler starts on an idle worker",
    sides=latency,
    quick_rounds=1,
    figures=[
        Figure(
            name=f"latency, {name}", unit="ms", ours=f"worker.{name}",
            beside=(f"floor.{name}",), beside_is=_FLOOR_IS, target=Target(at_most=most),
        )
        for name, most in (("p50", 1.5), ("p99", 3.0))
    ],
)  # fmt: skip
DUE = Workload(
    name="due",
    what=f"how late jobs start that are delayed by {_DELAY_SECONDS} s",
    sides=due,
    quick_rounds=1,
    figures=[
        Figure(name="due, worst", unit="ms", ours="worker.worst", beside=("floor.worst",), beside_is="bare sleep")
    ],
)
