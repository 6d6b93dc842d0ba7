"""Print and dump what each pass did, as three environment variables ask.

They are read only here (docs/debugging.md):

* ``FXLOCAL_DEBUG``: 1 prints pass names and counts, 2 the diffs, 3 the whole graphs;
* ``FXLOCAL_DUMP``: a folder that gets the text of the graph after each pass, and one folder more
  inside it for each further network;
* ``FXLOCAL_SKIP``: names of rewrites to leave out, separated by commas; always warns.

So is what a launcher such as torchrun tells its ranks.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..errors import PlanError, nearest
from ..ir.text import Listing, Record
from ..plan import Plan

__all__ = ["ENVIRONMENT", "dump_folder", "launched_ranks", "report_pass", "skipped_passes"]

ENVIRONMENT = ("FXLOCAL_DEBUG", "FXLOCAL_DUMP", "FXLOCAL_SKIP")


_dumps: Counter[str] = Counter()  # of this process, by folder


def skipped_passes(known: Iterable[str]) -> frozenset[str]:
    """Return the rewrites that ``FXLOCAL_SKIP`` leaves out; a PlanError if one is not ``known``."""
    told = os.environ.get("FXLOCAL_SKIP", "").split(",")
    names = frozenset(name.strip() for name in told if name.strip())
    if unknown := sorted(names.difference(known)):
        raise PlanError(
            f"FXLOCAL_SKIP: there is no pass {unknown[0]!r}. Nearest: {nearest(unknown[0], known)}"
        )
    return names


def _level() -> int:
    """Return what ``FXLOCAL_DEBUG`` says; a PlanError if that is no level."""
    told = os.environ.get("FXLOCAL_DEBUG", "").strip() or "0"
    if told not in ("0", "1", "2", "3"):
        raise PlanError(f"FXLOCAL_DEBUG={told!r}: give 0, 1 (counts), 2 (diffs) or 3 (graphs)")
    return int(told)


def dump_folder(plan: Plan) -> Path | None:
    """Return a folder for the graphs of a network, if ``FXLOCAL_DUMP`` names one.

    That of a process's first network is the one that is named; others have one each inside it, by
    number, with the plan beside the graphs.

    Raises:
        PlanError: if it cannot be written.
    """
    if not (named := os.environ.get("FXLOCAL_DUMP")):
        return None
    _dumps[named] += 1
    number = _dumps[named]
    folder = Path(named, str(number)) if number > 1 else Path(named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if number > 1:
            (folder / "plan.txt").write_text(f"{plan!r}\n")
    except OSError as error:
        raise PlanError(
            f"FXLOCAL_DUMP={named!r}: {error}; name a folder that can be written"
        ) from error
    return folder


def launched_ranks() -> tuple[str | None, int]:
    """Return ``RANK`` and ``WORLD_SIZE``: None and 1 where no launcher has set them."""
    return os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", "1"))


def report_pass(index: int, record: Record, listing: Listing, folder: Path | None) -> None:
    """Print what one pass did, as the environment asks, and dump it into ``folder``."""
    level = _level()
    if level >= 1:
        added = sum(line.startswith("+") for line in record.diff.splitlines())
        removed = sum(line.startswith("-") for line in record.diff.splitlines())
        print(f"fxlocal {index:02d} {record.name}: +{added} -{removed} lines", file=sys.stderr)
    if level == 2:
        print(record.diff, file=sys.stderr)
    if level >= 3:
        print(listing, file=sys.stderr)
    if folder:
        (folder / f"{index:02d}_{record.name}.txt").write_text(f"{listing}\n")
