"""`clarion settings`."""

import os

import click
import msgspec

from clarion.settings import PREFIX, SettingDoc, describe_settings, load_settings, unknown_variables

_SECRET = ("CLARION_DATABASE_URL", "CLARION_API_TOKEN")


@click.command("settings")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
@click.option("--markdown", "as_markdown", is_flag=True, help="The table of README.md: defaults, not values.")
def command(*, as_json: bool, as_markdown: bool) -> None:
    """Print every setting, its value here and what it is for."""
    docs = describe_settings()
    if as_markdown:
        click.echo(markdown_table(docs))
        return
    settings = load_settings()
    values = {doc.name: getattr(settings, doc.name.removeprefix(PREFIX).lower()) for doc in docs}
    shown = {name: "•••" if name in _SECRET and value else value for name, value in values.items()}
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(shown)))
        return
    for doc in docs:
        changed = values[doc.name] != doc.default
        click.echo(click.style(f"{doc.name}={shown[doc.name]}", bold=changed) + ("" if changed else "  (default)"))
        click.echo(click.style(f"    {doc.description}", dim=True))
    for name in unknown_variables(os.environ):
        click.secho(f"{name} is set, but there is no such setting", fg="yellow", err=True)


def markdown_table(docs: list[SettingDoc]) -> str:
    """The settings as a Markdown table."""
    rows = [f"| `{doc.name}` | {_code(doc.default)} | {doc.description} |" for doc in docs]
    return "\n".join(["| variable | default | what for |", "| --- | --- | --- |", *rows])


def _code(value: object) -> str:
    return f"`{value}`" if value != "" else "unset"
