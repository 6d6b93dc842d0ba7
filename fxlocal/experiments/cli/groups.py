"""One option for each field of a dataclass that a verb takes, in a panel of its own."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..training.settings import Machine, Settings

__all__ = ["expand_groups", "option"]


def option(text: str, panel: str, *names: str, **others: Any) -> Any:
    """Return an option with a line of help in a panel."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **others)


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass among the parameters of ``command`` by one option per field.

    Where such a parameter has a default, its fields are the options' defaults. The first line of
    the docstring of the dataclass that declares a field, or its name, is the option's panel. What
    is marked as rare stands in the page of ``--help-all`` alone.
    """
    # Python 3.10's get_type_hints would hide an option whose default is None in an Optional.
    hints = inspect.get_annotations(command, eval_str=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    own = inspect.signature(command).parameters
    options = {name: list(_field_options(kind, own[name].default)) for name, kind in groups.items()}
    parameters: list[Parameter] = []
    for name, parameter in own.items():
        if name in groups:
            parameters += options[name]
        else:
            kind = Parameter.KEYWORD_ONLY  # no order in which defaults must come
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))
    parameters.append(
        Parameter("help_all", Parameter.KEYWORD_ONLY, default=False, annotation=_HelpAll)
    )

    @functools.wraps(command)
    def expanded(help_all: bool, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in options[name]})
        command(**values)

    # typer reads these two, not the source.
    expanded.__annotations__ = {p.name: p.annotation for p in parameters}
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded


def _show_all(context: typer.Context, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]  # arguments and options have it
        typer.echo(context.get_help())
        raise typer.Exit


_HelpAll = Annotated[
    bool,
    option("Show rarer options too", "Output", "--help-all", callback=_show_all, is_eager=True),
]
_PANELS = {Settings: "Training", Machine: "Machine"}


def _field_options(group: Any, defaults: object) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    owners = {n: kind for kind in group.__mro__ for n in inspect.get_annotations(kind)}
    for field in sorted(fields(group), key=lambda field: owners[field.name] is not group):
        if get_origin(hints[field.name]) is Annotated:
            kind, text, *rare = get_args(hints[field.name])
            owner = owners[field.name]
            panel = _PANELS.get(owner) or inspect.cleandoc(owner.__doc__).split(".")[0]
            flag = [f"--{field.name.replace('_', '-')}"] if kind is bool else []  # and no --no-...
            # A help text lists the words, in less room.
            metavar = "WORD" if get_origin(kind) is Literal else None
            yield Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=getattr(defaults, field.name, field.default),
                annotation=Annotated[
                    kind, option(text, panel, *flag, metavar=metavar, hidden=bool(rare))
                ],
            )
