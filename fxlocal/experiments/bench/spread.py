"""What turns say and what they do not: medians, quartiles, and a sign for what is too noisy."""

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

__all__ = ["NOISY", "explain_spread", "find_spread", "is_noisy", "ratios", "spread_text"]

NOISY = "~"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round's two times."""
    return [a / b for a, b in zip(above, below, strict=True)]


def find_spread(**measured: Sequence[float]) -> dict[str, Any]:
    """Return the median of each, and as ``..._quartiles`` the lower and the upper one.

    They are interpolated between the lowest and the highest; a single value is all three.

    Example:
        >>> find_spread(milliseconds=[1.0, 5.0, 3.0])
        {'milliseconds': 3.0, 'milliseconds_quartiles': [2.0, 4.0]}
    """
    found = dict[str, Any]()
    for name, values in measured.items():
        several = values if len(values) > 1 else [*values, *values]
        low, found[name], high = quantiles(several, n=4, method="inclusive")
        found[f"{name}_quartiles"] = [low, high]
    return found


def is_noisy(low: float, high: float, same: float) -> bool:
    """Tell whether measurements lie around ``same``, so that they do not say which is more."""
    return low < high and low <= same <= high


def spread_text(row: Mapping[str, Any], name: str, form: str, same: float | None = None) -> str:
    """Return what `find_spread` found, marked if its quartiles lie around ``same``.

    Example:
        >>> spread_text(find_spread(ratio=[0.9, 1.0, 1.2]), "ratio", ".2f", same=1)
        '~1.00 (0.95..1.10)'
    """
    low, high = row[f"{name}_quartiles"]
    mark = NOISY if same is not None and is_noisy(low, high, same) else ""
    between = f" ({low:{form}}..{high:{form}})" if low < high else ""
    return f"{mark}{row[name]:{form}}{between}"


def explain_spread(repeats: int) -> str:
    """Say what the numbers of ``repeats`` rounds are, and what the mark means."""
    if repeats == 1:
        return "one round, which says nothing of the noise"
    return (
        f"medians of {repeats} rounds (their quartiles); "
        f"{NOISY}: too noisy to say which is more, as the quartiles lie around 1 or +0"
    )
