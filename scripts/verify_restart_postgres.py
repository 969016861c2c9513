#!/usr/bin/env python3
"""Proves that Postgres may crash again and again under load: nothing acknowledged is lost, and nothing runs for nobody.

Postgres is stopped as by a crash (`immediate`) and started again every few seconds, while clients enqueue with keys and
two workers in Python and one that speaks HTTP run the jobs. An enqueue is committed or answered 503, and sent again
with its key until it is acknowledged; each such job exists once, and finishes once. No process is started again, and
each worker finishes jobs soon after every restart. It does so to a stack of its own only, and with --url says so.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import os
import random
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import anyio
import anyio.to_thread
import httpx2

from clarion.embedded import PostgresServer, running_postgres
from verification import (
    Deployment,
    Report,
    WorkerProcess,
    arguments,
    console,
    database,
    progress_bar,
    run,
    stack,
    worker,
)
from verification_http import Json, Lane, body_of, lane, problem_of

CLIENTS = 8
WORKERS = 2
# More than the workers together can do, so that each of them always has work.
PAUSE_SECONDS = 0.05
EFFECT_SECONDS = 0.05
SLOTS = 2
LEASE_SECONDS = 5.0
DOWN_SECONDS = 0.5
# A client waits for its first answer no longer than this, often less.
HANG_UP_SECONDS = 0.02
# For the rest of the queue at the end, with the leases of claims whose answers were lost.
DRAIN_SECONDS = 60.0

ENQUEUE_ANSWERS = {
    "201",
    "503 /problems/unavailable",
    "503 /problems/overloaded",
    "409 /problems/idempotency-in-flight",
}
LEASE_ANSWERS = {"200", "204", "503 /problems/unavailable", "503 /problems/overloaded"}


class Load:
    """What clients and the HTTP worker of this process were answered."""

    def __init__(self, own: Lane, directory: str) -> None:
        self._own = own
        self._directory = directory
        self.jobs: dict[str, str] = {}  # by key
        self.enqueues: Counter[str] = Counter()
        self.lease_calls: Counter[str] = Counter()
        self.replayed = 0
        self.stopping = False

    async def enqueue(self) -> None:
        """One client, until `stopping`: a job after the other, each sent until it is acknowledged."""
        while not self.stopping:
            key = str(uuid4())
            args = {"directory": self._directory, "seconds": EFFECT_SECONDS}
            body = {"queue": self._own.queue, "task": "verify.effect", "args": args}
            # Many hang up before they have the answer, and have to ask again.
            with anyio.move_on_after(random.uniform(0, HANG_UP_SECONDS)):  # noqa: S311  no secret
                await self._ask("/v1/jobs", body, self.enqueues, idempotency_key=key)
            answer = await self._until_answered("/v1/jobs", body, self.enqueues, idempotency_key=key)
            self.replayed += "idempotency-replayed" in answer.headers
            self.jobs[key] = body_of(answer)["id"]
            await anyio.sleep(PAUSE_SECONDS)

    async def work(self, worker_id: str) -> None:
        """A worker that speaks HTTP, until cancelled."""
        wish = {"worker": worker_id, "queues": [self._own.queue], "max": SLOTS, "lease": LEASE_SECONDS, "wait": 5}
        while True:
            answer = await self._until_answered("/v1/leases", wish, self.lease_calls)
            leases = body_of(answer)["leases"] if answer.content else []
            async with anyio.create_task_group() as group:
                for lease in leases:
                    group.start_soon(self._run, lease)

    async def _run(self, lease: Json) -> None:
        name = uuid4().hex
        await anyio.Path(self._directory, f"{lease['id']}.{name}").touch()
        await anyio.sleep(EFFECT_SECONDS)
        await self._until_answered(f"/v1/leases/{lease['token']}/complete", {"result": name}, self.lease_calls)

    async def _ask(self, path: str, body: Json, said: Counter[str], **headers: str) -> httpx2.Response:
        answer = await self._own.post(path, body, **headers)
        said[problem_of(answer) if answer.is_error else str(answer.status_code)] += 1
        return answer

    async def _until_answered(self, path: str, body: Json, said: Counter[str], **headers: str) -> httpx2.Response:
        """Makes the same call until its answer is final."""
        while True:
            answer = await self._ask(path, body, said, **headers)
            if "retry-after" not in answer.headers:
                return answer
            # Sooner than asked, to meet as much of the outage as possible.
            await anyio.sleep(min(0.2, float(answer.headers["retry-after"])))


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("Postgres crashes again and again under load, and nothing acknowledged is lost")
    if options.url:
        report.skip(
            "Postgres may crash", because="nobody stops that of a deployment; it runs on a stack of its own only"
        )
        return report
    # The reaper's grace after a start of Postgres is a lease as well.
    os.environ["CLARION_LEASE_SECONDS"] = str(LEASE_SECONDS)
    with TemporaryDirectory(prefix="clarion-verify-") as directory, running_postgres(None) as server:
        async with stack(server.url) as target, lane(target, "restart") as own, AsyncExitStack() as stack_of_workers:
            flags = ("--queues", own.queue, "--concurrency", str(SLOTS), "--lease-seconds", str(LEASE_SECONDS))
            processes = [await stack_of_workers.enter_async_context(worker(target, *flags)) for _ in range(WORKERS)]
            load, http_worker = Load(own, directory), str(uuid4())
            async with anyio.create_task_group() as workers:
                workers.start_soon(load.work, http_worker)
                starts = await crash_under_load(target, server, load, options)
                await until_drained(target, own)
                workers.cancel_scope.cancel()
            check_answers(report, load)
            await check_jobs(report, target, own, load, directory)
            ids = [*(process.id for process in processes), UUID(http_worker)]
            await check_resumption(report, target, ids, starts, within_seconds=options.resume_seconds)
            await check_processes(report, processes)
    return report


async def crash_under_load(
    target: Deployment, server: PostgresServer, load: Load, options: argparse.Namespace
) -> list[datetime]:
    """Stops and starts Postgres for as long as it was asked for; when it was started, by its own clock."""
    starts: list[datetime] = []
    began = time.monotonic()
    async with anyio.create_task_group() as clients:
        for _ in range(CLIENTS):
            clients.start_soon(load.enqueue)
        with progress_bar("seconds of crashes", round(options.seconds)) as bar:
            while time.monotonic() - began < options.seconds:
                await anyio.sleep(options.every)
                await anyio.to_thread.run_sync(server.stop, "immediate")
                await anyio.sleep(DOWN_SECONDS)
                await anyio.to_thread.run_sync(server.start)
                async with database(target) as connection:
                    starts.append(await connection.fetchval("select pg_postmaster_start_time()"))
                bar.update(round(time.monotonic() - began))
            # The last one counts as well: the load goes on until there was time to resume.
            await anyio.sleep(options.every)
        load.stopping = True
    console.print(f"{len(load.jobs)} jobs acknowledged, Postgres started {len(starts)} times")
    return starts


async def until_drained(target: Deployment, own: Lane) -> None:
    """Waits until no job is left, for some time."""
    left, give_up_at = 1, time.monotonic() + DRAIN_SECONDS
    async with database(target) as connection:
        while left and time.monotonic() < give_up_at:
            await anyio.sleep(0.2)
            left = await connection.fetchval("select count(*) from clarion.jobs where queue = $1", own.queue)


def check_answers(report: Report, load: Load) -> None:
    """What the API said."""
    report.check(
        "every enqueue is committed, or answered 503 and can be sent again",
        ok=set(load.enqueues) <= ENQUEUE_ANSWERS and load.enqueues["503 /problems/unavailable"] > 0 < load.replayed,
        evidence=f"{shown(load.enqueues)}; {load.replayed} were sent again when they had been committed",
    )
    report.check(
        "so is every call of a worker over HTTP",
        ok=set(load.lease_calls) <= LEASE_ANSWERS,
        evidence=shown(load.lease_calls),
    )


def shown(said: Counter[str]) -> str:
    """How often there was which answer."""
    return ", ".join(f"{count} times {answer}" for answer, count in said.most_common())


async def check_jobs(report: Report, target: Deployment, own: Lane, load: Load, directory: str) -> None:
    """What is in the database, against what was acknowledged and what the handlers did."""
    async with database(target) as connection:
        rows = await connection.fetch(
            "select id, state::text, result #>> '{}' as run, crashes from clarion.job_history where queue = $1",
            own.queue,
        )
        left = await connection.fetch("select id from clarion.jobs where queue = $1", own.queue)
    finishes = Counter(str(row["id"]) for row in rows)
    acknowledged = set(load.jobs.values())
    report.check(
        "every acknowledged job has finished",
        ok=acknowledged <= {str(row["id"]) for row in rows if row["state"] == "succeeded"} and not left,
        evidence=f"{len(acknowledged & set(finishes))} of {len(acknowledged)}; {len(left)} are left over",
    )
    report.check(
        "… and each once",
        ok=max(finishes.values()) == 1,
        evidence=f"{sum(finishes.values()) - len(finishes)} finishes too many",
    )
    report.check(
        "no key has made a second job",
        ok=set(finishes) | {str(row["id"]) for row in left} == acknowledged and len(acknowledged) == len(load.jobs),
        evidence=f"{len(load.jobs)} keys, {len(finishes) + len(left)} jobs",
    )
    effects = await anyio.to_thread.run_sync(effects_in, directory)
    unknown = [row["id"] for row in rows if row["run"] not in effects.get(str(row["id"]), [])]
    again = [job_id for job_id, runs in effects.items() if len(runs) > 1]
    report.check(
        "each stored result is that of a run which took place",
        ok=not unknown and set(effects) == set(finishes),
        evidence=f"{len(rows) - len(unknown)} of {len(rows)}; {len(again)} jobs ran more than once, "
        f"{sum(row['crashes'] > 0 for row in rows)} after a lost lease",
    )


def effects_in(directory: str) -> dict[str, list[str]]:
    """The runs of each job that left something behind."""
    effects: dict[str, list[str]] = {}
    for path in Path(directory).iterdir():
        job_id, _, name = path.name.partition(".")
        effects.setdefault(job_id, []).append(name)
    return effects


async def check_resumption(
    report: Report, target: Deployment, ids: list[UUID], starts: list[datetime], *, within_seconds: float
) -> None:
    """How long each worker took after each start of Postgres to finish a job."""
    async with database(target) as connection:
        rows = await connection.fetch(
            "select worker_id, finished_at from clarion.job_history where worker_id = any($1) order by finished_at", ids
        )
    names = [f"Python worker {number + 1}" for number in range(WORKERS)] + ["HTTP worker"]
    for name, worker_id in zip(names, ids, strict=True):
        ends = [row["finished_at"] for row in rows if row["worker_id"] == worker_id]
        gaps = [
            min(((end - start).total_seconds() for end in ends if end > start), default=float("inf"))
            for start in starts
        ]
        report.check(
            f"{name} finishes jobs again within {within_seconds:g} s of every start",
            ok=max(gaps) <= within_seconds,
            evidence=f"{', '.join(f'{gap:.1f} s' for gap in gaps)}; {len(ends)} jobs in all",
        )


async def check_processes(report: Report, processes: list[WorkerProcess]) -> None:
    """Whether they are still the same, and well."""
    alive = [process for process in processes if process.process.returncode is None]
    for process in alive:
        process.signal(signal.SIGTERM)
    with anyio.move_on_after(30):
        for process in alive:
            await process.process.wait()
    codes = [process.process.returncode for process in processes]
    report.check(
        "no worker was started again, and each ends in good order",
        ok=len(alive) == WORKERS and codes == [0] * WORKERS,
        evidence=f"{len(alive)} of {WORKERS} still run, exit codes {codes}",
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="for how long Postgres crashes (default: 40)")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between a start and the next crash (default: 5)"
    )
    parser.add_argument("--resume-seconds", type=float, default=10.0, help="for workers to resume in (default: 10)")
    run(verify, parser.parse_args())
