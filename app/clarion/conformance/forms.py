"""What a worker may ask, read with the server's own forms."""

from collections.abc import Mapping
from enum import StrEnum

from clarion.api.decoding import Form, Nothing, decode
from clarion.api.lease_bodies import whole_characters
from clarion.api.lease_forms import (
    CompleteIn,
    FailIn,
    HeartbeatIn,
    LeasesIn,
    LogsIn,
    ProgressIn,
    SnoozeIn,
)
from clarion.api.requests import JSON
from clarion.errors import ClarionError

_SHOWN_MAX_CHARS = 300


class Verb(StrEnum):
    """What a worker can ask for: the last part of each path, but for `claim`, which has none."""

    CLAIM = "claim"
    HEARTBEAT = "heartbeat"
    COMPLETE = "complete"
    FAIL = "fail"
    SNOOZE = "snooze"
    RELEASE = "release"
    PROGRESS = "progress"
    LOGS = "logs"


# What ends an attempt.
ENDINGS = (Verb.COMPLETE, Verb.FAIL, Verb.SNOOZE, Verb.RELEASE)
_BODY_OPTIONAL = {Verb.COMPLETE, Verb.RELEASE, Verb.PROGRESS}
_BODY_IS_TEXTS = {Verb.FAIL, Verb.LOGS, Verb.PROGRESS}
_FORMS: Mapping[Verb, type[Form]] = {
    Verb.CLAIM: LeasesIn,
    Verb.HEARTBEAT: HeartbeatIn,
    Verb.COMPLETE: CompleteIn,
    Verb.FAIL: FailIn,
    Verb.SNOOZE: SnoozeIn,
    Verb.RELEASE: Nothing,
    Verb.PROGRESS: ProgressIn,
    Verb.LOGS: LogsIn,
}


def read_form(verb: Verb, body: bytes, media_type: str) -> Form | str:
    """The body as the verb's form; or, in words, what is wrong with it."""
    if not body and verb in _BODY_OPTIONAL:
        return _FORMS[verb]()
    if media_type.partition(";")[0].strip().lower() != JSON:
        return f"content-type {media_type!r} instead of {JSON}"
    try:
        return decode(whole_characters(body) if verb in _BODY_IS_TEXTS else body, _FORMS[verb])
    except ClarionError as error:
        found = "; ".join(f"{part.pointer} {part.detail}" for part in error.errors)
        return f"{found or error}, in {shown(body)}"


def shown(body: bytes) -> str:
    """The beginning of a body, for people."""
    text = body.decode(errors="replace")
    return text if len(text) <= _SHOWN_MAX_CHARS else f"{text[:_SHOWN_MAX_CHARS]}…"
