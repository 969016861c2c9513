"""Bodies that carry what other programs said: error messages, traces, log lines.

Runtimes whose strings are UTF-16 cut them in the middle of a character now and then, and write half of it as `\\ud83d`.
A payload that holds such a thing is refused. An outcome must not be: its lease would be lost for half a character.
"""

import re

from starlette.requests import Request

from clarion.api.decoding import decode_body
from clarion.api.operation import BodyT, Operation, QueryT
from clarion.api.requests import read_body
from clarion.settings import Settings

# An escape is one after an even number of backslashes. Whole pairs are matched, and so stepped over, first.
_PAIR_OR_HALF = re.compile(
    rb"(?<!\\)((?:\\\\)*+)(?:(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)


class TextOperation(Operation[BodyT, QueryT], frozen=True, kw_only=True):
    """An operation whose body is texts: halves of characters in it become replacement characters."""

    async def _decoded_body(self, request: Request, settings: Settings) -> BodyT:
        body = await read_body(request.headers, request.receive, self.body_max_bytes(settings))
        return await decode_body(whole_characters(body), self.body)


def whole_characters(body: bytes) -> bytes:
    """A JSON text in which each half of a surrogate pair is replaced by U+FFFD."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return body
    return _PAIR_OR_HALF.sub(lambda match: match[1] + (match[2] or rb"\ufffd"), body)
