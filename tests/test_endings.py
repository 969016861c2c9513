"""The calls of those who hold leases, coalesced: each gets its own answer, and workers hear of what became ready."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

from clarion.db import Database
from clarion.endings import Endings, unstorable
from clarion.errors import ClarionError, Overloaded, Unstorable
from clarion.execution import Beat, Completion, Ended, Heartbeat, Lease, LogLine, Ready, Release, Snoozing
from clarion.settings import Settings
from clarion.store import Store
from clarion.wake import Ringer, decode_ring
from recording import Rung, rung
from store_actions import Jobs, beat, failure, line, with_token

MINUTE = 60.0


class Watched(Store):
    """A store that notes the sets of beats, and every ring."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.beats: list[list[Beat]] = []
        self.rings: list[Rung] = []

    async def heartbeat_jobs(self, beats: Sequence[Beat]) -> list[Heartbeat]:
        self.beats.append(list(beats))
        return await super().heartbeat_jobs(beats)

    async def ring(self, channel: str, payloads: Sequence[str]) -> None:
        self.rings += [rung(decode_ring(payload)) for payload in payloads]
        await super().ring(channel, payloads)


@pytest.fixture
def jobs(database: Database, settings: Settings) -> Jobs:
    return Jobs(database, settings)


@pytest.fixture
def watched(database: Database, settings: Settings) -> Watched:
    return Watched(database, settings)


@pytest.fixture
def ringer(watched: Watched, settings: Settings) -> Ringer:
    return Ringer(watched, settings)


@pytest.fixture
def endings(watched: Watched, ringer: Ringer) -> Endings:
    return Endings(watched, ringer, buffer_max=10)


async def together(endings: Endings, *calls: Any) -> list[Any]:
    """What each of these calls, made at once, answers or raises; in order."""
    outcomes: dict[int, Any] = {}

    async def make(place: int, call: Any) -> None:
        try:
            outcomes[place] = await call
        except ClarionError as error:
            outcomes[place] = error

    async with anyio.create_task_group() as flushing:
        endings.start(flushing)
        async with anyio.create_task_group() as callers:
            for place, call in enumerate(calls):
                callers.start_soon(make, place, call)
        flushing.cancel_scope.cancel()
    return [outcomes[place] for place in range(len(calls))]


async def stranger(jobs: Jobs) -> Lease:
    """A lease that is lost."""
    lease = await jobs.run()
    await jobs.lose(lease)
    return lease


# -- Each its own answer


async def test_each_call_gets_its_own_answer(jobs: Jobs, endings: Endings) -> None:
    done, failed, snoozed, released, beating = [await jobs.run() for _ in range(5)]
    lost = await stranger(jobs)
    answers = await together(
        endings,
        endings.complete(Completion(done.id, done.token, "1")),
        endings.complete(Completion(lost.id, lost.token, "1")),
        endings.end(failure(failed)),
        endings.end(failure(lost)),
        endings.end(Snoozing(snoozed.id, snoozed.token, MINUTE)),
        endings.end(Release(released.id, released.token)),
        endings.end(Release(lost.id, lost.token)),
        endings.beat(beat(beating)),
        endings.beat(beat(lost)),
    )
    *ended, held, gone = answers
    assert [answer.state for answer in ended] == ["succeeded", None, "scheduled", None, "scheduled", "ready", None]
    assert (held.token, held.extended, gone) == (beating.token, True, None)


async def test_each_call_with_lines_gets_the_answers_to_its_own(jobs: Jobs, endings: Endings) -> None:
    one, other, lost = await jobs.run(), await jobs.run(), await stranger(jobs)
    answers = await together(
        endings,
        endings.log([line(one, 1), line(one, 2)]),
        endings.log([line(lost, 1)]),
        endings.log([]),
        endings.log([line(other, n) for n in (1, 2, 3)]),
    )
    assert [list(answer) for answer in answers] == [[True, True], [None], [], [True, True, True]]


async def test_the_same_call_twice_at_once_ends_the_attempt_once(jobs: Jobs, endings: Endings) -> None:
    lease = await jobs.run()
    first, again = await together(
        endings, *[endings.complete(Completion(lease.id, lease.token, n, n)) for n in ("1", "2")]
    )
    assert (first.state, first.replayed) == ("succeeded", False)
    assert (again.state, again.replayed, again.completion_key, again.result) == ("succeeded", True, "1", "1")


async def test_without_batching_calls_at_once_are_statements_of_their_own(
    jobs: Jobs, watched: Watched, ringer: Ringer
) -> None:
    leases = [await jobs.run() for _ in range(3)]
    endings = Endings(watched, ringer, buffer_max=10, batch_max=1)
    answers = await together(endings, *[endings.beat(beat(lease)) for lease in leases])
    assert [answer.token for answer in answers] == [lease.token for lease in leases]
    assert [len(beats) for beats in watched.beats] == [1, 1, 1]


# -- Beats


async def test_beats_of_many_leases_go_together(jobs: Jobs, endings: Endings, watched: Watched) -> None:
    leases = [await jobs.run() for _ in range(5)]
    answers = await together(endings, *[endings.beat(beat(lease)) for lease in leases])
    assert [answer.token for answer in answers] == [lease.token for lease in leases]
    assert [len(beats) for beats in watched.beats] == [5]


async def test_heartbeats_of_workers_that_hold_many_leases_go_together(
    jobs: Jobs, endings: Endings, watched: Watched
) -> None:
    leases = [await jobs.run() for _ in range(6)]
    held, more = leases[:4], leases[4:]
    calls = [[beat(lease) for lease in held], [beat(more[0]), beat(with_token(more[0], more[1].token))], []]
    answers = await together(endings, *[endings.beat_all(beats) for beats in calls])
    assert [[answer and answer.token for answer in of_call] for of_call in answers] == [
        [lease.token for lease in held], [more[0].token, None], [],
    ]  # fmt: skip
    assert [len(beats) for beats in watched.beats] == [6]


async def test_a_call_with_large_checkpoints_goes_by_itself(jobs: Jobs, endings: Endings, watched: Watched) -> None:
    leases = [await jobs.run() for _ in range(4)]
    large = f'"{"x" * 300_000}"'
    calls = [[beat(leases[0])], [beat(leases[1], checkpoint=large), beat(leases[2])], [beat(leases[3])]]
    answers = await together(endings, *[endings.beat_all(beats) for beats in calls])
    assert [[answer and answer.id for answer in of_call] for of_call in answers] == [
        [one.id for one in of_call] for of_call in calls
    ]
    assert sorted([one.id for one in beats] for beats in watched.beats) == sorted(
        [[leases[0].id, leases[3].id], [leases[1].id, leases[2].id]]
    )
    assert (await jobs.job(leases[1].id)).checkpoint == large


async def test_two_beats_of_one_lease_in_a_batch_both_have_their_say(
    jobs: Jobs, endings: Endings, watched: Watched
) -> None:
    lease, other = await jobs.run(), await jobs.run()
    answers = await together(
        endings,
        endings.beat(beat(lease, progress="1")),
        endings.beat(beat(other)),
        endings.beat(beat(lease, checkpoint="2")),
        endings.beat(beat(lease, progress="3")),
        endings.beat(beat(with_token(lease, other.token))),
    )
    assert [answer and answer.token for answer in answers] == [lease.token, other.token, lease.token, lease.token, None]
    assert [len(beats) for beats in watched.beats] == [2, 2, 1]
    job = await jobs.job(lease.id)
    assert (job.progress, job.checkpoint) == ("3", "2")


# -- Poison


async def test_a_result_that_cannot_be_stored_harms_no_neighbour(jobs: Jobs, endings: Endings) -> None:
    leases = [await jobs.run() for _ in range(8)]
    results = ["1"] * 5 + ["no JSON"] + ["1"] * 2
    answers = await together(
        endings,
        *[
            endings.complete(Completion(lease.id, lease.token, result))
            for lease, result in zip(leases, results, strict=True)
        ],
    )
    assert isinstance(answers[5], Unstorable)
    assert [answer.state for answer in [*answers[:5], *answers[6:]]] == ["succeeded"] * 7
    assert await jobs.state(leases[5].id) == "running"


async def test_a_beat_that_cannot_be_stored_harms_no_neighbour(jobs: Jobs, endings: Endings) -> None:
    lease, other = await jobs.run(), await jobs.run()
    first, bad, good, second = await together(
        endings,
        endings.beat(beat(lease, progress="1")),
        endings.beat(beat(lease, progress="no JSON")),
        endings.beat(beat(other, progress="2")),
        endings.beat(beat(lease, checkpoint="3")),
    )
    assert isinstance(bad, Unstorable)
    assert [answer.extended for answer in (first, good, second)] == [True] * 3
    job, neighbour = await jobs.job(lease.id), await jobs.job(other.id)
    assert (job.progress, job.checkpoint, neighbour.progress) == ("1", "3", "2")


async def test_lines_that_cannot_be_stored_cost_their_own_call_only(jobs: Jobs, endings: Endings) -> None:
    lease, other = await jobs.run(), await jobs.run()
    bad: list[LogLine] = [line(lease, 1), line(lease, 2, message="a\x00b")]
    refused, kept = await together(endings, endings.log(bad), endings.log([line(other, 1)]))
    assert isinstance(refused, Unstorable)
    assert list(kept) == [True]
    assert await jobs.store.list_logs(lease.id, after=None, limit=9) == []


@pytest.mark.parametrize("reason", ["é\x00\ud800" * 1000, "", "plain"])
async def test_what_is_recorded_instead_of_an_unstorable_outcome_can_be_stored(
    jobs: Jobs, endings: Endings, reason: str
) -> None:
    lease = await jobs.run()
    instead = unstorable(Completion(lease.id, lease.token, "no JSON"), reason)
    assert await together(endings, endings.end(instead)) == [Ended("dead", None)]
    job = await jobs.job(lease.id)
    assert (job.dead_reason, job.error_type) == ("result_unstorable", "Unstorable")


async def test_more_calls_than_the_buffer_holds_are_refused_and_the_others_answered(
    jobs: Jobs, endings: Endings
) -> None:
    leases = [await jobs.run() for _ in range(12)]
    answers = await together(endings, *[endings.end(Release(lease.id, lease.token)) for lease in leases])
    assert [type(answer) for answer in answers] == [Ended] * 10 + [Overloaded] * 2
    assert [await jobs.state(lease.id) for lease in leases] == ["ready"] * 10 + ["running"] * 2


# -- Rings


async def test_what_became_ready_rings_its_queue(
    jobs: Jobs, endings: Endings, watched: Watched, ringer: Ringer
) -> None:
    leases = [await jobs.run(queue=queue) for queue in ("a", "b", "b")]
    await together(endings, *[endings.end(Release(lease.id, lease.token)) for lease in leases])
    await ringer.step()
    assert watched.rings == [Rung({"a": 1, "b": 2})]


@pytest.mark.parametrize("ending", ["fail", "snooze"])
async def test_what_is_scheduled_rings_those_who_promote(
    jobs: Jobs, endings: Endings, watched: Watched, ringer: Ringer, ending: str
) -> None:
    lease = await jobs.run()
    call = failure(lease) if ending == "fail" else Snoozing(lease.id, lease.token, MINUTE)
    await together(endings, endings.end(call))
    await ringer.step()
    assert watched.rings == [Rung(scheduled=True)]


async def test_what_nobody_has_to_run_rings_nobody(
    jobs: Jobs, endings: Endings, watched: Watched, ringer: Ringer
) -> None:
    done, dead, cancelled, snoozed = [await jobs.run(max_attempts=1) for _ in range(4)]
    lost = await stranger(jobs)
    for lease in (cancelled, snoozed):
        await jobs.cancel(lease.id)
    await together(
        endings,
        endings.complete(Completion(done.id, done.token)),
        endings.end(failure(dead)),
        endings.end(failure(lost)),
        endings.end(Release(cancelled.id, cancelled.token)),
        endings.end(Snoozing(snoozed.id, snoozed.token, MINUTE)),
    )
    ringer.mark({"last": Ready(1, datetime.now(UTC))})
    await ringer.step()
    assert watched.rings == [Rung({"last": 1})]
