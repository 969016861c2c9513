#!/usr/bin/env python3
"""Proves that no attempt outlives its timeout by more than 5 s, whatever it runs in, and no job its deadlines.

In a worker in Python an `async` handler is cancelled, one in a process of its own is killed, and one in a thread that
does not listen is left behind: it keeps neither its job nor its slot. From a worker that heartbeats and never ends its
handler the server takes the job back. Jobs that are not started or not finished in time are dead, and say so.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import os
import time

import anyio
import msgspec

from verification import Deployment, Report, WorkerProcess, arguments, deployment, run, worker
from verification_http import HttpWorker, Json, Lane, lane, moment, problem_of

TIMEOUT_SECONDS = 1.0
# What the server allows a worker beyond the timeout, and what a busy machine may take to notice.
GRACE_SECONDS = 5.0
SLACK_SECONDS = 1.5
LEASE_SECONDS = 2.0
NEIGHBOURS = 20


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof, its parts at the same time: most of it is waiting."""
    report = Report("no attempt outlives its timeout by more than 5 s, and no job its deadlines")
    async with deployment(options) as target:
        target.known_database_url()
        async with anyio.create_task_group() as group:
            for part in (check_handlers, check_silent_worker, check_waiting, check_retries, check_whole_job):
                group.start_soon(part, report, target)
    return report


def shown(attempt: Json) -> str:
    """An attempt in short."""
    error = attempt["error"] or {}
    return f"{attempt['outcome']}, {error.get('type')} after {run_seconds(attempt):.2f} s"


def run_seconds(attempt: Json) -> float:
    """How long an attempt ran, by the database's clock."""
    if attempt["ended_at"] is None:
        return float("inf")
    return moment(attempt["ended_at"]) - moment(attempt["started_at"])


def has_timed_out(attempt: Json, *, within_seconds: float, after_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Whether an attempt ended as timed out, and when it should have."""
    if attempt["outcome"] != "timeout" or attempt["error"]["type"] != "AttemptTimeout":
        return False
    return after_seconds <= run_seconds(attempt) <= within_seconds


async def check_handlers(report: Report, target: Deployment) -> None:
    """Handlers of a worker in Python, each in a place of another sort."""
    flags = ("--concurrency", "4", "--lease-seconds", str(LEASE_SECONDS))
    async with lane(target, "timeout-python") as own, worker(target, "--queues", own.queue, *flags) as process:
        # The first start of a process takes longer than the timeout.
        warm = await own.enqueue(task="verify.deaf_process", args={"seconds": 0})
        await own.job(warm["id"], wait_seconds=30)
        once = {"timeout": TIMEOUT_SECONDS, "max_attempts": 1}
        in_loop = await own.enqueue(task="verify.endless", timeout=TIMEOUT_SECONDS, max_attempts=2, backoff="200ms")
        in_thread = await own.enqueue(task="verify.deaf_thread", args={"seconds": 7}, **once)
        in_process = await own.enqueue(task="verify.deaf_process", args={"seconds": 600}, **once)
        await check_loop(report, own, in_loop["id"], process)
        await check_process(report, own, in_process["id"])
        await check_thread(report, own, in_thread["id"], process)


async def check_loop(report: Report, own: Lane, job_id: str, process: WorkerProcess) -> None:
    """An `async` handler, twice."""
    job = await own.job(job_id, wait_seconds=30)
    runs = await own.attempts(job_id)
    said = msgspec.json.decode(await process.child.line_with("it was cancelled"))
    report.check(
        "an async handler is cancelled at its timeout",
        ok=all(has_timed_out(each, within_seconds=TIMEOUT_SECONDS + SLACK_SECONDS) for each in runs)
        and said["job_id"] == job_id,
        evidence=f"{'; '.join(map(shown, runs))}; it says: {said['event']}",
    )
    lines = [line["message"] for line in (await own.get(f"/v1/jobs/{job_id}/logs"))["lines"]]
    report.check(
        "what it says then is kept with its job",
        ok=lines == [said["event"]] * 2,
        evidence=f"{len(lines)} of 2 lines",
    )
    report.check(
        "each timeout costs an attempt, and no crash",
        ok=(job["state"], job["dead_reason"], job["attempt"], job["errors"], job["crashes"])
        == ("dead", "attempts_exhausted", 2, 2, 0),
        evidence=f"{job['state']}, {job['dead_reason']}; attempt {job['attempt']}, {job['errors']} errors",
    )


async def check_process(report: Report, own: Lane, job_id: str) -> None:
    """A handler that sleeps in a process."""
    job = await own.job(job_id, wait_seconds=30)
    [attempt] = await own.attempts(job_id)
    pid = job["checkpoint"]["pid"]
    report.check(
        "a handler in a process is killed",
        ok=has_timed_out(attempt, within_seconds=TIMEOUT_SECONDS + GRACE_SECONDS) and not is_alive(pid),
        evidence=f"{shown(attempt)}; process {pid} {'lives' if is_alive(pid) else 'has gone'}",
    )
    again = await own.enqueue(task="verify.deaf_process", args={"seconds": 0})
    after = await own.job(again["id"], wait_seconds=30)
    report.check(
        "… and the next one gets another process",
        ok=after["state"] == "succeeded" and after["result"] != pid,
        evidence=f"{after['state']} in process {after['result']}",
    )


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def check_thread(report: Report, own: Lane, job_id: str, process: WorkerProcess) -> None:
    """A handler that sits in a thread, where nothing reaches it."""
    job = await own.job(job_id, wait_seconds=30)
    [attempt] = await own.attempts(job_id)
    report.check(
        "the job of a handler in a thread that does not listen ends without it",
        ok=has_timed_out(attempt, within_seconds=TIMEOUT_SECONDS + GRACE_SECONDS + SLACK_SECONDS),
        evidence=f"{job['state']}: {shown(attempt)}; the handler takes 7 s",
    )
    ids = await own.enqueue_many([{"task": "verify.neighbour", "args": {"number": n}} for n in range(NEIGHBOURS)])
    done = [await own.job(each, wait_seconds=30) for each in ids]
    right = [n for n, each in enumerate(done) if (each["result"], each["worker"]) == (n, str(process.id))]
    report.check(
        "the worker goes on beside it", ok=len(right) == NEIGHBOURS, evidence=f"{len(right)} of {NEIGHBOURS} neighbours"
    )
    await process.child.line_with("the thread has ended")
    await anyio.sleep(0.3)
    after = await own.job(job_id)
    report.check(
        "what the thread answers at last is dropped", ok=after == job, evidence=f"{after['state']}, {after['result']}"
    )


async def hold(http_worker: HttpWorker, lease: Json) -> float:
    """Heartbeats until the lease is lost, or much too long; the latest end of a lease, in seconds after the start."""
    claimed = sent = time.monotonic()
    latest: float = lease["lease"]
    while sent - claimed < 4 * GRACE_SECONDS:
        sent = time.monotonic()
        [said] = await http_worker.beat(lease)
        if said["status"] == "lost":
            break
        latest = max(latest, sent - claimed + said["lease"])
        await anyio.sleep(0.2)
    return latest


async def check_silent_worker(report: Report, target: Deployment) -> None:
    """A worker that extends its lease and never ends its handler."""
    async with lane(target, "timeout-http") as own:
        stubborn = own.worker(lease_seconds=LEASE_SECONDS)
        job = await own.enqueue(timeout=TIMEOUT_SECONDS, max_attempts=2, backoff="200ms")
        lease = await stubborn.claim_one()
        latest = await hold(stubborn, lease)
        late = await stubborn.say(lease, "complete", {"result": "too late"})
        again = await own.worker().claim_one()
        [attempt, _] = await own.attempts(job["id"])
        due = TIMEOUT_SECONDS + GRACE_SECONDS
        report.check(
            f"from a worker that only heartbeats the server takes the job at its timeout + {GRACE_SECONDS:g} s",
            ok=has_timed_out(attempt, after_seconds=due, within_seconds=due + SLACK_SECONDS) and attempt["reaped"],
            evidence=f"{shown(attempt)}; no heartbeat extended the lease beyond {latest:.2f} s",
        )
        report.check(
            "its late result is refused",
            ok=problem_of(late) == "409 /problems/lease-lost",
            evidence=f"{problem_of(late)}, state {late.json().get('state')}",
        )
        report.check(
            "another run follows, with an error counted and no crash",
            ok=(again["id"], again["attempt"], again["errors"], again["crashes"]) == (job["id"], 2, 1, 0),
            evidence=f"attempt {again['attempt']}, errors {again['errors']}, crashes {again['crashes']}",
        )


async def check_waiting(report: Report, target: Deployment) -> None:
    """Jobs for which no worker comes."""
    async with lane(target, "timeout-waiting") as own:
        for reason, deadline in (("expired", {"start_within": "1s"}), ("total_timeout", {"total_timeout": "1s"})):
            job = await own.enqueue(**deadline)
            ended = await own.job(job["id"], wait_seconds=30)
            [died] = [entry for entry in await own.timeline(job["id"]) if entry["event"] == "expired"]
            late = moment(died["at"]) - moment(ended["start_by"] or ended["finish_by"])
            report.check(
                f"a job that nobody starts is dead as {reason} at its deadline",
                ok=(ended["state"], ended["dead_reason"], ended["attempt"]) == ("dead", reason, 0)
                and 0 <= late <= SLACK_SECONDS,
                evidence=f"{next(iter(deadline))} 1s: {ended['state']}, {ended['dead_reason']}, {late:.2f} s after it",
            )


async def check_retries(report: Report, target: Deployment) -> None:
    """Jobs whose attempts fail, until there is no time left; and one that only had to begin in time."""
    async with lane(target, "timeout-retries") as own:
        http_worker = own.worker()
        begun = await own.enqueue(start_within="1s")
        await http_worker.fail(await http_worker.claim_one(), retry_in="1500ms")
        done = await http_worker.complete(await http_worker.claim_one())
        job = await own.job(begun["id"])
        report.check(
            "a job that began in time may run again after its start_by",
            ok=(done["state"], job["attempt"]) == ("succeeded", 2) and job["started_at"] > job["start_by"],
            evidence=f"start_by {job['start_by']}, attempt {job['attempt']} began {job['started_at']}",
        )
        await own.enqueue(total_timeout="2s", backoff="300ms")
        leases: list[Json] = []
        state = "scheduled"
        while state == "scheduled":
            leases.append(await http_worker.claim_one())
            state = (await http_worker.fail(leases[-1]))["state"]
        job = await own.job(leases[0]["id"])
        rests = [lease["timeout"] for lease in leases]
        report.check(
            "a job is dead as total_timeout as soon as its next run would come too late",
            ok=(state, job["dead_reason"], job["attempt"]) == ("dead", "total_timeout", len(leases))
            and rests == sorted(rests, reverse=True)
            and rests[0] <= 2,
            evidence=f"{len(leases)} attempts, for which {', '.join(f'{rest:.2f} s' for rest in rests)} were left",
        )


async def check_whole_job(report: Report, target: Deployment) -> None:
    """A total timeout that passes while the only attempt runs."""
    async with lane(target, "timeout-total") as own:
        stubborn = own.worker(lease_seconds=LEASE_SECONDS)
        job = await own.enqueue(total_timeout=TIMEOUT_SECONDS)
        await hold(stubborn, await stubborn.claim_one())
        ended = await own.job(job["id"], wait_seconds=30)
        [attempt] = await own.attempts(job["id"])
        late = moment(attempt["ended_at"]) - moment(ended["finish_by"])
        report.check(
            f"so it is when an attempt is still running then, {GRACE_SECONDS:g} s later",
            ok=(ended["dead_reason"], ended["errors"]) == ("total_timeout", 1)
            and attempt["outcome"] == "timeout"
            and GRACE_SECONDS <= late <= GRACE_SECONDS + SLACK_SECONDS,
            evidence=f"{ended['state']}, {ended['dead_reason']}, {late:.2f} s after it; {shown(attempt)}",
        )


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
