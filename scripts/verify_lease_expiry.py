#!/usr/bin/env python3
"""Proves that the jobs of a worker that is killed run elsewhere within lease + 2 s, and that their history tells of it.

A worker process that holds three jobs is ended with SIGKILL. Another worker, which waits for jobs meanwhile, gets
each of them as attempt 2 with one crash counted, and completes it. The attempt before is shown as `lease_lost`.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import signal
import time

from verification import Deployment, Report, VerificationError, arguments, console, deployment, run
from verification_http import PATIENCE_SECONDS, HttpWorker, Json, Lane, lane, worker_process

JOBS = 3
LEASE_SECONDS = 2.0


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report(f"a killed worker's jobs run elsewhere within lease + {options.takeover_seconds:g} s")
    async with deployment(options) as target, lane(target, "lease-expiry") as own:
        ids = await own.enqueue_many([{"args": {"seconds": 600}}] * JOBS)
        victim = await kill_while_it_holds(target, own, ids)
        heir = own.worker()
        taken = await take_over(heir)
        check_takeover(report, ids, taken, within_seconds=LEASE_SECONDS + options.takeover_seconds)
        for lease in taken.values():
            await heir.complete(lease, {"by": heir.id})
        await check_histories(report, own, list(taken), victim=victim, heir=heir.id)
    return report


async def kill_while_it_holds(target: Deployment, own: Lane, ids: list[str]) -> str:
    """Starts a worker and kills it once it has all the jobs; its id."""
    async with worker_process(target, own, "--lease-seconds", str(LEASE_SECONDS), "--jobs", str(JOBS)) as victim:
        for job_id in ids:
            await victim.told("claimed", job_id)
        victim.process.send_signal(signal.SIGKILL)
        await victim.process.wait()
    console.print(f"worker {victim.id} is killed; its leases of {LEASE_SECONDS:g} s run out…")
    return victim.id


async def take_over(heir: HttpWorker) -> dict[str, Json]:
    """Waits for the jobs; the leases by job, each with the `seconds` since the kill."""
    killed = time.monotonic()
    taken: dict[str, Json] = {}
    while len(taken) < JOBS:
        if time.monotonic() - killed > PATIENCE_SECONDS:
            raise VerificationError(f"after {PATIENCE_SECONDS:g} s only {len(taken)} of {JOBS} jobs had come again")
        leases = await heir.claim(JOBS, wait_seconds=5)
        taken |= {lease["id"]: lease | {"seconds": time.monotonic() - killed} for lease in leases}
    return taken


def check_takeover(report: Report, ids: list[str], taken: dict[str, Json], *, within_seconds: float) -> None:
    """Every job, in time, with the loss counted."""
    latest = max(lease["seconds"] for lease in taken.values())
    report.check(
        f"another worker has all of them within {within_seconds:g} s of the kill",
        ok=sorted(taken) == sorted(ids) and latest <= within_seconds,
        evidence=f"{len(taken)} of {len(ids)} jobs, the last one {latest:.2f} s after it, lease {LEASE_SECONDS:g} s",
    )
    counts = {(lease["attempt"], lease["crashes"], lease["errors"]) for lease in taken.values()}
    report.check(
        "the loss is counted as a crash, and not as an error",
        ok=counts == {(2, 1, 0)},
        evidence="; ".join(
            f"attempt {attempt}, crashes {crashes}, errors {errors}" for attempt, crashes, errors in counts
        ),
    )


async def check_histories(report: Report, own: Lane, ids: list[str], *, victim: str, heir: str) -> None:
    """What the jobs say of themselves afterwards."""
    found = [await own.job(job_id) for job_id in ids]
    done = [job for job in found if (job["state"], job["result"]) == ("succeeded", {"by": heir})]
    report.check("each is finished once, by the other worker", ok=len(done) == JOBS, evidence=f"{len(done)} by {heir}")
    told = {tuple((attempt["outcome"], attempt["worker"]) for attempt in await own.attempts(job_id)) for job_id in ids}
    report.check(
        "their histories name both attempts, and who made them",
        ok=told == {(("lease_lost", victim), ("succeeded", heir))},
        evidence="; ".join(", then ".join(f"{outcome} by {worker}" for outcome, worker in each) for each in told),
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--takeover-seconds", type=float, default=2.0, help="allowed beyond the lease (default: 2)")
    run(verify, parser.parse_args())
