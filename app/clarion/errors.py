"""Every error Clarion raises on purpose, and the HTTP problem each becomes (RFC 9457).

Two sorts. *Weather* (`Unavailable`: the database is away, locked or slow) is logged, waited out and tried
again. Every other `ClarionError` is an answer to the caller. Anything that is neither is a bug: it ends the
process, and the leases make that safe.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec


class Problem(msgspec.Struct, frozen=True):
    """What an error looks like over HTTP: its stable `type` is `/problems/<slug>`."""

    slug: str
    status: int
    title: str
    retryable: bool
    explanation: str


class FieldError(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing wrong with a request: where (a JSON pointer into the body, or a parameter) and what."""

    detail: str
    pointer: str | None = None
    parameter: str | None = None


class ClarionError(Exception):
    """An error that names its own HTTP problem; `str(error)` is the problem's `detail`."""

    problem: ClassVar[Problem] = Problem(
        "internal",
        500,
        "Internal error",
        False,
        "A bug in Clarion. The log line with this request_id tells more.",
    )

    def __init__(self, detail: str, *, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.errors = tuple(errors)

    def members(self) -> dict[str, object]:
        """What the problem document says besides (RFC 9457, section 3.2)."""
        return {}


class Unavailable(ClarionError):
    """Weather: the database cannot be reached or cannot answer in time. Nothing was acknowledged."""

    problem = Problem(
        "unavailable", 503, "Service unavailable", True,
        "The database is away or too slow. The outcome of a write is unknown; wait for Retry-After and try again.",
    )  # fmt: skip
    retry_after_seconds = 1


class Overloaded(Unavailable):
    """A bounded buffer or pool is full; nothing was started."""

    problem = Problem(
        "overloaded", 503, "Overloaded", True,
        "More work is waiting than the configured bound. Nothing was done; wait for Retry-After and try again.",
    )  # fmt: skip


class Malformed(ClarionError):
    """The body is not what its media type says it is."""

    problem = Problem("malformed", 400, "Malformed request", False, "The body is not valid JSON in UTF-8.")


class Invalid(ClarionError):
    """The request can be read but breaks a rule; `errors` lists every broken rule with its place."""

    problem = Problem(
        "invalid",
        422,
        "Invalid request",
        False,
        "One or more fields break a rule; `errors` lists all of them.",
    )


class Unauthenticated(ClarionError):
    """No token, or one that is not known."""

    problem = Problem(
        "unauthenticated", 401, "Authentication required", False,
        "Send `Authorization: Bearer <token>` with the token from CLARION_API_TOKEN.",
    )  # fmt: skip


class Forbidden(ClarionError):
    """Known or not, the caller may not do this."""

    problem = Problem(
        "forbidden", 403, "Forbidden", False, "A web page of another site asked for this; its visitor did not."
    )


class NotFound(ClarionError):
    """There is no such thing, or no such route."""

    problem = Problem("not-found", 404, "Not found", False, "Nothing has this address, or retention removed it.")


class MethodNotAllowed(ClarionError):
    """The route exists, the method does not; the `Allow` header lists those that do."""

    problem = Problem("method-not-allowed", 405, "Method not allowed", False, "See the Allow header.")


class TooLarge(ClarionError):
    """A body, or a part of it, is over its bound in bytes."""

    problem = Problem("too-large", 413, "Content too large", False, "The body is over a bound; send less at once.")


class RequestTimeout(ClarionError):
    """The body stopped arriving."""

    problem = Problem(
        "request-timeout", 408, "Request timeout", True, "The body stopped arriving; send the request again."
    )


class UnsupportedMediaType(ClarionError):
    """The body's media type is not one that the route reads."""

    problem = Problem(
        "unsupported-media-type", 415, "Unsupported media type", False, "Send JSON as `application/json`."
    )


class Unstorable(ClarionError):
    """Postgres refuses a value (a NUL, a number out of range, too large); its neighbours are unharmed."""

    problem = Problem("unstorable", 422, "Value cannot be stored", False, "Postgres refuses the value as it is.")


class LeaseLost(ClarionError):
    """The token holds no job any more: it expired and was taken back, or was ended otherwise. Nothing was changed."""

    problem = Problem(
        "lease-lost", 409, "Lease lost", False,
        "The lease token is not the job's present one: drop the outcome. `state` is the job's present state.",
    )  # fmt: skip

    def __init__(self, detail: str = "this lease token does not hold the job any more", *, state: str | None = None):
        super().__init__(detail)
        self.state = state

    def members(self) -> dict[str, object]:
        """The job's present state; null when it does not exist."""
        return {"state": self.state}


class IllegalTransition(ClarionError):
    """The job is in a state from which this cannot be done; the text names both states."""

    problem = Problem(
        "illegal-transition", 409, "Illegal transition", False,
        "The job's present state, `state`, does not allow this; nothing was changed.",
    )  # fmt: skip

    def __init__(self, detail: str, *, state: str) -> None:
        super().__init__(detail)
        self.state = state

    def members(self) -> dict[str, object]:
        """The job's present state."""
        return {"state": self.state}


class IdempotencyMismatch(ClarionError):
    """The key was used for another request; `errors` names what differs."""

    problem = Problem(
        "idempotency-mismatch", 422, "Idempotency key used for another request", False,
        "The same key came with a different request before. Repeat that request exactly, or use a new key.",
    )  # fmt: skip


class IdempotencyInFlight(Unavailable):
    """Another request with this key is being committed, and takes long."""

    problem = Problem(
        "idempotency-in-flight", 409, "Request with this idempotency key in progress", True,
        "Another request with this key has not been answered yet; wait for Retry-After and repeat this one.",
    )  # fmt: skip


class PreconditionFailed(ClarionError):
    """The job has changed since the caller read it."""

    problem = Problem(
        "precondition-failed", 412, "Precondition failed", False,
        "The job is not the version that If-Match names: read it again and decide anew.",
    )  # fmt: skip


class PreconditionRequired(ClarionError):
    """This change needs to know which version it is meant for."""

    problem = Problem(
        "precondition-required", 428, "Precondition required", False,
        "Send `If-Match` with the ETag of the job that you read.",
    )  # fmt: skip


class ResultUnstorable(ClarionError):
    """The result cannot be kept (a NUL, half a surrogate pair, too deep, too large); the job is dead for it."""

    problem = Problem(
        "result-unstorable", 422, "Result cannot be stored", False,
        "The job is dead with the reason `result_unstorable`: running it again would give the same result.",
    )  # fmt: skip


class UnsafeGround(ClarionError):
    """Start-up refuses a database on which Clarion's promises cannot be kept; the text names the fix."""


class UsageError(ClarionError):
    """A command, setting or worker file is wrong; the text names the fix."""


def problems() -> list[Problem]:
    """Every problem a client can meet, by slug."""
    found = {cls.problem.slug: cls.problem for cls in _family(ClarionError)}
    return [found[slug] for slug in sorted(found)]


def _family(cls: type[ClarionError]) -> list[type[ClarionError]]:
    return [cls, *(member for child in cls.__subclasses__() for member in _family(child))]
