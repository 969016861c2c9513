#!/usr/bin/env python3
"""Proves that SIGTERM ends a worker in good order: no new job, no lost job, exit code 0; and a second one at once.

A worker with a hundred jobs running and more to come is told to stop. It claims nothing any more, lets those jobs end
that do so in its drain time, and hands the others back with their attempt. One that is told while it starts, or while
Postgres is away or silent, ends as well, and leaves no job behind that is running for nobody.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import signal
import time
from collections import Counter
from datetime import datetime

import anyio
import asyncpg
from anyio.abc import ByteStream, SocketAttribute

from verification import (
    Child,
    Deployment,
    Report,
    VerificationError,
    WorkerProcess,
    arguments,
    clarion,
    database,
    deployment,
    run,
    running,
    worker,
)
from verification_http import Json, Lane, lane, moment, until

LONG_JOBS = 50
SHORT_JOBS = 400
# Of many lengths, so that at every moment one ends and another is claimed.
SHORT_SECONDS = [0.2 + 0.01 * (17 * number % 50) for number in range(SHORT_JOBS)]
CONCURRENCY = 100
DRAIN_SECONDS = 2.0
# What handlers get to end when they are cancelled, and a busy machine.
GRACE_SECONDS = 5.0
LEASE_SECONDS = 1.5
# After the first connection to Postgres: while it looks at the database, starts, claims, and runs its first jobs.
START_SECONDS = (0.0, 0.015, 0.03, 0.06, 0.12, 0.2)


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("SIGTERM ends a worker in good order, whenever it comes")
    async with deployment(options) as target:
        await check_drain(report, target, claim_seconds=options.claim_seconds)
        await check_second_signal(report, target)
        await check_starts(report, target)
        await check_away(report)
        await check_silent(report)
    return report


async def check_drain(report: Report, target: Deployment, *, claim_seconds: float) -> None:
    """A worker that is full, and whose queue is."""
    async with lane(target, "shutdown") as own, database(target) as connection:
        await own.enqueue_many([{"task": "demo.sleep", "args": {"seconds": 600}, "priority": 9}] * LONG_JOBS)
        short_args = [{"number": number, "seconds": seconds} for number, seconds in enumerate(SHORT_SECONDS)]
        await own.enqueue_many([{"task": "verify.neighbour", "args": args} for args in short_args])
        flags = ("--concurrency", str(CONCURRENCY), "--drain-timeout-seconds", str(DRAIN_SECONDS))
        async with worker(target, "--queues", own.queue, *flags) as process:
            await until_busy(own)
            signalled = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
            took = await end_seconds(process, signal.SIGTERM)
            code = process.process.returncode
        jobs = await own.jobs()
        check_claims(report, jobs, signalled, within_seconds=claim_seconds)
        check_endings(report, [job for job in jobs if job["task"] == "verify.neighbour"])
        await check_released(report, own, [job for job in jobs if job["task"] == "demo.sleep"])
        report.check(
            "its exit code is 0, and comes as soon as what is left has been cancelled",
            ok=code == 0 and DRAIN_SECONDS <= took <= DRAIN_SECONDS + GRACE_SECONDS,
            evidence=f"exit code {code} after {took:.2f} s, of which {DRAIN_SECONDS:g} s to drain",
        )


async def until_busy(own: Lane) -> None:
    """Waits until all long jobs run and short ones come and go."""

    async def is_busy() -> bool:
        running_long = await own.jobs(state="running", task="demo.sleep")
        return len(running_long) == LONG_JOBS and len(await own.jobs(state="succeeded")) >= CONCURRENCY

    await until(is_busy, "the worker is busy")


async def end_seconds(process: WorkerProcess, *signals: signal.Signals) -> float:
    """Sends signals to a worker; the seconds until it has gone."""
    began = time.monotonic()
    for number in signals:
        process.signal(number)
    with anyio.fail_after(60):
        await process.process.wait()
    return time.monotonic() - began


def check_claims(report: Report, jobs: list[Json], signalled: float, *, within_seconds: float) -> None:
    """When the last job was claimed, by the clock of the database."""
    starts = [moment(job["started_at"]) - signalled for job in jobs if job["started_at"]]
    before = [seconds for seconds in starts if -1 <= seconds <= 0]
    waiting = len(jobs) - len(starts)
    report.check(
        f"it claims no job later than {1000 * within_seconds:g} ms after SIGTERM",
        ok=max(starts) <= within_seconds and bool(before) and waiting > 0,
        evidence=f"the last one {1000 * max(starts):.0f} ms after it; {len(before)} in the second before, "
        f"{waiting} were still waiting",
    )


def check_endings(report: Report, jobs: list[Json]) -> None:
    """The jobs that could end in time."""
    states = Counter((job["state"], job["attempt"], job["crashes"]) for job in jobs)
    report.check(
        "jobs that end within the drain time succeed, and the others are left alone",
        ok=set(states) == {("succeeded", 1, 0), ("ready", 0, 0)},
        evidence="; ".join(f"{count} {state} in attempt {attempt}" for (state, attempt, _), count in states.items()),
    )


async def check_released(report: Report, own: Lane, jobs: list[Json]) -> None:
    """The jobs that could not."""
    states = Counter((job["state"], job["attempt"], job["errors"], job["crashes"]) for job in jobs)
    report.check(
        "the rest is handed back, with the attempt, and nothing is held against it",
        ok=states == {("ready", 0, 0, 0): LONG_JOBS},
        evidence="; ".join(
            f"{count} {state}, attempt {attempt}, errors {errors}, crashes {crashes}"
            for (state, attempt, errors, crashes), count in states.items()
        ),
    )
    leases = await own.worker().claim(LONG_JOBS)
    places = [lease["task"] for lease in leases].count("demo.sleep")
    report.check(
        "… and is there for the next worker at once, in its old place",
        ok=(places, {lease["attempt"] for lease in leases}) == (LONG_JOBS, {1}),
        evidence=f"{places} of {LONG_JOBS} at the head of the queue, as attempt 1",
    )


async def check_second_signal(report: Report, target: Deployment) -> None:
    """Somebody who cannot wait."""
    async with lane(target, "shutdown-twice") as own:
        job = await own.enqueue(task="demo.sleep", args={"seconds": 600})

        async def runs() -> bool:
            return bool((await own.job(job["id"]))["state"] == "running")

        flags = ("--queues", own.queue, "--lease-seconds", str(LEASE_SECONDS), "--drain-timeout-seconds", "60")
        async with worker(target, *flags) as process:
            await until(runs, "the job runs")
            process.signal(signal.SIGTERM)
            await process.child.line_with("worker.drain_started")
            took = await end_seconds(process, signal.SIGTERM)
        lease = await own.worker().claim_one()
        report.check(
            "a second SIGTERM ends it at once",
            ok=took <= 1 and process.process.returncode == 1,
            evidence=f"exit code {process.process.returncode} after {1000 * took:.0f} ms",
        )
        report.check(
            "… and its job runs elsewhere when the lease runs out",
            ok=(lease["id"], lease["attempt"], lease["crashes"]) == (job["id"], 2, 1),
            evidence=f"attempt {lease['attempt']}, crashes {lease['crashes']}",
        )


def starting(database_url: str, queue: str) -> list[str]:
    """The command line of a worker that is not waited for."""
    flags = ["--demo", "--queues", queue, "--drain-timeout-seconds", "0.2", "--log-format", "json"]
    return [*clarion(), "worker", *flags, "--database-url", database_url]


async def stop(child: Child) -> float:
    """SIGTERM; the seconds until the process has gone."""
    began = time.monotonic()
    child.process.send_signal(signal.SIGTERM)
    with anyio.fail_after(60):
        await child.process.wait()
    return time.monotonic() - began


async def until_connected(child: Child, connection: "asyncpg.Connection[asyncpg.Record]", since: datetime) -> None:
    """Waits for the first connection of a worker to Postgres."""
    connected = """
        select exists (
          select from pg_stat_activity where application_name = 'clarion worker' and backend_start > $1
        )
    """
    while not await connection.fetchval(connected, since):
        if child.process.returncode is not None:
            raise VerificationError(f"a worker ended by itself, with exit code {child.process.returncode}")
        await anyio.sleep(0.002)


async def check_starts(report: Report, target: Deployment) -> None:
    """SIGTERM at many moments of a start."""
    async with lane(target, "shutdown-start") as own, database(target) as connection:
        await own.enqueue_many([{"task": "demo.sleep", "args": {"seconds": 600}}] * LONG_JOBS)
        command = starting(target.known_database_url(), own.queue)
        took: dict[str, float] = {}
        codes: dict[str, int | None] = {}
        for seconds in START_SECONDS:
            since = await connection.fetchval("select clock_timestamp()")
            async with running(command) as child:
                await until_connected(child, connection, since)
                await anyio.sleep(seconds)
                name = f"{1000 * seconds:.0f} ms after its first connection"
                took[name], codes[name] = await stop(child), child.process.returncode
        slowest = max(took, key=lambda name: took[name])
        report.check(
            f"SIGTERM at {len(codes)} moments of a start and of the first claim ends it with 0",
            ok=set(codes.values()) == {0} and took[slowest] <= GRACE_SECONDS,
            evidence=f"exit codes {dict(Counter(codes.values()))}, at most {took[slowest]:.2f} s, {slowest}",
        )
        states = Counter((job["state"], job["attempt"], job["crashes"]) for job in await own.jobs())
        report.check(
            "… and strands no job",
            ok=states == {("ready", 0, 0): LONG_JOBS},
            evidence="; ".join(f"{count} {state}, attempt {attempt}" for (state, attempt, _), count in states.items()),
        )


async def check_away(report: Report) -> None:
    """SIGTERM while nothing listens where Postgres should be."""
    async with running(starting("postgresql://nobody@127.0.0.1:1/none", "none")) as child:
        await child.line_with('"step.failed"')
        took = await stop(child)
    report.check(
        "SIGTERM while Postgres cannot be reached ends it with 0",
        ok=child.process.returncode == 0 and took <= GRACE_SECONDS,
        evidence=f"exit code {child.process.returncode} after {took:.2f} s",
    )


async def check_silent(report: Report) -> None:
    """SIGTERM while Postgres takes connections and says nothing."""
    connected = anyio.Event()

    async def say_nothing(stream: ByteStream) -> None:
        async with stream:
            connected.set()
            await anyio.sleep_forever()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, say_nothing)
        port = listener.extra(SocketAttribute.local_port)  # noqa: S610  no SQL
        async with running(starting(f"postgresql://nobody@127.0.0.1:{port}/none", "none")) as child:
            await connected.wait()
            took = await stop(child)
        group.cancel_scope.cancel()
    report.check(
        "SIGTERM while Postgres is silent ends it with 0",
        ok=child.process.returncode == 0 and took <= GRACE_SECONDS,
        evidence=f"exit code {child.process.returncode} after {took:.2f} s",
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument(
        "--claim-seconds", type=float, default=0.1, help="for a last claim after SIGTERM (default: 0.1)"
    )
    run(verify, parser.parse_args())
