"""How processes end: the first signal asks for an orderly stop, the second one is obeyed at once."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import anyio


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[anyio.Event]:
    """An event that SIGTERM or SIGINT sets; a second signal ends the process under whatever it does."""
    stop = anyio.Event()

    async def watch() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                if stop.is_set():
                    leave(1)
                stop.set()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield stop
        group.cancel_scope.cancel()


@asynccontextmanager
async def until(event: anyio.Event) -> AsyncIterator[None]:
    """Cancels the block when the event is set."""

    async def watch() -> None:
        await event.wait()
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        yield
        group.cancel_scope.cancel()


def leave(code: int) -> NoReturn:
    """Ends the process under threads and handlers that do not end by themselves."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
