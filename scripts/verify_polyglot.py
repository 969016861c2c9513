#!/usr/bin/env python3
"""Proves that workers in other languages do as well: one in bash and one in Node, with nothing but the HTTP protocol.

Both of `worker/examples` work on one queue of mixed jobs. One of them is killed in the middle and another of its kind
started; all jobs end right, those that the killed one held after running again. SIGTERM then ends both with exit code
0. What is not installed here is skipped, unless CLARION_TEST_REQUIRE_TOOLS is 1.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import hashlib
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from tempfile import TemporaryDirectory

import anyio
import msgspec

from verification import SCRIPTS, Child, Deployment, Report, arguments, console, deployment, progress_bar, run, running
from verification_http import PATIENCE_SECONDS, Json, Lane, lane, until

EXAMPLES = SCRIPTS.parent / "worker" / "examples"
# Each worker's command, and what has to be installed for it.
WORKERS = {
    "worker.sh": (["bash", str(EXAMPLES / "worker.sh")], ("bash", "curl", "awk", "sha256sum")),
    "worker.mjs": (["node", str(EXAMPLES / "worker.mjs")], ("node",)),
}
LEASE_SECONDS = 3.0
STOP_SECONDS = 15.0
TEXTS = (
    "",
    "plain",
    'quotes " and \\ backslashes',
    "line\nends\tand tabs",
    "ä € 𝄞 漢字",
    "{}[]:,",
    "'$(no) `shell`' %s",
)
ROUNDS = 3


class Worker(msgspec.Struct, frozen=True):
    """A worker of the examples, as a process; `id` is what it calls itself."""

    name: str
    id: str
    child: Child


async def verify(options: argparse.Namespace) -> Report:
    """Runs the whole proof."""
    report = Report("workers in bash and Node run mixed jobs right, though one is killed")
    names = [name for name in WORKERS if is_installed(report, name)]
    if not names:
        return report
    async with deployment(options) as target, lane(target, "polyglot") as own, AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(worker(target, own, name)) for name in names]
        jobs = mixed_jobs()
        ids = await own.enqueue_many(jobs)
        await wait_for_half(own, ids)
        held = await kill_while_it_holds(own, workers[-1])
        heir = await stack.enter_async_context(worker(target, own, workers[-1].name))
        found = await wait_for_all(own, [*ids, *held])
        check_results(report, jobs, found[: len(ids)], [*workers, heir])
        check_takeover(report, workers[-1], {job["id"]: job for job in found}, held)
        for each in [*workers[:-1], heir]:
            await check_stop(report, each)
    return report


def is_installed(report: Report, name: str) -> bool:
    """Whether a worker can run here; says so where it cannot."""
    missing = [tool for tool in WORKERS[name][1] if shutil.which(tool) is None]
    if missing and os.environ.get("CLARION_TEST_REQUIRE_TOOLS") == "1":
        report.check(f"{name} runs here", ok=False, evidence=f"not installed: {', '.join(missing)}")
    elif missing:
        report.skip(name, because=f"not installed: {', '.join(missing)}")
    return not missing


@asynccontextmanager
async def worker(target: Deployment, own: Lane, name: str) -> AsyncIterator[Worker]:
    """A worker, once it has begun; it is asked to stop at the end."""
    with TemporaryDirectory(prefix="clarion-verify-") as directory:
        variables = {
            "CLARION_URL": target.url,
            "CLARION_API_TOKEN": target.token,
            "CLARION_QUEUES": own.queue,
            "CLARION_LEASE": f"{LEASE_SECONDS:g}s",
            "CLARION_CONCURRENCY": "4",
            "CLARION_DRAIN_SECONDS": "5",
            "TMPDIR": directory,
        }
        async with running(WORKERS[name][0], variables=variables) as child:
            said = re.search(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", await child.line_with("worker"))
            try:
                yield Worker(name, said[0] if said else "", child)
            finally:
                with anyio.CancelScope(shield=True):
                    await stop(child)


async def stop(child: Child) -> None:
    """SIGTERM, and some time to heed it."""
    if child.process.returncode is None:
        child.process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(STOP_SECONDS):
            await child.process.wait()


def mixed_jobs() -> list[Json]:
    """Some of everything that the examples can do."""
    failing = {"task": "demo.fail", "max_attempts": 2, "backoff": 0.2}
    return [
        job
        for number in range(ROUNDS)
        for text in TEXTS
        for job in (
            {"task": "demo.echo", "args": {"number": number, "text": text, "list": [1, 2.5, None, {"deep": True}]}},
            {"task": "demo.sha256", "args": {"text": text * (number + 1)}},
        )
    ] + [
        job
        for number in range(ROUNDS)
        for job in ({"task": "demo.sleep", "args": {"seconds": 0.3}}, failing | {"args": {"message": f"no {number}"}})
    ]


async def wait_for_half(own: Lane, ids: list[str]) -> None:
    """Returns when half of the jobs are finished."""
    console.print(f"{len(ids)} jobs are enqueued…")

    async def is_half_done() -> bool:
        return len(await own.jobs(state="succeeded")) >= len(ids) / 2

    await until(is_half_done, "half of the jobs done")


async def kill_while_it_holds(own: Lane, victim: Worker) -> list[str]:
    """Gives the workers something that takes a while, and kills one that has begun with it; what it held."""
    slow = {"task": "demo.sleep", "args": {"seconds": 2}, "priority": 10}
    slow_ids = await own.enqueue_many([slow] * 4)

    async def held() -> list[str]:
        return [job["id"] for job in await own.jobs(state="running") if job["worker"] == victim.id]

    async def has_begun() -> bool:
        return not set(slow_ids).isdisjoint(await held())

    await until(has_begun, f"{victim.name} at work on a slow job")
    victim.child.process.send_signal(signal.SIGKILL)
    await victim.child.process.wait()
    return await held()


async def wait_for_all(own: Lane, ids: list[str]) -> list[Json]:
    """The jobs, when all are finished."""
    found = []
    with progress_bar("finished", len(ids)) as bar:
        for job_id in ids:
            found.append(await own.job(job_id, wait_seconds=PATIENCE_SECONDS))
            bar.update(len(found))
    return found


def check_results(report: Report, jobs: list[Json], found: list[Json], workers: list[Worker]) -> None:
    """Each job's end against what it should be."""
    wrong = [job for wanted, job in zip(jobs, found, strict=True) if not is_right(wanted, job)]
    kinds = Counter(job["task"] for job in found if job not in wrong)
    evidence = ", ".join(f"{count} {task}" for task, count in kinds.items()) + (f"; not {wrong[:3]}" if wrong else "")
    report.check(f"all {len(jobs)} jobs end right", ok=not wrong, evidence=evidence)
    names = {each.id: each.name for each in workers}
    by = Counter(names.get(job["worker"], "nobody") for job in found if job["state"] == "succeeded")
    report.check("every worker has its part", ok=set(by) == {each.name for each in workers}, evidence=str(dict(by)))


def is_right(wanted: Json, job: Json) -> bool:
    """Whether a job has ended as it should."""
    match wanted["task"]:
        case "demo.echo":
            return bool(job["state"] == "succeeded" and job["result"] == wanted["args"])
        case "demo.sha256":
            digest = hashlib.sha256(wanted["args"]["text"].encode()).hexdigest()
            return bool(job["state"] == "succeeded" and job["result"] == {"sha256": digest})
        case "demo.fail":
            message = (job["error"] or {}).get("message")
            ending = (job["state"], job["dead_reason"], job["errors"], message)
            return ending == ("dead", "attempts_exhausted", 2, wanted["args"]["message"])
    return bool(job["state"] == "succeeded")


def check_takeover(report: Report, victim: Worker, found: dict[str, Json], held: list[str]) -> None:
    """What the killed worker held."""
    again = [job_id for job_id in held if found[job_id]["state"] == "succeeded" and found[job_id]["crashes"] == 1]
    report.check(
        f"what the killed {victim.name} held ran again",
        ok=bool(held) and again == held and all(found[job_id]["worker"] != victim.id for job_id in held),
        evidence=f"it held {len(held)}; {len(again)} succeeded elsewhere after one crash",
    )


async def check_stop(report: Report, each: Worker) -> None:
    """An orderly end."""
    await stop(each.child)
    code = each.child.process.returncode
    report.check(f"{each.name} stops in order", ok=code == 0, evidence=f"exit code {code} after SIGTERM")


if __name__ == "__main__":
    run(verify, arguments(__doc__).parse_args())
