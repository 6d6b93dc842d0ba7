"""Medians and quartiles, by hand; and which of them are too noisy to say anything."""

import pytest

from fxlocal.experiments.bench.spread import (
    explain_spread,
    find_spread,
    is_noisy,
    ratios,
    spread_text,
)


def quantile(values, share):
    """What lies so far along the way from the lowest to the highest, from value to value."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@pytest.mark.parametrize(
    "values",
    [[3.0], [4.0, 1.0], [5.0, 1.0, 2.0], [1.0, 7.0, 2.5, 4.0], [0.1 * i for i in range(9)]],
)
def test_quartiles_lie_where_the_oracle_has_them(values):
    found = find_spread(own=values, other=[-value for value in values])
    assert found["own"] == pytest.approx(quantile(values, 0.5))
    assert found["own_quartiles"] == pytest.approx([quantile(values, q) for q in (0.25, 0.75)])
    assert found["other_quartiles"] == pytest.approx([-q for q in found["own_quartiles"][::-1]])


def test_ratios_are_of_one_round():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("values", "same", "noisy"),
    [
        ([0.9, 1.0, 1.2], 1, True),
        ([0.9, 0.95, 0.99, 2.0], 1, True),
        ([0.9, 0.95, 0.97, 0.99, 2.0], 1, False),  # one outlier says nothing
        ([1.0, 1.0, 1.1], 1, True),
        ([1.0, 1.0, 1.0], 1, False),  # of itself
        ([1.02, 1.03, 1.1], 1, False),
        ([1.02, 1.03, 1.1], 0, False),
        ([-1.0, 2.0], 0, True),
    ],
)
def test_what_lies_around_no_difference_is_marked(values, same, noisy):
    found = find_spread(ratio=values)
    assert is_noisy(*found["ratio_quartiles"], same) == noisy
    assert spread_text(found, "ratio", ".2f", same).startswith("~") == noisy
    assert not spread_text(found, "ratio", ".2f").startswith("~")


def test_one_round_says_so_and_has_no_quartiles():
    assert spread_text(find_spread(ms=[1.5]), "ms", ".1f", same=1.5) == "1.5"
    assert "nothing" in explain_spread(1) and "~: too noisy" in explain_spread(2)
