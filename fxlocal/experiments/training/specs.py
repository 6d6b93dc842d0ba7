"""Strategy specs: one text says by what a run is trained, ``freeze-eval(start=0.2)+topk(k=2)``.

    spec      = part, {"+", part}
    part      = name, ["(", [argument, {",", argument}], ")"]
    argument  = name, "=", value

A name is one of `fxlocal.experiments.training.strategies.STRATEGIES`, an argument a keyword of its
function, and a value a literal of Python or a plain word: ``k=2``, ``rate_decay=(0.5, 10)``,
``curve=linear``, ``force=true``. ``package.module:name(argument=value)`` is a strategy of the
user's, see `fxlocal.experiments.own.OwnStrategy`. Parts are one of each kind: a prefix, local
modules, stochastic depth, and an approximation.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...errors import PlanError, nearest
from ...plan import Rule
from ...schedules import Schedule, combine
from ...schedules.prefix import MovingPrefix
from ..data.task import Goal
from ..models.catalogue import MODELS
from ..own import OwnStrategy, import_own
from .strategies import APPROXIMATIONS, MODULES, PREFIXES, STRATEGIES, Modulation, OwnRule

__all__ = [
    "Part",
    "Spec",
    "StrategyError",
    "describe_strategy",
    "find_strategy",
    "fitted",
    "is_model",
    "parse_parts",
    "parse_spec",
    "read_value",
    "split_list",
    "value_text",
]

_KINDS = (PREFIXES, MODULES, ("stochastic-depth",), APPROXIMATIONS)


class StrategyError(ValueError):
    """There is no such strategy, or its arguments make no schedule."""


@dataclass(frozen=True)
class Part:
    """One strategy of a spec, and the arguments that it is given."""

    name: str
    given: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments, given or not."""
        defaults = _defaults(find_strategy(self.name))
        every = {name: self.given.get(name, value) for name, value in defaults.items()}
        return {name: value for name, value in every.items() if value is not Parameter.empty}

    def __str__(self) -> str:
        told = ",".join(f"{name}={value_text(value)}" for name, value in self.given.items())
        return f"{self.name}({told})" if told else self.name


@dataclass(frozen=True)
class Spec:
    """What a spec's text says; ``text`` is also what its runs are recorded under."""

    text: str
    parts: tuple[Part, ...]

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """All arguments of each part, for the record."""
        return {part.name: part.arguments for part in self.parts}

    @property
    def modulation(self) -> Modulation:
        """What takes the steps of local layers, if not the rule itself."""
        found: Modulation = self.of_run("modulation")
        return found

    def of_run(self, name: str) -> Any:
        """Return an argument that is of runs, not of schedules; None if no part is given it."""
        return next((part.given[name] for part in self.parts if name in part.given), None)

    def told(self, **values: Any) -> "Spec":
        """Return a spec with these arguments too, in each part that takes them.

        Raises:
            StrategyError: if no part takes one, or it is of another type.
        """
        for name in values:
            if not any(name in part.arguments for part in self.parts):
                known = dict.fromkeys(n for part in self.parts for n in part.arguments)
                raise StrategyError(
                    f"{self.text} has no argument {name!r}. Nearest: {nearest(name, known)}"
                )
        parts = []
        for part in self.parts:
            mine = {n: v for n, v in values.items() if n in part.arguments}
            function = find_strategy(part.name)
            fit = {n: fitted(part.name, function, n, value) for n, value in mine.items()}
            parts.append(Part(part.name, {**part.given, **fit}))
        return Spec("+".join(map(str, parts)), tuple(parts))

    def schedule(self, epochs: int, goal: Goal = Goal()) -> Schedule:  # noqa: B008  # frozen
        """Make the schedule of a run of ``epochs``; heads and losses are the goal's.

        Raises:
            StrategyError: if an argument is out of range, or changes nothing beside another.
        """
        try:
            made = [find_strategy(part.name)(epochs, goal, **part.given) for part in self.parts]
            return reduce(combine, made)
        except PlanError as error:
            raise StrategyError(f"strategy {self.text!r}: {error}") from error

    def rule(self, epochs: int) -> Rule | None:
        """Return how the layers before its boundary learn; None if there is no boundary."""
        alone = (Spec(str(part), (part,)).schedule(epochs) for part in self.parts)
        return next((one.rule for one in alone if isinstance(one, MovingPrefix)), None)


def parse_spec(text: str) -> Spec:
    """Read a spec.

    Raises:
        StrategyError: if there is no such strategy or argument, a value is of the wrong type, or
            the parts contradict each other.

    Example:
        >>> parse_spec("freeze-eval(start=0.2)+topk(k=2)").parts[1]
        Part(name='topk', given={'k': 2})
    """
    if text in MODELS or text.startswith(("torchvision:", "timm:")):
        raise StrategyError(
            f"{text!r} is a model: fxlocal compare sets it beside strategies, nothing else does; "
            f"give one of {', '.join(STRATEGIES)}"
        )
    parts = parse_parts(text, STRATEGIES)
    kinds = [sum(part.name in kind for part in parts) for kind in _KINDS]
    known = sum(kinds) + sum(":" in part.name for part in parts)  # of the user's no kind is known
    if len(parts) > 1 and (known < len(parts) or max(kinds) > 1):
        *others, last = (", ".join(kind) for kind in _KINDS)
        raise StrategyError(
            f"strategy {text!r}: its parts contradict each other or change nothing; join one of "
            f"{', one of '.join(others)} and one of {last}, or of two of these kinds"
        )
    return Spec(text, parts)


def parse_parts(
    text: str, known: Mapping[str, Callable[..., Any]], what: str = "strategy"
) -> tuple[Part, ...]:
    """Read the parts of a text in the language of specs.

    Args:
        text: what to read.
        known: functions by name, whose keywords, behind two parameters, are a part's arguments.
        what: each is called in an error.

    Raises:
        StrategyError: if there is none of a name, no such argument, or one of another type.
    """
    return tuple(_parse_part(part, text, known, what) for part in split_list(text, "+"))


def _parse_part(text: str, whole: str, known: Mapping[str, Callable[..., Any]], what: str) -> Part:
    name, bracket, rest = text.partition("(")
    within = "" if text == whole else f" in {whole!r}"
    if known is STRATEGIES and ":" in name:
        known = {name: find_strategy(name)}
    if name not in known:
        raise StrategyError(f"unknown {what} {name!r}{within}. Nearest: {nearest(name, known)}")
    if bracket and not rest.endswith(")"):
        raise StrategyError(f"{text!r}{within}: give NAME(ARGUMENT=VALUE, ...)")
    return Part(name, dict(_parse_arguments(name, known[name], rest[:-1])))


def _parse_arguments(
    strategy: str, function: Callable[..., Any], text: str
) -> Iterator[tuple[str, Any]]:
    known, seen = _defaults(function), set()
    for argument in split_list(text) if text.strip() else []:
        asked, equals, value = argument.partition("=")
        name = asked.strip().replace("-", "_")
        if not equals:
            raise StrategyError(f"{strategy}: {argument!r}: give ARGUMENT=VALUE, as in largest=0.5")
        if name not in known:
            takes = str(Part(strategy, known)) if known else f"{strategy} takes none"
            raise StrategyError(
                f"{strategy} has no argument {name!r}. Nearest: {nearest(name, known)}; {takes}"
            )
        if name in seen:
            raise StrategyError(f"{strategy}: {name} comes twice")
        seen.add(name)
        yield name, fitted(strategy, function, name, read_value(value))


def describe_strategy(name: str) -> str:
    """Return the strategy with its arguments and their defaults, as a spec would give them."""
    return str(Part(name, _defaults(find_strategy(name))))


def find_strategy(name: str) -> Callable[..., Schedule]:
    """Return what makes the schedule of a strategy; a StrategyError if the user's is not there."""
    if ":" in name:
        return OwnStrategy(name, import_own(name, "strategy", StrategyError))
    return STRATEGIES[name]


def is_model(name: str) -> bool:
    """Tell whether ``name`` is a model's and no strategy's; a user's strategy has brackets."""
    return name in MODELS or (":" in name and "(" not in name)


def split_list(text: str, at: str = ",") -> list[str]:
    """Split ``text`` at each ``at`` that stands outside of brackets and quotes.

    Raises:
        StrategyError: if a bracket or a quote is not closed.

    Example:
        >>> split_list("sgd, local-static(rate_decay=(0.5, 10))")
        ['sgd', 'local-static(rate_decay=(0.5, 10))']
    """
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([") - (char in ")]")
        if char == at and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    if depth or quote:
        raise StrategyError(f"{text!r}: a bracket or a quote is not closed, or was not opened")
    return [part.strip() for part in parts]


# Values


def read_value(text: str) -> Any:
    """Read a literal or a word; StrategyError if it is neither."""
    text = text.strip()
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        if not re.fullmatch(r"[\w.:-]+", text):
            raise StrategyError(f"{text!r} is no value: give a number, a word or (A, B)") from None
        return text


def value_text(value: Any) -> str:
    """Write a value as `read_value` reads it."""
    if isinstance(value, (tuple, list)):
        return f"({','.join(map(value_text, value))})"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the keywords of a strategy's function with their defaults."""
    if isinstance(function, OwnStrategy):
        return function.keywords
    keywords = list(inspect.signature(function).parameters.values())[2:]
    return {keyword.name: keyword.default for keyword in keywords}


def fitted(strategy: str, function: Callable[..., Any], name: str, value: Any) -> Any:
    """Return the value as one of the keyword's type; StrategyError if it is none."""
    if isinstance(function, OwnStrategy):
        kind = function.hints.get(name, Any)
    else:
        kind = get_type_hints(function.func if isinstance(function, partial) else function)[name]
    try:
        return _of_type(kind, value)
    except ValueError:
        raise StrategyError(
            f"{strategy}: {name}={value_text(value)} is not {_describe_type(kind)}"
        ) from None


def _of_type(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return _of_type(part, value)
            except ValueError:
                continue
    elif origin is tuple:
        if isinstance(value, (tuple, list)) and len(value) == len(parts):
            return tuple(map(_of_type, parts, value))
    elif origin is Literal:
        if value in parts:
            return value
    elif kind is Any or (kind is OwnRule and ":" in str(value)):
        return value
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    raise ValueError


def _describe_type(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        return f"({', '.join(map(_describe_type, parts))})"
    if parts:
        return " or ".join(map(_describe_type, parts))
    words = {float: "a number", int: "a whole number", bool: "true or false", NoneType: "none"}
    words[OwnRule] = "package.module:function"
    return words.get(kind, "a word")
