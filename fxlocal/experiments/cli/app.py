"""The command line: ``fxlocal show``, ``train``, ``compare``, and the other `VERBS`.

A verb's module is imported when the verb is called: torch is slow to import, and the list of verbs
needs none of it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["VERBS", "app"]

# The first line of each verb's own help.
VERBS = {
    "show": "Show a model's layers, blocks and skips, and how a strategy changes its graph.",
    "train": "Train a model with one strategy; a broken run goes on with --resume, exactly.",
    "compare": "Train a model with several strategies from the same seeds; see what each buys.",
    "sweep": "Train one strategy with every combination of arguments, and find what pays.",
    "report": "Make the page of a run again, or one page of several runs of the same settings.",
    "bench": "Time a training step of each strategy, and what it keeps, in turns.",
    "reproduce": "Run a paper's table again, and print ours beside theirs; alone, list them.",
}


TRAINING = ("train", "compare", "sweep")


class _Verbs(TyperGroup):
    """Finds a verb by its name, and in full only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        return TyperCommand(name, help=VERBS[name]) if name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, None, rest
        if name in TRAINING and "--help" not in rest:  # seconds before torch is imported
            typer.echo(f"fxlocal {version('fxlocal')} {name}")
        verb = typer.Typer(add_completion=False)
        verb.command(name, cls=_Verb)(import_module(f"{__package__}.{name}").command)
        return name, typer.main.get_command(verb), rest


class _Verb(TyperCommand):
    """A verb whose help leaves ``--help`` out: whoever reads it has found that."""

    def get_help_option(self, ctx: Any) -> Any:
        found = super().get_help_option(ctx)
        if found is not None:
            found.hidden = True
        return found


app = typer.Typer(cls=_Verbs, no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Train a growing part of a network without back-propagation, and see what it buys."""
