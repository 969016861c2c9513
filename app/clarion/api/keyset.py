"""Opaque cursors of lists that are not in the order of jobs' ids: see `cursor.py`. The first byte names the list."""

import base64
import binascii
from datetime import UTC, datetime, timedelta
from uuid import UUID

_DEAD = b"\x02"
_LINE = b"\x03"
_NUMBER_BYTES = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# Beyond it there is no moment in our columns, and no line's id either.
_NUMBER_MAX = (datetime(2300, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND


def encode_dead(died_at: datetime, job_id: UUID) -> str:
    """The cursor of the page that follows this dead job."""
    return _encode(_DEAD, (died_at - _EPOCH) // _MICROSECOND, job_id.bytes)


def decode_dead(cursor: str) -> tuple[datetime, UUID]:
    """When the last job of the page before died, and its id; raises ValueError for what `encode_dead` did not make."""
    microseconds, job_id = _decode(cursor, _DEAD, rest_bytes=16)
    return _EPOCH + microseconds * _MICROSECOND, UUID(bytes=job_id)


def encode_line(line_id: int) -> str:
    """The cursor of the log lines that follow this one."""
    return _encode(_LINE, line_id)


def decode_line(cursor: str) -> int:
    """The last line of the page before; raises ValueError for what `encode_line` did not make."""
    line_id, _ = _decode(cursor, _LINE, rest_bytes=0)
    return line_id


def _encode(kind: bytes, number: int, rest: bytes = b"") -> str:
    raw = kind + number.to_bytes(_NUMBER_BYTES, "big") + rest
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(cursor: str, kind: bytes, *, rest_bytes: int) -> tuple[int, bytes]:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    number, rest = int.from_bytes(raw[1 : 1 + _NUMBER_BYTES], "big"), raw[1 + _NUMBER_BYTES :]
    if not raw.startswith(kind) or len(raw) != 1 + _NUMBER_BYTES + rest_bytes or number > _NUMBER_MAX:
        raise ValueError("is not a cursor that this list answered with")
    return number, rest
