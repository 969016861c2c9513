"""Opaque cursors of lists: where the next page begins, as a key and not as an offset.

Pages by key stay right while jobs come and go, and the thousandth costs as much as the first. The leading byte names
the list, and the form of its cursors.
"""

import base64
import binascii
from datetime import UTC, datetime, timedelta
from uuid import UUID

_JOB = b"\x01"
_DEAD = b"\x02"
_LINE = b"\x03"
_ID_BYTES = 16
_NUMBER_BYTES = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Beyond it there is no moment in our columns, and no line's id either.
_NUMBER_MAX = (datetime(2300, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND


def encode_cursor(last_id: UUID) -> str:
    """The cursor of the page that follows the job `last_id`."""
    return _encode(_JOB, last_id.bytes)


def decode_cursor(cursor: str) -> UUID:
    """The last id of the page before; raises ValueError for anything that `encode_cursor` did not make."""
    return UUID(bytes=_decode(cursor, _JOB, _ID_BYTES))


def encode_dead(died_at: datetime, job_id: UUID) -> str:
    """The cursor of the page that follows this dead job."""
    return _encode(_DEAD, _number((died_at - _EPOCH) // _MICROSECOND) + job_id.bytes)


def decode_dead(cursor: str) -> tuple[datetime, UUID]:
    """When the last job of the page before died, and its id; raises ValueError for what `encode_dead` did not make."""
    body = _decode(cursor, _DEAD, _NUMBER_BYTES + _ID_BYTES)
    return _EPOCH + _read_number(body) * _MICROSECOND, UUID(bytes=body[_NUMBER_BYTES:])


def encode_line(line_id: int) -> str:
    """The cursor of the log lines that follow this one."""
    return _encode(_LINE, _number(line_id))


def decode_line(cursor: str) -> int:
    """The last line of the page before; raises ValueError for what `encode_line` did not make."""
    return _read_number(_decode(cursor, _LINE, _NUMBER_BYTES))


def _encode(kind: bytes, body: bytes) -> str:
    return base64.urlsafe_b64encode(kind + body).decode().rstrip("=")


def _decode(cursor: str, kind: bytes, body_bytes: int) -> bytes:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not raw.startswith(kind) or len(raw) != len(kind) + body_bytes:
        raise _unknown()
    return raw[len(kind) :]


def _number(value: int) -> bytes:
    return value.to_bytes(_NUMBER_BYTES, "big")


def _read_number(body: bytes) -> int:
    number = int.from_bytes(body[:_NUMBER_BYTES], "big")
    if number > _NUMBER_MAX:
        raise _unknown()
    return number


def _unknown() -> ValueError:
    return ValueError("is not a cursor that this list answered with")
