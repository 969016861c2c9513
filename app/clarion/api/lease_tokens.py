"""Lease tokens as workers see them: opaque, and the only thing that a call about a lease has to name.

Each is the job's id and the lease's own token in one, in base64url without padding. Of the texts that decode to the
same bytes only the one that was handed out counts.
"""

import base64
from uuid import UUID

_ID_BYTES = 16


def encode_lease_token(job_id: UUID, token: UUID) -> str:
    """The text that a worker is given."""
    return _encode(job_id.bytes + token.bytes)


def decode_lease_token(text: str) -> tuple[UUID, UUID]:
    """Job id and token; raises ValueError for anything that `encode_lease_token` did not make."""
    try:
        raw = base64.urlsafe_b64decode(f"{text}=")
    except ValueError:
        raw = b""
    if len(raw) != 2 * _ID_BYTES or _encode(raw) != text:
        raise ValueError("is not a lease token")
    return UUID(bytes=raw[:_ID_BYTES]), UUID(bytes=raw[_ID_BYTES:])


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
