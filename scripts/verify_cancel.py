#!/usr/bin/env python3
"""Proves that a cancel ends jobs that wait at once, and jobs that run through their workers, and undoes no success.

A running job's worker hears of it with its next heartbeat and hands the job back, which is cancelled then; so is that
of a worker which never answers, when its lease runs out. A success that comes first stands. A cancelled job can be run
again, and its timeline says who did what.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import signal
import time

from verification import Deployment, Report, arguments, console, deployment, run
from verification_http import Json, Lane, body_of, lane, problem_of, worker_process

ACTOR = "ada"
LEASE_SECONDS = 2.0
# A heartbeat goes out every third of the lease; the rest is for a busy machine.
TOLD_SECONDS = LEASE_SECONDS / 3 + 1.0


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("a cancel ends jobs that wait and jobs that run, and never undoes a success")
    async with deployment(options) as target, lane(target, "cancel", actor=ACTOR) as own:
        await check_waiting(report, own)
        await check_success_first(report, own)
        cancelled = await check_running(report, target, own)
        await check_retry(report, own, cancelled)
        await check_silent_worker(report, target, own)
    return report


async def cancel(own: Lane, job_id: str, reason: str = "not needed any more") -> Json:
    """Cancels a job that can be; the job."""
    return body_of(await own.post(f"/v1/jobs/{job_id}/cancel", {"reason": reason}))


async def check_waiting(report: Report, own: Lane) -> None:
    """Jobs that wait, for a worker or for their time."""
    for job in (await own.enqueue(), await own.enqueue(delay="1h")):
        after = await cancel(own, job["id"])
        again = await cancel(own, job["id"])
        report.check(
            f"a {job['state']} job is cancelled at once, and a second cancel changes nothing",
            ok=after["state"] == "cancelled" and after == again,
            evidence=f"{job['id']}: {job['state']}, {after['state']}, {again['state']}",
        )
    leases = await own.worker().claim(10)
    report.check("no worker gets them any more", ok=not leases, evidence=f"{len(leases)} leases")


async def check_success_first(report: Report, own: Lane) -> None:
    """A handler that had succeeded before it heard of it."""
    worker = own.worker()
    job = await own.enqueue()
    lease = await worker.claim_one()
    asked = await cancel(own, job["id"])
    done = await worker.complete(lease, {"came": "first"})
    found = await own.job(job["id"])
    report.check(
        "a success that comes first stands",
        ok=(asked["state"], done["state"], found["state"]) == ("running", "succeeded", "succeeded"),
        evidence=f"{asked['state']} when asked, then {found['state']} with {found['result']}",
    )
    late = await own.post(f"/v1/jobs/{job['id']}/cancel")
    report.check(
        "a finished job cannot be cancelled",
        ok=problem_of(late) == "409 /problems/illegal-transition",
        evidence=f"{problem_of(late)}: {late.json().get('detail')}",
    )


async def check_running(report: Report, target: Deployment, own: Lane) -> str:
    """A job that runs in another process; its id."""
    job = await own.enqueue(args={"seconds": 600})
    job_id: str = job["id"]
    async with worker_process(target, own, "--lease-seconds", str(LEASE_SECONDS)) as child:
        await child.told("claimed", job_id)
        asked = time.monotonic()
        answer = await cancel(own, job_id)
        await child.told("cancel", job_id)
        told_seconds = time.monotonic() - asked
        await child.told("release answered", job_id)
    report.check(
        "the worker of a running job hears of it with its next heartbeat",
        ok=answer["state"] == "running" and told_seconds <= TOLD_SECONDS,
        evidence=f"{told_seconds:.2f} s after the cancel; it beats every {LEASE_SECONDS / 3:.2f} s",
    )
    found = await own.job(job_id)
    report.check(
        "… and hands the job back, which is cancelled then",
        ok=(found["state"], found["attempt"]) == ("cancelled", 1),
        evidence=f"{job_id}: {found['state']} in attempt {found['attempt']}",
    )
    return job_id


async def check_retry(report: Report, own: Lane, job_id: str) -> None:
    """A cancelled job is run again after all."""
    retried = body_of(await own.post(f"/v1/jobs/{job_id}/retry", {"reason": "needed after all"}))
    worker = own.worker()
    lease = await worker.claim_one()
    await worker.complete(lease, {"after": "all"})
    found = await own.job(job_id)
    report.check(
        "a cancelled job can be run again, in a new generation",
        ok=lease["id"] == job_id and (found["state"], lease["generation"], lease["attempt"]) == ("succeeded", 2, 1),
        evidence=f"{retried['state']}, then {found['state']} in generation {lease['generation']}",
    )
    timeline = await own.timeline(job_id)
    acts = [(entry["event"], entry["detail"]) for entry in timeline if entry["actor"] == f"api:{ACTOR}"]
    events = [entry["event"] for entry in timeline]
    wanted = [("cancel_requested", "not needed any more"), ("retried", "needed after all")]
    report.check(
        "its timeline says who cancelled and who retried it, and why",
        ok=acts[1:] == wanted and "cancelled" in events,
        evidence=", ".join(f"{entry['event']} by {entry['actor']}" for entry in timeline),
    )


async def check_silent_worker(report: Report, target: Deployment, own: Lane) -> None:
    """A worker that is gone before it can hand the job back."""
    job = await own.enqueue(args={"seconds": 600})
    async with worker_process(target, own, "--lease-seconds", str(LEASE_SECONDS)) as child:
        await child.told("claimed", job["id"])
        child.process.send_signal(signal.SIGKILL)
        await child.process.wait()
    console.print(f"the worker is killed; its lease of {LEASE_SECONDS:g} s runs out…")
    asked = time.monotonic()
    await cancel(own, job["id"])
    found = await own.job(job["id"], wait_seconds=LEASE_SECONDS + 10)
    report.check(
        "a job whose worker is gone is cancelled when the lease runs out",
        ok=(found["state"], found["crashes"]) == ("cancelled", 0),
        evidence=f"{found['state']} {time.monotonic() - asked:.2f} s after the cancel, {found['crashes']} crashes",
    )


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
