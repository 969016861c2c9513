#!/usr/bin/env python3
"""Proves that no job is claimed twice: fifty workers claim from one queue at the same time, over HTTP.

Each takes a few jobs at once, under an identity of its own, and completes them, until nothing is left. Of 2,000 jobs
each was handed out once, under a token of its own, and is finished once, by the worker to whom it was handed.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import time
from collections import Counter

import anyio

from verification import ProgressBar, Report, arguments, deployment, progress_bar, run
from verification_http import HttpWorker, Json, Lane, lane

CLAIMERS = 50
# Few enough that claims stay many, and different, so that they do not march in step.
JOBS_A_CLAIM = (1, 2, 3, 5)


class Claims:
    """What all workers together were given."""

    def __init__(self, jobs: int) -> None:
        self.leases: list[tuple[str, Json]] = []  # the worker's id, and what it was given
        self.calls = 0
        self.completed = 0
        self.left = jobs


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report(f"of {options.jobs} jobs none is claimed twice by {CLAIMERS} workers at once")
    async with deployment(options) as target, lane(target, "no-double-claim") as own:
        ids = await own.enqueue_many([{"args": {"number": number}} for number in range(options.jobs)])
        claims, began = Claims(len(ids)), time.monotonic()
        with progress_bar("completed", len(ids)) as bar:
            async with anyio.create_task_group() as group:
                for place in range(CLAIMERS):
                    group.start_soon(work, own.worker(), claims, JOBS_A_CLAIM[place % len(JOBS_A_CLAIM)], bar)
        check_claims(report, claims, ids, seconds=time.monotonic() - began)
        await check_finishes(report, own, claims, ids)
    return report


async def work(worker: HttpWorker, claims: Claims, jobs_max: int, bar: ProgressBar) -> None:
    """Claims and completes, until all jobs were handed out."""
    while claims.left > 0:
        leases = await worker.claim(jobs_max, wait_seconds=1)
        claims.calls += 1
        claims.left -= len(leases)
        claims.leases += [(worker.id, lease) for lease in leases]
        for lease in leases:
            await worker.complete(lease, {"by": worker.id})
            claims.completed += 1
            bar.update(claims.completed)


def check_claims(report: Report, claims: Claims, ids: list[str], *, seconds: float) -> None:
    """What the workers saw."""
    times = Counter(lease["id"] for _, lease in claims.leases)
    workers = {worker for worker, _ in claims.leases}
    tokens = {lease["token"] for _, lease in claims.leases}
    attempts = {lease["attempt"] for _, lease in claims.leases}
    report.check(
        "every job is handed out exactly once",
        ok=times == Counter(ids),
        evidence=f"{len(times)} of {len(ids)} jobs, none more than {max(times.values(), default=0)} times,"
        f" to {len(workers)} workers in {claims.calls} calls and {seconds:.1f} s",
    )
    report.check(
        "each under a token of its own, in its first attempt",
        ok=len(tokens) == len(ids) and attempts == {1},
        evidence=f"{len(tokens)} tokens, attempts {sorted(attempts)}",
    )
    report.check(
        "every completion is accepted",
        ok=claims.completed == len(ids),
        evidence=f"{claims.completed} of {len(claims.leases)} answered 200",
    )


async def check_finishes(report: Report, own: Lane, claims: Claims, ids: list[str]) -> None:
    """What the API says of the jobs afterwards."""
    finished = await own.jobs(state="succeeded")
    handed = {lease["id"]: worker for worker, lease in claims.leases}
    right = [job for job in finished if handed.get(job["id"]) == job["worker"] and job["attempt"] == 1]
    report.check(
        "each is finished once, by the worker to whom it was handed",
        ok=Counter(job["id"] for job in right) == Counter(ids),
        evidence=f"{len(finished)} finished, {len(right)} of them by their worker in attempt 1",
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--jobs", type=int, default=2000, help="how many (default: 2000)")
    run(verify, parser.parse_args())
