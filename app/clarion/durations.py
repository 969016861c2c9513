"""Durations as people write them: `"30s"`, `"1.5h"`, `250ms`, or a bare number of seconds."""

import re

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)?", re.ASCII)


def parse_duration(value: str | float, *, max_seconds: float) -> float:
    """Seconds in `value`; raises ValueError, in words for the caller, unless 0 <= seconds <= `max_seconds`."""
    # To the microsecond, as Postgres has it: "1.1h" and 3960 are the same.
    seconds = round(_seconds(value), 6) + 0.0
    if not 0 <= seconds <= max_seconds:
        raise ValueError(f"must be between 0 and {format_duration(max_seconds)}")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest exact spelling: 90 → `90s`, 3600 → `1h`, 0.25 → `250ms`."""
    if seconds and seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit in ("d", "h", "m"):
        size = _UNIT_SECONDS[unit]
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def _seconds(value: str | float) -> float:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError('must be seconds, or a number with a unit: "250ms", "30s", "5m", "2h", "7d"')
        return float(match[1]) * _UNIT_SECONDS[match[2] or "s"]
    return float(value)
