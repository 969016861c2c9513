#!/usr/bin/env python3
"""Proves that a worker which was frozen past its lease cannot touch the jobs that somebody else took over.

A worker process that holds two jobs is stopped with SIGSTOP until both have come to another worker, which completes
the one and goes on with the other. SIGCONT then lets the first worker say everything there is to say about its leases:
each call is answered with 409 and what the job is now, its heartbeat with `lost`, and nothing of it is stored.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import signal

from verification import Report, arguments, console, deployment, run
from verification_http import HttpWorker, Json, Lane, WorkerChild, lane, worker_process
from verification_worker import CALLS

JOBS = 2
LEASE_SECONDS = 1.5
RESULT = {"by": "the new owner"}


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("a worker that was frozen past its lease cannot touch its jobs any more")
    flags = ("--stubborn", "--lease-seconds", str(LEASE_SECONDS), "--jobs", str(JOBS))
    async with deployment(options) as target, lane(target, "zombie") as own:
        ids = await own.enqueue_many([{"args": {"seconds": 600}}] * JOBS)
        async with worker_process(target, own, *flags) as zombie:
            await freeze(zombie, ids)
            owner = own.worker()
            finished, running = await take_over(report, owner)
            await owner.complete(finished, RESULT)
            await owner.say(running, "progress", {"current": 7, "message": "the new owner's"})
            await owner.say(running, "logs", {"lines": [{"n": 1, "message": "the new owner's"}]})
            zombie.process.send_signal(signal.SIGCONT)
            await check_answers(report, zombie, finished, "succeeded")
            await check_answers(report, zombie, running, "running")
        await check_unharmed(report, own, owner, finished, running)
    return report


async def freeze(zombie: WorkerChild, ids: list[str]) -> None:
    """Stops the worker once it has all the jobs."""
    for job_id in ids:
        await zombie.told("claimed", job_id)
    zombie.process.send_signal(signal.SIGSTOP)
    console.print(f"worker {zombie.id} is frozen; its leases of {LEASE_SECONDS:g} s run out…")


async def take_over(report: Report, owner: HttpWorker) -> list[Json]:
    """Waits until the other worker has both jobs."""
    leases = [await owner.claim_one() for _ in range(JOBS)]
    report.check(
        "another worker gets the jobs of the frozen one",
        ok=[lease["attempt"] for lease in leases] == [2] * JOBS,
        evidence=", ".join(f"{lease['id']} as attempt {lease['attempt']}" for lease in leases),
    )
    return leases


async def check_answers(report: Report, zombie: WorkerChild, lease: Json, state: str) -> None:
    """What the worker that came back is told of one job."""
    job_id = lease["id"]
    beat = await zombie.told("lost", job_id)
    answers = {verb: await zombie.told(f"{verb} answered", job_id) for verb in CALLS}
    report.check(
        f"its heartbeat for the job that is {state} says that the lease is lost",
        ok=beat["state"] == state,
        evidence=f"lost, state {beat['state']}",
    )
    wanted = (409, "/problems/lease-lost", state)
    right = [verb for verb, said in answers.items() if (said["status"], said["type"], said["state"]) == wanted]
    wrong = {verb: said for verb, said in answers.items() if verb not in right}
    evidence = f"{', '.join(right)}: 409 lease-lost, state {state}" + (f"; not {wrong}" if wrong else "")
    report.check(f"… and each of its {len(CALLS)} other calls is refused", ok=not wrong, evidence=evidence)


async def check_unharmed(report: Report, own: Lane, owner: HttpWorker, finished: Json, running: Json) -> None:
    """What is stored, and whether the new owner can go on."""
    done, goes_on = await own.job(finished["id"]), await own.job(running["id"])
    report.check(
        "the new owner's result stands",
        ok=(done["state"], done["result"], done["attempt"]) == ("succeeded", RESULT, 2),
        evidence=f"{done['state']}, {done['result']}, attempt {done['attempt']}",
    )
    report.check(
        "its progress and checkpoint stand",
        ok=goes_on["progress"] == {"current": 7, "message": "the new owner's"} and goes_on["checkpoint"] is None,
        evidence=f"progress {goes_on['progress']}, checkpoint {goes_on['checkpoint']}",
    )
    lines = [line for job in (done, goes_on) for line in (await own.get(f"/v1/jobs/{job['id']}/logs"))["lines"]]
    said = sorted({line["message"] for line in lines})
    report.check(
        "of the frozen worker only what it said before is stored",
        ok=said == ["attempt 1 begins", "the new owner's"],
        evidence=f"{len(lines)} lines: {', '.join(said)}",
    )
    completed = await owner.complete(running, RESULT)
    report.check("the new owner completes the other job too", ok=completed["result"] == RESULT, evidence=str(completed))


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
