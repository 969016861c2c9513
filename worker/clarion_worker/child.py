"""The process in which handlers with `runs_in="process"` run, one attempt at a time: `python -m clarion_worker.child`.

The worker tells it what to run over the socket that is its standard input. Handlers run in the main thread, `async`
ones on an event loop of their own; what they print goes to standard error.

It ends with its worker, however that ends. A thread sees the end of the socket; but a handler in C code can keep the
interpreter's lock from it, so on Linux the end of a pipe has the kernel kill the whole process group. A process that
the worker has forked can hold both open beyond the worker's life, so the thread looks at the parent's pid as well.
"""

import asyncio
import contextvars
import faulthandler
import fcntl
import importlib
import inspect
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import structlog

from clarion.execution import Completion, Lease, Snoozing
from clarion.job import DeadReason
from clarion.log import configure_logging
from clarion.settings import Settings
from clarion.signals import leave_signals_to_the_main_thread
from clarion.texts import LINE_MESSAGE_MAX_CHARS, storable
from clarion_worker.arguments import CONTEXT_PARAMETER
from clarion_worker.calls import Connection, Standing, complete_on, result_to_commit
from clarion_worker.context import Context, SyncContext
from clarion_worker.frames import (
    EXIT_SECONDS,
    Answer,
    Cancel,
    Channel,
    Finished,
    Launch,
    Ready,
    Run,
    Target,
    Wire,
)
from clarion_worker.lines import HandlerLog, fields_json
from clarion_worker.outcomes import Cancelled, Discard, Snooze, failure
from clarion_worker.registry import Task, Worker
from clarion_worker.results import encode_result

log = structlog.get_logger()

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Chosen before the worker when memory runs out; the scale ends at 1000.
_OOM_SCORE = 300


class SyncCalls:
    """What a `def` handler asks of the worker; `Calls.hear` hears it there."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def beat(self, progress: str | None, checkpoint: str | None) -> Standing:
        """Extends the lease; waits for the answer."""
        return Standing(str(self._channel.call("beat", [progress, checkpoint])))

    def is_ending(self) -> bool:
        """Whether the attempt is to end."""
        return self._channel.is_cancelled()


class AsyncCalls:
    """What an `async def` handler asks of the worker; it waits in a thread."""

    def __init__(self, channel: Channel, lease: Lease, settings: Settings) -> None:
        self._channel = channel
        self._lease = lease
        self._settings = settings

    async def beat(self, progress: str | None, checkpoint: str | None) -> Standing:
        """Extends the lease."""
        return Standing(str(await asyncio.to_thread(self._channel.call, "beat", [progress, checkpoint])))

    async def complete_in(self, connection: Connection, result: object) -> None:
        """Finishes the job in an open transaction."""
        encoded = result_to_commit(connection, result, settings=self._settings)
        await asyncio.to_thread(self._channel.call, "committing", None)
        await complete_on(connection, self._lease, encoded, settings=self._settings)

    def is_ending(self) -> bool:
        """Whether the attempt is to end."""
        return self._channel.is_cancelled()


def make_context(run: Run, channel: Channel, settings: Settings, *, is_async: bool) -> Context | SyncContext:
    """What a handler with a parameter `ctx` is given."""
    lease = run.lease

    def keep(level: str, message: str, fields: dict[str, Any]) -> None:
        # Bounded here already: it is the worker's event loop that reads it.
        bounded = msgspec.json.decode(fields_json(fields)) if fields else {}
        channel.tell("line", [level, storable(message, LINE_MESSAGE_MAX_CHARS), bounded])

    handler_log = HandlerLog(log.bind(job_id=str(lease.id), task=lease.task, attempt=lease.attempt), keep)
    if is_async:
        return Context(lease, handler_log, AsyncCalls(channel, lease, settings))
    return SyncContext(lease, handler_log, SyncCalls(channel))


class _Unfit(Exception):
    """The payload or the result of a job is of no use; the cause says why."""

    def __init__(self, dead_reason: DeadReason) -> None:
        self.dead_reason = dead_reason


def perform(run: Run, channel: Channel, settings: Settings) -> Finished:
    """Makes one attempt; never raises for anything that a handler or its module does."""
    lease = run.lease
    try:
        result = _invoke(run, channel, settings)
        try:
            encoded = encode_result(result, max_bytes=settings.result_max_bytes)
        except ValueError as error:
            raise _Unfit(DeadReason.RESULT_UNSTORABLE) from error
        return Finished(completion=Completion(lease.id, lease.token, encoded))
    except BaseException as error:  # noqa: BLE001  whatever a handler raises is its attempt's failure
        return _finished(lease, error, was_cancelled=channel.is_cancelled())


def _finished(lease: Lease, error: BaseException, *, was_cancelled: bool) -> Finished:
    dead_reason: DeadReason | None = None
    match error:
        case Snooze():
            return Finished(snoozing=Snoozing(lease.id, lease.token, error.delay_seconds))
        case asyncio.CancelledError() if not was_cancelled:
            error = asyncio.CancelledError("the handler cancelled itself").with_traceback(error.__traceback__)
        case Cancelled() | asyncio.CancelledError():
            return Finished()
        case Discard():
            dead_reason = DeadReason.NOT_RETRYABLE
        case _Unfit():
            dead_reason = error.dead_reason
            error = error.__cause__ or error
    return Finished(failure=failure(lease, error, dead_reason=dead_reason))


def _find(target: Target) -> Task[..., Any]:
    found: Task[..., Any] | Worker = getattr(importlib.import_module(target.module), target.attribute)
    return found.tasks[target.task] if isinstance(found, Worker) else found


def _invoke(run: Run, channel: Channel, settings: Settings) -> Any:
    task = _find(run.target)
    try:
        arguments = task.arguments.decode(run.lease.args)
    except ValueError as error:
        raise _Unfit(DeadReason.UNDECODABLE_PAYLOAD) from error
    if task.arguments.wants_context:
        arguments[CONTEXT_PARAMETER] = make_context(run, channel, settings, is_async=task.is_async)
    # What the handler sets in its context variables reaches no later attempt.
    return contextvars.copy_context().run(_call, partial(task.handler, **arguments), channel)


def _call(handler: Callable[[], Any], channel: Channel) -> Any:
    result = handler()
    return asyncio.run(_await(result, channel)) if inspect.isawaitable(result) else result


async def _await(handler: Awaitable[Any], channel: Channel) -> Any:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def stop() -> None:
        with suppress(RuntimeError):  # the loop is closed: the handler has ended by itself
            loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]  # we are in it

    channel.on_cancel(stop)
    return await handler


def _listen(wire: Wire, runs: SimpleQueue[tuple[Run, Channel] | None]) -> None:
    """Takes what the worker says, in a thread of its own; ends the process when there is no more."""
    leave_signals_to_the_main_thread()
    channel = Channel(wire)
    channel.closed = True
    try:
        while True:
            match wire.receive():
                case Run() as run:
                    channel = Channel(wire)
                    runs.put((run, channel))
                case Answer() as answer:
                    channel.answer(answer)
                case Cancel():
                    channel.cancel()
    except (EOFError, OSError):
        runs.put(None)
        if channel.closed:
            time.sleep(EXIT_SECONDS)  # the main thread leaves in good order, unless something holds it
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os.killpg(0, signal.SIGKILL)


def _die_with(lifeline_fd: int) -> None:
    """Has the kernel kill this process group, whatever it executes, when the other end of the pipe is closed."""
    os.set_inheritable(lifeline_fd, False)
    if sys.platform == "linux":
        fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, os.O_ASYNC)


def _take_over_standard_streams() -> socket.socket:
    """The socket that was standard input. Whatever reads that now finds its end; what is printed joins the errors."""
    connection = socket.socket(fileno=os.dup(0))
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return connection


def _go_before_the_worker() -> None:
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        score.write_text(str(min(1000, int(score.read_text()) + _OOM_SCORE)))


def _ignore_signals() -> None:
    """Only the worker decides; a service manager signals every process while the worker still drains.

    What a handler forks is to end when it is told so, at once: else `terminate` of a multiprocessing pool does not.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    forking = threading.local()

    def hold() -> None:
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def obey() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        let_go()

    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=obey)


def main() -> None:
    """Makes attempts until the worker is gone, or wants this process gone. The argument is the pipe's descriptor."""
    _die_with(int(sys.argv.pop()))
    connection = _take_over_standard_streams()
    # What a handler forks neither speaks for it nor keeps the socket open after it.
    os.register_at_fork(after_in_child=connection.close)
    _ignore_signals()
    _go_before_the_worker()
    faulthandler.enable()
    with suppress(EOFError, OSError):
        _serve(Wire(connection))


def _serve(wire: Wire) -> None:
    launch = wire.receive()
    if not isinstance(launch, Launch):
        raise TypeError(f"the worker began with {type(launch).__name__}")
    sys.path[:] = launch.sys_path
    configure_logging(launch.settings)
    runs: SimpleQueue[tuple[Run, Channel] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(wire, runs), name="clarion-worker", daemon=True).start()
    wire.send(Ready())
    while (next_run := runs.get()) is not None:
        run, channel = next_run
        channel.finish(perform(run, channel, launch.settings))


if __name__ == "__main__":
    main()
