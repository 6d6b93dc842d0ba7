"""The command line: ``fxlocal show``, ``train``, ``compare``, and the other `VERBS`.

A verb's module is imported when the verb is called: torch is slow to import. Neither the list of
verbs nor a shell that completes their options needs any of it: these are in ``completion.json``,
which a test compares with the verbs.
"""

import inspect
import json
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ...errors import BoundaryWarning, NoEffectWarning, nearest

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
_UsageError: Any = typer.BadParameter.__bases__[0]  # whose module typer's versions do not agree on


@contextmanager
def _one_line(typed: Sequence[str]) -> Iterator[None]:
    """Say in one line what was typed wrong, in place of a page about it."""
    try:
        yield
    except _UsageError as error:
        parameter: Any = getattr(error, "param", None)
        names, said = getattr(parameter, "opts", ()), error.format_message()
        found = [i for i, word in enumerate(typed) if word.partition("=")[0] in names]
        if isinstance(error, typer.BadParameter) and found:
            words = typed[found[-1] : found[-1] + (1 if "=" in typed[found[-1]] else 2)]
            said = f"{' '.join(words)}: {error.message}"
        typer.echo(f"error: {' '.join(said.split())}", err=True)
        raise typer.Exit(2) from error


class _Verbs(TyperGroup):
    """Finds a verb by its name, and in full only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, name: str) -> Any:
        panel = next((panel for panel, verbs in PANELS.items() if name in verbs), None)
        return panel and TyperCommand(name, help=VERBS[name], rich_help_panel=panel)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:  # which asks for help
            return super().parse_args(ctx, args)
        with _one_line(args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _one_line(ctx.args):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in VERBS and not ctx.resilient_parsing:
            ctx.fail(f"unknown verb {args[0]!r}. Nearest: {nearest(args[0], VERBS)}")
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, None, rest
        if ctx.resilient_parsing:
            return name, _listed(name), rest
        first = os.environ.get("RANK", "0") == "0"  # of those that torchrun has started
        if name in TRAINING and first and not {"--help", "--quiet"} & {*rest}:
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


def _listed(name: str) -> Any:
    """Return a verb that has its options, for a shell that completes, and does nothing."""
    kinds = {"flag": bool, "path": Path, "text": str}
    options = json.loads(Path(__file__).with_name("completion.json").read_text(encoding="utf-8"))
    parameters = []
    for i, (flag, (kind, text)) in enumerate(options[name].items()):
        value = kinds[kind] if isinstance(kind, str) else Literal[tuple(kind)]
        hint: Any = Annotated[value, typer.Option(flag, help=text)]
        told: dict[str, Any] = {"default": False if kind == "flag" else "", "annotation": hint}
        parameters.append(Parameter(f"option{i}", Parameter.KEYWORD_ONLY, **told))

    def verb(**values: Any) -> None:
        """Do nothing."""

    verb.__annotations__ = {one.name: one.annotation for one in parameters}
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    listed = typer.Typer(add_completion=False)
    listed.command(name)(verb)
    return typer.main.get_command(listed)


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
    warnings.showwarning = _as_note  # for the process, which is the command line's


_show = warnings.showwarning


def _as_note(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
    """Say a warning of ours in a line, without the place in our code."""
    if issubclass(category, (BoundaryWarning, NoEffectWarning)):
        typer.echo(f"note: {message}", err=True)
    else:
        _show(message, category, *where, **how)
