"""Throughput: how fast workers drain a queue, beside a bare loop of claims and completions."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from uuid import uuid4

from benchmark_measure import Figure, Round, Side, Sides, Target, Workload
from benchmark_stack import CONCURRENCY, NOTHING, Backlog, Bench, Launched, WorkerPlan
from clarion.execution import Completion, Lease, Policy
from clarion.store import Store

FLOOR_BATCHES = (100, 500)
CONCURRENCIES = (1, 10, 50, 100, 200, 500)
# A worker with few slots is slow: it gets this share of the jobs.
_SHARES = {1: 0.1, 10: 0.5}

BARE_LOOP = tuple(f"floor_{batch}.rate" for batch in FLOOR_BATCHES)
BARE_LOOP_IS = f"bare claim/complete loop, the better of {' and '.join(map(str, FLOOR_BATCHES))} at a time"


async def claim(store: Store, queue: str, jobs_max: int) -> list[Lease]:
    """The bare claim."""
    return await store.claim_for(uuid4(), {queue: jobs_max}, {NOTHING: Policy()}, lease_seconds=30)


async def drain_bare(bench: Bench, *, batch: int, jobs: int) -> Round:
    """The floor: what is claimed is completed at once, on one connection, timed as a worker is."""
    await bench.reset()
    backlog = await bench.fill(f"bare-{batch}", jobs)
    async with bench.bare() as store:
        meter = bench.meter()
        while leases := await claim(store, backlog.queue, batch):
            await store.complete_jobs([Completion(lease.id, lease.token) for lease in leases])
        return meter.round({"rate": await bench.rate(backlog)}, jobs)


async def drain_by(bench: Bench, worker: Launched, queue: str, *, jobs: int) -> Round:
    """A worker that waits for work gets all of it at once."""
    await bench.reset()
    return await bench.drained(await bench.fill(queue, jobs), worker)


def floors(bench: Bench, jobs: int) -> dict[str, Side]:
    """The bare loops."""
    return {f"floor_{batch}": partial(drain_bare, bench, batch=batch, jobs=jobs) for batch in FLOOR_BATCHES}


@asynccontextmanager
async def drain(bench: Bench) -> AsyncIterator[Sides]:
    """One worker that logs as it does by default, and one that keeps quiet about attempts."""
    jobs = bench.sizes.drain_jobs
    plans = WorkerPlan("drain"), WorkerPlan("quiet", ("--log-level", "warning"))
    async with bench.workers(*plans) as [talking, quiet]:
        yield floors(bench, jobs) | {
            "default": partial(drain_by, bench, talking, "drain", jobs=jobs),
            "quiet": partial(drain_by, bench, quiet, "quiet", jobs=jobs),
        }


@asynccontextmanager
async def drain_twice(bench: Bench) -> AsyncIterator[Sides]:
    """One worker process, and two under one supervisor."""
    jobs = bench.sizes.drain_jobs
    async with bench.workers(WorkerPlan("one"), WorkerPlan("two", processes=2)) as [one, two]:
        yield {
            "one": partial(drain_by, bench, one, "one", jobs=jobs),
            "two": partial(drain_by, bench, two, "two", jobs=jobs),
        }


@asynccontextmanager
async def concurrency(bench: Bench) -> AsyncIterator[Sides]:
    """A worker of each concurrency."""
    sides = floors(bench, bench.sizes.concurrency_jobs)
    plans = [WorkerPlan(f"slots-{slots}", concurrency=slots) for slots in CONCURRENCIES]
    async with bench.workers(*plans) as workers:
        for plan, worker in zip(plans, workers, strict=True):
            jobs = round(bench.sizes.concurrency_jobs * _SHARES.get(plan.concurrency, 1))
            side = partial(drain_by, bench, worker, plan.queue, jobs=max(jobs, plan.concurrency))
            sides[str(plan.concurrency)] = side
        yield sides


@asynccontextmanager
async def snapshot(bench: Bench) -> AsyncIterator[Sides]:
    """Round after round of jobs under one held snapshot; the queue is analysed whenever it is empty."""

    async def hold_and_drain(worker: Launched) -> Round:
        await bench.reset()
        rounds = []
        async with bench.held_snapshot():
            for _ in range(bench.sizes.snapshot_rounds):
                await bench.connection.execute("analyze clarion.jobs")
                backlog: Backlog = await bench.fill("snapshot", bench.sizes.snapshot_jobs)
                rounds.append(await bench.drained(backlog, worker))
        last = rounds[-1]
        return Round({"first": rounds[0].values["rate"], "last": last.values["rate"]}, last.postgres_cpu, last.our_cpu)

    async with bench.worker("snapshot") as worker:
        yield {"held": partial(hold_and_drain, worker)}


DRAIN = Workload(
    name="drain",
    what=f"ready no-op jobs, one worker process of concurrency {CONCURRENCY}",
    sides=drain,
    figures=[
        Figure(
            name="drain", unit="jobs/s", ours="default.rate",
            beside=BARE_LOOP, beside_is=BARE_LOOP_IS, target=Target(at_least=0.6),
        ),
        Figure(
            name="drain_quiet", unit="jobs/s", ours="quiet.rate",
            beside=BARE_LOOP, beside_is=BARE_LOOP_IS, target=Target(at_least=0.75),
        ),
    ],
)  # fmt: skip
DRAIN2 = Workload(
    name="drain2",
    what="the same through `clarion worker --processes 2`",
    quick_rounds=1,
    sides=drain_twice,
    figures=[
        Figure(
            name="drain2", unit="jobs/s", ours="two.rate",
            beside=("one.rate",), beside_is="one process", target=Target(at_least=1.3),
        ),
    ],
)  # fmt: skip
CONCURRENCY_CURVE = Workload(
    name="concurrency",
    what="drain by workers of several concurrencies, for the chart",
    sides=concurrency,
    quick_rounds=1,
    figures=[
        Figure(
            name=f"concurrency {slots}", unit="jobs/s", ours=f"{slots}.rate", beside=BARE_LOOP, beside_is=BARE_LOOP_IS
        )
        for slots in CONCURRENCIES
    ],
)
SNAPSHOT = Workload(
    name="snapshot",
    what="drain, round after round, while another session holds a snapshot, with an ANALYZE of the empty queue between",
    sides=snapshot,
    quick_rounds=1,
    figures=[
        Figure(
            name="snapshot", unit="jobs/s, last round", ours="held.last",
            beside=("held.first",), beside_is="first round", target=Target(at_least=0.9),
        ),
    ],
)  # fmt: skip
