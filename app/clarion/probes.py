"""What is known of the processes of a worker, and what the probes make of it; `api/health_port` says it over HTTP.

Whoever answers for a process is told by its event loop, every second, how it is. When nothing is heard for
`hang_after_seconds`, its loop stands still and it is hung: the same measure by which its heartbeats stop. A process
that is starting may be silent for longer, since the import of a module may take any time.
"""

import time
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec


class ProcessState(StrEnum):
    """What one process is up to; the first four are what it says itself.

    `CUT_OFF`: it lives and runs what it has, but hears nothing from the database.
    """

    STARTING = "starting"
    RUNNING = "running"
    CUT_OFF = "cut off from the database"
    DRAINING = "draining"
    HUNG = "hung"
    RESTARTING = "restarting"
    DRAINED = "drained"


_AT_WORK = {ProcessState.RUNNING, ProcessState.CUT_OFF, ProcessState.DRAINING}


class Vitals(msgspec.Struct, frozen=True):
    """What a process says of itself: its state, and how many jobs it runs."""

    state: ProcessState
    running: int = 0


class ProcessHealth(msgspec.Struct, frozen=True):
    """What a probe shows of one process; `pid` is None before its first start."""

    pid: int | None
    state: ProcessState
    running: int
    restarts: int
    started: bool


class WatchedProcess:
    """What is known of one process, or of one after the other in its place."""

    def __init__(self, *, hang_after_seconds: float, pid: int | None = None) -> None:
        self.pid = pid
        self.restarts = 0
        self.vitals = Vitals(ProcessState.STARTING)
        self._hang_after_seconds = hang_after_seconds
        self._heard = time.monotonic()
        self._started = False

    def hear(self, vitals: Vitals) -> None:
        """Notes what the process says, or what became of it."""
        self.vitals = vitals
        self._heard = time.monotonic()
        self._started = self._started or vitals.state is ProcessState.RUNNING

    def health(self) -> ProcessHealth:
        """How it is now; safe to call from another thread."""
        state = self.vitals.state
        if state in _AT_WORK and self._silent():
            state = ProcessState.HUNG
        return ProcessHealth(self.pid, state, self.vitals.running, self.restarts, self._started)

    def _silent(self) -> bool:
        return time.monotonic() - self._heard > self._hang_after_seconds


# Every process that a port answers for, as they are now.
Look = Callable[[], Sequence[ProcessHealth]]


def live_faults(processes: Sequence[ProcessHealth]) -> list[str]:
    """Why all of it should be restarted: a process is hung, or none lives."""
    hung = [_text(process) for process in processes if process.state is ProcessState.HUNG]
    return hung or (
        []
        if any(process.state in {ProcessState.STARTING, *_AT_WORK} for process in processes)
        else ["no process lives"]
    )


def ready_faults(processes: Sequence[ProcessHealth]) -> list[str]:
    """Which processes do not claim jobs: they start, drain, hang, are cut off, or gone."""
    return [_text(process) for process in processes if process.state is not ProcessState.RUNNING]


def startup_faults(processes: Sequence[ProcessHealth]) -> list[str]:
    """Which processes have never claimed yet; once all have, it stays so."""
    return [_text(process) for process in processes if not process.started]


def _text(process: ProcessHealth) -> str:
    return f"process {process.pid or '-'} is {process.state}"
