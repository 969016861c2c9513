"""Taking in a stream of jobs: decoded line by line, enqueued in chunks, one answer per line, in order.

A bad line costs only itself. When the database goes away, what was committed keeps its ids and every later line is
answered with the same problem, untried: a client then knows which lines to send again.
"""

from collections.abc import Sequence

import anyio
import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from clarion.api.decoding import decode_body
from clarion.api.problems import ProblemOut, problem_out
from clarion.api.requests import NDJSON
from clarion.api.schemas import JobIn
from clarion.api.services import Services
from clarion.errors import ClarionError, TooLarge, Unavailable, Unstorable
from clarion.job import Enqueued, NewJob

# A chunk is one statement: so many lines, or so many bytes of them, whichever comes first.
CHUNK_MAX_LINES = 1_000
CHUNK_MAX_BYTES = 4_194_304
# Answers up to this size stay in memory; above it they go to a temporary file.
SPOOL_MEMORY_BYTES = 1_048_576
_SEND_BYTES = 65_536


class LineAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one line: the job's id and state, or the problem and the line's number."""

    id: str | None = None
    state: str | None = None
    error: ProblemOut | None = None
    line: int | None = None


class Intake:
    """The lines of one request. `take` each, `flush` at the end; the answers are in the spool then."""

    def __init__(self, request: Request, services: Services, spool: anyio.SpooledTemporaryFile[bytes]) -> None:
        self._request = request
        self._services = services
        self._spool = spool
        self._line = 0
        self._chunk: list[tuple[int, NewJob | ClarionError]] = []
        self._chunk_bytes = 0
        self._outage: Unavailable | None = None

    async def take(self, line: bytes | None) -> None:
        """Decodes a line, None being one that was too long to hold; enqueues when a chunk is full."""
        self._line += 1
        if line is not None and not line.strip():
            return
        self._chunk.append((self._line, await self._decode(line)))
        self._chunk_bytes += len(line or b"")
        if len(self._chunk) >= CHUNK_MAX_LINES or self._chunk_bytes >= CHUNK_MAX_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Enqueues what was taken and writes the answers."""
        chunk, self._chunk, self._chunk_bytes = self._chunk, [], 0
        answers = iter(await self._enqueue([item for _, item in chunk if isinstance(item, NewJob)]))
        lines = [(line, item if isinstance(item, ClarionError) else next(answers)) for line, item in chunk]
        await self._spool.write(b"".join(self._encode(line, answer) for line, answer in lines))

    async def _decode(self, line: bytes | None) -> NewJob | ClarionError:
        try:
            if line is None:
                raise TooLarge(f"the line is over {self._services.settings.body_max_bytes} bytes")
            return (await decode_body(line, JobIn)).to_new_job()
        except ClarionError as error:
            return error

    async def _enqueue(self, jobs: Sequence[NewJob]) -> list[Enqueued | ClarionError]:
        if self._outage or not jobs:
            return [self._outage for _ in jobs if self._outage]
        try:
            return list(await self._services.enqueuer.enqueue(jobs))
        except Unavailable as error:
            self._outage = error
            return [error for _ in jobs]
        except Unstorable as error:
            # Somewhere in here is what Postgres refuses: halve until it stands alone.
            half = len(jobs) // 2
            return [error] if not half else await self._enqueue(jobs[:half]) + await self._enqueue(jobs[half:])

    def _encode(self, line: int, answer: Enqueued | ClarionError) -> bytes:
        if isinstance(answer, ClarionError):
            shown = LineAnswer(error=problem_out(self._request, answer), line=line)
        else:
            shown = LineAnswer(id=str(answer.id), state=answer.state)
        return msgspec.json.encode(shown) + b"\n"


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
