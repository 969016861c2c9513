#!/usr/bin/env python3
"""Proves that a worker whose event loop is busy keeps its jobs, and that one which hangs loses them, and no more.

A handler that blocks the loop for three leases succeeds in its first attempt. One that blocks it for longer than
`hang_after` is reported as hung; its job and the one beside it run in another worker. What it answers when it comes to
itself is dropped, and it goes on working without a restart.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import signal
import time
from tempfile import TemporaryDirectory

import anyio
import msgspec

from verification import Deployment, Report, WorkerProcess, arguments, console, deployment, run, worker
from verification_http import Json, Lane, lane, until

LEASE_SECONDS = 1.0
HANG_AFTER_SECONDS = 1.5
PATIENT = ("--lease-seconds", str(LEASE_SECONDS), "--hang-after-seconds", "60")
IMPATIENT = ("--lease-seconds", str(LEASE_SECONDS), "--hang-after-seconds", str(HANG_AFTER_SECONDS))
# The heartbeat on its way when the loop stops to turn, the reaper's round, and a busy machine.
SLACK_SECONDS = 3.0


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("a busy worker keeps its jobs, and a hung one loses them")
    async with deployment(options) as target:
        await check_busy(report, target)
        await check_hung(report, target)
    return report


async def check_busy(report: Report, target: Deployment) -> None:
    """A loop that stands still for three leases, while another worker waits for jobs."""
    async with lane(target, "busy-worker") as own, worker(target, "--queues", own.queue, *PATIENT):
        blocked_seconds = 3 * LEASE_SECONDS
        job = await own.enqueue(task="verify.block", args={"seconds": blocked_seconds})
        await until_running(own, [job["id"]])
        other, stolen = own.worker(), 0
        began = time.monotonic()
        while time.monotonic() - began < blocked_seconds:
            stolen += len(await other.claim(wait_seconds=0.5))
        done = await own.job(job["id"], wait_seconds=30)
    report.check(
        "a handler that blocks the event loop for three leases keeps its own",
        ok=(done["state"], done["attempt"], done["crashes"], stolen) == ("succeeded", 1, 0, 0),
        evidence=f"blocked for {blocked_seconds:g} s: {done['state']} in attempt {done['attempt']}, lease "
        f"{LEASE_SECONDS:g} s; another worker got {stolen} jobs",
    )


async def until_running(own: Lane, ids: list[str]) -> None:
    """Waits until all of these run."""

    async def are_running() -> bool:
        return all([(await own.job(job_id))["state"] == "running" for job_id in ids])

    await until(are_running, "the jobs run")


async def check_hung(report: Report, target: Deployment) -> None:
    """A loop that stands still until the test lets it go on."""
    with TemporaryDirectory(prefix="clarion-verify-") as directory:
        wake = anyio.Path(directory, "wake")
        async with lane(target, "hung-worker") as own:
            flags = ("--queues", own.queue, "--concurrency", "2")
            block = {"task": "verify.block", "args": {"seconds": 600, "until": str(wake)}}
            # The neighbour sleeps when the loop stops to turn, and cannot end by itself.
            ids = await own.enqueue_many([{"task": "verify.neighbour", "args": {"number": 7, "seconds": 1}}, block])
            async with worker(target, *flags, *IMPATIENT) as hung:
                await until_running(own, ids)
                async with worker(target, *flags, *PATIENT) as other:
                    found = await check_takeover(report, own, ids, hung, other)
                    await wake.touch()
                    await check_late_answer(report, own, found, hung)
                    other.signal(signal.SIGTERM)
                    await other.process.wait()
                await check_goes_on(report, own, hung)


async def check_takeover(
    report: Report, own: Lane, ids: list[str], hung: WorkerProcess, other: WorkerProcess
) -> list[Json]:
    """The jobs run elsewhere; the jobs as they are then."""
    said = msgspec.json.decode(await hung.child.line_with('"worker.hung"'))
    report.check(
        "a worker whose event loop stands still for too long is reported as hung",
        ok=said["still_seconds"] >= HANG_AFTER_SECONDS and said["held"] == len(ids),
        evidence=f"{said['event']} after {said['still_seconds']} s of {HANG_AFTER_SECONDS:g}, holding {said['held']}",
    )
    console.print(f"worker {hung.id} hangs; its leases of {LEASE_SECONDS:g} s run out…")
    found = [await own.job(job_id, wait_seconds=30) for job_id in ids]
    right = [job for job in found if (job["state"], job["worker"], job["attempt"]) == ("succeeded", str(other.id), 2)]
    report.check(
        "its job, and the one beside it, run in another worker",
        ok=len(right) == len(ids) and [job["result"] for job in found] == [7, 2],
        evidence="; ".join(f"{job['task']} {job['state']} in attempt {job['attempt']}" for job in found),
    )
    runs = [await own.attempts(job_id) for job_id in ids]
    lost = [(each[0]["outcome"], each[0]["worker"], job["crashes"]) for each, job in zip(runs, found, strict=True)]
    report.check(
        "each lost lease is in the history, counted as a crash",
        ok=lost == [("lease_lost", str(hung.id), 1)] * len(ids),
        evidence="; ".join(f"{outcome}, crashes {crashes}" for outcome, _, crashes in lost),
    )
    return found


async def check_late_answer(report: Report, own: Lane, found: list[Json], hung: WorkerProcess) -> None:
    """The worker that hung has come to itself."""
    lost = []
    for job in found:
        lost.append(msgspec.json.decode(await hung.child.line_with(f'"lease.lost","job_id":"{job["id"]}"')))
    after = [await own.job(job["id"]) for job in found]
    report.check(
        "what it answers when it comes to itself is dropped",
        ok=after == found,
        evidence="; ".join(f"{line['event']}: {line['task']} after {line['run_ms'] / 1000:.1f} s" for line in lost),
    )


async def check_goes_on(report: Report, own: Lane, hung: WorkerProcess) -> None:
    """It is the only worker again."""
    job = await own.enqueue(task="verify.neighbour", args={"number": 8})
    done = await own.job(job["id"], wait_seconds=30)
    report.check(
        "it works on, without a restart",
        ok=(done["result"], done["worker"], done["attempt"]) == (8, str(hung.id), 1),
        evidence=f"{done['state']} in worker {done['worker']}",
    )


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
