#!/usr/bin/env python3
"""Proves that a job which kills its worker every time is dead after its budget of crashes, and stops nobody else.

Two workers, started again whenever they die, work on a queue in which such a job lies between neighbours. It is dead
as `crash_loop` when it has killed as many workers as it may; each lost lease is in its history, and every neighbour
succeeds, those included that died with it. Once it is harmless, a redrive brings it back, and it succeeds.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import os
from collections import Counter
from tempfile import TemporaryDirectory

import anyio

from clarion.settings import Settings
from verification import Deployment, Report, arguments, console, deployment, run, worker
from verification_http import PATIENCE_SECONDS, Json, Lane, lane, moment, until

WORKERS = 2
LEASE_SECONDS = 1.0
# So many more of them go into the queue every so often, for as long as the job crashes.
NEIGHBOURS = 5
PAUSE_SECONDS = 0.25
SLACK_SECONDS = 0.05


class Supervisor:
    """Starts workers again when they die, as a service manager does; who died is in `died`."""

    def __init__(self, target: Deployment, own: Lane) -> None:
        self._target = target
        self._flags = ("--queues", own.queue, "--concurrency", "4", "--lease-seconds", str(LEASE_SECONDS))
        self.died: list[str] = []

    async def keep_one(self) -> None:
        """Keeps a worker running, until cancelled."""
        while True:
            async with worker(self._target, *self._flags) as process:
                await process.process.wait()
                self.died.append(str(process.id))
                console.print(f"worker {process.id} died ({len(self.died)} by now); another one starts")


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("a job that kills its worker every time is stopped, and its neighbours are not")
    if not options.url:
        os.environ["CLARION_MAX_CRASHES"] = str(options.max_crashes)
    with TemporaryDirectory(prefix="clarion-verify-") as directory:
        harmless = anyio.Path(directory, "harmless")
        async with deployment(options) as target, lane(target, "crash-loop") as own, anyio.create_task_group() as group:
            supervisor = Supervisor(target, own)
            for _ in range(WORKERS):
                group.start_soon(supervisor.keep_one)
            job = await own.enqueue(task="verify.crash", args={"harmless": str(harmless)}, max_attempts=100)
            ids = await enqueue_neighbours(own, job["id"])
            await check_end(report, own, job["id"], supervisor, crashes_max=options.max_crashes)
            await check_neighbours(report, own, ids)
            await harmless.touch()
            await check_redrive(report, own, job["id"])
            group.cancel_scope.cancel()
    return report


async def enqueue_neighbours(own: Lane, job_id: str) -> list[str]:
    """Neighbours without a pause, until the job is dead; their ids."""
    ids: list[str] = []
    with anyio.move_on_after(PATIENCE_SECONDS):
        while (await own.job(job_id))["state"] != "dead":
            numbers = range(len(ids), len(ids) + NEIGHBOURS)
            jobs = [{"task": "verify.neighbour", "args": {"number": n, "seconds": PAUSE_SECONDS}} for n in numbers]
            ids += await own.enqueue_many(jobs)
            await anyio.sleep(PAUSE_SECONDS)
    return ids


async def check_end(report: Report, own: Lane, job_id: str, supervisor: Supervisor, *, crashes_max: int) -> None:
    """What became of the job, and of the workers."""
    job = await own.job(job_id)
    report.check(
        f"a job that kills its worker {crashes_max} times is dead as crash_loop",
        ok=(job["state"], job["dead_reason"], job["crashes"], job["errors"]) == ("dead", "crash_loop", crashes_max, 0),
        evidence=f"{job['state']}, {job['dead_reason']}; crashes {job['crashes']}, errors {job['errors']}",
    )
    runs = await own.attempts(job_id)
    outcomes = Counter((each["outcome"], (each["error"] or {}).get("type")) for each in runs)
    blamed = [each["worker"] for each in runs]
    report.check(
        "each lost lease is in its history, with the worker that died of it",
        ok=outcomes == {("lease_lost", "LeaseLost"): crashes_max} and sorted(blamed) == sorted(supervisor.died),
        evidence="; ".join(f"{count} times {outcome}" for (outcome, _), count in outcomes.items())
        + f"; {len(supervisor.died)} workers died",
    )
    # One that keeps its old place in line was due long ago.
    waits = [max(0.0, moment(each["next_run_at"]) - moment(each["ended_at"])) for each in runs if each["next_run_at"]]
    means = [0.0, *(2.0**number for number in range(crashes_max))]
    report.check(
        "it comes again at once the first time, and then after a backoff from 1 s, ±20 %",
        ok=all(abs(wait - mean) <= 0.2 * mean + SLACK_SECONDS for wait, mean in zip(waits, means, strict=False)),
        evidence=", ".join(f"{wait:.2f} s" for wait in waits),
    )


async def check_neighbours(report: Report, own: Lane, ids: list[str]) -> None:
    """Those that were enqueued meanwhile, each with its number."""

    async def have_ended() -> bool:
        return not [
            job
            for state in ("scheduled", "ready", "running")
            for job in await own.jobs(state=state, task="verify.neighbour")
        ]

    await until(have_ended, "the neighbours have ended")
    found = {job["id"]: job for job in await own.jobs(task="verify.neighbour")}
    states = Counter(found[job_id]["state"] for job_id in ids)
    caught = [job_id for job_id in ids if found[job_id]["crashes"]]
    results = [(await own.job(job_id))["result"] for job_id in caught]
    report.check(
        "every neighbour succeeds",
        ok=states == {"succeeded": len(ids)} and results == [ids.index(job_id) for job_id in caught],
        evidence=f"{dict(states)}; {len(caught)} died with it at first, and ran again",
    )


async def check_redrive(report: Report, own: Lane, job_id: str) -> None:
    """The job, when it does no harm any more."""
    wish: Json = {"queue": own.queue, "dead_reason": "crash_loop"}
    answer = (await own.post("/v1/dead/redrive", wish)).json()
    job = await own.job(job_id, wait_seconds=30)
    report.check(
        "a redrive brings it back, and it succeeds in its second generation, nothing held against it",
        ok=answer["jobs"] == [job_id]
        and (job["state"], job["result"], job["generation"], job["attempt"], job["crashes"])
        == ("succeeded", "harmless by now", 2, 1, 0),
        evidence=f"{job['state']} with '{job['result']}' in generation {job['generation']}, attempt {job['attempt']}",
    )
    generations = Counter((each["generation"], each["outcome"]) for each in await own.attempts(job_id))
    report.check(
        "its history keeps both generations",
        ok=set(generations) == {(1, "lease_lost"), (2, "succeeded")},
        evidence="; ".join(f"generation {number}: {count} {out}" for (number, out), count in generations.items()),
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    budget = Settings().max_crashes
    parser.add_argument(
        "--max-crashes", type=int, default=budget, help=f"the budget; with --url, that of its scheduler ({budget})"
    )
    run(verify, parser.parse_args())
