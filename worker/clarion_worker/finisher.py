"""Records outcomes: coalesced into sets, repeated through any weather, fenced by the token.

Nearly always the first call for an outcome is its last, so nobody waits for it: `record` posts it, and what came of a
whole set is told together, by the one loop of `Finisher.run`. Only an outcome that meets weather, or that a handler has
recorded itself, gets a task, in which it is said again until Postgres has answered.
"""

import math
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from uuid import UUID

import anyio
import structlog

from clarion.db import Locked
from clarion.endings import Ending, Endings, unstorable
from clarion.errors import ClarionError, Unavailable, Unstorable
from clarion.events import Event
from clarion.execution import Completed, Completion, Ended, Failure, Lease, Release
from clarion.job import JobState
from clarion.log import written_together
from clarion.loops import Signal, backoff_seconds
from clarion_worker.leases import Held
from clarion_worker.runner import Outcome

log = structlog.get_logger()


# Looks, after a handler has finished its job in a transaction of its own, whether that was committed: states by token.
Confirm = Callable[[Sequence[Release]], Awaitable[Mapping[UUID, str]]]
# Is told the job's state after an outcome was committed; None when the lease was lost, and the outcome dropped.
Recorded = Callable[[Held, Outcome, str | None], None]

# A handler that used complete_in and left its transaction open keeps its lease no longer than this.
_LEFT_OPEN_SECONDS = 10.0


class _Answered(NamedTuple):
    """What came of the first call for an outcome; neither answer nor error: there was none."""

    held: Held
    outcome: Outcome
    answer: Completed | Ended | None = None
    error: BaseException | None = None


class Finisher:
    """Says what became of attempts. A finished result is kept, and said again, until Postgres has answered.

    `recorded` is told when it has; without `run` nobody is.
    """

    def __init__(self, endings: Endings, confirm: Confirm, recorded: Recorded = lambda *_: None) -> None:
        self._endings = endings
        self._confirm = confirm
        self._recorded = recorded
        self._answered: deque[_Answered] = deque()
        self._look = Signal()

    def record(self, held: Held, outcome: Outcome) -> None:
        """Sees to it that an outcome is recorded, and told to `recorded`."""
        if outcome is None and not held.committing:
            self._recorded(held, None, None)
        elif outcome is None or held.committing or not self._endings.batching:
            self._note(_Answered(held, outcome))
        else:
            self._post(held, outcome)

    async def run(self) -> None:
        """Tells what was recorded until it is cancelled."""
        async with anyio.create_task_group() as patient:
            while True:
                await self._look.wait()
                with written_together():
                    while self._answered:
                        answered = self._answered.popleft()
                        if answered.answer is not None:
                            self._recorded(answered.held, answered.outcome, answered.answer.state)
                        elif answered.error is None or isinstance(answered.error, ClarionError):
                            patient.start_soon(self._finish, answered.held, answered.outcome, answered.error)
                        else:
                            raise answered.error

    def _post(self, held: Held, outcome: Ending) -> None:
        try:
            answered = self._endings.post(outcome)
        except Unavailable as error:
            self._note(_Answered(held, outcome, error=error))
        else:
            answered.add_done_callback(partial(self._note_answer, held, outcome))

    def _note_answer(self, held: Held, outcome: Ending, answered: Future[Completed] | Future[Ended]) -> None:
        error = answered.exception()
        self._note(_Answered(held, outcome, None if error else answered.result(), error))

    def _note(self, answered: _Answered) -> None:
        self._answered.append(answered)
        self._look.set()

    async def _finish(self, held: Held, outcome: Outcome, error: ClarionError | None) -> None:
        """Records an outcome however long that takes; `error` is what came of the first call for it."""
        if held.committing:
            state = await self.confirm(held.lease, outcome)
        else:
            state = None if outcome is None else await self.finish(outcome, error)
        self._recorded(held, outcome, state)

    async def finish(self, outcome: Ending, error: ClarionError | None = None) -> str | None:
        """The job's state after the outcome is committed; None when the lease was lost, and the outcome dropped.

        With an error this is not the first call: that one came to it.
        """
        return await self._say(outcome, self._submit, error=error)

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
        error: ClarionError | None = None,
        give_up_at: float = math.inf,
    ) -> str | None:
        """Says it until there is an answer; gives up at `give_up_at` on a row that somebody keeps locked."""
        failures, substituted = 0, False
        while True:
            if error is None:
                try:
                    return await submit(outcome)
                except ClarionError as met:
                    error = met
            if isinstance(error, Unstorable) and not substituted:
                outcome, substituted = unstorable(outcome, str(error)), True
            elif isinstance(error, Unavailable) and not (
                isinstance(error, Locked) and anyio.current_time() >= give_up_at
            ):
                failures += 1
                if failures == 1:
                    log.warning(Event.OUTCOME_RETRIED, job_id=str(outcome.id), error=str(error))
                await anyio.sleep(backoff_seconds(failures))
            elif isinstance(error, Unavailable | Unstorable):
                # The lease runs out, and the reaper deals with the row; or the transaction that locks it ends.
                log.warning(Event.OUTCOME_ABANDONED, job_id=str(outcome.id), error=str(error))
                return None
            else:
                raise error
            error = None

    async def _submit(self, outcome: Ending) -> str | None:
        if isinstance(outcome, Completion):
            return (await self._endings.complete(outcome)).state
        return (await self._endings.end(outcome)).state
