"""Print and dump what each pass did, as three environment variables ask.

They are read only here (docs/debugging.md):

* ``FXLOCAL_DEBUG``: 1 prints pass names and counts, 2 the diffs, 3 the whole graphs;
* ``FXLOCAL_DUMP``: a folder that gets the text of the graph after each pass;
* ``FXLOCAL_SKIP``: names of rewrites to leave out, separated by commas; always warns.

So is what a launcher such as torchrun tells its ranks.
"""

import os
import sys
from pathlib import Path

from ..ir.text import Record

__all__ = ["ENVIRONMENT", "dump_folder", "launched_ranks", "report_pass", "skipped_passes"]

ENVIRONMENT = ("FXLOCAL_DEBUG", "FXLOCAL_DUMP", "FXLOCAL_SKIP")


def skipped_passes() -> frozenset[str]:
    """Return the names of the rewrites that ``FXLOCAL_SKIP`` leaves out."""
    names = os.environ.get("FXLOCAL_SKIP", "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def dump_folder() -> str | None:
    """Return the folder that ``FXLOCAL_DUMP`` names, if any."""
    return os.environ.get("FXLOCAL_DUMP") or None


def launched_ranks() -> tuple[str | None, int]:
    """Return ``RANK`` and ``WORLD_SIZE``: None and 1 where no launcher has set them."""
    return os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))


def report_pass(index: int, record: Record, text: str) -> None:
    """Print and dump what one pass did, as the environment asks."""
    level = int(os.environ.get("FXLOCAL_DEBUG", "0") or 0)
    if level >= 1:
        added = sum(line.startswith("+") for line in record.diff.splitlines())
        removed = sum(line.startswith("-") for line in record.diff.splitlines())
        print(f"fxlocal {index:02d} {record.name}: +{added} -{removed} lines", file=sys.stderr)
    if level == 2:
        print(record.diff, file=sys.stderr)
    if level >= 3:
        print(text, file=sys.stderr)
    if folder := dump_folder():
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{index:02d}_{record.name}.txt").write_text(text + "\n")
