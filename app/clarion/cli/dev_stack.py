"""The parts of `clarion dev`: API and maintenance in this process, the worker in a child.

The worker is a child so that your handlers can block, crash or be reloaded without taking the API with them. It holds
the reading end of a pipe from here, and ends when that closes: even a SIGKILL of this process leaves nothing behind.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import anyio
import click
import msgspec
import structlog
from anyio.abc import Process

from clarion.cli import EXIT_USAGE
from clarion.cli.options import as_environment
from clarion.errors import UsageError
from clarion.events import Event
from clarion.loops import Signal
from clarion.main import run_maintenance, serve
from clarion.migrate import migrate
from clarion.settings import Settings
from clarion.signals import stop_on_signals, until

log = structlog.get_logger()

_RESTART_SECONDS = 1.0
# What a worker gets at Ctrl-C or a reload; its unfinished jobs are released and run again after the next start.
_DRAIN_SECONDS = 3.0
_KILL_SECONDS = _DRAIN_SECONDS + 10


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker child runs."""

    target: str | None
    queues: str
    with_demo: bool
    with_reload: bool

    def command(self) -> list[str]:
        """Its command line."""
        return [
            *(sys.executable, "-m", "clarion.cli", "worker", "--until-stdin-closes"),
            *([self.target] if self.target else []),
            *(["--demo"] if self.with_demo else []),
            *(["--queues", self.queues] if self.queues else []),
        ]


async def run_stack(settings: Settings, listening: socket.socket, options: WorkerOptions, banner: str) -> None:
    """Runs everything until a signal; then the worker drains, the API answers what it holds, and this returns."""
    async with stop_on_signals() as stop:
        async with until(stop):
            await migrate(settings)
        if stop.is_set():
            return
        async with anyio.create_task_group() as background:
            background.start_soon(run_maintenance, settings)
            async with anyio.create_task_group() as group:
                if options.target or options.with_demo:
                    group.start_soon(WorkerChild(settings, options, stop).run)
                await serve(settings, listening=listening, stop=stop, started=lambda: click.echo(banner))
            background.cancel_scope.cancel()


class WorkerChild:
    """A `clarion worker` process that is started again when it dies, or when a file changes."""

    def __init__(self, settings: Settings, options: WorkerOptions, stop: anyio.Event) -> None:
        self._options = options
        self._stop = stop
        # Watched all the time, so that a file saved while the child is being restarted counts as well.
        self._edited = Signal()
        drain = min(settings.drain_timeout_seconds, _DRAIN_SECONDS)
        self._environment = as_environment(msgspec.structs.replace(settings, drain_timeout_seconds=drain))

    async def run(self) -> None:
        """Keeps one child running until stopped; UsageError if it cannot run at all and nobody edits it."""
        async with anyio.create_task_group() as group:
            if self._options.with_reload:
                group.start_soon(_watch, self._edited)
            while not self._stop.is_set():
                await self._run_once()
            group.cancel_scope.cancel()

    async def _run_once(self) -> None:
        """One life of the child, and the pause until the next."""
        ended_from_here = anyio.Event()
        process = await anyio.open_process(
            self._options.command(),
            stdin=subprocess.PIPE,
            stdout=None,
            stderr=None,
            env=os.environ | self._environment,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the child in its turn
        )
        async with process, anyio.create_task_group() as group:
            for condition in (self._stop.wait, self._edited.wait):
                group.start_soon(_end_after, process, condition, ended_from_here)
            code = await process.wait()
            group.cancel_scope.cancel()
        if not ended_from_here.is_set():
            log.warning(Event.WORKER_CHILD_EXITED, exit_code=code)
            await self._pause(code)
        elif not self._stop.is_set():
            log.info(Event.WORKER_CHILD_RELOADED)

    async def _pause(self, code: int) -> None:
        if code == EXIT_USAGE and not self._options.with_reload:
            raise UsageError("the worker cannot run; its error stands above")
        async with until(self._stop):
            await (self._edited.wait() if self._options.with_reload else anyio.sleep(_RESTART_SECONDS))


async def _end_after(process: Process, condition: Callable[[], Awaitable[object]], ended: anyio.Event) -> None:
    """Once the condition holds, asks the process to drain, and kills it if it does not."""
    await condition()
    ended.set()
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(_KILL_SECONDS):
            await process.wait()
            return
        process.kill()


async def _watch(edited: Signal) -> None:
    """Sets the signal whenever a Python file below the current directory is written."""
    try:
        from watchfiles import PythonFilter, awatch
    except ImportError as error:
        raise UsageError("--reload needs watchfiles: pip install 'clarion-jobs[reload]'") from error
    async for _ in awatch(Path.cwd(), watch_filter=PythonFilter()):
        edited.set()
