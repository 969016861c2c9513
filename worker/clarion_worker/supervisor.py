"""Several worker processes as one: starts them, hands them a signal, replaces those that die, tells how they are.

The supervisor runs no handler, imports none and has no connection to Postgres: nothing that ends a worker ends it. Each
process leads a session of its own, so that one Ctrl-C is one signal; only the supervisor's counts. Each ends with the
supervisor, however that ends, by the end of a pipe (`pulse.die_with_supervisor`).

The first process is started alone, and the others when it has started. What keeps a worker from starting (a module that
does not import, a schema that is too old) is said once and ends the command, as it does where there is one process.
Once any has started, the same is no more than one process's bad luck: the others go on, and it is tried again.

A process has drained when it said that it drains, or was told to, and then ended well. One that only ended well was
ended by a handler that called `os._exit(0)`, and is replaced like any that dies.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack, suppress

import anyio
import msgspec
import structlog
from anyio.abc import Process

from clarion.events import Event
from clarion.loops import jittered
from clarion.probes import ProcessHealth, ProcessState, Vitals, WatchedProcess
from clarion.settings import Settings
from clarion.signals import until
from clarion_worker.pulse import Hearing

log = structlog.get_logger()

# A process that lived for longer is replaced at once; one that dies sooner, again and again, later and later.
_STEADY_SECONDS = 30.0
_RESTART_FIRST_SECONDS = 0.1
_RESTART_CAP_SECONDS = 30.0
_EXIT_FAILED = 1
# For so long at most an orphan that has ended keeps its process id.
_REAP_SECONDS = 1.0


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How one process is started: its command line, to which the descriptor it reports to is added, and what it gets.

    `drain_max_seconds`: a process that was told to drain and lives on is killed then.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    drain_max_seconds: float


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
    """Keeps `count` processes running until `stop` is set, or until each has been drained from afar.

    `reaps_orphans`: for the first process of a container, which the kernel makes the parent of whatever its own
    children leave behind.
    """

    def __init__(
        self, launch: Launch, settings: Settings, *, count: int, stop: anyio.Event, reaps_orphans: bool = False
    ) -> None:
        self._launch = launch
        self._places = [_Place(hang_after_seconds=settings.hang_after_seconds) for _ in range(count)]
        self._stop = stop
        self._exit_code = 0
        self._reaps_orphans = reaps_orphans
        self._own_pids: set[int] = set()
        self._spawning = anyio.Lock()  # held while a child may live whose id is not among these

    async def run(self) -> int:
        """Returns when no process lives any more: 0 if all have drained, else why not."""
        log.info(Event.SUPERVISOR_STARTED, pid=os.getpid(), processes=len(self._places))
        first, *others = self._places
        async with anyio.create_task_group() as background:
            if self._reaps_orphans:
                background.start_soon(self._reap)
            async with anyio.create_task_group() as group:
                group.start_soon(self._keep, first)
                await first.settled.wait()
                for place in others:
                    group.start_soon(self._keep, place)
            background.cancel_scope.cancel()
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
            place.early_deaths = place.early_deaths + 1 if time.monotonic() - began < _STEADY_SECONDS else 0
            pause_seconds = restart_seconds(place.early_deaths)
            log.warning(
                Event.WORKER_CHILD_EXITED, pid=place.pid, cause=_cause(code), restart_seconds=round(pause_seconds, 2)
            )
            async with until(self._stop):
                await anyio.sleep(pause_seconds)
            place.restarts += 1
        place.settled.set()

    def _is_last(self, place: _Place, code: int | None) -> bool:
        """Whether the place stays empty after its process has ended so; notes what the whole will exit with."""
        if self._has_drained(place, code):
            return True
        if self._stop.is_set():
            # One that had not installed its signal handlers had nothing to drain either.
            if code and not (code == -signal.SIGTERM and place.is_starting()):
                self._fail(place, code)
            return True
        if code is None or code < 0 or any(place.health().started for place in self._places):
            return False
        # Until one has started, no other runs: whatever it fails with, and has said itself, keeps all from starting.
        self._exit_code = code
        if code == 0:
            self._fail(place, code)
        self._stop.set()
        return True

    def _has_drained(self, place: _Place, code: int | None) -> bool:
        """Whether the end of its process is one that somebody asked for, here or from afar."""
        return code == 0 and (self._stop.is_set() or place.vitals.state is ProcessState.DRAINING)

    def _fail(self, place: _Place, code: int) -> None:
        """Notes that not all went well, and says what ended so."""
        self._exit_code = self._exit_code or _EXIT_FAILED
        log.warning(Event.WORKER_CHILD_EXITED, pid=place.pid, cause=_cause(code))

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
                self._own_pids.discard(process.pid)
                group.cancel_scope.cancel()
            hearing.take()
            if not self._has_drained(place, code):
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
            async with self._spawning:
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
                self._own_pids.add(process.pid)
        place.pid = process.pid
        return process, Hearing(reports, place.hear)

    async def _reap(self) -> None:
        """Lets go of orphans that have ended, and leaves our own processes to those who wait for them."""
        while True:
            await anyio.sleep(_REAP_SECONDS)
            async with self._spawning:
                _reap_all_but(self._own_pids)

    async def _end_when_stopped(self, process: Process) -> None:
        await self._stop.wait()
        with suppress(ProcessLookupError):
            process.terminate()
        await anyio.sleep(self._launch.drain_max_seconds)
        _kill_group(process)


def restart_seconds(early_deaths: int) -> float:
    """The pause after so many early deaths in a row: none after a long life, else doubling to half a minute, ±20 %."""
    if not early_deaths:
        return 0
    wait: float = min(_RESTART_CAP_SECONDS, _RESTART_FIRST_SECONDS * 2 ** min(early_deaths - 1, 10))
    return jittered(wait)


def _reap_all_but(own_pids: Set[int]) -> None:
    while (pid := _ended_child()) is not None and pid not in own_pids:
        os.waitid(os.P_PID, pid, os.WEXITED)


def _ended_child() -> int | None:
    """The id of a child that has ended and that nobody has waited for yet; it may still be waited for."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none, living or dead
        return None
    return found.si_pid if found else None


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
