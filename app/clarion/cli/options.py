"""Flags that are made from settings, so that name, unit, bounds and help have one home."""

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click
import msgspec

from clarion.errors import UsageError
from clarion.log import configure_logging
from clarion.settings import PREFIX, Settings, describe_settings, load_settings

F = TypeVar("F", bound=Callable[..., Any])

COMMON = ("database_url", "log_format", "log_level")


def setting_flags(*names: str) -> Callable[[F], F]:
    """Adds one flag per setting: `--drain-timeout-seconds` for `drain_timeout_seconds`, and so on."""
    help_of = {doc.name.removeprefix(PREFIX).lower(): doc for doc in describe_settings()}

    def decorate(function: F) -> F:
        for name in reversed(names):
            doc = help_of[name]
            text = f"{doc.description}  [env {doc.name}; default {doc.default!r}]"
            function = click.option(f"--{name.replace('_', '-')}", name, default=None, help=text)(function)
        return function

    return decorate


def prepare(flags: dict[str, Any], *, needs_database: bool = True) -> Settings:
    """Settings from flags and environment, with logging configured from them."""
    settings = load_settings(flags)
    configure_logging(settings)
    if needs_database and not settings.database_url:
        raise UsageError(
            "which database? Set CLARION_DATABASE_URL or give --database-url postgresql://user@host/name "
            "(`clarion dev` starts a Postgres of its own)"
        )
    _check_database_url(settings.database_url)
    return settings


def _check_database_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        wrong = bool(url) and parts.scheme not in ("postgresql", "postgres")
        wrong = wrong or ("," not in parts.netloc and parts.port == 0)
    except ValueError:
        wrong = True
    if wrong:
        raise UsageError("the database URL must look like postgresql://user:password@host:5432/name")


def as_environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables for a child process: all of them, whatever it would inherit."""
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in msgspec.structs.asdict(settings).items()}
