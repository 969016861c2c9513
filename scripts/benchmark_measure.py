"""What the benchmark is made of: workloads, their sides, the figures that compare them, and CPU times from /proc."""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import msgspec

from verification import VerificationError

if TYPE_CHECKING:
    from benchmark_stack import Bench

_TICKS = os.sysconf("SC_CLK_TCK")


class SkippedError(VerificationError):
    """A workload cannot be measured here; the text says why."""


class Round(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run of a side: what was measured, by name, and the CPU seconds that a thousand of its units cost."""

    values: dict[str, float]
    postgres_cpu: float | None = None
    our_cpu: float | None = None


# Runs once, and says what it measured.
Side = Callable[[], Awaitable[Round]]
Sides = Mapping[str, Side]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What must be reached, by the ratio of ours to what stands beside it; with `of_value`, by ours itself."""

    at_least: float | None = None
    at_most: float | None = None
    of_value: bool = False

    def is_met(self, *, ratio: float | None, value: float) -> bool | None:
        """Whether it is; None where there is nothing to compare with."""
        judged = value if self.of_value else ratio
        if judged is None:
            return None
        return judged >= (self.at_least or 0) and (self.at_most is None or judged <= self.at_most)

    def __str__(self) -> str:
        sign, bound = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{sign} {bound:g}" + ("" if self.of_value else " times")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table: a value of ours, and the value of another side, or of the same one, that stands beside it.

    `ours` and `beside` are "side.value"; where several sides stand beside, the best of each round counts.
    """

    name: str
    unit: str
    ours: str
    beside: tuple[str, ...] = ()
    beside_is: str = ""
    target: Target | None = None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Sides that are run in turn, round after round, and the figures that come of them.

    `quick_rounds` and `full_rounds` are how many rounds each mode runs, unless it is told.
    """

    name: str
    what: str
    sides: "Callable[[Bench], AbstractAsyncContextManager[Sides]]"
    figures: Sequence[Figure]
    quick_rounds: int = 3
    full_rounds: int = 3
    full_only: bool = False


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a workload: the rounds of each side, or why there are none."""

    name: str
    seconds: float
    rounds: dict[str, list[Round]] = {}
    skipped: str | None = None
    failed: str | None = None


class Run(msgspec.Struct, frozen=True):
    """A whole run: where, how, and what came of it."""

    machine: dict[str, str]
    mode: str
    outcomes: list[Outcome]


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How many of what; the defaults are those of a full run."""

    drain_jobs: int = 50_000
    single_requests: int = 2_000
    crowd_requests: int = 10_000
    bulk_jobs: int = 100_000
    latency_samples: int = 200
    due_jobs: int = 10
    http_jobs: int = 3_000
    herd_workers: int = 100
    herd_requests: int = 5_000
    herd_jobs: int = 500
    backlog_scheduled: int = 1_000_000
    backlog_history: int = 1_000_000
    backlog_ready: int = 100_000
    snapshot_rounds: int = 10
    snapshot_jobs: int = 10_000
    heartbeat_jobs: int = 5_000
    heartbeat_beats: int = 10
    retention_rows: int = 1_000_000
    soak_jobs: int = 1_000_000
    concurrency_jobs: int = 20_000

    def scaled(self, factor: float) -> "Sizes":
        """The same, times a factor; never less than a handful."""
        sizes = msgspec.structs.asdict(self)
        return Sizes(**{name: max(min(size, 4), round(size * factor)) for name, size in sizes.items()})


QUICK = Sizes(
    drain_jobs=10_000,
    single_requests=150,
    crowd_requests=1_000,
    bulk_jobs=20_000,
    latency_samples=50,
    due_jobs=3,
    http_jobs=300,
    herd_requests=1_000,
    herd_jobs=80,
    backlog_scheduled=100_000,
    backlog_history=100_000,
    backlog_ready=10_000,
    snapshot_rounds=5,
    snapshot_jobs=3_000,
    heartbeat_beats=3,
    retention_rows=100_000,
    soak_jobs=20_000,
    concurrency_jobs=1_000,
)


class CpuMeter:
    """The CPU seconds that Postgres and our own processes spend from now on, with all their children."""

    def __init__(self, postgres: int | None, *ours: int) -> None:
        self._postgres = postgres
        self._ours = ours
        self._before = self._read()

    def round(self, values: dict[str, float], units: int) -> Round:
        """What was measured meanwhile, with the CPU seconds that a thousand of these units cost."""
        postgres, ours = (1000 * (now - then) / units for now, then in zip(self._read(), self._before, strict=True))
        return Round(values, postgres if self._postgres else None, ours if self._ours else None)

    def _read(self) -> tuple[float, float]:
        table = _process_table()
        return tree_cpu_seconds(table, [self._postgres] if self._postgres else []), tree_cpu_seconds(table, self._ours)


class _Process(msgspec.Struct, frozen=True):
    parent: int
    command: str
    cpu_seconds: float
    ended_children_cpu_seconds: float


def tree_cpu_seconds(table: Mapping[int, _Process], roots: Sequence[int]) -> float:
    """CPU seconds of these processes and all below them, the ended ones included that were waited for."""
    members = [table[pid] for pid in tree(table, roots)]
    return sum(process.cpu_seconds + process.ended_children_cpu_seconds for process in members)


def tree(table: Mapping[int, _Process], roots: Sequence[int]) -> list[int]:
    """These processes, as far as they live, and all below them."""
    found: list[int] = []
    layer = {pid for pid in roots if pid in table}
    while layer:
        found += layer
        layer = {pid for pid, process in table.items() if process.parent in layer}
    return found


def family(*roots: int) -> list[int]:
    """The pids of these processes and of all below them, by now."""
    return tree(_process_table(), roots)


def postmaster_of(backend: int) -> int | None:
    """The server process of a Postgres backend; None where it does not run on this machine."""
    table = _process_table()
    if backend not in table or table[backend].command != "postgres":
        return None
    return table[backend].parent


def cpu_seconds(pid: int) -> float:
    """CPU seconds of one living process of one thread, as a Postgres backend is; finer than the ticks of a tree."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9
    except OSError as error:
        raise VerificationError(f"the CPU time of process {pid} cannot be read: {error}") from error


def resident_kilobytes(pid: int) -> int:
    """The resident set of a process; 0 for one that has ended."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return 0


def _process_table() -> dict[int, _Process]:
    pids = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]
    return {pid: process for pid in pids if (process := _process(pid))}


def _process(pid: int) -> _Process | None:
    """A line of /proc; proc(5) says which field is what."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            head, _, tail = file.read().rpartition(")")
    except OSError:
        return None
    fields = tail.split()
    own, children = (int(fields[n]) + int(fields[n + 1]) for n in (11, 13))
    return _Process(int(fields[1]), head.partition("(")[2], own / _TICKS, children / _TICKS)
