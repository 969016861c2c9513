"""A worker process: listen, claim, run, heartbeat, finish; and on a signal drain and leave nothing behind."""

import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import anyio
import structlog

from clarion import __version__
from clarion.db import open_database
from clarion.endings import Endings
from clarion.errors import Unavailable, UsageError
from clarion.events import Event
from clarion.execution import Failure, Lease, WorkerRecord
from clarion.ground import wait_for_ground
from clarion.loops import run_forever
from clarion.names import check_name
from clarion.probes import ProcessState, Vitals
from clarion.settings import Settings
from clarion.signals import leave, until
from clarion.store import Store
from clarion.wake import Listener, Ring, Ringer
from clarion_worker.claimer import Claimer, Slots, Subscription
from clarion_worker.finisher import Finisher
from clarion_worker.leases import EndReason, Heartbeats, Held, Leases
from clarion_worker.lines import LineKeeper
from clarion_worker.peers import Peers
from clarion_worker.processes import Processes, open_processes, target_of
from clarion_worker.registry import Lifespan, Worker
from clarion_worker.runner import CANCEL_GRACE_SECONDS, Done, Equipment, Outcome, Runner

log = structlog.get_logger()

# After the last handler has ended, its outcome gets this long to be recorded.
_LAST_WORD_SECONDS = 2.0


class WorkerService:
    """Runs the tasks of one `Worker` in this process until `stop` is set.

    Then it drains: claims no more, lets running jobs end, releases what does not, and returns.
    """

    def __init__(self, worker: Worker, settings: Settings, *, stop: anyio.Event, queues: Sequence[str] = ()) -> None:
        self.id: UUID = uuid4()
        self._worker = worker
        self._settings = settings
        self._queues = list(queues) or worker.queues()
        if not worker.tasks:
            raise UsageError("this worker has no tasks: register one with @worker.task(...)")
        for queue in self._queues:
            check_name(queue, "queue")
        self._leases = Leases(settings)
        self._stop = stop
        self._exit_code = 0
        self._targets = {name: target_of(task) for name, task in worker.tasks.items() if task.runs_in == "process"}
        self._runner: Runner | None = None
        self._claimer: Claimer | None = None
        self._listener: Listener | None = None

    async def run(self) -> int:
        """Works until stopped; the exit code. Raises UnsafeGround for a database that cannot keep the promises."""
        async with open_database(self._settings, name="worker") as database:
            store = Store(database, self._settings)
            async with until(self._stop):
                await wait_for_ground(store, self._settings)
            if not self._stop.is_set():
                async with self._lifespans() as states, self._processes() as processes:
                    await self._work(store, processes, states)
        return self._exit_code

    @property
    def stuck(self) -> int:
        """Handlers that will not end: only the end of the process ends them."""
        return 0 if self._runner is None else self._runner.stuck

    @property
    def vitals(self) -> Vitals:
        """How this process is, for whoever answers probes."""
        return Vitals(self._state(), running=len(self._leases))

    def _state(self) -> ProcessState:
        if self._stop.is_set():
            return ProcessState.DRAINING
        listening = None if self._listener is None else self._listener.is_listening
        if listening is None:
            return ProcessState.STARTING
        return ProcessState.RUNNING if listening else ProcessState.CUT_OFF

    @asynccontextmanager
    async def _lifespans(self) -> AsyncIterator[dict[Lifespan, Any]]:
        """What the handlers share, opened before the first claim and closed after the last handler."""
        async with AsyncExitStack() as stack:
            yield {lifespan: await stack.enter_async_context(lifespan()) for lifespan in self._worker.lifespans()}

    def _processes(self) -> AbstractAsyncContextManager[Processes]:
        return open_processes(self._settings, processes_max=self._settings.concurrency)

    async def _work(self, store: Store, processes: Processes, states: Mapping[Lifespan, Any]) -> None:
        ringer = Ringer(store, self._settings)
        endings = Endings(
            store, ringer, buffer_max=2 * self._settings.concurrency + 100, batch_max=self._settings.batch_max
        )
        keeper = LineKeeper()
        runner = Runner(
            self._equipment(endings, keeper, processes, states), self._leases, self._settings, self._slot_freed
        )
        finisher = Finisher(endings, store.find_endings, self._recorded)
        self._runner = runner
        peers = Peers(ringer, self._settings)
        self._claimer = claimer = self._open_claimer(store, peers, partial(self._start, runner, finisher.record))
        heartbeats = Heartbeats(
            self._leases, self._settings, self._describe, on_drain=self._stop.set, on_standings=peers.learn
        )
        self._listener = listener = Listener(
            self._settings, on_ring=partial(self._hear, claimer, heartbeats), on_connect=claimer.look_everywhere
        )
        async with anyio.create_task_group() as background:
            background.start_soon(heartbeats.run)
            background.start_soon(listener.run)
            background.start_soon(runner.run)
            background.start_soon(finisher.run)
            background.start_soon(partial(run_forever, ringer.step, name="ring"))
            background.start_soon(partial(run_forever, keeper.step, name="lines"))
            endings.start(background)
            log.info(
                Event.WORKER_STARTED, worker_id=str(self.id), queues=self._queues, tasks=sorted(self._worker.tasks)
            )
            await self._claim_until_stopped(claimer)
            heartbeats.hurry()  # it drains: no ring is to mean it any more
            await self._drain()
            await heartbeats.stop()
            await self._say_goodbye(store)
            background.cancel_scope.cancel()
        log.info(Event.WORKER_STOPPED, worker_id=str(self.id), stuck=self.stuck)

    def _equipment(
        self, endings: Endings, keeper: LineKeeper, processes: Processes, states: Mapping[Lifespan, Any]
    ) -> Equipment:
        return Equipment(
            tasks=self._worker.tasks,
            endings=endings,
            keeper=keeper,
            processes=processes,
            targets=self._targets,
            states=states,
        )

    def _open_claimer(self, store: Store, peers: Peers, start: Callable[[Lease, float], None]) -> Claimer:
        return Claimer(
            store,
            self._settings,
            subscription=Subscription(
                worker_id=self.id,
                queues=self._queues,
                policies={name: task.policy for name, task in self._worker.tasks.items()},
            ),
            slots=Slots(
                free=self._free_slots,
                known_tokens=lambda: [held.lease.token for held in self._leases.all()],
                start=start,
            ),
            peers=peers,
        )

    def _start(self, runner: Runner, done: Done, lease: Lease, sent: float) -> None:
        runner.start(self._leases.add(lease, sent=sent), done)

    def _slot_freed(self) -> None:
        """An attempt has ended: its slot takes the next job while the outcome is recorded."""
        self._stop_if_worn_out()
        self._refill()

    def _recorded(self, held: Held, outcome: Outcome, state: str | None) -> None:
        self._leases.remove(held)
        self._refill()
        _log_attempt(held, outcome, state)

    def _refill(self) -> None:
        if self._claimer is not None:
            self._claimer.slot_freed()

    async def _claim_until_stopped(self, claimer: Claimer) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(run_forever, claimer.step, name="claim", wake=claimer.wake))
            await self._stop.wait()
            claimer.hurry()
            group.cancel_scope.cancel()

    def _hear(self, claimer: Claimer, heartbeats: Heartbeats, ring: Ring) -> None:
        claimer.hear(ring)
        if ring.cancelled and not {held.lease.id for held in self._leases.all()}.isdisjoint(ring.cancelled):
            heartbeats.hurry()

    def _stop_if_worn_out(self) -> None:
        """With as many handlers stuck as there are slots, the process had better be replaced."""
        if self.stuck >= self._settings.concurrency and not self._stop.is_set():
            self._exit_code = 1
            self._stop.set()

    def _free_slots(self) -> int:
        """As many as handlers may begin; outcomes that wait for the database hold no slot, up to as many again."""
        if self._stop.is_set():
            return 0
        concurrency = self._settings.concurrency
        return min(concurrency - self._leases.running, 2 * concurrency - len(self._leases))

    async def _drain(self) -> None:
        log.info(Event.WORKER_DRAIN_STARTED, worker_id=str(self.id), running=len(self._leases))
        await self._wait_until_idle(self._settings.drain_timeout_seconds)
        for held in self._leases.all():
            held.end(EndReason.DRAINED)
        await self._wait_until_idle(CANCEL_GRACE_SECONDS + _LAST_WORD_SECONDS)
        if silent := self._leases.all():
            # Their outcomes are known, and the database does not answer: it takes them back when the leases run out.
            jobs = [{"job_id": str(held.lease.id), "task": held.lease.task} for held in silent]
            log.warning(Event.OUTCOME_ABANDONED, worker_id=str(self.id), jobs=jobs)
            leave(self._exit_code)

    async def _wait_until_idle(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while len(self._leases):
                await self._leases.emptied.wait()

    async def _say_goodbye(self, store: Store) -> None:
        with anyio.move_on_after(1):
            try:
                await store.remove_worker(self.id)
            except Unavailable:
                return  # its row is pruned in time

    def _describe(self) -> WorkerRecord:
        return WorkerRecord(
            id=self.id,
            name=f"{socket.gethostname()}:{os.getpid()}",
            version=__version__,
            queues=self._queues,
            tasks=sorted(self._worker.tasks),
            concurrency=self._settings.concurrency,
            running=len(self._leases),
            state="draining" if self._stop.is_set() else "running",
        )


def _log_attempt(held: Held, outcome: Outcome, state: str | None) -> None:
    """The canonical line of an attempt."""
    lease, went_well = held.lease, state is not None and not isinstance(outcome, Failure)
    if went_well and not log.is_enabled_for(logging.INFO):
        return
    fields = {
        "job_id": str(lease.id),
        "task": lease.task,
        "queue": lease.queue,
        "attempt": lease.attempt,
        "wait_ms": round((lease.started_at - lease.run_at).total_seconds() * 1000, 1),
        "run_ms": round(held.ran_seconds * 1000, 1),
    }
    if state is None:
        log.warning(Event.LEASE_LOST, **fields)
    elif isinstance(outcome, Failure):
        log.warning(
            Event.ATTEMPT_FINISHED,
            **fields,
            state=state,
            error_type=outcome.error_type,
            error=outcome.error_message,
        )
    else:
        log.info(Event.ATTEMPT_FINISHED, **fields, state=state)
