"""What a user names as ``package.module:name``: their own model, data, strategy or rule."""

import importlib
import inspect
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, get_type_hints

from ..errors import PlanError, nearest
from ..plan import Plan
from ..schedules import Constant, Schedule

__all__ = ["RAISED", "OwnStrategy", "import_own", "where_raised"]

# By a user's code, which may raise anything; a script ends by `SystemExit` when it is imported.
RAISED = (Exception, SystemExit)
_modules: set[str] = set()  # that users have named


def import_own(name: str, what: str, error: type[Exception]) -> Any:
    """Import it; the current folder counts too, as with ``python -m``.

    Args:
        name: "package.module:name".
        what: it is for, as an error says it.
        error: what to raise if there is no such thing.
    """
    module_name, _, attribute = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    except RAISED as found:
        raise error(
            f"cannot import {module_name!r} for {what} {name!r}: {type(found).__name__}: {found}"
        ) from found
    _modules.add(module.__name__)
    value: object = getattr(module, attribute, None)
    if value is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise error(
            f"module {module_name!r} has no {attribute!r}. Nearest: {nearest(attribute, public)}"
        )
    return value


def where_raised(error: BaseException) -> str:
    """Return the line of a module that the user has named; nothing if none has raised it."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if frame.f_globals.get("__name__") in _modules:
            return f"{frame.f_code.co_filename}, line {line}"
    return ""


@dataclass(frozen=True)
class OwnStrategy:
    """What makes a schedule: a function or class of the user's, or a schedule itself.

    Its keywords are the arguments of a spec, but for ``epochs`` and ``goal``, which it gets from
    the run if it names them. It returns a schedule, or a Plan that holds throughout.
    """

    name: str
    made_by: Any

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments with their defaults; `inspect.Parameter.empty` of those without."""
        if not callable(self.made_by):
            return {}
        parameters = inspect.signature(self.made_by).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return {p.name: p.default for p in named if p.name not in ("epochs", "goal")}

    @property
    def hints(self) -> dict[str, Any]:
        """The types of those that have one."""
        made_by: Any = self.made_by
        if isinstance(made_by, type):
            made_by = made_by.__init__  # type: ignore[misc]  # of this very class
        try:
            return get_type_hints(made_by)
        except (NameError, TypeError):
            return {}

    def __call__(self, epochs: int, goal: Any, **given: Any) -> Schedule:
        """Make the schedule; a PlanError if that raises, or makes none."""
        made = self.made_by
        if callable(made) and not _is_schedule(made):
            takes = inspect.signature(made).parameters
            shared = {"epochs": epochs, "goal": goal}
            told = {name: value for name, value in shared.items() if name in takes}
            try:
                made = made(**told, **given)
            except PlanError:
                raise
            except RAISED as error:
                raise PlanError(f"{self.name} raises {type(error).__name__}: {error}") from error
        if isinstance(made, Plan):
            return Constant(made)
        if not _is_schedule(made):
            raise PlanError(
                f"{self.name} makes {type(made).__name__}, no schedule: give what has "
                "plan(analysis, epoch, step, rank), or a Plan"
            )
        return made  # type: ignore[no-any-return]


def _is_schedule(value: Any) -> bool:
    if isinstance(value, type) or not callable(plan := getattr(value, "plan", None)):
        return False
    try:
        inspect.signature(plan).bind(None, 0, 0, 0)
    except (TypeError, ValueError):
        return False
    return True
