"""Where the server is, and how patient its clients are."""

import os
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from clarion.errors import UsageError

URL_VARIABLE = "CLARION_URL"
TOKEN_VARIABLE = "CLARION_API_TOKEN"  # noqa: S105  the name of a variable, not a token
# Where `clarion dev` and `clarion serve` answer unless told otherwise.
DEFAULT_URL = "http://127.0.0.1:8080"


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a client behaves; seconds and counts as each name says."""

    connect_timeout_seconds: Annotated[float, Meta(description="Longest wait for a new connection.")] = 5.0
    answer_timeout_seconds: Annotated[
        float, Meta(description="Longest wait for an answer, or for a free connection; `?wait=` comes on top.")
    ] = 30.0
    retry_seconds: Annotated[
        float, Meta(description="How long after its first failure a request is repeated, while that may help.")
    ] = 30.0
    wait_seconds: Annotated[
        float,
        Meta(description="Longest single `?wait=`; at most the server's CLARION_WAIT_MAX_SECONDS."),
    ] = 20.0
    connections_max: Annotated[
        int, Meta(description="Connections at once; each handle that waits for its result holds one.")
    ] = 100
    actor: Annotated[str, Meta(description="Who asks, for the timeline of a job: recorded as `api:<actor>`.")] = ""


class Server(msgspec.Struct, frozen=True):
    """A server's address, and the token that it wants; empty: none."""

    url: str
    token: str


def find_server(url: str | None, token: str | None, environ: Mapping[str, str] | None = None) -> Server:
    """What was given, else what the environment says; raises UsageError for what is no address."""
    environ = os.environ if environ is None else environ
    chosen = url or environ.get(URL_VARIABLE, "").strip() or DEFAULT_URL
    parts = urlsplit(chosen)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{chosen!r} is not the address of an API, as {DEFAULT_URL} is: see {URL_VARIABLE}")
    given = (environ.get(TOKEN_VARIABLE, "") if token is None else token).strip()
    if not given.isprintable():
        raise UsageError(f"the token holds characters that no header can: see {TOKEN_VARIABLE}")
    return Server(chosen.rstrip("/"), given)
