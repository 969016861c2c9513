"""How processes end: the first signal asks for an orderly stop, the second one is obeyed at once."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import anyio

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@asynccontextmanager
async def stop_on_signals(*, within_seconds: float | None = None) -> AsyncIterator[anyio.Event]:
    """An event that SIGTERM or SIGINT sets; a second signal ends the process under whatever it does.

    So does the first one after `within_seconds`, when a handler that blocks the loop keeps the stop from happening.

    Plain signal handlers, not the event loop's: a handler of a job that blocks the loop must not block these.
    """
    loop, stop, seen = asyncio.get_running_loop(), anyio.Event(), 0

    def receive(_number: int, _frame: object) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            leave(1)
        loop.call_soon_threadsafe(stop.set)
        if within_seconds is not None:
            deadline = threading.Timer(within_seconds, leave, [1])
            deadline.daemon = True
            deadline.start()

    before = [signal.signal(number, receive) for number in _SIGNALS]
    try:
        yield stop
    finally:
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)


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


def leave_signals_to_the_main_thread() -> None:
    """For our own threads: a signal that the kernel gives to one would not interrupt what blocks the main one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def leave(code: int) -> NoReturn:
    """Ends the process under threads and handlers that do not end by themselves."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
