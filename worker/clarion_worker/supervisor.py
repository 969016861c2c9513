"""Several worker processes as one: starts them, hands them a signal, replaces those that die, tells how they are.

The supervisor runs no handler, imports none and has no connection to Postgres: nothing that ends a worker ends it. Each
process leads a session of its own, so that one Ctrl-C is one signal; only the supervisor's counts. Each ends with the
supervisor, however that ends, by the end of a pipe (`pulse.die_with_supervisor`).

The first process is started alone, and the others when it has started. What keeps a worker from starting (a module that
does not import, a schema that is too old) is said once and ends the command, as it does where there is one process.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

import anyio
import msgspec
import structlog
from anyio.abc import Process

from clarion.events import Event
from clarion.loops import backoff_seconds
from clarion.probes import ProcessHealth, ProcessState, Vitals, WatchedProcess
from clarion.settings import Settings
from clarion.signals import until
from clarion_worker.pulse import Hearing

log = structlog.get_logger()

# A process that lived for longer is replaced at once; one that dies sooner, again and again, later and later.
_STEADY_SECONDS = 30.0
_EXIT_FAILED = 1


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How one process is started: its command line, to which the descriptor it reports to is added, and what it gets.

    `drain_max_seconds`: a process that was told to drain and lives on is killed then. `exit_refused`: the code with
    which a process says that starting it again is of no use.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    drain_max_seconds: float
    exit_refused: int


class _Place(WatchedProcess):
    """One of the places that are kept filled."""

    def __init__(self, *, hang_after_seconds: float) -> None:
        super().__init__(hang_after_seconds=hang_after_seconds)
        self.settled = anyio.Event()  # it has started, or nobody will
        self.early_deaths = 0

    def hear(self, vitals: Vitals) -> None:
        """Notes what the process says."""
        super().hear(vitals)
        if vitals.state is ProcessState.RUNNING:
            self.settled.set()

    def is_starting(self) -> bool:
        """Whether the process in it has not started yet."""
        return self.vitals.state is ProcessState.STARTING


class Supervisor:
    """Keeps `count` processes running until `stop` is set, or until each has been drained from afar."""

    def __init__(self, launch: Launch, settings: Settings, *, count: int, stop: anyio.Event) -> None:
        self._launch = launch
        self._places = [_Place(hang_after_seconds=settings.hang_after_seconds) for _ in range(count)]
        self._stop = stop
        self._exit_code = 0

    async def run(self) -> int:
        """Returns when no process lives any more: 0 if all have drained, else why not."""
        log.info(Event.SUPERVISOR_STARTED, pid=os.getpid(), processes=len(self._places))
        first, *others = self._places
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep, first)
            await first.settled.wait()
            for place in others:
                group.start_soon(self._keep, place)
        log.info(Event.SUPERVISOR_STOPPED, exit_code=self._exit_code)
        return self._exit_code

    def look(self) -> list[ProcessHealth]:
        """How each process is; all of them drain from the moment that the supervisor is told to stop."""
        found = [place.health() for place in self._places]
        if not self._stop.is_set():
            return found
        return [
            msgspec.structs.replace(health, state=ProcessState.DRAINING)
            if health.state in (ProcessState.STARTING, ProcessState.RUNNING)
            else health
            for health in found
        ]

    async def _keep(self, place: _Place) -> None:
        """Fills the place again and again."""
        while not self._stop.is_set():
            began = time.monotonic()
            code = await self._run_once(place)
            if self._is_last(place, code):
                place.hear(Vitals(ProcessState.DRAINED))
                break
            place.hear(Vitals(ProcessState.RESTARTING))
            pause_seconds = _pause_seconds(place, lived_seconds=time.monotonic() - began)
            log.warning(
                Event.WORKER_CHILD_EXITED, pid=place.pid, cause=_cause(code), restart_seconds=round(pause_seconds, 2)
            )
            async with until(self._stop):
                await anyio.sleep(pause_seconds)
            place.restarts += 1
        place.settled.set()

    def _is_last(self, place: _Place, code: int | None) -> bool:
        """Whether the place stays empty after its process has ended so; notes what the whole will exit with."""
        if code is None:
            return self._stop.is_set()
        if self._stop.is_set():
            # One that had not installed its signal handlers had nothing to drain either.
            if code != 0 and not (code == -signal.SIGTERM and place.is_starting()):
                self._exit_code = self._exit_code or _EXIT_FAILED
                log.warning(Event.WORKER_CHILD_EXITED, pid=place.pid, cause=_cause(code))
            return True
        # Until the first process has started, no other runs: whatever it fails with keeps all of them from starting.
        is_hopeless = code > 0 and not self._places[0].settled.is_set()
        if is_hopeless or (code == self._launch.exit_refused and place.is_starting()):
            self._exit_code = code
            self._stop.set()
            return True
        return code == 0

    async def _run_once(self, place: _Place) -> int | None:
        """One life of a process; its exit code, less than 0 for a signal, None if it could not even be started."""
        place.hear(Vitals(ProcessState.STARTING))
        with ExitStack() as held:
            try:
                process, hearing = await self._spawn(place, held)
            except OSError as error:  # no memory, no process ids left: that may pass
                log.warning(Event.STEP_FAILED, step="start a worker process", error=str(error))
                return None
            async with anyio.create_task_group() as group:
                group.start_soon(hearing.run)
                group.start_soon(self._end_when_stopped, process)
                code = await process.wait()
                group.cancel_scope.cancel()
            hearing.take()
            if code != 0:
                _kill_group(process)  # what it has started and left behind
        return code

    async def _spawn(self, place: _Place, held: ExitStack) -> tuple[Process, Hearing]:
        with ExitStack() as handed_over:
            lifeline, our_end = os.pipe()
            handed_over.callback(os.close, lifeline)
            held.callback(os.close, our_end)
            reports, their_end = os.pipe()
            handed_over.callback(os.close, their_end)
            held.callback(os.close, reports)
            with anyio.CancelScope(shield=True):
                process = await anyio.open_process(
                    [*self._launch.command, str(their_end)],
                    stdin=lifeline,
                    stdout=None,
                    stderr=None,
                    env=os.environ | dict(self._launch.environment),
                    start_new_session=True,
                    pass_fds=[their_end],
                )
        place.pid = process.pid
        return process, Hearing(reports, place.hear)

    async def _end_when_stopped(self, process: Process) -> None:
        await self._stop.wait()
        with suppress(ProcessLookupError):
            process.terminate()
        await anyio.sleep(self._launch.drain_max_seconds)
        _kill_group(process)


def _pause_seconds(place: _Place, *, lived_seconds: float) -> float:
    place.early_deaths = place.early_deaths + 1 if lived_seconds < _STEADY_SECONDS else 0
    return backoff_seconds(place.early_deaths) if place.early_deaths else 0


def _kill_group(process: Process) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _cause(code: int | None) -> str:
    if code is None:
        return "it could not be started"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
