"""A table twice: on the console, and as a Markdown page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console

from ..training.settings import SettingsError
from .tables import new_table

__all__ = ["find_table", "publish_table"]

T = TypeVar("T")


def find_table(name: str, tables: Mapping[str, T]) -> T:
    """Return the table called ``name``; raise a SettingsError that lists all names if none is."""
    if name not in tables:
        raise SettingsError(f"table {name}: give 2 to 5, backlink-1 or backlink-2")
    return tables[name]


def publish_table(
    title: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    caption: Sequence[str],
    page: Path,
) -> None:
    """Print a table with what it was made from, and write the same to ``page``.

    Args:
        title: of both.
        header: of each column; one without a heading is aligned to the left.
        lines: the cells.
        caption: lines of text.
        page: Markdown file to write.
    """
    shown = new_table(title)
    for heading in header:
        shown.add_column(heading, justify="right" if heading else "left")
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    typer.echo("\n".join(caption))
    rule = ["---" if not heading else "---:" for heading in header]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
    page.write_text(f"# {title}\n\n{rows}\n\n" + "\n".join(caption) + "\n", encoding="utf-8")
    typer.echo(f"table: {page}")
