"""The local part of a Plan: the values that it refuses, and its rate."""

import pytest

from fxlocal import Custom, Freeze, Hebbian, LocalPrefix, Oja, Plan, PlanError, TopK
from fxlocal.schedules import Dynamic, Static


class MyHebbian(Hebbian):
    """As no rule of fxlocal's own."""


class MyOja(Oja):
    """As no rule of fxlocal's own."""


class MyTopK(TopK):
    """As no method of fxlocal's own."""


REFUSED = [
    (lambda: LocalPrefix(until=-1), "until=-1: a layer index counts from 0"),
    (lambda: LocalPrefix(until=1.0), r"until=1.0: a fraction must lie in \(0, 1\)"),
    (lambda: LocalPrefix(until=0.0), "until=0.0: a fraction"),
    (lambda: LocalPrefix(until=float("nan")), "until=nan: a fraction"),
    (lambda: LocalPrefix(until=True), "until=True: give a module path, a layer index"),
    (lambda: LocalPrefix(until=None), "until=None: give a module path"),
    (lambda: LocalPrefix(until=1, rule=Hebbian), "rule=.*: give Hebbian"),
    (lambda: LocalPrefix(until=1, rule=MyHebbian()), r"rule=MyHebbian\(.*or Custom\(function\)"),
    (lambda: LocalPrefix(until=1, rule=MyOja()), r"rule=MyOja\(.*a subclass of Hebbian or Oja"),
    (lambda: Plan(weight_grads={"fc": MyTopK()}), "MyTopK.*no subclass of one"),
    (lambda: LocalPrefix(until=1, norm="fixed"), "norm='fixed'"),
    (lambda: Hebbian(rate=-1.0), "the rate must be finite and at least 0"),
    (lambda: Hebbian(rate=float("inf")), "the rate must be finite"),
    (lambda: Hebbian(rate="0.1"), "the rate must be a number"),
    (lambda: Hebbian(rate=True), "the rate must be a number"),
    (lambda: Hebbian(relative=1), r"Hebbian\(relative=1\): give True or False"),
    (lambda: Oja(rate=-1.0), r"Oja\(rate=-1.0\): the rate must be finite"),
    (lambda: Custom("hebbian"), r"Custom\(delta='hebbian'\): give a function"),
    (lambda: Custom(len, rate=-1.0), r"Custom\(rate=-1.0\): the rate must be finite"),
    (lambda: Plan(local="conv1"), "local='conv1': give LocalPrefix"),
]


@pytest.mark.parametrize("make,message", REFUSED, ids=range(len(REFUSED)))
def test_a_value_that_means_nothing_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


BAD_VALUES = [1.5, -0.5, float("inf"), ("fc",), b"fc"]


@pytest.mark.parametrize("until", BAD_VALUES, ids=repr)
def test_a_boundary_of_the_wrong_type_or_range_is_refused(until):
    with pytest.raises(PlanError, match="until="):
        LocalPrefix(until)


def test_with_rate_changes_nothing_but_the_rate():
    plan = Plan(local=LocalPrefix("fc", Hebbian(1.0), "eval"))
    assert plan.with_rate(0.25) == Plan(local=LocalPrefix("fc", Hebbian(0.25), "eval"))
    assert (plan.rate, Plan().rate, Plan(local=LocalPrefix(1, Freeze())).rate) == (1.0, 0.0, 0.0)
    assert Plan().with_rate(0.5) == Plan()


class MyCustom(Custom):
    def __init__(self, factor):
        super().__init__(min, 1.0)
        object.__setattr__(self, "factor", factor)


def test_with_rate_takes_a_custom_rule_with_an_init_of_its_own():
    rule = MyCustom(3.0)
    other = Plan(local=LocalPrefix("fc", rule)).with_rate(0.5).local.rule
    assert (other.rate, other.factor, rule.rate, type(other)) == (0.5, 3.0, 1.0, MyCustom)
    with pytest.raises(PlanError, match="the rate must be finite"):
        Plan(local=LocalPrefix("fc", rule)).with_rate(-0.5)


@pytest.mark.parametrize("kind", [Static, Dynamic])
def test_so_does_a_schedule(kind):
    class Mine(kind):
        def __init__(self, length):
            super().__init__(length)

    class Facts:
        layers, boundaries = tuple(range(20)), tuple(range(0, 20, 4))
        boundary = int

    assert [*Mine(5).asked(Facts)] == [*kind(5).asked(Facts)]
