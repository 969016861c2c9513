"""`clarion conformance`: whether a worker of anybody's, in any language, keeps the promises of the HTTP protocol."""

import shlex
import sys
from typing import TYPE_CHECKING

import anyio
import click
import msgspec

from clarion.durations import parse_duration
from clarion.errors import ClarionError, UsageError

if TYPE_CHECKING:
    from clarion.conformance.examination import Finding

_TIMEOUT_MAX_SECONDS = 3_600.0
_HELP = """Play server to a worker that speaks HTTP, and check each promise of the protocol.

The command is started once for each check, with CLARION_URL, CLARION_API_TOKEN, CLARION_QUEUES, CLARION_LEASE and
CLARION_DRAIN_SECONDS in its environment; SIGTERM goes to its own process. It has to run these tasks:

\b
  demo.echo    answers its arguments
  demo.sleep   takes `seconds`, and ends early when it must
  demo.fail    fails with the message `message`

Exits 0 if every promise was kept, else 1.
"""


@click.command("conformance", help=_HELP)
@click.option("--worker-cmd", "command_line", required=True, help="The command, as for a shell: 'node worker.mjs'.")
@click.option("--timeout", default="60s", show_default=True, help="Longest time for one check.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this check, or these; a wrong name lists them.")
@click.option("--at-once", default=4, show_default=True, type=click.IntRange(1, 100), help="Workers at one time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end, for scripts.")
def command(*, command_line: str, timeout: str, only: tuple[str, ...], at_once: int, as_json: bool) -> None:
    from clarion.conformance.examination import Examination, check_names, examine
    from clarion.signals import stop_on_signals, until

    for name in only:
        if name not in check_names():
            raise UsageError(f"there is no check {name!r}; there are {', '.join(check_names())}")
    examination = Examination(
        command=_split(command_line), only=only, timeout_seconds=_timeout_seconds(timeout), at_once=at_once
    )

    def tell(finding: "Finding") -> None:
        if not as_json:
            click.echo(_shown(finding))

    async def run() -> list["Finding"]:
        async with stop_on_signals() as stop, until(stop):
            return await examine(examination, tell)
        raise ClarionError("stopped before all was checked")

    findings = anyio.run(run, backend_options={"use_uvloop": True})
    failed = sum(not finding.ok for finding in findings)
    if as_json:
        report = {"ok": not failed, "checks": findings}
        click.echo(msgspec.json.format(msgspec.json.encode(report)))
    else:
        click.echo(f"{len(findings) - failed} of {len(findings)} promises kept")
    sys.exit(1 if failed else 0)


def _shown(finding: "Finding") -> str:
    mark = click.style("✓", fg="green") if finding.ok else click.style("✗", fg="red")
    lines = [f"{mark} {click.style(finding.name, bold=True)}: {finding.expected}"]
    lines.append(click.style(f"    seen: {finding.seen}", dim=finding.ok))
    lines += [click.style(f"    it said: {said}", dim=True) for said in finding.last_words]
    return "\n".join(lines)


def _split(command_line: str) -> list[str]:
    try:
        words = shlex.split(command_line)
    except ValueError as error:
        raise UsageError(f"--worker-cmd {command_line!r}: {error}") from error
    if not words:
        raise UsageError("--worker-cmd names no command")
    return words


def _timeout_seconds(text: str) -> float:
    try:
        return parse_duration(text, max_seconds=_TIMEOUT_MAX_SECONDS)
    except ValueError as error:
        raise UsageError(f"--timeout {text!r} {error}") from error
