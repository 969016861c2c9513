"""What becomes of a job, by the documents alone: plain objects that tests drive beside the database, and compare.

Written from ARCHITECTURE.md (the states, what each outcome costs) and from the protocol, never from the statements:
a fault that both have was not copied. Seconds are those of a clock of the job's own, which only `pass_time` moves; a
wait that is drawn at random is a span until somebody has seen it. A call whose lease is lost is answered `LOST`.
"""

from __future__ import annotations

from typing import TypeAlias
from uuid import UUID

import msgspec

from clarion.execution import AttemptOutcome
from clarion.job import DeadReason, JobEvent, JobState

LOST = "lost"
# What the server gives a worker beyond an attempt's deadline, to report it first.
GRACE_SECONDS = 5.0

Span: TypeAlias = tuple[float, float]
Ended: TypeAlias = tuple[str, bool]  # what the job became, and whether a next run is planned
WAITING = frozenset({JobState.SCHEDULED, JobState.READY})


class Limits(msgspec.Struct, frozen=True):
    """What the settings decide for jobs that bring nothing of their own."""

    max_attempts: int = 3
    max_crashes: int = 2
    max_snoozes: int = 2
    log_max_lines: int = 3
    backoff_seconds: float = 100
    backoff_cap_seconds: float = 300


class JobModel(msgspec.Struct, kw_only=True):
    """One job; where it lives follows from its state."""

    limits: Limits
    run_at: Span
    state: JobState = JobState.READY
    now: float = 0
    max_attempts: int | None = None
    priority: int = 0
    timeout: float | None = None
    total_timeout: float | None = None
    start_by: float | None = None
    finish_by: float | None = None

    generation: int = 1
    attempt: int = 0
    errors: int = 0
    crashes: int = 0
    snoozes: int = 0
    dead_reason: DeadReason | None = None
    started_at: float | None = None
    token: UUID | None = None
    worker: UUID | None = None
    lease_ends: float = 0
    lease_seconds: float = 0
    cancel_requested: bool = False
    checkpoint: str | None = None

    completion: tuple[UUID, str | None, str | None] | None = None  # the token, the result, the call's key
    endings: dict[UUID, tuple[str, Ended]] = {}  # by token: the verb of its worker, and what it was answered
    attempts: list[tuple[AttemptOutcome, JobState]] = []  # those that did not succeed
    events: list[JobEvent] = []
    lines: dict[tuple[UUID, int], bool] = {}  # by token and number: whether it was kept
    earlier_lines: int = 0  # those of earlier generations

    @property
    def is_over(self) -> bool:
        """It stands in the history."""
        return self.state in {JobState.SUCCEEDED, JobState.CANCELLED}

    # -- The clock

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @property
    def is_due(self) -> bool:
        return self.run_at[1] <= self.now

    @property
    def is_too_late(self) -> bool:
        """It waits, but must not start any more."""
        return self.lateness is not None

    @property
    def lateness(self) -> DeadReason | None:
        if self.finish_by is not None and self.finish_by <= self.now:
            return DeadReason.TOTAL_TIMEOUT
        never_started = self.started_at is None and self.start_by is not None
        return DeadReason.EXPIRED if never_started and (self.start_by or 0) <= self.now else None

    @property
    def deadline(self) -> float | None:
        """Past this no lease of the attempt is extended."""
        ends = [] if self.finish_by is None else [self.finish_by]
        if self.timeout is not None and self.started_at is not None:
            ends.append(self.started_at + self.timeout)
        return min(ends) + GRACE_SECONDS if ends else None

    @property
    def has_lapsed(self) -> bool:
        """Its lease ran out."""
        return self.state == JobState.RUNNING and self.lease_ends < self.now

    def thresholds(self) -> list[float]:
        """The moments at which something about it changes by itself."""
        moments = [self.finish_by]
        if self.state == JobState.SCHEDULED:
            moments += self.run_at
        if self.state in WAITING:
            moments.append(self.start_by)
        if self.state == JobState.RUNNING:
            moments += [self.lease_ends, self.deadline]
        return [moment for moment in moments if moment is not None]

    def is_a_matter_of_chance(self) -> bool:
        """Whether there is time for another run depends on how long the backoff happens to be."""
        low, high = self.backoff(self.errors + 1)
        return self.finish_by is not None and low - 5 <= self.finish_by - self.now <= high + 5

    # -- What a lease allows

    def claim(self, worker: UUID, token: UUID, lease_seconds: float) -> None:
        self.state = JobState.RUNNING
        self.token, self.worker, self.lease_seconds = token, worker, lease_seconds
        self.started_at = self.now
        self.attempt += 1
        self._extend(lease_seconds)

    def heartbeat(self, token: UUID, lease_seconds: float | None = None, checkpoint: str | None = None) -> str:
        """`extended`, or `cancel` where somebody asked for it; then the lease is not extended any more."""
        if token != self.token:
            return LOST
        self.checkpoint = checkpoint or self.checkpoint
        if self.cancel_requested:
            return "cancel"
        self._extend(lease_seconds or self.lease_seconds)
        return "extended"

    def log(self, token: UUID, numbers: list[int]) -> list[bool | None]:
        """For each line whether it is kept; None where the lease is lost."""
        for n in numbers:
            if token == self.token and (token, n) not in self.lines:
                self.lines[token, n] = len(self.lines) - self.earlier_lines < self.limits.log_max_lines
        return [self._line(token, n) for n in numbers]

    def complete(self, token: UUID, result: str | None, key: str | None) -> tuple[bool, str | None, str | None] | str:
        """Whether it is a replay; then also the key and the result that were stored first."""
        if self.completion is not None and self.completion[0] == token:
            _, first_result, first_key = self.completion
            return True, first_key, first_result
        if token != self.token:
            return LOST
        self.completion = token, result, key
        self._leave(JobState.SUCCEEDED)
        return False, None, None

    def fail(
        self, token: UUID, outcome: AttemptOutcome, retry_in: float | None, reason: DeadReason | None
    ) -> Ended | str:
        if token != self.token:
            return self._answered(token, "fail")
        if self.cancel_requested:
            return self._end(token, "fail", outcome, JobState.CANCELLED)
        self.errors += 1
        wait = self.backoff(self.errors) if retry_in is None else (retry_in, retry_in)
        reason = reason or self._exhausted()
        if reason is None and self.finish_by is not None and self.now + wait[0] >= self.finish_by:
            reason = DeadReason.TOTAL_TIMEOUT
        return self._end(token, "fail", outcome, self._after(wait, reason))

    def snooze(self, token: UUID, delay: float) -> Ended | str:
        if token != self.token:
            return self._answered(token, "snooze")
        if self.cancel_requested:
            return self._end(token, "snooze", AttemptOutcome.SNOOZED, JobState.CANCELLED)
        reason = DeadReason.SNOOZES_EXHAUSTED if self.snoozes >= self.limits.max_snoozes else None
        self.snoozes += 1
        self.attempt -= 1
        return self._end(token, "snooze", AttemptOutcome.SNOOZED, self._after((delay, delay), reason))

    def release(self, token: UUID) -> Ended | str:
        if token != self.token:
            return self._answered(token, "release")
        if self.cancel_requested:
            return self._end(token, "release", AttemptOutcome.RELEASED, JobState.CANCELLED)
        self.attempt -= 1
        return self._end(token, "release", AttemptOutcome.RELEASED, JobState.READY)

    # -- What the maintenance does

    def promote(self) -> bool:
        if self.state != JobState.SCHEDULED or not self.is_due:
            return False
        self.state = JobState.READY
        return True

    def reap(self) -> tuple[JobState, bool] | None:
        """What it became, and whether the attempt outlived its timeout; None while its lease lasts."""
        if not self.has_lapsed:
            return None
        timed_out = self.deadline is not None and self.lease_ends >= self.deadline
        outcome = AttemptOutcome.TIMEOUT if timed_out else AttemptOutcome.LEASE_LOST
        became = JobState.CANCELLED if self.cancel_requested else self._after_loss(timed_out)
        self._end(None, "reap", outcome, became)
        return became, timed_out

    def park(self, token: UUID) -> bool:
        if token != self.token:
            return False
        self.dead_reason = DeadReason.UNPROCESSABLE
        self._leave(JobState.DEAD)
        self.events.append(JobEvent.PARKED)
        return True

    def release_unanswered(self, worker: UUID, known: frozenset[UUID]) -> bool:
        if self.worker != worker or self.token in known or self.cancel_requested:
            return False
        self.attempt -= 1
        self._end(None, "unanswered", AttemptOutcome.RELEASED, JobState.READY)
        return True

    def expire(self) -> DeadReason | None:
        if self.state not in WAITING or not self.is_too_late:
            return None
        self.dead_reason = self.lateness
        self._leave(JobState.DEAD)
        self.events.append(JobEvent.EXPIRED)
        return self.dead_reason

    # -- What people ask

    def cancel(self) -> tuple[JobState | None, bool]:
        """What it is now, None if it was over before; and whether its worker is to be told."""
        if self.is_over:
            return None, False
        if self.state != JobState.RUNNING:
            self._leave(JobState.CANCELLED)
            self.events.append(JobEvent.CANCELLED)
            return JobState.CANCELLED, False
        first, self.cancel_requested = not self.cancel_requested, True
        if first:
            self.events.append(JobEvent.CANCEL_REQUESTED)
        return JobState.RUNNING, first

    def retry(self, delay: float, *, only_dead: bool = False) -> tuple[JobState | None, bool]:
        """What it is now, None where it cannot run again; and whether it is to be rung, as all that wait after it."""
        if self.state == JobState.READY:
            return None if only_dead else JobState.READY, True
        allowed = {JobState.DEAD} if only_dead else {JobState.DEAD, JobState.CANCELLED, JobState.SCHEDULED}
        if self.state not in allowed:
            return None, False
        self.run_at = self.now + delay, self.now + delay
        if self.state != JobState.SCHEDULED:
            self._begin_anew()
        self.state = JobState.SCHEDULED if delay else JobState.READY
        self.events.append(JobEvent.RETRIED)
        return self.state, True

    def change(self, delay: float | None, priority: int | None) -> JobState | None:
        """What it is now; None where it does not wait."""
        if self.state not in WAITING:
            return None
        if delay is not None:
            self.run_at = self.now + delay, self.now + delay
        if priority is not None:
            self.priority = priority
        self.state = JobState.READY if self.is_due else JobState.SCHEDULED
        self.events.append(JobEvent.CHANGED)
        return self.state

    # -- Parts of these

    def _extend(self, lease_seconds: float) -> None:
        ends = self.now + lease_seconds
        self.lease_ends = ends if self.deadline is None else min(ends, self.deadline)

    def _line(self, token: UUID, n: int) -> bool | None:
        # Of a line beyond the limit nothing is left that an ended attempt could be answered from.
        kept = self.lines.get((token, n))
        return kept if token == self.token or kept else None

    def _answered(self, token: UUID, verb: str) -> Ended | str:
        said, answer = self.endings.get(token, ("", LOST))
        return answer if said == verb else LOST

    def _end(self, token: UUID | None, verb: str, outcome: AttemptOutcome, became: JobState) -> Ended:
        """Ends the attempt; `token` of a worker that may ask again."""
        answer = str(became), became == JobState.SCHEDULED
        # A release is the same for its worker whoever made it.
        self.attempts.append((outcome, became))
        holder = self.token
        self._leave(became)
        if became == JobState.CANCELLED:
            self.events.append(JobEvent.CANCELLED)
        if token is not None or verb == "unanswered":
            assert holder is not None
            self.endings[holder] = "release" if verb == "unanswered" else verb, answer
        return answer

    def _leave(self, state: JobState) -> None:
        self.state = state
        self.token = self.worker = None
        self.cancel_requested = False
        if self.is_over:
            self.dead_reason = None

    def _exhausted(self) -> DeadReason | None:
        most = self.max_attempts or self.limits.max_attempts
        return DeadReason.ATTEMPTS_EXHAUSTED if self.attempt >= most else None

    def _after(self, wait: Span, reason: DeadReason | None) -> JobState:
        self.dead_reason = reason
        if reason is not None:
            return JobState.DEAD
        self.run_at = self.now + wait[0], self.now + wait[1]
        return JobState.SCHEDULED

    def _after_loss(self, timed_out: bool) -> JobState:
        if timed_out:
            self.errors += 1
            overdue = self.lateness == DeadReason.TOTAL_TIMEOUT
            reason = self._exhausted() or (DeadReason.TOTAL_TIMEOUT if overdue else None)
            return self._after(self.backoff(self.errors), reason)
        self.crashes += 1
        reason = DeadReason.CRASH_LOOP if self.crashes >= self.limits.max_crashes else self._exhausted()
        if self.crashes == 1 and reason is None:
            return JobState.READY
        return self._after(self._spread(2.0 ** (self.crashes - 2)), reason)

    def backoff(self, n: int) -> Span:
        return self._spread(min(self.limits.backoff_cap_seconds, self.limits.backoff_seconds * 2 ** (n - 1)))

    def _spread(self, seconds: float) -> Span:
        return 0.8 * seconds, 1.2 * seconds

    def _begin_anew(self) -> None:
        self.generation += 1
        self.earlier_lines = len(self.lines)
        self.attempt = self.errors = self.crashes = self.snoozes = 0
        self.start_by = self.dead_reason = None
        self.finish_by = None if self.total_timeout is None else self.run_at[0] + self.total_timeout
