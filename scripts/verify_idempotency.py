#!/usr/bin/env python3
"""Proves that a request which is sent again does its work once: enqueues by their key, completions by their token.

Fifty enqueues with one key at the same time make one job, and are all answered alike; the same key with another request
is refused, naming the field that differs. Of fifty completions at the same time, each with another result, the first
stands and the others are answered with it; another key, or the token of an earlier claim, is refused.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
from collections import Counter
from collections.abc import Awaitable, Callable
from uuid import uuid4

import anyio
import httpx2

from verification import Report, arguments, deployment, run
from verification_http import TASK, HttpWorker, Json, Lane, body_of, lane, problem_of

CALLS = 50
REPLAYED = "idempotency-replayed"


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("a request that is sent again does its work once")
    async with deployment(options) as target, lane(target, "idempotency") as own:
        key, body = f"order-{uuid4()}", {"queue": own.queue, "task": TASK, "args": {"order": 7, "to": "ada"}}
        job = await check_enqueues(report, own, key, body)
        await check_spellings(report, own, key, body, job)
        await check_mismatches(report, own, key, body)
        await check_stale_token(report, own)
        await check_completions(report, own, job)
        await check_after_the_end(report, own, key, body, job)
    return report


async def all_at_once(call: Callable[[int], Awaitable[httpx2.Response]]) -> list[httpx2.Response]:
    """The answers to so many calls at the same time."""
    answers: list[httpx2.Response] = []

    async def ask(number: int) -> None:
        answer = await call(number)
        # Whoever comes while the first is being committed may be told to come again.
        while problem_of(answer) == "409 /problems/idempotency-in-flight":
            await anyio.sleep(float(answer.headers["retry-after"]))
            answer = await call(number)
        answers.append(answer)

    async with anyio.create_task_group() as group:
        for number in range(CALLS):
            group.start_soon(ask, number)
    return answers


async def check_enqueues(report: Report, own: Lane, key: str, body: Json) -> Json:
    """Many enqueues with one key; the job."""
    answers = await all_at_once(lambda _: own.post("/v1/jobs", body, idempotency_key=key))
    jobs = await own.jobs()
    statuses, texts = Counter(answer.status_code for answer in answers), {answer.text for answer in answers}
    replays = [answer.headers.get(REPLAYED) for answer in answers].count("true")
    report.check(
        f"{CALLS} enqueues with one key at once make one job",
        ok=len(jobs) == 1 and statuses == {201: CALLS},
        evidence=f"{len(jobs)} job in the queue, statuses {dict(statuses)}",
    )
    report.check(
        "all are answered alike, and all but the first say that they are replays",
        ok=len(texts) == 1 and replays == CALLS - 1,
        evidence=f"{len(texts)} different body, {replays} of {CALLS} replayed",
    )
    return body_of(answers[0])


async def check_spellings(report: Report, own: Lane, key: str, body: Json, job: Json) -> None:
    """The same request in other words."""
    answers = {
        "key in quotes": await own.post("/v1/jobs", body, idempotency_key=f'"{key}"'),
        "key as a field": await own.post("/v1/jobs", body | {"idempotency_key": key}),
        "other order": await own.post("/v1/jobs", dict(reversed(body.items())), idempotency_key=key),
        "defaults spelt out": await own.post("/v1/jobs", body | {"priority": 0}, idempotency_key=key),
    }
    wrong = [how for how, answer in answers.items() if answer.json() != job or REPLAYED not in answer.headers]
    report.check(
        "the same request in another spelling is the same",
        ok=not wrong,
        evidence=f"{', '.join(answers)}: job {job['id']}" + (f"; not {wrong}" if wrong else ""),
    )


async def check_mismatches(report: Report, own: Lane, key: str, body: Json) -> None:
    """The same key with another request."""
    others: dict[str, Json] = {
        "/args": {"args": {"order": 8, "to": "ada"}},
        "/task": {"task": "verify.other"},
        "/priority": {"priority": 1},
    }
    for pointer, change in others.items():
        answer = await own.post("/v1/jobs", body | change, idempotency_key=key)
        named = [error["pointer"] for error in answer.json().get("errors", [])]
        report.check(
            f"the same key with another {pointer.strip('/')} is refused, naming it",
            ok=(problem_of(answer), named) == ("422 /problems/idempotency-mismatch", [pointer]),
            evidence=f"{problem_of(answer)}, {', '.join(named)}",
        )


async def check_stale_token(report: Report, own: Lane) -> None:
    """The token of an earlier claim of the same job, which the same worker has again."""
    worker = own.worker()
    earlier = await worker.claim_one()
    await worker.say(earlier, "release")
    now = await worker.claim_one()
    answer = await worker.say(earlier, "complete", {"result": "late"})
    report.check(
        "the token of an earlier claim is refused",
        ok=now["id"] == earlier["id"] and problem_of(answer) == "409 /problems/lease-lost",
        evidence=f"{problem_of(answer)}, state {answer.json().get('state')}",
    )
    await worker.say(now, "release")


async def check_completions(report: Report, own: Lane, job: Json) -> None:
    """Many completions with one token, each with another result."""
    worker, key = own.worker(), f"done-{uuid4()}"
    lease = await worker.claim_one()
    answers = await all_at_once(lambda number: worker.say(lease, "complete", {"result": number}, key=key))
    first = [answer for answer in answers if REPLAYED not in answer.headers]
    results = {answer.json().get("result") for answer in answers}
    stored = (await own.job(job["id"]))["result"]
    report.check(
        f"of {CALLS} completions at once the first one stands, and the others are answered with it",
        ok={answer.status_code for answer in answers} == {200} and len(first) == 1 and results == {stored},
        evidence=f"{len(first)} written, {CALLS - len(first)} replayed, result {results}, stored {stored}",
    )
    await check_late_completions(report, worker, lease, stored)


async def check_late_completions(report: Report, worker: HttpWorker, lease: Json, stored: int) -> None:
    """Completions of a job that is finished."""
    again = await worker.say(lease, "complete", {"result": "another"})
    report.check(
        "a completion that comes again is answered with the stored result",
        ok=(again.status_code, again.json().get("result"), again.headers.get(REPLAYED)) == (200, stored, "true"),
        evidence=f"sent 'another', got {again.status_code} with {again.json().get('result')}",
    )
    other = await worker.say(lease, "complete", {"result": stored}, key=f"done-{uuid4()}")
    report.check(
        "under another key it is refused",
        ok=problem_of(other) == "422 /problems/idempotency-mismatch",
        evidence=problem_of(other),
    )


async def check_after_the_end(report: Report, own: Lane, key: str, body: Json, job: Json) -> None:
    """The enqueue once more, when its job is long finished."""
    answer = await own.post("/v1/jobs", body, idempotency_key=key)
    jobs = await own.jobs()
    report.check(
        "the key of a job that is finished still answers, and makes no other",
        ok=answer.status_code == 201
        and answer.json()["id"] == job["id"]
        and REPLAYED in answer.headers
        and len(jobs) == 1,
        evidence=f"{answer.status_code} with job {answer.json().get('id')}, {len(jobs)} job in the queue",
    )


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
