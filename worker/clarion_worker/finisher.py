"""Records outcomes: coalesced into sets, repeated through any weather, fenced by the token."""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from uuid import UUID

import anyio
import structlog

from clarion.db import Locked
from clarion.endings import Ending, Endings, unstorable
from clarion.errors import Unavailable, Unstorable
from clarion.events import Event
from clarion.execution import Completion, Failure, Lease, Release
from clarion.job import JobState
from clarion.loops import backoff_seconds

log = structlog.get_logger()


# Looks, after a handler has finished its job in a transaction of its own, whether that was committed: states by token.
Confirm = Callable[[Sequence[Release]], Awaitable[Mapping[UUID, str]]]


# A handler that used complete_in and left its transaction open keeps its slot no longer than this.
_LEFT_OPEN_SECONDS = 10.0


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

        async def look(outcome: Ending) -> str | None:
            endings = await self._confirm([Release(lease.id, lease.token)])
            if endings.get(lease.token) == JobState.SUCCEEDED:
                return JobState.SUCCEEDED
            return None if otherwise is None else await self._submit(outcome)

        give_up_at = anyio.current_time() + _LEFT_OPEN_SECONDS
        return await self._say(otherwise or Release(lease.id, lease.token), look, give_up_at=give_up_at)

    async def _say(
        self,
        outcome: Ending,
        submit: Callable[[Ending], Awaitable[str | None]],
        *,
        give_up_at: float = math.inf,
    ) -> str | None:
        """Says it until there is an answer; gives up at `give_up_at` on a row that somebody keeps locked."""
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
                if isinstance(error, Locked) and anyio.current_time() >= give_up_at:
                    log.warning(Event.OUTCOME_ABANDONED, job_id=str(outcome.id), error=str(error))
                    return None  # when the transaction ends, so does the lease, or the job
                failures += 1
                if failures == 1:
                    log.warning(Event.OUTCOME_RETRIED, job_id=str(outcome.id), error=str(error))
                await anyio.sleep(backoff_seconds(failures))

    async def _submit(self, outcome: Ending) -> str | None:
        if isinstance(outcome, Completion):
            return (await self._endings.complete(outcome)).state
        return (await self._endings.end(outcome)).state
