"""Every call of the API, as the steps that it takes: built, sent, repeated and read, without I/O.

All of them are safe to repeat, so that weather may cut off any: reads by nature, an enqueue by its idempotency key,
cancel since a second one asks for no more than the first, and retry by the generation of the job that it is meant for.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from math import inf
from time import monotonic
from typing import Any, TypedDict, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import msgspec

from clarion.client.errors import JobCancelled, JobDead, UnexpectedResult
from clarion.client.exchange import Answer, Ask, Flow, Pause, exchange, read_answer
from clarion.client.options import ClientOptions
from clarion.client.views import Attempts, Batch, JobPage, JobRef, JobView, LogLine, LogPage
from clarion.durations import parse_duration
from clarion.job import FINAL, JobState
from clarion.job_request import Duration, JobRequest, duration_seconds, encode_request
from clarion.loops import backoff_seconds

T = TypeVar("T")

BATCH_MAX_JOBS = 1_000
# Half of what a server takes unless told otherwise, so that a batch of large jobs is split and not refused.
BATCH_MAX_BYTES = 16 * 1_048_576
PAGE_JOBS = 100
_TIMEOUT_MAX_SECONDS = 3_650 * 86_400.0


class JobFilters(TypedDict, total=False):
    """Which jobs to list; what is left out, any."""

    state: str
    queue: str
    task: str
    created_after: datetime
    created_before: datetime


class Calls(msgspec.Struct, frozen=True):
    """The calls of one client."""

    url: str
    options: ClientOptions

    def enqueue(self, request: JobRequest[Any]) -> Flow[JobView]:
        """The enqueued job."""
        answer = yield from self._exchange("POST", "/v1/jobs", body=encode_request(_keyed(request)))
        return read_answer(answer, JobView, self.url)

    def enqueue_many(self, requests: Iterable[JobRequest[Any]]) -> Flow[list[JobRef]]:
        """The enqueued jobs, in order."""
        refs: list[JobRef] = []
        for batch in in_batches(encode_request(_keyed(request)) for request in requests):
            body = b'{"jobs":[' + b",".join(batch) + b"]}"
            answer = yield from self._exchange("POST", "/v1/jobs/batch", body=body)
            refs += read_answer(answer, Batch, self.url).jobs
        return refs

    def get_job(self, job_id: UUID | str) -> Flow[JobView]:
        """The job as it is now."""
        answer = yield from self._exchange("GET", _path(job_id))
        return read_answer(answer, JobView, self.url)

    def list_jobs(self, filters: JobFilters, cursor: str | None) -> Flow[JobPage]:
        """A page of jobs, newest first."""
        query = {name: _text(value) for name, value in filters.items()} | {"limit": str(PAGE_JOBS)}
        answer = yield from self._exchange("GET", "/v1/jobs", query=query | ({"cursor": cursor} if cursor else {}))
        return read_answer(answer, JobPage, self.url)

    def cancel(self, job_id: UUID | str, reason: str | None) -> Flow[JobView]:
        """The job, cancelled or about to be."""
        return (yield from self._act(job_id, "cancel", reason))

    def retry(self, job_id: UUID | str, reason: str | None) -> Flow[JobView]:
        """The job, to be run again."""
        job = yield from self.get_job(job_id)
        return (yield from self._act(job_id, "retry", reason, generation=job.generation))

    def attempts(self, job_id: UUID | str) -> Flow[Attempts]:
        """What happened to the job."""
        answer = yield from self._exchange("GET", f"{_path(job_id)}/attempts")
        return read_answer(answer, Attempts, self.url)

    def logs(self, job_id: UUID | str, after: str | int | None) -> Flow[LogPage]:
        """All log lines of the job after that cursor, from as many pages as it takes."""
        lines: list[LogLine] = []
        while True:
            query = {} if after is None else {"after": str(after)}
            answer = yield from self._exchange("GET", f"{_path(job_id)}/logs", query=query)
            page = read_answer(answer, LogPage, self.url)
            lines += page.lines
            after = after if page.next_cursor is None else page.next_cursor
            if not page.lines or page.next_cursor is None:
                return LogPage(lines, page.dropped, after)

    def result(self, job_id: UUID | str, timeout: Duration | None, result_type: Any) -> Flow[Any]:
        """The result, once the job has succeeded; raises JobDead, JobCancelled, or TimeoutError."""
        return result_of((yield from self._final(job_id, timeout)), result_type)

    def _final(self, job_id: UUID | str, timeout: Duration | None) -> Flow[JobView]:
        give_up_at = monotonic() + _seconds(timeout)
        hasty = 0
        while True:
            wait_seconds = max(0.0, min(self.options.wait_seconds, give_up_at - monotonic()))
            asked_at = monotonic()
            query = {"wait": f"{wait_seconds:.3f}s"}
            answer = yield from self._exchange("GET", _path(job_id), query, wait_seconds, give_up_at=give_up_at)
            job = read_answer(answer, JobView, self.url)
            if job.state in FINAL:
                return job
            left_seconds = give_up_at - monotonic()
            if left_seconds <= 0:
                raise TimeoutError(f"job {job.id} ({job.task}) was still {job.state} after {timeout}")
            # A server that is stopping answers early; the next one may not be there yet.
            if monotonic() - asked_at < wait_seconds / 2:
                hasty += 1
                yield Pause(min(backoff_seconds(hasty), left_seconds))

    def _act(self, job_id: UUID | str, verb: str, reason: str | None, **members: int) -> Flow[JobView]:
        body = members if reason is None else {"reason": reason, **members}
        answer = yield from self._exchange("POST", f"{_path(job_id)}/{verb}", body=msgspec.json.encode(body))
        return read_answer(answer, JobView, self.url)

    def _exchange(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        wait_seconds: float = 0,
        *,
        body: bytes | None = None,
        give_up_at: float = inf,
    ) -> Flow[Answer]:
        timeout_seconds = self.options.answer_timeout_seconds + wait_seconds
        ask = Ask(method=method, path=path, query=query or {}, body=body, timeout_seconds=timeout_seconds)
        return exchange(ask, self.url, self.options, give_up_at=give_up_at)


def result_of(job: JobView, result_type: Any) -> Any:
    """The result of a final job as that type; raises JobDead, JobCancelled, or UnexpectedResult."""
    if job.state == JobState.DEAD:
        raise JobDead(job)
    if job.state == JobState.CANCELLED:
        raise JobCancelled(job)
    try:
        return msgspec.convert(job.result, result_type, str_keys=True)
    except (msgspec.ValidationError, TypeError) as error:
        detail = (
            f"the result of job {job.id} ({job.task}) cannot be read as {result_type}: {error}; `type=` takes another"
        )
        raise UnexpectedResult(detail) from None


def in_batches(encoded: Iterable[bytes]) -> Iterator[Sequence[bytes]]:
    """As many jobs at a time as one request takes, by their count and by their bytes."""
    batch: list[bytes] = []
    size = 0
    for job in encoded:
        if len(batch) == BATCH_MAX_JOBS or (batch and size + len(job) > BATCH_MAX_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += len(job) + 1
    if batch:
        yield batch


def _keyed(request: JobRequest[T]) -> JobRequest[T]:
    """The request with a key of its own, fresh unless it has one: repeated, it still makes one job."""
    if request.options.get("idempotency_key") is not None:
        return request
    return request.having(idempotency_key=str(uuid4()))


def _seconds(timeout: Duration | None) -> float:
    if timeout is None:
        return inf
    return parse_duration(duration_seconds(timeout), max_seconds=_TIMEOUT_MAX_SECONDS)


def _path(job_id: UUID | str) -> str:
    return f"/v1/jobs/{quote(str(job_id), safe='')}"


def _text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
