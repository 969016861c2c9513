#!/usr/bin/env python3
"""Proves the main promise on real files: every job runs, one finish each, and a killed worker loses nothing.

One job per file of a directory tree is enqueued over HTTP; two worker processes hash them; one is killed with SIGKILL
half-way and another started. Every result is compared with a digest computed here, and the database is asked whether
each job has exactly one finish and whether the killed worker's jobs ran again.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import hashlib
import signal
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import anyio
import anyio.to_thread
import asyncpg
import msgspec

from verification import (
    Deployment,
    Report,
    VerificationError,
    WorkerProcess,
    arguments,
    console,
    database,
    deployment,
    progress_bar,
    run,
    worker,
)

LEASE_SECONDS = 5.0
BATCH_JOBS = 1000
CLIENTS = 16
TICK_SECONDS = 0.02


class Takeover(msgspec.Struct, frozen=True):
    """What happened to the worker that was killed."""

    worker_id: UUID
    held: list[UUID]
    killed_at: float  # seconds of the database's clock
    finished_before: int  # jobs that were done when it was killed


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    files = await anyio.to_thread.run_sync(partial(find_files, Path(options.tree), most=options.files))
    console.print(f"{len(files)} files under {options.tree}")
    async with deployment(options) as target, database(target) as connection:
        queue = f"verify-e2e-{uuid4().hex[:8]}"
        jobs = await enqueue(target, queue, files)
        takeover = await hash_with_a_kill(target, connection, queue, jobs)
        results = await read_results(target, list(jobs))
        report = Report(f"{len(jobs)} files hashed by two workers, one of them killed")
        check_results(report, jobs, results)
        await check_finishes(report, connection, list(jobs))
        await check_takeover(report, connection, takeover, within_seconds=options.takeover_seconds)
        return report


def find_files(tree: Path, *, most: int | None) -> list[Path]:
    """Regular files below `tree`, in a stable order."""
    skipped = {"__pycache__", "site-packages"}
    found = sorted(path.resolve() for path in tree.rglob("*") if path.is_file() and skipped.isdisjoint(path.parts))
    return found[:most]


async def enqueue(target: Deployment, queue: str, files: Sequence[Path]) -> dict[UUID, Path]:
    """One job per file, through the batch route; which job is for which file."""
    jobs: dict[UUID, Path] = {}
    async with target.client() as client:
        with progress_bar("enqueued", len(files)) as bar:
            for start in range(0, len(files), BATCH_JOBS):
                batch = files[start : start + BATCH_JOBS]
                body = {
                    "jobs": [{"task": "demo.sha256", "queue": queue, "args": {"path": str(path)}} for path in batch]
                }
                answer = await client.post("/v1/jobs/batch", json=body)
                answer.raise_for_status()
                jobs |= {UUID(job["id"]): path for job, path in zip(answer.json()["jobs"], batch, strict=True)}
                bar.update(len(jobs))
    return jobs


async def hash_with_a_kill(
    target: Deployment,
    connection: "asyncpg.Connection[asyncpg.Record]",
    queue: str,
    jobs: dict[UUID, Path],
) -> Takeover:
    """Two workers; one is killed half-way and a third takes its place; returns when all jobs are done."""
    flags = ("--queues", queue, "--concurrency", "8", "--lease-seconds", str(LEASE_SECONDS))
    async with AsyncExitStack() as stack:
        victim = await stack.enter_async_context(worker(target, *flags))
        await stack.enter_async_context(worker(target, *flags))
        with progress_bar("hashed", len(jobs)) as bar:
            await wait_for_finished(connection, list(jobs), bar.update, at_least=len(jobs) // 2)
            takeover = await kill_while_it_holds_jobs(connection, victim, queue)
            await stack.enter_async_context(worker(target, *flags))
            await wait_for_finished(connection, list(jobs), bar.update, at_least=len(jobs))
    return takeover


async def kill_while_it_holds_jobs(
    connection: "asyncpg.Connection[asyncpg.Record]", victim: WorkerProcess, queue: str
) -> Takeover:
    """Freezes the worker at a moment in which it holds jobs, then kills it: it cannot finish them in between."""
    held: list[UUID] = []
    while not held:
        victim.signal(signal.SIGSTOP)
        await _settle(connection)
        rows = await connection.fetch(
            "select id, extract(epoch from clock_timestamp())::float8 as now from clarion.jobs where worker_id = $1",
            victim.id,
        )
        held = [row["id"] for row in rows]
        if not held:
            victim.signal(signal.SIGCONT)
            if not await connection.fetchval("select exists (select from clarion.jobs where queue = $1)", queue):
                raise VerificationError(
                    "all jobs were done before a worker could be caught holding one: take a larger --tree"
                )
            await anyio.sleep(0.005)
    victim.signal(signal.SIGKILL)
    finished = await connection.fetchval("select count(*) from clarion.job_history where queue = $1", queue)
    return Takeover(victim.id, held, rows[0]["now"], finished)


async def _settle(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Returns when no worker's statement is under way any more: what a frozen process had sent is committed."""
    busy = "select count(*) from pg_stat_activity where application_name = 'clarion worker' and state = 'active'"
    for _ in range(200):
        if await connection.fetchval(busy) == 0:
            return
        await anyio.sleep(0.005)


async def wait_for_finished(
    connection: "asyncpg.Connection[asyncpg.Record]",
    jobs: Sequence[UUID],
    tell: Callable[[int], None],
    *,
    at_least: int,
) -> None:
    """Returns when so many of the jobs are in the history, or nothing has moved for a minute."""
    done, still = -1, 0.0
    while done < at_least and still < 60:
        await anyio.sleep(TICK_SECONDS)
        now_done = await connection.fetchval(
            "select count(distinct id) from clarion.job_history where id = any($1)", list(jobs)
        )
        still = 0.0 if now_done != done else still + TICK_SECONDS
        done = now_done
        tell(done)


async def read_results(target: Deployment, jobs: Sequence[UUID]) -> dict[UUID, dict[str, object]]:
    """Every job as the API shows it."""
    results: dict[UUID, dict[str, object]] = {}
    waiting = list(jobs)
    async with target.client() as client:
        with progress_bar("read back", len(jobs)) as bar:

            async def read() -> None:
                while waiting:
                    job_id = waiting.pop()
                    answer = await client.get(f"/v1/jobs/{job_id}")
                    results[job_id] = answer.json()
                    bar.update(len(results))

            async with anyio.create_task_group() as group:
                for _ in range(CLIENTS):
                    group.start_soon(read)
    return results


def check_results(report: Report, jobs: dict[UUID, Path], results: dict[UUID, dict[str, object]]) -> None:
    """Each stored digest against one computed here."""
    wrong = [
        str(path)
        for job_id, path in jobs.items()
        if results[job_id].get("state") != "succeeded" or _digest_of(results[job_id]) != hash_file(path)
    ]
    evidence = f"{len(jobs) - len(wrong)} of {len(jobs)} digests agree" + (f"; not {wrong[:3]}" if wrong else "")
    report.check("every result is right", ok=not wrong, evidence=evidence)


def _digest_of(job: dict[str, object]) -> object:
    result = job.get("result")
    return result.get("sha256") if isinstance(result, dict) else None


def hash_file(path: Path) -> str:
    """The digest that the job should have found."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def check_finishes(
    report: Report, connection: "asyncpg.Connection[asyncpg.Record]", jobs: Sequence[UUID]
) -> None:
    """In the database itself: one history row per job, and nothing left over."""
    twice = await connection.fetchval(
        "select count(*) - count(distinct id) from clarion.job_history where id = any($1)",
        jobs,
    )
    once = await connection.fetchval("select count(distinct id) from clarion.job_history where id = any($1)", jobs)
    left = await connection.fetchval("select count(*) from clarion.jobs where id = any($1)", jobs)
    report.check("no job is lost", ok=once == len(jobs) and left == 0, evidence=f"{once} finished, {left} left over")
    report.check("no job is finished twice", ok=twice == 0, evidence=f"{twice} finishes too many")


async def check_takeover(
    report: Report,
    connection: "asyncpg.Connection[asyncpg.Record]",
    takeover: Takeover,
    *,
    within_seconds: float,
) -> None:
    """The killed worker's jobs: lost by it, run again elsewhere, in time."""
    again = await connection.fetchval(
        "select count(*) from clarion.job_history where id = any($1) and worker_id <> $2 and attempt >= 2",
        takeover.held,
        takeover.worker_id,
    )
    report.check(
        "the killed worker's jobs ran again elsewhere",
        ok=again == len(takeover.held),
        evidence=f"killed after {takeover.finished_before} jobs, holding {len(takeover.held)}; {again} ran again",
    )
    latest = await connection.fetchval(
        "select max(extract(epoch from started_at))::float8 from clarion.job_history where id = any($1)", takeover.held
    )
    took = (latest or float("inf")) - takeover.killed_at
    report.check(
        f"… within lease + {within_seconds:g} s",
        ok=took <= LEASE_SECONDS + within_seconds,
        evidence=f"{took:.1f} s after the kill, lease {LEASE_SECONDS:g} s",
    )


if __name__ == "__main__":
    parser = arguments("Proves that every job runs and finishes exactly once, though a worker is killed.")
    parser.add_argument("--tree", default=sysconfig.get_path("stdlib"), help="directory tree whose files are hashed")
    parser.add_argument("--files", type=int, help="at most so many files (default: all)")
    parser.add_argument("--takeover-seconds", type=float, default=2.0, help="allowed beyond the lease (default: 2)")
    run(verify, parser.parse_args())
