"""What the parts of a Plan check of the values that they are given."""

import copy
import math
from typing import Any, TypeVar

from ..errors import PlanError

__all__ = [
    "changed",
    "check_amounts",
    "check_balance",
    "check_counts",
    "check_switches",
    "is_number",
]

_T = TypeVar("_T")

_LARGEST = 3.4028234663852886e38  # of float32, in which networks hold them


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a number, finite in float32 too, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and abs(value) <= _LARGEST
    except OverflowError:  # an int beyond all floats
        return False


def changed(value: _T, **fields: Any) -> _T:
    """Return a copy of a dataclass with other fields; its class may have any ``__init__``."""
    new = copy.copy(value)
    for name, field in fields.items():
        object.__setattr__(new, name, field)  # it is frozen
    check: Any = new
    check.__post_init__()
    return new


def check_counts(owner: object, *names: str, least: int = 1) -> None:
    """Raise a PlanError unless each of these attributes is a whole number from ``least``."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _refusal(owner, name, f"give a whole number, at least {least}")


def check_amounts(owner: object, what: str, *names: str) -> None:
    """Raise a PlanError unless each of these attributes is a finite number from 0."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _refusal(owner, name, f"the {what} must be a number")
        if not is_number(value) or value < 0:
            raise _refusal(owner, name, f"the {what} must be finite and at least 0, in float32")


def check_switches(owner: object, *names: str) -> None:
    """Raise a PlanError unless each of these attributes is a bool."""
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise _refusal(owner, name, "give True or False")


def _refusal(owner: object, name: str, wanted: str) -> PlanError:
    return PlanError(f"{type(owner).__name__}({name}={getattr(owner, name)!r}): {wanted}")


def check_balance(owner: Any) -> None:
    """Raise a PlanError unless ``balance`` says how blocks are shared out to ``count`` stages."""
    if isinstance(owner.balance, list):
        object.__setattr__(owner, "balance", tuple(owner.balance))
    kind, count, balance = type(owner).__name__, owner.count, owner.balance
    if isinstance(balance, tuple) and all(isinstance(name, str) for name in balance):
        if len(balance) == count - 1:
            return
        raise PlanError(
            f"{kind}(count={count}, balance={balance!r}): give the {count - 1} blocks that begin "
            f"those after the first, not {len(balance)}"
        )
    if balance not in ("memory", "blocks", "time"):
        raise PlanError(
            f"{kind}(balance={balance!r}): give 'memory', 'blocks', 'time', or the names of the "
            "blocks that begin those after the first"
        )
