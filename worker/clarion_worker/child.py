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

import structlog

from clarion.execution import Completion, Lease, Snoozing
from clarion.job import DeadReason
from clarion.log import configure_logging
from clarion.settings import Settings
from clarion.signals import leave_signals_to_the_main_thread
from clarion.texts import storable
from clarion_worker.calls import Standing
from clarion_worker.context import SyncContext
from clarion_worker.frames import (
    EXIT_SECONDS,
    Answer,
    Call,
    CallRefused,
    Cancel,
    Finished,
    Launch,
    Note,
    Ready,
    Run,
    Target,
    Wire,
)
from clarion_worker.lines import MESSAGE_MAX_CHARS, HandlerLog
from clarion_worker.outcomes import Cancelled, Discard, Snooze, failure
from clarion_worker.registry import Task, Worker
from clarion_worker.results import encode_result

log = structlog.get_logger()

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Chosen before the worker when memory runs out; the scale ends at 1000.
_OOM_SCORE = 300


class Channel:
    """What one attempt and its worker say to each other; every thread of the handler may use it."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._calling, self._sending, self._ending = threading.Lock(), threading.Lock(), threading.Lock()
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._cancelled = False
        self._stop: Callable[[], None] | None = None
        self.closed = False

    def call(self, kind: str, content: object) -> object:
        """The worker's answer. Raises CallRefused; TypeError or ValueError for content that is not JSON."""
        with self._calling:
            with self._sending:
                if self.closed:
                    raise CallRefused("the attempt has ended")
                self._wire.send(Call(kind, content))
            answer = self._answers.get()
        if answer.error is not None:
            raise CallRefused(answer.error)
        return answer.content

    def tell(self, kind: str, content: object) -> None:
        """Tells the worker, without an answer; nothing once the attempt has ended."""
        with self._sending:
            if not self.closed:
                self._wire.send(Note(kind, content))

    def is_cancelled(self) -> bool:
        """Whether the handler was told to end."""
        return self._cancelled

    def finish(self, finished: Finished) -> None:
        """The last word of the attempt."""
        with self._sending:
            self.closed = True
            self._wire.send(finished)

    def answer(self, answer: Answer) -> None:
        """For the thread that reads: wakes the caller."""
        self._answers.put(answer)

    def cancel(self) -> None:
        """For the thread that reads: the handler is to end."""
        with self._ending:
            self._cancelled, stop = True, self._stop
        if stop is not None:
            stop()

    def on_cancel(self, stop: Callable[[], None]) -> None:
        """Has `stop` called once, from whichever thread, when the handler is to end."""
        with self._ending:
            self._stop, cancelled = stop, self._cancelled
        if cancelled:
            stop()


class _Calls:
    """What a context asks of the worker, as calls and notes of the kinds `beat` and `line`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.is_cancelled = channel.is_cancelled

    def beat(self, progress: str | None, checkpoint: str | None) -> Standing:
        """Extends the lease; waits for the answer."""
        return Standing(str(self._channel.call("beat", {"progress": progress, "checkpoint": checkpoint})))

    def add(self, level: str, message: str, fields: dict[str, Any]) -> None:
        """Hands over a line for the job's log."""
        line = {"level": level, "message": storable(message, MESSAGE_MAX_CHARS)}
        try:
            self._channel.tell("line", line | {"fields": fields})
        except (TypeError, ValueError, RecursionError):  # what cannot be JSON goes as its text
            self._channel.tell("line", line | {"fields": {"fields": ascii(fields)}})


def make_context(lease: Lease, channel: Channel) -> SyncContext:
    """What a handler with a parameter `ctx` is given."""
    bound, calls = log.bind(job_id=str(lease.id), task=lease.task, attempt=lease.attempt), _Calls(channel)
    return SyncContext(lease, HandlerLog(bound, calls), calls)


class _Unfit(Exception):
    """The payload or the result of a job is of no use; the cause says why."""

    def __init__(self, dead_reason: DeadReason) -> None:
        self.dead_reason = dead_reason


def perform(run: Run, channel: Channel, *, result_max_bytes: int) -> Finished:
    """Makes one attempt; never raises for anything that a handler or its module does."""
    lease = run.lease
    try:
        result = _invoke(_find(run.target), lease, channel)
        try:
            encoded = encode_result(result, max_bytes=result_max_bytes)
        except ValueError as error:
            raise _Unfit(DeadReason.RESULT_UNSTORABLE) from error
        return Finished(completion=Completion(lease.id, lease.token, encoded))
    except BaseException as error:  # noqa: BLE001  whatever a handler raises is its attempt's failure
        return _finished(lease, error, was_cancelled=channel.is_cancelled())


def _finished(lease: Lease, error: BaseException, *, was_cancelled: bool) -> Finished:
    match error:
        case Cancelled():
            return Finished()
        case asyncio.CancelledError() if was_cancelled:
            return Finished()
        case Snooze():
            return Finished(snoozing=Snoozing(lease.id, lease.token, error.delay_seconds))
        case Discard():
            return Finished(failure=failure(lease, error, dead_reason=DeadReason.NOT_RETRYABLE))
        case _Unfit():
            return Finished(failure=failure(lease, error.__cause__ or error, dead_reason=error.dead_reason))
        case _:
            return Finished(failure=failure(lease, error))


def _find(target: Target) -> Task[..., Any]:
    found: Task[..., Any] | Worker = getattr(importlib.import_module(target.module), target.attribute)
    return found.tasks[target.task] if isinstance(found, Worker) else found


def _invoke(task: Task[..., Any], lease: Lease, channel: Channel) -> Any:
    try:
        arguments = task.arguments.decode(lease.args)
    except ValueError as error:
        raise _Unfit(DeadReason.UNDECODABLE_PAYLOAD) from error
    if task.arguments.wants_context:
        arguments["ctx"] = make_context(lease, channel)
    # What the handler sets in its context variables reaches no later attempt.
    return contextvars.copy_context().run(_call, partial(task.handler, **arguments), channel)


def _call(handler: Callable[[], Any], channel: Channel) -> Any:
    result = handler()
    return asyncio.run(_await(result, channel)) if inspect.isawaitable(result) else result


async def _await(handler: Awaitable[Any], channel: Channel) -> Any:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def stop() -> None:
        with suppress(RuntimeError):  # the loop is closed: the handler has ended by itself
            loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]

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


def _ignore_signals(connection: socket.socket) -> None:
    """Only the worker decides; a service manager signals every process while the worker still drains."""
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}

    def leave_alone() -> None:
        connection.close()
        for number, handler in before.items():
            signal.signal(number, handler)

    # What a handler forks is to end when it is told so, and neither speaks for the handler nor keeps the socket open.
    os.register_at_fork(after_in_child=leave_alone)


def main() -> None:
    """Makes attempts until the worker is gone, or wants this process gone. The argument is the pipe's descriptor."""
    _die_with(int(sys.argv.pop()))
    connection = _take_over_standard_streams()
    _ignore_signals(connection)
    _go_before_the_worker()
    faulthandler.enable()
    with suppress(EOFError, OSError):
        _serve(Wire(connection))


def _serve(wire: Wire) -> None:
    launch = wire.receive()
    if not isinstance(launch, Launch):
        raise TypeError(f"the worker began with {type(launch).__name__}")
    sys.path[:] = launch.sys_path
    configure_logging(Settings(log_format=launch.log_format, log_level=launch.log_level))
    runs: SimpleQueue[tuple[Run, Channel] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(wire, runs), name="clarion-worker", daemon=True).start()
    wire.send(Ready())
    while (next_run := runs.get()) is not None:
        run, channel = next_run
        channel.finish(perform(run, channel, result_max_bytes=launch.result_max_bytes))


if __name__ == "__main__":
    main()
