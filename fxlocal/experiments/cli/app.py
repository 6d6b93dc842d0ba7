"""The command line: ``fxlocal show``, ``train``, ``compare``, and the other `VERBS`.

A verb's module is imported when the verb is called: torch is slow to import, and the list of verbs
needs none of it.
"""

import platform
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["PANELS", "VERBS", "app"]

# The first line of each verb's own help, by panel.
PANELS = {
    "Train": {
        "train": "Train a model with one strategy; a broken run goes on with --resume, exactly.",
        "compare": "Train a model with several strategies from the same seeds; see what each buys.",
        "sweep": "Train one strategy with every combination of arguments, and find what pays.",
        "report": "Make the page of a run again, or one page of several runs of the same settings.",
    },
    "Use what is trained": {
        "evaluate": "Judge a trained model by its test images, or by a folder, class by class.",
        "predict": "Say of image files, or of all in a folder, which class a trained model sees.",
        "export": "Write a trained model as safetensors, ONNX or torch.export's .pt2.",
    },
    "Look inside": {
        "show": "Show a model's layers, blocks and skips, and how a strategy changes its graph.",
        "bench": "Time a training step of each strategy, and what it keeps, in turns.",
        "reproduce": "Run a paper's table again, and print ours beside theirs; alone, list them.",
    },
}
VERBS = {name: text for panel in PANELS.values() for name, text in panel.items()}


TRAINING = ("train", "compare", "sweep")


class _Verbs(TyperGroup):
    """Finds a verb by its name, and in full only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        panel = next((panel for panel, verbs in PANELS.items() if name in verbs), None)
        return panel and TyperCommand(name, help=VERBS[name], rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, None, rest
        if name in TRAINING and not {"--help", "--quiet"} & {*rest} and not ctx.resilient_parsing:
            typer.echo(f"fxlocal {version('fxlocal')} {name}")  # seconds before torch is imported
        place = "trained." if name in PANELS["Use what is trained"] else ""
        verb = typer.Typer(add_completion=False)
        verb.command(name, cls=_Verb)(import_module(f".{place}{name}", __package__).command)
        return name, typer.main.get_command(verb), rest


class _Verb(TyperCommand):
    """A verb whose help leaves ``--help`` out: whoever reads it has found that."""

    def get_help_option(self, ctx: Any) -> Any:
        found = super().get_help_option(ctx)
        if found is not None:
            found.hidden = True
        return found


app = typer.Typer(cls=_Verbs, no_args_is_help=True)


def _show_version(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        versions = (f"{name} {version(name)}" for name in ("fxlocal", "torch"))
        typer.echo(f"{', '.join(versions)}, python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show it, and torch's", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train a growing part of a network without back-propagation, and see what it buys."""
