"""The talk with the API without its I/O: what to send, when to send it again, what an answer means.

Each call is a generator that yields steps, `Ask` or `Pause`, and is sent what came of them: an `Answer`, `Lost`, or
None after a pause. The two clients differ only in how they do a step, so that all decisions stand here once, and tests
need neither server nor clock.
"""

from collections.abc import Generator, Mapping
from decimal import Decimal, InvalidOperation
from math import inf, isfinite
from time import monotonic
from typing import Generic, TypeAlias, TypeVar

import msgspec

from clarion.client.errors import ApiError, Unreachable, error_of, excerpt, read_problem, unknown_problem
from clarion.client.options import ClientOptions
from clarion.loops import backoff_seconds

T = TypeVar("T")

# How long an answer may take on its way when the time for it is over.
_GRACE_SECONDS = 1.0


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A request to send; the answer may take as long as `timeout_seconds`."""

    method: str
    path: str
    query: Mapping[str, str] = {}
    body: bytes | None = None
    timeout_seconds: float


class Pause(msgspec.Struct, frozen=True):
    """A wait before the next step."""

    seconds: float


class Answer(msgspec.Struct, frozen=True):
    """What the server said; the names of the headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Lost(msgspec.Struct, frozen=True):
    """No answer came, and why."""

    reason: str
    cause: Exception | None = None


class Done(msgspec.Struct, Generic[T], frozen=True):
    """A call has come to its end."""

    value: T


Step: TypeAlias = Ask | Pause
Reply: TypeAlias = Answer | Lost | None
Flow: TypeAlias = Generator[Step, Reply, T]


def advance(flow: Flow[T], reply: Reply) -> Step | Done[T]:
    """The call's next step, or its end; raises what the call raises."""
    try:
        return flow.send(reply)
    except StopIteration as end:
        return Done(end.value)


def exchange(ask: Ask, url: str, options: ClientOptions, *, give_up_at: float = inf) -> Flow[Answer]:
    """The answer to a request that is safe to repeat, through weather of bounded length.

    `give_up_at`, on the monotonic clock, is the caller's own bound. Raises the API's problem as ApiError, or
    Unreachable; TimeoutError from either when the weather outlasts the caller's bound.
    """
    failures = 0
    retry_until = inf
    while True:
        reply = yield _bounded(ask, give_up_at - monotonic())
        if isinstance(reply, Answer) and 200 <= reply.status < 300:
            return reply
        failures += 1
        if failures == 1:
            retry_until = monotonic() + options.retry_seconds
        error = _error_in(reply, url)
        pause_seconds = _retry_after_seconds(reply) + backoff_seconds(failures)
        is_weather = isinstance(error, Unreachable) or error.retryable
        resume_at = monotonic() + pause_seconds
        if is_weather and resume_at > give_up_at:
            raise TimeoutError(f"{ask.method} {ask.path} had no answer in time: {error}") from error
        if not is_weather or resume_at > retry_until:
            raise error
        yield Pause(pause_seconds)


def read_answer(answer: Answer, kind: type[T], url: str) -> T:
    """The body as a struct; raises ApiError when somebody else than Clarion must have sent it."""
    try:
        return msgspec.json.Decoder(kind, float_hook=_number).decode(answer.body)
    except msgspec.DecodeError as error:
        detail = (
            f"what answers at {url} is not Clarion's API, or another version of it: {error}: {excerpt(answer.body)}"
        )
        raise ApiError(unknown_problem(answer.status, detail)) from None


def _bounded(ask: Ask, left_seconds: float) -> Ask:
    """The request with a timeout that outlasts what is left by no more than an answer on its way may take."""
    longest_seconds = max(0.0, left_seconds) + _GRACE_SECONDS
    return msgspec.structs.replace(ask, timeout_seconds=min(ask.timeout_seconds, longest_seconds))


def _number(text: str) -> float | Decimal:
    """A number of a payload, which may be beyond what a float can hold."""
    number = float(text)
    if isfinite(number):
        return number
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(f"number out of range: {text}") from None


def _error_in(reply: Reply, url: str) -> ApiError | Unreachable:
    if isinstance(reply, Answer):
        return error_of(read_problem(reply.status, reply.body, reply.headers.get("x-request-id", "")))
    error = Unreachable(url, reply.reason if reply else "no reply")
    error.__cause__ = reply.cause if reply else None
    return error


def _retry_after_seconds(reply: Reply) -> float:
    """The least wait that the server asks for. A date, which only some proxies send, is left to the backoff."""
    text = reply.headers.get("retry-after", "") if isinstance(reply, Answer) else ""
    return float(text) if text.isascii() and text.isdigit() else 0.0
