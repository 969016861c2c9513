"""Imported first by the Python scripts here, so that each can be run as it lies: in this clone's environment."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_NEEDED = ("clarion", "asyncpg", "httpx2")

if any(importlib.util.find_spec(name) is None for name in _NEEDED):
    here = Path(__file__).resolve().parent
    subprocess.run([here / "setup"], check=True)
    python = here.parent / ".venv" / "bin" / "python"
    os.execv(python, [str(python), *sys.argv])  # noqa: S606  our own interpreter, no shell
