"""Every setting: one frozen struct, each field with its unit in its name, its default and what it is for.

A setting comes from `CLARION_<NAME>` in the environment; a command-line flag wins over it. README's table is
generated from this struct (`clarion settings --markdown`), and a test compares the two.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from clarion.errors import UsageError

PREFIX = "CLARION_"
# Variables that no setting reads, but the clients and the testing kit do.
_OF_OTHERS = {"CLARION_URL", "CLARION_TEST_DATABASE_URL"}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one process; seconds, bytes and counts as each name says."""

    database_url: Annotated[
        str, Meta(description="Postgres to use: `postgresql://user@host/db`. `dev` starts its own if unset.")
    ] = ""
    ephemeral: Annotated[
        bool,
        Meta(description="Accept a database that may lose data (`fsync = off`): for throw-away data only."),
    ] = False
    api_token: Annotated[
        str,
        Meta(description="Bearer token of the HTTP API. Unset: `serve` answers on loopback addresses only."),
    ] = ""
    log_format: Annotated[
        str,
        Meta(
            pattern="^(auto|json|console)$",
            description="`json`, `console`, or `auto`: JSON unless a terminal.",
        ),
    ] = "auto"
    log_level: Annotated[
        str, Meta(pattern="^(debug|info|warning|error)$", description="Lowest level that is written.")
    ] = "info"

    pool_max: Annotated[int, Meta(ge=1, le=500, description="Connections of one process's pool.")] = 10
    acquire_timeout_seconds: Annotated[
        float, Meta(gt=0, le=60, description="Longest wait for a pool connection before 503.")
    ] = 3.0
    statement_timeout_seconds: Annotated[float, Meta(gt=0, le=300, description="Longest run of one statement.")] = 15.0
    connect_timeout_seconds: Annotated[
        float, Meta(gt=0, le=60, description="Longest wait for a new connection to Postgres.")
    ] = 5.0

    body_max_bytes: Annotated[int, Meta(ge=1024, description="Largest body of a request about one job.")] = 1_048_576
    batch_body_max_bytes: Annotated[int, Meta(ge=1024, description="Largest JSON body of a batch.")] = 33_554_432
    batch_max_jobs: Annotated[int, Meta(ge=1, le=10_000, description="Most jobs in one JSON batch.")] = 1_000
    enqueue_buffer_max_jobs: Annotated[
        int, Meta(ge=1, description="Calls of one kind (single enqueues, heartbeats…) waiting for a commit before 503.")
    ] = 10_000
    batch_max: Annotated[
        int,
        Meta(
            ge=1,
            description="Calls that one statement serves at most; "
            "1: each call its own statement on its own connection.",
        ),
    ] = 500
    wait_max_seconds: Annotated[float, Meta(ge=0, le=300, description="Longest `?wait=` of a request.")] = 60.0
    wait_tick_seconds: Annotated[
        float, Meta(gt=0, le=5, description="How often waiting requests are looked up, all in one query.")
    ] = 0.05
    waiters_max: Annotated[int, Meta(ge=1, description="Requests with `?wait=` at once before 503.")] = 10_000
    shutdown_timeout_seconds: Annotated[
        float, Meta(ge=0, le=300, description="Time that open requests get at shutdown.")
    ] = 10.0

    wake_interval_seconds: Annotated[
        float, Meta(ge=0, le=1, description="Least time between two NOTIFYs of one process.")
    ] = 0.01
    sweep_seconds: Annotated[
        float, Meta(gt=0, le=300, description="How often an idle process looks without being woken, ±20 %.")
    ] = 5.0
    listener_ping_seconds: Annotated[
        float, Meta(gt=0, le=60, description="How often the LISTEN connection is checked by a round trip.")
    ] = 5.0

    lease_seconds: Annotated[
        float, Meta(ge=1, le=86_400, description="How long a claim holds a job without a heartbeat.")
    ] = 30.0
    hang_after_seconds: Annotated[
        float, Meta(ge=1, description="Event loop blocked for longer: heartbeats stop, the leases run out.")
    ] = 120.0
    concurrency: Annotated[int, Meta(ge=1, le=10_000, description="Jobs that one worker runs at once.")] = 20
    drain_timeout_seconds: Annotated[
        float,
        Meta(ge=0, le=86_400, description="Time that running jobs get at shutdown before they are released."),
    ] = 20.0
    result_max_bytes: Annotated[int, Meta(ge=0, description="Largest stored result.")] = 1_048_576
    processes: Annotated[
        str,
        Meta(
            pattern="^(auto|[1-9][0-9]{0,2})$",
            description="Worker processes under one supervisor, each with its own concurrency and pool; "
            "`auto`: one per usable CPU.",
        ),
    ] = "1"
    health_port: Annotated[
        int, Meta(ge=0, le=65_535, description="Port on which a worker answers probes; 0: none.")
    ] = 0
    # Every address: who opens the port wants it for probes, which come from outside of the container; and its answers
    # hold pids and counts, no data.
    health_host: Annotated[str, Meta(description="Address of that port.")] = "0.0.0.0"  # noqa: S104  probes come from outside

    max_attempts: Annotated[
        int,
        Meta(ge=1, le=1_000, description="Runs of a job, the first included, if neither job nor task says."),
    ] = 20
    max_crashes: Annotated[
        int, Meta(ge=1, le=1_000, description="Lost leases of a job before it is dead as `crash_loop`.")
    ] = 5
    backoff_seconds: Annotated[
        float, Meta(gt=0, le=86_400, description="Wait after the first error; doubles with each, ±20 %.")
    ] = 5.0
    backoff_cap_seconds: Annotated[float, Meta(gt=0, le=604_800, description="Longest wait between two runs.")] = (
        3_600.0
    )
    max_snoozes: Annotated[
        int, Meta(ge=1, le=32_000, description="Snoozes of a job; one more and it is dead as `snoozes_exhausted`.")
    ] = 10_000
    reap_seconds: Annotated[float, Meta(gt=0, le=1, description="How often expired leases are looked for.")] = 0.5
    step_max_jobs: Annotated[
        int, Meta(ge=1, le=10_000, description="Rows that one maintenance statement may touch.")
    ] = 500
    job_log_max_lines: Annotated[
        int, Meta(ge=0, le=100_000, description="Log lines kept of one job; more are counted and dropped.")
    ] = 1_000
    idempotency_ttl_seconds: Annotated[
        float, Meta(ge=1, le=31_536_000, description="How long the answer to an `Idempotency-Key` is kept.")
    ] = 86_400.0
    history_days: Annotated[
        int, Meta(ge=1, le=3_650, description="Days that finished jobs are kept; whole days are dropped.")
    ] = 30


def load_settings(flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from defaults, then the environment, then `flags` (None means not given).

    Raises UsageError naming every value that is wrong. An unknown `CLARION_` variable is not an error:
    Kubernetes puts `CLARION_PORT` and the like there by itself (`unknown_variables` lists them).
    """
    environ = os.environ if environ is None else environ
    names = {field.name for field in msgspec.structs.fields(Settings)}
    given = {key.removeprefix(PREFIX).lower(): value for key, value in environ.items() if key.startswith(PREFIX)}
    wrong = []
    chosen: dict[str, Any] = {name: value for name, value in given.items() if name in names}
    chosen |= {name: value for name, value in (flags or {}).items() if value is not None}
    for name, value in chosen.items():
        try:
            msgspec.convert({name: value}, Settings, strict=False)
        except msgspec.ValidationError as error:
            wrong.append(f"{PREFIX}{name.upper()}: {str(error).partition(' - at ')[0]}, got {value!r}")
    if wrong:
        raise UsageError("Settings that cannot be used; see `clarion settings`:\n  " + "\n  ".join(wrong))
    return msgspec.convert(chosen, Settings, strict=False)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """`CLARION_` variables that no setting reads: most often a typo."""
    known = {doc.name for doc in describe_settings()} | _OF_OTHERS
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


class SettingDoc(msgspec.Struct, frozen=True):
    """One row of the table of settings."""

    name: str
    default: Any
    description: str


def describe_settings() -> list[SettingDoc]:
    """Every setting with its environment name, default and description, in the struct's order."""
    return [
        SettingDoc(f"{PREFIX}{field.name.upper()}", field.default, _description(field.type))
        for field in msgspec.structs.fields(Settings)
    ]


def _description(annotation: Any) -> str:
    metas = [meta for meta in annotation.__metadata__ if isinstance(meta, Meta)]
    return str(metas[0].description)
