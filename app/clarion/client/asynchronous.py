"""The client for code that awaits, on asyncio or trio."""

from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack, overload
from uuid import UUID

import anyio
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


class AsyncClient:
    """Clarion's HTTP API: `async with AsyncClient() as client:`.

    The address and the token come from CLARION_URL and CLARION_API_TOKEN unless given. Calls wait out weather of
    bounded length, and none does its work twice. They raise ApiError, or Unreachable.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        options: ClientOptions = _DEFAULT,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        server = find_server(url, token)
        self._calls = Calls(server.url, options)
        self._options = options
        self._http = httpx2.AsyncClient(transport=transport, **settings_of(server, options))

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it."""
        await self.aclose()

    async def aclose(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    def __repr__(self) -> str:
        """Which server it speaks to."""
        return f"AsyncClient({self._calls.url!r})"

    @overload
    async def enqueue(self, request: JobRequest[R], /, **options: Unpack[JobOptions]) -> "AsyncJobHandle[R]": ...
    @overload
    async def enqueue(
        self, request: str, args: Mapping[str, Any] | None = None, /, **options: Unpack[JobOptions]
    ) -> "AsyncJobHandle[Any]": ...
    async def enqueue(
        self,
        request: JobRequest[Any] | str,
        args: Mapping[str, Any] | None = None,
        /,
        **options: Unpack[JobOptions],
    ) -> "AsyncJobHandle[Any]":
        """Enqueues a call of a task, or a task's name with arguments; the job is stored when this returns."""
        asked = requested(request, args, options)
        job = await self._run(self._calls.enqueue(asked))
        return AsyncJobHandle(self, job.id, asked.result_type)

    async def enqueue_many(
        self, requests: Iterable[JobRequest[R]], /, **options: Unpack[JobOptions]
    ) -> "list[AsyncJobHandle[R]]":
        """Enqueues many in their order, up to 1,000 in one request, of which all are stored or none.

        When it raises, earlier thousands are stored: with idempotency keys of your own, the whole can be repeated.
        """
        asked = [request.having(**options) for request in requests]
        refs = await self._run(self._calls.enqueue_many(asked))
        return [AsyncJobHandle(self, ref.id, one.result_type) for ref, one in zip(refs, asked, strict=True)]

    def handle(self, job_id: UUID | str) -> "AsyncJobHandle[Any]":
        """The handle of a job that was enqueued elsewhere; asks nobody. Raises ValueError for what is no id."""
        return AsyncJobHandle(self, UUID(str(job_id)))

    async def get(self, job_id: UUID | str) -> JobView:
        """The job as it is now."""
        return await self._run(self._calls.get_job(job_id))

    async def list(self, **filters: Unpack[JobFilters]) -> AsyncIterator[JobSummaryView]:
        """Jobs, newest first, page after page as the loop asks for more."""
        cursor = None
        while True:
            page = await self._run(self._calls.list_jobs(filters, cursor))
            for job in page.jobs:
                yield job
            cursor = page.next_cursor
            if cursor is None:
                return

    async def cancel(self, job_id: UUID | str, *, reason: str | None = None) -> JobView:
        """Cancels a job: at once if it waits, and by asking its worker if it runs."""
        return await self._run(self._calls.cancel(job_id, reason))

    async def retry(self, job_id: UUID | str, *, reason: str | None = None) -> JobView:
        """Runs a dead, cancelled or scheduled job now."""
        return await self._run(self._calls.retry(job_id, reason))

    async def attempts(self, job_id: UUID | str) -> Attempts:
        """The runs of a job, and what else happened to it."""
        return await self._run(self._calls.attempts(job_id))

    async def logs(self, job_id: UUID | str, *, after: str | int | None = None) -> LogPage:
        """What its handler logged; `after` takes the `next_cursor` of a call before."""
        return await self._run(self._calls.logs(job_id, after))

    async def _result(self, job_id: UUID, timeout: Duration | None, result_type: Any) -> Any:
        return await self._run(self._calls.result(job_id, timeout, result_type))

    async def _run(self, flow: Flow[T]) -> T:
        step = advance(flow, None)
        while not isinstance(step, Done):
            step = advance(flow, await self._perform(step))
        return step.value

    async def _perform(self, step: Step) -> Reply:
        if isinstance(step, Pause):
            await anyio.sleep(step.seconds)
            return None
        try:
            return answer_of(await self._http.request(**arguments_of(step, self._options)))
        except httpx2.RequestError as error:
            return lost_to(error)


class AsyncJobHandle(msgspec.Struct, Generic[R], frozen=True):
    """A job that was enqueued; R is what its handler returns."""

    client: AsyncClient
    id: UUID
    result_type: Any = Any

    @overload
    async def result(self, *, timeout: Duration | None = None) -> R: ...
    @overload
    async def result(self, *, timeout: Duration | None = None, type: type[T]) -> T: ...
    async def result(self, *, timeout: Duration | None = None, type: Any = None) -> Any:
        """What the handler returned, once it has; `type` is what to read it as, `timeout` the longest wait for it.

        Raises JobDead, JobCancelled, TimeoutError, or UnexpectedResult if it is not of that type.
        """
        return await self.client._result(self.id, timeout, self.result_type if type is None else type)

    async def refresh(self) -> JobView:
        """The job as it is now."""
        return await self.client.get(self.id)

    async def cancel(self, *, reason: str | None = None) -> JobView:
        """Cancels it, as `AsyncClient.cancel` does."""
        return await self.client.cancel(self.id, reason=reason)
