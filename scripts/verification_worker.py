#!/usr/bin/env python3
"""A worker process for the verifications to kill and to freeze: it speaks the worker protocol over HTTP, and no more.

It holds up to `--jobs` jobs at once, each for the seconds that its arguments say, and tells what happens in lines of
JSON on standard error. With `--stubborn` it does what no worker should: it goes on talking about a lease that is lost.
"""

import environment  # isort: skip  # noqa: F401  first: makes the imports below work

import argparse
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec

from verification import Deployment
from verification_http import HttpWorker, Json

# Everything a worker can say of a lease.
CALLS: dict[str, Json | None] = {
    "progress": {"current": 99, "message": "of a lease that is lost", "checkpoint": {"lost": True}},
    "logs": {"lines": [{"n": 2, "message": "of a lease that is lost"}]},
    "complete": {"result": "of a lease that is lost"},
    "fail": {"error": {"type": "Lost", "message": "of a lease that is lost"}},
    "snooze": {"delay": "1h"},
    "release": None,
}


def tell(event: str, **facts: object) -> None:
    """A line for whoever started this process."""
    print(msgspec.json.encode({"event": event} | facts).decode(), file=sys.stderr, flush=True)


async def work(worker: HttpWorker, *, jobs_max: int, stubborn: bool) -> None:
    """Claims, holds and completes jobs, until the process is killed."""
    tell("started", worker=worker.id)
    while True:
        leases = await worker.claim(jobs_max, wait_seconds=10)
        async with anyio.create_task_group() as group:
            for lease in leases:
                group.start_soon(run, worker, lease, stubborn)


async def run(worker: HttpWorker, lease: Json, stubborn: bool) -> None:
    """One job, from its lease to its end."""
    await worker.say(lease, "progress", {"current": 1, "total": 2})
    await worker.say(lease, "logs", {"lines": [{"n": 1, "message": f"attempt {lease['attempt']} begins"}]})
    tell("claimed", job=lease["id"], attempt=lease["attempt"])
    async with heartbeats(worker, lease) as ended:
        with anyio.move_on_after(lease["args"]["seconds"]):
            await ended.wait()
    [said] = await worker.beat(lease)
    tell(said["status"], job=lease["id"], state=said["state"])
    if said["status"] == "cancel":
        await end(worker, lease, "release")
    elif said["status"] != "lost":
        await end(worker, lease, "complete", {"result": {"attempt": lease["attempt"]}})
    elif stubborn:
        for verb, body in CALLS.items():
            await end(worker, lease, verb, body)


@asynccontextmanager
async def heartbeats(worker: HttpWorker, lease: Json) -> AsyncIterator[anyio.Event]:
    """Keeps the lease within the block; the event says that the handler is to end."""
    ended = anyio.Event()

    async def beat() -> None:
        while not ended.is_set():
            await anyio.sleep(worker.lease_seconds / 3)
            [said] = await worker.beat(lease)
            if said["status"] in {"cancel", "lost"}:
                ended.set()

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        yield ended
        group.cancel_scope.cancel()


async def end(worker: HttpWorker, lease: Json, verb: str, body: Json | None = None) -> None:
    """Says something about a lease, and tells what the server answered."""
    answer = await worker.say(lease, verb, body)
    said = answer.json()
    tell(f"{verb} answered", job=lease["id"], status=answer.status_code, type=said.get("type"), state=said.get("state"))


async def main(options: argparse.Namespace) -> None:
    """Works on the queue."""
    target = Deployment(options.url, token=os.environ.get("CLARION_API_TOKEN", ""))
    async with target.client() as http:
        worker = HttpWorker(http, options.queue, lease_seconds=options.lease_seconds)
        await work(worker, jobs_max=options.jobs, stubborn=options.stubborn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A worker that speaks the HTTP protocol, to be killed and frozen.")
    parser.add_argument("--url", required=True, help="a running API; its token is in CLARION_API_TOKEN")
    parser.add_argument("--queue", required=True)
    parser.add_argument("--lease-seconds", type=float, default=2.0)
    parser.add_argument("--jobs", type=int, default=1, help="the most jobs at once (default: 1)")
    parser.add_argument("--stubborn", action="store_true", help="goes on talking about leases that are lost")
    anyio.run(main, parser.parse_args())
