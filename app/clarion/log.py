"""Logging: structlog, JSON unless a person is watching, one canonical line per request and per attempt."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from select import PIPE_BUF

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from clarion.settings import Settings

# structlog's names for two of them.
_LEVEL_NAMES = {"exception": "error", "warn": "warning"}
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logging(settings: Settings) -> None:
    """Sends all log lines to standard error, as `log_format` and `log_level` say."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *(_json_tail() if as_json else _console_tail())],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.log_level]),
        logger_factory=(lambda *_: _LineLogger(sys.stderr.buffer))
        if as_json
        else structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # The libraries' own loggers (uvicorn, asyncpg's pool) speak only when something is wrong.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)


class _HeldBack:
    """Lines that are to be written together. Tasks that were started meanwhile see it too, and long after."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.is_open = True


_held_back: ContextVar[_HeldBack | None] = ContextVar("held_back", default=None)


@contextmanager
def written_together() -> Iterator[None]:
    """What is logged in the block is written at its end: the system call is most of what a line costs.

    For blocks that wait for nothing and run nobody else's code, so that no line is late when it matters.
    """
    held_back = _HeldBack()
    before = _held_back.set(held_back)
    try:
        yield
    finally:
        _held_back.reset(before)
        held_back.is_open = False
        for piece in _pieces(held_back.lines):
            structlog.BytesLogger(sys.stderr.buffer).msg(piece)


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """The lines joined, in pieces that a pipe takes whole: several processes may write to one."""
    piece: list[bytes] = []
    piece_bytes = 0
    for line in lines:
        if piece and piece_bytes + len(line) + 1 > PIPE_BUF:
            yield b"\n".join(piece)
            piece, piece_bytes = [], 0
        piece.append(line)
        piece_bytes += len(line) + 1  # with its end
    if piece:
        yield b"\n".join(piece)


class _LineLogger(structlog.BytesLogger):
    """Writes each line at once and whole, from whichever thread, unless it is to be written together with others."""

    def msg(self, message: bytes) -> None:
        """Writes a line."""
        held_back = _held_back.get()
        if held_back is None or not held_back.is_open:
            super().msg(message)
        else:
            held_back.lines.append(message)

    debug = info = warning = error = msg


def _json_tail() -> list[Processor]:
    return [_format_exception, _render_json]


def _console_tail() -> list[Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
    ]


def _format_exception(logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
    return structlog.processors.format_exc_info(logger, method, event_dict) if "exc_info" in event_dict else event_dict


def _render_json(_logger: WrappedLogger, method: str, event_dict: EventDict) -> bytes:
    """The line, time and level included: with processors of their own for these a line cost half as much again."""
    head = {
        "time": datetime.now(UTC).isoformat()[: -len("+00:00")] + "Z",
        "level": _LEVEL_NAMES.get(method, method),
        "event": event_dict.pop("event"),
    }
    try:
        return msgspec.json.encode({**head, **event_dict, **head}, enc_hook=repr)
    except (UnicodeError, RecursionError):  # a log line must not fail what it tells about
        return msgspec.json.encode({**head, "fields": ascii(event_dict)})
