"""Runs every verify_*.py here, each as a process with a stack of its own, and shows in one table what came of them.

Goes on when one fails; exits 1 then. With --url all of them try that deployment instead, one after the other.
"""

import argparse
import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

SCRIPTS = Path(__file__).resolve().parent
PREFIX = "verify_"
# What a script gets to tidy up when its time is over.
GOODBYE_SECONDS = 30.0
COLOURS = {"proven": "green", "skipped": "yellow"}

progress = Console(stderr=True, soft_wrap=True)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one script; `checks` are as it reported them, none if it could not run."""

    script: str
    result: str
    seconds: float
    title: str = ""
    checks: list[dict[str, Any]] = []

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against it."""
        return self.result in COLOURS

    @property
    def held(self) -> str:
        """How many checks held, of how many."""
        return f"{sum(check['ok'] is True for check in self.checks)} of {len(self.checks)}"


def scripts() -> dict[str, Path]:
    """The scripts by their short names."""
    return {path.stem.removeprefix(PREFIX): path for path in sorted(SCRIPTS.glob(f"{PREFIX}*.py"))}


def claim_of(script: Path) -> str:
    """What a script proves, in its own words."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def prove(script: Path, flags: list[str], *, timeout_seconds: float) -> Outcome:
    """Runs a script; its checks appear on standard error while they are made."""
    began = time.monotonic()
    command = [sys.executable, str(script), "--json", *flags]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        said, in_time = _listen(process, timeout_seconds)
    seconds = round(time.monotonic() - began, 1)
    if not in_time:
        return Outcome(script=script.stem, result="TOOK TOO LONG", seconds=seconds)
    if not said.strip():
        return Outcome(script=script.stem, result="COULD NOT RUN", seconds=seconds)
    report = msgspec.json.decode(said.strip().splitlines()[-1])
    was_tried = any(check["ok"] is not None for check in report["checks"])
    result = "NOT AS PROMISED" if process.returncode else "proven" if was_tried else "skipped"
    return Outcome(script=script.stem, result=result, seconds=seconds, title=report["title"], checks=report["checks"])


def _listen(process: subprocess.Popen[str], timeout_seconds: float) -> tuple[str, bool]:
    """Standard output to its end, and whether that came by itself; a script is interrupted first, and then killed."""
    try:
        return process.communicate(timeout=timeout_seconds)[0], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=GOODBYE_SECONDS)[0], False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], False


def show(outcomes: list[Outcome]) -> None:
    """The table, and below it what was not as promised."""
    table = Table("script", "checks", "seconds", "result", "what for")
    for outcome in outcomes:
        result = f"[{COLOURS.get(outcome.result, 'red')}]{outcome.result}[/]"
        table.add_row(outcome.script, outcome.held, f"{outcome.seconds:.1f}", result, outcome.title)
    screen = Console()
    Console(width=None if screen.is_terminal else 130).print(table)
    for outcome in outcomes:
        for check in outcome.checks:
            if check["ok"] is not True:
                mark = "✗" if check["ok"] is False else "skipped"
                print(f"{outcome.script}: {mark} {check['promise']}: {check['evidence']}")


def main() -> None:
    """Runs the chosen ones."""
    known = scripts()
    options = _parser(known).parse_args()
    if options.list:
        for name, script in known.items():
            print(f"{name:20} {claim_of(script)}")
        return
    flags = [
        f"{flag}={value}" for flag, value in (("--url", options.url), ("--database-url", options.database_url)) if value
    ]
    if options.token:
        os.environ["CLARION_API_TOKEN"] = options.token
    outcomes = []
    chosen = options.only or list(known)
    try:
        for place, name in enumerate(chosen, 1):
            progress.print(f"\n== {name} ({place} of {len(chosen)}): {claim_of(known[name])}", markup=False)
            outcomes.append(prove(known[name], flags, timeout_seconds=options.timeout_seconds))
    except KeyboardInterrupt:
        sys.exit(130)
    ok = all(outcome.ok for outcome in outcomes)
    if options.json:
        print(msgspec.json.encode({"ok": ok, "scripts": outcomes}).decode())
    else:
        show(outcomes)
    sys.exit(0 if ok else 1)


def _parser(known: dict[str, Path]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(known), metavar="NAME", help="only these; see --list")
    parser.add_argument("--list", action="store_true", help="says what there is, and proves nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of the table")
    parser.add_argument("--url", help="a running API; default: an ephemeral stack for each")
    parser.add_argument("--database-url", help="its database, for the scripts that need it")
    parser.add_argument("--token", help="its API token, if it has one; better in CLARION_API_TOKEN")
    parser.add_argument("--timeout-seconds", type=float, default=600, help="for each script (default: 600)")
    return parser


if __name__ == "__main__":
    main()
