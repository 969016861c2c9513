"""The client for scripts and threads."""

import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack, overload
from uuid import UUID

import httpx2
import msgspec

from clarion.client.calls import Calls, JobFilters
from clarion.client.exchange import Done, Flow, Pause, Reply, Step, advance
from clarion.client.options import ClientOptions, find_server
from clarion.client.views import Attempts, JobSummaryView, JobView, LogPage
from clarion.client.wire import answer_of, arguments_of, lost_to, settings_of
from clarion.job_request import Duration, JobOptions, JobRequest, requested

R = TypeVar("R")
T = TypeVar("T")

_DEFAULT = ClientOptions()


class Client:
    """Clarion's HTTP API: `with Client() as client:`. Threads may share one.

    The address and the token come from CLARION_URL and CLARION_API_TOKEN unless given. Calls wait out weather of
    bounded length, and none does its work twice. They raise ApiError, or Unreachable.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        options: ClientOptions = _DEFAULT,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        server = find_server(url, token)
        self._calls = Calls(server.url, options)
        self._options = options
        self._http = httpx2.Client(transport=transport, **settings_of(server, options))

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def __repr__(self) -> str:
        """Which server it speaks to."""
        return f"Client({self._calls.url!r})"

    @overload
    def enqueue(self, request: JobRequest[R], /, **options: Unpack[JobOptions]) -> "JobHandle[R]": ...
    @overload
    def enqueue(
        self, request: str, args: Mapping[str, Any] | None = None, /, **options: Unpack[JobOptions]
    ) -> "JobHandle[Any]": ...
    def enqueue(
        self,
        request: JobRequest[Any] | str,
        args: Mapping[str, Any] | None = None,
        /,
        **options: Unpack[JobOptions],
    ) -> "JobHandle[Any]":
        """Enqueues a call of a task, or a task's name with arguments; the job is stored when this returns."""
        asked = requested(request, args, options)
        job = self._run(self._calls.enqueue(asked))
        return JobHandle(self, job.id, asked.result_type)

    def enqueue_many(self, requests: Iterable[JobRequest[R]], /, **options: Unpack[JobOptions]) -> "list[JobHandle[R]]":
        """Enqueues many in their order, up to 1,000 in one request, of which all are stored or none.

        When it raises, earlier thousands are stored: with idempotency keys of your own, the whole can be repeated.
        """
        asked = [request.having(**options) for request in requests]
        refs = self._run(self._calls.enqueue_many(asked))
        return [JobHandle(self, ref.id, one.result_type) for ref, one in zip(refs, asked, strict=True)]

    def handle(self, job_id: UUID | str) -> "JobHandle[Any]":
        """The handle of a job that was enqueued elsewhere; asks nobody. Raises ValueError for what is no id."""
        return JobHandle(self, UUID(str(job_id)))

    def get(self, job_id: UUID | str) -> JobView:
        """The job as it is now."""
        return self._run(self._calls.get_job(job_id))

    def list(self, **filters: Unpack[JobFilters]) -> Iterator[JobSummaryView]:
        """Jobs, newest first, page after page as the loop asks for more."""
        cursor = None
        while True:
            page = self._run(self._calls.list_jobs(filters, cursor))
            yield from page.jobs
            cursor = page.next_cursor
            if cursor is None:
                return

    def cancel(self, job_id: UUID | str, *, reason: str | None = None) -> JobView:
        """Cancels a job: at once if it waits, and by asking its worker if it runs."""
        return self._run(self._calls.cancel(job_id, reason))

    def retry(self, job_id: UUID | str, *, reason: str | None = None) -> JobView:
        """Runs a dead, cancelled or scheduled job now."""
        return self._run(self._calls.retry(job_id, reason))

    def attempts(self, job_id: UUID | str) -> Attempts:
        """The runs of a job, and what else happened to it."""
        return self._run(self._calls.attempts(job_id))

    def logs(self, job_id: UUID | str, *, after: str | int | None = None) -> LogPage:
        """What its handler logged; `after` takes the `next_cursor` of a call before."""
        return self._run(self._calls.logs(job_id, after))

    def _result(self, job_id: UUID, timeout: Duration | None, result_type: Any) -> Any:
        return self._run(self._calls.result(job_id, timeout, result_type))

    def _run(self, flow: Flow[T]) -> T:
        step = advance(flow, None)
        while not isinstance(step, Done):
            step = advance(flow, self._perform(step))
        return step.value

    def _perform(self, step: Step) -> Reply:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        try:
            return answer_of(self._http.request(**arguments_of(step, self._options)))
        except httpx2.RequestError as error:
            return lost_to(error)


class JobHandle(msgspec.Struct, Generic[R], frozen=True):
    """A job that was enqueued; R is what its handler returns."""

    client: Client
    id: UUID
    result_type: Any = Any

    @overload
    def result(self, *, timeout: Duration | None = None) -> R: ...
    @overload
    def result(self, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    def result(self, *, timeout: Duration | None = None, type: Any = None) -> Any:
        """What the handler returned, once it has; `type` is what to read it as, `timeout` the longest wait for it.

        Raises JobDead, JobCancelled, TimeoutError, or UnexpectedResult if it is not of that type.
        """
        return self.client._result(self.id, timeout, self.result_type if type is None else type)

    def refresh(self) -> JobView:
        """The job as it is now."""
        return self.client.get(self.id)

    def cancel(self, *, reason: str | None = None) -> JobView:
        """Cancels it, as `Client.cancel` does."""
        return self.client.cancel(self.id, reason=reason)
