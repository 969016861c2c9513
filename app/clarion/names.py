"""How tasks and queues may be called: plain enough for URLs, labels, command lines and file names."""

import re

from clarion.errors import UsageError

# `$` alone would let a final newline through.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}$(?!\n)"
_NAME = re.compile(NAME_PATTERN)


def check_name(name: str, what: str) -> None:
    """Raises UsageError unless `name` can name a task or a queue."""
    if not _NAME.match(name):
        raise UsageError(
            f"{what} {name!r} is not a name: it takes 1 to 128 of the characters A-Z a-z 0-9 _ . : / -, "
            "the first a letter or digit"
        )
