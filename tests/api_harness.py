"""Ways to talk to the application in tests: in process, as raw ASGI, and over a real socket."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio
import httpx2
import msgspec
import uvicorn
from anyio.abc import SocketStream
from starlette.applications import Starlette

from clarion.api.app import create_app
from clarion.api.operation import Operation, routes
from clarion.api.services import Adder, Services
from clarion.claims import Claims
from clarion.endings import Endings
from clarion.execution import (
    Beat,
    Completed,
    Completion,
    Ended,
    Failure,
    Heartbeat,
    Lease,
    LogLine,
    Policy,
    Release,
    Snoozing,
)
from clarion.job import Enqueued, JobState, NewJob
from clarion.roster import Roster
from clarion.settings import Settings
from clarion.store import Store
from clarion.waits import Waits
from clarion.wake import Ringer


class PlainEnqueuer:
    """Enqueues without coalescing and without a ring."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued]:
        return await self._store.enqueue_jobs(jobs)

    async def enqueue_one(self, job: NewJob) -> Enqueued:
        return (await self.enqueue([job]))[0]


class PlainEndings(Endings):
    """Ends attempts without coalescing."""

    def __init__(self, store: Store, ringer: Ringer) -> None:
        super().__init__(store, ringer, buffer_max=1)
        self._plain = store

    async def complete(self, completion: Completion) -> Completed:
        return (await self._plain.complete_jobs([completion]))[0]

    async def end(self, ending: Failure | Snoozing | Release) -> Ended:
        match ending:
            case Failure():
                return (await self._plain.fail_jobs([ending]))[0]
            case Snoozing():
                return (await self._plain.snooze_jobs([ending]))[0]
            case Release():
                return (await self._plain.release_jobs([ending]))[0][0]

    async def beat_all(self, beats: Sequence[Beat]) -> list[Heartbeat | None]:
        held = {answer.token: answer for answer in await self._plain.heartbeat_jobs(beats)}
        return [held.get(beat.token) for beat in beats]

    async def log(self, lines: Sequence[LogLine]) -> Sequence[bool | None]:
        return await self._plain.record_logs(lines)


def services_over(store: Store, settings: Settings, *, enqueuer: Adder | None = None, **changes: Any) -> Services:
    """Services of a process with these settings; `changes` are to single settings."""
    settings = msgspec.structs.replace(settings, **{"batch_max": 1} | changes)
    ringer = Ringer(store, settings)
    return Services(
        store=store,
        enqueuer=enqueuer or PlainEnqueuer(store),
        endings=PlainEndings(store, ringer),
        ringer=ringer,
        waits=Waits(store, settings),
        claims=Claims(store, settings),
        roster=Roster(store, settings),
        settings=settings,
        draining=anyio.Event(),
    )


def client_of(services: Services, **options: Any) -> httpx2.AsyncClient:
    """A client of the application over these services, in process."""
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(create_app(services)), base_url="http://clarion", **options
    )


def app_with(services: Services, *more: Operation[Any, Any]) -> Starlette:
    """The application with more operations."""
    app = create_app(services)
    app.router.routes.extend(routes(more))
    return app


async def ask(app: Starlette, method: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """A request whose path no client library has tidied up: the status, and the body as JSON."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], msgspec.json.decode(body) if body else None


class _Server(uvicorn.Server):
    def __init__(self, app: Starlette) -> None:
        super().__init__(uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False))
        self.is_up = anyio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@asynccontextmanager
async def listening(services: Services, *more: Operation[Any, Any]) -> AsyncIterator[int]:
    """The application, with more operations, behind a real server; its port on 127.0.0.1."""
    server = _Server(app_with(services, *more))
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve)
        await server.is_up.wait()
        yield server.servers[0].sockets[0].getsockname()[1]
        services.waits.close()
        server.should_exit = True


async def read_answer(stream: SocketStream) -> tuple[int, bytes]:
    """Status and body of an answer that has a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += await stream.receive()
    head, _, body = received.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(headers[b"content-length"]):
        body += await stream.receive()
    return int(head.split(b" ")[1]), body


async def claim(store: Store, worker_id: UUID, *, task: str = "work", queue: str = "default") -> Lease:
    """Takes the next job of a task."""
    [lease] = await store.claim_for(worker_id, {queue: 1}, {task: Policy()}, lease_seconds=30)
    return lease


async def finish(store: Store, worker_id: UUID, *, task: str = "work", result: str | None = None) -> UUID:
    """Runs the next job of a task to its end; its id."""
    lease = await claim(store, worker_id, task=task)
    [completed] = await store.complete_jobs([Completion(lease.id, lease.token, result)])
    assert completed.state == JobState.SUCCEEDED
    return lease.id
