"""Jobs going in over HTTP, one by one and in bulk, and jobs worked off over HTTP."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec

from benchmark_load import Plan
from benchmark_measure import Figure, Round, Sides, Target, Workload
from benchmark_stack import NOTHING, Api, Bench

CROWD = 32
WORKERS = 20
BATCH_JOBS = 1_000
NDJSON = "application/x-ndjson"
_JOB = {"task": NOTHING, "queue": "in"}
_BODY = msgspec.json.encode(_JOB).decode()
_BARE_INSERT = "insert into clarion.jobs (queue, task, args) select * from unnest($1::text[], $2::text[], $3::json[])"


@asynccontextmanager
async def both_apis(bench: Bench) -> AsyncIterator[dict[str, Api]]:
    """Two of them: as shipped, and one in which each call runs a statement of its own."""
    async with bench.serving({"batch_max": "1"}) as single:
        yield {"on": bench.api, "off": single}


async def post(bench: Bench, api: Api, plan: Plan, *, jobs: int) -> Round:
    """How many jobs a second went in."""
    await bench.reset()
    meter = bench.meter(api)
    load = await bench.load(api, plan)
    measured = meter.round({"rate": jobs / load.seconds}, jobs)
    await bench.expect_jobs(jobs)
    return measured


@asynccontextmanager
async def enqueue(bench: Bench) -> AsyncIterator[Sides]:
    """Single requests of one client, and of many, with batching and without."""
    few, many = bench.sizes.single_requests, bench.sizes.crowd_requests
    one = Plan(connections=1, requests=few, body=_BODY)
    crowd = Plan(connections=CROWD, requests=many, body=_BODY)
    async with both_apis(bench) as apis:
        yield {f"one_{way}": partial(post, bench, api, one, jobs=few) for way, api in apis.items()} | {
            f"crowd_{way}": partial(post, bench, api, crowd, jobs=many) for way, api in apis.items()
        }


async def insert_bare(bench: Bench, jobs: int) -> Round:
    """The floor: so many rows a statement, on one connection."""
    await bench.reset()
    rows = ["in"] * BATCH_JOBS, [NOTHING] * BATCH_JOBS, ["{}"] * BATCH_JOBS
    meter = bench.meter()
    started = time.perf_counter()
    for _ in range(jobs // BATCH_JOBS):
        await bench.connection.execute(_BARE_INSERT, *rows)
    return meter.round({"rate": jobs / (time.perf_counter() - started)}, jobs)


@asynccontextmanager
async def bulk(bench: Bench) -> AsyncIterator[Sides]:
    """Batches as JSON documents, and one stream of lines, from one client each."""
    jobs = max(BATCH_JOBS, bench.sizes.bulk_jobs // BATCH_JOBS * BATCH_JOBS)
    document = msgspec.json.encode({"jobs": [_JOB] * BATCH_JOBS}).decode()
    batches = Plan(connections=1, requests=jobs // BATCH_JOBS, path="/v1/jobs/batch", body=document)
    lines = Plan(
        connections=1, requests=1, path="/v1/jobs/batch", content_type=NDJSON, body=f"{_BODY}\n" * jobs
    )  # fmt: skip
    yield {
        "floor": partial(insert_bare, bench, jobs),
        "json": partial(post, bench, bench.api, batches, jobs=jobs),
        "ndjson": partial(post, bench, bench.api, lines, jobs=jobs),
    }


async def work(bench: Bench, api: Api, queue: str) -> Round:
    """How many jobs a second were leased and completed, each by itself."""
    jobs = bench.sizes.http_jobs
    await bench.reset()
    await bench.fill(queue, jobs)
    meter = bench.meter(api)
    load = await bench.load(api, Plan(connections=WORKERS, requests=jobs, lease_from=queue))
    measured = meter.round({"rate": jobs / load.seconds}, jobs)
    await bench.expect_jobs(0)
    return measured


@asynccontextmanager
async def http_workers(bench: Bench) -> AsyncIterator[Sides]:
    """The worker protocol, with batching and without."""
    async with both_apis(bench) as apis:
        yield {way: partial(work, bench, api, f"http-{way}") for way, api in apis.items()}


BATCHING_OFF = "batching off"
ENQUEUE = Workload(
    name="enqueue",
    what=f"POST /v1/jobs, 1 and {CROWD} clients",
    sides=enqueue,
    figures=[
        Figure(
            name="enqueue, 1 client", unit="jobs/s", ours="one_on.rate",
            beside=("one_off.rate",), beside_is=BATCHING_OFF, target=Target(at_least=0.9),
        ),
        Figure(
            name=f"enqueue, {CROWD} clients", unit="jobs/s", ours="crowd_on.rate",
            beside=("crowd_off.rate",), beside_is=BATCHING_OFF, target=Target(at_least=2),
        ),
    ],
)  # fmt: skip
BULK = Workload(
    name="bulk",
    what="batches of 1,000 as JSON; one stream of NDJSON",
    quick_rounds=1,
    sides=bulk,
    figures=[
        Figure(
            name=f"bulk, {way}", unit="jobs/s", ours=f"{side}.rate",
            beside=("floor.rate",), beside_is="bare `unnest` insert", target=Target(at_least=0.5),
        )
        for way, side in (("JSON", "json"), ("NDJSON", "ndjson"))
    ],
)  # fmt: skip
HTTP_WORKERS = Workload(
    name="http_workers",
    what=f"{WORKERS} HTTP workers: lease 1, complete 1",
    sides=http_workers,
    quick_rounds=1,
    figures=[
        Figure(
            name="http_workers", unit="jobs/s", ours="on.rate",
            beside=("off.rate",), beside_is=BATCHING_OFF, target=Target(at_least=2),
        ),
    ],
)  # fmt: skip
