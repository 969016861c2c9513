"""What handlers say: to the process's log, and, line by line, to the job's own.

Lines go to the database in sets, a moment after they were said and at the latest before the attempt ends, since then
its token holds nothing any more. They are numbered, so that a call whose answer was lost can be repeated.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any
from uuid import UUID

import anyio
import msgspec
import structlog
from structlog.typing import FilteringBoundLogger

from clarion.endings import Endings
from clarion.errors import Unavailable, Unstorable
from clarion.events import Event
from clarion.execution import Lease, LogLine
from clarion.loops import Signal
from clarion.texts import LINE_FIELDS_MAX_BYTES, LINE_MESSAGE_MAX_CHARS, storable

log = structlog.get_logger()

_CALL_MAX_LINES = 500
_FLUSH_SECONDS = 0.25
_CLOSE_SECONDS = 1.5


# Takes a line that is to be kept with the job: its level, its message, its fields.
Keep = Callable[[str, str, dict[str, Any]], None]


class Lines:
    """The log lines of one attempt that are not stored yet; up to `lines_max` in all."""

    def __init__(self, lease: Lease, endings: Endings, *, lines_max: int) -> None:
        self._lease = lease
        self._endings = endings
        self._lines_max = lines_max
        self._numbers = count(1)
        self._waiting: list[LogLine] = []
        self._unsaid = 0
        self.closed = False  # the token is about to hold nothing any more
        self._flushing = anyio.Lock()

    @property
    def job_id(self) -> UUID:
        """Whose lines they are."""
        return self._lease.id

    @property
    def unstored(self) -> bool:
        """Whether anything was said that is not stored yet, or that it is too much to be stored."""
        return bool(self._waiting or self._unsaid)

    @property
    def waiting(self) -> bool:
        """Whether there is something to flush."""
        return bool(self._waiting)

    def add(self, level: str, message: str, fields: dict[str, Any]) -> None:
        """Takes a line; from any thread. Those beyond the limit are only counted."""
        if self.closed:
            return
        n = next(self._numbers)
        if n >= self._lines_max:  # the last place is for saying so
            self._unsaid += 1
            return
        self._waiting.append(
            LogLine(
                id=self._lease.id,
                token=self._lease.token,
                n=n,
                level=level,
                message=storable(message, LINE_MESSAGE_MAX_CHARS),
                fields=fields_json(fields) if fields else None,
            )
        )

    async def flush(self) -> None:
        """Stores what waits. Raises Unavailable in weather, and keeps it; drops it when the lease is lost."""
        async with self._flushing:
            while self._waiting:
                lines = self._waiting[:_CALL_MAX_LINES]
                try:
                    await self._endings.log(lines)
                except Unstorable as error:
                    log.warning(Event.LINES_DROPPED, job_id=str(self._lease.id), lines=len(lines), error=str(error))
                del self._waiting[: len(lines)]

    async def close(self) -> None:
        """Stores the last lines, if the database answers now: an attempt's end does not wait for them."""
        self.closed = True
        if self._unsaid:
            self._waiting.append(
                LogLine(
                    id=self._lease.id,
                    token=self._lease.token,
                    n=self._lines_max,
                    level="warning",
                    message=f"{self._unsaid} more lines of this attempt were not kept",
                )
            )
        try:
            await self.flush()
        except Unavailable as error:
            lines = len(self._waiting)
            log.warning(Event.LINES_DROPPED, job_id=str(self._lease.id), lines=lines, error=str(error))


class LineKeeper:
    """Flushes the lines of all running attempts every so often; ticks only while there are some."""

    def __init__(self) -> None:
        self._open: set[Lines] = set()
        self._opened = Signal()

    def open(self, lines: Lines) -> None:
        """Keeps the lines of an attempt from now on."""
        self._open.add(lines)
        self._opened.set()

    def has_closed(self, lines: Lines) -> bool:
        """Closes them without a wait, where all that was said is stored; whether it could."""
        if lines.unstored:
            return False
        lines.closed = True
        self._open.discard(lines)
        return True

    async def close(self, lines: Lines) -> None:
        """Stores the last of them; the outcome, which is known by now, waits a moment for that and no longer."""
        self._open.discard(lines)
        with anyio.move_on_after(_CLOSE_SECONDS) as scope:
            await lines.close()
        if scope.cancelled_caught:
            log.warning(Event.LINES_DROPPED, job_id=str(lines.job_id), error="the database does not answer")

    async def step(self) -> float:
        """Stores what was said since the last step. Weather is waited out at the next."""
        if not self._open:
            await self._opened.wait()
        async with anyio.create_task_group() as group:
            for lines in self._open:
                if lines.waiting and not lines.closed:
                    group.start_soon(_flush, lines)
        return _FLUSH_SECONDS


async def _flush(lines: Lines) -> None:
    with suppress(Unavailable):
        await lines.flush()


class HandlerLog:
    """`ctx.log`: structlog's methods, bound to the job; what passes the log level is kept with the job too."""

    def __init__(self, bound: FilteringBoundLogger, keep: Keep, fields: dict[str, Any] | None = None) -> None:
        self._bound = bound
        self._keep = keep
        self._fields = fields or {}

    def bind(self, **fields: Any) -> "HandlerLog":
        """A log whose lines all carry these fields."""
        return HandlerLog(self._bound.bind(**fields), self._keep, self._fields | fields)

    def debug(self, message: object, /, *args: Any, **fields: Any) -> None:
        """Details."""
        self._say("debug", message, args, fields)

    def info(self, message: object, /, *args: Any, **fields: Any) -> None:
        """What is worth knowing."""
        self._say("info", message, args, fields)

    def warning(self, message: object, /, *args: Any, **fields: Any) -> None:
        """What may be wrong."""
        self._say("warning", message, args, fields)

    def error(self, message: object, /, *args: Any, **fields: Any) -> None:
        """What is wrong."""
        self._say("error", message, args, fields)

    def exception(self, message: object, /, *args: Any, **fields: Any) -> None:
        """What is wrong, with the traceback of the exception that is being handled."""
        self._say("error", message, args, {"exc_info": True} | fields)

    def _say(self, level: str, message: object, args: tuple[Any, ...], fields: dict[str, Any]) -> None:
        getattr(self._bound, level)(message, *args, **fields)
        if self._bound.is_enabled_for(_LEVELS[level]):
            event = structlog.processors.format_exc_info(None, level, {**self._fields, **fields})
            text = message if isinstance(message, str) else str(message)
            self._keep(level, text % args if args else text, dict(event))


_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def fields_json(fields: dict[str, Any]) -> str:
    """The fields as JSON that Postgres will keep; cut down to their texts where they are too large or no JSON."""
    try:
        encoded = msgspec.json.encode(fields, enc_hook=repr)
    except (TypeError, ValueError, RecursionError):
        encoded = msgspec.json.encode({"fields": storable(ascii(list(fields)), LINE_FIELDS_MAX_BYTES // 2)})
    if len(encoded) > LINE_FIELDS_MAX_BYTES or b"\\u0000" in encoded:
        text = storable(encoded.decode().replace("\\u0000", "\N{REPLACEMENT CHARACTER}"), LINE_FIELDS_MAX_BYTES // 2)
        encoded = msgspec.json.encode({"fields": text})
    return encoded.decode()
