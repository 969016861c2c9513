"""The store against the model: calls in any order, of holders and strangers, answered, lost or undone, and made again.

Hypothesis chooses; after each step every row of every job must be what the model says, and every answer was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import model_calls as calls
from clarion.execution import AttemptOutcome
from clarion.job import DeadReason, JobState
from clarion.settings import Settings
from clarion.store import Store
from model_calls import Held, Wish
from model_meetings import Parties
from model_twins import Call, Twins, tightened

# Rows that are only ever added: what was decided and said stays.
LEDGERS = """
    select
      (select count(*) from clarion.job_history where state = 'succeeded') as succeeded,
      (select count(*) from clarion.attempts) as attempts,
      (select count(*) from clarion.job_events) as events,
      (select count(*) from clarion.job_logs) as lines
"""
FORGET_KEY = "update clarion.idempotency_keys set expires_at = now() - interval '1 s' where key = $1"

JOBS_MAX = 6
# What becomes of a call: its answer arrives; or it is lost on the way; or the server undid it all. After either of the
# last two the caller knows nothing, and makes the call again.
fates = st.sampled_from(["answered", "answered", "answered", "lost", "undone"])
picks = st.integers(0, 1000)
wishes = st.builds(
    Wish,
    delay=st.sampled_from([None, None, 100.0]),
    max_attempts=st.sampled_from([None, 1, 2]),
    timeout=st.sampled_from([None, None, 10.0]),
    start_within=st.sampled_from([None, None, 200.0]),
    total_timeout=st.sampled_from([None, None, 500.0]),
    key=st.sampled_from([None, None, "one", "two"]),
)
beats = st.one_of(
    st.builds(
        lambda lease, checkpoint: partial(calls.heartbeat, lease_seconds=lease, checkpoint=checkpoint),
        st.sampled_from([None, 60.0]),
        st.sampled_from([None, "1", "2"]),
    ),
    st.builds(
        lambda numbers: lambda held: calls.log(held, *numbers),
        st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ),
)
endings = st.one_of(
    st.builds(
        lambda outcome, retry_in, reason: partial(calls.fail, outcome=outcome, retry_in=retry_in, reason=reason),
        st.sampled_from([AttemptOutcome.FAILED, AttemptOutcome.TIMEOUT]),
        st.sampled_from([None, None, 300.0]),
        st.sampled_from([None, None, None, DeadReason.NOT_RETRYABLE]),
    ),
    st.just(calls.snooze),
    st.just(calls.release),
    st.builds(
        lambda result, key: partial(calls.complete, result=result, key=key),
        st.sampled_from([None, "1", '{"n":2}']),
        st.sampled_from([None, "key"]),
    ),
)
commands = st.one_of(
    st.just(calls.cancel),
    st.builds(lambda delay: partial(calls.retry, delay=delay), st.sampled_from([0, 0, 100])),
    st.just(partial(calls.retry, only_dead=True)),
    st.builds(
        lambda delay, priority: partial(calls.change, delay=delay, priority=priority),
        st.sampled_from([None, 0, 500]),
        st.sampled_from([None, 0, 5]),
    ),
)


class StoreMachine(RuleBasedStateMachine):
    """Some jobs, two workers, and everything that may be asked."""

    def __init__(self, portal: BlockingPortal, parties: Parties) -> None:
        super().__init__()
        self._portal = portal
        self._parties = parties
        self._twins = Twins(parties.watcher, parties.settings)
        self._workers = (uuid4(), uuid4())
        self._known: dict[UUID, set[UUID]] = {worker: set() for worker in self._workers}
        self._held: list[Held] = []  # every token that ever held a job
        self._said: list[Call] = []
        self._accepted: Counter[UUID] = Counter()
        self._ledgers: tuple[int, ...] = ()
        portal.call(self._twins.forget)

    # -- Making calls

    async def _make(self, call: Call, fate: str) -> Any:
        if fate != "answered":
            async with self._parties.first.transaction(commit=fate == "lost"):
                answer = await call.make(Store(self._parties.first, self._parties.settings))
            if fate == "lost":
                foretold = call.foretell(self._twins.world, answer)
                assert answer == foretold, f"{call.name} came to {answer}, not {foretold}"
                await self._twins.check()
        return await self._twins.tell(call)

    def _say(self, call: Call, fate: str = "answered") -> Any:
        answer = self._portal.call(self._make, call, fate)
        self._said.append(call)
        return answer

    # -- Choosing

    def _job(self, pick: int) -> UUID:
        """Mostly one that is not over."""
        jobs = self._twins.world.jobs
        live = [job_id for job_id, job in jobs.items() if job.state != JobState.SUCCEEDED]
        known = live if live and pick % 5 else list(jobs)
        return known[pick % len(known)]

    def _holding(self) -> list[Held]:
        return [held for held in self._held if self._twins.world.jobs[held.id].token == held.token]

    def _one_of(self, holders: list[Held], pick: int) -> Held:
        return holders[pick % len(holders)]

    # -- Workers

    @initialize(wishes=st.lists(wishes, min_size=2, max_size=3))
    def some_jobs_are_running(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            self._say(calls.enqueue(wish))
        self.claim(0, 3, "answered")

    @precondition(lambda self: len(self._twins.world.jobs) < JOBS_MAX)
    @rule(wish=wishes, fate=fates)
    def enqueue(self, wish: Wish, fate: str) -> None:
        self._say(calls.enqueue(wish), fate)

    @rule(pick=picks, most=st.integers(1, 3), fate=fates)
    def claim(self, pick: int, most: int, fate: str) -> None:
        worker = self._workers[pick % 2]
        self._portal.call(self._claim, worker, calls.claim(worker, most), fate)

    async def _claim(self, worker: UUID, call: Call, fate: str) -> None:
        """A claim is not made again: a worker to which the answer is lost does not know what it holds."""
        async with self._parties.first.transaction(commit=fate != "undone"):
            answer = await call.make(Store(self._parties.first, self._parties.settings))
        if fate == "undone":
            return
        foretold = call.foretell(self._twins.world, answer)
        assert answer == foretold, f"a claim took {answer} of {foretold}"
        tokens = set(answer.values())
        assert not tokens & {held.token for held in self._held}, "a token was used twice"
        # In the order of the jobs, so that the same draws always mean the same.
        self._held += [Held(job_id, answer[job_id]) for job_id in self._twins.world.jobs if job_id in answer]
        if fate == "answered":
            self._known[worker] |= tokens

    @precondition(lambda self: self._holding())
    @rule(pick=picks, what=st.one_of(beats, endings), fate=fates)
    def a_holder_calls(self, pick: int, what: Callable[[Held], Call], fate: str) -> None:
        held = self._one_of(self._holding(), pick)
        call = what(held)
        if call.name == "fail" and self._twins.world.jobs[held.id].is_a_matter_of_chance():
            call = calls.fail(held, retry_in=300)
        self._say(call, fate)
        if call.name == "complete":
            self._accepted[held.id] += 1
            assert self._accepted[held.id] == 1, "two completions of one job were accepted"

    @precondition(lambda self: self._held)
    @rule(pick=picks, what=st.one_of(beats, endings), is_stranger=st.booleans(), fate=fates)
    def one_who_does_not_hold_it_calls(
        self, pick: int, what: Callable[[Held], Call], is_stranger: bool, fate: str
    ) -> None:
        held = self._one_of(self._held, pick)
        if is_stranger or held in self._holding():
            held = Held(held.id, uuid4())
        self._say(what(held), fate)

    @precondition(lambda self: self._holding())
    @rule(pick=picks, cannot_be_reaped=st.sampled_from([False, False, False, True]))
    def a_worker_dies(self, pick: int, cannot_be_reaped: bool) -> None:
        held = self._one_of(self._holding(), pick)
        self._portal.call(self._twins.pass_time, held.id, 70)
        self._say(calls.park(held) if cannot_be_reaped else calls.reap())

    @precondition(lambda self: not {held.token for held in self._holding()} <= set.union(*self._known.values()))
    @rule(pick=picks, fate=fates)
    def a_worker_hands_back_what_it_does_not_know(self, pick: int, fate: str) -> None:
        worker = self._workers[pick % 2]
        self._say(calls.release_unanswered(worker, frozenset(self._known[worker])), fate)

    # -- People

    @rule(pick=picks, what=commands, fate=fates)
    def somebody_asks(self, pick: int, what: Callable[[UUID], Call], fate: str) -> None:
        self._say(what(self._job(pick)), fate)

    # -- Time, and who looks after it

    @rule(pick=picks, seconds=st.sampled_from([20, 40, 150, 600]))
    def time_passes(self, pick: int, seconds: float) -> None:
        self._portal.call(self._twins.pass_time, self._job(pick), seconds)

    @rule(step=st.sampled_from([calls.reap, calls.promote, calls.expire]), fate=fates)
    def maintain(self, step: Callable[[], Call], fate: str) -> None:
        self._say(step(), fate)

    @rule(pick=picks, seconds=st.sampled_from([320, 320, 600]))
    def jobs_come_due_and_are_claimed(self, pick: int, seconds: float) -> None:
        for job_id, job in self._twins.world.jobs.items():
            if job.state == JobState.SCHEDULED:
                self._portal.call(self._twins.pass_time, job_id, seconds)
        self._say(calls.promote())
        self.claim(pick, 3, "answered")

    @precondition(lambda self: self._twins.world.keys)
    @rule(pick=picks)
    def a_key_runs_out(self, pick: int) -> None:
        keys = sorted(self._twins.world.keys)
        key = keys[pick % len(keys)]
        self._portal.call(self._parties.watcher.fetch, FORGET_KEY, key)
        del self._twins.world.keys[key]

    @rule(pick=picks)
    def a_call_is_made_again(self, pick: int) -> None:
        """However old it is; a worker may have stood still with it in its hands."""
        self._portal.call(self._twins.tell, self._said[pick % len(self._said)])

    # -- What always holds

    @invariant()
    def both_agree(self) -> None:
        self._portal.call(self._twins.check)
        self._portal.call(self._twins.leave_nothing_to_chance)

    @invariant()
    def nothing_that_was_written_down_is_lost(self) -> None:
        (row,) = self._portal.call(self._parties.watcher.fetch, LEDGERS)
        now = tuple(row.values())
        assert all(before <= count for before, count in zip(self._ledgers, now, strict=False))
        self._ledgers = now


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture
def parties(portal: BlockingPortal, settings: Settings) -> Iterator[Parties]:
    with portal.wrap_async_context_manager(Parties.open(tightened(settings))) as parties:
        yield parties


def test_the_store_does_what_the_model_foretells(portal: BlockingPortal, parties: Parties) -> None:
    """In CI, Hypothesis draws the same examples each time."""

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(portal, parties)

    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
