"""The child processes of a worker, for handlers that may be killed and must not take the worker down.

Whatever a handler does there (exit, crash, eat the memory, hold the interpreter's lock) ends its own process, and with
it one attempt. A process is a fresh interpreter that imports the handler's module, makes one attempt at a time, and is
kept for the next one. It leads a session of its own: a Ctrl-C in the terminal does not reach it, and what it starts is
killed with it. `child.py` is its side, and says how it ends when the worker is killed.

A handler that is told to end and does not is killed after a grace, so none is ever stuck.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from clarion.errors import ClarionError, UsageError
from clarion.execution import Completion, Failure, Lease, Snoozing
from clarion.settings import Settings
from clarion_worker.frames import (
    EXIT_SECONDS,
    FRAME_MAX_BYTES,
    HEADER_BYTES,
    TO_WORKER,
    Answer,
    Call,
    Cancel,
    Finished,
    Launch,
    Note,
    Run,
    Target,
    ToWorker,
    body_bytes,
    frame_of,
)
from clarion_worker.registry import Task, Worker

# Answers what a handler says: its kind and its content, both up to the handler's context. A ClarionError or ValueError
# is raised in the handler as CallRefused. It runs outside the attempt's task: only the process's end interrupts it.
OnMessage = Callable[[str, object], Awaitable[object]]

_START_SECONDS = 30.0


class ProcessDied(Exception):
    """The process was gone before its handler had ended."""


class _StartError(Exception):
    """There is no process; the text says why."""


class _Attempt:
    """What a process is busy with."""

    def __init__(self, on_message: OnMessage) -> None:
        self.on_message = on_message
        self.finished: Finished | None = None
        self.ended = anyio.Event()


class _Child:
    """One process, from its start to its end."""

    def __init__(self, launch: Launch) -> None:
        self.usable = True  # for another attempt
        self._launch = launch
        self._scope = anyio.CancelScope()
        self._ready = anyio.Event()
        self._attempt: _Attempt | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._death: str | None = None
        self._held = ExitStack()

    async def run(self, run: Run, on_message: OnMessage, *, grace_seconds: float) -> Completion | Failure | Snoozing:
        """See `Processes.run`."""
        try:
            frame = frame_of(run)
        except ValueError as error:
            raise ProcessDied(f"its process could not be told what to run: {error}") from error
        await self._ready.wait()
        if self._death is not None:
            raise ProcessDied(self._death)
        attempt = self._attempt = _Attempt(on_message)
        try:
            self._writer.write(frame)
            await self._until_ended(attempt, grace_seconds)
        finally:
            self._attempt = None
            if not attempt.ended.is_set():
                self._kill()
        if attempt.finished is None:
            raise ProcessDied(self._death)
        if attempt.finished.outcome is None:
            raise asyncio.CancelledError
        return attempt.finished.outcome

    async def _until_ended(self, attempt: _Attempt, grace_seconds: float) -> None:
        try:
            await attempt.ended.wait()
        except asyncio.CancelledError:
            self._writer.write(frame_of(Cancel()))
            with anyio.move_on_after(grace_seconds, shield=True):
                await attempt.ended.wait()
            if attempt.finished is None:
                raise

    async def serve(self) -> None:
        """Starts the process, and listens to it until it has gone, or is to go."""
        try:
            with self._scope:
                await self._start()
                while (message := await self._receive()) is not None:
                    await self._hear(message)
        except _StartError as error:
            self._death = str(error)
        finally:
            self.usable = False

    async def _start(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self._spawn()
            except OSError as error:
                raise _StartError(f"the process could not be started: {error}") from error
        self._writer.write(frame_of(self._launch))
        with anyio.move_on_after(_START_SECONDS) as starting:
            await self._receive()  # that it is ready; if it has gone instead, that shows at the next
        if starting.cancelled_caught:
            raise _StartError(f"the process did not start within {_START_SECONDS:g} s")
        self._ready.set()

    async def _spawn(self) -> None:
        with ExitStack() as handed_over:
            ours, theirs = socket.socketpair()
            handed_over.callback(theirs.close)
            self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
            self._held.callback(self._writer.close)
            child_end, our_end = os.pipe()
            handed_over.callback(os.close, child_end)
            self._held.callback(os.close, our_end)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "clarion_worker.child", str(child_end)),
                stdin=theirs.fileno(),
                pass_fds=[child_end],
                start_new_session=True,
            )

    async def _receive(self) -> ToWorker | None:
        """What the process says next; None when it has gone, or says what nobody can read."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            return TO_WORKER.decode(await self._reader.readexactly(body_bytes(header)))
        except (EOFError, OSError, ValueError, RecursionError):
            return None

    async def _hear(self, message: ToWorker) -> None:
        attempt = self._attempt
        if attempt is None:
            return  # it is being killed
        match message:
            case Call():
                self._writer.write(frame_of(await _answer(attempt.on_message, message)))
            case Note():
                await _answer(attempt.on_message, message)
            case Finished():
                attempt.finished = message
                attempt.ended.set()

    async def bury(self) -> None:
        """Returns when the process has gone, with all that it left in its group."""
        cause = "the worker ended before the process had started"
        if self._process is not None:
            self._writer.close()  # which asks it to leave
            with anyio.move_on_after(EXIT_SECONDS):
                await self._process.wait()
            self._kill_group()
            cause = _cause(await self._process.wait())
        self._death = self._death or cause
        self._held.close()
        self._ready.set()
        if self._attempt is not None:
            self._attempt.ended.set()

    def _kill(self) -> None:
        """Ends the process whatever it does, and this child with it."""
        self.usable = False
        self._kill_group()
        self._scope.cancel()

    def _kill_group(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Processes:
    """At most `processes_max` processes at once; `run` waits for one when all are busy."""

    def __init__(self, group: TaskGroup, launch: Launch, *, processes_max: int, grace_seconds: float) -> None:
        self._group = group
        self._launch = launch
        self._grace_seconds = grace_seconds
        # A place is free again when its attempt has ended well, or else when its process has gone.
        self._places = anyio.Semaphore(processes_max)
        self._idle: list[_Child] = []

    async def run(self, target: Target, lease: Lease, on_message: OnMessage) -> Completion | Failure | Snoozing:
        """Makes one attempt, and answers what became of it; ProcessDied when its process died under it.

        When cancelled it asks the handler to end, and kills the process if it has not after the grace; a second
        cancellation kills at once. An outcome that comes within the grace is answered in spite of the cancellation.
        """
        await self._places.acquire()
        child = self._idle.pop() if self._idle else self._new()
        try:
            return await child.run(Run(target, lease), on_message, grace_seconds=self._grace_seconds)
        finally:
            if child.usable:
                self._idle.append(child)
                self._places.release()

    def _new(self) -> _Child:
        child = _Child(self._launch)
        self._group.start_soon(self._keep, child)
        return child

    async def _keep(self, child: _Child) -> None:
        try:
            await child.serve()
        finally:
            was_idle = child in self._idle
            if was_idle:
                self._idle.remove(child)
            with anyio.CancelScope(shield=True):
                await child.bury()
            if not was_idle:
                self._places.release()


@asynccontextmanager
async def open_processes(
    settings: Settings, *, processes_max: int, grace_seconds: float = 2.0
) -> AsyncIterator[Processes]:
    """Processes that are started when they are needed, and none of which outlives the block.

    `grace_seconds` is what a handler that was told to end has until its process is killed.
    """
    # A result has to fit into a frame, where its quotes are escaped.
    result_max_bytes = min(settings.result_max_bytes, FRAME_MAX_BYTES // 4)
    launch = Launch(sys_path=sys.path, settings=msgspec.structs.replace(settings, result_max_bytes=result_max_bytes))
    async with anyio.create_task_group() as group:
        try:
            yield Processes(group, launch, processes_max=processes_max, grace_seconds=grace_seconds)
        finally:
            group.cancel_scope.cancel()


def target_of(task: Task[..., Any]) -> Target:
    """Where a child finds the task: preferably in its handler's module, else in any that has been imported here.

    Raises UsageError for a task that no child could find.
    """
    home = task.handler.__module__
    for module in (home, *sys.modules):
        name = _global_with(task, module)
        if name is not None and module != "__main__":
            return Target(module, name, task.name)
    if home == "__main__":
        raise UsageError(
            f"task {task.name} runs in a process of its own, which cannot import the script that was started "
            "(__main__): move the handler to a module"
        )
    raise UsageError(
        f"task {task.name} runs in a process of its own, which looks for it in the module {home!r}: let it, or the "
        "Worker that has it, be a global name there"
    )


def _global_with(task: Task[..., Any], module: str) -> str | None:
    names: dict[str, object] = getattr(sys.modules.get(module), "__dict__", None) or {}
    for name, value in names.items():
        # Not isinstance: it would ask a stranger's proxy what it stands for.
        if value is task or (type(value) is Worker and value.tasks.get(task.name) is task):
            return name
    return None


async def _answer(on_message: OnMessage, message: Call | Note) -> Answer:
    try:
        return Answer(await on_message(message.kind, message.content))
    except (ClarionError, ValueError) as error:
        return Answer(error=str(error))


def _cause(returncode: int) -> str:
    if returncode >= 0:
        return f"the process of the handler ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"the process of the handler was killed by {name}"
