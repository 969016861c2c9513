"""What becomes of an attempt: the exceptions a handler may raise on purpose, and the records they turn into."""

import traceback

from clarion.durations import parse_duration
from clarion.execution import AttemptOutcome, Failure, Lease
from clarion.job import DeadReason
from clarion.texts import ERROR_MESSAGE_MAX_CHARS, ERROR_TRACE_MAX_CHARS, ERROR_TYPE_MAX_CHARS, storable

SNOOZE_MAX_SECONDS = 365 * 86_400.0


class Snooze(Exception):
    """Raised by a handler to be run again later: `raise Snooze("5m")`. Costs no attempt."""

    def __init__(self, delay: str | float) -> None:
        self.delay_seconds = parse_duration(delay, max_seconds=SNOOZE_MAX_SECONDS)
        super().__init__(f"again in {delay}")


class Retry(Exception):
    """Raised by a handler to fail this attempt and say when the next one is: `raise Retry("10m", "quota used up")`."""

    def __init__(self, delay: str | float, reason: str = "the handler asked for another try") -> None:
        self.delay_seconds = parse_duration(delay, max_seconds=SNOOZE_MAX_SECONDS)
        super().__init__(reason)


class Cancelled(BaseException):
    """Raised in a handler's own thread or process when its job was cancelled; like CancelledError, let it through."""


class Discard(Exception):
    """Raised by a handler when no further try can help: the job is dead at once, with this reason."""


def failure(lease: Lease, error: BaseException, *, dead_reason: DeadReason | None = None) -> Failure:
    """The record of a handler's exception, bounded, and free of what Postgres cannot store."""
    message, trace = _texts(error)
    return Failure(
        id=lease.id,
        token=lease.token,
        error_type=storable(type(error).__name__, ERROR_TYPE_MAX_CHARS),
        error_message=storable(message, ERROR_MESSAGE_MAX_CHARS),
        error_trace=storable(trace, ERROR_TRACE_MAX_CHARS),
        retry_in_seconds=error.delay_seconds if isinstance(error, Retry) else None,
        dead_reason=dead_reason,
    )


def _texts(error: BaseException) -> tuple[str, str]:
    """The exception's message and trace, as far as it lets itself be printed."""
    try:
        return str(error), "".join(traceback.format_exception(error))
    except BaseException as flaw:  # noqa: BLE001  somebody's __str__, __notes__ or __cause__ may raise anything
        text = f"{type(error).__name__}, whose text cannot be had: {type(flaw).__name__}"
        return text, "".join(traceback.format_tb(error.__traceback__))


def timed_out(lease: Lease) -> Failure:
    """The record of an attempt that the worker ended at its timeout."""
    return Failure(
        id=lease.id,
        token=lease.token,
        outcome=AttemptOutcome.TIMEOUT,
        error_type="AttemptTimeout",
        error_message=f"the handler ran longer than its timeout of {lease.timeout_seconds:g} s",
    )
