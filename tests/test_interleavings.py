"""Two sessions at one job: whatever they ask at once, the outcome is one that some order of the two calls has.

The first session makes its call in an open transaction; then the second makes its own, and waits for the row, or passes
over it; then the first commits, or is undone. Answers and rows must be those that the model foretells of one order:
so at most one ending of an attempt counts, nothing is lost or doubled, and every counter is the winner's. Afterwards
both calls are made again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import product
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import msgspec
import pytest
import pytest_asyncio

from clarion.execution import Completion, Failure, LogLine, Release, Snoozing
from clarion.job import DeadReason
from clarion.settings import Settings
from clarion.store import Store
from model_calls import (
    Held,
    Wish,
    cancel,
    change,
    claim,
    complete,
    enqueue,
    expire,
    fail,
    heartbeat,
    log,
    park,
    promote,
    reap,
    release,
    release_unanswered,
    retry,
    snooze,
)
from model_meetings import Met, Parties, has_effect, moves, settle
from model_twins import Call, Twins, tightened

pytestmark = pytest.mark.asyncio(loop_scope="module")
NEVER = object()

# -- Where the two meet


class Subject(msgspec.Struct, frozen=True):
    """The job that they want, who holds it if it runs, and the worker that would like to."""

    held: Held
    worker: UUID
    rival: UUID

    @property
    def id(self) -> UUID:
        return self.held.id


Scene: TypeAlias = Callable[[Twins], Awaitable[Subject]]


async def ready(twins: Twins, **wish: Any) -> Subject:
    job_id, _ = await twins.tell(enqueue(Wish(**wish)))
    return Subject(Held(job_id, uuid4()), uuid4(), uuid4())


async def nowhere(_: Twins) -> Subject:
    return Subject(Held(uuid4(), uuid4()), uuid4(), uuid4())


async def late(twins: Twins) -> Subject:
    subject = await ready(twins, start_within=100)
    await twins.pass_time(subject.id, 200)
    return subject


async def scheduled(twins: Twins) -> Subject:
    return await ready(twins, delay=100)


async def due(twins: Twins) -> Subject:
    subject = await scheduled(twins)
    await twins.pass_time(subject.id, 200)
    return subject


async def running(twins: Twins, **wish: Any) -> Subject:
    subject = await ready(twins, **wish)
    tokens = await twins.tell(claim(subject.worker))
    return msgspec.structs.replace(subject, held=Held(subject.id, tokens[subject.id]))


async def lapsed(twins: Twins) -> Subject:
    subject = await running(twins)
    await twins.pass_time(subject.id, 50)
    return subject


async def overdue(twins: Twins) -> Subject:
    subject = await running(twins, timeout=10)
    await twins.pass_time(subject.id, 50)
    return subject


async def asked(twins: Twins) -> Subject:
    subject = await running(twins)
    await twins.tell(cancel(subject.id))
    return subject


async def asked_and_lapsed(twins: Twins) -> Subject:
    subject = await asked(twins)
    await twins.pass_time(subject.id, 50)
    return subject


async def dead(twins: Twins) -> Subject:
    subject = await running(twins)
    await twins.tell(fail(subject.held, reason=DeadReason.NOT_RETRYABLE))
    return subject


async def cancelled(twins: Twins) -> Subject:
    subject = await ready(twins)
    await twins.tell(cancel(subject.id))
    return subject


CALLS: dict[str, Callable[[Subject], Call]] = {
    "enqueue": lambda _: enqueue(Wish(key="key")),
    "enqueue_otherwise": lambda _: enqueue(Wish(key="key", delay=100)),
    "complete": lambda subject: complete(subject.held),
    "complete_otherwise": lambda subject: complete(subject.held, '{"n":2}', "other"),
    "fail": lambda subject: fail(subject.held),
    "die": lambda subject: fail(subject.held, reason=DeadReason.NOT_RETRYABLE),
    "snooze": lambda subject: snooze(subject.held),
    "release": lambda subject: release(subject.held),
    "heartbeat": lambda subject: heartbeat(subject.held, checkpoint='{"at":1}'),
    "log": lambda subject: log(subject.held, 1, 2),
    "cancel": lambda subject: cancel(subject.id),
    "retry": lambda subject: retry(subject.id),
    "redrive": lambda subject: retry(subject.id, only_dead=True),
    "postpone": lambda subject: change(subject.id, delay=500),
    "prefer": lambda subject: change(subject.id, priority=5),
    "claim": lambda subject: claim(subject.rival),
    "reap": lambda _: reap(),
    "park": lambda subject: park(subject.held),
    "release_unanswered": lambda subject: release_unanswered(subject.worker, frozenset()),
    "promote": lambda _: promote(),
    "expire": lambda _: expire(),
}
ENDINGS = ("complete", "fail", "snooze", "release")
OF_HOLDER = (*ENDINGS, "heartbeat", "log")
# Which calls meet in which scene; of some scenes only the pairs with one of the last calls, the others are the same
# as in an earlier scene.
SCENES: dict[Scene, tuple[Sequence[str], Sequence[str]]] = {
    nowhere: ((), ("enqueue", "enqueue_otherwise")),
    running: (
        (
            *OF_HOLDER,
            "complete_otherwise",
            "die",
            "cancel",
            "retry",
            "redrive",
            "postpone",
            "claim",
            "release_unanswered",
        ),
        (*OF_HOLDER, "complete_otherwise", "die", "cancel", "release_unanswered"),
    ),
    asked: ((*OF_HOLDER, "cancel", "retry", "release_unanswered"), (*OF_HOLDER, "cancel")),
    lapsed: ((*OF_HOLDER, "cancel", "retry", "claim", "release_unanswered", "reap", "park"), ("reap", "park")),
    overdue: ((*OF_HOLDER, "cancel", "retry", "reap"), ("reap",)),
    asked_and_lapsed: ((*OF_HOLDER, "cancel", "retry", "reap", "park"), ("reap", "park")),
    ready: ((), ("claim", "cancel", "retry", "postpone", "prefer")),
    late: (("claim", "cancel", "retry", "postpone"), ("expire",)),
    scheduled: ((), ("cancel", "retry", "postpone", "prefer")),
    due: (("claim", "cancel", "retry", "postpone", "prefer"), ("promote",)),
    dead: (("postpone",), ("cancel", "retry", "redrive")),
    cancelled: ((), ("cancel", "retry", "redrive")),
}
PAIRS = [
    pytest.param(scene, first, second, id=f"{scene.__name__}-{first}-{second}")
    for scene, (all_calls, chief_calls) in SCENES.items()
    for first, second in product(dict.fromkeys((*all_calls, *chief_calls)), repeat=2)
    if {first, second} & set(chief_calls)
]


# -- How they meet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parties(settings: Settings) -> AsyncIterator[Parties]:
    """Connected once, since their statements are then planned once."""
    async with Parties.open(tightened(settings)) as parties:
        yield parties


@pytest_asyncio.fixture(loop_scope="module")
async def twins(parties: Parties) -> Twins:
    twins = Twins(parties.watcher, parties.settings)
    await twins.forget()
    return twins


def nothing_done(call: Call, met: Met, *, moved: bool = False) -> Any:
    """The answer of a second call that did nothing on account of the first; NEVER where it has to do something."""
    answer = call.gives_up if moved and met.waited else call.skips
    return NEVER if answer is None else answer


@pytest.mark.parametrize(("scene", "first", "second"), PAIRS)
async def test_two_calls_at_once_end_as_one_after_the_other(
    twins: Twins, parties: Parties, scene: Scene, first: str, second: str
) -> None:
    subject = await scene(twins)
    one, two = CALLS[first](subject), CALLS[second](subject)
    before = twins.world
    met = await parties.meet(one, two, commit=True)
    orders = [[(one, met.first), (two, met.second)], [(two, met.second), (one, met.first)]]
    if met.second == nothing_done(two, met, moved=moves(before, one, met.first)):
        orders.append([(one, met.first)])
    await settle(twins, *orders)
    if two.skips is not None:
        assert not met.waited, "a step over many jobs waited for one"
    elif has_effect(before, one, met.first) and has_effect(before, two, met.second):
        assert met.waited, "the two calls did not meet"
    await twins.tell(two)
    await twins.tell(one)
    await twins.tell(two)
    await twins.check()


@pytest.mark.parametrize(("scene", "first", "second"), PAIRS)
async def test_a_call_that_is_undone_leaves_the_job_to_the_other(
    twins: Twins, parties: Parties, scene: Scene, first: str, second: str
) -> None:
    subject = await scene(twins)
    one, two = CALLS[first](subject), CALLS[second](subject)
    met = await parties.meet(one, two, commit=False)
    await settle(twins, [(two, met.second)], *([[]] if met.second == nothing_done(two, met) else []))
    await twins.tell(one)
    await twins.tell(two)
    await twins.check()


# -- Sets of jobs


async def three(twins: Twins, scene: Scene) -> list[Subject]:
    return sorted([await scene(twins) for _ in range(3)], key=lambda subject: subject.id)


SETS: dict[str, tuple[Scene, Callable[[Store, list[Subject]], Awaitable[Any]]]] = {
    "complete": (running, lambda store, them: store.complete_jobs([Completion(x.id, x.held.token) for x in them])),
    "fail": (
        running,
        lambda store, them: store.fail_jobs(
            [Failure(id=x.id, token=x.held.token, error_type="Oops", error_message="no luck") for x in them]
        ),
    ),
    "snooze": (running, lambda store, them: store.snooze_jobs([Snoozing(x.id, x.held.token, 60) for x in them])),
    "release": (running, lambda store, them: store.release_jobs([Release(x.id, x.held.token) for x in them])),
    "log": (
        running,
        lambda store, them: store.record_logs(
            [LogLine(id=x.id, token=x.held.token, n=1, level="info", message="here") for x in them]
        ),
    ),
    "cancel_running": (running, lambda store, them: store.cancel_jobs([x.id for x in them], actor="test")),
    "cancel_waiting": (ready, lambda store, them: store.cancel_jobs([x.id for x in them], actor="test")),
    "retry_dead": (dead, lambda store, them: store.retry_jobs([x.id for x in them], [0] * 3, actor="test")),
    "retry_cancelled": (cancelled, lambda store, them: store.retry_jobs([x.id for x in them], [0] * 3, actor="test")),
}


@pytest.mark.parametrize("name", SETS)
async def test_a_set_locks_its_jobs_in_one_order_so_that_no_two_deadlock(
    twins: Twins, parties: Parties, name: str
) -> None:
    """While the first job is locked elsewhere, a call that names it last holds none of the others."""
    scene, call = SETS[name]
    first, *others = await three(twins, scene)
    lock = "select from {} where id = any($1::uuid[]) for update skip locked".format(
        "clarion.job_history" if scene is cancelled else "clarion.jobs"
    )
    held = Call("hold", lambda _: parties.first.fetch(lock, [first.id]), lambda *_: None)
    asked = Call(name, lambda store: call(store, [*reversed(others), first]), lambda *_: None)
    free: list[Any] = []

    async def look() -> None:
        free.extend(await parties.watcher.fetch(lock, [other.id for other in others]))

    met = await parties.meet(held, asked, commit=False, meanwhile=look)
    assert met.waited
    assert len(free) == len(others)
