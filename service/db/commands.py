"""`clpeft db`: the schema of the database that CLPEFT_DATABASE_URL names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Annotated

import typer
from rich.console import Console

from service.settings import Settings

app = typer.Typer(help="The schema of the service's database.", no_args_is_help=True)
out = Console(highlight=False)


@app.command()
def current() -> None:
    """Show which revision the database has, and which this version needs."""
    with _administration() as (admin, url):
        found = admin.current(url)
        out.print(f"the database has revision {found.current}; this version needs {found.newest}")


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(help="Revision to go up to; head is the newest.")] = "head",
) -> None:
    """Go up to a revision. `clpeft up` and `clpeft api` do this by themselves when they start."""
    with _administration() as (admin, url):
        out.print(f"the database has revision {admin.upgrade(url, revision).current}")


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="Revision to go down to; base empties the database.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Go down to a revision, for an older version of the service. What only later ones hold is lost."""
    if not yes:
        typer.confirm(f"Go down to {revision} and lose what only later revisions hold?", abort=True)
    with _administration() as (admin, url):
        out.print(f"the database has revision {admin.downgrade(url, revision).current}")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Make what is wrong with the database one text on stderr and exit code 1."""
    from sqlalchemy.exc import DatabaseError, OperationalError

    from service.db.admin import SchemaError
    from service.db.engines import DatabaseUrlError

    try:
        yield
    except (SchemaError, DatabaseUrlError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
    except DatabaseError as error:
        said = "does not answer" if isinstance(error, OperationalError) else "cannot be used"
        typer.echo(f"error: the database {said}: {error.orig}", err=True)
        raise SystemExit(1) from error


@contextmanager
def _administration() -> Iterator[tuple[ModuleType, str]]:
    """Give the functions and the database's URL."""
    from service.db import admin

    with clear_errors():
        yield admin, Settings().database_url
