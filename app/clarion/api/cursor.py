"""Opaque cursors of lists: where the next page begins, as a key and not as an offset.

Pages by key stay right while jobs come and go, and the thousandth costs as much as the first. The leading byte
is the cursor's version, so that a later form can be told from this one.
"""

import base64
import binascii
from uuid import UUID

_VERSION = b"\x01"


def encode_cursor(last_id: UUID) -> str:
    """The cursor of the page that follows the job `last_id`."""
    return base64.urlsafe_b64encode(_VERSION + last_id.bytes).decode().rstrip("=")


def decode_cursor(cursor: str) -> UUID:
    """The last id of the page before; raises ValueError for anything that `encode_cursor` did not make."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != len(_VERSION) + 16 or not raw.startswith(_VERSION):
        raise ValueError("is not a cursor that a list answered with")
    return UUID(bytes=raw[1:])
