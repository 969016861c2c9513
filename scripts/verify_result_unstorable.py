#!/usr/bin/env python3
"""Proves that a result which cannot be stored ends its own job, and not those that end together with it.

A hundred jobs at a time end at the same moment, and one of the results is of no use: it has a NUL character, a number
that is none, too many bytes, or is no JSON at all. Both in a worker in Python and over HTTP that job is dead as
`result_unstorable`, and the others succeed with their results. A request that nobody can read ends nothing.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import time
from collections.abc import Sequence

import anyio
import httpx2

from clarion.settings import Settings
from verification import Deployment, Report, arguments, deployment, run, worker
from verification_http import Json, Lane, lane, moment, problem_of

JOBS = 100
# In the midst of the others.
BAD = 41
# What it takes to claim a hundred jobs on a busy machine, before all of them end at once.
START_SECONDS = 1.0
TOO_MANY_BYTES = Settings().result_max_bytes + 1

# What the handler of the one job is told to answer.
HANDLERS: dict[str, Json] = {
    "a NUL character": {"kind": "NUL"},
    "NaN": {"kind": "NaN"},
    "half a surrogate pair": {"kind": "half a pair"},
    "too many bytes": {"size": TOO_MANY_BYTES},
    "too many levels": {"kind": "levels"},
    "no JSON": {"kind": "no JSON"},
    "what only Postgres refuses": {"kind": "what only Postgres refuses"},
}
# What the one call says.
BODIES = {
    "a NUL character": b'{"result": "a\\u0000b"}',
    "half a surrogate pair": b'{"result": "\\ud800"}',
    "too many bytes": b'{"result": "' + b"x" * TOO_MANY_BYTES + b'"}',
    "too many levels": b'{"result": ' + b"[" * 65 + b"]" * 65 + b"}",
}
UNREADABLE = {"NaN": b'{"result": NaN}', "no JSON": b'{"result": '}


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("a result that cannot be stored ends its own job only")
    async with deployment(options) as target:
        await check_handlers(report, target)
        async with lane(target, "unstorable-http") as own:
            for what, body in BODIES.items():
                await check_call(report, own, what, body)
            for what, body in UNREADABLE.items():
                await check_unreadable(report, own, what, body)
    return report


async def check_handlers(report: Report, target: Deployment) -> None:
    """A hundred handlers of one worker in Python, for each sort."""
    async with lane(target, "unstorable") as own:
        flags = ("--queues", own.queue, "--concurrency", str(JOBS))
        async with worker(target, *flags):
            for what, answer in HANDLERS.items():
                at = time.time() + START_SECONDS
                args: list[Json] = [{"number": number, "at": at} for number in range(JOBS)]
                args[BAD] |= answer
                ids = await own.enqueue_many([{"task": "verify.result", "args": each} for each in args])
                found = await finished(own, ids)
                together = max(ended(job) for job in found) - min(ended(job) for job in found)
                check_jobs(
                    report, found, f"of {JOBS} handlers that end together one answers {what}", f"{together:.2f} s"
                )


async def finished(own: Lane, ids: Sequence[str]) -> list[Json]:
    """The jobs, as soon as all are finished or dead."""
    jobs: dict[str, Json] = {}

    async def read(job_id: str) -> None:
        jobs[job_id] = await own.job(job_id, wait_seconds=30)
        if jobs[job_id]["state"] == "dead":
            jobs[job_id]["attempts"] = await own.attempts(job_id)

    async with anyio.create_task_group() as group:
        for job_id in ids:
            group.start_soon(read, job_id)
    return [jobs[job_id] for job_id in ids]


def ended(job: Json) -> float:
    """When the only attempt of a job ended."""
    return moment(job["finished_at"] or job["attempts"][0]["ended_at"])


def check_jobs(report: Report, found: Sequence[Json], promise: str, evidence: str) -> None:
    """The one job is dead, and the others have their results."""
    bad = found[BAD]
    right = [number for number, job in enumerate(found) if (job["state"], job["result"]) == ("succeeded", number)]
    report.check(
        f"{promise}: its job is dead, and the others succeed",
        ok=right == [number for number in range(JOBS) if number != BAD]
        and (bad["state"], bad["dead_reason"], bad["attempt"]) == ("dead", "result_unstorable", 1),
        evidence=f"{bad['state']}, {bad['dead_reason']} ({(bad['error'] or {}).get('message')}); "
        f"{len(right)} right results; {evidence}",
    )


async def check_call(report: Report, own: Lane, what: str, body: bytes) -> None:
    """A hundred calls over HTTP."""
    ids = await own.enqueue_many([{}] * JOBS)
    leases = {lease["id"]: lease for lease in await own.worker().claim(JOBS)}
    answers: dict[int, httpx2.Response] = {}

    async def complete(number: int) -> None:
        content = body if number == BAD else f'{{"result": {number}}}'.encode()
        answers[number] = await say(own, leases[ids[number]], content)

    async with anyio.create_task_group() as group:
        for number in range(JOBS):
            group.start_soon(complete, number)
    again = await say(own, leases[ids[BAD]], body)
    problems = {problem_of(answer) for answer in (answers[BAD], again)}
    check_jobs(
        report,
        await finished(own, ids),
        f"of {JOBS} completions at once over HTTP one has {what}",
        f"{' or '.join(problems)}, and the same again",
    )
    others = {answers[number].status_code for number in range(JOBS) if number != BAD}
    report.check(
        "… and the calls are answered so",
        ok=(problems, others) == ({"422 /problems/result-unstorable"}, {200}),
        evidence=f"{', '.join(problems)} for the one, {others} for the others",
    )


async def say(own: Lane, lease: Json, content: bytes) -> httpx2.Response:
    """A completion to the letter."""
    headers = {"content-type": "application/json"}
    return await own.http.post(f"/v1/leases/{lease['token']}/complete", content=content, headers=headers)


async def check_unreadable(report: Report, own: Lane, what: str, body: bytes) -> None:
    """A body that is no JSON."""
    job = await own.enqueue()
    worker_here = own.worker()
    lease = await worker_here.claim_one()
    refused = await say(own, lease, body)
    between = await own.job(job["id"])
    done = await worker_here.complete(lease, "after all")
    report.check(
        f"a completion that is no JSON ({what}) is refused, and its lease still holds",
        ok=(problem_of(refused), between["state"], done["state"])
        == ("400 /problems/malformed", "running", "succeeded"),
        evidence=f"{problem_of(refused)}, {between['state']}, then {done['state']}",
    )


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
