"""The composition root of the API: pool, store, batchers, ringer, waits, claims behind the routes; and the server."""

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import anyio
import structlog
import uvicorn

from clarion.api.app import create_app
from clarion.api.joined_writes import JoinedWrites
from clarion.api.services import Services
from clarion.claims import Claims
from clarion.db import open_database
from clarion.endings import Endings
from clarion.enqueuer import Enqueuer
from clarion.errors import UsageError
from clarion.events import Event
from clarion.ground import is_ground_safe, wait_for_ground
from clarion.loops import run_forever
from clarion.maintenance import Maintenance
from clarion.roster import Roster
from clarion.settings import Settings
from clarion.store import Store
from clarion.waits import Waits
from clarion.wake import Listener, Ringer

log = structlog.get_logger()

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_BACKLOG = 2048


@asynccontextmanager
async def running_services(store: Store, settings: Settings) -> AsyncIterator[Services]:
    """What the routes need, with its background tasks running. A bug in one ends the block, and so the process."""
    claims = Claims(store, settings)
    # The claims of this process hear of jobs at once, before anybody is answered who could expect to get them.
    ringer = Ringer(store, settings, on_ready=claims.expect)
    enqueuer = Enqueuer(store, ringer, settings)
    endings = Endings(store, ringer, buffer_max=settings.enqueue_buffer_max_jobs, batch_max=settings.batch_max)
    roster = Roster(store, settings)
    waits = Waits(store, settings)
    listener = Listener(settings, on_ring=claims.hear, on_connect=claims.look_everywhere)
    async with anyio.create_task_group() as group:
        group.start_soon(enqueuer.run)
        group.start_soon(waits.run)
        group.start_soon(claims.run)
        group.start_soon(roster.run)
        group.start_soon(listener.run)
        group.start_soon(partial(run_forever, ringer.step, name="ring"))
        endings.start(group)
        yield Services(
            store=store,
            enqueuer=enqueuer,
            endings=endings,
            ringer=ringer,
            waits=waits,
            claims=claims,
            roster=roster,
            settings=settings,
            draining=anyio.Event(),
        )
        group.cancel_scope.cancel()


async def run_maintenance(settings: Settings) -> None:
    """Promotes, reaps, partitions and prunes until cancelled; any number of processes may."""
    async with open_database(settings, name="scheduler") as database:
        store = Store(database, settings)
        await wait_for_ground(store, settings)
        ringer = Ringer(store, settings)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(run_forever, ringer.step, name="ring"))
            group.start_soon(Maintenance(store, ringer, settings).run)


async def serve(
    settings: Settings, *, listening: socket.socket, stop: anyio.Event, started: Callable[[], None] = lambda: None
) -> None:
    """Answers HTTP on a bound socket until `stop` is set; `started` is called once requests are answered."""
    async with open_database(settings, name="api") as database:
        store = Store(database, settings)
        away = not await is_ground_safe(store, settings)
        async with running_services(store, settings) as services, anyio.create_task_group() as group:
            if away:
                # Meanwhile /livez says that this process lives, and everything else 503.
                group.start_soon(wait_for_ground, store, settings)
            await _Server(settings, services, started).serve_until(stop, listening)
            group.cancel_scope.cancel()


def bind(settings: Settings, host: str, port: int) -> socket.socket:
    """A listening socket; refuses to be open to other machines without a token, and says who has the port."""
    if host not in _LOOPBACK and not settings.api_token:
        raise UsageError(
            f"without CLARION_API_TOKEN anybody who reaches {host} could run jobs: set it, or use --host 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)  # now, so that a second one on this port is told at once
    except (OSError, UnicodeError, TypeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}:{port}: {reason}; choose others with --host, --port") from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Where a bound socket answers."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn that leaves signals alone, and at shutdown lets go of requests that wait before it waits for them."""

    def __init__(self, settings: Settings, services: Services, started: Callable[[], None]) -> None:
        config = uvicorn.Config(
            create_app(services),
            http=JoinedWrites,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_seconds)),
        )
        super().__init__(config)
        self._services = services
        self._call_when_started = started

    async def serve_until(self, stop: anyio.Event, listening: socket.socket) -> None:
        """Serves until the event is set and the open requests are answered, or their time is up."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._exit_after, stop)
            await self.serve(sockets=[listening])
        log.info(Event.SERVER_STOPPED)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens for requests."""
        await super().startup(sockets)
        log.info(Event.SERVER_STARTED)
        self._call_when_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the command that runs this server, among other things."""
        yield

    async def _exit_after(self, stop: anyio.Event) -> None:
        await stop.wait()
        self._services.draining.set()
        self._services.waits.close()
        self._services.claims.close()
        self._services.bodies.close()
        self.should_exit = True
