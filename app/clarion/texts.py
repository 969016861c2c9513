"""Texts from outside, made fit to be stored: free of what Postgres refuses, and bounded."""

ERROR_TYPE_MAX_CHARS = 200
ERROR_MESSAGE_MAX_CHARS = 4_096
ERROR_TRACE_MAX_CHARS = 16_384
LINE_MESSAGE_MAX_CHARS = 4_096
LINE_FIELDS_MAX_BYTES = 4_096
PROGRESS_MESSAGE_MAX_CHARS = 4_096


def storable(text: str, max_chars: int) -> str:
    """`text` without NULs and lone surrogates, its middle cut out when it is too long."""
    clean = text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    if len(clean) <= max_chars:
        return clean
    half = max_chars // 2 - 10
    return f"{clean[:half]}\n… cut …\n{clean[-half:]}"
