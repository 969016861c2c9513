"""Attempts one after the other, made by the runner that a worker has, and noted as they go."""

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any
from uuid import UUID

import anyio
from msgspec import UNSET, UnsetType

from clarion.endings import Endings
from clarion.errors import UsageError
from clarion.execution import Beat, Heartbeat, Lease, LogLine
from clarion.loops import run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer
from clarion_worker.finisher import Finisher
from clarion_worker.leases import EndReason, Held, Leases
from clarion_worker.lines import LineKeeper
from clarion_worker.processes import open_processes, target_of
from clarion_worker.registry import Lifespan, Task
from clarion_worker.runner import Equipment, Outcome, Runner
from clarion_worker.testing.runs import HandlerRun, Said, describe

# By name, as a worker has them.
Tasks = Mapping[str, Task[..., Any]]

_BUFFER_MAX = 1_000


class NotedEndings(Endings):
    """Endings that note what attempts say, by their tokens."""

    def __init__(self, store: Store, settings: Settings) -> None:
        # Nobody sends what this ringer collects: there is no worker to wake.
        super().__init__(store, Ringer(store, settings), buffer_max=_BUFFER_MAX)
        self.said: defaultdict[UUID, Said] = defaultdict(Said)

    async def beat(self, beat: Beat) -> Heartbeat | None:
        """Extends a lease."""
        self.said[beat.token].beats.append(beat)
        return await super().beat(beat)

    async def log(self, lines: Sequence[LogLine]) -> Sequence[bool | None]:
        """Keeps log lines of one attempt."""
        self.said[lines[0].token].lines.extend(lines)
        return await super().log(lines)


class Attempts:
    """Makes attempts, as one slot of a worker does."""

    def __init__(self, runner: Runner, leases: Leases, endings: NotedEndings, store: Store) -> None:
        self._runner = runner
        self._leases = leases
        self._endings = endings
        self._finisher = Finisher(endings, store.find_endings)

    def hold(self, lease: Lease) -> Held:
        """Begins to hold a lease, as the claim that took it does."""
        return self._leases.add(lease, sent=monotonic())

    async def run(self, held: Held) -> tuple[Outcome, HandlerRun[Any]]:
        """One attempt up to its outcome, which is not recorded yet; the run's state is empty."""
        stuck = self._runner.stuck
        outcome = await self._outcome(held)
        said = self._endings.said.pop(held.lease.token, Said())
        return outcome, describe(held.lease, outcome, said, stuck=self._runner.stuck > stuck)

    async def _outcome(self, held: Held) -> Outcome:
        outcomes: list[Outcome] = []
        ended = anyio.Event()

        def done(held: Held, outcome: Outcome) -> None:
            self._leases.remove(held)
            outcomes.append(outcome)
            ended.set()

        self._runner.start(held, done)
        try:
            await ended.wait()
        finally:
            held.end(EndReason.DRAINED)  # of a handler that has ended, nothing
        return outcomes[0]

    async def finish(self, held: Held, outcome: Outcome) -> None:
        """Records the outcome, as a worker does."""
        if held.committing:
            await self._finisher.confirm(held.lease, outcome)
        elif outcome is not None:
            await self._finisher.finish(outcome)


@asynccontextmanager
async def open_attempts(
    tasks: Tasks, store: Store, settings: Settings, states: Mapping[Lifespan, Any]
) -> AsyncIterator[Attempts]:
    """What attempts need, with its background tasks running."""
    endings, leases, keeper = NotedEndings(store, settings), Leases(settings), LineKeeper()
    targets = {name: target_of(task) for name, task in tasks.items() if task.runs_in == "process"}
    async with open_processes(settings, processes_max=1) as processes, anyio.create_task_group() as group:
        endings.start(group)
        group.start_soon(partial(run_forever, keeper.step, name="lines"))
        equipment = Equipment(
            tasks=tasks,
            endings=endings,
            keeper=keeper,
            processes=processes,
            targets=targets,
            states=states,
        )
        runner = Runner(equipment, leases, settings)
        group.start_soon(runner.run)
        yield Attempts(runner, leases, endings, store)
        group.cancel_scope.cancel()


@asynccontextmanager
async def open_states(tasks: Tasks, state: Any | UnsetType) -> AsyncIterator[Mapping[Lifespan, Any]]:
    """What the lifespans of these tasks yield; given a state, they are not entered, and it stands for each of them."""
    lifespans = dict.fromkeys(task.lifespan for task in tasks.values() if task.lifespan is not None)
    if state is not UNSET:
        if not lifespans:
            raise UsageError("no handler would see this state: ctx.state is for tasks of a Worker with a lifespan")
        yield dict.fromkeys(lifespans, state)
        return
    async with AsyncExitStack() as stack:
        yield {lifespan: await stack.enter_async_context(lifespan()) for lifespan in lifespans}
