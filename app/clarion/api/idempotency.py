"""Idempotency keys: which job has which key, and what makes a request with a known key the same one again.

With a key a short digest of each field is stored: enough to say what differs another time, and no second copy of the
payload. A field that has its default is left out, so that saying it and not saying it are the same, also where a later
version of Clarion adds fields. Durations are compared in seconds, dates as moments, and `args` as JSON: the order of
keys, spaces and escapes do not count, and numbers count as they are written (1 is not 1.0).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import anyio.to_thread
import msgspec
from msgspec import UNSET

from clarion.api.decoding import INLINE_MAX_BYTES, below, invalid
from clarion.api.schemas import JobIn
from clarion.errors import FieldError, IdempotencyMismatch
from clarion.job import Enqueued, NewJob

REPLAYED = {"Idempotency-Replayed": "true"}
_DIGEST_CHARS = 16
_NOT_OF_THE_REQUEST = {"enqueued_by", "key", "request"}
_FIELDS = [field for field in msgspec.structs.fields(NewJob) if field.name not in _NOT_OF_THE_REQUEST]


class Keyed(msgspec.Struct, frozen=True, gc=False):
    """A job as it was sent, the key it is to have, and its place in the request, if that holds several."""

    job: JobIn
    key: str | None
    place: int | None = None

    @property
    def at(self) -> str:
        """A JSON pointer to it."""
        return "" if self.place is None else f"/jobs/{self.place}"


def with_key(job: JobIn, header_key: str | None) -> Keyed:
    """The one job of a request: the header and the field are the same thing, so they must not contradict each other."""
    if header_key is not None and job.idempotency_key not in {None, header_key}:
        raise invalid([FieldError("is not what the header Idempotency-Key says", pointer="/idempotency_key")])
    return Keyed(job, job.idempotency_key or header_key)


def with_keys(jobs: Sequence[JobIn], header_key: str | None) -> list[Keyed]:
    """The jobs of a batch: those without a key of their own have the header's, and their place in the batch."""
    return [Keyed(job, job.idempotency_key or derived_key(header_key, place), place) for place, job in enumerate(jobs)]


def derived_key(header_key: str | None, place: int) -> str | None:
    """The key of an item that has none of its own, under the key of its request."""
    return None if header_key is None else f"{header_key}/{place}"


async def new_jobs(items: Sequence[Keyed], actor: str) -> list[NewJob]:
    """The records that are stored; raises Invalid for a deadline that is over. Digests of much are made in a thread."""
    keyed_bytes = [len(bytes(item.job.args)) for item in items if item.key is not None and item.job.args is not UNSET]
    if sum(keyed_bytes) <= INLINE_MAX_BYTES:
        return new_jobs_now(items, actor)
    return await anyio.to_thread.run_sync(new_jobs_now, items, actor)


def new_jobs_now(items: Sequence[Keyed], actor: str) -> list[NewJob]:
    """The same, here and now."""
    errors = [below(item.at, late) for item in items if (late := item.job.late_start(keyed=item.key is not None))]
    if errors:
        raise invalid(errors)
    return [_new_job(item, actor) for item in items]


def fingerprint(job: NewJob) -> str:
    """A digest of every field that does not have its default, as JSON text; equal requests have equal ones."""
    canonical = {field.name: _canonical(field.name, getattr(job, field.name)) for field in _FIELDS}
    digests = {
        name.removesuffix("_seconds"): hashlib.sha256(value).hexdigest()[:_DIGEST_CHARS]
        for name, value in sorted(canonical.items())
        if value != _DEFAULTS.get(name)
    }
    return msgspec.json.encode(digests).decode()


def differences(request: str | None, first: str | None) -> list[FieldError]:
    """What a request says otherwise than the first one with its key, by their fingerprints; None is nobody's."""
    if request is None or first is None or request == first:
        return []
    now, then = (msgspec.json.decode(text, type=dict[str, str]) for text in (request, first))
    names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    return [FieldError("is not what it was when the key was first used", pointer=f"/{name}") for name in names]


def check_replays(items: Sequence[Keyed], jobs: Sequence[NewJob], added: Sequence[Enqueued]) -> None:
    """Raises IdempotencyMismatch unless every key that was known stands for the same request."""
    _refuse(
        below(item.at, error)
        for item, job, answer in zip(items, jobs, added, strict=True)
        if answer.request is not None
        for error in differences(job.request, answer.request)
    )


def check_batch(items: Sequence[Keyed], jobs: Sequence[NewJob]) -> None:
    """Raises IdempotencyMismatch where one key stands for two different jobs of the batch."""
    first: dict[str, str | None] = {}
    for job in jobs:
        if job.key is not None:
            first.setdefault(job.key, job.request)
    _refuse(
        below(item.at, error)
        for item, job in zip(items, jobs, strict=True)
        if job.key is not None
        for error in differences(job.request, first[job.key])
    )


def mismatch(errors: Sequence[FieldError]) -> IdempotencyMismatch:
    """The problem of a key that stands for another request."""
    names = ", ".join(error.pointer or "" for error in errors[:5])
    return IdempotencyMismatch(f"the idempotency key was first used with another request: see {names}", errors=errors)


def _refuse(differing: Iterator[FieldError]) -> None:
    errors = list(differing)
    if errors:
        raise mismatch(errors)


def _new_job(item: Keyed, actor: str) -> NewJob:
    # The histories take nobody for the API.
    job = item.job.to_new_job(enqueued_by=None if actor == "api" else actor)
    return job if item.key is None else msgspec.structs.replace(job, key=item.key, request=fingerprint(job))


def _canonical(name: str, value: Any) -> bytes:
    if name == "args":
        value = json.loads(value, parse_int=_number, parse_float=_number, object_pairs_hook=_object)
    elif isinstance(value, datetime):
        value = value.astimezone(UTC)
    return msgspec.json.encode(value)


def _number(text: str) -> dict[str, str]:
    """A number as it is written, told from a string; objects are told from it in turn."""
    return {"number": text}


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"object": sorted(members, key=lambda member: member[0])}


_DEFAULTS = {
    field.name: _canonical(field.name, field.default) for field in _FIELDS if field.default is not msgspec.NODEFAULT
}
