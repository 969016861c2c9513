"""Records outcomes: coalesced into sets, repeated through any weather, fenced by the token."""

import anyio
import structlog

from clarion.endings import Ending, Endings, unstorable
from clarion.errors import Unavailable, Unstorable
from clarion.events import Event
from clarion.execution import Completion
from clarion.loops import backoff_seconds

log = structlog.get_logger()


class Finisher:
    """Says what became of attempts. A finished result is kept, and said again, until Postgres has answered."""

    def __init__(self, endings: Endings) -> None:
        self._endings = endings

    async def finish(self, outcome: Ending) -> str | None:
        """The job's state after the outcome is committed; None when the lease was lost, and the outcome dropped."""
        failures, substituted = 0, False
        while True:
            try:
                return await self._submit(outcome)
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
