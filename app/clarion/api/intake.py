"""Taking in a stream of jobs: decoded line by line, enqueued in chunks, one answer per line, in order.

While Postgres adds one chunk, the next is read and decoded. A bad line costs only itself. When the database goes away,
what was committed keeps its ids and every later line is answered with the same problem, untried: a client then knows
which lines to send again.
"""

from collections.abc import Sequence
from uuid import UUID

import anyio
import anyio.to_thread
import msgspec
from starlette.types import Receive, Scope, Send

from clarion.api.decoding import INLINE_MAX_BYTES, Nothing, decode
from clarion.api.idempotency import Keyed, derived_key, differences, mismatch, new_jobs_now
from clarion.api.operation import Call
from clarion.api.problems import ProblemOut, problem_out
from clarion.api.requests import NDJSON
from clarion.api.schemas import JobIn
from clarion.enqueuer import enqueue_each
from clarion.errors import ClarionError, IdempotencyInFlight, Overloaded, TooLarge, Unavailable, Unstorable
from clarion.job import Enqueued, NewJob

# A chunk is one statement: so many lines, or so many bytes of them, whichever comes first.
CHUNK_MAX_LINES = 1_000
CHUNK_MAX_BYTES = 4_194_304
# The search for a key in flight waits for it at each step, for as long as the time limit on locks: some ten steps. Of a
# chunk with more of them, what is not found by then is not tried any more.
IN_FLIGHT_MAX = 12
# Answers up to this size stay in memory; above it they go to a temporary file.
SPOOL_MEMORY_BYTES = 1_048_576
_SEND_BYTES = 65_536
_ENCODER = msgspec.json.Encoder()

Answer = Enqueued | ClarionError


class LineAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one line: the job's id and state, or the problem and the line's number."""

    id: UUID | None = None
    state: str | None = None
    replayed: bool = False
    error: ProblemOut | None = None
    line: int | None = None


class _Chunk(msgspec.Struct):
    """Lines that become one statement: their numbers, and jobs or errors; `held_bytes` of the request's share."""

    items: list[tuple[int, NewJob | ClarionError]] = []
    held_bytes: int = 0


class Intake:
    """The lines of one request. `take` each and `close` at the end, beside `run`; then the answers are in the spool.

    The n-th line that is not blank, counted from 0, has the key `header_key/n`, unless it has one of its own.
    """

    def __init__(
        self, call: Call[Nothing, Nothing], spool: anyio.SpooledTemporaryFile[bytes], header_key: str | None
    ) -> None:
        self._call = call
        self._spool = spool
        self._header_key = header_key
        self._actor = call.actor
        self._line = 0
        self._place = 0
        self._chunk = _Chunk()
        self._chunk_bytes = 0
        # No buffer: one chunk is being added, and one waits for that with the request.
        self._full, self._to_add = anyio.create_memory_object_stream[_Chunk](0)
        self._outage: Unavailable | None = None
        self._in_flight: list[IdempotencyInFlight] = []

    async def take(self, line: bytes | None) -> None:
        """Decodes a line, None being one that was too long to hold; waits for the chunk before a full one."""
        self._line += 1
        if line is not None and not line.strip():
            return
        self._chunk.items.append((self._line, await self._decode(line)))
        self._place += 1
        self._chunk_bytes += len(line or b"")
        if len(self._chunk.items) >= CHUNK_MAX_LINES or self._chunk_bytes >= CHUNK_MAX_BYTES:
            await self._hand_over()

    async def close(self, *, complete: bool) -> None:
        """Ends `run` once all is added; what is not a whole chunk is dropped where the request is not complete."""
        with self._full:
            if complete and self._chunk.items:
                await self._hand_over()

    async def run(self) -> None:
        """Adds one chunk after the other and writes their answers, until `close`."""
        with self._to_add:
            async for chunk in self._to_add:
                self._in_flight = []
                jobs = [item for _, item in chunk.items if isinstance(item, NewJob)]
                answers = map(_checked, jobs, await self._enqueue(jobs))
                lines = [
                    self._line_answer(line, item if isinstance(item, ClarionError) else next(answers))
                    for line, item in chunk.items
                ]
                self._call.share.give_back(chunk.held_bytes)
                await self._spool.write(_ENCODER.encode_lines(lines))

    async def _hand_over(self) -> None:
        chunk, self._chunk, self._chunk_bytes = self._chunk, _Chunk(), 0
        await self._full.send(chunk)

    async def _decode(self, line: bytes | None) -> NewJob | ClarionError:
        if line is None:
            return TooLarge(f"the line is over {self._call.services.settings.body_max_bytes} bytes")
        try:
            self._call.share.take(len(line))
        except Overloaded as error:
            return error
        self._chunk.held_bytes += len(line)
        if len(line) <= INLINE_MAX_BYTES:
            return self._decode_now(line)
        return await anyio.to_thread.run_sync(self._decode_now, line)

    def _decode_now(self, line: bytes) -> NewJob | ClarionError:
        try:
            job = decode(line, JobIn)
            key = job.idempotency_key or derived_key(self._header_key, self._place)
            [new] = new_jobs_now([Keyed(job, key)], self._actor)
        except ClarionError as error:
            return error
        return new

    async def _enqueue(self, jobs: Sequence[NewJob]) -> list[Answer]:
        untried = self._in_flight[-1] if len(self._in_flight) >= IN_FLIGHT_MAX else self._outage
        if untried or not jobs:
            return [untried for _ in jobs if untried]
        try:
            return [*await enqueue_each(self._call.services.enqueuer.enqueue, jobs)]
        except (IdempotencyInFlight, Unstorable) as error:
            if isinstance(error, IdempotencyInFlight):
                self._in_flight.append(error)
            # Somewhere in here is what cannot be added: halve until it stands alone.
            half = len(jobs) // 2
            return [error] if not half else await self._enqueue(jobs[:half]) + await self._enqueue(jobs[half:])
        except Unavailable as error:
            self._outage = error
            return [error for _ in jobs]

    def _line_answer(self, line: int, answer: Answer) -> LineAnswer:
        if isinstance(answer, ClarionError):
            return LineAnswer(error=problem_out(self._call.request, answer), line=line)
        return LineAnswer(id=answer.id, state=answer.state, replayed=answer.request is not None)


def _checked(job: NewJob, answer: Answer) -> Answer:
    """The answer to this job, unless its key stands for another request."""
    if isinstance(answer, ClarionError) or answer.request is None:
        return answer
    errors = differences(job.request, answer.request)
    return mismatch(errors) if errors else answer


class SpooledAnswer:
    """Sends what is in a spool, as the answer, and closes it."""

    def __init__(self, spool: anyio.SpooledTemporaryFile[bytes], *, size: int) -> None:
        self._spool = spool
        self._headers = [(b"content-type", NDJSON.encode()), (b"content-length", str(size).encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        async with self._spool:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await self._spool.seek(0)
            while part := await self._spool.read(_SEND_BYTES):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
