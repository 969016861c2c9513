"""What keeps jobs moving when nobody asks: promote, reap, expire, partition, prune.

There is no leader. Each step is one idempotent statement that skips what another process has locked, so any number of
processes may run them at once: it costs a little, and nothing waits for an election.
"""

from collections import Counter
from functools import partial

import anyio
import structlog

from clarion.errors import Unstorable
from clarion.events import Event
from clarion.execution import Reaped, ready_by_queue
from clarion.job import JobState
from clarion.loops import Signal, jittered, run_forever
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Listener, Ring, Ringer

log = structlog.get_logger()

PARTITION_DAYS_AHEAD = 3
_PARTITION_SECONDS = 600.0
_PRUNE_SECONDS = 60.0
_WORKER_UNSEEN_SECONDS = 3600.0


class Maintenance:
    """The steps; each answers how many seconds it wants to pause."""

    def __init__(self, store: Store, ringer: Ringer, settings: Settings) -> None:
        self._store = store
        self._ringer = ringer
        self._settings = settings
        self._look = Signal()

    async def promote(self) -> float:
        """Makes due jobs ready, then sleeps to the moment the next one is due, or until a ring says it is nearer."""
        promoted = await self._store.promote_jobs()
        self._ringer.mark(promoted)
        if sum(ready.jobs for ready in promoted.values()) >= self._settings.step_max_jobs:
            return 0
        due_seconds = await self._store.next_due_seconds()
        sweep_seconds = jittered(self._settings.sweep_seconds)
        # A late job that was not promoted is locked by somebody: look again soon, not at once.
        return sweep_seconds if due_seconds is None else min(sweep_seconds, max(due_seconds, 0.01))

    async def reap(self) -> float:
        """Takes jobs back whose leases ran out."""
        try:
            reaped = await self._store.reap_jobs()
        except Unstorable:
            reaped = await self._reap_around()
        if reaped:
            self._ringer.mark(
                ready_by_queue((job.queue, job.sort_key) for job in reaped if job.state == JobState.READY),
                scheduled=any(job.state == JobState.SCHEDULED for job in reaped),
            )
            log.warning(
                Event.LEASES_EXPIRED,
                jobs=len(reaped),
                states=dict(Counter(job.state for job in reaped)),
                workers=sorted({str(job.worker_id) for job in reaped}),
                timed_out=sum(job.timed_out for job in reaped),
            )
        return 0 if len(reaped) >= self._settings.step_max_jobs else jittered(self._settings.reap_seconds)

    async def expire(self) -> float:
        """Makes jobs dead that wait past their deadlines."""
        expired = await self._store.expire_jobs()
        if expired:
            log.warning(Event.JOBS_EXPIRED, jobs=len(expired), reasons=dict(Counter(job.reason for job in expired)))
        return 0 if len(expired) >= self._settings.step_max_jobs else jittered(self._settings.reap_seconds)

    async def _reap_around(self) -> list[Reaped]:
        """Takes one row at a time, and parks the one that cannot be handled: the others must not wait for it."""
        reaped: list[Reaped] = []
        for job in await self._store.find_expired():
            try:
                reaped += await self._store.reap_jobs(only=[job.id])
            except Unstorable as error:
                if await self._store.park_jobs(job):
                    log.warning(Event.JOB_PARKED, job_id=str(job.id), error=str(error))
        return reaped

    async def partition(self) -> float:
        """Makes the history's partitions ahead of time and drops those past retention."""
        created = await self._store.create_history_partitions(days_ahead=PARTITION_DAYS_AHEAD)
        if created:
            log.info(Event.PARTITIONS_CREATED, partitions=created)
        dropped = await self._store.drop_history_partitions()
        if dropped:
            log.info(Event.PARTITIONS_DROPPED, partitions=dropped)
        return jittered(_PARTITION_SECONDS)

    async def prune(self) -> float:
        """Deletes attempts, events, log lines and keys past their time, and workers that died."""
        store = self._store
        pruned = {
            "attempts": await store.prune_attempts(),
            "events": await store.prune_events(),
            "log_lines": await store.prune_logs(),
            "idempotency_keys": await store.prune_idempotency_keys(),
        }
        if any(pruned.values()):
            log.info(Event.LEDGERS_PRUNED, **pruned)
        workers = await store.prune_workers(unseen_seconds=_WORKER_UNSEEN_SECONDS)
        if workers:
            log.info(Event.WORKERS_PRUNED, workers=workers)
        return 0 if max(pruned.values()) >= self._settings.step_max_jobs else jittered(_PRUNE_SECONDS)

    async def run(self) -> None:
        """Runs every step for ever."""
        listener = Listener(self._settings, on_ring=self._hear, on_connect=self._look.set)
        async with anyio.create_task_group() as group:
            group.start_soon(listener.run)
            group.start_soon(partial(run_forever, self.promote, name="promote", wake=self._look))
            group.start_soon(partial(run_forever, self.reap, name="reap"))
            group.start_soon(partial(run_forever, self.expire, name="expire"))
            group.start_soon(partial(run_forever, self.partition, name="partition"))
            group.start_soon(partial(run_forever, self.prune, name="prune"))

    def _hear(self, ring: Ring) -> None:
        if ring.scheduled:
            self._look.set()
