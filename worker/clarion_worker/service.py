"""A worker process: listen, claim, run, heartbeat, finish; and on a signal drain and leave nothing behind."""

import os
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
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
from clarion.settings import Settings
from clarion.signals import leave, until
from clarion.store import Store
from clarion.wake import Listener, Ring, Ringer
from clarion_worker.claimer import Claimer, Subscription
from clarion_worker.finisher import Finisher
from clarion_worker.leases import EndReason, Heartbeats, Held, Leases
from clarion_worker.lines import LineKeeper
from clarion_worker.processes import Processes, open_processes, target_of
from clarion_worker.registry import Lifespan, Worker
from clarion_worker.runner import CANCEL_GRACE_SECONDS, Equipment, Outcome, Runner

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
        self._send, self._receive = anyio.create_memory_object_stream[Held](settings.concurrency)
        self._targets = {name: target_of(task) for name, task in worker.tasks.items() if task.runs_in == "process"}
        self._runner: Runner | None = None

    async def run(self) -> int:
        """Works until stopped; the exit code. Raises UnsafeGround for a database that cannot keep the promises."""
        with self._send, self._receive:
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

    @asynccontextmanager
    async def _lifespans(self) -> AsyncIterator[dict[Lifespan, Any]]:
        """What the handlers share, opened before the first claim and closed after the last handler."""
        async with AsyncExitStack() as stack:
            yield {lifespan: await stack.enter_async_context(lifespan()) for lifespan in self._worker.lifespans()}

    def _processes(self) -> AbstractAsyncContextManager[Processes]:
        return open_processes(self._settings, processes_max=self._settings.concurrency)

    async def _work(self, store: Store, processes: Processes, states: Mapping[Lifespan, Any]) -> None:
        ringer = Ringer(store, self._settings)
        endings = Endings(store, ringer, buffer_max=2 * self._settings.concurrency + 100)
        finisher = Finisher(endings, store.find_endings)
        keeper = LineKeeper()
        claimer = self._claimer(store)
        heartbeats = Heartbeats(self._leases, self._settings, self._describe, on_drain=self._stop.set)
        listener = Listener(
            self._settings, on_ring=partial(self._hear, claimer, heartbeats), on_connect=claimer.look_everywhere
        )
        equipment = Equipment(
            tasks=self._worker.tasks,
            endings=endings,
            keeper=keeper,
            processes=processes,
            targets=self._targets,
            states=states,
        )
        self._runner = runner = Runner(equipment, self._leases, self._settings)
        async with anyio.create_task_group() as background:
            background.start_soon(heartbeats.run)
            background.start_soon(listener.run)
            background.start_soon(partial(run_forever, ringer.step, name="ring"))
            background.start_soon(partial(run_forever, keeper.step, name="lines"))
            endings.start(background)
            log.info(
                Event.WORKER_STARTED, worker_id=str(self.id), queues=self._queues, tasks=sorted(self._worker.tasks)
            )
            async with anyio.create_task_group() as slots:
                for _ in range(self._settings.concurrency):
                    slots.start_soon(self._slot, runner, claimer, finisher)
                await self._claim_until_stopped(claimer)
                await self._drain()
                self._send.close()
            await heartbeats.stop()
            await self._say_goodbye(store)
            background.cancel_scope.cancel()
        log.info(Event.WORKER_STOPPED, worker_id=str(self.id), stuck=self.stuck)

    def _claimer(self, store: Store) -> Claimer:
        return Claimer(
            store,
            self._settings,
            subscription=Subscription(
                worker_id=self.id,
                queues=self._queues,
                policies={name: task.policy for name, task in self._worker.tasks.items()},
            ),
            free_slots=self._free_slots,
            known_tokens=lambda: [held.lease.token for held in self._leases.all()],
            start=self._start,
        )

    def _start(self, lease: Lease, sent: float) -> None:
        self._send.send_nowait(self._leases.add(lease, sent=sent))

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

    async def _slot(self, runner: Runner, claimer: Claimer, finisher: Finisher) -> None:
        """One of the `concurrency` places in which attempts run, one after the other."""
        async for held in self._receive:
            started = time.monotonic()
            outcome = await runner.run(held)
            held.finishing = True
            if held.committing:
                state = await finisher.confirm(held.lease, outcome)
            else:
                state = None if outcome is None else await finisher.finish(outcome)
            self._leases.remove(held)
            self._stop_if_worn_out()
            claimer.slot_freed()
            _log_attempt(held.lease, outcome, state, run_seconds=time.monotonic() - started)

    def _stop_if_worn_out(self) -> None:
        """With as many handlers stuck as there are slots, the process had better be replaced."""
        if self.stuck >= self._settings.concurrency and not self._stop.is_set():
            self._exit_code = 1
            self._stop.set()

    def _free_slots(self) -> int:
        return 0 if self._stop.is_set() else self._settings.concurrency - len(self._leases)

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
                await self._leases.freed.wait()

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


def _log_attempt(lease: Lease, outcome: Outcome, state: str | None, *, run_seconds: float) -> None:
    """The canonical line of an attempt."""
    fields = {
        "job_id": str(lease.id),
        "task": lease.task,
        "queue": lease.queue,
        "attempt": lease.attempt,
        "wait_ms": round((lease.started_at - lease.run_at).total_seconds() * 1000, 1),
        "run_ms": round(run_seconds * 1000, 1),
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
