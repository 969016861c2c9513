"""Dead letters: listed oldest first, grouped by what they died of, and run again at a measured pace."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from msgspec import Meta

from clarion.api.access import Permission
from clarion.api.command_forms import DeadFields, RedriveIn
from clarion.api.cursor import decode_dead, encode_dead
from clarion.api.decoding import Form, Nothing
from clarion.api.operation import Call, Operation, Reply
from clarion.api.representations import JobListOut, summary_out
from clarion.api.schemas import ListLimit, Name
from clarion.errors import FieldError, Overloaded, Unavailable
from clarion.execution import ready_by_queue
from clarion.job import DeadFilter, DeadGroup, JobState, JobSummary
from clarion.payload import FaultFinder
from clarion.store import Store

GROUPS_MAX = 1_000
# A redrive takes so many jobs in one statement, and shows so many ids.
CHUNK_JOBS = 1_000
SHOWN_JOBS = 100


class DeadQuery(DeadFields, frozen=True, kw_only=True):
    """Which dead jobs to list, those that died first at the head."""

    limit: ListLimit = 50
    cursor: str | None = None

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Values that Postgres can hold, and a cursor of ours."""
        for name, fault in self.wrong_fields():
            yield FieldError(fault, parameter=name)
        try:
            self.to_page()
        except ValueError as error:
            yield FieldError(str(error), parameter="cursor")

    def to_page(self) -> DeadFilter:
        """The record that the store takes."""
        after = decode_dead(self.cursor) if self.cursor is not None else None
        return msgspec.structs.replace(self.to_filter(), after=after)


class GroupQuery(Form, frozen=True, kw_only=True):
    """Of which queue, and how many groups at most."""

    queue: Name | None = None
    limit: Annotated[int, Meta(ge=1, le=GROUPS_MAX, description=f"must be a whole number from 1 to {GROUPS_MAX}")] = 100


class DeadGroupsOut(msgspec.Struct, frozen=True):
    """Dead jobs by task, error and reason; the largest groups first."""

    groups: list[DeadGroup]


class RedriveOut(msgspec.Struct, frozen=True):
    """How many dead jobs were meant, how many run again, and the first of them; a dry run names those that would."""

    matched: int
    redriven: int
    dry_run: bool
    jobs: list[UUID]


async def list_dead(call: Call[Nothing, DeadQuery]) -> Reply:
    """A page of dead jobs; `Link` leads to the next."""
    limit = call.query.limit
    # One more than asked for tells whether there is a next page.
    found = await call.services.store.find_dead(call.query.to_page(), limit=limit + 1)
    page, cursor = found[:limit], None
    headers = {}
    if len(found) > limit:
        cursor = encode_dead(*_place(page[-1]))
        kept = [(name, value) for name, value in call.request.query_params.multi_items() if name != "cursor"]
        next_page = call.url(f"/v1/dead?{urlencode([*kept, ('cursor', cursor)])}")
        headers = {"Link": f'<{next_page}>; rel="next"'}
    return Reply(JobListOut([summary_out(job) for job in page], cursor), headers)


async def group_dead(call: Call[Nothing, GroupQuery]) -> Reply:
    """What the dead jobs died of."""
    groups = await call.services.store.group_dead(queue=call.query.queue, limit=call.query.limit)
    return Reply(DeadGroupsOut(groups))


async def redrive(call: Call[RedriveIn, Nothing]) -> Reply:
    """Runs dead jobs again, oldest first, the n-th of them n / per_second seconds from now.

    In chunks that are committed one by one: cut off, it has done a part, and the same request does the rest.
    """
    wish = call.body
    done = _Redriven()
    while done.matched < wish.limit:
        chunk = await _next_chunk(call.services.store, wish, done)
        if not chunk:
            break
        ids = [job.id for job in chunk]
        if not wish.dry_run:
            ids = await _run_again(call, chunk, first=done.matched)
            done.redriven += len(ids)
        done.add(chunk, ids)
    return Reply(RedriveOut(done.matched, done.redriven, wish.dry_run, done.shown))


class _Redriven:
    """How far a redrive has come. One that dies again meanwhile is not taken a second time: it is in `seen`."""

    def __init__(self) -> None:
        self.matched = 0
        self.redriven = 0
        self.shown: list[UUID] = []
        self.seen: set[UUID] = set()
        self.after: tuple[datetime, UUID] | None = None

    def add(self, chunk: Sequence[JobSummary], ids: Sequence[UUID]) -> None:
        self.matched += len(chunk)
        self.seen.update(job.id for job in chunk)
        self.shown += ids[: SHOWN_JOBS - len(self.shown)]
        self.after = _place(chunk[-1])


async def _next_chunk(store: Store, wish: RedriveIn, done: _Redriven) -> list[JobSummary]:
    where = msgspec.structs.replace(wish.to_filter(), after=done.after)
    found = await store.find_dead(where, limit=min(CHUNK_JOBS, wish.limit - done.matched))
    return [job for job in found if job.id not in done.seen]


async def _run_again(call: Call[RedriveIn, Nothing], chunk: Sequence[JobSummary], *, first: int) -> list[UUID]:
    """The ids of those that were still dead, and are not any more."""
    pace = 1 / call.body.per_second if call.body.per_second else 0
    delays_seconds = [(first + place) * pace for place in range(len(chunk))]
    answers = await call.services.store.retry_jobs(
        [job.id for job in chunk], delays_seconds, actor=call.actor, reason="redrive", only_dead=True
    )
    ready = ready_by_queue((answer.queue, answer.sort_key) for answer in answers if answer.state != JobState.SCHEDULED)
    call.services.ringer.mark(ready, scheduled=any(answer.state == JobState.SCHEDULED for answer in answers))
    return [job.id for job, answer in zip(chunk, answers, strict=True) if answer.state is not None]


def _place(job: JobSummary) -> tuple[datetime, UUID]:
    """Where a dead job stands in the list."""
    assert job.finished_at is not None  # noqa: S101  when it died
    return job.finished_at, job.id


OPERATIONS = (
    Operation(
        method="GET",
        path="/v1/dead",
        summary="List dead jobs, oldest first",
        handler=list_dead,
        permission=Permission.READ,
        body=Nothing,
        query=DeadQuery,
        responds=JobListOut,
        problems=(Unavailable, Overloaded),
    ),
    Operation(
        method="GET",
        path="/v1/dead/groups",
        summary="Group dead jobs by what they died of",
        handler=group_dead,
        permission=Permission.READ,
        body=Nothing,
        query=GroupQuery,
        responds=DeadGroupsOut,
        problems=(Unavailable, Overloaded),
    ),
    Operation(
        method="POST",
        path="/v1/dead/redrive",
        summary="Run dead jobs again",
        handler=redrive,
        permission=Permission.OPERATE,
        body=RedriveIn,
        query=Nothing,
        responds=RedriveOut,
        problems=(Unavailable, Overloaded),
    ),
)
