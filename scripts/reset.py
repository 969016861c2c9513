"""Stops this clone's `make up` and removes its data, once somebody said yes: CONFIRM=1, or `y` at a terminal."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from clarion.embedded_place import choose_place, lock_place
from clarion.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".clarion"


def main() -> int:
    """The exit code: 0 when the data is gone, 1 when it stays."""
    place = choose_place(STATE / "postgres")
    if not place.directory.exists():
        print("There is no data.")
        return 0
    if not confirmed(f"Remove {place.directory} and every job in it?"):
        print("Nothing was removed.")
        return 1
    subprocess.run([ROOT / "scripts" / "background", "down"], check=True)
    try:
        lock_place(place)  # held until this process ends, so that no server starts in between
    except UsageError as error:
        print(f"Nothing was removed: {error}")
        return 1
    shutil.rmtree(place.directory)
    shutil.rmtree(STATE, ignore_errors=True)
    print(f"Removed {place.directory}.")
    return 0


def confirmed(question: str) -> bool:
    """Whether CONFIRM=1 is set, or a person at a terminal answers yes."""
    if os.environ.get("CONFIRM") == "1":
        return True
    if not sys.stdin.isatty():
        print(f"{question} Say so with CONFIRM=1.")
        return False
    return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


if __name__ == "__main__":
    sys.exit(main())
