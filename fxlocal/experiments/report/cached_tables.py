"""The table of what a cache of frozen prefixes takes and saves."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from rich.table import Table

from ..bench.cached import COMPARED
from ..bench.spread import explain_spread, spread_text
from .tables import new_table
from .words import EPOCH, OF_TIME

__all__ = ["cached_table"]

Results: TypeAlias = Mapping[str, Any]

_ROWS = {
    "sgd": "SGD",
    "uncached": "frozen prefix",
    "cold": "cold cache",
    "warm": "warm cache",
    "limit": "rest alone",
}


def cached_table(results: Results) -> Table:
    """Return the table of what `bench_cache` measured."""
    title = f"{results['model']}, batch of {results['batch_size']}, {results['device']}"
    headings = ("boundary", EPOCH, OF_TIME, "of frozen", "of rest")
    table = new_table(title, "epoch with", right=headings)
    for row in results["rows"]:
        ratios = [spread_text(row, f"of_{other}", ".2f", same=1) for other in COMPARED]
        edge = f"{row['boundary']} of {results['num_layers']}" if row["boundary"] else "-"
        table.add_row(_ROWS[row["name"]], edge, spread_text(row, "seconds", ".3f"), *ratios)
    notes = [f"{results['num_images']} images an epoch", explain_spread(results["repeats"])]
    notes.append("cold: fills the cache; warm: reads it; rest alone: on values in memory")
    table.caption = "\n".join([*notes, *results["cache"]])
    return table
