"""What the verifications say over HTTP, as any client would: jobs in a queue of their own, and the worker protocol."""

import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeAlias
from uuid import uuid4

import anyio
import httpx2
import msgspec

from verification import SCRIPTS, Child, Deployment, VerificationError, console, running

Json: TypeAlias = dict[str, Any]

TASK = "verify.job"
BATCH_JOBS = 1000
PATIENCE_SECONDS = 60.0
_TICK_SECONDS = 0.05
_UNFINISHED = ("scheduled", "ready", "running", "dead")


class Lane:
    """A queue of this run's own: jobs go in, and it can be asked what became of them."""

    def __init__(self, http: httpx2.AsyncClient, queue: str) -> None:
        self.http = http
        self.queue = queue

    async def enqueue(self, **job: Any) -> Json:
        """One job, as the API answers it."""
        return body_of(await self.post("/v1/jobs", {"queue": self.queue, "task": TASK} | job))

    async def enqueue_many(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Many jobs; their ids, in order."""
        ids: list[str] = []
        for start in range(0, len(jobs), BATCH_JOBS):
            batch = [{"queue": self.queue, "task": TASK} | dict(job) for job in jobs[start : start + BATCH_JOBS]]
            ids += [job["id"] for job in body_of(await self.post("/v1/jobs/batch", {"jobs": batch}))["jobs"]]
        return ids

    async def job(self, job_id: str, *, wait_seconds: float = 0) -> Json:
        """The job as it is now, or as soon as it is finished."""
        return await self.get(f"/v1/jobs/{job_id}", wait=f"{wait_seconds:g}s")

    async def attempts(self, job_id: str) -> list[Json]:
        """Every run of a job, in order."""
        attempts: list[Json] = (await self.get(f"/v1/jobs/{job_id}/attempts"))["attempts"]
        return attempts

    async def timeline(self, job_id: str) -> list[Json]:
        """Everything that happened to a job, in order."""
        timeline: list[Json] = (await self.get(f"/v1/jobs/{job_id}/attempts"))["timeline"]
        return timeline

    async def jobs(self, **filters: str) -> list[Json]:
        """The jobs of this queue, newest first."""
        found: list[Json] = []
        query = {"queue": self.queue, "limit": "500"} | filters
        while True:
            page = await self.get("/v1/jobs", **query)
            found += page["jobs"]
            if page["next_cursor"] is None:
                return found
            query["cursor"] = page["next_cursor"]

    async def get(self, path: str, **query: str) -> Json:
        """What a path answers."""
        return body_of(await self.http.get(path, params=query))

    async def post(self, path: str, body: Json | None = None, **headers: str) -> httpx2.Response:
        """The answer to a call, whatever it is."""
        return await self.http.post(
            path, json=body, headers={name.replace("_", "-"): headers[name] for name in headers}
        )

    def worker(self, *, lease_seconds: float = 30) -> "HttpWorker":
        """A worker of this queue, in this process."""
        return HttpWorker(self.http, self.queue, lease_seconds=lease_seconds)


class HttpWorker:
    """The worker protocol, a method a call: one identity, as every process has one."""

    def __init__(self, http: httpx2.AsyncClient, queue: str, *, lease_seconds: float) -> None:
        self.id = str(uuid4())
        self.lease_seconds = lease_seconds
        self._http = http
        self._queue = queue

    async def claim(self, jobs_max: int = 1, *, wait_seconds: float = 0) -> list[Json]:
        """Up to so many leases; none if nothing came in time."""
        body = {"worker": self.id, "name": "verification", "queues": [self._queue], "max": jobs_max}
        body |= {"lease": self.lease_seconds, "wait": wait_seconds}
        answer = await self._http.post("/v1/leases", json=body)
        if answer.status_code == 204:
            return []
        leases: list[Json] = body_of(answer)["leases"]
        return leases

    async def claim_one(self, *, wait_seconds: float = 15) -> Json:
        """The next lease; raises VerificationError when none comes."""
        leases = await self.claim(wait_seconds=wait_seconds)
        if not leases:
            raise VerificationError(f"no job came from {self._queue} within {wait_seconds:g} s")
        return leases[0]

    async def beat(self, *leases: Json) -> list[Json]:
        """What the server says of each of them."""
        body = {"worker": self.id, "lease": self.lease_seconds, "leases": [{"token": each["token"]} for each in leases]}
        said: list[Json] = body_of(await self._http.post("/v1/leases/heartbeat", json=body))["leases"]
        return said

    async def say(self, lease: Json, verb: str, body: Json | None = None, *, key: str | None = None) -> httpx2.Response:
        """The answer to a call about a lease, whatever it is."""
        headers = {} if key is None else {"idempotency-key": key}
        return await self._http.post(f"/v1/leases/{lease['token']}/{verb}", json=body, headers=headers)

    async def complete(self, lease: Json, result: Any = None) -> Json:
        """Finishes a job; raises VerificationError if that is refused."""
        return body_of(await self.say(lease, "complete", {"result": result}))

    async def fail(self, lease: Json, message: str = "as planned", **more: Any) -> Json:
        """Ends an attempt that went wrong; raises VerificationError if that is refused."""
        return body_of(await self.say(lease, "fail", {"error": {"type": "Planned", "message": message}} | more))


class WorkerChild:
    """A process that runs `verification_worker.py`; `id` is what it calls itself."""

    def __init__(self, child: Child, worker_id: str) -> None:
        self.id = worker_id
        self.process = child.process
        self._child = child

    async def told(self, event: str, job_id: str) -> Json:
        """What it tells of an event in the life of a job, once it does; raises VerificationError if it never does."""
        with anyio.move_on_after(PATIENCE_SECONDS):
            told: Json = msgspec.json.decode(await self._child.line_with(f'"event":"{event}","job":"{job_id}"'))
            return told
        raise VerificationError(f"worker {self.id} told nothing of '{event}' within {PATIENCE_SECONDS:g} s")


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits for it; raises VerificationError if it does not come."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not await condition():
        if time.monotonic() > give_up_at:
            raise VerificationError(f"{what}: not within {PATIENCE_SECONDS:g} s")
        await anyio.sleep(_TICK_SECONDS)


def problem_of(answer: httpx2.Response) -> str:
    """An answer in short: its status, and which problem it is, if it is one."""
    body = answer.json() if answer.content else {}
    return f"{answer.status_code} {body.get('type', '')}".rstrip()


def body_of(answer: httpx2.Response) -> Json:
    """The body of an answer on which the rest depends; raises VerificationError for any but a success."""
    if not answer.is_success:
        request = answer.request
        raise VerificationError(f"{request.method} {request.url.path}: {answer.status_code} {answer.text}")
    body: Json = answer.json()
    return body


def moment(text: str) -> float:
    """A date of the API in seconds."""
    return datetime.fromisoformat(text).timestamp()


@asynccontextmanager
async def lane(target: Deployment, name: str, *, actor: str = "verification") -> AsyncIterator[Lane]:
    """A queue that nobody else knows; what is left in it at the end is cancelled."""
    async with target.client(actor=actor) as http:
        own = Lane(http, f"verify-{name}-{uuid4().hex[:8]}")
        try:
            yield own
        finally:
            with anyio.CancelScope(shield=True):
                await _leave_nothing(own)


async def _leave_nothing(own: Lane) -> None:
    try:
        for state in _UNFINISHED:
            for job in await own.jobs(state=state):
                await own.post(f"/v1/jobs/{job['id']}/cancel")
    except (VerificationError, httpx2.TransportError) as error:
        console.print(f"what is left in the queue {own.queue} could not be cancelled: {error}")


@asynccontextmanager
async def worker_process(target: Deployment, own: Lane, *flags: str) -> AsyncIterator["WorkerChild"]:
    """A process that speaks the worker protocol, and tells on standard error what it does: `verification_worker.py`."""
    command = [
        sys.executable,
        str(SCRIPTS / "verification_worker.py"),
        "--url",
        target.url,
        "--queue",
        own.queue,
        *flags,
    ]
    async with running(command, variables={"CLARION_API_TOKEN": target.token}) as child:
        started = msgspec.json.decode(await child.line_with('"event":"started"'))
        yield WorkerChild(child, started["worker"])
