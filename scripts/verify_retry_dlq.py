#!/usr/bin/env python3
"""Proves retries with growing backoff, and what can be done with jobs that are dead.

A job fails until its attempts are used up; the waits between are measured. One dies at once because no try can help,
one is run again when its worker asked for it. Dead jobs are listed oldest first and grouped by what they died of. A dry
run of a redrive changes nothing; a redrive runs the oldest again, one after the other at the pace that was asked for;
they succeed, and their histories keep both generations.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
from itertools import pairwise

from verification import Report, arguments, console, deployment, run
from verification_http import HttpWorker, Json, Lane, lane, moment

BACKOFF_SECONDS = 0.5
ATTEMPTS = 4
DEAD_JOBS = 6
REDRIVEN_JOBS = 4
PER_SECOND = 5.0
# What a moment may be off, between two clock readings of the same statement or of two.
SLACK_SECONDS = 0.1


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("failed jobs are retried with growing backoff; dead ones can be found and run again")
    async with deployment(options) as target, lane(target, "retry-dlq") as own:
        worker = own.worker()
        exhausted = await check_backoff(report, own, worker)
        await check_wishes(report, own, worker)
        dead = [exhausted] + [await die(own, worker, number) for number in range(DEAD_JOBS)]
        await check_dead(report, own, dead)
        await check_dry_run(report, own, dead)
        await check_redrive(report, own, worker, dead)
    return report


async def check_backoff(report: Report, own: Lane, worker: HttpWorker) -> str:
    """Fails a job until it is dead; its id."""
    console.print(f"a job fails {ATTEMPTS} times, {BACKOFF_SECONDS:g} s apart at first…")
    job = await own.enqueue(max_attempts=ATTEMPTS, backoff=BACKOFF_SECONDS)
    states = [(await worker.fail(await worker.claim_one()))["state"] for _ in range(ATTEMPTS)]
    runs = await own.attempts(job["id"])
    waits = [moment(each["next_run_at"]) - moment(each["ended_at"]) for each in runs[:-1]]
    wanted = [BACKOFF_SECONDS * 2**number for number in range(ATTEMPTS - 1)]
    report.check(
        "the wait doubles with each error, ±20 %",
        ok=all(abs(wait - mean) <= 0.2 * mean + SLACK_SECONDS for wait, mean in zip(waits, wanted, strict=True)),
        evidence=", ".join(f"{wait:.2f} s of {mean:g} s" for wait, mean in zip(waits, wanted, strict=True)),
    )
    late = [moment(after["started_at"]) - moment(before["next_run_at"]) for before, after in pairwise(runs)]
    report.check(
        "no attempt starts before its time",
        ok=min(late) >= 0,
        evidence=", ".join(f"{1000 * seconds:.0f} ms after it" for seconds in late),
    )
    job = await own.job(job["id"])
    report.check(
        "it is dead when its attempts are used up",
        ok=(states[-1], job["state"], job["dead_reason"]) == ("dead", "dead", "attempts_exhausted"),
        evidence=f"{', '.join(states)}; {job['dead_reason']} after {job['attempt']} of {job['max_attempts']} attempts",
    )
    return str(job["id"])


async def check_wishes(report: Report, own: Lane, worker: HttpWorker) -> None:
    """What a worker may say besides: that no try can help, or when the next one is."""
    await own.enqueue(max_attempts=ATTEMPTS)
    hopeless = await worker.claim_one()
    await worker.fail(hopeless, retryable=False)
    job = await own.job(hopeless["id"])
    report.check(
        "an error that no try can mend is not retried",
        ok=(job["state"], job["dead_reason"], job["attempt"]) == ("dead", "not_retryable", 1),
        evidence=f"{job['state']}, {job['dead_reason']} after attempt {job['attempt']} of {ATTEMPTS}",
    )
    await own.post(f"/v1/jobs/{job['id']}/cancel")
    await own.enqueue(backoff="1h")
    lease = await worker.claim_one()
    await worker.fail(lease, retry_in="700ms")
    again = await worker.claim_one()
    [first, _] = await own.attempts(lease["id"])
    wait = moment(first["next_run_at"]) - moment(first["ended_at"])
    report.check(
        "a worker's own wait is obeyed instead of the backoff",
        ok=abs(wait - 0.7) <= SLACK_SECONDS and (again["id"], again["attempt"]) == (lease["id"], 2),
        evidence=f"asked for 0.7 s, got {wait:.3f} s; the backoff is 1 h",
    )
    await worker.complete(again)


async def die(own: Lane, worker: HttpWorker, number: int) -> str:
    """A job that is dead after its only attempt; its id."""
    await own.enqueue(args={"number": number}, max_attempts=1)
    lease = await worker.claim_one()
    await worker.fail(lease)
    return str(lease["id"])


async def check_dead(report: Report, own: Lane, dead: list[str]) -> None:
    """The list and the groups."""
    listed = [job["id"] for job in (await own.get("/v1/dead", queue=own.queue))["jobs"]]
    report.check(
        "dead jobs are listed, those that died first at the head",
        ok=listed == dead,
        evidence=f"{len(listed)} of {len(dead)}, in the order of their deaths: {listed == dead}",
    )
    groups = (await own.get("/v1/dead/groups", queue=own.queue))["groups"]
    found = [(group["task"], group["error_type"], group["dead_reason"], group["jobs"]) for group in groups]
    report.check(
        "… and grouped by what they died of",
        ok=found == [("verify.job", "Planned", "attempts_exhausted", len(dead))],
        evidence="; ".join(f"{task}, {error}, {reason}: {jobs}" for task, error, reason, jobs in found),
    )


async def check_dry_run(report: Report, own: Lane, dead: list[str]) -> None:
    """A redrive that only says what it would do."""
    before = [await own.job(job_id) for job_id in dead]
    answer = (await own.post("/v1/dead/redrive", {"queue": own.queue, "limit": REDRIVEN_JOBS, "dry_run": True})).json()
    unchanged = before == [await own.job(job_id) for job_id in dead]
    report.check(
        "a dry run names the oldest, and changes nothing",
        ok=unchanged and (answer["redriven"], answer["jobs"]) == (0, dead[:REDRIVEN_JOBS]),
        evidence=f"{answer['matched']} matched, {answer['redriven']} redriven, all {len(dead)} as before: {unchanged}",
    )


async def check_redrive(report: Report, own: Lane, worker: HttpWorker, dead: list[str]) -> None:
    """A real one, at a pace; the jobs run in that order, and succeed."""
    wish: Json = {"queue": own.queue, "limit": REDRIVEN_JOBS, "per_second": PER_SECOND}
    answer = (await own.post("/v1/dead/redrive", wish)).json()
    left = [job["id"] for job in (await own.get("/v1/dead", queue=own.queue))["jobs"]]
    report.check(
        "a redrive takes the oldest, and leaves the others",
        ok=(answer["jobs"], left) == (dead[:REDRIVEN_JOBS], dead[REDRIVEN_JOBS:]),
        evidence=f"{answer['redriven']} redriven, {len(left)} still dead",
    )
    leases = [await worker.claim_one() for _ in range(REDRIVEN_JOBS)]
    gaps = [moment(after["run_at"]) - moment(before["run_at"]) for before, after in pairwise(leases)]
    report.check(
        f"they run in that order, {PER_SECOND:g} a second",
        ok=[lease["id"] for lease in leases] == answer["jobs"]
        and all(abs(gap - 1 / PER_SECOND) <= SLACK_SECONDS for gap in gaps),
        evidence=f"{', '.join(f'{gap:.3f} s' for gap in gaps)} apart",
    )
    done = [await worker.complete(lease, {"number": place}) for place, lease in enumerate(leases)]
    report.check(
        "and succeed",
        ok=[job["state"] for job in done] == ["succeeded"] * REDRIVEN_JOBS,
        evidence=", ".join(f"{lease['id']} in generation {lease['generation']}" for lease in leases),
    )
    runs = [(each["generation"], each["attempt"], each["outcome"]) for each in await own.attempts(dead[0])]
    wanted = [(1, attempt, "failed") for attempt in range(1, ATTEMPTS + 1)] + [(2, 1, "succeeded")]
    told = "; ".join(f"{generation}.{attempt} {outcome}" for generation, attempt, outcome in runs)
    report.check("the history keeps both generations", ok=runs == wanted, evidence=told)


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
