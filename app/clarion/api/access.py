"""Who may call what: one bearer token, or, when none is set, everybody who can reach the socket.

`serve` refuses to listen beyond loopback without a token, so "everybody" is this machine.
"""

import hmac
import re
from enum import StrEnum
from functools import lru_cache

import msgspec
from starlette.datastructures import Headers

from clarion.errors import Forbidden, Unauthenticated

# The name before a port; an address in brackets is version 6.
_HOST = re.compile(r"^(\[[^]]*\]|[^:]*)(?::.*)?$", re.DOTALL)
_ADDRESS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|\[[0-9a-f:.]*\]")


class Permission(StrEnum):
    """What a route lets its caller do."""

    READ = "read"
    ENQUEUE = "enqueue"
    WORK = "work"
    OPERATE = "operate"


class Guard(msgspec.Struct, frozen=True):
    """Maps a request to allowed or not. The one token, while there is but one, carries every permission."""

    token: str

    def check(self, headers: Headers, permission: Permission | None) -> None:
        """Raises Unauthenticated or Forbidden unless the request may use a route that asks for `permission`."""
        if permission is None:
            return
        if not self.token:
            _refuse_other_names(headers)
            _refuse_other_sites(headers, permission)
            return
        given = _presented_token(headers)
        if given is None:
            raise Unauthenticated("this route needs the header `Authorization: Bearer <token>`")
        # On bytes, since compare_digest takes no text beyond ASCII; in constant time, so that it tells nothing.
        if not hmac.compare_digest(given.encode("latin-1"), self.token.encode()):
            raise Unauthenticated("the token is not the one that this server was given")


def _refuse_other_names(headers: Headers) -> None:
    """Without a token, this server has no public name: a browser that comes with one was led here by its owner.

    He lets his name stand for this machine's address (DNS rebinding), and to the browser his page is then of this very
    site. Nobody owns an address, a name without dots, or `localhost`.
    """
    name = _owned_name(headers.get("host", ""))
    if name:
        raise Forbidden(f"a server without CLARION_API_TOKEN does not answer to the name {name[:100]!r}")


@lru_cache(maxsize=32)
def _owned_name(host: str) -> str:
    """The name in a `Host` header, if it is one that somebody may own; else nothing."""
    name = _HOST.sub(r"\1", host).rstrip(".").lower()
    return name if "." in name and not name.endswith(".localhost") and not _ADDRESS.fullmatch(name) else ""


def _refuse_other_sites(headers: Headers, permission: Permission) -> None:
    """Without a token, what a browser sends for some other site's page looks like anybody's: it must change nothing.

    Browsers name the site in `Sec-Fetch-Site`; nobody else sends it. Answers are safe: without CORS, no page of
    another site can read them.
    """
    if permission is not Permission.READ and headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        raise Forbidden("a web page of another site may not do this")


def _presented_token(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key")
