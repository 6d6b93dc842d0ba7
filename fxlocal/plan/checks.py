"""What the parts of a Plan check of the values that they are given."""

import math

from ..errors import PlanError

__all__ = ["check_balance", "check_counts", "is_number"]


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def check_counts(owner: object, *names: str, least: int = 1) -> None:
    """Raise a PlanError unless each of these attributes is a whole number from ``least``."""
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = type(owner).__name__
            raise PlanError(f"{kind}({name}={value!r}): give a whole number, at least {least}")


def check_balance(kind: str, count: int, balance: object) -> None:
    """Raise a PlanError unless ``balance`` says how blocks are shared out to ``count`` stages."""
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
