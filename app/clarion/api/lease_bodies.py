"""Calls about leases: a token that is none is told before the body is read, and bodies are read with lenience.

Runtimes whose strings are UTF-16 cut them in the middle of a character now and then, and write half of it as `\\ud83d`.
A payload that holds such a thing is refused. What keeps or ends a lease must not be: it would be lost for half a
character. So texts are mended, and of a heartbeat only the checkpoint is refused that cannot be stored.
"""

import re
from collections.abc import Callable, Mapping
from uuid import UUID

import anyio.to_thread
from starlette.requests import Request
from starlette.types import ASGIApp

from clarion.api.decoding import decode_body
from clarion.api.lease_tokens import decode_lease_token
from clarion.api.operation import BodyT, Operation, QueryT
from clarion.api.services import Services
from clarion.errors import Invalid, NotFound
from clarion.payload import DEPTH_MAX

# Stands in a checkpoint for half a pair, and is refused like it.
HALF_A_PAIR = rb"\u0000\ufffd"
# What stands around a checkpoint: the heartbeat, its array of leases, a lease. One level more is too deep already.
_LEVELS_KEPT = 3 + DEPTH_MAX + 1

# An escape is one after an even number of backslashes. Whole pairs are matched, and so stepped over, first.
_PAIR_OR_HALF = re.compile(
    rb"(?<!\\)((?:\\\\)*+)(?:(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]|[^"\[\]{}]++', re.DOTALL)


class LeaseOperation(Operation[BodyT, QueryT], frozen=True, kw_only=True):
    """An operation on leases; where its path names one, that is looked at first.

    A body that is refused is read once more as `mended`, where that changes it.
    """

    mended: Callable[[bytes], bytes] | None = None

    async def answer(self, request: Request, services: Services) -> ASGIApp:
        """Decodes the request, handles it and encodes the reply."""
        if "token" in request.path_params:
            lease_of(request.path_params)
        return await super().answer(request, services)

    async def _decode(self, body: bytes) -> BodyT:
        try:
            return await decode_body(body, self.body)
        except Invalid as error:
            if self.mended is None:
                raise
            mended = await anyio.to_thread.run_sync(self.mended, body)
            if mended == body:
                raise
            try:
                return await decode_body(mended, self.body)
            except Invalid:
                raise error from None


class TextOperation(LeaseOperation[BodyT, QueryT], frozen=True, kw_only=True):
    """One whose body is texts: halves of characters in it become replacement characters."""

    async def _decode(self, body: bytes) -> BodyT:
        return await decode_body(whole_characters(body), self.body)


def lease_of(path: Mapping[str, str]) -> tuple[UUID, UUID]:
    """The job's id and the lease token that a path names; raises NotFound for a text that is no token."""
    try:
        return decode_lease_token(path["token"])
    except ValueError:
        raise NotFound("there is no such lease: this is not a token that a claim answered with") from None


def whole_characters(body: bytes, instead: bytes = rb"\ufffd") -> bytes:
    """A JSON text in which each half of a surrogate pair is replaced, by U+FFFD unless told otherwise."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return body
    return _PAIR_OR_HALF.sub(lambda match: match[1] + (match[2] or instead), body)


def mended_progress(body: bytes) -> bytes:
    """Halves of characters as NUL: in the message it becomes a replacement character, in a checkpoint it is refused."""
    return whole_characters(body, rb"\u0000")


def mended_heartbeat(body: bytes) -> bytes:
    """Checkpoints as they can be decoded, and are refused all the same: halves marked, what lies too deep left out."""
    return _shallow(whole_characters(body, HALF_A_PAIR))


def _shallow(body: bytes) -> bytes:
    """A JSON text in which arrays and objects of the last level that is kept are empty."""
    if body.count(b"[") + body.count(b"{") <= _LEVELS_KEPT:
        return body
    kept, depth = [], 0
    for match in _TOKEN.finditer(body):
        token = match[0]
        depth -= token in b"]}"
        if depth < _LEVELS_KEPT:
            kept.append(token)
        depth += token in b"[{"
    return b"".join(kept)
