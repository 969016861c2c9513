"""The calls of those who hold leases, coalesced into sets: heartbeat, complete, fail, snooze, release, log lines.

Workers in this process and workers behind the HTTP API end their attempts through the same batchers: what counts
for one counts for the other. Nothing is repeated here: an `Unavailable` goes to the caller, who may make the same call
again with the same token.
"""

from asyncio import Future
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from anyio.abc import TaskGroup

from clarion.batcher import Batcher
from clarion.execution import Beat, Completed, Completion, Ended, Failure, Heartbeat, LogLine, Release, Snoozing
from clarion.job import DeadReason, JobState
from clarion.settings import Settings
from clarion.store import Store
from clarion.texts import storable
from clarion.wake import Ringer

_BATCH_MAX = Settings().batch_max
# Calls with log lines hold up to a thousand each.
_LINES_BATCH_MAX = 20
# What a heartbeat is taken to weigh besides what it says, since calls hold up to a thousand too: a statement that
# extends more than 2,000 leases takes no further call.
_BEAT_BYTES = 4 << 10
# A call that says more than this goes by itself: nobody's lease is to wait for another's checkpoints to be written.
_LARGE_BYTES = 256 << 10

Ending = Completion | Failure | Snoozing | Release


class Endings:
    """Batchers for what a lease token allows.

    `buffer_max` bounds the calls of a verb that wait for a commit, `batch_max` those that one statement serves.
    """

    def __init__(self, store: Store, ringer: Ringer, *, buffer_max: int, batch_max: int = _BATCH_MAX) -> None:
        self._store = store
        self._ringer = ringer
        self.batching = batch_max > 1
        limits: dict[str, Any] = {"batch_max": batch_max, "buffer_max": buffer_max}
        self._completions: Batcher[Completion, Completed] = Batcher(
            store.complete_jobs, **limits, weigh=lambda completion: len(completion.result or "")
        )
        self._failures: Batcher[Failure, Ended] = Batcher(
            self._fail, **limits, weigh=lambda failure: len(failure.error_trace or "") + len(failure.error_message)
        )
        self._snoozings: Batcher[Snoozing, Ended] = Batcher(self._snooze, **limits)
        self._releases: Batcher[Release, Ended] = Batcher(self._release, **limits)
        self._beats: Batcher[Sequence[Beat], list[Heartbeat | None]] = Batcher(self._beat, **limits, weigh=_weigh_beats)
        self._lines: Batcher[Sequence[LogLine], Sequence[bool | None]] = Batcher(
            self._log, batch_max=min(batch_max, _LINES_BATCH_MAX), buffer_max=buffer_max
        )

    def start(self, group: TaskGroup) -> None:
        """Starts to flush, in the given group."""
        for batcher in (
            self._completions, self._failures, self._snoozings, self._releases, self._beats, self._lines,
        ):  # fmt: skip
            group.start_soon(batcher.run)

    async def complete(self, completion: Completion) -> Completed:
        """Finishes a job; its `state` is None where the lease is lost."""
        return await self._completions.submit(completion)

    async def end(self, ending: Failure | Snoozing | Release) -> Ended:
        """Ends an attempt otherwise; its `state` is None where the lease is lost."""
        match ending:
            case Failure():
                return await self._failures.submit(ending)
            case Snoozing():
                return await self._snoozings.submit(ending)
            case Release():
                return await self._releases.submit(ending)

    def post(self, ending: Ending) -> Future[Completed] | Future[Ended]:
        """Ends an attempt, and does not wait for the answer, which will be in the future: see `Batcher.post`."""
        match ending:
            case Completion():
                return self._completions.post(ending)
            case Failure():
                return self._failures.post(ending)
            case Snoozing():
                return self._snoozings.post(ending)
            case Release():
                return self._releases.post(ending)

    async def beat(self, beat: Beat) -> Heartbeat | None:
        """Extends one lease; None where it is lost."""
        return (await self.beat_all([beat]))[0]

    async def beat_all(self, beats: Sequence[Beat]) -> list[Heartbeat | None]:
        """Extends leases; one answer each, in order, None where one is lost."""
        if _said_bytes(beats) > _LARGE_BYTES:
            return (await self._beat([beats]))[0]
        return await self._beats.submit(beats)

    async def log(self, lines: Sequence[LogLine]) -> Sequence[bool | None]:
        """Keeps log lines of one attempt, in order; see `record_logs`."""
        return await self._lines.submit(lines)

    async def _fail(self, failures: Sequence[Failure]) -> list[Ended]:
        return self._scheduled(await self._store.fail_jobs(failures))

    async def _snooze(self, snoozings: Sequence[Snoozing]) -> list[Ended]:
        return self._scheduled(await self._store.snooze_jobs(snoozings))

    async def _release(self, releases: Sequence[Release]) -> list[Ended]:
        answers, ready = await self._store.release_jobs(releases)
        self._ringer.mark(ready)
        return answers

    def _scheduled(self, answers: list[Ended]) -> list[Ended]:
        self._ringer.mark(scheduled=any(answer.state == JobState.SCHEDULED for answer in answers))
        return answers

    async def _beat(self, calls: Sequence[Sequence[Beat]]) -> list[list[Heartbeat | None]]:
        # Of one lease twice in a batch, both answers are alike; what the two have to say must not be lost, though.
        held: dict[tuple[UUID, UUID], Heartbeat] = {}
        for distinct in _one_per_token([beat for beats in calls for beat in beats]):
            held |= {(answer.id, answer.token): answer for answer in await self._store.heartbeat_jobs(distinct)}
        return [[held.get((beat.id, beat.token)) for beat in beats] for beats in calls]

    async def _log(self, calls: Sequence[Sequence[LogLine]]) -> list[Sequence[bool | None]]:
        kept = iter(await self._store.record_logs([line for lines in calls for line in lines]))
        return [[next(kept) for _ in lines] for lines in calls]


def _one_per_token(beats: Sequence[Beat]) -> list[list[Beat]]:
    """The beats in rounds of distinct leases, each lease's in their order; nearly always one round."""
    rounds: list[list[Beat]] = []
    seen: dict[UUID, int] = {}
    for beat in beats:
        turn = seen.get(beat.token, 0)
        seen[beat.token] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(beat)
    return rounds


def _weigh_beats(beats: Sequence[Beat]) -> int:
    return _BEAT_BYTES * len(beats) + _said_bytes(beats)


def _said_bytes(beats: Sequence[Beat]) -> int:
    return sum(len(beat.checkpoint or "") + len(beat.progress or "") for beat in beats)


def unstorable(outcome: Ending, reason: str) -> Failure:
    """What is recorded instead of an outcome that Postgres refuses; itself of plain ASCII, so that it is taken."""
    return Failure(
        id=outcome.id,
        token=outcome.token,
        error_type="Unstorable",
        error_message=storable(reason, 1_000).encode("ascii", "backslashreplace").decode(),
        dead_reason=DeadReason.RESULT_UNSTORABLE,
    )
