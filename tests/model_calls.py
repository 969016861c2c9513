"""The calls of the store, each beside what the model foretells of it: see `model_twins`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from clarion.execution import (
    AttemptOutcome,
    Beat,
    Completion,
    Ended,
    Failure,
    LogLine,
    Policy,
    Release,
    Snoozing,
)
from clarion.job import DeadReason, JobChange, JobState, NewJob
from clarion.store import Store
from job_model import LOST, JobModel
from model_twins import Call, World
from recording import amounts

TASK = "t"
QUEUE = "default"
ACTOR = "test"
LEASE_SECONDS = 30.0


class Held(msgspec.Struct, frozen=True):
    """A job and a token, which may hold it or not."""

    id: UUID
    token: UUID


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What an enqueue says; seconds each."""

    delay: float | None = None
    max_attempts: int | None = None
    timeout: float | None = None
    start_within: float | None = None
    total_timeout: float | None = None
    key: str | None = None


# -- Enqueue and claim


def enqueue(wish: Wish) -> Call:
    """Answers the job's id, and whether it is the answer of an earlier call."""
    request = msgspec.json.encode(wish).decode()
    job = NewJob(
        task=TASK,
        delay_seconds=wish.delay,
        max_attempts=wish.max_attempts,
        timeout_seconds=wish.timeout,
        start_within_seconds=wish.start_within,
        total_timeout_seconds=wish.total_timeout,
        key=wish.key,
        request=request if wish.key else None,
    )

    async def make(store: Store) -> tuple[UUID, bool]:
        (added,) = await store.enqueue_jobs([job])
        return added.id, added.request is not None

    def foretell(world: World, answer: tuple[UUID, bool]) -> tuple[UUID | str, bool]:
        if wish.key in world.keys:
            return world.keys[wish.key], True
        job_id, _ = answer
        if job_id in world.jobs:
            return "a new one", False
        due = wish.delay or 0
        world.jobs[job_id] = JobModel(
            limits=world.limits,
            state=JobState.SCHEDULED if wish.delay else JobState.READY,
            run_at=(due, due),
            max_attempts=wish.max_attempts,
            timeout=wish.timeout,
            total_timeout=wish.total_timeout,
            start_by=None if wish.start_within is None else due + wish.start_within,
            finish_by=None if wish.total_timeout is None else due + wish.total_timeout,
        )
        if wish.key:
            world.keys[wish.key] = job_id
        return job_id, False

    return Call("enqueue", make, foretell)


def claim(worker: UUID, most: int = 10) -> Call:
    """Answers the token of each job that was claimed."""

    async def make(store: Store) -> dict[UUID, UUID]:
        leases = await store.claim_for(worker, {QUEUE: most}, {TASK: Policy()}, lease_seconds=LEASE_SECONDS)
        return {lease.id: lease.token for lease in leases}

    def foretell(world: World, answer: dict[UUID, UUID]) -> dict[UUID, UUID | str]:
        ready = {job_id for job_id, job in world.jobs.items() if job.state == JobState.READY and not job.is_too_late}
        if not answer.keys() <= ready or len(answer) != min(most, len(ready)):
            return dict.fromkeys(ready, "a token")
        for job_id, token in answer.items():
            world.jobs[job_id].claim(worker, token, LEASE_SECONDS)
        return {**answer}

    return Call("claim", make, foretell, skips={})


# -- What a lease allows


def of_one(
    name: str,
    held: Held,
    make: Callable[[Store], Awaitable[Any]],
    foretell: Callable[[JobModel], Any],
    *,
    otherwise: Any = LOST,
    skips: Any = None,
    gives_up: Any = None,
) -> Call:
    """A call about a job that may be unknown."""

    def foretell_of_world(world: World, _answer: Any) -> Any:
        job = world.jobs.get(held.id)
        return otherwise if job is None else foretell(job)

    return Call(name, make, foretell_of_world, skips, gives_up)


def complete(held: Held, result: str | None = '{"n":1}', key: str | None = None) -> Call:
    async def make(store: Store) -> Any:
        (answer,) = await store.complete_jobs([Completion(held.id, held.token, result, key)])
        if answer.state is None:
            return LOST
        assert answer.state == JobState.SUCCEEDED
        return answer.replayed, answer.completion_key, answer.result

    return of_one("complete", held, make, lambda job: job.complete(held.token, result, key))


def ending(
    name: str, held: Held, make: Callable[[Store], Awaitable[Sequence[Ended]]], foretell: Callable[[JobModel], Any]
) -> Call:
    """A call that ends an attempt. The model knows whether a next run is planned; when it is was said by the first."""

    async def make_one(store: Store) -> Any:
        (answer,) = await make(store)
        return LOST if answer.state is None else (answer.state, answer.next_run_at)

    def foretell_of_world(world: World, answer: Any) -> Any:
        foretold = foretell(world.jobs[held.id]) if held.id in world.jobs else LOST
        if LOST in (foretold, answer):
            return foretold
        said = world.next_runs.setdefault((name, held.token), answer[1])
        return (foretold[0], said) if foretold[1] == (said is not None) else foretold

    return Call(name, make_one, foretell_of_world)


def fail(
    held: Held,
    *,
    outcome: AttemptOutcome = AttemptOutcome.FAILED,
    retry_in: float | None = None,
    reason: DeadReason | None = None,
) -> Call:
    failure = Failure(
        id=held.id, token=held.token, outcome=outcome, error_type="Oops", error_message="no luck",
        retry_in_seconds=retry_in, dead_reason=reason,
    )  # fmt: skip

    async def make(store: Store) -> Sequence[Ended]:
        return await store.fail_jobs([failure])

    return ending("fail", held, make, lambda job: job.fail(held.token, outcome, retry_in, reason))


def snooze(held: Held, delay: float = 300) -> Call:
    async def make(store: Store) -> Sequence[Ended]:
        return await store.snooze_jobs([Snoozing(held.id, held.token, delay)])

    return ending("snooze", held, make, lambda job: job.snooze(held.token, delay))


def release(held: Held) -> Call:
    async def make(store: Store) -> Sequence[Ended]:
        answers, _ = await store.release_jobs([Release(held.id, held.token)])
        return answers

    return ending("release", held, make, lambda job: job.release(held.token))


def heartbeat(held: Held, *, lease_seconds: float | None = None, checkpoint: str | None = None) -> Call:
    beat = Beat(id=held.id, token=held.token, lease_seconds=lease_seconds, checkpoint=checkpoint)

    async def make(store: Store) -> str:
        answers = await store.heartbeat_jobs([beat])
        if not answers:
            return LOST
        (answer,) = answers
        if not answer.extended:
            return "unchanged"
        return "cancel" if answer.cancelled else "extended"

    def foretell(job: JobModel) -> str:
        return job.heartbeat(held.token, lease_seconds, checkpoint)

    return of_one("heartbeat", held, make, foretell, skips="unchanged")


def log(held: Held, *numbers: int) -> Call:
    chosen = list(numbers) or [1, 2]

    async def make(store: Store) -> list[bool | None]:
        lines = [LogLine(id=held.id, token=held.token, n=n, level="info", message=f"line {n}") for n in chosen]
        return await store.record_logs(lines)

    return of_one("log", held, make, lambda job: job.log(held.token, chosen), otherwise=[None] * len(chosen))


# -- What people ask


def cancel(job_id: UUID) -> Call:
    async def make(store: Store) -> Any:
        (answer,) = await store.cancel_jobs([job_id], actor=ACTOR)
        return answer.state, answer.requested

    return of_one("cancel", Held(job_id, job_id), make, lambda job: job.cancel(), otherwise=(None, False))


def retry(job_id: UUID, delay: float = 0, *, only_dead: bool = False) -> Call:
    async def make(store: Store) -> Any:
        (answer,) = await store.retry_jobs([job_id], [delay], actor=ACTOR, only_dead=only_dead)
        return answer.state, answer.queue is not None

    def foretell(job: JobModel) -> Any:
        return job.retry(delay, only_dead=only_dead)

    nothing = (None, False)
    return of_one("retry", Held(job_id, job_id), make, foretell, otherwise=nothing, gives_up=nothing)


def change(job_id: UUID, *, delay: float | None = None, priority: int | None = None) -> Call:
    given = {"delay_seconds": delay, "priority": priority}
    names = frozenset(name for name, value in given.items() if value is not None)
    wanted = JobChange(names=names, delay_seconds=delay, priority=priority)

    async def make(store: Store) -> Any:
        answer = await store.change_job(job_id, wanted, version=None, actor=ACTOR)
        return answer and answer.state

    return of_one("change", Held(job_id, job_id), make, lambda job: job.change(delay, priority), otherwise=None)


# -- What the maintenance does


def of_all(name: str, make: Callable[[Store], Awaitable[Any]], step: Callable[[JobModel], Any]) -> Call:
    """A step over all jobs; it answers what it did to each that it touched."""

    def foretell(world: World, _answer: Any) -> dict[UUID, Any]:
        done = {job_id: step(job) for job_id, job in world.jobs.items()}
        return {job_id: what for job_id, what in done.items() if what}

    return Call(name, make, foretell, skips={})


def reap() -> Call:
    async def make(store: Store) -> Any:
        return {job.id: (job.state, job.timed_out) for job in await store.reap_jobs()}

    return of_all("reap", make, lambda job: job.reap())


def expire() -> Call:
    async def make(store: Store) -> Any:
        return {job.id: job.reason for job in await store.expire_jobs()}

    return of_all("expire", make, lambda job: job.expire())


def promote() -> Call:
    async def make(store: Store) -> int:
        return sum(amounts(await store.promote_jobs()).values())

    def foretell(world: World, _answer: int) -> int:
        return sum([job.promote() for job in world.jobs.values()])

    return Call("promote", make, foretell, skips=0)


def release_unanswered(worker: UUID, known: frozenset[UUID]) -> Call:
    async def make(store: Store) -> int:
        return sum(amounts(await store.release_unanswered_jobs(worker, sorted(known))).values())

    def foretell(world: World, _answer: int) -> int:
        return sum([job.release_unanswered(worker, known) for job in world.jobs.values()])

    return Call("release_unanswered", make, foretell, skips=0)


def park(held: Held) -> Call:
    async def make(store: Store) -> bool:
        return await store.park_jobs(Release(held.id, held.token))

    return of_one("park", held, make, lambda job: job.park(held.token), otherwise=False)
