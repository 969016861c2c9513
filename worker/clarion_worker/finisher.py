"""Records outcomes: coalesced into sets, repeated through any weather, fenced by the token."""

from collections.abc import Sequence

import anyio
import structlog
from anyio.abc import TaskGroup

from clarion.batcher import Batcher
from clarion.errors import Unavailable, Unstorable
from clarion.events import Event
from clarion.job import Completion, DeadReason, Failure, JobState, Release, Snoozing
from clarion.loops import backoff_seconds
from clarion.store import Store
from clarion.wake import Ringer

log = structlog.get_logger()

_BATCH_MAX = 500


class Finisher:
    """Says what became of attempts. A finished result is kept, and said again, until Postgres has answered."""

    def __init__(self, store: Store, ringer: Ringer, *, buffer_max: int) -> None:
        self._store = store
        self._ringer = ringer
        limits = {"batch_max": _BATCH_MAX, "buffer_max": buffer_max}
        self._completions: Batcher[Completion, bool] = Batcher(store.complete_jobs, **limits)
        self._failures: Batcher[Failure, str | None] = Batcher(self._fail, **limits)
        self._snoozings: Batcher[Snoozing, bool] = Batcher(self._snooze, **limits)
        self._releases: Batcher[Release, bool] = Batcher(self._release, **limits)

    def start(self, group: TaskGroup) -> None:
        """Starts to flush, in the given group."""
        group.start_soon(self._completions.run)
        group.start_soon(self._failures.run)
        group.start_soon(self._snoozings.run)
        group.start_soon(self._releases.run)

    async def finish(self, outcome: Completion | Failure | Snoozing | Release) -> str | None:
        """The job's state after the outcome is committed; None when the lease was lost, and the outcome dropped."""
        failures, substituted = 0, False
        while True:
            try:
                return await self._submit(outcome)
            except Unstorable as error:
                if substituted:
                    log.warning(Event.OUTCOME_ABANDONED, job_id=str(outcome.id), error=str(error))
                    return None  # the lease runs out, and the reaper deals with the row
                outcome, substituted = _unstorable(outcome, error), True
            except Unavailable as error:
                failures += 1
                if failures == 1:
                    log.warning(Event.OUTCOME_RETRIED, job_id=str(outcome.id), error=str(error))
                await anyio.sleep(backoff_seconds(failures))

    async def _submit(self, outcome: Completion | Failure | Snoozing | Release) -> str | None:
        match outcome:
            case Completion():
                return JobState.SUCCEEDED if await self._completions.submit(outcome) else None
            case Failure():
                return await self._failures.submit(outcome)
            case Snoozing():
                return JobState.SCHEDULED if await self._snoozings.submit(outcome) else None
            case Release():
                return JobState.READY if await self._releases.submit(outcome) else None

    async def _fail(self, failures: Sequence[Failure]) -> list[str | None]:
        states = await self._store.fail_jobs(failures)
        self._ringer.mark({}, scheduled=JobState.SCHEDULED in states)
        return states

    async def _snooze(self, snoozings: Sequence[Snoozing]) -> list[bool]:
        answers = await self._store.snooze_jobs(snoozings)
        self._ringer.mark({}, scheduled=any(answers))
        return answers

    async def _release(self, releases: Sequence[Release]) -> list[bool]:
        answers, ready = await self._store.release_jobs(releases)
        self._ringer.mark(ready)
        return answers


def _unstorable(outcome: Completion | Failure | Snoozing | Release, error: Unstorable) -> Failure:
    """What is recorded instead of an outcome that Postgres refuses; itself of plain ASCII, so that it is taken."""
    return Failure(
        id=outcome.id,
        token=outcome.token,
        error_type="Unstorable",
        error_message=ascii(str(error))[:1000],
        dead_reason=DeadReason.RESULT_UNSTORABLE,
    )
