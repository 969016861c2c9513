"""Logging: structlog, JSON unless a person is watching, one canonical line per request and per attempt."""

import logging
import sys

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from clarion.settings import Settings

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logging(settings: Settings) -> None:
    """Sends all log lines to standard error, as `log_format` and `log_level` say."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            *(_json_tail() if as_json else _console_tail()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.log_level]),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer)
        if as_json
        else structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # The libraries' own loggers (uvicorn, asyncpg's pool) speak only when something is wrong.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)


def _json_tail() -> list[Processor]:
    return [structlog.processors.format_exc_info, _render_json]


def _console_tail() -> list[Processor]:
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]


def _render_json(_logger: WrappedLogger, _method: str, event_dict: EventDict) -> bytes:
    head = {key: event_dict.pop(key) for key in ("time", "level", "event")}
    try:
        return msgspec.json.encode({**head, **event_dict}, enc_hook=repr)
    except (UnicodeError, RecursionError):  # a log line must not fail what it tells about
        return msgspec.json.encode({**head, "fields": ascii(event_dict)})
