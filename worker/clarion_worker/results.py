"""A handler's result as JSON text that Postgres will keep and every reader can read."""

import json
from typing import Any

import msgspec

from clarion.payload import FaultFinder


def encode_result(result: Any, *, max_bytes: int) -> str | None:
    """JSON text of the result, None for None. Raises ValueError, in words, for one that cannot be stored."""
    if result is None:
        return None
    try:
        encoded = msgspec.json.encode(result)
    except Exception as error:  # the result's own code may raise anything
        raise ValueError(f"the result is not JSON: {type(error).__name__}: {error}") from error
    if len(encoded) > max_bytes:
        raise ValueError(f"the result has {len(encoded)} bytes, more than the {max_bytes} allowed")
    fault = FaultFinder().in_value(encoded)
    if fault is not None:
        raise ValueError(f"the result {fault.detail}" + (f", at {fault.pointer}" if fault.pointer else ""))
    # NaN and infinity are written as null, so only a result with a null in it can hold one.
    if b"null" in encoded:
        _check_finite(result)
    return encoded.decode()


def _check_finite(result: Any) -> None:
    try:
        json.dumps(msgspec.to_builtins(result), allow_nan=False)
    except Exception as error:
        raise ValueError("the result contains NaN or an infinite number, which JSON cannot express") from error
