"""The port on which a worker answers probes: `/livez`, `/readyz`, `/startupz`, and nothing else.

Its answers hold pids, states and counts, so it asks for no token. Who supervises answers on its own event loop. A
worker that is its own only process answers from a thread: on the loop that its handlers block now and then, a probe
would take a busy worker for a dead one.

Whoever can reach the port may open connections and say nothing, and that must not make a well worker look dead. So no
probe is refused: a connection is for one request, lives for a few seconds, and when there are too many the oldest goes.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import anyio
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clarion.errors import UsageError
from clarion.probes import Look, ProcessHealth, live_faults, ready_faults, startup_faults
from clarion.signals import leave_signals_to_the_main_thread

_PROBES = {"/livez": live_faults, "/readyz": ready_faults, "/startupz": startup_faults}
_CONNECTIONS_MAX = 64
_CONNECTION_SECONDS = 5.0
_STOP_SECONDS = 2.0


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a probe answers: `ok`, or `unavailable` and why."""

    status: str
    processes: Sequence[ProcessHealth]
    faults: list[str] = []


def create_app(look: Look) -> Starlette:
    """The application: 200 or 503, the verdict as JSON."""
    app = Starlette(routes=[Route(path, _endpoint(look, judge)) for path, judge in _PROBES.items()])
    app.router.redirect_slashes = False
    return app


def _endpoint(
    look: Look, judge: Callable[[Sequence[ProcessHealth]], list[str]]
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_request: Request) -> Response:
        processes = look()
        faults = judge(processes)
        return Response(
            msgspec.json.encode(Verdict("unavailable" if faults else "ok", processes, faults)),
            status_code=503 if faults else 200,
            headers={"cache-control": "no-store"},
            media_type="application/json",
        )

    return answer


def bind_health_port(host: str, port: int) -> socket.socket:
    """A listening socket, for IPv4 too where `host` is `::` and the system can; UsageError if there can be none."""
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot answer probes on {host}:{port}: {reason}; choose others with --health-host, --health-port"
        ) from error


@asynccontextmanager
async def answering_probes(listening: socket.socket, look: Look) -> AsyncIterator[None]:
    """Answers on this event loop while the block runs."""
    server = _ProbeServer(look)
    async with anyio.create_task_group() as group:
        group.start_soon(server.serve, [listening])
        yield
        server.should_exit = True


@contextmanager
def answering_probes_in_thread(listening: socket.socket, look: Look) -> Iterator[None]:
    """Answers from a thread of its own while the block runs; `look` is called there."""
    server = _ProbeServer(look)

    def run() -> None:
        leave_signals_to_the_main_thread()
        anyio.run(server.serve, [listening])

    thread = threading.Thread(target=run, name="clarion-probes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_STOP_SECONDS)


class _ProbeConnection(HttpToolsProtocol):
    """A connection that lives for `_CONNECTION_SECONDS` at most, and not so long when many are open."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its parent has it
        """Makes room for it by closing the oldest."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_CONNECTION_SECONDS, transport.abort)
        alive = [other for other in self.connections if isinstance(other, _ProbeConnection) and other.is_open()]
        if len(alive) > _CONNECTIONS_MAX:
            min(alive, key=_ProbeConnection.ends).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets its deadline."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def is_open(self) -> bool:
        """Whether it is not being closed already."""
        return not self.transport.is_closing()

    def ends(self) -> float:
        """When it is closed at the latest, in the event loop's time."""
        return self._deadline.when()


class _ProbeServer(uvicorn.Server):
    """uvicorn that leaves signals alone and logs nothing but trouble."""

    def __init__(self, look: Look) -> None:
        config = uvicorn.Config(
            create_app(look),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            http=_ProbeConnection,
            headers=[("connection", "close")],
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the command that runs this server, among other things."""
        yield
