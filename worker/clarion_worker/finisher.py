"""Records outcomes: coalesced into sets, repeated through any weather, fenced by the token."""

from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

import anyio
import structlog

from clarion.endings import Ending, Endings, unstorable
from clarion.errors import Unavailable, Unstorable
from clarion.events import Event
from clarion.execution import Completion, Failure, Lease, Release
from clarion.job import JobState
from clarion.loops import backoff_seconds

log = structlog.get_logger()


# Looks, after a handler has finished its job in a transaction of its own, whether that was committed.
Confirm = Callable[[Sequence[Release]], Awaitable[set[UUID]]]


class Finisher:
    """Says what became of attempts. A finished result is kept, and said again, until Postgres has answered."""

    def __init__(self, endings: Endings, confirm: Confirm) -> None:
        self._endings = endings
        self._confirm = confirm

    async def finish(self, outcome: Ending) -> str | None:
        """The job's state after the outcome is committed; None when the lease was lost, and the outcome dropped."""
        return await self._say(outcome, self._submit)

    async def confirm(self, lease: Lease, otherwise: Ending | None) -> str | None:
        """The same for a handler that used `complete_in`: succeeded, if its transaction was committed.

        If it was not, the attempt failed, whatever the handler returned: its effects are gone with its transaction.
        """
        if isinstance(otherwise, Completion):
            otherwise = Failure(
                id=lease.id,
                token=lease.token,
                error_type="TransactionRolledBack",
                error_message="the handler used complete_in, and its transaction was not committed",
            )

        async def look(_outcome: Ending) -> str | None:
            if await self._confirm([Release(lease.id, lease.token)]):
                return JobState.SUCCEEDED
            return None if otherwise is None else await self._submit(otherwise)

        return await self._say(otherwise or Release(lease.id, lease.token), look)

    async def _say(self, outcome: Ending, submit: Callable[[Ending], Awaitable[str | None]]) -> str | None:
        failures, substituted = 0, False
        while True:
            try:
                return await submit(outcome)
            except Unstorable as error:
                if substituted:
                    log.warning(Event.OUTCOME_ABANDONED, job_id=str(outcome.id), error=str(error))
                    return None  # the lease runs out, and the reaper deals with the row
                outcome, substituted = unstorable(outcome, str(error)), True
            except Unavailable as error:
                failures += 1
                if failures == 1:
                    log.warning(Event.OUTCOME_RETRIED, job_id=str(outcome.id), error=str(error))
                await anyio.sleep(backoff_seconds(failures))

    async def _submit(self, outcome: Ending) -> str | None:
        if isinstance(outcome, Completion):
            return (await self._endings.complete(outcome)).state
        return (await self._endings.end(outcome)).state
