"""A million jobs through: what is held in memory and on disk stays as it was, and so does the speed."""

import statistics
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID

import anyio
import msgspec

from benchmark_measure import Figure, Round, Sides, Target, Workload, family, resident_kilobytes
from benchmark_stack import NOTHING, Bench, Launched, WorkerPlan
from verification import VerificationError

QUEUE = "soak"
BATCH_JOBS = 1_000
# The enqueuer stays so far ahead of the workers.
_BATCHES_AHEAD = 10
_SAMPLE_SECONDS = 1.0
_SIZE = "select pg_total_relation_size('clarion.jobs')"
_FINISHED = "select count(*) from clarion.job_history where queue = $1"
_RATES = """
    with numbered as (
      select finished_at, row_number() over (order by finished_at) as n
      from clarion.job_history where queue = $1
    )
    select
      extract(epoch from max(finished_at) filter (where n <= $2) - min(finished_at))::float8 as first_seconds,
      extract(epoch from max(finished_at) - min(finished_at) filter (where n > $3))::float8 as last_seconds
    from numbered
"""


class Sample(msgspec.Struct, frozen=True):
    """The resident kilobytes of each process, and the bytes of the hot table with its indexes."""

    resident: dict[int, int]
    table_bytes: int


class Enqueued(msgspec.Struct, frozen=True):
    """What is read of an answer to a batch: a job of it."""

    id: UUID


class Batch(msgspec.Struct, frozen=True):
    """An answer to a batch."""

    jobs: list[Enqueued]


@asynccontextmanager
async def soak(bench: Bench) -> AsyncIterator[Sides]:
    """An API, two workers, a scheduler."""
    async with bench.workers(WorkerPlan(QUEUE), WorkerPlan(QUEUE)) as workers:
        yield {"through": partial(run_through, bench, workers)}


async def run_through(bench: Bench, workers: list[Launched]) -> Round:
    """Enqueues all jobs, never far ahead of the workers, and samples until they are finished."""
    jobs = max(10 * BATCH_JOBS, bench.sizes.soak_jobs)
    await bench.reset()
    samples: list[Sample] = []
    processes = [bench.api, *workers, *([bench.scheduler] if bench.scheduler else [])]
    meter = bench.meter(*processes)
    async with anyio.create_task_group() as group:
        group.start_soon(sample_for_ever, bench, processes, samples)
        await enqueue(bench, jobs)
        await until_finished(bench, jobs, workers)
        group.cancel_scope.cancel()
    return meter.round(await rates(bench, jobs) | growth(samples), jobs)


async def enqueue(bench: Bench, jobs: int) -> None:
    """Batches over HTTP, each once the last job of an earlier one is gone: one look by its key."""
    body = msgspec.json.encode({"jobs": [{"task": NOTHING, "queue": QUEUE}] * BATCH_JOBS})
    headers = {"content-type": "application/json"}
    last_jobs: deque[UUID] = deque()

    async def is_room() -> bool:
        return not await bench.connection.fetchval(
            "select exists (select from clarion.jobs where id = $1)", last_jobs[0]
        )

    async with bench.api.client() as http:
        for _ in range(jobs // BATCH_JOBS):
            if len(last_jobs) == _BATCHES_AHEAD:
                await bench.until(is_room)
                last_jobs.popleft()
            answer = await http.post("/v1/jobs/batch", content=body, headers=headers)
            last_jobs.append(msgspec.json.decode(answer.raise_for_status().content, type=Batch).jobs[-1].id)


async def until_finished(bench: Bench, jobs: int, workers: list[Launched]) -> None:
    """Returns when nothing is live; everything must have succeeded."""
    await bench.until(bench.is_empty, *workers)
    finished = await bench.connection.fetchval(_FINISHED, QUEUE)
    if finished != jobs // BATCH_JOBS * BATCH_JOBS:
        raise VerificationError(f"{finished} of {jobs} jobs succeeded")


async def sample_for_ever(bench: Bench, processes: list[Launched], samples: list[Sample]) -> None:
    """Looks at every process, children included, once a second."""
    async with bench.looking_on() as connection:
        while True:
            pids = family(*(each.pid for each in processes))
            resident = {pid: resident_kilobytes(pid) for pid in pids}
            samples.append(Sample(resident, await connection.fetchval(_SIZE)))
            await anyio.sleep(_SAMPLE_SECONDS)


async def rates(bench: Bench, jobs: int) -> dict[str, float]:
    """How many jobs a second finished in the first tenth, and in the last."""
    tenth = jobs // 10
    row = await bench.connection.fetchrow(_RATES, QUEUE, tenth, jobs - tenth)
    assert row is not None  # noqa: S101  an aggregate has a row
    return {"first": tenth / row["first_seconds"], "last": tenth / row["last_seconds"]}


def growth(samples: list[Sample]) -> dict[str, float]:
    """Of the worst process, from the second tenth of the time to the last; of the hot table, in the last third.

    The first tenth is for warming up. The table grows until autovacuum comes by, and again until it comes again: what
    it must keep to is its highest size in the first two thirds.
    """
    tenth, third = max(1, len(samples) // 10), max(1, len(samples) // 3)
    early, late = samples[tenth : 2 * tenth] or samples, samples[-tenth:]
    grown = {
        pid: statistics.median(each.resident.get(pid, 0) for each in late) / before
        for pid in early[0].resident
        if (before := statistics.median(each.resident.get(pid, 0) for each in early))
    }
    highest = max(each.table_bytes for each in samples[:-third] or samples)
    table = max(each.table_bytes for each in samples[-third:]) / highest
    return {"rss": max(grown.values()), "table": table}


SOAK = Workload(
    name="soak",
    what="1,000,000 jobs through the API and two workers",
    sides=soak,
    quick_rounds=1,
    full_rounds=1,
    full_only=True,
    figures=[
        Figure(
            name="soak, rate", unit="jobs/s, last tenth", ours="through.last",
            beside=("through.first",), beside_is="first tenth", target=Target(at_least=0.95),
        ),
        Figure(
            name="soak, memory", unit="times, worst process", ours="through.rss",
            target=Target(at_most=1.1, of_value=True),
        ),
        Figure(
            name="soak, hot table", unit="times its size before", ours="through.table",
            target=Target(at_most=1.1, of_value=True),
        ),
    ],
)  # fmt: skip
